"""The README says what is so: where each equation stands, the commands it gives, the tables."""

import dataclasses
import re
from pathlib import Path

import compare
import run_2d
import shapes

import bench
import evaluate
import prompts
import recipes
import records
import rewards
import train_sd35

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reading_guide_points_at_the_right_lines():
    links = re.findall(r"\[`?([^]`]+)`?\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 20
    for text, path, number in links:
        line = (ROOT / path).read_text().splitlines()[int(number) - 1]
        assert line.startswith((f"def {text}(", f"# {text}")), f"{path}:{number} is not {text}"


def test_every_public_function_is_in_the_reading_guide():
    public = re.findall(r"^def ([a-z]\w*)\(", (ROOT / "dgpo.py").read_text(), re.MULTILINE)
    assert [name for name in public if f"[`{name}`](dgpo.py#L" not in README] == []


def test_every_file_that_is_linked_or_shown_is_there():
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    inside = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert inside <= places | set(re.findall(r'<a id="([^"]+)">', README))


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements.txt && pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


def test_every_flag_in_the_readme_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", README)) - {"--help", "--nproc_per_node"}
    assert {"--offline", "--only", "--reward"} <= flags
    scripts = (train_sd35, evaluate, run_2d, prompts, bench, compare, shapes)
    fields = [field for script in scripts for field in dataclasses.fields(script.Arguments)]
    known = {f"--{no}{field.name}" for field in fields for no in ("", "no_")} | {"--model"}
    assert [
        flag for flag in flags if flag.replace("-", "_")[2:] not in {k[2:] for k in known}
    ] == []


def test_the_recipes_and_rewards_are_in_the_readme():
    assert [recipe for recipe in recipes.RECIPES if f"| `{recipe}` |" not in README] == []
    table = README.split("| `--reward` |")[1].split("\n\n")[0]
    assert [name for name in rewards.names() if f"`{name}`" not in table] == []


def test_every_metric_is_explained_where_the_readme_says():
    """A run's metrics.jsonl has these keys, and the docstring of records.py explains them."""
    keys = "reward reward_std equal_groups groups_not_finite loss gap gate clipped kl grad_norm"
    keys += " seconds images_per_second peak_memory_gb eval _base share"
    source = (ROOT / "records.py").read_text() + (ROOT / "train_sd35.py").read_text()
    assert "[`records.py`](records.py)" in README
    for key in keys.split():
        assert key in records.__doc__ and source.count(key) > records.__doc__.count(key), key
