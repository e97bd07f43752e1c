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
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor
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
    "eval_reward eval_inference_steps print_arguments"
).split()


def claim_folder(args: Any) -> Path:
    """--output_dir, made if need be, and no other run's until this process ends.

    Until its first checkpoint, a folder holds no run. Raises Fault if it holds another run, or what
    is no run's, or if a run is at work in it.
    """
    out = make_folder(args.output_dir)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the one that writes there
        return out
    lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)  # held for as long as the process lives
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Fault(
            f"argument --output_dir: a run is at work in {out}; give another folder"
        ) from None
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
    may_differ = {*NOT_OF_THE_STEPS} - (
        {"max_train_steps"} if args.lr_scheduler == "cosine" else {*()}
    )
    for name, value in vars(args).items():
        if name not in may_differ and before.get(name) != value:
            raise Fault(
                f"argument --{name}: the run in {out} has {before.get(name)}, got {value}; "
                "give what it has, or another --output_dir"
            )
    return out


def begin(out: Path, args: Any) -> None:
    """Writes arguments.json, and removes what a run that was killed has left half written."""
    for half_written in out.glob(".checkpoint-*"):
        shutil.rmtree(half_written)
    if not checkpoints(out):
        (out / "metrics.jsonl").unlink(missing_ok=True)
    text = json.dumps(vars(args), indent=1)
    replace_file(out / "arguments.json", lambda new: new.write_text(text))


def checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def save_checkpoint(out: Path, model: sd35.Model, state: dict[str, Any], limit: int) -> None:
    """checkpoint-<step>, complete or not there at all; the oldest beyond the limit go.

    state: besides what the model's is, what else has to be kept: tensors and numbers, and "step".
    There is none of no step, nor of a theta that is not finite.
    """
    folder, metrics = out / f"checkpoint-{state['step']}", out / "metrics.jsonl"
    if folder.exists() or not state["step"] or not is_finite(model.theta):
        return
    theta = [parameter.detach().cpu() for parameter in model.theta]
    state = {**state, "parameters": theta, "old": model.old, "ema": model.average}
    with tempfile.TemporaryDirectory(dir=out, prefix=".checkpoint-") as aside:
        new = Path(aside) / folder.name
        new.mkdir()
        torch.save(state, new / "state.pt")
        sd35.save_lora(model, new)
        digest = hashlib.sha256((new / "state.pt").read_bytes()).hexdigest()
        size = metrics.stat().st_size if metrics.exists() else 0
        (new / "complete.json").write_text(json.dumps({"sha256": digest, "metrics_bytes": size}))
        os.replace(new, folder)
    for old in checkpoints(out)[limit:]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], int]:
    """The state, and the bytes of metrics.jsonl that belong to it. Raises Fault if damaged."""
    try:
        complete = json.loads((folder / "complete.json").read_text())
        content = (folder / "state.pt").read_bytes()
        if hashlib.sha256(content).hexdigest() != complete["sha256"]:
            raise ValueError("its checksum is another")
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return state, complete["metrics_bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"checkpoint {folder} is missing or damaged ({error})") from None


def newest_checkpoint(out: Path, asked: str) -> tuple[dict[str, Any] | None, int]:
    """The checkpoint in a folder, or of 'latest' the newest in `out` that is not damaged."""
    if asked != "latest":
        return load_checkpoint(Path(asked))
    for folder in checkpoints(out):
        try:
            return load_checkpoint(folder)
        except Fault as fault:
            tqdm.write(f"{fault}: taking the one before")
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
    return None, 0


def restore(model: sd35.Model, state: dict[str, Any]) -> None:
    """Gives theta, theta_old and the saved average what a checkpoint holds."""
    for name, tensors in {
        "parameters": model.theta,
        "old": model.old,
        "ema": model.average,
    }.items():
        assign(tensors, state[name])


def resume(out: Path, asked: str, model: sd35.Model, optimizer: Optimizer) -> tuple[int, int]:
    """Puts a run in `out`, and its metrics.jsonl, where a checkpoint was.

    Returns the steps done, and the bad ones among the last. Raises Fault if it is damaged.
    """
    (state, size), metrics = newest_checkpoint(out, asked), out / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > size:
        os.truncate(metrics, size)  # what came after is about to be done again
    if state is None:
        return 0, 0
    restore(model, state)
    optimizer.load_state_dict(state["optimizer"])
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
    """Writes a step's metrics. Raises Fault, for instance on a full disk."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as error:
        raise Fault(f"cannot write {path} ({first_line(error)}); make room, and resume") from None


def plot_curves(metrics: Path, path: Path) -> None:
    """curves.png: what a person wants to see of metrics.jsonl."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
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
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            kind, _, name = key.partition("/")  # of own rewards, only the function's name
            if points:
                axis.plot(*zip(*points, strict=True), style, label=f"{kind} {name.split(':')[-1]}")
        axis.set_title(title, fontsize=15)
        axis.tick_params(labelsize=12)
        if len(axis.lines) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 2}
            axis.legend(fontsize=10, frameon=False, **below)
    figure.supxlabel("step", fontsize=15)
    replace_file(path, figure.savefig)
    matplotlib.pyplot.close(figure)


def sheet(rows: list[tuple[str, list[str], Tensor]], side: int) -> Image.Image:
    """Pictures to look at: rows of a heading, a caption a picture, and images (N, 3, H, W).

    side: what each picture is made, in pixels. The heading stands above its pictures, cut to their
    width, and the captions underneath.
    """
    line, width = 22, side * max((len(images) for _, _, images in rows), default=1)
    sheet = Image.new("RGB", (width, max(1, len(rows)) * (side + 2 * line)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (heading, captions, images) in enumerate(rows):
        y = row * (side + 2 * line)
        while pen.textlength(heading, font_size=14) > width - 8 and len(heading) > 1:
            heading = heading[:-2] + "…"
        pen.text((4, y + 3), heading, fill="black", font_size=14)
        for column, (caption, pixels) in enumerate(
            zip(captions, rewards.to_bytes(images), strict=True)
        ):
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (column * side, y + line))
            place = (column * side + 4, y + line + side + 3)
            pen.text(place, caption, fill="black", font_size=14)
    return sheet


def draw_grid(path: Path, texts: list[str], base: Tensor, now: Tensor, title: str) -> None:
    """A picture with a prompt a row: base on the left, now on the right, from the same noise."""
    pairs = zip(texts, base, now, strict=True)
    rows = [(text, ["base", title], torch.stack(images)) for text, *images in pairs]
    side = base.shape[-1]
    path.parent.mkdir(exist_ok=True)
    replace_file(path, sheet(rows, side * max(1, 192 // side)).save)  # small ones are enlarged


def write_card(args: Any, metrics: Path) -> None:
    """README.md, the model card."""
    last = json.loads(metrics.read_text().splitlines()[-1])
    settings = "".join(f"{k}: {v}\n" for k, v in vars(args).items())
    text = f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
tags: [lora, dgpo, sd3]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last["step"]} steps on the reward {" ".join(args.reward)}.
It is meant for guidance {args.guidance_scale:g} (1 is none) at {args.resolution} x {args.resolution} pixels, and was watched at {args.eval_inference_steps} steps.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
    "{args.pretrained_model_name_or_path}", torch_dtype=torch.bfloat16
)
pipe.load_lora_weights(".", weight_name="{sd35.LORA_FILE}")
image = pipe(
    "a prompt",
    guidance_scale={args.guidance_scale:g},
    num_inference_steps=40,
    height={args.resolution},
    width={args.resolution},
    max_sequence_length={args.max_sequence_length},
).images[0]
```

Mean reward in the last step: {last["reward"]:.4g}. Settings:

```
{settings}```

![curves](curves.png)
"""  # noqa: E501
    replace_file(Path(args.output_dir) / "README.md", lambda new: new.write_text(text))
