"""GenEval's metadata and rules by hand, and the plumbing of its models on tiny random ones."""

import json
import math
from functools import partial

import pytest
import torch

from rewards import geneval, geneval_official, geneval_released, mask2former
from rewards.geneval import Detection

MODULES = (geneval, geneval_official, geneval_released)


def at(x, y, width=10, height=10, score=1.0):
    """An object centred at (x, y)."""
    return Detection((x - width / 2, y - height / 2, x + width / 2, y + height / 2), score)


# With two boxes of 10 x 10 the dead zone is 2 in each direction.
RELATIONS = {
    "the same place": (at(0, 0), at(0, 0), set()),
    "inside the dead zone": (at(1.5, 0), at(0, 0), set()),
    "at its corner": (at(2, -2), at(0, 0), set()),
    "exactly half": (at(4, 0), at(0, 0), set()),
    "more than half": (at(4.1, 0), at(0, 0), {"right of"}),
    "below": (at(0, 20), at(0, 0), {"below"}),
    "a diagonal is both": (at(20, 20), at(0, 0), {"right of", "below"}),
    "a larger box has a larger dead zone": (at(9, 0, width=80), at(0, 0), set()),
    "the order matters": (at(0, 0), at(20, 0), {"left of"}),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_by_hand(name):
    one, other, expected = RELATIONS[name]
    assert geneval.relations(one, other) == expected


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def task(include, exclude=()):
    return geneval.read_metadata({"tag": "any", "include": include, "exclude": [*exclude]})


def is_red(name, objects):
    """A stub: objects at x < 100 are red, the others blue."""
    return ["red" if each.box[0] < 100 else "blue" for each in objects]


DOG, CAT, DOGS = clause("dog"), clause("cat"), clause("dog", 2)
RED_CAR, RED_CARS, BLUE_BUS = (
    clause("car", color="red"),
    clause("car", 2, color="red"),
    clause("bus", color="blue"),
)
LEFT = [CAT, clause("dog", position=["left of", 0])]
RED_LEFT, BLUE_LEFT = (
    [CAT, clause("car", color=color, position=["left of", 0])] for color in ("red", "blue")
)
TWO_LEFT = [CAT, clause("dog", 2, position=["left of", 0])]
OF_RED = [RED_CAR, clause("dog", position=["left of", 0])]
here, left, far = at(50, 50), at(10, 50), at(300, 50)

VERDICTS = {  # include, exclude, objects, graded, official
    "there": ([DOG], [], {"dog": [here]}, 1, 1),
    "one too many is official": ([DOG], [], {"dog": [here, far]}, 0, 1),
    "the same class twice": ([DOG, DOG], [], {"dog": [here]}, 1, 1),
    "one more": ([DOGS], [], {"dog": [here, left, far]}, 1 / 2, 1),
    "one more, excluded": ([DOGS], [clause("dog", 3)], {"dog": [here, left, far]}, 1 / 2, 0),
    "another class is excluded": ([DOG], [CAT], {"dog": [here], "cat": [far]}, 1, 0),
    "the color": ([RED_CAR], [], {"car": [here]}, 1, 1),
    "the surest has the color": ([RED_CAR], [], {"car": [here, far]}, 0, 1),
    "the surest has another": ([RED_CAR], [], {"car": [far, here]}, 0, 0),
    "one of two has the color": ([RED_CARS], [], {"car": [here, far]}, 1 / 2, 0),
    "colors exchanged": ([RED_CAR, BLUE_BUS], [], {"car": [far], "bus": [here]}, 1 / 2, 0),
    "to the left": (LEFT, [], {"cat": [here], "dog": [left]}, 1, 1),
    "to the right": (LEFT, [], {"cat": [here], "dog": [far]}, 2 / 3, 0),
    "the surest is to the left": (LEFT, [], {"cat": [here], "dog": [left, far]}, 1 / 3, 1),
    "of the surest": (LEFT, [], {"cat": [here, left], "dog": [left]}, 2 / 3, 1),
    "of one with a wrong color": (OF_RED, [], {"car": [far], "dog": [here]}, 2 / 4, 0),
    "color and position": (RED_LEFT, [], {"cat": [here], "car": [left]}, 1, 1),
    "position without color": (BLUE_LEFT, [], {"cat": [here], "car": [left]}, 2 / 4, 0),
    "one of two to the left": (TWO_LEFT, [], {"cat": [here], "dog": [left, far]}, 2 / 3, 0),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_by_hand(name):
    include, exclude, objects, *verdicts = VERDICTS[name]
    assert geneval.judge(task(include, exclude), objects, is_red) == pytest.approx(verdicts)


# The released code's own scores: `evaluate_reward`, flow_grpo/gen_eval.py of Luo-Yihong/DGPO at
# 01ceb4b, run on these. It also agrees with `released` in 60,000 random cases.
RELEASED = {  # include, exclude, objects, the released score, the graded one
    "there": ([DOG], [], {"dog": [here]}, 1, 1),
    "five for one": ([DOG], [], {"dog": [here] * 5}, -3, 0),
    "two kinds, one too many": ([DOG, CAT], [], {"dog": [here] * 4, "cat": [far]}, -1 / 2, 1 / 2),
    "what is excluded": ([DOG], [CAT], {"dog": [here], "cat": [far]}, 1, 1),
    "one of two red": ([RED_CARS], [], {"car": [here, far]}, 3 / 4, 1 / 2),
    "one 0 for color and position": (RED_LEFT, [], {"cat": [here]}, 1 / 3, 1 / 4),
    "wrong color ends it": (BLUE_LEFT, [], {"cat": [here], "car": [left]}, 2 / 3, 2 / 4),
    "to the left": (LEFT, [], {"cat": [here], "dog": [left]}, 1, 1),
    "to the right has a 0 and a 1": (LEFT, [], {"cat": [here], "dog": [far]}, 3 / 4, 2 / 3),
    "to what has the wrong color": (OF_RED, [], {"car": [far], "dog": [here]}, 2 / 4, 2 / 4),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_score(name):
    include, exclude, objects, released, graded = RELEASED[name]
    prompt = task(include, exclude)
    assert geneval_released.released(prompt, objects, is_red) == pytest.approx(released)
    assert geneval.graded(prompt, objects, is_red) == pytest.approx(graded)


# Metadata as the world writes it: each means the plain metadata beside it.
POSITION = [CAT, {**DOG, "position": ["left of", 0]}]
READ = {
    "null color and position": ({"include": [{**DOG, "color": None, "position": None}]}, [DOG]),
    "NaN": ({"include": [{**DOG, "color": math.nan}], "exclude": math.nan}, [DOG]),
    "a float": ({"include": [clause("dog", 2.0)]}, [DOGS]),
    "a string": ({"include": [clause("dog", "2")]}, [DOGS]),
    "no count": ({"include": [{"class": "dog"}]}, [DOG]),
    "JSON": ({"include": json.dumps(POSITION), "exclude": "null"}, POSITION),
    "an index as a string": ({"include": [CAT, {**DOG, "position": ["left of", "0"]}]}, POSITION),
}


@pytest.mark.parametrize("name", READ)
def test_metadata_that_went_through_other_programs(name):
    metadata, plain = READ[name]
    assert geneval.read_metadata({"tag": "any", **metadata}) == task(plain)


REFUSED = [
    ({}, "no GenEval metadata"),
    ({"include": []}, r"include must be a list of clauses, got \[\]"),
    ({"include": "a dog"}, "'a dog' is not JSON"),
    ({"include": [DOG], "exclude": CAT}, "exclude must be a list of clauses"),
    ({"include": [clause("mouse")]}, "no class 'mouse'; the nearest are computer mouse$"),
    ({"include": [{**DOG, "color": "gray"}]}, "no color 'gray'; the nearest are red, .*, white$"),
    ({"include": [clause("dog", 17)]}, "count must be a whole number from 1 to 16, got 17"),
    ({"include": [clause("dog", "two")]}, "from 1 to 16, got 'two'"),
    ({"include": [DOG], "exclude": [clause("dog", 0)]}, "count must be a whole number from 1"),
    (
        {"include": [CAT, {**DOG, "position": ["to the left of", 0]}]},
        "no relation 'to the left of'; the nearest are left of$",
    ),
    (
        {"include": [CAT, {**DOG, "position": ["left of", 1]}]},
        "a position must name an earlier clause by index, got 1",
    ),
    ({"include": [CAT, {**DOG, "position": ["left of"]}]}, "must be a relation and an index"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED, ids=range(len(REFUSED)))
def test_metadata_that_no_picture_can_be_judged_by_is_refused(metadata, message):
    for module in MODULES:
        with pytest.raises(ValueError, match=message):
            module.check_prompt({"tag": "any", **metadata})


@pytest.fixture(scope="module")
def judges():
    """The three rewards on what a stub detects: three dogs and a car, but only one dog surely."""
    objects = {0.3: {"dog": [here, left, far], "car": [left]}, 0.9: {"dog": [here]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geneval, "load_detector", lambda *_: lambda image, sure: objects[sure])
        patch.setattr(geneval, "load_classifier", lambda *_: lambda image, *seen: is_red(*seen))
        return [module.load("cpu") for module in MODULES]


def test_three_rewards_judge_the_same_objects_and_counting_the_sure_ones(judges):
    for tag, verdicts in (("single_object", [0, 1, -1]), ("counting", [1, 1, 1])):
        metadata = [{"tag": tag, "include": json.dumps([DOG])}]  # as other programs write it
        assert [judge(torch.rand(1, 3, 8, 8), metadata)[0] for judge in judges] == verdicts


def test_models_are_named_by_detector_and_classifier(monkeypatch):
    names = []
    monkeypatch.setattr(geneval, "load_detector", lambda device, name: names.append(name))
    monkeypatch.setattr(geneval, "load_classifier", lambda device, name: names.append(name))
    for model in (None, "mine.pth", "mine,clip", ",clip"):
        geneval_official.load("cpu", model)
    own, clip = mask2former.URL, geneval.CLIP
    assert names == [own, clip, "mine.pth", clip, "mine", "clip", own, "clip"]


def test_an_object_is_shown_on_grey_to_name_its_color():
    image = torch.zeros(3, 20, 30)
    image[0, 5:10, 10:20] = 1  # a red bar, of which the mask covers the left half
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:10, 10:15] = True
    shown = geneval.crop(image, Detection((10, 4, 20, 12), 1.0, mask))
    assert shown.shape == (3, 8, 10)
    assert (shown[:, 1:6, :5] == torch.tensor([1.0, 0, 0])[:, None, None]).all()
    assert (shown[:, :, 5:] == geneval.GREY).all() and (shown[:, 0] == geneval.GREY).all()


def test_a_crop_few_pixels_high_is_a_picture(tiny_clip):
    """A crop of one color throughout gets the same name whatever its height."""
    classify = geneval.load_classifier("cpu", str(tiny_clip))
    flat = [Detection((0, 0, 24, height), 1.0) for height in (24, 1, 2, 3, 4)]
    names = set()
    for color in torch.cartesian_prod(*[torch.tensor([0, 0.5, 1])] * 3):
        image = color[:, None, None].expand(3, 24, 24)
        (name,) = set(classify(image, "circle", flat))
        names.add(name)
    assert len(names) > 1 and classify(image, "circle", []) == []


@pytest.fixture
def tiny_detector(tmp_path, monkeypatch):
    pytest.importorskip("scipy", reason="pip install scipy")
    from test_mask2former import TINY, mmdet_state, tiny_config

    monkeypatch.setattr(mask2former, "convert", partial(mask2former.convert, config=tiny_config()))
    torch.save({"state_dict": mmdet_state(TINY)}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_boxes_are_in_the_pictures_own_pixels(tiny_detector):
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(0))
    detect = geneval.load_detector("cpu", str(tiny_detector))
    objects = detect(image, 0.0)
    assert objects and set(objects) <= set(geneval.CLASSES) and detect(image, 1.0) == {}
    for detections in objects.values():
        scores = [each.score for each in detections]
        assert scores == sorted(scores, reverse=True) and len(scores) <= geneval.MAX_DETECTIONS
        for each in detections:
            rows, columns = each.mask.nonzero().unbind(1)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert each.mask.shape == (48, 80) and each.box == tuple(map(float, edges))
