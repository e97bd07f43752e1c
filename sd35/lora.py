"""Adding a LoRA to the transformer, starting from one, loading and saving one.

Also here: 8-bit weights, recomputation in the backward pass, and compilation.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sd35.settings import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
LORA_TARGETS = "add_k_proj add_q_proj add_v_proj to_add_out to_k to_q to_v to_out.0"  # of attn


def one_line(error: Exception) -> str:
    """A library's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300]


def int8_config() -> Any:
    """torchao's configuration for 8-bit weights. Raises UserError if torchao is missing."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError:
        raise UserError("--quantize int8 needs `pip install torchao`") from None
    return Int8WeightOnlyConfig(version=2)


def add_lora(transformer: nn.Module, rank: int, alpha: int, seed: int) -> list[nn.Parameter]:
    """Add a LoRA that changes nothing yet. Returns theta, its parameters, in float32.

    seed: decides the initial values.
    """
    torch.manual_seed(seed)
    targets = [f"attn.{name}" for name in LORA_TARGETS.split()]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets
    )
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def is_saved(_: object, operator: Any, *args: Any, **__: Any) -> bool:
    """Whether a recomputed block saves this operator's output, which takes many FLOPs for its size.

    True for attention, and for products whose output is smaller than their input, as in the last
    layer of an MLP.
    """
    if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        n, m = args[-1].shape
        return n > m
    return "scaled_dot_product" in operator.name()


def recompute(transformer: nn.Module, share: float) -> None:
    """Recompute the activations of this share of the blocks, 0 to 1, in the backward pass.

    Such a block saves its inputs, and the outputs that `is_saved` names. They are the first blocks:
    when the backward pass comes to them, the other blocks' activations are free again. The gradient
    stays the same. With --compile, only attention's outputs are saved: inductor computes products
    by other operators.
    """
    blocks = transformer.transformer_blocks
    chosen = set(blocks[: math.ceil(share * len(blocks))])
    saving = partial(create_selective_checkpoint_contexts, is_saved)

    def run(block: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
        if block in chosen:
            return checkpoint(block, *args, use_reentrant=False, context_fn=saving)
        return block(*args)

    transformer.enable_gradient_checkpointing(run)


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """Compile each block by itself: equal blocks share what is compiled. Call it after add_lora.

    diffusers' compile_repeated_blocks does the same, but refuses SD3Transformer2DModel.
    """
    for block in transformer.transformer_blocks:
        # Several kinds of block, with and without LoRA and gradients, exceed torch's 8 graphs.
        block.compile(backend=backend, recompile_limit=64)


@torch.no_grad()
def start_from_lora(pipe: Any, folder: str) -> None:
    """Give the pipeline's LoRA the values of one in a folder, of any alpha. Raises UserError."""
    load_lora(pipe, folder, name="start")
    for module in pipe.transformer.modules():
        if isinstance(module, LoraLayer) and "start" in module.lora_A:
            a, b = (layers["start"].weight for layers in (module.lora_A, module.lora_B))
            if "default" not in module.lora_A or a.shape != module.lora_A["default"].weight.shape:
                raise UserError(
                    f"--init_lora {folder} needs the rank and the layers of this run's LoRA"
                )
            scale = module.scaling["start"] / module.scaling["default"]
            module.lora_A["default"].weight.copy_(a)
            module.lora_B["default"].weight.copy_(b * scale)
    pipe.transformer.delete_adapters("start")
    pipe.transformer.set_adapter("default")


def check_folder(flag: str, folder: Path | str | None) -> None:
    """Raise UserError if a folder is given and has no LoRA in the form of diffusers or PEFT."""
    names = LORA_FILE, PEFT_FILES[0]
    if folder and not any((Path(folder) / name).exists() for name in names):
        raise UserError(f"{flag} must be a folder with {' or '.join(names)}")


def load_lora(pipe: Any, folder: Path | str, name: str | None = None) -> None:
    """Load a LoRA into a pipeline, in the form of diffusers or PEFT. Raises UserError.

    diffusers' is LORA_FILE, from the pipeline's save_lora_weights or from the transformer's
    save_lora_adapter. PEFT's is PEFT_FILES, from save_pretrained.
    """
    folder, transformer = Path(folder), pipe.transformer
    is_peft = (folder / PEFT_FILES[1]).exists()
    try:
        weights = load_peft_weights(folder, "cpu") if is_peft else load_file(folder / LORA_FILE)
        weights = {key.removeprefix("base_model.model."): w for key, w in weights.items()}
        check_layers(weights, transformer, folder)
        if is_peft:
            config = LoraConfig.from_pretrained(folder).to_dict()
            transformer.load_lora_adapter(weights, None, adapter_name=name, metadata=config)
        elif any(key.startswith("transformer.") for key in weights):
            pipe.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=name)
        else:
            transformer.load_lora_adapter(
                folder, None, weight_name=LORA_FILE, adapter_name=name, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot load the LoRA in {folder} ({one_line(error)})") from None


def check_layers(weights: dict[str, Any], transformer: nn.Module, folder: Path) -> None:
    """Raise UserError if a LoRA has a layer that the model lacks, which diffusers only logs."""
    layers = {re.split(r"\.lora", key.removeprefix("transformer."))[0] for key in weights}
    layers = {layer for layer in layers if not layer.startswith("text_encoder")}
    missing = layers - dict(transformer.named_modules()).keys()
    if missing or not layers:
        layer = min(missing, default="layer of it")
        raise UserError(f"the LoRA in {folder} is not for this model, which has no {layer}")


def save_lora(pipe: Any, folder: Path) -> None:
    """Save the pipeline's LoRA as LORA_FILE, so that it has one strength wherever it is loaded.

    Some programs read the scale alpha / rank from the file's header, some from tensors named alpha,
    and some take 1. So it is folded into lora_B, and the header says alpha = rank.
    """
    config = pipe.transformer.peft_config["default"]
    scale = config.lora_alpha / config.r
    weights = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers={k: w * scale if "lora_B" in k else w for k, w in weights.items()},
        transformer_lora_adapter_metadata={**config.to_dict(), "lora_alpha": config.r},
        weight_name=f".{LORA_FILE}",
    )
    (folder / f".{LORA_FILE}").replace(folder / LORA_FILE)  # so that it is never half-written
