"""The loss of one optimizer step as a function of the parameters: its gradient and Hessian-vector products.

Everything is computed by running the step's micro-batches again (``recorder.py``), so it works for any module, and
leaves no trace. How far to move the parameters is told by ``differences.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from lightning_plugins.core.distributed import all_or_none
from lightning_plugins.core.lightning_internals import ddp_option, loss_scale
from lightning_plugins.core.vectors import foreach_add_, foreach_copy_, local, mean_over_ranks_
from lightning_plugins.replay.differences import Difference
from lightning_plugins.replay.graph import operations
from lightning_plugins.replay.recorder import Call, grads_aside, without_trace
from lightning_plugins.replay.twice import first_derivative, look_into, require_same, second_derivative


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
        alone: whether the calls' mean on this rank is meant, neither divided by ``k`` nor averaged over ranks.

    Attributes:
        params: the parameters.
        alone: as given.
        functions: custom functions that the first exact product has met in the graph.
        precision: the coarsest in that graph.
        selects: whether ``torch.where`` stands in it, which may be a kink or a mask.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        calls: Sequence[Call],
        params: Sequence[Tensor],
        alone: bool = False,
    ) -> None:
        self.params = list(params)
        self.functions: set[str] = set()
        self.precision = torch.float64
        self.selects = False
        self._compared = False
        self._trainer, self._module, self._calls = trainer, module, list(calls)
        self._device = trainer.strategy.root_device
        strategy = trainer.strategy
        self.alone = alone
        self._reduces = isinstance(strategy, DDPStrategy) and not alone  # FSDP2 averages within its own backward
        # DDP may count every gradient that arrives, and would take a replay's for the next step's
        self._watched = isinstance(strategy, DDPStrategy) and any(
            ddp_option(strategy, name) for name in ("find_unused_parameters", "static_graph")
        )
        self._scale = loss_scale(trainer)
        self._share = 1 / (len(self._calls) if alone else trainer.accumulate_grad_batches)

    def micro_batches(self) -> "list[WindowLoss]":
        """Each micro-batch of this rank alone: ``L = l_i``, not averaged over ranks."""
        parts = [WindowLoss(self._trainer, self._module, [call], self.params, alone=True) for call in self._calls]
        for part in parts:
            part.functions = self.functions
        return parts

    @property
    def weight(self) -> float:
        """Of the calls' mean loss in ``L``: ``n / k``."""
        return len(self._calls) * self._share

    def gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Mean over this rank of the micro-batches' losses times their signs (float64), and ``dL/dtheta`` over all."""
        with without_trace(self._module, self._device, self.params), kept(self.params):
            loss = self._accumulate()
            return loss, self._collect()

    def product(
        self,
        direction: Sequence[Tensor],
        step: float,
        difference: Difference = "forward",
        gradient: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        r"""Hessian-vector product by finite differences of gradients.

        .. math::
            H v \approx \frac{\nabla L(\theta + h v) - \nabla L(\theta)}{h} \quad\text{or}\quad
            \frac{\nabla L(\theta + h v) - \nabla L(\theta - h v)}{2 h}

        Args:
            direction: ``v``, shaped like the parameters.
            step: ``h > 0``, such as :func:`~lightning_plugins.replay.differences.step_along` gives.
            difference: ``"forward"`` runs the window once, ``"central"`` twice.
            gradient: the gradient at the present parameters, which ``"forward"`` needs.

        Returns:
            ``H v``, shaped like the parameters.
        """
        with without_trace(self._module, self._device, self.params), displaced(self.params, direction) as move:
            move(step)
            self._accumulate()
            if difference == "central":
                move(-step)
                self._accumulate(-1.0)
            change = self._collect()
        distance = step if difference == "forward" else 2 * step
        with torch.no_grad():
            for index, tensor in enumerate(change):
                if difference == "forward":
                    tensor -= gradient[index]
                tensor /= distance
        return change

    def product_change(
        self,
        direction: Sequence[Tensor],
        step: float,
        difference: Difference = "forward",
        gradient: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """:meth:`product` by a step minus that by half of it, in the memory of one."""
        with without_trace(self._module, self._device, self.params), displaced(self.params, direction) as move:
            sides = (1.0,) if difference == "forward" else (1.0, -1.0)
            for side in sides:
                move(side * step)
                self._accumulate(side)
                move(side * step / 2)
                self._accumulate(-2 * side)
            change = self._collect()
        with torch.no_grad():
            for index, tensor in enumerate(change):
                if difference == "forward":
                    tensor += gradient[index]
                tensor /= len(sides) * step
        return change

    def exact_product(
        self, direction: Sequence[Tensor], gradient: Sequence[Tensor] | None = None, trusted: bool = False
    ) -> list[Tensor]:
        """Hessian-vector product by differentiating twice.

        Args:
            direction: ``v``, shaped like the parameters.
            gradient: that of a backward pass at the present parameters, with which the first derivative is compared. By
                default the first product runs a pass of its own.
            trusted: whether to compare nothing but whether there is a gradient.

        Raises:
            MissedTermError: the graph does not show a part of the loss.
            RuntimeError: there is no second derivative.
        """
        products = [torch.zeros_like(param) for param in self.params]
        compares = gradient is not None or not self._compared
        firsts = [torch.zeros_like(param) for param in self.params] if compares else []
        with without_trace(self._module, self._device, self.params), self._all_or_none():
            for call in self._calls:
                loss = call.replay() * self._scale * self._share
                if compares:
                    functions, self.precision = look_into(loss)
                    self.functions |= functions
                    self.selects |= "WhereBackward0" in operations([loss])
                first = first_derivative(loss, self.params)
                for total, part in zip(products, second_derivative(first, self.params, direction), strict=True):
                    if part is not None:
                        total += part / self._scale
                for total, part in zip(firsts, first, strict=False):
                    if part is not None:
                        total += part.detach() / self._scale
        if self._reduces:
            mean_over_ranks_(products)
        if compares:
            self._compare(firsts, gradient, trusted)
        return products

    def _compare(self, firsts: list[Tensor], gradient: Sequence[Tensor] | None, trusted: bool) -> None:
        """The first derivatives with a real gradient; every rank sees the same."""
        if self._reduces:
            mean_over_ranks_(firsts)
        if gradient is None:
            gradient = self.gradient()[1]
        if trusted:
            gradient = [g if not f.any() else f for f, g in zip(firsts, gradient, strict=True)]
        require_same(firsts, gradient, self.params, self._module, self.precision)
        self._compared = True

    def _accumulate(self, factor: float = 1.0) -> Tensor:
        """Run the calls: ``factor`` times the scaled gradient is added to the parameters' grads.

        Returns:
            The mean of the losses times their signs.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        with self._all_or_none():
            for call in self._calls:
                with grads_aside(self.params):  # Lightning clears what training_step leaves before the backward pass
                    loss = call.replay()
                with self._weighted(factor * call.sign):
                    self._backward(loss * call.sign * self._share * self._scale)
                total += loss.detach().reshape(()) / len(self._calls)
        return total

    @contextmanager
    def _weighted(self, weight: Tensor | float) -> Iterator[None]:
        """Add gradients times plus or minus a power of two: a ``backward`` of the module's own may not be linear."""
        if not isinstance(weight, Tensor) and weight == 1:
            yield
            return
        self._multiply_grads(1 / weight)
        yield
        self._multiply_grads(weight)

    @torch.no_grad()
    def _multiply_grads(self, factor: Tensor | float) -> None:
        for grad in local([param.grad for param in self.params if param.grad is not None]):
            grad *= factor

    def _all_or_none(self) -> AbstractContextManager[None]:
        """Around what may fail on one rank, where the others would wait for it in vain."""
        return all_or_none(self._device) if self._reduces else nullcontext()

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
        if self._reduces:
            mean_over_ranks_(grads)
        return grads

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


@contextmanager
def displaced(params: Sequence[Tensor], direction: Sequence[Tensor]) -> Iterator[Callable[[float], None]]:
    """Move parameters along ``direction``; on leaving they have their old values again, bit for bit.

    Costs one copy of the parameters.

    Yields:
        A function of ``step`` that sets the parameters to ``theta + step * direction``.

    Example:
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> with displaced([theta], [torch.tensor([1.0, 2.0])]) as move:
        ...     move(0.5)
        ...     theta.tolist()
        [1.5, 2.0]
        >>> theta.tolist()
        [1.0, 1.0]
    """
    params, direction = local(params), local(direction)
    with kept(params) as saved:

        def move(step: float) -> None:
            with torch.no_grad():
                foreach_copy_(params, saved)
                foreach_add_(params, direction, alpha=step)
            torch.clear_autocast_cache()  # else half-precision copies of the old values would be used

        yield move


@contextmanager
def kept(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever writes to parameters, on leaving they have their old values again, bit for bit.

    Yields:
        The old values, a copy.
    """
    params = local(params)
    with torch.no_grad():
        saved = [param.clone() for param in params]
    with _unsafe_preserve_version_counter(tuple(params)):  # a graph that is yet to be differentiated may hold them
        try:
            yield saved
        finally:
            with torch.no_grad():
                foreach_copy_(params, saved)
            torch.clear_autocast_cache()
