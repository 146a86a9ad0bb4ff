"""Callbacks that would train something else without a word: each is refused in one sentence."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_early_copy(trainer: Trainer) -> None:
    """Refuse weight averaging by a copy of the module that was made before its network was built.

    Raises:
        MisconfigurationException: ``StochasticWeightAveraging`` is among the callbacks.
    """
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        raise MisconfigurationException(
            "StochasticWeightAveraging has copied the module before its network was built and would average nothing: "
            "touch module.network before fit (from a config that needs tokenizer=), or use EMAWeightAveraging."
        )


def refuse_blind_callbacks(trainer: Trainer) -> None:
    """Refuse Flooding, GradientPenalty and ODEDiagnostics under accumulation.

    They see the losses and gradients of a window before it is known how many tokens it has.

    Raises:
        MisconfigurationException: one of them is among the callbacks, and batches are accumulated.
    """
    names = [type(callback).__name__ for callback in trainer.callbacks if hasattr(callback, "gradient_order")]
    if names and trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            f"{' and '.join(names)} cannot see how UniLMSeq2Seq weighs accumulated batches by their tokens: set "
            f"accumulate_grad_batches=1, got {trainer.accumulate_grad_batches}, or take the callback out."
        )
