"""Two training steps. In each, one process has a batch of text alone and the other one has images. They swap once.

    accelerate launch --config_file … --num_processes 2 tests/mixed_batches.py MODEL BATCHES GRADIENTS

MODEL is a checkpoint, and BATCHES holds a batch for each process. The sums of both steps' gradients are saved as
GRADIENTS. test_distributed.py runs this by DDP, and under shared_on_cpu.py by FSDP2.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from modeling_evlgen import EVLGenForConditionalGeneration


def main(model_folder: str, batches: str, gradients: str) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = EVLGenForConditionalGeneration.from_pretrained(model_folder).train()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    accelerator.print(type(model).__name__)
    for step in range(2):
        batch = torch.load(batches)[(accelerator.process_index + step) % 2]
        accelerator.backward(model(**batch).loss)
    found = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if (grad := parameter.grad) is not None:
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).contiguous()
    if accelerator.is_main_process:
        save_file(found, gradients)
    # DDP must not outlive the process group: torch would free the group under Python's lock, and might hang.
    del parameter
    (model,) = accelerator.free_memory(model)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
