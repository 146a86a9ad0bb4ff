"""A learning rate beside an optimizer that does not read it is refused in Python, too, where it can be told."""

from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from trainers import save

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, SiD, UniLMSeq2Seq

SGD, STEP = partial(torch.optim.SGD, lr=0.1), partial(StepLR, step_size=1)
TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {
    CapsNet: {"image_shape": (1, 8, 8), "channels": 8, "num_types": 2, "kernel_size": 2},
    EAE: {"image_shape": (1, 8, 8), "network": "mlp", "latent_dim": 2},
    UniLMSeq2Seq: {"config": TINY},
    DiffusionTeacher: {"block_out_channels": (8, 16)},
    SiD: {"teacher": "teacher"},
}
REPLACED = [(cls, replacing, name) for cls in SMALL for replacing, names in cls.replaced_by.items() for name in names]
VALUES = {"betas": (0.1, 0.9), "lr_decay_steps": 7, "warmup_steps": 3, "warmup": 3}


@pytest.fixture(autouse=True)
def teacher():
    DiffusionTeacher(block_out_channels=(8, 16)).export("teacher")


@pytest.mark.parametrize(("cls", "replacing", "name"), REPLACED)
def test_given_together_they_are_refused(cls, replacing, name):
    others = {other: STEP if other == "scheduler" else torch.optim.SGD for other in replacing}
    value = VALUES.get(name, 0.25)
    told = rf"^{name}=.* was given, but {replacing[0]}=.* takes its place: leave {name} out, and say it in the "
    with pytest.raises(ValueError, match=told):
        cls(**SMALL[cls], **{name: value}, **others)
    cls(**SMALL[cls], **{name: value})
    model = cls(**SMALL[cls], **others)
    said = {other: partial(torch.optim.SGD, **{name: value}) for other in replacing}
    if "scheduler" not in replacing:
        cls(**SMALL[cls], **{name: value}, **said)  # which says itself what it trains with
    assert model.replaced_by is cls.replaced_by


class Own(EAE):
    """With a rate of its own by default, and an optimizer if asked for."""

    def __init__(self, lr: float = 0.3, momentum: float | None = None, **kwargs):
        optimizer = None if momentum is None else partial(torch.optim.SGD, momentum=momentum)
        super().__init__(lr=lr, optimizer=optimizer, **kwargs)


class Passing(EAE):
    def __init__(self, extra: int = 0, **kwargs):
        super().__init__(**kwargs)


def test_a_subclass_is_asked_for_what_it_was_given():
    small = SMALL[EAE]
    Own(momentum=0.9, **small)  # the rate is the class's own word
    with pytest.raises(ValueError, match=r"lr=0\.2 was given, but optimizer=partial takes its place"):
        Own(lr=0.2, momentum=0.9, **small)
    with pytest.raises(ValueError, match=r"lr=0\.0005 was given"):
        Passing(lr=5e-4, optimizer=torch.optim.SGD, **small)  # the default, but said


def test_a_checkpoint_of_before_loads():
    model = EAE(lr=0.25, **SMALL[EAE])
    save(model, "one.ckpt")
    content = torch.load("one.ckpt", weights_only=True)
    content["hyper_parameters"]["optimizer"] = "not-stored-in-the-checkpoint SGD"
    torch.save(content, "one.ckpt")
    again = EAE.load_from_checkpoint("one.ckpt", optimizer=SGD)
    assert again.lr == 0.25
    with pytest.raises(ValueError, match=r"lr=0\.25 was given"):
        EAE(lr=0.25, optimizer=torch.optim.SGD, **SMALL[EAE])  # afterwards as before
