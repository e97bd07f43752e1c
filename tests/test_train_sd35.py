"""The trainer, on a tiny untrained pipeline of SD3.5's classes."""

import copy
import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent import futures
from pathlib import Path

import numpy as np
import own_rewards
import pytest
import shapes
import torch
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusion3Pipeline
from diffusers.optimization import get_scheduler
from huggingface_hub.utils import filter_repo_objects
from matplotlib.figure import Figure
from PIL import Image

import bench
import cli
import records
import sd35
import train_sd35

ROOT = Path(__file__).parents[1]
REWARD = f"{ROOT}/tests/own_rewards.py"


@pytest.fixture(autouse=True)
def keep_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    from safetensors.torch import load_file

    return load_file(out / "pytorch_lora_weights.safetensors")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


SAME = ("step", "reward", "gate", "gap", "kl", "clipped", "grad_norm")  # to the bit


def difference(one, other):
    """Of two LoRAs, relative to the size of the first."""
    assert one.keys() == other.keys()
    squares = [((one[k] - other[k]).square().sum(), one[k].square().sum()) for k in one]
    return (sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt().item()


@pytest.fixture(scope="session")
def plain(tiny, tmp_path_factory):
    """The run that others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(tiny, out)
    return out


# Settings


# What config/*.py of github.com/Luo-Yihong/DGPO hold at commit 01ceb4b when they are run, in the
# order of COLUMNS: sample.num_image_per_prompt, num_groups, train.beta_dpo, train.beta, clip_range,
# sample.global_std, trunc_steps + 1, sample.guidance_scale, kl_cfg, switch_ema_ref, use_ema_ref,
# sample.num_batches_per_epoch, sample.eval_num_steps. One number is not the file's: kl_cfg of
# dgpo_wocfg_emaref is 1.0 there, and README.md says "1.0 # or 4.5/3.5".
PUBLISHED = {
    ("ocr", "guided"): (16, 8, 100, 0.02, 1e-2, "batch", 7, 4.5, 1.0, 200, False, 2, 14),
    ("geneval", "guided"): (16, 8, 100, 0.02, 1e-2, "group", 5, 4.5, 1.0, 500, False, 2, 14),
    ("pickscore", "guided"): (24, 8, 10, 0.001, 5e-2, "batch", 7, 4.5, 1.0, 200, False, 4, 14),
    ("ocr", "cfg_free"): (16, 8, 100, 0.02, 1e-3, "batch", 7, 1.0, 4.5, 200, False, 2, 10),
    ("geneval", "cfg_free"): (16, 8, 100, 0.02, 1e-3, "group", 5, 1.0, 4.5, 500, False, 2, 10),
    ("ocr", "cfg_free_ema"): (16, 8, 2000, 0.001, 1e-5, "batch", 7, 1.0, 4.5, 200, True, 2, 10),
    ("geneval", "cfg_free_ema"): (16, 8, 2000, 1e-3, 1e-5, "group", 5, 1.0, 4.5, 500, True, 2, 10),
}
COLUMNS = (
    "group_size prompts_per_step beta kl clip std trained guidance_scale "
    "reference_guidance_scale old_after ema_reference ema_updates eval_inference_steps"
).split()


@pytest.mark.parametrize(("reward", "recipe"), PUBLISHED)
def test_recipes_are_the_released_settings(reward, recipe):
    args = train_sd35.parse_args(["--reward", reward, "--recipe", recipe])
    found = {**vars(args), "trained": len(train_sd35.trained_times(args))}
    expected = dict(zip(COLUMNS, PUBLISHED[reward, recipe], strict=True))
    assert {name: found[name] for name in COLUMNS} == expected
    common = (args.learning_rate, args.rank, args.lora_alpha, args.train_timesteps)
    assert common == (3e-4, 64, 128, 4)
    assert (args.num_inference_steps, args.flow_shift, args.sampler) == (10, 3.0, "dpm++")
    assert (args.ema_decay, args.ema_steps, args.old_ema_decay) == (0.9, 8, 0.3)


@pytest.mark.parametrize(
    ("reward", "task"),
    [
        (["pickscore"], "pickscore"),
        (["geneval_official=2"], "geneval"),
        (["aesthetic", "ocr"], "ocr"),
        (["pickscore", "ocr", "geneval"], "geneval"),
        ([f"{REWARD}:brightness"], "pickscore"),
    ],
)
@pytest.mark.parametrize("recipe", ["guided", "cfg_free", "cfg_free_ema"])
def test_settings_and_prompts_follow_the_reward(reward, task, recipe, monkeypatch):
    """OCR's reward would die at the first prompt without quotes."""
    args = train_sd35.parse_args(["--reward", *reward, "--recipe", recipe])
    assert args.old_after == (500 if task == "geneval" else 200)
    read = []
    monkeypatch.setattr(
        train_sd35.prompt_sets, "load", lambda name: read.append(name) or [{"prompt": "a"}]
    )
    train_sd35.read_prompts(args)
    assert read == [task]


def test_flags_win():
    args = train_sd35.parse_args(["--reward", "geneval", "--beta", "7", "--kl", "0"])
    assert (args.beta, args.kl, args.group_size, args.std) == (7, 0, 16, "group")


@pytest.mark.parametrize(
    "line",
    ["--reward ocr --recipe cfg_free", "--no_gradient_checkpointing --micro_batch_size auto"],
)
def test_printed_arguments_are_a_config_that_gives_them_again(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_sd35.py", *line.split(), "--print_arguments"])
    train_sd35.main()
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    asked = train_sd35.parse_args(line.split())
    again = train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])
    again.config = None
    assert again == asked and not Path(asked.output_dir).exists()
    with pytest.raises(train_sd35.Fault, match="must be true or false, got maybe"):
        (tmp_path / "run.yaml").write_text("offline: maybe")
        train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_arguments_from_a_file_and_flags_win(suffix, tmp_path):
    file = tmp_path / f"run.{suffix}"
    settings = {"beta": 5.0, "group_size": 6, "output_dir": str(tmp_path / "run")}
    lines = [f"{name}: {value}" for name, value in settings.items()]
    file.write_text(json.dumps(settings) if suffix == "json" else "\n".join(lines))
    args = train_sd35.parse_args(["--config", str(file), "--group_size", "8"])
    assert (args.beta, args.group_size) == (5, 8)


BAD = {
    "--nonsense 1": "--nonsense",
    "--reward magic": "no reward 'magic'",
    "--reward pickscore=much": "the weight must be a number, got 'much'",
    "--reward nowhere.py:f": "there is no file nowhere.py",
    f"--reward {REWARD}:f": "defines no function f",
    "--reward nopackage.x:f": "there is no package nopackage",
    "--recipe magic": "invalid choice: 'magic'",
    "--config {}/none.yaml": "--config: cannot read",
    "--config {}/bad.yaml": "bad.yaml, line 2: there is no argument magic",
    "--config {}/wrong.yaml": "invalid choice: 'heun'",
    "--config {}/list.yaml": "must have a line 'argument: value' for each",
    "--train_prompts {}/none.txt": "--train_prompts: cannot read",
    "--train_prompts {}/empty.txt": "holds no prompt",
    "--train_prompts {}/latin.txt": "is not UTF-8",
    "--train_prompts {}/broken.jsonl": "broken.jsonl, line 2 is not JSON",
    "--train_prompts {}/no.jsonl": 'line 1 has no "prompt"',
    "--validation_prompts {}/none.txt": "--validation_prompts: cannot read",
    "--group_size 1": "--group_size: must be at least 2 and at most 10000, got 1",
    "--prompts_per_step 0": "--prompts_per_step: must be at least 1 and at most 10000, got 0",
    "--resolution 500": "--resolution: must be a multiple of 16, got 500",
    "--t_min 1": "--t_min: must be at least 0 and below 1, got 1.0",
    "--t_min 0.9": "only 3 of the rollout's 10 times are at least --t_min 0.9, got 4",
    "--train_samples 3": "--train_samples: must be even, at most --group_size 24, got 3",
    "--group_size 4 --train_samples 6": "must be even, at most --group_size 4, got 6",
    "--beta 0": "--beta: must be above 0, got 0.0",
    "--report_to paper": "invalid choice: 'paper'",
    "--report_to wandb": "--report_to: needs `pip install wandb`",
    "--micro_batch_size -1": "--micro_batch_size: must be 1 to 1000000, or auto, got -1",
    "--micro_batch_size few": ": must be 1 to 1000000, or auto, got few",
    "--group_size 1000000": "--group_size: must be at least 2 and at most 10000, got 1000000",
    "--max_sequence_length 513": "must be at least 1 and at most 512, got 513",
    "--reward compressibility compressibility=2": "compressibility is there twice; give it once",
    "--eval_reward compressibility compressibility": "compressibility is there twice",
    "--eval_reward compressibility=2": "what is only watched has no weight, got compress",
    "--reward_model ocr=x": "argument --reward_model: ocr is not among the rewards: pickscore",
    "--push_to_hub": "argument --push_to_hub: needs a token; do `hf auth login`, or set HF_TOKEN",
    "--output_dir {}/file/run": "--output_dir: cannot write to",
    "--output_dir {}/other": "holds a run; continue it with --resume_from_checkpoint latest",
    "--output_dir {}/other --resume_from_checkpoint latest --group_size 24": "has 3, got 24",
    "--output_dir {}/other --resume_from_checkpoint latest --lr_warmup_steps 1": "has 0, got 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sd35.huggingface_hub, "get_token", lambda: None)
    for name, content in {
        "bad.yaml": b"beta: 1\nmagic: 1",
        "wrong.yaml": b"sampler: heun",
        "list.yaml": b"- 1",
        "empty.txt": b" \n",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "broken.jsonl": b'{"prompt": "a"}\n{"prompt"',
        "no.jsonl": b'{"text": "a"}',
        "file": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").mkdir()
    args = line.format(tmp_path).split()
    defaults = dataclasses.asdict(train_sd35.parse_args(["--output_dir", str(tmp_path / "x")]))
    kept = {**defaults, "output_dir": str(tmp_path / "other"), "group_size": 3}
    if "--lr_warmup_steps" in args:  # which a run of an older version has not
        kept = {**kept, "group_size": 24}
        del kept["lr_warmup_steps"]
    (tmp_path / "other" / "arguments.json").write_text(json.dumps(kept))
    (tmp_path / "other" / "checkpoint-1").mkdir()
    if "--output_dir" not in args:
        args += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(train_sd35.Fault) as fault:
        records.claim_folder(train_sd35.parse_args(args))
    assert BAD[line] in str(fault.value) and "\n" not in str(fault.value)


def test_bad_input_ends_at_once_with_code_2_and_one_line(tmp_path):
    """Before the libraries are loaded: here none can be."""
    command = [sys.executable, "-S", "train_sd35.py", "--group_size", "1"]
    import yaml

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "train_sd35.py: argument --group_size: must be at least 2 and at most 10000, got 1\n"
    )


def test_the_help_shows_every_default_also_where_a_recipe_has_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train_sd35.parse_args(["--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(train_sd35.Arguments):
        shown = field.metadata.get("shown", getattr(train_sd35.Arguments, field.name, ""))
        missing = shown in (None, "") and field.name not in NO_DEFAULT
        assert not missing and (not shown or f"default: {shown}" in help_text), field.name
    assert "100.0, pickscore 10.0, cfg_free_ema 2000.0" in help_text


NO_DEFAULT = "reward reward_model eval_reward resume_from_checkpoint config".split()


CONFIGS = {
    "max-train-steps: 5": ["--max_train_steps=5"],
    "model: a/b": ["--pretrained_model_name_or_path=a/b"],
    "mixed_precision: no": ["--mixed_precision=no"],  # a word, where YAML has a boolean
    "offline: no": ["--no_offline"],
    "offline: True": ["--offline"],
    "reward: [a, b=2]": ["--reward", "a", "b=2"],
    "reward: a": ["--reward", "a"],
    "reward: []": [],
    "train_samples: null": [],
    "output_dir: ''": ["--output_dir="],  # which is refused, as on the command line
    "\ufeffbeta: 1.5\r\nkl: 0\r\n": ["--beta=1.5", "--kl=0"],
    '{\n\t"beta": 1,\n\t"offline": true\n}': ["--beta=1", "--offline"],
}
BAD_CONFIGS = {
    "beta: 1\nkl: [1, 2]": "line 2: kl takes one value",
    "beta: {a: 1}": "line 1: beta takes one value",
    "reward: [[a]]": "line 1: reward takes values, and no list in a list",
    "reward: &a [*a]": "line 1: reward takes values, and no list in a list",
    "reward: [--offline]": "line 1: reward takes no value that begins with -",
    "beta: 1\nkl: 1\nbeta: 2": "line 3: beta is there already",
    "? [1]\n: 2": "line 1: there is no argument of that kind",
    "beta: 1\nkl: 2\n x: y: z": "line 3: this is not YAML",
    "beta: 1\nkl: '": "line 2: this is not YAML",
    "[" * 10_000: "cannot read",
    "a: " + "{b: " * 10_000: "cannot read",
    "beta: \0": "cannot read",
    "": "must have a line 'argument: value' for each",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_as_the_world_writes_it(content, tmp_path):
    file = tmp_path / ("run.json" if content[0] == "{" else "run.yaml")
    file.write_bytes(content.encode())
    assert cli.read_config(str(file), train_sd35.Arguments) == CONFIGS[content]


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_a_bad_config_is_one_line_with_its_number(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(cli.Fault) as fault:
        cli.read_config(str(tmp_path / "run.yaml"), train_sd35.Arguments)
    assert f"run.yaml, {BAD_CONFIGS[content]}" in str(fault.value) or (
        BAD_CONFIGS[content] in str(fault.value) and "line" not in BAD_CONFIGS[content][:5]
    )
    assert "\n" not in str(fault.value)


def test_what_a_config_says_is_checked_and_its_file_named(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: much")
    with pytest.raises(cli.Fault, match="run.yaml: argument --beta: invalid float value: 'much'"):
        train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
BAD_RANKS = {
    "WORLD_SIZE": ["two", "-1", "0", "", "1.5"],
    "RANK": ["x", "-1", "2", "\u0663"],
    "LOCAL_RANK": ["x", "2", None],
    "MASTER_ADDR": [None],
    "MASTER_PORT": [""],
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_ranks_that_cannot_be_are_one_line_before_any_library(name, monkeypatch):
    for key, value in TWO.items():
        monkeypatch.setenv(key, value)
    train_sd35.read_arguments(argv=[])
    for value in BAD_RANKS[name]:
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        with pytest.raises(cli.Fault, match=f"environment variable {name}: .*launch"):
            train_sd35.read_arguments(argv=[])


def test_a_process_that_finds_no_other_is_one_line(monkeypatch):
    with pytest.raises(cli.Fault, match="cannot start this process of several .no such host."):
        with records.launching():
            raise RuntimeError("no such host\nand a trace")


def test_a_missing_model_says_what_to_do(tiny, tmp_path):
    with pytest.raises(train_sd35.Fault, match="cannot load .*nowhere.* or give a folder as"):
        run(tiny, tmp_path / "run", model=tmp_path / "nowhere")


def test_what_does_not_fit_the_model_is_refused_before_its_weights_load(
    tiny, tmp_path, monkeypatch
):
    def load(*about, **more):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", load)
    for changed, most in (({"resolution": 32}, 16), ({"rank": 33}, 32)):
        (name,) = changed
        line = f"argument --{name}: the model has at most {most}, got {changed[name]}"
        with pytest.raises(cli.Fault, match=line):
            run(tiny, tmp_path / "run", **changed)


# The steps


def trained(tiny, out, **changed):
    """A trainer with a LoRA that does something, and a group's latents and advantages."""
    return bench.prepare(train_sd35.parse_args(flags(tiny, out, **changed), bench.Arguments))


def theta_gradient(trainer, x0, advantages):
    return bench.gradients(
        trainer, lambda: trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
    )


def test_with_an_ema_reference_the_kl_stays_to_the_frozen_guided_one(tiny, tmp_path):
    """What kl adds to the gradient is the same, whoever is compared with in the gap."""
    added = {}
    for recipe in ("cfg_free", "cfg_free_ema"):
        found = []
        for kl in (0, 0.5):
            settings = {"recipe": recipe, "kl": kl, "beta": 10, "clip": 0}
            found.append(theta_gradient(*trained(tiny, tmp_path, **settings)))
        added[recipe] = [b - a for a, b in zip(*found, strict=True)]
    assert sum(g.abs().sum() for g in added["cfg_free"]) > 1e-3
    assert bench.distance(added["cfg_free_ema"], added["cfg_free"]) < 1e-4


def test_an_ema_reference_costs_no_pass_more(tiny, tmp_path, monkeypatch):
    counted = {}
    for recipe in ("cfg_free", "cfg_free_ema"):
        settings = {"recipe": recipe, "kl": 0.1, "clip": 1e-3, "micro_batch_size": 4}
        trainer, *group = trained(tiny, tmp_path, **settings)
        images, forward = [], trainer.model.pipe.transformer.forward
        monkeypatch.setattr(
            trainer.model.pipe.transformer,
            "forward",
            lambda *a, f=forward, n=images, **k: n.append(len(k["hidden_states"])) or f(*a, **k),
        )
        theta_gradient(trainer, *group)
        counted[recipe] = images
    # At each of two times: the guided reference, theta_old, and theta; in the gap theta_old again.
    assert sorted(counted["cfg_free_ema"]) == sorted(counted["cfg_free"]) == [4, 4, 4, 4, 8, 8]


def test_a_group_of_equal_rewards_keeps_its_kl(tiny, tmp_path, monkeypatch):
    trainer, x0, _ = trained(tiny, tmp_path, kl=0.5, clip=1e-3)
    equal = torch.zeros(len(x0))
    asked = []
    for name in ("reference", "theta_old"):
        who = getattr(trainer.model, name)
        monkeypatch.setattr(
            trainer.model, name, lambda who=who, name=name: asked.append(name) or who()
        )
    found = theta_gradient(trainer, x0, equal)
    assert set(asked) == {"reference"}
    expected = [torch.zeros_like(gradient) for gradient in found]
    model, args, K = trainer.model, trainer.args, trainer.args.train_timesteps
    generator = train_sd35.seeded(args.seed, train_sd35.TIMES, 0)
    for k, i in enumerate(torch.randperm(len(trainer.times), generator=generator)[:K]):
        t = trainer.times[i].expand(len(x0))
        eps = trainer.noise(train_sd35.TRAINING_NOISE, 0, 0, k)
        x_t = (1 - t[0]) * x0 + t[0] * eps
        with torch.no_grad(), model.reference():
            v_ref = model.velocity(bench.TEXT, args.reference_guidance_scale)(x_t, t, t)
        kl = (model.velocity(bench.TEXT)(x_t, t, t) - v_ref).square().mean()
        loss = args.kl * kl / K / args.prompts_per_step
        for total, gradient in zip(expected, torch.autograd.grad(loss, model.theta), strict=True):
            total += gradient
    assert bench.distance(found, expected) < 1e-5


@pytest.mark.parametrize("kl", [0, 0.02])
def test_equal_rewards_are_a_step_of_the_kl_or_none(kl, tiny, tmp_path):
    """At the first step theta is the reference; from then on the KL is all there is."""
    out = tmp_path / "run"
    settings = {"reward": f"{REWARD}:constant_for_some", "kl": kl, "max_train_steps": 2}
    settings |= {"prompts_per_step": 1, "checkpointing_steps": 1, "learning_rate": 1e-2}
    run(tiny, out, **settings, seed=4)
    first, second = metrics(out)
    assert first["equal_groups"] == 0 and 0 < first["gate"] and first["kl"] == 0
    assert second["equal_groups"] == 1 and second["loss"] is None is second["gate"]
    states = [load_state(out, step) for step in (1, 2)]
    moved = any((a != b).any() for a, b in zip(*states, strict=True))
    if kl:
        assert second["kl"] > 0 and second["grad_norm"] > 0 and moved
    else:
        assert second["kl"] is None and second["grad_norm"] == 0 and not moved


def load_state(out, step):
    return records.load_checkpoint(out / f"checkpoint-{step}")["parameters"]


def test_the_trained_times_are_the_schedulers_integers():
    args = train_sd35.parse_args(["--reward", "ocr"])
    times = train_sd35.trained_times(args)
    assert times.tolist() == pytest.approx([t / 1000 for t in (999, 963, 922, 874, 817, 749, 666)])
    assert (1000 * times).tolist() == [999, 963, 922, 874, 817, 749, 666]  # what the model is told


def test_rollouts_come_from_theta_old_after_old_after_not_at_it(tiny, tmp_path, monkeypatch):
    trainer, *_ = trained(tiny, tmp_path, old_after=3)
    asked, old = [], trainer.model.theta_old
    monkeypatch.setattr(trainer.model, "theta_old", lambda: asked.append(step) or old())
    for step in range(1, 6):
        trainer.rollout(step, 0, bench.TEXT)
    assert asked == [4, 5]


@pytest.mark.parametrize(("reward", "left"), [("ocr", 0.0138), ("pickscore", 0.00019)])
def test_the_saved_average_forgets_the_first_lora_as_released(reward, left, tiny, tmp_path):
    """After 50 steps: the product of ((1 + n) / (10 + n)) ** updates, n = 7, 15, ... 47."""
    args = train_sd35.parse_args(flags(tiny, tmp_path, reward=reward), bench.Arguments)
    trainer, *_ = bench.prepare(args)
    for first, theta in zip(trainer.model.average, trainer.model.theta, strict=True):
        first.fill_(1.0)
        theta.data.fill_(0.0)
    weights = []
    for step in range(50):
        trainer.follow(step)
        weights.append(trainer.model.average[0].flatten()[0].item())
    updates = {"ocr": 2, "pickscore": 4}[reward]
    expected = math.prod(((1 + n) / (10 + n)) ** updates for n in (7, 15, 23, 31, 39, 47))
    assert weights[-1] == pytest.approx(expected, rel=1e-4)
    assert weights[-1] == pytest.approx(left, rel=0.02)
    assert weights[5] == 1.0 and weights[6] == pytest.approx((8 / 17) ** updates)


def scored(args, **scores):
    """group_advantages of the trainer for rewards of these scores, each with its weight."""
    found = {name: (w, torch.tensor(values)) for name, (w, values) in scores.items()}
    return train_sd35.group_advantages(args, found)


def test_one_bad_sample_of_128_does_not_outweigh_the_batch():
    scores = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    scores[2, 3] = -9
    args = train_sd35.parse_args(["--reward", "ocr"])
    found = scored(args, ocr=(1.0, scores.tolist()))
    assert found.min() == found[2, 3] and -5.5 < found[2, 3] < -5  # without the clamp, -10.6
    assert found.sum(1).abs().max() < 1e-5


ONE, OTHER = [[0.0, 1.0, 2.0, 3.0]], [[0.3, 0.1, 0.1, 0.1]]


def test_rewards_of_other_units_count_alike_as_advantages():
    """PickScore moves by ones and OCR by tenths: a plain sum is decided by the former."""
    line = ["--reward", "pickscore", "ocr", "--std", "group"]
    both = {"one": (1.0, ONE), "other": (1.0, OTHER)}
    args = train_sd35.parse_args(line)
    assert args.combine == "advantages"
    found = scored(args, **both)
    one, other = (scored(args, only=(1.0, values)) for values in (ONE, OTHER))
    assert torch.allclose(found, one + other)
    larger = {"one": (1.0, [[10 * v for v in ONE[0]]]), "other": (1.0, OTHER)}
    assert torch.allclose(scored(args, **larger), found, atol=1e-3)
    assert torch.allclose(scored(args, one=(2.0, ONE), other=(0.5, OTHER)), 2 * one + 0.5 * other)
    summed = train_sd35.parse_args([*line, "--combine", "rewards"])
    expected = scored(summed, sum=(1.0, [[a + b for a, b in zip(ONE[0], OTHER[0], strict=True)]]))
    assert torch.allclose(scored(summed, **both), expected)
    assert not torch.allclose(scored(summed, **larger), expected, atol=1e-3)
    assert train_sd35.parse_args(["--reward", "ocr=3"]).combine == "rewards"  # its weight is none


@pytest.mark.parametrize("std", ["group", "batch"])
def test_advantages_of_several_rewards_balance_so_that_z_cancels(std):
    """log Z(c) has the coefficient sum A in the gap: zero in every group, also beside a NaN."""
    args = train_sd35.parse_args(["--reward", "pickscore", "ocr", "--std", std])
    generator = torch.Generator().manual_seed(0)
    one, other = (scale * torch.randn(6, 16, generator=generator) for scale in (1.0, 0.1))
    one[2], other[3, 4] = 7.0, math.nan
    one[5], other[5] = 1.0, 0.0
    found = scored(args, one=(1.0, one.tolist()), other=(2.0, other.tolist()))
    assert found.sum(1).abs().max() < 1e-4 and found.isfinite().all()
    assert [(row != 0).any().item() for row in found] == [True, True, True, False, True, False]


def test_a_run_leaves_what_a_person_wants_to_see(plain):
    lines = metrics(plain)
    assert [line["step"] for line in lines] == [1, 2, 3]
    name = f"{REWARD}:brightness"
    for line in lines:
        assert 0 < line["reward"] < 1 and line["reward"] == line[f"reward/{name}"]
        assert line["reward_std"] > 0 and line["equal_groups"] == 0 and line["kl"] >= 0
        assert line["learning_rate"] == 3e-4
        assert 0.4 < line["gate"] < 0.6 and 0 <= line["clipped"] <= 1 and line["grad_norm"] > 0
        parts = [line[f"seconds/{phase}"] for phase in ("rollout", "decode", "wait", "train")]
        assert line["seconds/reward"] > 0
        assert 0.5 * line["seconds"] < sum(parts) <= line["seconds"]
        assert line["images_per_second"] == pytest.approx(12 / line["seconds"])
    assert lines[0]["gate"] == 0.5 and lines[0]["kl"] == 0  # theta is still the reference
    assert {f"eval/{name}", f"eval_base/{name}"} <= lines[-1].keys()
    for file in ("curves.png", "validation/step-000003.png", "README.md", "arguments.json"):
        assert (plain / file).stat().st_size > 100
    assert [path.name for path in plain.glob(".*")] == [".lock"]  # nothing half-written is left
    card = (plain / "README.md").read_text()
    assert "guidance 4.5 (1 is none) at 16 x 16 pixels, and was watched at 14 steps" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "guidance_scale=4.5," in code and "height=16," in code


def test_the_lora_loads_in_diffusers_and_draws_the_trainers_own_picture(plain, tiny):
    args = train_sd35.Arguments(**json.loads((plain / "arguments.json").read_text()))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32)
    pipe.scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    prompt = train_sd35.read_prompts(args)[1][0]["prompt"]
    side, generator = shapes.SIDE, train_sd35.seeded(args.seed, train_sd35.VALIDATION, 0)
    latent = side // pipe.vae_scale_factor
    noise = torch.randn(3, latent, latent, generator=generator)

    def draw():
        output = pipe(
            prompt,
            latents=noise[None],
            num_inference_steps=args.eval_inference_steps,
            guidance_scale=args.guidance_scale,
            height=side,
            width=side,
            max_sequence_length=args.max_sequence_length,
        )
        return np.asarray(output.images[0])

    grid = np.asarray(Image.open(plain / "validation" / "step-000003.png"))
    kept = [grid[22:214:12, 192 * i : 192 * (i + 1) : 12] for i in range(2)]
    assert np.array_equal(draw(), kept[0])
    pipe.load_lora_weights(plain, weight_name="pytorch_lora_weights.safetensors")
    assert np.array_equal(draw(), kept[1])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_any_micro_batch_size_takes_the_same_steps(size, plain, tiny, tmp_path):
    changed = run(tiny, tmp_path / "run", micro_batch_size=size)
    assert difference(lora(plain), changed) < 1e-5


def test_auto_takes_the_largest_micro_batch_that_fits(plain, tiny, tmp_path, monkeypatch, capsys):
    decode, tried = sd35.decode, []

    def small_memory(vae, latents):
        tried.append(len(latents))
        if len(latents) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(vae, latents)

    monkeypatch.setattr(sd35, "decode", small_memory)
    changed = run(tiny, tmp_path / "run", micro_batch_size="auto")
    assert "--micro_batch_size auto: 4" in capsys.readouterr().out
    assert tried[:4] == [1, 8, 4, 1]  # 8: two times of a group of four; last, a validation picture
    assert difference(lora(plain), changed) < 1e-5


def test_the_learning_rate_depends_on_the_step_alone():
    args = train_sd35.Arguments(learning_rate=2.0, max_train_steps=4, lr_scheduler="cosine")
    rates = [train_sd35.learning_rate(args, step) for step in range(4)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    args.lr_scheduler = "constant"
    assert {train_sd35.learning_rate(args, step) for step in range(9)} == {2.0}


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 12])
def test_the_warm_up_is_the_one_of_diffusers(name, warmup):
    theta = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([theta], 2.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    schedule = {"lr_scheduler": name.split("_")[0], "lr_warmup_steps": warmup}
    args = train_sd35.Arguments(learning_rate=2.0, max_train_steps=10, **schedule)
    for step in range(10):
        assert train_sd35.learning_rate(args, step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_learning_rate_that_falls_takes_smaller_steps(tiny, tmp_path):
    last = {"ema_steps": 1, "ema_decay": 0}  # saves theta itself
    start = run(tiny, tmp_path / "start", learning_rate=1e-12, **last)
    far = run(tiny, tmp_path / "far", learning_rate=1e-3, **last)
    near = run(tiny, tmp_path / "near", learning_rate=1e-3, lr_scheduler="cosine", **last)
    assert 0 < difference(start, near) < 0.9 * difference(start, far)


def test_another_seed_takes_other_steps(plain, tiny, tmp_path):
    assert difference(lora(plain), run(tiny, tmp_path / "run", seed=1)) > 1e-3


def on_two_processes(line):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(random.randint(20_000, 40_000)), "train_sd35.py", *line]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_take_the_same_steps(plain, tiny, tmp_path):
    """Three prompts on two processes: one has two groups, the other one."""
    launched = on_two_processes(flags(tiny, tmp_path / "run"))
    _, errors = launched.communicate()
    assert launched.returncode == 0, errors
    assert difference(lora(plain), lora(tmp_path / "run")) < 1e-5
    one, two = metrics(plain), metrics(tmp_path / "run")
    for key in ("reward", "reward_std", "gate", "gap", "kl", "grad_norm"):
        assert [a[key] for a in one] == pytest.approx([b[key] for b in two], rel=1e-3, abs=2e-6)


VARIANTS = {
    "euler": {"sampler": "euler", "t_min": 0.3},
    "theta_old from the start": {"old_after": 0},
    "an EMA reference": {"recipe": "cfg_free_ema"},
    "a guided reference": {"recipe": "cfg_free"},
    "several rewards": {"reward": [f"{REWARD}:brightness", f"{REWARD}:darkness=0.5"]},
    "no clip, no KL": {"clip": 0, "kl": 0},
    "std of the group": {"std": "group"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "beyond the paper": {"train_samples": 2, "bound": 2, "updates_per_rollout": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(name, plain, tiny, tmp_path):
    changed = run(tiny, tmp_path / "run", max_train_steps=2, **VARIANTS[name])
    assert all(value.isfinite().all() for value in changed.values())
    assert len(metrics(tmp_path / "run")) == 2


def test_gradient_checkpointing_changes_nothing(plain, tiny, tmp_path):
    changed = run(tiny, tmp_path / "run", gradient_checkpointing=True)
    assert difference(lora(plain), changed) < 1e-5


def test_offline_samples_do_not_follow_the_model(tiny, tmp_path):
    """The reference's rewards in every step, whatever the learning rate is; online not."""
    found = {}
    for offline in ([], ["--offline"]):
        for rate in (1e-9, 0.1):
            out = tmp_path / f"{offline}{rate}"
            line = flags(tiny, out, learning_rate=rate, max_train_steps=2, validation_steps=9)
            train_sd35.train(train_sd35.parse_args(line + offline))
            found[bool(offline), rate] = [line["reward"] for line in metrics(out)]
    assert found[True, 0.1] == found[True, 1e-9]
    assert found[False, 0.1][0] == found[True, 0.1][0] and found[False, 0.1] != found[True, 0.1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_exact_reward_rises(seed, tiny, tmp_path):
    """The background is bright, so that there is room for darkness."""
    settings = {"max_train_steps": 20, "learning_rate": 1e-2, "group_size": 8, "guidance_scale": 1}
    settings |= {"old_after": 100, "clip": 0, "kl": 0, "beta": 1, "micro_batch_size": 16}
    run(tiny, tmp_path / "run", seed=seed, reward=f"{REWARD}:darkness", **settings)
    found = [line["reward"] for line in metrics(tmp_path / "run")]
    assert np.mean(found[-4:]) > np.mean(found[:4]) + 3 * np.std(found[:4])


# Beyond the paper


def test_training_on_as_many_samples_as_a_group_has_is_the_default(plain, tiny, tmp_path):
    run(tiny, tmp_path / "run", train_samples=4, updates_per_rollout=1)
    assert bits(tmp_path / "run") == bits(plain)


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_the_extremes_are_those_of_what_is_trained_on(combine, std):
    """One has the extremes 0 and 5, the other 2 and 3, and a smaller unit that advantages undo."""
    one = [[0.0, 1.0, 1.0, 1.0, 1.0, 2.0], [3.0, 3.0, math.nan, 3.0, 3.0, 3.0]]
    other = [[0.0, 0.0, -0.3, 0.3, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    line = f"--reward pickscore ocr --std {std} --combine {combine} --group_size 6"
    args = train_sd35.parse_args([*line.split(), "--train_samples", "2"])
    scores = {
        "one": (1.0, torch.tensor(one, dtype=torch.float64)),
        "other": (20.0, torch.tensor(other, dtype=torch.float64)),
    }
    assert train_sd35.trained_samples(args, scores)[0].tolist() == [2, 3]
    scores["other"] = 2.0, scores["other"][1]
    samples = train_sd35.trained_samples(args, scores)
    assert samples[0].tolist() == ([0, 5] if combine == "rewards" else [2, 3])
    found = train_sd35.group_advantages(args, scores, samples)
    assert found.shape == (2, 2) and found[0, 0] < 0 < found[0, 1]
    assert found.sum(1).abs().max() < 1e-6
    assert (found[1] == 0).all()  # a sample of the group is NaN, though neither of these two


def by_hand(trainer, x0, scores, m, update=0):
    """The gradient of a step of one group, from the formulas alone."""
    args, model, K = trainer.args, trainer.model, trainer.args.train_timesteps
    order = scores.argsort().tolist()
    kept = torch.tensor(order[: m // 2] + order[len(order) - m // 2 :])
    x0, scores = x0[kept], scores[kept]
    advantages = (scores - scores.mean()) / (scores.std(correction=0) + 1e-4)
    seed = (args.seed, train_sd35.TIMES, 0, update)
    order, total = torch.randperm(len(trainer.times), generator=train_sd35.seeded(*seed)), 0
    for k in range(K):
        key = (train_sd35.TRAINING_NOISE, 0, 0, k) + ((update,) if update else ())
        t, eps = trainer.times[order[k]].expand(m), trainer.noise(*key)
        x_t, goal = (1 - t[0]) * x0 + t[0] * eps, eps - x0
        with torch.no_grad():
            reference = model.velocity(bench.TEXT, who=model.reference)(x_t, t, t)
            old = model.velocity(bench.TEXT, who=model.theta_old)(x_t, t, t)
        v = model.velocity(bench.TEXT)(x_t, t, t)

        def far(a, b):
            return (a - b).square().mean((1, 2, 3))

        gap = (advantages * (far(reference, goal) - far(v.detach(), goal))).mean()
        weight = torch.sigmoid(-args.beta * gap) * advantages
        total = total + (weight * far(v, goal) + args.kl * far(v, reference)).mean() / K
        total = total + args.bound * (-weight.clamp(max=0) * far(v, old)).mean() / K
    return torch.autograd.grad(total, model.theta)


BEYOND = {"group_size": 6, "train_samples": 4, "bound": 2, "clip": 0, "kl": 0.1, "std": "group"}
BEYOND |= {"prompts_per_step": 1, "micro_batch_size": 3}


def step_of(tiny, out, monkeypatch, **changed):
    """A trainer whose rollout is known, its latents and scores, and the gradients of its step."""
    trainer, x0, scores = trained(tiny, out, **{**BEYOND, **changed})
    trainer.trained_on = {"known": (1.0, lambda images, prompts: scores)}
    gradients, update = [], trainer.update
    monkeypatch.setattr(trainer, "rollout", lambda *about: x0)

    def watched(trained):
        gradients.append([parameter.grad.clone() for parameter in trainer.model.theta])
        return update(trained)

    monkeypatch.setattr(trainer, "update", watched)
    return trainer, x0, scores, gradients


@pytest.mark.parametrize("bound", [0, 2])
def test_a_step_on_extremes_is_that_of_the_formulas(bound, tiny, tmp_path, monkeypatch):
    trainer, x0, scores, found = step_of(tiny, tmp_path, monkeypatch, bound=bound)
    with torch.no_grad():
        for old in trainer.model.old:  # far behind
            old.mul_(0.5)
    expected, of_all = (by_hand(trainer, x0, scores, m) for m in (4, 6))
    trainer.args.bound = 2 - bound
    bounded_otherwise = by_hand(trainer, x0, scores, 4)
    trainer.args.bound = bound
    metrics = trainer.take_step([{"prompt": bench.TEXT}], 0)
    assert bench.distance(found[0], expected) < 1e-4
    assert min(bench.distance(found[0], other) for other in (of_all, bounded_otherwise)) > 1e-2
    assert metrics["images_per_second"] == pytest.approx(6 / metrics["seconds"])


def test_each_update_from_a_rollout_has_its_own_times_and_noise(tiny, tmp_path, monkeypatch):
    trainer, x0, scores, found = step_of(tiny, tmp_path, monkeypatch, updates_per_rollout=2)
    theta, expected = [[p.detach().clone() for p in trainer.model.theta]], []
    learn = trainer.update

    def one_by_one(trained):
        expected.append(by_hand(trainer, x0, scores, 4, update=len(expected)))
        norm = learn(trained)
        theta.append([p.detach().clone() for p in trainer.model.theta])
        return norm

    monkeypatch.setattr(trainer, "update", one_by_one)
    metrics = trainer.take_step([{"prompt": bench.TEXT}], 0)
    assert len(found) == 2 and metrics["step"] == 1
    for gradient, formula in zip(found, expected, strict=True):
        assert bench.distance(gradient, formula) < 1e-4
    norms = [torch.cat([g.flatten() for g in gradient]).norm().item() for gradient in found]
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    assert all(bench.distance(a, b) > 1e-4 for a, b in zip(theta, theta[1:], strict=False))


def test_a_signal_between_two_updates_undoes_the_first(tiny, tmp_path, monkeypatch):
    trainer, *_ = step_of(tiny, tmp_path, monkeypatch, updates_per_rollout=3)
    chosen = [{"prompt": bench.TEXT}]
    trainer.take_step(chosen, 0)
    before = copy.deepcopy([trainer.model.theta, trainer.optimizer.state_dict()])
    backward, asked = trainer.backward_group, []

    def stopped(*about):
        asked.append(about)
        if len(asked) == 3:
            raise cli.Stopped
        return backward(*about)

    monkeypatch.setattr(trainer, "backward_group", stopped)
    with pytest.raises(cli.Stopped):
        trainer.take_step(chosen, 1)
    assert all(torch.equal(*pair) for pair in zip(trainer.model.theta, before[0], strict=True))
    state = trainer.optimizer.state_dict()["state"]
    for i, kept in before[1]["state"].items():
        assert kept["step"] == 3 and all(torch.equal(state[i][name], kept[name]) for name in kept)


def test_a_run_of_several_updates_goes_on_as_if_never_ended(tiny, tmp_path):
    settings = {"train_samples": 2, "bound": 2, "updates_per_rollout": 2, "prompts_per_step": 2}
    settings |= {"ema_steps": 1, "old_after": 0}
    run(tiny, tmp_path / "whole", **settings)
    run(tiny, tmp_path / "run", **settings, max_train_steps=2)
    run(tiny, tmp_path / "run", **settings, resume_from_checkpoint="latest")
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


# Rewards beside the rollout


class AtOnce(futures.Executor):
    """An executor without a thread."""

    def __init__(self, *about):
        pass

    def submit(self, work, *args):
        future = futures.Future()
        future.set_result(work(*args))
        return future


def test_scores_beside_the_rollout_take_the_same_steps_to_the_bit(
    plain, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_sd35.futures, "ThreadPoolExecutor", AtOnce)
    run(tiny, tmp_path / "run")
    assert bits(tmp_path / "run") == bits(plain)
    one, other = metrics(tmp_path / "run"), metrics(plain)
    assert [[a[k] for k in SAME] for a in one] == [[b[k] for k in SAME] for b in other]


@pytest.mark.parametrize("beside", [True, False])
def test_a_group_is_scored_while_the_next_is_drawn(beside, tiny, tmp_path, monkeypatch):
    """Both sleep 0.3 s a group, of which there are three: together 1.2 s, else 1.8 s."""
    trainer, x0, _ = trained(tiny, tmp_path)
    working, order = threading.Lock(), []

    def sleepy(images, prompts):
        assert working.acquire(blocking=False)  # one at a time
        order.append((prompts[0]["i"], threading.current_thread() is threading.main_thread()))
        time.sleep(0.3)
        working.release()
        return images.mean((1, 2, 3))

    def rollout(step, p, text):
        time.sleep(0.3)
        return x0 + 0.1 * p

    if not beside:
        monkeypatch.setattr(train_sd35.futures, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(trainer, "rollout", rollout)
    trainer.trained_on = {"sleepy": (1.0, sleepy)}
    clock = records.Clock(trainer.device)
    chosen = [{"prompt": bench.TEXT, "i": i} for i in range(3)]
    latents, scores = trainer.draw_and_score(chosen, 0, clock)
    assert order == [(i, not beside) for i in range(3)] and list(latents) == [0, 1, 2]
    expected = torch.stack([trainer.model.decode(latents[p]).mean((1, 2, 3)) for p in range(3)])
    assert torch.equal(scores["sleepy"][1], expected) and expected.unique().numel() == 12
    found = clock.metrics(12)
    assert found["seconds/reward"] >= 0.9 and found["seconds/rollout"] >= 0.9
    both = found["seconds/rollout"] + found["seconds/decode"] + found["seconds/reward"]
    assert (found["seconds"] < both - 0.4) == beside
    assert found["seconds/wait"] < (0.85 if beside else 0.3)


def test_a_signal_is_obeyed_while_a_reward_works(tiny, tmp_path):
    """A thread inside torch crashes Python's own end, which is not waited for."""
    (tmp_path / "busy.py").write_text(
        "import pathlib, torch\n"
        "def forever(images, prompts):\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "    while True:\n"
        "        images = images * 1.0\n"
    )
    line = flags(tiny, tmp_path / "run", reward=f"{tmp_path}/busy.py:forever")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_sd35.py", *line]
    pipe = {"stderr": subprocess.PIPE, "text": True}
    launched = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)
    while launched.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    _, errors = launched.communicate(timeout=60)
    assert launched.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("train_sd35.py: stopped, and saved")


# Rewards that fail


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_weighted_rewards_add_up(combine, tiny, tmp_path):
    both = [f"{REWARD}:brightness=2", "compressibility=0.5"]
    run(tiny, tmp_path / "run", reward=both, max_train_steps=1, combine=combine)
    (line,) = metrics(tmp_path / "run")
    total = 2 * line[f"reward/{REWARD}:brightness"] + 0.5 * line["reward/compressibility"]
    assert line["reward"] == pytest.approx(total, abs=1e-6)


def test_a_group_with_a_nan_takes_no_part(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "run", reward=f"{REWARD}:nan_for_some", max_train_steps=2)
    assert [line["groups_not_finite"] > 0 for line in metrics(tmp_path / "run")].count(True) >= 1
    words = "|".join(shapes.COLORS)
    assert re.search(rf"is nan for prompt '(two |three )?({words}) ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan_for_all", "no group has finite rewards"),
        ("raising", r"failed on images of prompt '\w+ .*': ZeroDivisionError"),
        ("too_few", r"must return 4 scores, got \(3,\), of prompt '\w+ "),
    ],
)
def test_a_reward_that_fails_ends_the_run_which_is_saved(
    function, message, tiny, tmp_path, monkeypatch
):
    score, failing, scored = train_sd35.rewards.score, getattr(own_rewards, function), []

    def fails_in_the_second_step(name, reward, images, prompts):
        scored.append(name)
        return score(name, reward if len(scored) <= 3 else failing, images, prompts)

    monkeypatch.setattr(train_sd35.rewards, "score", fails_in_the_second_step)
    with pytest.raises(train_sd35.Fault, match=message):
        run(tiny, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1" / "complete.json").exists()


def test_a_gradient_that_is_not_finite_is_no_step_and_five_end_the_run(tiny, tmp_path, monkeypatch):
    before = []
    original = train_sd35.dgpo.backward_group_loss

    def broken(theta, *args, **kwargs):
        found = original(theta, *args, **kwargs)
        parameters = [p for p in before[0].model.theta if p.grad is not None]
        parameters[0].grad[0] = float("nan")
        return found

    build = train_sd35.build
    monkeypatch.setattr(train_sd35, "build", lambda *a: before.append(build(*a)) or before[0])
    monkeypatch.setattr(train_sd35.dgpo, "backward_group_loss", broken)
    with pytest.raises(train_sd35.Fault, match="five steps in a row"):
        run(tiny, tmp_path / "run", max_train_steps=9)
    lines = metrics(tmp_path / "run")
    assert [line["grad_norm"] for line in lines] == [None] * 5
    state = records.load_checkpoint(tmp_path / "run" / "checkpoint-5")
    assert all(torch.equal(*pair) for pair in zip(state["parameters"], state["ema"], strict=True))
    assert state["bad_steps"] == 5 and not state["optimizer"]["state"]


def test_a_theta_that_is_not_finite_ends_the_run_and_is_not_saved(tiny, tmp_path):
    """The gradient of the second step is finite, its learning rate is not."""
    args = train_sd35.parse_args(flags(tiny, tmp_path / "run", checkpointing_steps=1))
    original = train_sd35.learning_rate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Fault, match="no longer finite"):
        patch.setattr(
            train_sd35,
            "learning_rate",
            lambda args, step: math.inf if step else original(args, step),
        )
        train_sd35.train(args)
    assert [path.name for path in records.checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert all(parameter.isfinite().all() for parameter in load_state(tmp_path / "run", 1))


# Interruptions


def bits(out):
    return b"".join(value.numpy().tobytes() for _, value in sorted(lora(out).items()))


def in_a_child(line):
    """Runs the trainer in a copy of this process, which has all modules loaded. Returns its id."""
    child = os.fork()
    if child:
        return child
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train_sd35.py", *line]
    try:
        cli.run("train_sd35.py", train_sd35.main)
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        os._exit(99)


LONG = {"max_train_steps": 24, "checkpointing_steps": 3, "old_after": 5, "group_size": 2}


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(tiny, out, **LONG)
    return out


def test_killed_ten_times_it_ends_as_if_never_killed(tiny, whole, tmp_path):
    out, rng = tmp_path / "run", random.Random(0)
    line = [*flags(tiny, out, **LONG), "--resume_from_checkpoint", "latest"]
    for kill in range(10):
        child = in_a_child(line)
        # Every second time it comes as far as a step of the run; else it may not even have begun.
        deadline = time.time() + 60
        while kill % 2 and steps_written(out) < 2 * kill and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05 if kill % 2 else 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
    assert records.checkpoints(out) and not (out / "pytorch_lora_weights.safetensors").exists()
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert bits(out) == bits(whole)
    one, other = metrics(out), metrics(whole)
    assert [[a[k] for k in SAME] for a in one] == [[b[k] for k in SAME] for b in other]


def steps_written(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on(number, tiny, whole, tmp_path):
    out = tmp_path / "run"
    child = in_a_child(flags(tiny, out, **{**LONG, "checkpointing_steps": 1000}))
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 2:
        time.sleep(0.01)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 130
    (saved,) = records.checkpoints(out)
    assert int(saved.name.split("-")[1]) == len(metrics(out))
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert bits(out) == bits(whole)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_signal_to_one_of_two_processes_ends_both_and_saves(tiny, whole, tmp_path):
    """The first, which saves, waits for the second, which alone is told to stop."""
    out = tmp_path / "run"
    launched = on_two_processes(flags(tiny, out, **{**LONG, "checkpointing_steps": 1000}))
    while launched.poll() is None and (
        not (out / "metrics.jsonl").exists() or len(metrics(out)) < 2
    ):
        time.sleep(0.01)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    (second,) = (
        pid for pid in children if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()
    )
    os.kill(int(second), signal.SIGTERM)
    _, errors = launched.communicate()
    assert "stopped, and saved" in errors and "Traceback" not in errors.split("stopped")[0]
    (saved,) = records.checkpoints(out)
    assert int(saved.name.split("-")[1]) == len(metrics(out)) < LONG["max_train_steps"]
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert difference(lora(whole), lora(out)) < 1e-5


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    kept = json.loads((out / "arguments.json").read_text())
    (out / "arguments.json").write_text(json.dumps({**kept, "output_dir": str(out)}))
    newest, *_ = records.checkpoints(out)
    content = bytearray((newest / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.pt").write_bytes(content)
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    printed = capsys.readouterr()
    assert f"{newest} is missing or damaged" in printed.out + printed.err
    assert bits(out) == bits(whole) and len(metrics(out)) == LONG["max_train_steps"]


def test_a_second_ctrl_c_ends_at_once_and_the_last_checkpoint_stays(tiny, tmp_path):
    """The first is obeyed between passes; here it comes while saving takes for ever."""
    out, hanging = tmp_path / "run", tmp_path / "hanging"
    save = records.save_checkpoint

    def hang(out, model, state, limit):
        if state["step"] != 2:
            hanging.touch()
            (out / ".checkpoint-x").mkdir()
            time.sleep(100)
        save(out, model, state, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "save_checkpoint", hang)
        child = in_a_child(flags(tiny, out, **{**LONG, "checkpointing_steps": 2}))
        deadline = time.time() + 60
        while not hanging.exists() and time.time() < deadline:
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        time.sleep(1.1)  # what comes sooner is a launcher's repetition
        asked = time.time()
        os.kill(child, signal.SIGINT)
        _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 130 and time.time() - asked < 10
    run(tiny, out, **{**LONG, "max_train_steps": 3}, resume_from_checkpoint="latest")
    assert records.checkpoints(out)[0].name == "checkpoint-3" and len(metrics(out)) == 3
    assert not list(out.glob(".checkpoint-*"))


# What is written, and by which method of which class.
WRITES = {
    "arguments.json": (Path, "write_text"),
    "state.pt": (Path, "write_bytes"),
    "complete.json": (Path, "write_text"),
    "pytorch_lora_weights.safetensors": (StableDiffusion3Pipeline, "save_lora_weights"),
    "step-000002.png": (Image.Image, "save"),
    "metrics.jsonl": (Path, "open"),
    "curves.png": (Figure, "savefig"),
    "README.md": (Path, "write_text"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_is_one_line_and_the_run_can_go_on(name, plain, tiny, tmp_path):
    """The disk is full, with half of a file written, when step 2 or the end writes this one."""
    out, (kind, method) = tmp_path / "run", WRITES[name]
    original = getattr(kind, method)

    def fails(*args, **more):
        place = next((str(x) for x in (*args, *more.values()) if str(x).endswith(name)), None)
        first = name == "metrics.jsonl" and (args[1:2] != ("ab",) or not args[0].exists())
        if not place or first:
            return original(*args, **more)
        if Path(place).name.startswith("."):  # it is written aside
            beside = args[1] if kind is StableDiffusion3Pipeline else ""
            os.close(os.open(Path(beside) / place, os.O_CREAT | os.O_WRONLY))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = {"checkpointing_steps": 1, "validation_steps": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Fault) as fault:
        patch.setattr(kind, method, fails)
        run(tiny, out, **settings)
    assert re.match("cannot write .*No space left on device", str(fault.value))
    assert "\n" not in str(fault.value)
    hidden = {path.name for path in out.rglob(".*")} - {".lock"}
    assert not hidden  # nothing half-written is left, under any name
    for checkpoint in records.checkpoints(out):
        records.load_checkpoint(checkpoint)
    for path in out.glob("*.json*"):
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(line)
    run(tiny, out, **settings, resume_from_checkpoint="latest")
    assert bits(out) == bits(plain)
    assert metrics(out)[-1]["step"] == 3 and (out / "README.md").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_vanishes_is_one_line(again, tiny, tmp_path, monkeypatch):
    out, add_line = tmp_path / "run", records.add_line

    def vanish(path, metrics):
        shutil.rmtree(out)
        if again:
            out.write_text("a file of that name")
        add_line(path, metrics)

    monkeypatch.setattr(records, "add_line", vanish)
    with pytest.raises(cli.Fault, match=f"cannot write {out}/checkpoint-1 .*; mend that, or make"):
        run(tiny, out)


def test_a_run_that_is_done_has_nothing_to_do_and_changes_no_record(tiny, whole, capsys):
    def contents():
        return {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    before = contents()
    for steps in (24, 20):
        settings = {**LONG, "max_train_steps": steps, "resume_from_checkpoint": "latest"}
        train_sd35.train(train_sd35.parse_args(flags(tiny, whole, **settings)))
        said = f"has done 24 steps, and --max_train_steps is {steps}"
        assert said in capsys.readouterr().out
    assert contents() == before


def test_it_says_at_the_start_what_it_will_do(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    few = tmp_path / "few.txt"
    few.write_text("red square\nblue circle\n")
    settings = {"max_train_steps": 1, "train_prompts": few, "validation_prompts": None}
    run(tiny, out, **settings, resume_from_checkpoint="latest")
    recipe, device, prompts = capsys.readouterr().out.splitlines()[:3]
    assert recipe.startswith(f"recipe guided, reward {REWARD}:brightness: 3 groups of 4 a step")
    assert device == (
        "on cpu, precision no: steps 1 to 1, anew, as there is no checkpoint to go on from; into "
        f"{out}"
    )
    assert prompts == (
        f"2 prompts of {few}; in validation 1, trained on, too, as fewer than 8 prompts are too "
        "few to hold one out"
    )
    run(tiny, out, **{**settings, "max_train_steps": 2}, resume_from_checkpoint="latest")
    assert "steps 2 to 2, after the 1 of latest; into" in capsys.readouterr().out
    run(tiny, tmp_path / "other", **{**settings, "validation_prompts": few})
    assert "in validation 2, 2 of them trained on, too" in capsys.readouterr().out


def test_a_tracker_gets_the_numbers_and_the_pictures(tiny, tmp_path, monkeypatch):
    logged, shown = [], []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **more):
            logged.append((step, values))

        def log_images(self, values, step, **more):
            shown.append((step, values["validation"].shape))

    launch = train_sd35.launch
    monkeypatch.setattr(
        train_sd35, "launch", lambda args: launch_with(launch(args), Tracker(_blank=True))
    )
    run(tiny, tmp_path / "run", validation_steps=2)
    assert [step for step, _ in logged] == [1, 2, 3]
    assert logged[0][1]["learning_rate"] == 3e-4
    assert f"eval/{REWARD}:brightness" in logged[1][1]
    assert shown == [(2, (1, 472, 384, 3)), (3, (1, 472, 384, 3))]


def launch_with(accelerator, tracker):
    accelerator.log_with = [tracker]
    return accelerator


def test_a_run_is_pushed_to_the_hub_in_the_end_and_a_failed_upload_loses_nothing(
    tiny, tmp_path, monkeypatch
):
    out, hub = tmp_path / "run", train_sd35.huggingface_hub
    made, uploaded = [], []

    def create_repo(name, exist_ok):
        made.append((name, exist_ok, (out / "metrics.jsonl").exists()))
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(repo_id, folder_path, allow_patterns, commit_message):
        found = filter_repo_objects(
            sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()),
            allow_patterns=allow_patterns,
        )
        uploaded.append((repo_id, list(found)))
        raise RuntimeError("502 Server Error\nmore")

    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    said = r"is finished and is in .*cannot be uploaded .502 Server Error.; .*hf upload me/lora"
    with pytest.raises(cli.Fault, match=said):
        run(tiny, out, push_to_hub=True, hub_model_id="lora", max_train_steps=1)
    assert made == [("lora", True, False)]  # before any work
    files = ["README.md", "curves.png", "metrics.jsonl", sd35.LORA_FILE]
    assert uploaded == [("me/lora", [*files, "validation/step-000001.png"])]
    assert lora(out) and 'load_lora_weights("me/lora"' in (out / "README.md").read_text()

    def refused(name, exist_ok):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(cli.Fault, match="--push_to_hub: cannot make other on the hub .401 Unauth"):
        run(tiny, tmp_path / "other", push_to_hub=True)


def test_what_a_run_saves_of_its_arguments_is_a_config(whole, tmp_path):
    out = str(tmp_path / "run")
    args = train_sd35.parse_args(["--config", str(whole / "arguments.json"), "--output_dir", out])
    kept = json.loads((whole / "arguments.json").read_text())
    assert {**dataclasses.asdict(args), "config": None} == {**kept, "output_dir": out}


def test_old_checkpoints_go(whole):
    names = [path.name for path in records.checkpoints(whole)]
    assert names == ["checkpoint-24", "checkpoint-21", "checkpoint-18"]
