#!/usr/bin/env bash
# torchmetrics' CLIPScore: all prompts of more than 77 tokens get one and the same text embedding.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 torchmetrics==1.9.0 transformers==4.57.6 pillow==12.0.0
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY' || { cat log; exit 1; }
import json, string
import torch, torchmetrics, transformers
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

print("torchmetrics", torchmetrics.__version__, "transformers", transformers.__version__,
      "torch", torch.__version__.split("+")[0])
print("expected: a long prompt is cut, as the warning says, and its first 77 tokens are scored")
letters = string.ascii_lowercase
vocabulary = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
json.dump({x: i for i, x in enumerate(vocabulary)}, open("vocab.json", "w"))
open("merges.txt", "w").write("#version: 0.2\n")
processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer("vocab.json", "merges.txt"))
torch.manual_seed(0)
image = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
prompts = ("a red dog", "nine old cats in my boat", "x")
for eos in (2, 53):  # published CLIPs have 2 here; 53 is this tokenizer's
    torch.manual_seed(1)  # with it the scores are above 0, where they are cut off
    model = CLIPModel(CLIPConfig({**size, "vocab_size": 54, "bos_token_id": 52, "eos_token_id": eos},
                                 {**size, "patch_size": 56}, projection_dim=16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    short, long = ([clip_score(image, [text], lambda: (model, processor)).item() for text in texts]
                   for texts in (prompts, [f"{text} " * 90 for text in prompts]))
    print(f"happens, eos_token_id {eos}: prompts {[round(s, 2) for s in short]},",
          f"each of them 90 times {[round(s, 2) for s in long]}")
    assert min(short) > 0 and len(set(short)) == 3
    assert min(long) > 0 and max(long) - min(long) < 1e-3, "the behaviour has changed"
PY
