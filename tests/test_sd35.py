"""The model as Algorithm 1 sees it, on a tiny untrained pipeline of SD3.5's classes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import shapes
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

import checkpoints
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
    checkpoints.save_lora(tiny_model, tmp_path)
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
    with pytest.raises(Fault, match="does not fit the model .*; give another") as fault:
        sd35.load_lora(other, tmp_path)
    assert "\n" not in str(fault.value)
    with pytest.raises(Fault, match="does not fit the model"):
        sd35.load_lora(pipe, tmp_path / "none")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (
            GatedRepoError,
            "accept its licence at https://huggingface.co/a/b and do `hf auth login`, or",
        ),
        (ConnectionError, "[(]no answer[)]; without a connection, bring the hub's cache here and"),
    ],
)
def test_a_model_of_the_hub_that_does_not_come_says_what_to_do(kind, advice, monkeypatch):
    def download(name):
        cause = ConnectionError("no answer")
        if kind is GatedRepoError:
            cause = kind("gated", response=SimpleNamespace(headers={}, request=None))
        raise OSError("look at the stack trace above") from cause

    monkeypatch.setattr(sd35.StableDiffusion3Pipeline, "download", download)
    with pytest.raises(Fault, match=advice):
        sd35.load_pipeline("a/b", torch.float32)


@pytest.mark.parametrize("name", ["{}/nowhere", "./nowhere", "../nowhere", "~/nowhere", "nowhere"])
def test_a_model_that_is_not_there_says_what_to_do(name, tmp_path):
    with pytest.raises(
        Fault, match="cannot load .*nowhere .there is no such folder.*give a folder"
    ) as fault:
        sd35.load_pipeline(name.format(tmp_path), torch.float32)
    assert "\n" not in str(fault.value) and "licence" not in str(fault.value)


def test_weights_are_finite_though_their_sum_is_too_large_for_float16(tiny):
    pipe = sd35.load_pipeline(str(tiny), torch.float16)
    weight = next(pipe.transformer.parameters())
    weight.data.fill_(6e4)
    assert weight.sum().isinf()
    sd35.check_weights(pipe)
    weight.data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="its transformer has no finite "):
        sd35.check_weights(pipe)


def without(name):
    return lambda folder, index: shutil.rmtree(folder / name)


def without_file(name):
    return lambda folder, index: (folder / name).unlink()


def set_config(name, **values):
    def damage(folder, index):
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def not_finite(name):
    def damage(folder, index):
        path = folder / name / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] = torch.nan
        save_file(weights, path)

    return damage


def instead(**parts):
    return lambda folder, index: index.update(parts)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *((without(name), f"it has no {name})") for name in sd35.PARTS),
        *((instead(**{name: [None, None]}), f"it has no {name})") for name in sd35.PARTS[:-2]),
        (lambda folder, index: index.pop("text_encoder_3"), "it has no text_encoder_3)"),
        (instead(tokenizer_3=[None, None]), "it has no tokenizer_3)"),
        (without_file("text_encoder_3/config.json"), "it has no text_encoder_3)"),
        (without_file("tokenizer_3/tokenizer.json"), "its tokenizer_3 has 4 tokens"),
        (without_file("tokenizer/tokenizer.json"), "its tokenizer has 2 tokens"),
        (without_file("vae/diffusion_pytorch_model.safetensors"), "vae"),
        (instead(transformer=["diffusers", "Nonsense"]), "no class `Nonsense`"),
        (lambda folder, index: index.clear(), "it has no scheduler"),
        (set_config("transformer", patch_size=0), "by its config, it has no resolution"),
        (set_config("vae", scaling_factor=0), "what its vae decodes is not finite"),
        (set_config("transformer", num_layers=5), "transformer_blocks.1.norm1_context.linear"),
        (instead(_class_name="StableDiffusionXLPipeline"), "it is a StableDiffusionXLPipeline"),
        (set_config("text_encoder", hidden_size=16), "a text encoder's weights have not"),
        (not_finite("vae"), "its vae has no finite "),
        (not_finite("transformer"), "its transformer has no finite "),
    ],
)
def test_a_folder_without_one_of_its_parts_is_one_line_that_names_it(tiny, tmp_path, damage, said):
    folder = shutil.copytree(tiny, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    damage(folder, index)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(Fault) as fault:
        sd35.load_pipeline(str(folder), torch.float32)
    assert said in str(fault.value) and "\n" not in str(fault.value)
    assert "licence" not in str(fault.value) and "give a folder" in str(fault.value)


def test_a_model_may_say_that_it_has_no_t5(tiny, tmp_path):
    """It is encoded as in the pipeline that diffusers makes of it."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    for name in sd35.T5:
        shutil.rmtree(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, **dict.fromkeys(sd35.T5, [None] * 2)})
    )
    pipe = sd35.load_pipeline(str(folder), torch.float32)
    assert pipe.text_encoder_3 is None is pipe.tokenizer_3
    expected = encode_prompt(pipe, TEXT)
    found = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))([TEXT], {})[TEXT]
    assert torch.equal(found.embeds, expected[0]) and torch.equal(found.pooled, expected[2])


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


def encode_prompt(pipe, text, device=None):
    with torch.no_grad():
        return pipe.encode_prompt(
            text,
            text,
            text,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=shapes.TOKENS,
        )


def test_a_prompt_is_encoded_once_and_alone(tiny_model, tiny):
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    encode = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))
    assert pipe.text_encoder is pipe.text_encoder_2 is pipe.text_encoder_3 is None
    one = encode([TEXT], {})
    assert list(one) == ["", TEXT]
    both = encode(["blue square", TEXT, TEXT], one)
    assert list(both) == ["", "blue square", TEXT] and both[TEXT] is one[TEXT]
    alone = encode(["blue square"], {})["blue square"]
    assert torch.equal(alone.embeds, both["blue square"].embeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_prompt_becomes_is_encode_prompts_to_the_bit(tiny, dtype):
    texts = ["", TEXT, "a blue square and a word that no tokenizer knows, which is cut off"]
    pipe = sd35.load_pipeline(str(tiny), dtype)
    expected = {text: encode_prompt(pipe, text) for text in texts}
    found = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu"))(texts, {})
    for text, (embeds, _, pooled, _) in expected.items():
        assert embeds.dtype == dtype and found[text].embeds.dtype == torch.float32
        assert torch.equal(found[text].embeds, embeds.float())
        assert torch.equal(found[text].pooled, pooled.float())


def test_one_network_at_a_time_is_on_the_device_while_prompts_are_encoded(tiny, monkeypatch):
    """The device is the CPU by another name: all work is done, and who is sent where is seen.

    Who has left comes back to where it was: that is offload_models of diffusers, and not seen here.
    """
    pipe = sd35.load_pipeline(str(tiny), torch.float32)
    names = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    modules = {name: getattr(pipe, name) for name in names}
    there, sent, at_work = {"transformer", "vae"}, [], []

    def send(name, device):
        sent.append((name, str(device)))
        there.symmetric_difference_update({name})  # each move is to the other place
        assert len(there - {"vae"}) <= 1

    for name, module in modules.items():
        # With a default argument, as all functions are of one loop.
        monkeypatch.setattr(module, "to", lambda device, name=name: send(name, device))
        module.register_forward_pre_hook(lambda *_, name=name: at_work.append((name, set(there))))
    encode = sd35.Encoder(pipe, shapes.TOKENS, torch.device("cpu", 0))
    encode([TEXT, "blue square"], {})
    assert at_work == [(name, {name}) for name in names[2:] for _ in range(3)]
    assert sent[:2] == [("transformer", "cpu"), ("vae", "cpu")]
    assert sent[2:-2] == [(name, place) for name in names[2:] for place in ("cpu:0", "cpu")]
    assert [name for name, _ in sent[-2:]] == names[:2] and there == set(names[:2])


@torch.no_grad()
def test_the_vae_has_passes_of_its_own(tiny_model, monkeypatch):
    """However many images a pass of the transformer takes, and the pictures are the same."""
    latents = torch.randn(5, *tiny_model.latent_shape)
    whole, sizes = tiny_model.decode(latents), []
    monkeypatch.setattr(sd35, "DECODED", 2 * latents[0, 0].numel())
    monkeypatch.setattr(tiny_model, "between_passes", lambda: sizes.append(1))
    assert torch.allclose(tiny_model.decode(latents), whole, atol=1e-6) and len(sizes) == 3
