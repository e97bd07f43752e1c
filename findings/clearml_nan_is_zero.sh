#!/usr/bin/env bash
# A loss that has become NaN or infinite is drawn by ClearML as a perfect 0.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 accelerate==1.15.0 clearml==2.1.12
export HOME=$work CLEARML_OFFLINE_MODE=1
cd "$work" && "$work/venv/bin/python" - <<'PY' 2>"$work/log" || { tail -3 "$work/log"; exit 1; }
import importlib.metadata, json, pathlib, zipfile
from accelerate import Accelerator

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("accelerate", "clearml")))
print("expected: loss 3.0, 2.0, then nan or a gap; not a number that a loss may have")
accelerator = Accelerator(log_with="clearml")
accelerator.init_trackers("proj")
losses = 3.0, 2.0, float("nan"), float("inf"), -float("inf")
for step, loss in enumerate(losses):
    accelerator.log({"train_loss": loss}, step=step)
accelerator.end_training()

(session,) = pathlib.Path(".clearml").rglob("offline-*.zip")  # what would be sent to the server
with zipfile.ZipFile(session) as file:
    (name,) = (name for name in file.namelist() if name.endswith("metrics.jsonl"))
    events = [event for line in file.read(name).splitlines() for event in json.loads(line)]
kept = sorted((event["iter"], event["value"]) for event in events if event.get("metric") == "loss")
print("happens: logged", dict(enumerate(losses)))
print("         kept  ", dict(kept))
assert kept == [(0, 3.0), (1, 2.0), (2, 0.0), (3, 0.0), (4, 0.0)], "the behaviour has changed"
PY
