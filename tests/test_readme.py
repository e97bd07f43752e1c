"""The README says what is so: its reading guide, and the commands it gives."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import compare

import evaluate
import rewards
import train_sd35

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_reading_guide_points_at_the_right_lines():
    links = re.findall(r"\[`?([^]`]+)`?\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 20
    for text, path, number in links:
        line = (ROOT / path).read_text().splitlines()[int(number) - 1]
        assert line.startswith((f"def {text}(", f"# {text}")), f"{path}:{number} is not {text}"


def test_every_public_function_is_in_the_reading_guide():
    public = re.findall(r"^def ([a-z]\w*)\(", (ROOT / "dgpo.py").read_text(), re.MULTILINE)
    assert [name for name in public if f"[`{name}`](dgpo.py#L" not in README] == []


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements.txt && pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


def test_every_flag_in_the_readme_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", README)) - {
        "--help",
        "--nproc_per_node",
    }  # torchrun's
    assert {"--offline", "--only", "--reward"} <= flags
    commands = ("toy/run_2d.py", "toy/compare.py", "toy/shapes.py", "prompts.py")
    source = "".join((ROOT / name).read_text() for name in commands)
    fields = dataclasses.fields(train_sd35.Arguments) + dataclasses.fields(evaluate.Arguments)
    others = {f"--{no}{field.name}" for field in fields for no in ("", "no_")} | {"--model"}
    assert [flag for flag in flags if f'"{flag}"' not in source and flag not in others] == []


def test_the_recipes_are_the_trainers():
    for name, recipe in train_sd35.RECIPES.items():
        (row,) = re.findall(rf"^\| `{name}` \| \d+ \|.*", README, re.MULTILINE)
        group, beta, kl, clip = (float(cell) for cell in row.split("|")[2:6])
        found = (recipe["group_size"], recipe["beta"], recipe["kl"], recipe["clip"])
        assert (group, beta, kl, clip) == found
        assert f"| {recipe['std']} |" in row


def test_every_reward_is_in_the_readme():
    table = README.split("| `--reward` |")[1].split("\n\n")[0]
    assert [name for name in rewards.names() if f"| `{name}` |" not in table] == []


def test_the_tables_are_what_compare_prints_of_the_kept_results(tmp_path, monkeypatch, capsys):
    for file in (ROOT / "toy" / "results").glob("*.json"):
        shutil.copy(file, tmp_path)
    command = ["compare.py", "--full", "--table", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(printed) > 100
    assert [line for line in printed if line not in README.splitlines()] == []
