"""Training written out, without the package: what a Trainer with the callbacks must arrive at.

A copy of the module, of the batch and of the random state at the entry of ``training_step`` is the whole of what a
step depends on, so that a run of the copy is a replay that cannot miss anything.
"""

import math
import random
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_


@dataclass(frozen=True)
class Objective:
    """What is trained on: ``F + c |grad F|^2`` with ``F = |L - level| + level``.

    Attributes:
        level: of Flooding; ``None`` trains on the loss itself.
        coefficient: ``c``.
        way: how the penalty's gradient is written out: by autograd, or as the central difference of gradients over
            ``relative_step`` times the parameters' norm.
        relative_step: the displacement over the parameters' norm.
        within: whether the penalty is added as soon as the gradient is there, for hooks that look at it then.
    """

    level: float | None = None
    coefficient: float = 0.0
    way: Literal["autograd", "difference"] = "autograd"
    relative_step: float = 1e-5
    within: bool = False


PLAIN = Objective()


@dataclass
class Path:
    """What a run went through, by optimizer step, and where it ended.

    Attributes:
        state: all tensors of the module at the end.
        losses: mean loss.
        lengths: norm of the loss's gradient.
        products: norm of the Hessian's product with the gradient; only where there is a penalty.
        bends: curvature of the loss along the step; only where it was asked for.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    bends: list[float] = field(default_factory=list)


@dataclass
class Entry:
    """All that a call of ``training_step`` depends on."""

    module: nn.Module
    batch: Any
    index: int
    random_state: tuple[Any, ...]
    autocast: bool

    def run(self, moved: dict[int, Tensor]) -> tuple[nn.Module, Tensor]:
        """The loss of a copy whose parameters, counted as in ``module.parameters()``, have other values."""
        module, outside = deepcopy(self.module), random_state()
        with torch.no_grad():
            for index, param in enumerate(module.parameters()):
                if index in moved:
                    param.copy_(moved[index])
        set_random_state(self.random_state)
        loss = step(module, deepcopy(self.batch), self.index, self.autocast)
        set_random_state(outside)
        return module, loss


def random_state():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state):
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def step(module, batch, index, autocast):
    """The loss that ``training_step`` returns, if any."""
    arguments = (iter([(batch, index, 0)]),) if draws_itself(module) else (batch, index)
    # without a cache, as Lightning does
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if autocast else nullcontext():
        output = module.training_step(*arguments)
    return output["loss"] if isinstance(output, dict) else output


def draws_itself(module):
    """Whether ``training_step`` takes batches from the loader; Lightning then counts one behind."""
    return "dataloader_iter" in module.training_step.__code__.co_varnames


def train(module, batches, epochs=1, k=1, clip=None, autocast=False, objective=PLAIN, probes=False) -> Path:
    """Train as a Trainer does, with ``k`` batches to an optimizer step.

    Args:
        module: the module, which is trained.
        batches: of one epoch.
        epochs: how often they are gone through.
        k: batches to a step; the last step of an epoch may have fewer.
        clip: largest norm of a gradient.
        autocast: whether the forward pass is in bfloat16 where torch chooses so.
        objective: what is trained on.
        probes: whether to measure the curvature along each step.
    """
    path = Path()
    module.log = module.log_dict = lambda *args, **kwargs: None
    found = module.configure_optimizers()
    if not module.automatic_optimization:
        module.optimizers = lambda: found
        module.manual_backward = lambda loss, **kwargs: loss.backward(**kwargs)
    for _ in range(epochs):
        window = []
        for index, batch in enumerate(deepcopy(batches)):
            module.on_train_batch_start(batch, index)
            entry = Entry(None, None, index, random_state(), autocast)
            if objective.coefficient or probes:
                entry.module, entry.batch = deepcopy(module), deepcopy(batch)
            loss = step(module, batch, index, autocast)
            if module.automatic_optimization:
                if index % k == 0:
                    window = []
                if (max(0, index - 1) if draws_itself(module) else index) % k == 0:
                    found.zero_grad()
                if loss is not None:
                    window.append((entry, loss.item()))
                    module.backward(loss / k)
                    if objective.within:
                        add_penalty(with_gradient(module, found), [entry], 1, objective, path, found)
                    module.on_after_backward()
                if (index + 1) % k == 0 or index + 1 == len(batches):
                    optimizer_step(module, found, window, k, clip, objective, probes, path)
                    window = []
            module.on_train_batch_end(loss, batch, index)
    path.state = module.state()
    return path


def optimizer_step(module, optimizer, window, k, clip, objective, probes, path):
    """Flood, penalise, clip, step."""
    params = with_gradient(module, optimizer)
    if window and params:
        entries, losses = [entry for entry, _ in window], [loss for _, loss in window]
        path.losses.append(float(np.mean(losses)))
        path.lengths.append(length({i: p.grad for i, p in params.items()}))
        if objective.level is not None and path.losses[-1] < objective.level:
            for param in params.values():
                param.grad.neg_()
        if objective.coefficient and not objective.within:
            add_penalty(params, entries, k, objective, path, optimizer)
        before = {i: (p.detach().clone(), p.grad.clone()) for i, p in params.items()} if probes else {}
    module.on_before_optimizer_step(optimizer)
    if clip is not None:
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step(lambda: path.losses[-1])  # LBFGS, of one evaluation, asks for it
    if window and params and probes:
        try:
            path.bends.append(bend(params, before, entries, k))
        except (ArithmeticError, TypeError):  # the module has no loss there
            path.bends.append(math.nan)


def with_gradient(module, optimizer):
    """The parameters that the optimizer will move, each once, by their places in the module."""
    inside = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return {i: p for i, p in enumerate(module.parameters()) if id(p) in inside and p.grad is not None}


def bend(params, before, entries, k):
    """Curvature of the window's loss along the step that was made."""
    after = gradient(params, {i: p.detach() for i, p in params.items()}, entries, k)
    move = {i: p.detach() - before[i][0] for i, p in params.items()}
    return float(sum(inner(after[i] - before[i][1], move[i]) for i in params) / length(move) ** 2)


def add_penalty(params, entries, k, objective, path, optimizer):
    """Add the gradient of ``c |grad F|^2``, which is that of ``c |grad L|^2`` whatever the sign of ``F``.

    An optimizer that climbs goes down the penalty all the same, so that it is subtracted there.
    Of an incomplete window's ``n`` micro-batches the loss, and so the penalty, counts ``n / k``.
    """
    share = len(entries) / k
    theta = {i: param.detach() for i, param in params.items()}
    if objective.way == "autograd":
        products = squared_length(params, theta, entries)
        factor = share * objective.coefficient
    else:
        direction = {i: param.grad for i, param in params.items()}
        h = objective.relative_step * (length(theta) or 1.0) / length(direction)
        above, below = (
            gradient(params, {i: theta[i] + sign * h * direction[i] for i in params}, entries, k)
            for sign in (1.0, -1.0)
        )
        products = {i: (above[i] - below[i]) / h for i in params}
        # where the direction was turned round, these are of the opposite sign
        factor = (-1.0 if is_flooded(path, objective) else 1.0) * objective.coefficient / share
    path.products.append(length(products) / 2)
    climbing = {id(p) for group in optimizer.param_groups if group.get("maximize") for p in group["params"]}
    for i, param in params.items():
        param.grad = products[i] * (-factor if id(param) in climbing else factor) + param.grad


def is_flooded(path, objective):
    return objective.level is not None and path.losses[-1] < objective.level


def squared_length(params, theta, entries):
    """The gradient of ``|grad L|^2`` by autograd, ``L`` the mean over the window."""
    copies, firsts = [], []
    for entry in entries:
        module, loss = entry.run(theta)
        own = dict(enumerate(module.parameters()))
        copies.append([own[i] for i in params])
        firsts.append(torch.autograd.grad(loss / len(entries), copies[-1], create_graph=True, allow_unused=True))
    total = torch.zeros((), dtype=torch.float64)
    for parts in zip(*firsts, strict=True):
        known = [part for part in parts if part is not None]
        if known:
            total = total + inner(sum(known), sum(known))
    flat = [param for copy in copies for param in copy]
    found = torch.autograd.grad(total, flat, allow_unused=True)
    sums = {i: torch.zeros_like(param) for i, param in params.items()}
    for position, part in enumerate(found):
        if part is not None:
            sums[list(params)[position % len(params)]] += part
    return sums


def gradient(params, values, entries, k):
    """Of the window's losses over ``k``, at other values of the parameters, by copies of the module."""
    sums = {i: torch.zeros_like(param) for i, param in params.items()}
    for entry in entries:
        module, loss = entry.run(values)
        module.zero_grad()
        module.backward(loss / k)
        for i, param in enumerate(module.parameters()):
            if i in sums and param.grad is not None:
                sums[i] = sums[i] + param.grad
    return sums


def inner(x: Tensor, y: Tensor) -> Tensor:
    """``<x, y>`` in float64, sparse or not; of complex numbers as pairs of real ones."""
    x, y = (z.to_dense() if z.is_sparse else z for z in (x, y))
    x, y = (torch.view_as_real(z) if z.is_complex() else z for z in (x, y))
    return (x.double() * y.double()).sum()


def length(tensors: dict[int, Tensor]) -> float:
    return float(sum(inner(t, t) for t in tensors.values()) ** 0.5)
