"""Checkpoints stand on their own: in clean processes outside the repository, from folders and from a Hub."""

import errno
import json
import shutil
from collections import namedtuple

import pytest
import torch

from .helpers import generate_new, noise_images, run_clean, save, serving, tiny_model, tiny_processor

# Everything that a user without this repository does with a checkpoint. Each way gives the same caption.
USE_CHECKPOINT = """
import json
from datasets import Dataset, Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

image = Image.open("image.png")
def caption(folder, auto_class):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, text="what is it?")
    new = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1]:]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), model, processor

answer, model, processor = caption("model", AutoModel)
words = [answer, caption("model", AutoModelForImageTextToText)[0], caption("model", AutoModelForMultimodalLM)[0]]
settings = dict(model="model", trust_remote_code=True)
for captioner in (pipeline("image-to-text", **settings), pipeline(**settings)):
    generated = captioner(image, prompt="what is it?", max_new_tokens=8, do_sample=False)
    words.append(generated[0]["generated_text"])
options = dict(max_new_tokens=8, generate_kwargs=dict(do_sample=False), return_full_text=False)
for task in ("image-text-to-text", "any-to-any"):
    generated = pipeline(task, **settings)(images=image, text="<image>what is it?", **options)
    words.append(generated[0]["generated_text"].strip())
model.save_pretrained("again")
processor.save_pretrained("again")
words.append(caption("again", AutoModel)[0])

captioner = pipeline("image-to-text", model="model", trust_remote_code=True)
settings = dict(max_new_tokens=6, do_sample=False)
path = "image.png"
one = captioner(image, **settings)
assert list(one[0]) == ["generated_text"], one
assert captioner(path, **settings) == one
assert captioner([path, image], batch_size=2, **settings) == [one, one]
prompted = captioner(image, prompt="what is it?", **settings)
assert captioner(dict(image=path, prompt="what is it?"), **settings) == prompted
data = Dataset.from_dict({{"image": [path, path]}}).cast_column("image", ImageFeature())
assert list(captioner(data, batch_size=2, **settings)) == [one, one]
assert list(captioner(data["image"], **settings)) == [one, one]
assert len(captioner(image, num_beams=3, num_return_sequences=3, **settings)) == 3
assert captioner({url!r}, **settings) == one
try:
    captioner("nowhere.png")
except ValueError as error:
    assert "nowhere.png" in str(error)
else:
    raise AssertionError("a missing image was not noticed")
print(json.dumps([words, one, prompted]))
"""


def checkpoint(folder, **kwargs):
    """Saves a tiny model and its processor; returns the model and its answer about an image."""
    model = tiny_model(**kwargs)
    processor = tiny_processor(model)
    save(folder, model, processor)
    new = generate_new(model, processor(images=noise_images(1), text="what is it?"))
    return model, processor.batch_decode(new, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize(
    "vision", ["timm_cnn", *(pytest.param(vision, marks=pytest.mark.slow) for vision in ("clip", "eva"))]
)
def test_a_folder_works_without_this_repository_and_its_pipeline_takes_what_users_have(vision, tmp_path):
    _, answer = checkpoint(tmp_path / "model", vision=vision)
    noise_images(1)[0].save(tmp_path / "image.png")
    with serving(tmp_path) as url:
        output = run_clean(USE_CHECKPOINT.format(url=f"{url}/image.png"), tmp_path)
    words, one, prompted = json.loads(output.strip().splitlines()[-1])
    assert words == [answer] * 8
    assert answer.startswith(prompted[0]["generated_text"]) and one != prompted
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"model.safetensors", "modeling_evlgen.py", "token_merging.py", "pipeline_evlgen.py"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    model, _ = checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.language_projection.weight.zero_()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(OSError, match=r"The checkpoint needs .* GB, but only .* GB are free") as caught:
        model.save_pretrained(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "model.safetensors").read_bytes() == before
