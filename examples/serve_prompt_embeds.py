"""Captions images or videos with a language model that a vLLM server already serves.

This script computes the soft prompts and sends them as prompt embeddings
(https://docs.vllm.ai/en/stable/features/prompt_embeds). It does not load the language model's layers.

    vllm serve facebook/opt-2.7b --enable-prompt-embeds
    python examples/serve_prompt_embeds.py --model path/to/model --images a.png b.png

The server must have the language model of the checkpoint: `text_model_name_or_path` in its config.json, or a folder
that `model.language_model.save_pretrained` wrote. Captions equal those of greedy `generate` if the server computes in
the same `--dtype`. The key of a server with `--api-key` is read from the environment variable `VLLM_API_KEY`.
"""

import os
import sys
import warnings
from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import httpx  # it brings this library
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg

from common.arguments import CaptionerArguments, parse_arguments
from common.models import load_trainable
from common.processes import run_script
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.soft_prompts import check_finite, embed_ids
from processing_evlgen import EVLGenProcessor


@dataclass
class ServeArguments(CaptionerArguments):
    server: str = HfArg(default="http://127.0.0.1:8000/v1", help="Address of the vLLM server.")
    served_model: str | None = HfArg(default=None, help="The server's name for the language model, if it has several.")
    images: list[str] = HfArg(default_factory=list, help="Images: paths or URLs.")
    videos: list[str] = HfArg(default_factory=list, help="Videos instead of images: paths or URLs.")
    prompts: list[str] = HfArg(default_factory=lambda: [""], help="One prompt for all images or videos, or one each.")
    max_new_tokens: int = HfArg(default=30, help="Largest length of a caption in tokens.")
    timeout: float = HfArg(default=120.0, help="Seconds to wait for the server.")


class PromptEmbedder(EVLGenForConditionalGeneration):
    """An EVLGen whose language model has input embeddings but no layers, so that it cannot generate."""

    _keys_to_ignore_on_load_unexpected = [r"^language_model\."]  # transformers' own name; there is no argument for it

    def __init__(self, config: EVLGenConfig, *towers: PreTrainedModel | None, **named_towers: PreTrainedModel | None):
        config.text_config.num_hidden_layers = 0
        super().__init__(config, *towers, **named_towers)

    @staticmethod
    def load_language_model(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, num_hidden_layers=0, **kwargs)
        # A checkpoint that names its towers is compared with the base model's own configuration.
        model.config = AutoConfig.from_pretrained(name_or_path, **kwargs)
        return model

    @torch.no_grad()
    def embed_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **media: Any) -> list[torch.Tensor]:
        """Embeds the processor's prompts as the whole model does: `(tokens, hidden)` each, without padding."""
        encoded = self.encode(input_ids, **media)
        embeds = embed_ids(self.get_input_embeddings(), input_ids, encoded, self.config)  # (batch, sequence, hidden)
        return [row[mask] for row, mask in zip(embeds, attention_mask.bool(), strict=True)]


def request(arguments: ServeArguments, path: str, key: str, body: dict | None = None) -> list[dict[str, Any]]:
    """Sends JSON with POST, or GET without a `body`, and returns the list that the reply has under `key`."""
    url = arguments.server.rstrip("/") + path
    headers = {"Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', 'EMPTY')}"}
    try:
        reply = httpx.request("POST" if body else "GET", url, json=body, headers=headers, timeout=arguments.timeout)
        if reply.is_error:
            reason = f"{reply.status_code} {reply.text[:500]!r}. A key is read from VLLM_API_KEY."
            raise RuntimeError(f"`server`: {url} refuses the request: {reason}")
        return reply.json()[key]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        reason = f"does not answer as vLLM does, within `timeout`={arguments.timeout:g} s: {error!r}"
        raise ConnectionError(f"`server`: {url} {reason}. Start: vllm serve MODEL --enable-prompt-embeds") from error


def complete(
    arguments: ServeArguments, served: dict[str, Any], model: PromptEmbedder, prompts: list[torch.Tensor]
) -> list[list[int]]:
    """Continues prompts, `(tokens, hidden)` each, greedily with the server's language model. Returns token ids."""
    config = model.config.text_config.get_text_config()
    longest = served["max_model_len"] - arguments.max_new_tokens
    check_finite({"`prompts`": tuple(prompts)})  # a server answers NaN with words, too
    # What vLLM would refuse, or whose caption it would cut.
    for index, shape in enumerate(tuple(prompt.shape) for prompt in prompts):
        if shape[0] > longest or shape[1] != config.hidden_size:  # of a model that widens its embeddings itself
            wanted = f"({longest} or less, {config.hidden_size}) with `max_new_tokens`={arguments.max_new_tokens}"
            raise ValueError(f"`prompts` must have shape {wanted} for this server, but entry {index} has {shape}.")
    encoded = []
    for prompt in prompts:  # a view would be saved with the whole tensor behind it
        torch.save(prompt.cpu().clone(), buffer := BytesIO())
        encoded.append(b64encode(buffer.getvalue()).decode())
    end_ids = model.generation_config.eos_token_id
    banned_ids = [i for i in (model.config.image_token_id, model.config.video_token_id) if i < config.vocab_size]
    body = {
        "model": served["id"],
        "prompt": None,  # an empty string would be a prompt too
        "prompt_embeds": encoded,
        "max_tokens": arguments.max_new_tokens,
        "temperature": 0.0,
        # The server's own defaults may differ from these. The checkpoint's end tokens replace the language model's.
        **{"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": True},
        "stop_token_ids": [end_ids] if isinstance(end_ids, int) else list(end_ids or []),
        "return_token_ids": True,  # its text would lack bytes that are no complete characters
        "logit_bias": {str(token_id): -100.0 for token_id in banned_ids},
    }
    choices = request(arguments, "/completions", "choices", body)
    token_ids = [choice.get("token_ids") for choice in sorted(choices, key=lambda choice: choice["index"])]
    if len(token_ids) != len(prompts) or None in token_ids:
        raise RuntimeError("`server` must give token ids for each prompt, as vLLM does since 0.10.2, but does not.")
    return token_ids


def main(argv: list[str] | None = None) -> list[str]:
    (arguments,) = parse_arguments(ServeArguments, argv=argv)
    if bool(arguments.images) == bool(arguments.videos):
        raise ValueError("Exactly one of `images` and `videos` must be given.")
    modality, sources = ("images", arguments.images) if arguments.images else ("videos", arguments.videos)
    prompts = arguments.prompts * len(sources) if len(arguments.prompts) == 1 else arguments.prompts
    if len(prompts) != len(sources):
        raise ValueError(f"`prompts` holds {len(prompts)} prompts for {len(sources)} {modality}: give 1, or one each.")
    entries = {entry["id"]: entry for entry in request(arguments, "/models", "data")}
    served = entries.get(arguments.served_model or next(iter(entries), None))
    if served is None:
        raise ValueError(f"`served_model` is {arguments.served_model!r}, but the server has {', '.join(entries)}.")
    if not served.keys() >= {"max_model_len", "root"}:
        raise ValueError(f"`server`: {arguments.server} is no vLLM server: it describes its model by {served} alone.")
    # An adapter is refused, since it may change the language model.
    model = load_trainable(arguments.model, load=PromptEmbedder.from_pretrained)
    model.set_output_embeddings(None)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    processor = EVLGenProcessor.from_pretrained(arguments.model, **arguments.layout)
    model.config.read_budgets("num_image_tokens", processor.num_image_tokens, 1)  # raises out of range
    trained_on = Path(model.config.text_model_name_or_path or served["root"])
    if trained_on.name != Path(served["root"]).name:
        warnings.warn(f"The server serves {served['root']}, but the model was trained on {trained_on}.", stacklevel=2)
    print(f"The parts that are loaded here take {model.get_memory_footprint() / 1e6:.0f} MB.", file=sys.stderr)
    texts: list[str] = []
    for start in tqdm(range(0, len(sources), arguments.batch_size), desc="Captions", unit="batch"):
        batch = slice(start, start + arguments.batch_size)
        inputs = processor(**{modality: sources[batch]}, text=prompts[batch]).to(model.device)
        token_ids = complete(arguments, served, model, model.embed_prompts(**inputs))
        texts += [text.strip() for text in processor.batch_decode(token_ids, skip_special_tokens=True)]
        for source, text in zip(sources[batch], texts[start:], strict=True):
            tqdm.write(f"{source}\t{' '.join(text.split())}")  # always one line
        sys.stdout.flush()  # a file, too, gets captions as they are generated
    return texts


if __name__ == "__main__":
    run_script(main)
