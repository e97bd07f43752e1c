"""A LoRA has one strength wherever it is loaded, and is the starting point of another run."""

import re
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_run import TEXT, model, point

from sd35.lora import (
    LORA_FILE,
    LORA_TARGETS,
    add_lora,
    load_lora,
    recompute,
    save_lora,
    start_from_lora,
)
from sd35.model import Model, load_pipeline
from sd35.settings import UserError
from tiny_sd35 import shapes


@torch.no_grad()
def output(transformer, model):
    (x, t, _), prompt = point(model), model.encoded[TEXT]
    prompt = (prompt.embeds.expand(3, -1, -1), prompt.pooled.expand(3, -1))
    return transformer(x, *prompt, 1000 * t).sample


def base(tiny):
    return load_pipeline(str(tiny), torch.float32)


def load_without_header(pipe, folder):
    save_file(load_file(folder / LORA_FILE), folder / LORA_FILE)
    load_lora(pipe, folder)


def add_by_hand(pipe, folder):
    """W + B A, as programs do that know no scale."""
    weights = load_file(folder / LORA_FILE)
    for key in weights:
        if "lora_A" in key:
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            update = weights[key.replace("lora_A", "lora_B")] @ weights[key]
            pipe.transformer.get_submodule(name).weight += update


@torch.no_grad()
@pytest.mark.parametrize("load", [load_lora, load_without_header, add_by_hand])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (3, 7)])
def test_a_saved_lora_has_the_trainers_output_in_every_program(rank, alpha, load, tiny, tmp_path):
    trained = model(tiny, rank, alpha)
    with trained.saved_average():
        save_lora(trained.pipe, tmp_path)
        expected = output(trained.pipe.transformer, trained)
    pipe = base(tiny)
    change = (expected - output(pipe.transformer, trained)).abs().max()
    load(pipe, tmp_path)
    assert (output(pipe.transformer, trained) - expected).abs().max() < 1e-5 < 0.1 * change


def test_the_files_names_are_those_of_diffusers(tiny_model, tmp_path):
    save_lora(tiny_model.pipe, tmp_path)
    layers = LORA_TARGETS.replace(".", r"\.").replace(" ", "|")
    name = rf"transformer\.transformer_blocks\.\d\.attn\.({layers})\.lora_[AB]\.weight"
    keys = list(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert all(re.fullmatch(name, key) for key in keys)
    assert len(keys) == len(tiny_model.theta) == 2 * (8 + 7)  # the last block has no to_add_out


def save_by_peft(trained, folder):
    """Three layers' LoRA, with alpha / rank = 2. Returns its output."""
    adapted = get_peft_model(
        base(trained.pipe.name_or_path).transformer,
        LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_k", "attn.to_out.0"]),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(folder)
    return output(adapted, trained)


def save_by_the_transformer(trained, folder):
    trained.pipe.transformer.save_lora_adapter(folder)
    return output(trained.pipe.transformer, trained)


def save_by_us(trained, folder):
    save_lora(trained.pipe, folder)
    return output(trained.pipe.transformer, trained)


FORMS = [save_by_peft, save_by_the_transformer, save_by_us]


@pytest.mark.parametrize("save", FORMS)
def test_every_form_of_a_lora_loads(save, tiny_model, tiny, tmp_path):
    expected, pipe = save(tiny_model, tmp_path), base(tiny)
    load_lora(pipe, tmp_path)
    assert (output(pipe.transformer, tiny_model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("save", FORMS)
def test_a_run_starts_from_a_lora_and_its_reference_is_the_base(save, tiny_model, tiny, tmp_path):
    expected, pipe = save(tiny_model, tmp_path), base(tiny)
    transformer, before = pipe.transformer, output(pipe.transformer, tiny_model)
    theta = add_lora(transformer, 4, 3, 0)  # whose alpha is another
    start_from_lora(pipe, str(tmp_path))
    assert (output(transformer, tiny_model) - expected).abs().max() < 1e-5
    assert list(transformer.peft_config) == ["default"]
    assert {id(p) for p in transformer.parameters() if p.requires_grad} == {*map(id, theta)}
    transformer.disable_adapters()
    assert torch.equal(output(transformer, tiny_model), before)


def broken(trained, folder):
    (folder / LORA_FILE).write_bytes(b"broken")


def of_another_kind(trained, folder):
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, folder / LORA_FILE)


def of_another_lora(rank, width):
    def write(trained, folder):
        pipe = shapes.build(width=width, layers=2)
        add_lora(pipe.transformer, rank, 4, 0)
        save_lora(pipe, folder)

    return write


OTHERS = {
    broken: "^cannot load the LoRA in ",
    of_another_kind: "is not for this model, which has no unet.down$",
    of_another_lora(rank=4, width=64): "^cannot load the LoRA in .* size mismatch",
    of_another_lora(rank=5, width=32): "needs the rank and the layers of this run's LoRA",
    lambda trained, folder: None: "^cannot load the LoRA in .*No such file",
}


@pytest.mark.parametrize("write", OTHERS)
def test_a_lora_that_does_not_fit_is_one_sentence(write, tiny_model, tiny, tmp_path):
    write(tiny_model, tmp_path)
    pipe = base(tiny)
    with pytest.raises(UserError, match=OTHERS[write]):
        add_lora(pipe.transformer, 4, 8, 0)
        start_from_lora(pipe, str(tmp_path))


def test_a_base_in_8_bits_trains_a_lora_for_the_full_base(tiny, tmp_path):
    """theta and the reference share the int8 base, which no step and no swap changes."""
    pytest.importorskip("torchao")
    pipe = load_pipeline(str(tiny), torch.float32, "int8")
    theta = add_lora(pipe.transformer, 4, 8, 0)
    recompute(pipe.transformer, 1)
    encoded = model(tiny).encoded
    trained = Model(pipe, theta, shapes.SIDE, 4, encoded=encoded)
    linear = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    before = linear.dequantize().clone()
    assert type(linear).__name__ == "Int8Tensor"
    assert all(not parameter.requires_grad for parameter in pipe.text_encoder_3.parameters())

    full = output(base(tiny).transformer, trained)
    error = (output(pipe.transformer, trained) - full).norm() / full.norm()
    assert 0 < error < 0.02

    x, t, p = point(trained)
    trained.velocity(TEXT)(x, t, p).square().mean().backward()
    torch.optim.AdamW(theta, 1e-2).step()
    trained.velocity(TEXT)(x, t, p).square().mean().backward()
    trained_now = [parameter.grad.abs().sum() > 0 for parameter in theta]
    assert sum(trained_now) > 0.8 * len(theta)
    torch.optim.AdamW(theta, 1e-1).step()
    with trained.theta_old(), trained.reference():
        pass
    assert torch.equal(linear.dequantize(), before)

    save_lora(pipe, tmp_path)
    change = output(pipe.transformer, trained)
    with trained.reference():
        change -= output(pipe.transformer, trained)
    whole = base(tiny)
    load_lora(whole, tmp_path)
    on_full = output(whole.transformer, trained) - full
    assert (on_full - change).norm() / change.norm() < 0.1


def test_without_torchao_int8_is_refused_in_one_sentence(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="needs `pip install torchao`"):
        load_pipeline(str(tiny), torch.float32, "int8")
