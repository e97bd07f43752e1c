"""What all scripts share of the command line. Nothing heavy is imported, so they answer at once."""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import os
import re
import sys
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LIMITS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


class Fault(Exception):
    """Ends a script with one line and exit code 2: what is wrong, what was given, what to do."""


class Stopped(Exception):
    """A signal asked the script to end. The message says what is kept and how to go on."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, or its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def option(default: Any, text: str, *aliases: str, **about: Any) -> Any:
    """A field of a dataclass of arguments: its default, and its help text, which is a sentence.

    about: limits of a number (at_least, above, at_most, below); choices; and shown, which stands in
    the help in place of the default, where None means that another value is put in later.
    """
    about = {"help": text, "aliases": aliases, **about}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def wanted(about: typing.Mapping[str, Any]) -> str:
    return " and ".join(
        f"{name.replace('_', ' ')} {about[name]}" for name in LIMITS if name in about
    )


def check(args: Any) -> None:
    """Raises Fault at the first number of a dataclass of options that is outside its limits."""
    for field in dataclasses.fields(args):
        value, about, must = getattr(args, field.name), field.metadata, None
        if isinstance(value, float) and not math.isfinite(value):
            must = "be a finite number"
        elif isinstance(value, int | float):
            fits = all(LIMITS[name](value, about[name]) for name in LIMITS if name in about)
            must = None if fits else f"be {wanted(about)}"
        if must:
            raise Fault(f"argument --{field.name}: must {must}, got {value}")


def parse(arguments: type, argv: list[str]) -> Any:
    """A command line as a dataclass of options. Raises Fault at the first thing that is wrong.

    --t-min and --t_min are one flag. A bool has two, --x and --no_x. A list takes several values.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Fault(message)

    parser = Parser(description=arguments.__doc__, allow_abbrev=False)
    hints = typing.get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        about, hint = field.metadata, hints[field.name]
        many = typing.get_origin(hint) is list
        kind = next(iter(typing.get_args(hint)), hint)  # str of str, of str | None, of list[str]
        default = field.default_factory() if many else field.default
        shown = about.get("shown", " ".join(default) if many else default)
        notes = "; ".join(
            filter(None, [wanted(about), "" if shown in (None, "") else f"default: {shown}"])
        )
        extra: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            metavar = None if "choices" in about else kind.__name__.upper()
            extra = {"type": kind, "choices": about.get("choices"), "metavar": metavar}
            extra["nargs"] = "+" if many else None
        text = (about["help"] + (f" ({notes})" if notes else "")).replace("%", "%%")
        parser.add_argument(
            f"--{field.name}", *about["aliases"], default=default, help=text, **extra
        )

    def canonical(word: str) -> str:
        name, equals, value = word.partition("=")
        name = re.sub("^--no_", "--no-", "--" + name[2:].replace("-", "_"))
        return name + equals + value if word.startswith("--") else word

    args = arguments(**vars(parser.parse_args([canonical(word) for word in argv])))
    check(args)
    return args


def pairs(words: list[str], flag: str = "reward_model") -> dict[str, str]:
    """Words "name=path" as a dictionary. Raises Fault if one has no "="."""
    for word in words:
        if "=" not in word:
            raise Fault(f"argument --{flag}: must be name=path, got {word}")
    return dict(word.split("=", 1) for word in words)


def make_folder(name: str, flag: str = "output_dir") -> Path:
    """A folder that can be written to, made if need be. Raises Fault."""
    if not name:
        raise Fault(f"argument --{flag}: must name a folder, got an empty string")
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=name).close()
    except (OSError, ValueError) as error:
        raise Fault(f"argument --{flag}: cannot write to {name!r} ({first_line(error)})") from None
    return Path(name)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside and renames, so that there is never half a file. Raises Fault if it cannot."""
    new = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix, which says the format
    try:
        write(new)
        os.replace(new, path)
    except OSError as error:
        raise Fault(f"cannot write {path} ({first_line(error)}); what was there is kept") from None
    finally:
        new.unlink(missing_ok=True)


def run(script: str, main: Callable[[], None]) -> None:
    """Calls main. A Fault is one line and exit code 2; Stopped and Ctrl-C are one line and 130."""
    try:
        main()
    except (Fault, Stopped, KeyboardInterrupt) as end:
        sys.stderr.write(f"{script}: {first_line(end) if str(end) else 'stopped'}\n")
        sys.exit(2 if isinstance(end, Fault) else 130)
