"""A frozen dataclass becomes a command line and a JSON file.

Each field is declared once, with its default, the sentence `--help` shows, and what it may be: choices or bounds. A
JSON file may set any field by name, a flag overrides the file, an unknown name in either is an error. Left out:
nesting, environment variables, defaults and bounds that depend on other fields.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from common.errors import InputError, UsageError
from common.files import find, read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
LARGEST = {int: 2**63 - 1, float: 3e38}  # what torch can hold: int64, float32


def opt(
    default: Any,
    help: str,
    group: str = "",
    *,
    choices: Iterable[str | int] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field: its default, its line in --help, the heading it stands under ("" = same as the one before).

    choices: the values it may have. low, high: the smallest and the largest number it may be. above: a number that it
    must be larger than. `check` refuses all others. The default itself may lie outside, as a 0 that means "none".
    """
    allowed = {"choices": None if choices is None else tuple(choices), "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **allowed})


def refusal(field: Any, value: Any) -> str:
    """What `value` must be to be one of a field made by `opt`, "" when it is. `field`: of dataclasses.fields."""
    kind, allowed = type(field.default), field.metadata
    if kind is float and type(value) is int and abs(value) <= LARGEST[float]:
        value = float(value)
    if type(value) is not kind:
        return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
    if value == field.default:
        return ""
    if kind is str and "\0" in value:  # no name of a file
        return "a text without NUL characters"
    if kind in LARGEST and math.isfinite(value) and abs(value) > LARGEST[kind]:
        return f"a number within {LARGEST[kind]:g}"
    if allowed["choices"] is not None:
        return "" if value in allowed["choices"] else f"one of {', '.join(map(str, allowed['choices']))}"
    low, high, above = allowed["low"], allowed["high"], allowed["above"]
    within = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if within and not (kind is float and not math.isfinite(value)):
        return ""
    bounds = [("from", low), ("above", above), ("up to", high)]
    limits = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
    return " ".join(["a finite number" if kind is float else "a whole number", *limits])


def check(settings: Any, where: Mapping[str, str] | None = None) -> None:
    """Raise InputError at the first field of a dataclass that is not what its `opt` says.

    where: name -> what the message calls the field; else --name. As `__post_init__ = check` it guards a class however
    its objects are made.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if needed := refusal(field, value):
            flag = "--" + field.name.replace("_", "-")
            raise InputError(f"{(where or {}).get(field.name, flag)} is {value!r}, must be {needed}")


def from_json(cls: type[T], path: str) -> dict[str, Any]:
    """The fields of `cls` that a JSON file sets. Raises InputError at an unknown name or a value that it may not have.

    A relative path is looked up beside the project too, see `files.find`.
    """
    values = read_json(find(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object of settings")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{path}: unknown setting {name!r}; the names are those of --help with _ for -")
        if needed := refusal(fields[name], value):
            raise InputError(f"{path}: {name} is {value!r}, must be {needed}")
        kind: Any = type(fields[name].default)
        values[name] = kind(value)
    return values


class Parser(argparse.ArgumentParser):
    """Raises UsageError in one line, where argparse prints the names of all flags first."""

    def error(self, message: str) -> NoReturn:
        """What argparse calls at a command line that it cannot read."""
        raise UsageError(f"{message}; --help lists every flag")


def cli(
    cls: type[T],
    argv: Sequence[str] | None,
    description: str,
    extra: Any = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse `argv` into an instance of the dataclass `cls`; a bool field becomes --x / --no-x.

    `extra(parser)` may add arguments that are not fields; they come back in the namespace. `--config FILE` is always
    there. presets: name -> fields, chosen by the field `preset`; the file and the flags go before them. Raises
    UsageError at words that cannot be read, InputError at a bad file, a value that may not be, an unknown preset.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", default="", metavar="FILE", help="JSON file of settings; flags override it")
    if extra:
        extra(parser)
    target: Any = parser  # or the group of its flags
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            target = parser.add_argument_group(f.metadata["group"])
        kind, choices = type(f.default), f.metadata["choices"]
        shown = kind.__name__ if choices is None else "{" + ",".join(map(str, choices)) + "}"
        how: dict[str, Any] = {"type": kind, "metavar": shown}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        default = "none" if f.default == "" else f.default
        text = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        target.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **how)
    given = vars(parser.parse_args(argv))
    values = from_json(cls, given["config"]) if given["config"] else {}
    names = [f.name for f in dataclasses.fields(cls)]
    values |= {name: given[name] for name in names if given[name] is not None}
    if presets is not None:
        chosen = values.get("preset", next(f.default for f in dataclasses.fields(cls) if f.name == "preset"))
        if chosen not in presets:
            raise InputError(f"--preset {chosen!r} is not one of {', '.join(presets)}")
        values = {**presets[chosen], **values}
    rest = argparse.Namespace(**{k: v for k, v in given.items() if k not in names})
    settings = cls(**values)
    check(settings)
    return settings, rest
