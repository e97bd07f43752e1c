"""Prompt sets: files of prompts, the lists that the paper used, and generators of new ones.

python prompts.py geneval --n 50000 --out geneval.jsonl
python prompts.py text --n 20000 --out text.txt          # and --split test, which shares none
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from rewards.geneval import CLASSES, COLORS

# Flow-GRPO's lists, which the paper trains and evaluates on, at one commit of its repository.
COMMIT = "c7bb5fee2ef663eee08393759c8cb8a0e027f5e3"
SOURCE = f"https://raw.githubusercontent.com/yifan123/flow_grpo/{COMMIT}/dataset"
LISTS = {
    "geneval": f"{SOURCE}/geneval/train_metadata.jsonl",
    "ocr": f"{SOURCE}/ocr/train.txt",
    "pickscore": f"{SOURCE}/pickscore/train.txt",
    "geneval_test": f"{SOURCE}/geneval/test_metadata.jsonl",
    "ocr_test": f"{SOURCE}/ocr/test.txt",
    "pickscore_test": f"{SOURCE}/pickscore/test.txt",
    # The sheet of its authors (Saharia et al. 2022), with the columns Prompts and Category.
    "drawbench": "https://docs.google.com/spreadsheets/d/"
    "1y7nAbmR4FREi6npB1u-Bo3GFdwdOPYJc617rBOxIRHY/gviz/tq?tqx=out:csv",
}


def read(path: Path) -> list[dict]:
    """The prompts of a .txt (one a line) or .jsonl file ({"prompt": ..., ...} a line).

    Returns dicts with "prompt" and what else a line of .jsonl has. Blank lines do not count.
    Raises ValueError, naming file and line, if it cannot be read or holds no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or .jsonl file")
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            prompts.append({"prompt": line.strip()})
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
            raise ValueError(f'{path}, line {number} has no "prompt" that is a string')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def load(name: str) -> list[dict]:
    """The prompts of a file, or of a list in LISTS by its name. Raises ValueError as both do."""
    return read(fetch(name) if name in LISTS else Path(name))


def fetch(name: str) -> Path:
    """The file of a list in LISTS, downloaded once to the user's cache.

    Its SHA-256 is kept beside it and checked at every use. Raises ValueError, saying what to do,
    without a connection and for a file that has changed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dgpo"
    url = LISTS[name]
    path = cache / f"{name}{'.txt' if url.endswith('.txt') else '.jsonl'}"
    checksum = path.with_suffix(".sha256")
    if not (path.exists() and checksum.exists()):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise ValueError(
                f"cannot fetch {url} ({error}); download it where there is a connection, "
                "and give the file instead"
            ) from None
        if url.endswith("csv"):
            content = from_sheet(content, url)
        cache.mkdir(parents=True, exist_ok=True)
        for target, data in ((path, content), (checksum, hashlib.sha256(content).hexdigest())):
            new = target.with_suffix(f".{os.getpid()}.new")
            new.write_bytes(data if isinstance(data, bytes) else data.encode())
            os.replace(new, target)
    if hashlib.sha256(path.read_bytes()).hexdigest() != checksum.read_text():
        raise ValueError(f"{path} has changed since it was fetched; delete it to fetch it again")
    return path


def from_sheet(content: bytes, url: str) -> bytes:
    """DrawBench's sheet, as .jsonl. Raises ValueError if it is not that sheet."""
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    if not rows or not {"Prompts", "Category"} <= rows[0].keys():
        raise ValueError(f"{url} is no sheet with the columns Prompts and Category")
    lines = [{"prompt": row["Prompts"].strip(), "tag": row["Category"].strip()} for row in rows]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


# GenEval's prompts: https://github.com/djghosh13/geneval has the tasks and the metadata.

RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three", 4: "four"}
PAIRS = ("scissors", "skis")  # are one thing and a plural: no article, and no count
PLURALS = {"person": "people", "knife": "knives", "mouse": "mice", "sheep": "sheep"}
# Flow-GRPO's mix for training, which the paper takes over: the harder for SD3.5, the more.
TASKS = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 0,
}


def article(words: str) -> str:
    """With "a" or "an"; without, where it is a plural."""
    if words.split()[-1] in PAIRS:
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    *words, last = name.split()
    last = PLURALS.get(last) or last + ("es" if re.search("(s|x|ch|sh)$", last) else "s")
    return " ".join([*words, last])


def geneval_prompt(task: str, rng: random.Random) -> dict:
    """One of the six tasks, as GenEval's metadata with its prompt."""
    one, other = rng.sample(CLASSES, 2)
    color, color_2 = rng.choice(COLORS), rng.choice(COLORS)
    include, exclude = [{"class": one, "count": 1}], []
    if task == "single_object":
        text = article(one)
    elif task == "two_object":
        include.append({"class": other, "count": 1})
        text = f"{article(one)} and {article(other)}"
    elif task == "counting":
        one = rng.choice([name for name in CLASSES if name not in PAIRS])
        n = rng.choice(list(COUNTS))
        include = [{"class": one, "count": n}]
        exclude = [{"class": one, "count": n + 1}]
        text = f"{COUNTS[n]} {plural(one)}"
    elif task == "colors":
        while one == "person" or one == color:  # an orange orange
            one, color = rng.choice(CLASSES), rng.choice(COLORS)
        include = [{"class": one, "count": 1, "color": color}]
        text = article(f"{color} {one}")
    elif task == "position":
        relation = rng.choice(RELATIONS)
        include = [
            {"class": other, "count": 1},
            {"class": one, "count": 1, "position": [relation, 0]},
        ]
        text = f"{article(one)} {relation} {article(other)}"
    elif task == "color_attr":
        colorful = [name for name in CLASSES if name not in ("person", "orange")]
        one, other = rng.sample(colorful, 2)
        color, color_2 = rng.sample(COLORS, 2)
        include = [
            {"class": one, "count": 1, "color": color},
            {"class": other, "count": 1, "color": color_2},
        ]
        text = f"{article(f'{color} {one}')} and {article(f'{color_2} {other}')}"
    else:
        raise ValueError(f"no task {task!r}: give {', '.join(TASKS)}")
    found = {"tag": task, "include": include, "prompt": f"a photo of {text}"}
    return {**found, "exclude": exclude} if exclude else found


def geneval_prompts(n: int, seed: int = 0) -> Iterator[dict]:
    """n prompts in Flow-GRPO's mix."""
    rng = random.Random(seed)
    for task in rng.choices(list(TASKS), list(TASKS.values()), k=n):
        yield geneval_prompt(task, rng)


# Text rendering: a template times a phrase. No phrase is in both splits.

SIGNS = (
    "A sign that says '{}'",
    "A neon sign above a door that says '{}'",
    "A hand-painted wooden board with the words '{}'",
    "A birthday cake with '{}' written in icing",
    "A book cover with the title '{}'",
    "A chalkboard in a cafe that says '{}'",
    "A t-shirt printed with '{}'",
    "A movie poster titled '{}'",
    "A street mural that reads '{}'",
    "A coffee mug with the text '{}'",
    "A newspaper with the headline '{}'",
    "A billboard at night that says '{}'",
)
FIRST = """
Open Quiet Golden Hidden Little Summer Winter Silver Happy Broken Secret Wild Old Bright Midnight
Slow Fresh Royal Lucky Northern Gentle Modern Distant Simple Brave Crystal Paper Velvet Copper Solar
""".split()
SECOND = """
Garden Harbor Library Kitchen Market Bakery Station Mountain River Forest Theater Museum Orchard
Lantern Compass Journey Island Castle Bridge Meadow Window Rocket Piano Camera Circus Engine Valley
Anchor Dragon Studio
""".split()
THIRD = (
    "",
    "Today",
    "Ahead",
    "Closed",
    "Sale",
    "2026",
    "Festival",
    "No 7",
    "Welcomes You",
    "Est. 1924",
)


def text_prompts(n: int, split: str = "train", seed: int = 0) -> list[str]:
    """n prompts that quote a phrase; one phrase in ten is kept for the split "test".

    Raises ValueError when there are not so many different ones.
    """
    phrases = [" ".join(words).strip() for words in itertools.product(FIRST, SECOND, THIRD)]
    random.Random(0).shuffle(phrases)  # the same split for every seed
    kept = len(phrases) // 10
    phrases = phrases[:kept] if split == "test" else phrases[kept:]
    if n > len(SIGNS) * len(phrases):
        raise ValueError(f"there are {len(SIGNS) * len(phrases)} different prompts, asked for {n}")
    pairs = random.Random(seed).sample(range(len(SIGNS) * len(phrases)), n)
    return [SIGNS[i % len(SIGNS)].format(phrases[i // len(SIGNS)]) for i in pairs]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("geneval", "text"))
    parser.add_argument("--n", type=int, required=True, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="train", help="of text")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl for geneval, .txt for text")
    args = parser.parse_args()
    suffix = ".jsonl" if args.kind == "geneval" else ".txt"
    if args.out.suffix != suffix:
        parser.error(f"argument --out: must end in {suffix} for {args.kind}, got {args.out}")
    if args.n < 1:
        parser.error(f"argument --n: must be at least 1, got {args.n}")
    try:
        if args.kind == "geneval":
            lines = [json.dumps(prompt) for prompt in geneval_prompts(args.n, args.seed)]
        else:
            lines = text_prompts(args.n, args.split, args.seed)
    except ValueError as error:
        parser.error(f"argument --n: {error}")
    try:
        args.out.write_text("\n".join(lines) + "\n")
    except OSError as error:
        parser.error(f"argument --out: cannot write to {args.out} ({error.strerror})")
    print(f"wrote {args.n} prompts to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
