"""What bench.py counts and measures, and the plain step that the trainer's is held against."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import shapes
import torch
from test_train_sd35 import flags

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
    assert 0 < metrics["clipped"].mean() < 1 and abs(metrics["gate"].mean() - 0.5) > 1e-3
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

    plain, made = work(), []
    with bench.compiled(trainer, backend="eager"):
        for _ in range(3):
            before = bench.graphs()
            found = work()
            made.append(bench.graphs() - before)
    assert 8 < made[0] < 64 and made[1:] == [0, 0]
    assert bench.distance(found, plain) < 1e-6


def test_the_host_waits_only_to_check_a_groups_input(tiny, tmp_path):
    """A few times a call of dgpo.py, and never at each micro-batch: a GPU would stand still."""
    trainer, x0, advantages = bench.prepare(arguments(tiny, tmp_path / "run", train_timesteps=2))
    found = []
    for trainer.model.images_a_pass in (1, 4, 8):  # two, two and one call of dgpo.py
        account = bench.Account({torch.float32: 1.0}, 1.0)
        with account("train"):
            trainer.backward_group(0, 0, bench.TEXT, x0, advantages)
        found.append(account.phases["train"]["looks"])
    assert found[0] == found[1] == 2 * found[2] and 0 < found[2] <= 8


def test_the_step_prints_the_overhead(tiny, tmp_path, capsys):
    bench.step(arguments(tiny, tmp_path / "run", repeats=1))
    printed = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in printed[2:6]}
    assert list(table) == ["rollout", "decode", "train", "step"]
    for ours, bare, overhead, *_, mfu in table.values():
        assert float(overhead[:-1]) == pytest.approx(100 * (float(ours) / float(bare) - 1), abs=20)
        assert 0 < float(mfu[:-1]) < 100


def test_without_a_model_weights_are_random_and_nothing_is_fetched(tmp_path, capsys, monkeypatch):
    small = {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 128}
    monkeypatch.setattr(bench, "MEDIUM", {**bench.MEDIUM, **small, "dual_attention_layers": [0]})
    monkeypatch.setattr(bench, "VAE", {**bench.VAE, "block_out_channels": [32] * 4})
    eye = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(bench, "EYE", {**bench.EYE, **eye, "num_attention_heads": 2})
    line = flags(None, tmp_path, model=None, train_prompts=None, reward="pickscore", resolution=32)
    bench.step(train_sd35.parse_args([*line, "--repeats", "1"], bench.Arguments))
    rows = [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:7]]
    assert rows == ["rollout", "decode", "reward", "train", "step"]


def test_plain_and_changes_print_what_they_compare(tiny, tmp_path, capsys, monkeypatch):
    args = arguments(tiny, tmp_path / "run", repeats=1)
    bench.plain(args)
    printed = capsys.readouterr().out
    assert "difference of the gradients" in printed and "bf16 against float32" in printed
    difference = printed.split("of their norm: ")[1].split()[0]
    assert float(difference) < 1e-4
    assert "gate" in printed.splitlines()[-1]
    quick = [change for change in bench.CHANGES if change[0].startswith(("twice", "VAE ch"))]
    monkeypatch.setattr(bench, "CHANGES", quick)
    bench.changes(args)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [(row[0].strip(), row[1].strip()) for row in rows[2:]] == [
        ("twice the images in a pass", "rollout"),
        ("twice the images in a pass", "train"),
        ("VAE channels-last", "decode"),
    ]
    assert all(float(row[4]) < 1e-5 for row in rows[2:])


def test_the_bare_passes_are_a_groups_phases(tiny, tmp_path):
    trainer, x0, _ = bench.prepare(arguments(tiny, tmp_path / "run"))
    seen, clock = [], train_sd35.Clock(trainer.device)
    reward = lambda images, prompts: seen.append(tuple(images.shape))  # noqa: E731
    bench.bare_passes(trainer, bench.TEXT, reward, clock)
    assert list(clock.seconds) == ["rollout", "decode", "reward", "train"]
    assert seen == [(len(x0), 3, shapes.SIDE, shapes.SIDE)]


def test_the_account_counts_flops_and_bytes():
    peaks = {torch.float32: 1e6, torch.bfloat16: 4e6}
    account = bench.Account(peaks, bandwidth=1e6)
    layer, x = torch.nn.Linear(30, 20, bias=False), torch.randn(10, 30, requires_grad=True)
    with account("forward"):
        y = layer(x)
    with account("backward"):
        y.sum().backward()
    forward, backward = account.phases["forward"], account.phases["backward"]
    assert forward["flops"] == 2 * 10 * 30 * 20 and backward["flops"] == 2 * forward["flops"]
    assert forward["bytes"] == 4 * (10 * 30 + 30 * 20 + 10 * 20)
    assert forward["seconds"] == pytest.approx(max(0.012, 0.0044)) == forward["products"]
    assert backward["others"] > 0
    q, k = torch.randn(1, 2, 7, 16, requires_grad=True), torch.randn(1, 2, 5, 16)
    with account("attention"):
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert account.phases["attention"]["flops"] == 2 * (2 * 2 * 7 * 5 * 16)
    with account("half"):
        layer.bfloat16()(x.bfloat16())
    assert account.phases["half"]["busy"] == forward["busy"] / 4 == 12000 / 4e6


def test_importing_bench_leaves_torchs_registry_as_it_is():
    code = (
        "from torch.utils.flop_counter import flop_registry as r; before = set(r); import bench; "
        "assert set(r) == before and set(bench.FLOPS) > before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_plan_counts_the_real_geometry(capsys):
    bench.plan(train_sd35.parse_args([], bench.Arguments))
    lines = capsys.readouterr().out.splitlines()
    assert "transformer, 2.24 G parameters" in lines[1] and "LoRA, 37.6 M" in lines[2]
    for row in lines[7:10]:
        one, two, *_, last = map(float, row[27:].split())
        assert last - one == pytest.approx(47 * (two - one), rel=0.1, abs=0.5)
    flop = {line.split()[1].strip(","): float(line.split()[0]) for line in lines[-6:-1]}
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
    size = SimpleNamespace(reference=1.0, theta=2.0, backward=5.0, decode=0.5, eye=0.1)
    whole = bench.step_tflop(args, size)
    K = args.train_timesteps
    # The reference, theta_old for the clip, theta for the gap of a group in parts, the backward.
    assert whole["train"] == pytest.approx(192 * K * (1 + 2 + 2 + 5))
    for m, U in ((8, 1), (12, 3), (24, 2)):
        found = bench.step_tflop(args, size, train_samples=m, updates_per_rollout=U)
        assert found["train"] == pytest.approx(whole["train"] * U * m / 24)
        assert {**found, "train": 0} == {**whole, "train": 0}
    # All m in one pass: theta need not be asked for the gap.
    at_once = bench.step_tflop(args, size, train_samples=4)["train"]
    assert at_once == pytest.approx(192 * K * (1 + 2 + 5) * 4 / 24)
    # The bound asks theta_old, which the clip has asked already.
    assert bench.step_tflop(args, size, bound=1.0) == whole
    args.clip = 0.0
    free, bounded = (bench.step_tflop(args, size, bound=bound)["train"] for bound in (0.0, 1.0))
    assert bounded - free == pytest.approx(192 * K * 2.0)


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "fly"])
    with pytest.raises(SystemExit) as end:
        cli.run("bench.py", bench.main)
    assert end.value.code == 2
    error = "bench.py: the command must be plan, step, plain, changes, got 'fly'\n"
    assert capsys.readouterr().err == error
