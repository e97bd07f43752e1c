"""Stable Diffusion 3.5 as Algorithm 1 sees it: pictures by a deterministic sampler, and velocities.

theta is a LoRA in a frozen transformer. So four networks share one set of weights: theta; the
reference, which is the transformer without the LoRA; and theta_old and the saved average, which are
other values of the LoRA. Whose answer is wanted is said by a context, as in

    with model.theta_old():
        latents = model.sample("a red cube", noise, steps=10, guidance=4.5)

Times are the sampler's, in [0, 1], with 1 = pure noise; diffusers' transformer takes 1000 times it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import diffusers
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import dgpo
from cli import Fault, first_line

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

LORA_FILE = "pytorch_lora_weights.safetensors"  # as load_lora_weights of diffusers looks for it
LORA_LAYERS = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_q to_v to_out.0"
LORA_TARGETS = [f"attn.{name}" for name in LORA_LAYERS.split()]


def load_pipeline(model: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Transformer and text encoders in dtype, the VAE in float32; nothing trains. Raises Fault."""
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            model, dtype={"default": dtype, "vae": torch.float32}
        )
    except (OSError, ValueError) as error:
        raise Fault(
            f"cannot load {model} ({first_line(error)}). Accept its licence at "
            f"https://huggingface.co/{model} and log in by `hf auth login`, or give a local folder"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def make_scheduler(sampler: str, shift: float) -> Any:
    """A rollout's sampler, "dpm++" or "euler". shift: t becomes shift t / (1 + (shift - 1) t)."""
    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # Leaving out flow_shift would silently give an unshifted schedule.
    return diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )


def rollout_times(scheduler: Any, steps: int) -> Tensor:
    """The times (steps,) at which a rollout asks the model, in [0, 1], noisiest first.

    They are what the scheduler gives to the model, in thousandths, as in the released trainer. Its
    sigmas are a little larger with DPM-Solver++, which rounds times down.
    """
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float() / 1000


def add_lora(
    transformer: nn.Module, rank: int, alpha: int, seed: int, checkpointing: bool
) -> list[nn.Parameter]:
    """Puts a LoRA that changes nothing yet into the transformer. Returns theta, in float32.

    seed: of its start, the same on every process. checkpointing: of activations, to save memory.
    """
    torch.manual_seed(seed)
    about = {"init_lora_weights": "gaussian", "target_modules": LORA_TARGETS}
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, **about))
    cast_training_params(transformer, dtype=torch.float32)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The transformer is the reference here."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


@contextlib.contextmanager
def with_values(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have these values here. Storage is exchanged, nothing is copied."""

    def exchange() -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data, value.data = value.data, parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()


@torch.no_grad()
def decode(vae: diffusers.AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of latents (N, C, h, w) in any precision."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@dataclass
class Encoded:
    """What the text encoders make of a prompt: embeds (1, tokens, width), pooled (1, width)."""

    embeds: Tensor
    pooled: Tensor


class Encoder:
    """Text encoders that run ahead for some prompts and then leave the device."""

    def __init__(self, pipe: StableDiffusion3Pipeline, length: int, device: torch.device):
        # A pipeline of its own, so that all modules of the other one stay on the device.
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        self.modules = [getattr(pipe, name) for name in names if getattr(pipe, name) is not None]
        self.pipe = StableDiffusion3Pipeline(
            **{**pipe.components, "transformer": None, "vae": None}
        )
        for name in names:
            setattr(pipe, name, None)
        self.length, self.device = length, device

    @torch.no_grad()
    def __call__(self, texts: list[str], known: dict[str, Encoded]) -> dict[str, Encoded]:
        """What these and the empty prompt become, on the CPU, each encoded once."""
        texts = list(dict.fromkeys(["", *texts]))
        found = {text: known[text] for text in texts if text in known}
        for module in self.modules:
            module.to(self.device)
        # One by one: what a prompt becomes does not depend on the others of a batch.
        for text in texts:
            if text not in found:
                how = {"device": self.device, "max_sequence_length": self.length}
                embeds, _, pooled, _ = self.pipe.encode_prompt(
                    text, text, text, do_classifier_free_guidance=False, **how
                )
                found[text] = Encoded(embeds.float().cpu(), pooled.float().cpu())
        for module in self.modules:
            module.to("cpu")
        return found


@dataclass
class Model:
    """Who can be asked, and for what. Asked is theta, unless a context names another.

    theta: the LoRA's parameters. resolution: a picture's side in pixels. images_a_pass: most images
    in a network at once. autocast: gives the transformer's context. between_passes: called before
    each pass; what it raises ends the work. encoded: the prompts at hand, and for guidance "".
    """

    pipe: StableDiffusion3Pipeline
    theta: list[nn.Parameter]
    resolution: int
    images_a_pass: int
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    between_passes: Callable[[], None] = lambda: None
    encoded: dict[str, Encoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.old = [parameter.detach().clone() for parameter in self.theta]  # theta_old
        self.average = [parameter.detach().clone() for parameter in self.theta]  # the saved one

    @property
    def device(self) -> torch.device:
        return self.theta[0].device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels, side, side

    def reference(self) -> contextlib.AbstractContextManager:
        return without_lora(self.pipe.transformer)

    def theta_old(self) -> contextlib.AbstractContextManager:
        return with_values(self.theta, self.old)

    def saved_average(self) -> contextlib.AbstractContextManager:
        return with_values(self.theta, self.average)

    def embedding(self, text: str) -> Encoded:
        found = self.encoded[text]
        return Encoded(found.embeds.to(self.device), found.pooled.to(self.device))

    def sample(self, text: str, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents (N, C, h, w) by the deterministic sampler, from noise of that shape."""
        prompt, empty = self.embedding(text), self.embedding("")
        parts = []
        for x in noise.to(self.device).split(self.images_a_pass):
            self.between_passes()
            expand = [len(x), -1, -1]
            with self.autocast():
                output = self.pipe(
                    prompt_embeds=prompt.embeds.expand(expand),
                    pooled_prompt_embeds=prompt.pooled.expand(expand[:2]),
                    negative_prompt_embeds=empty.embeds.expand(expand),
                    negative_pooled_prompt_embeds=empty.pooled.expand(expand[:2]),
                    latents=x,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=self.resolution,
                    width=self.resolution,
                    output_type="latent",
                )
            parts.append(output.images)
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1]."""
        parts = []
        for x in latents.split(self.images_a_pass):
            self.between_passes()
            parts.append(decode(self.pipe.vae, x))
        return torch.cat(parts)

    def velocity(
        self,
        text: str,
        guidance: float = 1.0,
        who: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> dgpo.Velocity:
        """The transformer as (x_t (B, C, h, w), t (B,), p (B,)) -> v, for one prompt.

        who: the context of the one that is asked, such as self.reference; by default theta.
        """
        encoded = [self.embedding(each) for each in ([text] if guidance == 1 else [text, ""])]

        def v(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
            self.between_passes()
            n, copies = len(x), len(encoded)
            with who(), self.autocast():
                output = self.pipe.transformer(
                    hidden_states=x.repeat(copies, 1, 1, 1),
                    timestep=1000 * t.repeat(copies),
                    encoder_hidden_states=torch.cat([e.embeds.expand(n, -1, -1) for e in encoded]),
                    pooled_projections=torch.cat([e.pooled.expand(n, -1) for e in encoded]),
                    return_dict=False,
                )[0].float()
            if copies == 1:
                return output
            conditional, unconditional = output.chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        return v


def save_lora(model: Model, folder: Path) -> None:
    """The saved average as LORA_FILE in folder, complete or not there at all."""
    transformer = model.pipe.transformer
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        with model.saved_average():
            StableDiffusion3Pipeline.save_lora_weights(
                aside,
                weight_name=LORA_FILE,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                # Without this, the LoRA would be loaded at scale 1 instead of alpha / rank.
                transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
            )
        os.replace(Path(aside) / LORA_FILE, folder / LORA_FILE)


def load_lora(pipe: StableDiffusion3Pipeline, folder: Path | str) -> None:
    """Puts the LoRA of a folder into a pipeline, to draw with it. Raises Fault."""
    try:
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise Fault(f"the LoRA in {folder} does not fit the model ({first_line(error)})") from None
