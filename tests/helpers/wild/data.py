"""Batches and loaders as users make them, and what they do to them in the step."""

from copy import copy
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, IterableDataset

from wild.zoo import Fresh, Wild, as_it_is, plain_loader

ROWS, WIDTH, CLASSES = 4, 6, 3


def rows():
    return {"x": torch.randn(ROWS, WIDTH), "y": torch.randint(CLASSES, (ROWS,))}


class Rows(Wild):
    """A classifier of rows."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    @classmethod
    def batch(cls):
        return rows()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


class Pops(Rows, family="data", title="batch.pop"):
    """Takes the labels out of its batch."""

    def training_step(self, batch, batch_idx):
        labels = batch.pop("y")
        return F.cross_entropy(self.net(batch["x"]), labels)


class Replaces(Rows, family="data", title="batch['x'] = encoder(batch['x'])"):
    """Writes its features into the batch, of another shape."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 8)
        self.net = nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        batch["x"] = torch.tanh(self.encoder(batch["x"]))
        return super().training_step(batch, batch_idx)


class ListBatch(Rows, family="data", title="batch list that is emptied"):
    """Consumes a list, as a loop over chunks does."""

    @classmethod
    def batch(cls):
        return [rows(), rows()]

    def training_step(self, batch, batch_idx):
        loss = 0
        while batch:
            loss = loss + super().training_step(batch.pop(), batch_idx)
        return loss


class Mixup(Rows, family="data", title="mixup in place, half the time"):
    """Mixes the rows of its batch in place, with probability one half."""

    epochs = 3

    def training_step(self, batch, batch_idx):
        if torch.rand(()) < 0.5:
            share = torch.rand(()).item()
            batch["x"].mul_(share).add_(batch["x"].flip(0), alpha=1 - share)
        return super().training_step(batch, batch_idx)


class Normalises(Rows, family="data", title="batch scaled in place"):
    """Scales its batch in place in every step, by a factor that depends on what is there."""

    def training_step(self, batch, batch_idx):
        batch["x"] /= batch["x"].norm()
        batch["x"] *= 1 + batch["x"].abs().max()
        return super().training_step(batch, batch_idx)


class Graph:
    """A batch of graphs as PyG has it: attributes, items, .to(device), edges."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def __getitem__(self, name):
        return getattr(self, name)

    def to(self, device, non_blocking=False):
        other = copy(self)
        for name, part in vars(self).items():
            setattr(other, name, part.to(device) if isinstance(part, Tensor) else part)
        return other


class GraphNetwork(Wild, family="data", title="graph batch"):
    """An object with tensors, whose features the module replaces layer by layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, CLASSES)

    @classmethod
    def batch(cls):
        edges = torch.randint(8, (2, 12))
        return Graph(x=torch.randn(8, WIDTH), edge_index=edges, batch=torch.arange(8) // 4, y=torch.tensor([0, 1]))

    def training_step(self, batch, batch_idx):
        sources, targets = batch.edge_index
        for layer in self.layers:
            sums = torch.zeros_like(batch.x).index_add(0, targets, batch.x[sources])
            batch.x = torch.tanh(layer(batch.x + sums))
        pooled = batch.x.new_zeros(2, WIDTH).index_add(0, batch.batch, batch.x)
        return F.cross_entropy(self.head(pooled), batch.y)


@dataclass
class Pair:
    """A batch with names and types."""

    x: Tensor
    y: Tensor
    weight: float = 1.0


class Typed(Rows, family="data", title="dataclass batch"):
    """A dataclass, whose fields the module sets."""

    @classmethod
    def batch(cls):
        return Pair(**rows())

    def training_step(self, batch, batch_idx):
        batch.weight *= 0.5
        batch.x = batch.x + 0.1 * torch.randn_like(batch.x)
        return batch.weight * F.cross_entropy(self.net(batch.x), batch.y)


class Stream(IterableDataset):
    """Batches of which nobody knows the number."""

    def __init__(self, batches):
        self.fresh = Fresh(batches)

    def __iter__(self):
        return (self.fresh[index] for index in range(len(self.fresh)))


class Streamed(Rows, family="data", title="IterableDataset"):
    """The last batch is known as such when it comes."""

    @classmethod
    def loader(cls, batches):
        return DataLoader(Stream(batches), batch_size=None, collate_fn=as_it_is, generator=torch.Generator())


class Combined(Rows, family="data", title="CombinedLoader"):
    """Labelled and unlabelled batches at once."""

    @classmethod
    def batch(cls):
        return {"labelled": rows(), "other": torch.randn(ROWS, WIDTH)}

    @classmethod
    def loader(cls, batches):
        parts = {name: plain_loader([batch[name] for batch in batches]) for name in ("labelled", "other")}
        return CombinedLoader(parts, "max_size_cycle")

    def training_step(self, batch, batch_idx):
        scores = self.net(batch["other"])
        entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()
        return super().training_step(batch["labelled"], batch_idx) + 0.5 * entropy


class Draws(Rows, family="data", title="dataloader_iter"):
    """Draws its batches itself: a second run would draw others."""

    refused = dict.fromkeys(
        ("difference", "exact", "auto", "all"),
        "one that draws batches from dataloader_iter gets others: let training_step take",
    )
    omitted = True
    warned = dict.fromkeys(("any",), ("You are using the `dataloader_iter` step flavor", "Found `dataloader_iter`"))
    warned |= dict.fromkeys(("diagnostics",), ("ODEDiagnostics: .*dataloader_iter",))

    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


class Nothing(Rows, family="data", title="None for some batches"):
    """Leaves out batches, as users do with broken ones."""

    epochs = 4
    warned = dict.fromkeys(("any",), ("`training_step` returned `None`",))

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)


class NothingWhenSmall(Rows, family="data", title="None when the loss is small"):
    """A threshold on its own loss, which a replay elsewhere may fall below."""

    threshold, late = 1.0, 2
    refused = dict.fromkeys(("difference, bf16-mixed", "all, bf16-mixed"), "a loss at first, but None when it was")
    unheard = ("`training_step` returned `None`", "running the window again failed")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if loss < self.threshold else loss


class Dictionary(Rows, family="data", title="dict from training_step"):
    """Returns its loss among other things."""

    def training_step(self, batch, batch_idx):
        scores = self.net(batch["x"])
        return {"loss": F.cross_entropy(scores, batch["y"]), "scores": scores.detach(), "names": ["a"]}


class Packed(Wild, family="data", title="LSTM on packed rows"):
    """Rows of several lengths, packed; lengths travel as a list."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 5, num_layers=2, batch_first=True, dropout=0.2), nn.Linear(5, CLASSES)

    @classmethod
    def batch(cls):
        return torch.randn(3, 5, WIDTH), [5, 3, 2], torch.randint(CLASSES, (3,))

    def training_step(self, batch, batch_idx):
        x, lengths, labels = batch
        _, (hidden, _) = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        return F.cross_entropy(self.head(hidden[-1]), labels)
