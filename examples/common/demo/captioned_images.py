"""The common form of the demo's captioned images."""

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun by its spelling, which is right for all nouns of the demo."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def save_splits(folder: Path, splits: dict[str, Iterable[dict]]) -> None:
    """Saves a data set for `datasets.load_from_disk`.

    Args:
        folder: A new folder.
        splits: Rows `{"image": PNG bytes, "caption": text}` of each split.
    """
    features = Features({"image": Image(), "caption": Value("string")})
    saved = DatasetDict()
    for split, rows in splits.items():
        rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
        saved[split] = Dataset.from_list(rows, features=features, split=split)
    saved.save_to_disk(folder)
