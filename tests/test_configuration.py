"""Configurations: the paper's defaults, derived values, files, and errors that name the field."""

import json
import math
import re
from functools import partial
from itertools import pairwise

import pytest
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig, OPTConfig, SiglipVisionConfig

from configuration_evlgen import EVLGenConfig, MLPConnectorConfig, QFormerConnectorConfig, TomeFormerConfig


def test_the_defaults_are_the_papers_model():
    config = EVLGenConfig()
    assert config.vision_config.model_type == "blip_2_vision_model"
    assert (config.num_vision_tokens, config.vision_hidden_size) == (257, 1408)
    assert config.connector_config.token_counts(257) == list(range(257, 28, -19))
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
        ((7, 0.5), 33, True, [7]),
        (0, 33, True, [0, 0, 0, 0]),
    ],
)
def test_merge_schedules(merge_r, tokens, class_token, schedule):
    config = TomeFormerConfig(num_hidden_layers=len(schedule), merge_r=merge_r, class_token=class_token)
    counts = config.token_counts(tokens)
    assert [before - after for before, after in pairwise(counts)] == schedule and counts[0] == tokens
    assert config.default_budget(tokens) == tokens - sum(schedule)


@pytest.mark.parametrize("inflection", [0.5, 1])
def test_a_linear_schedule_can_be_written_in_a_file(inflection, tmp_path):
    written = {"r": 4, "inflection": inflection}
    config = EVLGenConfig(connector_config={"num_hidden_layers": 4, "merge_r": written})
    expected = TomeFormerConfig(num_hidden_layers=4, merge_r=(4, inflection)).merge_r
    assert config.connector_config.merge_r == expected
    config.save_pretrained(tmp_path)
    assert EVLGenConfig.from_pretrained(tmp_path).connector_config.merge_r == expected
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["connector_config"]["merge_r"] = written  # as a user edits it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert EVLGenConfig.from_pretrained(tmp_path).connector_config.merge_r == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_r": [1, -2]}, r"`merge_r` .* \[1, -2\]"),
        ({"merge_r": [1] * 13}, "`merge_r` has 13 entries for 12 layers"),
        ({"hidden_size": 100}, r"`hidden_size` \(100\) .* `num_attention_heads` \(12\)"),
        ({"merge_r": {"r": 19, "inflexion": 0.5}}, "`merge_r` .* has r, inflexion"),
        ({"merge_r": {"r": 19.5, "inflection": 0.5}}, "`merge_r` needs an integer `r`"),
        ({"merge_r": (19, math.inf)}, r"`merge_r` .* \(19, inf\)"),
    ],
)
def test_a_connector_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TomeFormerConfig(**fields)


@pytest.mark.parametrize("merge_r", [None, True, (19, "a"), {"r": "19", "inflection": 0.5}])
def test_a_schedule_of_a_wrong_type_is_refused(merge_r):
    with pytest.raises(TypeError, match=f"`merge_r` must be of type int .*, but is {re.escape(repr(merge_r))}"):
        TomeFormerConfig(merge_r=merge_r)


CONNECTORS = [TomeFormerConfig, QFormerConnectorConfig, MLPConnectorConfig]


@pytest.mark.parametrize("config_class", CONNECTORS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", True), ("class_token", "yes"), ("layer_norm_eps", "1e-12"), ("max_position_embeddings", "512")],
)
def test_fields_of_a_wrong_type_are_refused(config_class, name, value):
    for use in (config_class, partial(config_class.from_dict, {})):
        with pytest.raises(TypeError, match=f"`{name}` must be of type .*, but is {value!r}"):
            use(**{name: value})


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        (TomeFormerConfig, "layer_norm_eps", math.nan),
        (MLPConnectorConfig, "hidden_act", "swish2"),
        (TomeFormerConfig, "hidden_size", 0),
        (TomeFormerConfig, "hidden_dropout_prob", 2.0),
        (QFormerConnectorConfig, "num_distinctive_tokens", 0),
        (MLPConnectorConfig, "pool_size", 0),
    ],
)
def test_fields_out_of_range_are_refused(config_class, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, but is '?{value}"):
        config_class(**{name: value})


@pytest.mark.parametrize("field", ["distinctive_factor", "keep_order"])
def test_a_deleted_option_is_named_where_a_checkpoint_sets_it(field, tmp_path):
    EVLGenConfig().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in (None, False):  # as older checkpoints hold it that do not use it
        config["connector_config"][field] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert EVLGenConfig.from_pretrained(tmp_path).connector_config.hidden_size == 768
    config["connector_config"][field] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"sets `{field}` to 3.*Load the checkpoint with the code that it holds"):
        EVLGenConfig.from_pretrained(tmp_path)


CLIP = {"model_type": "clip_vision_model"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": CLIPVisionConfig(image_size=448, patch_size=14)}, "gives 1025 tokens"),
        ({"vision_config": ConvNextConfig()}, "`num_vision_tokens` is needed: .* 'convnext'"),
        ({"num_vision_tokens": 100}, "`num_vision_tokens` is 100, but must be 257"),
        ({"vision_config": SiglipVisionConfig(), "connector_config": {"class_token": True}}, "class_token` is True"),
        ({"connector_config": {"position_grid_size": 14}}, "`connector_config.position_grid_size` is 14"),
        ({"image_token_id": -5}, "`image_token_id` .* -5"),
        ({"temporal_num_attention_heads": 0}, "`temporal_num_attention_heads` .* 0"),
        ({"adapted_towers": ["tower"]}, r"`adapted_towers` .* \['tower'\]"),
        ({"towers": "none"}, "`towers` must be .* 'none'"),
        ({"text_config": {"model_type": "opt3"}}, "`text_config` cannot be used: .*opt3"),
        ({"vision_config": {**CLIP, "patch_size": 0}}, "`vision_config` .* `patch_size`"),
        ({"connector_config": CLIPVisionConfig()}, "`model_type` must .* 'clip_vision_model'"),
        ({"connector_config": {"model_type": "resampler"}}, "must be one of tomeformer, .* 'resampler'"),
        ({"connector_config": {"model_type": "evlgen_mlp", "pool_size": 20}}, "`pool_size` 20 needs a square grid"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EVLGenConfig(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vision_config", "clip"), ("text_config", 5), ("image_token_id", "5"), ("adapted_towers", "vision_model")],
)
def test_a_field_of_a_wrong_type_is_refused(name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be of type .*, but is {value!r}"):
        EVLGenConfig(**{name: value})


@pytest.mark.parametrize("text", [None, "{}"])
@pytest.mark.parametrize("config_class", [EVLGenConfig, *CONNECTORS])
def test_a_folder_without_a_configuration_is_refused(config_class, text, tmp_path):
    """Without this, it is taken for the paper's model of 3.7 billion parameters."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"'{tmp_path}' has no config.json with a `model_type`"):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vision_config", "connector_config", "text_config"])
def test_a_configuration_without_a_part_is_refused(part, tmp_path):
    EVLGenConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for broken in ({**fields, part: None}, {name: value for name, value in fields.items() if name != part}):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"must have {part}, which is missing"):
            EVLGenConfig.from_pretrained(tmp_path)


def test_fields_given_at_loading_are_checked_with_the_saved_ones(tmp_path):
    EVLGenConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`temporal_hidden_size` \(256\)"):
        EVLGenConfig.from_pretrained(tmp_path, temporal_contextualizer=True, temporal_num_attention_heads=9)
    config = EVLGenConfig.from_pretrained(tmp_path, connector_config={"merge_r": 4}, image_token_id=7)
    assert (config.connector_config.merge_r, config.connector_config.hidden_size, config.image_token_id) == (4, 768, 7)


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


def test_the_number_of_tokens_follows_a_changed_connector():
    config = EVLGenConfig()
    config.connector_config.merge_r = 5
    assert config.num_image_tokens == 257 - 12 * 5 == EVLGenConfig.from_dict(config.to_dict()).num_image_tokens
