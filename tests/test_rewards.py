"""The rewards' interface, names and weights, and each reward on models built here."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, CLIPModel, CLIPProcessor

import rewards

OWN = f"{Path(__file__).parent}/own_rewards.py"
PROMPTS = [{"prompt": text} for text in ("a red circle", "two blue squares", "a green triangle")]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def test_names_are_the_files():
    assert {"pickscore", "compressibility"} <= set(rewards.names())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("pickscore", ("pickscore", 1.0)),
        ("pickscore=0.8", ("pickscore", 0.8)),
        ("pickscore=-2", ("pickscore", -2.0)),
        (f"{OWN}:brightness", (f"{OWN}:brightness", 1.0)),
        (f"{OWN}:brightness=3", (f"{OWN}:brightness", 3.0)),
        ("shapes:strict", ("shapes:strict", 1.0)),
    ],
)
def test_a_spec_is_a_name_and_a_weight(spec, expected):
    assert rewards.parse(spec) == expected


def test_a_file_is_read_and_not_run_until_it_is_loaded(tmp_path):
    file = tmp_path / "loud.py"
    file.write_text("raise SystemExit('was run')\ndef f(images, prompts): return []\n")
    assert rewards.parse(f"{file}:f") == (f"{file}:f", 1.0)
    with pytest.raises(SystemExit, match="was run"):
        rewards.load(f"{file}:f", "cpu")


@pytest.mark.parametrize("name", [f"{OWN}:brightness", "own_rewards:brightness"])
def test_own_rewards_by_file_and_by_package(name, images, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert rewards.parse(name)
    reward = rewards.load(name, "cpu")
    assert torch.allclose(rewards.score(name, reward, images, PROMPTS), images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: 1 / 0, "reward mine failed .* 'a red circle': ZeroDivisionError"),
        (lambda images, prompts: [1.0], r"mine must return 3 scores, got \(1,\), of prompt 'a red"),
        (lambda images, prompts: [[1.0]] * 3, r"mine must return 3 scores, got \(3, 1\)"),
        (lambda images, prompts: ["good"] * 3, "reward mine failed"),
    ],
)
def test_a_reward_that_fails_is_named(reward, message, images):
    with pytest.raises(rewards.RewardError, match=message):
        rewards.score("mine", reward, images, PROMPTS)


def test_compressibility_is_minus_the_size_as_jpeg(images):
    images[1] = 0.5
    scores = rewards.load("compressibility", "cpu")(images, PROMPTS)
    file = io.BytesIO()
    pixels = (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    assert scores[0] == -len(file.getvalue()) / 1000
    assert scores[1] > scores[0] and scores[1] > scores[2]


def test_pickscore_is_the_scaled_cosine(tiny_clip, images):
    reward = rewards.load("pickscore", "cpu", str(tiny_clip))
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPProcessor.from_pretrained(tiny_clip)
    by_hand = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        seen = processor.image_processor(pixels, return_tensors="pt")["pixel_values"]
        read = processor.tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            u = clip.visual_projection(clip.vision_model(seen).pooler_output)[0]
            v = clip.text_projection(clip.text_model(read).pooler_output)[0]
        cosine = u @ v / u.norm() / v.norm()
        by_hand.append(clip.logit_scale.exp().item() * cosine.item())
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, rel=1e-4)
    assert len({round(score, 4) for score in by_hand}) == 3


def test_aesthetic_is_the_linear_head_on_the_normalised_embedding(tiny_clip, images, tmp_path):
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    sizes, state = [clip.config.projection_dim, 1024, 128, 64, 16, 1], {}
    torch.manual_seed(0)
    for i, place in enumerate((0, 2, 4, 6, 7)):  # as the published file has them
        state[f"layers.{place}.weight"] = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
        state[f"layers.{place}.bias"] = torch.randn(sizes[i + 1])
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.load("aesthetic", "cpu", f"{tiny_clip},{tmp_path / 'head.pth'}")

    processor = CLIPProcessor.from_pretrained(tiny_clip)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = processor.image_processor(list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(seen).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    assert torch.allclose(reward(images, PROMPTS), x[:, 0], rtol=1e-4, atol=1e-5)


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

    eye, reader = "blip.visual_encoder.", "blip.text_encoder."
    put(f"{eye}cls_token", 1, 1, width)
    put(f"{eye}pos_embed", 1, (side // patch) ** 2 + 1, width)
    put(f"{eye}patch_embed.proj.weight", width, 3, patch, patch)
    put(f"{eye}patch_embed.proj.bias", width)
    for i in range(2):
        block = f"{eye}blocks.{i}."
        norm(f"{block}norm1", width), norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, width), linear(f"{block}attn.proj", width, width)
        linear(f"{block}mlp.fc1", 2 * width, width), linear(f"{block}mlp.fc2", width, 2 * width)
    norm(f"{eye}norm", width)
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

    eye, reader = "blip.visual_encoder.", "blip.text_encoder."
    kernel = state[f"{eye}patch_embed.proj.weight"]
    x = F.conv2d(pixels, kernel, state[f"{eye}patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([state[f"{eye}cls_token"][0], x.flatten(1).T]) + state[f"{eye}pos_embed"][0]
    for i in range(2):
        block = f"{eye}blocks.{i}."
        qkv = linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}attn.proj", attend(*qkv))
        up = F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + linear(f"{block}mlp.fc2", up)
    seen = norm(f"{eye}norm", x, 1e-6)

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
def imagereward_files(tmp_path):
    """The published file in small, and a word tokenizer of BERT's kind."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green circle square and blue".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "words")
    torch.save(published_imagereward(), tmp_path / "ImageReward.pt")
    return tmp_path / "words", tmp_path / "ImageReward.pt"


def test_imagereward_is_the_published_forward_pass(imagereward_files):
    words, file = imagereward_files
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    reward = rewards.load("imagereward", "cpu", f"{words},{file}")
    tokenizer, state = BertTokenizer.from_pretrained(words), torch.load(file, weights_only=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    by_hand = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        tokens = tokenizer(prompt["prompt"], padding="max_length", max_length=35)
        ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
        pixels = ((image * 255).round() / 255 - mean) / std
        by_hand.append(imagereward_by_hand(state, pixels, ids, mask.bool()))
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len({round(score, 3) for score in by_hand}) == 3


def test_imagereward_of_another_file_is_refused(imagereward_files, tmp_path):
    words, file = imagereward_files
    state = torch.load(file, weights_only=True)
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="crossattention.self.key.bias"):
        rewards.load("imagereward", "cpu", f"{words},{tmp_path / 'other.pt'}")
