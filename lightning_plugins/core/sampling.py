"""Samples of any module that draws some: by a generator, or with global random numbers that are set for the call."""

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_plugins.core.random_state import get_random_state, set_random_state


def draw_samples(sample: Callable[..., Any], num_samples: int, generator: torch.Generator, **options: Any) -> Any:
    """``sample(num_samples, **options)``, whose random numbers are the generator's, which moves on.

    Args:
        sample: a module's method; if it takes no ``generator``, the random numbers of Python, NumPy and torch are set
            by the generator around the call, and put back.
        num_samples: how many.
        generator: on the module's device.
        **options: further arguments.
    """
    if takes_generator(sample, options):
        return sample(num_samples, generator=generator, **options)
    with _seeded_by(generator):
        return sample(num_samples, **options)


def takes_generator(sample: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a module's ``sample`` takes a generator beside these options.

    Raises:
        TypeError: it takes no number of samples or not these options, with or without a generator.
    """
    signature = inspect.signature(sample)
    try:
        signature.bind(1, generator=None, **options)
    except TypeError:
        signature.bind(1, **options)
        return False
    return True


@contextmanager
def _seeded_by(generator: torch.Generator) -> Iterator[None]:
    import numpy as np

    device = generator.device
    state = get_random_state(device)
    seed = int(torch.randint(2**32, (), generator=generator, device=device))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state, device)
