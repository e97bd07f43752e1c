"""What a person sees of a run: validation sheets, curves, the model card."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from matplotlib.axes import Axes
from PIL import Image
from tiny_run import metrics

import rewards
from sd35 import report
from sd35.settings import Settings


def test_a_sheet_shows_its_images_with_headings_and_captions():
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    sheet = report.sheet([("above", ["a", "b"], images[:2]), ("w" * 99, ["c"], images[2:])], 80)
    assert sheet.size == (160, 2 * (80 + 44))
    pixels = np.asarray(sheet)
    for image, (x, y) in zip(rewards.to_bytes(images), [(0, 22), (80, 22), (0, 146)], strict=True):
        assert (pixels[y : y + 80 : 2, x : x + 80 : 2] == image).all()
    assert all((pixels[y : y + 22, :80] < 128).any() for y in (0, 102, 124, 226))  # the text


class Blank:
    reference = saved_average = staticmethod(nullcontext)
    device, latent_shape = "cpu", (1, 1, 1)

    def sample(self, text, noise, steps, guidance):
        return noise

    def decode(self, latents):
        return torch.zeros(1, 3, 64, 64)


def test_many_validation_prompts_are_all_scored_and_the_sheet_stays_small(tmp_path):
    """Some trackers open the sheet with PIL, which refuses 179 million pixels."""
    parts, thread = [], ThreadPoolExecutor(1)

    def number(images, prompts):
        parts.append(len(images))
        return [float(text) for text in prompts]

    prompts, settings = [{"prompt": str(i)} for i in range(400)], Settings(output_dir=str(tmp_path))
    watch = report.Validation(settings, Blank(), prompts, {"number": (1.0, number)}, thread)
    scores, sheet = watch(7)
    assert scores == {"eval/number": 199.5, "eval_base/number": 199.5}
    assert sum(parts) == 800 and max(parts) == 16
    with Image.open(tmp_path / "validation" / "step-000007.png") as saved:
        assert np.array_equal(np.asarray(saved), sheet)

    large = torch.zeros(1).expand(400, 3, 1024, 1024)
    size = report.validation_sheet([""] * 400, large, large, "now").size
    assert size[0] * size[1] < 100e6


def test_curves_show_what_is_there_also_a_single_point(tmp_path, monkeypatch):
    drawn, plot = {}, Axes.plot

    def watched(axis, *line, label):
        drawn[label] = line
        return plot(axis, *line, label=label)

    monkeypatch.setattr(Axes, "plot", watched)
    first, second = {"step": 1, "reward": 1.0, "gate": None}, {"step": 2, "reward": 2.0}
    second |= {"gate": 0.5, "eval/a.py:f": 0.3, "eval_base/a.py:f": 0.2}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    report.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert drawn["reward"] == ((1, 2), (1.0, 2.0), "-")
    assert drawn["gate"] == ((2,), (0.5,), "o") and drawn["eval f"] == ((2,), (0.3,), "o")


def test_the_card_has_code_that_names_the_lora_and_no_folder_of_this_machine(tmp_path):
    name = "/home/me/mine.py:f"
    line = {"step": 9, f"eval_base/{name}": 20.111, f"eval/{name}": 22.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def card(**changed):
        local = {"reward": ["pickscore", f"{name}=2"], "reward_model": ["pickscore=/home/me/it"]}
        local |= {"output_dir": str(tmp_path), "train_prompts": "/home/me/a.txt", **changed}
        report.write_card(Settings(**local), tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "/home" not in text and str(tmp_path) not in text
        return text, text.split("```python\n")[1].split("```")[0]

    text, code = card(resolution=256)
    assert "| mine.py:f | 20.11 | 22.5 |" in text and "mine.py:f=2" in text and "in 9 steps" in text
    assert "base_model: stabilityai/stable-diffusion-3.5-medium\n" in text
    compile(code, "card", "exec")
    assert 'load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")' in code
    assert "guidance_scale=4.5," in code and "height=256," in code
    assert 'load_lora_weights("me/lora", ' in card(hub_model_id="me/lora")[1]
    text, code = card(pretrained_model_name_or_path=str(tmp_path / "model"))
    assert "base_model" not in text and 'from_pretrained("model"' in code


def test_the_glossary_explains_every_number_of_metrics_jsonl(plain):
    words = set(re.findall(r"\w+", report.GLOSSARY))
    for key in {key for line in metrics(plain) for key in line}:
        assert key.split("/")[0] in words, key


def test_the_result_is_pushed_to_the_hub(plain, monkeypatch):
    hub, uploaded = report.huggingface_hub, []
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/lora"))
    monkeypatch.setattr(hub, "upload_folder", lambda **what: uploaded.append(what))
    settings = Settings(output_dir=str(plain))
    report.make_repository(settings)
    report.upload(settings)
    paths = sorted(str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file())
    files = list(filter_repo_objects(paths, allow_patterns=uploaded[0]["allow_patterns"]))
    expected = "README.md curves.png metrics.jsonl pytorch_lora_weights.safetensors".split()
    assert files == [*expected, "validation/step-000003.png"]
    assert uploaded[0]["repo_id"] == "me/lora"


def test_means_are_those_of_the_groups_with_finite_scores_and_a_preference():
    one = torch.tensor([[0.0, 1.0], [2.0, 2.0], [math.nan, 5.0]])
    scores = {"one": (1.0, one), "two": (2.0, one + 1)}
    advantages = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    values = report.reward_metrics(scores, advantages, torch.tensor([True, True, False]))
    assert values["reward/one"] == 1.25 and values["reward"] == 1.25 + 2 * 2.25
    assert values["reward_std/one"] == 0.25
    assert values["equal_groups"] == values["groups_not_finite"] == pytest.approx(1 / 3)

    group = dict.fromkeys(("loss", "gap", "gate", "clipped", "kl"), torch.tensor([1.0, 3.0]))
    equal = {name: 10 * value for name, value in group.items()}
    groups = [group | {"preferred": torch.ones(2)}, equal | {"preferred": torch.zeros(2)}]
    means = report.mean_over_processes(groups)
    assert means == {"loss": 2, "gap": 2, "gate": 2, "clipped": 2, "kl": 11}
    assert report.mean_over_processes(groups[1:])["loss"] is None
