#!/usr/bin/env bash
# piq's SR-SIM: the score of a pair of pictures depends on the other pairs in its batch.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 pillow==12.0.0
"$work/venv/bin/pip" install -q --no-compile --no-deps torchvision==0.28.0 piq==0.8.0
"$work/venv/bin/python" - <<'PY'
import torch
try:
    import torchvision
except RuntimeError:  # beside a torch without CUDA; piq imports it, this score needs none of it
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import piq

print("piq", piq.__version__, "torch", torch.__version__.split("+")[0])
print('expected: with reduction="none" each pair has its own score, whatever stands beside it')
generator = torch.Generator().manual_seed(0)
coarse = torch.rand(1, 3, 32, 32, generator=generator)
picture = torch.nn.functional.interpolate(coarse, size=(256, 256), mode="bicubic").clamp(0, 1)
noise = torch.randn(picture.shape, generator=generator)
better, worse = ((picture + size * noise).clamp(0, 1) for size in (0.09, 0.1))
gray, dot = torch.full_like(picture, 0.5), torch.zeros_like(picture)
dot[..., 128, 128] = 1


def score(noisy, *beside):
    """The noisy picture's score, in a batch with other pictures and themselves."""
    return piq.srsim(torch.cat([noisy, *beside]), torch.cat([picture, *beside]), reduction="none")[0].item()


print("happens: noise 0.09 and noise 0.10 alone", round(score(better), 3), round(score(worse), 3))
for name, beside in (("gray picture", gray), ("black one with a white dot", dot)):
    print(f"  beside a {name}:", round(score(better, beside), 3), round(score(worse, beside), 3))
assert score(better) > score(worse) and score(better, gray) < score(worse, dot) - 0.02, "the behaviour has changed"
PY
