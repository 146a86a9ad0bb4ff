"""A flipped bit anywhere in a checkpoint is seen, or changes nothing."""

import io
import os
import random
import time
import zipfile

import pytest
import torch
from lightning.pytorch import LightningModule
from trainers import save

from lightning_plugins import AtomicCheckpointIO
from lightning_plugins.cli.checkpoint import read_hyperparameters
from lightning_plugins.core.checkpoint_damage import damage
from lightning_plugins.core.checkpoint_data import read_as_data


@read_as_data
class Net(LightningModule):
    def __init__(self, width=40):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(width, 50)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint that plain Lightning wrote, and its content."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "a.ckpt"
    save(Net(), path)
    return path.read_bytes(), torch.load(path, weights_only=True)


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return type(one) is type(two) and one == two


def outside_of_tensors(data):
    """Where the headers, names, the description and the directory stand: all but the inside of large records."""
    inside = set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            header = data[entry.header_offset : entry.header_offset + 30]
            begin = entry.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            inside.update(range(begin + 8, begin + entry.file_size - 8))
    return [place for place in range(len(data)) if place not in inside]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_bits(good, tmp_path):
    """100 anywhere, 300 where no tensor is: each file is refused, or loads as what was written."""
    data, expected = good
    draw = random.Random(0)
    places = draw.choices(range(len(data)), k=100) + draw.choices(outside_of_tensors(data), k=300)
    seen = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.ckpt").write_bytes(flipped)
        try:
            content = AtomicCheckpointIO().load_checkpoint(tmp_path / "flipped.ckpt", weights_only=True)
        except OSError as error:
            assert "flipped.ckpt' is " in str(error) and str(error).endswith("Use an earlier one.")
            seen += 1
        else:
            assert equal(content, expected), place
    assert seen > 150


def test_a_record_that_torch_would_take_for_a_folder(good, tmp_path):
    """This one bit lies under no checksum, and torch would leave the record's tensor as its memory was."""
    data, _ = good
    flipped = bytearray(data)
    directory = data.rindex(b"PK\1\2", 0, data.rindex(b"/data/0"))
    flipped[directory + 38] ^= 0x10
    (tmp_path / "a.ckpt").write_bytes(flipped)
    assert "is damaged" in damage(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "is empty: the run that wrote it was cut off"),
        (lambda data: data[: len(data) // 2], "is truncated: the run that wrote it was cut off"),
        (lambda data: data[:-1], "is truncated: the run that wrote it was cut off"),
        (lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:], "is damaged (the checksum of "),
    ],
    ids=["empty", "half", "a byte less", "a bit"],
)
def test_load_from_checkpoint(good, tmp_path, change, words):
    path = tmp_path / "a.ckpt"
    path.write_bytes(good[0])
    assert Net.load_from_checkpoint(path, weights_only=True).hparams.width == 40
    assert damage(path) is None
    path.write_bytes(change(good[0]))
    with pytest.raises(OSError) as error:
        Net.load_from_checkpoint(path, weights_only=True)
    assert str(error.value).startswith(f"checkpoint {str(path)!r} {words}")
    assert str(error.value).endswith("Use an earlier one.")


def test_load_from_checkpoint_is_lightnings_otherwise(good):
    assert Net.load_from_checkpoint(io.BytesIO(good[0]), weights_only=True).hparams.width == 40
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Net().load_from_checkpoint(io.BytesIO(good[0]))
    with pytest.raises(FileNotFoundError):
        Net.load_from_checkpoint("nowhere.ckpt", weights_only=True)


def test_files_without_checksums_are_passed(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.ones(3)}, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert damage(tmp_path / "old.pt") is None
    assert damage(tmp_path / "none.pt") is None


@pytest.fixture
def file(good, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(good[0])
    return path


@pytest.fixture
def later(monkeypatch):
    """A minute after the files were written."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 60 * 10**9)


@pytest.fixture
def readings(monkeypatch):
    """How often all of a file was read for its checksums."""
    count, testzip = [], zipfile.ZipFile.testzip

    def counted(archive):
        count.append(archive.filename)
        return testzip(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", counted)
    return count


@pytest.mark.usefixtures("later")
def test_a_command_reads_a_files_checksums_once(file, readings):
    read_hyperparameters(file)
    Net.load_from_checkpoint(str(file))
    AtomicCheckpointIO().load_checkpoint(file)
    assert len(readings) == 1


@pytest.mark.usefixtures("later")
def test_a_file_that_has_changed_is_read_again(file, readings, good):
    assert damage(file) is None
    data, before = bytearray(good[0]), file.stat()
    data[data.index(b"state_dict") + 2] ^= 1
    time.sleep(0.05)  # longer than a tick of the clock of files
    file.write_bytes(data)  # as long, and the same inode
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    assert "is damaged" in damage(file)
    assert "is damaged" in damage(file)
    (file.parent / "new.ckpt").write_bytes(good[0])
    os.replace(file.parent / "new.ckpt", file)
    assert damage(file) is None
    assert len(readings) == 3


def test_a_file_just_written_is_read_each_time(file, readings):
    """It may change again with no change of its time."""
    assert damage(file) is damage(file) is None
    assert len(readings) == 2
