"""SiD in every precision, with data, conditions and guidance, compiled, evaluated, and drawn."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins.callbacks.generative_evaluation.callback import GenerativeEvaluation
from lightning_plugins.data.digits import Digits
from lightning_plugins.data.prompts import PromptData
from lightning_plugins.sid.conditions import real_images
from lightning_plugins.sid.denoiser import LARGEST_SIGMA
from lightning_plugins.sid.losses import generator_loss
from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.teacher import load_teacher

trainer = partial(quiet_trainer, max_steps=2)


def build(folder, cls=SiD, **options):
    settings = {"batch_size": 4, "num_pictures": 0, "updates_per_epoch": 2, "lr": 1e-3, "fake_lr": 1e-3}
    return cls(teacher=str(folder), **(settings | options))


def fit(module, data=None, *callbacks, **options):
    run = trainer(*callbacks, **options)
    run.fit(module, data)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert run.global_step == run.max_steps
    return run


def moved(module, part="generator"):
    """Which of a network's parameters training has changed."""
    teacher = module.teacher.network.state_dict()
    state = getattr(module.networks, part).network.state_dict()
    return {name for name, value in state.items() if not torch.equal(value.float(), teacher[name].float())}


def batches(*made):
    return DataLoader(list(made), batch_size=None)


# Precision.


def test_bf16_is_close_to_full_precision(teacher_folder):
    """Only the networks run low: figures of the first update, where single weights do not count yet."""
    figures = {}
    for precision in ("32-true", "bf16-mixed"):
        run = fit(build(teacher_folder("v"), alpha=0.5, clip_output=False), max_steps=1, precision=precision)
        figures[precision] = {name: float(value) for name, value in run.callback_metrics.items()}
    for name in ("train/fake_loss", "train/divergence"):
        low, high = figures["bf16-mixed"][name], figures["32-true"][name]
        assert low != high
        assert low == pytest.approx(high, rel=0.1), name


def test_fp16_with_a_grad_scaler(teacher_folder):
    """An overflow lowers the scale, no update is lost for good, and what is learnt does not depend on the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    module = build(teacher_folder("v"), eps=1e-6, gradient_clip=1.0)
    fit(module, precision=None, plugins=MixedPrecision("16-mixed", "cpu", scaler), max_steps=12)
    assert 1 <= scaler.get_scale() < 2.0**16
    assert moved(module) and moved(module, "fake_score")


def test_double_precision_of_data_and_networks(teacher_folder):
    module = build(teacher_folder("labelled"))
    fit(module, precision="64-true")
    assert {value.dtype for value in module.parameters()} == {torch.float64}
    assert module.teacher.network.dtype == torch.float64
    assert module.sample(2).dtype == torch.float32


def test_a_teacher_in_half_precision_saves_memory(teacher_folder):
    """A loaded pipeline stays as it is; the networks in training are wide."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(teacher_folder("v"))
    module = SiD(pipeline.to(torch.bfloat16), batch_size=4, num_pictures=0)
    fit(module)
    assert module.teacher.network.dtype == torch.bfloat16
    assert {value.dtype for value in module.parameters()} == {torch.float32}


def test_gradients_are_clipped(teacher_folder):
    class Norms(SiD):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.cat(grads).norm()))

    for clip in (None, 0.5):
        norms = []
        fit(build(teacher_folder("v"), Norms, gradient_clip=clip))
        assert len(norms) == 4
        assert norms == pytest.approx([0.5] * 4, rel=1e-4) if clip else min(norms) > 1


# Conditions.


class Told(SiD):
    """Keeps what each network was told."""

    def _update(self, optimizer, n, conditioning, real, turn, objective):
        self.__dict__.setdefault("told", []).append(conditioning)
        return super()._update(optimizer, n, conditioning, real, turn, objective)


def test_classes_are_drawn_or_come_with_the_data(teacher_folder):
    drawn = build(teacher_folder("labelled"), Told, batch_size=32)
    fit(drawn, max_steps=3)
    labels = [told["class_labels"] for told in drawn.told]
    assert torch.equal(labels[0], labels[1])  # both updates are about the same
    assert not torch.equal(labels[0], labels[2])
    assert torch.cat(labels).unique().tolist() == [0, 1, 2, 3]
    given = build(teacher_folder("labelled"), Told)
    fit(given, PromptData(num_classes=4, batch_size=5, batches_per_epoch=2))
    assert {told["class_labels"].shape for told in given.told} == {(5,)}
    with pytest.raises(ValueError, match=r"^labels run from \d to [4-9]: they must be 0 to 3\.$"):
        fit(build(teacher_folder("labelled")), Digits(8, batch_size=64))
    given = build(teacher_folder("labelled"), Told)
    pair = [torch.zeros(3, 3, 8, 8), torch.tensor([3, 1, 0], dtype=torch.int8)]
    fit(given, batches(pair, pair))
    assert all(told["class_labels"].tolist() == [3, 1, 0] for told in given.told)
    with pytest.raises(ValueError, match=r"^SiD takes batches .*, or images alone, got a list of 3: "):
        fit(build(teacher_folder("labelled")), batches([*pair, pair[1]], pair))
    with pytest.raises(ValueError, match=r"^SiD must know how many.*'prompt' \(a list of texts\).* one of \['name'\]"):
        fit(build(teacher_folder("labelled")), batches({"name": "a"}, {"name": "b"}))


def test_a_transformer_sees_the_classes_it_is_given(teacher_folder):
    """In train mode each block of diffusers' DiT forgets one label in ten."""
    module = build(teacher_folder("dit"), condition_dropout=0.5, batch_size=64)
    fit(module, max_steps=1)
    x, sigma = torch.randn(64, 4, 8, 8), torch.full((64,), 2.0)
    labels = {"class_labels": torch.arange(64) % 10}
    for network in (module.networks.generator, module.networks.fake_score):
        assert network.training
        assert torch.equal(network(x, sigma, **labels), network(x, sigma, **labels))
        torch.testing.assert_close(network(x, sigma, **labels), copy.deepcopy(network).eval()(x, sigma, **labels))
    dropped = torch.tensor([True, False] * 32)
    found = module._dropped(labels, dropped)["class_labels"]
    assert torch.equal(found, torch.where(dropped, 10, labels["class_labels"]))
    with pytest.raises(ValueError, match=r"^labels run from 10 to 10: they must be 0 to 9\.$"):
        module.sample(1, labels=torch.tensor([10]))  # what it takes for no class


def test_guidance_of_teacher_and_fake_score(teacher_folder):
    """The first update with guidance of the teacher alone, where nothing would move without; and what it is."""
    for fake_guidance, moves in ((None, False), (1.0, True)):
        module = build(teacher_folder("dit"), Told, guidance=3.0, fake_guidance=fake_guidance, fake_lr=1e-30)
        run = fit(module, max_steps=1)
        assert bool(moved(module)) == moves
        assert (run.callback_metrics["train/divergence"] > 0) == moves
    x, sigma = torch.randn(4, 4, 8, 8), torch.rand(4) + 0.5
    labels, null = module.told[0]["class_labels"], torch.full((4,), 10)
    teacher = module.teacher.denoiser
    with_class, without = (teacher(x, sigma, class_labels=value) for value in (labels, null))
    guided = module._score(teacher, {"class_labels": labels}, 3.0)(x, sigma)
    torch.testing.assert_close(guided, without + 3 * (with_class - without))
    assert module.teacher_sample(2, num_steps=2).shape == module.sample(2).shape == (2, 3, 16, 16)


def test_texts(teacher_folder, tmp_path):
    """Prompts come with the batches; samples, pictures and predictions have them too."""
    file = tmp_path / "prompts.txt"
    file.write_text("a b c\nd\n")
    data = PromptData(prompt_file=str(file), batch_size=2, batches_per_epoch=2, num_eval=3)
    options = {"guidance": 1.5, "condition_dropout": 0.3, "noise_levels": "grid", "t_min": 20, "t_max": 980}
    module = build(teacher_folder("sd"), Told, num_pictures=3, teacher_steps=2, alpha=1.0, **options)
    run = fit(module, data, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert {told["encoder_hidden_states"].shape for told in module.told} == {(2, 8, 16)}
    assert not torch.equal(*(told["encoder_hidden_states"][0] for told in module.told[1:3]))
    assert len(list(tmp_path.rglob("images/val/samples/000002.png"))) == 1
    assert module.sample(2, prompts=["a", "b"]).shape == (2, 3, 16, 16)
    first, second = run.predict(module, data)
    assert (first["image"].shape, second["image"].shape) == ((2, 3, 16, 16), (1, 3, 16, 16))
    with pytest.raises(
        ValueError, match=r"^This teacher draws what a text says: give prompts, or PromptData with a fi"
    ):
        module.sample(2)
    with pytest.raises(ValueError, match=r"^prompts must be 2 texts, one for each image, got 1\.$"):
        module.sample(2, prompts=["a"])
    with pytest.raises(ValueError, match=r"^This teacher draws what a text says: give PromptData with a file of promp"):
        fit(build(teacher_folder("sd")))
    with pytest.raises(ValueError, match=r"^prompts were given, but the teacher reads no text: leave them out\.$"):
        fit(build(teacher_folder("ddpm")), batches({"prompt": ["a"]}, {"prompt": ["b"]}))


# Variants of the method.


def test_reverse_kl_grid_and_several_fake_steps(teacher_folder):
    run = fit(build(teacher_folder("v"), loss="reverse_kl", noise_levels="grid", fake_steps=2, weighting="none"))
    assert int(run.optimizers[1].state_dict()["state"][0]["step"]) == 4


def test_adversarial_updates(teacher_folder):
    """SiDA trains with images, moves the generator at the start, and refuses others."""
    data = Digits(8, batch_size=8)
    options = {"adversarial": True, "alpha": 1.0, "generator_after_images": 0, "adversarial_after_images": 0}
    module = build(teacher_folder("ddpm"), fake_lr=1e-30, gradient_clip=1e3, **options)
    run = fit(module, data, max_steps=1)
    assert run.callback_metrics["train/divergence"] == 0  # where SiD alone would not move
    assert moved(module)
    fit(build(teacher_folder("ddpm"), accumulate=3, **options), data)
    batch = next(iter(data.train_dataloader()))
    real = real_images(batch, module.networks.description, torch.float32)
    assert (real.min(), real.max()) == (-1, 1)
    torch.testing.assert_close((real + 1) / 2, batch["image"])
    with pytest.raises(
        ValueError, match=r"^adversarial=True needs images of the teacher's shape, \(3, 8, 8\), got \(1, 8"
    ):
        fit(build(teacher_folder("edm"), **options), data)  # which would be broadcast


def test_parts_of_a_batch_that_is_smaller_than_they_are_many(teacher_folder):
    short = {"index": torch.arange(2)}
    fit(build(teacher_folder("v"), accumulate=4), batches(short, short))


def test_a_teacher_of_flow_matching(tmp_path):
    """At the paper's level and at pure noise, where its own pipelines begin."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        )  # fmt: skip
    network.save_pretrained(tmp_path / "unet")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    noise = torch.randn(2, 1, 8, 8)
    for sigma_init, s in ((2.5, 0.714), (LARGEST_SIGMA, 1.0)):  # s = sigma / (1 + sigma), in thousandths
        module = build(tmp_path, sigma_init=sigma_init)
        fit(module)
        student = module.networks.student.network.eval()
        with torch.no_grad():
            expected = noise - s * student(noise, torch.full((2,), 1000 * s)).sample
            torch.testing.assert_close(module(noise), expected, rtol=1e-4, atol=1e-4)
    assert module.teacher_sample(2, num_steps=3).shape == (2, 1, 8, 8)


def test_clipping_is_part_of_the_generator(teacher_folder):
    """By default where the teacher's scheduler clips; on demand anywhere."""
    noise = 3 * torch.randn(8, 1, 8, 8)
    for name, clip_output, clips in (("ddpm", None, True), ("ddpm", False, False), ("ddpm", True, True)):
        module = build(teacher_folder(name), clip_output=clip_output)
        trainer().predict(module)
        assert (module(noise).abs().max() <= 1) == clips
    module = build(teacher_folder("edm"), clip_output=True)
    trainer().predict(module)
    assert module(3 * torch.randn(8, 3, 8, 8)).abs().max() == 1


# Around training.


def test_pictures_figures_and_predictions(teacher_folder, tmp_path):
    """Student beside teacher, of the same noise; GenerativeEvaluation with real digits; training without a trace."""
    weights = []
    for evaluated in (False, True):
        module = build(teacher_folder("ddpm"), num_pictures=4 if evaluated else 0, teacher_steps=2)
        judge = GenerativeEvaluation(num_samples=40, metrics=["frechet"], batch_size=40, feature="digits")
        data = Digits(8, batch_size=4)
        few = {"limit_train_batches": 2, "limit_val_batches": 2, "log_every_n_steps": 1}
        run = fit(module, data, judge, logger=CSVLogger(tmp_path), **few) if evaluated else fit(module, data, **few)
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert run.callback_metrics["val/frechet_distance"] > 0
    (picture,) = tmp_path.rglob("images/val/samples/000002.png")
    with Image.open(picture) as image:
        assert image.size[0] > 400
    measured = {"val/frechet_distance": run.callback_metrics["val/frechet_distance"].item()}
    assert figures_saved(module) == measured
    run.test(module, data, verbose=False)
    measured["test/frechet_distance"] = run.callback_metrics["test/frechet_distance"].item()
    assert figures_saved(module) == measured
    fit(module, data, max_steps=1, limit_val_batches=0)
    assert figures_saved(module) == measured  # nothing has been measured since
    assert len(list(tmp_path.rglob("images/test/samples/*.png"))) == 1
    logged = next(iter(tmp_path.rglob("metrics.csv"))).read_text().splitlines()[0].split(",")
    names = {"train/fake_loss", "train/generator_loss", "train/divergence", "train/images", "train/nonfinite_samples"}
    assert names | {"images/s"} <= set(logged)


def figures_saved(module):
    """What a checkpoint of now says of them, for the model card."""
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint["sid"]["results"]


def test_sampling(teacher_folder):
    """The same noise for student and teacher, whatever the mode; predictions are their own for each batch."""
    module = build(teacher_folder("labelled"), batch_size=3)
    run = trainer()
    (first,) = run.predict(module)
    (again,) = run.predict(module)
    assert first["image"].shape == (3, 3, 8, 8)
    assert torch.equal(first["image"], again["image"])
    labels = torch.tensor([0, 1, 2, 3, 0])
    two = run.predict(module, batches(*[{"label": labels, "image": torch.zeros(5, 3, 8, 8)}] * 2))
    assert torch.equal(two[0]["label"], labels)
    assert not torch.equal(two[0]["image"], two[1]["image"])
    for drawn in (first, *two):
        assert drawn["image"].min() >= 0 and drawn["image"].max() <= 1

    def seeded():
        return torch.Generator().manual_seed(3)

    one = module.sample(4, labels=labels[:4], generator=seeded())
    other = module.sample(4, labels=labels[1:], generator=seeded())
    assert not torch.equal(one, other)
    assert torch.equal(one, module.train().sample(4, labels=labels[:4], generator=seeded()))
    start = module.networks.start_level
    assert start == pytest.approx(2.5, rel=0.01)
    noise = torch.randn(4, 3, 8, 8, generator=seeded())
    expected = module.teacher.denoiser(
        noise * (1 + start**2) ** 0.5, torch.full((4,), start), class_labels=labels[:4]
    )  # the student is the teacher's network still
    torch.testing.assert_close(one, (expected.clamp(-1, 1) + 1) / 2)
    with pytest.raises(
        ValueError, match=r"^labels must be \(2,\) int64, a class for each image, got \(3,\) torch.int64"
    ):
        module.sample(2, labels=labels[:3])
    plain = build(teacher_folder("ddpm"))
    trainer().predict(plain)
    with pytest.raises(ValueError, match=r"^labels were given, but the teacher has no classes: leave them out\.$"):
        plain.sample(2, labels=labels[:2])


def test_dropout_is_for_training_alone(teacher_folder, tmp_path):
    import diffusers

    teacher = load_teacher(teacher_folder("ddpm"))
    network = diffusers.UNet2DModel.from_config({**teacher.network.config, "dropout": 0.5})
    network.load_state_dict(teacher.network.state_dict())
    network.save_pretrained(tmp_path / "unet")
    teacher.scheduler.save_pretrained(tmp_path / "scheduler")
    module = build(tmp_path)
    fit(module, max_steps=1)
    noise = torch.randn(2, 1, 8, 8)
    assert module.training
    assert torch.equal(module(noise), module(noise))
    assert not torch.equal(*(module.networks.generate(module.networks.generator, noise, {}) for _ in range(2)))
    assert module.networks.student.training  # as it was


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_part_that_is_kept_in_evaluation_mode_stays_there(teacher_folder, tmp_path):
    """Through both updates, samples and pictures; the parts around it go on in train mode."""

    class Frozen(SiD):
        def build_network(self, network):
            network = super().build_network(network)
            network.mid_block.eval()
            return network

    module = build(teacher_folder("ddpm"), Frozen, num_pictures=1, teacher_steps=1)
    fit(module, default_root_dir=tmp_path)
    module.sample(1)
    for denoiser in (module.networks.generator, module.networks.fake_score, module.networks.student):
        kept = {id(part) for part in denoiser.network.mid_block.modules()}
        assert all(part.training != (id(part) in kept) for part in denoiser.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, kept silent
def test_compiled_networks_learn_the_same(teacher_folder):
    """In place, so that a checkpoint's names stay."""

    class Compiled(SiD):
        def build_network(self, network):
            network = super().build_network(network)
            network.compile(backend="aot_eager")
            return network

    own = {"optimizer": sgd, "fake_optimizer": sgd, "lr": 1e-5, "fake_lr": 1e-5}  # the rates are defaults, not read
    states = []
    for cls in (SiD, Compiled):
        module = build(teacher_folder("dit"), cls, batch_size=2, **own)
        fit(module, max_steps=1)
        states.append(module.state_dict())
        assert module.sample(2).shape == (2, 3, 16, 16)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


def sgd(parameters):
    return torch.optim.SGD(parameters, 1e-5)


def test_the_logged_loss_is_the_paper_s(teacher_folder):
    """Of one update, from its draws: the values in the log are means over the batch."""

    class Keeps(SiD):
        def _generator_objective(self, draws, conditioning, real):
            with torch.no_grad():
                images = self.networks.generate(self.networks.generator, draws.latent, conditioning)
                noisy = images + draws.sigma.view(-1, 1, 1, 1) * draws.noise
                scores = (d(noisy, draws.sigma) for d in (self.teacher.denoiser, self.networks.fake_score))
                expected.append(generator_loss(images, *scores, self.alpha).mean())
            return super()._generator_objective(draws, conditioning, real)

    expected = []
    run = fit(build(teacher_folder("v"), Keeps, alpha=0.5))
    assert float(run.callback_metrics["train/generator_loss"]) == pytest.approx(float(expected[-1]), rel=1e-4)
    assert isinstance(run.model, nn.Module)
