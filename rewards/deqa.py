"""DeQA-Score (You et al. 2025, arXiv:2501.11561): the quality of a picture, whatever it shows.

Its model is mPLUG-Owl2 (Ye et al. 2023, arXiv:2311.04257): a ViT sees the picture, an abstractor
sums it up in 64 tokens, and a LLaMA 2, whose norms, keys and values have weights of their own for
such tokens, completes "The quality of the image is". The published code pins a transformers of 2023
and has to be trusted to run, so the parts are written here, under the published tensors' names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards import RewardError, to_bytes

MODEL = "zhiyuanyou/DeQA-Score-Mix3"
BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
LEVELS = ("bad", "poor", "fair", "good", "excellent")  # 1 to 5


class VisionLayer(nn.Module):
    """A layer of the ViT, CLIP's but for how the queries, keys and values are stored."""

    def __init__(self, config: dict):
        super().__init__()
        width, hidden, eps = (
            config[key] for key in ("hidden_size", "intermediate_size", "layer_norm_eps")
        )
        self.heads = config["num_attention_heads"]
        self.self_attn = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.self_attn["query_key_value"](self.input_layernorm(x))
        # A head's query, key and value lie side by side.
        q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["dense"](seen)
        hidden = self.mlp["fc1"](self.post_attention_layernorm(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # CLIP's "quick" GELU


class Vision(nn.Module):
    """(B, 3, side, side) -> (B, 1 + patches, width)."""

    def __init__(self, config: dict):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        tokens = 1 + (config["image_size"] // patch) ** 2
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.embeddings.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.embeddings.position_embedding = nn.Parameter(torch.empty(1, tokens, width))
        self.embeddings.pre_layernorm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(config) for _ in range(config["num_hidden_layers"])
        )
        self.post_layernorm = nn.LayerNorm(width, config["layer_norm_eps"])

    def forward(self, pixels: Tensor) -> Tensor:
        parts = self.embeddings
        x = parts.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([parts.cls_token.expand(len(x), -1, -1), x], 1) + parts.position_embedding
        x = parts.pre_layernorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class AbstractorLayer(nn.Module):
    """Queries look at themselves and at the picture; the residual is around the normed queries."""

    def __init__(self, config: dict, patches: int):
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        queries = config["num_learnable_queries"]
        self.heads = config["num_attention_heads"]
        inner = nn.Module()
        inner.norm1, inner.normk = nn.LayerNorm(width), nn.LayerNorm(width)
        inner.attention = nn.Module()
        inner.attention.query = nn.Linear(width, width)
        inner.attention.key = nn.Linear(width, width)
        inner.attention.value = nn.Linear(width, width)
        inner.attention.q_pos_embed = nn.Parameter(torch.empty(queries, width))
        inner.attention.k_pos_embed = nn.Parameter(torch.empty(patches, width))
        inner.output = nn.Module()
        inner.output.out_proj, inner.output.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        inner.output.mlp = nn.ModuleDict(
            {
                "w1": nn.Linear(width, hidden),
                "w2": nn.Linear(hidden, width),
                "w3": nn.Linear(width, hidden),
                "ffn_ln": nn.LayerNorm(hidden, config["layer_norm_eps"]),
            }
        )
        self.crossattention = inner

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        inner, attention, mlp = (
            self.crossattention,
            self.crossattention.attention,
            self.crossattention.output.mlp,
        )
        x = inner.norm1(x)
        both = torch.cat([x, inner.normk(seen)], 1)
        places = torch.cat([attention.q_pos_embed, attention.k_pos_embed])
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (
                attention.query(x + attention.q_pos_embed),
                attention.key(both + places),
                attention.value(both),
            )
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + inner.output.out_proj(found)
        y = inner.output.norm2(x)
        return x + mlp["w2"](mlp["ffn_ln"](F.silu(mlp["w1"](y)) * mlp["w3"](y)))


class Abstractor(nn.Module):
    """(B, 1 + patches, width) -> (B, queries + 1, the language model's width)."""

    def __init__(self, config: dict, patches: int, language_width: int):
        super().__init__()
        width, queries = config["hidden_size"], config["num_learnable_queries"]
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            AbstractorLayer(config, patches) for _ in range(config["num_hidden_layers"])
        )
        self.query_embeds = nn.Parameter(torch.empty(1, queries, width))
        self.visual_fc = nn.Linear(width, language_width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def forward(self, seen: Tensor) -> Tensor:
        x = self.query_embeds.expand(len(seen), -1, -1)
        for layer in self.encoder.layers:
            x = layer(x, seen)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(x), -1, -1)], 1)


class Multiway(nn.Module):
    """A module for the words, and its twin for the tokens `image` (start, stop) of the picture."""

    def __init__(self, words: nn.Module, picture: nn.Module, image: tuple[int, int]):
        super().__init__()
        self.multiway, self.image = nn.ModuleList([words, picture]), image

    def forward(self, x: Tensor) -> Tensor:
        (words, picture), (start, stop) = self.multiway, self.image
        parts = words(x[:, :start]), picture(x[:, start:stop]), words(x[:, stop:])
        return torch.cat(parts, 1)


def build(config: dict, start: int) -> nn.Module:
    """The whole model, without values, for pictures whose tokens begin at `start`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    vision, abstractor = (config["visual_config"][k] for k in ("visual_model", "visual_abstractor"))
    tokens = 1 + (vision["image_size"] // vision["patch_size"]) ** 2
    image = (start, start + abstractor["num_learnable_queries"] + 1)
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
        " num_key_value_heads rms_norm_eps max_position_embeddings"
    )
    language = LlamaConfig(**{key: config[key] for key in keys.split() if key in config})
    with torch.device("meta"):
        model = LlamaForCausalLM(language)
        twin = LlamaForCausalLM(language)
        for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
            for owner, its, name in (
                (layer, other, "input_layernorm"),
                (layer, other, "post_attention_layernorm"),
                (layer.self_attn, other.self_attn, "k_proj"),
                (layer.self_attn, other.self_attn, "v_proj"),
            ):
                setattr(owner, name, Multiway(getattr(owner, name), getattr(its, name), image))
        model.model.vision_model = Vision(vision)
        model.model.visual_abstractor = Abstractor(abstractor, tokens, language.hidden_size)
    model.model.rotary_emb = LlamaRotaryEmbedding(language)  # holds values that no file has
    return model.eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards. Raises RewardError if it has none."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    for file in [] if state else sorted(folder.glob("pytorch_model*.bin")):
        state |= torch.load(file, map_location="cpu", weights_only=True)
    if not state:
        raise RewardError(f"{folder} has no weights: no *.safetensors, no pytorch_model*.bin")
    return {name: x for name, x in state.items() if not name.endswith("rotary_emb.inv_freq")}


def squares(pixels: np.ndarray, grey: list[int]) -> np.ndarray:
    """Pictures (N, H, W, 3) in the middle of squares (N, S, S, 3), S the longer side."""
    number, height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((number, side, side, 3), np.uint8)
    square[:] = grey
    y, x = (side - height) // 2, (side - width) // 2
    square[:, y : y + height, x : x + width] = pixels
    return square


def load(device: torch.device | str, model: str | None = None):
    """DeQA-Score, the expected level from 1, bad, to 5, excellent.

    8 B parameters, 16 GB in float16 (weights: MIT and LLaMA 2's licence). model: another of its
    kind, by name or folder, with config.json, preprocessor_config.json, tokenizer.model and its
    tensors. The code that lies beside the published weights is not run. Written from the published
    architecture; the published weights themselves have not been run through it.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise RewardError("it needs `pip install sentencepiece`") from None
    from huggingface_hub import snapshot_download

    name = model or MODEL
    patterns = ["*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin"]
    folder = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=patterns))
    for needed in ("config.json", "preprocessor_config.json", "tokenizer.model"):
        if not (folder / needed).is_file():
            raise RewardError(f"{folder} has no {needed}")
    # Imported here, because the import warns where torchvision is missing.
    from transformers import CLIPImageProcessor

    config = json.loads((folder / "config.json").read_text("utf-8"))
    processor = CLIPImageProcessor.from_pretrained(folder)
    # SentencePiece itself, not transformers' tokenizer, which asks whether to run the code of
    # config.json's auto_map; the tests compare their tokens.
    words = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    before, after = [words.bos_id(), *words.encode(BEFORE)], words.encode(AFTER)
    levels = [words.encode(level)[0] for level in LEVELS]
    network = build(config, start=len(before))
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    tensors = {key: x.to(device, dtype) for key, x in read_tensors(folder).items()}
    network.load_state_dict(tensors, assign=True)
    network.to(device)
    grey = [int(255 * x) for x in processor.image_mean]  # truncated, as the published code does
    tokens = torch.tensor([*before, *after], device=device)

    @torch.no_grad()
    def deqa(images: Tensor, prompts: list[dict]) -> Tensor:
        pixels = squares(to_bytes(images), grey)
        inputs = processor(list(pixels), return_tensors="pt")["pixel_values"].to(device, dtype)
        seen = network.model.visual_abstractor(network.model.vision_model(inputs))
        text = network.model.embed_tokens(tokens).expand(len(seen), -1, -1)
        cut = len(before)
        embeds = torch.cat([text[:, :cut], seen, text[:, cut:]], 1)
        logits = network(inputs_embeds=embeds, use_cache=False).logits[:, -1, levels].float()
        return logits.softmax(1) @ torch.arange(1.0, 6.0, device=device)

    return deqa
