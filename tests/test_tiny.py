"""On the tiny SD3.5, a run of DGPO is the trainer's, and every method's step costs what it says."""

from dataclasses import replace

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from lab import tiny as lab
from lab.protocol import Diverged, Goal
from sd35.lora import LORA_FILE


@pytest.fixture
def world(tiny, monkeypatch):
    """A function that makes "shapes" a world of the untrained pipeline. Returns its settings."""

    def make(best=2.0):
        how = {"group_size": 4, "prompts_per_step": 2, "num_inference_steps": 3, "t_min": 0.2}
        how |= {"guidance_scale": 1, "beta": 10, "kl": 0.1, "clip": 0, "std": "group"}
        how |= {"old_after": 1000, "ema_steps": 2, "micro_batch_size": 120, "learning_rate": 1e-2}
        how["validation_prompts"] = f"{tiny}/prompts.jsonl"
        settings, goal = tiny_run.settings(tiny, "unused", **how), Goal(best, hold=1.3)
        monkeypatch.setattr(lab, "settings_of", lambda world: settings)
        monkeypatch.setitem(lab.WORLDS, "shapes", lab.World("shapes", goal, goal, 4000, 2, 1))
        return how

    return make


def test_bounded_dgpo_is_the_trainer_bit_for_bit(tiny, world, tmp_path):
    changed = {"train_samples": 2, "bound": 2.0, "updates_per_rollout": 2}
    how = world()
    training = lab.Training("shapes", 0, replace(lab.base_setting("shapes"), **changed))
    for step in range(3):
        training.step(step)
    tiny_run.run(tiny, tmp_path / "run", **how, **changed)
    saved = load_file(tmp_path / "run" / LORA_FILE)
    names = [n for n, p in training.model.pipe.transformer.named_parameters() if p.requires_grad]
    assert len(names) == len(saved) > 10
    for name, average in zip(names, training.model.average, strict=True):
        scale = 2 if "lora_B" in name else 1  # alpha / rank, which is folded into the saved LoRA
        assert torch.equal(saved[f"transformer.{name.replace('.default', '')}"], scale * average)


METHODS = {
    "DGPO": {"clip": 0.1},
    "Flow-GRPO": {"sde_noise": 0.7, "train_samples": 2, "trained_share": 0.5},
    "DiffusionNFT": {"updates_per_rollout": 2},
    "Diffusion-DPO": {"sde_noise": 0.7},
    "GPO": {"offline": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_theta_and_costs_what_the_network_evaluated(method, world, monkeypatch):
    world()
    setting = replace(lab.base_setting("shapes"), method=method, **METHODS[method])
    training, counted = lab.Training("shapes", 0, setting), []
    forward = training.model.pipe.transformer.forward

    def watched(*args, **inputs):
        output = forward(*args, **inputs)
        counted.append(len(inputs["hidden_states"]) * (3 if output[0].requires_grad else 1))
        return output

    monkeypatch.setattr(training.model.pipe.transformer, "forward", watched)
    before = [parameter.detach().clone() for parameter in training.model.theta]
    training.step(0)
    assert sum(counted) == training.step_cost
    assert not all(map(torch.equal, before, training.model.theta))


def test_a_run_ends_with_its_budget_or_once_it_holds_the_goal_or_diverges(world, monkeypatch):
    world()
    run = lab.run("shapes", 0, lab.base_setting("shapes"), 500)
    costs = [one.cost for one in run.evaluations]
    assert costs[0] == 0 and costs[-2] < 500 <= costs[-1] and run.reached is None
    world(best=run.evaluations[0].reward + 1e-3)
    run = lab.run("shapes", 0, lab.base_setting("shapes"), 4000)
    assert run.reached and run.end.cost < 4000
    monkeypatch.setattr(lab.Training, "step", lambda *_: (_ for _ in ()).throw(Diverged))
    assert len(lab.run("shapes", 0, lab.base_setting("shapes"), 500).evaluations) == 1
