"""A batch generates for each of its rows what the row generates alone, in all modes."""

import pytest
import torch

from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import (
    TEXT_CONFIGS,
    generate_new,
    merging_model,
    noise_images,
    tiny_image_processor,
    tiny_model,
    tiny_tokenizer,
)

TEMPORAL = {"temporal_contextualizer": True, "temporal_hidden_size": 8, "temporal_num_attention_heads": 2}
TEXTS = ["what is it?", "a", "Question: what do you see to the left of it? Short answer:"]
COUNTS = (2, 1, 3)  # of images or frames in each row
SIZES = ((32, 32), (64, 64), (64, 32))
KINDS = ["images", "tiles", "budgets", "several images", "conversations"]
KINDS += ["videos", "contextualized videos", "merged videos"]


def build(kind, vision="clip", text="llama"):
    """A model whose words depend on what it sees, and its processor."""
    if kind == "merged videos":
        model = merging_model(vision)
    else:
        model = tiny_model(vision, text, config=TEMPORAL if kind == "contextualized videos" else {})
    for contextualizer in model.temporal or ():
        torch.nn.init.constant_(contextualizer.alpha, 0.5)
    if kind == "budgets":
        model.config.image_token_range = [2, model.config.num_vision_tokens]
    settings = {"image_token_range": model.config.image_token_range, "max_tiles": 4 if kind == "tiles" else 1}
    tokenizer = tiny_tokenizer(chat=kind == "conversations")
    return model, EVLGenProcessor(
        tiny_image_processor(), tokenizer, num_image_tokens=model.config.num_image_tokens, **settings
    )


def rows_of(kind, processor):
    """Arguments of the processor for each of three rows, which differ in length."""
    images = noise_images(3)
    if "videos" in kind:
        return [{"videos": [images[:count]], "text": [text]} for count, text in zip(COUNTS, TEXTS, strict=True)]
    groups, texts, settings = [[image] for image in images], TEXTS, [{}] * 3
    if kind == "tiles":
        groups = [[image.resize(size)] for image, size in zip(images, SIZES, strict=True)]
    elif kind == "budgets":
        settings = [{"num_image_tokens": [budget]} for budget in (2, 9, processor.image_token_range[1])]
    elif kind == "several images":
        groups = [images[:count] for count in COUNTS]
        texts = ["<image>" * count + text for count, text in zip(COUNTS, TEXTS, strict=True)]
    elif kind == "conversations":
        groups = [images[:count] for count in COUNTS]
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
        talks = [[question, answer] * (count - 1) + [question] for count in COUNTS]
        texts = processor.apply_chat_template(talks, add_generation_prompt=True)
    rows = zip(groups, texts, settings, strict=True)
    return [{"images": [group], "text": [text], **given} for group, text, given in rows]


def join_rows(rows):
    return {name: [value for row in rows for value in row[name]] for name in rows[0]}


def compare(model, processor, rows, **settings):
    """The words of each row of a batch, and those of the row alone."""

    def answer(inputs):
        return processor.batch_decode(generate_new(model, processor(**inputs), **settings), skip_special_tokens=True)

    return answer(join_rows(rows)), [words for row in rows for words in answer(row)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("is_fresh", "attention"), [(True, "sdpa"), (False, "eager")], ids=["fresh", "loaded"])
def test_a_batch_generates_what_its_rows_generate_alone(kind, is_fresh, attention, tmp_path):
    model, processor = build(kind, text=[*TEXT_CONFIGS][KINDS.index(kind) % len(TEXT_CONFIGS)])
    if not is_fresh:
        model.save_pretrained(tmp_path)
        model = EVLGenForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    rows = rows_of(kind, processor)
    assert len(set(processor(**join_rows(rows))["attention_mask"].sum(dim=1).tolist())) == 3  # padded
    static = {"cache_implementation": "static"}
    for settings in ({}, static, {**static, "num_beams": 2}):
        together, alone = compare(model, processor, rows, **settings)
        assert together == alone, settings
        assert len(set(together)) > 1


@pytest.mark.parametrize("kind", ["images", "merged videos"])
def test_a_compiled_model_with_a_static_cache_generates_the_same(kind, monkeypatch):
    model, processor = build(kind)
    inputs = processor(**join_rows(rows_of(kind, processor)))
    expected = generate_new(model, inputs)
    torch.compiler.reset()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"))
    assert torch.equal(generate_new(model, inputs, cache_implementation="static"), expected)
