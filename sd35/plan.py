"""The memory and FLOPs of a step of Stable Diffusion 3.5 Medium, counted without its weights.

Printed by `python -m sd35.bench plan`. Networks of its geometry run on torch's meta device, where
tensors have a shape and no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sd35.lora import add_lora, recompute
from sd35.run import REWARD_ROOM, SHARES, passes
from sd35.settings import Settings

DEFAULT = Settings.pretrained_model_name_or_path  # stands for random weights
T5_GB = {"none": 9.5246, "int8": 4.8941}  # T5-XXL's encoder, the largest: in bf16, in int8
PICKSCORE_GB, PICKSCORE_TFLOP = 3.9, 0.33459  # in float32; its image encoder, for one image
CARDS = (8, 12, 16, 24, 40, 80)  # GB

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
    """Tracks the storage that operators allocate, to count how much of it is still in use."""

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
    """Billions of parameters by network; GB of activations and TFLOP of each pass for one image."""
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
        size.memory, size.backward = {}, {}  # by the share of blocks that are recomputed
        for share in SHARES:
            recompute(transformer, share)
            with FlopCounterMode(display=False) as counter:
                with Allocated() as allocated:
                    output = forward()
                size.memory[share] = allocated.gigabytes()  # the graph's
                size.theta = counter.get_total_flops() / 1e12
                output.sum().backward()
            size.backward[share] = counter.get_total_flops() / 1e12
    # In the backward pass, one block at a time has all its activations again.
    peak = size.memory[1] + size.memory[0] / len(transformer.transformer_blocks)
    size.memory = {share: max(memory, peak) for share, memory in size.memory.items()}
    return size


def step_tflop(settings: Settings, size: SimpleNamespace, share: float) -> dict[str, float]:
    """TFLOP of one step of all groups, by phase; share: of the blocks that are recomputed."""
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
        "reward, PickScore's image encoder": PICKSCORE_TFLOP,
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

    print(f"What auto chooses, and TFLOP of {P} groups of {G}, if a tenth of memory stays free and")
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
    print(f"TFLOP by phase, {'recomputing all blocks' if share else 'without recomputation'}:")
    for name, count in work.items():
        print(f"{count:8.0f}  {name}")
    for rate, card in (400, "an H100 at best"), (70, "a card of 24 GB, perhaps"):
        hours = work["together"] * n / 3600 / rate
        print(f"{hours:8.1f}  hours for {n} steps at {rate} TFLOP/s: {card}")
