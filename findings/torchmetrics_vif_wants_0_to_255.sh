#!/usr/bin/env bash
# torchmetrics' VIF: pictures in [0, 1] score far too well, and nothing says that it wants [0, 255].
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 torchmetrics==1.9.0
"$work/venv/bin/python" - <<'PY'
import torch, torchmetrics
from torchmetrics.functional.image import visual_information_fidelity as vif

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__.split("+")[0])
print("expected: there is no data_range to give, so the score does not depend on the unit of the pixels")
generator = torch.Generator().manual_seed(0)
coarse = torch.rand(1, 3, 32, 32, generator=generator)
picture = torch.nn.functional.interpolate(coarse, size=(256, 256), mode="bicubic").clamp(0, 1)
print("happens: VIF of a picture with noise, 1 being flawless")
for noise in (0.02, 0.05, 0.1, 0.2):
    noisy = (picture + noise * torch.randn(picture.shape, generator=generator)).clamp(0, 1)
    unit, byte = vif(noisy, picture).item(), vif(noisy * 255, picture * 255).item()
    print(f"  noise {noise:.2f}: pixels in [0, 1] {unit:.3f}, the same in [0, 255] {byte:.3f}")
    assert unit > byte + 0.2, "the behaviour has changed"
PY
