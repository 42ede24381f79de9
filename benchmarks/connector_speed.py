"""How fast is the TomeFormer? Against a plain BERT encoder, BLIP-2's Q-Former, and the limit of the machine.

    python -m benchmarks.connector_speed

All candidates have the size of BERT-base (12 layers, width 768) and read the 1408-wide tokens of EVA ViT-g, 257 for an
image of 224 pixels or 577 for one of 336. They take turns, round by round, so that a busy machine slows all of them
alike; medians and their ratios are printed. The limit is the time that the matrix products of the connector would take
at the rate that this machine reaches on one large product.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel

from configuration_evlgen import TomeFormerConfig
from modeling_evlgen import TomeFormerModel
from modeling_evlgen.token_merging import bipartite_soft_matching

from .timing import take_turns

VISION_DIM, DIM, FFN_DIM = 1408, 768, 3072
FRONT_LOADED = {257: [128, 64, 32, 4], 577: [288, 144, 72, 36, 8]}  # both leave 29 tokens, as 12 x 19 does of 257
QUERIES = 32
REFERENCE = "TomeFormer, r = 19"


class Tome(nn.Module):
    def __init__(self, merge_r: int | list[int], num_tokens: int):
        super().__init__()
        self.projection = nn.Linear(VISION_DIM, DIM)
        self.connector = TomeFormerModel(TomeFormerConfig(merge_r=merge_r, max_position_embeddings=num_tokens))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.connector(self.projection(tokens)).last_hidden_state


class Bert(nn.Module):
    def __init__(self, num_tokens: int):
        super().__init__()
        self.projection = nn.Linear(VISION_DIM, DIM)
        config = BertConfig(max_position_embeddings=num_tokens, vocab_size=2)
        self.encoder = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(inputs_embeds=self.projection(tokens)).last_hidden_state


class QFormer(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, QUERIES, DIM))
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=VISION_DIM))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state


def matrix_flops(config: TomeFormerConfig, num_tokens: int) -> int:
    """Floating-point operations of the matrix products of one image's forward, the projection to `DIM` included."""
    flops = 2 * num_tokens * VISION_DIM * DIM
    for r in config.merge_schedule(num_tokens):
        flops += 2 * num_tokens * 4 * DIM * DIM  # query, key, value, output
        flops += 2 * 2 * num_tokens * num_tokens * DIM  # attention's two products
        flops += 2 * (num_tokens // 2) * (num_tokens - num_tokens // 2) * (DIM // 12)  # similarities
        num_tokens -= r
        flops += 2 * num_tokens * 2 * DIM * FFN_DIM
    return flops


def merging_run(config: TomeFormerConfig, batch: int, num_tokens: int, device: torch.device) -> Callable[[], None]:
    """Only the matching and merging of one forward, on tokens of the sizes that they have there."""
    inputs = []
    for r in config.merge_schedule(num_tokens):
        metric = torch.randn(batch, num_tokens, DIM // 12, device=device)
        inputs.append((metric, torch.randn(batch, num_tokens, DIM, device=device), r))
        num_tokens -= r

    def run() -> None:
        with torch.no_grad():
            for metric, tokens, r in inputs:
                bipartite_soft_matching(metric, r, class_token=True).merge(tokens)

    return run


def forward_run(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(tokens)

    return run


def training_run(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        model(tokens).sum().backward()

    return run


def compare(num_tokens: int, batch: int, rounds: int, device: torch.device) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(batch, num_tokens, VISION_DIM, device=device)
    models = {
        REFERENCE: Tome(19, num_tokens),
        "TomeFormer, front-loaded": Tome(FRONT_LOADED[num_tokens], num_tokens),
        "plain BERT encoder": Bert(num_tokens),
        "Q-Former, 32 queries": QFormer(),
    }
    models = {name: model.to(device).eval() for name, model in models.items()}
    config = models[REFERENCE].connector.config
    square = torch.randn(2048, 2048, device=device)
    forwards = {name: forward_run(model, tokens) for name, model in models.items()}
    forwards["merging"] = merging_run(config, batch, num_tokens, device)
    forwards["product"] = lambda: torch.mm(square, square)
    forward = take_turns(forwards, rounds, device)
    training = take_turns({name: training_run(model, tokens) for name, model in models.items()}, rounds, device)

    rate = 2 * 2048**3 / forward["product"]
    limit = batch * matrix_flops(config, num_tokens) / rate
    print(f"\n{num_tokens} tokens, batch {batch}, float32, {device}, {torch.get_num_threads()} threads")
    print(f"{'':26}{'tokens out':>11}{'forward':>11}{'ratio':>8}{'fwd + bwd':>11}{'ratio':>8}")
    for name, model in models.items():
        out = model(tokens[:1]).shape[1]
        print(
            f"{name:26}{out:11}{forward[name] * 1e3:8.0f} ms{forward[name] / forward[REFERENCE]:8.2f}"
            f"{training[name] * 1e3:8.0f} ms{training[name] / training[REFERENCE]:8.2f}"
        )
    print(f"Matching and merging take {forward['merging'] / forward[REFERENCE]:.1%} of the forward with r = 19.")
    print(f"That forward runs at {limit / forward[REFERENCE]:.0%} of the limit of {rate / 1e9:.0f} GFLOP/s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[257, 577], choices=sorted(FRONT_LOADED))
    parser.add_argument("--batch", type=int, default=2, help="Images at a time.")
    parser.add_argument("--rounds", type=int, default=9, help="Rounds over which the median is taken.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for num_tokens in arguments.tokens:
        compare(num_tokens, arguments.batch, arguments.rounds, torch.device(arguments.device))


if __name__ == "__main__":
    main()
