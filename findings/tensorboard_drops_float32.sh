#!/usr/bin/env bash
# accelerate's TensorBoard tracker: the mean of float32 rewards is left out, without a warning.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 accelerate==1.15.0 tensorboard==2.21.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" -W always - <<'PY' 2>"$work/log" || { tail -3 "$work/log"; exit 1; }
import importlib.metadata
import numpy as np
import torch
from accelerate import Accelerator

names = "accelerate", "tensorboard", "torch", "numpy"
print(*(f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in names))
print("expected: each number becomes a point of its curve, or a warning says why not")
rewards = torch.tensor([0.25, 0.75])
numbers = {
    "float": rewards.mean().item(),
    "tensor": rewards.mean(),
    "numpy_of_float64": rewards.double().numpy().mean(),
    "numpy_of_float32": rewards.numpy().mean(),
    "numpy_integer": np.argmax(rewards.numpy()),
    "array": np.array(0.5, np.float32),
}
accelerator = Accelerator(log_with="tensorboard", project_dir=".")
accelerator.init_trackers("run")
accelerator.log(numbers, step=1)
accelerator.end_training()

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

kept = EventAccumulator("run").Reload().Tags()["scalars"]
for name, value in numbers.items():
    print(f"happens: {name:16} {type(value).__name__:8} {'kept' if name in kept else 'left out'}")
assert sorted(kept) == ["float", "numpy_of_float64", "tensor"], "the behaviour has changed"
PY
! grep -E "numpy_|array|TensorBoard|[Dd]ropp" "$work/log" || { echo "it says so now"; exit 1; }
echo "         (and nothing is said)"
