"""Rewards behind HTTP, against a real server that stalls, fails and answers nonsense."""

import base64
import io
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import rewards
from rewards import http, unifiedreward

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [{"prompt": text, "tag": "x"} for text in ("a dog", "a cat", "a bird")]


@pytest.fixture
def server(monkeypatch):
    """A scorer; `answer` says what it does next: a list of (code, text) or callables."""
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
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # the client has gone

        def log_message(self, *args):
            pass

    asked, answers, lock = [], [], threading.Lock()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.asked, listening.answers = asked, answers
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
        ((200, '{"scores": ["a", "b", "c"]}'), "reward http failed", 1),
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
        with pytest.raises(RuntimeError, match="gave no answer"):
            rewards.load("http", "cpu", url)(IMAGES, PROMPTS)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["http", "unifiedreward"])
def test_the_address_is_asked_for(name):
    with pytest.raises(ValueError, match=f"--reward_model {name}=http://host:port"):
        rewards.load(name, "cpu")


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
        ("final score: 5/5", 5),
    ],
)
def test_scores_that_are_read(answer, score):
    assert unifiedreward.read_score(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "4",
        "Final Score: high",
        "Final Score: 9",
        "Final Score: 0",
        "Final Score: 4 Final Score: 2",
    ],
)
def test_scores_that_are_refused(answer, server):
    with pytest.raises(ValueError, match="no single score from 1 to 5"):
        unifiedreward.read_score(answer)
    server.answers.append(completion(answer))
    reward = rewards.load("unifiedreward", "cpu", server.url)
    with pytest.raises(rewards.RewardError, match="no single score from 1 to 5"):
        rewards.score("unifiedreward", reward, IMAGES, PROMPTS)


def test_an_endpoint_that_is_none(server):
    server.answers.append((200, '{"error": "no such model"}'))
    with pytest.raises(RuntimeError, match="answered no chat completion"):
        rewards.load("unifiedreward", "cpu", server.url)(IMAGES, PROMPTS)


def test_the_scorer_in_the_readme_works():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import base64.*?)```", readme, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = code.replace('("", 8000)', f'("127.0.0.1", {port})')
    scope = {"my_scores": lambda images, texts: [len(text) for text in texts]}
    threading.Thread(target=exec, args=(code, scope), daemon=True).start()
    reward = rewards.load("http", "cpu", f"http://127.0.0.1:{port}/")
    assert reward(IMAGES, PROMPTS) == [5, 5, 6]
