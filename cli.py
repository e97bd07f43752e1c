"""What all scripts share of the command line. Nothing heavy is imported, so they answer at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

LIMITS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


class Fault(Exception):
    """Ends a script with one line and exit code 2: what is wrong, what was given, what to do."""


class Stopped(Exception):
    """A signal asked the script to end. The message says what is kept and how to go on."""


def option(default: Any, text: str, *aliases: str, **about: Any) -> Any:
    """A field of a dataclass of arguments: its default, and its help text, which is a sentence.

    about: limits of a number (at_least, above, at_most, below); choices; and shown, which the help
    has in place of a default that is put in later.
    """
    limits = " and ".join(f"{n.replace('_', ' ')} {about[n]}" for n in LIMITS if n in about)
    about |= {"help": text, "aliases": aliases, "limits": limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def check(args: Any) -> None:
    """Raises Fault at the first number of a dataclass of options that is outside its limits."""
    for field in dataclasses.fields(args):
        value, about = getattr(args, field.name), field.metadata
        if isinstance(value, list) and field.default_factory is dataclasses.MISSING:
            raise Fault(f"argument --{field.name}: needs one value")  # "--x=--" comes as a list
        if isinstance(value, int | float):
            fits = all(LIMITS[name](value, about[name]) for name in LIMITS if name in about)
            needed = "a finite number" if fits else about["limits"]
            if not fits or not math.isfinite(value):
                raise Fault(f"argument --{field.name}: must be {needed}, got {value}")


def parse(arguments: type, argv: list[str]) -> Any:
    """A command line as a dataclass of options. Raises Fault at the first thing that is wrong.

    --t-min and --t_min are one flag. A bool has two, --x and --no_x. A list takes several values.
    """

    def error(message: str) -> NoReturn:
        raise Fault(message)

    parser = argparse.ArgumentParser(description=arguments.__doc__, allow_abbrev=False)
    parser.error = error
    for field in dataclasses.fields(arguments):
        about, hint = field.metadata, get_type_hints(arguments)[field.name]
        kind = next(iter(get_args(hint)), hint)  # str of str, of str | None, of list[str]
        many = get_origin(hint) is list
        default = field.default_factory() if many else field.default
        shown = about.get("shown", " ".join(default) if many else default)
        notes = [about["limits"], "" if shown in (None, "") else f"default: {shown}"]
        extra: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            metavar = None if "choices" in about else kind.__name__.upper()
            extra = {"type": kind, "choices": about.get("choices"), "metavar": metavar}
            extra["nargs"] = "+" if many else None
        text = f"{about['help']} ({'; '.join(filter(None, notes))})".removesuffix(" ()")
        names = (f"--{field.name}", *about["aliases"])
        parser.add_argument(*names, default=default, help=text.replace("%", "%%"), **extra)
    names = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), w) for w in argv]
    args = arguments(**vars(parser.parse_args([re.sub("^--no_", "--no-", w) for w in names])))
    check(args)
    return args


def pairs(words: list[str], flag: str = "reward_model") -> dict[str, str]:
    """Words "name=path" as a dictionary. Raises Fault if one has no "="."""
    for word in words:
        if "=" not in word:
            raise Fault(f"argument --{flag}: must be name=path, got {word}")
    return dict(word.split("=", 1) for word in words)


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, or its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def read_json(path: Path) -> dict[str, Any]:
    """What an object in a file holds; nothing if there is no file. Raises Fault."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(f"cannot read {path} ({first_line(error)}); mend or delete it") from None
    if not isinstance(found, dict):
        raise Fault(f"cannot read {path} (it holds no JSON object); mend or delete it")
    return found


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
        with contextlib.suppress(OSError):
            new.unlink()


def signal_check() -> Callable[[], None]:
    """Remembers SIGINT and SIGTERM. Returns what raises Stopped once one has come."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *about: received.append(about))

    def check() -> None:
        if received:
            raise Stopped

    return check


def run(script: str, main: Callable[[], None]) -> None:
    """Calls main. A Fault is one line and exit code 2; Stopped and Ctrl-C are one line and 130."""
    for stream in (sys.stdout, sys.stderr):  # whatever the terminal says that it can show
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (Fault, Stopped, KeyboardInterrupt) as end:
        sys.stderr.write(f"{script}: {first_line(end) if str(end) else 'stopped'}\n")
        sys.exit(2 if isinstance(end, Fault) else 130)
