"""Training steps of one module under several sets of callbacks, taking turns in one process.

Shared by the benchmarks of callbacks; it prints nothing itself.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

WARM_UP = 2  # steps at the start of each turn that are not counted


class StepTimer(Callback):
    """Seconds from one step's beginning to the next one's: everything that a step costs within ``Trainer.fit``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.marks = clock, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mark."""
        self.marks.append(self.clock())

    @property
    def steps(self) -> list[float]:
        """Seconds of each counted step."""
        return [b - a for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)][WARM_UP:]


class Task(LightningModule):
    """A network trained by SGD with momentum on one batch, again and again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy over the last dimension."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return torch.relu(x + self.body(x))


class Block(nn.Module):
    """Pre-norm transformer block; attention by one fused kernel or written out."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def cnn() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A residual network with batch norm, and 64 images 28x28."""
    layers = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), Residual(16)]
    head = [nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), Residual(32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, *head, nn.Linear(32, 10))
    return network, (torch.randn(64, 1, 28, 28), torch.randint(10, (64,)))


def transformer(fused: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Four blocks of width 128 on 16 sequences of 64 tokens."""
    blocks = [Block(128, 4, fused) for _ in range(4)]
    network = nn.Sequential(nn.Embedding(256, 128), *blocks, nn.LayerNorm(128), nn.Linear(128, 256))
    return network, (torch.randint(256, (16, 64)), torch.randint(256, (16, 64)))


def take_turns(
    module: LightningModule,
    batch: Any,
    variants: dict[str, Callable[[], list[Callback]]],
    rounds: int,
    steps: int,
    accelerator: str = "cpu",
    precision: str = "32-true",
    statistic: Callable[[list[float]], float] = statistics.median,
    **options: Any,
) -> dict[str, list[float]]:
    """Seconds of a step of each variant, one number per round: CPU time, or wall time on a GPU.

    ``options`` are the trainer's.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, callbacks in variants.items():
            timer = StepTimer(time.process_time if accelerator == "cpu" else _wall)
            trainer = Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,
                max_steps=steps + WARM_UP + 1,
                callbacks=[timer, *callbacks()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **({"logger": False} | options),
            )
            trainer.fit(module, DataLoader([batch] * (steps + WARM_UP + 1), batch_size=None))
            times[name].append(statistic(timer.steps))
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each variant's time by the base's of the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, times[base], strict=True)) for name, own in times.items()
    }


def _wall() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
