"""EVLGen's processor: images, videos and text in, model inputs and labels out."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from configuration_evlgen.hub_code import AUTO_MAP, save_hub_code

from .batch import EVLGenBatch
from .conversations import join_parts
from .cut_tiles import choose_tile_grid, cut_tiles, tile_size
from .images import MAX_PIXELS, load_rgb_image
from .inputs import (
    EVLGenProcessorKwargs,
    EVLGenVideosKwargs,
    check_given,
    check_max_tiles,
    check_num_image_tokens,
    check_token_range,
    count_images_per_text,
    flatten_images,
    list_budgets,
)
from .prompts import PromptEncoder
from .token_ids import pad
from .video_inputs import open_videos, prepare_videos
from .videos import FrameChoice, iterate_rgb_frames


class EVLGenProcessor(PromptEncoder):
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
        num_image_tokens (`int`):
            Placeholders of each image or video, if a call requests no other number: the model's
            `config.num_image_tokens`.
        chat_template (`str`, *optional*):
            Template for messages with images. By default the tokenizer's, if it has one.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder of an image.
        video_token (`str`, *optional*, defaults to `"<video>"`): The placeholder of a video.
        num_frames (`int`, *optional*, defaults to 4): Frames taken of each video, at most 512.
        fps (`float`, *optional*): Frames taken for each second of a video, instead of `num_frames`.
        end_of_text (`str`, *optional*):
            The token that ends a `suffix` in training and stops generation. By default the tokenizer's EOS token;
            `"\n"` in the paper's OPT recipe.
        clean_captions (`bool`, *optional*, defaults to `False`):
            Whether to clean each `suffix` with [`clean_caption`], as the paper does.
        bos_label (`bool`, *optional*, defaults to `False`):
            Whether the BOS token after the images of an empty prompt is a label, as in the paper's OPT recipe.
        max_tiles (`int`, *optional*, defaults to 1):
            Largest number of tiles that a large image is cut into, at most 100. See [`cut_tiles`].
        image_token_range (`list[int]`, *optional*):
            The smallest and the largest number of tokens of an image or video, if the model was trained with several:
            its `config.image_token_range`. Calls that request a number outside of it are refused.

    Raises:
        TypeError: If `tokenizer` is no tokenizer.
        ValueError: If a number is out of range; the message names it.
    """

    valid_processor_kwargs = EVLGenProcessorKwargs

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
        max_tiles: int = 1,
        image_token_range: list[int] | None = None,
        fps: float | None = None,
    ):
        self.image_token_range = check_token_range(image_token_range)
        check_num_image_tokens(num_image_tokens, self.image_token_range)
        check_max_tiles(max_tiles)
        FrameChoice(num_frames if fps is None else None, fps=fps)  # raises out of range
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"`tokenizer` must be a tokenizer, but is {type(tokenizer).__name__}.")
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
        self.num_frames = num_frames
        self.fps = fps
        self.end_of_text = end_of_text
        self.clean_captions = clean_captions
        self.bos_label = bos_label
        self.max_tiles = max_tiles
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
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
        image_grid_thw: torch.Tensor | None = None,
        encoded_video: Any = None,
        **kwargs: Unpack[EVLGenProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (image, path, URL or a list of these, *optional*):
                The images, in the order of their placeholders. [`load_rgb_image`] lists the accepted types.
            text (`str` or `list[str]`, *optional*):
                The prompts. One prompt without placeholders serves all images or videos. Without `text`, prompts are
                empty.
            suffix (`str` or `list[str]`, *optional*):
                The captions or answers to train on, one for each prompt; adds `labels`. The processor adds
                `end_of_text`; a suffix must hold neither it nor a special token.
            videos (video, path, URL or a list of these, *optional*):
                The videos, in the order of their placeholders. A list of frames (images or arrays) is one video.
                [`load_rgb_frames`] lists the accepted types.
            messages (`list[list[dict]]`, *optional*):
                Conversations to train on, instead of `text` and `suffix`; adds `labels` on the assistant's turns.
                See [`encode_conversation`]. For generation, make a `text` of one with `apply_chat_template`.
            vision_features (`torch.Tensor` of shape `(tiles, num_vision_tokens, vision_hidden_size)`, *optional*):
                The vision tower's output for the images, instead of `images`. Returned unchanged, for the model.
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*):
                For `vision_features` of several tiles: 1, and the rows and columns of tiles of each image. Returned
                unchanged. By default each image is one tile.
            encoded_video ([`EVLGenImageOutput`], *optional*):
                The output of the model's `encode_video`, instead of `videos`. Returned as `mm_encoder_outputs`.
            kwargs:
                Arguments of the image processor; the tokenizer's `return_tensors` (by default `"pt"`), `padding` (by
                default `True`), `pad_to_multiple_of`, `padding_side`, `max_length`, `truncation` and
                `add_special_tokens`; and:

                - `num_frames` (`int`): Frames to take of each video; by default the processor's `num_frames`. With
                  `do_sample_frames=False` it is all frames. At most 512; [`iterate_frames`] has no limit.
                - `fps` (`float`): Frames to take for each second instead; see [`FrameChoice`].
                - `video_metadata` (`VideoMetadata`, `dict` or a list of these): The `fps` of each list or array of
                  frames. See [`load_rgb_frames`].
                - `frame_sampling` (`str`): How to choose them: `"uniform"` (the default), or `"headtail"` for
                  training. See [`sample_frames`].
                - `num_image_tokens`, `num_video_tokens` (`int` or `list[int]`): Tokens of the soft prompt of all
                  images and videos, or of each one, by default the processor's `num_image_tokens`. Other numbers are
                  for models with a `config.image_token_range`.
                - `max_tiles` (`int`): Largest number of tiles of an image, by default the processor's `max_tiles`.
                - `max_pixels` (`int`): Largest width times height of an image or frame that is decoded, by default
                  64,000,000. See [`load_rgb_image`].
                - `return_offsets_mapping` (`bool`): Adds `offset_mapping`. All tokens of a placeholder have its span.
                - `return_text_replacement_offsets` (`bool`): Adds `text_replacement_offsets`, as transformers'
                  `get_text_with_replacements` describes them. Then `offset_mapping` refers to the expanded text.
                - `return_mm_token_type_ids` (`bool`): Adds `mm_token_type_ids`: 1 on images, 2 on videos, 0 on text.

        Returns:
            `BatchFeature` with
            - `input_ids`, `attention_mask`: int64, `(batch, sequence)`, padded on the left; on the right with
              labels.
            - `pixel_values`: float32, `(tiles, channels, height, width)`, if there are images; and `image_grid_thw`:
              int64, `(images, 3)`, 1 and the rows and columns of tiles, if `max_tiles` is above 1.
            - `image_budgets`, `video_budgets`: int64, `(images,)` and `(videos,)`, with an `image_token_range`, or if
              a number of tokens is not `num_image_tokens`.
            - `pixel_values_videos`: float32, `(videos, frames, channels, height, width)`, if there are videos; and
              `frame_mask`: bool, `(videos, frames)`, if they differ in their number of frames; and `frame_times`:
              float32, `(videos, frames)`, the seconds of each frame since the first one, 0 for padding.
            - `labels`: int64, `(batch, sequence)`, with a `suffix` or `messages`: -100 on images, prompts and padding.
            - `offset_mapping`: int64, `(batch, sequence, 2)`, if requested: start and end of each token in its text.

        Raises:
            ValueError: If images, placeholders and texts differ in number. If a text is too long, or `truncation`
                would cut placeholders or all labels off. If offsets are requested for a `suffix` or `messages`. If
                an image cannot be read. If a suffix is empty or holds a special token.
            TypeError: If a text is not a string, or an image of no accepted type.
        """
        check_given(images, text, suffix, videos, messages, vision_features, image_grid_thw, encoded_video)
        arguments = self._merge_arguments(kwargs, has_labels=suffix is not None or messages is not None)
        images_arguments, text_arguments = arguments["images_kwargs"], arguments["text_kwargs"]
        max_tiles = images_arguments.pop("max_tiles", None)
        images_per_text = count_images_per_text(images)
        images = self._load_images(images, images_arguments)
        is_for_vllm = bool(text_arguments.get("return_text_replacement_offsets"))
        frames = {"num_frames": self.num_frames} if self.fps is None else {"fps": self.fps}
        videos = open_videos(videos, arguments["videos_kwargs"], frames, samples_always=is_for_vllm)
        num_images = len(images)
        if vision_features is not None:
            num_images = len(vision_features if image_grid_thw is None else image_grid_thw)
        num_videos = len(videos)
        if encoded_video is not None:
            num_videos = len(encoded_video.pooler_output)
            if arguments["videos_kwargs"].get("num_video_tokens") is not None:
                raise ValueError("`num_video_tokens` cannot be given with `encoded_video`, which has its tokens.")
            arguments["videos_kwargs"]["num_video_tokens"] = [len(prompt) for prompt in encoded_video.pooler_output]
        budgets = self._budgets(num_images, num_videos, arguments)
        if messages is None:
            columns = self._encode_text(text, suffix, budgets, images_per_text, text_arguments)
        else:
            columns = self._encode_conversations(messages, budgets, images_per_text)
        placeholder_ids = (self.image_token_id, self.video_token_id)
        data: dict[str, Any] = pad(self.tokenizer, columns, placeholder_ids, text_arguments)
        if text_arguments["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if images:
            data.update(self._cut_images(images, max_tiles, images_arguments))
        if videos:
            data.update(prepare_videos(videos, lambda frames: self._prepare_pixels(frames, images_arguments)))
        if vision_features is not None:
            data["vision_features"] = vision_features
            if image_grid_thw is not None:
                data["image_grid_thw"] = image_grid_thw
        counts = {"image_budgets": budgets[self.image_token_id], "video_budgets": budgets[self.video_token_id]}
        for name, row in counts.items():
            # `num_image_tokens` may differ from the model's, if there is a range.
            if row and (self.image_token_range or set(row) != {self.num_image_tokens}):
                data[name] = row
        batch = EVLGenBatch(
            data,
            placeholder_ids=placeholder_ids,
            tensor_type=text_arguments.get("return_tensors", "pt"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )
        if encoded_video is not None:
            batch["mm_encoder_outputs"] = {"video": encoded_video}
        if is_for_vllm:
            self._add_layout_for_vllm(batch, counts)
        return batch

    def _add_layout_for_vllm(self, batch: BatchFeature, counts: dict[str, list[int]]) -> None:
        """Adds the number of tokens of each image and video, and the grids of images of one tile.

        vLLM encodes images and videos without their placeholders.
        """
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
        # A tokenizer's own `padding_side` is that of its pretraining. Here it follows from the labels.
        defaults = {name: value for name, value in self.tokenizer.init_kwargs.items() if name != "padding_side"}
        arguments = self._merge_kwargs(EVLGenProcessorKwargs, tokenizer_init_kwargs=defaults, **given)
        for name in ("return_text_replacement_offsets", "return_mm_token_type_ids"):
            arguments["text_kwargs"].setdefault(name, arguments.get(name))  # transformers < 5.20 has them here alone
        for name in ("return_offsets_mapping", "return_text_replacement_offsets"):
            if has_labels and arguments["text_kwargs"].get(name):
                raise ValueError(f"`{name}` is for a `text` alone, without `suffix` or `messages`.")
        return arguments

    def _budgets(self, num_images: int, num_videos: int, arguments: dict[str, dict[str, Any]]) -> dict[int, list[int]]:
        """By placeholder id, the number of tokens of each image or video."""
        given = arguments["images_kwargs"].pop("num_image_tokens", None)
        for_videos = arguments["videos_kwargs"].get("num_video_tokens")
        if for_videos is None and not isinstance(given, list | tuple):  # a list is for images alone
            for_videos = given
        rules = self.num_image_tokens, self.image_token_range
        return {
            self.image_token_id: list_budgets("num_image_tokens", given, num_images, *rules),
            self.video_token_id: list_budgets("num_video_tokens", for_videos, num_videos, *rules),
        }

    def _load_images(self, images: Any, arguments: dict[str, Any]) -> list[Any]:
        max_pixels = arguments.pop("max_pixels", None) or MAX_PIXELS
        images = [] if images is None else flatten_images(images)
        return [load_rgb_image(image, max_pixels=max_pixels) for image in images]

    def iterate_frames(
        self, video: Any, fps: float | None = None, max_pixels: int = MAX_PIXELS
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """Reads a video of any length frame by frame, for the model's `encode_video`.

        Args:
            video (path, URL, list of frames or array): As in [`load_rgb_frames`].
            fps (`float`, *optional*): Frames to take for each second, by default all.
            max_pixels (`int`, *optional*, defaults to 64,000,000): Largest width times height of a frame.

        Yields:
            Pixels of a frame, float32, `(channels, height, width)`, and its seconds.
        """
        for frame, time in iterate_rgb_frames(video, FrameChoice(fps=fps, max_frames=None), max_pixels):
            yield self._prepare_pixels([frame], {})[0], time

    def _cut_images(
        self, images: list[Any], max_tiles: int | None, arguments: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Pixels of all tiles of the images, and the images' grids if they may have several tiles."""
        max_tiles = self.max_tiles if max_tiles is None else max_tiles
        check_max_tiles(max_tiles)
        if max_tiles == 1:
            return {"pixel_values": self._prepare_pixels(images, arguments)}
        for name in ("size", "crop_size"):
            if arguments.get(name) is not None:
                raise ValueError(f"`{name}` cannot be given with `max_tiles`: tiles have the image processor's own.")
        size = tile_size(self.image_processor)
        cut = [cut_tiles(image, size, max_tiles) for image in images]
        pixel_values = self._prepare_pixels([tile for tiles, _ in cut for tile in tiles], arguments)
        # Even for images of one tile: a pipeline makes batches of images that were prepared alone.
        return {"pixel_values": pixel_values, "image_grid_thw": torch.tensor([(1, *grid) for _, grid in cut])}

    def _prepare_pixels(self, images: list[Any], arguments: dict[str, Any]) -> torch.Tensor:
        return self.image_processor(images, **{**arguments, "return_tensors": "pt"})["pixel_values"]

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "frame_times"]

    @property
    def video_processor(self) -> SimpleNamespace:
        """Describes videos to vLLM. Their frames are prepared by the image processor, so nothing is saved."""
        return SimpleNamespace(
            model_input_names=["pixel_values_videos", "frame_mask", "frame_times", "video_budgets"],
            size=getattr(self.image_processor, "size", None),
            do_sample_frames=True,  # so vLLM gives the times of frames
            temporal_patch_size=1,
            valid_kwargs=EVLGenVideosKwargs,
        )

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        """The text that takes an image's placeholder."""
        return self.image_token * self.num_image_tokens

    def replace_video_token(self, video_inputs: Any = None, video_idx: int = 0, **kwargs: Any) -> str:
        """The text that takes a video's placeholder."""
        return self.video_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: list[Any] | None = None, video_sizes: list[Any] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Counts placeholders and rows of `pixel_values` for vLLM. `kwargs` are the engine's `mm_processor_kwargs`."""
        counts: dict[str, list[int]] = {}
        each = kwargs.get("num_image_tokens")
        rules = self.num_image_tokens, self.image_token_range
        if image_sizes is not None:
            counts["num_image_tokens"] = list_budgets("num_image_tokens", each, len(image_sizes), *rules)
            max_tiles = self.max_tiles if kwargs.get("max_tiles") is None else kwargs["max_tiles"]
            check_max_tiles(max_tiles)
            size = None if max_tiles == 1 else tile_size(self.image_processor)
            grids = [choose_tile_grid(*image, size, max_tiles) if size else (1, 1) for image in image_sizes]
            counts["num_image_patches"] = [rows * columns for rows, columns in grids]
        if video_sizes is not None:
            for_videos = each if kwargs.get("num_video_tokens") is None else kwargs["num_video_tokens"]
            counts["num_video_tokens"] = list_budgets("num_video_tokens", for_videos, len(video_sizes), *rules)
        return MultiModalData(**counts)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "EVLGenProcessor":
        """Loads a processor. Arguments of [`EVLGenProcessor`] replace those that were saved, as in vLLM."""
        # The tokenizer would pass it on to the model's configuration, which computes it.
        number = kwargs.pop("num_image_tokens", None)
        processor = super().from_pretrained(*args, **kwargs)
        if number is not None:
            check_num_image_tokens(number, processor.image_token_range)
            processor.num_image_tokens = number
        return processor

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves the image processor, the tokenizer, processor_config.json and the code that it names."""
        os.makedirs(save_directory, exist_ok=True)
        save_hub_code(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
