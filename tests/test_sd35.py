"""The model as Algorithm 1 sees it, on a tiny untrained pipeline of SD3.5's classes."""

import pytest
import shapes
import torch
from diffusers import StableDiffusion3Pipeline

import sd35
from cli import Fault

TEXT = "red diamond"


@pytest.fixture
def point(tiny_model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *tiny_model.latent_shape, generator=generator)
    return x, torch.tensor([0.3, 0.6, 0.9]), torch.zeros(3, dtype=torch.long)


@torch.no_grad()
def test_the_one_that_is_asked_answers(tiny_model, point, tiny):
    """Four different answers, each the one of a transformer that has only these weights."""
    asked = {
        "theta": tiny_model.velocity(TEXT)(*point),
        "reference": tiny_model.velocity(TEXT, who=tiny_model.reference)(*point),
        "old": tiny_model.velocity(TEXT, who=tiny_model.theta_old)(*point),
        "average": tiny_model.velocity(TEXT, who=tiny_model.saved_average)(*point),
    }
    found = list(asked.values())
    assert min((a - b).abs().max() for a in found for b in found if a is not b) > 1e-4

    base = StableDiffusion3Pipeline.from_pretrained(tiny, dtype=torch.float32).transformer
    x, t, _ = point
    encoded = tiny_model.encoded[TEXT]
    prompt = (encoded.embeds.expand(3, -1, -1), encoded.pooled.expand(3, -1))
    assert torch.equal(base(x, *prompt, 1000 * t).sample, asked["reference"])
    for values, name in ((tiny_model.old, "old"), (tiny_model.average, "average")):
        for parameter, value in zip(tiny_model.theta, values, strict=True):
            parameter.copy_(value)
        assert torch.equal(tiny_model.velocity(TEXT)(*point), asked[name])


def test_a_context_gives_everything_back_also_after_an_error(tiny_model):
    before = [parameter.clone() for parameter in tiny_model.theta]
    places = [parameter.data_ptr() for parameter in tiny_model.theta]
    for who in (tiny_model.reference, tiny_model.theta_old, tiny_model.saved_average):
        with pytest.raises(ZeroDivisionError), who():
            raise ZeroDivisionError
    assert all(torch.equal(*pair) for pair in zip(before, tiny_model.theta, strict=True))
    assert places == [parameter.data_ptr() for parameter in tiny_model.theta]
    assert all(parameter.requires_grad for parameter in tiny_model.theta)


@torch.no_grad()
def test_guidance_is_the_line_through_both_answers(tiny_model, point):
    conditional, empty = tiny_model.velocity(TEXT)(*point), tiny_model.velocity("")(*point)
    guided = tiny_model.velocity(TEXT, 4.5)(*point)
    assert (guided - (empty + 4.5 * (conditional - empty))).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_samples_are_the_pipelines_own_and_do_not_depend_on_the_pass(tiny_model, tiny, guidance):
    noise = torch.randn(5, *tiny_model.latent_shape, generator=torch.Generator().manual_seed(1))
    images = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
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
    with tiny_model.reference():
        drawn = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
    assert (drawn - expected).abs().max() < 1e-4 < (images - expected).abs().max()
    tiny_model.images_a_pass = 2
    again = tiny_model.decode(tiny_model.sample(TEXT, noise, 4, guidance))
    assert (again - images).abs().max() < 1e-4


def test_what_comes_between_passes_can_end_the_work(tiny_model, point):
    calls = []
    tiny_model.between_passes = lambda: calls.append(1) or (1 / (3 - len(calls)))
    noise = torch.randn(12, *tiny_model.latent_shape)
    with pytest.raises(ZeroDivisionError):
        tiny_model.sample(TEXT, noise, 1, 1.0)
    assert len(calls) == 3


def test_a_lora_is_saved_as_the_average_and_loads_in_diffusers(tiny_model, point, tiny, tmp_path):
    x, t, _ = point
    sd35.save_lora(tiny_model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [sd35.LORA_FILE]
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    sd35.load_lora(pipe, tmp_path)
    encoded = tiny_model.encoded[TEXT]
    prompt = (encoded.embeds.expand(3, -1, -1), encoded.pooled.expand(3, -1))
    with torch.no_grad():
        loaded = pipe.transformer(x, *prompt, 1000 * t).sample
        average = tiny_model.velocity(TEXT, who=tiny_model.saved_average)(*point)
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
        # The integer times of the released trainer's scheduler, in thousandths.
        ("dpm++", 10, [0.999, 0.963, 0.922, 0.874, 0.817, 0.749, 0.666, 0.562, 0.428, 0.249]),
        ("euler", 2, [1.0, 0.00893]),
    ],
)
def test_the_rollouts_times(sampler, steps, expected):
    times = sd35.rollout_times(sd35.make_scheduler(sampler, 3.0), steps)
    assert times.tolist() == pytest.approx(expected, abs=3e-6)


def test_a_prompt_is_encoded_once_and_alone(tiny_model, tiny):
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    encode = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.text_encoder_3 is None
    one = encode([TEXT], {})
    assert list(one) == ["", TEXT]
    both = encode(["blue square", TEXT, TEXT], one)
    assert list(both) == ["", TEXT, "blue square"] and both[TEXT] is one[TEXT]
    alone = encode(["blue square"], {})["blue square"]
    assert torch.equal(alone.embeds, both["blue square"].embeds)
