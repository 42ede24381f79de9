"""Measures time and memory on this machine, and prints a table of docs/speed.md.

    python -m benchmarks.speed connectors

The first argument says what is measured:

- connectors: TomeFormer, BERT and Q-Former of BERT-base's size, alone
- steps: a training step and generation with each connector, beside the same frozen towers
- changes: what each of several changes saves of EVLGen's step
- texts: a step with five captions or questions of each image in one row, beside a row for each
- tokens: the soft prompt and the caption with 4 to 144 tokens of an image
- tower: layouts of a convolutional vision tower, and its compilation
- cached-features: a step from cached features and from images
- quantization: a language model in float32, bfloat16, int8 and int4
- export: a soft prompt in PyTorch, as a graph of torch.export, and in onnxruntime
- videos: the soft prompt of 1 to 256 frames

Candidates take turns, so that other processes slow all of them alike. Times are medians. Most models have the size of
the demo or of a recipe, and random weights.
"""

import argparse
import copy
import tempfile
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModel, CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, ViTConfig, ViTModel

from common.arguments import parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import build_model
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.vision_tower import extract_vision_tokens
from processing_evlgen import EVLGenProcessor

from .models import (
    BATCH,
    CAPTION,
    CROWDED_RECIPE,
    EVA_WIDTH,
    LITE0,
    PROMPT,
    SIZES,
    SMOLLM2_135M,
    Step,
    batch_of_texts,
    bert_base_connectors,
    build,
    forward_and_backward,
    generation,
    random_batch,
    random_step,
    share_towers,
    training_step,
)
from .results import markdown_table
from .timing import in_new_process, measure, peak_megabytes, take_turns

VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
FRONT_LOADED = {257: [128, 64, 32, 4], 577: [288, 144, 72, 36, 8]}  # leave 29 tokens, as r = 19 does of 257


def compare_connectors(rounds: int) -> None:
    """They read EVA ViT-g's tokens, 257 of an image of 224 pixels or 577 of one of 336, in float32."""
    for num_tokens, front_loaded in FRONT_LOADED.items():
        models = bert_base_connectors(num_tokens, front_loaded)
        tokens = torch.randn(2, num_tokens, EVA_WIDTH)
        with torch.no_grad():
            lengths = [model(tokens).shape[1] for model in models.values()]
            forward = take_turns({name: partial(model, tokens) for name, model in models.items()}, rounds)
        steps = {name: partial(forward_and_backward, model, tokens) for name, model in models.items()}
        columns = [_relative(times) for times in (forward, take_turns(steps, rounds))]
        print(f"\n{num_tokens} tokens, {torch.get_num_threads()} threads\n")
        header = ["connector", "tokens out", "forward", "forward and backward"]
        print(markdown_table(header, zip(models, lengths, *columns, strict=True)))


def _relative(seconds: dict[Any, float]) -> list[str]:
    """Times relative to the first one."""
    first = next(iter(seconds.values()))
    return [f"{value / first:.2f}" for value in seconds.values()]


# steps and changes: batches of 16 images, cached features, bfloat16 autocast, a language model like SmolLM2-135M


def compare_steps(rounds: int) -> None:
    for size, configs in SIZES.items():
        # Before this process grows: on Linux, a new process starts with its parent's peak as its own.
        peaks = [in_new_process(_peak_of_a_step, config) for config in configs.values()]
        models = {name: build(config) for name, config in configs.items()}
        share_towers(list(models.values()))
        encode = torch.autocast("cpu", dtype=torch.bfloat16)(next(iter(models.values())).get_vision_features)
        runs: dict[Any, Step] = {"tower": partial(encode, torch.randn(BATCH, 3, 224, 224))}
        for name, model in models.items():
            runs |= {(name, "step"): random_step(model), (name, "generation"): generation(model)}
        seconds = take_turns(runs, rounds)
        steps, generations = ({name: seconds[name, part] for name in models} for part in ("step", "generation"))
        rows = zip(
            models,
            [model.config.num_image_tokens for model in models.values()],
            _relative(steps),
            [f"{BATCH / (step + seconds['tower']):.1f}" for step in steps.values()],
            [f"{peak:.0f}" for peak in peaks],
            _relative(generations),
            strict=True,
        )
        print(f"\n{size}, {torch.get_num_threads()} threads\n")
        header = ["connector", "tokens", "step", "images/s", "peak [MB]", "5 beams"]
        print(markdown_table(header, rows))


def _peak_of_a_step(config: EVLGenConfig) -> float:
    """Peak memory of one step in MB, beyond that of the process before it."""
    step = random_step(build(config))
    before = peak_megabytes()
    step()
    return peak_megabytes() - before


def compare_changes(rounds: int) -> None:
    """Each change keeps those before it."""
    front_loaded, constant, *_ = SIZES["demo"].values()

    def step(config: EVLGenConfig, dtype: torch.dtype = torch.float32, compiled: bool = False, **others: Any) -> Step:
        model = build(config)
        model.language_model.to(dtype)
        if compiled:
            model.language_model.compile()
        return training_step(model, repeat({**random_batch(model), **others}))

    runs = {
        "constant merging, float32 language model, all logits": step(constant, logits_to_keep=0),
        "+ logits of the captions alone": step(constant),
        "+ front-loaded merging": step(front_loaded),
        "+ bfloat16 language model": step(front_loaded, torch.bfloat16),
        "+ torch.compile of the language model": step(front_loaded, torch.bfloat16, compiled=True),
    }
    seconds = take_turns(runs, rounds)
    first = next(iter(seconds.values()))
    print(markdown_table(["step", "images/s"], [[name, f"{first / value:.2f} x"] for name, value in seconds.items()]))


# texts: the demo's model, with five texts for each of 16 images

TEXTS = {"captions of 10 tokens": (PROMPT, 0, CAPTION), "questions of 10 tokens, answers of 3": (0, PROMPT, 3)}


def compare_texts(rounds: int) -> None:
    """Pairs per second relative to separate rows with fused attention (sdpa) in the language model."""
    model = build(SIZES["demo"]["EVLGen, front-loaded"])
    layouts = [(shared, attention) for shared in (False, True) for attention in ("sdpa", "eager")]
    rows = []
    for name, lengths in TEXTS.items():
        for cached in (True, False):
            steps = {}
            for shared in (False, True):
                batch = batch_of_texts(model, BATCH, 5, *lengths, shared=shared)
                if not cached:
                    batch["pixel_values"] = torch.randn(len(batch.pop("vision_features")), 3, 224, 224)
                steps[shared] = training_step(model, repeat(batch))

            def run(shared: bool, attention: str, steps: dict[bool, Step] = steps) -> None:
                model.language_model.set_attn_implementation(attention)
                steps[shared]()

            seconds = take_turns({layout: partial(run, *layout) for layout in layouts}, rounds)
            ratios = [f"{seconds[layouts[0]] / value:.2f}" for value in seconds.values()]
            rows.append([f"{name}, {'cached features' if cached else 'with the tower'}", *ratios])
    print(f"{torch.get_num_threads()} threads\n")
    header = [f"{'shared' if shared else 'separate'}, {attention}" for shared, attention in layouts]
    print(markdown_table(["five texts an image", *header], rows))


# tokens: a model of crowded.yaml's size, and batches of 8 images without the tower

NUMBERS = (4, 9, 16, 25, 64, 144)


def compare_numbers_of_tokens(rounds: int) -> None:
    connector = yaml.safe_load(CROWDED_RECIPE.read_text(encoding="utf-8"))["connector_config"]
    connector |= {"model_type": "evlgen_qformer", "num_query_tokens": max(NUMBERS), "class_token": False}
    fields = {"connector_config": connector, "image_token_range": [min(NUMBERS), max(NUMBERS)]}
    fields |= {"vision_config": LITE0, "num_vision_tokens": 784, "vision_hidden_size": 112}
    model = build(EVLGenConfig(**fields, text_config=SMOLLM2_135M))
    features = random_batch(model, 8)["vision_features"]

    @torch.no_grad()
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def encode(number: int) -> None:
        model.eval().project_vision_features(features, image_budgets=[number] * len(features))

    runs = {(number, "encode"): partial(encode, number) for number in NUMBERS}
    runs |= {(number, "caption"): generation(model, beams=1, tokens=number) for number in NUMBERS}
    seconds = take_turns(runs, rounds)
    rows = [
        [number, *(f"{1e3 * seconds[number, part] / 8:.0f}" for part in ("encode", "caption"))] for number in NUMBERS
    ]
    print(markdown_table(["tokens", "soft prompt [ms]", "with the caption [ms]"], rows))


# tower: the demo's EfficientNet-Lite0 in float32

SHAPE = (16, 3, 224, 224)  # images, channels, height and width


@torch.no_grad()
def compare_layouts_of_a_tower(rounds: int) -> None:
    """`NCHW` calls the tower without EVLGen's code. `compiled` folds constants into the weights."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(LITE0).eval().requires_grad_(False)
    pixel_values = torch.randn(SHAPE)
    channels_last = copy.deepcopy(tower).to(memory_format=torch.channels_last)
    compiled = torch.compile(extract_vision_tokens, options={"freezing": True})

    def without_conversion() -> torch.Tensor:
        (feature_map,) = tower(pixel_values=pixel_values).last_hidden_state  # (images, dim, height, width)
        return feature_map.flatten(2).transpose(1, 2)  # (images, tokens, dim)

    runs = {
        "NCHW": without_conversion,
        "pixels channels-last": partial(extract_vision_tokens, tower, pixel_values),
        "pixels and weights channels-last": partial(extract_vision_tokens, channels_last, pixel_values),
        "pixels channels-last, compiled": partial(compiled, tower, pixel_values),
    }
    expected, seconds = runs["NCHW"](), take_turns(runs, rounds)
    differences = [f"{(run() - expected).abs().max() / expected.abs().max():.1e}" for run in runs.values()]
    speeds = [f"{seconds['NCHW'] / value:.2f}" for value in seconds.values()]
    print(f"{torch.get_num_threads()} threads\n")
    print(markdown_table(["layout", "images/s", "largest difference"], zip(runs, speeds, differences, strict=True)))


# cached-features: a ViT-S, with the demo's data, connector, language model and recipe


def compare_cached_features(rounds: int) -> None:
    import pretrain  # not above: a script changes how threads wait

    tower = ViTConfig(**VIT_S)
    with tempfile.TemporaryDirectory() as folder:
        ViTModel(tower, add_pooling_layer=False).save_pretrained(folder)
        size = {"height": tower.image_size, "width": tower.image_size}
        CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
        rows = []
        for dtype in ("float32", "bfloat16"):
            argv = ["--vision_model", folder, "--output_dir", folder, "--dtype", dtype]
            argv += ["--max_train_samples", "160", "--max_test_samples", "16"]
            recipe = parse_arguments(*pretrain.ARGUMENTS, argv=argv, recipe=pretrain.DEMO_RECIPE)
            model_args, processor_args, data_args, _, training_args = recipe
            images, test = load_datasets(data_args, training_args.seed)
            model, processor = build_model(model_args, processor_args)
            cached, _ = cache_features(model, processor, images, test, data_args, training_args.seed)
            collator = CaptionCollator(processor, data_args, training=True, seed=training_args.seed)
            batches = partial(
                DataLoader,
                batch_size=training_args.per_device_train_batch_size,
                collate_fn=collator,
                drop_last=True,
            )
            steps = {
                name: training_step(model.train(), chain.from_iterable(repeat(batches(data))))
                for name, data in (("images", images), ("cached features", cached))
            }
            seconds = take_turns(steps, rounds)
            rows.append([dtype, f"{seconds['images'] / seconds['cached features']:.2f} x"])
    print(f"{torch.get_num_threads()} threads\n")
    print(markdown_table(["towers", "images/s from cached features, relative to those from images"], rows))
    text = torch.cat([batch["attention_mask"].flatten() for batch in batches(cached)])
    print(f"\n{1 - text.double().mean():.1%} of the tokens are padding.")


# quantization and export


def compare_quantization(rounds: int) -> None:
    """All candidates are loaded from one checkpoint, quantised as by `--text_quantization`."""
    from finetune import quantization_config

    arguments = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}
    arguments |= {name: {"quantization_config": quantization_config(name)} for name in ("int8", "int4")}
    with tempfile.TemporaryDirectory() as folder:
        build(SIZES["demo"]["EVLGen, front-loaded"]).save_pretrained(folder)
        load = EVLGenForConditionalGeneration.from_pretrained
        models = {name: load(folder, **others).train() for name, others in arguments.items()}
    steps = take_turns({name: random_step(model) for name, model in models.items()}, rounds)
    generations = take_turns({name: generation(model) for name, model in models.items()}, rounds)
    sizes = [f"{_language_model_bytes(model) / 1e6:.4g}" for model in models.values()]
    rows = zip(models, sizes, _relative(steps), _relative(generations), strict=True)
    print(markdown_table(["language model", "MB", "training step", "generation, 5 beams"], rows))


def _language_model_bytes(model: EVLGenForConditionalGeneration) -> int:
    """Size of the language model's weights, packed as they are."""
    tensors = []
    for parameter in model.language_model.parameters():
        flatten = getattr(parameter, "__tensor_flatten__", None)  # torchao's subclasses hold several tensors
        tensors += [getattr(parameter, name) for name in flatten()[0]] if flatten else [parameter]
    return sum(tensor.nbytes for tensor in tensors)


def compare_export(rounds: int, captioner: str) -> None:
    """From pixels to soft prompt, in float32. Needs `.[export]`."""
    from export import SoftPrompt, convert_to_onnx, example_pixels, export_graph, load_exported

    prompt = SoftPrompt(EVLGenForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32))
    size = EVLGenProcessor.from_pretrained(captioner).image_processor.size
    program = export_graph(prompt, (size["height"], size["width"]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "soft_prompt.onnx")
        convert_to_onnx(program).save(path)
        formats = {"PyTorch": prompt, "torch.export": program.module(), "onnxruntime": load_exported("onnx", path)}
    rows = []
    for batch in (1, 8):
        pixel_values = example_pixels(prompt, (size["height"], size["width"]), batch)
        with torch.no_grad():
            seconds = take_turns({name: partial(run, pixel_values) for name, run in formats.items()}, rounds)
        rows.append([batch, *_relative(seconds)])
    print(f"{torch.get_num_threads()} threads\n")
    print(markdown_table(["images", *formats], rows))


# videos: a ViT-S tower and a TomeFormer of its width at inference, in float32

FRAMES = (1, 4, 16, 64, 256)  # lengths of the videos
VIDEO_MODES: dict[str, dict[str, Any]] = {
    "mean of frames": {},
    "temporal contextualizer": {"temporal_contextualizer": True},
    "merged frames": {"video_mode": "merge"},
}


def compare_videos(rounds: int) -> None:
    rows = []
    for frames in FRAMES:
        row = [frames]
        for fields in VIDEO_MODES.values():
            seconds, megabytes = in_new_process(_measure_frames, fields, frames, rounds)
            row += [f"{1e3 * seconds / frames:.1f}", f"{megabytes:.0f}"]
        rows.append(row)
    columns = [column for mode in VIDEO_MODES for column in (f"{mode}: time per frame [ms]", "memory [MB]")]
    print(markdown_table(["frames", *columns], rows))


@torch.no_grad()
def _measure_frames(fields: dict[str, Any], frames: int, rounds: int) -> tuple[float, float]:
    """The seconds of the median round, and the peak memory in MB beyond that of the model with one frame."""
    text = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    tower = CLIPVisionConfig(**VIT_S, image_size=224, patch_size=16)
    connector = {**VIT_S, "merge_r": 14}
    model = build(EVLGenConfig(vision_config=tower, connector_config=connector, text_config=text, **fields)).eval()
    videos = torch.randn(1, frames, 3, 224, 224)
    model.get_video_features(videos[:, :1])
    before = peak_megabytes()
    seconds = median(measure(partial(model.get_video_features, videos)) for _ in range(rounds))
    return seconds, peak_megabytes() - before


STOPWATCHES = {
    "connectors": compare_connectors,
    "steps": compare_steps,
    "changes": compare_changes,
    "texts": compare_texts,
    "tokens": compare_numbers_of_tokens,
    "tower": compare_layouts_of_a_tower,
    "cached-features": compare_cached_features,
    "quantization": compare_quantization,
    "export": compare_export,
    "videos": compare_videos,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=STOPWATCHES, help="What is measured.")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds over which medians are taken.")
    parser.add_argument("--model", default="outputs/demo", help="export: a captioner, by folder or name on the Hub.")
    arguments = parser.parse_args(argv)
    others = {"captioner": arguments.model} if arguments.what == "export" else {}
    STOPWATCHES[arguments.what](arguments.rounds, **others)


if __name__ == "__main__":
    main()
