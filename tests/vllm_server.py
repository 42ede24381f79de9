"""A small stand-in for `vllm serve` on 127.0.0.1, for tests of requests to it and of its replies.

    with VLLMServer(model.language_model, processor.tokenizer) as server:
        serve_prompt_embeds.main(["--server", server.url, ...])
        server.requests[0]["prompt_embeds"]  # the decoded tensors

It answers `/v1/models` and, for prompt embeddings, `/v1/completions`. It generates greedily with the given language
model, and has the status codes and error messages of vLLM 0.32. Unlike vLLM it refuses unknown fields.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import torch

FIELDS = {"model", "prompt", "max_tokens", "temperature", "frequency_penalty", "presence_penalty", "prompt_embeds"}
FIELDS |= {"repetition_penalty", "stop_token_ids", "ignore_eos", "return_token_ids", "logit_bias"}


class VLLMServer:
    """
    Args:
        language_model, tokenizer: The model to serve, as `text-model`.
        prompt_embeds: Whether the server was started with `--enable-prompt-embeds`.
        max_model_len: Largest number of tokens in a prompt and its answer together; None as of another server.
        api_key: The server's `--api-key`.
        root: The folder or repository that the server loaded the model from.
    """

    def __init__(self, language_model, tokenizer, prompt_embeds=True, max_model_len=128, api_key=None, root="text"):
        self.language_model, self.tokenizer, self.prompt_embeds = language_model, tokenizer, prompt_embeds
        self.max_model_len, self.api_key = max_model_len, api_key
        self.entry = {"id": "text-model", "object": "model", "root": root, "max_model_len": max_model_len}
        if max_model_len is None:
            del self.entry["max_model_len"]
        self.requests = []

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def complete(self, body):
        """Returns the status and the reply to a request."""
        if not self.prompt_embeds:
            return _error(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        if body.keys() - FIELDS or body.get("prompt") is not None:
            return _error(400, f"The stand-in does not know what to do with {body.keys() - FIELDS or body['prompt']}.")
        prompts = [
            torch.load(BytesIO(base64.b64decode(prompt, validate=True)), weights_only=True)
            for prompt in body["prompt_embeds"]
        ]
        self.requests.append(body | {"prompt_embeds": prompts})
        for prompt in prompts:
            if prompt.ndim != 2 or prompt.shape[1] != self.language_model.config.hidden_size:
                return _error(400, f"`prompt_embeds` has shape {tuple(prompt.shape)}.")
            if len(prompt) > self.max_model_len:
                return _error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        choices = [{"index": index, **self.generate(prompt, body)} for index, prompt in enumerate(prompts)]
        return 200, {"id": "cmpl-0", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}

    @torch.no_grad()
    def generate(self, prompt, body):
        if body["temperature"] != 0 or body["repetition_penalty"] != 1:
            raise NotImplementedError("The stand-in is greedy.")
        eos = self.language_model.generation_config.eos_token_id
        stop = {*body["stop_token_ids"], *([] if body["ignore_eos"] else [eos])}
        embeds, token_ids = prompt.to(self.language_model.dtype), []
        embed = self.language_model.get_input_embeddings()
        while len(token_ids) < min(body["max_tokens"], self.max_model_len - len(prompt)):
            logits = self.language_model(inputs_embeds=embeds[None]).logits[0, -1]
            for token_id, bias in body["logit_bias"].items():
                logits[int(token_id)] += bias
            token_id = int(logits.argmax())
            token_ids.append(token_id)
            if token_id in stop:
                break
            embeds = torch.cat([embeds, embed(torch.tensor([token_id]))])
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {"text": text, "token_ids": token_ids}


def _error(status, message, error_type="BadRequestError"):
    return status, {"error": {"message": message, "type": error_type, "param": None, "code": status}}


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(*(self.refusal() or (200, {"object": "list", "data": [server.entry]})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*(self.refusal() or server.complete(body)))

        def refusal(self):
            if server.api_key and self.headers.get("Authorization") != f"Bearer {server.api_key}":
                return _error(401, "Unauthorized", "AuthenticationError")
            if self.path not in ("/v1/models", "/v1/completions"):
                return _error(404, "Not Found", "NotFoundError")
            return None

        def reply(self, status, body):
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    return Handler
