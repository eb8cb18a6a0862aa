"""Federated averaging as recipes: for torch modules, and for numpy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..serialization.errors import JobError
from .base import Recipe, torch_params
from .components import sources
from .job import Job
from .options import (
    AggregationOptions,
    ExchangeFormat,
    ExchangeOptions,
    FrameworkType,
    ScriptOptions,
    TransferType,
    refuse_later,
    whole,
)

if TYPE_CHECKING:
    from typing import Unpack

FEDAVG = "fedloom.controller.workflows.fedavg.FedAvg"
#: Where the documents' numpy clients find their array in ``params``.
NUMPY_KEY = "numpy_key"


class LaterOptions(TypedDict, total=False):
    """Options of the documents whose defaults are accepted; other values raise a `JobError` that names them."""

    initial_ckpt: Any
    aggregator: Any
    aggregator_data_kind: Any
    model_persistor: Any
    model_locator: Any
    per_site_config: Any
    stop_cond: Any
    patience: Any
    key_metric_mode: Any
    save_filename: Any
    best_model_filename: Any
    server_memory_gc_rounds: Any
    client_memory_gc_rounds: Any
    cuda_empty_cache: Any
    enable_tensor_disk_offload: Any


class FedAvgRecipe(Recipe):
    """Federated averaging of a torch model.

    A round sends the global model to every connected site (or to ``sample`` of them), needs the results of
    ``min_clients``, and replaces the model by their mean, weighted by the steps that each site reports in
    ``meta["NUM_STEPS_CURRENT_ROUND"]`` times its aggregation weight (McMahan et al., arXiv:1602.05629).

    Args:
        name: the job's name.
        model: the initial global model: a module *instance*, a map of arrays or tensors by name, or
            ``{"class_path": "module.Class", "args": {...}}``.
        initial_model: another name for ``model``, which wins where both are given.
        min_clients: results that a round needs.
        num_rounds: rounds.
        train_script: the clients' script, found beside the job script; or ``"client.py:train"`` for a function of it.
            The modules beside it that it imports travel with it.
        train_args: the script's command line.
        launch_external_process: run the script with ``command`` instead of within a process of the executor's.
        command: what an external script is started with.
        framework: what clients receive: ``"pytorch"`` tensors or ``"numpy"`` arrays.
        server_expected_format: accepted; the server folds every dtype as it is.
        params_transfer_type: ``"FULL"``, or ``"DIFF"``: each site sends the difference from what it received.
        launch_once: one script process over all rounds; False starts it for each task.
        launch_timeout: seconds within which an external script must call `flare.init()`.
        shutdown_timeout: seconds that a script is given to end by itself once the job is over.
        key_metric: the metric whose largest value marks the best model.
        exclude_vars: a regular expression of tensors that keep their global value.
        aggregation_weights: a factor for each site; 1.0 where it is not named.
        sample: sites drawn for each round; 0: all that are connected.
        deadline_s: close a round after so many seconds if ``min_clients`` results are there, else fail it.
        sites_s: seconds to wait for ``min_clients`` sites to connect, and for a lost one to return.
        seed: what sampling and the generators of each task are drawn from.
        threads_per_task: threads of a task's numeric libraries.
        later: options of a later version (`LaterOptions`): only values that ask for nothing.

    Raises:
        JobError: a value that is not allowed, a file that is missing, or an option that is not built yet.
    """

    def __init__(
        self,
        *,
        name: str = "fedavg",
        model: Any = None,
        initial_model: Any = None,
        min_clients: int,
        num_rounds: int = 2,
        train_script: str,
        train_args: str = "",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        framework: FrameworkType | str = FrameworkType.PYTORCH,
        server_expected_format: ExchangeFormat | str = ExchangeFormat.NUMPY,
        params_transfer_type: TransferType | str = TransferType.FULL,
        launch_once: bool = True,
        launch_timeout: float = 300.0,
        shutdown_timeout: float = 0.0,
        key_metric: str = "accuracy",
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        sample: int = 0,
        deadline_s: float | None = None,
        sites_s: float = 60.0,
        seed: int = 0,
        threads_per_task: int = 1,
        **later: Unpack[LaterOptions],
    ) -> None:
        refuse_later(type(self).__name__, later)
        whole(min_clients, "min_clients", 1)
        whole(num_rounds, "num_rounds", 1)
        self.framework = framework
        self.script = ScriptOptions(
            train_script,
            train_args,
            launch_external_process,
            command,
            launch_once,
            float(launch_timeout),
            float(shutdown_timeout),
        )
        self.exchange = ExchangeOptions.of(framework, server_expected_format, params_transfer_type)
        self.aggregation = AggregationOptions(
            aggregation_weights, exclude_vars, key_metric, sample, deadline_s, sites_s
        )
        if 0 < sample < min_clients:
            raise JobError(f"sample={sample} sites a round can never give min_clients={min_clients} results")
        job = Job(
            name,
            min_clients=min_clients,
            num_rounds=num_rounds,
            seed=whole(seed, "seed"),
            threads_per_task=threads_per_task,
        )
        super().__init__(job)
        chosen = initial_model if model is None else model
        params, modules = self._initial_params(chosen)
        place = job.add_code(self.script.script, *modules)
        self._check_function(job.files[place])
        args: dict[str, Any] = {
            "num_rounds": num_rounds,
            "min_clients": min_clients,
            "initial_model": job.set_model(params),
            "params_transfer_type": self.exchange.params_transfer_type.value,
        }
        job.add_workflow(FEDAVG, args | self.aggregation.args())
        job.add_executor(self.script.component(place, self.exchange))

    def _initial_params(self, model: Any) -> tuple[dict[str, Any], list[Path]]:
        """The initial parameters, and the source files of the model's classes."""
        if model is None:
            raise JobError(
                f"{type(self).__name__}: no model; starting from the clients' own models is not built yet:"
                " give model=Net() or a map of arrays"
            )
        if isinstance(model, Mapping):
            entry = cast("Mapping[str, Any]", model)
            if "class_path" in entry:
                model = _build(entry)
            elif not entry:
                raise JobError("model={}: a model has at least one tensor")
            else:
                return dict(entry), []
        if inspect.isclass(model):
            raise JobError(f"model={model.__name__} is a class; give an instance: model={model.__name__}()")
        if not hasattr(model, "state_dict") or not hasattr(model, "modules"):
            raise JobError(
                f"model is a {type(model).__name__}; a torch.nn.Module instance or a map of arrays by name belongs here"
            )
        params = torch_params(model)
        if not params:
            raise JobError(f"model {type(model).__name__} has no parameters and no buffers: nothing to train together")
        return params, sources({type(part).__module__ for part in model.modules()})

    def _check_function(self, script: Path) -> None:
        """Look for the function that ``train_script`` names, before any site would miss it."""
        import ast

        if not self.script.function:
            return
        tree = ast.parse(script.read_bytes())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        if self.script.function not in names:
            raise JobError(f"{script.name} has no function {self.script.function!r}; it has {sorted(names) or 'none'}")


class NumpyFedAvgRecipe(FedAvgRecipe):
    """Federated averaging of numpy arrays; clients find the array under ``params["numpy_key"]``.

    Args:
        model: the initial array: a list of numbers (float32), an array (a float array keeps its dtype, integers become
            float32), or a map of arrays by name, which keeps its names.

    The other arguments are those of `FedAvgRecipe`, without ``framework``.

    Raises:
        JobError: as `FedAvgRecipe`.
    """

    def __init__(
        self,
        *,
        name: str = "fedavg",
        model: Any = None,
        initial_model: Any = None,
        min_clients: int,
        num_rounds: int = 2,
        train_script: str,
        train_args: str = "",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        server_expected_format: ExchangeFormat | str = ExchangeFormat.NUMPY,
        params_transfer_type: TransferType | str = TransferType.FULL,
        launch_once: bool = True,
        launch_timeout: float = 300.0,
        shutdown_timeout: float = 0.0,
        key_metric: str = "accuracy",
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        sample: int = 0,
        deadline_s: float | None = None,
        sites_s: float = 60.0,
        seed: int = 0,
        threads_per_task: int = 1,
        **later: Unpack[LaterOptions],
    ) -> None:
        super().__init__(
            name=name,
            model=model,
            initial_model=initial_model,
            min_clients=min_clients,
            num_rounds=num_rounds,
            train_script=train_script,
            train_args=train_args,
            launch_external_process=launch_external_process,
            command=command,
            framework=FrameworkType.NUMPY,
            server_expected_format=server_expected_format,
            params_transfer_type=params_transfer_type,
            launch_once=launch_once,
            launch_timeout=launch_timeout,
            shutdown_timeout=shutdown_timeout,
            key_metric=key_metric,
            exclude_vars=exclude_vars,
            aggregation_weights=aggregation_weights,
            sample=sample,
            deadline_s=deadline_s,
            sites_s=sites_s,
            seed=seed,
            threads_per_task=threads_per_task,
            **later,
        )

    def _initial_params(self, model: Any) -> tuple[dict[str, Any], list[Path]]:
        import numpy as np

        if isinstance(model, Mapping) and model:
            return dict(cast("Mapping[str, Any]", model)), []
        if not isinstance(model, list | tuple | np.ndarray | np.generic):
            if model is None or isinstance(model, Mapping):
                return super()._initial_params(model)
            raise JobError(f"model is a {type(model).__name__}; a list of numbers or a numpy array belongs here")
        try:
            array: Any = np.asarray(cast("Any", model))
            if array.dtype.kind in "biu" or not isinstance(model, np.ndarray | np.generic):
                array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise JobError(f"model is not an array of numbers: {error}") from None
        if array.dtype.kind != "f" or not array.size:
            raise JobError(f"model is {array.size} values of {array.dtype}; numbers belong here, at least one")
        return {NUMPY_KEY: array}, []


def _build(entry: Mapping[str, Any]) -> Any:
    """A model out of ``{"class_path": "module.Class", "args": {...}}``."""
    if unknown := entry.keys() - {"class_path", "args"}:
        raise JobError(f"model: unknown key {min(unknown)!r}; allowed are 'class_path' and 'args'")
    module, _, name = str(entry["class_path"]).rpartition(".")
    try:
        return getattr(import_module(module), name)(**dict(entry.get("args") or {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise JobError(f"model: class_path {entry['class_path']!r} cannot be built: {error}") from None
