"""Videos of animated emoji, with captions and questions that need the order of frames, or one single frame.

A short video shows 1 to 4 emoji one after the other. A video on a background shows one emoji. One or two others
interrupt it for a single frame each.

Videos come in pairs that differ only in their order. Both get the same questions. So a model that cannot see order is
right about at most half of them. Videos of the test split show a pair of emoji that training never shows together, in
a skin tone that training never shows.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from common.demo.cache import prepare_once
from common.demo.emoji_videos import load_emoji_videos
from common.demo.scenes import HELD_OUT_STEPS, with_article
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

SHORT_LENGTHS = (8, 12, 16)  # frames
SHORT_VIDEOS = {"train": 1500, "test": 400}
# By their length in frames. Two thirds have one single frame, a third has two.
BACKGROUND_VIDEOS = {"train": {8: 300, 16: 300, 64: 300, 256: 60}, "test": {8: 300, 16: 300, 64: 300, 256: 120}}
TEXTS_REPEATED = 2  # of videos on a background, in training, as most texts are about short videos

EVENTS = (1, 2, 2, 2, 3, 4)  # of a short video, equally likely
COUNTS = ("never", "once", "twice")
SHORT_KINDS = ("caption", "which first", "what after", "how often")
MOMENT, MOMENTS_ORDER = "single frame", "first of two frames"


def load_frames() -> dict[str, torch.Tensor]:
    """Vision features of the frames of all emoji in each split, float16, `(emoji * tones * frames, tokens, dim)`.

    All videos are composed of these frames. The vision tower runs once. Its features are cached.
    """
    frames = load_file(prepare_once("data/video-order-frames-v2", _write_frames) / "frames.safetensors")
    return {split: features.flatten(0, 2) for split, features in frames.items()}


@torch.no_grad()
def _write_frames(folder: Path) -> None:
    tower_folder = str(prepare_vision_tower())
    tower, image_processor = AutoModel.from_pretrained(tower_folder).eval(), load_image_processor(tower_folder)
    features = {}
    for split, tones in TONES.items():
        source = load_emoji_videos() / split
        rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        videos = []
        for emoji in EMOJI:
            for name in [row["file_name"] for row in rows if row["caption"] == emoji][:tones]:
                images = load_rgb_frames(source / name, FRAMES)
                pixels = image_processor(images, return_tensors="pt")["pixel_values"]  # (frames, 3, height, width)
                videos.append(extract_vision_tokens(tower, pixels).half())
        features[split] = torch.stack(videos).unflatten(0, (len(EMOJI), tones))
    folder.mkdir()
    save_file(features, folder / "frames.safetensors")


Clip = tuple[int, ...]  # a video: each frame as an index into the split's frames of all emoji and tones
Text = dict[str, str | int]


def compose(split: str) -> tuple[list[Clip], list[Text]]:
    """The videos of a split, and its texts with the keys `clip` (an index), `kind`, `question` and `answer`.

    They are the same in every run.
    """
    clips, texts = [], []
    for length, count in {None: SHORT_VIDEOS[split], **BACKGROUND_VIDEOS[split]}.items():
        # Videos of all lengths on a background have the same emoji.
        rng = np.random.default_rng((("train", "test").index(split), length is None))
        for pair in range(count // 2):
            draw_pair = _draw_short_pair if length is None else _draw_background_pair
            for clip, asked in draw_pair(rng, split, pair, length):
                copies = TEXTS_REPEATED if split == "train" and length is not None else 1
                texts += [{"clip": len(clips), "kind": k, "question": q, "answer": a} for k, q, a in asked] * copies
                clips.append(clip)
    return clips, texts


def is_held_out(emoji: np.ndarray) -> bool:
    """Whether two of these emoji never meet in training."""
    return bool(np.isin(np.subtract.outer(emoji, emoji) % len(EMOJI), HELD_OUT_STEPS).any())


def _draw_emoji(rng: np.random.Generator, split: str, count: int) -> list[int]:
    while True:
        emoji = rng.choice(len(EMOJI), count, replace=False)
        if count == 1 or is_held_out(emoji) == (split == "test"):
            return emoji.tolist()


def _draw_short_pair(
    rng: np.random.Generator, split: str, pair: int, length: None
) -> Iterator[tuple[Clip, list[tuple[str, str, str]]]]:
    """1 to 4 emoji. Half of those with 3 or 4 show one of them twice."""
    count = int(rng.choice(EVENTS))
    repeats = count > 2 and rng.random() < 0.5
    events = _draw_emoji(rng, split, count - repeats)
    if repeats:  # not twice in a row
        events.insert(int(rng.integers(2, count - 1, endpoint=True)), events[0])
    length = int(rng.choice(SHORT_LENGTHS))
    cuts = np.sort(rng.choice(length // 2 - 1, count - 1, replace=False) + 1) * 2  # two frames or more each
    lengths = np.diff([0, *cuts, length]).tolist()
    for order in (1, -1):
        segments = zip(events[::order], lengths[::order], strict=True)
        frames = [frame for emoji, number in segments for frame in _draw_frames(rng, split, emoji, number)]
        yield tuple(frames), _ask(np.random.default_rng((pair, length)), events[::order])


def _draw_background_pair(
    rng: np.random.Generator, split: str, pair: int, length: int
) -> Iterator[tuple[Clip, list[tuple[str, str, str]]]]:
    """One emoji throughout, and one or two others for a frame each."""
    background, *events = _draw_emoji(rng, split, 3 if pair % 3 == 0 else 2)
    shares = np.sort(rng.random(len(events)))  # of the length: about the same places in videos of all lengths
    places = (shares * (length - 1)).astype(int) + np.arange(len(events))
    places = places.clip(max=length - len(events) + np.arange(len(events)))
    for order in (1, -1):
        frames = _draw_frames(rng, split, background, length)
        for place, emoji in zip(places, events[::order], strict=True):
            frames[place] = _draw_frames(rng, split, emoji, 1)[0]
        if len(events) == 1:
            kind, question = MOMENT, ("What is shown only for a moment?", with_article(EMOJI[events[0]]))
        else:
            kind, question = MOMENTS_ORDER, _which_first(np.random.default_rng((pair, length)), events[::order])
        yield tuple(frames), [(f"{kind}, {length}", *question)]


def _draw_frames(rng: np.random.Generator, split: str, emoji: int, count: int) -> list[int]:
    """Successive frames of an emoji in one skin tone. Its video repeats itself."""
    tone, start = rng.integers(TONES[split]), rng.integers(FRAMES)
    first = (emoji * TONES[split] + tone) * FRAMES
    return [int(first + (start + step) % FRAMES) for step in range(count)]


def _ask(rng: np.random.Generator, events: list[int]) -> list[tuple[str, str, str]]:
    """Kind, question and answer of all texts about a short video. Draws do not depend on the order of events."""
    names = [with_article(EMOJI[emoji]) for emoji in events]
    texts, emoji = [], sorted(set(events))
    if len(events) < 3:
        texts.append(("caption", "", ", then ".join(names)))
    if len(emoji) == len(events) > 1:
        texts.append(("which first", *_which_first(rng, events)))
        named = events.index(rng.choice(emoji))
        texts.append(("what after", f"What comes after {names[named]}?", [*names[1:], "nothing"][named]))
    if len(events) > 2:
        counted = max(emoji, key=events.count) if rng.random() < 0.8 else int(rng.integers(len(EMOJI)))
        question = f"How often is {with_article(EMOJI[counted])} shown?"
        texts.append(("how often", question, COUNTS[events.count(counted)]))
    return texts


def _which_first(rng: np.random.Generator, events: list[int]) -> tuple[str, str]:
    """Asks about two of the events, named in any order."""
    named = rng.choice(sorted(events), 2, replace=False).tolist()
    first, second = (with_article(EMOJI[emoji]) for emoji in named)
    return f"Which comes first, {first} or {second}?", with_article(EMOJI[min(named, key=events.index)])
