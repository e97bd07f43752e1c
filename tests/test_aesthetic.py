"""LAION's predictor against its formula, on a random CLIP and a random head."""

import pytest
import torch
from reward_models import pil_pixels
from transformers import CLIPModel

import rewards


def test_aesthetic_is_the_linear_head_on_the_normalised_embedding(tiny_clip, tmp_path):
    images = torch.rand(2, 3, 57, 40, generator=torch.Generator().manual_seed(0))
    sizes, state = [16, 1024, 128, 64, 16, 1], {}
    torch.manual_seed(0)
    for i, place in enumerate((0, 2, 4, 6, 7)):  # as in the published file
        state[f"layers.{place}.weight"] = torch.randn(sizes[i + 1], sizes[i]) / sizes[i] ** 0.5
        state[f"layers.{place}.bias"] = torch.randn(sizes[i + 1])
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.load("aesthetic", "cpu", f"{tiny_clip},{tmp_path / 'head.pth'}")

    clip = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(pil_pixels(images, 32)).pooler_output)
        x = x / x.norm(dim=1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    assert torch.allclose(reward(images), x[:, 0], rtol=1e-4, atol=1e-5)


def test_other_weights_are_two_names():
    with pytest.raises(rewards.RewardError, match="weights are given as clip,head.pth, got 'clip'"):
        rewards.load("aesthetic", "cpu", "clip")
