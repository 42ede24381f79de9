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
from .images import MAX_PIXELS, load_rgb_image
from .inputs import count_images_per_text, flatten_images, flatten_videos, list_strings
from .token_ids import check_plain_text, pad
from .videos import load_rgb_frames

# Most language models' chat templates take a message's content as one string. This joins a list of parts into one.
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
    """Cleans a caption as the original does: lower case, ``.!"()*#:;~`` to spaces, single spaces, `max_words` words.

    Source: `pre_caption` of the original's `BlipCaptionProcessor` (lavis/processors/blip_processors.py).
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    return " ".join(caption.split()[:max_words])


class EVLGenProcessor(ProcessorMixin):
    r"""
    Prepares inputs for [`EVLGenForConditionalGeneration`].

    Every image and every video takes `num_image_tokens` placeholder tokens. Their position:

    - A text with `image_token` or `video_token` has them there. At the start of a text they come before the BOS token.
    - A text without placeholders has them before the BOS token. With a chat template, the text becomes a turn of the
      user, which starts with them.

    Args:
        image_processor (`BaseImageProcessor`): Resizes and normalises the images for the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer. Missing placeholders are added to it. Without a padding token it pads with
            its EOS token.
        num_image_tokens (`int`): Placeholders of each image or video: the model's `config.num_image_tokens`.
        chat_template (`str`, *optional*):
            Template for messages with images. By default the tokenizer's, if it has one.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder of an image.
        video_token (`str`, *optional*, defaults to `"<video>"`): The placeholder of a video.
        num_frames (`int`, *optional*, defaults to 4): Frames taken of each video.
        end_of_text (`str`, *optional*):
            The token that ends a `suffix` in training and stops generation. By default the tokenizer's EOS token;
            `"\n"` in the paper's OPT recipe.
        clean_captions (`bool`, *optional*, defaults to `False`):
            Whether to clean each `suffix` with [`clean_caption`], as the paper does.
        bos_label (`bool`, *optional*, defaults to `False`):
            Whether the BOS token after the images of an empty prompt is a label, as in the paper's OPT recipe.
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
        # Not normalized: a tokenizer that lower-cases or splits words still finds them.
        placeholders = [AddedToken(token, special=True, normalized=False) for token in (image_token, video_token)]
        tokenizer.add_tokens(placeholders, special_tokens=True)
        tokenizer.padding_side = "left"  # for generation; with labels, `pad` takes the right side
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # labels are masked by length, so a real EOS stays a label
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
        """Id of the token that ends a `suffix` and stops generation.

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
        max_pixels: int = MAX_PIXELS,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (image, path, URL or a list of these, *optional*):
                The images, in the order of their placeholders. [`load_rgb_image`] lists the accepted types.
            text (`str` or `list[str]`, *optional*):
                The prompts. One prompt without placeholders serves all images or videos. Without `text`, prompts are
                empty.
            suffix (`str` or `list[str]`, *optional*):
                The captions or answers to train on, one for each prompt; adds `labels`. They must not hold special
                tokens or `end_of_text`, which the processor adds. See [`check_plain_text`].
            videos (video, path, URL or a list of these, *optional*):
                The videos, in the order of their placeholders. A list of frames (images or arrays) is one video.
                [`load_rgb_frames`] lists the accepted types.
            messages (`list[list[dict]]`, *optional*):
                Conversations to train on, instead of `text` and `suffix`; adds `labels` on the assistant's turns.
                See [`encode_conversation`]. For generation, make a `text` of one with `apply_chat_template`.
            vision_features (`torch.Tensor` of shape `(images, num_vision_tokens, vision_hidden_size)`, *optional*):
                The vision tower's output for the images, instead of `images`. Returned unchanged, for the model.
            num_frames (`int`, *optional*): Frames to take of each video; by default the processor's `num_frames`.
            frame_sampling (`str`, *optional*, defaults to `"uniform"`):
                How to choose them: `"uniform"`, or `"headtail"` for training. See [`sample_frames`].
            max_pixels (`int`, *optional*, defaults to 64,000,000):
                Largest width times height of an image or frame that is decoded. See [`load_rgb_image`].
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
            ValueError: If images, placeholders and texts differ in number, or a text is longer than the language
                model allows. If an image cannot be read or is too large, or an array holds NaN or infinite values. If
                a suffix is empty or holds a special token.
            TypeError: If a text is not a string, or an image of no accepted type.
        """
        if images is None and videos is None and text is None and vision_features is None and messages is None:
            raise ValueError(
                "At least one of `images`, `videos`, `text`, `messages` and `vision_features` must be given."
            )
        if messages is not None and (text is not None or suffix is not None):
            raise ValueError("`messages` is given instead of `text` and `suffix`, not together with them.")
        if images is not None and vision_features is not None:
            raise ValueError("Only one of `images` and `vision_features` can be given.")
        images_per_text = count_images_per_text(images)
        images = [] if images is None else flatten_images(images)
        images = [load_rgb_image(image, max_pixels=max_pixels) for image in images]
        num_images = len(images) if vision_features is None else len(vision_features)
        num_frames = self.num_frames if num_frames is None else num_frames
        videos = [load_rgb_frames(video, num_frames, frame_sampling, max_pixels) for video in flatten_videos(videos)]
        arguments = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_arguments = arguments["text_kwargs"]
        if messages is None:
            sequences, labels = self._encode(
                text, suffix, images_per_text, num_images, len(videos), text_arguments.get("add_special_tokens", True)
            )
        else:
            sequences, labels = self._encode_conversations(messages, images_per_text, num_images, len(videos))
        data = pad(self.tokenizer, sequences, labels, text_arguments)
        if images:
            images_arguments = {**arguments["images_kwargs"], "return_tensors": "pt"}
            data["pixel_values"] = self.image_processor(images, **images_arguments)["pixel_values"]
        if videos:
            data.update(self._stack_videos(videos, arguments["images_kwargs"]))
        if vision_features is not None:
            data["vision_features"] = vision_features
        return BatchFeature(data, tensor_type=text_arguments.get("return_tensors", "pt"))

    def _encode(
        self,
        text: str | list[str] | None,
        suffix: str | list[str] | None,
        images_per_text: list[int] | None,
        num_images: int,
        num_videos: int,
        add_special_tokens: bool,
    ) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of prompts and their suffixes, and labels."""
        if text is None and not num_images and not num_videos:
            raise ValueError("Without a `text`, at least one image or video is needed, but there is none.")
        prompts = list_strings("text", "" if text is None else text)
        if len(prompts) == 1 and not any(token in prompts[0] for token in (self.image_token, self.video_token)):
            prompts = prompts * max(num_images, num_videos, 1)
        if images_per_text is not None:
            self._check_images_per_text(prompts, images_per_text)
        prompts = self._insert_placeholders(prompts, num_images, num_videos)
        prompt_ids = [self.tokenize_prompt(prompt, add_special_tokens) for prompt in prompts]
        if suffix is None:
            return prompt_ids, None
        suffixes = self._clean_suffixes(list_strings("suffix", suffix))
        if len(suffixes) != len(prompts):
            raise ValueError(f"`suffix` has {len(suffixes)} entries, but there are {len(prompts)} prompts.")
        suffix_ids = [
            self._tokenize_suffix(prompt, ids, suffix, add_special_tokens)
            for prompt, ids, suffix in zip(prompts, prompt_ids, suffixes, strict=True)
        ]
        named = {f"`suffix` entry {index}": pair for index, pair in enumerate(zip(suffixes, suffix_ids, strict=True))}
        check_plain_text(self.tokenizer, self.end_of_text_id, named)
        sequences, labels = [], []
        for ids, caption_ids in zip(prompt_ids, suffix_ids, strict=True):
            sequences.append([*ids, *caption_ids, self.end_of_text_id])
            unlabelled = len(ids) - int(self._is_bos_a_label(ids))  # images and prompt carry no loss
            labels.append([-100] * unlabelled + sequences[-1][unlabelled:])
        return sequences, labels

    def _encode_conversations(
        self,
        messages: list[list[dict[str, Any]]],
        images_per_text: list[int] | None,
        num_images: int,
        num_videos: int,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and labels of conversations, checked against the numbers of images and videos."""
        encoded = [encode_conversation(self, conversation) for conversation in messages]
        for name, token_id, given in (
            ("images", self.image_token_id, num_images),
            ("videos", self.video_token_id, num_videos),
        ):
            found = sum(ids.count(token_id) for ids, _ in encoded) // self.num_image_tokens
            if found != given:
                raise ValueError(f"`messages` holds {found} {name}, but `{name}` holds {given}.")
        if images_per_text is not None and len(images_per_text) == len(messages):
            for index, given in enumerate(images_per_text):
                found = encoded[index][0].count(self.image_token_id) // self.num_image_tokens
                if found != given:
                    raise ValueError(f"`messages` entry {index} holds {found} images, but its `images` entry {given}.")
        return [ids for ids, _ in encoded], [labels for _, labels in encoded]

    def _check_images_per_text(self, prompts: list[str], images_per_text: list[int]) -> None:
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if not any(counts) or len(counts) != len(images_per_text):
            return
        for index, (placeholders, images) in enumerate(zip(counts, images_per_text, strict=True)):
            if placeholders != images:
                raise ValueError(
                    f"`text` entry {index} holds {placeholders} {self.image_token} placeholders, but `images` entry "
                    f"{index} holds {images} images."
                )

    def _insert_placeholders(self, prompts: list[str], num_images: int, num_videos: int) -> list[str]:
        """Puts placeholders into prompts that have none, and checks that there is one for each image and video."""
        images = sum(prompt.count(self.image_token) for prompt in prompts)
        videos = sum(prompt.count(self.video_token) for prompt in prompts)
        if images == videos == 0 and (num_images or num_videos):
            if num_images and num_videos:
                raise ValueError("Images and videos together need a `text` whose placeholders show their order.")
            name, count = ("images", num_images) if num_images else ("videos", num_videos)
            if count != len(prompts):
                raise ValueError(f"`{name}` holds {count} {name}, but `text` holds {len(prompts)} prompts.")
            return [self._insert_placeholder(prompt, name.removesuffix("s")) for prompt in prompts]
        for name, token, placeholders, given in (
            ("images", self.image_token, images, num_images),
            ("videos", self.video_token, videos, num_videos),
        ):
            if placeholders != given:
                raise ValueError(
                    f"`text` holds {placeholders} {token} placeholders, but `{name}` holds {given} {name}."
                )
        return prompts

    def _insert_placeholder(self, prompt: str, modality: str) -> str:
        """The prompt after one placeholder; with a chat template, as a turn of the user."""
        if self.chat_template is None:
            return {"image": self.image_token, "video": self.video_token}[modality] + prompt
        parts = [{"type": modality}, *([{"type": "text", "text": prompt}] if prompt else [])]
        return self.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)

    def _stack_videos(self, videos: list[list[Any]], images_arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Prepares all frames as images. Short videos are padded with zeros; then `frame_mask` marks real frames."""
        lengths = [len(video) for video in videos]
        frames = [frame for video in videos for frame in video]
        pixels = self.image_processor(frames, **{**images_arguments, "return_tensors": "pt"})["pixel_values"]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
        padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])  # (videos, frames, channels, height, width)
        padded[mask] = pixels  # pixels: (frames of all videos, channels, height, width)
        return {"pixel_values_videos": padded} if mask.all() else {"pixel_values_videos": padded, "frame_mask": mask}

    def tokenize_prompt(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt with `num_image_tokens` ids for each placeholder.

        Placeholders at the start of the prompt come before the BOS token.
        """
        placeholders = {self.image_token: self.image_token_id, self.video_token: self.video_token_id}
        text, ids = prompt, []
        while token := next((token for token in placeholders if text.startswith(token)), None):
            text = text.removeprefix(token)
            ids += [placeholders[token]] * self.num_image_tokens
        for token in placeholders:  # within the text; those at its start have ids already
            text = text.replace(token, token * self.num_image_tokens)
        bos = self.tokenizer.bos_token
        if bos is not None and text.startswith(bos):  # a chat template has added it
            add_special_tokens = False
        return ids + self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

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

    def _clean_suffixes(self, suffixes: list[str]) -> list[str]:
        cleaned = [clean_caption(suffix) if self.clean_captions else suffix for suffix in suffixes]
        for index, (before, after) in enumerate(zip(suffixes, cleaned, strict=True)):
            if not after.strip():
                raise ValueError(f"`suffix` must not be empty, but entry {index} is {before!r}.")
        return cleaned

    def _is_bos_a_label(self, prompt_ids: list[int]) -> bool:
        if not self.bos_label or prompt_ids[-1] != self.tokenizer.bos_token_id:
            return False
        # The original masks images and prompts. If there is a prompt, it masks BOS as a part of it.
        return all(token in (self.image_token_id, self.video_token_id) for token in prompt_ids[:-1])

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "frame_mask", "labels"]

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves the image processor, the tokenizer, processor_config.json and the code that it names."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
