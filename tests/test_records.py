"""What a run leaves in its folder. The runs of test_train_sd35.py leave it and go on from it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import records
import rewards
from cli import Fault


def save(out, model, step, limit=2):
    records.save_checkpoint(out, model, {"step": step, "bad_steps": 0}, limit)


def test_a_checkpoint_gives_back_what_it_was_given(tiny_model, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    kept = [
        [x.detach().clone() for x in part]
        for part in (tiny_model.theta, tiny_model.old, tiny_model.average)
    ]
    save(tmp_path, tiny_model, 7)
    for part in (tiny_model.theta, tiny_model.old, tiny_model.average):
        for x in part:
            x.data.zero_()
    state, size = records.newest_checkpoint(tmp_path, "latest")
    records.restore(tiny_model, state)
    assert (state["step"], size) == (7, 3)
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
        records.newest_checkpoint(tmp_path, str(newest))
    assert records.newest_checkpoint(tmp_path, "latest")[0]["step"] == 2
    (damaged,) = tmp_path.glob("damaged-*")
    assert damaged.name.startswith("damaged-checkpoint-10-")


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
    with pytest.raises(Fault, match="argument --max_train_steps: the run in .* has 5, got 6"):
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
    with pytest.raises(Fault, match="cannot write .*metrics.jsonl .*; make room, and resume"):
        records.add_line(tmp_path / "gone" / "metrics.jsonl", {"step": 1})


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
