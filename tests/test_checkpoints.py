"""The folder of a run: whose it is, what is kept in it, and how a run that ended goes on."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from matplotlib.figure import Figure
from PIL import Image
from tiny_run import (
    REWARD,
    ROOT,
    SAME,
    bits,
    difference,
    flags,
    lora,
    metrics,
    on_two_processes,
    run,
)
from tqdm import tqdm

import checkpoints
import cli
import records
import sd35
import train_sd35
from cli import Fault


def save(out, model, step, limit=2):
    optimizer = torch.optim.SGD(model.theta)
    state = {"step": step, "bad_steps": 0, "optimizer": optimizer.state_dict()}
    checkpoints.save(out, model, state, limit)


def test_a_checkpoint_gives_back_what_it_was_given(tiny_model, tmp_path):
    kept = [
        [x.detach().clone() for x in part]
        for part in (tiny_model.theta, tiny_model.old, tiny_model.average)
    ]
    save(tmp_path, tiny_model, 7)
    for part in (tiny_model.theta, tiny_model.old, tiny_model.average):
        for x in part:
            x.data.zero_()
    state = checkpoints.find(tmp_path, "latest")
    checkpoints.resume(state, tiny_model, torch.optim.SGD(tiny_model.theta))
    assert state["step"] == 7 and checkpoints.find(tmp_path, None) is None
    for part, values in zip(
        (tiny_model.theta, tiny_model.old, tiny_model.average), kept, strict=True
    ):
        assert all(torch.equal(*pair) for pair in zip(part, values, strict=True))


def test_the_newest_that_is_whole_is_taken_and_the_oldest_go(tiny_model, tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, tiny_model, step)
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-2",
    ]
    newest = tmp_path / "checkpoint-10"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-1])
    with pytest.raises(Fault, match="checkpoint-10 is missing or damaged .its checksum is another"):
        checkpoints.find(tmp_path, str(newest))
    for asked in ("checkpoint-9", "true", f"{newest}/state.pt"):
        known = "resume_from_checkpoint: .* give latest, checkpoint-10, checkpoint-2, or another fo"
        with pytest.raises(Fault, match=known):
            checkpoints.find(tmp_path, asked)
    assert checkpoints.find(tmp_path, "latest")["step"] == 2
    assert checkpoints.find(tmp_path, "checkpoint-2")["step"] == 2  # by its name
    checkpoints.begin(tmp_path, SimpleNamespace(), 2)
    (damaged,) = tmp_path.glob("aside-*")
    assert damaged.name.startswith("aside-checkpoint-10-")
    (tmp_path / "checkpoint-2" / "state.pt").unlink()
    with pytest.raises(Fault, match="checkpoint-2 is missing or damaged .*, and so are all in"):
        checkpoints.find(tmp_path, "latest")
    assert checkpoints.find(tmp_path / "checkpoint-2", "latest") is None  # none is there


def test_rubbish_in_a_checkpoint_is_one_line(tiny_model, tmp_path):
    save(tmp_path, tiny_model, 3)
    folder = tmp_path / "checkpoint-3"
    whole = checkpoints.load(folder)
    for rubbish in (
        [1],
        {"step": 3},
        {**whole, "step": "x"},
        {**whole, "step": -1},
        {**whole, "step": 10**30},
        {**whole, "bad_steps": 4},
        dict.fromkeys(checkpoints.STATE, "x"),
    ):
        torch.save(rubbish, folder / "state.pt")
        digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "complete.json").write_text(json.dumps({"sha256": digest}))
        with pytest.raises(Fault, match="checkpoint-3 is missing or damaged") as fault:
            checkpoints.load(folder)
        assert "\n" not in str(fault.value)
    for rubbish in ("", "[1]", "{}", "[" * 100_000):
        (folder / "complete.json").write_text(rubbish)
        with pytest.raises(Fault, match="checkpoint-3 is missing or damaged"):
            checkpoints.load(folder)


@pytest.mark.parametrize("part", [[], [torch.zeros(3)], "x"])
def test_a_checkpoint_of_another_lora_is_one_line(part, tiny_model, tmp_path):
    save(tmp_path, tiny_model, 3)
    state = checkpoints.load(tmp_path / "checkpoint-3")
    optimizer = torch.optim.SGD(tiny_model.theta)
    with pytest.raises(Fault, match="--resume_from_checkpoint: the checkpoint is of another LoRA"):
        checkpoints.resume({**state, "parameters": part}, tiny_model, optimizer)
    assert checkpoints.resume(state, tiny_model, optimizer) == (3, 0)


def spoil(state, how):
    group, kept = state["optimizer"]["param_groups"][0], state["optimizer"]["state"]
    if how == "no betas":
        del group["betas"]
    elif how == "other shapes":
        kept[0]["exp_avg"] = torch.zeros(3)
    elif how == "moments not finite":
        kept[0]["exp_avg"].fill_(torch.nan)
    elif how == "theta not finite":
        state["parameters"][0].fill_(torch.nan)


@pytest.mark.parametrize(
    "how", ["no betas", "other shapes", "moments not finite", "theta not finite", None]
)
def test_a_state_that_would_fail_in_the_next_step_is_one_line(how, tiny_model, tmp_path):
    """Or worse: would go on, and blame the reward or the learning rate."""
    optimizer = torch.optim.AdamW(tiny_model.theta)
    sum(x.sum() for x in tiny_model.theta).backward()
    optimizer.step()
    state = {"step": 3, "bad_steps": 0, "optimizer": optimizer.state_dict()}
    checkpoints.save(tmp_path, tiny_model, state, 2)
    state = checkpoints.load(tmp_path / "checkpoint-3")
    spoil(state, how)
    again = torch.optim.AdamW(tiny_model.theta)
    if how is None:
        assert checkpoints.resume(state, tiny_model, again) == (3, 0)
        return
    with pytest.raises(Fault, match="is of another LoRA, or damaged .its? ") as fault:
        checkpoints.resume(state, tiny_model, again)
    assert "\n" not in str(fault.value)


def test_what_is_not_named_as_a_checkpoint_is_none(tmp_path):
    for name in ("checkpoint-x", "checkpoint-²", "checkpoint-3.bak", "checkpoint-", "checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == ["checkpoint-4"]


def test_what_came_half_written_goes_and_metrics_are_cut(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / ".checkpoint-abc").mkdir()
    for name in (".12-curves.png", "validation/.3-step-000001.png", ".keep"):
        (tmp_path / name).write_text("half")
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "reward": n / 3}) for n in (1, 2, 3)]
    rubbish = ["[1]", "{}", '{"step": "x"}', "[" * 100_000, "\0", '{"step": 2, "rew']
    metrics.write_text("\n".join([*lines, *rubbish]))
    checkpoints.begin(tmp_path, SimpleNamespace(), 2)
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
    checkpoints.begin(checkpoints.claim_folder(args), args)
    (out / "checkpoint-1").mkdir()
    with pytest.raises(Fault, match="holds a run; continue it with --resume_from_checkpoint"):
        checkpoints.claim_folder(args)
    args.resume_from_checkpoint, args.micro_batch_size = "latest", 1
    assert checkpoints.claim_folder(args) == out
    args.max_train_steps = 6  # which a cosine's learning rates depend on
    with pytest.raises(Fault, match="--max_train_steps: the run in .* has 5, got 6; a cosine's"):
        checkpoints.claim_folder(args)
    args.lr_scheduler = "constant"
    with pytest.raises(Fault, match="argument --lr_scheduler: the run in .* has cosine"):
        checkpoints.claim_folder(args)


def test_until_its_first_checkpoint_a_folder_holds_no_run(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, resolution=500)
    checkpoints.begin(checkpoints.claim_folder(args), args)
    records.add_line(tmp_path / "metrics.jsonl", {"step": 1})
    args.resolution = 512
    checkpoints.begin(checkpoints.claim_folder(args), args)
    assert json.loads((tmp_path / "arguments.json").read_text())["resolution"] == 512
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_with_files_of_another_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    with pytest.raises(Fault, match="holds README.md, and no run; give a new folder"):
        checkpoints.claim_folder(args)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


OTHERS = {  # what a folder holds, what is resumed, and the line
    ("arguments.json", "README.md"): (None, "holds README.md, and no run; give a new folder"),
    ("checkpoint-3/", "README.md"): ("latest", "holds checkpoints without their arguments.json"),
    ("run's", sd35.LORA_FILE): ("latest", "holds a finished run without its checkpoints"),
    ("run's", "checkpoint-3/"): (
        "{}/other/checkpoint-3",
        "is not one of .*/run, which holds a run",
    ),
}


@pytest.mark.parametrize("names", OTHERS, ids=range(len(OTHERS)))
def test_what_is_not_this_runs_own_is_refused_and_kept(names, tmp_path):
    asked, line = OTHERS[names]
    out = tmp_path / "run"
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    args = SimpleNamespace(output_dir=str(out), resume_from_checkpoint=asked)
    args.resume_from_checkpoint = asked and asked.format(tmp_path)
    out.mkdir()
    for name in names:
        if name == "run's":
            (out / "arguments.json").write_text(json.dumps(vars(args)))
        elif name.endswith("/"):
            (out / name).mkdir()
        else:
            (out / name).write_text('{"foo": 1}')
    before = {path: path.is_file() and path.read_text() for path in out.iterdir()}
    with pytest.raises(Fault, match=line):
        checkpoints.claim_folder(args)
    after = {path: path.is_file() and path.read_text() for path in out.iterdir()}
    after.pop(out / ".lock", None)
    assert after == before


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    """The lock is a process's: another is refused until this one ends, be it that it is killed."""
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    here, there = os.pipe()
    other = os.fork()
    if not other:
        try:
            checkpoints.claim_folder(args)
            os.write(there, b"claimed")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(there)
    assert os.read(here, 7) == b"claimed"
    with pytest.raises(Fault, match="another process is at work in .*; give another folder"):
        checkpoints.claim_folder(args)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert checkpoints.claim_folder(args) == tmp_path == checkpoints.claim_folder(args)


def test_there_is_no_checkpoint_of_no_step_nor_of_nan(tiny_model, tmp_path):
    save(tmp_path, tiny_model, 0)
    tiny_model.theta[-1].data[0] = torch.nan
    save(tmp_path, tiny_model, 3)
    assert not list(tmp_path.iterdir())


def test_every_process_looks_at_the_folder_and_one_locks_it(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Fault, match="holds README.md, and no run"):
        checkpoints.claim_folder(args)
    assert not (tmp_path / ".lock").exists()
    (tmp_path / "README.md").unlink()
    assert checkpoints.claim_folder(args) == tmp_path and not list(tmp_path.iterdir())


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


def test_processes_that_see_other_checkpoints_are_told(monkeypatch):
    monkeypatch.setattr(checkpoints, "gather_object", lambda own: [*own, 7])
    with pytest.raises(Fault, match="not all processes see the same checkpoints in out; give"):
        checkpoints.announce(SimpleNamespace(output_dir="out"), None, [], [], 3)


def in_a_child(line):
    """Runs the trainer in a copy of this process, which has all modules loaded. Returns its id."""
    child = os.fork()
    if child:
        return child
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.argv = ["train_sd35.py", *line]
    tqdm.set_lock(threading.RLock())  # the usual one is shared: a child killed in it locks all out
    try:
        cli.run("train_sd35.py", train_sd35.main)
        cli.leave(0)
    except SystemExit as stop:
        cli.leave(stop.code)
    except BaseException:
        cli.leave(99)


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
    assert checkpoints.newest_first(out) and not (out / "pytorch_lora_weights.safetensors").exists()
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert bits(out) == bits(whole)
    one, other = metrics(out), metrics(whole)
    assert [[a[k] for k in SAME] for a in one] == [[b[k] for k in SAME] for b in other]


def steps_written(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_run_can_go_on(number, tiny, whole, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    out = tmp_path / "run"
    child = in_a_child(flags(tiny, out, **{**LONG, "checkpointing_steps": 1000}))
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 2:
        time.sleep(0.01)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 130
    (saved,) = checkpoints.newest_first(out)
    assert int(saved.name.split("-")[1]) == len(metrics(out))
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert bits(out) == bits(whole)


def test_a_full_memory_saves_and_the_run_can_go_on(tiny, whole, tmp_path, monkeypatch):
    out, decode, calls = tmp_path / "run", sd35.decode, []

    def full(vae, latents):
        calls.append(len(latents))
        if len(calls) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(vae, latents)

    monkeypatch.setattr(sd35, "decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(tiny, out, **{**LONG, "checkpointing_steps": 1000})
    (saved,) = checkpoints.newest_first(out)
    assert int(saved.name.split("-")[1]) == len(metrics(out)) > 1
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
    (saved,) = checkpoints.newest_first(out)
    assert int(saved.name.split("-")[1]) == len(metrics(out)) < LONG["max_train_steps"]
    run(tiny, out, **LONG, resume_from_checkpoint="latest")
    assert difference(lora(whole), lora(out)) < 1e-5


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    kept = json.loads((out / "arguments.json").read_text())
    (out / "arguments.json").write_text(json.dumps({**kept, "output_dir": str(out)}))
    newest, *_ = checkpoints.newest_first(out)
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
    save = checkpoints.save

    def hang(out, model, state, limit):
        if state["step"] != 2:
            hanging.touch()
            (out / ".checkpoint-x").mkdir()
            time.sleep(100)
        save(out, model, state, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", hang)
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
    assert checkpoints.newest_first(out)[0].name == "checkpoint-3" and len(metrics(out)) == 3
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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Fault) as fault:
        patch.setattr(kind, method, fails)
        run(tiny, out, **settings)
    assert re.match("cannot write .*No space left on device", str(fault.value))
    assert "\n" not in str(fault.value)
    hidden = {path.name for path in out.rglob(".*")} - {".lock"}
    assert not hidden  # nothing half-written is left, under any name
    for checkpoint in checkpoints.newest_first(out):
        checkpoints.load(checkpoint)
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
    with pytest.raises(Fault, match=f"cannot write {out}/checkpoint-1 .*; mend that, or make"):
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
    said = "train_sd35.py: stopped in the first step, so nothing is saved"
    assert errors.splitlines()[-1] == said


def test_a_run_of_several_updates_goes_on_as_if_never_ended(tiny, tmp_path):
    settings = {"train_samples": 2, "bound": 2, "updates_per_rollout": 2, "prompts_per_step": 2}
    settings |= {"ema_steps": 1, "old_after": 0}
    run(tiny, tmp_path / "whole", **settings)
    run(tiny, tmp_path / "run", **settings, max_train_steps=2)
    run(tiny, tmp_path / "run", **settings, resume_from_checkpoint="latest")
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_what_a_run_saves_of_its_arguments_is_a_config(whole, tmp_path):
    out = str(tmp_path / "run")
    args = train_sd35.parse_args(["--config", str(whole / "arguments.json"), "--output_dir", out])
    kept = json.loads((whole / "arguments.json").read_text())
    assert {**dataclasses.asdict(args), "config": None} == {**kept, "output_dir": out}


def test_old_checkpoints_go(whole):
    names = [path.name for path in checkpoints.newest_first(whole)]
    assert names == ["checkpoint-24", "checkpoint-21", "checkpoint-18"]
