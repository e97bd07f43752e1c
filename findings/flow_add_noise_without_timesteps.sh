#!/usr/bin/env bash
# add_noise of a flow scheduler, called as training scripts call it, makes noise of the wrong kind.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1
"$work/venv/bin/python" - <<'PY'
import diffusers, torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__.split("+")[0])
print("expected: x_t = (1 - s) x0 + s eps with s rising from 0 to 1 as t rises from 0 to 999")
flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
times = torch.tensor([100, 500, 900])
one, zero = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)


def shares(scheduler):  # of x0 and of eps in x_t
    both = scheduler.add_noise(one, zero, times), scheduler.add_noise(zero, one, times)
    return [[round(value, 3) for value in part.flatten().tolist()] for part in both]


for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler):
    scheduler = kind(**flow)
    fresh = shares(scheduler)
    scheduler.set_timesteps(10)
    after = shares(scheduler)
    print(f"happens: {kind.__name__}, t = {times.tolist()}")
    print("  new:                     x0", fresh[0], "eps", fresh[1])
    print("  after set_timesteps(10): x0", after[0], "eps", after[1])
    # New: sigmas of a variance-exploding schedule, in falling order. After: any t that is not one of the ten
    # steps counts as the last of them.
    assert fresh[1][0] > 60 > 3 > fresh[1][2] and fresh[0][0] < -59, "the behaviour has changed"
    assert len(set(after[1])) == 1 and 0.24 < after[1][0] < 0.26, "the behaviour has changed"
PY
