"""``export``: a trained model as a folder that runs without this package. Imports nothing heavy before it is wanted."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentParser, Namespace
from shtab import DIRECTORY, FILE

from lightning_plugins.cli.load import checkpoint_file, load_model
from lightning_plugins.cli.messages import RunStoppedError, UsageError, raised_here
from lightning_plugins.cli.push import check_push, push

EXAMPLES = """\
The folder holds weights as safetensors, configurations, and a README.md whose example runs.

  lightning-plugins export --ckpt_path last --output student     of SiD: a diffusers pipeline of one step
  lightning-plugins export --ckpt_path last --output summariser  of UniLMSeq2Seq: a model and tokenizer of transformers
  lightning-plugins export --ckpt_path last --push_to_hub me/digits    on the Hugging Face Hub, after `hf auth login`
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
    output = "Folder to write, new or empty; needed unless the model is pushed."
    parser.add_argument("--output", type=str, help=output).complete = DIRECTORY
    hub = "Id of a model on the Hugging Face Hub to push the folder to, such as me/my-digits; made if there is none."
    parser.add_argument("--push_to_hub", type=str, help=hub)
    private = "Whether a repository that is made there is private; true or false, which is the default."
    parser.add_argument("--private", type=bool, default=False, help=private)
    parser.add_argument("--model", type=str, help="Class of a checkpoint that was made in Python, such as SiD.")


def export(options: Namespace) -> None:
    """Write the folder, and tell where it is.

    Raises:
        UsageError: the checkpoint cannot be used, its class cannot be exported, or nothing can be written there.
    """
    if options.output is None and options.push_to_hub is None:
        raise UsageError("export needs a place: --output FOLDER, or --push_to_hub OWNER/NAME.")
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    folder = None if options.output is None else Path(options.output)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # said before a large model is loaded
        raise UsageError(f"--output {options.output!r} exists and is not empty; choose a new folder.")
    path = checkpoint_file(options.ckpt_path)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext() as spare:
        _write(path, options, Path(str(spare)) / "export" if folder is None else folder)


def _write(path: Path, options: Namespace, folder: Path) -> None:
    """Write the folder, and push it if asked to."""
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

    if options.output is not None:
        print(f"Exported: {shorten(folder)} (its README.md shows how to run it)", flush=True)
    if options.push_to_hub is None:
        return
    try:
        print(f"Pushed: {push(folder, options.push_to_hub, options.private)}")
    except RunStoppedError as error:
        kept = options.output is not None
        again = f"The folder is whole; to push it: hf upload {options.push_to_hub} {shorten(folder)}" if kept else ""
        raise RunStoppedError(*error.lines, again) from error
