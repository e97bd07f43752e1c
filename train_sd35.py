"""Algorithm 1 of DGPO (arXiv:2510.08425) on Stable Diffusion 3.5 Medium with LoRA.

    python train_sd35.py --reward pickscore                       # one GPU
    accelerate launch train_sd35.py --reward pickscore            # all GPUs of a machine, or more

The method is dgpo.py's, and the model sd35.py's. This file is what surrounds them: arguments, the
step, what is logged and saved, and the loop, which is Algorithm 1.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import yaml

import cli
from cli import Fault, Stopped, first_line, option, replace_file

# The settings of the authors' released trainer (github.com/Luo-Yihong/DGPO). t_min leaves the
# noisiest 7 of the 10 default steps, or for GenEval 5. One thing is left out: advantages are not
# clipped at +-5, as that would unbalance the weights, and Z(c) would no longer cancel.
RELEASED = {
    "group_size": 16,
    "prompts_per_step": 8,
    "beta": 100.0,
    "kl": 0.02,
    "clip": 1e-2,
    "std": "batch",
    "t_min": 0.6,
    "guidance_scale": 4.5,
    "reference_guidance_scale": 1.0,
    "old_after": 200,
    "ema_reference": False,
}
RECIPES: dict[str, dict[str, Any]] = {
    "geneval": {**RELEASED, "std": "group", "t_min": 0.8, "old_after": 500},
    "ocr": RELEASED,
    "pickscore": {**RELEASED, "group_size": 24, "beta": 10.0, "kl": 0.001, "clip": 5e-2},
    "cfg_free": {
        **RELEASED,
        "guidance_scale": 1.0,
        "reference_guidance_scale": 4.5,
        "clip": 1e-5,
    },
    "cfg_free_ema": {
        **RELEASED,
        "guidance_scale": 1.0,
        "ema_reference": True,
        "beta": 2000.0,
        "clip": 1e-5,
    },
}
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SAMPLERS = ["dpm++", "euler"]
# What a run may be resumed with another value of, because it does not change the steps.
NOT_OF_THE_STEPS = (
    "max_train_steps micro_batch_size gradient_checkpointing checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint report_to validation_steps output_dir config "
    "eval_reward"
).split()


def by_recipe(name: str, text: str, **about: Any) -> Any:
    """An option whose default is the recipe's; the help shows what it is in which."""
    others = [f"{r} {v[name]}" for r, v in RECIPES.items() if v[name] != RELEASED[name]]
    return option(None, text, shown=", ".join([str(RELEASED[name]), *others]), **about)


class MicroBatch(int):
    """A number of images; "auto", to be found, is 0."""

    def __new__(cls, value: str | int) -> MicroBatch:
        try:
            number = super().__new__(cls, 0 if value == "auto" else value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number or auto, got {value}") from None
        if number < 0:
            raise argparse.ArgumentTypeError(f"must be at least 1, or auto, got {value}")
        return number


@dataclass
class Arguments:
    """Train a LoRA of Stable Diffusion 3.5 by DGPO. A recipe brings the released settings."""

    pretrained_model_name_or_path: str = option(
        MEDIUM, "The model to train, by its name on the Hugging Face hub or its folder.", "--model"
    )
    reward: list[str] = option(
        ["pickscore"],
        "What to train on: a reward's name, or file.py:function for one of your own, with =weight "
        "behind it if you like. Of several, the weighted sum counts.",
    )
    reward_model: list[str] = option([], "Other weights for a reward, as name=path.")
    eval_reward: list[str] = option([], "Rewards that are watched in validation, not trained on.")
    recipe: str | None = option(
        None, "Released settings to start from.", choices=list(RECIPES), shown="the reward's"
    )
    train_prompts: str | None = option(
        None,
        "Training prompts: a .txt file (a prompt a line), a .jsonl file, or a published list "
        "(geneval, ocr, pickscore, each also with _test, and drawbench).",
        shown="the paper's list for the recipe",
    )
    validation_prompts: str | None = option(
        None, "Prompts that show the progress.", shown="up to 8 taken out of the training prompts"
    )
    output_dir: str = option("runs/dgpo", "The folder of this run.")
    seed: int = option(0, "Decides everything that is random.", at_least=0)

    prompts_per_step: int | None = by_recipe(
        "prompts_per_step", "P: groups in a step, over all processes together.", at_least=1
    )
    group_size: int | None = by_recipe(
        "group_size", "G: images in a group. If memory is short, keep it.", at_least=2
    )
    max_train_steps: int = option(1000, "How many steps to train for.", at_least=1)
    micro_batch_size: MicroBatch = option(
        4, "Most images in one pass of a network, or auto. It bounds the memory and nothing else."
    )
    resolution: int = option(512, "Side of the images in pixels, a multiple of 16.", at_least=16)
    max_sequence_length: int = option(128, "Most tokens of a prompt that T5 reads.", at_least=1)

    sampler: str = option("dpm++", "The rollout's deterministic sampler.", choices=SAMPLERS)
    num_inference_steps: int = option(10, "Steps of the rollout's sampler.", at_least=1)
    flow_shift: float = option(3.0, "Shift of the sampler's times towards noise.", above=0)
    guidance_scale: float | None = by_recipe(
        "guidance_scale", "Guidance of the rollout. 1 is none and halves its cost."
    )
    offline: bool = option(False, "Draw all samples from the reference (Section 4.3).")

    train_timesteps: int = option(
        4, "K: at how many of the rollout's own times a group is trained in a step.", at_least=1
    )
    t_min: float | None = by_recipe(
        "t_min", "Least time to train at; 1 is pure noise.", at_least=0, below=1
    )
    beta: float | None = by_recipe(
        "beta", "How fast the gate closes as the gap grows. Raise it against hacking.", above=0
    )
    kl: float | None = by_recipe(
        "kl", "Weight of the distance to the reference. Raise it if pictures decay.", at_least=0
    )
    clip: float | None = by_recipe(
        "clip", "PPO-style clip of exp(L_old - L_theta). Less is steadier; 0 is none.", at_least=0
    )
    std: str | None = by_recipe(
        "std", "Whose spread of rewards is 1 in advantages.", choices=["group", "batch"]
    )
    reference_guidance_scale: float | None = by_recipe(
        "reference_guidance_scale", "Guidance of the reference's velocity; 1 is none."
    )
    ema_reference: bool | None = by_recipe("ema_reference", "Take theta_old as the reference.")
    old_ema_decay: float = option(
        0.3, "Decay of theta_old. It grows by 0.001 a step up to this.", at_least=0, at_most=1
    )
    old_after: int | None = by_recipe(
        "old_after", "Steps after which theta_old draws the rollouts.", at_least=0
    )

    rank: int = option(64, "Rank of the LoRA.", at_least=1)
    lora_alpha: int = option(128, "The LoRA is scaled by this over its rank.", at_least=1)
    learning_rate: float = option(3e-4, "AdamW's learning rate.", above=0)
    lr_scheduler: str = option(
        "constant", "A cosine falls to 0 at --max_train_steps.", choices=["constant", "cosine"]
    )
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.", at_least=0)
    max_grad_norm: float = option(1.0, "Norm that a step's gradient is clipped to.", above=0)
    ema_decay: float = option(0.9, "Decay of the saved average.", at_least=0, at_most=1)
    ema_steps: int = option(8, "Steps between updates of the saved average.", at_least=1)
    mixed_precision: str | None = option(
        None, "Precision of all but the LoRA.", choices=["no", "bf16"], shown="bf16 if the GPU can"
    )
    gradient_checkpointing: bool = option(True, "Less memory for a third more time in training.")

    checkpointing_steps: int = option(50, "Steps between checkpoints.", at_least=1)
    checkpoints_total_limit: int = option(3, "How many of the last to keep.", at_least=1)
    resume_from_checkpoint: str | None = option(None, "'latest', or a folder, to continue a run.")
    validation_steps: int = option(50, "Steps between validation pictures.", at_least=1)
    report_to: str | None = option(
        None, "A tracker, besides metrics.jsonl.", choices=["tensorboard", "wandb"]
    )
    config: str | None = option(None, "YAML or JSON file of these arguments. Flags win.")


def read_config(path: str) -> list[str]:
    """A YAML or JSON file's arguments, as a command line has them. Raises Fault."""
    try:
        settings = yaml.load(Path(path).read_text(), yaml.BaseLoader)  # everything as it is written
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Fault(f"argument --config: cannot read {path} ({first_line(error)})") from None
    if not isinstance(settings, dict):
        raise Fault(f"argument --config: {path} must have a line 'argument: value' for each")
    known = {f.name: f for f in dataclasses.fields(Arguments)}
    line = []
    for name, value in settings.items():
        if name not in known:
            raise Fault(f"argument --config: {path} has no argument {name}")
        if value in ("", "null", []):
            continue
        if "bool" in known[name].type:
            line.append(f"--{name}" if value == "true" else f"--no_{name}")
        else:
            line += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return line


def read_arguments(arguments: type = Arguments, argv: list[str] | None = None) -> Any:
    """The command line with --config and the recipe, as far as no library is needed."""
    argv = sys.argv[1:] if argv is None else argv
    args = cli.parse(arguments, argv)
    if args.config:
        args = cli.parse(arguments, [*read_config(args.config), *argv])  # what comes last wins
    if args.resolution % 16:
        raise Fault(f"argument --resolution: must be a multiple of 16, got {args.resolution}")
    name = args.reward[0].split("=")[0]
    args.recipe = args.recipe or (name if name in RECIPES else "pickscore")
    for key, value in RECIPES[args.recipe].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


if __name__ == "__main__":
    cli.run("train_sd35.py", read_arguments)

import matplotlib.pyplot
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import dgpo
import prompts as prompt_sets
import rewards
import sd35

matplotlib.use("agg")
NOISE, TIMES, TRAINING_NOISE, ORDER, VALIDATION = range(5)  # what a seed is for


def parse_args(argv: list[str] | None = None, arguments: type = Arguments) -> Any:
    """The arguments, resolved and checked as far as can be without loading a model."""
    args = read_arguments(arguments, argv)
    if args.mixed_precision is None:
        args.mixed_precision = "bf16" if has_bf16() else "no"
    elif args.mixed_precision == "bf16" and torch.cuda.is_available() and not has_bf16():
        raise Fault("argument --mixed_precision: this GPU has no bf16; give no")
    above = trained_times(args)
    if len(above) < args.train_timesteps:
        raise Fault(
            f"argument --train_timesteps: only {len(above)} of the rollout's "
            f"{args.num_inference_steps} times are at least --t_min {args.t_min}, "
            f"got {args.train_timesteps}"
        )
    flag = "reward"
    try:
        for flag in ("reward", "eval_reward"):
            for spec in getattr(args, flag):
                rewards.parse(spec)
        for flag in ("train_prompts", "validation_prompts"):
            if getattr(args, flag):
                prompt_sets.load(getattr(args, flag))
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        raise Fault(f"argument --report_to: needs `pip install {args.report_to}`")
    cli.pairs(args.reward_model)
    return args


def has_bf16() -> bool:
    """A GPU that computes in bf16, and does not only imitate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def claim_folder(args: Arguments) -> Path:
    """--output_dir, made if need be. Raises Fault if another run is in it."""
    out = cli.make_folder(args.output_dir)
    kept = out / "arguments.json"
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes there
    if not first or not kept.exists():
        return out
    if not args.resume_from_checkpoint:
        raise Fault(
            f"argument --output_dir: {out} holds a run; continue it with "
            "--resume_from_checkpoint latest, or give another folder"
        )
    before = json.loads(kept.read_text())
    for name, value in dataclasses.asdict(args).items():
        of_the_steps = name not in NOT_OF_THE_STEPS or (
            name == "max_train_steps" and args.lr_scheduler == "cosine"
        )
        if of_the_steps and before.get(name) != value:
            raise Fault(
                f"argument --{name}: the run in {out} has {before.get(name)}, got {value}; "
                "give what it has, or another --output_dir"
            )
    return out


def trained_times(args: Arguments) -> Tensor:
    """Those of the rollout's own times that are at least t_min, noisiest first."""
    scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    times = sd35.rollout_times(scheduler, args.num_inference_steps)
    return times[times >= args.t_min]


def seeded(*key: int) -> torch.Generator:
    """Randomness of its own for (seed, what for, step, ...), the same on any process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Clock:
    """Seconds in each phase of a step."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# A step: lines 3 to 15 of Algorithm 1


def prompts_of_step(prompts: list[dict], args: Arguments, step: int) -> list[dict]:
    """Line 3: P prompts. The set is gone through in an order of its own in every epoch."""
    chosen = []
    for i in range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step):
        epoch, position = divmod(i, len(prompts))
        order = torch.randperm(len(prompts), generator=seeded(args.seed, ORDER, epoch))
        chosen.append(prompts[order[position]])
    return chosen


def group_advantages(total: Tensor, std: str) -> tuple[Tensor, Tensor]:
    """Line 7: advantages (P, G) of rewards (P, G), and which groups have any (P,).

    A group with a reward that is not finite takes no part, also not in the batch's std. Raises
    Fault if there is no other.
    """
    finite = total.isfinite().all(1)
    if not finite.any():
        raise Fault("no group has finite rewards; the run is saved, mend the reward")
    advantages = torch.zeros_like(total)
    advantages[finite] = dgpo.group_advantages(total[finite], std, eps=1e-4)
    return advantages, (advantages != 0).any(1)


def learning_rate(args: Arguments, step: int) -> float:
    """A function of the step and the arguments, so that no checkpoint has to hold it."""
    if args.lr_scheduler == "constant":
        return args.learning_rate
    return args.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / args.max_train_steps))


@dataclass
class Trainer:
    """What the steps need, and how far they have come."""

    args: Arguments
    accelerator: Accelerator
    model: sd35.Model
    optimizer: torch.optim.Optimizer
    times: Tensor  # that a group may be trained at
    scorers: dict[str, tuple[float, rewards.Reward]] = field(default_factory=dict)  # with weights
    done: int = 0  # steps
    bad_steps: int = 0  # the last ones, of a gradient that was not finite

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def own(self, groups: Sequence) -> Sequence:
        """Those of a step's groups that are this process's: whole ones, every N-th."""
        return groups[self.accelerator.process_index :: self.accelerator.num_processes]

    def noise(self, *key: int) -> Tensor:
        """eps (C, h, w) on the CPU, from its own seed."""
        return torch.randn(self.model.latent_shape, generator=seeded(self.args.seed, *key))

    def take_step(self, chosen: list[dict], step: int) -> dict[str, Any]:
        """Lines 4 to 14 of Algorithm 1. Returns the step's metrics, on every process.

        chosen: the step's prompts, line 3. Raises Fault if a reward fails or no group has rewards
        that are finite, and Stopped on every process if one has got a signal.
        """
        clock, start = Clock(self.device), time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.optimizer.zero_grad()
        latents, scores = self.draw_and_score(chosen, step, clock)  # lines 4 to 6
        total = sum(weight * scores[name] for name, (weight, _) in self.scorers.items())
        with clock("train"):
            advantages, active = group_advantages(total, self.args.std)  # line 7
            groups = self.backward(chosen, latents, advantages, active, step)  # lines 8 to 13
            grad_norm = self.update(active)  # line 14
        metrics = {
            "step": step + 1,
            **reward_metrics(total, scores, active),
            **mean_over_processes(groups),
            "grad_norm": grad_norm,
            **speed(clock, time.perf_counter() - start, total.numel()),
        }
        if self.device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return metrics

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """Line 4: a group's latents (G, C, h, w), by theta_old, or offline by the reference."""
        args, model = self.args, self.model
        noise = torch.stack([self.noise(NOISE, step, p, g) for g in range(args.group_size)])
        online = model.theta_old if step >= args.old_after else contextlib.nullcontext
        with model.reference() if args.offline else online():
            return model.sample(text, noise, args.num_inference_steps, args.guidance_scale)

    def draw_and_score(
        self, chosen: list[dict], step: int, clock: Clock
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Lines 4 to 6: the latents of this process's groups, and all rewards (P, G), by name."""
        mine, rows, latents = self.own(range(len(chosen))), [], {}
        try:
            with clock("rollout"):
                for p in mine:
                    latents[p] = self.rollout(step, p, chosen[p]["prompt"])
            for p in mine:
                with clock("decode"):
                    images = self.model.decode(latents[p])
                with clock("reward"):
                    rows.append((p, self.score(images, chosen[p])))
        except Stopped:  # a process that waits for this one must hear of it
            rows = [(-1, None)]
        rows = [scores for _, scores in sorted(gather_object(rows), key=lambda row: row[0])]
        if None in rows:
            raise Stopped
        for scores in rows:
            if isinstance(scores, str):
                raise Fault(scores)
        by_name = {name: torch.tensor([row[name] for row in rows]) for name in self.scorers}
        for name, values in by_name.items():
            bad = (~values.isfinite()).nonzero().tolist()
            for p, g in bad[: self.accelerator.is_main_process]:
                tqdm.write(
                    f"step {step}: reward {name} is {values[p, g]} for prompt "
                    f"{chosen[p]['prompt']!r}, sample {g}; such groups take no part"
                )
        return latents, by_name

    def score(self, images: Tensor, prompt: dict) -> dict[str, list[float]] | str:
        """Each reward's scores of a group, or what went wrong, which all processes must hear."""
        prompts = [prompt] * len(images)
        try:
            return {
                name: rewards.score(name, reward, images, prompts).tolist()
                for name, (_, reward) in self.scorers.items()
            }
        except rewards.RewardError as error:
            return str(error)

    def backward(
        self, chosen: list[dict], latents: dict, advantages: Tensor, active: Tensor, step: int
    ) -> list[dict[str, Tensor]]:
        """Lines 8 to 13: the step's gradient, on every process. Returns this one's metrics."""
        groups, stopped = [], False
        try:
            for p, x0 in latents.items():
                if active[p]:
                    text = chosen[p]["prompt"]
                    groups.append(self.backward_group(step, p, text, x0, advantages[p]))
        except Stopped:
            stopped = True
        if self.reduce_gradients(stopped):
            raise Stopped
        return groups

    def backward_group(
        self, step: int, p: int, text: str, x0: Tensor, advantages: Tensor
    ) -> dict[str, Tensor]:
        """Lines 9 to 13 for one group at K times: adds its share of the step's gradient.

        x0: (G, C, h, w), advantages: (G,). The times are one draw for all groups of the step, and
        each has its own eps, shared by the group. Returns metrics (K,).
        """
        args, model, K = self.args, self.model, self.args.train_timesteps
        order = torch.randperm(len(self.times), generator=seeded(args.seed, TIMES, step))
        t = self.times[order[:K], None]  # (K, 1)
        eps = torch.stack([self.noise(TRAINING_NOISE, step, p, k) for k in range(K)])
        compared = model.theta_old if args.ema_reference else model.reference
        metrics = [
            dgpo.backward_group_loss(
                model.velocity(text),
                model.velocity(text, args.reference_guidance_scale, who=compared),
                x0.float()[None],
                eps[k, None, None].to(self.device),
                t[k, None].to(self.device),
                advantages[None].to(self.device),
                args.beta,
                share=1 / args.prompts_per_step / K,
                kl=args.kl,
                clip=args.clip or None,
                velocity_old=model.velocity(text, who=model.theta_old) if args.clip else None,
                micro_batch=model.images_a_pass,
            )
            for k in range(K)
        ]
        return {name: torch.stack([each[name].mean() for each in metrics]) for name in metrics[0]}

    def reduce_gradients(self, stopped: bool) -> bool:
        """The sum over processes, in one exchange for the step, and if any has been stopped."""
        theta = self.model.theta
        if self.accelerator.num_processes == 1:
            return stopped
        for parameter in theta:
            if parameter.grad is None:  # no group of this process had a preference
                parameter.grad = torch.zeros_like(parameter)
        flag = torch.tensor([float(stopped)], device=self.device)
        flat = torch.cat([flag, *(parameter.grad.flatten() for parameter in theta)])
        flag, flat = self.accelerator.reduce(flat, "sum").split([1, len(flat) - 1])
        sizes = [parameter.numel() for parameter in theta]
        for parameter, grad in zip(theta, flat.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        return flag.item() > 0

    def update(self, active: Tensor) -> float | None:
        """Line 14. Returns the gradient's norm; or None, without a step, if it is not finite."""
        theta, most = self.model.theta, self.args.max_grad_norm
        norm = nn.utils.clip_grad_norm_(theta, most).item()
        if active.any() and math.isfinite(norm):
            self.optimizer.step()
        return norm if math.isfinite(norm) else None

    def follow(self, step: int) -> None:
        """Line 15: theta_old follows theta, and so does, more seldom, the saved average."""
        args, model = self.args, self.model
        dgpo.ema_update(model.old, model.theta, min(args.old_ema_decay, 0.001 * step))
        if (step + 1) % args.ema_steps == 0:
            dgpo.ema_update(model.average, model.theta, args.ema_decay)

    def render(self, prompts: list[dict]) -> Tensor:
        """A validation picture of each prompt, from noise that is the same at every call."""
        steps, guidance = self.args.num_inference_steps, self.args.guidance_scale
        latents = [
            self.model.sample(prompt["prompt"], self.noise(VALIDATION, i)[None], steps, guidance)
            for i, prompt in enumerate(prompts)
        ]
        return torch.cat([self.model.decode(latent) for latent in latents])

    def validate(
        self, prompts: list[dict], base: Tensor, watched: dict[str, Any]
    ) -> dict[str, float]:
        """Draws the prompts by the saved average, beside the base model's pictures, scores both.

        watched: rewards besides those that are trained on. Raises Fault if a reward fails.
        """
        with self.model.saved_average():
            now = self.render(prompts)
        title = f"step-{self.done:06d}"
        path = Path(self.args.output_dir) / "validation" / f"{title}.png"
        draw_grid(path, [prompt["prompt"] for prompt in prompts], base, now, title)
        try:
            return {
                f"eval{of}/{name}": rewards.score(name, reward, images, prompts).mean().item()
                for name, (_, reward) in {**self.scorers, **watched}.items()
                for of, images in (("_base", base), ("", now))
            }
        except rewards.RewardError as error:
            raise Fault(str(error)) from None


def reward_metrics(total: Tensor, scores: dict[str, Tensor], active: Tensor) -> dict[str, float]:
    """Means over the groups that took part, and the shares of those that did not."""
    finite = total.isfinite().all(1)

    def spread(values: Tensor) -> float:
        return values[finite].std(1, correction=0).mean().item()

    return {
        "reward": total[finite].mean().item(),
        "reward_std": spread(total),
        **{f"reward/{name}": values[finite].mean().item() for name, values in scores.items()},
        **{f"reward_std/{name}": spread(values) for name, values in scores.items()},
        "equal_groups": (finite & ~active).float().mean().item(),
        "groups_not_finite": (~finite).float().mean().item(),
    }


def mean_over_processes(groups: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """The groups' metrics, or None where no group has any."""
    names = ("loss", "gap", "gate", "kl", "clipped")
    found = gather_object([[group[name].mean().item() for name in names] for group in groups])
    means = torch.tensor(found).mean(0).tolist() if found else [None] * len(names)
    return dict(zip(names, means, strict=True))


def speed(clock: Clock, seconds: float, images: int) -> dict[str, float]:
    return {
        "seconds": seconds,
        **{f"seconds/{phase}": value for phase, value in clock.seconds.items()},
        **{f"share/{phase}": value / seconds for phase, value in clock.seconds.items()},
        "images_per_second": images / seconds,
    }


# What a run leaves on disk


def checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def save_checkpoint(trainer: Trainer, metrics: Path) -> None:
    """checkpoint-<step>, complete or not there at all; the oldest beyond the limit go."""
    out, model = Path(trainer.args.output_dir), trainer.model
    folder = out / f"checkpoint-{trainer.done}"
    if folder.exists() or not trainer.accelerator.is_main_process:
        return
    state = {
        "step": trainer.done,
        "bad_steps": trainer.bad_steps,
        "parameters": [parameter.detach().cpu() for parameter in model.theta],
        "old": model.old,
        "ema": model.average,
        "optimizer": trainer.optimizer.state_dict(),
    }
    with tempfile.TemporaryDirectory(dir=out, prefix=".checkpoint-") as aside:
        new = Path(aside) / folder.name
        new.mkdir()
        torch.save(state, new / "state.pt")
        sd35.save_lora(model, new)
        digest = hashlib.sha256((new / "state.pt").read_bytes()).hexdigest()
        size = metrics.stat().st_size if metrics.exists() else 0
        (new / "complete.json").write_text(json.dumps({"sha256": digest, "metrics_bytes": size}))
        os.replace(new, folder)
    for old in checkpoints(out)[trainer.args.checkpoints_total_limit :]:
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


def newest_checkpoint(args: Arguments) -> tuple[dict[str, Any] | None, int]:
    """What --resume_from_checkpoint asks for; of 'latest', the newest that is not damaged."""
    if args.resume_from_checkpoint != "latest":
        return load_checkpoint(Path(args.resume_from_checkpoint))
    for folder in checkpoints(Path(args.output_dir)):
        try:
            return load_checkpoint(folder)
        except Fault as fault:
            tqdm.write(f"{fault}: taking the one before")
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
    return None, 0


def resume(trainer: Trainer, metrics: Path) -> None:
    """Puts the trainer where a checkpoint was, and metrics.jsonl, too."""
    model, accelerator = trainer.model, trainer.accelerator
    with accelerator.main_process_first():  # which puts damaged ones aside
        state, size = newest_checkpoint(trainer.args)
    if state is not None:
        trainer.done, trainer.bad_steps = state["step"], state["bad_steps"]
        kept = {"parameters": model.theta, "old": model.old, "ema": model.average}
        for name, tensors in kept.items():
            for target, value in zip(tensors, state[name], strict=True):
                target.data.copy_(value)
        trainer.optimizer.load_state_dict(state["optimizer"])
    if accelerator.is_main_process and metrics.exists() and metrics.stat().st_size > size:
        os.truncate(metrics, size)  # what came after is about to be done again


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
    styles = ("-", "--", "-.", ":")
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for i, key in enumerate(keys):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            kind, _, name = key.partition("/")  # of own rewards, only the function's name
            label = f"{kind} {name.split(':')[-1]}"
            axis.plot(*zip(*points, strict=True), styles[i % 4], label=label) if points else None
        axis.set_title(title, fontsize=15)
        axis.tick_params(labelsize=12)
        if len(keys) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 2}
            axis.legend(fontsize=10, frameon=False, **below)
    figure.supxlabel("step", fontsize=15)
    replace_file(path, figure.savefig)
    matplotlib.pyplot.close(figure)


def draw_grid(path: Path, texts: list[str], base: Tensor, now: Tensor, title: str) -> None:
    """A picture with a prompt a row: base on the left, now on the right, from the same noise."""
    side, line = base.shape[-1], 26
    scale = max(1, 192 // side)  # so that small pictures can be looked at
    side *= scale
    grid = Image.new("RGB", (2 * side, (side + line) * len(texts) + line), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((4, 4), f"base | {title}", fill="black", font_size=16)
    for row, text in enumerate(texts):
        y = line + row * (side + line)
        while draw.textlength(text, font_size=14) > 2 * side - 8 and len(text) > 1:
            text = text[:-2] + "…"
        draw.text((4, y + 4), text, fill="black", font_size=14)
        for column, pixels in enumerate(rewards.to_bytes(torch.stack([base[row], now[row]]))):
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            grid.paste(picture, (column * side, y + line))
    path.parent.mkdir(exist_ok=True)
    replace_file(path, grid.save)


def write_card(args: Arguments, metrics: Path) -> None:
    """README.md, the model card."""
    last = json.loads(metrics.read_text().splitlines()[-1])
    settings = "".join(f"{k}: {v}\n" for k, v in dataclasses.asdict(args).items())
    text = f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
tags: [lora, dgpo, sd3]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last["step"]} steps on the reward {" ".join(args.reward)}.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
    "{args.pretrained_model_name_or_path}", torch_dtype=torch.bfloat16
)
pipe.load_lora_weights(".", weight_name="{sd35.LORA_FILE}")
```

Mean reward in the last step: {last["reward"]:.4g}. Settings:

```
{settings}```

![curves](curves.png)
"""  # noqa: E501
    replace_file(Path(args.output_dir) / "README.md", lambda new: new.write_text(text))


# The run


def signal_check() -> Callable[[], None]:
    """Remembers SIGINT and SIGTERM. Returns what raises Stopped once one has come."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *about: received.append(about))

    def check() -> None:
        if received:
            raise Stopped

    return check


def launch(args: Arguments) -> Accelerator:
    """One of the processes that torchrun or accelerate has started; with neither, the only one."""
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(
        cpu=no_gpu,  # or else several processes on a CPU would not find each other
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )


def precision(args: Arguments) -> torch.dtype:
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def build(args: Arguments, accelerator: Accelerator, pipe: StableDiffusion3Pipeline) -> Trainer:
    """A trainer at its first step, without rewards and encoded prompts yet."""
    pipe.scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    pipe.transformer.to(accelerator.device)
    pipe.vae.to(accelerator.device)
    lora = (args.rank, args.lora_alpha, args.seed, args.gradient_checkpointing)
    theta = sd35.add_lora(pipe.transformer, *lora)
    passes = (args.resolution, args.micro_batch_size, accelerator.autocast, signal_check())
    optimizer = torch.optim.AdamW(theta, args.learning_rate, weight_decay=args.adam_weight_decay)
    model = sd35.Model(pipe, theta, *passes)
    return Trainer(args, accelerator, model, optimizer, trained_times(args))


def load_scorers(args: Arguments, device: torch.device, flag: str) -> dict[str, Any]:
    """The rewards that a flag names, with their weights. Raises Fault."""
    models = cli.pairs(args.reward_model)
    scorers = {}
    for spec in getattr(args, flag):
        name, weight = rewards.parse(spec)
        try:
            scorers[name] = weight, rewards.load(name, device, models.get(name))
        except (OSError, ImportError, ValueError, AttributeError) as error:
            raise Fault(f"argument --{flag}: cannot load {name} ({first_line(error)})") from None
    return scorers


def read_prompts(args: Arguments) -> tuple[list[dict], list[dict]]:
    """Training prompts, and validation prompts that are not among them."""
    published = args.recipe if args.recipe in prompt_sets.LISTS else "pickscore"
    try:
        training = prompt_sets.load(args.train_prompts or published)
    except ValueError as error:
        raise Fault(f"argument --train_prompts: {error}") from None
    if args.validation_prompts:
        return training, prompt_sets.load(args.validation_prompts)
    held_out = min(8, len(training) // 8)
    if not held_out:
        return training, training[:1]
    return training[:-held_out], training[-held_out:]


def fit_micro_batch(trainer: Trainer) -> int:
    """The most images that memory has room for in a pass, by trying: largest first.

    More than all K times of a group are never in one. Raises torch.OutOfMemoryError if not even one
    image fits.
    """
    args, model, device = trainer.args, trainer.model, trainer.device

    def a_pass(m: int) -> None:
        model.images_a_pass = m
        # What Adam will hold, and as much again for what fragmentation takes.
        spare = torch.zeros(4 * sum(p.numel() for p in model.theta), device=device)
        x = torch.randn(m, *model.latent_shape)
        model.decode(model.sample("", x, 1, args.guidance_scale))
        t = torch.full((m,), 0.8, device=device)
        model.velocity("")(x.to(device), t, t).square().mean().backward()
        del spare

    G, K = args.group_size, args.train_timesteps
    parts = {math.ceil(G / n) for n in range(1, G + 1)} | {k * G for k in range(1, K + 1)}
    a_pass(1)  # also wakes libraries, which take memory of their own
    for m in sorted(parts, reverse=True):
        try:
            a_pass(m)
            return m
        except RuntimeError as error:  # libraries have their own ways to say it
            memory = any(word in str(error) for word in ("memory", "CUDA", "cuDNN", "CUBLAS"))
            if m == 1 or not memory:
                raise
        finally:
            for parameter in model.theta:
                parameter.grad = None
            torch.cuda.empty_cache()  # which does nothing without a GPU


def train(args: Arguments) -> None:
    """Algorithm 1, from the first step or a checkpoint to the last, and what it leaves on disk."""
    out = claim_folder(args)
    training, validation = read_prompts(args)
    accelerator = launch(args)
    main, metrics_file = accelerator.is_main_process, out / "metrics.jsonl"
    pipe = sd35.load_pipeline(args.pretrained_model_name_or_path, precision(args))
    encode = sd35.Encoder(pipe, args.max_sequence_length, accelerator.device)
    trainer = build(args, accelerator, pipe)
    model = trainer.model
    trainer.scorers = load_scorers(args, accelerator.device, "reward")
    watched = load_scorers(args, accelerator.device, "eval_reward")
    if args.resume_from_checkpoint:
        resume(trainer, metrics_file)
    if main:
        for half_written in out.glob(".checkpoint-*"):  # by a run that was killed
            shutil.rmtree(half_written)
        text = json.dumps(dataclasses.asdict(args), indent=1)
        replace_file(out / "arguments.json", lambda new: new.write_text(text))
    if args.report_to:
        accelerator.init_trackers("dgpo", {k: str(v) for k, v in vars(args).items()})

    def texts_of(step: int) -> list[str]:
        return [prompt["prompt"] for prompt in trainer.own(prompts_of_step(training, args, step))]

    base, steps = None, range(trainer.done, args.max_train_steps)
    bar = {"total": args.max_train_steps, "initial": trainer.done, "dynamic_ncols": True}
    progress = tqdm(steps, "DGPO", disable=not main, **bar)
    try:
        for step in progress:  # line 1
            chosen = prompts_of_step(training, args, step)  # line 3
            if any(text not in model.encoded for text in ["", *texts_of(step)]):
                ahead = range(step, min(step + 16, args.max_train_steps))
                texts = [text for later in ahead for text in texts_of(later)]
                texts += [prompt["prompt"] for prompt in validation if main]
                model.encoded = encode(texts, model.encoded)
            if not model.images_a_pass:
                tqdm.write(f"--micro_batch_size auto: {fit_micro_batch(trainer)}")
            if main and base is None:
                with model.reference():
                    base = trainer.render(validation)

            trainer.optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            metrics = trainer.take_step(chosen, step)  # lines 4 to 14
            trainer.bad_steps = 0 if metrics["grad_norm"] is not None else trainer.bad_steps + 1
            if not trainer.bad_steps:
                trainer.follow(step)  # line 15
            trainer.done = step + 1

            last = trainer.done == args.max_train_steps
            show = main and (trainer.done % args.validation_steps == 0 or last)
            try:
                if show:
                    metrics.update(trainer.validate(validation, base, watched))
            finally:  # the step is done, also if its pictures are not
                if main:
                    with metrics_file.open("a") as file:
                        file.write(json.dumps(metrics) + "\n")
            if show:
                plot_curves(metrics_file, out / "curves.png")
            gate = "-" if metrics["gate"] is None else f"{metrics['gate']:.3f}"
            progress.set_postfix(reward=f"{metrics['reward']:.4g}", gate=gate)
            if args.report_to:
                accelerator.log({k: v for k, v in metrics.items() if v is not None}, trainer.done)
            if trainer.bad_steps == 5:
                raise Fault(
                    "five steps in a row had a gradient that is not finite; lower "
                    "--learning_rate, or look at the rewards"
                )
            if trainer.done % args.checkpointing_steps == 0 or last:
                save_checkpoint(trainer, metrics_file)
    except Fault:
        save_checkpoint(trainer, metrics_file)
        raise
    except Stopped:
        save_checkpoint(trainer, metrics_file)
        saved = "stopped, and saved; continue with --resume_from_checkpoint latest"
        raise Stopped(saved) from None
    if main:
        sd35.save_lora(model, out)
        write_card(args, metrics_file)
        tqdm.write(f"wrote {out / sd35.LORA_FILE}")
    accelerator.end_training()


def main() -> None:
    try:
        train(parse_args())
    except torch.OutOfMemoryError as error:
        raise Fault(
            f"out of memory ({first_line(error)}); lower --micro_batch_size, which does not "
            "change the result; if it is 1, or prompts are being encoded, this device is too small"
        ) from None


if __name__ == "__main__":
    cli.run("train_sd35.py", main)
