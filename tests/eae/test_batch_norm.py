"""Batch norm of the codes on one process, against torch's; tests/distributed/test_gather_ranks.py has it on several."""

import pytest
import torch
from torch import nn

from lightning_plugins.eae.batch_norm import LatentBatchNorm


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small tensors


def rows(n, d=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, d, generator=generator, dtype=dtype) + torch.arange(d)


@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (1.0, 1e-2)])
def test_equals_torch_on_one_process(momentum, eps):
    ours = LatentBatchNorm(5, momentum, eps).double()
    theirs = nn.BatchNorm1d(5, eps, momentum, affine=False).double()
    weight = rows(16, seed=9)
    for step, n in enumerate((16, 2, 7)):
        a, b = (rows(n, seed=step).requires_grad_() for _ in range(2))
        z, own = ours.all_rows(a)
        reference = theirs(b)
        (z * weight[:n]).sum().backward()
        (reference * weight[:n]).sum().backward()
        assert own == slice(0, n)
        torch.testing.assert_close(z, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
    h = rows(4, seed=5)
    torch.testing.assert_close(ours.eval()(h), theirs.eval()(h), rtol=1e-12, atol=1e-12)
    assert [*ours.parameters()] == [] and set(ours.state_dict()) == {"running_mean", "running_var"}


def test_gradient_is_the_derivative():
    norm = LatentBatchNorm(3).double()
    assert torch.autograd.gradcheck(norm, rows(4, 3).requires_grad_())
    assert torch.autograd.gradgradcheck(norm, rows(4, 3).requires_grad_())


def test_codes_have_mean_zero_and_variance_one():
    z = LatentBatchNorm(5).double()(rows(100))
    torch.testing.assert_close(z.mean(0), torch.zeros(5, dtype=z.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(5, dtype=z.dtype), rtol=1e-5, atol=0)


def test_evaluation_does_not_depend_on_the_other_rows():
    norm = LatentBatchNorm(5).double()
    norm(rows(64))
    norm.eval()
    h, before = rows(6, seed=1), norm.running_var.clone()
    alone = torch.cat([norm(row[None]) for row in h])
    torch.testing.assert_close(norm(h), alone, rtol=0, atol=0)
    torch.testing.assert_close(norm(torch.cat([h, 1e3 * rows(3, seed=2)]))[:6], alone, rtol=0, atol=0)
    assert torch.equal(norm.running_var, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    h = (rows(64, dtype=torch.float32) + 20).to(dtype)
    norm, wide = LatentBatchNorm(5), LatentBatchNorm(5)
    with torch.autocast("cpu", torch.bfloat16):
        z = norm(h)
    torch.testing.assert_close(z, wide(h.float()), rtol=0, atol=0)
    assert z.dtype == norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    norm.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(h).dtype == torch.float32
    assert norm(h.double()).dtype == torch.float64


def test_a_constant_dimension_stays_finite():
    h = rows(8).index_fill(1, torch.tensor(2), 7.0).requires_grad_()
    z = LatentBatchNorm(5).double()(h)
    z.square().sum().backward()
    assert torch.equal(z[:, 2], torch.zeros(8, dtype=z.dtype))
    assert h.grad.isfinite().all()


def test_synchronised_batch_norm_leaves_it_alone():
    net = nn.Sequential(nn.BatchNorm1d(5), LatentBatchNorm(5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert type(converted[1]) is LatentBatchNorm


def test_compiles_into_one_graph():
    norm, plain = LatentBatchNorm(5), LatentBatchNorm(5)
    h = rows(8, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(norm, backend="eager", fullgraph=True)(h), plain(h))
    torch.testing.assert_close(norm.running_var, plain.running_var)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0 must be 1 or more."),
        ({"dim": 2, "momentum": 0.0}, r"momentum=0.0 must lie in \(0, 1\]"),
        ({"dim": 2, "eps": 0.0}, "eps=0.0 must be positive"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentBatchNorm(**arguments)


def test_bad_rows():
    norm = LatentBatchNorm(5)
    with pytest.raises(ValueError, match=r"h must have shape \(rows, 5\), got \(4, 3\)"):
        norm(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"got \(4, 5, 1\)"):
        norm(torch.zeros(4, 5, 1))
    with pytest.raises(ValueError, match="h has 1 row, and a variance needs two or more"):
        norm(torch.zeros(1, 5))
    assert LatentBatchNorm(300)(torch.zeros(4, 300)).shape == (4, 300)
    assert norm.eval()(torch.zeros(1, 5)).shape == (1, 5)
