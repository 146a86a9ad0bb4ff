"""``sample``: pictures drawn by a trained generative model. Imports nothing heavy before the model is wanted."""

import inspect
import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from shtab import FILE

from lightning_plugins.cli.load import checkpoint_file, load_model
from lightning_plugins.cli.messages import UsageError, raised_here
from lightning_plugins.cli.pipelines import Pipeline, is_pipeline

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
An --output that ends in .png becomes one picture of all images, any other a folder with a PNG for each.

  lightning-plugins sample --ckpt_path last                                   a page of 64, beside the run
  lightning-plugins sample --ckpt_path last --labels 3 5 --output digits.png  of a conditional model: a column a class
  lightning-plugins sample --ckpt_path last --prior mixture --num_samples 10000 --batch_size 256 --output drawn
  lightning-plugins sample --ckpt_path student --prompt "a lighthouse" --num_samples 4   of an exported folder
"""
_NO_FILE = "Of folders it takes those of diffusers pipelines, such as `lightning-plugins export` writes of SiD."
_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pdf", ".svg")
_VISIBLE = 32  # px: smaller images are enlarged on a page by a whole number


class DrawsSamples(Protocol):
    """What ``sample`` needs of a LightningModule; ``EAE`` is one. Of its options it names those it takes.

    Without ``generator`` the global random numbers are set around the call. A conditional module, one that takes
    labels, also has ``conditional: bool`` and ``num_classes: int``.
    """

    def sample(
        self,
        num_samples: int,
        *,
        labels: "torch.Tensor | None" = None,
        generator: "torch.Generator | None" = None,
        **options: Any,
    ) -> "torch.Tensor":
        """Images ``(n, C, H, W)`` in [0, 1]; ``labels`` are ``(n,)`` int64."""


def add_sample_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``sample``; how to draw stays as the model has it where nothing is given."""
    where = "Checkpoint of a generative model, which may be a sharded one's folder, `last` (the newest "
    where += "run's below the current folder), or the folder of a diffusers pipeline: an exported one "
    where += "draws in one step, any other as it does by default."
    parser.add_argument("--ckpt_path", type=str, required=True, help=where).complete = FILE
    parser.add_argument("--num_samples", type=PositiveInt, default=64, help="Images to draw.")
    output = "Picture to write if it ends in .png (an existing one is replaced), else a folder for a PNG of each image "
    output += "(where nothing is replaced). By default samples.png in the run's folder, or beside the pipeline's."
    parser.add_argument("--output", type=str, help=output).complete = FILE
    parser.add_argument("--model", type=str, help="Class of a checkpoint that was made in Python, such as EAE.")
    labels = "Classes to draw, in turn, of a conditional model; at random if left out."
    parser.add_argument("--labels", type=NonNegativeInt, nargs="+", help=labels)
    prompt = "Text to draw, of a text-to-image model; several take turns."
    parser.add_argument("--prompt", type=str, action="append", help=prompt)
    prior = "Where codes are drawn: normal, or gaussian and mixture as fitted to the training codes."
    parser.add_argument("--prior", choices=("normal", "gaussian", "mixture"), help=prior)
    temperature = "Below 1 images are more typical and less varied."
    parser.add_argument("--temperature", type=PositiveFloat, help=temperature)
    seed = "Another seed draws other images; the same one with the same batch_size, on the same device, the same."
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help=seed)
    batch = "Images to draw at once; more are faster and take more memory."
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help=batch)


def sample(options: Namespace) -> None:
    """Draw images into a picture or a folder, and tell where it is. After an error nothing of them is left.

    Raises:
        UsageError: the checkpoint cannot be used, an option does not fit the model, or nothing can be written there.
    """
    pipeline = is_pipeline(options.ckpt_path)
    path = Path(options.ckpt_path) if pipeline else checkpoint_file(options.ckpt_path, _NO_FILE)
    output = Path(options.output) if options.output is not None else _beside_run(path) / "samples.png"
    _refuse_output(output, options.num_samples)
    model = Pipeline(path) if pipeline else load_model(path, options.model, ("sample",), "draws no samples")
    images = _draw(model, options)
    try:
        if output.suffix.lower() == ".png":
            _write_page(output, list(images), len(options.labels or options.prompt or [0]))
            print(f"Picture: {_shorten(output)}")
        else:
            _write_folder(output, images)
            s = "s" if options.num_samples > 1 else ""
            print(f"{options.num_samples} image{s}: {_shorten(output)}")
    except OSError as error:
        raise UsageError(f"--output {str(output)!r}: {error.strerror or error}.") from error


def _beside_run(path: Path) -> Path:
    """The folder of the run whose checkpoint this is, by Lightning's own rules; else the checkpoint's."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _refuse_output(output: Path, num_samples: int) -> None:
    """Say now what would go wrong after all images are drawn."""
    told = f"--output {str(output)!r}"
    if output.suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"{told} must end in .png, or be a folder for a PNG of each image.")
    if output.suffix.lower() == ".png":
        if output.is_dir():
            raise UsageError(f"{told} is a folder; give the picture another name.")
        folder = output.absolute().parent
    else:
        taken = next((path for path in (output / _name(i) for i in range(num_samples)) if path.exists()), None)
        if taken is not None:
            raise UsageError(f"{told} holds {taken.name} already, and nothing is replaced; choose another folder.")
        folder = output.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(f"{told}: nothing can be written to {_shorten(there)!r}; choose another place.")


def _name(index: int) -> str:
    return f"sample_{index:05d}.png"


def _draw(model: Any, options: Namespace) -> Iterator["torch.Tensor"]:
    """Each image ``(C, H, W)``, drawn in batches with a generator of their own.

    Raises:
        UsageError: the model takes no such option, refuses it, or draws something that is no picture.
    """
    import torch

    from lightning_plugins.core.sampling import draw_samples

    name = type(model).__name__
    given = {key: options[key] for key in ("prior", "temperature") if options[key] is not None}
    prompts = options.prompt
    _refuse_options(model, given if prompts is None else {**given, "prompts": prompts})
    labels = None
    if options.labels is not None:
        _refuse_labels(model, options.labels)
        labels = torch.tensor(options.labels, device=model.device).repeat(
            -(-options.num_samples // len(options.labels))
        )
    generator = torch.Generator(model.device).manual_seed(options.seed)
    for start in range(0, options.num_samples, options.batch_size):
        n = min(options.batch_size, options.num_samples - start)
        if labels is not None:
            given["labels"] = labels[start : start + n]
        if prompts is not None:
            given["prompts"] = [prompts[index % len(prompts)] for index in range(start, start + n)]
        try:
            with torch.inference_mode():
                images = draw_samples(model.sample, n, generator, **given)
        except ValueError as error:
            if not raised_here(error):
                raise
            raise UsageError(str(error)) from error
        _refuse_other_values(images, n, name)
        yield from images.float().cpu()


def _refuse_options(model: Any, given: dict[str, Any]) -> None:
    parameters = inspect.signature(model.sample).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in given.keys() - parameters.keys():
        option = "prompt" if key == "prompts" else key
        raise UsageError(
            f"--{option} does not fit this {type(model).__name__}: its sample takes no {key}. Leave it out."
        )


def _refuse_labels(model: Any, labels: list[int]) -> None:
    name = type(model).__name__
    if not getattr(model, "conditional", False):
        raise UsageError(f"--labels: this {name} is not conditional, it cannot be told what to draw. Leave them out.")
    wrong = next((label for label in labels if label >= model.num_classes), None)
    if wrong is not None:
        raise UsageError(f"--labels {wrong}: the classes of this {name} are 0 to {model.num_classes - 1}.")


def _refuse_other_values(images: "torch.Tensor", n: int, name: str) -> None:
    if images.ndim != 4 or len(images) != n or images.shape[1] not in (1, 3):
        wanted = f"({n}, 1 or 3, H, W)"
        raise UsageError(f"{name}.sample gave {tuple(images.shape)} where {wanted} was asked for: no pictures.")
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise UsageError(f"{name}.sample gave values from {low:.4g} to {high:.4g}; those of a picture lie in [0, 1].")


def _write_page(path: Path, images: list["torch.Tensor"], turn: int) -> None:
    """All images in one picture, about square; each column holds one of the ``turn`` classes or texts."""
    import torch

    from lightning_plugins.core.new_file import new_file
    from lightning_plugins.core.pictures import image_grid

    columns = turn * max(1, round(math.sqrt(len(images)) / turn))
    zoom = max(1, _VISIBLE // max(images[0].shape[1:]))
    content = _png(image_grid(torch.stack(images), columns, zoom=zoom))
    with new_file(path) as file:
        file.write(content)


def _write_folder(folder: Path, images: Iterable["torch.Tensor"]) -> None:
    """A PNG for each image, as they are drawn; an error takes all of them away, so that the command can be repeated."""
    new = not folder.exists()
    written: list[Path] = []
    try:
        for index, image in enumerate(images):
            content = _png(image)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / _name(index)).open("xb") as file:
                written.append(folder / _name(index))
                file.write(content)
    except BaseException:
        for path in written:
            path.unlink()
        if new and folder.exists():
            folder.rmdir()
        raise


def _png(image: "torch.Tensor") -> bytes:
    """``(C, H, W)`` in [0, 1] as the bytes of a PNG, rounded to the nearest of 256 levels."""
    import torch
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1)
    file = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()


def _shorten(path: Path) -> str:
    from lightning_plugins.cli.outputs import shorten

    return shorten(path)
