"""The tiny pipeline: its VAE is exact, prompts are told apart, it learns; and the script."""

import random
import sys
from unittest.mock import Mock

import pytest
import torch

import rewards
from sd35.encoder import Encoder
from sd35.lora import add_lora, save_lora
from sd35.model import load_pipeline
from sd35.prompts import load as load_prompts
from sd35.settings import Settings, UserError, parse
from tiny_sd35 import pipeline, shapes, words

ROWS = ["", ", guidance 2", ", 28 steps"]


@pytest.fixture(scope="module")
def pipes():
    """Small untrained pipelines by world."""
    return {world: world.build(width=32) for world in (shapes, words)}


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, 1])
def test_the_vae_halves_the_size_and_is_exact_at_8_bits(channels):
    vae = pipeline.exact_vae(16, channels, scale=0.6)
    half = (torch.randint(256, (4, channels, 8, 8)) / 255).expand(-1, 3, -1, -1)
    images = half.repeat_interleave(2, 2).repeat_interleave(2, 3)
    latents = vae.encode(images * 2 - 1).latent_dist.mode()
    assert latents.shape == (4, channels, 8, 8)
    decoded = vae.decode(latents).sample / 2 + 0.5
    assert torch.equal((decoded * 255).round(), (images * 255).round())


@torch.no_grad()
@pytest.mark.parametrize(("world", "judge"), [(shapes, shapes.strict), (words, words.letters)])
def test_the_latents_are_those_of_correct_drawings(world, judge, pipes):
    config, prompts = pipes[world].vae.config, world.prompt_lists()["prompts"][:8]
    latents = world.draw_latents(pipes[world], prompts, random.Random(0))
    decoded = pipes[world].vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    assert judge(decoded / 2 + 0.5, prompts) == [1.0] * 8
    assert 0.3 < latents.std() < 1.5 and latents.mean().abs() < 0.3  # about as the noise


def test_all_shape_prompts_are_told_apart_and_none_is_truncated(pipes):
    texts = [prompt["prompt"] for prompt in shapes.prompt_list()]
    embeds, pooled = pipeline.encode(pipes[shapes], texts)
    assert torch.pdist(pooled).min() > 0.1 and torch.pdist(embeds.flatten(1)).min() > 5
    tokenizer = pipes[shapes].tokenizer
    for text in texts:
        ids = tokenizer(text, truncation=False)["input_ids"]
        assert len(ids) <= tokenizer.model_max_length == shapes.TOKENS
        assert len(ids) == len(text.split()) + 2  # a token per word


def test_a_saved_pipeline_spells_every_word_and_encodes_as_before(pipes, tmp_path):
    pipes[words].save_pretrained(tmp_path)
    pipe, texts = load_pipeline(str(tmp_path), torch.float32), []
    for prompt in words.of_task("test"):
        ids = pipe.tokenizer(prompt["prompt"], truncation=False)["input_ids"]
        assert len(ids) == words.TOKENS == pipe.tokenizer.model_max_length
        pieces = pipe.tokenizer.convert_ids_to_tokens(ids[1:-1])
        texts.append("".join(piece.removesuffix("</w>") for piece in pieces).upper())
        assert texts[-1] == prompt["prompt"]
    encoded = Encoder(pipe, pipeline.t5_tokens(pipe), torch.device("cpu"))(texts[:1], {})[texts[0]]
    embeds, pooled = pipeline.encode(pipes[words], texts[:1])
    assert torch.equal(encoded.embeds, embeds) and torch.equal(encoded.pooled, pooled)


def test_words_that_differ_in_one_letter_or_in_order_are_told_apart(pipes):
    near = ["CAMP", "CAPM", "ACMP", "PMAC", "XAMP", "CXMP", "CAXP", "CAMX"]
    embeds, pooled = pipeline.encode(pipes[words], [f'"{word}"' for word in near])
    assert embeds.shape[1] == words.TOKENS + 1  # and one of zeros in T5's place
    assert torch.pdist(embeds.flatten(1)).min() > 8 and torch.pdist(pooled).min() > 0.3


@pytest.fixture
def few_words(monkeypatch):
    """The world of words with fewer prompts, as encoding all takes seconds."""
    of_task = words.of_task
    monkeypatch.setattr(words, "of_task", lambda task: of_task(task)[:50])


@pytest.mark.parametrize("world", [shapes, words])
def test_pretraining_learns_from_noisy_captions(world, monkeypatch, few_words):
    pipe, seen, draw = world.build(width=32), [], Mock(side_effect=world.draw_latents)
    monkeypatch.setattr(world, "draw_latents", draw)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["pooled_projections"]), with_kwargs=True
    )
    steps = pipeline.pretrain(pipe, world, 60)
    losses, weight = [next(steps) for _ in range(60)], pipe.transformer.proj_out.weight
    last = weight.clone()
    assert next(steps, None) is None and not torch.equal(last, weight)  # the average is left
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    texts = ["", *(prompt["prompt"] for prompt in world.prompt_lists()["prompts"])]
    nearest = torch.cdist(torch.cat(seen), pipeline.encode(pipe, texts)[1]).argmin(1)
    captions = [texts[i] for i in nearest]
    assert captions.count("") / len(captions) == pytest.approx(0.1, abs=0.025)
    shown = [prompt["prompt"] for call in draw.call_args_list for prompt in call.args[1]]
    wrong = [a not in ("", b) for a, b in zip(captions, shown, strict=True)]
    assert sum(wrong) / len(wrong) == pytest.approx(
        0.9 * world.WRONG * 0.98, abs=0.04
    )  # 2 % are equal


def run_main(monkeypatch, capsys, world, *flags):
    """What the script prints: the rows of its table as dictionaries, and the other lines."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    pipeline.main(world)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line[0] == "|"]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    return table, [line for line in lines if line[0] != "|"]


@pytest.mark.parametrize("world", [shapes, words])
def test_the_script_pretrains_and_tests_a_lora(world, tmp_path, monkeypatch, capsys, few_words):
    if world is words:
        pytest.importorskip("rapidocr")
        monkeypatch.setattr(words, "find_spec", lambda name: None)
    out, run, figure = tmp_path / "pipeline", tmp_path / "run", tmp_path / "figure.png"
    short = monkeypatch, capsys, world, "--out", out, "--samples", 2
    table, said = run_main(*short, "--pretraining", 2)
    assert list(table) == ["drawn"] * (world is words) + ["base" + row for row in ROWS]
    for name, prompts in world.prompt_lists().items():
        assert load_prompts(out / f"{name}.jsonl") == prompts

    pipe = load_pipeline(str(out), torch.float32)
    for parameter in add_lora(pipe.transformer, 4, 8, seed=0):
        parameter.data += 0.3
    run.mkdir()
    save_lora(pipe, run)
    (run / "metrics.jsonl").write_text('{"reward": 0.5}\n{"reward": 0.7}\n')
    second, said = run_main(*short, "--lora", run, "--figure", figure)
    assert {name: second[name] for name in table} == table  # the saved pipeline is the same
    assert list(second)[len(table) :] == ["run" + row for row in ROWS]
    assert second["run"]["cleanness"] != second["base"]["cleanness"]
    assert figure.stat().st_size > 10_000
    if world is words:
        assert said == ["without the column 'other network': it needs `pip install ddddocr`"]
        assert table["drawn"]["letters"] == "1.000" and "other network" not in table["drawn"]


def test_a_column_is_the_mean_over_its_task(tmp_path, monkeypatch, capsys):
    def sample(pipe, prompts, *_):
        rng, empty = random.Random(0), [None] * 4
        scenes = [shapes.draw_scene(p, rng) if p["task"] == "count" else empty for p in prompts]
        return shapes.paint(scenes)

    monkeypatch.setattr(pipeline, "sample", sample)
    monkeypatch.setattr(pipeline, "pretrain", lambda *_: [])
    table, _ = run_main(monkeypatch, capsys, shapes, "--out", tmp_path, "--samples", 3)
    assert list(table["base"].values())[1:] == ["0.250", *["0.000"] * 2, "1.000", "0.000", "0.0000"]


def test_a_folder_that_is_missing_is_one_sentence(tmp_path, monkeypatch, capsys):
    for flags in (["--out", "none", "--lora", tmp_path], ["--out", tmp_path, "--lora", "none"]):
        with pytest.raises(
            UserError, match="there is no folder none; without --lora, .* is created"
        ):
            run_main(monkeypatch, capsys, shapes, *flags)


@pytest.mark.parametrize("world", [shapes, words])
def test_the_yaml_file_is_for_its_world(world):
    path = f"tiny_sd35/{world.__name__.split('.')[1]}"
    settings = parse(Settings, ["--config", f"{path}.yaml"])
    assert settings.resolution == world.SIDE
    for name in settings.reward + settings.eval_reward:
        assert name.startswith(f"{path}.py:") and callable(rewards.load(name, "cpu"))
