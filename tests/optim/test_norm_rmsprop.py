"""NormRMSprop against a loop in plain Python, torch's RMSprop in one dimension, and the exact gradient flow."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.optim import NormRMSprop

MEAN = "mean_square_norm"
SHAPES = [(3, 2), (4,), (), (2, 2, 2)]


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(params, step, scale=1.0):
    """The same gradients for the same step, whatever the parameters are."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, steps=(0, 1, 2, 3, 4, 5), scale=1.0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        gradients(params, step, scale)
        optimizer.step()
    return [p.detach().clone() for p in params]


def plain_python(groups, steps):
    """The formula of the class, number by number; a group: numbers, their gradients in each step, options."""
    result = []
    for theta, grads_of_steps, o in groups:
        theta, v, b = list(theta), 0.0, [0.0] * len(theta)
        for grads in grads_of_steps[:steps]:
            sign = -1.0 if o.get("maximize") else 1.0
            g = [sign * x + o.get("weight_decay", 0.0) * t for x, t in zip(grads, theta, strict=True)]
            v = o["alpha"] * v + (1 - o["alpha"]) * math.fsum(x * x for x in g)
            b = [o.get("momentum", 0.0) * y + x / (math.sqrt(v) + o["eps"]) for x, y in zip(g, b, strict=True)]
            theta = [t - o["lr"] * y for t, y in zip(theta, b, strict=True)]
        result.append(theta)
    return result


def numbers(tensors):
    return torch.cat([t.detach().flatten() for t in tensors]).tolist()


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.3},
        {"alpha": 0.5, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1},
        {"maximize": True, "weight_decay": 0.2},
    ],
    ids=str,
)
def test_against_plain_python(options, foreach):
    """Three groups: the options of the test, and two that differ from them."""
    first, second, third = parameters(seed=1), parameters([(5,), (1, 3)], seed=2), parameters([(2,)], seed=3)
    own = [{}, {"lr": 0.02, "alpha": 0.7}, {"momentum": 0.3, "weight_decay": 0.05, "eps": 1.0}]
    common = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, **options}
    params = [first, second, third]
    optimizer = NormRMSprop([{"params": p, **o} for p, o in zip(params, own, strict=True)], foreach=foreach, **common)
    starts, grads = [numbers(p) for p in params], [[], [], []]
    for step in range(8):
        gradients([p for group in params for p in group], step)
        for p, seen in zip(params, grads, strict=True):
            seen.append(numbers([x.grad for x in p]))
        optimizer.step()
    groups = [(t, g, {**common, **o}) for t, g, o in zip(starts, grads, own, strict=True)]
    for p, expected in zip(params, plain_python(groups, 8), strict=True):
        assert numbers(p) == pytest.approx(expected, rel=1e-13)
    assert numbers([p.grad for p in first]) == grads[0][-1]  # the optimiser left .grad as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_in_one_dimension_it_is_rmsprop(momentum, weight_decay, dtype):
    ours, theirs = (parameters([()], dtype=dtype) for _ in range(2))
    options = {"lr": 0.03, "eps": 0.2, "momentum": momentum, "weight_decay": weight_decay}  # eps is seen
    one, two = NormRMSprop(ours, **options), RMSprop(theirs, **options)
    for step in range(30):
        train(one, [step])
        train(two, [step])
        torch.testing.assert_close(ours[0], theirs[0], rtol=8 * torch.finfo(dtype).eps, atol=0)
        assert one.state[ours[0]][MEAN].item() == two.state[theirs[0]]["square_avg"].item()


def test_in_two_dimensions_it_is_not_rmsprop():
    ours, theirs = (parameters([(2,)]) for _ in range(2))
    train(NormRMSprop(ours, lr=0.1))
    train(RMSprop(theirs, lr=0.1))
    assert not torch.allclose(ours[0], theirs[0], rtol=0.1)


@given(
    exponent=st.integers(-30, 30),
    alpha=st.floats(0, 0.999),
    momentum=st.floats(0, 0.99),
)
@settings(max_examples=30, deadline=None)
def test_scaling_the_loss_changes_nothing(exponent, alpha, momentum):
    """A power of two is exact, so the weights are the same bit for bit once eps is negligible."""
    options = {"lr": 0.1, "alpha": alpha, "momentum": momentum, "eps": 1e-300}
    plain = train(NormRMSprop(parameters(), **options))
    scaled = train(NormRMSprop(parameters(), **options), scale=2.0**exponent)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
def test_the_gradients_direction_is_kept(foreach):
    params = parameters()
    optimizer = NormRMSprop(params, lr=0.1, foreach=foreach)
    for step in range(5):
        before = torch.tensor(numbers(params), dtype=torch.float64)
        gradients(params, step)
        g = torch.tensor(numbers([p.grad for p in params]), dtype=torch.float64)
        optimizer.step()
        move = torch.tensor(numbers(params), dtype=torch.float64) - before
        assert torch.dot(move, g) / (move.norm() * g.norm()) == pytest.approx(-1.0, abs=1e-14)


def test_lr_is_the_length_of_a_settled_step_whatever_the_number_of_coordinates():
    for size in (1, 10, 1000):
        theta = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        optimizer = NormRMSprop([theta], lr=0.2, alpha=0.9)
        lengths = []
        for _ in range(200):
            before = theta.detach().clone()
            theta.grad = torch.full_like(theta, 3.0)
            optimizer.step()
            lengths.append((theta.detach() - before).norm().item())
        assert lengths[0] == pytest.approx(0.2 / math.sqrt(1 - 0.9)) == max(lengths)
        assert lengths[-1] == pytest.approx(0.2)


def flow_error(optimizer_class, eigenvalue, **options):
    """Largest distance of a step from the exact flow of a quadratic, ``exp(-h lambda) theta``, for its own h."""
    eigenvalues = torch.tensor([eigenvalue, eigenvalue / 7, eigenvalue / 100], dtype=torch.float64)
    theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer, errors = optimizer_class([theta], **options), []
    for _ in range(50):
        optimizer.zero_grad()
        (eigenvalues * theta.square()).sum().div(2).backward()
        before, g = theta.detach().clone(), theta.grad.clone()
        optimizer.step()
        h = (before - theta.detach()).norm() / g.norm()
        errors.append((theta.detach() - torch.exp(-h * eigenvalues) * before).norm().item())
    return max(errors)


@pytest.mark.parametrize("eigenvalue", [1e-3, 1.0, 1e3, 1e6])
def test_the_error_of_a_step_stays_below_the_tolerance_whatever_the_curvature(eigenvalue):
    assert flow_error(NormRMSprop, eigenvalue, lr=0.01, alpha=0.0) <= 0.01
    assert flow_error(NormRMSprop, eigenvalue, lr=0.01, alpha=0.9) <= 0.01 / math.sqrt(1 - 0.9)
    if eigenvalue > 1:
        assert flow_error(torch.optim.SGD, eigenvalue, lr=0.01) > 10  # a fixed step does not hold it


# Which parameters


def test_each_group_has_a_mean_of_its_own():
    """Large gradients in one group do not slow the other."""
    alone, together, loud = parameters([(3,)]), parameters([(3,)]), parameters([(3,)], seed=5)
    one, two = NormRMSprop(alone, lr=0.1), NormRMSprop([{"params": together}, {"params": loud}], lr=0.1)
    for step in range(4):
        gradients(alone, step)
        gradients(together, step)
        gradients(loud, step, scale=1e6)
        one.step()
        two.step()
    assert torch.equal(alone[0], together[0])


def test_parameters_without_a_gradient_are_left_out_and_may_come_later():
    a, b = parameters([(2,), (3,)])
    start = b.detach().clone()
    optimizer = NormRMSprop([b, a], lr=0.1, alpha=0.5)
    a.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    assert torch.equal(b, start) and b not in optimizer.state
    b.grad = torch.tensor([12.0, 0.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[a][MEAN] is optimizer.state[b][MEAN]
    assert optimizer.state[a][MEAN].item() == 0.5 * (0.5 * 25) + 0.5 * 169
    optimizer.zero_grad()
    optimizer.step()  # nothing to do
    assert optimizer.state[a][MEAN].item() == 0.5 * (0.5 * 25) + 0.5 * 169


def test_a_group_added_later():
    a, b = parameters([(2,)]), parameters([(2,)], seed=4)
    optimizer = NormRMSprop(a, lr=0.1)
    train(optimizer, range(2))
    optimizer.add_param_group({"params": b, "alpha": 0.5})
    fresh = parameters([(2,)], seed=4)
    reference = NormRMSprop(fresh, lr=0.1, alpha=0.5)
    for step in range(3):
        gradients(a, step)
        gradients(b, step)
        gradients(fresh, step)
        optimizer.step()
        reference.step()
    assert torch.equal(b[0], fresh[0])


def test_all_gradients_zero_moves_nothing():
    params = parameters()
    before = numbers(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    NormRMSprop(params, lr=0.1, momentum=0.9).step()
    assert numbers(params) == before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_complex_parameters_are_pairs_of_real_ones(momentum):
    (real,) = parameters([(4, 2)])
    pairs = torch.nn.Parameter(torch.view_as_complex(real.detach().clone()))
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.1}
    one, two = NormRMSprop([real], **options), NormRMSprop([pairs], **options)
    for step in range(4):
        gradients([real], step)
        pairs.grad = torch.view_as_complex(real.grad.clone())
        one.step()
        two.step()
    torch.testing.assert_close(torch.view_as_real(pairs.detach()), real.detach(), rtol=1e-13, atol=0)


def test_types_may_differ_within_a_group():
    """One mean for all of them, in the widest type."""
    wide = parameters([(3,), (2,)])
    mixed = [torch.nn.Parameter(wide[0].detach().clone()), torch.nn.Parameter(wide[1].detach().float())]
    one, two = NormRMSprop(wide, lr=0.1), NormRMSprop(mixed, lr=0.1)
    train(one)
    train(two)
    assert two.state[mixed[1]][MEAN].dtype == torch.float64
    torch.testing.assert_close(mixed[0], wide[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed[1].double(), wide[1], rtol=1e-5, atol=0)


def test_bfloat16_parameters_keep_a_mean_in_float32():
    params = parameters(dtype=torch.bfloat16)
    optimizer = NormRMSprop(params, lr=0.1, alpha=0.9999)
    train(optimizer, range(3))
    before = optimizer.state[params[0]][MEAN].clone()
    train(optimizer, range(3, 4))
    assert optimizer.state[params[0]][MEAN].dtype == torch.float32
    assert 0 < optimizer.state[params[0]][MEAN] / before - 1 < 1  # 1e-4 of a gradient is not lost


# How it is driven


def test_closure():
    theta = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = NormRMSprop([theta], lr=1.0, alpha=0.0)

    def closure():
        optimizer.zero_grad()
        loss = theta.square().sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12.5
    assert theta.detach().norm().item() == pytest.approx(4.0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreach_equals_the_loop(options, dtype):
    results = [train(NormRMSprop(parameters(dtype=dtype), lr=0.1, foreach=f, **options)) for f in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_step_reads_a_number_back():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    params = parameters()
    for foreach in (False, True):
        optimizer = NormRMSprop(params, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=foreach)
        for step in range(2):
            gradients(params, step)
            with Watch():
                optimizer.step()
    with pytest.raises(AssertionError), Watch():
        torch.ones(()).item()


def test_grad_scaler():
    """Scaled gradients give the weights of unscaled ones; a step that overflows leaves weights and mean alone."""
    results = []
    for scale in (1.0, 1024.0):
        params = parameters(dtype=torch.float32)
        optimizer = NormRMSprop(params, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(5):
            gradients(params, step, scale=scale)
            scaler.scale(torch.zeros(()))  # the scale is made on first use
            if step == 2:
                params[1].grad[0] = torch.inf
            before, mean = numbers(params), optimizer.state[params[0]].get(MEAN, torch.zeros(())).clone()
            scaler.step(optimizer)
            scaler.update(scale)
            if step == 2:
                assert numbers(params) == before and optimizer.state[params[0]][MEAN] == mean
        results.append(numbers(params))
    assert results[0] == results[1]


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "lr=-0.1 must be 0 or more"),
        ({"lr": "0.1"}, "lr='0.1' must be a finite number of 0 or more"),
        ({"lr": torch.tensor(0.1)}, "lr must be a finite number of 0 or more, got .* torch.float32"),
        ({"lr": math.nan}, "lr=nan"),
        ({"alpha": 1.0}, r"alpha=1\.0 must lie in \[0, 1\)"),
        ({"momentum": 1}, "momentum=1 must lie"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"weight_decay": -1}, "weight_decay=-1"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        NormRMSprop(parameters(), **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=words):
        NormRMSprop([{"params": parameters(), **options}], lr=0.1)


def test_lr_must_be_given():
    with pytest.raises(TypeError, match="lr"):
        NormRMSprop(parameters())


def test_sparse_gradients_are_refused():
    layer = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = NormRMSprop(layer.parameters(), lr=0.1)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"takes no sparse gradients; make the layer with sparse=False\."):
        optimizer.step()


def test_several_devices_in_one_group_are_refused():
    params = [*parameters([(2,)]), torch.nn.Parameter(torch.zeros(2, device="meta"))]
    for p in params:
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"one group is on cpu and meta; give each device's parameters a group of"):
        NormRMSprop(params, lr=0.1).step()


def test_fsdp1_is_refused():
    """As torch marks the parameters that FSDP1 has flattened."""
    from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

    params = parameters()
    _set_fsdp_flattened(params[1])
    with pytest.raises(ValueError, match=r"sharded by FSDP1.*ModelParallelStrategy in place of FSDPStrategy"):
        NormRMSprop(params, lr=0.1)
