"""The start of a training script: threads, seed and checkpoint. And its end: training, the saved model, the report.

The report has drawings: the loss curve, and held-out images with their generated captions.
"""

import importlib
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, integrations, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments
from common.data.collator import BAD_ROWS, CaptionCollator, read_bad_rows
from common.data.loading import read_mixture
from common.data.rows import open_media, true_captions
from common.demo.scenes import DEMO_CREDITS
from common.evaluation.captions import evaluate_captions, generate_answers
from common.processes import use_all_cores
from common.training.resume import find_checkpoint
from common.training.trainer import EVLGenTrainer, choose_attention
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

matplotlib.use("Agg")  # draws into files, without a window
import matplotlib.pyplot as plt

RIGHT, WRONG = "#1a7f37", "#cf222e"
PRINTED = 4  # captions at each evaluation

Measure = Callable[[list[str]], dict[str, float]]


def start_run(training_args: EVLGenTrainingArguments) -> str | None:
    """Sets the threads and the seed. Returns the checkpoint to go on from, or None; see [`find_checkpoint`]."""
    use_all_cores(training_args.device)
    set_seed(training_args.seed)
    return find_checkpoint(training_args)


def train_captioner(
    model: torch.nn.Module,
    processor: EVLGenProcessor,
    splits: tuple[Any, Any],
    checkpoint: str | None,
    training_args: EVLGenTrainingArguments,
    generation_args: GenerationArguments,
    data_args: DataArguments,
    *script_args: Any,
) -> dict[str, float]:
    """Trains a model on the captions of the first split, as [`train_and_report`] does. The second is held out."""
    trainer = EVLGenTrainer(
        model=model,
        args=training_args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        data_collator=CaptionCollator(processor, data_args, training=True, seed=training_args.seed),
        processing_class=processor,
        script_args=(*script_args, data_args),
    )
    trainer.add_callback(PrintCaptions(trainer, generation_args))
    return train_and_report(trainer, checkpoint, generation_args)


class PrintCaptions(TrainerCallback):
    """Prints captions of the first held-out images at each evaluation, but not where processes divide the weights."""

    def __init__(self, trainer: EVLGenTrainer, generation_args: GenerationArguments):
        self.trainer, self.generation_args = trainer, generation_args

    def on_evaluate(
        self, args: EVLGenTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, collator = self.trainer, self.trainer.eval_collator
        if not state.is_world_process_zero or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        rows = [trainer.eval_dataset[index] for index in range(min(PRINTED, len(trainer.eval_dataset)))]
        given = collator.processor, self.generation_args, args.autocast_dtype
        answers = generate_answers(trainer.model, collator.prompts(rows), *given)
        print(f"Held-out captions after {state.global_step} steps:")
        for answer, row in zip(answers, rows, strict=True):
            print(f"  {answer['text']} (true: {true_captions(row, collator.data_args)[0]})")


def train_and_report(
    trainer: EVLGenTrainer,
    checkpoint: str | None,
    generation_args: GenerationArguments,
    measure: Measure | None = None,
) -> dict[str, float]:
    """Trains a model and saves it. Leaves loss.png, captions.png and metrics.json beside it, and prints a summary.

    Returns the figures of [`evaluate_captions`] on the main process; none on others or without held-out rows.
    `measure` adds figures of the script's own. It gets the generated captions of the held-out rows.
    """
    is_main, output_dir = trainer.is_world_process_zero(), Path(trainer.args.output_dir)
    note_training_data(trainer.model.config, trainer.eval_collator.data_args)
    if is_main:
        print(trainer.model.describe_parameters())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if not is_main:
        return {}
    data_args = trainer.eval_collator.data_args
    if bad_rows := read_bad_rows(output_dir):
        print(f"{len(bad_rows)} times a bad row was skipped; {output_dir / BAD_ROWS} names them.")
    draw_loss_curve(trainer.state.log_history, output_dir / "loss.png")
    metrics = {}
    if trainer.eval_dataset is not None:
        metrics, captions = _evaluate(trainer, generation_args)
        metrics |= measure(captions) if measure else {}
        images = getattr(trainer.eval_dataset, "images", trainer.eval_dataset)  # cached features keep their images
        draw_contact_sheet(images, captions, data_args, output_dir / "captions.png")
        report_to_trackers(trainer, metrics, output_dir / "captions.png")
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(_summary(output_dir, metrics, data_args))
    return metrics


def note_training_data(config: EVLGenConfig, data_args: DataArguments) -> None:
    """Adds the names of the run's data sets to those of earlier runs. Of a folder only the last name is kept."""
    names = [part.dataset for _, part in read_mixture(data_args)]
    names = [Path(name).resolve().name if os.path.exists(name) else name for name in names]
    config.training_data = list(dict.fromkeys([*(config.training_data or ()), *names]))


def _evaluate(trainer: EVLGenTrainer, generation_args: GenerationArguments) -> tuple[dict[str, float], list[str]]:
    """Figures of the held-out rows, and their generated captions."""
    model, args = trainer.model, trainer.args
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # The weights are divided among processes, and the others have ended. The saved model is whole.
        unset_hf_deepspeed_config()
        model = EVLGenForConditionalGeneration.from_pretrained(args.output_dir).to(args.device)
        choose_attention(model, args.device)
    return evaluate_captions(model, trainer.eval_dataset, trainer.eval_collator, generation_args, args)


def report_to_trackers(trainer: EVLGenTrainer, metrics: dict[str, float], sheet: Path) -> None:
    """Logs the final figures and the contact sheet where `--report_to` has logged the training."""
    trackers = tuple(integrations.get_reporting_integration_callbacks(trainer.args.report_to))
    libraries = {"WandbCallback": "wandb", "TrackioCallback": "trackio"}  # which take an image for a figure
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, trackers):
            continue
        library, figures = libraries.get(type(callback).__name__), dict(metrics)
        if library is not None:
            figures["test_captions"] = importlib.import_module(library).Image(str(sheet))
        callback.on_log(trainer.args, trainer.state, trainer.control, logs=figures, model=trainer.model)
        if isinstance(callback, integrations.TensorBoardCallback):
            pixels, step = np.array(Image.open(sheet)), trainer.state.global_step
            callback.tb_writer.add_image("test/captions", pixels, step, dataformats="HWC")
            callback.tb_writer.close()


def _summary(output_dir: Path, metrics: dict[str, float], data_args: DataArguments) -> str:
    task, verb, arguments = "image-to-text", "Caption an image", '"image.png"'
    if data_args.video_column:
        task, verb, arguments = "video-to-text", "Caption a video", '"video.mp4"'
    if data_args.prompt:
        arguments += f", prompt={data_args.prompt.replace('{}', '...')!r}"
        verb = verb.replace("Caption", "Ask about") if data_args.prompt_column else verb
    figures = "\n".join(f"  {name}: {value:.4f}" for name, value in metrics.items())
    return f"""
Done. {output_dir}/ holds the model{"" if not metrics else ", metrics.json, captions.png"} and loss.png.
{figures}

{verb} with it:

  from transformers import pipeline
  captioner = pipeline("{task}", model="{output_dir}", trust_remote_code=True)
  print(captioner({arguments}))
"""


def draw_loss_curve(log_history: list[dict[str, float]], path: str | Path) -> None:
    """Draws the training loss and any held-out loss of the Trainer's log against steps, into a PNG file."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None, label=label)
    axes.set(xlabel="step", ylabel="caption loss [nats per token]", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.has_data():
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_contact_sheet(dataset: Dataset, captions: list[str], data_args: DataArguments, path: str | Path) -> None:
    """Draws the first 16 images with their generated captions: green if true, else red beside the true one."""
    shown = dataset.select(range(min(16, len(dataset))))
    columns = 4
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, row, caption in zip(axes.flat, shown, captions, strict=False):
        panel.imshow(_thumbnail(row, data_args))
        references = true_captions(row, data_args)
        right = caption in references
        text = caption if right else f"{caption}\n(true: {references[0]})"
        wrapped = "\n".join(textwrap.fill(line, 30) for line in text.splitlines())
        panel.set_title(
            wrapped, fontsize=8.5, color=RIGHT if right else WRONG, y=0, va="top", pad=-3, parse_math=False
        )
    if data_args.dataset in DEMO_CREDITS:  # the drawing is published with model cards
        figure.supxlabel(DEMO_CREDITS[data_args.dataset], fontsize=7, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _thumbnail(row: dict[str, Any], data_args: DataArguments) -> Image.Image | np.ndarray:
    """An image as it is, or four frames of a video as a square."""
    media = open_media(row, data_args)
    if not data_args.video_column:
        return media[0] if isinstance(media, list) else media
    first, second, third, fourth = (np.asarray(media[index * len(media) // 4]) for index in range(4))
    return np.vstack([np.hstack([first, second]), np.hstack([third, fourth])])
