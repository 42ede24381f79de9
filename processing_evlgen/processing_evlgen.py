"""EVLGen's processor: images, videos and text in, model inputs and labels out."""

import os
import re
from typing import Any

import torch
from tokenizers import AddedToken
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from configuration_evlgen.hub_code import AUTO_MAP, save_hub_code

from .conversations import encode_conversation
from .images import load_rgb_image
from .inputs import flatten, images_per_text, list_videos, pad_rows, padded_length, strings
from .videos import load_rgb_frames

# Language models' chat templates take a message's content as one string. This turns a list of parts into that string.
_JOIN_PARTS = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message.content is string or message.content is none -%}
{%- set text.value = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set text.value = text.value + 'IMAGE_TOKEN' -%}
{%- elif part.type == 'video' -%}
{%- set text.value = text.value + 'VIDEO_TOKEN' -%}
{%- else -%}
{%- set text.value = text.value + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.messages = ns.messages + [dict(message, content=text.value)] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""


def clean_caption(caption: str, max_words: int = 50) -> str:
    """The original's clean-up: lower case, the marks ``.!"()*#:;~`` to spaces, spaces squeezed, `max_words` words.

    Source: `pre_caption` of the original's `BlipCaptionProcessor` (lavis/processors/blip_processors.py).
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    return " ".join(caption.split()[:max_words])


class EVLGenProcessor(ProcessorMixin):
    r"""
    Prepares inputs for [`EVLGenForConditionalGeneration`].

    Every image and every video takes `num_image_tokens` placeholder tokens. Where they stand:

    - Where the text holds `image_token` or `video_token`, there. At the very start of the text they stand before the
      BOS token.
    - In a text that holds none, before the BOS token and the text; or, where there is a chat template, at the start of
      the user's turn, which the text then becomes.

    Args:
        image_processor (`BaseImageProcessor`): Resizes and normalises the images for the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer. It is given the placeholders if it lacks them, and its EOS token for
            padding if it has no padding token.
        num_image_tokens (`int`): Placeholders for each image or video: the model's `config.num_image_tokens`.
        chat_template (`str`, *optional*):
            Template for messages with images. By default the tokenizer's, if it has one.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder of an image.
        video_token (`str`, *optional*, defaults to `"<video>"`): The placeholder of a video.
        num_frames (`int`, *optional*, defaults to 4): Frames taken of each video.
        end_of_text (`str`, *optional*):
            What ends a `suffix` in training. By default the tokenizer's EOS token; `"\n"` in the paper's OPT recipe.
        clean_captions (`bool`, *optional*, defaults to `False`):
            Whether to clean a `suffix` up as the paper does, see [`clean_caption`].
        bos_label (`bool`, *optional*, defaults to `False`):
            Whether the BOS token that follows the images of an empty prompt is a target too, as in the paper's OPT
            recipe.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        num_frames: int = 4,
        end_of_text: str | None = None,
        clean_captions: bool = False,
        bos_label: bool = False,
    ):
        if not isinstance(num_image_tokens, int) or num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be an integer of 1 or more, but is {num_image_tokens!r}.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`tokenizer` must be a tokenizer, but is {type(tokenizer).__name__}.")
        if chat_template is None and tokenizer.chat_template is not None:
            join_parts = _JOIN_PARTS.replace("IMAGE_TOKEN", image_token).replace("VIDEO_TOKEN", video_token)
            chat_template = join_parts + tokenizer.get_chat_template()
        placeholders = [AddedToken(token, special=True, normalized=False) for token in (image_token, video_token)]
        tokenizer.add_tokens(placeholders, special_tokens=True)
        tokenizer.padding_side = "left"  # generation's; training pads on the right by itself
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token = video_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.num_frames = num_frames
        self.end_of_text = end_of_text
        self.clean_captions = clean_captions
        self.bos_label = bos_label
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def end_of_text_id(self) -> int:
        """Id of the token that ends a `suffix`, at which generation stops.

        Raises:
            ValueError: If `end_of_text` is not a single token.
        """
        if self.end_of_text is None:
            return self.tokenizer.eos_token_id
        ids = self.tokenizer(self.end_of_text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"`end_of_text` must be one token, but {self.end_of_text!r} is {len(ids)}.")
        return ids[0]

    def __call__(
        self,
        images: ImageInput | str | list[str] | None = None,
        text: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        videos: Any = None,
        messages: list[list[dict[str, Any]]] | None = None,
        vision_features: torch.Tensor | None = None,
        num_frames: int | None = None,
        frame_sampling: str = "uniform",
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (image, path, URL or a list of these, *optional*):
                The images, in the order of their placeholders. See [`load_rgb_image`] for what is understood.
            text (`str` or `list[str]`, *optional*):
                The prompts. One prompt without placeholders serves all images or videos; none is an empty prompt.
            suffix (`str` or `list[str]`, *optional*):
                What the model is to say, one for each prompt. Gives `labels`.
            videos (video, path, URL or a list of these, *optional*):
                The videos, in the order of their placeholders. A list of frames (images or arrays) is one video; see
                [`load_rgb_frames`] for what is understood.
            messages (`list[list[dict]]`, *optional*):
                Conversations to train on, instead of `text` and `suffix`. Gives `labels` on all that the assistant
                says; see [`encode_conversation`]. For generation, `apply_chat_template` makes a `text` of one.
            vision_features (`torch.Tensor` of shape `(images, num_vision_tokens, vision_hidden_size)`, *optional*):
                What the vision tower gave for the images, instead of `images`; handed on to the model.
            num_frames (`int`, *optional*): Frames to take of each video; by default the processor's `num_frames`.
            frame_sampling (`str`, *optional*, defaults to `"uniform"`):
                How to choose them: `"uniform"`, or `"headtail"` for training. See [`sample_frames`].
            kwargs:
                Arguments of the image processor, and the tokenizer's `return_tensors` (by default `"pt"`), `padding`
                (by default `True`), `pad_to_multiple_of`, `padding_side`, `max_length` and `add_special_tokens`.

        Returns:
            `BatchFeature` with
            - `input_ids`, `attention_mask`: int64, `(batch, sequence)`, padded on the left; on the right with
              labels.
            - `pixel_values`: float32, `(images, channels, height, width)`, if there are images.
            - `pixel_values_videos`: float32, `(videos, frames, channels, height, width)`, if there are videos; and
              `frame_mask`: bool, `(videos, frames)`, if they differ in their number of frames.
            - `labels`: int64, `(batch, sequence)`, with a `suffix` or `messages`: -100 on images, prompts and padding.

        Raises:
            ValueError: If images, placeholders and texts differ in number, an image cannot be read, a suffix is empty
                or a text is longer than the language model allows.
            TypeError: If a text is not a string.
        """
        if images is None and videos is None and text is None and vision_features is None and messages is None:
            raise ValueError(
                "At least one of `images`, `videos`, `text`, `messages` and `vision_features` must be given."
            )
        if messages is not None and (text is not None or suffix is not None):
            raise ValueError("`messages` is given instead of `text` and `suffix`, not beside them.")
        if images is not None and vision_features is not None:
            raise ValueError("Only one of `images` and `vision_features` can be given.")
        row_lengths = images_per_text(images)
        images = [] if images is None else [load_rgb_image(image) for image in flatten(images)]
        num_images = len(images) if vision_features is None else len(vision_features)
        num_frames = self.num_frames if num_frames is None else num_frames
        videos = [load_rgb_frames(video, num_frames, frame_sampling) for video in list_videos(videos)]
        arguments = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_arguments = arguments["text_kwargs"]
        if messages is None:
            sequences, labels = self._encode(
                text, suffix, row_lengths, num_images, len(videos), text_arguments.get("add_special_tokens", True)
            )
        else:
            sequences, labels = self._encode_conversations(messages, row_lengths, num_images, len(videos))
        data = self._pad(sequences, labels, text_arguments)
        if images:
            images_arguments = {**arguments["images_kwargs"], "return_tensors": "pt"}
            data["pixel_values"] = self.image_processor(images, **images_arguments)["pixel_values"]
        if videos:
            data.update(self._stack(videos, arguments["images_kwargs"]))
        if vision_features is not None:
            data["vision_features"] = vision_features
        return BatchFeature(data, tensor_type=text_arguments.get("return_tensors", "pt"))

    def _encode(
        self,
        text: str | list[str] | None,
        suffix: str | list[str] | None,
        row_lengths: list[int] | None,
        num_images: int,
        num_videos: int,
        add_special_tokens: bool,
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of prompts, and with suffixes those as well, and labels; masked by length, as padding may be EOS."""
        prompts = strings("text", "" if text is None else text)
        if len(prompts) == 1 and not any(token in prompts[0] for token in (self.image_token, self.video_token)):
            prompts = prompts * max(num_images, num_videos, 1)
        if row_lengths is not None:
            self._check_rows(prompts, row_lengths)
        prompts = self._place(prompts, num_images, num_videos)
        prompt_ids = [self.tokenize_prompt(prompt, add_special_tokens) for prompt in prompts]
        if suffix is None:
            return prompt_ids, None
        suffixes = self._clean(strings("suffix", suffix))
        if len(suffixes) != len(prompts):
            raise ValueError(f"`suffix` has {len(suffixes)} entries, but there are {len(prompts)} prompts.")
        sequences, labels = [], []
        for prompt, ids, words in zip(prompts, prompt_ids, suffixes, strict=True):
            suffix_ids = self._tokenize_suffix(prompt, ids, words, add_special_tokens)
            unlabelled = len(ids) - int(self._labels_bos(ids))
            sequences.append(ids + suffix_ids)
            labels.append([-100] * unlabelled + sequences[-1][unlabelled:])
        return sequences, labels

    def _encode_conversations(
        self,
        messages: list[list[dict[str, Any]]],
        row_lengths: list[int] | None,
        num_images: int,
        num_videos: int,
    ) -> tuple[list[list[int]], list[list[int]]]:
        encoded = [encode_conversation(self, conversation) for conversation in messages]
        for name, token_id, wanted in (
            ("images", self.image_token_id, num_images),
            ("videos", self.video_token_id, num_videos),
        ):
            found = sum(ids.count(token_id) for ids, _ in encoded) // self.num_image_tokens
            if found != wanted:
                raise ValueError(f"`messages` holds {found} {name}, but `{name}` holds {wanted}.")
        for index, wanted in enumerate(row_lengths if row_lengths and len(row_lengths) == len(messages) else []):
            found = encoded[index][0].count(self.image_token_id) // self.num_image_tokens
            if found != wanted:
                raise ValueError(f"`messages` entry {index} holds {found} images, but its `images` entry {wanted}.")
        return [ids for ids, _ in encoded], [labels for _, labels in encoded]

    def _check_rows(self, prompts: list[str], images_per_text: list[int]) -> None:
        found = [prompt.count(self.image_token) for prompt in prompts]
        if not any(found) or len(found) != len(images_per_text):
            return
        for index, (placeholders, images) in enumerate(zip(found, images_per_text, strict=True)):
            if placeholders != images:
                raise ValueError(
                    f"`text` entry {index} holds {placeholders} {self.image_token} placeholders, but `images` entry "
                    f"{index} holds {images} images."
                )

    def _place(self, prompts: list[str], num_images: int, num_videos: int) -> list[str]:
        """Puts placeholders into prompts that have none, and checks that there is one for each image and video."""
        images = sum(prompt.count(self.image_token) for prompt in prompts)
        videos = sum(prompt.count(self.video_token) for prompt in prompts)
        if images == videos == 0 and (num_images or num_videos):
            if num_images and num_videos:
                raise ValueError("Images and videos together need a `text` whose placeholders say where they go.")
            name, count = ("images", num_images) if num_images else ("videos", num_videos)
            if count != len(prompts):
                raise ValueError(f"`{name}` holds {count} {name}, but `text` holds {len(prompts)} prompts.")
            return [self._wrap(prompt, name.removesuffix("s")) for prompt in prompts]
        for name, token, found, wanted in (
            ("images", self.image_token, images, num_images),
            ("videos", self.video_token, videos, num_videos),
        ):
            if found != wanted:
                raise ValueError(f"`text` holds {found} {token} placeholders, but `{name}` holds {wanted} {name}.")
        return prompts

    def _wrap(self, prompt: str, kind: str) -> str:
        if self.chat_template is None:
            return {"image": self.image_token, "video": self.video_token}[kind] + prompt
        parts = [{"type": kind}, *([{"type": "text", "text": prompt}] if prompt else [])]
        return self.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    def _stack(self, videos: list[list[Any]], images_arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Prepares all frames as images; short videos are filled up with zeros, which `frame_mask` tells."""
        lengths = [len(video) for video in videos]
        frames = [frame for video in videos for frame in video]
        pixels = self.image_processor(frames, **{**images_arguments, "return_tensors": "pt"})["pixel_values"]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
        padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])  # (videos, frames, channels, height, width)
        padded[mask] = pixels
        return {"pixel_values_videos": padded} if mask.all() else {"pixel_values_videos": padded, "frame_mask": mask}

    def tokenize_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt with all its placeholders; those at its very start come before the BOS token."""
        placeholders = {self.image_token: self.image_token_id, self.video_token: self.video_token_id}
        rest, first = prompt, []
        while token := next((token for token in placeholders if rest.startswith(token)), None):
            rest = rest.removeprefix(token)
            first += [placeholders[token]] * self.num_image_tokens
        for token in placeholders:
            rest = rest.replace(token, token * self.num_image_tokens)
        bos = self.tokenizer.bos_token
        if bos is not None and rest.startswith(bos):  # a chat template has added it
            add_special_tokens = False
        return first + self.tokenizer(rest, add_special_tokens=add_special_tokens)["input_ids"]

    def _tokenize_suffix(self, prompt: str, prompt_ids: list[int], suffix: str, add_special_tokens: bool) -> list[int]:
        """Ids of a suffix and its end, as they follow the prompt in running text."""
        words = prompt.replace(self.image_token, "").replace(self.video_token, "")
        plain = self.chat_template is None and words != ""
        separator = " " if plain and not prompt[-1].isspace() else ""
        ids = self.tokenize_prompt(prompt + separator + suffix, add_special_tokens)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:  # the prompt's last and the suffix's first letters share a token; in generation the prompt stands alone
            ids = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        return [*ids, self.end_of_text_id]

    def _clean(self, suffixes: list[str]) -> list[str]:
        cleaned = [clean_caption(suffix) if self.clean_captions else suffix for suffix in suffixes]
        for index, (before, after) in enumerate(zip(suffixes, cleaned, strict=True)):
            if not after.strip():
                raise ValueError(f"`suffix` must not be empty, but entry {index} is {before!r}.")
            for token in (self.image_token, self.video_token):
                if token in after:
                    raise ValueError(
                        f"`suffix` must not hold the placeholder {token}, but entry {index} is {before!r}."
                    )
        return cleaned

    def _pad(
        self, sequences: list[list[int]], labels: list[list[int]] | None, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Pads ids, and labels if there are any, to one length."""
        limit = min(arguments.get("max_length") or self.tokenizer.model_max_length, self.tokenizer.model_max_length)
        for index, sequence in enumerate(sequences):
            if len(sequence) > limit:
                raise ValueError(f"`text` entry {index} has {len(sequence)} tokens, but at most {limit} are allowed.")
        columns = {
            "input_ids": (sequences, self.tokenizer.pad_token_id),
            "attention_mask": ([[1] * len(sequence) for sequence in sequences], 0),
        }
        if labels is not None:
            columns["labels"] = (labels, -100)
        length = padded_length(max(map(len, sequences)), limit, arguments)
        if length is None:
            return {name: rows for name, (rows, _) in columns.items()}
        side = arguments.get("padding_side") or ("left" if labels is None else "right")
        return {name: pad_rows(rows, length, value, side) for name, (rows, value) in columns.items()}

    def _labels_bos(self, prompt_ids: list[int]) -> bool:
        if not self.bos_label or prompt_ids[-1] != self.tokenizer.bos_token_id:
            return False
        return all(token in (self.image_token_id, self.video_token_id) for token in prompt_ids[:-1])

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "frame_mask", "labels"]

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves image processor, tokenizer, processor_config.json and the code that it names."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
