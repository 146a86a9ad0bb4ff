"""Callbacks under Fabric, which takes any and would call none of their hooks."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from lightning_plugins import callbacks

ALL = {
    name: value
    for name in callbacks.__all__
    if isinstance(value := getattr(callbacks, name), type) and issubclass(value, Callback)
}
ARGUMENTS = {"GradientPenalty": {"coefficient": 0.1}, "Flooding": {"level": 0.1}}


@pytest.mark.parametrize("name", ALL)
def test_fabric_is_refused_before_its_loop(name):
    """Each callback of the package that a user can name."""
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[ALL[name](**ARGUMENTS.get(name, {}))])
    module = nn.Linear(2, 1)
    with pytest.raises(MisconfigurationException, match=f"{name} would do nothing under Fabric.*Trainer.callbacks"):
        fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))


def test_there_are_callbacks_to_refuse():
    assert {"GradientPenalty", "Flooding", "ODEDiagnostics", "NonFiniteGuard", "RandomState"} <= ALL.keys()
