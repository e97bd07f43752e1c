"""DeQA-Score (You et al. 2025, arXiv:2501.11561): the quality of an image, whatever it shows.

Its model is mPLUG-Owl2 (Ye et al. 2023, arXiv:2311.04257): a ViT sees the image, an abstractor
sums it up in 64 tokens, and a LLaMA 2, whose norms, keys and values have weights of their own for
these tokens, completes "The quality of the image is". The published code needs a transformers of
2023, so the forward pass is written out here over the published tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import Reward, RewardError, to_bytes
from rewards.interface import need, read_weights

MODEL = "zhiyuanyou/DeQA-Score-Mix3"
BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
LEVELS = ("bad", "poor", "fair", "good", "excellent")  # 1 to 5


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention over (B, heads, tokens, width of a head) -> (B, tokens, width)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


@dataclass
class Network:
    """The forward pass."""

    tensors: dict[str, Tensor]
    config: dict

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.tensors[f"{name}.weight"] * y.to(x.dtype)

    def vision(self, pixels: Tensor) -> Tensor:
        """The ViT: (B, 3, side, side) -> (B, 1 + patches, width)."""
        config, tower = self.config["visual_config"]["visual_model"], "model.vision_model."
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
        kernel = self.tensors[f"{tower}embeddings.patch_embed.weight"]
        x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = self.tensors[f"{tower}embeddings.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.tensors[f"{tower}embeddings.position_embedding"]
        x = self.norm(f"{tower}embeddings.pre_layernorm", x, eps)
        for i in range(config["num_hidden_layers"]):
            layer = f"{tower}encoder.layers.{i}."
            y = self.norm(f"{layer}input_layernorm", x, eps)
            y = self.linear(f"{layer}self_attn.query_key_value", y)
            q, k, v = y.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)  # head by head
            x = x + self.linear(f"{layer}self_attn.dense", attend(q, k, v))
            y = self.norm(f"{layer}post_attention_layernorm", x, eps)
            y = self.linear(f"{layer}mlp.fc1", y)
            x = x + self.linear(f"{layer}mlp.fc2", y * torch.sigmoid(1.702 * y))
        return self.norm(f"{tower}post_layernorm", x, eps)

    def resample(self, seen: Tensor) -> Tensor:
        """The abstractor: (B, 1 + patches, width) -> (B, queries + 1, the LLaMA's width)."""
        config = self.config["visual_config"]["visual_abstractor"]
        tower = "model.visual_abstractor."
        heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
        x = self.tensors[f"{tower}query_embeds"].expand(len(seen), -1, -1)
        for i in range(config["num_hidden_layers"]):
            layer = f"{tower}encoder.layers.{i}.crossattention."
            x = self.norm(f"{layer}norm1", x)  # the residual is around the normalised queries
            both = torch.cat([x, self.norm(f"{layer}normk", seen)], 1)
            places = [self.tensors[f"{layer}attention.{name}_pos_embed"] for name in "qk"]
            q = self.linear(f"{layer}attention.query", x + places[0])
            k = self.linear(f"{layer}attention.key", both + torch.cat(places))
            v = self.linear(f"{layer}attention.value", both)
            q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))
            x = x + self.linear(f"{layer}output.out_proj", attend(q, k, v))
            y, mlp = self.norm(f"{layer}output.norm2", x), f"{layer}output.mlp."
            y = F.silu(self.linear(f"{mlp}w1", y)) * self.linear(f"{mlp}w3", y)
            x = x + self.linear(f"{mlp}w2", self.norm(f"{mlp}ffn_ln", y, eps))
        end = self.tensors[f"{tower}vit_eos"].expand(len(x), -1, -1)
        return torch.cat([self.linear(f"{tower}visual_fc", x), end], 1)

    def language(self, x: Tensor, image: slice) -> Tensor:
        """The LLaMA: embeddings (B, T, width), an image at `image` -> the next token's logits."""

        def multiway(apply, name: str, y: Tensor) -> Tensor:
            words, picture = f"{name}.multiway.0", f"{name}.multiway.1"
            parts = apply(words, y[:, : image.start]), apply(picture, y[:, image])
            return torch.cat([*parts, apply(words, y[:, image.stop :])], 1)

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return y * angles.cos().to(y.dtype) + torch.cat([-b, a], -1) * angles.sin().to(y.dtype)

        heads = self.config["num_attention_heads"]
        half = x.shape[2] // heads // 2
        speeds = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = (torch.arange(x.shape[1], device=x.device)[:, None] * speeds).repeat(1, 2)
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            y = multiway(self.rms_norm, f"{layer}input_layernorm", x)
            q = self.linear(f"{layer}self_attn.q_proj", y)
            k = multiway(self.linear, f"{layer}self_attn.k_proj", y)
            v = multiway(self.linear, f"{layer}self_attn.v_proj", y)
            q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
            y = attend(rotate(q), rotate(k), v, causal=True)
            x = x + self.linear(f"{layer}self_attn.o_proj", y)
            y = multiway(self.rms_norm, f"{layer}post_attention_layernorm", x)
            gate = F.silu(self.linear(f"{layer}mlp.gate_proj", y))
            y = gate * self.linear(f"{layer}mlp.up_proj", y)
            x = x + self.linear(f"{layer}mlp.down_proj", y)
        return self.linear("lm_head", self.rms_norm("model.norm", x[:, -1]))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards. Raises RewardError if it has none."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]:
        tensors |= read_weights(str(file)) if file.suffix == ".bin" else load_file(file)
    if not tensors:
        raise RewardError(f"{folder} has no weights: no *.safetensors, no pytorch_model*.bin")
    return tensors


def squares(pixels: np.ndarray, grey: list[int]) -> np.ndarray:
    """Images (N, H, W, 3) in the middle of grey squares (N, S, S, 3), S the longer side."""
    number, height, width, _ = pixels.shape
    side = max(height, width)
    square = np.tile(np.uint8(grey), (number, side, side, 1))
    y, x = (side - height) // 2, (side - width) // 2
    square[:, y : y + height, x : x + width] = pixels
    return square


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """DeQA-Score, the expected level from 1, bad, to 5, excellent.

    8 B parameters, 16 GB in float16 (weights: MIT and LLaMA 2's licence). model: another of its
    kind, by name or folder. Its own code is not run. Written from the published architecture and
    not yet run with the published weights. Raises RewardError if a package or file is missing.
    """
    need("pip install sentencepiece", "sentencepiece")
    from huggingface_hub import snapshot_download
    from sentencepiece import SentencePieceProcessor
    from transformers import CLIPImageProcessorPil

    name = model or MODEL
    patterns = ["*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=patterns))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    # SentencePiece itself, because transformers' tokenizer asks whether to run the published code.
    words = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = [words.bos_id(), *words.encode(BEFORE)], words.encode(AFTER)
    before, after = (torch.tensor(each, device=device) for each in tokens)
    levels = [words.encode(level)[0] for level in LEVELS]
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    tensors = {key: x.to(device, dtype) for key, x in read_tensors(folder).items()}
    network = Network(tensors, config)
    grey = [int(255 * x) for x in processor.image_mean]  # truncated, as in the published code

    @torch.no_grad()
    def deqa(images: Tensor) -> Tensor:
        pixels = processor(list(squares(to_bytes(images), grey)), return_tensors="pt")
        pixels = pixels["pixel_values"].to(device, dtype)
        picture = network.resample(network.vision(pixels))
        text = network.tensors["model.embed_tokens.weight"]
        start, end = (text[each].expand(len(picture), -1, -1) for each in (before, after))
        image = slice(len(before), len(before) + picture.shape[1])
        logits = network.language(torch.cat([start, picture, end], 1), image)[:, levels]
        return logits.float().softmax(1) @ torch.arange(1.0, 6.0, device=device)

    return deqa
