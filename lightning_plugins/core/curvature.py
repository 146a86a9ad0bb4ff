"""The loss of an accumulation window as a function of the parameters: its gradient and Hessian-vector products.

Everything is computed by replaying the window's training steps (:mod:`lightning_plugins.core.replay`), so it works for
any module, and leaves no trace.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.graph import operations
from lightning_plugins.core.replay import Call, without_trace
from lightning_plugins.core.vectors import displaced, local, mean_over_ranks_, norm

Difference = Literal["forward", "central"]

# Displacement over the norm of the parameters that was measured best for each precision of the forward pass: about
# the square root (forward) and the cube root (central) of its unit roundoff.
_RELATIVE_STEPS: dict[str, dict[Difference, float]] = {
    "float64": {"forward": 1e-7, "central": 1e-5},
    "float32": {"forward": 1e-4, "central": 1e-3},
    "float16": {"forward": 1e-2, "central": 3e-2},
    "bfloat16": {"forward": 3e-2, "central": 1e-1},
}
# The least for losses with kinks, by the figures of benchmarks/relative_step.py in benchmarks/RESULTS.md.
_KINKED_STEPS: dict[Difference, float] = {"forward": 3e-2, "central": 1e-2}


class WindowLoss:
    r"""The loss that the gradients of one accumulation window belong to, at any parameters.

    .. math:: L(\theta) = \frac{1}{k} \sum_{i=1}^{n} \ell_i(\theta), \quad \text{averaged over ranks}

    with ``k = accumulate_grad_batches`` and ``n`` micro-batches (fewer than ``k`` at the end of an epoch), which is
    what Lightning accumulates. Gradients are unscaled and unclipped. Every rank must call the same methods.

    Args:
        trainer: the running trainer.
        module: the module that is trained.
        calls: those of the window, ``StepRecorder.calls``.
        params: the parameters to differentiate by.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, calls: Sequence[Call], params: Sequence[nn.Parameter]
    ) -> None:
        self.params = list(params)
        self._module, self._calls = module, list(calls)
        self._device = trainer.strategy.root_device
        self._reduces = isinstance(trainer.strategy, DDPStrategy)  # FSDP2 averages within its own backward
        self._watched = self._reduces and _counts_hooks(trainer.strategy)
        self._scale = loss_scale(trainer)
        self._share = 1 / trainer.accumulate_grad_batches

    def gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Mean over this rank of the micro-batches' losses times their signs (float64), and ``dL/dtheta`` over all."""
        with without_trace(self._module, self._device):
            loss = self._accumulate(self._calls)
            return loss, self._collect()

    def product(
        self,
        direction: Sequence[Tensor],
        step: float,
        difference: Difference = "forward",
        gradient: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        r"""Hessian-vector product by finite differences of gradients.

        .. math::
            H v \approx \frac{\nabla L(\theta + h v) - \nabla L(\theta)}{h} \quad\text{or}\quad
            \frac{\nabla L(\theta + h v) - \nabla L(\theta - h v)}{2 h}

        Args:
            direction: ``v``, shaped like the parameters.
            step: ``h > 0``, see :func:`step_along`.
            difference: ``"forward"`` runs the window once, ``"central"`` twice.
            gradient: the gradient here, for ``"forward"``.

        Returns:
            ``H v``, shaped like the parameters.
        """
        with without_trace(self._module, self._device), displaced(self.params, direction) as move:
            move(step)
            self._accumulate(self._calls)
            if difference == "central":
                move(-step)
                self._accumulate(self._calls, -1.0)
            product = self._collect()
        return _quotient(product, step, difference, gradient)

    def exact_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Hessian-vector product by differentiating twice."""
        products = [torch.zeros_like(param) for param in self.params]
        with without_trace(self._module, self._device):
            for call in self._calls:
                loss = call.replay() * self._scale * self._share
                first = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
                for total, part in zip(products, second_derivative(first, self.params, direction), strict=True):
                    if part is not None:
                        total += part / self._scale
        return self._reduced(products)

    def micro_batches(self) -> "list[WindowLoss]":
        """Each micro-batch of this rank alone: ``L = l_i``, not averaged over ranks."""
        parts = []
        for call in self._calls:
            part = object.__new__(WindowLoss)
            part.__dict__ |= self.__dict__ | {"_calls": [call], "_share": 1.0, "_reduces": False}
            parts.append(part)
        return parts

    def _accumulate(self, calls: Sequence[Call], factor: float = 1.0) -> Tensor:
        """Add ``factor`` times the scaled gradient to the parameters' grads; the mean of the signed losses."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for call in calls:
            loss = call.replay()
            self._backward(loss * (factor * self._share) * self._scale)
            total += loss.detach().reshape(()) / len(calls)
        return total

    def _backward(self, loss: Tensor) -> None:
        if not self._watched:
            self._module.backward(loss)
            return
        for param, grad in zip(self.params, torch.autograd.grad(loss, self.params, allow_unused=True), strict=True):
            if grad is not None:  # it may share memory with another
                param.grad = grad.clone() if param.grad is None else param.grad + grad

    def _collect(self) -> list[Tensor]:
        """The accumulated gradients, unscaled and averaged."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.unscale_(grads)
        return self._reduced(grads)

    def unscale_(self, grads: Sequence[Tensor]) -> None:
        """Divide by the GradScaler's present scale, if there is one."""
        if isinstance(self._scale, Tensor):
            for grad in local(grads):
                grad /= self._scale

    def scale_(self, grads: Sequence[Tensor]) -> None:
        """Multiply by the GradScaler's present scale, if there is one."""
        if isinstance(self._scale, Tensor):
            for grad in local(grads):
                grad *= self._scale

    def _reduced(self, grads: list[Tensor]) -> list[Tensor]:
        if self._reduces:
            mean_over_ranks_(grads)
        return grads


def _counts_hooks(strategy: DDPStrategy) -> bool:
    """Whether DDP counts every gradient that arrives: a replay's would be taken for the next step's."""
    return any(strategy._ddp_kwargs.get(name) for name in ("find_unused_parameters", "static_graph"))


def loss_scale(trainer: Trainer) -> Tensor | float:
    """What the GradScaler multiplies losses by now, as a tensor for nobody to wait for; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def second_derivative(
    first: Sequence[Tensor | None],
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """``d/dtheta <first, direction>``; ``None`` where there is no dependence.

    Args:
        first: the loss's derivatives, with a graph.
        params: the parameters.
        direction: held constant.
        retain_graph: keep the graph for another backward pass.

    Raises:
        RuntimeError: there is none.
    """
    if "torch::autograd::Error" in operations(first):  # autograd.grad would pass it by, as if it were constant
        raise RuntimeError("a torch.autograd.Function of the module is marked once_differentiable")
    pairs = [(g, v) for g, v in zip(first, direction, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(params)
    grads, vectors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(grads, params, vectors, retain_graph=retain_graph, allow_unused=True))


def _quotient(
    change: list[Tensor], step: float, difference: Difference, gradient: Sequence[Tensor] | None
) -> list[Tensor]:
    with torch.no_grad():
        for index, tensor in enumerate(change):
            if difference == "forward":
                tensor -= gradient[index]
                tensor /= step
            else:
                tensor /= 2 * step
    return change


def step_along(params: Sequence[Tensor], direction: Sequence[Tensor], relative_step: float) -> float | None:
    """The step ``h`` with ``|h v| = relative_step * |theta|`` (parameters that are all zero count as of norm one).

    Returns:
        ``None`` if there is no direction: its norm is zero or not finite.
    """
    length = norm(direction).item()
    if length == 0 or not torch.isfinite(torch.tensor(length)):
        return None
    return relative_step * (norm(params).item() or 1.0) / length


def relative_step(
    trainer: Trainer,
    module: nn.Module,
    difference: Difference,
    kinked: bool | None = False,
    half: torch.dtype | None = None,
) -> float:
    """The best relative displacement for finite differences at the precision of the forward pass.

    With kinks (:func:`~lightning_plugins.core.kinks.has_kinks`) larger ones, over which their jumps are averaged.

    TF32, which is what GPUs use for convolutions in fp32 unless told otherwise, counts as fp16: its mantissa is as
    short. Every rank must call it, and gets the largest step that one of them needs.

    Args:
        trainer: its precision counts.
        module: its parameters' precision counts.
        difference: ``"forward"`` or ``"central"``.
        kinked: of the loss.
        half: precision found in the loss's graph, :func:`~lightning_plugins.core.graph.half_precision`.
    """
    precision, device = str(trainer.precision), trainer.strategy.root_device
    kinds = list(_RELATIVE_STEPS)  # from fine to coarse
    if precision.startswith("bf16") or half == torch.bfloat16:
        kind = "bfloat16"
    elif precision.startswith("16") or half == torch.float16 or _uses_tf32(module, device):
        kind = "float16"
    else:
        dtypes = {param.dtype for param in module.parameters() if param.requires_grad}
        kind = "float64" if dtypes == {torch.float64} else "float32"
    kind = kinds[largest_over_ranks(kinds.index(kind), device)]
    kinked = largest_over_ranks(int(bool(kinked)), device)
    return max(_RELATIVE_STEPS[kind][difference], _KINKED_STEPS[difference] if kinked else 0.0)


def _uses_tf32(module: nn.Module, device: torch.device) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return torch.get_float32_matmul_precision() != "highest" or (convolves and torch.backends.cudnn.allow_tf32)
