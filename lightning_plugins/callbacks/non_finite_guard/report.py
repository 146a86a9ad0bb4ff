"""What is said of a step that is not finite: where it was, which losses and gradients, and which rows of the batch."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins.core.lightning_internals import logged_so_far
from lightning_plugins.core.vectors import local

_SHOWN = 3  # names or rows of a kind; a sentence is to be read


class Step(NamedTuple):
    """What is remembered of an optimizer step.

    ``batch_idx`` and ``batch`` are those of the micro-batch whose loss is not finite, or of the last; ``params`` those
    that have a gradient on this process, and ``norms`` the gradients'.
    """

    number: int
    epoch: int
    batch_idx: int
    rank: int
    batch: Any
    losses: list[Tensor]
    logged: list[tuple[str, Tensor, Tensor | int]]
    params: list[nn.Parameter]
    norms: list[Tensor]

    @property
    def bad_losses(self) -> bool:
        """Whether a loss of this process is not finite."""
        return any(not loss.isfinite().all() for loss in self.losses)


def logged_losses(trainer: Trainer) -> list[tuple[str, Tensor, Tensor | int]]:
    """Name, value and divisor of what ``training_step`` has logged; of what is only averaged, the mean so far."""
    metrics = [metric for metric in logged_so_far(trainer).values() if metric._update_count]
    return [
        (m.meta.name, m._forward_cache, 1)
        if m.meta.on_step
        else (f"{m.meta.name} (mean)", m.value, getattr(m, "cumulated_batch_size", 1))
        for m in metrics
    ]


def report(trainer: Trainer, module: LightningModule, step: Step, end: str, own: bool = False) -> str:
    """At most five lines, of the first process that saw the fault itself; every process must ask for it.

    Args:
        trainer: the running trainer.
        module: the trained module.
        step: the step that is not finite.
        end: the last line of the text.
        own: whether the module itself has left every sample out.
    """
    rows = list(_bad_rows(step.batch))
    fault = "the loss is not finite" if step.bad_losses else "the loss is finite, but gradients are not"
    if own:
        fault = f"every sample was left out by {type(module).__name__}, as none was finite"
    where = f"step {step.number} (epoch {step.epoch}, batch {step.batch_idx}, rank {step.rank})"
    lines = [
        f"NonFiniteGuard: in {where} {fault}.",
        _losses(step),
        _gradients(module, step) + _weights(module),
        _batch(trainer, step, rows),
    ]
    text = "\n".join(line for line in lines if line)
    return f"{_of_the_culprit(trainer, bool(rows or step.bad_losses), text)}\n{end}"


def _of_the_culprit(trainer: Trainer, at_fault: bool, own: str) -> str:
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return own
    all_reports: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(all_reports, (at_fault, own))
    return next((text for at_fault, text in all_reports if at_fault), own)


def _losses(step: Step) -> str:
    """Those of the loss that the backward pass began with, and what was logged."""
    values = [f"{float(loss.float().mean()):.4g}" for loss in step.losses]
    logged = [f"{name} {float(value.float().mean() / divisor):.4g}" for name, value, divisor in step.logged]
    logged.sort(key=lambda text: text.endswith(("nan", "inf")), reverse=True)
    return (
        f"Loss before the backward pass: {_some(values) or 'none'}."
        + f" Logged: {_some(logged, 2 * _SHOWN)}." * bool(logged)
    )


def _gradients(module: LightningModule, step: Step) -> str:
    if not step.norms:
        return ""
    known = {parameter: name for name, parameter in module.named_parameters()}
    names = [known.get(parameter, "a parameter of no name") for parameter in step.params]
    norms = torch.stack([norm.float() for norm in step.norms]).cpu()
    finite = norms.isfinite()
    text = f"Gradients: {int((~finite).sum())} of {len(norms)} not finite"
    if not finite.all():
        text += f" ({_some([name for name, ok in zip(names, finite.tolist(), strict=True) if not ok])})"
    if finite.any():
        largest = int(norms.where(finite, -1.0).argmax())
        text += f", largest norm of the others {norms[largest]:.3g} ({names[largest]})"
    return text + "."


def _weights(module: LightningModule) -> str:
    bad = [name for name, (p,) in ((n, local([p])) for n, p in module.named_parameters()) if not p.isfinite().all()]
    return f" Weights that are not finite now: {_some(bad)}." if bad else ""


def _batch(trainer: Trainer, step: Step, rows: list[tuple[str, list[int]]]) -> str:
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in _tensors(step.batch)]
    keys = _keys(trainer, step.batch_idx)
    text = f"Batch: {_some(shapes) or type(step.batch).__name__}"
    for name, bad in rows:
        text += f"; {name} is not finite in row {_some(bad)}"
        if bad[-1] < len(keys):
            text += f", key {_some([keys[row] for row in bad])}"
    if keys and not rows:
        text += f"; keys {_some(keys)}"
    return text + "."


def _keys(trainer: Trainer, batch_idx: int) -> list[Any]:
    """The keys of a batch, if the loader names them as those of this package's data do."""
    keys_of = getattr(trainer.train_dataloader, "keys_of", None)
    return [] if keys_of is None else list(keys_of(batch_idx))


def _bad_rows(batch: Any) -> Iterator[tuple[str, list[int]]]:
    for name, tensor in _tensors(batch):
        if tensor.layout != torch.strided:
            continue
        bad = ~tensor.isfinite()
        if bad.any():
            yield name, bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if bad.ndim else [0]


def _tensors(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch of dicts, tuples and lists, by their names or places."""
    if isinstance(batch, Tensor):
        yield name or "tensor", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            yield from _tensors(value, f"{name or 'batch'}[{index}]")


def _some(things: list[Any], shown: int = _SHOWN) -> str:
    more = f" and {len(things) - shown} more" if len(things) > shown else ""
    return ", ".join(map(str, things[:shown])) + more
