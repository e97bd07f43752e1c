"""Whatever is written behind a flag of any script: it is taken, or answered in one line.

A script is a file with a dataclass of arguments; it is found by that, so that none is forgotten.
"""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import cli

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path.stem
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("toy/*.py")])
    if all(part in path.read_text("utf-8") for part in ("Arguments", "__main__"))
]
PARSERS = ("read_arguments", "parse_args")  # what a script calls that which needs no model

HOSTILE = ["", "-", "--", "---", "-1", "-0", "0", "1", "nan", "-nan", "inf", "-inf", "1e400"]
HOSTILE += ["-1e400", "1e-400", "0x10", "1_0", "1.5", "9" * 400, "9" * 5000, "-" + "9" * 400]
HOSTILE += ["٣", "½", "é\u2028x", "\ud800", "\udcff", "a\nb", "a\rb", "\x1b[2J", "\x00", "%", "%s"]
HOSTILE += ["=", "a=b", "--help=", "x" * 10_000, "[1]", "1,2", "None", "true", "~", "..", "{}"]
HOSTILE += ["a.png", "a.txt", "nowhere/a.jsonl", "/dev/null/x", "/proc/x.png", "$(ls)", "*.py"]

WORDS = st.one_of(
    st.text(st.characters(blacklist_characters="/"), max_size=40),  # folders are made
    st.integers().map(str),
    st.integers(-3, 3).map(str),
    st.floats().map(str),
)


def flags():
    """Every argument of every script. bench.py's are the trainer's, but for what it adds."""
    for script in SCRIPTS:
        for field in dataclasses.fields(importlib.import_module(script).Arguments):
            yield pytest.param(script, field.name, id=f"{script}-{field.name}")


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """What comes first in a script's command line, in a folder where anything may be written."""
    folder = tmp_path_factory.mktemp("a") / "b"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").touch()
    (folder / "prompts.txt").write_text("a dog")
    before = os.getcwd()
    os.chdir(folder)
    lora = ["--lora", str(folder), "--prompts", "prompts.txt", "--output_dir", "evaluation"]
    yield {"evaluate": lora, "prompts": ["--out", "new.jsonl"]}
    os.chdir(before)


def answered(script, name, first, words):
    """Whether it is success, or a Fault: a line that names the flag or says what is no argument."""
    module = importlib.import_module(script)
    parse = next(
        (getattr(module, parser) for parser in PARSERS if parser in vars(module)),
        functools.partial(cli.parse, module.Arguments),
    )
    try:
        parse(argv=[*first, *words])
    except cli.Fault as fault:
        code, line = cli.verdict(fault)
        told = name in line or line.startswith("unrecognized arguments:")
        return told and code == 2 and line.isprintable() and len(line) < 1000
    except SystemExit as end:
        return end.code == 0 and any(word.startswith(("-h", "--help")) for word in words[1:])
    return True


@pytest.mark.parametrize(("script", "name"), list(flags()))
def test_hostile_words(script, name, beginning):
    for i, word in enumerate(HOSTILE):
        words = [f"--{name}", word] if i % 2 else [f"--{name}={word}"]
        assert answered(script, name, beginning.get(script, []), words), words
    for words in ([f"--{name}"], [f"--{name}", *HOSTILE[:3], *HOSTILE[4:]]):
        assert answered(script, name, beginning.get(script, []), words), words


@pytest.mark.parametrize(("script", "name"), list(flags()))
@hypothesis.given(words=st.lists(WORDS, max_size=3), one=st.booleans())
@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=12)
def test_random_words(script, name, beginning, words, one):
    line = [f"--{name}={words[0]}"] if words and one else [f"--{name}", *words]
    assert answered(script, name, beginning.get(script, []), line)


def test_all_scripts_are_found():
    known = {"train_sd35", "evaluate", "bench", "prompts", "run_2d", "shapes", "words"}
    assert known | {"compare", "compare_sd35"} == set(SCRIPTS) and len(list(flags())) > 100


@pytest.mark.parametrize("script", ["run_2d", "shapes", "words", "compare", "compare_sd35"])
def test_a_script_of_the_toy_is_found_as_a_module_and_through_a_link(script, tmp_path):
    """`python -m toy.shapes` has no toy/ on its path, and a link lies beside nothing."""
    (tmp_path / "link.py").symlink_to(ROOT / "toy" / f"{script}.py")
    for line in (["-m", f"toy.{script}"], [tmp_path / "link.py"]):
        ended = subprocess.run(
            [sys.executable, *line, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    code = f"import toy.{script}, importlib; importlib.import_module('flow2d')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", ["train_sd35", "evaluate", "bench", "prompts"])
@pytest.mark.parametrize("switch", ["-I", "-OO"])
def test_a_script_helps_without_its_folder_on_the_path_and_without_docstrings(script, switch):
    line = [sys.executable, switch, ROOT / f"{script}.py", "--help"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.strip() and not ended.stderr


def test_names_that_are_written_twice_so_that_nothing_is_imported_are_the_same():
    import compare
    import compare_sd35
    import family_sd35
    import search
    import sweeps

    assert set(compare.COMPARED["ring-2"]) == set(search.METHODS)
    about = (
        *sweeps.SWEEPS,
        *(name for name in compare.EXPERIMENTS if hasattr(compare.Comparison, name)),
    )
    assert set(about) == set(compare.EXPERIMENTS)
    assert compare_sd35.Arguments().worlds == list(family_sd35.WORLDS)
