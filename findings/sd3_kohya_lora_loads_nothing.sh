#!/usr/bin/env bash
# diffusers: an SD3 LoRA with sd-scripts' names is accepted, and not one of its tensors is loaded.
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
print("expected: load_lora_weights converts sd-scripts' names, as it does for SD, SDXL and Flux, or raises")
torch.manual_seed(0)
transformer = SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
    pooled_projection_dim=64, pos_embed_max_size=16)
rest = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
pipe = StableDiffusion3Pipeline(
    transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(rest))
x = {"hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 32),
     "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([500.0])}
before = transformer(**x).sample.detach()

lora = {}
for layer, outputs in (("x_block_attn_qkv", 192), ("x_block_attn_proj", 64), ("x_block_mlp_fc1", 256)):
    name = f"lora_unet_joint_blocks_0_{layer}"
    lora[f"{name}.lora_down.weight"] = torch.randn(4, 64)
    lora[f"{name}.lora_up.weight"] = torch.randn(outputs, 4)
    lora[f"{name}.alpha"] = torch.tensor(4.0)
save_file(lora, "lora.safetensors")
pipe.load_lora_weights(".", weight_name="lora.safetensors")
same = torch.equal(transformer(**x).sample, before)
print("happens: no error; adapters:", pipe.get_list_adapters(), "; output unchanged to the bit:", same)
print("  the log says:", [line for line in open("log") if "prefix='transformer'" in line][0].strip()[:140])
assert same and not pipe.get_list_adapters(), "the behaviour has changed"
PY
