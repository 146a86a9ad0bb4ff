"""DiffusionTeacher against diffusers' own noise and targets; running mean, resumed runs, the exported folder."""

import re

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import quiet_trainer, save

from lightning_plugins.core.random_numbers import randn
from lightning_plugins.data import Digits
from lightning_plugins.sid.diffusion_teacher import DiffusionTeacher
from lightning_plugins.sid.sampling import many_steps
from lightning_plugins.sid.teacher import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

TINY = {"block_out_channels": (8, 8), "num_train_timesteps": 100, "pictures_every_n_epochs": 0}


def tiny(**arguments):
    torch.manual_seed(0)
    return DiffusionTeacher(**(TINY | arguments))


def digits():
    return Digits(image_size=8, batch_size=16, num_train=80)


def trainer(folder, *callbacks, **options):
    few = {"max_steps": 5, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    return quiet_trainer(*callbacks, default_root_dir=folder, **(few | options))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and any(name.startswith("average.") for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_loss_is_the_mean_square_of_diffusers_own_target(prediction_type, beta_schedule):
    model = tiny(prediction_type=prediction_type, beta_schedule=beta_schedule, conditional=True, num_classes=3)
    batch = {"image": torch.rand(6, 1, 8, 8, generator=seeded(1)), "label": torch.tensor([0, 1, 2, 2, 1, 0])}
    random = seeded(2)
    t = torch.randint(100, (6,), generator=random)
    noise = torch.randn(6, 1, 8, 8, generator=random)

    scheduler, clean = model.build_scheduler(), 2 * batch["image"] - 1
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, t)
    network = model.denoiser.network
    output = network(scheduler.add_noise(clean, noise, t), t, class_labels=batch["label"]).sample
    expected = torch.nn.functional.mse_loss(output, target)
    loss = model.loss(batch, seeded(2))["denoising"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)

    gradients = [torch.autograd.grad(value, network.conv_in.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_last_level_is_noise_however_many_there_are():
    for steps in (50, 100, 1000):
        alphas = tiny(num_train_timesteps=steps).build_scheduler().alphas_cumprod
        assert 0 < alphas[-1] < 2e-4 and alphas[0] > 0.99


class Weights(Callback):
    """One parameter after each step."""

    def on_train_start(self, trainer, pl_module):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.denoiser.network.conv_in.weight.detach().double().clone())


def test_running_mean_and_learning(tmp_path):
    weights, model = Weights(), tiny(ema_decay=0.6, lr=5e-3)
    mean = model.average.network.conv_in.weight.double().clone()
    before = trainer(tmp_path).validate(model, digits(), verbose=False)[0]["val/loss"]
    fitted = trainer(tmp_path, weights, max_steps=40, limit_val_batches=0)
    fitted.fit(model, digits())
    assert len(weights.seen) == 40
    for n, weight in enumerate(weights.seen, 1):
        decay = min(0.6, (1 + n) / (10 + n))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(model.average.network.conv_in.weight.double(), mean, rtol=1e-5, atol=1e-6)
    assert fitted.optimizers[0].param_groups[0]["lr"] == 0  # after the last step
    assert not any(p.requires_grad for p in model.average.parameters())

    after = [trainer(tmp_path).validate(model, digits(), verbose=False)[0]["val/loss"] for _ in range(2)]
    assert after[0] == after[1] < 0.5 * before


def test_resumed_run_equals_uninterrupted(tmp_path):
    whole, resumed = tiny(), tiny()
    run = {"accumulate_grad_batches": 2, "max_steps": 4}  # epochs of five batches, three steps
    trainer(tmp_path, **run).fit(whole, digits())

    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.raises(SystemExit):  # Lightning's answer to KeyboardInterrupt
        trainer(tmp_path, save, StopAt(3), **run).fit(tiny(), digits())
    torch.manual_seed(99)
    torch.randn(7)
    trainer(tmp_path, **run).fit(resumed, digits(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert_same_weights(whole, resumed)

    loaded = DiffusionTeacher.load_from_checkpoint(tmp_path / "step=2.ckpt", weights_only=True)
    assert loaded.sample(2, num_steps=3, generator=seeded()).shape == (2, 1, 8, 8)


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Noise(DiffusionTeacher):
    """Keeps a little of the noise of each training batch."""

    def loss(self, batch, generator):
        self.__dict__.setdefault("noise", []).append(randn((len(batch["image"]), 3), generator))
        return super().loss(batch, generator)


def test_noise_differs_from_batch_to_batch_and_not_by_global_state(tmp_path):
    drawn = []
    for state, seed in ((0, 0), (5, 0), (0, 1)):
        model = Noise(**(TINY | {"seed": seed}))
        torch.manual_seed(state)
        trainer(tmp_path, max_steps=10, limit_val_batches=0).fit(model, digits())  # two epochs of five batches
        drawn.append(torch.cat(model.noise))
    assert len(drawn[0].unique(dim=0)) == len(drawn[0]) == 2 * 80
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.isin(drawn[0], drawn[2]).any()


def test_bf16_mixed_trains_and_true_half_is_refused(tmp_path):
    model = tiny()
    start = model.average.network.conv_in.weight.clone()
    trainer(tmp_path, precision="bf16-mixed", max_steps=2).fit(model, digits())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert not torch.equal(start, model.average.network.conv_in.weight)
    with pytest.raises(ValueError, match=r"running mean .* rounds to no change: use 'bf16-mixed'"):
        trainer(tmp_path, precision="bf16-true").fit(tiny(), digits())


def test_samples_pictures_and_predictions(tmp_path):
    model = tiny(conditional=True, pictures_every_n_epochs=1)
    images = model.sample(5, generator=seeded(), num_steps=4)
    assert images.shape == (5, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, model.sample(5, generator=seeded(), num_steps=4))
    noise = torch.randn(5, 1, 8, 8, generator=seeded())
    classes = [torch.full((5,), label) for label in (2, 3)]
    for labels in classes:
        expected = many_steps(model.average, noise, 4, {"class_labels": labels}) / 2 + 0.5
        ours = model.sample(5, labels=labels, generator=seeded(), num_steps=4)
        torch.testing.assert_close(ours, expected.clamp(0, 1), rtol=0, atol=1e-5)

    run = trainer(tmp_path, limit_predict_batches=1)
    run.validate(model, digits(), verbose=False)
    assert len(list(tmp_path.glob("images/val/samples/*.png"))) == 1
    (predicted,) = run.predict(model, digits())
    assert predicted["image"].shape == (16, 1, 8, 8)

    for labels, words in (
        (torch.zeros(4, dtype=torch.int64), r"labels must be \(5,\) int64"),
        (torch.full((5,), 10), "labels run from 10 to 10: they must be 0 to 9"),
    ):
        with pytest.raises(ValueError, match=words):
            model.sample(5, labels=labels)
    with pytest.raises(ValueError, match="is not conditional"):
        tiny().sample(5, labels=classes[0])


def test_sampling_leaves_every_part_in_the_mode_it_was_in():
    model = tiny().train()
    kept = {id(part) for part in model.average.network.mid_block.eval().modules()}
    model.sample(1, num_steps=1)
    assert all(part.training != (id(part) in kept) for part in model.modules())


@pytest.mark.parametrize("conditional", [False, True])
def test_exported_folder_samples_the_same_in_plain_diffusers(tmp_path, conditional):
    import diffusers

    width = 8 if conditional else 12
    model = tiny(image_shape=(3, 8, width), conditional=conditional, num_classes=4, prediction_type="v_prediction")
    for parameter in model.average.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=seeded()), alpha=0.1)
    folder = model.export(tmp_path / "new" / "teacher")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]

    teacher = load_teacher(folder)
    labels = torch.tensor([3, 0]) if conditional else None
    conditioning = {"class_labels": labels} if conditional else {}
    assert teacher.sample_shape == (3, 8, width) and teacher.num_classes == (4 if conditional else None)
    ours = model.sample(2, labels=labels, generator=seeded(), num_steps=1)
    noise = torch.randn(2, 3, 8, width, generator=seeded())
    theirs = teacher.decode(many_steps(teacher.denoiser, noise, 1, conditioning))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if conditional:
        images = pipeline(2, class_labels=labels, latents=noise, num_inference_steps=1, output_type="pt").images
    else:
        assert isinstance(pipeline, diffusers.DDPMPipeline)
        assert pipeline(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, width, 3)
        ddim = diffusers.DDIMPipeline(pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config))
        ddim.set_progress_bar_config(disable=True)
        images = ddim(2, generator=seeded(), num_inference_steps=1, output_type="np").images
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, ours, rtol=0, atol=1e-5)


def test_export_is_all_or_nothing(tmp_path, monkeypatch):
    import diffusers

    folder = tmp_path / "teacher"
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path, fast_dev_run=True).fit(tiny(export_to="teacher"), digits())
    assert list(tmp_path.iterdir()) == []

    def full(self, save_directory, **_):
        (save_directory / "half").touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(diffusers.DDPMPipeline, "save_pretrained", full)
        tiny().export(folder)
    assert list(tmp_path.iterdir()) == []

    model = tiny(export_to="teacher")
    trainer(tmp_path, max_steps=1).fit(model, digits())
    exported, average = load_teacher("teacher").network.state_dict(), model.average.network.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in exported.items())

    again = tiny(export_to="teacher")
    for refused in (lambda: again.export(folder), lambda: trainer(tmp_path).fit(again, digits())):
        with pytest.raises(FileExistsError, match="exists and is not empty: move it away"):
            refused()
    assert again.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_shape": (1, 7, 8)}, r"\(1, 7, 8\) cannot be halved 1 times, .* multiples of 2 px"),
        ({"image_shape": (1, 28, 28), "block_out_channels": (8, 8, 8, 8)}, "multiples of 8 px"),
        ({"block_out_channels": (8, 12)}, r"block_out_channels=\[8, 12\] must be multiples of 8"),
        ({"block_out_channels": ()}, r"block_out_channels=\(\) must be"),
        ({"attention_levels": 3}, "attention_levels=3 is more than the 2 levels"),
        ({"prediction_type": "sample"}, "'sample' must be one of epsilon, v_prediction"),
        ({"beta_schedule": "cosine"}, "'cosine' must be one of linear, squaredcos_cap_v2"),
        ({"num_train_timesteps": 10}, "num_train_timesteps=10 must be 50 or more"),
        ({"image_shape": (1, 8, 16), "conditional": True}, "a conditional model needs square images"),
        ({"lr": 0}, "lr=0 must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must lie in \[0, 1\)"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny(**arguments)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"built for image_shape=\(1, 8, 8\), got images \(3, 8, 8\)"):
        tiny().loss({"image": torch.rand(2, 3, 8, 8)}, seeded())


@pytest.mark.parametrize("conditional", [False, True])
def test_the_folder_has_a_card_whose_example_runs(tmp_path, monkeypatch, conditional):
    """What was trained, on how many steps, what it measured: also from a checkpoint, and in its header for the Hub."""
    model = tiny(conditional=conditional, export_to=str(tmp_path / "folder"))
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=3)
    run.fit(model, digits())
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "diffusers"
    assert "| steps | 3 |" in card
    assert f"| val/loss | {float(run.callback_metrics['val/loss']):.4g} |" in card
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionTeacher.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.export(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == card
    monkeypatch.chdir(tmp_path / "folder")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(compile(code.replace("num_inference_steps=50", "num_inference_steps=2"), "README.md", "exec"), {})
    assert (tmp_path / "folder" / "sample.png").is_file()


@pytest.mark.parametrize("record", [None, 3, {"results": 3}, {"results": {"a": "b"}}, {"results": {"a|b": 1.0}}])
def test_what_a_checkpoint_says_of_results_is_data(tmp_path, record):
    save(tiny(), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**content, "diffusion_teacher": record}, tmp_path / "a.ckpt")
    DiffusionTeacher.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).export(tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert ("| a\\|b | 1 |" in card) == (record == {"results": {"a|b": 1.0}})
