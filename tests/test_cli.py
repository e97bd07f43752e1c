"""What all scripts share of the command line."""

import dataclasses
import functools
import importlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import flow2d
import kept
import pytest
import shapes
import tiny_world
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import cli
from cli import Fault, option

ROOT = Path(__file__).parents[1]


@dataclass
class Arguments:
    """Flags of every kind."""

    t_min: float = option(0.3, "A time in percent, 100 % is noise.", at_least=0, below=1)
    rate: float | None = option(None, "A number that a recipe may bring.", above=0, shown="1 or 2")
    name: str = option("a", "One of two.", "--alias", choices=["a", "b"])
    words: list[str] = option([], "As many as you like.")
    on: bool = option(True, "A switch.")


@pytest.mark.parametrize("flag", ["--t-min", "--t_min"])
def test_a_flag_has_two_spellings(flag):
    assert cli.parse(Arguments, [flag, "0.5"]).t_min == 0.5
    assert cli.parse(Arguments, [f"{flag}=0.5"]).t_min == 0.5


def test_flags_of_every_kind():
    args = cli.parse(Arguments, ["--alias", "b", "--words", "x", "y=z", "--no_on", "--rate", "2"])
    assert dataclasses.astuple(args) == (0.3, 2.0, "b", ["x", "y=z"], False)
    assert cli.parse(Arguments, ["--no-on"]).on is False
    assert cli.parse(Arguments, []).words == []
    assert cli.parse(Arguments, ["--words", "a", "--rate", "2", "--words", "b"]).words == ["b"]


BAD = {
    "--t_min 1": "argument --t_min: must be at least 0 and below 1, got 1.0",
    "--t_min -0.1": "argument --t_min: must be at least 0 and below 1, got -0.1",
    "--t_min nan": "argument --t_min: must be at least 0 and below 1, got nan",
    "--rate 0": "argument --rate: must be above 0, got 0.0",
    "--rate inf": "argument --rate: must be a finite number, got inf",
    "--rate much": "argument --rate: invalid float value: 'much'",
    "--name c": "argument --name/--alias: invalid choice: 'c'",
    "--nam b": "unrecognized arguments: --nam b; see --help",
    "--t_min": "argument --t_min: expected one argument",
}


@pytest.mark.parametrize("line", BAD)
def test_what_is_wrong_is_one_line(line):
    with pytest.raises(Fault) as fault:
        cli.parse(Arguments, line.split())
    assert str(fault.value).startswith(BAD[line]) and "\n" not in str(fault.value)


def test_the_help_shows_limits_and_every_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Arguments, ["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "100 % is noise. (at least 0 and below 1; default: 0.3)" in printed
    assert "A number that a recipe may bring. (above 0; default: 1 or 2)" in printed


def test_pairs():
    assert cli.pairs(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for word in ("a", "a=", "=b"):
        with pytest.raises(Fault, match=f"argument --flag: must be name=path, got {word}$"):
            cli.pairs([word], "flag")
    with pytest.raises(Fault, match="must be name=path, once for each name, got a=c"):
        cli.pairs(["a=b", "a=c"])


def test_what_a_file_of_json_holds(tmp_path):
    path = tmp_path / "kept.json"
    assert cli.read_json(path) == {}
    path.write_text('{"a": [1]}')
    assert cli.read_json(path) == {"a": [1]}
    for rubbish in ("", "[3]", "[" * 100_000, None):
        path.write_text(rubbish) if rubbish is not None else (path.unlink(), os.mkfifo(path))
        with pytest.raises(Fault, match=r"cannot read .*kept.json \(.*\); mend or delete it"):
            cli.read_json(path)


def test_folders(tmp_path):
    made = cli.make_folder(str(tmp_path / "a" / "b"))
    assert made.is_dir() and not list(made.iterdir())
    (tmp_path / "file").write_text("")
    for name in ("", f"{tmp_path}/file/x", "a\0b"):
        with pytest.raises(Fault, match="argument --out: "):
            cli.make_folder(name, "out")


def test_places_for_files(tmp_path):
    place = str(tmp_path / "new" / "a.png")
    assert cli.make_place(place, "figure", cli.FIGURES) == Path(place)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for name, said in {
        "a.txt": "must end in .png or .jpg or .pdf or .svg or .webp, got",
        "": "is needed: a file that ends in .png",
        "folder.png": "is there, and is no file",
        "file/a.png": "cannot write to",
        "x" * 300 + ".png": "cannot write to .*File name too long",
    }.items():
        with pytest.raises(Fault, match=f"argument --figure: .*{said}"):
            cli.make_place(str(tmp_path / name) if name else "", "figure", cli.FIGURES)


def test_figures_are_what_matplotlib_knows():
    known = FigureCanvasAgg(Figure()).get_supported_filetypes()
    assert {ending[1:] for ending in cli.FIGURES} <= set(known)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.txt"
    cli.replace_file(path, lambda new: new.write_text("one"))

    def full(new):
        new.write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(Fault, match=r"cannot write .*kept.txt .*No space left.*; what was there"):
        cli.replace_file(path, full)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


ENDS = [
    (Fault("what is\nwrong"), 2, "x.py: what is?wrong\n"),
    (MemoryError(), 2, "x.py: out of memory (MemoryError); ask for less\n"),
    (ImportError("lib.so: failed to map segment"), 2, "x.py: out of memory (lib.so: "),
    (OSError("AF_UNIX path too long"), 2, "path too long; set TMPDIR to a folder with a shorter"),
    (Fault("a\x1b" + "b" * 10_000 + "c"), 2, f"x.py: a?{'b' * 298} ... {'b' * 299}c\n"),
    (cli.Stopped("saved; go on"), 130, "x.py: saved; go on\n"),
    (cli.Stopped(), 130, "x.py: stopped\n"),
    (KeyboardInterrupt(), 130, "x.py: stopped\n"),
    (ModuleNotFoundError("No module named 'torch'"), 2, "'torch'; pip install -r requirements.txt"),
    *((OSError(number, "so"), 2, "x.py: the system refuses (") for number in cli.REFUSED),
    (DeprecationWarning("is old"), 2, "x.py: is old; this is a warning: leave -W error and"),
    (MemoryError("Unable to allocate memory"), 2, "x.py: out of memory (Unable to allocate"),
    (RuntimeError("CUDA out of memory. Tried"), 2, "x.py: out of memory (CUDA out of memory."),
]


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=range(len(ENDS)))
def test_an_end_is_one_line_and_a_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run("x.py", main)
    said = capsys.readouterr().err
    assert end.value.code == code and line in said and said.count("\n") == 1


def test_a_bug_of_ours_is_a_traceback():
    for error in (ValueError("so"), OSError(2, "so"), RuntimeError("so")):
        assert cli.verdict(error) is None
    ran = bash("python -c 'import cli; cli.run(str(), lambda: 1 / 0)'")
    assert ran.returncode == 1 and ran.stderr.startswith("Traceback")
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")


def bash(line, **environment):
    """What a shell makes of a line; the exit code is that of the first program of a pipe."""
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "", **python, **environment},
        capture_output=True,
        text=True,
    )


MAKE = "python prompts.py text --n 20 --out {}/a.txt"
C = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
SHELLS = [  # a line, the exit code, and what it says on stderr
    (MAKE, 0, "wrote 20 prompts to "),
    (f"{C} {MAKE}", 0, "wrote 20 prompts to "),
    (f"{C} python prompts.py text --out 'é.svg'", 2, "must end in .txt, got '"),
    (f"PYTHONIOENCODING=ascii {MAKE} --n é", 2, "argument --n: invalid int value: 'é'"),
    (f"{MAKE} --out $'\\xff'", 2, "argument --out: must end in .txt, got '"),
    ("python prompts.py --help | true", 141, None),
    ("python bench.py --help | true", 141, None),
    (f"{MAKE} 2>&1 | true", 141, None),
    ("python prompts.py --help > /dev/full", 2, "No space left on device); make room"),
    ("python bench.py --help > /dev/full", 2, "No space left on device); make room"),
    (f"{MAKE} >&-", 0, "wrote 20 prompts"),
    (f"{MAKE} >&- 2>&-", 0, None),
    (f"{MAKE} --n 0 2> /dev/full", 2, None),
    ("python bench.py fly", 2, "bench.py: the command must be plan, step, plain, changes, got"),
]


@pytest.mark.parametrize(("line", "code", "said"), SHELLS, ids=range(len(SHELLS)))
def test_terminals_and_pipes(line, code, said, tmp_path):
    ran = bash(line.format(tmp_path))
    assert ran.returncode == code and "Traceback" not in ran.stderr
    assert ran.stderr.count("\n") == (said is not None) and (said or "") in ran.stderr


@pytest.mark.parametrize("script", ["bench.py plan", "train_sd35.py", "toy/compare.py"])
@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ("raise KeyboardInterrupt", 130, "py: stopped\n"),
        ("import not_installed", 2, "py: No module named 'not_installed'; pip install -r "),
        ("raise ImportError('libc10.so: not found')", 2, "py: libc10.so: not found; pip install "),
    ],
)
def test_libraries_that_do_not_load(script, found, code, said, tmp_path):
    (tmp_path / "torch.py").write_text(found)
    ran = bash(f"python {script}", PYTHONPATH=str(tmp_path))
    assert ran.returncode == code and said in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_kill_and_a_terminal_that_closes_are_a_ctrl_c(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    code = f"import cli, os\ncli.run('x.py', lambda: os.kill(os.getpid(), {int(number)}))"
    ran = bash(f'python -c "{code}"')
    assert (ran.returncode, ran.stderr) == (130, "x.py: stopped\n")


def test_a_line_does_not_follow_a_progress_bar_on_its_line(capsys):
    def main():
        bar = tqdm(range(9))
        raise KeyboardInterrupt(bar.n)

    class Interrupted(io.StringIO):
        def write(self, text):
            sys.stderr.write(text)
            if "0%" in text:
                raise KeyboardInterrupt(0)

    for interrupted in (main, lambda: tqdm(range(9), file=Interrupted())):  # also as it begins
        with pytest.raises(SystemExit):
            cli.run("x.py", interrupted)
        assert capsys.readouterr().err.endswith("\nx.py: 0\n")


def test_a_child_that_a_reward_has_forked_obeys_its_parent():
    """It has the run's handlers; multiprocessing's pools end their children by SIGTERM."""
    code = """if True:
        import cli, multiprocessing, os, signal, time
        early = False  # whether a child gets SIGTERM before any other hook is called in it
        term = lambda: early and os.kill(os.getpid(), signal.SIGTERM)
        os.register_at_fork(after_in_child=term)
        cli.run("x.py", lambda: None)
        check = cli.signal_check()
        with multiprocessing.get_context("fork").Pool(1, time.sleep, [60]):
            time.sleep(0.2)
        early = True
        child = os.fork() or time.sleep(60)
        ended = os.waitpid(child, 0)[1] == signal.SIGTERM
        check()
        print("goes on", ended, flush=True)
    """
    assert bash(f"timeout 20 python -c '{code}'").stdout == "goes on True\n"


def test_a_second_signal_ends_at_once_and_a_launchers_repetition_does_not():
    code = """if True:
        import cli, os, signal, time
        check = cli.signal_check()
        for pause in (0, 1.1):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            print("goes on", flush=True)
            time.sleep(1.1)
    """
    ran = bash(f"python -c '{code}'")
    assert (ran.returncode, ran.stdout) == (130, "goes on\n")
    assert ran.stderr == "stopped at once; what was saved before is kept\n"


def test_code_that_catches_all_does_not_keep_a_script_from_its_end():
    code = """if True:
        import cli, os, signal, time
        def main():
            for _ in range(9):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(1.1)
                except:
                    time.sleep(1.1)
        cli.run("x.py", main)
    """
    ran = bash(f"timeout 20 python -c '{code}'")
    assert ran.returncode == 130
    assert ran.stderr == "stopped at once; what was saved before is kept\n"


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    ran = bash(f"mkdir {tmp_path}/a; cd {tmp_path}/a; rmdir ../a; python {ROOT}/toy/run_2d.py")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("run_2d.py: the folder that this is started in is gone; change")


def draws(script, *flags):
    """A script's main with these flags, in this process."""

    def work(folder, monkeypatch):
        module = importlib.import_module(script)
        monkeypatch.setattr(flow2d, "PRETRAINING_STEPS", 2)
        build = functools.partial(shapes.build, width=32)
        monkeypatch.setattr(shapes, "build", build)
        monkeypatch.setattr("sys.argv", [script, *(flag.format(folder) for flag in flags)])
        cli.run(f"{script}.py", module.main)

    return work


def keeps(folder, monkeypatch):
    """What compare.py does with a run that is finished."""
    results = kept.Results(folder)
    results.kept["ring-2"] = {}
    cli.run("compare.py", lambda: results.add("ring-2", "a run", {"seconds": 1.0}))


RUN_2D = ("run_2d", "--iterations", "1", "--out", "{}")
WRITTEN = {  # the file that there is no room for, and who writes it
    "run_2d.png": draws(*RUN_2D),
    "run_2d.gif": draws(*RUN_2D),
    "a.txt": draws("prompts", "text", "--n", "3", "--out", "{}/a.txt"),
    "a.jsonl": draws("prompts", "geneval", "--n", "3", "--out", "{}/a.jsonl"),
    "family.png": draws("compare", "--full", "--only", "family", "--out", "{}"),
    "ring-2.json": keeps,
    "base.png": draws("shapes", "--pretraining", "1", "--samples", "1", "--out", "{}"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(name, tmp_path, monkeypatch, capsys):
    """What is written aside meets a device that is full; what was there before stays."""
    if name not in ("a.txt", "a.jsonl"):  # prompts.py writes nothing over
        for there in {name} | (tiny_world.OWN if name == "base.png" else set()):
            (tmp_path / there).write_bytes(b'{"version": 4, "runs": {}}')
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / f".{os.getpid()}-{name}").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        WRITTEN[name](tmp_path, monkeypatch)
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"cannot write {tmp_path / name} (" in line
    assert "No space left on device" in line and "make room" in line
    assert {path.name for path in tmp_path.glob(f"*{name}*")} == before & {name}
    if before:
        assert (tmp_path / name).read_bytes() == b'{"version": 4, "runs": {}}'


@pytest.mark.parametrize("script", ["train_sd35.py", "toy/run_2d.py"])
@pytest.mark.parametrize("name", ["TORCH_LOGS", "TQDM_NCOLS"])
def test_a_setting_that_no_library_takes_is_one_line(name, script):
    """They read it as they are imported, by a script's head or by its main."""
    ran = bash(f"python {script}", **{name: "bogus"})
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "does not load (" in ran.stderr and "look at its settings" in ran.stderr


class Silent(Exception):
    def __str__(self):
        raise SystemExit


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  a \nb"), "a"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch\nmore"),
            "Error(s) in loading: size mismatch",
        ),
        (ValueError("\n"), "ValueError"),
        (Silent(), "Silent"),
    ],
)
def test_what_an_error_says_first(error, line):
    assert cli.first_line(error) == line


@pytest.mark.parametrize("ending", ["", "; 1 / 0", "; raise cli.Fault(str())"])
def test_a_thread_that_is_left_does_not_keep_python(ending):
    thread = "import threading, time, cli; threading.Thread(target=lambda: time.sleep(100)).start()"
    code = f"{thread}\ndef main(): print(1){ending}\ncli.run_and_leave(str(), main)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20, capture_output=True)
    assert ran.stdout == b"1\n" and ran.returncode == {"": 0, "; 1 / 0": 1}.get(ending, 2)


def test_nothing_heavy_is_imported():
    code = "import cli, sys; assert not {'torch', 'numpy', 'yaml', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    check = cli.signal_check()
    os.kill(os.getpid(), signal.SIGHUP)
    check()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    check = cli.signal_check()
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(cli.Stopped):
        check()
