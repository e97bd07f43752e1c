"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): human preference learnt from Pick-a-Pic."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rewards import to_bytes

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def load(device: torch.device | str, model: str | None = None):
    """PickScore: logit_scale * cosine of CLIP's embeddings of image and prompt, about 17 to 25.

    A fine-tuned CLIP ViT-H/14, 3.9 GB in float32 (MIT licence). model: another CLIP, by name or
    folder; a processor that lies in that folder is taken, too.
    """
    from transformers import AutoModel, AutoProcessor

    model = model or MODEL
    files = ("processor_config.json", "preprocessor_config.json")  # transformers 5, and before
    own = any((Path(model) / name).exists() for name in files)
    processor = AutoProcessor.from_pretrained(model if own else PROCESSOR)
    clip = AutoModel.from_pretrained(model).eval().to(device)

    @torch.no_grad()
    def pickscore(images: Tensor, prompts: list[dict]) -> Tensor:
        inputs = processor(
            images=list(to_bytes(images)),
            text=[prompt["prompt"] for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        # Called whole, because get_image_features returns other things in other releases.
        output = clip(**inputs.to(device))
        cosine = (output.image_embeds * output.text_embeds).sum(1)
        return clip.logit_scale.exp() * cosine

    return pickscore
