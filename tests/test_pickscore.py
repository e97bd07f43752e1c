"""PickScore against the formula, on a random CLIP."""

import pytest
import torch
from reward_models import pil_pixels
from transformers import CLIPModel, CLIPTokenizer

import rewards

PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def test_pickscore_is_the_scaled_cosine(tiny_clip):
    images = torch.rand(3, 3, 40, 57, generator=torch.Generator().manual_seed(0))
    reward = rewards.load("pickscore", "cpu", str(tiny_clip))
    clip, tokenizer = CLIPModel.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)
    by_hand = []
    with torch.no_grad():
        for pixels, prompt in zip(pil_pixels(images, 32), PROMPTS, strict=True):
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            u = clip.visual_projection(clip.vision_model(pixels[None]).pooler_output)[0]
            v = clip.text_projection(clip.text_model(tokens).pooler_output)[0]
            by_hand.append((clip.logit_scale.exp() * (u @ v) / u.norm() / v.norm()).item())
    assert reward(images, PROMPTS).tolist() == pytest.approx(by_hand, rel=1e-4)
    assert len({round(score, 3) for score in by_hand}) == 3
