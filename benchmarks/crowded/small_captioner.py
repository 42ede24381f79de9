"""The crowded scenes as texts with cached features, and a captioner with a small text decoder.

The decoder is trained with the connector, from random weights. It takes the place of the frozen language model, so
that a run takes minutes, and so that what differs between runs is what the connectors keep of an image.
"""

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset as TorchDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.data.feature_cache import FeatureDataset
from common.demo.cache import prepare_once

KINDS = ("caption", "left of", "how many", "corner")
CAPTIONS_REPEATED = 3  # so that about half of the texts of training are captions
SPECIAL_TOKENS = ["<pad>", "<unk>", "<eos>"]


def words(text: str) -> list[str]:
    """The words of a text, without punctuation. Texts with the same words count as the same answer."""
    return re.findall(r"\w+", text)


def prepare_small_decoder(texts: DatasetDict) -> Path:
    """Saves a decoder of 4 layers with random weights, and a tokenizer of the words of all texts."""
    columns = [split[name] for split in texts.values() for name in ("question", "answer")]
    tokens = {token for column in columns for text in set(column) for token in re.findall(r"\w+|[^\w\s]", text)}
    vocabulary = [*SPECIAL_TOKENS, *sorted(tokens)]
    return prepare_once(f"crowded-decoder-{len(vocabulary)}", lambda folder: _write_decoder(vocabulary, folder))


def _write_decoder(vocabulary: list[str], folder: Path) -> None:
    words_only = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, "<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("pad_token", "unk_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words_only, **special).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


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
