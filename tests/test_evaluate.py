"""The evaluation, from the prompts to the tables, on the tiny pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from PIL import Image
from tiny_run import REWARD, ROOT

import evaluate
from sd35.lora import LORA_FILE, save_lora
from sd35.model import load_pipeline
from sd35.settings import UserError, parse
from tiny_sd35 import shapes

BRIGHTNESS, DARKNESS = f"{REWARD}:brightness", f"{REWARD}:darkness"
STRICT = "tiny_sd35/shapes.py:strict"


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """Folders of a LoRA without an effect and of one with an effect."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("nothing", "much")}
    for name, folder in folders.items():
        pipe = load_pipeline(str(tiny), torch.float32)
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v"])
        pipe.transformer.add_adapter(config)
        for key, parameter in pipe.transformer.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0 if name == "nothing" else 0.2)
        save_lora(pipe, folder)
    return folders


@pytest.fixture
def prompts(tmp_path):
    chosen = [p for p in shapes.prompt_list() if p["task"] in ("single", "count")][:6]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in chosen))
    return file


def words(tiny, lora, prompts, out, **changed):
    line = {"model": tiny, "lora": lora, "prompts": prompts, "output_dir": out, "seeds": 2}
    line |= {"metrics": BRIGHTNESS, "num_inference_steps": 3, "guidance_scale": 2}
    line |= {"resolution": shapes.SIDE, "max_sequence_length": shapes.TOKENS, **changed}
    values = {k: x if isinstance(x, list) else [x] for k, x in line.items() if x is not None}
    return [str(word) for name, value in values.items() for word in (f"--{name}", *value)]


def settings_of(*args, **changed):
    return parse(evaluate.EvaluationSettings, words(*args, **changed))


def run(tiny, lora, prompts, out, **changed):
    """The tables: by title, row and metric."""
    evaluate.evaluate(settings_of(tiny, lora, prompts, out, **changed))
    return json.loads((out / "table.json").read_text())


def overall(tables):
    return next(iter(tables.values()))


def images(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}


# The tables


def test_base_against_base_differs_by_exactly_zero(tiny, loras, prompts, tmp_path):
    tables = run(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=[BRIGHTNESS, STRICT])
    assert overall(tables)["difference"] == {BRIGHTNESS: [0, 0, 0], STRICT: [0, 0, 0]}
    titles = ["mean over images", "mean over 2 tasks of equal weight", "single", "count"]
    assert [title.split(",")[0] for title in tables] == titles


def test_a_change_is_measured_and_shown(tiny, loras, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    tables = run(tiny, loras["much"], prompts, out)
    base, lora, difference = (overall(tables)[name][BRIGHTNESS] for name in evaluate.ROWS)
    assert difference[0] == pytest.approx(lora[0] - base[0]) and difference[0] != 0
    assert difference[1] <= difference[0] <= difference[2]
    means = [np.asarray(Image.open(p)).mean() / 255 for p in (out / "images/base").glob("*.png")]
    assert len({*images(out / "images/base").values()}) == 12  # all from different noise
    assert np.mean(means) == pytest.approx(base[0], abs=1e-6)
    text = (out / "table.md").read_text()
    assert "6 prompts, 12 images" in text and "| DGPO, OCR | | 0.96 |" in text
    assert "| difference |" in capsys.readouterr().out
    assert Image.open(out / "grid.png").size[0] == 512


def test_images_of_equal_prompts_are_resampled_together():
    """A list that has every prompt four times tells no more: its interval is as wide."""
    values = np.random.default_rng(1).normal(3, 2, 100)
    once, often = (np.array([x, x]) for x in (values, values.repeat(4)))
    alone = evaluate.bootstrap(once, [f"prompt {i}" for i in range(100)], [range(100)])
    listed = evaluate.bootstrap(often, [f"prompt {i // 4}" for i in range(400)], [range(400)])
    assert listed["base"] == pytest.approx(alone["base"])
    mean, low, high = listed["base"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)  # not / 20


def test_prompts_are_told_apart_by_their_whole_line(tiny, loras, tmp_path):
    """One text with other metadata is another prompt, equal lines are one."""
    file, metric = tmp_path / "prompts.jsonl", tmp_path / "answers.py"
    metric.write_text("def f(images, metadata): return [line['answer'] for line in metadata]")
    lines = [json.dumps({"prompt": "red square", "answer": i}) + "\n" for i in range(4)]
    file.write_text("".join(lines * 2))
    metrics = {"metrics": [f"{metric}:f"], "seeds": 1}
    tables = run(tiny, loras["nothing"], file, tmp_path / "out", **metrics)
    assert [*tables] == ["4 prompts, 8 images"]
    mean, low, high = overall(tables)["base"][f"{metric}:f"]
    assert mean == 1.5 and low < 1 and high > 2
    assert len({v for k, v in images(tmp_path / "out/images").items() if "base" in k}) == 8


def test_the_mean_over_images_and_the_mean_over_tasks():
    """Three prompts of one task score 1, one prompt of another 0: 3/4 and 1/2."""
    scores = np.array([[1, 1, 1, 0], [1, 1, 1, 0.5]])
    over_images = evaluate.bootstrap(scores, list("abcd"), [range(4)])
    over_tasks = evaluate.bootstrap(scores, list("abcd"), [[0, 1, 2], [3]])
    assert over_images["base"][0] == pytest.approx(0.75)
    assert over_tasks["base"] == pytest.approx((0.5, 0.5, 0.5))
    assert over_tasks["difference"] == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize("order", [1, -1])
def test_tasks_of_one_length_are_resampled_apart(order):
    """Two tasks with the same scores, in the same order or in the opposite one."""
    values = np.random.default_rng(1).normal(3, 2, 100)
    both, lines = np.concatenate([values, values[::order]]), [f"prompt {i}" for i in range(200)]
    tasks = [range(100), range(100, 200)]
    mean, low, high = evaluate.bootstrap(np.array([both, both]), lines, tasks)["base"]
    half = 1.96 * values.std() / 200**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=0.03)


def test_a_pair_without_a_score_is_left_out_of_all_rows():
    scores = np.array([[1, np.nan, 3], [2, 5, 4]])
    rows = evaluate.bootstrap(scores, list("abc"), [range(3)])
    assert [rows[name][0] for name in evaluate.ROWS] == [2, 3, 1]
    empty = evaluate.bootstrap(scores, list("abc"), [[0], [1]])  # the second task has no scores
    assert empty == dict.fromkeys(evaluate.ROWS)
    assert "| base | no score |" in evaluate.table("", {row: {"m": empty[row]} for row in empty})


@pytest.mark.parametrize(("function", "missing"), [("nan_for_some", 12), ("nan_for_all", 24)])
def test_images_without_a_score_are_counted(function, missing, tiny, loras, tmp_path):
    (tmp_path / "a.txt").write_text("red square\nblue disc\n" * 3)  # an even and an odd length
    metric, out = f"{REWARD}:{function}", tmp_path / "out"
    run(tiny, loras["much"], tmp_path / "a.txt", out, metrics=[metric], batch_size=1)
    text = (out / "table.md").read_text()
    assert f"{missing} of 24 images have no score by {metric}." in text
    assert ("| no score |" in text) == (not (out / "grid.png").exists()) == (missing == 24)


# What is done is not done again, and nothing of it is lost


def test_an_interrupted_evaluation_goes_on_to_the_same_tables(
    tiny, loras, prompts, tmp_path, monkeypatch
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    tables = run(tiny, loras["much"], prompts, whole)
    calls, decode = [], evaluate.decode

    def interrupted(vae, latents):
        calls.append(len(latents))
        if len(calls) == 5:  # in the LoRA's second batch
            raise KeyboardInterrupt
        return decode(vae, latents)

    monkeypatch.setattr(evaluate, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, loras["much"], prompts, out)
    drawn = images(out)
    assert len(drawn) == 16 and drawn.items() <= images(whole).items()
    assert run(tiny, loras["much"], prompts, out) == tables
    assert calls == [4] * 7 and images(out) == images(whole)
    assert not [path for path in out.rglob(".*")]


def test_a_metric_that_is_added_later_is_all_that_is_done(
    tiny, loras, prompts, tmp_path, monkeypatch
):
    first, scored = run(tiny, loras["much"], prompts, tmp_path / "out"), []
    score = evaluate.rewards.score
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    monkeypatch.setattr(evaluate.rewards, "score", lambda *a: scored.append(a[0]) or score(*a))
    both = {"metrics": [BRIGHTNESS, DARKNESS]}
    again = overall(run(tiny, loras["much"], prompts, tmp_path / "out", **both))
    assert scored == [DARKNESS] * 6
    assert again["base"][BRIGHTNESS] == overall(first)["base"][BRIGHTNESS]
    assert again["base"][DARKNESS][0] == pytest.approx(1 - again["base"][BRIGHTNESS][0], abs=1e-6)


def test_what_a_metric_has_scored_is_saved_when_it_fails(tiny, loras, prompts, tmp_path):
    (tmp_path / "fails.py").write_text(
        "calls = []\n"
        "def failing(images):\n"
        "    calls.append(1)\n"
        "    return images.mean((1, 2, 3)) if len(calls) < 4 else 1 / 0\n"
    )
    metrics = {"metrics": [BRIGHTNESS, f"{tmp_path}/fails.py:failing"]}
    with pytest.raises(evaluate.rewards.RewardError, match="failing failed"):
        run(tiny, loras["nothing"], prompts, tmp_path / "out", **metrics)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores) == 24 + 3 * 4 and sum(BRIGHTNESS in key for key in scores) == 24


def test_a_score_is_of_a_prompts_line_and_of_a_metrics_code_and_weights(monkeypatch, tmp_path):
    own, image = tmp_path / "own.py", Path("base/00000_0.png")
    own.write_text("def f(images): return [1]")
    keys = [evaluate.score_key(image, {"prompt": "a", "n": n}, "ocr", None) for n in (1, 1, 2)]
    keys += [evaluate.score_key(image, {"prompt": "a", "n": 1}, "ocr", "other weights")]
    keys += [evaluate.score_key(image, {"prompt": "a", "n": 1}, f"{own}:f", None)]
    own.write_text("def f(images): return [2]")
    keys += [evaluate.score_key(image, {"prompt": "a", "n": 1}, f"{own}:f", None)]
    assert keys[0] == keys[1] and len({*keys}) == 5


def test_two_processes_draw_and_score_the_same(tiny, loras, prompts, tmp_path):
    alone = run(tiny, loras["much"], prompts, tmp_path / "one", batch_size=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "evaluate.py"]
    command += words(tiny, loras["much"], prompts, tmp_path / "two", batch_size=1)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "two" / "table.json").read_text()) == alone


# Settings, and ordinary mistakes


def test_settings_are_those_of_the_run(tiny, loras, prompts, tmp_path):
    folder = tmp_path / "run" / "checkpoint-20"
    shutil.copytree(loras["nothing"], folder)
    trained = {"pretrained_model_name_or_path": str(tiny), "guidance_scale": 1.0}
    trained |= {"resolution": shapes.SIDE, "max_sequence_length": shapes.TOKENS}
    (folder / "settings.yaml").write_text(yaml.safe_dump({**trained, "seed": 3}))
    unset = dict.fromkeys(("model", "resolution", "max_sequence_length", "guidance_scale"))
    settings = settings_of(None, folder, prompts, None, **unset)
    evaluate.resolve(settings)
    assert {name: getattr(settings, name) for name in trained} == trained
    # A checkpoint may be deleted by its run.
    assert Path(settings.output_dir) == tmp_path / "run" / "evaluation-checkpoint-20"
    (tmp_path / "adapter_model.safetensors").touch()  # in PEFT's form, by another trainer
    settings = settings_of(None, tmp_path, prompts, None, **unset | {"guidance_scale": 3})
    evaluate.resolve(settings)
    assert (settings.guidance_scale, settings.resolution) == (3, 512)
    assert Path(settings.output_dir) == tmp_path / "evaluation"


def test_the_reward_comes_first_and_brings_its_test_prompts(tiny, loras, prompts, tmp_path):
    def resolved(*rewards, file=None):
        metrics = {"reward": list(rewards), "metrics": ["pickscore", "ocr"]}
        settings = settings_of(tiny, loras["nothing"], file, tmp_path, **metrics)
        evaluate.resolve(settings)
        return Path(settings.prompts).name, settings.metrics

    assert resolved("ocr=2") == ("ocr_test", ["ocr", "pickscore"])
    assert resolved("geneval") == ("geneval_test", ["geneval_official", "pickscore", "ocr"])
    assert resolved("ocr", file=prompts) == ("prompts.jsonl", ["ocr", "pickscore"])
    with pytest.raises(UserError, match="--prompts is needed"):
        resolved(BRIGHTNESS)


@pytest.mark.parametrize("name", ["num_inference_steps", "lora", "prompts"])
def test_images_of_another_evaluation_are_not_mixed_in(name, tiny, loras, prompts, tmp_path):
    out, lora = tmp_path / "out", tmp_path / "lora"
    shutil.copytree(loras["nothing"], lora)
    (tmp_path / "other.txt").write_text("red square\n")
    with pytest.raises(UserError, match="cannot load --model"):  # nothing is drawn: no claim
        run(tmp_path / "none", lora, prompts, out)
    run(tiny, lora, prompts, out, seeds=1)
    shutil.copy(loras["much"] / LORA_FILE, lora if name == "lora" else tmp_path)
    changed = {"num_inference_steps": 4} if name == "num_inference_steps" else {}
    with pytest.raises(UserError, match=f"has images of another --{name}; use another --output"):
        file = tmp_path / "other.txt" if name == "prompts" else prompts
        run(tiny, lora, file, out, seeds=1, **changed)


MISTAKES = {
    "--lora {}": "--lora must be a folder with pytorch_lora_weights.safetensors or adapter_model",
    "--metrics magic": "no reward 'magic'",
    "--reward_model aesthetic=mine": "--reward_model takes .*brightness=..., got aesthetic=mine",
    "--metrics ocr": "ocr cannot score prompt 1: ",
    "--metrics {}/own.py:f": "cannot load the reward .*own.py:f: ModuleNotFoundError",
    "--resolution 100": "--resolution must be a multiple of 16, got 100",
    "--model {}/none": "cannot load --model",
    "--model {}/wide": "cannot load the LoRA in .*size mismatch",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_reported_before_anything_is_drawn(line, tiny, loras, prompts, tmp_path):
    (tmp_path / "own.py").write_text("import no_such_package\ndef f(images): return [1]\n")
    if "wide" in line:
        shapes.build(width=64, layers=2).save_pretrained(tmp_path / "wide")
    settings = settings_of(tiny, loras["much"], prompts, tmp_path / "out")
    flag, value = line.format(tmp_path).removeprefix("--").split()
    flag = "pretrained_model_name_or_path" if flag == "model" else flag
    value = int(value) if value.isdecimal() else value
    value = [value] if flag in ("metrics", "reward_model") else value
    setattr(settings, flag, value)
    with pytest.raises((UserError, evaluate.rewards.RewardError), match=MISTAKES[line]):
        evaluate.evaluate(settings)
    assert not images(tmp_path)
