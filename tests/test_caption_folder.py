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
from collections import Counter

import caption_folder
import pyarrow as pa
import pytest
from caption_folder_items import list_items
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from pyarrow import csv
from pyarrow import parquet as pq

from common.arguments import DataArguments
from common.data.loading import load_datasets
from common.data.rows import open_media
from common.evaluation.answer_folder import join_answers, read_lines
from modeling_evlgen import EVLGenForConditionalGeneration, explain
from processing_evlgen import EVLGenProcessor

from .evaluation import animate
from .helpers import ROOT, generate_new, noise_images, save_animation, tiny_model
from .training import flags, png, save_captioner, start

BROKEN = b"no image"
SHARD = [f"shard.tar/x/{name}.png" for name in (1, 2, 0)]  # of `save_mixed`
SCRIPT = ROOT / "examples" / "caption_folder.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("model"), tiny_model())


def save_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def save_parquet(path, column, **options):
    pq.write_table(pa.table({"image": column}), path, **options)


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
    save_parquet(folder / "z.parquet", [{"bytes": png(image), "path": None} for image in images[5:]], row_group_size=2)
    names = ["a.png", "b.png", "broken.png", "z.parquet/0", "z.parquet/1", "z.parquet/2", "deep/c.jpg"]
    names += [f"deep/shard.tar/x/{name}.png" for name in (1, 2, 0)]
    return names


def save_images(folder, count):
    folder.mkdir()
    for index, image in enumerate(noise_images(count, size=32)):
        image.save(folder / f"{index:03}.png")
    (folder / "007.png").write_bytes(BROKEN)
    return folder


def options(model, output, /, *inputs, **changes):
    given = {"model": model, "output_dir": output, "batch_size": 4, "max_new_tokens": 6, **changes}
    return flags(**given, **({"inputs": list(inputs)} if inputs else {}))


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(model, folder, *inputs, **changes):
    """Captions `folder`/in, or other inputs, into `folder`/out; returns the numbers of items and the rows."""
    result = caption_folder.main(options(model, folder / "out", *(inputs or [folder / "in"]), **changes))
    return result, read(folder / "out" / f"captions.{changes.get('format', 'jsonl')}")


def caption(model, **inputs):
    """The model's caption of a single image or video."""
    model, processor = EVLGenForConditionalGeneration.from_pretrained(model), EVLGenProcessor.from_pretrained(model)
    (new,) = generate_new(model, processor(**inputs), max_new_tokens=6)
    return processor.decode(new, skip_special_tokens=True).strip()


def test_everything_below_a_folder_is_captioned(model, tmp_path, capsys):
    """Images, a `.tar` and a `.parquet` come in the order of names. Unreadable images are named and counted."""
    names = save_mixed(tmp_path / "in")
    result, rows = run(model, tmp_path, num_workers=1)
    assert [row["file_name"] for row in rows] == names and result == {"captioned": 8, "broken": 2}
    broken = {row["file_name"]: row["error"] for row in rows if row["caption"] is None}
    assert broken.keys() == {names[2], names[8]} == {row["file_name"] for row in rows if "error" in row}
    assert all(name in error and "cannot be read" in error for name, error in broken.items())
    for index, image in ((0, 1), (1, 0), (7, 3), (9, 4), (3, 5), (5, 7)):
        assert rows[index]["caption"] == caption(model, images=noise_images(8)[image])
    assert len({row["caption"] for row in rows}) > 5
    printed = capsys.readouterr()
    assert f"2 could not be read and have an `error` there: {names[2]}, {names[8]}\n" in printed.out
    assert "Left out: 1 .txt." in printed.out and printed.err.count("Left out: ") == 2


@pytest.mark.parametrize("place", ["metadata.csv", "table"])
def test_the_captions_of_a_folder_are_a_data_set_to_train_on(place, model, tmp_path):
    folder = save_images(tmp_path / "in", 9)
    shutil.move(folder / "003.png", (folder / "deep").mkdir() or folder / "deep" / "c, d.png")
    assert caption_folder.main(options(model, tmp_path / "out", folder, format="csv")) == {"captioned": 8, "broken": 1}
    table = tmp_path / "out" / "captions.csv"
    given = {"dataset": "csv", "data_files": {"train": str(table)}}
    given |= {"image_column": "file_name", "image_root": str(folder)}
    if place == "metadata.csv":
        shutil.copy(table, folder / "metadata.csv")
        given = {"dataset": str(folder)}
    data_args = DataArguments(**given, test_size=2)
    train, test = load_datasets(data_args, seed=0)
    rows = {row["caption"]: open_media(row, data_args) for split in (train, test) for row in split}
    assert len(train) == 6 and len(rows) == 8
    assert all(caption(model, images=image) == text for text, image in rows.items())


def test_txt_files_stand_beside_their_images_or_in_the_output_folder(model, tmp_path, capsys):
    names = save_mixed(tmp_path / "in")
    (tmp_path / "in" / "b.txt").write_text("my own words")
    _, rows = run(model, tmp_path, txt_files="beside")
    captions = {row["file_name"]: f"{row['caption']}\n" for row in rows if row["caption"] is not None}
    assert "6 captions have no .txt file, since a file with another text was there, or" in capsys.readouterr().out
    texts = {path.stem: path.read_text() for path in (tmp_path / "in").rglob("*.txt")}
    own = {"b": "my own words", "notes": "no image"}
    assert texts == {"a": captions["a.png"], "c": captions["deep/c.jpg"], **own}
    run(model, tmp_path, txt_files="output")
    top = tmp_path / "out" / "txt"
    texts = {str(path.relative_to(top)): path.read_text() for path in top.rglob("*.txt")}
    assert texts == {os.path.splitext(name)[0] + ".txt": captions[name] for name in names if name in captions}
    assert "no .txt file" not in capsys.readouterr().out


@pytest.mark.attack
def test_names_do_not_leave_the_output_folder_and_images_of_one_name_share_no_text(model, tmp_path, capsys):
    images = noise_images(4)
    save_tar(tmp_path / "in" / "0.tar", {"../../../evil.png": png(images[0]), "/x.png": png(images[1])})
    for image, suffix in zip(images[2:], ("jpg", "png"), strict=True):
        image.save(tmp_path / "in" / f"a.{suffix}")
    _, rows = run(model, tmp_path, txt_files="output")
    assert not list(tmp_path.rglob("evil.txt"))
    texts = {path.name: path.read_text() for path in (tmp_path / "out" / "txt").rglob("*.txt")}
    assert texts == {"x.txt": f"{rows[1]['caption']}\n", "a.txt": f"{rows[2]['caption']}\n"}
    assert "2 captions have no .txt file" in capsys.readouterr().out


def test_patterns_in_quotes_name_files_and_folders(model, tmp_path, monkeypatch):
    save_mixed(tmp_path / "in")
    shutil.copytree(tmp_path / "in" / "deep", tmp_path / "in" / "de[e]p")
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "in/*.png": ["a.png", "b.png", "broken.png"],
        "in/**/*.jpg": ["de[e]p/c.jpg", "deep/c.jpg"],
        "in/d*p/c*": ["de[e]p/c.jpg", "deep/c.jpg"],
        "in/[an]*": ["a.png"],  # and notes.txt
        "in/de[e]p": ["c.jpg", *SHARD],
        "in/de*": [f"{folder}/{name}" for folder in ("de[e]p", "deep") for name in ("c.jpg", *SHARD)],
        "in/d**": [f"{folder}/{name}" for folder in ("de[e]p", "deep") for name in ("c.jpg", *SHARD)],
    }.items():
        found = list(list_items([pattern], "image", "image", Counter()))
        assert [item["file_name"] for item in found] == names, pattern
    names = [item["file_name"] for item in list_items(["in/a.png", "in/deep/c.jpg"], "image", "image", Counter())]
    assert names == ["a.png", "deep/c.jpg"]
    found = [item["file_name"] for item in list_items(["in/**"], "image", "image", Counter())]
    assert sorted(found) == sorted(set(found)) and len(found) == 14
    with pytest.raises(ValueError, match=r"`inputs`: there is no in/\*\.gif"):
        list(list_items(["in/*.gif"], "image", "image", Counter()))


@pytest.mark.attack
def test_a_page_shows_images_and_captions_and_runs_nothing_that_they_hold(model, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for index, image in enumerate(noise_images(5)):
        image.save(tmp_path / "in" / f"{index}<img src=x>.png")
    (tmp_path / "in" / "2<img src=x>.png").write_bytes(BROKEN)
    said = "<script>alert(1)</script> & {braces}"
    answer = {"text": said}
    monkeypatch.setattr(
        "common.evaluation.answers.generate_answers", lambda model, batch, **_: [answer] * len(batch["input_ids"])
    )
    run(model, tmp_path, html_images=3)
    page = (tmp_path / "out" / "captions.html").read_text()
    assert page.count("<figure>") == page.count("<img") == 3 and "<script" not in page
    assert (
        page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; {braces}")
        == page.count("data:image/jpeg;base64,")
        == 2
    )
    assert "cannot be read" in page and "4&lt;img src=x&gt;.png" in page and "1&lt;img" not in page
    (tmp_path / "out" / "captions.html").unlink()
    run(model, tmp_path, html_images=0)
    assert not (tmp_path / "out" / "captions.html").exists()
    shutil.rmtree(tmp_path / "out")
    answer |= {"least_certain": said, "probability": 0.1, "confidence": 0.1, "evidence": 1.0}
    run(model, tmp_path, evidence="true")
    page = (tmp_path / "out" / "captions.html").read_text()
    assert page.count("&lt;script&gt;") == 2 * 4 and "<script" not in page and page.count("<img") == 5


def test_tiles_and_tokens_can_be_chosen(model, tmp_path):
    elastic = EVLGenForConditionalGeneration.from_pretrained(model)
    elastic.config.image_token_range = [2, 17]
    save_captioner(tmp_path / "model", elastic)
    (tmp_path / "in").mkdir()
    images = [*noise_images(2, size=64), *noise_images(1, size=20)]
    for index, image in enumerate(images):
        image.save(tmp_path / "in" / f"{index}.png")
    changes = {"max_tiles": 4, "num_image_tokens": 6}
    _, rows = run(tmp_path / "model", tmp_path, **changes)
    for row, image in zip(rows, images, strict=True):
        assert row["caption"] == caption(tmp_path / "model", images=image, **changes)
    with pytest.raises(ValueError, match="other settings: num_image_tokens was 6 and is 11"):
        run(tmp_path / "model", tmp_path, max_tiles=4)
    with pytest.raises(ValueError, match="inputs was"):
        run(tmp_path / "model", tmp_path, tmp_path / "in" / "0.png", **changes)


def test_a_prompt_is_answered_with_beams_into_parquet(model, tmp_path):
    save_mixed(tmp_path / "in")
    changes = {"prompt": "what is it?", "num_beams": 2}
    _, rows = run(model, tmp_path, **changes, format="parquet")
    assert [row["caption"] is None for row in rows] == [row["error"] is not None for row in rows]
    other, same = run(model, tmp_path, **changes)  # of the same answers
    assert other == {"captioned": 8, "broken": 2} and [row["caption"] for row in same] == [
        row["caption"] for row in rows
    ]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["prompt"], settings["num_beams"]) == ("what is it?", 2)


def test_videos_are_captioned(model, tmp_path):
    for name, brightness in (("a", 0), ("b", 200)):
        animate(tmp_path / "in" / f"{name}.webp", brightness)
    save_tar(tmp_path / "in" / "c.tar", {"1.webp": (tmp_path / "in" / "b.webp").read_bytes(), "2.mp4": BROKEN})
    result, rows = run(model, tmp_path, media="video", num_frames=3)
    assert result == {"captioned": 3, "broken": 1} and "c.tar/2.mp4" in rows[3]["error"]
    assert (
        rows[1]["caption"]
        == rows[2]["caption"]
        == caption(model, videos=str(tmp_path / "in" / "b.webp"), num_frames=3)
    )
    assert rows[0]["caption"] != rows[1]["caption"]
    shutil.rmtree(tmp_path / "out")
    _, rows = run(model, tmp_path, media="video", fps=5, batch_size=1)
    assert rows[1]["caption"] == caption(model, videos=str(tmp_path / "in" / "b.webp"), fps=5)


@pytest.mark.parametrize("media", ["image", "video"])
def test_what_is_too_large_is_named_and_the_others_are_captioned(media, model, tmp_path):
    animate(tmp_path / "in" / "a.webp", 0)
    if media == "image":
        noise_images(1, size=41)[0].save(tmp_path / "in" / "b.png")
    else:
        save_animation(tmp_path / "in" / "b.webp", noise_images(520, size=8), duration=10)
    limits = {"image": {"max_pixels": 1600}, "video": {"fps": 100}}[media]
    result, rows = run(model, tmp_path, media=media, **limits)
    assert result == {"captioned": 1, "broken": 1}
    assert {"image": "`max_pixels`=1600", "video": "more than 512 frames"}[media] in rows[1]["error"]


@pytest.mark.parametrize("kind", ["bytes", "path", "datasets"])
def test_columns_of_every_type_are_read(kind, model, tmp_path):
    images = noise_images(2)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    column = paths if kind == "path" else [png(image) for image in images]
    rows = Dataset.from_dict({"image": images}, Features({"image": ImageColumn()}))
    if kind != "datasets":
        value = Value("string" if kind == "path" else "binary")
        rows = Dataset.from_dict({"image": [*column, None]}).cast_column("image", value)
    rows.to_parquet(tmp_path / "shard.parquet")
    _, rows = run(model, tmp_path, tmp_path / "shard.parquet", column="image")
    assert [row["caption"] for row in rows[:2]] == [caption(model, images=image) for image in images]
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
    result, rows = run(model, tmp_path)
    rows = {row["file_name"]: row for row in rows}
    whole = {"1.tar/0.png", "1.tar/1.png", "2.tar/0.png"} | ({"1.tar/2.png"} if cut == "end" else set())
    assert {name for name, row in rows.items() if row["caption"] is not None} == whole
    partial = {"1.tar/2.png"} if cut == "member" else set()
    assert rows.keys() == whole | {"1.tar", "3.tar", "4.parquet"} | partial
    assert result == {"captioned": len(whole), "broken": 3 + len(partial)}


def test_names_that_are_not_utf8_are_escaped_and_links_are_counted(model, tmp_path, capsys):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder + b"/link")
    for name, data in ((b"\xff.png", png(noise_images(1)[0])), (b"\xfe.png", BROKEN)):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    _, rows = run(model, tmp_path)
    assert "Left out: 1 links to folders." in capsys.readouterr().out
    assert [row["file_name"] for row in rows] == ["\\xfe.png", "\\xff.png"]
    assert "error" in rows[0] and rows[1]["caption"] == caption(model, images=noise_images(1))


def test_a_killed_run_is_resumed(model, tmp_path, monkeypatch):
    folder = save_images(tmp_path / "in", 90)
    changes = {"batch_size": 3, "num_beams": 2}
    caption_folder.main(options(model, tmp_path / "unbroken", folder, **changes))
    broken = tmp_path / "broken"
    part = broken / "answers.part-0.jsonl"
    process = start(SCRIPT, options(model, broken, folder, **changes), start_new_session=True)
    deadline = time.time() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 12):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="another run writes to "):
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
    assert resumed[1]["caption"] == "from before" != unbroken[1]["caption"]
    unbroken[1]["caption"] = "from before"
    assert resumed == unbroken and len(resumed) == 90 and "error" in resumed[7]
    names = {"answers.jsonl", "captions.html", "captions.jsonl", "items.arrow", "settings.json"}
    assert {path.name for path in broken.iterdir()} == names


def test_two_processes_caption_as_one_and_refuse_a_folder_that_they_do_not_share(model, tmp_path):
    """Each process has a working directory of its own, as machines with disks of their own have folders."""
    names = save_mixed(tmp_path / "in")
    one = options(model, tmp_path / "one", tmp_path / "in", batch_size=3)
    caption_folder.main(one)
    two = options(model, tmp_path / "two", tmp_path / "in", batch_size=3)
    (tmp_path / "script.py").write_text(f"""
import os, pretrain, caption_folder
os.makedirs({str(tmp_path)!r} + "/" + os.environ["RANK"])
os.chdir({str(tmp_path)!r} + "/" + os.environ["RANK"])
for main, given in (pretrain.main, ["--output_dir", "out"]), (caption_folder.main, ["--inputs", "images"]):
    try:
        main(given)
    except ValueError as error:
        print(error)
caption_folder.main({two})
""")
    process = start(tmp_path / "script.py", [], two=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    for folder in ("out", "outputs/captions"):
        message = f"`output_dir`: {folder} must be one folder for all processes, but 1 of 2 see another one"
        assert output.count(message) == 2  # on both
    assert "6/6" in progress and "10/10 [" in progress  # the share of the main process; all that it writes
    rows = read(tmp_path / "two" / "captions.jsonl")
    assert rows == read(tmp_path / "one" / "captions.jsonl") and [row["file_name"] for row in rows] == names
    answers = [entry["id"] for _, entry in read_lines(tmp_path / "two" / "answers.jsonl")]
    assert answers == list(range(10))


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ([], {}, "`inputs` is needed"),
        (["in/empty"], {}, "there is no image in"),
        (["in/notes.txt"], {}, r"`inputs`? .*notes\.txt is neither"),
        (["in"], {"column": "photo"}, r"`column` is 'photo', but .*z\.parquet has \['image'\]"),
        (["in"], {"num_frames": 0}, "`num_frames` must .* 0"),
        (["in"], {"prompt": "a long prompt " * 30}, "at most 128"),
        (["in"], {"max_new_tokens": 120}, "`max_new_tokens` is 120"),
    ],
)
def test_an_error_in_the_settings_stops_at_once(inputs, changes, message, model, tmp_path):
    save_mixed(tmp_path / "in")
    (tmp_path / "in" / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        caption_folder.main(options(model, tmp_path / "out", *[tmp_path / name for name in inputs], **changes))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_file_that_vanishes_is_one_that_cannot_be_read(model, tmp_path, monkeypatch):
    names, load = save_mixed(tmp_path / "in"), caption_folder.load_answering_model

    def vanish(*given):
        shutil.rmtree(tmp_path / "in" / "deep")
        (tmp_path / "in" / "z.parquet").unlink()
        return load(*given)

    monkeypatch.setattr(caption_folder, "load_answering_model", vanish)  # after the items are listed
    result, rows = run(model, tmp_path)
    assert result == {"captioned": 2, "broken": 8} and [row["file_name"] for row in rows] == names


def test_a_replaced_image_is_captioned_again(model, tmp_path, capsys):
    folder, output = save_images(tmp_path / "in", 9), tmp_path / "out"
    run(model, tmp_path)
    lines = (output / "answers.jsonl").read_text().splitlines(keepends=True)
    lines[3] = '{"id": 3, "text": "from before"}\n'
    (output / "answers.jsonl").write_text("".join(lines))
    fresh = noise_images(9, size=30)
    for index in (2, 7):  # 007.png was broken
        fresh[index].save(folder / f"{index:03}.png")
    (folder / "005.png").unlink()
    result, rows = run(model, tmp_path)
    assert result == {"captioned": 9, "broken": 0}
    names = [f"00{index}.png" for index in (2, 7)]
    assert f"2 files changed and are captioned again: {', '.join(names)}\n" in capsys.readouterr().out
    assert [rows[index]["caption"] for index in (2, 7)] == [caption(model, images=fresh[index]) for index in (2, 7)]
    assert rows[3]["caption"] == "from before" and rows[5]["caption"]
    assert run(model, tmp_path)[1] == rows and "changed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deep/shard.tar", "z.parquet"])
def test_a_replaced_shard_is_refused(name, model, tmp_path):
    """Its items may be at other positions. The answers are kept."""
    save_mixed(tmp_path / "in")
    run(model, tmp_path)
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    with (tmp_path / "in" / name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=rf"`inputs`: .*{name} changed"):
        run(model, tmp_path)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before


def test_answers_of_an_unknown_list_are_refused(model, tmp_path):
    save_images(tmp_path / "in", 8)
    run(model, tmp_path)
    items = tmp_path / "out" / "items.arrow"
    items.write_bytes(b"")
    with pytest.raises(ValueError, match=r"`output_dir`: .*items\.arrow is broken"):
        run(model, tmp_path)
    items.unlink()
    with pytest.raises(ValueError, match=r"`output_dir`: .*no items\.arrow"):
        run(model, tmp_path, prompt="what is it?")


def peak_memory(function, *arguments):
    """The largest number of bytes that Python allocated while the function ran."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_items_nor_captions_are_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("caption_folder_outputs.ROWS", 100)
    save_tar(tmp_path / "many.tar", {f"{index:080}.png": b"" for index in range(3000)})
    arguments = caption_folder.FolderArguments(inputs=[str(tmp_path / "many.tar")], column="image")
    assert peak_memory(caption_folder.load_items, tmp_path / "items.arrow", arguments, True) < 500_000
    items = caption_folder.load_items(tmp_path / "items.arrow", arguments, is_new=False)
    assert items["file_name"][2999] == f"many.tar/{2999:080}.png"

    for part in range(2):
        lines = [json.dumps({"id": index, "text": f"{index} " * 300}) + "\n" for index in range(part, 3000, 2)]
        (tmp_path / f"answers.part-{part}.jsonl").write_text("".join(lines))
    size = sum(path.stat().st_size for path in tmp_path.glob("answers.part-*"))
    assert size > 4_000_000
    assert peak_memory(join_answers, tmp_path, range(3000)) < 500_000
    for kind in ("jsonl", "parquet"):
        assert peak_memory(caption_folder.write_captions, items, tmp_path, kind) < 1_500_000
        rows = read(tmp_path / f"captions.{kind}")
        assert [row["caption"] for row in rows] == [f"{index} " * 300 for index in range(3000)]


def test_evidence_names_the_least_certain_word_and_the_page_starts_with_it(model, tmp_path, capsys):
    save_mixed(tmp_path / "in")
    given = {"evidence": "true", "html_images": 4, "batch_size": 3}
    tables = {}
    for kind in ("jsonl", "csv", "parquet"):  # the later ones of the same answers
        caption_folder.main(options(model, tmp_path / "out", tmp_path / "in", format=kind, **given))
        path = tmp_path / "out" / f"captions.{kind}"
        rows = csv.read_csv(path).to_pylist() if kind == "csv" else read(path)
        tables[kind] = [row for row in rows if row.get("confidence") is not None]
    assert tables["jsonl"] == tables["csv"] == [row for row in tables["parquet"] if row.pop("error") is None]
    good = tables["jsonl"]  # broken images and empty captions have no probability
    captioner, processor = (part.from_pretrained(model) for part in (EVLGenForConditionalGeneration, EVLGenProcessor))
    for row in good[:2]:
        given = {"do_sample": False, "max_new_tokens": 6, "steps": 0}
        words = explain(captioner, processor, str(tmp_path / "in" / row["file_name"]), **given)
        least = min(words, key=lambda word: word.confidence)
        assert row["least_certain"] == least.word
        for name in ("probability", "confidence"):
            assert row[name] == pytest.approx(getattr(least, name), rel=1e-3)
        assert row["evidence"] == pytest.approx(least.evidence, abs=1e-3)
    page = (tmp_path / "out" / "captions.html").read_text()
    doubtful = sorted(good, key=lambda row: row["confidence"])[:4]
    places = [page.index(f"<small>{row['file_name']}<br>{row['least_certain']}: ") for row in doubtful]
    assert page.count("<figure>") == 4 and places == sorted(places)
    assert "A caption took" in capsys.readouterr().out
    with pytest.raises(ValueError, match="evidence was True and is None"):
        run(model, tmp_path)
