"""The video processor: saved with a checkpoint, loaded by itself, with the pixels of the image processor."""

import json

import pytest
import torch
from transformers import AutoProcessor, AutoVideoProcessor, SiglipImageProcessor
from transformers.video_utils import load_video

from processing_evlgen import EVLGenProcessor, EVLGenVideoProcessor

from .helpers import (
    noise_images,
    run_clean,
    save,
    save_animation,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from .test_processing import make_processor

pytest.importorskip("av", reason="needs the video extra")
from .test_video import shades, write_video
from .test_video_files import hide_start


def number_of_frames(batch):
    return batch["pixel_values_videos"].shape[1]


def test_frames_have_the_pixels_of_images():
    image_processor = SiglipImageProcessor(size={"height": 24, "width": 32}, resample=0, image_mean=[0.1] * 3)
    processor = EVLGenProcessor(image_processor, tiny_tokenizer(), num_image_tokens=3)
    frames = noise_images(3)
    expected = image_processor(frames, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(videos=frames)["pixel_values_videos"][0], expected)
    assert torch.equal(processor.video_processor(frames)["pixel_values_videos"][0], expected)
    raw = image_processor(frames, return_tensors="pt", do_normalize=False)["pixel_values"]
    assert torch.equal(processor(videos=frames, videos_kwargs={"do_normalize": False})["pixel_values_videos"][0], raw)
    own = {"do_normalize": False, "size": {"height": 16, "width": 20}}
    processor = EVLGenProcessor(image_processor, tiny_tokenizer(), EVLGenVideoProcessor(**own), num_image_tokens=3)
    raw = image_processor(frames, return_tensors="pt", **own)["pixel_values"]
    assert torch.equal(processor(videos=frames)["pixel_values_videos"][0], raw)


@pytest.mark.parametrize(
    ("settings", "call", "expected"),
    [
        ({}, {}, 4),
        ({"num_frames": 2}, {}, 2),
        ({"num_frames": 2}, {"num_frames": 3}, 3),
        ({"num_frames": 2}, {"videos_kwargs": {"num_frames": 3}}, 3),
        ({"num_frames": 2}, {"fps": 1}, 8),  # a list has a frame a second
        ({"num_frames": 2, "fps": 0.5}, {}, 4),
        ({"fps": 0.5}, {"num_frames": 3}, 3),
        ({"fps": 0.5}, {"do_sample_frames": False}, 8),
    ],
)
def test_the_number_of_frames_is_the_calls_or_the_processors(settings, call, expected, tmp_path):
    video_processor, metadata = EVLGenVideoProcessor(**settings), {"fps": 1.0}
    EVLGenProcessor(tiny_image_processor(), tiny_tokenizer(), video_processor, 3).save_pretrained(tmp_path)
    for processor in (EVLGenProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert number_of_frames(processor(videos=noise_images(8), video_metadata=metadata, **call)) == expected


def test_a_loaded_processor_may_be_given_another_number_of_frames(tmp_path):
    make_processor().save_pretrained(tmp_path)
    assert number_of_frames(EVLGenProcessor.from_pretrained(tmp_path, num_frames=7)(videos=noise_images(8))) == 7


@pytest.mark.parametrize(("frames", "expected"), [({"num_frames": 3}, 3), ({"fps": 0.25}, 2), ({}, 4)])
def test_a_checkpoint_without_a_video_processor_is_read_as_before(frames, expected, tmp_path):
    """Earlier checkpoints have `num_frames` and `fps` in processor_config.json."""
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    del config["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps({**config, "num_frames": 4, "fps": None, **frames}))
    again, media = AutoProcessor.from_pretrained(tmp_path), {"videos": noise_images(8), "video_metadata": {"fps": 1.0}}
    call = {"fps": frames["fps"]} if "fps" in frames else frames
    before, after = processor(**media, **call), again(**media)
    assert number_of_frames(after) == expected
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert number_of_frames(EVLGenProcessor.from_pretrained(tmp_path, num_frames=5)(**media)) == 5


def test_the_video_processor_is_loaded_without_the_repository(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model)
    processor.video_processor.num_frames = 3
    save(tmp_path / "model", model, processor)
    assert type(AutoVideoProcessor.from_pretrained(tmp_path / "model")) is EVLGenVideoProcessor
    write_video(tmp_path / "video.mp4", 9)
    code = """
from transformers import AutoProcessor, AutoVideoProcessor
videos = AutoVideoProcessor.from_pretrained("model", trust_remote_code=True)
print(videos("video.mp4", return_tensors="pt")["pixel_values_videos"].shape)
AutoProcessor.from_pretrained("model", trust_remote_code=True).save_pretrained("again")
again = AutoProcessor.from_pretrained("again", trust_remote_code=True)
print(again(videos="video.mp4")["pixel_values_videos"].shape)
"""
    assert run_clean(code, tmp_path).splitlines()[-2:] == ["torch.Size([1, 3, 3, 32, 32])"] * 2


@pytest.mark.parametrize("kind", ["webm", "mp4", "webp"])
def test_transformers_own_reader_fails_where_ours_reads(kind, tmp_path):
    """Why videos.py exists. It can go when this test fails for all kinds."""
    path = str(tmp_path / f"video.{kind}")
    if kind == "webm":  # which does not state its number of frames
        write_video(path, 16, "libvpx")
    elif kind == "mp4":  # with a hidden start
        write_video(tmp_path / "whole.mp4", 24)
        hide_start(tmp_path / "whole.mp4", path, 14)
    else:
        save_animation(path, shades(16))
    assert number_of_frames(make_processor()(videos=path)) == 4
    try:
        frames, _ = load_video(path, num_frames=4, backend="pyav")
    except Exception:  # of many types
        return
    assert len(frames) != 4


def test_a_number_of_frames_is_the_video_processors_and_one_in_a_call_counts():
    processor = tiny_processor(tiny_model())
    with pytest.raises(AttributeError, match=r"set `processor\.video_processor\.num_frames`"):
        processor.num_frames = 8
    processor.video_processor.num_frames = 8
    video = noise_images(10)
    calls = ({}, {"num_frames": 3, "do_sample_frames": False}, {"do_sample_frames": False})
    assert [number_of_frames(processor(videos=[video], **call)) for call in calls] == [8, 3, 10]


def test_another_image_processor_prepares_videos_too():
    processor, small = tiny_processor(tiny_model()), tiny_image_processor()
    small.size = {"height": 16, "width": 16}
    processor.image_processor = small
    assert processor(videos=[noise_images(2)])["pixel_values_videos"].shape[-2:] == (16, 16)
    assert dict(processor.video_processor.size) == {"height": 16, "width": 16}  # vLLM reads it
