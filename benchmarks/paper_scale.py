"""Computes the parameters, arithmetic, hours and memory of a run at the paper's size.

    python -m benchmarks.paper_scale

prints the tables of docs/paper_scale.md, and that of the recipe for one GPU, examples/configs/one-gpu.yaml.

The paper's model is that of `EVLGenConfig()`, on fake tensors: they have a shape and a dtype, but no content. A
training step runs all operations of its forward and backward pass in seconds and needs no memory. Its floating-point
operations and living bytes are counted. PyTorch has fake tensors and dispatch modes in private modules alone.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .results import markdown_table

# Jian et al., ACL 2024, section 4: image-text pairs, pairs per step, GPUs (A100-80G), and hours by number of steps.
PAIRS, BATCH, GPUS = 104_000_000, 1600, 8
PUBLISHED_HOURS = {150_000: 80, 250_000: 133}
STEPS = max(PUBLISHED_HOURS)
# Assumptions.
CAPTION_TOKENS = 32
TEXTS = 5  # captions of an image of COCO, which share its prefix in a row
PEAK = 312e12  # dense bfloat16 operations per second of an A100, as its maker states
UTILIZATION = 0.4
MICRO_BATCHES = (50, 200)  # on each of 8 GPUs, with 4 steps of accumulation as in the recipe, or with none

ONE_GPU_RECIPE = Path(__file__).parents[1] / "examples" / "configs" / "one-gpu.yaml"
ONE_GPU_PEAK = 165e12  # the same of an RTX 4090
ONE_GPU_PRICE = 0.4  # US dollars per hour of a rented one
# The sizes of google/siglip2-so400m-patch14-224 and HuggingFaceTB/SmolLM2-360M-Instruct, as published.
SIGLIP2_SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
SIGLIP2_SO400M |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
SMOLLM2_360M = {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
SMOLLM2_360M |= {"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True}

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Fused attention has another name on a CPU than on a GPU. PyTorch counts it only under the name for GPUs.
_CPU_ATTENTION = {
    _attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    _attention_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that were made inside the context, but for views of `known` tensors.

    `peak` is the highest count.
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
    """Returns a training model of fake tensors that takes as many bytes as on a GPU, with towers in bfloat16.

    Attention has no dropout: it would keep the probabilities in memory on a CPU, but not on a GPU. LayerNorms compute
    in float32, as under autocast on a GPU.
    """
    config.connector_config.attention_probs_dropout_prob = 0.0
    with torch.device("meta"):
        model = EVLGenForConditionalGeneration(config)
    for tower in (model.vision_tower, model.language_model):
        tower.to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # as the meta device has no autocast
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
    """The loss that `forward` computes, without its checks, as these need content.

    Shapes are `(size, image tokens, dim)` and `(size, caption tokens)`.
    """
    words = model.get_input_embeddings()(caption)  # (size, caption tokens, dim)
    inputs = torch.cat([soft_prompt.to(words.dtype), words], dim=1)
    logits = model.language_model(inputs_embeds=inputs, logits_to_keep=caption.shape[1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), caption.flatten())


def count_flops(model: EVLGenForConditionalGeneration, caption_tokens: int, size: int = 2) -> dict[str, float]:
    """Floating-point operations for one pair by part of a step. A multiplication and an addition count as two."""

    def count(run: Callable[[], Any]) -> tuple[Any, float]:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            result = run()
        return result, counter.get_total_flops() / size

    with next(model.parameters()).fake_mode:
        caption = torch.zeros(size, caption_tokens, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
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
    """Peak bytes of a forward and backward pass of `size` pairs, without weights and gradients."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    known = (*model.parameters(), *model.buffers(), *gradients)
    with next(model.parameters()).fake_mode, AliveBytes(known) as alive:
        caption = torch.zeros(size, caption_tokens, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prompt = model.project_vision_features(model.get_vision_features(images(model, size))).pooler_output
            loss = caption_loss(model, prompt, caption)
        loss.backward()
    return alive.peak


def measure_peaks(
    model: EVLGenForConditionalGeneration,
    sizes: Iterable[int],
    recomputed: Iterable[int],
    tokens: int = CAPTION_TOKENS,
) -> list[int]:
    """Peak bytes of activations of batches of these sizes, and of others with `--activation_checkpointing true`."""
    peaks = [peak_activations(model, tokens, size) for size in sizes]
    # Fake tensors have no random state that could be preserved.
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    peaks += [peak_activations(model, tokens, size) for size in recomputed]
    model.activation_checkpointing_disable()
    return peaks


def nbytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def gathered_bytes(model: EVLGenForConditionalGeneration) -> int:
    """Bytes of weights that a GPU holds beside its share: a layer, the next layer, and all outside of layers."""
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
        "DDP": (weights, 2 * gradients, optimizer),  # DDP's buckets are a second copy of the gradients
        "ZeRO-2": (weights, gradients / gpus, optimizer / gpus),
        "FSDP2, ZeRO-3": (shared, gradients / gpus, optimizer / gpus),
    }


def gpu_hours(flops: float, peak: float = PEAK) -> float:
    """Hours of one GPU at the assumed utilization."""
    return flops / (peak * UTILIZATION) / 3600


def parameters_table(model: EVLGenForConditionalGeneration) -> str:
    rows = []
    for name, part in model.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        kind = "float32, trained" if next(part.parameters()).requires_grad else "bfloat16, frozen"
        size = f"{count / 1e6:.1f} M" if count > 1e5 else f"{count / 1e3:.1f} K"
        rows.append([f"`{name}`", size, kind])
    return markdown_table(["part", "parameters", "kind"], rows)


def arithmetic_table(flops: dict[str, float]) -> str:
    per_pair = sum(flops.values())
    rows = [
        [name, f"{count / 1e9:.0f}", f"{count / per_pair:.0%}", f"{gpu_hours(count * BATCH * STEPS):.0f}"]
        for name, count in {**flops, "all": per_pair}.items()
    ]
    return markdown_table(["part", "GFLOP for each pair", "share", "GPU hours"], rows)


def hours_table(flops_per_pair: float) -> str:
    rows = []
    for steps, published in PUBLISHED_HOURS.items():
        flops = flops_per_pair * BATCH * steps
        utilization = flops / (GPUS * PEAK * published * 3600)
        rows.append([f"{steps:,}", f"{gpu_hours(flops) / GPUS:.0f}", published, f"{utilization:.0%}"])
    return markdown_table(["steps", "hours, computed", "hours, published", "share of the peak"], rows)


def memory_table(model: EVLGenForConditionalGeneration) -> str:
    peaks = measure_peaks(model, MICRO_BATCHES, MICRO_BATCHES)
    rows = []
    for name, parts in plan_memory(model, GPUS).items():
        totals = [f"{(sum(parts) + peak) / 1e9:.0f}" for peak in peaks]
        rows.append([name, *(f"{part / 1e9:.1f}" for part in parts), *totals])
    rows.append(["of them activations", "", "", "", *(f"{peak / 1e9:.1f}" for peak in peaks)])
    totals = [f"{name}, batch {size}" for name in ("total", "recomputing") for size in MICRO_BATCHES]
    return markdown_table(["strategy", "weights", "gradients", "optimizer", *totals], rows)


def features_table(model: EVLGenForConditionalGeneration, tower_flops: float) -> str:
    size = 2 * model.config.num_vision_tokens * model.config.vision_hidden_size  # bytes of float16
    step = 3600 * PUBLISHED_HOURS[STEPS] / STEPS  # seconds
    rows = [
        ["one view of all images", f"{size * PAIRS / 1e12:.0f} TB"],
        ["GPU hours saved", f"{gpu_hours(tower_flops * (BATCH * STEPS - PAIRS)):.0f}"],
        ["images to decode", f"{BATCH / step:.0f} per second"],
        ["or features to read", f"{size * BATCH / step / 1e9:.1f} GB per second"],
    ]
    return markdown_table(["cached features", ""], rows)


def one_gpu_table() -> str:
    recipe = yaml.safe_load(ONE_GPU_RECIPE.read_text(encoding="utf-8"))
    towers = {"vision_config": SIGLIP2_SO400M, "text_config": SMOLLM2_360M}
    model = build(EVLGenConfig(**towers, connector_config=recipe["connector_config"]))
    micro_batch = recipe["per_device_train_batch_size"]
    images_seen = micro_batch * recipe["gradient_accumulation_steps"] * recipe["max_steps"]
    pairs = TEXTS * images_seen
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    flops = count_flops(model, TEXTS * CAPTION_TOKENS)  # a mask leaves the operations as they are
    per_pair, tower = sum(flops.values()) / TEXTS, flops["vision tower, forward"] / TEXTS
    hours = gpu_hours(per_pair * pairs, ONE_GPU_PEAK)
    # Weights, gradients and AdamW's two moments. One process has no second copy of the gradients, as DDP has.
    static = nbytes(model.parameters()) + 3 * 4 * trained
    sizes = (micro_batch, micro_batch // 4)
    peaks = measure_peaks(model, sizes, sizes[:1], TEXTS * CAPTION_TOKENS)
    totals = [f"{(static + peak) / 1e9:.1f}" for peak in peaks]
    rows = [
        ["parameters; trained of them", f"{model.num_parameters() / 1e6:.0f} M; {trained / 1e6:.1f} M"],
        ["GFLOP for each pair; of them the vision tower", f"{per_pair / 1e9:.0f}; {tower / 1e9:.0f}"],
        ["pairs", f"{pairs / 1e6:.2f} M"],
        ["hours", f"{hours:.1f}"],
        ["cost", f"{hours * ONE_GPU_PRICE:.1f} US dollars"],
        [f"GB of memory, batch {sizes[0]}; batch {sizes[1]}", "; ".join(totals[:2])],
        [f"GB of memory, batch {sizes[0]}, recomputing", totals[2]],
        ["images to decode", f"{images_seen / hours / 3600:.0f} per second"],
    ]
    return markdown_table(["one GPU", ""], rows)


def main() -> None:
    model = build(EVLGenConfig())
    flops = count_flops(model, CAPTION_TOKENS)
    print(parameters_table(model), arithmetic_table(flops), hours_table(sum(flops.values())), sep="\n\n")
    print(f"\n{memory_table(model)}\n\n{features_table(model, flops['vision tower, forward'])}\n\n{one_gpu_table()}")


if __name__ == "__main__":
    main()
