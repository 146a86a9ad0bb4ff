"""NormRMSprop saved and resumed: by torch.save, by the parameters' names as sharded training does, by Lightning."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import RMSprop
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from toys import Squares, mlp
from trainers import fit, quiet_trainer

from lightning_plugins.optim import NormRMSprop

MEAN = "mean_square_norm"
SHAPES = [(3, 2), (4,), (), (2, 2, 2)]


def parameters(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train(optimizer, steps):
    """The gradients of a step are the same whatever the parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def save_and_load(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def dcp_route(**options):
    """As sharded training saves an optimiser: by the parameters' names, with nothing shared between them."""

    def route(model, optimizer):
        state = save_and_load(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options)))
        state = tree_map_only(torch.Tensor, torch.clone, state)

        def load(model, optimizer):
            set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(**options))

        return load

    return route


def plain_route(model, optimizer):
    state = save_and_load(optimizer.state_dict())
    return lambda model, optimizer: optimizer.load_state_dict(state)


ROUTES = {
    "torch.load": plain_route,
    "dcp": dcp_route(),
    "dcp full": dcp_route(full_state_dict=True),
    "dcp flat": dcp_route(flatten_optimizer_state_dict=True),
}


class Bag(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.params = torch.nn.ParameterList(parameters(dtype=dtype))


def make(dtype, momentum):
    bag = Bag(dtype)
    groups = [{"params": list(bag.params)[:3]}, {"params": list(bag.params)[3:], "alpha": 0.5}]
    return bag, NormRMSprop(groups, lr=0.1, momentum=momentum, weight_decay=0.01)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted_bit_for_bit(route, momentum, dtype):
    expected = train(make(dtype, momentum)[1], range(10))
    bag, optimizer = make(dtype, momentum)
    train(optimizer, range(4))
    load = ROUTES[route](bag, optimizer)
    fresh, resumed = make(dtype, momentum)
    fresh.load_state_dict(bag.state_dict())
    load(fresh, resumed)
    actual = train(resumed, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    first, second = ([resumed.state[p][MEAN] for p in group["params"]] for group in resumed.param_groups)
    assert all(mean is first[0] for mean in first) and second[0] is not first[0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_parameters_old_copy_of_the_mean_does_not_come_back(frozen):
    """After loading, each parameter has a copy; the one that is frozen from then on must not keep a stale one."""
    params = parameters([(2,), (2,)])
    optimizer = NormRMSprop(params, lr=0.1)
    train(optimizer, range(2))
    fresh = parameters([(2,), (2,)])
    resumed = NormRMSprop(fresh, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    fresh[1 - frozen].grad = torch.ones_like(fresh[1 - frozen])
    resumed.step()
    assert torch.equal(resumed.state_dict()["state"][0][MEAN], resumed.state_dict()["state"][1][MEAN])
    assert resumed.state[fresh[frozen]][MEAN] != optimizer.state[params[0]][MEAN]  # and the donor's is not touched


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_their_own_way(again):
    bag, optimizer = make(torch.float64, 0.9)
    train(optimizer, range(3))
    _, twin = again((bag, optimizer))
    expected = train(twin, range(3, 6))
    mean = optimizer.state[bag.params[0]][MEAN].clone()
    assert twin.state[twin.param_groups[0]["params"][0]][MEAN] != mean
    assert all(torch.equal(a, b) for a, b in zip(train(optimizer, range(3, 6)), expected, strict=True))


def test_lightning_resumes_bit_for_bit(tmp_path):
    loader = DataLoader(torch.randn(10, 6, 4, generator=torch.Generator().manual_seed(0)), batch_size=None)
    start = Squares(mlp(4, 8, 2, seed=0), partial(NormRMSprop, lr=0.05, momentum=0.5))
    whole, half, rest = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    fit(whole, loader, max_epochs=2)
    fit(half, loader).save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(max_epochs=2).fit(rest, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value)
        assert not torch.equal(half.state_dict()[name], value)


def test_another_optimisers_state_is_refused():
    other = RMSprop(parameters(), lr=0.1)
    train(other, [0])
    with pytest.raises(ValueError, match=r"another optimiser's \(it has no 'mean_square_norm'\): resume with that one"):
        NormRMSprop(parameters(), lr=0.1).load_state_dict(other.state_dict())
