"""What a run at the paper's size takes: parameters, arithmetic, hours and memory. It prints docs/paper_scale.md:

    python -m benchmarks.paper_scale > docs/paper_scale.md

The model is the real one, that of `EVLGenConfig()`, on tensors that have a shape, a dtype and no content. A training
step runs through every operation of its forward and backward pass, in seconds and in no memory; the floating-point
operations of each are counted, and the bytes that are alive.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

# Jian et al., ACL 2024, section 4: image-text pairs, pairs in a step, and hours on 8 A100-80G for so many steps.
PAIRS, BATCH, GPUS = 104_000_000, 1600, 8
PUBLISHED_HOURS = {150_000: 80, 250_000: 133}
STEPS = max(PUBLISHED_HOURS)
# Assumptions.
CAPTION_TOKENS = 32
PEAK = 312e12  # dense bfloat16 operations in a second on an A100, by its maker
UTILIZATION = 0.4
MICRO_BATCHES = (50, 200)  # with 4 steps of accumulation on 8 GPUs, as in the recipe, or with none

_aten = torch.ops.aten
# Attention on a CPU computes what it computes on a GPU, under a name that PyTorch does not count.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive; `peak` is the most there were.

    Args:
        known: Tensors that were there before; views of them are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]
        self.alive = {id(storage) for storage in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.alive:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def _free(self, key: int, nbytes: int) -> None:
        self.alive.discard(key)
        self.now -= nbytes


def build(config: EVLGenConfig) -> EVLGenForConditionalGeneration:
    """The model in training, its towers in bfloat16, on tensors without content, with a GPU's memory in mind.

    Attention probabilities are not dropped out, which would keep them in memory on a CPU, as it does not on a GPU. And
    LayerNorms are computed in float32, where autocast has them on a GPU.
    """
    config.connector_config.attention_probs_dropout_prob = 0.0
    with torch.device("meta"):
        model = EVLGenForConditionalGeneration(config)
    for tower in (model.vision_tower, model.language_model):
        tower.to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # the meta device has no autocast
        model.tie_weights()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(layer_norm_in_float32, module)
    return model.train()


def layer_norm_in_float32(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.weight.float(), module.bias.float()
    return nn.functional.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


def images(model: EVLGenForConditionalGeneration, size: int) -> torch.Tensor:
    image_size = model.config.vision_config.image_size
    return torch.empty(size, 3, image_size, image_size)


def caption_loss(
    model: EVLGenForConditionalGeneration, soft_prompt: torch.Tensor, caption: torch.Tensor
) -> torch.Tensor:
    """What `forward` computes of a soft prompt and a caption behind it, `(size, caption tokens)`, without its checks,
    which need content."""
    words = model.get_input_embeddings()(caption)
    inputs = torch.cat([soft_prompt.to(words.dtype), words], dim=1)
    logits = model.language_model(inputs_embeds=inputs, logits_to_keep=caption.shape[1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), caption.flatten())


def count_flops(model: EVLGenForConditionalGeneration, caption_tokens: int, size: int = 2) -> dict[str, float]:
    """Floating-point operations for one pair, by part of a step; a product and its sum are two.

    Args:
        model: From [`build`].
        caption_tokens: Tokens of a caption.
        size: Pairs to count over.
    """

    def count(run: Callable[[], Any]) -> tuple[Any, float]:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            result = run()
        return result, counter.get_total_flops() / size

    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with next(model.parameters()).fake_mode:
        caption = torch.zeros(size, caption_tokens, dtype=torch.long)
        with autocast:
            features, tower = count(lambda: model.get_vision_features(images(model, size)))
            prompt, connector = count(lambda: model.project_vision_features(features).pooler_output)
            inputs = prompt.detach().requires_grad_()
            loss, language = count(lambda: caption_loss(model, inputs, caption))
        _, language_backward = count(loss.backward)
        _, connector_backward = count(lambda: prompt.backward(inputs.grad))
    return {
        "vision tower, forward": tower,
        "connector and projections, forward": connector,
        "connector and projections, backward": connector_backward,
        "language model, forward": language,
        "language model, backward, to its inputs alone": language_backward,
    }


def peak_activations(model: EVLGenForConditionalGeneration, caption_tokens: int, size: int) -> int:
    """The most bytes, beyond weights and gradients, that a forward and backward pass of `size` pairs holds."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    known = (*model.parameters(), *model.buffers(), *gradients)
    with next(model.parameters()).fake_mode, AliveBytes(known) as alive:
        caption = torch.zeros(size, caption_tokens, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt = model.project_vision_features(model.get_vision_features(images(model, size))).pooler_output
            loss = caption_loss(model, prompt, caption)
        loss.backward()
    return alive.peak


def all_activations(model: EVLGenForConditionalGeneration) -> dict[bool, list[int]]:
    """[`peak_activations`] of each micro-batch, by whether activations are computed again in the backward pass."""
    plain = [peak_activations(model, CAPTION_TOKENS, size) for size in MICRO_BATCHES]
    # Tensors without content have no state of random numbers to be kept.
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    again = [peak_activations(model, CAPTION_TOKENS, size) for size in MICRO_BATCHES]
    model.activation_checkpointing_disable()
    return {False: plain, True: again}


def nbytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def gathered_bytes(model: EVLGenForConditionalGeneration) -> int:
    """What a GPU holds beside its share of the weights: a layer, the next one, and all that is in no layer."""
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = nbytes(parameter for parameter in model.parameters() if parameter not in inside)
    return 2 * max(nbytes(layer.parameters()) for layer in layers) + outside


def plan_memory(model: EVLGenForConditionalGeneration, gpus: int) -> dict[str, tuple[float, float, float]]:
    """Bytes of weights, gradients and optimizer states on each GPU, by strategy."""
    weights = nbytes(model.parameters())
    gradients = nbytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = 2 * gradients  # AdamW's two moments
    shared = weights / gpus + gathered_bytes(model)
    return {
        "DDP": (weights, 2 * gradients, optimizer),  # it sums gradients in buckets, a second copy
        "ZeRO-2": (weights, gradients / gpus, optimizer / gpus),
        "FSDP2, ZeRO-3": (shared, gradients / gpus, optimizer / gpus),
    }


def gpu_hours(flops: float) -> float:
    """Of one GPU, at the assumed utilization."""
    return flops / (PEAK * UTILIZATION) / 3600


def row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(header: list[str], rows: Iterable[tuple[Any, ...]]) -> str:
    return "\n".join([row(*header), row("---", *["---:"] * (len(header) - 1)), *(row(*cells) for cells in rows)])


def parameter_rows(model: EVLGenForConditionalGeneration) -> Iterable[tuple[Any, ...]]:
    for name, part in model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        kind = "float32, trained" if next(part.parameters()).requires_grad else "bfloat16, frozen"
        size = f"{count / 1e6:.1f} M" if count > 1e5 else f"{count / 1e3:.1f} K"
        yield f"`{name}`", size, kind, f"{nbytes(part.parameters()) / 1e6:,.0f} MB"


def memory_rows(model: EVLGenForConditionalGeneration) -> Iterable[tuple[Any, ...]]:
    activations = all_activations(model)
    for name, parts in plan_memory(model, GPUS).items():
        totals = [sum(parts) + peak for peaks in activations.values() for peak in peaks]
        yield name, *(f"{value / 1e9:.1f}" for value in parts), *(f"{total / 1e9:.0f}" for total in totals)
    peaks = [f"{peak / 1e9:.1f}" for peaks in activations.values() for peak in peaks]
    yield "of them activations", "", "", "", *peaks


def main() -> None:
    model = build(EVLGenConfig())
    flops = count_flops(model, CAPTION_TOKENS)
    per_pair = sum(flops.values())
    total = per_pair * BATCH * STEPS
    tower = flops["vision tower, forward"]
    feature = 2 * model.config.num_vision_tokens * model.config.vision_hidden_size  # float16
    seconds = 3600 * PUBLISHED_HOURS[STEPS] / STEPS
    arithmetic = [
        (name, f"{count / 1e9:.0f}", f"{count / per_pair:.0%}", f"{gpu_hours(count * BATCH * STEPS):.0f}")
        for name, count in flops.items()
    ]
    arithmetic.append(("all", f"{per_pair / 1e9:.0f}", "100%", f"{gpu_hours(total):.0f}"))
    hours = [
        (
            f"{steps:,}",
            f"{gpu_hours(per_pair * BATCH * steps) / GPUS:.0f}",
            published,
            f"{per_pair * BATCH * steps / (GPUS * PEAK * published * 3600):.0%}",
        )
        for steps, published in PUBLISHED_HOURS.items()
    ]
    memory = [f"{kind}{size}" for kind in ("total, batch ", "recomputing, batch ") for size in MICRO_BATCHES]
    print(
        DOCUMENT.format(
            pairs=f"{PAIRS / 1e6:.0f} M",
            batch=BATCH,
            steps=f"{STEPS:,}",
            passes=f"{BATCH * STEPS / PAIRS:.1f}",
            gpus=GPUS,
            vision_tokens=model.config.num_vision_tokens,
            vision_dim=model.config.vision_hidden_size,
            image_tokens=model.config.num_image_tokens,
            caption=CAPTION_TOKENS,
            peak=f"{PEAK / 1e12:.0f}",
            utilization=f"{UTILIZATION:.0%}",
            parameters=table(["part", "parameters", "kind", "weights"], parameter_rows(model)),
            arithmetic=table(["part", "GFLOP for each pair", "share", "GPU hours"], arithmetic),
            hours=table(["steps", "hours, computed", "hours, published", "utilization that this takes"], hours),
            memory=table(["strategy", "weights", "gradients", "optimizer", *memory], memory_rows(model)),
            feature=f"{feature / 1e6:.2f} MB",
            features=f"{feature * PAIRS / 1e12:.0f} TB",
            once=f"{gpu_hours(tower * PAIRS):.0f}",
            saved=f"{gpu_hours(tower * (BATCH * STEPS - PAIRS)):.0f}",
            rate=f"{feature * BATCH / seconds / 1e9:.1f} GB",
            step=f"{seconds:.1f}",
            per_second=f"{BATCH / seconds:.0f}",
        ),
        end="",
    )


DOCUMENT = """\
# A run at the paper's size

*Made by `python -m benchmarks.paper_scale > docs/paper_scale.md`.* The model is that of `EVLGenConfig()` and of
[`opt-2.7b.yaml`](../examples/configs/opt-2.7b.yaml): EVA ViT-g, a TomeFormer of 12 layers with r = 19, OPT-2.7b. It
takes {steps} steps of {batch} pairs from {pairs}, {passes} times through the data, on {gpus} A100-80G.

- **Computed**, from the real configuration: parameters, bytes and floating-point operations. A training step runs
  through all its operations on tensors without content. Activations are the most bytes that are alive at any time.
- **Assumed**: {caption} tokens for each caption, behind {image_tokens} of the image; more of them cost more in the
  language model alone. Towers in bfloat16; bfloat16 autocast with LayerNorms in float32; fused attention;
  {peak} TFLOP/s at best, of which {utilization} are reached.
- **Published**: the hours so named, by the paper's authors with their code.

Nothing here was measured on a GPU, and no model of this size was trained with this repository. Sending gradients
around, reading data and saving checkpoints are not counted; nor are the allocator's gaps, CUDA's own memory (about
1 GB) and DeepSpeed's buffers.

## Parameters

{parameters}

## Arithmetic and cost

GPU hours are those of one A100 for all {steps} steps at {utilization} of its peak. The language model is frozen, so
its backward pass costs as much as its forward pass, not twice as much.

{arithmetic}

With `--activation_checkpointing true`, the forward passes of language model and connector are done twice.

## Hours

On {gpus} A100-80G, at {utilization}; beside them the share of the peak at which the counted arithmetic takes the
published time.

{hours}

## Memory of each GPU

In GB, on {gpus} GPUs. *Recomputing* is `--activation_checkpointing true`. A batch of 50 on each GPU goes with 4 steps
of accumulation, one of 200 with none.

{memory}

DDP fits with either batch, and sends nothing around but the gradients of what is trained: that is
[`multi_gpu.yaml`](../examples/accelerate_configs/multi_gpu.yaml). FSDP2 and ZeRO-3 are for larger language models and
smaller GPUs.

## Cached vision features

{vision_tokens} x {vision_dim} numbers in float16 are {feature} for each view of an image, {features} for one view of
all. Computing them once takes {once} GPU hours, and saves {saved} of those above. At the published {step} s for a
step, {per_second} images are decoded each second, or {rate} of features read.
"""


if __name__ == "__main__":
    main()
