"""The TomeFormer: parity with the original, BERT's weights, and all ways to run it."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from configuration_evlgen import TomeFormerConfig
from modeling_evlgen import TomeFormerModel

from .helpers import FIXTURES, LAYERS

CASES = sorted(folder.name for folder in (FIXTURES / "tomeformer").iterdir())


def tiny_config(**kwargs):
    fields = {**LAYERS, "num_hidden_layers": 3, "max_position_embeddings": 40, "merge_r": 5}
    return TomeFormerConfig(**fields | kwargs)


def tokens(batch=2, count=33, dim=32, seed=0):
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_original(case, attn_implementation):
    folder = FIXTURES / "tomeformer" / case
    meta = json.loads((folder / "meta.json").read_text())
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    fields = {k: v for k, v in meta["config"].items() if k not in ("r", "pooler", "word_embeddings")}
    config = TomeFormerConfig(merge_r=meta["config"]["r"], attn_implementation=attn_implementation, **fields)
    model = TomeFormerModel(config).eval()
    model.load_state_dict(load_file(folder / "state.safetensors"), strict=True)

    inputs_embeds = inputs["inputs_embeds"].clone().requires_grad_()
    output = model(inputs_embeds, output_hidden_states=True)
    (output.last_hidden_state * inputs["g"]).sum().backward()

    assert [state.shape[1] for state in output.hidden_states] == meta["token_counts"]
    for i, state in enumerate(output.hidden_states):
        torch.testing.assert_close(state, expected[f"hidden_states.{i}"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.last_hidden_state, expected["last_hidden_state"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inputs_embeds.grad, expected["grad_inputs_embeds"], atol=2e-5, rtol=1e-3)


def test_output_index_is_composed_over_the_layers():
    """In blocks that only merge, each output token lies between the tokens that the index merges into it."""
    config = tiny_config(pre_norm=True, branch_initializer_range=0.0)
    model = TomeFormerModel(config).eval()
    x = tokens()
    output = model(x, output_hidden_states=True)
    embedded = output.hidden_states[0]
    assert output.last_hidden_state.shape == (2, config.default_budget(33), 32) == (2, 18, 32)
    for row, index in product(range(2), range(18)):
        members = embedded[row, output.output_index[row] == index]
        merged = output.last_hidden_state[row, index]
        assert (merged >= members.min(0).values - 1e-5).all() and (merged <= members.max(0).values + 1e-5).all()


def test_branches_that_end_in_zeros_start_as_pure_merging_and_learn():
    model = TomeFormerModel(tiny_config(pre_norm=True, branch_initializer_range=0.0, merge_r=0)).eval()
    x = tokens()
    output = model(x)
    embedded = x + model.embeddings.position_embeddings.weight[:33] + model.embeddings.token_type_embeddings.weight[0]
    torch.testing.assert_close(output.last_hidden_state, torch.nn.functional.layer_norm(embedded, (32,), eps=1e-12))
    assert model.encoder.layer[0].attention.self.value.weight.std().item() == pytest.approx(0.02, rel=0.2)
    output.last_hidden_state.square().sum().backward()
    ends = [p for name, p in model.named_parameters() if name.endswith("output.dense.weight")]
    assert len(ends) == 6 and all(p.grad.abs().sum() > 0 for p in ends)


def test_output_positions_are_added_to_the_merged_tokens(tmp_path):
    torch.manual_seed(0)
    model = TomeFormerModel(tiny_config(output_position_initializer_range=1.0)).eval()
    output = model(tokens(), output_hidden_states=True)
    positions = model.output_position_embeddings.weight
    assert positions.std().item() == pytest.approx(1.0, rel=0.1)
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1] + positions[:18])
    model.save_pretrained(tmp_path)
    again = TomeFormerModel.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).last_hidden_state, output.last_hidden_state)
    assert not hasattr(TomeFormerModel(tiny_config()).output_position_embeddings, "weight")


def test_loads_a_bert_checkpoint(tmp_path):
    bert = BertModel(BertConfig(**{**LAYERS, "num_hidden_layers": 3}))
    bert.save_pretrained(tmp_path)
    model, report = TomeFormerModel.from_pretrained(tmp_path, merge_r=0, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    bert, x = bert.eval(), tokens()
    torch.testing.assert_close(model(x).last_hidden_state, bert(inputs_embeds=x).last_hidden_state)


@pytest.mark.parametrize("merge_r", [-1, [1] * 5])
def test_fields_that_differ_from_a_bert_checkpoints_are_checked(merge_r, tmp_path):
    BertModel(BertConfig(**{**LAYERS, "num_hidden_layers": 3})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`merge_r`"):
        TomeFormerModel.from_pretrained(tmp_path, merge_r=merge_r)
    assert TomeFormerModel.from_pretrained(tmp_path, merge_r=(3, 0.5)).config.merge_r == [1, 3, 5]


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_can_start_smooth_over_the_grid_of_patches(class_token):
    torch.manual_seed(0)
    fields = {"hidden_size": 512, "position_grid_size": 6, "position_initializer_range": 0.1}
    weight = TomeFormerModel(tiny_config(**fields, class_token=class_token)).embeddings.position_embeddings.weight
    first, end = int(class_token), int(class_token) + 36
    grid = weight[first:end].unflatten(0, (6, 6))  # (rows, columns, dim)
    assert grid.std().item() == pytest.approx(0.1, rel=0.01)
    pairs = (grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1]), (grid[:3, :3], grid[3:, 3:])
    right, below, far = (torch.cosine_similarity(*pair, dim=-1).mean() for pair in pairs)
    assert right > 0.6 and below > 0.6 and far < 0.1
    others = torch.cat([weight[:first], weight[end:]])
    assert torch.corrcoef(others).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize("grid", [0, 1, 7])
def test_a_grid_that_does_not_fit_the_positions_is_refused(grid):
    with pytest.raises(ValueError, match=f"`position_grid_size` must be 2 or more.*\\(40\\), but it is {grid}"):
        tiny_config(position_grid_size=grid)


def test_tokens_can_be_matched_by_their_hidden_states():
    """Tokens merge with their near copies, even if all keys are equal."""
    torch.manual_seed(0)
    fields = {"class_token": False, "merge_r": [8], "num_hidden_layers": 1, "pre_norm": True}
    model = TomeFormerModel(tiny_config(**fields, merge_metric="hidden_states", position_initializer_range=0.0)).eval()
    torch.nn.init.zeros_(model.encoder.layer[0].attention.self.key.weight)
    distinct = tokens(count=8)
    pairs = torch.cat([distinct, distinct.flip(1)], dim=1) + 1e-3 * tokens(count=16, seed=1)  # copy of k at 15 - k
    index = model(pairs).output_index
    assert torch.equal(index[:, :8], index[:, 8:].flip(1))
    with pytest.raises(ValueError, match='`merge_metric` must be "keys" or "hidden_states", but is \'values\''):
        tiny_config(merge_metric="values")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_in_half_precision_and_under_autocast(dtype):
    model = TomeFormerModel(tiny_config()).eval()
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(tokens())
    half = model.to(dtype)(tokens().to(dtype))
    assert half.last_hidden_state.dtype == dtype
    assert half.last_hidden_state.isfinite().all() and mixed.last_hidden_state.isfinite().all()
    assert half.last_hidden_state.shape == mixed.last_hidden_state.shape


def test_bad_input_is_named():
    model = TomeFormerModel(tiny_config())
    with pytest.raises(ValueError, match=r"`inputs_embeds` must have shape \(batch, tokens, 32\)"):
        model(torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="has 41 tokens, more than `max_position_embeddings` \\(40\\)"):
        model(torch.zeros(1, 41, 32))


@pytest.mark.parametrize("class_token", [True, False])
def test_any_number_of_output_tokens_can_be_requested(class_token):
    model = TomeFormerModel(tiny_config(class_token=class_token)).eval()
    lowest = 2 if class_token else 1
    for budget in (lowest, 3, 9, 32, 33):
        output = model(tokens(), budget=budget)
        assert output.last_hidden_state.shape == (2, budget, 32)
        assert all(set(row.tolist()) == set(range(budget)) for row in output.output_index)
    with pytest.raises(ValueError, match=f"`num_image_tokens` must be from {lowest} to 33.*is 34"):
        model(tokens(), budget=34)


@pytest.mark.parametrize("class_token", [True, False])
def test_positions_are_places_in_the_whole_image_for_any_grid_of_tiles(class_token):
    config = tiny_config(class_token=class_token, position_grid_size=5, position_initializer_range=1.0, merge_r=0)
    positions = TomeFormerModel(config).embeddings.position_embeddings
    first = int(class_token)
    one = positions(torch.zeros(1, 25 + first, 32))[0]
    many = positions(torch.zeros(1, 6 * 25 + first, 32), tiles=(2, 3))[0]
    assert torch.equal(many[:first], one[:first])
    one, many = one[first:].unflatten(0, (5, 5)), many[first:].unflatten(0, (10, 15))
    torch.testing.assert_close(many[::9, ::14], one[::4, ::4], atol=1e-5, rtol=0)  # corners
    # Row 4 of 10 lies three quarters of the way from row 1 to row 2 of 5. Every third column is one of the 5.
    torch.testing.assert_close(many[4, 1::3], 0.25 * one[1] + 0.75 * one[2], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`tiles` must have a square grid of patches each, but 35 tokens in 1 x 2"):
        TomeFormerModel(config)(tokens(count=35), tiles=(1, 2))
