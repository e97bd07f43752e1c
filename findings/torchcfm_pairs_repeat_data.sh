#!/usr/bin/env bash
# torchcfm's optimal-transport matchers pair with replacement: each batch leaves out over a third of its data.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 POT==0.9.7.post1
"$work/venv/bin/pip" install -q --no-compile --no-deps torchcfm==1.0.7  # what else it asks for, it does not import here
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import numpy as np
import torch
from torchcfm import ExactOptimalTransportConditionalFlowMatcher as Matcher

print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in ("torchcfm", "pot", "torch")))
print("expected: the best pairing of a batch of noise with a batch of data is a permutation")
torch.manual_seed(0), np.random.seed(0)
used, batch = [], 256
for _ in range(100):
    data, noise = torch.randn(2, batch, 2)
    *_, kept = Matcher().guided_sample_location_and_conditional_flow(noise, data, y1=torch.arange(batch))
    used.append(len(kept.unique()) / batch)
print(f"happens: of {batch} data, {min(used):.0%} to {max(used):.0%} are used, on average {np.mean(used):.1%}")
print(f"         (1 - 1/e = {1 - np.exp(-1):.1%}: drawn with replacement), some {kept.bincount().max()} times")
assert 0.5 < min(used) and max(used) < 0.75 and abs(np.mean(used) - 0.632) < 0.02, "the behaviour has changed"

# The plan itself is a permutation, but the matcher samples its entries with replacement.
_, partner = np.nonzero(Matcher().ot_sampler.get_map(noise, data))
print("         the plan that it draws from is a permutation:", sorted(partner) == list(range(batch)))
assert sorted(partner) == list(range(batch)), "the behaviour has changed"
PY
