"""A fresh vision projection that starts from the statistics of its vision tower's tokens."""

import pretrain
import pytest
import torch
from huggingface_hub import constants
from torch.testing import assert_close
from transformers import set_seed

from common.arguments import ModelArguments, parse_arguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import build_model
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.vision_tower import moments, whitening_matrix

from .helpers import save_image_folder, save_towers, tiny_model
from .training import CONNECTOR, flags, save_recipe


def correlated_tokens(num_tokens=500, dim=6):
    """Tokens with a large common part, some of whose directions vary a hundred times as much as others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scales = torch.logspace(-1, 1, dim)
    return torch.randn(num_tokens, dim, generator=generator) * scales @ mixing + 5


def test_white_tokens_are_uncorrelated_with_equal_variances():
    tokens = correlated_tokens()
    mean, covariance = moments(tokens.split(70))
    matrix = whitening_matrix(covariance, shrinkage=1e-9)
    white = (tokens.double() - mean) @ matrix
    assert_close(torch.cov(white.T, correction=0), torch.eye(6).double(), atol=1e-4, rtol=0)
    assert_close(matrix, matrix.T)


def test_the_projection_whitens_its_inputs_first():
    model = tiny_model()
    features = correlated_tokens(17 * 20, 16).view(20, 17, 16)
    fresh = model.vision_projection.weight.clone()
    model.whiten_vision_projection(features)
    tokens = model.ln_vision(features)
    mean, covariance = moments([tokens.flatten(0, 1)])
    expected = (tokens.double() - mean) @ whitening_matrix(covariance) @ fresh.double().T
    assert_close(model.vision_projection(tokens), expected.float(), atol=1e-5, rtol=1e-5)
    assert model.vision_projection.weight.requires_grad

    other = tiny_model()
    other.vision_projection.weight.data.copy_(fresh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.whiten_vision_projection(batch for batch in features.split(6))
    assert_close(other.vision_projection.weight, model.vision_projection.weight)


@pytest.mark.parametrize("offloaded", [{"ln_vision"}, {"vision_projection"}, {"ln_vision", "vision_projection"}])
def test_a_projection_on_the_disk_is_whitened_and_saved(offloaded, tmp_path):
    model, features = tiny_model(), correlated_tokens(17 * 20, 16).view(20, 17, 16)
    model.save_pretrained(tmp_path / "model", towers="include")
    device_map = {name: "disk" if name in offloaded else "cpu" for name, _ in model.named_children()}
    loaded = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "model", device_map=device_map)
    for each in (model, loaded):
        each.whiten_vision_projection(features)
    prompt = model.project_vision_features(features).pooler_output
    assert_close(loaded.project_vision_features(features).pooler_output, prompt)
    loaded.save_pretrained(tmp_path / "white", towers="include")
    again = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "white")
    assert_close(again.project_vision_features(features).pooler_output, prompt)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.randn(17, 16), ValueError, r"must have shape \(images, 17, 16\), but has \(17, 16\)"),
        (torch.zeros(0, 17, 16), ValueError, "`vision_features` cannot be whitened: .* there are 0"),
        (torch.full((3, 17, 16), torch.nan), ValueError, "`vision_features` cannot be whitened: .* finite"),
        (torch.ones(3, 17, 16), ValueError, "`vision_features` cannot be whitened: .* all the same"),
        ([[1.0]], TypeError, "`vision_features` must be a tensor, but is a list"),
    ],
)
def test_features_that_cannot_be_whitened_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        tiny_model().whiten_vision_projection(features)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares a training on tiny towers and images, as `examples/pretrain.py` does."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    settings = {**save_towers(tmp_path), "connector_config": CONNECTOR, "output_dir": str(tmp_path)}
    save_recipe(tmp_path, **settings, dataset=save_image_folder(tmp_path / "images"))

    def run(**changes):
        argv = flags(config=tmp_path / "recipe.yaml", **changes)
        model_args, processor_args, data_args, _, training_args = parse_arguments(*pretrain.ARGUMENTS, argv=argv)
        set_seed(training_args.seed)
        train, test = load_datasets(data_args, training_args.seed)
        model, processor = build_model(model_args, processor_args)
        train, _ = cache_features(model, processor, train, test, data_args, training_args.seed)
        pretrain.whiten_vision_projection(model, processor, train, data_args, model_args.whitening_images)
        return model, train

    return run


def test_the_script_whitens_from_images_from_a_cache_and_from_a_stream(prepare):
    random = prepare()[0].vision_projection
    images = prepare(whitening_images=100)[0]  # all images that there are
    assert not torch.allclose(images.vision_projection.weight, random.weight, rtol=0.1)
    cached, train = prepare(whitening_images=100, cache_features=True)
    assert_close(cached.vision_projection.weight, images.vision_projection.weight, atol=1e-3, rtol=1e-2)
    features = torch.stack([torch.tensor(row["vision_features"][0]).float() for row in train])
    tokens = cached.vision_projection(cached.ln_vision(features))
    assert_close(tokens.mean(dim=(0, 1)), torch.zeros(32), atol=1e-4, rtol=0)
    streamed = prepare(whitening_images=len(train), streaming=True, test_split="")[
        0
    ].vision_projection  # another order
    assert_close(streamed.weight, images.vision_projection.weight, atol=1e-4, rtol=1e-3)


def test_bad_images_are_named_or_left_out(prepare, tmp_path):
    first = sorted((tmp_path / "images" / "train").glob("*.png"))[0]
    first.write_bytes(b"no image")
    with pytest.raises(ValueError, match=first.name):
        prepare(whitening_images=16)
    assert prepare(whitening_images=16, skip_bad_rows=True)[0].vision_projection.bias.any()


@pytest.mark.parametrize("number", [-1, 1.5, None, True])
def test_a_number_of_images_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match=f"`whitening_images` must be an integer of 0 or more, but is {number}"):
        ModelArguments(whitening_images=number)
