"""Rows with several captions or questions of an image: from a list, or from rows that share the image."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice

import datasets
import pretrain
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from transformers.utils import logging

from common.arguments import DataArguments
from common.data.collator import BAD_ROWS, CaptionCollator, TrainingCollator
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets

from .helpers import COLORS, ROOT, save_towers, tiny_model, tiny_processor
from .training import assert_same_weights, flags, logged, png, stream_of

IMAGES = 8
CAPTIONS = {index: [f"image {index}{letter}" for letter in "abcde"[: 1 + index % 5]] for index in range(IMAGES)}
ROWS = sum(map(len, CAPTIONS.values()))


def save_rows(folder, embedded=True, **more):
    """Parquet files with a row for each caption; those of an image share `name`, but do not follow each other."""
    rows = []
    for index, captions in CAPTIONS.items():
        path = folder / f"{index}.png"
        path.write_bytes(png(COLORS[index % 4]))
        image = {"bytes": path.read_bytes(), "path": None} if embedded else str(path)
        rows += [{"image": image, "name": index, "caption": caption, **more} for caption in captions]
    rows = Dataset.from_list(sorted(rows, key=lambda row: row["caption"][::-1]))
    (rows.cast_column("image", datasets.Image()) if embedded else rows).to_parquet(folder / "rows.parquet")
    files = {"train": str(folder / "rows.parquet"), "test": str(folder / "rows.parquet")}
    return {"dataset": "parquet", "data_files": files}


def texts_of(batch, processor):
    """The trained texts of each row of a batch."""
    texts = []
    for ids, labels, segments in zip(batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True):
        parts = [ids[(segments == number) & (labels != -100)] for number in range(1, int(segments.max()) + 1)]
        texts.append(processor.batch_decode(parts, skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("embedded", [True, False])
def test_rows_of_one_image_become_one_row(tmp_path, embedded):
    train, test = load_datasets(DataArguments(**save_rows(tmp_path, embedded), group_by="name"), seed=0)
    for rows in (train, test):
        found = {tuple(row["caption"]): row["image"] for row in rows}
        assert found.keys() == set(map(tuple, CAPTIONS.values()))
        for index, captions in CAPTIONS.items():
            content = found[tuple(captions)]
            wanted = tmp_path / f"{index}.png"
            assert content["bytes"] == wanted.read_bytes() if embedded else content == str(wanted)
    if not embedded:  # a column of paths names images by itself
        grouped, _ = load_datasets(DataArguments(**save_rows(tmp_path, False), group_by="image"), seed=0)
        assert sorted(map(tuple, grouped["caption"])) == sorted(map(tuple, CAPTIONS.values()))


def test_a_batch_has_all_texts_or_draws_some_anew_in_each_epoch(tmp_path):
    arguments = DataArguments(**save_rows(tmp_path), group_by="name")
    rows = list(load_datasets(arguments, seed=0)[0])
    processor = tiny_processor(tiny_model())
    collator = CaptionCollator(processor, arguments, training=True)
    assert texts_of(collator(rows), processor) == [row["caption"] for row in rows]
    arguments.texts_per_image = 2
    drawn = []
    for epoch in range(20):
        collator.epoch = epoch
        drawn.append(texts_of(collator(rows), processor))
    for row, texts in zip(rows, zip(*drawn, strict=True), strict=True):
        assert all(len(set(part)) == len(part) == min(2, len(row["caption"])) for part in texts)
        assert {text for part in texts for text in part} == set(row["caption"])
    collator.epoch = 3
    assert texts_of(collator(rows), processor) == drawn[3]  # as a resumed run draws
    arguments.texts_per_image = 1
    assert "segment_ids" not in collator(rows)
    held_out = CaptionCollator(processor, arguments, training=False)(rows)
    first = [ids[labels != -100] for ids, labels in zip(held_out["input_ids"], held_out["labels"], strict=True)]
    assert processor.batch_decode(first, skip_special_tokens=True) == [row["caption"][0] for row in rows]


def test_questions_of_one_image_share_a_row_and_are_asked_one_by_one_when_held_out(tmp_path):
    rows = [
        {
            "image": {"bytes": png("red"), "path": None},
            "question": ["what color?", "what?", ""],
            "answer": ["red", "a box", "all"],
        },
        {"image": {"bytes": png("blue"), "path": None}, "question": ["what color?"], "answer": ["blue"]},
    ]
    split = Dataset.from_list(rows).cast_column("image", datasets.Image())
    DatasetDict({"train": split, "test": split})["train"].to_parquet(tmp_path / "rows.parquet")
    files = {"train": str(tmp_path / "rows.parquet"), "test": str(tmp_path / "rows.parquet")}
    columns = {"prompt_column": "question", "caption_column": "answer", "prompt": "Q: {} A:"}
    arguments = DataArguments(dataset="parquet", data_files=files, **columns)
    train, test = load_datasets(arguments, seed=0)
    processor = tiny_processor(tiny_model())
    batch = CaptionCollator(processor, arguments, training=True)(list(train))
    assert texts_of(batch, processor) == [[" red", " a box", " all"], [" blue"]]
    assert "</s>what? A: a box</s>" in processor.decode(batch["input_ids"][0]) and len(batch["pixel_values"]) == 2
    assert [(row["question"], row["answer"]) for row in test] == [
        ("what color?", "red"),
        ("what?", "a box"),
        ("", "all"),
        ("what color?", "blue"),
    ]
    assert test[2]["image"] == train[0]["image"]

    bad = {**rows[0], "answer": ["red"]}  # for three questions
    split = Dataset.from_list([*rows, bad]).cast_column("image", datasets.Image())
    split.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"the row with the caption .*`question` holds 3 texts, but `answer` 1"):
        load_datasets(arguments, seed=0)
    arguments.skip_bad_rows = True
    train, test = load_datasets(arguments, seed=0)
    assert len(test) == 4 and len(train) == 3


def test_a_bad_text_costs_that_text_alone(tmp_path):
    arguments = DataArguments(**save_rows(tmp_path), skip_bad_rows=True)
    image = {"bytes": png("red"), "path": None}
    rows = [{"image": image, "caption": ["a", " ", "word " * 200, "b", None]}, {"image": image, "caption": ["c"]}]
    processor = tiny_processor(tiny_model())
    batch = TrainingCollator(CaptionCollator(processor, arguments, training=True), rows)(rows)
    assert texts_of(batch, processor) == [["a", "b"], ["c"]]
    named = [entry["row"] + entry["error"] for entry in batch["bad_rows"]]
    assert len(named) == 3 and "must hold a caption, but is ' '" in named[0] and "'word word" in named[2]
    arguments.skip_bad_rows = False
    with pytest.raises(ValueError, match="`caption` must hold a caption, but is ' '"):
        CaptionCollator(processor, arguments, training=True)(rows)


def test_features_are_computed_once_for_each_image(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    arguments = DataArguments(**save_rows(tmp_path), group_by="name", cache_features=True)
    model, seen = tiny_model(), []
    processor = tiny_processor(model)
    model.vision_tower.register_forward_hook(lambda tower, inputs, output: seen.append(len(output[0])))
    splits = load_datasets(arguments, seed=0)
    plain = CaptionCollator(processor, arguments, training=True)(list(splits[0]))
    train, _ = cache_features(model, processor, *splits, arguments, seed=0)
    assert len(train) == IMAGES and sum(seen) == 2 * IMAGES  # with the held-out ones
    batch = CaptionCollator(processor, arguments, training=True)(list(train))
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, model(**plain).loss, rtol=1e-3, atol=0)


def test_grouping_copies_no_images_and_is_the_same_in_every_process(tmp_path):
    files = save_rows(tmp_path)
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "examples")]}
from common.arguments import DataArguments
from common.data.loading import load_datasets
train, _ = load_datasets(DataArguments(**{files}, group_by="name", prompt_column="question"), seed=0)
print(train._fingerprint, len(train.cache_files))
"""
    Dataset.from_parquet(str(tmp_path / "rows.parquet")).map(lambda row: {"question": "what?"}).to_parquet(
        tmp_path / "rows.parquet"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2", "HF_HOME": str(tmp_path / "hf_home")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    train, _ = load_datasets(DataArguments(**files, group_by="name", prompt_column="question"), seed=0)
    assert run.stdout.splitlines()[-1] == f"{train._fingerprint} {len(train.cache_files)}"
    assert not list((tmp_path / "hf_home").rglob("cache-*.arrow"))


def test_a_stream_joins_rows_that_are_read_together_and_resumes_at_the_same_row(tmp_path, caplog):
    logging.enable_propagation()
    arguments = DataArguments(**save_rows(tmp_path), test_split="", streaming=True, group_by="name")
    stream = stream_of(arguments, buffer_size=ROWS)
    rows = list(islice(iter(stream), IMAGES))
    assert Counter(tuple(row["caption"]) for row in rows) == Counter(map(tuple, CAPTIONS.values()))
    small = stream_of(arguments, buffer_size=12)
    read = [row["caption"] for row in islice(iter(small), 12)]
    assert any(len(texts) > 1 for texts in read)
    assert small.describe() != stream_of(replace(arguments, group_by=None), buffer_size=12).describe()
    small.split(rank=0, world_size=2, num_workers=1)
    assert "Rows of one image are then read apart" in caplog.text
    killed, resumed = stream_of(arguments, buffer_size=12), stream_of(arguments, buffer_size=12)
    first = [row["caption"] for row in islice(iter(killed), 5)]
    resumed.load_states(dict([killed.position]), 0)
    assert first + [row["caption"] for row in islice(iter(resumed), 7)] == read


def test_data_sets_of_a_mixture_are_grouped_by_columns_of_their_own(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    entries = [{**save_rows(tmp_path / "one"), "group_by": "name", "weight": 1}]
    entries.append({**save_rows(tmp_path / "two"), "weight": 1})
    for streaming in (False, True):
        arguments = DataArguments(mixture=entries, test_split="", streaming=streaming)
        train, _ = load_datasets(arguments, seed=0)
        sizes = Counter(len(row["caption"]) for row in islice(iter(train), 60))
        assert sizes[1] > 20 and sum(sizes[size] for size in (2, 3, 4, 5)) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_by": "nothing"}, "`group_by` is 'nothing', but the data set has"),
        ({"group_by": "score"}, "`group_by`: 'score' must hold names, whole numbers or images"),
        ({"group_by": "name", "messages_column": "caption"}, "`messages_column` has one conversation in a row"),
        ({"texts_per_image": 2, "messages_column": "caption"}, "`messages_column` has one conversation in a row"),
    ],
)
def test_columns_that_do_not_group_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_datasets(DataArguments(**save_rows(tmp_path, score=0.5), **changes), seed=0)


def test_rows_are_grouped_by_their_images(tmp_path):
    """By the files of a folder, and by the bytes in a table: there, images 0 and 4 are the same, and so on."""
    train, _ = load_datasets(DataArguments(**save_rows(tmp_path), group_by="image"), seed=0)
    assert len(train) == 4 and sum(len(row["caption"]) for row in train) == ROWS
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = []
    for index, captions in CAPTIONS.items():
        (folder / f"{index}.png").write_bytes(png(COLORS[index % 4]))
        lines += [json.dumps({"file_name": f"{index}.png", "caption": caption}) for caption in captions]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    arguments = DataArguments(dataset=str(folder.parent), test_split="", group_by="image")
    train, _ = load_datasets(arguments, seed=0)
    assert sorted(map(sorted, (row["caption"] for row in train))) == sorted(CAPTIONS.values())


def test_bad_lists_are_named(tmp_path):
    with pytest.raises(ValueError, match="`texts_per_image` must be"):
        DataArguments(texts_per_image=0)
    arguments = DataArguments(prompt_column="question")
    collator = CaptionCollator(tiny_processor(tiny_model()), arguments, training=True)
    image = {"bytes": png("red"), "path": None}
    with pytest.raises(ValueError, match="`question` holds 2 texts, but `caption` 1"):
        collator([{"image": image, "caption": ["a"], "question": ["b", "c"]}])
    with pytest.raises(ValueError, match=r"`caption` must hold a caption, but is \[\]"):
        collator([{"image": image, "caption": [], "question": "b"}])


def test_a_resumed_run_goes_on_to_the_same_weights_and_logs_its_texts(tmp_path):
    towers = save_towers(tmp_path / "towers", chat=True)
    connector = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    given = {**towers, **save_rows(tmp_path), "connector_config": {**connector, "merge_r": 3}, "group_by": "name"}
    given |= {"texts_per_image": 3, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    given |= {"per_device_train_batch_size": 3, "disable_tqdm": True, "gradient_accumulation_steps": 2}
    arguments = ["--config", os.devnull, *flags(**given)]
    pretrain.main([*arguments, *flags(output_dir=tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    pretrain.main([*arguments, *flags(output_dir=tmp_path / "resumed", resume_from_checkpoint=True)])
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")
    texts = logged(tmp_path / "whole" / "checkpoint-6", "texts_per_step")
    assert len(texts) == 6 and max(texts) > 6
    assert texts == logged(tmp_path / "resumed" / "checkpoint-6", "texts_per_step")
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert "test_loss_gap" in metrics and not (tmp_path / "whole" / BAD_ROWS).exists()
