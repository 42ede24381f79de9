"""Reads published benchmarks from their own files, with one function for each format.

A row of a caption benchmark is `{"id": int or str, "image" or "video": path, "captions": [str, …]}`. Rows of NoCaps
also have a `"domain"`. A row of a question benchmark is `{"id", "image", "question", "answers": [str, …],
"answer_type", "question_type"}`. Files for test servers have no captions or answers; then the list is empty.
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The arguments that each benchmark reads, in addition to `media_dir`.
CAPTION_BENCHMARKS = {
    "coco-karpathy": ("annotations", "test_split"),
    "nocaps": ("annotations",),
    "flickr30k": ("annotations", "test_split"),
    "msr-vtt": ("annotations", "test_split"),
    "msvd": ("annotations", "split_file"),
}
QUESTION_BENCHMARKS = {
    "vqav2": ("questions", "annotations"),
    "gqa": ("questions",),
    "ok-vqa": ("questions", "annotations"),
}

VIDEO_SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm", ".webp")


def caption_rows(
    benchmark: str, annotations: str | None, media_dir: str | None, split: str, split_file: str | None
) -> list[dict[str, Any]]:
    """Reads a caption benchmark. A ValueError names a bad file or folder, or an image that alone has no caption."""
    _check_folder(media_dir)
    if benchmark == "msr-vtt":
        rows = msr_vtt_rows(annotations, media_dir, split)
    elif benchmark == "msvd":
        rows = msvd_rows(annotations, media_dir, split_file)
    elif benchmark == "nocaps":
        rows = coco_rows(annotations, media_dir)
    else:
        rows = karpathy_rows(annotations, media_dir, split)
    if not rows:
        raise ValueError(f"`annotations`: {annotations} holds no rows.")
    without_captions = [row["id"] for row in rows if not row["captions"]]
    if without_captions and len(without_captions) < len(rows):
        raise ValueError(f"`annotations`: {annotations} holds no caption of {without_captions[0]!r}, but of others.")
    return rows


def question_rows(
    benchmark: str, questions: str | None, annotations: str | None, media_dir: str | None
) -> list[dict[str, Any]]:
    """Reads a question benchmark, with the same errors."""
    _check_folder(media_dir)
    rows = gqa_rows(questions, media_dir) if benchmark == "gqa" else vqa_rows(questions, annotations, media_dir)
    if not rows:
        raise ValueError(f"`questions`: {questions} holds no rows.")
    return rows


def karpathy_rows(annotations: str, media_dir: str, split: str) -> list[dict[str, Any]]:
    """Reads COCO (`dataset_coco.json`) or Flickr30k (`dataset_flickr30k.json`) with Karpathy's splits.

    COCO's images may lie in `val2014` and `train2014` below `media_dir`. Splits are train, restval, val and test. A
    split may also be a file in COCO's format.
    """
    with _published("annotations", annotations, "file of Karpathy's splits") as data:
        if "annotations" in data:
            return coco_rows(annotations, media_dir)
        images = data["images"]
        _check_split(split, {image["split"] for image in images}, annotations)
        return [
            {
                "id": image.get("cocoid", image["imgid"]),
                "image": _image(media_dir, image["filename"], image.get("filepath")),
                "captions": [sentence["raw"] for sentence in image["sentences"]],
            }
            for image in images
            if image["split"] == split
        ]


def coco_rows(annotations: str, media_dir: str) -> list[dict[str, Any]]:
    """Reads all images of a file in COCO's own format. Those without a file name are COCO's validation images."""
    with _published("annotations", annotations, "file of captions in COCO's format") as data:
        captions = defaultdict(list)
        for annotation in data.get("annotations", []):
            captions[annotation["image_id"]].append(annotation["caption"])
        rows = []
        for image in data["images"]:
            name = image.get("file_name") or f"COCO_val2014_{image['id']:012d}.jpg"
            row = {"id": image["id"], "image": _image(media_dir, name, "val2014"), "captions": captions[image["id"]]}
            rows.append(row | ({"domain": image["domain"]} if "domain" in image else {}))
        return rows


def msr_vtt_rows(annotations: str, media_dir: str, split: str) -> list[dict[str, Any]]:
    """Reads MSR-VTT: `train_val_videodatainfo.json` with the splits train and validate, `test_videodatainfo.json`."""
    with _published("annotations", annotations, "videodatainfo file of MSR-VTT") as data:
        captions = defaultdict(list)
        for sentence in data["sentences"]:
            captions[sentence["video_id"]].append(sentence["caption"])
        _check_split(split, {video["split"] for video in data["videos"]}, annotations)
        names = [video["video_id"] for video in data["videos"] if video["split"] == split]
        return _video_rows(media_dir, names, captions)


def msvd_rows(annotations: str, media_dir: str, split_file: str | None) -> list[dict[str, Any]]:
    """Reads MSVD's `AllVideoDescriptions.txt` or the English captions of its .csv, of the videos in `split_file`."""
    captions = defaultdict(list)
    for name, caption in _msvd_captions(annotations):
        captions[name].append(caption)
    names = list(captions)
    if split_file:
        names = [line.split()[0] for line in _read_text("split_file", split_file).splitlines() if line.strip()]
    for name in names:
        if name not in captions:
            raise ValueError(f"`split_file`: {split_file} names {name!r}, but {annotations} has no caption of it.")
    return _video_rows(media_dir, names, captions)


def _msvd_captions(path: str) -> list[tuple[str, str]]:
    text = _read_text("annotations", path)
    if path.endswith(".csv"):
        try:
            return [
                (f"{line['VideoID']}_{line['Start']}_{line['End']}", line["Description"].strip())
                for line in csv.DictReader(io.StringIO(text, newline=""))  # a caption may hold a line break
                if line["Language"] == "English" and line["Description"].strip()
            ]
        except (KeyError, AttributeError) as error:
            raise ValueError(f"`annotations`: {path} is no corpus of MSVD: it lacks {error}.") from error
    pairs = [line.strip().partition(" ") for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if not pairs or not all(re.search(r"_\d+_\d+$", name) and caption for name, _, caption in pairs):
        raise ValueError(f"`annotations`: {path} is no list of MSVD's videos and captions, 'ID_START_END caption'.")
    return [(name, caption) for name, _, caption in pairs]


def vqa_rows(questions: str, annotations: str | None, media_dir: str) -> list[dict[str, Any]]:
    """Reads VQAv2 or OK-VQA. A test split has no annotations. Images may lie in `val2014` or the like."""
    annotated = {}
    if annotations:
        with _published("annotations", annotations, "file of VQAv2's annotations") as data:
            types = data.get("question_types", {})  # in OK-VQA, names of the numbers below
            for entry in data["annotations"]:
                annotated[entry["question_id"]] = {
                    "answers": [answer["answer"] for answer in entry["answers"]],
                    "answer_type": entry["answer_type"],
                    "question_type": types.get(entry["question_type"], entry["question_type"]),
                }
    with _published("questions", questions, "file of VQAv2's questions") as data:
        subset = data["data_subtype"].replace("-dev", "")  # test-dev is a part of test
        rows = []
        for question in data["questions"]:
            number, name = question["question_id"], f"COCO_{subset}_{question['image_id']:012d}.jpg"
            if annotations and number not in annotated:
                problem = f"has no answers to the question {number} of {questions}"
                raise ValueError(f"`annotations`: {annotations} {problem}.")
            row = {"id": number, "image": _image(media_dir, name, subset), "question": question["question"]}
            rows.append(row | annotated.get(number, {"answers": []}))
        return rows


def gqa_rows(questions: str, media_dir: str) -> list[dict[str, Any]]:
    """Reads GQA, e.g. `testdev_balanced_questions.json`. Answer types are the official tool's, open and binary."""
    with _published("questions", questions, "file of GQA's questions") as data:
        rows = []
        for name, question in data.items():
            row = {"id": name, "image": _image(media_dir, f"{question['imageId']}.jpg", "images")}
            row |= {"question": question["question"], "answers": []}
            if "answer" in question:
                structure = question["types"]["structural"]
                row |= {"answers": [question["answer"]], "question_type": structure}
                row["answer_type"] = "open" if structure == "query" else "binary"
            rows.append(row)
        return rows


def clean_question(question: str) -> str:
    """Cleans a question as the original does: lower case, without ``.!"()*#:;~``, 50 words.

    Source: `BlipQuestionProcessor` of the original (lavis/processors/blip_processors.py). The original also truncates
    the prompt to 32 tokens, and with it long questions. That is not done here.
    """
    words = re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ").split(" ")
    return " ".join(words[:50])


def _check_folder(media_dir: str | None) -> None:
    if not media_dir:
        raise ValueError("`media_dir` is needed: the folder of the benchmark's images or videos.")
    if not Path(media_dir).is_dir():
        raise ValueError(f"`media_dir`: {media_dir} is no folder.")


def _read_text(argument: str, path: str | None) -> str:
    if not path:
        raise ValueError(f"`{argument}` is needed: a file of the benchmark.")
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # a file may begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`{argument}`: {path} cannot be read: {error}") from error


@contextmanager
def _published(argument: str, path: str | None, description: str) -> Iterator[Any]:
    """Reads a JSON file. An entry that is missed while the file is open becomes a `ValueError` that names the file."""
    text = _read_text(argument, path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{argument}`: {path} is no {description}, as it is no JSON: {error}") from error
    try:
        yield data
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"`{argument}`: {path} is no {description}: {problem}.") from error


def _check_split(split: str, splits: set[str], path: str) -> None:
    if split not in splits:
        raise ValueError(f"`test_split` is {split!r}, but {path} has {sorted(splits)}.")


def _image(media_dir: str, name: str, subfolder: str | None = None) -> str:
    """Path of an image in `media_dir` or in its `subfolder`."""
    candidates = [Path(media_dir, name), *([Path(media_dir, subfolder, name)] if subfolder else [])]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(f"`media_dir`: there is no {' or '.join(map(str, candidates))}.")
    return str(found)


def _video_rows(media_dir: str, names: list[str], captions: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Rows of the videos with these names, without suffix, in `media_dir`."""
    videos = {path.stem: str(path) for path in Path(media_dir).iterdir() if path.suffix.lower() in VIDEO_SUFFIXES}
    for name in names:
        if name not in videos:
            raise ValueError(f"`media_dir`: {media_dir} holds no video {name} ({', '.join(VIDEO_SUFFIXES)}).")
    return [{"id": name, "video": videos[name], "captions": captions[name]} for name in names]
