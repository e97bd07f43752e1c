"""The trainer's arguments: names, help, limits, and the published settings by task and recipe.

Nothing heavy is imported, so that every script that takes them answers a wrong one at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import cli
import config
from cli import Fault, option

# The settings of the authors' released trainer, github.com/Luo-Yihong/DGPO at commit 01ceb4b, read
# by running its config files. What depends on the task follows the reward, and is a function there:
# geneval_sd3_4gpu, general_ocr_sd3_4gpu, pickscore_sd3_4gpu. What depends on guidance follows the
# recipe, which wins, and is a file: dgpo.py, dgpo_wocfg.py, dgpo_wocfg_emaref.py. There is none for
# PickScore in the last two. The last is what the authors advise for GenEval (their issue 9), with
# 24 groups of 24. The names there stand beside the arguments here.
TASKS, RECIPES = ("geneval", "ocr", "pickscore"), ("guided", "cfg_free", "cfg_free_ema")
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SAMPLERS = ["dpm++", "euler"]


def released(default: Any, text: str, **about: Any) -> Any:
    """An option with a published default, and others by the name of a task or a recipe."""
    others = {name: about.pop(name) for name in (*TASKS, *RECIPES) if name in about}
    shown = ", ".join([str(default), *(f"{name} {value}" for name, value in others.items())])
    return option(None, text, shown=shown, released={"": default, **others}, **about)


def task_of(args: Arguments) -> str:
    """The published task whose settings and prompts are the default: its rewards' neediest."""
    named = [r for r in args.reward if ":" not in r]  # a file of one's own is no task's
    needy = (task for task in ("geneval", "ocr") for r in named if r.startswith(task))
    return next(needy, "pickscore")


class MicroBatch(int):
    """A number of images; "auto", to be found, is 0."""

    def __new__(cls, value: str | int) -> MicroBatch:
        try:
            number = super().__new__(cls, 0 if value == "auto" else value)
        except ValueError:
            number = -1
        if not 0 < number <= 10**6 and value not in ("auto", 0):
            raise argparse.ArgumentTypeError(f"must be 1 to 1000000, or auto, got {value}")
        return number


@dataclass
class Arguments:
    """Train a LoRA of Stable Diffusion 3.5 by DGPO. The defaults are the released settings."""

    pretrained_model_name_or_path: str = option(
        MEDIUM, "The model to train, by its name on the Hugging Face hub or its folder.", "--model"
    )
    reward: list[str] = option(
        ["pickscore"],
        "What to train on: a reward's name, or file.py:function for one of your own, with =weight "
        "behind it if you like. It also decides on the settings of a task, and on the prompts.",
    )
    reward_model: list[str] = option([], "Other weights for a reward than its own, as name=path.")
    eval_reward: list[str] = option([], "Rewards that are watched in validation, not trained on.")
    combine: str | None = option(
        None,
        "How several rewards become one advantage: as the sum of their advantages, each of which "
        "is standardised, so that no unit decides; or as the advantage of their sum.",
        choices=["advantages", "rewards"],
        shown="advantages, if there are several",
    )
    recipe: str = option(
        "guided",
        "Where guidance is used: in the rollout, or by the reference alone (faster, and further "
        "from the base), which is in the gap, or theta_old is instead.",
        choices=list(RECIPES),
    )
    train_prompts: str | None = option(
        None,
        "Training prompts: a .txt file (a prompt a line), a .jsonl file, or a published list "
        "(geneval, ocr, pickscore, each also with _test, and drawbench).",
        shown="the paper's list for the reward",
    )
    validation_prompts: str | None = option(
        None, "Prompts whose pictures are watched.", shown="up to 8 held out of the training's"
    )
    output_dir: str = option("runs/dgpo", "The folder of this run.")
    seed: int = option(0, "Decides everything that is random.", at_least=0, at_most=2**63 - 1)

    prompts_per_step: int = released(  # num_groups, "set to be 24 for better performance"
        8, "P: all processes' groups in a step. The authors advise 24.", at_least=1, at_most=10_000
    )
    group_size: int = released(  # sample.num_image_per_prompt, with the same remark
        16,
        "G: images of a prompt. The authors advise 24. If memory is short, do not lower this, but "
        "--micro_batch_size.",
        pickscore=24,
        at_least=2,
        at_most=10_000,
    )
    max_train_steps: int = option(1000, "Steps, each with a rollout.", at_least=1, at_most=10**9)
    micro_batch_size: MicroBatch = option(
        4, "Most images in one pass of a network, or auto: for the memory. It changes no result."
    )
    resolution: int = option(512, "Side of the images in pixels, a multiple of 16.", at_least=16)
    max_sequence_length: int = option(128, "Most tokens that T5 reads.", at_least=1, at_most=512)

    sampler: str = option("dpm++", "The rollout's deterministic sampler.", choices=SAMPLERS)
    num_inference_steps: int = option(10, "Steps of the sampler.", at_least=1, at_most=1000)
    flow_shift: float = option(
        3.0, "Shift of the sampler's times towards noise.", above=0, at_most=100
    )
    guidance_scale: float = released(  # sample.guidance_scale
        4.5, "Guidance of the rollout; 1 is none.", cfg_free=1.0, cfg_free_ema=1.0, at_least=1
    )
    offline: bool = option(False, "Draw all samples from the reference (Section 4.3).")

    train_timesteps: int = option(
        4, "K: at how many of the rollout's own times a group is trained in a step.", at_least=1
    )
    t_min: float = released(  # trunc_steps = 6, or 4: the noisiest 7, or 5, of the rollout's 10
        0.6,
        "Least time that is trained at, where 1 is pure noise. Raise it if artefacts of the "
        "rollout, such as blur, are learnt.",
        geneval=0.8,
        at_least=0,
        below=1,
    )
    beta: float = released(  # train.beta_dpo
        100.0,
        "How fast the gate closes as the gap grows. It does not change the size of a step. Raise "
        "it if the reward is hacked.",
        pickscore=10.0,
        cfg_free_ema=2000.0,
        above=0,
    )
    kl: float = released(  # train.beta
        0.02,
        "Weight of the KL to the frozen reference. Raise it if pictures get worse as the reward "
        "rises.",
        pickscore=0.001,
        cfg_free_ema=0.001,
        at_least=0,
    )
    clip: float = released(  # clip_range
        1e-2,  # for cfg_free, their README.md:161 advises 1e-5, with a KL of 1e-3
        "A sample is dropped once exp(L_old - L_theta) has left 1 by this. Lower it if training is "
        "unsteady; 0 is no clip.",
        **{"pickscore": 5e-2, "cfg_free": 1e-3, "cfg_free_ema": 1e-5},
        at_least=0,
    )
    std: str = released(  # sample.global_std
        "batch",
        "What advantages are divided by: the std of the group's rewards, or of all of the step.",
        geneval="group",
        choices=["group", "batch"],
    )
    reference_guidance_scale: float = released(  # kl_cfg, in config/dgpo_wocfg_emaref.py 1.0, but
        1.0,  # "1.0 # or 4.5/3.5" in their README.md:175
        "Guidance of the frozen reference's velocity; 1 is none.",
        cfg_free=4.5,
        cfg_free_ema=4.5,
        at_least=0,
    )
    ema_reference: bool = released(  # use_ema_ref
        False, "Compare with theta_old in the gap, but not in the KL.", cfg_free_ema=True
    )
    old_ema_decay: float = option(
        0.3, "Decay of theta_old. It grows by 0.001 a step up to this.", at_least=0, at_most=1
    )
    old_after: int = released(  # switch_ema_ref
        200, "Steps after which theta_old draws the rollouts.", geneval=500, at_least=0
    )

    train_samples: int | None = option(
        None,
        "m: train on the m/2 worst and the m/2 best images of each group, and save the time for "
        "the others. Not in the paper.",
        shown="all of the group",
        at_least=2,
    )
    bound: float = option(
        0.0,
        "Weight that keeps theta's velocity on bad samples near theta_old's; 2 mirrors their "
        "target at theta_old, so that they are not un-denoised without end; 0 is none. It needs a "
        "theta_old that lags: --old_ema_decay, --updates_per_rollout. Not in the paper.",
        at_least=0,
    )
    updates_per_rollout: int = option(
        1,
        "U: updates by the optimiser from each rollout, with fresh times and noise. A rollout and "
        "its U updates are one step in metrics.jsonl and for all that counts steps; theta_old and "
        "the saved average follow after the last of them. Not in the paper.",
        at_least=1,
        at_most=10_000,
    )

    rank: int = option(64, "Rank of the LoRA.", at_least=1)
    lora_alpha: int = option(128, "The LoRA's scale, times its rank.", at_least=1, at_most=10**6)
    learning_rate: float = option(3e-4, "AdamW's learning rate.", above=0)
    lr_scheduler: str = option(
        "constant", "A cosine falls to 0 at --max_train_steps.", choices=["constant", "cosine"]
    )
    lr_warmup_steps: int = option(0, "Steps in which the learning rate rises from 0.", at_least=0)
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.", at_least=0, at_most=1000)
    max_grad_norm: float = option(1.0, "Norm that a step's gradient is clipped to.", above=0)
    ema_decay: float = option(
        0.9, "Decay of the saved average after its warm-up.", at_least=0, at_most=1
    )
    ema_steps: int = option(8, "Steps between updates of the saved average.", at_least=1)
    ema_updates: int = released(  # sample.num_batches_per_epoch: scripts/train_sd3_dgpo.py:1215
        2, "Updates in a row of the saved average, each time.", pickscore=4, at_least=1
    )
    mixed_precision: str | None = option(
        None,
        "Precision of the transformer and the text encoders.",
        choices=["no", "bf16"],
        shown="bf16 if the GPU can",
    )
    gradient_checkpointing: bool = option(True, "Less memory, for a quarter more time in training.")

    checkpointing_steps: int = option(50, "Steps between checkpoints.", at_least=1)
    checkpoints_total_limit: int = option(
        3, "How many checkpoints are kept, the newest ones.", at_least=1
    )
    resume_from_checkpoint: str | None = option(None, "Go on from 'latest', or from a folder.")
    validation_steps: int = option(50, "Steps between validation pictures.", at_least=1)
    eval_inference_steps: int = released(  # sample.eval_num_steps
        14,
        "Sampler steps of the validation pictures.",
        cfg_free=10,
        cfg_free_ema=10,
        at_least=1,
        at_most=1000,
    )
    report_to: str = option(
        "none", "A tracker, besides metrics.jsonl.", choices=["none", "tensorboard", "wandb"]
    )
    push_to_hub: bool = option(False, "Upload the result in the end. Do `hf auth login` first.")
    hub_model_id: str | None = option(
        None, "Name of the uploaded LoRA on the hub.", shown="that of --output_dir"
    )
    config: str | None = option(None, "YAML or JSON file of these arguments. Flags win.")
    print_arguments: bool = option(False, "Print all arguments as a file for --config, and end.")


def read_arguments(arguments: type = Arguments, argv: list[str] | None = None) -> Any:
    """The command line, with --config and the released settings, as far as no library is needed."""
    args = config.parse_with_config(arguments, sys.argv[1:] if argv is None else argv)
    cli.check_ranks()
    if args.resolution % 16:
        raise Fault(f"argument --resolution: must be a multiple of 16, got {args.resolution}")
    if args.hub_model_id is not None and not args.push_to_hub:
        raise Fault(f"argument --hub_model_id: goes with --push_to_hub, got {args.hub_model_id!r}")
    args.combine = args.combine or ("advantages" if len(args.reward) > 1 else "rewards")
    for setting in dataclasses.fields(args):
        values = setting.metadata.get("released")
        if values and getattr(args, setting.name) is None:
            default = values.get(task_of(args), values[""])
            setattr(args, setting.name, values.get(args.recipe, default))
    return args
