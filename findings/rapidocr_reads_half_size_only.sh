#!/usr/bin/env bash
# rapidocr: words of 20 px on a picture of 1024 px are not found; in a copy of half the size they are read.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile rapidocr==3.10.0 onnxruntime==1.31.1 pillow==13.0.0
"$work/venv/bin/python" - <<'PY'
import importlib.metadata, logging
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("rapidocr", "onnxruntime", "pillow")))
print("expected: what is read at half the size is read at full size, or in a wider picture, too")
threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
engine = RapidOCR(params={"Global.log_level": "error", **threads})
logging.disable(logging.CRITICAL)  # it warns that it found nothing


def read(picture):  # engine takes BGR
    result = engine(np.array(picture)[:, :, ::-1], use_det=True, use_cls=False, use_rec=True)
    return " ".join(result.txts or ())


words, hits = ("OPEN", "coffee", "Parking", "HOTEL", "exit", "Museum", "BANK", "bread"), {}
for size in (16, 20, 48):
    found = []
    for word in words:
        full = Image.new("RGB", (1024, 1024), "white")
        font = ImageFont.load_default(size)
        ImageDraw.Draw(full).text((512, 512), word, fill="black", font=font, anchor="mm")
        views = full, full.resize((512, 512), Image.Resampling.LANCZOS), full.crop((256, 256, 768, 768))
        found.append([read(view).lower() == word.lower() for view in views])
    hits[size] = np.sum(found, 0).tolist()
    print(f"happens: {len(words)} words of {size} px, read at 1024 x 1024: {hits[size][0]}; scaled to 512 x 512:"
          f" {hits[size][1]}; the middle 512 x 512: {hits[size][2]}")
assert max(hits[16][0], hits[20][0]) <= 1 and min(hits[16][1:] + hits[20][1:]) >= 6, "the behaviour has changed"
assert min(hits[48]) == len(words), "the behaviour has changed"
PY
