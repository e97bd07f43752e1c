"""Prompt files, and the lists that are fetched once."""

import collections
import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prompts
from rewards import geneval, ocr

ROOT = Path(__file__).parents[1]


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a dog\n\n  two cats \n")
    assert prompts.read(file) == [{"prompt": "a dog"}, {"prompt": "two cats"}]


def test_a_jsonl_file_keeps_what_else_it_says(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a dog", "tag": "single_object"}\n\n{"prompt": "café"}\n')
    found = [{"prompt": "a dog", "tag": "single_object"}, {"prompt": "café"}]
    assert prompts.read(file) == found


def test_files_are_read_as_the_world_writes_them(tmp_path):
    """A byte-order mark, CRLF, CR, U+2028 inside a line: no prompt gains or loses a character."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"a dog\ra cat\r")
    assert prompts.read(file) == [{"prompt": "a dog"}, {"prompt": "a cat"}]
    file.write_bytes("\ufeffa dog\r\n\r\na\u2028cat\r\n".encode())
    assert prompts.read(file) == [{"prompt": "a dog"}, {"prompt": "a\u2028cat"}]
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"prompt": "a\u2028dog"}\r\n'.encode())
    assert prompts.read(file) == [{"prompt": "a\u2028dog"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a dog", "must be a .txt or .jsonl file"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .byte 3."),
        ("a.jsonl", b'{"prompt": "a"}\n{"pro', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": 3}', 'line 1 has no "prompt" that is a string'),
        ("a.jsonl", b'["a"]', 'line 1 has no "prompt"'),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": " "}', "line 2 has an empty prompt"),
        ("a.txt", b"a\n\0\0\0", "line 2 has an empty prompt"),
        ("a.txt", "\u200b".encode(), "line 1 has an empty prompt"),
        ("a.txt", b"a\n" + b"x" * 10_001, "line 2 has 10001 characters; give at most 10000"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1 is not JSON .*surrogates not allowed"),
    ],
)
def test_a_bad_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.txt .No such file"):
        prompts.read(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot read .*null"):
        prompts.read(Path("a\0b.txt"))
    with pytest.raises(ValueError, match="cannot read .*File name too long"):
        prompts.read(Path("a" * 5000 + ".txt"))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    for name in "abc":
        with pytest.raises(ValueError, match=f"cannot read .*{name}.txt .it is no file.$"):
            prompts.read(tmp_path / f"{name}.txt")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dgpo"


def test_lists_are_pinned_by_gits_names_for_their_content(tmp_path):
    """A blob's id is what git itself says of the file."""
    (tmp_path / "a.txt").write_text("a sign that says 'hello'\n")
    said = subprocess.run(
        ["git", "hash-object", "a.txt"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert prompts.blob_id((tmp_path / "a.txt").read_bytes()) == said.stdout.strip()
    assert all(re.fullmatch("[0-9a-f]{40}", blob) for _, blob in prompts.LISTS.values())


def test_a_list_is_fetched_once_and_must_be_what_it_was(cache, monkeypatch):
    content, asked = b"a sign that says 'hello'\n", []
    served = [content]

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(served[0])

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    place = prompts.LISTS["ocr"][0]
    monkeypatch.setitem(prompts.LISTS, "ocr", (place, prompts.blob_id(content)))
    for _ in range(2):
        assert prompts.load("ocr") == [{"prompt": "a sign that says 'hello'"}]
    assert len(asked) == 1 and "/Luo-Yihong/DGPO/01ceb4b" in asked[0]
    assert asked[0].endswith("/dataset/ocr/train.txt")

    (cache / "ocr.txt").write_text("something else\n")  # is not believed, but fetched again
    assert prompts.load("ocr") == [{"prompt": "a sign that says 'hello'"}] and len(asked) == 2
    (cache / "ocr.txt").unlink()
    served[0] = b"<html>moved</html>"
    with pytest.raises(ValueError, match="has another content than it had: not git blob"):
        prompts.load("ocr")
    assert not (cache / "ocr.txt").exists()


def test_a_list_that_cannot_be_kept_is_one_line(cache, monkeypatch):
    content = b"a dog\n"
    monkeypatch.setattr(prompts.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    monkeypatch.setitem(prompts.LISTS, "ocr", ("ocr/train.txt", prompts.blob_id(content)))
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="cannot keep .*set XDG_CACHE_HOME"):
        prompts.fetch("ocr")


def test_without_a_connection_it_says_what_to_do(cache, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="cannot fetch https.*no route.*give the file instead"):
        prompts.fetch("pickscore")
    assert not cache.exists()


# The generators


@pytest.mark.parametrize(
    ("task", "text", "include"),
    [
        ("two_object", r"a photo of an? [a-z ]+ and an? [a-z ]+", 2),
        ("counting", r"a photo of (two|three|four) [a-z ]+s", 1),
        ("colors", r"a photo of an? [a-z]+ [a-z ]+", 1),
        ("position", r"a photo of an? .+ (left of|right of|above|below) an? .+", 2),
        ("color_attr", r"a photo of an? [a-z]+ [a-z ]+ and an? [a-z]+ [a-z ]+", 2),
    ],
)
def test_every_task_reads_as_geneval_has_it(task, text, include):
    rng = random.Random(0)
    for _ in range(300):
        prompt = prompts.geneval_prompt(task, rng)
        assert re.fullmatch(text, prompt["prompt"]), prompt["prompt"]
        assert prompt["tag"] == task and len(prompt["include"]) == include
        assert all(clause["class"] in geneval.CLASSES for clause in prompt["include"])
        assert ("exclude" in prompt) == (task == "counting")


def test_geneval_prompts_agree_with_what_is_judged():
    """A picture with just what the metadata says is right, an empty one is wrong."""
    places = {"left of": (0, 50), "right of": (99, 50), "above": (50, 0), "below": (50, 99)}

    def at(x, y):
        return geneval.Found((x, y, x + 5, y + 5), 1.0)

    for prompt in prompts.geneval_prompts(2000):
        objects, color = {}, {}
        for clause in prompt["include"]:
            relation = clause.get("position", [None])[0]
            place = places.get(relation, (50, 50))
            objects[clause["class"]] = [at(*place)] * clause["count"]
            color[clause["class"]] = clause.get("color", "white")
        name = lambda class_, found, color=color: [color[class_]] * len(found)  # noqa: E731
        assert geneval.judge(prompt, objects, name) == {"graded": 1, "strict": 1, "official": 1}
        assert geneval.judge(prompt, {}, name)["official"] == 0


def test_the_mix_is_the_published_one():
    tags = collections.Counter(prompt["tag"] for prompt in prompts.geneval_prompts(17_000))
    expected = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert tags.keys() == expected.keys()
    assert all(abs(tags[task] - 1000 * n) < 200 for task, n in expected.items())


def asks(*things, position=None):
    """ "include" of GenEval's metadata, of (class, count) or (class, color)."""
    found = [
        {"class": name, "count": x}
        if isinstance(x, int)
        else {"class": name, "count": 1, "color": x}
        for name, x in things
    ]
    if position:
        found[-1]["position"] = [position, 0]
    return found


OF_THE_BENCHMARK = {  # its own lines: the prompt, and what its metadata includes
    "a photo of a scissors": asks(("scissors", 1)),
    "a photo of a bowl and a skis": asks(("bowl", 1), ("skis", 1)),
    "a photo of three persons": asks(("person", 3)),
    "a photo of four benchs": asks(("bench", 4)),
    "a photo of two sheeps": asks(("sheep", 2)),
    "a photo of four knifes": asks(("knife", 4)),
    "a photo of two toothbrushs": asks(("toothbrush", 2)),
    "a photo of two wine glasses": asks(("wine glass", 2)),
    "a photo of four buses": asks(("bus", 4)),
    "a photo of an orange scissors": asks(("scissors", "orange")),
    "a photo of a skis right of a zebra": asks(("zebra", 1), ("skis", 1), position="right of"),
    "a photo of a cow below an airplane": asks(("airplane", 1), ("cow", 1), position="below"),
    "a photo of a red skis and a brown tie": asks(("skis", "red"), ("tie", "brown")),
}


@pytest.mark.parametrize("text", OF_THE_BENCHMARK)
def test_articles_and_plurals_are_the_benchmarks(text):
    assert prompts.wordings(OF_THE_BENCHMARK[text])[0] == text
    assert prompts.in_benchmark(text)


def test_the_other_way_round_is_the_same_scene():
    two = prompts.wordings(OF_THE_BENCHMARK["a photo of a bowl and a skis"])
    assert two[1] == "a photo of a skis and a bowl"
    below = prompts.wordings(OF_THE_BENCHMARK["a photo of a cow below an airplane"])
    assert below[1] == "a photo of an airplane above a cow"


def test_the_benchmark_is_known_without_it():
    """Of all prompts that its rules can make, those held back are as many as each task has there.

    A few more, as two bytes of a hash can be another prompt's.
    """
    classes, colors = geneval.CLASSES, geneval.COLORS
    single = [asks((name, 1)) for name in classes]
    counting = [asks((name, n)) for name in classes for n in (2, 3, 4)]
    of_a_color = [asks((name, color)) for name in classes for color in colors]
    pairs = [asks((a, 1), (b, 1)) for a in classes for b in classes if a != b]
    for spaces, published in ((single, 80), (counting, 80), (of_a_color, 94), (pairs, 99)):
        texts = {prompts.wordings(include)[0] for include in spaces}
        held = sum(map(prompts.in_benchmark, texts))
        others = (len(texts) - published) / 119
        assert published <= held <= published + others + 4 * others**0.5
    assert len(prompts.BENCHMARK) == 550  # 553 prompts, six of which share their two bytes


def test_no_prompt_is_the_benchmarks_either_way_round():
    for seed in range(2):
        for prompt in prompts.geneval_prompts(20_000, seed):
            texts = prompts.wordings(prompt["include"])
            assert prompt["prompt"] == texts[0] and not any(map(prompts.in_benchmark, texts))


@pytest.mark.skipif(
    not (Path.home() / ".cache/dgpo/geneval_test.jsonl").exists(),
    reason="python evaluate.py --reward geneval has not fetched the benchmark",
)
def test_no_prompt_is_in_the_benchmarks_own_file():
    benchmark = {prompt["prompt"] for prompt in prompts.load("geneval_test")}
    assert len(benchmark) == 553 and all(map(prompts.in_benchmark, benchmark))
    assert not benchmark & {prompt["prompt"] for prompt in prompts.geneval_prompts(50_000)}


def test_there_are_80_classes():
    assert len(set(geneval.CLASSES)) == 80


def test_text_prompts_quote_a_phrase_and_the_splits_share_none():
    train, test = prompts.text_prompts(2000), prompts.text_prompts(1000, "test")
    phrases = [{ocr.target_text(prompt) for prompt in split} for split in (train, test)]
    assert len(set(train)) == 2000 and len(set(test)) == 1000
    assert not phrases[0] & phrases[1] and min(map(len, phrases)) > 400
    assert prompts.text_prompts(50, seed=1) == prompts.text_prompts(50, seed=1) != train[:50]
    with pytest.raises(ValueError, match="different prompts, asked for"):
        prompts.text_prompts(10**7)


def command(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prompts.py", *line.split()])
    prompts.run("prompts.py", prompts.main)


@pytest.mark.parametrize(("kind", "suffix"), [("geneval", "jsonl"), ("text", "txt")])
def test_the_command_writes_what_the_trainer_reads(kind, suffix, tmp_path, monkeypatch):
    out = tmp_path / "a" / "folder" / f"prompts.{suffix}"
    command(f"{kind} --n 30 --out {out}", monkeypatch)
    assert len(prompts.read(out)) == 30
    assert list(out.parent.iterdir()) == [out]


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    def write_bytes(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(SystemExit) as stop:
        command(f"text --n 3 --out {tmp_path}/a.txt", monkeypatch)
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_has_made_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.txt"
    make = lambda *_: out.write_text("another's") and ["mine"]  # noqa: E731
    monkeypatch.setattr(prompts, "text_prompts", make)
    with pytest.raises(SystemExit) as stop:
        command(f"text --n 1 --out {out}", monkeypatch)
    assert stop.value.code == 2 and "is there already" in capsys.readouterr().err
    assert out.read_text() == "another's" and list(tmp_path.iterdir()) == [out]


BAD = {
    "geneval --n 3 --out a.txt": "argument --out: must end in .jsonl, got 'a.txt'",
    "text --n 3": "argument --out: is needed: a file that ends in .txt",
    "text --n 0 --out a.txt": "argument --n: must be at least 1 and at most 1000000, got 0",
    "text --n 9999999 --out a.txt": "argument --n: must be at least 1 and at most 1000000, got 99",
    "text --n 999999 --out {}/a.txt": "different prompts, asked for 999999",
    "text --seed -1 --out a.txt": "argument --seed: must be at least 0 and at most 92233720",
    "geneval --split test --out a.jsonl": "argument --split: is of text alone, got test for gene",
    "poems --n 3 --out a.txt": "invalid choice: 'poems'",
    "text --n 3 --out /dev/null/a.txt": "argument --out: cannot write to '/dev/null' (",
    "text --n 3 --out {}/.txt": "argument --out: must end in .txt, got '",
    "text --n 3 --out {}/kept.txt": "kept.txt is there already; give another name or delete it",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags_end_with_one_line(line, capsys, monkeypatch, tmp_path):
    (tmp_path / "kept.txt").write_text("mine\n")
    with pytest.raises(SystemExit) as stop:
        command(line.format(tmp_path), monkeypatch)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[line] in printed and printed.count("\n") == 1
    assert (tmp_path / "kept.txt").read_text() == "mine\n"


def test_it_answers_before_anything_heavy_is_imported():
    code = "import sys, prompts; list(prompts.text_prompts(5)); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "False\n", said.stderr
