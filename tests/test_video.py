"""Videos: reading videos, the temporal contextualizer in any transformer tower, and batches of videos and images."""

import copy
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoVideoProcessor

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.vision_tower import extract_vision_tokens
from processing_evlgen import EVLGenVideoProcessor
from processing_evlgen.videos import load_rgb_frames, sample_frames

from .helpers import (
    IMAGE_SIZE,
    LAYERS,
    encode_video,
    generate_new,
    join,
    merging_model,
    noise_images,
    run_clean,
    save,
    save_animation,
    save_sound,
    serving,
    tiny_model,
    tiny_processor,
    tiny_towers,
)

av = pytest.importorskip("av", reason="needs the video extra")

TRANSFORMERS = ["eva", "clip", "siglip", "dinov2", "vit", "timm_vit"]
SIZES = {"temporal_hidden_size": 8, "temporal_num_attention_heads": 2}


def shades(count):
    """Frames of one grey each, `10 * index`."""
    return [Image.new("RGB", (48, 32), (10 * index,) * 3) for index in range(count)]


def write_video(path, count, codec="libx264", **options):
    encode_video(path, shades(count), codec, **options)
    return str(path)


def indices(frames):
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [(8, 4, [0, 2, 4, 6]), (10, 4, [0, 2, 5, 7]), (3, 4, [0, 1, 2]), (1, 4, [0]), (5, 1, [0])],
)
def test_uniform_sampling_is_the_originals(total, wanted, expected):
    assert sample_frames(total, wanted) == expected
    assert sample_frames(total, wanted) == list(np.arange(0, total, total / min(wanted, total)).astype(int))


@pytest.mark.parametrize(("total", "wanted"), [(8, 4), (9, 4), (20, 5), (3, 4), (1, 4), (2, 2)])
def test_headtail_sampling_draws_from_both_halves(total, wanted):
    random.seed(0)
    drawn = [sample_frames(total, wanted, "headtail") for _ in range(50)]
    for chosen in drawn:
        assert chosen == sorted(set(chosen)) and len(chosen) == min(wanted, total)
        assert sum(index < total // 2 for index in chosen) == min(min(wanted, total) // 2, total // 2)
    assert len({tuple(chosen) for chosen in drawn}) > 1 or total <= wanted


@pytest.mark.parametrize(
    ("name", "codec"), [("video.mp4", "libx264"), ("video.webm", "libvpx"), ("video.avi", "mpeg4")]
)
def test_reads_video_files(name, codec, tmp_path):
    """A WebM file does not contain its number of frames. A rate takes the frame that is on screen at each tick."""
    path = write_video(tmp_path / name, 20, codec)  # 10 frames a second
    frames = load_rgb_frames(path, 4)
    assert indices(frames) == [0, 5, 10, 15] and frames.times == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert frames[0].size == (48, 32) and frames[0].mode == "RGB"
    assert len(load_rgb_frames(path, 40)) == 20
    frames = load_rgb_frames(path, fps=2.5)
    assert indices(frames) == [0, 4, 8, 12, 16]
    assert frames.times == pytest.approx([0.0, 0.4, 0.8, 1.2, 1.6])
    assert indices(load_rgb_frames(path, fps=4)) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert indices(load_rgb_frames(path, fps=100)) == list(range(20))


def test_reads_frames_and_arrays():
    arrays = np.stack([np.asarray(frame) for frame in shades(8)])
    for video in (shades(8), arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2)):
        assert indices(load_rgb_frames(video, 4)) == [0, 2, 4, 6]


def test_frames_have_the_times_of_their_container(tmp_path):
    pts = [0, 1, 2, 3, 30, 31, 60, 61]
    path = write_video(tmp_path / "video.mkv", 8, pts=pts)
    assert indices(load_rgb_frames(path, 4)) == [0, 2, 4, 6]
    assert load_rgb_frames(path).times == pytest.approx([index / 10 for index in pts])
    frames = load_rgb_frames(path, fps=1)  # a frame is taken once, though frame 3 is on screen at 1 s and at 2 s
    assert indices(frames) == [0, 3, 4, 5, 6] and frames.times == pytest.approx([0.0, 0.3, 3.0, 3.1, 6.0])


@pytest.mark.parametrize("name", ["video.webp", "video.gif", "video.png"])
def test_animated_images_have_the_times_of_their_durations(name, tmp_path):
    save_animation(tmp_path / name, shades(5), duration=[40, 40, 500, 40, 40])
    frames = load_rgb_frames(tmp_path / name)
    assert indices(frames) == [0, 1, 2, 3, 4] and frames.times == pytest.approx([0, 0.04, 0.08, 0.58, 0.62])
    assert indices(load_rgb_frames(tmp_path / name, 2)) == [0, 2]
    assert indices(load_rgb_frames(tmp_path / name, fps=10)) == [0, 2, 3]


def test_lists_of_frames_have_the_times_that_are_stated():
    frames = shades(8)
    assert load_rgb_frames(frames, 4).times == [0, 2, 4, 6]  # a frame a second
    assert load_rgb_frames(frames, fps=4).times == [index / 4 for index in range(8)]
    assert load_rgb_frames(frames, 4, metadata={"fps": 8}).times == [0, 0.25, 0.5, 0.75]
    of_film = {"fps": 24.0, "frames_indices": list(range(0, 96, 12))}
    assert load_rgb_frames(frames, metadata=of_film).times == [index / 2 for index in range(8)]
    assert load_rgb_frames(frames, fps=1, metadata=of_film).times == [0, 1, 2, 3]
    again = load_rgb_frames(load_rgb_frames(frames, metadata=of_film), 4)  # frames that were read keep their times
    assert again.times == [0, 1, 2, 3]


def test_the_processor_returns_times(tmp_path):
    processor = tiny_processor(tiny_model())
    path = write_video(tmp_path / "video.mp4", 10)
    batch = processor(videos=[path, shades(2)])
    torch.testing.assert_close(batch["frame_times"], torch.tensor([[0.0, 0.2, 0.5, 0.7], [0.0, 1.0, 0.0, 0.0]]))
    late = {"fps": 5.0, "frames_indices": [10**10, 10**10 + 1]}  # of a camera that counts the seconds since 1970
    for metadata in ({"fps": 5.0}, late):
        times = processor(videos=[shades(2)], video_metadata=[metadata])["frame_times"]
        torch.testing.assert_close(times, torch.tensor([[0.0, 0.2]]))


def test_a_long_video_is_read_frame_by_frame(tmp_path):
    processor = tiny_processor(tiny_model())
    path = write_video(tmp_path / "video.mp4", 20)
    pixels, times = zip(*processor.iterate_frames(path, fps=5), strict=True)
    assert times == pytest.approx([index / 5 for index in range(10)])
    torch.testing.assert_close(torch.stack(pixels), processor(videos=path, fps=5)["pixel_values_videos"][0])
    assert sum(1 for _ in processor.iterate_frames([shades(1)[0]] * 600)) == 600


def test_a_few_frames_are_prepared_at_a_time(monkeypatch):
    """Frames of full HD have 6 MB, and while they are prepared several times as much."""
    processor, videos = tiny_processor(tiny_model()), [noise_images(20), noise_images(3)]
    at_once, together = processor.image_processor([*videos[0], *videos[1]], return_tensors="pt")["pixel_values"], []
    prepare = processor.video_processor.prepare_frames

    def watched(frames):
        together.append(len(frames))
        return prepare(frames)

    monkeypatch.setattr(processor.video_processor, "prepare_frames", watched)
    batch = processor(videos=videos, num_frames=20)
    assert torch.equal(batch["pixel_values_videos"][batch["frame_mask"]], at_once)
    assert sum(together) == 23 and max(together) <= 8


def test_frames_may_change_their_size():
    frames = [frame.resize((20 + 10 * index, 40)) for index, frame in enumerate(shades(4))]
    assert tiny_processor(tiny_model())(videos=[frames])["pixel_values_videos"].shape == (1, 4, 3, 32, 32)


BAD_INDICES = ([0, 1], [*range(512), 0], [*range(512), math.nan], [True] * 513, 7)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_frames": 10_000}, "`num_frames` must be at most 512, but is 10000"),
        ({"num_frames": 4, "fps": 2}, "`num_frames` and `fps` .* not 4 and 2"),
        ({"fps": 2, "frame_sampling": "random"}, "`frame_sampling` must be .* is 'random'"),
        *(({"fps": fps}, "`fps` must be a number above 0") for fps in (0, float("nan"), "2", True)),
        ({"num_frames": True}, "`num_frames` must be an integer of 1 or more, but is True"),
        ({"do_sample_frames": False}, "`videos` .* more than 512 frames"),
        ({"video_metadata": [{"fps": 1.0}] * 2}, "`video_metadata` has 2 entries for 1 videos"),
        *(({"video_metadata": [{"fps": fps}]}, "`video_metadata` must have an `fps` above 0") for fps in (-2.0, "2")),
        *(({"video_metadata": {"fps": 1.0, "frames_indices": bad}}, "must be 513 ascending") for bad in BAD_INDICES),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_numbers_of_frames_are_named(choice, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor(tiny_model())(videos=[shades(1) * 513], **choice)


@pytest.mark.parametrize("choice", [{"num_frames": 9999}, {"fps": -1}])
def test_a_video_processor_refuses_bad_numbers_of_frames(choice):
    with pytest.raises(ValueError, match=f"{next(iter(choice))}.* must be"):
        EVLGenVideoProcessor(**choice)


def test_a_video_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    save_animation(tmp_path / "whole.webp", shades(3))
    (tmp_path / "broken.webp").write_bytes((tmp_path / "whole.webp").read_bytes()[:100])
    save_sound(tmp_path / "sound.mp4")
    reasons = {"sound.mp4": ": it has no pictures", "..": ": it is no regular file", "x" * 300: ".* too long"}
    for name in ("broken.mp4", "empty.mp4", "broken.webp", "missing.mp4", *reasons):
        shown = f"{name[:50]}.*' cannot be read{reasons.get(name, '')}"
        with pytest.raises(ValueError, match=f"`videos`: '.*{shown}"):
            load_rgb_frames(str(tmp_path / name), 4)


def test_a_video_without_frames_is_refused_and_a_text_without_videos_is_none():
    processor, video = tiny_processor(tiny_model()), shades(2)
    with pytest.raises(ValueError, match="`videos` holds a video without frames"):
        load_rgb_frames([], 4)
    for videos in ([[]], [[], []], [video, []], [[], video]):
        with pytest.raises(ValueError, match="`videos` holds a video without frames"):
            processor(videos=videos, text="what?")
    batch = processor(videos=[[], [video]], text=["what?", "<video>"])  # as `apply_chat_template` gives them
    assert len(batch["pixel_values_videos"]) == 1 and len(processor(videos=[], text="what?")["input_ids"]) == 1


def video_model(vision="clip", alpha=0.5, seed=0):
    """Returns a tiny video model whose contextualizers have an effect."""
    connector = {**LAYERS, "merge_r": 3}
    towers = tiny_towers(vision, seed=seed)
    model = join(*towers, connector_config=connector, temporal_contextualizer=True, **SIZES)
    for contextualizer in model.temporal:
        give_effect(contextualizer, alpha)
    return model


@torch.no_grad()
def give_effect(contextualizer, alpha=0.5):
    contextualizer.alpha.fill_(alpha)
    contextualizer.query.weight.normal_()
    contextualizer.key.weight.normal_()


def noise(*shape):
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def blocks_of(tower):
    norms = {"layer_norm1", "norm1", "layernorm_before"}
    return [module for module in tower.modules() if norms & dict(module.named_children()).keys()]


def blocks_by_hand(tower, contextualizers, pixel_values, frames):
    """Runs the tower's blocks with the contextualizers written out."""
    seen = []
    layers = blocks_of(tower)
    handle = layers[0].register_forward_pre_hook(
        lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    extract_vision_tokens(tower, pixel_values)
    handle.remove()
    (x,) = seen
    for layer, contextualizer in zip(layers, contextualizers, strict=True):
        parts = dict(layer.named_children())
        attention = parts.get("self_attn", parts.get("attention", parts.get("attn")))
        norm1 = parts.get("layer_norm1", parts.get("norm1", parts.get("layernorm_before")))
        norm2 = parts.get("layer_norm2", parts.get("norm2", parts.get("layernorm_after")))
        scale1 = parts.get("layer_scale1", parts.get("ls1", torch.nn.Identity()))
        scale2 = parts.get("layer_scale2", parts.get("ls2", torch.nn.Identity()))
        attended = attention(norm1(x))
        x = x + scale1(attended[0] if isinstance(attended, tuple) else attended)
        video = x.unflatten(0, (-1, frames))
        b, f, n, d = video.shape
        q = contextualizer.query(video).view(b, f, n, 2, -1)
        k = contextualizer.key(video).view(b, f, n, 2, -1)
        scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k) * 8**-0.5
        context = torch.einsum("bnhfg,bgnhd->bfnhd", scores.softmax(-1), video.view(b, f, n, 2, -1))
        x = x + contextualizer.alpha * context.reshape(b * f, n, d)
        x = x + scale2(parts["mlp"](norm2(x)))
    return x


@pytest.mark.parametrize("vision", TRANSFORMERS)
def test_the_contextualizer_stands_between_attention_and_feed_forward(vision):
    model = video_model(vision)
    if vision == "dinov2":  # whose layer scale is part of the branch
        for name, parameter in model.vision_tower.named_parameters():
            if "lambda1" in name:
                torch.nn.init.uniform_(parameter, 0.2, 2.0)
    seen = []
    blocks_of(model.vision_tower)[-1].register_forward_hook(lambda _, a, output: seen.append(output))
    videos = noise(2, 3)
    with torch.no_grad():
        model.get_vision_features(videos)
        last = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        by_hand = blocks_by_hand(model.vision_tower, model.temporal, videos.flatten(0, 1), 3)
    torch.testing.assert_close(last, by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", [*TRANSFORMERS, "convnext", "timm_cnn"])
@torch.no_grad()
def test_the_features_of_an_image_are_the_towers_own(vision):
    model, images = tiny_model(vision), noise(3)
    assert torch.equal(model.get_vision_features(images), extract_vision_tokens(model.vision_tower, images))


@pytest.mark.parametrize("vision", TRANSFORMERS)
def test_with_a_contextualizer_an_image_is_a_video_of_one_frame(vision):
    """Its only frame attends to itself, so each block adds `alpha * x` after its attention."""
    model = video_model(vision)
    images = noise(3)
    with torch.no_grad():
        features = model.get_vision_features(images)
        torch.testing.assert_close(features, model.get_vision_features(images.unsqueeze(1)))
        assert not torch.allclose(features, extract_vision_tokens(model.vision_tower, images), atol=1e-3)
        (contextualizer, *_) = model.temporal
        frame = torch.randn(2, 1, 5, 16)
        torch.testing.assert_close(contextualizer(frame), contextualizer.alpha * frame)


@pytest.mark.parametrize("vision", TRANSFORMERS)
def test_a_long_video_in_parts_gives_what_it_gives_at_once(vision, monkeypatch):
    model = video_model(vision)
    videos = noise(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    largest = []
    for block in blocks_of(model.vision_tower):
        block.mlp.register_forward_hook(lambda _, inputs, output: largest.append(len(inputs[0])))
    at_once = model.get_vision_features(videos, mask)
    assert set(largest) == {10}
    largest.clear()
    monkeypatch.setattr("modeling_evlgen.video.FRAMES_AT_ONCE", 3)
    monkeypatch.setattr("modeling_evlgen.video.SCORES_AT_ONCE", 100)
    with torch.no_grad():
        torch.testing.assert_close(model.get_vision_features(videos, mask), at_once)
    assert max(largest) == 3


@pytest.mark.parametrize("vision", TRANSFORMERS)
def test_only_the_contextualizers_of_the_tower_are_trained(vision):
    tower, _ = tiny_towers(vision)
    names = tower.state_dict().keys()
    model = video_model(vision).train()
    assert model.vision_tower.state_dict().keys() == names
    processor = tiny_processor(model)
    batch = processor(videos=[noise_images(3), noise_images(3)[::-1]], suffix=["a red circle", "a blue triangle"])
    model(**batch).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"ln_vision", "vision_projection", "connector", "language_projection", "temporal"}
    gradients = {name: p.grad for name, p in model.temporal.named_parameters() if not name.endswith("query.bias")}
    assert all(gradient.any() for gradient in gradients.values())


def test_a_tower_without_transformer_blocks_is_refused_or_averaged():
    with pytest.raises(ValueError, match="`temporal_contextualizer` must be False: ConvNextModel"):
        video_model("convnext")
    model = tiny_model("convnext")
    videos = noise(2, 3)
    mean = torch.stack([model.get_vision_features(videos[:, i]) for i in range(3)]).mean(dim=0)
    torch.testing.assert_close(model.get_vision_features(videos), mean)


@pytest.mark.parametrize("vision", ["eva", "dinov2"])
def test_an_image_model_becomes_a_video_model_that_starts_the_same(vision, tmp_path):
    image_model = tiny_model(vision)
    image_model.save_pretrained(tmp_path)
    model = EVLGenForConditionalGeneration.from_image_model(tmp_path, **SIZES)
    image = noise(2)
    still = image.unsqueeze(1).expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        expected = image_model.get_image_features(image).pooler_output
        torch.testing.assert_close(model.get_video_features(still).pooler_output, expected)
        torch.testing.assert_close(model.get_image_features(image).pooler_output, expected)
    # The same by the configuration alone, where the contextualizers are missing in the checkpoint.
    loaded = EVLGenForConditionalGeneration.from_pretrained(tmp_path, temporal_contextualizer=True, **SIZES)
    assert all(contextualizer.alpha == 0 for contextualizer in loaded.temporal)
    with torch.no_grad():
        torch.testing.assert_close(loaded.get_video_features(still).pooler_output, expected)
    assert not any(p.requires_grad for p in model.vision_tower.parameters())
    assert all(p.requires_grad for p in model.temporal.parameters())


def test_a_contextualizer_with_frame_positions_sees_the_order_of_frames(tmp_path):
    tiny_model().save_pretrained(tmp_path / "image")
    settings = {**SIZES, "temporal_frame_positions": True}
    load = EVLGenForConditionalGeneration.from_pretrained
    models = [
        EVLGenForConditionalGeneration.from_image_model(tmp_path / "image", **settings),
        load(tmp_path / "image", temporal_contextualizer=True, **settings),
    ]
    videos = noise(1, 4)
    for model in models:  # they start blind to order
        assert not any(contextualizer.frame_positions.weight.any() for contextualizer in model.temporal)
        with torch.no_grad():
            for contextualizer in model.temporal:
                give_effect(contextualizer)
            forth, back = model.get_vision_features(videos), model.get_vision_features(videos.flip(1))
            torch.testing.assert_close(forth, back, atol=1e-4, rtol=1e-4)
            for contextualizer in model.temporal:
                contextualizer.frame_positions.weight.normal_(std=0.3)
            forth, back = model.get_vision_features(videos), model.get_vision_features(videos.flip(1))
            assert not torch.allclose(forth, back, atol=1e-2)
            padded, mask = torch.cat([-noise(1, 2), videos], dim=1), torch.tensor([[False] * 2 + [True] * 4])
            torch.testing.assert_close(model.get_vision_features(padded, mask), forth, atol=1e-4, rtol=1e-4)
    model = models[0].train()
    processor = tiny_processor(model)
    model(**processor(videos=[noise_images(3)], suffix=["a red circle"])).loss.backward()
    assert all(contextualizer.frame_positions.weight.grad.any() for contextualizer in model.temporal)
    model.save_pretrained(tmp_path / "video")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "video").get_vision_features(videos), model.get_vision_features(videos))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.long])
@torch.no_grad()
def test_a_mask_of_numbers_is_that_of_their_truth(dtype):
    """Callers may give 0 and 1."""
    model, videos, mask = video_model(alpha=2.0), noise(2, 6), torch.tensor([[True] * 3 + [False] * 3, [True] * 6])
    expected = model.get_vision_features(videos, mask)
    torch.testing.assert_close(model.get_vision_features(videos, mask.to(dtype)), expected)


def test_images_and_videos_share_a_batch():
    model = video_model()
    processor = tiny_processor(model)
    image, video = noise_images(4)[0], noise_images(4)
    texts = ["<video>what moves?", "<image>what is it?", "<image> before <video>"]
    batch = processor(images=[image, video[1]], videos=[video, video[::-1]], text=texts)
    alone = [
        processor(videos=[video], text=texts[0]),
        processor(images=image, text=texts[1]),
        processor(images=video[1], videos=[video[::-1]], text=texts[2]),
    ]
    assert generate_new(model, batch).tolist() == [generate_new(model, single)[0].tolist() for single in alone]


def test_the_processor_says_where_videos_go():
    model = video_model()
    processor = tiny_processor(model, chat=True)
    count = model.config.num_image_tokens
    text = processor.tokenizer.decode(processor(videos=noise_images(4), text="what?")["input_ids"][0])
    assert text == "<|im_start|>user\n" + "<video>" * count + "what?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.video_token_id == model.config.video_token_id
    assert processor(videos=noise_images(4), num_frames=2)["pixel_values_videos"].shape == (1, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="`text` holds 2 <video> placeholders, but `videos` holds 1 videos"):
        processor(videos=noise_images(4), text="<video> or <video>?")
    with pytest.raises(ValueError, match="Images and videos together need a `text` whose placeholders"):
        processor(videos=noise_images(4), images=noise_images(1))


def test_apply_chat_template_reads_videos(tmp_path):
    processor = tiny_processor(video_model(), chat=True)
    video = write_video(tmp_path / "video.mp4", 9)
    message = {"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": "what?"}]}
    settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "processor_kwargs": {"fps": 5}}
    batch = processor.apply_chat_template([message], **settings)
    direct = processor(videos=video, text="what?", fps=5)
    assert torch.equal(batch["input_ids"], direct["input_ids"])
    torch.testing.assert_close(batch["pixel_values_videos"], direct["pixel_values_videos"])


@pytest.mark.parametrize(("name", "codec"), [("video.mp4", "libx264"), ("video.webm", "libvpx"), ("video", None)])
def test_reads_urls(name, codec, tmp_path):
    if codec is None:
        save_animation(tmp_path / name, shades(16), format="WEBP")
    else:
        write_video(tmp_path / name, 16, codec)
    with serving(tmp_path) as url:
        assert indices(load_rgb_frames(f"{url}/{name}", 4)) == [0, 4, 8, 12]
        with pytest.raises(ValueError, match=r"`videos`: '.*missing.* cannot be read"):
            load_rgb_frames(f"{url}/missing-{name}", 4)


def test_bad_videos_are_named():
    model = video_model()
    with pytest.raises(ValueError, match=r"`pixel_values_videos` must have shape \(videos, frames, "):
        model.get_video_features(noise(2))
    with pytest.raises(ValueError, match=r"`frame_mask` must have shape \(2, 3\), but has \(2, 4\)"):
        model.get_video_features(noise(2, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="`frame_mask` is for videos, but `pixel_values` holds images"):
        model.get_vision_features(noise(2), torch.ones(2, 1, dtype=torch.bool))
    for captioner in (model, tiny_model("clip")):
        with pytest.raises(ValueError, match=r"`frame_mask` must have a frame in each video, .* the videos \[1\]"):
            captioner.get_video_features(noise(2, 2), torch.tensor([[True, True], [False, False]]))


def test_threads_that_share_a_model_do_not_disturb_each_other():
    model = video_model()
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    inputs = [(noise(2, 3), None), (noise(2, 4), mask), (noise(6), None), (noise(1, 6), None)]
    expected = [model.get_vision_features(*pixels).detach() for pixels in inputs]
    barrier = threading.Barrier(len(inputs), timeout=20)

    def wait_for_others(*_):
        barrier.wait()

    for block in blocks_of(model.vision_tower):  # every thread is inside the tower before any goes on
        block.layer_norm1.register_forward_pre_hook(wait_for_others)
    with ThreadPoolExecutor(len(inputs)) as pool:
        features = list(pool.map(lambda pixels: model.get_vision_features(*pixels), inputs))
    for result, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("vision", ["eva", "clip"])
def test_a_trained_tower_recomputes_its_blocks_in_whatever_thread_the_backward_pass_runs(vision):
    """On a GPU, autograd runs the backward pass in another thread."""
    videos, mask = noise(2, 3), torch.tensor([[True, True, False], [True] * 3])
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = video_model(vision)
        model.vision_tower.requires_grad_(True)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        blocks_of(model.vision_tower)[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        loss = model.get_vision_features(videos, mask).square().sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(runs) == 1 + 2
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_compiles_without_a_graph_break():
    model = video_model().eval()
    videos = noise(2, 3)
    torch.compiler.reset()
    compiled = torch.compile(model.get_vision_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(videos), model.get_vision_features(videos))
    torch.testing.assert_close(compiled(videos.flip(0)), model.get_vision_features(videos.flip(0)))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(compiled(videos, mask), model.get_vision_features(videos, mask))


@pytest.mark.parametrize("mode", ["contextualizer", pytest.param("merge", marks=pytest.mark.slow)])
def test_a_video_is_captioned_in_a_clean_process(mode, tmp_path):
    model = video_model("eva") if mode == "contextualizer" else merging_model("eva")
    processor = tiny_processor(model)
    processor.video_processor.num_frames = 3
    save(tmp_path / "model", model, processor)
    assert type(AutoVideoProcessor.from_pretrained(tmp_path / "model")) is EVLGenVideoProcessor
    video = write_video(tmp_path / "video.mp4", 9)
    new = generate_new(model, processor(videos=video, text="what is it?"))
    caption = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    code = """
from transformers import AutoModel, AutoVideoProcessor, pipeline
videos = AutoVideoProcessor.from_pretrained("model", trust_remote_code=True)
assert videos("video.mp4", return_tensors="pt")["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
captioner = pipeline("video-to-text", model="model", trust_remote_code=True)
settings = dict(prompt="what is it?", do_sample=False, max_new_tokens=8)
one = captioner("video.mp4", **settings)
assert captioner(["video.mp4", "video.mp4"], batch_size=2, **settings) == [one, one]
assert captioner("video.mp4", fps=10, **settings) == captioner("video.mp4", num_frames=9, **settings)
assert pipeline(model="model", trust_remote_code=True)("video.mp4", **settings) == one
AutoModel.from_pretrained("model", trust_remote_code=True).save_pretrained("again")
print(repr(one[0]["generated_text"]))
"""
    assert run_clean(code, tmp_path).strip().splitlines()[-1] == repr(caption)
    assert (tmp_path / "again" / "video_merging.py").exists()


def test_a_copy_has_contextualizers_of_its_own():
    model = video_model()
    twin = copy.deepcopy(model)
    videos = noise(1, 3)
    with torch.no_grad():
        expected = model.get_vision_features(videos)
        for contextualizer in model.temporal:
            contextualizer.alpha.zero_()
        torch.testing.assert_close(twin.get_vision_features(videos), expected)
        assert not torch.allclose(model.get_vision_features(videos), expected)
