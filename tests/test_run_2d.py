"""python toy/run_2d.py as a user runs it: what it prints and writes, its flags, its mistakes."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

import dgpo
from toy import flow2d, report_2d, run_2d

SCRIPT = Path(__file__).parents[1] / "toy" / "run_2d.py"


def run(*flags):
    """main() in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run_2d.main(list(map(str, flags)))
    return subprocess.CompletedProcess(flags, code, stdout.getvalue(), stderr.getvalue())


def row(stdout, name):
    """The mean reward and the percentage on a mode in the table's row of that name."""
    return list(map(float, re.search(rf"^{name} +(-?[\d.]+) +([\d.]+)%", stdout, re.M).groups()))


def way(stdout):
    return float(re.search(r"training went (-?[\d.]+)% of the way there", stdout)[1])


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The script with its defaults, in its own process and from another folder."""
    out = tmp_path_factory.mktemp("run")
    command = [sys.executable, SCRIPT, "--out", out]
    return subprocess.run(command, capture_output=True, text=True, cwd=out), out


@pytest.fixture
def barely_pretrained(monkeypatch):
    """For tests of what does not depend on the quality of the samples."""
    monkeypatch.setattr(run_2d, "PRETRAINING_STEPS", 20)


def test_the_defaults_reach_the_best_reward_on_the_modes(default_run):
    """And pass p* of Eq. 5, which keeps other modes than the best, too."""
    result, _ = default_run
    assert result.returncode == 0, result.stderr
    base, base_share = row(result.stdout, "reference")
    trained, trained_share = row(result.stdout, r"after \d+ iterations")
    optimum, optimum_share = row(result.stdout, r"p\* of Eq. 5, temperature 1")
    assert base < optimum < trained
    assert base_share >= 93 and trained_share >= 99 and way(result.stdout) >= 99
    assert optimum_share == pytest.approx(98.9, abs=1)


def test_progress_and_figures_show_the_training(default_run):
    result, out = default_run
    assert re.search(r"DGPO: 100%.*reward=-\d\.\d+, loss=\d\.\d+, gate=\d\.\d+", result.stderr)
    assert sorted(path.name for path in out.iterdir()) == ["run_2d.gif", "run_2d.png"]
    assert f"wrote {out / 'run_2d.png'}\nwrote {out / 'run_2d.gif'}\n" in result.stdout
    with Image.open(out / "run_2d.png") as png:
        assert png.width >= 1000 and len(png.convert("L").getcolors()) > 50
    with Image.open(out / "run_2d.gif") as gif:
        assert gif.n_frames >= run_2d.FRAMES
        first = gif.convert("RGB").tobytes()
        gif.seek(gif.n_frames - 1)
        assert gif.convert("RGB").tobytes() != first
    assert (out / "run_2d.gif").stat().st_size < 1_000_000


def test_z_cancels_under_the_weights_of_eq14_alone(default_run):
    pattern = r"^(\|A\|, Eq. 14|equal) +\d" + r" +(-?[\d.]+)" * 5 + "$"
    rows = re.findall(pattern, default_run[0].stdout, re.M)
    assert [name for name, *_ in rows] == ["|A|, Eq. 14"] * 4 + ["equal"] * 4
    differences = []
    for _, *numbers in rows:
        log_z, with_z, without, difference, predicted = map(float, numbers)
        assert difference == predicted == pytest.approx(with_z - without, abs=2e-4) and log_z < 0
        differences.append(abs(difference))
    assert max(differences[:4]) == 0 and max(differences[4:]) > 1


def test_offline_stays_below_online(default_run, model):
    """Section 4.3: samples of the reference teach less than samples of the model."""
    settings = {name: default for name, _, default, _ in run_2d.NUMBERS if name != "seed"}
    settings |= {"iterations": 100, "offline": True}
    base = report_2d.mean_reward(report_2d.draw(model, 0))
    world = flow2d.reward, flow2d.sample_conditions, (2,)
    for _ in dgpo.train(model, *world, torch.Generator().manual_seed(0), **settings):
        pass
    offline = 100 - 100 * report_2d.mean_reward(report_2d.draw(model, 0)) / base
    assert 50 < offline < way(default_run[0].stdout) - 5


def test_a_seed_decides_the_numbers(barely_pretrained, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report_2d, "save_png", lambda path, *data: drawn.append(data))
    for seed in (3, 3, 4):
        run("--iterations", 3, "--no_gif", "--out", tmp_path, "--seed", seed)
    first, same, other = ([stages[-1][1].tolist(), history] for stages, _, history in drawn)
    assert first == same and first[0] != other[0] and first[1] != other[1]


def test_each_flag_reaches_the_training(barely_pretrained, monkeypatch, tmp_path):
    """With hyphens or with underscores, and with a value after a space or after =."""
    passed = {}

    def train(*args, **settings):
        passed.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(dgpo, "train", train)
    flags = "--iterations 7 --prompts 3 --group-size 4 --beta 2 --learning_rate=0.1 --t-min=0.5 "
    flags += "--rollout_steps 6 --train-timesteps 5 --ema 0.25"
    folder = tmp_path / "new-folder" / "a_b"
    with pytest.raises(KeyboardInterrupt):
        run(*flags.split(), "--offline", "--no-gif", "--out", folder)
    assert folder.is_dir()
    assert list(passed) == [name for name, *_ in run_2d.NUMBERS if name != "seed"] + ["offline"]
    assert list(passed.values()) == [7, 3, 4, 2, 0.1, 0.5, 6, 5, 0.25, True]


BAD_FLAGS = {
    "--iterations 0": "argument --iterations: must be at least 1, got 0",
    "--beta nan": "argument --beta: must be at least 0.0, got nan",
    "--show": "argument --show: no window can be opened here; the GIF shows the same",
    f"--out {__file__}/folder": "argument --out: ",
    "--nonsense": "unrecognized arguments: --nonsense",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_an_impossible_flag_is_answered_at_once(flags, capsys):
    plt.switch_backend("agg")  # as where there are no windows
    with pytest.raises(SystemExit) as stop:
        run_2d.parse_args(flags.split())
    assert stop.value.code == 2
    assert f"error: {BAD_FLAGS[flags]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--beta 0", "run_2d.py: beta must be positive"),
        ("--learning_rate 1e30", "lower --learning_rate?"),
    ],
)
def test_a_setting_that_dgpo_refuses_is_one_sentence(flags, message, barely_pretrained, tmp_path):
    result = run(*flags.split(), "--out", tmp_path)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_ctrl_c_shows_what_was_learnt(barely_pretrained, monkeypatch, tmp_path):
    def interrupted(*args, train=dgpo.train, **settings):
        for n, metrics in enumerate(train(*args, **settings)):
            if n == 2:
                raise KeyboardInterrupt
            yield metrics

    monkeypatch.setattr(dgpo, "train", interrupted)
    result = run("--no_gif", "--out", tmp_path)
    assert result.returncode == 130 and "after 2 iterations" in result.stdout
    assert (tmp_path / "run_2d.png").exists()
