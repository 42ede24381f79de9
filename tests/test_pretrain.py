"""examples/pretrain.py end to end on tiny models: data of every kind, recipes, resuming, several processes."""

import json
import os
import shutil
import subprocess
import sys

import pretrain
import pytest
import torch
import transformers
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, SiglipVisionModel
from transformers.image_utils import IMAGENET_STANDARD_MEAN, OPENAI_CLIP_MEAN

from common.models import load_image_processor
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import ROOT, demo_packages_or_skip, save_image_folder, save_one_gpu_sources, save_towers
from .training import (
    CONNECTOR,
    LAYERS,
    arguments,
    assert_same_weights,
    flags,
    kill_after,
    logged,
    name_tars,
    save_recipe,
    start,
    weights,
    write_tars,
)

SCRIPT = ROOT / "examples" / "pretrain.py"
CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Tiny towers and a folder of images, and a recipe that names them."""
    folder = tmp_path_factory.mktemp("work")
    data = {"connector_config": CONNECTOR, "dataset": save_image_folder(folder / "images"), "max_steps": 4}
    batches = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_new_tokens": 8, "logging_steps": 1}
    return save_recipe(folder, **save_towers(folder), **data, **batches)


@pytest.fixture(autouse=True)
def features_in_a_fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture(scope="module")
def rows(work):
    return load_dataset(str(work / "images"), split="train")


def test_trains_saves_and_reports(work, tmp_path):
    changes = {"max_steps": 60, "save_steps": 60, "eval_strategy": "steps", "eval_steps": 30}
    metrics = pretrain.main(arguments(work, tmp_path, **changes, report_to="tensorboard"))
    assert metrics["test_loss_gap"] > 0.5  # it looks at the images
    assert metrics["test_loss"] < logged(tmp_path / "checkpoint-60")[0] - 2
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    for name in ("loss.png", "captions.png"):
        assert min(Image.open(tmp_path / name).size) > 300
    tags = tags_of_tensorboard(tmp_path)
    assert {"train/loss", "eval/loss", "test/exact_captions", "test/loss_gap"} <= set(tags["scalars"])
    assert tags["images"] == ["test/captions"]
    for folder in (tmp_path, tmp_path / "checkpoint-60"):
        model = EVLGenForConditionalGeneration.from_pretrained(folder)
        assert (folder / "modeling_evlgen.py").exists() and (folder / "processor_config.json").exists()
        assert len(model.config.text_model_fingerprint) == 64
        assert model.config.training_data == ["images"]  # the folder's name, without its path
        base = load_file(work / "text" / "model.safetensors")
        trained = {name.removeprefix("language_model."): t for name, t in weights(folder).items()}
        assert all(torch.equal(tensor, trained[name]) for name, tensor in base.items())


def tags_of_tensorboard(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {"scalars": [], "images": []}
    for path in output.rglob("events.out.tfevents*"):  # the Trainer closes its file before the final figures
        events = EventAccumulator(str(path)).Reload()
        tags = {kind: tags[kind] + events.Tags()[kind] for kind in tags}
    return tags


def test_cached_features_train_like_images(work, tmp_path):
    # Features are kept in float16. In images of one colour that alone could decide which equal tokens are merged.
    unmerged = {"connector_config": {**CONNECTOR, "merge_r": 0}}
    plain = pretrain.main(arguments(work, tmp_path / "images", **unmerged))
    features = pretrain.main(arguments(work, tmp_path / "features", **unmerged, cache_features=True))
    assert features["test_loss"] == pytest.approx(plain["test_loss"], abs=1e-2)
    cached = list((tmp_path / "hf_home" / "evlgen_features").rglob("*.safetensors"))
    assert len(cached) == 2
    before = [path.stat().st_mtime_ns for path in cached]
    pretrain.main(arguments(work, tmp_path / "again", cache_features=True))
    assert [path.stat().st_mtime_ns for path in cached] == before


def test_accumulated_gradients_are_those_of_the_whole_batch(work, tmp_path):
    pretrain.main(arguments(work, tmp_path / "whole"))
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    pretrain.main(arguments(work, tmp_path / "accumulated", **accumulated))
    assert_same_weights(tmp_path / "whole", tmp_path / "accumulated", atol=1e-4, rtol=1e-3)


def test_a_killed_run_goes_on_to_the_same_weights(work, tmp_path):
    steps = {"max_steps": 6, "save_steps": 2, "crop_scale": [0.5, 1.0], "horizontal_flip": True}
    steps["connector_config"] = {**LAYERS, "merge_r": 3}  # with dropout
    pretrain.main(arguments(work, tmp_path / "unbroken", **steps))
    broken = tmp_path / "broken"
    # `max_steps` sets the learning rate's schedule, so the run is cut off from outside.
    kill_after(start(SCRIPT, arguments(work, broken, **steps)), broken / "checkpoint-2")
    (broken / "checkpoint-4").mkdir()  # a checkpoint that was being written
    pretrain.main(arguments(work, broken, **steps, resume_from_checkpoint=True))
    assert_same_weights(tmp_path / "unbroken", broken)


def parquet(folder, rows):
    rows.to_parquet(folder / "train.parquet")
    return {"dataset": "parquet", "data_files": {"train": str(folder / "train.parquet")}}


def test_a_resume_without_a_checkpoint_says_so(work, tmp_path, caplog):
    pretrain.main(arguments(work, tmp_path, max_steps=1, test_split="", resume_from_checkpoint=True))
    assert "There is no complete checkpoint in" in caplog.text and "will replace" not in caplog.text
    pretrain.main(arguments(work, tmp_path, max_steps=1, test_split=""))
    assert f"{tmp_path} holds a model. The model trained now will replace it." in caplog.text


ONE_EPOCH = {"num_train_epochs": 1, "max_steps": -1}


@pytest.fixture
def with_a_broken_image(work, tmp_path):
    shutil.copytree(work / "images", tmp_path / "images")
    (tmp_path / "images" / "train" / "5.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("cache_features", [False, True])
def test_a_broken_image_is_named_or_skipped(cache_features, work, with_a_broken_image, tmp_path, capsys, caplog):
    changes = {"dataset": with_a_broken_image, "cache_features": cache_features, **ONE_EPOCH}
    with pytest.raises(ValueError, match=r"5\.png.* cannot be read"):
        pretrain.main(arguments(work, tmp_path / "out", **changes))
    (with_a_broken_image / "test" / "0.png").write_bytes(b"")
    metrics = pretrain.main(arguments(work, tmp_path / "out", **changes, skip_bad_rows=True))
    output = capsys.readouterr().out + caplog.text
    assert "5.png" in output and "0.png" in output
    assert "1 of 16 rows are bad" in output if cache_features else "1 times a bad row was skipped" in output
    assert metrics["test_loss"] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "0.png", "caption": "caf\u00e9"}'.encode("latin-1"), "in UTF-8"),
        (b"", r"Empty: .*train/metadata\.jsonl"),
    ],
)
def test_metadata_that_cannot_be_read_are_named(content, message, work, with_a_broken_image, tmp_path):
    (with_a_broken_image / "train" / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)`dataset`: .*images' cannot be read: .*{message}"):
        pretrain.main(arguments(work, tmp_path / "out", dataset=with_a_broken_image))


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"caption": None}, "`caption` must hold a caption, but is None"), ({"image": None}, "None is no image")],
)
def test_a_row_without_a_caption_or_an_image_is_named_or_skipped(bad, message, work, rows, tmp_path, capsys):
    changed = [*rows.to_list()[:3], rows.to_list()[3] | bad, *rows.to_list()[4:]]
    changes = parquet(tmp_path, Dataset.from_list(changed, features=rows.features)) | {"test_split": "", **ONE_EPOCH}
    with pytest.raises(ValueError, match=message):
        pretrain.main(arguments(work, tmp_path / "out", **changes))
    pretrain.main(arguments(work, tmp_path / "out", **changes, skip_bad_rows=True))
    assert "1 times a bad row was skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processor", "size", "mean"),
    [
        (transformers.CLIPImageProcessor(), 224, OPENAI_CLIP_MEAN),
        (transformers.BlipImageProcessor(size={"height": 364, "width": 364}), 364, OPENAI_CLIP_MEAN),
        (transformers.ConvNextImageProcessor(size={"shortest_edge": 384}), 384, IMAGENET_STANDARD_MEAN),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size=224, image_mean=[0.485] * 3),
            224,
            [0.485] * 3,
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "size") else None,
)
def test_a_towers_image_processor_becomes_a_plain_resize(processor, size, mean, tmp_path):
    processor.save_pretrained(tmp_path)
    plain = load_image_processor(str(tmp_path))
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (0, 0, 20, 100))  # at the very edge, which a crop would lose
    pixels = plain(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, size, size)
    assert list(plain.image_mean) == pytest.approx(list(mean))
    assert pixels[0, 2, :, 0].mean() > pixels[0, 2, :, -1].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, r"`image_column` is 'photo', but the data set has \['image', 'caption'\]"),
        ({"test_split": "dev"}, "`test_split` is 'dev', but .*; --test_size 0.1 holds out a tenth"),
        ({"cache_features": True, "horizontal_flip": True}, "needs `cached_views`: how many"),
        ({"cache_features": True, "streaming": True}, "`cache_features` needs the whole data set"),
        ({"streaming": True}, "`streaming` needs `max_test_samples`, or an empty `test_split`"),
        ({"dataset": ""}, "`dataset` is needed"),
        ({"dataset": "/nowhere"}, "`dataset` is '/nowhere', which is no folder, none of openmoji-scenes, "),
        ({"connector_config": {"merge_rr": 5}}, "holds fields that TomeFormerConfig does not have: .'merge_rr'"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be an integer of 1 or more"),
        ({"lerning_rate": 1}, r"Unknown argument --lerning_rate\. Did you mean --learning_rate\?"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes, message, work, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.main(arguments(work, tmp_path, **changes))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_tower_of_any_size_takes_larger_images(work, tmp_path):
    tower = save_towers(tmp_path / "towers", vision="timm_cnn")["vision_model"]
    small = {**LAYERS, "merge_r": 0}
    changes = {"vision_model": tower, "image_size": 64, "connector_config": small, "max_steps": 1}
    pretrain.main(arguments(work, tmp_path / "run", **changes))
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = EVLGenProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=Image.new("RGB", (100, 50)), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_a_recipe_with_an_unknown_name_is_refused(work, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lerning_rate: 1")
    with pytest.raises(ValueError, match=r"recipe\.yaml holds unknown arguments: lerning_rate"):
        pretrain.main(["--config", str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize(("recipe", "text"), [("opt-2.7b", "opt"), ("vicuna-7b", "llama")])
def test_the_papers_recipes_run(recipe, text, tmp_path):
    """The recipe as it is, but with tiny models of the same classes and little data."""
    towers = save_towers(tmp_path, "eva", text, bos=True)
    BertModel(BertConfig(**LAYERS)).save_pretrained(tmp_path / "bert")
    splits = {split: write_tars(tmp_path / split, [count]) for split, count in (("train", 16), ("test", 4))}
    little = {**towers, "connector_model": tmp_path / "bert", "connector_config": {"merge_r": 3}}
    little |= {**name_tars(**splits), "streaming": True, "max_test_samples": 4, "max_steps": 2}
    little |= {"dataloader_num_workers": 0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    metrics = pretrain.main(flags(config=CONFIGS / f"{recipe}.yaml", output_dir=tmp_path / "out", **little))
    assert metrics["test_loss"] > 0
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (model.vision_tower.config.model_type, model.config.text_config.model_type) == ("blip_2_vision_model", text)
    assert not model.config.connector_config.pre_norm and model.connector.dtype == torch.float32
    processor = EVLGenProcessor.from_pretrained(tmp_path / "out")
    end = {"opt": processor.tokenizer("\n")["input_ids"][-1], "llama": processor.tokenizer.eos_token_id}[text]
    assert processor.end_of_text_id == end
    stops = model.generation_config.eos_token_id  # the Trainer adds the tokenizer's own to it
    assert end in (stops if isinstance(stops, list) else [stops])


def test_the_recipe_for_one_gpu_runs(tmp_path, monkeypatch):
    """The recipe as it is, but small. The names in it are folders with tiny models and rows of the same columns."""
    save_one_gpu_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = CONFIGS / "one-gpu.yaml"
    connector = yaml.safe_load(recipe.read_text())["connector_config"]
    connector |= {name: LAYERS[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    short = {"connector_config": connector}
    short |= {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    short |= {"dataloader_num_workers": 0, "warmup_steps": 0, "whitening_images": 4}
    metrics = pretrain.main(flags(config=recipe, **short))
    assert metrics["test_loss"] > 0
    model = EVLGenForConditionalGeneration.from_pretrained("outputs/one-gpu")
    assert type(model.vision_tower) is SiglipVisionModel and model.language_model.dtype == torch.bfloat16
    assert (model.config.num_vision_tokens, model.config.num_image_tokens) == (256, 33)
    assert model.connector.dtype == torch.float32 and model.generation_config.max_new_tokens == 30


def test_a_run_resumes_from_checkpoints_without_towers(work, tmp_path, caplog):
    changes = {"towers": "reference", "save_steps": 2}
    pretrain.main(arguments(work, tmp_path, **changes))
    shutil.copytree(tmp_path, tmp_path / "unbroken")
    assert not any(name.startswith("language_model.") for name in weights(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "model.safetensors").unlink()
    pretrain.main(arguments(work, tmp_path, **changes, resume_from_checkpoint="true"))
    assert "missing keys" not in caplog.text
    assert_same_weights(tmp_path / "unbroken", tmp_path)
    assert EVLGenForConditionalGeneration.from_pretrained(tmp_path).config.towers == "reference"


def test_the_main_job_runs_from_the_command_line(tmp_path):
    """`accelerate launch examples/pretrain.py` with real weights and real images, but few of them and two steps."""
    demo_packages_or_skip(tmp_path / "hf_home")
    little = ["--max_steps", "2", "--max_train_samples", "32", "--max_test_samples", "8"]
    fresh = {**os.environ, "HF_HOME": str(tmp_path / "hf_home")}
    script = tmp_path / "few_scenes.py"  # drawing all 4,200 scenes would take most of the time
    script.write_text(
        f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
from common.demo import scenes
scenes.TRAIN_SCENES, scenes.TEST_SCENES = 64, 16
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script), *little, "--output_dir", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=fresh, timeout=300).returncode == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["test_loss"] < 10
    assert len(list((tmp_path / "hf_home" / "evlgen_features").rglob("*.safetensors"))) == 2
