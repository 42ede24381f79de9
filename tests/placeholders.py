"""A folder in which every placeholder of README and docs is a tiny model, data set or file.

Names on the Hub are folders with that path: transformers looks for a folder first.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import torch
from finetune import LoraArguments, add_lora
from PIL import Image
from pyarrow import parquet as pq
from transformers import BertConfig, BertModel

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import save_base

from .documents import blocks_of_page
from .helpers import (
    COLORS,
    FIXTURES,
    LAYERS,
    ROOT,
    encode_video,
    noise_images,
    save,
    save_animation,
    save_image_folder,
    save_one_gpu_sources,
    save_split,
    save_towers,
    tiny_processor,
)
from .test_convert_original_checkpoint import read, save_base_models
from .training import write_tars

CONNECTOR = {**LAYERS, "merge_r": 3}
TEMPORAL = {"temporal_hidden_size": 8, "temporal_num_attention_heads": 2}
IMAGE_MODELS = ("outputs/demo", "outputs/mine", "outputs/mine/checkpoint-200", "outputs/opt-2.7b", "path/to/model")
IMAGE_MODELS += ("path/to/image/model", "weak", "outputs/one-gpu", "outputs/tiles", "outputs/crowded")
VIDEO_MODELS = ("outputs/demo-video", "outputs/video-opt-2.7b", "path/to/video/model")


def make_work(folder: Path) -> Path:
    """Fills a folder with all placeholders, and links to what commands read from the repository."""
    for name in ("examples", "docs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    save_models(folder)
    save_base_models_of_the_hub(folder)
    save_one_gpu_sources(folder)
    save_data(folder)
    save_original(folder)
    save_connector(folder / "perceiver.py")
    return folder


def save_models(folder: Path) -> None:
    """An image model, a video model and an adapter. They end texts and turns with one token, as SmolLM2 does."""
    towers = save_towers(folder / "towers", chat=True)
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(**towers, connector_config=CONNECTOR)
    processor = tiny_processor(model, chat=True)
    processor.end_of_text = "<|im_end|>"
    model.generation_config.update(eos_token_id=processor.end_of_text_id, pad_token_id=0, max_new_tokens=8)
    first, *others = IMAGE_MODELS
    save(folder / first, model, processor)
    noise_images(1)[0].save(folder / first / "captions.png")
    for name in others:
        link(folder / name, folder / first)
    first_video, *others = VIDEO_MODELS
    save(folder / first_video, EVLGenForConditionalGeneration.from_image_model(folder / first, **TEMPORAL), processor)
    for name in others:
        link(folder / name, folder / first_video)
    adapted = add_lora(EVLGenForConditionalGeneration.from_pretrained(folder / first), LoraArguments(lora_r=2))
    save(folder / "outputs" / "vqa", adapted, processor)
    save_base(model.config, folder / "outputs" / "vqa")


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def save_base_models_of_the_hub(folder: Path) -> None:
    """What the paper's recipes and the examples name."""
    for vision, vision_name, text, text_name in (
        ("eva", "Salesforce/blip2-opt-2.7b", "opt", "facebook/opt-2.7b"),
        ("clip", "openai/clip-vit-large-patch14", "qwen2", "Qwen/Qwen2.5-1.5B-Instruct"),
    ):
        saved = save_towers(folder / "hub" / vision, vision, text, bos=text == "opt", chat=text == "qwen2")
        link(folder / vision_name, Path(saved["vision_model"]))
        link(folder / text_name, Path(saved["text_model"]))
    BertModel(BertConfig(**LAYERS, vocab_size=10)).save_pretrained(folder / "google-bert" / "bert-base-uncased")


def save_data(folder: Path) -> None:
    save_image_folder(folder / "my_images", train=8, test=4)
    link(folder / "data" / "coco", folder / "my_images")
    for split, colors in (("train", 2 * COLORS), ("test", COLORS)):
        for kind, write, suffix in (
            ("my_questions", question, "png"),
            ("my_chats", conversation, "png"),
            ("my_videos", caption, "mp4"),
            ("emoji", caption, "webp"),
        ):
            save_split(folder / kind / split, colors, [*map(write, colors)], suffix, write_medium)
    for name in ("shards", "data/laion", "data/ccs"):
        write_tars(folder / name, [8], suffix="jpg")
    parts = [{"image": {"bytes": (folder / "my_images" / "train" / "0.png").read_bytes(), "path": None}}] * 3
    (folder / "my_parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(parts), folder / "my_parquet" / "0.parquet")
    for name in ("image.png", "a.png", "b.png", "video.mp4"):
        write_medium("red", folder / name)
    for name in ("pairs.csv", "held_out.csv"):
        rows = [f"{image}.png,{text}" for image in "ab" for text in ("red", "a red image", "all red", "it is red")]
        (folder / name).write_text("\n".join(["image,caption", *rows]))
    save_split(folder / "photos", ["red", "blue"], [{"caption": "red"}, {"caption": "blue"}], save=write_medium)
    for name in "ab":
        shutil.copy(folder / f"{name}.png", folder / "photos")  # `pairs.csv` names them
    for file in (FIXTURES / "benchmarks").iterdir():
        shutil.copy(file, folder)
    for file in ("dataset_coco.json", "v2_OpenEnded_mscoco_val2014_questions.json"):
        write_coco_images(folder / "coco", json.loads((folder / file).read_text()))


def question(color: str) -> dict:
    return {"question": "what colour is it?", "answer": color}


def conversation(color: str) -> dict:
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "what colour is it?"}]
    answer = [{"type": "text", "text": color}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def caption(color: str) -> dict:
    return {"caption": f"a {color} image"}


def save_connector(path: Path) -> None:
    """The page's connector of one's own, as a file."""
    blocks = blocks_of_page(ROOT / "docs" / "connector.md")
    path.write_text(next(block.code for block in blocks if "class Perceiver(" in block.code))


def write_medium(color: str, path: Path) -> None:
    image = Image.new("RGB", (48, 32), color)
    if path.suffix == ".mp4":
        encode_video(path, [image] * 4)
    elif path.suffix == ".webp":
        save_animation(path, [image, Image.new("RGB", (48, 32), "white")])
    else:
        image.save(path)


def write_coco_images(folder: Path, published: dict) -> None:
    """Draws the images that a published file names."""
    names = [image["filename"] for image in published.get("images", [])]
    names += [f"COCO_val2014_{row['image_id']:012d}.jpg" for row in published.get("questions", [])]
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (48, 32), "red").save(folder / "val2014" / name)


def save_original(folder: Path) -> None:
    """A checkpoint of the original code, and its own base models in original/."""
    meta, state, *_ = read("image_opt")
    (folder / "original").mkdir()
    save_base_models(meta, folder / "original")
    torch.save({"model": state}, folder / "checkpoint_best.pth")
