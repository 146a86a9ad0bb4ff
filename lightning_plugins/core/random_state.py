"""The random states of a process: Python, NumPy, torch and its GPU."""

import random
from typing import Any

import torch


def get_random_state(device: torch.device) -> dict[str, Any]:
    """The random states of this process, as values that ``torch.load(weights_only=True)`` reads.

    Args:
        device: the process's device; its generator is included if it is a GPU.

    Returns:
        ``{"python", "numpy", "torch"}`` and ``"cuda"`` on a GPU.
    """
    import numpy as np

    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)  # of the global generator, which numpy makes as a Mersenne Twister
    name, words, *rest = legacy
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(words.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo :func:`get_random_state`; a GPU's state is restored where there is a GPU."""
    import numpy as np

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
