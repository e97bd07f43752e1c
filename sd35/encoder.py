"""Prompts encoded as Stable Diffusion 3.5's pipeline does, with one text encoder on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import offload_models
from torch import Tensor, nn


@dataclass
class Encoded:
    """The text encoders' output for one prompt: embeds (1, tokens, width), pooled (1, width)."""

    embeds: Tensor
    pooled: Tensor


class Encoder:
    """Text encoders that visit the device one at a time.

    The transformer and the VAE leave it meanwhile, as T5-XXL alone takes 9.5 GB. T5 and the larger
    CLIP are freed afterwards, and read again by the next call. That takes seconds: encode many
    steps' prompts at once, but not all, as each takes 3 MB.
    """

    def __init__(self, pipe: Any, length: int, device: torch.device):
        self.pipe, self.length, self.device = type(pipe)(**pipe.components), length, device
        self.reload: dict[str, Callable[[], nn.Module]] = {}
        for name in ("text_encoder_2", "text_encoder_3"):
            if network := getattr(pipe, name):
                int8 = getattr(network.config, "quantization_config", None)
                options = {"dtype": network.dtype, "quantization_config": int8}
                load = type(network).from_pretrained
                self.reload[name] = partial(load, network.name_or_path, **options)
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None  # else it stays on CPU

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """Put a text encoder, if the pipeline has it, on the device; free it at the end."""
        if name in self.reload:
            network = getattr(self.pipe, name) or self.reload[name]()
            network.to(self.device)
            setattr(self.pipe, name, network)
            del network
        try:
            yield
        finally:
            setattr(self.pipe, name, None)
            torch.cuda.empty_cache()  # which does nothing without a GPU

    @torch.no_grad()
    def __call__(self, texts: list[str], known: dict[str, Encoded]) -> dict[str, Encoded]:
        """Encode the prompts and "" as the pipeline does; results on the CPU. Reuses `known`."""
        texts = list(dict.fromkeys(["", *texts]))
        new = [text for text in texts if text not in known]
        pipe, length, device = self.pipe, self.length, self.device
        clip, t5 = pipe._get_clip_prompt_embeds, pipe._get_t5_prompt_embeds
        with offload_models(pipe.transformer, pipe.vae, device="cpu"):
            with offload_models(pipe.text_encoder, device=device):
                clip_1 = [clip(text, device=device, clip_model_index=0) for text in new]
            with self.visit("text_encoder_2"):
                clip_2 = [clip(text, device=device, clip_model_index=1) for text in new]
            with self.visit("text_encoder_3"):
                last = [t5(text, device=device, max_sequence_length=length).cpu() for text in new]

        encoded = dict(known)
        for text, one, two, three in zip(new, clip_1, clip_2, last, strict=True):
            embeds, pooled = (torch.cat(pair, -1).cpu() for pair in zip(one, two, strict=True))
            embeds = nn.functional.pad(embeds, (0, three.shape[-1] - embeds.shape[-1]))
            encoded[text] = Encoded(torch.cat([embeds, three], 1).float(), pooled.float())
        return {text: encoded[text] for text in texts}

    def too_long(self, texts: list[str]) -> list[str]:
        """The prompts that CLIP or T5 truncates, while a reward reads them whole."""
        limits = [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]
        limits += [(self.pipe.tokenizer_3, self.length)] if "text_encoder_3" in self.reload else []
        return [
            text
            for text in dict.fromkeys(texts)
            if any(len(tokenizer(text).input_ids) > limit for tokenizer, limit in limits)
        ]
