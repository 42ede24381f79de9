"""The checkpoint that a training run goes on from: the newest whole one, of a run with the same settings."""

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import CONFIG_NAME, logging

from common.arguments import DataArguments, EVLGenTrainingArguments
from common.data.collator import checksum
from common.data.feature_cache import FeatureDataset
from common.files import SAMPLES, make_output_folder, media_checksum
from configuration_evlgen import EVLGenConfig
from modeling_evlgen.fingerprints import TOWERS, compare_configs, fingerprint_files
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)

RUN_NAME = "run.json"  # in a checkpoint: the settings of its run, and the position in a stream

# Training arguments that change the trained weights. Others, such as `max_steps` or `save_steps`, may change.
COMPARED_TRAINING_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim"),
    *("optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "seed", "data_seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "label_smoothing_factor"),
    *("dataloader_drop_last", "train_sampling_strategy", "neftune_noise_alpha"),
    *("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler"),
)
STEP_SIZE = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
ROWS_OF_STEP = " x ".join(STEP_SIZE)
# Arguments that leave the trained weights alone, or name what `rows` below covers wherever it lies.
IGNORED_ARGUMENTS = {
    *("towers", "dataset", "data_files", "dataset_config", "train_split", "test_split", "max_test_samples"),
    *("skip_bad_rows", "max_pixels", "max_train_samples", "mixture", "shuffle_buffer", "streaming", "image_root"),
}


def find_checkpoint(training_args: EVLGenTrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` requests, or None. If none is whole, it raises a ValueError."""
    output_dir, requested = training_args.output_dir, training_args.resume_from_checkpoint
    make_output_folder(Path(output_dir))  # now, not after hours of training
    if requested is None or requested.lower() == "false":
        return None
    folders = [requested]
    if newest := requested.lower() == "true":
        # The Trainer writes its state last. A folder such as checkpoint-6-backup is not of this run.
        states = [Path(folder, TRAINER_STATE_NAME) for folder in reversed(sort_checkpoints(output_dir))]
        folders = [str(s.parent) for s in states if s.exists() and re.fullmatch(r"checkpoint-\d+", s.parent.name)]
    damaged = []
    for folder in folders:
        problems = list(find_problems(Path(folder), training_args))
        if not problems:
            return folder
        damaged.append(f"{folder} is not whole: {'; '.join(problems)}")
        if newest:
            logger.warning(f"{damaged[-1]}. An older checkpoint is tried.")
    if damaged:
        remedy = " To start from the first step, name another `output_dir`." if newest else ""
        raise ValueError(f"`resume_from_checkpoint`: {'. '.join(damaged)}.{remedy}")
    logger.warning(f"There is no complete checkpoint in {output_dir}. Training starts at step 1.")
    return None


def find_problems(checkpoint: Path, training_args: EVLGenTrainingArguments) -> Iterator[str]:
    """Missing and damaged files of a checkpoint: a full disk leaves empty or cut ones."""
    keys = {TRAINER_STATE_NAME: "global_step"}
    if (checkpoint / RUN_NAME).exists():  # another script's checkpoint has none
        keys[RUN_NAME] = "settings"
    count = training_args.world_size  # earlier versions did not record that of the run before
    for name, key in keys.items():
        try:
            value = json.loads((checkpoint / name).read_text(encoding="utf-8"))[key]
            count = int(value.get("num_processes", count)) if name == RUN_NAME else count
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{name} cannot be read ({error})"
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            yield f"{path.name} is damaged ({error})"
    if any(checkpoint.glob("global_step*")):  # DeepSpeed keeps weights and optimizer in files of its own
        return
    if not any(checkpoint.glob("*.safetensors")) and not any(checkpoint.glob("pytorch_model_fsdp*")):
        yield "the weights are missing"
    random_states = [f"rng_state_{rank}.pth" for rank in range(count)] if count > 1 else ["rng_state.pth"]
    optimizer = next((name for name in (OPTIMIZER_NAME_BIN, "optimizer_0") if (checkpoint / name).exists()), "")
    for name in (optimizer or OPTIMIZER_NAME, SCHEDULER_NAME, *random_states, *([SCALER_NAME] * training_args.fp16)):
        path = checkpoint / name
        if not path.exists():
            yield f"{name} is missing"
        elif path.is_file() and not zipfile.is_zipfile(path):  # torch.save writes an archive
            yield f"{name} is damaged"


def run_settings(
    training_args: EVLGenTrainingArguments,
    script_args: tuple[Any, ...],
    train: Any,
    config: EVLGenConfig,
    processor: EVLGenProcessor | None = None,
) -> dict[str, Any]:
    """Settings that a resumed run must share with the run of its checkpoint, as JSON gives them back."""
    given = vars(training_args) | vars(training_args.accelerator_config)
    settings = {name: given[name] for name in COMPARED_TRAINING_ARGUMENTS}
    settings["num_processes"] = training_args.world_size
    settings[ROWS_OF_STEP] = math.prod(settings[name] for name in STEP_SIZE)
    for name in (f"{argument}_fingerprint" for argument in TOWERS):  # other weights may lie where a tower lay
        settings[name] = getattr(config, name)
    for arguments in script_args:
        settings |= {name: value for name, value in vars(arguments).items() if name not in IGNORED_ARGUMENTS}
    for name in ("vision_model", "text_model", "connector_model", "model", "image_model"):
        if os.path.isdir(settings.get(name) or ""):  # a checkpoint is handed on, so it holds no local paths
            path = settings.pop(name)
            if f"{name}_fingerprint" not in settings:
                settings[f"{name}_fingerprint"] = fingerprint_files(path)
    if ".py:" in settings.get("connector", ""):
        path, _, name = settings["connector"].rpartition(":")
        settings["connector"] = f"{Path(path).name}:{name}"
        settings["connector's file"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if processor is not None:
        fields = processor.image_processor.to_dict().items()
        settings |= {f"image_processor.{name}": value for name, value in fields if not name.endswith("_type")}
        settings["tokenizer"] = tokenizer_checksum(processor.tokenizer)
    # What does not choose any frames is not compared. Runs of earlier versions have a `num_frames` beside an `fps`.
    if settings.get("video_column") is None:
        settings.pop("fps", None)
    if settings.get("fps") is not None or settings.get("video_column") is None:
        settings.pop("num_frames", None)
    rows = train.images if isinstance(train, FeatureDataset) else train
    if isinstance(rows, Dataset):
        data_args = next(arguments for arguments in script_args if isinstance(arguments, DataArguments))
        # A data set may move, but not change.
        media_column, *text_columns = (getattr(data_args, argument) for argument in data_args.used_columns)
        texts = rows.select_columns(text_columns)
        digest = hashlib.sha256()
        for batch in texts.iter(batch_size=1000):
            digest.update(json.dumps(batch, default=str).encode())
        settings |= {"number of rows": len(rows), "texts of the rows": digest.hexdigest()}
        kind = "videos" if data_args.video_column else "images"
        name = f"{kind} of the rows (compared: the sizes of all files and the content of {SAMPLES} rows, no more)"
        settings[name] = media_checksum(rows, media_column)
    return json.loads(json.dumps(settings, default=str))


def tokenizer_checksum(tokenizer: Any) -> int:
    """Covers all that makes tokens of a text. Truncation and padding change while a tokenizer is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    rules |= {"truncation": None, "padding": None}
    return checksum([rules, tokenizer.special_tokens_map, tokenizer.chat_template])


def check_settings_of_run(checkpoint: str, settings: dict[str, Any], config: EVLGenConfig) -> None:
    """Raises a ValueError that names each setting in which this run differs from that of a checkpoint."""
    path = Path(checkpoint, RUN_NAME)
    if not path.exists():  # of a version that did not write it, or of another script
        logger.warning(f"{checkpoint} has no {RUN_NAME}: it is not known whether its run had the same settings.")
        return
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    compared = before.keys() & settings.keys()
    count, now = before.get("num_processes"), settings["num_processes"]
    if count not in (None, now) and before[ROWS_OF_STEP] == settings[ROWS_OF_STEP]:
        compared -= {*STEP_SIZE}
        logger.warning(
            f"{checkpoint} was saved by {count} process{'es' * (count > 1)}, this run has {now}. Weights, optimizer "
            "and the order of the rows go on. Random states, as of dropout, start anew where it has none."
        )
    changed = [
        f"`{name}` was {before[name]!r} and is {settings[name]!r}"
        for name in sorted(compared)
        if before[name] != settings[name]
    ]
    if Path(checkpoint, CONFIG_NAME).exists():  # an adapter has none
        saved = EVLGenConfig.from_pretrained(checkpoint)
        changed += compare_configs(config.vision_config, saved.vision_config)
        changed += compare_configs(config.text_config, saved.text_config)
    if changed:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is of a run with other settings: {'; '.join(changed)}. A resumed "
            "run keeps its settings, but for its length and output. To train these weights with other settings, start "
            "a new run from them: examples/finetune.py --config examples/configs/finetune-captions.yaml --model "
            f"{checkpoint}"
        )
