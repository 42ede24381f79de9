"""transformers' Trainer, with the paper's weight decay, a collator of its own for held-out images, and streams."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.data.bad_rows import RECORD, add_bad_rows
from common.data.collator import CaptionCollator
from common.data.streams import CaptionStream
from common.files import write_whole
from modeling_evlgen.adapters import save_base

STREAM_STATE = "stream.json"  # in a checkpoint: where each process's readers stood


class EVLGenTrainer(Trainer):
    """
    Args:
        eval_collator ([`CaptionCollator`]): Makes the held-out batches, without augmentation.
        kwargs: What [`Trainer`] takes.

    Raises:
        ValueError: If a model with a temporal contextualizer is to be shared out by FSDP or DeepSpeed.
    """

    def __init__(self, *args: Any, eval_collator: CaptionCollator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        scalars = [name for name, parameter in self.model.named_parameters() if parameter.ndim == 0]
        if scalars and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"FSDP and DeepSpeed cannot share out scalars, such as {scalars[0]}. Launch the training with "
                "examples/accelerate_configs/multi_gpu.yaml."
            )
        self.places: dict[str, Any] = {"next_reader": 0, "states": {}}  # of a stream, after the last batch
        if isinstance(self.train_dataset, CaptionStream):
            self.add_callback(StreamEpoch())

    def get_train_dataloader(self) -> DataLoader:
        """A stream is split here: accelerate would let processes read all of it, or leave workers without shards."""
        if not isinstance(self.train_dataset, CaptionStream):
            return super().get_train_dataloader()
        args = self.args
        self.train_dataset.split(args.process_index, args.world_size, args.dataloader_num_workers)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # or the loader would draw from the model's, which a resumed run has restored
        )
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Under `--bf16`, FSDP and DeepSpeed would compute and sum the gradients of what is trained in bfloat16, and
        DeepSpeed would save it so. What is trained stays in float32, under autocast, as with one process."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if self.is_deepspeed_enabled and self.args.bf16:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["bf16"] = {"enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        # accelerate leaves autocast under FSDP to the policy above; elsewhere the model's forward has it.
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        record = json.loads(inputs.pop(RECORD, "{}"))
        if record.get("bad_rows"):
            add_bad_rows(Path(self.args.output_dir), record["bad_rows"], self.state.global_step + 1)
        if record.get("place"):
            reader, state = record["place"]
            self.places["states"][str(reader)] = state
            self.places["next_reader"] = (reader + 1) % max(1, self.args.dataloader_num_workers)
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            save_base(self.model.get_base_model().config, output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:  # the last thing before trainer_state.json
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, CaptionStream):
            processes = gather_object([self.places])
            if self.args.should_save:
                state = {**self._stream_settings(), "processes": processes}
                write_whole(Path(output_dir) / STREAM_STATE, json.dumps(state))

    def resume_stream(self, checkpoint: str) -> None:
        """Goes on in the stream where a checkpoint stood. The Trainer by itself would read all before it once more.

        Args:
            checkpoint: Its folder.

        Raises:
            ValueError: If it has none, or another number of processes or workers, other data sets, weights or seed.
        """
        anew = "--ignore_data_skip true starts the stream anew."
        path = Path(checkpoint) / STREAM_STATE
        if not path.exists():
            raise ValueError(f"{checkpoint} does not tell where its data stood in a stream: {anew}")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self._stream_settings().items():
            if saved[name] != value:
                raise ValueError(f"{checkpoint} stands in a stream with {name} {saved[name]!r}, not {value!r}: {anew}")
        self.places = saved["processes"][self.args.process_index]
        states = {int(reader): state for reader, state in self.places["states"].items()}
        self.train_dataset.load_states(states, self.places["next_reader"])
        self.args.ignore_data_skip = True

    def _stream_settings(self) -> dict[str, Any]:
        readers = {"num_processes": self.args.world_size, "num_workers": max(1, self.args.dataloader_num_workers)}
        return {**readers, **self.train_dataset.describe()}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay for matrices only, none for biases, norms and gains (the original's lavis/runners/runner_base.py)."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


class StreamEpoch(TrainerCallback):
    """Counts the one endless epoch of a stream from its first step; the Trainer would, from the last resume."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        state.epoch = state.global_step / state.max_steps
