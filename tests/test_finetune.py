"""examples/finetune.py: LoRA beside the connector, on questions and conversations; adapters as users take them."""

import importlib
import json
import re
import shutil
from functools import partial

import finetune
import pytest
import torch
from datasets import Dataset
from finetune import LoraArguments, add_lora
from peft import PeftModel
from PIL import Image
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from common.arguments import DataArguments
from common.data.collator import CaptionCollator
from common.evaluation.captions import WrongImages
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import COLORS, TEXT_CONFIGS, noise_images, save_split, save_towers, tiny_model
from .test_processing import make_processor
from .training import LAYERS, flags

SIZES = {**LAYERS, "merge_r": 3}
ROLES = ("user", "assistant")
load = EVLGenForConditionalGeneration.from_pretrained


chat_processor = partial(make_processor, chat=True, end_of_text="<|im_end|>")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model in a folder, and a folder of questions about images of one colour."""
    folder = tmp_path_factory.mktemp("work")
    towers = save_towers(folder / "base")
    build = partial(EVLGenForConditionalGeneration.from_vision_text_pretrained, connector_config=SIZES)
    model = build(**towers)
    processor = chat_processor(num_image_tokens=model.config.num_image_tokens)
    model.generation_config.eos_token_id = processor.end_of_text_id
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # bitsandbytes packs 64 weights at least
    wide = LlamaForCausalLM(LlamaConfig(**{**TEXT_CONFIGS["llama"].to_dict(), **sizes}))
    wide.save_pretrained(folder / "wide_text")
    build(**{**towers, "text_model": folder / "wide_text"}).save_pretrained(folder / "wide", towers="reference")
    processor.save_pretrained(folder / "wide")
    for name in ("include", "reference"):
        model.save_pretrained(folder / name, towers=name)
        processor.save_pretrained(folder / name)
    for split, count in (("train", 16), ("test", 8)):
        colors = [COLORS[index % len(COLORS)] for index in range(count)]
        images = [Image.new("RGB", (40, 40), color) for color in colors]
        save_split(folder / "vqa" / split, images, [question(index, color) for index, color in enumerate(colors)])
    return folder


def question(index, color):
    if index % 3:
        return {"question": "what is it?", "answer": color}
    return {"question": "is it red?", "answer": "yes" if color == "red" else "no"}


def arguments(work, output, model="include", **changes):
    recipe = {"prompt_column": "question", "caption_column": "answer", "max_new_tokens": 4}
    (work / "vqa.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    given = {"config": work / "vqa.yaml", "model": work / model, "dataset": work / "vqa", "output_dir": output}
    given |= {"max_steps": 3, "per_device_train_batch_size": 4, "lora_r": 4, "logging_steps": 1, "disable_tqdm": True}
    return flags(**{**given, **changes})


def test_an_adapter_is_trained_loaded_merged_and_used_like_a_model(work, tmp_path):
    metrics = finetune.main(arguments(work, tmp_path / "adapter", lora="both"))
    assert metrics.keys() >= {"test_loss", "test_loss_gap", "test_exact_captions"}
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= files
    assert "model.safetensors" not in files
    readable = {(tmp_path / "adapter" / name).stat().st_mode for name in files if "adapter" in name}
    assert readable == {(work / "vqa.yaml").stat().st_mode}

    base = load(work / "include")
    processor = EVLGenProcessor.from_pretrained(tmp_path / "adapter")
    batch = processor(images=Image.new("RGB", (40, 40), "red"), text="what is it?")
    with torch.no_grad():
        plain = base(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        expected = adapted(**batch).logits
        assert not torch.allclose(plain, expected, atol=1e-3)
        for loading in (load, AutoModel.from_pretrained):
            torch.testing.assert_close(loading(tmp_path / "adapter")(**batch).logits, expected)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load(tmp_path / "merged")
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_finds_its_model_and_refuses_another(work, tmp_path, monkeypatch):
    shutil.copytree(work / "reference", tmp_path / "outputs" / "base")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "outputs" / "adapter"
    finetune.main([*arguments(work, output, test_split="", max_steps=1), "--model", "outputs/base"])
    monkeypatch.chdir("/")  # the model was named relatively
    expected = load(tmp_path / "outputs" / "adapter").state_dict()
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "outputs" / "adapter").state_dict(), expected)

    adapter = tmp_path / "elsewhere" / "outputs" / "adapter"  # both are moved
    shutil.move(tmp_path / "outputs", tmp_path / "elsewhere" / "outputs")
    with pytest.raises(ValueError, match="/outputs/base', which is not there"):
        load(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "outputs/base"}))
    torch.testing.assert_close(load(adapter).state_dict(), expected)

    base = adapter.parent / "base" / "config.json"
    config = json.loads(base.read_text())
    base.write_text(json.dumps({**config, "connector_config": {**config["connector_config"], "merge_r": 2}}))
    monkeypatch.chdir(adapter.parents[1])
    for loading in (load, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"`connector_config\.merge_r` is 2, not 3"):
            loading("outputs/adapter")


@pytest.mark.parametrize(
    ("script", "argument"), [("finetune", "model"), ("finetune_video", "image_model"), ("train_scst", "model")]
)
def test_adapters_are_not_trained_on(script, argument, work, tmp_path):
    add_lora(tiny_model(), LoraArguments()).save_pretrained(tmp_path / "adapter")
    given = {argument: tmp_path / "adapter", "dataset": work / "vqa", "caption_column": "answer"}
    given |= {"video_column": "image"} if script == "finetune_video" else {}
    with pytest.raises(ValueError, match=rf"`{argument}`='.*adapter' is an adapter.* --merge true"):
        importlib.import_module(script).main(flags(**given, output_dir=tmp_path / "out"))


def test_a_model_with_an_adapter_is_saved_by_peft_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    add_lora(base, LoraArguments()).save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    with pytest.raises(ValueError, match="with an adapter cannot be saved"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, "must name a model as `base_model_name_or_path`"),
        ({"peft_type": "OTHER"}, "KeyError: 'OTHER'"),
        ({"r": 10**9}, "allocate"),
        ({"r": 3}, "You set `ignore_mismatched_sizes`"),
        ({"target_modules": ["nothing"]}, "check your `target_modules`"),
    ],
    ids=str,
)
def test_an_adapters_bad_settings_are_named(fields, message, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    add_lora(load(tmp_path / "base"), LoraArguments(lora_r=2)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=rf"adapter.*{message}") as error:
        load(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(error.value) and "adapter_config.json" in str(error.value)


def test_towers_stay_and_a_run_resumes(work, tmp_path):
    finetune.main(arguments(work, tmp_path / "unbroken", save_steps=2, lora_dropout=0.0))
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (tmp_path / "unbroken" / "checkpoint-2").rename(resumed / "checkpoint-2")
    finetune.main(arguments(work, resumed, save_steps=2, lora_dropout=0.0, resume_from_checkpoint="true"))
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["<image><image>which?", "red"], r"has places for 2 images, but there are 1"),
        (["<image>what?"], r"must end with a turn of the assistant"),
        (["<image>" + "what? " * 100, "red"], r"has \d+ tokens, but at most 128 are allowed"),
    ],
)
def test_a_bad_conversation_is_named_or_skipped(turns, message):
    processor = chat_processor()
    bad, good = (
        {"image": image, "messages": [{"role": r, "content": c} for r, c in zip(ROLES, said, strict=False)]}
        for image, said in zip(noise_images(2), (turns, ["<image>what?", "blue"]), strict=True)
    )
    data = DataArguments(messages_column="messages")
    with pytest.raises(ValueError, match=rf"the row with the caption .*{re.escape(turns[0][:20])}.*{message}"):
        CaptionCollator(processor, data, training=True)([good, bad])
    collator = CaptionCollator(processor, DataArguments(messages_column="messages", skip_bad_rows=True), training=True)
    batch = collator([good, bad])
    assert batch["input_ids"].shape[0] == len(batch["pixel_values"]) == len(collator.bad_rows) == 1
    assert "blue" in processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])


def test_a_conversation_may_show_several_images():
    processor = chat_processor()
    first, second = noise_images(2)
    turns = ["<image>what?", "red", "<image>and now?", "blue"]
    turns = [{"role": role, "content": text} for role, text in zip(2 * ROLES, turns, strict=True)]
    single = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "green"}]
    rows = [{"image": [first, second], "messages": turns}, {"image": [second], "messages": single}]
    data = DataArguments(messages_column="messages")
    batch = CaptionCollator(processor, data, training=True)(rows)
    expected = processor.image_processor([first, second, second], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    named = [{**rows[0], "image": ["a", "b"]}, {**rows[1], "image": ["c"]}, {**rows[1], "image": ["d"]}]
    named[2]["messages"] = [single[0], {"role": "assistant", "content": "black"}]
    wrong = WrongImages(Dataset.from_list(named), data)
    assert [row["image"] for row in wrong] == [["a", "b"], ["d"], ["c"]]  # as many as there are places for


def test_without_lora_the_connectors_side_is_trained_and_saved_as_a_model(work, tmp_path):
    finetune.main(arguments(work, tmp_path / "model", lora="none", model="reference"))
    before = load(work / "reference").state_dict()
    after = load(tmp_path / "model").state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"ln_vision", "vision_projection", "connector", "language_projection"}


def test_a_trained_model_gets_a_range_of_image_tokens(work, tmp_path):
    changes = {"image_token_range": [3, 12]}
    with pytest.raises(ValueError, match="`image_token_range` is saved with a model, but `lora` saves an adapter"):
        finetune.main(arguments(work, tmp_path, lora="text", **changes))
    finetune.main(arguments(work, tmp_path, lora="none", **changes))
    model = load(tmp_path)
    processor = EVLGenProcessor.from_pretrained(tmp_path)
    for number in (3, 12):
        inputs = processor(images=noise_images(1), num_image_tokens=number, return_tensors="pt")
        assert (inputs["input_ids"] == processor.image_token_id).sum() == number
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_connector_is_trained_through_a_quantised_language_model(bits, work, tmp_path):
    for library in ("torchao", "bitsandbytes"):
        pytest.importorskip(library, reason="needs the quantization extra")
    finetune.main(arguments(work, tmp_path / "adapter", text_quantization=bits, model="wide"))
    finetune.main(arguments(work, tmp_path / "model", text_quantization=bits, lora="none", model="wide"))
    loaded = load(tmp_path / "model", quantization_config=finetune.quantization_config(bits).to_dict())
    quantised = {name.split(".")[0] for name, p in loaded.named_parameters() if type(p) is not torch.nn.Parameter}
    assert quantised == {"language_model"}
    with pytest.raises(ValueError, match='`towers` cannot be "include" with a quantised language model'):
        finetune.main(arguments(work, tmp_path / "no", text_quantization=bits, lora="none"))


def test_quantisation_leaves_what_a_checkpoint_holds_besides_the_language_model(work):
    pytest.importorskip("torchao", reason="needs the quantization extra")
    given = finetune.quantization_config("int8").to_dict()
    loaded = load(work / "include", quantization_config=given)
    quantised = {name for name, p in loaded.named_parameters() if type(p) is not torch.nn.Parameter}
    assert len(quantised) == 14 and all(name.startswith("language_model.model.layers.") for name in quantised)
    assert loaded.config.to_dict().get("quantization_config") is None  # a checkpoint says nothing of it
