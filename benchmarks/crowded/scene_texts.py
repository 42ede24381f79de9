"""The crowded scenes as questions and answers with cached features."""

from typing import Any

from datasets import Dataset, DatasetDict
from torch.utils.data import Dataset as TorchDataset

from common.data.feature_cache import FeatureDataset

KINDS = ("caption", "left of", "how many", "corner")
CAPTIONS_REPEATED = 3  # so that about half of the texts of training are captions


class SceneTexts(TorchDataset):
    """Questions and answers about scenes, with the cached features of each scene.

    Args:
        texts (`Dataset`): Rows with the columns `question`, `answer`, `kind` and `scene`.
        features ([`FeatureDataset`]): One row for each scene.
    """

    def __init__(self, texts: Dataset, features: FeatureDataset):
        self.texts, self.features = texts, features

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.texts[index]
        return {**row, "vision_features": self.features[row["scene"]]["vision_features"]}


def list_texts(scenes: DatasetDict) -> DatasetDict:
    """All texts about the scenes, without their images. Training captions are there several times."""
    splits = DatasetDict()
    for split, rows in scenes.items():
        copies = CAPTIONS_REPEATED if split == "train" else 1
        texts = []
        for scene, row in enumerate(rows.select_columns(["caption", "questions"])):
            caption = {"kind": "caption", "question": "", "answer": row["caption"]}
            texts += [{**text, "scene": scene} for text in [caption] * copies + row["questions"]]
        splits[split] = Dataset.from_list(texts)
    return splits
