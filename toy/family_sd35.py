"""The methods of methods.py in the trainer of train_sd35.py, and a run of one of them.

What differs by method is a subclass of two functions, see `Family`: where a rollout takes its noise
from, and the gradient. All else is the trainer's, which for DGPO is taken as it is. Randomness is
by (seed, what for, step, prompt, sample), and the same for all methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that a script in toy/ finds dgpo.py

import methods  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import dgpo  # noqa: E402
import records  # noqa: E402
import rewards  # noqa: E402
import sd35  # noqa: E402
import train_sd35  # noqa: E402
from cli import Fault, option  # noqa: E402
from config import read_config  # noqa: E402

GRID = [2 ** (-k / 4) for k in range(24, -1, -1)]  # of the budget: where a run is evaluated
STAYS, FOLLOWED = 0.9, 1.3  # arrived: there since in this share of evaluations, and for that long
SDE_NOISE, EVALUATION = 5, 6  # what a seed is for, after the trainer's own five

Setting = dict[str, Any]  # the arguments that are not as in the world's own .yaml file


@dataclasses.dataclass(frozen=True)
class World:
    quality: str  # what nobody trains on, a function of the world's file
    goal: float  # of the reward, on the validation prompts
    near: float  # a lower one, so that a method which does not arrive can be compared, too
    budget: int  # forwards of a run
    prompts: int  # how many of the validation prompts an evaluation draws, at most
    draws: int  # pictures of each


WORLDS = {
    "words": World("cleanness", 0.97, 0.9, 350_000, 48, 1),
    "shapes": World("cleanness", 0.8, 0.7, 600_000, 24, 4),
}


# The methods, in the trainer.


@dataclasses.dataclass
class Arguments(train_sd35.Arguments):
    """The trainer's, and what the methods have beside it. Their beta, kl and clip are their own."""

    method: str = option("DGPO", "Whose gradient.", choices=["DGPO", "Flow-GRPO", "NFT"])
    sde_noise: float = option(0.0, "The a of the SDE that samples; 0 is the ODE.", at_least=0)
    trained_share: float = option(
        1.0, "Flow-GRPO: of the trajectory's steps, the noisiest.", above=0, at_most=1
    )


@dataclasses.dataclass
class Family(train_sd35.Trainer):
    """The trainer with another rollout, or another gradient.

    For Flow-GRPO, what the step takes for a group's latents (G, C, h, w) is its trajectories
    (G, steps + 1, C, h, w), so that the choice of the extremes is the trainer's, too.
    """

    trajectories: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by group
    log_prob_old: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def sde_times(self) -> Tensor:
        """Euler's times and 0, (steps + 1,), as in the released Flow-GRPO.

        DPM-Solver++'s own stop at t = 1/4, from where an SDE's last step would leave noise.
        """
        euler = sd35.make_scheduler("euler", self.args.flow_shift)
        times = sd35.rollout_times(euler, self.args.num_inference_steps)
        return torch.cat([times, torch.zeros(1)])

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """The trainer's own, or by the SDE, with fresh noise for each sample and time."""
        args, model = self.args, self.model
        if not args.sde_noise:
            return super().rollout(step, p, text)
        online = model.theta_old if step > args.old_after else contextlib.nullcontext
        who = model.reference if args.offline else online
        network = model.velocity(text, args.guidance_scale, who)

        def noise(*key: int) -> Tensor:
            each = (self.noise(key[0], step, p, g, *key[1:]) for g in range(args.group_size))
            return torch.stack(list(each))

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return network(x, t.expand(len(x)), t)

        trajectory = [noise(train_sd35.NOISE)]
        with torch.no_grad():
            for i, (t, s) in enumerate(itertools.pairwise(self.sde_times())):
                mean, std = methods.sde_step(velocity, trajectory[-1], t, s, args.sde_noise)
                trajectory.append(mean + std * noise(SDE_NOISE, i))
        self.trajectories[p] = torch.stack(trajectory, 1)
        return trajectory[-1]

    def draw_and_score(
        self, chosen: list[dict], step: int, clock: records.Clock
    ) -> tuple[dict, dict]:
        latents, scores = super().draw_and_score(chosen, step, clock)
        return self.trajectories if self.args.method == "Flow-GRPO" else latents, scores

    def backward_group(
        self, step: int, p: int, text: str, x0: Tensor, advantages: Tensor, update: int = 0
    ) -> dict[str, Tensor]:
        """The trainer's own, or the gradient of another method's loss, the mean over K times."""
        if self.args.method == "DGPO":
            return super().backward_group(step, p, text, x0, advantages, update)
        if self.args.method == "NFT":
            loss, kl = self.nft(step, p, text, x0, advantages, update)
        else:
            loss, kl = self.flow_grpo(p, text, x0, advantages, update)
        ((loss + self.args.kl * kl) / self.args.prompts_per_step).backward()
        found = dict.fromkeys(("gap", "gate", "clipped"), torch.tensor(math.nan))
        return found | {"loss": loss.detach(), "kl": kl.detach(), "preferred": advantages.any()}

    def nft(
        self, step: int, p: int, text: str, x0: Tensor, advantages: Tensor, update: int
    ) -> tuple[Tensor, Tensor]:
        """DiffusionNFT's loss and a velocity's error, at the times and noise of the trainer's."""
        args, model, K = self.args, self.model, self.args.train_timesteps
        later = (update,) if update else ()
        seed = train_sd35.seeded(args.seed, train_sd35.TIMES, step, *later)
        t = self.times[torch.randperm(len(self.times), generator=seed)[:K], None]  # (K, 1)
        key = train_sd35.TRAINING_NOISE, step, p
        eps = torch.stack([self.noise(*key, k, *later) for k in range(K)])[:, None]
        x0 = x0.float().expand(K, *x0.shape)
        x_t, each_t = dgpo.diffuse(x0, eps, t).flatten(0, 1), t.expand(K, x0.shape[1]).flatten()
        v = model.velocity(text)(x_t, each_t, each_t).view_as(x0)
        with torch.no_grad():
            old = model.velocity(text, who=model.theta_old)(x_t, each_t, each_t).view_as(x0)
            frozen = model.velocity(text, args.reference_guidance_scale, model.reference)
            v_ref = frozen(x_t, each_t, each_t).view_as(x0)
        each_a = advantages.expand(K, -1)
        loss = methods.nft_loss(v, old, eps - x0, t, each_a, args.beta)
        return loss, dgpo.mean_square(v, v_ref).mean()

    def flow_grpo(
        self, p: int, text: str, trajectory: Tensor, advantages: Tensor, update: int
    ) -> tuple[Tensor, Tensor]:
        """Flow-GRPO's loss, and the KL of a step in nats. trajectory: (m, steps + 1, C, h, w).

        The last step has next to no noise, and is not trained, as in the released code.
        """
        args, m, times = self.args, len(trajectory), self.sde_times()
        K, trajectory = trained_steps(args), trajectory.transpose(0, 1)
        x, x_next = trajectory[:K], trajectory[1 : K + 1]
        t, s = (part.view(K, 1, 1, 1, 1) for part in (times[:K], times[1 : K + 1]))

        def policy(who: sd35.Context) -> tuple[Tensor, Tensor]:
            network = self.model.velocity(text, who=who)

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                each_t = t.flatten().repeat_interleave(m)
                return network(x.flatten(0, 1), each_t, each_t).view_as(x)

            return methods.sde_step(velocity, x, t, s, args.sde_noise)

        mean, std = policy(contextlib.nullcontext)
        with torch.no_grad():
            mean_ref, _ = policy(self.model.reference)
        log_prob = methods.gaussian_log_prob(x_next, mean, std)
        if not update:
            self.log_prob_old[p] = log_prob.detach()
        clip = args.clip or math.inf
        each_a = advantages.expand(K, -1)
        loss = methods.flow_grpo_loss(log_prob, self.log_prob_old[p], each_a, clip)
        return loss, ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(2).sum(2).mean()


def trained_steps(args: Arguments) -> int:
    return math.ceil(args.trained_share * (args.num_inference_steps - 1))


def step_cost(args: Arguments) -> int:
    """In forwards of one sample, as methods.iteration_cost: a backward counts 2."""
    P, G = args.prompts_per_step, args.group_size
    trained = P * (args.train_samples or G)
    if args.method == "Flow-GRPO":
        each = 4 * trained_steps(args)
    else:
        looks = args.method == "NFT" or args.clip > 0 or args.bound > 0  # at theta_old
        each = (4 + looks) * args.train_timesteps
    return args.num_inference_steps * P * G + args.updates_per_rollout * each * trained


# A run.


class Evaluation(NamedTuple):
    cost: int  # in forwards
    seconds: float  # of CPU, without those of evaluations
    accuracy: float
    quality: float


@dataclasses.dataclass
class Run:
    budget: int
    evaluations: list[Evaluation]
    arrived: int | None = None  # cost

    @property
    def end(self) -> Evaluation:
        return self.evaluations[-1]

    def restricted(self) -> int:
        """The cost to arrive, or all of the budget."""
        return self.budget if self.arrived is None else self.arrived

    def until(self, budget: int, goal: float) -> Run:
        """What a run of this budget would have been: the beginning of this one."""
        late = (i for i, one in enumerate(self.evaluations, 1) if one.cost >= budget)
        seen = self.evaluations[: next(late, None)]
        return Run(budget, seen, arrival(seen, goal))

    def at(self, cost: float) -> Evaluation:
        return [one for one in self.evaluations if one.cost <= cost][-1]


def arrival(evaluations: list[Evaluation], goal: float) -> int | None:
    """The cost from which on a run is there: at the end, and nine times in ten until then."""
    there = [one.accuracy >= goal for one in evaluations]
    for k, one in enumerate(evaluations):
        stays = there[k] and there[-1] and sum(there[k:]) >= STAYS * len(there[k:])
        if stays and evaluations[-1].cost >= FOLLOWED * one.cost:
            return one.cost
    return None


def config(world: str) -> list[str]:
    """The world's own .yaml file as a command line, its paths from the repository's root."""
    found = read_config(str(ROOT / "toy" / f"{world}.yaml"), train_sd35.Arguments)
    return [re.sub(r"(^|=)toy/", rf"\1{ROOT}/toy/", word) for word in found]


def arguments(world: str, setting: Setting, seed: int) -> Arguments:
    """Of a run; the schedule of the learning rate ends with the budget. Raises Fault."""
    line = [*config(world), "--seed", str(seed)]
    for name, value in setting.items():
        if value is not None:
            line += [f"--{name}", *([] if value is True else [str(value)])]
    wanted = train_sd35.read_arguments(Arguments, line).train_timesteps
    args = train_sd35.parse_args([*line, "--train_timesteps", "1"], Arguments)
    args.train_timesteps = min(wanted, len(train_sd35.trained_times(args)))
    args.max_train_steps = math.ceil(WORLDS[world].budget / step_cost(args))
    return args


def prepare(args: Arguments) -> tuple[Family, sd35.Encoder]:
    """A trainer at its first step, with its reward, and what encodes prompts."""
    accelerator = train_sd35.launch(args)
    pipe = sd35.load_pipeline(args.pretrained_model_name_or_path, torch.float32)
    encode = sd35.Encoder(pipe, args.max_sequence_length, accelerator.device)
    trainer = Family(**vars(train_sd35.build(args, accelerator, pipe)))
    trainer.trained_on = train_sd35.load_rewards(args, accelerator.device, "reward")
    return trainer, encode


@torch.no_grad()
def draw(trainer: Family, prompts: list[dict]) -> Tensor:
    """A picture of each prompt by the saved average, from noise that is the same in every run."""
    model, args, images = trainer.model, trainer.args, []
    shape = model.latent_shape
    with model.saved_average():
        for i in range(0, len(prompts), 48):
            encoded = [model.encoded[prompt["prompt"]] for prompt in prompts[i : i + 48]]
            numbers = range(i, i + len(encoded))
            noise = [
                torch.randn(shape, generator=train_sd35.seeded(EVALUATION, n)) for n in numbers
            ]
            latents = model.pipe(
                prompt_embeds=torch.cat([one.embeds for one in encoded]),
                pooled_prompt_embeds=torch.cat([one.pooled for one in encoded]),
                latents=torch.stack(noise),
                num_inference_steps=args.eval_inference_steps,
                guidance_scale=1,
                output_type="latent",
            ).images
            images.append(sd35.decode(model.pipe.vae, latents))
    return torch.cat(images)


def run_setting(world: str, setting: Setting, seed: int, budget: int) -> list[Evaluation]:
    """One training run: its evaluations. It ends with the budget, or when it has arrived to stay.

    A run that blows up ends there.
    """
    torch.set_num_threads(1)
    about, args = WORLDS[world], arguments(world, setting, seed)
    trainer, encode = prepare(args)
    training, validation = train_sd35.read_prompts(args)
    validation = validation[: about.prompts]
    watched = [prompt for prompt in validation for _ in range(about.draws)]
    names = [args.reward[0], f"{ROOT}/toy/{world}.py:{about.quality}"]
    watched_by = {name: rewards.load(name, trainer.device) for name in names}

    def evaluate(cost: int, seconds: float) -> Evaluation:
        images = draw(trainer, watched)
        scores = [rewards.score(*each, images, watched).mean() for each in watched_by.items()]
        return Evaluation(cost, round(seconds, 2), *(float(f"{score:.4g}") for score in scores))

    def encode_all(prompts: list[dict]) -> None:
        texts = [prompt["prompt"] for prompt in [*prompts, *validation]]
        trainer.model.encoded = encode(texts, trainer.model.encoded)

    encode_all([])
    found, cost, seconds = [evaluate(0, 0.0)], 0, 0.0
    grid = [share * about.budget for share in GRID if share * about.budget <= budget * 1.001]
    for step in itertools.count():
        chosen = train_sd35.prompts_of_step(training, args, step)
        encode_all(chosen)
        start = time.process_time()
        trainer.optimizer.param_groups[0]["lr"] = train_sd35.learning_rate(args, step)
        try:
            if trainer.take_step(chosen, step)["grad_norm"] is None:
                return found
        except Fault as end:
            if "finite" not in str(end):  # it is the reward that failed
                raise
            return found
        trainer.follow(step)
        seconds, cost = seconds + time.process_time() - start, cost + step_cost(args)
        if cost < grid[0]:
            continue
        grid = [due for due in grid if due > cost]
        found.append(evaluate(cost, seconds))
        if not grid or arrival(found, about.goal) is not None:
            return found
