"""Time and memory of a full step of SiD, both updates, against plain diffusion training of the same network.

    python benchmarks/sid_step.py [--size 8] [--channels 16 32] [--batch 64] [--rank 4] [--rounds 7] [--json PATH]

Plain training is DiffusionTeacher's, with a running mean as SiD's student is one. All take turns in one process, within
``Trainer.fit``: CPU time from one step to the next, medians of rounds, and medians of the ratios within a round.

- bytes a parameter: weights, gradients, optimisers' states and running means, each of all networks, by the teacher's
  number of parameters; at once: the most of these that live at a time, as each update frees its gradients;
- working memory: the most that a step allocates above what it began with, by the allocator: activations, and gradients.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from capsnet_step import cpu_model
from interleaved import WARM_UP, StepTimer, ratios
from judge import print_bars

from lightning_plugins.sid.diffusion_teacher import DiffusionTeacher
from lightning_plugins.sid.module import SiD

PLAIN, FULL = "plain diffusion", "SiD"
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Memory(Callback):
    """Bytes of what outlives a step, and the most that a step allocates."""

    def __init__(self) -> None:
        self.gradients: dict[int, int] = {}
        self.lasting = self.at_once = self.working = 0
        self._record: profile | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record a step that is not the first, which makes the optimisers' states."""
        if batch_idx == WARM_UP:
            self._record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._record.__enter__()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Count."""
        states = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
        weights = [*pl_module.parameters(), *(pl_module.teacher.network.parameters() if _is_sid(pl_module) else ())]
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        own = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.gradients[id(optimizer)] = size_of(own)
        self.lasting = max(self.lasting, size_of([*weights, *states]))
        self.at_once = max(self.at_once, size_of([*weights, *states, *gradients]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Read the allocator's record."""
        if self._record is None:
            return
        self._record.__exit__(None, None, None)
        events = [e for e in self._record.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        self.working, self._record = max(live), None

    @property
    def counted(self) -> int:
        """Weights, states and everybody's gradients."""
        return self.lasting + sum(self.gradients.values())


def _is_sid(module: LightningModule) -> bool:
    return isinstance(module, SiD)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes, shared ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.ndim}.values())


def fit(module: LightningModule, batch: dict[str, Tensor], steps: int, callback: Callback) -> None:
    """Some steps; plain training takes the batch again and again."""
    loader = None if _is_sid(module) else DataLoader([batch] * steps, batch_size=None)
    Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=[callback], **QUIET).fit(module, loader)


def build(args: argparse.Namespace, folder: Path) -> dict[str, LightningModule]:
    """The variants, of one network."""
    torch.manual_seed(0)
    plain = DiffusionTeacher((1, args.size, args.size), block_out_channels=args.channels, pictures_every_n_epochs=0)
    teacher = str(plain.export(folder / "teacher"))
    common = {"teacher": teacher, "batch_size": args.batch, "num_pictures": 0}
    return {PLAIN: plain, FULL: SiD(**common), f"SiD, LoRA of rank {args.rank}": SiD(**common, lora_rank=args.rank)}


def measure(args: argparse.Namespace) -> tuple[int, dict[str, list[float]], dict[str, Memory]]:
    """Parameters of the network; seconds of a step, one number a round; memory."""
    batch = {"image": torch.rand(args.batch, 1, args.size, args.size)}
    with tempfile.TemporaryDirectory() as folder:
        modules = build(args, Path(folder))
        memory = {name: Memory() for name in modules}
        times: dict[str, list[float]] = {name: [] for name in modules}
        for name, module in modules.items():
            fit(module, batch, WARM_UP + 2, memory[name])
        for _ in range(args.rounds):
            for name, module in modules.items():
                timer = StepTimer(time.process_time)
                fit(module, batch, args.steps + WARM_UP + 1, timer)
                times[name].append(statistics.median(timer.steps))
    return sum(p.numel() for p in modules[PLAIN].denoiser.parameters()), times, memory


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8, help="height and width of the images")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    parameters, times, memory = measure(args)

    by_plain = ratios(times, PLAIN)
    network = f"{parameters:,} parameters, batch {args.batch} of {args.size} x {args.size} px"
    print(f"{cpu_model()}, one thread, torch {torch.__version__}; {network}\n")
    print("| step | CPU ms | by plain | bytes a parameter | at once | working memory MB |\n|---|---|---|---|---|---|")
    rows = {}
    for name, own in memory.items():
        rows[name] = {
            "cpu_ms": 1e3 * statistics.median(times[name]),
            "by_plain": by_plain[name],
            "bytes_a_parameter": own.counted / parameters,
            "at_once": own.at_once / parameters,
            "working_mb": own.working / 1e6,
        }
        digits = (0, 2, 1, 1, 1)
        cells = (f"{value:.{d}f}" for value, d in zip(rows[name].values(), digits, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")
    lora = f"SiD, LoRA of rank {args.rank}"
    bars = {
        "step: SiD / plain": (by_plain[FULL], "<=", 4.2),
        "bytes a parameter: SiD": (rows[FULL]["bytes_a_parameter"], "<=", 40),
        "bytes a parameter: LoRA / SiD": (rows[lora]["bytes_a_parameter"] / rows[FULL]["bytes_a_parameter"], "<=", 0.6),
    }
    print_bars(bars)
    if args.json:
        args.json.write_text(json.dumps({"parameters": parameters, "rows": rows, "times": times}, indent=1))


if __name__ == "__main__":
    main()
