"""A subclass with one argument more and ``**kwargs`` goes everywhere its parent does, by command line and in Python."""

import inspect
import json

import pytest
import torch
from trainers import quiet_trainer

import lightning_plugins
from lightning_plugins import DiffusionTeacher
from lightning_plugins.cli import main

CLASS = '''
class My{parent}({parent}):
    """The parent with its loss weighed."""

    def __init__(self, extra: float = 0.5, **kwargs):
        self.extra = extra
        super().__init__(**kwargs)
'''
LOSS = """
    def loss(self, *args, **kwargs):
        terms = super().loss(*args, **kwargs)
        return terms | {"extra": self.extra * sum(terms.values())}
"""
TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
SEQ2SEQ = {"train_file": "pairs.tsv", "val_size": 8, "test_file": "pairs.tsv", "vocab_size": 60, "batch_size": 4}
SEQ2SEQ |= {"max_source_length": 12, "max_target_length": 8}
DIGITS = {"image_size": 8, "batch_size": 32}
QUIET = {"pictures_every_n_epochs": 0}
# Arguments of each, its data, and what can be done with its checkpoints.
MODELS = {
    "CapsNet": ({"channels": 8, "num_types": 2, "kernel_size": 2, **QUIET}, ("Digits", DIGITS), ()),
    "EAE": ({"network": "mlp", "latent_dim": 2, **QUIET}, ("Digits", DIGITS), ("sample",)),
    "UniLMSeq2Seq": (
        {"config": TINY_BERT, "generation": {"max_new_tokens": 3}},
        ("Seq2SeqData", SEQ2SEQ),
        ("generate", "export"),
    ),
    "DiffusionTeacher": ({"block_out_channels": [8, 16], **QUIET}, ("Digits", DIGITS), ("sample", "export")),
    "SiD": ({"teacher": "teacher", "num_pictures": 0}, ("Digits", DIGITS), ("sample", "export")),
}
LIMITS = {f"limit_{stage}_batches": 1 for stage in ("train", "val", "test", "predict")}
SHORT = [f"--trainer.{name}={value}" for name, value in LIMITS.items()]
SAVE_LAST = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
CHECKPOINT = "lightning_logs/version_0/checkpoints/last.ckpt"
STRAY = {"image_shape": (1, 8, 8), "num_classes": 10, "num_labels": 1}


@pytest.fixture(params=MODELS)
def own(request, own_module, project):
    """A subclass of each model, as a class of the user's own module: parent's name, class, arguments."""
    parent = request.param
    loss = "" if parent == "SiD" else LOSS
    module = own_module("mine", f"from lightning_plugins import {parent}\n\n{CLASS.format(parent=parent)}{loss}")
    if parent == "SiD":
        DiffusionTeacher(block_out_channels=(8, 16), image_shape=(1, 8, 8)).export("teacher")
    rows = "".join(f"eins {word} drei\tEINS {word.upper()}\n" for word in ["zwei", "vier", "elf", "acht"] * 8)
    (project / "pairs.tsv").write_text("source\ttarget\n" + rows)
    return parent, getattr(module, f"My{parent}"), MODELS[parent][0]


def options(prefix, values):
    return [f"--{prefix}.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]


def data_of(parent):
    name, arguments = MODELS[parent][1]
    return getattr(lightning_plugins, name)(**arguments)


def uses_of(parent, path, folder, *words):
    """Run what the command line does with a checkpoint, without a Trainer."""
    for command in MODELS[parent][2]:
        own = {"sample": ["--num_samples=2"], "generate": ["--text=eins zwei"], "export": []}[command]
        output = [] if command == "generate" else [f"--output={folder}/{command}.png"]
        main([command, f"--ckpt_path={path}", *own, *output, *words])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_by_command_line(own, cli, project):
    parent, cls, arguments = own
    data = [f"--data={MODELS[parent][1][0]}", *options("data", MODELS[parent][1][1])]
    model = [f"--model=mine.My{parent}", "--model.extra=0.25", *options("model", arguments)]
    cli("fit", *model, *data, *SHORT, *SAVE_LAST)
    cli("fit", *model, *data, *SHORT, *SAVE_LAST, "--ckpt_path=last", "--trainer.max_epochs=2")
    resumed = "lightning_logs/version_1/checkpoints/last.ckpt"
    for command in ("validate", "test", "predict"):
        cli(command, f"--model=mine.My{parent}", f"--ckpt_path={resumed}", *data, *SHORT)
    uses_of(parent, resumed, "whole")
    content = torch.load(resumed, weights_only=True)
    assert content["global_step"] == 2 and content["hyper_parameters"]["extra"] == 0.25
    taken = inspect.signature(getattr(lightning_plugins, parent)).parameters
    assert STRAY.keys() & content["hyper_parameters"].keys() == STRAY.keys() & taken
    assert cls.load_from_checkpoint(resumed).extra == 0.25

    content["hyper_parameters"].update(STRAY)  # as files of before
    torch.save(content, project / "old.ckpt")
    again = cls.load_from_checkpoint("old.ckpt")
    expected = cls.load_from_checkpoint(resumed).state_dict()
    assert again.extra == 0.25 and all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    with open("old.ckpt", "rb") as file:
        assert cls.load_from_checkpoint(file, extra=2.0).extra == 2.0
    uses_of(parent, "old.ckpt", "old")
    cli("fit", *model, *data, *SHORT, "--ckpt_path=old.ckpt", "--trainer.max_epochs=3")
    cli("test", f"--model=mine.My{parent}", "--ckpt_path=old.ckpt", *data, *SHORT)


def test_in_python(own, project):
    parent, cls, arguments = own
    data = data_of(parent)
    shape = {"image_shape": (1, 8, 8)} if parent not in ("SiD", "UniLMSeq2Seq") else {}

    def trainer(epochs=1):
        return quiet_trainer(default_root_dir=project, max_epochs=epochs, **LIMITS)

    run = trainer()
    run.fit(cls(extra=0.25, **shape, **arguments), data)
    run.save_checkpoint("one.ckpt")
    run = trainer(2)
    run.fit(cls(extra=0.25, **shape, **arguments), data_of(parent), ckpt_path="one.ckpt")
    run.save_checkpoint("two.ckpt")
    model = cls.load_from_checkpoint("two.ckpt")
    assert model.extra == 0.25 and run.global_step == 2
    trainer().test(model, data)
    assert trainer().predict(model, data)
    uses_of(parent, "two.ckpt", "python", f"--model=mine.My{parent}")
    if hasattr(cls, "sample"):
        assert model.sample(2, generator=torch.Generator().manual_seed(0)).shape == (2, 1, 8, 8)
    if hasattr(cls, "export"):
        assert model.export("python/folder")
    if hasattr(cls, "generate_text"):
        assert len(model.generate_text(["eins zwei"])) == 1
