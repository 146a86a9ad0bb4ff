"""LightningCLI in subclass mode, with links from data to model, checkpoints that describe themselves, and outputs."""

import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import lightning_plugins
from lightning_plugins.callbacks import ExactResume, NonFiniteGuard, SaveOnSigterm
from lightning_plugins.cli import checkpoint
from lightning_plugins.cli.commands import command_parsers
from lightning_plugins.cli.completion import print_completion
from lightning_plugins.cli.explain import import_object
from lightning_plugins.cli.last_checkpoint import SaveLast, keep_last, model_checkpoints
from lightning_plugins.cli.last_run import find_last
from lightning_plugins.cli.messages import RunStoppedError, UsageError, outside_cause, raised_here, said_by_process
from lightning_plugins.cli.monitors import MonitorCheck, explain_monitor
from lightning_plugins.cli.outputs import picture_lines, shorten
from lightning_plugins.cli.parser import ConfigFile, Help, Parser, TrainerHelp, reading
from lightning_plugins.cli.passed_over import refuse_nulls, refuse_seed
from lightning_plugins.cli.predictions import PredictionWriter
from lightning_plugins.cli.replaced import refuse_replaced
from lightning_plugins.cli.resolve import command_that_writes
from lightning_plugins.cli.run_record import RunRecord
from lightning_plugins.cli.short_help import CONFIG, TEST_AFTER_FIT, TRAINER_HELP, UNTRAINED
from lightning_plugins.core.checkpoint_io import keep_checkpoints_whole
from lightning_plugins.core.distributed import close_process_group_at_exit
from lightning_plugins.core.hyperparameters import LINKED
from lightning_plugins.core.lightning_internals import starts_processes
from lightning_plugins.core.logging import log_dir
from lightning_plugins.core.named_parts import nothing_imported_for
from lightning_plugins.data import ImageData, TextData

_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


def run(argv: Sequence[str]) -> None:
    """Parse ``argv`` and run its sub-command, with every public name of the package at hand."""
    with warnings.catch_warnings():  # the filter ends with the command: main() may be called from Python
        # torch 2.13 about its own pytree as Lightning 2.6 calls it: nothing that a user could mend
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        for name in lightning_plugins._PUBLIC:
            getattr(lightning_plugins, name)  # loads the class, so that its short name is known
        close_process_group_at_exit()
        PluginsCLI(list(argv))


class PluginsCLI(LightningCLI):
    """The command line of this package; it parses and runs on construction.

    Args:
        argv: the words after the program's name.

    Raises:
        UsageError: the words contradict each other, the data or the checkpoint.
        SystemExit: the words could not be parsed (status 2), or the run was interrupted (130, 143).
    """

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            args=argv,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lightning-plugins",
                "version": lightning_plugins.__version__,
                "allow_abbrev": False,
                "dump_header": [f"lightning_plugins=={lightning_plugins.__version__} lightning=={lightning_version}"],
            },
            trainer_defaults={"callbacks": [ExactResume()]},
            save_config_kwargs={"overwrite": True},  # without a logger all runs share one folder
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    # Parsing

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser without ``--config``: that belongs to the sub-commands."""
        return self.parser_class(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, command in command_parsers().items():  # run by main; here for completion and suggestions
            parser._subcommands_action.add_subcommand(name, command, help=command.description)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs, add_help=False)  # it has its own

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the help, ``--config``, the seed and ``--test_after_fit``."""
        parser.add_argument("-h", "--help", action=Help, help="Show a page, with `all` every option, and exit.")
        parser.add_argument("--trainer.help", action=TrainerHelp, help=TRAINER_HELP)
        parser.add_argument("-c", "--config", action=ConfigFile, help=CONFIG)
        super().add_default_arguments_to_parser(parser)
        parser.add_argument("--test_after_fit", type=bool, default=False, help=TEST_AFTER_FIT)
        parser.add_argument("--untrained", type=bool, default=False, help=UNTRAINED)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; the model may also come from a checkpoint, so it is not required here."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        for key, base in (("model", LightningModule), ("data", LightningDataModule)):
            parser.add_lightning_class_args(base, key, subclass_mode=True, required=False)
            parser.groups[key].title = key.capitalize()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the data knows to the model's arguments of the same name."""
        for name in LINKED:

            def same_unless_given(value: Any, name: str = name) -> Any:
                return self._check_link(name, value)

            parser.link_arguments(
                f"data.{name}", f"model.init_args.{name}", compute_fn=same_unless_given, apply_on="instantiate"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse twice: without defaults, to know what the user said, and with them.

        What a class requires may also stand in the checkpoint: then it is looked for when that has been read.
        """
        if args[0].startswith("--print_completion"):
            print_completion(parser, args)
        given = parser.parse_args(args, defaults=False, _skip_validation=True)
        self.explicit, self.words = given[given.subcommand], args
        self.config = parser.parse_args(args, _skip_validation=bool(self.explicit.get("ckpt_path")))
        refuse_seed(self.config[self.config.subcommand].seed_everything)

    def _parse_ckpt_path(self) -> None:
        self.checkpoint_arguments: dict[str, Any] = {}
        trainer = self.config[self.config.subcommand].trainer
        if not isinstance(trainer, Namespace):
            given = "nothing" if trainer is None else repr(trainer)
            raise UsageError(f"trainer: has its settings below it, such as max_epochs: 3, not {given}.")
        self._take_model_from_checkpoint()
        self._validate()
        refuse_replaced(self.explicit.get("model"), self.words)
        refuse_nulls(self.config[self.config.subcommand], LINKED)
        self._require_model_and_data()
        self._require_teacher()

    def _validate(self) -> None:
        """Refuse words that :meth:`parse_arguments` has passed over, for a checkpoint's sake."""
        command = self.config.subcommand
        parsers: Any = self.parser._subcommands_action
        parser = parsers.choices[command]
        if self.config[command].ckpt_path:
            try:
                parser.validate(self.config[command])
            except (TypeError, KeyError) as error:
                parser.error(str(error))

    def _take_model_from_checkpoint(self) -> None:
        """Take the model's class and arguments from the checkpoint, and refuse what contradicts it."""
        command = self.config.subcommand
        config = self.config[command]
        if config.ckpt_path == "last":
            root = Path(config.trainer.default_root_dir or ".")
            config.ckpt_path = str(find_last(root, config.trainer))
        if config.ckpt_path == "":
            raise UsageError("--ckpt_path is empty: give a checkpoint file, or `last` for the newest run's.")
        if config.weights_only is None:  # of an address Lightning would read anything
            config.weights_only = True
        ckpt = str(config.ckpt_path or "")
        if ckpt in ("", "best", "hpc") or ckpt.startswith("registry") or "://" in ckpt:
            return
        path = Path(ckpt)
        hparams = checkpoint.read_hyperparameters(path, resumes=command == "fit")
        given = config.get("model")
        if not hparams and given is None:
            raise UsageError(f"{ckpt!r} holds no hyperparameters: add --model with the arguments it was made with.")
        if not hparams:
            return
        model = checkpoint.model_config(path, hparams, given)
        with reading(ckpt), nothing_imported_for(hparams):
            self.config = self.parser.parse_object({command: {"model": model}}, self.config)
        checkpoint.refuse_overrides(path, self.explicit.get("model"), given, self.config[command].model)
        self.checkpoint_arguments = hparams

    def _check_link(self, name: str, value: Any) -> Any:
        """The value that an argument of the model gets of the data's.

        Raises:
            UsageError: the user, or the checkpoint, says another.
        """
        given = (self.explicit.get("model") or Namespace()).get(f"init_args.{name}")
        who = "was given"
        if given is None:
            given = self.checkpoint_arguments.get(name)
            who = "is the checkpoint's"
        data = self.config[self.subcommand].data.class_path.rpartition(".")[2]
        if self._predicts_others(name) and given is not None:
            return given
        if given is not None and checkpoint.plain(given) != checkpoint.plain(value):
            hint = "Leave it out: the data decides." if who == "was given" else "Give the data it was trained on."
            raise UsageError(f"model.{name} {checkpoint.plain(given)!r} {who}, but {data}'s is {value!r}.", hint)
        return value

    def _predicts_others(self, name: str) -> bool:
        """Whether the data may have other classes than the model, or none: it predicts, and is told of none."""
        conditional = self.checkpoint_arguments.get("conditional")
        return name == "num_classes" and self.subcommand == "predict" and not conditional

    def _require_model_and_data(self) -> None:
        command = self.config.subcommand
        config = self.config[command]
        if config.get("model") is None:
            ways = "--config NAME, --model CLASS" + ("" if command == "fit" else " or --ckpt_path FILE")
            raise UsageError(f"{command} needs a model: {ways}.", "Names: lightning-plugins list")
        loader = f"{_LOADERS[command]}_dataloader"
        model = import_object(config.model.class_path)
        if config.get("data") is None and getattr(model, loader) is getattr(LightningModule, loader):
            sentence = f"{command} needs data: --data CLASS ({model.__name__} has no {loader} of its own)."
            raise UsageError(sentence, "Names: lightning-plugins list")

    def _require_teacher(self) -> None:
        """Say which command makes a shipped config's teacher, before it is looked for on the Hub."""
        if self.config.subcommand != "fit":
            return
        teacher = self.config.fit.model.get("init_args.teacher")
        if isinstance(teacher, str) and not Path(teacher).exists() and (command := command_that_writes(teacher)):
            sentence = f"the teacher {teacher!r} is no folder in {str(Path().absolute())!r}. This command makes it:"
            raise UsageError(sentence, command)

    # Construction

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; a bad argument is a sentence, any other error keeps its traceback."""
        try:
            super().instantiate_classes()
        except Exception as wrapped:
            error = _unwrap(wrapped)
            if isinstance(error, (ValueError, OSError, MisconfigurationException)):
                raise UsageError(*_sentence(error)) from error
            raise error from error.__cause__  # without the parser's wrapping

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer: with what the config does not have itself, and with checkpoints that survive."""
        given = self.config_init[self.subcommand].trainer.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        callbacks = [*self.trainer_defaults["callbacks"], SaveLast(), MonitorCheck(), self._run_record()]
        for ours in (SaveOnSigterm, NonFiniteGuard):  # the guard is the first
            if not any(isinstance(callback, ours) for callback in given):
                callbacks.insert(0, ours())
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        trainer = super().instantiate_trainer(**kwargs)
        keep_checkpoints_whole(trainer)  # unless the user named how they are written
        if self.subcommand == "fit":
            keep_last(trainer)
        return trainer

    def _run_record(self) -> RunRecord:
        command = self.config.subcommand
        config = self.config[command]
        data = config.data.class_path if config.get("data") else None
        root = Path(config.trainer.default_root_dir or ".")
        return RunRecord(command, config.model.class_path, data, config.ckpt_path or None, root)

    # Running

    def _refuse_untrained(self, subcommand: str) -> None:
        config, pretrained = self.config[subcommand], getattr(self.model, "pretrained", False)
        if subcommand == "fit" or config.ckpt_path or config.untrained or pretrained:
            return
        name = type(self.model).__name__
        raise UsageError(
            f"{subcommand} without --ckpt_path: this {name} is untrained, and its figures would be of no use.",
            f"The newest run's: --ckpt_path last. The {name} as it is made: --untrained true",
        )

    def _run_subcommand(self, subcommand: str) -> None:
        self._refuse_untrained(subcommand)
        started = time.time()
        try:
            with warnings.catch_warnings():
                if subcommand != "fit":  # these two tell of callbacks of the training, which is over
                    warnings.filterwarnings("ignore", "The dirpath has changed")
                    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
                super()._run_subcommand(subcommand)
        except IsADirectoryError as error:
            hint = f"Make a file of it: lightning-plugins consolidate {error.filename} FILE"
            sentence = f"--ckpt_path {error.filename!r} is a folder, which the CheckpointIO of this run does not read."
            raise UsageError(sentence, hint) from error
        except (ValueError, OSError, MisconfigurationException) as error:
            self._explain_stop(error)
            self._explain_monitor(error)
            missing = str(error).startswith("Checkpoint file not found")  # Lightning's, of an address
            if not (missing or raised_here(error) or isinstance(error, MisconfigurationException)):
                raise  # no sentence of ours or of Lightning's: the traceback is needed
            raise UsageError(str(error)) from error
        except FloatingPointError as error:
            if not raised_here(error):
                raise
            sys.stderr.write(f"error: {error}\n")
            sys.exit(1)  # no mistake of the command
        except RuntimeError as error:
            self._explain_stop(error)
            self._explain_monitor(error)
            if "in loading state_dict" not in str(error):
                raise
            path = self.config[subcommand].ckpt_path
            raise checkpoint.explain_mismatch(error, path, type(self.model).__name__) from error
        except ProcessRaisedException as error:
            if said := said_by_process(str(error)):
                raise said from error
            raise
        except ProcessExitedException as error:
            if error.exit_code <= 128:
                raise
            self._stop(error.exit_code)
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException):
                self._stop(int(stop.code or 128 + signal.SIGTERM))
            if isinstance(stop.__context__, KeyboardInterrupt):
                self._stop(128 + 2)
            raise
        if self.trainer.is_global_zero and (pictures := picture_lines(log_dir(self.trainer) / "images", started)):
            print("Pictures:", *pictures, sep="\n  ")

    def _stop(self, status: int) -> None:
        """Leave an interrupted run, with the checkpoint to go on from."""
        sys.stderr.write(f"\nInterrupted. {self._how_to_go_on()}".rstrip() + "\n")
        sys.exit(status)

    def _explain_stop(self, error: Exception) -> None:
        """One sentence for what stopped the run from outside; other errors are left to the caller."""
        if sentence := outside_cause(error):
            raise RunStoppedError(sentence, self._how_to_go_on()) from error

    def _explain_monitor(self, error: Exception) -> None:
        """A monitor that nobody logs, with the nearest names; other errors are left to the caller."""
        if sentence := explain_monitor(error, self.trainer):
            raise UsageError(sentence, self._how_to_go_on("the right monitor")) from error

    def _how_to_go_on(self, by: str = "the same command") -> str:
        if starts_processes(self.trainer):  # which knew what they have written
            return f"Go on with {by} and --ckpt_path last"
        written = [c.last_model_path or c.best_model_path for c in model_checkpoints(self.trainer)]
        found = [path for path in written if path and Path(path).exists()]
        return f"Go on with {by} and --ckpt_path {shorten(found[0])}" if found else ""

    def before_fit(self) -> None:
        """Look for the test data before hours of training, if they are wanted after it; pass signals on."""
        if starts_processes(self.trainer):
            self._pass_signals_on()
        if self.config.fit.test_after_fit and isinstance(self.datamodule, (ImageData, TextData)):
            self.datamodule.require("test")

    def _pass_signals_on(self) -> None:
        """A signal for this process is one for those that it starts, which save and stop."""
        launcher: Any = self.trainer.strategy.launcher

        def pass_on(number: int, frame: Any) -> None:
            launcher.kill(number)

        for callback in cast(Any, self.trainer).callbacks:
            for name in callback.signals if isinstance(callback, SaveOnSigterm) else ():
                signal.signal(signal.Signals[name], pass_on)

    def after_fit(self) -> None:
        """Test the trained model if the user asked for it."""
        if not self.config.fit.test_after_fit:
            return
        best = [c.best_model_path for c in model_checkpoints(self.trainer) if c.monitor and c.best_model_path]
        path = best[0] if best else None  # after a resume it may be a checkpoint's word
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def predict(self, **kwargs: Any) -> None:
        """Run ``Trainer.predict`` and write what it gives into the run's folder."""
        if kwargs.pop("return_predictions", None) is not False:
            cast(Any, self.trainer).callbacks.append(PredictionWriter())  # Lightning sets it without declaring it
        with warnings.catch_warnings():  # this package's loaders know the rows of a batch, which Lightning asks torch's
            warnings.filterwarnings("ignore", r"Couldn't infer the batch indices .*`KeyLoader`")
            self.trainer.predict(**kwargs, return_predictions=False)


def _unwrap(error: Exception) -> Exception:
    """The error of the class's own code, out of the parser's wrapping."""
    while isinstance(error.__cause__, Exception) and (
        isinstance(error.__cause__, UsageError) or str(error).startswith("Does not validate against any of the Union")
    ):
        error = error.__cause__
    return error


def _sentence(error: Exception) -> list[str]:
    """The error's text, with the place in the user's own code if it comes from there."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    foreign = "site-packages" in last.filename
    where = "" if raised_here(error) or foreign else f"Raised in {shorten(last.filename)}, line {last.lineno}"
    return [str(error), where]
