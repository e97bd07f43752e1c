"""GenEval's detector: mmdet's tensors in transformers' network, and the picture on its way."""

import hashlib
import math
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="pip install scipy, which transformers' Mask2Former needs")
pytest.importorskip("cv2", reason="pip install opencv-python-headless")
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from rewards import mask2former

# widths of the backbone's first stage and of the rest; blocks and heads of the stages; sides of a
# window; hidden widths of the two transformers, their layers and heads; queries
SWIN_S = dict(embed=96, width=256, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), window=7)
SWIN_S |= dict(hidden=(1024, 2048), layers=(6, 9), attention_heads=8, queries=100)
TINY = dict(embed=8, width=32, depths=(2, 1, 1, 1), heads=(1, 2, 2, 4), window=3)
TINY |= dict(hidden=(24, 20), layers=(1, 2), attention_heads=2, queries=12)


def mmdet_shapes(embed, width, depths, heads, window, hidden, layers, attention_heads, queries):
    """mmdet 2.x's names and shapes of a Mask2Former with a Swin for COCO's 80 classes."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("backbone.patch_embed.projection", embed, 3, 4, 4)
    layer("backbone.patch_embed.norm", embed)
    for i, depth in enumerate(depths):
        size = embed * 2**i
        layer(f"backbone.norm{i}", size)
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            layer(f"{block}.norm1", size)
            layer(f"{block}.norm2", size)
            layer(f"{block}.attn.w_msa.qkv", 3 * size, size)
            layer(f"{block}.attn.w_msa.proj", size, size)
            table = (2 * window - 1) ** 2, heads[i]
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = table
            shapes[f"{block}.attn.w_msa.relative_position_index"] = (window**2, window**2)
            layer(f"{block}.ffn.layers.0.0", 4 * size, size)
            layer(f"{block}.ffn.layers.1", size, 4 * size)
        if i < 3:
            layer(f"backbone.stages.{i}.downsample.norm", 4 * size)
            shapes[f"backbone.stages.{i}.downsample.reduction.weight"] = (2 * size, 4 * size)
    pixel = "panoptic_head.pixel_decoder"
    for i in range(3):
        layer(f"{pixel}.input_convs.{i}.conv", width, embed * 2 ** (3 - i), 1, 1)
        layer(f"{pixel}.input_convs.{i}.gn", width)
    for name, *shape in (("lateral", width, embed, 1, 1), ("output", width, width, 3, 3)):
        shapes[f"{pixel}.{name}_convs.0.conv.weight"] = tuple(shape)
        layer(f"{pixel}.{name}_convs.0.gn", width)
    layer(f"{pixel}.mask_feature", width, width, 1, 1)
    shapes[f"{pixel}.level_encoding.weight"] = (3, width)
    for i in range(layers[0]):
        name = f"{pixel}.encoder.layers.{i}"
        points = attention_heads * 3 * 4  # of three levels, four in each
        layer(f"{name}.attentions.0.sampling_offsets", 2 * points, width)
        layer(f"{name}.attentions.0.attention_weights", points, width)
        layer(f"{name}.attentions.0.value_proj", width, width)
        layer(f"{name}.attentions.0.output_proj", width, width)
        layer(f"{name}.ffns.0.layers.0.0", hidden[0], width)
        layer(f"{name}.ffns.0.layers.1", width, hidden[0])
        layer(f"{name}.norms.0", width)
        layer(f"{name}.norms.1", width)
    for i in range(layers[1]):
        name = f"panoptic_head.transformer_decoder.layers.{i}"
        for j in range(2):
            shapes[f"{name}.attentions.{j}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{name}.attentions.{j}.attn.in_proj_bias"] = (3 * width,)
            layer(f"{name}.attentions.{j}.attn.out_proj", width, width)
        layer(f"{name}.ffns.0.layers.0.0", hidden[1], width)
        layer(f"{name}.ffns.0.layers.1", width, hidden[1])
        for j in range(3):
            layer(f"{name}.norms.{j}", width)
    layer("panoptic_head.transformer_decoder.post_norm", width)
    for name, rows in ("query_embed", queries), ("query_feat", queries), ("level_embed", 3):
        shapes[f"panoptic_head.{name}.weight"] = (rows, width)
    layer("panoptic_head.cls_embed", 81, width)
    for i in (0, 2, 4):
        layer(f"panoptic_head.mask_embed.{i}", width, width)
    return shapes


def mmdet_state(sizes):
    """Values for all of them, the same in any environment."""
    random = np.random.RandomState(0)
    state = {}
    for name, shape in sorted(mmdet_shapes(**sizes).items()):
        if name.endswith("_index"):
            state[name] = torch.zeros(shape)  # a constant, which is not read
            continue
        values = random.standard_normal(shape) / math.sqrt(math.prod(shape[1:]) or 1)
        values = values if len(shape) > 1 else 0.3 * values + name.endswith("weight")
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def tiny_config():
    backbone = SwinConfig(
        embed_dim=TINY["embed"],
        depths=TINY["depths"],
        num_heads=TINY["heads"],
        window_size=TINY["window"],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=TINY["width"],
        mask_feature_size=TINY["width"],
        hidden_dim=TINY["width"],
        encoder_feedforward_dim=TINY["hidden"][0],
        dim_feedforward=TINY["hidden"][1],
        encoder_layers=TINY["layers"][0],
        decoder_layers=TINY["layers"][1] + 1,
        num_attention_heads=TINY["attention_heads"],
        num_queries=TINY["queries"],
        num_labels=80,
    )


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A file as mmcv writes it, and a converter that expects its size."""
    tiny = partial(mask2former.convert, config=tiny_config())
    monkeypatch.setattr(mask2former, "convert", tiny)
    meta = {"epoch": 50, "config": "model = dict()", "CLASSES": ("person", "bicycle"), "hooks": {}}
    torch.save({"meta": meta, "state_dict": mmdet_state(TINY)}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_the_names_here_are_mmdets():
    """The checksum is of `build_detector(config.model).state_dict()` in mmdet 2.28.2."""
    named = sorted(f"{name} {shape}" for name, shape in mmdet_shapes(**SWIN_S).items())
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()
    assert len(named) == 649
    assert digest == "2770df6dbae3053173fd7c11b8526ed21f6467e9866cc55c37ef5b20df2b64c2"


def test_all_of_the_published_tensors_have_a_place():
    with torch.device("meta"):
        own = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(num_labels=80)).state_dict()
        state = {name: torch.empty(shape) for name, shape in mmdet_shapes(**SWIN_S).items()}
    places = {}
    for name, tensor in state.items():
        for new, part in mask2former.renamed(name, tensor).items():
            assert new not in places
            places[new] = part.shape
    assert places.keys() | mask2former.UNUSED == own.keys() and len(places) == 757
    assert all(shape == own[name].shape for name, shape in places.items())


def test_the_network_says_what_mmdet_says(checkpoint):
    """The numbers are those of mmdet 2.28.2's own modules with the same values and sizes.

    There, every parameter has a gradient of at least 1e-6 in them.
    """
    network = mask2former.load_network(str(checkpoint))
    pixels = np.random.RandomState(1).standard_normal((1, 3, 64, 96)).astype(np.float32)
    with torch.no_grad():
        output = network(pixel_values=torch.tensor(pixels))
    classes = torch.tensor(
        [
            [-0.518095, 0.743121, 0.015581, 1.246167, 0.765540],
            [-0.609928, 0.639948, 0.044266, 1.056310, 0.946020],
            [-0.399240, 0.850590, 0.112448, 1.120326, 1.010929],
        ]
    )
    masks = torch.tensor(
        [
            [-2.391140, 1.493567, -3.649421, -0.106545],
            [-2.192472, 1.924521, -3.298031, -0.144179],
            [-1.972665, 1.587516, -3.483260, -0.026133],
        ]
    )
    torch.testing.assert_close(output.class_queries_logits[0, ::4, :5], classes, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        output.masks_queries_logits[0, ::4, 5, ::6], masks, atol=5e-5, rtol=0
    )


def test_no_tensor_is_left_over():
    state = {**mmdet_state(TINY), "other.weight": torch.ones(2)}
    with pytest.raises(RuntimeError, match="other.weight has no counterpart"):
        mask2former.convert(state, tiny_config())


def test_the_published_file_is_fetched_by_its_hash(checkpoint, tmp_path, monkeypatch):
    requests = []

    def fetch(url, file, hash_prefix, **more):
        requests.append((url, hash_prefix))
        checkpoint.rename(file)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        mask2former.load_network(mask2former.URL)
    assert requests == [(mask2former.URL, "743b7d99")]


@pytest.mark.parametrize(
    ("original", "scaled", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((48, 80), (800, 1333), (800, 1344)),
        ((300, 100), (1333, 444), (1344, 448)),  # 444.33
    ],
)
def test_what_the_network_sees(original, scaled, padded):
    picture = np.full((*original, 3), (10, 200, 30), np.uint8)
    pixels, size = mask2former.prepare(picture)
    assert size == scaled and pixels.shape == (1, 3, *padded) and pixels.dtype == torch.float32
    inside = [(10 - 123.675) / 58.395, (200 - 116.28) / 57.12, (30 - 103.53) / 57.375]
    grey = [(128 - 123.675) / 58.395, (128 - 116.28) / 57.12, (128 - 103.53) / 57.375]
    height, width = scaled
    for channel, value, around in zip(pixels[0], inside, grey, strict=True):
        assert torch.allclose(channel[:height, :width], torch.tensor(value), atol=1e-6)
        for part in (channel[height:], channel[:, width:]):
            assert torch.allclose(part, torch.tensor(around), atol=1e-6)


class Says(torch.nn.Module):
    """A network that gives the same answer to every picture."""

    device = torch.device("cpu")

    def __init__(self, classes, masks):
        super().__init__()
        self.class_queries_logits, self.masks_queries_logits = classes[None], masks[None]

    def forward(self, pixel_values):
        assert pixel_values.shape[2:] == tuple(
            4 * side for side in self.masks_queries_logits.shape[2:]
        )
        return self


def test_detections_by_hand():
    """A picture of 48 x 80 is seen as 800 x 1333, in 200 x 336 places of four pixels."""
    chances = torch.full((4, 81), 1e-9)
    for query, (name, chance) in enumerate([(7, 0.5), (7, 0.5), (3, 0.9), (80, 0.9)]):
        chances[query, name], chances[query, 79 if name == 80 else 80] = chance, 1 - chance
    logits = torch.empty(4, 200, 336)
    logits[0] = 1.0
    logits[0, :, 334:] = -100  # this is padding: no pixel of the picture meets it
    logits[1] = 0.1  # too unsure: 0.5 x 0.525 is less than 0.3
    logits[2] = -3.0
    logits[2, :100] = 3.0  # the upper half, whose edge is less sure
    logits[3] = 5.0  # of nothing
    network = Says(chances.log(), logits)
    picture = np.zeros((48, 80, 3), np.uint8)
    scores, classes, masks = mask2former.segment(network, picture, 0.3)
    assert classes.tolist() == [3, 7] and masks.dtype == torch.bool
    assert masks.shape == (2, 48, 80) and masks[1].all()
    assert masks[0, :24].all() and not masks[0, 24:].any()
    assert scores[1].item() == pytest.approx(0.5 * torch.tensor(1.0).sigmoid().item(), abs=1e-6)
    sure = torch.tensor(3.0).sigmoid().item()
    assert 0.9 * sure * 0.98 < scores[0].item() < 0.9 * sure
    none = mask2former.segment(network, picture, 0.95)
    assert [len(part) for part in none] == [0, 0, 0]
