"""The common form of the demo's captioned images."""

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun by its spelling, which is right for all nouns of the demo."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def save_splits(folder: Path, splits: dict[str, Iterable[dict]]) -> None:
    """Saves rows `{"image": PNG bytes, "caption": text}` of each split for `datasets.load_from_disk`."""
    features = Features({"image": Image(), "caption": Value("string")})
    saved = {split: Dataset.from_list(list(rows), features=features, split=split) for split, rows in splits.items()}
    DatasetDict(saved).save_to_disk(folder)
