"""``generate``: texts from a trained model, as they are decoded. Imports nothing heavy before the model is wanted."""

import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NoReturn, Protocol

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from shtab import FILE

from lightning_plugins.cli.load import checkpoint_file, load_model
from lightning_plugins.cli.messages import UsageError, raised_here

EXAMPLES = """\
One line comes out for each text that goes in: --text, or the lines of standard input (a blank line stays blank).

  lightning-plugins generate --ckpt_path last --text "The text to be summarised."
  lightning-plugins generate --ckpt_path last --top_p 0.9              type lines, read answers; Ctrl-D ends
  lightning-plugins generate --ckpt_path last --num_beams 4 --batch_size 32 < sources.txt > predictions.txt
"""
_EXPORTED = "An exported model is run as its README.md shows: most need plain transformers alone."
_BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended


class WritesText(Protocol):
    """What ``generate`` needs of a LightningModule; ``UniLMSeq2Seq`` is one."""

    def generate_text(self, sources: list[str], **generation: Any) -> list[str]:
        """One text for each source, decoded as one batch."""
        ...

    def stream_text(self, source: str, **generation: Any) -> Generator[str, None, None]:
        """Pieces of the text for one source, as they are decoded; closing it ends the decoding."""
        ...


def add_generate_arguments(parser: ArgumentParser) -> None:
    """Add the options of ``generate``; each that is left out stays as the model was trained to decode."""
    where = "Checkpoint of a model that writes text, or `last`: the newest run's below the current folder."
    parser.add_argument("--ckpt_path", type=str, required=True, help=where).complete = FILE
    parser.add_argument("--text", type=str, action="append", help="Source text; may be repeated.")
    parser.add_argument(
        "--model", type=str, help="Class of a checkpoint that was made in Python, such as UniLMSeq2Seq."
    )
    parser.add_argument("--max_new_tokens", type=PositiveInt, help="Most tokens to write for a text.")
    beams = "Keep this many best beginnings; above 1 a text is printed when it is complete."
    parser.add_argument("--num_beams", type=PositiveInt, help=beams)
    sample = "Draw tokens at random instead of taking the likeliest; the two options below do so, too."
    parser.add_argument("--do_sample", action="store_true", help=sample)
    parser.add_argument("--temperature", type=PositiveFloat, help="Below 1 the likely tokens are drawn more often.")
    top_p = "Draw among the likeliest tokens that together have this probability."
    parser.add_argument("--top_p", type=ClosedUnitInterval, help=top_p)
    batch = "Texts to decode at once; above 1 they are printed when all of them are complete."
    parser.add_argument("--batch_size", type=PositiveInt, default=1, help=batch)


def generate(options: Namespace) -> None:
    """Print a text for each source.

    Raises:
        UsageError: the checkpoint cannot be used, or a text or an option does not fit the model.
    """
    generation = {name: options[name] for name in ("max_new_tokens", "num_beams", "temperature", "top_p")}
    generation = {name: value for name, value in generation.items() if value is not None}
    if options.do_sample or {"temperature", "top_p"} & generation.keys():
        generation["do_sample"] = True
    path = checkpoint_file(options.ckpt_path, _EXPORTED)
    model: WritesText = load_model(path, options.model, ("generate_text", "stream_text"), "writes no text")
    sources = iter(options.text or _lines())
    beams = {**(model.hparams.get("generation") or {}), **generation}.get("num_beams") or 1
    try:
        while batch := list(islice(sources, options.batch_size)):
            if len(batch) == beams == 1 == options.batch_size and batch[0].strip():
                with closing(model.stream_text(batch[0], **generation)) as pieces:
                    _print_line(pieces)
            else:
                for text in _complete(model, batch, generation):
                    _print_line([text])
    except ValueError as error:
        if not raised_here(error):
            raise
        raise UsageError(str(error)) from error


def _complete(model: WritesText, batch: list[str], generation: dict[str, Any]) -> Iterator[str]:
    """A text for each source of a batch; nothing for a blank one."""
    sources = [source for source in batch if source.strip()]
    texts = iter(model.generate_text(sources, **generation) if sources else [])
    for source in batch:
        yield next(texts) if source.strip() else ""


def _print_line(pieces: Iterable[str]) -> None:
    try:
        for piece in pieces:
            print(_in_one_line(piece), end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _leave_quietly()


def _in_one_line(text: str) -> str:
    """Without what would break the line or steer the terminal: a tokenizer may be anyone's."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", " ", text)


def _leave_quietly() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    sys.exit(_BROKEN_PIPE)


def _lines() -> Iterator[str]:
    """Lines of standard input, as they come."""
    if sys.stdin.isatty():
        sys.stderr.write("A line is a text; Ctrl-D ends.\n")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input, line {number}: byte {error.start + 1} is not UTF-8.") from error
