"""The README says what is so: links, commands, flags, tables, and code that runs as it stands."""

import dataclasses
import re
from pathlib import Path

import torch

import dgpo
import evaluate
import rewards
from sd35 import settings
from tiny_sd35 import pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_paper_to_code_table_points_at_the_right_lines():
    links = re.findall(r"\[`?([^]`]+)`?\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) >= 20
    for text, path, number in links:
        line = (ROOT / path).read_text("utf-8").splitlines()[int(number) - 1]
        assert line.startswith((f"def {text}(", f"# {text}")), f"{path}:{number} is not {text}"


def test_every_public_function_of_the_paper_is_in_the_table():
    public = re.findall(r"^def ([a-z]\w*)\(", (ROOT / "dgpo.py").read_text("utf-8"), re.MULTILINE)
    assert [name for name in public if f"[`{name}`](dgpo.py#L" not in README] == []


def test_every_file_that_is_linked_or_shown_exists():
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= places


def test_it_is_a_page():
    """At most 160 lines of at most 100 columns."""
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 100


def test_every_flag_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_0-9]*", README))
    assert {"--reward", "--lora", "--quantize", "--train_prompts"} <= flags
    classes = settings.Settings, evaluate.EvaluationSettings, pipeline.Settings
    known = {f"--{field.name}" for kind in classes for field in dataclasses.fields(kind)}
    known |= {"--model"}
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "toy" / "run_2d.py").read_text("utf-8")))
    assert flags - known == set()


def test_the_recipes_and_rewards_are_there():
    assert [name for name in settings.RELEASED if f"`{name}`" not in README] == []
    table = README.split("| `--reward` |")[1].split("\n\n")[0]
    assert [name for name in rewards.names() if f"`{name}`" not in table] == []


def test_ci_runs_the_test_command():
    command = "pip install -r requirements.txt && pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_example_of_your_own_model_runs_as_it_stands():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["model"].weight.grad.abs().sum() > 0 and names["reference"].weight.grad is None


def test_a_network_whose_time_and_velocity_are_reversed():
    """`-network(x, 1 - t)` has this repository's loss where the other library has its own."""

    def network(x, s):  # of a library in which s = 1 is data, and the velocity x0 - eps
        return torch.tanh(x) * (1 + s)[..., None]

    x0, eps, t = torch.randn(3, 4, 2), torch.randn(3, 4, 2), torch.rand(3, 4)
    s = 1 - t
    x_s = s[..., None] * x0 + (1 - s)[..., None] * eps
    theirs = (network(x_s, s) - (x0 - eps)).square().mean(2)
    wrapped = -network(dgpo.diffuse(x0, eps, t), 1 - t)
    torch.testing.assert_close(dgpo.dsm_loss(wrapped, x0, eps), theirs)
    assert "`-network(x, 1 - t)`" in README
    sign_alone = dgpo.dsm_loss(-network(dgpo.diffuse(x0, eps, t), t), x0, eps)
    assert not torch.allclose(sign_alone, theirs, rtol=0.01)
