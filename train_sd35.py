"""Algorithm 1 of DGPO (arXiv:2510.08425) on Stable Diffusion 3.5 Medium with LoRA.

    python train_sd35.py --reward pickscore                       # one GPU
    accelerate launch train_sd35.py --reward pickscore            # all GPUs of a machine, or more

The method is dgpo.py's, the model sd35.py's, and the arguments are in recipes.py. This file is what
surrounds them: the step, what is logged and saved, and the loop, which is Algorithm 1.
"""

# ruff: noqa: E402 (a wrong argument is answered before the libraries are loaded)

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also for `python -I`

import cli
import config
from cli import Fault, Stopped, first_line
from recipes import Arguments, read_arguments, task_of

if __name__ == "__main__":
    cli.run("train_sd35.py", read_arguments)

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it speaks of parts not used here
os.environ["MPLBACKEND"] = "agg"  # no window, and whatever the environment asks for

import huggingface_hub
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import dgpo
import prompts as prompt_sets
import records
import rewards
import sd35
from records import Clock

NOISE, TIMES, TRAINING_NOISE, ORDER, VALIDATION = range(5)  # what a seed is for


def parse_args(argv: list[str] | None = None, arguments: type = Arguments) -> Any:
    """The arguments, resolved and checked as far as can be without loading a model."""
    args = read_arguments(arguments, argv)
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if not args.print_arguments:  # what is printed is for any machine
        args.mixed_precision = args.mixed_precision or ("bf16" if bf16 else "no")
    if args.mixed_precision == "bf16" and cuda and not bf16:
        raise Fault("argument --mixed_precision: this GPU has no bf16; give no")
    scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    for flag in ("num_inference_steps", "eval_inference_steps"):
        steps = getattr(args, flag)
        different = len(sd35.rollout_times(scheduler, steps).unique())
        if different < steps and args.sampler == "dpm++":  # which asks for each time by its name
            raise Fault(
                f"argument --{flag}: at --flow_shift {args.flow_shift:g}, only {different} of "
                f"{steps} times are different; give fewer steps, or --sampler euler"
            )
    above = len(trained_times(args))
    if above < args.train_timesteps:
        raise Fault(
            f"argument --train_timesteps: only {above} of the rollout's {args.num_inference_steps} "
            f"times are at least --t_min {args.t_min}, got {args.train_timesteps}"
        )
    m, G = args.train_samples or 2, args.group_size
    if m % 2 or m > G:
        raise Fault(f"argument --train_samples: must be even, at most --group_size {G}, got {m}")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise Fault(f"argument --report_to: needs `pip install {args.report_to}`")
    if args.push_to_hub and not huggingface_hub.get_token():
        raise Fault("argument --push_to_hub: needs a token; do `hf auth login`, or set HF_TOKEN")
    check_inputs(args)
    return args


def check_inputs(args: Arguments) -> None:
    """Raises Fault if prompts cannot be read, or a reward is none, or has no effect as given."""
    try:
        for flag in ("train_prompts", "validation_prompts"):
            if (name := getattr(args, flag)) is not None:
                prompt_sets.load(name)
        flag = "reward"
        rewards.parse_all(args.reward)
        flag = "eval_reward"
        for name in rewards.parse_all(args.eval_reward).keys() & rewards.parse_all(args.reward):
            raise ValueError(f"{name} is trained on, and so it is watched; leave it out here")
        used = rewards.parse_all(args.reward + args.eval_reward)  # what is trained on is watched
        for spec in args.eval_reward:
            if spec not in used:
                raise ValueError(f"what is only watched has no weight, got {spec}")
        flag = "reward_model"
        rewards.check_models(cli.pairs(args.reward_model), used)
    except ValueError as error:
        raise Fault(f"argument --{flag}: {error}") from None


def trained_times(args: Arguments) -> Tensor:
    """Those of the rollout's own times that are at least t_min, noisiest first."""
    scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    times = sd35.rollout_times(scheduler, args.num_inference_steps)
    return times[times >= args.t_min]


def seeded(*key: int) -> torch.Generator:
    """Randomness of its own for (seed, what for, step, ...), the same on any process."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def prompts_of_step(prompts: list[dict], args: Arguments, step: int) -> list[dict]:
    """Line 3: P prompts. The set is gone through in an order of its own in every epoch."""
    chosen = []
    for i in range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step):
        epoch, position = divmod(i, len(prompts))
        order = torch.randperm(len(prompts), generator=seeded(args.seed, ORDER, epoch))
        chosen.append(prompts[order[position]])
    return chosen


Scores = dict[str, tuple[float, Tensor]]  # by the reward's name: its weight, and (P, G)


def group_advantages(args: Arguments, scores: Scores, samples: Tensor | None = None) -> Tensor:
    """Line 7: advantages (P, G) of one or several rewards; or (P, m), among these samples (P, m).

    Several rewards are summed, and the sum standardised; or each is standardised by itself, and
    A = sum_k w_k A_k. Each A_k sums to zero over a group, and so does A: log Z(c) cancels as it
    does with one reward. A group with a score that is not finite gets zeros, and is not in the
    batch's std. Raises Fault if there is no other.
    """
    summed = sum(weight * values for weight, values in scores.values())
    finite = summed.isfinite().all(1)
    if not finite.any():
        raise Fault("no group of a step has finite rewards; mend the reward")
    terms = [(1.0, summed)] if args.combine == "rewards" else scores.values()
    if samples is None:
        samples = torch.arange(summed.shape[1]).expand_as(summed)
    advantages = torch.zeros(samples.shape)
    for weight, values in terms:
        values = values.gather(1, samples)[finite]
        found = dgpo.group_advantages(values, args.std, eps=1e-4, clamp=5.0)
        advantages[finite] += weight * found
    return advantages


def trained_samples(args: Arguments, scores: Scores) -> Tensor:
    """The samples (P, m) of each group that are trained on, in their order: all, or the extremes.

    The latter are those of the advantages in the whole group, however these are combined.
    """
    advantages = group_advantages(args, scores)
    if not args.train_samples:
        return torch.arange(args.group_size).expand_as(advantages)
    return dgpo.extremes(advantages, args.train_samples).sort(1).values


def learning_rate(args: Arguments, step: int) -> float:
    """A function of the step and the arguments, so that no checkpoint has to hold it."""
    warmup = args.lr_warmup_steps
    if step < warmup:
        return args.learning_rate * step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, args.max_train_steps - warmup))
    return args.learning_rate * (cosine if args.lr_scheduler == "cosine" else 1)


@dataclass
class Trainer:
    """What the steps need, and how far they have come."""

    args: Arguments
    accelerator: Accelerator
    model: sd35.Model
    optimizer: torch.optim.Optimizer
    times: Tensor  # that a group may be trained at
    trained_on: dict[str, tuple[float, rewards.Reward]] = field(default_factory=dict)
    done: int = 0  # steps
    bad_steps: int = 0  # the last ones, of a gradient that was not finite

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def own(self, groups: Sequence) -> Sequence:
        """Those of a step's groups that are this process's: whole ones, every N-th."""
        return groups[self.accelerator.process_index :: self.accelerator.num_processes]

    def noise(self, *key: int) -> Tensor:
        """eps (C, h, w) on the CPU, from its own seed."""
        return torch.randn(self.model.latent_shape, generator=seeded(self.args.seed, *key))

    def take_step(self, chosen: list[dict], step: int) -> dict[str, Any]:
        """Lines 4 to 14 of Algorithm 1. Returns the step's metrics, on every process.

        chosen: the step's prompts, line 3. Raises Fault if a reward fails or no group has rewards
        that are finite, and Stopped on every process if one has got a signal.
        """
        clock = Clock(self.device)
        latents, scores = self.draw_and_score(chosen, step, clock)  # lines 4 to 6
        with clock("train"):
            samples = trained_samples(self.args, scores)
            advantages = group_advantages(self.args, scores, samples)  # line 7
            finite = torch.stack([values for _, values in scores.values()]).isfinite().all(2).all(0)
            # Without a preference, what is left of the loss is the KL.
            trained = finite & ((advantages != 0).any(1) | (self.args.kl > 0))
            work = [
                (p, chosen[p]["prompt"], x0[samples[p]], advantages[p])
                for p, x0 in latents.items()
                if trained[p]
            ]
            groups, grad_norm = self.learn(step, work, bool(trained.any()))
        return {
            "step": step + 1,
            **records.reward_metrics(scores, advantages, finite),
            **records.mean_over_processes(groups),
            "grad_norm": grad_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **clock.metrics(len(chosen) * self.args.group_size),
        }

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """Line 4: a group's latents (G, C, h, w), by theta_old, or offline by the reference."""
        args, model = self.args, self.model
        noise = torch.stack([self.noise(NOISE, step, p, g) for g in range(args.group_size)])
        online = model.theta_old if step > args.old_after else contextlib.nullcontext
        with model.reference() if args.offline else online():
            return model.sample(text, noise, args.num_inference_steps, args.guidance_scale)

    def draw_and_score(
        self, chosen: list[dict], step: int, clock: Clock
    ) -> tuple[dict[int, Tensor], Scores]:
        """Lines 4 to 6: the latents of this process's groups, and all groups' scores.

        While a group is scored, the next is drawn. It then waits for the former's scores, so that
        no images pile up.
        """
        latents, scoring, worker = {}, {}, futures.ThreadPoolExecutor(1, "reward")
        try:
            for p in self.own(range(len(chosen))):
                with clock("rollout"):
                    latents[p] = self.rollout(step, p, chosen[p]["prompt"])
                with clock("decode"):
                    images = self.model.decode(latents[p])
                with clock("wait"):
                    self.wait(scoring.values())
                scoring[p] = worker.submit(self.score, images, chosen[p], clock)
            with clock("wait"):
                self.wait(scoring.values())
            rows = [(p, scores.result()) for p, scores in scoring.items()]
        except Stopped:  # a process that waits for this one must hear of it
            rows = [(-1, None)]
        finally:
            worker.shutdown(wait=False)
        rows = [scores for _, scores in sorted(gather_object(rows), key=lambda row: row[0])]
        if None in rows:
            raise Stopped
        for scores in rows:
            if isinstance(scores, str):
                raise Fault(scores)
        found = {}
        for name, (weight, _) in self.trained_on.items():
            found[name] = weight, torch.tensor([row[name] for row in rows])
            if self.accelerator.is_main_process:
                records.warn_of_not_finite(step, name, found[name][1], chosen)
        return latents, found

    def score(self, images: Tensor, prompt: dict, clock: Clock) -> dict[str, list[float]] | str:
        """Each reward's scores of a group, or what went wrong, which all processes must hear."""
        if not images.isfinite().all():
            about = f"of prompt {prompt['prompt']!r} are not finite"
            return f"the pictures {about}; lower --learning_rate or --guidance_scale"
        try:
            with torch.cuda.device_of(images), clock("reward"):  # a thread begins on the first GPU
                return {
                    name: rewards.score(name, reward, images, [prompt] * len(images)).tolist()
                    for name, (_, reward) in self.trained_on.items()
                }
        except rewards.RewardError as error:
            return str(error)

    def wait(self, scoring: Iterable[futures.Future]) -> None:
        """Until these are done. Raises Stopped on a signal, although a reward may still work."""
        while futures.wait(scoring, timeout=0.1).not_done:
            self.model.between_passes()

    def learn(self, step: int, work: list[tuple], anywhere: bool) -> tuple[list, float | None]:
        """Lines 8 to 14, U times, for this process's groups: (p, text, latents, advantages) each.

        anywhere: whether any process has one. Returns what backward_group does for each, and the
        mean of the gradients' norms, or None if one was not finite. Then, and at a signal or a full
        memory between two updates, the others are undone, as steps are whole ones.
        """
        theta, groups, norms, U = self.model.theta, [], [], self.args.updates_per_rollout
        before = copy.deepcopy([theta, self.optimizer.state_dict()]) if U > 1 else None

        def undo() -> None:
            if before:
                checkpoints.assign(theta, before[0])
                self.optimizer.load_state_dict(before[1])

        try:
            for update in range(U):
                self.optimizer.zero_grad()
                stopped = False
                try:
                    for group in work:
                        groups.append(self.backward_group(step, *group, update))  # lines 8 to 13
                except Stopped:
                    stopped = True
                if self.reduce_gradients(stopped):
                    raise Stopped
                norms.append(self.update(anywhere))  # line 14
        except (Stopped, torch.OutOfMemoryError):
            undo()
            raise
        if None in norms:
            undo()
            return groups, None
        return groups, sum(norms) / U

    def backward_group(
        self, step: int, p: int, text: str, x0: Tensor, advantages: Tensor, update: int = 0
    ) -> dict[str, Tensor]:
        """Lines 9 to 13 for one group at K times: adds its share of the update's gradient.

        x0: (m, C, h, w), advantages: (m,). The times are one draw for all groups of the update, and
        each has its own eps, shared by the group. As many of them go into a pass as have room.
        Returns metrics (K,), and whether there is a preference.
        """
        args, model, K = self.args, self.model, self.args.train_timesteps
        later = (update,) if update else ()  # the first has the seeds of the only one
        order = torch.randperm(len(self.times), generator=seeded(args.seed, TIMES, step, *later))
        t = self.times[order[:K], None].to(self.device)  # (K, 1)
        eps = torch.stack([self.noise(TRAINING_NOISE, step, p, k, *later) for k in range(K)])
        eps, x0, advantages = (x.to(self.device) for x in (eps[:, None], x0.float(), advantages))
        reference = model.velocity(text, args.reference_guidance_scale, who=model.reference)
        old = model.velocity(text, who=model.theta_old)
        found = []
        for rows in torch.arange(K).split(max(1, model.images_a_pass // len(x0))):
            metrics = dgpo.backward_group_loss(
                model.velocity(text),
                old if args.ema_reference else reference,
                x0.expand(len(rows), *x0.shape),
                eps[rows],
                t[rows],
                advantages.expand(len(rows), -1),
                args.beta,
                share=len(rows) / args.prompts_per_step / K,
                kl=args.kl,
                velocity_kl=reference,
                clip=args.clip or None,
                bound=args.bound,
                velocity_old=old if args.clip or args.bound else None,
                micro_batch=model.images_a_pass,
            )
            found.append({k: v.expand(len(rows)) for k, v in metrics.items()})
        preferred = advantages.any().expand(K)
        return {k: torch.cat([f[k] for f in found]) for k in metrics} | {"preferred": preferred}

    def reduce_gradients(self, stopped: bool) -> bool:
        """The sum over processes, in one exchange for the step, and if any has been stopped."""
        theta = self.model.theta
        if self.accelerator.num_processes == 1:
            return stopped
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
        flag = torch.tensor([float(stopped)], device=self.device)
        flat = self.accelerator.reduce(torch.cat([flag, *(g.flatten() for g in grads)]), "sum")
        for parameter, grad in zip(theta, flat[1:].split([p.numel() for p in theta]), strict=True):
            parameter.grad = grad.view_as(parameter)
        return flat[0].item() > 0

    def update(self, trained: bool) -> float | None:
        """Line 14. Returns the gradient's norm; or None, without a step, if it is not finite.

        Raises Fault if theta is not finite then, which no checkpoint is made of.
        """
        norm = nn.utils.clip_grad_norm_(self.model.theta, self.args.max_grad_norm).item()
        if trained and math.isfinite(norm):
            self.optimizer.step()
            if not checkpoints.is_finite(self.model.theta):
                raise Fault("theta is no longer finite; begin anew with a lower --learning_rate")
        return norm if math.isfinite(norm) else None

    def follow(self, step: int) -> None:
        """Line 15: theta_old follows theta, and so does, more seldom, the saved average.

        The released trainer updates the latter after n = 7, 15, ... steps, once for each batch that
        an epoch has. Its warm-up soon forgets the LoRA that the run began with.
        """
        args, model, n = self.args, self.model, step + 1
        dgpo.ema_update(model.old, model.theta, min(args.old_ema_decay, 0.001 * step))
        if (n + 1) % args.ema_steps == 0:
            decay = min((1 + n) / (10 + n), args.ema_decay) ** args.ema_updates
            dgpo.ema_update(model.average, model.theta, decay)

    def render(self, prompts: list[dict]) -> Tensor:
        """A validation picture of each prompt, on the CPU, from the same noise at every call."""
        steps, guidance = self.args.eval_inference_steps, self.args.guidance_scale
        latents = [
            self.model.sample(prompt["prompt"], self.noise(VALIDATION, i)[None], steps, guidance)
            for i, prompt in enumerate(prompts)
        ]
        return torch.cat([self.model.decode(latent).cpu() for latent in latents])  # any number

    def save(self) -> None:
        """A checkpoint of the steps that are done."""
        if self.accelerator.is_main_process:
            state = {"step": self.done, "bad_steps": self.bad_steps}
            state["optimizer"] = self.optimizer.state_dict()
            out, limit = Path(self.args.output_dir), self.args.checkpoints_total_limit
            checkpoints.save(out, self.model, state, limit)

    @property
    def picture(self) -> Path:
        """Where the validation pictures of the steps that are done go, if they are drawn."""
        return Path(self.args.output_dir) / "validation" / f"step-{self.done:06d}.png"

    def validate(self, prompts: list[dict], base: Tensor, watched: dict) -> dict[str, float]:
        """Draws the prompts by the saved average, beside the base model's pictures, scores both.

        watched: rewards besides those that are trained on. Raises Fault if a reward fails.
        """
        with self.model.saved_average():
            now = self.render(prompts)
        about = (self.picture, prompts, base, now, {**self.trained_on, **watched}, self.device)
        worker = futures.ThreadPoolExecutor(1, "validation")
        try:
            done = worker.submit(records.validate, *about)
            self.wait([done])
            return done.result()
        finally:
            worker.shutdown(wait=False)


# The run


def launch(args: Arguments) -> Accelerator:
    """One of the processes that torchrun or accelerate has started; with neither, the only one."""
    # Without cpu=True, several processes on a CPU would not find each other.
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    tracker = None if args.report_to == "none" else args.report_to
    about = {"log_with": tracker, "project_dir": args.output_dir}
    # The others wait while one validates, or while its reward is slow: ten minutes are too few.
    about["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(days=1))]
    with cli.launching():
        accelerator = Accelerator(cpu=cpu, mixed_precision=args.mixed_precision, **about)
        if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            raise ValueError("the launcher's settings ask for DeepSpeed, FSDP or Megatron")
        torch.ones(1, device=accelerator.device).item()  # the environment may name any device
        return accelerator


def precision(args: Arguments) -> torch.dtype:
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def build(args: Arguments, accelerator: Accelerator, pipe: StableDiffusion3Pipeline) -> Trainer:
    """A trainer at its first step, without rewards and encoded prompts yet."""
    pipe.scheduler = sd35.make_scheduler(args.sampler, args.flow_shift)
    pipe.transformer.to(accelerator.device)
    pipe.vae.to(accelerator.device)
    lora = (args.rank, args.lora_alpha, args.seed, args.gradient_checkpointing)
    theta = sd35.add_lora(pipe.transformer, *lora)
    passes = (args.resolution, args.micro_batch_size, accelerator.autocast, cli.signal_check())
    optimizer = torch.optim.AdamW(theta, args.learning_rate, weight_decay=args.adam_weight_decay)
    model = sd35.Model(pipe, theta, *passes)
    return Trainer(args, accelerator, model, optimizer, trained_times(args))


def load_rewards(args: Arguments, device: torch.device, flag: str) -> dict[str, Any]:
    """The rewards that a flag names, with their weights. Raises Fault."""
    models, found = cli.pairs(args.reward_model), {}
    for name, weight in rewards.parse_all(getattr(args, flag)).items():
        try:
            found[name] = weight, rewards.load(name, device, models.get(name))
        except rewards.RewardError as error:
            raise Fault(f"argument --{flag}: {error}") from None
    return found


def read_prompts(args: Arguments) -> tuple[list[dict], list[dict]]:
    """Training prompts, and validation prompts: by default 8 of a list, fewer of a short one."""
    try:
        training = prompt_sets.load(args.train_prompts or task_of(args))
    except ValueError as error:
        raise Fault(f"argument --train_prompts: {error}") from None
    if args.validation_prompts:
        return training, prompt_sets.load(args.validation_prompts)
    n = min(8, len(training) // 8)
    return (training[:-n], training[-n:]) if n else (training, training[:1])


def check_prompts(args: Arguments, training: list[dict], validation: list[dict]) -> None:
    """Raises Fault at a prompt that a reward cannot be for: one drawn late would end a run late.

    All rewards are asked of the pictures of validation, those that train also of all others.
    """
    trained, watched = rewards.parse_all(args.reward), rewards.parse_all(args.eval_reward)
    shown = "validation_prompts" if args.validation_prompts else "train_prompts"
    all_of_them = ("train_prompts", trained, training), (shown, trained | watched, validation)
    for flag, names, prompts in all_of_them:
        try:
            rewards.check_prompts(names, prompts)
        except rewards.RewardError as error:
            raise Fault(f"argument --{flag}: {error}") from None


def fit_micro_batch(trainer: Trainer) -> int:
    """The most images that memory has room for in a pass, by trying: all K times of a group first.

    Raises torch.OutOfMemoryError if not even one image fits.
    """
    model, device, G = trainer.model, trainer.device, trainer.args.group_size

    def a_pass(m: int) -> None:
        model.images_a_pass = m
        # What Adam will hold, and as much again for what fragmentation takes.
        spare = torch.zeros(4 * sum(p.numel() for p in model.theta), device=device)
        x, t = torch.randn(m, *model.latent_shape, device=device), torch.full((m,), 0.8).to(device)
        model.decode(model.sample("", x, 1, trainer.args.guidance_scale))
        model.velocity("")(x, t, t).square().mean().backward()
        del spare

    times = range(1, trainer.args.train_timesteps + 1)
    parts = {math.ceil(G / n) for n in range(1, G + 1)} | {k * G for k in times}
    a_pass(1)  # also wakes libraries, which take memory of their own
    for m in sorted(parts, reverse=True):
        try:
            a_pass(m)
            return m
        except RuntimeError as error:  # libraries have their own ways to say it
            memory = any(
                word in str(error) for word in ("memory", "CUDA", "cuDNN", "CUBLAS", "engine")
            )
            if m == 1 or not memory:
                raise
        finally:
            trainer.optimizer.zero_grad()
            torch.cuda.empty_cache()  # which does nothing without a GPU


def train(args: Arguments) -> None:
    """Algorithm 1, from the first step or a checkpoint to the last, and what it leaves on disk."""
    out = checkpoints.claim_folder(args)
    state = checkpoints.find(out, args.resume_from_checkpoint)
    done = state["step"] if state else 0
    if checkpoints.nothing_to_do(out, args, done):
        return
    training, validation = read_prompts(args)
    check_prompts(args, training, validation)
    if args.push_to_hub and cli.is_first_process():
        records.make_repository(args)
    accelerator = launch(args)
    main, metrics_file = accelerator.is_main_process, out / "metrics.jsonl"
    checkpoints.announce(args, accelerator, training, validation, done)
    fits = (args.resolution, args.rank)
    pipe = sd35.load_pipeline(args.pretrained_model_name_or_path, precision(args), fits)
    encode = sd35.Encoder(pipe, args.max_sequence_length, accelerator.device)
    trained_on = load_rewards(args, accelerator.device, "reward")
    watched = load_rewards(args, accelerator.device, "eval_reward")
    trainer = build(args, accelerator, pipe)  # from here on, a signal ends a step first
    trainer.trained_on, model = trained_on, trainer.model
    if state:
        trainer.done, trainer.bad_steps = checkpoints.resume(state, model, trainer.optimizer)
    if main:
        checkpoints.begin(out, args, done)
        records.start_trackers(accelerator, args)

    def texts_of(step: int) -> list[str]:
        return [prompt["prompt"] for prompt in trainer.own(prompts_of_step(training, args, step))]

    base, steps = None, range(trainer.done, args.max_train_steps)
    bar = {"total": args.max_train_steps, "initial": trainer.done, "dynamic_ncols": True}
    progress = tqdm(steps, "DGPO", disable=not main, **bar)
    try:
        for step in progress:  # line 1
            chosen = prompts_of_step(training, args, step)  # line 3
            if any(text not in model.encoded for text in ["", *texts_of(step)]):
                many = 16 * accelerator.num_processes  # steps: about 16 steps' prompts in all
                ahead = range(step, min(step + many, args.max_train_steps))
                texts = [text for later in ahead for text in texts_of(later)]
                texts += [prompt["prompt"] for prompt in validation if main]
                model.encoded = encode(texts, model.encoded)
            if not model.images_a_pass:
                tqdm.write(f"--micro_batch_size auto: {fit_micro_batch(trainer)}")
            if main and base is None:
                with model.reference():
                    base = trainer.render(validation)

            trainer.optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            metrics = trainer.take_step(chosen, step)  # lines 4 to 14
            trainer.bad_steps = 0 if metrics["grad_norm"] is not None else trainer.bad_steps + 1
            if not trainer.bad_steps:
                trainer.follow(step)  # line 15
            trainer.done = step + 1

            last = trainer.done == args.max_train_steps
            show = main and (trainer.done % args.validation_steps == 0 or last)
            try:
                if show:
                    metrics.update(trainer.validate(validation, base, watched))
            finally:  # the step is done, also if its pictures are not
                if main:
                    records.add_line(metrics_file, metrics)
                    records.track(accelerator, metrics, trainer.picture)
            if show:
                records.plot_curves(metrics_file, out / "curves.png")
            gate = "-" if metrics["gate"] is None else f"{metrics['gate']:.3f}"
            progress.set_postfix(reward=f"{metrics['reward']:.4g}", gate=gate)
            n = trainer.bad_steps
            if n == 5 or (last and n == trainer.done):
                raise Fault(f"the last {n} steps had no finite gradient; lower --learning_rate")
            if trainer.done % args.checkpointing_steps == 0 or last:
                trainer.save()
    except (Fault, Stopped, torch.OutOfMemoryError) as end:
        trainer.save()
        said = "stopped in the first step, so nothing is saved"
        if trainer.done:
            said = "stopped, and saved; continue with --resume_from_checkpoint latest"
        raise (Stopped(said) if isinstance(end, Stopped) else end) from None
    if main:
        checkpoints.save_lora(model, out)
        records.write_card(args, metrics_file)
        tqdm.write(f"wrote {out / sd35.LORA_FILE}")
    accelerator.end_training()
    if main and args.push_to_hub:
        records.upload(args)


def main() -> None:
    args = parse_args()
    if args.print_arguments:
        print(config.as_config(args), end="")
        return
    try:
        train(args)
    except torch.OutOfMemoryError as error:
        raise Fault(
            f"out of memory ({first_line(error)}); lower --micro_batch_size, which does not "
            "change the result, and resume; if it is 1, or prompts are being encoded, this device "
            "is too small"
        ) from None


if __name__ == "__main__":
    cli.run_and_leave("train_sd35.py", main)
