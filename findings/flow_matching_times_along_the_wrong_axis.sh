#!/usr/bin/env bash
# flow_matching: sample() spreads a batch of times over pictures, the conversions over the last axis.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 flow_matching==1.0.10 torchdiffeq==0.2.5 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import importlib.metadata, torch
from flow_matching.path import CondOTProbPath

print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("flow_matching", "torch")))
print("expected: with the t (B,) that sample() took, velocity_to_target gives the data back, or an error")
torch.manual_seed(0)
path, worst = CondOTProbPath(), {}
for batch in (4, 16):
    noise, data = torch.randn(2, batch, 3, 16, 16)
    t = torch.linspace(0.1, 0.9, batch)
    at = path.sample(x_0=noise, x_1=data, t=t)
    for name, times in (("t (B,)", t), ("t (B, 1, 1, 1)", t.view(-1, 1, 1, 1))):
        try:
            x_1 = path.velocity_to_target(velocity=at.dx_t, x_t=at.x_t, t=times)
            worst[batch, name] = float((x_1 - data).abs().max())
            print(f"happens: {batch:2} pictures of 16 x 16, {name:14}: off by up to {worst[batch, name]:.1e}")
        except RuntimeError as fault:
            worst[batch, name] = None
            print(f"happens: {batch:2} pictures of 16 x 16, {name:14}: an error,", str(fault)[:40], "...")
assert worst[4, "t (B,)"] is None and worst[16, "t (B,)"] > 1, "the behaviour has changed"
assert max(worst[4, "t (B, 1, 1, 1)"], worst[16, "t (B, 1, 1, 1)"]) < 1e-5, "the behaviour has changed"
PY
