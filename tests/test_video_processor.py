"""The video processor: saved with a checkpoint, loaded by itself, with the pixels of the image processor."""

import json

import pytest
import torch
from transformers import AutoProcessor, SiglipImageProcessor

from processing_evlgen import EVLGenProcessor, EVLGenVideoProcessor

from .helpers import (
    noise_images,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from .test_processing import make_processor

pytest.importorskip("av", reason="needs the video extra")


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
