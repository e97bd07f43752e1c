"""The evaluation, end to end on the tiny pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import shapes
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import evaluate

ROOT = Path(__file__).parents[1]
BRIGHTNESS = f"{ROOT}/tests/own_rewards.py:brightness"
STRICT = "shapes:strict"


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """Two LoRAs: one that changes nothing, and one that does."""
    folders = {}
    for name, scale in (("nothing", 0.0), ("much", 0.2)):
        transformer = StableDiffusion3Pipeline.from_pretrained(tiny).transformer
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v"])
        transformer.add_adapter(config)
        for key, parameter in transformer.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 1).mul_(scale)
        folders[name] = tmp_path_factory.mktemp(name)
        StableDiffusion3Pipeline.save_lora_weights(
            folders[name],
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
    return folders


@pytest.fixture
def prompts(tmp_path):
    chosen = [p for p in shapes.prompt_list() if p["task"] in ("single", "count")][:6]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in chosen))
    return file


def flags(tiny, lora, prompts, out, **changed):
    settings = {
        "model": tiny,
        "lora": lora,
        "prompts": prompts,
        "output_dir": out,
        "metrics": [BRIGHTNESS, STRICT],
        "num_inference_steps": 3,
        "guidance_scale": 2,
        "resolution": shapes.SIDE,
        "max_sequence_length": shapes.TOKENS,
        "seeds": 2,
        **changed,
    }
    line = []
    for name, value in settings.items():
        if value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def run(*args, **changed):
    evaluate.evaluate(evaluate.parse_args(flags(*args, **changed)))
    return json.loads((args[3] / "table.json").read_text())


def test_base_against_base_differs_by_exactly_zero(tiny, loras, prompts, tmp_path):
    found = run(tiny, loras["nothing"], prompts, tmp_path / "out")
    assert set(found["all"]["difference"]) == {BRIGHTNESS, STRICT}
    assert all(cell == [0, 0, 0] for cell in found["all"]["difference"].values())
    assert set(found["tasks"]) == {"single", "count"}


def test_a_change_is_measured_and_shown(tiny, loras, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    found = run(tiny, loras["much"], prompts, out)
    base, lora, difference = (found["all"][n][BRIGHTNESS] for n in ("base", "LoRA", "difference"))
    assert difference[0] == pytest.approx(lora[0] - base[0]) and difference[0] != 0
    assert difference[1] <= difference[0] <= difference[2]
    by_hand = [np.asarray(Image.open(p)).mean() / 255 for p in (out / "images/base").glob("*.png")]
    assert len(by_hand) == 12 and np.mean(by_hand) == pytest.approx(base[0], abs=1e-6)
    text = (out / "table.md").read_text()
    assert "6 prompts, 2 each" in text and "| DGPO, OCR | | 0.96 |" in text
    assert "| difference |" in capsys.readouterr().out
    assert Image.open(out / "grid.png").size[0] == 512


def test_what_is_done_is_not_done_again(tiny, loras, prompts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    first = run(tiny, loras["much"], prompts, out, metrics=BRIGHTNESS)
    drawn = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    damaged = out / "images" / "lora" / "00002_1.png"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:50])

    asked = []
    original = evaluate.rewards.load
    monkeypatch.setattr(
        evaluate.rewards, "load", lambda name, *rest: asked.append(name) or original(name, *rest)
    )
    again = run(tiny, loras["much"], prompts, out)
    assert asked == [STRICT]  # the new metric; the other was kept
    assert again["all"]["base"][BRIGHTNESS] == first["all"]["base"][BRIGHTNESS]
    assert f"{damaged} is damaged: drawn again" in capsys.readouterr().out
    assert damaged.read_bytes() == before
    changed = [path for path, time in drawn.items() if path.stat().st_mtime_ns != time]
    assert changed == [damaged]


def test_pictures_of_other_settings_are_not_mixed_in(tiny, loras, prompts, tmp_path):
    run(tiny, loras["nothing"], prompts, tmp_path / "out")
    with pytest.raises(evaluate.Fault, match="holds pictures of another num_inference_steps"):
        run(tiny, loras["nothing"], prompts, tmp_path / "out", num_inference_steps=4)


def test_two_processes_draw_and_score_the_same(tiny, loras, prompts, tmp_path):
    alone = run(tiny, loras["much"], prompts, tmp_path / "one", metrics=BRIGHTNESS, batch_size=1)
    line = flags(tiny, loras["much"], prompts, tmp_path / "two", metrics=BRIGHTNESS, batch_size=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "evaluate.py", *line]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "two" / "table.json").read_text()) == alone


def test_the_default_metrics_are_those_at_hand(tiny, loras, prompts, tmp_path, tiny_clip, capsys):
    out, clip = tmp_path / "out", f"pickscore={tiny_clip}"
    found = run(tiny, loras["much"], prompts, out, metrics=None, reward_model=clip)
    assert list(found["all"]["base"]) == ["pickscore"]
    said = capsys.readouterr().out
    for missing in ("aesthetic", "imagereward", "unifiedreward"):
        assert f"without {missing}: argument --metrics: cannot load {missing} (" in said
    assert "ocr" not in said  # no prompt has a text in quotation marks
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_tasks_reward_comes_first_and_brings_its_prompts(
    tiny, loras, prompts, tmp_path, monkeypatch
):
    def urlopen(url, timeout):
        raise OSError("no route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate.prompt_sets.urllib.request, "urlopen", urlopen)
    out = tmp_path / "out"
    found = run(tiny, loras["much"], prompts, out, reward=STRICT, metrics=[BRIGHTNESS, STRICT])
    assert list(found["all"]["base"]) == [STRICT, BRIGHTNESS]
    found = run(tiny, loras["much"], prompts, out, reward=STRICT, metrics=None)
    assert list(found["all"]["base"]) == [STRICT]  # nothing else is at hand
    with pytest.raises(evaluate.Fault, match="argument --prompts: cannot fetch .*/ocr/test.txt"):
        run(tiny, loras["much"], None, out, reward="ocr", metrics=None)


def test_no_metric_at_hand_is_an_error(tiny, loras, prompts, tmp_path):
    with pytest.raises(evaluate.Fault, match="none is at hand; name one to fetch: aesthetic, "):
        run(tiny, loras["much"], prompts, tmp_path / "out", metrics=None)


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = evaluate.bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == values.mean()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)


BAD = {
    "--lora {}/none": "argument --lora: there is no",
    "--metrics magic": "argument --metrics: no reward 'magic'",
    "--prompts {}/empty.txt": "argument --prompts: ",
    "--metrics geneval": "argument --prompts: prompt 1 has no GenEval metadata",
    "--seeds 0": "argument --seeds: must be at least 1, got 0",
    "--resolution 100": "argument --resolution: must be a multiple of 16, got 100",
    "--reward_model clip": "argument --reward_model: must be name=path, got clip",
    "--nonsense 3": "there is no argument --nonsense",
    "--model {}/none": "cannot load",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line, tiny, loras, prompts, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    argv = flags(tiny, loras["nothing"], prompts, tmp_path / "out") + line.format(tmp_path).split()
    with pytest.raises(evaluate.Fault) as fault:
        evaluate.evaluate(evaluate.parse_args(argv))
    assert BAD[line] in str(fault.value) and "\n" not in str(fault.value)


def test_what_is_missing_is_asked_for():
    with pytest.raises(evaluate.Fault, match="argument --lora: is needed"):
        evaluate.parse_args([])


def test_a_lora_of_another_model_is_named(tiny, loras, prompts, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(loras["nothing"], other)
    shapes.build(width=64, layers=1).save_pretrained(tmp_path / "model")
    with pytest.raises(evaluate.Fault, match="argument --lora: does not fit the model"):
        run(tmp_path / "model", other, prompts, tmp_path / "out")
