"""Helpers of the evaluation scripts' tests: images and videos for the published files, and fixed answers."""

import json

from PIL import Image, ImageDraw

from common.evaluation import answers

from .helpers import COLORS, FIXTURES, save_animation, tiny_model
from .training import flags, save_captioner

PUBLISHED = FIXTURES / "benchmarks"
COCO_IMAGES = (522418, 184613, 318219, 391895, 57870, 60623, 318556, 262148, 393225, 297147, 339761)
VIDEOS = ("video7010", "video7011", "video7012", "video6513")
VIDEOS += ("-4wsuPCjDBc_5_15", "-7KMZQEsJW4_205_208", "-8y1Q0rA3n8_108_115")
OPENIMAGES = [
    image["file_name"] for image in json.loads((PUBLISHED / "nocaps_val_4500_captions.json").read_text())["images"]
]


def draw(path, color):
    image = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(image).ellipse((8, 4, 40, 36), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def animate(path, brightness):
    frames = [Image.new("RGB", (32, 32), (brightness + 5 * index,) * 3) for index in range(6)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_animation(path, frames)


def save_work(folder):
    """Saves a tiny model, and draws the images and videos that the fixtures' files name."""
    save_captioner(folder / "model", tiny_model())
    for index, image in enumerate(COCO_IMAGES):
        draw(folder / "coco" / "val2014" / f"COCO_val2014_{image:012d}.jpg", COLORS[index % 4])
    for media, names in {
        "coco": ["COCO_test2015_000000000001.jpg", "COCO_test2015_000000000016.jpg"],
        "nocaps": OPENIMAGES,
        "flickr": ["1007129816.jpg", "1009434119.jpg"],
        "gqa": ["n161313.jpg", "n235859.jpg"],
    }.items():
        for index, name in enumerate(names):
            draw(folder / media / name, COLORS[index % 4])
    for index, name in enumerate(VIDEOS):
        animate(folder / "videos" / f"{name}.webp", 30 * index)
    return folder


def options(work, output, **changes):
    return flags(**{"model": work / "model", "output_dir": output, "batch_size": 4, **changes})


def published(work, benchmark, media, **files):
    """The arguments for a benchmark's published files."""
    paths = {name: value if name == "test_split" else PUBLISHED / value for name, value in files.items()}
    return {"benchmark": benchmark, "media_dir": work / media, **paths}


def vqav2(work, **changes):
    files = {"questions": "v2_OpenEnded_mscoco_val2014_questions.json"}
    return published(work, "vqav2", "coco", annotations="v2_mscoco_val2014_annotations.json", **files) | changes


def read_json(path):
    return json.loads(path.read_text())


class FixedAnswers:
    """Replaces the model's generation by a list of texts, row by row."""

    def __init__(self, monkeypatch, texts):
        self.texts = texts
        self.original = answers.write_part
        monkeypatch.setattr(answers, "generate_answers", self)
        monkeypatch.setattr(answers, "write_part", self.write_part)

    def write_part(self, *args):
        self.remaining = iter(self.texts)  # each run starts again at the first text
        self.original(*args)

    def __call__(self, model, batch, processor, generation_args, dtype, seconds):
        self.generation_args = generation_args
        self.prompts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return [{"text": next(self.remaining)} for _ in self.prompts]


def value(results, name):
    (metric,) = [metric for metric in results["metrics"] if metric["name"] == name]
    return metric["value"]
