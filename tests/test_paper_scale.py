"""benchmarks/paper_scale.py: the figures of docs/paper_scale.md, and how they are counted."""

import re

import pytest

from benchmarks import paper_scale
from configuration_evlgen import EVLGenConfig

from .helpers import ROOT


@pytest.fixture(scope="module")
def model():
    return paper_scale.build(EVLGenConfig())


@pytest.mark.slow
def test_the_tables_of_the_page_are_those_that_the_benchmark_prints(capsys):
    page = (ROOT / "docs" / "paper_scale.md").read_text()
    paper_scale.main()
    printed, written = (
        "\n".join(line for line in text.splitlines() if line.startswith("|"))
        for text in (capsys.readouterr().out, page)
    )
    number = r"\d[\d,.]*"
    assert re.split(number, printed) == re.split(number, written)
    figures = ([float(f.rstrip(",.").replace(",", "")) for f in re.findall(number, t)] for t in (printed, written))
    for now, then in zip(*figures, strict=True):
        assert now == pytest.approx(then, rel=0.05, abs=0.1)  # PyTorch's own use of memory may change a little


def test_operations_are_those_of_the_matrix_products(model):
    """Of linear maps 2 * tokens * inputs * outputs, of attention 4 * tokens ** 2 * width, worked out by hand."""
    flops = paper_scale.count_flops(model, caption_tokens=32)
    tokens, width, hidden, layers = 257, 1408, 6144, 39
    patches = 2 * 256 * (3 * 14 * 14) * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width
    assert flops["vision tower, forward"] == pytest.approx(patches + layers * layer, rel=1e-3)

    tokens, width, hidden, layers, captions, vocabulary = 29 + 32, 2560, 10240, 32, 32, 50272
    linear = 2 * tokens * (4 * width**2 + 2 * width * hidden) * layers + 2 * captions * width * vocabulary
    attention = 4 * tokens**2 * width * layers
    assert flops["language model, forward"] == pytest.approx(linear + attention, rel=1e-3)
    # No gradients of weights; fused attention computes its scores once more.
    backward = flops["language model, backward, to its inputs alone"]
    assert backward == pytest.approx(linear + 2.5 * attention, rel=1e-3)
    forward = flops["connector and projections, forward"]
    assert flops["connector and projections, backward"] == pytest.approx(2 * forward, rel=0.05)


def test_weights_are_counted_once(model):
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts["language_model"] == 2_651_596_800  # facebook/opt-2.7b, whose head is its embedding
    assert parts["vision_tower"] == pytest.approx(986e6, rel=1e-3)
    plan = paper_scale.plan_memory(model, gpus=8)
    whole = 2 * (parts["language_model"] + parts["vision_tower"])
    trained = 4 * (sum(parts.values()) - parts["language_model"] - parts["vision_tower"])
    assert plan["DDP"] == (whole + trained, 2 * trained, 2 * trained)
    assert plan["ZeRO-2"] == (whole + trained, trained / 8, trained / 4)
    weights, *rest = plan["FSDP2, ZeRO-3"]
    assert (whole + trained) / 8 < weights < (whole + trained) / 4 and rest == [trained / 8, trained / 4]
