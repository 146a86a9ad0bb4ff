"""What SiD draws for an update: by process, by turn, apart from the labels; and where dropout is in training."""

import pytest
import torch
from trainers import quiet_trainer

from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.teacher import load_teacher

DROPPED = 10  # what the tiny DiT takes for no class


class Watch(SiD):
    """Keeps what its updates draw, and the seeds of all generators."""

    def _draw(self, n, turn):
        draws = super()._draw(n, turn)
        self.__dict__.setdefault("draws", []).append(draws)
        return draws

    def _random(self, n, turn):
        random = super()._random(n, turn)
        self.__dict__.setdefault("seeds", []).append(random.initial_seed())
        return random


def build(folder, **options):
    settings = {"batch_size": 6, "num_pictures": 0, "updates_per_epoch": 4, "lr": 1e-30, "fake_lr": 1e-30}
    return Watch(teacher=str(folder), **(settings | options))


def fit(module, max_steps=1):
    quiet_trainer(max_steps=max_steps).fit(module)
    return module


def record(module, name, look):
    """What ``look`` says of each call of a denoiser, from the first update on."""
    calls = []

    def hook(denoiser, arguments, conditions, output):
        calls.append(look(denoiser, arguments, conditions, output))

    original = module.on_train_start

    def start():
        original()
        getattr(module.networks, name).register_forward_hook(hook, with_kwargs=True)

    module.on_train_start = start
    return calls


def test_no_row_no_turn_and_no_step_draws_what_another_does(teacher_folder):
    first, again = (fit(build(teacher_folder("labelled"), fake_steps=2), 2) for _ in range(2))
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(first.draws, again.draws, strict=True))
    draws = first.draws[1:]  # the first is for the check of the teacher
    noise = torch.cat([value for drawn in draws for value in (drawn.latent, drawn.noise)]).flatten(1)
    assert len(noise) == 2 * 3 * 2 * 6  # steps, turns, two of each, rows
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 6 / noise.shape[1] ** 0.5
    levels = torch.stack([drawn.sigma for drawn in draws])
    assert len(levels.unique(dim=0)) == len(levels)


def test_labels_come_of_numbers_that_nothing_else_is_drawn_from(teacher_folder):
    module = fit(build(teacher_folder("labelled"), fake_steps=2), 3)
    training = module.seeds[2:]  # the first two are of the check of the teacher
    assert len(training) == len(set(training)) == 3 * (1 + 2 + 1)  # labels, two fake scores, the generator


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dropped_conditions_reach_the_fake_score_in_its_own_update_alone(teacher_folder, share):
    module = build(teacher_folder("dit"), condition_dropout=share, batch_size=16)
    fake, generator = (
        record(module, name, lambda denoiser, x, conditions, y: conditions["class_labels"])
        for name in ("fake_score", "generator")
    )
    fit(module)
    labels, dropped = generator[0], module.draws[1].dropped
    assert labels.max() < DROPPED
    assert torch.equal(fake[0], torch.where(dropped, DROPPED, labels))
    assert torch.equal(fake[1], labels)
    assert int(dropped.sum()) in ({0.0: [0], 1.0: [16]}.get(share) or range(3, 14))


def test_the_fake_score_learns_what_a_generator_without_dropout_makes(teacher_folder, tmp_path):
    """The generator's own update has dropout, and the fake score none in it."""
    teacher = load_teacher(teacher_folder("ddpm"))
    type(teacher.network).from_config({**teacher.network.config, "dropout": 0.5}).save_pretrained(tmp_path / "unet")
    teacher.scheduler.save_pretrained(tmp_path / "scheduler")
    module = build(tmp_path, clip_output=False)
    images = record(module, "generator", lambda denoiser, x, conditions, y: y.detach().clone())
    modes = record(module, "fake_score", lambda denoiser, x, conditions, y: denoiser.training)
    fit(module)
    without = [module(draws.latent) for draws in module.draws[1:]]  # of the student, whose weights are the same still
    assert [torch.equal(*pair) for pair in zip(images, without, strict=True)] == [True, False]
    assert modes == [True, False]
