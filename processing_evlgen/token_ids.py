"""Checks and pads the token ids of texts."""

from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_FILLS = {"labels": -100, "offset_mapping": (0, 0)}  # for padding, by column


def check_plain_text(tokenizer: PreTrainedTokenizerBase, end_id: int, texts: dict[str, tuple[str, list[int]]]) -> None:
    """Checks that texts to train on hold neither special tokens nor the end of a text.

    In the middle of a text such a token would be a label, and the model would learn to stop there. A text with one is
    refused rather than encoded letter by letter: it shows that markup is left in the data.

    Args:
        tokenizer, end_id: The tokenizer, and the id that ends a text.
        texts: Each text and its ids without the end, by the name that a ValueError gives it.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Letters that a tokenizer does not know become its unknown token, which ends nothing.
    refused = special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id, end_id}
    for name, (text, ids) in texts.items():
        if found := refused.intersection(ids):
            token = tokenizer.decode([found.pop()])
            raise ValueError(f"{name} must not hold {token!r}, a special token or the end of a text, but is {text!r}.")


def expand_placeholders(columns: dict[str, list[Any]], budgets: dict[int, list[int]]) -> dict[str, list[Any]]:
    """Repeats the one placeholder of each image or video as often as it has tokens.

    Args:
        columns: `input_ids` of each text, and optionally `labels` and `offset_mapping`. Others are returned unchanged.
        budgets: By placeholder id, the number of tokens of each image or video, in the order of the placeholders.
    """
    remaining = {token_id: iter(counts) for token_id, counts in budgets.items()}
    repeats = [[next(remaining[i]) if i in remaining else 1 for i in ids] for ids in columns["input_ids"]]
    for name in {"input_ids", *_FILLS} & columns.keys():
        rows = zip(columns[name], repeats, strict=True)
        columns[name] = [
            [value for value, n in zip(row, counts, strict=True) for _ in range(n)] for row, counts in rows
        ]
    return columns


def pad(
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, list[Any]],
    placeholder_ids: tuple[int, int],
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    """Truncates if requested, and pads: ids on the left; ids and labels on the right.

    Args:
        tokenizer: Has the padding token, the largest length and the side to truncate.
        columns:
            `input_ids` of each text, and optionally `labels` and `offset_mapping`, as many as ids. They are padded
            with -100 and `(0, 0)`. Other columns are returned unchanged.
        placeholder_ids: Ids that truncation must keep.
        arguments: The tokenizer's `padding`, `max_length`, `truncation`, `pad_to_multiple_of` and `padding_side`.

    Returns:
        The columns with `attention_mask`.

    Raises:
        ValueError: If there is no text. If a text is too long, or its placeholders or labels would be truncated.
    """
    if not columns["input_ids"]:
        raise ValueError("`text` or `messages` is an empty list.")
    max_length = arguments.get("max_length")
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    if arguments.get("truncation") in (None, False, "do_not_truncate"):
        for index, ids in enumerate(columns["input_ids"]):
            if len(ids) > limit:
                raise ValueError(f"`text` entry {index} has {len(ids)} tokens, but at most {limit} are allowed.")
    else:
        columns = _truncate(columns, limit, tokenizer.truncation_side, placeholder_ids)
    side = arguments.get("padding_side") or ("right" if "labels" in columns else "left")
    padded = tokenizer.pad(
        {"input_ids": columns["input_ids"]},
        padding=arguments.get("padding", True),
        max_length=max_length and limit,
        pad_to_multiple_of=arguments.get("pad_to_multiple_of"),
        padding_side=side,
        return_attention_mask=True,
        verbose=False,
    )
    result = {**columns, **padded}
    for name in _FILLS.keys() & columns.keys():  # `tokenizer.pad` leaves them as they are
        rows = zip(columns[name], padded["input_ids"], strict=True)
        fills = [(row, [_FILLS[name]] * (len(ids) - len(row))) for row, ids in rows]
        result[name] = [fill + row if side == "left" else row + fill for row, fill in fills]
    return result


def _truncate(
    columns: dict[str, list[Any]], limit: int, side: str, placeholder_ids: tuple[int, int]
) -> dict[str, list[Any]]:
    """Cuts the ends of texts, or their starts, with their labels and offsets."""
    kept = slice(-limit, None) if side == "left" else slice(limit)
    for index, ids in enumerate(columns["input_ids"]):
        if len(ids) <= limit:
            continue
        if any(ids.count(token_id) != ids[kept].count(token_id) for token_id in placeholder_ids):
            raise ValueError(
                f"`text` entry {index} has {len(ids)} tokens. `truncation` to {limit} would cut placeholders of "
                "images or videos off; increase `max_length`."
            )
        if "labels" in columns and set(columns["labels"][index][kept]) <= {-100}:
            raise ValueError(
                f"`text` entry {index} has {len(ids)} tokens. `truncation` to {limit} would cut all labels off; "
                "increase `max_length`."
            )
    cut = {"input_ids", *_FILLS} & columns.keys()
    return {name: [row[kept] for row in rows] if name in cut else rows for name, rows in columns.items()}
