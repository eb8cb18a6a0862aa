"""What stands for what: components of NVFLARE's job folders, their arguments, and fedloom's. Data only.

Classes are known by their short names, since their modules moved from version to version; ``module`` is where the
newest have them. An argument that is in no list of its row is refused by its name, so that nothing is lost in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: workflow, executor, filter, tracker: a component of fedloom's. part: goes into the workflow or executor that uses it.
#: done: fedloom does it by itself.
Kind = Literal["workflow", "executor", "filter", "tracker", "part", "done"]

FEDAVG = "fedloom.controller.workflows.fedavg.FedAvg"
CROSS_SITE = "fedloom.controller.workflows.crosssite.CrossSiteEval"
GLOBAL_EVAL = "fedloom.controller.workflows.crosssite.GlobalModelEval"
SCRIPT = "fedloom.executor.script.ScriptExecutor"
FUNCTION = "fedloom.executor.script.FunctionExecutor"
EXCLUDE = "fedloom.serialization.filters.ExcludeVars"


@dataclass(frozen=True, slots=True)
class Row:
    """One class of NVFLARE's.

    Attributes:
        module: where NVFLARE has it.
        ours: fedloom's component, or in words what does its work.
        args: its arguments that mean something here, by fedloom's names.
        unneeded: arguments that need no equivalent: intervals of polling, ids of parts, and the like.
        only: arguments of which fedloom has one value only, and the reason.
        defaults: NVFLARE's own values, where fedloom's are others.
    """

    kind: Kind
    module: str
    ours: str
    args: Mapping[str, str] = field(default_factory=dict[str, str])
    unneeded: tuple[str, ...] = ()
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict[str, tuple[tuple[Any, ...], str]])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])


_APP = "nvflare.app_common."
_START = {"start_round": ((0, None), "a job starts at round 0; give the model to start from as its initial one")}
_POLLING = (
    "task_check_period",
    "persist_every_n_rounds",
    "snapshot_every_n_rounds",
    "ignore_result_error",
    "allow_empty_global_weights",
    "enable_tensor_disk_offload",
    "persistor_id",
    "aggregator_id",
    "shareable_generator_id",
)
_EVALUATION = {
    "validation_timeout": "validation_timeout",
    "participating_clients": "participating_clients",
    "validation_task_name": "validate_task",
}
_EVALUATION_UNNEEDED = (
    "task_check_period",
    "cross_val_dir",
    "model_locator_id",
    "formatter_id",
    "cleanup_models",
    "wait_for_clients_timeout",
)
_IN_PROCESS = {
    "task_script_path": "task_script_path",
    "task_script_args": "task_script_args",
    "params_exchange_format": "params_exchange_format",
    "params_transfer_type": "params_transfer_type",
    "memory_gc_rounds": "client_memory_gc_rounds",
    "client_memory_gc_rounds": "client_memory_gc_rounds",
    "cuda_empty_cache": "cuda_empty_cache",
}
_TASK_NAMES = {
    "train_task_name": (("train",), "a script's training task is 'train'"),
    "evaluate_task_name": (("validate", "evaluate"), "a script's evaluation task is 'validate'"),
    "submit_model_task_name": (("submit_model",), "the task for a site's model is 'submit_model'"),
    "train_with_evaluation": ((False, True), ""),
}
_EXECUTOR_UNNEEDED = (
    "task_wait_time",
    "task_wait_timeout",
    "result_wait_timeout",
    "result_pull_interval",
    "log_pull_interval",
    "from_nvflare_converter_id",
    "to_nvflare_converter_id",
    "server_expected_format",
    "heartbeat_interval",
    "heartbeat_timeout",
    "stop_grace_period",
)
_LAUNCHER = {
    "params_exchange_format": "params_exchange_format",
    "params_transfer_type": "params_transfer_type",
    "launch_timeout": "launch_timeout",
    "external_pre_init_timeout": "launch_timeout",
    "memory_gc_rounds": "client_memory_gc_rounds",
    "cuda_empty_cache": "cuda_empty_cache",
}
_LAUNCHER_UNNEEDED = (
    *_EXECUTOR_UNNEEDED,
    "pipe_id",
    "launcher_id",
    "peer_read_timeout",
    "monitor_interval",
    "read_interval",
    "workers",
    "max_resends",
    "submit_result_timeout",
    "download_complete_timeout",
    "last_result_transfer_timeout",
)


def _in_process(module: str, exchange: str) -> Row:
    return Row(
        "executor", module, SCRIPT, _IN_PROCESS, _EXECUTOR_UNNEEDED, _TASK_NAMES, {"params_exchange_format": exchange}
    )


def _launcher(module: str, exchange: str) -> Row:
    return Row(
        "executor",
        module,
        SCRIPT,
        _LAUNCHER,
        _LAUNCHER_UNNEEDED,
        _TASK_NAMES,
        {"params_exchange_format": exchange, "launch_external_process": True},
    )


def _done(module: str, ours: str) -> Row:
    return Row("done", module, ours)


_TRANSFER = "models are streamed in any case"
_METRICS = "sites' metrics are kept with the job in any case"

TABLE: Mapping[str, Row] = {
    "FedAvg": Row(
        "workflow",
        _APP + "workflows.fedavg",
        FEDAVG,
        {
            "num_rounds": "num_rounds",
            "num_clients": "min_clients",
            "task_name": "task",
            "stop_cond": "stop_cond",
            "patience": "patience",
            "exclude_vars": "exclude_vars",
            "aggregation_weights": "aggregation_weights",
            "memory_gc_rounds": "memory_gc_rounds",
        },
        (*_POLLING, "save_filename"),
        {
            **_START,
            "fedprox_mu": ((None, 0), "add the proximal term in the training script"),
            "aggregator": ((None,), "give the aggregator to fedloom.recipe.FedAvgRecipe(aggregator=...)"),
            "model": ((None,), "name it as the persistor's model"),
        },
        {"num_rounds": 5},
    ),
    "ScatterAndGather": Row(
        "workflow",
        _APP + "workflows.scatter_and_gather",
        FEDAVG,
        {
            "num_rounds": "num_rounds",
            "min_clients": "min_clients",
            "train_task_name": "task",
            "train_timeout": "deadline_s",
            "wait_time_after_min_received": "after_quorum_s",
            "memory_gc_rounds": "memory_gc_rounds",
        },
        _POLLING,
        _START,
        {"num_rounds": 5},
    ),
    "CrossSiteModelEval": Row(
        "workflow",
        _APP + "workflows.cross_site_model_eval",
        CROSS_SITE,
        {**_EVALUATION, "submit_model_timeout": "submit_model_timeout", "submit_model_task_name": "submit_task"},
        _EVALUATION_UNNEEDED,
    ),
    "CrossSiteEval": Row(
        "workflow",
        _APP + "workflows.cross_site_eval",
        CROSS_SITE,
        {**_EVALUATION, "submit_model_timeout": "submit_model_timeout", "submit_model_task_name": "submit_task"},
        _EVALUATION_UNNEEDED,
    ),
    "GlobalModelEval": Row(
        "workflow", _APP + "workflows.global_model_eval", GLOBAL_EVAL, _EVALUATION, _EVALUATION_UNNEEDED
    ),
    "ClientAPIExecutor": Row(
        "executor",
        _APP + "executors.client_api_executor",
        SCRIPT,
        {
            **_IN_PROCESS,
            "command": "command",
            "launch_once": "launch_once",
            "launch_timeout": "launch_timeout",
            "shutdown_timeout": "shutdown_timeout",
            "execution_mode": "launch_external_process",
        },
        _EXECUTOR_UNNEEDED,
        _TASK_NAMES,
    ),
    "InProcessClientAPIExecutor": _in_process(_APP + "executors.in_process_client_api_executor", "numpy"),
    "PTInProcessClientAPIExecutor": _in_process("nvflare.app_opt.pt.in_process_client_api_executor", "pytorch"),
    "ClientAPILauncherExecutor": _launcher(_APP + "executors.client_api_launcher_executor", "numpy"),
    "PTClientAPILauncherExecutor": _launcher("nvflare.app_opt.pt.client_api_launcher_executor", "pytorch"),
    "ScriptRunner": Row(
        "executor",
        "nvflare.job_config.script_runner",
        SCRIPT,
        {
            "script": "task_script_path",
            "script_args": "task_script_args",
            "launch_external_process": "launch_external_process",
            "command": "command",
            "params_transfer_type": "params_transfer_type",
            "framework": "params_exchange_format",
            "launch_once": "launch_once",
            "shutdown_timeout": "shutdown_timeout",
            "memory_gc_rounds": "client_memory_gc_rounds",
            "cuda_empty_cache": "cuda_empty_cache",
        },
        _LAUNCHER_UNNEEDED,
        defaults={"framework": "pytorch"},
    ),
    "NPTrainer": Row(
        "executor",
        _APP + "np.np_trainer",
        FUNCTION,
        {"delta": "delta"},
        ("sleep_time", "model_dir", "model_name"),
        _TASK_NAMES | {"train_task": (("train",), "its training task is 'train'")},
        {"delta": 1},
    ),
    "ExcludeVars": Row(
        "filter", _APP + "filters.exclude_vars", EXCLUDE, {"exclude_vars": "exclude_vars"}, ("data_kinds",)
    ),
    "NPModelPersistor": Row(
        "part",
        _APP + "np.np_model_persistor",
        "the initial model, under `numpy_key`",
        {"model": "initial_model", "source_ckpt_file_full_name": "initial_model"},
        ("model_dir", "model_name", "filter_id", "allow_numpy_conversion"),
    ),
    "PTFileModelPersistor": Row(
        "part",
        "nvflare.app_opt.pt.file_model_persistor",
        "the initial model",
        {"model": "initial_model", "source_ckpt_file_full_name": "initial_ckpt"},
        (
            "exclude_vars",
            "global_model_file_name",
            "best_global_model_file_name",
            "filter_id",
            "load_weights_only",
            "allow_numpy_conversion",
            "weights_only",
        ),
    ),
    "IntimeModelSelector": Row(
        "part",
        _APP + "widgets.intime_model_selector",
        "the best model of FedAvg",
        {"key_metric": "key_metric", "negate_key_metric": "key_metric_mode"},
        ("weigh_by_local_iter", "aggregation_weights", "validation_metric_name"),
        defaults={"key_metric": "val_accuracy"},
    ),
    "InTimeAccumulateWeightedAggregator": Row(
        "part",
        _APP + "aggregators.intime_accumulate_model_aggregator",
        "the weighted mean of FedAvg",
        {"exclude_vars": "exclude_vars", "aggregation_weights": "aggregation_weights"},
        ("expected_data_kind",),
        {"weigh_by_local_iter": ((True,), "results are weighted by their steps; let the sites report none")},
    ),
    "SubprocessLauncher": Row(
        "part",
        _APP + "launchers.subprocess_launcher",
        "the command of a ScriptExecutor",
        {"script": "command", "launch_once": "launch_once", "shutdown_timeout": "shutdown_timeout"},
        ("clean_up_script",),
    ),
    "TBAnalyticsReceiver": Row(
        "tracker",
        "nvflare.app_opt.tracking.tb.tb_receiver",
        "fedloom.recipe.tracking.TensorBoard",
        {"tb_folder": "tb_folder"},
        ("events",),
    ),
    "MLflowReceiver": Row(
        "tracker",
        "nvflare.app_opt.tracking.mlflow.mlflow_receiver",
        "fedloom.recipe.tracking.MLflow",
        {"tracking_uri": "tracking_uri", "artifact_location": "artifact_location", "kw_args": "kw_args"},
        ("events", "buffer_flush_time"),
    ),
    "WandBReceiver": Row(
        "tracker",
        "nvflare.app_opt.tracking.wandb.wandb_receiver",
        "fedloom.recipe.tracking.WandB",
        {"wandb_args": "wandb_args", "mode": "mode"},
        ("events", "process_timeout"),
    ),
    "FullModelShareableGenerator": _done(_APP + "shareablegenerators.full_model_shareable_generator", "FedAvg does it"),
    "PTFileModelLocator": _done("nvflare.app_opt.pt.file_model_locator", "evaluation finds the job's own models"),
    "NPModelLocator": _done(_APP + "np.np_model_locator", "evaluation finds the job's own models"),
    "ValidationJsonGenerator": _done(_APP + "widgets.validation_json_generator", "the matrix is written in any case"),
    "ConvertToFedEvent": _done(_APP + "widgets.convert_to_fed_event", _METRICS),
    "MetricRelay": _done(_APP + "widgets.metric_relay", _METRICS),
    "AnalyticsSender": _done(_APP + "widgets.streaming", _METRICS),
    "ExternalConfigurator": _done(_APP + "widgets.external_configurator", "the executor tells its script"),
    "CellPipe": _done("nvflare.fuel.utils.pipe.cell_pipe", "the executor has a channel to its script"),
    "FilePipe": _done("nvflare.fuel.utils.pipe.file_pipe", "the executor has a channel to its script"),
    "TensorServerStreamer": _done("nvflare.app_opt.tensor_stream.server", _TRANSFER),
    "TensorClientStreamer": _done("nvflare.app_opt.tensor_stream.client", _TRANSFER),
    "NumpyToPTParamsConverter": _done("nvflare.app_opt.pt.params_converter", "the exchange format says it"),
    "PTToNumpyParamsConverter": _done("nvflare.app_opt.pt.params_converter", "the exchange format says it"),
    "JobStatsReporter": _done(_APP + "widgets.job_stats_reporter", "each round's record has them"),
    "MetricsArtifactWriter": _done(_APP + "widgets.metrics_artifact_writer", "metrics.jsonl is written in any case"),
}

#: What has no equivalent, and the nearest there is.
REFUSED: Mapping[str, str] = {
    "Scaffold": "FedAvg, with the control variates sent as params",
    "ScatterAndGatherScaffold": "FedAvg, with the control variates sent as params",
    "FedOpt": "FedAvg with an aggregator of your own that keeps a server optimizer",
    "PTFedOptModelShareableGenerator": "FedAvg with an aggregator of your own that keeps a server optimizer",
    "Cyclic": "a workflow of your own that gathers from one site after another",
    "CyclicController": "a workflow of your own that gathers from one site after another",
    "SwarmServerController": "FedAvg",
    "SwarmClientController": "a ScriptExecutor",
    "CyclicServerController": "a workflow of your own that gathers from one site after another",
    "CrossSiteEvalServerController": "CrossSiteEval",
    "StatisticsController": "a workflow of your own with a function executor",
    "SplitNNController": "a workflow of your own with a function executor",
    "InitializeGlobalWeights": "FedAvg without an initial model: the first site's layout, the mean of all",
    "NPValidator": "a script that scores where flare.is_evaluate() is true (NPValidator's scores are random numbers)",
    "PTModel": "PTFileModelPersistor",
    "TFModelPersistor": "NumpyFedAvgRecipe with the layers' weights by name",
    "TFClientAPILauncherExecutor": "ScriptExecutor with numpy arrays by layer",
    "TFInProcessClientAPIExecutor": "ScriptExecutor with numpy arrays by layer",
    "PercentilePrivacy": "a filter of your own on client_output",
    "SVTPrivacy": "a filter of your own on client_output",
    "ConvertWeights": "params_transfer_type='DIFF'",
    "DXOBlocker": "a filter of your own that raises",
    "ModelQuantizer": "bfloat16 or float16 params",
    "ModelDequantizer": "bfloat16 or float16 params",
    "HEModelEncryptor": "nothing yet",
    "HEModelDecryptor": "nothing yet",
    "CollectAndAssembleAggregator": "an aggregator of your own: fedloom.recipe.FedAvgRecipe(aggregator=...)",
}


def as_markdown() -> str:
    """The table as `docs/guides/job-folders.md` has it."""
    lines = ["| NVFLARE | fedloom | arguments |", "|---|---|---|"]
    for name, row in TABLE.items():
        ours = f"`{row.ours}`" if row.ours.startswith("fedloom.") else row.ours
        args = ", ".join(f"`{a}`" if a == b else f"`{a}` → `{b}`" for a, b in row.args.items()) or "-"
        lines.append(f"| `{name}` | {ours} | {args} |")
    lines += ["", "| without an equivalent | nearest |", "|---|---|"]
    lines += [f"| `{name}` | {nearest} |" for name, nearest in REFUSED.items()]
    return "\n".join(lines) + "\n"
