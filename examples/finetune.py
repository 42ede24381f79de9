"""Adapts a trained model to captions, questions or conversations: LoRA on the frozen towers beside the connector.

    python examples/finetune.py

goes on with the demo's captioner on easy-VQA's questions. Your own data: captions as in `pretrain.py`, questions with
`--prompt_column question --caption_column answer --prompt "Question: {} Short answer:"`, or conversations in the usual
`messages` format with `--messages_column messages`:

    accelerate launch examples/finetune.py --config examples/configs/finetune-chat.yaml --model path/to/model \
        --dataset path/to/folder

What comes out is an adapter, with the connector's side in it, in `output_dir`: pipelines, `AutoModel` and the other
scripts load it like a model, as long as the model that it is for is where it was. `--lora none` trains the connector's
side alone and saves a whole model. `--text_quantization int8` or `int4` keeps the frozen language model small.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune_lora import LoraArguments, add_lora, quantization_config
from transformers import set_seed

from common.command_line import parse_arguments
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_splits
from common.data.loading import load_captions
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import load_trainable
from common.processes import use_all_cores
from common.training.report import train_and_report
from common.training.training_arguments import TrainingSettings
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-vqa.yaml"


@dataclass
class FinetuneArguments:
    model: str = field(
        default="outputs/demo", metadata={"help": "Model to go on with: a folder or a name on the Hub."}
    )
    text_quantization: Literal["int8", "int4"] | None = field(
        default=None, metadata={"help": "Keep the language model's weights in 8 or 4 bits."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    finetune, lora, data, generation, training = parse_arguments(
        FinetuneArguments,
        LoraArguments,
        DataArguments,
        GenerationArguments,
        TrainingSettings,
        argv=argv,
        recipe=DEMO_RECIPE,
    )
    if data.cache_features and lora.lora in ("vision", "both"):
        raise ValueError("`cache_features` is for a frozen vision tower, but `lora` adapts it.")
    use_all_cores(training.device)
    set_seed(training.seed)
    with training.main_process_first(desc="preparing model and data"):
        train, test = load_captions(data, training.seed)
        images = test
        quantization = quantization_config(finetune.text_quantization)
        model = load_trainable(
            "model", EVLGenForConditionalGeneration.from_pretrained, finetune.model, quantization_config=quantization
        )
        processor = EVLGenProcessor.from_pretrained(finetune.model)
        model.to(training.device)
        if data.cache_features:
            train, test = cache_splits(model, processor, train, test, data, training.seed)
        if lora.lora != "none":
            model = add_lora(model, lora)
    return train_and_report(model, processor, train, test, images, data, generation, training)


if __name__ == "__main__":
    main()
