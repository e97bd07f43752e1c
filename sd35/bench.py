"""What a step takes (memory, FLOPs, seconds), and what would make it faster.

    python -m sd35.bench plan       memory and FLOPs of SD3.5 Medium at these settings, counted
    python -m sd35.bench step       seconds of a step by phase, TFLOP/s, and of its bare passes
    python -m sd35.bench plain      a step against a plain one, and against itself in bf16
    python -m sd35.bench changes    what would make a step faster, and how far it moves the result

Each takes train_sd35.py's settings. Without --model, the weights are random, and step, plain and
changes need a GPU. On a CPU, give them --model tiny_sd35/out/shapes --resolution 16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dgpo
from sd35.encoder import Encoded
from sd35.lora import compile_blocks, int8_config
from sd35.model import TIMES, TRAINING_NOISE, Model, load_pipeline, seeded
from sd35.plan import DEFAULT, count_sizes, plan, random_pipeline, step_tflop
from sd35.run import Clock, fit_micro_batch, run_script
from sd35.settings import Settings, parse
from train_sd35 import Trainer, make_accelerator

REPEATS = 5  # how often work is timed
TEXT = "a prompt"


def prepare(settings: Settings) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer with a LoRA that has an effect, latents x0 (m, C, h, w) and advantages (m,)."""
    accelerator = make_accelerator(settings)
    device, name = accelerator.device, settings.pretrained_model_name_or_path
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    torch.manual_seed(settings.seed)
    pipe = random_pipeline(dtype, device) if name == DEFAULT else load_pipeline(name, dtype)
    if settings.quantize == "int8":
        from torchao.quantization import quantize_

        quantize_(pipe.transformer, int8_config())
    settings = replace(settings, reward=["compressibility"], eval_reward=[])  # without weights
    trainer = Trainer(settings, accelerator, pipe)

    model, config = trainer.model, pipe.transformer.config
    tokens = 1, 77 + settings.max_sequence_length, config.joint_attention_dim
    shapes = tokens, (1, config.pooled_projection_dim)
    model.encoded = {text: Encoded(*map(torch.randn, shapes)) for text in ("", TEXT)}
    with torch.no_grad():
        for theta, old in zip(model.theta, model.old, strict=True):
            theta.add_(0.02 * torch.randn_like(theta))
            old.copy_(theta + 0.002 * torch.randn_like(theta))
    images = model.images_per_pass or fit_micro_batch(model, settings)
    print(f"at most {images} images in one pass")
    advantages = torch.linspace(-1.7, 1.7, settings.train_samples or settings.group_size)
    x0 = torch.randn(len(advantages), *model.latent_shape)
    return trainer, x0.to(device), advantages.to(device)


def gradients(trainer: Trainer, work: Callable[[], object]) -> list[Tensor]:
    trainer.optimizer.zero_grad()
    work()
    return [parameter.grad.float().clone() for parameter in trainer.model.theta]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|, over all tensors together."""
    a, b = (torch.cat([x.flatten() for x in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    clock = Clock(device)
    with clock("work"):
        work()
    return clock.seconds["work"]


def bare_passes(model: Model, work: Callable[[], object]) -> Callable[[], None]:
    """Call work(), and return a function that replays only its transformer and decoder passes."""
    transformer, decoder, calls, inputs = model.pipe.transformer, model.pipe.vae.decoder, [], {}

    def note(network: nn.Module, args: tuple, kwargs: dict) -> None:
        lora = next(layer for layer in transformer.modules() if isinstance(layer, LoraLayer))
        by_reference = network is transformer and lora.disable_adapters
        shapes = str([x.shape for x in (*args, *kwargs.values()) if torch.is_tensor(x)])
        calls.append((network, by_reference, torch.is_grad_enabled(), shapes))
        inputs[calls[-1]] = args, kwargs  # one input per kind of call, as all would fill the memory

    hooks = [x.register_forward_pre_hook(note, with_kwargs=True) for x in (transformer, decoder)]
    work()
    for hook in hooks:
        hook.remove()

    def replay() -> None:
        for by_reference, context in (False, nullcontext), (True, model.reference):
            with context():
                for call in [call for call in calls if call[1] is by_reference]:
                    network, _, with_grad, _ = call
                    autocast = model.autocast if network is transformer else nullcontext
                    args, kwargs = inputs[call]
                    with torch.set_grad_enabled(with_grad), autocast():
                        output = network(*args, **kwargs)
                    if with_grad:
                        output[0].float().mean().backward()

    return replay


def step(settings: Settings) -> None:
    """Time steps with a random reward, and their passes. TFLOP/s are the plan's, over all GPUs."""
    trainer, *_ = prepare(settings)
    trainer.rewards = {"random": (1.0, lambda images, prompts: torch.rand(len(images)))}
    chosen, rows = [{"prompt": TEXT}] * settings.prompts_per_step, []
    replay = bare_passes(trainer.model, partial(trainer.take_step, chosen, 0))
    replay()  # to warm up, like the first step
    for i in range(1, REPEATS + 1):
        rows.append(trainer.take_step(chosen, i))
        rows[-1]["seconds/bare network passes"] = seconds(trainer.device, replay)
    is_medium = settings.pretrained_model_name_or_path == DEFAULT
    share = settings.gradient_checkpointing is not False  # TFLOP/s are too high if auto chose less
    work = step_tflop(settings, count_sizes(settings), share) if is_medium else {}
    for name in rows[0]:
        if "second" in name or name == "peak_memory_gb":
            median = np.median([row[name] for row in rows])
            count = work.get(name.removeprefix("seconds/"))
            print(f"{median:10.3f} {name}" + (f", {count / median:.1f} TFLOP/s" if count else ""))
    ratios = [row["seconds"] / row["seconds/bare network passes"] for row in rows]
    least, median, most = np.quantile(ratios, [0, 0.5, 1])
    print(f"{median:10.3f} times the bare passes, {least:.3f} to {most:.3f}")


def plain_group(
    trainer: Trainer, step: int, update: int, p: int, text: str, x0: Tensor, advantages: Tensor
) -> None:
    """Trainer.backward_group by dgpo.py's formulas and autograd alone, without --bound.

    As in the released trainer, the whole group is one batch, with three passes at every timestep,
    and after each timestep the numbers are read, which waits for the device.
    """
    settings, model, K = trainer.settings, trainer.model, trainer.settings.train_timesteps
    generator = seeded(settings.seed, TIMES, step)
    x0, A = x0[None], advantages[None]  # (1, G, ...)
    for k, index in enumerate(torch.randperm(len(trainer.times), generator=generator)[:K]):
        t = trainer.times[index].to(x0.device).expand(1, 1)
        eps = trainer.noise(TRAINING_NOISE, step, p, k).to(x0.device)[None, None]
        inputs = dgpo.diffuse(x0, eps, t)[0], t.expand(1, x0.shape[1])[0], None
        theta, guided = (model.velocity(text, w) for w in (1, settings.reference_guidance_scale))
        with torch.no_grad(), model.reference():
            v_ref = guided(*inputs)[None]
        with torch.no_grad(), model.theta_old():
            v_old = theta(*inputs)[None]
        v = theta(*inputs)[None]
        loss, loss_ref, loss_old = (dgpo.dsm_loss(u, x0, eps) for u in (v, v_ref, v_old))
        if settings.clip:
            dropped = dgpo.clip_mask(loss.detach(), loss_old, A, settings.clip)
            loss = torch.where(dropped, loss.detach(), loss)
        goal = loss_old if settings.ema_reference else loss_ref
        eq17 = dgpo.dgpo_loss(loss, goal, A, settings.beta / x0.shape[1]) / settings.beta
        kl = dgpo.mean_square(v, v_ref).mean()
        ((eq17 + settings.kl * kl) / K / settings.prompts_per_step).backward()
        _ = [number.item() for number in (eq17, kl)]


@contextmanager
def compiled(trainer: Trainer) -> Iterator[None]:
    transformer = trainer.model.pipe.transformer
    compile_blocks(transformer)
    try:
        yield
    finally:
        for block in transformer.transformer_blocks:
            block._compiled_call_impl = None


PLAIN = {
    "a plain step": lambda t: patch.object(t, "backward_group", partial(plain_group, t)),
    "bf16": lambda t: patch.object(
        t.model, "autocast", partial(torch.autocast, t.device.type, torch.bfloat16)
    ),
}
KERNELS = "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"
CHANGES = {
    "torch.compile of the blocks": compiled,
    **{k: lambda _, k=k: sdpa_kernel(getattr(SDPBackend, k)) for k in KERNELS},
}


def compare(changes: dict[str, Callable], settings: Settings) -> None:
    """Time each phase of a group without and with each change, and compare the results by norm."""
    trainer, *group = prepare(settings)
    phases = {
        "rollout": lambda: [trainer.rollout(0, 0, TEXT).float()],
        "train": partial(gradients, trainer, lambda: trainer.backward_group(0, 0, 0, TEXT, *group)),
    }

    print("| change | phase | speed-up | relative change in result | seconds of first call |")
    print("|---" * 5 + "|")
    for (name, work), (title, change) in product(phases.items(), changes.items()):
        unchanged, ratios = work(), []
        try:
            with change(trainer):
                first, moved = seconds(trainer.device, work), distance(work(), unchanged)
            for _ in range(REPEATS):
                slow = seconds(trainer.device, work)
                with change(trainer):
                    ratios.append(slow / seconds(trainer.device, work))
            speed = "{1:.2f} [{0:.2f}, {2:.2f}]".format(*np.quantile(ratios, [0, 0.5, 1]))
            print(f"| {title} | {name} | {speed} | {moved:.1e} | {first:.1f} |", flush=True)
        except RuntimeError as error:  # this machine has no such kernel
            print(f"| {title} | {name} | {str(error).splitlines()[0]} | - | - |", flush=True)


def main() -> None:
    commands: dict[str, Callable] = {"plan": plan, "step": step}
    commands |= {"plain": partial(compare, PLAIN), "changes": partial(compare, CHANGES)}
    command = (*sys.argv, "--help")[1]
    if command not in commands:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)
    commands[command](parse(Settings, sys.argv[2:]))


if __name__ == "__main__":
    run_script(main)
