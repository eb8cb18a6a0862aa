"""Evaluation behind a recipe's training: the server's models, or the sites' own as well, on every site's data.

What scores a model is the recipe's own script, or functions of it. Nothing is made up for a script that only trains:
what it would have to answer is said when the evaluation is added.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..serialization.component import Component
from ..serialization.errors import JobError
from .base import Recipe
from .options import number

CROSS_SITE = "fedloom.controller.workflows.crosssite.CrossSiteEval"
GLOBAL_MODEL = "fedloom.controller.workflows.crosssite.GlobalModelEval"
VALIDATE, SUBMIT = "validate", "submit_model"

#: What in a script's source says that it tells this task from others; a trainer that is patched does so by itself.
_ASKS: dict[str, frozenset[str]] = {
    VALIDATE: frozenset({"is_evaluate", "get_task_name", "TASK_NAME", "patch", VALIDATE}),
    SUBMIT: frozenset({"is_submit_model", "get_task_name", "TASK_NAME", "patch", SUBMIT}),
}
_LINES: dict[str, str] = {
    SUBMIT: """\
    if flare.is_submit_model():     # it comes without params: send this site's own model, such as
        flare.send(flare.FLModel(params=flare.state()["model"]))
        continue""",
    VALIDATE: """\
    if flare.is_evaluate():         # score the received model on this site's data
        flare.send(flare.FLModel(metrics={"accuracy": evaluate(model.params)}))
        continue""",
}
#: Names of functions that are taken for these tasks where the recipe's script is a function.
_FUNCTIONS: dict[str, tuple[str, ...]] = {VALIDATE: ("evaluate", "validate"), SUBMIT: ("submit_model",)}


def add_cross_site_evaluation(
    recipe: Recipe,
    submit_model_timeout: float = 600,
    validation_timeout: float = 6000,
    participating_clients: Sequence[str] | None = None,
    *,
    eval_function: str | None = None,
    submit_function: str | None = None,
) -> None:
    """Have every site's own model, and the server's, scored on every site's data once the training is over.

    The result is ``cross_site_val/cross_val_results.json``: data site, then model, then metric. The sites are asked
    with the tasks ``submit_model`` and ``validate``.

    Args:
        recipe: whose script answers them.
        submit_model_timeout: seconds for the sites to give their models; 0: no limit.
        validation_timeout: seconds for the sites to score one model; 0: no limit.
        participating_clients: the sites; None: all that take part in the job.
        eval_function: for a function as training script: the one that scores a model, ``"evaluate"`` of its file or
            ``"other.py:function"``; by default ``evaluate`` or ``validate``.
        submit_function: the one that returns the site's own model; by default ``submit_model``.

    Raises:
        JobError: it was added before, a value that is not allowed, or a script that only trains.
    """
    args: dict[str, Any] = {"submit_model_timeout": number(submit_model_timeout, "submit_model_timeout")}
    tasks = {VALIDATE: eval_function, SUBMIT: submit_function}
    _add(recipe, CROSS_SITE, args, validation_timeout, participating_clients, tasks)


def add_final_global_evaluation(
    recipe: Recipe,
    participating_clients: Sequence[str] | None = None,
    validation_timeout: float = 6000,
    *,
    eval_function: str | None = None,
) -> None:
    """Have the server's models alone, the last one and the best, scored on every site's data after the training.

    Args:
        recipe, participating_clients, validation_timeout, eval_function: as `add_cross_site_evaluation`.

    Raises:
        JobError: as `add_cross_site_evaluation`.
    """
    _add(recipe, GLOBAL_MODEL, {}, validation_timeout, participating_clients, {VALIDATE: eval_function})


def add_cse_validator_if_needed(recipe: Recipe) -> None:
    """Look whether the recipe's script scores models: it has to, since nothing else has the site's data.

    Raises:
        JobError: it only trains; the message has the lines to add.
    """
    check_answers(recipe, {VALIDATE: None})


def _add(
    recipe: Recipe,
    path: str,
    args: dict[str, Any],
    validation_timeout: float,
    sites: Sequence[str] | None,
    tasks: dict[str, str | None],
) -> None:
    if any(workflow.path == path for workflow in recipe.job.workflows):
        raise JobError(f"{path.rpartition('.')[2]} was added to {recipe.name!r} before: add it once")
    if isinstance(sites, str) or (sites is not None and not sites):
        raise JobError(f"participating_clients={sites!r}; a list of site names belongs here, or None for all")
    check_answers(recipe, tasks)
    args["validation_timeout"] = number(validation_timeout, "validation_timeout")
    args["min_clients"] = recipe.job.min_clients
    if sites is not None:
        args["participating_clients"] = list(sites)
    recipe.job.add_workflow(path, args)


def check_answers(recipe: Recipe, tasks: dict[str, str | None]) -> None:
    """See to it that something answers these tasks at the sites: the script, or the function named for a task.

    Raises:
        JobError: nothing does.
    """
    script = recipe.script
    if script is None:
        raise JobError(f"{type(recipe).__name__} runs no script that could answer {' and '.join(tasks)}")
    place = Path(script.script).name
    if script.function or any(tasks.values()):
        for task, function in tasks.items():
            if function or script.function:
                _add_function(recipe, task, place, function)
        if script.function:
            return
    names = _names(recipe)
    missing = [task for task, function in tasks.items() if not function and not names & _ASKS[task]]
    if missing:
        lines = "\n".join(_LINES[task] for task in (SUBMIT, VALIDATE) if task in missing)
        raise JobError(
            f"{place} takes every task for training, but an evaluation also asks for {' and '.join(missing)}. Behind"
            f" `model = flare.receive()` in its loop, add:\n{lines}"
        )


def _add_function(recipe: Recipe, task: str, place: str, wanted: str | None) -> None:
    """An executor for this task alone: a function of the script's file, or of another one that travels too."""
    assert recipe.exchange is not None
    if any(task in spec.tasks for spec in recipe.job.executors):
        return
    path, _, name = (wanted or "").rpartition(":")
    if path:
        place = recipe.job.add_code(path)
    known = _functions(recipe.job.files[place])
    if not name:
        name = next((one for one in _FUNCTIONS[task] if one in known), "")
    if name not in known:
        option = "eval_function" if task == VALIDATE else "submit_function"
        looked = repr(name) if name else " or ".join(repr(one) for one in _FUNCTIONS[task])
        raise JobError(
            f"{place} has no function {looked} for task {task!r}; it has {sorted(known) or 'none'}: write one, or name"
            f" it with {option}="
        )
    args: dict[str, Any] = {
        "task_script_path": place,
        "function": name,
        "params_exchange_format": recipe.exchange.framework.value,
        "params_transfer_type": recipe.exchange.params_transfer_type.value,
    }
    recipe.job.add_executor(Component("fedloom.executor.script.FunctionExecutor", args), tasks=(task,))


def _functions(script: Path) -> set[str]:
    tree = ast.parse(script.read_bytes())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def _names(recipe: Recipe) -> set[str]:
    """All names, attributes and texts in the code that travels with the job."""
    out: set[str] = set()
    for path in recipe.job.files.values():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            match node:
                case (
                    ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.Constant(value=str(name))
                ):
                    out.add(name)
                case _:
                    pass
    return out
