"""examples/export.py: one file computes the model's soft prompts from pixels, without this repository's code."""

import json

import export
import pytest
import torch
from export import SoftPrompt, convert_to_onnx, export_graph
from safetensors.torch import save_file

from modeling_evlgen import EVLGenImageOutput

from .helpers import IMAGE_SIZE, noise_images, run_clean, tiny_model, tiny_processor
from .training import flags, save_captioner

CONNECTORS = {
    "tomeformer": {},
    "qformer": {"model_type": "evlgen_qformer", "num_query_tokens": 5},
    "qformer that chooses": {"model_type": "evlgen_qformer", "num_query_tokens": 5, "num_distinctive_tokens": 7},
    "mlp": {"model_type": "evlgen_mlp", "pool_size": 2},
}
SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def build(vision="clip", connector="tomeformer", **config):
    return tiny_model(vision, config=config, **CONNECTORS[connector])


def save(folder):
    model = tiny_model()
    save_captioner(folder, model)
    return model, tiny_processor(model)


@torch.no_grad()
def assert_same(prompt, run, **tolerance):
    for number in (1, 2, 5):
        pixels = torch.randn(number, 3, *SIZE)
        torch.testing.assert_close(run(pixels), prompt(pixels), **tolerance)


@pytest.mark.parametrize(
    ("vision", "connector"),
    [
        *((vision, "tomeformer") for vision in ("clip", "eva", "timm_cnn")),
        *(pytest.param(vision, "tomeformer", marks=pytest.mark.slow) for vision in ("siglip", "dinov2")),
        ("eva", "qformer"),
        ("clip", "qformer that chooses"),
        ("timm_cnn", "mlp"),
    ],
)
def test_a_graph_equals_the_model(vision, connector, tmp_path):
    model = build(vision, connector)
    pixels = torch.randn(3, 3, *SIZE)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
    prompt = SoftPrompt(model)
    program = export_graph(prompt, SIZE)
    torch.export.save(program, tmp_path / "soft_prompt.pt2")
    run = torch.export.load(tmp_path / "soft_prompt.pt2").module()
    assert torch.equal(run(pixels), expected)
    assert_same(prompt, run, atol=0, rtol=0)
    assert not any("language_model" in name for name in program.state_dict)


@pytest.mark.parametrize(
    "config",
    [
        {"temporal_contextualizer": True, "temporal_hidden_size": 8, "temporal_num_attention_heads": 2},
        {"video_mode": "merge"},
    ],
    ids=["contextualizer", "merge"],
)
@torch.no_grad()
def test_a_video_models_graph_takes_an_image_for_a_video_of_one_frame(config):
    model = build(**config)
    for contextualizer in model.temporal or ():
        contextualizer.alpha.fill_(0.5)
    if model.time_embedding is not None:
        model.time_embedding.weight.normal_()
    pixels = torch.randn(40, 3, *SIZE)  # more than go through the tower at a time
    expected = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(export_graph(SoftPrompt(model), SIZE).module()(pixels), expected)


@pytest.mark.parametrize(
    ("vision", "connector", "budget"),
    [
        pytest.param("timm_cnn", "qformer", None, marks=pytest.mark.slow),
        ("siglip", "mlp", None),
        ("clip", "tomeformer", 4),
    ],
)
def test_onnxruntime_equals_the_model(vision, connector, budget, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    model = build(vision, connector)
    model.config.image_token_range = None if budget is None else [2, 17]
    prompt = SoftPrompt(model, budget)
    convert_to_onnx(export_graph(prompt, SIZE), "pixel_values", "soft_prompt").save(tmp_path / "soft_prompt.onnx")
    run = export.load_exported("onnx", tmp_path / "soft_prompt.onnx")
    assert_same(prompt, run, atol=1e-5, rtol=1e-4)


def test_exported_files_run_without_this_repository(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the export extra")
    model, processor = save(tmp_path / "model")
    out = tmp_path / "out"
    given = ["--model", str(tmp_path / "model"), "--output_dir", str(out), "--formats", "pt2", "onnx"]
    export.main([*given, "--check", "true"])
    assert capsys.readouterr().out.count("checked: relative differences of 8 soft prompts") == 2
    pixels = processor.image_processor(noise_images(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        save_file({"pixels": pixels, "soft_prompt": model.get_image_features(pixels).pooler_output}, out / "expected")
    code = """
import sys
sys.modules["transformers"] = None
import onnxruntime, torch
from safetensors.torch import load_file
expected, files = load_file("out/expected"), {"image_processor.json": ""}
program = torch.export.load("out/soft_prompt.pt2", extra_files=files).module()
torch.testing.assert_close(program(expected["pixels"]), expected["soft_prompt"])
session = onnxruntime.InferenceSession("out/soft_prompt.onnx")
(soft_prompt,) = session.run(["soft_prompt"], {"pixel_values": expected["pixels"].numpy()})
torch.testing.assert_close(torch.from_numpy(soft_prompt), expected["soft_prompt"], atol=1e-4, rtol=1e-4)
assert session.get_modelmeta().custom_metadata_map["image_processor.json"] == files["image_processor.json"]
print(files["image_processor.json"])
"""
    settings = json.loads(run_clean(code, tmp_path))
    assert settings["image_mean"] == list(processor.image_processor.image_mean)


def test_generate_takes_an_exported_soft_prompt(tmp_path):
    model, processor = save(tmp_path / "model")
    export.main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    run = torch.export.load(tmp_path / "out" / "soft_prompt.pt2").module()
    inputs = processor(images=noise_images(2), text=["what is it?", "what?"])
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    soft_prompt = EVLGenImageOutput(pooler_output=run(inputs.pop("pixel_values")))
    words = model.generate(**inputs, mm_encoder_outputs={"image": soft_prompt}, max_new_tokens=5, do_sample=False)
    assert torch.equal(words, expected)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_a_checkpoint_with_tiles_exports_a_graph_for_one_grid(grid, tmp_path, capsys):
    model, processor = save(tmp_path / "model")
    processor.max_tiles, model.config.image_token_range = 6, [2, 17]
    processor.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    given = ["--model", str(tmp_path / "model"), "--output_dir", str(out), "--num_image_tokens", "5"]
    export.main([*given, "--check", "true", "--tile_grid", *map(str, grid)])
    printed = capsys.readouterr().out
    assert f"The graph takes images of {grid[0]} x {grid[1]} tiles. The processor's max_tiles is 6." in printed
    assert "checked" in printed
    size = grid[1] * IMAGE_SIZE, grid[0] * IMAGE_SIZE
    inputs = processor([image.resize(size) for image in noise_images()])
    assert inputs["image_grid_thw"].tolist() == [[1, *grid]] * 2
    with torch.no_grad():
        expected = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], image_budgets=[5, 5])
    tiles = inputs["pixel_values"] if grid == (1, 1) else inputs["pixel_values"].unflatten(0, (-1, 6))
    torch.testing.assert_close(torch.export.load(out / "soft_prompt.pt2").module()(tiles), expected.pooler_output)


def test_a_model_that_takes_one_tile_exports_no_grid():
    model = tiny_model(model_type="evlgen_mlp")
    with pytest.raises(ValueError, match="`tile_grid` of 6 tiles"):
        SoftPrompt(model, grid=(2, 3))


def test_the_check_notices_another_result(tmp_path):
    path, models = tmp_path / "soft_prompt.pt2", [build(), build()]
    with torch.no_grad():
        models[1].language_projection.bias[0] += 1e-2
    torch.export.save(export_graph(SoftPrompt(models[1]), SIZE), path)
    with pytest.raises(RuntimeError, match=r"soft_prompt\.pt2 differs from the model"):
        export.compare(SoftPrompt(models[0]), SIZE, "pt2", path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ["pt2", "tflite"]}, r"`formats` .* \['pt2', 'tflite'\]"),
        ({"formats": ["onnx"], "dtype": "bfloat16"}, "`dtype` must be float32 with `formats` onnx"),
        ({"tile_grid": ["11", "10"]}, r"at most 100 tiles, .* \[11, 10\]"),
        ({"tile_grid": ["2"]}, r"`tile_grid` .* \[2\]"),
        ({"num_image_tokens": "12"}, r"`num_image_tokens` must be from 11 to 11, .* \[12\]"),
    ],
)
def test_what_cannot_be_exported_is_refused(changes, message, tmp_path):
    save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export.main(flags(model=tmp_path / "model", output_dir=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
