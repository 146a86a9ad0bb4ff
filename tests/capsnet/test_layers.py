"""Capsule layers against hand-made values, and each promise of their docstrings."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_plugins.capsnet import (
    CapsuleDecoder,
    PrimaryCapsules,
    RoutingCapsules,
    SelfAttentionRouting,
    exponential_squash,
    margin_loss,
    squash,
)


def test_primary_capsule_comes_from_one_place():
    """Capsule (t, y, x) must equal channels 8t to 8t+7 at (y, x): the identity convolution shows which went where."""
    T, D, H, W = 4, 8, 3, 5
    primary = PrimaryCapsules(T * D, T, D, kernel_size=1, stride=1)
    torch.nn.init.dirac_(primary.conv.weight)
    torch.nn.init.zeros_(primary.conv.bias)
    x = torch.arange(T * D * H * W, dtype=torch.float32).view(1, T * D, H, W)
    capsules = primary(x)[0]
    for t in range(T):
        for y in range(H):
            for col in range(W):
                expected = squash(x[0, t * D : (t + 1) * D, y, col])
                torch.testing.assert_close(capsules[(t * H + y) * W + col], expected)


def test_primary_division_is_before_the_bias():
    torch.manual_seed(0)
    primary = PrimaryCapsules(3, num_types=4, dim=2, kernel_size=3, divide_by_types=True)
    x = torch.randn(2, 3, 9, 9)
    conv = F.conv2d(x, primary.conv.weight, stride=2) / 4 + primary.conv.bias[:, None, None]
    expected = squash(conv.view(2, 4, 2, 4, 4).permute(0, 1, 3, 4, 2).reshape(2, -1, 2))
    torch.testing.assert_close(primary(x), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_routing_layer_starts_between_the_margins(shared):
    """Unit input capsules in random directions give poses neither dead nor saturated, whatever their number."""
    torch.manual_seed(0)
    for N in (32, 1152):
        u = F.normalize(torch.randn(8, N, 8), dim=-1)
        layer = RoutingCapsules(8, 10, 16, None if shared else N, iterations=1)
        lengths = layer(u).norm(dim=-1).mean().item()
        assert 0.03 < lengths < 0.9


def test_routing_layer_names_itself_and_traces_its_output():
    torch.manual_seed(0)
    layer = RoutingCapsules(8, 10, 16, 12, bias=True, leaky=True, squash_scale=0.5)
    assert "12 x 8 -> 10 x 16, dynamic, iterations=3" in repr(layer)
    u = torch.randn(2, 12, 8)
    mask = torch.rand(2, 12) > 0.3
    trace = layer.trace(u, mask)
    assert trace.couplings.shape == (3, 2, 12, 10)
    torch.testing.assert_close(trace.poses[-1], layer(u, mask))


def test_self_attention_routing_against_loops():
    torch.manual_seed(0)
    layer = SelfAttentionRouting(3, num_capsules=4, dim=5, num_inputs=6).double()
    torch.nn.init.normal_(layer.prior)
    u = torch.randn(2, 6, 3, dtype=torch.double)
    poses = layer(u)
    for b in range(2):
        votes = [[u[b, i] @ layer.weight[i, :, j] for j in range(4)] for i in range(6)]
        logits = torch.stack(
            [torch.stack([sum(votes[i][j] @ votes[k][j] for k in range(6)) for j in range(4)]) for i in range(6)]
        )
        c = (logits / math.sqrt(5)).softmax(1) + layer.prior
        for j in range(4):
            s = sum(c[i, j] * votes[i][j] for i in range(6))
            torch.testing.assert_close(poses[b, j], (1 - torch.exp(-s.norm())) * s / s.norm())
    trace = layer.trace(u)
    torch.testing.assert_close(trace.couplings.sum(-1), torch.ones(1, 2, 6, dtype=torch.double))
    assert ((trace.entropy > 0) & (trace.entropy <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_exponential_squash_is_finite_everywhere(dtype):
    for scale in (0.0, 1e-20, 1.0, 1e3):
        s = (torch.tensor([[3.0, 4.0]]) * scale).to(dtype).requires_grad_()
        v = exponential_squash(s)
        v.sum().backward()
        assert v.dtype == dtype and v.isfinite().all() and s.grad.isfinite().all()
        assert v.float().norm() <= 1.01
    zero = torch.zeros(1, 3, dtype=torch.double, requires_grad=True)
    (grad,) = torch.autograd.grad(exponential_squash(zero).sum(), zero, create_graph=True)
    assert torch.autograd.grad(grad.sum(), zero)[0].isfinite().all()
    torch.testing.assert_close(exponential_squash(torch.tensor([3.0, 4.0])).norm(), torch.tensor(1 - math.exp(-5)))


def test_decoder_sees_only_the_chosen_capsule():
    torch.manual_seed(0)
    decoder = CapsuleDecoder(10, 16, (1, 6, 6), hidden=(20, 30))
    poses = torch.randn(3, 10, 16, requires_grad=True)
    labels = torch.tensor([2, 0, 9])
    image = decoder(poses, labels)
    others = torch.randn(3, 10, 16)
    others[range(3), labels] = poses.detach()[range(3), labels]
    torch.testing.assert_close(decoder(others, labels), image)
    image.sum().backward()
    touched = poses.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 2], [1, 0], [2, 9]]


def test_decoder_gives_one_image_per_label():
    torch.manual_seed(0)
    decoder = CapsuleDecoder(10, 16, (2, 6, 5), hidden=(20,))
    poses = torch.randn(3, 10, 16)
    labels = torch.tensor([[2, 3], [0, 1], [9, 4]])
    both = decoder(poses, labels)
    assert both.shape == (3, 2, 2, 6, 5)
    for place in (0, 1):
        torch.testing.assert_close(both[:, place], decoder(poses, labels[:, place]))


def test_margin_loss_by_hand():
    lengths = torch.tensor([[0.95, 0.05, 0.4], [0.2, 0.6, 0.1]])
    # present: (0.9 - 0.95)+ = 0 and (0.9 - 0.1)^2; absent: 0.5 * (0.05 - 0.1)+ etc.
    first = 0.5 * (0.4 - 0.1) ** 2
    second = 0.8**2 + 0.5 * ((0.2 - 0.1) ** 2 + (0.6 - 0.1) ** 2)
    torch.testing.assert_close(margin_loss(lengths, torch.tensor([0, 2])), torch.tensor((first + second) / 2))
    both = margin_loss(lengths[:1], torch.tensor([[0, 2]]))
    torch.testing.assert_close(both, torch.tensor((0.9 - 0.4) ** 2))
    reached = torch.full((1, 3), 0.1)
    reached[0, 1] = 0.9
    assert margin_loss(reached, torch.tensor([1])) == 0  # the loss has a reachable zero


def test_margin_loss_widens_half_precision():
    assert margin_loss(torch.rand(2, 3).half(), torch.tensor([0, 1])).dtype == torch.float32


def test_layers_work_in_any_torch_network():
    """Conv features, capsules with an input mask, plain training loop: nothing of Lightning is needed."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5),
        torch.nn.ReLU(),
        PrimaryCapsules(16, num_types=4, dim=4, kernel_size=3),
        RoutingCapsules(4, num_capsules=5, dim=8, routing="kmeans"),
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = torch.rand(16, 3, 12, 12), torch.randint(0, 5, (16,))
    losses = []
    for _ in range(100):
        loss = margin_loss(net(x).norm(dim=-1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", ["in_dim", "num_capsules", "dim", "num_inputs"])
def test_routing_capsules_of_no_size_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
        RoutingCapsules(**({"in_dim": 4, "num_capsules": 3} | {name: 0}))
