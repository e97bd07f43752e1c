"""What sd35.plan counts of Stable Diffusion 3.5 Medium."""

import dataclasses
from types import SimpleNamespace

import pytest

from sd35 import plan
from sd35.settings import Settings, parse


def test_the_plan_counts_the_real_geometry(capsys, monkeypatch):
    size = plan.count_sizes(parse(Settings, []))
    monkeypatch.setattr(plan, "count_sizes", lambda settings: size)

    def printed(*flags):
        plan.plan(parse(Settings, list(flags)))
        lines = capsys.readouterr().out.splitlines()
        numbers = [line.split(maxsplit=1) for line in lines if line.startswith("   ")]
        return {text.strip(): float(number) for number, text in numbers}, lines

    plain, lines = printed()
    int8, lines_int8 = printed("--quantize", "int8")
    # T5-XXL's 4.762 G parameters, and of the LoRA's 24 bytes per parameter 16 remain beside it.
    encoding = "together, while T5 encodes prompts, without transformer and VAE"
    assert plain[encoding] == pytest.approx(2 * 4.762 + 16 * 0.0376, abs=0.01)
    # What is not in its linear layers, T5's embedding of 32,128 words, stays in bf16.
    embedding = 32128 * 4096 / 1e9
    assert int8[encoding] == pytest.approx(4.762 + embedding + 16 * 0.0376, abs=0.01)
    assert plain["transformer"] == pytest.approx(2 * 2.47, abs=0.01)
    assert int8["transformer"] == pytest.approx(plain["transformer"] - size.linear, abs=0.02)
    assert max(number for text, number in int8.items() if "together" in text and number < 9) < 5.5
    assert [line for line in lines if " 8 GB" in line] == [
        "       8 GB  too small; try --quantize int8"
    ]
    assert any(" 8 GB  1 images per pass, 0% of the blocks" in line for line in lines_int8)
    for card, share, tflop in ((24, 100, 17609), (40, 50, 17161), (80, 0, 16546)):
        choice = f"{card} GB  24 images per pass, {share}% of the blocks recomputed, {tflop} TFLOP"
        assert any(choice in line for line in lines)

    # Two FLOPs per parameter and token: an image token meets 12 d^2 per block, with d = 1536, and
    # in 13 of the 24 blocks 4 d^2 more, a text token 12 d^2. Attention and the LoRA come on top.
    parameters = 1024 * (24 * 12 + 13 * 4) * 1536**2 + 205 * 24 * 12 * 1536**2
    products = 2 * parameters * 192 * 10 * 2 / 1e12  # images, steps, guidance
    assert products < plain["rollout"] < 1.25 * products


def test_the_plan_counts_the_passes_of_a_step():
    settings = parse(Settings, ["--micro_batch_size", "4"])  # groups of 24
    size = SimpleNamespace(reference=1.0, theta=2.0, backward={0: 3.0, 1: 5.0}, decode=0.5)

    def tflop(share=1, **changed):
        return plan.step_tflop(dataclasses.replace(settings, **changed), size, share)

    whole, K = tflop(), settings.train_timesteps
    # The reference, theta_old for the clip, theta for the gap of a group in parts, the backward.
    assert whole["train"] == pytest.approx(192 * K * (1 + 2 + 2 + 5))
    for m, U in ((8, 1), (12, 3), (24, 2)):
        fewer = tflop(train_samples=m, updates_per_rollout=U)
        assert fewer["train"] == pytest.approx(whole["train"] * U * m / 24)
        assert {**fewer, "train": 0} == {**whole, "train": 0}
    assert tflop(micro_batch_size="auto")["train"] == pytest.approx(192 * K * (1 + 2 + 5))
    assert tflop(share=0)["train"] == pytest.approx(192 * K * (1 + 2 + 2 + 3))
    assert tflop(bound=1.0) == whole  # it needs theta_old, which the clip has evaluated already
    free, bounded = (tflop(clip=0.0, bound=bound)["train"] for bound in (0.0, 1.0))
    assert bounded - free == pytest.approx(192 * K * 2.0)
    assert tflop(clip=0.0, ema_reference=True)["train"] == bounded
    guided = tflop(reference_guidance_scale=4.5)["train"]
    assert guided - whole["train"] == pytest.approx(192 * K * 1.0)
