"""PromptData: what it draws, on several processes and resumed, and what it refuses."""

from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import chisquare
from toys import Squares
from trainers import quiet_trainer

from lightning_plugins.data import PromptData
from lightning_plugins.data.prompts import KeyedPrompts, PromptBatches

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

LINES = ["a cat", "ein Hündchen", "two, cats", "猫", "a dog"]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(f" {line} " for line in LINES).encode())
    return str(path)


def drawn(loader, name, epochs=1):
    batches = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        batches += [list(batch[name]) for batch in loader]
    return batches


def test_classes_are_uniform_and_new_in_each_epoch():
    data = PromptData(num_classes=7, batch_size=100, batches_per_epoch=35)
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"label"} and batch["label"].shape == (100,) and batch["label"].dtype == torch.int64
    first, second = torch.tensor(drawn(data.train_dataloader(), "label", epochs=2)).view(2, -1)
    assert len(first) == 3500 and not torch.equal(first, second)
    for labels in (first, second):
        assert chisquare(labels.bincount(minlength=7).numpy()).pvalue > 0.01
    other = PromptData(num_classes=7, batch_size=100, batches_per_epoch=35, seed=1)
    assert drawn(other.train_dataloader(), "label") != first.view(35, 100).tolist()


def test_lines_come_equally_often(prompt_file):
    data = PromptData(prompt_file=prompt_file, batch_size=4, batches_per_epoch=5, num_eval=7)
    assert data.prompts == LINES
    batches = drawn(data.train_dataloader(), "prompt", epochs=2)
    assert [len(batch) for batch in batches] == [4] * 10
    first, second = (list(chain(*part)) for part in (batches[:5], batches[5:]))
    assert sorted(first) == sorted(second) == sorted(LINES * 4) and first != second
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert drawn(loader, "prompt", epochs=2) == [LINES[:4], [LINES[4], *LINES[:2]]] * 2


def test_an_epoch_shorter_than_the_file_goes_on_in_the_next(prompt_file):
    data = PromptData(prompt_file=prompt_file, batch_size=1, batches_per_epoch=2)
    batches = drawn(data.train_dataloader(), "prompt", epochs=5)
    assert sorted(chain(*batches)) == sorted(LINES * 2)


@pytest.mark.parametrize("train", [True, False])
def test_processes_share_the_batches_of_one(train):
    dataset = KeyedPrompts(None, 5, seed=3 if train else None)
    share = {"train": train, "seed": 3}
    whole = [dataset.__getitems__(keys)["label"] for keys in PromptBatches(dataset, 24, 8, **share)]
    ranks = [PromptBatches(dataset, 24, 4, world_size=2, rank=rank, **share) for rank in range(2)]
    assert len(whole) == 3
    for joined, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(joined, torch.stack([dataset.__getitems__(keys)["label"] for keys in parts], 1).flatten())


class Recorder(Squares):
    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["prompt"] if "prompt" in batch else batch["label"].tolist())
        return self.loss(torch.ones(1))

    def validation_step(self, batch, batch_idx):
        pass


def seen(folder, data, steps, ckpt_path=None, save=False):
    model = Recorder()
    callbacks = [ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=3)] if save else []
    quiet_trainer(*callbacks, max_steps=steps).fit(model, data, ckpt_path=ckpt_path)
    return model.seen


def test_resumes_in_mid_epoch_and_refuses_other_prompts(prompt_file, tmp_path):
    def data(**other):
        return PromptData(**{"prompt_file": prompt_file, "batch_size": 3, "batches_per_epoch": 4, **other})

    whole = seen(tmp_path, data(), 6)
    assert seen(tmp_path, data(), 3, save=True) == whole[:3]
    assert seen(tmp_path, data(), 6, tmp_path / "saved" / "step=3.ckpt") == whole[3:]
    for other, words in (
        ({"prompt_file": None, "num_classes": 3}, "number of prompts or classes was 5 and is now 3"),
        ({"batches_per_epoch": 5}, "number of batches_per_epoch was 4 and is now 5"),
        ({"batch_size": 4}, "batch_size times processes was 3 and is now 4"),
    ):
        with pytest.raises(ValueError, match=f"Cannot resume in mid-epoch: the {words}"):
            seen(tmp_path, data(**other), 6, tmp_path / "saved" / "step=3.ckpt")


def test_refusals(prompt_file, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n  \n")
    binary.write_bytes(b"a\xff\xfe")
    for arguments, error, words in (
        ({}, ValueError, "num_classes=None and prompt_file=None: give one of them"),
        ({"num_classes": 3, "prompt_file": prompt_file}, ValueError, "give one of them"),
        ({"num_classes": 0}, ValueError, r"num_classes=0 must lie in \[1, 2147483647\]"),
        ({"num_classes": 3, "batches_per_epoch": 0}, ValueError, "batches_per_epoch=0 must be 1 or more"),
        ({"prompt_file": str(tmp_path / "none.txt")}, FileNotFoundError, "there is no such file"),
        ({"prompt_file": str(empty)}, ValueError, "has no prompts: write one on each line"),
        ({"prompt_file": str(binary)}, ValueError, "is not text in UTF-8"),
    ):
        with pytest.raises(error, match=words):
            PromptData(**arguments)
