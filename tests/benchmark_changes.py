"""What would make a step faster: predicted, measured, and what it does to the result.

    python tests/benchmark_changes.py                         # SD3.5 Medium's geometry: for a GPU
    python tests/benchmark_changes.py --model toy/out/shapes --resolution 16 --max_sequence_length 7

takes train_sd35.py's arguments. A phase of one group is timed without and with each change in turn.
The prediction is a bound: nothing is faster than the FLOPs and bytes that remain, at the peaks that
are measured here. For a small model it is none: what lies in a cache is not fetched from memory.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmark_step import REPEATS, TEXT, distance, gradients, prepare  # noqa: E402

import train_sd35 as t35  # noqa: E402


@contextlib.contextmanager
def compiled(trainer: t35.Trainer, backend: str = "inductor") -> Iterator[None]:
    """The transformer's blocks, each by itself: those that are alike share what is compiled."""
    blocks = trainer.pipe.transformer.transformer_blocks
    for block in blocks:
        block.compile(backend=backend)
    # Three kinds of block, with and without LoRA, gradients and a second batch size are more than
    # the 8 graphs after which torch gives up without an error.
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def attention(backend: SDPBackend) -> Callable:
    return lambda trainer: sdpa_kernel(backend)


@contextlib.contextmanager
def images_a_pass(trainer: t35.Trainer) -> Iterator[None]:
    """Twice as many, which is what reference and old policy in one batch would be, too."""
    trainer.args.micro_batch_size *= 2
    try:
        yield
    finally:
        trainer.args.micro_batch_size //= 2


@contextlib.contextmanager
def channels_last(trainer: t35.Trainer) -> Iterator[None]:
    trainer.pipe.vae.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        trainer.pipe.vae.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def vae_in_bf16(trainer: t35.Trainer) -> Iterator[None]:
    trainer.pipe.vae.to(torch.bfloat16)
    try:
        yield
    finally:
        trainer.pipe.vae.to(torch.float32)  # its values are rounded now, its speed is the same


# The change, the phases it may help, and the operations whose time at the peaks it may save; or
# None, where what it does itself can be counted.
CHANGES: list[tuple[str, Callable, tuple[str, ...], str | None]] = [
    ("torch.compile of the blocks", compiled, ("rollout", "train"), "others"),
    *(
        (f"attention: {b.name.lower()}", attention(b), ("rollout", "train"), "attention")
        for b in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        )
    ),
    ("twice the images in a pass", images_a_pass, ("rollout", "train"), None),
    ("VAE channels-last", channels_last, ("decode",), None),
    ("VAE in bf16", vae_in_bf16, ("decode",), None),
]


def graphs() -> int:
    """That torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def waits(work: Callable[[], object]) -> int:
    """How often the host needs a number from the device, and on a GPU waits for it.

    What is copied to the device, a group's embeddings, noise and advantages, makes it wait, too.
    """
    count = 0

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += func._overloadpacket is torch.ops.aten._local_scalar_dense
            return func(*args, **(kwargs or {}))

    with Looks():
        work()
    return count


def main() -> None:
    args = t35.parse_args(["--benchmark", "1", *sys.argv[1:]])  # no folder is needed
    trainer, x0, advantages = prepare(args)
    peaks = t35.measured_peaks(trainer.device)
    noise = torch.randn(x0.shape)

    def rollout() -> list[Tensor]:
        return [trainer.sample(TEXT, noise, args.num_inference_steps, args.guidance_scale)]

    def decode() -> list[Tensor]:
        return [trainer.decode(x0)]

    def train() -> list[Tensor]:
        return gradients(trainer, lambda: trainer.backward_group(0, 0, TEXT, x0, advantages))

    phases: dict[str, Callable[[], list[Tensor]]] = {
        "rollout": rollout,
        "decode": decode,
        "train": train,
    }

    def seconds(work: Callable[[], object]) -> float:
        clock = t35.Clock(trainer.device)
        with clock("work"):
            work()
        return clock.seconds["work"]

    account, plain = t35.Account(*peaks), {}
    for name, work in phases.items():
        plain[name] = [x.float() for x in work()]
        with account(name):
            work()

    print(f"a group of {args.group_size}, {args.micro_batch_size} images a pass")
    print("| change | phase | faster by, at most | measured | the result differs by |")
    print("|---|---|---|---|---|")
    for title, change, of, saved in CHANGES:
        for name in of:
            work, counted = phases[name], account.phases[name]
            before = graphs()
            start = time.perf_counter()
            try:
                with change(trainer):
                    changed = [x.float() for x in work()]
            except RuntimeError as error:  # no such attention here
                line = str(error).strip().splitlines()[0]
                print(f"| {title} | {name} | - | {line} | - |", flush=True)
                continue
            first, made = time.perf_counter() - start, graphs()
            took = []
            for _ in range(REPEATS):
                slow = seconds(work)
                with change(trainer):
                    took.append((slow, seconds(work)))
            if saved:
                least = counted["seconds"] - counted[saved]
            else:
                with account(f"{title}, {name}"), change(trainer):
                    work()
                least = account.phases[f"{title}, {name}"]["seconds"]
            bound = min(slow for slow, _ in took) / least
            ratios = sorted(a / b for a, b in took)
            low, middle, high = (ratios[i] for i in (0, REPEATS // 2, -1))
            print(
                f"| {title} | {name} | {bound:.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] "
                f"| {distance(changed, plain[name]):.1e} |",
                flush=True,
            )
            if made > before:
                print(
                    f"({made - before} graphs made in {first:.0f} s, "
                    f"{graphs() - made} more in {REPEATS} repetitions)"
                )

    print(f"the host waits for a number {waits(train)} times in a group's training")


if __name__ == "__main__":
    try:
        main()
    except t35.Fault as fault:
        print(f"benchmark_changes.py: {fault}", file=sys.stderr)
        sys.exit(2)
    except t35.Stopped:
        sys.exit(130)
