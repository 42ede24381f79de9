"""vLLM serves checkpoints without a plugin, and its replies are the ids of `generate`.

Tests of a server need EVLGEN_VLLM_PYTHON, the name of a Python that has vLLM.
"""

import base64
import contextlib
import io
import itertools
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, EVLGenModel
from processing_evlgen import EVLGenProcessor

from .documents import blocks_of_page
from .helpers import (
    IMAGE_SIZE,
    LAYERS,
    ROOT,
    TEXT_SIZES,
    generate_new,
    join,
    noise_images,
    save,
    save_animation,
    tiny_image_processor,
    tiny_tokenizer,
    tiny_towers,
)

# vLLM's attention on a CPU needs heads of 32 channels or more.
SIZES = {**TEXT_SIZES, "hidden_size": 64, "max_position_embeddings": 256}
TEXT_CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=True),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=64),
}
CONNECTOR = {**LAYERS, "merge_r": 3}
TOKENS = 8


def save_checkpoint(folder, vision, text, image_token_range=None, max_tiles=1, **fields):
    tower, _ = tiny_towers(vision)
    language_model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text]).eval()
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    tokenizer = tiny_tokenizer(bos=text == "opt", chat=text != "opt")
    model = join(tower, language_model, connector_config=CONNECTOR, image_token_id=len(tokenizer), **fields)
    model.config.image_token_range = image_token_range
    if model.time_embedding is not None:
        torch.nn.init.normal_(model.time_embedding.weight)
    settings = {"image_token_range": image_token_range, "max_tiles": max_tiles}
    settings["num_image_tokens"] = model.config.num_image_tokens
    processor = EVLGenProcessor(tiny_image_processor(), tokenizer, **settings)
    save(folder, model, processor)
    return model, processor


class Server:
    """vLLM's server of a checkpoint, in a process of its own."""

    def __init__(self, model, processor, folder, *arguments):
        self.model, self.processor, self.log = model, processor, folder / "vllm.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [os.environ["EVLGEN_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--model", "model"]
        command += ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "160", "--enforce-eager"]
        command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "256", "--port", str(self.port), *arguments]
        environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
        environment |= {"HOME": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def __enter__(self):
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url("health"), timeout=5):
                return self
            time.sleep(1)
        self.__exit__()
        raise AssertionError(f"The server did not start:\n{self.log.read_text()[-6000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def url(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"

    def post(self, body, path="v1/chat/completions"):
        """The status and the reply, as text."""
        data = json.dumps({"model": "model", "temperature": 0, "max_tokens": TOKENS, **body}).encode()
        request = urllib.request.Request(self.url(path), data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def chat(self, *turns, **settings):
        """The token ids of the reply. Turns hold texts, images and paths of videos, of user and assistant in turn."""
        status, reply = self.post({"messages": as_messages(turns, content), "return_token_ids": True, **settings})
        assert status == 200, reply
        return json.loads(reply)["choices"][0]["token_ids"]

    def expected(self, *turns, **settings):
        """The token ids of `generate` for the same turns. Settings are those of the processor."""
        media = {"image": [], "video": []}
        for part in (part for turn in turns for part in turn if not isinstance(part, str)):
            media[kind(part)].append(str(part) if isinstance(part, Path) else part)
        messages = as_messages(turns, lambda part: content(part) if kind(part) == "text" else {"type": kind(part)})
        template = self.processor.chat_template or (ROOT / "examples" / "plain_chat_template.jinja").read_text()
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, chat_template=template)
        return self.generate(**{f"{name}s": parts for name, parts in media.items() if parts}, text=text, **settings)

    def generate(self, **inputs):
        """The token ids that `generate` adds."""
        return generate_new(self.model, self.processor(**inputs), max_new_tokens=TOKENS)[0].tolist()


def kind(part):
    return "text" if isinstance(part, str) else "video" if isinstance(part, Path) else "image"


def as_messages(turns, content):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": [*map(content, turn)]} for role, turn in zip(roles, turns, strict=False)]


def content(part):
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Path):
        data = base64.b64encode(part.read_bytes()).decode()
        return {"type": "video_url", "video_url": {"url": f"data:video/gif;base64,{data}"}}
    file = io.BytesIO()
    part.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def save_videos(folder):
    frames = noise_images(6)
    dark = [frame.point(lambda value: value // 4) for frame in frames[:2]]
    for name, shown in (("forth.gif", frames), ("back.gif", frames[::-1][:4]), ("dark.gif", dark)):
        save_animation(folder / name, shown, duration=100)
    return [folder / name for name in ("forth.gif", "back.gif", "dark.gif")]


needs_vllm = pytest.mark.skipif("EVLGEN_VLLM_PYTHON" not in os.environ, reason="EVLGEN_VLLM_PYTHON names no Python")


PAIRS = [("siglip", "llama"), ("eva", "qwen2"), ("convnext", "opt"), ("timm_vit", "llama")]


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def server(request, tmp_path_factory):
    vision, text = request.param
    if "timm" in vision and subprocess.run([os.environ["EVLGEN_VLLM_PYTHON"], "-c", "import timm"]).returncode:
        pytest.skip("needs timm beside vLLM")
    folder = tmp_path_factory.mktemp("vllm")
    model, processor = save_checkpoint(folder / "model", vision, text)
    template = ["--chat-template", str(ROOT / "examples" / "plain_chat_template.jinja")] if text == "opt" else []
    with Server(model, processor, folder, *template) as running:
        yield running


@needs_vllm
def test_replies_are_those_of_generate(server, tmp_path):
    first, second = noise_images(2)
    wide = first.resize((90, 20))
    grey, transparent, palette = first.convert("L"), second.convert("RGBA"), second.convert("P")
    turns = [[image, "what is it?"] for image in (first, second, wide, grey, transparent, palette)]
    conversations = [(turn,) for turn in (*turns, [first, second, "what are they?"], ["what is it?"])]
    conversations += [([video, "what is it?"],) for video in save_videos(tmp_path)]
    if server.processor.chat_template is not None:
        conversations.append(([first, "what is it?"], ["a cat"], ["and this?", second]))
    expected = [server.expected(*turns) for turns in conversations]
    assert len({tuple(ids) for ids in expected}) >= 6  # replies depend on what is shown
    assert [server.chat(*turns) for turns in conversations] == expected
    with ThreadPoolExecutor(len(conversations)) as pool:  # in batches
        assert list(pool.map(lambda turns: server.chat(*turns), conversations)) == expected


@needs_vllm
def test_the_documented_requests_by_curl_and_from_python_are_answered(server, tmp_path):
    image = noise_images(1)[0]
    image.save(tmp_path / "image.png")
    blocks = [block.code for block in blocks_of_page(ROOT / "docs" / "serve.md")]
    curl, python = (code for code in blocks if "chat/completions" in code or "from openai" in code)
    texts = []
    for command in (["bash", "-c", curl], [os.environ["EVLGEN_VLLM_PYTHON"], "-c", python]):
        command[-1] = command[-1].replace("http://127.0.0.1:8000/", server.url("")).replace("outputs/demo", "model")
        command[-1] = command[-1].replace("30", str(TOKENS))
        texts.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    reply = json.loads(texts[0])["choices"][0]["message"]["content"]
    assert reply == texts[1].removesuffix("\n")
    expected = server.processor.tokenizer.decode(server.expected([image]), skip_special_tokens=True)
    assert reply.rstrip("\ufffd") == expected.rstrip("\ufffd")  # vLLM leaves out half a character at the end


@needs_vllm
def test_no_request_ends_the_engine(server):
    image = noise_images(1)[0]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    video_id = server.model.config.video_token_id
    for body in (
        {"messages": [{"role": "user", "content": "<video> and <image>"}], **penalties},
        {"messages": [{"role": "user", "content": [content(image), content("<video> <image>")]}], **penalties},
        {"messages": [{"role": "user", "content": "a"}], "logit_bias": {str(video_id): 100}},
        {"messages": [{"role": "user", "content": "a"}], "allowed_token_ids": [video_id]},
    ):
        status, reply = server.post(body)
        assert status in (200, 400), reply
    for prompt in ("<video>" * 20, [video_id, video_id - 1, 5], [10**6]):
        status, reply = server.post({"prompt": prompt, **penalties}, "v1/completions")
        assert status in (200, 400), reply
    assert server.chat([image, "what is it?"]) == server.expected([image, "what is it?"])


@needs_vllm
def test_merged_videos_are_served_with_the_times_of_their_frames(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model", "siglip", "llama", video_mode="merge")
    videos = save_videos(tmp_path)
    with Server(*checkpoint, tmp_path) as server:
        with ThreadPoolExecutor(len(videos)) as pool:  # in a batch, though they differ in length
            replies = list(pool.map(lambda video: server.chat([video, "what is it?"]), videos))
        assert replies == [server.expected([video, "what is it?"]) for video in videos]
        assert [server.chat([video, "what is it?"]) for video in videos] == replies
        assert len(set(map(tuple, replies))) == 3
        image = noise_images(1)[0]
        assert server.chat([image, "what?"]) == server.expected([image, "what?"])
        frames = [Image.open(videos[0]).convert("RGB")] * 4  # times matter
        slow, quick = (server.generate(videos=[frames], video_metadata={"fps": fps}) for fps in (0.1, 10))
        assert slow != quick


def serve_tiles(folder, max_tiles=1, *arguments, **fields):
    """A server of a model for 1 to 16 tokens an image."""
    checkpoint = save_checkpoint(folder / "model", "siglip", "llama", [1, 16], max_tiles, **fields)
    return Server(*checkpoint, folder, *arguments)


def conversations_of_all_sizes(folder):
    # They fit their tiles, since releases of Pillow resize differently.
    (small,), (square, large) = noise_images(1), noise_images(2, 64)
    wide, tall = square.crop((0, 0, 64, 32)), large.crop((0, 0, 32, 64))
    forth, back, _ = save_videos(folder)
    parts = [[image] for image in (small, square, wide, tall, large)]
    parts += [[square, small], [small, wide, large], [tall, square, small, large]]
    parts += [[forth], [square, back], [forth, small, back]]
    return [([*media, "what is it?"],) for media in parts]


def assert_all_are_those_of_generate(server, conversations, **settings):
    expected = [server.expected(*turns, **settings) for turns in conversations]
    assert len(set(map(tuple, expected))) >= 5  # replies depend on what is shown
    assert [server.chat(*turns, mm_processor_kwargs=settings or None) for turns in conversations] == expected
    with ThreadPoolExecutor(len(conversations)) as pool:  # in batches
        replies = pool.map(lambda turns: server.chat(*turns, mm_processor_kwargs=settings or None), conversations)
        assert list(replies) == expected


@needs_vllm
@pytest.mark.parametrize("video_mode", ["mean", "merge"])
def test_large_images_are_served_in_tiles_and_each_request_may_choose_a_budget(video_mode, tmp_path):
    conversations = conversations_of_all_sizes(tmp_path)
    with serve_tiles(tmp_path, 4, "--trust-request-mm-kwargs", video_mode=video_mode) as server:
        assert_all_are_those_of_generate(server, conversations)
        one_tile = [server.expected(*turns, max_tiles=1) for turns in conversations]
        assert one_tile != [server.expected(*turns) for turns in conversations]
        assert_all_are_those_of_generate(server, conversations, num_image_tokens=3, max_tiles=1)
        assert_all_are_those_of_generate(server, conversations, num_image_tokens=16, max_tiles=2)
        messages = [{"role": "user", "content": [content(noise_images(1)[0])]}]
        for refused in ({"num_image_tokens": 17}, {"num_image_tokens": [3, 4]}, {"max_tiles": 10**9}):
            status, reply = server.post({"messages": messages, "mm_processor_kwargs": refused})
            assert status == 400 and str(*refused.values()) in reply, reply
        assert server.chat(*conversations[0]) == server.expected(*conversations[0])


@needs_vllm
def test_a_server_may_be_started_with_a_budget_and_a_number_of_tiles(tmp_path):
    settings = {"num_image_tokens": 5, "max_tiles": 4}
    conversations = conversations_of_all_sizes(tmp_path)
    with serve_tiles(tmp_path, 1, "--mm-processor-kwargs", json.dumps(settings)) as server:
        expected = [server.expected(*turns, **settings) for turns in conversations]
        assert [server.chat(*turns) for turns in conversations] == expected


def test_vllm_gets_a_model_without_a_head():
    config = tiny_config()
    AttentionInterface.register("vllm", sdpa_attention_forward)  # as vLLM registers its own
    config.text_config._attn_implementation = "vllm"
    model = EVLGenForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    assert type(model) is EVLGenModel
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    embeddings = model.get_input_embeddings()
    beyond = torch.tensor([config.image_token_id, config.video_token_id])
    assert embeddings(beyond).shape == (2, 64)
    trained = (model.connector, model.vision_projection, model.language_projection)
    assert not [m for part in trained for m in part.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def test_concurrent_videos_of_different_lengths_are_encoded():
    """vLLM gives each of them alone, with its times and its mask as a list of one tensor."""
    config = tiny_config(video_mode="merge")
    AttentionInterface.register("vllm", sdpa_attention_forward)
    config.text_config._attn_implementation = "vllm"
    model = EVLGenForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    video, times = torch.randn(1, 3, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([0.0, 5.0, 0.0])
    mask = torch.tensor([True, True, False])
    expected = model.get_video_features(video, frame_times=times[None], frame_mask=mask[None])
    output = model.get_video_features(video, frame_times=[times], frame_mask=[mask])
    assert output.token_places[..., 0].max() == 5
    assert torch.equal(output.token_places, expected.token_places)
    assert torch.equal(output.pooler_output, expected.pooler_output)


def test_vllm_refuses_a_checkpoint_without_its_towers():
    config = tiny_config()
    config.text_config._attn_implementation = "vllm"
    config.towers = "reference"
    with pytest.raises(ValueError, match=r"only names its towers\. This makes a complete checkpoint of it: python -c"):
        EVLGenForConditionalGeneration._from_config(config)


def tiny_config(**fields):
    tower, _ = tiny_towers("siglip")
    return EVLGenConfig(
        vision_config=tower.config.to_dict(),
        text_config=TEXT_CONFIGS["llama"].to_dict(),
        connector_config=CONNECTOR,
        **fields,
    )
