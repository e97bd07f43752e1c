"""What sd35.bench counts and measures, and the plain step that the trainer's is compared with."""

import dataclasses
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_run
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from sd35 import bench
from sd35.settings import Settings, parse


def group(tiny, tmp_path, **changed):
    """A trainer on the tiny pipeline, and one group's latents and advantages."""
    return bench.prepare(tiny_run.settings(tiny, tmp_path / "run", **changed))


def gradient(trainer, x0, advantages):
    inputs = (0, 0, 0, bench.TEXT, x0, advantages)
    return bench.gradients(trainer, lambda: trainer.backward_group(*inputs))


@pytest.mark.parametrize("micro_batch_size", [3, 8])
@pytest.mark.parametrize("recipe", ["guided", "cfg_free", "cfg_free_ema"])
def test_a_groups_gradient_is_that_of_autograd(tiny, tmp_path, recipe, micro_batch_size):
    """With clip and KL, against Eq. 17 back-propagated through the whole group at once."""
    changed = {"recipe": recipe, "clip": 1e-4, "kl": 0.02, "reward": "ocr"}
    trainer, *tensors = group(tiny, tmp_path, micro_batch_size=micro_batch_size, **changed)
    metrics = trainer.backward_group(0, 0, 0, bench.TEXT, *tensors)
    assert 0 < metrics["clipped"].mean() < 1 and (metrics["gate"] - 0.5).abs().min() > 1e-3
    ours = gradient(trainer, *tensors)
    with bench.PLAIN["a plain step"](trainer):
        plain = gradient(trainer, *tensors)
    assert bench.distance(ours, plain) < 1e-4  # a beta of 2000 multiplies rounding


def test_blocks_are_compiled_inside_the_context_only(tiny, tmp_path):
    """Even if the work fails."""
    trainer, *_ = group(tiny, tmp_path)
    blocks = trainer.model.pipe.transformer.transformer_blocks
    with pytest.raises(RuntimeError), bench.compiled(trainer):
        assert all(block._compiled_call_impl for block in blocks)
        raise RuntimeError
    assert not any(block._compiled_call_impl for block in blocks)


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number from a tensor, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


def test_the_host_waits_a_few_times_per_group_and_not_per_micro_batch(tiny, tmp_path):
    trainer, *tensors = group(tiny, tmp_path, train_timesteps=2)
    counts = []
    for trainer.model.images_per_pass in (1, 4, 8):  # two, two and one call for the two timesteps
        with Reads() as reads:
            trainer.backward_group(0, 0, 0, bench.TEXT, *tensors)
        counts.append(reads.count)
    assert counts[0] == counts[1] == 2 * counts[2] and 0 < counts[2] <= 8


def test_without_a_model_the_weights_are_random_and_steps_are_timed(tmp_path, capsys, monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 128}
    monkeypatch.setattr(bench, "MEDIUM", {**bench.MEDIUM, **small, "dual_attention_layers": [0]})
    monkeypatch.setattr(bench, "VAE", {**bench.VAE, "block_out_channels": [32] * 4})
    monkeypatch.setattr(bench, "REPEATS", 2)
    line = tiny_run.flags(None, tmp_path, model=None, train_prompts=None, reward="pickscore")
    settings = parse(Settings, [*line, "--resolution", "32"])
    bench.step(settings)
    rows = {row.split()[1].strip(","): row.split() for row in capsys.readouterr().out.splitlines()}
    work = bench.step_tflop(settings, bench.count_sizes(settings), 0)
    for phase in ("rollout", "decode", "train"):
        took, _, rate, unit = rows[f"seconds/{phase}"]
        assert unit == "TFLOP/s" and float(rate) == pytest.approx(
            work[phase] / float(took), abs=0.1
        )
    phases = sum(float(rows[f"seconds/{name}"][0]) for name in ("rollout", "decode", "train"))
    whole, images = (float(rows[name][0]) for name in ("seconds", "images_per_second"))
    assert phases <= whole + 0.002 and images == pytest.approx(12 / whole, rel=0.2)
    bare, ratio = float(rows["seconds/bare"][0]), float(rows["times"][0])
    assert ratio == pytest.approx(whole / bare, rel=0.2)


@pytest.mark.parametrize("changed", [{"micro_batch_size": 3}, {"offline": True, "clip": 0}])
def test_the_bare_passes_are_those_of_the_step_and_nothing_else(
    changed, tiny, tmp_path, monkeypatch
):
    trainer, *_ = group(tiny, tmp_path, **changed)
    pipe, passes, backward = trainer.model.pipe, Counter(), torch.Tensor.backward
    lora = next(m for m in pipe.transformer.modules() if isinstance(m, LoraLayer))

    def note(network, args, kwargs):
        first = (*args, *kwargs.values())[0]
        passes[network, lora.disable_adapters, torch.is_grad_enabled(), first.shape] += 1

    def note_backward(loss):
        passes["backward"] += 1
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", note_backward)
    for network in (pipe.transformer, pipe.vae.decoder):
        network.register_forward_pre_hook(note, with_kwargs=True)
    step = partial(trainer.take_step, [{"prompt": bench.TEXT}] * 3, 0)
    replay, in_the_step = bench.bare_passes(trainer.model, step), dict(passes)
    passes.clear()
    replay()
    assert passes == in_the_step and len(passes) > 4


def test_a_comparison_prints_a_row_per_change_and_phase(tiny, tmp_path, capsys, monkeypatch):
    """A kernel that this machine does not have is reported, and the next one follows."""
    monkeypatch.setattr(bench, "REPEATS", 1)
    chosen = {**bench.PLAIN, **{k: bench.CHANGES[k] for k in ("CUDNN_ATTENTION", "MATH")}}
    bench.compare(chosen, tiny_run.settings(tiny, tmp_path / "run"))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    phases = ("rollout", "train")
    assert [row[:2] for row in rows] == [[name, phase] for phase in phases for name in chosen]
    moved = {(name, phase): moved for name, phase, _, moved, _ in rows}
    assert moved["CUDNN_ATTENTION", "train"] == "-" and float(moved["MATH", "train"]) < 1e-5
    assert float(moved["a plain step", "train"]) < 1e-4 < float(moved["bf16", "train"]) < 0.5
    assert float(moved["a plain step", "rollout"]) == 0


def test_tflop_counts_products_and_convolutions_and_their_backward_pass():
    layer, x = torch.nn.Linear(30, 20, bias=False), torch.randn(10, 30, requires_grad=True)
    assert bench.tflop(lambda: layer(x)) == pytest.approx(2 * 10 * 30 * 20 / 1e12)
    assert bench.tflop(lambda: layer(x).sum().backward()) == pytest.approx(6 * 10 * 30 * 20 / 1e12)
    image, kernel = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 3, 3)
    convolution = bench.tflop(lambda: torch.nn.functional.conv2d(image, kernel, padding=1))
    assert convolution == pytest.approx(2 * 5 * 8 * 8 * 3 * 3 * 3 / 1e12)


def test_the_plan_counts_the_real_geometry(capsys, monkeypatch):
    size = bench.count_sizes(parse(Settings, []))
    monkeypatch.setattr(bench, "count_sizes", lambda settings: size)

    def plan(*flags):
        bench.plan(parse(Settings, list(flags)))
        lines = capsys.readouterr().out.splitlines()
        numbers = [line.split(maxsplit=1) for line in lines if line.startswith("   ")]
        return {text.strip(): float(number) for number, text in numbers}, lines

    plain, lines = plan()
    int8, lines_int8 = plan("--quantize", "int8")
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
        return bench.step_tflop(dataclasses.replace(settings, **changed), size, share)

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


def test_an_unknown_command_prints_the_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "fly"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "python -m sd35.bench plan " in capsys.readouterr().out
