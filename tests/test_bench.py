"""What sd35.bench measures, and the plain step that the trainer's is compared with."""

from collections import Counter
from functools import partial

import pytest
import tiny_run
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from sd35 import bench, plan
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
    monkeypatch.setattr(plan, "MEDIUM", {**plan.MEDIUM, **small, "dual_attention_layers": [0]})
    monkeypatch.setattr(plan, "VAE", {**plan.VAE, "block_out_channels": [32] * 4})
    monkeypatch.setattr(bench, "REPEATS", 1)
    line = tiny_run.flags(None, tmp_path, model=None, train_prompts=None, reward="pickscore")
    settings = parse(Settings, [*line, "--resolution", "32"])
    bench.step(settings)
    rows = {row.split()[1].strip(","): row.split() for row in capsys.readouterr().out.splitlines()}
    work = plan.step_tflop(settings, plan.count_sizes(settings), 0)
    for phase in ("rollout", "decode", "train"):
        took, _, rate, unit = rows[f"seconds/{phase}"]
        assert unit == "TFLOP/s" and float(rate) == pytest.approx(
            work[phase] / float(took), abs=0.1
        )
    whole, bare, ratio = (float(rows[name][0]) for name in ("seconds", "seconds/bare", "times"))
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


def test_an_unknown_command_prints_the_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "fly"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "python -m sd35.bench plan " in capsys.readouterr().out
