"""Writes the model card of a published model: parts, usage, training data, evaluation, limits and licence."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_evlgen import EVLGenConfig
from modeling_evlgen.fingerprints import TOWERS, is_on_hub

PAPER = "https://arxiv.org/abs/2310.03291"
CONNECTORS = {"tomeformer": "a TomeFormer", "evlgen_qformer": "a Q-Former", "evlgen_mlp": "an MLP"}

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }}
{% if sheet %}
![Held-out images and the model's captions](captions.png)
{% endif %}
## How to use

The repository contains the model's code. Read it before you trust it, and pin a `revision` where it matters.

```python
from transformers import pipeline

captioner = pipeline("{{ task }}", model="{{ repo_id }}", trust_remote_code=True)
captioner("{{ file }}", num_beams=5)
```

A question goes into `prompt`, in the form of the training data, such as
`prompt="Question: What is it? Short answer:"`.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
inputs = processor(images="image.png", text="")
token_ids = model.generate(**inputs, max_new_tokens=30)
processor.batch_decode(token_ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```

## Architecture

{{ parts }}

## Training

{{ training }}

## Evaluation

{{ evaluation }}

## Limits

{{ limits }}

## Licence

{{ licence }}

## Citation

```bibtex
@inproceedings{jian-etal-2024-expedited,
    title = "Expedited Training of Visual Conditioned Language Generation via Redundancy Reduction",
    author = "Jian, Yiren and Liu, Tingkai and Tao, Yunzhe and Zhang, Chunhui and Vosoughi, Soroush and Yang, Hongxia",
    booktitle = "Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics",
    year = "2024",
}
```
"""


def read_results(paths: list[str]) -> list[dict[str, Any]]:
    """Reads results.json files of `examples/evaluate_captioning.py` and `evaluate_vqa.py`.

    Raises:
        ValueError: If a file is missing or is not a results.json.
    """
    results = []
    for path in paths:
        try:
            entry = json.loads(Path(path).read_text(encoding="utf-8"))
            kept = {name: entry[name] for name in ("task", "dataset", "metrics", "num_rows", "settings", "model")}
            if not {"weights", "dtype"} <= kept["settings"].keys():  # they identify the model
                raise ValueError("its settings lack weights and dtype")
            results.append(kept | {"notes": entry.get("notes", [])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"`results`: {path} is not the results.json of an evaluation: {error!r}") from error
    return results


def model_card(
    repo_id: str,
    config: EVLGenConfig,
    trained_parameters: int,
    results: list[dict[str, Any]],
    license: str | None,
    datasets: list[str],
    has_sheet: bool,
    adapter_of: str | None = None,
) -> ModelCard:
    """Fills in the card.

    Args:
        repo_id: The repository's name.
        config: The model's configuration.
        trained_parameters: Number of trained parameters.
        results: From [`read_results`].
        license: The Hub's identifier of a licence.
        datasets: Names on the Hub of the training data.
        has_sheet: Whether captions.png is published beside the card.
        adapter_of: Name on the Hub of the adapter's model; None for a complete model.
    """
    bases = [name for name in (config.vision_model_name_or_path, config.text_model_name_or_path) if is_on_hub(name)]
    task = "video-to-text" if config.temporal_contextualizer else "image-to-text"
    data = ModelCardData(
        base_model=[adapter_of] if adapter_of else bases or None,
        datasets=datasets or None,
        eval_results=_eval_results(results) or None,
        language="en",
        library_name="peft" if adapter_of else "transformers",
        license=license,
        model_name=repo_id.split("/")[-1] if results else None,
        pipeline_tag=task,
        tags=["evlgen", "image-captioning", "vision-language", "arxiv:2310.03291"],
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        summary=_summary(config, task, adapter_of),
        task=task,
        file="video.mp4" if config.temporal_contextualizer else "image.png",
        sheet=has_sheet,
        parts=_parts(config, trained_parameters),
        training=_training(datasets),
        evaluation=_evaluation(results),
        limits=_limits(config),
        licence=_licence(license),
    )


_SIGNATURE = "\n<!-- Written by EVLGen's examples/publish.py: sha256 {} -->\n"


def sign(card: str) -> str:
    """Appends a hash of the card. With it [`is_edited`] detects later changes."""
    return card + _SIGNATURE.format(hashlib.sha256(card.encode()).hexdigest())


def is_edited(card: str) -> bool:
    """Returns whether a card differs from what [`sign`] returned."""
    written, _, _ = card.partition(_SIGNATURE.partition("{")[0])
    return card != sign(written)


def _eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=entry["task"]["type"],
            task_name=entry["task"]["name"],
            dataset_type=entry["dataset"]["type"],
            dataset_name=entry["dataset"]["name"],
            dataset_config=entry["dataset"].get("config"),
            dataset_split=entry["dataset"].get("split"),
            dataset_args=entry["dataset"].get("args"),
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args=metric.get("args"),
        )
        for entry in results
        for metric in entry["metrics"]
    ]


def _summary(config: EVLGenConfig, task: str, adapter_of: str | None) -> str:
    inputs = "videos and images" if task == "video-to-text" else "images"
    tokens = f"The {config.num_vision_tokens} tokens of an image become {config.num_image_tokens}."
    adapter = f" It is a LoRA adapter for [{adapter_of}](https://huggingface.co/{adapter_of})." if adapter_of else ""
    vision, text = (_training_state(config, argument) for argument in TOWERS)
    return (
        f"Captions {inputs}, and answers questions about them as far as it was trained to. It is an "
        f"[EVLGen]({PAPER}): a vision tower ({vision}), {CONNECTORS[config.connector_config.model_type]} that was "
        f"trained with the caption loss alone, and a language model ({text}). {tokens}{adapter}"
    )


def _training_state(config: EVLGenConfig, argument: str) -> str:
    return "adapted by LoRA" if argument in (config.adapted_towers or ()) else "frozen"


def _parts(config: EVLGenConfig, trained_parameters: int) -> str:
    parts = []
    for title, argument, tower in (
        ("Vision tower", "vision_model", config.vision_config),
        ("Language model", "text_model", config.text_config),
    ):
        name, revision = (getattr(config, f"{argument}_{suffix}") for suffix in ("name_or_path", "revision"))
        state = _training_state(config, argument)
        parts.append(f"- {title} (`{tower.model_type}`), {state}: {_base_model(name, revision)}")
    location = "loaded from the repositories named above" if config.towers == "reference" else "in this repository"
    merged = ", and the adapter that was merged" if config.adapted_towers else ""
    return "\n".join(
        [*parts, f"- Trained: {trained_parameters / 1e6:.1f} M parameters{merged}.", f"- The towers are {location}."]
    )


def _base_model(name: str | None, revision: str | None) -> str:
    if not name:
        return "a model that is not on the Hub"
    link = f"[{name}](https://huggingface.co/{name})" if is_on_hub(name) else f"{Path(name).name}, from a folder"
    return link + (f", revision `{revision}`" if revision else "")


def _training(datasets: list[str]) -> str:
    links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in datasets)
    return f"Data: {links}." if links else "The training data is not named."


def _evaluation(results: list[dict[str, Any]]) -> str:
    if not results:
        return "Not evaluated."
    lines = ["| data | rows | metric | value | decoding |", "|---|---|---|---|---|"]
    for entry in results:
        decoding = ", ".join(f"{name} {value}" for name, value in entry["settings"].items() if name in _DECODING)
        split = f" ({entry['dataset']['split']})" if entry["dataset"].get("split") else ""
        lines += [
            f"| {entry['dataset']['name']}{split} | {entry['num_rows']} | {metric['name']} | {metric['value']:.2f} | "
            f"{decoding} |"
            for metric in entry["metrics"]
        ]
    notes = [f"- {entry['dataset']['name']}: {note}" for entry in results for note in entry["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


_DECODING = ("num_beams", "min_new_tokens", "max_new_tokens", "length_penalty", "prompt")


def _limits(config: EVLGenConfig) -> str:
    order = "- The model ignores the order of a video's frames.\n" if config.temporal_contextualizer else ""
    return (
        "- The captions follow those of the training data. Images of another kind get fluent but wrong captions.\n"
        f"- An image is {config.num_image_tokens} tokens, so small print and many small things are lost.\n"
        f"{order}"
        "- The model has the biases and errors of its base models."
    )


def _licence(license: str | None) -> str:
    trained = f"`{license}` for the trained parts and the code." if license else "The trained parts name no licence."
    return f"{trained} The base models keep their own licences."
