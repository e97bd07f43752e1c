"""Prompt files, and the lists that are fetched once."""

import collections
import io
import random
import sys

import pytest

import prompts
from rewards import geneval, ocr


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a dog\n\n  two cats \n")
    assert prompts.read(file) == [{"prompt": "a dog"}, {"prompt": "two cats"}]


def test_a_jsonl_file_keeps_what_else_it_says(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a dog", "tag": "single_object"}\n\n{"prompt": "café"}\n')
    found = [{"prompt": "a dog", "tag": "single_object"}, {"prompt": "café"}]
    assert prompts.read(file) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a dog", "must be a .txt or .jsonl file"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "is not UTF-8 .byte 3."),
        ("a.jsonl", b'{"prompt": "a"}\n{"pro', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": 3}', 'line 1 has no "prompt" that is a string'),
        ("a.jsonl", b'["a"]', 'line 1 has no "prompt"'),
    ],
)
def test_a_bad_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.txt .No such file"):
        prompts.read(tmp_path / "none.txt")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dgpo"


def test_a_list_is_fetched_once_and_checked(cache, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b"a sign that says 'hello'\n")

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    for _ in range(2):
        assert prompts.load("ocr") == [{"prompt": "a sign that says 'hello'"}]
    assert len(asked) == 1 and asked[0].endswith("/dataset/ocr/train.txt")
    (cache / "ocr.txt").write_text("something else\n")
    with pytest.raises(ValueError, match="has changed since it was fetched; delete it"):
        prompts.load("ocr")


def test_drawbench_is_its_authors_sheet(cache, monkeypatch):
    sheets = [
        b'"Prompts","Category"\n'
        b'"A red car, and a ""white"" sheep.","Colors"\n"Two dogs.","Counting"\n',
        b"<html>moved</html>",
    ]
    monkeypatch.setattr(
        prompts.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(sheets[0])
    )
    expected = [
        {"prompt": 'A red car, and a "white" sheep.', "tag": "Colors"},
        {"prompt": "Two dogs.", "tag": "Counting"},
    ]
    assert prompts.load("drawbench") == expected
    (cache / "drawbench.jsonl").unlink()
    sheets.reverse()
    with pytest.raises(ValueError, match="no sheet with the columns Prompts and Category"):
        prompts.load("drawbench")
    assert not (cache / "drawbench.jsonl").exists()


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
        ("single_object", r"a photo of (an? )?[a-z ]+", 1),
        ("two_object", r"a photo of (an? )?[a-z ]+ and (an? )?[a-z ]+", 2),
        ("counting", r"a photo of (two|three|four) [a-z ]+", 1),
        ("colors", r"a photo of (an? )?[a-z]+ [a-z ]+", 1),
        ("position", r"a photo of .+ (left of|right of|above|below) .+", 2),
        ("color_attr", r"a photo of (an? )?[a-z]+ [a-z ]+ and (an? )?[a-z]+ [a-z ]+", 2),
    ],
)
def test_every_task_reads_as_geneval_has_it(task, text, include):
    rng = random.Random(0)
    for _ in range(300):
        prompt = prompts.geneval_prompt(task, rng)
        assert prompts.re.fullmatch(text, prompt["prompt"]), prompt["prompt"]
        assert prompt["tag"] == task and len(prompt["include"]) == include
        assert all(clause["class"] in prompts.CLASSES for clause in prompt["include"])
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("apple", "an apple"),
        ("orange car", "an orange car"),
        ("bus", "a bus"),
        ("umbrella", "an umbrella"),
        ("scissors", "scissors"),
        ("red skis", "red skis"),
    ],
)
def test_articles(words, expected):
    assert prompts.article(words) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bus", "buses"),
        ("bench", "benches"),
        ("toothbrush", "toothbrushes"),
        ("knife", "knives"),
        ("person", "people"),
        ("sheep", "sheep"),
        ("wine glass", "wine glasses"),
        ("couch", "couches"),
        ("computer mouse", "computer mice"),
        ("giraffe", "giraffes"),
        ("sandwich", "sandwiches"),
    ],
)
def test_plurals(name, expected):
    assert prompts.plural(name) == expected


def test_there_are_80_classes():
    assert len(set(prompts.CLASSES)) == 80


def test_text_prompts_quote_a_phrase_and_the_splits_share_none():
    train, test = prompts.text_prompts(2000), prompts.text_prompts(1000, "test")
    phrases = [{ocr.target_text(prompt) for prompt in split} for split in (train, test)]
    assert len(set(train)) == 2000 and len(set(test)) == 1000
    assert not phrases[0] & phrases[1] and min(map(len, phrases)) > 400
    assert prompts.text_prompts(50, seed=1) == prompts.text_prompts(50, seed=1) != train[:50]
    with pytest.raises(ValueError, match="different prompts, asked for"):
        prompts.text_prompts(10**7)


@pytest.mark.parametrize(("kind", "suffix"), [("geneval", "jsonl"), ("text", "txt")])
def test_the_command_writes_what_the_trainer_reads(kind, suffix, tmp_path, monkeypatch):
    out = tmp_path / f"prompts.{suffix}"
    monkeypatch.setattr(sys, "argv", ["prompts.py", kind, "--n", "30", "--out", str(out)])
    prompts.main()
    assert len(prompts.read(out)) == 30


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("geneval --n 3 --out a.txt", "argument --out: must end in .jsonl for geneval, got a.txt"),
        ("text --n 0 --out a.txt", "argument --n: must be at least 1, got 0"),
        ("text --n 9999999 --out a.txt", "different prompts, asked for 9999999"),
        ("poems --n 3 --out a.txt", "invalid choice: 'poems'"),
        ("text --n 3 --out /nowhere/a.txt", "argument --out: cannot write to /nowhere/a.txt"),
    ],
)
def test_bad_flags_end_with_one_line(line, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prompts.py", *line.split()])
    with pytest.raises(SystemExit) as stop:
        prompts.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and printed.count("\n") == 1
