"""``export``: a trained model as a folder that runs without this package. Imports nothing heavy before it is wanted."""

from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentParser, Namespace
from shtab import DIRECTORY, FILE

from lightning_plugins.cli.load import checkpoint_file, load_model
from lightning_plugins.cli.messages import UsageError, raised_here

EXAMPLES = """\
The folder holds weights as safetensors, configurations, and a README.md whose example runs. It can be uploaded to the
Hugging Face Hub as it is.

  lightning-plugins export --ckpt_path last --output student     of SiD: a diffusers pipeline of one step
  lightning-plugins export --ckpt_path last --output summariser  of UniLMSeq2Seq: a model and tokenizer of transformers
  lightning-plugins sample --ckpt_path student                   images of an exported pipeline
"""


class Exports(Protocol):
    """What ``export`` needs of a LightningModule; ``SiD`` and ``UniLMSeq2Seq`` are such."""

    def export(self, folder: str | Path) -> Any:
        """Write the folder, which is new or empty, whole or not at all."""


def add_export_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``export``."""
    where = "Checkpoint of a trained model, or `last`: the newest run's below the current folder."
    parser.add_argument("--ckpt_path", type=str, required=True, help=where).complete = FILE
    output = "Folder to write, new or empty."
    parser.add_argument("--output", type=str, required=True, help=output).complete = DIRECTORY
    parser.add_argument("--model", type=str, help="Class of a checkpoint that was made in Python, such as SiD.")


def export(options: Namespace) -> None:
    """Write the folder, and tell where it is.

    Raises:
        UsageError: the checkpoint cannot be used, its class cannot be exported, or nothing can be written there.
    """
    path, folder = checkpoint_file(options.ckpt_path), Path(options.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):  # said before a large model is loaded
        raise UsageError(f"--output {options.output!r} exists and is not empty; choose a new folder.")
    model: Exports = load_model(path, options.model, ("export",), "cannot be exported")
    try:
        model.export(folder)
    except OSError as error:
        told = f"--output {options.output!r}: {error.strerror or error}."
        raise UsageError(str(error) if raised_here(error) else told) from error
    except ValueError as error:
        if not raised_here(error):
            raise
        raise UsageError(str(error)) from error
    from lightning_plugins.cli.outputs import shorten

    print(f"Exported: {shorten(folder)} (its README.md shows how to run it)")
