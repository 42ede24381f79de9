"""Captions the images or videos of a benchmark and scores the captions, with the paper's decoding.

Without arguments: the demo's model on the demo's held-out scenes. It needs `.[demo]` and `.[evaluate]`.

    python examples/evaluate_captioning.py

A published benchmark, read from its own files, with several processes if you like:

    accelerate launch --num_processes 8 examples/evaluate_captioning.py --model path/to/model \
        --benchmark coco-karpathy --annotations dataset_coco.json --media_dir coco

| benchmark | `--annotations` | `--media_dir` |
|---|---|---|
| `coco-karpathy` | `dataset_coco.json`, or a split in COCO's format | COCO's images, or the folder of `val2014` |
| `nocaps` | `nocaps_val_4500_captions.json` | the validation images |
| `flickr30k` | `dataset_flickr30k.json` | the images |
| `msr-vtt` | `test_videodatainfo.json` | `video7010.mp4` and so on |
| `msvd` | `AllVideoDescriptions.txt` or `MSR Video Description Corpus.csv`, and `--split_file` | the videos |

A split in COCO's format is called by what `--test_split` says. Your own: `--dataset` and its columns, as in the
training scripts; captions may then be of one token. METEOR and SPICE, as in `--metrics cider bleu rouge_l spice`, need
Java, and SPICE a download of 0.4 GB, `python -m pycocoevalcap.spice.get_stanford_models`; both are tried on a caption
before the model is loaded. A run that was cut off goes on when it is started again.
"""

from dataclasses import dataclass, field
from typing import Any

import evaluate
from datasets import Dataset

from common.command_line import parse_arguments
from common.data.data_arguments import DataArguments
from common.data.loading import load_held_out
from common.evaluation.answers import answer_rows, start_processes
from common.evaluation.benchmark_files import CAPTION_BENCHMARKS, caption_rows
from common.evaluation.evaluation_arguments import EvaluationArguments, GenerationArguments
from common.evaluation.results import (
    METRICS_FOLDER,
    check_source,
    output_folder,
    source_settings,
    subset_note,
    take,
    write_json,
    write_results,
)

# Least and largest number of new tokens that the original evaluated with: `min_len` and `max_len` of
# lavis/projects/EVLGen/eval/caption_coco_opt2.7b_eval.yaml and EVLGen_video/eval/caption_msrvtt_opt2.7b_eval.yaml.
LENGTHS = {
    "coco-karpathy": (8, 30),
    "nocaps": (8, 30),
    "flickr30k": (8, 30),
    "msr-vtt": (5, 20),
    "msvd": (5, 20),
}

METRIC_NAMES = {
    "cider": "CIDEr",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "spice": "SPICE",
}


@dataclass
class CaptionArguments:
    split_file: str | None = field(default=None, metadata={"help": "msvd: which videos to take, one in each line."})
    video_column: str | None = field(default=None, metadata={"help": "The dataset's column of videos, if any."})
    caption_column: str = field(
        default="caption", metadata={"help": "The dataset's column of captions, one or several."}
    )
    num_frames: int = field(default=4, metadata={"help": "Frames taken of each video, at equal distances."})
    prompt: str = field(default="", metadata={"help": "What the model is told along with each image."})
    metrics: list[str] = field(
        default_factory=lambda: ["cider", "bleu", "rouge_l"],
        metadata={"help": "Of cider, bleu, rouge_l, and meteor and spice, which need Java."},
    )


@dataclass
class CaptionDecoding(GenerationArguments):
    num_beams: int = field(default=5, metadata={"help": "Beams; 1 is greedy."})
    min_new_tokens: int | None = field(
        default=None, metadata={"help": "Least length of a caption; default: the paper's for a benchmark, else 1."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Largest length of a caption; default: the paper's for a benchmark, else 30."}
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation, captions, generation = parse_arguments(
        EvaluationArguments, CaptionArguments, CaptionDecoding, argv=argv
    )
    name = check_source(evaluation, captions, CAPTION_BENCHMARKS, default="openmoji-scenes")
    least, largest = LENGTHS.get(evaluation.benchmark, (1, 30))
    if generation.min_new_tokens is None:
        generation.min_new_tokens = least
    if generation.max_new_tokens is None:
        generation.max_new_tokens = largest
    known = (*METRIC_NAMES, "bleu")
    if not captions.metrics or not set(captions.metrics) <= set(known):
        raise ValueError(f"`metrics` must be some of {', '.join(known)}, but is {captions.metrics}.")
    state = start_processes()
    with state.main_process_first():
        all_rows, columns = load_rows(name, evaluation, captions)
        rows = take(all_rows, evaluation.max_samples)
    scored = any(rows["captions"])
    metric = load_metric(captions.metrics) if scored and state.is_main_process else None
    folder = output_folder(evaluation, name)
    source = source_settings(name, evaluation)
    texts = answer_rows(rows, columns, generation, evaluation, source, folder, state)
    if texts is None:  # the main process does the rest
        return {}

    predictions = [{"image_id": row, "caption": text} for row, text in zip(rows["id"], texts, strict=True)]
    write_json(folder / "predictions.json", predictions)
    metrics, notes = [], subset_note(len(rows), len(all_rows))
    if scored:
        domains = rows["domain"][:] if "domain" in rows.column_names else []
        metrics, cider_notes = score(metric, texts, rows["captions"][:], domains, captions.metrics)
        notes += cider_notes
    else:
        print(f"{name} has no captions here: {folder}/predictions.json is for its test server.")
    task = ("video-to-text", "Video Captioning") if columns.video_column else ("image-to-text", "Image Captioning")
    return write_results(folder, task, name, metrics, evaluation, len(texts), notes)


def load_rows(name: str, evaluation: EvaluationArguments, captions: CaptionArguments) -> tuple[Dataset, DataArguments]:
    """Rows with the columns `id` and `captions`, and what their other columns are called."""
    shown = {"num_frames": captions.num_frames, "prompt": captions.prompt}
    if evaluation.benchmark:
        rows = caption_rows(
            name, evaluation.annotations, evaluation.media_dir, evaluation.test_split, captions.split_file
        )
        columns = DataArguments(video_column="video" if "video" in rows[0] else None, **shown)
        return Dataset.from_list(rows), columns
    columns = evaluation.data_arguments(
        name, video_column=captions.video_column, caption_column=captions.caption_column, **shown
    )
    rows = load_held_out(columns)
    references = [caption_list(value) for value in rows[captions.caption_column]]
    rows = rows.remove_columns(captions.caption_column).add_column("captions", references)
    return rows.add_column("id", list(range(len(rows)))), columns


def caption_list(value: Any) -> list[str]:
    """A data set's caption or captions as a list."""
    captions = [value] if isinstance(value, str) else value or []
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError(f"`caption_column` must hold a caption or several, but a row holds {value!r}.")
    return captions


def load_metric(names: list[str]) -> evaluate.EvaluationModule:
    """The caption metrics. Those that run in Java are tried: what they lack is told before hours of captioning."""
    metric = evaluate.load(str(METRICS_FOLDER / "coco_caption"), keep_in_memory=True)
    in_java = [name for name in names if name in ("meteor", "spice")]
    if in_java:
        metric.compute(predictions=["a dog on a sofa"], references=[["A dog lies on a sofa."]], metrics=in_java)
    return metric


def score(
    metric: evaluate.EvaluationModule,
    texts: list[str],
    references: list[list[str]],
    domains: list[str],
    names: list[str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The caption metrics times 100, of all rows and, where there are any, of each domain's rows by themselves.

    Returns:
        The figures, and why they cannot be compared with others. CIDEr's say how many images its weights come from.
    """
    entries, notes = [], []
    for domain in (None, *sorted(set(domains))):
        chosen = [index for index in range(len(texts)) if domain is None or domains[index] == domain]
        values = metric.compute(
            predictions=[texts[index] for index in chosen],
            references=[references[index] for index in chosen],
            metrics=names,
        )
        args = {"domain": domain} if domain else {}
        for kind, name in METRIC_NAMES.items():
            if kind in values:
                entry = {"type": kind, "name": f"{name} ({domain})" if domain else name, "value": values[kind]}
                told = args | ({"idf_images": values["cider_idf_images"]} if kind == "cider" else {})
                entries.append(entry | ({"args": told} if told else {}))
        if "cider_note" in values:
            notes.append(f"{domain}: {values['cider_note']}" if domain else values["cider_note"])
    return entries, notes


if __name__ == "__main__":
    main()
