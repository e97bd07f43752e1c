"""The main job from outside: python toy/run_2d.py, as a user runs it."""

import functools
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import report_2d
from PIL import Image

RUN = Path(__file__).parents[1] / "toy" / "run_2d.py"


def start(*flags):
    command = [sys.executable, RUN, *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*flags):
    return finish(start(*flags))


def numbers(stdout):
    """The report without its last lines, which hold seconds and paths."""
    return stdout.split("\nseconds:")[0]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return run("--iterations", 40, "--seed", 3, "--out", out), out


def test_a_short_run_learns_and_writes_its_figures(short_run):
    result, out = short_run
    assert result.returncode == 0, result.stderr
    report = result.stdout
    base, trained = (
        float(next(line for line in report.splitlines() if line.startswith(name)).split()[column])
        for name, column in (("reference", 1), ("after 40 iterations", 3))
    )
    assert trained > base + 2
    assert "energy distance to p_ref\n" in report and "perhaps below" in report
    assert "pretraining: 100%" in result.stderr and "DGPO: 100%" in result.stderr
    assert "reward=" in result.stderr and "gate=" in result.stderr and "loss=" in result.stderr

    with Image.open(out / "run_2d.png") as png:
        assert png.width >= 1000 and len(png.convert("L").getcolors()) > 50
    with Image.open(out / "run_2d.gif") as gif:
        assert gif.n_frames == 41
        first = gif.convert("RGB").tobytes()
        gif.seek(40)
        assert gif.convert("RGB").tobytes() != first
    assert (out / "run_2d.gif").stat().st_size < 2_000_000


def test_the_report_shows_z_cancelling(short_run):
    rows = [line.split() for line in short_run[0].stdout.splitlines()]
    rows = [list(map(float, row)) for row in rows if row and row[0] in "0123" and len(row) == 9]
    assert len(rows) == 4
    for _, log_z, with_z, without, diff, equal_with, equal_without, equal_diff, predicted in rows:
        assert with_z == without and abs(diff) < 1e-6
        assert equal_diff == predicted == pytest.approx(equal_with - equal_without, abs=2e-4)
        assert log_z < 0


def test_the_same_seed_gives_the_same_numbers(short_run, tmp_path):
    """Bit for bit: even the picture, drawn from every sample and every reward, is the same file."""
    flags = ("--iterations", 40, "--no-gif", "--out")
    same, other = (start(*flags, tmp_path / str(seed), "--seed", seed) for seed in (3, 4))
    assert numbers(finish(same).stdout) == numbers(short_run[0].stdout)
    picture = tmp_path / "3" / "run_2d.png"
    assert picture.read_bytes() == (short_run[1] / "run_2d.png").read_bytes()
    assert not picture.with_suffix(".gif").exists()
    assert numbers(finish(other).stdout) != numbers(short_run[0].stdout)


def test_the_two_betas_are_told_apart(tmp_path):
    """--beta is that of Eq. 17; p* and Z(c) are of Eq. 5, whose beta is a temperature here."""
    result = run("--iterations", 2, "--beta", 10, "--no-gif", "--out", tmp_path)
    (optimum,) = (line for line in result.stdout.splitlines() if line.startswith("p* of Eq. 5"))
    assert "temperature 1 " in optimum and "beta" not in optimum
    assert "Temperature: the beta of Eq. 5; --beta is that of Eq. 17." in result.stdout


def test_every_flag_is_accepted(tmp_path):
    flags = "--iterations 2 --prompts 3 --group-size 4 --beta 2 --learning-rate 1e-4 --t-min 0 "
    flags += "--rollout_steps 2 --train-timesteps 1 --kl 0 --clip 0.1 --ema 0.5 --offline --no-gif"
    result = run(*flags.split(), "--seed", 1, "--out", tmp_path / "new" / "folder")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new" / "folder" / "run_2d.png").stat().st_size > 10_000


def test_the_defaults_reach_the_ceiling_and_stay_there_three_times_as_long(tmp_path):
    """At least 95 % of the way from the base reward to the best, 90 % of samples on a mode."""
    lengths = (300, 900)
    runs = [start("--no-gif", "--out", tmp_path, "--iterations", n) for n in lengths]
    for iterations, result in zip(lengths, map(finish, runs), strict=True):
        assert result.returncode == 0, result.stderr
        report = result.stdout
        on_mode = re.search(rf"after {iterations} iterations.* ([\d.]+)%", report)
        way = re.search(r"training went ([\d.]+)% of the way", report)
        assert float(on_mode[1]) >= 90 and float(way[1]) >= 95, report


BAD_FLAGS = {
    "--iterations 0": "argument --iterations: must be at least 1 and at most 1000000, got 0",
    "--iterations many": "argument --iterations: invalid int value: 'many'",
    "--prompts 0": "argument --prompts: must be at least 1 and at most 1000000, got 0",
    "--group-size 1": "argument --group_size: must be at least 2 and at most 1000000, got 1",
    "--group-size 1000000000": "argument --group_size: must be at least 2 and at most 1000000, got "
    "1000000000",
    "--group_size 100000": "argument --group_size: prompts, group_size and train_timesteps "
    "multiply to at most 1000000, which is what memory holds, got 3200000",
    "--beta 0": "argument --beta: must be above 1e-30 and at most 1e+30, got 0.0",
    "--beta nan": "argument --beta: must be above 1e-30 and at most 1e+30, got nan",
    "--learning-rate -1": "argument --learning_rate: must be above 0 and at most 1e+30, got -1.0",
    "--learning-rate inf": "argument --learning_rate: must be above 0 and at most 1e+30, got inf",
    "--clip inf --ema 0.5": "argument --clip: must be a finite number, got inf",
    "--t-min 1": "argument --t_min: must be at least 0 and below 1, got 1.0",
    "--t_min 1": "argument --t_min: must be at least 0 and below 1, got 1.0",
    "--rollout-steps 0": "argument --rollout_steps: must be at least 1 and at most 1000, got 0",
    "--train-timesteps 0": "argument --train_timesteps: must be at least 1 and at most 1000, got 0",
    "--kl -0.1": "argument --kl: must be at least 0 and at most 1e+30, got -0.1",
    "--clip 0 --ema 0.9": "argument --clip: must be above 0, got 0.0",
    "--clip 0.1": "argument --clip: compares theta with theta_old, which differ only with --ema",
    "--ema 1.5": "argument --ema: must be at least 0 and at most 1, got 1.5",
    "--seed -1": f"argument --seed: must be at least 0 and below {2**63}, got -1",
    "--out=": "argument --out: must not be empty",
    "--nonsense": "unrecognized arguments: --nonsense; see --help",
}


def test_bad_flags_end_with_one_line_and_exit_code_2(capsys):
    import run_2d

    for flags, message in BAD_FLAGS.items():
        with pytest.raises(SystemExit) as stop:
            run_2d.run("run_2d.py", functools.partial(run_2d.parse_args, flags.split()))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.out == ""
        assert printed.err == f"run_2d.py: {message}\n"


@pytest.fixture
def torch_that_stops(tmp_path, monkeypatch):
    """A torch whose import is interrupted by Ctrl-C."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


def test_a_bad_flag_is_answered_before_torch_is_imported(torch_that_stops):
    result = run("--iterations", 0)
    assert result.returncode == 2 and "argument --iterations: must be at least 1" in result.stderr


def test_ctrl_c_while_importing_is_one_line(torch_that_stops, tmp_path):
    result = run("--out", tmp_path)
    assert result.returncode == 130 and result.stderr == "run_2d.py: stopped\n"


def test_a_window_is_opened_where_there_can_be_one(monkeypatch):
    assert not report_2d.has_windows()  # tests draw into files
    drawn_by = SimpleNamespace(required_interactive_framework="one")
    monkeypatch.setattr(report_2d.plt, "close", lambda figure: None)
    monkeypatch.setattr(report_2d.plt, "figure", lambda: SimpleNamespace(canvas=drawn_by))
    assert report_2d.has_windows()
    monkeypatch.setattr(report_2d.plt, "figure", lambda: 1 / 0)
    assert not report_2d.has_windows()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_training_shows_what_was_learnt(number, tmp_path):
    process, said = start("--iterations", 100_000, "--out", tmp_path, "--no-gif"), ""
    while not re.search(r"DGPO: .*reward=", said):
        said += process.stderr.read(1)
    process.send_signal(number)
    printed, said = process.communicate()
    assert process.returncode == 130, said
    assert "wrote " in printed and "best possible" in printed
    assert re.fullmatch(
        r"run_2d.py: stopped after \d+ iterations; this is what was learnt", said.splitlines()[-1]
    )
    assert (tmp_path / "run_2d.png").exists()


def test_a_run_that_blows_up_is_the_inputs_fault(tmp_path):
    result = run("--learning-rate", 1e30, "--out", tmp_path)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("run_2d.py: ") and last.endswith("; lower --learning_rate?")


@pytest.mark.parametrize("name", ["run_2d.png", "run_2d.gif"])
def test_a_folder_where_a_figure_belongs_stops_before_any_work(name, tmp_path):
    (tmp_path / name).mkdir()
    result = run("--out", tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.endswith(f"{name} is there, and is no file\n")


def test_the_environments_backend_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nonsense")
    result = run("--iterations", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_folder_that_cannot_be_written_stops_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", tmp_path / "file" / "out")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("run_2d.py: argument --out: cannot write to ")
    assert result.stderr.count("\n") == 1
