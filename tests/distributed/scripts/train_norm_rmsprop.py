"""Train a small network with NormRMSprop on one process, or sharded by FSDP2 over two, and save every rank's weights.

``torchrun --nproc_per_node 2 train_norm_rmsprop.py FOLDER``; the test also calls ``run`` for one process, in its own.
Every process sees the whole batch, so that all of them compute the same gradients.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from toys import Squares, mlp
from trainers import quiet_trainer

from lightning_plugins.optim import NormRMSprop

HALF = 5
OPTIONS = {
    "plain": {},
    "foreach": {"foreach": True, "momentum": 0.9, "weight_decay": 0.05},
    "loop": {"foreach": False, "momentum": 0.9, "weight_decay": 0.05},
}
ROUTES = {"sharded": {}, "flat": {"flatten_optimizer_state_dict": True}, "full": {"full_state_dict": True}}


class Net(Squares):
    """Two layers; the last one's bias has one number, of which the second rank holds nothing."""

    def __init__(self, options):
        super().__init__(mlp(5, 7, 1, seed=0).double())
        self.options = options

    def configure_model(self):
        """Shard under ModelParallelStrategy."""
        if self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            shard(self.net, self.device_mesh["data_parallel"])

    def loss(self, batch):
        return super().loss(batch) + self.net(batch).mean()

    def configure_optimizers(self):
        first, second = self.net[0].parameters(), self.net[2].parameters()
        return NormRMSprop([{"params": first}, {"params": second, "alpha": 0.5}], lr=0.05, **self.options)


def shard(net, mesh):
    """As FSDP2 is used."""
    fully_shard(net[0], mesh=mesh)
    fully_shard(net[2], mesh=mesh)
    fully_shard(net, mesh=mesh)


def batches():
    """Two epochs of the same batches."""
    epoch = torch.randn(HALF, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([epoch, epoch])


def make(options, mesh=None):
    model = Net(options)
    if mesh is not None:
        shard(model.net, mesh)
    return model, model.configure_optimizers()


def train(model, optimizer, steps):
    for batch in batches()[steps]:
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()


def whole(model):
    """Every weight in full."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def means(optimizer):
    """What each parameter's state says of its group's mean."""
    return [[optimizer.state[p]["mean_square_norm"].item() for p in g["params"]] for g in optimizer.param_groups]


def run(name, mesh=None):
    """All steps in one go."""
    model, optimizer = make(OPTIONS[name], mesh)
    train(model, optimizer, slice(None))
    return {"weights": whole(model), "means": means(optimizer)}


def resume(name, route, folder, mesh):
    """Save half-way into files, load into a fresh model and optimiser, and go on."""
    options = StateDictOptions(**ROUTES[route])
    model, optimizer = make(OPTIONS[name], mesh)
    train(model, optimizer, slice(HALF))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    fresh, resumed = make(OPTIONS[name], mesh)
    fresh.load_state_dict(model.state_dict())
    if route == "full":
        torch.save(state, folder / f"{name}-{dist.get_rank()}.pt")
        state = torch.load(folder / f"{name}-{dist.get_rank()}.pt", weights_only=True)
    else:
        dcp.save(state, checkpoint_id=folder / f"{name}-{route}")
        state = {"optimizer": get_optimizer_state_dict(fresh, resumed, options=options)}
        dcp.load(state, checkpoint_id=folder / f"{name}-{route}")
    set_optimizer_state_dict(fresh, resumed, state["optimizer"], options=options)
    train(fresh, resumed, slice(HALF, None))
    return {"weights": whole(fresh), "means": means(resumed)}


def with_lightning(folder, one_file):
    """Saved by Lightning half-way, sharded or as one file, and resumed by it."""
    for epochs, start in ((1, None), (2, folder / "half.ckpt")):
        model = Net(OPTIONS["plain"])
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not one_file)
        options = {"max_epochs": epochs, "use_distributed_sampler": False, "default_root_dir": folder}
        trainer = quiet_trainer(devices=2, strategy=strategy, **options)
        trainer.fit(model, DataLoader(batches()[:HALF], batch_size=None), ckpt_path=start, weights_only=True)
        if start is None:
            trainer.save_checkpoint(folder / "half.ckpt")
    return {"weights": whole(model), "means": means(trainer.optimizers[0])}


def main(folder):
    """All cases on two ranks."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {name: run(name, mesh) for name in OPTIONS}
    for name in OPTIONS:
        for route in ROUTES:
            results[f"{name} {route}"] = resume(name, route, folder, mesh)
    for one_file in (False, True):
        results[f"lightning {'file' if one_file else 'folder'}"] = with_lightning(folder / str(one_file), one_file)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    os._exit(0)  # a thread of gloo may abort the interpreter's own end, long after all is written
