"""LAION's aesthetic predictor (Schuhmann et al. 2022): how people rate a picture, 1 to 10."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from rewards import RewardError, to_bytes

CLIP = "openai/clip-vit-large-patch14"
WEIGHTS = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
WIDTHS = (1024, 128, 64, 16, 1)
KEPT_AT = (0, 2, 4, 6, 7)  # where the layers stand in the published file, between dropouts


def predictor(state: dict[str, Tensor]) -> nn.Sequential:
    """The published head: linear layers without activations between them."""
    sizes = [state["layers.0.weight"].shape[1], *WIDTHS]
    layers = nn.Sequential(*[nn.Linear(*pair) for pair in zip(sizes, WIDTHS, strict=False)])
    for layer, i in zip(layers, KEPT_AT, strict=True):
        layer.load_state_dict({k: state[f"layers.{i}.{k}"] for k in ("weight", "bias")})
    return layers.eval()


def read_head(file: str) -> dict[str, Tensor]:
    """The tensors of a file, or of a URL, which is fetched once and kept in torch's cache.

    Raises FileNotFoundError rather than fetch it while HF_HUB_OFFLINE is set, which torch's own
    cache knows nothing of.
    """
    from huggingface_hub import constants

    if "://" not in file:
        return torch.load(file, map_location="cpu", weights_only=True)
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(file).path).name
    if constants.HF_HUB_OFFLINE and not kept.exists():
        raise FileNotFoundError(f"{file} is not in {kept.parent}")
    return torch.hub.load_state_dict_from_url(file, map_location="cpu", weights_only=True)


def load(device: torch.device | str, model: str | None = None):
    """The predicted rating from CLIP ViT-L/14's normalised embedding of the image.

    1.7 GB for CLIP, 4 MB for the head (Apache-2.0). model: other ones, as "clip,head.pth".
    """
    from transformers import AutoImageProcessor, AutoModel

    name, comma, weights = (model or f"{CLIP},{WEIGHTS}").rpartition(",")
    if not comma:
        raise RewardError(f"its weights are given as clip,head.pth, got {model!r}")
    state = read_head(weights)
    processor = AutoImageProcessor.from_pretrained(name)
    clip = AutoModel.from_pretrained(name).eval().to(device)
    head = predictor(state).to(device)

    @torch.no_grad()
    def aesthetic(images: Tensor, prompts: list[dict]) -> Tensor:
        inputs = processor(list(to_bytes(images)), return_tensors="pt")
        seen = clip.vision_model(**inputs.to(device)).pooler_output
        embedding = clip.visual_projection(seen)
        return head(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]

    return aesthetic
