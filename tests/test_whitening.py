"""A fresh vision projection that starts from the statistics of its vision tower's tokens."""

import json

import pretrain
import pytest
import torch
from huggingface_hub import constants
from torch.testing import assert_close

from common.arguments import parse_arguments
from modeling_evlgen.whitening import whitening

from .helpers import save_image_folder, save_towers, tiny_model


def correlated_tokens(num_tokens=500, dim=6):
    """Tokens with a large common part, some of whose directions vary a hundred times as much as others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scales = torch.logspace(-1, 1, dim)
    return torch.randn(num_tokens, dim, generator=generator) * scales @ mixing + 5


def test_white_tokens_have_no_mean_and_are_uncorrelated():
    tokens = correlated_tokens()
    mean, matrix = whitening(tokens, shrinkage=0.0)
    white = (tokens - mean) @ matrix
    assert_close(white.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    assert_close(torch.cov(white.T), torch.eye(6), atol=1e-3, rtol=0)
    assert_close(matrix, matrix.T)


def test_shrinkage_leaves_directions_without_variance_alone():
    tokens = correlated_tokens()
    tokens[:, 0] = tokens[:, 1]  # one direction does not vary at all
    mean, matrix = whitening(tokens, shrinkage=0.1)
    variances = torch.linalg.eigvalsh(torch.cov(((tokens - mean) @ matrix).T))
    assert variances[0].abs() < 1e-4 and 0.9 < variances[-1] <= 1 / 0.9
    variance = torch.cov(tokens.T).diagonal().mean()
    assert torch.linalg.eigvalsh(matrix).max() <= (0.1 * variance) ** -0.5 * 1.001
    assert_close(whitening(tokens, shrinkage=1.0)[1], torch.eye(6) / variance.sqrt())


@pytest.mark.parametrize(
    ("tokens", "shrinkage", "message"),
    [
        (torch.randn(3, 4, 5), 0.1, r"`tokens` must have shape \(2 or more, dim\), but has \(3, 4, 5\)"),
        (torch.randn(1, 4), 0.1, r"but has \(1, 4\)"),
        (torch.ones(5, 4), 0.1, "must be finite and vary, but have a mean variance of 0"),
        (torch.full((5, 4), torch.nan), 0.1, "must be finite and vary, but have a mean variance of nan"),
        (torch.randn(5, 4), 1.5, "`shrinkage` must be between 0 and 1, but is 1.5"),
    ],
)
def test_what_cannot_be_whitened_is_refused(tokens, shrinkage, message):
    with pytest.raises(ValueError, match=message):
        whitening(tokens, shrinkage)


def test_the_projection_becomes_itself_behind_a_whitening():
    model = tiny_model()
    features = correlated_tokens(17 * 20, 16).view(20, 17, 16)
    fresh = model.vision_projection.weight.clone()
    model.whiten_vision_projection(features)
    tokens = model.ln_vision(features)
    mean, matrix = whitening(tokens.flatten(0, 1))
    assert_close(model.vision_projection(tokens), (tokens - mean) @ matrix @ fresh.T, atol=1e-5, rtol=1e-5)
    assert model.vision_projection.weight.requires_grad
    with pytest.raises(ValueError, match=r"`vision_features` must have shape \(images, 17, 16\), but has \(17, 16\)"):
        model.whiten_vision_projection(features[0])


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares a training on tiny towers and pictures, as `examples/pretrain.py` does."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    recipe = tmp_path / "recipe.yaml"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    settings = {**save_towers(tmp_path), "connector_config": {**sizes, "merge_r": 3}, "output_dir": str(tmp_path)}
    settings["dataset"] = save_image_folder(tmp_path / "pictures")
    recipe.write_text(json.dumps(settings))  # JSON is YAML

    def run(*argv):
        return pretrain.prepare(*parse_arguments(*pretrain.ARGUMENTS, argv=["--config", str(recipe), *argv]))

    return run


def test_the_script_whitens_from_pictures_from_a_cache_and_from_a_stream(prepare):
    random = prepare()[0].vision_projection
    pictures = prepare("--whitening_images", "100")[0]  # all there are
    assert not torch.allclose(pictures.vision_projection.weight, random.weight, rtol=0.1)
    cached, _, train, _, _ = prepare("--whitening_images", "100", "--cache_features", "true")
    assert_close(cached.vision_projection.weight, pictures.vision_projection.weight, atol=1e-3, rtol=1e-2)
    features = torch.stack([torch.from_numpy(row["vision_features"][0].copy()).float() for row in train])
    tokens = cached.vision_projection(cached.ln_vision(features))
    assert_close(tokens.mean(dim=(0, 1)), torch.zeros(32), atol=1e-4, rtol=0)
    streamed = prepare("--whitening_images", str(len(train)), "--streaming", "true", "--test_split", "")[0]
    assert_close(
        streamed.vision_projection.weight, pictures.vision_projection.weight, atol=1e-4, rtol=1e-3
    )  # in another order


def test_a_negative_number_of_pictures_is_refused(prepare):
    with pytest.raises(ValueError, match="`whitening_images` must be 0 or more, but is -1"):
        prepare("--whitening_images", "-1")
