"""Sends prompt embeddings to a vLLM server, within limits on time and size, and checks its replies."""

import asyncio
import base64
import json
import os
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import httpx2 as httpx  # huggingface_hub's HTTP library
import torch

REPLY_MB = 16  # of 2^20 bytes; the token ids of a batch take some KB
START_COMMAND = "vllm serve MODEL --enable-prompt-embeds"


def check_prompts(prompts: list[torch.Tensor], hidden_size: int, max_new_tokens: int, max_model_len: int) -> None:
    """Refuses prompts, each of shape `(tokens, hidden)`, that a server would refuse, or whose captions it would cut.

    Each must be finite and of the language model's width. `max_model_len` is the server's largest length of prompt and
    caption together, in tokens.
    """
    for index, prompt in enumerate(prompts):
        if prompt.shape[1] != hidden_size:  # of a language model that widens its embeddings itself
            wanted = f"(tokens, {hidden_size}), the language model's"
            raise ValueError(f"`prompts` must have shape {wanted}, but entry {index} has {tuple(prompt.shape)}.")
        if len(prompt) + max_new_tokens > max_model_len:
            raise ValueError(
                f"`prompts` entry {index} has {len(prompt)} tokens and `max_new_tokens` is {max_new_tokens}, but the "
                f"server allows {max_model_len} in all (its --max-model-len)."
            )
        if not prompt.isfinite().all():
            raise ValueError(f"`prompts` must be finite, but entry {index} is not.")


def encode_prompt(prompt: torch.Tensor) -> str:
    """Encodes a prompt of shape `(tokens, hidden)` for vLLM: base64 of the bytes that `torch.save` writes."""
    buffer = BytesIO()
    torch.save(prompt.cpu().clone(), buffer)  # a view would be saved with the whole tensor behind it
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Server:
    """A vLLM server that answers."""

    url: str  # up to `/v1`
    model: str  # its name for the language model
    root: str  # the folder or the name on the Hub that it loaded the language model from
    max_model_len: int  # largest length of prompt and caption together, in tokens
    timeout: float  # seconds to wait for a reply


def connect(url: str, served_model: str | None = None, timeout: float = 120.0) -> Server:
    """Finds `served_model` on a vLLM server, or its only model. Raises as [`request`] does.

    A ValueError states that the server does not serve that model, or is not a vLLM server.
    """
    entries = request(url, "/models", "data", timeout)
    models = {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), str)}
    if not models:
        raise ValueError(f"`server`: {url} serves no model; is it a vLLM server's address up to /v1?")
    if served_model is None and len(models) == 1:
        (served_model,) = models
    if served_model not in models:
        raise ValueError(f"`served_model` is {served_model!r}, but {url} serves {', '.join(map(repr, models))}.")
    max_model_len, root = (models[served_model].get(name) for name in ("max_model_len", "root"))
    if type(max_model_len) is not int:
        raise ValueError(f"`server`: {url} does not give the `max_model_len` of its model, as a vLLM server does.")
    return Server(url, served_model, root if isinstance(root, str) else served_model, max_model_len, timeout)


def complete(
    server: Server,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    vocab_size: int,
    stop_token_ids: list[int],
    banned_token_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continues prompts greedily with the server's language model. Raises as [`request`] does.

    Each prompt has the shape `(tokens, hidden)`. The language model's own end token counts only if it is in
    `stop_token_ids`. Returns one list of token ids for each prompt; a RuntimeError names a server that gives others.
    The server's text is not used, since it would lack bytes that are no complete characters.
    """
    body = {
        "model": server.model,
        "prompt": None,  # an empty string would be a prompt too
        "prompt_embeds": [encode_prompt(prompt) for prompt in prompts],
        "max_tokens": max_new_tokens,
        "temperature": 0.0,
        # The server's own defaults may differ from these.
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": stop_token_ids,
        "ignore_eos": True,
        "return_token_ids": True,
        "logit_bias": {str(token_id): -100.0 for token_id in banned_token_ids},
    }
    choices = request(server.url, "/completions", "choices", server.timeout, body)
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if len(choices) != len(prompts) or by_index.keys() != set(range(len(prompts))):
        raise RuntimeError(f"`server`: {server.url} does not give one answer to each of {len(prompts)} prompts.")
    token_ids = [by_index[index].get("token_ids") for index in range(len(prompts))]
    if not all(isinstance(row, list) for row in token_ids):
        raise RuntimeError(f"`server`: {server.url} gives no token ids, as vLLM does since 0.10.2.")
    valid = range(vocab_size)
    if not all(len(row) <= max_new_tokens and all(type(i) is int and i in valid for i in row) for row in token_ids):
        raise RuntimeError(
            f"`server`: {server.url} must give at most {max_new_tokens} token ids from 0 to {vocab_size - 1} for each "
            "prompt, but gives others. Does it serve another language model?"
        )
    return token_ids


def request(url: str, path: str, key: str, timeout: float, body: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Sends JSON with POST, or GET without a `body`. Returns the objects in the list that the reply has under `key`.

    A reply without such a list gives an empty one. A ConnectionError states that the server does not answer within
    `timeout` seconds. A RuntimeError states that it refuses, or that its reply is no JSON or larger than `REPLY_MB`.
    """
    try:
        status, content = asyncio.run(asyncio.wait_for(exchange(url, path, body), timeout))
        if status >= 400:
            raise RuntimeError(f"`server`: {url} {refusal(status, content.decode(errors='replace'))}")
        reply = json.loads(content)
    except TimeoutError as error:
        raise ConnectionError(f"`server`: {url} has not replied in {timeout:g} s (`timeout`).") from error
    except httpx.TransportError as error:
        raise ConnectionError(
            f"`server`: {url} does not answer ({error}). Start a server with: {START_COMMAND}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"`server`: {url} replies to {path} with something else than JSON.") from error
    entries = reply.get(key) if isinstance(reply, dict) else None
    return entries if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries) else []


async def exchange(url: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
    """Sends a request and reads the reply piece by piece, within `REPLY_MB`. Returns status and content."""
    headers = {"Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', 'EMPTY')}", "Accept-Encoding": "identity"}
    content = bytearray()
    # httpx's own timeout is for each piece of a reply. A byte now and then would keep it waiting for ever.
    async with (
        httpx.AsyncClient(headers=headers, timeout=None) as client,
        client.stream("POST" if body else "GET", url.rstrip("/") + path, json=body) as response,
    ):
        async for chunk in response.aiter_raw():  # never decompressed: that would evade the limit
            content += chunk
            if len(content) > REPLY_MB * 2**20:
                raise RuntimeError(f"`server`: {url} sends a reply of over {REPLY_MB} MB.")
    return response.status_code, bytes(content)


def refusal(status: int, message: str) -> str:
    """States why a server refuses a request."""
    if status == 401:
        return "needs its API key in the environment variable VLLM_API_KEY."
    if "enable-prompt-embeds" in message:
        return f"takes no prompt embeddings. Start it with: {START_COMMAND}"
    return f"refused the request: {status} {message[:500]!r}"
