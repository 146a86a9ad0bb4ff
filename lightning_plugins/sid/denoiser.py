"""One denoiser over every diffusers teacher: whatever a network predicts, it becomes the mean image given a noisy one.

Everything outside speaks EDM: ``x = x_0 + sigma * noise``. How a family scales its inputs stays in this file.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins.core import arguments as must
from lightning_plugins.sid.pipeline_folder import is_scheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Kind = Literal["vp", "flow", "edm"]

# The cap of an infinite noise level (zero terminal SNR, flow matching's s = 1): a power of two, so that scaling by it
# is exact, and the first at which float32 rounds 1 - s to nothing, so that D is what it is at infinity.
LARGEST_SIGMA = 2.0**24
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_KNOWN = (
    "The families known are: a beta schedule with prediction_type epsilon, v_prediction or sample (DDPM, DDIM, PNDM, "
    f"Euler, DPMSolver, UniPC, ...); flow matching ({', '.join(_FLOW)}, or prediction_type flow_prediction with "
    f"use_flow_sigmas); {' and '.join(_EDM)}."
)


class Denoiser(nn.Module):
    r"""The posterior mean image of a diffusion network, in EDM scaling and float32.

    .. math:: D(x, \sigma) = E[x_0 \mid x] = c_{skip} x + c_{out} \, net(c_{in} x, t(\sigma)), \quad x = x_0 + \sigma n

    with, for :math:`a = 1 / \sqrt{1 + \sigma^2}` and :math:`s = \sigma / (1 + \sigma)`,

    ============================  =======================  ==================  ============================  ==========
    prediction                    c_skip                   c_out               c_in                          t
    ============================  =======================  ==================  ============================  ==========
    epsilon                       1                        -sigma              a                             index
    v_prediction                  a^2                      -sigma a            a                             index
    sample                        0                        1                   a                             index
    flow                          1 - s                    -s                  1 - s                         T s
    EDM (sigma_d: sigma_data)     sigma_d^2 c_in^2         sigma sigma_d c_in  1/sqrt(sigma^2 + sigma_d^2)   ln(sigma)/4
    ============================  =======================  ==================  ============================  ==========

    EDM with v_prediction flips c_out's sign; T is the number of training timesteps. The grid is the scheduler's own:
    ``alphas_cumprod``, or flow matching's ``sigmas`` with its ``shift`` (one that a pipeline adds by the image's size
    is for sampling alone); a scheduler's solver options do not matter. Only the network runs in its own precision or
    under autocast; gradients flow through x. Where a network has twice as many outputs as x has channels (a learned
    variance), the first half counts.

    Args:
        network: the network, called as ``network(x, timestep=t, **conditioning)``, which returns a tensor or diffusers'
            output.
        scheduler: a diffusers scheduler, or its config as a dict with ``_class_name``; the prediction and the noise
            levels are read from its config, whatever was done to the object since.

    Attributes:
        kind: the family: ``"vp"``, ``"flow"`` or ``"edm"``.
        sigmas: ``(T,)`` increasing levels of the grid, None for EDM's continuous ones; float32 in every precision.
        sigma_min: the lowest noise level.
        sigma_max: the highest noise level; an infinite one (zero terminal SNR, s = 1) counts as 2^24.
        sigma_data: standard deviation of the images by EDM's scheduler; 0.5, that of images in [-1, 1], in the other
            families.
        scheduler_config: the scheduler's config as plain data, with ``_class_name``.

    Raises:
        ValueError: a scheduler of no known family.

    Source: Karras et al. 2022 (arXiv 2206.00364) eq. 7 and table 1; Salimans & Ho 2022 (arXiv 2202.00512) for v.
    """

    def __init__(self, network: nn.Module, scheduler: "SchedulerMixin | Mapping[str, Any]") -> None:
        super().__init__()
        must.module("network", network)
        self._scheduler = _fresh(scheduler)
        self.scheduler_config: dict[str, Any] = json.loads(self._scheduler.to_json_string())
        self.kind: Kind
        self.kind, self.prediction, grid = _read(self._scheduler)
        self.sigma_data = float(self._scheduler.config.sigma_data) if self.kind == "edm" else 0.5
        limits = self._scheduler.config if grid is None else None
        self.sigma_min = float(limits.sigma_min if limits else grid[0])
        self.sigma_max = float(limits.sigma_max if limits else grid[-1])
        self.network = network
        self._grid = grid
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        self.register_buffer("sigmas", None if grid is None else grid.to(device), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, **conditioning: Any) -> Tensor:
        """The mean of x_0 given x.

        Args:
            x: ``(B, C, H, W)`` noisy images or latents, ``x_0 + sigma * noise``.
            sigma: ``(B,)`` levels, such as :meth:`nearest` returns. In between, a grid's network is told the nearest
                timestep.
            conditioning: the network's own keyword arguments, such as ``class_labels`` or ``encoder_hidden_states``.

        Returns:
            ``(B, C, H, W)`` float32 (float64 for float64 x).

        Raises:
            ValueError: the network's output has neither x's channels nor twice as many.
        """
        x = x if x.dtype == torch.float64 else x.float()
        c_skip, c_out, c_in = (c.view(-1, *[1] * (x.ndim - 1)) for c in self._coefficients(sigma.to(x.dtype)))
        low = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), x.dtype)
        output = self.network((c_in * x).to(low), timestep=self.timesteps(sigma), **_cast(conditioning, low))
        output = output if isinstance(output, Tensor) else output[0]
        channels = x.shape[1]
        if output.shape[1] not in (channels, 2 * channels) or output.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"The network makes {tuple(output.shape[1:])} of {tuple(x.shape[1:])}: a denoiser needs as many "
                "channels as its input, or twice as many (a learned variance), and the same size."
            )
        return c_skip * x + c_out * output[:, :channels]  # the coefficients widen a low output

    def nearest(self, sigma: Tensor) -> Tensor:
        """The levels of the grid nearest to ``(B,)`` sigma in their logarithm; for EDM sigma itself, in range.

        Args:
            sigma: ``(B,)`` noise levels, positive.

        Returns:
            ``(B,)`` levels that the network has been trained at.
        """
        if self.sigmas is None:
            return sigma.clamp(self.sigma_min, self.sigma_max)
        return self.sigmas[self._index(sigma)]

    def timesteps(self, sigma: Tensor) -> Tensor:
        """What the network is told of ``(B,)`` sigma: the int64 index, ``T s`` for flow, ``ln(sigma) / 4`` for EDM.

        Args:
            sigma: ``(B,)`` noise levels, positive.
        """
        if self.kind == "vp":
            return self._index(sigma)
        if self.kind == "edm":
            return sigma.log() / 4
        return self._scheduler.config.num_train_timesteps * (sigma / (1 + sigma))

    def input_scale(self, sigma_init: float) -> float:
        r"""What to multiply unit noise by, so that it enters :meth:`forward` as a pipeline feeds its first step.

        :math:`\sqrt{1 + \sigma^2}` for VP and EDM's schedulers, :math:`1 + \sigma` for flow matching, whose own
        pipelines start at :attr:`sigma_max`. The one-step generator is ``G(z) = D(input_scale * z, sigma_init)``. The
        code of SiD and of SiD-LSG multiplies by sigma alone, as EulerDiscreteScheduler does, so that a VP network sees
        ``sqrt(1 - alpha_bar) z``; it is fed ``z`` here, as DDIM and DDPM feed it.

        Args:
            sigma_init: the noise level of the first step, within the teacher's.

        Raises:
            ValueError: a level outside of the teacher's.
        """
        if not self.sigma_min <= sigma_init <= self.sigma_max:
            raise ValueError(
                f"sigma_init={sigma_init} lies outside of the teacher's noise levels, {self.sigma_min:.4g} to "
                f"{self.sigma_max:.4g} (in EDM scaling, x_0 + sigma * noise): choose one between."
            )
        return 1 + sigma_init if self.kind == "flow" else math.sqrt(1 + sigma_init**2)

    def sharing(self, network: nn.Module) -> "Denoiser":
        """The same preconditioning over another network: the generator's, or the fake score's.

        Args:
            network: takes what this denoiser's takes; it is not copied.
        """
        return Denoiser(network, self._scheduler)

    def _coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, each ``(B,)``."""
        if self.kind == "flow":
            remaining = 1 / (1 + sigma)
            return remaining, -sigma * remaining, remaining
        if self.kind == "edm":
            c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
            c_out = sigma * self.sigma_data * c_in
            return (self.sigma_data * c_in) ** 2, c_out if self.prediction == "epsilon" else -c_out, c_in
        a = 1 / (1 + sigma**2).sqrt()
        if self.prediction == "epsilon":
            return torch.ones_like(sigma), -sigma, a
        if self.prediction == "v_prediction":
            return a**2, -sigma * a, a
        return torch.zeros_like(sigma), torch.ones_like(sigma), a

    def _index(self, sigma: Tensor) -> Tensor:
        borders = (self.sigmas[1:] * self.sigmas[:-1]).sqrt()
        return torch.bucketize(sigma.to(borders.dtype).contiguous(), borders)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Denoiser":
        super()._apply(fn, recurse)
        if self._grid is not None:  # .bfloat16() would round it, and .to_empty() lose it
            self.sigmas = self._grid.to(self.sigmas.device)
        return self


def _fresh(scheduler: "SchedulerMixin | Mapping[str, Any]") -> "SchedulerMixin":
    """The scheduler as its config describes it: set_timesteps() may have replaced the levels of one in use."""
    import diffusers

    if isinstance(scheduler, Mapping) and "_class_name" in scheduler:
        if not is_scheduler(scheduler["_class_name"]):
            raise ValueError(f"scheduler: diffusers has no class {scheduler['_class_name']!r}. {_KNOWN}")
        cls, config = getattr(diffusers, scheduler["_class_name"]), scheduler
    elif isinstance(scheduler, diffusers.SchedulerMixin):
        cls, config = type(scheduler), scheduler.config
    else:
        raise ValueError(
            f"scheduler={must.told(scheduler)} is neither a diffusers scheduler nor its config: give one, or the "
            "content of a scheduler_config.json, whose _class_name says which it is."
        )
    with torch.device("cpu"):  # Lightning may be building on another device, or on none
        return cls.from_config(config)


def _read(scheduler: "SchedulerMixin") -> tuple[Kind, str, Tensor | None]:
    """The family, the prediction, and the increasing levels (float32, on the CPU) or None for continuous ones."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type")
    if name in _EDM and prediction in ("epsilon", "v_prediction"):
        return "edm", prediction, None
    if name in _FLOW and not config.get("invert_sigmas"):
        return "flow", "flow_prediction", _flow_levels(scheduler)
    betas = hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type", "discrete") == "discrete"
    if betas and prediction == "flow_prediction" and config.get("use_flow_sigmas"):
        scheduler = _fresh(scheduler)  # set_timesteps() may change the config
        scheduler.set_timesteps(config.num_train_timesteps)
        return "flow", prediction, _flow_levels(scheduler)
    if name == "CMStochasticIterativeScheduler":
        raise ValueError(
            f"scheduler: {name} belongs to a consistency model, which makes images in one step already and is no "
            "denoiser: give the diffusion model that it was distilled from."
        )
    if not betas or prediction not in _PREDICTIONS:
        said = "" if prediction is None else f" with prediction_type={prediction!r}"
        said += " and timestep_type='continuous'" if config.get("timestep_type") == "continuous" else ""
        said += " and invert_sigmas" if config.get("invert_sigmas") else ""
        raise ValueError(f"scheduler: what {name}{said} makes of a network's output is not known. {_KNOWN}")
    alphas = scheduler.alphas_cumprod.double()
    if config.get("rescale_betas_zero_snr"):
        alphas[-1] = 0  # as trained; Euler and DPMSolver put 2^-24 there, which may be less noise than the step before
    return "vp", prediction, _increasing((1 - alphas).sqrt() / alphas.sqrt(), name)


def _flow_levels(scheduler: "SchedulerMixin") -> Tensor:
    s = scheduler.sigmas.double()
    s = s[s > 0].unique()
    return _increasing(s / (1 - s), type(scheduler).__name__)


def _increasing(sigmas: Tensor, name: str) -> Tensor:
    sigmas = sigmas.clamp(max=LARGEST_SIGMA).float()
    if not (len(sigmas) > 1 and sigmas[0] > 0 and bool((sigmas.diff() > 0).all())):
        raise ValueError(
            f"scheduler: the noise levels of {name}'s config do not increase from above zero, but start as "
            f"{[round(level, 4) for level in sigmas[:3].tolist()]}: check its betas."
        )
    return sigmas


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``value``, a dict or something in one, in the network's precision."""
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
