"""Runs a script with FSDP2 on CPU processes, which accelerate knows on accelerators only; see test_distributed.py.

    accelerate launch --config_file fsdp2.yaml --num_processes 2 tests/fsdp_on_cpu.py examples/pretrain.py …
"""

import os
import runpy
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
torch.distributed.init_process_group("gloo")
# Several CPU processes are of the type that several GPUs are of, and FSDP is switched on for those.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
