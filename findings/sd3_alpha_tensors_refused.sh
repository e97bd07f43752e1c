#!/usr/bin/env bash
# diffusers: .alpha tensors, from which other programs take a LoRA's strength, make an SD3 file unloadable.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY' || { cat log; exit 1; }
import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

print("diffusers", diffusers.__version__, "torch", torch.__version__.split("+")[0])
print("expected: an alpha tensor beside lora_A and lora_B sets the strength, or is left out of account")
torch.manual_seed(0)
transformer = SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
    pooled_projection_dim=64, pos_embed_max_size=16)
rest = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
pipe = StableDiffusion3Pipeline(
    transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(rest))

layer = "transformer.transformer_blocks.0.attn.to_q"
lora = {f"{layer}.lora_A.weight": torch.randn(4, 64), f"{layer}.lora_B.weight": torch.randn(64, 4)}
save_file(lora, "plain.safetensors")
save_file({**lora, f"{layer}.alpha": torch.tensor(2.0)}, "alpha.safetensors")
results = {}
for file in ("plain", "alpha"):
    try:
        pipe.load_lora_weights(".", weight_name=f"{file}.safetensors", adapter_name=file)
        results[file] = f"loaded: {pipe.get_list_adapters()}"
    except ValueError as error:
        results[file] = f"ValueError: {error}"
    print(f"happens, {file}:", results[file])
assert results["plain"].startswith("loaded"), "the behaviour has changed"
assert "contain `'lora'`" in results["alpha"], "the behaviour has changed"
PY
