#!/usr/bin/env bash
# rectified-flow-pytorch: sample(use_ema=True) runs the network in training, and so does the consistency target.
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
from rectified_flow_pytorch import RectifiedFlow

print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("rectified-flow-pytorch", "torch")))
print("expected: use_ema=True samples the average of the weights, here the constant velocity 1, not 3")

class Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.velocity = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x, times):
        return self.velocity.expand_as(x)

network = Constant()
flow = RectifiedFlow(network, use_consistency=True, data_shape=(1, 2, 2), data_unnormalize_fn=lambda x: x)
network.velocity.data.fill_(3.0)  # training has moved on; the average still is what it was
noise, zero = torch.zeros(1, 1, 2, 2), torch.zeros(1)
average = flow.ema_model(noise, times=zero).mean().item()
ends = {use: round(flow.sample(noise=noise, use_ema=use).mean().item(), 4) for use in (False, True)}
loss = flow(torch.rand(4, 1, 2, 2), return_loss_breakdown=True)[1]
print(f"happens: velocity of the average {average}; where samples end, by use_ema: {ends}")
print(f"         consistency loss between velocity 3 and velocity 1: {loss.velocity_match.item()}")
assert average == 1 and ends[True] == 3 and loss.velocity_match == 0, "the behaviour has changed"
PY
