import pytest
from torch import nn

from lightning_plugins.core.modes import evaluating


def test_each_part_has_its_own_mode_again_also_after_an_error():
    network, other = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())), nn.Dropout()
    network[1][0].eval()
    modes = [part.training for part in network.modules()]
    with pytest.raises(KeyError), evaluating(network, other):
        assert not any(part.training for whole in (network, other) for part in whole.modules())
        raise KeyError
    assert [part.training for part in network.modules()] == modes == [True, True, True, False, True]
    assert other.training


def test_what_was_in_evaluation_stays_there():
    network = nn.Sequential(nn.Dropout()).eval()
    with evaluating(network):
        pass
    assert not any(part.training for part in network.modules())
