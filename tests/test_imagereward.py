"""ImageReward against its published forward pass, written out here, on random tensors."""

import pytest
import torch
import torch.nn.functional as F
from pil_pixels import pil_pixels
from transformers import BertTokenizer

import rewards

PROMPTS = ["a red circle", "a blue square", "a green circle and a red square"]


def published_imagereward(width=128, hidden=64, patch=8, side=24):
    """Random tensors under the names of the published ImageReward.pt."""
    generator, state = torch.Generator().manual_seed(0), {}

    def put(name, *shape):
        state[name] = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def linear(name, n_out, n_in):
        put(f"{name}.weight", n_out, n_in)
        put(f"{name}.bias", n_out)

    def norm(name, n):
        scale, shift = torch.rand(2, n, generator=generator)
        state[f"{name}.weight"], state[f"{name}.bias"] = scale + 0.5, shift

    seeing, reader = "blip.visual_encoder.", "blip.text_encoder."
    put(f"{seeing}cls_token", 1, 1, width)
    put(f"{seeing}pos_embed", 1, (side // patch) ** 2 + 1, width)
    put(f"{seeing}patch_embed.proj.weight", width, 3, patch, patch)
    put(f"{seeing}patch_embed.proj.bias", width)
    for i in range(2):
        block = f"{seeing}blocks.{i}."
        norm(f"{block}norm1", width), norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, width), linear(f"{block}attn.proj", width, width)
        linear(f"{block}mlp.fc1", 2 * width, width), linear(f"{block}mlp.fc2", width, 2 * width)
    norm(f"{seeing}norm", width)
    put(f"{reader}embeddings.word_embeddings.weight", 40, hidden)
    put(f"{reader}embeddings.position_embeddings.weight", 48, hidden)
    state[f"{reader}embeddings.position_ids"] = torch.arange(48)[None]
    norm(f"{reader}embeddings.LayerNorm", hidden)
    for i in range(2):
        layer = f"{reader}encoder.layer.{i}."
        for kind, n in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}{kind}.self.query", hidden, hidden)
            linear(f"{layer}{kind}.self.key", hidden, n)
            linear(f"{layer}{kind}.self.value", hidden, n)
            linear(f"{layer}{kind}.output.dense", hidden, hidden)
            norm(f"{layer}{kind}.output.LayerNorm", hidden)
        linear(f"{layer}intermediate.dense", 2 * hidden, hidden)
        linear(f"{layer}output.dense", hidden, 2 * hidden)
        norm(f"{layer}output.LayerNorm", hidden)
    sizes = [hidden, 1024, 128, 64, 16, 1]
    for i, place in enumerate((0, 2, 4, 6, 7)):
        linear(f"mlp.layers.{place}", sizes[i + 1], sizes[i])
    return state


def imagereward_by_hand(state, pixels, ids, mask):
    """The published forward pass of one picture (3, H, W) and one prompt's tokens, written out."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, mask=None):  # (tokens, width), heads 64 wide
        q, k, v = (x.view(len(x), -1, 64).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / 8
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    seeing, reader = "blip.visual_encoder.", "blip.text_encoder."
    kernel = state[f"{seeing}patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, state[f"{seeing}patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([state[f"{seeing}cls_token"][0], x.flatten(1).T]) + state[f"{seeing}pos_embed"][0]
    for i in range(2):
        block = f"{seeing}blocks.{i}."
        qkv = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}attn.proj", attend(*qkv))
        up = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + linear(f"{block}mlp.fc2", up)
    seen = norm(f"{seeing}norm", x, 1e-6)

    h = state[f"{reader}embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{reader}embeddings.position_embeddings.weight"][: len(ids)]
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
def files(tmp_path):
    """A tokenizer of BERT's kind with few words, and a small ImageReward.pt."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green circle square and blue".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    torch.save(published_imagereward(), tmp_path / "ImageReward.pt")
    return tmp_path / "words", tmp_path / "ImageReward.pt"


def test_imagereward_is_the_published_forward_pass(files):
    images = torch.rand(3, 3, 30, 41, generator=torch.Generator().manual_seed(1))
    reward = rewards.load("imagereward", "cpu", f"{files[0]},{files[1]}")
    tokenizer, state = BertTokenizer.from_pretrained(files[0]), published_imagereward()
    by_hand = []
    for pixels, prompt in zip(pil_pixels(images, 24), PROMPTS, strict=True):
        tokens = tokenizer(prompt, padding="max_length", max_length=35)
        ids, mask = (torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask"))
        by_hand.append(imagereward_by_hand(state, pixels, ids, mask.bool()))
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len({round(score, 3) for score in by_hand}) == 3


def test_a_file_without_a_tensor_is_refused(files, tmp_path):
    state = published_imagereward()
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(rewards.RewardError, match="load the reward imagereward: RuntimeError"):
        rewards.load("imagereward", "cpu", f"{files[0]},{tmp_path / 'other.pt'}")
