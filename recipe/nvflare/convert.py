"""One component of NVFLARE's after another: what the `table` says, with the arguments that it takes here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from ...serialization.component import KNOWN_NAMES, Component
from ...serialization.errors import JobError
from ...serialization.jobjson import map_of, text_of
from .table import CROSS_SITE, FEDAVG, FUNCTION, GLOBAL_EVAL, REFUSED, SCRIPT, TABLE, Row

PREFIX = "nvflare."
#: Written into the job's code where it has an NPTrainer.
TRAINER_SCRIPT = "np_trainer.py"


@dataclass(slots=True)
class Notes:
    """What was mapped, for one line: their name to ours, in the order of the files."""

    mapped: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, name: str, row: Row) -> None:
        """Note a component."""
        ours = row.ours.rpartition(".")[2] if row.ours.startswith("fedloom.") else row.ours
        self.mapped.setdefault(name, "nothing to do" if row.kind == "done" else ours)

    def line(self) -> str:
        """All of them."""
        return ", ".join(f"{theirs} -> {ours}" for theirs, ours in self.mapped.items() if ours != "nothing to do")


@dataclass(frozen=True, slots=True)
class Part:
    """A component of a config file as it stands there: its class's short name, and whether it is one of NVFLARE's."""

    name: str
    args: dict[str, Any]
    id: str = ""
    path: str = ""

    @property
    def theirs(self) -> bool:
        """Whether the table has to say what it is."""
        return not self.path or self.path.startswith(PREFIX)

    @property
    def component(self) -> Component:
        """As fedloom has it, where it is fedloom's or the job's own."""
        return Component(self.path, self.args, self.id)


def part_of(data: object, where: str) -> Part:
    """A component out of a config.

    Raises:
        JobError: it has neither ``path`` nor ``name``, or a value of the wrong type.
    """
    entry = map_of(data, where)
    args = map_of(entry.get("args") or {}, f"{where}: args")
    id = text_of(entry.get("id", ""), f"{where}: id")
    path = text_of(entry.get("path", entry.get("class_path", "")), f"{where}: path")
    name = path.rpartition(".")[2] or text_of(entry.get("name", ""), f"{where}: name")
    if not name:
        raise JobError(f"{where}: a component without path or name")
    if not path and name not in TABLE and name not in REFUSED:
        path = KNOWN_NAMES.get(name, "")
    return Part(name, args, id, path)


def row_of(part: Part, where: str) -> Row:
    """The table's row for a component of NVFLARE's.

    Raises:
        JobError: it has no equivalent here; names the nearest.
    """
    if (row := TABLE.get(part.name)) is not None:
        return row
    what = f"{where}: {part.path or part.name}"
    if (nearest := REFUSED.get(part.name)) is not None:
        raise JobError(f"{what} has no equivalent in fedloom; the nearest is {nearest}")
    close = get_close_matches(part.name, TABLE, n=1, cutoff=0.5)
    hint = f"the nearest name that has one is {close[0]} ({TABLE[close[0]].ours})" if close else "nothing is near it"
    raise JobError(f"{what} has no equivalent in fedloom; {hint}: see docs/guides/job-folders.md")


def args_of(part: Part, row: Row, where: str) -> dict[str, Any]:
    """A component's arguments by fedloom's names, NVFLARE's defaults where fedloom's are others.

    Raises:
        JobError: an argument that means nothing here, or a value that fedloom does not have.
    """
    what = f"{where}: {part.name}"
    out: dict[str, Any] = {}
    for name, value in {**row.defaults, **part.args}.items():
        if name in row.args:
            out[row.args[name]] = value
        elif name in row.only:
            allowed, why = row.only[name]
            if value not in allowed:
                raise JobError(f"{what}: {name}={value!r} has no equivalent in fedloom: {why}")
        elif name in row.defaults:
            out[name] = value
        elif name not in row.unneeded and row.kind != "done":
            known = ", ".join(sorted({*row.args, *row.only, *row.unneeded}))
            raise JobError(f"{what}: argument {name!r} has no equivalent in fedloom; known are {known}")
    return out


# ---------------------------------------------------------------- workflows


def workflow(part: Part, parts: Mapping[str, Part], notes: Notes, where: str, *, min_clients: int) -> Component:
    """A workflow, with what the parts that it uses say of it.

    Args:
        parts: the server's components by id.
        min_clients: the job's own.

    Raises:
        JobError: it has no equivalent.
    """
    if not part.theirs:
        return part.component
    row = row_of(part, where)
    if row.kind != "workflow":
        raise JobError(f"{where}: {part.name} is no workflow")
    args = args_of(part, row, where)
    notes.add(part.name, row)
    if row.ours == FEDAVG:
        args = _fedavg(part, args, parts, notes, where, min_clients)
    elif row.ours == CROSS_SITE and args.get("submit_task") == "":
        args = {key: value for key, value in args.items() if key not in ("submit_task", "submit_model_timeout")}
        row = replace(row, ours=GLOBAL_EVAL)
    return Component(row.ours, {k: v for k, v in args.items() if v is not None}, part.id or "controller")


def _fedavg(
    part: Part, args: dict[str, Any], parts: Mapping[str, Part], notes: Notes, where: str, min_clients: int
) -> dict[str, Any]:
    args.setdefault("min_clients", min_clients)  # their own defaults, 1000 and 3, mean whoever is there
    if not args.get("deadline_s"):
        args.pop("deadline_s", None)  # 0: no limit, as fedloom's None
    chosen = next((one for one in parts.values() if one.name == "IntimeModelSelector" and one.theirs), None)
    if chosen is not None:
        told = args_of(chosen, TABLE[chosen.name], f"{where}: component {chosen.id!r}")
        args["key_metric"] = told["key_metric"]
        if told.get("key_metric_mode"):  # negate_key_metric
            args["key_metric_mode"] = "min"
    elif isinstance(args.get("stop_cond"), str) and args["stop_cond"].split():
        args["key_metric"] = args["stop_cond"].split()[0]
    mean = _used(part, parts, "aggregator_id", "aggregator")
    if mean is not None:
        if not mean.theirs:
            args["aggregator"] = {"path": mean.path, "args": mean.args}
        else:
            row = row_of(mean, where)
            args |= args_of(mean, row, f"{where}: component {mean.id!r}")
    for name in ("exclude_vars", "aggregation_weights"):
        if not args.get(name):
            args.pop(name, None)
        elif name == "exclude_vars" and not isinstance(args[name], str):
            raise JobError(f"{where}: exclude_vars={args[name]!r}; a regular expression is what fedloom reads here")
    return args


def _used(part: Part, parts: Mapping[str, Part], key: str, default: str) -> Part | None:
    return parts.get(str(part.args.get(key) or default)) if part.name == "ScatterAndGather" else None


# ---------------------------------------------------------------- executors and filters


def executor(part: Part, parts: Mapping[str, Part], notes: Notes, where: str) -> Component:
    """What works on tasks at a site.

    Args:
        parts: the client's components by id: launchers.

    Raises:
        JobError: it has no equivalent; a class of the job's own built on NVFLARE's is none either.
    """
    if not part.theirs:
        if part.path.startswith("fedloom."):
            return part.component
        raise JobError(
            f"{where}: executor {part.path} is a class built on NVFLARE's; fedloom runs scripts with the Client API"
            " (ScriptExecutor), and functions of a script (FunctionExecutor): move its training into one"
        )
    row = row_of(part, where)
    if row.kind != "executor":
        raise JobError(f"{where}: {part.name} is no executor")
    args = args_of(part, row, where)
    notes.add(part.name, row)
    if row.ours == FUNCTION:
        return Component(FUNCTION, {"task_script_path": TRAINER_SCRIPT, "function": "train"}, part.id)
    if "launcher_id" in part.args or row.defaults.get("launch_external_process"):
        args |= _launched(part, parts, notes, where)
    if "execution_mode" in part.args:
        mode = part.args["execution_mode"]
        if mode not in ("in_process", "external_process"):
            raise JobError(
                f"{where}: execution_mode={mode!r}; fedloom starts its scripts: in_process, external_process"
            )
        args["launch_external_process"] = mode == "external_process"
    args["params_exchange_format"] = _format(args.get("params_exchange_format", "numpy"), where)
    path = args.get("task_script_path")
    if isinstance(path, str):
        args["task_script_path"] = path.removeprefix("custom/")
    return Component(SCRIPT, {k: v for k, v in args.items() if v is not None}, part.id)


def _launched(part: Part, parts: Mapping[str, Part], notes: Notes, where: str) -> dict[str, Any]:
    """The script and its command out of a launcher's one line, such as ``python3 custom/client.py --lr 1``."""
    launcher = parts.get(str(part.args.get("launcher_id", "launcher")))
    if launcher is None or launcher.name != "SubprocessLauncher":
        raise JobError(
            f"{where}: {part.name} without a SubprocessLauncher of its launcher_id: nothing says what to start"
        )
    row = TABLE["SubprocessLauncher"]
    told = args_of(launcher, row, f"{where}: component {launcher.id!r}")
    notes.add(launcher.name, row)
    line = text_of(told.pop("command", None), f"{where}: script of component {launcher.id!r}")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise JobError(f"{where}: script={line!r}: {error}") from None
    at = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise JobError(f"{where}: script={line!r} starts no Python file: fedloom's scripts are Python")
    return told | {
        "command": shlex.join(words[:at]) or "python3 -u",
        "task_script_path": words[at].removeprefix("./").removeprefix("custom/"),
        "task_script_args": shlex.join(words[at + 1 :]),
    }


def _format(value: object, where: str) -> str:
    text = str(value).lower()
    if text in ("numpy", "raw", "pytorch"):
        return "pytorch" if text == "pytorch" else "numpy"
    raise JobError(f"{where}: params_exchange_format={value!r}; numpy and pytorch are what fedloom's scripts get")


def filter_component(part: Part, notes: Notes, where: str) -> Component:
    """A filter; one of the job's own stays as it is, since only its process(model, context) is asked for.

    Raises:
        JobError: it has no equivalent.
    """
    if not part.theirs:
        return part.component
    row = row_of(part, where)
    if row.kind != "filter":
        raise JobError(f"{where}: {part.name} is no filter")
    notes.add(part.name, row)
    return Component(row.ours, args_of(part, row, where), part.id)


def left_over(parts: Sequence[Part], used: set[str], notes: Notes, where: str) -> list[Component]:
    """Components that stay: the job's own. Those of NVFLARE's have to be known, or are refused.

    Raises:
        JobError: one has no equivalent.
    """
    kept: list[Component] = []
    for part in parts:
        if not part.theirs:
            if part.id not in used:
                kept.append(part.component)
            continue
        row = row_of(part, f"{where}: component {part.id!r}")
        if row.kind not in ("part", "done", "tracker"):
            raise JobError(f"{where}: {part.name} stands among the components; it is a {row.kind}")
        args = args_of(part, row, f"{where}: component {part.id!r}")
        notes.add(part.name, row)
        if row.kind == "tracker":
            kept.append(_tracker(row, args))
    return kept


def _tracker(row: Row, args: Mapping[str, Any]) -> Component:
    from ..tracking import TRACKERS, path_of, settings

    kind = next(name for name, (cls, _, _) in TRACKERS.items() if path_of(cls) == row.ours)
    made = settings(kind, {name: value for name, value in args.items() if value})
    return Component(row.ours, {name: value for name, value in asdict(made).items() if value}, f"tracking_{kind}")


def trainer_delta(parts: Sequence[Part]) -> Any:
    """What an NPTrainer adds in each round."""
    found = next((part for part in parts if part.name == "NPTrainer" and part.theirs), None)
    return 1 if found is None else found.args.get("delta", 1)
