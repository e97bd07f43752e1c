#!/usr/bin/env bash
# Fusing and unfusing a LoRA that is 0 changes a torchao int8 base, every time, always the same way.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 torchao==0.18.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY' || { cat log; exit 1; }
import importlib.metadata
import diffusers, peft, torch
from diffusers import SD3Transformer2DModel, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

print("torchao", importlib.metadata.version("torchao"), "diffusers", diffusers.__version__,
      "peft", peft.__version__, "torch", torch.__version__.split("+")[0])
print("expected: what has been rounded to int8 once stays as it is when it is rounded again")
torch.manual_seed(0)
SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
    num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
    pooled_projection_dim=64, pos_embed_max_size=16).save_pretrained("base")
model = SD3Transformer2DModel.from_pretrained(
    "base", torch_dtype=torch.bfloat16, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k"]))  # lora_B is 0: it changes nothing
layer = model.transformer_blocks[0].attn.to_q.base_layer
before = layer.weight.dequantize().float()
print("happens: distance of the base's weight from what it was, and its norm, as a share")
for n in range(1, 51):
    model.fuse_lora()
    model.unfuse_lora()
    weight = layer.weight.dequantize().float()
    distance, norm = (weight - before).norm() / before.norm(), weight.norm() / before.norm()
    if n in (1, 10, 50):
        print(f"  fused and unfused {n} times: {distance:.3f}, {norm:.3f}")
assert distance > 0.05, "the behaviour has changed"
PY
