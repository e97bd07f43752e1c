"""What a step takes: memory, FLOPs, seconds; and what would make it faster.

    python bench.py plan       the memory and FLOPs of SD3.5 Medium at the settings given, counted
    python bench.py step       seconds of a step, against those of its bare network passes
    python bench.py plain      seconds and gradients of a step, against a plain one; and in bf16
    python bench.py changes    what would make a step faster, and how far it moves the result

Each takes train_sd35.py's arguments, and --repeats. Without --model, weights of SD3.5 Medium's
geometry are random: for a GPU, and without any download. On a CPU, give --model toy/out/shapes
--resolution 16 --max_sequence_length 7. The plan allocates nothing.

Like a test, this file imports the trainer: what is timed is its own step, and not a copy of it.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also for `python -I`

import cli
import recipes


@dataclass
class Arguments(recipes.Arguments):
    """Count or measure a step of the trainer, with its own arguments, as SD3.5 Medium allows."""

    repeats: int = cli.option(5, "How often work is timed.", at_least=1, at_most=1_000_000)
    resolution: int = cli.option(512, "Side of images in pixels.", at_least=16, at_most=6144)
    rank: int = cli.option(64, "Rank of the LoRA.", at_least=1, at_most=1536)


def read_command() -> str:
    """The command. Raises Fault if there is none, and SystemExit after the help."""
    command = (*sys.argv, "--help")[1]
    if command in ("-h", "--help"):
        sys.exit(print(__doc__ or "bench.py plan, step, plain or changes, and arguments"))
    if command not in ("plan", "step", "plain", "changes"):
        raise cli.Fault(f"the command must be plan, step, plain, changes, got {command!r}")
    return command


def read_line() -> None:
    """Raises as `read_command`, and Fault at a wrong argument, before a library is loaded."""
    read_command()
    recipes.read_arguments(Arguments, sys.argv[2:])


if __name__ == "__main__":
    cli.run("bench.py", read_line)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import rewards
import sd35
import train_sd35
from records import Clock
from train_sd35 import Trainer

TEXT = "a prompt"
REWARD_GB = 3.9  # PickScore's weights in float32

# The networks' geometry, where it is not their classes' default.
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MEDIUM |= {"pos_embed_max_size": 384, "dual_attention_layers": range(13), "qk_norm": "rms_norm"}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "use_quant_conv": False}
VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False}
VAE |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"feed_forward_proj": "gated-gelu"}
PICKSCORE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
PICKSCORE |= {"num_attention_heads": 16, "patch_size": 14}  # of its images: a CLIP ViT-H/14


def random_pickscore() -> rewards.Reward:
    """A reward that costs what PickScore's network of images does: weights are random."""
    config = transformers.CLIPVisionConfig(**PICKSCORE)
    network = transformers.CLIPVisionModel(config).requires_grad_(False).eval()
    return lambda images, _: network(F.interpolate(images, (224, 224))).pooler_output.mean(1)


def tflop(work: Callable[[], object]) -> float:
    """TFLOP of matrix products, convolutions and attention."""
    name = "_scaled_dot_product_flash_attention_for_cpu"  # which torch itself does not count
    forward, backward = (getattr(torch.ops.aten, name + end) for end in ("", "_backward"))
    formulas = {forward: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}
    formulas[backward] = lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops() / 1e12


def as_on_a_gpu(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention without a device, where torch would choose one that keeps all scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def count_sizes(args: Arguments) -> SimpleNamespace:
    """What an image takes: activations in GB and passes in TFLOP; and the networks' 1e9 parameters.

    Shapes alone run through the networks, and nothing is allocated. Autograd tells what it keeps
    for the backward pass: whole, or checkpointed. backward includes the forward pass before it.
    """
    dtype, side, size = torch.bfloat16, args.resolution // 8, SimpleNamespace()

    def count(network: nn.Module) -> float:
        # The transformer's table of positions is a buffer, and takes memory like a weight.
        return sum(x.numel() for x in (*network.parameters(), *network.buffers())) / 1e9

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

    with torch.device("meta"), patch.object(F, "scaled_dot_product_attention", as_on_a_gpu):
        transformer = SD3Transformer2DModel(**MEDIUM).to(dtype).requires_grad_(False)
        vae, reward = AutoencoderKL(**VAE), random_pickscore()
        size.transformer, size.vae = count(transformer), count(vae)
        size.t5 = count(transformers.T5EncoderModel(transformers.T5Config(**T5_XXL)))
        with torch.no_grad():
            size.reference = tflop(forward)
            size.decode = tflop(lambda: vae.decode(torch.empty(1, 16, side, side)))
            size.reward = tflop(lambda: reward(torch.empty(1, 3, 224, 224), []))
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
    for name, gigabytes in {
        f"transformer, {size.transformer:.2f} G weights in bf16": 2 * size.transformer,
        f"LoRA, {1000 * size.lora:.1f} M in float32, its gradient, Adam, averages": 24 * size.lora,
        "VAE in float32": 4 * size.vae,
        "T5 in bf16, the largest text encoder, without activations": 2 * size.t5,
        "together, while prompts are encoded, without transformer and VAE": encoding,
    }.items():
        print(f"{gigabytes:8.2f}  {name}")
    numbers = sorted({1, 2, 4, 8, 12, 24, 48, args.micro_batch_size} - {0})
    print(f"together, by images a pass {''.join(f'{m:8d}' for m in numbers)}")
    rows = {"training": size.checkpointed, "  without checkpointing": size.whole}
    for name, each in rows.items():
        print(f"{name:27}{''.join(f'{always + m * each:8.2f}' for m in numbers)}")
    together = max(1, sd35.DECODED // (args.resolution // 8) ** 2)  # the VAE has passes of its own
    shown = (f"{always + min(m, together) * decode:8.2f}" for m in numbers)
    print(f"{'decoding, about':27}{''.join(shown)}")
    print(f"Most images a pass, if a tenth and {REWARD_GB} GB stay free, which PickScore takes:")
    for card in (16, 24, 40, 80):
        room = 0.9 * card - REWARD_GB
        decodes = always + together * decode <= room
        most = [int((room - always) / (each if decodes else decode)) for each in rows.values()]
        fits = f"{most[0]}, and {most[1]} without gradient checkpointing"
        print(f"{card:8} GB  {fits if room > encoding else 'no room for a text encoder'}")


def asks_old(args: Arguments) -> bool:
    """Whether a step asks theta_old, once for all: for the clip or bound, or as the reference."""
    return bool(args.clip or args.bound or args.ema_reference)


def step_tflop(args: Arguments, size: SimpleNamespace) -> dict[str, float]:
    """TFLOP of a rollout of all groups and its training, by phase.

    A rollout's samples, m a group, are trained on --updates_per_rollout times.
    """
    G, m = args.group_size, args.train_samples or args.group_size
    scales = (args.guidance_scale, args.reference_guidance_scale)
    guided, guided_reference = (1 if scale == 1 else 2 for scale in scales)
    asked = asks_old(args) + (0 < args.micro_batch_size < m)  # theta_old, and theta for the gap
    train = guided_reference * size.reference + asked * size.theta + size.backward
    each = {
        "rollout": args.num_inference_steps * guided * size.theta,
        "decode": size.decode,
        "reward, PickScore's network of images": size.reward,
        "train": args.train_timesteps * train * m / G * args.updates_per_rollout,
    }
    return {name: args.prompts_per_step * G * work for name, work in each.items()}


def plan(args: Arguments) -> None:
    """Prints what SD3.5 Medium takes in bf16 at these settings: counted, not measured."""
    size = count_sizes(args)
    print(f"SD3.5 Medium in bf16 at {args.resolution} px, LoRA of rank {args.rank}, in GB")
    plan_memory(args, size)
    phases = step_tflop(args, size)
    print(f"TFLOP of a step of {args.prompts_per_step} groups of {args.group_size}:")
    for name, work in {**phases, "together": sum(phases.values())}.items():
        print(f"{work:8.0f}  {name}")
    for rate, card in (400, "an H100 at best"), (70, "a card of 24 GB, perhaps"):
        hours = sum(phases.values()) * args.max_train_steps / 3600 / rate
        print(f"{hours:8.1f}  hours for {args.max_train_steps} steps at {rate} TFLOP/s: {card}")


def random_pipeline(dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Transformer and VAE of SD3.5 Medium with random weights, without text encoders."""
    # torch's own initialisation would take twice the memory, in float32, and some minutes.
    with torch.device("meta"):
        transformer, vae = SD3Transformer2DModel(**MEDIUM).to(dtype), AutoencoderKL(**VAE)
    for network in (transformer, vae):
        network.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
        network.requires_grad_(False).eval()
        for x in (*network.parameters(), *network.buffers()):
            x.normal_(std=0.02)
    parts = {**dict.fromkeys(sd35.PARTS), "transformer": transformer, "vae": vae}
    pipe = StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(args: Arguments, texts: list[str]) -> Trainer:
    """A trainer that knows these prompts, with random weights if none are given."""
    accelerator = train_sd35.launch(args)
    torch.manual_seed(args.seed)
    name, dtype = args.pretrained_model_name_or_path, train_sd35.precision(args)
    if name == recipes.MEDIUM:
        pipe, shapes = random_pipeline(dtype), ((1, 77 + args.max_sequence_length, 4096), (1, 2048))
        encoded = {text: sd35.Encoded(*map(torch.randn, shapes)) for text in texts}
    else:
        pipe = sd35.load_pipeline(name, dtype, (args.resolution, args.rank))
        encoded = sd35.Encoder(pipe, args.max_sequence_length, accelerator.device)(texts, {})
    trainer = train_sd35.build(args, accelerator, pipe)
    trainer.model.encoded = encoded
    if not trainer.model.images_a_pass:
        print(f"--micro_batch_size auto: {train_sd35.fit_micro_batch(trainer)}")
    return trainer


def prepare(args: Arguments) -> tuple[Trainer, Tensor, Tensor]:
    """A trainer with a LoRA that does something, latents x0 (G, C, h, w) and advantages (G,)."""
    trainer = load(args, ["", TEXT])
    with torch.no_grad():
        for theta, old in zip(trainer.model.theta, trainer.model.old, strict=True):
            theta.add_(0.02 * torch.randn_like(theta))
            old.copy_(theta + 0.002 * torch.randn_like(theta))
    x0 = torch.randn(args.group_size, *trainer.model.latent_shape)
    advantages = torch.linspace(-1.7, 1.7, args.group_size)  # the mean is 0, the std about 1
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
    """The median of a over b, and its ends."""
    found = sorted(a / b for a, b in pairs)
    return f"{found[len(found) // 2]:.2f} [{found[0]:.2f}, {found[-1]:.2f}]"


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product in this precision, measured."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    took = [seconds(device, partial(torch.matmul, a, b)) for _ in range(6)]
    return 2 * n**3 / min(took[1:])  # the first is to warm up


def bare_passes(trainer: Trainer, text: str) -> dict[str, Callable[[], object]]:
    """A group's network passes by themselves, by phase: the same batches, nothing around them."""
    args, model, m = trainer.args, trainer.model, trainer.model.images_a_pass
    x0 = torch.randn(args.group_size, *model.latent_shape, device=trainer.device)
    found = model.embedding(text)

    def forward(x: Tensor, guidance: float = 1.0) -> Tensor:
        x = x.repeat(1 if guidance == 1 else 2, 1, 1, 1)
        embeds, pooled = found.embeds.expand(len(x), -1, -1), found.pooled.expand(len(x), -1)
        with model.autocast():
            return model.pipe.transformer(x, embeds, pooled, torch.full_like(x[:, 0, 0, 0], 800))[0]

    @torch.no_grad()
    def rollout() -> None:
        for x in x0.split(m):
            for _ in range(args.num_inference_steps):
                forward(x, args.guidance_scale)

    def train() -> None:
        # The reference, theta_old for clip or bound, theta for the gap of a group in parts, theta.
        chosen = x0[: args.train_samples]
        rows = chosen.repeat(args.updates_per_rollout * args.train_timesteps, 1, 1, 1)
        for together in rows.split(max(1, m // len(chosen)) * len(chosen)):  # as backward_group
            batches = together.split(m)
            for x in batches:
                with torch.no_grad():
                    with model.reference():
                        forward(x, args.reference_guidance_scale)
                    for _ in range(asks_old(args) + (len(batches) > 1)):
                        forward(x)
                forward(x).float().mean().backward()

    return {"rollout": rollout, "decode": partial(model.decode, x0), "train": train}


def step(args: Arguments) -> None:
    """Times steps against their bare network passes, in one run.

    MFU is our step's share of the peak of matrix products, measured on this machine in the
    transformer's precision; VAE and reward, in float32, reach less. Activations that are computed
    again count. The reward is random; with random weights it costs what PickScore's images do.
    """
    texts = ["", *(f"prompt {p}" for p in range(args.prompts_per_step))]
    trainer, chosen = load(args, texts), [{"prompt": text} for text in texts[1:]]
    groups, passes = len(trainer.own(chosen)), bare_passes(trainer, texts[1])
    random = args.pretrained_model_name_or_path == recipes.MEDIUM
    with trainer.device:
        reward = random_pickscore() if random else lambda images, _: torch.rand(len(images))
        images = torch.rand(args.group_size, 3, args.resolution, args.resolution)
    passes |= {"reward": partial(reward, images, [])} if random else {}
    trainer.trained_on = {"random": (1.0, reward)}

    trainer.take_step(chosen, 0)  # to warm up, as counting warms up the bare passes
    work = Counter({phase: groups * tflop(run) for phase, run in passes.items()})
    ours, bare = Counter(), Counter()
    for i in range(1, args.repeats + 1):
        metrics = trainer.take_step(chosen, i)
        ours.update({k: v / args.repeats for k, v in metrics.items() if v is not None})
        for phase, run in passes.items():
            bare[phase] += groups * seconds(trainer.device, run) / args.repeats
    if not trainer.accelerator.is_main_process:
        return

    most = peak(trainer.device, train_sd35.precision(args)) / 1e12
    print(f"matrix products in {train_sd35.precision(args)}: at most {most:.3g} TFLOP/s")
    print("seconds a step        ours   bare passes  overhead     TFLOP     MFU")
    ours["seconds/step"], bare["step"], work["step"] = ours["seconds"], bare.total(), work.total()
    for phase in work:
        mine, alone = ours[f"seconds/{phase}"], bare[phase]
        shares = f"{mine / alone - 1:10.1%}{work[phase]:10.3g}{work[phase] / mine / most:8.1%}"
        print(f"{phase:16}{mine:10.3f}{alone:14.3f}{shares}")
    print(f"{ours['images_per_second']:.3f} images a second trained on")
    if "peak_memory_gb" in metrics:
        print(f"{metrics['peak_memory_gb']:.2f} GB at most")


def plain_group(trainer: Trainer, step: int, p: int, x0: Tensor, advantages: Tensor) -> None:
    """A group's step from the paper's formulas and autograd alone, without dgpo.py.

    It has the schedule of the authors' released trainer: the whole group in one batch, three passes
    at every timestep, and after each timestep a look at the numbers, which waits for the device.
    It knows no --bound.
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
        errors = (u - (eps - x0) for u in (v, v_ref, v_old))
        loss, loss_ref, loss_old = (error.square().mean((1, 2, 3)) for error in errors)
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
    if args.bound:
        raise cli.Fault("argument --bound: the plain step knows none; leave it out")
    trainer, *group = prepare(args)
    model, device = trainer.model, trainer.device
    ours = partial(trainer.backward_group, 0, 0, TEXT, *group)
    theirs = partial(plain_group, trainer, 0, 0, *group)
    found = distance(gradients(trainer, ours), gradients(trainer, theirs))  # and both are warm now
    took = [(seconds(device, theirs), seconds(device, ours)) for _ in range(args.repeats)]
    mean_plain, mean_ours = (sum(times) / args.repeats for times in zip(*took, strict=True))
    print(f"group of {args.group_size}, micro-batches of {model.images_a_pass}, {args.recipe}")
    print(f"plain step {mean_plain:.3f} s, ours {mean_ours:.3f} s; plain / ours {ratio(took)}")
    print(f"difference of the gradients, of their norm: {found:.2e}")

    with patch.object(model, "autocast", partial(torch.autocast, device.type, torch.bfloat16)):
        half = gradients(trainer, ours)
    model.pipe.transformer.float()
    with patch.object(model, "autocast", nullcontext):
        found = distance(half, gradients(trainer, ours))
    print(f"difference of the gradient in bf16 from that in float32, of its norm: {found:.2e}")


@contextmanager
def compiled(trainer: Trainer, backend: str = "inductor") -> Iterator[None]:
    """The transformer's blocks, each by itself: those that are alike share what is compiled."""
    # Three kinds of block, with and without LoRA, gradients and a second batch size are more than
    # the 8 graphs after which torch gives up without an error.
    with torch._dynamo.config.patch(recompile_limit=64), ExitStack() as undo:
        for block in trainer.model.pipe.transformer.transformer_blocks:
            block.compile(backend=backend)
            undo.callback(setattr, block, "_compiled_call_impl", None)
        yield


def twice_the_images(trainer: Trainer) -> AbstractContextManager:
    return patch.object(trainer.model, "images_a_pass", 2 * trainer.model.images_a_pass)


KERNELS = [getattr(SDPBackend, f"{name}_ATTENTION") for name in ("FLASH", "CUDNN", "EFFICIENT")]
KERNELS.append(SDPBackend.MATH)
CHANGES: dict[str, Callable[[Trainer], AbstractContextManager]] = {
    "torch.compile of the blocks": compiled,
    **{f"attention: {k.name.lower()}": lambda _, k=k: sdpa_kernel(k) for k in KERNELS},
    "twice the images in a pass": twice_the_images,  # as two models in one batch
}


def changes(args: Arguments) -> None:
    """Times a phase of a group without and with each change, and compares the results by norm."""
    trainer, x0, advantages = prepare(args)
    model, device = trainer.model, trainer.device
    trained = partial(trainer.backward_group, 0, 0, TEXT, x0, advantages)
    phases: dict[str, Callable[[], list[Tensor]]] = {
        "rollout": lambda: [model.sample(TEXT, x0, args.num_inference_steps, args.guidance_scale)],
        "train": lambda: gradients(trainer, trained),
    }
    unchanged = {name: [x.float() for x in work()] for name, work in phases.items()}
    print(f"a group of {args.group_size}, {model.images_a_pass} images a pass")
    print("| change | phase | times as fast | the result moves by | seconds at first |")
    print("|---" * 5 + "|")
    for title, change in CHANGES.items():
        for name, work in phases.items():
            try:
                with change(trainer):
                    first = seconds(device, work)
                    changed = [x.float() for x in work()]
            except RuntimeError as error:  # this machine has no such kernel
                print(f"| {title} | {name} | {cli.first_line(error)} | - | - |", flush=True)
                continue
            took = []
            for _ in range(args.repeats):
                slow = seconds(device, work)
                with change(trainer):
                    took.append((slow, seconds(device, work)))
            off = distance(changed, unchanged[name])
            print(f"| {title} | {name} | {ratio(took)} | {off:.1e} | {first:.1f} |", flush=True)


def main() -> None:
    work = {"plan": plan, "step": step, "plain": plain, "changes": changes}[read_command()]
    args = train_sd35.parse_args(sys.argv[2:], Arguments)
    if args.print_arguments:
        raise cli.Fault("argument --print_arguments: goes with train_sd35.py")
    work(args)


if __name__ == "__main__":
    cli.run("bench.py", main)
