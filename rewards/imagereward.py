"""ImageReward (Xu et al. 2023, arXiv:2304.05977): which image people choose for a prompt."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from rewards import Reward, to_bytes
from rewards.aesthetic import predictor
from rewards.interface import read_weights

MODEL, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, from its own code
LENGTH = 35  # tokens, to which a prompt is padded or cut
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
VISION |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
TEXT = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT |= {"num_attention_heads": 12, "encoder_hidden_size": 1024, "max_position_embeddings": 512}

RENAMED = [  # the published file's names in the vision tower -> transformers' names
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
    """The tensors whose names begin with the prefix, under their names without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def towers(state: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """BLIP's vision tower and its text tower, which attends to the image.

    ImageReward's own package requires a transformers of 2022, so the published tensors go into
    transformers' BLIP.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    visual = part(state, "blip.visual_encoder.")
    for old, new in RENAMED:
        visual = {re.sub(old, new, name): x for name, x in visual.items()}
    vision = BlipVisionModel(BlipVisionConfig(**VISION))
    vision.load_state_dict(visual)

    textual = part(state, "blip.text_encoder.")
    textual.pop("embeddings.position_ids", None)  # a constant
    text = BlipTextModel(BlipTextConfig(**TEXT), add_pooling_layer=False)
    text.load_state_dict(textual)
    return vision.eval(), text.eval()


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """ImageReward, standardised: about -2 to 2.

    BLIP with a ViT-L/16 at 224 px and a head of linear layers, 1.8 GB (Apache-2.0). model: the
    published file by path, or "tokenizer,file". Written from the published architecture and not
    yet run with the published weights.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    name, _, file = (model or "").rpartition(",")
    file = file or hf_hub_download(MODEL, FILE)
    state = read_weights(file)
    vision, text = (tower.to(device) for tower in towers(state))
    head = predictor(part(state, "mlp.")).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name or TOKENIZER)
    side = VISION["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    @torch.no_grad()
    def imagereward(images: Tensor, prompts: list[str]) -> Tensor:
        inputs = processor(list(to_bytes(images)), return_tensors="pt")
        patches = vision(inputs["pixel_values"].to(device)).last_hidden_state
        padded = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
        tokens = tokenizer(prompts, **padded, return_tensors="pt").to(device)
        hidden = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
        ).last_hidden_state
        return (head(hidden[:, 0])[:, 0] - MEAN) / STD  # the first token's, as in BERT

    return imagereward
