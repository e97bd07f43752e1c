"""Runs of the trainer on the tiny pipeline, for tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import shapes
from safetensors.torch import load_file

import train_sd35

ROOT = Path(__file__).parents[1]
REWARD = f"{ROOT}/tests/own_rewards.py"
SAME = ("step", "reward", "gate", "gap", "kl", "clipped", "grad_norm")  # to the bit


def flags(tiny, out, **changed):
    """The command line of a run of three steps on the tiny pipeline, with other settings if any."""
    settings = {
        "model": tiny,
        "train_prompts": f"{tiny}/prompts.jsonl",
        "output_dir": out,
        "reward": f"{REWARD}:brightness",
        "resolution": shapes.SIDE,
        "max_sequence_length": shapes.TOKENS,
        "num_inference_steps": 4,
        "train_timesteps": 2,
        "t_min": 0.5,
        "group_size": 4,
        "prompts_per_step": 3,
        "micro_batch_size": 4,
        "rank": 4,
        "lora_alpha": 8,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "validation_steps": 100,
        "gradient_checkpointing": False,
        **changed,
    }
    line = []
    for name, value in settings.items():
        if isinstance(value, bool):
            line.append(f"--{'' if value else 'no_'}{name}")
        elif value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def run(tiny, out, **changed):
    """The LoRA, metrics and validation pictures that a run leaves."""
    train_sd35.train(train_sd35.parse_args(flags(tiny, out, **changed)))
    return lora(out)


def lora(out):

    return load_file(out / "pytorch_lora_weights.safetensors")


def bits(out):
    return b"".join(value.numpy().tobytes() for _, value in sorted(lora(out).items()))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def difference(one, other):
    """Of two LoRAs, relative to the size of the first."""
    assert one.keys() == other.keys()
    squares = [((one[k] - other[k]).square().sum(), one[k].square().sum()) for k in one]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt().item()


def on_two_processes(line):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(random.randint(20_000, 40_000)), "train_sd35.py", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
