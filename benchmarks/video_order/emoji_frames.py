"""Vision features of frames of 16 animated emoji. All videos of the benchmark are composed of these frames."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from common.demo.cache import prepare_once
from common.demo.emoji_videos import load_emoji_videos
from common.demo.towers import prepare_vision_tower
from common.models import load_image_processor
from modeling_evlgen.vision_tower import extract_vision_tokens
from processing_evlgen.videos import load_rgb_frames

# Those of the captions of `emoji_videos.py` that look most different from each other.
EMOJI = (
    *("Santa Claus", "ear", "girl", "horse racing", "man astronaut", "man cook", "man farmer", "man firefighter"),
    *("man in motorized wheelchair", "man lifting weights", "man pilot", "man running", "man surfing", "nose"),
    *("snowboarder", "thumbs up"),
)
TONES = {"train": 5, "test": 1}  # skin tones of each emoji
FRAMES = 8  # of each emoji and tone, at equal distances


def load_frames() -> dict[str, torch.Tensor]:
    """Features of the frames of each split, float16, `(emoji, tones, frames, tokens, dim)`.

    The vision tower runs once. Its features are cached.
    """
    return load_file(prepare_once("data/video-order-frames-v2", _write) / "frames.safetensors")


@torch.no_grad()
def _write(folder: Path) -> None:
    tower_folder = str(prepare_vision_tower())
    tower, image_processor = AutoModel.from_pretrained(tower_folder).eval(), load_image_processor(tower_folder)
    features = {}
    for split, tones in TONES.items():
        videos = []
        for frames in _read_videos(split):
            pixels = image_processor(frames, return_tensors="pt")["pixel_values"]  # (frames, 3, height, width)
            videos.append(extract_vision_tokens(tower, pixels).half())
        features[split] = torch.stack(videos).unflatten(0, (len(EMOJI), tones))
    folder.mkdir()
    save_file(features, folder / "frames.safetensors")


def _read_videos(split: str) -> Iterator[list[Image]]:
    """The frames of each emoji in each skin tone of a split, as RGB images on white."""
    folder = load_emoji_videos() / split
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for emoji in EMOJI:
        names = [row["file_name"] for row in rows if row["caption"] == emoji]
        for name in names[: TONES[split]]:
            yield load_rgb_frames(folder / name, FRAMES)
