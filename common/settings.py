"""A frozen dataclass becomes a command line and a JSON file.

Each field is declared once, with its default and the sentence `--help` shows. A JSON file may set any field by name, a
flag overrides the file, an unknown name in either is an error. Left out: nesting, environment variables, defaults that
depend on other fields.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from common.errors import InputError
from common.files import read_json

T = TypeVar("T")


def opt(default: Any, help: str, group: str = "") -> Any:
    """A dataclass field: its default, its line in --help, the heading it stands under ("" = same as the one before)."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


def from_json(cls: type[T], path: str) -> dict[str, Any]:
    """The fields of `cls` that a JSON file sets. Raises InputError at an unknown name or a value of the wrong type."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object of settings")
    kinds = {f.name: type(f.default) for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{path}: unknown setting {name!r}; the names are those of --help with _ for -")
        if kinds[name] is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kinds[name]:
            raise InputError(f"{path}: {name} must be {kinds[name].__name__}, not {value!r}")
    return values


def cli(
    cls: type[T],
    argv: Sequence[str] | None,
    description: str,
    extra: Any = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse `argv` into an instance of the dataclass `cls`; a bool field becomes --x / --no-x.

    `extra(parser)` may add arguments that are not fields; they come back in the namespace. `--config FILE` is always
    there. presets: name -> fields, chosen by the field `preset`; the file and the flags go before them. Exits with code
    2 on a usage error, raises InputError on a bad file or an unknown preset.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="", metavar="FILE", help="JSON file of settings; flags override it")
    if extra:
        extra(parser)
    target = parser
    for f in dataclasses.fields(cls):
        if f.metadata["group"]:
            target = parser.add_argument_group(f.metadata["group"])
        kind = type(f.default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "metavar": kind.__name__}
        shown = "none" if f.default == "" else f.default
        text = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
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
    return cls(**values), rest
