"""A world of drawn shapes with an exact checker, and a tiny pipeline of SD3.5's classes to train.

    python toy/shapes.py                          builds and pretrains it: toy/out/shapes
    python train_sd35.py --config toy/shapes.yaml --output_dir runs/shapes-0
    python toy/shapes.py --lora runs/shapes-0     what it has learnt

The pretraining captions are noisy, as the web's are: a third are those of another picture. So the
model can draw what is asked for and often does not, and that is what reinforcement is for.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python toy/shapes.py` finds dgpo.py
import dgpo  # noqa: E402

SIDE, CELL, GRID = 16, 8, 2  # a picture's and a cell's side in pixels, and how many cells that is
COLORS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 80, 220)}
SHAPES = {  # the latents are half as large as the picture: a character is two by two pixels
    "square": ("###.", "###.", "###.", "...."),
    "diamond": (".#..", "###.", ".#..", "...."),
}
SIDES = {"left": (0,), "right": (1,)}  # the columns of cells
COUNTS = {"two": 2, "three": 3}
BACKGROUND = (245, 245, 245)
WRONG = 0.35  # share of wrong captions in pretraining
TOKENS = 7  # of a prompt, at most, for each tokenizer
KINDS = list(itertools.product(COLORS, SHAPES))
TASKS = ("single", "position", "count", "two")


# The world. A scene is GRID * GRID cells, each None or (color, shape), row by row.

Scene = list


def prompt_list() -> list[dict]:
    """All prompts, as the trainer reads them: {"prompt", "task", "objects", "side"}."""
    prompts = []
    for color, shape in KINDS:
        one = [[color, shape]]
        prompts.append({"prompt": f"{color} {shape}", "task": "single", "objects": one})
        for side in SIDES:
            text = f"{color} {shape} on the {side}"
            prompts.append({"prompt": text, "task": "position", "objects": one, "side": side})
        for word, n in COUNTS.items():
            text = f"{word} {color} {shape}s"
            prompts.append({"prompt": text, "task": "count", "objects": one * n})
    for (color, shape), (color_2, shape_2) in itertools.permutations(KINDS, 2):
        text = f"{color} {shape} and {color_2} {shape_2}"
        objects = [[color, shape], [color_2, shape_2]]
        prompts.append({"prompt": text, "task": "two", "objects": objects})
    return prompts


def draw_scene(prompt: dict, rng: random.Random) -> Scene:
    """A scene that is as the prompt says, its places at random."""
    columns = SIDES[prompt["side"]] if "side" in prompt else range(GRID)
    free = [GRID * row + column for row in range(GRID) for column in columns]
    scene: Scene = [None] * GRID**2
    for kind, cell in zip(prompt["objects"], rng.sample(free, len(prompt["objects"])), strict=True):
        scene[cell] = tuple(kind)
    return scene


def templates() -> Tensor:
    """What a cell can hold, (1 + kinds, 3, CELL, CELL) in [0, 1]: first nothing, then KINDS."""
    background = torch.tensor(BACKGROUND)[:, None, None] / 255
    cells = [background.expand(3, CELL, CELL)]
    for color, shape in KINDS:
        ink = torch.tensor(COLORS[color])[:, None, None] / 255
        inside = torch.tensor([[character == "#" for character in row] for row in SHAPES[shape]])
        inside = inside.repeat_interleave(2, 0).repeat_interleave(2, 1)
        cells.append(torch.where(inside, ink, background))
    return torch.stack(cells)


TEMPLATES = templates()


def place(cell: int) -> tuple[object, ...]:
    """The pixels of a cell, as an index (..., rows, columns)."""
    row, column = (CELL * i for i in divmod(cell, GRID))
    return ..., slice(row, row + CELL), slice(column, column + CELL)


def paint(scenes: list[Scene]) -> Tensor:
    """Pictures (N, 3, SIDE, SIDE) in [0, 1]."""
    images = (torch.tensor(BACKGROUND) / 255)[:, None, None].repeat(len(scenes), 1, SIDE, SIDE)
    for image, scene in zip(images, scenes, strict=True):
        for cell, kind in enumerate(scene):
            if kind:
                image[place(cell)] = TEMPLATES[1 + KINDS.index(kind)]
    return (images * 255).round() / 255


# The checker


def read(images: Tensor) -> tuple[list[Scene], Tensor]:
    """What is seen in pictures (N, 3, SIDE, SIDE), and how far off the drawing is, (N,).

    A cell holds the template nearest to it. The distance is the root mean square error of the
    picture against one drawn of what was seen: 0 for a drawn picture, high for smeared ones.
    """
    images = images.float().clamp(0, 1).cpu()
    cells = torch.stack([images[place(cell)] for cell in range(GRID**2)], 1)
    nearest = torch.cdist(cells.flatten(2), TEMPLATES.flatten(1)[None]).argmin(2)  # (N, cells)
    scenes = [[KINDS[k - 1] if k else None for k in row] for row in nearest.tolist()]
    return scenes, (images - paint(scenes)).square().mean((1, 2, 3)).sqrt()


def clauses(scene: Scene, prompt: dict) -> list[float]:
    """A grade for each clause: is each kind there, as often as asked, nothing else, on the side."""
    seen, wanted = (
        Counter(kind for kind in scene if kind),
        Counter(tuple(kind) for kind in prompt["objects"]),
    )
    grades = [max(0.0, 1 - abs(seen[kind] - n) / n) for kind, n in wanted.items()]
    stray = sum((seen - wanted).values())
    grades.append(1 / (1 + stray))
    if "side" in prompt:
        cells = [cell for cell, kind in enumerate(scene) if kind and kind in wanted]
        columns = SIDES[prompt["side"]]
        grades.append(sum(cell % GRID in columns for cell in cells) / max(1, len(cells)))
    return grades


def graded(images: Tensor, prompts: list[dict]) -> list[float]:
    """The mean over the clauses, 0 to 1."""
    grades = [clauses(*pair) for pair in zip(read(images)[0], prompts, strict=True)]
    return [sum(grade) / len(grade) for grade in grades]


def strict(images: Tensor, prompts: list[dict]) -> list[float]:
    """1 if every clause holds, else 0."""
    grades = [clauses(*pair) for pair in zip(read(images)[0], prompts, strict=True)]
    return [float(min(grade) == 1) for grade in grades]


def shuffled(images: Tensor, prompts: list[dict]) -> list[float]:
    """The same in another order within the group: a control, to learn nothing from."""
    rewards = strict(images, prompts)
    random.Random(images.sum().item()).shuffle(rewards)
    return rewards


def cleanness(images: Tensor, prompts: list[dict]) -> list[float]:
    """A quality nobody trains on: minus the distance from a drawing."""
    return (-read(images)[1]).tolist()


# The pipeline


def clip_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    # Merges must be learnt: made by hand, they would split words and truncate prompts alike.
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learnt.train_from_iterator(texts, trainer)
    model = json.loads(learnt.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        pad_token="<|endoftext|>",
        model_max_length=TOKENS,
    )


def t5_tokenizer(texts: list[str]):
    from transformers import T5TokenizerFast

    words = sorted({word for text in texts for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def exact_vae():
    """An AutoencoderKL whose latents are the picture at half its size: nothing to train.

    Its last GroupNorm and SiLU are what stands in the way. Beside the signal s run -s and two
    constants +-C: their mean is 0, their std C/2 but for s^2/C^2, and so the norm only divides by
    a constant. SiLU is the identity far from 0.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=SIDE,
        shift_factor=0.9,  # so that the background is about 0, where the noise's mean is
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    constant, far = 256.0, 32.0
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            for name, parameter in half.named_parameters():
                # A residual block that adds nothing; what changes the size is filled in below.
                if ("resnets" in name and "conv2" in name) or "sampler" in name:
                    parameter.zero_()
            for layer in (half.conv_in, half.conv_out):
                layer.weight.zero_()
                layer.bias.zero_()
            for i in range(3):
                half.conv_in.weight[i, i, 1, 1] = 1
                half.conv_in.weight[3 + i, i, 1, 1] = -1
                half.conv_out.weight[i, i, 1, 1] = 1
                half.conv_out.bias[i] = -far
            half.conv_in.bias[6], half.conv_in.bias[7] = constant, -constant
            half.conv_norm_out.weight.fill_(constant / 2)
            half.conv_norm_out.bias.fill_(far)
        vae.encoder.conv_out.bias[3:] = -30  # the log-variance
        smaller = vae.encoder.down_blocks[0].downsamplers[0].conv.weight
        larger = vae.decoder.up_blocks[0].upsamplers[0].conv.weight
        for i in range(8):
            smaller[i, i, :2, :2] = 1 / 4  # the mean of two by two pixels
            larger[i, i, 1, 1] = 1
    return vae


def build(width: int = 128, layers: int = 2):
    """An untrained pipeline of SD3.5's classes, with three text encoders, VAE and all."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    texts = [prompt["prompt"] for prompt in prompt_list()]
    torch.manual_seed(0)
    clip, t5 = clip_tokenizer(texts), t5_tokenizer(texts)
    encoders = []
    for _ in range(2):
        config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=32,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        encoders.append(CLIPTextModelWithProjection(config))
        # At the usual scale, attention is uniform in a random encoder, places do not count, and the
        # pooled embedding tells little more than how long the prompt is.
        for name, weight in encoders[-1].named_parameters():
            if "token_embedding" in name or "position_embedding" in name:
                weight.data.normal_()
            elif "q_proj.weight" in name or "k_proj.weight" in name:
                weight.data *= 5
            elif "v_proj.weight" in name or "out_proj.weight" in name:
                weight.data *= 3
    t5_config = T5Config(
        vocab_size=len(t5), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=CELL // 2,  # a cell is a token
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=64,  # T5's, at least the sum of the two CLIPs'
        caption_projection_dim=width,
        pooled_projection_dim=64,  # the sum of the two CLIPs'
        pos_embed_max_size=GRID,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=exact_vae(),
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer_3=t5,
    )
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()  # T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(pipe, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings (N, tokens, width) and pooled ones (N, width)."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    return embeds, pooled


def pretrain(pipe, steps: int, batch: int = 32):
    """Flow matching of the transformer on noisy captions. Yields the loss of each step."""
    prompts, rng = prompt_list(), random.Random(0)
    torch.manual_seed(0)
    by_task = {task: [p for p in prompts if p["task"] == task] for task in TASKS}

    def draw_prompt() -> dict:
        return rng.choice(by_task[rng.choice(TASKS)])

    embeds, pooled = encode(pipe, ["", *(prompt["prompt"] for prompt in prompts)])
    index = {prompt["prompt"]: i for i, prompt in enumerate(prompts, 1)}
    optimizer = torch.optim.AdamW(pipe.transformer.parameters(), weight_decay=0.0)
    averaged = [p.detach().clone() for p in pipe.transformer.parameters()]
    pipe.transformer.train()
    for step in range(steps):
        warmup, decay = 50 * step / steps + 0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, warmup) * decay
        shown, other = ([draw_prompt() for _ in range(batch)] for _ in range(2))
        told = [b if rng.random() < WRONG else a for a, b in zip(shown, other, strict=True)]
        rows = [0 if rng.random() < 0.1 else index[prompt["prompt"]] for prompt in told]
        images = paint([draw_scene(prompt, rng) for prompt in shown])
        with torch.no_grad():
            x0 = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
        x0 = ((x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)[:, None]
        u, eps = torch.rand(batch, 1), torch.randn(x0.shape)
        t = 3 * u / (1 + 2 * u)  # the shift of the sampler
        v = pipe.transformer(
            dgpo.diffuse(x0, eps, t)[:, 0],
            encoder_hidden_states=embeds[rows],
            pooled_projections=pooled[rows],
            timestep=1000 * t[:, 0],
            return_dict=False,
        )[0]
        loss = dgpo.dsm_loss(v[:, None], x0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pipe.transformer.parameters(), 1.0)
        optimizer.step()
        dgpo.ema_update(averaged, pipe.transformer.parameters(), 0.99)
        yield loss.item()
    with torch.no_grad():
        for parameter, value in zip(pipe.transformer.parameters(), averaged, strict=True):
            parameter.copy_(value)
    pipe.transformer.eval()


@torch.no_grad()
def sample(pipe, prompts: list[dict], seed: int, guidance: float, steps: int) -> Tensor:
    """A picture of each prompt (N, 3, SIDE, SIDE) in [0, 1], with the pipeline's own sampler."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 3, SIDE // 2, SIDE // 2, generator=generator)
    images = []
    for i in range(0, len(prompts), 48):
        texts = [prompt["prompt"] for prompt in prompts[i : i + 48]]
        output = pipe(
            texts,
            latents=noise[i : i + 48],
            guidance_scale=guidance,
            num_inference_steps=steps,
            height=SIDE,
            width=SIDE,
            max_sequence_length=TOKENS,
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images)


def held_out(n: int, seed: int = 1234) -> list[dict]:
    """n prompts of each task, for noise that is not trained on: all prompts are."""
    rng, prompts = random.Random(seed), prompt_list()
    return [
        rng.choice([p for p in prompts if p["task"] == task]) for task in TASKS for _ in range(n)
    ]


def report(title: str, images: Tensor, prompts: list[dict]) -> str:
    """A row of the table: strict accuracy of all and by task, and cleanness."""
    right = torch.tensor(strict(images, prompts))
    tasks = [prompt["task"] for prompt in prompts]
    by_task = [right[[task == t for t in tasks]].mean().item() for task in TASKS]
    clean = torch.tensor(cleanness(images, prompts)).mean().item()
    columns = " | ".join(f"{value:.3f}" for value in [right.mean().item(), *by_task])
    return f"| {title} | {columns} | {clean:.4f} |"


HEADER = (
    f"| strict accuracy | all | {' | '.join(TASKS)} | cleanness |\n{'|---' * (len(TASKS) + 3)}|"
)
# How pictures are drawn for the table: guidance scale and steps. The first is that of the training.
CONDITIONS = {"": (1.0, 10), ", guidance 2": (2.0, 10), ", 28 steps": (1.0, 28)}


def contact_sheet(images: Tensor, prompts: list[dict], columns: int = 12) -> Tensor:
    """Pictures (H, W, 3) in [0, 1], a task a row, framed in black where all is as asked."""
    frames = 0.8 * (1 - torch.tensor(strict(images, prompts)))
    rows = []
    for task in TASKS:
        chosen = [i for i, prompt in enumerate(prompts) if prompt["task"] == task][:columns]
        pictures = [
            nn.functional.pad(
                nn.functional.pad(images[i], (2, 2, 2, 2), value=frames[i].item()),
                (1, 1, 1, 1),
                value=1.0,
            )
            for i in chosen
        ]
        rows.append(torch.cat(pictures, 2))
    return torch.cat(rows, 1).permute(1, 2, 0)


def plot(path: Path, sheets: dict[str, Tensor], rewards: dict[str, list[float]]) -> None:
    """Contact sheets above, and the rollouts' mean reward in each run, over ten steps, below."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    rows = len(sheets) + bool(rewards)
    figure, axes = plt.subplots(rows, figsize=(8, 2.9 * rows), squeeze=False, layout="constrained")
    for panel, (title, sheet) in zip(axes[:, 0], sheets.items(), strict=False):
        panel.imshow(sheet.numpy(), interpolation="nearest")
        panel.set_title(f"{title} (black frame: as asked)", fontsize=14)
        panel.spines[:].set_visible(False)
        middles = (torch.arange(len(TASKS)) + 0.5) * len(sheet) / len(TASKS)
        panel.set_xticks([])
        panel.set_yticks(middles.tolist(), TASKS, fontsize=12)
    for (name, values), style in zip(rewards.items(), itertools.cycle(("-", "--", "-.", ":"))):
        window = min(10, len(values))
        means = torch.tensor(values).unfold(0, window, window).mean(1)
        steps = window * torch.arange(1, len(means) + 1)
        axes[-1, 0].plot(steps, means, style, color="black", label=name)
    if rewards:
        axes[-1, 0].set_xlabel("optimiser step", fontsize=12)
        axes[-1, 0].set_ylabel("mean reward of the rollouts", fontsize=12)
        axes[-1, 0].set_ylim(0, 1)
        axes[-1, 0].grid(alpha=0.3)
        axes[-1, 0].legend(fontsize=12, ncols=2, loc="center right", bbox_to_anchor=(1, 0.65))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    from run_2d import Parser, check_folder

    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "out" / "shapes", help="the pipeline's")
    add("--pretraining", type=int, default=10_000, help="its steps (default: 10000)")
    add("--samples", type=int, default=96, help="of each task, in the table (default: 96)")
    add("--lora", type=Path, nargs="+", help="do not pretrain: the table with each of these LoRAs")
    add("--figure", type=Path, help="pictures before and with the first LoRA, and their curves")
    args = parser.parse_args()
    for name in ("pretraining", "samples"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(args, name)}")
    weights = "pytorch_lora_weights.safetensors"
    for folder in args.lora or ():
        if not (folder / weights).exists():
            parser.error(f"argument --lora: there is no {folder / weights}")
    if args.lora and not (args.out / "model_index.json").exists():
        parser.error(f"argument --out: {args.out} holds no pipeline; run toy/shapes.py first")
    check_folder(parser, args.out)

    from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline

    if args.lora:
        pipe = StableDiffusion3Pipeline.from_pretrained(args.out, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
    else:
        pipe = build()
        for name, prompts in {"prompts": prompt_list(), "held_out": held_out(6)}.items():
            lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
            (args.out / f"{name}.jsonl").write_text(lines)
        progress = tqdm(pretrain(pipe, args.pretraining), "pretraining", total=args.pretraining)
        for loss in progress:
            progress.set_postfix(loss=f"{loss:.3f}")
        pipe.save_pretrained(args.out)
        print(f"wrote {args.out}")
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    prompts, sheets = held_out(args.samples), {}
    print(HEADER)
    for lora in [None, *(args.lora or ())]:
        name = lora.name if lora else "base"
        if lora:
            pipe.load_lora_weights(lora, weight_name=weights)
        for condition, (guidance, steps) in CONDITIONS.items():
            images = sample(pipe, prompts, 0, guidance, steps)
            print(report(name + condition, images, prompts), flush=True)
            if not condition:
                sheets[name] = contact_sheet(images, prompts)
        if lora:
            pipe.unload_lora_weights()
    plot(args.out / "base.png", {"base": sheets["base"]}, {})
    if args.figure:
        first = args.lora[0].name if args.lora else "base"
        curves = {
            folder.name: [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").open()]
            for folder in args.lora or ()
        }
        plot(args.figure, {name: sheets[name] for name in ("base", first)}, curves)


if __name__ == "__main__":
    main()
