"""The processor as clients of others call it, such as vLLM and TRL: truncation, offsets, assistant masks, counts."""

import pytest
import torch

from processing_evlgen import EVLGenProcessor

from .helpers import TRAINING_TEMPLATE, noise_images, tiny_image_processor, tiny_tokenizer
from .test_processing import conversation, make_processor


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_follows_from_the_labels_and_not_from_the_tokenizers_file(side):
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs["padding_side"] = side  # as Llama's tokenizer_config.json has it
    processor = EVLGenProcessor(tiny_image_processor(), tokenizer, num_image_tokens=3)
    assert processor(images=noise_images(2), suffix=["a", "a blue triangle"])["attention_mask"][0, 0] == 1
    assert processor(images=noise_images(2), text=["a", "a blue triangle"])["attention_mask"][0, -1] == 1


def test_truncation_cuts_text_and_changes_nothing_where_the_text_fits():
    processor = make_processor()
    inputs = {"images": noise_images(2), "text": ["<image>a", "<image>a blue triangle to the left"]}
    whole = processor(**inputs)
    fits = processor(**inputs, truncation=True, max_length=100)
    assert fits.keys() == whole.keys() and all(torch.equal(fits[name], whole[name]) for name in whole)
    cut = processor(**inputs, truncation=True, max_length=5)
    assert cut["input_ids"].tolist()[1] == whole["input_ids"][1, :5].tolist()
    labelled = processor(images=noise_images(1), suffix="a blue triangle", truncation=True, max_length=5)
    assert labelled["input_ids"].shape == labelled["labels"].shape == (1, 5)
    assert labelled["labels"][0, 3:].tolist() == labelled["input_ids"][0, 3:].tolist()


def test_truncation_cuts_on_the_tokenizers_side():
    processor = make_processor()
    whole = processor(text="a blue triangle")["input_ids"][0].tolist()
    processor.tokenizer.truncation_side = "left"
    assert processor(text="a blue triangle", truncation=True, max_length=3)["input_ids"].tolist() == [whole[-3:]]
    with pytest.raises(ValueError, match="`truncation` to 3 would cut placeholders"):
        processor(images=noise_images(1), text="a blue triangle", truncation=True, max_length=3)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_offsets_point_into_the_text_with_repeated_placeholders(padding_side):
    """As in transformers' own processors."""
    processor = make_processor(bos=True, image_token_range=[1, 9])
    texts = ["<image>left <video>right", "a <image>b<image> blue triangle"]
    inputs = {"images": noise_images(3), "videos": noise_images(2), "text": texts, "num_image_tokens": [1, 2, 3, 4]}
    inputs |= {"padding_side": padding_side, "return_offsets_mapping": True}
    batch = processor(**inputs, return_text_replacement_offsets=True)
    expanded = ["<image>left " + "<video>" * 4 + "right", "a <image><image>b<image><image><image> blue triangle"]
    for text, ids, spans in zip(expanded, batch["input_ids"], batch["offset_mapping"], strict=True):
        for token_id, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True):
            token = processor.tokenizer.decode([token_id])
            assert text[start:end] == ("" if token in ("<pad>", "<s>") else token)
    assert torch.equal(processor(**inputs)["offset_mapping"], batch["offset_mapping"])
    (image, video), images = batch["text_replacement_offsets"]
    assert (image["type"], image["span"], image["replacement"]) == ("image", (0, 7), "<image>")
    assert (video["type"], video["span"], video["new_span"]) == ("video", (12, 19), (12, 40))
    assert [row["replacement"] for row in images] == ["<image>" * 2, "<image>" * 3]
    assert [int(budget) for budget in batch["image_budgets"]] == [1, 2, 3]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_assistant_mask_covers_the_assistants_turns(padding_side):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TRAINING_TEMPLATE
    processor = EVLGenProcessor(tiny_image_processor(), tokenizer, num_image_tokens=3, end_of_text="<|im_end|>")
    first, second, third = noise_images(3)
    asked = [{"type": "image", "image": first}, {"type": "text", "text": "a?"}, {"type": "image", "image": second}]
    long = conversation(asked, "a cat", [{"type": "image", "image": third}], "red")
    short = conversation([{"type": "text", "text": "what?"}], "a blue circle")
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    settings["processor_kwargs"] = {"padding_side": padding_side}
    batch = processor.apply_chat_template([long, short], **settings)
    rows = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    texts = [processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]
    assert texts == ["a cat<|im_end|>red<|im_end|>", "a blue circle<|im_end|>"]
    assert "offset_mapping" not in batch and "text_replacement_offsets" not in batch


def test_placeholders_are_counted_without_images_as_with_them():
    processor = make_processor()
    count, sizes = processor._get_num_multimodal_tokens, [(64, 64), (16, 16)]
    counts = count(image_sizes=sizes, video_sizes=[(2, 40, 40)])
    assert (counts["num_image_tokens"], counts["num_image_patches"]) == ([3, 3], [1, 1])
    assert counts["num_video_tokens"] == [3]
    assert count(image_sizes=[(40, 40)])["num_video_tokens"] is None
    assert count(image_sizes=[], do_resize=True)["num_image_tokens"] == []
    counts = count(image_sizes=sizes, max_tiles=4, num_image_tokens=5)
    assert (counts["num_image_tokens"], counts["num_image_patches"]) == ([5, 5], [4, 1])
    media = {"images": noise_images(1), "videos": [noise_images(2)], "text": ["<image>a", "<video>"]}
    batch = processor(**media, return_mm_token_type_ids=True)
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 1, 0], [0, 2, 2, 2]]


def test_the_video_processor_tells_vllm_what_it_needs():
    processor = make_processor()
    videos = processor.video_processor
    batch = processor(videos=[noise_images(3), noise_images(2)], num_image_tokens=[2, 3])
    assert set(videos.model_input_names) == batch.keys() - {"input_ids", "attention_mask"}
    assert videos.do_sample_frames  # else vLLM gives no times
    assert set(videos.valid_kwargs.__annotations__) > {"num_frames", "frame_sampling", "max_pixels"}
