"""Measures how much `--cache_features true` saves of a training step with a ViT-S/16 of random weights.

    python -m benchmarks.cached_features

Data, connector, language model and recipe are the demo's, with batches of 16. A step from images decodes and resizes
them and runs the tower. A step from cached features reads these from disk. Both take turns, and medians are printed.

The share of padding is printed as well. It bounds what packed captions or batches of similar lengths could save.
"""

import tempfile
from functools import partial
from itertools import chain, repeat

import pretrain
import torch
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, ViTConfig, ViTModel

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import build_model

from .timing import argument_parser, markdown_table, take_turns
from .training_step import training_step

VIT_S = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6)
MERGE_R = [98, 49, 25]  # of 197 tokens


def save_tower(config: ViTConfig, folder: str) -> None:
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    size = {"height": config.image_size, "width": config.image_size}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    CLIPImageProcessor(size=size, do_center_crop=False, **statistics).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the towers.")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        save_tower(VIT_S, folder)
        changes = ["--vision_model", folder, "--output_dir", folder, "--dtype", arguments.dtype]
        changes += ["--max_train_samples", "160", "--max_test_samples", "16"]
        recipe = parse_arguments(*pretrain.ARGUMENTS, argv=changes, recipe=pretrain.DEMO_RECIPE)
        model_args, processor_args, data_args, _, training_args = recipe
        model_args.connector_config["merge_r"] = MERGE_R
        images, eval_dataset = load_datasets(data_args, training_args.seed)
        model, processor = build_model(model_args, processor_args)
        cached, _ = cache_features(model, processor, images, eval_dataset, data_args, training_args.seed)
    collator = CaptionCollator(processor, data_args, training=True, seed=training_args.seed)
    size = training_args.per_device_train_batch_size
    batches = partial(DataLoader, batch_size=size, collate_fn=collator, drop_last=True)
    loaders = {"images": batches(images), "cached features": batches(cached)}
    # Batches without end, made anew in each epoch.
    endless = {name: chain.from_iterable(repeat(loader)) for name, loader in loaders.items()}
    model.train()
    seconds = take_turns({name: training_step(model, rows) for name, rows in endless.items()}, arguments.rounds)
    ratios = {name: value / seconds["images"] for name, value in seconds.items()}
    rows = [[name, f"{ratio:.2f}", f"{1 / ratio:.2f} x"] for name, ratio in ratios.items()]
    print(f"{torch.get_num_threads()} threads, {arguments.dtype} towers\n")
    print(markdown_table(["a step from", "time", "images/s"], rows))
    not_padding = torch.cat([batch["attention_mask"].flatten() for batch in loaders["cached features"]])
    print(f"\n{1 - not_padding.double().mean():.1%} of the tokens are padding.")


if __name__ == "__main__":
    main()
