"""examples/publish.py: one commit with weights, code, processor and a card, which then works for anybody."""

import json
import subprocess
import sys

import publish
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from common.card import model_card, read_results
from common.lora import LoraArguments, add_lora
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import ROOT, pictures, save_towers, tiny_model, tiny_processor
from .hub_server import HubServer

RESULTS = {
    "task": {"type": "image-to-text", "name": "Image captioning"},
    "dataset": {"type": "coco-karpathy", "name": "COCO Captions, Karpathy's splits", "split": "test"},
    "metrics": [
        {"type": "cider", "name": "CIDEr-D [%]", "value": 139.1234},
        {"type": "cider", "name": "CIDEr-D [%], in-domain", "value": 120.5, "args": {"domain": "in"}},
    ],
    "num_rows": 5000,
    "notes": ["in-domain: few images."],
    "settings": {"num_beams": 5, "min_new_tokens": 8, "batch_size": 16},
}


def save_model(folder, **kwargs):
    model = tiny_model()
    model.save_pretrained(folder, **kwargs)
    tiny_processor(model).save_pretrained(folder)
    pictures(1)[0].save(folder / "captions.png")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return model


def run(hub, folder, *arguments):
    command = [sys.executable, str(ROOT / "examples" / "publish.py"), *arguments]
    env = {**hub.client_env(folder / "hf_home"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_model_is_published_in_one_commit_and_works(tmp_path):
    save_model(tmp_path / "model")
    with HubServer() as hub:
        done = run(
            hub,
            tmp_path,
            *("--model", "model", "--repo_id", "user/captioner", "--results", "model/results.json"),
            *("--license", "bsd-3-clause", "--datasets", "someone/pictures", "--check", "true"),
        )
        assert done.returncode == 0, done.stderr
        (commit,) = hub.commits("user/captioner")
        files = hub.files("user/captioner")
    assert commit["title"] == "Model, processor, code and card"
    expected = {"README.md", "captions.png", "config.json", "model.safetensors", "modeling_evlgen.py"}
    assert files.keys() >= expected | {"processing_evlgen.py", "processor_config.json", "tokenizer.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("checkpoint-")]
    assert "user/captioner says: " in done.stdout

    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag, card.data.datasets) == (
        "bsd-3-clause",
        "image-to-text",
        ["someone/pictures"],
    )
    results = card.data.eval_results
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("test", "cider", 139.1234),
        ("test", "cider", 120.5),
    ]
    assert "| COCO Captions, Karpathy's splits (test) | 5000 | CIDEr-D [%] | 139.12 |" in card.text
    assert 'pipeline("image-to-text", model="user/captioner", trust_remote_code=True)' in card.text
    assert "captions.png" in card.text


def test_a_folder_is_written_instead(tmp_path):
    towers = save_towers(tmp_path / "base")
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        **towers, connector_config={"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "merge_r": 3}
    )
    model.save_pretrained(tmp_path / "model", towers="reference")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    given = ["--model", str(tmp_path / "model"), "--repo_id", "you/captioner", "--folder", str(tmp_path / "out")]
    publish.main([*given, "--check", "true", "--picture", str(tmp_path / "red.png")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "named by this repository and loaded from theirs" in card
    assert "a model that is not on the Hub" in card and str(tmp_path) not in card
    assert "Not evaluated." in card and "captions.png" not in card
    publish.main([*given, "--towers", "include"])
    assert "The frozen towers are in this repository" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_is_published_as_one(tmp_path):
    save_model(tmp_path / "base")
    base = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = add_lora(base, LoraArguments())
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_processor(base).save_pretrained(tmp_path / "adapter")
    given = ["--model", str(tmp_path / "adapter"), "--repo_id", "user/adapter", "--folder", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"is an adapter for .*base, which is not on the Hub: publish that first"):
        publish.main(given)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(tmp_path / "base"), "user/base"))
    with HubServer() as hub:
        assert run(hub, tmp_path, "--model", "base", "--repo_id", "user/base").returncode == 0
        done = run(
            hub,
            tmp_path,
            *("--model", "adapter", "--repo_id", "user/adapter"),
            *("--check", "true", "--picture", str(tmp_path / "base" / "captions.png")),
        )
        assert done.returncode == 0, done.stderr
        files = hub.files("user/adapter")
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (["user/base"], "peft")


def test_mistakes_are_named_before_anything_is_uploaded(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "bad.json").write_text('{"task": 1}')
    given = ["--model", str(tmp_path / "model"), "--repo_id", "you/captioner"]
    with pytest.raises(ValueError, match=r"`results`: .*bad.json is no results.json of an evaluation"):
        publish.main([*given, "--results", str(tmp_path / "bad.json")])
    (tmp_path / "model" / "captions.png").unlink()
    with pytest.raises(ValueError, match="`check` needs a `picture`"):
        publish.main([*given, "--check", "true"])
    with pytest.raises(ValueError, match=r"`model`='.*nowhere' cannot be loaded"):
        publish.main(["--model", str(tmp_path / "nowhere"), "--repo_id", "you/captioner"])


def test_the_papers_card_names_its_base_models(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    config = EVLGenConfig(
        vision_model_name_or_path="Salesforce/blip2-opt-2.7b",
        text_model_name_or_path="facebook/opt-2.7b",
        text_model_revision="abc",
        temporal_contextualizer=True,
        towers="reference",
    )
    card = model_card("you/video", config, 9e7, read_results([str(tmp_path / "results.json")]), "mit", [], False)
    assert card.data.base_model == ["Salesforce/blip2-opt-2.7b", "facebook/opt-2.7b"]
    assert card.data.pipeline_tag == "video-to-text"
    assert "257 tokens of a picture become 29" in card.text
    assert (
        "| 120.50 | num_beams 5, min_new_tokens 8 |\n\n- COCO Captions, Karpathy's splits: in-domain: few" in card.text
    )
    assert "[facebook/opt-2.7b](https://huggingface.co/facebook/opt-2.7b), revision `abc`" in card.text
    assert "The order of a clip's frames is not seen." in card.text
