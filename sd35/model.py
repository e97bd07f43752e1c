"""Stable Diffusion 3.5 as Algorithm 1 sees it: images by a deterministic sampler, and velocities.

theta is a LoRA in a frozen transformer, so four networks share one set of weights: theta; the
reference, which is the transformer without the LoRA; and theta_old and the saved average, which are
other values of the LoRA. `Model` has a context for each of the last three:

    with model.theta_old():
        latents = model.sample("a red cube", noise, steps=10, guidance=4.5)

Times are in [0, 1], where 1 is pure noise; diffusers has them times 1000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from sd35.encoder import Encoded
from sd35.gradient import Velocity
from sd35.lora import int8_config, one_line
from sd35.settings import Settings, UserError

Context = Callable[[], AbstractContextManager]

# What a seed is for
NOISE, TIMES, TRAINING_NOISE, ORDER, VALIDATION = range(5)


def seeded(*key: int) -> torch.Generator:
    """A generator for (seed, purpose, step, ...): the same numbers on any process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def load_pipeline(model: str, dtype: torch.dtype, quantize: str = "none") -> Any:
    """The StableDiffusion3Pipeline of a hub name or a folder, frozen and in eval mode, on the CPU.

    Transformer and text encoders are in dtype, the VAE in float32. quantize: "int8" holds the
    linear layers of the transformer and of T5 in 8 bits. Raises UserError.
    """
    int8 = int8_config() if quantize == "int8" else None
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    kind, dtypes = diffusers.StableDiffusion3Pipeline, {"default": dtype, "vae": torch.float32}
    try:
        folder = model if Path(model).is_dir() else kind.download(model)
        index = kind.load_config(folder).items()
        options = {name: None for name, part in index if part == [None, None]}  # T5 may be absent
        if int8 is not None:
            parts = {"transformer": diffusers.TorchAoConfig(int8)}
            if "text_encoder_3" not in options:
                parts["text_encoder_3"] = transformers.TorchAoConfig(int8)
            options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=parts)
        pipe = kind.from_pretrained(folder, dtype=dtypes, **options)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        hint = "give its name on the hub, or a folder that save_pretrained has written"
        if isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError):
            page = f"https://huggingface.co/{model}"
            hint = f"check the name, or accept the licence at {page} and run `hf auth login`"
        raise UserError(f"cannot load --model {model}; {hint} ({one_line(error)})") from None
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


ALL_NETWORKS = 20e9  # bytes of GPU memory that hold all of SD3.5 Medium in bf16, and a pass


def place(pipe: Any, device: torch.device) -> None:
    """Put the networks on the device; on a small GPU, each one only while it is used."""
    cuda, need = device.type == "cuda", ALL_NETWORKS * pipe.transformer.dtype.itemsize / 2
    if cuda and torch.cuda.get_device_properties(device).total_memory < need:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def make_scheduler(sampler: str, shift: float) -> Any:
    """The sampler of a rollout, "dpm++" or "euler". shift: t -> shift t / (1 + (shift - 1) t)."""
    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # Without flow_shift the schedule would be unshifted, silently.
    return diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )


def rollout_times(scheduler: Any, steps: int) -> Tensor:
    """The times (steps,) at which a rollout evaluates the model, in [0, 1], noisiest first.

    DPM-Solver++ rounds them down to 1/1000. Raises UserError if two coincide, as it then fails.
    """
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.float() / 1000
    if len(times.unique()) < steps:
        raise UserError(f"{steps} steps are too many for the sampler; give fewer, or less shift")
    return times


def trained_times(settings: Settings) -> Tensor:
    """The rollout's times that are at least t_min, noisiest first. Raises UserError if too few."""
    scheduler = make_scheduler(settings.sampler, settings.flow_shift)
    times = rollout_times(scheduler, settings.num_inference_steps)
    times = times[times >= settings.t_min]
    if len(times) < settings.train_timesteps:
        raise UserError(
            f"--train_timesteps {settings.train_timesteps}: only {len(times)} of the rollout's "
            f"{settings.num_inference_steps} times are at least --t_min {settings.t_min}"
        )
    return times


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of latents (N, C, h, w) in any precision."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


# Latent positions per pass of the VAE, which is in float32: an image of 512 pixels at a time.
DECODED = 64 * 64


@dataclass
class Model:
    """Four networks on one set of weights, and the VAE. Calls go to theta, outside of contexts.

    theta: the LoRA's parameters in pipe.transformer. resolution: an image's side in pixels.
    images_per_pass: most images in one pass of a network. autocast: the transformer's context.
    encoded: the prompts at hand, which must include the empty one.
    """

    pipe: Any
    theta: list[nn.Parameter]
    resolution: int
    images_per_pass: int
    autocast: Context = nullcontext
    encoded: dict[str, Encoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.old = [parameter.detach().clone() for parameter in self.theta]  # theta_old
        self.average = [parameter.detach().clone() for parameter in self.theta]  # what is saved
        self.own: list[Tensor] = []  # theta's own values, while it has others

    @property
    def device(self) -> torch.device:
        return self.theta[0].device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels, side, side

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.pipe.transformer.disable_adapters()
        try:
            yield
        finally:
            self.pipe.transformer.enable_adapters()

    def theta_old(self) -> AbstractContextManager:
        return self.with_values(self.old)

    def saved_average(self) -> AbstractContextManager:
        return self.with_values(self.average)

    @contextmanager
    def with_values(self, values: list[Tensor]) -> Iterator[None]:
        """theta has these values inside. No data is copied."""
        self.own = [parameter.data for parameter in self.theta]
        try:
            for parameter, value in zip(self.theta, values, strict=True):
                parameter.data = value
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Give theta its own values back. Call it after an interrupt, which may come half-way."""
        for parameter, value in zip(self.theta, self.own, strict=False):
            parameter.data = value
        self.own = []

    def embedding(self, text: str) -> Encoded:
        encoded = self.encoded[text]
        return Encoded(encoded.embeds.to(self.device), encoded.pooled.to(self.device))

    def sample(self, text: str, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents (N, C, h, w) by the deterministic sampler, from noise of that shape."""
        prompt, empty = self.embedding(text), self.embedding("")
        latents = []
        for x in noise.to(self.device).split(self.images_per_pass):
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
                    output_type="latent",
                )
            latents.append(output.images)
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1]."""
        most = min(self.images_per_pass, max(1, DECODED // latents[0, 0].numel()))
        return torch.cat([decode(self.pipe.vae, x) for x in latents.split(most)])

    def velocity(self, text: str, guidance: float = 1, network: Context = nullcontext) -> Velocity:
        """The transformer as (x_t (B, C, h, w), t (B,), p (B,)) -> v, for one prompt.

        network: the context to evaluate it in, such as self.reference; by default theta.
        """
        encoded = [self.embedding(prompt) for prompt in ([text] if guidance == 1 else [text, ""])]

        def v(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
            n, copies = len(x), len(encoded)
            with network(), self.autocast():
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
