"""Runs that stop and go on, compared with runs that do not: what was trained, counted, logged, and every last bit."""

import logging
import os
import random
import signal
import zlib
from contextlib import suppress

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from trainers import quiet_trainer

from lightning_plugins.callbacks import RandomState, SaveOnSigterm
from lightning_plugins.core.lightning_internals import fit_progress, read_place

PLACES = (
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


class StoppedError(Exception):
    """The run was broken off."""


def checksum(value):
    """Of a batch: all its tensors and texts."""
    if isinstance(value, torch.Tensor):
        return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        value = sorted(value.items())
    if isinstance(value, (list, tuple)):
        return zlib.crc32(repr([checksum(item) for item in value]).encode())
    return zlib.crc32(repr(value).encode())


class Recorder(Callback):
    """What a run did until now. A checkpoint holds it too, so that nothing twice and nothing left out can hide."""

    def __init__(self):
        self.events = []

    def state_dict(self):
        return {"events": list(self.events)}

    def load_state_dict(self, state_dict):
        self.events = [tuple(event) for event in state_dict["events"]]

    def on_train_epoch_start(self, trainer, module):
        self.events.append(("epoch", trainer.current_epoch, trainer.global_step))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].item() if outputs else None
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        place = trainer.current_epoch, batch_idx, trainer.global_step, logged
        self.events.append(("batch", *place, checksum(batch), loss))

    def on_validation_end(self, trainer, module):
        batches = trainer.fit_loop.epoch_loop.batch_progress
        count = batches.total if trainer.check_val_every_n_epoch is None else batches.current
        due = count.ready % trainer.val_check_batch == 0
        if due and not trainer.sanity_checking:  # a stop makes one more, which is nobody's business
            logged = trainer.fit_loop.epoch_loop._batches_that_stepped
            seen = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.events.append(("validation", trainer.current_epoch, trainer.global_step, logged, *seen.items()))

    def on_train_epoch_end(self, trainer, module):
        if trainer.is_last_batch:  # not of an epoch that a stop has cut
            self.events.append(("end", trainer.current_epoch, trainer.global_step))


class SaveAnywhere(Checkpoint):
    """A checkpoint at each of the places, numbered; after the one with number ``last`` the run is broken off."""

    def __init__(self, folder, last=None, stop="crash"):
        self.folder, self.last, self.stop, self.paths = folder, last, stop, []

    def save(self, trainer, place):
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.folder is None:
            return
        finished = trainer.current_epoch + (place == "on_train_epoch_end" and trainer.is_last_batch)
        if finished == trainer.max_epochs or trainer.global_step == trainer.max_steps:
            return  # nothing is left to do: Lightning then calls no hook, not even on_train_end
        self.paths.append(self.folder / f"{len(self.paths):03}-{place}.ckpt")
        trainer.save_checkpoint(self.paths[-1])
        if self.last is not None and len(self.paths) > self.last:
            self.last = None
            if self.stop == "crash":
                raise StoppedError
            if self.stop == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                trainer.should_stop = True


for _place in PLACES:
    setattr(SaveAnywhere, _place, lambda self, trainer, *_, _place=_place: self.save(trainer, _place))


def fit(module, data, folder=None, ckpt_path=None, callbacks=(), last=None, stop="crash", **options):
    """One run, from the start or from a checkpoint; returns trainer, recorder and the checkpoints on the way."""
    recorder, saver = Recorder(), SaveAnywhere(folder, last, stop)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0} | options
    run = quiet_trainer(RandomState(), SaveOnSigterm(), *callbacks, recorder, saver, **options)
    with suppress(StoppedError, SIGTERMException):
        run.fit(module, data, ckpt_path=ckpt_path)
    return run, recorder, saver.paths


def final(run, folder):
    """All that a checkpoint holds at the end of a run, but for the callbacks' own notes."""
    path = folder / "final.ckpt"
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    del content["callbacks"]
    loops, place = content["loops"]["fit_loop"], read_place(fit_progress(content))
    content["epoch"], content["loops"] = place.epochs, (place.batches, place.is_last, loops["epoch_loop.state_dict"])
    content["loops"] += (loops["epoch_loop.batch_progress"]["total"]["processed"],)
    if place.batches and not place.is_last:  # else the loader's next epoch has its own start
        content["loaders"] = loops["state_dict"]
    return content


def differences(one, other, path=""):
    """Where two nested contents differ, in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other}, key=str)
        missing = [f"{path}.{key}" for key in keys if (key in one) != (key in other)]
        both = [key for key in keys if key in one and key in other]
        return missing + [place for key in both for place in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for k, (x, y) in pairs for place in differences(x, y, f"{path}[{k}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if one == other else [f"{path}: {one!r} != {other!r}"]


class Runs:
    """A way of training, whole and in pieces.

    Args:
        make: makes module and data, from seeded random numbers.
        folder: for the checkpoints.
        settings: of the trainer.
    """

    def __init__(self, make, folder, **settings):
        self.make, self.folder, self.settings, self.count = make, folder, settings, 0
        run, recorder, self.paths = self.run()
        self.events, self.final = recorder.events, final(run, folder)
        self.length = len(self.paths)

    def run(self, ckpt_path=None, seed=1, saves=True, **stop):
        self.count += 1
        folder = self.folder / f"{self.count:03}" if saves else None
        seed_everything(seed, verbose=False)
        module, data = self.make()
        seed_everything(seed, verbose=False)
        return fit(module, data, folder, ckpt_path, **stop, **self.settings)

    def assert_same_end(self, run, recorder, path):
        assert recorder.events == self.events, path
        assert differences(final(run, self.folder), self.final) == [], path

    def assert_resumes(self, path):
        """From one checkpoint to the end."""
        run, recorder, _ = self.run(path, seed=99, saves=False)
        self.assert_same_end(run, recorder, path)

    def assert_chain(self, seed):
        """Stops and resumes at random until the end."""
        choose, story, path = random.Random(seed), [], None
        for _ in range(4):
            stop, last = choose.choice(["crash", "stop", "signal"]), choose.randrange(max(1, self.length // 2))
            _, _, paths = self.run(path, seed=1 if path is None else choose.randrange(99), last=last, stop=stop)
            if not paths:  # it had come to its end before
                break
            path = choose.choice(paths[-4:])
            story.append((stop, last, str(path)))
        run, recorder, _ = self.run(path, seed=99, saves=False)
        self.assert_same_end(run, recorder, story)


def quiet():
    """Say nothing of each trainer that starts: there are hundreds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
