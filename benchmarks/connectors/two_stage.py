"""BLIP-2's first stage (Li et al., ICML 2023, section 3.1).

The Q-Former learns from pairs of images and captions without a language model, by three losses: contrast (ITC),
matching (ITM) and captioning by the Q-Former itself (ITG). BLIP-2's second stage is EVLGen's only stage: the caption
loss of the frozen language model. The details follow salesforce/LAVIS, lavis/models/blip2_models/blip2_qformer.py.

There are four differences. The weights start at random, not from BERT. The vocabulary has only the tokens of the
training captions. Vision tokens are projected before the Q-Former. Images with equal captions share them as positives.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedTokenizerBase

from common.data.collator import CaptionCollator
from common.data.rows import true_captions
from modeling_evlgen import EVLGenForConditionalGeneration, QFormerConnector

PAD, CLS, DEC, SEP = range(4)
LABEL_SMOOTHING = 0.1
PROJECTION_DIM = 256


class CaptionVocabulary:
    """The tokens of the training captions, renumbered from 4 so that the embedding of words stays small."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, captions: list[str]):
        self.tokenizer = tokenizer
        ids = {token for tokens in tokenizer(captions, add_special_tokens=False)["input_ids"] for token in tokens}
        self.ids = {token: index for index, token in enumerate(sorted(ids), start=SEP + 1)}

    def __len__(self) -> int:
        return SEP + 1 + len(self.ids)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Returns `[CLS]`, the caption, `[SEP]` and padding, int64, `(captions, tokens)`."""
        rows = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([CLS, *(self.ids[token] for token in row), SEP]) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class StageOneCollator(CaptionCollator):
    """Makes batches for [`StageOne`] of cached vision features and captions."""

    vocabulary: CaptionVocabulary

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "vision_features": torch.from_numpy(np.stack([row["vision_features"][0] for row in rows])).float(),
            "text_ids": self.vocabulary.encode([true_captions(row, self.data_args)[0] for row in rows]),
        }


class StageOne(nn.Module):
    """The first stage of a model. It shares the model's Q-Former, and adds a text side that is not kept."""

    def __init__(self, model: EVLGenForConditionalGeneration, vocabulary_size: int):
        super().__init__()
        connector: QFormerConnector = model.connector
        self.ln_vision, self.vision_projection = model.ln_vision, model.vision_projection
        self.connector = connector
        config = Blip2QFormerConfig(**{**connector.qformer.config.to_dict(), "use_qformer_text_input": True})
        self.qformer = Blip2QFormerModel(config)
        self.qformer.layernorm = connector.qformer.layernorm
        for layer, shared in zip(self.qformer.encoder.layer, connector.qformer.encoder.layer, strict=True):
            for name, part in shared.named_children():  # all except the feed-forward of the text
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
        """Returns the sum of the losses, and each loss.

        Shapes are `(batch, num_vision_tokens, vision_hidden_size)` and `(batch, tokens)`.
        """
        tokens = self.vision_projection(self.ln_vision(vision_features))
        tokens = self.connector.embed_tokens(tokens)  # (batch, num_vision_tokens, dim)
        same = (text_ids[:, None] == text_ids[None]).all(dim=2)  # (batch, batch): images with equal captions
        similarity, contrast = self._contrast(tokens, text_ids, same)
        matching = self._matching(tokens, text_ids, similarity, same)
        captioning = self._captioning(tokens, text_ids)
        return {
            "loss": contrast + matching + captioning,
            "contrast": contrast.detach(),
            "matching": matching.detach(),
            "captioning": captioning.detach(),
        }

    def _contrast(
        self, tokens: torch.Tensor, text_ids: torch.Tensor, same: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the similarity of each image's best query to each caption, `(batch, batch)`, and the ITC loss."""
        queries = self.connector.query_tokens.expand(len(tokens), -1, -1)
        queries = self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        words = self.qformer(
            query_embeds=self._embed(text_ids), query_length=0, attention_mask=(text_ids != PAD).long()
        ).last_hidden_state  # (batch, text tokens, dim)
        images = F.normalize(self.image_head(queries), dim=-1)  # (batch, queries, projection)
        captions = F.normalize(self.text_head(words[:, 0]), dim=-1)  # (batch, projection)
        similarity = torch.einsum("iqd,jd->ijq", images, captions).amax(dim=2) / self.temperature
        targets = same / same.sum(dim=1, keepdim=True)  # (batch, batch)
        losses = [F.cross_entropy(s, targets, label_smoothing=LABEL_SMOOTHING) for s in (similarity, similarity.T)]
        return similarity.detach(), sum(losses) / 2

    def _matching(
        self, tokens: torch.Tensor, text_ids: torch.Tensor, similarity: torch.Tensor, same: torch.Tensor
    ) -> torch.Tensor:
        """The ITM loss: whether a caption fits an image. Similar wrong partners are drawn more often."""
        if same.all(dim=1).any():  # a caption that is right for every image has no wrong partner
            return tokens.new_zeros(())
        batch = len(tokens)
        wrong_captions, wrong_images = (
            torch.multinomial(scores.softmax(dim=1).masked_fill(same, 0) + 1e-6 * ~same, 1).squeeze(1)  # (batch,)
            for scores in (similarity.float(), similarity.float().T)
        )
        # Right pairs, right captions with wrong images, and right images with wrong captions: (3 * batch, ...)
        tokens = torch.cat([tokens, tokens[wrong_images], tokens])
        text_ids = torch.cat([text_ids, text_ids, text_ids[wrong_captions]])
        num_queries = self.connector.query_tokens.shape[1]
        mask = torch.cat([text_ids.new_ones(len(tokens), num_queries), (text_ids != PAD).long()], dim=1)
        queries = self._encode(tokens, text_ids, mask)[:, :num_queries]
        logits = self.match_head(queries).mean(dim=1)  # (3 * batch, 2)
        targets = (torch.arange(3 * batch, device=tokens.device) < batch).long()
        return F.cross_entropy(logits, targets)

    def _captioning(self, tokens: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """The ITG loss. Words attend to queries and earlier words. Queries do not attend to words."""
        num_queries = self.connector.query_tokens.shape[1]
        inputs = text_ids.clone()
        inputs[:, 0] = DEC
        length = inputs.shape[1]
        size = num_queries + length
        attended = torch.ones(size, size, dtype=torch.bool, device=tokens.device).tril()  # (size, size)
        attended[:num_queries, :num_queries] = True
        not_padding = F.pad(text_ids != PAD, (num_queries, 0), value=True)  # (batch, size)
        mask = attended[None, None] & not_padding[:, None, None]  # (batch, 1, size, size)
        words = self._encode(tokens, inputs, mask)[:, num_queries:-1]
        targets = text_ids[:, 1:].masked_fill(text_ids[:, 1:] == PAD, -100)
        logits = self.word_head(words)  # (batch, text tokens - 1, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=LABEL_SMOOTHING)

    def _encode(self, tokens: torch.Tensor, text_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Runs the Q-Former over queries and words together. Returns `(batch, queries + text tokens, dim)`."""
        queries = self.connector.query_tokens.expand(len(tokens), -1, -1)
        return self.qformer(
            query_embeds=torch.cat([queries, self._embed(text_ids)], dim=1),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=tokens,
        ).last_hidden_state

    def _embed(self, text_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(text_ids) + self.text_positions.weight[: text_ids.shape[1]]  # (batch, tokens, dim)
