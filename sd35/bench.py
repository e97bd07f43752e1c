"""What a step takes (memory, FLOPs, seconds), and what would make it faster.

    python -m sd35.bench plan       memory and FLOPs of SD3.5 Medium at these settings, counted
    python -m sd35.bench step       seconds of a step by phase, TFLOP/s, and of its passes alone
    python -m sd35.bench plain      a step against a plain one; in float32, also against bf16
    python -m sd35.bench changes    what would make a step faster, and how far it moves the result

Each takes train_sd35.py's settings. Without --model, the weights are random, which needs a GPU but
no download. On a CPU, give --model tiny_sd35/out/shapes --resolution 16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dgpo
from sd35.lora import add_lora, compile_blocks, int8_config, recompute
from sd35.model import TIMES, TRAINING_NOISE, Encoded, Model, load_pipeline, seeded
from sd35.run import REWARD_ROOM, SHARES, Clock, fit_micro_batch, passes, run_script
from sd35.settings import Settings, parse
from train_sd35 import Trainer, launch

REPEATS = 5  # how often work is timed
TEXT = "a prompt"
DEFAULT = Settings.pretrained_model_name_or_path  # stands for random weights
T5_GB = {"none": 9.5246, "int8": 4.8941}  # T5-XXL's encoder, the largest: in bf16, in int8
PICKSCORE_GB, PICKSCORE_TFLOP = 3.9, 0.33459  # in float32; its network of images, for one image
CARDS = (8, 16, 24, 40, 80)  # GB

# The networks' geometry, where it is not the default of their classes
MEDIUM = dict(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
    dual_attention_layers=range(13), qk_norm="rms_norm",
)  # fmt: skip
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
)  # fmt: skip


def random_pipeline(dtype: torch.dtype, device: object) -> StableDiffusion3Pipeline:
    """Transformer and VAE of SD3.5 Medium with random weights, without text encoders."""
    # torch's own initialisation would take twice the memory, in float32, and some minutes.
    with torch.device("meta"):
        transformer, vae = SD3Transformer2DModel(**MEDIUM).to(dtype), AutoencoderKL(**VAE)
    for network in (transformer, vae):
        network.to_empty(device=device).requires_grad_(False).eval()
        for x in (*network.parameters(), *network.buffers()):
            x.normal_(std=0.02)
    pipe = StableDiffusion3Pipeline(transformer, None, vae, *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tflop(work: Callable[[], object]) -> float:
    """TFLOP of matrix products and convolutions, and on a GPU of attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


class Allocated(TorchDispatchMode):
    """Remembers what operators allocate, to count what of it is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}  # in bytes

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None) -> object:
        output = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            parts = [x.untyped_storage() for x in tree_leaves(output) if isinstance(x, Tensor)]
            self.sizes |= {StorageWeakRef(part): part.nbytes() for part in parts}
        return output

    def gigabytes(self) -> float:
        return sum(size for ref, size in self.sizes.items() if not ref.expired()) / 1e9


def count_sizes(settings: Settings) -> SimpleNamespace:
    """1e9 parameters of each network; an image's activations in GB, and its passes in TFLOP."""
    dtype, side, size = torch.bfloat16, settings.resolution // 8, SimpleNamespace()
    pipe = random_pipeline(dtype, "meta")
    transformer, vae = pipe.transformer, pipe.vae

    def count(network: nn.Module) -> float:  # the table of positions is a buffer, and takes memory
        return sum(x.numel() for x in (*network.parameters(), *network.buffers())) / 1e9

    def forward() -> Tensor:
        shapes = (16, side, side), (77 + settings.max_sequence_length, 4096), (2048,)
        inputs = [torch.empty(1, *shape, dtype=dtype) for shape in shapes]
        return transformer(*inputs, torch.empty(1))[0]

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:  # as on a GPU
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", attention):
        size.transformer, size.vae = count(transformer), count(vae)
        linear = [layer for layer in transformer.modules() if isinstance(layer, nn.Linear)]
        size.linear = sum(layer.weight.numel() for layer in linear) / 1e9
        size.reference = tflop(forward)
        size.decode = tflop(lambda: vae.decode(torch.empty(1, 16, side, side)))
        add_lora(transformer, settings.rank, settings.lora_alpha, settings.seed)
        size.lora = count(transformer) - size.transformer
        transformer.to(dtype)  # as under autocast, but for some copies in float32
        size.theta = tflop(forward)
        size.memory, size.backward = {}, {}  # by the share of blocks that are recomputed
        for share in SHARES:
            recompute(transformer, share)
            with Allocated() as allocated:
                _output = forward()  # holds the graph
            size.memory[share] = allocated.gigabytes()
            size.backward[share] = tflop(lambda: forward().sum().backward())
    # In the backward pass, one block at a time has all its activations again.
    peak = size.memory[1] + size.memory[0] / len(transformer.transformer_blocks)
    size.memory = {share: max(memory, peak) for share, memory in size.memory.items()}
    return size


def step_tflop(settings: Settings, size: SimpleNamespace, share: float) -> dict[str, float]:
    """TFLOP by phase of a rollout of all groups and the training, recomputing a share of blocks."""
    G, m = settings.group_size, settings.train_samples or settings.group_size
    scales = settings.guidance_scale, settings.reference_guidance_scale
    guided, guided_reference = (1 if scale == 1 else 2 for scale in scales)
    in_parts = settings.micro_batch_size != "auto" and int(settings.micro_batch_size) < m
    # theta_old for clip, bound or as the reference, and theta for the gap of a group in parts
    forwards = bool(settings.clip or settings.bound or settings.ema_reference) + in_parts
    train = guided_reference * size.reference + forwards * size.theta + size.backward[share]
    each = {
        "rollout": settings.num_inference_steps * guided * size.theta,
        "decode": size.decode,
        "reward, PickScore's network of images": PICKSCORE_TFLOP,
        "train": settings.train_timesteps * train * m / G * settings.updates_per_rollout,
    }
    return {name: settings.prompts_per_step * G * count for name, count in each.items()}


def plan(settings: Settings) -> None:
    """Print what SD3.5 Medium takes in bf16 at these settings: counted, not measured."""
    size, n = count_sizes(settings), int(settings.micro_batch_size.replace("auto", "1"))
    P, G, int8 = settings.prompts_per_step, settings.group_size, settings.quantize == "int8"
    # The decoder's widest map has 256 channels at full size; a few of them live at once.
    decode = 4 * (256 * settings.resolution**2 * 4) / 1e9
    memory = {
        "transformer": 2 * size.transformer - int8 * size.linear,
        "LoRA of rank {rank} in float32, with gradient, Adam and averages": 24 * size.lora,
        "VAE in float32": 4 * size.vae,
    }
    always, encoding = sum(memory.values()), T5_GB[settings.quantize] + 16 * size.lora
    memory |= {
        "together, while T5 encodes prompts, without transformer and VAE": encoding,
        f"together, training, images per pass: {n}": always + n * size.memory[1],
        "the same without gradient checkpointing": always + n * size.memory[0],
        "together, decoding an image, roughly": always + decode,
    }
    print(f"GB for SD3.5 Medium in {'int8' if int8 else 'bf16'} at {settings.resolution} px:")
    for name, gigabytes in memory.items():
        print(f"{gigabytes:8.2f}  {name.format(rank=settings.rank)}")

    print(f"What auto chooses, and TFLOP of {P} groups of {G}, if a tenth of it stays free and")
    print(
        f"PickScore takes {PICKSCORE_GB} GB, or runs on the CPU beside less than {REWARD_ROOM} GB:"
    )
    for card in CARDS:
        room = 0.9 * card - PICKSCORE_GB * (card >= REWARD_ROOM)
        text = "too small" if int8 else "too small; try --quantize int8"
        for share, m in passes(settings) if max(encoding, always + decode) < room else ():
            if always + m * size.memory[share] < room:
                chosen = replace(settings, micro_batch_size=str(m))
                text = f"{m} images per pass, {share:.0%} of the blocks recomputed, "
                text += f"{sum(step_tflop(chosen, size, share).values()):.0f} TFLOP"
                break
        print(f"{card:8} GB  {text}")

    share, n = settings.gradient_checkpointing is not False, settings.max_train_steps
    work = step_tflop(settings, size, share)
    work["together"] = sum(work.values())
    print("TFLOP by phase, with a group in one pass, recomputing:")
    for name, count in work.items():
        print(f"{count:8.0f}  {name}")
    for rate, card in (400, "an H100 at best"), (70, "a card of 24 GB, perhaps"):
        hours = work["together"] * n / 3600 / rate
        print(f"{hours:8.1f}  hours for {n} steps at {rate} TFLOP/s: {card}")


def prepare(settings: Settings) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer with a LoRA that has an effect, latents x0 (m, C, h, w) and advantages (m,)."""
    accelerator = launch(settings)
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
    """Call work(), and return its passes of transformer and decoder alone, forward and backward."""
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
    share = settings.gradient_checkpointing is not False  # as without auto
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

    print("| change | phase | times as fast | the result moves by | seconds at first |")
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
