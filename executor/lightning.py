"""A Lightning trainer that trains what the task holds and answers it: `patch(trainer)`.

Lightning is an extra and never imported here: a trainer that is given has it loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..serialization.model import FLModel
from .client_api import current
from .client_context import EVALUATE_NAMES, ClientContext, ClientError

#: What a trainer says that it does while `validate` runs.
_VALIDATING = "validate"


def patch(
    trainer: Any, restore_state: bool = True, load_state_dict_strict: bool = True, update_fit_loop: bool = True
) -> None:
    """Let ``trainer.fit`` train the received model and send it, and ``trainer.validate`` score it.

    Call it once, after `fedloom.client.init()`, and then fit and validate within ``while flare.is_running():``.

    Args:
        trainer: a ``lightning.pytorch`` (or ``pytorch_lightning``) Trainer of one process.
        restore_state: optimizers and schedulers go on from round to round where the process does.
        load_state_dict_strict: every key of the received model must fit the module's, and the other way round.
        update_fit_loop: raise ``max_epochs`` and ``max_steps`` after each fit: each trains as long as the first.

    Raises:
        ClientError: no Lightning trainer, one that is patched already, or one with several processes.
    """
    package = type(trainer).__module__.partition(".")[0]
    name = {"lightning": "lightning.pytorch.callbacks", "pytorch_lightning": "pytorch_lightning.callbacks"}.get(package)
    if name is None or not hasattr(trainer, "fit_loop"):
        raise ClientError(f"patch({type(trainer).__name__}): a Trainer of lightning.pytorch belongs here")
    if any(isinstance(callback, _Rounds) for callback in trainer.callbacks):
        raise ClientError("this trainer is patched already: call patch(trainer) once, before the loop")
    if trainer.world_size > 1:
        raise ClientError(
            f"this trainer has {trainer.world_size} processes; patch() is for one. With several, rank 0 receives and"
            " sends as docs/guides/client-api.md shows, and Lightning does the rest"
        )
    current()
    base: type = importlib.import_module(name).Callback
    # the base is known only now; the methods of _Rounds go before its empty ones
    callback: Any = type("FedloomCallback", (_Rounds, base), {})(restore_state, load_state_dict_strict)
    if update_fit_loop:
        callback.grow_by(trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps)
    trainer.callbacks.append(callback)


class _Rounds:
    """The hooks; Lightning calls them."""

    def __init__(self, restore_state: bool, strict: bool) -> None:
        self._restore_state = restore_state
        self._strict = strict
        self._scores: dict[str, float] | None = None
        self._task: object = None  # that the scores belong to
        self._steps = 0
        self._epochs_a_round: int | None = None
        self._steps_a_round = -1
        self._kept: tuple[list[Any], list[Any]] | None = None

    def grow_by(self, epochs: int | None, steps: int) -> None:
        """A trainer counts on from fit to fit, and stops at its limits: they are raised by so much each time."""
        self._epochs_a_round, self._steps_a_round = epochs, steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._load(current(), pl_module)
        self._steps = trainer.global_step
        if self._restore_state and self._kept is not None:
            optimizers, schedulers = self._kept
            for optimizer, state in zip(trainer.optimizers, optimizers, strict=True):
                optimizer.load_state_dict(state)
            for config, state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
                config.scheduler.load_state_dict(state)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        context = current()
        if self._restore_state:
            schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            self._kept = [optimizer.state_dict() for optimizer in trainer.optimizers], schedulers
        steps = trainer.global_step - self._steps
        loop = trainer.fit_loop
        if self._epochs_a_round is not None and self._epochs_a_round >= 0:
            loop.max_epochs = trainer.current_epoch + self._epochs_a_round
        if self._steps_a_round >= 0:
            loop.epoch_loop.max_steps = trainer.global_step + self._steps_a_round
        scores = self._scores if self._task is context.open_task else None
        self._scores = self._task = None
        params = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        meta: dict[str, Any] = {"NUM_STEPS_CURRENT_ROUND": steps, **getattr(pl_module, "__fl_meta__", {})}
        context.send(FLModel(params=params, metrics=scores, meta=meta))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._scores_task(trainer):
            self._load(current(), pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        del pl_module
        context = current()
        if not self._scores_task(trainer) or context.open_task is None:
            return
        scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if context.task_name() in EVALUATE_NAMES:
            context.send(FLModel(metrics=scores))
        else:
            self._scores, self._task = scores, context.open_task

    @staticmethod
    def _scores_task(trainer: Any) -> bool:
        """Whether this is ``trainer.validate`` before the task's answer: within ``fit`` and behind it there is none."""
        context = current()
        doing = getattr(trainer.state.fn, "value", trainer.state.fn)
        return doing == _VALIDATING and (context.open_task is not None or not context.sent)

    def _load(self, context: ClientContext, module: Any) -> None:
        model = context.receive()
        if model is None:
            raise ClientError("the trainer was run when the job was over: call it within `while flare.is_running():`")
        if model.params is None:
            raise ClientError(
                f"task {context.task_name()!r} holds no model to train or score: look at flare.is_submit_model() first"
            )
        torch: Any = importlib.import_module("torch")
        state = {name: torch.as_tensor(value) for name, value in model.params.items()}
        module.load_state_dict(state, strict=self._strict)
