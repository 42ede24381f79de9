"""A small text decoder in place of the frozen language model, so that a comparison of connectors takes minutes.

It is trained with the connector, from random weights. What differs between runs is what the connectors keep.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.demo.cache import prepare_once

SPECIAL_TOKENS = ["<pad>", "<unk>", "<eos>"]


def prepare_small_decoder(texts: Iterable[str]) -> Path:
    """Saves a decoder of 4 layers with a tokenizer of the words of all `texts` in the demo's cache."""
    tokens = {token for text in set(texts) for token in re.findall(r"\w+|[^\w\s]", text)}
    vocabulary = [*SPECIAL_TOKENS, *sorted(tokens)]
    digest = hashlib.sha256(" ".join(vocabulary).encode()).hexdigest()[:8]
    return prepare_once(f"small-decoder-{digest}", lambda folder: _write_decoder(vocabulary, folder))


def train_from_scratch(decoder: torch.nn.Module) -> None:
    """Draws fresh weights for a decoder, and lets them be trained."""
    for weight in decoder.parameters():
        weight.requires_grad_(True)
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)


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
