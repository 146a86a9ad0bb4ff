"""Entropy within classes: one class at a time by plain code, and what maximising it does to codes."""

import pytest
import torch

from lightning_plugins.eae.entropy import conditional_knn_entropy, knn_entropy
from lightning_plugins.eae.nearest_neighbours import nearest_neighbours


def draw(n, d, num_classes, seed=0, dtype=torch.float64):
    """Codes in clusters that overlap, and their classes, of uneven sizes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(num_classes), torch.arange(num_classes)]).repeat_interleave(5)
    labels = torch.cat([labels, torch.randint(num_classes, (n - len(labels),), generator=g).clamp(max=1)])
    labels = labels[torch.randperm(n, generator=g)]
    z = torch.randn(n, d, generator=g, dtype=torch.float64) + 0.7 * labels[:, None]
    return z.to(dtype), labels


def by_class(z, labels, k=1, eps=1e-6):
    """Each class alone, by autograd through all its distances; digamma by scipy's twin in torch."""
    total, count = 0.0, 0
    for label in labels.unique():
        own = z[labels == label]
        n, d = own.shape
        if n <= k:
            continue
        squares = (own[:, None] - own).square().sum(-1) + torch.eye(n, dtype=z.dtype) * 1e9
        ball = d / 2 * torch.tensor(torch.pi).log().item() - torch.lgamma(torch.tensor(d / 2 + 1.0)).item()
        psi = torch.digamma(torch.tensor([n, k], dtype=torch.float64))
        entropy = psi[0] - psi[1] + ball + d / 2 * (squares.kthvalue(k, 1).values + eps).log().mean()
        total, count = total + n * entropy, count + n
    return total / count


@pytest.mark.parametrize(("n", "d", "num_classes"), [(60, 1, 2), (250, 2, 3), (700, 8, 10), (520, 64, 4)])
@pytest.mark.parametrize("k", [1, 3])
def test_value_and_gradient_are_those_of_each_class_alone(n, d, num_classes, k):
    z, labels = draw(n, d, num_classes)
    expected = by_class(z.requires_grad_(), labels, k)
    (wanted,) = torch.autograd.grad(expected, z)
    found = conditional_knn_entropy(z, labels, k)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], wanted, rtol=1e-9, atol=1e-12)
    short = conditional_knn_entropy(z.detach().float() + 100, 1000 * labels - 7, k)
    torch.testing.assert_close(short.double(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_of_one_class_it_is_the_entropy():
    z, labels = draw(200, 5, 1)
    torch.testing.assert_close(conditional_knn_entropy(z, labels, [1, 2, 5]), knn_entropy(z, [1, 2, 5]))


def test_classes_with_too_few_codes_count_for_nothing():
    z, labels = draw(120, 3, 2)
    lonely = torch.cat([torch.randn(3, 3, dtype=torch.float64), z]).requires_grad_()
    found = conditional_knn_entropy(lonely, torch.cat([torch.tensor([7, 5, 5]), labels]), 2)
    torch.testing.assert_close(found, conditional_knn_entropy(z, labels, 2))
    (gradient,) = torch.autograd.grad(found, lonely)
    assert (gradient[:3] == 0).all() and (gradient[3:] != 0).any(1).all()


def test_under_autocast_and_in_half_precision():
    z, labels = draw(300, 16, 5, dtype=torch.float32)
    expected, rounded = conditional_knn_entropy(z, labels), conditional_knn_entropy(z.bfloat16().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conditional_knn_entropy(z, labels), expected)
        assert torch.equal(conditional_knn_entropy(z.bfloat16(), labels), rounded)


def test_a_far_code_costs_the_others_nothing():
    z, labels = draw(1024, 2, 10)
    z[5] *= 1000
    z.requires_grad_()
    (wanted,) = torch.autograd.grad(conditional_knn_entropy(z, labels), z)
    (found,) = torch.autograd.grad(conditional_knn_entropy(short := z.detach().float().requires_grad_(), labels), short)
    wrong = (found - wanted).abs().amax(1) > 1e-3 * wanted.abs().amax()
    assert wrong.sum() < 10  # of nearly equal distances


def test_no_class_has_neighbours():
    z = torch.randn(40, 3, requires_grad=True)
    entropy = conditional_knn_entropy(z, torch.arange(40), [1, 2])
    assert entropy == 0 and (torch.autograd.grad(entropy, z)[0] == 0).all()
    assert nearest_neighbours(z, 3, labels=torch.arange(40)).max() < 40  # 48 columns are searched


def class_means(objective):
    """Largest class mean, in standard deviations, of free codes after maximising an entropy from two clusters."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    h = (torch.randn(256, 4, generator=g) + 1.5 * labels[:, None]).requires_grad_()
    optimizer = torch.optim.Adam([h], lr=0.03)
    for _ in range(400):
        z = (h - h.mean(0)) / h.std(0, correction=0)
        optimizer.zero_grad()
        (-objective(z, labels)).backward()
        optimizer.step()
    z = ((h - h.mean(0)) / h.std(0, correction=0)).detach()
    return z[labels == 0].mean(0).abs().max().item()


def test_maximised_it_takes_the_class_out_of_the_codes_and_the_entropy_of_all_does_not():
    assert class_means(conditional_knn_entropy) < 0.1
    assert class_means(lambda z, labels: knn_entropy(z)) > 0.4


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), r"labels must be \(4,\) integers, got \(3,\) torch.int64"),
        (torch.zeros(4), r"labels must be \(4,\) integers, got \(4,\) torch.float32"),
    ],
)
def test_wrong_labels_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        conditional_knn_entropy(torch.randn(4, 2), labels)


@pytest.mark.parametrize("arguments", [{"k": 0}, {"eps": 0.0}, {"chunk_size": 0}, {"k": 4}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        conditional_knn_entropy(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), **arguments)
