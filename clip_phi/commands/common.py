"""What several commands share: the parser, the options for model and data, and types of numbers."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..data.files import is_missing_folder
from ..data.report import plain

DEMO_MODEL = "outputs/demo/model"
MODELS = ("outputs/stage2", "outputs/stage1", DEMO_MODEL)  # where training and 'make demo' write by default
MAX_LAYERS = 1000
DATA = "[KIND:]PATH[,option=value...], as --data in train_accelerate.py"


class HelpFormatter(argparse.HelpFormatter):
    """Appends its default to the help of an option, unless the help describes the default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        is_clear = "(default" in text or default in (None, [], "", argparse.SUPPRESS) or isinstance(default, bool)
        return text if is_clear else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line and names the nearest known option or command.

    Arguments and options may come in any order: argparse alone misplaces optional arguments (bpo-15112)."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **(options | {"allow_abbrev": False, "formatter_class": HelpFormatter}))
        self.commands: Any = None
        self._is_parsing = False

    def add_commands(self, metavar: str) -> Any:
        self.commands = self.add_subparsers(dest=metavar.lower(), required=True, metavar=metavar)
        return self.commands

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_parsing:  # called by parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        args = list(sys.argv[1:] if args is None else args)
        self._check_names(args)
        if self.commands is not None:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False

    def _check_names(self, args: Sequence[str]) -> None:
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                return
            if name.startswith("--") and " " not in name:
                self._check_name("option", name, self._option_string_actions)
            elif self.commands is not None:
                return self._check_name("command", word, self.commands.choices)

    def _check_name(self, what: str, name: str, known: Any) -> None:
        if name not in known:
            nearest = [f"; the nearest known one is {each}" for each in difflib.get_close_matches(name, known, 1)]
            self.error(f"unknown {what} {name}{''.join(nearest)} (see {self.prog} --help)")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], Any], help: str) -> Parser:
    """A parser for one command, which `run` carries out."""
    command: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="the traceback of an error instead of one line")
    return command


def add_options(command: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """The options of options.json under these names, each with the keywords of add_argument.

    defaults: of options that several commands have with a default of each."""
    for name in names:
        for option, settings in OPTIONS[name].items():
            settings = settings | ({"type": TYPES[settings["type"]]} if "type" in settings else {})
            command.add_argument(option, **settings)
    command.set_defaults(**defaults)


def add_model(command: argparse.ArgumentParser, *, argument: bool = False) -> None:
    """--model; argument: the model may also be given as the command's (first) argument."""
    command.set_defaults(model_argument=None)
    if argument:
        command.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    help = f"folder or Hub id of a trained model (default: the newest of {', '.join(MODELS)})"
    command.add_argument("--model", metavar="PATH_OR_ID", help=help)


def add_engine(command: argparse.ArgumentParser, *, argument: bool = False) -> None:
    """The options of load_engine, except for --compile."""
    add_model(command, argument=argument)
    add_options(command, "engine")


def load_engine(arguments: argparse.Namespace, limits: Any = None) -> Any:
    model = choose_model(arguments)
    from ..serving.engine import Engine, Limits

    compiles = getattr(arguments, "compile", False)
    return Engine.from_pretrained(model, arguments.device, arguments.quantization, compiles, limits or Limits())


def add_json(command: argparse.ArgumentParser, what: str = "one json object instead of the text") -> None:
    command.add_argument("--json", action="store_true", help=f"{what}, on standard output")


def add_data(command: argparse.ArgumentParser, help: str, name: str = "--data") -> None:
    command.add_argument(name, nargs="+", action="extend", default=[], metavar="DATA", help=help)


def newest_model() -> str | None:
    """The folder of MODELS whose config.json was written last; None if there is no model in any."""
    configs = [config for folder in MODELS if (config := Path(folder, "config.json")).is_file()]
    return str(max(configs, key=lambda config: config.stat().st_mtime).parent) if configs else None


def choose_model(arguments: argparse.Namespace) -> str:
    """The model given by --model or as an argument, or else the newest, which is then named on stderr.

    Stored in arguments.model. Raises ValueError if it is given twice, its folder does not exist, or there is none."""
    if arguments.model is not None and arguments.model_argument is not None:
        raise ValueError(f"two models: {arguments.model_argument} and --model {arguments.model}. Give one of them")
    model: str | None = arguments.model or arguments.model_argument
    if model is None:
        if (model := newest_model()) is None:
            raise ValueError(f"no model in {', '.join(MODELS)}: run 'make demo' first, or give --model PATH_OR_ID")
        print(f"clip-phi: model: {model} (--model chooses another)", file=sys.stderr)
    check_model(model)
    arguments.model, arguments.model_argument = model, None
    _check_config(Path(model, "config.json"))
    return model


def _check_config(path: Path) -> None:
    """Raises ValueError for a config that is no json object or has too many layers, before anything is made of it."""
    from ..data.files import read_json

    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a json object")
    for name, part in config.items():
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if layers is not None and not (isinstance(layers, int) and 0 <= layers <= MAX_LAYERS):
            raise ValueError(f"{path}: {name} has num_hidden_layers {layers}: at most {MAX_LAYERS}")


def check_model(model: str) -> None:
    if is_missing_folder(model):
        raise ValueError(f"no model {model}: there is no such folder, and a Hub id is user/name")


def print_error(error: BaseException) -> None:
    """One line on stderr, in which nothing controls the terminal."""
    print(plain(f"clip-phi: error: {' '.join(str(error).split())}"), file=sys.stderr)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, not {value}")
    return value


def positive_number(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


OPTIONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("options.json").read_text(encoding="utf-8"))
TYPES: dict[str, Any] = {"int": int, "float": float, "path": Path}
TYPES |= {"positive": positive, "natural": natural, "positive_number": positive_number}
