"""The random states of a process: Python, NumPy, torch and its GPU."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_plugins.core.lightning_internals import trainer_of
from lightning_plugins.core.random_numbers import generator


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


def state_for_rank(states: Sequence[dict[str, Any]], rank: int, device: torch.device) -> dict[str, Any]:
    """A process's random state out of those of other than its number of processes: no two processes get the same.

    A process that there was goes on with its own state, unless an earlier one had the same; any other gets one that is
    derived from all states and its rank. A derived one tells the first process's ``torch.initial_seed()``, by which
    all draw what hangs on samples, such as masks.

    Args:
        states: of the processes that there were, by rank, from :func:`get_random_state`.
        rank: the process.
        device: the process's device.
    """
    if rank < len(states) and not any(torch.equal(states[rank]["torch"], s["torch"]) for s in states[:rank]):
        return states[rank]
    digest = hashlib.sha256(rank.to_bytes(8, "little"))
    for state in states:
        digest.update(state["torch"].cpu().numpy().tobytes())
    state = _seeded_state(int.from_bytes(digest.digest()[:8], "little") >> 1, device)
    state["torch"][:_SEED_BYTES] = states[0]["torch"][:_SEED_BYTES].cpu()
    return state


_SEED_BYTES = 8  # of torch's CPU state: what torch.initial_seed() tells; the numbers come from the rest


def _seeded_state(seed: int, device: torch.device) -> dict[str, Any]:
    """The random state that a seed gives; this process's own is left as it was."""
    import numpy as np

    before = get_random_state(device)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return get_random_state(device)
    finally:
        set_random_state(before, device)


@contextmanager
def draws_of_rank(module: LightningModule, *place: int) -> Iterator[None]:
    """Global random numbers of torch that differ between processes within, for dropout; put back afterwards.

    ``seed_everything`` gives one seed to all processes, which then drop the same units of different rows. One process
    goes on with the global random numbers.

    Args:
        module: whose run it is.
        place: in the run, such as epoch and batch; the numbers hang on it, on the run's seed and on the process.
    """
    trainer, device = trainer_of(module), module.device
    if trainer is None or trainer.world_size == 1:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed = generator("cpu", torch.initial_seed(), *place, module.global_rank).initial_seed()
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield
