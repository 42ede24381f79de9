"""Measures the maps of words where the drawings' places are known, and which numbers tell wrong names from right ones.

    python -m benchmarks.words --models outputs/demo outputs/seed1 outputs/seed2

appends to `benchmarks/words/results.jsonl` what it lacks, a line for each model and data, and prints the tables. The
data are the demo's held-out scenes; the same with drawings of half the size, which the demo often names wrongly; and
crowded scenes. A map is right if its strongest patch, or a patch of its strongest token, touches the drawing that the
noun names. Language models are in bfloat16, which takes a quarter of the time.
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
from modeling_evlgen import EVLGenForConditionalGeneration, EVLGenImageOutput, explain, explanations
from modeling_evlgen.explanations import find_words
from processing_evlgen import EVLGenProcessor

from ..results import Result, markdown_table, read_results, spread, train_missing

RESULTS = Path(__file__).parent / "results.jsonl"
DATA = ("scenes", "half-size", "crowded")
CAPTIONED, SLOW = 60, 4  # scenes that are captioned, to find wrong names; scenes for methods that take long
INTEGRATED = "integrated gradients"

Scene = tuple[Image.Image, str, list[tuple[str, scenes.Box]]]  # with its caption, and the box of each drawing


@dataclass(frozen=True)
class Run:
    model: str
    data: str
    scenes: int

    @property
    def name(self) -> str:
        return f"{self.data}, {Path(self.model).resolve().name}"


def draw(data: str, count: int) -> Iterator[Scene]:
    if data == "crowded":
        for image, rows, boxes in crowded_scenes.draw_crowds("test", count):
            nouns = [noun for row in rows for noun in row]
            yield Image.open(io.BytesIO(image)), crowded_scenes.caption(rows), list(zip(nouns, boxes, strict=True))
        return
    sizes = scenes.DRAWING_SIZES
    scenes.DRAWING_SIZES = sizes if data == "scenes" else tuple(size // 2 for size in sizes)
    rows = list(scenes.draw_scenes("test", count))
    scenes.DRAWING_SIZES = sizes
    for row in rows:
        yield Image.open(io.BytesIO(row["image"])), row["caption"], list(row["boxes"].items())


def touched(boxes: list[scenes.Box], image: Image.Image, rows: int, columns: int) -> torch.Tensor:
    """Whether a patch touches one of the boxes, `(rows * columns,)`."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    width, height = image.width / columns, image.height / rows
    for left, upper, right, lower in boxes:
        mask[int(upper / height) : -int(-lower // height), int(left / width) : -int(-right // width)] = True
    return mask.flatten()


def load(name: str, shuffled: bool = False) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """A captioner; `shuffled`, each tensor of its connector has its numbers in a random order."""
    model = EVLGenForConditionalGeneration.from_pretrained(name, attn_implementation="eager")
    model.language_model.bfloat16()
    torch.manual_seed(0)
    for weight in model.parameters():
        if shuffled and weight.requires_grad:
            weight.data = weight.data.flatten()[torch.randperm(weight.numel())].view_as(weight)
    return model, EVLGenProcessor.from_pretrained(name)


def find_nouns(*given: Any) -> list[tuple[str, list[int]]]:
    """The words of nouns alone: each word of a map costs a backward pass."""
    nouns = {part for concept in crowded_scenes.CONCEPTS for part in concept.split()}
    return [(word, positions) for word, positions in find_words(*given) if word in nouns]


def explain_nouns(captioner: Any, image: Image.Image, caption: str | None, steps: int) -> dict[str, tuple[float, ...]]:
    """Of each noun of a caption, the probability, the evidence and the map. Some nouns have two words."""
    explanations.find_words = find_nouns
    words = explain(*captioner, image, caption=caption, steps=steps, do_sample=False, max_new_tokens=60)
    found = {}
    for index in range(len(words)):
        for part in (words[index : index + 2], words[index : index + 1]):
            noun = " ".join(word.word for word in part)
            if noun in crowded_scenes.CONCEPTS:
                sums = [sum(word.map for word in part)] if steps else []
                probability = torch.tensor([word.probability for word in part]).prod().item()
                found[noun] = (probability, sum(word.evidence for word in part), *sums)
                break
    return found


def rival_maps(captioner: Any, image: Image.Image, caption: str, noun: str, slow: bool) -> dict[str, torch.Tensor]:
    """What other methods give the patches, `(patches,)`, or the tokens of the soft prompt, `(tokens,)`."""
    model, processor = captioner
    inputs = processor(images=[image], suffix=[caption])
    number = int((inputs["labels"] != -100).sum())
    start = processor.tokenizer(caption[: caption.index(noun)].rstrip())["input_ids"]
    place = len(start) - number - 1  # of the token before the noun
    features = model.get_vision_features(inputs.pop("pixel_values")).requires_grad_()
    prompt = model.project_vision_features(features).pooler_output  # (1, tokens, dim)

    def run(prompts: torch.Tensor, **options: Any) -> Any:
        rows = {name: inputs[name].expand(len(prompts), -1) for name in ("input_ids", "attention_mask")}
        encoded = {"image": EVLGenImageOutput(pooler_output=prompts)}
        output = model(**rows, mm_encoder_outputs=encoded, **options)
        return output.logits[:, place].float().log_softmax(-1)[:, inputs["input_ids"][0, place + 1]], output

    score, output = run(prompt, output_attentions=True)
    (gradient,) = torch.autograd.grad(score.sum(), features)
    median = features.median(dim=1, keepdim=True).values
    is_image = inputs["input_ids"][0] == processor.image_token_id
    maps = {
        "one gradient": (gradient * (features - median)).sum(dim=-1)[0].detach(),
        "attention of the last layer": output.attentions[-1][0, :, place, is_image].float().mean(dim=0).detach(),
    }
    if slow:
        with torch.no_grad():
            is_left_out = torch.eye(prompt.shape[1], dtype=torch.bool)[..., None]
            maps["leaving out one token"] = -run(prompt.mean(dim=1, keepdim=True).where(is_left_out, prompt))[0]
    return maps


def point(run: Run) -> dict[str, list[bool]]:
    """Whether the map of each noun is right, by method."""
    hits = defaultdict(list)
    captioner, shuffled = load(run.model), load(run.model, shuffled=True)
    for number, (image, caption, drawings) in enumerate(draw(run.data, run.scenes)):
        index = captioner[0].get_image_features(captioner[1](images=[image])["pixel_values"]).output_index
        randomly = explain_nouns(shuffled, image, caption, explanations.STEPS) if number < SLOW else {}
        for noun, (_, _, values) in explain_nouns(captioner, image, caption, explanations.STEPS).items():
            right = touched([box for name, box in drawings if name == noun], image, *values.shape)
            maps = {INTEGRATED: values.flatten(), **rival_maps(captioner, image, caption, noun, number < SLOW)}
            if randomly:
                maps[f"{INTEGRATED}, random connector"] = randomly[noun][2].flatten()
            if index is not None:
                of_tokens = torch.zeros(int(index.max()) + 1).index_add(0, index[0], values.flatten())
                maps[f"{INTEGRATED}, of a token"] = of_tokens
            for name, strengths in maps.items():
                if index is None and len(strengths) != len(right):
                    continue  # tokens of a Q-Former are made of no patches of their own
                best = strengths.argmax()
                chosen = best if len(strengths) == len(right) else index[0] == best
                hits[name].append(bool(right[chosen].any()))
    return hits


def doubt(run: Run) -> dict[str, list[float]]:
    """Of each noun of generated captions: whether it is wrong, its probability and its evidence."""
    numbers: dict[str, list[float]] = {"wrong": [], "probability": [], "evidence": []}
    captioner = load(run.model)
    for image, _, drawings in draw(run.data, CAPTIONED):
        for noun, (probability, evidence) in explain_nouns(captioner, image, None, steps=0).items():
            numbers["wrong"].append(noun not in dict(drawings))
            numbers["probability"].append(probability)
            numbers["evidence"].append(evidence)
    return numbers


def area_under_curve(doubts: torch.Tensor, is_wrong: torch.Tensor) -> float:
    """The probability that a wrong name is more doubtful than a right one."""
    pairs = doubts[is_wrong][:, None] - doubts[~is_wrong]
    return ((pairs > 0).float() + (pairs == 0).float() / 2).mean().item()


def measure(run: Run) -> Result:
    return {"hits": {} if run.data == "half-size" else point(run), "doubt": {} if run.data == "scenes" else doubt(run)}


def print_tables(results: list[Result]) -> None:
    for data in DATA:
        of_data = [result for result in results if result["run"]["data"] == data]
        shares = defaultdict(list)
        for result in of_data:
            for name, hits in result["hits"].items():
                shares[name].append(sum(hits) / len(hits))
            if result["doubt"]:
                wrong, probability, evidence = (torch.tensor(values) for values in result["doubt"].values())
                ranks = [-values.argsort().argsort() for values in (probability, evidence)]
                for name, doubts in (("probability", -probability), ("evidence", -evidence), ("both", sum(ranks))):
                    shares[f"wrong names by {name}, area"].append(area_under_curve(doubts, wrong.bool()))
                shares["wrong names"].append(wrong.float().mean().item())
        if shares:
            print(
                f"\n{data}\n\n{markdown_table(['', '%'], [(name, spread(found)) for name, found in shares.items()])}"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["outputs/demo"], help="Default: outputs/demo.")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA[:2], help="Default: all but crowded scenes.")
    parser.add_argument("--scenes", type=int, default=12, help="Scenes whose maps are measured. Default: 12.")
    arguments = parser.parse_args(argv)
    runs = [Run(model, data, arguments.scenes) for data in arguments.data for model in arguments.models]
    train_missing(runs, RESULTS, measure)
    print_tables(list(read_results(RESULTS).values()))


if __name__ == "__main__":
    main()
