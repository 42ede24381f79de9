"""Checkpoints stand on their own: in clean processes outside the repository, from folders and from a Hub."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from .helpers import ROOT, generate_new, noise_images, run_clean, save, serving, tiny_model, tiny_processor
from .hub_server import HubServer

# Everything that a user without this repository does with a checkpoint. Each way gives the same caption.
USE_CHECKPOINT = """
import json
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

name, image, again = {name!r}, Image.open({image!r}), {again!r}
def caption(folder, auto_class):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, text="what is it?")
    new = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1]:]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), model, processor

answer, model, processor = caption(name, AutoModel)
words = [answer, caption(name, AutoModelForImageTextToText)[0], caption(name, AutoModelForMultimodalLM)[0]]
settings = dict(model=name, trust_remote_code=True)
for captioner in (pipeline("image-to-text", **settings), pipeline(**settings)):
    generated = captioner(image, prompt="what is it?", max_new_tokens=8, do_sample=False)
    words.append(generated[0]["generated_text"])
options = dict(max_new_tokens=8, generate_kwargs=dict(do_sample=False), return_full_text=False)
for task in ("image-text-to-text", "any-to-any"):
    generated = pipeline(task, **settings)(images=image, text="<image>what is it?", **options)
    words.append(generated[0]["generated_text"].strip())
model.save_pretrained(again)
processor.save_pretrained(again)
words.append(caption(again, AutoModel)[0])
print(json.dumps(words))
"""


def checkpoint(folder, **kwargs):
    """Saves a tiny model and its processor; returns the model and its answer about an image."""
    model = tiny_model(**kwargs)
    processor = tiny_processor(model)
    save(folder, model, processor)
    new = generate_new(model, processor(images=noise_images(1), text="what is it?"))
    return model, processor.batch_decode(new, skip_special_tokens=True)[0].strip()


def save_image(folder):
    path = folder / "image.png"
    noise_images(1)[0].save(path)
    return str(path)


def last_line(output):
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "vision", ["timm_cnn", *(pytest.param(vision, marks=pytest.mark.slow) for vision in ("clip", "eva"))]
)
def test_a_folder_works_without_this_repository(vision, tmp_path):
    _, answer = checkpoint(tmp_path / "model", vision=vision)
    code = USE_CHECKPOINT.format(name="model", image=save_image(tmp_path), again="again")
    assert last_line(run_clean(code, tmp_path)) == [answer] * 8
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"model.safetensors", "modeling_evlgen.py", "token_merging.py", "pipeline_evlgen.py"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


PUBLISH = """
import sys
sys.path.insert(0, {root!r})
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
EVLGenForConditionalGeneration.from_pretrained({folder!r}).push_to_hub("captioner")
EVLGenProcessor.from_pretrained({folder!r}).push_to_hub("captioner")
"""


def test_a_repository_works_by_its_name(tmp_path):
    _, answer = checkpoint(tmp_path / "model")
    with HubServer() as hub:
        environment = hub.client_env(tmp_path / "publisher")
        publish = PUBLISH.format(root=str(ROOT), folder=str(tmp_path / "model"))
        subprocess.run([sys.executable, "-I", "-c", publish], env=environment, check=True, timeout=300)
        published = hub.files("user/captioner").keys()
        assert published >= {"config.json", "model.safetensors", "processing_evlgen.py", "tokenizer.json"}
        code = USE_CHECKPOINT.format(name="user/captioner", image=save_image(tmp_path), again="again")
        user = tmp_path / "user"
        user.mkdir()
        output = run_clean(code, user, hub.client_env(tmp_path / "user_home"))
    assert last_line(output) == [answer] * 8


PIPELINE = """
import json
from datasets import Dataset, Image as ImageFeature
from PIL import Image
from transformers import pipeline

captioner = pipeline("image-to-text", model="model", trust_remote_code=True)
settings = dict(max_new_tokens=6, do_sample=False)
path = {image!r}
image = Image.open(path)
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
print(json.dumps([one, prompted]))
"""


def test_the_pipeline_takes_what_users_have(tmp_path):
    _, answer = checkpoint(tmp_path / "model")
    with serving(tmp_path) as url:
        output = run_clean(PIPELINE.format(image=save_image(tmp_path), url=f"{url}/image.png"), tmp_path)
    one, prompted = last_line(output)
    assert answer.startswith(prompted[0]["generated_text"])
    assert one != prompted


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
