"""Two training steps on two processes whose batches differ, such as one of text alone beside one of images. They swap.

    accelerate launch --config_file … --num_processes 2 tests/mixed_batches.py CASE [CASE …]

A case is a folder with a model and `batches.pt`, a batch for each process. The sums of both steps' gradients are saved
as `gradients.safetensors` beside them. Before that, the batches are evaluated without gradients. test_distributed.py
runs this by DDP, and under shared_on_cpu.py by FSDP2.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from modeling_evlgen import EVLGenForConditionalGeneration


def main(*cases: str) -> None:
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    for case in map(Path, cases):
        model = EVLGenForConditionalGeneration.from_pretrained(case / "model").train()
        if accelerator.distributed_type == DistributedType.FSDP:
            for parameter in model.parameters():  # FSDP takes no scalars
                parameter.data = torch.atleast_1d(parameter.data)
            # The connector stays whole, and so do weights of the towers that are outside of layers.
            outside = {type(module).__name__ for module in model.connector.modules()}
            layers = [name for name in model._no_split_modules - outside if not name.endswith("Embeddings")]
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
        accelerator.print(type(model).__name__)
        batches = torch.load(case / "batches.pt")
        if all(len(batch) > 3 for batch in batches):  # both have more than text
            with torch.no_grad():
                model(**batches[accelerator.process_index])
        for step in range(2):
            batch = batches[(accelerator.process_index + step) % 2]
            accelerator.backward(model(**batch).loss)
        found = {}
        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            if (grad := parameter.grad) is not None:
                found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).contiguous()
        if accelerator.is_main_process:
            save_file(found, case / "gradients.safetensors")
        # DDP must not outlive the process group: torch would free the group under Python's lock, and might hang.
        del parameter
        model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
