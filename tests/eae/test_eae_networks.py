"""Encoders and decoders: sizes counted by hand, borders, ranges, and what they refuse."""

import math

import pytest
import torch
from torch import nn

from lightning_plugins.eae.networks import build_decoder, build_encoder

RAE_SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small tensors


def count(module):
    return sum(p.numel() for p in module.parameters())


def both(network, shape, width, d=6, num_conditions=0):
    torch.manual_seed(0)
    return build_encoder(network, shape, d, width), build_decoder(network, shape, d + num_conditions, width)


@pytest.mark.parametrize("shape", RAE_SHAPES)
def test_parameters_of_the_rae_networks(shape):
    (C, H, _), d = shape, 16
    k, w = (5 if H == 64 else 4), 128
    encoder, decoder = both("rae", shape, None, d)
    norms = 2 * (w + 2 * w + 4 * w + 8 * w)
    convolutions = k * k * (C * w + w * 2 * w + 2 * w * 4 * w + 4 * w * 8 * w)
    side = 4 if H == 64 else 2  # 64 or 32 halved four times
    assert count(encoder) == convolutions + norms + (side * side * 1024 + 1) * d
    widths = [1024, 512, 256, 128] if H == 64 else [1024, 512, 256]
    transposed = k * k * sum(a * b for a, b in zip(widths, [*widths[1:], C], strict=True)) + C
    assert count(decoder) == (d + 1) * 8 * 8 * 1024 + transposed + 2 * sum(widths[1:])


def test_parameters_of_the_digits_network():
    encoder, decoder = both("mlp", (1, 8, 8), None, 8)
    assert count(encoder) == 65 * 256 + 257 * 256 + 257 * 8
    assert count(decoder) == 9 * 256 + 257 * 256 + 257 * 64


CASES = [("mlp", (1, 8, 8)), ("mlp", (2, 5, 3)), *(("rae", shape) for shape in RAE_SHAPES)]


@pytest.mark.parametrize(("network", "shape"), CASES)
def test_shapes_ranges_and_gradients(network, shape):
    encoder, decoder = both(network, shape, 4, num_conditions=10)
    images = torch.rand(3, *shape)
    h = encoder(images)
    z = torch.cat([5 * h, torch.eye(10)[:3]], 1)
    out = decoder(z)
    assert h.shape == (3, 6) and out.shape == images.shape
    assert out.min() >= 0 and out.max() <= 1
    (out - images).square().sum().backward()
    for module in (encoder, decoder):
        assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    assert build_encoder(network, shape, 12, 4)(images).shape == (3, 12)  # a mean and a log variance


@pytest.mark.parametrize(("network", "shape"), CASES)
def test_the_encoder_ends_with_a_linear_layer(network, shape):
    encoder, _ = both(network, shape, 4)
    last = [*encoder.modules()][-1]
    assert type(last) is nn.Linear and last.bias is not None
    features = encoder[:-1](torch.rand(4, *shape))
    torch.testing.assert_close(encoder.eval()[-1](features), features @ last.weight.T + last.bias)


def test_every_pixel_reaches_the_code_and_is_reached_by_it():
    for network, shape in CASES:
        encoder, decoder = (module.double().eval() for module in both(network, shape, 4))
        images = torch.rand(8, *shape, dtype=torch.float64, requires_grad=True)
        encoder(images).square().sum().backward()
        assert images.grad.any(0).all()  # in one image a pixel may meet only units that are off
        a, b = decoder(torch.randn(2, 6, dtype=torch.float64))
        assert (a != b).all()


def test_images_of_28_are_those_of_32_with_a_border():
    small, large = both("rae", (1, 28, 28), 4), both("rae", (1, 32, 32), 4)
    for a, b in zip(small, large, strict=True):
        b.load_state_dict(a.state_dict())
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(small[0](images), large[0](nn.functional.pad(images, (2, 2, 2, 2))))
    z = torch.randn(3, 6)
    torch.testing.assert_close(small[1](z), large[1](z)[:, :, 2:30, 2:30])


@pytest.mark.parametrize(("network", "shape"), [("mlp", (1, 8, 8)), ("rae", (1, 28, 28))])
def test_under_autocast(network, shape):
    encoder, decoder = both(network, shape, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(encoder(torch.rand(4, *shape)))
    assert out.isfinite().all()
    assert all(p.dtype == torch.float32 for p in encoder.parameters())


def test_they_learn():
    """A batch of four stripes, told apart by a code of two numbers."""
    images = torch.zeros(4, 1, 28, 28)
    for i in range(4):
        images[i, :, 7 * i : 7 * i + 7] = 1
    for network, width in (("mlp", 32), ("rae", 4)):
        encoder, decoder = both(network, (1, 28, 28), width, d=2)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
        for _ in range(40):
            loss = (decoder(encoder(images)) - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.3 * images.var()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv", (1, 28, 28), 4), "network='conv' must be one of mlp, rae."),
        (("mlp", (28, 28), 4), r"image_shape=\(28, 28\) must be \(C, H, W\), each a whole number of 1 or more"),
        (("mlp", (0, 28, 28), 4), r"image_shape=\(0, 28, 28\) must be"),
        (("rae", (1, 8, 8), 4), r"28 x 28, 32 x 32 or 64 x 64, got image_shape=\(1, 8, 8\): resize them, such as by"),
        (("rae", (1, 64, 32), 4), r"got image_shape=\(1, 64, 32\)"),
        (("mlp", (1, 8, 8), 4, 0), "width=0 must be 1 or more."),
    ],
)
def test_refusals(arguments, message):
    for build in (build_encoder, build_decoder):
        with pytest.raises(ValueError, match=message):
            build(*arguments)
    with pytest.raises(ValueError, match="num_outputs=0 must be"):
        build_encoder("mlp", (1, 8, 8), 0)
    with pytest.raises(ValueError, match="num_inputs=0 must be"):
        build_decoder("mlp", (1, 8, 8), 0)


def test_width_is_the_published_one_by_default():
    assert build_encoder("rae", (3, 64, 64), 64)[2].weight.shape == (128, 3, 5, 5)
    assert build_encoder("mlp", [1, 8, 8], 8)[1].weight.shape == (256, math.prod((1, 8, 8)))
