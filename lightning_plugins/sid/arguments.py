"""What arguments of SiD must be: everything that can be said before the teacher is loaded."""

from collections.abc import Mapping
from typing import Any, get_args

from lightning_plugins.sid.losses import Weighting
from lightning_plugins.sid.steps import Levels, Loss

_LEAST = {
    "fake_steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "num_pictures": 0,
    "updates_per_epoch": 1,
    "teacher_steps": 1,
}
_CHOICES = {"loss": Loss, "noise_levels": Levels, "fake_noise_levels": Levels, "weighting": Weighting}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what is out of range, in one sentence.

    Args:
        arguments: those of SiD's constructor, by name.

    Raises:
        ValueError: one of them is.
    """
    for name, minimum in _LEAST.items():
        if arguments[name] < minimum:
            raise ValueError(f"{name}={arguments[name]} must be {minimum} or more.")
    for name in ("sigma_init", "lr", "fake_lr", "eps", "gradient_clip", "ema_ramp_up", "lora_rank"):
        if (value := arguments[name]) is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive.")
    for name in ("ema_halflife_images", "guidance", "fake_guidance"):
        if (value := arguments[name]) is not None and not value >= 0:
            raise ValueError(f"{name}={value} must be 0 or more.")
    for name in ("decay_from", "condition_dropout"):
        if not 0 <= arguments[name] <= 1:
            raise ValueError(f"{name}={arguments[name]} must lie in [0, 1].")
    for name, kind in _CHOICES.items():
        value = arguments[name]
        if value not in get_args(kind) and not (value is None and name == "fake_noise_levels"):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(get_args(kind))}.")
    betas = arguments["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1).")
    if not 0 <= arguments["t_min"] < arguments["t_max"] <= 1000:
        raise ValueError(
            f"t_min={arguments['t_min']} and t_max={arguments['t_max']} must satisfy 0 <= t_min < t_max <= 1000 "
            "(thousandths of the schedule)."
        )
    if arguments["adversarial"] and (arguments["guidance"] != 1 or arguments["fake_guidance"] not in (None, 1)):
        raise ValueError("adversarial=True reads the fake score's network without guidance: set guidance to 1.")
    if arguments["batch_size"] < arguments["accumulate"]:
        raise ValueError(f"accumulate={arguments['accumulate']} must not exceed batch_size={arguments['batch_size']}.")
