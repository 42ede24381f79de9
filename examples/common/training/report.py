"""The end of a training run: held-out figures, drawings, and the lines that use the model."""

import json
from collections.abc import Sized
from pathlib import Path

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.data.bad_rows import BAD_ROWS, read_bad_rows
from common.data.data_arguments import DataArguments
from common.evaluation.captions import evaluate_captions, majority_accuracy
from common.evaluation.evaluation_arguments import GenerationArguments
from common.training.drawings import draw_contact_sheet, draw_loss_curve
from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration


def report(trainer: EVLGenTrainer, data_args: DataArguments, generation_args: GenerationArguments) -> dict[str, float]:
    """Leaves loss.png, captions.png and metrics.json beside the saved model, and prints a summary.

    Returns the figures of [`evaluate_captions`] on the main process; none on others or without held-out rows.
    """
    if not trainer.is_world_process_zero():
        return {}
    output_dir = Path(trainer.args.output_dir)
    if bad_rows := read_bad_rows(output_dir):
        print(f"{len(bad_rows)} times a bad row was skipped; {output_dir / BAD_ROWS} names them.")
    draw_loss_curve(trainer.state.log_history, output_dir / "loss.png")
    metrics = {}
    if trainer.eval_dataset is not None:
        model, args = trainer.model, trainer.args
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            # The weights are divided among processes, and the others have ended. The saved model is whole.
            unset_hf_deepspeed_config()
            model = EVLGenForConditionalGeneration.from_pretrained(output_dir).to(args.device)
        rows = trainer.processing_class, trainer.eval_dataset, data_args, generation_args
        metrics, captions = evaluate_captions(model, *rows, args.per_device_eval_batch_size, args.autocast_dtype)
        if data_args.prompt_column and isinstance(trainer.train_dataset, Sized):
            majority = majority_accuracy(trainer.train_dataset, trainer.eval_dataset, data_args)
            metrics["test_majority_per_question"] = majority
        images = getattr(trainer.eval_dataset, "images", trainer.eval_dataset)  # cached features keep their images
        draw_contact_sheet(images, captions, data_args, output_dir / "captions.png")
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(summary(output_dir, metrics, data_args))
    return metrics


def summary(output_dir: Path, metrics: dict[str, float], data_args: DataArguments) -> str:
    task, verb, file = "image-to-text", "Caption", "image.png"
    if data_args.video_column:
        task, file = "video-to-text", "video.mp4"
    arguments = f'"{file}"'
    if data_args.prompt:
        verb = "Ask about" if data_args.prompt_column else "Caption"
        arguments += f", prompt={data_args.prompt.replace('{}', '...')!r}"
    figures = "\n".join(f"  {name}: {value:.4f}" for name, value in metrics.items())
    return f"""
Done. {output_dir}/ holds the model{"" if not metrics else ", metrics.json, captions.png"} and loss.png.
{figures}

{verb} {"a video" if data_args.video_column else "an image"} with it:

  from transformers import pipeline
  captioner = pipeline("{task}", model="{output_dir}", trust_remote_code=True)
  print(captioner({arguments}))
"""
