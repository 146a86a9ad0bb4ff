"""Metrics of two sets of images on one or two processes, which hold different numbers of them; saves the values."""

import torch

from lightning_plugins.metrics import FrechetDistance, KernelDistance, PrecisionRecallDensityCoverage

METRICS = {
    "frechet": lambda: FrechetDistance("digits"),
    "kernel": lambda: KernelDistance("digits", num_subsets=3, subset_size=40),
    "neighbours": lambda: PrecisionRecallDensityCoverage("digits"),
}
# images of each update: of the first process, then of the second; real, then generated
UPDATES = {"uneven": (([30, 20, 7], [18]), ([40], [9, 11, 5])), "none": (([30, 45], []), ([50, 20], []))}


def images(counts, number, rank=None):
    """Batches of a process, or of all of them in the order of their ranks."""
    generator = torch.Generator().manual_seed(number)
    batches = [[torch.rand(n, 1, 8, 8, generator=generator) ** (1 + number) for n in own] for own in counts]
    return batches[rank] if rank is not None else [batch for own in batches for batch in own]


def run(folder, rank=None):
    """Write every metric's value of every case; ``rank=None``: one process with all images."""
    values, distances = {}, {}
    for case, kinds in UPDATES.items():
        for name, make in METRICS.items():
            metric = make()
            for number, counts in enumerate(kinds):
                for batch in images(counts, number, rank):
                    metric.update(batch, real=number == 0)
            values[f"{case}/{name}"] = metric.compute()
            distances[case, name] = metric
    reference = folder / "reference.pt"
    distances["uneven", "frechet"].save_reference(reference)
    metric = distances["none", "frechet"]
    metric.load_reference(reference)  # the same file on every process, counted once
    values["reference"] = metric.compute()
    values["reference count"] = torch.load(reference, weights_only=True)["count"]
    torch.save(values, folder / f"images-rank{rank or 0}.pt")
