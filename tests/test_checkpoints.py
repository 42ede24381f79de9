"""Checkpoints that name their frozen towers instead of holding them."""

import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import is_on_hub

from .helpers import ROOT, join, noise_images, run_clean, save_towers, tiny_model, tiny_processor
from .hub_server import HubServer
from .training import LAYERS

load = EVLGenForConditionalGeneration.from_pretrained
SIZES = {**LAYERS, "merge_r": 3}
TOWERS = ("vision_tower.", "language_model.")


@pytest.fixture
def model(tmp_path):
    return build(save_towers(tmp_path / "base"))


def build(towers, connector_config=SIZES, **fields):
    return join(*towers.values(), connector_config=connector_config, **fields)


def same(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_trained_weights_and_the_names_of_the_towers_are_enough(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "model", towers="reference")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved.keys() == {name for name in model.state_dict() if not name.startswith(TOWERS)}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_model_name_or_path"] == str(tmp_path / "base" / "text")
    assert (config["towers"], len(config["text_model_fingerprint"])) == ("reference", 64)
    assert model.config.towers is None  # saving did not change the model

    for loading in (load, AutoModel.from_pretrained):
        loaded = loading(tmp_path / "model")
        same(loaded, model)
        assert not loaded.training
        assert loaded.generation_config.max_new_tokens == 7
        trained = {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {"ln_vision", "vision_projection", "connector", "language_projection"}
    loaded.save_pretrained(tmp_path / "again")  # as it was loaded
    again, before = (tmp_path / name / "model.safetensors" for name in ("again", "model"))
    assert again.read_bytes() == before.read_bytes()
    loaded.save_pretrained(tmp_path / "whole", towers="include")
    same(load(tmp_path / "whole"), model)


def test_dtype_and_device_map_are_for_the_towers(model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers="reference")
    settings = {"dtype": torch.bfloat16, "device_map": "auto", "output_loading_info": True}
    loaded, info = load(tmp_path / "model", **settings)
    assert {loaded.vision_tower.dtype, loaded.language_model.dtype} == {torch.bfloat16}
    assert {part.weight.dtype for part in (loaded.ln_vision, loaded.language_projection)} == {torch.float32}
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    split = {"language_model.model": "cpu", "language_model.lm_head": "disk", "": "cpu"}
    loaded = load(tmp_path / "model", device_map=split, offload_folder=str(tmp_path / "offload"))
    assert loaded.hf_device_map["language_model.lm_head"] == "disk"
    assert loaded.hf_device_map.keys() >= {"vision_tower", "language_model.model", "connector", "ln_vision"}
    batch = tiny_processor(loaded)(images=noise_images(1))
    assert loaded.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    for error, settings in ((TypeError, {"merge_rr": 3}), (ValueError, {"device_map": {"language_model": "cpu"}})):
        with pytest.raises(error, match=r"merge_rr|`device_map` must have an entry for 'vision_tower'"):
            load(tmp_path / "model", **settings)


def test_without_a_dtype_or_with_auto_the_checkpoints_dtype_is_used(tmp_path):
    towers = save_towers(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(towers["text_model"], dtype=torch.bfloat16)
    text.save_pretrained(towers["text_model"])
    build(towers).save_pretrained(tmp_path / "model", towers="reference")  # with a vision tower of float32
    for given, expected in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": torch.float32}, torch.float32),
    ):
        for loading in (load, AutoModel.from_pretrained):
            loaded = loading(tmp_path / "model", **given)
            assert {loaded.vision_tower.dtype, loaded.language_model.dtype} == {expected}, (loading, given)
            assert loaded.connector.dtype == torch.float32


def test_towers_and_trained_weights_may_be_in_several_files(tmp_path):
    towers = save_towers(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(towers["text_model"])
    (tmp_path / "base" / "text" / "model.safetensors").unlink()
    text.save_pretrained(towers["text_model"], max_shard_size="20KB")
    model = build(towers)
    model.save_pretrained(tmp_path / "model", towers="reference", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    same(load(tmp_path / "model"), model)


TEMPORAL = {"temporal_contextualizer": True, "temporal_hidden_size": 8, "temporal_num_attention_heads": 2}
MODELS = {
    "video tomeformer": (SIZES, TEMPORAL),
    "qformer": ({**LAYERS, "model_type": "evlgen_qformer", "position_initializer_range": 0.1}, {}),
    "mlp": ({"model_type": "evlgen_mlp", "hidden_size": 32, "output_position_initializer_range": 1.0}, {}),
}


@pytest.mark.parametrize(
    ("kind", "towers"), [*((kind, "include") for kind in MODELS), ("video tomeformer", "reference")]
)
def test_a_model_with_offloaded_parts_generates_the_same_and_can_be_saved(kind, towers, tmp_path):
    connector_config, fields = MODELS[kind]
    model = build(save_towers(tmp_path / "base"), connector_config, **fields)
    for contextualizer in model.temporal or ():
        torch.nn.init.ones_(contextualizer.alpha)
    model.save_pretrained(tmp_path / "model", towers=towers)
    media = {"videos": [noise_images(3), noise_images(2)]} if fields else {"images": noise_images(2)}
    batch = tiny_processor(model)(**media, text=["what is it?"] * 2)
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)

    def generates_the_same(**kwargs):
        loaded = load(tmp_path / "model", **kwargs)
        assert torch.equal(loaded.generate(**batch, max_new_tokens=6, do_sample=False), expected), kwargs
        return {name.split(".")[0] for name, parameter in loaded.named_parameters() if parameter.is_meta}

    parts = [name for name, _ in model.named_children()]
    for on_disk in [*({part} for part in parts), set(parts)]:
        offloaded = generates_the_same(device_map={part: "disk" if part in on_disk else "cpu" for part in parts})
        # Beside named towers, the trained parts stay with the vision tower.
        assert offloaded == (on_disk if towers == "include" else on_disk & {"vision_tower", "language_model"})
    sizes = [sum(parameter.nbytes for parameter in part.parameters()) for part in model.children()]
    # The largest limit is enough for the towers, but not for the trained parts as well.
    for limit in (sum(sizes) - min(sizes), sum(sizes) // 2, sum(sizes) // 8):
        assert generates_the_same(device_map="auto", max_memory={"cpu": limit}), limit
    load(tmp_path / "model", device_map={"": "disk"}).save_pretrained(tmp_path / "again")
    same(load(tmp_path / "again"), model)


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("vision", None, None), ("text", "rope_parameters.rope_theta", 5.0), ("vision", "layer_norm_eps", 0.5)],
)
def test_a_tower_with_other_weights_or_another_configuration_is_refused(part, field, value, model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers="reference")
    folder = tmp_path / "base" / part
    if field is None:
        message = "the fingerprint of its weights is"
        weights = load_file(folder / "model.safetensors")
        save_file({name: -weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    else:
        message = rf"`{re.escape(field)}` is {value!r}, not "
        name, _, nested = field.partition(".")
        change_json(folder / "config.json", **{name: {"rope_type": "default", nested: value} if nested else value})
    with pytest.raises(ValueError, match=rf"/{part}' \(folder .*: {message}"):
        load(tmp_path / "model")
    taken = load(tmp_path / "model", **{f"{part}_model_fingerprint": None})
    batch = tiny_processor(model)(images=noise_images(1), text="what is it?")
    logits = taken(**batch).logits
    assert not torch.allclose(logits, model(**batch).logits)
    taken.save_pretrained(tmp_path / "again")  # with the weights and the configuration that it has now
    assert torch.equal(load(tmp_path / "again")(**batch).logits, logits)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text", "num_key_value_heads", 2),
        ("text", "head_dim", 8),
        ("vision", "patch_size", 4),
        ("vision", "image_size", 64),
    ],
)
def test_a_field_that_does_not_fit_the_weights_is_named(part, field, value, model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers="reference")
    before = getattr(getattr(model.config, f"{part}_config"), field)
    change_json(tmp_path / "base" / part / "config.json", **{field: value})
    changed = re.escape(f"`{field}` is {value}, not {before}")
    message = rf"`{part}_model_name_or_path`='.*/{part}' cannot be loaded: .*{changed}"
    with pytest.raises((TypeError, ValueError), match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize("heads", [0, 2])
def test_weights_that_do_not_fit_their_own_configuration_are_named(heads, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    text_config = {**model.config.text_config.to_dict(), "num_key_value_heads": heads}
    change_json(tmp_path / "model" / "config.json", text_config=text_config)
    with pytest.raises(OSError, match=r"The weights in '.*/model' cannot be loaded: "):
        load(tmp_path / "model")


def test_a_towers_config_may_differ_in_what_does_not_matter(model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers="reference")
    fields = {"transformers_version": "4.40.0", "torch_dtype": "float16", "dtype": "float16", "architectures": None}
    fields |= {"_name_or_path": "elsewhere", "use_cache": False, "_attn_implementation": "eager", "eos_token_id": 7}
    for part in ("text", "vision"):
        change_json(tmp_path / "base" / part / "config.json", **fields)
    same(load(tmp_path / "model"), model)
    load(tmp_path / "model", attn_implementation="eager")


@pytest.mark.parametrize(
    ("vision", "text"),
    [("eva", "opt"), ("dinov2", "gpt2"), ("timm_cnn", "llama")],
)
def test_any_towers_can_be_named(vision, text, tmp_path, caplog):
    model = build(save_towers(tmp_path / "base", vision, text), text_attn_implementation="eager")
    model.save_pretrained(tmp_path / "model", towers="reference")
    same(load(tmp_path / "model"), model)
    assert "start afresh" not in caplog.text


def test_a_missing_base_model_is_named(model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers="reference")
    moved = (tmp_path / "base" / "text").rename(tmp_path / "base" / "elsewhere")
    with pytest.raises(ValueError, match=r"`text_model_name_or_path`='.*base/text'"):
        load(tmp_path / "model")
    same(load(tmp_path / "model", text_model_name_or_path=str(moved)), model)


@pytest.mark.parametrize(
    ("towers", "file", "message"),
    [
        ("include", "model/model.safetensors", r"'.*/model'"),
        ("reference", "base/text/model.safetensors", r"`text_model_name_or_path`='.*/text'"),
    ],
)
def test_weights_that_were_cut_off_are_named(towers, file, message, model, tmp_path):
    model.save_pretrained(tmp_path / "model", towers=towers)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((OSError, ValueError), match=message):
        load(tmp_path / "model")


@torch.no_grad()
def negate_queries(tower):
    """A change that an XOR of the bits does not notice."""
    queries = [module for name, module in tower.named_modules() if name.endswith("q_proj")]
    for query in queries:
        query.weight.neg_()
    assert queries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text weights", "language_model differs from '.*text'"),
        ("configuration", "language_model cannot be compared with '.*text'"),
        ("given as a model", "language_model cannot be compared with '.*text'"),  # fine-tuned, say
        ("no name", "vision_tower has no name; language_model has no name"),
    ],
)
def test_towers_that_were_changed_or_have_no_name_are_saved_and_not_only_named(change, message, tmp_path, caplog):
    towers = save_towers(tmp_path / "base")
    if change == "given as a model":
        towers["text_model"] = AutoModelForCausalLM.from_pretrained(towers["text_model"])
        negate_queries(towers["text_model"])
    fields = {"text_rms_norm_eps": 0.5} if change == "configuration" else {}
    model = tiny_model() if change == "no name" else build(towers, **fields)
    if change == "text weights":
        negate_queries(model.language_model)
    with pytest.raises(ValueError, match=f'`towers` cannot be "reference": {message}'):
        model.save_pretrained(tmp_path / "model", towers="reference")
    model.config.towers = "reference"  # as a default, it is only a wish
    model.save_pretrained(tmp_path / "model")
    assert "The checkpoint holds its towers" in caplog.text
    loaded = load(tmp_path / "model")
    same(loaded, model)
    batch = tiny_processor(model)(images=noise_images(1), text="what is it?")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_language_model_with_an_adapter_is_refused(tmp_path):
    towers = save_towers(tmp_path / "base")
    text = AutoModelForCausalLM.from_pretrained(towers["text_model"])
    get_peft_model(text, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for adapted in (text, tmp_path / "adapter"):  # PEFT has changed the model in place
        with pytest.raises(ValueError, match=r"`text_model` is a LlamaForCausalLM with an adapter\. Merge it first"):
            build({**towers, "text_model": adapted})


@pytest.mark.parametrize("max_shard_size", ["50GB", "50KB"])
def test_a_checkpoint_that_holds_its_towers_is_for_others(max_shard_size, model, tmp_path):
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    finally:
        os.umask(before)
    paths = list((tmp_path / "model").iterdir())
    assert len([path for path in paths if path.suffix == ".safetensors"]) == (1 if max_shard_size == "50GB" else 8)
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o640}  # whoever may read one may read all
    assert not [path for path in paths if path.suffix == ".json" and str(tmp_path) in path.read_text()]
    assert model.config.text_model_name_or_path == str(tmp_path / "base" / "text")  # it can still be a reference
    same(load(tmp_path / "model"), model)


def test_a_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    save_towers(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = build({"vision_model": "base/vision", "text_model": "base/text"})  # such names may be on the Hub as well
    assert not is_on_hub("base/text")
    model.save_pretrained("model", towers="reference")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    same(load(tmp_path / "model"), model)


PUBLISH = """
import sys
sys.path[:0] = [{root!r}]
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, AutoImageProcessor
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor
AutoModel.from_pretrained("base/vision").push_to_hub("tower")
AutoImageProcessor.from_pretrained("base/vision").push_to_hub("tower")
AutoModelForCausalLM.from_pretrained("base/text").push_to_hub("llm")
AutoTokenizer.from_pretrained("base/text").push_to_hub("llm")
build = EVLGenForConditionalGeneration.from_vision_text_pretrained
model = build("user/tower", "user/llm", connector_config={sizes!r})
model.language_projection.weight.data.normal_(std=0.3)
model.push_to_hub("captioner")
tokenizer, images = AutoTokenizer.from_pretrained("user/llm"), AutoImageProcessor.from_pretrained("user/tower")
EVLGenProcessor(images, tokenizer, num_image_tokens=model.config.num_image_tokens).push_to_hub("captioner")
"""

USE = """
from transformers import AutoModel, pipeline
words = []
for name in ("image-to-text", "video-to-text"):
    captioner = pipeline(name, model="user/captioner", trust_remote_code=True, device_map="auto")
    image = {image!r}
    words.append(captioner(image if name == "image-to-text" else [image] * 2, do_sample=False, max_new_tokens=6))
chat = pipeline("image-text-to-text", model="user/captioner", trust_remote_code=True)
model = AutoModel.from_pretrained("user/captioner", trust_remote_code=True, revision="main")
model.save_pretrained("again")
AutoModel.from_pretrained("again", trust_remote_code=True)
print(words)
"""


def test_towers_on_the_hub_are_named_by_default_and_found_in_the_cache_offline(tmp_path):
    save_towers(tmp_path / "base")
    image = str(tmp_path / "image.png")
    noise_images(1)[0].save(image)
    with HubServer() as hub:
        environment = hub.client_env(tmp_path / "publisher")
        code = PUBLISH.format(root=str(ROOT), sizes=SIZES)
        subprocess.run([sys.executable, "-I", "-c", code], env=environment, check=True, cwd=tmp_path, timeout=300)
        files = hub.files("user/captioner")
        assert b"language_model" not in files["model.safetensors"]
        config = json.loads(files["config.json"])
        assert config["text_model_name_or_path"] == "user/llm"
        assert config["text_model_revision"] == hub.commits("user/llm")[-1]["sha"]  # no revision was named
        before = hub.files("user/llm")["model.safetensors"]
        later = {name: tensor + 1 for name, tensor in safetensors.torch.load(before).items()}
        changes = {"model.safetensors": safetensors.torch.save(later)}
        hub.repos["models", "user/llm"].commit("main", "later", "", changes)
        environment = hub.client_env(tmp_path / "user_home")
        online = run_clean(USE.format(image=image), tmp_path, environment)
    offline = run_clean(USE.format(image=image), tmp_path, {**environment, "HF_HUB_OFFLINE": "1"})
    assert online.splitlines()[-1] == offline.splitlines()[-1]


MEMORY = """
import resource
from modeling_evlgen import EVLGenForConditionalGeneration
EVLGenForConditionalGeneration.from_pretrained("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = EVLGenForConditionalGeneration.from_pretrained("large")
used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(used / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.parametrize("towers", ["include", "reference"])
@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_model(towers, tmp_path):
    base = save_towers(tmp_path / "base")
    build(base).save_pretrained(tmp_path / "small", towers=towers)
    sizes = {"hidden_size": 768, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100_000)).save_pretrained(tmp_path / "text")  # 0.6 GB
    build({**base, "text_model": tmp_path / "text"}).save_pretrained(tmp_path / "large", towers=towers)
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{MEMORY}"]
    output = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert float(output.splitlines()[-1]) < 1.15
