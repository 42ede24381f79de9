"""modeling_evlgen/explanations.py: probabilities, evidence and maps of words are those of the model's own function."""

import itertools
import math

import pytest
import torch
from PIL import Image

from modeling_evlgen import explain
from modeling_evlgen.explanations import ExplainedWord, explain_sequences, find_words
from processing_evlgen.pipeline_evlgen import EVLGenImageToTextPipeline, EVLGenVideoToTextPipeline

from .helpers import LAYERS, merging_model, noise_images, tiny_model, tiny_processor

CONNECTORS = {
    "merging": {},
    "qformer": {**LAYERS, "model_type": "evlgen_qformer", "num_query_tokens": 4, "cross_attention_frequency": 1},
    "choosing": {
        **LAYERS,
        "model_type": "evlgen_qformer",
        "num_query_tokens": 4,
        "cross_attention_frequency": 1,
        "num_distinctive_tokens": 6,
    },
    "mlp": {"model_type": "evlgen_mlp", "pool_size": 2},
}
CAPTION = "a red circle, to the left"


def make(vision="siglip", text="llama", **connector):
    model = tiny_model(vision, text, **connector)
    return model, tiny_processor(model)


def log_probs(model, inputs):
    """The log-probability of each labelled token at each of their places, by a plain forward pass."""
    labels = inputs["labels"][0]
    logits = model(**{name: inputs[name] for name in inputs if name != "labels"}).logits[0, :-1].float()
    positions = (labels[1:] != -100).nonzero().flatten()[:-1]  # but for the end of the text
    return logits.log_softmax(-1)[positions][:, labels[1:][positions]]


def word_positions(processor, inputs):
    ids = inputs["labels"][0][inputs["labels"][0] != -100][:-1].tolist()
    return [positions for _, positions in find_words(processor.tokenizer, ids)]


def word_log_probs(model, processor, inputs):
    scores = log_probs(model, inputs).diagonal()
    return [scores[positions].sum().item() for positions in word_positions(processor, inputs)]


@pytest.mark.parametrize(
    ("connector", "text"), [*((name, "llama") for name in CONNECTORS), ("merging", "opt"), ("merging", "gpt2")]
)
def test_the_numbers_of_words_are_those_of_plain_forward_passes(connector, text):
    model, processor = make(text=text, **CONNECTORS[connector])
    (image,) = noise_images(1)
    words = explain(model, processor, image, caption=CAPTION)
    assert [word.word for word in words] == ["a", "red", "circle", "to", "the", "left"]
    inputs = processor(images=[image], suffix=[CAPTION])
    expected = word_log_probs(model, processor, inputs)
    assert [word.probability for word in words] == pytest.approx([math.exp(score) for score in expected], rel=1e-3)
    highest = log_probs(model, inputs).amax(dim=0).exp()
    confidences = [min(highest[position].item() for position in word) for word in word_positions(processor, inputs)]
    assert [word.confidence for word in words] == pytest.approx(confidences, rel=1e-3)
    assert any(word.confidence > 1.1 * word.probability for word in words)  # some are more probable elsewhere
    features = model.get_vision_features(inputs.pop("pixel_values"))
    median = features.median(dim=1, keepdim=True).values.expand_as(features)
    without = word_log_probs(model, processor, {**inputs, "vision_features": median})
    differences = [score - other for score, other in zip(expected, without, strict=True)]
    assert [word.evidence for word in words] == pytest.approx(differences, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("connector", ["qformer", "mlp"])
def test_maps_sum_to_the_evidence(connector):
    """With a connector that neither merges nor chooses, the more closely, the more steps are made."""
    model, processor = make(**CONNECTORS[connector])
    (image,) = noise_images(1)
    for steps, tolerance in ((5, 0.2), (100, 0.01)):
        for word in explain(model, processor, image, caption=CAPTION, steps=steps):
            assert word.map.shape == (4, 4)
            assert word.map.sum().item() == pytest.approx(word.evidence, abs=tolerance)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2", "convnext"])
def test_maps_have_a_value_for_each_patch_without_class_tokens(vision):
    model, processor = make(vision)
    words = explain(model, processor, noise_images(1)[0], caption=CAPTION)
    side = {"convnext": 2}.get(vision, 4)
    assert {word.map.shape for word in words} == {(side, side)}
    assert all(word.map.dtype == torch.float32 and word.map.isfinite().all() for word in words)


def test_tiles_make_one_map_in_the_order_of_the_image():
    """With one step, each value is the gradient half-way times the change, at its patch of its tile."""
    model, processor = make(**CONNECTORS["qformer"], max_position_embeddings=80)
    processor.max_tiles = 4
    image = noise_images(1)[0].resize((64, 64))
    (word,) = explain(model, processor, image, caption="a", steps=1)
    inputs = processor(images=[image], suffix=["a"])
    grid, features = inputs.pop("image_grid_thw"), model.get_vision_features(inputs.pop("pixel_values"))
    assert grid.tolist() == [[1, 2, 2]] and features.shape[:2] == (4, 16)
    change = features - features.flatten(0, 1).median(dim=0).values
    halfway = (features - change / 2).requires_grad_()
    encoded = {"image": model.project_vision_features(halfway, grid)}
    score = log_probs(model, {**inputs, "mm_encoder_outputs": encoded})[0, 0]
    shares = (torch.autograd.grad(score, halfway)[0] * change).sum(dim=-1)  # (tiles, patches)
    for tile, patch in itertools.product(range(4), range(16)):
        row, column = 4 * (tile // 2) + patch // 4, 4 * (tile % 2) + patch % 4
        assert word.map[row, column].item() == pytest.approx(shares[tile, patch].item(), rel=1e-3, abs=1e-6)


def test_several_images_of_a_text_have_a_map_each():
    model, processor = make(**CONNECTORS["mlp"])
    text = "<image> and <image>:"
    (words,) = explain(model, processor, [noise_images(2)], text=[text], caption=[CAPTION], steps=50)
    for word in words:
        assert [map_.shape for map_ in word.maps] == [(4, 4), (4, 4)] and word.map is word.maps[0]
        assert sum(map_.sum().item() for map_ in word.maps) == pytest.approx(word.evidence, abs=0.02)


def video_model(mode):
    if mode == "merge":
        return merging_model("siglip", CONNECTORS["qformer"])
    config = {"temporal_contextualizer": True, "temporal_hidden_size": 16} if mode == "contextual" else {}
    model = tiny_model("siglip", config=config, **CONNECTORS["qformer"])
    for block in model.temporal or []:
        torch.nn.init.constant_(block.alpha, 0.5)
    return model


@pytest.mark.parametrize("mode", ["mean", "contextual", "merge"])
def test_videos_have_a_map_of_each_frame(mode):
    model = video_model(mode)
    words = explain(model, tiny_processor(model), video=[noise_images(4)], caption=CAPTION, steps=50)
    for word in words[0]:
        assert word.map.shape == (4, 4, 4) and 0 <= word.frame < 4
        assert word.map.sum().item() == pytest.approx(word.evidence, abs=0.02)


def same(words, others, **tolerance):
    assert [word.word for word in words] == [other.word for other in others]
    for name in ("probability", "confidence", "evidence"):
        values, expected = ([getattr(word, name) for word in given] for given in (words, others))
        assert values == pytest.approx(expected, **{"rel": 1e-3, "abs": 1e-3, **tolerance})
    for word, other in zip(words, others, strict=True):
        torch.testing.assert_close(word.maps, other.maps, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_a_batch_is_explained_as_its_entries(text, steps):
    """Prompts of different lengths, with generated and with given captions."""
    model, processor = make("clip", text)
    images, prompts, captions = noise_images(2), ["What?", "Question: what is it?"], ["a red circle", "a cat"]
    for given, settings in ((None, {"do_sample": False, "max_new_tokens": 8}), (captions, {})):
        alone = [
            explain(model, processor, image, prompt, given and given[index], steps=steps, **settings)
            for index, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        batch = explain(model, processor, images, prompts, given, steps=steps, **settings)
        for words, expected in zip(batch, alone, strict=True):
            same(words, expected)


def test_generated_words_have_the_probabilities_of_their_steps():
    model, processor = make()
    inputs = processor(images=noise_images(1))
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=8, return_dict_in_generate=True, output_logits=True
    )
    (words,) = explain_sequences(model, processor, inputs, output.sequences, steps=0)
    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    steps = torch.stack(output.logits)[:, 0].log_softmax(-1)[torch.arange(len(ids)), ids]
    found = find_words(processor.tokenizer, ids.tolist())
    assert words and [word.word for word in words] == [word for word, _ in found]
    expected = [steps[positions].sum().exp().item() for _, positions in found]
    assert [word.probability for word in words] == pytest.approx(expected, rel=1e-3)
    assert all(word.maps == () for word in words)
    model.generation_config.return_dict_in_generate = True
    same(explain(model, processor, noise_images(1)[0], do_sample=False, max_new_tokens=8, steps=0), words)


def test_maps_of_a_model_with_random_weights_do_not_point_at_what_a_word_names():
    """The bar: of two patches that differ from the rest, the strongest is the word's own at most 70 % of times."""
    generator, named, other = torch.Generator().manual_seed(0), 0, 0
    for image in range(32):
        if image % 4 == 0:
            model, processor = make(seed=image, **CONNECTORS["qformer"])
        pixels = torch.full((32, 32, 3), 128, dtype=torch.uint8)
        places = torch.randperm(16, generator=generator)[:2].tolist()
        for place, color in zip(places, ([255, 0, 0], [0, 0, 255]), strict=True):
            row, column = 8 * (place // 4), 8 * (place % 4)
            pixels[row : row + 8, column : column + 8] = torch.tensor(color, dtype=torch.uint8)
        words = explain(model, processor, Image.fromarray(pixels.numpy()), caption="a red and a blue")
        for index, own, wrong in ((1, *places), (4, *reversed(places))):
            strongest = int(words[index].map.argmax())
            named, other = named + (strongest == own), other + (strongest == wrong)
    assert named + other >= 20 and named / (named + other) <= 0.7


def test_bfloat16_is_close_to_float32():
    model, processor = make()
    (image,) = noise_images(1)
    words = explain(model, processor, image, caption=CAPTION)
    others = explain(model.bfloat16(), processor, image, caption=CAPTION)
    for word, other in zip(words, others, strict=True):
        assert other.probability == pytest.approx(word.probability, rel=0.3)
        assert other.evidence == pytest.approx(word.evidence, abs=0.3)
        assert torch.nn.functional.cosine_similarity(word.map.flatten(), other.map.flatten(), dim=0) > 0.9


def test_explaining_leaves_no_gradient_and_works_where_none_is_kept():
    model, processor = make()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            words = explain(model, processor, noise_images(1)[0], caption=CAPTION)
        assert words and all(not word.map.requires_grad for word in words)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_words_have_their_tokens_but_no_punctuation():
    tokenizer = tiny_processor(tiny_model()).tokenizer
    ids = tokenizer("a t-shirt, (blue) ünï 🐌 it's.")["input_ids"]
    words = find_words(tokenizer, [*ids, tokenizer.eos_token_id])
    assert [word for word, _ in words] == ["a", "t-shirt", "blue", "ünï", "it's"]
    decoded = [tokenizer.decode([ids[position] for position in positions]).strip() for _, positions in words]
    assert decoded == ["a", "tshirt", "blue", "ünï", "its"]
    assert find_words(tokenizer, []) == []


def test_a_box_holds_the_strongest_patch_and_its_neighbours_of_half_its_value():
    values = torch.tensor([[0.0, 0.1, 0.9, 0.0], [0.0, 0.6, 1.0, 0.2], [0.0, 0.0, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0]])
    assert ExplainedWord("a", 1, 1, 1, (values,)).box == [0.25, 0, 0.75, 0.5]
    assert ExplainedWord("a", 1, 1, 1, (-1 - values,)).box == [0, 0, 1, 1]  # nothing speaks for the word
    video = ExplainedWord("a", 1, 1, 1, (torch.stack([0.5 * values, values.T]),))
    assert video.frame == 1 and video.box == [0, 0.25, 0.5, 0.75]


@pytest.mark.attack
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"caption": "a <image> b"}, "`caption`"),
        ({"caption": "a </s> b"}, "`caption`"),
        ({"caption": ""}, "`caption` must not be empty"),
        ({"caption": ["a", "b"]}, "`caption` has 2 entries"),
        ({"caption": 3}, "`caption`"),
        ({"image": noise_images(1), "caption": [["a", "b"]]}, "`caption` must be one text for each entry"),
        ({"num_image_tokens": 2}, r"nothing is generated, but .* \['num_image_tokens'\]"),
        ({"image": None}, "Exactly one of `image` and `video`"),
        ({"video": [[]]}, "Exactly one of `image` and `video`"),
        ({"steps": -1}, "`steps` must be"),
        ({"steps": 2.5}, "`steps` must be"),
        ({"image": [], "caption": None}, "at least one image"),
        ({"text": "<image><image>"}, "image"),
    ],
)
def test_bad_inputs_are_named(given, message):
    model, processor = make()
    given = {"image": noise_images(1)[0], "caption": CAPTION, **given}
    with pytest.raises((ValueError, TypeError), match=message):
        explain(model, processor, **given)


@pytest.mark.attack
def test_a_model_with_dropout_is_an_error():
    model, processor = make()
    with pytest.raises(ValueError, match="`model` must be in evaluation mode"):
        explain(model.train(), processor, noise_images(1)[0], caption=CAPTION)


@pytest.mark.attack
def test_an_image_without_a_placeholder_is_an_error():
    model, processor = make()
    inputs = processor(images=noise_images(1), suffix=[CAPTION])
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, 5)
    with pytest.raises(ValueError, match="placeholder"):
        explain_sequences(model, processor, inputs, None)


@pytest.mark.attack
@pytest.mark.parametrize("part", ["whole", "layers"])
def test_a_language_model_without_gradients_is_an_error(part):
    """Quantised kernels for inference alone cut the gradient: everywhere, or in each linear map."""
    model, processor = make()
    modules = [model.language_model.model]
    if part == "layers":
        modules = [module for module in model.language_model.model.modules() if isinstance(module, torch.nn.Linear)]
    for module in modules:
        module.forward = torch.no_grad()(module.forward)
    words = explain(model, processor, noise_images(1)[0], caption=CAPTION, steps=0)
    assert words[0].evidence  # needs no gradient
    with pytest.raises(ValueError, match="must pass gradients"):
        explain(model, processor, noise_images(1)[0], caption=CAPTION)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_returns_words(batch_size):
    model, processor = make()
    captioner = EVLGenImageToTextPipeline(model=model, processor=processor)
    options = {"batch_size": batch_size, "max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    plain = captioner(noise_images(3), **options)
    results = captioner(noise_images(3), return_words=True, **options)
    assert [[{"generated_text": entry["generated_text"]} for entry in row] for row in results] == plain
    for image, row in zip(noise_images(3), results, strict=True):
        for entry in row:
            expected = explain(model, processor, image, caption=entry["generated_text"])
            assert [word["word"] for word in entry["words"]] == [word.word for word in expected]
            for word in entry["words"]:
                assert word.keys() == {"word", "probability", "confidence", "evidence", "box", "frame"}


def test_the_pipeline_of_videos_returns_the_frame_of_each_word():
    model = video_model("merge")
    captioner = EVLGenVideoToTextPipeline(model=model, processor=tiny_processor(model))
    ((entry,),) = captioner([{"video": noise_images(4)}], return_words=True, max_new_tokens=4)
    assert all(0 <= word["frame"] < 4 and len(word["box"]) == 4 for word in entry["words"])
