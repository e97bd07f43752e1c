"""The text-rendering reward, by real OCR on signs that are drawn here."""

import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import rewards
from rewards import ocr

TARGETS = {
    'a sign that says "HELLO WORLD"': "HELLO WORLD",
    "a sign that says 'HELLO WORLD'": "HELLO WORLD",
    "a sign that says “HELLO WORLD”": "HELLO WORLD",
    "a sign that says ‘HELLO WORLD’": "HELLO WORLD",
    "a sign that says 'Don't Panic'": "Don't Panic",
    "a sign that says ‘Don’t Panic’": "Don’t Panic",
    "a dog's sign that says 'Open', at night": "Open",
    'a poster with "First" above and "Second" below': "First Second",
    "a poster with 'First' above and ‘Second’ below": "First Second",
    "a 'retro' sign of ‘the’ “old” kind that says \"Open\"": "Open",
    "'Now' is written on the wall": "Now",
    "a cafe ('Bar')": "Bar",
    "it says \"It's 5 o'clock\" in chalk": "It's 5 o'clock",
}


@pytest.mark.parametrize("prompt", TARGETS)
def test_the_target_is_what_is_quoted(prompt):
    assert ocr.target_text(prompt) == TARGETS[prompt]


@pytest.mark.parametrize("prompt", ["a dog", "the dogs' owner's hat", 'nothing in ""', "don't"])
def test_a_prompt_that_quotes_nothing_is_named(prompt):
    with pytest.raises(rewards.RewardError, match="no text in quotation marks in the prompt"):
        ocr.target_text(prompt)


@pytest.fixture(scope="module")
def reward():
    for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
        pytest.importorskip(package, reason="pip install rapidocr onnxruntime rapidfuzz")
    return ocr.load("cpu")


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("HELLO", "HELLO", 1),
        ("hello", "HELLO", 1),
        ("HEL LO", "HELLO", 1),
        ("say HELLO there", "HELLO", 1),
        ("HELO", "HELLO", 1 - 1 / 5),
        ("HELLQ", "HELLO", 1 - 1 / 5),
        ("HE", "HELLO", 1 - 3 / 5),
        ("", "HELLO", 0),
        ("COMPLETELY DIFFERENT", "HELLO", 0),
    ],
)
def test_appendix_e_by_hand(read, target, score, reward):
    assert ocr.similarity(read, target) == pytest.approx(score)


def sign(*lines, size=64, angle=0, side=384):
    picture = Image.new("RGB", (side, side), (250, 250, 240))
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        place = (side / 2, side / 2 + (i - (len(lines) - 1) / 2) * 1.4 * size)
        draw.text(place, line, fill=(20, 20, 60), anchor="mm", font=ImageFont.load_default(size))
    return picture.rotate(angle, fillcolor=(250, 250, 240))


def to_tensor(picture):
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def noisy(picture):
    image = to_tensor(picture.filter(ImageFilter.GaussianBlur(1.5)))
    generator = torch.Generator().manual_seed(0)
    return (image + 0.15 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


SIGNS = {  # the picture, and the least and the most it may get for "OPEN DAILY"
    "clean": (lambda: to_tensor(sign("OPEN DAILY")), 1, 1),
    "small": (lambda: to_tensor(sign("OPEN DAILY", size=22)), 0.9, 1),
    "turned": (lambda: to_tensor(sign("OPEN DAILY", size=48, angle=12)), 0.9, 1),
    "noisy": (lambda: noisy(sign("OPEN DAILY")), 0.9, 1),
    "two lines": (lambda: to_tensor(sign("OPEN", "DAILY")), 1, 1),
    "a letter missing": (lambda: to_tensor(sign("OPEN DALY")), 1 - 1 / 9, 1 - 1 / 9),
    "another text": (lambda: to_tensor(sign("NO EXIT")), 0, 0.35),
    "blank": (lambda: to_tensor(sign("")), 0, 0),
    "upside down": (lambda: to_tensor(sign("OPEN DAILY", angle=180)), 0, 0.6),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_that_are_read(name, reward):
    draw, least, most = SIGNS[name]
    (score,) = reward(draw()[None], [{"prompt": "a sign that says 'OPEN DAILY'"}])
    assert least - 1e-9 <= score <= most + 1e-9


def test_each_picture_has_its_own_prompt(reward):
    images = torch.stack([to_tensor(sign("OPEN")), to_tensor(sign("EXIT")), to_tensor(sign(""))])
    prompts = [{"prompt": f"it says '{text}'"} for text in ("OPEN", "EXIT", "EXIT")]
    assert reward(images, prompts) == [1, 1, 0]
    assert reward(images, prompts) == [1, 1, 0]  # what was read before plays no part


def test_a_picture_of_one_line_needs_no_looking_for_text(reward):
    line = ocr.load("cpu", line=192)
    targets = ["OPEN DAILY", "OPEN DALY", "NO EXIT", ""]
    images = torch.stack([to_tensor(sign(t, size=52, side=384))[:, 144:240] for t in targets])
    prompts = [{"prompt": "a sign that says 'OPEN DAILY'"}] * len(targets)
    scores = line(images, prompts)
    # The formula is the same, by hand: one letter of nine is missing, and nothing is like nothing.
    assert scores == pytest.approx([1, 1 - 1 / 9, ocr.similarity("NOEXIT", "OPENDAILY"), 0])
    assert reward(images[:2], prompts[:2]) == scores[:2]
    # A recogniser alone cannot read two lines, which is why the option is one.
    two = to_tensor(sign("OPEN", "DAILY"))[None]
    assert line(two, prompts[:1])[0] < reward(two, prompts[:1])[0] == 1


def test_its_packages_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(rewards.RewardError, match="ocr: it needs `pip install rapidocr .*fuzz`$"):
        rewards.load("ocr", "cpu")
