"""Writes the model card of a published model from the template publish_card.md, and detects later changes of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_evlgen import EVLGenConfig
from modeling_evlgen.fingerprints import is_on_hub

CONNECTORS = {"tomeformer": "a TomeFormer", "evlgen_qformer": "a Q-Former", "evlgen_mlp": "an MLP"}
DECODING = ("num_beams", "min_new_tokens", "max_new_tokens", "length_penalty", "prompt")  # settings in the card
_SIGNATURE = "\n<!-- Written by EVLGen's examples/publish.py: sha256 {} -->\n"


def read_results(paths: list[str]) -> list[dict[str, Any]]:
    """Reads results.json files of `evaluate_captioning.py` and `evaluate_vqa.py`; a ValueError names a bad one."""
    results = []
    for path in paths:
        try:
            entry = json.loads(Path(path).read_text(encoding="utf-8"))
            kept = {name: entry[name] for name in ("task", "dataset", "metrics", "num_rows", "settings", "model")}
            if not {"weights", "dtype"} <= kept["settings"].keys():  # they identify the model
                raise ValueError("its settings lack weights and dtype")
            decoding = ", ".join(f"{name} {value}" for name, value in entry["settings"].items() if name in DECODING)
            # `task`, `dataset` and `metrics` hold arguments of `EvalResult`.
            shared = {f"{part}_{name}": value for part in ("task", "dataset") for name, value in entry[part].items()}
            metrics = [{f"metric_{name}": value for name, value in metric.items()} for metric in entry["metrics"]]
            shown = [EvalResult(**shared, **metric) for metric in metrics]
            results.append(kept | {"notes": entry.get("notes", []), "decoding": decoding, "eval_results": shown})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
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

    `results` come from [`read_results`]. `has_sheet` states whether captions.png is published beside the card.
    `adapter_of` is the name on the Hub of an adapter's model; None for a complete model.
    """
    bases = [name for name in (config.vision_model_name_or_path, config.text_model_name_or_path) if is_on_hub(name)]
    data = ModelCardData(
        base_model=[adapter_of] if adapter_of else bases or None,
        datasets=datasets or None,
        eval_results=[result for entry in results for result in entry["eval_results"]] or None,
        language="en",
        library_name="peft" if adapter_of else "transformers",
        license=license,
        model_name=repo_id.split("/")[-1] if results else None,
        pipeline_tag="video-to-text" if config.is_for_videos else "image-to-text",
        tags=["evlgen", "image-captioning", "vision-language", "arxiv:2310.03291"],
    )
    return ModelCard.from_template(  # the template also gets the fields of `data`
        data,
        template_path=str(Path(__file__).with_suffix(".md")),
        repo_id=repo_id,
        config=config,
        connector=CONNECTORS[config.connector_config.model_type],
        is_video=config.is_for_videos,
        trained_parameters=trained_parameters,
        results=results,
        has_sheet=has_sheet,
        adapter_of=adapter_of,
        is_on_hub=is_on_hub,
        Path=Path,
    )


def sign(card: str) -> str:
    """Appends a hash of the card. With it [`is_edited`] detects later changes."""
    return card + _SIGNATURE.format(hashlib.sha256(card.encode()).hexdigest())


def is_edited(card: str) -> bool:
    """Returns whether a card differs from what [`sign`] returned."""
    written, _, _ = card.partition(_SIGNATURE.partition("{")[0])
    return card != sign(written)
