"""Says of each word of a caption how probable it is, how much the image made it so, and which patches did.

A word's map is its integrated gradient (Sundararajan et al., "Axiomatic attribution for deep networks", 2017): from
its log-probability to the vision tower's tokens, on a line from tokens that are all alike to those of the image.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .soft_prompts import Encoded, EVLGenImageOutput, Grid, read_grids
from .video import FRAMES_AT_ONCE, frames_of_videos
from .video_merging import merge_videos
from .vision_tower import extract_vision_tokens

STEPS = 5  # of a map
TEXTS_AT_ONCE = 8  # without maps


@dataclass
class ExplainedWord:
    """
    Args:
        word (`str`): The word, without the spaces around it. Punctuation counts in no word.
        probability (`float`): That of its tokens, given the image and the text before it, 0 to 1.
        confidence (`float`):
            Its highest probability at any place of the text, 0 to 1; of several tokens, the least one's. So a name is
            not doubtful because it might as well have come first.
        evidence (`float`): The log-probability, less that without an image, in nats.
        maps (`tuple[torch.Tensor]`):
            For each image or video of the text, what each patch adds to the evidence: float32, `(rows, columns)` or
            `(frames, rows, columns)`. Class tokens have a share of their own. The rest of the evidence is the method's
            error. Empty without steps.
    """

    word: str
    probability: float
    confidence: float
    evidence: float
    maps: tuple[torch.Tensor, ...] = ()

    @property
    def map(self) -> torch.Tensor:
        """The map of the text's first image or video."""
        return self.maps[0]

    @property
    def frame(self) -> int:
        """The frame of a video that has the strongest patch. 0 for images."""
        return int(self.map.argmax()) // self.map[0].numel() if self.map.ndim == 3 else 0

    @property
    def box(self) -> list[float]:
        """Left, upper, right and lower edge of the word's place in its frame, as shares of width and height, 0 to 1.

        The place is the strongest patch, with its neighbours that have at least half of its value, and so on.
        """
        values = self.map[self.frame] if self.map.ndim == 3 else self.map  # (rows, columns)
        strongest = values.amax()
        is_strong, place = values >= min(strongest, strongest / 2), values == strongest
        for _ in range(values.numel()):
            place = F.max_pool2d(place[None].float(), 3, stride=1, padding=1)[0].bool() & is_strong
        rows, columns = (place.any(dim=dim).nonzero() for dim in (1, 0))
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        return (edges / edges.new_tensor(values.shape[::-1]).repeat(2)).tolist()


@torch.inference_mode(False)  # it keeps no gradients
def explain(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Any = None,
    text: str | list[str] | None = None,
    caption: str | list[str] | None = None,
    *,
    video: Any = None,
    steps: int = STEPS,
    **kwargs: Any,
) -> list[Any]:
    """Explains the words of a caption.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The captioner, in evaluation mode.
        processor ([`EVLGenProcessor`]): Its processor.
        image, video (*optional*):
            An image or a video, as the processor takes it. A list is a batch. The frames of a video, and several
            images of one text, are a list in it.
        text (`str` or `list[str]`, *optional*): The prompt, or one for each entry of the batch.
        caption (`str` or `list[str]`, *optional*): The text to explain. By default it is generated.
        steps (`int`, *optional*, defaults to 5): Steps of the maps. More are more exact; with 0 there is no map.
        kwargs: Arguments of `generate`, for a caption that is generated.

    Returns:
        A list of [`ExplainedWord`]. For a batch, a list of these lists.

    Raises:
        ValueError: If not exactly one of `image` and `video` is given, a text has no placeholder, a caption has tokens
            that the model cannot write or comes with `kwargs`, an entry has several captions, the model is in training
            mode, or its language model passes no gradient.
    """
    if (image is None) == (video is None):
        raise ValueError("Exactly one of `image` and `video` must be given.")
    if caption is not None and kwargs:
        raise ValueError(f"With a `caption` nothing is generated, but there are arguments of `generate`: {[*kwargs]}.")
    name, given = ("images", image) if video is None else ("videos", video)
    is_batch = isinstance(given, list)
    media, suffix = {name: given if is_batch else [given]}, {} if caption is None else {"suffix": caption}
    try:
        inputs = processor(**media, text=text, **suffix).to(model.device)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("`suffix`", "`caption`")) from error
    if "segment_ids" in inputs:
        raise ValueError(f"`caption` must be one text for each entry, but is {caption!r}.")
    sequences = None
    if caption is None:
        inputs, sequences = generate_once(model, inputs, **kwargs)
    explained = explain_sequences(model, processor, inputs, sequences, steps)
    return explained if is_batch else explained[0]


def generate_once(model: PreTrainedModel, inputs: Any, **kwargs: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Generates texts. Returns the inputs with encoded images, so that the tower need not run again, and all ids."""
    inputs = {**inputs, "mm_encoder_outputs": _encode(model, inputs)}
    names = ("input_ids", "attention_mask", "mm_encoder_outputs")
    kwargs["return_dict_in_generate"] = False
    return inputs, model.generate(**{name: inputs[name] for name in names}, **kwargs)


@torch.no_grad()
def _encode(model: PreTrainedModel, inputs: Any) -> Encoded:
    return model.encode(**{name: inputs[name] for name in inputs if name not in ("attention_mask", "labels")})


def explain_sequences(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: Any, sequences: torch.Tensor | None, steps: int = STEPS
) -> list[list[ExplainedWord]]:
    """Explains generated texts: those of `sequences`, the ids that `generate` returned for the processor's `inputs`.

    Without `sequences` these are the `labels` of the inputs. Several sequences of each row are allowed.
    """
    if type(steps) is not int or steps < 0:
        raise ValueError(f"`steps` must be a whole number, 0 or more, but is {steps!r}.")
    if model.training:
        raise ValueError(
            "`model` must be in evaluation mode, or dropout changes its words. Call `model.eval()` first."
        )
    encoded = inputs.get("mm_encoder_outputs") or _encode(model, inputs)
    prompts, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if sequences is None:
        starts = (inputs["labels"] != -100).int().argmax(dim=1).tolist()
        rows = [
            (ids[:start], ids[start:][kept[start:]]) for ids, kept, start in zip(prompts, mask, starts, strict=True)
        ]
    else:
        repeats = len(sequences) // len(prompts)
        new_ids = sequences[:, prompts.shape[1] :]
        rows = [(prompts[row // repeats][mask[row // repeats]], ids) for row, ids in enumerate(new_ids)]
    ends = {processor.end_of_text_id, processor.tokenizer.pad_token_id}
    texts, media = [], _split_media(model, inputs, encoded)
    for row, (prompt, ids) in enumerate(rows):
        new_ids = list(itertools.takewhile(lambda token: token not in ends, ids.tolist()))
        words = find_words(processor.tokenizer, new_ids)
        ids = torch.cat([prompt, ids[: len(new_ids)]])
        texts.append(_Text(ids, len(prompt), words, media[row * len(media) // len(rows)]))
    size = 1 if steps else TEXTS_AT_ONCE  # the graph of a map takes memory
    batches = [texts[index : index + size] for index in range(0, len(texts), size)]
    return [words for batch in batches for words in _explain(model, batch, steps)]


@dataclass
class _Media:
    """An image or a video of a text. Its tokens, as the connector takes them, are `features`, (tiles or 1, N, dim)."""

    name: str  # "image" or "video"
    features: torch.Tensor
    places: torch.Tensor | None  # of a merged video, (1, N, 3)
    grid: Grid
    budget: int
    pixels: torch.Tensor | None = None  # of a video, (1, frames, channels, height, width)
    times: torch.Tensor | None = None  # (1, frames)

    @property
    def baseline(self) -> torch.Tensor:
        """The token that stands for no image: the median of the image's, `(dim,)`. Most of an image is background."""
        return self.features.flatten(0, 1).median(dim=0).values

    def draw_line(self, points: list[float]) -> torch.Tensor:
        """Features between no image, 0, and the image, 1: `(points, tiles or 1, N, dim)`, float32."""
        at = torch.tensor(points, device=self.features.device)[:, None, None, None]
        return self.baseline + at * (self.features.float() - self.baseline)

    def encode(self, model: PreTrainedModel, lines: torch.Tensor) -> torch.Tensor:
        """The soft prompts, `(points, budget, text_dim)`, of other features, `(points, tiles, N, dim)`."""
        points = len(lines)
        grids = None if self.grid == (1, 1) else torch.tensor([(1, *self.grid)]).repeat(points, 1)
        places = None if self.places is None else self.places.repeat(points, 1, 1)
        budgets = [self.budget] * points
        return model.project_vision_features(lines.flatten(0, 1), grids, budgets, places).pooler_output

    @torch.no_grad()
    def trace(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's tokens of all tiles or frames, `(frames, N, dim)`, and which of `features` each is part of."""
        tokens = self.features
        if self.pixels is not None:
            pixels = self.pixels[0].to(model.vision_tower.dtype)  # (frames, channels, height, width)
            at_once = FRAMES_AT_ONCE if model.temporal is None else len(pixels)
            with frames_of_videos(at_once):
                parts = [extract_vision_tokens(model.vision_tower, part) for part in pixels.split(at_once)]
            tokens = torch.cat(parts)
            if model.config.video_mode == "merge":
                return tokens, trace_frames(model, self.pixels, self.times)[2]
        own = torch.arange(self.features[..., 0].numel(), device=tokens.device).view(self.features.shape[:2])
        return tokens, own.expand(len(tokens), -1)

    def share(self, model: PreTrainedModel, gradients: torch.Tensor) -> list[torch.Tensor]:
        """The map of each word by the mean gradient of its line, `(words, tiles or 1, N, dim)`."""
        tokens, index = self.trace(model)  # (frames, N, dim), (frames, N)
        count = torch.bincount(index.flatten(), minlength=self.features[..., 0].numel())[index]  # (frames, N)
        change = (tokens.float() - self.baseline.float()) / count.unsqueeze(2)  # each is an equal part of the mean
        prefix, side = patch_grid(model)
        maps = []
        for gradient in gradients.flatten(1, 2):  # (tiles * N, dim)
            shares = (gradient[index] * change).sum(dim=-1)[:, prefix:]  # (frames, patches)
            rows, columns = self.grid
            if self.pixels is None:
                shares = shares.view(rows, columns, side, side).transpose(1, 2)
                maps.append(shares.reshape(rows * side, columns * side).cpu())
            else:
                maps.append(shares.view(-1, side, side).cpu())
        return maps


def _split_media(model: PreTrainedModel, inputs: Any, encoded: Encoded) -> list[list[_Media]]:
    """The images and videos of each text, in the order of their placeholders."""
    rows: list[list[_Media]] = [[] for _ in inputs["input_ids"]]
    for name, output in encoded.items():
        if output is None:
            continue
        media = iter(_list_media(name, inputs, output))
        placeholders = inputs["input_ids"] == getattr(model.config, f"{name}_token_id")  # (texts, sequence)
        for row, count in zip(rows, placeholders.sum(dim=1).tolist(), strict=True):
            while count > 0 and (item := next(media, None)) is not None:
                row.append(item)
                count -= item.budget
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"`text` must hold a placeholder of an image or a video, but entries {empty} have none.")
    return rows


def _list_media(name: str, inputs: Any, output: Any) -> list[_Media]:
    features, budgets = output.last_hidden_state, [len(prompt) for prompt in output.pooler_output]
    if name == "image":
        grids = read_grids(inputs.get("image_grid_thw"), len(features))
        tiles = features.split([math.prod(grid) for grid in grids])
        return [_Media(name, part, None, grid, n) for part, grid, n in zip(tiles, grids, budgets, strict=True)]
    media = []
    for number, (pixels, budget) in enumerate(zip(inputs["pixel_values_videos"], budgets, strict=True)):
        mask = inputs["frame_mask"][number].bool() if "frame_mask" in inputs else slice(None)
        times = inputs["frame_times"][number][mask][None] if "frame_times" in inputs else None
        places = None if output.token_places is None else output.token_places[[number]]
        media.append(_Media(name, features[[number]], places, (1, 1), budget, pixels[mask][None], times))
    return media


@dataclass
class _Text:
    """A prompt and its text, ids of `(sequence,)`. The text begins at `start`. `words` have places in it."""

    ids: torch.Tensor
    start: int
    words: list[tuple[str, list[int]]]
    media: list[_Media]


def _explain(model: PreTrainedModel, texts: list[_Text], steps: int) -> list[list[ExplainedWord]]:
    """Explains the words of texts. With steps there is one."""
    points = [1.0, 0.0, *((step + 0.5) / steps for step in range(steps))]  # of each line: the image, nothing, between
    with torch.set_grad_enabled(steps > 0):
        lines = [[item.draw_line(points).requires_grad_(steps > 0) for item in text.media] for text in texts]
        explained = []
        for text, of_text, log_probs in zip(texts, lines, _score(model, texts, lines), strict=True):
            tokens = log_probs.diagonal(dim1=1, dim2=2)  # (points, new): each at its own place
            scores = [tokens[:, positions].sum(dim=1) for _, positions in text.words]  # (points,) each
            maps: list[tuple[torch.Tensor, ...]] = [()] * len(scores)
            if steps and scores:
                maps = _draw_maps(model, text.media, of_text, [score[2:].mean() for score in scores])
            words = []
            for (word, positions), score, map_ in zip(text.words, scores, maps, strict=True):
                given, none = score[:2].tolist()
                confidence = log_probs[0][:, positions].amax(dim=0).amin().exp().item()
                words.append(ExplainedWord(word, math.exp(given), confidence, given - none, map_))
            explained.append(words)
    return explained


def _score(model: PreTrainedModel, texts: list[_Text], lines: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The log-probability of each new token of a text at each of their places, `(points, new, new)`.

    The media are those of the lines.
    """
    prompts: dict[str, list[torch.Tensor]] = {"image": [], "video": []}  # in the order of the rows below
    for text, of_text in zip(texts, lines, strict=True):
        encoded = [item.encode(model, line) for item, line in zip(text.media, of_text, strict=True)]
        for of_point in zip(*encoded, strict=True):
            for item, prompt in zip(text.media, of_point, strict=True):
                prompts[item.name].append(prompt)
    outputs = {name: EVLGenImageOutput(pooler_output=tuple(given)) for name, given in prompts.items() if given}
    points, first = len(lines[0][0]), min(text.start for text in texts)
    ids = pad_sequence([text.ids for text in texts], batch_first=True).repeat_interleave(points, dim=0)
    lengths = torch.tensor([len(text.ids) for text in texts], device=ids.device).repeat_interleave(points)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()  # (texts * points, sequence)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": outputs}
    logits = model(**inputs, logits_to_keep=ids.shape[1] - first + 1, use_cache=False).logits[:, :-1]
    log_probs = logits.float().log_softmax(dim=-1).unflatten(0, (len(texts), points))
    return [
        of_text[:, text.start - first : len(text.ids) - first, text.ids[text.start :]]
        for text, of_text in zip(texts, log_probs, strict=True)
    ]


def _draw_maps(
    model: PreTrainedModel, media: list[_Media], lines: list[torch.Tensor], scores: list[torch.Tensor]
) -> list[tuple[torch.Tensor, ...]]:
    """The maps of each word by its mean score on the lines, `()`."""
    of_words = [torch.autograd.grad(score, lines, retain_graph=True) for score in scores if score.requires_grad]
    # Kernels for inference may cut the gradient in attention alone. The first word is reached past it.
    if not any(gradient.any() for gradients in of_words[len(scores) > 1 :] for gradient in gradients):
        raise ValueError("`model` must pass gradients, but its language model does not. Is it quantised?")
    of_media = (torch.stack(gradients).sum(dim=1) for gradients in zip(*of_words, strict=True))
    maps = [item.share(model, gradients) for item, gradients in zip(media, of_media, strict=True)]
    return list(zip(*maps, strict=True))


def find_words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of a text, each with the positions of its tokens. Tokens of punctuation alone are in none.

    A word starts behind a space. So a text in a language without spaces is one word.
    """
    spans: list[tuple[int, int]] = []  # of the words in the text
    positions: list[list[int]] = []
    text, pending, is_open = "", [], False
    for position in range(len(ids)):
        start, options = len(text), {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        longer = tokenizer.decode(ids[: position + 1], **options)
        pending.append(position)
        if longer.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character
            continue
        text, piece = longer, longer[start:]
        is_open = is_open and not piece[:1].isspace()
        if any(char.isalnum() for char in piece):
            if not is_open:
                spans.append((start, start))
                positions.append([])
            spans[-1], is_open = (spans[-1][0], len(text)), not piece[-1].isspace()
            positions[-1] += pending
        pending = []
    return [(text[start:end].strip(), places) for (start, end), places in zip(spans, positions, strict=True)]


def trace_frames(
    model: PreTrainedModel, pixel_values: torch.Tensor, frame_times: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Runs the tower on images or one video.

    Returns:
        The features, `(images or 1, num_vision_tokens, dim)`. For a merged video, the places of its tokens,
        `(1, num_vision_tokens, 3)`, and the merged token of each frame's tokens, `(frames, num_vision_tokens)`.
    """
    if pixel_values.ndim == 4 or model.config.video_mode == "mean":
        return model.get_vision_features(pixel_values), None, None
    indices: list[torch.Tensor] = []  # of each merge, (1, tokens of the pool and of the frame)
    pixel_values, class_token = pixel_values.to(model.vision_tower.dtype), model.config.connector_config.class_token
    pool = merge_videos(model.vision_tower, pixel_values, None, frame_times, class_token, indices)
    groups = torch.arange(pool.size.shape[1], device=pixel_values.device).unsqueeze(0)  # (frames so far, tokens)
    for index in indices:
        of_pool, of_frame = index.chunk(2, dim=1)
        groups = torch.cat([of_pool[0, groups], of_frame])
    return pool.features, pool.places, groups


def patch_grid(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of tokens before the first patch, and of patches along a side. No square raises a ValueError."""
    tokens = model.config.num_vision_tokens
    side = math.isqrt(tokens)
    prefix = tokens - side * side
    registers = getattr(model.config.vision_config, "num_register_tokens", 0)
    if prefix != int(model.config.connector_config.class_token) + registers:
        raise ValueError(f"The vision tower's patches must form a square, but it gives {tokens} tokens.")
    return prefix, side
