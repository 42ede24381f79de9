"""Runs of examples/caption_folder.py: folders and shards, broken and replaced files, kills, and two processes."""

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

from common.evaluation.answer_folder import join_answers, read_lines
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
    """Saves ten images in a folder, a folder in it, a `.tar` and a `.parquet`, two of them broken.

    Returns:
        Their names, in the order of the captions.
    """
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


def caption(model, **inputs):
    """The model's caption of a single image or video."""
    model, processor = EVLGenForConditionalGeneration.from_pretrained(model), EVLGenProcessor.from_pretrained(model)
    inputs = processor(**inputs)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    (text,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def test_everything_below_a_folder_is_captioned(model, tmp_path, capsys):
    """Images, a `.tar` and a `.parquet` come in the order of names. Unreadable images are named and counted."""
    names = save_mixed(tmp_path / "in")
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", num_workers=1))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert [row["file"] for row in rows] == names and result == {"captioned": 8, "broken": 2}
    broken = {row["file"]: row["error"] for row in rows if row["text"] is None}
    assert broken.keys() == {names[2], names[8]} == {row["file"] for row in rows if "error" in row}
    assert all(name in error and "cannot be read" in error for name, error in broken.items())
    for index, image in ((0, 1), (1, 0), (7, 3), (9, 4), (3, 5), (5, 7)):
        assert rows[index]["text"] == caption(model, images=noise_images(8)[image])
    assert len({row["text"] for row in rows}) > 5
    printed = capsys.readouterr()
    assert f"2 could not be read and have an `error` there: {names[2]}, {names[8]}\n" in printed.out
    assert "Left out: 1 .txt." in printed.out and printed.err.count("Left out: ") == 2


def test_tiles_and_tokens_can_be_chosen(model, tmp_path):
    elastic = EVLGenForConditionalGeneration.from_pretrained(model)
    elastic.config.image_token_range = [2, 17]
    elastic.save_pretrained(tmp_path / "model")
    processor = EVLGenProcessor.from_pretrained(model)
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "in").mkdir()
    images = [*noise_images(2, size=64), *noise_images(1, size=20)]
    for index, image in enumerate(images):
        image.save(tmp_path / "in" / f"{index}.png")
    changes = {"max_tiles": 4, "num_image_tokens": 6}
    caption_folder.main(options(tmp_path / "model", tmp_path / "out", tmp_path / "in", **changes))
    for row, image in zip(read(tmp_path / "out" / "captions.jsonl"), images, strict=True):
        assert row["text"] == caption(tmp_path / "model", images=image, **changes)
    with pytest.raises(ValueError, match="other settings: num_image_tokens was 6 and is 11"):
        caption_folder.main(options(tmp_path / "model", tmp_path / "out", tmp_path / "in", max_tiles=4))
    with pytest.raises(ValueError, match="`num_image_tokens` must be from 11 to 11"):
        caption_folder.main(options(model, tmp_path / "other", tmp_path / "in", num_image_tokens=6))


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
    assert rows[1]["text"] == rows[2]["text"] == caption(model, videos=str(tmp_path / "in" / "b.webp"), num_frames=3)
    assert rows[0]["text"] != rows[1]["text"]
    by_rate = options(model, tmp_path / "rate", tmp_path / "in", media="video", fps=5, batch_size=1)
    assert caption_folder.main(by_rate) == {"captioned": 3, "broken": 1}
    rows = read(tmp_path / "rate" / "captions.jsonl")
    assert rows[1]["text"] == caption(model, videos=str(tmp_path / "in" / "b.webp"), fps=5)


def test_videos_give_as_many_frames_as_the_processor_takes(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    processor = EVLGenProcessor.from_pretrained(model)
    processor.video_processor.num_frames = 2
    processor.save_pretrained(tmp_path / "model")
    animate(tmp_path / "in" / "a.webp", 200)
    given = options(tmp_path / "model", tmp_path / "out", tmp_path / "in", media="video")
    caption_folder.main(given)
    (row,) = read(tmp_path / "out" / "captions.jsonl")
    assert row["text"] == caption(model, videos=str(tmp_path / "in" / "a.webp"), num_frames=2)
    caption_folder.main([*given, "--num_frames", "2"])  # the same
    with pytest.raises(ValueError, match="num_frames"):
        caption_folder.main([*given, "--num_frames", "3"])


def test_a_video_of_too_many_frames_is_named_and_the_others_are_captioned(model, tmp_path):
    animate(tmp_path / "in" / "a.webp", 0)
    frames = noise_images(520, size=8)
    frames[0].save(tmp_path / "in" / "long.webp", save_all=True, append_images=frames[1:], duration=10, lossless=True)
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", media="video", fps=100))
    assert result == {"captioned": 1, "broken": 1}
    assert "more than 512 frames" in read(tmp_path / "out" / "captions.jsonl")[1]["error"]
    with pytest.raises(ValueError, match="`num_frames` must be at most 512, but is 10000"):
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", media="video", num_frames=10_000))


@pytest.mark.parametrize("kind", ["bytes", "path", "datasets"])
def test_columns_of_every_type_are_read(kind, model, tmp_path):
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
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert [row["text"] for row in rows[:2]] == [caption(model, images=image) for image in images]
    assert kind == "datasets" or "but holds None" in rows[2]["error"]


@pytest.mark.parametrize("cut", ["member", "header", "garbage", "end"])
def test_a_broken_shard_is_named_and_the_images_before_the_damage_are_kept(cut, model, tmp_path):
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


def test_names_that_are_not_utf8_are_escaped_and_links_are_counted(model, tmp_path):
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
    assert "error" in rows[0] and rows[1]["text"] == caption(model, images=noise_images(1))


def test_a_killed_run_is_resumed(model, tmp_path, monkeypatch):
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
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"another run writes to .*caption_folder\.py"),
    ):
        patch.setattr("common.files.LOCK_SECONDS", 0)
        caption_folder.main(options(model, broken, folder, **changes))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "captions.jsonl").exists()
    lines = part.read_bytes().splitlines(keepends=True)[:11]  # three batches and a part of the fourth
    assert len(lines) == 11
    lines[1] = b'{"id": 1, "text": "from before"}\n'  # it is not captioned again
    part.write_bytes(b"".join(lines) + '{"id": 11, "text": "caf\u00e9'.encode()[:-1])  # a line that was cut off
    (folder / "000a.png").write_bytes(BROKEN)  # came later
    assert caption_folder.main(options(model, broken, folder, **changes)) == {"captioned": 89, "broken": 1}
    unbroken, resumed = (read(output / "captions.jsonl") for output in (tmp_path / "unbroken", broken))
    assert resumed[1]["text"] == "from before" != unbroken[1]["text"]
    unbroken[1]["text"] = "from before"
    assert resumed == unbroken and len(resumed) == 90 and "error" in resumed[7]
    names = {"_run.lock", "answers.jsonl", "captions.jsonl", "items.arrow", "settings.json"}
    assert {path.name for path in broken.iterdir()} == names


def test_two_processes_caption_as_one(model, tmp_path):
    names = save_mixed(tmp_path / "in")
    one = options(model, tmp_path / "one", tmp_path / "in", batch_size=3)
    caption_folder.main(one)
    two = options(model, tmp_path / "two", tmp_path / "in", batch_size=3)
    process = launch("caption_folder.py", two, *TWO_PROCESSES, stderr=subprocess.PIPE, text=True)
    _, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    assert "6/6" in progress and "10/10 [" in progress  # the share of the main process; all that it writes
    rows = read(tmp_path / "two" / "captions.jsonl")
    assert rows == read(tmp_path / "one" / "captions.jsonl") and [row["file"] for row in rows] == names
    answers = [entry["id"] for _, entry in read_lines(tmp_path / "two" / "answers.jsonl")]
    assert answers == list(range(10))


def test_other_settings_do_not_mix_with_old_captions(model, tmp_path):
    save_mixed(tmp_path / "in")
    caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    for changes, message in (
        ({"prompt": "what?"}, "prompt was '' and is 'what\\?'"),
        ({"batch_size": 3}, "batch_size was 4 and is 3"),
        ({"column": "photo"}, "column was 'image' and is 'photo'"),
    ):
        with pytest.raises(ValueError, match=message):
            caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", **changes))
    with pytest.raises(ValueError, match="inputs was"):
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in" / "deep"))


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ([], {}, "`inputs` is needed"),
        (["in/empty"], {}, "there is no image in"),
        (["in/none"], {}, "`inputs`: there is no .*in/none"),
        (["in/notes.txt"], {}, r"must be folders or files of .*\.tar, \.parquet, but .*notes\.txt is neither"),
        (["in"], {"column": "photo"}, r"`column` is 'photo', but .*z\.parquet has \['id', 'image'\]"),
        (["in"], {"column": "id"}, r"`column` 'id' of .*z\.parquet must hold bytes, paths or .* not int64"),
        (["in"], {"num_frames": 0}, "`num_frames` must be an integer of 1 or more, but is 0"),
        (["in"], {"prompt": "a long prompt " * 30}, "has .* tokens, but at most 128 are allowed"),
        (["in"], {"max_new_tokens": 120}, "tokens and `max_new_tokens` is 120, but the language model takes at most"),
        (["in"], {"model": "/none"}, "`model`='/none' cannot be loaded"),
    ],
)
def test_an_error_in_the_settings_stops_at_once(inputs, changes, message, model, tmp_path):
    save_mixed(tmp_path / "in")
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        caption_folder.main(options(model, tmp_path / "out", *[tmp_path / name for name in inputs], **changes))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_file_that_vanishes_is_one_that_cannot_be_read(model, tmp_path, monkeypatch):
    names = save_mixed(tmp_path / "in")
    arguments = caption_folder.FolderArguments(inputs=[str(tmp_path / "in")], column="image")
    (tmp_path / "out").mkdir()
    caption_folder.load_items(tmp_path / "out" / "items.arrow", arguments, is_new=True)
    monkeypatch.setattr(caption_folder, "is_new_run", lambda folder: False)
    shutil.rmtree(tmp_path / "in" / "deep")
    (tmp_path / "in" / "z.parquet").unlink()
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    rows = read(tmp_path / "out" / "captions.jsonl")
    assert result == {"captioned": 2, "broken": 8} and [row["file"] for row in rows] == names


def test_a_replaced_image_is_captioned_again(model, tmp_path, capsys):
    folder, output = save_images(tmp_path / "in", 9), tmp_path / "out"
    caption_folder.main(options(model, output, folder))
    lines = (output / "answers.jsonl").read_text().splitlines(keepends=True)
    lines[3] = '{"id": 3, "text": "from before"}\n'
    (output / "answers.jsonl").write_text("".join(lines))
    fresh = noise_images(9, size=30)
    for index in (2, 7):  # 007.png was broken
        fresh[index].save(folder / f"{index:03}.png")
    (folder / "005.png").unlink()
    assert caption_folder.main(options(model, output, folder)) == {"captioned": 9, "broken": 0}
    names = [f"{folder}/00{index}.png" for index in (2, 7)]
    assert f"2 files changed and are captioned again: {', '.join(names)}\n" in capsys.readouterr().out
    rows = read(output / "captions.jsonl")
    assert [rows[index]["text"] for index in (2, 7)] == [caption(model, images=fresh[index]) for index in (2, 7)]
    assert rows[3]["text"] == "from before" and rows[5]["text"]
    caption_folder.main(options(model, output, folder))
    assert "changed" not in capsys.readouterr().out and read(output / "captions.jsonl") == rows


@pytest.mark.parametrize("name", ["deep/shard.tar", "z.parquet"])
def test_a_replaced_shard_is_refused(name, model, tmp_path):
    """Its items may be at other positions. The answers are kept."""
    save_mixed(tmp_path / "in")
    caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with (tmp_path / "in" / name).open("ab") as file:
        file.write(b"more")
    noise_images(1, size=9)[0].save(tmp_path / "in" / "a.png")
    with pytest.raises(ValueError, match=rf"`inputs`: .*{name} changed since the items were listed. Name another"):
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in"))
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("as_struct", [False, True])
def test_a_replaced_image_that_a_parquet_names_is_captioned_again(as_struct, model, tmp_path, capsys):
    folder, fresh = save_images(tmp_path / "images", 4), noise_images(1, size=30)[0]
    paths = [str(folder / f"{index:03}.png") for index in range(4)]
    cells = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
    pq.write_table(pa.table({"image": [*cells, None]}), tmp_path / "a.parquet", row_group_size=3)
    arguments = options(model, tmp_path / "out", tmp_path / "a.parquet")
    assert caption_folder.main(arguments) == {"captioned": 4, "broken": 1}
    fresh.save(paths[3])
    caption_folder.main(arguments)
    assert f"1 files changed and are captioned again: {tmp_path}/a.parquet/3\n" in capsys.readouterr().out
    assert read(tmp_path / "out" / "captions.jsonl")[3]["text"] == caption(model, images=fresh)


def test_answers_of_an_unknown_list_are_refused(model, tmp_path):
    folder, output = save_images(tmp_path / "in", 8), tmp_path / "out"
    arguments = options(model, output, folder)
    caption_folder.main(arguments)
    (output / "items.arrow").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"`output_dir`: .*items\.arrow is broken: .* Remove .*, or name another folder"
    ):
        caption_folder.main(arguments)
    (output / "items.arrow").unlink()
    with pytest.raises(ValueError, match=r"`output_dir`: .*out has answers, but no items\.arrow\. Remove"):
        caption_folder.main([*arguments, "--prompt", "what is it?"])


def test_a_list_without_settings_is_made_again(model, tmp_path, monkeypatch):
    """It is of a run that was killed while its model was loaded, and may be of other inputs."""
    first, second = save_images(tmp_path / "first", 8), save_images(tmp_path / "second", 9)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(caption_folder, "load_answering_model", None)
        caption_folder.main(options(model, tmp_path / "out", first))
    assert (tmp_path / "out" / "items.arrow").exists()
    caption_folder.main(options(model, tmp_path / "out", second))
    names = [row["file"] for row in read(tmp_path / "out" / "captions.jsonl")]
    assert names == [f"{second}/{index:03}.png" for index in range(9)]


def test_a_parquet_file_with_damaged_numbers_of_rows_is_named(model, tmp_path):
    rows, path = [{"bytes": png(image), "path": None} for image in noise_images(3)], tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": rows}), path, row_group_size=2)
    path.write_bytes(path.read_bytes().replace(b"\x16\x06", b"\x16\x0a"))  # 3 rows in all become 5
    result = caption_folder.main(options(model, tmp_path / "out", path))
    (row,) = read(tmp_path / "out" / "captions.jsonl")
    assert result["broken"] == 1 and "rows, but it has 5" in row["error"]


def test_an_image_with_too_many_pixels_is_named(model, tmp_path):
    (tmp_path / "in").mkdir()
    for size in (40, 41):
        noise_images(1, size=size)[0].save(tmp_path / "in" / f"{size}.png")
    result = caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", max_pixels=1600))
    assert result == {"captioned": 1, "broken": 1}
    error = read(tmp_path / "out" / "captions.jsonl")[1]["error"]
    assert error.endswith("41.png' cannot be read: it has 41 x 41 pixels, more than `max_pixels`=1600 allows")


def test_what_is_no_regular_file_is_named_and_not_waited_for(model, tmp_path):
    (tmp_path / "in").mkdir()
    noise_images(1)[0].save(tmp_path / "in" / "a.png")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "in" / "d.png")
    for name in ("b.png", "c.tar", "e.parquet"):
        os.mkfifo(tmp_path / "in" / name)
    assert caption_folder.main(options(model, tmp_path / "out", tmp_path / "in")) == {"captioned": 1, "broken": 4}
    errors = {row["file"].rpartition("/")[2]: row.get("error") for row in read(tmp_path / "out" / "captions.jsonl")}
    assert "No such file" in errors["d.png"]
    for name in ("b.png", "c.tar", "e.parquet"):
        assert errors[name] == f"`inputs`: '{tmp_path}/in/{name}' is no regular file."
    assert caption_folder.main(options(model, tmp_path / "single", tmp_path / "in" / "b.png"))["broken"] == 1


def peak_memory(function, *arguments):
    """The largest number of bytes that Python allocated while the function ran."""
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
    assert peak_memory(caption_folder.load_items, tmp_path / "items.arrow", arguments, True) < 500_000
    items = caption_folder.load_items(tmp_path / "items.arrow", arguments, is_new=False)
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
