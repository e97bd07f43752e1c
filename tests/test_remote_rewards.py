"""Rewards behind HTTP, against a real server that stalls, fails and answers nonsense."""

import base64
import io
import json
import math
import re
import socket
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import rewards
from rewards import http

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [{"prompt": text, "tag": "x"} for text in ("a dog", "a cat", "a bird")]


@pytest.fixture
def server(monkeypatch):
    """A reward's server; `answers` says what it does next: a list of (code, text) or callables."""
    monkeypatch.setattr(http, "PAUSE", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((self.path, content))
                reply = answers.pop(0) if len(answers) > 1 else answers[0]
            code, text = reply(content) if callable(reply) else reply
            try:
                self.send_response(code)
                if listening.announce:
                    self.send_header("Content-Length", str(listening.announce))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client has gone

        def log_message(self, *args):
            pass

    asked, answers, lock = [], [], threading.Lock()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.asked, listening.answers, listening.announce = asked, answers, 0
    listening.url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def brightness(content):
    pictures = [Image.open(io.BytesIO(base64.b64decode(png))) for png in content["images"]]
    means = [sum(picture.convert("L").tobytes()) / 256 / 255 for picture in pictures]
    return 200, json.dumps({"scores": means})


def test_pictures_and_prompts_arrive_and_scores_come_back(server):
    server.answers.append(brightness)
    reward = rewards.load("http", "cpu", f"{server.url}/score")
    scores = rewards.score("http", reward, IMAGES, PROMPTS)
    grey = (IMAGES * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))
    assert torch.allclose(scores, grey, atol=0.005)
    ((path, content),) = server.asked
    assert path == "/score" and content["prompts"] == PROMPTS


def test_a_server_that_fails_is_tried_again(server):
    server.answers += [(500, "oh"), (503, "no"), brightness]
    assert len(rewards.load("http", "cpu", server.url)(IMAGES, PROMPTS)) == 3
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        ((500, "oh"), "gave no answer .500", http.ATTEMPTS),
        ((404, "what"), "gave no answer .404", 1),
        ((200, "<html>"), "is not JSON", 1),
        ((200, "[1, 2]"), "answered no JSON object", 1),
        ((200, '{"score": 1}'), r"answered no \"scores\", but \['score'\]", 1),
        ((200, '{"scores": [1, 2]}'), r"must return 3 scores, got \(2,\)", 1),
        ((200, '{"scores": ["a", "b", "c"]}'), "must return 3 scores, got a list that holds no", 1),
    ],
)
def test_nonsense_is_named(reply, message, attempts, server):
    server.answers.append(reply)
    reward = rewards.load("http", "cpu", server.url)
    with pytest.raises(rewards.RewardError, match=message):
        rewards.score("http", reward, IMAGES, PROMPTS)
    assert len(server.asked) == attempts


def test_a_server_that_stalls_or_is_not_there_ends_in_time(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    server.answers.append(lambda content: time.sleep(1) or (200, "{}"))
    for url in (server.url, "http://127.0.0.1:9"):
        start = time.monotonic()
        with pytest.raises(rewards.RewardError, match="gave no answer"):
            rewards.load("http", "cpu", url)(IMAGES, PROMPTS)
        assert time.monotonic() - start < 5


def test_half_an_answer_is_tried_again(server):
    """The server closes the connection before it has sent what it announced."""
    server.answers.append(brightness)
    server.announce = 10**6
    reward = rewards.load("http", "cpu", server.url)
    with pytest.raises(rewards.RewardError, match="gave no answer .IncompleteRead"):
        reward(IMAGES, PROMPTS)
    assert len(server.asked) == http.ATTEMPTS


@pytest.mark.parametrize("name", ["http", "unifiedreward"])
@pytest.mark.parametrize("model", [None, "", "localhost:8000", "http://", "/file", "http://a:b/"])
def test_the_address_is_asked_for(name, model):
    with pytest.raises(rewards.RewardError) as caught:
        rewards.load(name, "cpu", model)
    example = f"{name}: it needs its server's address: --reward_model {name}=http://host:port/"
    assert example in str(caught.value) and str(caught.value).count("got") == bool(model)


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_unifiedreward_asks_for_each_picture_at_once(server):
    points = {"a dog": "4.5", "a cat": "2", "a bird": "3"}

    def answer(content):
        time.sleep(0.3)
        (message,) = content["messages"]
        image, question = message["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        (prompt,) = (text for text in points if question["text"].endswith(f"Caption: {text}"))
        return completion(f"It is fine.\nFinal Score: {points[prompt]}")

    server.answers.append(answer)
    reward = rewards.load("unifiedreward", "cpu", f"{server.url}/v1/")
    start = time.monotonic()
    assert reward(IMAGES, PROMPTS) == [4.5, 2, 3]
    assert time.monotonic() - start < 0.8  # and not 0.9, one after the other
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 4),
        ("... Final Score: 3.5", 3.5),
        ("**Final Score:** 2", 2),
        ("final score: [5/5]", 5),
        ("Final Score: 4, not Final Score: 2", 4),
        ("Final Score: 9? No. Final Score: 3", 3),
        ("", None),
        ("4", None),
        ("Final Score: high", None),
        ("Final Score: 9", None),
        ("Final Score: 45", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
    ],
)
def test_the_first_score_counts_and_none_is_nan(answer, score, server):
    def some(content):  # one of the three pictures is answered otherwise
        asked = content["messages"][0]["content"][1]["text"]
        return completion(answer if asked.endswith("a cat") else "Final Score: 1")

    server.answers.append(some)
    reward = rewards.load("unifiedreward", "cpu", server.url)
    found = rewards.score("unifiedreward", reward, IMAGES, PROMPTS).tolist()
    assert found == pytest.approx([1, math.nan if score is None else score, 1], nan_ok=True)


def test_the_question_is_a_template(server, tmp_path):
    file = tmp_path / "question.txt"
    file.write_bytes('\ufeffIs {prompt}, as {"caption": [{prompt}]},\r\nthere?\n'.encode())
    server.answers.append(completion("Final Score: 1"))
    model = f"{server.url}/v1,template={file}"
    braces = [{"prompt": text} for text in ("a {prompt}", "{0}", "\\1")]
    assert rewards.load("unifiedreward", "cpu", model)(IMAGES, braces) == [1, 1, 1]
    asked = [content["messages"][0]["content"][1]["text"] for _, content in server.asked]
    expected = [
        f'Is {prompt["prompt"]}, as {{"caption": [{prompt["prompt"]}]}},\nthere?'
        for prompt in braces
    ]
    assert sorted(asked) == sorted(expected)
    assert {path for path, _ in server.asked} == {"/v1/chat/completions"}

    for content, message in (
        (b"Caption: {}", "has no {prompt}, where the prompt goes$"),
        (b"\xff {prompt}", "cannot read the template .*utf-8"),
        (None, "cannot read the template .*No such file"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(rewards.RewardError, match=f"reward unifiedreward: .*{message}"):
            rewards.load("unifiedreward", "cpu", model)


def test_an_endpoint_that_is_none(server):
    server.answers.append((200, '{"error": "no such model"}'))
    with pytest.raises(rewards.RewardError, match="answered no chat completion"):
        rewards.load("unifiedreward", "cpu", server.url)(IMAGES, PROMPTS)


def test_the_server_in_the_docstring_works():
    code = textwrap.dedent(re.search(r"\n(    import base64.*)", http.__doc__, re.DOTALL)[1])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert '("", 8000)' in code
    code = code.replace('("", 8000)', f'("127.0.0.1", {port})')
    scope = {"my_reward": lambda images, texts: [len(text) for text in texts]}
    threading.Thread(target=exec, args=(code, scope), daemon=True).start()
    reward = rewards.load("http", "cpu", f"http://127.0.0.1:{port}/")
    assert reward(IMAGES, PROMPTS) == [5, 5, 6]
