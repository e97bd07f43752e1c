"""LAION's aesthetic predictor (Schuhmann et al. 2022): how people rate an image, 1 to 10."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewards import Reward, RewardError, to_bytes
from rewards.interface import read_weights

CLIP = "openai/clip-vit-large-patch14"
WEIGHTS = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
WIDTHS = (1024, 128, 64, 16, 1)
POSITIONS = (0, 2, 4, 6, 7)  # of the linear layers in the published file; dropouts lie between


def predictor(state: dict[str, Tensor]) -> nn.Sequential:
    """Build the published head: linear layers without activations between them."""
    sizes = [state["layers.0.weight"].shape[1], *WIDTHS]
    layers = nn.Sequential(*[nn.Linear(*pair) for pair in zip(sizes, WIDTHS, strict=False)])
    for layer, i in zip(layers, POSITIONS, strict=True):
        layer.load_state_dict({key: state[f"layers.{i}.{key}"] for key in ("weight", "bias")})
    return layers.eval()


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """The predicted rating from CLIP ViT-L/14's normalised embedding of the image.

    1.7 GB for CLIP, 4 MB for the head (Apache-2.0). model: replaces both, as "clip,head.pth".
    """
    from transformers import AutoImageProcessor, AutoModel

    name, comma, file = (model or f"{CLIP},{WEIGHTS}").rpartition(",")
    if not comma:
        raise RewardError(f"its weights are given as clip,head.pth, got {model!r}")
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    clip = AutoModel.from_pretrained(name).eval().to(device)
    head = predictor(read_weights(file)).to(device)

    @torch.no_grad()
    def aesthetic(images: Tensor) -> Tensor:
        pixels = processor(list(to_bytes(images)), return_tensors="pt")
        features = clip.vision_model(**pixels.to(device)).pooler_output
        embedding = clip.visual_projection(features)
        return head(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]

    return aesthetic
