"""The evaluation, end to end on the tiny pipeline."""

import json
import os
import shutil
import socket
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
from safetensors.torch import load_file, save_file

import evaluate
import sd35

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


def rows(found):
    """The first table, of all pictures."""
    return next(iter(found.values()))


def test_base_against_base_differs_by_exactly_zero(tiny, loras, prompts, tmp_path):
    found = run(tiny, loras["nothing"], prompts, tmp_path / "out")
    assert set(rows(found)["difference"]) == {BRIGHTNESS, STRICT}
    assert all(cell == [0, 0, 0] for cell in rows(found)["difference"].values())
    assert [title.split(",")[0] for title in found] == [
        "mean over images",
        "mean over 2 tasks",
        "single",
        "count",
    ]


def test_a_change_is_measured_and_shown(tiny, loras, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    found = run(tiny, loras["much"], prompts, out)
    base, lora, difference = (rows(found)[name][BRIGHTNESS] for name in evaluate.ROWS)
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
    other = out / "images" / "base" / "00000_0.png"
    Image.new("RGB", (5, 5)).save(other)

    asked = []
    original = evaluate.rewards.load
    monkeypatch.setattr(
        evaluate.rewards, "load", lambda name, *rest: asked.append(name) or original(name, *rest)
    )
    again = run(tiny, loras["much"], prompts, out)
    assert asked == [STRICT]  # the new metric; the other was kept
    assert rows(again)["base"][BRIGHTNESS] == rows(first)["base"][BRIGHTNESS]
    assert f"{damaged} is damaged: drawn again" in capsys.readouterr().out
    assert damaged.read_bytes() == before
    changed = [path for path, time in drawn.items() if path.stat().st_mtime_ns != time]
    assert set(changed) == {damaged, other}


def test_scores_by_other_weights_are_not_taken_over(tiny, loras, prompts, tmp_path, monkeypatch):
    """A metric whose --reward_model is another is scored anew, and the first one's are kept."""
    answers = {"one": 0.25, "two": 0.75}
    asked = []

    def load(name, device, model):
        asked.append(model)
        return lambda images, _: [answers[model]] * len(images)

    monkeypatch.setattr(evaluate.rewards, "load", load)
    for model in ("one", "two", "one"):
        settings = {"metrics": "pickscore", "reward_model": f"pickscore={model}"}
        found = run(tiny, loras["much"], prompts, tmp_path / "out", **settings)
        assert rows(found)["base"]["pickscore"] == [answers[model]] * 3
    assert asked == ["one", "two"]


def test_pictures_of_other_settings_are_not_mixed_in(tiny, loras, prompts, tmp_path):
    run(tiny, loras["nothing"], prompts, tmp_path / "out")
    with pytest.raises(evaluate.Fault, match="holds pictures of another num_inference_steps"):
        run(tiny, loras["nothing"], prompts, tmp_path / "out", num_inference_steps=4)


def test_a_lora_that_was_trained_further_is_another(tiny, loras, prompts, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(loras["nothing"], folder)
    run(tiny, folder, prompts, tmp_path / "out", metrics=BRIGHTNESS)
    shutil.copy(loras["much"] / evaluate.LORA_FILE, folder)
    with pytest.raises(evaluate.Fault, match="holds pictures of another LoRA; give another folder"):
        run(tiny, folder, prompts, tmp_path / "out", metrics=BRIGHTNESS)


def test_the_process_group_is_ended(tiny, loras, prompts, tmp_path, monkeypatch):
    """Without it, one of several processes ends by SIGABRT now and then: pytorch issue 190489."""
    ended = []
    monkeypatch.setattr(evaluate.PartialState, "destroy_process_group", lambda _: ended.append(1))
    run(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=BRIGHTNESS)
    assert len(ended) == 1


def test_two_processes_draw_and_score_the_same(tiny, loras, prompts, tmp_path):
    alone = run(tiny, loras["much"], prompts, tmp_path / "one", metrics=BRIGHTNESS, batch_size=1)
    line = flags(tiny, loras["much"], prompts, tmp_path / "two", metrics=BRIGHTNESS, batch_size=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "evaluate.py", *line]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "two" / "table.json").read_text()) == alone


def test_the_default_metrics_are_those_at_hand(
    tiny, loras, prompts, tmp_path, tiny_clip, capsys, monkeypatch
):
    """Nothing is asked of the network for it."""
    asked = []

    def getaddrinfo(host, *rest, **more):
        asked.append(host)
        raise OSError("no route")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out, clip = tmp_path / "out", f"pickscore={tiny_clip}"
    found = run(tiny, loras["much"], prompts, out, metrics=None, reward_model=clip)
    assert list(rows(found)["base"]) == ["pickscore"]
    said = capsys.readouterr().out
    assert asked == []
    for missing in ("aesthetic", "imagereward", "unifiedreward"):
        assert f"without {missing}: cannot load the reward {missing}: " in said
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
    assert list(rows(found)["base"]) == [STRICT, BRIGHTNESS]
    found = run(tiny, loras["much"], prompts, out, reward=STRICT, metrics=None)
    assert list(rows(found)["base"]) == [STRICT]  # nothing else is at hand
    with pytest.raises(evaluate.Fault, match="argument --prompts: cannot fetch .*/ocr/test.txt"):
        run(tiny, loras["much"], None, out, reward="ocr", metrics=None)


def test_no_metric_at_hand_is_an_error(tiny, loras, prompts, tmp_path):
    with pytest.raises(evaluate.Fault, match="none is at hand; name one to fetch: aesthetic, "):
        run(tiny, loras["much"], prompts, tmp_path / "out", metrics=None)


def test_the_interval_is_the_bootstraps():
    values = np.random.default_rng(1).normal(3, 2, 400)
    texts = [f"prompt {i}" for i in range(400)]
    mean, low, high = evaluate.bootstrap(np.array([values, values]), texts, [range(400)])["base"]
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)


def test_what_is_resampled_are_prompts_by_their_text():
    """A list that has every prompt four times is no wider a basis: the interval is as without."""
    values = np.random.default_rng(1).normal(3, 2, 100)
    once, often = (np.array([x, x]) for x in (values, values.repeat(4)))
    alone = evaluate.bootstrap(once, [f"prompt {i}" for i in range(100)], [range(100)])
    listed = evaluate.bootstrap(often, [f"prompt {i // 4}" for i in range(400)], [range(400)])
    assert listed["base"] == pytest.approx(alone["base"])
    mean, low, high = listed["base"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 10, rel=0.05)  # not / 20


def test_the_mean_over_images_and_the_mean_over_tasks():
    """Three prompts of one task score 1, one prompt of another 0: 3/4 and 1/2."""
    scores = np.array([[1, 1, 1, 0], [1, 1, 1, 0.5]])
    over_images = evaluate.bootstrap(scores, list("abcd"), [range(4)])
    over_tasks = evaluate.bootstrap(scores, list("abcd"), [[0, 1, 2], [3]])
    assert over_images["base"][0] == pytest.approx(0.75)
    assert over_tasks["base"] == pytest.approx((0.5, 0.5, 0.5))
    assert over_tasks["difference"] == pytest.approx((0.25, 0.25, 0.25))


def test_a_pair_without_a_score_is_left_out_of_all_rows():
    scores = np.array([[1, np.nan, 3], [2, 5, 4]])
    found = evaluate.bootstrap(scores, list("abc"), [range(3)])
    assert [found[row][0] for row in evaluate.ROWS] == [2, 3, 1]
    none = evaluate.bootstrap(scores, list("abc"), [[0], [1]])  # a task without any
    assert none == dict.fromkeys(evaluate.ROWS)
    assert "| base | no score |" in evaluate.table("", {row: {"m": none[row]} for row in none})


def test_answers_without_a_score_are_counted_and_do_not_end_it(
    tiny, loras, prompts, tmp_path, monkeypatch, capsys
):
    nan = float("nan")
    answers = iter([[0.5, nan, 0.5, 0.5], *[[0.5] * 4] * 5] * 2)
    monkeypatch.setattr(evaluate.rewards, "load", lambda *_: lambda *_: next(answers))
    settings = {"metrics": [BRIGHTNESS], "batch_size": 4}
    found = run(tiny, loras["much"], prompts, tmp_path / "out", **settings)
    assert rows(found)["base"][BRIGHTNESS] == [0.5, 0.5, 0.5]
    line = f"1 of 24 answers of {BRIGHTNESS} had no score."
    assert line in capsys.readouterr().out and line in (tmp_path / "out/table.md").read_text()

    answers = iter([[nan] * 4] * 6)
    (tmp_path / "out" / "scores.json").unlink()
    with pytest.raises(evaluate.Fault, match="none of 24 .*brightness had a score; mend"):
        run(tiny, loras["much"], prompts, tmp_path / "out", **settings)


def test_lists_that_repeat_their_prompts_say_how_many_pictures_each_has(
    tiny, loras, tmp_path, capsys
):
    """Each repetition has noise of its own; --seeds are of each."""
    (tmp_path / "five.txt").write_text("a red square\na blue circle\n" * 5)
    out = tmp_path / "out"
    run(tiny, loras["nothing"], tmp_path / "five.txt", out, metrics=BRIGHTNESS, seeds=1)
    assert "| 2 prompts, 5 each |" in (out / "table.md").read_text()
    red = [(out / f"images/base/{i:05d}_0.png").read_bytes() for i in range(0, 10, 2)]
    assert len(set(red)) == 5


def test_settings_are_those_of_the_run(tiny, loras, prompts, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoint-20"
    shutil.copytree(loras["nothing"], folder)
    trained = {
        "pretrained_model_name_or_path": str(tiny),
        "guidance_scale": 1.0,
        "resolution": shapes.SIDE,
        "max_sequence_length": shapes.TOKENS,
        "seed": 3,
    }
    (tmp_path / "run" / "arguments.json").write_text(json.dumps(trained))
    given = dict.fromkeys(("model", "resolution", "max_sequence_length", "guidance_scale"))
    settings = {**given, "metrics": BRIGHTNESS}
    run(None, folder, prompts, tmp_path / "out", **settings)
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert [kept[name] for name in trained if name != "seed"] == list(trained.values())[:4]
    assert "guidance_scale 1.0, resolution 16, " in capsys.readouterr().out

    run(None, folder, prompts, tmp_path / "own", **settings | {"guidance_scale": 3})
    assert json.loads((tmp_path / "own" / "settings.json").read_text())["guidance_scale"] == 3
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("6 prompts, 2 each, in 3 steps, by base and ")
    assert "guidance_scale 3.0, resolution 16, " in said[1]
    assert said[1].endswith(f"; those not given are those of {tmp_path}/run/arguments.json")
    assert said[2].startswith(f"scored by {BRIGHTNESS}; on cpu, results in ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot read .*arguments.json"),
        ("[3]", "cannot read .*arguments.json .it holds no JSON object"),
        ('{"resolution": "large"}', "cannot use .*arguments.json .*resolution: .*'large'.*; mend"),
        ('{"resolution": 100}', "--resolution: must be a multiple of 16, got 100"),
        ('{"guidance_scale": NaN}', "--guidance_scale: must be at least 1, got nan"),
    ],
)
def test_rubbish_that_the_run_left_is_one_line(content, message, loras, prompts, tmp_path):
    shutil.copytree(loras["nothing"], tmp_path / "run")
    (tmp_path / "run" / "arguments.json").write_text(content)
    with pytest.raises(evaluate.Fault, match=message) as fault:
        evaluate.parse_args(["--lora", str(tmp_path / "run"), "--prompts", str(prompts)])
    assert "\n" not in str(fault.value)


def test_two_evaluations_in_one_folder_do_not_interleave(tiny, loras, prompts, tmp_path):
    """The lock is a process's, so the other one is another process."""
    out = tmp_path / "out"
    out.mkdir()
    code = f"from checkpoints import *; lock_folder(Path({str(out)!r})); print(input('in'))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.read(2) == "in"
        with pytest.raises(evaluate.Fault, match="argument --output_dir: .* is at work in "):
            run(tiny, loras["nothing"], prompts, out)
        other.communicate("\n")
    assert list(out.iterdir()) == [out / ".lock"]
    run(tiny, loras["nothing"], prompts, out)


def test_a_metric_of_ones_own_that_has_changed_is_asked_again(tiny, loras, prompts, tmp_path):
    own, means = tmp_path / "own.py", []
    for score in (1, 1, 2):
        own.write_text(f"def f(images, prompts): return [{score}] * len(images)\n")
        evaluate.content.cache_clear()
        for module in [name for name in sys.modules if name == "own"]:
            del sys.modules[module]
        found = run(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=f"{own}:f")
        means.append(rows(found)["base"][f"{own}:f"][0])
    assert means == [1, 1, 2]


def test_what_a_prompts_line_asks_for_is_part_of_its_score(tiny, loras, tmp_path):
    own, prompts, means = tmp_path / "other.py", tmp_path / "p.jsonl", []
    own.write_text("def f(images, prompts): return [prompt['n'] for prompt in prompts]")
    for n in (1.0, 5.0):
        prompts.write_text(json.dumps({"prompt": "red square", "n": n}))
        found = run(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=f"{own}:f")
        means.append(rows(found)["base"][f"{own}:f"][0])
    assert means == [1.0, 5.0]


def test_what_a_metric_has_scored_is_kept_if_the_next_one_fails(tiny, loras, prompts, tmp_path):
    own, asked = tmp_path / "two.py", tmp_path / "asked"
    own.write_text(
        "import os\n"
        "def slow(images, prompts):\n"
        f"    open({str(asked)!r}, 'a').write('x' * len(images))\n"
        "    return [1] * len(images)\n"
        f"def bad(images, prompts): return [os.stat({str(tmp_path / 'server')!r}).st_size]\n"
    )
    metrics = [f"{own}:slow", f"{own}:bad"]
    for _ in range(2):
        with pytest.raises(evaluate.rewards.RewardError, match="two.py:bad failed"):
            run(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=metrics)
    assert len(asked.read_text()) == len(list(tmp_path.glob("out/images/*/*.png")))


def test_a_checkpoints_evaluation_is_not_in_it(loras, prompts, tmp_path):
    shutil.copytree(loras["nothing"], tmp_path / "run" / "checkpoint-2")
    line = ["--prompts", str(prompts), "--metrics", "compressibility", "--lora"]
    args = evaluate.parse_args([*line, str(tmp_path / "run" / "checkpoint-2")])
    assert Path(args.output_dir).resolve() == tmp_path / "run" / "evaluation-checkpoint-2"
    args = evaluate.parse_args([*line, str(loras["nothing"])])
    assert Path(args.output_dir).resolve() == Path(loras["nothing"]) / "evaluation"


def test_settings_bind_once_there_is_a_picture(tiny, loras, prompts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(evaluate.Fault, match="the model has at most 16, got 4096"):
        run(tiny, loras["nothing"], prompts, out, resolution=4096)
    run(tiny, loras["nothing"], prompts, out)
    (out / "settings.json").write_text("{}")
    with pytest.raises(evaluate.Fault, match="holds pictures of another "):
        run(tiny, loras["nothing"], prompts, out, guidance_scale=3)


@pytest.mark.parametrize("name", ["scores.json", "settings.json"])
@pytest.mark.parametrize(
    "content", ["", "[1]", '{"a": "b"}', '{"a": 1e300}', '{"a": {}}', "[" * 10**5]
)
def test_rubbish_in_the_folder_is_one_line(name, content, tiny, loras, prompts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    if name == "settings.json":
        (out / "images" / "base").mkdir(parents=True)
        (out / "images" / "base" / "00000_0.png").touch()
    with pytest.raises(evaluate.Fault) as fault:
        run(tiny, loras["nothing"], prompts, out, metrics=BRIGHTNESS)
    assert str(out) in str(fault.value) and "\n" not in str(fault.value)


def change(weights, how):
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    if how == "NaN":
        weights[name][0, 0] = float("nan")
    elif how == "no tensors":
        weights.clear()
    elif how == "other shapes":
        weights[name] = torch.zeros(4, 7)
    elif how == "other ranks":
        weights[name] = torch.zeros(3, 32)
    elif how == "no dimensions":
        weights[name.replace("lora_A", "lora_B")] = torch.tensor(1.0)
    elif how == "no numbers":
        for name, x in weights.items():
            weights[name] = x[:0].clone() if "lora_A" in name else x[:, :0].clone()
    elif how == "half a pair":
        del weights[name]
    elif how == "one stray key":
        weights["transformer.transformer_blocks.9.attn.to_q.lora_A.weight"] = torch.zeros(4, 32)
    elif how == "keys of another format":
        return {name.replace("transformer.", "unet.", 1): x for name, x in weights.items()}
    return weights


MISFITS = {
    "NaN": "transformer.transformer_blocks.0.attn.to_q.lora_[AB].weight holds NaN, infinity",
    "no tensors": "it is empty",
    "other shapes": r"attn.to_q has \[4, 7\], \[32, 4\] for \[32, 32\]",
    "other ranks": r"attn.to_q has \[3, 32\], \[32, 4\] for \[32, 32\]",
    "no dimensions": "0-d",
    "no numbers": "lora_[AB].weight holds NaN, infinity, or no real numbers",
    "half a pair": "the model has no place for .*blocks.0.attn.to_q.lora_B.weight",
    "one stray key": "the model has no place for .*blocks.9.attn.to_q.lora_A.weight",
    "keys of another format": "the model has no place for unet.",
}


@pytest.mark.parametrize("how", MISFITS)
def test_a_lora_is_looked_at_before_anything_is_drawn(how, tiny, loras, prompts, tmp_path):
    """diffusers says nothing of names that fit nothing, and base would be compared with base."""
    (tmp_path / "lora").mkdir()
    weights = change(load_file(loras["much"] / evaluate.LORA_FILE), how)
    save_file(weights, tmp_path / "lora" / evaluate.LORA_FILE)
    with pytest.raises(
        evaluate.Fault, match=f"argument --lora: cannot use .*{MISFITS[how]}.*; give one"
    ) as fault:
        run(tiny, tmp_path / "lora", prompts, tmp_path / "out", metrics=BRIGHTNESS)
    assert "\n" not in str(fault.value) and not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("how", ["NaN", "keys of another format"])
def test_the_tiny_worlds_look_at_a_lora_too(how, tiny, loras, tmp_path, monkeypatch):
    weights = change(load_file(loras["much"] / evaluate.LORA_FILE), how)
    save_file(weights, tmp_path / evaluate.LORA_FILE)
    shutil.copytree(tiny, tmp_path / "out")
    line = f"--lora {tmp_path} --out {tmp_path}/out"
    monkeypatch.setattr("sys.argv", ["shapes.py", *line.split()])
    with pytest.raises(evaluate.Fault, match=f"argument --lora: cannot use .*{MISFITS[how]}"):
        shapes.main()
    with pytest.raises(evaluate.Fault, match="another world: it draws pictures of 16 pixels, and"):
        save_file(load_file(loras["much"] / evaluate.LORA_FILE), tmp_path / evaluate.LORA_FILE)
        monkeypatch.setattr(shapes, "SIDE", 64)
        shapes.main()
    with pytest.raises(evaluate.Fault, match="argument --out: .* holds out, and no pipeline of a"):
        shapes.read_arguments(["--out", str(tmp_path)])


def test_a_lora_that_is_truncated_is_named(tiny, loras, prompts, tmp_path):
    (tmp_path / "lora").mkdir()
    content = (loras["much"] / evaluate.LORA_FILE).read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        (tmp_path / "lora" / evaluate.LORA_FILE).write_bytes(content[:size])
        with pytest.raises(evaluate.Fault, match="argument --lora: cannot use ") as fault:
            run(tiny, tmp_path / "lora", prompts, tmp_path / f"out-{size}", metrics=BRIGHTNESS)
        assert "\n" not in str(fault.value)


def test_it_says_nothing_but_its_own(tiny, loras, prompts, tmp_path):
    """transformers speaks of torchvision, which nothing here needs."""
    line = flags(tiny, loras["nothing"], prompts, tmp_path / "out", metrics=BRIGHTNESS)
    environment = {k: x for k, x in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    said = subprocess.run(
        [sys.executable, "evaluate.py", *line],
        cwd=ROOT,
        env={**environment, "MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0 and said.stderr == ""
    assert said.stdout.startswith("6 prompts, 2 each, in 3 steps, by base and ")


BAD = {
    "--lora {}/none": "argument --lora: must be a folder with",
    "--metrics magic": "argument --metrics: no reward 'magic'",
    "--prompts {}/empty.txt": "argument --prompts: ",
    "--metrics geneval": "argument --prompts: prompt 1 is not for geneval",
    "--seeds 0": "argument --seeds: must be at least 1 and at most 1000, got 0",
    "--metrics compressibility=2": "argument --metrics: a metric has no weight",
    "--guidance_scale nan": "argument --guidance_scale: must be at least 1, got nan",
    "--resolution 4096": "argument --resolution: the model has at most",
    "--resolution 100": "argument --resolution: must be a multiple of 16, got 100",
    "--reward_model clip": "argument --reward_model: must be name=path, got clip",
    "--reward_model ocr=x": "argument --reward_model: ocr is not among ",
    "--seeds 1000 --prompts {}/many.txt": "argument --seeds: 1001 prompts of each are 1001000 pic",
    "--metrics ocr ocr": "argument --metrics: ocr is there twice; give it once",
    "--reward_model {}=x": "argument --reward_model: ",
    "--output_dir {}": "holds empty.txt, and no evaluation; give a new folder, or an empty one",
    "--nonsense 3": "unrecognized arguments: --nonsense 3",
    "--model {}/none": "cannot load",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line, tiny, loras, prompts, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "many.txt").write_text("a\n" * 1001)
    given = {"metrics": None} if "--metrics" in line else {}
    argv = flags(tiny, loras["nothing"], prompts, tmp_path / "out", **given)
    argv += line.format(tmp_path).split()
    with pytest.raises(evaluate.Fault) as fault:
        evaluate.evaluate(evaluate.parse_args(argv))
    assert BAD[line] in str(fault.value) and "\n" not in str(fault.value)


def test_a_bad_argument_is_answered_before_a_library_is_loaded():
    """Here none can be."""
    command = [sys.executable, "-S", "evaluate.py", "--seeds", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    said = "argument --seeds: must be at least 1 and at most 1000, got 0"
    assert ended.stderr == f"evaluate.py: {said}\n"


def test_the_lora_is_looked_for_where_diffusers_puts_it():
    assert evaluate.LORA_FILE == sd35.LORA_FILE


def test_what_is_missing_is_asked_for():
    with pytest.raises(evaluate.Fault, match="argument --lora: must be a folder with"):
        evaluate.parse_args([])


def test_a_lora_of_another_model_is_named(tiny, loras, prompts, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(loras["nothing"], other)
    shapes.build(width=64, layers=1).save_pretrained(tmp_path / "model")
    with pytest.raises(evaluate.Fault, match="argument --lora: cannot use .* has .* for "):
        run(tmp_path / "model", other, prompts, tmp_path / "out")
