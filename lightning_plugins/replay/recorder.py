"""Run a training_step again on the same batch without a trace.

:class:`StepRecorder` remembers how ``training_step`` was called since the last optimizer step: arguments, random
states and the module's own state at its entry. A replay starts from these, and leaves random states, buffers
(batch-norm statistics), attributes, torchmetrics states, gradients and logs as it found them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins.core.random_state import get_random_state, set_random_state
from lightning_plugins.replay.graph import half_precision, has_kinks
from lightning_plugins.replay.module_state import ModuleState

_depth = 0


def is_replaying() -> bool:
    """Whether a training step is being run again by a callback.

    What such a run logs, counts, collects or draws is undone, also in attributes of the module: numbers, and lists,
    dicts and sets of anything. What it prints, sends, writes to files or to objects of your own is not: leave that out
    with ``if not is_replaying():``.

    Example:
        >>> is_replaying()
        False
    """
    return _depth > 0


@dataclass
class Call:
    """One evaluation of a loss that can be repeated.

    Attributes:
        run: the function that evaluates it; returns what ``training_step`` may return.
        device: the process's device.
        random_state: the process's random state at entry.
        module_state: the module's state at entry.
        sign: factor of this loss in the objective that is trained, +1 or -1 (Flooding).
    """

    run: Callable[[], Any]
    device: torch.device
    random_state: dict[str, Any]
    module_state: ModuleState
    sign: Tensor | float = 1.0

    def replay(self) -> Tensor:
        """Evaluate it again at the present parameters; use it inside :func:`without_trace`.

        Returns:
            The loss with its graph, times the sign.
        """
        set_random_state(self.random_state, self.device)
        self.module_state.restore()
        loss = loss_of(self.run())
        if loss is None:
            raise RuntimeError(
                "training_step returned a loss at first, but None when it was run again on the same batch: it depends "
                "on something that a replay does not restore."
            )
        return loss * self.sign


class StepRecorder:
    """The calls of ``training_step`` since the last optimizer step; one for a module, shared by its callbacks.

    It stands in the place of the module's ``training_step``, from which it is also found again.

    Attributes:
        calls: those kept for a replay, oldest first.
        losses: the loss that each call returned, as it was, detached; also of calls that are not kept.
        kinked: whether the first call that was kept has a loss with kinks; ``None`` before.
        half: half precision in that loss's graph; ``None`` without, and before.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls: list[Call] = []
        self.losses: list[Tensor] = []
        self.kinked: bool | None = None
        self.half: torch.dtype | None = None
        self._trainer, self._module = trainer, pl_module
        self._owners: dict[Any, bool] = {}
        self._window: int | None = None
        self._overridden = pl_module.__dict__.get("training_step")  # torch.compile's, for one
        self._step: Callable[..., Any] = pl_module.training_step
        functools.update_wrapper(self, self._step)  # Lightning looks at the signature
        pl_module.training_step = self

    @classmethod
    def attach(cls, trainer: Trainer, pl_module: LightningModule, owner: Any) -> "StepRecorder":
        """The module's recorder, which stays until every owner has detached; call it in ``on_train_start``."""
        recorder = pl_module.__dict__.get("training_step")
        if not isinstance(recorder, cls):
            recorder = cls(trainer, pl_module)
        recorder._owners[owner] = False
        return recorder

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, pickled or not, has its own ``training_step`` again."""
        return getattr, (self._module, "training_step")

    def detach(self, owner: Any) -> None:
        """``owner`` is done; after the last one ``training_step`` is the module's own again."""
        if self._owners.pop(owner, None) is None or self._owners:
            return
        del self._module.training_step
        if self._overridden is not None:
            self._module.training_step = self._overridden
        self.calls, self.losses = [], []

    def keep(self, owner: Any, wanted: bool) -> None:
        """Whether ``owner`` wants the next calls kept for replay: batches and buffers stay in memory until then."""
        self._owners[owner] = wanted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` and remember it."""
        trainer = self._trainer
        # a validation_step, or a callback that only looks, may call it too
        if is_replaying() or not trainer.training or not torch.is_grad_enabled():
            return self._step(*args, **kwargs)
        begins = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches == 0  # also if the last was broken off
        if begins or trainer.global_step != self._window:
            self.calls, self.losses = [], []
            self._window = self._trainer.global_step
        call = None
        if any(self._owners.values()):
            device = self._trainer.strategy.root_device
            run = functools.partial(self._run_again, args, kwargs)
            call = Call(run, device, get_random_state(device), ModuleState(self._module))
        output = self._step(*args, **kwargs)
        loss = loss_of(output)
        if loss is not None:  # else Lightning leaves this batch out
            self.losses.append(loss.detach().clone())
            if call is not None:
                self.calls.append(call)
                if self.kinked is None:
                    self.kinked, self.half = has_kinks(loss, self._module), half_precision(loss)
        return output

    def _run_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._trainer.precision_plugin.train_step_context():
            return self._step(*args, **kwargs)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned."""
    return output.get("loss") if isinstance(output, Mapping) else output


@contextmanager
def without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo, on leaving, what running the module leaves behind.

    Args:
        module: the module that will run: its buffers, attributes, gradients, torchmetrics states and ``self.log`` are
            protected.
        device: the process's device; the random state of a GPU is restored with that of Python, NumPy and torch.
    """
    global _depth
    random_state = get_random_state(device)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(set_random_state, random_state, device)
        stack.enter_context(ModuleState(module).restored())
        stack.enter_context(_grads_aside(module))
        for part in module.modules():
            if isinstance(part, Metric):
                stack.enter_context(_metric_aside(part))
            if isinstance(part, LightningModule):
                stack.enter_context(_mute(part))
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


@contextmanager
def _grads_aside(module: nn.Module) -> Iterator[None]:
    params = [param for param in module.parameters() if param.requires_grad]
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


@contextmanager
def _metric_aside(metric: Metric) -> Iterator[None]:
    """Let a metric work on copies of its states: others may hold references to the states themselves."""
    attributes = vars(metric)
    before = dict(attributes)
    for name in metric._defaults:
        state = getattr(metric, name)
        setattr(metric, name, state.clone() if isinstance(state, Tensor) else list(state))
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)


@contextmanager
def _mute(module: LightningModule) -> Iterator[None]:
    names = ("log", "log_dict")
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    for name in names:
        module.__dict__[name] = _no_log
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]
        module.__dict__.update(before)


def _no_log(*args: Any, **kwargs: Any) -> None:
    """In the place of ``self.log`` during a replay."""
