"""A tiny pipeline of Stable Diffusion 3.5's own classes, built from nothing.

The text encoders are random and never trained, the VAE is exact by construction, and only the
transformer learns: first in `pretrain`, from noisy captions, then in train_sd35.py. `main` is the
script of a world, which is one of the modules shapes and words.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
import transformers
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import dgpo
from sd35.lora import load_lora
from sd35.model import load_pipeline, make_scheduler
from sd35.report import sheet
from sd35.run import read_metrics
from sd35.settings import UserError, parse

Pipeline = diffusers.StableDiffusion3Pipeline
# Guidance scale and sampler steps of the table's images. The first pair is that of the training.
CONDITIONS = {"": (1.0, 10), ", guidance 2": (2.0, 10), ", 28 steps": (1.0, 28)}


@dataclass
class Settings:
    """Pretrain the tiny SD3.5 of this world and print its table, or the table of LoRAs of it."""

    out: str | None = None  # The pipeline's folder. Default: tiny_sd35/out/ and the world's name.
    pretraining: int | None = None  # Steps of pretraining. Default: the world's.
    seed: int = 0  # Of the pretraining's data and noise.
    samples: int = 96  # Images of each task in the table.
    lora: list[str] = field(default_factory=list)  # Test these LoRAs' folders; do not pretrain.
    figure: str | None = None  # Draw images and the LoRAs' rewards in this file.


def clip_tokenizer(texts: list[str], tokens: int, spelt: bool = False) -> CLIPTokenizer:
    """A tokenizer of the words of these texts. spelt: one token per character instead."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    if spelt:
        characters = sorted(set("".join(texts).lower()))
        pieces = [*special, *characters, *(f"{character}</w>" for character in characters)]
        vocab, merges = {piece: i for i, piece in enumerate(pieces)}, []
    else:
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        bpe.normalizer = normalizers.Lowercase()
        bpe.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        )
        bpe.train_from_iterator(texts, trainer)
        model = json.loads(bpe.to_str())["model"]
        vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=special[1], model_max_length=tokens)


def t5_tokenizer(texts: list[str], tokens: int) -> T5TokenizerFast:
    """A T5 tokenizer with one token per word of the texts."""
    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=tokens)


def exact_vae(side: int, channels: int = 3, scale: float = 1.0) -> diffusers.AutoencoderKL:
    """An AutoencoderKL that needs no training: its latent is the image at half the size.

    side: in pixels. channels: 3 for the colors, or 1 for their mean. scale: factor of the latents.

    The GroupNorm and SiLU before each half's last layer must do nothing. So each signal s is paired
    with -s, and two channels hold constants C and -C: the mean is then 0, the std is C/2 up to a
    relative error of s^2/C^2, and the norm divides by a constant. A bias moves s to where SiLU is
    the identity.
    """
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=side,
        shift_factor=0.9,  # a light background is about 0 in the latents, as is the noise's mean
        scaling_factor=scale,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    constant, far = 256.0, 32.0
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            for name, parameter in half.named_parameters():
                # Residual blocks add nothing; the other layers named here are set below.
                if any(part in name for part in ("conv2", "sampler", "conv_in", "conv_out")):
                    parameter.zero_()
            for i in range(3):  # the image's color i and its latent channel
                latent = i % channels
                source, target = (i, latent) if half is vae.encoder else (latent, i)
                share = channels / 3 if half is vae.encoder else 1
                half.conv_in.weight[latent, source, 1, 1] = share
                half.conv_in.weight[3 + latent, source, 1, 1] = -share
                half.conv_out.weight[target, latent, 1, 1] = 1
                half.conv_out.bias[target] = -far
            half.conv_in.bias[6], half.conv_in.bias[7] = constant, -constant
            half.conv_norm_out.weight.fill_(constant / 2)
            half.conv_norm_out.bias.fill_(far)
        vae.encoder.conv_out.bias[channels:] = -30  # the log-variance
        i = torch.arange(8)  # each channel by itself: the mean of 2 x 2 pixels, and four copies
        vae.encoder.down_blocks[0].downsamplers[0].conv.weight[i, i, :2, :2] = 1 / 4
        vae.decoder.up_blocks[0].upsamplers[0].conv.weight[i, i, 1, 1] = 1
    return vae


def clip_encoder(tokenizer: CLIPTokenizer, gain: float) -> nn.Module:
    """A random CLIP text encoder that tells prompts apart.

    With the usual initialization, attention is uniform, positions have no effect, and the pooled
    embedding says little more than the prompt's length. gain: scales attention's output.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    config = transformers.CLIPTextConfig(**sizes, bos_token_id=0, eos_token_id=1)
    encoder = transformers.CLIPTextModelWithProjection(config)
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            weight.data.normal_()
        elif "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data *= 5
        elif "v_proj.weight" in name or "out_proj.weight" in name:
            weight.data *= gain
    return encoder


def build(
    clip: CLIPTokenizer, t5: Any, vae: Any, cell: int, width: int, layers: int, gain: float
) -> Pipeline:
    """An untrained pipeline, whose weights follow from torch's seed.

    t5: its tokenizer, or None to leave T5 out, as SD3.5's pipeline allows: zeros take its place.
    cell: side in pixels of the square that is a token of the transformer. width, layers: of the
    transformer. gain: see `clip_encoder`.
    """
    side, channels = vae.config.sample_size, vae.config.latent_channels
    encoder, encoder_2 = (clip_encoder(clip, gain) for _ in range(2))
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    t5_encoder = T5EncoderModel(T5Config(vocab_size=len(t5), **sizes)).eval() if t5 else None
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side // 2,
        patch_size=cell // 2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=64,  # T5's width, at least the sum of the two CLIPs'
        caption_projection_dim=width,
        pooled_projection_dim=64,  # the sum of the two CLIPs' widths
        pos_embed_max_size=side // cell,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = Pipeline(transformer, scheduler, vae, encoder, clip, encoder_2, clip, t5_encoder, t5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_tokens(pipe: Pipeline) -> int:
    """How many tokens T5 gives to the transformer: one, of zeros, if there is no T5."""
    return pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else 1


@torch.no_grad()
def encode(pipe: Pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (N, tokens, width) and pooled embeddings (N, width)."""
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": t5_tokens(pipe)}
    embeds, _, pooled, _ = pipe.encode_prompt(texts, texts, texts, **settings)
    return embeds, pooled


@torch.no_grad()
def to_latents(pipe: Pipeline, images: Tensor) -> Tensor:
    """Latents (N, C, h, w), as the transformer sees them, of images (N, 3, H, W) in [0, 1]."""
    x0 = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def pretrain(pipe: Pipeline, world: ModuleType, steps: int, seed: int = 0) -> Iterator[float]:
    """Train by flow matching; a share world.WRONG of the captions belongs to another image.

    A tenth of the captions is empty, so that guidance can be used. Yields the loss of each step.
    """
    prompts, wrong, batch = world.prompt_lists()["prompts"], world.WRONG, 32
    rng = random.Random(seed)
    torch.manual_seed(seed)
    embeds, pooled = encode(pipe, ["", *(prompt["prompt"] for prompt in prompts)])
    index = {prompt["prompt"]: i for i, prompt in enumerate(prompts, 1)}
    parameters = list(pipe.transformer.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    average = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps):
        warmup, decay = 50 * step / steps + 0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, warmup) * decay

        shown, others = ([world.draw_prompt(rng) for _ in range(batch)] for _ in range(2))
        captions = [b if rng.random() < wrong else a for a, b in zip(shown, others, strict=True)]
        rows = [0 if rng.random() < 0.1 else index[caption["prompt"]] for caption in captions]

        x0 = world.draw_latents(pipe, shown, rng)[:, None]
        u, eps = torch.rand(batch, 1), torch.randn(x0.shape)
        t = 3 * u / (1 + 2 * u)  # the sampler's shift
        v = pipe.transformer(
            dgpo.diffuse(x0, eps, t)[:, 0],
            encoder_hidden_states=embeds[rows],
            pooled_projections=pooled[rows],
            timestep=1000 * t[:, 0],
        ).sample
        loss = dgpo.dsm_loss(v[:, None], x0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        dgpo.ema_update(average, parameters, 0.99)
        yield loss.item()
    dgpo.ema_update(parameters, average, 0.0)  # a copy


@torch.no_grad()
def sample(pipe: Pipeline, prompts: list[dict], seed: int, guidance: float, steps: int) -> Tensor:
    """An image of each prompt, (N, 3, H, W) in [0, 1], by calling the pipeline itself."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
    settings["max_sequence_length"] = t5_tokens(pipe)
    parts = [[p["prompt"] for p in prompts[i : i + 48]] for i in range(0, len(prompts), 48)]
    return torch.cat([pipe(part, generator=generator, **settings).images for part in parts])


def main(world: ModuleType) -> None:
    """Pretrain and save the world's pipeline, or load it and LoRAs of it, and print its table."""
    settings = parse(Settings)
    diffusers.logging.set_verbosity_error()  # or it says that a T5 of None cannot be saved
    out = Path(settings.out or f"tiny_sd35/out/{Path(world.__file__).stem}")
    columns, prompts = world.columns(), world.table_prompts(settings.samples)
    if settings.lora:
        for folder in (out, *settings.lora):
            if not Path(folder).is_dir():
                raise UserError(f"there is no folder {folder}; without --lora, {out} is created")
        pipe = load_pipeline(str(out), torch.float32)
    else:
        pipe, steps = world.build(), settings.pretraining or world.STEPS
        progress = tqdm(pretrain(pipe, world, steps, settings.seed), "pretraining", total=steps)
        for loss in progress:
            progress.set_postfix(loss=f"{loss:.3f}")
        pipe.save_pretrained(out)
        for name, lines in world.prompt_lists().items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (out / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"wrote {out}", flush=True)
    pipe.scheduler = make_scheduler("dpm++", 3.0)

    def print_row(name: str, images: Tensor) -> None:
        cells = [name]
        for judge, task, decimals in columns.values():
            chosen = [i for i, prompt in enumerate(prompts) if task in (None, prompt["task"])]
            scores = torch.tensor(judge(images[chosen], [prompts[i] for i in chosen]))
            cells.append(f"{scores.mean():.{decimals}f}")
        print(f"| {' | '.join(cells)} |", flush=True)

    print(f"| {' | '.join([world.TITLE, *columns])} |\n{'|---' * (1 + len(columns))}|")
    if hasattr(world, "drawn"):
        print_row("drawn", world.drawn(prompts))
    pictures, rewards = {}, {}
    for folder in [None, *settings.lora]:
        name = Path(folder).absolute().name if folder else "base"
        if folder:
            load_lora(pipe, folder)
            rewards[name] = [row["reward"] for row in read_metrics(Path(folder) / "metrics.jsonl")]
        for condition, (guidance, steps) in CONDITIONS.items():
            images = sample(pipe, prompts, 0, guidance, steps)
            pictures.setdefault(name, images)
            print_row(name + condition, images)
        pipe.unload_lora_weights()
    if settings.figure:
        plot(settings.figure, prompts, pictures, [*columns.values()][0][0], rewards)


def plot(path: str, prompts: list[dict], pictures: dict, judge: Callable, rewards: dict) -> None:
    """Images by the base and the first LoRA above; below, each run's reward over ten steps."""
    rows, tasks = [], dict.fromkeys(prompt["task"] for prompt in prompts)
    for (name, images), task in itertools.product([*pictures.items()][:2], tasks):
        chosen = [i for i, prompt in enumerate(prompts) if prompt["task"] == task][:12]
        scores = judge(images[chosen], [prompts[i] for i in chosen])
        captions = ["correct" if score == 1 else "" for score in scores]
        rows.append((f"{name}, {task}", captions, pad(images[chosen], (1, 1, 1, 1), value=0.5)))
    picture = sheet(rows, side=72)

    heights = [8 * picture.height / picture.width, *([2.9] if rewards else [])]  # inches
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    top, *bottom = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    top.imshow(picture)
    top.axis("off")
    for axis in bottom:
        for name, values in rewards.items():
            means = [part.mean() for part in torch.tensor(values).split(10)]
            axis.plot(range(0, 10 * len(means), 10), means, ".-", label=name)
        axis.set(xlabel="optimizer step", ylabel="mean reward of the rollouts", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(ncols=2, loc="lower right")
    figure.savefig(path, dpi=90)
