#!/usr/bin/env bash
# LyCORIS: a LoHa or LoKr that is merged acts at (alpha / rank) squared; one that is applied, at alpha / rank.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 lycoris-lora==4.1.3
cd "$work"
"$work/venv/bin/python" - 2>log <<'PY' || { cat log; exit 1; }
import importlib.metadata, logging, torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights

logging.disable()  # it reports each step on standard output
print("lycoris-lora", importlib.metadata.version("lycoris-lora"), "torch", torch.__version__.split("+")[0])
print("expected: merge_to(1.0) gives the weights that apply_to() computes with, for every algorithm")
x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))


print("happens: the change of a merged layer, as a share of the applied one's, at rank 8")
for algo in ("lora", "loha", "lokr"):
    for alpha in (8, 4, 1):
        net = base()
        trained = create_lycoris(net, 1.0, linear_dim=8, linear_alpha=alpha, algo=algo, factor=2)
        trained.apply_to()
        for parameter in trained.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        applied = net[0](x) - base()[0](x)
        trained.save_weights("trained.safetensors", None, {})

        net = base()
        create_lycoris_from_weights(1.0, "trained.safetensors", net)[0].merge_to(1.0)
        merged = net[0](x) - base()[0](x)
        share = ((merged * applied).sum() / applied.square().sum()).item()
        print(f"  {algo}, alpha {alpha}: {share:.3f}")
        assert abs(share - (1 if algo == "lora" else alpha / 8)) < 1e-3, "the behaviour has changed"
PY
