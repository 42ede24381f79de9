"""The demo's data sets, by the names that `--dataset` takes."""

from datasets import DatasetDict, load_dataset

from common.demo.crowded_scenes import load_crowded_scenes
from common.demo.easy_vqa import load_easy_vqa, load_easy_vqa_questions
from common.demo.emoji_videos import load_emoji_videos
from common.demo.scenes import load_scenes


def load_emoji_splits() -> DatasetDict:
    """Loads splits "train" and "test" with columns `image`, an animated WebP, and `caption` (str)."""
    return load_dataset(str(load_emoji_videos()))


DEMO_DATASETS = {
    "openmoji-scenes": load_scenes,
    "crowded-scenes": load_crowded_scenes,
    "easy-vqa": load_easy_vqa,
    "easy-vqa-questions": load_easy_vqa_questions,
    "emoji-videos": load_emoji_splits,
}
