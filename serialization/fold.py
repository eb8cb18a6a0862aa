"""The exact fold: results in, in any order, from any number of workers; the same bits out.

::

    fold = Fold(plan)
    for each result: fold.add(path, site=..., meta=...)        # or start() / feed() / finish() chunk by chunk
    for each partial: fold.merge(path)
    match fold.check():
        case Good(): model = fold.finish(base)
        case Rescale(plan): fold everything again with Fold(plan)

A result is either whole in the fold or not in it at all: what is found bad half-way (NaN, Inf) is taken out exactly.
`remove` takes out what `add` added. Memory is the sums (8 bytes an element) and a megabyte, however many results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import structlog
from numpy.typing import NDArray

from .accumulator import Accumulator
from .elements import Floats, Scratch
from .envelope import Buffer
from .errors import FoldError, PayloadError, ValuesError, WireError
from .feeder import Feeder, Source, open_pieces
from .fixedpoint import FixedSums
from .foldmodel import NewModel, Rounding, build_model
from .foldpartial import read_partial, write_partial
from .foldplan import MAX_RESULTS, FoldPlan, Kind, Magnitudes
from .foldtensors import SmallModel, add_pieces, pieces_of
from .foldwrite import WrittenModel, write_model
from .header import Header
from .model import FLModel
from .payload import DESCRIPTION
from .plain import parse_json
from .segments import match_layout
from .sums import Addition, Scan, Sums
from .tally import Contribution, Tally, ignored_metrics, read_contribution

log = structlog.get_logger(__name__)

_NOTHING: Final = (Header((), {}, 0), list[memoryview]())


@dataclass(frozen=True, slots=True)
class Good:
    """The plan's scales were good for what came: the fold can be finished."""


@dataclass(frozen=True, slots=True)
class Rescale:
    """The scales were not good for the set of results that came: fold the same results again with this plan.

    Attributes:
        plan: the next plan; with it the same results are good, whatever they are.
        tensors: names of those whose scale changed.
    """

    plan: FoldPlan
    tensors: tuple[str, ...]


class Fold:
    """The aggregate of one round. Not thread-safe."""

    def __init__(self, plan: FoldPlan, *, spare: NDArray[Any] | None = None) -> None:
        """An empty aggregate that adds by this plan, in memory that another has released if that fits."""
        self.plan: Final = plan
        self.digest: Final = plan.digest
        self._places = {tensor.name: index for index, tensor in enumerate(plan.tensors)}
        self._sums = Sums(plan, spare)
        self._tally = Tally()
        self._open = 0
        self._kept: list[tuple[Source | None, str, Mapping[str, Any] | None]] | None = []
        self._lost = ""
        self._ignored: set[str] = set()
        self._scratch = Scratch()
        self._small: SmallModel | None = None  # made for the first result that comes as its tensors
        self._built: NewModel | WrittenModel | None = None

    # --- results ---------------------------------------------------------------------------------------------------

    def add(
        self,
        source: Source | None,
        *,
        site: str,
        meta: Mapping[str, Any] | None = None,
        kept: bool | None = None,
    ) -> None:
        """Add a result.

        Args:
            source: its payload: bytes, a file's path, or a model encoded in this process; None if it has no tensors.
            site: who sent it.
            meta: its plain side (``params_type``, ``metrics``, ``meta``); by default what the payload says of itself.
            kept: whether the source stays as it is until the round ends; by default a file does. Where a plan is not
                exact, such results are read once and not twice.

        Raises:
            LayoutError: names, dtypes or shapes that are not the model's.
            WeightError: steps that are missing from some results only, not positive, or no number.
            ValuesError: NaN, Inf or a value beyond 2^900.
            FoldError: FULL among DIFF results or the reverse.
            PayloadError: a file that cannot be read, or a malformed description.
            HeaderError: bytes that are no safetensors file.

        After any of them the fold is as it was before.
        """
        header, pieces = open_pieces(source) if source is not None else _NOTHING
        if self.plan.exact:
            _run(self._feeder(header, site, meta), pieces)
            return
        # Float sums cannot take a result out again. So all of it is looked at before any of it is added, or all others
        # are added anew behind a bad one, and from then on each is looked at first.
        kept = isinstance(source, Path) if kept is None else kept
        if self._kept is None or not kept:
            self._kept = None
            self._scan(header, pieces, site)
        feeder = self._feeder(header, site, meta)
        try:
            feeder.feed_all(pieces)
        except ValuesError:
            self._start_over(self._kept or [])
            raise
        feeder.finish()
        if self._kept is not None:
            self._kept.append((source, site, meta))

    def add_tensors(self, tensors: Mapping[Any, Any], *, site: str, meta: Mapping[str, Any]) -> bool:
        """Add a result out of the memory in which it was made: the same bits as by `add` with its payload.

        Args:
            tensors: name to tensor, flat.
            site: who made it.
            meta: its plain side.

        Returns:
            False for all but numpy arrays in the model's own types and shapes, averaged each of them and good. Nothing
            was added then: `add` takes them, or says what is wrong.
        """
        plan, sums = self.plan, self._sums
        if not plan.exact or plan.codec or self._tally.count >= MAX_RESULTS:
            return False
        if self._small is None and SmallModel.fits(plan):
            self._small = SmallModel(plan, sums.folded)
        looked = self._small.look(tensors) if self._small is not None else []
        pieces = pieces_of(plan, self._places, sums.folded, tensors) if self._small is None else []
        if not looked and not pieces:
            return False
        try:
            contribution = self._contribution(_NOTHING[0], site, meta)
            if contribution.kind is None:
                return False
            self._tally.add(contribution)
        except FoldError:
            return False
        sums.use(self._tally.kind or "FULL")
        if self._small is not None:
            self._small.add(plan, sums, contribution, looked)
        elif not add_pieces(plan, sums, contribution, pieces, self._scratch):
            self._tally.remove(contribution)
            return False
        return True

    def _start_over(self, results: list[tuple[Source | None, str, Mapping[str, Any] | None]]) -> None:
        self._kept = None
        self._sums, self._tally, self._open = Sums(self.plan, self.accumulator.release()), Tally(), 0
        try:
            for source, site, meta in results:
                self.add(source, site=site, meta=meta)
        except (FoldError, WireError, PayloadError) as error:
            self._lost = f"a result that was in cannot be read again: {error}"
            raise FoldError(self._lost) from error

    def remove(self, source: Source | None, *, site: str, meta: Mapping[str, Any] | None = None) -> None:
        """Take a result out again: the arguments are those with which it was added.

        Raises:
            FoldError: more is taken out than is there; and as `add`, if the source is not what it was.
        """
        self._needs_exact("taken out of")
        header, pieces = open_pieces(source) if source is not None else _NOTHING
        _run(self._feeder(header, site, meta, subtract=True), pieces)

    def start(self, header: Header, *, site: str, meta: Mapping[str, Any] | None = None) -> Feeder:
        """Begin a result whose bytes come in pieces: `Feeder.feed` them in order, then `Feeder.finish`.

        Several results can be under way at once. Until each is finished or undone, the fold can be neither read nor
        sent.

        Raises:
            LayoutError, WeightError, FoldError: as `add`.
        """
        self._needs_exact("fed in pieces into")
        return self._feeder(header, site, meta)

    def _feeder(self, header: Header, site: str, meta: Mapping[str, Any] | None, *, subtract: bool = False) -> Feeder:
        if self._tally.count >= MAX_RESULTS:
            raise FoldError(f"a round of over {MAX_RESULTS} results")
        segments = match_layout(self.plan, self._places, self._sums.folded, header, site)
        contribution = self._contribution(header, site, meta)
        if subtract:
            if not self._tally.count:
                raise FoldError(f"result of {site} is taken out of a fold that holds none")
            self._tally.check_kind(contribution.kind, contribution.weighted, site)
        else:
            self._tally.add(contribution)
        self._sums.use(self._tally.kind or "FULL")
        self._open += 1

        def sink(inverse: bool) -> Addition:
            checked = self._kept is None
            return Addition(self.plan, self._sums, contribution, subtract=subtract != inverse, checked=checked)

        def close(feeder: Feeder, whole: bool) -> None:
            self._open -= 1
            if whole:
                for index, largest in feeder.magnitudes.items():
                    self._sums.settle(index, contribution, largest, subtract=subtract)
            if whole == subtract:  # a result that was taken out, or one that was not added after all
                self._tally.remove(contribution)

        undoing = (lambda: sink(True)) if self.plan.exact else None
        return Feeder(segments, sink(False), who=site, stop=header.data_bytes, close=close, undoing=undoing)

    def _contribution(self, header: Header, site: str, meta: Mapping[str, Any] | None) -> Contribution:
        if meta is None:
            meta = parse_json(header.metadata[DESCRIPTION]) if DESCRIPTION in header.metadata else {}
        contribution = read_contribution(self.plan, site, meta)
        if contribution.kind is None and any(tensor.name in self._places for tensor in header.tensors):
            contribution = contribution._replace(kind="FULL")
        ignored = [name for name in ignored_metrics(meta) if name not in self._ignored] if meta.get("metrics") else ()
        if ignored and len(self._ignored) < 1000:
            self._ignored.update(ignored)
            log.warning("metrics_ignored", site=site, names=ignored[:8], reason="no finite numbers; no mean is taken")
        return contribution

    def _scan(self, header: Header, pieces: list[memoryview], site: str) -> None:
        segments = match_layout(self.plan, self._places, self._sums.folded, header, site)
        feeder = Feeder(segments, Scan(self.plan), who=site, stop=header.data_bytes, close=lambda feeder, whole: None)
        feeder.feed_all(pieces)

    # --- partials --------------------------------------------------------------------------------------------------

    def merge(self, source: Buffer | Path) -> None:
        """Add all results of a partial at once.

        Raises:
            FoldError: no partial, one by another plan, or of other kinds of results. Nothing was added then.
            LayoutError, PayloadError, HeaderError: a file that does not fit or cannot be read.
        """
        self._combine(source, subtract=False)

    def unmerge(self, source: Buffer | Path) -> None:
        """Take a partial out again that was merged.

        Raises:
            FoldError: more is taken out than is there; and as `merge`.
        """
        self._combine(source, subtract=True)

    def _combine(self, source: Buffer | Path, *, subtract: bool) -> None:
        self._needs_exact("put together in")
        partial = read_partial(source, self.digest, self.plan, self._sums.folded)
        left = self._tally.count - partial.tally.count if subtract else MAX_RESULTS - self._tally.count
        if left < 0 or (not subtract and partial.tally.count > left):
            raise FoldError(f"a partial of {partial.tally.count} results does not fit a fold of {self._tally.count}")
        self._tally.combine(partial.tally, -1 if subtract else 1)
        for index, record in partial.records.items():
            self._sums.combine(index, record, partial.sums[index], partial.lowest[index], subtract=subtract)
        self._sums.use(self._tally.kind or "FULL")

    def to_partial(self) -> tuple[list[memoryview], int]:
        """The fold's state as a payload: buffers, header first, and their size in bytes.

        The buffers are the sums' own memory: write or send them before anything else is added.

        Raises:
            FoldError: a result is half in, or the plan is not exact.
        """
        self._whole()
        return write_partial(self.digest, self.plan, self._sums, self._tally)

    # --- closing ---------------------------------------------------------------------------------------------------

    def check(self) -> Good | Rescale:
        """Whether the scales were good for the set of results that is in: decided on exact totals, not on the order.

        Raises:
            FoldError: a result is half in.
        """
        kind, better = self._verdict()
        if kind is None or not better:
            return Good()
        names = tuple(self.plan.tensors[index].name for index in better)
        log.info("fold_rescales", kind=kind, results=self._tally.count, tensors=len(names), first=names[0])
        return Rescale(self.plan.rescaled(kind, better), names)

    def finish(self, base: FLModel | Mapping[str, Any], *, master: Mapping[str, Any] | None = None) -> FLModel:
        """The new global model.

        FULL results replace, DIFF results are added to the base. A tensor that no result had, one that the plan
        excludes and bools keep the base's values (the same arrays). Integers are the exact mean, halves to even. Types
        narrower than float32 are rounded from a float32 `master`. Can be called again; `base` is not changed.

        Args:
            base: the global model that the sites received; numpy arrays or torch tensors.
            master: the float32 values behind its narrow tensors, as an earlier fold's `master` gave them.

        Returns:
            numpy arrays, nested as the base's; with `metrics` and the base's rounds.

        Raises:
            FoldError: no results, a result that is half in, or scales that are not good (see `check`).
            LayoutError: a base that is not the plan's model.
            ValuesError: a value that the model's dtype cannot hold.
        """
        built = self._built = build_model(self._rounding(base, master))
        model = built.model
        model.metrics = self.metrics or None
        return model

    def write(
        self, base: FLModel | Mapping[str, Any], fd: int, *, master: Mapping[str, Any] | None = None
    ) -> WrittenModel:
        """The new global model as a payload, in an empty file that is open for writing, without one in memory.

        The payload is that of the model that `finish` gives, without metrics; all else is as after `finish`.

        Raises:
            FoldError, LayoutError, ValuesError: as `finish`; the file may hold a part of the payload then.
            OSError: the disk refused.
        """
        built = self._built = write_model(self._rounding(base, master), fd)
        return built

    def mean(self, name: str) -> Floats:
        """A float tensor's weighted mean before it is rounded to the model's type: float64, in the tensor's shape.

        Raises:
            FoldError: no result had the tensor, it is no float, or a result is half in.
        """
        self._whole()
        index = self._places.get(name, -1)
        if index < 0 or not self._sums.records[index].count or not self._sums.is_float(index):
            raise FoldError(f"no result had a float tensor {name!r}")
        return self._sums.mean_of(index)

    def magnitudes(self) -> Magnitudes:
        """What the next plan's scales are chosen from. Raises FoldError before `finish`."""
        if self._built is None:
            raise FoldError("magnitudes are known after finish()")
        equal = self._tally.equal and not self.plan.aggregation_weights
        return Magnitudes(
            kind=self._tally.kind or "FULL",
            results=tuple(self._sums.magnitude(index) for index in range(len(self.plan.tensors))),
            base=self._built.largest,
            weight_cap=1.0 if equal else 4.0 * self._tally.largest_weight(),
        )

    def next_plan(self, *, tasks: int | None = None) -> FoldPlan:
        """The next round's plan; after `finish`. Raises FoldError before it."""
        return self.plan.next(self.magnitudes(), tasks=tasks)

    @property
    def accumulator(self) -> Accumulator:
        """The float sums: once this fold is done with, their `release` is the next one's ``spare``."""
        return self._sums.floats.sums

    @property
    def master(self) -> dict[str, Any]:
        """After `finish`: float32 values of the tensors narrower than that, for the commit and the next `finish`."""
        return dict(self._built.master) if self._built else {}

    @property
    def metrics(self) -> dict[str, float]:
        """Each numeric metric's weighted mean over the results that have it."""
        return self._tally.means()

    @property
    def weight_sum(self) -> Fraction:
        """The exact sum of the results' weights."""
        return self._tally.weight_sum

    @property
    def equal_weights(self) -> bool:
        """Whether no result named its steps, so that each counts as one: to be said in the round's record."""
        return self._tally.equal

    @property
    def count(self) -> int:
        """How many results are in, those of partials among them."""
        return self._tally.count

    @property
    def kind(self) -> Kind | None:
        """FULL or DIFF; None as long as no result had tensors."""
        return self._tally.kind

    @property
    def nbytes(self) -> int:
        """Memory of the float sums, in bytes."""
        return self._sums.nbytes

    def _rounding(self, base: FLModel | Mapping[str, Any], master: Mapping[str, Any] | None) -> Rounding:
        self._whole()
        if not self._tally.count:
            raise FoldError("no results to make a model of")
        if self._verdict()[1]:
            raise FoldError(
                "the plan's scales do not hold these results: fold them again with the plan that check() gives"
            )
        return Rounding(self.plan, self._sums, self._tally.kind, base, master or {})

    def _verdict(self) -> tuple[Kind | None, dict[int, int]]:
        self._whole()
        kind = self._tally.kind
        return kind, self._sums.better_scales(kind) if kind else {}

    def _whole(self) -> None:
        if self._lost:
            raise FoldError(self._lost)
        if self._open:
            raise FoldError(f"{self._open} results are half in: finish them, or undo them and feed what they then want")

    def _needs_exact(self, what: str) -> None:
        if not isinstance(self._sums.floats, FixedSums):
            raise FoldError(f"results cannot be {what} a running mean: use exact=True")


def _run(feeder: Feeder, pieces: list[memoryview]) -> None:
    """Feed a whole result; one that is bad is taken out again."""
    try:
        feeder.feed_all(pieces)
        feeder.finish()
    except FoldError:
        undo = feeder.undo()
        if undo is not None:
            undo.feed_all(pieces)
            undo.finish()
        raise
