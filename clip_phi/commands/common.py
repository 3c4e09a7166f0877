"""What several commands share: the parser and their table, the choice of a model, and types of numbers."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from ..data.catalog import DATASETS
from ..data.files import is_missing_folder, read_object
from ..data.report import plain
from ..data.transcripts import ENGINES, AsrSettings
from ..environment import BOUNDS, cpu_cores

DEMO_MODEL = "outputs/demo/model"
MODELS = ("outputs/stage2", "outputs/stage1", DEMO_MODEL)  # where training and 'make demo' write by default
MAX_LAYERS = 1000


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

    def add_commands(self, metavar: str, table: dict[str, Any]) -> None:
        """Add the commands of a table, as in commands.json. Each is carried out by a function run_NAME of its module.

        options: its groups of options.json. defaults: of options that several commands have with a default of each.
        actions: the commands below a command that does nothing itself."""
        self.commands = self.add_subparsers(dest=metavar.lower(), required=True, metavar=metavar)
        for name, about in table.items():
            help = about["help"]
            if "actions" in about:
                self.commands.add_parser(name, help=help).add_commands("ACTION", about["actions"])
                continue
            command = self.commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
            command.add_argument("--debug", action="store_true", help="the traceback of an error instead of one line")
            for option, settings in (pair for group in about["options"] for pair in OPTIONS[group].items()):
                command.add_argument(option, **{key: _filled(value) for key, value in settings.items()})
            command.set_defaults(run=f"{about['module']}.run_{name.replace('-', '_')}", **about.get("defaults", {}))

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


def _filled(value: Any) -> Any:
    """A value of options.json: "$NAME" is that of VALUES, or inside of a help text its text."""
    if not isinstance(value, str):
        return value
    return VALUES[value[1:]] if value.startswith("$") else Template(value).substitute(VALUES)


def load_engine(arguments: argparse.Namespace, limits: Any = None) -> Any:
    model = choose_model(arguments)
    from ..serving.engine import Engine, Limits

    compiles = getattr(arguments, "compile", False)
    engine = Engine.from_pretrained(model, arguments.device, arguments.quantization, compiles, limits or Limits())
    if getattr(arguments, "abstain_below", None) is not None and engine.scaling is None:
        about = "--abstain_below is the plain likelihood: clip-phi evaluate --calibrate makes it a confidence"
        print(f"clip-phi: note: {model} is not calibrated, so {about}", file=sys.stderr)
    return engine


def newest_model() -> str | None:
    """The folder of MODELS whose config.json was written last; None if there is no model in any."""
    configs = [config for folder in MODELS if (config := Path(folder, "config.json")).is_file()]
    return str(max(configs, key=lambda config: config.stat().st_mtime).parent) if configs else None


def choose_model(arguments: argparse.Namespace) -> str:
    """The model given by --model or as an argument, or else the newest, which is then named on stderr.

    Stored in arguments.model. Raises ValueError if it is given twice, its folder does not exist, or there is none; and
    for a config that is no json object or has too many layers, before anything is made of it."""
    argument: str | None = getattr(arguments, "model_argument", None)
    if arguments.model is not None and argument is not None:
        raise ValueError(f"two models: {argument} and --model {arguments.model}. Give one of them")
    model = arguments.model or argument
    if model is None:
        if (model := newest_model()) is None:
            raise ValueError(f"no model in {', '.join(MODELS)}: run 'make demo' first, or give --model PATH_OR_ID")
        print(f"clip-phi: model: {model} (--model chooses another)", file=sys.stderr)
    check_model(model)
    arguments.model, arguments.model_argument = model, None
    path = Path(model, "config.json")
    for name, part in (read_object(path) if path.is_file() else {}).items():
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if layers is not None and not (isinstance(layers, int) and 0 <= layers <= MAX_LAYERS):
            raise ValueError(f"{path}: {name} has num_hidden_layers {layers}: at most {MAX_LAYERS}")
    return model


def check_model(model: str) -> None:
    if is_missing_folder(model):
        raise ValueError(f"no model {model}: there is no such folder, and a Hub id is user/name")


def print_error(error: BaseException) -> None:
    """One line on stderr, in which nothing controls the terminal."""
    print(plain(f"clip-phi: error: {' '.join(str(error).split())}"), file=sys.stderr)


def bounded(kind: Callable[[str], float], bound: str) -> Callable[[str], float]:
    """The type of an option whose value is a number of this kind within one of BOUNDS."""

    def number(text: str) -> float:
        if not BOUNDS[bound](value := kind(text)):
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value

    return number


OPTIONS, COMMANDS = (
    json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("options.json", "commands.json")
)
# The values of "$NAME" in options.json.
VALUES: dict[str, Any] = {each.__name__: each for each in (int, float, Path)}
VALUES |= {"positive": bounded(int, "at least 1"), "natural": bounded(int, "at least 0")}
VALUES["fraction"] = bounded(float, "at least 0 and less than 1")
VALUES |= {"positive_number": bounded(float, "more than 0"), "probability": bounded(float, "more than 0 and at most 1")}
VALUES |= {"DATA": "[KIND:]PATH[,option=value...], as --data in train_accelerate.py", "CORES": cpu_cores()}
VALUES |= {"MODELS": ", ".join(MODELS), "DEMO_MODEL": DEMO_MODEL, "DATASETS": DATASETS, "ENGINES": ENGINES}
VALUES["DOWNLOADS"] = "; ".join(f"{name}: {dataset.about}" for name, dataset in DATASETS.items())
VALUES |= AsrSettings()._asdict() | {"SECONDS": f"{AsrSettings().max_seconds:g}"}
