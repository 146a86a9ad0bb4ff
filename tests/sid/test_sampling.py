"""Many steps of a teacher against diffusers' own pipelines' loops."""

import pytest
import torch

from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.sampling import many_steps, step_levels
from lightning_plugins.sid.teacher import load_teacher


class Smooth(torch.nn.Module):
    """A network of its input and the time; nearly the noise in its input, so that samples need no training."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, timestep, class_labels=None):
        shift = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1)
        time = torch.cos(torch.as_tensor(timestep).float() / 300).view(-1, 1, 1, 1)
        return 0.9 * x + 0.1 * torch.tanh(self.mix(x) + time + shift)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Smooth()


@pytest.fixture(scope="module")
def noise():
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(network, scheduler, noise, num_steps):
    """The loop of every pipeline."""
    scheduler.set_timesteps(num_steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        entering = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(entering, t.expand(len(x))), t, x).prev_sample
    return x


def schedulers():
    import diffusers

    trailing = {"timestep_spacing": "trailing"}
    return {
        "ddim": diffusers.DDIMScheduler(clip_sample=False, **trailing),
        "ddim clipped": diffusers.DDIMScheduler(clip_sample=True, **trailing),
        "ddim clipped at 0.7": diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.7, **trailing),
        "ddim v": diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **trailing),
        "ddim of zero signal": diffusers.DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True, **trailing
        ),
        "edm": diffusers.EDMEulerScheduler(),
        "edm exponential": diffusers.EDMEulerScheduler(sigma_schedule="exponential", sigma_max=30.0),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
        "flow shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


@pytest.mark.parametrize("num_steps", [1, 8, 50])  # DDIM misses its next level unless they divide its 1000
def test_equals_the_schedulers_of_diffusers(network, noise, num_steps):
    for name, scheduler in schedulers().items():
        expected = theirs(network, scheduler, noise, num_steps)
        found = many_steps(Denoiser(network, scheduler), noise, num_steps)
        if (name, num_steps) == ("edm exponential", 1):
            assert torch.isfinite(found).all()  # diffusers' starts at the lowest level; the first is the largest here
            continue
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_clipping_makes_a_difference(network, noise):
    first, second, third = list(schedulers().values())[:3]
    free, clipped, narrow = (many_steps(Denoiser(network, s), noise, 8) for s in (first, second, third))
    assert (free - clipped).abs().max() > 0.1
    assert narrow.abs().max() <= 0.7


def test_levels_of_solvers_of_second_order_and_of_sizes(network):
    import diffusers

    plain = step_levels(Denoiser(network, diffusers.FlowMatchEulerDiscreteScheduler()), 5)
    for scheduler in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ):
        torch.testing.assert_close(step_levels(Denoiser(network, scheduler), 5), plain)


def test_guidance_moves_along_the_difference(network, noise):
    """Of one step, where guidance is linear."""
    import diffusers

    denoiser = Denoiser(network, diffusers.EDMEulerScheduler())
    condition, null = {"class_labels": torch.tensor([0.1, 0.2, 0.3])}, {"class_labels": torch.zeros(1)}
    conditional, unconditional = (many_steps(denoiser, noise, 1, c) for c in (condition, null))
    guided = many_steps(denoiser, noise, 1, condition, null, 3.0)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


def test_a_teacher_from_a_folder(teacher_folder, noise):
    """A pipeline's own images: DDPM's scheduler, whose steps are DDIM's here."""
    import diffusers

    folder = teacher_folder("labelled")
    teacher = load_teacher(folder)
    scheduler = diffusers.DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    unit, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    with_labels = lambda x, t: teacher.network(x, t, class_labels=labels).sample  # noqa: E731
    found = many_steps(teacher.denoiser, unit, 4, {"class_labels": labels})
    torch.testing.assert_close(found, theirs(with_labels, scheduler, unit, 4), rtol=1e-4, atol=1e-4)


def test_bad_numbers_of_steps(network):
    import diffusers

    vp, edm = (Denoiser(network, s) for s in (diffusers.DDIMScheduler(), diffusers.EDMEulerScheduler()))
    with pytest.raises(ValueError, match=r"^num_steps=1001 must be 1 to 1000, the teacher's noise levels\.$"):
        many_steps(vp, torch.zeros(1, 2, 4, 4), 1001)
    with pytest.raises(ValueError, match=r"^num_steps=0 must be 1 or more\.$"):
        many_steps(edm, torch.zeros(1, 2, 4, 4), 0)
    assert len(step_levels(edm, 2000)) == 2001
