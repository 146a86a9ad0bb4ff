"""What ``new`` writes: for each part a class, a config that names it, and a test, with NAME and MODULE for its own."""

CAPSNET = '''\
"""NAME: a capsule network of your own. MODULE.yaml trains it, test_MODULE.py tries it."""

from typing import Any

from torch import Tensor, nn

from lightning_plugins import CapsNet
from lightning_plugins.capsnet import PrimaryCapsules


class NAME(CapsNet):
    """A capsule network with features of its own and a term more in its loss.

    Args:
        width: channels of the two convolutions.
        penalty: factor, 0 or more, on the mean squared length of the class capsules.
        **kwargs: the arguments of CapsNet.
    """

    def __init__(self, width: int = 32, penalty: float = 0.01, **kwargs: Any) -> None:
        # First what is your own: the build_* hooks, which run inside super().__init__(), read it.
        self.width, self.penalty = width, penalty
        super().__init__(**kwargs)  # checkpoints hold these arguments together with yours

    # Leave out the hooks that you do not change; build_capsules and build_decoder are two more.

    def build_features(self) -> nn.Module:
        """The network from images (B, C, H, W) to input capsules (B, N, D)."""
        return nn.Sequential(
            nn.Conv2d(self.image_shape[0], self.width, 5),
            nn.ReLU(),
            nn.Conv2d(self.width, self.width, 5),
            nn.ReLU(),
            PrimaryCapsules(self.width, num_types=8, dim=8, kernel_size=5),
        )

    def loss(self, batch: Any, poses: Tensor | None = None) -> dict[str, Tensor]:
        """Named terms, whose sum is trained. Each is logged: train/penalty, val/penalty."""
        poses = self(batch["image"]) if poses is None else poses  # (B, classes, K)
        terms = super().loss(batch, poses)
        terms["penalty"] = self.penalty * poses.square().sum(-1).mean()
        return terms
'''

EAE = '''\
"""NAME: an entropic autoencoder of your own. MODULE.yaml trains it, test_MODULE.py tries it."""

import math
from typing import Any

from torch import Tensor, nn

from lightning_plugins import EAE


class NAME(EAE):
    """An autoencoder with an encoder of its own and a term more in its loss.

    Args:
        hidden: units of the encoder's hidden layer.
        penalty: factor, 0 or more, on the mean absolute value of the codes.
        **kwargs: the arguments of EAE.
    """

    def __init__(self, hidden: int = 256, penalty: float = 0.01, **kwargs: Any) -> None:
        # First what is your own: the build_* hooks, which run inside super().__init__(), read it.
        self.hidden, self.penalty = hidden, penalty
        super().__init__(**kwargs)  # checkpoints hold these arguments together with yours

    # Leave out the hooks that you do not change; build_decoder is one more.

    def build_encoder(self) -> nn.Module:
        """The network from images (B, C, H, W) to codes (B, latent_dim); batch norm comes after it."""
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(self.image_shape), self.hidden),
            nn.GELU(),
            nn.Linear(self.hidden, self.latent_dim),
        )

    def loss(self, batch: Any, codes: Any = None) -> dict[str, Tensor]:
        """Named terms, whose sum is trained. Each is logged: train/penalty."""
        label = batch["label"] if self.conditional else None
        codes = self.codes(batch["image"], label) if codes is None else codes
        terms = super().loss(batch, codes)
        terms["penalty"] = self.penalty * codes.own.abs().mean()  # codes.own are (B, latent_dim)
        return terms
'''

UNILM = '''\
"""NAME: a sequence-to-sequence model of your own. MODULE.yaml trains it, test_MODULE.py tries it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_plugins import UniLMSeq2Seq


class NAME(UniLMSeq2Seq):
    """A UniLM whose logits are kept small by a term more in its loss.

    Args:
        z_weight: factor, 0 or more, on the mean squared logarithm of the softmax's denominator.
        **kwargs: the arguments of UniLMSeq2Seq.
    """

    def __init__(self, z_weight: float = 1e-4, **kwargs: Any) -> None:
        self.z_weight = z_weight
        super().__init__(**kwargs)  # checkpoints hold these arguments together with yours

    # Further hooks: build_tokenizer, build_network and build_inputs, what the network reads of a batch.

    def loss(self, batch: Any, inputs: Any = None) -> dict[str, Tensor]:
        """Named terms, whose sum is trained. Each is logged: train/nll, train/z_loss."""
        inputs = self.build_inputs(batch) if inputs is None else inputs
        logits = self.logits(inputs).float()  # (N, vocabulary) of the N predicted tokens
        count = max(len(inputs.labels), 1)
        nll = F.cross_entropy(logits, inputs.labels, label_smoothing=self.label_smoothing, reduction="sum") / count
        z_loss = self.z_weight * logits.logsumexp(-1).square().sum() / count
        return {"nll": nll, "z_loss": z_loss}
'''

SID = '''\
"""NAME: score distillation of your own. MODULE.yaml trains it, test_MODULE.py tries it."""

from typing import Any

from torch import nn

from lightning_plugins import SiD


class NAME(SiD):
    """Distillation in which some of the networks' weights stay the teacher's.

    Args:
        frozen: beginning of the names of parameters that are not trained, such as conv_in.
        **kwargs: the arguments of SiD.
    """

    def __init__(self, frozen: str = "conv_in", **kwargs: Any) -> None:
        self.frozen = frozen
        super().__init__(**kwargs)  # checkpoints hold these arguments together with yours

    def build_network(self, network: nn.Module) -> nn.Module:
        """A trainable copy of the teacher's network; called for the generator and for the fake score."""
        network = super().build_network(network)
        for name, parameter in network.named_parameters():
            if name.startswith(self.frozen):
                parameter.requires_grad_(False)
        return network
'''

CALLBACK = '''\
"""NAME: a callback of your own. MODULE.yaml adds it to a run, test_MODULE.py tries it."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class NAME(Callback):
    """Logs how large the weights are, for any module.

    Args:
        every_n_steps: optimizer steps from one figure to the next.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more.")
        self.every_n_steps = every_n_steps

    # Of Lightning's hooks (setup, on_fit_start, on_before_optimizer_step, on_validation_epoch_end and many more) write
    # those that you need. What must outlive a resumed run is returned by state_dict and taken by load_state_dict.

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norm of all weights."""
        if trainer.global_step % self.every_n_steps == 0:
            with torch.no_grad():
                norms = torch.stack([parameter.float().norm() for parameter in pl_module.parameters()])
            pl_module.log("MODULE/weight_norm", norms.norm(), batch_size=1)
'''

# The configs: the model first, then what all of them have.

_TRAINER = """\
trainer:
  max_epochs: 10
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        save_last: true # test, go on: --ckpt_path last
    - class_path: RandomState
"""
_DIGITS = """\
data:
  class_path: Digits
  init_args:
    batch_size: 64
"""
_HEAD = """\
# NAME WHAT.
# Command: lightning-plugins fit --config MODULE.yaml
seed_everything: 0
model:
  class_path: MODULE.NAME
  init_args:
"""
CONFIGS = {
    "capsnet": _HEAD.replace("WHAT", "on real handwritten digits")
    + """\
    width: 16
    penalty: 0.01
    lr: 2.0e-3
"""
    + _DIGITS
    + _TRAINER,
    "eae": _HEAD.replace("WHAT", "on real handwritten digits")
    + """\
    hidden: 256
    penalty: 0.01
    network: mlp # the decoder's; the encoder is your own
    latent_dim: 8
"""
    + _DIGITS.replace("batch_size", "image_size: 8\n    batch_size")
    + _TRAINER,
    "unilm": _HEAD.replace("WHAT", "from scratch, on docstrings of the installed Python and their summary lines")
    + """\
    z_weight: 1.0e-4
    config:
      model_type: bert
      hidden_size: 128
      num_hidden_layers: 2
      num_attention_heads: 4
      intermediate_size: 512
      max_position_embeddings: 192
    lr: 1.0e-3
    num_generate: 32
data:
  class_path: PythonDocstrings
  init_args:
    batch_size: 16
"""
    + _TRAINER,
    "sid": _HEAD.replace("WHAT", "on a diffusion model of digits, which this command trains and writes first:")
    .replace(
        "# Command:",
        "#   lightning-plugins fit --config sid/digits_teacher --model.export_to digits_teacher\n# Command:",
    )
    .replace("first:.", "first:")
    + """\
    teacher: digits_teacher
    frozen: conv_in
    alpha: 1.0
    lr: 5.0e-4
    fake_lr: 5.0e-4
    batch_size: 64
    updates_per_epoch: 100
"""
    + _TRAINER,
    "callback": """\
# NAME in a run of CapsNet on real handwritten digits.
# Command: lightning-plugins fit --config MODULE.yaml
seed_everything: 0
model:
  class_path: CapsNet
  init_args:
    channels: 16
    num_types: 4
"""
    + _DIGITS
    + _TRAINER
    + """\
    - class_path: MODULE.NAME
      init_args:
        every_n_steps: 10
""",
}

# The tests.

_RUN = '''\


def trainer(folder):
    """Two steps, on the CPU, in silence."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    return Trainer(default_root_dir=folder, accelerator="cpu", **quiet, **limits)
'''
_OF_IMAGES = (
    '''\
"""NAME trains, and comes back from a checkpoint with its own arguments: pytest test_MODULE.py"""

import torch
from lightning.pytorch import Trainer
from MODULE import NAME

from lightning_plugins import Digits

SMALL = ARGUMENTS
'''
    + _RUN
    + """\


def test_it_trains_and_comes_back(tmp_path):
    data = Digits(OPTIONSbatch_size=16)
    model = NAME(image_shape=data.image_shape, **SMALL)
    run = trainer(tmp_path)
    run.fit(model, data)
    assert run.callback_metrics["train/penalty"] > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = NAME.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.penalty == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
"""
)
TESTS = {
    "capsnet": _OF_IMAGES.replace("OPTIONS", "").replace("ARGUMENTS", '{"width": 8, "penalty": 0.5}'),
    "eae": _OF_IMAGES.replace("OPTIONS", "image_size=8, ").replace(
        "ARGUMENTS", '{"hidden": 16, "penalty": 0.5, "network": "mlp", "latent_dim": 4}'
    ),
    "unilm": '''\
"""NAME trains, writes, and comes back from a checkpoint with its own arguments: pytest test_MODULE.py"""

from lightning.pytorch import Trainer
from MODULE import NAME

from lightning_plugins import Seq2SeqData

TINY = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
'''
    + _RUN
    + """\


def test_it_trains_writes_and_comes_back(tmp_path):
    rows = [f"one {word} three\\tONE {word.upper()}" for word in ("two", "four", "five", "six")] * 8
    (tmp_path / "pairs.tsv").write_text("\\n".join(["source\\ttarget", *rows]))
    sizes = {"vocab_size": 60, "batch_size": 4, "val_size": 8, "max_source_length": 12, "max_target_length": 8}
    data = Seq2SeqData(train_file=str(tmp_path / "pairs.tsv"), **sizes)
    model = NAME(config=TINY, z_weight=0.5, generation={"max_new_tokens": 4})
    run = trainer(tmp_path)
    run.fit(model, data)
    assert run.callback_metrics["train/z_loss"] > 0
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = NAME.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.z_weight == 0.5
    assert again.generate_text(["one two three"]) == model.generate_text(["one two three"])
""",
    "sid": '''\
"""NAME trains, draws, and comes back from a checkpoint with its own arguments: pytest test_MODULE.py"""

import torch
from lightning.pytorch import Trainer
from MODULE import NAME

from lightning_plugins import DiffusionTeacher
'''
    + _RUN
    + """\


def test_it_trains_draws_and_comes_back(tmp_path):
    teacher = DiffusionTeacher(image_shape=(1, 8, 8), block_out_channels=(8, 16))
    teacher.export(tmp_path / "teacher")
    model = NAME(teacher=str(tmp_path / "teacher"), frozen="conv_out", batch_size=2, num_pictures=0, lr=0.01)
    run = trainer(tmp_path)
    run.fit(model)
    weights = dict(model.networks.generator.network.named_parameters())
    for name, value in teacher.average.network.named_parameters():  # which is what was exported
        assert torch.equal(weights[name], value) == name.startswith("conv_out"), name
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = NAME.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.frozen == "conv_out"
    assert again.sample(2).shape == (2, 1, 8, 8)
""",
    "callback": '''\
"""NAME logs a figure in the run of any module: pytest test_MODULE.py"""

import pytest
from lightning.pytorch import Trainer
from MODULE import NAME

from lightning_plugins import CapsNet, Digits


def test_it_logs_a_figure(tmp_path):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[NAME(every_n_steps=1)], **quiet, **limits)
    run.fit(CapsNet(channels=8, num_types=2), Digits(batch_size=16))
    assert run.callback_metrics["MODULE/weight_norm"] > 0


def test_a_wrong_argument_is_refused():
    with pytest.raises(ValueError, match="every_n_steps=0 must be 1 or more"):
        NAME(every_n_steps=0)
''',
}
CLASSES = {"capsnet": CAPSNET, "eae": EAE, "unilm": UNILM, "sid": SID, "callback": CALLBACK}
