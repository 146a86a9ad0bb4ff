"""RMSprop with one step size for a whole group of parameters, as error control of the gradient flow gives it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach

from lightning_plugins.core import arguments as must
from lightning_plugins.core.vectors import foreach_add_, foreach_div, foreach_mul_, local, norm

_MEAN, _BUFFER = "mean_square_norm", "momentum_buffer"


class NormRMSprop(Optimizer):
    r"""Gradient descent whose step size holds the error of one step, with the running mean of RMSprop.

    .. math::
        g_t &= \nabla L(\theta_{t-1}) + \lambda \, \theta_{t-1} \\
        v_t &= \alpha \, v_{t-1} + (1 - \alpha) \, \|g_t\|^2, \qquad v_0 = 0 \\
        b_t &= \mu \, b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} \\
        \theta_t &= \theta_{t-1} - \eta \, b_t

    Gradient descent is Euler's method for the flow :math:`\dot\theta = -g(\theta)`. To second order a step of size h
    errs by :math:`\frac h2 \|g(\theta_{t+1}) - g(\theta_t)\|`, which is at most :math:`h \|g\|` where the norm does not
    grow, and that is known before the step. Holding it at a tolerance :math:`\eta` asks for :math:`h = \eta / \|g\|`;
    the noise of minibatches asks for a mean of :math:`\|g\|^2` over many of them. RMSprop does the same to each
    coordinate by itself and so bends the gradient; here one number serves a whole group, and the direction is kept.

    The norm is Euclidean: a sum over all coordinates, not their mean. So ``lr`` is a length: of the step of the whole
    group, once v has settled and without momentum. N coordinates moved by torch's ``RMSprop`` at a rate r go about
    :math:`r \sqrt N` together. As there, v starts at zero, so the first step is :math:`\eta / \sqrt{1 - \alpha}` long,
    and none is longer; for a single coordinate the two optimisers are the same. Scaling the loss changes nothing.

    Parameters sharded by FSDP2 are measured as a whole; on every rank v is the same. What partitions the parameters
    without a trace in them (``ZeroRedundancyOptimizer``, DeepSpeed) cannot be seen and must not be used.

    Args:
        params: parameters, or dicts of a group's params and options. Each group has a mean and a step of its own.
        lr: length of a step, 0 or more, in the unit of the parameters (eta in the formula). No default: the right
            length depends on the model.
        alpha: memory of the mean square norm, in [0, 1); 0 for steps of length lr exactly. 0.99 as in torch's RMSprop.
        eps: number above 0 that is added to the root of the mean, in the unit of the gradient's norm; outside the root
            and 1e-8 as in torch's RMSprop.
        momentum: multiple of the last step that is added to the next one, in [0, 1) (mu in the formula).
        weight_decay: multiple of the parameters that is added to the gradient, 0 or more (lambda in the formula);
            coupled, as in RMSprop: it is part of the gradient that is measured.
        foreach: whether many tensors are moved in one kernel, for one more copy of the gradients. Default: decided by
            the device.
        maximize: whether to climb the loss in place of descending.

    Raises:
        ValueError: an option is out of range, or the parameters are sharded by FSDP1, which hides the other shards.
        RuntimeError: a gradient is sparse, or a group's parameters are on several devices.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = NormRMSprop([theta], lr=0.5, alpha=0.0)
        >>> (theta.square().sum() / 2).backward()  # the gradient is theta, of length 5
        >>> optimizer.step()
        >>> theta.tolist()
        [2.700000047683716, 3.5999999046325684]

    Source:
        The argument is that of kexue.fm/archives/6234 (adaptive rates as error control of the gradient flow); the
        derivation above is written out for this class, not quoted from there.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        _PARAMETERS("params", params)
        groups: Any = list(params)
        must.each(_PARAMETER, of="parameters, or dicts of groups")("params", groups)
        super().__init__(groups, {**options, "foreach": foreach, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with a running mean of its own.

        Args:
            param_group: ``params`` and the options that differ from the constructor's.

        Raises:
            ValueError: an option is out of range, or the parameters are sharded by FSDP1.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(getattr(p, "_fsdp_flattened", False) for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                "NormRMSprop cannot measure parameters sharded by FSDP1, where a rank sees its own shard alone; "
                "use FSDP2: ModelParallelStrategy in place of FSDPStrategy."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; the running means keep the precision they were saved in.

        Args:
            state_dict: state of an optimiser with as many groups and parameters.

        Raises:
            ValueError: the state is another optimiser's, or the groups do not match.
        """
        if any(state and _MEAN not in state for state in state_dict["state"].values()):
            raise ValueError(
                f"this state is another optimiser's (it has no {_MEAN!r}): resume with that one, or start anew from "
                "the weights alone."
            )
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                if state_dict["state"].get(index):  # the base class casts to the parameter's type, such as bfloat16
                    self.state[p][_MEAN] = state_dict["state"][index][_MEAN].to(p.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient, without waiting for the device.

        Args:
            closure: function that computes gradients again and returns the loss.

        Returns:
            The closure's loss, if any.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                _check_parameters(params)
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]  # all of them
        if group["maximize"]:
            grads = [-g for g in grads]
        if group["weight_decay"]:
            grads = [g.add(p, alpha=group["weight_decay"]) for g, p in zip(grads, params, strict=True)]
        mean, buffers = self._mean(group, params), self._buffers(group, params)
        length = norm(grads).to(mean)
        mean.mul_(group["alpha"]).addcmul_(length, length, value=1 - group["alpha"])
        scale = mean.sqrt().add_(group["eps"]).squeeze(0)

        together = group["foreach"]
        if together is None:
            _, together = _default_to_fused_or_foreach(params, differentiable=False)
        params, grads, buffers = local(params), local(grads), local(buffers)
        for i in [slice(None)] if together else [slice(i, i + 1) for i in range(len(params))]:
            _move(params[i], grads[i], buffers[i], scale, group["lr"], group["momentum"])

    def _mean(self, group: dict[str, Any], params: Sequence[Tensor]) -> Tensor:
        """The group's running mean: one tensor of one element, kept in the state of each parameter that was ever moved.

        There it passes through every way of saving an optimiser, also through those that know parameters only. It is
        not 0-dim, because torch's loader of full states under FSDP2 learns the device from a tensor with a dimension.
        """
        moved = [p for p in group["params"] if _MEAN in self.state.get(p, ())]
        if moved:
            mean = self.state[moved[0]][_MEAN]
        else:
            kind = torch.float32
            for p in group["params"]:
                kind = torch.promote_types(kind, p.dtype).to_real()
            mean = torch.zeros(1, dtype=kind, device=params[0].device)
        for p in (*moved, *params):  # a loaded state has as many equal tensors
            self.state[p][_MEAN] = mean
        return mean

    def _buffers(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
        if not group["momentum"]:
            return []
        for p in params:
            if _BUFFER not in self.state[p]:
                self.state[p][_BUFFER] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][_BUFFER] for p in params]


_PARAMETERS = must.Rule(
    lambda value: isinstance(value, Iterable) and not isinstance(value, Tensor), "a list of parameters"
)
_PARAMETER = must.Rule(
    lambda value: isinstance(value, Tensor | tuple) or (isinstance(value, dict) and "params" in value),
    "a tensor or a dict with params",
)


def _move(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], scale: Tensor, lr: float, momentum: float
) -> None:
    steps = foreach_div(grads, scale)
    if momentum:
        foreach_mul_(buffers, momentum)
        foreach_add_(buffers, steps)
        steps = buffers
    foreach_add_(params, steps, alpha=-lr)


def _check_options(options: dict[str, Any]) -> None:
    must.check(
        options,
        lr=must.non_negative,
        alpha=must.number(0, below=1),
        eps=must.positive,
        momentum=must.number(0, below=1),
        weight_decay=must.non_negative,
        foreach=must.optional(must.flag),
        maximize=must.flag,
    )


def _check_parameters(params: Sequence[Tensor]) -> None:
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise RuntimeError("NormRMSprop takes no sparse gradients; make the layer with sparse=False.")
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise RuntimeError(
            f"NormRMSprop keeps one running mean per group, but one group is on {' and '.join(devices)}; "
            "give each device's parameters a group of their own."
        )
