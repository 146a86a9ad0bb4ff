"""Optimizer states by number, which FSDP2 takes for those of the module's parameters in their order."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_plugins.core.checkpoint_folders import refuse_numbers


def groups_of(net, kind):
    """Parameter groups, one list for each optimizer."""
    weights, biases = [net[0].weight, net[1].weight], [net[0].bias, net[1].bias]
    return {
        "in order": [[{"params": list(net.parameters())}]],
        "by kind": [[{"params": weights}, {"params": biases}]],
        "two optimizers": [[{"params": weights}], [{"params": biases}]],
        "partly frozen": [[{"params": [*net[1].parameters()]}]],
    }[kind]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["in order", "by kind", "two optimizers", "partly frozen"])
def test_numbers_that_would_mean_others_are_refused(kind, named, tmp_path):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # shapes alike, so that nothing else would tell
    optimizers = [torch.optim.Adam(groups) for groups in groups_of(net, kind)]
    net(torch.rand(3, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    if named:  # as `lightning-plugins consolidate` writes them
        states = [
            {"state": {f"p{key}": value for key, value in s["state"].items()}, "param_groups": []} for s in states
        ]
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": net.state_dict(), "optimizer_states": states}, path)
    strategy = SimpleNamespace(lightning_module=net, optimizers=optimizers)
    if named or kind == "in order":
        refuse_numbers(strategy, path)
        return
    told = r"last.ckpt' numbers the states of its optimizers, which FSDP2 would give to other parameters of Sequential"
    with pytest.raises(ValueError, match=told):
        refuse_numbers(strategy, path)


def test_nothing_is_asked_where_nothing_is_trained(tmp_path):
    refuse_numbers(SimpleNamespace(lightning_module=nn.Linear(1, 1), optimizers=[]), tmp_path / "missing.ckpt")
