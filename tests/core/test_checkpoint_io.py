"""A checkpoint is written whole or not at all, whatever happens in between; and read whole or not at all."""

import os
import signal
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from disks import little_room
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from toys import ImageClassifier
from trainers import quiet_trainer

from lightning_plugins import AtomicCheckpointIO, keep_checkpoints_whole
from lightning_plugins.core import checkpoint_io, replacing
from lightning_plugins.data import Digits

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:You passed in a `val_dataloader`"
)


def content(value, size=50_000):
    return {"state_dict": {"x": torch.full((size,), float(value))}, "pytorch-lightning_version": "2.6.6"}


def value(path):
    return torch.load(path, weights_only=True)["state_dict"]["x"][0].item()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of value 1."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), path)
    return path


class Tiny(ImageClassifier):
    def __init__(self):
        layers = torch.nn.Flatten(), torch.nn.Linear(64, 10)
        super().__init__(torch.nn.Sequential(*layers), partial(torch.optim.Adam, lr=1e-2))


def trainer_of(folder, *callbacks, **options):
    options = {"max_steps": 4, "limit_val_batches": 0} | options
    return quiet_trainer(*callbacks, default_root_dir=folder, **options)


def test_a_checkpoint_is_replaced_and_nothing_else_is_left(saved):
    AtomicCheckpointIO().save_checkpoint(content(2), saved)
    assert value(saved) == 2
    assert names(saved.parent) == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(saved, weights_only=True)["state_dict"]["x"].eq(2).all()
    AtomicCheckpointIO().remove_checkpoint(saved)
    assert names(saved.parent) == []


def test_a_full_disk_leaves_the_checkpoint_before(saved):
    with little_room(), pytest.raises(OSError) as error:
        AtomicCheckpointIO().save_checkpoint(content(2), saved)
    assert str(error.value) == (
        f"checkpoint {str(saved)!r} cannot be written: File too large. What had its name before is as it was."
    )
    assert value(saved) == 1
    assert names(saved.parent) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"last.ckpt' cannot be written: (Not a directory|File exists)\. What had"):
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "file" / "last.ckpt")


def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfASave:
    """In torch's place: killed with half a file on the disk."""

    serialization = torch.serialization

    def save(self, checkpoint, file):
        file.write(b"PK half of a checkpoint")
        file.flush()
        kill()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(
    ("module", "name", "killer"),
    [(checkpoint_io, "torch", HalfASave()), (replacing, "_flush", kill), (os, "replace", kill)],
    ids=["writing", "flushing", "renaming"],
)
def test_a_process_killed_while_it_saves(saved, module, name, killer):
    """The old file stands whole, and the next save removes what the killed one had begun."""
    checkpoint = content(2)
    if (child := os.fork()) == 0:
        try:
            setattr(module, name, killer)
            AtomicCheckpointIO().save_checkpoint(checkpoint, saved)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert value(saved) == 1
    (left,) = set(names(saved.parent)) - {"last.ckpt"}
    assert left.startswith(".saving-") and not left.endswith(".ckpt")
    AtomicCheckpointIO().save_checkpoint(content(3), saved)
    assert value(saved) == 3
    assert names(saved.parent) == ["last.ckpt"]


def test_only_what_a_dead_process_left_is_removed(tmp_path):
    host, own = replacing._HOST, os.getpid()
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f".saving-{host}-{os.getppid()}-00000000", ".saving-elsewhere-1-00000001", ".saving-notes", "other.tmp"]
    gone = [f".saving-{host}-{dead.pid}-00000002", f".saving-{host}-{own}-00000003", ".saving-elsewhere-1-00000004"]
    for name in kept + gone:
        (tmp_path / name).touch()
    os.utime(tmp_path / gone[-1], (0, 0))  # another machine's, of long ago
    with replacing.replacing(tmp_path / "a") as one:
        one.touch()
        with replacing.replacing(tmp_path / "b") as two:  # in another thread, say
            two.touch()
    assert names(tmp_path) == sorted([*kept, "a", "b"])


def test_permissions_are_those_of_any_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "new" / "a.ckpt")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new" / "a.ckpt").stat().st_mode) == 0o640


def test_a_link_is_replaced_not_followed(saved):
    link = saved.with_name("link.ckpt")
    link.symlink_to(saved.name)
    AtomicCheckpointIO().save_checkpoint(content(2), link)
    assert not link.is_symlink()
    assert (value(saved), value(link)) == (1, 2)


def test_checksums_are_kept_even_if_switched_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(OSError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_addresses_are_left_to_lightning(tmp_path):
    path = f"file://{tmp_path}/sub/a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), path)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]["x"][0] == 1
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(content(1), path, {})


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("plugin", [AtomicCheckpointIO, lambda: AsyncCheckpointIO(AtomicCheckpointIO())])
def test_in_a_run(tmp_path, save_last, plugin):
    """Files come and go as ModelCheckpoint wishes, and a run goes on from them."""
    saving = {"filename": "{step}", "every_n_train_steps": 2, "save_last": save_last}
    trainer_of(tmp_path, ModelCheckpoint(tmp_path, **saving), plugins=[plugin()]).fit(Tiny(), Digits(image_size=8))
    late = {"step=2.ckpt"} if isinstance(plugin(), AsyncCheckpointIO) else set()  # was to go before it was there
    assert set(names(tmp_path)) - late == {"last.ckpt", "step=4.ckpt"}
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    trainer = trainer_of(tmp_path, ModelCheckpoint(tmp_path, **saving), plugins=[plugin()], max_steps=6)
    trainer.fit(Tiny(), Digits(image_size=8), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 6


def test_an_error_in_the_background_is_not_lost(tmp_path):
    model = Tiny()
    model.large = torch.nn.Parameter(torch.zeros(50_000))
    saving = ModelCheckpoint(tmp_path / "sub", every_n_train_steps=4)
    trainer = trainer_of(tmp_path, saving, plugins=[AsyncCheckpointIO(AtomicCheckpointIO())])
    with little_room(), pytest.raises(OSError, match="cannot be written: File too large"):
        trainer.fit(model, Digits(image_size=8))
    assert names(tmp_path / "sub") == []


class Own(TorchCheckpointIO):
    pass


def test_what_the_user_named_stays(tmp_path):
    def plugin_of(**options):
        trainer = trainer_of(tmp_path, **options)
        keep_checkpoints_whole(trainer)
        return trainer.strategy.checkpoint_io

    assert type(plugin_of()) is AtomicCheckpointIO
    assert type(plugin_of(plugins=[Own()])) is Own
    assert type(plugin_of(plugins=[TorchCheckpointIO()])) is TorchCheckpointIO
    assert type(plugin_of(strategy=SingleDeviceStrategy("cpu", checkpoint_io=Own()))) is Own
    assert type(plugin_of(plugins=[AsyncCheckpointIO()]).checkpoint_io) is AtomicCheckpointIO
    assert type(plugin_of(plugins=[AsyncCheckpointIO(Own())]).checkpoint_io) is Own


def test_an_empty_path_component_is_the_current_folder(tmp_path):
    AtomicCheckpointIO().save_checkpoint(content(1), "a.ckpt")
    assert value(Path("a.ckpt")) == 1
