"""The fold against a model of it: any history of adds, half adds, merges, take-backs, crashes and refolds.

The model is the set of results that count, and nothing else. After every rule the fold's whole state, read out of the
partial that it would send, is what exact arithmetic makes of that set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fedloom.serialization.errors import FoldError, LayoutError, ValuesError, WeightError
from fedloom.serialization.feeder import Feeder
from fedloom.serialization.fold import Fold, Good, Rescale
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.model import FLModel
from fedloom.serialization.payload import encode_model
from fold_reference import (
    BASE,
    FLOATS,
    INTS,
    NAMES,
    PLACES,
    SITES,
    STEPS,
    TOTAL_UNIT,
    UNIT,
    Result,
    Totals,
    all_totals,
    better_scales,
    bits_of,
    make_result,
    means_of,
    negative,
    number,
    payload_of,
    state_of,
    wrap,
)
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lengths import AS_FOUND, long, short


@dataclass(frozen=True)
class Draft:
    """A result before the round says of which kind it is; an odd one goes against the round."""

    seed: int
    kind: str | None
    steps: float
    missing: int
    scale: int
    odd: str


DRAFTS = st.builds(
    Draft,
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["FULL", "DIFF", None]),
    steps=st.sampled_from([1.0, 1.0, 1.0, 3.0, 0.1, 1000.0, 7.25, 2.0**20, 2.0**-30]),
    missing=st.just(0) | st.integers(0, 2 ** len(NAMES) - 1),
    scale=st.sampled_from([0] * 15 + [-30, -20, -18, -17, -16, -15, -14, -8, -3, 3, 8, 12, 600]),
    odd=st.sampled_from(["", "", "", "", "", "", "kind", "steps"]),
)
LUCK = st.integers(0, 2**32)
MOST = 8


class FoldMachine(RuleBasedStateMachine):
    """Singles and groups are what was added one by one and through partials; half are those under way."""

    def __init__(self) -> None:
        super().__init__()
        self.base = dict(BASE)
        self.plan = FoldPlan.first(self.base, tasks=8, weight_cap=64.0, aggregation_weights=SITES, exclude="^head$")
        self.begin_round(self.plan)

    def begin_round(self, plan: FoldPlan) -> None:
        self.plan = plan
        self.fold = Fold(plan)
        self.singles: list[Result] = []
        self.groups: list[tuple[bytes, list[Result]]] = []
        self.half: list[tuple[Result, Feeder, bool]] = []  # True: the feeder takes out again
        self.saved: tuple[bytes, list[Result]] | None = None

    # --- the model ---------------------------------------------------------------------------------

    @property
    def counted(self) -> list[Result]:
        """The results that count."""
        return [*self.singles, *(result for _, results in self.groups for result in results)]

    @property
    def known(self) -> list[Result]:
        """Those, and what is half in: the round's kind is theirs."""
        return [*self.counted, *(result for result, _, _ in self.half)]

    def make(self, *drafts: Draft) -> list[Result]:
        """Results of the round's kind, but for what is odd about them."""
        known = self.known
        out: list[Result] = []
        for draft in drafts:
            have = [*known, *out]
            kind = next((result.kind for result in have if result.kind), None)
            mine = draft.kind and (kind or draft.kind)
            steps = draft.steps if not have or have[0].steps is not None else None
            if not have and draft.seed % 3 == 0:
                steps = None
            if draft.odd == "kind" and kind:
                mine = "DIFF" if kind == "FULL" else "FULL"
            if draft.odd == "steps" and have:
                steps = None if steps else draft.steps
            out.append(make_result(draft.seed, mine, steps, draft.missing, draft.scale))
        return out

    def refusal(self, results: list[Result], among: list[Result]) -> type[FoldError] | None:
        """How results must be refused beside others."""
        everything = [*among, *results]
        if len({r.kind for r in everything if r.kind}) > 1:
            return FoldError
        return WeightError if len({r.steps is None for r in everything}) > 1 else None

    def takes(self, error: type[FoldError] | None, call: Callable[[], object]) -> bool:
        """Run a step; whether it was taken. A refusal has to be of this class, and leaves no trace."""
        if error is None:
            call()
            return True
        before = None if self.half else state_of(self.fold)
        with pytest.raises(error):
            call()
        assert self.half or state_of(self.fold) == before
        return False

    def grouped(self, results: list[Result], luck: int) -> Fold:
        """A fold of these results in another order and grouping."""
        rng = random.Random(luck)
        total = Fold(self.plan)
        parts = [Fold(self.plan) for _ in range(3)]
        for result in rng.sample(results, len(results)):
            rng.choice([total, *parts]).add(result.encoded, site=result.site)
        parts[1].merge(payload_of(parts[2]))  # a partial of partials
        for part in rng.sample(parts[:2], 2):
            total.merge(payload_of(part))
        return total

    # --- results -----------------------------------------------------------------------------------

    @initialize(drafts=st.lists(DRAFTS, max_size=3))
    def start(self, drafts: list[Draft]) -> None:
        for draft in drafts:
            self.add(replace(draft, odd=""))

    @precondition(lambda self: len(self.known) < MOST)
    @rule(draft=DRAFTS)
    def add(self, draft: Draft) -> None:
        [result] = self.make(draft)
        if self.takes(self.refusal([result], self.known), lambda: self.fold.add(result.encoded, site=result.site)):
            self.singles.append(result)

    @precondition(lambda self: len(self.known) < MOST)
    @rule(draft=DRAFTS, part=st.floats(0, 1))
    def begin(self, draft: Draft, part: float) -> None:
        [result] = self.make(draft)
        started: list[Feeder] = []
        call = lambda: started.append(self.fold.start(result.encoded.header, site=result.site))  # noqa: E731
        if self.takes(self.refusal([result], self.known), call):
            self.half.append((result, started[0], False))
            self.feed(len(self.half) - 1, part)

    @precondition(lambda self: self.half)
    @rule(luck=LUCK, part=st.floats(0, 1) | st.just(1.0))
    def go_on(self, luck: int, part: float) -> None:
        self.feed(luck % len(self.half), part)

    def feed(self, place: int, part: float) -> None:
        """Feed this part of what a half result still misses; with all of it there it counts, or is gone."""
        result, feeder, taking_out = self.half[place]
        at = feeder.position
        feeder.feed(at, result.data[at : at + math.ceil(feeder.missing * part)])
        if not feeder.missing and part == 1.0:
            feeder.finish()
            del self.half[place]
            if not taking_out:
                self.singles.append(result)

    @precondition(lambda self: any(not taking_out for _, _, taking_out in self.half))
    @rule(luck=LUCK)
    def give_up(self, luck: int) -> None:
        place = random.Random(luck).choice([i for i, (_, _, out) in enumerate(self.half) if not out])
        self.undo(place)

    def undo(self, place: int) -> None:
        """Give up a half result: it is gone at once, or half in still until it was taken out."""
        result, feeder, _ = self.half.pop(place)
        undoing = feeder.undo()
        if undoing is not None:
            self.half.append((result, undoing, True))

    @rule(draft=DRAFTS, value=st.sampled_from([np.nan, np.inf, -np.inf]), luck=LUCK, pieces=st.booleans())
    def add_bad_values(self, draft: Draft, value: float, luck: int, pieces: bool) -> None:
        """NaN or Inf anywhere: refused; what was added before it was found is taken out again."""
        [result] = self.make(replace(draft, odd="", missing=0, kind=draft.kind or "FULL"))
        rng = random.Random(luck)
        name = rng.choice([name for name in FLOATS if BASE[name].size])
        spoilt = result.params[name].copy()
        spoilt.reshape(-1)[rng.choice([0, -1])] = value
        encoded = encode_model(
            FLModel(
                params=result.params | {name: spoilt}, params_type=result.kind, metrics=result.metrics, meta=result.meta
            )
        )
        if not pieces:
            self.takes(ValuesError, lambda: self.fold.add(encoded, site=result.site))
            return
        result = replace(result, encoded=encoded)
        feeder = self.fold.start(encoded.header, site=result.site)
        self.half.append((result, feeder, False))
        with pytest.raises(ValuesError):
            while feeder.missing:
                feeder.feed(feeder.position, result.data[feeder.position : feeder.position + 50_000])
        with pytest.raises(FoldError):
            feeder.finish()
        self.undo(len(self.half) - 1)

    @rule(draft=DRAFTS, steps=st.sampled_from([0, -1.0, True, "3", math.nan, math.inf, 2.0**70, 2.0**-70]))
    def add_bad_weight(self, draft: Draft, steps: Any) -> None:
        [result] = self.make(draft)
        meta = {"params_type": result.kind, "meta": {STEPS: steps}}
        self.takes(WeightError, lambda: self.fold.add(result.encoded, site=result.site, meta=meta))

    @rule(name=st.sampled_from(["bf16", "i64", "unknown", "none"]))
    def add_bad_layout(self, name: str) -> None:
        encoded = encode_model(FLModel(params={name: np.ones((3, 1), np.float32)}))
        self.takes(LayoutError, lambda: self.fold.add(encoded, site="site-9"))

    @precondition(lambda self: self.counted)
    @rule(luck=LUCK, typed=st.sampled_from([False, False, True]))
    def take_back(self, luck: int, typed: bool) -> None:
        """A result goes, whether it came alone or in a partial; or all that have tensors do."""
        rng = random.Random(luck)
        gone = [result for result in self.counted if result.kind] if typed else [rng.choice(self.counted)]
        for result in rng.sample(gone, len(gone)):
            self.fold.remove(result.encoded, site=result.site)
            for group in [group for group in self.groups if any(r is result for r in group[1])]:
                self.groups.remove(group)
                self.singles += group[1]
            self.singles = [single for single in self.singles if single is not result]

    # --- partials, crashes, scales -----------------------------------------------------------------

    @precondition(lambda self: len(self.known) < MOST - 2)
    @rule(drafts=st.lists(DRAFTS, max_size=3), foreign=st.sampled_from([False] * 5 + [True]))
    def merge(self, drafts: list[Draft], foreign: bool) -> None:
        results = self.make(*drafts)
        if self.refusal(results, []):
            results = results[:1]
        part = Fold(self.plan.sized(5000) if foreign else self.plan)
        for result in results:
            part.add(result.encoded, site=result.site)
        data = payload_of(part)
        error = FoldError if foreign else self.refusal(results, self.known)
        if self.takes(error if results or foreign else None, lambda: self.fold.merge(data)):
            self.groups.append((data, results))

    @precondition(lambda self: self.groups)
    @rule(luck=LUCK)
    def unmerge(self, luck: int) -> None:
        data, _ = self.groups.pop(luck % len(self.groups))
        self.fold.unmerge(data)

    @precondition(lambda self: not self.half)
    @rule()
    def checkpoint(self) -> None:
        self.saved = payload_of(self.fold), self.counted

    @precondition(lambda self: self.saved)
    @rule(luck=LUCK)
    def crash(self, luck: int) -> None:
        """The controller dies: another starts from the checkpoint, and brings it to the set that counts."""
        assert self.saved is not None
        data, covered = self.saved
        wanted = self.counted
        self.half.clear()
        self.fold = Fold(self.plan)
        self.fold.merge(data)
        changes = [(self.fold.add, r) for r in wanted if not any(r is other for other in covered)]
        changes += [(self.fold.remove, r) for r in covered if not any(r is other for other in wanted)]
        random.Random(luck).shuffle(changes)
        # what counts no more goes first where it is of the other kind or the round began anew behind it
        mixed = self.refusal(covered, wanted) is not None
        for change, result in sorted(changes, key=lambda c: c[0] == self.fold.add) if mixed else changes:
            change(result.encoded, site=result.site)

    @precondition(lambda self: self.counted and not self.half)
    @rule(luck=LUCK)
    def check(self, luck: int) -> None:
        """The verdict, the same for any order and for other values with the same totals; a refold is good at once."""
        kind = next((r.kind for r in self.counted if r.kind), None)
        better = better_scales(self.plan, all_totals(self.plan, self.counted, kind), kind) if kind else {}
        verdict = self.fold.check()
        mirrored = [replace(r, encoded=encode_model(negative(r))) for r in self.counted]
        assert self.grouped(mirrored, luck).check() == verdict
        if not better:
            assert verdict == Good()
            return
        assert isinstance(verdict, Rescale)
        assert verdict.tensors == tuple(better)
        assert kind is not None
        found = verdict.plan.exponents(kind)  # type: ignore[arg-type]
        assert {name: found[NAMES.index(name)] for name in better} == better
        with pytest.raises(FoldError, match="do not hold"):
            self.fold.finish(self.base)
        self.plan = verdict.plan
        self.fold = self.grouped(self.counted, luck)
        self.singles, self.groups, self.saved = self.counted, [], None
        assert self.fold.check() == Good()

    @precondition(lambda self: self.counted and not self.half)
    @rule(luck=LUCK, next_round=st.booleans())
    def close(self, luck: int, next_round: bool) -> None:
        """The same bits from any order and grouping, each mean next to the exact one; then perhaps the next round."""
        other = self.grouped(self.counted, luck)
        assert state_of(other) == state_of(self.fold)
        if self.fold.check() != Good():
            return
        bits = bits_of(self.fold, self.base)
        assert bits_of(other, self.base) == bits
        if next_round and bits is not ValuesError:
            self.begin_round(self.fold.next_plan())

    # --- what holds after every rule ---------------------------------------------------------------

    @invariant()
    def totals_are_exact(self) -> None:
        if self.half:
            with pytest.raises(FoldError, match="half in"):
                self.fold.check()
            with pytest.raises(FoldError, match="half in"):
                self.fold.to_partial()
            return
        counted = self.counted
        kind = next((r.kind for r in counted if r.kind), None)
        assert (self.fold.count, self.fold.kind) == (len(counted), kind)
        assert self.fold.weight_sum == sum(Fraction(r.weight) for r in counted)
        assert self.fold.metrics == means_of(counted)
        state, sums = state_of(self.fold)
        sizes: dict[int, int] = {}
        for result in counted:
            size = math.frexp(result.weight)[1]
            sizes[size] = sizes.get(size, 0) + 1
        assert state["sizes"] == [[size, sizes[size]] for size in sorted(sizes)]
        records = {self.plan.tensors[entry[0]].name: entry[1:5] for entry in state["tensors"]}
        totals = all_totals(self.plan, counted, kind or "FULL")
        assert records.keys() == totals.keys()
        for name, exact in totals.items():
            count, weight, total, over = records[name]
            assert (count, over) == (exact.count, exact.over), name
            assert Fraction(number(weight or state["weight"]), UNIT) == exact.weight, name
            assert Fraction(number(total), TOTAL_UNIT) == exact.total, name
            assert sums[name] == [value if name in INTS else wrap(value) for value in exact.sums], name
        good = not kind or not better_scales(self.plan, totals, kind)
        assert isinstance(self.fold.check(), Good) == good
        if good and counted:
            self.means_are_near(totals, kind or "FULL")

    def means_are_near(self, totals: dict[str, Totals], kind: str) -> None:
        """Each float's mean is within its bound of the exact one, and integers are it, halves to even."""
        bits = bits_of(self.fold, self.base)
        for name, exact in totals.items():
            index = NAMES.index(name)
            wanted = [value / exact.weight for value in exact.exact]
            if name in INTS:
                if bits is not ValuesError:
                    got = np.frombuffer(bits[0][name][1], bits[0][name][0]).tolist()
                    base = self.base[name].reshape(-1).tolist() if kind == "DIFF" else [0] * len(wanted)
                    assert got == [round(mean + below) for mean, below in zip(wanted, base, strict=True)]
                continue
            unit = Fraction(2) ** -(self.plan.q_full if kind == "FULL" else self.plan.q_diff)[index]
            beside = exact.total / exact.weight
            if kind == "DIFF":
                beside = max(beside, Fraction(self.plan.base_max[index]))
            mean = self.fold.mean(name).reshape(-1)
            for at, value in zip(PLACES[name], wanted, strict=True):
                error = abs(Fraction(float(mean[at])) - value) - abs(value) * Fraction(2) ** -50  # one division
                # a half from rounding to units, an eighth from the product before it
                assert error <= exact.count * unit * 5 / 8 / exact.weight
                assert error <= beside * Fraction(5, 4) * Fraction(2) ** -25


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def test_any_history_leaves_the_exact_sums() -> None:
    """The steps of a failure are shown as they were found: to make them fewer takes longer than a test may."""
    run_state_machine_as_test(FoldMachine, settings=short(40, 25, phases=AS_FOUND, suppress_health_check=QUIET))


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_any_history_leaves_the_exact_sums_long() -> None:
    run_state_machine_as_test(FoldMachine, settings=long(800, 40, suppress_health_check=QUIET))
