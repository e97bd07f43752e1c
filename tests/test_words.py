"""The world of words: its prompts, its drawings, and judges, two of them real networks."""

import sys

import pytest
import torch

from rewards import RewardError, ocr
from tiny_sd35 import words

TRAINING, TEST = words.of_task("training"), words.of_task("test")


def prompt_of(word):
    return {"prompt": f'"{word}"', "task": "test", "word": word}


def test_test_words_are_in_no_training_set():
    training, test = ({prompt["word"] for prompt in part} for part in (TRAINING, TEST))
    assert (len(training), len(test)) == (words.TRAINING, words.TEST)  # each word once
    assert not training & test
    assert all(ocr.quoted_texts(prompt["prompt"]) == [prompt["word"]] for prompt in TRAINING)
    for place in range(words.LENGTH):  # every letter is learned in every place
        assert {word[place] for word in training} == set(words.ALPHABET)
    assert {p["task"] for p in words.prompt_lists()["prompts"]} == {"training"}
    assert [p["task"] for p in words.table_prompts(2)] == ["training"] * 2 + ["test"] * 2


def test_the_reader_of_letters_is_exact_on_drawings_and_noise_is_only_less_clean():
    images = words.drawn(TEST)
    assert words.read(images)[0] == [prompt["word"] for prompt in TEST]
    assert words.letters(images, TEST) == [1.0] * len(TEST)
    assert words.cleanness(images, TEST) == [0.0] * len(TEST)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert words.letters(noisy, TEST) == [1.0] * len(TEST)
    assert max(words.cleanness(noisy, TEST)) < -0.05
    images[:, :, words.ROW] = 1
    assert (images == 1).all()  # nothing outside the row


def test_the_share_of_letters_by_hand():
    images = words.paint(["CAMP", "CAMR", "PMAC", "    "])
    assert words.letters(images, [prompt_of("CAMP")] * 4) == [1, 3 / 4, 0, 0]


def test_the_control_has_the_rewards_in_another_order(monkeypatch):
    monkeypatch.setattr(words, "written", words.letters)
    group, images = [prompt_of("CAMP")] * 24, words.paint(["CAMP", "CAME", "SAVE", "    "] * 6)
    rewards, control = words.letters(images, group), words.shuffled(images, group)
    assert sorted(rewards) == sorted(control) and rewards != control
    assert control == words.shuffled(images, group)


@pytest.fixture
def network():
    pytest.importorskip("rapidocr")


@pytest.mark.parametrize("judge", [words.written, words.reread])
def test_the_ocr_reads_drawings_and_not_prompts(judge, network):
    """On all 96 test words, drawings score .990, and .958 are read without a mistake."""
    scores = torch.tensor(judge(words.drawn(TEST), TEST))
    assert scores.mean() >= 0.98 and (scores == 1).float().mean() >= 0.94
    images = words.paint(["CAMP", "CAXP", "LJLJ", "    "])
    assert judge(images, [prompt_of("CAMP")] * 4) == [1, 0.75, 0, 0]
    assert words.exact(images, [prompt_of("CAMP")] * 4) == [1, 0, 0, 0]


def test_the_second_judge_reads_by_itself(network, monkeypatch):
    """On all 96 test words, drawings score .974, and .896 are read without a mistake."""
    pytest.importorskip("ddddocr")
    monkeypatch.setattr(words, "reader", None)  # the reward's own network
    scores = torch.tensor(words.reread_elsewhere(words.drawn(TEST), TEST))
    assert scores.mean() >= 0.965 and (scores == 1).float().mean() >= 0.87
    images = words.paint(["WSAD", "WSXD", "JJKK", "    "])
    assert words.reread_elsewhere(images, [prompt_of("WSAD")] * 4) == [1, 0.75, 0, 0]


def test_a_missing_package_is_named_before_the_pretraining(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    words.reader.cache_clear()
    with pytest.raises(RewardError, match="pip install .*rapidfuzz"):
        words.columns()
