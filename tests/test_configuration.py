"""Configurations: the paper's defaults, derived values, files, and errors that name the field."""

import json
import math
import re
from itertools import pairwise

import pytest
import yaml
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
        (0, 33, True, [0, 0, 0, 0]),
    ],
)
def test_merge_schedules(merge_r, tokens, class_token, schedule):
    config = TomeFormerConfig(num_hidden_layers=4, merge_r=merge_r, class_token=class_token)
    counts = config.token_counts(tokens)
    assert [before - after for before, after in pairwise(counts)] == schedule and counts[0] == tokens
    assert config.default_budget(tokens) == tokens - sum(schedule)


def test_a_pair_works_for_one_layer():
    assert TomeFormerConfig(num_hidden_layers=1, merge_r=(7, 0.5)).token_counts(33) == [33, 26]


def test_a_schedule_survives_json():
    config = TomeFormerConfig(num_hidden_layers=4, merge_r=(4, 0.5))
    again = TomeFormerConfig.from_dict(json.loads(config.to_json_string()))
    assert again.merge_r == config.merge_r == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (yaml.safe_load, "{num_hidden_layers: 4, merge_r: {r: 4, inflection: 0.5}}"),
        (json.loads, '{"num_hidden_layers": 4, "merge_r": {"inflection": 0.5, "r": 4}}'),
        (yaml.safe_load, "{num_hidden_layers: 4, merge_r: {r: 2, inflection: 1}}"),
    ],
    ids=["yaml", "json", "yaml with an integer"],
)
def test_a_linear_schedule_can_be_written_in_a_file(read, text, tmp_path):
    fields = read(text)
    pair = fields["merge_r"]["r"], fields["merge_r"]["inflection"]
    config = EVLGenConfig(connector_config=fields)
    assert config.connector_config.merge_r == TomeFormerConfig(num_hidden_layers=4, merge_r=pair).merge_r
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert EVLGenConfig.from_pretrained(tmp_path).connector_config.merge_r == config.connector_config.merge_r
    saved["connector_config"]["merge_r"] = fields["merge_r"]  # as a user edits it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert EVLGenConfig.from_pretrained(tmp_path).connector_config.merge_r == config.connector_config.merge_r


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_r": -1}, "`merge_r` must hold integers of 0 or more, but is -1"),
        ({"merge_r": [1, -2]}, "`merge_r` must hold integers of 0 or more"),
        ({"merge_r": [1] * 13}, "`merge_r` has 13 entries for 12 layers"),
        ({"hidden_size": 100}, r"`hidden_size` \(100\) must be a multiple of `num_attention_heads` \(12\)"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, but is 0"),
        ({"merge_r": {"r": 19}}, "`merge_r` must have the keys `r` and `inflection`, but has r"),
        ({"merge_r": {"r": 19, "inflexion": 0.5}}, "`r` and `inflection`, but has r, inflexion"),
        ({"merge_r": {}}, "`merge_r` must have the keys `r` and `inflection`, but has none"),
        ({"merge_r": {"r": 19.5, "inflection": 0.5}}, "`merge_r` needs an integer `r` and a finite `inflection`, but"),
        ({"merge_r": {"r": 19, "inflection": math.nan}}, "`merge_r` needs an integer `r` and a finite `inflection`"),
        ({"merge_r": (19, math.inf)}, r"`merge_r` needs an integer `r` and a finite `inflection`, but is \(19, inf\)"),
        ({"merge_r": {"r": -3, "inflection": 0.5}}, "`merge_r` must hold integers of 0 or more, but is "),
    ],
)
def test_a_connector_that_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TomeFormerConfig(**fields)


@pytest.mark.parametrize(
    "merge_r",
    ["19", 2.5, None, True, (19, "a"), (19, 0.5, 3), [1, "2"], {"r": "19", "inflection": 0.5}, {"r": 19, 5: 0.5}],
)
def test_a_schedule_of_a_wrong_type_is_refused(merge_r):
    with pytest.raises(TypeError, match=f"`merge_r` must be of type int .*, but is {re.escape(repr(merge_r))}"):
        TomeFormerConfig(merge_r=merge_r)


CONNECTORS = [TomeFormerConfig, QFormerConnectorConfig, MLPConnectorConfig]


@pytest.mark.parametrize("config_class", CONNECTORS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "768"}, "`hidden_size` must be of type int, but is '768'"),
        ({"hidden_size": True}, "`hidden_size` must be of type int, but is True"),
        ({"intermediate_size": None}, "`intermediate_size` must be of type int, but is None"),
        ({"class_token": "yes"}, "`class_token` must be of type bool, but is 'yes'"),
        ({"layer_norm_eps": "1e-12"}, r"`layer_norm_eps` must be of type float \| int, but is '1e-12'"),
        ({"hidden_act": 3}, "`hidden_act` must be of type str, but is 3"),
        ({"max_position_embeddings": "512"}, "`max_position_embeddings` must be of type int.*, but is '512'"),
    ],
)
def test_fields_of_a_wrong_type_are_refused(config_class, fields, message):
    with pytest.raises(TypeError, match=message):
        config_class(**fields)
    with pytest.raises(TypeError, match=message):
        config_class.from_dict({}, **fields)


@pytest.mark.parametrize("config_class", CONNECTORS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, but is 0"),
        ({"layer_norm_eps": -1e-6}, "`layer_norm_eps` must be at least 0, but is -1e-06"),
        ({"layer_norm_eps": math.nan}, "`layer_norm_eps` must be finite, but is nan"),
        ({"initializer_range": math.inf}, "`initializer_range` must be finite, but is inf"),
        ({"hidden_act": "swish2"}, "`hidden_act` must be one of gelu, .*, but is 'swish2'"),
        ({"max_position_embeddings": -1}, "`max_position_embeddings` must be at least 1, but is -1"),
    ],
)
def test_fields_out_of_range_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (TomeFormerConfig, {"hidden_dropout_prob": 2.0}, "`hidden_dropout_prob` must be between 0 and 1, but is 2.0"),
        (
            QFormerConnectorConfig,
            {"attention_probs_dropout_prob": -0.1},
            "`attention_probs_dropout_prob` must be betw",
        ),
        (QFormerConnectorConfig, {"query_initializer_range": -1}, "`query_initializer_range` must be at least 0"),
        (TomeFormerConfig, {"initializer_range": math.nan}, "`initializer_range` must be finite"),
        (TomeFormerConfig, {"type_vocab_size": 0}, "`type_vocab_size` must be at least 1"),
        (MLPConnectorConfig, {"branch_initializer_range": -0.1}, "`branch_initializer_range` must be at least 0"),
        (
            QFormerConnectorConfig,
            {"position_initializer_range": 0.1, "max_position_embeddings": None},
            "`position_initializer_range` needs `max_position_embeddings`",
        ),
    ],
)
def test_fields_that_only_some_connectors_have_are_checked(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_whole_numbers_are_numbers():
    assert TomeFormerConfig(hidden_dropout_prob=0).hidden_dropout_prob == 0


@pytest.mark.parametrize("field", ["distinctive_factor", "num_merged_tokens", "size_weighting", "keep_order"])
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
        (
            {"vision_config": CLIPVisionConfig(image_size=448, patch_size=14)},
            "gives 1025 tokens, more than",
        ),
        ({"vision_config": ConvNextConfig()}, "`num_vision_tokens` is needed: .* of a 'convnext'"),
        (
            {"num_vision_tokens": 100},
            "`num_vision_tokens` is 100, but must be 257 by the vision tower's configuration",
        ),
        ({"vision_hidden_size": 100}, "`vision_hidden_size` is 100, but must be 1408 by the vision tower's"),
        (
            {"vision_config": SiglipVisionConfig(), "connector_config": TomeFormerConfig(class_token=True)},
            "class_token` is True, but a vision tower of type 'siglip_vision_model' has no class token",
        ),
        (
            {"connector_config": TomeFormerConfig(position_grid_size=14)},
            "`connector_config.position_grid_size` is 14, but the vision tower gives 257 tokens, with a class token",
        ),
        ({"image_token_id": -5}, "`image_token_id` must be at least 0, but is -5"),
        ({"temporal_num_attention_heads": 0}, "`temporal_num_attention_heads` must be at least 1, but is 0"),
        ({"temporal_hidden_size": -8}, "`temporal_hidden_size` must be at least 1, but is -8"),
        ({"num_vision_tokens": 0}, "`num_vision_tokens` must be at least 1, but is 0"),
        ({"adapted_towers": ["tower"]}, r"`adapted_towers` holds .*, but has \['tower'\]"),
        ({"text_config": {"model_type": "opt3"}}, "`text_config` cannot be used: .*opt3"),
        ({"vision_config": {**CLIP, "image_size": "224"}}, "`vision_config` cannot be used: .*'image_size'"),
        ({"vision_config": {**CLIP, "patch_size": 0}}, "`vision_config` must have an `image_size` and a `patch_size`"),
        ({"vision_config": {**CLIP, "image_size": None}}, "`patch_size` of at least 1, but has None and 32"),
        ({"connector_config": CLIPVisionConfig()}, "`model_type` must be one of tomeformer, .* 'clip_vision_model'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EVLGenConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"vision_config": "clip"},
        {"connector_config": [1]},
        {"text_config": 5},
        {"image_token_id": "5"},
        {"video_token_id": 5.5},
        {"temporal_contextualizer": "yes"},
        {"temporal_hidden_size": "256"},
        {"vision_hidden_size": [3]},
        {"vision_model_name_or_path": 3},
        {"adapted_towers": "vision_model"},
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(TypeError, match=f"`{name}` must be of type .*, but is {re.escape(repr(value))}"):
        EVLGenConfig(**fields)


@pytest.mark.parametrize("text", [None, "{}", "[]"])
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
    with pytest.raises(TypeError, match=r"`image_token_id` must be of type int .*, but is '5'"):
        EVLGenConfig.from_pretrained(tmp_path, image_token_id="5")
    with pytest.raises(ValueError, match=r"`temporal_hidden_size` \(256\) must be a multiple of"):
        EVLGenConfig.from_pretrained(tmp_path, temporal_contextualizer=True, temporal_num_attention_heads=9)
    config = EVLGenConfig.from_pretrained(tmp_path, connector_config={"merge_r": 4}, image_token_id=7)
    assert (config.connector_config.merge_r, config.connector_config.hidden_size, config.image_token_id) == (4, 768, 7)


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
