"""What the model returns."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast


@dataclass
class EVLGenImageOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(tiles, num_vision_tokens, vision_hidden_size)`):
            The frozen vision tower's tokens.
        pooler_output (`torch.Tensor` of shape `(batch, num_image_tokens, text_hidden_size)`):
            The soft prompt: merged tokens in the language model's embedding space. A tuple with a tensor for each
            image, if images differ in their number of tokens.
        output_index (`torch.LongTensor` of shape `(batch, num_vision_tokens)`):
            For each vision token, the index of the soft prompt's token that it was merged into. A tuple, if images
            differ in their tiles or their number of tokens. The patches of several tiles are in rows over the whole
            image. None from a connector that does not merge.
        token_places (`torch.FloatTensor` of shape `(videos, num_vision_tokens, 3)`, *optional*):
            For merged videos: seconds since the first frame, row and column in the grid of patches of each token of
            `last_hidden_state`.
    """

    output_index: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    token_places: torch.Tensor | None = None

    @property
    def soft_tokens(self) -> torch.Tensor:
        """The tokens of all soft prompts in one tensor, `(tokens, text_hidden_size)`."""
        prompts = self.pooler_output
        return torch.cat(prompts) if isinstance(prompts, tuple | list) else prompts.reshape(-1, prompts.shape[-1])


@dataclass
class EVLGenModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, dim)`): The input of the language model's head.
        image_outputs, video_outputs ([`EVLGenImageOutput`], *optional*): The encoded images and videos, if any.
    """

    image_outputs: EVLGenImageOutput | None = None
    video_outputs: EVLGenImageOutput | None = None


@dataclass
class EVLGenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.Tensor`, *optional*): The mean cross-entropy of the targets, if there are labels.
        logits (`torch.Tensor` of shape `(batch, sequence, vocab)`):
            Scores of the next token; for a `logits_to_keep` of shape `(batch, sequence)`, of shape `(kept, vocab)`.
        image_outputs, video_outputs ([`EVLGenImageOutput`], *optional*): The encoded images and videos, if any.
    """

    image_outputs: EVLGenImageOutput | None = None
    video_outputs: EVLGenImageOutput | None = None
