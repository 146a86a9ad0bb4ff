"""What to draw, for models that learn without images: classes, or texts of a file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import random_integers
from lightning_plugins.data.loading import KeyBatches, KeyLoader, SplitLoaders, share_of_run

_LABEL = 30  # stream of random numbers


class KeyedPrompts(Dataset):
    """Batches by keys: ``{"prompt": list of str}``, or ``{"label": (B,) int64}`` where there are no texts.

    Args:
        prompts: P texts; key k asks for text k mod P, so that keys in a row take turns through all of them. ``None``
            for classes.
        num_classes: J, number of classes, where there are no texts.
        seed: seed of the classes; ``None`` lets them take turns like the texts.
    """

    def __init__(self, prompts: list[str] | None, num_classes: int | None = None, seed: int | None = None) -> None:
        self.prompts, self.num_classes, self.seed = prompts, num_classes, seed

    @property
    def num_kinds(self) -> int:
        """P prompts or J classes."""
        if self.prompts is not None:
            return len(self.prompts)
        assert self.num_classes is not None  # one of the two is given
        return self.num_classes

    def __getitem__(self, key: int) -> dict[str, Tensor | str]:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> dict[str, Tensor | list[str]]:
        """The finished batch of these keys."""
        if self.prompts is not None:
            return {"prompt": [self.prompts[key % len(self.prompts)] for key in keys]}
        k = torch.tensor(keys, dtype=torch.int64)
        if self.seed is None:
            return {"label": k % self.num_kinds}
        return {"label": random_integers(k, self.num_kinds, self.seed, _LABEL)}


class PromptBatches(KeyBatches):
    """Batches of keys, which cannot be resumed with other prompts or classes."""

    def __init__(self, dataset: KeyedPrompts, num_samples: int, batch_size: int, **share: Any) -> None:
        self._dataset = dataset
        super().__init__(num_samples, batch_size, **share)

    def share(self, world_size: int, rank: int) -> None:
        """In training each process has as many batches as one alone."""
        if self.train:
            self.num_samples = self.num_samples // self.world_size * world_size
        super().share(world_size, rank)

    def check(self) -> None:
        """Raise ``ValueError`` if there is not a condition for each process."""
        if not self.train and self.num_samples < self.world_size:
            raise ValueError(f"num_eval={self.num_samples} must be 1 or more for each of {self.world_size} processes.")

    @property
    def identity(self) -> dict[str, int]:
        """Batches, conditions in a batch of all processes, prompts or classes, seed."""
        return {
            "batch_size times processes": self.batch_size * self.world_size,
            "number of batches_per_epoch": self.num_samples // (self.batch_size * self.world_size),
            "number of prompts or classes": self._dataset.num_kinds,
            "seed of the data": self.seed,
        }


class PromptData(SplitLoaders):
    """Conditions without images, for a generative module that learns from a teacher, such as SiD.

    Batches are ``{"prompt": list of str}`` with a file, else ``{"label": (B,) int64}``. Classes are uniform at random;
    the lines of a file come equally often, in an order that is new in each epoch. Both depend on (seed, epoch, place)
    alone: several processes draw what one with the joined batch does, and a run resumed in mid-epoch draws what it had
    not yet drawn.

    Args:
        num_classes: number of classes to draw from; give it or prompt_file.
        prompt_file: text file in UTF-8 with a prompt on each line; empty lines are passed over.
        batch_size: conditions in a batch of one process.
        batches_per_epoch: training batches that count as an epoch.
        num_eval: conditions in validation, test and prediction, the same each time: classes 0, 1, ... in turn, or the
            first lines of the file.
        seed: seed of the order and of the classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither or both of ``num_classes`` and ``prompt_file``, a file without prompts or not in UTF-8, or
            a number out of range.

    Example:
        >>> data = PromptData(num_classes=3, batch_size=2, num_eval=5)
        >>> next(iter(data.train_dataloader()))["label"].shape
        torch.Size([2])
        >>> [batch["label"].tolist() for batch in data.val_dataloader()]
        [[0, 1], [2, 0], [1]]
    """

    def __init__(
        self,
        num_classes: int | None = None,
        prompt_file: str | None = None,
        batch_size: int = 256,
        batches_per_epoch: int = 1000,
        num_eval: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        must.check(
            locals(),
            num_classes=must.optional(must.whole(1, 2**31 - 1)),
            prompt_file=must.optional(must.path),
            batch_size=must.count,
            batches_per_epoch=must.count,
            num_eval=must.count,
            seed=must.seed,
        )
        if (num_classes is None) == (prompt_file is None):
            raise ValueError(
                f"num_classes={num_classes} and prompt_file={prompt_file!r}: give one of them, classes to draw or a "
                "text file with a prompt on each line."
            )
        self.num_classes, self.batch_size, self.batches_per_epoch = num_classes, batch_size, batches_per_epoch
        self.num_eval, self.seed = num_eval, seed
        self.prompts = None if prompt_file is None else read_prompts(prompt_file)

    def _loader(self, split: str) -> KeyLoader:
        train = split == "train"
        share = share_of_run(self.trainer, split)
        dataset = KeyedPrompts(self.prompts, self.num_classes, self.seed if train else None)
        samples = self.batches_per_epoch * self.batch_size * share["world_size"] if train else self.num_eval
        batches = PromptBatches(dataset, samples, self.batch_size, seed=self.seed, **share)
        return KeyLoader(dataset, batches, trainer=self.trainer)


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a text file that are not empty, without white space around them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts in it, or it is not UTF-8.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompt_file={str(file)!r}: there is no such file.")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            prompts = [line.strip() for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={str(file)!r} is not text in UTF-8: {error.reason}. Convert it.") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"prompt_file={str(file)!r} has no prompts: write one on each line.")
    return prompts
