"""How long a stateful machine runs: a short form with every change, and a long one in `make proof`."""

from __future__ import annotations

from typing import Any

from hypothesis import Phase, settings

#: For machines whose failures take minutes to shrink: that is left to the long form.
AS_FOUND = (Phase.explicit, Phase.generate)


def short(examples: int, steps: int, **more: Any) -> settings:
    """The same histories in every run."""
    return settings(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, **more)


def long(examples: int, steps: int, like: settings | None = None, **more: Any) -> settings:
    """Other histories each time, and a failure prints what reproduces it; what is not said is as in ``like``."""
    more = {"deadline": None, "derandomize": False, "print_blob": True, **more}
    return settings(like, max_examples=examples, stateful_step_count=steps, **more)
