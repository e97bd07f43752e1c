"""The model as Algorithm 1 sees it, on a tiny untrained pipeline of SD3.5's classes."""

import pytest
import shapes
import torch
from diffusers import StableDiffusion3Pipeline

import sd35
from cli import Fault

TEXT = "red diamond"


@pytest.fixture
def model(tiny):
    """With a LoRA that does something, and other values in theta_old and the saved average."""
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    pipe.scheduler = sd35.make_scheduler("dpm++", 3.0)
    encoded = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))([TEXT], {})
    theta = sd35.add_lora(pipe.transformer, 4, 8, 0, False)
    model = sd35.Model(pipe, theta, shapes.SIDE, 4, encoded=encoded)
    with torch.no_grad():
        for values, scale in ((model.theta, 0.1), (model.old, 0.2), (model.average, 0.3)):
            for i, value in enumerate(values):
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
                value.add_(scale * noise)
    return model


@pytest.fixture
def point(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *model.latent_shape, generator=generator)
    return x, torch.tensor([0.3, 0.6, 0.9]), torch.zeros(3, dtype=torch.long)


@torch.no_grad()
def test_the_one_that_is_asked_answers(model, point, tiny):
    """Four different answers, each the one of a transformer that has only these weights."""
    asked = {
        "theta": model.velocity(TEXT)(*point),
        "reference": model.velocity(TEXT, who=model.reference)(*point),
        "old": model.velocity(TEXT, who=model.theta_old)(*point),
        "average": model.velocity(TEXT, who=model.saved_average)(*point),
    }
    found = list(asked.values())
    assert min((a - b).abs().max() for a in found for b in found if a is not b) > 1e-4

    base = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32).transformer
    x, t, _ = point
    encoded = model.encoded[TEXT]
    prompt = (encoded.embeds.expand(3, -1, -1), encoded.pooled.expand(3, -1))
    assert torch.equal(base(x, *prompt, 1000 * t).sample, asked["reference"])
    for values, name in ((model.old, "old"), (model.average, "average")):
        for parameter, value in zip(model.theta, values, strict=True):
            parameter.copy_(value)
        assert torch.equal(model.velocity(TEXT)(*point), asked[name])


def test_a_context_gives_everything_back_also_after_an_error(model):
    before = [parameter.clone() for parameter in model.theta]
    places = [parameter.data_ptr() for parameter in model.theta]
    for who in (model.reference, model.theta_old, model.saved_average):
        with pytest.raises(ZeroDivisionError), who():
            raise ZeroDivisionError
    assert all(torch.equal(*pair) for pair in zip(before, model.theta, strict=True))
    assert places == [parameter.data_ptr() for parameter in model.theta]
    assert all(parameter.requires_grad for parameter in model.theta)


@torch.no_grad()
def test_guidance_is_the_line_through_both_answers(model, point):
    conditional, empty = model.velocity(TEXT)(*point), model.velocity("")(*point)
    guided = model.velocity(TEXT, 4.5)(*point)
    assert (guided - (empty + 4.5 * (conditional - empty))).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_samples_are_the_pipelines_own_and_do_not_depend_on_the_pass(model, tiny, guidance):
    noise = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    images = model.decode(model.sample(TEXT, noise, 4, guidance))
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32)
    pipe.scheduler = sd35.make_scheduler("dpm++", 3.0)
    pipe.set_progress_bar_config(disable=True)
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
    with model.reference():
        drawn = model.decode(model.sample(TEXT, noise, 4, guidance))
    assert (drawn - expected).abs().max() < 1e-4 < (images - expected).abs().max()
    model.images_a_pass = 2
    again = model.decode(model.sample(TEXT, noise, 4, guidance))
    assert (again - images).abs().max() < 1e-4


def test_what_comes_between_passes_can_end_the_work(model, point):
    calls = []
    model.between_passes = lambda: calls.append(1) or (1 / (3 - len(calls)))
    noise = torch.randn(12, *model.latent_shape)
    with pytest.raises(ZeroDivisionError):
        model.sample(TEXT, noise, 1, 1.0)
    assert len(calls) == 3


def test_a_lora_is_saved_as_the_average_and_loads_in_diffusers(model, point, tiny, tmp_path):
    x, t, _ = point
    sd35.save_lora(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [sd35.LORA_FILE]
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    sd35.load_lora(pipe, tmp_path)
    encoded = model.encoded[TEXT]
    prompt = (encoded.embeds.expand(3, -1, -1), encoded.pooled.expand(3, -1))
    with torch.no_grad():
        loaded = pipe.transformer(x, *prompt, 1000 * t).sample
        average = model.velocity(TEXT, who=model.saved_average)(*point)
    assert (loaded - average).abs().max() < 1e-5

    other = shapes.build(width=64, layers=1)
    with pytest.raises(Fault, match="does not fit the model") as fault:
        sd35.load_lora(other, tmp_path)
    assert "\n" not in str(fault.value)
    with pytest.raises(Fault, match="does not fit the model"):
        sd35.load_lora(pipe, tmp_path / "none")


def test_a_model_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(Fault, match="cannot load .*nowhere.* or give a local folder") as fault:
        sd35.load_pipeline(str(tmp_path / "nowhere"), torch.float32)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [
        # The sigmas of the released trainer's scheduler, diffusers' own, to five places.
        (
            "dpm++",
            10,
            [0.99967, 0.96394, 0.92272, 0.87463, 0.81781, 0.74963, 0.66630, 0.56215, 0.42827]
            + [0.24979],
        ),
        ("euler", 2, [1.0, 0.00893]),
    ],
)
def test_the_rollouts_times(sampler, steps, expected):
    times = sd35.rollout_times(sd35.make_scheduler(sampler, 3.0), steps)
    assert times.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_prompt_is_encoded_once_and_alone(model, tiny):
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    encode = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.text_encoder_3 is None
    one = encode([TEXT], {})
    assert list(one) == ["", TEXT]
    both = encode(["blue square", TEXT, TEXT], one)
    assert list(both) == ["", TEXT, "blue square"] and both[TEXT] is one[TEXT]
    alone = encode(["blue square"], {})["blue square"]
    assert torch.equal(alone.embeds, both["blue square"].embeds)
