"""The arguments of SiD looked at before the teacher is loaded."""

from collections.abc import Mapping
from typing import Any

from lightning_plugins.core import arguments as must
from lightning_plugins.sid.losses import Weighting
from lightning_plugins.sid.noise_levels import Levels, check_times
from lightning_plugins.sid.objectives import Loss

_MOMENTUM = must.number(0, below=1)
_RULES = {
    "alpha": must.finite,
    "sigma_init": must.positive,
    "lr": must.positive,
    "fake_lr": must.positive,
    "betas": must.each(_MOMENTUM, 2, of="two numbers"),
    "eps": must.positive,
    "fake_steps": must.count,
    "batch_size": must.count,
    "accumulate": must.count,
    "gradient_clip": must.optional(must.positive),
    "decay_from": must.share,
    "ema_halflife_images": must.non_negative,
    "ema_ramp_up": must.positive,
    "loss": must.one_of(Loss),
    "weighting": must.one_of(Weighting),
    "noise_levels": must.one_of(Levels),
    "fake_noise_levels": must.optional(must.one_of(Levels)),
    "guidance": must.non_negative,
    "fake_guidance": must.optional(must.non_negative),
    "condition_dropout": must.share,
    "adversarial": must.flag,
    "generator_after_images": must.optional(must.whole(0)),
    "adversarial_after_images": must.optional(must.whole(0)),
    "fake_clip_value": must.optional(must.non_negative),
    "lora_rank": must.optional(must.count),
    "activation_checkpointing": must.flag,
    "clip_output": must.optional(must.flag),
    "teacher_steps": must.count,
    "num_pictures": must.whole(0, why="0 is for none"),
    "updates_per_epoch": must.count,
    "seed": must.seed,
    "optimizer": must.optional(must.function),
    "fake_optimizer": must.optional(must.function),
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what is out of range, in one sentence.

    Args:
        arguments: those of SiD's constructor, by name.

    Raises:
        ValueError: one of them is.
    """
    must.check(arguments, **_RULES)
    check_times(arguments["t_min"], arguments["t_max"])
    if arguments["adversarial"] and (arguments["guidance"] != 1 or arguments["fake_guidance"] not in (None, 1)):
        raise ValueError("adversarial=True reads the fake score's network without guidance: set guidance to 1.")
    for name in ("generator_after_images", "adversarial_after_images", "fake_clip_value"):
        if arguments[name] and not arguments["adversarial"]:
            raise ValueError(
                f"{name}={arguments[name]} is read with adversarial=True alone: set that, or leave it out."
            )
    if arguments["batch_size"] < arguments["accumulate"]:
        raise ValueError(f"accumulate={arguments['accumulate']} must not exceed batch_size={arguments['batch_size']}.")
