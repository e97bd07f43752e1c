"""Prompt files, the lists that the paper used, and generators of new prompts.

    python -m sd35.prompts geneval --n 50000 --out geneval.jsonl
    python -m sd35.prompts text --n 20000 --out text.txt

The first leaves out the benchmark's prompts, which are fetched once. For the second, the phrases
of --split test are not in --split train.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from rewards.geneval import CLASSES, COLORS
from sd35.model import ORDER, seeded
from sd35.run import replace_file, run_script
from sd35.settings import Settings, UserError

# The paper's lists, from the authors' repository at one commit, each with the id that git gives its
# content. They are Flow-GRPO's, and DrawBench's 200 prompts, each five times.
COMMIT = "01ceb4b83c0bbc55d96246fe1b6d9a3d4749ebd6"
SOURCE = f"https://raw.githubusercontent.com/Luo-Yihong/DGPO/{COMMIT}/dataset"
LISTS = {
    "geneval": ("geneval/train_metadata.jsonl", "0b97e8a6802c08fc7537cd00c76ae79c851bddcb"),
    "ocr": ("ocr/train.txt", "3ce0521b77b0a9031191d66ecc36ebaaf27a3922"),
    "pickscore": ("pickscore/train.txt", "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b"),
    "geneval_test": ("geneval/test_metadata.jsonl", "27cdaf5cc1356fe15aeadbb8df55682ca74228f0"),
    "ocr_test": ("ocr/test.txt", "8deb4f8d8f2e863f45353354243669b3c991a6a2"),
    "pickscore_test": ("pickscore/test.txt", "45f05231b969fb5f74c8debd606b22cd3be27f8e"),
    "drawbench": ("drawbench/test.txt", "8d96e7cf7017ce6ce299a6eec96e21467a2ac7aa"),
}


def load(name: str) -> list[dict]:
    """The prompts of a .txt file (one per line), a .jsonl file, or a published list by its name.

    Each is a dict with "prompt"; from a .jsonl file ({"prompt": ..., ...} per line), it is the
    whole line. Blank lines do not count. Raises UserError.
    """
    path = fetch(name) if name in LISTS else Path(name)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"{path} must be a .txt or .jsonl file, or one of {', '.join(LISTS)}; pandas converts "
            "tables: read_csv('a.csv').to_json('a.jsonl', orient='records', lines=True)"
        )
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})") from None

    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error})") from None
        text = prompt.get("prompt") if isinstance(prompt, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{path}, line {number} has no text under "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def prompts_of_step(prompts: list[dict], settings: Settings, step: int) -> list[dict]:
    """Line 3 of Algorithm 1: the P prompts of a step. Each epoch has a new order."""
    chosen = []
    for i in range(step * settings.prompts_per_step, (step + 1) * settings.prompts_per_step):
        epoch, position = divmod(i, len(prompts))
        order = torch.randperm(len(prompts), generator=seeded(settings.seed, ORDER, epoch))
        chosen.append(prompts[order[position]])
    return chosen


def blob_id(content: bytes) -> str:
    """The id that git gives a file with this content, as in `git hash-object`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def fetch(name: str) -> Path:
    """The file of a published list: from the user's cache, or else from the network.

    Raises UserError if there is no connection, or if the content is not the published one.
    """
    place, expected = LISTS[name]
    url = f"{SOURCE}/{place}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgpo"
    path = cache / f"{name}{Path(place).suffix}"
    if path.exists() and blob_id(path.read_bytes()) == expected:
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except OSError as error:
        advice = f"download it where there is a connection, and save it as {path}"
        raise UserError(f"cannot fetch {url} ({error}); {advice}") from None
    if blob_id(content) != expected:
        raise UserError(f"the content of {url} has changed: it is not git blob {expected}")
    replace_file(path, lambda new: new.write_bytes(content))
    return path


# GenEval's prompts in its own wording: https://github.com/djghosh13/geneval has tasks and metadata.

COUNTS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# A pair cannot be counted, a person has no color, and an orange has its own.
COLORLESS = ("person", "orange")
UNFIT = {"counting": ("scissors", "skis"), "colors": COLORLESS, "color_attr": COLORLESS}
# Flow-GRPO's training mix, which the paper adopts: the harder for SD3.5, the more often. It has no
# single objects, because the benchmark asks for every one of them.
TASKS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}


def wordings(include: list[dict]) -> tuple[str, str]:
    """The prompt for the objects in "include", and the prompt that names them in reverse order.

    As in the benchmark, articles and plurals are regular: "a scissors", "three sheeps".
    """
    things = []
    for clause in include:
        n, words = clause["count"], f"{clause.get('color', '')} {clause['class']}".strip()
        article = COUNTS.get(n, "an" if words[0] in "aeiou" else "a")
        ending = "" if n == 1 else "es" if words.endswith("s") else "s"
        things.append(f"{article} {words}{ending}")
    joint = "and"
    if "position" in include[-1]:  # the last object's position relative to the first; named first
        joint = include[-1]["position"][0]
        things.reverse()
    reverse = f" {OPPOSITE.get(joint, joint)} ".join(reversed(things))
    return "a photo of " + f" {joint} ".join(things), "a photo of " + reverse


def geneval_prompts(n: int, seed: int = 0) -> Iterator[dict]:
    """n prompts with metadata in Flow-GRPO's mix; none is in the benchmark in either order."""
    benchmark = {prompt["prompt"] for prompt in load("geneval_test")}
    rng = random.Random(seed)
    for task in rng.choices(list(TASKS), list(TASKS.values()), k=n):
        classes = [name for name in CLASSES if name not in UNFIT.get(task, ())]
        while True:
            objects = 1 if task in ("counting", "colors") else 2
            include = [{"class": name, "count": 1} for name in rng.sample(classes, objects)]
            prompt = {"tag": task, "include": include}
            if task == "counting":
                include[0]["count"] = rng.choice(list(COUNTS))
                prompt["exclude"] = [{**include[0], "count": include[0]["count"] + 1}]
            elif task == "position":
                include[1]["position"] = [rng.choice(list(OPPOSITE)), 0]
            elif task != "two_object":
                for clause, color in zip(include, rng.sample(COLORS, objects), strict=True):
                    clause["color"] = color
            text, reverse = wordings(include)
            if not {text, reverse} & benchmark:
                break
        yield {**prompt, "prompt": text}


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
THIRD = ",Today,Ahead,Closed,Sale,2026,Festival,No 7,Welcomes You,Est. 1924".split(",")


def text_prompts(n: int, split: str = "train", seed: int = 0) -> list[str]:
    """n different prompts that quote a phrase; a random tenth of the phrases is the split "test".

    Raises UserError if there are fewer than n.
    """
    phrases = [" ".join(words).strip() for words in itertools.product(FIRST, SECOND, THIRD)]
    random.Random(0).shuffle(phrases)  # the same split for every seed
    n_test = len(phrases) // 10
    phrases = phrases[:n_test] if split == "test" else phrases[n_test:]
    pairs = list(itertools.product(phrases, SIGNS))
    if n > len(pairs):
        raise UserError(f"there are only {len(pairs)} different prompts, got --n {n}")
    return [sign.format(phrase) for phrase, sign in random.Random(seed).sample(pairs, n)]


def main() -> None:
    parser = argparse.ArgumentParser("python -m sd35.prompts", description="Write new prompts.")
    parser.add_argument("kind", choices=["geneval", "text"])
    parser.add_argument("--n", type=int, default=1000, help="Number of prompts (default: 1000).")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other prompts.")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="Of text only.")
    parser.add_argument("--out", type=Path, required=True, help="A new .jsonl, for text .txt.")
    args = parser.parse_args()
    suffix = ".jsonl" if args.kind == "geneval" else ".txt"
    if args.out.suffix != suffix or args.out.exists():
        parser.error(f"--out must be a new {suffix} file, got {args.out}")
    if args.kind == "geneval":
        lines = [json.dumps(prompt) for prompt in geneval_prompts(args.n, args.seed)]
    else:
        lines = text_prompts(args.n, args.split, args.seed)
    replace_file(args.out, lambda new: new.write_text("".join(f"{line}\n" for line in lines)))
    print(f"wrote {args.n} prompts to {args.out}")


if __name__ == "__main__":
    run_script(main)
