"""Loops, optimizers, hooks and bookkeeping of one's own."""

from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MeanSquaredError

from wild.data import CLASSES, ROWS, WIDTH, Rows
from wild.zoo import Wild

MANUAL = {
    **dict.fromkeys(("difference", "exact", "auto", "all"), "works with automatic optimization"),
    "flooding": "Flooding works with automatic optimization",
}
NOT_MANUAL = {
    "accumulation": "gradient accumulation.* not supported for manual optimization",
    "clipping": "gradient clipping is not supported for manual optimization",
}
HOOKED = "gives another gradient .*a hook changes gradients"
OMITTED = {"diagnostics": ("has automatic_optimization=False, so that its training_step cannot be run",)}


class GAN(Wild, family="training", title="GAN, two optimizers by hand"):
    """Two optimizers that take turns by manual optimization; the generator's noise is drawn twice."""

    refused, unsuited, warned = MANUAL, NOT_MANUAL, OMITTED

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    @classmethod
    def batch(cls):
        return torch.randn(ROWS, WIDTH)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(torch.randn(ROWS, 2).to(batch))
        loss = F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(batch)).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        fake = self.generator(torch.randn(ROWS, 2).to(batch))
        second.zero_grad()
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.critic, self.generator)]


class HandMade(Rows, family="training", title="manual optimization"):
    """One optimizer, stepped by hand in two halves of a batch."""

    refused, unsuited, warned = MANUAL, NOT_MANUAL, OMITTED

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for half in (slice(0, 2), slice(2, None)):
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch["x"][half]), batch["y"][half])
            self.manual_backward(loss)
            optimizer.step()
        return loss


class TiedTwice(Wild, family="training", title="tied weights listed twice"):
    """One matrix, two names, both given to the optimizer."""

    omitted = True
    warned = dict.fromkeys(("any",), ("optimizer contains a parameter group with duplicate parameters",))
    warned |= dict.fromkeys(("diagnostics",), (r"lists a parameter twice in a group \(tied weights\)",))

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 9, bias=False)
        self.head.weight = self.embedding.weight

    @classmethod
    def batch(cls):
        return torch.randint(9, (ROWS,)), torch.randint(9, (ROWS,))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(torch.tanh(self.body(self.embedding(batch[0])))), batch[1])

    def configure_optimizers(self):
        parts = (self.embedding, self.body, self.head)
        return torch.optim.SGD(chain.from_iterable(part.parameters() for part in parts), lr=self.lr)


class Climbs(Rows, family="training", title="maximize=True"):
    """The optimizer climbs: what is returned is a score."""

    refused = dict.fromkeys(
        ("flooding", "all"), "Flooding works on a loss that is minimised, but SGD has maximize=True"
    )

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, maximize=True)


class SecondOrder(Rows, family="training", title="LBFGS"):
    """Several evaluations to a step."""

    omitted = True
    refused = dict.fromkeys(
        ("difference", "exact", "auto", "flooding", "all"), "LBFGS evaluates several: use an optimizer"
    )
    warned = dict.fromkeys(("diagnostics",), ("LBFGS is none of SGD",))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=1)


class Groups(Rows, family="training", title="AdamW, groups, a part without"):
    """Rates of their own for two groups; the first bias belongs to none."""

    def configure_optimizers(self):
        first, last = self.net[0], self.net[2]
        groups = [{"params": [first.weight], "lr": 1e-2}, {"params": last.parameters(), "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, lr=3e-2)


class ClipsByHand(Rows, family="training", title="clips in on_after_backward"):
    """A hook that changes gradients: the loss has others."""

    omitted = within = True
    refused = dict.fromkeys(("difference", "all", "exact, accumulation", "auto, accumulation"), HOOKED)
    warned = dict.fromkeys(("diagnostics",), (HOOKED,))

    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClipsLate(ClipsByHand, family="training", title="clips in on_after_backward, later"):
    """The same hook, which has nothing to do in the first steps."""

    epochs, late, outside = 10, 6, ("steps",)

    def __init__(self):
        super().__init__()
        self.steps = 0

    def on_after_backward(self):
        self.steps += 1
        if self.steps > self.late:
            super().on_after_backward()


class Unfreezes(Rows, family="training", title="unfreezes on the way"):
    """The first layer is frozen for two batches; the optimizer has it from the start."""

    outside = ("batches",)

    def __init__(self):
        super().__init__()
        self.batches = 0
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        self.batches += 1
        if self.batches > 2:
            self.net[0].requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class OwnGenerator(Rows, family="training", title="own generator"):
    """Noise from a torch.Generator that the module keeps."""

    outside = ("noise",)

    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        noise = torch.randn(batch["x"].shape, generator=self.noise).to(batch["x"])
        return super().training_step(batch | {"x": batch["x"] + 0.3 * noise}, batch_idx)


class Dropout(Rows, family="training", title="dropout, Python's and NumPy's random numbers"):
    """Draws from three generators in a step."""

    def training_step(self, batch, batch_idx):
        import random

        import numpy as np

        x = batch["x"] * (1 + 0.2 * random.random()) + 0.2 * np.random.rand()
        return F.cross_entropy(self.net[2](F.dropout(self.net[:2](x), 0.3)), batch["y"])


class Metrics(Rows, family="training", title="torchmetrics in a dict"):
    """Metrics that are no parts of the module, and one that is."""

    outside = ("metrics",)

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.metrics = {"train": {"error": MeanSquaredError()}, "means": [MeanMetric()]}

    def training_step(self, batch, batch_idx):
        scores = self.net(batch["x"])
        loss = F.cross_entropy(scores, batch["y"])
        self.mean.update(loss.detach())
        self.metrics["train"]["error"].update(scores.detach(), F.one_hot(batch["y"], CLASSES).to(scores))
        self.metrics["means"][0].update(loss.detach())
        self.log("train/mean", self.mean)
        return loss


class Clock:
    """An object of one's own that insists on growing steps."""

    def __init__(self):
        self.time = 0

    def tick(self, module, batch_idx):
        now = 1000 * module.ticks + batch_idx
        assert now > self.time, f"time went back from {self.time} to {now}"
        self.time = now


class InsistsOnOrder(Rows, family="training", title="object that insists on order"):
    """An object of its own asserts that it is called once a step."""

    outside = ("clock", "ticks")

    def __init__(self):
        super().__init__()
        self.clock, self.ticks = Clock(), 0

    def training_step(self, batch, batch_idx):
        self.ticks += 1
        self.clock.tick(self, batch_idx)
        return super().training_step(batch, batch_idx)


class RaisesElsewhere(Rows, family="training", title="raises at other weights"):
    """Insists that its weights are those of the batch's start, as a guard against stray edits does."""

    refused = dict.fromkeys(("difference", "all"), "weights are not those of the batch's start")
    movable, omitted = False, True
    warned = dict.fromkeys(("diagnostics",), ("running the window again failed with ArithmeticError",))

    def on_train_batch_start(self, batch, batch_idx):
        self.total = self.sum_of_weights()

    def sum_of_weights(self):
        return sum(param.detach().double().sum() for param in self.parameters())

    def training_step(self, batch, batch_idx):
        if self.sum_of_weights() != self.total:
            raise ArithmeticError("weights are not those of the batch's start")
        return super().training_step(batch, batch_idx)
