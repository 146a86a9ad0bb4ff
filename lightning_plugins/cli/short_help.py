"""What ``--help`` of ``fit``, ``validate``, ``test`` and ``predict`` tells: a page. Imports nothing heavy."""

import textwrap

import lightning_plugins
from lightning_plugins.cli.commands import COMMANDS

CONFIG = (
    "YAML file or the name of a shipped config (see `lightning-plugins list`). May be repeated: the later file wins, "
    "and so does every option given after it."
)
TEST_AFTER_FIT = (
    "After fit, test the best checkpoint if one was monitored, else the last weights. Other sub-commands take no "
    "notice of it, so that one config serves all."
)
UNTRAINED = (
    "Validate, test or predict without --ckpt_path all the same, with the weights that the model is made with: random "
    "ones, and in SiD its teacher's. Only UniLMSeq2Seq from a model_name_or_path, and a class of your own whose "
    "attribute `pretrained` is True, count as trained. false by default; fit takes no notice of it."
)
TRAINER_HELP = "Show all arguments of the Trainer and exit."
_WIDTH, _INDENT = 100, 31
_FOLDERS = {"model": {"capsnet", "eae", "sid", "unilm"}, "data": {"data"}, "callback": {"callbacks"}}

_FIT_EXAMPLES = """\
  lightning-plugins fit --config capsnet/digits          a shipped config: model, data and trainer
  lightning-plugins fit --config capsnet/digits --model.iterations 1 --trainer.max_epochs 3
  lightning-plugins fit --model EAE --data Digits --trainer.callbacks+=GenerativeEvaluation
  lightning-plugins fit --config capsnet/digits --print_config > mine.yaml    to edit, for --config mine.yaml
"""
_OTHER_EXAMPLES = """\
  lightning-plugins {0} --ckpt_path last --data Digits    the newest run; the file knows its model
  lightning-plugins {0} --ckpt_path last --config capsnet/digits    with data and trainer of a config
"""
_LAST = "A file, or a sharded one's folder; `last` is the newest run's below --trainer.default_root_dir."
_CHECKPOINT = {
    "fit": f"Checkpoint to go on from: weights, optimizer, schedule, epoch and batch. {_LAST}",
    "validate": f"Checkpoint to validate. {_LAST}",
    "test": f"Checkpoint to test. {_LAST}",
    "predict": f"Checkpoint to predict with. {_LAST}",
}
_TABLE = ("--verbose {true,false}", "Print the results as a table; true by default.")
_OWN = {
    "fit": [],
    "validate": [_TABLE],
    "test": [_TABLE],
    "predict": [
        ("--return_predictions {true,false}", "Write the predictions to a file in the run's folder; true by default."),
    ],
}


def public_names(kind: str) -> list[str]:
    """Short names of the package's classes of a kind: ``model``, ``data`` or ``callback``; nothing is imported.

    >>> public_names("callback")[:2]
    ['Flooding', 'GenerativeEvaluation']
    """
    places = {name: module.split(".")[1] for name, module in lightning_plugins._PUBLIC.items() if name[0].isupper()}
    return sorted(name for name, place in places.items() if place in _FOLDERS[kind])


def short_help(command: str) -> str:
    """Usage, examples, and the options of this package; the Trainer's own are a line.

    Args:
        command: one of Lightning's: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    examples = _FIT_EXAMPLES if command == "fit" else _OTHER_EXAMPLES.format(command)
    sections = {
        "model and data": _model_and_data(),
        "options": _options(command),
        "trainer": _trainer(),
    }
    parts = [f"usage: lightning-plugins {command} [options]\n\n{COMMANDS[command].capitalize()}.\n", examples]
    parts += [f"{title}:\n" + "".join(_entry(*entry) for entry in entries) for title, entries in sections.items()]
    return "\n".join([*parts, "Models, data, callbacks, configs and recipes, a line each: lightning-plugins list\n"])


def _entry(option: str, text: str) -> str:
    """An option with its text beside it, or below a long one."""
    lines = textwrap.wrap(text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
    first = f"  {option:<{_INDENT - 4}}  {lines[0]}"
    head = [first] if len(option) <= _INDENT - 4 else [f"  {option}", " " * _INDENT + lines[0]]
    return "\n".join([*head, *(" " * _INDENT + line for line in lines[1:])]) + "\n"


def _model_and_data() -> list[tuple[str, str]]:
    own = "or a class of your own by its path, such as my_package."
    return [
        ("--model CLASS", f"{', '.join(public_names('model'))}; {own}MyNet."),
        (
            "--model.NAME VALUE",
            "An argument of the model. Those that the data knows, image_shape, num_classes and "
            "num_labels, are linked: leave them out. Others than the data's are refused.",
        ),
        ("--model.help CLASS", "Show all arguments of a model and exit."),
        ("--data CLASS", f"{', '.join(public_names('data'))}; {own}MyData."),
        ("--data.NAME VALUE", "An argument of the data."),
        ("--data.help CLASS", "Show all arguments of a data class and exit."),
    ]


def _options(command: str) -> list[tuple[str, str]]:
    return [
        ("-h, --help [all]", "Show this page and exit; with `all` every option, the Trainer's too."),
        ("-c FILE, --config FILE", CONFIG),
        (
            "--print_config",
            "Print the configuration that all other options make and exit: a file for --config. With "
            "=skip_default only what differs from the defaults.",
        ),
        (
            "--ckpt_path FILE",
            f"{_CHECKPOINT[command]} The file tells the model's class and arguments: --model may be "
            "left out, and what contradicts the file is refused.",
        ),
        ("--weights_only {true,false}", "Read nothing but tensors and plain values of a checkpoint; true by default."),
        *_OWN[command],
        ("--seed_everything SEED", "Seed of Python, NumPy and torch, 0 by default; true draws one, false sets none."),
        ("--test_after_fit {true,false}", TEST_AFTER_FIT),
        ("--untrained {true,false}", UNTRAINED),
    ]


def _trainer() -> list[tuple[str, str]]:
    return [
        (
            "--trainer.NAME VALUE",
            "An argument of Lightning's Trainer: max_epochs, accelerator, devices, precision, "
            "logger, default_root_dir, fast_dev_run and many more.",
        ),
        ("--trainer.help", TRAINER_HELP),
        (
            "--trainer.callbacks+=CLASS",
            f"Add a callback: {', '.join(public_names('callback'))}, or one of Lightning's, "
            "such as ModelCheckpoint. Its arguments follow as --trainer.callbacks.NAME VALUE.",
        ),
        ("--trainer.callbacks.help CLASS", "Show all arguments of a callback and exit."),
    ]
