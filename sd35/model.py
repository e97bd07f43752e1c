"""Stable Diffusion 3.5 as Algorithm 1 sees it: pictures by a deterministic sampler, and velocities.

theta is a LoRA in a frozen transformer. So four networks share one set of weights: theta; the
reference, which is the transformer without the LoRA; and theta_old and the saved average, which are
other values of the LoRA. Whose answer is wanted is said by a context of `Model`:

    with model.theta_old():
        latents = model.sample("a red cube", noise, steps=10, guidance=4.5)

Times are the sampler's, in [0, 1], where 1 is pure noise; diffusers has them times 1000.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from diffusers.training_utils import cast_training_params, offload_models
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import dgpo
from cli import Fault, first_line, read_json

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity(logging.CRITICAL)  # what goes wrong is also raised
transformers_logging.disable_progress_bar()

T5 = ["text_encoder_3", "tokenizer_3"]
PARTS = "scheduler transformer vae text_encoder tokenizer text_encoder_2 tokenizer_2".split() + T5
LORA_FILE = "pytorch_lora_weights.safetensors"  # as load_lora_weights of diffusers looks for it
LORA_TARGETS = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_q to_v to_out.0"  # of attn
Context = Callable[[], AbstractContextManager]


def load_pipeline(model: str, dtype: torch.dtype, fits=(0, 0)) -> StableDiffusion3Pipeline:
    """Transformer and text encoders in dtype, the VAE in float32; nothing trains. Raises Fault.

    T5 may be absent if the model says so, and nothing else. A tokenizer must know its encoder's
    words: transformers makes do with one that knows none, and then all prompts are equal.
    fits: a resolution and a LoRA's rank, which are checked before the weights are read.
    """
    local = Path(model).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model)
    try:
        if local and not Path(model).is_dir():
            raise ValueError("there is no such folder")
        folder = Path(model if local else StableDiffusion3Pipeline.download(model))
        index = StableDiffusion3Pipeline.load_config(folder)
        if not str(index.get("_class_name", "StableDiffusion3")).startswith("StableDiffusion3"):
            raise ValueError(f"it is a {index['_class_name']}, and no StableDiffusion3Pipeline")
        absent = dict.fromkeys(T5 if index.get(T5[0]) == [None, None] else [])
        for name in PARTS:
            there = index.get(name, [None])[0] and any((folder / name).glob("*config.json"))
            if not there and name not in absent:
                raise ValueError(f"it has no {name}")
        check_fit(folder, *fits)
        dtypes = {"default": dtype, "vae": torch.float32}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtypes, **absent)
        for i in ("", "_2", "_3")[: 2 if absent else 3]:
            words = len(getattr(pipe, f"tokenizer{i}"))
            known = getattr(pipe, f"text_encoder{i}").config.vocab_size
            if not 0.9 * known < words <= known:
                raise ValueError(f"its tokenizer{i} has {words} tokens, and its encoder {known}")
        check_weights(pipe)
    except Fault:
        raise
    except Exception as error:  # whatever the libraries make of other files
        cause = error.__cause__ or error
        hint = "mend it"
        said = first_line(error if local else cause).partition(". If you want to instead")[0]
        if not local:
            hint = "without a connection, bring the hub's cache here and set HF_HUB_OFFLINE=1"
        if isinstance(cause, HfHubHTTPError):
            hint = f"accept its licence at https://huggingface.co/{model} and do `hf auth login`"
        hint += ", or give a folder as save_pretrained writes it"
        if said.startswith("You set `ignore_mismatched_sizes`"):  # the rest was logged
            said = "a text encoder's weights have not the shapes that its config says"
        raise Fault(f"cannot load {model} ({said}); {hint}") from None
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def check_fit(folder: Path, resolution: int, rank: int) -> None:
    """Raises Fault if a model has no place for such pictures, or no use for such a LoRA."""
    config, vae = (read_json(folder / name / "config.json") for name in ("transformer", "vae"))
    token = config["patch_size"] * 2 ** (len(vae["block_out_channels"]) - 1)  # its side in pixels
    side = config["pos_embed_max_size"] * token
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for name, given, most in (("resolution", resolution, side), ("rank", rank, width)):
        if most < 1:
            raise ValueError(f"by its config, it has no {name}")
        if given > most:
            raise Fault(f"argument --{name}: the model has at most {most}, got {given}")


def check_weights(pipe: StableDiffusion3Pipeline) -> None:
    """Raises ValueError at a weight that no file had, or that is not finite, or a VAE that fails.

    diffusers leaves the former without a value, and then a reward would be blamed for the latter.
    """
    for name, module in pipe.components.items():
        for key, weight in module.named_parameters() if isinstance(module, nn.Module) else ():
            # In float32, as a sum of many float16 is soon too large for it.
            if weight.is_meta or not weight.sum(dtype=torch.float32).isfinite():
                raise ValueError(f"its {name} has no finite {key}")
    if not decode(pipe.vae, torch.zeros(1, pipe.vae.config.latent_channels, 1, 1)).isfinite().all():
        raise ValueError("what its vae decodes is not finite")


def make_scheduler(sampler: str, shift: float) -> Any:
    """A rollout's sampler, "dpm++" or "euler". shift: t becomes shift t / (1 + (shift - 1) t)."""
    if sampler == "euler":
        return Euler(shift=shift)
    # Leaving out flow_shift would silently give an unshifted schedule.
    return DPMSolver(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)


def rollout_times(scheduler: Any, steps: int) -> Tensor:
    """The times (steps,) at which a rollout asks the model, in [0, 1], noisiest first."""
    scheduler.set_timesteps(steps)  # its sigmas are not quite its times, which are rounded down
    return scheduler.timesteps.float() / 1000


def add_lora(
    transformer: nn.Module, rank: int, alpha: int, seed: int, checkpointing: bool
) -> list[nn.Parameter]:
    """Puts a LoRA that changes nothing yet into the transformer. Returns theta, in float32.

    seed: what theta starts from, the same on every process. checkpointing: activations are computed
    again in the backward pass rather than kept.
    """
    torch.manual_seed(seed)
    targets = [f"attn.{name}" for name in LORA_TARGETS.split()]
    about = {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian"}
    transformer.add_adapter(LoraConfig(**about, target_modules=targets))
    cast_training_params(transformer, dtype=torch.float32)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


@contextmanager
def with_values(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The parameters have these values here. Storage is exchanged, nothing is copied."""
    pairs = list(zip(parameters, values, strict=True))
    for parameter, value in pairs:
        parameter.data, value.data = value.data, parameter.data
    try:
        yield
    finally:
        for parameter, value in pairs:
            parameter.data, value.data = value.data, parameter.data


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of latents (N, C, h, w) in any precision."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@dataclass
class Encoded:
    """What the text encoders make of a prompt: embeds (1, tokens, width), pooled (1, width)."""

    embeds: Tensor
    pooled: Tensor


class Encoder:
    """Text encoders that live on the CPU, and come to the device one at a time for some prompts.

    The transformer and the VAE leave it meanwhile, as T5-XXL alone takes 9.5 GB. So a call moves
    32 GB, which takes seconds: give it many steps' prompts, but not all, as each takes 3 MB.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, length: int, device: torch.device):
        self.pipe, self.length, self.device = type(pipe)(**pipe.components), length, device
        pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None  # or it ran on the CPU

    @torch.no_grad()
    def __call__(self, texts: list[str], known: dict[str, Encoded]) -> dict[str, Encoded]:
        """What the pipeline's encode_prompt makes of these and of "", one by one; on the CPU."""
        texts = list(dict.fromkeys(["", *texts]))
        new = [text for text in texts if text not in known]
        pipe, length, device = self.pipe, self.length, self.device
        clip, t5 = pipe._get_clip_prompt_embeds, pipe._get_t5_prompt_embeds
        with offload_models(pipe.transformer, pipe.vae, device="cpu"):
            with offload_models(pipe.text_encoder, device=device):
                one = [clip(text, device=device, clip_model_index=0) for text in new]
            with offload_models(pipe.text_encoder_2, device=device):
                two = [clip(text, device=device, clip_model_index=1) for text in new]
            with offload_models(*filter(None, [pipe.text_encoder_3]), device=device):
                three = [t5(text, device=device, max_sequence_length=length).cpu() for text in new]
        found = dict(known)
        for text, *clips, last in zip(new, one, two, three, strict=True):
            embeds, pooled = (torch.cat(pair, -1).cpu() for pair in zip(*clips, strict=True))
            embeds = torch.cat([F.pad(embeds, (0, last.shape[-1] - embeds.shape[-1])), last], 1)
            found[text] = Encoded(embeds.float(), pooled.float())
        return {text: found[text] for text in texts}


# Latents' places in a pass of the VAE: 4 pictures of 512 pixels. It is in float32 and takes six
# times the memory of a picture in training, whose passes it would bound, too.
DECODED = 4 * 64 * 64


@dataclass
class Model:
    """Who can be asked, and for what. Asked is theta, unless a context names another.

    theta: the LoRA's parameters in pipe.transformer. resolution: the side of a picture in pixels.
    images_a_pass: most images that go through a network at once. autocast: gives the context in
    which the transformer runs. between_passes: called before each pass; what it raises ends the
    work. encoded: the prompts at hand, which must include the empty one.
    """

    pipe: StableDiffusion3Pipeline
    theta: list[nn.Parameter]
    resolution: int
    images_a_pass: int
    autocast: Context = nullcontext
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

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.pipe.transformer.disable_adapters()
        try:
            yield
        finally:
            self.pipe.transformer.enable_adapters()

    def theta_old(self) -> AbstractContextManager:
        return with_values(self.theta, self.old)

    def saved_average(self) -> AbstractContextManager:
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
                    output_type="latent",
                )
            parts.append(output.images)
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1]."""
        parts, most = [], max(1, DECODED // latents[0, 0].numel())
        for x in latents.split(min(most, self.images_a_pass)):
            self.between_passes()
            parts.append(decode(self.pipe.vae, x))
        return torch.cat(parts)

    def velocity(self, text: str, guidance: float = 1, who: Context = nullcontext) -> dgpo.Velocity:
        """The transformer as (x_t (B, C, h, w), t (B,), p (B,)) -> v, for one prompt.

        who: the context of the one that is asked, such as self.reference; by default theta.
        """
        encoded = [self.embedding(prompt) for prompt in ([text] if guidance == 1 else [text, ""])]

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


def load_lora(pipe: StableDiffusion3Pipeline, folder: Path | str) -> None:
    """Puts the LoRA of a folder into a pipeline, to draw with it. Raises Fault."""
    try:
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    except Exception as error:  # as above
        found = f"the LoRA in {folder} does not fit the model ({first_line(error)})"
        raise Fault(f"{found}; give another, or another --model") from None
