"""A training run of any method on a tiny SD3.5: the classes of Stable Diffusion 3.5, on a CPU.

The worlds are tiny_sd35/words.py, whose images a real OCR network reads, and tiny_sd35/shapes.py,
with an exact checker. The step is that of train_sd35.py; methods differ in the rollout's noise and
in the gradient. Randomness is by (seed, purpose, step, prompt, sample), and the same for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dgpo
import rewards
from lab import methods
from lab.methods import Setting
from lab.protocol import Diverged, Evaluation, Goal, Plan, Range, Run, follow
from sd35 import gradient, lora, prompts
from sd35 import model as sd35
from sd35.encoder import Encoder
from sd35.settings import Settings, UserError, learning_rate_at, parse

SDE_NOISE, EVALUATION = 5, 6  # what a seed is for, after sd35.model's five
GRID = [2 ** (-k / 4) for k in range(24, -1, -1)]  # shares of the budget: where a run is evaluated


@dataclasses.dataclass(frozen=True)
class World:
    kind: str  # "words" or "shapes"
    goal: Goal  # accuracy on the validation prompts; quality is cleanness, which no run trains on
    lower: Goal  # to compare methods that do not reach the other
    budget: int  # forward passes of a run that is reported
    prompts: int  # how many of the validation prompts an evaluation draws, at most
    draws: int  # images of each


WORDS = World("words", Goal(0.97, hold=1.3), Goal(0.9, hold=1.3), 350_000, 48, 1)
WORLDS = {
    "words": WORDS,
    **dict.fromkeys(("words-2", "words-3"), WORDS),  # other pretrainings of this world
    "shapes": World("shapes", Goal(0.8, hold=1.3), Goal(0.7, hold=1.3), 600_000, 24, 4),
}

make = WORLDS.__getitem__

RUNGS = ((1, 1 / 8, 4), (1, 1 / 2, 2), (1, 1.0, 1))
CHEAP = dict(num_inference_steps=5, updates_per_rollout=2, train_samples=4, train_timesteps=2)
PLAN = Plan(drawn=10, around=2, rounds=1, most_rounds=3, rungs=RUNGS, cheap=CHEAP, works=0.25)
# Where a search has other choices than the methods' rows; None: no choice.
SPACE = {"learning_rate": Range(5e-4, 5e-3), "prompts_per_step": (4, 8), "t_min": (0.2, 0.6)}
SPACE |= {"num_inference_steps": (5, 10), "decay": None, "average": None, "ema": None}
SPACE |= {"stratified": None}  # the trainer's timesteps are drawn without replacement
SEEDS = (0, 1, 2)  # of a report

FIELDS = {field.name for field in dataclasses.fields(Setting)} - {"clip"}
FIELDS &= {field.name for field in dataclasses.fields(Settings)}  # what the trainer has, too


@cache
def settings_of(world: str) -> Settings:
    """The trainer's settings in a world's .yaml file, for the pipeline in tiny_sd35/out/<world>."""
    folder = f"tiny_sd35/out/{world}"
    flags = ["--config", f"tiny_sd35/{make(world).kind}.yaml", "--model", folder]
    flags += ["--train_prompts", f"{folder}/prompts.jsonl"]
    return parse(Settings, [*flags, "--validation_prompts", f"{folder}/held_out.jsonl"])


def base_setting(world: str) -> Setting:
    """The hyperparameters in the world's .yaml file."""
    settings = settings_of(world)
    return Setting(**{name: getattr(settings, name) for name in FIELDS})


def origin(world: str) -> str:
    """A hash of the pipeline that runs begin with, as machines may pretrain different ones."""
    folder = Path(settings_of(world).pretrained_model_name_or_path)
    weights = sorted(folder.glob("transformer/*.safetensors"))
    if not weights:
        command = f"python -m tiny_sd35.{make(world).kind} --out {folder}"
        raise UserError(f"there is no pipeline in {folder}; run `{command}` first")
    return "-" + hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]


class Training:
    """A training run; `step` takes its next step."""

    def __init__(self, world: str, seed: int, setting: Setting):
        changed = {name: getattr(setting, name) for name in FIELDS}
        changed |= {"seed": seed, "train_timesteps": 1}
        self.setting, self.settings = setting, dataclasses.replace(settings_of(world), **changed)
        settings, self.log_probs = self.settings, {}
        pipe = sd35.load_pipeline(settings.pretrained_model_name_or_path, torch.float32)
        encode = Encoder(pipe, settings.max_sequence_length, torch.device("cpu"))
        pipe.scheduler = sd35.make_scheduler(settings.sampler, settings.flow_shift)
        theta = lora.add_lora(pipe.transformer, settings.rank, settings.lora_alpha, seed)
        decay = settings.adam_weight_decay
        self.optimizer = torch.optim.AdamW(theta, settings.learning_rate, weight_decay=decay)
        self.model = sd35.Model(pipe, theta, settings.resolution, int(settings.micro_batch_size))
        self.prompts = prompts.load(settings.train_prompts)
        self.validation = prompts.load(settings.validation_prompts)
        texts = [prompt["prompt"] for prompt in self.prompts + self.validation]
        self.model.encoded = encode(texts, {})
        self.reward = rewards.load(settings.reward[0], self.model.device)

        self.times = sd35.trained_times(settings)
        euler = sd35.make_scheduler("euler", settings.flow_shift)  # as in Flow-GRPO's code
        times = sd35.rollout_times(euler, settings.num_inference_steps)
        self.sde_times = torch.cat([times, torch.zeros(1)])
        self.K = min(setting.train_timesteps, len(self.times))
        if setting.method == "Flow-GRPO":  # its last step has next to no noise, and is not trained
            self.K = math.ceil(setting.trained_share * (settings.num_inference_steps - 1))
        self.step_cost = methods.step_cost(setting, self.K)
        settings.max_train_steps = math.ceil(make(world).budget / self.step_cost)

    def noise(self, *key: int) -> Tensor:
        generator = sd35.seeded(self.settings.seed, *key)
        return torch.randn(self.model.latent_shape, generator=generator)

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """The trajectories of a group (steps + 1, G, C, h, w); by the ODE, its end alone."""
        model, settings, G = self.model, self.settings, self.setting.group_size

        def noise(*key: int) -> Tensor:
            each = (self.noise(key[0], step, p, g, *key[1:]) for g in range(G))
            return torch.stack(list(each))

        network = model.reference if self.setting.offline else contextlib.nullcontext
        if not self.setting.sde_noise:
            with network():
                steps, guidance = settings.num_inference_steps, settings.guidance_scale
                return model.sample(text, noise(sd35.NOISE), steps, guidance)[None]
        v, fresh = model.velocity(text, settings.guidance_scale, network), partial(noise, SDE_NOISE)
        velocity, start = lambda x, t: v(x, t.expand(len(x)), t), noise(sd35.NOISE)
        how = self.sde_times, fresh, self.setting.sde_noise
        return methods.sample_sde(velocity, start, *how)

    def step(self, step: int) -> None:
        """Lines 3 to 15 of Algorithm 1, with U updates. Raises Diverged."""
        settings, setting, model = self.settings, self.setting, self.model
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(settings, step)
        chosen = prompts.prompts_of_step(self.prompts, settings, step)
        rollouts, scores = [], []
        for p, prompt in enumerate(chosen):
            rollouts.append(self.rollout(step, p, prompt["prompt"]))
            images = model.decode(rollouts[-1][-1])
            if not images.isfinite().all():
                raise Diverged
            of_group = [prompt] * len(images)
            scores.append(rewards.score(settings.reward[0], self.reward, images, of_group)[0])

        scores = torch.stack(scores)
        combined = partial(gradient.combine_advantages, {"": (1.0, scores)}, settings.std)
        samples = torch.arange(setting.group_size).expand_as(scores)
        if (m := methods.trained_samples(setting)) < setting.group_size:
            samples = gradient.extremes(combined("rewards"), m).sort(1).values
        advantages = combined("rewards", samples)
        # Without a preference, what is left of the loss is the KL.
        trained = scores.isfinite().all(1) & ((advantages != 0).any(1) | (setting.kl > 0))

        self.log_probs.clear()
        for update in range(setting.updates_per_rollout):
            self.optimizer.zero_grad()
            for p in trained.nonzero()[:, 0].tolist():
                group = rollouts[p][:, samples[p]], scores[p, samples[p]], advantages[p]
                self.backward((step, p), update, chosen[p]["prompt"], group)
            norm = nn.utils.clip_grad_norm_(model.theta, settings.max_grad_norm)
            if not norm.isfinite():
                raise Diverged
            self.optimizer.step()

        n = step + 1
        dgpo.ema_update(model.old, model.theta, min(settings.old_ema_decay, 0.001 * step))
        if (n + 1) % settings.ema_steps == 0:
            decay = min((1 + n) / (10 + n), settings.ema_decay) ** settings.ema_updates
            dgpo.ema_update(model.average, model.theta, decay)

    def backward(self, key: tuple, update: int, text: str, group: tuple) -> None:
        """Add the gradient of one group to .grad.

        key: step and p. group: its trajectory (steps + 1, m, C, h, w), scores and advantages (m,).
        """
        model, settings, K, (trajectory, scores, A) = self.model, self.settings, self.K, group
        reference = model.velocity(text, settings.reference_guidance_scale, model.reference)
        networks = model.velocity(text), reference, model.velocity(text, network=model.theta_old)
        how, share = (networks, self.setting), 1 / settings.prompts_per_step
        if self.setting.method == "Flow-GRPO":
            steps = trajectory[: K + 1, None], self.sde_times[: K + 1], A[None]
            old = self.log_probs.get(key)
            self.log_probs[key] = methods.backward_flow_grpo(*how, *steps, old, share)
            return
        later = (update,) if update else ()
        generator = sd35.seeded(settings.seed, sd35.TIMES, key[0], *later)
        t = self.times[torch.randperm(len(self.times), generator=generator)[:K], None]
        eps = [self.noise(sd35.TRAINING_NOISE, *key, k, *later) for k in range(K)]
        x0 = trajectory[-1].float().expand(K, *trajectory[-1].shape)
        each = torch.stack(eps)[:, None], t, scores.expand(K, -1), A.expand(K, -1)
        methods.backward(*how, x0, *each, share)


@torch.no_grad()
def draw(model: sd35.Model, watched: list[dict], steps: int) -> Tensor:
    """An image of each prompt by the saved average, from noise that is the same in every run."""
    images = []
    with model.saved_average():
        for i in range(0, len(watched), 48):
            encoded = [model.encoded[prompt["prompt"]] for prompt in watched[i : i + 48]]
            generators = (sd35.seeded(EVALUATION, i + n) for n in range(len(encoded)))
            noise = [torch.randn(model.latent_shape, generator=each) for each in generators]
            latents = model.pipe(
                prompt_embeds=torch.cat([one.embeds for one in encoded]),
                pooled_prompt_embeds=torch.cat([one.pooled for one in encoded]),
                latents=torch.stack(noise),
                num_inference_steps=steps,
                guidance_scale=1,
                output_type="latent",
            ).images
            images.append(sd35.decode(model.pipe.vae, latents))
    return torch.cat(images)


def run(name: str, seed: int, setting: Setting, budget: float) -> Run:
    """A training run. It ends when the budget is spent, or when it has reached and held the goal.

    The learning rate's schedule is that of the world's whole budget. A diverging run ends there.
    """
    world, training = make(name), Training(name, seed, setting)
    settings, model = training.settings, training.model
    validation = training.validation[: world.prompts]
    watched = [prompt for prompt in validation for _ in range(world.draws)]
    quality = f"tiny_sd35.{world.kind}:cleanness"
    judges = {settings.reward[0]: training.reward, quality: rewards.load(quality, model.device)}

    def costs() -> Iterator[int]:
        yield 0
        for step in itertools.count():
            training.step(step)
            yield (step + 1) * training.step_cost

    def evaluate(cost: int) -> Evaluation:
        images = draw(model, watched, settings.eval_inference_steps)
        scores = [rewards.score(*judge, images, watched)[0].mean() for judge in judges.items()]
        accuracy, cleanness = (float(f"{score:.4g}") for score in scores)
        return Evaluation(cost, accuracy, cleanness)

    def due(cost: int) -> float:
        return next((share for share in GRID if share * world.budget > cost), 1) * world.budget

    def end(run: Run) -> float:
        return math.inf if run.reached is None else 0

    return follow(costs(), world.goal, budget, evaluate, due, end)
