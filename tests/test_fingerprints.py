"""Fingerprints of weights, in memory and on disk: any change shows."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

from common.arguments import DataArguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_split
from modeling_evlgen.fingerprints import fingerprint_files, hash_weights

from .helpers import noise_images, save_towers, tiny_model, tiny_processor
from .test_checkpoints import negate_queries

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_change_of_a_value_or_of_the_shape_shows_in_the_hash(dtype):
    weight = torch.tensor([[1, 2, 3, 0], [-5, 6, 7, -8], [4, 5, -6, 1], [0, -1, -2, 3]])  # every dtype holds these
    changed = [weight, -weight, weight[[1, 0, 3, 2]], weight.roll(1, dims=1), weight.T, weight.view(2, 8)]
    changed += [torch.zeros_like(weight), torch.ones_like(weight), weight.where(weight != 5, -7)]
    changed += [torch.tensor(value) for value in (1, 0, [], [[]], [1])]
    tensors = [values > 0 if dtype == torch.bool else values.to(dtype) for values in changed]
    hashes = [hash_weights({"w": tensor}) for tensor in tensors]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [hash_weights({"w": tensor.clone()}) for tensor in tensors]


def test_names_and_dtypes_show_in_the_hash_and_their_order_does_not():
    one, two = torch.arange(4.0), torch.arange(4.0) + 1
    state_dicts = [{"a": one, "b": two}, {"a": two, "b": one}, {"a": one, "c": two}, {"a": one}]
    state_dicts.append({"a": one.view(torch.int32), "b": two})
    assert len({hash_weights(state_dict) for state_dict in state_dicts}) == len(state_dicts)
    assert hash_weights({"b": two, "a": one}) == hash_weights({"a": one, "b": two})
    assert hash_weights({"a": torch.empty(3, device="meta"), "b": one}) is None


def test_neither_the_layout_in_memory_nor_ties_show_in_the_hash():
    weight = torch.randn(4, 6)
    for same in (weight.T.contiguous().T, torch.randn(8, 6)[::2].copy_(weight)):
        assert not same.is_contiguous() and hash_weights({"w": same}) == hash_weights({"w": weight})
    model = tiny_model(text="qwen2").language_model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert hash_weights(model.state_dict()) == hash_weights(untied)


def test_quantised_weights_are_hashed():
    plain = nn.Linear(32, 32)

    def quantised_hash(weight):
        layer = nn.Linear(32, 32)
        layer.load_state_dict({**plain.state_dict(), "weight": weight})
        quantize_(layer, Int8WeightOnlyConfig(version=2))
        return hash_weights(layer.state_dict())

    before = quantised_hash(plain.weight)
    assert before == quantised_hash(plain.weight) != hash_weights(plain.state_dict())
    assert before not in (quantised_hash(-plain.weight), quantised_hash(plain.weight.roll(1, dims=1)))


def test_cached_features_are_not_those_of_a_tower_with_negated_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model = tiny_model()
    rows = Dataset.from_dict({"image": noise_images(2), "caption": ["a", "b"]})
    collator = CaptionCollator(tiny_processor(model), DataArguments(), training=False)
    before = cache_split(model, rows, collator)
    negate_queries(model.vision_tower)
    after = cache_split(model, rows, collator)
    assert (before[0]["vision_features"][0] != after[0]["vision_features"][0]).any()


def test_a_fingerprint_is_of_the_weight_files_alone(tmp_path):
    save_towers(tmp_path)
    folder, shards = tmp_path / "text", tmp_path / "shards"
    before = fingerprint_files(folder)
    (folder / "README.md").write_text("changed")
    assert fingerprint_files(folder) == before and fingerprint_files(tmp_path) is None
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(shards, max_shard_size="40KB")
    sharded, last = fingerprint_files(shards), max(shards.glob("*.safetensors"))
    assert "-of-" in last.name and sharded != before
    save_file({name: weight + 1 for name, weight in load_file(last).items()}, last)
    assert fingerprint_files(shards) not in (sharded, before)


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
