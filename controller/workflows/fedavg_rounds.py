"""How a round of FedAvg comes by its next model: folded as results arrive, or of all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ...serialization import spans
from ...serialization.dtypes import DTYPES
from ...serialization.errors import FoldError, GatherError, LayoutError, PayloadError, ValuesError, WireError
from ...serialization.foldplan import FoldPlan
from ...serialization.messages import INLINE_BYTES, Failure, PayloadRef
from ...serialization.model import FLModel, ParamsType, flatten
from ...serialization.payload import Framework, decode_model
from ...serialization.tensors import spec_of
from ..aggregators.base import Aggregate, Aggregator, WritesModel
from ..aggregators.custom import CLIENT_NAME, KindCheck, TakesModels, new_model, weighted_metrics
from ..collecting import Collection, Layout, difference
from ..federation import Federation
from ..folding import Folding, check_mandatory
from ..gather import Gather, Result
from ..records import RoundRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """A round's.

    Attributes:
        model: the new global model.
        metrics: weighted means of the results' metrics: the score of the model that the sites received.
        weight_sum: of the results.
        equal_weights: whether no result named its steps.
        plan: the next round's fold plan; None where results are not folded.
        master: float32 values behind narrower tensors.
        ref: the model's payload, where it is stored already.
    """

    model: FLModel
    metrics: dict[str, float]
    weight_sum: float
    equal_weights: bool
    plan: FoldPlan | None = None
    master: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ref: PayloadRef | None = None


def fold(fed: Federation, gather: Gather, empty: Aggregate, record: RoundRecord, checkpoint: int | None) -> Outcome:
    """Fold results as they arrive; memory is one aggregate.

    Raises:
        GatherError, MixedError, FoldError: as `Folding.run`.
    """
    return _finished(fed, Folding(fed, gather, empty, record, checkpoint_bytes=checkpoint).run())


def fold_first(fed: Federation, gather: Gather, aggregator: Aggregator, record: RoundRecord) -> Outcome:
    """Fold the results of a round that began without a model: their mean is the first one.

    The layout is that of the first good result in the order of the sites' names, whoever came first; a site with
    another one is refused.

    Raises:
        GatherError, MixedError, FoldError: as `Folding.run`.
    """
    collection = Collection(fed, gather)
    reference: tuple[str, Layout] | None = None
    empty: Aggregate | None = None
    good: list[Result] = []
    ordered = collection.all()
    for result in ordered:
        try:
            if result.meta.get("params_type") != ParamsType.FULL:
                raise LayoutError(_not_full(result))
            seen = collection.layout(result)
            if reference is None:
                base = FLModel(params=collection.model(result).params)
                empty = aggregator.start(base, aggregator.plan(base, tasks=len(ordered)))
                reference = (result.site, seen)
            elif wrong := difference(seen, reference[1], whole=True, dtypes=True):
                raise LayoutError(
                    f"result of {result.site} does not fit that of {reference[0]}, from which a job without an initial"
                    f" model takes its layout: {wrong}. Build the same model at every site, or give the recipe one"
                )
            good.append(result)
        except (FoldError, PayloadError, WireError) as error:
            collection.refuse(result, error)
    if empty is None:
        raise _too_few(gather, 0, collection.refused)
    folding = Folding(fed, gather, empty, record, collected=good)
    folding.refused += collection.refused
    return _finished(fed, folding.run())


def aggregate(
    fed: Federation,
    gather: Gather,
    aggregator: TakesModels,
    base: FLModel | None,
    record: RoundRecord,
    framework: Framework,
) -> Outcome:
    """Hand all results to a custom aggregator, in the order of the sites' names, and take its model.

    Args:
        base: the model that the sites received; None in a first round without one.
        framework: what the aggregator gets: "numpy" arrays or "pytorch" tensors.

    Raises:
        GatherError: fewer accepted results than ``min_clients``, or none of a mandatory site.
        MixedError: FULL among DIFF results.
        JobError, LayoutError, ValuesError: what the aggregator made is no model, or not of this layout.
    """
    collection = Collection(fed, gather)
    ordered = collection.all()
    ours = None if base is None else _layout(base)
    kinds = KindCheck()
    accepted: list[Result] = []
    aggregator.reset_stats()
    for result in ordered:
        try:
            model = collection.model(result, framework)
            if model.params is None or model.params_type is None:
                raise LayoutError(f"result of {result.site} holds no params")
            kinds.add(model.params_type.value, result.site)
            if base is None and model.params_type is not ParamsType.FULL:
                raise LayoutError(_not_full(result))
            if ours is not None and (wrong := difference(_layout(model), ours, whole=False, dtypes=False)):
                raise LayoutError(
                    f"result of {result.site} does not fit the model: {wrong}. Send tensors with the names and shapes"
                    " that were received"
                )
            model.meta = (model.meta or {}) | {CLIENT_NAME: result.site}
        except (PayloadError, WireError) as error:
            collection.refuse(result, error)
            continue
        began = spans.start()
        taken = aggregator.accept_model(model)
        spans.end("fold", began, site=result.site)
        if taken is False:
            collection.refuse(result, ValuesError(f"{type(aggregator).__name__} did not accept it"))
            continue
        accepted.append(result)
        record.add(result)
    if len(accepted) < max(1, gather.opening.rule.min_clients):
        raise _too_few(gather, len(accepted), collection.refused)
    check_mandatory(fed, gather, accepted)
    began = spans.start()
    made = new_model(aggregator, base)
    spans.end("finish", began)
    metrics, weight_sum, equal = weighted_metrics([result.meta for result in accepted])
    own = {name: float(value) for name, value in (made.metrics or {}).items() if isinstance(value, int | float)}
    return Outcome(made, own or metrics, weight_sum, equal)


def _finished(fed: Federation, aggregate: Aggregate) -> Outcome:
    model, ref = _made(fed, aggregate)
    return Outcome(
        model,
        aggregate.metrics,
        float(aggregate.weight_sum),
        aggregate.equal_weights,
        aggregate.next_plan(),
        dict(aggregate.master),
        ref,
    )


def _made(fed: Federation, aggregate: Aggregate) -> tuple[FLModel, PayloadRef | None]:
    """The new model: a mapping of its stored file where that can be, else in memory."""
    size = sum(tensor.items * DTYPES[tensor.dtype].itemsize for tensor in aggregate.plan.tensors)
    if size > INLINE_BYTES and isinstance(aggregate, WritesModel):
        ref = fed.payloads.written(aggregate.write)
        if ref is not None:
            return fed.mapped(ref) or decode_model(fed.fetch(ref)), ref
    began = spans.start()
    model = aggregate.finish()
    spans.end("finish", began)
    return model, None


def _layout(model: FLModel) -> Layout:
    return {name: spec_of(value) for name, value in flatten(cast("Any", model.params or {}))[0].items()}


def _not_full(result: Result) -> str:
    return (
        f"result of {result.site} holds {result.meta.get('params_type') or 'no'} params, in a round that began without"
        " a global model: FULL params belong there"
    )


def _too_few(gather: Gather, good: int, refused: list[Failure]) -> GatherError:
    first = f"\n{refused[0].site}: {refused[0].text}" if refused else ""
    wanted = max(1, gather.opening.rule.min_clients)
    return GatherError(f"round {gather.opening.round}: {good} good results of {wanted}{first}")
