"""GenEval's own detector, mmdet 2.x's Mask2Former with a Swin-S, in transformers' Mask2Former.

mmdet needs compiled code and a torch of 2022, so its tensors are renamed here, and what it does to
an image before and after the network is written to agree with it bit for bit.
"""

from __future__ import annotations

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.interface import need, read_weights

KIND = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
FOLDER = "https://download.openmmlab.com/mmdetection/v2.0/mask2former"
URL = f"{FOLDER}/{KIND}/{KIND}_20220504_001756-743b7d99.pth"  # ends as its SHA-256 begins
LONG, SHORT = 1333, 800  # pixels: an image is scaled to fill one of the two and exceed neither
MULTIPLE, GREY = 32, 128  # its sides are padded to this multiple, in this grey
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # red, green, blue, 0 to 255
PAIRS = 100  # candidates for a detection: the most likely pairs of a query and a class

# mmdet's names and transformers' names; all rules apply, in this order. mmdet keeps in one tensor
# the three that are written [qkv] here.
E, P = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
T = "model.transformer_module"
RENAMED = [
    (r"^backbone\.patch_embed\.projection", f"{E}.swin.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", f"{E}.swin.embeddings.norm"),
    *[(rf"^backbone\.norm{i}", f"{E}.hidden_states_norms.stage{i + 1}") for i in range(4)],
    (r"^backbone\.stages", f"{E}.swin.encoder.layers"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.w_msa\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attn\.w_msa\.qkv", ".attention.[qkv]_proj"),
    (r"\.attn\.w_msa\.proj", ".attention.o_proj"),
    (r"\.ffn\.layers\.0\.0", ".mlp.fc1"),
    (r"\.ffn\.layers\.1", ".mlp.fc2"),
    (r"^panoptic_head\.pixel_decoder", P),
    (r"\.input_convs", ".input_projections"),
    (r"\.lateral_convs\.0", ".adapter_1"),
    (r"\.output_convs\.0", ".layer_1"),
    (r"\.conv\.", ".0."),
    (r"\.gn\.", ".1."),
    (r"\.mask_feature", ".mask_projection"),
    (r"\.level_encoding\.weight", ".level_embed"),
    (rf"^({P}.*)\.attentions\.0", r"\1.self_attn"),
    (rf"^({P}.*)\.norms\.0", r"\1.self_attn_layer_norm"),
    (rf"^({P}.*)\.norms\.1", r"\1.final_layer_norm"),
    (r"\.ffns\.0\.layers\.0\.0", ".fc1"),
    (r"\.ffns\.0\.layers\.1", ".fc2"),
    (r"^panoptic_head\.transformer_decoder\.post_norm", f"{T}.decoder.layernorm"),
    (r"^panoptic_head\.transformer_decoder", f"{T}.decoder"),
    (r"\.attentions\.0\.attn", ".cross_attn"),
    (r"\.attentions\.1\.attn\.in_proj_", ".self_attn.[qkv]_proj."),
    (r"\.attentions\.1\.attn", ".self_attn"),
    (r"\.norms\.0", ".cross_attn_layer_norm"),
    (r"\.norms\.1", ".self_attn_layer_norm"),
    (r"\.norms\.2", ".final_layer_norm"),
    (r"^panoptic_head\.query_embed", f"{T}.queries_embedder"),
    (r"^panoptic_head\.query_feat", f"{T}.queries_features"),
    (r"^panoptic_head\.level_embed", f"{T}.level_embed"),
    (r"^panoptic_head\.cls_embed", "class_predictor"),
    (r"^panoptic_head\.mask_embed\.0", f"{T}.decoder.mask_predictor.mask_embedder.0.0"),
    (r"^panoptic_head\.mask_embed\.2", f"{T}.decoder.mask_predictor.mask_embedder.1.0"),
    (r"^panoptic_head\.mask_embed\.4", f"{T}.decoder.mask_predictor.mask_embedder.2.0"),
]
# Tensors that only transformers has and that no forward pass uses: a norm, and a part of the loss.
UNUSED = {f"{E}.swin.layernorm.weight", f"{E}.swin.layernorm.bias", "criterion.empty_weight"}


def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of mmdet's tensors as those of transformers."""
    if name.endswith(".relative_position_index"):  # a constant
        return {}
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    if "[qkv]" in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("[qkv]", letter): part for letter, part in parts}
    if ".downsample." in name:
        # Four neighbouring places, from (channel, row, column) to (column, row, channel).
        tensor = tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
    return {name: tensor}


def convert(state: dict[str, Tensor], config=None) -> nn.Module:
    """mmdet's tensors -> transformers' Mask2Former; config: of another size than Swin-S's.

    Raises RuntimeError unless every tensor of either side has its counterpart of the same shape.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    network = Mask2FormerForUniversalSegmentation(config or Mask2FormerConfig(num_labels=80))
    tensors = {}
    for name, tensor in state.items():
        tensors |= renamed(name, tensor)
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    wrong = [*unexpected, *(set(missing) - UNUSED)]
    if wrong:
        raise RuntimeError(f"{wrong[0]} has no counterpart")
    return network.eval()


def load_network(model: str) -> nn.Module:
    """The network of mmdet's checkpoint (.pth), by path or URL."""
    need("pip install scipy opencv-python-headless", "scipy", "cv2")
    return convert(read_weights(model)["state_dict"])


def prepare(picture: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """uint8 RGB (H, W, 3) -> what the network sees (1, 3, h, w), and its size without padding."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    padded = np.full((*(-(-side // MULTIPLE) * MULTIPLE for side in size), 3), GREY, np.uint8)
    padded[: size[0], : size[1]] = cv2.resize(picture, size[::-1])  # bilinear, as in mmdet
    normal = (padded - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(normal).permute(2, 0, 1)[None], size


@torch.no_grad()
def segment(network: nn.Module, picture: np.ndarray, threshold: float) -> tuple[Tensor, ...]:
    """uint8 RGB (H, W, 3) -> scores (N,) above the threshold, classes (N,), masks (N, H, W)."""
    pixels, (height, width) = prepare(picture)
    output = network(pixel_values=pixels.to(network.device))
    likely = output.class_queries_logits[0].softmax(-1)[:, :-1]  # the last class is "nothing"
    scores, pairs = likely.flatten().topk(PAIRS)
    pairs, scores = pairs[scores > threshold], scores[scores > threshold]  # scores only fall below
    queries, classes = pairs // likely.shape[1], pairs % likely.shape[1]
    logits = output.masks_queries_logits[0, queries, None]  # (N, 1, h / 4, w / 4)
    logits = F.interpolate(logits, pixels.shape[2:], mode="bilinear")[..., :height, :width]
    logits = F.interpolate(logits, picture.shape[:2], mode="bilinear")[:, 0]
    masks = logits > 0
    area = masks.flatten(1).sum(1)
    scores = scores * (logits.sigmoid() * masks).flatten(1).sum(1) / (area + 1e-6)
    chosen = scores > threshold
    return scores[chosen].cpu(), classes[chosen].cpu(), masks[chosen].cpu()
