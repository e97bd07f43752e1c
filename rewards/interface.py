"""What all rewards share: errors, weights, calling a reward, reading its result."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# One loop for all calls, so that a client that a reward keeps open still works in the next call.
event_loop = functools.cache(asyncio.new_event_loop)


class RewardError(ValueError):
    """A reward cannot be named, loaded or called. The message is one plain sentence."""


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Raise any error or attempt to exit as a RewardError that begins with `what`.

    Its cause is the original error, unless that is an OSError or RewardError, which say enough.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        plain = isinstance(error, OSError | RewardError)
        line = str(error).strip().partition("\n")[0]
        line = line if isinstance(error, RewardError) else f"{type(error).__name__}: {line}"
        raise RewardError(f"{what}: {line}") from (None if plain else error)


def need(command: str, *modules: str) -> None:
    """Raise RewardError with the pip command unless all modules can be imported."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise RewardError(f"it needs `{command}`")


def parse_models(pairs: list[str], names: Iterable[str]) -> dict[str, str]:
    """Parse pairs "name=model" into models by name. Raises RewardError unless all are in names."""
    models = dict(pair.partition("=")[::2] for pair in pairs)
    for name, model in models.items():
        if name not in names or not model:
            known = ", ".join(f"{name}=..." for name in dict.fromkeys(names))
            raise RewardError(f"--reward_model takes {known}, got {name}{model and '='}{model}")
    return models


def read_weights(place: str) -> dict:
    """The content of a .pth file, by path or URL (fetched once; a hash in its name is checked)."""
    if "://" in place:
        return torch.hub.load_state_dict_from_url(
            place, map_location="cpu", check_hash=True, weights_only=True
        )
    return torch.load(place, map_location="cpu", weights_only=True)


def load_own(place: str, function: str) -> Callable:
    """Import a user's reward. Raises RewardError if it cannot be called as one.

    A file is imported by its stem, and can import the files beside it, as a script can.
    """
    file = Path(place).resolve()
    is_file = file.suffix == ".py"
    if is_file and str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = importlib.import_module(file.stem if is_file else place)
    if is_file and module.__file__ != str(file):
        raise RewardError(f"rename {file.name}: there is already a module {file.stem}")
    reward = getattr(module, function)
    try:
        arguments(reward, None, None, None)
    except TypeError as error:
        how = f"write `reward = {function}(...)` in your file and name `reward`"
        raise RewardError(f"{error}; if {function} creates a reward, {how}") from None
    return reward


def arguments(reward: Callable, images: Any, prompts: Any, metadata: Any) -> tuple[tuple, dict]:
    """The (args, kwargs) to call a reward with: by name if possible. Raises TypeError."""
    if inspect.isclass(reward):
        raise TypeError(f"{reward.__name__} is a class and must be instantiated")
    signature = inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward)
    values = {"images": images, "prompts": prompts, "metadata": metadata}
    if not any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
        values["prompt_metadata"] = metadata
        values = {name: values[name] for name in values.keys() & signature.parameters.keys()}

    by_name = [((), values)] if values else []
    for args, kwargs in [*by_name, ((images, prompts), {}), ((images, prompts, metadata), {})]:
        with contextlib.suppress(TypeError):
            signature.bind(*args, **kwargs)
            return args, kwargs
    raise TypeError(f"it takes {signature} and not images and prompts")


@torch.no_grad()
def call(reward: Callable, images: Tensor, prompts: list[str], metadata: list[dict]) -> Any:
    """Call a reward without gradients, and wait for its result if it is asynchronous."""
    args, kwargs = arguments(reward, images, prompts, metadata)
    result = reward(*args, **kwargs)
    return event_loop().run_until_complete(result) if inspect.isawaitable(result) else result


def numbers(values: Any) -> Tensor:
    """Numbers of any kind as a float32 tensor on the CPU, with NaN for None and infinity."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    elif isinstance(values, list | tuple):
        values = [math.nan if value is None else float(value) for value in values]
    tensor = torch.from_numpy(np.array(values, np.float64)).float()
    return torch.where(tensor.isfinite(), tensor, math.nan)


def split(result: Any) -> tuple[Tensor, dict[str, float]]:
    """Split a reward's result into its scores and the means of the numbers in its info.

    A tuple is (scores, info, ...) unless it is a tuple of plain numbers.
    """
    if callable(result):
        raise TypeError("it returned a function; call the factory in your file and name the result")
    if not isinstance(result, tuple) or not isinstance(result[0], list | np.ndarray | Tensor):
        return numbers(result), {}
    info = result[1] if len(result) > 1 and isinstance(result[1], dict) else {}
    means = {}
    for key, value in info.items():
        with contextlib.suppress(TypeError, ValueError):
            means[key] = numbers(value).nanmean().item()
    return numbers(result[0]), {key: mean for key, mean in means.items() if not math.isnan(mean)}
