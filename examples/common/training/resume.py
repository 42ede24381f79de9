"""The checkpoint that a training run goes on from: the newest whole one, of a run with the same settings."""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import CONFIG_NAME, flatten_dict, logging

from common.arguments import DataArguments, EVLGenTrainingArguments
from common.data.feature_cache import FeatureDataset
from common.data.media_files import SAMPLES, media_checksum
from common.files import check_shared
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
)
COMPARED_ACCELERATOR_ARGUMENTS = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
STEP_SIZE = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")  # its factors
BASE_MODELS = ("model", "image_model", "vision_model", "text_model", "connector_model")  # arguments
# Arguments that leave the trained weights alone, or name what `rows` below covers wherever it lies.
IGNORED_ARGUMENTS = {
    *("towers", "dataset", "data_files", "dataset_config", "train_split", "test_split", "max_test_samples"),
    *("skip_bad_rows", "max_pixels", "max_train_samples", "mixture", "shuffle_buffer", "streaming"),
}


def find_checkpoint(training_args: EVLGenTrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` requests, or None. If none is whole, it raises a ValueError."""
    output_dir, requested = training_args.output_dir, training_args.resume_from_checkpoint
    try:  # now, not after hours of training
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir`: {output_dir} cannot be written to: {error}") from error
    check_shared(Path(output_dir))
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
    for name, key in keys.items():
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
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
    count = count_processes(checkpoint) or training_args.world_size
    random_states = [f"rng_state_{rank}.pth" for rank in range(count)] if count > 1 else ["rng_state.pth"]
    optimizer = next((name for name in (OPTIMIZER_NAME_BIN, "optimizer_0") if (checkpoint / name).exists()), "")
    fields = {optimizer or OPTIMIZER_NAME: ("param_groups", list), SCHEDULER_NAME: ("last_epoch", int)}
    fields |= dict.fromkeys(random_states, ("cpu", torch.Tensor))
    fields |= {SCALER_NAME: ("scale", float)} if training_args.fp16 else {}
    for name, (key, value_type) in fields.items():
        path = checkpoint / name
        if not path.exists():
            yield f"{name} is missing"
        elif path.is_file():
            try:
                with safe_globals():
                    content = torch.load(path, "cpu", weights_only=True, mmap=True)  # reads no tensors
                if not isinstance(content, dict) or not isinstance(content.get(key), value_type):
                    raise ValueError(f"it has no valid `{key}`")
            except UnpicklingError:  # its message advises to run the code
                yield f"{name} is damaged, or holds code, which is not run"
            except Exception as error:  # readers of archives raise errors of many types
                yield f"{name} is damaged ({str(error)[:80]})"


def count_processes(checkpoint: Path) -> int:
    """The number of processes that saved a checkpoint; 0 if nothing tells."""
    try:
        return json.loads((checkpoint / RUN_NAME).read_text(encoding="utf-8"))["settings"]["num_processes"]
    except (OSError, ValueError, KeyError, TypeError):  # earlier versions did not record it
        states = [re.fullmatch(r"rng_state_?(\d*)\.pth", path.name) for path in checkpoint.glob("rng_state*")]
        return max((int(state[1] or 0) + 1 for state in states if state), default=0)


def run_settings(
    training_args: EVLGenTrainingArguments,
    script_args: tuple[Any, ...],
    train: Any,
    config: EVLGenConfig,
    processor: EVLGenProcessor | None = None,
) -> dict[str, Any]:
    """Settings that a resumed run must share with the run of its checkpoint, as JSON gives them back."""
    settings = {name: getattr(training_args, name) for name in COMPARED_TRAINING_ARGUMENTS}
    settings |= {name: getattr(training_args.accelerator_config, name) for name in COMPARED_ACCELERATOR_ARGUMENTS}
    settings["num_processes"] = training_args.world_size
    for name in (f"{argument}_fingerprint" for argument in TOWERS):  # other weights may lie where a tower lay
        settings[name] = getattr(config, name)
    for arguments in script_args:
        settings |= {name: value for name, value in vars(arguments).items() if name not in IGNORED_ARGUMENTS}
    for name in ("model", "image_model"):
        if name in settings:
            settings[f"{name}_fingerprint"] = fingerprint_files(settings[name])
    for name in BASE_MODELS:
        if os.path.isdir(settings.get(name) or ""):  # a checkpoint is handed on, so it holds no local paths
            settings[name] = Path(settings[name]).resolve().name
    if processor is not None:
        image_processor = flatten_dict({"image_processor": processor.image_processor.to_dict()})
        settings |= {name: value for name, value in image_processor.items() if not name.endswith("_type")}
        settings["tokenizer"] = hash_tokenizer(processor.tokenizer)
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


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over all that makes tokens of a text. Truncation and padding change while a tokenizer is used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    content = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_settings_of_run(checkpoint: str, settings: dict[str, Any], config: EVLGenConfig) -> None:
    """Raises a ValueError that names each setting in which this run differs from that of a checkpoint."""
    path = Path(checkpoint, RUN_NAME)
    if not path.exists():  # of a version that did not write it, or of another script
        logger.warning(f"{checkpoint} has no {RUN_NAME}: it is not known whether its run had the same settings.")
        return
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    # Runs of earlier versions have no number of processes, and whole paths of their base models.
    before = {"num_processes": count_processes(Path(checkpoint)) or settings["num_processes"], **before}
    names = [name for name in BASE_MODELS if name in settings and before.get(name)]
    before |= {name: settings[name] for name in names if Path(before[name]).name == settings[name]}
    compared = before.keys() & settings.keys()
    if before["num_processes"] != settings["num_processes"]:
        compared -= {*STEP_SIZE}
        _check_step_size(checkpoint, before, settings)
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
            f"a new run from them: examples/finetune.py --lora none --model {checkpoint}"
        )


def _check_step_size(checkpoint: str, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Another number of processes may go on if a step has as many rows as before. Else it raises a ValueError."""
    rows_before, rows = (math.prod(given[name] for name in STEP_SIZE) for given in (before, settings))
    count, now = before["num_processes"], settings["num_processes"]
    saved = f"{checkpoint} was saved by {count} process{'es' if count > 1 else ''}, this run has {now}"
    if rows_before != rows:
        raise ValueError(
            f"`resume_from_checkpoint`: {saved}. A step had {rows_before} rows and would have {rows}. Set "
            f"`per_device_train_batch_size` and `gradient_accumulation_steps` so that it has {rows_before}."
        )
    logger.warning(
        f"{saved}. Weights, optimizer and the order of the rows go on as they were. Random states start anew, so "
        "dropout and other draws are not those of an unbroken run."
    )
