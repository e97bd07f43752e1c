"""ImageReward (Xu et al. 2023, arXiv:2304.05977): which picture people choose for a prompt."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards import to_bytes
from rewards.aesthetic import predictor

MODEL, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores of people's pictures
LENGTH = 35  # tokens of a prompt, padded or cut

# The published file's names for the vision tower, and transformers' names for the same tensors.
VISION = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, which is taken off."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def towers(state: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """BLIP's vision tower and its text tower, which looks at the picture by cross-attention.

    ImageReward's own package pins a transformers of 2022, so the published tensors go into the
    BLIP that transformers has; all sizes are read off the tensors. Raises KeyError or RuntimeError
    where the tensors are not those.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seen = part(state, "blip.visual_encoder.")
    for old, new in VISION:
        seen = {re.sub(old, new, name): x for name, x in seen.items()}
    width, _, patch, _ = seen["embeddings.patch_embedding.weight"].shape
    side = round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len({name.split(".")[2] for name in seen if ".layers." in name}),
            num_attention_heads=width // 64,
            image_size=side,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    vision.load_state_dict(seen)

    read = part(state, "blip.text_encoder.")
    read.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a constant of older releases
    words, hidden = read["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=len({name.split(".")[2] for name in read if ".layer." in name}),
            num_attention_heads=hidden // 64,
            max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
        ),
        add_pooling_layer=False,
    )
    text.load_state_dict(read)
    return vision.eval(), text.eval()


def load(device: torch.device | str, model: str | None = None):
    """ImageReward, standardised over people's pictures: about -2 to 2.

    BLIP with a ViT-L/16 at 224 px and a head of linear layers, 1.8 GB (Apache-2.0). model: the
    published file, by path, or "tokenizer,file". Written from the published architecture; the
    published weights themselves have not been run through it.
    """
    from huggingface_hub import hf_hub_download

    name, _, file = (model or "").rpartition(",")
    file = file or hf_hub_download(MODEL, FILE)
    # Imported here, because the import warns where torchvision is missing.
    from transformers import AutoTokenizer, CLIPImageProcessor

    state = torch.load(Path(file), map_location="cpu", weights_only=True)
    vision, text = (tower.to(device) for tower in towers(state))
    head = predictor(part(state, "mlp.")).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name or TOKENIZER)
    side = vision.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)

    @torch.no_grad()
    def imagereward(images: Tensor, prompts: list[dict]) -> Tensor:
        inputs = processor(list(to_bytes(images)), return_tensors="pt")
        patches = vision(inputs["pixel_values"].to(device)).last_hidden_state
        tokens = tokenizer(
            [prompt["prompt"] for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        ).to(device)
        hidden = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
        ).last_hidden_state
        return (head(hidden[:, 0])[:, 0] - MEAN) / STD  # the first token's: the whole prompt's

    return imagereward
