"""The world of shapes: its prompts, its drawings, and judges that are exact."""

import random

import pytest
import torch

from tiny_sd35 import shapes

PROMPTS = shapes.prompt_list()
RED_DIAMOND, BLUE_SQUARE = ("red", "diamond"), ("blue", "square")


def drawn(prompts):
    rng = random.Random(0)
    return shapes.paint([shapes.draw_scene(prompt, rng) for prompt in prompts])


def test_the_judges_are_exact_on_drawings_and_noise_is_only_less_clean():
    assert len({prompt["prompt"] for prompt in PROMPTS}) == len(PROMPTS) == 6 + 12 + 12 + 30
    images = drawn(PROMPTS)
    assert shapes.strict(images, PROMPTS) == shapes.graded(images, PROMPTS) == [1.0] * len(PROMPTS)
    assert shapes.cleanness(images, PROMPTS) == [0.0] * len(PROMPTS)

    noisy = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert shapes.strict(noisy, PROMPTS) == [1.0] * len(PROMPTS)
    assert max(shapes.cleanness(noisy, PROMPTS)) < -0.02


def test_a_drawing_has_its_colors_where_its_cells_are():
    image = shapes.paint([[None, RED_DIAMOND, BLUE_SQUARE, None]])[0]
    red, blue = (torch.tensor(shapes.COLORS[color]) / 255 for color in ("red", "blue"))
    assert torch.equal(image[:, 2, 8 + 2], red) and torch.equal(image[:, 8 + 2, 2], blue)
    for y, x in ((0, 0), (0, 8), (7, 10), (10, 7), (15, 15)):
        assert torch.equal(image[:, y, x], shapes.BACKGROUND[:, 0, 0])


@pytest.mark.parametrize(
    ("text", "cells", "grades"),
    [
        ("red diamond", {2: RED_DIAMOND}, [1, 1]),
        ("red diamond", {}, [0, 1]),
        ("red diamond", {2: BLUE_SQUARE}, [0, 1 / 2]),
        ("red diamond", {2: RED_DIAMOND, 3: BLUE_SQUARE}, [1, 1 / 2]),
        ("red diamond", {2: RED_DIAMOND, 3: RED_DIAMOND}, [0, 1 / 2]),
        ("red diamond on the left", {1: RED_DIAMOND}, [1, 1, 0]),
        ("red diamond on the left", {}, [0, 1, 0]),
        ("three red diamonds", {0: RED_DIAMOND, 1: RED_DIAMOND}, [2 / 3, 1]),
        ("red diamond and blue square", {0: RED_DIAMOND}, [1, 0, 1]),
    ],
)
def test_the_grades_by_hand(text, cells, grades):
    """Of each kind, of what else is there, and of the side."""
    (prompt,) = (prompt for prompt in PROMPTS if prompt["prompt"] == text)
    image, mean = shapes.paint([[cells.get(i) for i in range(4)]]), sum(grades) / len(grades)
    assert shapes.graded(image, [prompt]) == pytest.approx([mean])
    assert shapes.strict(image, [prompt]) == [float(mean == 1)]


def test_the_control_has_the_rewards_in_another_order():
    group, images = [PROMPTS[0]] * 60, drawn(PROMPTS)
    rewards, control = shapes.strict(images, group), shapes.shuffled(images, group)
    assert sorted(rewards) == sorted(control) and rewards != control
    assert control == shapes.shuffled(images, group)
