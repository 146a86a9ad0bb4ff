"""The denoiser against exact posterior means, and against what diffusers' own schedulers make of the same output."""

import copy
import math
from itertools import cycle

import diffusers
import pytest
import torch
from torch import nn

from lightning_plugins.sid.denoiser import LARGEST_SIGMA, Denoiser
from lightning_plugins.sid.teacher import load_teacher

# numpy 2 about how diffusers 0.42's Euler, Heun and DPM schedulers make their levels
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
SHAPE = (1, 2, 2)
GAUSSIAN = (torch.tensor([1.0]), torch.tensor([[0.3, -0.2, 0.5, 0.1]]), torch.tensor([[0.5, 0.2, 0.7, 0.4]]))
MIXTURE = (
    torch.tensor([0.6, 0.3, 0.1]),
    torch.tensor([[0.5, 0.5, -0.5, 0.2], [-0.6, 0.1, 0.4, -0.3], [0.0, -0.8, -0.1, 0.7]]),
    torch.tensor([[0.3, 0.2, 0.3, 0.4], [0.2, 0.3, 0.2, 0.1], [0.4, 0.1, 0.2, 0.2]]),
)


def draw(mixture, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights, means, stds = mixture
    chosen = torch.multinomial(weights, num, replacement=True, generator=generator)
    x_0 = means[chosen] + stds[chosen] * torch.randn(num, 4, generator=generator)
    noise = torch.randn(num, 4, generator=generator)
    return x_0.view(num, *SHAPE), noise.view(num, *SHAPE)


def posterior_mean(mixture, x, alpha, beta):
    """E[x_0 | x] for x = alpha x_0 + beta n, in float64; alpha and beta (B,)."""
    weights, means, stds = (value.double() for value in mixture)
    flat, alpha, beta = x.double().flatten(1)[:, None], alpha.double()[:, None, None], beta.double()[:, None, None]
    variance = alpha**2 * stds**2 + beta**2
    logits = weights.log() - ((flat - alpha * means) ** 2 / variance + variance.log()).sum(-1) / 2
    means = (alpha * stds**2 * flat + beta**2 * means) / variance
    return (logits.softmax(-1)[..., None] * means).sum(1).view(x.shape)


class Exact(nn.Module):
    """The network that a perfect training would give: it sees only its input and what it is told of the time.

    Args:
        prediction: what it predicts.
        levels: its time -> (alpha, beta) of the x = alpha x_0 + beta n that it is given.
        sigma_data: for EDM's.
    """

    def __init__(self, mixture, prediction, levels, sigma_data=0.5):
        super().__init__()
        self.mixture, self.prediction, self.levels, self.sigma_data = mixture, prediction, levels, sigma_data

    def forward(self, x, timestep):
        alpha, beta = (value.view(-1, 1, 1, 1) for value in self.levels(timestep))
        mean = posterior_mean(self.mixture, x, alpha.flatten(), beta.flatten())
        noise = (x.double() - alpha * mean) / beta
        if self.prediction.startswith("edm"):
            sigma, sd = beta / alpha, self.sigma_data
            skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
            output = (mean - skip * x / alpha) / (-out if self.prediction == "edm_v" else out)
        else:
            output = {
                "epsilon": noise,
                "v_prediction": alpha * noise - beta * mean,
                "sample": mean,
                "flow": noise - mean,
            }[self.prediction]
        return output.to(x.dtype)


def beta_levels(scheduler):
    cumprod = scheduler.alphas_cumprod.double()

    def levels(timestep):
        assert timestep.dtype == torch.int64
        return cumprod[timestep].sqrt(), (1 - cumprod[timestep]).sqrt()

    return levels


def flow_levels(timestep):
    s = timestep.double() / 1000
    return 1 - s, s


def edm_levels(timestep):
    sigma = (4 * timestep.double()).exp()
    c_in = 1 / (sigma**2 + 0.5**2).sqrt()
    return c_in, sigma * c_in


def exact_denoisers():
    """Every family with its perfect network: ``(name, mixture) -> Denoiser``."""

    def discrete(prediction, **config):
        scheduler = diffusers.DDPMScheduler(prediction_type=prediction, **config)
        return lambda mixture: Denoiser(Exact(mixture, prediction, beta_levels(scheduler)), scheduler)

    def flow(scheduler):
        return lambda mixture: Denoiser(Exact(mixture, "flow", flow_levels), scheduler)

    def edm(prediction):
        scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
        kind = "edm_v" if prediction == "v_prediction" else "edm"
        return lambda mixture: Denoiser(Exact(mixture, kind, edm_levels), scheduler)

    return {
        "epsilon": discrete("epsilon"),
        "epsilon, scaled linear": discrete("epsilon", beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012),
        "v, cosine": discrete("v_prediction", beta_schedule="squaredcos_cap_v2"),
        "v, zero SNR": discrete("v_prediction", rescale_betas_zero_snr=True),
        "sample": discrete("sample"),
        "flow": flow(diffusers.FlowMatchEulerDiscreteScheduler()),
        "flow, shifted": flow(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        "flow_prediction": flow(
            diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
        ),
        "edm": edm("epsilon"),
        "edm, v": edm("v_prediction"),
    }


@pytest.mark.parametrize("mixture", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("family", exact_denoisers())
def test_the_posterior_mean_at_every_level(family, mixture):
    denoiser = exact_denoisers()[family](mixture)
    sigma = denoiser.sigmas if denoiser.sigmas is not None else torch.logspace(math.log10(0.002), math.log10(80), 200)
    x_0, noise = draw(mixture, len(sigma))
    x = x_0 + sigma.view(-1, 1, 1, 1) * noise
    answer = denoiser(x, sigma)
    expected = posterior_mean(mixture, x, torch.ones_like(sigma), sigma)
    assert answer.dtype == torch.float32
    # epsilon costs sigma times float32's rounding; v, sample, flow and EDM do not
    scale = sigma.clamp(min=1) if denoiser.prediction == "epsilon" and denoiser.kind == "vp" else torch.ones_like(sigma)
    error = ((answer - expected).abs().flatten(1).amax(1) / scale).max()
    assert error < 1e-6


def test_gradients_flow_through_the_input():
    for family, build in exact_denoisers().items():
        denoiser = build(GAUSSIAN).double()
        sigma = denoiser.nearest(torch.tensor([0.3, 2.5])).double()
        x = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
        answer = denoiser(x, sigma)
        assert answer.dtype == torch.float64
        (gradient,) = torch.autograd.grad(answer.sum(), x)
        variance = GAUSSIAN[2].double() ** 2
        expected = (variance / (variance + sigma[:, None] ** 2)).view(2, *SHAPE)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=family)


@pytest.mark.parametrize("name", ["ddpm", "v", "sample"])
def test_ddim_predicts_the_same_original_sample(name, teacher_folder):
    denoiser = load_teacher(teacher_folder(name)).denoiser
    config = {**denoiser.scheduler_config, "clip_sample": False, "_class_name": "DDIMScheduler"}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(1000)
    for t in (0, 10, 440, 800, 999):
        x_vp = torch.randn(1, 1, 8, 8)
        with torch.no_grad():
            output = denoiser.network(x_vp, t).sample
            expected = scheduler.step(output, t, x_vp).pred_original_sample
            sigma = denoiser.sigmas[t : t + 1]
            answer = denoiser(x_vp / scheduler.alphas_cumprod[t].sqrt(), sigma)
        scale = 1.0 if denoiser.prediction != "epsilon" else max(1.0, sigma.item())
        torch.testing.assert_close(answer, expected, rtol=0, atol=2e-6 * scale)
        # the exported pipelines' input: unit noise at the level's own timestep
        scaled = denoiser(x_vp * denoiser.input_scale(sigma.item()), sigma)
        torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-3 * scale if t == 0 else 4e-6 * scale)


def test_flow_matching_steps_to_the_same_original_sample(teacher_folder):
    denoiser = load_teacher(teacher_folder("flow")).denoiser
    conditioning = {"encoder_hidden_states": torch.randn(2, 3, 16), "pooled_projections": torch.randn(2, 16)}
    for unshifted in (0.01, 0.5, 1.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=[unshifted])
        t, s = scheduler.timesteps[0], scheduler.sigmas[0].double().item()
        assert len(Denoiser(denoiser.network, scheduler).sigmas) == 1000  # whatever was done to the object
        assert s == pytest.approx(3 * unshifted / (1 + 2 * unshifted))
        z = torch.randn(2, 4, 8, 8)
        sigma = denoiser.nearest(torch.full((2,), min(s / max(1 - s, 1e-12), LARGEST_SIGMA)))
        with torch.no_grad():
            velocity = denoiser.network(z, timestep=t.expand(2), **conditioning).sample
            expected = scheduler.step(velocity, t, z).prev_sample
            answer = denoiser(denoiser.input_scale(sigma[0].item()) * z, sigma, **conditioning)
        torch.testing.assert_close(answer, expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(denoiser.timesteps(sigma), t.expand(2), rtol=0, atol=1e-4)
    assert denoiser.sigma_max == LARGEST_SIGMA and denoiser.timesteps(sigma)[0] == 1000


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditions_as_its_scheduler(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7, sigma_max=50.0)

    class Seen(nn.Module):
        def forward(self, x, timestep):
            self.x, self.timestep = x, timestep
            return torch.sin(3 * x)

    denoiser, x = Denoiser(Seen(), scheduler), torch.randn(3, 1, 4, 4)
    sigma = torch.tensor([0.002, 2.5, 50.0])
    answer = denoiser(x, sigma)
    column = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser.network.x, scheduler.precondition_inputs(x, column))
    torch.testing.assert_close(denoiser.network.timestep, scheduler.precondition_noise(sigma))
    output = torch.sin(3 * denoiser.network.x)
    torch.testing.assert_close(answer, scheduler.precondition_outputs(x, output, column), rtol=1e-6, atol=1e-6)
    assert denoiser.sigma_data == 0.7 and denoiser.sigmas is None and denoiser.kind == "edm"
    assert denoiser.input_scale(50.0) == pytest.approx(scheduler.init_noise_sigma)
    assert denoiser.nearest(torch.tensor([1e-4, 3.0, 99.0])).tolist() == pytest.approx([0.002, 3.0, 50.0])


class Itself(nn.Module):
    def forward(self, x, timestep):
        return x


class Zero(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, hint):
        self.seen = (x.dtype, hint["inner"].dtype, timestep.dtype)
        return self.weight * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_network_runs_low(dtype):
    """Rounded to bfloat16, x would lose 8.6 % of a noise of 0.01; here the network adds exactly nothing."""
    x = torch.randn(2, *SHAPE)
    denoiser = Denoiser(Zero(), diffusers.DDPMScheduler())
    sigma, hint = denoiser.sigmas[[0, 500]].clone(), {"inner": torch.randn(2, 3)}
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(denoiser(x, sigma, hint=hint), x)
    levels = denoiser.sigmas.clone()
    denoiser.to(dtype)
    assert denoiser.network.weight.dtype == dtype
    assert torch.equal(denoiser.sigmas, levels) and denoiser.sigmas.dtype == torch.float32
    answer = denoiser(x, sigma, hint=hint)
    assert torch.equal(answer, x) and answer.dtype == torch.float32
    assert denoiser.network.seen == (dtype, dtype, torch.int64)
    assert denoiser(x.to(dtype), sigma, hint=hint).dtype == torch.float32


def test_a_low_network_stays_near_the_full_one(teacher_folder):
    denoiser = load_teacher(teacher_folder("ddpm")).denoiser
    x, sigma = torch.randn(2, 1, 8, 8), denoiser.sigmas[[20, 440]].clone()
    full = denoiser(x, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = denoiser(x, sigma)
    low = denoiser.bfloat16()(x, sigma)
    for answer in (mixed, low):
        assert answer.dtype == torch.float32
        error = (answer - full).abs().flatten(1).amax(1)
        assert error.max() > 0 and bool((error < 0.1 * sigma).all())


SOLVERS = {
    "DDIM": {},
    "DDPM": {},
    "PNDM": {},
    "LCM": {},
    "TCD": {},
    "LMSDiscrete": {},
    "EulerDiscrete": {"use_karras_sigmas": True},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "DEISMultistep": {},
    "DPMSolverMultistep": {"use_karras_sigmas": True},
    "DPMSolverSinglestep": {},
    "UniPCMultistep": {},
    "SASolver": {},
}


def test_every_solver_of_a_beta_schedule_is_understood():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    cumprod = (1 - betas).cumprod(0)
    expected = ((1 - cumprod) / cumprod).sqrt().float()
    for (name, options), prediction in zip(SOLVERS.items(), cycle(["epsilon", "v_prediction"]), strict=False):
        scheduler = getattr(diffusers, f"{name}Scheduler")(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **options
        )
        scheduler.set_timesteps(7)  # replaces the levels of some
        used = Denoiser(nn.Identity(), scheduler)
        for denoiser in (used, Denoiser(nn.Identity(), used.scheduler_config)):
            torch.testing.assert_close(denoiser.sigmas, expected, rtol=3e-5, atol=0, msg=name)
            assert (denoiser.kind, denoiser.prediction) == ("vp", prediction)
            assert torch.equal(denoiser.timesteps(denoiser.sigmas), torch.arange(1000))
            assert denoiser.scheduler_config["_class_name"] == f"{name}Scheduler"


def test_an_infinite_level_is_capped():
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        denoiser = Denoiser(Itself(), scheduler)
        # DDIM keeps the zero; the others put 2^-24 there, above the alphas_cumprod of the step before
        assert denoiser.sigma_max == LARGEST_SIGMA
        assert denoiser.timesteps(denoiser.nearest(torch.tensor([math.inf])))[0] == 999
        # v at zero SNR: x_0 = -v, as DDIM computes there
        z = torch.randn(1, 1, 2, 2)
        answer = denoiser(denoiser.input_scale(denoiser.sigma_max) * z, denoiser.sigmas[-1:])
        torch.testing.assert_close(answer, -z, rtol=0, atol=1e-6)


def test_levels_between_those_of_the_grid():
    denoiser = Denoiser(nn.Identity(), diffusers.DDPMScheduler())
    levels = denoiser.sigmas.double()
    assert bool((levels.diff() > 0).all()) and denoiser.sigma_min == levels[0] and denoiser.sigma_max == levels[-1]
    asked = torch.logspace(-3, 3, 500)
    found = (levels.log() - asked.double().log()[:, None]).abs().argmin(1)
    assert torch.equal(denoiser.nearest(asked), denoiser.sigmas[found])
    assert torch.equal(denoiser.timesteps(asked), found)
    assert denoiser.timesteps(torch.tensor([2.5]))[0] == 440  # as the paper's sigma_init on this schedule


def test_sharing_copies_and_the_meta_device(teacher_folder):
    denoiser = load_teacher(teacher_folder("v")).denoiser
    other = denoiser.sharing(copy.deepcopy(denoiser.network))
    assert other.network is not denoiser.network and torch.equal(other.sigmas, denoiser.sigmas)
    assert (other.kind, other.prediction) == (denoiser.kind, denoiser.prediction)
    assert other.scheduler_config == denoiser.scheduler_config == copy.deepcopy(denoiser).scheduler_config
    assert all(key.startswith("network.") for key in denoiser.state_dict())
    with torch.device("meta"):
        empty = Denoiser(nn.Linear(2, 2), denoiser.scheduler_config)
    assert empty.sigmas.is_meta
    assert torch.equal(empty.to_empty(device="cpu").sigmas, denoiser.sigmas)


def test_learned_variance_and_classes(teacher_folder):
    teacher = load_teacher(teacher_folder("dit"))
    denoiser, x, labels = teacher.denoiser, torch.randn(2, 4, 8, 8), torch.tensor([1, 7])
    sigma = denoiser.nearest(torch.tensor([0.5, 2.5]))
    answer = denoiser(x, sigma, class_labels=labels)
    column = sigma.view(-1, 1, 1, 1)
    output = teacher.network(x / (1 + column**2).sqrt(), denoiser.timesteps(sigma), labels).sample
    assert output.shape == (2, 8, 8, 8)
    torch.testing.assert_close(answer, x - column * output[:, :4])
    assert not torch.equal(answer, denoiser(x, sigma, class_labels=labels.flip(0)))


def test_bad_networks_and_schedulers_are_refused():
    class Wide(nn.Module):
        def forward(self, x, timestep):
            return x.repeat(1, 3, 1, 1)

    with pytest.raises(ValueError, match=r"makes \(6, 4, 4\) of \(2, 4, 4\)"):
        Denoiser(Wide(), diffusers.DDPMScheduler())(torch.randn(1, 2, 4, 4), torch.ones(1))
    for scheduler, words in {
        diffusers.CMStochasticIterativeScheduler(): "consistency model, which makes images in one step already",
        diffusers.IPNDMScheduler(): "what IPNDMScheduler makes",
        diffusers.SCMScheduler(): "SCMScheduler with prediction_type='trigflow'",
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", sigma_min=0.1, sigma_max=9.0, prediction_type="v_prediction"
        ): "and timestep_type='continuous'",
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True): "and invert_sigmas",
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"): "prediction_type='flow_prediction'",
        diffusers.DDPMScheduler(trained_betas=[0.0, 0.1, 0.2]): "do not increase from above zero",
        "DDPMScheduler": "neither a diffusers scheduler nor its config",
        nn.Identity(): "neither a diffusers scheduler nor its config",
    }.items():
        with pytest.raises(ValueError, match=words):
            Denoiser(nn.Identity(), scheduler)
    with pytest.raises(ValueError, match="no class 'DDPMSchedular'"):
        Denoiser(nn.Identity(), {"_class_name": "DDPMSchedular"})
    denoiser = Denoiser(nn.Identity(), diffusers.DDPMScheduler())
    for sigma_init in (0.002, 200.0, math.nan):
        with pytest.raises(ValueError, match=r"outside of the teacher's noise levels, 0\.01 to 157\.4"):
            denoiser.input_scale(sigma_init)
