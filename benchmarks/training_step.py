"""What a training step costs, and a generated caption: EVLGen, the Q-Former and MLPs on the same frozen towers.

    python -m benchmarks.training_step

At the demo's size (EfficientNet-Lite0's 196 tokens) and at that of CLIP ViT-L/14 (257 tokens), both with a language
model of SmolLM2-135M's shape, random weights, batches of 16, bfloat16 autocast, from cached vision features. The
candidates share the frozen towers and take turns, so that a busy machine slows all of them alike; medians are printed.
Peak memory is that of a process of its own. Beside each stands how near its matrix products come to the rate that this
machine reaches on one large product. `--what steps` prints instead what each change of several to EVLGen's step saves.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, TimmWrapperConfig

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .timing import measure, take_turns

BATCH, PROMPT, CAPTION = 16, 10, 10
VISION = {
    "demo": {
        "vision_config": TimmWrapperConfig(
            architecture="tf_efficientnet_lite0", model_args={"features_only": True, "out_indices": [3]}
        ),
        "num_vision_tokens": 196,
        "vision_hidden_size": 112,
    },
    "clip-l": {
        "vision_config": CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        )
    },
}
TEXT = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    pad_token_id=2,
)
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DEMO = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "intermediate_size": 1536,
    **_NO_DROPOUT,
}
_CLIP = {**_DEMO, "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 3072}
_MLP = {"model_type": "evlgen_mlp"}
_QFORMER = {"model_type": "evlgen_qformer"}
CONNECTORS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "EVLGen, front-loaded": {
            **_DEMO,
            "merge_r": [98, 49, 24],
            "pre_norm": True,
            "branch_initializer_range": 0.0,
            "output_position_initializer_range": 1.0,
            "merge_metric": "hidden_states",
        },
        "EVLGen, r = 57": {**_DEMO, "merge_r": 57},
        "Q-Former, 25 queries": {**_DEMO, **_QFORMER, "intermediate_size": 1024, "num_query_tokens": 25},
        "MLP on 5 x 5 means": {**_MLP, "hidden_size": 384, "intermediate_size": 6912, "pool_size": 5},
        "MLP on all tokens": {**_MLP, "hidden_size": 384, "intermediate_size": 6912},
    },
    "clip-l": {
        "EVLGen, front-loaded": {
            **_CLIP,
            "merge_r": [128, 64, 32, 4],
            "pre_norm": True,
            "branch_initializer_range": 0.0,
            "output_position_initializer_range": 1.0,
            "merge_metric": "hidden_states",
        },
        "EVLGen, r = 38": {**_CLIP, "merge_r": 38},
        "Q-Former, 29 queries": {**_CLIP, **_QFORMER, "intermediate_size": 2048, "num_query_tokens": 29},
        "MLP on 5 x 5 means": {**_MLP, "hidden_size": 768, "intermediate_size": 27648, "pool_size": 5},
        "MLP on all tokens": {**_MLP, "hidden_size": 768, "intermediate_size": 27648},
    },
}


def build(size: str, connector: str) -> EVLGenForConditionalGeneration:
    torch.manual_seed(0)
    fields = {**CONNECTORS[size][connector], "class_token": size != "demo"}
    config = EVLGenConfig(**VISION[size], connector_config=fields, text_config=TEXT)
    return EVLGenForConditionalGeneration(config).train()


def batch_of(model: EVLGenForConditionalGeneration, size: int = BATCH) -> dict[str, torch.Tensor]:
    """Vision features, a prompt and a caption."""
    config = model.config
    text = torch.randint(3, 49152, (size, PROMPT + CAPTION), generator=torch.Generator().manual_seed(0))
    images = torch.full((size, config.num_image_tokens), config.image_token_id)
    input_ids = torch.cat([images, text], dim=1)  # (batch, image tokens + text)
    labels = input_ids.clone()
    labels[:, :-CAPTION] = -100
    return {
        "vision_features": torch.randn(size, config.num_vision_tokens, config.vision_hidden_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
    }


def parts_of_a_step(
    model: EVLGenForConditionalGeneration, settings: dict[str, Any] | None = None
) -> dict[str, Callable[[], None]]:
    """The whole step, with `settings` for `forward`, and those of its parts that can run alone."""
    batch = {**batch_of(model), **(settings or {})}
    hidden = torch.randn(BATCH * CAPTION, TEXT.hidden_size, requires_grad=True)
    targets = batch["labels"][batch["labels"] != -100]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)

    def connector() -> None:
        with autocast:
            prompt = model.project_vision_features(batch["vision_features"]).pooler_output
        prompt.float().sum().backward()
        model.zero_grad()

    def head() -> None:
        with autocast:
            logits = model.language_model.lm_head(hidden)
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()

    return {
        "step": training_step(model, batch),
        "connector": connector,
        "head": head,
    }


def tower_run(model: EVLGenForConditionalGeneration) -> Callable[[], None]:
    """The frozen vision tower's work for a step, which cached features save."""
    pixel_values = torch.randn(BATCH, 3, 224, 224)

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model.get_vision_features(pixel_values)

    return run


def training_step(model: torch.nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """A whole step of training, whose learning rate lets the model stay about as it is."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generation(model: EVLGenForConditionalGeneration) -> Callable[[], None]:
    """Captions of exactly 10 tokens for 8 images, by 5 beams."""
    batch = batch_of(model, 8)
    inputs = {name: batch[name] for name in ("vision_features", "input_ids", "attention_mask")}
    inputs["input_ids"], inputs["attention_mask"] = (
        inputs[name][:, :-CAPTION] for name in ("input_ids", "attention_mask")
    )

    def generate() -> None:
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.generate(**inputs, num_beams=5, min_new_tokens=CAPTION, max_new_tokens=CAPTION, do_sample=False)
        model.train()

    return generate


def count_flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def matrix_rate(rounds: int) -> float:
    """Floating-point operations per second of one large bfloat16 product: the median round."""
    a, b = (torch.randn(4096, 4096, dtype=torch.bfloat16) for _ in range(2))
    seconds = sorted(measure(lambda: a @ b, torch.device("cpu")) for _ in range(rounds))
    return 2 * 4096**3 / seconds[rounds // 2]


def peak_megabytes(size: str, connector: str) -> float:
    """Of one step, in a process of its own, over what the process held before it."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak", size, connector]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


# From the first version of this repository on, each with those before it.
STEPS = {
    "r = 57, float32 language model, all logits": {"connector": "EVLGen, r = 57", "all_logits": True},
    "+ logits of the captions alone": {"connector": "EVLGen, r = 57"},
    "+ front-loaded merging": {"connector": "EVLGen, front-loaded"},
    "+ bfloat16 language model": {"connector": "EVLGen, front-loaded", "bfloat16": True},
    "+ torch.compile of the language model": {"connector": "EVLGen, front-loaded", "bfloat16": True, "compile": True},
}


def print_steps(rounds: int) -> None:
    """What each change of `STEPS` saves, at the demo's size."""
    runs = {}
    for name, change in STEPS.items():
        model = build("demo", change["connector"])
        if change.get("bfloat16"):
            model.language_model.to(torch.bfloat16)
        if change.get("compile"):
            model.language_model.compile()
        runs[name] = parts_of_a_step(model, {"logits_to_keep": 0} if change.get("all_logits") else {})["step"]
    seconds = take_turns(runs, rounds, torch.device("cpu"))
    reference = seconds[next(iter(STEPS))]
    print("| step | time | speed |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value / reference:.2f} | {reference / value:.2f} x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="Rounds over which medians are taken.")
    parser.add_argument("--what", choices=("connectors", "steps"), default="connectors", help="What to compare.")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        model = build(*arguments.peak)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts_of_a_step(model)["step"]()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    if arguments.what == "steps":
        print_steps(arguments.rounds)
        return
    # Before this process grows: on Linux, a new process starts with its parent's peak as its own.
    peaks = {size: {name: peak_megabytes(size, name) for name in names} for size, names in CONNECTORS.items()}
    for size, peaks_of_size in peaks.items():
        print_table(size, peaks_of_size, arguments.rounds)


def share_towers(models: list[EVLGenForConditionalGeneration]) -> None:
    """Gives all models the frozen towers of the first: no one is faster for where its copy lies in memory."""
    for model in models[1:]:
        model.vision_tower, model.language_model = models[0].vision_tower, models[0].language_model


def print_table(size: str, peaks: dict[str, float], rounds: int) -> None:
    candidates = list(peaks)
    models = {name: build(size, name) for name in candidates}
    share_towers(list(models.values()))
    runs, flops, tokens = {}, {}, {}
    for name, model in models.items():
        parts = parts_of_a_step(model)
        flops[name], tokens[name] = count_flops(parts["step"]), model.config.num_image_tokens
        runs |= {(name, part): run for part, run in parts.items()}
        runs[name, "generation"] = generation(model)
    runs["tower"] = tower_run(models[candidates[0]])
    seconds = take_turns(runs, rounds, torch.device("cpu"))
    rate = matrix_rate(rounds)
    reference = seconds[candidates[0], "step"]
    print(f"\n{size}: {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s on one large product\n")
    columns = "connector | tokens | step | images/s | with the tower | connector | LLM, optimizer | head | GEMM rate"
    columns += " | peak | beam 5"
    print(f"| {columns} |\n{'|---' * 11}|")
    for name in candidates:
        step, connector, head, words = (seconds[name, part] for part in ("step", "connector", "head", "generation"))
        cells = [
            name,
            str(tokens[name]),
            f"{step / reference:.2f}",
            f"{BATCH / step:.1f}",
            f"{BATCH / (step + seconds['tower']):.1f}",
            f"{connector / step:.0%}",
            f"{(step - connector - head) / step:.0%}",
            f"{head / step:.0%}",
            f"{flops[name] / step / rate:.0%}",
            f"{peaks[name]:.0f} MB",
            f"{words / seconds[candidates[0], 'generation']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
