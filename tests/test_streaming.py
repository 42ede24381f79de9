"""Streams that outgrow a disk: shared out among processes and workers, and resumed where they stood."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path

import pretrain
import pytest
from datasets import load_dataset
from torch.utils.data import DataLoader

from common.arguments import DataArguments
from common.data.collator import CaptionCollator, TrainingCollator
from common.data.loading import load_datasets
from common.data.rows import open_media
from common.data.streams import EPOCH, SourceReader

from .helpers import ROOT, save_split, save_towers, tiny_model, tiny_processor
from .hub_server import HubServer, Repo
from .training import (
    CAPTIONS,
    SHARDS,
    assert_same_weights,
    captions,
    kill_after,
    logged,
    name_tars,
    png,
    read_lines,
    start,
    stream_of,
    stream_options,
    webdataset,
    write_sample,
    write_tars,
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"), SHARDS)


@pytest.fixture(scope="module")
def kinds(tars, tmp_path_factory):
    """The same rows, streamed from tar shards, Parquet files and a folder, and from a data set on disk."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = load_dataset("webdataset", data_files=str(tars / "*.tar"), cache_dir=folder / "cache", split="train")
    rows = rows.rename_columns({"png": "image", "txt": "caption"}).select_columns(["image", "caption"])
    stop = 0
    for shard, size in enumerate(SHARDS):
        rows.select(range(stop, stop + size)).to_parquet(folder / f"{shard}.parquet", batch_size=2)
        stop += size
    save_split(folder / "images" / "train", rows["image"], [{"caption": caption} for caption in rows["caption"]])
    streamed = DataArguments(test_split="", streaming=True)
    files = {"train": str(folder / "*.parquet")}
    return {
        "webdataset": webdataset(tars),
        "parquet": replace(streamed, dataset="parquet", data_files=files),
        "folder": replace(streamed, dataset=str(folder / "images")),
        "first rows": webdataset(tars, max_train_samples=20),
        "map": rows.to_iterable_dataset(num_shards=6),
    }


@pytest.mark.parametrize("readers", [1, 4, 5, 8])
@pytest.mark.parametrize("kind", ["webdataset", "parquet", "folder", "first rows", "map"])
def test_in_each_round_every_row_goes_to_one_reader(kind, readers, kinds):
    """With as many shards as readers, more and fewer; 5 shards for 4 readers and one shard for all are among them."""
    source = stream_of(kinds[kind]).sources[0]
    rounds = [
        list(takewhile(lambda row: row[EPOCH] < 2, SourceReader(source, 0, part, readers, buffer_size=4)))
        for part in range(readers)
    ]
    wanted = sorted(CAPTIONS[:20] if kind == "first rows" else CAPTIONS)
    for epoch in (0, 1):
        assert sorted(captions(row for row in chain(*rounds) if row[EPOCH] == epoch)) == wanted
    one, other = (captions(row for row in rounds[0] if row[EPOCH] == epoch) for epoch in (0, 1))
    assert one != other


def test_too_few_shards_are_announced(tars, caplog):
    stream = stream_of(webdataset(tars))
    stream.split(0, 2, 3)
    assert not caplog.records
    stream.split(0, 2, 2 * 3)
    assert "has 6 shards for 12 readers (2 processes x 6 workers): 2 of them read each shard" in caplog.text


def test_too_few_rows_for_all_readers_are_refused(tars):
    rows = iter(SourceReader(stream_of(webdataset(tars, max_train_samples=2)).sources[0], 0, 2, 3, 4))
    with pytest.raises(ValueError, match=r"webdataset .* has no rows for reader 3 of 3 \(processes x workers\)"):
        next(rows)


def test_a_shard_that_was_cut_off_is_reported(tmp_path):
    folder = write_tars(tmp_path / "tars", [20, 20])
    path = folder / "001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"webdataset .*/tars/\*\.tar.*: a file, not only a row, cannot be read"):
        list(islice(iter(stream_of(webdataset(folder))), 40))


def test_a_member_that_cannot_be_decoded_makes_a_bad_row(tmp_path):
    """A caption that is no UTF-8 is one; JSON that no column is made of makes none. Neither ends the stream."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(12):
            text = b"\xff\xfe" if number == 8 else f"image {number}".encode()
            write_sample(tar, number, png=png("red"), txt=text, json=b'{"a' if number == 9 else b'{"a": 1}')
    rows = list(islice(iter(stream_of(webdataset(tmp_path))), 12))
    wanted = {f"{number:04d}": None if number == 8 else f"image {number}" for number in range(12)}
    assert {row["__key__"]: row["txt"] for row in rows} == wanted
    arguments = webdataset(tmp_path, skip_bad_rows=True)
    collator = CaptionCollator(tiny_processor(tiny_model()), arguments, training=True)
    assert len(collator(rows)["pixel_values"]) == 11
    (bad,) = collator.bad_rows
    assert "0008 in " in bad["row"] and bad["error"] == "`txt` must hold a caption, but is None."
    with pytest.raises(ValueError, match="None of the 1 rows of a batch can be used"):
        collator([row for row in rows if row["txt"] is None])


@pytest.mark.parametrize("streaming", [True, False])
def test_files_with_the_names_of_members_are_not_read_in_their_place(streaming, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = ["0", "../1", f"{tmp_path}/2", "x/../../3"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in names:
            write_sample(tar, name, png=png("red"), txt=b"red")
        write_sample(tar, "../4", png=b"", txt=b"empty")
    for name in ("work/0", "1", "2", "3", "4"):
        (tmp_path / f"{name}.png").write_bytes(png("blue"))
    before = sorted(tmp_path.rglob("*"))
    arguments = replace(webdataset(tmp_path, max_train_samples=5), streaming=streaming)
    rows = list(islice(iter(load_datasets(arguments, 0)[0]), 5))
    colors = {row["__key__"]: open_media(row, arguments).getpixel((0, 0)) for row in rows if row["txt"] == "red"}
    assert colors == dict.fromkeys(names, (255, 0, 0))
    (empty,) = (row for row in rows if row["txt"] == "empty")
    with pytest.raises(ValueError, match=r"4\.png' cannot be read"):
        open_media(empty, arguments)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


class Captions:
    """Stands in for the collator, to see rows."""

    bad_rows: list = []

    def __call__(self, rows):
        return {"rows": captions(rows)}


def loader(stream, num_workers):
    stream.split(0, 1, num_workers)
    return DataLoader(stream, 3, collate_fn=TrainingCollator(Captions(), stream), num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6, 7])
def test_a_loader_goes_on_where_it_stood(num_workers, stop, kinds, tars):
    """At the beginning, in the middle of blocks, and in the second round; one data set and two."""
    others = {"dataset": "parquet", "data_files": kinds["parquet"].data_files, "weight": 1}
    parts = [{**name_tars(train=tars), "weight": 3}, others]
    mixture = DataArguments(mixture=parts, streaming=True, test_split="")
    for arguments in (kinds["webdataset"], kinds["parquet"], mixture):
        whole = list(islice(loader(stream_of(arguments), num_workers), stop + 12))
        places = [batch["position"] for batch in whole[:stop]]
        states = {reader: json.loads(json.dumps(state)) for reader, state in places}
        stream = stream_of(arguments)
        stream.load_states(states, (places[-1][0] + 1) % max(1, num_workers))
        rest = islice(loader(stream, num_workers), 12)
        assert [batch["rows"] for batch in rest] == [batch["rows"] for batch in whole[stop:]]


def test_what_was_read_before_is_not_read_again(tmp_path):
    """Shards that are done with cannot be read any more when the stream goes on. Ten are read by turns."""
    folder = write_tars(tmp_path / "tars", [3] * 30)
    stream = stream_of(webdataset(folder))
    rows = list(islice(iter(stream), 75))
    again = stream_of(webdataset(folder))
    again.load_states({0: stream.position[1]}, 0)
    for path in {row["__url__"] for row in rows[:20]}:
        Path(path).write_bytes(b"")
    rest = list(islice(iter(again), 15))
    assert sorted(captions(rows + rest)) == sorted(f"image {index}" for index in range(90))


# Writes down what each process trains on, step by step.
RECORDER = """
import json, sys
from pathlib import Path
import pretrain
from common.training.trainer import EVLGenTrainer

train = EVLGenTrainer.training_step

def recorded(self, model, inputs, *args, **kwargs):
    decode = self.processing_class.tokenizer.decode
    captions = [decode(row[row != -100], skip_special_tokens=True).strip() for row in inputs["labels"]]
    with Path(self.args.output_dir, f"seen-{self.args.process_index}.jsonl").open("a") as file:
        file.write(json.dumps([self.state.global_step + 1, captions]) + "\\n")
    return train(self, model, inputs, *args, **kwargs)

EVLGenTrainer.training_step = recorded
pretrain.main()
"""


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.mark.slow
def test_two_processes_with_two_workers_see_every_row_once_also_after_a_kill(towers, tmp_path):
    broken = (7, 30)
    tars = write_tars(tmp_path / "tars", [6] * 8, broken=broken)
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)
    steps = {"max_steps": 12, "save_steps": 5, "dataloader_num_workers": 2}  # 8 steps are a round
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"

    whole = stream_options(towers, unbroken, tars, **steps)
    process = start(script, whole, two=True, stdout=subprocess.PIPE, text=True)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0
    seen = [read_lines(unbroken / f"seen-{rank}.jsonl") for rank in (0, 1)]
    rounds = [[], []]
    for step, captions_of_step in chain(*seen):
        rounds[step > 8] += captions_of_step
    first, second = rounds
    assert sorted(first) == sorted(f"image {index}" for index in range(48) if index not in broken)
    assert len(set(second)) == len(second) >= 22

    bad = read_lines(unbroken / "bad_rows.jsonl")
    assert sorted(row["row"].split("'")[1] for row in bad if row["epoch"] == 0) == ["image 30", "image 7"]
    assert "0007 in " in str(bad) and "001.tar" in str(bad) and "'0007.png' cannot be read" in str(bad)
    assert f"{len(bad)} times a bad row was skipped; {unbroken / 'bad_rows.jsonl'} names them." in output

    kill_after(start(script, stream_options(towers, resumed, tars, **steps), two=True), resumed / "checkpoint-5")
    before = [[line for line in read_lines(resumed / f"seen-{rank}.jsonl") if line[0] <= 5] for rank in (0, 1)]
    for rank in (0, 1):
        (resumed / f"seen-{rank}.jsonl").unlink()
    again = stream_options(towers, resumed, tars, **steps, resume_from_checkpoint=True)
    assert start(script, again, two=True).wait(timeout=240) == 0
    assert [before[rank] + read_lines(resumed / f"seen-{rank}.jsonl") for rank in (0, 1)] == seen
    bad_again = read_lines(resumed / "bad_rows.jsonl")
    assert sorted((row["step"], row["row"]) for row in bad_again) == sorted((row["step"], row["row"]) for row in bad)


def test_a_batch_of_bad_rows_alone_does_not_stop_a_stream(towers, tmp_path):
    """The batches of a resumed run are those of an unbroken one."""
    tars = write_tars(tmp_path / "tars", [6] * 2, broken=range(12 - 5))
    steps = {"max_steps": 12, "save_steps": 3, "per_device_train_batch_size": 2, "skip_bad_rows": True}
    pretrain.main(stream_options(towers, tmp_path / "whole", tars, **steps))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    pretrain.main(stream_options(towers, tmp_path / "part", tars, **steps, resume_from_checkpoint=True))
    assert_same_weights(tmp_path / "whole", tmp_path / "part")
    skipped = read_lines(tmp_path / "whole" / "bad_rows.jsonl")
    assert max(Counter(row["step"] for row in skipped).values()) == 2 and len(skipped) == 14  # in two rounds

    none = write_tars(tmp_path / "none", [6] * 2, broken=range(12))
    with pytest.raises(ValueError, match="None of the first 1000 rows of a stream can be used"):
        pretrain.main(stream_options(towers, tmp_path / "out", none, **steps))


def test_a_resumed_stream_goes_on_to_the_same_weights(towers, tars, tmp_path):
    steps = {"max_steps": 16, "save_steps": 6, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    steps |= {"crop_scale": [0.5, 1.0], "horizontal_flip": True}
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    pretrain.main(stream_options(towers, unbroken, tars, **steps))
    given = stream_options(towers, resumed, tars, **steps)
    shutil.copytree(unbroken / "checkpoint-6", resumed / "checkpoint-6")
    pretrain.main([*given, "--resume_from_checkpoint", "true"])
    assert_same_weights(unbroken, resumed)
    assert logged(unbroken / "checkpoint-16", "epoch") == logged(resumed / "checkpoint-16", "epoch")
    pretrain.main([*given, "--resume_from_checkpoint", "true"])  # of a run that is done
    assert_same_weights(unbroken, resumed)
    assert not (resumed / "checkpoint-17").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataloader_num_workers": 2}, "is of a stream with num_workers 1, not 2: --ignore_data_skip true starts"),
        ({"shuffle_buffer": 5}, "is of a stream with shuffle_buffer 4, not 5"),
    ],
)
def test_a_stream_does_not_go_on_under_other_conditions(changes, message, towers, tars, tmp_path):
    pretrain.main(stream_options(towers, tmp_path, tars, max_steps=1, save_steps=1))
    given = stream_options(towers, tmp_path, tars, max_steps=2, resume_from_checkpoint=True, **changes)
    with pytest.raises(ValueError, match=message):
        pretrain.main(given)
    pretrain.main([*given, "--ignore_data_skip", "true"])
    (tmp_path / "checkpoint-1" / "run.json").unlink()
    with pytest.raises(ValueError, match="does not hold its position in a stream"):
        pretrain.main([*given, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1")])


def test_a_data_set_is_streamed_from_the_hub_and_the_model_is_published_there(towers, tars, tmp_path):
    files = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    with HubServer() as hub:
        hub.repos["datasets", "user/images"] = Repo("user/images")
        hub.repos["datasets", "user/images"].commit("main", "images", "", files)
        columns = {"dataset": "user/images", "image_column": "png", "caption_column": "txt"}
        columns |= {"push_to_hub": True, "hub_model_id": "user/captioner"}
        given = stream_options(towers, tmp_path / "out", max_steps=4, dataloader_num_workers=2, **columns)
        environment = {**hub.client_env(tmp_path / "hf_home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *given]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=240)
        published = hub.files("user/captioner").keys()
    assert published >= {"README.md", "config.json", "model.safetensors", "processing_evlgen.py", "tokenizer.json"}
    assert not list((tmp_path / "hf_home").rglob("*.tar"))  # nothing was kept
    assert all(any(f"/{name} -> 20" in request for request in hub.requests) for name in files)
