"""Runs a script whose model is shared out by FSDP2 or DeepSpeed on CPU processes, for test_distributed.py.

    accelerate launch --config_file … tests/shared_on_cpu.py examples/pretrain.py --dataloader_pin_memory false

accelerate shares a model out where it finds GPUs alone, and trains by DDP elsewhere. So it is told that there are
some, that they are CPUs, and that they talk through gloo.
"""

import gc
import os
import runpy
import sys

import torch
import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
torch.accelerator.is_available = lambda: True
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
# Threads of gloo that are still alive when Python ends may abort the process. The sharded model must be gone first.
gc.collect()
PartialState().destroy_process_group()
