"""Compares the speed of the TomeFormer with that of a plain BERT encoder and of BLIP-2's Q-Former.

    python -m benchmarks.connector_speed

All candidates have the size of BERT-base: 12 layers, width 768. They read the tokens of EVA ViT-g, of width 1408: 257
tokens for an image of 224 pixels, or 577 for one of 336. The candidates take turns. Medians and their ratios are
printed. The limit is the time of the connector's matrix products at the rate of one large product on this machine.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import nn
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel

from configuration_evlgen import TomeFormerConfig
from modeling_evlgen import TomeFormerModel
from modeling_evlgen.token_merging import bipartite_soft_matching

from .timing import argument_parser, count_flops, markdown_table, take_turns

VISION_DIM = 1408
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
CONSTANT_R = 19
# Tokens to merge in the first layers. 29 tokens remain, as with the constant r of 257 tokens.
FRONT_LOADED = {257: [128, 64, 32, 4], 577: [288, 144, 72, 36, 8]}
QUERIES = 32
SQUARE = 2048  # side of the large matrices


class Encoder(nn.Module):
    """A TomeFormer or a BERT behind a projection of the vision tokens."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.projection = nn.Linear(VISION_DIM, encoder.config.hidden_size)
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs_embeds=self.projection(tokens)).last_hidden_state


class QFormer(nn.Module):
    def __init__(self, size: dict[str, int]):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, QUERIES, size["hidden_size"]))
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=VISION_DIM, **size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)  # (batch, queries, dim)
        return self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state


def build_candidates(num_tokens: int, size: dict[str, int], r: int, front_loaded: list[int]) -> dict[str, nn.Module]:
    """Returns the candidates by name. Times are relative to those of the first."""
    fields = {**size, "max_position_embeddings": num_tokens}
    return {
        f"TomeFormer, r = {r}": Encoder(TomeFormerModel(TomeFormerConfig(**fields, merge_r=r))),
        "TomeFormer, front-loaded": Encoder(TomeFormerModel(TomeFormerConfig(**fields, merge_r=front_loaded))),
        "plain BERT encoder": Encoder(BertModel(BertConfig(**fields, vocab_size=2), add_pooling_layer=False)),
        f"Q-Former, {QUERIES} queries": QFormer(size),
    }


def merging_inputs(config: TomeFormerConfig, batch: int, num_tokens: int) -> list[tuple]:
    """Random metric, tokens and r of each layer, of the sizes that one forward has."""
    inputs = []
    for before, after in pairwise(config.token_counts(num_tokens)):
        metric = torch.randn(batch, before, config.hidden_size // config.num_attention_heads)
        inputs.append((metric, torch.randn(batch, before, config.hidden_size), before - after))
    return inputs


def merge(inputs: list[tuple]) -> None:
    for metric, tokens, r in inputs:
        bipartite_soft_matching(metric, r, class_token=True).merge(tokens)


def forward_and_backward(model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    model(tokens).sum().backward()


def compare(models: dict[str, nn.Module], num_tokens: int, batch: int, rounds: int, device: torch.device) -> None:
    """Prints the times of all models on random tokens, relative to those of the first."""
    first = next(iter(models))
    torch.manual_seed(0)
    with torch.device(device):
        tokens = torch.randn(batch, num_tokens, VISION_DIM)
        inputs = merging_inputs(models[first].encoder.config, batch, num_tokens)
        square = torch.randn(SQUARE, SQUARE)
    forwards = {name: partial(model.to(device).eval(), tokens) for name, model in models.items()}
    others = {"merging": partial(merge, inputs), "product": partial(torch.mm, square, square)}
    with torch.no_grad():
        flops = count_flops(forwards[first])
        tokens_out = {name: run().shape[1] for name, run in forwards.items()}
        seconds = take_turns(forwards | others, rounds)
    trainings = {name: partial(forward_and_backward, model, tokens) for name, model in models.items()}
    training_seconds = take_turns(trainings, rounds)

    rows = []
    for name in models:
        pairs = [(times[name], times[name] / times[first]) for times in (seconds, training_seconds)]
        rows.append([name, tokens_out[name], *(cell for s, ratio in pairs for cell in (f"{s:.3f} s", f"{ratio:.2f}"))])
    rate = 2 * SQUARE**3 / seconds["product"]
    print(f"\n{num_tokens} tokens, batch {batch}, float32, {device}, {torch.get_num_threads()} threads\n")
    print(markdown_table(["connector", "tokens out", "forward", "ratio", "fwd + bwd", "ratio"], rows))
    print(f"\nMatching and merging take {seconds['merging'] / seconds[first]:.1%} of the first forward.")
    print(f"It runs at {flops / rate / seconds[first]:.0%} of the limit of {rate / 1e9:.0f} GFLOP/s.")


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[257, 577], choices=sorted(FRONT_LOADED))
    parser.add_argument("--batch", type=int, default=2, help="Number of images in a batch.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    for num_tokens in arguments.tokens:
        candidates = build_candidates(num_tokens, BERT_BASE, CONSTANT_R, FRONT_LOADED[num_tokens])
        compare(candidates, num_tokens, arguments.batch, arguments.rounds, torch.device(arguments.device))


if __name__ == "__main__":
    main()
