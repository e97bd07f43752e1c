"""DeQA's model: each part against another implementation of the same mathematics."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlamaTokenizer,
)

import rewards
from rewards import deqa

CONFIG = {
    "vocab_size": 350,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "visual_config": {
        "visual_model": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 4,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_learnable_queries": 5,
            "layer_norm_eps": 1e-6,
        },
    },
}
START, STOP = 4, 10  # five queries and the end of the picture


@pytest.fixture(scope="module")
def network():
    network = deqa.build(CONFIG, START)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(x.shape, generator=generator) / x.shape[-1] ** 0.5 + ("norm" in name)
        for name, x in network.state_dict().items()
    }
    network.load_state_dict(state, assign=True)
    return network


def test_the_vision_tower_is_clips_but_for_the_order_of_its_weights(network):
    tower, config = network.model.vision_model, CONFIG["visual_config"]["visual_model"]
    clip = CLIPVisionModel(CLIPVisionConfig(**config, hidden_act="quick_gelu")).eval()
    state = tower.state_dict()
    theirs = {
        "embeddings.class_embedding": state["embeddings.cls_token"][0, 0],
        "embeddings.patch_embedding.weight": state["embeddings.patch_embed.weight"],
        "embeddings.position_embedding.weight": state["embeddings.position_embedding"][0],
    }
    for kind in ("weight", "bias"):
        theirs[f"pre_layrnorm.{kind}"] = state[f"embeddings.pre_layernorm.{kind}"]
        theirs[f"post_layernorm.{kind}"] = state[f"post_layernorm.{kind}"]
        for i in range(2):
            layer = f"encoder.layers.{i}."
            qkv = state[f"{layer}self_attn.query_key_value.{kind}"].unflatten(0, (3, 3, 8))
            for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
                theirs[f"{layer}self_attn.{name}.{kind}"] = qkv[:, j].flatten(0, 1)
            for old, new in (
                ("self_attn.dense", "self_attn.out_proj"),
                ("input_layernorm", "layer_norm1"),
                ("post_attention_layernorm", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                theirs[f"{layer}{new}.{kind}"] = state[f"{layer}{old}.{kind}"]
    own = clip.state_dict()
    prefix = next(iter(own)).split("embeddings")[0]
    assert {prefix + name for name in theirs} <= own.keys()
    clip.load_state_dict({prefix + name: x for name, x in theirs.items()}, strict=False)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tower.post_layernorm(clip(pixels).last_hidden_state)
        assert torch.allclose(tower(pixels), expected, atol=1e-5)


def test_the_abstractor_by_hand(network):
    state = network.model.visual_abstractor.state_dict()
    seen = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(2))

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    x = state["query_embeds"][0]
    for i in range(2):
        cross = f"encoder.layers.{i}.crossattention."
        x = norm(f"{cross}norm1", x)
        both = torch.cat([x, norm(f"{cross}normk", seen[0])])
        places = [state[f"{cross}attention.{name}_pos_embed"] for name in "qk"]
        q = linear(f"{cross}attention.query", x + places[0])
        k = linear(f"{cross}attention.key", both + torch.cat(places))
        v = linear(f"{cross}attention.value", both)
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            heads.append((q[:, part] @ k[:, part].T / 8**0.5).softmax(1) @ v[:, part])
        x = x + linear(f"{cross}output.out_proj", torch.cat(heads, 1))
        y = norm(f"{cross}output.norm2", x)
        mlp = f"{cross}output.mlp."
        y = F.silu(linear(f"{mlp}w1", y)) * linear(f"{mlp}w3", y)
        x = x + linear(f"{mlp}w2", norm(f"{mlp}ffn_ln", y, 1e-6))
    expected = torch.cat([linear("visual_fc", x), state["vit_eos"][0]])
    with torch.no_grad():
        found = network.model.visual_abstractor(seen)[0]
    assert found.shape == (STOP - START, 32)
    assert torch.allclose(found, expected, atol=1e-5)


def test_with_equal_twins_it_is_llama_and_otherwise_not(network):
    llama = LlamaForCausalLM(network.config).eval()
    embeds = torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(3))
    state = network.state_dict()

    def logits(twins_equal):
        changed = {
            name: state[name.replace("multiway.1", "multiway.0")] if twins_equal else x
            for name, x in state.items()
        }
        other = deqa.build(CONFIG, START)
        other.load_state_dict(changed, assign=True)
        with torch.no_grad():
            return other(inputs_embeds=embeds).logits

    own = {name.replace(".multiway.0", ""): x for name, x in state.items()}
    llama.load_state_dict({name: own[name] for name in llama.state_dict()})
    with torch.no_grad():
        expected = llama(inputs_embeds=embeds).logits
    assert torch.allclose(logits(True), expected, atol=1e-5)
    different = (logits(False) - expected).abs().amax(2)[0] > 1e-3
    assert not different[:START].any() and different[START:].all()


def test_multiway_takes_the_pictures_twin_for_the_pictures_tokens():
    two = deqa.Multiway(torch.nn.Identity(), torch.nn.Flatten(2), (1, 3))
    two.multiway[1].forward = lambda x: -x
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    assert two(x).flatten().tolist() == [1, -2, -3, 4, 5]


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    """A folder laid out as the published one: SentencePiece's file alone, and code of its own."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
    folder = tmp_path_factory.mktemp("deqa")
    texts = [deqa.BEFORE.strip(), deqa.AFTER.strip(), *deqa.LEVELS * 9]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    others = {"model_type": "mplug_owl2", "auto_map": classes}
    (folder / "own.py").write_text("raise SystemExit('its own code was run')")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **others}))
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    tokenizer |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    size = {"size": 16, "crop_size": 16, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    state = network.state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    return folder


def test_the_score_is_the_expected_level(network, published, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    reward = rewards.load("deqa", "cpu", str(published))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    scores = reward(images, [{"prompt": "what it shows plays no part"}] * 2)
    assert scores.shape == (2,) and ((scores > 1) & (scores < 5)).all() and scores[0] != scores[1]

    tokenizer = LlamaTokenizer.from_pretrained(published)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    inputs = processor(list(pixels), return_tensors="pt")["pixel_values"]
    before, after = (tokenizer(text)["input_ids"] for text in (deqa.BEFORE, deqa.AFTER))
    start, ids = len(before), [*before, *after[1:]]
    assert before[0] == after[0] == tokenizer.bos_token_id and len(ids) > 20
    levels = [tokenizer(level)["input_ids"][1] for level in deqa.LEVELS]
    assert tokenizer.convert_ids_to_tokens(levels) == [f"\u2581{level}" for level in deqa.LEVELS]
    whole = deqa.build(CONFIG, start)
    whole.load_state_dict(network.state_dict(), assign=True)
    with torch.no_grad():
        words = whole.model.embed_tokens(torch.tensor(ids))
        picture = whole.model.visual_abstractor(whole.model.vision_model(inputs))[0]
        embeds = torch.cat([words[:start], picture, words[start:]])[None]
        logits = whole(inputs_embeds=embeds).logits[0, -1]
    chances = logits[levels].softmax(0)
    expected = sum((i + 1) * chance for i, chance in enumerate(chances.tolist()))
    assert scores[0].item() == pytest.approx(expected, abs=1e-4)

    wide = torch.cat([images[:, :, :8], images[:, :, 8:]], 3)  # 8 x 32: padded, not cut
    padded = (torch.tensor([122, 116, 104]) / 255)[:, None, None].repeat(2, 1, 32, 32)
    padded[:, :, 12:20] = wide
    assert torch.allclose(reward(wide, [{}] * 2), reward(padded, [{}] * 2), atol=1e-6)


def test_a_square_is_filled_around_the_picture():
    picture = np.arange(12, dtype=np.uint8).reshape(1, 1, 4, 3)
    wide, tall = deqa.squares(picture, [7, 8, 9]), deqa.squares(picture.swapaxes(1, 2), [7, 8, 9])
    assert wide.shape == tall.shape == (1, 4, 4, 3) and wide.dtype == np.uint8
    assert (wide[:, 1] == picture[:, 0]).all() and (tall[:, :, 1] == picture[:, 0]).all()
    assert (wide[:, [0, 2, 3]] == [7, 8, 9]).all() and (tall[:, :, [0, 2, 3]] == [7, 8, 9]).all()
    assert (deqa.squares(picture[:, :, :1], [0, 0, 0]) == picture[:, :, :1]).all()


def test_what_is_missing_is_named_before_weights_are_read(published, tmp_path, monkeypatch):
    monkeypatch.setattr(deqa, "read_tensors", lambda folder: pytest.fail("weights were read"))
    for missing in ("config.json", "preprocessor_config.json", "tokenizer.model"):
        shutil.copytree(published, tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(rewards.RewardError, match=f"deqa: .* has no {missing}$"):
            rewards.load("deqa", "cpu", str(tmp_path / missing))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched")
    )
    with pytest.raises(rewards.RewardError, match="deqa: it needs `pip install sentencepiece`$"):
        rewards.load("deqa", "cpu")


def test_a_folder_without_weights_is_named(published, tmp_path):
    shutil.copytree(published, tmp_path / "none", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(rewards.RewardError, match=r"none has no weights: no \*.safetensors, no "):
        rewards.load("deqa", "cpu", str(tmp_path / "none"))
