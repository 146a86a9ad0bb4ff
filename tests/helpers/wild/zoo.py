"""What a module of the wild suite says of itself, how it is made, and what it keeps from step to step."""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from types import MappingProxyType

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

ZOO: dict[str, type["Wild"]] = {}


class Wild(LightningModule):
    """A module of the suite. The first line of its docstring says what is wild about it.

    Attributes:
        lr: of SGD with momentum.
        epochs: of a run; two batches are an optimizer step each.
        seen: what finite differences see and autograd does not, such as kinks.
        islands: whether parts compute in fp32 whatever the precision, as normalisations of transformers do.
        step: relative displacement of differences, where the usual one is too coarse.
        movable: whether it lets itself be run at other weights.
        omitted: whether ODEDiagnostics leaves out the rows that need a second run.
        unlogged: whether it leaves out all rows.
        within: whether a hook looks at the gradients between the backward pass and the optimizer step: the exact
            penalty of a single batch is then there already.
        outside: names of attributes that hold state which no ``state_dict`` has.
        refused: what is refused, by the callback's name (or by "name, setting"): the sentence that is raised.
        warned: what is said, by the callback's name: patterns; ``"any"`` stands for each of them.
        unheard: what others say that is neither expected nor wrong: patterns.
        unsuited: what Lightning or torch refuses without any callback, by setting.
        late: the number of steps after which a module shows what it is; it must be refused before twice as many.
        twice: why differentiating twice is impossible: ``"exact"`` refuses with it, ``"auto"`` goes on by differences.
        doubted: names a custom function of which differences in bf16 show nothing: it is taken as it is, and told.
        faint: whether the penalty's part drowns in bf16's rounding, so that there the run's whole move is the measure.
        large: whether its cells take long; few are run by default.
        slow: whether none is run by default.
    """

    lr = 0.1
    epochs = 2
    islands = omitted = unlogged = within = faint = large = slow = False
    movable = True
    seen: str | None = None
    step: float | None = None
    late = 0
    outside: tuple[str, ...] = ()
    unheard: tuple[str, ...] = ()
    refused: Mapping[str, str] = MappingProxyType({})
    warned: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    unsuited: Mapping[str, str] = MappingProxyType({})
    twice: str | None = None
    doubted: str | None = None

    def __init_subclass__(cls, family=None, title=None, **options):
        super().__init_subclass__(**options)
        cls.family, cls.title = family, title
        if title is not None:
            ZOO[title] = cls

    @classmethod
    def batch(cls):
        """Draw one batch."""
        raise NotImplementedError

    @classmethod
    def loader(cls, batches):
        """What the trainer is given."""
        return plain_loader(batches)

    def configure_optimizers(self):
        trained = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    # A careful user keeps what a state_dict does not have

    def on_save_checkpoint(self, checkpoint):
        checkpoint["outside"] = {name: packed(getattr(self, name)) for name in self.outside}

    def on_load_checkpoint(self, checkpoint):
        for name in self.outside:
            setattr(self, name, unpacked(getattr(self, name), checkpoint["outside"][name]))

    def state(self):
        """All tensors that a run leaves behind, by name; copies."""
        found = {name: value.detach().clone() for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        for name in self.outside:
            found |= {f"{name}[{i}]": tensor for i, tensor in enumerate(tensors_in(packed(getattr(self, name))))}
        return found


class Networked(Wild):
    """All that is trained is one network."""

    def __init__(self):
        super().__init__()
        self.net = self.network()

    def network(self):
        """Make it."""
        raise NotImplementedError


def packed(value):
    """A value as tensors, numbers, lists and dicts, all copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Metric):
        return {"updates": value.update_count} | {name: packed(part) for name, part in value.metric_state.items()}
    if isinstance(value, nn.Module):
        return {name: packed(part) for name, part in value.state_dict().items()}
    if isinstance(value, dict):
        return {name: packed(part) for name, part in value.items()}
    if isinstance(value, list | tuple | deque):
        return [packed(part) for part in value]
    if value is None or isinstance(value, int | float | str):
        return value
    return packed(vars(value))


def unpacked(value, kept):
    """What was packed, in the place of ``value``, in the objects that are there where they are modules or tensors."""
    if isinstance(value, Tensor):
        return value.detach().copy_(kept)
    if isinstance(value, torch.Generator):
        value.set_state(kept)
    elif isinstance(value, Metric):
        value._update_count = kept.pop("updates")
        for name, part in kept.items():
            setattr(value, name, part)
    elif isinstance(value, nn.Module):
        value.load_state_dict(kept)
    elif isinstance(value, dict):
        value.update({name: unpacked(value[name], part) if name in value else part for name, part in kept.items()})
    elif isinstance(value, list | tuple | deque):
        parts = [unpacked(*pair) for pair in zip(value, kept, strict=True)] if len(value) == len(kept) else kept
        return deque(parts, value.maxlen) if isinstance(value, deque) else type(value)(parts)
    elif value is None or isinstance(value, int | float | str):
        return kept
    else:
        unpacked(vars(value), kept)
    return value


def tensors_in(kept) -> Iterator[Tensor]:
    """The tensors of what was packed, and its numbers as tensors."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, int | float):
        yield torch.tensor(kept, dtype=torch.float64)
    elif isinstance(kept, list | dict):
        for part in kept.values() if isinstance(kept, dict) else kept:
            yield from tensors_in(part)


class Fresh(Dataset):
    """Batches that are made anew each time: what a module does to one does not reach the next epoch."""

    def __init__(self, batches: Sequence[object]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> object:
        return deepcopy(self.batches[index])


def as_it_is(batch):
    """For a loader whose dataset has whole batches."""
    return batch


def plain_loader(batches):
    """In order; with a generator of its own, so that the loader draws no random number that a module would."""
    return DataLoader(Fresh(batches), batch_size=None, collate_fn=as_it_is, generator=torch.Generator())


@contextmanager
def default_dtype(dtype):
    """New tensors are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def _made(cls, dtype):
    torch.manual_seed(0)
    with default_dtype(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about other libraries
        return cls().train()


def make(cls, dtype):
    """A new module, the same each time."""
    return deepcopy(_made(cls, dtype))


@cache
def batches_of(cls, n, dtype):
    """The first batches; those of another type have the same numbers, rounded."""
    torch.manual_seed(1)
    with default_dtype(torch.float64):
        batches = [cls.batch() for _ in range(n)]
    return batches if dtype == torch.float64 else [_rounded(batch, dtype) for batch in batches]


def _rounded(value, dtype):
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _rounded(part, dtype) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rounded(part, dtype) for part in value)
    if hasattr(value, "__dict__"):
        other = deepcopy(value)
        vars(other).update({name: _rounded(part, dtype) for name, part in vars(value).items()})
        return other
    return value
