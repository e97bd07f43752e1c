"""Images and prompts to scores: the interface, the names, and the fence around foreign code.

A reward is a function (images, prompts) -> scores, higher is better:
    images: float (N, 3, H, W) in [0, 1]. prompts: N dicts, each with "prompt" and what else the
    prompt file says of it. Returns N numbers, as a tensor, an array or a list; NaN where there is
    no score.

A file rewards/<name>.py with a function `load(device, model=None) -> reward` makes the name <name>
known. It loads what the reward needs; `model` stands in for the file's own weights. Where not every
prompt will do, a function `check_prompt(prompt)` raises ValueError. Nothing is imported before it
is asked for.

A reward of one's own is named path/to/file.py:function or package.module:function. Three lines in
a file make one, and it may be anything that can be called with images and prompts:

    def blue_where_asked(images, prompts):
        asked = [1.0 if "blue" in prompt["prompt"].lower() else -1.0 for prompt in prompts]
        return images.new_tensor(asked) * (images[:, 2] - images[:, 0]).mean((1, 2))

Whatever goes wrong in reading, loading or calling a reward is a RewardError of one line.
"""

from __future__ import annotations

import builtins
import copy
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

import numpy as np
import torch
from torch import Tensor

from cli import ends, first_line, is_signal, leave

Reward = Callable[[Tensor, list[dict]], object]
NAMES = (builtins, json, os, torch)
LARGEST = 1e9  # of a score's size: of more, float32 rounds others away, and squares overflow
LONGEST = 300  # characters of another's error message
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda x: torch.set_default_device(None if x.type == "cpu" else x)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
)


class RewardError(ValueError):
    """A reward cannot be read, loaded or called. The message is one line that stands alone."""


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] as bytes (N, H, W, 3), the form that picture files have."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def names() -> list[str]:
    """The names of the rewards in this folder: its files that have a function `load`."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(file.stem for file in files if "\ndef load(" in file.read_text("utf-8"))


def parse(spec: str) -> tuple[str, float]:
    """ "name" or "name=weight" -> (name, weight), the weight 1 if there is none.

    Raises RewardError if there is no such reward. A file of one's own is compiled for that, not
    run, so that a function which it never mentions is found missing before anything is loaded.
    """
    name, equals, number = spec.rpartition("=")
    if not equals or ".py:" in number:  # a path may have a "=" in it, too
        name, weight = spec, 1.0
    else:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise RewardError(f"{spec!r}: the weight must be a number, got {number!r}")
        if weight == 0:
            raise RewardError(f"{spec!r}: a weight of 0 trains nothing; --eval_reward watches it")
        if not 1e-9 <= abs(weight) <= 1e9:  # float32 would take a sum for 0, or for infinite
            raise RewardError(f"{spec!r}: the weight must be 1e-9 to 1e9 in size, got {number}")
    place, colon, function = name.rpartition(":")
    if colon and place in names():
        raise RewardError(f"{spec!r}: a weight follows an equals sign: give {place}={function}")
    if colon:
        with fence(repr(name)):
            look_for(place, function)
    elif name not in names():
        own = "path/to/file.py:function"
        raise RewardError(f"no reward {name!r}: give {', '.join(names())}, or {own}")
    return name, weight


def parse_all(specs: list[str]) -> dict[str, float]:
    """The weights of several specs, by name. Raises RewardError as `parse`, and at one given twice.

    A file is the same file however its path is written.
    """
    found: dict[str, float] = {}
    places: set[tuple[str, str]] = set()
    for spec in specs:
        name, weight = parse(spec)
        place, _, function = name.rpartition(":")
        same = str(Path(place).resolve()) if place.endswith(".py") else place, function
        if same in places:
            raise RewardError(f"{name} is there twice; give it once, in training with a weight")
        places.add(same)
        found[name] = weight
    return found


def check_models(models: dict[str, str], used: Collection[str]) -> None:
    """Raises RewardError at the first reward that is not used, or that is one of one's own."""
    for name in models:
        if name not in used:
            raise RewardError(f"{name} is not among the rewards: {' '.join(used)}")
        if ":" in name:
            raise RewardError(f"{name} is of your own, and loads its weights itself")


def check_prompts(names: Iterable[str], prompts: list[dict]) -> None:
    """Raises RewardError at the first prompt that a reward of this folder cannot be for.

    A reward's file may say so by a function `check_prompt(prompt)`, which raises ValueError.
    """
    for name in names:
        if ":" in name:
            continue  # one of one's own says it when it is called
        check = getattr(importlib.import_module(f"rewards.{name}"), "check_prompt", None)
        for number, prompt in enumerate(prompts if check else [], 1):
            try:
                check(prompt)
            except ValueError as error:
                raise RewardError(f"prompt {number} is not for {name}: {error}") from None


def look_for(place: str, function: str) -> None:
    """Raises if a file of one's own, or a package, cannot have the function. Runs neither."""
    if not function.isidentifier():
        raise RewardError(f"a function's name must follow the colon, got {function!r}")
    if not place.endswith(".py"):
        package = place.split(".")[0]
        if not package or importlib.util.find_spec(package) is None:
            raise RewardError(f"there is no package {package}; the name of a file ends in .py")
        return
    if not Path(place).is_file():
        raise RewardError(f"there is no file {place}")
    source = Path(place).read_bytes()
    compile(source, place, "exec", dont_inherit=True)
    text = source.decode("utf-8", "replace")
    unseen = ("import *", "__getattr__", "globals()")  # a name may come from these
    if not re.search(rf"\b{function}\b", text) and not any(word in text for word in unseen):
        raise RewardError(f"{place} defines no function {function}")


def load(
    name: str, device: torch.device | str, model: str | None = None, fetch: bool = True
) -> Reward:
    """The reward of a name that `parse` has passed, with its weights on `device`.

    model: the reward's other weights, file or address, as its own `load` takes them. Without
    `fetch`, weights that are not on this machine are not fetched. Raises RewardError, whatever goes
    wrong.
    """
    place, colon, function = name.rpartition(":")
    with fence(f"cannot load the reward {name}", place):
        if not colon:
            return load_named(name, device, model, fetch)
        module = run(place) if place.endswith(".py") else importlib.import_module(place)
        reward = getattr(module, function, None)
        if not callable(reward):
            found = f"is a {type(reward).__name__}" if hasattr(module, function) else "is not there"
            raise RewardError(f"{function} {found}, and must be callable with images and prompts")
        try:
            inspect.signature(reward, follow_wrapped=False).bind([], [])
        except TypeError as error:
            raise RewardError(f"cannot be called with images and prompts ({error})") from None
        except ValueError:
            pass  # some builtin functions do not say what they take
    return reward


def load_named(name: str, device: torch.device | str, model: str | None, fetch: bool) -> Reward:
    """The reward of a file in this folder, its weights from this machine if they are here.

    Only if they are not is the hub asked, and first by one short request: without a network, the
    hub's own client repeats each of a dozen requests for 23 seconds. The flag is read by
    transformers and huggingface_hub at each use; it is what the environment variable sets.
    """
    from huggingface_hub import constants

    loader = importlib.import_module(f"rewards.{name}")
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        return loader.load(device, model)
    except OSError as error:
        missing = said(error)
    finally:
        constants.HF_HUB_OFFLINE = offline
    if fetch and not offline and hub_answers():
        return loader.load(device, model)
    why = "not all that it needs is on this machine"
    if model:
        why = f"{model!r} is no folder here with all that it needs ({missing})"
    if not fetch:
        raise RewardError(why)
    if offline:
        raise RewardError(f"{why}; unset HF_HUB_OFFLINE, or give them by --reward_model {name}=...")
    raise RewardError(
        f"{why}; {constants.ENDPOINT} does not answer: give them by --reward_model {name}=..., or "
        "bring the hub's cache from another machine and set HF_HUB_OFFLINE=1"
    )


def hub_answers() -> bool:
    """Whether the hub answers a request within five seconds, whatever it says."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the client's own kinds, which change with its releases
        return False
    return True


def modules_hidden_by(folder: Path) -> dict[str, ModuleType]:
    """Those that are loaded and are no library's, but have the name of a file in the folder."""
    libraries, hidden = (sys.prefix, sys.base_prefix), {}
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None) or sys.prefix
        beside = {str(folder / f"{name}.py"), str(folder / name / "__init__.py")}
        if file not in beside and not file.startswith(libraries):
            if any(map(os.path.isfile, beside)):
                hidden[name] = module
    return hidden


def run(place: str) -> ModuleType:
    """The module of a file of one's own, run once in a process.

    Dataclasses, pickles and new processes look it up by name: the file's, by which it can be
    imported, or where that is another's, one that no import has. What lies beside the file can be
    imported: while it runs, before anything else of that name, and later, from inside its
    functions, after everything else.
    """
    path = Path(place).resolve()
    names = [path.stem, f"reward_{path.as_posix().replace('.', '_')}"]
    for name in names:
        if getattr(sys.modules.get(name), "__file__", None) == str(path):
            return sys.modules[name]
    free = path.stem.isidentifier() and path.stem not in sys.modules
    name = names[0 if free and not importlib.util.find_spec(path.stem) else 1]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    beside, hidden = str(path.parent), modules_hidden_by(path.parent)
    for other in hidden:
        del sys.modules[other]
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.modules.update(hidden)
        if beside in sys.path:
            sys.path.remove(beside)
        if beside not in sys.path:
            sys.path.append(beside)
    return module


def score(name: str, reward: Reward, images: Tensor, prompts: list[dict]) -> Tensor:
    """What a reward says of images (N, 3, H, W), as float32 (N,) on the CPU; NaN is no score.

    The reward gets copies of the images and the prompts, so that working in place harms nobody,
    and is called without gradients. Raises RewardError when it raises, or does not return a real
    number for each image.
    """
    about = f"of prompt {prompts[0]['prompt'][:LONGEST]!r}"
    place = name.rpartition(":")[0]
    try:
        with fence(f"reward {name} failed on images {about}", place), torch.no_grad():
            result = reward(images.clone(), [copy.deepcopy(prompt) for prompt in prompts])
    except RewardError as error:
        if re.search(r"(Attribute|Type)Error: .*\bdict\b", str(error)):
            hint = "a prompt is a dict, and prompt['prompt'] its text"
            raise RewardError(f"{error}; {hint}") from error.__cause__
        raise
    try:
        if inspect.iscoroutine(result):
            result.close()  # or Python warns that nobody waits for it
        if isinstance(result, list):
            result = [float(x) if isinstance(x, Decimal | Fraction) else x for x in result]
        if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
            # torch has no steps backwards, masks or longdoubles, and one order of bytes.
            result = np.ma.filled(result.astype(np.float64, order="C"), np.nan)
        scores = torch.as_tensor(result)
        if scores.dtype == torch.float32 and not isinstance(result, Tensor):
            scores = torch.as_tensor(result, dtype=torch.float64)  # as large as a list's may be
        kind = str(tuple(scores.shape))
        if scores.shape == (len(images),) and not scores.is_complex():
            scores = scores.detach().to_dense().cpu().double()
            large = scores[scores.isfinite() & (scores.abs() > LARGEST)].tolist()
            if not large:
                return scores.to(torch.float32)
            kind = f"{large[0]:g}, and at most {LARGEST:g} in size can be compared"
        kind = f"complex {kind}" if scores.is_complex() else kind
    except Exception as error:
        kind = f"a {type(result).__name__} that holds no numbers ({first_line(error)})"
    raise RewardError(f"reward {name} must return {len(images)} scores, got {kind}, {about}")


@contextmanager
def fence(what: str, place: str = "") -> Iterator[None]:
    """Turns all that code of others may raise into a RewardError that begins with `what`.

    SystemExit is among it, as no reward may end a run as if it had succeeded. KeyboardInterrupt is
    not where it is the user's, by a signal. `place` is a file whose line is named.
    """
    try:
        with unchanged():
            yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and is_signal(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        file = str(Path(place).resolve())
        lines = [frame.lineno for frame in frames if frame.filename == file]
        where = f" (line {lines[-1]})" if lines else ""
        raise RewardError(f"{what}: {said(error)}{where}") from error


@contextmanager
def unchanged() -> Iterator[None]:
    """What code of others sets for the whole process is as before in the end.

    That is SETTINGS, the filters of warnings, signals' handlers, the folder that relative paths
    begin at, where print writes to, sys.path, the environment, and the functions of NAMES, each by
    what was there: what code has added, such as a key for its own later calls, stays. A stream
    that was closed is one that nobody reads.
    """
    with ExitStack() as undo:
        undo.callback(set_streams, sys.stdout, sys.stderr)
        undo.enter_context(warnings.catch_warnings())
        for ask, put in SETTINGS:
            undo.callback(put_back, ask, put, ask())
        if threading.current_thread() is threading.main_thread():  # where alone they can be set
            for number in (signal.SIGINT, *ends()):
                undo.callback(signal.signal, number, signal.getsignal(number))
        with suppress(OSError):  # a folder that is gone
            undo.callback(os.chdir, os.getcwd())
        run = os.getpid()
        if os._exit is leave:  # for good, as a thread or an exit handler may call it later
            os._exit = partial(leave_unless_in_a_run, run)
        # What later imports, children and files are found by; Python's own functions, and torch's.
        undo.callback(put_path, sys.path, [*sys.path])
        for names in (os.environ, *map(vars, NAMES)):
            undo.callback(put_names, names, dict(names))
        undo.callback(lambda: os.getpid() == run or leave(1))  # a child is not to train, too
        yield


def put_path(path: list[str], before: list[str]) -> None:
    """What code of others has added comes last, as it may import from there in its functions."""
    added = [x for x in sys.path if x not in before] if isinstance(sys.path, list) else []
    path[:], sys.path = [*before, *added], path


def put_names(names: MutableMapping[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        if names.get(name) is not value and names.get(name) != value:
            names[name] = value


def put_back(ask: Callable[[], Any], put: Callable[[Any], Any], before: Any) -> None:
    if ask() != before:  # a default device that is set costs time at every call
        put(before)


def leave_unless_in_a_run(run: int, code: int) -> NoReturn:
    """os._exit for code of others: it would end a run without a word, and as if all were well.

    In a thread it ends the thread; in a child that the code has forked, it is the usual end.
    """
    if os.getpid() != run:
        leave(code)
    raise SystemExit(code)


def set_streams(*streams: TextIO) -> None:
    sys.stdout, sys.stderr = (open(os.devnull, "w") if x.closed else x for x in streams)


def said(error: BaseException) -> str:
    """The error's kind and the first line of its message, cut where it is very long."""
    kind, line = type(error).__name__, first_line(error)
    if isinstance(error, RewardError) or line == kind:
        return line  # a sentence of ours, or no message
    return f"{kind}: {line[:LONGEST]}"
