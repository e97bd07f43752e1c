#!/usr/bin/env bash
# Merging a LoRA into a base that optimum-quanto holds in 8 bits: nothing is merged, without a warning.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 \
    optimum-quanto==0.2.7
"$work/venv/bin/python" - <<'PY'
import importlib.metadata, warnings
import peft, torch
from optimum.quanto import freeze, qint8, quantize

print("optimum-quanto", importlib.metadata.version("optimum-quanto"), "peft", peft.__version__,
      "torch", torch.__version__.split("+")[0])
print("expected: merge_and_unload keeps what the LoRA changes, but for the rounding to 8 bits")
torch.manual_seed(0)
x = torch.randn(32, 64)
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
quantize(net, weights=qint8)
freeze(net)
base = net(x).detach()

model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0", "2"]))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
change = model(x).detach() - base
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    merged = model.merge_and_unload(safe_merge=True)(x).detach()
print(f"happens: the LoRA changes the output by {change.norm() / base.norm():.0%}; of that,",
      f"{(merged - base).norm() / change.norm():.0%} is left when it is merged; {len(caught)} warnings")
assert change.norm() > 0.1 * base.norm()
assert torch.equal(merged, base) and not caught, "the behaviour has changed"
PY
