"""Commands without a Trainer, from ``generate`` to ``plot``."""

import ast
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from shtab import FILE

import lightning_plugins
from lightning_plugins.cli.consolidate import EXAMPLES as CONSOLIDATE_EXAMPLES
from lightning_plugins.cli.consolidate import add_consolidate_arguments, consolidate
from lightning_plugins.cli.export import EXAMPLES as EXPORT_EXAMPLES
from lightning_plugins.cli.export import add_export_arguments, export
from lightning_plugins.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from lightning_plugins.cli.generate import add_generate_arguments, generate
from lightning_plugins.cli.messages import UsageError, did_you_mean
from lightning_plugins.cli.new import EXAMPLES as NEW_EXAMPLES
from lightning_plugins.cli.new import add_new_arguments, new
from lightning_plugins.cli.resolve import headline, shipped
from lightning_plugins.cli.sample import EXAMPLES as SAMPLE_EXAMPLES
from lightning_plugins.cli.sample import add_sample_arguments, sample

COMMANDS = {
    "fit": "train, validating along the way",
    "validate": "one pass over the validation set",
    "test": "one pass over the test set",
    "predict": "write the predictions to a file",
    "generate": "print the texts a trained model writes, piece by piece",
    "sample": "draw images from a trained generative model",
    "export": "write a trained model as a folder that runs without this package",
    "consolidate": "make one file of a checkpoint that several processes wrote as a folder",
    "list": "parts, configs and recipes, one line each",
    "copy": "copy a shipped config or recipe, to change it",
    "new": "a class of your own with a config and a test, to begin with",
    "plot": "a page of pictures from a run with ODEDiagnostics",
}


class _LightParser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        name = self.prog.split()[-1]
        UsageError(" ".join(message.split()) + ".", f"All options: lightning-plugins {name} --help").exit()


class _Examples(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines below the options as they are."""


def command_parsers() -> dict[str, ArgumentParser]:
    """The parser of each command in this file, by name."""
    generate_parser = _teaching_parser("generate", GENERATE_EXAMPLES)
    add_generate_arguments(generate_parser)
    sample_parser = _teaching_parser("sample", SAMPLE_EXAMPLES)
    add_sample_arguments(sample_parser)
    export_parser = _teaching_parser("export", EXPORT_EXAMPLES)
    add_export_arguments(export_parser)
    consolidate_parser = _teaching_parser("consolidate", CONSOLIDATE_EXAMPLES)
    add_consolidate_arguments(consolidate_parser)
    list_parser = _LightParser(prog="lightning-plugins list", description=COMMANDS["list"])
    copy_parser = _LightParser(prog="lightning-plugins copy", description=COMMANDS["copy"])
    copy_parser.add_argument("name", type=str, help="Short name, as `lightning-plugins list` prints it.")
    copy_parser.add_argument("dest", type=str, help="File or folder to copy to; an existing file is never replaced.")
    new_parser = _teaching_parser("new", NEW_EXAMPLES)
    add_new_arguments(new_parser)
    plot_parser = _LightParser(prog="lightning-plugins plot", description=COMMANDS["plot"], allow_abbrev=False)
    log = "The run's folder or one above it (the newest run counts), its metrics.csv or its TensorBoard events file."
    picture = "File to write, in the format of its ending: .png, .pdf, .svg. Beside the log by default."
    run = plot_parser.add_argument("run", type=str, help=log)
    output = plot_parser.add_argument("--output", type=str, help=picture)
    run.complete = output.complete = FILE
    return {
        "generate": generate_parser,
        "sample": sample_parser,
        "export": export_parser,
        "consolidate": consolidate_parser,
        "list": list_parser,
        "copy": copy_parser,
        "new": new_parser,
        "plot": plot_parser,
    }


def _teaching_parser(name: str, examples: str) -> ArgumentParser:
    """A parser whose help ends with examples."""
    return _LightParser(
        prog=f"lightning-plugins {name}",
        description=COMMANDS[name],
        epilog=examples,
        formatter_class=_Examples,
        allow_abbrev=False,
    )


def run_command(name: str, argv: Sequence[str]) -> None:
    """Run a command of this file with the words after its name."""
    options: Any = command_parsers()[name].parse_args(argv)
    if name == "list":
        list_parts()
    elif name == "generate":
        generate(options)
    elif name == "sample":
        sample(options)
    elif name == "export":
        export(options)
    elif name == "consolidate":
        consolidate(options)
    elif name == "copy":
        copy(options.name, options.dest)
    elif name == "new":
        new(options)
    else:
        plot(options.run, options.output)


def list_parts() -> None:
    """Print parts, configs and recipes, one line each."""
    sections = {
        "Parts (models: --model, data: --data, callbacks: --trainer.callbacks+=, others in Python)": dict(
            sorted(_parts(ast.ClassDef))
        ),
        "Functions (from lightning_plugins import NAME)": dict(_parts(ast.FunctionDef)),
        "Configs (--config)": {name: headline(path) for name, path in shipped("configs").items()},
        "Recipes (lightning-plugins copy NAME DEST)": {
            name: headline(path) for name, path in shipped("recipes").items()
        },
    }
    width = max(len(name) for entries in sections.values() for name in entries)
    for title, entries in sections.items():
        print(f"{title}:")
        for name, line in entries.items():
            print(f"  {name:<{width}}  {line}".rstrip())


def _parts(kind: type[ast.ClassDef | ast.FunctionDef]) -> Iterator[tuple[str, str]]:
    """Each public class or function with its docstring's first line, read from the source without importing it."""
    root = Path(lightning_plugins.__file__).parent
    for name, module in lightning_plugins._PUBLIC.items():
        place = root.joinpath(*module.split(".")[1:])
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for node in (node for file in files for node in _top_level(file)):
            if isinstance(node, kind) and node.name == name:
                yield name, (ast.get_docstring(node) or "").split("\n", 1)[0]


@cache
def _top_level(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def copy(name: str, dest: str) -> None:
    """Copy a shipped config or recipe to a file or folder of the user's, never over an existing file.

    Raises:
        UsageError: no such name, or the file exists.
    """
    known = {**shipped("configs"), **shipped("recipes")}
    source = known.get(name.removesuffix(".yaml").removesuffix(".py"))
    if source is None:
        hint = did_you_mean(name, known)
        raise UsageError(f"no shipped config or recipe is called {name!r}.", hint, "All names: lightning-plugins list")
    target = Path(dest)
    if target.is_dir() or dest.endswith("/"):
        target /= source.name
    if target.exists():
        raise UsageError(f"{str(target)!r} exists and is not overwritten; choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("xb") as file:  # not through a link that points nowhere yet
            file.write(source.read_bytes())
    except FileExistsError as error:
        raise UsageError(f"{str(target)!r} is a link, and is not followed; choose another name.") from error
    run = f"lightning-plugins fit --config {target}" if source.suffix == ".yaml" else f"python {target}"
    print(f"Copied to {target}. Run it: {run}")


def plot(run: str, output: str | None) -> None:
    """Draw what ODEDiagnostics logged in a run, and tell where the picture is.

    Raises:
        UsageError: the run cannot be read or holds nothing to draw, or the picture cannot be written.
    """
    from lightning_plugins.callbacks.ode_diagnostics.figure import plot_ode_diagnostics

    try:
        print(f"Picture: {plot_ode_diagnostics(run, output)}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise UsageError(str(error)) from error
