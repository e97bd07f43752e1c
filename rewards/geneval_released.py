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


def released(task: geneval.Task, objects: geneval.Objects, colors: geneval.NameColors) -> float:
    """The released score: at most 1, with no lower bound."""
    grades = []
    met: list[
        list[geneval.Detection] | None
    ] = []  # each clause's objects, or None if not all is exact
    for clause in task.include:
        every = objects.get(clause.name, [])
        exact = len(every) == clause.count
        grades.append(1 - abs(clause.count - len(every)) / clause.count)
        if not exact and (clause.color or clause.position):
            grades.append(0.0)
        if exact and clause.color:
            right = colors(clause.name, every).count(clause.color)
            grades.append(right / clause.count)
            exact = right == clause.count
        if exact and clause.position:
            relation, others = clause.position[0], met[clause.position[1]]
            exact = others is not None and all(
                relation in geneval.relations(a, b) for a in every for b in others
            )
            grades += [] if exact else [0.0]
            grades += [] if others is None else [1.0]
        met.append(every if exact else None)
    return sum(grades) / len(grades)


def load(device: torch.device | str, model: str | None = None) -> Reward:
    """The released score, to be maximised. Otherwise as `rewards.geneval.load`."""
    return geneval.load(device, model, released)
