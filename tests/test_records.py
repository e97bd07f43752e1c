"""What a run leaves in its folder. The runs of test_train_sd35.py leave it and go on from it."""

import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

import records
import rewards
from cli import Fault


def save(out, model, step, limit=2):
    state = {"step": step, "bad_steps": 0, "optimizer": {}}
    records.save_checkpoint(out, model, state, limit)


def test_a_checkpoint_gives_back_what_it_was_given(tiny_model, tmp_path):
    kept = [
        [x.detach().clone() for x in part]
        for part in (tiny_model.theta, tiny_model.old, tiny_model.average)
    ]
    save(tmp_path, tiny_model, 7)
    for part in (tiny_model.theta, tiny_model.old, tiny_model.average):
        for x in part:
            x.data.zero_()
    state = records.find_checkpoint(tmp_path, "latest")
    records.restore(tiny_model, state)
    assert state["step"] == 7 and records.find_checkpoint(tmp_path, None) is None
    for part, values in zip(
        (tiny_model.theta, tiny_model.old, tiny_model.average), kept, strict=True
    ):
        assert all(torch.equal(*pair) for pair in zip(part, values, strict=True))


def test_the_newest_that_is_whole_is_taken_and_the_oldest_go(tiny_model, tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, tiny_model, step)
    assert [path.name for path in records.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-2",
    ]
    newest = tmp_path / "checkpoint-10"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-1])
    with pytest.raises(Fault, match="checkpoint-10 is missing or damaged .its checksum is another"):
        records.find_checkpoint(tmp_path, str(newest))
    assert records.find_checkpoint(tmp_path, "latest")["step"] == 2
    assert records.find_checkpoint(tmp_path, "checkpoint-2")["step"] == 2  # by its name
    records.begin(tmp_path, SimpleNamespace(), 2)
    (damaged,) = tmp_path.glob("aside-*")
    assert damaged.name.startswith("aside-checkpoint-10-")
    (tmp_path / "checkpoint-2" / "state.pt").unlink()
    with pytest.raises(Fault, match="checkpoint-2 is missing or damaged .*, and so are all in"):
        records.find_checkpoint(tmp_path, "latest")
    assert records.find_checkpoint(tmp_path / "checkpoint-2", "latest") is None  # none is there


def test_rubbish_in_a_checkpoint_is_one_line(tiny_model, tmp_path):
    save(tmp_path, tiny_model, 3)
    folder = tmp_path / "checkpoint-3"
    whole = records.load_checkpoint(folder)
    for rubbish in ([1], {"step": 3}, {**whole, "step": "x"}, dict.fromkeys(records.STATE, "x")):
        torch.save(rubbish, folder / "state.pt")
        digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "complete.json").write_text(json.dumps({"sha256": digest}))
        with pytest.raises(Fault, match="checkpoint-3 is missing or damaged") as fault:
            records.load_checkpoint(folder)
        assert "\n" not in str(fault.value)
    for rubbish in ("", "[1]", "{}", "[" * 100_000):
        (folder / "complete.json").write_text(rubbish)
        with pytest.raises(Fault, match="checkpoint-3 is missing or damaged"):
            records.load_checkpoint(folder)


@pytest.mark.parametrize("part", [[], [torch.zeros(3)], "x"])
def test_a_checkpoint_of_another_lora_is_one_line(part, tiny_model, tmp_path):
    save(tmp_path, tiny_model, 3)
    state = records.load_checkpoint(tmp_path / "checkpoint-3")
    with pytest.raises(Fault, match="--resume_from_checkpoint: the checkpoint is of another LoRA"):
        records.resume({**state, "parameters": part}, tiny_model, torch.optim.SGD(tiny_model.theta))


def test_what_is_not_named_as_a_checkpoint_is_none(tmp_path):
    for name in ("checkpoint-x", "checkpoint-²", "checkpoint-3.bak", "checkpoint-", "checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    assert [path.name for path in records.checkpoints(tmp_path)] == ["checkpoint-4"]


def test_what_came_half_written_goes_and_metrics_are_cut(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / ".checkpoint-abc").mkdir()
    for name in (".12-curves.png", "validation/.3-step-000001.png", ".keep"):
        (tmp_path / name).write_text("half")
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "reward": n / 3}) for n in (1, 2, 3)]
    rubbish = ["[1]", "{}", '{"step": "x"}', "[" * 100_000, "\0", '{"step": 2, "rew']
    metrics.write_text("\n".join([*lines, *rubbish]))
    records.begin(tmp_path, SimpleNamespace(), 2)
    assert metrics.read_text().splitlines() == lines[:2] and metrics.read_text()[-1] == "\n"
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {".keep", "arguments.json", "metrics.jsonl", "validation"}


def test_a_folder_is_one_runs_and_the_run_may_change_what_is_not_of_its_steps(tmp_path):
    out = tmp_path / "run"
    args = SimpleNamespace(
        output_dir=str(out),
        resume_from_checkpoint=None,
        lr_scheduler="cosine",
        max_train_steps=5,
        beta=1.0,
        micro_batch_size=4,
    )
    records.begin(records.claim_folder(args), args)
    (out / "checkpoint-1").mkdir()
    with pytest.raises(Fault, match="holds a run; continue it with --resume_from_checkpoint"):
        records.claim_folder(args)
    args.resume_from_checkpoint, args.micro_batch_size = "latest", 1
    assert records.claim_folder(args) == out
    args.max_train_steps = 6  # which a cosine's learning rates depend on
    with pytest.raises(Fault, match="--max_train_steps: the run in .* has 5, got 6; a cosine's"):
        records.claim_folder(args)
    args.lr_scheduler = "constant"
    with pytest.raises(Fault, match="argument --lr_scheduler: the run in .* has cosine"):
        records.claim_folder(args)


def test_until_its_first_checkpoint_a_folder_holds_no_run(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, resolution=500)
    records.begin(records.claim_folder(args), args)
    records.add_line(tmp_path / "metrics.jsonl", {"step": 1})
    args.resolution = 512
    records.begin(records.claim_folder(args), args)
    assert json.loads((tmp_path / "arguments.json").read_text())["resolution"] == 512
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_with_files_of_another_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    with pytest.raises(Fault, match="holds README.md, and no run; give a new folder"):
        records.claim_folder(args)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    """The lock is a process's: another is refused until this one ends."""
    program = (
        "import sys, records, types\n"
        "about = types.SimpleNamespace(output_dir=sys.argv[1], resume_from_checkpoint=None)\n"
        "try: records.claim_folder(about)\n"
        "except records.Fault as fault: sys.exit(str(fault))\n"
        "print('claimed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-c", program, str(tmp_path)]
    about = {"cwd": Path(records.__file__).parent, "text": True, **pipe}
    other = subprocess.Popen(command, **about)
    assert other.stdout.readline() == "claimed\n"
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    with pytest.raises(Fault, match="a run is at work in .*; give another folder"):
        records.claim_folder(args)
    other.communicate()
    assert records.claim_folder(args) == tmp_path == records.claim_folder(args)


def test_there_is_no_checkpoint_of_no_step_nor_of_nan(tiny_model, tmp_path):
    save(tmp_path, tiny_model, 0)
    tiny_model.theta[-1].data[0] = torch.nan
    save(tmp_path, tiny_model, 3)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(Fault, match="cannot write .*metrics.jsonl .*, or make room, and resume"):
        records.add_line(tmp_path / "gone" / "metrics.jsonl", {"step": 1})


def test_half_a_line_is_never_left(tmp_path):
    """A file may grow by ten bytes more: the system writes these, and no more."""
    path = tmp_path / "metrics.jsonl"
    records.add_line(path, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(Fault, match="cannot write .*metrics.jsonl"):
            records.add_line(path, {"step": 2, "reward": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_every_process_looks_at_the_folder_and_one_locks_it(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Fault, match="holds README.md, and no run"):
        records.claim_folder(args)
    assert not (tmp_path / ".lock").exists()
    (tmp_path / "README.md").unlink()
    assert records.claim_folder(args) == tmp_path and not list(tmp_path.iterdir())


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


def test_processes_that_see_other_checkpoints_are_told(monkeypatch):
    monkeypatch.setattr(records, "gather_object", lambda own: [*own, 7])
    with pytest.raises(Fault, match="not all processes see the same checkpoints in out; give"):
        records.announce(SimpleNamespace(output_dir="out"), None, [], [], 3)


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
