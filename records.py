"""What a run of train_sd35.py leaves in its folder: metrics, checkpoints, pictures, model card.

metrics.jsonl has a line a step. Means are over the step's groups, null where there is none.

    reward, reward_std    mean, and std in a group, of the weighted sum of the rewards. It should
                          rise; where the std nears 0, groups teach nothing any more
    reward/NAME           and reward_std/NAME: one reward alone
    equal_groups          share of groups whose advantages are all zero: only the KL trains them
    groups_not_finite     share of groups that are left out, as a score is NaN or infinite
    loss, gap, gate       Eq. 17 at beta / G, the gap as a mean over the group, sigmoid(-beta gap).
                          The gate falls from 0.5 as the gap grows; near 0 training stands still:
                          lower --beta
    clipped               share of the samples that the clip dropped
    kl                    mean square of theta's velocity minus the reference's. It should level
                          off; if it only grows while pictures get worse, raise --kl
    grad_norm             before it is clipped; null if the step was left out as it is not finite
    learning_rate         of the step, after warm-up and schedule
    seconds               the whole step's, and images_per_second, drawn, scored and trained on
    seconds/PHASE         rollout, decode, wait and train add up to the step. wait is for scores:
                          the rewards work beside the rollout, for seconds/reward in all
    share/PHASE           seconds/PHASE over seconds
    peak_memory_gb        the step's peak on the GPU
    eval/NAME             and eval_base/NAME: a reward of the validation pictures, by the saved
                          average and by the base, from the same noise. If reward rises and these
                          fall, or an --eval_reward does, the reward is being hacked
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.pyplot
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import rewards
import sd35
from cli import Fault, first_line, make_folder, read_json, replace_file

matplotlib.use("agg")
# What a run may be resumed with another value of, because it does not change the steps.
NOT_OF_THE_STEPS = (
    "max_train_steps micro_batch_size gradient_checkpointing checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint report_to validation_steps output_dir config "
    "eval_reward eval_inference_steps print_arguments push_to_hub hub_model_id"
).split()
STATE = {"step", "bad_steps", "optimizer", "parameters", "old", "ema"}
UPLOADED = [sd35.LORA_FILE, "README.md", "curves.png", "metrics.jsonl", "validation/*"]


@contextlib.contextmanager
def written(what: Path | str) -> Iterator[None]:
    """Whatever goes wrong in writing something is a Fault of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise Fault(
            f"cannot write {what} ({first_line(error)}); mend that, or make room, and resume"
        ) from None


def is_first_process() -> bool:
    """Whether this is the process that writes, also before the processes know each other."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """A process that does not find the others is one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise Fault(
            f"cannot start this process of several ({first_line(error)}); start all by torchrun or "
            "accelerate launch"
        ) from None


def claim_folder(args: Any) -> Path:
    """--output_dir, made if need be, and no other run's until this process ends.

    Until its first checkpoint, a folder holds no run. Every process looks, the first one locks.
    Raises Fault if it holds another run, or what is no run's, or if a run is at work in it.
    """
    out = make_folder(args.output_dir)
    if is_first_process():
        lock_folder(out)
    kept = out / "arguments.json"
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and not kept.exists():
        raise Fault(
            f"argument --output_dir: {out} holds {others[0]}, and no run; give a new folder, or an "
            "empty one"
        )
    if not checkpoints(out):
        return out
    if not args.resume_from_checkpoint:
        raise Fault(
            f"argument --output_dir: {out} holds a run; continue it with "
            "--resume_from_checkpoint latest, or give another folder"
        )
    before = read_json(kept)
    for name, value in vars(args).items():
        # A run from before there was an argument is one with its default.
        had = before.get(name, getattr(type(args), name, None))
        if had == value:
            continue
        if name not in NOT_OF_THE_STEPS:
            raise Fault(
                f"argument --{name}: the run in {out} has {had}, got {value}; give what it has, or "
                "another --output_dir"
            )
        if name == "max_train_steps" and args.lr_scheduler == "cosine":
            raise Fault(
                f"argument --max_train_steps: the run in {out} has {had}, got {value}; a cosine's "
                "learning rates depend on it, so such a run cannot be made longer or shorter"
            )
    return out


def lock_folder(out: Path) -> None:
    """Takes the folder for this process, for as long as it lives. Raises Fault if it is taken."""
    try:
        lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Fault(
            f"argument --output_dir: a run is at work in {out}; give another folder"
        ) from None
    except OSError as error:
        raise Fault(f"argument --output_dir: cannot lock {out} ({first_line(error)})") from None


def begin(out: Path, args: Any, done: int = 0) -> None:
    """Makes the folder that of a run with this many steps done, and writes arguments.json.

    What a run that was killed has left half written goes. A checkpoint of a later step, which is
    damaged or not wanted, is kept under another name, and metrics.jsonl is cut.
    """
    with written(out):
        for half_written in out.glob(".checkpoint-*"):
            shutil.rmtree(half_written)
        for folder in (out, out / "validation"):
            for half_written in folder.glob(".[0-9]*-*"):
                half_written.unlink()
        for folder in checkpoints(out):
            if step_of(folder) > done:
                folder.rename(folder.with_name(f"aside-{folder.name}-{time.time_ns()}"))
        cut_metrics(out / "metrics.jsonl", done)
    text = json.dumps(vars(args), indent=1)
    replace_file(out / "arguments.json", lambda new: new.write_text(text))


def as_config(args: Any) -> str:
    """The arguments as a file for --config."""
    settings = {**dataclasses.asdict(args), "config": None, "print_arguments": False}
    settings["micro_batch_size"] = int(args.micro_batch_size) or "auto"
    return yaml.safe_dump(settings, sort_keys=False)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(out: Path) -> list[Path]:
    """The newest first. What has another name than a checkpoint's is none."""
    found = [
        path
        for path in out.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]{1,18}", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def save_checkpoint(out: Path, model: sd35.Model, state: dict[str, Any], limit: int) -> None:
    """checkpoint-<step>, complete or not there at all; the oldest beyond the limit go.

    state: besides what the model's is, what else has to be kept: tensors and numbers, and "step".
    There is none of no step, nor of a theta that is not finite. Raises Fault if it cannot be
    written, and then all that were there stay.
    """
    folder = out / f"checkpoint-{state['step']}"
    if folder.is_dir() or not state["step"] or not is_finite(model.theta):
        return
    theta = [parameter.detach().cpu() for parameter in model.theta]
    state = {**state, "parameters": theta, "old": model.old, "ema": model.average}
    content = io.BytesIO()
    torch.save(state, content)
    with written(folder), tempfile.TemporaryDirectory(dir=out, prefix=".checkpoint-") as aside:
        new = Path(aside) / folder.name
        new.mkdir()
        (new / "state.pt").write_bytes(content.getbuffer())
        save_lora(model, new)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        (new / "complete.json").write_text(json.dumps({"sha256": digest}))
        os.replace(new, folder)
        for old in checkpoints(out)[limit:]:
            shutil.rmtree(old)


def save_lora(model: sd35.Model, folder: Path) -> None:
    """The saved average as LORA_FILE in folder, complete or not there at all. Raises Fault."""
    transformer = model.pipe.transformer
    with model.saved_average(), written(folder / sd35.LORA_FILE):
        lora = {
            "transformer_lora_layers": get_peft_model_state_dict(transformer),
            # Without this, the LoRA would be loaded at scale 1 instead of alpha / rank.
            "transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict(),
        }
        save = partial(model.pipe.save_lora_weights, folder, **lora)
        replace_file(folder / sd35.LORA_FILE, lambda new: save(weight_name=new.name))


def check_lora(path: Path, transformer: nn.Module) -> None:
    """Raises Fault at the first tensor that is not finite, has no place, or another shape.

    diffusers passes over what fits nothing, and the pictures would be the base model's.
    """
    shapes = {f"transformer.{name}": x.shape for name, x in transformer.named_parameters()}
    try:
        weights = load_file(path)
        if not weights:
            raise ValueError("it is empty")
        for name, tensor in weights.items():
            place = name.rpartition(".lora_")[0]
            shape = shapes.get(f"{place}.weight")
            down, up = (weights.get(f"{place}.lora_{x}.weight") for x in "AB")
            if shape is None or down is None or up is None:
                raise ValueError(f"the model has no place for {name}")
            if (len(up), *down.shape[1:]) != shape or up.shape[1:] != down.shape[:1]:
                raise ValueError(f"{place} has {[*down.shape]}, {[*up.shape]} for {[*shape]}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
    except (OSError, SafetensorError, ValueError) as error:
        raise Fault(f"argument --lora: cannot use {path} ({first_line(error)})") from None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state. Raises Fault if it is damaged."""
    try:
        complete = read_json(folder / "complete.json")
        content = (folder / "state.pt").read_bytes()
        if hashlib.sha256(content).hexdigest() != complete.get("sha256"):
            raise ValueError("its checksum is another")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if missing := STATE - state.keys():
            raise ValueError(f"it has no {min(missing)}")
        return {**state, "step": int(state["step"]), "bad_steps": int(state["bad_steps"])}
    except Exception as error:  # whatever torch makes of other files
        raise Fault(f"checkpoint {folder} is missing or damaged ({first_line(error)})") from None


def find_checkpoint(out: Path, asked: str | None) -> dict[str, Any] | None:
    """The state to go on from: a folder's, or of 'latest' the newest in `out` that is not damaged.

    None if nothing is asked, or if 'latest' is and there is no checkpoint. Raises Fault if what is
    asked is damaged, or if all are.
    """
    if asked is None:
        return None
    if asked != "latest":  # a folder, or, as in diffusers' scripts, the name of one in `out`
        inside = out / asked
        return load_checkpoint(Path(asked) if Path(asked).is_dir() else inside)
    found = checkpoints(out)
    for folder in found:
        try:
            return load_checkpoint(folder)
        except Fault as fault:
            if folder == found[-1]:
                raise Fault(
                    f"argument --resume_from_checkpoint: {fault}, and so are all in {out}; give "
                    "another --output_dir"
                ) from None
            if is_first_process():
                tqdm.write(f"{fault}: taking the one before")
    return None


def nothing_to_do(out: Path, args: Any, done: int) -> bool:
    """Whether a run has all its steps and its LoRA already. Says so."""
    complete = (out / sd35.LORA_FILE).exists() and (out / "README.md").exists()
    if done < args.max_train_steps or (done == args.max_train_steps and not complete):
        return False
    if is_first_process():
        tqdm.write(
            f"nothing to do: the run in {out} has done {done} steps, and --max_train_steps is "
            f"{args.max_train_steps}"
        )
    return True


def restore(model: sd35.Model, state: dict[str, Any]) -> None:
    """Gives theta, theta_old and the saved average what a checkpoint holds."""
    for name, tensors in {
        "parameters": model.theta,
        "old": model.old,
        "ema": model.average,
    }.items():
        assign(tensors, state[name])


def resume(state: dict[str, Any], model: sd35.Model, optimizer: Optimizer) -> tuple[int, int]:
    """Puts a run where a checkpoint was. Returns the steps done, and the bad ones among the last.

    Raises Fault if the checkpoint is of a run with another LoRA.
    """
    try:
        restore(model, state)
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(
            "argument --resume_from_checkpoint: the checkpoint is of another LoRA "
            f"({first_line(error)}); give one of this run"
        ) from None
    return state["step"], state["bad_steps"]


def is_finite(tensors: list[Tensor]) -> bool:
    return all(tensor.isfinite().all() for tensor in tensors)


@torch.no_grad()
def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


class Clock:
    """Seconds in each phase of a step, which begins with it. Phases may be in different threads."""

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
        found = {"seconds": seconds, "images_per_second": images / seconds}
        for phase, value in self.seconds.items():
            found |= {f"seconds/{phase}": value, f"share/{phase}": value / seconds}
        memory = {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if self.cuda else {}
        return found | memory


def reward_metrics(scores: dict, advantages: Tensor, finite: Tensor) -> dict[str, float]:
    """Means over the groups whose scores are finite (P,), and the shares of the others."""

    def about(name: str, values: Tensor) -> dict[str, float]:
        values = values[finite]
        spread = values.std(1, correction=0).mean().item()
        return {f"reward{name}": values.mean().item(), f"reward_std{name}": spread}

    found = about("", sum(weight * values for weight, values in scores.values()))
    for name, (_, values) in scores.items():
        found |= about(f"/{name}", values)
    left_out = {"equal_groups": finite & (advantages == 0).all(1), "groups_not_finite": ~finite}
    return found | {name: which.float().mean().item() for name, which in left_out.items()}


def tell_of_bad_scores(step: int, name: str, scores: Tensor, chosen: list[dict]) -> None:
    """Says of the first score (P, G) that is not finite, if there is one, what it is of."""
    for p, g in (~scores.isfinite()).nonzero().tolist()[:1]:
        about = f"reward {name} is {scores[p, g]} for prompt {chosen[p]['prompt']!r}, sample {g}"
        tqdm.write(f"step {step}: {about}; such groups take no part")


def mean_over_processes(groups: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """The KL of all groups that were trained on, the others of those with a preference; or None."""
    names = ("loss", "gap", "gate", "clipped", "kl")
    found = [[group[k].float().mean().item() for k in (*names, "preferred")] for group in groups]
    rows = gather_object(found)
    means: dict[str, float | None] = {}
    for i, name in enumerate(names):
        values = [row[i] for row in rows if row[-1] or name == "kl"]
        means[name] = sum(values) / len(values) if values else None
    return means


def add_line(path: Path, metrics: dict[str, Any]) -> None:
    """Writes a step's metrics, the whole line or nothing. Raises Fault, as on a full disk."""
    line = (json.dumps(metrics) + "\n").encode()
    with written(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl. A line that is none, such as one cut short, is passed over."""
    lines = []
    if metrics.exists():
        for text in metrics.read_text("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text)
                if isinstance(found, dict) and isinstance(found.get("step"), int):
                    lines.append(found)
    return lines


def cut_metrics(metrics: Path, done: int) -> None:
    """Leaves the steps that are done; what came after is about to be done again."""
    if not metrics.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_lines(metrics) if line["step"] <= done]
    if kept:
        replace_file(metrics, lambda new: new.write_text("".join(kept)))
    else:
        metrics.unlink()


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: x for name, x in metrics.items() if isinstance(x, int | float)}


def start_trackers(accelerator: Accelerator, args: Any) -> None:
    """Raises Fault, for instance where a tracker wants a login first."""
    try:
        settings = {name: str(value) for name, value in vars(args).items()}
        accelerator.init_trackers("dgpo", settings)
    except Exception as error:  # each tracker has its own kinds
        raise Fault(
            f"argument --report_to: cannot start {args.report_to} ({first_line(error)})"
        ) from None


def track(accelerator: Accelerator, metrics: dict[str, Any], picture: Path) -> None:
    """Tells the trackers of a step, and shows them its validation pictures, if it has any."""
    with written("what the tracker keeps"):
        accelerator.log(numbers(metrics), metrics["step"])
        if not picture.exists():
            return
        images = np.asarray(Image.open(picture))[None]  # (1, H, W, 3)
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images}, step=metrics["step"], **layout)


def announce(
    args: Any, accelerator: Accelerator, training: list[dict], validation: list[dict], done: int
) -> None:
    """Says in three lines what is about to be done. Called by every process, one speaks.

    Raises Fault if not all processes have found the same number of steps done.
    """
    if len({*gather_object([done])}) > 1:
        raise Fault(
            f"argument --output_dir: not all processes see the same checkpoints in "
            f"{args.output_dir}; give a folder that they share"
        )
    if not accelerator.is_main_process:
        return
    tqdm.write(
        f"recipe {args.recipe}, reward {' '.join(args.reward)}: {args.prompts_per_step} groups of "
        f"{args.group_size} a step, beta {args.beta:g}, KL {args.kl:g}, clip {args.clip:g}"
    )
    start = ""
    if args.resume_from_checkpoint and done:
        start = f", after the {done} of {args.resume_from_checkpoint}"
    elif args.resume_from_checkpoint:
        start = ", anew, as there is no checkpoint to go on from"
    n = accelerator.num_processes
    tqdm.write(
        f"on {accelerator.device}{f', {n} processes' if n > 1 else ''}, precision "
        f"{args.mixed_precision}: steps {done + 1} to {args.max_train_steps}{start}; into "
        f"{args.output_dir}"
    )
    texts = {prompt["prompt"] for prompt in training}
    both = sum(prompt["prompt"] in texts for prompt in validation)
    known = f"{both} of them trained on, too" if both else "held out"
    if both and not args.validation_prompts:
        known = "trained on, too, as fewer than 8 prompts are too few to hold one out"
    tqdm.write(
        f"{len(training)} prompts of {args.train_prompts or 'the reward'}; in validation "
        f"{len(validation)}, {known}"
    )


def plot_curves(metrics: Path, path: Path) -> None:
    """curves.png: what a person wants to see of metrics.jsonl."""
    lines = [numbers(line) for line in read_lines(metrics)]
    panels = {
        "reward": ["reward"],
        "reward's std in a group": ["reward_std"],
        "gate": ["gate"],
        "share clipped, of equal groups": ["clipped", "equal_groups"],
        "KL (squared velocity)": ["kl"],
        "validation": sorted({key for line in lines for key in line if key.startswith("eval")}),
    }
    figure, axes = matplotlib.pyplot.subplots(2, 3, figsize=(14, 7), dpi=80, layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key, style in zip(keys, itertools.cycle(("-", "--", "-.", ":"))):
            points = [(line["step"], line[key]) for line in lines if key in line]
            kind, _, name = key.partition("/")  # of own rewards, only the function's name
            about = {"label": f"{kind} {name.split(':')[-1]}"}
            if len(points) == 1:  # which is no line
                about["marker"] = "o"
            if points:
                axis.plot(*zip(*points, strict=True), style, **about)
        axis.set_title(title, fontsize=15)
        axis.tick_params(labelsize=12)
        if len(axis.lines) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 2}
            axis.legend(fontsize=10, frameon=False, **below)
    figure.supxlabel("step", fontsize=15)
    with written(path):
        replace_file(path, figure.savefig)
    matplotlib.pyplot.close(figure)


def sheet(rows: list[tuple[str, list[str], Tensor]], side: int, columns: int = 1) -> Image.Image:
    """Pictures to look at: rows of a heading, a caption a picture, and images (N, 3, H, W).

    side: what each picture is made, in pixels. The heading stands above its pictures, cut to their
    width, and the captions underneath. columns: how many of the rows stand side by side.
    """
    line, width = 22, side * max((len(images) for _, _, images in rows), default=1)
    height = max(1, math.ceil(len(rows) / columns)) * (side + 2 * line)
    sheet = Image.new("RGB", (columns * width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (heading, captions, images) in enumerate(rows):
        x, y = i % columns * width, i // columns * (side + 2 * line)
        while pen.textlength(heading, font_size=14) > width - 8 and len(heading) > 1:
            heading = heading[:-2] + "…"
        pen.text((x + 4, y + 3), heading, fill="black", font_size=14)
        for caption, pixels in zip(captions, rewards.to_bytes(images), strict=True):
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y + line))
            pen.text((x + 4, y + line + side + 3), caption, fill="black", font_size=14)
            x += side
    return sheet


def draw_grid(path: Path, texts: list[str], base: Tensor, now: Tensor, title: str) -> None:
    """A picture with a pair for each prompt: base on the left, now on the right, from one noise.

    So many pairs stand side by side that it becomes about as wide as high.
    """
    pairs = zip(texts, base, now, strict=True)
    rows = [(text, ["base", title], torch.stack(images)) for text, *images in pairs]
    side = base.shape[-1] * max(1, 192 // base.shape[-1])  # small ones are enlarged
    with written(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, sheet(rows, side, columns=max(1, round(math.sqrt(len(rows) / 2)))).save)


def validate(
    path: Path,
    prompts: list[dict],
    base: Tensor,
    now: Tensor,
    judges: dict[str, tuple[float, rewards.Reward]],
) -> dict[str, float]:
    """Draws the pictures (N, 3, H, W) of base and now side by side. Returns their mean rewards.

    Raises Fault if a reward fails.
    """
    draw_grid(path, [prompt["prompt"] for prompt in prompts], base, now, path.stem)
    try:
        return {
            f"eval{of}/{name}": rewards.score(name, reward, images, prompts).mean().item()
            for name, (_, reward) in judges.items()
            for of, images in (("_base", base), ("", now))
        }
    except rewards.RewardError as error:
        raise Fault(str(error)) from None


def public(value: Any) -> Any:
    """A setting without the folders of this machine. Names on the hub stay."""
    if isinstance(value, list):
        return " ".join(map(public, value))
    if not isinstance(value, str) or "/" not in value:
        return value
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not Path(value).exists()
    return value if on_hub else re.sub("[^=]*/", "", value)


def write_card(args: Any, metrics: Path) -> None:
    """README.md, the model card. It names no folder of this machine."""
    last = numbers((read_lines(metrics) or [{}])[-1])
    model = args.pretrained_model_name_or_path
    model = "a local folder" if Path(model).exists() or model.count("/") != 1 else model
    kept = {**vars(args), "pretrained_model_name_or_path": model}
    settings = "".join(f"{name}: {public(value)}\n" for name, value in kept.items())
    base_model = "" if model == "a local folder" else f"base_model: {model}\n"
    lora = args.hub_model_id if args.push_to_hub else "."
    scores = [
        f"| {public(name)} | {last[f'eval_base/{name}']:.4g} | {last[key]:.4g} |\n"
        for key in last
        if (name := key.removeprefix("eval/")) != key and f"eval_base/{name}" in last
    ]
    text = f"""---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, dgpo, sd3, diffusers, text-to-image]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last.get("step", 0)} steps on the reward {public(args.reward)}.
It is meant for guidance {args.guidance_scale:g} (1 is none) at {args.resolution} x {args.resolution} pixels, and was watched at {args.eval_inference_steps} steps.

| mean reward on the validation prompts, from the same noise | base | this LoRA |
|---|---|---|
{"".join(scores)}
Mean reward of the last step's training pictures: {last.get("reward", math.nan):.4g}.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
    "{model}", torch_dtype=torch.bfloat16
)
pipe.load_lora_weights("{lora}", weight_name="{sd35.LORA_FILE}")
image = pipe(
    "a prompt",
    guidance_scale={args.guidance_scale:g},
    num_inference_steps=40,
    height={args.resolution},
    width={args.resolution},
    max_sequence_length={args.max_sequence_length},
).images[0]
```

Settings:

```
{settings}```

![curves](curves.png)
"""  # noqa: E501
    replace_file(Path(args.output_dir) / "README.md", lambda new: new.write_text(text))


def make_repository(args: Any) -> None:
    """Makes the repository of --push_to_hub, if need be, before any work. Raises Fault."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        args.hub_model_id = huggingface_hub.create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the client's own kinds, which change with its releases
        raise Fault(
            f"argument --push_to_hub: cannot make {name} on the hub ({first_line(error)}); mend "
            "that, or leave the flag out"
        ) from None


def upload(args: Any) -> None:
    """Puts what a finished run leaves on the hub. Raises Fault; the folder stays as it is."""
    name, out = args.hub_model_id, args.output_dir
    try:
        where = {"repo_id": name, "folder_path": out, "allow_patterns": UPLOADED}
        huggingface_hub.upload_folder(**where, commit_message="End of training")
    except Exception as error:  # as above
        raise Fault(
            f"the run is finished and is in {out}, but cannot be uploaded ({first_line(error)}); "
            f"do it by `hf upload {name} {out} --exclude 'checkpoint-*'`"
        ) from None
    tqdm.write(f"uploaded to https://huggingface.co/{name}")
