"""The world of words: what is drawn is read, by a real OCR network too, and every word is told."""

import itertools
import sys
import types

import pytest
import tiny_sd35
import torch
import words
from transformers import CLIPTokenizer

import checkpoints
import cli
import prompts as prompt_sets
import sd35
from rewards import RewardError, ocr

TRAINING, TEST = words.of_task("training"), words.of_task("test")


def drawn(prompts):
    return words.paint([prompt["word"] for prompt in prompts])


def test_test_words_are_in_no_training_set():
    training, test = ({prompt["word"] for prompt in part} for part in (TRAINING, TEST))
    assert (len(training), len(test)) == (words.TRAINING, words.TEST)  # each word once
    assert not training & test
    assert all(len(word) == words.LENGTH and set(word) <= set(words.ALPHABET) for word in test)
    for place in range(words.LENGTH):  # every letter is learnt in every place
        assert {word[place] for word in training} == set(words.ALPHABET)


def test_the_prompt_quotes_the_word():
    assert all(ocr.target_text(prompt["prompt"]) == prompt["word"] for prompt in TRAINING + TEST)


def test_the_letters_differ_and_fit_their_cells():
    letters = words.glyphs()
    assert (
        torch.pdist(letters.flatten(1)).min() ** 2 >= 2 * 4 - 1e-3
    )  # two dots of the font, as in B and D
    assert ((letters == 0) | (letters == 1)).all() and (letters[-1] == 1).all()
    for edge in (letters[:, 0], letters[:, -1], letters[:, :, 0], letters[:, :, -1]):
        assert (edge == 1).all()


def test_the_letter_reader_is_exact_on_what_was_drawn():
    images = drawn(TEST)
    assert words.read(images)[0] == [prompt["word"] for prompt in TEST]
    assert words.letters(images, TEST) == [1.0] * len(TEST)
    assert words.cleanness(images, TEST) == [0.0] * len(TEST)
    assert (images[:, :, words.ROW].amin((1, 2)) == 0).any(1).all()
    images[:, :, words.ROW] = 1
    assert (images == 1).all()  # nothing outside the row


def test_the_letter_reader_stands_some_noise_and_the_cleanness_shows_it():
    images = drawn(TEST)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert words.letters(noisy, TEST) == [1.0] * len(TEST)
    assert max(words.cleanness(noisy, TEST)) < -0.05


@pytest.mark.parametrize(
    ("asked", "seen", "share"),
    [("CAMP", "CAMP", 1), ("CAMP", "CAMR", 3 / 4), ("CAMP", "PMAC", 0), ("CAMP", "    ", 0)],
)
def test_the_share_of_letters_by_hand(asked, seen, share):
    assert words.letters(words.paint([seen]), [words.prompt_of(asked, "test")]) == [share]


def test_the_control_gives_a_group_its_rewards_in_another_order(monkeypatch):
    monkeypatch.setattr(words, "written", words.letters)
    group = [words.prompt_of("CAMP", "training")] * 24
    images = words.paint(["CAMP", "CAME", "SAVE", "    "] * 6)
    rewards, control = words.letters(images, group), words.shuffled(images, group)
    assert sorted(rewards) == sorted(control) and rewards != control
    assert control == words.shuffled(images, group)


# The OCR


@pytest.fixture(scope="module")
def network():
    for package in ("rapidocr", "onnxruntime", "rapidfuzz"):
        pytest.importorskip(package, reason="pip install rapidocr onnxruntime rapidfuzz")


@pytest.mark.parametrize("reader", [words.written, words.reread])
def test_the_ceiling_is_near_one(reader, network):
    """What the OCR reads of perfect drawings: .990 on all 96 test words, .958 without a mistake."""
    scores = torch.tensor(reader(drawn(TEST), TEST))
    assert scores.mean() >= 0.98 and (scores == 1).float().mean() >= 0.94


@pytest.mark.parametrize("reader", [words.written, words.reread])
def test_the_ocr_reads_what_is_drawn_and_not_what_is_asked(reader, network):
    asked = [words.prompt_of("CAMP", "test")] * 4
    assert reader(words.paint(["CAMP", "CAXP", "LJLJ", "    "]), asked) == [1, 0.75, 0, 0]


@pytest.fixture(scope="module")
def other_network(network):
    pytest.importorskip("ddddocr", reason="pip install ddddocr")


def test_the_other_network_reads_most_of_what_is_drawn(other_network):
    """On all 96 drawn test words .974, and .896 without a mistake: an O is often a zero to it."""
    scores = torch.tensor(words.reread_elsewhere(drawn(TEST), TEST))
    assert scores.mean() >= 0.965 and (scores == 1).float().mean() >= 0.87


def test_the_other_network_reads_what_is_drawn_by_itself(other_network, monkeypatch):
    monkeypatch.setattr(words, "reader", None)  # the reward's own network is not asked
    asked = [words.prompt_of("WSAD", "test")] * 4
    images = words.paint(["WSAD", "WSXD", "JJKK", "    "])
    assert words.reread_elsewhere(images, asked) == [1, 0.75, 0, 0]


def test_a_missing_package_is_named_before_the_pretraining(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    words.reader.cache_clear()
    with pytest.raises(SystemExit):
        run_main(monkeypatch, capsys, "--out", tmp_path)
    assert "it needs `pip install rapidocr onnxruntime rapidfuzz`" in capsys.readouterr().err


class Broken(types.ModuleType):
    def __getattr__(self, name):
        raise OSError("libGL.so.1: cannot open")


class Refusing:
    def __init__(self, **_):
        raise ValueError("bad model")


STUBS = [Broken("stub"), types.SimpleNamespace(DdddOcr=Refusing, RapidOCR=Refusing)]


@pytest.mark.parametrize("stub", STUBS, ids=["import", "start"])
def test_a_package_that_is_broken_is_a_missing_one(stub, tmp_path, monkeypatch, capsys):
    for name, network in (("ddddocr", words.captcha_reader), ("rapidocr", words.reader)):
        monkeypatch.setitem(sys.modules, name, stub)
        network.cache_clear()
    with pytest.raises(RewardError, match="it needs `pip install ddddocr`: (OS|Value)Error: "):
        words.captcha_reader()
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, capsys, "--out", tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "the package rapidocr reads nothing: " in said
    assert said.endswith("; mend it, or install it anew\n") and said.count("\n") == 1


# The pipeline


@pytest.fixture(scope="module")
def pipe():
    return words.build(width=32, layers=2)


@torch.no_grad()
def test_the_vae_loses_nothing_of_a_drawing(pipe):
    images = drawn(TEST[:8])
    latents = tiny_sd35.to_latents(pipe, images)
    assert latents.shape[1:] == (1, words.SIDE // 2, words.SIDE // 2)
    values = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(values).sample / 2 + 0.5
    assert torch.equal((decoded * 255).round(), (images * 255).round())


def test_a_patch_holds_no_more_numbers_than_the_default_width():
    patch = words.CELL // 2
    assert patch * patch <= words.build.__defaults__[0]


def test_the_tokens_spell_every_word(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path)  # read back, as a run reads it
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in TRAINING[:200] + TEST:
        ids = tokenizer(prompt["prompt"], truncation=False)["input_ids"]
        assert len(ids) == words.TOKENS == tokenizer.model_max_length
        pieces = tokenizer.convert_ids_to_tokens(ids[1:-1])
        assert "".join(piece.removesuffix("</w>") for piece in pieces).upper() == prompt["prompt"]
        assert not {tokenizer.unk_token_id, tokenizer.eos_token_id} & set(ids[1:-1])


def test_two_builds_have_the_same_tokens_and_weights(pipe):
    other = words.build(width=32, layers=2)
    assert other.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    texts = [prompt["prompt"] for prompt in TEST[:4]]
    pairs = zip(tiny_sd35.encode(pipe, texts), tiny_sd35.encode(other, texts), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_saved_pipeline_without_t5_reads_prompts_as_before(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = sd35.load_pipeline(str(tmp_path), torch.float32)
    assert loaded.text_encoder_3 is None
    text = TEST[0]["prompt"]
    encoded = sd35.Encoder(loaded, 1, torch.device("cpu"))([text], {})[text]
    embeds, pooled = tiny_sd35.encode(pipe, [text])
    assert torch.equal(encoded.embeds, embeds) and torch.equal(encoded.pooled, pooled)


def test_words_that_differ_in_one_letter_or_in_order_are_told_apart(pipe):
    near = ["".join(p) for p in itertools.permutations("CAMP")]
    near += ["CAMP"[:i] + "X" + "CAMP"[i + 1 :] for i in range(4)]
    embeds, pooled = tiny_sd35.encode(
        pipe, [words.prompt_of(word, "test")["prompt"] for word in near]
    )
    assert embeds.shape[1] == words.TOKENS + 1
    assert torch.pdist(embeds.flatten(1)).min() > 1 and torch.pdist(pooled).min() > 0.01


def test_pretraining_learns_from_training_words_alone(pipe, monkeypatch):
    told, encode = [], tiny_sd35.encode

    def watched(pipe, texts):
        told.extend(texts)
        return encode(pipe, texts)

    monkeypatch.setattr(tiny_sd35, "encode", watched)
    losses = list(words.pretrain(pipe, 60, batch=16))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert told == ["", *(prompt["prompt"] for prompt in TRAINING)]


def run_main(monkeypatch, capsys, *argv):
    monkeypatch.setattr("sys.argv", ["words.py", *map(str, argv)])
    cli.run("words.py", words.main)
    return capsys.readouterr().out


def test_the_command_leaves_a_pipeline_prompts_and_pictures(tmp_path, monkeypatch, capsys, network):
    monkeypatch.setattr(words, "TRAINING", 16)
    monkeypatch.setattr(words, "TEST", 4)
    words.prompt_list.cache_clear()
    out = tmp_path / "words"
    try:
        short = ("--out", out, "--pretraining", 2, "--samples", 2)
        table = run_main(monkeypatch, capsys, *short).splitlines()
        training, test = words.of_task("training"), words.of_task("test")
    finally:
        words.prompt_list.cache_clear()
    rows = ["drawn", "base", "base, guidance 2", "base, 28 steps"]
    assert [line.split("|")[1].strip() for line in table[-4:]] == rows
    assert prompt_sets.read(out / "prompts.jsonl") == training
    assert prompt_sets.read(out / "held_out.jsonl") == test[:48]
    assert (out / "base.png").stat().st_size > 5_000


def test_a_lora_is_judged_without_t5_and_without_the_other_network(
    pipe, tmp_path, monkeypatch, capsys, network
):
    out, run = tmp_path / "words", tmp_path / "run"
    pipe.save_pretrained(out)
    trained = sd35.load_pipeline(str(out), torch.float32)
    theta = sd35.add_lora(trained.transformer, 4, 8, 0, False)
    model = sd35.Model(trained, theta, words.SIDE, 4, encoded={})
    with torch.no_grad():
        for value in model.average:
            value += 0.3
    run.mkdir()
    checkpoints.save_lora(model, run)

    monkeypatch.setitem(sys.modules, "ddddocr", None)
    words.captcha_reader.cache_clear()
    with pytest.raises(RewardError, match="it needs `pip install ddddocr`: Mod"):
        words.reread_elsewhere(drawn(TEST[:1]), TEST[:1])
    said, *table = run_main(
        monkeypatch, capsys, "--out", out, "--samples", 2, "--lora", run
    ).splitlines()
    assert said.startswith("the column 'other network' stays empty: it needs `pip install ddddo")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    conditions = ["", ", guidance 2", ", 28 steps"]
    named = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(named) == ["drawn", *(name + c for name in ("base", "run") for c in conditions)]
    assert {row["other network"] for row in named.values()} == {"-"}
    assert named["run"]["cleanness"] != named["base"]["cleanness"]  # the LoRA was used
