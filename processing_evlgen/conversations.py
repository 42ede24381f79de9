"""Conversations in the usual `messages` format as token ids, with labels on what the assistant says."""

from typing import Any

from transformers import ProcessorMixin

_ROLES = ("system", "user", "assistant")
_PARTS = ("image", "video", "text")


def encode_conversation(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation, by the processor's chat template.

    Up to each of the assistant's turns the ids are those that generation would start from; its words and the token
    that ends them are labels.

    Args:
        processor ([`EVLGenProcessor`]): Has the template and the tokenizer.
        messages (`list[dict]`):
            Turns `{"role": "system" | "user" | "assistant", "content": str | list[dict]}`; a part of a content is
            `{"type": "image"}`, `{"type": "video"}` or `{"type": "text", "text": str}`. The last turn is the
            assistant's.

    Returns:
        Two lists of the same length; labels are -100 outside the assistant's turns.

    Raises:
        ValueError: If there is no chat template, a message is none, or the template rewrites earlier turns or
            does not end the assistant's with the processor's `end_of_text`.
    """
    if processor.chat_template is None:
        raise ValueError("Conversations need a chat template, and the processor has none.")
    turns = check_conversation(messages, image_token=processor.image_token, video_token=processor.video_token)
    ids: list[int] = []
    labels: list[int] = []
    written = ""  # what the ids stand for
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(turns[:index], add_generation_prompt=True)
        if not prompt.startswith(written):
            raise ValueError(
                "The chat template does not write an earlier turn of the assistant as it was trained, followed by "
                f"`end_of_text`: {prompt!r} does not start with {written!r}."
            )
        prompt_ids = processor.tokenize_prompt(prompt.removeprefix(written), add_special_tokens=not written)
        answer = turn["content"]
        answer_ids = [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], processor.end_of_text_id]
        ids += prompt_ids + answer_ids
        labels += [-100] * len(prompt_ids) + answer_ids
        written = prompt + answer + processor.tokenizer.decode([processor.end_of_text_id])
    return ids, labels


def check_conversation(
    messages: Any,
    num_images: int | None = None,
    num_videos: int | None = None,
    image_token: str = "<image>",
    video_token: str = "<video>",
) -> list[dict[str, Any]]:
    """The turns of one conversation to train on, the assistant's contents as strings.

    Args:
        messages (`list[dict]`): As for [`encode_conversation`].
        num_images, num_videos (`int`, *optional*): How many it must have a place for.
        image_token, video_token (`str`, *optional*): What stands for one within a text.

    Raises:
        ValueError: If it is no such conversation, or has places for other numbers of images or videos.
    """
    if not isinstance(messages, list):
        raise ValueError(f"`messages` must be a list of turns, but is {messages!r}.")
    turns = [_check(index, message) for index, message in enumerate(messages)]
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("`messages` must end with a turn of the assistant.")
    for kind, token, wanted in (("image", image_token, num_images), ("video", video_token, num_videos)):
        if any(token in turn["content"] for turn in turns if turn["role"] == "assistant"):
            raise ValueError(f"`messages` must not have the assistant say the placeholder {token}.")
        found = sum(_count(turn["content"], kind, token) for turn in turns)
        if wanted is not None and found != wanted:
            raise ValueError(f"`messages` has places for {found} {kind}s, but there are {wanted}.")
    return turns


def _count(content: str | list[dict[str, Any]], kind: str, token: str) -> int:
    if isinstance(content, str):
        return content.count(token)
    return sum((part["type"] == kind) + part.get("text", "").count(token) for part in content)


def _check(index: int, message: Any) -> dict[str, Any]:
    """The message, with an assistant's content as one string."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES or "content" not in message:
        raise ValueError(
            f"`messages` must hold turns with a `role` of {', '.join(_ROLES)} and a `content`, but entry {index} is "
            f"{message!r}."
        )
    content = message["content"]
    if isinstance(content, list):  # a data set's table fills absent keys with None
        content = [_check_part(index, part) for part in content]
    elif not isinstance(content, str):
        raise ValueError(f"`messages` entry {index} must have a text or a list as `content`, but has {content!r}.")
    if message["role"] == "assistant" and isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise ValueError(f"`messages` entry {index} must be text alone, as the assistant's, but is {content!r}.")
        content = "".join(part["text"] for part in content)
    if message["role"] == "assistant" and not content.strip():
        raise ValueError(f"`messages` entry {index} is an empty turn of the assistant.")
    return {"role": message["role"], "content": content}


def _check_part(index: int, part: Any) -> dict[str, Any]:
    is_part = isinstance(part, dict) and part.get("type") in _PARTS
    if not is_part or (part["type"] == "text" and not isinstance(part.get("text"), str)):
        raise ValueError(
            f"`messages` entry {index} must hold parts such as {{'type': 'image'}} and {{'type': 'text', 'text': …}}, "
            f"but holds {part!r}."
        )
    return {key: value for key, value in part.items() if value is not None}
