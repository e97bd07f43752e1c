"""GenEval's own detector, mmdet 2.x's Mask2Former with a Swin-S, in transformers' Mask2Former.

python -m rewards.mask2former CHECKPOINT FOLDER

GenEval's numbers are defined by this network's weights and by what mmdet does to a picture before
and after it. mmdet needs compiled code and a torch of 2022, so its tensors are renamed here for the
Mask2Former that transformers has, and the rest is written to agree with mmdet bit for bit.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KIND = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
FOLDER = "https://download.openmmlab.com/mmdetection/v2.0/mask2former"
URL = f"{FOLDER}/{KIND}/{KIND}_20220504_001756-743b7d99.pth"  # ends in its SHA-256's beginning
LONG, SHORT = 1333, 800  # pixels: a picture is scaled to fill one side and exceed neither
MULTIPLE, GREY = 32, 128  # its sides are padded to this multiple, in this grey
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # red, green, blue, 0 to 255
PAIRS = 100  # pairs of a query and a class, the likeliest: what may be a detection

# mmdet's names and transformers' names, one rule after the other. mmdet keeps in one tensor the
# three that are written [qkv] here.
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
# Only transformers has these, and a picture never meets them: a norm, and a part of the loss.
UNUSED = {f"{E}.swin.layernorm.weight", f"{E}.swin.layernorm.bias", "criterion.empty_weight"}


def network_class() -> type[nn.Module]:
    """transformers' Mask2Former. Raises ImportError where scipy is not installed."""
    try:
        import scipy  # noqa: F401, which transformers needs to import the class
    except ImportError:
        raise ImportError("GenEval's detector needs `pip install scipy`") from None
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation


def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of mmdet's tensors as the one, or the three, of transformers."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    if "[qkv]" in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("[qkv]", letter): part for letter, part in parts}
    if ".downsample." in name:
        # Four neighbouring places, as (channel, row, column) -> as (column, row, channel).
        tensor = tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
    elif name.endswith(".relative_position_index"):
        tensor = tensor.flatten()
    return {name: tensor}


def convert(state: dict[str, Tensor], config=None) -> nn.Module:
    """mmdet's tensors -> transformers' Mask2Former; config: of another size than Swin-S's.

    Raises ValueError unless every tensor of either side has its counterpart.
    """
    from transformers import Mask2FormerConfig

    network = network_class()(config or Mask2FormerConfig(num_labels=80))
    network.config.mmdet = True  # which tells `rewards.geneval` to use `segment` below
    places = {**dict(network.named_buffers()), **network.state_dict()}
    places = {name: place for name, place in places.items() if name not in UNUSED}
    for old, tensor in state.items():
        try:
            parts = renamed(old, tensor)
        except (ValueError, RuntimeError):  # its shape is one that cannot be taken apart
            parts = {old: tensor}
        for name, x in parts.items():
            place = places.pop(name, None)
            fits = place is not None and place.shape == x.shape
            if fits and not place.is_floating_point():  # the windows' index, a constant of both
                fits = torch.equal(place, x)
            if not fits:
                raise ValueError(f"not mmdet 2.x's {KIND}: there is no place for {old}")
            place.copy_(x)
    if places:
        raise ValueError(f"not mmdet 2.x's {KIND}: there is nothing for {min(places)}")
    return network.eval()


def convert_file(checkpoint: Path, folder: Path) -> None:
    """mmdet's checkpoint -> a folder for `from_pretrained`, which is there whole or not at all.

    Raises ValueError if the file is another network's or none, OSError if it cannot be read or the
    folder cannot be made.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {checkpoint}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError):
        content = None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{checkpoint} is no whole checkpoint of mmdet's: give the file at {URL}")
    try:
        network = convert(state)
    except ValueError as error:
        raise ValueError(f"{checkpoint} is {error}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        network.save_pretrained(Path(aside, "whole"))
        try:
            Path(aside, "whole").rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker
                raise


def find(model: str) -> str:
    """A name or folder for `from_pretrained`: `model`, or what its checkpoint (.pth) became.

    A checkpoint is converted the first time, into a folder of its name beside it, which is kept.
    URL is fetched the first time, and kept with torch.hub's other files.
    """
    if not model.endswith(".pth"):
        return model
    checkpoint = Path(model)
    if model == URL:
        checkpoint = Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
    folder = checkpoint.with_suffix("")
    if folder.is_dir():
        return str(folder)
    if model == URL and not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(checkpoint), hash_prefix=checkpoint.stem[-8:])
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            message = f"{URL}: {error}. Fetch it elsewhere and give its path instead"
            raise OSError(message) from error
    convert_file(checkpoint, folder)
    return str(folder)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (height, width, 3), bilinear and to the bit as OpenCV does it.

    Weights are whole 2048ths, and what is between the two passes loses four bits.
    """

    def taps(old: int, new: int) -> tuple[np.ndarray, ...]:
        place = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
        first = np.floor(place)
        second = place - first
        weights = [np.rint(share * 2048).astype(int) for share in (1 - second, second)]
        return *(np.clip(first.astype(int) + i, 0, old - 1) for i in (0, 1)), *weights

    left, right, left_weight, right_weight = taps(picture.shape[1], width)
    top, bottom, top_weight, bottom_weight = taps(picture.shape[0], height)
    pixels = picture.astype(int)
    rows = pixels[:, left] * left_weight[:, None] + pixels[:, right] * right_weight[:, None]
    rows >>= 4
    upper = rows[top] * top_weight[:, None, None] >> 16
    lower = rows[bottom] * bottom_weight[:, None, None] >> 16
    return (upper + lower + 2 >> 2).astype(np.uint8)


def prepare(picture: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (H, W, 3), RGB -> what the network sees (1, 3, h, w), and its size without padding."""
    height, width = picture.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    padded = np.full((*(-(-side // MULTIPLE) * MULTIPLE for side in size), 3), GREY, np.uint8)
    padded[: size[0], : size[1]] = resize(picture, *size)
    normal = (padded - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(normal).permute(2, 0, 1)[None], size


@torch.no_grad()
def segment(
    network: nn.Module, picture: np.ndarray, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (H, W, 3), RGB -> scores (N,) above the threshold, classes (N,), masks (N, H, W)."""
    pixels, (height, width) = prepare(picture)
    output = network(pixel_values=pixels.to(network.device))
    likely = output.class_queries_logits[0].softmax(-1)[:, :-1]  # the last class is "nothing"
    scores, pairs = likely.flatten().topk(PAIRS)
    pairs, scores = pairs[scores > threshold], scores[scores > threshold]  # they only get lower
    queries, classes = pairs // likely.shape[1], pairs % likely.shape[1]
    logits = output.masks_queries_logits[0, queries, None]  # (N, 1, h / 4, w / 4)
    logits = F.interpolate(logits, pixels.shape[2:], mode="bilinear")[..., :height, :width]
    logits = F.interpolate(logits, picture.shape[:2], mode="bilinear")[:, 0]
    masks = logits > 0
    area = masks.flatten(1).sum(1)
    scores = scores * (logits.sigmoid() * masks).flatten(1).sum(1) / (area + 1e-6)
    kept = scores > threshold
    return scores[kept].cpu(), classes[kept].cpu(), masks[kept].cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rewards.mask2former", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help=f"mmdet's file, from {URL}")
    parser.add_argument("folder", type=Path, help="to be made; --reward_model geneval=FOLDER")
    args = parser.parse_args(argv)
    try:
        if args.folder.exists():
            raise ValueError(f"{args.folder} is there already: give another folder")
        print(f"reading {args.checkpoint}", flush=True)
        convert_file(args.checkpoint, args.folder)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"every tensor has found its place: {args.folder}")


if __name__ == "__main__":
    main()
