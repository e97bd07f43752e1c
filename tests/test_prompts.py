"""Prompt files, the published lists, and the generators of new prompts."""

import collections
import io
import json
import re
import subprocess
from types import SimpleNamespace

import pytest

from rewards import geneval, ocr
from sd35 import prompts
from sd35.settings import UserError


def test_a_text_file_has_a_prompt_per_line(tmp_path):
    """Byte-order marks and line ends are not part of a prompt. U+2028 is no line end."""
    (tmp_path / "a.txt").write_bytes("\ufeffa dog\r\n \r\n  a\u2028cat \r\n".encode())
    assert prompts.load(f"{tmp_path}/a.txt") == [{"prompt": "a dog"}, {"prompt": "a\u2028cat"}]


def test_a_jsonl_file_gives_whole_lines(tmp_path):
    text = '\ufeff{"prompt": "a\u2028dog", "tag": "single_object"}\r\n\r\n{"prompt": "café"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    lines = prompts.load(f"{tmp_path}/a.jsonl")
    assert lines == [{"prompt": "a\u2028dog", "tag": "single_object"}, {"prompt": "café"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"prompt\na dog",
            r"must be a .txt or .jsonl file, or one of .*drawbench; pandas",
        ),
        ("a.txt", b"\n \n", "a.txt has no prompts"),
        ("a.txt", b"caf\xe9", "cannot read .*a.txt .'utf-8' codec .* position 3"),
        ("a.jsonl", b'{"prompt": "a"}\n{"pro', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "b"}', 'a.jsonl, line 1 has no text under "prompt"'),
        ("none.txt", None, "cannot read .*No such file.*none.txt"),
    ],
)
def test_a_bad_file_is_named_with_its_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts.load(f"{tmp_path}/{name}")


def test_each_epoch_visits_every_prompt_once_in_a_new_order():
    lines = [{"prompt": str(i)} for i in range(6)]
    settings = SimpleNamespace(prompts_per_step=4, seed=5)
    chosen = [x["prompt"] for i in range(6) for x in prompts.prompts_of_step(lines, settings, i)]
    epochs = [chosen[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list("012345") for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 4
    settings.seed = 6
    assert [x["prompt"] for x in prompts.prompts_of_step(lines, settings, 0)] != chosen[:4]


# The published lists


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dgpo"


def publish(name, content, monkeypatch, served=None):
    """Let a list have this content, and the network serve it, or `served`. Returns the requests."""
    requests = []

    def urlopen(url, timeout):
        requests.append(url)
        return io.BytesIO(content if served is None else served)

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    place = prompts.LISTS[name][0]
    monkeypatch.setitem(prompts.LISTS, name, (place, prompts.blob_id(content)))
    return requests


def test_lists_are_pinned_by_the_ids_that_git_gives_their_content(tmp_path):
    (tmp_path / "a.txt").write_text("a sign that says 'hello'\n")
    command = ["git", "hash-object", "a.txt"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert prompts.blob_id((tmp_path / "a.txt").read_bytes()) == printed.stdout.strip()
    assert all(re.fullmatch("[0-9a-f]{40}", blob) for _, blob in prompts.LISTS.values())


def test_a_list_is_fetched_once_and_again_if_the_cache_has_other_content(cache, monkeypatch):
    requests = publish("ocr", b"a sign that says 'hello'\n", monkeypatch)
    for _ in range(2):
        assert prompts.load("ocr") == [{"prompt": "a sign that says 'hello'"}]
    assert requests == [f"{prompts.SOURCE}/ocr/train.txt"] and prompts.COMMIT in requests[0]
    (cache / "ocr.txt").write_text("something else\n")
    assert prompts.load("ocr") == [{"prompt": "a sign that says 'hello'"}]
    assert len(requests) == 2 and [path.name for path in cache.iterdir()] == ["ocr.txt"]


def test_a_list_whose_content_has_changed_is_refused(cache, monkeypatch):
    publish("ocr", b"a sign that says 'hello'\n", monkeypatch, served=b"<html>moved</html>")
    with pytest.raises(UserError, match="/ocr/train.txt has changed: it is not git blob"):
        prompts.load("ocr")
    assert not cache.exists()


def test_without_a_connection_it_says_where_to_put_the_file(cache, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=f"no route.*save it as {cache}/pickscore.txt"):
        prompts.load("pickscore")


# The generators


@pytest.fixture
def benchmark(monkeypatch):
    """A stand-in for the benchmark's list, to which a test adds prompts."""
    lines = []
    monkeypatch.setattr(prompts, "load", lambda name: {"geneval_test": lines}[name])
    return lines


WORDINGS = {  # prompts of the benchmark, articles and plurals included, and in the other order
    "a bowl and a skis": ("a skis and a bowl", [{"class": "bowl"}, {"class": "skis"}]),
    "three persons": ("three persons", [{"class": "person", "count": 3}]),
    "two wine glasses": ("two wine glasses", [{"class": "wine glass", "count": 2}]),
    "an orange tv": ("an orange tv", [{"class": "tv", "color": "orange"}]),
    "a cow below an airplane": (
        "an airplane above a cow",
        [{"class": "airplane"}, {"class": "cow", "position": ["below", 0]}],
    ),
}


@pytest.mark.parametrize("text", WORDINGS)
def test_wordings_are_the_benchmarks(text):
    reverse, include = WORDINGS[text]
    include = [{"count": 1, **clause} for clause in include]
    assert prompts.wordings(include) == (f"a photo of {text}", f"a photo of {reverse}")


def test_geneval_prompts_agree_with_what_the_reward_judges(benchmark):
    places = {"left of": (0, 50), "right of": (99, 50), "above": (50, 0), "below": (50, 99)}
    for prompt in map(geneval.read_metadata, prompts.geneval_prompts(1000)):
        objects, color = {}, {}
        for clause in prompt["include"]:
            x, y = places.get(clause.get("position", [None])[0], (50, 50))
            box = geneval.Detection((x, y, x + 5, y + 5), 1.0)
            objects[clause["class"]] = [box] * clause["count"]
            color[clause["class"]] = clause.get("color", "white")

        def name(class_, boxes, color=color):
            return [color[class_]] * len(boxes)

        assert geneval.judge(prompt, objects, name) == (1, 1)
        assert geneval.judge(prompt, {}, name)[1] == 0
        twice = {class_: boxes * 2 for class_, boxes in objects.items()}
        assert geneval.judge(prompt, twice, name)[1] == (prompt["tag"] != "counting")
        assert ("position" in prompt["include"][-1]) == (prompt["tag"] == "position")


def test_the_mix_is_the_published_one(benchmark):
    tags = collections.Counter(prompt["tag"] for prompt in prompts.geneval_prompts(8500))
    expected = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert tags.keys() == expected.keys()
    assert all(abs(tags[task] - 500 * n) < 150 for task, n in expected.items())


def test_no_prompt_is_the_benchmarks_in_either_order(benchmark):
    texts = {text for x in prompts.geneval_prompts(2000) for text in prompts.wordings(x["include"])}
    benchmark += [{"prompt": text} for text in sorted(texts)[::2]]
    held_out = {prompt["prompt"] for prompt in benchmark}
    for prompt in prompts.geneval_prompts(2000):
        text, reverse = prompts.wordings(prompt["include"])
        assert prompt["prompt"] == text and not {text, reverse} & held_out


def test_text_prompts_quote_a_phrase_and_the_splits_share_none():
    train, test = prompts.text_prompts(2000), prompts.text_prompts(1000, "test")
    phrases = [{" ".join(ocr.quoted_texts(prompt)) for prompt in split} for split in (train, test)]
    assert len(set(train)) == 2000 and len(set(test)) == 1000
    assert not phrases[0] & phrases[1] and min(map(len, phrases)) > 400
    assert prompts.text_prompts(50, seed=1) == prompts.text_prompts(50, seed=1) != train[:50]
    with pytest.raises(UserError, match="there are only .* different prompts, got --n 10000000"):
        prompts.text_prompts(10**7)


@pytest.mark.parametrize(("kind", "suffix"), [("geneval", "jsonl"), ("text", "txt")])
def test_the_command_writes_a_new_file(kind, suffix, benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / "folder" / f"prompts.{suffix}"
    monkeypatch.setattr("sys.argv", ["prompts", kind, "--n", "30", "--out", str(out)])
    prompts.main()
    lines = out.read_text().splitlines()
    assert len(lines) == 30 and list(out.parent.iterdir()) == [out]
    assert kind == "text" or all(json.loads(line)["include"] for line in lines)
    with pytest.raises(SystemExit, match="2"):  # it overwrites nothing
        prompts.main()
    assert f"--out must be a new .{suffix} file, got {out}" in capsys.readouterr().err
    assert out.read_text().splitlines() == lines
