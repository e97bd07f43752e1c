#!/usr/bin/env bash
# torchmetrics' UQI and SCC: a picture with a flat background is unlike itself.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 torchmetrics==1.9.0
"$work/venv/bin/python" - <<'PY'
import torch, torchmetrics
from torchmetrics.functional import image as scores

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__.split("+")[0])
print("expected: a picture beside itself scores 1, whatever is in it, or nan where 0 / 0 is undefined")
noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
print("happens: score of a picture and itself, by the share of it that is flat")
for share in (0, 0.25, 0.5, 0.75, 1):
    picture = noise.clone()
    picture[..., : int(128 * share)] = 0.5
    uqi = scores.universal_image_quality_index(picture, picture).item()
    scc = scores.spatial_correlation_coefficient(picture, picture).item()
    ssim = scores.structural_similarity_index_measure(picture, picture, data_range=1.0).item()
    print(f"  {share:.2f}: UQI {uqi:.3f}, SCC {scc:.3f}; SSIM {ssim:.3f}")
    assert abs(uqi - (1 - share)) < 0.1 and abs(scc - (1 - share)) < 0.1, "the behaviour has changed"
    assert abs(ssim - 1) < 1e-4, "the behaviour has changed"
PY
