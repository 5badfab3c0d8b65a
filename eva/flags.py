"""Flags of the command line that are settings: what they are called, and what a list of words gives."""

import argparse
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from eva.config import EXIT_USER_ERROR, FIELDS, TYPES, UserError, collected, default_of, describe_type
from eva.files import read_json

# Stands for the value of a flag that has none, until all mistakes are told together.
MISSING: Any = object()


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage, which has a line for each of the settings."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """Returns the flags that are known, and the other words, as argparse does."""
        known, others = super().parse_known_args(*arguments, **named)
        for name, value in vars(known).items():
            if value == []:  # what older Pythons make of --flag=--
                self.error(f"argument --{name}: expected one argument")
        return known, others


def add_settings(parser: argparse.ArgumentParser, known: Container[str], order: str) -> None:
    """Adds a flag for each setting. Values stay text: `config.resolve` gives them their types.

    Args:
        parser: Which gets them.
        known: Settings that its help shows; others are taken too, so that they can be told as out of place.
        order: Which source of settings wins, for the help.
    """
    settings = parser.add_argument_group("settings", order)
    for name, field in FIELDS.items():
        settings.add_argument(
            f"--{name}",
            nargs="?",
            const="true" if bool in (TYPES[name], *get_args(TYPES[name])) else MISSING,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=_help(name, field) if name in known else argparse.SUPPRESS,
        )


def _help(name: str, field: Any) -> str:
    default = default_of(field)
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    shown = "none" if default is None else list(default) if isinstance(default, tuple) else default
    return f"{field.metadata['help']}{unit}; {describe_type(name)} (default: {shown})".replace("%", "%%")


def given_settings(arguments: argparse.Namespace, unknown: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Returns the settings that the command line gives: as text, or with types where they came as JSON.

    A W&B agent passes all of them as one JSON object, or as the path of a file of one, if the sweep's command says
    ${args_json} or ${args_json_file}. Flags win over these.

    Args:
        arguments: What a parser with the flags of `add_settings` made of the known ones.
        unknown: The others.
        problems: Gets a line for each flag without its value, and for each JSON text or file that can't be read.
    """
    missing = [name for name in FIELDS if getattr(arguments, name, None) is MISSING]
    problems += [f"command line: {name} must be {describe_type(name)}, but got no value" for name in missing]
    objects = [word for word in unknown if word.startswith("{") or (word.endswith(".json") and "=" not in word)]
    settings: dict[str, Any] = {}
    for word in objects:
        with collected(problems):
            settings |= json_settings(word)
    flags = {name: value for name in FIELDS if (value := getattr(arguments, name, MISSING)) is not MISSING}
    return {**settings, **flags, **loose_settings([word for word in unknown if word not in objects])}


def loose_settings(arguments: Sequence[str]) -> dict[str, str]:
    """Returns as settings what the parser doesn't know: `--policy_options.cutout=8`, `lr_max=0.4`, and mistakes.

    `resolve` tells the known from the unknown ones.
    """
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        settings[key.lstrip("-")] = value
    return settings


def json_settings(argument: str) -> dict[str, Any]:
    """Returns the settings of a JSON object, or of a file that holds one.

    Raises:
        UserError: There is no such object.
    """
    if argument.startswith("{"):
        try:
            settings = json.loads(argument)
        except (ValueError, RecursionError) as error:
            raise UserError(f"command line: {argument[:60]!r} is not JSON: {error}") from None
    else:
        settings = read_json(Path(argument))
    if not isinstance(settings, dict):
        raise UserError(f"command line: {argument!r} must hold a JSON object of settings")
    return settings
