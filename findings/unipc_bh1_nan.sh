#!/usr/bin/env bash
# UniPC with solver_type="bh1", which its docstring recommends for few steps: every sample is NaN.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" - <<'PY'
import diffusers, torch
from diffusers import UniPCMultistepScheduler as UniPC

print("diffusers", diffusers.__version__, "torch", torch.__version__.split("+")[0])
print('expected: "bh1" and "bh2" are two weightings of one corrector, and both end at the data')
torch.manual_seed(0)
data, noise = torch.randn(2, 1, 4, 8, 8)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def sample(steps, **settings):  # a straight flow and, without settings for it, exact noise prediction
    scheduler, x = UniPC(**settings), noise
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(noise - data if "flow_shift" in settings else noise, t, x).prev_sample
    return x


print("happens: values that are finite, of", data.numel())
for kind, settings in (("flow", FLOW), ("noise prediction", {})):
    for steps in (1, 2, 5, 9, 50):
        counts = [int(sample(steps, solver_type=s, **settings).isfinite().sum()) for s in ("bh1", "bh2")]
        print(f"  {kind}, {steps} steps: bh1 {counts[0]}, bh2 {counts[1]}")
        assert counts == [0, data.numel()], "the behaviour has changed"
last = sample(9, solver_type="bh1", final_sigmas_type="sigma_min")
print('  bh1 that stops short of 0 (final_sigmas_type="sigma_min"):', int(last.isfinite().sum()))
assert last.isfinite().all()
PY
