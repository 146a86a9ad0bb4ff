"""The private names of Lightning that the package reads and sets: one assertion each; a new version fails here."""

import inspect

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.evaluation_loop import RestartStage
from trainers import quiet_trainer

from lightning_plugins.core.lightning_internals import Place, fit_progress, read_place, write_place


@pytest.fixture(scope="module")
def trainer():
    run = quiet_trainer(max_steps=3, limit_train_batches=2, limit_val_batches=1)
    run.fit(BoringModel())
    return run


ATTRIBUTES = [
    "_combined_loader",
    "_data_fetcher",
    "_restarting",
    "_resuming_from_checkpoint",
    "_should_accumulate",
    "epoch_loop.restarting",
    "epoch_loop._batches_that_stepped",
    "epoch_loop._should_check_val_fx",
    "epoch_loop._is_training_done",
    "epoch_loop.update_lr_schedulers",
    "epoch_loop.val_loop._restart_stage",
    "epoch_loop.val_loop.run",
    "epoch_progress.current.completed",
]


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_a_name_of_the_fit_loop(trainer, path):
    value = trainer.fit_loop
    for name in path.split("."):
        assert hasattr(value, name)
        value = getattr(value, name)


def test_a_fetcher_that_is_done_gives_nothing(trainer):
    from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader([1, 2, 3], "max_size_cycle"))
    iter(fetcher)
    fetcher.done = True
    with pytest.raises(StopIteration):
        next(fetcher)


def test_a_stage_of_the_validation_loop():
    assert RestartStage.RESTARTED_MID_EVALUATION == "restarted_mid_evaluation"


def test_what_decides_is_still_asked(trainer):
    """Where the names above are read; if one of these fails, read the method and lightning_internals.start_at."""
    loop = trainer.fit_loop.epoch_loop
    assert "self.val_loop.restarted_mid_evaluation" in inspect.getsource(type(loop).advance)
    assert "self.trainer.fit_loop.is_resuming" in inspect.getsource(type(loop).on_run_start)
    assert "self.val_loop.run()" in inspect.getsource(type(loop).on_advance_end)
    assert "not self.restarting" in inspect.getsource(type(trainer.fit_loop).on_advance_end)


@pytest.fixture
def progress(trainer):
    return fit_progress({"loops": {"fit_loop": trainer.fit_loop.state_dict()}})


def test_counters_have_their_names(progress):
    assert progress is not None
    counts = {"ready", "started", "processed", "completed"}
    assert progress["epoch_progress"]["current"].keys() == progress["epoch_progress"]["total"].keys() == counts
    assert progress["epoch_loop.batch_progress"].keys() == {"current", "total", "is_last_batch"}
    assert progress["epoch_loop.val_loop.batch_progress"].keys() == {"current", "total", "is_last_batch"}
    assert progress["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] == 3
    assert progress["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"] == 0
    assert progress["epoch_loop.state_dict"]["_batches_that_stepped"] == 3


def test_a_place_is_read_as_it_was_written(progress):
    """The run above was stopped by max_steps in its second epoch, which Lightning counts as finished."""
    assert progress["epoch_progress"]["current"]["processed"] == 2
    assert read_place(progress) == Place(1, 1, is_last=False, validated=True, in_step=False)
    for place in (
        Place(1, 1, is_last=False, validated=True, in_step=False),
        Place(1, 1, is_last=False, validated=False, in_step=False),
        Place(4, 3, is_last=True, validated=False, in_step=False),
        Place(4, 0, is_last=False, validated=True, in_step=False),
    ):
        write_place(progress, place)
        assert read_place(progress) == place
    assert fit_progress({"state_dict": {}}) is None
