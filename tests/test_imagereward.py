"""ImageReward against its published forward pass, written out here, on random tensors."""

import pytest
import torch
import torch.nn.functional as F
from reward_models import pil_pixels, random_tensors
from transformers import BertTokenizer

import rewards
from rewards import imagereward

PROMPTS = ["a red circle", "a blue square", "a green circle and a red square"]

VISION = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
VISION |= dict(image_size=24, patch_size=8, layer_norm_eps=1e-6)
TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
TEXT |= dict(vocab_size=40, encoder_hidden_size=128, max_position_embeddings=48)

# The published names, and shapes in small.
TENSORS = """
V.cls_token 1 1 128
V.pos_embed 1 10 128
V.patch_embed.proj.weight 128 3 8 8
V.patch_embed.proj.bias 128
V.blocks.#.norm1.* 128
V.blocks.#.norm2.* 128
V.blocks.#.attn.qkv.* 384 128
V.blocks.#.attn.proj.* 128 128
V.blocks.#.mlp.fc1.* 256 128
V.blocks.#.mlp.fc2.* 128 256
V.norm.* 128
T.embeddings.word_embeddings.weight 40 64
T.embeddings.position_embeddings.weight 48 64
T.embeddings.position_ids 1 48
T.embeddings.LayerNorm.* 64
T.encoder.layer.#.attention.self.query.* 64 64
T.encoder.layer.#.attention.self.key.* 64 64
T.encoder.layer.#.attention.self.value.* 64 64
T.encoder.layer.#.attention.output.dense.* 64 64
T.encoder.layer.#.attention.output.LayerNorm.* 64
T.encoder.layer.#.crossattention.self.query.* 64 64
T.encoder.layer.#.crossattention.self.key.* 64 128
T.encoder.layer.#.crossattention.self.value.* 64 128
T.encoder.layer.#.crossattention.output.dense.* 64 64
T.encoder.layer.#.crossattention.output.LayerNorm.* 64
T.encoder.layer.#.intermediate.dense.* 128 64
T.encoder.layer.#.output.dense.* 64 128
T.encoder.layer.#.output.LayerNorm.* 64
mlp.layers.0.* 1024 64
mlp.layers.2.* 128 1024
mlp.layers.4.* 64 128
mlp.layers.6.* 16 64
mlp.layers.7.* 1 16
"""
STATE = random_tensors(TENSORS.strip(), V="blip.visual_encoder", T="blip.text_encoder")


def forward(pixels, ids, mask):
    """The published forward pass of one picture (3, H, W) and one prompt's tokens, written out."""

    def linear(name, x):
        return F.linear(x, STATE[f"{name}.weight"], STATE[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], STATE[f"{name}.weight"], STATE[f"{name}.bias"], eps)

    def attend(q, k, v, mask=None):  # (tokens, width), heads 64 wide
        q, k, v = (x.view(len(x), -1, 64).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / 8
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    seeing, reader = "blip.visual_encoder.", "blip.text_encoder."
    kernel = STATE[f"{seeing}patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, STATE[f"{seeing}patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([STATE[f"{seeing}cls_token"][0], x.flatten(1).T]) + STATE[f"{seeing}pos_embed"][0]
    for i in range(2):
        block = f"{seeing}blocks.{i}."
        qkv = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}attn.proj", attend(*qkv))
        up = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + linear(f"{block}mlp.fc2", up)
    seen = norm(f"{seeing}norm", x, 1e-6)

    h = STATE[f"{reader}embeddings.word_embeddings.weight"][ids]
    h = h + STATE[f"{reader}embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(f"{reader}embeddings.LayerNorm", h, 1e-12)
    for i in range(2):
        layer = f"{reader}encoder.layer.{i}."
        for kind, source, hide in (("attention", None, mask), ("crossattention", seen, None)):
            k_from = h if source is None else source
            q = linear(f"{layer}{kind}.self.query", h)
            k, v = (linear(f"{layer}{kind}.self.{part}", k_from) for part in ("key", "value"))
            out = linear(f"{layer}{kind}.output.dense", attend(q, k, v, hide))
            h = norm(f"{layer}{kind}.output.LayerNorm", out + h, 1e-12)
        up = F.gelu(linear(f"{layer}intermediate.dense", h))
        h = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", up) + h, 1e-12)
    score = h[0]
    for place in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{place}", score)
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A tokenizer of BERT's kind with few words, and a small ImageReward.pt."""
    monkeypatch.setattr(imagereward, "VISION", VISION)
    monkeypatch.setattr(imagereward, "TEXT", TEXT)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green circle square and blue".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    torch.save(STATE, tmp_path / "ImageReward.pt")
    return tmp_path / "words", tmp_path / "ImageReward.pt"


def test_imagereward_is_the_published_forward_pass(files):
    images = torch.rand(3, 3, 30, 41, generator=torch.Generator().manual_seed(1))
    reward = rewards.load("imagereward", "cpu", f"{files[0]},{files[1]}")
    tokenizer = BertTokenizer.from_pretrained(files[0])
    by_hand = []
    for pixels, prompt in zip(pil_pixels(images, 24), PROMPTS, strict=True):
        tokens = tokenizer(prompt, padding="max_length", max_length=35)
        ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
        by_hand.append(forward(pixels, ids, mask.bool()))
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len({round(score, 3) for score in by_hand}) == 3
