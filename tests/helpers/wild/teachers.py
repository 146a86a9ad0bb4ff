"""What follows the trained weights, or remembers past batches, in every place where people keep such things."""

from collections import Counter, deque
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wild.zoo import Wild

ROWS, WIDTH, CODE = 4, 6, 3
WRITES = "writes to parameters that are trained"


def network():
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CODE))


def follow(teacher, student, rate=0.9):
    """An exponential mean of the student's weights."""
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.mul_(rate).add_(fast, alpha=1 - rate)


class Views(Wild):
    """Two noisy views of each sample, a student and a teacher."""

    seen = "what is behind a stopped gradient"

    def __init__(self):
        super().__init__()
        self.student = network()
        self.build()

    def build(self):
        """Make the rest."""

    @classmethod
    def batch(cls):
        samples = torch.randn(ROWS, WIDTH)
        return samples + 0.1 * torch.randn(ROWS, WIDTH), samples + 0.1 * torch.randn(ROWS, WIDTH)

    def training_step(self, batch, batch_idx):
        self.move()
        return F.mse_loss(self.student(batch[0]), self.taught(batch[1]))

    def move(self):
        """Let the teacher follow."""

    @torch.no_grad()
    def taught(self, view):
        """The teacher's answer; another one as soon as it has moved."""
        return 1 - self.teacher(view)


class BYOL(Views, family="teachers", title="BYOL"):
    """A frozen part that follows the student within training_step; a predictor with batch norm."""

    def build(self):
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(CODE, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, CODE))

    def training_step(self, batch, batch_idx):
        follow(self.teacher, self.student)
        loss = 0
        for one, other in (batch, batch[::-1]):
            loss = loss - F.cosine_similarity(self.predictor(self.student(one)), self.taught(other)).mean()
        return loss


class MoCo(Views, family="teachers", title="MoCo"):
    """A queue of keys with its pointer, and an encoder that is moved by .data."""

    def build(self):
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(2 * ROWS, CODE), dim=-1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        query = F.normalize(self.student(batch[0]), dim=-1)
        with torch.no_grad():
            key = F.normalize(self.teacher(batch[1]), dim=-1)
        positive = (query * key).sum(-1, keepdim=True)
        logits = torch.cat([positive, query @ self.queue.clone().T], 1) / 0.2
        start = int(self.pointer)
        self.queue[start : start + ROWS] = key
        self.pointer[...] = (start + ROWS) % len(self.queue)
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class DINO(Views, family="teachers", title="DINO"):
    """A centre that follows the teacher's outputs, and a last layer with weight norm."""

    twice = "weight_norm"

    def build(self):
        self.student = nn.Sequential(self.student, weight_norm(nn.Linear(CODE, CODE, bias=False)))
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(CODE))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            told = self.teacher(batch[1])
        loss = F.cross_entropy(self.student(batch[0]), ((told - self.center) / 0.2).softmax(-1))
        self.center.mul_(0.5).add_(told.mean(0), alpha=0.5)
        follow(self.teacher, self.student, 0.5)
        return loss


class InList(Views, family="teachers", title="teacher in a list"):
    """The usual way to keep a teacher out of the checkpoint."""

    outside = ("hidden",)

    def build(self):
        self.hidden = [deepcopy(self.student).requires_grad_(False)]

    @property
    def teacher(self):
        return self.hidden[0]

    def move(self):
        follow(self.teacher, self.student)


class InDict(InList, family="teachers", title="teacher in a dict, requiring gradients"):
    """Nobody has told its weights that they are not trained."""

    def build(self):
        self.hidden = {"models": {"teacher": deepcopy(self.student)}}

    @property
    def teacher(self):
        return self.hidden["models"]["teacher"]


class Averaged(Views, family="teachers", title="AveragedModel"):
    """torch's own running mean, whose weights require gradients, as a part of the module."""

    def build(self):
        self.teacher = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def move(self):
        self.teacher.update_parameters(self.student)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=self.lr, momentum=0.9)


class Shadow:
    """A running mean in an object of one's own, as torch_ema keeps it."""

    def __init__(self, params, rate):
        self.rate, self.updates = rate, 0
        self.shadow_params = [param.detach().clone() for param in params]

    def update(self, params):
        self.updates += 1
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for slow, fast in zip(self.shadow_params, params, strict=True):
                slow.sub_((1 - rate) * (slow - fast))


class OwnObject(Views, family="teachers", title="running mean in an object"):
    """Shadow parameters and a count of updates in an object that is no module."""

    outside = ("shadow",)

    def build(self):
        self.shadow = Shadow(self.student.parameters(), 0.9)

    def move(self):
        self.shadow.update(self.student.parameters())

    def taught(self, view):
        names = [name for name, _ in self.student.named_parameters()]
        return 1 - torch.func.functional_call(
            self.student, dict(zip(names, self.shadow.shadow_params, strict=True)), view
        )


class MemoryBank(Views, family="teachers", title="memory in a deque"):
    """Past codes in a deque within a dict; the loss pushes new ones away from them."""

    outside, seen = ("memory",), None

    def build(self):
        self.memory = {"codes": deque([torch.zeros(CODE)], maxlen=3)}

    def training_step(self, batch, batch_idx):
        code = self.student(batch[0])
        loss = F.mse_loss(code, batch[1][:, :CODE])
        for old in self.memory["codes"]:
            loss = loss + torch.exp(-((code - old) ** 2).sum(-1)).mean()
        self.memory["codes"].append(code.detach().mean(0))
        return loss


class Counts(Views, family="teachers", title="counts in nested containers"):
    """A Counter, lists in dicts and tuples, and a weight of the loss that depends on them."""

    outside, seen = ("book",), None

    def build(self):
        self.book = {"loss": [], "seen": Counter(), "rows": ([], {"n": 0})}

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.student(batch[0]), batch[1][:, :CODE])
        self.book["loss"].append(loss.detach())
        self.book["seen"]["batches"] += 1
        self.book["rows"][0].append(len(batch[0]))
        self.book["rows"][1]["n"] += 1
        return loss * (1 + 0.1 * len(self.book["loss"]) + 0.1 * self.book["rows"][1]["n"])


class VQ(Wild, family="teachers", title="VQ-VAE"):
    """Codes chosen by distance, gradients straight through, a codebook of running means."""

    seen = "kinks"

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, CODE), nn.Linear(CODE, WIDTH)
        self.register_buffer("codes", torch.randn(5, CODE))
        self.register_buffer("counts", torch.ones(5))

    @classmethod
    def batch(cls):
        return torch.randn(ROWS, WIDTH)

    def training_step(self, batch, batch_idx):
        code = self.encoder(batch)
        chosen = torch.cdist(code, self.codes).argmin(-1)
        quantised = self.codes[chosen]
        loss = F.mse_loss(self.decoder(code + (quantised - code).detach()), batch) + F.mse_loss(code, quantised)
        with torch.no_grad():
            once = F.one_hot(chosen, len(self.codes)).to(code)
            self.counts.mul_(0.9).add_(once.sum(0), alpha=0.1)
            self.codes.mul_(0.9).add_((once.T @ code) / self.counts[:, None], alpha=0.1)
        return loss


class SwAV(Views, family="teachers", title="SwAV"):
    """Normalises trained weights at the start of each step."""

    omitted = True
    refused = dict.fromkeys(("difference", "all", "exact, accumulation", "auto, accumulation"), WRITES)
    warned = dict.fromkeys(("diagnostics",), (WRITES,))

    def build(self):
        self.prototypes = nn.Linear(CODE, CODE, bias=False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        one, other = (self.prototypes(F.normalize(self.student(view), dim=-1)) for view in batch)
        return F.cross_entropy(one / 0.5, (other.detach() / 0.2).softmax(-1))


class SimSiam(Views, family="teachers", title="SimSiam"):
    """The teacher is the student itself, without gradient; batch norm sees two views in a step."""

    def build(self):
        self.student = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, CODE))
        self.predictor = nn.Linear(CODE, CODE)

    def training_step(self, batch, batch_idx):
        one, other = (self.student(view) for view in batch)
        pairs = ((one, other), (other, one))
        return -sum(F.cosine_similarity(self.predictor(p), z.detach()).mean() for p, z in pairs) / 2


class Carried(Wild, family="teachers", title="LSTM with a carried state"):
    """Truncated backpropagation: the state of one batch begins the next."""

    outside = ("carried",)

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 5, batch_first=True), nn.Linear(5, WIDTH)
        self.carried = torch.zeros(1, ROWS, 5), torch.zeros(1, ROWS, 5)

    @classmethod
    def batch(cls):
        return torch.randn(ROWS, 4, WIDTH)

    def training_step(self, batch, batch_idx):
        hidden, carried = self.lstm(batch[:, :-1], self.carried)
        self.carried = tuple(part.detach() for part in carried)
        return F.mse_loss(self.head(hidden), batch[:, 1:])
