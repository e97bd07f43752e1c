"""Prompts are encoded as by diffusers' pipeline, on a tiny untrained one of SD3.5's classes."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from tiny_run import TEXT

from sd35.encoder import Encoder
from sd35.model import load_pipeline
from tiny_sd35 import shapes

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "without T5"])
def test_prompts_are_encoded_as_by_encode_prompt_to_the_bit(kind, tiny, tmp_path):
    texts, folder = ["", TEXT, "a blue square and unknown words, which are cut off"], tiny
    if kind == "without T5":  # as in the pipeline that diffusers loads without it
        folder, kind = shutil.copytree(tiny, tmp_path / "model"), torch.float32
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
    pipe = load_pipeline(str(folder), kind)
    settings = {"do_classifier_free_guidance": False, "max_sequence_length": shapes.TOKENS}
    expected = {text: pipe.encode_prompt(text, text, text, **settings) for text in texts}
    prompts = Encoder(pipe, shapes.TOKENS, CPU)(texts, {})
    for text, (embeds, _, pooled, _) in expected.items():
        assert embeds.dtype == kind and prompts[text].embeds.dtype == torch.float32
        assert torch.equal(prompts[text].embeds, embeds.float())
        assert torch.equal(prompts[text].pooled, pooled.float())


def test_a_known_prompt_is_not_encoded_again(tiny):
    encode = Encoder(load_pipeline(str(tiny), torch.float32), shapes.TOKENS, CPU)
    one = encode([TEXT], {})
    both = encode(["blue square", TEXT, TEXT], one)
    assert list(both) == ["", "blue square", TEXT] and both[TEXT] is one[TEXT]


def test_only_one_network_is_on_the_device_while_prompts_are_encoded(tiny, monkeypatch):
    """The device is the CPU by another name; transformer and VAE are on it at first."""
    pipe = load_pipeline(str(tiny), torch.float32)
    encoder = Encoder(pipe, shapes.TOKENS, torch.device("cpu", 0))
    pipe = encoder.pipe  # which has the text encoders
    names = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    there, at_work = {"transformer", "vae"}, []

    def watch(name, module):
        move = there.symmetric_difference_update  # each move is to the other place
        monkeypatch.setattr(module, "to", lambda device: move({name}))
        module.register_forward_pre_hook(lambda *_: at_work.append((name, not_freed())))

    def not_freed():
        return {name for name in there if getattr(pipe, name)}

    for name in names:
        watch(name, getattr(pipe, name))
    encoder([TEXT], {})
    assert at_work == [(name, {name}) for name in names[2:] for _ in range(2)]
    assert not_freed() == {"transformer", "vae"}


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_large_text_encoders_are_freed_and_read_again(quantize, tiny):
    if quantize == "int8":
        pytest.importorskip("torchao")
    pipe = load_pipeline(str(tiny), torch.bfloat16, quantize)
    networks = [weakref.ref(network) for network in (pipe.text_encoder_2, pipe.text_encoder_3)]
    encode = Encoder(pipe, shapes.TOKENS, CPU)
    first = encode([TEXT], {})[TEXT]
    gc.collect()
    assert [network() for network in networks] == [None, None]
    again = encode([TEXT], {})[TEXT]
    assert torch.equal(first.embeds, again.embeds) and torch.equal(first.pooled, again.pooled)


@pytest.mark.parametrize(("length", "most"), [(4, 3), (99, 5)])
def test_prompts_that_t5_or_clip_truncates_are_named(length, most, tiny):
    """T5 takes one token for the end, and the tiny CLIP two of its seven for both ends."""
    encoder = Encoder(load_pipeline(str(tiny), torch.float32), length, CPU)
    whole, cut = "red " * most, "red " * (most + 1)
    assert encoder.too_long([whole, cut, cut]) == [cut]
