"""GenEval's rules by hand, and the plumbing of its models on tiny random ones."""

import pytest
import torch

from rewards import geneval, geneval_official, geneval_released, mask2former
from rewards.geneval import Found


def at(x, y, width=10, height=10, score=1.0):
    """An object centred at (x, y)."""
    return Found((x - width / 2, y - height / 2, x + width / 2, y + height / 2), score)


# With two boxes of 10 x 10 the dead zone is 2 either way.
RELATIONS = {
    "the same place": (at(0, 0), at(0, 0), set()),
    "inside the dead zone": (at(1.5, 0), at(0, 0), set()),
    "exactly at its edge": (at(2, 0), at(0, 0), set()),
    "exactly at its corner": (at(2, -2), at(0, 0), set()),
    "just out of it, but too small a share": (at(3.9, 0), at(0, 0), set()),
    "exactly half": (at(4, 0), at(0, 0), set()),
    "more than half": (at(4.1, 0), at(0, 0), {"right of"}),
    "left": (at(-20, 0), at(0, 0), {"left of"}),
    "right": (at(20, 0), at(0, 0), {"right of"}),
    "above is a smaller y": (at(0, -20), at(0, 0), {"above"}),
    "below": (at(0, 20), at(0, 0), {"below"}),
    "a diagonal is both": (at(20, 20), at(0, 0), {"right of", "below"}),
    "the other diagonal": (at(-20, -20), at(0, 0), {"left of", "above"}),
    "mostly right": (at(20, 5), at(0, 0), {"right of"}),
    "a larger box has a larger dead zone": (at(9, 0, width=80), at(0, 0), set()),
    "which is by axis": (at(0, 9, width=80), at(0, 0), {"below"}),
    "the order matters": (at(0, 0), at(20, 0), {"left of"}),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_relations_by_hand(name):
    one, other, expected = RELATIONS[name]
    assert geneval.relations(one, other) == expected


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


DOG, CAT = clause("dog"), clause("cat")
RED_CAR = clause("car", color="red")
LEFT = [CAT, clause("dog", position=["left of", 0])]


def is_red(name, found):
    """A stub: what lies at x < 100 is red, the rest blue."""
    return ["red" if each.box[0] < 100 else "blue" for each in found]


here, left, far = at(50, 50), at(10, 50), at(300, 50)

# name: include, exclude, objects, graded, strict, official
VERDICTS = {
    "there": ([DOG], [], {"dog": [here]}, 1, 1, 1),
    "nothing": ([DOG], [], {}, 0, 0, 0),
    "another thing": ([DOG], [], {"cat": [here]}, 0, 0, 0),
    "another thing besides": ([DOG], [], {"dog": [here], "cat": [far]}, 1, 1, 1),
    "one too many is official": ([DOG], [], {"dog": [here, far]}, 0, 0, 1),
    "two too many grade no lower than 0": ([DOG], [], {"dog": [here, far, left]}, 0, 0, 1),
    "both": ([DOG, CAT], [], {"dog": [here], "cat": [far]}, 1, 1, 1),
    "one of both": ([DOG, CAT], [], {"dog": [here]}, 1 / 2, 0, 0),
    "the same class twice": ([DOG, DOG], [], {"dog": [here]}, 1, 1, 1),
    "counted": ([clause("dog", 3)], [], {"dog": [here, left, far]}, 1, 1, 1),
    "one missing": ([clause("dog", 3)], [], {"dog": [here, left]}, 2 / 3, 0, 0),
    "one more": ([clause("dog", 2)], [], {"dog": [here, left, far]}, 1 / 2, 0, 1),
    "one more, and excluded": (
        [clause("dog", 2)],
        [clause("dog", 3)],
        {"dog": [here, left, far]},
        1 / 2,
        0,
        0,
    ),
    "as many, and more are excluded": (
        [clause("dog", 2)],
        [clause("dog", 3)],
        {"dog": [here, left]},
        1,
        1,
        1,
    ),
    "another class is excluded": ([DOG], [CAT], {"dog": [here], "cat": [far]}, 1, 0, 0),
    "excluded and not there": ([DOG], [CAT], {"dog": [here]}, 1, 1, 1),
    "the color": ([RED_CAR], [], {"car": [here]}, 1, 1, 1),
    "another color": ([RED_CAR], [], {"car": [far]}, 1 / 2, 0, 0),
    "a color of nothing": ([RED_CAR], [], {}, 0, 0, 0),
    "the surest has the color": ([RED_CAR], [], {"car": [here, far]}, 0, 0, 1),
    "the surest has another": ([RED_CAR], [], {"car": [far, here]}, 0, 0, 0),
    "both have the color": (
        [clause("car", 2, color="red")],
        [],
        {"car": [here, left]},
        1,
        1,
        1,
    ),
    "one of two has the color": (
        [clause("car", 2, color="red")],
        [],
        {"car": [here, far]},
        1 / 2,
        0,
        0,
    ),
    "two colors": (
        [RED_CAR, clause("bus", color="blue")],
        [],
        {"car": [here], "bus": [far]},
        1,
        1,
        1,
    ),
    "two colors exchanged": (
        [RED_CAR, clause("bus", color="blue")],
        [],
        {"car": [far], "bus": [here]},
        1 / 2,
        0,
        0,
    ),
    "to the left": (LEFT, [], {"cat": [here], "dog": [left]}, 1, 1, 1),
    "to the right": (LEFT, [], {"cat": [here], "dog": [far]}, 2 / 3, 0, 0),
    "on the same place": (LEFT, [], {"cat": [here], "dog": [here]}, 2 / 3, 0, 0),
    "to the left of what is not there": (LEFT, [], {"dog": [left]}, 1 / 3, 0, 0),
    "not there, to the left": (LEFT, [], {"cat": [here]}, 1 / 3, 0, 0),
    "the surest is to the left": (
        LEFT,
        [],
        {"cat": [here], "dog": [left, far]},
        1 / 3,
        0,
        1,
    ),
    "of the surest": (LEFT, [], {"cat": [here, left], "dog": [left]}, 2 / 3, 0, 1),
    "position to a clause whose color failed": (
        [RED_CAR, clause("dog", position=["left of", 0])],
        [],
        {"car": [far], "dog": [here]},
        2 / 4,
        0,
        0,
    ),
    "color and position": (
        [CAT, clause("car", color="red", position=["left of", 0])],
        [],
        {"cat": [here], "car": [left]},
        1,
        1,
        1,
    ),
    "the position but not the color": (
        [clause("cat"), clause("car", color="blue", position=["left of", 0])],
        [],
        {"cat": [here], "car": [left]},
        2 / 4,
        0,
        0,
    ),
    "two to the left of one": (
        [CAT, clause("dog", 2, position=["left of", 0])],
        [],
        {"cat": [far], "dog": [here, left]},
        1,
        1,
        1,
    ),
    "one of two to the left": (
        [CAT, clause("dog", 2, position=["left of", 0])],
        [],
        {"cat": [here], "dog": [left, far]},
        2 / 3,
        0,
        0,
    ),
    "left of one's own class": (
        [DOG, clause("dog", position=["left of", 0])],
        [],
        {"dog": [here]},
        2 / 3,
        0,
        0,
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_by_hand(name):
    include, exclude, objects, graded, strict, official = VERDICTS[name]
    prompt = {"tag": "any", "include": include, "exclude": exclude}
    verdict = geneval.judge(prompt, objects, is_red)
    expected = {"graded": graded, "strict": strict, "official": official}
    assert verdict == pytest.approx(expected)


# The released code's own scores: `evaluate_reward`, flow_grpo/gen_eval.py of Luo-Yihong/DGPO at
# 01ceb4b, run on these. It and `released` also agree in 60,000 random cases.
# name: include, exclude, objects, the released score, the graded one
LEFT_OF_RED = [RED_CAR, clause("dog", position=["left of", 0])]
RELEASED = {
    "there": ([DOG], [], {"dog": [here]}, 1, 1),
    "nothing": ([DOG], [], {}, 0, 0),
    "five for one": ([DOG], [], {"dog": [here] * 5}, -3, 0),
    "seven for two": ([clause("dog", 2)], [], {"dog": [here] * 7}, -1.5, 0),
    "two kinds, one too many": ([DOG, CAT], [], {"dog": [here] * 4, "cat": [far]}, -1 / 2, 1 / 2),
    "what is excluded": ([DOG], [CAT], {"dog": [here], "cat": [far]}, 1, 1),
    "two of three red": (
        [clause("car", 3, color="red")],
        [],
        {"car": [here, left, far]},
        (1 + 2 / 3) / 2,
        1 / 2,
    ),
    "the wrong count of a color": ([RED_CAR], [], {"car": [here, left]}, 0, 0),
    "one 0 for color and position": (
        [CAT, clause("car", color="red", position=["left of", 0])],
        [],
        {"cat": [here]},
        1 / 3,
        1 / 4,
    ),
    "no position after the wrong color": (
        [CAT, clause("car", color="blue", position=["left of", 0])],
        [],
        {"cat": [here], "car": [left]},
        2 / 3,
        2 / 4,
    ),
    "to the left": (LEFT, [], {"cat": [here], "dog": [left]}, 1, 1),
    "to the right has a 0 and a 1": (LEFT, [], {"cat": [here], "dog": [far]}, 3 / 4, 2 / 3),
    "to one too many": (LEFT, [], {"cat": [here, here], "dog": [left]}, 1 / 3, 2 / 3),
    "to what has the wrong color": (LEFT_OF_RED, [], {"car": [far], "dog": [here]}, 2 / 4, 2 / 4),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_score(name):
    include, exclude, objects, released, graded = RELEASED[name]
    prompt = {"tag": "any", "include": include, "exclude": exclude}
    assert geneval_released.released(prompt, objects, is_red) == pytest.approx(released)
    assert geneval.graded(prompt, objects, is_red) == pytest.approx(graded)


def test_three_rewards_judge_the_same_objects(monkeypatch):
    """One dog is asked for and three are found: graded 0, official 1, released -1."""
    asked = []

    def load_detector(device, model):
        asked.append(model)
        return lambda image, threshold: {"dog": [here, left, far]}

    def load_classifier(device, model):
        asked.append(model)
        return lambda image, name, found: []

    monkeypatch.setattr(geneval, "load_detector", load_detector)
    monkeypatch.setattr(geneval, "load_classifier", load_classifier)
    prompts = [{"prompt": "a dog", "tag": "single_object", "include": [DOG]}]
    models = (None, "mine.pth", "mine,clip", ",clip")
    for module, expected in ((geneval, 0), (geneval_official, 1), (geneval_released, -1)):
        for model in models:
            assert module.load("cpu", model)(torch.rand(1, 3, 8, 8), prompts) == [expected]
    ours, clips = mask2former.URL, geneval.CLIP
    once = [ours, clips, "mine.pth", clips, "mine", "clip", ours, "clip"]
    assert asked == once * 3


def test_the_colour_is_asked_of_the_object_on_grey():
    image = torch.zeros(3, 20, 30)
    image[0, 5:10, 10:20] = 1  # a red bar, of which the left half is masked
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:10, 10:15] = True
    shown = geneval.crop(image, Found((10, 4, 20, 12), 1.0, mask))
    assert shown.shape == (3, 8, 10)
    assert (shown[:, 1:6, :5] == torch.tensor([1.0, 0, 0])[:, None, None]).all()
    assert (shown[:, :, 5:] == geneval.GREY).all() and (shown[:, 0] == geneval.GREY).all()


def test_the_classifier_takes_a_colour_for_each_object(tiny_clip):
    classify = geneval.load_classifier("cpu", str(tiny_clip))
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = [Found((0, 0, 30, 30), 1.0), Found((20, 10, 60, 60), 1.0)]
    colors = classify(image, "circle", found)
    assert len(colors) == 2 and set(colors) <= set(geneval.COLORS)
    assert classify(image, "circle", found[:1]) == colors[:1]
    assert classify(image, "circle", []) == []


def test_a_crop_few_pixels_high_is_a_picture(tiny_clip):
    """A crop of one colour throughout has the same name whatever its height."""
    classify = geneval.load_classifier("cpu", str(tiny_clip))
    high = Found((0, 0, 24, 24), 1.0)
    flat = [Found((0, 0, 24, height), 1.0) for height in (1, 2, 3, 4)]
    names = set()
    for red in (0, 0.5, 1):
        for green in (0, 0.5, 1):
            for blue in (0, 0.5, 1):
                image = torch.tensor([red, green, blue])[:, None, None].expand(3, 24, 24)
                (name,) = classify(image, "circle", [high])
                assert classify(image, "circle", flat) == [name] * 4, (red, green, blue)
                names.add(name)
    assert len(names) > 1


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory):
    pytest.importorskip("scipy", reason="pip install scipy")
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    Mask2FormerImageProcessor(size=size, do_resize=True).save_pretrained(folder)
    return folder


def test_the_detector_finds_boxes_in_the_pictures_own_pixels(tiny_detector):
    detect = geneval.load_detector("cpu", str(tiny_detector))
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(0))
    objects = detect(image, 0.0)
    found = [each for class_ in objects.values() for each in class_]
    assert objects and set(objects) <= set(geneval.CLASSES)
    for each in found:
        left, top, right, bottom = each.box
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 48
        assert each.mask.shape == (48, 80) and each.mask[int(top) : int(bottom)].any()
    for class_ in objects.values():
        scores = [each.score for each in class_]
        assert scores == sorted(scores, reverse=True) and len(scores) <= geneval.MOST
    assert detect(image, 1.0) == {}


def test_mmdets_network_gets_pictures_as_mmdet_does(tiny_detector, tmp_path, monkeypatch):
    """The same weights, but for their mark: another size, the same form of what is found."""
    from transformers import Mask2FormerForUniversalSegmentation

    network = Mask2FormerForUniversalSegmentation.from_pretrained(tiny_detector)
    network.config.mmdet = True
    network.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine.pth").touch()  # converted already, into the folder beside it
    seen = []
    forward = Mask2FormerForUniversalSegmentation.forward

    def watched(self, pixel_values, *rest, **more):
        seen.append(tuple(pixel_values.shape[2:]))
        return forward(self, pixel_values, *rest, **more)

    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "forward", watched)
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(0))
    geneval.load_detector("cpu", str(tiny_detector))(image, 0.0)
    objects = geneval.load_detector("cpu", str(tmp_path / "mine.pth"))(image, 0.0)
    assert seen == [(64, 64), (800, 1344)]
    found = [each for class_ in objects.values() for each in class_]
    assert found and set(objects) <= set(geneval.CLASSES)
    for each in found:
        rows, columns = each.mask.nonzero().unbind(1)
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert each.mask.shape == (48, 80) and each.box == tuple(map(float, edges))


def test_the_reward_end_to_end(tiny_detector, tiny_clip):
    reward = geneval.load("cpu", f"{tiny_detector},{tiny_clip}")
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    prompts = [
        {"prompt": "a dog", "tag": "single_object", "include": [DOG]},
        {"prompt": "a red cat", "tag": "colors", "include": [clause("cat", color="red")]},
    ]
    scores = reward(images, prompts)
    assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)
    with pytest.raises(ValueError, match="no GenEval metadata"):
        reward(images[:1], [{"prompt": "a dog"}])
