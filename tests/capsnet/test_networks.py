"""The published networks: parameter counts, shapes and constants."""

import pytest
import torch

from lightning_plugins.capsnet import PRESETS, CapsNet
from lightning_plugins.capsnet.networks import resolve_preset


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("preset", "full", "without_decoder"),
    [
        ("sabour2017_paper", 8_215_568, 6_804_224),
        ("sabour2017_official", 8_215_568 + 160, 6_804_224 + 160),  # the released code's bias of the class capsules
        ("efficient", 161_824 + 1_411_344, 161_824),
    ],
)
def test_parameter_counts(preset, full, without_decoder):
    assert count(CapsNet(preset)) == full
    model = CapsNet(preset, reconstruction_weight=0.0)
    assert model.decoder is None and count(model) == without_decoder


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (2, 48, 48), (1, 36, 36)])
def test_any_image_size(preset, image_shape):
    torch.manual_seed(0)
    model = CapsNet(preset, image_shape=image_shape, num_classes=4, channels=8, decoder_hidden=(16,))
    u = model.features(torch.rand(2, *image_shape))
    types, height, width = model.features.grid
    assert u.shape[:2] == (2, types * height * width)
    assert model(torch.rand(2, *image_shape)).shape == (2, 4, 16)


def test_official_start():
    torch.manual_seed(0)
    model = CapsNet("sabour2017_official")
    first, primary, weight = model.features.conv.weight, model.features.primary.conv.weight, model.capsules.weight
    for tensor, std in ((first, 0.05), (primary, 0.1), (weight, 0.1), (model.decoder.layers[0].weight, 0.1)):
        assert tensor.abs().max() <= 2 * std
        assert tensor.std().item() == pytest.approx(0.88 * std, rel=0.03)  # a normal cut at two deviations
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    assert len(biases) == 6 and all((b == 0.1).all() for b in biases)


def test_efficient_start():
    """Keras' He and Glorot normals, whose variances are those of uncut ones; the depthwise layer is Glorot uniform."""
    torch.manual_seed(0)
    model = CapsNet("efficient")
    convolutions = [m for m in model.features.layers.modules() if isinstance(m, torch.nn.Conv2d)]
    fans = [25 * 1, 9 * 32, 9 * 64, 9 * 64]
    starts = [(conv.weight, 2 / fan) for conv, fan in zip(convolutions, fans, strict=True)]
    starts += [(model.capsules.weight, 2 / (10 * 16 * 8))]
    dense = [layer for layer in model.decoder.layers if isinstance(layer, torch.nn.Linear)]
    starts += [(layer.weight, 2 / fan) for layer, fan in zip(dense[:2], (160, 512), strict=True)]
    starts += [(dense[2].weight, 2 / (1024 + 784))]
    for weight, variance in starts:
        error = 4 / weight.numel() ** 0.5  # of an estimated deviation: at most 0.71 / root n
        assert weight.std().item() == pytest.approx(variance**0.5, rel=error)
        assert weight.abs().max() <= 2 / 0.8796 * variance**0.5
    limit = (6 / (81 + 81 * 128)) ** 0.5
    primary = model.features.primary.weight
    assert primary.abs().max() <= limit and primary.std().item() == pytest.approx(limit / 3**0.5, rel=0.04)
    assert not any(
        p.any() for name, p in model.named_parameters() if name.endswith(("bias", "prior")) and "1." not in name
    )


def test_efficient_poses_are_short_at_first():
    """0.5 as a deviation of the transforms, which are 10 x 16 x 8 and not 8 alone in Keras, made them 0.7 long."""
    torch.manual_seed(0)
    poses = CapsNet("efficient")(torch.rand(8, 1, 28, 28))
    assert 1e-3 < poses.norm(dim=-1).mean() < 0.1


def test_official_loss_is_a_twentieth_and_the_same_reconstruction():
    torch.manual_seed(0)
    batch = {"image": torch.rand(4, 1, 28, 28), "label": torch.tensor([0, 1, 2, 3])}
    paper, official = CapsNet(), CapsNet("sabour2017_official")
    poses = torch.randn(4, 10, 16) * 0.1
    official.decoder.load_state_dict(paper.decoder.state_dict())
    a, b = paper.loss(batch, poses), official.loss(batch, poses)
    torch.testing.assert_close(b["margin"], a["margin"] / 20)
    torch.testing.assert_close(b["reconstruction"], a["reconstruction"])


@pytest.mark.parametrize(("preset", "rate", "floor"), [("sabour2017_official", 1e-3, 1e-6), ("efficient", 5e-4, 5e-5)])
def test_official_rate_has_a_floor(preset, rate, floor):
    model = CapsNet(preset, lr_decay_steps=1, lr_decay=0.1)
    config = model.configure_optimizers()
    optimizer, decay = config["optimizer"], config["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        decay.step()
    assert rates == pytest.approx([max(rate * 0.1**n, floor) for n in range(6)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sabour"}, "preset='sabour' must be one of sabour2017_paper, sabour2017_official"),
        ({"name": "efficient", "iterations": 3}, "iterations=3 with routing='self_attention', a single pass; use 1."),
        ({"name": "efficient", "leaky": True, "gradient": "last"}, "gradient, leaky has no meaning with routing="),
        ({"name": "su2018", "squash_scale": -1.0}, "squash_scale=-1.0 must be positive."),
        ({"name": "su2018", "lr_decay": 2.0}, "lr_decay=2.0 must lie in (0, 1]"),
        ({"name": "su2018", "channels": 0}, "channels=0 must be 1 or more."),
        (
            {"name": "su2018", "routing": "self_attention", "iterations": 1},
            "needs preset='efficient', got preset='su2018'",
        ),
        ({"name": "su2018", "iterations": 0}, "iterations=0 must be 1 or more."),
        ({"name": "su2018", "reconstruction_weight": -1.0}, "reconstruction_weight=-1.0 must be 0 or more."),
    ],
)
def test_wrong_presets_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        resolve_preset(**arguments)
    assert message in str(error.value)


def test_iterated_routing_on_the_efficient_network_iterates():
    assert CapsNet("efficient", routing="kmeans").capsules.iterations == 3
    assert CapsNet("efficient", routing="kmeans", iterations=1).capsules.iterations == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_too_small_images_are_refused(preset):
    with pytest.raises(ValueError, match=r"image_shape=\(1, 9, 9\) is too small for kernel_size="):
        CapsNet(preset, image_shape=(1, 9, 9))
