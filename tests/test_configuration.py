"""Configurations: defaults of the paper, what is derived, and clear errors for what cannot work."""

import json

import pytest
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig, OPTConfig, SiglipVisionConfig

from configuration_evlgen import EVLGenConfig, TomeFormerConfig


def test_the_defaults_are_the_papers_model():
    config = EVLGenConfig()
    assert config.vision_config.model_type == "blip_2_vision_model"
    assert (config.num_vision_tokens, config.vision_hidden_size) == (257, 1408)
    assert config.connector_config.merge_schedule(257) == [19] * 12
    assert config.num_image_tokens == 257 - 12 * 19 == 29
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("opt", 2560)
    assert config.image_token_id == config.text_config.vocab_size


@pytest.mark.parametrize(
    ("merge_r", "tokens", "class_token", "schedule"),
    [
        (3, 17, True, [3, 3, 3, 3]),
        (3, 9, True, [3, 2, 1, 1]),  # never more than half of what may go
        ([8, 4], 33, True, [8, 4, 0, 0]),
        ((4, 0.5), 33, False, [2, 3, 4, 6]),
        ((4, -0.5), 33, False, [6, 4, 3, 2]),
        (0, 33, True, [0, 0, 0, 0]),
    ],
)
def test_merge_schedules(merge_r, tokens, class_token, schedule):
    config = TomeFormerConfig(num_hidden_layers=4, merge_r=merge_r, class_token=class_token)
    assert config.merge_schedule(tokens) == schedule
    assert config.num_output_tokens(tokens) == tokens - sum(schedule)


def test_a_pair_works_for_one_layer():
    assert TomeFormerConfig(num_hidden_layers=1, merge_r=(7, 0.5)).merge_schedule(33) == [7]


def test_a_schedule_survives_json():
    config = TomeFormerConfig(num_hidden_layers=4, merge_r=(4, 0.5))
    again = TomeFormerConfig.from_dict(json.loads(config.to_json_string()))
    assert again.merge_schedule(33) == config.merge_schedule(33) == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_r": -1}, "`merge_r` must hold integers of 0 or more, but is -1"),
        ({"merge_r": [1, -2]}, "`merge_r` must hold integers of 0 or more"),
        ({"merge_r": [1] * 13}, "`merge_r` has 13 entries for 12 layers"),
        ({"hidden_size": 100}, r"`hidden_size` \(100\) must be a multiple of `num_attention_heads` \(12\)"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, but is 0"),
    ],
)
def test_a_connector_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TomeFormerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vision_config": CLIPVisionConfig(image_size=448, patch_size=14)},
            "gives 1025 tokens, more than",
        ),
        ({"vision_config": ConvNextConfig()}, "`num_vision_tokens` is needed: a vision tower of type 'convnext'"),
        ({"num_vision_tokens": 100}, "`num_vision_tokens` is 100, but the vision tower's configuration says 257"),
        ({"vision_hidden_size": 100}, "`vision_hidden_size` is 100, but the vision tower's configuration says 1408"),
        (
            {"vision_config": SiglipVisionConfig(), "connector_config": TomeFormerConfig(class_token=True)},
            "class_token` is True, but a vision tower of type 'siglip_vision_model' has no class token",
        ),
        (
            {"connector_config": TomeFormerConfig(position_grid_size=14)},
            "`connector_config.position_grid_size` is 14, but the vision tower gives 257 tokens, with a class token",
        ),
        ({"image_token_id": -5}, "`image_token_id` must not be negative, but is -5"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EVLGenConfig(**fields)


def test_the_class_token_is_the_towers():
    for vision_config, class_token in ((SiglipVisionConfig(), False), (CLIPVisionConfig(), True)):
        config = EVLGenConfig(vision_config=vision_config, connector_config={"merge_r": 4})
        assert config.connector_config.class_token is class_token


def test_survives_json_with_parts_of_any_type(tmp_path):
    config = EVLGenConfig(
        vision_config=SiglipVisionConfig(image_size=64),
        connector_config=TomeFormerConfig(num_hidden_layers=3, merge_r=(2, 0.5), class_token=False),
        text_config=LlamaConfig(hidden_size=64),
        text_model_name_or_path="someone/llama",
        text_model_revision="abc",
    )
    config.save_pretrained(tmp_path)
    again = EVLGenConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert (again.text_config.hidden_size, again.text_model_revision) == (64, "abc")
    assert again.num_image_tokens == config.num_image_tokens
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "num_image_tokens" not in saved  # derived, so it is never stored
    assert saved["auto_map"]["AutoModel"] == "modeling_evlgen.EVLGenForConditionalGeneration"
    assert "image-to-text" in saved["custom_pipelines"]


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model_type` is 'opt', but an 'evlgen' is wanted"):
        EVLGenConfig.from_pretrained(tmp_path)
