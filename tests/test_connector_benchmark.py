"""benchmarks/connectors: runs train from end to end on tiny data, and the pages' tables are those of results.jsonl."""

import pytest
import torch
import yaml
from huggingface_hub import constants

from benchmarks.connectors import __main__ as connectors
from benchmarks.connectors.methods import DATASETS, METHODS, Data, connector_of
from benchmarks.connectors.two_stage import CaptionVocabulary, StageOne
from benchmarks.models import CROWDED_RECIPE, DEMO_VISION, SMOLLM2_135M
from benchmarks.results import read_results
from common.demo import crowded_scenes
from common.models import connector_fields
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import ROOT, demo_packages_or_skip, save_image_folder, save_towers, tiny_model, tiny_tokenizer

CAPTIONS = ["a red circle", "a blue triangle to the left of a green square", "a cat"]
TRAINED = ("evlgen", "qformer", "qformer-two-stage")  # the others on crowded scenes
PUBLISHED = read_results(connectors.RESULTS)


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """An empty file of results, and two steps of each stage."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(connectors, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr("benchmarks.connectors.training_run.STAGE_ONE_STEPS", 2)
    monkeypatch.setattr("benchmarks.connectors.training_run.STAGE_ONE_BATCH", 8)


def save_recipe(path, **settings):
    recipe = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "whitening_images": 8}
    path.write_text(yaml.safe_dump({**recipe, "cache_features": True, "disable_tqdm": True, **settings}))
    return path


def test_methods_are_trained_measured_and_compared(few_steps, tmp_path, monkeypatch, capsys):
    images = save_image_folder(tmp_path / "images")
    recipe = save_recipe(tmp_path / "recipe.yaml", **save_towers(tmp_path), logging_steps=1)
    monkeypatch.setitem(DATASETS, images, Data(recipe, 4, (1, 2), (2,), 4))
    two_seeds = ["--dataset", images, "--methods", "evlgen", "--seeds", "0", "1"]
    connectors.main(two_seeds)
    connectors.main(["--dataset", images, "--methods", *TRAINED])
    results = read_results(connectors.RESULTS)
    runs = [("evlgen", 0), ("evlgen", 1), *((method, 0) for method in TRAINED[1:])]
    assert list(results) == [f"{images}.{method}.seed{seed}" for method, seed in runs]
    for result in results.values():
        assert {"commit", "run", "fields", "trained_parameters"} < result.keys() and result["flops_per_step"] > 0
        assert [point["step"] for point in result["curve"]] == [1, 2] and len(result["training_loss"]) == 2
        assert result["curve"][0].keys() == {"step", "loss", "gap"} and result["curve"][1].keys() > {"exact"}
    two, one = (results[f"{images}.{method}.seed0"] for method in ("qformer-two-stage", "qformer"))
    assert two["flops_per_step"] == one["flops_per_step"] and two["stage_one_flops_per_step"] > 0
    assert two["training_loss"][0] != one["training_loss"][0]  # it starts from what the first stage left
    printed = capsys.readouterr().out
    assert "| evlgen | 2 | " in printed and all(f"| {method} | 1 | " in printed for method in TRAINED[1:])

    monkeypatch.setattr(connectors, "train", pytest.fail)  # a finished run is not trained again
    connectors.main(two_seeds)


def test_captions_of_crowded_scenes_are_read(few_steps, tmp_path, monkeypatch, capsys):
    demo_packages_or_skip(tmp_path / "hf_home")
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 8, "test": 4})
    settings = {**yaml.safe_load(CROWDED_RECIPE.read_text()), "text_model": save_towers(tmp_path)["text_model"]}
    recipe = save_recipe(tmp_path / "recipe.yaml", **{**settings, "per_device_train_batch_size": 2})
    monkeypatch.setitem(DATASETS, "crowded-scenes", Data(recipe, 28, (1,), (1,), 4))
    connectors.main(["--dataset", "crowded-scenes", "--methods", "evlgen", "qformer-chooses-first", "mean-pooling"])
    results = read_results(connectors.RESULTS)
    assert all(result["curve"][0].keys() > {"exact", "named"} for result in results.values())
    assert "| method | seeds | loss at 1 | gap | exact at 1 | named |" in capsys.readouterr().out


@pytest.mark.parametrize("dataset, page", [*zip(DATASETS, ("claims", "claims", "crowded_images"), strict=True)])
def test_the_tables_of_the_pages_are_those_of_the_published_results(dataset, page):
    assert connectors.figures_table(PUBLISHED, dataset) in (ROOT / "docs" / f"{page}.md").read_text()


def test_methods_have_as_many_parameters():
    sizes = []
    for method in METHODS:
        fields = {**connector_fields(*connector_of(method, 14)), "class_token": False}
        config = EVLGenConfig(**DEMO_VISION, text_config=SMOLLM2_135M, connector_config=fields)
        with torch.device("meta"):
            sizes.append(EVLGenForConditionalGeneration(config).num_parameters(only_trainable=True))
    assert max(sizes) < 1.1 * min(sizes), sizes


def test_the_first_stage_trains_the_models_own_qformer():
    torch.manual_seed(0)
    model = tiny_model(model_type="evlgen_qformer", num_query_tokens=5, position_initializer_range=0.1)
    vocabulary = CaptionVocabulary(tiny_tokenizer(), CAPTIONS)
    stage_one, text_ids = StageOne(model, len(vocabulary)), vocabulary.encode(CAPTIONS)
    features = torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(stage_one.parameters(), lr=3e-3)
    parts = []  # contrast, matching and captioning
    for _ in range(160):
        losses = stage_one(features, text_ids)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        parts.append([losses[name].item() for name in ("contrast", "matching", "captioning")])
    first, last = torch.tensor(parts[:5]).mean(dim=0), torch.tensor(parts[-5:]).mean(dim=0)
    assert (last < 0.6 * first).all(), (first, last)
    changed = {n.split(".")[0] for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"ln_vision", "vision_projection", "connector"}
    untrained = [n for n, p in model.connector.named_parameters() if torch.equal(p, before[f"connector.{n}"])]
    assert not [name for name in untrained if not name.endswith("key.bias")]  # which softmax does not see
