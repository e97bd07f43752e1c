"""The text-rendering reward: what prompts quote, and what a real OCR engine reads on signs."""

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards
from rewards import ocr

TARGETS = {
    'a sign that says "HELLO WORLD"': "HELLO WORLD",
    "a sign that says 'HELLO WORLD'": "HELLO WORLD",
    "a sign that says 'Don't Panic'": "Don't Panic",
    "a sign that says ‘Don’t Panic’": "Don’t Panic",
    "a dog's sign that says 'Open', at night": "Open",
    "the dogs' sign says 'Hot Dogs' at the dogs' park": "Hot Dogs",
    "a poster with 'First' above and ‘Second’ below": "First Second",
    "a cafe ('Bar')": "Bar",
    "it says \"It's 5 o'clock\" in chalk": "It's 5 o'clock",
    # inch marks, elisions, several kinds of marks, other programs' escapes
    'A 12" pizza box that says "HOT"': "HOT",
    'A 6\'2" man holding a sign "TAXI"': "TAXI",
    'Poster, 24"x36", with the title "JAZZ NIGHT"': "JAZZ NIGHT",
    'A sign with 5" nails and "OPEN" and "SHUT"': "OPEN SHUT",
    "A '90s style sign that says 'OPEN'": "OPEN",
    "Rock 'n' roll sign reads 'LIVE'": "LIVE",
    "a sign \"Rock 'n' Roll\"": "Rock 'n' Roll",
    "a sign 'Rock 'n' Roll'": "Rock 'n' Roll",
    "GUNS 'N' ROSES on one side, 'N' on the other": "N",
    'A sign that says “SALE” above a button "OK"': "SALE OK",
    'A sign: "" and "OPEN"': "OPEN",
    'A sign saying \\"OPEN\\"': "OPEN",
    '"A sign saying ""OPEN"""': "OPEN",
    'A sign that reads "Room 12"; a door with "7"': "Room 12 7",
    "a “12” and a 15” wide “SALE”": "12 SALE",
    "„Willkommen“": "Willkommen",
    "«Bienvenue»": "Bienvenue",
    "”OPEN”": "OPEN",
    '写着"营业中"的牌子': "营业中",
    '海报上写着"2026"和"新年快乐"': "2026 新年快乐",
    'two signs, "Exit 5","Exit 6"': "Exit 5 Exit 6",
    "看板に2024「営業中」と「 休み 」": "営業中 休み",
    "海报上写着2024“新年快乐”和“发财”": "新年快乐 发财",
    "a 6' tall man, a jack-o'-lantern, a sign 'LIVE'": "LIVE",
    "a rockin' bar's sign 'LIVE', the dogs' favourite": "LIVE",
}


@pytest.mark.parametrize("prompt", TARGETS)
def test_the_target_is_what_is_quoted(prompt):
    assert " ".join(ocr.quoted_texts(prompt)) == TARGETS[prompt]


REFUSED = {
    "a dog": "no text in quotation marks",
    "the dogs' owner's hat": "no text in quotation marks",
    'nothing in ""': "no text in quotation marks",
    'a sign that says "OPEN': "is left over",
    "a sign that says 'OPEN": "is left over",
    'a sign "A 12" pizza" in red': "is left over",
    "a sign 'The dogs' den'": "is left over",
    "a sign 'Kids' Toys'": "is left over",
    "a sign 'Singin' in the Rain'": "is left over",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_a_prompt_without_a_clear_target_is_refused_by_name(prompt):
    with pytest.raises(rewards.RewardError, match=REFUSED[prompt]) as caught:
        ocr.quoted_texts(prompt)
    assert repr(prompt) in str(caught.value)


def test_prompts_as_the_published_ones_have_their_only_quotation_as_target():
    """All 1,018 published test prompts have one text in straight double marks and words around."""
    rng = random.Random(0)
    words = "a sign reads It's 50% o'clock Cafe 2024 the dogs' well-lit".split()
    for _ in range(300):
        before, text, after = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(3))
        prompt = f'{before}, "{text}"{rng.choice(".,; ")} {after}.'
        assert ocr.quoted_texts(prompt) == [text]


SIMILARITIES = [
    ("hel lo", ["HELLO"], 1),
    ("say HELLO there", ["HELLO"], 1),
    ("HELO", ["HELLO"], 1 - 1 / 5),
    ("COMPLETELY DIFFERENT", ["HELLO"], 0),
    # several texts stand anywhere
    ("OPEN SHUT", ["OPEN", "SHUT"], 1),
    ("SHUT and OPEN", ["OPEN", "SHUT"], 1),
    ("OPEN CAFE", ["OPEN", "SHUT"], 1 / 2),
    ("OPENING OPEN", ["OPEN", "OPENING"], 1),
    ("GO", ["GO", "GO"], 1 / 2),
    # one form for both sides
    ("20℃ 5m³ No5", ["20°C 5m3 №5"], 1),
    ("Wait... 2-4 μm", ["Wait… 2–4 µm"], 1),
    ('Don\'t "A·B"', ["Don’t “A•B”"], 1),
    ("72°℉ AEON STRASSE", ["72°F Æon Straße"], 1),
]


@pytest.mark.parametrize(("read", "targets", "score"), SIMILARITIES)
def test_appendix_e_by_hand(read, targets, score):
    pytest.importorskip("rapidfuzz")
    assert ocr.similarity(read, *targets) == pytest.approx(score)


def box(left, top, width=100, height=40, slope=0):
    right, bottom = left + width, top + height
    fall = slope * width
    return [[left, top], [right, top + fall], [right, bottom + fall], [left, bottom]]


ORDERS = {  # boxes in the order in which they are to be read
    "left to right, the left one lower": [box(0, 12), box(110, 0)],
    "a line that falls": [box(110 * i, 30 * i, slope=0.27) for i in range(4)],
    "two lines that rise": [
        box(110 * i, 200 + 60 * line - 30 * i, slope=-0.27) for line in range(2) for i in range(3)
    ],
    "a tall box before two lines": [box(0, 0, height=90), box(110, 0), box(110, 50)],
    "a step down to the left": [box(110, 0), box(0, 30)],
}


@pytest.mark.parametrize("name", ORDERS)
def test_boxes_are_read_as_people_read(name):
    boxes = np.array(ORDERS[name], np.float32)
    for order in itertools.islice(itertools.permutations(range(len(boxes))), 24):
        assert [order[i] for i in ocr.reading_order(boxes[list(order)])] == list(range(len(boxes)))


@pytest.fixture(scope="module")
def reward():
    for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
        pytest.importorskip(package, reason="pip install rapidocr onnxruntime rapidfuzz")
    return ocr.load("cpu")


def sign(*texts, size=64, angle=0, side=384, places=None):
    """A picture (3, side, side) of texts, one below the other or at `places`, turned by `angle`."""
    picture = Image.new("RGB", (side, side), (250, 250, 240))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for i, text in enumerate(texts):
        place = (side / 2, side / 2 + (i - (len(texts) - 1) / 2) * 1.4 * size)
        draw.text(places[i] if places else place, text, (20, 20, 60), font, "mm")
    picture = picture.rotate(angle, fillcolor=(250, 250, 240))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


TURNED, HELLO = ["EXIT", "SALE", "CAFE"], ["HELLO", "WORLD"]
SIDE_BY_SIDE = [(105, 200), (285, 184)]  # the left word is 16 px lower
SIGNS = {  # the picture, what its prompt quotes, the least and the greatest score
    "clean": (lambda: sign("OPEN DAILY"), ["OPEN DAILY"], 1, 1),
    "two lines": (lambda: sign("OPEN", "DAILY"), ["OPEN DAILY"], 1, 1),
    "two texts": (lambda: sign("SHUT", "OPEN"), ["OPEN", "SHUT"], 1, 1),
    "side by side": (lambda: sign(*HELLO, size=40, places=SIDE_BY_SIDE), [" ".join(HELLO)], 1, 1),
    "a letter missing": (lambda: sign("OPEN DALY"), ["OPEN DAILY"], 8 / 9, 8 / 9),
    "another text": (lambda: sign("NO EXIT"), ["OPEN DAILY"], 0, 0.35),
    "blank": (lambda: sign(""), ["OPEN DAILY"], 0, 0),
    "upside down": (lambda: sign(*TURNED, angle=180), TURNED, 0, 0),
    "the same both ways": (lambda: sign("NOON", "WOW"), ["NOON", "WOW"], 1, 1),
    "upwards": (lambda: sign("OPEN DAILY", size=52, angle=90), ["OPEN DAILY"], 1, 1),
    "downwards": (lambda: sign("OPEN DAILY", size=52, angle=-90), ["OPEN DAILY"], 1, 1),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_are_read(name, reward):
    draw, texts, least, most = SIGNS[name]
    prompt = " and ".join(f'"{text}"' for text in texts)
    scores, _ = rewards.score("ocr", reward, draw()[None], [{"prompt": prompt}])
    assert least - 1e-6 <= scores.item() <= most + 1e-6


def test_a_box_is_read_alike_whatever_stands_beside_it():
    """In a batch, boxes are padded to the widest, which changes what is read and how surely."""
    pytest.importorskip("rapidocr")
    engine, long = ocr.build_engine(), sign("A LONG LINE OF WORDS", size=28)[:, 172:212]
    short, long = (rewards.to_bytes(x[None])[0] for x in (sign("10 %")[:, 162:222, 120:264], long))
    alone, beside = engine.recognize_txt([short]), engine.recognize_txt([short, long])
    assert (alone.txts[0], alone.scores[0]) == (beside.txts[0], beside.scores[0])


def test_small_words_in_a_large_picture_are_found(reward):
    """At 1024 pixels the engine misses a word of 20, which it finds in a smaller copy."""
    picture = sign("OPEN", size=20, side=1024)
    assert reward(picture[None], ['a sign that says "OPEN"']) == [1.0]


def test_a_sign_that_the_engine_does_not_know_is_refused(reward):
    for text in ("Open 24/7 – Café №5", "Straße “Łódź”", "営業中", "¡Hola! ¿Qué tal?"):
        ocr.check_prompt({"prompt": f"a sign 「{text}」"})
    for text, unknown in (("Кафе", "а"), ("שלום", "ו"), ("카페", "카"), ("مقهى", "ق")):
        with pytest.raises(rewards.RewardError, match=f"the OCR engine cannot read '{unknown}' in"):
            ocr.check_prompt({"prompt": f'a sign "{text}"'})


def test_missing_packages_and_superfluous_models_are_named(monkeypatch):
    with pytest.raises(rewards.RewardError, match="models are part of the package rapidocr"):
        rewards.load("ocr", "cpu", "mine")
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(rewards.RewardError, match="ocr: it needs `pip install rapidocr .*fuzz`$"):
        rewards.load("ocr", "cpu")
