"""One's own pictures: tables and folders of them, relative paths, missing files, and rows that are held out."""

import csv
import json
import shutil
from itertools import islice
from pathlib import Path

import finetune
import pretrain
import pytest
from datasets import Dataset
from PIL import Image

from common.arguments import DataArguments
from common.data.loading import load_datasets
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import COLORS, ROOT, save_image_folder, save_towers, tiny_model
from .training import CONNECTOR, assert_same_weights, flags, logged, save_captioner

CAPTIONS = ROOT / "examples" / "configs" / "finetune-captions.yaml"


def save_pictures(folder, count=20, texts=1):
    """Saves pictures in folder/pictures; returns a row for each text of each, with a path relative to the folder."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        color = COLORS[index % len(COLORS)]
        Image.new("RGB", (40, 40), color).save(folder / "pictures" / f"{index}.png")
        said = [f"{index}: a {color} image", f"{index}: all {color}", f"{index}: {color}"][:texts]
        rows += [{"image": f"pictures/{index}.png", "name": index, "caption": text} for text in said]
    return rows


def save_table(path, rows):
    """Saves rows as CSV, JSON lines or Parquet; returns the arguments that name the file."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(path)
    kind = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    return {"dataset": kind, "data_files": {"train": str(path)}}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_relative_paths_start_from_their_file_or_the_image_root(suffix, streaming, tmp_path, monkeypatch):
    rows = save_pictures(tmp_path / "data", count=4)
    rows[1]["image"] = str(tmp_path / "data" / rows[1]["image"])
    rows[2]["image"] = "https://example.org/a.png"
    monkeypatch.chdir(tmp_path)
    expected = [str(tmp_path / "data" / row["image"]) for row in rows]
    expected[2] = rows[2]["image"]
    given = {"test_split": "", "streaming": streaming, "shuffle_buffer": 1}
    (tmp_path / "elsewhere").mkdir()
    for folder, root in (("data", {}), ("elsewhere", {"image_root": "data"})):
        table = save_table(tmp_path / folder / f"table{suffix}", rows)
        table["data_files"] = {"train": f"{folder}/table{suffix}"}  # the table's own path is relative, too
        train, _ = load_datasets(DataArguments(**table, **given, **root), seed=0)
        found = {row["caption"]: row["image"] for row in islice(iter(train), 4)}
        assert found == dict(zip([row["caption"] for row in rows], expected, strict=True))


def test_lists_of_relative_paths_are_found_in_each_data_set_of_a_mixture(tmp_path):
    entries = []
    for name in ("one", "two"):
        pair = [row["image"] for row in save_pictures(tmp_path / name, count=2)]
        table = save_table(tmp_path / name / "table.jsonl", [{"image": pair, "caption": name}] * 3)
        entries.append({**table, "weight": 1})
    train, _ = load_datasets(DataArguments(mixture=entries, test_split=""), seed=0)
    wanted = {
        name: [str(tmp_path / name / "pictures" / f"{index}.png") for index in (0, 1)] for name in ("one", "two")
    }
    assert {row["caption"]: row["image"] for row in train} == wanted


@pytest.mark.parametrize("kind", ["table", "folder"])
def test_all_missing_files_are_noticed_at_the_start_and_five_are_named(kind, tmp_path, caplog):
    rows = save_pictures(tmp_path)
    if kind == "folder":
        rows = [{"file_name": row["image"], "caption": row["caption"]} for row in rows]
        save_table(tmp_path / "metadata.csv", rows)
        given = {"dataset": str(tmp_path)}
    else:
        given = save_table(tmp_path / "table.csv", rows)
    load_datasets(DataArguments(**given, test_size=3), seed=0)
    for index in range(2, 9):
        (tmp_path / "pictures" / f"{index}.png").unlink()
    arguments = DataArguments(**given, test_split="")
    with pytest.raises(ValueError, match="`image_column` names files that are missing, 7 in all: ") as error:
        load_datasets(arguments, seed=0)
    assert str(error.value).count(str(tmp_path / "pictures")) == 5 and ", …." in str(error.value)
    assert (f"start from {tmp_path};" in str(error.value)) == (kind == "table")
    arguments.skip_bad_rows = True
    assert len(load_datasets(arguments, seed=0)[0]) == 20
    assert "that are missing, 7 in all" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_root": "/nowhere"}, "`image_root` is '/nowhere', which is no folder"),
        ({"data_files": {"train": "*/table.csv"}}, "is of files in 2 folders: its relative paths need `image_root`"),
        ({"test_size": 20}, r"`test_size` is 20, but `train` has 20 images"),
        ({"test_size": 0.1, "streaming": True}, "`test_size` divides one whole data set"),
        ({"test_size": 0.1, "group_by": "id"}, "`group_by` is 'id', but"),
        ({"test_split": "test"}, r"`test_split` is 'test', .* --test_size 0\.1 holds out a tenth"),
    ],
)
def test_splits_and_roots_that_cannot_be_are_named(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        table = save_table(save_folder(tmp_path / folder) / "table.csv", save_pictures(tmp_path / folder))
    with pytest.raises(ValueError, match=message):
        load_datasets(DataArguments(**{**table, "test_split": "", **changes}), seed=0)


def save_folder(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("size", [1.5, float("nan"), "many"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="`test_size` must be a share between 0 and 1, or a number of images"):
        DataArguments(test_size=size)


@pytest.mark.parametrize("group_by", ["name", "image", None])
def test_held_out_images_are_the_same_in_each_run_and_never_trained_on(group_by, tmp_path):
    rows = save_pictures(tmp_path, texts=3)
    given = {**save_table(tmp_path / "table.csv", sorted(rows, key=lambda row: row["caption"])), "group_by": group_by}
    splits = [load_datasets(DataArguments(**given, test_size=0.2), seed=seed) for seed in (0, 1)]
    splits.append(
        load_datasets(DataArguments(**given, test_size=4, max_train_samples=5, test_split="nowhere"), seed=0)
    )
    held_out = [{*test["image"]} for _, test in splits]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 4
    train, test = splits[0]
    assert not held_out[0] & {*train["image"]} and len({*train["image"]}) == 16
    assert len(test) == (4 if group_by else 12) and len(splits[2][0]) <= 5 < len(train)
    assert held_out[0] != {f"{tmp_path}/pictures/{index}.png" for index in range(16, 20)}  # not just the last ones


def test_a_folder_with_a_metadata_csv_is_divided_alike_when_a_run_is_resumed(tmp_path):
    rows = save_pictures(tmp_path / "mine", count=12)
    table = [{"file_name": row["image"], "caption": row["caption"]} for row in rows]
    save_table(tmp_path / "mine" / "metadata.csv", table)
    given = {**save_towers(tmp_path / "towers"), "connector_config": CONNECTOR, "dataset": tmp_path / "mine"}
    given |= {"test_size": 0.25, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    given |= {"per_device_train_batch_size": 3, "max_new_tokens": 8, "disable_tqdm": True, "config": "/dev/null"}
    pretrain.main(flags(**given, output_dir=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = {**given, "output_dir": tmp_path / "killed", "resume_from_checkpoint": True}
    pretrain.main(flags(**resumed))
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    with pytest.raises(ValueError, match=r"`test_size` was 0\.25 and is 0\.5"):
        pretrain.main(flags(**{**resumed, "test_size": 0.5}))


def test_a_captioner_goes_on_with_own_captions_and_shows_held_out_ones(tmp_path, capsys):
    rows = save_pictures(tmp_path)
    model = save_captioner(tmp_path / "model", tiny_model())
    given = {"config": CAPTIONS, "model": model, **save_table(tmp_path / "table.csv", rows), "test_size": 0.2}
    given |= {"output_dir": tmp_path / "mine", "num_train_epochs": 8, "per_device_train_batch_size": 4}
    given |= {"bf16": False, "learning_rate": 1e-2, "eval_steps": 0.25, "logging_steps": 4, "disable_tqdm": True}
    metrics = finetune.main(flags(**given))
    losses = logged(sorted((tmp_path / "mine").glob("checkpoint-*"))[-1], "eval_loss")
    assert len(losses) == 4 and losses[-1] < losses[0] and metrics["test_loss"] == pytest.approx(losses[-1], abs=0.01)
    trained = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "mine")  # a whole model, no adapter
    assert trained.generation_config.max_new_tokens == 30
    printed = capsys.readouterr().out
    assert printed.count("Held-out captions after ") == 4 and "Held-out captions after 8 steps:\n  " in printed
    assert printed.count(" (true: ") == 16


def test_texts_beside_the_images_of_a_folder_do_not_take_their_place(tmp_path):
    folder = Path(save_image_folder(tmp_path / "images", train=3, test=1))
    for index in range(9):
        (folder / "train" / f"{index}.txt").write_text("a caption for another trainer")
    train, test = load_datasets(DataArguments(dataset=str(folder)), seed=0)
    assert len(train) == 3 and train[0]["caption"] == "a red image" and len(test) == 1
