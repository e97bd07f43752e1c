"""The arguments of the trainer: the released recipes, files, flags and mistakes."""

import dataclasses
from dataclasses import asdict, dataclass

import pytest
import torch
from diffusers.optimization import get_scheduler

import train_sd35
from sd35.model import trained_times
from sd35.run import run_script
from sd35.settings import Settings, learning_rate_at, parse, remarks_of, task_of

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
    settings = parse(Settings, ["--reward", reward, "--recipe", recipe])
    values = {**asdict(settings), "trained": len(trained_times(settings))}
    expected = dict(zip(COLUMNS, PUBLISHED[reward, recipe], strict=True))
    assert {name: values[name] for name in COLUMNS} == expected
    common = "learning_rate rank lora_alpha train_timesteps num_inference_steps flow_shift sampler"
    expected = [3e-4, 64, 128, 4, 10, 3.0, "dpm++"]
    assert [values[name] for name in common.split()] == expected
    assert (settings.ema_decay, settings.ema_steps, settings.old_ema_decay) == (0.9, 8, 0.3)


def test_the_task_follows_the_rewards_of_the_folder():
    assert task_of(["geneval_official=2"]) == task_of(["pickscore", "ocr", "geneval"]) == "geneval"
    assert task_of(["aesthetic", "ocr"]) == "ocr"
    assert task_of(["ocr/mine.py:geneval"]) == "pickscore"


def test_flags_win_over_the_file_which_wins_over_the_released_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("reward: geneval\nrecipe: cfg_free\nkl: 1\nclip: 0.5\n")
    settings = parse(Settings, ["--kl", "0", "--config", f"{tmp_path}/a.yaml"])
    values = (settings.kl, settings.clip, settings.std, settings.guidance_scale, settings.beta)
    assert values == (0, 0.5, "group", 1.0, 100.0)  # of flag, file, geneval, cfg_free, all
    settings = parse(Settings, ["--recipe", "cfg_free_ema", "--reward", "pickscore"])
    assert (settings.beta, settings.group_size) == (2000, 24)  # the recipe wins over the task


def test_a_flag_has_two_spellings_and_a_switch_has_a_no():
    for flag in ("--t-min 0.5", "--t_min=0.5"):
        settings = parse(Settings, f"--no-offline --output_dir a-b {flag}".split())
        assert (settings.offline, settings.output_dir, settings.t_min) == (False, "a-b", 0.5)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),  # which YAML reads as false
        ("gradient-checkpointing: no", "gradient_checkpointing", False),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # which YAML reads as a string
        ("reward: [ocr, pickscore=2]", "reward", ["ocr", "pickscore=2"]),
    ],
)
def test_a_file_says_what_the_flags_say(line, name, value, tmp_path):
    (tmp_path / "a.yaml").write_text(line)
    assert getattr(parse(Settings, ["--config", f"{tmp_path}/a.yaml"]), name) == value


@pytest.mark.parametrize("line", ["", "--reward ocr --recipe cfg_free --no_gradient_checkpointing"])
def test_printed_settings_are_a_config_of_the_same_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_sd35.py", *line.split(), "--print-settings"])
    train_sd35.main()
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    again = parse(Settings, ["--config", f"{tmp_path}/a.yaml"])
    assert dataclasses.replace(again, config=None) == parse(Settings, line.split())


@dataclass
class Own(Settings):
    """Settings of another script."""

    # How often, and
    # 50 % of the time.
    runs: int = 3
    name: str | None = None  # What to call it.


def test_comments_are_the_help_with_every_default(capsys):
    remarks = remarks_of(Own)
    assert all(remarks[field.name].endswith((".", ")")) for field in dataclasses.fields(Own))
    with pytest.raises(SystemExit):
        parse(Own, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--runs RUNS How often, and 50 % of the time. (default: 3)" in text
    assert "--name NAME What to call it." in text
    assert "(beta_dpo) (default: 100.0, pickscore 10.0, cfg_free_ema 2000.0)" in text


MISTAKES = {
    "--recipe magic": "argument --recipe: invalid choice: 'magic'",
    "--config none.yaml": "--config: cannot read none.yaml",
    "--config a.yaml": "unrecognized arguments: --magic",
    "--config b.yaml": "--config: cannot read b.yaml",
    "--config c.yaml": "--config: cannot read c.yaml",
    "--group_size 1": "--group_size must be at least 2, got 1",
    "--micro_batch_size few": "--micro_batch_size must be a number or auto, got few",
    "--resolution 500": "--resolution must be a multiple of 16, got 500",
    "--train_samples 3": "--train_samples must be even and at most --group_size, got 3",
    "--beta 0": "--beta must be above 0, got 0",
    "--validation_steps 0": "--validation_steps must be above 0, got 0",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"a": "beta: 1\nmagic: 1", "b": "beta: [1", "c": "- beta"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: parse(Settings, line.split()))
    *_, sentence = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and MISTAKES[line] in sentence


SCHEDULES = [("constant_with_warmup", 3), ("cosine", 0), ("cosine", 3)]


@pytest.mark.parametrize(("name", "warmup"), SCHEDULES)
def test_the_learning_rate_is_that_of_diffusers_schedules(name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    chosen = {"lr_scheduler": name.split("_")[0], "lr_warmup_steps": warmup}
    settings = Settings(learning_rate=2.0, max_train_steps=10, **chosen)
    for step in range(10):
        assert learning_rate_at(settings, step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
