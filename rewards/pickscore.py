"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): human preference learnt from Pick-a-Pic."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rewards import Reward, to_bytes

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """PickScore: logit_scale * cosine of CLIP's embeddings of image and prompt, about 17 to 25.

    A fine-tuned CLIP ViT-H/14, 3.9 GB in float32 (MIT licence). model: another CLIP, by name or
    folder; the processor in that folder is used if there is one.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = model or MODEL
    files = ("processor_config.json", "preprocessor_config.json")  # of transformers 5, and before
    source = model if any((Path(model) / name).exists() for name in files) else PROCESSOR
    tokenizer = AutoTokenizer.from_pretrained(source)
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    clip = AutoModel.from_pretrained(model).eval().to(device)
    length = clip.config.text_config.max_position_embeddings
    padded = {"padding": "max_length", "truncation": True, "max_length": length}

    @torch.no_grad()
    def pickscore(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, **padded, return_tensors="pt")
        pixels = processor(list(to_bytes(images)), return_tensors="pt")
        # Called as a whole, because what get_image_features returns depends on the release.
        output = clip(**tokens.to(device), **pixels.to(device))
        cosine = (output.image_embeds * output.text_embeds).sum(1)
        return clip.logit_scale.exp() * cosine

    return pickscore
