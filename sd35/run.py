"""The folder of a run of train_sd35.py: whose it is, its checkpoints, its LoRA, how it goes on.

A run belongs to one folder, and a folder to one run. It begins or goes on in this order: the folder
is claimed, a checkpoint is found and put into the model, and what a killed run left is cleared.
What a person reads of a run is written by records.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import records
import sd35
from cli import Fault, first_line, is_first_process, make_folder, read_json, replace_file

try:
    import fcntl
except ImportError:  # Windows has none, and there no folder is locked
    fcntl = None

# What a run may be resumed with another value of, because it does not change the steps.
NOT_OF_THE_STEPS = (
    "max_train_steps micro_batch_size gradient_checkpointing checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint report_to validation_steps output_dir config "
    "eval_reward eval_inference_steps print_arguments push_to_hub hub_model_id"
).split()
STATE = {"step", "bad_steps", "optimizer", "parameters", "old", "ema"}  # what state.pt holds


def claim_folder(args: Any) -> Path:
    """--output_dir, made if need be, and no other run's until this process ends.

    Until its first checkpoint, a folder holds no run. Every process looks, the first one locks.
    Raises Fault if it holds another run, or what is no run's, or if a run is at work in it.
    """
    out, asked = make_folder(args.output_dir), args.resume_from_checkpoint
    before, found = read_json(out / "arguments.json"), newest_first(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others and "output_dir" not in before:
        where, new = f"argument --output_dir: {out} holds", "give a new folder, or an empty one"
        if found:
            raise Fault(f"{where} checkpoints without their arguments.json; put it back, or {new}")
        raise Fault(f"{where} {others[0]}, and no run; {new}")
    if is_first_process():
        lock_folder(out)
    if not found and (out / sd35.LORA_FILE).exists():
        raise Fault(
            f"argument --output_dir: {out} holds a finished run without its checkpoints, which "
            "cannot go on; give another folder"
        )
    elsewhere = asked and asked != "latest" and Path(asked).is_dir()
    if found and elsewhere and not Path(asked).absolute().parent.samefile(out):
        raise Fault(
            f"argument --resume_from_checkpoint: {asked} is not one of {out}, which holds a run; "
            "give one of these, or a new --output_dir"
        )
    if found:
        if not asked:
            raise Fault(
                f"argument --output_dir: {out} holds a run; continue it with "
                "--resume_from_checkpoint latest, or give another folder"
            )
        check_changes(args, out, before)
    return out


def lock_folder(out: Path) -> None:
    """Takes the folder for this process, for as long as it lives. Raises Fault if it is taken."""
    if fcntl is None:
        return
    try:
        lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise Fault(
            f"argument --output_dir: another process is at work in {out}; give another folder"
        ) from None
    except OSError as error:
        raise Fault(f"argument --output_dir: cannot lock {out} ({first_line(error)})") from None


def check_changes(args: Any, out: Path, before: dict[str, Any]) -> None:
    """Raises Fault at an argument that the run in `out` had otherwise, if it changes the steps."""
    for name, value in vars(args).items():
        # A run from before there was an argument is one with its default.
        had = before.get(name, getattr(type(args), name, None))
        if had == value:
            continue
        found = f"argument --{name}: the run in {out} has {had}, got {value}"
        if name not in NOT_OF_THE_STEPS:
            raise Fault(f"{found}; give what it has, or another --output_dir")
        both = args.lr_scheduler, before.get("lr_scheduler")
        if name == "max_train_steps" and both == ("cosine", "cosine"):
            raise Fault(
                f"{found}; a cosine's learning rates depend on it, so such a run cannot be made "
                "longer or shorter"
            )


def begin(out: Path, args: Any, done: int = 0) -> None:
    """Makes the folder that of a run with this many steps done, and writes arguments.json.

    What a run that was killed has left half written goes. A checkpoint of a later step, which is
    damaged or not wanted, is kept under another name, and metrics.jsonl is cut.
    """
    with records.writing(out):
        for half_written in out.glob(".checkpoint-*"):
            shutil.rmtree(half_written)
        for folder in (out, out / "validation"):
            for half_written in folder.glob(".[0-9]*-*"):
                half_written.unlink()
        for folder in newest_first(out):
            if step_of(folder) > done:
                folder.rename(folder.with_name(f"aside-{folder.name}-{time.time_ns()}"))
        records.cut_metrics(out / "metrics.jsonl", done)
    text = json.dumps(vars(args), indent=1)
    replace_file(out / "arguments.json", lambda new: new.write_text(text))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_first(out: Path) -> list[Path]:
    """The checkpoints in a folder. What has another name than a checkpoint's is none."""
    found = [
        path
        for path in out.glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]{1,18}", path.name) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def save(out: Path, model: sd35.Model, state: dict[str, Any], limit: int) -> None:
    """Writes checkpoint-<step>, complete or not at all; the oldest beyond the limit go.

    state: "step", "bad_steps" and "optimizer", to which the model's tensors are added. There is no
    checkpoint of no step, nor of a theta that is not finite. Raises Fault if it cannot be written,
    and then all that were there stay.
    """
    folder = out / f"checkpoint-{state['step']}"
    if folder.is_dir() or not state["step"] or not is_finite(model.theta):
        return
    theta = [parameter.detach().cpu() for parameter in model.theta]
    state = {**state, "parameters": theta, "old": model.old, "ema": model.average}
    content = io.BytesIO()
    torch.save(state, content)
    with (
        records.writing(folder),
        tempfile.TemporaryDirectory(dir=out, prefix=".checkpoint-") as aside,
    ):
        new = Path(aside) / folder.name
        new.mkdir()
        (new / "state.pt").write_bytes(content.getbuffer())
        save_lora(model, new)
        digest = hashlib.sha256(content.getbuffer()).hexdigest()
        (new / "complete.json").write_text(json.dumps({"sha256": digest}))
        os.replace(new, folder)
        for old in newest_first(out)[limit:]:
            shutil.rmtree(old)


def save_lora(model: sd35.Model, folder: Path) -> None:
    """The saved average as LORA_FILE in folder, complete or not there at all. Raises Fault."""
    path, transformer = folder / sd35.LORA_FILE, model.pipe.transformer
    with model.saved_average(), records.writing(path):
        lora = {
            "transformer_lora_layers": get_peft_model_state_dict(transformer),
            # Without this, the LoRA would be loaded at scale 1 instead of alpha / rank.
            "transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict(),
        }
        write = partial(model.pipe.save_lora_weights, folder, **lora)
        replace_file(path, lambda new: write(weight_name=new.name))


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
            real = tensor.numel() and tensor.is_floating_point()
            if not real or not tensor.float().isfinite().all():
                raise ValueError(f"{name} holds NaN, infinity, or no real numbers")
    except Exception as error:  # whatever the library makes of other files
        advice = "give one of this model, as train_sd35.py or diffusers writes it"
        raise Fault(f"argument --lora: cannot use {path} ({first_line(error)}); {advice}") from None


def load(folder: Path) -> dict[str, Any]:
    """The state. Raises Fault if it is damaged."""
    try:
        complete = read_json(folder / "complete.json")
        content = (folder / "state.pt").read_bytes()
        if hashlib.sha256(content).hexdigest() != complete.get("sha256"):
            raise ValueError("its checksum is another")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if missing := STATE - state.keys():
            raise ValueError(f"it has no {min(missing)}")
        state |= {"step": int(state["step"]), "bad_steps": int(state["bad_steps"])}
        if not 0 <= state["bad_steps"] <= state["step"] <= 10**9:
            raise ValueError(f"it has {state['bad_steps']} bad ones of {state['step']} steps")
        return state
    except Exception as error:  # whatever torch makes of other files
        raise Fault(f"checkpoint {folder} is missing or damaged ({first_line(error)})") from None


def find(out: Path, asked: str | None) -> dict[str, Any] | None:
    """The state to go on from: a folder's, or for 'latest' the newest in `out` that is whole.

    None if nothing is asked for, or if 'latest' is and there is no checkpoint. Raises Fault if what
    is asked for is damaged, or if all are.
    """
    if asked is None:
        return None
    found = newest_first(out)
    if asked != "latest":  # a folder, or, as in diffusers' scripts, the name of one in `out`
        try:
            return load(Path(asked) if Path(asked).is_dir() else out / asked)
        except Fault as fault:
            these = ", ".join(["latest", *(folder.name for folder in found)])
            advice = f"give {these}, or another folder"
            raise Fault(f"argument --resume_from_checkpoint: {fault}; {advice}") from None
    for folder in found:
        try:
            return load(folder)
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
    start = f", after the {done} of {args.resume_from_checkpoint}" if done else ""
    if args.resume_from_checkpoint and not done:
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


def resume(state: dict[str, Any], model: sd35.Model, optimizer: Optimizer) -> tuple[int, int]:
    """Puts a run where a checkpoint was. Returns the steps done, and the bad ones among the last.

    Raises Fault if the checkpoint is of a run with another LoRA, or is not finite.
    """
    settings = optimizer.param_groups[0].keys()
    try:
        if not is_finite([*state["parameters"], *state["old"], *state["ema"]]):
            raise ValueError("it is not finite")
        assign(model.theta, state["parameters"])
        assign(model.old, state["old"])
        assign(model.average, state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        if missing := settings - optimizer.param_groups[0].keys():
            raise ValueError(f"its optimizer has no {min(missing)}")
        for parameter, kept in optimizer.state.items():
            moments = [x for x in kept.values() if x.ndim]
            if not is_finite(moments) or any(x.shape != parameter.shape for x in moments):
                raise ValueError("its optimizer is not of these parameters, or not finite")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(
            "argument --resume_from_checkpoint: the checkpoint is of another LoRA, or damaged "
            f"({first_line(error)}); give one of this run"
        ) from None
    return state["step"], state["bad_steps"]


def is_finite(tensors: list[Tensor]) -> bool:
    return all(tensor.isfinite().all() for tensor in tensors)


@torch.no_grad()
def assign(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)
