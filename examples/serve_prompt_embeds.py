"""Captions images or videos with a language model that a vLLM server already serves.

EVLGen's language model is frozen, so any deployment of that model can caption. This script computes the soft prompts
and sends them as prompt embeddings (https://docs.vllm.ai/en/stable/features/prompt_embeds). It loads the vision tower,
the connector and the table of input embeddings, but not the language model's layers.

    vllm serve facebook/opt-2.7b --enable-prompt-embeds
    python examples/serve_prompt_embeds.py --model path/to/model --images a.png b.png

The server must serve the language model that the checkpoint was trained on: `text_model_name_or_path` in its
config.json, or a folder that `model.language_model.save_pretrained` wrote. Captions equal those of greedy `generate`
if the server computes in the same `--dtype`. For a server with `--api-key`, put the key into the environment variable
`VLLM_API_KEY`.
"""

import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serve_prompt_embeds_client import Server, check_prompts, complete, connect
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.utils import find_adapter_config_file, logging

from common.command_line import check_count, parse_arguments
from common.models import load_captioner
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.soft_prompts import embed_ids
from processing_evlgen import EVLGenProcessor
from processing_evlgen.inputs import check_max_tiles

logger = logging.get_logger(__name__)


@dataclass
class ServeArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    server: str = HfArg(default="http://127.0.0.1:8000/v1", help="Address of the vLLM server.")
    served_model: str | None = HfArg(default=None, help="The server's name for the language model, if it has several.")
    images: list[str] = HfArg(default_factory=list, help="Images: paths or URLs.")
    videos: list[str] = HfArg(default_factory=list, help="Videos instead of images: paths or URLs.")
    prompts: list[str] = HfArg(default_factory=lambda: [""], help="One prompt for all images or videos, or one each.")
    max_new_tokens: int = HfArg(default=30, help="Largest length of a caption in tokens.")
    batch_size: int = HfArg(default=16, help="Images or videos in one request.")
    max_tiles: int | None = HfArg(default=None, help="Largest number of tiles of an image. Default: the model's.")
    num_image_tokens: int | None = HfArg(
        default=None, help="Tokens of each image or video, if the model was trained with several numbers."
    )
    timeout: float = HfArg(default=120.0, help="Seconds to wait for a reply of the server.")

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, 1)
        check_count("batch_size", self.batch_size, 1)
        if self.max_tiles is not None:
            check_max_tiles(self.max_tiles)
        if self.num_image_tokens is not None:
            check_count("num_image_tokens", self.num_image_tokens, 1)
        if not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0, but is {self.timeout}.")


class PromptEmbedder(EVLGenForConditionalGeneration):
    """An EVLGen whose language model has input embeddings but no layers, so that it cannot generate."""

    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]

    def __init__(self, config: EVLGenConfig, *towers: PreTrainedModel | None, **named_towers: PreTrainedModel | None):
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = 0
        super().__init__(config, *towers, **named_towers)

    @staticmethod
    def load_language_model(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, num_hidden_layers=0, **kwargs)
        # A checkpoint that names its towers is compared with the base model's own configuration.
        model.config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        return model

    @torch.no_grad()
    def embed_prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, **vision: torch.Tensor
    ) -> list[torch.Tensor]:
        """Embeds prompts with their images or videos, as the complete model does before its language model.

        All inputs are the processor's; `vision` are pixels, the grids of tiles and the mask of frames. Returns a
        tensor of shape `(tokens, hidden)` for each prompt, without padding.
        """
        encoded = self.encode(input_ids, **vision)
        embeds = embed_ids(self.get_input_embeddings(), input_ids, encoded, self.config)  # (batch, sequence, hidden)
        return [row[mask] for row, mask in zip(embeds, attention_mask.bool(), strict=True)]


def load_prompt_embedder(name_or_path: str) -> tuple[PromptEmbedder, EVLGenProcessor]:
    """Loads the parts of a checkpoint that embed prompts, and its processor. An adapter raises a ValueError."""
    if find_adapter_config_file(name_or_path) is not None:
        raise ValueError(
            f"`model`={name_or_path!r} is an adapter, which may change the language model. Merge it first: "
            f"python examples/publish.py --model {name_or_path} --merge true --folder MERGED. Then serve the merged "
            "language model."
        )
    model = load_captioner("model", PromptEmbedder.from_pretrained, name_or_path)
    model.set_output_embeddings(None)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, EVLGenProcessor.from_pretrained(name_or_path)


def caption(
    model: PromptEmbedder,
    processor: EVLGenProcessor,
    server: Server,
    sources: list[Any],
    prompts: list[str],
    modality: str = "images",
    max_new_tokens: int = 30,
    batch_size: int = 16,
    **layout: int | None,
) -> Iterator[list[str]]:
    """Captions images or videos, or answers prompts about them, and yields the texts of each batch.

    There is one prompt for all `sources` or one for each. `modality` is `"images"` or `"videos"`. `layout` are the
    processor's `max_tiles` and `num_image_tokens`. A ValueError names a source that cannot be read, or a prompt that
    does not fit the server. Other errors are those of [`complete`].
    """
    if len(prompts) not in (1, len(sources)):
        counts = f"{len(prompts)} prompts for {len(sources)} {modality}"
        raise ValueError(f"`prompts` holds {counts}. Give one, or one for each.")
    prompts = prompts * len(sources) if len(prompts) == 1 else prompts
    text_config = model.config.text_config.get_text_config()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    placeholders = (model.config.image_token_id, model.config.video_token_id)
    banned = tuple(token_id for token_id in placeholders if token_id < text_config.vocab_size)
    for start in range(0, len(sources), batch_size):
        batch = slice(start, start + batch_size)
        inputs = processor(**{modality: sources[batch]}, text=prompts[batch], **layout).to(model.device)
        embeds = model.embed_prompts(**inputs)
        check_prompts(embeds, text_config.hidden_size, max_new_tokens, server.max_model_len)
        token_ids = complete(server, embeds, max_new_tokens, text_config.vocab_size, ends, banned)
        yield [text.strip() for text in processor.batch_decode(token_ids, skip_special_tokens=True)]


def main(argv: list[str] | None = None) -> list[str]:
    (arguments,) = parse_arguments(ServeArguments, argv=argv)
    if bool(arguments.images) == bool(arguments.videos):
        raise ValueError("Exactly one of `images` and `videos` must be given.")
    modality, sources = ("images", arguments.images) if arguments.images else ("videos", arguments.videos)
    server = connect(arguments.server, arguments.served_model, arguments.timeout)
    model, processor = load_prompt_embedder(arguments.model)
    trained_on = model.config.text_model_name_or_path
    if trained_on and Path(trained_on).name != Path(server.root).name:
        logger.warning(f"The server serves {server.root}, but the model was trained on {trained_on}.")
    megabytes = model.get_memory_footprint() / 1e6
    print(f"Vision tower, connector and input embeddings take {megabytes:.0f} MB here.", file=sys.stderr)
    texts: list[str] = []
    settings = (arguments.prompts, modality, arguments.max_new_tokens, arguments.batch_size)
    layout = {"max_tiles": arguments.max_tiles, "num_image_tokens": arguments.num_image_tokens}
    with tqdm(total=len(sources), desc="Captions", unit=modality.removesuffix("s")) as bar:
        for batch in caption(model, processor, server, sources, *settings, **layout):
            for text in batch:
                bar.write(f"{sources[len(texts)]}\t{' '.join(text.split())}")  # always one line
                texts.append(text)
            sys.stdout.flush()  # a file, too, gets captions as they are generated
            bar.update(len(batch))
    return texts


if __name__ == "__main__":
    main()
