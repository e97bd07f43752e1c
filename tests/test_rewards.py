"""The rewards' interface: names, prompts, loading, calling, and what comes back."""

import asyncio
import copy
import io
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rewards

OWN = f"{Path(__file__).parent}/own_rewards.py"
PROMPTS = [{"prompt": text, "n": n} for n, text in enumerate(["a red cat", "blue sky", "a cup"])]
MEAN = "images.mean((1, 2, 3))"


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own(tmp_path, request):
    """Writes a file with a reward and returns its name; each test's file has another stem."""

    def write(source, function="f"):
        stem = re.sub(r"\W", "_", request.node.name)
        (tmp_path / f"{stem}.py").write_text(source)
        return f"{tmp_path / stem}.py:{function}"

    return write


def score(reward, images, name="mine"):
    return rewards.score(name, reward, images, PROMPTS)[0]


# Names


@pytest.mark.parametrize(
    ("specs", "weights"),
    [
        (["pickscore"], {"pickscore": 1}),
        (["pickscore=0.8", "ocr=-2"], {"pickscore": 0.8, "ocr": -2}),
        ([f"{OWN}:brightness=3"], {f"{OWN}:brightness": 3}),
        (["torch.nn:ReLU=2"], {"torch.nn:ReLU": 2}),
    ],
)
def test_a_spec_is_a_name_and_a_weight(specs, weights):
    assert rewards.parse(specs) == weights


def test_a_path_may_contain_an_equals_sign(tmp_path):
    (tmp_path / "a=b.py").write_text("def f(): pass")
    assert rewards.parse([f"{tmp_path}/a=b.py:f"]) == {f"{tmp_path}/a=b.py:f": 1}
    assert rewards.parse([f"{tmp_path}/a=b.py:f=2"]) == {f"{tmp_path}/a=b.py:f": 2}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["magic"], "no reward 'magic': aesthetic, .*, or path/to/file.py:function"),
        (["pickscore="], "pickscore=: the weight must be a number other than 0"),
        (["pickscore=0"], "must be a number other than 0"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        ([f"{OWN}:fightness"], "own_rewards.py does not define 'fightness'"),
        (["no_such_package:f"], "there is no package no_such_package; the name of a file ends in"),
        (["pickscore", "ocr", "pickscore=2"], "the reward pickscore is given twice"),
    ],
)
def test_a_spec_that_names_no_reward_is_refused(specs, message):
    with pytest.raises(rewards.RewardError, match=message):
        rewards.parse(specs)


# Loading


def test_a_reward_of_a_package(images, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    reward = rewards.load("own_rewards:brightness", "cpu")
    assert torch.allclose(score(reward, images), images.mean((1, 2, 3)))


def test_a_file_imports_what_lies_beside_it_and_is_run_once(own, tmp_path, images):
    (tmp_path / "beside_it.py").write_text(f"def mean(images):\n    return {MEAN}\n")
    name = own("import beside_it\ndef f(images, prompts): return beside_it.mean(images)")
    reward = rewards.load(name, "cpu")
    assert torch.allclose(score(reward, images), images.mean((1, 2, 3)))
    assert rewards.load(name, "cpu") is reward


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("def f(images, prompts): pass")
    with pytest.raises(rewards.RewardError, match="rename json.py: there is already a module json"):
        rewards.load(f"{tmp_path}/json.py:f", "cpu")


LOADING = {  # the file's source: the message, and the type of its cause
    "raise SystemExit(0)\nf = 1": ("SystemExit: 0$", SystemExit),
    "f = 1 / 0": ("ZeroDivisionError: division by zero$", ZeroDivisionError),
    "def f(device): return lambda images, prompts: images": (
        r"it takes \(device\) and not images and prompts; if f creates a reward, write `reward = f",
        type(None),
    ),
}


@pytest.mark.parametrize("source", LOADING, ids=range(len(LOADING)))
def test_a_file_that_fails_is_one_sentence_with_the_error_behind_it(source, own):
    name, (message, cause) = own(source), LOADING[source]
    rewards.parse([name])
    with pytest.raises(rewards.RewardError, match=message) as caught:
        rewards.load(name, "cpu")
    assert str(caught.value).startswith(f"cannot load the reward {name}: ")
    assert "\n" not in str(caught.value) and type(caught.value.__cause__) is cause


def test_other_weights_are_refused_where_there_are_none():
    for name in ("compressibility", f"{OWN}:brightness"):
        with pytest.raises(rewards.RewardError, match=f"cannot load the reward {name}: .*weights"):
            rewards.load(name, "cpu", "folder")


# Calling: rewards as people write them


def by_hand(prompts, metadata):
    return [len(text) + line["n"] for text, line in zip(prompts, metadata, strict=True)]


async def asynchronous(images, prompts, prompt_metadata):
    await asyncio.sleep(0)
    return by_hand(prompts, prompt_metadata)


class Module(torch.nn.Module):
    def forward(self, images, prompts, metadata):
        return torch.tensor(by_hand(prompts, metadata))


FORMS = {
    "flow_grpo": lambda images, prompts, metadata: (np.array(by_hand(prompts, metadata)), {}),
    "TRL": lambda prompts, images, **kwargs: by_hand(prompts, kwargs["metadata"]),
    "async": asynchronous,
    "module": Module(),
    "any order": lambda metadata, prompts: by_hand(prompts, metadata),
    "two": lambda images, prompts, scale=1: [scale * len(p) + i for i, p in enumerate(prompts)],
    "by position": lambda x, y: [len(p) + i for i, p in enumerate(y)],
    "images alone": lambda images: [9] * len(images[:2]) + [7],
}


@pytest.mark.parametrize("form", FORMS)
def test_rewards_in_the_forms_of_the_field(form, images):
    for _ in range(2):
        assert score(FORMS[form], images).tolist() == [9, 9, 7]


def test_a_client_that_lives_in_an_event_loop_works_in_the_next_call(images):
    loops = []

    async def reward(images, prompts):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(images)

    score(reward, images), score(reward, images)
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_the_example_in_the_docstring_works(own, images):
    example = textwrap.dedent(re.search(r"\n( +def .*?\n)\n", rewards.__doc__, re.DOTALL)[1])
    assert len(example.splitlines()) == 3
    name = own(example, re.match(r"def (\w+)", example)[1])
    blueness = (images[:, 2] - images[:, 0]).mean((1, 2))
    expected = blueness * torch.tensor([-1.0, 1, -1])
    assert torch.allclose(score(rewards.load(name, "cpu"), images), expected)


def test_a_reward_that_works_in_place_spoils_nothing(images):
    def spoil(images, prompts, metadata):
        images.mul_(-1), prompts.clear()
        metadata[0].clear(), metadata.clear()
        return -images.mean((1, 2, 3))

    prompts, before = copy.deepcopy(PROMPTS), images.clone()
    for _ in range(2):
        scores, _ = rewards.score("mine", spoil, images, prompts)
        assert torch.allclose(scores, images.mean((1, 2, 3)))
    assert torch.equal(images, before) and prompts == PROMPTS


def test_a_reward_is_called_without_gradients(images):
    weight = torch.ones(3, requires_grad=True)
    assert not score(lambda images, prompts: [torch.is_grad_enabled()] * 3, images).any()
    assert not score(lambda images, prompts: weight, images).requires_grad


# Results

NAN = float("nan")
RESULTS = [
    (torch.tensor([1, 2, 3]), [1, 2, 3]),
    (torch.tensor([1, 2, 3], dtype=torch.bfloat16), [1, 2, 3]),
    (np.array([3, 2, 1], ">f4")[::-1], [1, 2, 3]),
    ([torch.tensor(1.0), np.float32(2), True], [1, 2, 1]),
    ((1, 2, 3), [1, 2, 3]),
    ([1, None, 3], [1, NAN, 3]),
    ([1, float("inf"), -float("inf")], [1, NAN, NAN]),
    ((torch.ones(3), {}, "more", [2]), [1, 1, 1]),
]


@pytest.mark.parametrize(("result", "expected"), RESULTS, ids=range(len(RESULTS)))
def test_scores_of_any_kind(result, expected, images):
    scores = score(lambda images, prompts: result, images)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.tolist() == pytest.approx(expected, nan_ok=True)


def test_the_numbers_in_info_are_returned_as_means(images):
    info = {"a": 2, "b": [1, 2, 6], "c": torch.tensor([1.0, 3]), "d": "text", "e": [None]}
    _, means = rewards.score("mine", lambda images: ([1, 2, 3], info), images, PROMPTS)
    assert means == {"a": 2, "b": 3, "c": 2}


WRONG = [
    ([1.0], r"got the shape \(1,\)$"),
    (torch.ones(3, 1), r"got the shape \(3, 1\)$"),
    ([[1.0]] * 3, "TypeError: .* not 'list'$"),
    (None, r"got the shape \(\)$"),
    (lambda images, prompts: [1, 2, 3], "it returned a function; call the factory in your file"),
]


@pytest.mark.parametrize(("result", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_not_a_number_for_each_image_is_refused(result, message, images):
    expected = f"the reward mine must return 3 numbers: .*{message}"
    with pytest.raises(rewards.RewardError, match=expected):
        score(lambda images, prompts: result, images)


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(), ValueError("a\nb"), KeyError("k")])
def test_a_reward_that_fails_is_named_and_its_error_is_the_cause(error, images):
    def fail(images, prompts):
        raise error

    message = f"^the reward mine failed for the prompt 'a red cat': {type(error).__name__}: "
    with pytest.raises(rewards.RewardError, match=message) as caught:
        score(fail, images)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_no_reward_leaves_it_to_transformers_how_to_prepare_pictures():
    """With torchvision installed it would take that, and some values would differ by a level."""
    for name in rewards.names():
        source = (Path(rewards.__file__).parent / f"{name}.py").read_text()
        assert not re.search(r"\b(AutoProcessor|CLIPProcessor|CLIPImageProcessor)\b", source)
        for options in re.findall(r"AutoImageProcessor\.from_pretrained\((.*?)\)", source):
            assert 'backend="pil"' in options


def test_compressibility_is_minus_the_size_as_jpeg(images):
    images[1] = 0.5
    scores = rewards.load("compressibility", "cpu")(images)
    file = io.BytesIO()
    Image.fromarray(rewards.to_bytes(images)[0]).save(file, "JPEG", quality=95)
    assert scores[0] == -len(file.getvalue()) / 1000
    assert scores[1] > scores[0] and scores[1] > scores[2]
