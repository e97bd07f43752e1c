#!/usr/bin/env bash
# Merging a small LoRA into bf16 weights loses most of it; the rounding does not average out.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
"$work/venv/bin/python" - <<'PY'
import peft, torch
from peft import LoraConfig, get_peft_model

print("peft", peft.__version__, "torch", torch.__version__.split("+")[0])
print("expected: rounding W + BA is as often up as down, so a merged model changes as much on average")
x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))


def merge(dtype, size):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False)).to(dtype)
    weight = net[0].weight.detach().float().clone()
    model = get_peft_model(net, LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
    lora = model.base_model.model[0]
    a, b = lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data
    torch.nn.init.normal_(b)
    b *= size * weight.norm() / (b @ a).norm()
    change = x @ (b @ a).T
    moved = model.merge_and_unload()[0].weight.detach().float() - weight
    share = ((x @ moved.T) * change).sum() / change.square().sum()
    return share.item(), (moved == 0).float().mean().item()


print("happens: what is left of the change of the output (all computed in float32), weights that did not move")
for dtype in (torch.float32, torch.bfloat16):
    for size in (1e-2, 3e-3, 1e-3, 3e-4):
        share, unmoved = merge(dtype, size)
        print(f"  {dtype}, weights to be moved by {size:.2%}: {share:.0%} left, {unmoved:.0%} did not move")
        if size <= 1e-3:
            assert (share > 0.99) if dtype == torch.float32 else (share < 0.5), "the behaviour has changed"
PY
