"""Train a small net with GradientPenalty and Flooding on one or more processes; save gradients and weights.

``torchrun --nproc_per_node 2 train_penalty.py FOLDER``. ``reference`` trains the same by plain autograd on the written
objective, in one loop that knows neither Lightning nor the callbacks.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rank_script import end, full
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins import Flooding, GradientPenalty, gradient_penalty_backward
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.sharding import shard_parts

RANKS, MICRO_BATCHES, ROWS, LR, DECAY = 2, 5, 6, 0.3, 0.1


@dataclass(frozen=True)
class Case:
    """One run of five micro-batches of six rows on each of two ranks."""

    penalty: dict = field(default_factory=dict)
    kind: str = "plain"
    flooding: dict | None = None
    accumulate: int = 1
    clip: float | None = None
    strategy: dict = field(default_factory=dict)
    sharded: bool = False
    manual: bool = False
    double: bool = True
    tolerance: float = 1e-10

    @property
    def scope(self):
        return self.penalty.get("scope", "step")


EXACT = {"engine": "exact"}
CENTRAL = {"difference": "central"}
AUTO = CENTRAL | {"engine": "auto"}
MICRO = {"scope": "microbatch"}
FLOOD = {"level": 1.15}
FLOOD_MICRO = FLOOD | MICRO
LAST, NEAR = 2e-6, 2e-8  # of forward and of central differences in double precision

CASES = {
    "forward": Case(tolerance=LAST),
    "central": Case(CENTRAL, accumulate=2, tolerance=NEAR),  # the last window is incomplete
    "exact": Case(EXACT),
    "exact-window": Case(EXACT, accumulate=2),
    "norm": Case(CENTRAL | {"norm": "norm"}, accumulate=2, tolerance=NEAR),
    "clip": Case(EXACT, accumulate=2, clip=0.1),
    "micro": Case(CENTRAL | MICRO, tolerance=NEAR),
    "micro-window": Case(CENTRAL | MICRO, accumulate=2, tolerance=NEAR),
    "micro-exact": Case(EXACT | MICRO),
    "micro-exact-window": Case(EXACT | MICRO | {"norm": "norm"}, accumulate=2),
    "unused": Case(CENTRAL, "branch", strategy={"find_unused_parameters": True}, tolerance=NEAR),
    "unused-window": Case(CENTRAL, "branch", accumulate=2, strategy={"find_unused_parameters": True}, tolerance=NEAR),
    "seldom": Case(CENTRAL, "seldom", strategy={"find_unused_parameters": True}, tolerance=NEAR),
    "seldom-exact": Case(EXACT, "seldom", strategy={"find_unused_parameters": True}),
    "unused-exact": Case(EXACT, "branch", strategy={"find_unused_parameters": True}),
    "unused-micro": Case(CENTRAL | MICRO, "branch", strategy={"find_unused_parameters": True}, tolerance=NEAR),
    "static": Case(CENTRAL, strategy={"static_graph": True}, tolerance=NEAR),
    "views": Case(CENTRAL, accumulate=2, strategy={"gradient_as_bucket_view": True}, tolerance=NEAR),
    "views-exact": Case(EXACT, strategy={"gradient_as_bucket_view": True}),
    "batch-norm": Case(CENTRAL, "batch-norm", tolerance=1e-6),
    "batch-norm-exact": Case(EXACT, "batch-norm"),
    "synced": Case(CENTRAL, "synced", accumulate=2, tolerance=NEAR),
    "synced-exact": Case(EXACT, "synced"),
    "hidden": Case(AUTO, "hidden", tolerance=NEAR),
    "hidden-window": Case(AUTO, "hidden", accumulate=2, tolerance=NEAR),
    "hidden-micro": Case(AUTO | MICRO, "hidden", accumulate=2, tolerance=NEAR),
    "detached": Case(AUTO, "detached", tolerance=NEAR),
    "flooded": Case(CENTRAL, flooding=FLOOD, accumulate=2, tolerance=NEAR),
    "flooded-exact": Case(EXACT, flooding=FLOOD),
    "flooded-exact-window": Case(EXACT, flooding=FLOOD, accumulate=2),
    "flooded-micro": Case(CENTRAL, flooding=FLOOD_MICRO, accumulate=2, tolerance=NEAR),
    "flooded-micro-exact": Case(EXACT, flooding=FLOOD_MICRO),
    "flooded-micro-micro": Case(CENTRAL | MICRO, flooding=FLOOD_MICRO, accumulate=2, tolerance=NEAR),
    "flooded-step-micro-exact": Case(EXACT | MICRO, flooding=FLOOD, accumulate=2),
    "manual": Case(CENTRAL, manual=True, tolerance=NEAR),
    "manual-exact": Case(EXACT, manual=True),
    "manual-views": Case(CENTRAL, manual=True, strategy={"gradient_as_bucket_view": True}, tolerance=NEAR),
    "manual-unused": Case(CENTRAL, "branch", manual=True, strategy={"find_unused_parameters": True}, tolerance=NEAR),
    "manual-unused-exact": Case(EXACT, "branch", manual=True, strategy={"find_unused_parameters": True}),
    "sharded": Case(CENTRAL, sharded=True, tolerance=NEAR),
    "sharded-window": Case(CENTRAL, sharded=True, accumulate=2, clip=0.1, tolerance=NEAR),
    "sharded-float": Case(CENTRAL, sharded=True, accumulate=2, double=False, tolerance=1e-3),
    "sharded-flooded": Case(CENTRAL, flooding=FLOOD, sharded=True, accumulate=2, tolerance=NEAR),
    "sharded-manual": Case(CENTRAL, manual=True, sharded=True, tolerance=NEAR),
}
COEFFICIENT = 0.4


def rows(micro_batch, rank):
    """The inputs and labels of one micro-batch on one rank; the ranks' differ in how hard they are."""
    generator = torch.Generator().manual_seed(10 * micro_batch + rank)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64) + 0.5 * rank
    return x, torch.randint(3, (ROWS,), generator=generator)


class DetachedSine(torch.autograd.Function):
    """Its backward is right, and cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.detach().cos()


class Net(nn.Module):
    """A perceptron; its kinds have batch norm, a mean over all processes, a branch, or what autograd.grad does not see.

    The branch is used where micro-batch + rank is odd, or (seldom) 0 or 1: later by no process.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.branch = nn.Linear(6, 3) if kind in ("branch", "seldom") else None
        self.norm = nn.BatchNorm1d(6) if kind == "batch-norm" else None

    def forward(self, x, index):
        several = dist.is_initialized()  # the reference is written without hiding
        if self.kind == "hidden" and several:
            h = checkpoint(self.first, x.detach().requires_grad_(), use_reentrant=True)
        else:
            h = self.first(x)
        if self.kind == "detached":
            h = DetachedSine.apply(h) if several else h.sin()
        if self.norm is not None:
            h = self.norm(h)
        if self.kind == "synced":
            mean = h.square().mean(0)
            if several:
                mean = all_reduce(mean) / dist.get_world_size()
            h = h / (1 + mean).sqrt()
        h = torch.tanh(h)
        out = self.last(h)
        used = index < 2 if self.kind == "seldom" else index % 2 == 1
        return out + self.branch(h) if self.branch is not None and used else out


class Module(LightningModule):
    """The net in automatic or, as the case says, manual optimization."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.case = Net(case.kind), case
        if case.double:
            self.double()
        self.automatic_optimization = not case.manual

    def configure_model(self):
        shard_parts(self, self.net)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        dtype = next(self.parameters()).dtype
        if self.automatic_optimization:
            return F.cross_entropy(self.net(x.to(dtype), index), y)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(x.to(dtype), index).square().mean())
        arguments = {key: value for key, value in self.case.penalty.items() if key in ("engine", "difference", "norm")}
        gradient_penalty_backward(
            self, lambda: F.cross_entropy(self.net(x.to(dtype), index), y), COEFFICIENT, **arguments
        )
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, weight_decay=DECAY)  # of parameters with a gradient

    def train_dataloader(self):
        rank = self.trainer.global_rank
        if self.trainer.world_size == RANKS:
            batches = [(*rows(i, rank), i + rank) for i in range(MICRO_BATCHES)]
            return DataLoader(batches, batch_size=None)
        both = ([rows(i, rank) for rank in range(RANKS)] for i in range(MICRO_BATCHES))
        batches = [(*map(torch.cat, zip(*parts, strict=True)), i) for i, parts in enumerate(both)]
        return DataLoader(batches, batch_size=None)


class Gradients(Callback):
    """What the optimizer gets, before clipping."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in pl_module.parameters()]
        self.found.append(torch.cat([full(grad).flatten() for grad in grads]))


def strategy(case):
    if case.sharded:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo", **case.strategy)


def run(name, folder, processes=RANKS, penalty=None, epochs=1, ckpt_path=None):
    """Train one case; write ``rank<r>.pt``."""
    case = CASES[name]
    gradients = Gradients()
    callbacks = [gradients, ModelCheckpoint(folder, "{step}", every_n_train_steps=MICRO_BATCHES, save_top_k=-1)]
    if not case.manual:
        callbacks.insert(0, GradientPenalty(COEFFICIENT, **(case.penalty | (penalty or {}))))
    if case.flooding:
        callbacks.insert(1, Flooding(**case.flooding))
    trainer = quiet_trainer(
        *callbacks,
        devices=processes,
        strategy="auto" if processes == 1 else strategy(case),
        precision="64-true" if case.double and not case.sharded else "32-true",  # FSDP2 takes the module as it is
        use_distributed_sampler=False,
        max_epochs=epochs,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
    )
    model = Module(case)
    trainer.fit(model, ckpt_path=ckpt_path)
    result = {
        "weights": torch.cat([full(p).flatten() for p in model.parameters()]),
        "gradients": torch.stack(gradients.found),
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "largest": largest_over_ranks(10 + trainer.global_rank, torch.device("cpu")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


def reference(name, coefficient=COEFFICIENT):
    """The gradient of every step, and the weights after the last, by autograd in double precision; and the signs."""
    case = CASES[name]
    model = Module(case).double()
    params = list(model.parameters())
    found, signs = [], []
    for start in range(0, MICRO_BATCHES, case.accumulate):
        window = range(start, min(start + case.accumulate, MICRO_BATCHES))
        losses = [loss for index in window for loss in _losses(model.net, case, index)]
        objective, sign = _objective(case, losses, params, coefficient)
        objective = objective * (len(window) / case.accumulate)  # an incomplete window is divided by the full length
        if case.manual:
            (index,) = window
            objective = objective + sum(model.net(rows(index, r)[0], index + r).square().mean() for r in (0, 1)) / 2
        grads = torch.autograd.grad(objective, params, allow_unused=True)
        total = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, grads, strict=True)]
        )
        found.append(total)
        signs.append(sign)
        factor = 1.0 if case.clip is None else min(1.0, case.clip / (total.norm().item() + 1e-6))  # as torch clips
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                if grad is not None:
                    param -= LR * (factor * grad + DECAY * param)
    weights = torch.cat([p.detach().flatten() for p in params])
    return {"weights": weights, "gradients": torch.stack(found), "buffers": list(model.buffers()), "signs": signs}


def _losses(net, case, index):
    """One loss for each rank; the statistics that are kept are those of rank 0, which DDP hands to all."""
    parts = [rows(index, rank) for rank in range(RANKS)]
    if case.kind == "synced":
        x, y = map(torch.cat, zip(*parts, strict=True))
        return [F.cross_entropy(net(x, index), y)]
    losses = []
    for rank, (x, y) in enumerate(parts):
        buffers = {key: value.clone() for key, value in net.named_buffers()} if rank else {}
        losses.append(F.cross_entropy(functional_call(net, buffers, (x, index + rank)), y))
    return losses


def _objective(case, losses, params, coefficient):
    level = -float("inf") if case.flooding is None else case.flooding["level"]
    signs = [1.0 if loss >= level else -1.0 for loss in losses]
    mean = sum(losses) / len(losses)
    if case.flooding and "scope" in case.flooding:  # F = mean of |l - b| + b
        flooded = sum(sign * loss for sign, loss in zip(signs, losses, strict=True)) / len(losses)
    else:
        signs = [1.0 if mean >= level else -1.0]
        flooded = signs[0] * mean
    terms = [flooded] if case.scope == "step" else losses
    return flooded + sum(_penalty(case, term, params, coefficient) for term in terms) / len(terms), signs


def _penalty(case, loss, params, coefficient):
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    squared = sum(grad.square().sum() for grad in grads)
    return coefficient * (squared.sqrt() if case.penalty.get("norm") == "norm" else squared)


RESUMED = {"penalty": {"warmup_steps": 7, "schedule": [[0, 0.5], [8, 2.0]]}, "epochs": 2}

if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for case in CASES:
        run(case, root / case)
    run("flooded-exact", root / "whole", **RESUMED)
    run("flooded-exact", root / "resumed", **RESUMED, ckpt_path=root / "whole" / f"step={MICRO_BATCHES}.ckpt")
    end()
