"""Prompt sets: files of prompts, the lists that the paper used, and generators of new ones.

python prompts.py geneval --n 50000 --out geneval.jsonl  # none of which the benchmark asks
python prompts.py text --n 20000 --out text.txt          # and --split test, which shares no phrase
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import os
import random
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also for `python -I`

from cli import Fault, first_line, make_place, option, parse, replace_file, run

# The lists of the paper, as its authors' repository has them at one commit, each with the id that
# git gives its content. They are Flow-GRPO's, and DrawBench's 200 prompts, each five times.
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

LONGEST = 10_000  # characters of a prompt: the encoders read some hundred tokens


def read(path: Path) -> list[dict]:
    """The prompts of a .txt (one a line) or .jsonl file ({"prompt": ..., ...} a line), in UTF-8.

    Returns dicts with "prompt" and what else a line of .jsonl has. Blank lines do not count.
    Raises ValueError, naming file and line, if it cannot be read or holds no prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or .jsonl file, or one of {', '.join(LISTS)}")
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise ValueError("it is no file")
        lines = path.read_text("utf-8-sig").split("\n")  # U+2028 ends no line of a file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it so") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({getattr(error, 'strerror', error)})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            json.dumps(prompt, ensure_ascii=False).encode()  # half a character has no bytes
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({first_line(error)})") from None
        if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
            raise ValueError(f'{path}, line {number} has no "prompt" that is a string')
        if not any(c.isprintable() and not c.isspace() for c in prompt["prompt"]):
            raise ValueError(f"{path}, line {number} has an empty prompt; write one, or delete it")
        if len(prompt["prompt"]) > LONGEST:
            n = len(prompt["prompt"])
            raise ValueError(f"{path}, line {number} has {n} characters; give at most {LONGEST}")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one in each line")
    return prompts


def load(name: str) -> list[dict]:
    """The prompts of a file, or of a list in LISTS by its name. Raises ValueError as both do."""
    return read(fetch(name) if name in LISTS else Path(name))


def blob_id(content: bytes) -> str:
    """What git calls a file with this content, as in `git hash-object`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def fetch(name: str) -> Path:
    """The file of a list in LISTS, from the user's cache or, once, from the network.

    A kept file with another content is fetched again. Raises ValueError, saying what to do, without
    a connection, and if what comes is not the list.
    """
    place, expected = LISTS[name]
    url = f"{SOURCE}/{place}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dgpo"
    path = cache / f"{name}{Path(place).suffix}"
    try:
        if path.is_file() and blob_id(path.read_bytes()) == expected:
            return path
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        advice = "download it where there is a connection, and give the file instead"
        raise ValueError(f"cannot fetch {url} ({first_line(error)}); {advice}") from None
    if blob_id(content) != expected:
        raise ValueError(f"{url} has another content than it had: not git blob {expected}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda new: new.write_bytes(content))
    except (OSError, Fault) as error:
        raise ValueError(f"cannot keep {path} ({first_line(error)}); set XDG_CACHE_HOME") from None
    return path


# GenEval's prompts, in its own words: https://github.com/djghosh13/geneval has tasks and metadata.

COUNTS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# A pair cannot be counted, persons have no color, and an orange has its own.
COLORLESS = ("person", "orange")
UNFIT = {"counting": ("scissors", "skis"), "colors": COLORLESS, "color_attr": COLORLESS}
# Flow-GRPO's mix for training, which the paper takes over: the harder for SD3.5, the more. There is
# no task of single objects, because the benchmark asks for every one of them.
TASKS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
# The benchmark's 553 prompts: the first two bytes of the SHA-256 of each, in base 85. Of other
# prompts, one in 120 is taken for one of them and is not made either.
BENCHMARK = """
09*i%0Y?FH0vZDn1a}0Z1y%)Y1;GX#21*8<2EPYC2WSVA2eJpk2oDI*31|s{3P}oO3(yPe4ayD&4-5}C4|@-o5FrpE5Q-3<5d;w
&5vURi5;+pi6G;=N6m}JI6@(SG7JC;~7hD&U7!(+(7_S*;8E6@I8pImj9Q7S@9p4{#AFLtbBby|LC2u8gC9WmLCK4v+D2OPTD6T
0rDLW~>Ddj2}D%2}PEIurEEbcE<FefmcF_tm!G4nDEGP5$mGd?q5GjcP<G}<+8HL*7>H(fY3IQ}^=IjlMAIz>95J9ImcJJ~%1J$
OBNJ`g@NK0H3(KaW4lKp8+sK*>S}LK#ABLZU*~Lt{g^L>@$2MBhb9Mgc~FM$<=BM}<g6NKi?8NzzI6N|s8;O595oONC6qOw>*}P
J&L_PmxflP`gp0QWsKPQwUU`RNGYkRa#YDRm4^hR`*w9SA|!kSISr#Sch1`SjJfFSu0yxTX<WWTvuGJU5j1EUJ+hPUWi``U^ie_
VR>PaVq0QjV*6t>V`*cVWDI33Wlm*kWwmAeW`t&>X8C7CXI5wgXmn`rYAtJnYpZN7Y|(7pZ5eITZVPTbZmw@-Z<lbIaJO;%ayoK
oa|v^(bYXQwb*y&3cLjHQcf5Eucv^X-dF^`5dhvStd)$0me5-wyeYAd3e%gNBe;<D#e~^FofU<zQfZTxUfro+og7AYLgEoYqgvo
_uhW&^!iBpNuiRX$^ie`$eiu;T2j2MhUjAV?{jP8w{jkJymk7|#XkGzl3kMxjskrI(ckw=l!k|UBYlR%UYl>C*8mExAOmot}0m|
K|9naP?)n)#b@n~9s3o5P$loIRXrob8<aopqi`o}`}KpFW>%pQE3}pj@D~qCKL3qWGhZqr0RorI@AGrU9lTrkJN$r--Mfs7I(!s
B@^ZsSBw(sXeK-s$Q!Nt30f-t-`I&t>~`GudA=uuk^45u_du>vS+e+vZJ!Rv$(V3v;eebwK}z4wcxf|wyL(%w|KYLxCgj}xna3*
x=p%yy7{}iyc)b5ypz1>y)3^gzxKdZz;D3=!B4_!!jHr~#B;>b#N5R!#gxVT#^%Q*$4bZK$w<ki$==E%%N)xo%dX40%o@x{%vsE
~%;3!9&ppqt&=}Bj(BaW9(Sy<N(p1uf(w)-U(<;-8)0ES+)Unlx)x6dI*9g}t*KOB`*^JrJ+1J_N+FRQO+j!gR+$`OO-KgEF-ND
_$-r(O{->=`t;4a|E;l1K#;%?(D<I3a}<bLF*=3(aR=KSX==P>6==Thg7=zHl*>C)<2>f-Ae>l^FD>?Z7t?85B;?Je%E?{4pr@2
Bt0@DT7N@nZ3w^TPAs^X&AY^(FOA^=$R#_3ril_F4A9_W$>H_o?`8_<#7b_{8}A`BC~}`>gxl{Gt5&{uBOg{|)~n
"""
BENCHMARK = base64.b85decode("".join(BENCHMARK.split()))
BENCHMARK = {BENCHMARK[i : i + 2] for i in range(0, len(BENCHMARK), 2)}


def in_benchmark(text: str) -> bool:
    """Whether GenEval's benchmark has this very prompt."""
    return hashlib.sha256(text.encode()).digest()[:2] in BENCHMARK


def wordings(include: list[dict]) -> tuple[str, str]:
    """The prompt that asks for what "include" lists, and the one that asks it the other way round.

    As in the benchmark, whose articles and plurals are regular: "a scissors", "three sheeps".
    """
    things = []
    for clause in include:
        n, words = clause["count"], f"{clause.get('color', '')} {clause['class']}".strip()
        article = COUNTS.get(n, "an" if words[0] in "aeiou" else "a")
        ending = "" if n == 1 else "es" if words.endswith("s") else "s"
        things.append(f"{article} {words}{ending}")
    joint = "and"
    if "position" in include[-1]:  # the last stands so to the first, and is named first
        joint = include[-1]["position"][0]
        things.reverse()
    back = f" {OPPOSITE.get(joint, joint)} ".join(reversed(things))
    return "a photo of " + f" {joint} ".join(things), "a photo of " + back


def geneval_prompt(task: str, rng: random.Random) -> dict:
    """A prompt of one of TASKS that the benchmark does not ask, either way round, with metadata."""
    from rewards.geneval import CLASSES, COLORS  # here, as torch comes with it

    if task not in TASKS:
        raise ValueError(f"no task {task!r}: give {', '.join(TASKS)}")
    classes = [name for name in CLASSES if name not in UNFIT.get(task, ())]
    while True:
        n = 1 if task in ("counting", "colors") else 2
        include = [{"class": name, "count": 1} for name in rng.sample(classes, n)]
        found = {"tag": task, "include": include}
        if task == "counting":
            include[0]["count"] = rng.choice(list(COUNTS))
            found["exclude"] = [{**include[0], "count": include[0]["count"] + 1}]
        elif task == "position":
            include[1]["position"] = [rng.choice(list(OPPOSITE)), 0]
        elif task != "two_object":
            for clause, color in zip(include, rng.sample(COLORS, n), strict=True):
                clause["color"] = color
        texts = wordings(include)
        if not any(map(in_benchmark, texts)):
            return {**found, "prompt": texts[0]}


def geneval_prompts(n: int, seed: int = 0) -> Iterator[dict]:
    """n prompts in Flow-GRPO's mix, none of the benchmark."""
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
THIRD = ",Today,Ahead,Closed,Sale,2026,Festival,No 7,Welcomes You,Est. 1924".split(",")


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


@dataclass
class Arguments:
    """Write a file of new prompts: python prompts.py geneval ... or python prompts.py text ..."""

    kind: str = option(
        "geneval", "What to write; it may stand first, without --kind.", choices=("geneval", "text")
    )
    n: int = option(1000, "How many prompts to write.", at_least=1, at_most=1_000_000)
    seed: int = option(0, "Another seed gives other prompts.", at_least=0, at_most=2**63 - 1)
    split: str = option("train", "Which phrases the texts quote.", choices=("train", "test"))
    out: str = option("", "The new file, .jsonl for geneval and .txt for text.")


def parse_args(argv: list[str]) -> Arguments:
    """Raises Fault, before anything heavy is imported."""
    named = bool(argv) and not argv[0].startswith("-")
    args = parse(Arguments, ["--kind", *argv] if named else argv)
    if args.kind == "geneval" and args.split != "train":
        raise Fault(f"argument --split: is of text alone, got {args.split} for geneval")
    check_new(args.out)
    make_place(args.out, "out", (".jsonl" if args.kind == "geneval" else ".txt",))
    return args


def check_new(out: str) -> None:
    if os.path.lexists(out):
        raise Fault(f"argument --out: {out} is there already; give another name or delete it")


def main() -> None:
    args = parse_args(sys.argv[1:])
    try:
        if args.kind == "geneval":
            lines = [json.dumps(prompt) for prompt in geneval_prompts(args.n, args.seed)]
        else:
            lines = text_prompts(args.n, args.split, args.seed)
    except ValueError as error:
        raise Fault(f"argument --n: {error}") from None
    content = "\n".join([*lines, ""]).encode()
    # Another may have made one meanwhile.
    replace_file(Path(args.out), lambda new: new.write_bytes(content) and check_new(args.out))
    sys.stderr.write(f"wrote {args.n} prompts to {args.out}\n")


if __name__ == "__main__":
    run("prompts.py", main)
