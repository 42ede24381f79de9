"""The code in a checkpoint runs on the oldest release of transformers that it supports, as on the newest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import modules_cache, noise_images, run_clean, save, tiny_model, tiny_processor

OLDEST = ("transformers==5.19.0", "huggingface_hub==1.33.0")

# Whatever a user without this repository does. Prints the ids of each way, and of the checkpoint that it saves again.
USE_CHECKPOINT = """
import json
import sys
sys.path[:0] = {path!r}
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

def answers(folder, auto_class):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = [Image.open(name) for name in ("0.png", "1.png", "2.png")]
    inputs = processor(images=[images[:2], images[2:]], text=["<image><image>what are they?", "<image>a"])
    ids = [model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings).tolist() for settings in (
        dict(), dict(num_beams=3), dict(use_cache=False), dict(repetition_penalty=1.5))]
    video = processor(videos=[images], text="what is it?")
    ids.append(model.generate(**video, max_new_tokens=8, do_sample=False).tolist())
    return ids, model, processor

ids, model, processor = answers("model", AutoModel)
assert answers("model", AutoModelForImageTextToText)[0] == ids
settings = dict(model="model", trust_remote_code=True)
texts = [pipeline("image-to-text", **settings)("0.png", prompt="a", max_new_tokens=8, do_sample=False)]
texts.append(pipeline(**settings)("0.png", prompt="a", max_new_tokens=8, do_sample=False))
explained = pipeline(**settings)("0.png", max_new_tokens=8, do_sample=False, return_words=True)[0]["words"]
texts.append([(word["word"], round(word["probability"], 3), word["frame"]) for word in explained])
assert explained
chat = pipeline("image-text-to-text", **settings)
texts.append(chat(images="0.png", text="<image>a", max_new_tokens=8, generate_kwargs=dict(do_sample=False)))
processor.save_pretrained({again!r})
model.save_pretrained({again!r})
assert answers({again!r}, AutoModel)[0] == ids
print(json.dumps([transformers.__version__, ids, [str(text) for text in texts]]))
"""


def oldest_transformers_or_skip():
    """Installs the oldest release beside the others, once; gives its folder. Skips the test without PyPI."""
    folder = Path(constants.HF_HOME) / "evlgen_tests" / "-".join(OLDEST).replace("==", "-")
    done = folder / "complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder), *OLDEST]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"{' '.join(OLDEST)} cannot be installed: {result.stderr.strip().splitlines()[-1]}")
        done.touch()
    return folder


@pytest.mark.parametrize("video_mode", [pytest.param("mean", marks=pytest.mark.slow), "merge"])
def test_a_checkpoint_gives_the_same_ids_on_the_oldest_transformers(video_mode, tmp_path, monkeypatch, capsys):
    oldest = oldest_transformers_or_skip()
    tiny_model("siglip", "opt").save_pretrained(tmp_path / "image")
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "image", video_mode=video_mode)
    processor = tiny_processor(model, bos=True)
    save(tmp_path / "model", model, processor)
    for index, image in enumerate(noise_images(3)):
        image.save(tmp_path / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    with modules_cache(tmp_path / "modules"):
        exec(USE_CHECKPOINT.format(path=[], again="again-newest"), {})
    outputs = {"newest": capsys.readouterr().out}
    outputs["oldest"] = run_clean(USE_CHECKPOINT.format(path=[str(oldest)], again="again-oldest"), tmp_path)
    runs = {name: json.loads(output.strip().splitlines()[-1]) for name, output in outputs.items()}
    assert runs["oldest"][0] == "5.19.0" != runs["newest"][0]
    assert runs["oldest"][1:] == runs["newest"][1:]
