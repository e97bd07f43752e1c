"""The model as Algorithm 1 sees it, on a tiny untrained pipeline of SD3.5's classes."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError
from tiny_run import TEXT, point

from sd35 import model as sd35
from sd35.settings import Settings, UserError, parse
from tiny_sd35 import shapes

CPU = torch.device("cpu")


BF16, FLOAT32 = torch.bfloat16, torch.float32
TURNS = [(12, BF16, "enable_model_cpu_offload"), (24, BF16, "to")]
TURNS += [(32, FLOAT32, "enable_model_cpu_offload"), (48, FLOAT32, "to")]


@pytest.mark.parametrize(("gb", "dtype", "call"), TURNS)
def test_networks_take_turns_on_a_small_gpu(gb, dtype, call, monkeypatch):
    properties, pipe = SimpleNamespace(total_memory=gb * 10**9), Mock()
    pipe.transformer.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sd35.place(pipe, torch.device("cuda:0"))
    sd35.place(pipe, CPU)
    assert [name for name, _, _ in pipe.method_calls] == [call, "to"]


@torch.no_grad()
def test_four_networks_share_one_set_of_weights(tiny_model, tiny):
    """Each has the output of a transformer with only its weights; the reference is the base."""
    networks = (nullcontext, tiny_model.reference, tiny_model.theta_old, tiny_model.saved_average)
    outputs = [tiny_model.velocity(TEXT, 1, network)(*point(tiny_model)) for network in networks]
    _, reference, old, average = outputs
    assert min((a - b).abs().max() for a in outputs for b in outputs if a is not b) > 1e-4

    base = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32).transformer
    (x, t, _), prompt = point(tiny_model), tiny_model.encoded[TEXT]
    prompt = (prompt.embeds.expand(3, -1, -1), prompt.pooled.expand(3, -1))
    assert torch.equal(base(x, *prompt, 1000 * t).sample, reference)
    for values, output in ((tiny_model.old, old), (tiny_model.average, average)):
        for parameter, value in zip(tiny_model.theta, values, strict=True):
            parameter.copy_(value)
        assert torch.equal(tiny_model.velocity(TEXT)(*point(tiny_model)), output)


def test_a_context_gives_everything_back_also_after_an_exception(tiny_model):
    places = [parameter.data_ptr() for parameter in tiny_model.theta]
    theta = tiny_model.velocity(TEXT)(*point(tiny_model))
    for network in (tiny_model.reference, tiny_model.theta_old, tiny_model.saved_average):
        with pytest.raises(ZeroDivisionError), network():
            raise ZeroDivisionError
        assert torch.equal(tiny_model.velocity(TEXT)(*point(tiny_model)), theta)
    assert places == [parameter.data_ptr() for parameter in tiny_model.theta]
    assert all(parameter.requires_grad for parameter in tiny_model.theta)


@torch.no_grad()
def test_guidance_extrapolates_from_the_empty_prompt(tiny_model):
    conditional, empty = (tiny_model.velocity(x)(*point(tiny_model)) for x in (TEXT, ""))
    guided = tiny_model.velocity(TEXT, 4.5)(*point(tiny_model))
    assert (guided - (empty + 4.5 * (conditional - empty))).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_rollout_is_that_of_diffusers_pipeline(guidance, tiny_model, tiny):
    noise = torch.randn(5, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(1))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32)
    pipe.scheduler = sd35.make_scheduler("dpm++", 3.0)
    expected = pipe(
        [TEXT] * 5,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=shapes.SIDE,
        width=shapes.SIDE,
        max_sequence_length=shapes.TOKENS,
        output_type="pt",
    ).images
    with tiny_model.reference():
        reference = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
    images = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
    assert (reference - expected).abs().max() < 1e-4 < (images - expected).abs().max()
    tiny_model.images_per_pass = 2
    again = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
    assert (again - images).abs().max() < 1e-4


@torch.no_grad()
def test_the_vae_has_smaller_passes_where_images_are_large(tiny_model, monkeypatch):
    latents, sizes, decode = torch.randn(5, *tiny_model.latent_shape), [], sd35.decode
    whole = tiny_model.decode(latents)
    monkeypatch.setattr(sd35, "DECODED", 2 * latents[0, 0].numel())
    monkeypatch.setattr(sd35, "decode", lambda vae, x: sizes.append(len(x)) or decode(vae, x))
    assert torch.allclose(tiny_model.decode(latents), whole, atol=1e-6) and sizes == [2, 2, 1]


def test_the_times_of_a_rollout_are_the_released_schedulers():
    times = 1000 * sd35.rollout_times(sd35.make_scheduler("dpm++", 3.0), 10)
    assert times.tolist() == [999, 963, 922, 874, 817, 749, 666, 562, 428, 249]
    times = 1000 * sd35.rollout_times(sd35.make_scheduler("euler", 3.0), 2)
    assert times.tolist() == pytest.approx([1000, 8.93], abs=3e-3)


def test_the_trained_times_are_those_of_the_rollout_above_t_min():
    times = sd35.trained_times(parse(Settings, ["--reward", "ocr"]))
    assert (1000 * times).tolist() == [999, 963, 922, 874, 817, 749, 666]  # what the model gets


@pytest.mark.parametrize("name", ["nowhere", "{}/nowhere", "{}"])
def test_a_model_that_does_not_load_is_one_sentence(name, tmp_path):
    with pytest.raises(UserError, match="^cannot load --model .*; give its name"):
        sd35.load_pipeline(name.format(tmp_path), torch.float32)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_the_hub_refuses_needs_its_name_or_its_licence(wrapped, monkeypatch):
    """For a gated model the hub's error comes as it is, for an unknown name as another's cause."""
    error = GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))

    def download(name):
        if wrapped:
            raise OSError("no such model") from error
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    hint = "check the name, or accept the licence at https://huggingface.co/a/b and run"
    with pytest.raises(UserError, match=hint):
        sd35.load_pipeline("a/b", torch.float32)


def test_a_sampler_with_more_steps_than_times_is_refused():
    """DPM-Solver++ with whole-number timesteps fails in its last step from steps x shift 1,000."""
    for sampler, steps, fits in (("dpm++", 330, True), ("dpm++", 400, False), ("euler", 400, True)):
        scheduler = sd35.make_scheduler(sampler, 3.0)
        if fits:
            assert len(sd35.rollout_times(scheduler, steps)) == steps
        else:
            with pytest.raises(UserError, match="too many for the sampler"):
                sd35.rollout_times(scheduler, steps)
