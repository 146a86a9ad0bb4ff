"""NonFiniteGuard in the command line: on by default, and a guard of the user's own takes its place."""

import pytest

SOURCE = """
from my_package import ToyNet
from lightning_plugins import NonFiniteGuard


class Spoilt(ToyNet):
    def on_train_start(self):
        guards = [c for c in self.trainer.callbacks if isinstance(c, NonFiniteGuard)]
        print("guards:", *[(guard.policy, guard.patience) for guard in guards])

    def training_step(self, batch, index):
        if index == 1:
            batch[0][3, 0, 2, 2] = float("nan")
        return super().training_step(batch, index)
"""
WORDS = ["--model=spoilt_net.Spoilt", "--data=my_package.ToyData"]


def test_by_default_a_run_ends_with_a_sentence(cli, own_module, capsys):
    own_module("spoilt_net", SOURCE)
    with pytest.raises(SystemExit) as stop:
        cli("fit", *WORDS)
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "guards: ('raise', 16)\n" in out
    lines = err[err.index("error: ") :].splitlines()
    assert len(lines) == 5 and lines[0].startswith("error: NonFiniteGuard: in step 1 (epoch 0, batch 1, rank 0)")
    assert "batch[0] is not finite in row 3" in lines[3] and "Traceback" not in err


@pytest.mark.filterwarnings("ignore:NonFiniteGuard")
def test_a_guard_of_ones_own_takes_its_place(cli, own_module, capsys):
    own_module("spoilt_net", SOURCE)
    cli("fit", *WORDS, "--trainer.callbacks+=NonFiniteGuard", "--trainer.callbacks.policy=skip")
    assert "guards: ('skip', 16)\n" in capsys.readouterr().out


def test_wrong_arguments_are_sentences(mistake):
    words = ["--model=my_package.ToyNet", "--data=my_package.ToyData", "--trainer.callbacks+=NonFiniteGuard"]
    assert "patience=-1 must be 0 or more" in mistake("fit", *words, "--trainer.callbacks.patience=-1")
