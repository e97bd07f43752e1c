"""A training step, ours and a plain one, on the same transformer, batch and recipe; and in bf16.

    python tests/benchmark_step.py                            # SD3.5 Medium's geometry: for a GPU
    python tests/benchmark_step.py --model toy/out/shapes --resolution 16 --max_sequence_length 7

takes train_sd35.py's arguments. The plain step is the schedule of the authors' released trainer:
the whole group in one batch, the reference, the old policy and theta as three passes at every
timestep, and after each a look at the numbers, which waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_sd35 as t35  # noqa: E402

REPEATS = 5
TEXT = "a prompt"


def plain_group(trainer: t35.Trainer, step: int, p: int, x0: Tensor, advantages: Tensor) -> None:
    """As Trainer.backward_group, from the paper's formulas and autograd, without dgpo.py."""
    args, transformer = trainer.args, trainer.pipe.transformer
    order = torch.randperm(len(trainer.times), generator=t35.seeded(args.seed, t35.TIMES, step))
    G = len(x0)
    for k, index in enumerate(order[: args.train_timesteps]):
        t = trainer.times[index].item()
        eps = trainer.noise(t35.TRAINING_NOISE, step, p, k).to(x0.device)
        x_t = (1 - t) * x0 + t * eps
        theta = trainer.velocity(TEXT)
        guided = trainer.velocity(TEXT, args.reference_guidance_scale)
        times = torch.full((G,), t, device=x0.device)
        if args.ema_reference:
            reference = t35.with_values(trainer.parameters, trainer.old)
        else:
            reference = t35.without_lora(transformer)
        with torch.no_grad(), reference:
            v_ref = guided(x_t, times, times)
        with torch.no_grad(), t35.with_values(trainer.parameters, trainer.old):
            loss_old = (theta(x_t, times, times) - (eps - x0)).square().mean((1, 2, 3))
        v = theta(x_t, times, times)
        loss = (v - (eps - x0)).square().mean((1, 2, 3))
        loss_ref = (v_ref - (eps - x0)).square().mean((1, 2, 3))
        ratio = (loss_old - loss).exp().detach()
        if args.clip:
            far = torch.where(advantages > 0, ratio > 1 + args.clip, ratio < 1 - args.clip)
            seen = torch.where(far, loss.detach(), loss)
        else:
            seen = loss
        S = (advantages * (seen - loss_ref)).mean()
        eq17 = -F.logsigmoid(-args.beta * S) / args.beta
        penalty = (v - v_ref).square().mean()
        total = (eq17 + args.kl * penalty) / args.train_timesteps / args.prompts_per_step
        total.backward()
        _ = {
            "loss": total.item(),
            "gap": S.item(),
            "kl": penalty.item(),
            "ratio": ratio.mean().item(),
        }


def gradients(trainer: t35.Trainer, work: Callable[[], object]) -> list[Tensor]:
    for parameter in trainer.parameters:
        parameter.grad = None
    work()
    return [parameter.grad.float().clone() for parameter in trainer.parameters]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|, all parameters in one."""
    a, b = (torch.cat([x.flatten() for x in parts]) for parts in (a, b))
    return ((a - b).norm() / b.norm()).item()


def prepare(args: t35.Arguments) -> tuple[t35.Trainer, Tensor, Tensor]:
    """A trainer with a LoRA that does something, latents x0 (G, C, h, w) and advantages (G,)."""
    accelerator = t35.launch(args)
    torch.manual_seed(args.seed)
    if args.pretrained_model_name_or_path == t35.Arguments.pretrained_model_name_or_path:
        pipe = t35.random_pipeline(args)
        encoded = t35.Encoded(
            torch.randn(1, 77 + args.max_sequence_length, 4096), torch.randn(1, 2048)
        )
    else:
        pipe = t35.load_pipeline(args.pretrained_model_name_or_path, t35.precision(args))
        encoded = t35.Encoder(pipe, args, accelerator.device)([TEXT], {})[TEXT]
    trainer = t35.build(args, accelerator, pipe)
    trainer.encoded = {TEXT: encoded, "": encoded}
    if not args.micro_batch_size:
        t35.fit_micro_batch(trainer)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
        for old, parameter in zip(trainer.old, trainer.parameters, strict=True):
            old.copy_(parameter + 0.002 * torch.randn_like(parameter))
    side = args.resolution // pipe.vae_scale_factor
    x0 = torch.randn(args.group_size, pipe.transformer.config.in_channels, side, side)
    advantages = torch.randn(args.group_size)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return trainer, x0.to(trainer.device), advantages.to(trainer.device)


def main() -> None:
    args = t35.parse_args(["--benchmark", "1", *sys.argv[1:]])  # no folder is needed
    trainer, x0, advantages = prepare(args)

    def ours() -> dict[str, Tensor]:
        return trainer.backward_group(0, 0, TEXT, x0, advantages)

    def plain() -> None:
        plain_group(trainer, 0, 0, x0, advantages)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    found = distance(gradients(trainer, ours), gradients(trainer, plain))  # and both are warm now
    took = [(seconds(plain), seconds(ours)) for _ in range(REPEATS)]
    mean_plain, mean_ours = (sum(times) / REPEATS for times in zip(*took, strict=True))
    ratios = sorted(a / b for a, b in took)
    print(f"group of {args.group_size}, micro-batches of {args.micro_batch_size}, {args.recipe}")
    print(f"plain step {mean_plain:.3f} s, ours {mean_ours:.3f} s")
    print(f"plain / ours {ratios[REPEATS // 2]:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    print(f"difference of the gradients, of their norm: {found:.2e}")

    def work_in(autocast: Callable) -> Callable[[], dict[str, Tensor]]:
        # Entered anew at every pass, as the trainer does: it keeps what it has cast.
        accelerator = SimpleNamespace(device=trainer.device, autocast=autocast)
        other = dataclasses.replace(trainer, accelerator=accelerator)
        return lambda: other.backward_group(0, 0, TEXT, x0, advantages)

    in_half = work_in(lambda: torch.autocast(trainer.device.type, torch.bfloat16))
    metrics, half = in_half(), gradients(trainer, in_half)
    for m in sorted({1, 4, args.group_size}):
        args.micro_batch_size = m
        apart = distance(gradients(trainer, in_half), half)
        print(f"bf16, micro-batches of {m}: the gradient differs by {apart:.2e} of its norm")
    trainer.pipe.transformer.float()
    in_full = work_in(contextlib.nullcontext)
    exact, numbers = gradients(trainer, in_full), in_full()
    named = [n for n, p in trainer.pipe.transformer.named_parameters() if p.requires_grad]
    cosines = sorted(
        (F.cosine_similarity(a.flatten(), b.flatten(), 0).item(), name)
        for a, b, name in zip(half, exact, named, strict=True)
        if b.any()  # the last block's queries of the text lead nowhere
    )
    middle = cosines[len(cosines) // 2][0]
    print(
        f"bf16 against float32: cosine {middle:.5f} in the middle of {len(cosines)} LoRA tensors, "
        f"{cosines[0][0]:.5f} at worst ({cosines[0][1]})"
    )
    for name in ("gap", "gate"):
        a, b = (m[name].float().mean().item() for m in (metrics, numbers))
        print(f"{name}: {a:.6f} in bf16, {b:.6f} in float32")


if __name__ == "__main__":
    try:
        main()
    except t35.Fault as fault:
        print(f"benchmark_step.py: {fault}", file=sys.stderr)
        sys.exit(2)
    except t35.Stopped:
        sys.exit(130)
