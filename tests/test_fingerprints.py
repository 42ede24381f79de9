"""Fingerprints of weights, in memory and on disk: any change shows, and everything that relies on them refuses it."""

import json

import publish
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_split
from common.evaluation.answers import answering_settings, check_settings
from common.evaluation.evaluation_arguments import AnswerArguments, GenerationArguments
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import fingerprint_files, hash_weights, identify, is_on_hub

from .helpers import noise_images, save_towers, tiny_model, tiny_processor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int8, torch.uint8, torch.bool]


def changed_weights():
    """A square matrix and what may become of it, as whole numbers that every dtype holds."""
    weight = torch.tensor([[1, 2, 3, 0], [-5, 6, 7, -8], [4, 5, -6, 1], [0, -1, -2, 3]])
    one_changed = weight.clone()
    one_changed[2, 1] = -7
    return {
        "as it was": weight,
        "signs flipped": -weight,
        "rows permuted": weight[[1, 0, 3, 2]],
        "columns rolled": weight.roll(1, dims=1),
        "transposed": weight.T,
        "filled with zeros": torch.zeros_like(weight),
        "filled with ones": torch.ones_like(weight),
        "one element changed": one_changed,
    }


def as_dtype(values, dtype):
    return values > 0 if dtype == torch.bool else values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_change_of_a_value_shows_in_the_hash(dtype):
    hashes = {name: hash_weights({"w": as_dtype(values, dtype)}) for name, values in changed_weights().items()}
    assert len(set(hashes.values())) == len(hashes), hashes
    again = {name: hash_weights({"w": as_dtype(values, dtype)}) for name, values in changed_weights().items()}
    assert again == hashes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scalar_and_an_empty_tensor_are_hashed(dtype):
    tensors = [as_dtype(torch.tensor(value), dtype) for value in (1, 0, [], [[]], [1])]
    assert len({hash_weights({"w": tensor}) for tensor in tensors}) == len(tensors)


def test_names_dtypes_and_shapes_show_in_the_hash():
    one, two = torch.arange(4.0), torch.arange(4.0) + 1
    state_dicts = [
        {"a": one, "b": two},
        {"a": two, "b": one},
        {"a": one, "c": two},
        {"a": one},
        {"a": one.view(2, 2), "b": two},
        {"a": one.view(torch.int32), "b": two},
    ]
    assert len({hash_weights(state_dict) for state_dict in state_dicts}) == len(state_dicts)
    assert hash_weights({"b": two, "a": one}) == hash_weights({"a": one, "b": two})


def test_the_hash_does_not_depend_on_the_layout_in_memory():
    weight = torch.randn(4, 6)
    columns_first = weight.T.contiguous().T
    assert not columns_first.is_contiguous()
    assert hash_weights({"w": columns_first}) == hash_weights({"w": weight})
    assert hash_weights({"w": torch.randn(8, 6)[::2].copy_(weight)}) == hash_weights({"w": weight})


def test_tied_weights_are_hashed_like_equal_weights():
    model = tiny_model(text="qwen2").language_model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert hash_weights(model.state_dict()) == hash_weights(untied)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert hash_weights(model.state_dict()) != hash_weights(untied)


def test_quantised_weights_are_hashed():
    torch.manual_seed(0)
    plain = nn.Linear(32, 32)

    def quantised_hash(weight):
        layer = nn.Linear(32, 32)
        layer.load_state_dict({**plain.state_dict(), "weight": weight})
        quantize_(layer, Int8WeightOnlyConfig(version=2))
        return hash_weights(layer.state_dict())

    before = quantised_hash(plain.weight)
    assert before == quantised_hash(plain.weight) != hash_weights(plain.state_dict())
    assert quantised_hash(-plain.weight) != before
    assert quantised_hash(plain.weight.roll(1, dims=1)) != before


def test_weights_without_values_have_no_hash():
    assert hash_weights({"a": torch.empty(3, device="meta"), "b": torch.ones(3)}) is None


@torch.no_grad()
def negate_queries(tower):
    """A change that an XOR of the bits does not notice."""
    queries = [module for name, module in tower.named_modules() if name.endswith("q_proj")]
    assert queries
    for query in queries:
        query.weight.neg_()


@pytest.mark.parametrize("tower", ["vision_tower", "language_model"])
def test_a_tower_with_negated_queries_is_saved_and_not_only_named(tower, tmp_path, caplog):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **save_towers(tmp_path / "base"), connector_config=sizes | {"merge_r": 3}
    )
    negate_queries(getattr(model, tower))
    with pytest.raises(ValueError, match=f'`towers` cannot be "reference": {tower} differs from'):
        model.save_pretrained(tmp_path / "model", towers="reference")
    model.config.towers = "reference"
    model.save_pretrained(tmp_path / "model")
    assert f"The checkpoint holds its towers: {tower} differs from" in caplog.text
    loaded = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_cached_features_are_not_those_of_a_tower_with_negated_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model = tiny_model()
    rows = Dataset.from_dict({"image": noise_images(2), "caption": ["a", "b"]})
    before = cache_split(model, rows, CaptionCollator(tiny_processor(model), DataArguments(), training=False))
    negate_queries(model.vision_tower)
    after = cache_split(model, rows, CaptionCollator(tiny_processor(model), DataArguments(), training=False))
    assert before.path != after.path
    assert (before[0]["vision_features"] != after[0]["vision_features"]).any()


@pytest.mark.parametrize("part", ["vision_tower", "connector", "language_projection", "language_model"])
def test_answers_of_two_models_do_not_end_in_one_folder(part, tmp_path):
    model = tiny_model()

    def settings():
        return answering_settings(model, tiny_processor(model), GenerationArguments(), AnswerArguments())

    check_settings(tmp_path, settings())
    check_settings(tmp_path, settings())
    with torch.no_grad():
        next(p for p in getattr(model, part).parameters() if p.ndim == 2).neg_()
    with pytest.raises(ValueError, match="has answers from other settings: weights was"):
        check_settings(tmp_path, settings())


def test_results_of_a_model_with_another_sign_are_not_published(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    results = {
        "task": {"type": "image-to-text", "name": "Image captioning"},
        "dataset": {"type": "coco", "name": "COCO", "split": "test"},
        "metrics": [{"type": "cider", "name": "CIDEr-D [%]", "value": 139.1}],
        "num_rows": 5,
        "notes": [],
        "settings": {"dtype": "float32", "weights": hash_weights(model.state_dict())},
        "model": "mine",
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--model", str(tmp_path / "model"), "--folder", str(tmp_path / "out")]
    arguments += ["--results", str(tmp_path / "results.json")]
    publish.main(arguments)
    with torch.no_grad():
        model.language_projection.weight.neg_()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="was measured on mine, whose weights differ from the published ones"):
        publish.main(arguments)


def test_a_fingerprint_is_of_the_weight_files_alone(tmp_path):
    save_towers(tmp_path)
    folder = tmp_path / "text"
    before = fingerprint_files(folder)
    (folder / "README.md").write_text("changed")
    assert fingerprint_files(folder) == before
    assert fingerprint_files(tmp_path) is None
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    for part, half in enumerate((names[:3], names[3:]), start=1):
        save_file({name: weights[name] for name in half}, folder / f"model-0000{part}-of-00002.safetensors")
    shards = {name: f"model-0000{1 if name in names[:3] else 2}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").unlink()
    sharded = fingerprint_files(folder)
    assert sharded != before
    weights[names[0]].view(-1)[0] += 1
    save_file({name: weights[name] for name in names[:3]}, folder / "model-00001-of-00002.safetensors")
    assert fingerprint_files(folder) not in (sharded, before)


def test_only_files_in_the_hubs_cache_are_identified_by_their_names(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    digits = "0123456789abcdef" * 4

    def link(blob, folder):
        """A folder whose weights are a link to a blob, as in the cache."""
        for path, text in ((blob, "the weights"), (folder / "config.json", "{}")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "model.safetensors").symlink_to(blob)
        before = fingerprint_files(folder)
        blob.write_text("other weights")
        return before, fingerprint_files(folder)

    repository = cache / "models--user--llm"
    before, after = link(repository / "blobs" / digits, repository / "snapshots" / "0123")
    assert before == after  # nothing was read
    for outside in (tmp_path / digits, tmp_path / "models--user--llm" / "blobs" / digits, cache / digits):
        before, after = link(outside, tmp_path / f"link to {outside.parent.name}")
        assert before != after, outside


def test_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_towers(tmp_path / "hub" / "models--user--llm" / "snapshots" / commit)
    snapshot = tmp_path / "hub" / "models--user--llm" / "snapshots" / commit
    (snapshot / "text" / "model.safetensors").rename(snapshot / "model.safetensors")
    for folder, name, revision in ((snapshot, "user/llm", commit), (snapshot / "text", str(snapshot / "text"), None)):
        found = identify("text_model", folder)
        assert (found["text_model_name_or_path"], found["text_model_revision"]) == (name, revision)
    assert [name for name in ("gpt2", "facebook/opt-2.7b", "/a/b", "./b", "a/b/c", "", None) if is_on_hub(name)] == [
        "gpt2",
        "facebook/opt-2.7b",
    ]
