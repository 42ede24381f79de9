"""Several data sets in one, by weights: streamed and on disk, in recipes and on the command line."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import datasets
import pretrain
import pytest
import yaml
from datasets import Dataset

from common.arguments import DataArguments, parse_arguments
from common.data.loading import load_datasets, read_mixture

from .helpers import ROOT, save_towers
from .training import SHARDS, name_tars, png, stream_options, write_tars


def paper_mixture(folder, **changes):
    """The paper's weights, over three little data sets with column names of their own."""
    entries = []
    for name, sizes, weight, first in (("laion", [40, 40], 15, 0), ("ccs", [20], 4, 1000)):
        entries.append({**name_tars(train=write_tars(folder / name, sizes, first)), "weight": weight})
    rows = [{"photo": {"bytes": png("red"), "path": None}, "caption": f"image {2000 + i}"} for i in range(5)]
    Dataset.from_list(rows).cast_column("photo", datasets.Image()).to_parquet(folder / "coco.parquet")
    files = {"train": str(folder / "coco.parquet")}
    entries.append({"dataset": "parquet", "data_files": files, "image_column": "photo", "weight": 1})
    return DataArguments(mixture=entries, test_split="", **changes)


def origin(caption):
    return ("laion", "ccs", "coco")[int(caption.split()[1]) // 1000]


def test_streams_are_mixed_by_their_weights(tmp_path):
    arguments = paper_mixture(tmp_path, streaming=True, shuffle_buffer=40)
    arguments.mixture[2]["streaming"] = False
    stream, test = load_datasets(arguments, seed=0)
    rows = list(islice(iter(stream), 2000))
    assert test is None and rows[0]["image"]["bytes"] is not None
    drawn = Counter(origin(row["caption"]) for row in rows)
    for name, share in (("laion", 15 / 20), ("ccs", 4 / 20), ("coco", 1 / 20)):
        assert drawn[name] / 2000 == pytest.approx(share, abs=0.03)
    # Each goes round by itself: every row once before any comes again.
    for name, size in (("laion", 80), ("ccs", 20), ("coco", 5)):
        own = [row["caption"] for row in rows if origin(row["caption"]) == name]
        for first in range(0, len(own) - size, size):
            assert len(set(own[first : first + size])) == size


def test_data_sets_on_disk_are_mixed_until_all_were_seen(tmp_path):
    mixed, _ = load_datasets(paper_mixture(tmp_path), seed=0)
    drawn = Counter(mixed["caption"])
    assert len(drawn) == 80 + 20 + 5  # every row of each
    shares = Counter(origin(caption) for caption in mixed["caption"])
    assert shares["laion"] / len(mixed) == pytest.approx(15 / 20, abs=0.1)
    assert load_datasets(paper_mixture(tmp_path), seed=0)[0]["caption"] == mixed["caption"]
    assert load_datasets(paper_mixture(tmp_path), seed=1)[0]["caption"] != mixed["caption"]


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        ({"weight": 0}, {}, "needs a `weight` above 0, but has 0"),
        ({"caption": "txt"}, {}, "holds unknown names: caption"),
        ({"streaming": True}, {}, "is to be streamed, which takes `--streaming true`"),
        ({"prompt_column": "question"}, {}, "sets `prompt_column`, but the mixture has it at None"),
        ({}, {"test_split": "test"}, "needs a `dataset` with held-out rows, or an empty `test_split`"),
        ({}, {"streaming": True, "shuffle_buffer": 0}, "`shuffle_buffer` must be 1 or more, but is 0"),
        ({}, {"mixture": "nowhere.yaml"}, "`mixture` is 'nowhere.yaml', which is no YAML file"),
    ],
)
def test_mixtures_that_cannot_work_are_refused(entry, changes, message, tmp_path):
    whole = {**name_tars(train=write_tars(tmp_path, SHARDS)), "weight": 1}
    arguments = DataArguments(mixture=[{**whole, **entry}], test_split="")
    with pytest.raises(ValueError, match=message):
        load_datasets(replace(arguments, **changes), seed=0)


def test_mixtures_are_given_in_a_recipe_as_a_file_or_as_json(tmp_path):
    entries = [{"dataset": "a", "weight": 15, "caption_column": "txt"}, {"dataset": "b", "weight": 0.5}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"mixture": entries, "image_column": "jpg"}))
    for argv in (
        ["--config", str(tmp_path / "recipe.yaml")],
        ["--mixture", str(tmp_path / "mixture.yaml"), "--image_column", "jpg"],
        ["--mixture", json.dumps(entries), "--image_column", "jpg"],
    ):
        (first_weight, first), (second_weight, second) = read_mixture(parse_arguments(DataArguments, argv=argv)[0])
        assert (first_weight, second_weight) == (15, 0.5) and (first.dataset, second.dataset) == ("a", "b")
        assert (first.caption_column, second.caption_column, first.image_column) == ("txt", "caption", "jpg")


def test_the_papers_mixture_is_15_to_4_to_1():
    path = ROOT / "examples" / "configs" / "laion-ccs-coco.yaml"
    mixture = read_mixture(DataArguments(mixture=str(path), streaming=True))
    assert [weight for weight, _ in mixture] == [15, 4, 1]
    assert [part.streaming for _, part in mixture] == [True, True, False]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_is_trained_on(streaming, tmp_path):
    mixture = paper_mixture(tmp_path).mixture
    changes = {"max_steps": 2, "streaming": streaming, "mixture": json.dumps(mixture)}
    assert pretrain.main(stream_options(save_towers(tmp_path), tmp_path / "out", **changes)) == {}
    assert (tmp_path / "out" / "model.safetensors").exists()
