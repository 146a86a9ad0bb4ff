"""The losses of score identity distillation against their written-out formulas, stock torch and scipy."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_plugins.sid import adversarial, losses


def images(seed=0, n=4, dtype=torch.float64):
    """Three batches of images, as generated, denoised by the teacher and by the fake score."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 4, 5, generator=g, dtype=dtype) for _ in range(3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_generators_loss_is_the_papers(alpha):
    """As the authors write it: (y_real - y_fake)((y_real - y) - alpha (y_real - y_fake)) / mean|y - y_real|."""
    y, y_real, y_fake = images()
    each = (y_real - y_fake) * ((y_real - y) - alpha * (y_real - y_fake))
    plain = each.sum((1, 2, 3))
    factor = (y - y_real).abs().mean((1, 2, 3))
    assert losses.generator_loss(y, y_real, y_fake, alpha, "none").tolist() == pytest.approx(plain.tolist(), abs=1e-12)
    assert losses.generator_loss(y, y_real, y_fake, alpha).tolist() == pytest.approx((plain / factor).tolist())
    weight = 60 / (y - y_real).flatten(1).norm(p=1, dim=1)  # DMD's C H W / |.|_1
    assert losses.l1_weight(y, y_real).tolist() == pytest.approx(weight.tolist())
    divergence = losses.fisher_divergence(y_real, y_fake, weight)
    assert divergence.tolist() == pytest.approx((weight * (y_real - y_fake).flatten(1).norm(dim=1) ** 2).tolist())


def test_the_default_is_the_papers_alpha():
    y, y_real, y_fake = images()
    assert torch.equal(losses.generator_loss(y, y_real, y_fake), losses.generator_loss(y, y_real, y_fake, 1.2, "l1"))


def test_the_weight_is_a_constant_and_bounded():
    """Its gradient would be another loss; two equal images would give an infinite one."""
    y, y_real, y_fake = (x.requires_grad_() for x in images())
    for loss in (losses.generator_loss, losses.reverse_kl_loss):
        weighted = loss(y, y_real, y_fake, weighting="l1").sum()
        factor = 1 / (y - y_real).abs().mean((1, 2, 3)).detach()
        own = (factor * loss(y, y_real, y_fake, weighting="none")).sum()
        inputs = [x for x in (y, y_real, y_fake) if loss is losses.generator_loss or x is y]
        for a, b in zip(torch.autograd.grad(weighted, inputs), torch.autograd.grad(own, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert not losses.l1_weight(y, y_real).requires_grad
    assert losses.l1_weight(y, y).tolist() == pytest.approx([1e5] * 4)


def test_gradient_flows_through_the_images_and_both_inputs():
    """Of L = (1 - a)|d|^2 + d.(f - x): by hand, for each of the three."""
    y, y_real, y_fake = (x.requires_grad_() for x in images())
    loss = losses.generator_loss(y, y_real, y_fake, 1.2, "none").sum()
    delta, error = y_real - y_fake, y_fake - y
    by_hand = [-delta, -0.4 * delta + error, 0.4 * delta - error + delta]
    for got, want in zip(torch.autograd.grad(loss, [y, y_real, y_fake]), by_hand, strict=True):
        torch.testing.assert_close(got, want)


def test_the_fake_scores_loss_is_edms():
    d_fake, x_g, _ = images()
    sigma = torch.tensor([0.01, 0.5, 2.0, 40.0], dtype=torch.float64)
    for sigma_data in (0.5, 1.3):
        weight = [(s**2 + sigma_data**2) / (s * sigma_data) ** 2 for s in sigma.tolist()]
        want = [w * ((d - x) ** 2).sum().item() for w, d, x in zip(weight, d_fake, x_g, strict=True)]
        assert losses.fake_score_loss(d_fake, x_g, sigma, sigma_data).tolist() == pytest.approx(want)
    assert (
        losses.fake_score_loss(d_fake, x_g, sigma).tolist() == losses.fake_score_loss(d_fake, x_g, sigma, 0.5).tolist()
    )


def test_the_reverse_divergence_moves_images_from_the_fake_to_the_teacher():
    x_g, d_teacher, d_fake = (x.requires_grad_() for x in images())
    loss = losses.reverse_kl_loss(x_g, d_teacher, d_fake, "none")
    (gradient,) = torch.autograd.grad(loss.sum(), x_g)
    torch.testing.assert_close(gradient, d_fake - d_teacher)
    dmd = losses.reverse_kl_loss(x_g, d_teacher, d_fake)
    d_teacher.grad = d_fake.grad = None
    dmd.sum().backward()
    assert d_teacher.grad is None and d_fake.grad is None  # no backward through the networks
    factor = (x_g - d_teacher).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x_g.grad, (d_fake - d_teacher) / factor)


def test_sidas_terms_are_binary_cross_entropies():
    logits = torch.tensor([[[-30.0, -3.0], [0.5, 12.0]], [[1.0, 2.0], [-2.0, 0.0]]], requires_grad=True)
    weight = torch.tensor([2.0, 0.5])
    loss = adversarial.generator_loss(logits, weight, 12)
    clamped = logits.detach().clamp(-10, 10)
    own = F.binary_cross_entropy_with_logits(clamped, torch.ones(2, 2, 2), reduction="none").mean((1, 2))
    torch.testing.assert_close(loss, 12 * weight * own)
    loss.sum().backward()
    assert logits.grad[0, 0, 0] == 0 and logits.grad[0, 1, 1] == 0  # beyond the limits
    assert (logits.grad < 0).sum() == 6  # all others are drawn towards real
    real, fake = torch.randn(2, 3, 2, 2, generator=seeded())
    sigma = torch.tensor([0.1, 1.0, 5.0])
    want = F.binary_cross_entropy_with_logits(real, torch.ones(3, 2, 2), reduction="none").mean((1, 2))
    want = (want + F.binary_cross_entropy_with_logits(fake, torch.zeros(3, 2, 2), reduction="none").mean((1, 2))) / 2
    torch.testing.assert_close(adversarial.fake_loss(real, fake, sigma), (sigma**2 + 0.25) / (sigma / 2) ** 2 * want)
    flat = adversarial.generator_loss(torch.tensor([1.0, 2.0]), torch.ones(2), 1)  # one logit a sample
    assert flat.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(-2))])


def test_samples_are_apart_and_of_any_shape():
    """A sample's value does not see the others, nor a broken one among them; points of the plane are as good."""
    y, y_real, y_fake = images(dtype=torch.float32)
    whole = losses.generator_loss(y, y_real, y_fake)
    y_broken = y.clone()
    y_broken[2, 0, 0, 0] = math.nan
    broken = losses.generator_loss(y_broken, y_real, y_fake)
    assert broken.isnan().tolist() == [False, False, True, False]
    assert torch.equal(broken[[0, 1, 3]], whole[[0, 1, 3]])
    flat = losses.generator_loss(*(x.flatten(1) for x in (y, y_real, y_fake)))
    torch.testing.assert_close(flat, whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.generator_loss(y, y_real, y_fake), whole)  # nothing in it is lowered


def test_what_would_train_something_else_is_refused():
    y, y_real, y_fake = images()
    y.requires_grad_()
    with pytest.raises(ValueError, match="must keep their gradient"):
        losses.generator_loss(y, y_real, y_fake)
    with pytest.raises(ValueError, match="must keep their gradient"):
        losses.generator_loss(y, y_real.requires_grad_(), y_fake)
    with torch.no_grad():
        assert losses.generator_loss(y, y_real.detach(), y_fake).shape == (4,)  # a validation step
    with pytest.raises(ValueError, match="x_g carries a gradient"):
        losses.fake_score_loss(y_fake, y, torch.ones(4))
    with pytest.raises(ValueError, match="weighting='sigma' must be one of l1, none"):
        losses.generator_loss(*images(), weighting="sigma")
    with pytest.raises(ValueError, match="weighting='sigma' must be one of l1, none"):
        losses.reverse_kl_loss(*images(), weighting="sigma")
    with pytest.raises(ValueError, match=r"x_g \(4, 3, 4, 5\), d_teacher \(1, 3, 4, 5\)"):
        losses.reverse_kl_loss(y_fake, images()[0][:1], y_fake)
    with pytest.raises(ValueError, match=r"d_teacher \(4,\)"):
        losses.fisher_divergence(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"d_fake is torch.bfloat16: .* drown"):
        losses.generator_loss(*images()[:2], images()[2].bfloat16())
    with pytest.raises(ValueError, match=r"sigma must hold one noise level a sample, \(B,\), got \(4, 1, 1, 1\)"):
        losses.fake_score_loss(*images()[:2], torch.ones(4, 1, 1, 1))
