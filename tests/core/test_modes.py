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


class Merges(nn.Linear):
    """As adapters do that are merged into the weights in evaluation: ``train(True)`` takes them out again."""

    def __init__(self):
        super().__init__(1, 1)
        self.calls = []

    def train(self, mode=True):
        self.calls.append(mode)
        return super().train(mode)


def test_a_part_may_undo_what_it_did_for_the_evaluation():
    part = Merges()
    with evaluating(nn.Sequential(part)):
        assert part.calls == [False]
    assert part.calls[-1] is True and part.training


def test_children_keep_another_mode_than_their_parents():
    network = nn.Sequential(nn.Sequential(nn.Dropout(), nn.ReLU()), nn.Sequential(nn.Dropout()))
    network[0].eval()
    network[0][1].train()
    network[1].training = False  # itself, but not what is in it
    modes = [part.training for part in network.modules()]
    with evaluating(network):
        pass
    assert [part.training for part in network.modules()] == modes
