"""A tiny pipeline of Stable Diffusion 3.5's own classes, built from nothing: for worlds of toys.

The text encoders are random and stay so, the VAE is exact, and only the transformer has to learn.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import dgpo  # noqa: E402


def clip_tokenizer(texts: list[str], tokens: int, spelt: bool = False) -> CLIPTokenizer:
    """A tokenizer of at most so many tokens, whose words are those of the texts.

    spelt: a character is a token, not a word.
    """
    special = ["<|startoftext|>", "<|endoftext|>"]
    if spelt:
        characters = sorted(set("".join(texts).lower()))
        pieces = [*special, *characters, *(f"{character}</w>" for character in characters)]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        return CLIPTokenizer(
            vocab=vocabulary, merges=[], pad_token=special[1], model_max_length=tokens
        )
    # Merges must be learnt: made by hand, they would split words and truncate prompts alike.
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learnt.train_from_iterator(texts, trainer)
    model = json.loads(learnt.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token=special[1],
        model_max_length=tokens,
    )


def t5_tokenizer(texts: list[str], tokens: int) -> T5TokenizerFast:
    """A tokenizer of at most so many tokens, to which a word of the texts is a token."""
    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=tokens)


def exact_vae(side: int, channels: int = 3, scale: float = 1.0) -> AutoencoderKL:
    """An AutoencoderKL whose latents are the picture at half its size: nothing to train.

    side: a picture's, in pixels. channels: 3 for the colours, or 1 for their mean. scale: what
    latents are multiplied by.

    Its last GroupNorm and SiLU are what stands in the way. Beside the signal s run -s and two
    constants +-C: their mean is 0, their std C/2 but for s^2/C^2, and so the norm only divides by
    a constant. SiLU is the identity far from 0.
    """
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=side,
        shift_factor=0.9,  # so that a light background is about 0, where the noise's mean is
        scaling_factor=scale,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    constant, far = 256.0, 32.0
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            for name, parameter in half.named_parameters():
                # A residual block that adds nothing; what changes the size is filled in below.
                if ("resnets" in name and "conv2" in name) or "sampler" in name:
                    parameter.zero_()
            for layer in (half.conv_in, half.conv_out):
                layer.weight.zero_()
                layer.bias.zero_()
            for i in range(3):  # a colour of the picture, and its channel of the latents
                latent = i % channels
                into, out = (i, latent) if half is vae.encoder else (latent, i)
                share = channels / 3 if half is vae.encoder else 1
                half.conv_in.weight[latent, into, 1, 1] = share
                half.conv_in.weight[3 + latent, into, 1, 1] = -share
                half.conv_out.weight[out, latent, 1, 1] = 1
                half.conv_out.bias[out] = -far
            half.conv_in.bias[6], half.conv_in.bias[7] = constant, -constant
            half.conv_norm_out.weight.fill_(constant / 2)
            half.conv_norm_out.bias.fill_(far)
        vae.encoder.conv_out.bias[channels:] = -30  # the log-variance
        smaller = vae.encoder.down_blocks[0].downsamplers[0].conv.weight
        larger = vae.decoder.up_blocks[0].upsamplers[0].conv.weight
        for i in range(8):
            smaller[i, i, :2, :2] = 1 / 4  # the mean of two by two pixels
            larger[i, i, 1, 1] = 1
    return vae


def clip_encoder(tokenizer: CLIPTokenizer, tokens: int, spread: float) -> nn.Module:
    """A random CLIP text encoder that tells prompts apart.

    At the usual scale, attention is uniform in a random encoder, places do not count, and the
    pooled embedding tells little more than how long the prompt is. spread: a factor of the values
    and the outputs of attention.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name or "position_embedding" in name:
            weight.data.normal_()
        elif "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data *= 5
        elif "v_proj.weight" in name or "out_proj.weight" in name:
            weight.data *= spread
    return encoder


def build(
    clip: CLIPTokenizer,
    t5: T5TokenizerFast | None,
    *,
    side: int,
    cell: int,
    tokens: int,
    channels: int = 3,
    scale: float = 1.0,
    width: int = 128,
    layers: int = 2,
    spread: float = 3.0,
) -> StableDiffusion3Pipeline:
    """An untrained pipeline of SD3.5's classes, with its text encoders, VAE and all.

    t5: None leaves the third text encoder out, as SD3.5's pipeline allows: zeros stand for it.
    side: a picture's, in pixels. cell: that of a token of the transformer. tokens: of a prompt, at
    most, for each tokenizer. channels, scale: see `exact_vae`. width, layers: the transformer's.
    spread: see `clip_encoder`. The weights follow from torch's seed.
    """
    encoders = [clip_encoder(clip, tokens, spread) for _ in range(2)]
    t5_encoder = None
    if t5:
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        t5_encoder = T5EncoderModel(T5Config(vocab_size=len(t5), **sizes))
    transformer = SD3Transformer2DModel(
        sample_size=side // 2,
        patch_size=cell // 2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=64,  # T5's, at least the sum of the two CLIPs'
        caption_projection_dim=width,
        pooled_projection_dim=64,  # the sum of the two CLIPs'
        pos_embed_max_size=side // cell,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=exact_vae(side, channels, scale),
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=clip,
        text_encoder_3=t5_encoder,
        tokenizer_3=t5,
    )
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()  # T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5_tokens(pipe: StableDiffusion3Pipeline) -> int:
    """How many tokens T5 gives to the transformer: one of zeros if there is no T5."""
    return pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else 1


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (N, tokens, width) and pooled ones (N, width)."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        texts,
        texts,
        texts,
        do_classifier_free_guidance=False,
        max_sequence_length=t5_tokens(pipe),
    )
    return embeds, pooled


@torch.no_grad()
def to_latents(pipe: StableDiffusion3Pipeline, images: Tensor) -> Tensor:
    """Latents (N, C, h, w), as the transformer sees them, of images (N, 3, H, W) in [0, 1]."""
    x0 = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    return (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def pretrain(
    pipe: StableDiffusion3Pipeline,
    prompts: list[dict],
    draw_prompt: Callable[[random.Random], dict],
    draw: Callable[[list[dict], random.Random], Tensor],
    *,
    wrong: float,
    steps: int,
    batch: int,
) -> Iterator[float]:
    """Flow matching of the transformer on noisy captions. Yields the loss of each step.

    prompts: all that may be drawn. draw_prompt: one at random. draw: latents (N, C, h, w) of N
    prompts' pictures. wrong: the share of captions that are another picture's. A tenth are empty,
    so that guidance can be used.
    """
    rng = random.Random(0)
    torch.manual_seed(0)
    embeds, pooled = encode(pipe, ["", *(prompt["prompt"] for prompt in prompts)])
    index = {prompt["prompt"]: i for i, prompt in enumerate(prompts, 1)}
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), weight_decay=0.0)
    averaged = [p.detach().clone() for p in pipe.transformer.parameters()]
    pipe.transformer.train()
    for step in range(steps):
        warmup, decay = 50 * step / steps + 0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, warmup) * decay
        shown, other = ([draw_prompt(rng) for _ in range(batch)] for _ in range(2))
        told = [b if rng.random() < wrong else a for a, b in zip(shown, other, strict=True)]
        rows = [0 if rng.random() < 0.1 else index[prompt["prompt"]] for prompt in told]
        x0 = draw(shown, rng)[:, None]
        u, eps = torch.rand(batch, 1), torch.randn(x0.shape)
        t = 3 * u / (1 + 2 * u)  # the shift of the sampler
        v = pipe.transformer(
            dgpo.diffuse(x0, eps, t)[:, 0],
            encoder_hidden_states=embeds[rows],
            pooled_projections=pooled[rows],
            timestep=1000 * t[:, 0],
            return_dict=False,
        )[0]
        loss = dgpo.dsm_loss(v[:, None], x0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pipe.transformer.parameters(), 1.0)
        optimizer.step()
        dgpo.ema_update(averaged, pipe.transformer.parameters(), 0.99)
        yield loss.item()
    with torch.no_grad():
        for parameter, value in zip(pipe.transformer.parameters(), averaged, strict=True):
            parameter.copy_(value)
    pipe.transformer.eval()


@torch.no_grad()
def sample(
    pipe: StableDiffusion3Pipeline, prompts: list[dict], seed: int, guidance: float, steps: int
) -> Tensor:
    """A picture of each prompt (N, 3, H, W) in [0, 1], with the pipeline's own sampler."""
    generator = torch.Generator().manual_seed(seed)
    channels, half = pipe.transformer.config.in_channels, pipe.transformer.config.sample_size
    noise = torch.randn(len(prompts), channels, half, half, generator=generator)
    images = []
    for i in range(0, len(prompts), 48):
        output = pipe(
            [prompt["prompt"] for prompt in prompts[i : i + 48]],
            latents=noise[i : i + 48],
            guidance_scale=guidance,
            num_inference_steps=steps,
            height=2 * half,
            width=2 * half,
            max_sequence_length=t5_tokens(pipe),
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images)
