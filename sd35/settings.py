"""Every argument of the trainer with its remark, the released recipes, and the parser.

The comment above or beside a field is its help text.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

# The settings of the authors' trainer, github.com/Luo-Yihong/DGPO at commit 01ceb4b, read by
# running its config files, where they differ from the defaults below. A task follows the reward,
# and is a function there: geneval_sd3_4gpu, general_ocr_sd3_4gpu, pickscore_sd3_4gpu. A recipe says
# where guidance is used, wins over the task, and is a file: dgpo.py, dgpo_wocfg.py and
# dgpo_wocfg_emaref.py; the last two have no PickScore. Their issue 9 advises the last for GenEval,
# with 24 groups of 24. For cfg_free, their README.md:161 has clip 1e-5, KL 1e-3. For cfg_free_ema,
# reference_guidance_scale (kl_cfg) is 1.0 there; their README.md:175 adds "or 4.5/3.5".
RELEASED: dict[str, dict[str, Any]] = {
    "geneval": dict(t_min=0.8, std="group", old_after=500),
    "ocr": dict(),
    "pickscore": dict(group_size=24, beta=10.0, kl=0.001, clip=5e-2, ema_updates=4),
    "guided": dict(),
    "cfg_free": dict(
        guidance_scale=1.0, reference_guidance_scale=4.5, clip=1e-3, eval_inference_steps=10
    ),
    "cfg_free_ema": dict(
        guidance_scale=1.0, reference_guidance_scale=4.5, clip=1e-5, eval_inference_steps=10,
        beta=2000.0, kl=0.001, ema_reference=True,
    ),
}  # fmt: skip
ALIASES = {"pretrained_model_name_or_path": ["--model"]}


class UserError(Exception):
    """An ordinary mistake, in one plain sentence. A script prints it and exits with 2."""


@dataclass
class Settings:
    """Train a LoRA of Stable Diffusion 3.5 by DGPO. The defaults are the released settings."""

    # The model to train: its name on the Hugging Face hub, or its folder.
    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-3.5-medium"
    # What to train on: names of rewards, or file.py:function, each optionally followed by =weight.
    # The reward also selects the task's settings and prompts.
    reward: list[str] = field(default_factory=lambda: ["pickscore"])
    reward_model: list[str] = field(default_factory=list)  # Other weights for a reward: name=path.
    eval_reward: list[str] = field(default_factory=list)  # Rewards to watch, but not to train on.
    # Several rewards: add their advantages (the default), or add them and take one advantage.
    combine: Literal["advantages", "rewards"] | None = None
    # Where guidance is used. guided: in the rollout. cfg_free: by the reference alone, which is
    # faster and moves further from the base model. cfg_free_ema: likewise, theta_old in the gap.
    recipe: Literal["guided", "cfg_free", "cfg_free_ema"] = "guided"
    # A .txt or .jsonl file, or a published list. Default: the paper's list for the reward.
    train_prompts: str | None = None
    # Prompts to draw during training. Default: up to 8 held out of the training prompts.
    validation_prompts: str | None = None
    # Start from the LoRA in this folder. The reference is still the base model.
    init_lora: str | None = None
    output_dir: str = "runs/dgpo"  # The folder of the run.
    seed: int = 0  # Decides everything that is random.

    # P: groups in a step, over all processes. The authors advise 24. (num_groups)
    prompts_per_step: int = 8
    # G: images per prompt. The authors advise 24. If memory is short, lower --micro_batch_size.
    group_size: int = 16
    max_train_steps: int = 1000  # Steps, each with a rollout.
    micro_batch_size: str = "auto"  # Maximum number of images in one pass. Changes no result.
    resolution: int = 512  # Side of the images in pixels, a multiple of 16.
    max_sequence_length: int = 128  # Maximum number of tokens that T5 reads.

    sampler: Literal["dpm++", "euler"] = "dpm++"  # The rollout's deterministic sampler.
    num_inference_steps: int = 10  # Steps of the sampler.
    flow_shift: float = 3.0  # Shift of the sampler's times towards noise.
    guidance_scale: float = 4.5  # Guidance of the rollout; 1 is none.
    offline: bool = False  # Let the reference draw all samples (Section 4.3).

    train_timesteps: int = 4  # K: number of the rollout's times that each group is trained at.
    # Lowest time to train at; 1 is pure noise. Raise it if artefacts of the rollout, such as blur,
    # are learned. (trunc_steps: the noisiest 7, or for GenEval 5, of 10)
    t_min: float = 0.6
    # How fast the gate closes as the gap grows. Raise it if the reward is hacked. (beta_dpo)
    beta: float = 100.0
    # Weight of the KL. Raise it if images get worse as the reward rises. (train.beta)
    kl: float = 0.02
    # Drop a good sample once exp(L_old - L_theta) exceeds 1 + clip, and a bad one once it falls
    # below 1 - clip; 0 is off. Lower it if training is unsteady. (clip_range)
    clip: float = 1e-2
    # Divide advantages by the std of the group's rewards, or of the whole step's. (global_std)
    std: Literal["group", "batch"] = "batch"
    # Guidance of the frozen reference's velocity; 1 is none. (kl_cfg)
    reference_guidance_scale: float = 1.0
    ema_reference: bool = False  # Use theta_old as the reference in the gap, not in the KL.
    old_ema_decay: float = 0.3  # Decay of theta_old. It grows by 0.001 a step up to this.
    old_after: int = 200  # Steps after which theta_old draws the rollouts. (switch_ema_ref)

    # Not in the paper. m: train on the m/2 worst and the m/2 best images of each group only.
    train_samples: int | None = None
    # Not in the paper. Holds theta's velocity on bad samples to theta_old's: 2 mirrors their target
    # at theta_old, so that their loss cannot fall without end; 0 is off.
    bound: float = 0.0
    updates_per_rollout: int = 1  # Not in the paper. U: optimizer updates from each rollout.

    rank: int = 64  # Rank of the LoRA.
    lora_alpha: int = 128  # LoRA alpha: the update is scaled by alpha / rank.
    learning_rate: float = 3e-4  # AdamW's learning rate.
    lr_scheduler: Literal["constant", "cosine"] = "constant"  # A cosine falls to 0 at the end.
    lr_warmup_steps: int = 0  # Steps in which the learning rate rises from 0.
    adam_weight_decay: float = 1e-4  # AdamW's weight decay.
    max_grad_norm: float = 1.0  # The norm that a step's gradient is clipped to.
    ema_decay: float = 0.9  # Decay of the saved average of weights, after its warm-up.
    ema_steps: int = 8  # Steps between updates of the saved average.
    ema_updates: int = 2  # Updates of the saved average each time. (num_batches_per_epoch)
    mixed_precision: Literal["no", "bf16"] | None = None  # Default: bf16 if the GPU has it.
    # Recompute all blocks in the backward pass. Default: yes, or as auto --micro_batch_size needs.
    gradient_checkpointing: bool | None = None
    quantize: Literal["none", "int8"] = "none"  # Hold the frozen base in 8 bits.
    compile: bool = False  # Compile the transformer's blocks. Its speed on a GPU is not measured.

    checkpointing_steps: int = 50  # Steps between checkpoints.
    checkpoints_total_limit: int = 3  # How many checkpoints to keep.
    resume_from_checkpoint: str | None = None  # "latest", or a checkpoint of this run.
    validation_steps: int = 50  # Steps between validation images.
    eval_inference_steps: int = 14  # Sampler steps of the validation images. (eval_num_steps)
    report_to: str = "none"  # A tracker of accelerate's, such as tensorboard or wandb.
    push_to_hub: bool = False  # Upload the result. Run `hf auth login` first.
    hub_model_id: str | None = None  # Its name on the hub. Default: that of --output_dir.
    config: str | None = None  # A YAML file of these settings. Flags win.
    print_settings: bool = False  # Print the resolved settings as YAML, and exit.

    def __post_init__(self) -> None:
        """Check what would otherwise run, or fail late. Raises UserError."""
        self.combine = self.combine or ("advantages" if len(self.reward) > 1 else "rewards")
        m, number = self.train_samples or 2, self.micro_batch_size.replace("auto", "1")
        positive = "prompts_per_step num_inference_steps train_timesteps beta rank learning_rate "
        positive += "updates_per_rollout ema_steps checkpoints_total_limit checkpointing_steps "
        positive += "validation_steps"
        for rule, broken in {
            **{f"{name} must be above 0": getattr(self, name) <= 0 for name in positive.split()},
            "group_size must be at least 2": self.group_size < 2,
            "micro_batch_size must be a number or auto": not number.isdecimal() or not int(number),
            "resolution must be a multiple of 16": self.resolution % 16,
            "train_samples must be even and at most --group_size": m % 2 or m > self.group_size,
        }.items():
            if broken:
                raise UserError(f"--{rule}, got {getattr(self, rule.split()[0])}")


def task_of(rewards: list[str]) -> str:
    """The task whose released settings and prompts are the defaults for these rewards."""
    names = " ".join(name for name in rewards if ":" not in name)
    return "geneval" if "geneval" in names else "ocr" if "ocr" in names else "pickscore"


def learning_rate_at(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 0: a function, so that no checkpoint stores it."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / max(1, settings.max_train_steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return settings.learning_rate * (cosine if settings.lr_scheduler == "cosine" else 1)


def parse(cls: type, argv: list[str] | None = None) -> Any:
    """Parse a command line into the dataclass `cls`. --t-min is --t_min; a bool has --no_x.

    The values of a YAML file --config, and the released settings, stand in for defaults. Exits with
    2 if an argument is wrong.
    """
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False)
    remarks, hints, switches = remarks_of(cls), get_type_hints(cls), set()
    for one in dataclasses.fields(cls):
        name, hint = one.name, hints[one.name]
        is_list = get_origin(hint) is list
        if is_list or NoneType in get_args(hint):
            hint = get_args(hint)[0]
        default = one.default_factory() if is_list else one.default
        values = [f"{key} {table[name]}" for key, table in RELEASED.items() if name in table]
        if default is not None:
            remarks[name] += f" (default: {', '.join([str(default), *values])})"
        options = {"dest": name, "default": default, "help": remarks[name].replace("%", "%%")}
        flags = [f"--{name}", *ALIASES.get(name, [])]
        if hint is bool:
            switches.add(name)
            parser.add_argument(*flags, action="store_true", **options)
            parser.add_argument(f"--no_{name}", action="store_false", dest=name, default=default)
        elif get_origin(hint) is Literal:
            parser.add_argument(*flags, choices=get_args(hint), **options)
        else:
            parser.add_argument(*flags, type=hint, nargs="+" if is_list else None, **options)

    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), w) for w in argv]
    first = parser.parse_known_args(argv)[0]
    if getattr(first, "config", None):
        argv = [*words_of_yaml(first.config, switches), *argv]
        first = parser.parse_known_args(argv)[0]
    if hasattr(first, "recipe"):
        parser.set_defaults(**RELEASED[task_of(first.reward)] | RELEASED[first.recipe])
    return cls(**vars(parser.parse_args(argv)))


def remarks_of(cls: type) -> dict[str, str]:
    """The comment above or beside each field of a dataclass, by its name."""
    remarks, above = {}, []
    for line in "".join(inspect.getsource(c) for c in cls.mro()[-2::-1]).splitlines():
        code, _, comment = line.strip().partition("# ")
        if name := re.match(r"(\w+): ", code):
            remarks[name[1]] = " ".join([*above, comment]).strip()
        above = [*above, comment] if comment and not code else []
    return remarks


def words_of_yaml(path: str, switches: set[str]) -> list[str]:
    """A YAML file of settings as the words of a command line. Raises UserError."""
    try:
        values = dict(yaml.safe_load(Path(path).read_text("utf-8")) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from None
    words = []
    for name, value in values.items():
        name = str(name).replace("-", "_")
        if name in switches and value is not None:
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:  # YAML reads a bare `no`, as in mixed_precision, as false
            words.append(f"--{name}={'no' if value is False else value}")
    return words
