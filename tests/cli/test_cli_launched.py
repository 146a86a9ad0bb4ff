"""A run whose processes the command line starts: mistakes within them are sentences, and what they write is there."""

from functools import wraps

import pytest
from torch.multiprocessing import ProcessRaisedException

from lightning_plugins.callbacks import SaveOnSigterm, run_checks
from lightning_plugins.cli import app, main
from lightning_plugins.cli.messages import RunStoppedError, UsageError, said_by_process

HEAD = "\n\n-- Process 0 terminated with the following error:\nTraceback (most recent call last):\n"
SMALL = ["--model=EAE", "--model.network=mlp", "--model.width=8", "--model.latent_dim=3"]
DATA = ["--data=Digits", "--data.image_size=8", "--data.num_train=32", "--data.batch_size=8"]
RUN = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.max_epochs=1"]


def told(file, error):
    return f'{HEAD}  File "{file}", line 7, in fit\n    raise ...\n{error}\n\n'


@pytest.mark.parametrize(
    ("file", "error", "kind"),
    [
        (run_checks.__file__, "ValueError: k=300 is too many: take fewer.", UsageError),
        (run_checks.__file__, "FileExistsError: out exists.", UsageError),
        (run_checks.__file__, "FloatingPointError: a loss is NaN.", RunStoppedError),
        ("/x/trainer.py", "lightning.fabric.utilities.exceptions.MisconfigurationException: No.", UsageError),
        ("/x/user.py", "ValueError: of the user's own code", None),
        (run_checks.__file__, "KeyError: 'image'", None),
    ],
)
def test_what_a_process_said(file, error, kind):
    found = said_by_process(told(file, error))
    assert type(found) is (kind or type(None))
    if kind:
        assert found.lines == [error.partition(": ")[2]]


def test_it_is_what_the_command_says(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    @wraps(app.Trainer.fit)
    def launch(*_, **__):
        raise ProcessRaisedException(told(run_checks.__file__, "ValueError: k=300 is too many."), 0, 1)

    monkeypatch.setattr(app.Trainer, "fit", launch)
    with pytest.raises(SystemExit) as end:
        main(["fit", *SMALL, *DATA, *RUN])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: k=300 is too many.\n")


@pytest.mark.parametrize("words", [[], ["--trainer.callbacks+=SaveOnSigterm", "--trainer.callbacks.signals=[SIGUSR1]"]])
def test_one_callback_saves_at_signals(monkeypatch, tmp_path, words):
    """The command line's own steps back before the user's."""
    monkeypatch.chdir(tmp_path)
    seen = []

    @wraps(app.Trainer.fit)
    def look(self, *_, **__):
        seen.extend(self.callbacks)

    monkeypatch.setattr(app.Trainer, "fit", look)
    main(["fit", *SMALL, *DATA, "--trainer.accelerator=cpu", *words])
    (found,) = [callback for callback in seen if isinstance(callback, SaveOnSigterm)]
    assert found.signals == (("SIGUSR1",) if words else ("SIGTERM",))
