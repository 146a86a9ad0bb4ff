"""Guidance against two separate calls, and against what pipelines do to epsilon."""

import diffusers
import pytest
import torch
from torch import nn

from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.guidance import guided
from lightning_plugins.sid.teacher import load_teacher


def test_two_calls_in_one(teacher_folder):
    teacher = load_teacher(teacher_folder("dit"))
    denoiser, labels = teacher.denoiser.double(), torch.tensor([1, 7, 0])
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    sigma = denoiser.nearest(torch.tensor([0.1, 2.5, 20.0]))
    condition, null = {"class_labels": labels}, teacher.null_conditioning()
    assert null["class_labels"].tolist() == [10]
    conditional = denoiser(x, sigma, **condition)
    unconditional = denoiser(x, sigma, class_labels=torch.full((3,), 10))
    calls = []
    teacher.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for scale in (0.0, 1.5, 4.5):
        answer = guided(denoiser, x, sigma, condition, null, scale)
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-10)
    assert calls == [6] * 3
    assert torch.equal(guided(denoiser, x, sigma, condition, null, 1.0), conditional)
    assert torch.equal(guided(denoiser, x, sigma, condition, None, 1), conditional)
    assert calls[3:] == [3, 3]


def test_epsilon_guided_as_by_a_pipeline(teacher_folder):
    teacher = load_teacher(teacher_folder("sd"))
    denoiser, z = teacher.denoiser, torch.randn(2, 4, 8, 8)
    condition, null = teacher.encode_prompts(["a cat", "two dogs"]), teacher.null_conditioning()
    scheduler = diffusers.DDIMScheduler.from_config({**denoiser.scheduler_config, "clip_sample": False})
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        with_prompt = teacher.network(z, 625, **condition).sample
        without = teacher.network(z, 625, null["encoder_hidden_states"].expand(2, -1, -1)).sample
        expected = scheduler.step(without + 3.0 * (with_prompt - without), 625, z).pred_original_sample
        sigma = denoiser.sigmas[[625, 625]]
        answer = guided(denoiser, z * denoiser.input_scale(sigma[0].item()), sigma, condition, null, 3.0)
    torch.testing.assert_close(answer, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(with_prompt, without, atol=1e-4)


def test_nested_conditions_and_refusals():
    class Sum(nn.Module):
        def forward(self, x, timestep, first, second):
            return x + first[:, None, None, None] + second["inner"][:, :, None, None]

    denoiser = Denoiser(Sum(), diffusers.DDPMScheduler(prediction_type="sample"))
    x, sigma = torch.zeros(2, 1, 2, 2), torch.ones(2)
    condition = {"first": torch.tensor([1.0, 2.0]), "second": {"inner": torch.tensor([[10.0], [20.0]])}}
    null = {"first": torch.tensor([0.5]), "second": {"inner": torch.tensor([[1.0], [2.0]])}}
    answer = guided(denoiser, x, sigma, condition, null, 2.0)[:, 0, 0, 0]
    assert answer.tolist() == [2 * 11 - 1.5, 2 * 22 - 2.5]
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a condition that stands for none"):
        guided(denoiser, x, sigma, condition, None, 2.0)
    with pytest.raises(ValueError, match=r"null_conditioning has \['first'\], but conditioning has"):
        guided(denoiser, x, sigma, condition, {"first": torch.ones(1)}, 2.0)
