"""The processor: positions of images, labels, images of every type, and errors that name their cause."""

import copy
import pickle
import re

import pytest
import torch
from transformers import AutoProcessor

from processing_evlgen import EVLGenImageToTextPipeline, EVLGenProcessor, clean_caption

from .helpers import noise_images, tiny_image_processor, tiny_model, tiny_processor, tiny_tokenizer

IMAGE, BOS, EOS = 300, 1, 2  # ids of the tiny tokenizer


def make_processor(bos=False, chat=False, num_image_tokens=3, **kwargs):
    kwargs["num_image_tokens"] = num_image_tokens
    return EVLGenProcessor(tiny_image_processor(), tiny_tokenizer(bos, chat), **kwargs)


def labelled_texts(batch, processor):
    """The text of each row that carries the loss."""
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_images_come_before_bos_in_a_plain_prompt():
    processor = make_processor(bos=True)
    for text in ("what is it?", "<image>what is it?"):
        ids = processor(images=noise_images(1), text=text)["input_ids"][0].tolist()
        assert ids[:4] == [IMAGE] * 3 + [BOS]
        assert ids[4:] == processor.tokenizer("what is it?", add_special_tokens=False)["input_ids"]


def test_images_stand_at_their_placeholders():
    processor = make_processor(bos=True)
    ids = processor(images=noise_images(2), text="left: <image> right: <image>")["input_ids"][0].tolist()
    assert ids[0] == BOS and ids.count(IMAGE) == 6
    assert processor.tokenizer.decode(ids[1:]).replace("<image><image><image>", "#") == "left: # right: #"


def test_apply_chat_template_reads_images_and_text():
    processor = make_processor(chat=True)
    question = [{"type": "image", "image": noise_images(1)[0]}, {"type": "text", "text": "what?"}]
    messages = conversation(question, [{"type": "text", "text": "a cat"}])
    text = processor.apply_chat_template(messages)
    assert text == "<|im_start|>user\n<image>what?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    batch = processor.apply_chat_template(messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True)
    direct = processor(images=noise_images(1), text="what?")
    expected = "<|im_start|>user\n<image><image><image>what?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(direct["input_ids"][0]) == expected
    assert torch.equal(batch["input_ids"], direct["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], direct["pixel_values"])


def conversation(*turns):
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]


def test_a_conversation_is_trained_on_the_assistants_turns():
    processor = make_processor(chat=True, end_of_text="<|im_end|>")
    question = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    long = conversation(question, "a cat", "what color?", [{"type": "text", "text": "red"}])
    short = conversation([{"type": "image", "text": None}], "a blue circle")
    batch = processor(images=noise_images(2), messages=[long, short])
    assert labelled_texts(batch, processor) == ["a cat<|im_end|>red<|im_end|>", "a blue circle<|im_end|>"]
    whole = processor.tokenizer.decode(batch["input_ids"][0]).replace("<image><image><image>", "<image>")
    assert processor.apply_chat_template(long).startswith(whole)
    # Up to each answer the ids are those that generation starts from.
    for turns in (1, 3):
        text = processor.apply_chat_template(long[:turns], add_generation_prompt=True)
        ids = processor(images=noise_images(1), text=text)["input_ids"][0]
        assert torch.equal(batch["input_ids"][0, : len(ids)], ids)
    one_turn = processor(images=noise_images(1), text="what is it?", suffix="a cat")
    again = processor(images=noise_images(1), messages=[long[:2]])
    assert all(torch.equal(again[name], one_turn[name]) for name in one_turn)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must end with a turn of the assistant"),
        (conversation("what is it?", " "), "entry 1 is an empty turn of the assistant"),
        (conversation("what?", [{"type": "image"}]), "entry 1 is the assistant's and must be text"),
        ([{"role": "robot", "content": "hello"}], "a `role` of system, .* entry 0 is"),
        (conversation("what?", "a", "and?", "b"), "`messages` holds 0 <image> placeholders, but `images` holds 1"),
        (conversation([{"type": "image_url", "image_url": "a.png"}], "a"), r"entry 0 must hold parts .* 'image_url'"),
        (conversation(None, "a"), "entry 0 must have .* `content`, but has None"),
        (conversation("<image>what?", "an <image>"), "must not hold the placeholder <image> in a turn"),
        ({"role": ["user"], "content": ["what?"]}, "`messages` must be a list of turns"),
    ],
)
def test_a_bad_conversation_is_named(messages, message):
    processor = make_processor(chat=True, end_of_text="<|im_end|>")
    with pytest.raises(ValueError, match=message):
        processor(images=noise_images(1), messages=[messages])


def test_a_system_turn_is_read_and_not_learned():
    processor = make_processor(chat=True, end_of_text="<|im_end|>")
    turns = [{"role": "system", "content": "be brief"}, *conversation("what is it?<image>", "a cat")]
    batch = processor(images=noise_images(1), messages=[turns])
    assert labelled_texts(batch, processor) == ["a cat<|im_end|>"]
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is it?<image><image>")


def test_a_template_that_cannot_train_conversations_is_refused():
    turns = conversation("what?", "a", "and?", "b")
    with pytest.raises(ValueError, match="Conversations need a chat template"):
        make_processor()(messages=[turns])
    with pytest.raises(ValueError, match="followed by `end_of_text`"):
        make_processor(chat=True)(messages=[turns])  # its turns end in <|im_end|>, not in </s>
    with pytest.raises(ValueError, match="`messages` is given instead of `suffix` and `text`"):
        make_processor(chat=True)(messages=[turns], text="what?")


@pytest.mark.parametrize("chat", [False, True])
def test_labels_are_the_caption_and_its_end(chat):
    processor = make_processor(bos=not chat, chat=chat)
    batch = processor(images=noise_images(2), text="what?", suffix=["a cat", "a blue triangle"])
    space = "" if chat else " "
    assert labelled_texts(batch, processor) == [f"{space}a cat</s>", f"{space}a blue triangle</s>"]
    assert batch["attention_mask"][0, -1] == 0  # padded on the right
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_padding_that_equals_eos_is_masked_and_the_end_is_not():
    processor = make_processor()
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    batch = processor(images=noise_images(2), suffix=["a", "a blue triangle to the left"])
    assert labelled_texts(batch, processor)[0] == "a</s>"
    assert (batch["input_ids"][0] == EOS).sum() > 1


def test_opt_recipe_labels_bos_and_ends_with_a_newline():
    processor = make_processor(bos=True, bos_label=True, end_of_text="\n", clean_captions=True)
    batch = processor(images=noise_images(1), suffix='A "Cat" (small).')
    assert labelled_texts(batch, processor) == ["<s>a cat small\n"]
    assert processor.end_of_text_id == processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    with pytest.raises(ValueError, match="`end_of_text` must be one token, but ' the end' is"):
        make_processor(end_of_text=" the end")(images=noise_images(1), suffix="a cat")
    prompted = processor(images=noise_images(1), text="what?", suffix="a cat")
    assert labelled_texts(prompted, processor) == [" a cat\n"]  # a prompt carries no loss, nor does its BOS


def test_padding_arguments_work_as_in_a_tokenizer():
    processor = make_processor()
    inputs = {"images": noise_images(2), "suffix": ["a", "a blue triangle"]}
    longest = processor(**inputs)
    assert processor(**inputs, pad_to_multiple_of=16)["labels"].shape[1] % 16 == 0
    assert processor(**inputs, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)
    rows = processor(**inputs, padding=False, return_tensors=None)
    for index in range(2):
        real = longest["attention_mask"][index].bool()
        assert rows["input_ids"][index] == longest["input_ids"][index][real].tolist()
        assert rows["labels"][index] == longest["labels"][index][real].tolist()
    left = processor(**inputs, padding_side="left")
    words = left["attention_mask"].bool() & (left["input_ids"] != IMAGE)
    assert left["attention_mask"][0, 0] == 0 and torch.equal(left["labels"] != -100, words)


@pytest.mark.parametrize(
    ("argument", "values", "wanted"),
    [
        ("pad_to_multiple_of", (0, 2.5, True), "an integer of 1 or more"),
        ("max_pixels", (0,), "an integer of 1 or more"),
        ("truncation", ("foo", 3), "True or False"),
        ("max_length", (0, -3, "a"), "an integer of 1 or more"),
        ("padding_side", ("up", 3), "left or right"),
    ],
)
def test_bad_padding_arguments_are_named(argument, values, wanted):
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}` must be {wanted}, but is {value!r}"):
            make_processor()(images=noise_images(1), **{argument: value})


@pytest.mark.parametrize("template", [7, True, ["a"]])
def test_a_chat_template_that_is_no_text_is_named(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for parts in ((tiny_tokenizer(), template), (tokenizer, None)):
        with pytest.raises(TypeError, match=f"`chat_template` must be .*, but is {re.escape(repr(template))}"):
            EVLGenProcessor(tiny_image_processor(), parts[0], num_image_tokens=3, chat_template=parts[1])


def test_images_in_rows_must_fit_their_texts_and_conversations():
    image, other, third = noise_images(3)
    texts, processor = ["<image>", "<image><image>"], make_processor(chat=True, end_of_text="<|im_end|>")
    conversations = [conversation(text, "a") for text in texts]
    for given, name in (({"text": texts}, "text"), ({"messages": conversations}, "messages")):
        assert processor(images=[[image], [other, third]], **given)["pixel_values"].shape[0] == 3
        message = f"`{name}` entry 0 holds 1 <image> placeholders, but `images` entry 0 holds 2"
        with pytest.raises(ValueError, match=message):
            processor(images=[[image, other], [third]], **given)
    assert len(processor(images=[[image], []], messages=[conversations[0], conversation("what?", "b")])["labels"]) == 2


def test_one_prompt_serves_all_images_and_no_prompt_is_an_empty_one():
    processor = make_processor()
    shared = processor(images=noise_images(3), text="what?")
    assert shared["input_ids"].shape[0] == 3 and shared["pixel_values"].shape == (3, 3, 32, 32)
    assert processor(images=noise_images(1))["input_ids"].tolist() == [[IMAGE] * 3]
    assert "pixel_values" not in processor(text="only words")


def test_captions_are_cleaned_as_in_the_original():
    assert clean_caption('  A  "Dog" (on) #grass;: runs!~*.') == "a dog on grass runs"
    assert clean_caption("what? it's well-known, yes") == "what? it's well-known, yes"
    assert clean_caption(" ".join(map(str, range(60)))) == " ".join(map(str, range(50)))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"images": 2, "text": "<image> a"}, ValueError, "`text` holds 1 <image> placeholders, but `images` holds 2"),
        ({"images": 1, "text": ["a", "b"]}, ValueError, "`images` holds 1 images, but `text` holds 2 prompts"),
        ({"images": 1, "suffix": "  "}, ValueError, "`suffix` must not be empty, but entry 0 is '  '"),
        ({"images": 2, "suffix": ["a"]}, ValueError, "`suffix` has 1 entries, but there are 2 prompts"),
        ({"images": 0}, ValueError, "Without a `text`, at least one image or video is needed"),
        ({"images": 1, "suffix": "a " * 200}, ValueError, "`text` entry 0 has .* tokens, but at most 128"),
        ({"images": 1, "text": ["a", 7]}, TypeError, "`text` must be .* holds a int"),
        ({"images": 1, "suffix": "a <image> b"}, ValueError, "`suffix` entry 0 must not hold '<image>'"),
        ({"images": 1, "text": "a", "truncation": True, "max_length": 2}, ValueError, "`truncation` to 2 would cut"),
        ({"images": 1, "suffix": "a", "return_offsets_mapping": True}, ValueError, "`return_offsets_mapping`"),
        ({"messages": []}, ValueError, "`messages` is an empty list"),
        ({}, ValueError, "At least one of `images`, "),
    ],
)
def test_bad_input_is_named(inputs, error, message):
    if "images" in inputs:
        inputs = {**inputs, "images": noise_images(inputs["images"])}
    with pytest.raises(error, match=message):
        make_processor()(**inputs)


def test_a_pipeline_without_images_returns_nothing_and_names_none():
    model = tiny_model()
    captioner = EVLGenImageToTextPipeline(model, processor=tiny_processor(model))
    assert captioner([]) == []
    for images in (None, [None], {"image": None}):
        with pytest.raises(ValueError, match="`images` must not hold None"):
            captioner(images)


@pytest.mark.parametrize("token", ["<|im_end|>", "<video>"])
def test_a_caption_that_holds_a_special_token_is_refused(token):
    """It would be a label in the middle of the text, where the model would learn to stop."""
    processor = make_processor()
    captions = ["a dog", f"a cat {token} on a mat"]
    with pytest.raises(ValueError, match=rf"`suffix` entry 1 must not hold '{re.escape(token)}', a special token or"):
        processor(images=noise_images(2), suffix=captions)
    chat = make_processor(chat=True, end_of_text="<|im_end|>")
    with pytest.raises(ValueError, match=re.escape(token)):
        chat(images=noise_images(1), messages=[conversation("<image>what?", captions[1])])


def test_a_caption_that_holds_the_end_of_a_text_is_refused():
    recipe = {"bos": True, "end_of_text": "\n"}
    with pytest.raises(ValueError, match=r"`suffix` entry 0 must not hold '\\n', a special token"):
        make_processor(**recipe)(images=noise_images(1), suffix="a cat\non a mat")
    cleaned = make_processor(**recipe, clean_captions=True)
    batch = cleaned(images=noise_images(1), suffix="a cat\non a mat")
    assert labelled_texts(batch, cleaned) == ["a cat on a mat\n"]
    with pytest.raises(ValueError, match=r"`suffix` must not be empty, but entry 0 is '\.\.\.'"):
        cleaned(images=noise_images(1), suffix="...")


def test_saves_and_loads(tmp_path):
    processor = make_processor(bos=True, bos_label=True, end_of_text="\n", clean_captions=True)
    processor.save_pretrained(tmp_path)
    again = EVLGenProcessor.from_pretrained(tmp_path)
    inputs = {"images": noise_images(2), "suffix": ["A Cat.", "a blue triangle"]}
    before, after = processor(**inputs), again(**inputs)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.to_dict() == processor.to_dict()
    (tmp_path / "processor_config.json").unlink()  # as if a Trainer without `processing_class` had saved the folder
    with pytest.raises(OSError, match=rf"'{tmp_path}' holds no processor .* `processing_class=processor`"):
        AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_labels_of_a_copied_batch_never_hold_placeholders(copied):
    """As a worker of a DataLoader hands a batch over, before TRL sets its labels."""
    processor = tiny_processor(tiny_model())
    batch = copied(processor(images=noise_images(1), text="a"))
    batch["labels"] = batch["input_ids"].clone()
    assert torch.equal(batch["labels"] == -100, batch["input_ids"] == processor.image_token_id)
