"""GenEval's score as DGPO and Flow-GRPO were trained on it, including its quirks.

`geneval` grades the same objects without them. In the order of the code:

- The grade of the number, 1 - |count - number| / count, has no floor: five dogs for one give -3.
- A clause with the wrong number has a single 0 for its color and position.
- The grade of the color is the share of the objects that have it; a wrong one ends the clause.
- A position is right only relative to a clause whose number and color are exact.
- A 1 is added after the check of a position, so that a wrong one has the grades 0 and 1.
- What the prompt excludes is ignored.

Source: `evaluate_reward` in flow_grpo/gen_eval.py of Luo-Yihong/DGPO at 01ceb4b, the same as in
reward_server/gen_eval.py of yifan123/reward-server.
"""

from __future__ import annotations

import torch

from rewards import Reward, geneval

check_prompt = geneval.check_prompt


def released(prompt: dict, objects: geneval.Objects, name_colors: geneval.NameColors) -> float:
    """The released score: at most 1, with no lower bound."""
    grades = []
    met: list = []  # each clause's objects, or None if not all is exact
    for clause in prompt["include"]:
        name, count = clause["class"], clause["count"]
        detections = objects.get(name, [])
        exact = len(detections) == count
        grades.append(1 - abs(count - len(detections)) / count)
        if not exact and ("color" in clause or "position" in clause):
            grades.append(0.0)
        if exact and "color" in clause:
            right = name_colors(name, detections).count(clause["color"])
            grades.append(right / count)
            exact = right == count
        if exact and "position" in clause:
            relation, other = clause["position"]
            others = met[other]
            exact = others is not None and all(
                relation in geneval.relations(a, b) for a in detections for b in others
            )
            grades += [] if exact else [0.0]
            grades += [] if others is None else [1.0]
        met.append(detections if exact else None)
    return sum(grades) / len(grades)


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """The released score. Otherwise as `rewards.geneval.load`."""
    return geneval.load(device, model, released)
