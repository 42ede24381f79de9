"""Token merging: every recorded case of the original implementation, and the rules that users rely on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_evlgen import bipartite_soft_matching
from modeling_evlgen.token_merging import keep_distinctive

from .helpers import FIXTURES

FOLDER = FIXTURES / "token_merging"
META = json.loads((FOLDER / "meta.json").read_text())
INPUTS, EXPECTED = load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "expected.safetensors")


@pytest.mark.parametrize("name", META["cases"])
def test_matches_the_original(name):
    case, tolerance = META["cases"][name], META["tolerance"]
    x = INPUTS[f"{name}.x"].clone().requires_grad_()
    merging = bipartite_soft_matching(INPUTS[f"{name}.metric"], case["r_requested"], case["class_token"])

    merged = merging.merge(x)
    (merged * INPUTS[f"{name}.g"]).sum().backward()

    assert merging.num_output_tokens == case["N_out"]
    assert torch.equal(merging.output_index, EXPECTED[f"{name}.slot"])
    torch.testing.assert_close(merged, EXPECTED[f"{name}.merged"], **tolerance)
    torch.testing.assert_close(x.grad, EXPECTED[f"{name}.grad_x"], **tolerance)


def test_merges_the_most_similar_pair_by_plain_mean():
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 5.0], [-1.0, 0.0]]])  # token 2 looks like token 1
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    merging = bipartite_soft_matching(metric, r=1)
    assert merging.output_index.tolist() == [[0, 1, 1, 2]]
    assert merging.merge(x).tolist() == [[[1.0], [3.0], [8.0]]]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9])
def test_every_output_has_an_input_and_the_mean_is_kept(tokens, class_token):
    generator = torch.Generator().manual_seed(tokens)
    metric, x = torch.randn(2, tokens, 6, generator=generator), torch.randn(2, tokens, 3, generator=generator)
    merging = bipartite_soft_matching(metric, r=tokens, class_token=class_token)
    merged, counts = merging.merge(x), torch.zeros(2, merging.num_output_tokens)
    counts.scatter_add_(1, merging.output_index, torch.ones(2, tokens))
    assert merging.num_output_tokens == tokens - (tokens - class_token) // 2
    assert (counts >= 1).all()
    torch.testing.assert_close((merged * counts.unsqueeze(2)).sum(1), x.sum(1))
    if class_token:
        assert torch.equal(merged[:, 0], x[:, 0])


def test_a_row_of_zeros_gives_no_nan():
    metric = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    metric[:, 3] = 0
    merged = bipartite_soft_matching(metric, r=4, class_token=True).merge(torch.ones(1, 9, 2))
    assert torch.equal(merged, torch.ones(1, 5, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_metrics_are_compared_in_float32(dtype):
    metric = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bipartite_soft_matching(metric, r=8, class_token=True)
    assert torch.equal(half.output_index, bipartite_soft_matching(metric.float(), 8, True).output_index)
    assert half.merge(metric).dtype == dtype


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`metric` must have shape"):
        bipartite_soft_matching(torch.zeros(4, 4), r=1)
    with pytest.raises(ValueError, match="`r` must not be negative, but is -1"):
        bipartite_soft_matching(torch.zeros(1, 4, 4), r=-1)
    merging = bipartite_soft_matching(torch.randn(1, 4, 4), r=1)
    with pytest.raises(ValueError, match=r"`x` must have shape \(1, 4, channels\), but has \(1, 3, 4\)"):
        merging.merge(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("class_token", [False, True])
def test_kept_tokens_have_the_smallest_mean_cosine_similarity(class_token):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 10, 4, generator=generator) * torch.rand(8, 10, 1, generator=generator) + 0.1
    directions = torch.nn.functional.normalize(x[:, class_token:], dim=-1)  # a class token does not count
    similarity = (directions @ directions.transpose(1, 2)).mean(dim=2)  # (batch, patches)
    expected = similarity.argsort(dim=1)[:, :4].sort(dim=1).values + class_token
    merging = keep_distinctive(x, 5 + class_token, class_token)
    kept = [(row > class_token).nonzero().flatten().tolist() for row in merging.output_index]
    assert kept == expected.tolist()
    assert not class_token or (merging.output_index == 0).sum(dim=1).tolist() == [1] * 8
