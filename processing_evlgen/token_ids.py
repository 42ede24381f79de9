"""Checks and pads the token ids of texts."""

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def check_plain_text(tokenizer: PreTrainedTokenizerBase, end_id: int, texts: dict[str, tuple[str, list[int]]]) -> None:
    """Checks that texts to train on hold neither special tokens nor the end of a text.

    In the middle of a text such a token would be a label, and the model would learn to stop there. A text with one is
    refused rather than encoded letter by letter: it shows that markup is left in the data.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Knows the special tokens.
        end_id (`int`): The id that ends a text.
        texts (`dict[str, tuple[str, list[int]]]`):
            Each text and its ids without the end, by the name that the error gives it.

    Raises:
        ValueError: If a text holds such a token; the message names both.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Letters that a tokenizer does not know become its unknown token, which ends nothing.
    refused = special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id, end_id}
    for name, (text, ids) in texts.items():
        if found := refused.intersection(ids):
            token = tokenizer.decode([found.pop()])
            raise ValueError(f"{name} must not hold {token!r}, a special token or the end of a text, but is {text!r}.")


def pad(
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[list[int]],
    labels: list[list[int]] | None,
    arguments: dict[str, Any],
) -> dict[str, list[list[int]]]:
    """Pads ids on the left; or ids and labels on the right.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Has the padding token and the largest length.
        sequences (`list[list[int]]`): Ids of each text.
        labels (`list[list[int]]`, *optional*): Labels of each text, as many as ids. They are padded with -100.
        arguments (`dict`): The tokenizer's `padding`, `max_length`, `pad_to_multiple_of` and `padding_side`.

    Returns:
        `input_ids`, `attention_mask` and, if given, `labels`.

    Raises:
        ValueError: If there is no text, a text is too long, or it is to be truncated.
    """
    if not sequences:
        raise ValueError("`text` or `messages` is an empty list.")
    if arguments.get("truncation") not in (None, False, "do_not_truncate"):
        raise ValueError("`truncation` is not supported: a shortened prompt would lose its images or its question.")
    max_length = arguments.get("max_length")
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    for index, sequence in enumerate(sequences):
        if len(sequence) > limit:
            raise ValueError(f"`text` entry {index} has {len(sequence)} tokens, but at most {limit} are allowed.")
    side = arguments.get("padding_side") or ("left" if labels is None else "right")
    padded = tokenizer.pad(
        {"input_ids": sequences},
        padding=arguments.get("padding", True),
        max_length=max_length and limit,
        pad_to_multiple_of=arguments.get("pad_to_multiple_of"),
        padding_side=side,
        return_attention_mask=True,
        verbose=False,
    )
    if labels is not None:  # `pad` leaves labels as they are
        fills = [[-100] * (len(ids) - len(row)) for ids, row in zip(padded["input_ids"], labels, strict=True)]
        pairs = zip(fills, labels, strict=True)
        padded["labels"] = [fill + row if side == "left" else row + fill for fill, row in pairs]
    return dict(padded)
