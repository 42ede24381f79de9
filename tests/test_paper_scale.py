"""benchmarks/paper_scale.py: the figures of docs/paper_scale.md, and how they are counted."""

import re

import pytest
import torch
import yaml

from benchmarks import paper_scale
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

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


def test_the_text_of_the_page_has_the_settings_of_the_benchmark():
    text = " ".join((ROOT / "docs" / "paper_scale.md").read_text().split())
    config, share = EVLGenConfig(), f"of which {paper_scale.UTILIZATION:.0%} are reached"
    passes = paper_scale.STEPS * paper_scale.BATCH / paper_scale.PAIRS
    for stated in (
        f"{paper_scale.STEPS:,} steps of {paper_scale.BATCH:,} pairs on {paper_scale.GPUS} A100-80G",
        f"{passes:.1f} times through {paper_scale.PAIRS / 1e6:.0f} M pairs",
        f"{paper_scale.CAPTION_TOKENS} tokens, after {config.num_image_tokens} of the image",
        f"The peak is {paper_scale.PEAK / 1e12:.0f} TFLOP/s, {share}",
        f"a peak of {paper_scale.ONE_GPU_PEAK / 1e12:.0f} TFLOP/s, {share}, for {paper_scale.ONE_GPU_PRICE:.2f} US",
        f"{config.num_vision_tokens} x {config.vision_hidden_size} numbers in float16",
    ):
        assert stated in text


def test_the_recipe_for_one_gpu_goes_through_its_data_as_often_as_it_states():
    text = paper_scale.ONE_GPU_RECIPE.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    pairs = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    assert f"{pairs} pairs in each step" in text and f"{recipe['max_steps']:,} steps go 5 times" in text
    assert round(pairs * recipe["max_steps"] / 566_747) == 5
    towers = {"vision_config": paper_scale.SIGLIP2_SO400M, "text_config": paper_scale.SMOLLM2_360M}
    config = EVLGenConfig(**towers, connector_config=recipe["connector_config"])
    assert f"{config.num_vision_tokens} tokens become {config.num_image_tokens}" in text
    with torch.device("meta"):
        model = EVLGenForConditionalGeneration(config)
    assert model.language_model.num_parameters() == 361_821_120  # as published
    assert model.vision_tower.num_parameters() == pytest.approx(428e6, rel=1e-3)


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


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_shrink_when_computed_again(model):
    small, large, largest, recomputed = paper_scale.measure_peaks(model, (4, 8, 12), (8,))
    assert largest - large == pytest.approx(large - small, rel=0.02)  # beside weights that autocast has cast
    assert recomputed < large / 2


def test_bytes_count_for_as_long_as_they_are_alive():
    known = torch.zeros(1000)
    with paper_scale.AliveBytes([known]) as alive:
        known.view(10, 100)
        known.add_(1)
        assert alive.now == alive.peak == 0
        first = known + 1
        view = first[:10]
        del first
        assert alive.now == 4000  # its view holds it
        second = known.double()
        assert alive.now == 12000
        del view, second
        assert alive.now == 0
        known * 2
    assert alive.peak == 12000
