"""One training step of the paper's CapsNet: streamed routing against tiled votes and against no routing at all.

    python benchmarks/capsnet_step.py --threads 2 --rounds 7 --json capsnet_step.json

Every variant is the package's CapsNet (batch 128 on 1x28x28, decoder, Adam) with another capsule layer; all take turns
in one process, so that a busy machine slows them alike. Times are medians of rounds, ratios medians of the ratios
within a round, by wall clock; where others use the machine, `--clock cpu --threads 1` takes the process's CPU time.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_plugins.capsnet import CapsNet, RoutingCapsules, squash

BATCH, N, D, J, K = 128, 1152, 8, 10, 16


class TiledCapsules(nn.Module):
    """Routing as popular implementations do it: W copied for each sample, 5-d votes and products, plain autograd."""

    def __init__(self, gradient: str, num_inputs: int = N) -> None:
        super().__init__()
        self.gradient = gradient
        self.weight = nn.Parameter(torch.randn(1, num_inputs, J, K, D) * J / (num_inputs * K) ** 0.5)

    def forward(self, u: Tensor) -> Tensor:
        """Route ``(B, N, D)`` to ``(B, J, K)``."""
        tiled = u[:, :, None, :, None].expand(-1, -1, J, -1, -1)  # (B, N, J, D, 1)
        votes = self.weight.expand(len(u), -1, -1, -1, -1) @ tiled  # (B, N, J, K, 1); matmul copies W B times
        constant = votes.detach() if self.gradient == "last" else votes
        logits = u.new_zeros(*u.shape[:2], J, 1, 1)
        for _ in range(2):
            v = squash((logits.softmax(2) * constant).sum(1, keepdim=True).squeeze(-1)).unsqueeze(-1)
            logits = logits + (constant * v).sum(3, keepdim=True)
        return squash((logits.softmax(2) * votes).sum(1).squeeze(-1))


class LinearCapsules(nn.Module):
    """The floor: a fixed linear map of the mean capsule to the same output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("map", torch.randn(D, J * K))

    def forward(self, u: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, J, K)``."""
        return (u.mean(1) @ self.map).view(-1, J, K)


class ContiguousFeatures(nn.Module):
    """The same feature layers, with the feature map kept in NCHW."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.conv, self.primary = features.conv, features.primary

    def forward(self, x: Tensor) -> Tensor:
        """Images to capsules."""
        return self.primary(self.conv(x).relu())


def build_step(capsules: nn.Module, layout: str = "channels_last", half: bool = False) -> Callable[[], None]:
    """Return a function that runs one training step of a CapsNet with this capsule layer."""
    torch.manual_seed(0)
    model = CapsNet()
    model.capsules = capsules
    if layout == "contiguous":
        model.features = ContiguousFeatures(model.features)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = {"image": torch.rand(BATCH, 1, 28, 28), "label": torch.randint(10, (BATCH,))}

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
            return sum(model.loss(batch).values())

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    step.forward, step.parameters = forward, list(model.parameters())
    return step


def build_layer(capsules: nn.Module) -> Callable[[], None]:
    """Return a function that runs forward and backward of a capsule layer alone."""
    u = squash(torch.randn(BATCH, N, D)).requires_grad_()

    def step() -> None:
        u.grad = capsules.weight.grad = None
        capsules(u).square().sum().backward()

    return step


def interleave(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run all variants in turn; return each one's milliseconds of wall and CPU time, one of each per round."""
    times = {name: {"wall": [], "cpu": []} for name in variants}
    for done in range(-1, rounds):  # the first round warms up
        for name, step in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if done >= 0:
                times[name]["wall"].append(1e3 * (time.perf_counter() - wall))
                times[name]["cpu"].append(1e3 * (time.process_time() - cpu))
    return times


def ratio(times: dict, clock: str, one: str, other: str) -> float:
    """Median over rounds of one variant's time by another's."""
    return statistics.median(a / b for a, b in zip(times[one][clock], times[other][clock], strict=True))


def saved_bytes(step: Callable[[], None]) -> int:
    """Bytes kept for backward besides the parameters, each storage counted once."""
    parameters = {p.untyped_storage().data_ptr() for p in step.parameters}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step.forward()  # keeps all of them alive, so that no address comes twice
    del result
    return sum(storages.values())


def extra_bytes(num_inputs: int, gradient: str) -> int:
    """Most bytes the layer holds at once in forward and backward, by the allocator, without the gradients."""
    layer = RoutingCapsules(D, J, K, num_inputs, gradient=gradient)
    u = squash(torch.randn(BATCH, num_inputs, D)).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        layer(u).sum().backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(live) - u.grad.nbytes - layer.weight.grad.nbytes


def measure_steps(rounds: int) -> tuple[dict, dict]:
    """Time the whole training step of every variant; count what each saves for backward."""
    variants = {
        "no routing (floor)": build_step(LinearCapsules()),
        "streamed, last": build_step(RoutingCapsules(D, J, K, N, gradient="last")),
        "streamed, full": build_step(RoutingCapsules(D, J, K, N, gradient="full")),
        "tiled, last": build_step(TiledCapsules("last")),
        "tiled, full": build_step(TiledCapsules("full")),
        "no routing (floor), NCHW": build_step(LinearCapsules(), "contiguous"),
        "streamed, full, NCHW": build_step(RoutingCapsules(D, J, K, N), "contiguous"),
        "no routing (floor), bf16": build_step(LinearCapsules(), half=True),
        "streamed, full, bf16": build_step(RoutingCapsules(D, J, K, N), half=True),
    }
    saved = {name: saved_bytes(step) for name, step in variants.items()}
    return interleave(variants, rounds), saved


def measure_layers(rounds: int) -> dict:
    """Time forward and backward of the capsule layer alone."""
    layers = {f"streamed, {g}": build_layer(RoutingCapsules(D, J, K, N, gradient=g)) for g in ("last", "full")}
    layers |= {f"tiled, {g}": build_layer(TiledCapsules(g)) for g in ("last", "full")}
    return interleave(layers, rounds)


def compare(clock: str, steps: dict, saved: dict, layers: dict, extra: dict) -> list[tuple[str, float, str, bool]]:
    """Return what is promised: the ratio's name, its value, the target, and whether it holds."""
    floor = "no routing (floor)"
    at_most = [
        ("step: streamed last / floor", ratio(steps, clock, "streamed, last", floor), 1.12),
        ("step: streamed full / floor", ratio(steps, clock, "streamed, full", floor), 1.15),
        ("saved bytes: streamed full / tiled full", saved["streamed, full"] / saved["tiled, full"], 0.10),
        ("saved bytes: streamed last / tiled last", saved["streamed, last"] / saved["tiled, last"], 0.10),
        ("layer extra bytes, last: N 4608 / 1152", extra["last"][4608] / extra["last"][1152], 1.10),
        ("layer extra bytes, full: N 4608 / 1152", extra["full"][4608] / extra["full"][1152], 1.10),
    ]
    at_least = [
        ("step: tiled last / streamed last", ratio(steps, clock, "tiled, last", "streamed, last"), 1.9),
        ("step: tiled full / streamed full", ratio(steps, clock, "tiled, full", "streamed, full"), 1.9),
        ("layer: tiled last / streamed last", ratio(layers, clock, "tiled, last", "streamed, last"), 8.0),
        ("layer: tiled full / streamed full", ratio(layers, clock, "tiled, full", "streamed, full"), 4.0),
    ]
    informal = [
        ("step, NCHW: streamed full / floor", ratio(steps, clock, "streamed, full, NCHW", "no routing (floor), NCHW")),
        ("step, bf16: streamed full / floor", ratio(steps, clock, "streamed, full, bf16", "no routing (floor), bf16")),
        ("step, streamed full: channels_last / NCHW", ratio(steps, clock, "streamed, full", "streamed, full, NCHW")),
        ("step, streamed full: bf16 / fp32", ratio(steps, clock, "streamed, full, bf16", "streamed, full")),
    ]
    rows = [(name, value, f"<= {target}", value <= target) for name, value, target in at_most]
    rows += [(name, value, f">= {target}", value >= target) for name, value, target in at_least]
    return rows + [(name, value, "", True) for name, value in informal]


def print_tables(machine: str, steps: dict, saved: dict, layers: dict, extra: dict, rows: list) -> None:
    """Print the measurements as Markdown."""
    print(
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {BATCH}, {N}x{D} -> {J}x{K}\n"
    )
    print("| training step | wall ms | CPU ms | saved for backward MB |\n|---|---|---|---|")
    for name, times in steps.items():
        wall, cpu = (statistics.median(times[clock]) for clock in ("wall", "cpu"))
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {saved[name] / 1e6:.1f} |")
    print("\n| capsule layer alone | wall ms | CPU ms |\n|---|---|---|")
    for name, times in layers.items():
        print(f"| {name} | {statistics.median(times['wall']):.0f} | {statistics.median(times['cpu']):.0f} |")
    print("\n| layer's extra memory MB | " + " | ".join(f"N = {n}" for n in extra["full"]) + " |")
    print("|---" * (1 + len(extra["full"])) + "|")
    for gradient, sizes in extra.items():
        print(f"| streamed, {gradient} | " + " | ".join(f"{size / 1e6:.1f}" for size in sizes.values()) + " |")
    print("\n| ratio | measured | target | held |\n|---|---|---|---|")
    for name, value, target, held in rows:
        print(f"| {name} | {value:.3g} | {target} | {('yes' if held else 'NO') if target else ''} |")


def cpu_model() -> str:
    """Name the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each variant")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what the ratios are taken of")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    layers = measure_layers(args.rounds)
    extra = {g: {n: extra_bytes(n, g) for n in (1152, 2304, 4608)} for g in ("last", "full")}
    steps, saved = measure_steps(args.rounds)
    rows = compare(args.clock, steps, saved, layers, extra)
    print_tables(cpu_model(), steps, saved, layers, extra, rows)
    if args.json:
        figures = {"steps": steps, "layers": layers, "saved_bytes": saved, "extra_bytes": extra}
        ratios = {name: {"measured": value, "target": target} for name, value, target, _ in rows}
        machine = {"cpu": cpu_model(), "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps({"machine": machine, "ratios": ratios, **figures}, indent=1))


if __name__ == "__main__":
    main()
