"""The folder of a run: checkpoints, resuming, metrics; and how a script ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from tiny_run import REWARD, ROOT, exit_code, flags, fork, metrics, same_steps, settings

import train_sd35
from rewards import RewardError
from sd35 import run
from sd35.lora import LORA_FILE
from sd35.settings import Settings, UserError, parse

# How a script ends


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


def mistaken():
    raise UserError("no such thing")


def rewarded_badly():
    raise RewardError("it failed") from ZeroDivisionError("by zero")


ENDS = {
    terminated: (130, "a.py: interrupted\n"),
    mistaken: (2, "a.py: no such thing\n"),
    rewarded_badly: (2, "ZeroDivisionError: by zero\na.py: it failed\n"),
}


@pytest.mark.parametrize("main", ENDS)
def test_a_script_ends_with_one_sentence_and_a_code(main, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["folder/a.py"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        run.run_script(main)
    code, said = ENDS[main]
    assert end.value.code == code and capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_held_waits_for_the_end_of_the_outermost_context(number):
    interrupts, done = run.Interrupts(), []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.held():
            with interrupts.held():
                os.kill(os.getpid(), number)
            done.append("held")
        done.append("too late")
    assert done == ["held"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def fail(aside):
        aside.write_text("tw")
        raise OSError("No space left on device")

    path = tmp_path / "new" / "a.txt"
    run.replace_file(path, lambda aside: aside.write_text("one"))
    with pytest.raises(OSError):
        run.replace_file(path, fail)
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


# Checkpoints


@pytest.fixture
def saved(tiny_model, tiny, tmp_path):
    """A run's folder, model and optimizer, and a function that saves a checkpoint."""
    optimizer = torch.optim.AdamW(tiny_model.theta)
    sum(parameter.sum() for parameter in tiny_model.theta).backward()
    optimizer.step()

    def save(step, **changed):
        run.save_checkpoint(settings(tiny, tmp_path, **changed), tiny_model, optimizer, step)

    return SimpleNamespace(save=save, out=tmp_path, model=tiny_model, optimizer=optimizer)


def test_a_checkpoint_restores_weights_averages_and_optimizer(saved, tiny):
    def tensors():
        moments = [m for state in saved.optimizer.state.values() for m in state.values()]
        return [*saved.model.theta, *saved.model.old, *saved.model.average, *moments]

    before = [tensor.detach().clone() for tensor in tensors()]
    saved.save(7)
    for tensor in tensors():
        tensor.data.zero_()
    state = run.open_folder(settings(tiny, saved.out, resume_from_checkpoint="latest"))
    run.restore(state, saved.model, saved.optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, tensors(), strict=True))


def test_the_oldest_checkpoints_are_deleted(saved):
    for step in (2, 9, 10):
        saved.save(step, checkpoints_total_limit=2)
    assert [path.name for path in run.checkpoints(saved.out)] == ["checkpoint-9", "checkpoint-10"]


def test_a_theta_that_is_not_finite_is_not_saved(saved):
    saved.model.theta[-1].data[0] = math.nan
    saved.save(3)
    assert not list(saved.out.iterdir())


def test_a_checkpoint_is_called_latest_or_by_its_path_or_name(saved, tiny):
    for step in (2, 10):
        saved.save(step)
    for name, step in (("latest", 10), ("checkpoint-2", 2), (f"{saved.out}/checkpoint-2", 2)):
        resumed = settings(tiny, saved.out, resume_from_checkpoint=name)
        assert run.open_folder(resumed)["step"] == step


REFUSED = {  # the sentence, by what differs
    "": "holds a run; give another folder, or continue the run with",
    "--resume_from_checkpoint latest --seed 1": "--seed: the run has 0, got 1",
}


@pytest.mark.parametrize("line", REFUSED)
def test_another_run_is_refused_in_one_sentence(line, saved, tiny):
    saved.save(2)
    with pytest.raises(UserError, match=REFUSED[line]):
        run.open_folder(parse(Settings, [*flags(tiny, saved.out), *line.split()]))


def test_a_run_is_not_continued_in_a_folder_with_another_one(saved, tiny):
    saved.save(2)
    resumed = settings(tiny, saved.out / "new", resume_from_checkpoint=saved.out / "checkpoint-2")
    assert run.open_folder(resumed)["step"] == 2
    (saved.out / "new" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run"):
        run.open_folder(resumed)


def test_a_resumed_run_may_change_what_does_not_change_its_steps(saved, tiny):
    saved.save(2, lr_scheduler="constant", mixed_precision="no")
    line = "--resume_from_checkpoint latest --micro_batch_size 1 --max_train_steps 9 --lr_scheduler"
    resumed = [*flags(tiny, saved.out), *line.split()]
    assert run.open_folder(parse(Settings, [*resumed, "constant"]))["step"] == 2
    saved.save(3, lr_scheduler="cosine", mixed_precision="no")
    with pytest.raises(UserError, match="--max_train_steps: the run has 3, got 9"):
        run.open_folder(parse(Settings, [*resumed, "cosine"]))


def test_what_comes_after_the_checkpoint_is_set_aside_and_metrics_are_cut(saved, tiny):
    lines = [{"step": step, "reward": step / 3, "kl": None} for step in (1, 2, 3)]
    for line in lines:
        saved.save(line["step"])
        run.add_metrics(saved.out / "metrics.jsonl", line | {"kl": math.inf})  # not in JSON
    (saved.out / ".checkpoint-4").mkdir()
    run.begin(settings(tiny, saved.out), 2)
    assert metrics(saved.out) == lines[:2]
    names = [path.name.rpartition("-")[0] for path in sorted(saved.out.glob("*checkpoint-*"))]
    assert names == ["aside-checkpoint-3", "checkpoint", "checkpoint"]


# Runs that end early, and go on


def before(module, name, n, work):
    """Call work(...) before the n-th call of module.name(...), with its arguments."""
    original, calls = getattr(module, name), []

    def call(*args, **more):
        calls.append(name)
        if len(calls) == n:
            work(*args)
        return original(*args, **more)

    setattr(module, name, call)


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


def half_a_checkpoint(state, path):
    Path(path).write_bytes(b"half")
    send(signal.SIGKILL)()


def half_a_line(path, line):
    with path.open("a") as file:
        file.write(json.dumps(line)[:20])
    send(signal.SIGKILL)()


STOPS = {  # before which call, what happens, the exit code, and the step of the last checkpoint
    "killed in a checkpoint": (torch, "save", 1, half_a_checkpoint, -9, 0),
    "killed in a line": (run, "add_metrics", 3, half_a_line, -9, 2),
    "Ctrl-C in a rollout": (train_sd35.Trainer, "rollout", 5, send(signal.SIGINT), 130, 1),
    "SIGTERM in an update": (train_sd35.Trainer, "update", 2, send(signal.SIGTERM), 130, 2),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(stop, plain, tiny, tmp_path):
    out, (*call, code, done) = tmp_path / "run", STOPS[stop]

    def work():
        before(*call)
        tiny_run.run(tiny, out)

    assert exit_code(fork(work)) == code
    assert [path.name for path in run.checkpoints(out)] == [f"checkpoint-{done}"] * (done > 0)
    assert len(metrics(out)) == (done or 2)
    assert not (out / LORA_FILE).exists()
    tiny_run.run(tiny, out, resume_from_checkpoint="latest")
    assert same_steps(out, plain)


def test_a_signal_does_not_wait_for_a_reward_that_never_ends(tiny, tmp_path):
    line, begun = flags(tiny, tmp_path / "run", reward=f"{REWARD}:forever"), tmp_path / "begun"
    command, more = [sys.executable, "train_sd35.py", *line], {"BEGUN": str(begun)}
    settings = {"cwd": ROOT, "env": os.environ | more, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **settings)
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    sentence = "train_sd35.py: stopped after 0 steps; continue with --resume_from_checkpoint latest"
    assert process.returncode == 130 and errors.splitlines()[-1] == sentence


# Metrics


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_tracker_gets_numbers_and_an_image_if_it_takes_images(name):
    logged, tracker = [], SimpleNamespace(name=name)
    if name != "mlflow":
        tracker.log_images = lambda values, **more: logged.append((values, more))
    accelerator = SimpleNamespace(trackers=[tracker], log=lambda *what: logged.append(what))
    image, line = np.zeros((4, 5, 3)), {"step": 3, "loss": None, "kl": math.nan, "reward": 0.5}
    run.track(accelerator, line, image)
    run.track(accelerator, line, None)
    numbers, *images, again = logged
    assert numbers == again == ({"step": 3, "reward": 0.5}, 3)
    layout = {"dataformats": "NHWC"} if name == "tensorboard" else {}
    assert [more for _, more in images] == [{"step": 3, **layout}] * (name != "mlflow")
    assert all(values["validation"].shape == (1, 4, 5, 3) for values, _ in images)


def test_a_tracker_needs_its_package(monkeypatch):
    monkeypatch.setattr(run, "get_available_trackers", lambda: ["wandb"])
    with pytest.raises(UserError, match="--report_to tensorboard needs `pip install tensorboard`"):
        run.check_tracker("tensorboard")
    run.check_tracker("wandb")


def test_a_run_begins_by_saying_what_it_does(tmp_path, capsys):
    """And that a run of a few steps ends before the saved average first follows theta."""
    for steps, warned in ((6, True), (7, False)):
        run.begin(Settings(output_dir=str(tmp_path), max_train_steps=steps), 2)
        said = capsys.readouterr().out
        assert f"pickscore: 8 groups of 16 a step, steps 3 to {steps}, into {tmp_path}" in said
        assert ("give --ema_steps 1" in said) == warned


@pytest.mark.parametrize(("gb", "where"), [(8, "cpu"), (13, "cpu"), (17, "cuda:0")])
def test_rewards_run_on_the_cpu_beside_a_small_gpu(gb, where, monkeypatch):
    properties = SimpleNamespace(total_memory=gb * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert str(run.reward_device(torch.device("cuda:0"))) == where
    assert str(run.reward_device(torch.device("cpu"))) == "cpu"
