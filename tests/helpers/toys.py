"""Small LightningModules that many tests train; what is peculiar to one test stands in its file, as a subclass."""

from functools import partial
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

SGD = partial(torch.optim.SGD, lr=0.1)


def mlp(*sizes, seed=None):
    """Linear layers with tanh between them, drawn after ``seed`` if there is one."""
    if seed is not None:
        torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]


class Applies(nn.Module):
    """A ``torch.autograd.Function`` as a part of a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def flat(tensors):
    """One vector, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def weights(module):
    """All parameters of a module in one vector."""
    return flat(module.parameters())


class Squares(LightningModule):
    """Learns to answer zero: the mean square of what ``net`` makes of a batch.

    ``optimizer`` makes one of the parameters.
    """

    def __init__(self, net, optimizer=SGD):
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def loss(self, batch):
        return self.net(batch).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Regression(Squares):
    """Squared error on batches ``(x, y)``."""

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()


class Classifier(Squares):
    """Cross-entropy on batches ``(x, y)``."""

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class ImageClassifier(Squares):
    """Cross-entropy on the batches of an image data module."""

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["image"]), batch["label"])


class WatchedClassifier(Classifier):
    """Remembers parameters and gradients at each optimizer step."""

    def __init__(self, net, optimizer=SGD):
        super().__init__(net, optimizer)
        self.before, self.gradients = [], []

    def on_before_optimizer_step(self, optimizer):
        self.before.append({name: param.detach().clone() for name, param in self.named_parameters()})
        self.gradients.append(flat(param.grad for param in self.parameters()))


class LeastSquares(LightningModule):
    """A quadratic in float64 of five parameters in two tensors."""

    def __init__(self, optimizer):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
        self.optimizer = optimizer

    @property
    def theta(self):
        return torch.cat([self.a.flatten(), self.b])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return ((x @ self.theta - y) ** 2).mean() / 2 + 0.25

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def rows(n=12, seed=0):
    """A batch ``(x, y)`` for LeastSquares."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, dtype=torch.float64, generator=generator) * torch.tensor([2.0, 1.0, 0.5, 1.5, 1.0])
    return x, torch.randn(n, dtype=torch.float64, generator=generator)


class Bert(Squares):
    """A stock sentence classifier with random weights; ``options`` are its configuration's."""

    def __init__(self, optimizer=SGD, **options):
        from transformers import BertConfig, BertForSequenceClassification  # takes seconds

        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        config = BertConfig(**(sizes | options), num_hidden_layers=2, max_position_embeddings=12)
        super().__init__(BertForSequenceClassification(config), optimizer)

    def loss(self, batch):
        return self.net(**batch).loss
