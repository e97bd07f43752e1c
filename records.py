"""What a person reads of a run of train_sd35.py: metrics, curves, pictures, and the model card.

metrics.jsonl has a line a step. Means are over the step's groups, null where there is none, or
where it is not finite.

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
import errno
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.pyplot
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import rewards
import sd35
from cli import Fault, first_line, replace_file

matplotlib.use("agg")
matplotlib.rcdefaults()  # whatever a matplotlibrc says


@contextlib.contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turns what goes wrong in writing something into a Fault."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise Fault(
            f"cannot write {what} ({first_line(error)}); mend that, or make room, and resume"
        ) from None


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


def warn_of_not_finite(step: int, name: str, scores: Tensor, chosen: list[dict]) -> None:
    """Says which is the first of a reward's scores (P, G) that is not finite, if one is."""
    for p, g in (~scores.isfinite()).nonzero().tolist()[:1]:
        about = f"reward {name} is {scores[p, g]} for prompt {chosen[p]['prompt']!r}, sample {g}"
        tqdm.write(f"step {step}: {about}; such groups take no part")


def mean_over_processes(groups: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Means over all processes' groups with a preference, the KL's over all groups. Or None."""
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
    finite = {k: x if x is None or math.isfinite(x) else None for k, x in metrics.items()}
    line = (json.dumps(finite) + "\n").encode()
    with writing(path), path.open("ab", buffering=0) as file:
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
        replace_file(metrics, lambda new: new.write_text("".join(kept), "utf-8"))
    else:
        metrics.unlink()


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Those of a step's metrics that can be drawn."""
    return {k: x for k, x in metrics.items() if isinstance(x, int | float) and abs(x) < 1e300}


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
    with writing("what the tracker keeps"):
        accelerator.log(numbers(metrics), metrics["step"])
        if not picture.exists():
            return
        images = np.asarray(Image.open(picture))[None]  # (1, H, W, 3)
        for tracker in accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images}, step=metrics["step"], **layout)


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
    with writing(path):
        replace_file(path, figure.savefig)
    matplotlib.pyplot.close(figure)


def sheet(rows: list[tuple[str, list[str], Tensor]], side: int, columns: int = 1) -> Image.Image:
    """Pictures to look at: rows of a heading, a caption a picture, and images (N, 3, H, W).

    side: what each picture is made, in pixels. The heading stands above its pictures, cut to their
    width, and the captions underneath. columns: how many of the rows stand side by side.
    """
    line, width = 22, side * max((len(images) for _, _, images in rows), default=1)
    height = max(1, math.ceil(len(rows) / columns)) * (side + 2 * line)
    drawn = Image.new("RGB", (columns * width, height), "white")
    pen = ImageDraw.Draw(drawn)
    for i, (heading, captions, images) in enumerate(rows):
        x, y = i % columns * width, i // columns * (side + 2 * line)
        heading = " ".join(heading.split())  # one line
        while pen.textlength(heading, font_size=14) > width - 8 and len(heading) > 1:
            heading = heading[:-2] + "…"
        pen.text((x + 4, y + 3), heading, fill="black", font_size=14)
        for caption, pixels in zip(captions, rewards.to_bytes(images), strict=True):
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            drawn.paste(image, (x, y + line))
            pen.text((x + 4, y + line + side + 3), caption, fill="black", font_size=14)
            x += side
    return drawn


def draw_grid(path: Path, texts: list[str], base: Tensor, now: Tensor, title: str) -> None:
    """A picture with a pair for each prompt: base on the left, now on the right, from one noise.

    So many pairs stand side by side that it becomes about as wide as high.
    """
    pairs = zip(texts, base, now, strict=True)
    rows = [(text, ["base", title], torch.stack(images)) for text, *images in pairs]
    side = base.shape[-1] * max(1, 192 // base.shape[-1])  # small ones are enlarged
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, sheet(rows, side, columns=max(1, round(math.sqrt(len(rows) / 2)))).save)


def validate(
    path: Path,
    prompts: list[dict],
    base: Tensor,
    now: Tensor,
    watched: dict[str, tuple[float, rewards.Reward]],
    device: torch.device,
) -> dict[str, float]:
    """Draws the pictures (N, 3, H, W) of base and now side by side. Returns their mean rewards.

    They are scored on the device, 16 at a time, whatever their number. Raises Fault if a reward
    fails.
    """
    draw_grid(path, [prompt["prompt"] for prompt in prompts], base, now, path.stem)

    def mean_score(name: str, reward: rewards.Reward, images: Tensor) -> float:
        parts = [
            rewards.score(name, reward, images[i : i + 16].to(device), prompts[i : i + 16])
            for i in range(0, len(images), 16)
        ]
        return torch.cat(parts).mean().item()

    try:
        return {
            f"eval{of}/{name}": mean_score(name, reward, images)
            for name, (_, reward) in watched.items()
            for of, images in (("_base", base), ("", now))
        }
    except rewards.RewardError as error:
        raise Fault(str(error)) from None


def is_on_hub(name: str) -> bool:
    """Whether a name can be a repository's, and is no folder's here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def without_folders(value: Any) -> Any:
    """A setting as it may be shown: of a path on this machine, only the file's name."""
    if isinstance(value, list):
        return " ".join(map(without_folders, value))
    if not isinstance(value, str) or is_on_hub(value):
        return value
    return re.sub("[^=]*/", "", value)


def write_card(args: Any, metrics: Path) -> None:
    """README.md, the model card. It names no folder of this machine."""
    last = numbers((read_lines(metrics) or [{}])[-1])
    given = args.pretrained_model_name_or_path
    model = given if is_on_hub(given) else "a local folder"
    base_model = f"base_model: {model}\n" if is_on_hub(given) else ""
    kept = {**vars(args), "pretrained_model_name_or_path": model}
    settings = "".join(f"{name}: {without_folders(value)}\n" for name, value in kept.items())
    lora = args.hub_model_id if args.push_to_hub else "."
    watched = [key.removeprefix("eval/") for key in last if key.startswith("eval/")]
    rows = [
        (without_folders(name), last[f"eval_base/{name}"], last[f"eval/{name}"])
        for name in watched
        if f"eval_base/{name}" in last
    ]
    scores = "".join(f"| {name} | {base:.4g} | {now:.4g} |\n" for name, base, now in rows)
    text = f"""---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, dgpo, sd3, diffusers, text-to-image]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last.get("step", 0)} steps on the reward {without_folders(args.reward)}.
It is meant for guidance {args.guidance_scale:g} (1 is none) at {args.resolution} x {args.resolution} pixels, and was watched at {args.eval_inference_steps} steps.

| mean reward on the validation prompts, from the same noise | base | this LoRA |
|---|---|---|
{scores}
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
    replace_file(
        Path(args.output_dir) / "README.md", lambda new: new.write_text(text, "utf-8", "replace")
    )


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
    files = [sd35.LORA_FILE, "README.md", "curves.png", "metrics.jsonl", "validation/*"]
    try:
        where = {"repo_id": name, "folder_path": out, "allow_patterns": files}
        huggingface_hub.upload_folder(**where, commit_message="End of training")
    except Exception as error:  # as above
        raise Fault(
            f"the run is finished and is in {out}, but cannot be uploaded ({first_line(error)}); "
            f"do it by `hf upload {name} {out} --exclude 'checkpoint-*'`"
        ) from None
    tqdm.write(f"uploaded to https://huggingface.co/{name}")
