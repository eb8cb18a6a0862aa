"""Federated averaging as recipes: for torch modules, and for numpy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..serialization.errors import JobError
from .base import Recipe
from .components import component_of
from .fedavg_options import GROUPS, FedAvgOptions, JobOptions, ModelOptions, SelectionOptions, ServerOptions
from .job import Job
from .keywords import check_names, fill, signature_of
from .models import InitialModel, Params, numpy_model, torch_model, with_checkpoint
from .options import AggregationOptions, ExchangeFormat, ExchangeOptions, FrameworkType, ScriptOptions, one_of
from .sitescripts import script_component

if TYPE_CHECKING:
    from typing import Unpack

FEDAVG = "fedloom.controller.workflows.fedavg.FedAvg"


class FedAvgRecipe(Recipe):
    """Federated averaging of a torch model.

    A round sends the global model to every connected site (or to ``sample`` of them), needs the results of
    ``min_clients``, and replaces the model by their mean, weighted by the steps that each site reports in
    ``meta["NUM_STEPS_CURRENT_ROUND"]`` times its aggregation weight (McMahan et al., arXiv:1602.05629).

    ``help(FedAvgRecipe)`` shows every keyword argument with its default, ``docs/guides/recipes.md`` explains each.
    Those that most jobs need:

    Args:
        framework: what clients receive: ``"pytorch"`` tensors or ``"numpy"`` arrays.
        name: the job's name.
        model: the initial global model: a module *instance*, a map of arrays or tensors by name, or
            ``{"class_path": "module.Class", "args": {...}}``. None: the first round's results make it.
        initial_ckpt: a checkpoint (.npy, .npz, .safetensors, .pt, .pth, .bin) whose values the job starts from. A
            relative path lies beside the job script and travels with the job; an absolute one is read where the job's
            process runs, when the job starts.
        min_clients: results that a round needs.
        num_rounds: rounds.
        train_script: the clients' script, found beside the job script; or ``"client.py:train"`` for a function of it.
            The modules beside it that it imports travel with it.
        train_args: the script's command line.
        params_transfer_type: ``"FULL"``, or ``"DIFF"``: each site sends the difference from what it received.
        codec: ``"fp16"``, ``"bf16"`` or ``"int8"``: results take a half or a quarter of the bytes; None: as they are.
        key_metric: the metric that marks the best model; ``key_metric_mode="min"`` where a smaller one is better.
        stop_cond: end early, such as ``"accuracy >= 80"``; ``patience``: after so many rounds without a better score.
        exclude_vars: a regular expression of tensors that keep their global value.
        aggregation_weights: a factor for each site; 1.0 where it is not named.
        aggregator: an object with ``accept_model``, ``aggregate_model`` and ``reset_stats`` in place of the mean.
        options: all of them, typed (`FedAvgOptions`).

    Raises:
        JobError: a value that is not allowed, or a file that is missing.
        TypeError: an option that does not exist; the nearest one's name is in the message.
    """

    def __init__(
        self, *, framework: FrameworkType | str = FrameworkType.PYTORCH, **options: Unpack[FedAvgOptions]
    ) -> None:
        given: dict[str, Any] = dict(options)
        check_names(type(self).__name__, GROUPS, given)
        job_options, model = fill(JobOptions, given), fill(ModelOptions, given)
        self.framework = one_of(FrameworkType, framework, "framework")
        self.script = script = fill(ScriptOptions, given)
        self.exchange = exchange = fill(ExchangeOptions, given | {"framework": framework})
        self.aggregation = fill(AggregationOptions, given)
        self.selection = _selection(given)
        self.server = fill(ServerOptions, given)
        sample, needed = self.aggregation.sample, job_options.min_clients
        if 0 < sample < needed:
            raise JobError(f"sample={sample} sites a round can never give min_clients={needed} results")
        job = Job(
            job_options.name,
            min_clients=needed,
            num_rounds=job_options.num_rounds,
            seed=job_options.seed,
            threads_per_task=job_options.threads_per_task,
        )
        super().__init__(job)
        initial = with_checkpoint(model.initial_ckpt, *self._initial_params(model.chosen))
        aggregator, modules = self._aggregator(exchange)
        component = script_component(job, script, exchange, [*initial.modules, *modules])
        job.add_workflow(FEDAVG, self._workflow(job, initial, exchange) | self.aggregation.args() | aggregator)
        job.add_executor(component)
        if self.server.per_site_config is not None:
            self.set_per_site_config(self.server.per_site_config)

    def _initial_params(self, model: Any) -> tuple[Params | None, list[Path]]:
        """The initial parameters, and the source files of the model's classes."""
        return torch_model(model)

    def _workflow(self, job: Job, initial: InitialModel, exchange: ExchangeOptions) -> dict[str, Any]:
        args: dict[str, Any] = {"num_rounds": job.num_rounds, "min_clients": job.min_clients}
        if initial.params is not None:
            args["initial_model"] = job.set_model(initial.params)
        if initial.checkpoint:
            args["initial_ckpt"] = initial.checkpoint
        args["params_transfer_type"] = exchange.params_transfer_type.value
        if exchange.codec and self.server.aggregator is None:  # others get results as they were, see decode_model
            args["codec"] = exchange.codec
        if self.server.server_memory_gc_rounds:
            args["memory_gc_rounds"] = self.server.server_memory_gc_rounds
        return args | self.selection.args()

    def _aggregator(self, exchange: ExchangeOptions) -> tuple[dict[str, Any], list[Path]]:
        """The workflow's arguments for a custom aggregator, and its source files."""
        given = self.server.aggregator
        if given is None:
            return {}, []
        component, modules = component_of(given, "aggregator")
        made: Any = component.load() if isinstance(given, Mapping) else given
        own = all(callable(getattr(made, name, None)) for name in ("accept_model", "aggregate_model", "reset_stats"))
        if not own and not all(callable(getattr(made, name, None)) for name in ("plan", "start")):
            raise JobError(
                f"aggregator {component.path} has not all of accept_model(), aggregate_model() and reset_stats()"
            )
        for name in ("aggregation_weights", "exclude_vars"):
            if getattr(self.aggregation, name):
                raise JobError(f"{name} is an option of the weighted mean, which aggregator {component.path} replaces")
        if not self.aggregation.exact:
            raise JobError(f"exact is an option of the weighted mean, which aggregator {component.path} replaces")
        if exchange.codec and not own:
            raise JobError(f"codec is an option of the weighted mean, which aggregator {component.path} replaces")
        args: dict[str, Any] = {"aggregator": {"path": component.path, "args": component.args}}
        if own and exchange.server_expected_format is ExchangeFormat.PYTORCH:
            args["aggregator_format"] = "pytorch"
        return args, modules


class NumpyFedAvgRecipe(FedAvgRecipe):
    """Federated averaging of numpy arrays; clients find the array under ``params["numpy_key"]``.

    Args:
        model: the initial array: a list of numbers (float32), an array (a float array keeps its dtype, integers become
            float32), or a map of arrays by name, which keeps its names.
        initial_ckpt: as `FedAvgRecipe`; the array of a .npy file is ``numpy_key``.
        options: those of `FedAvgRecipe`, without ``framework``.

    Raises:
        JobError: as `FedAvgRecipe`.
        TypeError: as `FedAvgRecipe`.
    """

    def __init__(self, **options: Unpack[FedAvgOptions]) -> None:
        check_names(type(self).__name__, GROUPS, options)  # of which framework is none here
        super().__init__(framework=FrameworkType.RAW, **options)

    def _initial_params(self, model: Any) -> tuple[Params | None, list[Path]]:
        return numpy_model(model)

    def add_cse_validator_if_needed(self) -> None:
        """Look whether the script scores models, as a cross-site evaluation needs. Nothing is put in its place.

        Raises:
            JobError: it only trains; the message has the lines to add.
        """
        from .evaluation import add_cse_validator_if_needed

        add_cse_validator_if_needed(self)


def _selection(given: dict[str, Any]) -> SelectionOptions:
    """The metrics' options; a stop condition names the key metric where nobody else does."""
    selection = fill(SelectionOptions, given)
    if "key_metric" in given or selection.stop_cond is None:
        return selection
    return replace(selection, key_metric=selection.stop_cond.split()[0])


def _show(recipe: type[FedAvgRecipe], *own: inspect.Parameter) -> None:
    """What help and editors show of a recipe's arguments: the groups' fields, not ``**options``."""
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [self_, *signature_of(GROUPS).parameters.values(), *own]
    recipe.__init__.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]


_show(NumpyFedAvgRecipe)
_show(
    FedAvgRecipe,
    inspect.Parameter(
        "framework",
        inspect.Parameter.KEYWORD_ONLY,
        default=FrameworkType.PYTORCH,
        annotation="FrameworkType | str",
    ),
)
