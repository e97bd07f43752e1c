"""What a step takes: memory, FLOPs, seconds; and what would make it faster.

    python bench.py plan       the memory and FLOPs of SD3.5 Medium at the settings given, counted
    python bench.py step       seconds of a step, against its bare network passes and the machine
    python bench.py plain      seconds and gradients of a step, against a plain one; and in bf16
    python bench.py changes    what would make a step faster: predicted, and measured

Each takes train_sd35.py's arguments, and --repeats. Without --model, weights of SD3.5 Medium's
geometry are random: for a GPU, and without any download. On a CPU, give --model toy/out/shapes
--resolution 16 --max_sequence_length 7. The plan allocates nothing.

Like a test, this file imports the trainer: what is timed is its own step, and not a copy of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import cli
import rewards
import sd35
import train_sd35
from cli import Fault, first_line, option
from train_sd35 import Clock, Trainer

TEXT = "a prompt"
REWARD_GB = 3.9  # PickScore's weights in float32
# The networks' geometry, where it is not their classes' default.
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MEDIUM |= {"pos_embed_max_size": 384, "dual_attention_layers": range(13), "qk_norm": "rms_norm"}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "scaling_factor": 1.5305}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "shift_factor": 0.0609, "sample_size": 1024}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu"}
EYE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
EYE |= {"num_attention_heads": 16, "patch_size": 14}  # PickScore's, a CLIP ViT-H/14


@dataclass
class Arguments(train_sd35.Arguments):
    """Count or measure what a step of the trainer takes, with the trainer's own arguments."""

    repeats: int = option(5, "How often each piece of work is timed.", at_least=1)


def random_eye() -> nn.Module:
    config = transformers.CLIPVisionConfig(**EYE)
    return transformers.CLIPVisionModel(config).requires_grad_(False).eval()


def random_pipeline(dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Transformer and VAE of SD3.5 Medium with random weights, without text encoders."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = {"transformer": SD3Transformer2DModel(**MEDIUM).to(dtype)}
        parts["vae"] = AutoencoderKL(**VAE)
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipe = StableDiffusion3Pipeline(**{**dict.fromkeys(sd35.PARTS), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(args: Arguments, texts: list[str]) -> tuple[Trainer, bool]:
    """A trainer with these prompts encoded, and whether its weights are random."""
    accelerator = train_sd35.launch(args)
    torch.manual_seed(args.seed)
    name, dtype = args.pretrained_model_name_or_path, train_sd35.precision(args)
    if random := name == train_sd35.MEDIUM:
        pipe, shapes = random_pipeline(dtype), ((1, 77 + args.max_sequence_length, 4096), (1, 2048))
        encoded = {text: sd35.Encoded(*map(torch.randn, shapes)) for text in texts}
    else:
        pipe = sd35.load_pipeline(name, dtype)
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
    trainer.optimizer.zero_grad()
    work()
    return [parameter.grad.float().clone() for parameter in trainer.model.theta]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|, all tensors in one."""
    a, b = (torch.cat([x.flatten() for x in parts]) for parts in (a, b))
    return ((a - b).norm() / b.norm()).item()


def ratio(pairs: list[tuple[float, float]]) -> str:
    """Of a over b: the median and the ends."""
    found = sorted(a / b for a, b in pairs)
    return f"{found[len(found) // 2]:.2f} [{found[0]:.2f}, {found[-1]:.2f}]"


def as_on_a_gpu(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Without a device, torch would choose the one that keeps all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def count_sizes(args: Arguments) -> SimpleNamespace:
    """What an image takes, in GB of activations and in TFLOP, and the networks' 1e9 parameters.

    Shapes alone run through the networks, and nothing is allocated. Autograd tells what it keeps
    for the backward, and torch counts the FLOPs of matrix products, attention and convolutions.
    """
    dtype, side = torch.bfloat16, args.resolution // 8

    def count(network: nn.Module) -> float:
        return sum(parameter.numel() for parameter in network.parameters()) / 1e9

    def forward() -> Tensor:
        tokens = torch.empty(1, 77 + args.max_sequence_length, 4096, dtype=dtype)
        latents, pooled = (torch.empty(1, *s, dtype=dtype) for s in ((16, side, side), (2048,)))
        return transformer(latents, tokens, pooled, torch.empty(1))[0]

    def kept() -> float:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _output = forward()  # keeps the graph
        weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}
        return sum(size for key, size in storages.items() if key not in weights) / 1e9

    def tflop(work: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e12

    size = SimpleNamespace()
    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", as_on_a_gpu):
        transformer = SD3Transformer2DModel(**MEDIUM).to(dtype).requires_grad_(False)
        vae, eye = AutoencoderKL(**VAE), random_eye()
        size.transformer, size.vae = count(transformer), count(vae)
        size.t5 = count(transformers.T5EncoderModel(transformers.T5Config(**T5_XXL)))
        with torch.no_grad():
            size.reference = tflop(forward)
            size.decode = tflop(lambda: vae.decode(torch.empty(1, 16, side, side)))
            size.eye = tflop(lambda: eye(torch.empty(1, 3, 224, 224)))
        sd35.add_lora(transformer, args.rank, args.lora_alpha, args.seed, False)
        size.lora = count(transformer) - size.transformer
        transformer.to(dtype)  # as autocast has it, but for some copies in float32
        with torch.no_grad():
            size.theta = tflop(forward)
        size.whole = kept()
        transformer.enable_gradient_checkpointing()
        inputs = kept()
        size.checkpointed = inputs + (size.whole - inputs) / 24  # a block is computed again
        if not args.gradient_checkpointing:
            transformer.disable_gradient_checkpointing()
        size.backward = tflop(lambda: forward().sum().backward())
    return size


def plan_memory(args: Arguments, size: SimpleNamespace) -> None:
    """Prints the GB that SD3.5 Medium takes in bf16."""
    # The decoder's widest map has 256 channels at full size; a few of them live at once.
    decode = 4 * (256 * args.resolution**2 * 4) / 1e9
    always = 2 * size.transformer + 24 * size.lora + 4 * size.vae
    # Adam, theta_old and the saved average stay while the others make room for a text encoder.
    encoding = 2 * size.t5 + 16 * size.lora
    lora = f"LoRA, {1000 * size.lora:.1f} M in float32"
    for name, gigabytes in {
        f"transformer, {size.transformer:.2f} G parameters in bf16": 2 * size.transformer,
        f"{lora}, its gradient, Adam, theta_old and saved average": 24 * size.lora,
        "VAE in float32": 4 * size.vae,
        "T5 in bf16, the largest text encoder, without activations": 2 * size.t5,
        "together, while prompts are encoded, without transformer and VAE": encoding,
    }.items():
        print(f"{gigabytes:8.2f}  {name}")
    numbers = sorted({1, 2, 4, 8, 12, 24, 48, args.micro_batch_size} - {0})
    print(f"together, by images a pass {''.join(f'{m:8d}' for m in numbers)}")
    rows = {"training": size.checkpointed, "  without checkpointing": size.whole}
    for name, each in {**rows, "decoding, about": decode}.items():
        print(f"{name:27}{''.join(f'{always + m * each:8.2f}' for m in numbers)}")
    print(f"Most images a pass, if a tenth and {REWARD_GB} GB stay free, which PickScore takes:")
    for card in (16, 24, 40, 80):
        room = 0.9 * card - REWARD_GB
        most = [int((room - always) / max(decode, each)) for each in rows.values()]
        fits = f"{most[0]}, and {most[1]} without gradient checkpointing"
        print(f"{card:8} GB  {fits if room > encoding else 'no room for a text encoder'}")


def step_tflop(
    args: Arguments,
    size: SimpleNamespace,
    train_samples: int | None = None,
    bound: float = 0.0,
    updates_per_rollout: int = 1,
) -> dict[str, float]:
    """TFLOP of a rollout of all groups and its training, by phase.

    train_samples: m of a group's G samples are trained on, by default all. bound: theta_old is
    asked for it, as for the clip, and once for both. updates_per_rollout: how often the samples of
    a rollout are trained on.
    """
    G, m = args.group_size, train_samples or args.group_size
    scales = (args.guidance_scale, args.reference_guidance_scale)
    guided, guided_reference = (1 if scale == 1 else 2 for scale in scales)
    asked = bool(args.clip or bound) + (args.micro_batch_size < m)  # theta_old; theta for the gap
    train = guided_reference * size.reference + asked * size.theta + size.backward
    each = {
        "rollout": args.num_inference_steps * guided * size.theta,
        "decode": size.decode,
        "reward, PickScore's eye": size.eye,
        "train": args.train_timesteps * train * m / G * updates_per_rollout,
    }
    return {name: args.prompts_per_step * G * tflop for name, tflop in each.items()}


def plan(args: Arguments) -> None:
    """Prints what SD3.5 Medium takes in bf16 at these settings: counted, not measured."""
    size = count_sizes(args)
    print(f"SD3.5 Medium in bf16 at {args.resolution} px, LoRA of rank {args.rank}, in GB")
    plan_memory(args, size)
    work = step_tflop(args, size)
    print(f"TFLOP of a step of {args.prompts_per_step} groups of {args.group_size}:")
    for name, tflop in {**work, "together": sum(work.values())}.items():
        print(f"{tflop:8.0f}  {name}")
    hours = sum(work.values()) * args.max_train_steps / 3600 / 400
    print(f"{hours:8.1f}  hours for {args.max_train_steps} steps, at 400 TFLOP/s all the time")


# torch counts the FLOPs of attention on a GPU, and leaves out that of a CPU, which has the same.
FLOPS = dict(flop_registry)
for of in ("", "_backward"):
    name = "_scaled_dot_product_flash_attention"
    on_cpu = getattr(torch.ops.aten, f"{name}_for_cpu{of}")
    FLOPS[on_cpu] = FLOPS[getattr(torch.ops.aten, name + of)]


class Account(TorchDispatchMode):
    """FLOPs, bytes and the least seconds of each phase, operation by operation.

    An operation takes at least its FLOPs at the peak of matrix products in its precision ("busy"),
    and at least its bytes, in and out, at the peak of memory (the roofline; Williams et al. 2009).
    Fused kernels and caches move fewer bytes than are counted. "looks" is how often the host needs
    a number from the device, and on a GPU waits for it.
    """

    def __init__(self, peaks: dict[torch.dtype, float], bandwidth: float):
        super().__init__()
        self.peaks, self.bandwidth = peaks, bandwidth
        self.phases: dict[str, Counter[str]] = {}  # the seconds also by kind of operation

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.now = self.phases.setdefault(phase, Counter())
        with self:
            yield

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, operation = kwargs or {}, func._overloadpacket
        if operation not in FLOPS:  # if it is made of others, count those
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func.is_view or "view" in str(func) or "empty" in str(func):
            return out
        flops = FLOPS[operation](*args, **kwargs, out_val=out) if operation in FLOPS else 0
        moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
        dtype = next((x.dtype for x in tree_leaves(out) if torch.is_tensor(x)), None)
        busy = flops / self.peaks.get(dtype, self.peaks[torch.float32])
        least = max(busy, moved / self.bandwidth)
        kind = "attention" if "attention" in str(func) else "products"
        self.now.update({"flops": flops, "bytes": moved, "busy": busy, "seconds": least})
        self.now[kind if operation in FLOPS else "others"] += least
        self.now["looks"] += operation is torch.ops.aten._local_scalar_dense
        return out


def measured_peaks(device: torch.device) -> tuple[dict[torch.dtype, float], float]:
    """FLOPs a second of a large matrix product by precision, bytes a second of a large copy."""
    n, peaks = 8192 if device.type == "cuda" else 2048, {}

    def best(work: Callable[[], Any]) -> float:
        return min([seconds(device, work) for _ in range(6)][1:])  # the first is to warm up

    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
        peaks[dtype] = 2 * n**3 / best(partial(torch.matmul, a, b))
    c = torch.empty(16 * n * n, device=device, dtype=torch.uint8)
    return peaks, 2 * c.nbytes / best(c.clone)


def bare_passes(
    trainer: Trainer, text: str, reward: rewards.Reward | None, clock: Clock | Account
) -> None:
    """A group's network passes by themselves: the same batches, nothing around them."""
    args, model, m = trainer.args, trainer.model, trainer.model.images_a_pass
    x0 = torch.randn(args.group_size, *model.latent_shape, device=trainer.device)
    found = model.embedding(text)

    def forward(x: Tensor, guidance: float = 1.0) -> Tensor:
        x = x.repeat(1 if guidance == 1 else 2, 1, 1, 1)
        embeds, pooled = found.embeds.expand(len(x), -1, -1), found.pooled.expand(len(x), -1)
        with model.autocast():
            return model.pipe.transformer(x, embeds, pooled, torch.full_like(x[:, 0, 0, 0], 800))[0]

    with clock("rollout"), torch.no_grad():
        for x in x0.split(m):
            for _ in range(args.num_inference_steps):
                forward(x, args.guidance_scale)
    with clock("decode"):
        images = model.decode(x0)
    if reward:
        with clock("reward"):
            reward(images, [])
    times_a_pass = max(1, m // args.group_size)  # as backward_group has it
    with clock("train"):
        for rows in x0.repeat(args.train_timesteps, 1, 1, 1).split(times_a_pass * args.group_size):
            batches = rows.split(m)
            for x in batches:
                with torch.no_grad():
                    with model.reference():
                        forward(x, args.reference_guidance_scale)
                    for _ in range(bool(args.clip) + (len(batches) > 1)):  # old, theta for the gap
                        forward(x)
                forward(x).float().mean().backward()


def step(args: Arguments) -> None:
    """Times steps against their bare network passes, in one run.

    Beside it what the passes must take at the machine's measured peaks, and the share of the peak
    of matrix products that they reach (MFU). Recomputed activations count as work. "products" is
    the share of products, attention and convolutions in the time at the peaks. With random weights,
    the reward is random, and costs what PickScore's eye does: not its text encoder, nor resizing.
    """
    texts = ["", *(f"prompt {p}" for p in range(args.prompts_per_step))]
    trainer, random = load(args, texts)
    eye = random_eye().to(trainer.device) if random else None

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[dict]) -> Tensor:
        if eye is None:
            return torch.rand(len(images))
        return eye(F.interpolate(images, (224, 224))).pooler_output.mean(1)

    trainer.scorers = {"random": (1.0, reward)}
    chosen = [{"prompt": text} for text in texts[1:]]
    groups = len(trainer.own(chosen))
    peaks, bandwidth = measured_peaks(trainer.device)
    account = Account(peaks, bandwidth)
    passes = partial(bare_passes, trainer, texts[1], reward if random else None)
    trainer.take_step(chosen, 0)  # warm
    passes(account)
    steps, bare = Counter(), Counter()
    for i in range(1, args.repeats + 1):
        metrics = trainer.take_step(chosen, i)
        steps.update({k: v / args.repeats for k, v in metrics.items() if v is not None})
        clock = Clock(trainer.device)
        passes(clock)
        bare.update({k: groups * v / args.repeats for k, v in clock.seconds.items()})
    if not trainer.accelerator.is_main_process:
        return
    print(
        f"at most {peaks[torch.float32] / 1e12:.3g} TFLOP/s in float32, "
        f"{peaks[torch.bfloat16] / 1e12:.3g} in bf16, and {bandwidth / 1e9:.3g} GB/s\n"
        f"{'seconds a step':16}{'ours':>10}{'bare passes':>14}{'overhead':>10}"
        f"{'TFLOP':>10}{'GB':>10}{'at the peaks':>14}{'products':>10}{'MFU':>8}"
    )
    account.phases["step"] = sum(account.phases.values(), Counter())
    for phase, counted in account.phases.items():
        ours = steps["seconds" if phase == "step" else f"seconds/{phase}"]
        alone = bare.total() if phase == "step" else bare[phase]
        flops, moved, least = (groups * counted[k] for k in ("flops", "bytes", "seconds"))
        products, used = (
            1 - counted["others"] / counted["seconds"],
            groups * counted["busy"] / alone,
        )
        print(
            f"{phase:16}{ours:>10.3f}{alone:>14.3f}{ours / alone - 1:>10.1%}{flops / 1e12:>10.3g}"
            f"{moved / 1e9:>10.3g}{least:>14.3f}{products:>10.1%}{used:>8.1%}"
        )
    print(f"{steps['images_per_second']:.3f} images a second trained on")
    if "peak_memory_gb" in metrics:
        print(f"{metrics['peak_memory_gb']:.2f} GB at most")


def plain_group(trainer: Trainer, step: int, p: int, x0: Tensor, advantages: Tensor) -> None:
    """A group's step from the paper's formulas and autograd alone, without dgpo.py.

    It is the schedule of the authors' released trainer: the whole group in one batch, the
    reference, theta_old and theta as three passes at every timestep, and after each a look at the
    numbers, which waits for the device.
    """
    args, model, K = trainer.args, trainer.model, trainer.args.train_timesteps
    generator = train_sd35.seeded(args.seed, train_sd35.TIMES, step)
    order = torch.randperm(len(trainer.times), generator=generator)
    for k, index in enumerate(order[:K]):
        t = trainer.times[index].item()
        eps = trainer.noise(train_sd35.TRAINING_NOISE, step, p, k).to(x0.device)
        theta = model.velocity(TEXT)
        guided = model.velocity(TEXT, args.reference_guidance_scale)
        times = torch.full((len(x0),), t, device=x0.device)
        asked = ((1 - t) * x0 + t * eps, times, times)
        with torch.no_grad(), model.reference():
            v_frozen = guided(*asked)
        with torch.no_grad(), model.theta_old():
            v_old = theta(*asked)
        v, v_ref = theta(*asked), v_old if args.ema_reference else v_frozen
        loss, loss_ref, loss_old = (
            (u - (eps - x0)).square().mean((1, 2, 3)) for u in (v, v_ref, v_old)
        )
        ratio = (loss_old - loss).exp().detach()
        far = torch.where(advantages > 0, ratio > 1 + args.clip, ratio < 1 - args.clip)
        seen = torch.where(far & bool(args.clip), loss.detach(), loss)
        S = (advantages * (seen - loss_ref)).mean()
        eq17 = -F.logsigmoid(-args.beta * S) / args.beta
        penalty = (v - v_frozen).square().mean()
        total = (eq17 + args.kl * penalty) / K / args.prompts_per_step
        total.backward()
        _ = [number.item() for number in (total, S, penalty, ratio.mean())]


def plain(args: Arguments) -> None:
    """Our group's step against the plain one, and in bf16 against float32."""
    trainer, *group = prepare(args)
    model, device = trainer.model, trainer.device
    ours = partial(trainer.backward_group, 0, 0, TEXT, *group)
    theirs = partial(plain_group, trainer, 0, 0, *group)
    found = distance(gradients(trainer, ours), gradients(trainer, theirs))  # and both are warm now
    took = [(seconds(device, theirs), seconds(device, ours)) for _ in range(args.repeats)]
    mean_plain, mean_ours = (sum(times) / args.repeats for times in zip(*took, strict=True))
    print(f"group of {args.group_size}, micro-batches of {model.images_a_pass}, {args.recipe}")
    print(f"plain step {mean_plain:.3f} s, ours {mean_ours:.3f} s")
    print(f"plain / ours {ratio(took)}")
    print(f"difference of the gradients, of their norm: {found:.2e}")

    def work_in(autocast: Callable) -> tuple[list[Tensor], dict[str, Tensor]]:
        # Entered anew at every pass, as the trainer does: it keeps what it has cast.
        with patch.object(model, "autocast", autocast):
            return gradients(trainer, ours), ours()

    bf16 = partial(torch.autocast, device.type, torch.bfloat16)
    half, metrics = work_in(bf16)
    for model.images_a_pass in sorted({1, 4, args.group_size}):
        apart, m = distance(work_in(bf16)[0], half), model.images_a_pass
        print(f"bf16, micro-batches of {m}: the gradient differs by {apart:.2e} of its norm")
    model.pipe.transformer.float()
    exact, numbers = work_in(nullcontext)
    named = [name for name, p in model.pipe.transformer.named_parameters() if p.requires_grad]
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


@contextmanager
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


def attention(backend: str, trainer: Trainer) -> AbstractContextManager:
    return sdpa_kernel(getattr(SDPBackend, backend))


def twice_the_images(trainer: Trainer) -> AbstractContextManager:
    """Which is what reference and theta_old in one batch would be, too."""
    return patch.object(trainer.model, "images_a_pass", 2 * trainer.model.images_a_pass)


@contextmanager
def vae_to(name: str, there: object, back: object, trainer: Trainer) -> Iterator[None]:
    """In bf16 its values are rounded for good, but its speed is the same again afterwards."""
    trainer.model.pipe.vae.to(**{name: there})
    try:
        yield
    finally:
        trainer.model.pipe.vae.to(**{name: back})


# The change, the phases it may help, and the operations whose time at the peaks it may save; or
# None, where what it does itself can be counted.
BOTH, BACKENDS = ("rollout", "train"), "FLASH_ATTENTION CUDNN_ATTENTION EFFICIENT_ATTENTION MATH"
LAST = partial(vae_to, "memory_format", torch.channels_last, torch.contiguous_format)
HALF = partial(vae_to, "dtype", torch.bfloat16, torch.float32)
CHANGES: list[tuple[str, Callable, tuple[str, ...], str | None]] = [
    ("torch.compile of the blocks", compiled, BOTH, "others"),
    *(
        (f"attention: {n.lower()}", partial(attention, n), BOTH, "attention")
        for n in BACKENDS.split()
    ),
    ("twice the images in a pass", twice_the_images, BOTH, None),
    ("VAE channels-last", LAST, ("decode",), None),
    ("VAE in bf16", HALF, ("decode",), None),
]


def graphs() -> int:
    """That torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def changes(args: Arguments) -> None:
    """A phase of one group without and with each change in turn.

    The prediction is a bound: nothing is faster than the FLOPs and bytes that remain, at the peaks
    that are measured here. For a small model it is none: what lies in a cache is not fetched.
    """
    trainer, x0, advantages = prepare(args)
    model, device = trainer.model, trainer.device
    account = Account(*measured_peaks(device))
    sampled = (TEXT, torch.randn(x0.shape), args.num_inference_steps, args.guidance_scale)
    trained = partial(trainer.backward_group, 0, 0, TEXT, x0, advantages)
    phases: dict[str, Callable[[], list[Tensor]]] = {
        "rollout": lambda: [model.sample(*sampled)],
        "decode": lambda: [model.decode(x0)],
        "train": lambda: gradients(trainer, trained),
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
            before, start = graphs(), time.perf_counter()
            try:
                with change(trainer):
                    changed = [x.float() for x in work()]
            except RuntimeError as error:  # no such attention here
                print(f"| {title} | {name} | - | {first_line(error)} | - |", flush=True)
                continue
            first, made, took = time.perf_counter() - start, graphs(), []
            for _ in range(args.repeats):
                slow = seconds(device, work)
                with change(trainer):
                    took.append((slow, seconds(device, work)))
            least = counted["seconds"] - counted[saved]
            if saved is None:
                with account("changed"), change(trainer):
                    work()
                least = account.phases.pop("changed")["seconds"]
            bound = min(slow for slow, _ in took) / least
            off = distance(changed, unchanged[name])
            print(f"| {title} | {name} | {bound:.2f} | {ratio(took)} | {off:.1e} |", flush=True)
            if made > before:
                more = f"{graphs() - made} more in {args.repeats} repetitions"
                print(f"({made - before} graphs made in {first:.0f} s, {more})")
    # What is copied to the device, embeddings, noise and advantages, makes the host wait, too.
    looks = account.phases["train"]["looks"]
    print(f"the host waits for a number {looks} times in a group's training")


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
