"""Lists of tensors as one vector, against NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.core.vectors import dot, local, mean_over_ranks_, norm
from lightning_plugins.replay.window import displaced

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4)


def tensors(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def flat(tensors):
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


@given(SHAPES, st.sampled_from([torch.float32, torch.float64]))
def test_dot_and_norm(shapes, dtype):
    x, y = tensors(shapes, 1, dtype), tensors(shapes, 2, dtype)
    rtol = 1e-5 if dtype is torch.float32 else 1e-12
    np.testing.assert_allclose(dot(x, y).item(), flat(x) @ flat(y), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(norm(x).item(), np.linalg.norm(flat(x)), rtol=rtol)
    assert dot(x, y).dtype == norm(x).dtype == torch.float64
    assert dot(x, y).shape == norm(x).shape == ()


def test_of_parameters_without_a_graph():
    x = [torch.nn.Parameter(torch.tensor([3.0, 4.0]))]
    assert not norm(x).requires_grad
    assert not dot(x, x).requires_grad
    assert norm(x).item() == 5.0


def test_of_mixed_dtypes():
    x = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    assert norm(x).item() == 5.0
    assert dot(x, x).item() == 25.0


def test_many_tensors_keep_their_digits():
    x = [torch.full((1000,), 1e15)] + [torch.ones(1000)] * 3
    assert norm(x).item() == pytest.approx(math.sqrt(1000 * (1e30 + 3)), rel=1e-6)
    small = [torch.ones(1), *[torch.full((1,), 1e-4)] * 1000]  # squares lost beside a one in fp32
    assert norm(small).item() ** 2 - 1 == pytest.approx(1e-5, rel=1e-3)


def test_infinities_and_nans_are_seen():
    assert math.isinf(norm([torch.ones(2), torch.tensor([math.inf])]).item())
    assert math.isnan(norm([torch.ones(2), torch.tensor([math.nan])]).item())


def test_local_shares_storage():
    x = tensors([[3], [2, 2]], 1)
    for a, b in zip(x, local(x), strict=True):
        assert a.data_ptr() == b.data_ptr()


def test_the_mean_over_one_rank_is_the_tensor():
    x = tensors([[3], [2, 2]], 1)
    before = [tensor.clone() for tensor in x]
    mean_over_ranks_(x)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_displaced_moves_from_the_origin_and_comes_back_bit_for_bit():
    params = [torch.nn.Parameter(tensor) for tensor in tensors([[3], [2, 2], []], 1, torch.float32)]
    direction = tensors([[3], [2, 2], []], 2, torch.float32)
    before = [param.detach().clone() for param in params]
    storage = [param.data_ptr() for param in params]
    with displaced(params, direction) as move:
        for step in (0.1, -0.1, 3.0):
            move(step)
            for param, start, way in zip(params, before, direction, strict=True):
                torch.testing.assert_close(param.detach(), start + step * way, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert storage == [param.data_ptr() for param in params]


def test_displaced_comes_back_after_an_error():
    (param,) = params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(KeyboardInterrupt), displaced(params, [torch.ones(2)]) as move:
        move(1.0)
        raise KeyboardInterrupt
    assert param.tolist() == [1.0, 1.0]


def test_displaced_parameters_are_seen_under_autocast():
    """Autocast keeps half-precision copies of parameters until it is left."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1)).item() == 1.0
        with displaced([layer.weight], [torch.ones(1, 1)]) as move:
            move(1.0)
            assert layer(torch.ones(1)).item() == 2.0
        assert layer(torch.ones(1)).item() == 1.0


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("starts", [(0, 0), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 1000, 8192, 300_001])
def test_sums_of_any_length_address_and_threads_are_exact(count, dtype, starts, threads):
    """Steady numbers are the hardest: roundings of one kind add up."""
    torch.set_num_threads(threads)
    steady = torch.full((count + 3,), 0.1, dtype=dtype)
    x, y = (buffer[start:][:count] for buffer, start in zip((steady, steady * 1.01), starts, strict=True))
    products = (x.double() * y.double()).tolist()
    assert dot([x], [y]).item() == pytest.approx(math.fsum(products), rel=1e-12)
    length = math.sqrt(math.fsum(x.double().square().tolist()))
    assert norm([x]).item() == pytest.approx(length, rel=1e-12 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("starts", [(0, 0), (1, 3)], ids=str)
def test_long_vectors_are_summed_exactly(starts, threads):
    """Plain fp32 sums err by 3e-4 (norm) and, whose addresses differ, by 7e-4 (dot) on some processors."""
    torch.set_num_threads(threads)
    buffer = torch.randn(3_000_003, generator=torch.Generator().manual_seed(0)) * 0.01
    x, y = (part[start:][:3_000_000] for part, start in zip((buffer, buffer * 1.0001), starts, strict=True))
    product = x.double().mul_(y).sum().item()
    assert abs(dot([x], [y]).item() - product) <= 1e-12 * norm([x]).item() * norm([y]).item()
    assert norm([x]).item() == pytest.approx(x.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("count", [4, 20_000])
def test_complex_numbers_are_pairs_of_real_ones(count):
    x, y = torch.randn(2, count, 2, dtype=torch.float64)
    z, w = torch.view_as_complex(x), torch.view_as_complex(y)
    for one, other in ((z, w), (z.conj(), w.conj())):
        assert dot([one], [other]).item() == pytest.approx((x * y).sum().item(), rel=1e-10)
        assert norm([one]).item() == pytest.approx(x.norm().item(), rel=1e-12)


def test_squares_beyond_half_precision():
    big = torch.full((1_000_000,), 300.0, dtype=torch.float16)  # whose square overflows
    assert norm([big]).item() == pytest.approx(3e5, rel=1e-7)
    assert dot([big], [big]).item() == pytest.approx(9e10, rel=1e-7)
    assert norm([big[:1000]]).item() == pytest.approx(300 * math.sqrt(1000), rel=1e-12)
