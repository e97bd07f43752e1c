"""The rewards' interface, names and weights, and each reward on models built here."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

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
