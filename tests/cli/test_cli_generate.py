"""``lightning-plugins generate``: texts from any module that writes some, as they come."""

import io
import os
import sys

import pytest
import torch
from spoken import errors

from lightning_plugins.cli import main

WRITER = '''
from lightning.pytorch import LightningModule
import torch

EVENTS = []


class Writer(LightningModule):
    """Answers in capitals, and with a number that it learnt."""

    def __init__(self, generation: dict | None = None, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(64, 1)
        self.register_buffer("learnt", torch.tensor(0))

    def training_step(self, batch, index):
        self.learnt.fill_(7)
        return self.net(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, index):
        pass

    def predict_step(self, batch, index):
        return [{"source": f"文 {index}", "prediction": "a\\nb", "scores": [0.5, None]} for _ in batch[0]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    def generate_text(self, sources, **generation):
        if "bad" in sources:
            [][0]
        EVENTS.append(("whole", sources, generation))
        return [f"{source.upper()} {self.learnt}" for source in sources]

    def stream_text(self, source, **generation):
        EVENTS.append(("stream", source, generation))
        if source == "interrupt":
            raise KeyboardInterrupt
        for word in [*source.upper().split(), str(self.learnt.item())]:
            EVENTS.append(word)
            yield word + " "
'''
SAVE = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]


@pytest.fixture
def writer(project):
    (project / "writer.py").write_text(WRITER)
    yield
    sys.modules.pop("writer", None)


@pytest.fixture
def saved(writer, cli, capsys):
    """A run of the command line whose ``last.ckpt`` is a Writer's."""

    def fit(*words):
        cli(
            "fit",
            "--model=writer.Writer",
            "--data=my_package.ToyData",
            "--trainer.limit_train_batches=1",
            *SAVE,
            *words,
        )
        capsys.readouterr()
        sys.modules["writer"].EVENTS.clear()

    return fit


@pytest.fixture
def generate(saved, capsys):
    """Output of ``generate`` and what the model was asked, in the order in which things happened."""
    saved()

    def run(*words, stdin=b""):
        events = sys.modules["writer"].EVENTS
        events.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            main(["generate", "--ckpt_path=last", *words])
        return capsys.readouterr().out, list(events)

    return run


class Terminal(io.StringIO):
    """Notes when something is seen on it."""

    def __init__(self, events):
        super().__init__()
        self.events, self.held = events, ""

    def write(self, text):
        self.held += text

    def flush(self):
        self.events.append(f"seen {self.held!r}")
        self.held = ""


def test_each_piece_is_seen_before_the_next_is_made(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(sys.modules["writer"].EVENTS))
    _, events = generate("--text", "two words", "--text", "one")
    assert events == [
        ("stream", "two words", {}),
        *("TWO", "seen 'TWO '", "WORDS", "seen 'WORDS '", "7", "seen '7 '", r"seen '\n'"),
        ("stream", "one", {}),
        *("ONE", "seen 'ONE '", "7", "seen '7 '", r"seen '\n'"),
    ]


def test_lines_of_standard_input_give_as_many_lines(generate):
    lines = "eins\r\n\nzwei drei\n  \n猫\n".encode()
    out, events = generate(stdin=lines)
    assert out.splitlines() == ["EINS 7 ", "", "ZWEI DREI 7 ", "", "猫 7 "]
    assert [event[1] for event in events if event[0] == "stream"] == ["eins", "zwei drei", "猫"]
    out, events = generate("--batch_size=3", stdin=lines)
    assert out.splitlines() == ["EINS 7", "", "ZWEI DREI 7", "", "猫 7"]
    assert events == [("whole", ["eins", "zwei drei"], {}), ("whole", ["猫"], {})]
    assert generate("--batch_size=2", stdin=b"\n\n") == ("\n\n", [])
    assert generate(stdin=b"") == ("", [])
    assert generate("--text", "a\nb", "--num_beams=2")[0] == "A B 7\n"  # one line, whatever it holds


def test_predict_writes_records_a_line_each(generate, cli, project, capsys):
    cli("predict", "--ckpt_path=last", "--data=my_package.ToyData")
    assert "Predictions: lightning_logs/version_1/predictions.jsonl\n" in capsys.readouterr().out
    lines = (project / "lightning_logs/version_1/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40
    assert lines[-1] == '{"row": 39, "source": "文 2", "prediction": "a\\nb", "scores": [0.5, null]}'


def test_options_reach_the_model_and_only_those_given(generate):
    def asked(*words):
        return generate("--text=x", *words)[1][0]

    assert asked("--max_new_tokens=5") == ("stream", "x", {"max_new_tokens": 5})
    assert asked("--num_beams=4") == ("whole", ["x"], {"num_beams": 4})
    assert asked("--do_sample") == ("stream", "x", {"do_sample": True})
    assert asked("--top_p=0.9", "--temperature=2") == (
        "stream",
        "x",
        {"do_sample": True, "temperature": 2.0, "top_p": 0.9},
    )


def test_beams_of_the_models_own_are_printed_whole(saved, capsys):
    saved('--model.generation={"num_beams": 3}')
    for words, kind in ([], "whole"), (["--num_beams=1"], "stream"):
        main(["generate", "--ckpt_path=last", "--text=x", *words])
        assert sys.modules["writer"].EVENTS[0][0] == kind
        sys.modules["writer"].EVENTS.clear()


def test_a_checkpoint_made_in_python_needs_its_class(own_module, write_checkpoint, mistake, capsys):
    model = own_module("writer", WRITER).Writer()
    model.learnt.fill_(3)
    write_checkpoint(model, "python.ckpt")
    words = ["generate", "--ckpt_path=python.ckpt", "--text=x"]
    main([*words, "--model=writer.Writer"])
    assert capsys.readouterr().out == "X 3 \n"
    for model, told in {
        None: "'python.ckpt' does not say which class it holds (it was made in Python): add --model and the class.",
        "Writer": "--model: no class is called 'Writer'; give the path of your own, such as my.Net.",
        "CapsNets": "Did you mean CapsNet?",
        "writer.Other": "--model 'writer.Other' cannot be imported: module 'writer' has no attribute 'Other'.",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([*words, *([f"--model={model}"] if model else [])])
        assert stop.value.code == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: ckpt_path."),
        (["--ckpt_path=last"], "--ckpt_path last: no run in"),
        (["--ckpt_path=none.ckpt"], "checkpoint 'none.ckpt' does not exist."),
        (["--ckpt_path=my_package"], "--ckpt_path 'my_package' is a folder; give a checkpoint file.\nAn exported"),
        (["--ckpt_path=x", "--max_new_tokens=many"], '"max_new_tokens": Not of type PositiveInt'),
        (["--ckpt_path=x", "--top_p=3"], '"top_p": Not of type ClosedUnitInterval'),
        (["--ckpt_path=x", "--max_new=3"], "unrecognized arguments: --max_new=3"),
    ],
)
def test_mistakes(project, capsys, words, told):
    with pytest.raises(SystemExit) as stop:
        main(["generate", *words])
    error = errors(capsys)
    assert stop.value.code == 2
    assert error.startswith("error: ") and told in error
    assert len(error.splitlines()) <= 5


def test_a_model_of_another_kind_is_refused(trained, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", f"--ckpt_path={trained}", "--text=x"])
    assert stop.value.code == 2
    assert errors(capsys) == (
        f"error: '{trained}' holds a ToyNet, which writes no text (it has no generate_text and no stream_text).\n"
        f"Its predictions: lightning-plugins predict --ckpt_path {trained} --data CLASS\n"
    )


def test_weights_that_do_not_fit_text_that_is_none_and_errors_of_ones_own(generate, capsys):
    with pytest.raises(SystemExit):
        generate(stdin=b"good\nb\xffd\n")
    output = capsys.readouterr()
    assert output.out == "GOOD 7 \n"
    assert output.err.endswith("last.ckpt'.\nerror: standard input, line 2: byte 2 is not UTF-8.\n")
    with pytest.raises(IndexError):  # a bug keeps its traceback
        generate("--text=bad", "--num_beams=2")
    path = "lightning_logs/version_0/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.weight"] = torch.zeros(2, 3)
    torch.save(content, path)
    with pytest.raises(SystemExit):
        generate("--text=x")
    assert f"the weights in '{path}' do not fit this Writer.\nOther sizes: net.weight" in capsys.readouterr().err


def test_a_reader_that_leaves_and_ctrl_c_are_quiet(generate, monkeypatch, capsys):
    reader, pipe = os.pipe()
    os.close(reader)
    with os.fdopen(pipe, "w") as stdout, monkeypatch.context() as patch:  # its end flushes once more
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stop:
            generate("--text=x")
        assert stop.value.code == 141
    with pytest.raises(SystemExit) as stop:
        generate("--text=interrupt")
    assert stop.value.code == 130
    assert errors(capsys) == ""
