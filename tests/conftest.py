import copy
import json
import signal

import pytest
import tiny_run
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from rewards import geneval
from tiny_sd35 import pipeline, shapes
from toy import flow2d


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def keep_signals():
    """A run sets these handlers; they are put back after each test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def reference():
    """The toy's pretrained network. Not to be trained in place."""
    torch.manual_seed(0)
    model = flow2d.VelocityNet()
    for _ in flow2d.pretrain(model, 1500, torch.Generator().manual_seed(0)):
        pass
    return model.requires_grad_(False)


@pytest.fixture
def model(reference):
    """A copy of the pretrained network, free to be trained."""
    return copy.deepcopy(reference).requires_grad_(True)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a random CLIP and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    texts = [prompt["prompt"] for prompt in shapes.prompt_list()]
    texts += [f"a photo of a {color}-colored object" for color in geneval.COLORS] * 9
    tokenizer = pipeline.clip_tokenizer(texts, shapes.TOKENS)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small["num_attention_heads"] = 2
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**small, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    clip.text_model.embeddings.token_embedding.weight.data.normal_()
    clip.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with an untrained pipeline of SD3.5's classes, and its prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shapes.build(width=32, layers=2).save_pretrained(folder)
    lines = [json.dumps(prompt) + "\n" for prompt in shapes.prompt_list()[:20]]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def plain(tiny, tmp_path_factory):
    """The folder of the run that others are compared with. Not to be changed."""
    out = tmp_path_factory.mktemp("plain") / "run"
    tiny_run.run(tiny, out)
    return out


@pytest.fixture
def tiny_model(tiny):
    """A sd35.model.Model with a LoRA that does something; theta_old and the average differ."""
    return tiny_run.model(tiny)
