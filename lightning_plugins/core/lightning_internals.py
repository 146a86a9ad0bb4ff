"""Every private name of Lightning that the package uses, and every frame it walks, each with what to do when it goes.

``tests/core/test_lightning_internals.py`` asks for each name, so that a new Lightning that renames one fails there and
not in somebody's resumed run; a gate refuses such names in any other file. First what is asked of a run, then what of a
checkpoint and its arguments, at the end the counters by which a run goes on at any place.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters, _given_hyperparameters_context
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer, do_nothing_closure
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import Optimizer

# What a run is and does


def trainer_of(module: LightningModule) -> Trainer | None:
    """A module's trainer, ``None`` without one; ``module.trainer`` raises there.

    When ``_trainer`` goes: catch the ``RuntimeError`` of ``module.trainer``.
    """
    return module._trainer


def is_compiled(module: LightningModule) -> bool:
    """Whether ``torch.compile`` was given the module itself.

    When ``_compiler_ctx`` goes: read ``from_compiled`` in Lightning's ``utilities/compile.py`` for where it is kept.
    """
    return getattr(module, "_compiler_ctx", None) is not None


def starts_processes(trainer: Trainer) -> bool:
    """Whether ``fit`` and the like run in processes that they start from Python (``ddp_spawn``, ``ddp_fork``).

    When ``_MultiProcessingLauncher`` goes: read ``DDPStrategy._configure_launcher`` for what the start methods get.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Where the run's processes come from: a cluster's scheduler, torchrun, Lightning itself.

    When ``_accelerator_connector`` goes: ``trainer.strategy.cluster_environment``, which not every strategy has.
    """
    return trainer._accelerator_connector.cluster_environment


def handler_before(trainer: Trainer, number: int) -> Any:
    """What handled a signal before Lightning did; ``None`` if it was no function.

    When ``_signal_connector`` or ``_original_handlers`` goes: read ``register_signal_handlers`` of Lightning's
    ``signal_connector.py`` for what it puts back in the end.
    """
    handler = trainer._signal_connector._original_handlers.get(number)
    return handler if callable(handler) else None


def stop_as_by_sigterm(trainer: Trainer) -> None:
    """Let the loops leave at their next turn as for SIGTERM; with several processes all must be told in the same step.

    When ``_signal_connector`` goes: raise ``SIGTERMException`` where the loops would.
    """
    trainer._signal_connector.received_sigterm = True


def ddp_option(strategy: DDPStrategy, name: str) -> Any:
    """What DDP was told, such as ``static_graph``; ``None`` for its own default.

    When ``_ddp_kwargs`` goes: read ``DDPStrategy.__init__``; the strategy's ``model`` tells only once it is set up.
    """
    return strategy._ddp_kwargs.get(name)


def compresses_gradients(strategy: DDPStrategy) -> bool:
    """Whether a communication hook stands between the ranks' gradients and their mean.

    When ``_ddp_comm_hook`` goes: read ``DDPStrategy.__init__`` for what became of ``ddp_comm_hook``.
    """
    return strategy._ddp_comm_hook is not None


def skips_backward(trainer: Trainer) -> bool:
    """Whether Lightning only runs batches through, as in the epoch in which SWA renews batch-norm statistics.

    When ``_skip_backward`` goes: read ``on_train_epoch_start`` of Lightning's ``StochasticWeightAveraging``.
    """
    return trainer.fit_loop._skip_backward


def batches_that_stepped(trainer: Trainer) -> int:
    """What Lightning logs as the step: unlike ``global_step`` it does not count every optimizer.

    When ``_batches_that_stepped`` goes: read ``log_metrics`` of Lightning's logger connector for its step.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def should_update_logs(trainer: Trainer) -> bool:
    """Whether loggers are told of this batch (``log_every_n_steps``).

    When ``_logger_connector`` goes: ``batches_that_stepped(trainer) % trainer.log_every_n_steps == 0``.
    """
    return trainer._logger_connector.should_update_logs


def logged_so_far(trainer: Trainer) -> dict[str, Any]:
    """Lightning's accumulators of ``self.log`` in the stage that runs; those that hold a torchmetric are left out.

    Each is a torchmetrics ``Metric`` with ``meta`` (``name``, ``on_step``, ``on_epoch``), ``value`` and, where it is a
    mean, ``cumulated_batch_size``. When ``_results`` goes: read ``LightningModule.log`` for where it writes to.
    """
    results = trainer.fit_loop._results
    return {name: metric for name, metric in results.items() if metric.is_tensor}


def is_no_optimizer(optimizer: Optimizer) -> bool:
    """Whether it stands for ``configure_optimizers`` having given none.

    When ``_MockOptimizer`` goes: read ``_init_optimizers_and_lr_schedulers`` for what a run without one has.
    """
    return isinstance(optimizer, _MockOptimizer)


def count_no_step(optimizer: LightningOptimizer) -> None:
    """Keep an optimizer's steps out of Lightning's ``global_step``; call it in ``training_step``.

    Lightning counts every optimizer's step in manual optimization: ``max_steps`` and checkpoints would come at half of
    the updates asked for. It sets these two hooks anew before each ``training_step``. When ``_on_before_step`` or
    ``_on_after_step`` goes: read ``on_run_start`` of Lightning's ``manual.py`` for how steps are counted.
    """
    optimizer._on_before_step = do_nothing_closure
    optimizer._on_after_step = do_nothing_closure


def own_state_key(callback: Callback, **arguments: Any) -> str:
    """The key of a callback's state in a checkpoint, by some of its arguments.

    When ``_generate_state_key`` goes: keep the text that it made, or older checkpoints lose that state.
    """
    return callback._generate_state_key(**arguments)


def loss_scale(trainer: Trainer) -> Tensor | float:
    """What the GradScaler multiplies losses by now, as a tensor for nobody to wait for; 1 without one.

    When ``scaler`` goes: read ``pre_backward`` of Lightning's ``MixedPrecision``.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def is_scaled(trainer: Trainer) -> bool:
    """Whether a GradScaler scales losses, and skips the steps whose gradients overflow.

    When ``scaler`` goes: read ``optimizer_step`` of Lightning's ``MixedPrecision``.
    """
    return getattr(trainer.precision_plugin, "scaler", None) is not None


# Checkpoints, and the arguments in them

# The keys by which a file of the command line says what it holds. When they go: print the hyperparameters of a
# checkpoint that LightningCLI of the new version has written.
CLASS_PATH, INSTANTIATOR = "_class_path", "_instantiator"


# Methods of Trainer, from the innermost, whose argument ckpt_path is the file itself and no longer "best" or "last".
_RUNS = ("_run", "_fit_impl", "_validate_impl", "_test_impl", "_predict_impl")


def checkpoint_to_load(trainer: Trainer | None) -> str | None:
    """Path of the checkpoint that the running ``fit``, ``validate``, ``test`` or ``predict`` was given.

    A network or tokenizer that a checkpoint describes must be built in ``configure_model`` or ``setup``, which come
    before the checkpoint is read. Until then ``trainer.ckpt_path`` of Lightning 2.6 is that of an earlier call, and the
    path is an argument of a method that runs. Its frame is found by name, so that a tool may wrap these methods; where
    none tells, ``trainer.ckpt_path`` does. When ``_run`` goes: read ``Trainer.fit`` for what has that argument now.

    Args:
        trainer: the module's trainer, or ``None`` without one.

    Returns:
        The file, or the folder of a sharded checkpoint; ``None`` if none is to be loaded.
    """
    if trainer is None:
        return None
    path = trainer.ckpt_path if trainer.state.status == TrainerStatus.RUNNING else None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _RUNS and frame.f_locals.get("self") is trainer and "ckpt_path" in frame.f_locals:
            path = frame.f_locals["ckpt_path"]
            break
        frame = frame.f_back
    return str(path) if path else None


def given_hyperparameters() -> dict[str, Any] | None:
    """What ``LightningCLI`` says of the module that is being built; ``None`` for one built in Python.

    When ``_given_hyperparameters`` goes: read ``HyperparametersMixin.save_hyperparameters``.
    """
    return _given_hyperparameters.get()


def giving_hyperparameters(arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """Let ``save_hyperparameters(ignore=[INSTANTIATOR])`` take these in place of the running constructors' arguments.

    When ``_given_hyperparameters_context`` goes: Lightning would deep-copy and warn about every network among them.
    """
    return _given_hyperparameters_context(arguments, instantiator="")


def running_constructors(module: object) -> list[FrameType]:
    """The frames of the ``__init__`` calls that run on ``module``, the innermost (the base class's) first.

    No name of Lightning, whose ``collect_init_args`` walks the same frames.
    """
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            frames.append(frame)
        frame = frame.f_back
    return frames


def load_any(source: Any, weights_only: bool, map_location: Any = "cpu") -> Any:
    """``torch.load`` of a file, an open file or an address, on the CPU unless told otherwise.

    When ``_load`` goes: read ``_load_from_checkpoint`` of Lightning's ``core/saving.py``.
    """
    return _load(source, map_location=map_location, weights_only=weights_only)


def module_of(cls: Any, content: dict[str, Any], strict: bool | None, arguments: dict[str, Any]) -> Any:
    """What ``cls.load_from_checkpoint`` makes of a file with this content, given these arguments.

    When ``_load_state`` goes: write the content to a file, and let ``load_from_checkpoint`` read that.
    """
    content["hyper_parameters"] = {**content.get("hyper_parameters", {}), **arguments}
    return _load_state(cls, content, strict=strict, **arguments)


def given_checkpoint_io(strategy: Strategy) -> CheckpointIO | None:
    """The ``CheckpointIO`` that a trainer was given; ``None`` where the strategy's own serves.

    When ``_checkpoint_io`` goes: read ``Strategy.checkpoint_io``.
    """
    return strategy._checkpoint_io


def save_last(checkpoint: ModelCheckpoint, trainer: Trainer) -> None:
    """Let a ``ModelCheckpoint`` with ``save_last`` write that file now.

    When ``_save_last_checkpoint`` or ``_monitor_candidates`` goes: read ``ModelCheckpoint.on_train_epoch_end``.
    """
    checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


def last_step_saved(checkpoint: ModelCheckpoint) -> int:
    """The step of the newest file that a ``ModelCheckpoint`` has written in this run, of whatever name; 0 before.

    When ``_last_global_step_saved`` goes: read ``_should_skip_saving_checkpoint`` for how it knows a step again.
    """
    return checkpoint._last_global_step_saved


def has_state(loader: object) -> bool:
    """Whether Lightning keeps a loader's ``state_dict`` in checkpoints.

    When ``_Stateful`` goes: read ``CombinedLoader._state_dicts``.
    """
    return isinstance(loader, _Stateful)


# The place in a run


@dataclass(frozen=True)
class Place:
    """Where in a run a checkpoint was written, and with it what the run has to do next.

    Args:
        epochs: finished epochs, their ``on_train_epoch_end`` included.
        batches: batches trained in the epoch that was begun; 0 before the first one, and between two epochs.
        is_last: whether these are all batches of that epoch, so that only its end is left.
        validated: whether the validation that may be due after the last of these batches has been.
        in_step: whether a batch more was under way (an exception stopped it).
        closing: whether ``ReduceLROnPlateau`` is yet to look at the epoch that was finished last.
    """

    epochs: int
    batches: int
    is_last: bool
    validated: bool
    in_step: bool
    closing: bool = False


# The counters of trainer.fit_loop as a checkpoint holds them. When their names go: print checkpoint["loops"] of the new
# version for each place that tests/callbacks/test_exact_resume.py stops at, and find the five facts of Place in it.
_EPOCHS, _BATCHES = "epoch_progress", "epoch_loop.batch_progress"
_VALIDATION, _STEPS = "epoch_loop.val_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"
_MANUAL_STEPS = "epoch_loop.manual_optimization.optim_step_progress"
_LOOP_STATE, _LOADERS = "epoch_loop.state_dict", "combined_loader"
_LOGGED = "_batches_that_stepped"


def fit_progress(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The counters of a checkpoint's training, for the functions below; ``None`` where there are none."""
    progress = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    return progress if {_EPOCHS, _BATCHES, _VALIDATION, _STEPS, _MANUAL_STEPS, _LOOP_STATE} <= progress.keys() else None


def read_place(progress: dict[str, Any], cut: bool = True) -> Place:
    """Read the place from the counters, also from counters that Lightning itself would read wrongly.

    A run that stops in the middle of an epoch (``max_steps``, ``should_stop``) counts that epoch as finished. A run
    resumed by Lightning 2.6 from an epoch's last batch never counts the next epoch as begun.
    """
    epochs, batches = progress[_EPOCHS]["current"], progress[_BATCHES]["current"]
    finished, done = epochs["processed"], batches["processed"]
    in_step = batches["ready"] > done
    is_last = progress[_BATCHES]["is_last_batch"] and not in_step
    all_equal = epochs["ready"] == epochs["started"] == finished
    not_begun = all_equal and done > 0 and finished in _loader_epochs(progress)
    stopped = all_equal and done > 0 and not is_last and not not_begun and cut
    if not (epochs["started"] > finished or not_begun or stopped) or not (done or in_step):
        return Place(finished, 0, False, True, False, closing=is_last and epochs["completed"] < finished)
    validation = progress[_VALIDATION]
    whole = validation["is_last_batch"] and validation["current"]["ready"] == validation["current"]["completed"]
    validated = stopped or (batches["completed"] == done and whole)
    return Place(finished - stopped, done, is_last, validated, in_step)


def _loader_epochs(progress: dict[str, Any]) -> set[int]:
    """The epochs that this package's loaders were in."""
    states = progress.get("state_dict", {}).get(_LOADERS, [])
    return {state["epoch"] for state in states if isinstance(state, dict) and {"epoch", "batches"} <= state.keys()}


def write_place(progress: dict[str, Any], place: Place) -> None:
    """Write counters from which Lightning resumes at the place, after :func:`start_at`."""
    progress[_LOOP_STATE][_LOGGED] = _logged_batches(progress, place)
    begun = place.epochs + (place.batches > 0)
    epochs = {"ready": begun, "started": begun, "processed": place.epochs, "completed": place.epochs}
    progress[_EPOCHS].update(total=epochs, current=dict(epochs))
    counts = progress[_BATCHES]
    counts.update(total=_all(counts["total"]["processed"]), current=_all(place.batches), is_last_batch=place.is_last)
    if not place.validated:  # a validation that was broken off begins anew
        validation = progress[_VALIDATION]
        validation.update(total=_all(validation["total"]["completed"]), current=_all(0), is_last_batch=False)
    if place.is_last or not place.batches:  # the next epoch has its own start
        progress.get("state_dict", {}).pop(_LOADERS, None)
    for state in progress.get("state_dict", {}).get(_LOADERS, []):
        if place.in_step and "batches" in state:  # one of this package's loaders has handed out the batch already
            state["batches"] = place.batches


def _all(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)


def _logged_batches(progress: dict[str, Any], place: Place) -> int:
    """The step number under which a logger is to find the next batch."""
    if not progress[_MANUAL_STEPS]["total"]["completed"]:
        return progress[_STEPS]["optimizer"]["step"]["total"]["completed"]
    # Manual optimization: the number is raised when a batch is over, validation included.
    epochs = progress[_EPOCHS]["current"]
    in_batch = place.batches > 0 and not place.in_step and epochs["processed"] == place.epochs
    return progress[_LOOP_STATE][_LOGGED] + in_batch


def start_at(trainer: Trainer, place: Place) -> None:
    """What no counter says; call it in ``on_train_start`` of a run resumed from counters of :func:`write_place`.

    When one of these names goes: read ``run``, ``reset`` and ``advance`` of Lightning's ``fit_loop.py`` and
    ``training_epoch_loop.py`` for what decides between a validation, an epoch's end and a batch.
    """
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    if not place.batches:
        # An epoch that begins like any other: max_steps would make Lightning "restart" it, at its end.
        fit_loop._restarting = epoch_loop.restarting = False
        fit_loop._resuming_from_checkpoint = False  # iter(loader) again, from the random numbers restored by now
        if place.closing:
            fit_loop.epoch_progress.current.completed -= 1  # schedulers count epochs by it
            epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            fit_loop.epoch_progress.current.completed += 1
        return
    fetcher = fit_loop._data_fetcher
    assert fetcher is not None  # on_train_start comes after it is made
    due = epoch_loop._should_check_val_fx(fetcher)
    if due:
        if not place.validated:
            epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        if not epoch_loop._should_accumulate():
            epoch_loop._batches_that_stepped -= 1  # is raised again when the validation is over
    elif place.is_last:
        fetcher.done = True  # no batch more, whatever the loader still has
    fit_loop._restarting = False  # else ReduceLROnPlateau does not look at this epoch


def around_validation(trainer: Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run each validation of the training within a context, from before its loaders' iterators are made.

    When ``val_loop.run`` goes: ``on_validation_start`` comes after a ``DataLoader`` has drawn the seed of its workers.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = type(loop).run

    def run_in_context() -> Any:
        with context():
            return run(loop)

    loop.run = run_in_context


def around_training(trainer: Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run the training loop of the fit that begins within a context, this once; call it in ``on_fit_start``.

    When ``fit_loop.run`` goes: no hook of a module is called after an exception.
    """
    loop = trainer.fit_loop

    def run_in_context() -> Any:
        del loop.run
        with context():
            return loop.run()

    loop.run = run_in_context


def between_steps(trainer: Trainer) -> bool:
    """Whether the last batch ended with a step of the optimizer, or none was begun (``False``: it accumulates).

    When ``_should_accumulate`` goes: read ``_TrainingEpochLoop.advance`` for what decides on a step.
    """
    return not trainer.fit_loop._should_accumulate()


def is_cut(trainer: Trainer) -> bool:
    """Whether the trainer ends this epoch before its loader does; a loader may also give less than its length.

    When ``_is_training_done`` goes: read ``_TrainingEpochLoop.done`` for what ends an epoch.
    """
    return trainer.should_stop or trainer.fit_loop.epoch_loop._is_training_done


def train_loaders(trainer: Trainer) -> list[Any]:
    """The run's training loaders.

    When ``_combined_loader`` goes: ``trainer.train_dataloader`` is a collection of them.
    """
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened
