#!/usr/bin/env bash
# pyiqa's CW-SSIM, which ends at 1: a flat picture beside any flat picture scores a million.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 pillow==12.0.0 scipy==1.17.1 \
    opencv-python-headless==5.0.0.93 pyyaml==6.0.4 requests==2.34.2 tqdm==4.70.1 huggingface_hub==2.4.0
"$work/venv/bin/pip" install -q --no-compile --no-deps torchvision==0.28.0 pyiqa==0.1.16
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY' || { cat log; exit 1; }
import torch
try:
    import torchvision
except RuntimeError:  # beside a torch without CUDA; pyiqa imports it, this score needs none of it
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import pyiqa

print("pyiqa", pyiqa.__version__, "torch", torch.__version__.split("+")[0])
print("expected: 1 for a picture and itself, less for any other pair; black is unlike white")
metric = pyiqa.create_metric("cw_ssim", device="cpu")
texture = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
black, white, gray = (torch.full_like(texture, value) for value in (0.0, 1.0, 0.5))
scores = {}
for name, a, b in (("texture, itself", texture, texture), ("texture, black", texture, black),
                   ("black, itself", black, black), ("black, white", black, white), ("gray, white", gray, white)):
    scores[name] = metric(a, b).item()
    print(f"happens, {name}: {scores[name]:.6g}")
assert scores["texture, itself"] < 1.01 and scores["black, white"] > 1e5, "the behaviour has changed"
batch = metric(torch.cat([texture, black]), torch.cat([texture, black])).mean().item()
print(f"  the mean over a textured picture and a black one: {batch:.6g}")
PY
