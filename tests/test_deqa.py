"""DeQA-Score's forward pass: each part against another implementation of the same mathematics."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from reward_models import pil_pixels, random_tensors
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import LlamaTokenizer as Tokenizer

import rewards
from rewards import deqa

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"layer_norm_eps": 1e-6}
VISION = {**SIZES, "intermediate_size": 40, "image_size": 16, "patch_size": 4}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
LLAMA |= {"num_attention_heads": 4, "vocab_size": 350}
CONFIG = {**LLAMA, "visual_config": {"visual_model": VISION, "visual_abstractor": SIZES}}

# The published names, and shapes in small.
TENSORS = """
model.embed_tokens.weight 350 32
model.norm.weight 32
lm_head.weight 350 32
model.layers.#.input_layernorm.multiway.0.weight 32
model.layers.#.input_layernorm.multiway.1.weight 32
model.layers.#.post_attention_layernorm.multiway.0.weight 32
model.layers.#.post_attention_layernorm.multiway.1.weight 32
model.layers.#.self_attn.q_proj.weight 32 32
model.layers.#.self_attn.k_proj.multiway.0.weight 32 32
model.layers.#.self_attn.k_proj.multiway.1.weight 32 32
model.layers.#.self_attn.v_proj.multiway.0.weight 32 32
model.layers.#.self_attn.v_proj.multiway.1.weight 32 32
model.layers.#.self_attn.o_proj.weight 32 32
model.layers.#.mlp.gate_proj.weight 48 32
model.layers.#.mlp.up_proj.weight 48 32
model.layers.#.mlp.down_proj.weight 32 48
V.embeddings.cls_token 1 1 24
V.embeddings.position_embedding 1 17 24
V.embeddings.patch_embed.weight 24 3 4 4
V.embeddings.pre_layernorm.* 24
V.post_layernorm.* 24
V.encoder.layers.#.self_attn.query_key_value.* 72 24
V.encoder.layers.#.self_attn.dense.* 24 24
V.encoder.layers.#.input_layernorm.* 24
V.encoder.layers.#.post_attention_layernorm.* 24
V.encoder.layers.#.mlp.fc1.* 40 24
V.encoder.layers.#.mlp.fc2.* 24 40
A.query_embeds 1 5 24
A.vit_eos 1 1 32
A.visual_fc.* 32 24
A.encoder.layers.#.crossattention.attention.query.* 24 24
A.encoder.layers.#.crossattention.attention.key.* 24 24
A.encoder.layers.#.crossattention.attention.value.* 24 24
A.encoder.layers.#.crossattention.attention.q_pos_embed 5 24
A.encoder.layers.#.crossattention.attention.k_pos_embed 17 24
A.encoder.layers.#.crossattention.output.out_proj.* 24 24
A.encoder.layers.#.crossattention.norm1.* 24
A.encoder.layers.#.crossattention.normk.* 24
A.encoder.layers.#.crossattention.output.norm2.* 24
A.encoder.layers.#.crossattention.output.mlp.w1.* 20 24
A.encoder.layers.#.crossattention.output.mlp.w2.* 24 20
A.encoder.layers.#.crossattention.output.mlp.w3.* 20 24
A.encoder.layers.#.crossattention.output.mlp.ffn_ln.* 20
"""
V, A = "model.vision_model.", "model.visual_abstractor."
CLIP_NAMES = {  # the published names in the vision tower -> CLIP's
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embed.": "embeddings.patch_embedding.",
    "embeddings.position_embedding": "embeddings.position_embedding.weight",
    "embeddings.pre_layernorm": "pre_layrnorm",
    ".input_layernorm": ".layer_norm1",
    ".post_attention_layernorm": ".layer_norm2",
    "self_attn.dense": "self_attn.out_proj",
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return deqa.Network(random_tensors(TENSORS.strip(), V=V[:-1], A=A[:-1]), CONFIG)


def test_the_vision_tower_is_clips_except_for_the_order_of_its_weights(network):
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act="quick_gelu")).eval()
    prefix, theirs = next(iter(clip.state_dict())).split("embeddings")[0], {}
    for name, x in network.tensors.items():
        if name.startswith(V):
            name = name.removeprefix(V)
            for old, new in CLIP_NAMES.items():
                name = name.replace(old, new)
            if "query_key_value" in name:
                x = x.unflatten(0, (3, 3, 8))
                for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                    part_name = name.replace("query_key_value", part)
                    theirs[prefix + part_name] = x[:, i].flatten(0, 1)
            else:
                x = x[0, 0] if "class" in name else x[0] if "position" in name else x
                theirs[prefix + name] = x
    clip.load_state_dict(theirs, strict=False)
    assert theirs.keys() <= clip.state_dict().keys()
    pixels = random(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.norm(f"{V}post_layernorm", clip(pixels).last_hidden_state, 1e-6)
        assert torch.allclose(network.vision(pixels), expected, atol=1e-5)


def test_the_abstractor_by_hand(network):
    seen, state = random(1, 17, 24), network.tensors

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    x = state[f"{A}query_embeds"][0]
    for i in range(2):
        cross = f"{A}encoder.layers.{i}.crossattention."
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
        y = F.silu(linear(f"{cross}output.mlp.w1", y)) * linear(f"{cross}output.mlp.w3", y)
        x = x + linear(f"{cross}output.mlp.w2", norm(f"{cross}output.mlp.ffn_ln", y, 1e-6))
    expected = torch.cat([linear(f"{A}visual_fc", x), state[f"{A}vit_eos"][0]])
    assert torch.allclose(network.resample(seen)[0], expected, atol=1e-5)


@pytest.mark.parametrize("image", [slice(3, 3), slice(0, 14), slice(4, 10)])
def test_it_is_llama_with_other_weights_for_the_pictures_tokens(network, image):
    """Without a picture LLaMA has the words' weights, with nothing else the picture's."""
    embeds = random(2, 14, 32)
    with torch.no_grad():
        logits = network.language(embeds, image)
        expected = []
        for twin in "01":
            llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
            own = {n.replace(f".multiway.{twin}", ""): x for n, x in network.tensors.items()}
            llama.load_state_dict({name: own[name] for name in llama.state_dict()})
            expected.append(llama(inputs_embeds=embeds).logits[:, -1])
    for twin, pure in enumerate((slice(3, 3), slice(0, 14))):
        assert torch.allclose(logits, expected[twin], atol=1e-4) == (image == pure)


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    """A folder like the published one: SentencePiece's file alone, and code of its own."""
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
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    others = {"model_type": "mplug_owl2", "auto_map": classes}
    (folder / "own.py").write_text("raise SystemExit('its own code was run')")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **others}))
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    tokenizer |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    size = {"size": 16, "crop_size": 16, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    save_file(network.tensors, folder / "model.safetensors")
    return folder


def test_the_score_is_the_expected_level(network, published, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    reward, images = rewards.load("deqa", "cpu", str(published)), random(2, 3, 8, 22).sigmoid()
    scores = reward(images)
    assert ((scores > 1) & (scores < 5)).all() and scores[0] != scores[1]

    tokenizer = Tokenizer.from_pretrained(published)
    before, after = (tokenizer(text)["input_ids"] for text in (deqa.BEFORE, deqa.AFTER))
    levels = [tokenizer(level)["input_ids"][1] for level in deqa.LEVELS]
    assert tokenizer.convert_ids_to_tokens(levels) == [f"\u2581{level}" for level in deqa.LEVELS]
    square = (torch.tensor([122, 116, 104]) / 255)[:, None, None].repeat(2, 1, 22, 22)
    square[:, :, 7:15] = images
    with torch.no_grad():
        words = network.tensors["model.embed_tokens.weight"]
        picture = network.resample(network.vision(pil_pixels(square, 16)))[:1]
        embeds = torch.cat([words[before][None], picture, words[after[1:]][None]], 1)
        logits = network.language(embeds, slice(len(before), len(before) + 6))[0]
    chances = logits[levels].softmax(0)
    expected = sum((i + 1) * chance for i, chance in enumerate(chances.tolist()))
    assert scores[0].item() == pytest.approx(expected, abs=1e-4)


def test_a_missing_file_is_named(published, tmp_path):
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        shutil.copytree(published, tmp_path / name, ignore=shutil.ignore_patterns(name))
        with pytest.raises(rewards.RewardError, match=name.replace("model.", r".*\.")):
            rewards.load("deqa", "cpu", str(tmp_path / name))
