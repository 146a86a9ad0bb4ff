"""Differentiating a loss twice: the second derivative, and why it would fail or be wrong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_plugins.core.lightning_internals import ddp_option, is_compiled
from lightning_plugins.replay.graph import coarsest_precision, custom_functions, operations
from lightning_plugins.replay.recorder import grads_aside

_CURE = "use engine='finite_difference'"
# Relative difference that rounding may make between two gradients of one loss: the kernels of a backward pass that
# builds a graph may be others, and round as TF32 does in fp32.
_SAME = {torch.float64: 1e-8, torch.float32: 2.0**-10, torch.float16: 2.0**-6, torch.bfloat16: 2.0**-5}


class MissedTermError(RuntimeError):
    """Differentiating twice misses a part of the loss; the message is a clause that ends with a cure."""


def look_into(loss: Tensor) -> tuple[set[str], torch.dtype]:
    """The custom functions in a loss's graph, and the coarsest precision there.

    Raises:
        RuntimeError: torch computes the second derivative of a part wrongly.
    """
    if any(name.startswith("WeightNormInterfaceBackward") for name in operations([loss])):
        # its second derivative leaves out that the norms depend on the weights; gradgradcheck fails on every device
        raise RuntimeError("torch's kernel of weight_norm has a wrong second derivative")
    return custom_functions(loss), coarsest_precision([loss])


def first_derivative(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """``dL/dtheta`` with its graph; ``None`` where the graph shows no dependence.

    Raises:
        MissedTermError: a node of the graph ran a backward pass of its own, whose gradients went to parameters.
    """
    with _no_arrivals(params):
        return list(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True))


def second_derivative(
    first: Sequence[Tensor | None],
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """``d/dtheta <first, direction>``; ``None`` where there is no dependence.

    Args:
        first: the loss's first derivatives, with their graph; ``None`` where there is no dependence.
        params: the parameters ``theta``.
        direction: tensors shaped like the parameters, held constant.
        retain_graph: whether to keep the graph for another backward pass.

    Raises:
        RuntimeError: there is no second derivative.
    """
    if "torch::autograd::Error" in operations(first):  # autograd.grad would pass it by, as if it were constant
        raise RuntimeError("a torch.autograd.Function of the module is marked once_differentiable")
    pairs = [(g, v) for g, v in zip(first, direction, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [None] * len(params)
    grads, vectors = zip(*pairs, strict=True)
    with _no_arrivals(params):
        return list(torch.autograd.grad(grads, params, vectors, retain_graph=retain_graph, allow_unused=True))


@contextmanager
def _no_arrivals(params: Sequence[Tensor]) -> Iterator[None]:
    """Raise if gradients arrive at parameters meanwhile; those that were there stay as they are."""
    with grads_aside(params):
        yield
        arrived = sum(param.grad is not None for param in params)
    if arrived:
        raise MissedTermError(f"{_of_parameters(arrived)} inside a node of the loss's graph {_INSIDE}; {_CURE}")


_INSIDE = "(as reversible layers and reentrant checkpoints do), where no second derivative is seen"


def _of_parameters(n: int) -> str:
    return f"the gradient of {n} parameter{'s' if n > 1 else ''} is computed"


class Arrivals:
    """Listens to what a backward pass brings to the parameters, and compares it with the graph's first derivative.

    Args:
        first: the first derivatives that the graph shows, ``None`` where it shows none; each is held until its gradient
            has come.
        params: the parameters.
        module: their module, for the sentence.
        precision: the coarsest in which a part of the loss was computed.
        all_of_them: whether to compare each parameter's gradient; else only those without a first derivative are
            listened to, which costs nothing.
    """

    def __init__(
        self,
        first: Sequence[Tensor | None],
        params: Sequence[Tensor],
        module: LightningModule,
        precision: torch.dtype = torch.float64,
        all_of_them: bool = True,
    ) -> None:
        self._params, self._module, self._precision = list(params), module, precision
        self._same = rounding_of(self._params, precision)
        self._heard = [index for index, g in enumerate(first) if all_of_them or g is None]
        self._lengths = _lengths(first, self._params)
        self._missing = {index: g.detach() for index, g in enumerate(first) if g is not None and all_of_them}
        self._handles = [
            params[i].register_hook(partial(self._take, i)) for i in self._heard if params[i].requires_grad
        ]

    def _take(self, index: int, grad: Tensor) -> None:
        """An inner backward pass brings a share of its own; what has come in full is let go."""
        missing, grad = self._missing.pop(index, None), grad.detach()
        missing = -grad if missing is None else missing - grad
        if torch.linalg.vector_norm(missing) > self._same * self._lengths[index]:
            self._missing[index] = missing

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> None:
        """Call it when the backward pass is over.

        Raises:
            MissedTermError: another gradient came than the graph shows.
        """
        self.close()
        missing, self._missing = self._missing, {}
        if missing:
            errors = _lengths([missing.get(index) for index in range(len(self._params))], self._params)
            _refuse(self._lengths, errors, self._params, self._module, self._precision)


def require_same(
    first: Sequence[Tensor],
    real: Sequence[Tensor],
    params: Sequence[Tensor],
    module: LightningModule,
    precision: torch.dtype = torch.float64,
) -> None:
    """Compare the first derivative that a graph shows with the gradient of the real backward pass, each parameter's.

    Where one of them is not finite nothing can be said.

    Args:
        first: what the graph shows.
        real: what the backward pass brought.
        params: the parameters.
        module: their module, for the sentence.
        precision: the coarsest in which a part of the loss was computed.

    Raises:
        MissedTermError: they differ by more than rounding.
    """
    errors = torch.stack([torch.linalg.vector_norm(f - g).double() for f, g in zip(first, real, strict=True)])
    _refuse(_lengths(first, params), errors, params, module, precision)


def _refuse(
    lengths: Tensor, errors: Tensor, params: Sequence[Tensor], module: LightningModule, precision: torch.dtype
) -> None:
    same = rounding_of(params, precision)
    # a gradient may be made of rounding alone; where the graph shows none, little is needed to see that one came
    least = torch.where(lengths > 0, same / 10, same / 100) * lengths.norm()
    wrong = (errors > same * lengths + least).nonzero().flatten().tolist()
    if wrong and errors.isfinite().all() and lengths.isfinite().all():
        share = (errors[wrong].norm() / torch.hypot(lengths, errors).norm()).item()
        raise MissedTermError(_other_gradient(module, [params[index] for index in wrong], share))


def rounding_of(params: Sequence[Tensor], precision: torch.dtype = torch.float64) -> float:
    """Relative difference that rounding may make between two gradients of one loss.

    Args:
        params: the parameters.
        precision: the coarsest in which a part of the loss was computed.
    """
    dtypes = {precision, *(param.dtype.to_real() for param in params)}
    return max(_SAME.get(dtype, torch.finfo(dtype).eps) for dtype in dtypes)  # of those with eight bits a unit


def _lengths(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Each tensor's length, in float64."""
    device = params[0].device
    lengths = [torch.zeros((), device=device) if t is None else torch.linalg.vector_norm(t.detach()) for t in tensors]
    return torch.stack([length.to(device, torch.float64) for length in lengths])


def _other_gradient(module: LightningModule, wrong: Sequence[Tensor], share: float) -> str:
    names = [name for name, param in module.named_parameters() if any(param is p for p in wrong)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    found = f"{''.join(names[:1])}{more} (relative difference {share:.1e})"
    if type(module).backward is not LightningModule.backward:
        return (
            f"backward of {type(module).__name__} brings another gradient than the loss it is given, in {found}; "
            f"{_CURE} or leave backward as it is"
        )
    return (
        f"the backward pass brings another gradient than the loss's graph shows, in {found}: a part is differentiated "
        f"inside a node {_INSIDE}, or a hook changes gradients; {_CURE} or, for checkpoints, use_reentrant=False"
    )


def why_not_exact(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why differentiating twice would fail or be wrong, as far as it can be told before training."""
    strategy, cure = trainer.strategy, _CURE
    if isinstance(strategy, DDPStrategy) and ddp_option(strategy, "static_graph"):
        return f"DDP(static_graph=True) counts each gradient hook of its first step; {cure} or static_graph=False"
    if isinstance(strategy, ModelParallelStrategy):
        return f"FSDP2 differentiates once only; {cure}"
    compiled = is_compiled(pl_module) or any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in pl_module.modules()
    )
    if compiled:
        return f"torch.compile does not differentiate twice; {cure} or leave the module uncompiled"
    return None


def explain(error: RuntimeError) -> str:
    """What an error of a second differentiation means, with a cure."""
    text, cure = str(error), _CURE
    if isinstance(error, MissedTermError):
        return text
    if "is not implemented" in text:
        kernel = text.split("derivative for")[-1].split("is not implemented")[0].strip()
        return f"{kernel} has no second derivative; {cure} (for attention also the MATH backend of sdpa_kernel)"
    if "weight_norm" in text:
        return f"{text}; {cure} or torch.nn.utils.parametrize with a norm of your own"
    if "use_reentrant=True" in text:
        return f"reentrant gradient checkpointing differentiates once only; {cure} or use_reentrant=False"
    if "double backward" in text or "donated buffer" in text:
        return f"torch.compile does not differentiate twice; {cure} or leave the module uncompiled"
    first_line = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    return f"the second differentiation failed ({first_line}); {cure}"
