"""crowded-scenes: 1 to 8 small OpenMoji drawings in a large image, with captions in reading order and questions.

The drawings stand in rows. The caption of two rows is "an owl and a crab above a bus". Drawings have very different
sizes, so a view of 224 x 224 pixels shows some of them only as a few pixels. The test split shows only combinations
that contain a pair of things that training never shows together.

The drawings and their licence are those of `scenes.py`.
"""

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    NamedSplit,
    Value,
    concatenate_datasets,
    load_from_disk,
)
from PIL import Image as PILImage

from common.demo.cache import prepare_once
from common.demo.scenes import CONCEPTS as DEMO_CONCEPTS
from common.demo.scenes import HELD_OUT_STEPS, Box, rasterise, with_article

CONCEPTS = (
    *DEMO_CONCEPTS,
    *("penguin", "octopus", "turtle", "butterfly", "elephant", "zebra", "camel", "whale", "lobster", "duck", "swan"),
    *("parrot", "peacock", "hedgehog", "strawberry", "watermelon", "carrot", "mushroom", "bicycle", "helicopter"),
    *("umbrella", "violin", "trumpet", "cactus", "crown", "candle"),
)
NUMBERS = ("zero", "one", "two", "three", "four")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

SIZE = 448  # height and width of a scene in pixels
DRAWING_SIZES = (12, 90)  # smallest and largest longer side of a drawing, in pixels
MAX_DRAWINGS = 8
SPLITS = {"train": 2400, "test": 200}  # scenes

RECIPE = 1  # of the cached folder; raise it with every change to images or texts


def load_crowded_scenes() -> DatasetDict:
    """Loads splits "train" and "test" with a row for each scene.

    The columns are `image` (RGB, 448 x 448), `caption` (str) and `questions`, a list of dicts with the keys `kind`
    ("left of", "how many" or "corner"), `question` and `answer` (str).
    """
    return load_from_disk(prepare_once(f"data/crowded-scenes-{SIZE}-textured-v{RECIPE}", _write))


def load_crowded_questions() -> DatasetDict:
    """Loads the same scenes with lists `question` and `answer`. First comes the caption, with an empty question."""
    splits = DatasetDict()
    for name, split in load_crowded_scenes().items():
        asked = (
            [{"question": "", "answer": row["caption"]}, *row["questions"]] for row in split.remove_columns("image")
        )
        lists = [{key: [text[key] for text in texts] for key in ("question", "answer")} for texts in asked]
        splits[name] = concatenate_datasets([split.select_columns("image"), Dataset.from_list(lists)], axis=1)
    return splits


def _write(folder: Path) -> None:
    text = Value("string")
    questions_type = List({"kind": text, "question": text, "answer": text})
    features = Features({"image": Image(), "caption": text, "questions": questions_type})
    splits = DatasetDict()
    for split in SPLITS:
        options = {"features": features, "cache_dir": str(folder.parent / "generated"), "split": NamedSplit(split)}
        splits[split] = Dataset.from_generator(_rows, gen_kwargs={"split": split}, **options)
    splits.save_to_disk(folder)


def _rows(split: str) -> Iterator[dict[str, Any]]:
    for scene, (image, rows, _) in enumerate(draw_crowds(split, SPLITS[split])):
        yield {"image": {"bytes": image}, "caption": caption(rows), "questions": questions(rows, scene)}


def draw_crowds(split: str, count: int) -> Iterator[tuple[bytes, list[list[str]], list[Box]]]:
    """Draws the first scenes of a split, the same in every run.

    Each is PNG bytes, the things of each row of drawings, and the boxes of all in reading order.
    """
    seed = ("train", "test").index(split)
    # One generator draws what is shown, and another one how. The 1 is part of the seed of all published scenes.
    layouts, pixels = np.random.default_rng((seed, 0)), np.random.default_rng((seed, SIZE, 1))
    for _ in range(count):
        rows = draw_layout(layouts, held_out=split == "test")
        image = io.BytesIO()
        scene, boxes = draw_crowd([[rasterise(thing) for thing in row] for row in rows], pixels)
        scene.save(image, format="PNG")
        yield image.getvalue(), rows, boxes


def draw_layout(rng: np.random.Generator, held_out: bool) -> list[list[str]]:
    """Draws the things of each row: 1 to 8 in all, in rows of 1 to 4. One in four scenes shows a thing twice."""
    number = int(rng.integers(1, MAX_DRAWINGS, endpoint=True))
    twins = number > 2 and rng.random() < 0.25
    while True:
        concepts = rng.choice(len(CONCEPTS), number, replace=False)
        if twins:
            concepts[-1] = concepts[0]
            concepts = rng.permutation(concepts)
        distances = np.unique(np.subtract.outer(concepts, concepts) % len(CONCEPTS))
        if number == 1 or held_out == bool(np.isin(distances, HELD_OUT_STEPS).any()):
            break
    lengths = []
    while sum(lengths) < number:
        lengths.append(min(int(rng.integers(1, 4, endpoint=True)), number - sum(lengths)))
    ends = np.cumsum(lengths).tolist()
    return [[CONCEPTS[i] for i in concepts[end - length : end]] for length, end in zip(lengths, ends, strict=True)]


def draw_crowd(rows: list[list[PILImage.Image]], rng: np.random.Generator) -> tuple[PILImage.Image, list[Box]]:
    """Draws rows of drawings. Sizes, places and directions of the drawings are random; no two of them touch."""
    scene, boxes = PILImage.fromarray(draw_background(rng)), []
    height = min(SIZE // len(rows), 2 * DRAWING_SIZES[1])
    top = rng.integers(0, SIZE - height * len(rows), endpoint=True)
    for row, drawings in enumerate(rows):
        width = SIZE // len(drawings)
        for column, drawing in enumerate(drawings):
            # Small and large drawings are equally frequent on a logarithmic scale.
            longest = min(np.exp(rng.uniform(*np.log(DRAWING_SIZES))), 0.9 * min(width, height))
            scale = longest / max(drawing.size)
            sides = [max(1, round(side * scale)) for side in drawing.size]
            drawing = drawing.resize(sides, PILImage.Resampling.LANCZOS)
            if rng.random() < 0.5:
                drawing = drawing.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
            left = int(column * width + rng.integers(0, width - sides[0], endpoint=True))
            upper = int(top + row * height + rng.integers(0, height - sides[1], endpoint=True))
            scene.paste(drawing, (left, upper), mask=drawing)
            boxes.append((left, upper, left + sides[0], upper + sides[1]))
    return scene, boxes


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draws a pale texture of coloured spots of many sizes, as uint8 of shape (448, 448, 3)."""
    background = np.broadcast_to(rng.integers(190, 256, size=3).astype(np.float32), (SIZE, SIZE, 3)).copy()
    for spots in (4, 12, 36, 108):  # along each side
        noise = PILImage.fromarray(rng.integers(0, 256, (spots, spots, 3), dtype=np.uint8))
        background += np.asarray(noise.resize((SIZE, SIZE), PILImage.Resampling.BICUBIC), np.float32) / 6 - 21
    return background.clip(0, 255).astype(np.uint8)


def caption(rows: list[list[str]]) -> str:
    """The caption in reading order: "an owl, a crab and a frog above a bus"."""
    return " above ".join(_enumerate([with_article(concept) for concept in row]) for row in rows)


def questions(rows: list[list[str]], scene: int) -> list[dict[str, str]]:
    """Draws a question of each kind, with its answer. A scene without neighbours has none of "left of"."""
    rng = np.random.default_rng((scene, len(rows)))
    drawings = [concept for row in rows for concept in row]
    once = [concept for concept in drawings if drawings.count(concept) == 1]
    pairs = [pair for row in rows for pair in pairwise(row) if pair[1] in once]
    asked = []
    if pairs:
        left, right = pairs[rng.integers(len(pairs))]
        asked.append(("left of", f"What is left of the {right}?", with_article(left)))
    # Every second time of a thing that the scene shows; of one that it shows twice, if there is one.
    concept = CONCEPTS[rng.integers(len(CONCEPTS))]
    if rng.random() < 0.5:
        concept = max(rng.permutation(drawings).tolist(), key=drawings.count)
    asked.append(("how many", f"How many {name_plural(concept)} are there?", NUMBERS[drawings.count(concept)]))
    corners = dict(zip(CORNERS, (rows[0][0], rows[0][-1], rows[-1][0], rows[-1][-1]), strict=True))
    corner = CORNERS[rng.integers(len(CORNERS))]
    asked.append(("corner", f"What is at the {corner}?", with_article(corners[corner])))
    return [dict(zip(("kind", "question", "answer"), texts, strict=True)) for texts in asked]


def _enumerate(nouns: list[str]) -> str:
    return " and ".join([", ".join(nouns[:-1]), nouns[-1]]) if len(nouns) > 1 else nouns[0]


def name_plural(noun: str) -> str:
    """The plural of a noun, if it is regular."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
