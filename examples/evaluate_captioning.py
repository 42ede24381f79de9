"""Captions the images or videos of a benchmark and scores the captions, with the paper's decoding.

Without arguments, it evaluates the demo's model on the demo's held-out scenes. It needs `.[demo]` and `.[evaluate]`.

    python examples/evaluate_captioning.py

A published benchmark is read from its own files, here by several processes:

    accelerate launch --num_processes 8 examples/evaluate_captioning.py --model path/to/model \
        --benchmark coco-karpathy --annotations dataset_coco.json --media_dir coco

docs/evaluate.md names the files of each benchmark. Your own data are given by `--dataset` and its columns, as in the
training scripts. A run that was interrupted goes on when it is started again.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

from dataclasses import dataclass
from typing import Any

import evaluate
from datasets import Dataset
from transformers.hf_argparser import HfArg

from common.arguments import DataArguments, EvaluationArguments, FrameArguments, GenerationArguments, parse_arguments
from common.evaluation.answer_folder import METRICS_FOLDER, check_source, output_folder, run_folder, write_results
from common.evaluation.answers import answer_rows, load_dataset_rows, start_processes
from common.evaluation.benchmark_files import CAPTION_BENCHMARKS, caption_rows

# Smallest and largest number of new tokens in the original's evaluation: `min_len` and `max_len` of
# lavis/projects/EVLGen/eval/caption_coco_opt2.7b_eval.yaml and EVLGen_video/eval/caption_msrvtt_opt2.7b_eval.yaml.
LENGTHS = dict.fromkeys(("coco-karpathy", "nocaps", "flickr30k"), (8, 30))
LENGTHS |= dict.fromkeys(("msr-vtt", "msvd"), (5, 20))

METRIC_NAMES = {"cider": "CIDEr", **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}}
METRIC_NAMES |= {"rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE"}


@dataclass
class CaptionArguments(FrameArguments):
    split_file: str | None = HfArg(default=None, help="msvd: file with the videos to take, one in each line.")
    video_column: str | None = HfArg(default=None, help="The dataset's column of videos, if any.")
    caption_column: str = HfArg(default="caption", help="The dataset's column of captions, one or several in a row.")
    prompt: str = HfArg(default="", help="Prompt that stands with each image.")
    metrics: list[str] = HfArg(
        default_factory=lambda: ["cider", "bleu", "rouge_l"], help="Some of cider, bleu, rouge_l, meteor and spice."
    )


@dataclass
class CaptionDecoding(GenerationArguments):
    num_beams: int = HfArg(default=5, help="Beams; 1 is greedy.")
    min_new_tokens: int | None = HfArg(default=None, help="Fewest tokens; default: a benchmark's, else 1.")
    max_new_tokens: int | None = HfArg(default=None, help="Most tokens; default: the paper's for benchmarks, else 30.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation_args, caption_args, generation_args = parse_arguments(
        EvaluationArguments, CaptionArguments, CaptionDecoding, argv=argv
    )
    name = check_source(evaluation_args, caption_args, CAPTION_BENCHMARKS, default="openmoji-scenes")
    set_lengths(generation_args, evaluation_args.benchmark)
    metric_names = (*METRIC_NAMES, "bleu")
    if not caption_args.metrics or not set(caption_args.metrics) <= set(metric_names):
        raise ValueError(f"`metrics` must be some of {', '.join(metric_names)}, but is {caption_args.metrics}.")
    state = start_processes()
    folder = output_folder(evaluation_args, name)
    with run_folder(folder, state):
        with state.main_process_first():  # the others find the data set in the cache
            rows, data_args = load_rows(name, evaluation_args, caption_args)
        total = len(rows)
        rows = rows.select(range(min(total, evaluation_args.max_test_samples or total)))
        references = rows["captions"][:] if any(rows["captions"]) else None
        metric = load_metric(caption_args.metrics) if references and state.is_main_process else None
        texts = answer_rows(name, rows, data_args, generation_args, evaluation_args, folder, state)
        if texts is None:  # the main process alone scores the captions and writes the results
            return {}
        metrics, notes = [], []
        if references:
            domains = rows["domain"][:] if "domain" in rows.column_names else []
            metrics, notes = score(metric, texts, references, domains, caption_args.metrics)
        predictions = [{"image_id": row, "caption": text} for row, text in zip(rows["id"], texts, strict=True)]
        hub_task = "video-to-text" if data_args.video_column else "image-to-text"
        task = (hub_task, "Video Captioning" if data_args.video_column else "Image Captioning")
        return write_results(folder, task, name, predictions, metrics, evaluation_args, total, notes)


def set_lengths(generation_args: CaptionDecoding, benchmark: str | None) -> None:
    """Sets lengths that are not given to the benchmark's."""
    smallest, largest = LENGTHS.get(benchmark, (1, 30))
    if generation_args.min_new_tokens is None:
        generation_args.min_new_tokens = smallest
    if generation_args.max_new_tokens is None:
        generation_args.max_new_tokens = largest
    generation_args.__post_init__()  # one of them may contradict the other's default


def load_rows(
    name: str, evaluation_args: EvaluationArguments, caption_args: CaptionArguments
) -> tuple[Dataset, DataArguments]:
    """Loads the rows, with the columns `id` and `captions`, and names their other columns."""
    columns = {key: getattr(caption_args, key) for key in ("num_frames", "fps", "prompt", "video_column")}
    if not evaluation_args.benchmark:
        return load_dataset_rows(name, evaluation_args, "captions", caption_args.caption_column, **columns)
    files = evaluation_args.annotations, evaluation_args.media_dir
    rows = caption_rows(name, *files, evaluation_args.test_split, caption_args.split_file)
    columns["video_column"] = "video" if "video" in rows[0] else None
    return Dataset.from_list(rows), DataArguments(**columns)


def load_metric(names: list[str]) -> evaluate.EvaluationModule:
    """Loads the caption metrics and tries those that need much memory, so that they do not fail after hours."""
    metric = evaluate.load(str(METRICS_FOLDER / "coco_caption"), keep_in_memory=True)
    large_metrics = [name for name in names if name in ("meteor", "spice")]
    if large_metrics:
        metric.compute(predictions=["a dog on a sofa"], references=[["A dog lies on a sofa."]], metrics=large_metrics)
    return metric


def score(
    metric: evaluate.EvaluationModule,
    texts: list[str],
    references: list[list[str]],
    domains: list[str],
    names: list[str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Computes the metrics, times 100, of all rows and of each domain, if there are domains.

    Returns the figures, and notes why they cannot be compared with others. CIDEr's `args` hold the number of images
    that its n-gram weights come from.
    """
    entries, notes = [], []
    for domain in (None, *sorted(set(domains))):
        indices = [index for index in range(len(texts)) if domain is None or domains[index] == domain]
        predictions, truths = ([column[index] for index in indices] for column in (texts, references))
        values = metric.compute(predictions=predictions, references=truths, metrics=names)
        for key, name in METRIC_NAMES.items():
            if key in values:
                entry = {"type": key, "name": f"{name} ({domain})" if domain else name, "value": values[key]}
                args = {"domain": domain} if domain else {}
                args |= {"idf_images": values["cider_idf_images"]} if key == "cider" else {}
                entries.append(entry | ({"args": args} if args else {}))
        if "cider_note" in values:
            notes.append(f"{domain}: {values['cider_note']}" if domain else values["cider_note"])
    return entries, notes


if __name__ == "__main__":
    common.processes.run_script(main)
