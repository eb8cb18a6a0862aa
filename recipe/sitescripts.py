"""The script that a recipe's sites run, and the settings that differ at some of them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from ..serialization.component import Component
from ..serialization.errors import JobError
from ..serialization.jobspec import check_site_name
from .job import Job
from .options import ExchangeOptions, ScriptOptions

#: What a site may have of its own: the options of the script and of the exchange.
SITE_KEYS = frozenset(
    {
        "train_script",
        "train_args",
        "launch_external_process",
        "command",
        "framework",
        "server_expected_format",
        "params_transfer_type",
        "launch_once",
        "launch_timeout",
        "shutdown_timeout",
        "client_memory_gc_rounds",
        "cuda_empty_cache",
    }
)


def script_component(
    job: Job, script: ScriptOptions, exchange: ExchangeOptions, more: Iterable[Path] = ()
) -> Component:
    """The executor's component for a script, which is taken along with ``more`` sources.

    Raises:
        JobError: the script is missing or no Python, or has no function of the name that ``train_script`` gives.
    """
    place = job.add_code(script.script, *more)
    if script.function:
        _check_function(job.files[place], script.function)
    return script.component(place, exchange)


def add_site_scripts(
    job: Job, script: ScriptOptions, exchange: ExchangeOptions, config: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give sites an executor of their own, which goes before the one for all.

    Args:
        job: the job, with the executor for all sites.
        script, exchange: the options for all sites; a site keeps those that its entry does not name.
        config: by site, the options that differ there (`SITE_KEYS`).

    Raises:
        JobError: no such option, a value that is not allowed, or another ``params_transfer_type`` than the others'.
    """
    if not isinstance(cast("object", config), Mapping):
        raise JobError(f"per_site_config={config!r}; a map of site names to options belongs here")
    for site, given in config.items():
        where = f"per_site_config[{check_site_name(site)!r}]"
        options = _options(given, where)
        try:
            own_script = replace(script, **_of_group(ScriptOptions, options))
            own_exchange = replace(exchange, **_of_group(ExchangeOptions, options))
        except JobError as error:
            raise JobError(f"{where}: {error}") from None
        if own_exchange.params_transfer_type is not exchange.params_transfer_type:
            raise JobError(
                f"{where}: params_transfer_type={own_exchange.params_transfer_type.value!r}, but the other sites send"
                f" {exchange.params_transfer_type.value!r}: all sites of a round send the same; give it to the recipe"
            )
        job.add_executor(script_component(job, own_script, own_exchange), sites=(site,))


def _options(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise JobError(f"{where}={given!r}; a map of options to values belongs here")
    options = cast("Mapping[Any, Any]", given)
    for name in options:
        if name not in SITE_KEYS:
            near = get_close_matches(str(name), SITE_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(SITE_KEYS))}"
            raise JobError(f"{where}: unknown option {name!r}; {hint}")
    return dict(options)


def _of_group(group: type[ScriptOptions] | type[ExchangeOptions], options: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(group)}
    return {name: value for name, value in options.items() if name in names}


def _check_function(script: Path, function: str) -> None:
    """Look for the function that ``train_script`` names, before any site would miss it."""
    tree = ast.parse(script.read_bytes())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if function not in names:
        raise JobError(f"{script.name} has no function {function!r}; it has {sorted(names) or 'none'}")
