"""Adapts a trained model to captions, questions or conversations: LoRA on the frozen towers beside the connector.

    python examples/finetune.py

trains the demo's captioner on easy-VQA's questions. Your own data are captions as in `pretrain.py`, questions with
`--prompt_column question --caption_column answer --prompt "Question: {} Short answer:"`, or conversations in the usual
`messages` format with `--messages_column messages`:

    accelerate launch examples/finetune.py --config examples/configs/finetune-chat.yaml --model path/to/model \
        --dataset path/to/folder

The result in `output_dir` is an adapter with the trained connector in it. Pipelines, `AutoModel` and the other scripts
load it like a model, as long as its base model stays where it was. `--lora none` trains the connector alone and saves
a whole model. `--text_quantization int8` or `int4` keeps the frozen language model small.
"""

# First: it sets how PyTorch's threads wait, before PyTorch is loaded.
import common.processes  # isort: skip  # noqa: F401

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune_lora import LoraArguments, add_lora, quantization_config
from transformers.hf_argparser import HfArg

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import allow_token_range, load_trainable
from common.training.run import start_run, train_and_report
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import EVLGenTrainingArguments
from configuration_evlgen import read_budgets
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-vqa.yaml"


@dataclass
class FinetuneArguments:
    model: str = HfArg(default="outputs/demo", help="Model to train: a folder or a name on the Hub.")
    text_quantization: Literal["int8", "int4"] | None = HfArg(
        default=None, help="Keep the language model's weights in 8 or 4 bits."
    )
    image_token_range: list[int] | None = HfArg(
        default=None, help="Train for any number of tokens of an image in this range. Default: the model's range."
    )

    def __post_init__(self):
        read_budgets("num_image_tokens", [], 0, None, self.image_token_range)  # raises if it is no range


ARGUMENTS = (FinetuneArguments, LoraArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, lora_args, data_args, generation_args, training_args = parse_arguments(
        *ARGUMENTS, argv=argv, recipe=DEMO_RECIPE
    )
    if data_args.cache_features and lora_args.lora in ("vision", "both"):
        raise ValueError("`cache_features` is for a frozen vision tower, but `lora` adapts it.")
    if model_args.image_token_range and lora_args.lora != "none":
        raise ValueError("`image_token_range` is saved with a model, but `lora` saves an adapter alone.")
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        processor = load_trainable(model_args.model, "model", EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
        quantization = quantization_config(model_args.text_quantization)
        model = load_trainable(model_args.model, quantization_config=quantization)
        allow_token_range(model, processor, model_args.image_token_range)
        model.to(training_args.device)
        train_dataset, eval_dataset = cache_features(model, processor, *splits, data_args, training_args.seed)
        if lora_args.lora != "none":
            model = add_lora(model, lora_args)

    trainer = EVLGenTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CaptionCollator(processor, data_args, training=True, seed=training_args.seed),
        processing_class=processor,
        script_args=(model_args, lora_args, data_args),
    )
    return train_and_report(trainer, checkpoint, generation_args)


if __name__ == "__main__":
    main()
