"""What bench.py counts and measures, and the plain step that the trainer's is held against."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import shapes
import torch
from tiny_run import flags
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import cli
import train_sd35

ROOT = Path(__file__).parents[1]


def arguments(tiny, out, **changed):
    return train_sd35.parse_args(flags(tiny, out, **changed), bench.Arguments)


@pytest.mark.parametrize("micro_batch_size", [3, 8])
@pytest.mark.parametrize("recipe", ["guided", "cfg_free", "cfg_free_ema"])
def test_a_groups_gradient_is_that_of_the_formulas_and_autograd(
    tiny, tmp_path, recipe, micro_batch_size
):
    """With clip and KL, against a plain step that uses nothing of dgpo.py."""
    settings = {"recipe": recipe, "reward": "ocr", "clip": 1e-4, "kl": 0.02}
    settings["micro_batch_size"] = micro_batch_size
    trainer, x0, advantages = bench.prepare(arguments(tiny, tmp_path / "run", **settings))
    metrics = trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
    assert 0 < metrics["clipped"].mean() < 1 and (metrics["gate"] - 0.5).abs().min() > 1e-3
    ours = [parameter.grad.clone() for parameter in trainer.model.theta]
    plain = bench.gradients(trainer, lambda: bench.plain_group(trainer, 0, 0, x0, advantages))
    assert bench.distance(ours, plain) < 1e-4  # a beta of 2000 multiplies rounding


def test_a_compiled_transformer_gives_the_same_gradient_and_is_compiled_once(tiny, tmp_path):
    """The LoRA goes off and on, gradients too, and batches have two sizes: all in one step."""
    settings = {"group_size": 5, "micro_batch_size": 2}
    trainer, x0, advantages = bench.prepare(arguments(tiny, tmp_path / "run", **settings))

    def work():
        trainer.model.sample(bench.TEXT, x0.cpu(), 2, 4.5)
        return bench.gradients(
            trainer, lambda: trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
        )

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    plain, made = work(), []
    with bench.compiled(trainer, backend="eager"):
        for _ in range(3):
            before = graphs()
            found = work()
            made.append(graphs() - before)
    assert 8 < made[0] < 64 and made[1:] == [0, 0]
    assert bench.distance(found, plain) < 1e-6
    blocks = trainer.model.pipe.transformer.transformer_blocks
    assert all(block._compiled_call_impl is None for block in blocks)


class Looks(TorchDispatchMode):
    """Counts how often the host asks a tensor for a number: a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


def test_the_host_waits_only_to_check_a_groups_input(tiny, tmp_path):
    """A few times a call of dgpo.py, and never at each micro-batch: a GPU would stand still."""
    trainer, x0, advantages = bench.prepare(arguments(tiny, tmp_path / "run", train_timesteps=2))
    found = []
    for trainer.model.images_a_pass in (1, 4, 8):  # two, two and one call of dgpo.py
        with Looks() as looks:
            trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
        found.append(looks.count)
    assert found[0] == found[1] == 2 * found[2] and 0 < found[2] <= 8


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_step_prints_the_overhead_and_the_share_of_the_peak(
    tiny, tmp_path, capsys, monkeypatch, mixed_precision
):
    """The peak is that of the transformer's precision: 0.1 TFLOP/s in float32, 0.4 in bf16."""
    peaks = {torch.float32: 1e11, torch.bfloat16: 4e11}
    monkeypatch.setattr(bench, "peak", lambda device, dtype: peaks[dtype])
    # accelerate remembers the precision that an earlier test of this process has asked for.
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    settings = {"repeats": 1, "mixed_precision": mixed_precision}
    bench.step(arguments(tiny, tmp_path / "run", **settings))
    most, _, *rows, images = capsys.readouterr().out.splitlines()
    at_most = {"no": 0.1, "bf16": 0.4}[mixed_precision]
    assert most.endswith(f": at most {at_most} TFLOP/s")
    table = {
        name: list(map(float, row)) for name, *row in (r.replace("%", "").split() for r in rows)
    }
    assert list(table) == ["rollout", "decode", "train", "step"]
    for ours, bare, overhead, tflop, mfu in table.values():
        rounding = 0.0006 * (1 / ours + 1 / bare)  # seconds have three decimals
        assert 1 + overhead / 100 == pytest.approx(ours / bare, rel=rounding, abs=0.001)
        assert mfu > 0
        assert mfu == pytest.approx(100 * tflop / ours / at_most, rel=rounding + 0.01, abs=0.06)
    for column in (1, 3):
        *phases, whole = (row[column] for row in table.values())
        assert whole == pytest.approx(sum(phases), rel=0.01, abs=0.002)
    assert float(images.split()[0]) == pytest.approx(12 / table["step"][0], rel=0.05)


def test_without_a_model_weights_are_random_and_nothing_is_fetched(tmp_path, capsys, monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 128}
    monkeypatch.setattr(bench, "MEDIUM", {**bench.MEDIUM, **small, "dual_attention_layers": [0]})
    monkeypatch.setattr(bench, "VAE", {**bench.VAE, "block_out_channels": [32] * 4})
    pickscore = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(
        bench, "PICKSCORE", {**bench.PICKSCORE, **pickscore, "num_attention_heads": 2}
    )
    line = flags(None, tmp_path, model=None, train_prompts=None, reward="pickscore", resolution=32)
    bench.step(train_sd35.parse_args([*line, "--repeats", "1"], bench.Arguments))
    rows = [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:7]]
    assert rows == ["rollout", "decode", "train", "reward", "step"]


def test_plain_and_changes_print_what_they_compare(tiny, tmp_path, capsys, monkeypatch):
    args = arguments(tiny, tmp_path / "run", repeats=1)
    bench.plain(args)
    *_, ours, half = capsys.readouterr().out.splitlines()
    assert "difference of the gradients" in ours and "in bf16 from that in float32" in half
    assert float(ours.split()[-1]) < 1e-4 < float(half.split()[-1]) < 0.5
    quick = [name for name in bench.CHANGES if name.startswith(("twice", "attention: math"))]
    monkeypatch.setattr(bench, "CHANGES", {name: bench.CHANGES[name] for name in quick})
    bench.changes(args)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [(row[0].strip(), row[1].strip()) for row in rows[2:]] == [
        ("attention: math", "rollout"),
        ("attention: math", "train"),
        ("twice the images in a pass", "rollout"),
        ("twice the images in a pass", "train"),
    ]
    for *_, fast, moved, first in rows[2:]:
        low, high = map(float, fast.split("[")[1].strip(" ]").split(","))
        assert 0 < low <= float(fast.split()[0]) <= high
        assert float(moved) < 1e-5 and float(first) >= 0


def test_a_kernel_that_is_not_here_is_told_and_the_others_go_on(
    tiny, tmp_path, capsys, monkeypatch
):
    names = ("attention: cudnn_attention", "twice the images in a pass")
    monkeypatch.setattr(bench, "CHANGES", {name: bench.CHANGES[name] for name in names})
    bench.changes(arguments(tiny, tmp_path / "run", repeats=1))
    *_, rollout, train, other, last = capsys.readouterr().out.splitlines()
    for row in (rollout, train):
        assert row.startswith("| attention: cudnn_attention") and row.endswith("| - | - |")
    assert other.startswith("| twice the images in a pass | rollout |") and not other.endswith(
        "- |"
    )
    assert last.startswith("| twice the images in a pass | train |")


@pytest.mark.parametrize("more", [{"clip": 1e-3}, {"clip": 0, "bound": 0.5, "train_samples": 2}])
def test_the_bare_passes_are_a_groups_phases(tiny, tmp_path, monkeypatch, more):
    """In parts: reference, theta_old, theta for the gap, theta. At once: one pass of theta less."""
    args = arguments(tiny, tmp_path / "run", micro_batch_size=2, **more)
    trainer, *group = bench.prepare(args)
    group = [x[: args.train_samples] for x in group]
    images, forward = [], trainer.model.pipe.transformer.forward
    monkeypatch.setattr(
        trainer.model.pipe.transformer,
        "forward",
        lambda *a, **k: images.append(len(a[0] if a else k["hidden_states"])) or forward(*a, **k),
    )

    def asked(work):
        images.clear()
        work()
        return sorted(images)

    passes = bench.bare_passes(trainer, bench.TEXT)
    assert list(passes) == ["rollout", "decode", "train"]
    assert asked(passes["rollout"]) == asked(lambda: trainer.rollout(0, 0, bench.TEXT))
    ours = asked(lambda: trainer.backward_group(0, 0, bench.TEXT, *group))
    assert asked(passes["train"]) == ours and len(ours) == (6 if args.train_samples else 16)
    assert passes["decode"]().shape == (args.group_size, 3, shapes.SIDE, shapes.SIDE)


def test_tflop_counts_products_and_convolutions_and_their_backward_pass():
    layer, x = torch.nn.Linear(30, 20, bias=False), torch.randn(10, 30, requires_grad=True)
    forward = bench.tflop(lambda: layer(x))
    assert forward == pytest.approx(2 * 10 * 30 * 20 / 1e12)
    assert bench.tflop(lambda: layer(x).sum().backward()) == pytest.approx(3 * forward)
    picture, kernel = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 3, 3)
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (5, 7, 7))
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = bench.tflop(lambda: attend(q, k, v))
    assert forward == pytest.approx(2 * 2 * 2 * 5 * 7 * 16 / 1e12)  # scores and their values
    # The backward pass computes the scores again, and has two products for each of the forward's.
    assert bench.tflop(lambda: attend(q, k, v).sum().backward()) == pytest.approx(3.5 * forward)
    convolution = bench.tflop(lambda: torch.nn.functional.conv2d(picture, kernel, padding=1))
    assert convolution == pytest.approx(2 * 5 * 8 * 8 * 3 * 3 * 3 / 1e12)


def test_the_peak_is_that_of_the_fastest_product_after_the_first(monkeypatch):
    took = iter([0.1, 4.0, 2.0, 3.0, 5.0, 4.0])
    monkeypatch.setattr(bench, "seconds", lambda device, work: next(took))
    assert bench.peak(torch.device("cpu"), torch.float32) == 2 * 2048**3 / 2.0


def test_the_plan_counts_the_real_geometry(capsys):
    bench.plan(train_sd35.parse_args([], bench.Arguments))
    lines = capsys.readouterr().out.splitlines()
    assert "transformer, 2.47 G weights" in lines[1] and "LoRA, 37.6 M" in lines[2]
    for row in lines[7:9]:
        one, two, *_, last = map(float, row[27:].split())
        assert last - one == pytest.approx(47 * (two - one), rel=0.1, abs=0.5)
    one, two, four, *more = map(float, lines[9][27:].split())  # decoding has passes of its own
    assert four - one == pytest.approx(3 * (two - one), abs=0.02) and {*more} == {four}
    flop = {line.split()[1].strip(","): float(line.split()[0]) for line in lines[-7:-2]}
    # Two FLOPs a parameter and token: an image token meets 12 d^2 a block, of d = 1536, and in 13
    # of the 24 blocks 4 d^2 more, one of the text 12 d^2. Attention and the LoRA come on top.
    parameters = 1024 * (24 * 12 + 13 * 4) * 1536**2 + 205 * 24 * 12 * 1536**2
    products = 2 * parameters * 192 * 10 * 2 / 1e12  # images, steps, guidance
    assert products < flop["rollout"] < 1.25 * products
    assert flop["together"] == pytest.approx(sum(list(flop.values())[:4]), abs=2)


def test_the_plan_has_room_for_one_encoder_beside_what_stays(capsys):
    """On 16 GB: T5-XXL's 4.76 G parameters, and of the LoRA's 24 bytes a parameter 16 stay."""
    bench.plan(train_sd35.parse_args([], bench.Arguments))
    printed = capsys.readouterr().out
    lines = {line[10:]: float(line[:8]) for line in printed.splitlines()[1:6]}
    (t5,) = (found for name, found in lines.items() if name.startswith("T5"))
    (encoding,) = (found for name, found in lines.items() if "while prompts are encoded" in name)
    assert t5 == pytest.approx(2 * 4.762, abs=0.01)
    assert encoding == pytest.approx(t5 + 16 * 0.0376, abs=0.01)
    assert encoding < 0.9 * 16 - bench.REWARD_GB
    rows = {int(line.split()[0]): line for line in printed.splitlines() if " GB  " in line}
    assert "no room" not in printed and list(rows) == [16, 24, 40, 80]
    most = [int(line.split("GB")[1].split(",")[0]) for line in rows.values()]
    assert most == sorted(most) and most[0] >= 1


def test_the_plan_counts_what_training_on_fewer_samples_saves():
    args = train_sd35.parse_args([], bench.Arguments)  # groups of 24, in passes of 4
    size = SimpleNamespace(reference=1.0, theta=2.0, backward=5.0, decode=0.5, reward=0.1)

    def tflop(**changed):
        return bench.step_tflop(dataclasses.replace(args, **changed), size)

    whole = tflop()
    K = args.train_timesteps
    # The reference, theta_old for the clip, theta for the gap of a group in parts, the backward.
    assert whole["train"] == pytest.approx(192 * K * (1 + 2 + 2 + 5))
    for m, U in ((8, 1), (12, 3), (24, 2)):
        found = tflop(train_samples=m, updates_per_rollout=U)
        assert found["train"] == pytest.approx(whole["train"] * U * m / 24)
        assert {**found, "train": 0} == {**whole, "train": 0}
    # All m in one pass: theta need not be asked for the gap.
    at_once = tflop(train_samples=4)["train"]
    assert at_once == pytest.approx(192 * K * (1 + 2 + 5) * 4 / 24)
    # The bound asks theta_old, which the clip has asked already.
    assert tflop(bound=1.0) == whole
    free, bounded = (tflop(clip=0.0, bound=bound)["train"] for bound in (0.0, 1.0))
    assert bounded - free == pytest.approx(192 * K * 2.0)
    assert tflop(clip=0.0, ema_reference=True)["train"] == bounded  # as it is the reference


def test_a_bad_argument_is_answered_before_a_library_is_loaded(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    for line in (
        "bench.py plan --repeats 0",
        "bench.py step --hub_model_id a/b",
        "train_sd35.py --micro_batch_size 0",
        "toy/compare.py --seed -1",
        "toy/compare.py --full --methods DGPO",
        "toy/compare_sd35.py --worlds x",
    ):
        ended = subprocess.run(
            [sys.executable, *line.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2 and line.split()[-2] in ended.stderr, line
        assert ended.stderr.count("\n") == 1 and "torch is imported" not in ended.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan --print_arguments", "--print_arguments: goes with train_sd35.py"),
        ("plain --bound 2", "--bound: the plain step knows none; leave it out"),
    ],
)
def test_what_a_command_does_not_know_is_refused(line, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", *line.split()])
    with pytest.raises(cli.Fault, match=said):
        bench.main()


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "fly"])
    with pytest.raises(SystemExit) as end:
        cli.run("bench.py", bench.main)
    assert end.value.code == 2
    error = "bench.py: the command must be plan, step, plain, changes, got 'fly'\n"
    assert capsys.readouterr().err == error
