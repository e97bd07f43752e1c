"""Rewards behind HTTP: any function, and UnifiedReward, against a real server."""

import base64
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import rewards
from rewards import http, unifiedreward

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [{"prompt": text, "tag": "x"} for text in ("a dog", "a cat", "a bird")]


@pytest.fixture
def server():
    """A server that answers with `server.answer`, a function of the JSON, or (code, text)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            listening.requests.append((self.path, content))
            answer = listening.answer(content) if callable(listening.answer) else listening.answer
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1].encode())

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.requests, listening.url = [], f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def score(name, model):
    return rewards.score(name, rewards.load(name, "cpu", model), IMAGES, PROMPTS)[0]


def test_pictures_prompts_and_metadata_go_out_and_scores_come_back(server):
    def brightness(content):
        pictures = [Image.open(io.BytesIO(base64.b64decode(png))) for png in content["images"]]
        means = [sum(picture.convert("L").tobytes()) / 256 / 255 for picture in pictures]
        return 200, json.dumps({"scores": [*means[:2], None]})

    server.answer = brightness
    scores = score("http", f"{server.url}/score")
    grey = (IMAGES * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).mean((1, 2))
    assert torch.allclose(scores[:2], grey[:2], atol=0.005) and scores[2].isnan()
    ((path, content),) = server.requests
    assert path == "/score" and content["metadata"] == PROMPTS
    assert content["prompts"] == ["a dog", "a cat", "a bird"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, '{"error": "no such\\nmodel"}'), r'answered 404 Not Found {"error": "no such'),
        ((200, "<html>"), "did not answer with JSON"),
        ((200, '{"score": 1}'), 'answered without "scores"'),
        ((200, '{"scores": [1, 2]}'), r"must return 3 numbers: got the shape \(2,\)"),
    ],
)
def test_a_wrong_answer_is_one_sentence(answer, message, server):
    server.answer = answer
    with pytest.raises(rewards.RewardError, match=message):
        score("http", server.url)


def test_a_server_that_stalls_or_is_not_there_ends_in_time(server, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.1)
    server.answer = lambda content: time.sleep(0.3) or (200, "{}")
    for url in (server.url, "http://127.0.0.1:9"):
        with pytest.raises(rewards.RewardError, match=f"{url} did not answer with JSON"):
            score("http", url)


@pytest.mark.parametrize("name", ["http", "unifiedreward"])
@pytest.mark.parametrize("model", [None, "localhost:8000"])
def test_an_address_is_required(name, model):
    message = f"it needs the address of its server: --reward_model {name}=http://host:port/"
    with pytest.raises(rewards.RewardError, match=message):
        rewards.load(name, "cpu", model)


def completion(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_unifiedreward_asks_about_each_picture_with_its_prompt(server):
    def answer(content):
        image, question = content["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        number = ["a dog", "a cat", "a bird"].index(question["text"].partition("Caption: ")[2])
        return completion(f"It is fine.\nFinal Score: {number + 1.5}")

    server.answer = answer
    assert score("unifiedreward", f"{server.url}/v1/").tolist() == [1.5, 2.5, 3.5]
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}


ANSWERS = {"Final Score: 4": 4, "**Final Score:** 2": 2, "final score: [5/5]": 5, "4": math.nan}
ANSWERS |= {"Final Score: 4, not Final Score: 2": 4, "Final Score: 9? No. Final Score: 3.5": 3.5}
ANSWERS |= dict.fromkeys(["", "Final Score: high", "Final Score: 45", "Final Score: -3"], math.nan)


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_first_valid_score_counts_and_none_is_nan(answer):
    assert unifiedreward.read_score(answer) == pytest.approx(ANSWERS[answer], nan_ok=True)


def test_the_question_is_a_template(server, tmp_path):
    file = tmp_path / "question.txt"
    file.write_bytes('\ufeffIs {prompt}, as {"caption": [{prompt}]},\r\nthere?\n'.encode())
    server.answer = completion("Final Score: 1")
    model = f"{server.url}/v1,template={file}"
    score("unifiedreward", model)
    questions = [content["messages"][0]["content"][1]["text"] for _, content in server.requests]
    assert 'Is a cat, as {"caption": [a cat]},\nthere?' in questions

    file.write_text("Caption: {}")
    with pytest.raises(rewards.RewardError, match="has no {prompt}, where the prompt goes$"):
        rewards.load("unifiedreward", "cpu", model)


def test_an_endpoint_of_another_kind_is_named(server):
    server.answer = 200, '{"error": "no such model"}'
    with pytest.raises(rewards.RewardError, match="did not answer with a chat completion"):
        score("unifiedreward", server.url)
