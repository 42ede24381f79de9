"""Arguments of the training scripts: the model, its processor, and the Trainer's."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@dataclass
class ModelArguments:
    vision_model: str | None = field(default=None, metadata={"help": "Vision tower: a folder or a name on the Hub."})
    text_model: str | None = field(default=None, metadata={"help": "Language model: a folder or a name on the Hub."})
    connector: Literal["tomeformer", "qformer", "mlp"] = field(
        default="tomeformer", metadata={"help": "Kind of connector; the other two are there to be compared with."}
    )
    connector_model: str | None = field(
        default=None,
        metadata={"help": "BERT checkpoint to start a TomeFormer or a Q-Former from, e.g. bert-base-uncased."},
    )
    connector_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "All fields of the connector's configuration, in place of a recipe's; as JSON on the command line."
        },
    )
    whitening_images: int = field(
        default=0,
        metadata={
            "help": "Let the vision projection start from the statistics of the tower's features, measured on so many "
            "training images. Default: 0, a random start as in the paper."
        },
    )
    vision_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the vision tower."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the language model."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the frozen towers. Default: the language model's."})
    towers: Literal["include", "reference"] | None = field(
        default=None,
        metadata={
            "help": "Whether checkpoints hold the frozen towers or only name them. Default: name those from the Hub."
        },
    )

    def __post_init__(self):
        number = self.whitening_images
        if type(number) is not int or number < 0:
            raise ValueError(f"`whitening_images` must be a whole number, 0 or more, but is {number!r}.")


@dataclass
class ProcessorArguments:
    end_of_text: str | None = field(default=None, metadata={"help": "What ends a caption. Default: the EOS token."})
    bos_label: bool = field(default=False, metadata={"help": "Train the BOS token behind the image, as with OPT."})
    clean_captions: bool = field(default=False, metadata={"help": "Clean captions up as the paper does."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja chat template in place of the model's; empty for none."}
    )


@dataclass
class TrainingSettings(TrainingArguments):
    """transformers' TrainingArguments with the defaults of these scripts."""

    output_dir: str = "outputs/pretrain"
    remove_unused_columns: bool = False  # the collator needs the images and captions themselves
    # The main process would have to join batches of different lengths to hand them out.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    ddp_timeout: int = 86400  # seconds; other processes wait while one prepares models and data
    logging_first_step: bool = True
    prediction_loss_only: bool = True  # or the Trainer would keep the logits of the whole held-out split

    ddp_find_unused_parameters: bool | None = False  # all trained parameters are used

    def __post_init__(self):
        # bf16 works on a CPU as well, but the Trainer wants to be told that a CPU it is.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # Or `from_pretrained` would share each tower out at once under ZeRO-3, together with processes that wait for
        # their turn, and towers in parts cannot be hashed. DeepSpeed shares the whole model out before training.
        unset_hf_deepspeed_config()
