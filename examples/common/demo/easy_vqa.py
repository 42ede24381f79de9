"""easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA, MIT licence): one coloured shape in each image.

`easy-vqa` has captions such as "a blue triangle", `easy-vqa-questions` the original questions and answers.
"""

import io
import json
from collections import defaultdict
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image

from common.demo.cache import EASY_VQA, fetch_package, prepare_once
from common.demo.scenes import save_splits, with_article

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

RECIPE = 2  # of the cached folder; raise it with every change to images or captions


def load_easy_vqa() -> DatasetDict:
    """Loads splits "train" and "test" with columns `image` (RGB, 64 x 64) and `caption` (str)."""
    return load_from_disk(prepare_once(f"data/easy-vqa-v{RECIPE}", _write))


def load_easy_vqa_questions() -> DatasetDict:
    """Loads splits "train" and "test" with the columns of `easy_vqa_questions` and `answer` (str)."""
    splits = DatasetDict()
    for split in ("train", "test"):
        rows = [{**row, "answer": row["answers"][0]} for row in easy_vqa_questions(split)]
        # The file is in the order of the images. Its first few questions shall be about many images.
        splits[split] = Dataset.from_list(rows).shuffle(seed=0)
    return splits


def _write(folder: Path) -> None:
    splits = {}
    for split in ("train", "test"):
        data = _data_folder(split)
        captions = easy_vqa_captions(json.loads((data / "questions.json").read_text()))
        splits[split] = [
            {"image": (data / "images" / f"{index}.png").read_bytes(), "caption": caption}
            for index, caption in captions.items()
        ]
    # Version 1.0 has no image in both splits. Such an image would make the score meaningless.
    test_images = {_pixels(row["image"]) for row in splits["test"]}
    splits["train"] = [row for row in splits["train"] if _pixels(row["image"]) not in test_images]
    save_splits(folder, splits)


def _data_folder(split: str) -> Path:
    return fetch_package(EASY_VQA) / "easy_vqa" / "data" / split


def easy_vqa_captions(questions: list[tuple[str, str, int]]) -> dict[int, str]:
    """Derives a caption such as "a blue triangle" for each image index, in increasing order.

    `questions` are triples of question, answer and image index: ("is there not a red shape?", "yes", 7). About one
    image in ten is left out, because its questions leave its color or its shape open.
    """
    possible = defaultdict(lambda: [set(COLORS), set(SHAPES)])
    for question, answer, index in questions:
        words = set(question.rstrip("?").split())
        negated = bool(words & {"no", "not"})
        for options in possible[index]:
            in_question, in_answer = options & words, options & {answer}
            if in_answer:
                options &= in_answer
            elif in_question and answer in ("yes", "no") and (answer == "yes") == negated:
                options -= in_question
            elif in_question:
                options &= in_question
    return {
        index: with_article(" ".join((*colors, *shapes)))
        for index, (colors, shapes) in sorted(possible.items())
        if len(colors) == len(shapes) == 1
    }


def easy_vqa_questions(split: str) -> list[dict]:
    """Reads the questions about the images: 38,575 of the split "train", or 9,673 of "test".

    Rows are `{"id": index, "image": path, "question": text, "answers": [correct answer], "answer_type": type}`. The
    type is "yes/no", "color" or "shape". Raises a ValueError if there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`test_split` is {split!r}, but easy-vqa has ['test', 'train'].")
    folder = _data_folder(split)
    questions = json.loads((folder / "questions.json").read_text())
    types = dict.fromkeys(("yes", "no"), "yes/no") | dict.fromkeys(COLORS, "color") | dict.fromkeys(SHAPES, "shape")
    return [
        {
            "id": index,
            "image": str(folder / "images" / f"{image}.png"),
            "question": question,
            "answers": [answer],
            "answer_type": types[answer],
        }
        for index, (question, answer, image) in enumerate(questions)
    ]


def _pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
