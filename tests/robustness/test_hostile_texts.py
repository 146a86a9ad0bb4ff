"""Texts that a stranger chose: they show as they are, make no path, and do nothing to the terminal or the page."""

import functools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from trainers import quiet_trainer

from lightning_plugins.cli import generate, main
from lightning_plugins.core.logging import log_image, log_table, log_text_table
from lightning_plugins.core.markdown import markdown_table, markdown_text
from lightning_plugins.sid.card import model_card

EVIL = "a|b\n# Heading\r\n<script>alert(1)</script> [x](javascript:y) ![z](http://z) `c` \x1b[31m"


class ConsistencyModelPipeline:
    """What a card asks of one."""

    unet = SimpleNamespace(config={})


def test_a_text_stays_in_its_cell():
    text = markdown_text(EVIL)
    assert "\n" not in text and "<script" not in text and "\x1b" not in text
    assert not [place for place in "|[]`" if f"{place}" in text.replace(f"\\{place}", "")]
    lines = markdown_table([EVIL], [[EVIL], [EVIL]]).splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines] == [2] * 4


@pytest.mark.parametrize("teacher", [EVIL, f"folder/{EVIL}", "a/b\n---\nlicense: evil"])
def test_a_card_says_what_a_checkpoint_says_and_no_more(teacher):
    card = {"teacher": teacher, "alpha": EVIL, "images": 1, "metrics": {EVIL: 1.0}, "settings": {EVIL: EVIL}}
    text = model_card(ConsistencyModelPipeline(), 2.5, False, card)
    plain = {"teacher": "x", "alpha": 1, "images": 1, "metrics": {"m": 1.0}, "settings": {"s": 1}}
    like = model_card(ConsistencyModelPipeline(), 2.5, False, plain)
    assert len(text.splitlines()) == len(like.splitlines())
    assert "<script" not in text and "\x1b" not in text and "](javascript" not in text.replace("\\](", "")
    assert text.split("---")[1] == like.split("---")[1]  # the Hub's header


@pytest.fixture
def trainer(tmp_path):
    """One that logs below a folder of its own."""
    return quiet_trainer(logger=CSVLogger(tmp_path / "runs", name="", version=""))


@pytest.mark.parametrize(
    "tag", ["../x", "a/../../x", "/x", "\\x", "..\\..\\x", "C:x", "C:\\x", "a\nb", "\x1b[31m", "", "."]
)
def test_a_name_makes_no_path_outside(trainer, tmp_path, tag):
    for log in (
        lambda: log_image(trainer, tag, torch.zeros(1, 2, 2), 0),
        lambda: log_table(trainer, tag, ["a"], [["b"]], 0),
        lambda: log_text_table(trainer, tag, ["a"], [["b"]], 0),
    ):
        with pytest.raises(ValueError, match="A tag is a name"):
            log()
    assert not (tmp_path / "x").exists() and not list((tmp_path / "runs").rglob("*.png"))


def test_generated_lines_steer_nothing(capsys):
    generate._print_line(["one\ttwo\n", "three\r\x1b]0;evil\x07", "vier\u2028猫"])
    assert capsys.readouterr().out == "one\ttwo three  ]0;evil vier 猫\n"


@pytest.mark.parametrize("given", [[], ["--weights_only=false"]])
def test_an_address_is_read_without_pickles_unless_the_user_says_so(monkeypatch, given):
    """Lightning's default for ``http`` is to read anything."""
    asked = []

    @functools.wraps(Trainer.test)
    def test(self, *args, **options):
        asked.append(options["weights_only"])

    monkeypatch.setattr(Trainer, "test", test)
    words = ["--ckpt_path=https://example.org/x.ckpt", "--model=CapsNet", "--model.channels=4", "--data=Digits"]
    main(["test", *words, "--trainer.accelerator=cpu", "--trainer.logger=false", *given])
    assert asked == [not given]
