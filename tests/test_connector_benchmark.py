"""benchmarks/connectors: runs train from end to end on tiny data, and the pages' tables are those of results.jsonl."""

import pretrain
import pytest
import torch
import yaml
from huggingface_hub import constants

from benchmarks.connectors import __main__ as connectors
from benchmarks.connectors.methods import DATASETS, METHODS, Data, connector_of
from benchmarks.connectors.training_run import name_score
from benchmarks.connectors.two_stage import CaptionVocabulary, StageOne
from benchmarks.models import CROWDED_RECIPE, DEMO_VISION, SMOLLM2_135M
from benchmarks.results import read_results
from common.demo import crowded_scenes
from common.models import connector_fields
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import ROOT, demo_packages_or_skip, save_image_folder, save_towers, tiny_tokenizer
from .test_connectors import peer_model

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


@pytest.mark.parametrize("dataset, page", zip(DATASETS, ("claims", "claims", "crowded_images"), strict=True))
def test_the_tables_of_the_pages_are_those_of_the_published_results(dataset, page):
    assert connectors.figures_table(PUBLISHED, dataset) in (ROOT / "docs" / f"{page}.md").read_text()


def test_a_table_has_bands_of_seeds_and_the_cost_of_both_stages():
    def line(method, seed, loss, **others):
        curve = [{"step": step, "loss": loss, "gap": loss, "exact": loss / 2} for step in (100, 200)]
        run = {"method": method, "dataset": "easy-vqa", "seed": seed, **others}
        return {"run": run, "curve": curve, "flops_per_step": 10**13, "stage_one_flops_per_step": 10**12}

    lines = [line("evlgen", 0, 0.2), line("evlgen", 1, 0.4), line("qformer-two-stage", 0, 1.0, stage_one_steps=100)]
    lines += [line("evlgen", 0, 9.0, group="ablation")]
    seconds = {"evlgen": 2.0, "qformer-two-stage": 1.0, "stage-one": 1.0}
    results = {**dict(enumerate(lines)), "timing.easy-vqa": {"seconds": seconds}}
    rows = connectors.figures_table(results, "easy-vqa").splitlines()[2:]
    loss, exact = "0.300 [0.200, 0.400]", "15.0 [10.0, 20.0]"
    assert rows[0] == f"| evlgen | 2 | {loss} | {loss} | 0.30 | {exact} | {exact} | 2.000 | 1.00 |"
    assert rows[1].endswith("| 50.0 | 50.0 | 2.100 | 0.75 |") and len(rows) == 2


def test_the_published_runs_have_the_settings_of_the_methods():
    for result in PUBLISHED.values():
        run = result.get("run", {})
        if run.get("group") == "main" and run["method"] in METHODS and "fields" in run:
            settings = run["connector"], {"max_position_embeddings": 512, **run["fields"]}
            assert settings == connector_of(run["method"], 14), run["method"]
    assert all(result["commit"] for result in PUBLISHED.values())


def test_the_methods_are_those_of_the_recipes():
    demo = yaml.safe_load(pretrain.DEMO_RECIPE.read_text())["connector_config"]
    assert connector_of("evlgen", 14) == ("tomeformer", {**demo, "max_position_embeddings": 512})
    crowded = yaml.safe_load(CROWDED_RECIPE.read_text())
    changed = {"num_query_tokens": 25, "max_position_embeddings": 2048}
    recipe = crowded["connector"], {**crowded["connector_config"], **changed}
    assert connector_of("qformer-chooses-first", 28) == recipe


def test_methods_have_as_many_parameters():
    sizes = []
    for method in METHODS:
        fields = {**connector_fields(*connector_of(method, 14)), "class_token": False}
        config = EVLGenConfig(**DEMO_VISION, text_config=SMOLLM2_135M, connector_config=fields)
        with torch.device("meta"):
            sizes.append(EVLGenForConditionalGeneration(config).num_parameters(only_trainable=True))
    assert max(sizes) < 1.1 * min(sizes), sizes


def test_the_score_of_names_counts_each_drawing():
    truths = ["an owl and an owl above a teddy bear", "a bus"]
    assert name_score(truths, truths) == 1
    # Found are an owl, a teddy bear and a bus of four drawings. The captions name five.
    assert name_score(["an owl, a teddy bear and a crab", "a bus and a bus"], truths) == 6 / 9
    assert name_score(["a bear and an owls", ""], truths) == 0


@pytest.fixture
def stage():
    torch.manual_seed(0)
    model = peer_model("qformer")
    vocabulary = CaptionVocabulary(tiny_tokenizer(), CAPTIONS)
    return model, StageOne(model, len(vocabulary)), vocabulary.encode(CAPTIONS)


def features():
    return torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(1))


def test_the_first_stage_trains_the_models_own_qformer(stage):
    model, stage_one, text_ids = stage
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(stage_one.parameters(), lr=3e-3)
    parts = []  # contrast, matching and captioning
    for _ in range(160):
        losses = stage_one(features(), text_ids)
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


def test_words_see_queries_and_the_words_before_them_and_queries_see_no_words(stage):
    _, stage_one, text_ids = stage
    stage_one.eval()
    seen = {}
    stage_one.word_head.register_forward_hook(lambda _, inputs, output: seen.update(words=output))
    stage_one.qformer.register_forward_hook(lambda _, inputs, output: seen.update(all=output.last_hidden_state))

    def run(ids):
        with torch.no_grad():
            stage_one(features(), ids)  # the captions' loss is the last that is computed
        return seen["words"].clone(), seen["all"][:, :5].clone()

    words, queries = run(text_ids)
    other = text_ids.clone()
    other[1, 6] = other[1, 2]
    changed, same = run(other)
    torch.testing.assert_close(same, queries)
    torch.testing.assert_close(changed[1, :6], words[1, :6])
    assert not torch.allclose(changed[1, 6:], words[1, 6:], atol=1e-3)
    torch.testing.assert_close(changed[0], words[0])


def test_wrong_partners_never_have_the_right_caption(stage, monkeypatch):
    _, stage_one, text_ids = stage
    drawn = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args: drawn.append(multinomial(*args)) or drawn[-1])
    twice = torch.cat([text_ids[:2], text_ids[:1]])  # rows 0 and 2 have one caption
    for _ in range(20):
        stage_one(features(), twice)
    wrong = torch.cat(drawn, dim=1)  # (batch, draws)
    assert set(wrong[0].tolist()) == set(wrong[2].tolist()) == {1}
    assert set(wrong[1].tolist()) == {0, 2}
    assert stage_one(features(), text_ids[:1].expand(3, -1))["matching"] == 0  # no wrong partner at all
