"""transformers' Trainer for captioners: exact resume, streams, skipped rows, the paper's weight decay."""

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, logging

from common.data.collator import CaptionCollator, TrainingCollator, add_bad_rows, forget_bad_rows
from common.data.streams import CaptionStream
from common.files import only_run_in, write_whole
from common.training.resume import RUN_NAME, check_settings_of_run, run_settings
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits
from modeling_evlgen.fingerprints import choose_towers, save_base
from modeling_evlgen.vision_tower import is_frozen
from processing_evlgen.token_ids import EXACT_INPUTS

logger = logging.get_logger(__name__)


class EVLGenTrainer(Trainer):
    """Takes the arguments of [`Trainer`]. Held-out batches are made as those of `data_collator`, without augmentation.

    `script_args` are dataclasses of the script's other arguments. A resumed run must share them. Raises a ValueError
    if the model could not be saved, or ZeRO-3 or FSDP by size is to train on images of several tiles.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        data_collator: CaptionCollator,
        train_dataset: Any,
        eval_dataset: Any = None,
        script_args: tuple[Any, ...] = (),
        **kwargs: Any,
    ):
        if eval_dataset is None:
            args.eval_strategy = IntervalStrategy.NO
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(args=args, data_collator=TrainingCollator(data_collator, train_dataset), **data, **kwargs)
        self.eval_collator = CaptionCollator(data_collator.processor, data_collator.data_args, training=False)
        self.add_callback(CountEpochs(data_collator, isinstance(train_dataset, CaptionStream)))
        self.script_args = script_args
        if isinstance(self.model, EVLGenForConditionalGeneration):
            choose_towers(self.model, None)  # raises now, not after hours, if the model cannot be saved
        self._shares_rows, self._num_texts, self._logged_step = False, 0, 0  # texts since the step of the last log
        self.scalars: set[str] = set()  # names of parameters that are vectors of one under FSDP and DeepSpeed
        self._prepare_partition(data_collator)
        # Of a stream, after the last batch: whose turn it is, and the state of each reader of this process.
        self.positions: dict[str, Any] = {"next_reader": 0, "states": {}}

    def _prepare_partition(self, data_collator: CaptionCollator) -> None:
        """Changes what FSDP and DeepSpeed cannot divide among processes."""
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            return
        for name, parameter in self.model.named_parameters():
            if parameter.ndim == 0:  # such as `temporal.0.alpha`; `_save` makes it a scalar again
                parameter.data = parameter.data.view(1)
                self.scalars.add(name)
        if data_collator.data_args.video_column is None and data_collator.processor.max_tiles > 1:
            self._keep_connector_whole()

    def _keep_connector_whole(self) -> None:
        """Lets FSDP gather the connector with what is outside of layers: once in a step. It runs once for each grid of
        a batch. Otherwise, processes with other grids would wait for each other."""
        if not self.is_fsdp_enabled:
            if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
                # DeepSpeed itself compares the order of all modules that ran.
                reason = "every process must call the same modules, and the connector runs once for each grid of tiles"
                remedy = "Launch the training with examples/accelerate_configs/fsdp2.yaml or multi_gpu.yaml."
                raise ValueError(f"ZeRO-3 cannot train on images of several tiles (`max_tiles`): {reason}. {remedy}")
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
            wanted = "`fsdp_auto_wrap_policy` TRANSFORMER_BASED_WRAP, but it is SIZE_BASED_WRAP"
            raise ValueError(f"FSDP trains on images of several tiles (`max_tiles`) by {wanted}.")
        layers = set(plugin.transformer_cls_names_to_wrap or self.model._no_split_modules)  # it has no public name
        layers -= {type(module).__name__ for module in self.model.connector.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(layers)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput | None:
        """Trains, or resumes to the weights of an unbroken run. Other settings or a second run raise a ValueError."""
        choose_attention(self.model, self.args.device)
        output_dir = Path(self.args.output_dir)  # which the Trainer has made
        # The main process holds the folder for all.
        with nullcontext() if self.args.process_index else only_run_in(output_dir):
            if resume_from_checkpoint or (self.args.should_save and self.args.save_strategy != "no"):
                _ = self._settings  # now: files may change during the training
            state = self._prepare_run(output_dir, resume_from_checkpoint)
            self._logged_step = state.global_step
            if 0 < self.args.max_steps <= state.global_step:  # the Trainer would take one more step
                self._load_from_checkpoint(resume_from_checkpoint)  # private, but no public method loads weights
                self.state = state
                return None
            if resume_from_checkpoint and isinstance(self.train_dataset, CaptionStream):
                self._resume_stream(resume_from_checkpoint)
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_run(self, output_dir: Path, checkpoint: str | None) -> TrainerState:
        """Checks the settings and returns the state of the checkpoint, or a fresh one."""
        state = TrainerState()
        if checkpoint is not None:
            check_settings_of_run(checkpoint, self._settings, self.model.config)
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if self.args.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` must be 0: the model computes logits of the targets alone.")
        if self.args.neftune_noise_alpha is not None and is_frozen(self.model.language_model):
            raise ValueError("`neftune_noise_alpha` needs `--lora text`: a frozen language model gets no noise.")
        if not isinstance(self.model, PeftModel) and (output_dir / ADAPTER_CONFIG_NAME).exists():
            raise ValueError(f"`output_dir`: {output_dir} holds an adapter. Remove it or name another folder.")
        if self.is_world_process_zero():
            if checkpoint is None and any((output_dir / name).exists() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
                logger.warning(f"{output_dir} holds a model. The model trained now will replace it.")
            # Before other processes add rows: they do so only after a step of all processes.
            forget_bad_rows(output_dir, state.global_step)
        return state

    def get_train_dataloader(self) -> DataLoader:
        """Splits a stream here: accelerate would let each process read all of it, or leave workers without shards."""
        if not isinstance(self.train_dataset, CaptionStream):
            return super().get_train_dataloader()
        args = self.args
        self.train_dataset.split(args.process_index, args.world_size, args.dataloader_num_workers)
        return DataLoader(  # `_prepare_inputs` moves its batches to the device
            self.train_dataset,
            batch_size=self._train_batch_size,  # no public name has what `auto_find_batch_size` lowered
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # else the loader draws from the model's, whose state a resume has restored
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def create_accelerator_and_postprocess(self) -> None:
        """Keeps trained parameters in float32 under autocast, as in one process. Under `--bf16`, FSDP and DeepSpeed
        would compute and sum their gradients in bfloat16, and DeepSpeed would save them so."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.is_deepspeed_enabled and self.args.bf16:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        # Under FSDP accelerate leaves autocast to the policy above; elsewhere it wraps the model's forward.
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed the Trainer casts all but whole numbers to bfloat16, here and nowhere else.
        exact = {name: inputs[name].to(self.args.device) for name in EXACT_INPUTS if name in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if bad_rows := inputs.pop("bad_rows", None):
            add_bad_rows(Path(self.args.output_dir), bad_rows, self.state.global_step + 1)
        if position := inputs.pop("position", None):
            reader, state = position
            self.positions["states"][str(reader)] = state
            self.positions["next_reader"] = (reader + 1) % max(1, self.args.dataloader_num_workers)
        shares = "segment_ids" in inputs
        self._shares_rows |= shares
        self._num_texts += int(inputs["segment_ids"].amax(dim=1).sum()) if shares else len(inputs.get("input_ids", ()))
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how many texts a step had, if images have several."""
        if "loss" in logs:
            texts = sum(gather_object([self._num_texts]))
            if any(gather_object([self._shares_rows])):
                logs["texts_per_step"] = round(texts / max(1, self.state.global_step - self._logged_step), 1)
            self._num_texts, self._logged_step = 0, self.state.global_step
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Logits of images, prompts and padding would fill memory.
        return super().compute_loss(model, limit_logits(inputs) if model.training else inputs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay for matrices only, none for biases, norms and gains (the original's lavis/runners/runner_base.py)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.is_deepspeed_enabled and optimizer is None:  # the outer ones lack the `defaults` that `min_lr` reads
            optimizer = self.optimizer.optimizer.optimizer
        return super().create_scheduler(num_training_steps, optimizer)

    # `_save` and `_save_rng_state` are private, but the callback `on_save` comes too late: a kill before it would
    # leave a checkpoint that seems whole.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        for name in self.scalars & (state_dict or {}).keys():
            state_dict[name] = state_dict[name].view(())
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_base(self.model.get_base_model().config, folder)
            # safetensors lets the owner alone read its files.
            shutil.copymode(folder / ADAPTER_CONFIG_NAME, folder / ADAPTER_SAFE_WEIGHTS_NAME)

    def _save_rng_state(self, output_dir: str) -> None:  # called last before trainer_state.json is written
        super()._save_rng_state(output_dir)
        run: dict[str, Any] = {}
        if isinstance(self.train_dataset, CaptionStream):
            run["stream"] = {**self._stream_settings(), "processes": gather_object([self.positions])}
        if self.args.should_save:
            write_whole(Path(output_dir) / RUN_NAME, json.dumps({"settings": self._settings, **run}))

    # Errors of the next three name no file.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:  # so torch's writer tells of a full disk
            raise OSError(f"{self.args.output_dir} cannot be written to, as on a full disk: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"optimizer.pt or scheduler.pt in {checkpoint} cannot be used: {error}") from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:
            raise ValueError(f"rng_state*.pth in {checkpoint} cannot be used: {error}") from error

    @cached_property
    def _settings(self) -> dict[str, Any]:
        models = self.model.config, self.processing_class
        return run_settings(self.args, self.script_args, self.train_dataset, *models)

    def _stream_settings(self) -> dict[str, Any]:
        readers = {"num_processes": self.args.world_size, "num_workers": max(1, self.args.dataloader_num_workers)}
        return {**readers, **self.train_dataset.describe()}

    def _resume_stream(self, checkpoint: str) -> None:
        """Goes on at a checkpoint's position. The Trainer by itself would read everything before it again."""
        if self.args.ignore_data_skip:
            return
        remedy = "--ignore_data_skip true starts the stream anew."
        path = Path(checkpoint) / RUN_NAME
        saved = json.loads(path.read_text(encoding="utf-8")).get("stream") if path.exists() else None
        if saved is None:
            raise ValueError(f"{checkpoint} does not hold its position in a stream: {remedy}")
        for name, value in self._stream_settings().items():
            if saved[name] != value:
                raise ValueError(f"{checkpoint} is of a stream with {name} {saved[name]!r}, not {value!r}: {remedy}")
        self.positions = saved["processes"][self.args.process_index]
        states = {int(reader): state for reader, state in self.positions["states"].items()}
        self.train_dataset.load_states(states, self.positions["next_reader"])
        self.args.ignore_data_skip = True


def choose_attention(model: nn.Module, device: torch.device) -> None:
    """Lets the language model compute attention step by step on a CPU, where PyTorch's fused one is slow to train.

    With it, a step takes 1.1 to 1.3 times as long (benchmarks/speed.py, texts). Generation is no faster with it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    language_model = getattr(base, "language_model", None)
    if device.type == "cpu" and language_model is not None and language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation("eager")


class CountEpochs(TrainerCallback):
    """Gives the collator the epoch that its random draws depend on, and counts the one endless epoch of a stream from
    its first step. The Trainer would count that from the last resume."""

    def __init__(self, collator: CaptionCollator, is_stream: bool):
        self.collator, self.is_stream = collator, is_stream

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.collator.epoch = int(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.is_stream:
            state.epoch = state.global_step / state.max_steps
