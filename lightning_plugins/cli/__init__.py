"""The command line ``lightning-plugins``: LightningCLI in subclass mode, with short names and short errors.

This file imports nothing heavy, so that ``--help``, ``list`` and ``copy`` answer at once.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_plugins import __version__
from lightning_plugins.cli.commands import COMMANDS, run_command
from lightning_plugins.cli.messages import UsageError, did_you_mean
from lightning_plugins.cli.short_help import short_help

__all__ = ["main"]

_OPTIONS = ("--help", "--version", "--print_completion")
_COMMANDS = "\n".join(f"  {name:<11}  {line}" for name, line in COMMANDS.items())
HELP = f"""\
usage: lightning-plugins COMMAND [options]

Train, test and look into ideas that are famous on paper, as PyTorch Lightning parts.

  lightning-plugins fit --config capsnet/digits                train on real handwritten digits, with pictures
  lightning-plugins fit --config capsnet/digits --model.iterations 1 --trainer.max_epochs 3
  lightning-plugins test --ckpt_path last --data Digits        test the newest run; the file knows its model

commands:
{_COMMANDS}

`lightning-plugins COMMAND --help` shows the options of a command. Behind fit, validate, test and predict: `--help all`
shows all of them, `--model.help CLASS` those of a class, `--trainer.help` the Trainer's, `--print_config` the whole
configuration. A class of your own is given by its path: --model my_package.MyCapsNet.

options:
  --version                      print the version
  --print_completion shtab-bash  print a completion script (also shtab-zsh, shtab-tcsh)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: the words after the program's name; those of the process by default.

    Raises:
        SystemExit: with status 2 after a mistake, told in at most five lines on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(HELP, end="")
        elif words[0] == "--version":
            print(f"lightning-plugins {__version__}")
        elif words[0] in ("generate", "sample", "export", "consolidate", "list", "copy", "new", "plot"):
            with _own_modules():
                run_command(words[0], words[1:])
        elif words[0] in COMMANDS and words[-1] in ("-h", "--help"):
            print(short_help(words[0]), end="")
        elif words[0] in COMMANDS or words[0].startswith("--print_completion"):
            _run(words)
        else:
            hint = did_you_mean(words[0], [*COMMANDS, *_OPTIONS])
            raise UsageError(f"a command comes first, not {words[0]!r}.", hint, f"Commands: {', '.join(COMMANDS)}")
    except UsageError as error:
        error.exit()
    except KeyboardInterrupt:
        sys.exit(130)


def _run(words: Sequence[str]) -> None:
    """Run a sub-command of Lightning's."""
    with _own_modules():
        from lightning_plugins.cli.app import run

        run(words)


@contextmanager
def _own_modules() -> Iterator[None]:
    """The user's own modules in the current folder can be imported."""
    path = sys.path.copy()
    if not {"", os.getcwd()} & set(path):
        sys.path.append(os.getcwd())  # last, so that a folder called `datasets` hides no library
    try:
        yield
    finally:
        sys.path[:] = path
