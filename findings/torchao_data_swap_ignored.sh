#!/usr/bin/env bash
# p.data = q.data, the usual swap of averaged weights: torchao's weights stay, the biases beside them move.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import importlib.metadata, torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

print("torchao", importlib.metadata.version("torchao"), "torch", torch.__version__.split("+")[0])
print("expected: the model then computes what the other one does, as with plain weights, or an error")
x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))


def layer(seed, config):
    torch.manual_seed(seed)
    net = torch.nn.Linear(64, 64)
    if config is not None:
        quantize_(net, config)
    return net


print("happens: after p.data = q.data for all parameters, the output is that of")
for config, name in ((None, "plain"), (Int8WeightOnlyConfig(), "int8"), (Float8WeightOnlyConfig(), "float8")):
    net, other = layer(0, config), layer(1, config)
    outputs = {
        "the other's weight and bias": other(x).detach(),
        "its own old weight and the other's bias": (net(x) - net.bias + other.bias).detach(),
    }
    for p, q in zip(net.parameters(), other.parameters()):
        p.data = q.data
    is_like = [key for key, output in outputs.items() if torch.allclose(net(x), output, atol=1e-5)]
    print(f"  {name}: {is_like}")
    assert is_like == [list(outputs)[config is not None]], "the behaviour has changed"
PY
