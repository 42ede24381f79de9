"""Captions images or videos with a language model that a vLLM server serves already.

The language model of an EVLGen is the one that it was trained on, untouched, so a deployment of that model can caption
as well. Soft prompts are made here and sent as prompt embeddings
(https://docs.vllm.ai/en/stable/features/prompt_embeds), which takes the vision tower, the connector and the table of
input embeddings; the language model's layers are not loaded.

    vllm serve facebook/opt-2.7b --enable-prompt-embeds
    python examples/serve_prompt_embeds.py --model path/to/model --images a.png b.png

The server must have the very language model that the checkpoint was trained on: `text_model_name_or_path` in its
config.json, or what `model.language_model.save_pretrained` writes. Captions are those of `generate`, greedy, if the
server computes in the same `--dtype`. A server that was started with `--api-key` is told that of the environment
variable `VLLM_API_KEY`. Needs `.[serve]`.
"""

import base64
import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import find_adapter_config_file, logging

from common.command_line import parse_arguments
from common.models import load_captioner
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what a server can cast to its own without loss of meaning
START = "vllm serve MODEL --enable-prompt-embeds"


@dataclass
class ServeArguments:
    model: str = field(default="outputs/demo", metadata={"help": "Captioner: a folder or a name on the Hub."})
    server: str = field(default="http://127.0.0.1:8000/v1", metadata={"help": "Where the vLLM server answers."})
    served_model: str | None = field(
        default=None, metadata={"help": "What the server calls the language model, if it serves several."}
    )
    images: list[str] = field(default_factory=list, metadata={"help": "Images: paths or URLs."})
    videos: list[str] = field(default_factory=list, metadata={"help": "Videos in their place: paths or URLs."})
    prompts: list[str] = field(
        default_factory=lambda: [""], metadata={"help": "What the model is told: once for all, or one for each."}
    )
    max_new_tokens: int = field(default=30, metadata={"help": "Largest length of a caption."})
    batch_size: int = field(default=16, metadata={"help": "Images or videos in one request."})


class PromptEmbedder(EVLGenForConditionalGeneration):
    """An EVLGen up to what its language model reads. Of that it has the embeddings alone, so it cannot generate."""

    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]

    def __init__(
        self,
        config: EVLGenConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = 0
        super().__init__(config, vision_tower, language_model)

    @staticmethod
    def load_language_model(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name_or_path, num_hidden_layers=0, **kwargs)

    @torch.no_grad()
    def embed_prompts(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Embeds prompts with their images or videos, as the whole model does before its language model.

        Args:
            input_ids, attention_mask, pixel_values, pixel_values_videos, frame_mask:
                What the processor gives, as in [`EVLGenForConditionalGeneration.forward`].

        Returns:
            `list[torch.Tensor]`, one `(tokens, hidden)` for each prompt, without padding.
        """
        images = self._encode_images(pixel_values, None, None)
        videos = self._encode_videos(pixel_values_videos, frame_mask, None)
        embeds = self._embed(input_ids, images, videos)  # (batch, sequence, hidden)
        return [row[mask] for row, mask in zip(embeds, attention_mask.bool(), strict=True)]


def load_prompt_embedder(name_or_path: str) -> tuple[PromptEmbedder, EVLGenProcessor]:
    """Loads what of a checkpoint makes prompts, and its processor.

    Raises:
        ValueError: If there is no such model, or it is an adapter.
    """
    if find_adapter_config_file(name_or_path) is not None:
        raise ValueError(
            f"`model`={name_or_path!r} is an adapter, so the language model is no longer the one that it was trained "
            "on: merge it with PEFT's `merge_and_unload`, and serve the language model of what comes out."
        )
    model = load_captioner("model", PromptEmbedder.from_pretrained, name_or_path)
    model.set_output_embeddings(None)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, EVLGenProcessor.from_pretrained(name_or_path)


def check_prompts(prompts: list[torch.Tensor], hidden_size: int, max_new_tokens: int, max_model_len: int) -> None:
    """Refuses prompts that a server would refuse, or cut the captions of.

    Args:
        prompts: Each of shape `(tokens, hidden_size)`.
        hidden_size: The language model's.
        max_new_tokens: Largest length of a caption.
        max_model_len: Tokens that the server has places for, in prompt and caption together.

    Raises:
        TypeError: If a prompt is not of a floating dtype.
        ValueError: If it has another shape, is too long, or is not finite.
    """
    for index, prompt in enumerate(prompts):
        if prompt.dtype not in DTYPES:
            raise TypeError(f"`prompts` must be of one of {DTYPES}, but entry {index} is {prompt.dtype}.")
        if prompt.ndim != 2 or prompt.shape[1] != hidden_size or not len(prompt):
            raise ValueError(
                f"`prompts` must have shape (tokens, {hidden_size}), the language model's, but entry {index} has "
                f"{tuple(prompt.shape)}."
            )
        if len(prompt) + max_new_tokens > max_model_len:
            raise ValueError(
                f"`prompts` entry {index} has {len(prompt)} tokens and `max_new_tokens` is {max_new_tokens}, but the "
                f"server has places for {max_model_len} in all (its --max-model-len)."
            )
        if not prompt.isfinite().all():
            raise ValueError(f"`prompts` must be finite, but entry {index} is not.")


def encode_prompt(prompt: torch.Tensor) -> str:
    """A prompt `(tokens, hidden)` as vLLM reads it: the base64 of what `torch.save` writes."""
    buffer = BytesIO()
    torch.save(prompt.cpu().clone(), buffer)  # of a view, all of the tensor behind it would be saved
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Server:
    """A vLLM server that answers.

    Attributes:
        url: Its address, up to `/v1`.
        client: What talks to it.
        model: What it calls its language model.
        root: Where it has that from: a folder or a name on the Hub.
        max_model_len: Tokens that it has places for, in prompt and caption together.
    """

    url: str
    client: openai.OpenAI
    model: str
    root: str
    max_model_len: int


def connect(url: str, served_model: str | None = None) -> Server:
    """Asks a vLLM server what it serves.

    Args:
        url: Its address, up to `/v1`.
        served_model: What it calls the language model; None if it serves only one.

    Raises:
        ConnectionError: If nothing answers there.
        ValueError: If it does not serve that model, or is no vLLM server.
    """
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("VLLM_API_KEY", "EMPTY"))
    with explained(url):
        try:
            models = {model.id: model for model in client.models.list()}
        except (AttributeError, TypeError, ValueError):  # what the client makes of a page or other JSON
            models = {}
    if not models:
        raise ValueError(f"`server`: {url} serves no model; is it a vLLM server's address up to /v1?")
    if served_model is None and len(models) == 1:
        (served_model,) = models
    if served_model not in models:
        raise ValueError(f"`served_model` is {served_model!r}, but {url} serves {', '.join(map(repr, models))}.")
    served = models[served_model]
    if not isinstance(getattr(served, "max_model_len", None), int):
        raise ValueError(f"`server`: {url} does not tell the `max_model_len` of its model, as a vLLM server does.")
    return Server(url, client, served_model, getattr(served, "root", None) or served_model, served.max_model_len)


def complete(
    server: Server,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    stop_token_ids: list[int],
    banned_token_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """What the server's language model says after each prompt, greedily.

    Args:
        server: From [`connect`].
        prompts: Each of shape `(tokens, hidden)`; see [`check_prompts`].
        max_new_tokens: Largest length of an answer.
        stop_token_ids: Where an answer ends. The language model's own end does not count if it is not among them.
        banned_token_ids: Ids that are never said.

    Returns:
        Ids of the tokens, one list for each prompt. The server's text would leave out bytes that are no whole letters.

    Raises:
        ConnectionError: If the server does not answer.
        RuntimeError: If it refuses, e.g. because it was started without `--enable-prompt-embeds`, or gives no ids.
    """
    with explained(server.url):
        answer = server.client.completions.create(
            model=server.model,
            prompt=None,  # an empty one would be a prompt too
            max_tokens=max_new_tokens,
            temperature=0.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            extra_body={
                "prompt_embeds": [encode_prompt(prompt) for prompt in prompts],
                "repetition_penalty": 1.0,  # the server's default may be another
                "stop_token_ids": stop_token_ids,
                "ignore_eos": True,
                "return_token_ids": True,
                "logit_bias": {str(token_id): -100.0 for token_id in banned_token_ids},
            },
        )
    if len(answer.choices) != len(prompts):
        raise RuntimeError(f"`server`: {server.url} gave {len(answer.choices)} answers to {len(prompts)} prompts.")
    if not all(isinstance(getattr(choice, "token_ids", None), list) for choice in answer.choices):
        raise RuntimeError(f"`server`: {server.url} tells no ids of tokens, as vLLM does since 0.10.2.")
    return [choice.token_ids for choice in sorted(answer.choices, key=lambda choice: choice.index)]


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns the client's errors into ones that say what to do about the server."""
    try:
        yield
    except openai.APIConnectionError as error:
        raise ConnectionError(
            f"`server`: {url} does not answer ({error.__cause__ or error}). A server is started with: {START}"
        ) from error
    except openai.AuthenticationError as error:
        raise RuntimeError(f"`server`: {url} wants its API key in the environment variable VLLM_API_KEY.") from error
    except openai.APIStatusError as error:
        if "enable-prompt-embeds" in error.message:
            message = f"`server`: {url} takes no prompt embeddings. Start it with: {START}"
        else:
            message = f"`server`: {url} refused the request: {error.message}"
        raise RuntimeError(message) from error


def caption(
    model: PromptEmbedder,
    processor: EVLGenProcessor,
    server: Server,
    sources: list[Any],
    prompts: list[str],
    kind: str = "images",
    max_new_tokens: int = 30,
    batch_size: int = 16,
) -> Iterator[list[str]]:
    """Captions images or videos, or answers prompts about them, batch by batch.

    Args:
        model, processor: From [`load_prompt_embedder`].
        server: From [`connect`].
        sources: Images or videos, as the processor takes them.
        prompts: One for all, or one for each.
        kind: `"images"` or `"videos"`: what the sources are.
        max_new_tokens: Largest length of a caption.
        batch_size: How many go into one request.

    Yields:
        The texts of a batch.

    Raises:
        ValueError: If prompts and sources differ in number, a source cannot be read, or a prompt does not fit the
            server.
        ConnectionError, RuntimeError: As in [`complete`].
    """
    if len(prompts) not in (1, len(sources)):
        raise ValueError(f"`prompts` holds {len(prompts)} prompts for {len(sources)} {kind}: give one, or one each.")
    prompts = prompts * len(sources) if len(prompts) == 1 else prompts
    text_config = model.config.text_config.get_text_config()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    placeholders = (model.config.image_token_id, model.config.video_token_id)
    banned = tuple(token_id for token_id in placeholders if token_id < text_config.vocab_size)
    for start in range(0, len(sources), batch_size):
        batch = slice(start, start + batch_size)
        inputs = processor(**{kind: sources[batch]}, text=prompts[batch]).to(model.device)
        embeds = model.embed_prompts(**inputs)
        check_prompts(embeds, text_config.hidden_size, max_new_tokens, server.max_model_len)
        said = complete(server, embeds, max_new_tokens, ends, banned)
        yield [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]


def main(argv: list[str] | None = None) -> list[str]:
    (arguments,) = parse_arguments(ServeArguments, argv=argv)
    if bool(arguments.images) == bool(arguments.videos):
        raise ValueError("Exactly one of `images` and `videos` must be given.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be 1 or more, but is {getattr(arguments, name)}.")
    kind, sources = ("images", arguments.images) if arguments.images else ("videos", arguments.videos)
    server = connect(arguments.server, arguments.served_model)
    model, processor = load_prompt_embedder(arguments.model)
    trained_on = model.config.text_model_name_or_path
    if trained_on and Path(trained_on).name != Path(server.root).name:
        logger.warning(f"The server has {server.root}, but the model was trained on {trained_on}.")
    megabytes = model.get_memory_footprint() / 1e6
    print(f"Vision tower, connector and input embeddings take {megabytes:.0f} MB here.", file=sys.stderr)
    texts: list[str] = []
    settings = (arguments.prompts, kind, arguments.max_new_tokens, arguments.batch_size)
    with tqdm(total=len(sources), desc="Captions", unit=kind.removesuffix("s")) as bar:
        for batch in caption(model, processor, server, sources, *settings):
            for text in batch:
                bar.write(f"{sources[len(texts)]}\t{' '.join(text.split())}")  # a line each, whatever is said
                texts.append(text)
            sys.stdout.flush()  # into a file as well, captions shall come as they are made
            bar.update(len(batch))
    return texts


if __name__ == "__main__":
    main()
