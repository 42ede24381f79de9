"""Encodes conversations in the usual `messages` format as token ids, with labels on the assistant's turns."""

from typing import Any

from transformers import ProcessorMixin

from .token_ids import check_plain_text, expand_placeholders, tokenize_prompt

# Most language models' chat templates take a message's content as one string. This joins a list of parts into one.
_JOIN_PARTS = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message.content is string or message.content is none -%}
{%- set text.value = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- set text.value = text.value + {'image': 'IMAGE_TOKEN', 'video': 'VIDEO_TOKEN'}.get(part.type, part.text) -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [dict(message, content=text.value)] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""

_ROLES = ("system", "user", "assistant")


def join_parts(chat_template: str, image_token: str, video_token: str) -> str:
    """A language model's chat template that takes lists of parts as well, with placeholders of images and videos."""
    return _JOIN_PARTS.replace("IMAGE_TOKEN", image_token).replace("VIDEO_TOKEN", video_token) + chat_template


def encode_conversations(
    processor: ProcessorMixin,
    messages: list[list[dict[str, Any]]],
    budgets: dict[str, list[int]],
    images_per_text: list[int] | None,
) -> dict[str, list[list[int]]]:
    """Columns of conversations, by the processor's chat template. `budgets` and columns are as in token_ids.py.

    The ids before each turn of the assistant are those that generation would start from. Labels are the assistant's
    text and the token that ends it.

    A conversation holds turns `{"role": "system" | "user" | "assistant", "content": str | list[dict]}`, the last one
    the assistant's. Parts are `{"type": "image"}`, `{"type": "video"}` or `{"type": "text", "text": str}`.

    Raises:
        ValueError: If there is no chat template, or a message is malformed. If a turn of the assistant holds a special
            token. If the template rewrites earlier turns, or does not end the assistant's with `end_of_text`.
    """
    rows = [_split_conversation(processor, conversation) for conversation in messages]
    prompts = [[prompt for prompt, _ in row] for row in rows]
    prompts, _ = expand_placeholders(processor, "messages", prompts, budgets, images_per_text)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row, expanded in zip(rows, prompts, strict=True):
        ids, labels = [], []
        for prompt, (_, answer) in zip(expanded, row, strict=True):
            prompt_ids = tokenize_prompt(processor, prompt, add_special_tokens=not ids)["input_ids"]
            ids += prompt_ids + answer
            labels += [-100] * len(prompt_ids) + answer
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return columns


def _split_conversation(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """What the template writes before each turn of the assistant, and the ids of the turn with its end."""
    if processor.chat_template is None:
        raise ValueError("Conversations need a chat template, and the processor has none.")
    turns = check_conversation(messages, image_token=processor.image_token, video_token=processor.video_token)
    end_id, parts, text = processor.end_of_text_id, [], ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        # The template writes the conversation up to this turn, as it does for generation.
        prompt = processor.apply_chat_template(turns[:index], add_generation_prompt=True)
        if not prompt.startswith(text):
            wanted = "write an earlier turn of the assistant as it was trained, followed by `end_of_text`"
            raise ValueError(f"The chat template must {wanted}, but {prompt!r} does not start with {text!r}.")
        answer = turn["content"]
        # By itself: generation appends the answer to the prompt's ids, and no token spans both.
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        check_plain_text(processor.tokenizer, end_id, {f"`messages` entry {index}": (answer, ids)})
        parts.append((prompt.removeprefix(text), [*ids, end_id]))
        text = prompt + answer + processor.tokenizer.decode([end_id])
    return parts


def check_conversation(
    messages: Any,
    num_images: int | None = None,
    num_videos: int | None = None,
    image_token: str = "<image>",
    video_token: str = "<video>",
) -> list[dict[str, Any]]:
    """Checks one conversation to train on, as for [`encode_conversations`], and returns its turns.

    Contents of the assistant's turns are strings there. Raises a ValueError if the conversation is malformed, or has
    places for other numbers of images and videos than `num_images` and `num_videos`, if these are given.
    """
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list of turns, but is {messages!r}.")
    turns = [_check_turn(index, message) for index, message in enumerate(messages)]
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("`messages` must end with a turn of the assistant.")
    for modality, token, wanted in (("image", image_token, num_images), ("video", video_token, num_videos)):
        if any(token in turn["content"] for turn in turns if turn["role"] == "assistant"):
            raise ValueError(f"`messages` must not hold the placeholder {token} in a turn of the assistant.")
        parts = [part for turn in turns for part in _list_parts(turn["content"])]
        found = sum((part["type"] == modality) + part.get("text", "").count(token) for part in parts)
        if wanted is not None and found != wanted:
            raise ValueError(f"`messages` has places for {found} {modality}s, but there are {wanted}.")
    return turns


def _list_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _check_turn(index: int, message: Any) -> dict[str, Any]:
    """The message; an assistant's content is joined to one string."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES or "content" not in message:
        wanted = f"turns with a `role` of {', '.join(_ROLES)} and a `content`"
        raise ValueError(f"`messages` must hold {wanted}, but entry {index} is {message!r}.")
    role, content = message["role"], message["content"]
    if not isinstance(content, str | list):
        raise ValueError(f"`messages` entry {index} must have a text or a list as `content`, but has {content!r}.")
    parts = [_check_part(index, part) for part in _list_parts(content)]
    if role != "assistant":
        return {"role": role, "content": content if isinstance(content, str) else parts}
    if any(part["type"] != "text" for part in parts):
        raise ValueError(f"`messages` entry {index} is the assistant's and must be text, but is {content!r}.")
    answer = "".join(part["text"] for part in parts)
    if not answer.strip():
        raise ValueError(f"`messages` entry {index} is an empty turn of the assistant.")
    return {"role": role, "content": answer}


def _check_part(index: int, part: Any) -> dict[str, Any]:
    is_part = isinstance(part, dict) and part.get("type") in ("image", "video", "text")
    if not is_part or (part["type"] == "text" and not isinstance(part.get("text"), str)):
        wanted = "parts such as {'type': 'image'} and {'type': 'text', 'text': …}"
        raise ValueError(f"`messages` entry {index} must hold {wanted}, but holds {part!r}.")
    return {key: value for key, value in part.items() if value is not None}  # `datasets` fills absent keys with None
