"""A Hugging Face trainer that trains what the task holds and answers it: `patch(trainer)`.

transformers is an extra and never imported here: a trainer that is given has it loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..serialization.model import FLModel
from .client_api import current
from .client_context import EVALUATE_NAMES, ClientError

SCOPES = ("auto", "full", "trainable")
#: Of what a trainer reports: how fast it was is no score of the model, and differs from run to run.
_TIMES = ("_runtime", "_per_second", "_time")


def patch(
    trainer: Any,
    restore_state: bool = True,
    load_state_dict_strict: bool = True,
    params_scope: str = "auto",
    server_key_prefix: str | None = None,
    local_epochs: float | None = None,
    local_steps: int | None = None,
    stream_metrics: bool = False,
) -> None:
    """Let ``trainer.train`` train the received model and send it, and ``trainer.evaluate`` score it.

    Call it once, after `fedloom.client.init()`, and then evaluate and train within ``while flare.is_running():``.

    Args:
        trainer: a ``transformers.Trainer`` (or one made from it) of one process.
        restore_state: the optimizer goes on from round to round where the process does; its schedule starts anew.
        load_state_dict_strict: the received model must have every tensor of the scope, and no other.
        params_scope: ``full``: the model's whole state; ``trainable``: parameters that are trained; ``auto``: the
            latter for a PEFT model, the former for others.
        server_key_prefix: what stands before the names of tensors at the server.
        local_epochs, local_steps: how long a round trains; None: as the trainer's arguments say.
        stream_metrics: log what the trainer logs, see `fedloom.client.log`.

    Raises:
        ClientError: no such trainer, an option that is not allowed, patched already, or several processes.
    """
    package: Any = importlib.import_module("transformers") if hasattr(trainer, "callback_handler") else None
    if package is None or not isinstance(trainer, package.Trainer):
        raise ClientError(f"patch({type(trainer).__name__}): a transformers.Trainer belongs here")
    if params_scope not in SCOPES:
        raise ClientError(f"params_scope={params_scope!r}; one of {SCOPES} belongs here")
    if any(isinstance(callback, _Rounds) for callback in trainer.callback_handler.callbacks):
        raise ClientError("this trainer is patched already: call patch(trainer) once, before the loop")
    if trainer.args.world_size > 1:
        raise ClientError(
            f"this trainer has {trainer.args.world_size} processes; patch() is for one. With several, rank 0 receives"
            " and sends as docs/guides/client-api.md shows"
        )
    for name, value in (("local_epochs", local_epochs), ("local_steps", local_steps)):
        if value is not None and (isinstance(value, bool) or value <= 0):
            raise ClientError(f"{name}={value!r}; a number above 0 belongs here")
    current()
    if local_epochs is not None:
        trainer.args.num_train_epochs, trainer.args.max_steps = local_epochs, -1
    if local_steps is not None:
        trainer.args.max_steps = local_steps
    tensors = _Tensors(trainer, load_state_dict_strict, params_scope, server_key_prefix or "")
    base: type = package.TrainerCallback
    # the base is known only now; the methods of _Rounds go before its empty ones
    callback: Any = type("FedloomCallback", (_Rounds, base), {})(trainer, tensors, restore_state, stream_metrics)
    trainer.add_callback(callback)
    trainer.evaluate = callback.scored(trainer.evaluate)


class _Tensors:
    """What of a trainer's model travels, and under which names."""

    def __init__(self, trainer: Any, strict: bool, scope: str, prefix: str) -> None:
        self._trainer = trainer
        self._strict = strict
        self._scope = scope
        self._prefix = prefix

    def _own(self) -> dict[str, Any]:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        state: dict[str, Any] = model.state_dict()
        if self._scope == "full" or (self._scope == "auto" and not hasattr(model, "peft_config")):
            return state
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load(self, params: dict[str, Any]) -> None:
        """Copy the received tensors into the model's."""
        torch: Any = importlib.import_module("torch")
        own = self._own()
        given = {name.removeprefix(self._prefix): value for name, value in params.items()}
        odd = sorted(own.keys() ^ given.keys())
        if odd and (self._strict or not own.keys() & given.keys()):
            where = "only received" if odd[0] in given else "not received"
            raise ClientError(
                f"{len(odd)} tensors of the received model and of the trainer's ({self._scope}) do not go together,"
                f" such as {odd[0]!r}, which is {where}: look at params_scope and server_key_prefix"
            )
        with torch.no_grad():
            for name in own.keys() & given.keys():
                own[name].copy_(torch.as_tensor(given[name]))

    def state(self) -> dict[str, Any]:
        """The tensors to send, on the CPU; of those that share memory each has its own."""
        return {self._prefix + name: value.detach().cpu().clone() for name, value in self._own().items()}


class _Rounds:
    """The hooks; the trainer calls them."""

    def __init__(self, trainer: Any, tensors: _Tensors, restore_state: bool, stream_metrics: bool) -> None:
        self._trainer = trainer
        self._tensors = tensors
        self._restore_state = restore_state
        self._stream = stream_metrics
        self._training = False
        self._scores: dict[str, float] | None = None
        self._task: object = None  # that the scores belong to

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._load()
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        context = current()
        self._training = False
        scores = self._scores if self._task is context.open_task else None
        self._scores = self._task = None
        context.send(
            FLModel(
                params=self._tensors.state(),
                metrics=scores,
                meta={"NUM_STEPS_CURRENT_ROUND": state.global_step},  # which starts at 0 with each call of train
            )
        )
        if not self._restore_state:
            self._trainer.optimizer = self._trainer.lr_scheduler = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        for name, value in (logs or {}).items() if self._stream else ():
            if isinstance(value, int | float):
                current().log(name, value, "SCALAR", {})

    def scored(self, evaluate: Any) -> Any:
        """``trainer.evaluate``, which scores the received model where it is called before the training."""

        def scoring(*args: Any, **kwargs: Any) -> dict[str, Any]:
            context = current()
            mine = not self._training and (context.open_task is not None or not context.sent)
            if mine:
                self._load()
            found: dict[str, Any] = evaluate(*args, **kwargs)
            if mine:
                scores = {name: float(value) for name, value in found.items() if _is_score(name, value)}
                if context.task_name() in EVALUATE_NAMES:
                    context.send(FLModel(metrics=scores))
                else:
                    self._scores, self._task = scores, context.open_task
            return found

        return scoring

    def _load(self) -> None:
        context = current()
        model = context.receive()
        if model is None:
            raise ClientError("the trainer was run when the job was over: call it within `while flare.is_running():`")
        if model.params is None:
            raise ClientError(
                f"task {context.task_name()!r} holds no model to train or score: look at flare.is_submit_model() first"
            )
        self._tensors.load(model.params)


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and name != "epoch" and not name.endswith(_TIMES)
