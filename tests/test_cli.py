"""What all scripts share of the command line."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

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


BAD = {
    "--t_min 1": "argument --t_min: must be at least 0 and below 1, got 1.0",
    "--t_min -0.1": "argument --t_min: must be at least 0 and below 1, got -0.1",
    "--t_min nan": "argument --t_min: must be at least 0 and below 1, got nan",
    "--rate 0": "argument --rate: must be above 0, got 0.0",
    "--rate inf": "argument --rate: must be a finite number, got inf",
    "--rate much": "argument --rate: invalid float value: 'much'",
    "--name c": "argument --name/--alias: invalid choice: 'c'",
    "--nam b": "unrecognized arguments: --nam b",
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
    with pytest.raises(Fault, match="argument --flag: must be name=path, got a"):
        cli.pairs(["a"], "flag")


def test_what_a_file_of_json_holds(tmp_path):
    path = tmp_path / "kept.json"
    assert cli.read_json(path) == {}
    path.write_text('{"a": [1]}')
    assert cli.read_json(path) == {"a": [1]}
    for rubbish in ("", "[3]", "[" * 100_000):
        path.write_text(rubbish)
        with pytest.raises(Fault, match=r"cannot read .*kept.json \(.*\); mend or delete it"):
            cli.read_json(path)


def test_folders(tmp_path):
    made = cli.make_folder(str(tmp_path / "a" / "b"))
    assert made.is_dir() and not list(made.iterdir())
    (tmp_path / "file").write_text("")
    for name in ("", f"{tmp_path}/file/x", "a\0b"):
        with pytest.raises(Fault, match="argument --out: "):
            cli.make_folder(name, "out")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.txt"
    cli.replace_file(path, lambda new: new.write_text("one"))

    def full(new):
        new.write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(Fault, match=r"cannot write .*kept.txt .*No space left.*; what was there"):
        cli.replace_file(path, full)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Fault("what is wrong\nand more"), 2, "x.py: what is wrong\n"),
        (cli.Stopped("saved; go on"), 130, "x.py: saved; go on\n"),
        (cli.Stopped(), 130, "x.py: stopped\n"),
        (KeyboardInterrupt(), 130, "x.py: stopped\n"),
    ],
)
def test_an_end_is_one_line_and_a_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run("x.py", main)
    assert end.value.code == code and capsys.readouterr().err == line


def test_nothing_heavy_is_imported():
    code = "import cli, sys; assert not {'torch', 'numpy', 'yaml', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
