"""Algorithm 1 of DGPO (arXiv:2510.08425) on Stable Diffusion 3.5 Medium with LoRA.

    python train_sd35.py --reward pickscore                       # one GPU
    accelerate launch train_sd35.py --reward pickscore            # all GPUs of a machine, or more

The method is in dgpo.py, its gradient for large groups in sd35/gradient.py, the model in
sd35/model.py, every argument in sd35/settings.py, and what a run leaves in sd35/run.py. This file
has the loop, which is Algorithm 1, and the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from tqdm import tqdm

import dgpo
import rewards
from sd35 import lora, prompts, report, run
from sd35 import model as sd35
from sd35.encoder import Encoder
from sd35.gradient import backward_group_loss, combine_advantages, extremes
from sd35.settings import Settings, UserError, learning_rate_at, parse, task_of

Rewards = dict[str, tuple[float, rewards.Reward]]  # weight and function, by the reward's name
Scores = dict[str, tuple[float, Tensor]]  # weight and scores (P, G), by the reward's name


class Trainer:
    """One process's share of the work: rollouts, rewards, and gradients of its groups.

    A process takes whole groups, and randomness depends on (seed, purpose, step, prompt, sample)
    alone, so that the steps are the same on any number of processes.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        pipe: Any,
        held: sd35.Context = nullcontext,
    ):
        self.settings, self.accelerator, self.device = settings, accelerator, accelerator.device
        self.held = held  # the context in which a signal waits
        self.done, self.half_done = 0, False  # half_done: theta has moved, theta_old has not
        self.metrics: dict[str, Any] = {}  # of a step, until they are written
        self.times = sd35.trained_times(settings)
        self.encoder = Encoder(pipe, settings.max_sequence_length, self.device)

        pipe.scheduler = sd35.make_scheduler(settings.sampler, settings.flow_shift)
        pipe.transformer.to(self.device)
        pipe.vae.to(self.device)
        theta = lora.add_lora(pipe.transformer, settings.rank, settings.lora_alpha, settings.seed)
        lora.recompute(pipe.transformer, settings.gradient_checkpointing is not False)
        if settings.init_lora:
            lora.start_from_lora(pipe, settings.init_lora)
        if settings.compile:
            lora.compile_blocks(pipe.transformer)
        images = int(settings.micro_batch_size.replace("auto", "0"))
        self.model = sd35.Model(pipe, theta, settings.resolution, images, accelerator.autocast)
        self.optimizer = torch.optim.AdamW(
            theta, settings.learning_rate, weight_decay=settings.adam_weight_decay
        )

        # One thread loads the rewards and calls them all, while the next group is drawn.
        self.reward_thread = ThreadPoolExecutor(1, "reward", self.on_device)
        self.rewards = self.load_rewards(rewards.parse(settings.reward))
        watched = rewards.parse(settings.eval_reward) if accelerator.is_main_process else {}
        new = {name: watched[name] for name in watched if name not in self.rewards}
        self.watched = self.rewards | self.load_rewards(new)

    def on_device(self) -> None:
        if self.device.type == "cuda":  # a new thread begins on the first GPU
            torch.cuda.set_device(self.model.device)  # unlike self.device, it always has an index

    def load_rewards(self, weights: dict[str, float]) -> Rewards:
        """Load the rewards in their thread."""
        models = dict(pair.split("=", 1) for pair in self.settings.reward_model)
        device, thread = run.reward_device(self.device), self.reward_thread
        loading = {k: thread.submit(rewards.load, k, device, models.get(k)) for k in weights}
        return {name: (weights[name], reward.result()) for name, reward in loading.items()}

    def own(self, groups: Sequence) -> Sequence:
        """This process's groups of a step: every N-th."""
        return groups[self.accelerator.process_index :: self.accelerator.num_processes]

    def noise(self, *key: int) -> Tensor:
        """eps (C, h, w) on the CPU, from its own seed."""
        return torch.randn(self.model.latent_shape, generator=sd35.seeded(self.settings.seed, *key))

    def rollout(self, step: int, p: int, text: str) -> Tensor:
        """Line 4: a group's latents (G, C, h, w), by theta, later theta_old, or the reference."""
        settings, model = self.settings, self.model
        noise = [self.noise(sd35.NOISE, step, p, g) for g in range(settings.group_size)]
        online = model.theta_old if step > settings.old_after else nullcontext
        with model.reference() if settings.offline else online():
            steps, guidance = settings.num_inference_steps, settings.guidance_scale
            return model.sample(text, torch.stack(noise), steps, guidance)

    def score(self, images: Tensor, prompt: dict, clock: run.Clock) -> dict[str, tuple]:
        """Line 6: the scores of a group by each reward, and the reward's info."""
        with clock("reward"):
            return {
                name: rewards.score(name, reward, images, [prompt] * len(images))
                for name, (_, reward) in self.rewards.items()
            }

    def draw_and_score(
        self, chosen: list[dict], step: int, clock: run.Clock
    ) -> tuple[dict[int, Tensor], Scores, dict[str, float]]:
        """Lines 4 to 6: the latents of this process's groups; all groups' scores, and their info.

        While a group is scored, the next one is drawn. It then waits for the scores, so that images
        do not pile up.
        """
        latents: dict[int, Tensor] = {}
        scoring: dict[int, Future] = {}
        for p in self.own(range(len(chosen))):
            with clock("rollout"):
                latents[p] = self.rollout(step, p, chosen[p]["prompt"])
            with clock("decode"):
                images = self.model.decode(latents[p])
            with clock("wait"):
                for future in scoring.values():
                    future.result()
            scoring[p] = self.reward_thread.submit(self.score, images, chosen[p], clock)
        with clock("wait"):
            rows = [(p, future.result()) for p, future in scoring.items()]

        rows = [row for _, row in sorted(gather_object(rows), key=lambda row: row[0])]
        scores, info = {}, {}
        for name, (weight, _) in self.rewards.items():
            scores[name] = weight, torch.stack([row[name][0] for row in rows])
            for key in {key for row in rows for key in row[name][1]}:
                values = [row[name][1][key] for row in rows if key in row[name][1]]
                info[f"info/{name}/{key}"] = sum(values) / len(values)
        return latents, scores, info

    def take_step(self, chosen: list[dict], step: int) -> dict[str, Any]:
        """Lines 4 to 15 of Algorithm 1 for the step's prompts. Returns the step's metrics."""
        settings, clock = self.settings, run.Clock(self.device)
        latents, scores, info = self.draw_and_score(chosen, step, clock)  # lines 4 to 6

        with ExitStack() as stack:
            with clock("train"):
                samples, advantages = self.advantages(scores)  # line 7
                finite = torch.stack([values for _, values in scores.values()])
                finite = finite.isfinite().all((0, 2))
                # Without a preference, what is left of the loss is the KL.
                trained = finite & (advantages.any(1) | (settings.kl > 0))

                groups, norms = [], []
                for update in range(settings.updates_per_rollout):
                    self.optimizer.zero_grad()
                    for p in [p for p in latents if trained[p]]:  # lines 8 to 13
                        x0, text = latents[p][samples[p]], chosen[p]["prompt"]
                        groups.append(self.backward_group(step, update, p, text, x0, advantages[p]))
                    self.reduce_gradients()
                    if not update:
                        stack.enter_context(self.held())  # from here, a signal waits for the end
                        self.half_done = True
                    norms.append(self.update(bool(trained.any())))  # line 14
                if None not in norms:
                    self.follow(step)  # line 15
                self.done, self.half_done = step + 1, False
            self.metrics = {
                "step": self.done,
                **report.reward_metrics(scores, advantages, finite),
                **info,
                **report.mean_over_processes(groups),
                "grad_norm": None if None in norms else sum(norms) / len(norms),
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                **clock.metrics(len(chosen) * settings.group_size),
            }
        return self.metrics

    def advantages(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Line 7: which samples to train on, indices (P, m), and their advantages (P, m)."""
        settings = self.settings
        try:
            advantages = combine_advantages(scores, settings.std, settings.combine)
        except ValueError as error:
            raise UserError(f"step {self.done + 1}: {error}; fix the reward") from None
        if not settings.train_samples:
            return torch.arange(settings.group_size).expand_as(advantages), advantages
        samples = extremes(advantages, settings.train_samples).sort(1).values
        return samples, combine_advantages(scores, settings.std, settings.combine, samples)

    def backward_group(
        self, step: int, update: int, p: int, text: str, x0: Tensor, advantages: Tensor
    ) -> dict[str, Tensor]:
        """Lines 9 to 13 for one group at K times: add its share of the update's gradient.

        x0: (m, C, h, w), advantages: (m,). All groups of an update are trained at the same times;
        each time of a group has its own eps, shared by the group. Returns metrics (K,), and whether
        there is a preference.
        """
        settings, model, K = self.settings, self.model, self.settings.train_timesteps
        later = (update,) if update else ()  # the first update has the same seeds as with U = 1
        generator = sd35.seeded(settings.seed, sd35.TIMES, step, *later)
        t = self.times[torch.randperm(len(self.times), generator=generator)[:K], None]
        eps = torch.stack([self.noise(sd35.TRAINING_NOISE, step, p, k, *later) for k in range(K)])
        t, eps, x0 = t.to(self.device), eps[:, None].to(self.device), x0.float().to(self.device)
        advantages = advantages.to(self.device)

        reference = model.velocity(text, settings.reference_guidance_scale, model.reference)
        old = model.velocity(text, network=model.theta_old)
        metrics = []
        for rows in torch.arange(K).split(max(1, model.images_per_pass // len(x0))):
            part = backward_group_loss(
                model.velocity(text),
                old if settings.ema_reference else reference,
                x0.expand(len(rows), *x0.shape),
                eps[rows],
                t[rows],
                advantages.expand(len(rows), -1),
                settings.beta,
                share=len(rows) / settings.prompts_per_step / K,
                kl=settings.kl,
                velocity_kl=reference,
                clip=settings.clip or None,
                bound=settings.bound,
                velocity_old=old if settings.clip or settings.bound else None,
                micro_batch=model.images_per_pass,
            )
            metrics.append({name: value.expand(len(rows)) for name, value in part.items()})
        preferred = {"preferred": advantages.any().expand(K)}
        return {k: torch.cat([part[k] for part in metrics]) for k in metrics[0]} | preferred

    def reduce_gradients(self) -> None:
        """Sum the gradients over processes, in one exchange."""
        theta = self.model.theta
        if self.accelerator.num_processes == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in theta]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for parameter, grad in zip(theta, flat.split([p.numel() for p in theta]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def update(self, trained: bool) -> float | None:
        """Line 14. Returns the gradient's norm; or None, without an update, if it is not finite."""
        norm = nn.utils.clip_grad_norm_(self.model.theta, self.settings.max_grad_norm).item()
        if trained and math.isfinite(norm):
            self.optimizer.step()
        return norm if math.isfinite(norm) else None

    def follow(self, step: int) -> None:
        """Line 15: theta_old follows theta, and so does, less often, the saved average.

        The released trainer updates the latter after n = 7, 15, ... steps, once for each batch of
        an epoch.
        """
        settings, model, n = self.settings, self.model, step + 1
        dgpo.ema_update(model.old, model.theta, min(settings.old_ema_decay, 0.001 * step))
        if (n + 1) % settings.ema_steps == 0:
            decay = min((1 + n) / (10 + n), settings.ema_decay) ** settings.ema_updates
            dgpo.ema_update(model.average, model.theta, decay)

    def encode_ahead(self, training: list[dict], validation: list[dict], step: int) -> None:
        """Encode this process's prompts of the next steps, unless this step's are at hand."""
        settings, n = self.settings, self.accelerator.num_processes

        def texts_of(step: int) -> list[str]:
            chosen = self.own(prompts.prompts_of_step(training, settings, step))
            return [prompt["prompt"] for prompt in chosen]

        if all(text in self.model.encoded for text in ["", *texts_of(step)]):
            return
        ahead = range(step, min(step + 16 * n, settings.max_train_steps))
        texts = [text for later in ahead for text in texts_of(later)]
        if self.accelerator.is_main_process:
            texts += [prompt["prompt"] for prompt in validation]
        self.model.encoded = self.encoder(texts, self.model.encoded)

    def save(self) -> None:
        """Save a checkpoint of the steps that are done, unless a step is half done."""
        self.model.restore()
        if self.accelerator.is_main_process and self.done and not self.half_done:
            with self.held():
                run.save_checkpoint(self.settings, self.model, self.optimizer, self.done)


def make_accelerator(settings: Settings) -> Accelerator:
    """The accelerator of this process. Sets settings.mixed_precision if it is None."""
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    settings.mixed_precision = settings.mixed_precision or ("bf16" if bf16 else "no")
    return Accelerator(
        cpu=not (cuda or torch.backends.mps.is_available()),  # else CPU processes form no group
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=settings.output_dir,
        # The others wait while one validates or its reward is slow; ten minutes are too few.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


def read_prompts(settings: Settings) -> tuple[list[dict], list[dict]]:
    """Training and validation prompts, checked against the rewards. Raises UserError."""
    trained, watched = rewards.parse(settings.reward), rewards.parse(settings.eval_reward)
    rewards.interface.parse_models(settings.reward_model, [*trained, *watched])
    training = prompts.load(settings.train_prompts or task_of(settings.reward))
    if settings.validation_prompts:
        validation = prompts.load(settings.validation_prompts)
    else:
        n = min(8, len(training) // 8)
        training, validation = training[: len(training) - n], training[-n:] if n else training[:1]
    rewards.check_prompts(trained, training)
    rewards.check_prompts([*trained, *watched], validation)
    return training, validation


def train(settings: Settings) -> None:
    """Algorithm 1, from the first step or a checkpoint to the last, and what it leaves on disk."""
    out, metrics_file = Path(settings.output_dir), Path(settings.output_dir) / "metrics.jsonl"
    run.check_tracker(settings.report_to)
    if settings.push_to_hub and not huggingface_hub.get_token():
        raise UserError("--push_to_hub needs a token; run `hf auth login`, or set HF_TOKEN")
    sd35.trained_times(settings)  # to find a mistake before the model is loaded
    lora.check_folder("--init_lora", settings.init_lora)
    training, validation = read_prompts(settings)
    state = run.open_folder(settings)
    done = state and state["step"] >= settings.max_train_steps and (out / lora.LORA_FILE).exists()
    if done and not settings.push_to_hub:
        print(f"nothing to do: the run in {out} has done {state['step']} steps")
        return

    accelerator = make_accelerator(settings)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    pipe = sd35.load_pipeline(settings.pretrained_model_name_or_path, dtype, settings.quantize)
    interrupts = run.Interrupts()
    trainer = Trainer(settings, accelerator, pipe, interrupts.held)
    model, main_process = trainer.model, accelerator.is_main_process
    if state:
        run.restore(state, model, trainer.optimizer)
        trainer.done = state["step"]
    if main_process:
        run.begin(settings, trainer.done)
        if settings.push_to_hub:
            report.make_repository(settings)
        accelerator.init_trackers("dgpo", {k: str(v) for k, v in asdict(settings).items()})
        texts = [prompt["prompt"] for prompt in [*training, *validation]]
        if cut := trainer.encoder.too_long(texts):
            print(f"{len(cut)} prompts are longer than the text encoders read, such as {cut[0]!r}")

    watch = report.Validation(settings, model, validation, trainer.watched, trainer.reward_thread)
    bad_steps, last = 0, settings.max_train_steps
    steps = range(trainer.done, last)
    progress = tqdm(steps, "DGPO", initial=trainer.done, total=last, disable=not main_process)
    try:
        for step in progress:  # line 1
            chosen = prompts.prompts_of_step(training, settings, step)  # line 3
            trainer.encode_ahead(training, validation, step)
            if not model.images_per_pass:
                tqdm.write(f"--micro_batch_size auto: {run.fit_micro_batch(model, settings)}")

            trainer.optimizer.param_groups[0]["lr"] = learning_rate_at(settings, step)
            metrics = trainer.take_step(chosen, step)  # lines 4 to 15

            show = trainer.done % settings.validation_steps == 0 or trainer.done == last
            if main_process:
                scores, sheet = watch(trainer.done) if show else ({}, None)
                with interrupts.held():
                    run.add_metrics(metrics_file, metrics | scores)
                    trainer.metrics = {}
                run.track(accelerator, metrics | scores, sheet)
            if main_process and show:
                report.plot_curves(metrics_file, out / "curves.png")
            gate = "-" if metrics["gate"] is None else f"{metrics['gate']:.3f}"
            progress.set_postfix(reward=f"{metrics['reward']:.4g}", gate=gate)
            bad_steps = bad_steps + 1 if metrics["grad_norm"] is None else 0
            if bad_steps == 5:
                raise UserError("5 steps in a row had no finite gradient; lower --learning_rate")
            if trainer.done % settings.checkpointing_steps == 0 or trainer.done == last:
                trainer.save()
    except BaseException as error:  # whatever ends the run, its steps are saved
        progress.close()
        trainer.save()
        if main_process and trainer.metrics:
            run.add_metrics(metrics_file, trainer.metrics)
        when = f"after {trainer.done} steps; continue with --resume_from_checkpoint latest"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped {when}") from None
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"out of memory {when}; lower --micro_batch_size or quantize") from None
        raise

    if main_process:
        with model.saved_average():
            lora.save_lora(pipe, out)
        report.write_card(settings, out)
        print(f"wrote {out / lora.LORA_FILE}")
    accelerator.end_training()
    if main_process and settings.push_to_hub:
        report.upload(settings)


def main() -> None:
    settings = parse(Settings)
    if settings.print_settings:
        print(yaml.safe_dump(asdict(settings) | {"print_settings": False}, sort_keys=False), end="")
        return
    train(settings)


if __name__ == "__main__":
    run.run_script(main)
