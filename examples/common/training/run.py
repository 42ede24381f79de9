"""The start of a training script: threads, seed and checkpoint. And its end: training, the saved model, the report."""

import json
from collections.abc import Callable, Sized
from pathlib import Path

from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.data.bad_rows import BAD_ROWS, read_bad_rows
from common.data.data_arguments import DataArguments
from common.evaluation.captions import evaluate_captions, majority_accuracy
from common.evaluation.evaluation_arguments import GenerationArguments
from common.processes import use_all_cores
from common.training.drawings import draw_contact_sheet, draw_loss_curve
from common.training.resume import find_checkpoint
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import EVLGenTrainingArguments
from modeling_evlgen import EVLGenForConditionalGeneration

Measure = Callable[[list[str]], dict[str, float]]


def start_run(training_args: EVLGenTrainingArguments) -> str | None:
    """Sets the threads and the seed. Returns the checkpoint to go on from, or None; see [`find_checkpoint`]."""
    use_all_cores(training_args.device)
    set_seed(training_args.seed)
    return find_checkpoint(training_args)


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
        metrics, captions = _evaluate(trainer, data_args, generation_args)
        metrics |= measure(captions) if measure else {}
        images = getattr(trainer.eval_dataset, "images", trainer.eval_dataset)  # cached features keep their images
        draw_contact_sheet(images, captions, data_args, output_dir / "captions.png")
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(_summary(output_dir, metrics, data_args))
    return metrics


def _evaluate(
    trainer: EVLGenTrainer, data_args: DataArguments, generation_args: GenerationArguments
) -> tuple[dict[str, float], list[str]]:
    """Figures of the held-out rows, and their generated captions."""
    model, args = trainer.model, trainer.args
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # The weights are divided among processes, and the others have ended. The saved model is whole.
        unset_hf_deepspeed_config()
        model = EVLGenForConditionalGeneration.from_pretrained(args.output_dir).to(args.device)
    rows = trainer.processing_class, trainer.eval_dataset, data_args, generation_args
    metrics, captions = evaluate_captions(model, *rows, args.per_device_eval_batch_size, args.autocast_dtype)
    if data_args.prompt_column and isinstance(trainer.train_dataset, Sized):
        majority = majority_accuracy(trainer.train_dataset, trainer.eval_dataset, data_args)
        metrics["test_majority_per_question"] = majority
    return metrics, captions


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
