"""The model: any tower with any language model, frozen towers, the loss, and generation."""

import re
from functools import partial

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DataCollatorForLanguageModeling,
    Dinov2Config,
    TimmWrapperConfig,
)

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, EVLGenModel, target_positions
from modeling_evlgen.vision_tower import extract_vision_tokens, measure_vision_tower

from .helpers import (
    LAYERS,
    ROOT,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    generate_new,
    join,
    noise_images,
    save_towers,
    tiny_model,
    tiny_processor,
    tiny_towers,
)

CAPTIONS = ["a red circle", "a blue triangle to the left of a green square"]
TRAINED = {"ln_vision", "vision_projection", "connector", "language_projection"}
PROMPTS = ["what is it?", "Question: what do you see to the left? Short answer:"]


def training_batch(processor):
    return processor(images=noise_images(2), text=PROMPTS, suffix=CAPTIONS)


# Towers and language models know nothing of each other, so each stands beside one of the other kind.
@pytest.mark.parametrize(
    ("vision", "text"),
    [*((vision, "opt") for vision in VISION_CONFIGS), *(("clip", text) for text in ("llama", "qwen2", "gpt2"))],
)
def test_any_tower_and_any_language_model(vision, text):
    model = tiny_model(vision, text)
    processor = tiny_processor(model)
    batch = training_batch(processor)
    output = model.train()(**batch)
    output.loss.backward()
    assert output.loss.isfinite()
    text_dim = model.get_input_embeddings().weight.shape[1]
    assert output.image_outputs.pooler_output.shape == (2, model.config.num_image_tokens, text_dim)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == TRAINED
    words = model.generate(**processor(images=noise_images(2), text=PROMPTS), max_new_tokens=3, do_sample=False)
    assert words.shape[0] == 2


def test_the_loss_is_the_captions_cross_entropy():
    model = tiny_model()
    processor = tiny_processor(model)
    batch = training_batch(processor)
    with torch.no_grad():
        image_tokens = model.get_image_features(batch["pixel_values"]).pooler_output
        ids, labels = batch["input_ids"], batch["labels"]
        embeds = model.get_input_embeddings()(ids.clamp(max=299))
        embeds[ids == 300] = image_tokens.flatten(0, 1)
        logits = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(model(**batch).loss, expected)
        torch.testing.assert_close(model(**batch).logits, logits)


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_those_of_all_positions_unless_some_are_requested(training):
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    batch = training_batch(tiny_processor(model))
    whole = model(**batch)
    assert whole.logits.shape[:2] == batch["input_ids"].shape
    captions_only = model(**batch, logits_to_keep=target_positions(batch["labels"]))
    assert captions_only.logits.shape == ((batch["labels"] != -100).sum(), 300)
    torch.testing.assert_close(captions_only.loss, whole.loss)
    length = batch["input_ids"].shape[1]
    for last in (length, torch.arange(length)):
        torch.testing.assert_close(model(**batch, logits_to_keep=last).loss, whole.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_copy_of_the_ids_trains_on_words_alone(side):
    model = tiny_model()
    processor = tiny_processor(model)
    batch = processor(images=noise_images(2), text=["<image>what is it?", "<image>a"], padding_side=side)
    losses, counts = [], []
    for image, text in zip(noise_images(2), ("<image>what is it?", "<image>a"), strict=True):
        single = processor(images=image, text=text)
        targets = single["input_ids"][:, 1:]
        logits = model(**single).logits[:, :-1][targets != processor.image_token_id]
        targets = targets[targets != processor.image_token_id]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        counts.append(len(targets))
    loss = model(**batch, labels=batch["input_ids"].clone()).loss
    torch.testing.assert_close(loss, sum(losses) / sum(counts))
    collator = DataCollatorForLanguageModeling(processor.tokenizer, mlm=False)
    real = batch["attention_mask"].bool()
    rows = [{"input_ids": ids[mask]} for ids, mask in zip(batch["input_ids"], real, strict=True)]
    processor.tokenizer.padding_side = side
    torch.testing.assert_close(model(**collator(rows), pixel_values=batch["pixel_values"]).loss, loss)


@pytest.mark.parametrize(("text", "bos"), [("llama", False), ("opt", True), ("gpt2", False)])
def test_the_base_model_gives_what_the_head_reads(text, bos):
    model = tiny_model(text=text)
    batch = tiny_processor(model, bos)(images=noise_images(2), text=["what is it?", "a"])
    base_model = model.base_model
    assert type(base_model) is EVLGenModel and base_model.connector is model.connector
    hidden = base_model(**batch).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**batch).logits)
    assert model.train().base_model.training and not model.eval().base_model.training


def test_the_base_model_loads_and_saves_the_same_checkpoints(tmp_path):
    model = tiny_model()
    batch = tiny_processor(model)(images=noise_images(1), text="what is it?")
    model.save_pretrained(tmp_path / "a")
    base_model, info = EVLGenModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(base_model(**batch).last_hidden_state, model.base_model(**batch).last_hidden_state)
    base_model.save_pretrained(tmp_path / "b")
    again = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert {name.split(".")[0] for name, p in again.train().named_parameters() if p.requires_grad} == TRAINED
    assert not again.language_model.training and not again.vision_tower.training and again.connector.training


@pytest.mark.parametrize(
    ("inputs", "warned"),
    [({"suffix": CAPTIONS}, False), ({"text": CAPTIONS}, True)],
    ids=["prompt and caption", "caption as the prompt"],
)
def test_captions_without_an_end_are_warned_of_once(inputs, warned, caplog):
    model = tiny_model().train()
    batch = tiny_processor(model)(images=noise_images(2), **inputs)
    for _ in range(2):
        model(**{"labels": batch["input_ids"], **batch})
    assert caplog.text.count("so the model does not learn to stop") == warned


@pytest.mark.parametrize("parts", [None, ["connector"]])
def test_an_adapter_that_freezes_all_but_the_towers_is_warned_of(parts, caplog):
    transformers.logging.warning_once.cache_clear()
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=parts))
    for _ in range(2):
        adapted.train()
    frozen = "frozen: ln_vision, vision_projection, connector, language_projection"
    assert caplog.text.count(frozen) == (parts is None)


def test_the_towers_stay_bit_identical_and_in_evaluation_mode():
    tower, language_model = tiny_towers("dinov2", "opt")
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in (tower, language_model)]
    model = join(tower, language_model, connector_config={**LAYERS, "merge_r": 3})
    connector_before = {k: v.clone() for k, v in model.connector.state_dict().items()}
    batch = training_batch(tiny_processor(model))
    model.train()
    assert not any(module.training for part in (model.vision_tower, model.language_model) for module in part.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for part, state in zip((model.vision_tower, model.language_model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
    assert any(not torch.equal(v, connector_before[k]) for k, v in model.connector.state_dict().items())


def test_cached_features_replace_the_image():
    model = tiny_model("convnext", "qwen2")
    processor = tiny_processor(model)
    batch = training_batch(processor)
    features = model.get_vision_features(batch["pixel_values"])
    from_features = processor(vision_features=features, text=PROMPTS, suffix=CAPTIONS)
    torch.testing.assert_close(model(**from_features).loss, model(**batch).loss)
    prompt, prompt_features = processor(images=noise_images(2)), processor(vision_features=features)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), model.generate(**prompt_features, **settings))


@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.5}])
def test_a_batch_generates_what_its_members_generate_alone(text, settings):
    model = tiny_model("clip", text)
    processor = tiny_processor(model)

    def answer(images, prompts):
        new = generate_new(model, processor(images=images, text=prompts), **settings)
        return processor.batch_decode(new, skip_special_tokens=True)

    together = answer(noise_images(2), PROMPTS)
    alone = [words for image, prompt in zip(noise_images(2), PROMPTS, strict=True) for words in answer(image, prompt)]
    assert together == alone
    assert len(set(together)) > 1 and "<image>" not in "".join(together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "is not supported: it reads the prompt's ids"),
        ({"num_beams": 2.5}, "`num_beams` must be a whole number, 1 or more, but is 2.5"),
    ],
)
def test_options_of_generation_that_cannot_work_are_refused(settings, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.generate(**tiny_processor(model)(images=noise_images(1), text="what?"), **settings)


def test_the_image_is_encoded_once():
    model = tiny_model()
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**tiny_processor(model)(images=noise_images(2)), num_beams=3, max_new_tokens=5)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["clip", "siglip", "blip2"])
def test_the_vision_tower_of_a_whole_checkpoint_is_taken(family, tmp_path):
    vision = VISION_CONFIGS["eva" if family == "blip2" else family].to_dict()
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    qformer = {**text, "encoder_hidden_size": 16}
    opt = TEXT_CONFIGS["opt"].to_dict()
    model_class, config = {
        "clip": (transformers.CLIPModel, transformers.CLIPConfig(vision_config=vision, text_config=text)),
        "siglip": (transformers.SiglipModel, transformers.SiglipConfig(vision_config=vision, text_config=text)),
        "blip2": (
            transformers.Blip2ForConditionalGeneration,
            transformers.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=opt),
        ),
    }[family]
    whole = model_class(config)
    whole.save_pretrained(tmp_path / "vision")
    _, language_model = tiny_towers()
    language_model.save_pretrained(tmp_path / "text")
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "text", connector_config={**LAYERS, "merge_r": 2}
    )
    pixel_values = torch.randn(1, 3, 32, 32)
    expected = extract_vision_tokens(whole.eval().vision_model, pixel_values)
    torch.testing.assert_close(model.get_vision_features(pixel_values), expected)
    assert model.config.vision_model_name_or_path == str(tmp_path / "vision")


def test_the_connector_starts_from_bert(tmp_path):
    bert = BertModel(BertConfig(**LAYERS))
    bert.save_pretrained(tmp_path)
    model = join(*tiny_towers("siglip"), connector_model=tmp_path, connector_config={"merge_r": 2})
    weight = model.connector.encoder.layer[1].attention.self.query.weight
    assert torch.equal(weight, bert.encoder.layer[1].attention.self.query.weight)
    assert (model.config.connector_config.merge_r, model.config.connector_config.class_token) == (2, False)


@pytest.mark.parametrize("argument", ["vision_model", "text_model", "connector_model"])
def test_a_missing_base_model_is_named(argument, tmp_path):
    tower, language_model = tiny_towers()
    parts = {"vision_model": tower, "text_model": language_model, argument: str(tmp_path / "nowhere")}
    with pytest.raises(ValueError, match=f"`{argument}`='.*nowhere' cannot be loaded"):
        EVLGenForConditionalGeneration.from_vision_text_pretrained(**parts)


def test_dinov2_takes_images_of_another_size_than_it_was_trained_on():
    config = Dinov2Config(**{**VISION_CONFIGS["dinov2"].to_diff_dict(), "image_size": 518, "patch_size": 14})
    model = join(AutoModel.from_config(config), tiny_towers()[1], image_size=224)
    assert model.config.num_vision_tokens == 257
    assert model.get_vision_features(torch.zeros(1, 3, 224, 224)).shape == (1, 257, 16)
    assert EVLGenConfig.from_dict(model.config.to_dict()).num_vision_tokens == 257


def test_feature_maps_with_channels_last_become_tokens():
    arguments = {"features_only": True, "out_indices": [1], "img_size": 64}
    arguments |= {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}
    config = TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", model_args=arguments)
    tower = AutoModel.from_config(config).eval()
    tokens = extract_vision_tokens(tower, torch.randn(1, 3, 64, 64))
    shape = measure_vision_tower(config)
    assert tokens.shape[1:] == (shape.num_tokens, shape.hidden_size) == (64, 16)


def test_captions_are_greedy_even_if_the_language_model_samples_in_chats():
    tower, language_model = tiny_towers()
    language_model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model = join(tower, language_model)
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "holds 22 image placeholders, .* give 11 tokens"),
        ({"pixel_values": None}, "holds 22 image placeholders, but there are no images"),
        ({"pixel_values": torch.zeros(3, 32, 32)}, r"`pixel_values` must have shape \(images, "),
        ({"pixel_values": None, "vision_features": torch.zeros(2, 5, 16)}, r"`vision_features` .* \(images, 17, 16\)"),
        ({"vision_features": torch.zeros(2, 17, 16)}, "Only one of `pixel_values`, `vision_features`"),
        ({"input_ids": None}, "Exactly one of `input_ids` and `inputs_embeds`"),
        (
            {"input_ids": torch.ones(1, 129).long(), "pixel_values": None, "attention_mask": None},
            "`input_ids` has 129 tokens, .* places for 128",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_named(changes, message):
    model = tiny_model()
    batch = tiny_processor(model)(images=noise_images(2), text=PROMPTS)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(**{**batch, **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("vision", ["clip", "timm_cnn"])
def test_nothing_is_generated_from_values_that_are_not_finite(vision, value):
    model = tiny_model(vision, max_position_embeddings=512)
    processor = tiny_processor(model)
    images = processor(images=noise_images(2))
    videos = processor(videos=[noise_images(2), noise_images(2)])
    features = processor(vision_features=model.get_vision_features(images["pixel_values"]))
    for name, batch in {"pixel_values": images, "pixel_values_videos": videos, "vision_features": features}.items():
        batch[name][-1, ..., -1] = value
        with pytest.raises(ValueError, match=rf"`{name}` must be finite, but has NaN or infinity in entries \[1\]"):
            model.generate(**batch, max_new_tokens=3)


def test_nothing_is_generated_from_soft_prompts_that_are_not_finite():
    model = tiny_model()
    batch = tiny_processor(model)(images=noise_images(2))
    outputs = model.get_image_features(batch["pixel_values"])
    outputs.pooler_output[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"soft prompt must be finite, .* \[0\]"):
        model.generate(batch["input_ids"], mm_encoder_outputs={"image": outputs}, max_new_tokens=3)
    with torch.no_grad():
        model.language_projection.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"soft prompt must be finite, .* \[0, 1\]"):
        model.generate(**batch, max_new_tokens=3)


@pytest.mark.parametrize("vision", ["clip", "siglip", "eva", "timm_vit"])
def test_a_tower_of_fixed_size_refuses_another_size_by_name(vision):
    with pytest.raises(ValueError, match=r"`image_size`: .* does not take images of 64 x 64 pixels"):
        measure_vision_tower(tiny_towers(vision)[0].config, 64)


def test_images_and_videos_are_given_once():
    model = tiny_model()
    processor = tiny_processor(model)
    images = processor(images=noise_images(2), text=PROMPTS)
    videos = processor(videos=[noise_images(2), noise_images(2)], text=PROMPTS)
    features = model.get_vision_features(images["pixel_values"])
    encoded = model.project_vision_features(features)
    only_features = {"input_ids": images["input_ids"], "vision_features": features}
    for call in (model, partial(model.generate, max_new_tokens=3)):
        for inputs in (
            {**images, "vision_features": features},
            {**images, "mm_encoder_outputs": {"image": encoded}},
            {**only_features, "mm_encoder_outputs": {"image": encoded}},
            {**videos, "mm_encoder_outputs": {"video": encoded}},
        ):
            with pytest.raises(ValueError, match=r"Only one of `pixel_values.* and `mm_encoder_outputs`"):
                call(**inputs)
    mixed = processor(images=noise_images(1), videos=[noise_images(2)], text="<image><video>what?")
    given = {"video": model.get_video_features(mixed.pop("pixel_values_videos"), mixed.pop("frame_mask", None))}
    model.generate(**mixed, mm_encoder_outputs=given, max_new_tokens=3)
    assert given.keys() == {"video"}  # not changed


def test_towers_in_half_precision_leave_what_is_trained_in_float32(tmp_path):
    towers = save_towers(tmp_path)
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **towers, connector_config=LAYERS, dtype="bfloat16"
    )
    batch = training_batch(tiny_processor(model))
    model.save_pretrained(tmp_path / "model")
    weight = "connector.encoder.layer.0.output.dense.weight"
    for loaded in (
        model,
        EVLGenForConditionalGeneration.from_pretrained(tmp_path / "model"),
        EVLGenForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16),
    ):
        dtypes = {name: next(part.parameters()).dtype for name, part in loaded.named_children()}
        assert dtypes.pop("vision_tower") == dtypes.pop("language_model") == torch.bfloat16
        assert set(dtypes.values()) == {torch.float32}
        assert torch.equal(loaded.get_parameter(weight), model.get_parameter(weight))
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)


def test_towers_of_two_dtypes_are_refused():
    tower, language_model = tiny_towers()
    with pytest.raises(ValueError, match=r"`vision_model` is torch.float32, but `text_model` is torch.bfloat16"):
        EVLGenForConditionalGeneration.from_vision_text_pretrained(tower, language_model.to(torch.bfloat16))


def test_compiles_only_once_without_a_graph_break_and_states_it_to_transformers():
    model = tiny_model(pre_norm=True).eval()
    batch = dict(training_batch(tiny_processor(model)))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pixels in (batch["pixel_values"], batch["pixel_values"].flip(0)):
            batch["pixel_values"] = pixels
            torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert model._can_compile_fullgraph


def test_a_draft_model_that_sees_the_image_changes_no_caption():
    model, draft = tiny_model(), tiny_model()
    processor = tiny_processor(model)
    tiny_processor(draft)
    with torch.no_grad():
        for parameter in draft.language_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = processor(images=noise_images(1), text="what is it?")
    settings = {"do_sample": False, "max_new_tokens": 12}
    ids = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, assistant_model=draft), ids)


def test_embedded_placeholders_are_filled_in():
    model = tiny_model()
    processor = tiny_processor(model)
    inputs = processor(images=noise_images(2), text=["what is it?", "a"])
    model.config.image_token_id = 299
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, 299)
    rest = {"attention_mask": inputs["attention_mask"], "pixel_values": inputs["pixel_values"]}
    expected = model(input_ids=ids, **rest).logits
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, **rest).logits, expected)
    new = model.generate(inputs_embeds=embeds, **rest, do_sample=False, max_new_tokens=4)
    assert torch.equal(new, model.generate(ids, **rest, do_sample=False, max_new_tokens=4)[:, -4:])


def test_the_towers_hidden_states_are_given_on_request():
    model = tiny_model()
    pixels = torch.rand(2, 3, 32, 32)
    assert model.get_image_features(pixels).hidden_states is None
    states = model.get_image_features(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 3 and states[-1].shape == (2, 17, 16)
    video = model.get_video_features(pixels[None], output_hidden_states=True)
    torch.testing.assert_close(video.hidden_states, states)


def test_the_message_about_placeholders_is_the_one_that_a_page_explains():
    page = (ROOT / "docs" / "your_own_captioner.md").read_text(encoding="utf-8")
    model = tiny_model()
    batch = training_batch(tiny_processor(model))
    first = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[0]
    batch["input_ids"][0, first] = 5
    with pytest.raises(ValueError, match=re.escape(re.search(r'\*\*"(`input_ids` holds.*)"\*\*', page)[1])):
        model(**batch)


def test_the_loss_is_nan_where_no_token_is_a_target():
    model = tiny_model()
    batch = training_batch(tiny_processor(model))
    assert model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss.isnan()


@torch.no_grad()
def test_a_prompt_may_be_prefilled_in_chunks():
    model = tiny_model()
    batch = tiny_processor(model)(images=noise_images(2), text=PROMPTS)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**batch, prefill_chunk_size=8, **settings), model.generate(**batch, **settings))


@torch.no_grad()
def test_convolutions_run_channels_last_with_the_weights_as_they_are():
    """This made EfficientNet-Lite0 1.5 times as fast on a CPU."""
    (tower, _), formats = tiny_towers("timm_cnn"), []
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    extract_vision_tokens(tower, torch.randn(2, 3, 32, 32))
    assert len(formats) > 30 and all(formats)
    assert all(parameter.is_contiguous() for parameter in tower.parameters())
