"""Token ids of prompts and of their captions or answers, with labels or offsets, and the batch that holds them.

`processor` is an [`EVLGenProcessor`]. `budgets` are by placeholder, images first: the number of tokens of each image
and of each video. Columns hold a list for each text: `input_ids`, and optionally `labels` and `offset_mapping`.
"""

import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.tokenization_utils_base import TruncationStrategy

EXACT_INPUTS = ("frame_times", "token_places")  # they stay float32: in bfloat16, 300 and 301 seconds are one time
_FILLS = {"labels": -100, "offset_mapping": (0, 0), "segment_ids": -1}  # for padding, by column


class EVLGenBatch(BatchFeature):
    """A `BatchFeature` in which `labels` are -100 on placeholders, whoever sets them.

    TRL's collators set `batch["labels"]` to a copy of `input_ids`, and its trainers compute loss, entropy and accuracy
    of these labels outside of the model. So the model's own masking of labels does not reach them.
    """

    placeholder_ids: Sequence[int] = ()  # the processor sets them

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "labels" and torch.is_tensor(value):
            value = value.masked_fill(torch.isin(value, value.new_tensor(self.placeholder_ids)), -100)
        super().__setitem__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "placeholder_ids": self.placeholder_ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.placeholder_ids = state.pop("placeholder_ids")
        super().__setstate__(state)

    def to(self, *args: Any, **kwargs: Any) -> "EVLGenBatch":
        """As `BatchFeature.to`, but times stay float32."""
        kept = {name: self[name] for name in EXACT_INPUTS if torch.is_tensor(self.get(name))}
        super().to(*args, **kwargs)
        for name, tensor in kept.items():
            self[name] = tensor.to(self[name].device)
        return self


def clean_caption(caption: str, max_words: int = 50) -> str:
    """Cleans a caption as the original does: lower case, ``.!"()*#:;~`` to spaces, single spaces, `max_words` words.

    Source: `pre_caption` of the original's `BlipCaptionProcessor` (lavis/processors/blip_processors.py).
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    return " ".join(caption.split()[:max_words])


def encode_text(
    processor: ProcessorMixin,
    text: str | list[str] | None,
    suffix: str | list[str] | None,
    budgets: dict[str, list[int]],
    images_per_text: list[int] | None,
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    """Columns of prompts, and of their suffixes if there are any. `arguments` are the tokenizer's."""
    num_images, num_videos = map(len, budgets.values())
    if text is None and not num_images and not num_videos:
        raise ValueError("Without a `text`, at least one image or video is needed, but there is none.")
    prompts = _list_strings("text", "" if text is None else text)
    if not any(token in prompt for prompt in prompts for token in budgets):
        prompts = _insert_placeholders(processor, prompts, num_images, num_videos)
    rows, offsets = expand_placeholders(processor, "text", [[prompt] for prompt in prompts], budgets, images_per_text)
    add_special_tokens = arguments.get("add_special_tokens", True)
    if suffix is not None:
        return _encode_suffixes(processor, [prompt for (prompt,) in rows], suffix, add_special_tokens)
    names = ["input_ids", "offset_mapping"] if arguments.get("return_offsets_mapping") else ["input_ids"]
    encoded = [tokenize_prompt(processor, prompt, add_special_tokens, len(names) == 2) for (prompt,) in rows]
    columns = {name: [row[name] for row in encoded] for name in names}
    if arguments.get("return_text_replacement_offsets"):
        columns["text_replacement_offsets"] = offsets
    return columns


def count_texts(suffix: Any) -> list[int] | None:
    """The number of texts of each image, if `suffix` holds a list for each. A list must not be empty."""
    if not isinstance(suffix, list | tuple) or not any(isinstance(texts, list | tuple) for texts in suffix):
        return None
    for index, texts in enumerate(suffix):
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(f"`suffix` must hold a list of texts for each image, but entry {index} is {texts!r}.")
    return [len(texts) for texts in suffix]


def repeat_for_texts(
    processor: ProcessorMixin,
    text: Any,
    suffix: list[list[str]],
    budgets: dict[str, list[int]],
    images_per_text: list[int] | None,
) -> tuple[list[str], list[str], dict[str, list[int]], list[int] | None]:
    """Of a list of suffixes for each image, the arguments of [`encode_text`] with a prompt and an image for each.

    `text` is one prompt for all, one for each image, or a list as long as the image's suffixes.
    """
    counts = [len(row) for row in suffix]
    rows = [text or ""] * len(counts) if text is None or isinstance(text, str) else list(text)
    prompts = [[row] * count if isinstance(row, str) else row for row, count in zip(rows, counts, strict=False)]
    lengths = [len(row) if isinstance(row, list | tuple) else row for row in prompts]
    if len(rows) != len(counts) or lengths != counts:
        raise ValueError(f"`suffix` holds {counts} texts for its images, but `text` holds {lengths} of {len(rows)}.")
    flat = _list_strings("text", [prompt for row in prompts for prompt in row])
    repeated: dict[str, list[int]] = {}
    has_placeholders = any(token in prompt for prompt in flat for token in budgets)
    for token, numbers in budgets.items():
        # Without placeholders, each image gets one.
        own = [{prompt.count(token) if has_placeholders else int(bool(numbers)) for prompt in row} for row in prompts]
        if not has_placeholders and numbers and len(numbers) != len(counts):
            raise ValueError(f"`suffix` holds {len(counts)} lists, but there are {len(numbers)} images or videos.")
        if any(len(found) > 1 for found in own) or sum(map(max, own)) != len(numbers):
            wanted = f"the {token} placeholders of an image's texts must be as many as its images or videos"
            raise ValueError(f"`text`: {wanted}, {len(numbers)} in all, but they are {list(map(sorted, own))}.")
        remaining = iter(numbers)
        items = [list(islice(remaining, max(found))) for found in own]
        repeated[token] = [number for row, count in zip(items, counts, strict=True) for number in row * count]
    if not any(repeated.values()):
        raise ValueError("A list of `suffix` for each image needs images or videos, but there are none.")
    if images_per_text is not None and len(images_per_text) == len(counts):
        pairs = zip(images_per_text, counts, strict=True)
        images_per_text = [number for number, count in pairs for _ in range(count)]
    return flat, [entry for row in suffix for entry in row], repeated, images_per_text


def share_prefixes(
    processor: ProcessorMixin, columns: dict[str, list[list[int]]], counts: list[int]
) -> dict[str, list[list[int]]]:
    """Joins the texts of each image in one row: what they start with alike and without label, then the rest of each.

    Adds `segment_ids`: 0 on the prefix, n on the rest of the n-th text.
    """
    shared: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "segment_ids": []}
    remaining = zip(columns["input_ids"], columns["labels"], strict=True)
    placeholders = set(processor.placeholders.values())
    for index, count in enumerate(counts):
        texts = list(islice(remaining, count))
        columns_of_texts = zip(*(zip(ids, labels, strict=True) for ids, labels in texts), strict=False)
        length = 0
        for tokens in columns_of_texts:
            if len(set(tokens)) > 1 or tokens[0][1] != -100:
                break
            length += 1
        if any(placeholders.intersection(ids[length:]) for ids, _ in texts):
            raise ValueError(f"`text` entry {index}: the texts of an image must be alike up to the end of the image.")
        ids, labels = ([*texts[0][part][:length]] for part in (0, 1))
        segments = [0] * length
        for number, (own_ids, own_labels) in enumerate(texts, start=1):
            ids += own_ids[length:]
            labels += own_labels[length:]
            segments += [number] * (len(own_ids) - length)
        for name, row in zip(shared, (ids, labels, segments), strict=True):
            shared[name].append(row)
    return shared


def _list_strings(name: str, value: str | list[str]) -> list[str]:
    """One string or several as a list; `name` is the argument's, for the error."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    for entry in values:
        if not isinstance(entry, str):
            raise TypeError(f"`{name}` must be a string or a list of strings, but holds a {type(entry).__name__}.")
    return values


def _insert_placeholders(processor: ProcessorMixin, prompts: list[str], num_images: int, num_videos: int) -> list[str]:
    """Puts a placeholder before each prompt; with a chat template, both become a turn of the user."""
    if num_images and num_videos:
        raise ValueError("Images and videos together need a `text` whose placeholders show their order.")
    if not num_images and not num_videos:
        return prompts
    modality, count = ("video", num_videos) if num_videos else ("image", num_images)
    prompts = prompts * count if len(prompts) == 1 else prompts
    if count != len(prompts):
        raise ValueError(f"`{modality}s` holds {count} {modality}s, but `text` holds {len(prompts)} prompts.")
    if processor.chat_template is None:
        token = processor.video_token if num_videos else processor.image_token
        return [token + prompt for prompt in prompts]
    parts = [[{"type": modality}, *([{"type": "text", "text": prompt}] if prompt else [])] for prompt in prompts]
    turns = [[{"role": "user", "content": content}] for content in parts]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def expand_placeholders(
    processor: ProcessorMixin,
    argument: str,
    rows: list[list[str]],
    budgets: dict[str, list[int]],
    images_per_text: list[int] | None,
) -> tuple[list[list[str]], list[list[dict[str, Any]]]]:
    """Repeats each placeholder as often as its image or video has tokens.

    `rows` hold the texts of each conversation, or each text alone. The `argument` of the call is for the errors, and
    `images_per_text` is the number of images of each row. Also returns the offsets of `get_text_with_replacements`.
    Raises a ValueError if there is not one placeholder for each image and video.
    """
    found = {token: [sum(text.count(token) for text in row) for row in rows] for token in budgets}
    if images_per_text is not None and len(images_per_text) == len(rows):
        for index, (count, given) in enumerate(zip(found[processor.image_token], images_per_text, strict=True)):
            if count != given:
                raise ValueError(
                    f"`{argument}` entry {index} holds {count} {processor.image_token} placeholders, but `images` "
                    f"entry {index} holds {given} images."
                )
    for name, (token, numbers) in zip(("images", "videos"), budgets.items(), strict=True):
        if sum(found[token]) != len(numbers):
            # Ends as transformers' own error does, which its common tests look for.
            raise ValueError(
                f"`{argument}` holds {sum(found[token])} {token} placeholders, but `{name}` holds {len(numbers)} "
                f"{name}. The number of {token} tokens in the prompts should be the same as the number of {name}."
            )
    replacements = [[token * number for number in numbers] for token, numbers in budgets.items()]
    texts, offsets = processor.get_text_with_replacements([text for row in rows for text in row], *replacements)
    remaining = iter(texts)
    return [[next(remaining) for _ in row] for row in rows], offsets


def tokenize_prompt(
    processor: ProcessorMixin, prompt: str, add_special_tokens: bool = True, offsets: bool = False
) -> dict[str, list[Any]]:
    """`input_ids` of a prompt, and its `offset_mapping`, whole if requested. Placeholders at its start precede BOS."""
    ids, spans, start = [], [], 0
    while token := next((token for token in processor.placeholders if prompt.startswith(token, start)), None):
        ids.append(processor.placeholders[token])
        spans.append((start, start + len(token)))
        start += len(token)
    bos = processor.tokenizer.bos_token
    if bos is not None and prompt.startswith(bos, start):  # a chat template has added it
        add_special_tokens = False
    encoded = processor.tokenizer(
        prompt[start:], add_special_tokens=add_special_tokens, return_offsets_mapping=offsets
    )
    spans += [(start + first, start + last) for first, last in encoded.get("offset_mapping", ())]
    return {"input_ids": ids + encoded["input_ids"], "offset_mapping": spans}


def _encode_suffixes(
    processor: ProcessorMixin, prompts: list[str], suffix: str | list[str], add_special_tokens: bool
) -> dict[str, list[list[int]]]:
    """Ids of prompts with their suffixes, and labels."""
    suffixes = _list_strings("suffix", suffix)
    if len(suffixes) != len(prompts):
        raise ValueError(f"`suffix` has {len(suffixes)} entries, but there are {len(prompts)} prompts.")
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    texts, bos_id = {}, processor.tokenizer.bos_token_id
    for index, (prompt, given) in enumerate(zip(prompts, suffixes, strict=True)):
        text = clean_caption(given) if processor.clean_captions else given
        if not text.strip():
            raise ValueError(f"`suffix` must not be empty, but entry {index} is {given!r}.")
        ids = tokenize_prompt(processor, prompt, add_special_tokens)["input_ids"]
        suffix_ids = _tokenize_suffix(processor, prompt, ids, text, add_special_tokens)
        texts[f"`suffix` entry {index}"] = text, suffix_ids
        sequence = [*ids, *suffix_ids, processor.end_of_text_id]
        # Images and prompt carry no loss. The original also masks BOS as a part of a prompt, if there is one.
        is_bos_alone = ids[-1:] == [bos_id] and set(ids[:-1]) <= set(processor.placeholders.values())
        unlabelled = len(ids) - int(processor.bos_label and is_bos_alone)
        columns["input_ids"].append(sequence)
        columns["labels"].append([-100] * unlabelled + sequence[unlabelled:])
    check_plain_text(processor.tokenizer, processor.end_of_text_id, texts)
    return columns


def _tokenize_suffix(
    processor: ProcessorMixin, prompt: str, prompt_ids: list[int], suffix: str, add_special_tokens: bool
) -> list[int]:
    """Ids of a suffix as it follows the prompt in running text."""
    has_question = prompt.replace(processor.image_token, "").replace(processor.video_token, "") != ""
    is_running_text = processor.chat_template is None and has_question
    separator = " " if is_running_text and not prompt[-1].isspace() else ""
    ids = tokenize_prompt(processor, prompt + separator + suffix, add_special_tokens)["input_ids"]
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    # The last letters of the prompt and the first of the suffix share a token. Generation sees the prompt alone.
    return processor.tokenizer(suffix, add_special_tokens=False)["input_ids"]


def check_plain_text(tokenizer: PreTrainedTokenizerBase, end_id: int, texts: dict[str, tuple[str, list[int]]]) -> None:
    """Checks that texts to train on hold neither special tokens nor the end of a text.

    Such a token would be a label in the middle, where the model would learn to stop. It is refused rather than encoded
    letter by letter: it shows that markup is left in the data. `texts` are texts with their ids, by their names.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Letters that a tokenizer does not know become its unknown token, which ends nothing.
    refused = special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id, end_id}
    for name, (text, ids) in texts.items():
        if found := refused.intersection(ids):
            token = tokenizer.decode([found.pop()])
            raise ValueError(f"{name} must not hold {token!r}, a special token or the end of a text, but is {text!r}.")


def pad(
    processor: ProcessorMixin,
    columns: dict[str, list[Any]],
    arguments: dict[str, Any],
    texts_per_image: list[int] | None = None,
) -> dict[str, list[Any]]:
    """Truncates columns if requested, and pads them: ids on the left; ids and labels on the right.

    `arguments` are the tokenizer's. With numbers of `texts_per_image`, the texts of an image share a row. Returns the
    columns with `attention_mask`; those of other names are unchanged. Raises a ValueError if there is no text, one is
    too long or would lose placeholders or labels, or an argument is bad.
    """
    if not columns["input_ids"]:
        raise ValueError("`text` or `messages` is an empty list.")
    for name in ("max_length", "pad_to_multiple_of"):
        number = arguments.get(name)
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"`{name}` must be an integer of 1 or more, but is {number!r}.")
    tokenizer, max_length = processor.tokenizer, arguments.get("max_length")
    side = arguments.get("padding_side") or ("right" if "labels" in columns else "left")
    if side not in ("left", "right"):
        raise ValueError(f"`padding_side` must be left or right, but is {side!r}.")
    limit = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    truncation = arguments.get("truncation") or "do_not_truncate"
    if truncation not in (True, *TruncationStrategy):
        raise ValueError(f"`truncation` must be True or False, but is {truncation!r}.")
    truncates = truncation != TruncationStrategy.DO_NOT_TRUNCATE
    kept = slice(-limit, None) if tokenizer.truncation_side == "left" else slice(limit)
    for index, ids in enumerate(columns["input_ids"]):
        if len(ids) <= limit:
            continue
        if not truncates:
            raise ValueError(f"`text` entry {index} has {len(ids)} tokens, but at most {limit} are allowed.")
        lost = None
        if any(ids.count(token_id) != ids[kept].count(token_id) for token_id in processor.placeholders.values()):
            lost = "placeholders of images or videos"
        elif "labels" in columns and set(columns["labels"][index][kept]) <= {-100}:
            lost = "all labels"
        if lost is not None:
            reason = f"`truncation` to {limit} would cut {lost} off; increase `max_length`"
            raise ValueError(f"`text` entry {index} has {len(ids)} tokens. {reason}.")
        for name in {"input_ids", *_FILLS} & columns.keys():
            columns[name][index] = columns[name][index][kept]
    if texts_per_image is not None:
        columns = share_prefixes(processor, columns, texts_per_image)
        limit = max(limit, *map(len, columns["input_ids"]))  # of a row
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
