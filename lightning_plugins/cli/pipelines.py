"""Folders of diffusers pipelines as models that draw samples. Imports nothing heavy before one is wanted."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plugins.cli.messages import UsageError

if TYPE_CHECKING:
    import torch


def is_pipeline(path: str | Path) -> bool:
    """Whether this is a folder with a diffusers pipeline, such as ``export`` writes."""
    return (Path(path) / "model_index.json").is_file()


class Pipeline:
    """A diffusers pipeline that draws images: an exported student in one step, any other as it does by default.

    Attributes:
        conditional: whether it takes labels.
        num_classes: labels are 0 to this - 1; None without.
        device: the GPU if there is one.

    Args:
        folder: with a ``model_index.json``.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from diffusers.utils import logging

        from lightning_plugins.sid.export import ONE_STEP
        from lightning_plugins.sid.pipeline_folder import load_pipeline, read_index

        logging.disable_progress_bar()
        try:
            index = read_index(folder)
            self._pipeline: Any = load_pipeline(str(folder))
        except (OSError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise UsageError(f"{str(folder)!r} cannot be loaded as a diffusers pipeline: {reason}.") from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline.to(self.device).set_progress_bar_config(disable=True)
        self._takes = inspect.signature(self._pipeline.__call__).parameters.keys()
        steps = {"num_inference_steps": 1, "guidance_scale": 1.0} if index.get(ONE_STEP) else {}
        self._steps = {name: value for name, value in steps.items() if name in self._takes}
        self.num_classes = self._classes() if "class_labels" in self._takes else None
        self.conditional = self.num_classes is not None

    def _classes(self) -> int | None:
        config = self._pipeline.components.get("unet", self._pipeline.components.get("transformer")).config
        return config.get("num_class_embeds") or config.get("num_embeds_ada_norm")

    def sample(
        self,
        num_samples: int,
        *,
        labels: "torch.Tensor | None" = None,
        prompts: Sequence[str] | None = None,
        generator: "torch.Generator | None" = None,
    ) -> "torch.Tensor":
        """Images ``(n, C, H, W)`` in [0, 1], of these classes or texts; classes at random if none are given.

        Raises:
            ValueError: a text is missing, or not wanted.
        """
        import torch

        asked: dict[str, Any] = dict(self._steps)
        if ("prompt" in self._takes) != (prompts is not None):
            name = type(self._pipeline).__name__
            if prompts is None:
                raise ValueError(f"This {name} draws what a text says: give one by --prompt.")
            raise ValueError(f"--prompt: this {name} cannot be told what to draw. Leave it out.")
        if prompts is not None:
            asked["prompt"] = list(prompts)
        if self.num_classes is not None:
            if labels is None:
                device = generator.device if generator is not None else self.device
                labels = torch.randint(self.num_classes, (num_samples,), generator=generator, device=device)
            asked["class_labels"] = labels.tolist()
        if "batch_size" in self._takes:
            asked["batch_size"] = num_samples
        images = self._pipeline(**asked, generator=generator, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
