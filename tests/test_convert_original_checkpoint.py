"""Converted checkpoints of the original reproduce every recorded tensor within its tolerance."""

import json

import pytest
import torch
from convert_original_checkpoint import convert_state_dict, main
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPImageProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import FIXTURES, noise_images

CASES = ["image_opt", "image_llama", "video_opt/alpha_nonzero", "video_opt/alpha_zero"]
IMAGE, VIDEO = 200, 201  # ids of the placeholders: the first ones beyond the vocabulary


def read(case):
    """The recorded original: its description, state, inputs and outputs."""
    folder, _, variant = case.partition("/")
    path = FIXTURES / folder
    meta = json.loads((path / "meta.json").read_text())
    state = load_file(path / "state.safetensors")
    if variant == "alpha_zero":
        state |= {name: torch.zeros(()) for name in state if name.endswith(".alpha")}
    expected = load_file(path / (f"expected_{variant}.safetensors" if variant else "expected.safetensors"))
    return meta, state, load_file(path / "inputs.safetensors"), expected


VISION_FIELDS = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
VISION_FIELDS |= {"image_size": "img_size", "patch_size": "patch_size", "layer_norm_eps": "norm_eps"}


def save_base_models(meta, folder):
    """Saves the original's base models with other weights; returns the converter's arguments."""
    vision, text = meta["config"]["vision"], meta["config"]["lm"]
    Blip2VisionModel(
        Blip2VisionConfig(
            intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]),
            **{name: vision[original] for name, original in VISION_FIELDS.items()},
        )
    ).save_pretrained(folder / "vision")
    size = {"height": vision["img_size"], "width": vision["img_size"]}
    CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder / "vision")
    llama = meta["lm_class"] == "LlamaForCausalLM"
    size = text["vocab_size"] - int(llama)  # the original adds a padding token to Llama's
    config, model = (LlamaConfig, LlamaForCausalLM) if llama else (OPTConfig, OPTForCausalLM)
    model(config(**{**text, "vocab_size": size})).save_pretrained(folder / "text")
    words = {f"w{index}": index for index in range(size)}
    named = {"</s>": 2, "<unk>": 0, "<s>": 1} if llama else {"</s>": 2, "<pad>": 1, "\n": 50}
    words = {word: index for word, index in words.items() if index not in named.values()} | named
    special = {"bos_token": "<s>", "unk_token": "<unk>"} if llama else {"bos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    bos = special["bos_token"]
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    tokenizer.pre_tokenizer = Sequence([Split("\n", "isolated"), Split(" ", "removed")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special).save_pretrained(folder / "text")
    return ["--vision_model", str(folder / "vision"), "--text_model", str(folder / "text")]


def convert(meta, state, folder, trained_only=False):
    arguments = save_base_models(meta, folder)
    if trained_only:
        frozen = ("visual_encoder.", "opt_model.", "llm_model.")
        state = {k: v for k, v in state.items() if not k.startswith(frozen) or "temporal_merge" in k}
    torch.save({"model": state, "epoch": 0}, folder / "checkpoint.pth")
    connector = meta["config"]["connector"]
    arguments += ["--merge_r", str(connector["r"])]
    arguments += ["--connector_num_attention_heads", str(connector["num_attention_heads"])]
    main(["--checkpoint", str(folder / "checkpoint.pth"), *arguments, "--output_dir", str(folder / "out")])
    return EVLGenForConditionalGeneration.from_pretrained(folder / "out")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    meta, state, inputs, expected = read(request.param)
    model = convert(meta, state, tmp_path_factory.mktemp("converted"))
    return model, meta, inputs, expected


def vision_inputs(inputs):
    if inputs["image"].ndim == 5:  # (batch, channels, frames, height, width)
        return {"pixel_values_videos": inputs["image"].transpose(1, 2)}, VIDEO
    return {"pixel_values": inputs["image"]}, IMAGE


def with_prefix(values, prefix, count=8):
    return torch.cat([torch.full((len(values), count), prefix), values], dim=1)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


def test_activations_loss_and_gradients(case):
    model, meta, inputs, expected = case
    tolerance = meta["tolerance"]
    seen = {}

    def first(arguments, output):
        output = output[0] if isinstance(output, tuple) else output
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    def keep(name, module, of=first):
        return module.register_forward_hook(lambda _, given, output: seen.update({name: of(given, output)}))

    layers = model.vision_tower.encoder.layers
    handles = [keep(f"vit_block_{index}", layer) for index, layer in enumerate(layers)]
    handles += [keep("image_embeds", model.ln_vision), keep("connector_in", model.vision_projection)]
    handles += [keep("connector_out", model.connector), keep("lm_prefix", model.language_projection)]
    if model.temporal is not None:
        handles.append(keep("temporal_0_in", model.temporal[0], lambda given, _: given[0].flatten(0, 1)))
        handles.append(keep("temporal_0_out", model.temporal[0], lambda given, out: (given[0] + out).flatten(0, 1)))

    def keep_embeds(module, arguments, kwargs):
        seen["lm_inputs_embeds"] = kwargs["inputs_embeds"]

    handles.append(model.language_model.register_forward_pre_hook(keep_embeds, with_kwargs=True))
    images, token = vision_inputs(inputs)
    text = {"input_ids": with_prefix(inputs["input_ids"], token)}
    text["attention_mask"] = with_prefix(inputs["attention_mask"], 1)
    output = model(**text, **images, labels=expected["targets"])
    output.loss.backward()
    for handle in handles:
        handle.remove()

    assert torch.equal(text["attention_mask"], expected["lm_attention_mask"])
    compared = {*seen, "vit_out", "logits", "loss", "targets", "lm_attention_mask", "alpha"}
    assert {name for name in expected if not name.startswith(("grad.", "gen", "prompted."))} <= compared
    for name, tensor in seen.items():
        close(tensor, expected[name], tolerance["activations"])
    tokens = model.get_vision_features(next(iter(images.values())))
    vit_out = expected["vit_out"]
    close(tokens, vit_out.mean(dim=1) if vit_out.ndim == 4 else vit_out, tolerance["activations"])
    real = expected["lm_attention_mask"].bool()
    close(output.logits[real], expected["logits"][real], tolerance["activations"])
    close(output.loss.reshape(1), expected["loss"], tolerance["loss"])
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) >= 5
    for name in names:
        (converted,) = convert_state_dict({name.removeprefix("grad."): expected[name]})
        close(model.get_parameter(converted).grad, expected[name], tolerance["gradients"])


def test_prompts_carry_no_loss(case):
    model, meta, inputs, expected = case
    if "prompted.loss" not in expected:
        pytest.skip("recorded for OPT only")
    images, token = vision_inputs(inputs)
    text = {"input_ids": with_prefix(inputs["input_ids"], token)}
    text["attention_mask"] = with_prefix(inputs["attention_mask"], 1)
    with torch.no_grad():
        loss = model(**text, **images, labels=expected["prompted.targets"]).loss
    close(loss.reshape(1), expected["prompted.loss"], meta["tolerance"]["loss"])


def generate(case, prompt="gen", **settings):
    model, meta, inputs, _ = case
    images, token = vision_inputs(inputs)
    ids = inputs[f"{prompt}.prompt_ids"]
    mask = inputs.get(f"{prompt}.prompt_mask", torch.ones_like(ids))
    special = meta["config"]["special_ids"]
    llama = "newline" not in special
    ends = {"eos_token_id": 2 if llama else special["newline"], "pad_token_id": 0 if llama else 1}
    model.generation_config = GenerationConfig(**{"max_new_tokens": 8, "do_sample": False, **ends, **settings})
    words = model.generate(input_ids=with_prefix(ids, token), attention_mask=with_prefix(mask, 1), **images)
    words = words[:, 8 + ids.shape[1] :]
    words = torch.where(words == 0, 2, words) if llama else words  # as the original does
    return torch.nn.functional.pad(words, (0, 8 - words.shape[1]), value=2 if llama else 1)


def test_generates_the_same_words(case):
    _, meta, _, expected = case
    stop = meta["config"]["generation"]["stop_id"]
    if isinstance(stop, dict):
        stop = stop["alpha_nonzero" if expected["alpha"].any() else "alpha_zero"]
    assert torch.equal(generate(case), expected["gen.ids"])
    assert torch.equal(generate(case, "gen_leftpad"), expected["gen_leftpad.ids"])
    assert torch.equal(generate(case, eos_token_id=stop), expected["gen_stop.ids"])
    if "gen_reppen.ids" in expected:
        assert torch.equal(generate(case, repetition_penalty=1.5), expected["gen_reppen.ids"])


@pytest.mark.parametrize("name", CASES[:3])
def test_a_checkpoint_of_what_was_trained_takes_the_towers_from_the_base_models(name, tmp_path):
    meta, state, _, _ = read(name)
    model = convert(meta, state, tmp_path, trained_only=True)
    converted = convert_state_dict(state)
    for part, tensor in model.state_dict().items():
        if part.startswith(("connector.", "ln_vision.", "vision_projection.", "language_projection.", "temporal.")):
            assert torch.equal(tensor, converted[part])
    tower = Blip2VisionModel.from_pretrained(tmp_path / "vision")
    assert all(torch.equal(tensor, model.vision_tower.state_dict()[key]) for key, tensor in tower.state_dict().items())


@pytest.mark.parametrize("name", ["image_opt", "image_llama"])
def test_the_folder_holds_the_code_and_a_processor_with_the_recipes_labels(name, tmp_path):
    meta, state, _, _ = read(name)
    model = convert(meta, state, tmp_path)
    assert model.generation_config.num_beams == 5 and (tmp_path / "out" / "modeling_evlgen.py").exists()
    processor = EVLGenProcessor.from_pretrained(tmp_path / "out")
    batch = processor(images=noise_images(1), suffix="w10 w11")
    end = 2 if name == "image_llama" else 50
    assert batch["input_ids"].tolist() == [[processor.image_token_id] * 8 + [2, 10, 11, end]]
    assert batch["labels"][0, 8:].tolist() == [-100 if name == "image_llama" else 2, 10, 11, end]


ATTENTION = "VLconnector.encoder.layer.{}.attention.self"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itm_head.weight": torch.zeros(2)}, "Unknown tensors: itm_head.weight"),
        ({"VL_proj.bias": None}, "Missing tensors: vision_projection.bias"),
        ({"VL_proj.weight": torch.zeros(48, 65)}, r"(?s)Misshapen tensors: .* vision_projection.weight: .*\[48, 65\]"),
        ({f"{ATTENTION.format(1000000)}.query.bias": torch.zeros(48)}, "Missing tensors: connector.encoder.layer.3."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_written(change, message, tmp_path):
    meta, state, _, _ = read("image_opt")
    state = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        convert(meta, state, tmp_path)
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of torch.save"),
        ({"model": Evil()}, "is not a file of torch.save .*: Weights only load failed"),
        (torch.zeros(3), "must .* but holds a Tensor"),
        ({"model": {"VL_proj.bias": [1.0]}}, "must .* 'VL_proj.bias' is a list"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_and_not_run(content, message, tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    arguments = ["--vision_model", "none", "--text_model", "none", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=rf"^`checkpoint`: .*checkpoint\.pth {message}"):
        main(["--checkpoint", str(path), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_files_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    arguments = ["--checkpoint", "none.pth", "--vision_model", "none", "--text_model", "none"]
    with pytest.raises(ValueError, match=r"`output_dir` must be a new or empty folder, but .*out holds files"):
        main([*arguments, "--output_dir", str(tmp_path / "out")])
