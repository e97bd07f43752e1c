"""What a person sees of a run: metrics, curves, validation images, and the model card."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor

from rewards import Reward, score, to_bytes
from sd35.lora import LORA_FILE, one_line
from sd35.model import VALIDATION, Model, seeded
from sd35.run import read_metrics, replace_file
from sd35.settings import Settings, UserError

SHOWN = 32  # validation prompts on the sheet; all are scored

GLOSSARY = """\
- reward, reward_std: mean, and mean std within a group, of the rewards' weighted sum; /NAME is one
  reward alone. The mean should rise; as the std nears 0, groups teach nothing any more.
- info/NAME/KEY: mean of a number that a reward returned beside its scores.
- equal_groups, groups_not_finite: share of groups with equal rewards, which only the KL trains, and
  share of groups that are left out because a score is NaN.
- loss, gap, gate: Eq. 17, the gap as a mean over the group, and sigmoid(-beta gap). The gate falls
  from 0.5 as the gap grows; near 0 training stands still: lower beta.
- clipped: share of the samples that the clip dropped.
- kl: mean square of theta's velocity minus the reference's. If it only grows while images get
  worse, raise kl.
- grad_norm: before clipping; null if the update was skipped because the norm is not finite.
- seconds, images_per_second, peak_memory_gb: of the whole step. seconds/PHASE: rollout, decode,
  wait (for scores) and train; reward runs beside them.
- step, learning_rate: the number of the step, from 1, and its learning rate.
- eval/NAME, eval_base/NAME: mean reward of the validation images by the saved average and by the
  base model, from the same noise, of the prompts for which both have a score. If reward rises and
  these fall, the reward is being hacked.
"""


def reward_metrics(
    scores: dict[str, tuple[float, Tensor]], advantages: Tensor, finite: Tensor
) -> dict[str, float]:
    """Means over the groups with finite scores, and shares of all groups.

    scores: a weight and the scores (P, G) by the reward's name. advantages: (P, G). finite: (P,).
    """
    total = sum(weight * values for weight, values in scores.values())
    metrics = {}
    for name, values in {"": total, **{f"/{k}": v for k, (_, v) in scores.items()}}.items():
        values = values[finite]
        metrics[f"reward{name}"] = values.mean().item()
        metrics[f"reward_std{name}"] = values.std(1, correction=0).mean().item()
    equal = finite & (advantages == 0).all(1)
    metrics["equal_groups"] = equal.float().mean().item()
    metrics["groups_not_finite"] = (~finite).float().mean().item()
    return metrics


def mean_over_processes(groups: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Means over all processes' groups with a preference; the KL's over all trained groups."""
    names = ("loss", "gap", "gate", "clipped", "kl")
    rows = [[group[k].float().mean().item() for k in (*names, "preferred")] for group in groups]
    rows = gather_object(rows)
    means: dict[str, float | None] = {}
    for i, name in enumerate(names):
        values = [row[i] for row in rows if row[-1] or name == "kl"]
        means[name] = sum(values) / len(values) if values else None
    return means


def plot_curves(metrics: Path, path: Path) -> None:
    """curves.png: the numbers of metrics.jsonl that a person wants to see."""
    lines = read_metrics(metrics)
    panels = {
        "reward": ["reward"],
        "std of the reward in a group": ["reward_std"],
        "gate": ["gate"],
        "share clipped, of equal groups": ["clipped", "equal_groups"],
        "KL (squared velocity)": ["kl"],
        "validation": sorted({key for line in lines for key in line if key.startswith("eval")}),
    }
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), dpi=80, layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                style = "o" if len(points) == 1 else "--" if "base" in key else "-"
                axis.plot(*zip(*points, strict=True), style, label=re.sub("/.*:", " ", key))
        axis.set_title(title, fontsize=15)
        axis.tick_params(labelsize=12)
        if len(axis.lines) > 1:
            axis.legend(fontsize=11, frameon=False)
    figure.supxlabel("step", fontsize=15)
    replace_file(path, figure.savefig)
    plt.close(figure)


def sheet(rows: list[tuple[str, list[str], Tensor]], side: int, columns: int = 1) -> Image.Image:
    """Images to look at, in rows of (heading, a caption for each image, images (N, 3, H, W)).

    side: each image's side in the sheet, in pixels. columns: how many rows stand side by side.
    """
    line, width = 22, side * max(len(images) for _, _, images in rows)
    drawn = Image.new(
        "RGB", (columns * width, math.ceil(len(rows) / columns) * (side + 2 * line)), "white"
    )
    pen = ImageDraw.Draw(drawn)
    for i, (heading, captions, images) in enumerate(rows):
        x, y = i % columns * width, i // columns * (side + 2 * line)
        heading = " ".join(heading.split())
        while pen.textlength(heading, font_size=14) > width - 8:
            heading = heading[:-2] + "…"
        pen.text((x + 4, y + 3), heading, fill="black", font_size=14)
        for caption, pixels in zip(captions, to_bytes(images), strict=True):
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            drawn.paste(image, (x, y + line))
            pen.text((x + 4, y + line + side + 3), caption, fill="black", font_size=14)
            x += side
    return drawn


def validation_sheet(texts: list[str], base: Tensor, now: Tensor, title: str) -> Image.Image:
    """Pairs of images, base on the left and now on the right, for the first SHOWN prompts."""
    pairs = list(zip(texts, base, now, strict=True))[:SHOWN]
    rows = [(text, ["base", title], torch.stack(images)) for text, *images in pairs]
    side = base.shape[-1] * max(1, 192 // base.shape[-1])  # small ones are enlarged
    return sheet(rows, side, columns=max(1, round(math.sqrt(len(rows) / 2))))


class Validation:
    """Draws the validation prompts by the saved average, beside the base model, and scores both.

    rewards: a weight and a reward by its name. thread: the one in which rewards are called.
    """

    def __init__(
        self,
        settings: Settings,
        model: Model,
        prompts: list[dict],
        rewards: dict[str, tuple[float, Reward]],
        thread: ThreadPoolExecutor,
    ):
        self.settings, self.model, self.prompts = settings, model, prompts
        self.rewards, self.thread = rewards, thread
        self.base: Tensor | None = None

    def draw(self) -> Tensor:
        """Images (N, 3, H, W) of the prompts on the CPU, from the same noise at every call."""
        steps, guidance = self.settings.eval_inference_steps, self.settings.guidance_scale
        images = []
        for i, prompt in enumerate(self.prompts):
            generator = seeded(self.settings.seed, VALIDATION, i)
            noise = torch.randn(1, *self.model.latent_shape, generator=generator)
            latents = self.model.sample(prompt["prompt"], noise, steps, guidance)
            images.append(self.model.decode(latents).cpu())
        return torch.cat(images)

    def scores(self, name: str, images: Tensor) -> Tensor:
        """The scores (N,) of the images, 16 at a time."""
        scores = []
        for i in range(0, len(images), 16):
            part = images[i : i + 16].to(self.model.device)
            scores.append(score(name, self.rewards[name][1], part, self.prompts[i : i + 16])[0])
        return torch.cat(scores)

    def __call__(self, done: int) -> tuple[dict[str, float], np.ndarray]:
        """Save the sheet of a step. Returns the mean scores, and the sheet (H, W, 3)."""
        if self.base is None:
            with self.model.reference():
                self.base = self.draw()
        with self.model.saved_average():
            now = self.draw()
        texts, title = [prompt["prompt"] for prompt in self.prompts], f"step-{done:06d}"
        sheet = validation_sheet(texts, self.base, now, title)
        replace_file(Path(self.settings.output_dir) / "validation" / f"{title}.png", sheet.save)

        means = {}
        for name in self.rewards:
            pairs = [self.thread.submit(self.scores, name, x).result() for x in (self.base, now)]
            scored = torch.stack(pairs).isfinite().all(0)  # a pair with a NaN does not count
            for kind, values in zip(("eval_base", "eval"), pairs, strict=True):
                means[f"{kind}/{name}"] = values[scored].mean().item()
        return means, np.asarray(sheet)


def public(value: Any) -> Any:
    """A setting as it may be shown to others: of a path on this machine, only the file's name."""
    if isinstance(value, list):
        return [public(one) for one in value]
    is_path = (
        isinstance(value, str) and "/" in value and not re.fullmatch(r"[\w.-]+/[\w.-]+", value)
    )
    return re.sub("[^=]*/", "", value) if is_path or Path(str(value)).exists() else value


def write_card(settings: Settings, out: Path) -> None:
    """README.md, the model card. It names no folder of this machine."""
    last = (read_metrics(out / "metrics.jsonl") or [{}])[-1]
    shown = {name: public(value) for name, value in asdict(settings).items()}
    model, reward = shown["pretrained_model_name_or_path"], " ".join(shown["reward"])
    base_model = f"base_model: {model}\n" if "/" in model else ""
    names = [key.removeprefix("eval/") for key in last if key.startswith("eval/")]
    scores = "".join(
        f"| {public(name)} | {last[f'eval_base/{name}']:.4g} | {last[f'eval/{name}']:.4g} |\n"
        for name in names
        if None not in (last[f"eval_base/{name}"], last[f"eval/{name}"])
    )
    text = f"""---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, dgpo, sd3, diffusers, text-to-image]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last.get("step", 0)} steps on the reward {reward},
for guidance {settings.guidance_scale:g} (1 is none) and images of {settings.resolution} pixels.

| mean reward on the validation prompts, from the same noise | base | this LoRA |
|---|---|---|
{scores}
```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{model}", torch_dtype=torch.bfloat16)
pipe.load_lora_weights("{settings.hub_model_id or "."}", weight_name="{LORA_FILE}")
image = pipe(
    "a prompt",
    guidance_scale={settings.guidance_scale:g},
    num_inference_steps=40,
    height={settings.resolution},
    width={settings.resolution},
    max_sequence_length={settings.max_sequence_length},
).images[0]
```

The file loads in diffusers, and in ComfyUI and other programs that read diffusers' names of SD3's
layers. Its scale is folded into the weights (alpha equals rank), so its strength is 1 everywhere.
Use it unfused, or fuse it in float32: in bf16, a small update is mostly rounded away.

![curves](curves.png)

What metrics.jsonl has for each step; means are over the step's groups:

{GLOSSARY}
Settings:

```yaml
{yaml.safe_dump(shown, sort_keys=False)}```
"""
    replace_file(out / "README.md", lambda aside: aside.write_text(text, "utf-8"))


def make_repository(settings: Settings) -> None:
    """Make the repository of --push_to_hub, before any work. Raises UserError."""
    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    try:
        settings.hub_model_id = huggingface_hub.create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # the client's own kinds, which change with its releases
        raise UserError(f"--push_to_hub: cannot make {name} ({one_line(error)})") from None


def upload(settings: Settings) -> None:
    """Put the result on the hub."""
    files = [LORA_FILE, "README.md", "curves.png", "metrics.jsonl", "validation/*"]
    where = {"repo_id": settings.hub_model_id, "folder_path": settings.output_dir}
    huggingface_hub.upload_folder(**where, allow_patterns=files, commit_message="End of training")
