"""Arguments from a file and into one."""

import json
from pathlib import Path

import pytest

import cli
import config
import train_sd35


@pytest.mark.parametrize(
    "line",
    ["--reward ocr --recipe cfg_free", "--no_gradient_checkpointing --micro_batch_size auto"],
)
def test_printed_arguments_are_a_config_that_gives_them_again(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_sd35.py", *line.split(), "--print_arguments"])
    train_sd35.main()
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    asked = train_sd35.parse_args(line.split())
    again = train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])
    again.config = None
    assert again == asked and not Path(asked.output_dir).exists()
    with pytest.raises(cli.Fault, match="must be true or false, got maybe"):
        (tmp_path / "run.yaml").write_text("offline: maybe")
        train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_arguments_from_a_file_and_flags_win(suffix, tmp_path):
    file = tmp_path / f"run.{suffix}"
    settings = {"beta": 5.0, "group_size": 6, "output_dir": str(tmp_path / "run")}
    lines = [f"{name}: {value}" for name, value in settings.items()]
    file.write_text(json.dumps(settings) if suffix == "json" else "\n".join(lines))
    args = train_sd35.parse_args(["--config", str(file), "--group_size", "8"])
    assert (args.beta, args.group_size) == (5, 8)


CONFIGS = {
    "max-train-steps: 5": ["--max_train_steps=5"],
    "model: a/b": ["--pretrained_model_name_or_path=a/b"],
    "mixed_precision: no": ["--mixed_precision=no"],  # a word, where YAML has a boolean
    "offline: no": ["--no_offline"],
    "offline: True": ["--offline"],
    "reward: [a, b=2]": ["--reward", "a", "b=2"],
    "reward: a": ["--reward", "a"],
    "reward: []": [],
    "train_samples: null": [],
    "output_dir: ''": ["--output_dir="],  # which is refused, as on the command line
    "\ufeffbeta: 1.5\r\nkl: 0\r\n": ["--beta=1.5", "--kl=0"],
    '{\n\t"beta": 1,\n\t"offline": true\n}': ["--beta=1", "--offline"],
}
BAD_CONFIGS = {
    "beta: 1\nkl: [1, 2]": "line 2: kl takes one value",
    "beta: {a: 1}": "line 1: beta takes one value",
    "reward: [[a]]": "line 1: reward takes values, and no list in a list",
    "reward: &a [*a]": "line 1: reward takes values, and no list in a list",
    "reward: [--offline]": "line 1: reward takes no value that begins with -",
    "beta: 1\nkl: 1\nbeta: 2": "line 3: beta is there already",
    "beta: 1\nconfig: other.yaml": "line 2: a file of --config cannot name another one",
    "? [1]\n: 2": "line 1: there is no argument of that kind",
    "beta: 1\nkl: 2\n x: y: z": "line 3: this is not YAML",
    "beta: 1\nkl: '": "line 2: this is not YAML",
    "[" * 10_000: "cannot read",
    "a: " + "{b: " * 10_000: "cannot read",
    "beta: \0": "cannot read",
    "": "must have a line 'argument: value' for each",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_as_the_world_writes_it(content, tmp_path):
    file = tmp_path / ("run.json" if content[0] == "{" else "run.yaml")
    file.write_bytes(content.encode())
    assert config.read_config(str(file), train_sd35.Arguments) == CONFIGS[content]


@pytest.mark.parametrize("content", BAD_CONFIGS)
def test_a_bad_config_is_one_line_with_its_number(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(cli.Fault) as fault:
        config.read_config(str(tmp_path / "run.yaml"), train_sd35.Arguments)
    assert f"run.yaml, {BAD_CONFIGS[content]}" in str(fault.value) or (
        BAD_CONFIGS[content] in str(fault.value) and "line" not in BAD_CONFIGS[content][:5]
    )
    assert "\n" not in str(fault.value)


def test_what_a_config_says_is_checked_and_its_file_named(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: much")
    with pytest.raises(cli.Fault, match="run.yaml: argument --beta: invalid float value: 'much'"):
        train_sd35.parse_args(["--config", str(tmp_path / "run.yaml")])
