"""Activation checkpointing in SiD and DiffusionTeacher: less is kept, gradients are the same through all networks."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from saved_activations import kept_bytes
from torch import nn
from trainers import quiet_trainer

from lightning_plugins import DiffusionTeacher, Digits, ODEDiagnostics, SiD
from lightning_plugins.core.activation_checkpointing import checkpoint_activations
from lightning_plugins.sid.teacher import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

CONDITIONS = {
    "labelled": lambda: {"class_labels": torch.tensor([1, 3])},
    "dit": lambda: {"class_labels": torch.tensor([1, 7])},
    "sd": lambda: {"encoder_hidden_states": torch.randn(2, 8, 16, dtype=torch.float64)},
    "flow": lambda: {
        "encoder_hidden_states": torch.randn(2, 8, 16, dtype=torch.float64),
        "pooled_projections": torch.randn(2, 16, dtype=torch.float64),
    },
}
TINY = {"block_out_channels": (8, 8), "num_train_timesteps": 100, "pictures_every_n_epochs": 0}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["ddpm", *CONDITIONS])
def test_each_network_keeps_less_and_has_the_same_gradients(name, trained, teacher_folder):
    """Also by its input alone, as a frozen teacher is differentiated; in train mode, where a DiT drops labels."""
    network = load_teacher(teacher_folder(name)).network.double().requires_grad_(trained).train()
    torch.manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    x = torch.randn(2, network.config.in_channels, 8, 8, dtype=torch.float64, requires_grad=True)
    conditions = CONDITIONS.get(name, dict)()

    def loss():
        torch.manual_seed(1)
        return network(x, timestep=torch.tensor([5, 400]), **conditions)[0].square().sum()

    wanted = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    expected, whole = kept_bytes(loss, network.parameters())
    gradients = torch.autograd.grad(expected, wanted, allow_unused=True)
    checkpoint_activations(network)
    found, kept = kept_bytes(loss, network.parameters())
    assert kept < 0.6 * whole and torch.equal(found, expected)
    for gradient, again in zip(gradients, torch.autograd.grad(found, wanted, allow_unused=True), strict=True):
        assert gradient is again is None or torch.equal(gradient, again)


def distil(folder, on, *callbacks, ckpt_path=None, kind=SiD, dropout=0.0, max_steps=3, precision="64-true", **options):
    """Some updates, with dropout in the trained networks."""

    class Dropped(kind):
        def build_network(self, network):
            copied = super().build_network(network)
            for part in copied.modules():
                if isinstance(part, nn.Dropout):
                    part.p = dropout
            return copied

    torch.manual_seed(2)
    defaults = {"batch_size": 4, "num_pictures": 0, "updates_per_epoch": 4, "lr": 1e-3, "fake_lr": 2e-3}
    model = Dropped(teacher=str(folder), activation_checkpointing=on, **(defaults | options))
    trainer = quiet_trainer(*callbacks, max_steps=max_steps, precision=precision, limit_val_batches=0)
    trainer.fit(model, ckpt_path=ckpt_path)
    return model


def assert_same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


SETUPS = {
    "plain": ("ddpm", {}),
    "dropout": ("ddpm", {"dropout": 0.3}),
    "bf16-mixed": ("ddpm", {"precision": "bf16-mixed", "dropout": 0.3}),
    "accumulate": ("labelled", {"accumulate": 2, "fake_steps": 2}),
    "guidance": ("dit", {"guidance": 2.0, "condition_dropout": 0.5}),
    "lora": ("ddpm", {"lora_rank": 2, "dropout": 0.3}),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_distilled_student_is_the_same_to_the_bit(setup, teacher_folder):
    name, options = SETUPS[setup]
    one, other = (distil(teacher_folder(name), on, **options) for on in (False, True))
    assert_same(one, other)
    nets = other.networks
    recomputed = {part: part.network.is_gradient_checkpointing for part in (nets.generator, nets.fake_score)}
    assert all(recomputed.values()) and other.teacher.network.is_gradient_checkpointing
    assert not one.teacher.network.is_gradient_checkpointing and not nets.student.network.is_gradient_checkpointing


def test_the_adversary_reads_the_encoder_of_a_recomputed_network(teacher_folder):
    data = Digits(image_size=8, batch_size=4, num_train=12)
    runs = []
    for on in (False, True):
        torch.manual_seed(2)
        model = SiD(
            teacher=str(teacher_folder("ddpm")),
            adversarial=True,
            alpha=1.0,
            generator_after_images=0,
            adversarial_after_images=0,
            lr=1e-3,
            activation_checkpointing=on,
            num_pictures=0,
        )
        quiet_trainer(max_steps=3, precision="64-true", limit_val_batches=0).fit(model, data)
        runs.append(model)
    assert_same(*runs)


class Counted(SiD):
    """How much each update's forward pass keeps for its backward pass, by the network that it trains."""

    def _counted(self, objective, *arguments):
        nets = (self.networks.generator, self.networks.fake_score, self.teacher.denoiser)
        parameters = [parameter for net in nets for parameter in net.parameters()]
        output, size = kept_bytes(lambda: objective(*arguments), parameters)
        self.__dict__.setdefault("kept", []).append(size)
        return output

    def _fake_objective(self, *arguments):
        return self._counted(super()._fake_objective, *arguments)


def test_an_update_keeps_less(teacher_folder):
    kept = [distil(teacher_folder("ddpm"), on, kind=Counted).kept for on in (False, True)]
    assert max(kept[1]) < 0.7 * min(kept[0])


def test_distillation_goes_on_from_a_checkpoint_and_exports_the_same(teacher_folder, tmp_path):
    folder = teacher_folder("ddpm")
    saves = [ModelCheckpoint(tmp_path / str(on), "{step}", every_n_train_steps=2, save_top_k=-1) for on in (0, 1)]
    whole = distil(folder, False, saves[0], max_steps=4)
    again = distil(folder, True, saves[1], max_steps=4)
    assert_same(whole, again)
    states = [torch.load(tmp_path / str(on) / "step=2.ckpt", weights_only=True) for on in (0, 1)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    for on, path in ((True, tmp_path / "0" / "step=2.ckpt"), (False, tmp_path / "1" / "step=2.ckpt")):
        assert_same(whole, distil(folder, on, max_steps=4, ckpt_path=path))
    exported = [model.export(tmp_path / f"export{k}") for k, model in enumerate((whole, again))]
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        assert (exported[0] / name).read_bytes() == (exported[1] / name).read_bytes()
    loaded = SiD.load_from_checkpoint(tmp_path / "1" / "step=2.ckpt", weights_only=True)
    assert loaded.sample(2).isfinite().all()


def train(on, *callbacks):
    torch.manual_seed(0)
    model = DiffusionTeacher(**TINY, activation_checkpointing=on)
    for part in model.denoiser.network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    data = Digits(image_size=8, batch_size=8, num_train=32)
    trainer = quiet_trainer(*callbacks, max_steps=4, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(model, data)
    return model, trainer


def test_a_teacher_trained_with_dropout_is_the_same_to_the_bit(tmp_path):
    (one, _), (other, _) = (train(on) for on in (False, True))
    assert other.denoiser.network.is_gradient_checkpointing and not other.average.network.is_gradient_checkpointing
    assert_same(one, other)
    folders = [model.export(tmp_path / str(k)) for k, model in enumerate((one, other))]
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_diagnostics_of_a_teacher_see_the_same(tmp_path):
    logged = []
    for on in (False, True):
        _, trainer = train(on, ODEDiagnostics(every_n_steps=1))
        logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("ode/")})
    assert len(logged[0]) >= 3
    for name in logged[0].keys() - {name for name in logged[0] if "seconds" in name or "time" in name}:
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-4, abs=1e-6), name


class Own(DiffusionTeacher):
    """With a network of which no library knows blocks."""

    def build_network(self):
        network = super().build_network()
        network._supports_gradient_checkpointing = False
        return network


def test_a_class_without_it_is_refused_before_training(teacher_folder):
    model = Own(**TINY, activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"^activation_checkpointing=True is not possible with UNet2DModel, "):
        quiet_trainer(max_steps=1).fit(model, Digits(image_size=8, batch_size=8, num_train=16))
    for kind, arguments in ((SiD, {"teacher": str(teacher_folder("ddpm"))}), (DiffusionTeacher, {})):
        with pytest.raises(ValueError, match="activation_checkpointing='yes' must be"):
            kind(activation_checkpointing="yes", **arguments)
