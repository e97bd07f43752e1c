#!/usr/bin/env bash
# rectified-flow-pytorch: sample(steps=1) returns its noise, and steps=N takes N - 1 steps of two evaluations.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 accelerate==1.15.0 einops==0.8.2 einx==0.4.3 scipy==1.17.1 \
    torchdiffeq==0.2.5 loguru==0.7.3 pillow==12.3.0
"$work/venv/bin/pip" install -q --no-compile --no-deps rectified-flow-pytorch==0.14.0 ema-pytorch==0.8.3 x-unet==0.5.0 \
    x-transformers==2.31.10 rotary-embedding-torch==0.9.1 torch-einops-utils==0.2.0
"$work/venv/bin/python" - <<'PY'
import importlib.metadata, sys, unittest.mock

for part in ("", ".utils", ".models", ".transforms"):  # large, and only for files of pictures
    sys.modules["torchvision" + part] = unittest.mock.MagicMock()
import torch
from rectified_flow_pytorch import NanoFlow, RectifiedFlow

print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("rectified-flow-pytorch", "torch")))
print("expected: steps=N takes N steps; one step along a straight flow is exact: from 0 to 1")

class Straight(torch.nn.Module):  # the velocity of the flow that takes each x to x + 1
    def __init__(self):
        super().__init__()
        self.one, self.calls = torch.nn.Parameter(torch.tensor(1.0)), 0

    def forward(self, x, times=None):
        self.calls += 1
        return self.one.expand_as(x)

found = {}
for kind, settings in ((RectifiedFlow, {"data_unnormalize_fn": lambda x: x}), (NanoFlow, {})):
    for steps in (1, 2, 4, 16):
        flow = kind(network := Straight(), data_shape=(1, 2, 2), **settings)
        end = flow.sample(noise=torch.zeros(1, 1, 2, 2), steps=steps).mean().item()
        found[kind.__name__, steps] = round(end, 5), network.calls
        print(f"happens: {kind.__name__}, steps={steps}: ends at {end:.2f} after {network.calls} evaluations")
assert found["RectifiedFlow", 1] == (0, 0) and found["RectifiedFlow", 4] == (1, 6), "the behaviour has changed"
assert found["RectifiedFlow", 16] == (1, 30) and found["NanoFlow", 1] == (1, 1), "the behaviour has changed"
PY
