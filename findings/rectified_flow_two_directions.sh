#!/usr/bin/env bash
# rectified-flow-pytorch: in RectifiedFlow time 1 is data, in MeanFlow of the same package it is noise.
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
from rectified_flow_pytorch import MeanFlow, RectifiedFlow

print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("rectified-flow-pytorch", "torch")))
print("expected: classes of one package agree which end of [0, 1] is the data, and on the velocity's sign")

class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.seen = torch.nn.Parameter(torch.tensor(1.0)), []

    def forward(self, x, times, *_):
        self.seen.append((times.flatten(), x.flatten()))
        return self.one.expand_as(x)

data, noise, found = torch.full((8, 1, 1, 1), 10.0), torch.zeros(8, 1, 1, 1), []
same = {"data_normalize_fn": lambda x: x, "data_unnormalize_fn": lambda x: x}
for kind, settings in ((RectifiedFlow, same), (MeanFlow, {"prob_default_flow_obj": 1.0})):
    flow = kind(network := Recorder(), data_shape=(1, 1, 1), **settings)
    flow(data, noise=noise)  # x is 10 times the share of data in it
    times, x = network.seen[0]
    found.append((torch.allclose(x, 10 * times), torch.allclose(x, 10 * (1 - times))))
    found.append(round(flow.sample(noise=noise, batch_size=8).mean().item(), 4))
    print(f"happens: {kind.__name__}: time 1 is data, noise: {found[-2]}; output 1 moves noise by {found[-1]:+}")
assert found == [(True, False), 1, (False, True), -1], "the behaviour has changed"
PY
