"""Runs of the trainer on the tiny pipeline, and what they leave, for tests."""

import os
import signal
import socket
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_sd35
from sd35.encoder import Encoder
from sd35.lora import LORA_FILE, add_lora
from sd35.model import Model, load_pipeline, make_scheduler
from sd35.run import read_metrics, run_script
from sd35.settings import Settings, parse
from tiny_sd35 import shapes

ROOT = Path(__file__).parents[1]
REWARD = f"{ROOT}/tests/own_rewards.py"
TEXT = "red diamond"
SAME = ("step", "reward", "gate", "gap", "kl", "clipped", "grad_norm")  # on a resume, to the bit


def flags(tiny, out, **changed):
    """The command line of a run of three steps on the tiny pipeline."""
    settings = {
        "model": tiny,
        "train_prompts": f"{tiny}/prompts.jsonl",
        "output_dir": out,
        "reward": f"{REWARD}:brightness",
        "resolution": shapes.SIDE,
        "max_sequence_length": shapes.TOKENS,
        "num_inference_steps": 4,
        "eval_inference_steps": 2,
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
        "ema_steps": 1,  # or the saved LoRA would not have changed after three steps
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


def settings(tiny, out, **changed):
    return parse(Settings, flags(tiny, out, **changed))


def run(tiny, out, **changed):
    """Train, and return the LoRA."""
    train_sd35.train(settings(tiny, out, **changed))
    return lora(out)


def lora(out):
    return load_file(out / LORA_FILE)


def bits(out):
    return b"".join(value.numpy().tobytes() for _, value in sorted(lora(out).items()))


def metrics(out):
    return read_metrics(out / "metrics.jsonl")


def same_steps(out, other):
    """Whether two runs have the same LoRA and the same metrics, to the bit."""
    one, two = ([[line[key] for key in SAME] for line in metrics(o)] for o in (out, other))
    return one == two and bits(out) == bits(other)


def difference(one, other):
    """The distance of two LoRAs, relative to the size of the first."""
    assert one.keys() == other.keys()
    squares = [((one[k] - other[k]).square().sum(), one[k].square().sum()) for k in one]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt().item()


def fork(work, **environment):
    """Begin work() under run_script in a fork of this process. Returns the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= environment
        AcceleratorState._reset_state(True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        run_script(work)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def exit_code(child):
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_two_processes(work):
    """Run work() on a group of two processes, and return their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    group["OMP_NUM_THREADS"] = "1"
    children = [fork(work, RANK=str(i), LOCAL_RANK=str(i), **group) for i in range(2)]
    return [exit_code(child) for child in children]


def model(tiny, rank=4, alpha=8):
    """A Model with a LoRA that does something; theta_old and the saved average have other ones."""
    pipe = load_pipeline(str(tiny), torch.float32)
    pipe.scheduler = make_scheduler("dpm++", 3.0)
    encoded = Encoder(pipe, shapes.TOKENS, torch.device("cpu"))([TEXT], {})
    theta = add_lora(pipe.transformer, rank, alpha, 0)
    model = Model(pipe, theta, shapes.SIDE, 4, encoded=encoded)
    perturb(model)
    return model


@torch.no_grad()
def perturb(model):
    """Add noise to theta, theta_old and the saved average, which then differ."""
    for values, scale in ((model.theta, 0.1), (model.old, 0.2), (model.average, 0.3)):
        for i, value in enumerate(values):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
            value.add_(scale * noise)


def point(model):
    """Where velocities are compared: x (3, C, h, w), t (3,) and p (3,)."""
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.3, 0.6, 0.9]), torch.zeros(3, dtype=torch.long)
