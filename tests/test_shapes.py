"""The world of shapes: an exact checker, and a pipeline whose parts do what they are for."""

import errno
import json
import math
import os
import random
import shutil
import unittest.mock

import pytest
import shapes
import tiny_sd35
import tiny_world
import torch
from safetensors.torch import load_file, save_file

import cli
import prompts as prompt_sets

PROMPTS = shapes.prompt_list()


def drawn(prompts, seed=0):
    rng = random.Random(seed)
    return shapes.paint([shapes.draw_scene(prompt, rng) for prompt in prompts])


def test_every_prompt_is_there_once():
    assert len({prompt["prompt"] for prompt in PROMPTS}) == len(PROMPTS) == 6 + 12 + 12 + 30


def test_the_checker_is_exact_on_what_was_drawn():
    images = drawn(PROMPTS)
    assert shapes.strict(images, PROMPTS) == shapes.graded(images, PROMPTS) == [1.0] * len(PROMPTS)
    assert shapes.cleanness(images, PROMPTS) == [0.0] * len(PROMPTS)


def test_the_checker_stands_some_noise_and_the_cleanness_shows_it():
    images = drawn(PROMPTS)
    noisy = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert shapes.strict(noisy, PROMPTS) == [1.0] * len(PROMPTS)
    assert max(shapes.cleanness(noisy, PROMPTS)) < -0.02


RED_DIAMOND, BLUE_SQUARE = ("red", "diamond"), ("blue", "square")


def scene(**cells):
    return [cells.get(f"c{i}") for i in range(4)]


@pytest.mark.parametrize(
    ("text", "seen", "grades"),
    [
        ("red diamond", scene(c2=RED_DIAMOND), [1, 1]),
        ("red diamond", scene(), [0, 1]),
        ("red diamond", scene(c2=BLUE_SQUARE), [0, 1 / 2]),
        ("red diamond", scene(c2=RED_DIAMOND, c3=BLUE_SQUARE), [1, 1 / 2]),
        ("red diamond", scene(c2=RED_DIAMOND, c3=RED_DIAMOND), [0, 1 / 2]),
        ("red diamond on the left", scene(c2=RED_DIAMOND), [1, 1, 1]),
        ("red diamond on the left", scene(c1=RED_DIAMOND), [1, 1, 0]),
        ("red diamond on the left", scene(), [0, 1, 0]),
        ("three red diamonds", scene(c0=RED_DIAMOND, c1=RED_DIAMOND), [2 / 3, 1]),
        ("red diamond and blue square", scene(c0=RED_DIAMOND), [1, 0, 1]),
        ("red diamond and blue square", scene(c0=RED_DIAMOND, c3=BLUE_SQUARE), [1, 1, 1]),
    ],
)
def test_the_grades_by_hand(text, seen, grades):
    (prompt,) = (prompt for prompt in PROMPTS if prompt["prompt"] == text)
    assert shapes.clauses(shapes.read(shapes.paint([seen]))[0][0], prompt) == pytest.approx(grades)
    mean = sum(grades) / len(grades)
    assert shapes.graded(shapes.paint([seen]), [prompt]) == pytest.approx([mean])
    assert shapes.strict(shapes.paint([seen]), [prompt]) == [float(mean == 1)]


@pytest.fixture(scope="module")
def pipe():
    return shapes.build(width=32, layers=2)


@torch.no_grad()
def test_the_vae_halves_the_size_and_loses_nothing_at_8_bits(pipe):
    coarse = torch.randint(256, (4, 3, shapes.SIDE // 2, shapes.SIDE // 2)) / 255
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    images = torch.cat([drawn(PROMPTS[:20]), coarse])
    latents = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    assert latents.shape[1:] == (3, shapes.SIDE // 2, shapes.SIDE // 2)
    decoded = pipe.vae.decode(latents).sample / 2 + 0.5
    assert torch.equal((decoded * 255).round(), (images * 255).round())


@torch.no_grad()
def test_a_vae_of_one_channel_keeps_grey_pictures():
    vae = tiny_sd35.exact_vae(shapes.SIDE, channels=1, scale=0.6)
    half = shapes.SIDE // 2
    coarse = (torch.randint(256, (4, 1, half, half)) / 255).expand(-1, 3, -1, -1)
    images = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    assert latents.shape[1:] == (1, half, half) and vae.config.scaling_factor == 0.6
    decoded = vae.decode(latents).sample / 2 + 0.5
    assert torch.equal((decoded * 255).round(), (images * 255).round())


def test_the_control_gives_a_group_its_rewards_in_another_order():
    group = [PROMPTS[0]] * 60
    images = drawn(PROMPTS[:60])
    rewards, control = shapes.strict(images, group), shapes.shuffled(images, group)
    assert sorted(rewards) == sorted(control) and rewards != control
    assert control == shapes.shuffled(images, group)


def test_all_prompts_are_told_apart(pipe):
    embeds, pooled = tiny_sd35.encode(pipe, [prompt["prompt"] for prompt in PROMPTS])
    assert torch.pdist(pooled).min() > 0.1 and torch.pdist(embeds.flatten(1)).min() > 5
    longest = max(len(pipe.tokenizer(prompt["prompt"])["input_ids"]) for prompt in PROMPTS)
    assert longest <= shapes.TOKENS


def test_pretraining_learns(pipe):
    losses = list(shapes.pretrain(pipe, 150, batch=16))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def run_main(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["shapes.py", *map(str, argv)])
    cli.run("shapes.py", shapes.main)
    return capsys.readouterr().out


def test_the_command_leaves_a_pipeline_prompts_and_pictures(tmp_path, monkeypatch, capsys):
    out = tmp_path / "shapes"
    short = ("--out", out, "--pretraining", 2, "--samples", 2)
    table = run_main(monkeypatch, capsys, *short).splitlines()
    assert [line.split("|")[1].strip() for line in table[-3:]] == [
        "base",
        "base, guidance 2",
        "base, 28 steps",
    ]
    assert prompt_sets.read(out / "prompts.jsonl") == PROMPTS
    assert {p["task"] for p in prompt_sets.read(out / "held_out.jsonl")} == set(shapes.TASKS)
    assert (out / "base.png").stat().st_size > 10_000

    with pytest.raises(SystemExit):
        run_main(monkeypatch, capsys, *short, "--lora", tmp_path)
    assert "argument --lora: there is no" in capsys.readouterr().err
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, capsys, "--out", tmp_path / "none", "--lora", tmp_path)
    assert "holds no pipeline; run toy/shapes.py first" in capsys.readouterr().err


def without(folder, name):
    shutil.rmtree(folder / name)


def of_nan(folder, name):
    file = folder / name / "diffusion_pytorch_model.safetensors"
    weights = {key: weight * math.nan for key, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def of_other_pictures(folder, name):
    config = folder / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32}))


def cut(folder, name):
    os.truncate(folder / name / "diffusion_pytorch_model.safetensors", 1000)


DAMAGES = [
    (without, "vae", "it has no vae"),
    (without, "tokenizer_2", "it has no tokenizer_2"),
    (of_nan, "transformer", "its transformer has no finite "),
    (cut, "transformer", "mend it, or give a folder"),
    (of_other_pictures, "transformer", "is of another world: it draws pictures of 64 pixels"),
]


@pytest.mark.parametrize(("damage", "name", "line"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_pipeline_is_one_line(damage, name, line, pipe, tmp_path, monkeypatch, capsys):
    """Some libraries would make do with what is left, and the table would be of noise."""
    pipe.save_pretrained(tmp_path / "p")
    damage(tmp_path / "p", name)
    (tmp_path / tiny_world.WEIGHTS).write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, capsys, "--out", tmp_path / "p", "--lora", tmp_path, "--samples", 1)
    said = capsys.readouterr().err
    assert end.value.code == 2 and line in said and said.count("\n") == 1


def test_a_pipeline_of_another_world_is_kept(pipe, tmp_path):
    tiny_world.save(pipe, tmp_path, {"prompts": [], "held_out": []})
    args = tiny_world.read_arguments(shapes.Arguments, ["--out", str(tmp_path)], "toy/words.py")
    rest = dict.fromkeys(("build", "pretrain", "files", "shown", "title", "columns", "right"))
    with pytest.raises(cli.Fault, match="another world: it draws pictures of 16 pixels, and not"):
        tiny_world.run(args, side=64, **rest)


def test_a_lora_of_another_world_is_told_by_its_run(tmp_path):
    (tmp_path / "arguments.json").write_text('{"resolution": 64}')
    rest = dict.fromkeys(("build", "pretrain", "files", "shown", "title", "columns", "right"))
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        args = shapes.Arguments(lora=[str(folder)])
        with pytest.raises(cli.Fault, match="was trained on pictures of 64 pixels, and not of 16;"):
            tiny_world.run(args, side=shapes.SIDE, **rest)


@pytest.mark.parametrize("line", [None, "rubbish", '{"reward": NaN}', '{"reward": 1e400}', "{}"])
def test_rewards_that_cannot_be_drawn_are_one_line(line, tmp_path):
    if line:
        (tmp_path / "metrics.jsonl").write_text(f'{{"reward": 0.5}}\n{line}\n')
    with pytest.raises(cli.Fault, match="metrics.jsonl .*; mend it, or leave --figure out"):
        tiny_world.read_rewards(str(tmp_path))


def test_a_pipeline_is_replaced_whole_or_not_at_all(pipe, tmp_path, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    tiny_world.save(pipe, tmp_path, {"prompts": [{"prompt": "a"}]})
    before = files()
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(cli.Fault, match="No space .*make room"):
        patch.setattr(pipe.vae, "save_pretrained", unittest.mock.Mock(side_effect=full))
        tiny_world.save(pipe, tmp_path, {"prompts": [{"prompt": "b"}]})
    assert files() == before and not list(tmp_path.glob(".*"))
    tiny_world.save(pipe, tmp_path, {"prompts": [{"prompt": "b"}]})
    assert files().keys() == before.keys() and files() != before
    os.rename(tmp_path / "vae", tmp_path / "elsewhere")
    (tmp_path / "vae").symlink_to("elsewhere")
    tiny_world.save(pipe, tmp_path, {"prompts": [{"prompt": "c"}]})
    assert not (tmp_path / "vae").is_symlink() and (tmp_path / "elsewhere/config.json").exists()


@pytest.mark.parametrize("names", [("base",), ("a/x", "b/x")])
def test_every_row_has_its_own_name(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.Fault, match=f"two rows would be called {tmp_path.name}; rename"):
        shapes.read_arguments(["--lora", ".", str(tmp_path)])  # "." has a name, too
    with pytest.raises(cli.Fault, match="argument --lora: two rows would be called (base|x); ren"):
        shapes.read_arguments(["--lora", *(str(tmp_path / name) for name in names)])


@pytest.mark.parametrize("names", [["prompts.jsonl"], ["transformer", "vae"], ["notes.txt"]])
def test_a_world_writes_into_no_folder_of_others(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("of somebody else")
    with pytest.raises(cli.Fault, match=f"{names[0]}, and no pipeline of a toy; give a new folder"):
        shapes.read_arguments(["--out", str(tmp_path)])
    for name in (*tiny_world.OWN, "transformer", "base.png"):
        (tmp_path / name).write_text("an earlier pipeline's")
    shapes.read_arguments(["--out", str(tmp_path)])
