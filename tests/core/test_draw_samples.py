"""Samples by a generator, of methods that take one and of those that draw global random numbers."""

import random

import numpy as np
import pytest
import torch

from lightning_plugins.core.sampling import draw_samples, takes_generator


def by_generator(num_samples, *, generator=None, scale=1.0):
    return scale * torch.rand(num_samples, generator=generator)


def by_global_numbers(n, scale=1.0):
    return scale * (torch.rand(n) + torch.from_numpy(np.random.rand(n)) + random.random())


def by_anything(n, **options):
    return by_generator(n, **options)


@pytest.mark.parametrize("sample", [by_generator, by_global_numbers, by_anything])
def test_the_generator_alone_decides(sample):
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw_samples(sample, 3, generator, scale=2.0) for _ in range(2)]

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    first = drawn(1)
    after = torch.rand(2), np.random.rand(2), random.random()
    assert torch.equal(after[0], expected[0]) and (after[1] == expected[1]).all() and after[2] == expected[2]
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(1), strict=True))
    assert not torch.equal(*first) and not torch.equal(first[0], drawn(2)[0])


def test_the_state_is_put_back_after_an_error():
    def broken(n):
        torch.rand(n)
        raise KeyError(n)

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        draw_samples(broken, 2, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_taken():
    assert takes_generator(by_generator, {"scale": 2}) and takes_generator(by_anything, {"prior": "x"})
    assert not takes_generator(by_global_numbers, {"scale": 2})
    for sample, options in ((by_generator, {"prior": 1}), (by_global_numbers, {"prior": 1}), (lambda: None, {})):
        with pytest.raises(TypeError):
            takes_generator(sample, options)
