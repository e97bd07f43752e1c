"""What a step takes: memory, FLOPs, seconds; and what would make it faster.

    python bench.py plan       the memory and FLOPs of SD3.5 Medium at the settings given, counted
    python bench.py step       seconds of a step, against its bare network passes and the machine
    python bench.py plain      seconds and gradients of a step, against a plain one; and in bf16
    python bench.py changes    what would make a step faster: predicted, and measured

Each takes train_sd35.py's arguments, and `--repeats`. Without --model, all but the plan, which
needs no weights, take SD3.5 Medium's geometry with random weights: for a GPU, and without any
download. On a CPU: --model toy/out/shapes --resolution 16 --max_sequence_length 7.

Like a test, this file imports the trainer: what is timed is its own step, and not a copy of it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
)

import cli
import rewards
import sd35
import train_sd35
from cli import Fault, first_line, option
from train_sd35 import Clock, Trainer

TEXT = "a prompt"
REWARD_GB = 3.9  # PickScore's weights in float32
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
T5_XXL |= {"num_heads": 64, "feed_forward_proj": "gated-gelu"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20}
PICKSCORE_EYE = {**CLIP_G, "num_attention_heads": 16, "patch_size": 14, "image_size": 224}


@dataclass
class Arguments(train_sd35.Arguments):
    """Count or measure what a step of the trainer takes, with the trainer's own arguments."""

    repeats: int = option(5, "How often each piece of work is timed.", at_least=1)


# Networks of SD3.5 Medium's geometry


def random_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def random_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def random_eye() -> CLIPVisionModel:
    """Of PickScore's geometry, a CLIP ViT-H/14."""
    return CLIPVisionModel(CLIPVisionConfig(**PICKSCORE_EYE)).requires_grad_(False).eval()


def random_judge(device: torch.device) -> rewards.Reward:
    """A reward that means nothing and costs what PickScore's eye does.

    Not counted: its text encoder, and the processor, which resizes images on the CPU.
    """
    eye = random_eye().to(device)

    @torch.no_grad()
    def judge(images: Tensor, prompts: list[dict]) -> Tensor:
        return eye(F.interpolate(images, (224, 224))).pooler_output.mean(1)

    return judge


def random_pipeline(dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Transformer and VAE with random weights, without text encoders."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = {"transformer": random_transformer().to(dtype), "vae": random_vae()}
    for part in parts.values():
        part.requires_grad_(False).eval()
    encoders = {name + i: None for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(args: Arguments, texts: list[str]) -> tuple[Trainer, bool]:
    """A trainer with these prompts encoded, and whether its weights are random."""
    accelerator = train_sd35.launch(args)
    torch.manual_seed(args.seed)
    model, dtype = args.pretrained_model_name_or_path, train_sd35.precision(args)
    random = model == Arguments.pretrained_model_name_or_path
    if random:
        pipe, tokens = random_pipeline(dtype), 77 + args.max_sequence_length
        encoded = {
            text: sd35.Encoded(torch.randn(1, tokens, 4096), torch.randn(1, 2048)) for text in texts
        }
    else:
        pipe = sd35.load_pipeline(model, dtype)
        encoded = sd35.Encoder(pipe, args.max_sequence_length, accelerator.device)(texts, {})
    trainer = train_sd35.build(args, accelerator, pipe)
    trainer.model.encoded = encoded
    if not trainer.model.images_a_pass:
        print(f"--micro_batch_size auto: {train_sd35.fit_micro_batch(trainer)}")
    return trainer, random


def prepare(args: Arguments) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer with a LoRA that does something, latents x0 (G, C, h, w) and advantages (G,)."""
    trainer, _ = load(args, ["", TEXT])
    model = trainer.model
    with torch.no_grad():
        for parameter in model.theta:
            parameter.add_(0.02 * torch.randn_like(parameter))
        for old, parameter in zip(model.old, model.theta, strict=True):
            old.copy_(parameter + 0.002 * torch.randn_like(parameter))
    x0 = torch.randn(args.group_size, *model.latent_shape)
    advantages = torch.randn(args.group_size)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return trainer, x0.to(trainer.device), advantages.to(trainer.device)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    clock = Clock(device)
    with clock("work"):
        work()
    return clock.seconds["work"]


def gradients(trainer: Trainer, work: Callable[[], object]) -> list[Tensor]:
    for parameter in trainer.model.theta:
        parameter.grad = None
    work()
    return [parameter.grad.float().clone() for parameter in trainer.model.theta]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|, all tensors in one."""
    a, b = (torch.cat([x.flatten() for x in parts]) for parts in (a, b))
    return ((a - b).norm() / b.norm()).item()


def middle_and_ends(ratios: list[float]) -> str:
    ratios = sorted(ratios)
    return f"{ratios[len(ratios) // 2]:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


# plan


def plan(args: Arguments) -> None:
    """Prints what SD3.5 Medium takes in bf16 at these settings: counted, not measured.

    Nothing is allocated: shapes alone run through the networks, autograd tells what it keeps for
    the backward, and torch counts the FLOPs of matrix products, attention and convolutions.
    """

    def count(model: nn.Module) -> float:
        return sum(parameter.numel() for parameter in model.parameters()) / 1e9

    def forward(images: int) -> Tensor:
        latents = torch.empty(images, 16, args.resolution // 8, args.resolution // 8, dtype=dtype)
        tokens = torch.empty(images, 77 + args.max_sequence_length, 4096, dtype=dtype)
        pooled = torch.empty(images, 2048, dtype=dtype)
        return transformer(latents, tokens, pooled, torch.empty(images)).sample

    def kept(images: int) -> float:
        """Gigabytes of activations, by autograd."""
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = forward(images)  # keeps the graph
        for parameter in transformer.parameters():
            storages.pop(parameter.untyped_storage()._cdata, None)
        del output
        return sum(storages.values()) / 1e9

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        # As on a GPU. Without a device, torch would choose the one that keeps all scores.
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    def tflop(work: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e12

    dtype = torch.bfloat16
    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", attention):
        transformer = random_transformer().to(dtype).requires_grad_(False)
        weights = count(transformer)
        theta = sd35.add_lora(transformer, args.rank, args.lora_alpha, args.seed, False)
        lora = sum(parameter.numel() for parameter in theta) / 1e9
        transformer.to(dtype)  # as autocast has it, but for some copies in float32
        whole = kept(1)
        transformer.enable_gradient_checkpointing()
        inputs = kept(1)
        checkpointed = inputs + (whole - inputs) / 24  # and a block that is computed again
        if not args.gradient_checkpointing:
            transformer.disable_gradient_checkpointing()
        with torch.no_grad():
            asked = tflop(lambda: forward(1))
            with sd35.without_lora(transformer):
                reference = tflop(lambda: forward(1))
            vae, side = random_vae(), args.resolution // 8
            decoding = tflop(lambda: vae.decode(torch.empty(1, 16, side, side)))
            eye = random_eye()
            judging = tflop(lambda: eye(torch.empty(1, 3, 224, 224)))
        backward = tflop(lambda: forward(1).sum().backward())
        encoders = count(T5EncoderModel(T5Config(**T5_XXL)))
        encoders += count(CLIPTextModel(CLIPTextConfig(**CLIP_L)))
        encoders += count(CLIPTextModel(CLIPTextConfig(**CLIP_G)))
    # The decoder's widest map has 256 channels at full size; a few of them live at once.
    decode = 4 * (256 * args.resolution**2 * 4) / 1e9
    always = 2 * weights + 24 * lora + 4 * count(vae)

    print(f"SD3.5 Medium in bf16 at {args.resolution} px, LoRA of rank {args.rank}, in GB")
    for name, size in {
        f"transformer, {weights:.2f} G parameters in bf16": 2 * weights,
        f"LoRA, {1000 * lora:.1f} M in float32, its gradient, Adam, theta^- and EMA": 24 * lora,
        "VAE in float32": 4 * count(vae),
        "text encoders in bf16, at times and without activations": 2 * encoders,
        "together, while prompts are encoded": always + 2 * encoders,
    }.items():
        print(f"{size:8.2f}  {name}")
    sizes = sorted({1, 2, 4, 8, 12, 24, 48, args.micro_batch_size} - {0})
    print(f"together, by images a pass {''.join(f'{m:8d}' for m in sizes)}")
    for name, each in {
        "training": checkpointed,
        "  without checkpointing": whole,
        "decoding, about": decode,
    }.items():
        print(f"{name:27}{''.join(f'{always + m * each:8.2f}' for m in sizes)}")
    print(f"Most images a pass, if a tenth and {REWARD_GB} GB stay free, which PickScore takes:")
    for card in (16, 24, 40, 80):
        room = 0.9 * card - REWARD_GB - always
        most = [int(room / max(decode, each)) for each in (checkpointed, whole)]
        fits = f"{most[0]}, and {most[1]} without gradient checkpointing"
        print(f"{card:8} GB  {fits if room > 2 * encoders else 'no room for the text encoders'}")

    images, K = args.prompts_per_step * args.group_size, args.train_timesteps
    guided, guided_reference = (
        1 if scale == 1 else 2 for scale in (args.guidance_scale, args.reference_guidance_scale)
    )
    again = args.micro_batch_size < args.group_size  # theta once more, for S
    work = {
        "rollout": args.num_inference_steps * guided * asked,
        "decode": decoding,
        "reward, PickScore's eye": judging,
        "train": K * (guided_reference * reference + (bool(args.clip) + again) * asked + backward),
    }
    print(f"TFLOP of a step of {args.prompts_per_step} groups of {args.group_size}:")
    for name, each in {**work, "together": sum(work.values())}.items():
        print(f"{images * each:8.0f}  {name}")
    hours = images * sum(work.values()) * args.max_train_steps / 3600
    print(
        f"{hours / 400:8.1f}  hours for {args.max_train_steps} steps, at 400 TFLOP/s all the time"
    )


# step

# torch counts the FLOPs of attention on a GPU, and leaves out that of a CPU, which has the same.
FLOPS = dict(flop_registry)
for of in ("", "_backward"):
    gpu, cpu = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{of}")
        for device in ("", "_for_cpu")
    )
    FLOPS[cpu] = FLOPS[gpu]


class Account(TorchDispatchMode):
    """FLOPs, bytes and the least seconds of each phase, operation by operation.

    An operation takes at least its FLOPs at the peak of matrix products in its precision ("busy"),
    and at least its bytes, in and out, at the peak of memory (the roofline; Williams et al. 2009).
    Fused kernels and caches move fewer bytes than are counted.
    """

    def __init__(self, peaks: dict[torch.dtype, float], bandwidth: float):
        super().__init__()
        self.peaks, self.bandwidth = peaks, bandwidth
        self.phases: dict[str, Counter[str]] = {}  # the seconds also by kind of operation

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.now = self.phases.setdefault(phase, Counter())
        with self:
            yield

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in FLOPS:  # if it is made of others, count those
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not func.is_view and "view" not in str(func) and "empty" not in str(func):
            count = FLOPS.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
            dtype = next((x.dtype for x in tree_leaves(out) if torch.is_tensor(x)), None)
            busy = flops / self.peaks.get(dtype, self.peaks[torch.float32])
            least = max(busy, moved / self.bandwidth)
            kind = "others"
            if count:
                kind = "attention" if "attention" in str(func) else "products"
            self.now.update(
                {"flops": flops, "bytes": moved, "busy": busy, "seconds": least, kind: least}
            )
        return out


def measured_peaks(device: torch.device) -> tuple[dict[torch.dtype, float], float]:
    """FLOPs a second of a large matrix product by precision, bytes a second of a large copy."""
    n = 8192 if device.type == "cuda" else 2048

    def best(work: Callable[[], Any]) -> float:
        work()  # to warm up
        return min(seconds(device, work) for _ in range(5))

    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
        peaks[dtype] = 2 * n**3 / best(lambda: a @ b)  # noqa: B023
    c = torch.empty(16 * n * n, device=device, dtype=torch.uint8)
    return peaks, 2 * c.nbytes / best(c.clone)


def bare_passes(
    trainer: Trainer, text: str, judge: rewards.Reward | None, clock: Clock | Account
) -> None:
    """A group's network passes by themselves: the same batches, nothing around them."""
    args, model, m = trainer.args, trainer.model, trainer.model.images_a_pass
    x0 = torch.randn(args.group_size, *model.latent_shape, device=trainer.device)
    found = model.embedding(text)

    def forward(x: Tensor, guidance: float) -> Tensor:
        n = len(x) * (1 if guidance == 1 else 2)
        with model.autocast():
            return model.pipe.transformer(
                hidden_states=x.repeat(n // len(x), 1, 1, 1),
                timestep=torch.full((n,), 800.0, device=x.device),
                encoder_hidden_states=found.embeds.expand(n, -1, -1),
                pooled_projections=found.pooled.expand(n, -1),
                return_dict=False,
            )[0]

    with clock("rollout"), torch.no_grad():
        for x in x0.split(m):
            for _ in range(args.num_inference_steps):
                forward(x, args.guidance_scale)
    with clock("decode"):
        images = model.decode(x0)
    if judge:
        with clock("reward"):
            judge(images, [])
    times_a_pass = max(1, m // args.group_size)  # as backward_group_loss has it
    with clock("train"):
        for rows in x0.repeat(args.train_timesteps, 1, 1, 1).split(times_a_pass * args.group_size):
            batches = rows.split(m)
            for x in batches:
                with torch.no_grad():
                    with model.reference():
                        forward(x, args.reference_guidance_scale)
                    for _ in range(bool(args.clip) + (len(batches) > 1)):  # old, theta for the gap
                        forward(x, 1.0)
                forward(x, 1.0).float().mean().backward()


def step(args: Arguments) -> None:
    """Times steps against their bare network passes, in one run.

    Beside it what the passes must take at the machine's measured peaks, and the share of the peak
    of matrix products that they reach (MFU). Recomputed activations count as work. "products" is
    the share of products, attention and convolutions in the time at the peaks.
    """
    texts = ["", *(f"prompt {p}" for p in range(args.prompts_per_step))]
    trainer, random = load(args, texts)
    judge = random_judge(trainer.device) if random else None
    trainer.scorers = {"random": (1.0, judge or (lambda images, prompts: torch.rand(len(images))))}
    chosen = [{"prompt": text} for text in texts[1:]]
    groups = len(trainer.own(chosen))

    peaks, bandwidth = measured_peaks(trainer.device)
    account = Account(peaks, bandwidth)
    trainer.take_step(chosen, 0)  # warm
    bare_passes(trainer, texts[1], judge, account)
    steps, bare = [], []
    for i in range(1, args.repeats + 1):
        steps.append(trainer.take_step(chosen, i))
        clock = Clock(trainer.device)
        bare_passes(trainer, texts[1], judge, clock)
        bare.append({k: groups * v for k, v in clock.seconds.items()})
    if not trainer.accelerator.is_main_process:
        return

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    print(
        f"at most {peaks[torch.float32] / 1e12:.3g} TFLOP/s in float32, "
        f"{peaks[torch.bfloat16] / 1e12:.3g} in bf16, and {bandwidth / 1e9:.3g} GB/s\n"
        f"{'seconds a step':16}{'ours':>10}{'bare passes':>14}{'overhead':>10}"
        f"{'TFLOP':>10}{'GB':>10}{'at the peaks':>14}{'products':>10}{'MFU':>8}"
    )
    whole = Counter()
    for counted in account.phases.values():
        whole.update(counted)
    for phase, counted in {**account.phases, "step": whole}.items():
        ours = mean([m["seconds" if phase == "step" else f"seconds/{phase}"] for m in steps])
        alone = mean([sum(b.values()) if phase == "step" else b[phase] for b in bare])
        flops, moved, least = (groups * counted[k] for k in ("flops", "bytes", "seconds"))
        print(
            f"{phase:16}{ours:>10.3f}{alone:>14.3f}{ours / alone - 1:>10.1%}"
            f"{flops / 1e12:>10.3g}{moved / 1e9:>10.3g}{least:>14.3f}"
            f"{1 - counted['others'] / counted['seconds']:>10.1%}"
            f"{groups * counted['busy'] / alone:>8.1%}"
        )
    print(f"{mean([m['images_per_second'] for m in steps]):.3f} images a second trained on")
    if "peak_memory_gb" in steps[-1]:
        print(f"{steps[-1]['peak_memory_gb']:.2f} GB at most")


# plain


def plain_group(trainer: Trainer, step: int, p: int, x0: Tensor, advantages: Tensor) -> None:
    """A group's step from the paper's formulas and autograd alone, without dgpo.py.

    It is the schedule of the authors' released trainer: the whole group in one batch, the
    reference, theta_old and theta as three passes at every timestep, and after each a look at the
    numbers, which waits for the device.
    """
    args, model = trainer.args, trainer.model
    generator = train_sd35.seeded(args.seed, train_sd35.TIMES, step)
    order = torch.randperm(len(trainer.times), generator=generator)
    for k, index in enumerate(order[: args.train_timesteps]):
        t = trainer.times[index].item()
        eps = trainer.noise(train_sd35.TRAINING_NOISE, step, p, k).to(x0.device)
        x_t = (1 - t) * x0 + t * eps
        theta = model.velocity(TEXT)
        guided = model.velocity(TEXT, args.reference_guidance_scale)
        times = torch.full((len(x0),), t, device=x0.device)
        with torch.no_grad(), model.theta_old() if args.ema_reference else model.reference():
            v_ref = guided(x_t, times, times)
        with torch.no_grad(), model.theta_old():
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


def plain(args: Arguments) -> None:
    """Our group's step against the plain one, and in bf16 against float32."""
    trainer, x0, advantages = prepare(args)

    def ours() -> dict[str, Tensor]:
        return trainer.backward_group(0, 0, TEXT, x0, advantages)

    def theirs() -> None:
        plain_group(trainer, 0, 0, x0, advantages)

    found = distance(gradients(trainer, ours), gradients(trainer, theirs))  # and both are warm now
    took = [[seconds(trainer.device, work) for work in (theirs, ours)] for _ in range(args.repeats)]
    mean_plain, mean_ours = (sum(times) / args.repeats for times in zip(*took, strict=True))
    m = trainer.model.images_a_pass
    print(f"group of {args.group_size}, micro-batches of {m}, {args.recipe}")
    print(f"plain step {mean_plain:.3f} s, ours {mean_ours:.3f} s")
    print(f"plain / ours {middle_and_ends([a / b for a, b in took])}")
    print(f"difference of the gradients, of their norm: {found:.2e}")

    def work_in(autocast: Callable) -> Callable[[], dict[str, Tensor]]:
        # Entered anew at every pass, as the trainer does: it keeps what it has cast.
        def work() -> dict[str, Tensor]:
            with patch.object(trainer.model, "autocast", autocast):
                return ours()

        return work

    in_half = work_in(lambda: torch.autocast(trainer.device.type, torch.bfloat16))
    metrics, half = in_half(), gradients(trainer, in_half)
    for m in sorted({1, 4, args.group_size}):
        trainer.model.images_a_pass = m
        apart = distance(gradients(trainer, in_half), half)
        print(f"bf16, micro-batches of {m}: the gradient differs by {apart:.2e} of its norm")
    transformer = trainer.model.pipe.transformer.float()
    in_full = work_in(contextlib.nullcontext)
    exact, numbers = gradients(trainer, in_full), in_full()
    named = [name for name, p in transformer.named_parameters() if p.requires_grad]
    cosines = sorted(
        (F.cosine_similarity(a.flatten(), b.flatten(), 0).item(), name)
        for a, b, name in zip(half, exact, named, strict=True)
        if b.any()  # the last block's queries of the text lead nowhere
    )
    (middle, _), (worst, name) = cosines[len(cosines) // 2], cosines[0]
    print(
        f"bf16 against float32: cosine {middle:.5f} in the middle of {len(cosines)} LoRA tensors, "
        f"{worst:.5f} at worst ({name})"
    )
    for name in ("gap", "gate"):
        a, b = (m[name].float().mean().item() for m in (metrics, numbers))
        print(f"{name}: {a:.6f} in bf16, {b:.6f} in float32")


# changes


@contextlib.contextmanager
def compiled(trainer: Trainer, backend: str = "inductor") -> Iterator[None]:
    """The transformer's blocks, each by itself: those that are alike share what is compiled."""
    blocks = trainer.model.pipe.transformer.transformer_blocks
    for block in blocks:
        block.compile(backend=backend)
    # Three kinds of block, with and without LoRA, gradients and a second batch size are more than
    # the 8 graphs after which torch gives up without an error.
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def attention(backend: SDPBackend) -> Callable:
    return lambda trainer: sdpa_kernel(backend)


def twice_the_images(trainer: Trainer) -> contextlib.AbstractContextManager:
    """Which is what reference and theta_old in one batch would be, too."""
    return patch.object(trainer.model, "images_a_pass", 2 * trainer.model.images_a_pass)


@contextlib.contextmanager
def channels_last(trainer: Trainer) -> Iterator[None]:
    trainer.model.pipe.vae.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        trainer.model.pipe.vae.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def vae_in_bf16(trainer: Trainer) -> Iterator[None]:
    trainer.model.pipe.vae.to(torch.bfloat16)
    try:
        yield
    finally:
        trainer.model.pipe.vae.to(
            torch.float32
        )  # its values are rounded now, its speed is the same


# The change, the phases it may help, and the operations whose time at the peaks it may save; or
# None, where what it does itself can be counted.
CHANGES: list[tuple[str, Callable, tuple[str, ...], str | None]] = [
    ("torch.compile of the blocks", compiled, ("rollout", "train"), "others"),
    *(
        (f"attention: {b.name.lower()}", attention(b), ("rollout", "train"), "attention")
        for b in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        )
    ),
    ("twice the images in a pass", twice_the_images, ("rollout", "train"), None),
    ("VAE channels-last", channels_last, ("decode",), None),
    ("VAE in bf16", vae_in_bf16, ("decode",), None),
]


def graphs() -> int:
    """That torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def waits(work: Callable[[], object]) -> int:
    """How often the host needs a number from the device, and on a GPU waits for it.

    What is copied to the device, a group's embeddings, noise and advantages, makes it wait, too.
    """
    count = 0

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func._overloadpacket is torch.ops.aten._local_scalar_dense
            return func(*args, **(kwargs or {}))

    with Looks():
        work()
    return count


def changes(args: Arguments) -> None:
    """A phase of one group without and with each change in turn.

    The prediction is a bound: nothing is faster than the FLOPs and bytes that remain, at the peaks
    that are measured here. For a small model it is none: what lies in a cache is not fetched.
    """
    trainer, x0, advantages = prepare(args)
    model, device = trainer.model, trainer.device
    account = Account(*measured_peaks(device))
    noise = torch.randn(x0.shape)
    steps, guidance = args.num_inference_steps, args.guidance_scale

    def backward() -> object:
        return trainer.backward_group(0, 0, TEXT, x0, advantages)

    phases: dict[str, Callable[[], list[Tensor]]] = {
        "rollout": lambda: [model.sample(TEXT, noise, steps, guidance)],
        "decode": lambda: [model.decode(x0)],
        "train": lambda: gradients(trainer, backward),
    }
    unchanged = {}
    for name, work in phases.items():
        unchanged[name] = [x.float() for x in work()]
        with account(name):
            work()

    print(f"a group of {args.group_size}, {model.images_a_pass} images a pass")
    print("| change | phase | faster by, at most | measured | the result differs by |")
    print("|---|---|---|---|---|")
    for title, change, of, saved in CHANGES:
        for name in of:
            work, counted = phases[name], account.phases[name]
            before = graphs()
            start = time.perf_counter()
            try:
                with change(trainer):
                    changed = [x.float() for x in work()]
            except RuntimeError as error:  # no such attention here
                print(f"| {title} | {name} | - | {first_line(error)} | - |", flush=True)
                continue
            first, made = time.perf_counter() - start, graphs()
            took = []
            for _ in range(args.repeats):
                slow = seconds(device, work)
                with change(trainer):
                    took.append((slow, seconds(device, work)))
            if saved:
                least = counted["seconds"] - counted[saved]
            else:
                with account(f"{title}, {name}"), change(trainer):
                    work()
                least = account.phases[f"{title}, {name}"]["seconds"]
            bound = min(slow for slow, _ in took) / least
            print(
                f"| {title} | {name} | {bound:.2f} | {middle_and_ends([a / b for a, b in took])} "
                f"| {distance(changed, unchanged[name]):.1e} |",
                flush=True,
            )
            if made > before:
                more = graphs() - made
                print(
                    f"({made - before} graphs made in {first:.0f} s, "
                    f"{more} more in {args.repeats} repetitions)"
                )
    print(f"the host waits for a number {waits(phases['train'])} times in a group's training")


COMMANDS = {"plan": plan, "step": step, "plain": plain, "changes": changes}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        COMMANDS[command](train_sd35.parse_args(argv, Arguments))
    else:
        raise Fault(f"the command must be {', '.join(COMMANDS)}, got {command!r}")


if __name__ == "__main__":
    cli.run("bench.py", main)
