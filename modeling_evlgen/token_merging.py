"""Bipartite soft matching: which visual tokens are alike, and their merging by mean.

The method is that of ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3), as EVLGen
(Jian et al., ACL 2024, section 3.2) uses it: without sizes, so every merge is the mean of the tokens as they are. With
sizes it is ToMe's own.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class TokenMerging:
    """One way to merge `tokens` into `num_output_tokens` tokens: all with the same output place become their mean.

    Args:
        output_index (`torch.LongTensor` of shape `(batch, tokens)`):
            The place in the output, `0 <= place < num_output_tokens`, where each input token goes.
        num_output_tokens (`int`):
            Number of tokens after merging. Every place is taken by at least one input token.
    """

    output_index: torch.Tensor
    num_output_tokens: int

    def merge(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Averages the tokens that share a place.

        Args:
            x (`torch.Tensor` of shape `(batch, tokens, channels)`): Tokens to merge, of any floating dtype.
            size (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                How much each token counts in the mean, above 0; by default all count the same.

        Returns:
            `torch.Tensor` of shape `(batch, num_output_tokens, channels)` and `x`'s dtype. A place with k contributors
            hands each of them 1/k of its gradient, or its share of their sizes.

        Raises:
            ValueError: If `x` does not have the tokens that were matched.
        """
        batch, tokens, channels = self._check("x", x, self.output_index.shape[1])
        if tokens == self.num_output_tokens:  # nothing is merged, and order is kept
            return x
        # One long list of rows: adding whole rows is several times faster than scattering over an expanded index.
        offset = torch.arange(batch, device=x.device).unsqueeze(1) * self.num_output_tokens
        rows = (self.output_index + offset).flatten()  # (batch * tokens,)
        values = x.float() if x.dtype.itemsize < 4 else x  # half precision cannot count to more than a few hundred
        if size is None:
            size = values.new_ones(batch, tokens)
        else:
            size = size.to(values.dtype)
            values = values * size.unsqueeze(2)
        summed = values.new_zeros(batch * self.num_output_tokens, channels)
        summed = summed.index_add(0, rows, values.reshape(-1, channels))
        mean = summed / self.sum_sizes(size).flatten().unsqueeze(1)
        return mean.view(batch, self.num_output_tokens, channels).to(x.dtype)

    def sum_sizes(self, size: torch.Tensor) -> torch.Tensor:
        """
        Args:
            size (`torch.Tensor` of shape `(batch, tokens)`): Sizes of the input tokens.

        Returns:
            `torch.Tensor` of shape `(batch, num_output_tokens)`: the sum of the sizes at each place.
        """
        return size.new_zeros(size.shape[0], self.num_output_tokens).scatter_add(1, self.output_index, size)

    def unmerge(self, x: torch.Tensor) -> torch.Tensor:
        """Hands every input token the merged token that it became part of.

        Args:
            x (`torch.Tensor` of shape `(batch, num_output_tokens, channels)`): Merged tokens.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, channels)`.

        Raises:
            ValueError: If `x` does not have `num_output_tokens` tokens.
        """
        channels = self._check("x", x, self.num_output_tokens)[2]
        return x.gather(1, self.output_index.unsqueeze(2).expand(-1, -1, channels))

    def _check(self, name: str, x: torch.Tensor, tokens: int) -> tuple[int, int, int]:
        batch = self.output_index.shape[0]
        if x.ndim != 3 or x.shape[:2] != (batch, tokens):
            raise ValueError(f"`{name}` must have shape ({batch}, {tokens}, channels), but has {tuple(x.shape)}.")
        return x.shape


def bipartite_soft_matching(
    metric: torch.Tensor, r: int, class_token: bool = False, keep_order: bool = False
) -> TokenMerging:
    """Finds the `r` pairs of most similar tokens between the tokens at even places and those at odd places.

    Every token at an even place (a source) is linked to the token at an odd place (a destination) with the highest
    cosine similarity; the `r` strongest links are merged. The output holds the kept sources, then all destinations
    in their order. Kept sources stand in ascending order of their places where there is a class token, so that it
    stays first, and in descending order of their best similarity where there is none. That is the original's order;
    with `keep_order` all tokens stand in the order of their places, a merged one at its destination's.

    Args:
        metric (`torch.Tensor` of shape `(batch, tokens, channels)`):
            What similarity is measured on, of any floating dtype; compared in float32. A row of zeros is equally far
            from all.
        r (`int`):
            Number of tokens to remove, `r >= 0`. At most half of the tokens go, the class token not counted:
            `r` is lowered to `(tokens - class_token) // 2`. At 0 all tokens stay, in their order.
        class_token (`bool`, *optional*, defaults to `False`):
            Whether token 0 is a class token, which is never merged and has nothing merged into it.
        keep_order (`bool`, *optional*, defaults to `False`): Whether tokens keep their order.

    Returns:
        [`TokenMerging`]: Carries no gradient; the indices depend on `metric`, the merged values do not.

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
        return TokenMerging(torch.arange(tokens, device=metric.device).expand(batch, -1), tokens)

    with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
        similarity = _cosine_similarity(metric, class_token)  # (batch, sources, destinations)
        best, destination = similarity.max(dim=-1)  # (batch, sources)
        order = best.argsort(dim=-1, descending=True)
        merged, kept = order[:, :r], order[:, r:]
        if keep_order:
            return TokenMerging(_places_in_order(merged, destination.gather(1, merged), tokens), tokens - r)
        if class_token:
            kept = kept.sort(dim=-1).values

        num_kept = kept.shape[1]
        # Sources that are merged go where their destination goes, behind all the kept sources.
        source_place = torch.empty_like(order)
        source_place.scatter_(1, kept, torch.arange(num_kept, device=metric.device).expand(batch, -1))
        source_place.scatter_(1, merged, num_kept + destination.gather(1, merged))

        output_index = order.new_empty(batch, tokens)
        output_index[:, ::2] = source_place
        output_index[:, 1::2] = num_kept + torch.arange(tokens // 2, device=metric.device)
    return TokenMerging(output_index, tokens - r)


def _places_in_order(merged: torch.Tensor, destination: torch.Tensor, tokens: int) -> torch.Tensor:
    """Where each of `tokens` tokens goes if the sources `merged` go to `destination` and the rest close ranks.

    Both `(batch, r)`: `merged` counts the tokens at even places, `destination` those at odd places.
    """
    stays = merged.new_ones(merged.shape[0], tokens).scatter(1, 2 * merged, 0)
    place = stays.cumsum(dim=1) - 1  # (batch, tokens)
    return place.scatter(1, 2 * merged, place.gather(1, 2 * destination + 1))


def _cosine_similarity(metric: torch.Tensor, class_token: bool) -> torch.Tensor:
    """Similarity of each even-placed with each odd-placed token, `(batch, ceil(tokens / 2), floor(tokens / 2))`."""
    metric = F.normalize(metric.float(), dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if class_token:
        similarity[:, 0] = -torch.inf
    return similarity
