"""Encodes prompts and their captions or answers as token ids, with labels or offsets."""

import re
from collections.abc import Container
from typing import Any

from transformers import ProcessorMixin

from .conversations import encode_conversation
from .inputs import list_strings
from .token_ids import check_plain_text, expand_placeholders


def clean_caption(caption: str, max_words: int = 50) -> str:
    """Cleans a caption as the original does: lower case, ``.!"()*#:;~`` to spaces, single spaces, `max_words` words.

    Source: `pre_caption` of the original's `BlipCaptionProcessor` (lavis/processors/blip_processors.py).
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    return " ".join(caption.split()[:max_words])


class PromptEncoder(ProcessorMixin):
    """The part of [`EVLGenProcessor`] that encodes texts with placeholders.

    `budgets` are by placeholder id, images first: the number of tokens of each image and of each video.
    """

    def _encode_text(
        self,
        text: str | list[str] | None,
        suffix: str | list[str] | None,
        budgets: dict[int, list[int]],
        images_per_text: list[int] | None,
        arguments: dict[str, Any],
    ) -> dict[str, list[Any]]:
        """Ids of prompts and their suffixes, with labels or offsets."""
        num_images, num_videos = map(len, budgets.values())
        if text is None and not num_images and not num_videos:
            raise ValueError("Without a `text`, at least one image or video is needed, but there is none.")
        prompts = list_strings("text", "" if text is None else text)
        tokens = (self.image_token, self.video_token)
        if not any(token in prompt for prompt in prompts for token in tokens):
            prompts = self._insert_placeholders(prompts, num_images, num_videos)
        placeholders = [tuple(map(prompt.count, tokens)) for prompt in prompts]
        self._check_placeholders("text", placeholders, num_images, num_videos, images_per_text)
        if suffix is None:
            return self._encode_prompts(prompts, budgets, arguments)
        columns = self._encode_suffixes(prompts, suffix, arguments.get("add_special_tokens", True))
        return expand_placeholders(columns, budgets)

    def _encode_conversations(
        self,
        messages: list[list[dict[str, Any]]],
        budgets: dict[int, list[int]],
        images_per_text: list[int] | None,
    ) -> dict[str, list[list[int]]]:
        """Ids and labels of conversations."""
        encoded = [encode_conversation(self, conversation) for conversation in messages]
        placeholders = [tuple(map(ids.count, budgets)) for ids, _ in encoded]
        self._check_placeholders("messages", placeholders, *map(len, budgets.values()), images_per_text)
        columns = {"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]}
        return expand_placeholders(columns, budgets)

    def _insert_placeholders(self, prompts: list[str], num_images: int, num_videos: int) -> list[str]:
        """Puts a placeholder before each prompt; with a chat template, both become a turn of the user."""
        if num_images and num_videos:
            raise ValueError("Images and videos together need a `text` whose placeholders show their order.")
        modality, token, count = "image", self.image_token, num_images
        if num_videos:
            modality, token, count = "video", self.video_token, num_videos
        if not count:
            return prompts
        if len(prompts) == 1:
            prompts = prompts * count
        if count != len(prompts):
            raise ValueError(f"`{modality}s` holds {count} {modality}s, but `text` holds {len(prompts)} prompts.")
        if self.chat_template is None:
            return [token + prompt for prompt in prompts]
        parts = [[{"type": modality}, *([{"type": "text", "text": prompt}] if prompt else [])] for prompt in prompts]
        turns = [[{"role": "user", "content": content}] for content in parts]
        return [self.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]

    def _check_placeholders(
        self,
        argument: str,
        placeholders: list[tuple[int, ...]],
        num_images: int,
        num_videos: int,
        images_per_text: list[int] | None,
    ) -> None:
        """Checks that there is a placeholder for each image and video; `placeholders` has both counts of each text."""
        if images_per_text is not None and len(images_per_text) == len(placeholders):
            for index, ((found, _), given) in enumerate(zip(placeholders, images_per_text, strict=True)):
                if found != given:
                    raise ValueError(
                        f"`{argument}` entry {index} holds {found} {self.image_token} placeholders, but `images` "
                        f"entry {index} holds {given} images."
                    )
        for column, name, token, given in (
            (0, "images", self.image_token, num_images),
            (1, "videos", self.video_token, num_videos),
        ):
            found = sum(row[column] for row in placeholders)
            if found != given:
                # Ends as transformers' own error does, which its common tests look for.
                raise ValueError(
                    f"`{argument}` holds {found} {token} placeholders, but `{name}` holds {given} {name}. The number "
                    f"of {token} tokens in the prompts should be the same as the number of {name}."
                )

    def tokenize_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt, with one id for each placeholder.

        Placeholders at the start of the prompt come before the BOS token.
        """
        text, ids = self._take_placeholders(prompt)
        return ids + self._tokenize(text, add_special_tokens)["input_ids"]

    def _token_spans(self, prompt: str, add_special_tokens: bool) -> list[tuple[int, int]]:
        """Start and end of each token of `tokenize_prompt` in the prompt."""
        text, ids = self._take_placeholders(prompt)
        spans, start = [], 0
        for token_id in ids:
            end = start + len(self.image_token if token_id == self.image_token_id else self.video_token)
            spans.append((start, end))
            start = end
        encoded = self._tokenize(text, add_special_tokens, return_offsets_mapping=True)
        return spans + [(start + first, start + last) for first, last in encoded["offset_mapping"]]

    def _take_placeholders(self, prompt: str) -> tuple[str, list[int]]:
        """The prompt without the placeholders at its start, and their ids."""
        placeholders = {self.image_token: self.image_token_id, self.video_token: self.video_token_id}
        ids = []
        while token := next((token for token in placeholders if prompt.startswith(token)), None):
            prompt = prompt.removeprefix(token)
            ids.append(placeholders[token])
        return prompt, ids

    def _tokenize(self, text: str, add_special_tokens: bool, **kwargs: Any) -> dict[str, Any]:
        bos = self.tokenizer.bos_token
        if bos is not None and text.startswith(bos):  # a chat template has added it
            add_special_tokens = False
        return self.tokenizer(text, add_special_tokens=add_special_tokens, **kwargs)

    def _tokenize_suffix(self, prompt: str, prompt_ids: list[int], suffix: str, add_special_tokens: bool) -> list[int]:
        """Ids of a suffix as it follows the prompt in running text."""
        question = prompt.replace(self.image_token, "").replace(self.video_token, "")
        is_running_text = self.chat_template is None and question != ""
        separator = " " if is_running_text and not prompt[-1].isspace() else ""
        ids = self.tokenize_prompt(prompt + separator + suffix, add_special_tokens)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        # The last letters of the prompt and the first of the suffix share a token. Generation sees the prompt alone.
        return self.tokenizer(suffix, add_special_tokens=False)["input_ids"]

    def _is_bos_a_label(self, prompt_ids: list[int]) -> bool:
        if not self.bos_label or prompt_ids[-1] != self.tokenizer.bos_token_id:
            return False
        # The original masks images and prompts. If there is a prompt, it masks BOS as a part of it.
        return all(token in (self.image_token_id, self.video_token_id) for token in prompt_ids[:-1])

    def _encode_prompts(
        self, prompts: list[str], budgets: dict[int, list[int]], arguments: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """Ids of prompts, and the requested offsets."""
        add_special_tokens = arguments.get("add_special_tokens", True)
        ids = [self.tokenize_prompt(prompt, add_special_tokens) for prompt in prompts]
        columns: dict[str, list[Any]] = {"input_ids": ids}
        if arguments.get("return_offsets_mapping"):
            columns["offset_mapping"] = [self._token_spans(prompt, add_special_tokens) for prompt in prompts]
        columns = expand_placeholders(columns, budgets)
        if arguments.get("return_text_replacement_offsets"):
            images = [self.image_token * budget for budget in budgets[self.image_token_id]]
            videos = [self.video_token * budget for budget in budgets[self.video_token_id]]
            _, columns["text_replacement_offsets"] = self.get_text_with_replacements(list(prompts), images, videos)
            if "offset_mapping" in columns:
                rows = zip(columns["offset_mapping"], columns["input_ids"], strict=True)
                columns["offset_mapping"] = [_expanded(*row, budgets.keys()) for row in rows]
        return columns

    def _encode_suffixes(
        self, prompts: list[str], suffix: str | list[str], add_special_tokens: bool
    ) -> dict[str, list[list[int]]]:
        """Ids of prompts with their suffixes, and labels."""
        suffixes = list_strings("suffix", suffix)
        if len(suffixes) != len(prompts):
            raise ValueError(f"`suffix` has {len(suffixes)} entries, but there are {len(prompts)} prompts.")
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        texts = {}
        for index, (prompt, given) in enumerate(zip(prompts, suffixes, strict=True)):
            text = clean_caption(given) if self.clean_captions else given
            if not text.strip():
                raise ValueError(f"`suffix` must not be empty, but entry {index} is {given!r}.")
            ids = self.tokenize_prompt(prompt, add_special_tokens)
            suffix_ids = self._tokenize_suffix(prompt, ids, text, add_special_tokens)
            texts[f"`suffix` entry {index}"] = text, suffix_ids
            sequence = [*ids, *suffix_ids, self.end_of_text_id]
            unlabelled = len(ids) - int(self._is_bos_a_label(ids))  # images and prompt carry no loss
            columns["input_ids"].append(sequence)
            columns["labels"].append([-100] * unlabelled + sequence[unlabelled:])
        check_plain_text(self.tokenizer, self.end_of_text_id, texts)
        return columns


def _expanded(spans: list[tuple[int, int]], ids: list[int], placeholder_ids: Container[int]) -> list[tuple[int, int]]:
    """Spans in the text with repeated placeholders. All copies of a placeholder come with its span."""
    result, gained = [], 0
    for index, (start, end) in enumerate(spans):
        if ids[index] in placeholder_ids and index and spans[index - 1] == (start, end):  # a copy
            gained += end - start
        result.append((start + gained, end + gained))
    return result
