"""Prompt files, and the lists that are fetched once."""

import io

import pytest

import prompts


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
        assert prompts.read(prompts.fetch("ocr")) == [{"prompt": "a sign that says 'hello'"}]
    assert len(asked) == 1 and asked[0].endswith("/dataset/ocr/train.txt")
    (cache / "ocr-train.txt").write_text("something else\n")
    with pytest.raises(ValueError, match="has changed since it was fetched; delete it"):
        prompts.fetch("ocr")


def test_without_a_connection_it_says_what_to_do(cache, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(prompts.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="cannot fetch https.*no route.*pass it as --train"):
        prompts.fetch("pickscore")
    assert not cache.exists()
