"""The world of shapes: an exact checker, and a pipeline whose parts do what they are for."""

import random

import pytest
import shapes
import tiny_sd35
import tiny_world
import torch

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


@pytest.mark.parametrize("names", [("base",), ("a/x", "b/x")])
def test_every_row_has_its_own_name(names, tmp_path):
    with pytest.raises(cli.Fault, match="argument --lora: two rows would be called (base|x); ren"):
        shapes.read_arguments(["--lora", *(str(tmp_path / name) for name in names)])


@pytest.mark.parametrize("names", [["prompts.jsonl"], ["model_index.json", "vae"], ["notes.txt"]])
def test_a_world_writes_into_no_folder_of_others(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("of somebody else")
    with pytest.raises(cli.Fault, match=f"{names[0]}, and no pipeline of a toy; give a new folder"):
        shapes.read_arguments(["--out", str(tmp_path)])
    for name in (*tiny_world.OWN, *tiny_world.BEFORE, "base.png"):
        (tmp_path / name).write_text("an earlier pipeline's")
    shapes.read_arguments(["--out", str(tmp_path)])
