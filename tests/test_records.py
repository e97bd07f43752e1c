"""What a person reads of a run."""

import json
import math
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from huggingface_hub.utils import filter_repo_objects
from matplotlib.axes import Axes
from PIL import Image
from tiny_run import REWARD, lora, run

import records
import rewards
import sd35
import train_sd35
from cli import Fault


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(Fault, match="cannot write .*metrics.jsonl .*, or make room, and resume"):
        records.add_line(tmp_path / "gone" / "metrics.jsonl", {"step": 1})


def test_half_a_line_is_never_left(tmp_path):
    """A file may grow by ten bytes more: the system writes these, and no more."""
    path = tmp_path / "metrics.jsonl"
    records.add_line(path, {"step": 1, "kl": math.inf, "gap": math.nan, "gate": None})
    assert path.read_text() == '{"step": 1, "kl": null, "gap": null, "gate": null}\n'  # strictly
    path.unlink()
    records.add_line(path, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(Fault, match="cannot write .*metrics.jsonl"):
            records.add_line(path, {"step": 2, "reward": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_many_pictures_are_wrapped_into_rows(tmp_path):
    pictures = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    records.draw_grid(tmp_path / "a.png", ["x"] * 24, pictures, 1 - pictures, "step 1")
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (8 * 236, 3 * 384, 3)  # 24 pairs in three columns
    expected = rewards.to_bytes(1 - pictures)
    for i in (0, 1, 5, 23):
        x, y = i % 3 * 384 + 192, i // 3 * 236 + 22
        assert (grid[y : y + 192 : 12, x : x + 192 : 12] == expected[i]).all()


def test_a_panel_with_one_point_shows_it(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append((a, k)) or plot(*a, **k))
    lines = [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 2.0, "eval/a": 0.3, "kl": "x"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert [(a[1], k.get("marker")) for a, k in drawn] == [((1, 2), None), ((2,), "o")]


def card(tmp_path, **changed):
    about = {
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
        "reward": ["pickscore", "/home/me/mine.py:f=2"],
        "reward_model": ["pickscore=/home/me/weights"],
        "output_dir": str(tmp_path),
        **dict.fromkeys(("guidance_scale", "resolution", "eval_inference_steps"), 16),
        **{"max_sequence_length": 7, "push_to_hub": False, "hub_model_id": None, **changed},
    }
    records.write_card(SimpleNamespace(**about), tmp_path / "metrics.jsonl")
    return (tmp_path / "README.md").read_text()


def test_the_card_compares_base_and_now_and_names_no_folder(tmp_path):
    line = {"step": 9, "reward": 1, "eval_base/pickscore": 20.111, "eval/pickscore": 22.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = card(tmp_path)
    assert "| pickscore | 20.11 | 22.5 |" in found and "in 9 steps on the reward" in found
    assert "base_model: stabilityai/stable-diffusion-3.5-medium\n" in found
    assert 'load_lora_weights(".", ' in found and "mine.py:f=2" in found
    local = card(tmp_path, pretrained_model_name_or_path=str(tmp_path), train_prompts="/home/me/p")
    assert "base_model" not in local and '    "a local folder", torch' in local
    for text in (found, local):
        assert "/home" not in text and str(tmp_path) not in text
    (tmp_path / "metrics.jsonl").write_text("")  # lost
    assert "in 0 steps" in card(tmp_path)


def test_a_tracker_that_cannot_start_is_one_line():
    def refuse(*about):
        raise RuntimeError("log in first\nby this and that")

    accelerator = SimpleNamespace(init_trackers=refuse)
    with pytest.raises(Fault, match="--report_to: cannot start wandb .log in first.$"):
        records.start_trackers(accelerator, SimpleNamespace(report_to="wandb"))


def test_pictures_stand_side_by_side_with_their_prompts(tmp_path):
    base, now = torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)
    records.draw_grid(tmp_path / "v" / "1.png", ["a", "b" * 500], base, now, "step 1")
    grid = np.asarray(Image.open(tmp_path / "v" / "1.png"))
    assert grid.shape == (2 * (192 + 44), 2 * 192, 3)
    for y in (22, 22 + 192 + 44):
        assert (grid[y : y + 192, :192] == 0).all() and (grid[y : y + 192, 192:] == 255).all()


def test_curves_are_drawn_of_steps_that_lack_a_metric(tmp_path):
    lines = [{"step": 1, "reward": 1.0, "gate": None}, {"step": 2, "reward": 2.0, "gate": 0.5}]
    lines[1]["eval/a.py:f"] = 0.3
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png")).std() > 5


def test_a_sheet_shows_its_pictures():
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    sheet = records.sheet([("above", ["a", "b"], images[:2]), ("w" * 99, ["c"], images[2:])], 80)
    assert sheet.size == (160, 2 * (80 + 44))
    shown = torch.tensor(list(sheet.tobytes())).view(248, 160, 3)
    expected = torch.tensor(rewards.to_bytes(images))
    for picture, (x, y) in zip(expected, [(0, 22), (80, 22), (0, 146)], strict=True):
        assert (shown[y : y + 80 : 2, x : x + 80 : 2] == picture).all()
    for y in (0, 102, 124, 226):  # heading and captions of each row
        assert (shown[y : y + 22, :80] < 128).any()
    assert records.sheet([], 80).size == (80, 124)


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
        return SimpleNamespace(repo_id=f"me/{name}")

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
    with pytest.raises(Fault, match=said):
        run(tiny, out, push_to_hub=True, hub_model_id="lora", max_train_steps=1)
    assert made == [("lora", True, False)]  # before any work
    files = ["README.md", "curves.png", "metrics.jsonl", sd35.LORA_FILE]
    assert uploaded == [("me/lora", [*files, "validation/step-000001.png"])]
    assert lora(out) and 'load_lora_weights("me/lora"' in (out / "README.md").read_text()

    def refused(name, exist_ok):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(hub, "create_repo", refused)
    with pytest.raises(Fault, match="--push_to_hub: cannot make other on the hub .401 Unauth"):
        run(tiny, tmp_path / "other", push_to_hub=True)


def test_any_number_of_validation_pictures_is_scored_in_parts(tmp_path):
    """A network that takes eight of them may not take a thousand at once."""
    parts = []

    def number(images, prompts):
        parts.append(len(images))
        return [float(prompt["prompt"]) for prompt in prompts]

    prompts, pictures = [{"prompt": str(i)} for i in range(40)], torch.zeros(40, 3, 4, 4)
    watched = {"number": (1.0, number)}
    found = records.validate(tmp_path / "a.png", prompts, pictures, pictures, watched, "cpu")
    assert found == {"eval_base/number": 19.5, "eval/number": 19.5}
    assert parts == 2 * [16, 16, 8]
