"""Callbacks on a CapsNet whose routing is a custom operator: the penalty is that of stored votes by plain autograd."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from toys import flat
from trainers import fit

from lightning_plugins import CapsNet, GradientPenalty
from lightning_plugins.capsnet import layers
from lightning_plugins.capsnet.routing import compute_votes, route_votes

C = 0.3
SMALL = {"image_shape": (1, 14, 14), "num_classes": 4, "channels": 8, "kernel_size": 3, "num_types": 2}


class Watched(CapsNet):
    validation_step = LightningModule.validation_step  # Lightning would miss its data

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(decoder_hidden=(16,), **SMALL)
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(flat(param.grad for param in trained(self)))

    def configure_optimizers(self):
        return torch.optim.SGD(trained(self), lr=0.1)


def trained(module):
    return [param for param in module.parameters() if param.requires_grad]


def frozen(*parts):
    module = Watched()
    for part in parts:
        getattr(module, part).requires_grad_(False)
    return module


def stored(u, W, routing="dynamic", iterations=3, **options):
    return route_votes(compute_votes(u, W), routing, iterations, **options)


@pytest.mark.parametrize("parts", [(), ("features",), ("capsules",), ("features", "decoder")], ids=str)
def test_the_exact_penalty_behind_frozen_parts(parts, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 1, 14, 14, generator=generator, dtype=torch.float64)
    batch = {"image": images, "label": torch.tensor([0, 2, 3])}
    module = frozen(*parts).double()
    reference = copy.deepcopy(module)
    fit(module, [batch], GradientPenalty(C, engine="exact"), precision="64-true")
    monkeypatch.setattr(layers, "route", stored)
    params = trained(reference)
    loss = sum(reference.loss(batch).values())
    first = torch.autograd.grad(loss, params, create_graph=True)
    right = flat(torch.autograd.grad(loss + C * sum(g.square().sum() for g in first), params))
    assert (right - flat(first)).norm() > 1e-3 * right.norm()
    torch.testing.assert_close(module.gradients[0], right, rtol=1e-5, atol=1e-7)  # the margin loss is in fp32
