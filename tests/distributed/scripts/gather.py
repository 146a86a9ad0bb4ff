"""Rows of all processes: values, gradients of a network's weights and their derivatives; save them per rank.

``torchrun --nproc_per_node 4 gather.py FOLDER``. All processes together hold the same rows, be they four or two. The
two then compare images, too.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lightning_plugins.core.distributed import close_process_group_at_exit, gather_rows, sum_over_ranks
from lightning_plugins.eae.batch_norm import LatentBatchNorm
from lightning_plugins.eae.entropy import KNNEntropyLoss, knn_entropy, koleo_loss
from lightning_plugins.eae.gaussianity import mmd, sigreg
from lightning_plugins.eae.kept_codes import KNNEntropy

COUNTS = {1: (60,), 2: (37, 23), 4: (20, 0, 33, 7)}  # rows of each process


def encoder(outputs, dtype):
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs)).to(dtype)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 3)
    return net


def images(dtype):
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def normalise(h):
    return (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()


def mean_over_ranks(tensors):
    """What DDP does to gradients."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return [sum_over_ranks(tensor) / world for tensor in tensors]


def gradients(loss, net):
    return [gradient.detach() for gradient in mean_over_ranks(torch.autograd.grad(loss, list(net.parameters())))]


def all_rows_loss(net, x):
    rows, _ = gather_rows(net(x))
    return normalise(rows).tanh().prod(1).square().sum()


def penalty(net, x):
    """Squared norm of the gradient that DDP trains with, whose own gradient needs a second derivative."""
    first = torch.autograd.grad(all_rows_loss(net, x), list(net.parameters()), create_graph=True)
    return sum(gradient.square().sum() for gradient in mean_over_ranks(first))


def gathered_entropy(net, x, normalised_before=False):
    """Codes are normalised after the gather; before it is what a careless reader does."""
    h = net(x)
    if normalised_before:
        return knn_entropy(gather_rows(normalise(h))[0])
    return knn_entropy(LatentBatchNorm(4).all_rows(h)[0])


def batch_norm_state(x):
    """After two steps of training: this process's codes, and the statistics. Then one process alone evaluates."""
    norm = LatentBatchNorm(5).double()
    for scale in (1, 3):
        codes, own = norm.all_rows(scale * x)
    found = [codes, codes[own], norm.running_mean.clone(), norm.running_var.clone()]
    norm.eval()
    if not dist.is_initialized() or dist.get_rank() == 0:  # would wait for ever if it communicated
        norm(x)
    return found


def losses(rank):
    group = dist.group.WORLD if dist.is_initialized() else None
    return {
        "entropy": (4, gathered_entropy),
        "entropy of a group": (4, lambda net, x: knn_entropy(net(x), [1, 3], group=group)),
        "entropy module": (4, lambda net, x: KNNEntropyLoss(k=2)(net(x))),
        "koleo": (4, lambda net, x: koleo_loss(net(x), group=group)),
        # in one dimension there is but one slice; many draws of the same seed differ from many of one
        "sigreg": (1, lambda net, x: sigreg(net(x), group=group)),
    }


def metric_value(x):
    metric = KNNEntropy()
    if len(x):
        metric.update(x)
    return metric.compute()


def results(world, rank):
    """Everything of one process."""
    x64, x32 = (images(dtype).split(COUNTS[world])[rank] for dtype in (torch.float64, torch.float32))
    rows, own = gather_rows(x64)
    net = encoder(3, torch.float64)
    second = penalty(net, x64)
    found = {
        "rows": rows,
        "own": torch.tensor([own.start, own.stop]),
        "gradient": gradients(all_rows_loss(net, x64), net),
        "second": [second.detach(), *gradients(second, net)],
        "metric": metric_value(x32),
        "batch norm": batch_norm_state(x64),
    }
    for name, (outputs, loss) in losses(rank).items():
        net = encoder(outputs, torch.float64)
        value = loss(net, x64)
        found[name] = [value.detach(), *gradients(value, net)]
    net = encoder(4, torch.float64)
    if world == 2:
        found["wrong order"] = gradients(gathered_entropy(net, x64, normalised_before=True), net)
    net = encoder(4, torch.float32)
    group = dist.group.WORLD if dist.is_initialized() else None
    value = mmd(net(x32), generator=torch.Generator().manual_seed(rank), group=group)
    found["mmd"] = [value.detach(), *gradients(value, net)]
    directions = sigreg(net(x32), generator=torch.Generator().manual_seed(rank), group=group)
    found["sigreg directions"] = directions.detach()
    return found


if __name__ == "__main__":
    import compare_images

    close_process_group_at_exit()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(results(4, rank), folder / f"world4-rank{rank}.pt")
    dist.destroy_process_group()
    if rank < 2:  # the first two once more, as all there are
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
        torch.save(results(2, rank), folder / f"world2-rank{rank}.pt")
        compare_images.run(folder, rank)
        dist.barrier()
