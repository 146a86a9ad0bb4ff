"""Run a training_step again on the same batch without a trace.

:class:`StepRecorder` remembers how ``training_step`` was called since the last optimizer step: a copy of its
arguments (``batches.py``), random states and the module's own state (``module_state.py``) at its entry. A replay starts
from these, and leaves random states, the module's state, torchmetrics, gradients and logs as it found them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_plugins.core.lightning_internals import trainer_of
from lightning_plugins.core.random_state import get_random_state, set_random_state
from lightning_plugins.replay.batches import copied
from lightning_plugins.replay.graph import half_precision, has_kinks
from lightning_plugins.replay.module_state import MOVE_THEM, WRITES_FIXED, ModuleState
from lightning_plugins.replay.writes import Marks

_depth = 0


def is_replaying() -> bool:
    """Whether a training step is being run again by a callback.

    What such a run logs, counts, collects, draws or changes is undone wherever it hangs on the module: buffers,
    networks that are not trained, attributes, lists, dicts and objects of your own, random generators, torchmetrics;
    the batch is a copy. What it prints, sends, writes to files, takes from iterators or keeps outside of the module (in
    variables of functions or classes, in data sets) is not: leave that out with ``if not is_replaying():``.

    Example:
        >>> is_replaying()
        False
    """
    return _depth > 0


_REFUSALS = {
    "fixed": f"{WRITES_FIXED}, so that it cannot be run again: {MOVE_THEM}.",
    "trained": "training_step writes to parameters that are trained, which running it again would do at other places: "
    "do so in on_train_batch_start or on_train_batch_end.",
}
_DRAWS = (
    "training_step takes batches from dataloader_iter, so that running it again would take others: let it take "
    "(batch, batch_idx)."
)


@dataclass
class Call:
    """One evaluation of a loss that can be repeated.

    Attributes:
        run: the function that evaluates it; returns what ``training_step`` may return.
        device: the process's device.
        random_state: the process's random state at entry.
        module_state: the module's state at entry.
        sign: factor of this loss in the objective that is trained, +1 or -1 (Flooding).
        refusal: why it cannot be repeated after all; ``None`` if it can, as far as was seen.
    """

    run: Callable[[], Any]
    device: torch.device
    random_state: dict[str, Any]
    module_state: ModuleState
    sign: Tensor | float = 1.0
    refusal: str | None = None

    @contextmanager
    def watched(self, module: nn.Module) -> Iterator[None]:
        """Notice whether the first evaluation, within this context, writes to what a replay does not put back."""
        state = self.module_state
        marks = Marks(module, state.unsaved, state.trained)
        yield
        if written := marks.written():
            self.refusal = self.refusal or _REFUSALS[written]

    def replay(self) -> Tensor:
        """Evaluate it again at the present parameters; use it inside :func:`without_trace`.

        Returns:
            The loss with its graph, times the sign.

        Raises:
            RuntimeError: it cannot be repeated.
        """
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        set_random_state(self.random_state, self.device)
        self.module_state.restore()
        self.module_state.restore_metrics()
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
        self._draws = is_param_in_hook_signature(self._step, "dataloader_iter", explicit=True)
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
            run = functools.partial(self._run_again, *copied((args, kwargs)))
            state = ModuleState(self._module, earlier=self.calls[-1].module_state if self.calls else None)
            call = Call(run, device, get_random_state(device), state, refusal=_DRAWS if self._draws else None)
        with nullcontext() if call is None else call.watched(self._module):
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
        args, kwargs = copied((args, kwargs))
        with self._trainer.precision_plugin.train_step_context():
            return self._step(*args, **kwargs)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what ``training_step`` returned."""
    return output.get("loss") if isinstance(output, Mapping) else output


@contextmanager
def without_trace(module: nn.Module, device: torch.device, trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """Undo, on leaving, what running the module leaves behind, also if it ends in an error.

    Args:
        module: the module that will run: its state, gradients, torchmetrics and ``self.log`` are protected.
        device: the process's device; the random state of a GPU is restored with that of Python, NumPy and torch.
        trained: parameters that training moves besides those of optimizers.
    """
    global _depth
    random_state, state = get_random_state(device), ModuleState(module, trained)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.callback(set_random_state, random_state, device)
        stack.enter_context(state.restored())
        stack.enter_context(grads_aside(state.leaves))
        for part in state.modules:
            if isinstance(part, LightningModule):
                stack.enter_context(_mute(part))
        if isinstance(module, LightningModule) and (trainer := trainer_of(module)) is not None:
            stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


@contextmanager
def grads_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Let leaves have no gradients for a while; then they have their former ones, whatever came or went."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad


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
