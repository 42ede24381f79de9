"""examples/export_web.py: onnxruntime, Node and Chromium generate the ids of the model from the folder that it writes.

Tests in Node need EVLGEN_NODE_MODULES, and those in a browser EVLGEN_CHROMIUM too. CONTRIBUTING.md has the commands.
"""

import json
import os
import re
import shutil
import subprocess

import export
import export_web
import numpy as np
import pytest
import torch
from PIL import Image

from processing_evlgen.conversations import join_parts

from .documents import blocks_of_page
from .helpers import ROOT, TEXT_CONFIGS, generate_new, noise_images, save, serving, tiny_model, tiny_processor
from .training import flags, save_captioner

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
onnx_ir = pytest.importorskip("onnx_ir", reason="needs the export extra")
from benchmarks.browser import WebModel, compare  # noqa: E402

needs_node = pytest.mark.skipif("EVLGEN_NODE_MODULES" not in os.environ, reason="EVLGEN_NODE_MODULES names no folder")
needs_browser = pytest.mark.skipif(
    not {"EVLGEN_NODE_MODULES", "EVLGEN_CHROMIUM"} <= {*os.environ}, reason="EVLGEN_CHROMIUM names no browser"
)
SIZES = [(32, 32), (200, 120), (9, 31), (33, 47)]  # larger and smaller than the tower's 32 pixels
QUESTION = "what is it?"
PAGE = ROOT / "docs" / "serve.md"


def draw(size):
    return noise_images(1, max(size))[0].crop((0, 0, *size))


def build(text, **config):
    model = tiny_model(text=text, config=config)
    return model, tiny_processor(model, bos=text == "opt", chat=text in ("llama", "qwen2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model with its processor, and the folder of its page."""
    folder = tmp_path_factory.mktemp("llama")
    model, processor = build("llama")
    model.generation_config.max_new_tokens = 8
    save(folder / "model", model, processor)
    arguments = {"formats": "transformers.js", "output_dir": folder / "web", "page": "true"}
    export.main(flags(model=folder / "model", **arguments))
    return model, processor, folder / "web"


def expect(model, processor, image, question="", count=8):
    """The prompt's ids and those that the model generates."""
    inputs = processor(images=image, text=question)
    return inputs["input_ids"][0].tolist(), generate_new(model, inputs, max_new_tokens=count)[0].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_images_of_all_sizes_get_the_ids_of_generate(size, llama):
    model, processor, folder = llama
    web = WebModel(folder)
    image = draw(size)
    prompt, expected = expect(model, processor, image, QUESTION)
    assert web.generate(web.encode(image), prompt, 8) == expected


def test_the_benchmark_counts_equal_ids_and_bytes(llama):
    model, processor, folder = llama
    checkpoint = folder.parent / "model"
    header, _, own, web = compare(model, processor, checkpoint, [folder], noise_images(2)).splitlines()
    assert header == "| folder | MB of weights | equal of 2 | seconds |"
    assert own.startswith(f"| {checkpoint} | 0 | 2 | 0.") and web.startswith(f"| {folder} | 1 | 2 | 0.")


def test_the_graph_resizes_as_the_image_processor(tmp_path):
    processor = tiny_processor(tiny_model()).image_processor
    graph = export_web.export_vision(torch.nn.Identity(), processor)
    onnx_ir.save(graph, tmp_path / "pixels.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "pixels.onnx")
    level = 1 / 255 / torch.tensor(processor.image_std)[:, None, None]
    for size in SIZES:
        image = draw(size)
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()
        found = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])
        levels = (found - processor(image, return_tensors="pt")["pixel_values"]).abs() / level
        assert levels.max() < 1.01, size
        assert (levels > 0.5).float().mean() < 0.005, size  # four photographs: 0.2 to 0.3 %


SLOW_TEXTS = [pytest.param(text, marks=pytest.mark.slow) for text in ("qwen2", "gpt2")]


@pytest.mark.parametrize("text", ["llama", *SLOW_TEXTS, "opt"])
def test_each_language_model_generates_its_ids_from_an_empty_cache(text, tmp_path, request, monkeypatch):
    if text == "llama":
        model, processor, folder = request.getfixturevalue("llama")
    else:  # with one layer, which takes half as long
        fields = {**TEXT_CONFIGS[text].to_dict(), "num_hidden_layers": 1, "n_layer": 1, "layer_types": None}
        monkeypatch.setitem(TEXT_CONFIGS, text, type(TEXT_CONFIGS[text])(**fields))
        model, processor = build(text)
        assert model.config.text_config.num_hidden_layers == 1
        folder = tmp_path
        config, embedding = model.config, model.get_input_embeddings()
        graphs = {
            "embed_tokens": export_web.export_embedding(embedding, config),
            "decoder_model_merged": export_web.export_decoder(model.language_model),
        }
        files = export_web.describe(model, processor, config.num_image_tokens, "float32")
        export_web.write_web(folder, graphs, files, "float32", page=False)
    image = draw((40, 40))
    prompt, expected = expect(model, processor, image, QUESTION, count=60)
    with torch.no_grad():
        soft_prompt = model.get_image_features(processor(images=image)["pixel_values"]).pooler_output[0]
    assert WebModel(folder).generate(soft_prompt.numpy(), prompt, 60) == expected
    assert len(expected) == 60 or expected[-1] == model.generation_config.eos_token_id


def test_8_bits_take_a_quarter_and_change_little(llama, tmp_path):
    *_, folder = llama
    graphs = {path.stem: onnx_ir.load(path) for path in (folder / "onnx").iterdir()}
    names = ("config", "generation_config", "tokenizer")
    files = {f"{name}.json": json.loads((folder / f"{name}.json").read_text()) for name in names}
    files["config.json"]["transformers.js_config"]["dtype"] = "q8"
    (tmp_path / "onnx").mkdir()
    stale = tmp_path / "onnx" / "embed_tokens.onnx"
    stale.touch()
    for graph in graphs.values():
        export_web.quantize(graph.graph)
    export_web.write_web(tmp_path, graphs, files, "int8", page=False)
    assert sorted(path.stem for path in (tmp_path / "onnx").iterdir()) == sorted(
        f"{name}_quantized" for name in graphs
    )
    ids = np.array([[5, 6, 7]])
    exact, rounded = (WebModel(path).embed(ids) for path in (folder, tmp_path))
    np.testing.assert_allclose(rounded, exact, atol=np.abs(exact).max() / 250)
    assert np.abs(rounded - exact).max() > 0
    image = draw((40, 40))
    exact, rounded = (WebModel(path).encode(image) for path in (folder, tmp_path))
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.99


def test_the_page_tells_its_size_and_keeps_no_other_version(llama):
    *_, folder = llama
    assert {path.name for path in export_web.PAGE.iterdir()} <= {path.name for path in folder.iterdir()}
    download = json.loads((folder / "config.json").read_text())["download"]
    size = sum(path.stat().st_size for path in [*(folder / "onnx").iterdir(), folder / "tokenizer.json"])
    assert download["megabytes"] == pytest.approx(size / 1e6, rel=0.05)
    assert download["version"].startswith("evlgen-")


def test_a_documented_program_needs_onnxruntime_alone(llama, tmp_path, monkeypatch, capsys):
    model, processor, folder = llama
    draw((50, 40)).save(tmp_path / "image.png")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "web").symlink_to(folder)
    (block,) = (block.code for block in blocks_of_page(PAGE) if "InferenceSession" in block.code)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("_quantized", "").replace("< 30", "< 8"), PAGE, "exec"), {})
    _, expected = expect(model, processor, draw((50, 40)))
    assert capsys.readouterr().out.strip("\n") == processor.tokenizer.decode(expected, skip_special_tokens=True).strip(
        "\n"
    )


@pytest.mark.parametrize(
    ("processor", "changes", "message"),
    [
        ({"max_tiles": 4}, {}, "`max_tiles` must be 1, but is 4"),
        ({}, {"tile_grid": [2, 3]}, "`tile_grid` is not for `formats` transformers.js"),
        ({}, {"check": "true"}, "`check` is not for"),
        ({}, {"dtype": "bfloat16"}, "`dtype` must be float32 or int8 with `formats` transformers.js"),
        ({}, {"formats": ["onnx", "transformers.js"]}, "`formats` must be .* transformers.js alone"),
        ({}, {"formats": "onnx", "page": "true"}, "`page` is not for `formats` onnx"),
    ],
)
def test_what_a_browser_cannot_run_is_refused_before_anything_is_written(processor, changes, message, tmp_path):
    save_captioner(tmp_path / "model", tiny_model(), **processor)
    given = {"model": tmp_path / "model", "output_dir": tmp_path / "web", "formats": "transformers.js", **changes}
    with pytest.raises(ValueError, match=message):
        export.main(flags(**given))
    assert not (tmp_path / "web").exists()


def test_the_models_own_folder_is_not_overwritten(tmp_path):
    save_captioner(tmp_path, tiny_model())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="`output_dir` must differ from the model's folder"):
        export.main(flags(model=tmp_path, output_dir=tmp_path / ".", formats="transformers.js"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_an_adapter_has_to_be_merged_first(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it into its model first"):
        export.main(flags(model=tmp_path / "adapter", output_dir=tmp_path / "web", formats="transformers.js"))
    assert not (tmp_path / "web").exists()


def test_models_that_a_browser_cannot_run_are_refused_by_name():
    model, processor = build("llama", video_mode="merge")
    language_model = model.language_model
    with pytest.raises(ValueError, match="`model` is for videos"):
        export_web.export_web(export.SoftPrompt(model), language_model, processor, "float32")
    model, processor = build("llama")
    language_model, prompt = model.language_model, export.SoftPrompt(model)
    processor.image_processor.do_center_crop = True
    with pytest.raises(ValueError, match=r"its image processor must resize .* and crop nothing"):
        export_web.export_web(prompt, language_model, processor, "float32")


def test_special_tokens_that_a_tokenizer_adds_are_written_by_the_template():
    model, processor = tiny_model(), tiny_processor(tiny_model(), bos=True, chat=True)
    files = export_web.describe(model, processor, processor.num_image_tokens, "float32")
    assert files["tokenizer_config.json"]["chat_template"].startswith('{{ "<s>" }}')
    # It puts the image before BOS, which the exported template cannot.
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    processor.chat_template = join_parts(template, "<image>", "<video>")
    with pytest.raises(ValueError, match="its chat template cannot be exported"):
        export_web.describe(model, processor, processor.num_image_tokens, "float32")


def test_another_number_of_tokens_is_told_to_the_runtime():
    model = tiny_model()
    processor = tiny_processor(model, chat=True)
    processor.image_token_range = [2, 17]
    files = export_web.describe(model, processor, 5, "float32")
    assert files["processor_config.json"]["num_additional_image_tokens"] == 5


def test_a_tower_with_dynamic_code_is_named():
    model, processor = build("llama")
    language_model, forward = model.language_model, model.vision_tower.forward
    model.vision_tower.forward = lambda pixels, **given: forward(pixels * (2 if pixels.sum() > 0 else 1), **given)
    with pytest.raises(ValueError, match="CLIPVisionModel or LlamaForCausalLM cannot be exported"):
        export_web.export_web(export.SoftPrompt(model), language_model, processor, "float32")


def test_a_file_of_over_2_gb_is_refused(llama, monkeypatch):
    model, processor, folder = llama
    graph = onnx_ir.load(folder / "onnx" / "decoder_model_merged.onnx")
    monkeypatch.setattr(export_web, "MAX_BYTES", 100_000)
    for name in ("export_vision", "export_embedding", "export_decoder"):
        monkeypatch.setattr(export_web, name, lambda *given: graph)
    prompt = export.SoftPrompt(build("llama")[0])
    with pytest.raises(ValueError, match=r"its vision_encoder would be a file of 0\.0 GB, but 2 GB are the limit"):
        export_web.export_web(prompt, model.language_model, processor, "float32")


def run_node(script, *arguments):
    command = ["node", ROOT / "tests" / "web" / script, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture
def pictures(tmp_path):
    """Images with prompts, and the JSON file that lists them: of all sizes, turned, and with a question."""
    items = [{"image": tmp_path / f"{index}.png"} for index in range(len(SIZES))]
    for item, size in zip(items, SIZES, strict=True):
        draw(size).save(item["image"])
    turned, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.linear_gradient("L").convert("RGB").save(turned, exif=exif, quality=95)
    items += [{"image": turned}, {"image": items[1]["image"], "prompt": QUESTION}]
    return items


def write_items(folder, items):
    (folder / "items.json").write_text(json.dumps(items, default=str))
    return folder / "items.json"


@needs_node
def test_node_generates_the_ids_of_the_model(llama, pictures, tmp_path):
    model, processor, folder = llama
    pictures.append({"image": pictures[0]["image"], "settings": {"max_new_tokens": 60}})
    results = run_node("node.mjs", folder, write_items(tmp_path, pictures))
    for item, result in zip(pictures, results, strict=True):
        count = item.get("settings", {"max_new_tokens": 8})["max_new_tokens"]
        expected = expect(model, processor, item["image"], item.get("prompt", ""), count)
        assert (result["prompt"], result["ids"]) == expected, item


@needs_node
def test_the_documented_lines_of_javascript_work_in_node(llama, tmp_path):
    model, processor, folder = llama
    (block,) = (block.code for block in blocks_of_page(PAGE) if block.language == "js")
    (tmp_path / "caption.mjs").write_text(block)
    (tmp_path / "node_modules").symlink_to(os.environ["EVLGEN_NODE_MODULES"])
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "web").symlink_to(folder)
    draw((50, 40)).save(tmp_path / "image.png")
    printed = subprocess.run(["node", "caption.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    _, expected = expect(model, processor, tmp_path / "image.png")
    assert printed.strip("\n") == processor.tokenizer.decode(expected, skip_special_tokens=True).strip("\n")


@pytest.fixture
def local_page(llama, tmp_path):
    """The page's folder with its libraries beside it."""
    folder = shutil.copytree(llama[2], tmp_path / "web")
    (folder / "node_modules").symlink_to(os.environ["EVLGEN_NODE_MODULES"])
    script = (folder / "page.js").read_text()
    script = re.sub(r"https://cdn.jsdelivr.net/npm/([\w@/-]+)@[\w.-]+/", r"/node_modules/\1/", script)
    (folder / "page.js").write_text(script.replace('RUNTIME = "', 'RUNTIME = location.origin + "'))
    return folder


@needs_browser
def test_the_page_shows_the_captions_of_the_model(llama, local_page, pictures, tmp_path):
    model, processor, _ = llama
    transparent = draw((60, 60)).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((60, 60)).point(lambda value: 255 * (value > 99)))
    transparent.save(tmp_path / "transparent.png")
    pictures.append({"image": tmp_path / "transparent.png"})
    with serving(local_page) as url:
        found = run_node("chromium.mjs", f"{url}/index.html", write_items(tmp_path, [*pictures, {"image": "camera"}]))
        assert found.get("error") is None, found
        for item, caption in zip(pictures, found["captions"], strict=False):
            _, expected = expect(model, processor, item["image"], item.get("prompt", ""))
            assert caption["text"] == processor.tokenizer.decode(expected, skip_special_tokens=True), item
        assert found["captions"][-1]["text"]  # of the camera
        assert " MB. The browser keeps them." in found["offer"]
        assert all(request.removeprefix("blob:").startswith(url) for request in found["requests"])
        version = json.loads((local_page / "config.json").read_text())["download"]["version"]
        assert found["cached"][version] >= 8
        (tmp_path / "broken.png").write_bytes(b"no image")
        (local_page / "onnx" / "embed_tokens.onnx").unlink()
        items = [{"image": tmp_path / "broken.png"}, {"image": pictures[0]["image"]}]
        found = run_node("chromium.mjs", f"{url}/index.html", write_items(tmp_path, items))
    unread, failed = (caption["status"] for caption in found["captions"])
    assert unread.startswith("This image cannot be read")
    assert failed.startswith("It failed")
