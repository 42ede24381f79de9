"""BLIP-2's first stage (Li et al., ICML 2023, section 3.1), so that the two-stage recipe can be run and timed.

The Q-Former learns from pairs of images and captions without a language model, by three losses: contrast (ITC),
matching (ITM) and captioning by the Q-Former itself (ITG). Its second stage is EVLGen's only one: the caption loss of
the frozen language model. Source of the details: salesforce/LAVIS, lavis/models/blip2_models/blip2_qformer.py.

What differs: it starts from fresh weights, not from BERT's; its vocabulary is that of the training captions; tokens
are projected before the Q-Former; captions that are the same count as right for each other's images.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedTokenizerBase

from common.data.data_arguments import DataArguments
from common.data.loading import true_captions
from modeling_evlgen import EVLGenForConditionalGeneration, QFormerConnector

PAD, CLS, DEC, SEP = range(4)
LABEL_SMOOTHING = 0.1
PROJECTION_DIM = 256


class CaptionVocabulary:
    """The tokens that training captions are made of, renumbered from 4 on, so that the text side stays small.

    Args:
        tokenizer: Cuts captions into tokens.
        captions: The training captions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, captions: list[str]):
        self.tokenizer = tokenizer
        ids = {token for tokens in tokenizer(captions, add_special_tokens=False)["input_ids"] for token in tokens}
        self.ids = {token: place for place, token in enumerate(sorted(ids), start=SEP + 1)}

    def __len__(self) -> int:
        return SEP + 1 + len(self.ids)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """`[CLS]`, the caption, `[SEP]`, then padding: `(captions, tokens)`."""
        rows = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([CLS, *(self.ids[token] for token in row), SEP]) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class StageOneCollator:
    """Batches of cached vision features and captions as the first stage wants them."""

    def __init__(self, vocabulary: CaptionVocabulary, data: DataArguments):
        self.vocabulary = vocabulary
        self.data = data

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "vision_features": torch.from_numpy(np.stack([row["vision_features"][0] for row in rows])).float(),
            "text_ids": self.vocabulary.encode([true_captions(row, self.data)[0] for row in rows]),
        }


class StageOne(nn.Module):
    """The Q-Former of `model`, trained in place, with a text side that is thrown away afterwards.

    Args:
        model ([`EVLGenForConditionalGeneration`]): A model with a [`QFormerConnector`].
        vocabulary_size (`int`): Tokens of the text side.
    """

    def __init__(self, model: EVLGenForConditionalGeneration, vocabulary_size: int):
        super().__init__()
        connector: QFormerConnector = model.connector
        self.ln_vision, self.vision_projection = model.ln_vision, model.vision_projection
        self.connector = connector
        config = Blip2QFormerConfig(**{**connector.qformer.config.to_dict(), "use_qformer_text_input": True})
        self.qformer = Blip2QFormerModel._from_config(config)
        self.qformer.layernorm = connector.qformer.layernorm
        for layer, shared in zip(self.qformer.encoder.layer, connector.qformer.encoder.layer, strict=True):
            for name, part in shared.named_children():  # all but the text's feed-forward
                setattr(layer, name, part)
        dim = connector.config.hidden_size
        self.word_embeddings = nn.Embedding(vocabulary_size, dim)
        self.text_positions = nn.Embedding(64, dim)
        self.image_head, self.text_head = nn.Linear(dim, PROJECTION_DIM), nn.Linear(dim, PROJECTION_DIM)
        self.match_head = nn.Linear(dim, 2)
        self.word_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, vocabulary_size)
        )
        self.temperature = nn.Parameter(torch.tensor(0.07))
        for table in (self.word_embeddings, self.text_positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, vision_features: torch.Tensor, text_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            vision_features (`torch.Tensor` of shape `(batch, num_vision_tokens, vision_hidden_size)`): Images.
            text_ids (`torch.LongTensor` of shape `(batch, tokens)`): Their captions, by [`CaptionVocabulary`].

        Returns:
            The sum of the three losses, each of them, and how many images find a right caption in the batch.
        """
        tokens = self.vision_projection(self.ln_vision(vision_features))
        tokens = self.connector.embed_tokens(tokens)  # (batch, num_vision_tokens, dim)
        # Captions that are the same are right for each other's images: (batch, batch)
        same = (text_ids[:, None] == text_ids[None]).all(dim=2)
        similarity, contrast = self._contrast(tokens, text_ids, same)
        matching = self._matching(tokens, text_ids, similarity, same)
        captioning = self._captioning(tokens, text_ids)
        best = similarity.argmax(dim=1, keepdim=True)  # (batch, 1): the caption that each image finds
        return {
            "loss": contrast + matching + captioning,
            "contrast": contrast.detach(),
            "matching": matching.detach(),
            "captioning": captioning.detach(),
            "recall@1": same.gather(1, best).float().mean(),
        }

    def _contrast(
        self, tokens: torch.Tensor, text_ids: torch.Tensor, same: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarity of each image to each caption, `(batch, batch)`, by the query that fits best; and ITC."""
        queries = self.connector.query_tokens.expand(len(tokens), -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        read = self.qformer(
            query_embeds=self._embed(text_ids), query_length=0, attention_mask=(text_ids != PAD).long()
        ).last_hidden_state[:, 0]
        images = F.normalize(self.image_head(seen), dim=-1)  # (batch, queries, projection)
        captions = F.normalize(self.text_head(read), dim=-1)  # (batch, projection)
        similarity = torch.einsum("iqd,jd->ijq", images, captions).amax(dim=2) / self.temperature
        targets = same / same.sum(dim=1, keepdim=True)  # (batch, batch)
        losses = [F.cross_entropy(s, targets, label_smoothing=LABEL_SMOOTHING) for s in (similarity, similarity.T)]
        return similarity.detach(), sum(losses) / 2

    def _matching(
        self, tokens: torch.Tensor, text_ids: torch.Tensor, similarity: torch.Tensor, same: torch.Tensor
    ) -> torch.Tensor:
        """ITM: does the caption fit the image? Wrong partners are drawn by how much they look right."""
        if same.all(dim=1).any():  # a caption that is right for every image has no wrong partner
            return tokens.new_zeros(())
        batch = len(tokens)
        wrong = similarity.float().softmax(dim=1).masked_fill(same, 0) + 1e-6 * ~same
        wrong_captions = torch.multinomial(wrong, 1).squeeze(1)
        wrong = similarity.float().T.softmax(dim=1).masked_fill(same, 0) + 1e-6 * ~same
        wrong_images = torch.multinomial(wrong, 1).squeeze(1)
        tokens = torch.cat([tokens, tokens[wrong_images], tokens])
        text_ids = torch.cat([text_ids, text_ids, text_ids[wrong_captions]])
        num_queries = self.connector.query_tokens.shape[1]
        queries = self.connector.query_tokens.expand(len(tokens), -1, -1)
        mask = torch.cat([text_ids.new_ones(len(tokens), num_queries), (text_ids != PAD).long()], dim=1)
        output = self.qformer(
            query_embeds=torch.cat([queries, self._embed(text_ids)], dim=1),
            query_length=num_queries,
            attention_mask=mask,
            encoder_hidden_states=tokens,
        ).last_hidden_state[:, :num_queries]
        logits = self.match_head(output).mean(dim=1)  # (3 * batch, 2)
        targets = (torch.arange(3 * batch, device=tokens.device) < batch).long()
        return F.cross_entropy(logits, targets)

    def _captioning(self, tokens: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """ITG: words see the queries and the words before them; queries do not see words."""
        num_queries = self.connector.query_tokens.shape[1]
        inputs = text_ids.clone()
        inputs[:, 0] = DEC
        length = inputs.shape[1]
        seen = torch.ones(num_queries + length, num_queries + length, dtype=torch.bool, device=tokens.device).tril()
        seen[:num_queries, :num_queries] = True
        padding = F.pad(text_ids != PAD, (num_queries, 0), value=True)  # (batch, queries + tokens)
        mask = seen[None, None] & padding[:, None, None]
        queries = self.connector.query_tokens.expand(len(tokens), -1, -1)
        output = self.qformer(
            query_embeds=torch.cat([queries, self._embed(inputs)], dim=1),
            query_length=num_queries,
            attention_mask=mask,
            encoder_hidden_states=tokens,
        ).last_hidden_state[:, num_queries:-1]
        targets = text_ids[:, 1:].masked_fill(text_ids[:, 1:] == PAD, -100)
        logits = self.word_head(output)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=LABEL_SMOOTHING)

    def _embed(self, text_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(text_ids) + self.text_positions.weight[: text_ids.shape[1]]  # (batch, tokens, dim)
