"""What all training scripts share: the run itself, from the last checkpoint on if there is one, and its report."""

import json
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging

from common.data.bad_rows import BAD_ROWS, RecordingCollator, forget_bad_rows, read_bad_rows
from common.data.collator import CaptionCollator, SetEpoch
from common.data.data_arguments import DataArguments
from common.data.streams import CaptionStream
from common.evaluation.captions import evaluate_captions, majority_accuracy
from common.evaluation.evaluation_arguments import GenerationArguments
from common.training.drawings import draw_contact_sheet, draw_loss_curve
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import TrainingSettings
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.named_towers import choose_towers
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)


def arithmetic(training: TrainingSettings) -> torch.dtype:
    """The dtype of autocast that `--bf16` and `--fp16` ask for; float32 without."""
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def train_and_report(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    train: Any,
    test: Any | None,
    images: Dataset | None,
    data: DataArguments,
    generation: GenerationArguments,
    training: TrainingSettings,
    collator_class: type[CaptionCollator] = CaptionCollator,
    trainer_class: type[EVLGenTrainer] = EVLGenTrainer,
    **trainer_arguments: Any,
) -> dict[str, float]:
    """Trains, saves the model, and leaves loss.png, captions.png, metrics.json and bad_rows.jsonl, if any, beside it.

    Args:
        model, processor: What to train, and what prepares its inputs.
        train, test: Rows of images, videos or vision features, with captions.
        images: The held-out rows with the images or videos themselves, for the contact sheet.
        data, generation, training: The scripts' arguments.
        collator_class: What makes the training batches.
        trainer_class, trainer_arguments: What trains, and its arguments beyond the usual ones.

    Returns:
        The figures of [`evaluate_captions`], on the main process; none without held-out rows.
    """
    if isinstance(model, EVLGenForConditionalGeneration):
        choose_towers(model, None)  # raises now, not after hours, if it cannot be saved
    if test is None:
        training.eval_strategy = IntervalStrategy.NO
    collator = collator_class(processor, data, training=True, seed=training.seed)
    trainer = trainer_class(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        data_collator=RecordingCollator(collator, train),
        eval_collator=CaptionCollator(processor, data, training=False),
        processing_class=processor,
        callbacks=[SetEpoch(collator)],
        **trainer_arguments,
    )
    if trainer.is_world_process_zero():
        print(model.describe_parameters())
    output = Path(training.output_dir)
    checkpoint = _checkpoint(training)
    state = _read_state(checkpoint)
    if trainer.is_world_process_zero():
        if checkpoint is None and any((output / name).exists() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
            logger.warning(f"{output} holds a model, which the one that is trained now will replace.")
        # Before other processes add to them, which takes a step of all processes.
        forget_bad_rows(output, state.global_step)
    if 0 < training.max_steps <= state.global_step:  # the Trainer would take one step more
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        if checkpoint and isinstance(train, CaptionStream) and not training.ignore_data_skip:
            trainer.resume_stream(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    metrics = {}
    if trainer.is_world_process_zero():
        if test is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            # Each process has its share of the weights, and the others are done: the saved model is asked.
            unset_hf_deepspeed_config()
            model = EVLGenForConditionalGeneration.from_pretrained(output).to(training.device)
        if bad_rows := read_bad_rows(output):
            print(f"{len(bad_rows)} times a bad row was skipped; {output / BAD_ROWS} names them.")
        draw_loss_curve(trainer.state.log_history, output / "loss.png")
        if test is not None:
            metrics, captions = evaluate_captions(
                model, processor, test, data, generation, training.per_device_eval_batch_size, arithmetic(training)
            )
            if data.prompt_column and isinstance(train, Sized):
                metrics["test_majority_per_question"] = majority_accuracy(train, test, data)
            draw_contact_sheet(images, captions, data, output / "captions.png")
            (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(_summary(output, metrics, data))
    return metrics


def _checkpoint(training: TrainingSettings) -> str | None:
    """The checkpoint to go on from: the one that is named, or the last complete one in `output_dir`, if any."""
    named = training.resume_from_checkpoint
    if named is None or named.lower() == "false":
        return None
    if named.lower() != "true":
        return named
    folders = Path(training.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    complete = [folder for folder in folders if (folder / TRAINER_STATE_NAME).exists()]  # written last
    if not complete:
        logger.warning(
            f"There is no complete checkpoint in {training.output_dir}: training starts from the first step."
        )
        return None
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])))


def _read_state(checkpoint: str | None) -> TrainerState:
    """How far a checkpoint has come; a state of no steps without one."""
    path = Path(checkpoint or "") / TRAINER_STATE_NAME
    return TrainerState.load_from_json(str(path)) if checkpoint and path.exists() else TrainerState()


def _summary(output: Path, metrics: dict[str, float], data: DataArguments) -> str:
    task, verb, file = "image-to-text", "Caption", "image.png"
    if data.video_column:
        task, file = "video-to-text", "video.mp4"
    arguments = f'"{file}"'
    if data.prompt:
        verb = "Ask about" if data.prompt_column else "Caption"
        arguments += f", prompt={data.prompt.replace('{}', '...')!r}"
    figures = "\n".join(f"  {name}: {value:.4f}" for name, value in metrics.items())
    return f"""
Done. {output}/ holds the model{"" if not metrics else ", metrics.json, captions.png"} and loss.png.
{figures}

{verb} a {file.partition(".")[0]} with it:

  from transformers import pipeline
  captioner = pipeline("{task}", model="{output}", trust_remote_code=True)
  print(captioner({arguments}))
"""
