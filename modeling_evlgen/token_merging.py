"""Bipartite soft matching: finds similar visual tokens and merges them by their mean.

The method is that of ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3). EVLGen (Jian et
al., ACL 2024, section 3.2) leaves out the sizes of tokens, so that every merge is a plain mean. With sizes, it is the
weighted mean of ToMe.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class TokenMerging:
    """A partition of `tokens` input tokens into `num_output_tokens` groups. Each group becomes its mean.

    Args:
        output_index (`torch.LongTensor` of shape `(batch, tokens)`):
            The output token that each input token becomes part of, `0 <= index < num_output_tokens`.
        num_output_tokens (`int`):
            Number of tokens after merging. Each of them has at least one input token.
    """

    output_index: torch.Tensor
    num_output_tokens: int

    def merge(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Averages the tokens of each group.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): Tokens to merge, of any floating dtype.
            size (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                The weight of each token in the mean, above 0. By default all weights are equal.

        Returns:
            `torch.Tensor` of shape `(batch, num_output_tokens, channels)` and `x`'s dtype. Each of k merged tokens
            gets 1/k of the output's gradient, or a share in proportion to its size.

        Raises:
            ValueError: If `x` does not have the tokens that were matched.
        """
        batch, tokens = self.output_index.shape
        if x.ndim != 3 or x.shape[:2] != (batch, tokens):
            raise ValueError(f"`x` must have shape ({batch}, {tokens}, channels), but has {tuple(x.shape)}.")
        if tokens == self.num_output_tokens:  # nothing is merged, and the order is kept
            return x
        # All batches in one list of rows: `index_add` of whole rows is several times as fast as `scatter_add` with an
        # index that is expanded over the channels.
        offset = torch.arange(batch, device=x.device).unsqueeze(1) * self.num_output_tokens
        rows = (self.output_index + offset).flatten()  # (batch * tokens,)
        values = x.float() if x.dtype.itemsize < 4 else x  # bfloat16 cannot count beyond 256
        if size is None:
            size = values.new_ones(batch, tokens)
        else:
            size = size.to(values.dtype)
            values = values * size.unsqueeze(2)
        summed = values.new_zeros(batch * self.num_output_tokens, x.shape[2]).index_add(0, rows, values.flatten(0, 1))
        mean = summed.unflatten(0, (batch, self.num_output_tokens)) / self.sum_sizes(size).unsqueeze(2)
        return mean.to(x.dtype)  # (batch, num_output_tokens, channels)

    def then(self, merging: "TokenMerging") -> "TokenMerging":
        """Returns the partition that merges by this one first, and then by `merging`."""
        return TokenMerging(merging.output_index.gather(1, self.output_index), merging.num_output_tokens)

    def sum_sizes(self, size: torch.Tensor) -> torch.Tensor:
        """Adds up the sizes of each group: of `(batch, tokens)` to `(batch, num_output_tokens)`."""
        return size.new_zeros(size.shape[0], self.num_output_tokens).scatter_add(1, self.output_index, size)


def bipartite_soft_matching(metric: torch.Tensor, r: int, class_token: bool = False) -> TokenMerging:
    """Matches the `r` most similar pairs of a token with an even index and a token with an odd index.

    Tokens with even indices are sources, those with odd indices are destinations. Each source is linked to the
    destination with the highest cosine similarity. The `r` strongest links are merged.

    In the output, the kept sources come first, then all destinations in their order. With a class token, kept sources
    are in ascending order, so that it stays first. Without one they are in descending order of their similarity. This
    is the original's order.

    Args:
        metric (`torch.Tensor` of shape `(batch, tokens, channels)`):
            Vectors whose similarity counts, of any floating dtype. They are compared in float32. A row of zeros is
            equally similar to all rows.
        r (`int`):
            Number of tokens to remove, `r >= 0`. It is lowered to `(tokens - class_token) // 2`, half of the tokens
            that may be merged. At 0 all tokens stay, in their order.
        class_token (`bool`, *optional*, defaults to `False`):
            Whether token 0 is a class token. It is never merged, and no token is merged into it.

    Returns:
        [`TokenMerging`]. It carries no gradient to `metric`.

    Raises:
        ValueError: If `metric` is not three-dimensional or `r` is negative.
    """
    if metric.ndim != 3:
        raise ValueError(f"`metric` must have shape (batch, tokens, channels), but has {tuple(metric.shape)}.")
    if r < 0:
        raise ValueError(f"`r` must not be negative, but is {r}.")
    batch, tokens, _ = metric.shape
    r = min(r, (tokens - int(class_token)) // 2)
    if r <= 0:
        return keep_all(metric)

    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        metric = F.normalize(metric.float(), dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (batch, sources, destinations)
        if class_token:
            similarity[:, 0] = -torch.inf  # so its link is the last to be merged
        best, destination = similarity.max(dim=-1)  # (batch, sources)
        order = best.argsort(dim=-1, descending=True)
        merged, kept = order[:, :r], order[:, r:]
        if class_token:
            kept = kept.sort(dim=-1).values

        num_kept = kept.shape[1]
        # A merged source gets the index of its destination. Destinations come after all kept sources.
        source_index = torch.empty_like(order)
        source_index.scatter_(1, kept, torch.arange(num_kept, device=metric.device).expand(batch, -1))
        source_index.scatter_(1, merged, num_kept + destination.gather(1, merged))

        output_index = order.new_empty(batch, tokens)
        output_index[:, ::2] = source_index
        output_index[:, 1::2] = num_kept + torch.arange(tokens // 2, device=metric.device)
    return TokenMerging(output_index, tokens - r)


def keep_all(x: torch.Tensor) -> TokenMerging:
    """Returns the partition of `x`, `(batch, tokens, channels)`, in which each token is a group of its own."""
    batch, tokens, _ = x.shape
    return TokenMerging(torch.arange(tokens, device=x.device).expand(batch, -1), tokens)


@torch.no_grad()
def keep_distinctive(x: torch.Tensor, num_output_tokens: int, class_token: bool = False) -> TokenMerging:
    """Keeps the most distinctive tokens. All others become one token, their mean.

    The smaller a token's mean cosine similarity to all tokens of the image, the more distinctive it is. This is the
    energy of PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148) without its margin, and so of linear cost.

    `x`, `(batch, tokens, channels)`, holds tokens without positions. The mean comes before the kept tokens, which are
    in their order; a class token stays first. There is no mean if all tokens are kept. `num_output_tokens` counts all
    of these. Raises a ValueError if it is out of range.
    """
    batch, tokens, _ = x.shape
    mean = int(class_token)  # its index
    if not mean < num_output_tokens <= tokens:
        raise ValueError(f"`num_output_tokens` must be from {mean + 1} to {tokens}, but is {num_output_tokens}.")
    if num_output_tokens == tokens:
        return keep_all(x)
    patches = x[:, mean:].float()
    directions = F.normalize(patches, dim=-1)
    similarity = (directions * directions.mean(dim=1, keepdim=True)).sum(dim=-1)  # (batch, patches)
    kept = similarity.topk(num_output_tokens - mean - 1, dim=1, largest=False).indices.sort(dim=1).values + mean
    output_index = kept.new_full((batch, tokens), mean)
    output_index[:, :mean] = 0
    new_index = torch.arange(mean + 1, num_output_tokens, device=x.device)
    return TokenMerging(output_index.scatter_(1, kept, new_index.expand(batch, -1)), num_output_tokens)


def match_down_to(metric: torch.Tensor, num_output_tokens: int, class_token: bool = False) -> TokenMerging:
    """Matches tokens by [`bipartite_soft_matching`] until `num_output_tokens` are left.

    One round removes half of the tokens at most. So fewer tokens than that need several rounds.
    """
    merging, metric = keep_all(metric), metric.detach()
    while merging.num_output_tokens > num_output_tokens:
        matched = bipartite_soft_matching(metric, merging.num_output_tokens - num_output_tokens, class_token)
        metric, merging = matched.merge(metric), merging.then(matched)
    return merging
