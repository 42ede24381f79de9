"""examples/publish.py: one commit with weights, code, processor and a card, and a model that works for anybody."""

import json
from functools import partial
from unittest.mock import Mock

import publish
import pytest
import torch
from finetune import LoraArguments, add_lora
from huggingface_hub import HfApi, ModelCard, SpaceCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from publish import PublishArguments, is_edited, model_card, read_results, sign

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import hash_weights, save_base

from .helpers import LAYERS, noise_images, save, save_towers, tiny_model, tiny_processor
from .hub_server import HubError, HubServer

RESULTS = {
    "task": {"type": "image-to-text", "name": "Image captioning"},
    "dataset": {"type": "coco-karpathy", "name": "COCO Captions, Karpathy's splits", "split": "test"},
    "metrics": [
        {"type": "cider", "name": "CIDEr-D [%]", "value": 139.1234},
        {"type": "cider", "name": "CIDEr-D [%], in-domain", "value": 120.5, "args": {"domain": "in"}},
    ],
    "num_rows": 5000,
    "notes": ["in-domain: few images."],
    "settings": {"num_beams": 5, "min_new_tokens": 8, "batch_size": 16, "dtype": "float32", "weights": ""},
    "model": "outputs/mine",
}


def save_model(folder):
    model = tiny_model()
    save(folder, model, tiny_processor(model))
    noise_images(1)[0].save(folder / "captions.png")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"pickle")
    settings = {**RESULTS["settings"], "weights": hash_weights(model.state_dict())}
    (folder / "results.json").write_text(json.dumps({**RESULTS, "settings": settings}))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for the script, and for the processes in which it checks the published model."""
    with HubServer() as server:
        monkeypatch.setattr(publish, "HfApi", partial(HfApi, endpoint=server.url, token="hf_dummy"))
        for name, value in server.client_env(tmp_path / "hf_home").items():
            monkeypatch.setenv(name, value)
        yield server


def test_a_model_is_published_in_one_commit(hub, tmp_path):
    folder = tmp_path / "model"
    save_model(folder)
    given = ["--model", str(folder), "--repo_id", "user/captioner", "--results", str(folder / "results.json")]
    publish.main([*given, "--license", "bsd-3-clause", "--datasets", "someone/images"])
    (commit,) = hub.commits("user/captioner")
    files = hub.files("user/captioner")
    assert commit["title"] == "Model, processor, code and card"
    expected = {"README.md", "captions.png", "config.json", "model.safetensors", "modeling_evlgen.py"}
    assert files.keys() >= expected | {"processing_evlgen.py", "processor_config.json", "tokenizer.json"}
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("checkpoint-")]

    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("bsd-3-clause", "image-to-text")
    assert card.data.datasets == ["someone/images"]
    results = [(r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert results == [("test", "cider", 139.1234), ("test", "cider", 120.5)]
    assert "| COCO Captions, Karpathy's splits (test) | 5000 | CIDEr-D [%] | 139.12 |" in card.text
    assert 'pipeline("image-to-text", model="user/captioner", trust_remote_code=True)' in card.text
    assert "captions.png" in card.text


def test_a_folder_is_written_instead_and_works(tmp_path, monkeypatch, capsys):
    towers = save_towers(tmp_path / "base")
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(**towers, connector_config=LAYERS)
    model.save_pretrained(tmp_path / "model", towers="reference")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    given = ["--model", str(tmp_path / "model"), "--folder", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    publish.main([*given, "--check", "true", "--image", "red.png"])
    assert "out generates: " in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The towers are in this repository" in card  # since nobody else has those folders
    assert 'model="out", trust_remote_code=True' in card  # by the folder's name, where no other is given
    assert "(`clip_vision_model`), frozen: vision, from a folder" in card and "(frozen). The 17 tokens" in card
    assert "Not evaluated." in card and "captions.png" not in card
    written = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md", ".jinja")]
    assert len(written) > 5 and not [path.name for path in written if str(tmp_path) in path.read_text()]
    with pytest.raises(ValueError, match=r"`towers` cannot be \"reference\": '.*vision' is not on the Hub"):
        publish.main([*given, "--towers", "reference"])
    with pytest.raises(ValueError, match="`folder` must differ from the model's folder"):
        publish.main([*given, "--folder", str(tmp_path / "model")])


def test_an_edited_card_is_not_overwritten_unasked(hub, tmp_path):
    """Weights of an earlier publication are deleted, since they would be loaded too. Other files stay."""
    save_model(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--repo_id", "user/captioner"]
    publish.main(given)
    publish.main([*given, "--license", "mit"])
    card = hub.files("user/captioner")["README.md"].decode()
    assert "license: mit" in card and not is_edited(card)
    edited = card.replace("## Limits", "## Limits\n\nNo night scenes.")
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}"}
    changes = {"README.md": edited.encode(), "notes.md": b"mine", **stale}
    hub.repos["models", "user/captioner"].commit("main", "edited", "", changes)
    with pytest.raises(ValueError, match=r"README.md of user/captioner was edited after .*\. --card keep"):
        publish.main(given)
    publish.main([*given, "--card", "keep"])
    assert hub.files("user/captioner")["README.md"].decode() == edited
    assert hub.files("user/captioner").keys() & changes.keys() == {"README.md", "notes.md"}
    publish.main([*given, "--card", "replace"])
    assert "night" not in hub.files("user/captioner")["README.md"].decode()
    assert is_edited("# Someone's") and not is_edited(sign("# Ours"))


def save_adapter(folder):
    """Saves a model in `base` and an adapter for it in `adapter`; returns the base model and the adapted one."""
    save_model(folder / "base")
    base = EVLGenForConditionalGeneration.from_pretrained(folder / "base")
    adapted = add_lora(base, LoraArguments())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    save_base(base.config, folder / "adapter")
    tiny_processor(base).save_pretrained(folder / "adapter")
    return base, adapted


def test_a_folder_holds_nothing_but_the_model(tmp_path):
    save_model(tmp_path / "model")
    out = tmp_path / "out"
    given = ["--model", str(tmp_path / "model"), "--folder", str(out)]
    publish.main(given)
    (tmp_path / "elsewhere.json").write_text("mine")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(tmp_path / "elsewhere.json")
    (out / ".gitattributes").touch()
    (out / "model-00001-of-00002.safetensors").touch()
    publish.main(given)
    assert (tmp_path / "elsewhere.json").read_text() == "mine"
    assert not (out / "config.json").is_symlink()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    written = (out / "config.json").stat()
    (out / ".env").write_text("TOKEN=secret")
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-2" / "optimizer.pt").touch()
    with pytest.raises(ValueError, match=r"out holds files that .*: \.env, checkpoint-2/optimizer\.pt"):
        publish.main(given)
    assert (out / "config.json").stat() == written


def test_links_lead_nowhere(tmp_path):
    """Neither is the file behind a link published, nor a folder behind one written to."""
    save_model(tmp_path / "model")
    out, given = tmp_path / "out", ["--model", str(tmp_path / "model"), "--folder", str(tmp_path / "out")]
    publish.main(given)
    (tmp_path / "elsewhere").mkdir()
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(tmp_path / "elsewhere")
    publish.main(given)
    for target in ("elsewhere", "nowhere"):
        (out / "linked").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="holds files that are not the model's: linked"):
            publish.main(given)
        (out / "linked").unlink()
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (out / "config.json").is_symlink()
    (tmp_path / "secret").write_text("password")
    (tmp_path / "model" / "captions.png").unlink()
    (tmp_path / "model" / "captions.png").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"cannot identify image file .*captions\.png"):
        publish.main(given)


def test_a_failed_upload_says_what_is_on_the_hub(hub, tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--repo_id", "user/captioner"]
    with monkeypatch.context() as patch, pytest.raises(HfHubHTTPError, match="Storage limit") as error:
        patch.setattr(hub, "commit", Mock(side_effect=HubError(403, "Storage limit")))
        publish.main(given)
    expected = "user/captioner is as it was, or empty if it is new. The same command tries again."
    assert expected in error.value.__notes__
    assert hub.files("user/captioner") == {}
    publish.main(given)
    assert "config.json" in hub.files("user/captioner")


def test_an_adapter_is_published_as_one_or_merged(hub, tmp_path, capsys):
    base, adapted = save_adapter(tmp_path)
    (tmp_path / "adapter" / "bad_rows.jsonl").write_text("a name that is nobody's business")
    given = ["--model", str(tmp_path / "adapter"), "--repo_id", "user/adapter", "--folder", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"is an adapter for .*base, which is not on the Hub\. Publish that"):
        publish.main(given)
    publish.main([*given, "--merge", "true"])
    adapted.merge_and_unload()
    merged = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.state_dict(), base.state_dict())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a vision tower (frozen)" in card and "a language model (adapted by LoRA)" in card
    assert merged.config.adapted_towers == ["text_model"]  # for cards to come

    publish.main(["--model", str(tmp_path / "base"), "--repo_id", "user/base"])
    # The adapter's configuration beside merged weights would apply the adapter once more.
    alone = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    for merge in ("false", "true"):
        publish.main([*given, "--base_model", "user/base", "--merge", merge, "--folder", str(tmp_path / "both")])
        assert alone & {path.name for path in (tmp_path / "both").iterdir()} == (alone if merge == "false" else set())
    given = ["--model", str(tmp_path / "adapter"), "--repo_id", "user/adapter", "--base_model", "user/base"]
    publish.main([*given, "--check", "true", "--image", str(tmp_path / "base" / "captions.png")])
    assert "user/adapter generates: " in capsys.readouterr().out
    files = hub.files("user/adapter")
    assert files.keys() >= {"adapter_model.safetensors", "base_model.json", "processor_config.json"}
    assert not files.keys() & {"model.safetensors", "bad_rows.jsonl"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (["user/base"], "peft")


def test_mistakes_are_named_before_anything_is_uploaded(hub, tmp_path):
    save_model(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), "--repo_id", "you/captioner"]
    (tmp_path / "bad.json").write_text(json.dumps({**RESULTS, "dataset": "coco"}))
    with pytest.raises(ValueError, match=r"`results`: .*bad.json is not the results.json of an evaluation"):
        publish.main([*given, "--results", str(tmp_path / "bad.json")])
    (tmp_path / "other.json").write_text(json.dumps(RESULTS))
    with pytest.raises(ValueError, match=r"other.json was measured on outputs/mine, whose weights differ"):
        publish.main([*given, "--results", str(tmp_path / "other.json")])
    with pytest.raises(ValueError, match="`merge` needs an adapter"):
        publish.main([*given, "--merge", "true", "--folder", str(tmp_path / "out")])
    (tmp_path / "model" / "captions.png").unlink()
    with pytest.raises(ValueError, match="`check` needs an `image`"):
        publish.main([*given, "--check", "true"])
    with pytest.raises(ValueError, match="`repo_id` must name the owner, as in you/captioner, but is 'captioner'"):
        publish.main(["--model", str(tmp_path / "model"), "--repo_id", "captioner"])
    assert hub.repos == {}


def test_the_card_names_its_data_and_the_decoding_in_words(tmp_path):
    settings = {"num_beams": 1, "min_new_tokens": 0, "max_new_tokens": 20, "length_penalty": 1.0, "prompt": "What?"}
    metrics = [{"type": f"bleu_{n}", "name": f"BLEU-{n} [%]", "value": 30.0} for n in (1, 4)]
    settings = RESULTS["settings"] | settings
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, "metrics": metrics, "settings": settings}))
    config = EVLGenConfig(training_data=["my_images", "jxie/coco_captions"])
    arguments = PublishArguments(repo_id="you/model", datasets=["a/b", "jxie/coco_captions"], model=str(tmp_path))
    card = model_card(arguments, config, 9e7, read_results([str(tmp_path / "results.json")]))
    assert card.data.datasets == ["a/b", "jxie/coco_captions"]
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in card.data.datasets]
    assert f"Data: {', '.join(links)}, `my_images`." in card.text
    assert "| 30.00 | the likeliest token each time, at most 20 tokens, the prompt `What?` |\n\n- BLEU-n" in card.text
    assert card.text.count("- BLEU-n") == 1
    unnamed = model_card(PublishArguments(repo_id="you/model"), EVLGenConfig(), 9e7, [])
    assert "The training data is not named." in unnamed.text


def test_the_papers_card_names_its_base_models(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    names = ["Salesforce/blip2-opt-2.7b", "facebook/opt-2.7b"]
    fields = {"vision_model_name_or_path": names[0], "text_model_name_or_path": names[1], "text_model_revision": "abc"}
    config = EVLGenConfig(**fields, temporal_contextualizer=True, towers="reference")
    arguments = PublishArguments(repo_id="you/video", license="mit", model=str(tmp_path))
    card = model_card(arguments, config, 9e7, read_results([str(tmp_path / "results.json")]))
    assert card.data.base_model == names
    assert card.data.pipeline_tag == "video-to-text"
    assert "The towers are loaded from the repositories named above." in card.text
    assert "| 120.50 | 5 beams, at least 8 tokens |\n\n- CIDEr-D counts" in card.text
    assert "score 100 to 150.\n- COCO Captions, Karpathy's splits: in-domain" in card.text and "BLEU" not in card.text
    assert "```bash\npip install transformers torchvision av\n```" in card.text
    assert "[facebook/opt-2.7b](https://huggingface.co/facebook/opt-2.7b), revision `abc`" in card.text
    assert "The model ignores the order of a video's frames." in card.text


def test_a_page_is_uploaded_as_a_static_space(hub, tmp_path, capsys):
    folder = tmp_path / "web"
    given = ["--model", str(folder), "--space", "user/captions", "--license", "bsd-3-clause"]
    (folder / "onnx").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`model`: .* holds no page"):
        publish.main(given)
    assert not hub.repos
    (folder / "index.html").write_text("page")
    (folder / "onnx" / "embed_tokens.onnx").write_bytes(b"float32")
    publish.main(given)
    files = hub.repos["spaces", "user/captions"].at("main").files
    assert {*files} == {"README.md", "index.html", "onnx/embed_tokens.onnx"}
    card = SpaceCard(files["README.md"].decode())
    assert (card.data.sdk, card.data.title, card.data.license) == ("static", "captions", "bsd-3-clause")
    (folder / "README.md").write_text(files["README.md"].decode() + "More.")
    (folder / "onnx" / "embed_tokens.onnx").rename(folder / "onnx" / "embed_tokens_quantized.onnx")
    publish.main(given)
    files = hub.repos["spaces", "user/captions"].at("main").files
    assert files["README.md"].endswith(b"More.")
    assert [name for name in files if name.startswith("onnx/")] == ["onnx/embed_tokens_quantized.onnx"]
    (folder / "README.md").unlink()  # as in a page that was exported anew
    publish.main(given)
    assert hub.repos["spaces", "user/captions"].at("main").files["README.md"].endswith(b"More.")
    assert capsys.readouterr().out.count("Published: ") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folder", "out"], "`space` uploads a page alone, and cannot be given with: folder"),
        (["--repo_id", "a/b", "--check", "true"], "given with: repo_id, check"),
        (["--space", "captions"], "`space` must name the owner, as in you/captions, but is 'captions'"),
    ],
)
def test_a_space_with_other_options_is_refused(options, message, hub, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "index.html").write_text("page")
    with pytest.raises(ValueError, match=message):
        publish.main(["--model", str(tmp_path), "--space", "user/captions", *options])
    assert not hub.repos
