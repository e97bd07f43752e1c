"""The folder of a run: its checkpoints, how it is resumed, its metrics; and how a script ends.

Files are written aside and renamed, so that none is ever half-written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import LoggerType, get_available_trackers

from rewards import RewardError
from sd35.lora import LORA_FILE, recompute, save_lora
from sd35.model import Model
from sd35.settings import Settings, UserError

# With at least this many GB of GPU memory, rewards share the GPU; with less, they run on the CPU,
# beside the rollout.
REWARD_ROOM = 15

# The shares of the transformer's blocks that may be recomputed in the backward pass.
SHARES = (0, 1 / 2, 1)

# What a resumed run may change, because it does not change the steps.
FREE_TO_CHANGE = (
    "max_train_steps micro_batch_size gradient_checkpointing checkpointing_steps output_dir config "
    "checkpoints_total_limit resume_from_checkpoint validation_steps validation_prompts report_to "
    "eval_reward eval_inference_steps push_to_hub hub_model_id print_settings compile"
).split()


def run_script(main: Callable[[], None]) -> None:
    """Call main(), and end as a command should.

    An ordinary mistake is one sentence and exit code 2, with the traceback of a user's reward above
    it if there is one. Ctrl-C and SIGTERM end with 130. Anything else is a traceback.
    """
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        main()
    except (UserError, RewardError) as error:
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sentence = str(interrupt) or "interrupted"
        print(f"{script}: {sentence}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # a reward may still be at work in its thread, and exit would wait for it


class Interrupts:
    """SIGINT and SIGTERM raise KeyboardInterrupt; inside `with interrupts.held()`, at its end."""

    def __init__(self) -> None:
        self.depth, self.pending = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, *_: Any) -> None:
        self.pending = self.depth > 0
        if not self.pending:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.pending and not self.depth:
            self.pending = False
            raise KeyboardInterrupt


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(aside), then rename that file to `path`. Both have the same suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# Checkpoints


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    paths = [path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.name[11:]))


def open_folder(settings: Settings) -> dict[str, Any] | None:
    """The state to resume from, or None for a new run. Raises UserError.

    A folder with checkpoints or a LoRA holds a run. Resuming needs the same settings, except those
    in FREE_TO_CHANGE; with a cosine schedule, max_train_steps may not change either.
    """
    out, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    saved = checkpoints(out)
    holds_run = saved or (out / LORA_FILE).exists()
    taken = f"--output_dir {out} holds a run; give another folder, or continue the run with "
    taken += "--resume_from_checkpoint latest"
    if not wanted and holds_run:
        raise UserError(taken)
    if not wanted or (wanted == "latest" and not saved):
        return None

    checkpoint = saved[-1] if wanted == "latest" else Path(wanted)
    if (out / wanted / "state.pt").exists():
        checkpoint = out / wanted  # as in diffusers' scripts, a name in output_dir
    if not (checkpoint / "state.pt").exists():
        raise UserError(f"--resume_from_checkpoint: {wanted} is not a checkpoint; give latest")
    if holds_run and checkpoint.resolve().parent != out.resolve():
        raise UserError(taken)

    before = yaml.safe_load((checkpoint / "settings.yaml").read_text("utf-8"))
    settings.mixed_precision = settings.mixed_precision or before["mixed_precision"]
    fixed = {name for name in asdict(settings) if name not in FREE_TO_CHANGE}
    fixed |= {"max_train_steps"} if settings.lr_scheduler == "cosine" else set()
    for name in sorted(fixed):
        if before.get(name) != getattr(settings, name):
            was, now = before.get(name), getattr(settings, name)
            raise UserError(f"--{name}: the run has {was}, got {now}; give another --output_dir")
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def begin(settings: Settings, done: int) -> None:
    """Write settings.yaml, cut the metrics after `done` steps, and set later checkpoints aside."""
    out = Path(settings.output_dir)
    for path in out.glob(".checkpoint-*"):  # half-written when the run was killed
        shutil.rmtree(path)
    for path in checkpoints(out):
        if int(path.name[11:]) > done:
            path.rename(path.with_name(f"aside-{path.name}-{time.time_ns()}"))
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["step"] <= done]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    replace_file(out / "metrics.jsonl", lambda aside: aside.write_text(text, "utf-8"))
    replace_file(out / "settings.yaml", lambda aside: write_settings(settings, aside))
    if done < settings.max_train_steps:
        print(
            f"{settings.recipe}, {' '.join(settings.reward)}: {settings.prompts_per_step} groups "
            f"of {settings.group_size} a step, steps {done + 1} to {settings.max_train_steps}, "
            f"into {out}"
        )
    if settings.max_train_steps < settings.ema_steps - 1:
        print("the saved LoRA will not have changed yet; give --ema_steps 1 for so short a run")


def write_settings(settings: Settings, path: Path) -> None:
    path.write_text(yaml.safe_dump(asdict(settings), sort_keys=False), "utf-8")


def save_checkpoint(
    settings: Settings, model: Model, optimizer: torch.optim.Optimizer, done: int
) -> None:
    """Write checkpoint-<done>, whole or not at all, and delete the oldest beyond the limit."""
    out = Path(settings.output_dir)
    folder, aside = out / f"checkpoint-{done}", out / f".checkpoint-{done}"
    if folder.exists() or not all(parameter.isfinite().all() for parameter in model.theta):
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    theta = [parameter.detach() for parameter in model.theta]
    state = {"step": done, "theta": theta, "old": model.old, "average": model.average}
    torch.save({**state, "optimizer": optimizer.state_dict()}, aside / "state.pt")
    with model.saved_average():
        save_lora(model.pipe, aside)
    write_settings(settings, aside / "settings.yaml")
    aside.rename(folder)
    for path in checkpoints(out)[: -settings.checkpoints_total_limit]:
        shutil.rmtree(path)


@torch.no_grad()
def restore(state: dict[str, Any], model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's state into the model and the optimizer."""
    for name, tensors in (("theta", model.theta), ("old", model.old), ("average", model.average)):
        for tensor, value in zip(tensors, state[name], strict=True):
            tensor.copy_(value)
    optimizer.load_state_dict(state["optimizer"])


# Metrics


class Clock:
    """Seconds of each phase of a step. The phase "reward" runs beside the others, in its thread."""

    def __init__(self, device: torch.device):
        self.cuda, self.seconds, self.start = device.type == "cuda", {}, time.perf_counter()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, images: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        metrics = {"seconds": seconds, "images_per_second": images / seconds}
        if self.cuda:
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics | {f"seconds/{phase}": value for phase, value in self.seconds.items()}


def add_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Append a step's line. What is not finite becomes null."""
    finite = {k: x if x is None or math.isfinite(x) else None for k, x in metrics.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, without a last line that was cut short by a kill."""
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text("utf-8").splitlines():
            lines.append(json.loads(line))
    return lines


def check_tracker(name: str) -> None:
    """Raise UserError if accelerate does not know the tracker, or its package is missing."""
    known = [str(kind) for kind in LoggerType.list() if str(kind) != "all"]
    if name != "none" and name not in known:
        raise UserError(f"--report_to {name}: give none or one of {', '.join(known)}")
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UserError(f"--report_to {name} needs `pip install {name}`")


def track(accelerator: Accelerator, metrics: dict[str, Any], image: np.ndarray | None) -> None:
    """Log a step's numbers, and an image (H, W, 3) if there is one and the tracker takes it."""
    numbers = {k: x for k, x in metrics.items() if x is not None and math.isfinite(x)}
    accelerator.log(numbers, metrics["step"])
    for tracker in accelerator.trackers if image is not None else ():
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": image[None]}, step=metrics["step"], **layout)


def reward_device(device: torch.device) -> torch.device:
    """Where rewards run: the trainer's device, or the CPU beside a small GPU.

    Networks are in float32 on either (but DeQA's), so that scores differ by rounding alone.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        return device if memory >= REWARD_ROOM else torch.device("cpu")
    return device


def passes(settings: Settings) -> list[tuple[float, int]]:
    """What to try for a pass, fewest FLOPs first: the share of blocks recomputed, and images.

    A pass must hold a whole group at one time, or theta needs a second forward, which costs more
    than recomputing all blocks. More of the group's K times in a pass only launch fewer kernels, so
    they are not worth any recomputation. settings.gradient_checkpointing decides if it is not None.
    """
    m = settings.train_samples or settings.group_size
    whole = [k * m for k in range(settings.train_timesteps, 0, -1)]
    parts = sorted({math.ceil(m / n) for n in range(2, m + 1)}, reverse=True)
    if settings.gradient_checkpointing is not None:
        return [(int(settings.gradient_checkpointing), n) for n in whole + parts]
    group = [(share, m) for share in SHARES[1:]]
    return [(0, n) for n in whole] + group + [(share, n) for share in (0, 1) for n in parts]


def fit_micro_batch(model: Model, settings: Settings) -> int:
    """Find by trying which of `passes` fits in the GPU's memory, and return its number of images.

    Without CUDA, only a group is tried, recomputed only if the settings say so. Raises a
    RuntimeError if nothing that was tried fits.
    """
    device, tried = model.device, passes(settings)
    if device.type != "cuda":
        tried = [(tried[0][0], settings.group_size)]

    def one_pass(m: int) -> None:
        model.images_per_pass = m
        # What Adam will hold, and as much again for fragmentation.
        spare = torch.zeros(4 * sum(p.numel() for p in model.theta), device=device)
        x, t = torch.randn(m, *model.latent_shape, device=device), torch.full((m,), 0.8).to(device)
        model.decode(model.sample("", x, 1, settings.guidance_scale))
        model.velocity("")(x, t, t).square().mean().backward()
        del spare

    for share, m in tried:
        recompute(model.pipe.transformer, share)
        try:
            one_pass(m)
            return m
        except RuntimeError:  # cuDNN and others raise errors of their own when memory is full
            if (share, m) == tried[-1]:
                raise
        finally:
            for parameter in model.theta:
                parameter.grad = None
            torch.cuda.empty_cache()  # which does nothing without a GPU
