"""Evaluation without training, as recipes: of a given model, and of numpy models in files and at the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..serialization.errors import JobError
from .base import Recipe
from .evaluation import CROSS_SITE, GLOBAL_MODEL, SUBMIT, VALIDATE, check_answers
from .job import Job
from .models import InitialModel, numpy_model, torch_model, with_checkpoint
from .options import ExchangeFormat, ExchangeOptions, FrameworkType, ScriptOptions, number, whole
from .sitescripts import script_component

#: The keys of a site's own settings that have other names where a script evaluates.
_SITE_KEYS = {"eval_script": "train_script", "eval_args": "train_args"}
#: Where `NumpyCrossSiteEvalRecipe` looks for a model if it is told a folder alone.
_DEFAULT_MODELS = {"server": "server.npy"}


class _EvalRecipe(Recipe):
    """A job of one evaluation workflow and the script that scores models."""

    def __init__(self, job: Job, script: ScriptOptions, exchange: ExchangeOptions, initial: InitialModel) -> None:
        super().__init__(job)
        self.script = script
        self.exchange = exchange
        self.job.add_executor(script_component(job, script, exchange, initial.modules))

    def _initial(self, initial: InitialModel) -> dict[str, Any]:
        """The workflow's arguments for the model."""
        args: dict[str, Any] = {"min_clients": self.job.min_clients}
        if initial.params is not None:
            args["initial_model"] = self.job.set_model(initial.params)
        if initial.checkpoint:
            args["initial_ckpt"] = initial.checkpoint
        return args


class FedEvalRecipe(_EvalRecipe):
    """Have a model scored on every site's data, without training; the matrix has it as ``SRV_model``.

    Args:
        name: the job's name.
        model: the model: a module *instance*, a map of arrays or tensors by name, or ``{"class_path": ..., "args":
            ...}``; None: the checkpoint alone.
        eval_ckpt: a checkpoint with the model's values (.safetensors, .pt, .npy and so on): a relative path lies beside
            the job script and travels, an absolute one is read where the job's process runs.
        min_clients: sites that have to be connected before it begins.
        eval_script: what scores the model at a site, found beside the job script: a script in which
            ``flare.is_evaluate()`` is true, or ``"client.py:evaluate"`` for a function of it.
        eval_args: the script's command line.
        launch_external_process, command, launch_once, launch_timeout, client_memory_gc_rounds, cuda_empty_cache: as
            `FedAvgRecipe`.
        framework: what the script receives: ``"pytorch"`` tensors or ``"numpy"`` arrays.
        server_expected_format: accepted; nothing is converted on the way.
        validation_timeout: seconds for all sites; 0: no limit.
        participating_clients: the sites; None: all that are connected.
        per_site_config: by site, the options that differ there; ``eval_script`` and ``eval_args`` among them.

    Raises:
        JobError: a value that is not allowed, a file that is missing, no model, or a script that scores nothing.
    """

    def __init__(
        self,
        *,
        name: str = "eval",
        model: Any = None,
        eval_ckpt: str | Path | None = None,
        min_clients: int,
        eval_script: str,
        eval_args: str = "",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        launch_once: bool = True,
        launch_timeout: float = 300.0,
        framework: FrameworkType | str = FrameworkType.PYTORCH,
        server_expected_format: ExchangeFormat | str = ExchangeFormat.NUMPY,
        validation_timeout: float = 6000,
        participating_clients: Sequence[str] | None = None,
        per_site_config: Mapping[str, Mapping[str, Any]] | None = None,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        seed: int = 0,
        threads_per_task: int = 1,
    ) -> None:
        job = Job(name, min_clients=whole(min_clients, "min_clients", 1), seed=seed, threads_per_task=threads_per_task)
        exchange = ExchangeOptions.of(framework, server_expected_format, "FULL")
        made = torch_model if exchange.framework is FrameworkType.PYTORCH else numpy_model
        initial = with_checkpoint(eval_ckpt, *made(model), option="eval_ckpt")
        if initial.params is None and not initial.checkpoint:
            raise JobError("FedEvalRecipe: neither model nor eval_ckpt: give the model that the sites are to score")
        script = ScriptOptions(
            eval_script,
            eval_args,
            launch_external_process=launch_external_process,
            command=command,
            launch_once=launch_once,
            launch_timeout=launch_timeout,
            client_memory_gc_rounds=client_memory_gc_rounds,
            cuda_empty_cache=cuda_empty_cache,
        )
        super().__init__(job, script, exchange, initial)
        if not script.function:
            check_answers(self, {VALIDATE: None})
        args = self._initial(initial) | {"validation_timeout": number(validation_timeout, "validation_timeout")}
        if participating_clients is not None:
            args["participating_clients"] = list(participating_clients)
        job.add_workflow(GLOBAL_MODEL, args)
        if per_site_config is not None:
            self.set_per_site_config(_renamed(per_site_config))


class NumpyCrossSiteEvalRecipe(_EvalRecipe):
    """Have numpy models scored on every site's data, without training: those in files, and each site's own.

    Args:
        name: the job's name.
        min_clients: sites that have to be connected before it begins.
        eval_script: what scores models at a site and gives the site's own: a script that asks ``flare.is_evaluate()``
            and ``flare.is_submit_model()``, or ``"client.py:evaluate"`` with ``submit_function`` beside it.
        eval_args: the script's command line.
        launch_external_process, command, launch_once, client_memory_gc_rounds, cuda_empty_cache: as `FedAvgRecipe`.
        initial_ckpt: a checkpoint, which the matrix has as ``SRV_model``; its array is ``params["numpy_key"]``.
        model_dir: a folder of further models: a relative one lies beside the job script and its files travel with the
            job (.npy, .npz or .safetensors), those of an absolute one are read where the job's process runs.
        model_name: name to file in ``model_dir``: a model ``"x"`` is ``SRV_x`` in the matrix. By default
            ``{"server": "server.npy"}``.
        submit_model_timeout, validation_timeout: seconds; 0: no limit.
        participating_clients: the sites; None: all that are connected.
        submit_function: the function that returns a site's own model, where ``eval_script`` names one.

    Raises:
        JobError: a value that is not allowed, a file that is missing, or a script that does not answer both tasks.
    """

    def __init__(
        self,
        *,
        name: str = "numpy_cross_site_eval",
        min_clients: int = 2,
        eval_script: str | None = None,
        eval_args: str = "",
        launch_external_process: bool = False,
        command: str = "python3 -u",
        launch_once: bool = True,
        initial_ckpt: str | Path | None = None,
        model_dir: str | Path | None = None,
        model_name: Mapping[str, str] | None = None,
        submit_model_timeout: float = 600,
        validation_timeout: float = 6000,
        participating_clients: Sequence[str] | None = None,
        submit_function: str | None = None,
        client_memory_gc_rounds: int = 0,
        cuda_empty_cache: bool = False,
        seed: int = 0,
        threads_per_task: int = 1,
    ) -> None:
        if not eval_script:
            raise JobError(
                "NumpyCrossSiteEvalRecipe: no eval_script: only a script of yours has the sites' data and can score a"
                " model on it; see docs/guides/evaluation.md for one"
            )
        job = Job(name, min_clients=whole(min_clients, "min_clients", 1), seed=seed, threads_per_task=threads_per_task)
        initial = with_checkpoint(initial_ckpt, None, [], option="initial_ckpt")
        script = ScriptOptions(
            eval_script,
            eval_args,
            launch_external_process=launch_external_process,
            command=command,
            launch_once=launch_once,
            client_memory_gc_rounds=client_memory_gc_rounds,
            cuda_empty_cache=cuda_empty_cache,
        )
        super().__init__(job, script, ExchangeOptions(FrameworkType.NUMPY), initial)
        tasks: dict[str, str | None] = {SUBMIT: submit_function}
        check_answers(self, tasks if script.function else {VALIDATE: None} | tasks)
        args = self._initial(initial)
        if models := _model_files(job, model_dir, model_name):
            args["models"] = models
        args["submit_model_timeout"] = number(submit_model_timeout, "submit_model_timeout")
        args["validation_timeout"] = number(validation_timeout, "validation_timeout")
        if participating_clients is not None:
            args["participating_clients"] = list(participating_clients)
        job.add_workflow(CROSS_SITE, args)


def _model_files(job: Job, folder: str | Path | None, names: Mapping[str, str] | None) -> dict[str, str]:
    """The models in files as the workflow finds them; those beside the job script are taken along."""
    if folder is None:
        if names:
            raise JobError(f"model_name={dict(names)!r} without model_dir: name the folder that the files are in")
        return {}
    from ..controller.checkpoints import check_suffix, check_travelling

    out: dict[str, str] = {}
    for name, file in (names or _DEFAULT_MODELS).items():
        path = Path(folder).expanduser() / file
        check_suffix(path, f"model_name[{name!r}]")
        if not path.is_absolute():
            check_travelling(Path(file), f"model_name[{name!r}]")
            job.add_file(path)
        out[name] = str(path) if path.is_absolute() else path.name
    return out


def _renamed(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {site: {_SITE_KEYS.get(key, key): value for key, value in own.items()} for site, own in config.items()}
