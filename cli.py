"""What all scripts share of the command line. Nothing heavy is imported, so they answer at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

LIMITS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}
FIGURES = (".png", ".jpg", ".pdf", ".svg", ".webp")  # endings that matplotlib knows
LONGEST = 600  # characters of a line
REFUSED = (errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES)
REFUSED += (errno.EPERM, errno.EFBIG, errno.EAGAIN, errno.ENOMEM)  # no fault of a script's
leave = os._exit  # a reward of one's own may not call it


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
        if value == "" != field.default or isinstance(value, list) and "" in value:
            raise Fault(f"argument --{field.name}: must not be empty")
        if isinstance(value, int | float):
            needed = ""
            if not all(LIMITS[name](value, about[name]) for name in LIMITS if name in about):
                needed = about["limits"]
            elif isinstance(value, float) and not math.isfinite(value):
                needed = "a finite number"
            elif value and not 1e-30 <= abs(value) <= 1e30:  # float32 has not many more
                needed = "1e-30 to 1e30 in size"
            if needed:
                raise Fault(f"argument --{field.name}: must be {needed}, got {value}")


def parse(arguments: type, argv: list[str]) -> Any:
    """A command line as a dataclass of options. Raises Fault at the first thing that is wrong.

    --t-min and --t_min are one flag. A bool has two, --x and --no_x. A list takes several values
    after one flag: of a flag that is given twice, the last counts, as --help says.
    """

    def error(message: str) -> NoReturn:
        unknown = message.startswith("unrecognized")
        raise Fault(f"{message}; see --help" if unknown else message)

    parser = argparse.ArgumentParser(description=arguments.__doc__, allow_abbrev=False)
    parser.epilog = "Of a flag that is given twice, the last one counts, with all its values."
    parser.error = error
    hints = get_type_hints(arguments)
    for field in dataclasses.fields(arguments):
        about, hint = field.metadata, hints[field.name]
        kind = next(iter(get_args(hint)), hint)  # str of str, of str | None, of list[str]
        many = get_origin(hint) is list
        default = field.default_factory() if many else field.default
        seen = about.get("shown", " ".join(default) if many else default)
        notes = [about["limits"], "" if seen in (None, "") else f"default: {seen}"]
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
    """Words "name=path" as a dictionary. Raises Fault if one is no such pair, or comes twice."""
    found: dict[str, str] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path or name in found:
            again = ", once for each name" if name in found else ""
            raise Fault(f"argument --{flag}: must be name=path{again}, got {word}")
        found[name] = path
    return found


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, or its type if it says nothing."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except BaseException:  # its own __str__ fails, or leaves
        lines = []
    # "Error(s) in loading state_dict for CLIPModel:" says nothing yet.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return printable(line)


def printable(line: str) -> str:
    """Cut where it is very long, and with a mark for each sign that is none, as a line's end."""
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in line)


def read_json(path: Path) -> dict[str, Any]:
    """What an object in a file holds; nothing if there is no file. Raises Fault."""
    try:
        if not path.exists():
            return {}
        if not path.is_file():
            raise ValueError("it is no file")
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(f"cannot read {path} ({first_line(error)}); mend or delete it") from None


def make_folder(name: str, flag: str = "output_dir", file: str = "") -> Path:
    """A folder that can be written to, and a file in it; made if need be. Raises Fault."""
    if not name:
        raise Fault(f"argument --{flag}: must name a folder, got an empty string")
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=name, prefix=".", suffix=file).close()
    except (OSError, ValueError) as error:
        raise Fault(f"argument --{flag}: cannot write to {name!r} ({first_line(error)})") from None
    return Path(name)


def make_place(name: str, flag: str, endings: tuple[str, ...]) -> Path:
    """Where a file can be written, in a folder made if need be. Raises Fault."""
    path = Path(name)
    if not name:
        raise Fault(f"argument --{flag}: is needed: a file that ends in {' or '.join(endings)}")
    if path.suffix not in endings:
        raise Fault(f"argument --{flag}: must end in {' or '.join(endings)}, got {name!r}")
    make_folder(str(path.parent), flag, path.name)
    if os.path.exists(name) and not os.path.isfile(name):
        raise Fault(f"argument --{flag}: {name} is there, and is no file")
    return path


def check_own(path: Path, begins: str, flag: str) -> None:
    """Raises Fault if a file is there that does not begin so, and is somebody else's."""
    try:
        own = not path.exists() or path.read_text("utf-8").startswith(begins)
    except (OSError, ValueError):
        own = False
    if not own:
        raise Fault(f"argument --{flag}: {path} is another's; give a new folder")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside and renames, so that there is never half a file. Raises Fault if it cannot."""
    new = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix, which says the format
    try:
        write(new)
        os.replace(new, path)
    except OSError as error:
        found = f"cannot write {path} ({first_line(error)})"
        raise Fault(f"{found}; what was there is kept; make room, or mend that") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def check_ranks() -> None:
    """Raises Fault if what the environment says of several processes cannot be."""

    def fault(name: str, what: str, these: str = "it") -> Fault:
        advice = f"start by torchrun or accelerate launch, or unset {these}"
        return Fault(f"environment variable {name}: {what}; {advice}")

    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    for name, word in found.items():
        if not re.fullmatch("[0-9]{1,9}", word) or (name == "WORLD_SIZE" and int(word) == 0):
            raise fault(name, f"must be a number, got {word!r}")
    size = int(found.get("WORLD_SIZE", "1"))
    for name in names[1:]:
        if int(found.get(name, "0")) >= size:
            raise fault(name, f"must be below WORLD_SIZE, {size}, got {found[name]}")
    if size > 1 or "LOCAL_RANK" in found:
        for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise fault(name, "is not set, as it is by a launcher", "the others")
        port = os.environ["MASTER_PORT"]
        if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            raise fault("MASTER_PORT", f"must be 0 to 65535, got {port!r}")
        try:  # or torch would ask for it again for minutes
            socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
        except (OSError, UnicodeError) as error:
            raise fault("MASTER_ADDR", first_line(error)) from None


def is_first_process() -> bool:
    """Whether this is the process that writes, also before the processes know each other."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """A process that does not find the others, or that accelerate cannot set up: one line."""
    try:
        yield
    except Exception as error:  # accelerate's own kinds, and those of what it is told to use
        said = " ".join(sorted(name for name in os.environ if name.startswith("ACCELERATE_")))
        raise Fault(
            f"cannot start this process ({first_line(error)}); start one alone, or all by torchrun "
            f"or accelerate launch{f', and look at {said} in the environment' if said else ''}"
        ) from None


def cores() -> int:
    """How many this process may use: all of the machine's, where the system says no more."""
    may = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    return len(may(0))


def ends() -> list[int]:
    """What ends a script as Ctrl-C does: a kill, and a terminal that closes unless under nohup."""
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    nohup = signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGTERM] if nohup else [signal.SIGTERM, hangup]


def heed(numbers: Iterable[int], first: Callable[[], None]) -> None:
    """Calls first() at a signal of these. A second one ends the process at once.

    But for one within a second: launchers repeat the first.
    """
    received: list[float] = []

    def receive(*_: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > 1:
            os.write(2, b"stopped at once; what was saved before is kept\n")
            leave(130)
        first()

    for number in numbers:
        signal.signal(number, receive)


def interrupt() -> NoReturn:
    """As Python does at SIGINT, and what can be told from a raise by code of others."""
    raise KeyboardInterrupt


def is_signal(error: BaseException) -> bool:
    """Whether it came by a signal. Under Python's own handler, without `run`, it may have."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    if any((call.filename, call.name) == (__file__, "interrupt") for call in last):
        return True
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def free_children() -> None:
    """A process that this one forks has no handlers of it, from its first moment on.

    Pools end theirs by SIGTERM, ever so young.
    """
    numbers = (signal.SIGINT, *ends())

    def hold() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def forget() -> None:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        let_go()

    if hasattr(os, "fork"):
        os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=forget)


def signal_check() -> Callable[[], None]:
    """Remembers SIGINT, SIGTERM and SIGHUP. Returns what raises Stopped once one has come."""
    received: list[bool] = []
    heed((signal.SIGINT, *ends()), lambda: received.append(True))

    def obey() -> None:
        if received:
            raise Stopped

    return obey


def verdict(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for what ends a script. None for a bug of ours."""
    line = first_line(error)
    if isinstance(error, Fault):  # of a sentence of ours, all, whatever names it has
        return 2, printable(str(error))
    if isinstance(error, Stopped | KeyboardInterrupt):
        return 130, line if str(error) else "stopped"
    if isinstance(error, BrokenPipeError):
        return 141, ""  # nobody reads what is printed; shells have this code for it
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 2, f"cannot write ({line}); make room"
    if isinstance(error, OSError) and error.errno in REFUSED:
        return 2, f"the system refuses ({line}); mend that, or raise its limit (ulimit -a)"
    full = "of memory|ate memory|ALLOC_FAILED|map segment"  # torch's words, and the loader's
    may_be = isinstance(error, RuntimeError | ImportError) and re.search(full, line)
    if isinstance(error, MemoryError) or may_be:
        return 2, f"out of memory ({line}); ask for less"
    if isinstance(error, OSError) and "path too long" in line:
        return 2, f"{line}; set TMPDIR to a folder with a shorter name"
    if isinstance(error, Warning):
        return 2, f"{line}; this is a warning: leave -W error and PYTHONWARNINGS out"
    if isinstance(error, ImportError):  # a package is missing, too old, or broken
        return 2, f"{line}; pip install -r requirements.txt"
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "<module>" and "site-packages" in frame.filename for frame in frames):
        # A library reads its settings as it is imported.
        return 2, f"{frames[-1].filename} does not load ({line}); look at its settings"
    if frames and is_tqdm(frames[-1]):
        return 2, f"no progress bar can be drawn ({line}); unset the variables TQDM_..."
    return None


def is_tqdm(call: traceback.FrameSummary) -> bool:
    return "tqdm" in Path(call.filename).parts


def run(script: str, main: Callable[[], None]) -> None:
    """Calls main. What `verdict` knows is one line and an exit code; a bug is a traceback and 1.

    This holds on while the rest of a script is imported, where it calls this first, with a main
    that checks its arguments.
    """

    def end(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        found = verdict(error)
        if not found:
            return sys.__excepthook__(kind, error, trace)
        calls = [call for call in traceback.extract_tb(error.__traceback__) if is_tqdm(call)]
        begun = any(call.name == "__init__" for call in calls)  # a bar that is not yet one
        traceback.clear_frames(error.__traceback__)  # a progress bar ends its line
        try:
            sys.stderr.write("\n" * begun + f"{script}: {found[1]}\n" if found[1] else "")
        except OSError as full:
            error = full
        if isinstance(error, OSError):  # what could not be printed is not tried again
            with contextlib.suppress(OSError):  # where no more files may be opened
                for number in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        raise SystemExit(found[0])

    sys.stdout, sys.stderr = (x or open(os.devnull, "w") for x in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # whatever the terminal says that it can show
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.excepthook = end
    with contextlib.suppress(ValueError):  # only the main thread may
        heeded = signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # not so in the background
        heed([*ends(), signal.SIGINT] if heeded else ends(), interrupt)
        free_children()
    try:
        try:
            os.getcwd()
        except OSError:  # libraries would say something else
            raise Fault("the folder that this is started in is gone; change to another") from None
        main()
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()  # --help
        raise
    except BaseException as error:
        if not verdict(error):
            sys.excepthook = sys.__excepthook__  # a bug of ours
            raise
        end(type(error), error, None)


def run_and_leave(script: str, main: Callable[[], None]) -> None:
    """As `run`, and threads that a reward of one's own has left do not keep Python from its end.

    It would wait for them; and it would crash in one that is inside torch.
    """
    code: Any = 0
    try:
        run(script, main)
    except SystemExit as end:
        code = end.code
    except BaseException:  # a bug of ours
        sys.__excepthook__(*sys.exc_info())
        code = 1
    main_thread = threading.main_thread()
    if any(not x.daemon and x is not main_thread for x in threading.enumerate()):
        sys.stdout.flush()
        leave(code)
    raise SystemExit(code)
