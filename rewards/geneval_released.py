"""GenEval's score as DGPO and Flow-GRPO were trained on it, quirks and all, to reproduce them.

`geneval` grades the same objects without the quirks, which are, in the order of the code:

- The count's grade, 1 - |count - found| / count, has no floor: five dogs for one asked give -3.
- A clause of the wrong count has one 0 for its color and position together.
- The color's grade is the share of the objects that have it, and a wrong one ends the clause.
- A position is right only to a clause whose count and color are exact.
- After the check of a position a 1 is added, so that the wrong one has the grades 0 and 1.
- What the prompt excludes plays no part.

Both also hand the detector RGB where mmdet expects BGR, and Flow-GRPO's server scores JPEG files of
quality 75: this is not copied. Source: `evaluate_reward` in flow_grpo/gen_eval.py of
Luo-Yihong/DGPO at 01ceb4b, the same as in reward_server/gen_eval.py of yifan123/reward-server.
"""

from __future__ import annotations

import torch

from rewards import geneval
from rewards.geneval import check_prompt  # noqa: F401 (asked for by name)


def released(prompt: dict, objects: geneval.Objects, name_colors: geneval.NameColors) -> float:
    """The released score, at most 1 and without a least value."""
    grades = []
    met: list[list[geneval.Found] | None] = []  # for each clause its objects, if all is exact
    for clause in prompt["include"]:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])
        exact = len(found) == count
        grades.append(1 - abs(count - len(found)) / count)
        if not exact and ("color" in clause or "position" in clause):
            grades.append(0.0)
        if exact and "color" in clause:
            right = name_colors(name, found).count(clause["color"])
            grades.append(right / count)
            exact = right == count
        if exact and "position" in clause:
            relation, other = clause["position"]
            others = met[other]
            exact = others is not None and all(
                relation in geneval.relations(a, b) for a in found for b in others
            )
            grades += [] if exact else [0.0]
            grades += [] if others is None else [1.0]
        met.append(found if exact else None)
    return sum(grades) / len(grades)


def load(device: torch.device | str, model: str | None = None):
    """The released score, to be maximised. Otherwise as `rewards.geneval.load`."""
    return geneval.load(device, model, released)
