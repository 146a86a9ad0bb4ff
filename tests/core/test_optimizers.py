"""The parameters of an optimizer."""

import pytest
import torch
from torch.optim import SGD

from lightning_plugins.core.optimizers import parameters_of


def test_each_parameter_comes_once_in_the_order_of_the_groups():
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))  # equal, but not the same
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([{"params": [b, a, b]}, {"params": [c]}], lr=0.1)
    assert [id(p) for p in parameters_of(optimizer)] == [id(b), id(a), id(c)]
