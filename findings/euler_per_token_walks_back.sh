#!/usr/bin/env bash
# FlowMatchEuler: the same time given for each token takes the step in the opposite direction.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" - <<'PY'
import diffusers, torch
from diffusers import FlowMatchEulerDiscreteScheduler as Euler

print("diffusers", diffusers.__version__, "torch", torch.__version__.split("+")[0])
print("expected: per_token_timesteps that are all t do what t does: from noise to the data")
torch.manual_seed(0)
data, noise = torch.randn(2, 1, 6, 4)  # batch, tokens, channels
velocity = noise - data


def sample(per_token, sign=1):
    scheduler, x = Euler(shift=3.0), noise
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps:
        extra = {"per_token_timesteps": t.expand(1, 6)} if per_token else {}
        x = scheduler.step(sign * velocity, t, x, **extra).prev_sample
    return x


plain, token, flipped = sample(False), sample(True), sample(True, -1)
away = noise + velocity  # one whole way from the noise, but backwards
print("happens: distance from the data after 8 steps of a straight flow")
print(f"  one time for all: {(plain - data).abs().max():.1e}")
print(f"  the same time for each token: {(token - data).abs().max():.2f}, and from 2 eps - x0:"
      f" {(token - away).abs().max():.1e}")
print(f"  the same, network output negated: {(flipped - data).abs().max():.1e}")
assert torch.allclose(plain, data, atol=1e-5), "the behaviour has changed"
assert torch.allclose(token, away, atol=1e-5), "the behaviour has changed"
assert torch.allclose(flipped, data, atol=1e-5), "the behaviour has changed"
PY
