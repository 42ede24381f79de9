"""Measures the maps of words where the drawings' places are known, and which numbers tell wrong names from right ones.

    python -m benchmarks.words --models outputs/demo outputs/seed1 outputs/seed2

appends to `benchmarks/words/results.jsonl` what it lacks, a line for each model and data, and prints the tables. The
data are the demo's held-out scenes; the same with drawings of half the size, which the demo often names wrongly;
merged videos, which show the first drawing alone and then the second; and crowded scenes. A map is right if its
strongest patch, or a patch of its strongest token, touches the drawing that the noun names. In a video it must also be
in a frame that shows the drawing. Language models are in bfloat16, which takes a quarter of the time. Lines of results
have other methods, too, whose code was deleted.
"""

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.demo import crowded_scenes, scenes
from modeling_evlgen import EVLGenForConditionalGeneration, explain, explanations
from modeling_evlgen.explanations import find_words
from processing_evlgen import EVLGenProcessor

from ..results import Result, markdown_table, read_results, spread, train_missing

RESULTS = Path(__file__).parent / "results.jsonl"
DATA = ("scenes", "half-size", "videos", "crowded")
FRAMES = 2  # of each drawing of a video
SCENES, CAPTIONED = 12, 60  # whose maps are measured; that are captioned, to find wrong names

Drawing = tuple[str, scenes.Box, slice]  # its name, its box, and the frames that show it
Scene = tuple[list[Image.Image], str, list[Drawing]]  # an image has one frame; with its caption


@dataclass(frozen=True)
class Run:
    model: str
    data: str

    @property
    def name(self) -> str:
        return f"{self.data}, {Path(self.model).resolve().name}"


def draw(data: str, count: int) -> Iterator[Scene]:
    if data == "crowded":
        for image, rows, boxes in crowded_scenes.draw_crowds("test", count):
            nouns = [noun for row in rows for noun in row]
            drawings = [(noun, box, slice(1)) for noun, box in zip(nouns, boxes, strict=True)]
            yield [Image.open(io.BytesIO(image))], crowded_scenes.caption(rows), drawings
        return
    sizes = scenes.DRAWING_SIZES
    scenes.DRAWING_SIZES = tuple(size // 2 for size in sizes) if data == "half-size" else sizes
    rows = list(scenes.draw_scenes("test", count))
    scenes.DRAWING_SIZES = sizes
    for row in rows:
        image, boxes = Image.open(io.BytesIO(row["image"])), row["boxes"].items()
        if data == "videos":  # one drawing after the other, FRAMES frames each
            frames = [hide(image, box) for _, box in reversed(boxes) for _ in range(FRAMES)]
            drawings = [(noun, box, slice(n * FRAMES, (n + 1) * FRAMES)) for n, (noun, box) in enumerate(boxes)]
        else:
            frames, drawings = [image], [(noun, box, slice(1)) for noun, box in boxes]
        yield frames, row["caption"], drawings


def hide(image: Image.Image, box: scenes.Box) -> Image.Image:
    """A scene without one of its drawings."""
    hidden = image.copy()
    hidden.paste(image.getpixel((0, 0)), box)
    return hidden


def touched(noun: str, drawings: list[Drawing], image: Image.Image, shape: torch.Size) -> torch.Tensor:
    """Whether a patch of a map, `(frames, rows, columns)`, touches a drawing of that name. Its shape is the map's."""
    mask = torch.zeros(shape, dtype=torch.bool)
    width, height = image.width / shape[2], image.height / shape[1]
    for name, (left, upper, right, lower), frames in drawings:
        if name == noun:
            rows = slice(int(upper / height), -int(-lower // height))
            mask[frames, rows, int(left / width) : -int(-right // width)] = True
    return mask


def load(run: Run) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    mode = {"video_mode": "merge"} if run.data == "videos" else {}
    model = EVLGenForConditionalGeneration.from_pretrained(run.model, **mode)
    model.language_model.bfloat16()
    return model, EVLGenProcessor.from_pretrained(run.model)


def find_nouns(*given: Any) -> list[tuple[str, list[int]]]:
    """The words of nouns alone: each word of a map costs a backward pass."""
    nouns = {part for concept in crowded_scenes.CONCEPTS for part in concept.split()}
    return [(word, positions) for word, positions in find_words(*given) if word in nouns]


def explain_nouns(captioner: Any, steps: int, **given: Any) -> dict[str, tuple[float, ...]]:
    """Of each noun of one caption, the numbers of [`doubt`], and the map. Some nouns have two words."""
    explanations.find_words = find_nouns
    (words,) = explain(*captioner, steps=steps, **given)
    found = {}
    for index in range(len(words)):
        for part in (words[index : index + 2], words[index : index + 1]):
            noun = " ".join(word.word for word in part)
            if noun in crowded_scenes.CONCEPTS:
                sums = [sum(word.map for word in part)] if steps else []
                probability = torch.tensor([word.probability for word in part]).prod().item()
                confidence = min(word.confidence for word in part)
                found[noun] = (probability, sum(word.evidence for word in part), confidence, *sums)
                break
    return found


def point(run: Run) -> dict[str, list[bool]]:
    """Whether the strongest patch of each noun is right, and a patch of its strongest token."""
    hits, (model, processor) = defaultdict(list), load(run)
    for frames, caption, drawings in draw(run.data, SCENES):
        given, index = {"video": [frames]}, None
        if run.data != "videos":
            given = {"image": frames}
            index = model.get_image_features(processor(images=frames)["pixel_values"]).output_index
        found = explain_nouns((model, processor), explanations.STEPS, caption=[caption], **given)
        for noun, (*_, values) in found.items():
            values = values.view(-1, *values.shape[-2:])  # (frames, rows, columns)
            right = touched(noun, drawings, frames[0], values.shape).flatten()
            hits["integrated gradients"].append(bool(right[values.argmax()]))
            if index is not None:  # tokens of a Q-Former are made of no patches of their own
                of_tokens = torch.zeros(int(index.max()) + 1).index_add(0, index[0], values.flatten())
                is_strongest = index[0] == of_tokens.argmax()
                hits["integrated gradients, of a token"].append(bool(right[is_strongest].any()))
    return hits


def doubt(run: Run) -> dict[str, list[float]]:
    """Of each noun of generated captions: whether it is wrong, its probability, its evidence and its confidence."""
    numbers: dict[str, list[float]] = {"wrong": [], "probability": [], "evidence": [], "confidence": []}
    captioner = load(run)
    for frames, _, drawings in draw(run.data, CAPTIONED):
        found = explain_nouns(captioner, 0, image=frames, do_sample=False, max_new_tokens=60)
        for noun, found_numbers in found.items():
            is_wrong = noun not in {name for name, *_ in drawings}
            for values, number in zip(numbers.values(), (is_wrong, *found_numbers), strict=True):
                values.append(number)
    return numbers


def area_under_curve(doubts: torch.Tensor, is_wrong: torch.Tensor) -> float:
    """The probability that a wrong name is more doubtful than a right one."""
    pairs = doubts[is_wrong][:, None] - doubts[~is_wrong]
    return ((pairs > 0).float() + (pairs == 0).float() / 2).mean().item()


def measure(run: Run) -> Result:
    with_doubt = run.data in ("half-size", "crowded")
    return {"hits": {} if run.data == "half-size" else point(run), "doubt": doubt(run) if with_doubt else {}}


def print_tables(results: list[Result]) -> None:
    for data in DATA:
        of_data = [result for result in results if result["run"]["data"] == data]
        shares = defaultdict(list)
        for result in of_data:
            for name, hits in result["hits"].items():
                shares[name].append(sum(hits) / len(hits))
            if result["doubt"]:
                numbers = {name: torch.tensor(values) for name, values in result["doubt"].items()}
                wrong = numbers.pop("wrong")
                doubts = {name: -values for name, values in numbers.items()}
                ranks = [doubts[name].argsort().argsort() for name in ("probability", "evidence")]
                doubts["probability and evidence"] = sum(ranks)
                for name, values in doubts.items():
                    shares[f"wrong names by {name}, area"].append(area_under_curve(values, wrong.bool()))
                shares["wrong names"].append(wrong.float().mean().item())
        if shares:
            print(
                f"\n{data}\n\n{markdown_table(['', '%'], [(name, spread(found)) for name, found in shares.items()])}"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["outputs/demo"], help="Default: outputs/demo.")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA[:3], help="Default: all but crowded scenes.")
    arguments = parser.parse_args(argv)
    runs = [Run(model, data) for data in arguments.data for model in arguments.models]
    train_missing(runs, RESULTS, measure)
    print_tables(list(read_results(RESULTS).values()))


if __name__ == "__main__":
    main()
