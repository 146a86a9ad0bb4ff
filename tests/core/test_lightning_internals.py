"""The private names of Lightning that the package reads and sets: one assertion each; a new version fails here."""

import inspect
from functools import wraps

import pytest
import torch
from lightning.fabric.utilities import cloud_io, types
from lightning.pytorch import Callback, LightningModule, Trainer, cli
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core import optimizer, saving
from lightning.pytorch.core.mixins import hparams_mixin
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, launchers
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.compile import from_compiled

from lightning_plugins.core import lightning_internals as internals
from lightning_plugins.core.lightning_internals import Place, fit_progress, read_place, write_place


class Boring(BoringModel):
    """Logs, and looks at what is logged while it trains."""

    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        self.log("loss", step["loss"], on_step=True, on_epoch=True)
        return step

    def on_train_batch_end(self, *_):
        self.logged = internals.logged_so_far(self.trainer)
        self.seen = [(metric._update_count, metric._forward_cache.shape) for metric in self.logged.values()]
        self.updates = internals.should_update_logs(self.trainer)


QUIET = {
    "limit_train_batches": 2,
    "limit_val_batches": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet(**arguments):
    return Trainer(**QUIET, **arguments)


@pytest.fixture(scope="module")
def trainer():
    run = quiet(max_steps=3)
    run.fit(Boring())
    return run


# The owner of each name, as a path from the module of that name or from the trainer of a run; what reads it.
NAMES = {
    "module._trainer": "trainer_of",
    "module._compiler_ctx": "is_compiled",
    "launchers._MultiProcessingLauncher": "starts_processes",
    "trainer._accelerator_connector": "environment",
    "trainer._signal_connector": "handler_before, stop_as_by_sigterm",
    "trainer._signal_connector._original_handlers": "handler_before",
    "ddp._ddp_kwargs": "ddp_option",
    "ddp._ddp_comm_hook": "compresses_gradients",
    "fit_loop._skip_backward": "skips_backward",
    "fit_loop.epoch_loop._batches_that_stepped": "batches_that_stepped, start_at",
    "trainer._logger_connector": "should_update_logs",
    "fit_loop.epoch_loop._results": "logged_so_far",
    "optimizer._MockOptimizer": "is_no_optimizer",
    "lightning_optimizer._on_before_step": "count_no_step",
    "lightning_optimizer._on_after_step": "count_no_step",
    "callback._generate_state_key": "own_state_key",
    "hparams_mixin._given_hyperparameters": "given_hyperparameters",
    "hparams_mixin._given_hyperparameters_context": "giving_hyperparameters",
    "cloud_io._load": "load_any",
    "saving._load_state": "module_of",
    "strategy._checkpoint_io": "given_checkpoint_io",
    "checkpoint._save_last_checkpoint": "save_last",
    "checkpoint._monitor_candidates": "save_last",
    "checkpoint._last_global_step_saved": "last_step_saved",
    "types._Stateful": "has_state",
    "fit_loop._combined_loader": "train_loaders",
    "fit_loop._data_fetcher": "start_at",
    "fit_loop._restarting": "start_at",
    "fit_loop._resuming_from_checkpoint": "start_at",
    "fit_loop._should_accumulate": "between_steps",
    "fit_loop.epoch_loop.restarting": "start_at",
    "fit_loop.epoch_loop._should_accumulate": "start_at",
    "fit_loop.epoch_loop._should_check_val_fx": "start_at",
    "fit_loop.epoch_loop._is_training_done": "is_cut",
    "fit_loop.epoch_loop.update_lr_schedulers": "start_at",
    "fit_loop.epoch_loop.val_loop._restart_stage": "start_at",
    "fit_loop.epoch_loop.val_loop.run": "around_validation",
    "fit_loop.epoch_progress.current.completed": "start_at",
    "fit_loop.run": "around_training",
}


@pytest.mark.parametrize("path", NAMES)
def test_a_private_name(trainer, path):
    owners = {"trainer": trainer, "fit_loop": trainer.fit_loop, "module": trainer.lightning_module}
    owners |= {"strategy": trainer.strategy, "ddp": DDPStrategy(), "checkpoint": ModelCheckpoint()}
    owners |= {"callback": Callback(), "lightning_optimizer": LightningOptimizer(trainer.optimizers[0])}
    owners |= {"optimizer": optimizer, "hparams_mixin": hparams_mixin, "cloud_io": cloud_io, "types": types}
    owners["launchers"] = launchers
    owners |= {"saving": saving}
    first, *names = path.split(".")
    owner = owners[first]
    for name in names:
        assert hasattr(owner, name), f"Lightning has no {path} now: see lightning_internals.{NAMES[path]}"
        owner = getattr(owner, name)


@pytest.mark.parametrize(
    "name", ["_add_subcommands", "_prepare_subcommand_parser", "_parse_ckpt_path", "_run_subcommand"]
)
def test_a_method_that_the_command_line_overrides_is_called(name):
    """When the name goes: cli/app.py overrides what nobody calls; read LightningCLI.__init__ for the new one."""
    assert f"self.{name}(" in inspect.getsource(cli.LightningCLI)


@pytest.mark.parametrize("name", ["_run", "_fit_impl", "_validate_impl", "_test_impl", "_predict_impl"])
def test_a_frame_that_names_the_checkpoint(name):
    """When the argument goes: see lightning_internals.checkpoint_to_load."""
    assert "ckpt_path" in inspect.signature(getattr(Trainer, name)).parameters


@pytest.mark.parametrize("name", [internals.CLASS_PATH, internals.INSTANTIATOR])
def test_a_key_by_which_a_file_says_what_it_holds(name):
    assert name in ("_class_path", "_instantiator")  # in files that were written long ago
    assert f'"{name}"' in inspect.getsource(cli) + inspect.getsource(hparams_mixin)


# What the names mean


@pytest.mark.parametrize(("strategy", "starts"), [("ddp_spawn", True), ("ddp_fork", True), ("ddp", False)])
def test_which_strategies_start_processes(strategy, starts):
    assert internals.starts_processes(Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)) is starts


class Asks(BoringModel):
    """Asks which checkpoint will be loaded, where networks are built."""

    def configure_model(self):
        self.path = internals.checkpoint_to_load(self.trainer)

    def on_fit_start(self):
        self.path_when_loaded = internals.checkpoint_to_load(self.trainer)


@pytest.fixture(scope="module")
def file(trainer, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "any.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


def test_the_checkpoint_that_a_run_was_given(file):
    module, run = Asks(), quiet(max_steps=3)
    run.fit(module, ckpt_path=file)
    assert module.path == module.path_when_loaded == file
    run.validate(module)
    assert module.path is None  # trainer.ckpt_path is the last call's until Lightning reads a file
    assert internals.checkpoint_to_load(None) is None


def test_a_path_that_the_trainer_was_set_to(file):
    module, run = Asks(), quiet(max_steps=3)
    run.ckpt_path = file
    run.fit(module)
    assert module.path == file


def test_a_run_that_a_tool_has_wrapped(file, monkeypatch):
    """As tracing tools do, with a function that knows no argument by name."""
    original = Trainer._run

    @wraps(original)
    def wrapper(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_run", wrapper)
    module = Asks()
    quiet(max_steps=3).fit(module, ckpt_path=file)
    assert module.path == module.path_when_loaded == file
    quiet(fast_dev_run=True).fit(module)
    assert module.path is None


class Wrapped(Trainer):
    """A subclass with a step of its own around each run."""

    def _run(self, *args, **kwargs):
        return super()._run(*args, **kwargs)


class Rewritten(Trainer):
    """A subclass with a run of its own, which does not name the path."""

    def _run(self, module, *args, **kwargs):
        module.trainer = self
        module.configure_model()
        self.state.status = TrainerStatus.FINISHED


def test_a_subclass_that_runs_otherwise(file):
    module = Asks()
    Wrapped(**QUIET, max_steps=3).fit(module, ckpt_path=file)
    assert module.path == module.path_when_loaded == file
    Rewritten(**QUIET).fit(module, ckpt_path=file)
    assert module.path == file


def test_the_trainers_own_word_serves_where_no_frame_tells(file):
    run = quiet()
    run.ckpt_path = file
    assert internals.checkpoint_to_load(run) is None  # nothing runs
    run.state.status = TrainerStatus.RUNNING
    assert internals.checkpoint_to_load(run) == file


def test_a_run_within_a_run(file):
    """The inner one's file, of the same trainer or another, then the outer one's again."""

    class Outer(Asks):
        def on_fit_start(self):
            self.inner = Asks()
            quiet(max_steps=3).fit(self.inner)
            super().on_fit_start()

    module = Outer()
    quiet(max_steps=3).fit(module, ckpt_path=file)
    assert module.inner.path is module.inner.path_when_loaded is None
    assert module.path == module.path_when_loaded == file


def test_a_module_alone_has_no_trainer(trainer):
    assert internals.trainer_of(BoringModel()) is None
    assert internals.trainer_of(trainer.lightning_module) is trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own imports
def test_a_module_that_is_compiled():
    assert not internals.is_compiled(BoringModel())
    assert internals.is_compiled(from_compiled(torch.compile(BoringModel(), backend="eager")))


def test_what_ddp_was_told():
    strategy = DDPStrategy(static_graph=True)
    assert internals.ddp_option(strategy, "static_graph") is True
    assert internals.ddp_option(strategy, "find_unused_parameters") is None
    assert not internals.compresses_gradients(strategy)
    assert internals.compresses_gradients(DDPStrategy(ddp_comm_hook=lambda state, bucket: None))


def test_weight_averaging_says_that_it_skips_the_backward_pass(trainer):
    assert internals.skips_backward(trainer) is False
    source = inspect.getsource(StochasticWeightAveraging)
    assert "trainer.fit_loop._skip_backward = True" in source


def test_what_a_run_has_logged(trainer):
    assert internals.batches_that_stepped(trainer) == 3
    module = trainer.lightning_module
    assert module.updates is False  # of the third batch, at log_every_n_steps=50
    (metric,) = module.logged.values()
    assert metric.meta.name == "loss"
    assert metric.meta.on_step
    assert metric.meta.on_epoch
    assert metric.value.shape == metric.cumulated_batch_size.shape == ()
    assert module.seen == [(3 - 2, ())]  # of the second epoch


def test_a_run_without_an_optimizer_has_one_that_stands_for_it(trainer):
    class Without(BoringModel):
        def configure_optimizers(self):
            return None

    run = quiet(max_steps=1)
    with pytest.warns(UserWarning, match="configure_optimizers` returned `None`"):
        run.fit(Without())
    assert internals.is_no_optimizer(run.optimizers[0])
    assert not internals.is_no_optimizer(trainer.optimizers[0])


def test_a_step_that_is_not_counted():
    class Uncounted(ManualOptimBoringModel):
        def training_step(self, batch, batch_idx):
            internals.count_no_step(self.optimizers())
            return super().training_step(batch, batch_idx)

    counted, uncounted = quiet(max_epochs=1), quiet(max_epochs=1)
    counted.fit(ManualOptimBoringModel())
    uncounted.fit(Uncounted())
    assert (counted.global_step, uncounted.global_step) == (2, 0)


def test_a_callbacks_own_key():
    """A key in checkpoints of every version: it must not move."""
    assert internals.own_state_key(Callback(), optimizer_index=1) == "Callback{'optimizer_index': 1}"


def test_the_loss_scale(trainer):
    assert internals.loss_scale(trainer) == 1.0
    plugin = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer_of_half = quiet(precision="bf16-mixed")
    trainer_of_half.precision_plugin.scaler = plugin
    assert internals.loss_scale(trainer_of_half) == 8.0


def test_arguments_that_the_command_line_gives():
    assert internals.given_hyperparameters() is None
    with internals.giving_hyperparameters({"width": 3}):
        assert internals.given_hyperparameters() == {"width": 3, "_instantiator": ""}


def test_constructors_that_run():
    class Inner(LightningModule):
        def __init__(self, width):
            super().__init__()
            self.frames = internals.running_constructors(self)

    class Outer(Inner):
        def __init__(self, depth):
            super().__init__(width=2 * depth)

    inner, outer = Outer(2).frames
    assert inner.f_locals["width"] == 4
    assert outer.f_locals["depth"] == 2


def test_a_file_and_an_open_file_are_loaded(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    assert internals.load_any(tmp_path / "a.ckpt", True) == {"a": torch.ones(1)}
    with (tmp_path / "a.ckpt").open("rb") as file:
        assert internals.load_any(file, True) == {"a": torch.ones(1)}


def test_the_checkpoint_io_that_was_given():
    strategy = SingleDeviceStrategy("cpu")
    assert internals.given_checkpoint_io(strategy) is None
    own = strategy.checkpoint_io  # Lightning's own is made when it is asked for
    strategy.checkpoint_io = own
    assert internals.given_checkpoint_io(strategy) is own


def test_a_last_checkpoint_is_written_at_once(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            internals.save_last(checkpoint, trainer)
            self.found = (tmp_path / "last.ckpt").is_file()

    save, checkpoint = Save(), ModelCheckpoint(tmp_path, save_top_k=0, save_last=True)
    Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        callbacks=[save, checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(BoringModel())
    assert save.found


def test_a_loader_with_a_state(trainer):
    class Loader:
        def state_dict(self):
            """Nothing."""

        def load_state_dict(self, state):
            """Nothing."""

    assert internals.has_state(Loader())
    (loader,) = internals.train_loaders(trainer)
    assert not internals.has_state(loader)


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
