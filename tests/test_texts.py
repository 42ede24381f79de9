"""Several texts of one image in one row: the loss and the gradients are those of a row for each text."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, MistralConfig, Qwen2Config
from transformers.utils import logging

from modeling_evlgen import limit_logits

from .helpers import TEXT_SIZES, join, noise_images, tiny_model, tiny_processor, tiny_towers

SUFFIX = [
    ["a red circle", "a blue triangle to the left of a green square", "a cat"],
    ["a dog"],
    ["red", "green square"],
]
TEXT = [["Question: what is it? Short answer:", "Question: where is it?", "what"], ["who"], ["what?", "what is a cat"]]
WINDOW = 30  # tokens: fewer than a row has, and at the end of the longest text fewer than image and text
SIZES = {**TEXT_SIZES, "intermediate_size": 64, "num_key_value_heads": 1, "sliding_window": WINDOW}
MORE_MODELS = {
    "mistral": MistralConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "qwen2 of two kinds of layers": Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1),
    "bloom": BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0, eos_token_id=2),
}


def build(name: str, attention: str = "eager", chat: bool = False):
    """A model without dropout, and its processor."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name in MORE_MODELS:
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_config(MORE_MODELS[name])
        for parameter in language_model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = join(tiny_towers()[0], language_model, connector_config={**sizes, "merge_r": 3, **no_dropout})
    else:
        model = tiny_model(text=name, **no_dropout)
    model.language_model.set_attn_implementation(attention)
    processor = tiny_processor(model, bos=name in ("opt", "llama"), chat=chat)
    processor.bos_label = name == "opt"
    return model.train(), processor


def flatten(rows: list[list]) -> list:
    return [entry for row in rows for entry in row]


def encode_both(processor, text=None, **inputs):
    """The batch of a row for each image, and that of a row for each text."""
    shared = processor(suffix=SUFFIX, text=text, **inputs)
    repeated = {
        name: flatten([[item] * len(row) for item, row in zip(items, SUFFIX, strict=True)])
        for name, items in inputs.items()
    }
    separate = processor(suffix=flatten(SUFFIX), text=text if text is None else flatten(text), **repeated)
    assert len(shared["input_ids"]) == len(SUFFIX) and shared["input_ids"].numel() < separate["input_ids"].numel()
    return shared, separate


def loss_and_gradient(model, batch, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, **arguments).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal(results, expected, tolerance: float = 1e-5) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert wanted.norm() > 0
        assert (result - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2", "gpt2", *MORE_MODELS])
def test_loss_and_gradients_are_those_of_separate_rows(name, attention):
    if attention == "sdpa" and name in ("gemma2", "bloom"):
        pytest.skip("transformers has no sdpa attention for this model")
    for chat, text in ((False, None), (False, TEXT), (True, TEXT)):
        model, processor = build(name, attention, chat)
        shared, separate = encode_both(processor, text, images=noise_images(3))
        expected = loss_and_gradient(model, separate)
        assert_equal(loss_and_gradient(model, shared), expected)
        assert_equal(loss_and_gradient(model, limit_logits(shared)), expected)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradients_stay_under_checkpointing_lora_accumulation_and_left_padding(name):
    model, processor = build(name, "sdpa")
    inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), model.language_model
    )
    shared, separate = encode_both(processor, images=noise_images(3))
    expected = loss_and_gradient(model, separate, num_items_in_batch=7)
    assert_equal(loss_and_gradient(model, limit_logits(shared), num_items_in_batch=7), expected)
    left = processor(images=noise_images(3), suffix=SUFFIX, padding_side="left", pad_to_multiple_of=64)
    assert_equal(loss_and_gradient(model, left, num_items_in_batch=7), expected)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(loss_and_gradient(model, shared, num_items_in_batch=7), expected)


def test_bfloat16_gives_the_same_to_its_precision():
    model, processor = build("llama", "sdpa")
    shared, separate = encode_both(processor, images=noise_images(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(loss_and_gradient(model, shared), loss_and_gradient(model, separate), 2e-2)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch about its own call
def test_flex_attention_takes_the_mask_too():
    model, processor = build("mistral", "sdpa")
    shared, separate = encode_both(processor, images=noise_images(3))
    expected = model(**separate).loss
    model.language_model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # its backward pass needs a GPU
        torch.testing.assert_close(model(**shared).loss, expected, rtol=1e-5, atol=0)


def test_a_kernel_without_masks_gets_a_row_for_each_text_and_says_so_once(monkeypatch, caplog):
    model, processor = build("llama", "sdpa")
    shared, separate = encode_both(processor, images=noise_images(3))
    expected = loss_and_gradient(model, separate)
    monkeypatch.setattr("modeling_evlgen.texts._MASKED_ATTENTION", ("eager",))
    logging.warning_once.cache_clear()
    logging.enable_propagation()
    encoded = []
    model.connector.register_forward_hook(lambda module, inputs, output: encoded.append(len(output.last_hidden_state)))
    assert_equal(loss_and_gradient(model, limit_logits(shared)), expected)
    assert_equal(loss_and_gradient(model, shared), expected)
    assert encoded == [3, 3]  # once for each image
    assert caplog.text.count("cannot share its prefix: attention 'sdpa' takes no such mask") == 1


def test_a_list_for_each_image_makes_one_row_of_prefix_and_texts():
    _, processor = build("llama", chat=True)
    text = [["what is red?", "what is a cat?"], ["where?"]]
    batch = processor(images=noise_images(2), text=text, suffix=[["a cat", "a dog"], ["left"]])
    first = batch["segment_ids"][0]
    assert first.unique_consecutive().tolist() == [0, 1, 2] and batch["segment_ids"][1].min() == -1
    decode = processor.tokenizer.decode
    prefix, answer = decode(batch["input_ids"][0][first == 0]), decode(batch["input_ids"][0][first == 2])
    assert prefix.startswith("<s><|im_start|>user\n<image>") and prefix.endswith("<image>what is")
    assert answer.startswith(" a cat?<|im_end|>") and answer.endswith("assistant\na dog</s>")
    assert processor(images=noise_images(2), suffix=[["a"] * 9, ["b"]], padding="max_length", max_length=32)
    assert decode(batch["labels"][0][(first == 2) & (batch["labels"][0] != -100)]) == "a dog</s>"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"suffix": [["a"], []]}, r"`suffix` must hold a list of texts for each image, but entry 1 is \[\]"),
        ({"suffix": [["a"], [3]]}, "`suffix` must be a string or a list of strings, but holds a int"),
        ({"suffix": [["a"]]}, "`suffix` holds 1 lists, but there are 2 images or videos"),
        ({"suffix": [["a", "b"], ["c"]], "text": [["q"], ["r"]]}, r"`suffix` holds \[2, 1\] texts .* \[1, 1\]"),
        ({"suffix": [["a", "b"], ["c"]], "text": [["<image>q", "r"], ["<image>"]]}, "`text`: .* placeholders"),
        ({"suffix": [["a", "b"], ["c"]], "text": [["<image>q", "r<image>"], ["<image>"]]}, "must be alike up to"),
        ({"suffix": [["a", "b " * 200], ["c"]]}, "`text` entry 1 has .* tokens, but at most 128 are allowed"),
        ({"suffix": [["a"], ["b"]], "images": None, "text": ["q", "r"]}, "needs images or videos"),
    ],
)
def test_lists_that_do_not_fit_are_named(inputs, message):
    _, processor = build("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        processor(**{"images": noise_images(2), **inputs})


def test_segment_ids_are_for_training_and_fit_their_ids():
    model, processor = build("llama")
    batch = processor(images=noise_images(1), suffix=[["a", "b"]])
    with pytest.raises(ValueError, match="`segment_ids` are for training"):
        model.generate(**{name: value for name, value in batch.items() if name != "labels"})
    with pytest.raises(ValueError, match=r"`segment_ids` must have shape \(1, "):
        model(**{**batch, "segment_ids": batch["segment_ids"][:, 1:]})
    with pytest.raises(ValueError, match="`segment_ids` must be -1 where `attention_mask` is 0"):
        model(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    with pytest.raises(ValueError, match=r"`segment_ids` must number the texts .* but have \[0\] texts"):
        model(**{**batch, "segment_ids": torch.zeros_like(batch["segment_ids"])})
    for kept in (1, torch.tensor([0])):
        with pytest.raises(ValueError, match="`logits_to_keep` must be 0 or a mask"):
            model(**batch, logits_to_keep=kept)


@pytest.mark.parametrize("media", ["tiles", "videos"])
def test_other_media_share_their_prefix_too(media):
    model, processor = build("llama")
    model.config.image_token_range = processor.image_token_range = [2, 17]
    images = [*noise_images(2, 40), noise_images(1, 90)[0].resize((90, 40))]
    inputs = {"images": images} if media == "tiles" else {"videos": [images[:1] * 4, [*images] * 2, images[1:] * 3]}
    processor.max_tiles = 4
    repeated = {
        name: flatten([[item] * len(row) for item, row in zip(items, SUFFIX, strict=True)])
        for name, items in inputs.items()
    }
    shared = processor(**inputs, suffix=SUFFIX, num_image_tokens=[2, 3, 4])
    separate = processor(**repeated, suffix=flatten(SUFFIX), num_image_tokens=[2, 2, 2, 3, 4, 4])
    assert_equal(loss_and_gradient(model, shared), loss_and_gradient(model, separate))


def test_several_images_in_each_text_share_their_prefix_too():
    model, processor = build("opt")
    first, second, third = noise_images(3)
    text = [["<image> and <image> differ:", "<image> and <image> are:"], ["<image> is:"]]
    shared = processor(images=[[first, second], [third]], text=text, suffix=[["yes", "red"], ["a cat"]])
    images = [[first, second], [first, second], [third]]
    separate = processor(images=images, text=flatten(text), suffix=["yes", "red", "a cat"])
    assert_equal(loss_and_gradient(model, shared), loss_and_gradient(model, separate))
