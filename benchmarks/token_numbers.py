"""Measures what the number of tokens costs: one model that chooses makes 4 to 196 tokens of 784.

    python -m benchmarks.token_numbers

The model has the size of `examples/configs/crowded.yaml`, with random weights and bfloat16 autocast. Vision features
are given, so the tower's time is not included. Captions have 10 tokens, and are decoded greedily. All numbers take
turns. Medians are printed, in milliseconds per image of a batch of 8.
"""

from functools import partial

import torch

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .crowded.connector_settings import CHOOSING_QFORMER, connector_fields
from .timing import argument_parser, markdown_table, take_turns
from .training_step import CAPTION, LITE0, PROMPT, TEXT, build

NUMBERS = (4, 9, 16, 25, 36, 64, 100, 144, 196)
BATCH, GRID = 8, 28


def build_model() -> EVLGenForConditionalGeneration:
    config = EVLGenConfig(
        vision_config=LITE0,
        num_vision_tokens=GRID**2,
        vision_hidden_size=112,
        connector_config=connector_fields(CHOOSING_QFORMER, GRID, max(NUMBERS)),
        text_config=TEXT,
        image_token_range=[min(NUMBERS), max(NUMBERS)],
    )
    return build(config).eval()


@torch.no_grad()
@torch.autocast("cpu", dtype=torch.bfloat16)
def encode(model: EVLGenForConditionalGeneration, features: torch.Tensor, number: int) -> torch.Tensor:
    """The soft prompts of images with features `(images, tokens, dim)`, as `(images, number, text_dim)`."""
    return model.project_vision_features(features, image_budgets=[number] * len(features)).pooler_output


@torch.autocast("cpu", dtype=torch.bfloat16)
def caption(model: EVLGenForConditionalGeneration, features: torch.Tensor, number: int) -> torch.Tensor:
    """Captions of the images: ids, `(images, sequence)`."""
    text = torch.randint(3, TEXT.vocab_size, (len(features), PROMPT))
    input_ids = torch.cat([torch.full((len(features), number), model.config.image_token_id), text], dim=1)
    settings = {"do_sample": False, "min_new_tokens": CAPTION, "max_new_tokens": CAPTION}
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids=input_ids, attention_mask=mask, vision_features=features, **settings)


def main(argv: list[str] | None = None) -> None:
    rounds = argument_parser(__doc__, rounds=7).parse_args(argv).rounds
    model = build_model()
    features = torch.randn(BATCH, GRID**2, model.config.vision_hidden_size)
    runs = {(number, run): partial(run, model, features, number) for number in NUMBERS for run in (encode, caption)}
    seconds = take_turns(runs, rounds)
    rows = []
    for number in NUMBERS:
        parts = [1e3 * seconds[number, run] / BATCH for run in (encode, caption)]
        rows.append([number, *(f"{part:.0f}" for part in parts)])
    print(markdown_table(["tokens", "soft prompt [ms]", "with the caption [ms]"], rows))


if __name__ == "__main__":
    main()
