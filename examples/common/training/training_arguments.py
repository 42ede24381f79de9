"""Arguments of the training scripts: the model, its processor, and the Trainer's."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.command_line import check_count
from configuration_evlgen import read_budgets
from processing_evlgen.images import check_max_tiles


@dataclass
class ModelArguments:
    vision_model: str | None = HfArg(default=None, help="Vision tower: a folder or a name on the Hub.")
    text_model: str | None = HfArg(default=None, help="Language model: a folder or a name on the Hub.")
    connector: Literal["tomeformer", "qformer", "mlp"] = HfArg(
        default="tomeformer", help="Connector: a TomeFormer, a Q-Former or an MLP."
    )
    connector_model: str | None = HfArg(
        default=None, help="BERT checkpoint to start a TomeFormer or a Q-Former from, e.g. bert-base-uncased."
    )
    connector_config: dict[str, Any] | str | None = HfArg(
        default=None,
        help="Fields of the connector's configuration, in place of all of a recipe's; JSON on the command line.",
    )
    whitening_images: int = HfArg(
        default=0,
        help="Training images to measure the statistics of the tower's features on. The vision projection "
        "starts from them. Default: 0, a random start as in the paper.",
    )
    image_size: int | None = HfArg(
        default=None, help="Height and width of the images in pixels, for a tower of any size. Default: the tower's."
    )
    vision_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the vision tower.")
    text_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the language model.")
    dtype: str = HfArg(default="auto", help="dtype of the frozen towers. Default: the language model's.")
    towers: Literal["include", "reference"] | None = HfArg(
        default=None,
        help="Whether checkpoints include the frozen towers or name them. Default: name those from the Hub.",
    )

    def __post_init__(self):
        check_count("whitening_images", self.whitening_images, 0)
        if self.image_size is not None:
            check_count("image_size", self.image_size, 1)


@dataclass
class ProcessorArguments:
    end_of_text: str | None = HfArg(default=None, help="Token that ends a caption. Default: the EOS token.")
    bos_label: bool = HfArg(default=False, help="Train the BOS token after the image, as with OPT.")
    clean_captions: bool = HfArg(default=False, help="Clean captions as the paper does.")
    chat_template: str | None = HfArg(
        default=None, help="Jinja chat template; empty for none. Default: the language model's."
    )
    max_tiles: int = HfArg(default=1, help="Cut large images into up to this many tiles of the tower's input size.")
    image_token_range: list[int] | None = HfArg(
        default=None,
        help="Train for any number of tokens of an image, from the first number to the second: each batch draws one. "
        "Default: the connector's number alone.",
    )
    num_image_tokens: int | None = HfArg(
        default=None,
        help="Tokens of an image if no number is requested, in `image_token_range`. Default: the connector's number.",
    )

    def __post_init__(self):
        check_max_tiles(self.max_tiles)
        read_budgets("num_image_tokens", [], 0, None, self.image_token_range)  # raises if it is no range
        if self.num_image_tokens is not None:
            if self.image_token_range is None:
                raise ValueError(
                    "`num_image_tokens` needs `image_token_range`: without it the connector's number holds."
                )
            read_budgets("num_image_tokens", self.num_image_tokens, 1, None, self.image_token_range)


@dataclass
class EVLGenTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults of these scripts."""

    output_dir: str = "outputs/pretrain"
    remove_unused_columns: bool = False  # the collator reads images and captions itself
    # Else the main process would join batches of different lengths to hand them out.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    ddp_timeout: int = 86400  # seconds; other processes wait while one prepares models and data
    logging_first_step: bool = True
    prediction_loss_only: bool = True  # else the Trainer keeps the logits of the whole held-out split

    ddp_find_unused_parameters: bool | None = False  # all trained parameters are used

    def __post_init__(self):
        # bf16 works on a CPU too, but the Trainer accepts it there only with `use_cpu`.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_count(name, getattr(self, name), 1)
        # Else `from_pretrained` would partition each tower at once under ZeRO-3, together with processes that wait for
        # their turn, and a partitioned tower cannot be hashed. DeepSpeed partitions the whole model before training.
        unset_hf_deepspeed_config()

    @property
    def autocast_dtype(self) -> torch.dtype:
        """dtype of the arithmetic under `--bf16` and `--fp16`; float32 without."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
