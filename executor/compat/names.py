"""The names of NVFLARE that scripts import, and where fedloom has what they stand for. Texts only: nothing is loaded.

`MODULES` has what works. `LATER_MODULES` has what job scripts import beside what they use (recipes of other algorithms,
environments that need NVFLARE's own provisioning): it can be imported, and says what there is instead once it is used.
Any other name is an ImportError that names the nearest equivalent (`NEAREST`).
"""

from __future__ import annotations

_WORDS = "fedloom.executor.compat.vocabulary:"


def _of(module: str, *names: str) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names}


_CLIENT = _of(
    "fedloom.client",
    "FLModel",
    "ParamsType",
    "clear",
    "get_config",
    "get_job_id",
    "get_site_name",
    "get_task_name",
    "init",
    "is_evaluate",
    "is_running",
    "is_submit_model",
    "is_train",
    "log",
    "receive",
    "send",
    "shutdown",
    "system_info",
)
_DECORATORS = _of("fedloom.client", "evaluate", "train")
_NUMPY_RECIPE = _of("fedloom.recipe", "NumpyFedAvgRecipe")
_TORCH_RECIPE = _of("fedloom.recipe", "FedAvgRecipe")
_NUMPY_EVALUATION = _of("fedloom.recipe", "NumpyCrossSiteEvalRecipe")
_TORCH_EVALUATION = _of("fedloom.recipe", "FedEvalRecipe")
_HELPERS = _of("fedloom.recipe", "add_cross_site_evaluation", "add_experiment_tracking", "add_final_global_evaluation")
_FILTERS = _of("fedloom.serialization.filters", "ExcludeVars")
_EXCHANGE = _of("fedloom.recipe", "ExchangeFormat", "TransferType")
_FRAMEWORK = _of("fedloom.recipe", "FrameworkType")

MODULES: dict[str, dict[str, str]] = {
    "nvflare.client": _CLIENT | _DECORATORS,
    "nvflare.client.api": _CLIENT,
    "nvflare.client.config": _EXCHANGE,
    "nvflare.client.decorator": _DECORATORS,
    "nvflare.client.hf": _CLIENT | _of("fedloom.client.hf", "patch"),
    "nvflare.client.lightning": _CLIENT | _of("fedloom.client.lightning", "patch"),
    "nvflare.client.tracking": _of("fedloom.executor.tracking", "MLflowWriter", "SummaryWriter", "WandBWriter"),
    "nvflare.apis.analytix": {"AnalyticsDataType": _WORDS + "AnalyticsDataType"},
    "nvflare.apis.dxo": {"DataKind": _WORDS + "DataKind", "MetaKey": _WORDS + "FLMetaKey"},
    "nvflare.apis.fl_constant": {"FLMetaKey": _WORDS + "FLMetaKey"},
    "nvflare.apis.job_def": {"RunStatus": _WORDS + "RunStatus"},
    "nvflare.app_common.abstract.fl_model": _of("fedloom.client", "FLModel", "ParamsType"),
    "nvflare.app_common.aggregators.model_aggregator": _of("fedloom.controller.aggregators.custom", "ModelAggregator"),
    "nvflare.app_common.app_constant": {
        name: _WORDS + name for name in ("AppConstants", "DefaultCheckpointFileName", "ModelName")
    },
    "nvflare.app_common.filters": _FILTERS,
    "nvflare.app_common.filters.exclude_vars": _FILTERS,
    "nvflare.app_common.np.constants": {"NPConstants": _WORDS + "NPConstants"},
    "nvflare.app_common.np.recipes": _NUMPY_RECIPE | _NUMPY_EVALUATION,
    "nvflare.app_common.np.recipes.cross_site_eval": _NUMPY_EVALUATION,
    "nvflare.app_common.np.recipes.fedavg": _NUMPY_RECIPE,
    "nvflare.app_opt.pt.recipes": _TORCH_RECIPE | _TORCH_EVALUATION,
    "nvflare.app_opt.pt.recipes.fedavg": _TORCH_RECIPE,
    "nvflare.app_opt.pt.recipes.fedeval": _TORCH_EVALUATION,
    "nvflare.fuel.utils.constants": _FRAMEWORK,
    "nvflare.job_config.script_runner": _FRAMEWORK,
    "nvflare.recipe": _of("fedloom.recipe", "FedAvgRecipe", "Recipe", "Run", "SimEnv") | _HELPERS,
    "nvflare.recipe.fedavg": _TORCH_RECIPE,
    "nvflare.recipe.prod_env": {"DEFAULT_ADMIN_USER": _WORDS + "DEFAULT_ADMIN_USER"},
    "nvflare.recipe.run": _of("fedloom.recipe", "Run"),
    "nvflare.recipe.sim_env": _of("fedloom.recipe", "SimEnv"),
    "nvflare.recipe.spec": _of("fedloom.recipe", "Recipe"),
    "nvflare.recipe.utils": _HELPERS,
}

_ALGORITHM = "fedloom has federated averaging and cross-site evaluation so far: NumpyFedAvgRecipe, FedAvgRecipe"
_ALGORITHMS = (
    "CyclicRecipe",
    "FedAvgRecipeWithHE",
    "FedCERecipe",
    "FedOptRecipe",
    "FedProxRecipe",
    "ScaffoldRecipe",
    "SwarmLearningRecipe",
)
_POC = "simulate with SimEnv, or start `fedloom broker`, `controller` and `executor` and use fedloom.recipe.ProdEnv"
_PROD = 'there are no startup kits: fedloom.recipe.ProdEnv("tcp://broker:7600") takes the broker\'s endpoint'
_FILTER = "write a filter of your own and add it with recipe.add_client_output_filter"
_JOB = "make a recipe, or put a job together with fedloom.recipe.Job"
_AGGREGATOR = "give the recipe an object with accept_model(), aggregate_model() and reset_stats()"
_PER_SITE = "call recipe.set_per_site_config({site: {...}}), or give the recipe per_site_config"

LATER_MODULES: dict[str, dict[str, str]] = {
    "nvflare": {"FedJob": _JOB},
    "nvflare.job_config.api": {"FedJob": _JOB},
    "nvflare.app_common.abstract.aggregator": {"Aggregator": _AGGREGATOR},
    "nvflare.app_common.filters": dict.fromkeys(("ConvertWeights", "PercentilePrivacy", "SVTPrivacy"), _FILTER),
    "nvflare.app_common.filters.percentile_privacy": {"PercentilePrivacy": _FILTER},
    "nvflare.app_common.filters.svt_privacy": {"SVTPrivacy": _FILTER},
    "nvflare.app_common.np.recipes": {"FedAvgLrRecipe": _ALGORITHM},
    "nvflare.app_common.np.recipes.lr.fedavg": {"FedAvgLrRecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes": dict.fromkeys(_ALGORITHMS, _ALGORITHM),
    "nvflare.app_opt.pt.recipes.cyclic": {"CyclicRecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.fedavg_he": {"FedAvgRecipeWithHE": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.fedce": {"FedCERecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.fedopt": {"FedOptRecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.fedprox": {"FedProxRecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.scaffold": {"ScaffoldRecipe": _ALGORITHM},
    "nvflare.app_opt.pt.recipes.swarm": {"SwarmLearningRecipe": _ALGORITHM},
    "nvflare.recipe": {
        "CyclicRecipe": _ALGORITHM,
        "PocEnv": _POC,
        "ProdEnv": _PROD,
        "set_per_site_config": _PER_SITE,
    },
    "nvflare.recipe.cyclic": {"CyclicRecipe": _ALGORITHM},
    "nvflare.recipe.poc_env": {"PocEnv": _POC},
    "nvflare.recipe.prod_env": {"ProdEnv": _PROD},
}

_COMPONENT = "its workflows, executors and events are not rebuilt; docs/guides/jobs.md has what takes their place"
#: Longest prefixes first.
NEAREST: tuple[tuple[str, str], ...] = (
    ("nvflare.app_common.filters", _FILTER),
    (
        "nvflare.app_common.np",
        "for numpy there are NPConstants, NumpyFedAvgRecipe, NumpyCrossSiteEvalRecipe",
    ),
    ("nvflare.app_opt.pt", "give the torch module to fedloom.recipe.FedAvgRecipe, which saves and loads it"),
    ("nvflare.app_opt.tf", "TensorFlow has no recipe: send the layers' weights as numpy arrays by name"),
    ("nvflare.app_opt", _ALGORITHM),
    ("nvflare.client", "the Client API is fedloom.client"),
    ("nvflare.fuel.flare_api", "a broker's jobs are `fedloom job ...` and fedloom.recipe.JobClient"),
    ("nvflare.job_config", _JOB),
    ("nvflare.recipe", "the recipes and environments are fedloom.recipe"),
    ("nvflare.apis", _COMPONENT),
    ("nvflare.app_common", _COMPONENT),
)
OTHERWISE = "the names that there are: nvflare.client, nvflare.recipe and the recipes' modules"
