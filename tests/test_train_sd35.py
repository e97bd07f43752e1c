"""The trainer's arguments and its runs, on a tiny untrained pipeline of SD3.5's classes."""

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import own_rewards
import pytest
import shapes
import torch
from accelerate.utils import DistributedType
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tiny_run import REWARD, ROOT, difference, flags, lora, metrics, on_two_processes, run

import checkpoints
import cli
import sd35
import train_sd35

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
    "--micro_batch_size 0": ": must be 1 to 1000000, or auto, got 0",
    "--train_prompts=": "argument --train_prompts: must not be empty",
    "--hub_model_id a/b": "--hub_model_id: goes with --push_to_hub, got 'a/b'",
    "--beta 1e-320": "argument --beta: must be 1e-30 to 1e30 in size, got ",
    f"--ema_updates 1{'0' * 400}": "--ema_updates: must be 1e-30 to 1e30 in size, got 1000",
    "--flow_shift 1e29": "argument --flow_shift: must be above 0 and at most 100, got 1e+29",
    "--micro_batch_size few": ": must be 1 to 1000000, or auto, got few",
    "--group_size 1000000": "--group_size: must be at least 2 and at most 10000, got 1000000",
    "--max_sequence_length 513": "must be at least 1 and at most 512, got 513",
    "--reward compressibility compressibility=2": "compressibility is there twice; give it once",
    "--eval_reward compressibility compressibility": "compressibility is there twice",
    "--eval_reward pickscore": "pickscore is trained on, and so it is watched; leave it out here",
    "--num_inference_steps 1000": "only 732 of 1000 times are different; give fewer steps",
    "--flow_shift 100 --t_min 0": "--eval_inference_steps: at --flow_shift 100, only 13 of 14",
    f"--updates_per_rollout 1{'0' * 9}": "must be at least 1 and at most 10000, got 1",
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
    with pytest.raises(cli.Fault) as fault:
        checkpoints.claim_folder(train_sd35.parse_args(args))
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


TWO = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
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
    with pytest.raises(cli.Fault, match="cannot start this process .no such host."):
        with cli.launching():
            raise RuntimeError("no such host\nand a trace")


@pytest.mark.parametrize("kind", ["MULTI_GPU", "DEEPSPEED", "FSDP"])
def test_processes_wait_long_for_each_other_and_share_nothing_but_gradients(kind, monkeypatch):
    """While one validates, the others wait; what shards a model would not be this trainer."""
    asked = {}

    def accelerator(**about):
        asked.update(about)
        return SimpleNamespace(distributed_type=DistributedType[kind], device="cpu")

    monkeypatch.setattr(train_sd35, "Accelerator", accelerator)
    args = train_sd35.Arguments()
    if kind == "MULTI_GPU":
        train_sd35.launch(args)
        (patience,) = asked["kwargs_handlers"]
        assert patience.timeout >= timedelta(hours=12)
    else:
        with pytest.raises(cli.Fault, match="cannot start this process .the launcher's settings"):
            train_sd35.launch(args)


def test_a_missing_model_says_what_to_do(tiny, tmp_path):
    with pytest.raises(cli.Fault, match="cannot load .*nowhere.* or give a folder as"):
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
    return checkpoints.load(out / f"checkpoint-{step}")["parameters"]


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
    # First the weights' check, last a validation picture; 8: two times of a group of four.
    assert tried[:5] == [1, 1, 8, 4, 1]
    assert difference(lora(plain), changed) < 1e-5


def test_a_learning_rate_that_falls_takes_smaller_steps(tiny, tmp_path):
    last = {"ema_steps": 1, "ema_decay": 0}  # saves theta itself
    start = run(tiny, tmp_path / "start", learning_rate=1e-12, **last)
    far = run(tiny, tmp_path / "far", learning_rate=1e-3, **last)
    near = run(tiny, tmp_path / "near", learning_rate=1e-3, lr_scheduler="cosine", **last)
    assert 0 < difference(start, near) < 0.9 * difference(start, far)


def test_another_seed_takes_other_steps(plain, tiny, tmp_path):
    assert difference(lora(plain), run(tiny, tmp_path / "run", seed=1)) > 1e-3


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
    "beyond the paper": {"train_samples": 2, "bound": 2, "updates_per_rollout": 2},
}


UNFIT = {
    "a word": ("ocr", "prompt 2 is not for ocr: no text in quotation marks in the prompt 'a word'"),
    '"a word"': ("geneval_official", "prompt 1 is not for geneval_official"),
}


@pytest.mark.parametrize("last", UNFIT)
def test_a_prompt_that_a_reward_cannot_be_for_is_found_before_the_run(last, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text(f'a sign "YES"\n{last}\n')
    about = {"train_prompts": tmp_path / "prompts.txt", "reward": "ocr"}
    about |= {"eval_reward": UNFIT[last][0]} if UNFIT[last][0] != "ocr" else {}
    with pytest.raises(cli.Fault, match="argument --train_prompts: .*") as error:
        run(tiny, tmp_path / "run", **about)
    assert UNFIT[last][1] in str(error.value)
    assert not (tmp_path / "run" / "arguments.json").exists()


def test_an_odd_group_trains_on_all_of_it(tiny, tmp_path):
    run(tiny, tmp_path, group_size=3, max_train_steps=1)
    assert len(metrics(tmp_path)) == 1


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
        ("nan_for_all", "no group of a step has finite rewards"),
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
    with pytest.raises(cli.Fault, match=message):
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
    with pytest.raises(cli.Fault, match="the last 5 steps had no finite gradient"):
        run(tiny, tmp_path / "run", max_train_steps=9)
    lines = metrics(tmp_path / "run")
    assert [line["grad_norm"] for line in lines] == [None] * 5
    state = checkpoints.load(tmp_path / "run" / "checkpoint-5")
    assert all(torch.equal(*pair) for pair in zip(state["parameters"], state["ema"], strict=True))
    assert state["bad_steps"] == 5 and not state["optimizer"]["state"]
    with pytest.raises(cli.Fault, match="the last 2 steps had no finite gradient"):  # and no other
        before.clear()
        run(tiny, tmp_path / "short", max_train_steps=2)


def test_a_reward_that_only_watches_does_not_keep_a_run_from_its_end(tmp_path, monkeypatch):
    def stop():
        raise cli.Stopped

    asleep = threading.Event()
    monkeypatch.setattr(train_sd35.records, "validate", lambda *_: asleep.wait(60))
    model = SimpleNamespace(saved_average=contextlib.nullcontext, between_passes=stop)
    args = SimpleNamespace(output_dir=str(tmp_path))
    trainer = train_sd35.Trainer(args, SimpleNamespace(device="cpu"), model, None, None)
    monkeypatch.setattr(trainer, "render", lambda prompts: None)
    begun = time.monotonic()
    with pytest.raises(cli.Stopped):
        trainer.validate([], None, {})
    asleep.set()
    assert time.monotonic() - begun < 30


def test_pictures_that_are_not_finite_are_no_rewards_fault(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sd35.Model, "decode", lambda _, x: torch.full((len(x), 3, 16, 16), torch.nan)
    )
    with pytest.raises(cli.Fault, match="the pictures of prompt '.*' are not finite; lower --lea"):
        run(tiny, tmp_path / "run")


def test_a_prompt_of_two_lines_is_drawn_as_one(tiny, tmp_path):
    (tmp_path / "two.jsonl").write_text(json.dumps({"prompt": "red\nsquare"}))
    run(tiny, tmp_path / "run", train_prompts=tmp_path / "two.jsonl", max_train_steps=1)
    assert list((tmp_path / "run" / "validation").iterdir())


def test_a_name_that_this_locale_cannot_write_ends_no_run(tiny, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ascii_only}
    (tmp_path / "r\xf6t.txt").write_text("red square")
    prompts = {"train_prompts": tmp_path / "r\xf6t.txt", "max_train_steps": 1}
    command = [sys.executable, "train_sd35.py", *flags(tiny, tmp_path / "run", **prompts)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert "train_prompts: r??t.txt" in (tmp_path / "run" / "README.md").read_text("utf-8")


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
    assert [path.name for path in checkpoints.newest_first(tmp_path / "run")] == ["checkpoint-1"]
    assert all(parameter.isfinite().all() for parameter in load_state(tmp_path / "run", 1))
