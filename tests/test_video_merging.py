"""Merged videos: one budget of tokens for a video of any length, whose tokens know their place and time."""

import pytest
import torch
from accelerate import cpu_offload

from configuration_evlgen import EVLGenConfig, MLPConnectorConfig, QFormerConnectorConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.tomeformer import PositionEmbeddings
from modeling_evlgen.video_merging import VideoTokens, add_frames, merge_over_time, place_frames

from .helpers import IMAGE_SIZE, LAYERS, merging_model, noise_images, tiny_model, tiny_processor

QFORMER = {**LAYERS, "num_query_tokens": 5, "class_token": False}
CONNECTORS = {
    "tomeformer": {**LAYERS, "merge_r": 3},
    "qformer": QFormerConnectorConfig(**QFORMER),
    "choosing qformer": QFormerConnectorConfig(**QFORMER, position_initializer_range=0.1, num_distinctive_tokens=9),
    "mlp": MLPConnectorConfig(hidden_size=32, intermediate_size=64, class_token=False),
}


def noise(*shape, seed=1):
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def merge(features, class_token=False, times=None):
    """Merges the frames of one video, `(frames, tokens, dim)`."""
    times = torch.arange(len(features)) if times is None else torch.tensor(times)
    steps = list(torch.zeros(len(features), 1, dtype=torch.long))
    return add_frames(None, place_frames(features, times, class_token), steps, class_token)


def distinct(count, dim=64, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "convnext"])
@torch.no_grad()
def test_one_frame_gives_exactly_what_the_image_gives(vision):
    model = tiny_model(vision)
    merging = merging_model(vision)
    merging.load_state_dict(model.state_dict(), strict=False)
    images = noise(2)
    expected = model.get_image_features(images).pooler_output
    assert torch.equal(merging.get_image_features(images).pooler_output, expected)
    videos = merging.get_video_features(images.unsqueeze(1), frame_times=torch.tensor([[7.0], [0.5]]))
    assert torch.equal(videos.pooler_output, expected)


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_every_connector_makes_one_budget_of_a_video_and_sees_the_order_of_its_frames(connector):
    vision = "clip" if connector == "tomeformer" else "siglip"
    model = merging_model(vision, CONNECTORS[connector])
    videos = noise(1, 5)
    prompt = model.get_video_features(videos).pooler_output
    assert prompt.shape == (1, model.config.num_image_tokens, 32)
    assert not torch.allclose(prompt, model.get_video_features(videos.flip(1)).pooler_output, atol=1e-3)
    slower = model.get_video_features(videos, frame_times=3 * torch.arange(5).unsqueeze(0)).pooler_output
    assert not torch.allclose(prompt, slower, atol=1e-3)


@pytest.mark.parametrize("where", [0, 7, 63])
@torch.no_grad()
def test_a_single_distinct_frame_among_64_keeps_tokens_of_its_own(where):
    background, event = distinct(49, seed=1), distinct(49, seed=2)
    features = background + 0.1 * torch.randn(64, 49, 64, generator=torch.Generator().manual_seed(3))
    features[where] = event
    merged = merge(features)
    at_event = merged.places[0, :, 0].sub(where).abs() < 0.5
    found = merged.features[0, at_event]
    assert merged.features.shape[1] == 49
    best = torch.nn.functional.cosine_similarity(found[:, None], event[None], dim=-1).max(dim=1).values
    assert (best > 0.65).sum() >= 12


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_a_patch_meets_its_copy_in_the_next_frame_wherever_both_are(seed):
    patches = distinct(49)
    pool = place_frames(patches.unsqueeze(0), torch.zeros(1), class_token=False)
    chosen = torch.randperm(49, generator=torch.Generator().manual_seed(seed))[:25]
    copies = VideoTokens(*(tensor[:, chosen] for tensor in pool))
    merged, _ = merge_over_time(pool, copies, class_token=False)
    torch.testing.assert_close(merged.features[0], patches)
    torch.testing.assert_close(merged.places, pool.places)
    assert (merged.size[0, chosen] == 2).all() and merged.size.sum() == 49 + 25


@torch.no_grad()
def test_what_comes_again_keeps_the_times_of_both():
    """A, B, A: without times in the matching, both A would become tokens of the time in the middle."""
    objects = distinct(2, seed=1)  # whose patches are alike, as those of an object are
    first, second = (thing + 0.6 * distinct(49, seed=seed) for seed, thing in enumerate(objects, 2))
    features = torch.stack([first] * 8 + [second] * 8 + [first] * 8)
    merged = merge(features + 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(4)))
    times = merged.places[0, :, 0]
    shows_first = torch.nn.functional.cosine_similarity(merged.features[0], objects[:1]) > 0.6
    assert (shows_first & (times < 8)).sum() >= 5 and (shows_first & (times > 16)).sum() >= 5


@torch.no_grad()
def test_the_mean_over_tokens_and_the_class_token_lose_nothing():
    features = torch.randn(7, 17, 8, generator=torch.Generator().manual_seed(0))
    times = [0.0, 0.5, 1.0, 1.5, 9.0, 9.5, 10.0]
    merged = merge(features, class_token=True, times=times)
    torch.testing.assert_close(merged.features[0, 0], features[:, 0].mean(dim=0))
    assert merged.places[0, 0, 0] == pytest.approx(4.5) and merged.size[0, 0] == 7
    weight = merged.size[0, 1:, None] / merged.size[0, 1:].sum()
    torch.testing.assert_close((weight * merged.features[0, 1:]).sum(dim=0), features[:, 1:].mean(dim=(0, 1)))
    mean_place = (weight * merged.places[0, 1:]).sum(dim=0)
    torch.testing.assert_close(mean_place, torch.tensor([4.5, 1.5, 1.5]))


@torch.no_grad()
def test_videos_of_4_and_256_frames_share_a_batch_wherever_their_padding_stands():
    model = merging_model()
    videos = noise(4, 256)
    mask = torch.zeros(4, 256, dtype=torch.bool)
    for row, frames in enumerate((slice(4), slice(256), slice(1), [1, 3, 4, 200])):
        mask[row, frames] = True
    videos[~mask] = torch.nan  # padding never enters
    times = torch.arange(256).expand(4, -1) / 25 + torch.tensor([[0.0], [3.0], [5.0], [0.0]])
    together = model.get_video_features(videos, mask, frame_times=times).pooler_output
    for row, frames in enumerate(mask):
        alone = model.get_video_features(videos[row, frames][None], frame_times=times[row, frames][None])
        torch.testing.assert_close(alone.pooler_output[0], together[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["merge", "mean"])
@torch.no_grad()
def test_a_stream_gives_what_all_frames_give_at_once(mode, monkeypatch):
    monkeypatch.setattr("modeling_evlgen.video_merging.FRAMES_AT_ONCE", 4)
    model = merging_model() if mode == "merge" else tiny_model()
    model.config.image_token_range = [2, 17]
    video, times = noise(11), torch.arange(11) / 3
    largest = []
    model.vision_tower.register_forward_hook(lambda _, inputs, output: largest.append(len(output.last_hidden_state)))
    stream = model.encode_video(((frame, 1e6 + i / 3) for i, frame in enumerate(video)), num_image_tokens=5)
    assert max(largest) == 4 and sum(largest) == 11
    at_once = model.get_video_features(video.unsqueeze(0), None, [5], times.unsqueeze(0))
    assert mode == "mean" or (max(largest) == 4 and sum(largest) == 2 * 11)  # not more memory
    torch.testing.assert_close(stream.pooler_output, at_once.pooler_output, atol=1e-4, rtol=1e-4)
    processor, settings = tiny_processor(model), {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3}
    inputs = processor(encoded_video=stream, text="what?")
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 5
    media = {"pixel_values_videos": video.unsqueeze(0), "frame_times": times.unsqueeze(0)}
    expected = model.generate(inputs["input_ids"], **media, **settings)
    for _ in range(2):  # a stream answers one question after the other
        assert torch.equal(model.generate(**inputs, **settings), expected)
    with pytest.raises(ValueError, match="`encoded_video` is given instead of `videos`"):
        processor(encoded_video=stream, videos=[noise_images(2)])
    with pytest.raises(TypeError, match=r"`encoded_video` must .* is list"):
        processor(encoded_video=[stream, stream])


@torch.no_grad()
def test_an_offloaded_model_encodes_a_stream():
    model, video = merging_model(), noise(5)
    expected = model.encode_video(video)
    cpu_offload(model, execution_device=torch.device("cpu"))
    stream = model.encode_video(video)
    torch.testing.assert_close(stream.pooler_output, expected.pooler_output)
    torch.testing.assert_close(stream.token_places, expected.token_places)


@pytest.mark.parametrize(
    ("frames", "times", "error", "message"),
    [
        ((1, 2, 3, 32, 64), None, ValueError, "square grid of patches, but the vision tower gives 8 patches"),
        ((0, 2, 3, 32, 32), None, ValueError, r"at least one frame of each video, but have shape \(0, "),
        ((1, 2, 3, 32, 32), [[0.0, 1.0]], TypeError, "`frame_times` must be a tensor, but is a list"),
        ((2, 3, 3, 32, 32), torch.zeros(2, 4), ValueError, r"`frame_times` .* \(2, 3\), but has \(2, 4\)"),
        ((1, 2, 3, 32, 32), torch.tensor([[0.0, torch.inf]]), ValueError, "`frame_times` must be finite"),
        ((1, 2, 3, 32, 32), torch.tensor([[False, True]]), TypeError, "`frame_times` must be numbers .* torch.bool"),
    ],
)
@torch.no_grad()
def test_frames_and_times_that_cannot_be_merged_are_named(frames, times, error, message):
    with pytest.raises(error, match=message):
        merging_model("convnext").get_video_features(torch.randn(frames), frame_times=times)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        ([], ValueError, "`frames` must yield at least one frame"),
        ([noise(), noise()[:, :16]], ValueError, r"yields \(3, 16, 32\) after \(3, 32, 32\)"),
        ([(noise(), 0.0), (noise(), float("nan"))], ValueError, "`frames`: their times must be finite"),
        ([(noise(), 2.0), (noise(), 1.0)], ValueError, "in their order, but one of 1.0 s follows one of 2.0 s"),
        ("video.mp4", TypeError, "`frames` must yield tensors, .* yields str"),
        ([(noise(), None)], TypeError, "`frames` must yield times in seconds, but yields None"),
        ([(noise(), 9.0), noise()], TypeError, "a time with each frame or with none, but frame 1 differs"),
    ],
)
@torch.no_grad()
def test_bad_streams_are_named(frames, error, message):
    with pytest.raises(error, match=message):
        merging_model().encode_video(iter(frames))


def test_a_bad_number_of_tokens_is_named_before_a_frame_is_read():
    model, never = merging_model(), iter(lambda: pytest.fail("a frame was read"), None)
    with pytest.raises(ValueError, match="`num_image_tokens` must be from 11 to 11"):
        model.encode_video(never, num_image_tokens=99)
    with pytest.raises(ValueError, match="`video_budgets` must be from 11 to 11"):
        model.get_video_features(noise(1, 3), video_budgets=[99])
    with pytest.raises(ValueError, match="`video_budgets` holds 2 numbers, but there are 1"):
        model.get_video_features(noise(1, 3), video_budgets=[11, 11])


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_places_of_tokens_need_their_features(method):
    model = merging_model()
    run, places = getattr(model, method), torch.zeros(1, 17, 3)
    ids, features = torch.full((1, 11), model.config.image_token_id), torch.zeros(1, 17, 16)
    with pytest.raises(ValueError, match="`token_places` is for `vision_features`, but there are none"):
        run(input_ids=ids, token_places=places)
    for bad in (places[:, 0], places[:, 1:], places[..., 1:], places[:0], [0.0]):
        with pytest.raises((ValueError, TypeError), match=r"`token_places` must (have shape .1, 17, 3.|be a tensor)"):
            run(input_ids=ids, vision_features=features, token_places=bad)
    with pytest.raises(ValueError, match=r"`token_places` must be finite, .* \[0\]"):
        run(input_ids=ids, vision_features=features, token_places=places / 0)
    with pytest.raises(ValueError, match="`token_places` is for merged videos, but `image_grid_thw` has"):
        model.project_vision_features(
            features.repeat(2, 1, 1), torch.tensor([[1, 1, 2]]), token_places=places.repeat(2, 1, 1)
        )


def test_times_and_places_stay_exact_where_a_batch_is_cast():
    processor = tiny_processor(merging_model())
    batch = processor(videos=[noise_images(2)], video_metadata=[{"fps": 1 / 301}]).to("cpu", torch.bfloat16)
    assert batch["pixel_values_videos"].dtype == torch.bfloat16
    assert batch["frame_times"].tolist() == [[0, 301]]
    batch = processor(vision_features=torch.zeros(1, 17, 16))
    batch["token_places"] = torch.full((1, 17, 3), 300.7)
    assert torch.equal(batch.to(torch.bfloat16)["token_places"], torch.full((1, 17, 3), 300.7))


@torch.no_grad()
def test_features_with_their_places_give_what_their_video_gives():
    model = merging_model().eval()
    processor = tiny_processor(model)
    videos = processor(videos=[noise_images(3), noise_images(5)], suffix=["a cat", "a dog"])
    plain = model(**videos)
    features, places = plain.video_outputs.last_hidden_state, plain.video_outputs.token_places
    stored = processor(vision_features=features, suffix=["a cat", "a dog"])
    torch.testing.assert_close(model(**stored, token_places=places).loss, plain.loss)
    assert not torch.allclose(model(**stored).loss, plain.loss)  # places count
    prompts, images = processor(videos=[noise_images(3)] * 2), processor(vision_features=features[:1].repeat(2, 1, 1))
    words = model.generate(**prompts, num_beams=2, max_new_tokens=5)[:, -5:]
    places = places[:1].repeat(2, 1, 1)
    assert torch.equal(model.generate(**images, token_places=places, num_beams=2, max_new_tokens=5)[:, -5:], words)


@pytest.mark.parametrize("name", ["frame_times", "frame_mask"])
def test_times_and_masks_without_videos_are_named(name):
    model = merging_model()
    ids = torch.tensor([[5, 6, 7]])
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=f"`{name}` is for videos, but there are none"):
            run(input_ids=ids, **{name: torch.ones(1, 3)})


def test_positions_are_those_of_the_grid_on_its_points_and_between_them_elsewhere():
    positions = PositionEmbeddings(30, 8, 1.0, num_prefix_tokens=1)
    tokens = torch.zeros(1, 17, 8)
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).unsqueeze(0)
    assert torch.equal(positions(tokens, places=grid), positions(tokens))
    order = torch.randperm(16)
    assert torch.equal(positions(tokens, places=grid[:, order])[:, 1:], positions(tokens)[:, 1:][:, order])
    middle = positions(tokens, places=torch.full((1, 16, 2), 1.5))[0, 1]
    torch.testing.assert_close(middle, positions.weight[[6, 7, 10, 11]].mean(dim=0))


def test_an_image_model_becomes_a_video_model_without_realignment(tmp_path, caplog):
    image_model = tiny_model("eva")
    image_model.save_pretrained(tmp_path / "image")
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "image", video_mode="merge")
    assert model.config.is_for_videos and not model.time_embedding.weight.any()
    assert model.time_embedding.weight.requires_grad and model.time_embedding.weight.dtype == torch.float32
    images = noise(2)
    with torch.no_grad():
        expected = image_model.get_image_features(images).pooler_output
        assert torch.equal(model.get_image_features(images).pooler_output, expected)
        assert torch.equal(model.get_video_features(images.unsqueeze(1)).pooler_output, expected)
        model.time_embedding.weight.normal_()
        wanted = model.get_video_features(noise(1, 4)).pooler_output
        model.save_pretrained(tmp_path / "video")
        again = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "video")
        assert torch.equal(again.get_video_features(noise(1, 4)).pooler_output, wanted)


OBLONG = {"model_type": "vit", "image_size": [32, 72], "patch_size": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video_mode": "median"}, '`video_mode` must be "mean" or "merge", but is \'median\''),
        ({"temporal_frame_positions": True}, "`temporal_frame_positions` needs a `temporal_contextualizer`"),
        ({"video_mode": "merge", "temporal_contextualizer": True}, "with a `temporal_contextualizer`"),
        ({"video_mode": "merge", "connector_config": {"model_type": "evlgen_mlp", "pool_size": 4}}, "pool_size"),
        ({"video_mode": "merge", "connector_config": {"class_token": False}}, "square grid .* gives 257 patches"),
        ({"video_mode": "merge", "vision_config": OBLONG}, "square grid of patches, but this one gives 4 x 9 patches"),
    ],
)
def test_modes_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EVLGenConfig(**fields)


@pytest.mark.parametrize("media", ["videos", "images", "text", "both"])
def test_every_batch_has_a_gradient_for_all_that_is_trained(media):
    """DDP waits for each of them."""
    model = merging_model().train()
    with torch.no_grad():
        model.time_embedding.weight.zero_()
    inputs = {
        "videos": {"videos": [noise_images(3), noise_images(5)]},
        "images": {"images": noise_images(2)},
        "text": {"text": ["what?", "who?"]},
        "both": {"images": noise_images(1), "videos": [noise_images(4)], "text": ["<image>", "<video>"]},
    }
    model(**tiny_processor(model)(**inputs[media], suffix=["a cat", "a dog"])).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == with_gradient >= {"time_embedding", "connector", "vision_projection"}
    assert bool(model.time_embedding.weight.grad.any()) == (media in ("videos", "both"))


def test_a_trained_tower_gets_its_gradient_through_the_means():
    model = merging_model()
    model.vision_tower.requires_grad_(True)
    model.get_video_features(noise(1, 5)).pooler_output.square().sum().backward()
    first = next(model.vision_tower.parameters())
    assert first.grad is not None and first.grad.any()
    frames = torch.randn(5, 16, 8, requires_grad=True)
    merge(frames).features.sum().backward()
    assert (frames.grad.abs().sum(dim=-1) > 0).all()  # each token of each frame has its share


@torch.no_grad()
def test_a_tower_in_half_precision_does_not_lose_late_frames():
    model = merging_model()
    features = torch.randn(300, 16, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = merge(features, class_token=False)
    assert merged.features.dtype == torch.float32 and merged.size.sum() == 300 * 16
    weight = merged.size[0, :, None] / merged.size.sum()
    torch.testing.assert_close((weight * merged.features[0]).sum(dim=0), features.float().mean(dim=(0, 1)))
    model.vision_tower.to(torch.bfloat16)
    assert model.get_video_features(noise(1, 3)).pooler_output.dtype == torch.float32


@torch.no_grad()
def test_mixed_precision_does_not_change_what_is_merged():
    patches = distinct(49) + 30 * distinct(1, seed=1)  # all much alike
    features = torch.stack([patches.roll(step, dims=0) for step in range(6)])
    expected = merge(features)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge(features)
        assert merging_model().get_video_features(noise(1, 3)).pooler_output.isfinite().all()
    assert torch.equal(merged.places, expected.places)
