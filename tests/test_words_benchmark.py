"""benchmarks/words: places of drawings, and the area under the curve. The maps are those of test_explanations.py."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.words.__main__ import RESULTS, area_under_curve, print_tables, touched


def test_patches_touch_a_box_that_they_overlap():
    image = Image.new("RGB", (40, 40))
    boxes = [(0, 0, 10, 10), (15, 25, 21, 40)]
    expected = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert touched(boxes, image, 4, 4).view(4, 4).int().tolist() == expected


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    is_wrong = torch.tensor([True, False, True, False])
    assert area_under_curve(torch.tensor([4.0, 1, 3, 2]), is_wrong) == 1
    assert area_under_curve(torch.tensor([1.0, 4, 2, 2]), is_wrong) == pytest.approx(1 / 8)


def test_the_page_has_the_figures_of_the_results(capsys):
    print_tables([json.loads(line) for line in RESULTS.read_text().splitlines()])
    printed = capsys.readouterr().out
    assert "| integrated gradients | 99 [96, 100] |" in printed
    assert "| wrong names by probability, area | 87 [81, 92] |" in printed
