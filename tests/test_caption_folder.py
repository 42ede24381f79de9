"""examples/caption_folder.py as runs: folders and shards, broken files, kills, two processes, and what comes out."""

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
import tracemalloc

import caption_folder
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from pyarrow import parquet as pq

from common.evaluation.answers import join_answers, read_lines
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .evaluation import animate, launch
from .helpers import TWO_PROCESSES, noise_images, tiny_model, tiny_processor

BROKEN = b"no image"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    tiny_processor(model).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def save_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def save_mixed(folder):
    """Ten images in a folder, a folder in it, a `.tar` and a `.parquet`, two of them broken; gives their order."""
    images = noise_images(8)
    for name, image in zip(("b.png", "a.png", "deep/c.jpg"), images[:3], strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    (folder / "broken.png").write_bytes(BROKEN)
    (folder / "notes.txt").write_text("no image")
    members = {"x/1.json": b"{}", "x/1.png": png(images[3]), "x/2.png": BROKEN, "x/0.png": png(images[4])}
    save_tar(folder / "deep" / "shard.tar", members)
    rows = [{"bytes": png(image), "path": None} for image in images[5:]]
    rows = pa.table({"id": [1, 2, 3], "image": rows})
    pq.write_table(rows, folder / "z.parquet", row_group_size=2)
    names = ["a.png", "b.png", "broken.png", "z.parquet/0", "z.parquet/1", "z.parquet/2", "deep/c.jpg"]
    names += [f"deep/shard.tar/x/{name}.png" for name in (1, 2, 0)]
    return [f"{folder}/{name}" for name in names]


def save_images(folder, count):
    folder.mkdir()
    for index, image in enumerate(noise_images(count, size=32)):
        image.save(folder / f"{index:03}.png")
    (folder / "007.png").write_bytes(BROKEN)
    return folder


def options(model, output, /, *inputs, **changes):
    given = {"model": model, "output_dir": output, "batch_size": 4, "max_new_tokens": 6, **changes}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*options, "--inputs", *map(str, inputs)] if inputs else options


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def says(model, **inputs):
    """What the model says about one image or video by itself."""
    model, processor = EVLGenForConditionalGeneration.from_pretrained(model), EVLGenProcessor.from_pretrained(model)
    inputs = processor(**inputs)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    (text,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_everything_below_a_folder_is_captioned(model, tmp_path, capsys):
    """Images, a `.tar` and a `.parquet`, in the order of names; what cannot be read is named and counted."""
    names = save_mixed(tmp_path / "in")
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", num_workers=1))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert [row["file"] for row in rows] == names and result == {"captioned": 8, "broken": 2}
    broken = {row["file"]: row["error"] for row in rows if row["text"] is None}
    assert broken.keys() == {names[2], names[8]} == {row["file"] for row in rows if "error" in row}
    assert all(name in error and "cannot be read" in error for name, error in broken.items())
    for index, image in ((0, 1), (1, 0), (7, 3), (9, 4), (3, 5), (5, 7)):
        assert rows[index]["text"] == says(model, images=noise_images(8)[image])
    assert len({row["text"] for row in rows}) > 5
    printed = capsys.readouterr()
    assert f"2 could not be read and have an `error` there: {names[2]}, {names[8]}\n" in printed.out
    assert "Left out: 1 .txt." in printed.out and printed.err.count("Left out: ") == 2


def test_a_prompt_is_answered_with_beams_into_parquet(model, tmp_path):
    save_mixed(tmp_path / "in")
    given = options(model, tmp_path / "out", tmp_path / "in", prompt="what is it?", num_beams=2, format="parquet")
    caption_folder.main(given)
    rows = read(tmp_path / "out" / "captions.parquet")
    assert [row["text"] is None for row in rows] == [row["error"] is not None for row in rows]
    other = caption_folder.main([*given, "--format", "jsonl"])  # of the same answers
    assert other == {"captioned": 8, "broken": 2}
    assert [row["text"] for row in read(tmp_path / "out" / "captions.jsonl")] == [row["text"] for row in rows]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["prompt"], settings["num_beams"]) == ("what is it?", 2)


def test_videos_are_captioned(model, tmp_path):
    for name, brightness in (("a", 0), ("b", 200)):
        animate(tmp_path / "in" / f"{name}.webp", brightness)
    save_tar(tmp_path / "in" / "c.tar", {"1.webp": (tmp_path / "in" / "b.webp").read_bytes(), "2.mp4": BROKEN})
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", media="video", num_frames=3))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert result == {"captioned": 3, "broken": 1} and "c.tar/2.mp4" in rows[3]["error"]
    assert rows[1]["text"] == rows[2]["text"] == says(model, videos=str(tmp_path / "in" / "b.webp"), num_frames=3)
    assert rows[0]["text"] != rows[1]["text"]


@pytest.mark.parametrize("kind", ["bytes", "path", "datasets"])
def test_columns_of_every_kind_are_read(kind, model, tmp_path):
    images = noise_images(2)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    column = paths if kind == "path" else [png(image) for image in images]
    rows = Dataset.from_dict({"image": images}, Features({"image": ImageColumn()}))
    if kind != "datasets":
        rows = Dataset.from_dict({"image": [*column, None]}).cast_column(
            "image", Value("string" if kind == "path" else "binary")
        )
    rows.to_parquet(tmp_path / "shard.parquet")
    caption_folder.main(options(model, tmp_path / "out", tmp_path / "shard.parquet", column="image"))
    said = read(tmp_path / "out" / "captions.jsonl")
    assert [row["text"] for row in said[:2]] == [says(model, images=image) for image in images]
    assert kind == "datasets" or "but holds None" in said[2]["error"]


@pytest.mark.parametrize("cut", ["member", "header", "garbage", "end"])
def test_a_broken_shard_is_named_and_what_comes_before_is_kept(cut, model, tmp_path):
    save_tar(tmp_path / "in" / "1.tar", {f"{index}.png": png(image) for index, image in enumerate(noise_images(3))})
    save_tar(tmp_path / "in" / "2.tar", {"0.png": png(noise_images(1)[0])})
    (tmp_path / "in" / "3.tar").write_bytes(BROKEN)
    (tmp_path / "in" / "4.parquet").write_bytes(BROKEN)
    path = tmp_path / "in" / "1.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    data = path.read_bytes()
    end = last.offset_data + -(-last.size // 512) * 512
    cuts = {"member": data[: last.offset_data + 99], "header": data[: last.offset + 99], "end": data[:end]}
    path.write_bytes(cuts.get(cut) or data[: last.offset] + b"?" * 512 + data[last.offset + 512 :])
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    rows = {row["file"].removeprefix(f"{tmp_path}/in/"): row for row in read(tmp_path / "out" / "captions.jsonl")}
    whole = {"1.tar/0.png", "1.tar/1.png", "2.tar/0.png"} | ({"1.tar/2.png"} if cut == "end" else set())
    assert {name for name, row in rows.items() if row["text"] is not None} == whole
    partial = {"1.tar/2.png"} if cut == "member" else set()
    assert rows.keys() == whole | {"1.tar", "3.tar", "4.parquet"} | partial
    assert result == {"captioned": len(whole), "broken": 3 + len(partial)}


def test_names_that_are_no_text_and_links_are_told(model, tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder + b"/link")
    for name, data in ((b"\xff.png", png(noise_images(1)[0])), (b"\xfe.png", BROKEN)):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    items = list(
        caption_folder.list_items([str(tmp_path / "in")], "image", "image", left_out := caption_folder.Counter())
    )
    assert left_out == {"links to folders": 1} and len(items) == 2
    caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert [row["file"] for row in rows] == [f"{tmp_path}/in/\\xfe.png", f"{tmp_path}/in/\\xff.png"]
    assert "error" in rows[0] and rows[1]["text"] == says(model, images=noise_images(1))


def test_a_killed_run_goes_on(model, tmp_path):
    folder = save_images(tmp_path / "in", 90)
    changes = {"batch_size": 3, "num_beams": 2}
    caption_folder.main(options(model, tmp_path / "unbroken", folder, **changes))
    broken = tmp_path / "broken"
    part = broken / "answers.part-0.jsonl"
    process = launch("caption_folder.py", options(model, broken, folder, **changes), start_new_session=True)
    deadline = time.time() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 12):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "captions.jsonl").exists()
    lines = part.read_bytes().splitlines(keepends=True)[:11]  # three batches and a part of the fourth
    assert len(lines) == 11
    lines[1] = b'{"id": 1, "text": "said before"}\n'  # to see that it is not asked again
    part.write_bytes(b"".join(lines) + '{"id": 11, "text": "caf\u00e9'.encode()[:-1])  # a line that was cut off
    (folder / "000a.png").write_bytes(BROKEN)  # came later
    assert caption_folder.main(options(model, broken, folder, **changes)) == {"captioned": 89, "broken": 1}
    unbroken, resumed = (read(output / "captions.jsonl") for output in (tmp_path / "unbroken", broken))
    assert resumed[1]["text"] == "said before" != unbroken[1]["text"]
    unbroken[1]["text"] = "said before"
    assert resumed == unbroken and len(resumed) == 90 and "error" in resumed[7]
    names = {"answers.jsonl", "captions.jsonl", "items.arrow", "settings.json"}
    assert {path.name for path in broken.iterdir()} == names


def test_two_processes_caption_as_one(model, tmp_path):
    names = save_mixed(tmp_path / "in")
    one = options(model, tmp_path / "one", tmp_path / "in", batch_size=3)
    caption_folder.main(one)
    two = options(model, tmp_path / "two", tmp_path / "in", batch_size=3)
    process = launch("caption_folder.py", two, *TWO_PROCESSES, stderr=subprocess.PIPE, text=True)
    _, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    assert "6/6" in progress and "10/10 [" in progress  # the main process's share; what it writes
    rows = read(tmp_path / "two" / "captions.jsonl")
    assert rows == read(tmp_path / "one" / "captions.jsonl") and [row["file"] for row in rows] == names
    answers = [entry["id"] for _, entry in read_lines(tmp_path / "two" / "answers.jsonl")]
    assert answers == list(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "what?"}, "has answers from other settings: prompt was '' and is 'what\\?'"),
        ({"num_beams": 2}, "num_beams was 1 and is 2"),
        ({"batch_size": 3}, "batch_size was 4 and is 3"),
        ({"column": "image"}, "column was 'image' and is 'image'"),
    ],
)
def test_other_settings_do_not_mix_with_old_captions(changes, message, model, tmp_path):
    save_mixed(tmp_path / "in")
    caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    with pytest.raises(ValueError, match=message):
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", **changes))
    with pytest.raises(ValueError, match="inputs was"):
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in" / "deep"))


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ([], {}, "`inputs` is needed"),
        (["in/empty"], {}, "there is no image in"),
        (["in/deep"], {"media": "video"}, "there is no video in"),
        (["in/none"], {}, "`inputs`: there is no .*in/none"),
        (["in/notes.txt"], {}, r"must be folders or files of .*\.tar, \.parquet, but .*notes\.txt is none of these"),
        (["in"], {"column": "image"}, r"`column` is 'image', but .*z\.parquet has \['id', 'image'\]"),
        (["in"], {"column": "id"}, r"`column` 'id' of .*z\.parquet must hold bytes, paths or .* not int64"),
        (["in"], {"dtype": "float8"}, "`dtype` must be one of float32, bfloat16, but is 'float8'"),
        (["in"], {"prompt": "a long prompt " * 30}, "has .* tokens, but at most 128 are allowed"),
        (["in"], {"max_new_tokens": 120}, "tokens and `max_new_tokens` is 120, but the language model has places for"),
        (["in"], {"model": "/none"}, "`model`='/none' cannot be loaded"),
    ],
)
def test_an_error_in_the_settings_stops_at_once(inputs, changes, message, model, tmp_path):
    save_mixed(tmp_path / "in")
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        caption_folder.main(options(model, tmp_path / "out", *[tmp_path / name for name in inputs], **changes))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_file_that_vanishes_is_one_that_cannot_be_read(model, tmp_path):
    names = save_mixed(tmp_path / "in")
    arguments = caption_folder.FolderArguments(inputs=[str(tmp_path / "in")], column="image")
    caption_folder.load_items(tmp_path / "out" / "items.arrow", arguments)
    shutil.rmtree(tmp_path / "in" / "deep")
    (tmp_path / "in" / "z.parquet").unlink()
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert result == {"captioned": 2, "broken": 8} and [row["file"] for row in rows] == names


def peak_memory(function, *arguments):
    """The most bytes that Python held while the function ran, over those before."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_items_nor_captions_are_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_folder, "ROWS", 100)
    save_tar(tmp_path / "many.tar", {f"{index:080}.png": b"" for index in range(3000)})
    arguments = caption_folder.FolderArguments(inputs=[str(tmp_path / "many.tar")], column="image")
    assert peak_memory(caption_folder.load_items, tmp_path / "items.arrow", arguments) < 500_000
    items = caption_folder.load_items(tmp_path / "items.arrow", arguments)
    assert items["file"][2999] == f"{tmp_path}/many.tar/{2999:080}.png"

    for part in range(2):
        lines = [json.dumps({"id": index, "text": f"{index} " * 300}) + "\n" for index in range(part, 3000, 2)]
        (tmp_path / f"answers.part-{part}.jsonl").write_text("".join(lines))
    size = sum(path.stat().st_size for path in tmp_path.glob("answers.part-*"))
    assert size > 4_000_000
    assert peak_memory(join_answers, tmp_path, range(3000)) < 500_000
    for kind in ("jsonl", "parquet"):
        assert peak_memory(caption_folder.write_captions, items, tmp_path, kind) < 1_500_000
        rows = read(tmp_path / f"captions.{kind}")
        assert [row["text"] for row in rows] == [f"{index} " * 300 for index in range(3000)]
