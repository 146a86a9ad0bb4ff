"""GradientPenalty and Flooding from the command line and from YAML: right values arrive, wrong ones are sentences."""

import re

import pytest
import torch
import yaml

TOY = ["--model=my_package.ToyNet", "--data=my_package.ToyData"]
PENALTY = ["--trainer.callbacks+=GradientPenalty", "--trainer.callbacks.coefficient=0.5"]
EXACT = [*PENALTY, "--trainer.callbacks.engine=exact"]
FLOODING = ["--trainer.callbacks+=Flooding", "--trainer.callbacks.level=1.7"]
SAVE_LAST = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def weights(project, version=0):
    path = project / f"lightning_logs/version_{version}/checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for value in state.values()])


def logged(project, version=0):
    return (project / f"lightning_logs/version_{version}/metrics.csv").read_text().splitlines()[0].split(",")


def test_from_words_and_from_yaml(cli, project):
    """The same run, which is not the plain one; and the log has the names of both."""
    csv = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--seed_everything=1"]
    cli("fit", *TOY, *EXACT, *FLOODING, *SAVE_LAST, *csv)
    config = {
        "model": "my_package.ToyNet",
        "data": "my_package.ToyData",
        "trainer": {
            "callbacks": [
                {"class_path": "Flooding", "init_args": {"level": 1.7}},
                {"class_path": "GradientPenalty", "init_args": {"coefficient": 0.5, "engine": "exact"}},
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
            ]
        },
    }
    (project / "own.yaml").write_text(yaml.safe_dump(config))
    cli("fit", "--config=own.yaml", *csv)
    cli("fit", *TOY, *SAVE_LAST, *csv)
    words, file, plain = (weights(project, version) for version in range(3))
    assert torch.equal(words, file)
    assert not torch.allclose(words, plain, atol=1e-4)
    names = ["coefficient", "grad_norm_sq", "penalty", "penalty_ratio"]
    assert {f"igr/{name}" for name in names} | {"flood/level", "flood/active", "flood/raw_loss"} <= {*logged(project)}


def test_every_argument_in_yaml(cli, project):
    arguments = {
        "match_lr": 0.3,
        "norm": "squared",
        "engine": "auto",
        "scope": "microbatch",
        "difference": "central",
        "relative_step": 1e-3,
        "every_n_steps": 2,
        "warmup_steps": 3,
        "schedule": [[0, 0.0], [500, 1.0]],
        "check": "off",
    }
    config = {"trainer": {"callbacks": [{"class_path": "GradientPenalty", "init_args": arguments}]}}
    (project / "own.yaml").write_text(yaml.safe_dump(config))
    cli("fit", *TOY, "--config=own.yaml")
    saved = yaml.safe_load((project / "lightning_logs/version_0/config.yaml").read_text())
    (callback,) = saved["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_plugins.GradientPenalty"
    assert callback["init_args"] == {"coefficient": None} | arguments


def test_resumed_equals_uninterrupted(cli, project):
    words = [*TOY, *PENALTY, "--trainer.callbacks.warmup_steps=5", *FLOODING, *SAVE_LAST, "--seed_everything=1"]
    last = "--ckpt_path=lightning_logs/version_1/checkpoints/last.ckpt"
    cli("fit", *words, "--trainer.max_epochs=2")
    cli("fit", *words)
    cli("fit", *words, "--trainer.max_epochs=2", last)
    whole, half, resumed = (weights(project, version) for version in range(3))
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, half)


MISTAKES = {
    "--trainer.callbacks+=GradientPenalty": "give either coefficient or match_lr, got coefficient=None and match_",
    "--trainer.callbacks+=GradientPenalty --trainer.callbacks.coefficient=-1": ("coefficient=-1.0 must be 0 or more."),
    "--trainer.callbacks+=GradientPenalty --trainer.callbacks.coefficient=much": (
        "trainer.callbacks.coefficient takes float or null, not 'much'."
    ),
    "--trainer.callbacks+=GradientPenalty --trainer.callbacks.coeficient=1": "Did you mean coefficient?",
    "--trainer.callbacks+=GradientPenality": "Did you mean GradientPenalty?",
    " ".join([*PENALTY, "--trainer.callbacks.scope=batch"]): "Choices: step, microbatch",
    " ".join([*PENALTY, "--trainer.callbacks.relative_step=2"]): (
        "relative_step=2.0 must lie in (0, 1): 'auto' takes the best known."
    ),
    " ".join(
        [*PENALTY, "--trainer.callbacks.schedule=[[5,1],[5,2]]"]
    ): "schedule=[[5.0, 1.0], [5.0, 2.0]] must be pairs [step, value] with grow",
    " ".join([*PENALTY, *PENALTY]): "Only one GradientPenalty in a trainer: add their coefficients up in one.",
    " ".join([*PENALTY, "--trainer.precision=bf16-true"]): "use one of 32-true, 64-true, bf16-mixed, 16-mixed.",
    "--trainer.callbacks+=Flooding": "Give either level or level_schedule, got level=None and",
    " ".join(
        [*FLOODING, "--trainer.callbacks.start=later"]
    ): "start='later' must be 'immediately', 'epoch N' or 'step N'",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(mistake, words):
    """Status 2 and at most five lines, which the fixture holds."""
    assert MISTAKES[words] in mistake("fit", *TOY, *words.split())


@pytest.mark.parametrize("name", ["GradientPenalty", "Flooding"])
def test_help_is_readable(cli, capsys, name):
    with pytest.raises(SystemExit) as stop:
        cli("fit", f"--trainer.callbacks.help={name}")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "objective" in text or "Train on" in text
    options = re.findall(r"^  --trainer\.callbacks\.(\w+) ", text, re.MULTILINE)
    assert {"GradientPenalty": {"coefficient", "schedule"}, "Flooding": {"level", "start"}}[name] <= {*options}
    assert "see above" not in text and "as above" not in text  # there is nothing above
    assert max(map(len, text.splitlines())) <= 120
