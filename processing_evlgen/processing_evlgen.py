"""EVLGen's processor: images, videos and text in, model inputs and labels out."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, Unpack

from configuration_evlgen import read_budgets
from configuration_evlgen.hub_code import AUTO_MAP, save_hub_code

from .conversations import encode_conversations, join_parts
from .images import MAX_PIXELS, check_max_tiles, count_tiles, flatten_images, load_rgb_image, prepare_images
from .token_ids import EVLGenBatch, count_texts, encode_text, pad, repeat_for_texts
from .video_processing_evlgen import EVLGenVideoProcessor, EVLGenVideosKwargs, flatten_videos
from .videos import FrameChoice, iterate_rgb_frames

_INPUTS = ("images", "text", "suffix", "videos", "messages", "vision_features", "image_grid_thw", "encoded_video")


class EVLGenImagesKwargs(ImagesKwargs, total=False):
    max_pixels: int | None
    max_tiles: Any  # the processor checks these, and names them
    num_image_tokens: Any


class EVLGenProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: EVLGenImagesKwargs
    videos_kwargs: EVLGenVideosKwargs
    _defaults = {}  # transformers 5.19 reads it


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
            The language model's. Missing placeholders are added to it. Without a padding token it pads with EOS.
        video_processor ([`EVLGenVideoProcessor`], *optional*):
            Reads videos, and lets `image_processor` prepare their frames. By default it takes 4 of each video.
        num_image_tokens (`int`):
            Placeholders of each image or video, by default: the model's `config.num_image_tokens`.
        chat_template (`str`, *optional*): Template for messages with images. By default the tokenizer's.
        image_token, video_token (`str`, *optional*, default to `"<image>"` and `"<video>"`): The placeholders.
        end_of_text (`str`, *optional*):
            The token that ends a `suffix` and stops generation. By default EOS; `"\n"` in the paper's OPT recipe.
        clean_captions (`bool`, defaults to `False`): Whether to clean each `suffix` with [`clean_caption`].
        bos_label (`bool`, defaults to `False`):
            Whether BOS after the images of an empty prompt is a label, as in the paper's OPT recipe.
        max_tiles (`int`, defaults to 1): Largest number of tiles of an image. See [`cut_tiles`].
        image_token_range (`list[int]`, *optional*): The numbers that a call may request: the model's.

    Raises:
        TypeError, ValueError: If `tokenizer` is no tokenizer, or a number is out of range.
    """

    valid_processor_kwargs = EVLGenProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        num_image_tokens: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        end_of_text: str | None = None,
        clean_captions: bool = False,
        bos_label: bool = False,
        max_tiles: int = 1,
        image_token_range: list[int] | None = None,
    ):
        read_budgets("num_image_tokens", num_image_tokens, 1, None, image_token_range)  # raises out of range
        check_max_tiles(max_tiles)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`tokenizer` must be a tokenizer, but is {type(tokenizer).__name__}.")
        for template in (chat_template, tokenizer.chat_template):
            if not isinstance(template, str | dict | None):
                raise TypeError(f"`chat_template` must be a text, but is {template!r}.")
        if chat_template is None and tokenizer.chat_template is not None:
            chat_template = join_parts(tokenizer.get_chat_template(), image_token, video_token)
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
        self.end_of_text = end_of_text
        self.clean_captions = clean_captions
        self.bos_label = bos_label
        self.max_tiles = max_tiles
        self.image_token_range = image_token_range
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        video_processor = EVLGenVideoProcessor() if video_processor is None else video_processor
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        video_processor.image_processor = image_processor

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("num_frames", "fps"):  # where they were before there was a video processor
            raise AttributeError(f"`{name}` is the video processor's: set `processor.video_processor.{name}`.")
        super().__setattr__(name, value)
        if name == "image_processor" and hasattr(self, "video_processor"):
            self.video_processor.image_processor = value

    @property
    def placeholders(self) -> dict[str, int]:
        """The tokens that stand for images and videos, with their ids."""
        return {self.image_token: self.image_token_id, self.video_token: self.video_token_id}

    @property
    def end_of_text_id(self) -> int:
        """Id of the token that ends a `suffix` and stops generation. Raises a ValueError if it is not a single one."""
        if self.end_of_text is None:
            return self.tokenizer.eos_token_id
        ids = self.tokenizer(self.end_of_text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"`end_of_text` must be one token, but {self.end_of_text!r} is {len(ids)}.")
        return ids[0]

    def __call__(
        self,
        images: ImageInput | str | list[str] | None = None,
        text: str | list[str] | list[list[str]] | None = None,
        suffix: str | list[str] | list[list[str]] | None = None,
        videos: Any = None,
        messages: list[list[dict[str, Any]]] | None = None,
        vision_features: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        encoded_video: Any = None,
        **kwargs: Unpack[EVLGenProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (image, path, URL or a list of these, *optional*):
                The images, in the order of their placeholders. [`load_rgb_image`] lists the accepted types.
            text (`str` or `list[str]`, *optional*):
                The prompts, by default empty ones. One without placeholders serves all images or videos.
            suffix (`str`, `list[str]` or `list[list[str]]`, *optional*):
                The captions or answers to train on, one for each prompt; adds `labels`. They must hold no special
                token: the processor adds `end_of_text`. Or a list for each image or video: it becomes one row, in
                which all its texts follow one prefix. `text` then holds a prompt for each image, or lists likewise.
            videos (video, path, URL or a list of these, *optional*):
                The videos, in the order of their placeholders. [`load_rgb_frames`] lists the accepted types.
            messages (`list[list[dict]]`, *optional*):
                Conversations to train on, instead of `text` and `suffix`; adds `labels` on the assistant's turns.
                See [`encode_conversations`]. For generation, make a `text` of one with `apply_chat_template`.
            vision_features (`torch.Tensor` of shape `(tiles, num_vision_tokens, vision_hidden_size)`, *optional*):
                The vision tower's output for the images, instead of `images`. Returned for the model.
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*):
                For `vision_features` of several tiles: 1, and the rows and columns of tiles of each image.
            encoded_video ([`EVLGenImageOutput`], *optional*):
                The output of the model's `encode_video`, instead of `videos`. Returned as `mm_encoder_outputs`.
            kwargs:
                Arguments of the image processor; the tokenizer's `return_tensors` (by default `"pt"`), `padding` (by
                default `True`), `pad_to_multiple_of`, `padding_side`, `max_length`, `truncation` and
                `add_special_tokens`; which frames of videos to take, as in [`EVLGenVideoProcessor.preprocess`]; and:

                - `num_image_tokens` (`int` or `list[int]`): Tokens of the soft prompt, by default the processor's; or
                  those of each image, then of each video. Others are for a `config.image_token_range`.
                - `max_tiles` (`int`): Largest number of tiles of an image, by default the processor's.
                - `max_pixels` (`int`): Largest width times height of an image or frame, by default 64,000,000.
                - `return_offsets_mapping` (`bool`): Adds `offset_mapping`, of the text with repeated placeholders.
                - `return_text_replacement_offsets` (`bool`): Adds `text_replacement_offsets`, as transformers'
                  `get_text_with_replacements` describes them.
                - `return_mm_token_type_ids` (`bool`): Adds `mm_token_type_ids`: 1 on images, 2 on videos, 0 on text.

        Returns:
            `BatchFeature` with
            - `input_ids`, `attention_mask`: int64, `(batch, sequence)`, padded on the left, or right with labels.
            - `labels`: int64, `(batch, sequence)`, with a `suffix` or `messages`: -100 on images, prompts and padding.
            - `segment_ids`: int64, `(batch, sequence)`, with lists in `suffix`: 0 on what the texts of an image share,
              n on the n-th text, -1 on padding.
            - `offset_mapping`: int64, `(batch, sequence, 2)`, if requested: start and end of each token in its text.
            - `pixel_values`: float32, `(tiles, channels, height, width)`, if there are images; and `image_grid_thw`:
              int64, `(images, 3)`, 1 and the rows and columns of tiles, if `max_tiles` is above 1.
            - `pixel_values_videos` and what else [`EVLGenVideoProcessor.preprocess`] returns, if there are videos.
            - `image_budgets`, `video_budgets`: int64, `(images,)` and `(videos,)`, with an `image_token_range`, or if
              a number of tokens is not `num_image_tokens`.

        Raises:
            ValueError, TypeError: If inputs do not fit each other, or one cannot be read; the message names it.
        """
        _check_given(images, text, suffix, videos, messages, vision_features, image_grid_thw, encoded_video)
        arguments = self._merge_arguments(kwargs, has_labels=suffix is not None or messages is not None)
        images_arguments, text_arguments = arguments["images_kwargs"], arguments["text_kwargs"]
        images_per_text = None
        if isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images):
            images_per_text = [len(row) for row in images]
        max_pixels = images_arguments.pop("max_pixels", None)
        max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
        if max_pixels < 1:
            raise ValueError(f"`max_pixels` must be an integer of 1 or more, but is {max_pixels!r}.")
        images = [] if images is None else flatten_images(images)
        images = [load_rgb_image(image, max_pixels=max_pixels) for image in images]
        videos = [] if videos is None else flatten_videos(videos)
        num_images = len(images)
        if vision_features is not None:
            num_images = len(vision_features if image_grid_thw is None else image_grid_thw)
        rules = self.num_image_tokens, self.image_token_range
        given = images_arguments.pop("num_image_tokens", None)
        numbers = read_budgets("num_image_tokens", given, num_images + len(videos), *rules)
        counts = {"image_budgets": numbers[:num_images], "video_budgets": numbers[num_images:]}
        if encoded_video is not None:
            counts["video_budgets"] = [len(prompt) for prompt in encoded_video.pooler_output]

        budgets = dict(zip(self.placeholders, counts.values(), strict=True))
        texts_per_image = count_texts(suffix)
        if messages is not None:
            columns = encode_conversations(self, messages, budgets, images_per_text)
        else:
            texts = text, suffix, budgets, images_per_text
            texts = texts if texts_per_image is None else repeat_for_texts(self, *texts)
            columns = encode_text(self, *texts, text_arguments)
        data: dict[str, Any] = pad(self, columns, text_arguments, texts_per_image)
        if text_arguments["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        # `num_image_tokens` may differ from the model's, if there is a range.
        has_range = self.image_token_range is not None
        data |= {name: row for name, row in counts.items() if row and (has_range or {*row} != {self.num_image_tokens})}

        max_tiles = images_arguments.pop("max_tiles", None)
        if images:
            max_tiles = self.max_tiles if max_tiles is None else max_tiles
            data |= prepare_images(self.image_processor, images, max_tiles, images_arguments)
        is_for_vllm = bool(text_arguments["return_text_replacement_offsets"])
        if videos:
            # vLLM takes many frames of each video, and forbids to choose among them.
            always = {"do_sample_frames": True} if is_for_vllm else {}
            data |= self.video_processor(videos, **{**arguments["videos_kwargs"], **always})
        given = {"vision_features": vision_features, "image_grid_thw": image_grid_thw}
        data |= {name: value for name, value in given.items() if value is not None}
        tensor_type = text_arguments.get("return_tensors", "pt")
        batch = EVLGenBatch(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)
        batch.placeholder_ids = (self.image_token_id, self.video_token_id)
        if encoded_video is not None:
            batch["mm_encoder_outputs"] = {"video": encoded_video}
        if is_for_vllm:
            self._add_layout_for_vllm(batch, counts)
        return batch

    def _add_layout_for_vllm(self, batch: BatchFeature, counts: dict[str, list[int]]) -> None:
        """Adds what vLLM needs to encode images and videos without their placeholders: budgets and all grids."""
        numbers = {number for row in counts.values() for number in row}
        if self.image_token_range is None and numbers - {self.num_image_tokens}:  # an error later ends the engine
            raise ValueError(
                f"`num_image_tokens` must be {self.num_image_tokens} for a processor without an `image_token_range`, "
                f"but is {sorted(numbers)}."
            )
        # vLLM sorts the fields of requests with images and videos by these names.
        self.image_processor.model_input_names = ["pixel_values", "image_budgets"]
        # A list has an entry for each image there.
        batch.update({name: list(map(torch.tensor, row)) for name, row in counts.items() if row})
        if "pixel_values" in batch:  # without grids, vLLM counts the tiles that the server's own arguments give
            batch.setdefault("image_grid_thw", torch.ones(len(batch["pixel_values"]), 3, dtype=torch.long))

    def _merge_arguments(self, given: dict[str, Any], has_labels: bool) -> dict[str, dict[str, Any]]:
        """The call's arguments and the tokenizer's defaults, sorted by modality."""
        if "num_video_tokens" in given:
            raise ValueError("`num_video_tokens` is gone: `num_image_tokens` has numbers of images, then of videos.")
        # A tokenizer's own `padding_side` is that of its pretraining. Here it follows from the labels.
        defaults = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        # Private, but the way of transformers' own processors. There is no public one.
        arguments = self._merge_kwargs(EVLGenProcessorKwargs, tokenizer_init_kwargs=defaults, **given)
        for name in ("return_text_replacement_offsets", "return_mm_token_type_ids"):
            arguments["text_kwargs"].setdefault(name, arguments.get(name))
        for name in ("return_offsets_mapping", "return_text_replacement_offsets"):
            if has_labels and arguments["text_kwargs"].get(name):
                raise ValueError(f"`{name}` is for a `text` alone, without `suffix` or `messages`.")
        return arguments

    def iterate_frames(
        self, video: Any, fps: float | None = None, max_pixels: int = MAX_PIXELS
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Reads a video of any length frame by frame, for the model's `encode_video`.

        It takes `fps` frames of each second, by default all. `video` and `max_pixels` are as in [`load_rgb_frames`].

        Yields:
            Pixels of a frame, float32, `(channels, height, width)`, and its seconds.
        """
        for frame, time in iterate_rgb_frames(video, FrameChoice(fps=fps, max_frames=None), max_pixels):
            yield self.video_processor.prepare_frames([frame])[0], time

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "frame_times"]

    # Not called here. But clients, and transformers' own tests, know by these methods that there are offsets.
    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def replace_video_token(self, video_inputs: Any = None, video_idx: int = 0, **kwargs: Any) -> str:
        return self.video_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[Any] | None = None, video_sizes: list[Any] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts placeholders and rows of `pixel_values`. `kwargs` are the engine's `mm_processor_kwargs`.

        vLLM calls this private method, which `ProcessorMixin` leaves to each model.
        """
        counts: dict[str, list[int]] = {}
        given, rules = kwargs.get("num_image_tokens"), (self.num_image_tokens, self.image_token_range)
        if image_sizes is not None:
            counts["num_image_tokens"] = read_budgets("num_image_tokens", given, len(image_sizes), *rules)
            max_tiles = self.max_tiles if kwargs.get("max_tiles") is None else kwargs["max_tiles"]
            counts["num_image_patches"] = count_tiles(self.image_processor, image_sizes, max_tiles)
        if video_sizes is not None:
            counts["num_video_tokens"] = read_budgets("num_image_tokens", given, len(video_sizes), *rules)
        return MultiModalData(**counts)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Loads the parts. Overridden, since there is no public way to load a checkpoint without a video processor.

        The first ones have none, and state `num_frames` and `fps` themselves.
        """
        # The tokenizer would pass it on to the model's configuration, which computes it.
        kwargs.pop("num_image_tokens", None)
        saved = processor_dict or {}
        if not saved:
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} holds no processor (processor_config.json). "
                "`processor.save_pretrained` adds it. A Trainer that gets `processing_class=processor` does so itself."
            )
        if "video_processor" in saved:
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        parts = [
            part.from_pretrained(pretrained_model_name_or_path, **kwargs)
            for part in (AutoImageProcessor, AutoTokenizer)
        ]
        frames = {name: kwargs.get(name, saved.get(name)) for name in ("num_frames", "fps")}
        return [*parts, EVLGenVideoProcessor(**frames)]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> list[str]:
        """Saves the image processor, the tokenizer, processor_config.json and the code that it names."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)


def _check_given(*inputs: Any) -> None:
    """Raises an error if none of the inputs of a call is given, or two of them exclude each other."""
    given = dict(zip(_INPUTS, inputs, strict=True))
    names = {name for name, value in given.items() if value is not None}
    if not names - {"suffix", "image_grid_thw"}:
        wanted = ", ".join(f"`{name}`" for name in given if name not in ("suffix", "image_grid_thw"))
        raise ValueError(f"At least one of {wanted} must be given.")
    exclusive = {"messages": {"text", "suffix"}, "vision_features": {"images"}, "encoded_video": {"videos"}}
    for name, others in exclusive.items():
        if name in names and not names.isdisjoint(others):
            listed = " and ".join(f"`{other}`" for other in sorted(others))
            raise ValueError(f"`{name}` is given instead of {listed}, not together.")
    if "image_grid_thw" in names and "vision_features" not in names:
        raise ValueError("`image_grid_thw` is for `vision_features` alone. The processor cuts `images` itself.")
    if "encoded_video" in names and not hasattr(given["encoded_video"], "pooler_output"):
        name = type(given["encoded_video"]).__name__
        raise TypeError(f"`encoded_video` must be an output of `encode_video`, but is {name}.")
