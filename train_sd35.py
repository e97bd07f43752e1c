"""Algorithm 1 of DGPO (arXiv:2510.08425) on Stable Diffusion 3.5 Medium with LoRA.

    python train_sd35.py --reward pickscore                       # one GPU
    accelerate launch train_sd35.py --reward pickscore            # all GPUs of a machine, or more

The method is dgpo.py's. This file is what surrounds it: arguments, models, the rollout, the step,
what is logged and saved, and the loop, which is Algorithm 1. Times are those of the shifted
schedule, in [0, 1], with 1 = pure noise; a diffusers model takes 1000 times that.
"""

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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import matplotlib.pyplot
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    HfArgumentParser,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

import dgpo
import prompts as prompt_sets
import rewards

matplotlib.use("agg")
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

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
LORA_TARGETS = [
    f"attn.{name}"
    for name in ("add_k_proj add_q_proj add_v_proj to_add_out to_k to_q to_v to_out.0".split())
]
# What a run may be resumed with another value of, because it does not change the steps.
NOT_OF_THE_STEPS = (
    "max_train_steps micro_batch_size gradient_checkpointing checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint report_to validation_steps output_dir config "
    "eval_reward"
).split()


def option(default: Any, text: str, *aliases: str, **metadata: Any) -> Any:
    metadata = {"help": text, **metadata}
    if aliases:
        metadata["aliases"] = list(aliases)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class MicroBatch(int):
    """A number of images; "auto", to be found, is 0."""

    def __new__(cls, value: str | int) -> MicroBatch:
        try:
            return super().__new__(cls, 0 if value == "auto" else value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number or auto, got {value}") from None


@dataclass
class Arguments:
    """Train a LoRA of Stable Diffusion 3.5 by DGPO. Where the default is None, a recipe has it."""

    pretrained_model_name_or_path: str = option(
        "stabilityai/stable-diffusion-3.5-medium", "model, by name or folder", "--model"
    )
    reward: list[str] = option(
        ["pickscore"], "what to train on: name, name=weight ..., or file.py:function"
    )
    reward_model: list[str] = option([], "other weights for a reward: name=path ...")
    eval_reward: list[str] = option([], "scored on the validation prompts, and never trained on")
    recipe: str | None = option(
        None,
        "released settings; by default those of the reward, or pickscore's",
        choices=list(RECIPES),
    )
    train_prompts: str | None = option(
        None,
        ".txt (a prompt a line) or .jsonl, or a list by name: geneval, ocr, pickscore, ..._test, "
        "drawbench; by default the paper's list for the reward",
    )
    validation_prompts: str | None = option(
        None, "the same; by default up to 8 prompts that are taken out of the training prompts"
    )
    output_dir: str = option("runs/dgpo", "folder of this run")
    seed: int = option(0, "of everything that is random")

    prompts_per_step: int | None = option(None, "P: groups an optimiser step, over all processes")
    group_size: int | None = option(None, "G: images of a prompt")
    max_train_steps: int = option(1000, "optimiser steps")
    micro_batch_size: MicroBatch = option(
        4, "most images in a pass, or auto: bounds the memory and changes nothing else"
    )
    resolution: int = option(512, "of the images, in pixels, a multiple of 16")
    max_sequence_length: int = option(128, "of T5's tokens for a prompt")

    sampler: str = option("dpm++", "of the rollout", choices=["dpm++", "euler"])
    num_inference_steps: int = option(10, "of the rollout")
    flow_shift: float = option(3.0, "of the sampler's schedule")
    guidance_scale: float | None = option(None, "in the rollout; 1 is none")
    offline: bool = option(False, "take all samples from the reference (Section 4.3)")

    train_timesteps: int = option(4, "K: timesteps a group is trained at, of the rollout's own")
    t_min: float | None = option(None, "least of them, in the shifted time of the sampler, 0 to 1")
    beta: float | None = option(None, "steepness of the gate, S being the group's mean")
    kl: float | None = option(None, "weight of the squared distance to the reference's velocity")
    clip: float | None = option(None, "PPO-style clip of exp(L_old - L_theta); 0 is none")
    std: str | None = option(
        None,
        "that advantages are divided by: the group's or the batch's",
        choices=["group", "batch"],
    )
    reference_guidance_scale: float | None = option(None, "in the reference's velocity")
    ema_reference: bool | None = option(None, "the old policy is the reference (cfg_free_ema)")
    old_ema_decay: float = option(0.3, "of theta^-, which is reached at 0.001 a step")
    old_after: int | None = option(None, "steps after which the samples come from theta^-")

    rank: int = option(64, "of the LoRA")
    lora_alpha: int = option(128, "of the LoRA")
    learning_rate: float = option(3e-4, "of AdamW")
    lr_scheduler: str = option(
        "constant",
        "of the learning rate; cosine falls to 0 at --max_train_steps",
        choices=["constant", "cosine"],
    )
    adam_weight_decay: float = option(1e-4, "of AdamW")
    max_grad_norm: float = option(1.0, "that the gradient is clipped to")
    ema_decay: float = option(0.9, "of the weights that are validated and saved")
    ema_steps: int = option(8, "optimiser steps between updates of these")
    mixed_precision: str | None = option(
        None, "by default bf16 on a GPU, no on a CPU", choices=["no", "bf16"]
    )
    gradient_checkpointing: bool = option(True, "less memory, a third more time in training")

    checkpointing_steps: int = option(50, "between checkpoints")
    checkpoints_total_limit: int = option(3, "most of them to keep")
    resume_from_checkpoint: str | None = option(None, "'latest', or a checkpoint's folder")
    validation_steps: int = option(50, "between pictures of the validation prompts")
    report_to: str | None = option(
        None, "a tracker, besides metrics.jsonl", choices=["tensorboard", "wandb"]
    )
    config: str | None = option(None, "YAML or JSON file of these arguments; flags win")
    plan: bool = option(False, "print the memory and FLOPs SD3.5 Medium takes, and end")
    benchmark: int = option(
        0, "time so many steps and end; without --model, of random weights and no downloads"
    )


class Fault(Exception):
    """What ends the run with one line: what is wrong, what was given, what to do."""


class Stopped(Exception):
    """A signal asked the run to end."""


def parse(arguments: type, argv: list[str]) -> Any:
    """A command line as a dataclass. Raises Fault at the first thing that is wrong with it."""

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Fault(message)

    args, unknown = Parser(arguments).parse_args_into_dataclasses(
        argv, return_remaining_strings=True
    )
    if unknown:
        raise Fault(f"there is no argument {unknown[0]}; --help lists them")
    return args


def read_config(path: str) -> list[str]:
    """A YAML or JSON file's arguments, as a command line has them. Raises Fault."""
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise Fault(f"argument --config: cannot read {path} ({line})") from None
    if not isinstance(settings, dict):
        raise Fault(f"argument --config: {path} must have a line 'argument: value' for each")
    known = {f.name for f in dataclasses.fields(Arguments)}
    line = []
    for name, value in settings.items():
        if name not in known:
            raise Fault(f"argument --config: {path} has no argument {name}")
        if value is not None and value != []:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def parse_args(argv: list[str] | None = None) -> Arguments:
    """The arguments, resolved and checked as far as can be without loading a model."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(Arguments, argv)
    if args.config:
        args = parse(Arguments, [*read_config(args.config), *argv])  # what comes last wins

    name = args.reward[0].split("=")[0]
    args.recipe = args.recipe or (name if name in RECIPES else "pickscore")
    for key, value in RECIPES[args.recipe].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.mixed_precision is None:
        args.mixed_precision = "bf16" if has_bf16() else "no"
    check(args)
    return args


def has_bf16() -> bool:
    """A GPU that computes in bf16, and does not only imitate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def make_folder(name: str) -> Path:
    """--output_dir. Raises Fault if nothing can be written to it."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Fault(f"argument --output_dir: cannot write to {out} ({error.strerror})") from None
    return out


def other_weights(specs: list[str]) -> dict[str, str]:
    """--reward_model, by the reward's name. Raises Fault if one has no "="."""
    for spec in specs:
        if "=" not in spec:
            raise Fault(f"argument --reward_model: must be name=path, got {spec}")
    return dict(spec.split("=", 1) for spec in specs)


def check(args: Arguments) -> None:
    """Raises Fault at the first argument that cannot be."""
    bounds = {
        "group_size": (args.group_size >= 2, "at least 2"),
        "prompts_per_step": (args.prompts_per_step >= 1, "at least 1"),
        "max_train_steps": (args.max_train_steps >= 1, "at least 1"),
        "micro_batch_size": (args.micro_batch_size >= 0, "at least 1, or auto"),
        "resolution": (args.resolution > 0 and args.resolution % 16 == 0, "a multiple of 16"),
        "num_inference_steps": (args.num_inference_steps >= 1, "at least 1"),
        "train_timesteps": (args.train_timesteps >= 1, "at least 1"),
        "t_min": (0 <= args.t_min < 1, "in [0, 1)"),
        "beta": (0 < args.beta < math.inf, "above 0"),
        "kl": (args.kl >= 0, "at least 0"),
        "clip": (args.clip >= 0, "at least 0"),
        "learning_rate": (args.learning_rate > 0, "above 0"),
        "rank": (args.rank >= 1, "at least 1"),
        "old_ema_decay": (0 <= args.old_ema_decay <= 1, "in [0, 1]"),
        "ema_decay": (0 <= args.ema_decay <= 1, "in [0, 1]"),
        "ema_steps": (args.ema_steps >= 1, "at least 1"),
        "checkpointing_steps": (args.checkpointing_steps >= 1, "at least 1"),
        "checkpoints_total_limit": (args.checkpoints_total_limit >= 1, "at least 1"),
        "validation_steps": (args.validation_steps >= 1, "at least 1"),
    }
    for name, (fits, needed) in bounds.items():
        if not fits:
            raise Fault(f"argument --{name}: must be {needed}, got {getattr(args, name)}")
    if args.mixed_precision == "bf16" and torch.cuda.is_available():
        if not has_bf16():
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
        flag = "train_prompts"
        if args.train_prompts:
            prompt_sets.load(args.train_prompts)
        flag = "validation_prompts"
        if args.validation_prompts:
            prompt_sets.load(args.validation_prompts)
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        raise Fault(f"argument --report_to: needs `pip install {args.report_to}`")
    other_weights(args.reward_model)
    if args.benchmark or args.plan:
        return
    out = make_folder(args.output_dir)
    kept = out / "arguments.json"
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes there
    if not first or not kept.exists():
        return
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


# Models


def scheduler(args: Arguments) -> Any:
    """The rollout's sampler. Leaving out flow_shift would silently give an unshifted schedule."""
    if args.sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=args.flow_shift)
    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=args.flow_shift
    )


def trained_times(args: Arguments) -> Tensor:
    """Those of the rollout's own times that are at least t_min, noisiest first."""
    sampler = scheduler(args)
    sampler.set_timesteps(args.num_inference_steps)
    times = sampler.sigmas[:-1].float()
    return times[times >= args.t_min]


def load_pipeline(model: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Transformer and text encoders in dtype, the VAE in float32; nothing trains. Raises Fault."""
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            model, dtype={"default": dtype, "vae": torch.float32}
        )
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise Fault(
            f"argument --pretrained_model_name_or_path: cannot load {model} ({line}). Accept its "
            f"licence at https://huggingface.co/{model} and log in by `hf auth login`, or give a "
            "local folder"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def precision(args: Arguments) -> torch.dtype:
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def add_lora(transformer: nn.Module, args: Arguments) -> list[nn.Parameter]:
    """Puts a LoRA that changes nothing yet into the transformer; its parameters, in float32."""
    torch.manual_seed(args.seed)  # the same start on every process
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=LORA_TARGETS,
    )
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The transformer is the reference here."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


@contextlib.contextmanager
def with_values(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The LoRA has these values here. Storage is exchanged, nothing is copied."""

    def exchange() -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data, value.data = value.data, parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()


def seeded(*key: int) -> torch.Generator:
    """Randomness of its own for (seed, what for, step, ...), the same on any process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


NOISE, TIMES, TRAINING_NOISE, ORDER, VALIDATION = range(5)  # what a seed is for


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], whatever the precision of the latents is."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@dataclass
class Encoded:
    embeds: Tensor  # (1, tokens, width)
    pooled: Tensor  # (1, width)


class Encoder:
    """Text encoders that run ahead for some prompts and then leave the device."""

    def __init__(self, pipe: StableDiffusion3Pipeline, args: Arguments, device: torch.device):
        # A pipeline of its own, so that all modules of the other one stay on the device.
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        self.modules = [getattr(pipe, name) for name in names if getattr(pipe, name) is not None]
        self.pipe = StableDiffusion3Pipeline(
            **{**pipe.components, "transformer": None, "vae": None}
        )
        for name in names:
            setattr(pipe, name, None)
        self.length, self.device = args.max_sequence_length, device

    @torch.no_grad()
    def __call__(self, texts: list[str], known: dict[str, Encoded]) -> dict[str, Encoded]:
        """What these and the empty prompt become, on the CPU, each encoded once."""
        texts = list(dict.fromkeys(["", *texts]))
        found = {text: known[text] for text in texts if text in known}
        for module in self.modules:
            module.to(self.device)
        # One by one: what a prompt becomes does not depend on the others of a batch.
        for text in texts:
            if text not in found:
                embeds, _, pooled, _ = self.pipe.encode_prompt(
                    text,
                    text,
                    text,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.length,
                )
                found[text] = Encoded(embeds.float().cpu(), pooled.float().cpu())
        for module in self.modules:
            module.to("cpu")
        return found


# The steps of Algorithm 1


@dataclass
class Trainer:
    """What the steps need. No step changes any of it but the LoRA's values and gradients."""

    args: Arguments
    accelerator: Accelerator
    pipe: StableDiffusion3Pipeline
    parameters: list[nn.Parameter]  # theta
    old: list[Tensor]  # theta^-
    ema: list[Tensor]  # theta's average that is validated and saved
    times: Tensor  # that a group may be trained at
    check_signal: Callable[[], None]
    encoded: dict[str, Encoded] = field(default_factory=dict)  # prompts at hand

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def embedding(self, text: str) -> Encoded:
        found = self.encoded[text]
        return Encoded(found.embeds.to(self.device), found.pooled.to(self.device))

    def sample(self, text: str, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents (N, C, h, w) by the deterministic sampler, from noise of that shape."""
        prompt, empty = self.embedding(text), self.embedding("")
        parts = []
        for x in noise.to(self.device).split(self.args.micro_batch_size):
            self.check_signal()
            expand = [len(x), -1, -1]
            with self.accelerator.autocast():
                output = self.pipe(
                    prompt_embeds=prompt.embeds.expand(expand),
                    pooled_prompt_embeds=prompt.pooled.expand(expand[:2]),
                    negative_prompt_embeds=empty.embeds.expand(expand),
                    negative_pooled_prompt_embeds=empty.pooled.expand(expand[:2]),
                    latents=x,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=self.args.resolution,
                    width=self.args.resolution,
                    output_type="latent",
                )
            parts.append(output.images)
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1]."""
        parts = []
        for x in latents.split(self.args.micro_batch_size):
            self.check_signal()
            parts.append(decode(self.pipe.vae, x))
        return torch.cat(parts)

    def noise(self, *key: int) -> Tensor:
        """eps (C, h, w) on the CPU, from its own seed."""
        side = self.args.resolution // self.pipe.vae_scale_factor
        shape = (self.pipe.transformer.config.in_channels, side, side)
        return torch.randn(shape, generator=seeded(self.args.seed, *key))

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """Line 4: a group's latents (G, C, h, w), by theta^-, or offline by the reference."""
        args = self.args
        noise = torch.stack([self.noise(NOISE, step, p, g) for g in range(args.group_size)])
        if args.offline:
            actor = without_lora(self.pipe.transformer)
        elif step >= args.old_after:
            actor = with_values(self.parameters, self.old)
        else:
            actor = contextlib.nullcontext()
        with actor:
            return self.sample(text, noise, args.num_inference_steps, args.guidance_scale)

    def velocity(self, text: str, guidance: float = 1.0) -> dgpo.Velocity:
        """The transformer as (x_t (B, C, h, w), t (B,), p (B,)) -> v, for one prompt."""
        encoded = [self.embedding(text)]
        if guidance != 1:
            encoded.append(self.embedding(""))

        def v(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
            self.check_signal()
            n, copies = len(x), len(encoded)
            with self.accelerator.autocast():
                output = self.pipe.transformer(
                    hidden_states=x.repeat(copies, 1, 1, 1),
                    timestep=1000 * t.repeat(copies),
                    encoder_hidden_states=torch.cat([e.embeds.expand(n, -1, -1) for e in encoded]),
                    pooled_projections=torch.cat([e.pooled.expand(n, -1) for e in encoded]),
                    return_dict=False,
                )[0].float()
            if copies == 1:
                return output
            conditional, unconditional = output.chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        return v

    def backward_group(
        self, step: int, p: int, text: str, x0: Tensor, advantages: Tensor
    ) -> dict[str, Tensor]:
        """Lines 9 to 13 for one group at K times: adds its share of the step's gradient.

        x0: (G, C, h, w), advantages: (G,). The times are one draw for all groups of the step, and
        each has its own eps, shared by the group.
        """
        args, K = self.args, self.args.train_timesteps
        order = torch.randperm(len(self.times), generator=seeded(args.seed, TIMES, step))
        t = self.times[order[:K], None]  # (K, 1)
        eps = torch.stack([self.noise(TRAINING_NOISE, step, p, k) for k in range(K)])
        theta = self.velocity(text)
        guided = self.velocity(text, args.reference_guidance_scale)

        def old(*inputs: Tensor) -> Tensor:
            with with_values(self.parameters, self.old):
                return theta(*inputs)

        def reference(*inputs: Tensor) -> Tensor:
            if args.ema_reference:
                with with_values(self.parameters, self.old):
                    return guided(*inputs)
            with without_lora(self.pipe.transformer):
                return guided(*inputs)

        metrics = [
            dgpo.backward_group_loss(
                theta,
                reference,
                x0.float()[None],
                eps[k, None, None].to(self.device),
                t[k, None].to(self.device),
                advantages[None].to(self.device),
                args.beta,
                share=1 / args.prompts_per_step / K,
                kl=args.kl,
                clip=args.clip or None,
                velocity_old=old if args.clip else None,
                micro_batch=args.micro_batch_size,
            )
            for k in range(K)
        ]
        return {name: torch.stack([each[name].mean() for each in metrics]) for name in metrics[0]}

    def reduce_gradients(self, stopped: bool) -> bool:
        """The sum over processes, in one exchange for the step, and if any has been stopped."""
        if self.accelerator.num_processes == 1:
            return stopped
        for parameter in self.parameters:
            if parameter.grad is None:  # no group of this process had a preference
                parameter.grad = torch.zeros_like(parameter)
        flag = torch.tensor([float(stopped)], device=self.device)
        flat = torch.cat([flag, *(parameter.grad.flatten() for parameter in self.parameters)])
        flag, flat = self.accelerator.reduce(flat, "sum").split([1, len(flat) - 1])
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, grad in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        return flag.item() > 0


def prompts_of_step(prompts: list[dict], args: Arguments, step: int) -> list[dict]:
    """Line 3: P prompts. The set is gone through in an order of its own in every epoch."""
    chosen = []
    for i in range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step):
        epoch, position = divmod(i, len(prompts))
        order = torch.randperm(len(prompts), generator=seeded(args.seed, ORDER, epoch))
        chosen.append(prompts[order[position]])
    return chosen


def group_advantages(scores: Tensor, std: str) -> tuple[Tensor, Tensor]:
    """Lines 6 and 7: advantages (P, G) of rewards (P, G), and which groups have any (P,).

    A group with a reward that is not finite takes no part, also not in the batch's std.
    """
    finite = scores.isfinite().all(1)
    advantages = torch.zeros_like(scores)
    if finite.any():
        advantages[finite] = dgpo.group_advantages(scores[finite], std, eps=1e-4)
    return advantages, (advantages != 0).any(1)


# What a run leaves on disk


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes aside and renames, so that there is never half a file."""
    new = path.with_name(f".{os.getpid()}-{path.name}")  # keeps the suffix, which says the format
    write(new)
    os.replace(new, path)


def save_lora(trainer: Trainer, folder: Path) -> None:
    """The averaged LoRA as pytorch_lora_weights.safetensors, for load_lora_weights of diffusers."""
    transformer = trainer.pipe.transformer
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        with with_values(trainer.parameters, trainer.ema):
            StableDiffusion3Pipeline.save_lora_weights(
                aside,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                # Without this, the LoRA would be loaded at scale 1 instead of alpha / rank.
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )
        (name,) = os.listdir(aside)
        os.replace(Path(aside) / name, folder / name)


def save_checkpoint(trainer: Trainer, state: dict[str, Any], metrics: Path) -> None:
    """checkpoint-<step>, complete or not there at all; the oldest beyond the limit go."""
    out = Path(trainer.args.output_dir)
    folder = out / f"checkpoint-{state['step']}"
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=out, prefix=".checkpoint-") as aside:
        new = Path(aside) / folder.name
        new.mkdir()
        torch.save(state, new / "state.pt")
        save_lora(trainer, new)
        digest = hashlib.sha256((new / "state.pt").read_bytes()).hexdigest()
        size = metrics.stat().st_size if metrics.exists() else 0
        (new / "complete.json").write_text(json.dumps({"sha256": digest, "metrics_bytes": size}))
        os.replace(new, folder)
    for old in checkpoints(out)[trainer.args.checkpoints_total_limit :]:
        shutil.rmtree(old)


def checkpoints(out: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


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
    figure.supxlabel("optimiser step", fontsize=15)
    replace_file(path, figure.savefig)
    matplotlib.pyplot.close(figure)


def draw_grid(path: Path, texts: list[str], base: Tensor, now: Tensor, title: str) -> None:
    """Rows: prompts. Columns: base | now, from the same noise."""
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
        for column, images in enumerate((base, now)):
            pixels = (images[row] * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            grid.paste(picture, (column * side, y + line))
    path.parent.mkdir(exist_ok=True)
    replace_file(path, grid.save)


def write_card(trainer: Trainer, metrics: Path) -> None:
    """README.md, the model card."""
    args, out = trainer.args, Path(trainer.args.output_dir)
    last = json.loads(metrics.read_text().splitlines()[-1])
    settings = "".join(f"{k}: {v}\n" for k, v in dataclasses.asdict(args).items())
    reward = " ".join(args.reward)
    text = f"""---
base_model: {args.pretrained_model_name_or_path}
library_name: diffusers
tags: [lora, dgpo, sd3]
---
A LoRA trained by DGPO (arXiv:2510.08425) in {last["step"]} steps on the reward {reward}.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(
    "{args.pretrained_model_name_or_path}", torch_dtype=torch.bfloat16
)
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
```

Mean reward in the last step: {last["reward"]:.4g}. Settings:

```
{settings}```

![curves](curves.png)
"""
    replace_file(out / "README.md", lambda new: new.write_text(text))


# The run


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


def take_step(
    trainer: Trainer,
    optimizer: torch.optim.Optimizer,
    scorers: dict[str, tuple[float, rewards.Reward]],
    chosen: list[dict],
    step: int,
) -> dict[str, Any]:
    """Lines 3 to 14 of Algorithm 1. Returns the step's metrics, on every process.

    chosen: the step's prompts. A process takes every N-th of them, whole groups. Raises Fault if a
    reward fails, or no group has rewards that are finite.
    """
    args, accelerator, clock = trainer.args, trainer.accelerator, Clock(trainer.device)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    start = time.perf_counter()
    mine = range(accelerator.process_index, len(chosen), accelerator.num_processes)
    optimizer.zero_grad()

    rows = []
    try:
        with clock("rollout"):  # line 4
            latents = {p: trainer.rollout(step, p, chosen[p]["prompt"]) for p in mine}
        for p in mine:  # line 6
            with clock("decode"):
                images = trainer.decode(latents[p])
            with clock("reward"):
                repeated = [chosen[p]] * args.group_size
                try:
                    scores = {
                        name: rewards.score(name, reward, images, repeated).tolist()
                        for name, (_, reward) in scorers.items()
                    }
                except rewards.RewardError as error:
                    scores = str(error)
            rows.append((p, scores))
    except Stopped:  # a process that waits for this one must hear of it
        rows = [(-1, None)]
    rows = [scores for _, scores in sorted(gather_object(rows), key=lambda row: row[0])]
    if None in rows:
        raise Stopped
    errors = [scores for scores in rows if isinstance(scores, str)]
    if errors:
        raise Fault(errors[0])
    by_name = {name: torch.tensor([row[name] for row in rows]) for name in scorers}  # (P, G) each
    for name, values in by_name.items():
        for p, g in (~values.isfinite()).nonzero().tolist()[: accelerator.is_main_process]:
            tqdm.write(
                f"step {step}: reward {name} is {values[p, g]} for prompt "
                f"{chosen[p]['prompt']!r}, sample {g}; such groups take no part"
            )
    total = sum(weight * by_name[name] for name, (weight, _) in scorers.items())
    finite = total.isfinite().all(1)
    if not finite.any():
        raise Fault(f"step {step}: no group has finite rewards; the run is saved, mend the reward")

    with clock("train"):
        advantages, active = group_advantages(total, args.std)  # line 7
        groups, stopped = [], False
        try:
            for p in mine:
                if active[p]:
                    text = chosen[p]["prompt"]
                    groups.append(trainer.backward_group(step, p, text, latents[p], advantages[p]))
        except Stopped:
            stopped = True
        if trainer.reduce_gradients(stopped):
            raise Stopped
        grad_norm = nn.utils.clip_grad_norm_(trainer.parameters, args.max_grad_norm).item()
        if active.any() and math.isfinite(grad_norm):
            optimizer.step()  # line 14

    names = ("loss", "gap", "gate", "kl", "clipped")
    found = gather_object([[group[name].mean().item() for name in names] for group in groups])
    means = torch.tensor(found).mean(0).tolist() if found else [None] * len(names)
    seconds = time.perf_counter() - start
    values = total[finite]
    metrics = {
        "step": step + 1,
        "reward": values.mean().item(),
        "reward_std": values.std(1, correction=0).mean().item(),
        **{f"reward/{name}": by_name[name][finite].mean().item() for name in scorers},
        **{
            f"reward_std/{name}": by_name[name][finite].std(1, correction=0).mean().item()
            for name in scorers
        },
        "equal_groups": (finite & ~active).float().mean().item(),
        "groups_not_finite": (~finite).float().mean().item(),
        **dict(zip(names, means, strict=True)),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "seconds": seconds,
        **{f"seconds/{phase}": value for phase, value in clock.seconds.items()},
        **{f"share/{phase}": value / seconds for phase, value in clock.seconds.items()},
        "images_per_second": total.numel() / seconds,
    }
    if trainer.device.type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(trainer.device) / 1e9
    return metrics


def learning_rate(args: Arguments, step: int) -> float:
    """Of one step, a function of it and the arguments, so that no checkpoint has to hold it."""
    if args.lr_scheduler == "constant":
        return args.learning_rate
    return args.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / args.max_train_steps))


def follow(trainer: Trainer, step: int) -> None:
    """Line 15: theta^- follows theta, and so does, more seldom, the average that is saved."""
    args = trainer.args
    dgpo.ema_update(trainer.old, trainer.parameters, min(args.old_ema_decay, 0.001 * step))
    if (step + 1) % args.ema_steps == 0:
        dgpo.ema_update(trainer.ema, trainer.parameters, args.ema_decay)


def render(trainer: Trainer, prompts: list[dict]) -> Tensor:
    """A validation picture of each prompt, from noise that is the same at every call."""
    args = trainer.args
    latents = [
        trainer.sample(
            prompt["prompt"],
            trainer.noise(VALIDATION, i)[None],
            args.num_inference_steps,
            args.guidance_scale,
        )
        for i, prompt in enumerate(prompts)
    ]
    return torch.cat([trainer.decode(latent) for latent in latents])


def load_scorers(args: Arguments, device: torch.device, flag: str) -> dict[str, Any]:
    """The rewards that a flag names, with their weights. Raises Fault."""
    models = other_weights(args.reward_model)
    scorers = {}
    for spec in getattr(args, flag):
        name, weight = rewards.parse(spec)
        try:
            scorers[name] = weight, rewards.load(name, device, models.get(name))
        except (OSError, ImportError, ValueError, AttributeError) as error:
            line = str(error).strip().splitlines()[0]
            raise Fault(f"argument --{flag}: cannot load {name} ({line})") from None
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


class Signals:
    """Remembers SIGINT and SIGTERM until the micro-batch is finished."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number: int, frame: object) -> None:
        self.received = number

    def check(self) -> None:
        if self.received:
            raise Stopped


def launch(args: Arguments) -> Accelerator:
    """One of the processes that torchrun or accelerate has started; with neither, the only one."""
    no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return Accelerator(
        cpu=no_gpu,  # or else several processes on a CPU would not find each other
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )


def build(args: Arguments, accelerator: Accelerator, pipe: StableDiffusion3Pipeline) -> Trainer:
    device = accelerator.device
    pipe.scheduler = scheduler(args)
    pipe.transformer.to(device)
    pipe.vae.to(device)
    parameters = add_lora(pipe.transformer, args)
    old, ema = ([p.detach().clone() for p in parameters] for _ in range(2))
    times = trained_times(args)
    return Trainer(args, accelerator, pipe, parameters, old, ema, times, Signals().check)


def fit_micro_batch(trainer: Trainer) -> int:
    """The most images that memory has room for in a pass, by trying: largest first.

    More than all K times of a group are never in one. Raises torch.OutOfMemoryError if not even one
    image fits.
    """
    args, device = trainer.args, trainer.device
    side = args.resolution // trainer.pipe.vae_scale_factor

    def a_pass(m: int) -> None:
        # What Adam will hold, and as much again for what fragmentation takes.
        spare = torch.zeros(4 * sum(p.numel() for p in trainer.parameters), device=device)
        x = torch.randn(m, trainer.pipe.transformer.config.in_channels, side, side)
        trainer.decode(trainer.sample("", x, 1, args.guidance_scale))
        t = torch.full((m,), 0.8, device=device)
        trainer.velocity("")(x.to(device), t, t).square().mean().backward()
        del spare

    G, K = args.group_size, args.train_timesteps
    parts = {math.ceil(G / n) for n in range(1, G + 1)} | {k * G for k in range(1, K + 1)}
    args.micro_batch_size = 1
    a_pass(1)  # also wakes libraries, which take memory of their own
    for m in sorted(parts, reverse=True):
        args.micro_batch_size = m
        try:
            a_pass(m)
            return m
        except RuntimeError as error:  # libraries have their own ways to say it
            memory = any(word in str(error) for word in ("memory", "CUDA", "cuDNN", "CUBLAS"))
            if m == 1 or not memory:
                raise
        finally:
            for parameter in trainer.parameters:
                parameter.grad = None
            torch.cuda.empty_cache()  # which does nothing without a GPU


def train(args: Arguments) -> None:
    """Algorithm 1, from the first step or a checkpoint to the last, and what it leaves on disk."""
    training, validation = read_prompts(args)
    accelerator = launch(args)
    out, main = Path(args.output_dir), accelerator.is_main_process
    metrics_file = out / "metrics.jsonl"
    pipe = load_pipeline(args.pretrained_model_name_or_path, precision(args))
    encode = Encoder(pipe, args, accelerator.device)
    trainer = build(args, accelerator, pipe)
    optimizer = torch.optim.AdamW(
        trainer.parameters, args.learning_rate, weight_decay=args.adam_weight_decay
    )
    scorers = load_scorers(args, accelerator.device, "reward")
    judges = load_scorers(args, accelerator.device, "eval_reward")

    done, bad_steps = 0, 0
    if args.resume_from_checkpoint:
        with accelerator.main_process_first():  # which puts damaged ones aside
            state, size = newest_checkpoint(args)
        if state is not None:
            done, bad_steps = state["step"], state["bad_steps"]
            for name in ("parameters", "old", "ema"):
                for target, value in zip(getattr(trainer, name), state[name], strict=True):
                    target.data.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
        if main and metrics_file.exists() and metrics_file.stat().st_size > size:
            os.truncate(metrics_file, size)  # what came after is about to be done again
    if main:
        for half_written in out.glob(".checkpoint-*"):  # by a run that was killed
            shutil.rmtree(half_written)
        text = json.dumps(dataclasses.asdict(args), indent=1)
        replace_file(out / "arguments.json", lambda new: new.write_text(text))
    if args.report_to:
        accelerator.init_trackers("dgpo", {k: str(v) for k, v in vars(args).items()})

    def save() -> None:
        if main:
            state = {
                "step": done,
                "bad_steps": bad_steps,
                "parameters": [p.detach().cpu() for p in trainer.parameters],
                "old": trainer.old,
                "ema": trainer.ema,
                "optimizer": optimizer.state_dict(),
            }
            save_checkpoint(trainer, state, metrics_file)

    def validate(base: Tensor) -> dict[str, float]:
        with with_values(trainer.parameters, trainer.ema):
            now = render(trainer, validation)
        texts = [prompt["prompt"] for prompt in validation]
        name = f"step-{done:06d}"
        draw_grid(out / "validation" / f"{name}.png", texts, base, now, name)
        try:
            return {
                f"eval{of}/{name}": rewards.score(name, reward, images, validation).mean().item()
                for name, (_, reward) in {**scorers, **judges}.items()
                for of, images in (("_base", base), ("", now))
            }
        except rewards.RewardError as error:
            raise Fault(str(error)) from None

    def own_texts(step: int) -> list[str]:
        chosen = prompts_of_step(training, args, step)
        return [p["prompt"] for p in chosen[accelerator.process_index :: accelerator.num_processes]]

    steps = range(done, args.max_train_steps)
    progress = tqdm(
        steps, "DGPO", args.max_train_steps, initial=done, disable=not main, dynamic_ncols=True
    )
    base = None
    try:
        for step in progress:  # line 1
            chosen = prompts_of_step(training, args, step)  # line 3
            if any(text not in trainer.encoded for text in ["", *own_texts(step)]):
                ahead = range(step, min(step + 16, args.max_train_steps))
                texts = [text for later in ahead for text in own_texts(later)]
                texts += [prompt["prompt"] for prompt in validation if main]
                trainer.encoded = encode(texts, trainer.encoded)
            if not args.micro_batch_size:
                tqdm.write(f"--micro_batch_size auto: {fit_micro_batch(trainer)}")
            if main and base is None:
                with without_lora(pipe.transformer):
                    base = render(trainer, validation)

            optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            metrics = take_step(trainer, optimizer, scorers, chosen, step)  # lines 4 to 14
            bad_steps = 0 if metrics["grad_norm"] is not None else bad_steps + 1
            if not bad_steps:
                follow(trainer, step)  # line 15
            done = step + 1

            last = done == args.max_train_steps
            if main:
                try:
                    if done % args.validation_steps == 0 or last:
                        metrics.update(validate(base))
                finally:  # the step is done, also if its pictures are not
                    with metrics_file.open("a") as file:
                        file.write(json.dumps(metrics) + "\n")
                if done % args.validation_steps == 0 or last:
                    plot_curves(metrics_file, out / "curves.png")
                gate = "-" if metrics["gate"] is None else f"{metrics['gate']:.3f}"
                progress.set_postfix(reward=f"{metrics['reward']:.4g}", gate=gate)
            if args.report_to:
                numbers = {k: v for k, v in metrics.items() if v is not None}
                accelerator.log(numbers, step=done)
            if bad_steps == 5:
                raise Fault(
                    "five steps in a row had a gradient that is not finite; lower "
                    "--learning_rate, or look at the rewards"
                )
            if done % args.checkpointing_steps == 0 or last:
                save()
    except (Stopped, Fault):
        save()
        raise
    if main:
        save_lora(trainer, out)
        write_card(trainer, metrics_file)
        tqdm.write(f"wrote {out / 'pytorch_lora_weights.safetensors'}")
    accelerator.end_training()


# The benchmark


def random_transformer() -> SD3Transformer2DModel:
    """Of SD3.5 Medium's geometry, with random weights."""
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def random_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def random_eye() -> CLIPVisionModel:
    """Of PickScore's geometry, a CLIP ViT-H/14, with random weights."""
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    )
    return CLIPVisionModel(config).requires_grad_(False).eval()


def random_judge(device: torch.device) -> rewards.Reward:
    """A reward that means nothing and costs what PickScore's eye does.

    Not counted: its text encoder, and the processor, which resizes images on the CPU.
    """
    eye = random_eye().to(device)

    @torch.no_grad()
    def judge(images: Tensor, prompts: list[dict]) -> Tensor:
        return eye(nn.functional.interpolate(images, (224, 224))).pooler_output.mean(1)

    return judge


def random_pipeline(args: Arguments) -> StableDiffusion3Pipeline:
    """Transformer and VAE of SD3.5 Medium's geometry with random weights, without text encoders."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = {"transformer": random_transformer().to(precision(args)), "vae": random_vae()}
    for part in parts.values():
        part.requires_grad_(False).eval()
    encoders = {name + i: None for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plan(args: Arguments) -> None:
    """Prints what SD3.5 Medium takes in bf16 at these settings: counted, not measured.

    Nothing is allocated: shapes alone run through the networks, autograd tells what it keeps for
    the backward, and torch counts the FLOPs of matrix products, attention and convolutions.
    """

    def count(model: nn.Module) -> float:
        return sum(parameter.numel() for parameter in model.parameters()) / 1e9

    def forward(images: int) -> Tensor:
        latents = torch.empty(images, 16, args.resolution // 8, args.resolution // 8, dtype=dtype)
        tokens = torch.empty(images, 77 + args.max_sequence_length, 4096, dtype=dtype)
        pooled = torch.empty(images, 2048, dtype=dtype)
        return transformer(latents, tokens, pooled, torch.empty(images)).sample

    def kept(images: int) -> float:
        """Gigabytes of activations, by autograd."""
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = forward(images)  # keeps the graph
        for parameter in transformer.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
        del output
        return sum(storages.values()) / 1e9

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        # As on a GPU. Without a device, torch would choose the one that keeps all scores.
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    def tflop(work: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e12

    dtype, functional = torch.bfloat16, torch.nn.functional
    with torch.device("meta"), patch.object(functional, "scaled_dot_product_attention", attention):
        transformer = random_transformer().to(dtype).requires_grad_(False)
        weights = count(transformer)
        lora = sum(p.numel() for p in add_lora(transformer, args)) / 1e9
        transformer.to(dtype)  # as autocast has it, but for some copies in float32
        transformer.disable_gradient_checkpointing()
        whole = kept(1)
        transformer.enable_gradient_checkpointing()
        inputs = kept(1)
        checkpointed = inputs + (whole - inputs) / 24  # and a block that is computed again
        if not args.gradient_checkpointing:
            transformer.disable_gradient_checkpointing()
        with torch.no_grad():
            theta = tflop(lambda: forward(1))
            with without_lora(transformer):
                reference = tflop(lambda: forward(1))
            vae = random_vae()
            side = args.resolution // 8
            decoding = tflop(lambda: vae.decode(torch.empty(1, 16, side, side)))
            eye = random_eye()
            judging = tflop(lambda: eye(torch.empty(1, 3, 224, 224)))
        backward = tflop(lambda: forward(1).sum().backward())
        encoders = count(T5EncoderModel(T5Config(**T5_XXL)))
        encoders += count(CLIPTextModel(CLIPTextConfig(**CLIP_L)))
        encoders += count(CLIPTextModel(CLIPTextConfig(**CLIP_G)))
    # The decoder's widest map has 256 channels at full size; a few of them live at once.
    decode = 4 * (256 * args.resolution**2 * 4) / 1e9
    always = 2 * weights + 24 * lora + 4 * count(vae)

    print(f"SD3.5 Medium in bf16 at {args.resolution} px, LoRA of rank {args.rank}, in GB")
    for name, size in {
        f"transformer, {weights:.2f} G parameters in bf16": 2 * weights,
        f"LoRA, {1000 * lora:.1f} M in float32, its gradient, Adam, theta^- and EMA": 24 * lora,
        "VAE in float32": 4 * count(vae),
        "text encoders in bf16, at times and without activations": 2 * encoders,
        "together, while prompts are encoded": always + 2 * encoders,
    }.items():
        print(f"{size:8.2f}  {name}")
    sizes = sorted({1, 2, 4, 8, 12, 24, 48, args.micro_batch_size} - {0})
    print(f"together, by images a pass {''.join(f'{m:8d}' for m in sizes)}")
    for name, each in {
        "training": checkpointed,
        "  without checkpointing": whole,
        "decoding, about": decode,
    }.items():
        print(f"{name:27}{''.join(f'{always + m * each:8.2f}' for m in sizes)}")
    print(f"Most images a pass, if a tenth and {REWARD_GB} GB stay free, which PickScore takes:")
    for card in (16, 24, 40, 80):
        room = 0.9 * card - REWARD_GB - always
        most = [int(room / max(decode, each)) for each in (checkpointed, whole)]
        fits = f"{most[0]}, and {most[1]} without gradient checkpointing"
        print(f"{card:8} GB  {fits if room > 2 * encoders else 'no room for the text encoders'}")

    images, K = args.prompts_per_step * args.group_size, args.train_timesteps
    guided, guided_reference = (
        1 if scale == 1 else 2 for scale in (args.guidance_scale, args.reference_guidance_scale)
    )
    again = args.micro_batch_size < args.group_size  # theta once more, for S
    work = {
        "rollout": args.num_inference_steps * guided * theta,
        "decode": decoding,
        "reward, PickScore's eye": judging,
        "train": K * (guided_reference * reference + (bool(args.clip) + again) * theta + backward),
    }
    print(f"TFLOP of a step of {args.prompts_per_step} groups of {args.group_size}:")
    for name, each in {**work, "together": sum(work.values())}.items():
        print(f"{images * each:8.0f}  {name}")
    hours = images * sum(work.values()) * args.max_train_steps / 3600
    print(
        f"{hours / 400:8.1f}  hours for {args.max_train_steps} steps, at 400 TFLOP/s all the time"
    )


REWARD_GB = 3.9  # PickScore's weights in float32
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}


# torch counts the FLOPs of attention on a GPU, and leaves out that of a CPU, which has the same.
for of in ("", "_backward"):
    gpu, cpu = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{of}")
        for device in ("", "_for_cpu")
    )
    flop_registry[cpu] = flop_registry[gpu]


class Account(TorchDispatchMode):
    """FLOPs, bytes and the least seconds of each phase, operation by operation.

    An operation takes at least its FLOPs at the peak of matrix products in its precision ("busy"),
    and at least its bytes, in and out, at the peak of memory (the roofline; Williams et al. 2009).
    Fused kernels and caches move fewer bytes than are counted.
    """

    def __init__(self, peaks: dict[torch.dtype, float], bandwidth: float):
        super().__init__()
        self.peaks, self.bandwidth = peaks, bandwidth
        self.phases: dict[str, Counter[str]] = {}  # the seconds also by kind of operation

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.now = self.phases.setdefault(phase, Counter())
        with self:
            yield

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:  # if it is made of others, count those
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not func.is_view and "view" not in str(func) and "empty" not in str(func):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
            dtype = next((x.dtype for x in tree_leaves(out) if torch.is_tensor(x)), None)
            busy = flops / self.peaks.get(dtype, self.peaks[torch.float32])
            seconds = max(busy, moved / self.bandwidth)
            kind = "others"
            if count:
                kind = "attention" if "attention" in str(func) else "products"
            self.now.update(
                {"flops": flops, "bytes": moved, "busy": busy, "seconds": seconds, kind: seconds}
            )
        return out


def measured_peaks(device: torch.device) -> tuple[dict[torch.dtype, float], float]:
    """FLOPs a second of a large matrix product by precision, bytes a second of a large copy."""
    n = 8192 if device.type == "cuda" else 2048

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):  # the first is to warm up
            clock = Clock(device)
            with clock("work"):
                work()
            seconds.append(clock.seconds["work"])
        return min(seconds[1:])

    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
        peaks[dtype] = 2 * n**3 / best(lambda: a @ b)  # noqa: B023
    c = torch.empty(16 * n * n, device=device, dtype=torch.uint8)
    return peaks, 2 * c.nbytes / best(c.clone)


def bare_passes(
    trainer: Trainer, text: str, judge: rewards.Reward | None, clock: Clock | Account
) -> None:
    """A group's network passes by themselves: the same batches, nothing around them."""
    args, transformer = trainer.args, trainer.pipe.transformer
    side = args.resolution // trainer.pipe.vae_scale_factor
    shape = (args.group_size, transformer.config.in_channels, side, side)
    x0 = torch.randn(shape, device=trainer.device)
    found = trainer.embedding(text)

    def forward(x: Tensor, guidance: float) -> Tensor:
        n = len(x) * (1 if guidance == 1 else 2)
        with trainer.accelerator.autocast():
            return transformer(
                hidden_states=x.repeat(n // len(x), 1, 1, 1),
                timestep=torch.full((n,), 800.0, device=x.device),
                encoder_hidden_states=found.embeds.expand(n, -1, -1),
                pooled_projections=found.pooled.expand(n, -1),
                return_dict=False,
            )[0]

    with clock("rollout"), torch.no_grad():
        for x in x0.split(args.micro_batch_size):
            for _ in range(args.num_inference_steps):
                forward(x, args.guidance_scale)
    with clock("decode"):
        images = trainer.decode(x0)
    if judge:
        with clock("reward"):
            judge(images, [])
    times_a_pass = max(1, args.micro_batch_size // args.group_size)  # as backward_group_loss has it
    with clock("train"):
        for rows in x0.repeat(args.train_timesteps, 1, 1, 1).split(times_a_pass * args.group_size):
            batches = rows.split(args.micro_batch_size)
            for x in batches:
                with torch.no_grad():
                    with without_lora(transformer):
                        forward(x, args.reference_guidance_scale)
                    for _ in range(bool(args.clip) + (len(batches) > 1)):  # theta^-, theta for S
                        forward(x, 1.0)
                forward(x, 1.0).float().mean().backward()


def benchmark(args: Arguments) -> None:
    """Times --benchmark steps against their bare network passes, in one run.

    Beside it what the passes must take at the machine's measured peaks, and the share of the peak
    of matrix products that they reach (MFU). Recomputed activations count as work. "products" is
    the share of products, attention and convolutions in the time at the peaks.
    """
    accelerator = launch(args)
    texts = ["", *(f"prompt {p}" for p in range(args.prompts_per_step))]
    judge: rewards.Reward | None = None
    if args.pretrained_model_name_or_path == Arguments.pretrained_model_name_or_path:
        pipe = random_pipeline(args)
        tokens = 77 + args.max_sequence_length
        encoded = {
            text: Encoded(torch.randn(1, tokens, 4096), torch.randn(1, 2048)) for text in texts
        }
        judge = random_judge(accelerator.device)
    else:
        pipe = load_pipeline(args.pretrained_model_name_or_path, precision(args))
        encoded = Encoder(pipe, args, accelerator.device)(texts, {})
    trainer = build(args, accelerator, pipe)
    trainer.encoded = encoded
    if not args.micro_batch_size:
        print(f"--micro_batch_size auto: {fit_micro_batch(trainer)}")
    optimizer = torch.optim.AdamW(trainer.parameters, args.learning_rate)
    scorers = {"random": (1.0, judge or (lambda images, prompts: torch.rand(len(images))))}
    chosen = [{"prompt": text} for text in texts[1:]]
    groups = len(range(accelerator.process_index, len(chosen), accelerator.num_processes))

    peaks, bandwidth = measured_peaks(accelerator.device)
    account = Account(peaks, bandwidth)
    take_step(trainer, optimizer, scorers, chosen, 0)  # warm
    bare_passes(trainer, texts[1], judge, account)
    steps, bare = [], []
    for step in range(1, args.benchmark + 1):
        steps.append(take_step(trainer, optimizer, scorers, chosen, step))
        clock = Clock(trainer.device)
        bare_passes(trainer, texts[1], judge, clock)
        bare.append({k: groups * v for k, v in clock.seconds.items()})
    if not accelerator.is_main_process:
        return

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    print(
        f"at most {peaks[torch.float32] / 1e12:.3g} TFLOP/s in float32, "
        f"{peaks[torch.bfloat16] / 1e12:.3g} in bf16, and {bandwidth / 1e9:.3g} GB/s\n"
        f"{'seconds a step':16}{'ours':>10}{'bare passes':>14}{'overhead':>10}"
        f"{'TFLOP':>10}{'GB':>10}{'at the peaks':>14}{'products':>10}{'MFU':>8}"
    )
    whole = Counter()
    for counted in account.phases.values():
        whole.update(counted)
    for phase, counted in {**account.phases, "step": whole}.items():
        ours = mean([m["seconds" if phase == "step" else f"seconds/{phase}"] for m in steps])
        alone = mean([sum(b.values()) if phase == "step" else b[phase] for b in bare])
        flops, moved, least = (groups * counted[k] for k in ("flops", "bytes", "seconds"))
        print(
            f"{phase:16}{ours:>10.3f}{alone:>14.3f}{ours / alone - 1:>10.1%}"
            f"{flops / 1e12:>10.3g}{moved / 1e9:>10.3g}{least:>14.3f}"
            f"{1 - counted['others'] / counted['seconds']:>10.1%}"
            f"{groups * counted['busy'] / alone:>8.1%}"
        )
    print(f"{mean([m['images_per_second'] for m in steps]):.3f} images a second trained on")
    if "peak_memory_gb" in steps[-1]:
        print(f"{steps[-1]['peak_memory_gb']:.2f} GB at most")


def main() -> None:
    try:
        args = parse_args()
        run = plan if args.plan else benchmark if args.benchmark else train
        run(args)
    except Fault as fault:
        print(f"train_sd35.py: {fault}", file=sys.stderr)
        sys.exit(2)
    except Stopped:
        saved = ", and saved; continue with --resume_from_checkpoint latest"
        print(f"train_sd35.py: stopped{'' if args.benchmark else saved}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        line = str(error).splitlines()[0]
        print(
            f"train_sd35.py: out of memory ({line}); lower --micro_batch_size, which does not "
            "change the result; if it is 1, or prompts are being encoded, this device is too small",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
