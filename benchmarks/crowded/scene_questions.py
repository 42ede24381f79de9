"""Questions about crowded scenes, and a small reader that answers all of them from the tokens of a soft prompt.

The reader takes the place of the frozen language model. A caption gives a connector one signal for each image. The
reader asks about every thing and every corner at once, so a run takes minutes. Its figures depend on what the
connectors keep of an image, and on how well it can read their tokens.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from common.demo.crowded_scenes import CONCEPTS, CORNERS, name_plural

KINDS = ("how many", "left of", "corner")
MAX_COUNT = 2  # no scene shows a thing more often
NO_ANSWER = -100


class Answers(NamedTuple):
    """Class indices of the answers to all questions about scenes. `NO_ANSWER` where there is no single answer.

    Args:
        how_many (`torch.LongTensor` of shape `(scenes, concepts)`): How often each thing is there.
        left_of (`torch.LongTensor` of shape `(scenes, concepts)`): The concept on the left of each thing.
        corner (`torch.LongTensor` of shape `(scenes, corners)`): The concept in each corner.
    """

    how_many: torch.Tensor
    left_of: torch.Tensor
    corner: torch.Tensor

    def of(self, scenes: torch.Tensor) -> "Answers":
        return Answers(*(answers[scenes] for answers in self))


def read_answers(captions: list[str], things: Sequence[str] = CONCEPTS) -> Answers:
    """The answers to all questions about scenes of `things` with these captions."""
    how_many = torch.zeros(len(captions), len(things), dtype=torch.long)
    left_of = torch.full_like(how_many, NO_ANSWER)
    corner = torch.zeros(len(captions), len(CORNERS), dtype=torch.long)
    for scene, caption in enumerate(captions):
        rows = [[things.index(name) for name in _names(row)] for row in caption.split(" above ")]
        for concept, count in Counter(concept for row in rows for concept in row).items():
            how_many[scene, concept] = count
        for row in rows:
            for left, right in pairwise(row):
                if how_many[scene, right] == 1:
                    left_of[scene, right] = left
        corner[scene] = torch.tensor([rows[0][0], rows[0][-1], rows[-1][0], rows[-1][-1]])
    return Answers(how_many, left_of, corner)


def _names(row: str) -> list[str]:
    """The things of a row: "an owl, a crab and a bus"."""
    return [noun.split(" ", 1)[1] for noun in row.replace(" and ", ", ").split(", ")]


class AskedQuestions(NamedTuple):
    """Questions of the data set, by the place of their answers in [`Answers`].

    Args:
        kinds (`list[str]`): The kind of each question.
        scenes, places (`torch.LongTensor` of shape `(questions,)`): The scene, and the concept or corner.
    """

    kinds: list[str]
    scenes: torch.Tensor
    places: torch.Tensor


def list_questions(scenes: Dataset, things: Sequence[str] = CONCEPTS) -> AskedQuestions:
    """The questions of all scenes in their order."""
    places = {f"How many {name_plural(name)} are there?": index for index, name in enumerate(things)}
    places |= {f"What is left of the {name}?": index for index, name in enumerate(things)}
    places |= {f"What is at the {corner}?": index for index, corner in enumerate(CORNERS)}
    asked = [(scene, text) for scene, row in enumerate(scenes["questions"]) for text in row]
    return AskedQuestions(
        [text["kind"] for _, text in asked],
        torch.tensor([scene for scene, _ in asked]),
        torch.tensor([places[text["question"]] for _, text in asked]),
    )


class QuestionReader(nn.Module):
    """Answers all questions about an image from its soft prompt.

    Each token gives evidence for each thing. The tokens with the most evidence for a thing make its vector. Counts,
    neighbours and corners are read from these vectors.

    Args:
        dim (`int`): Width of the soft prompt.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.evidence = nn.Linear(dim, len(CONCEPTS))
        self.count = nn.Linear(dim + 2, MAX_COUNT + 1)
        self.left, self.right = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.corner = nn.Linear(dim, len(CORNERS))

    def forward(self, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the logits of all answers, in the order of [`Answers`].

        Args:
            prompts (`torch.Tensor` of shape `(scenes, tokens, dim)`): Soft prompts.
        """
        tokens = self.norm(prompts)
        evidence = self.evidence(tokens).transpose(1, 2)  # (scenes, concepts, tokens)
        present = evidence.logsumexp(dim=2)  # (scenes, concepts)
        vectors = evidence.softmax(dim=2) @ tokens  # (scenes, concepts, dim)
        totals = torch.stack([present, evidence.sigmoid().sum(dim=2)], dim=2)
        how_many = self.count(torch.cat([vectors, totals], dim=2))  # (scenes, concepts, counts)
        pairs = self.right(vectors) @ self.left(vectors).transpose(1, 2) / vectors.shape[2] ** 0.5
        corner = self.corner(vectors).transpose(1, 2)  # (scenes, corners, concepts)
        return how_many, pairs + present.unsqueeze(1), corner + present.unsqueeze(1)

    def loss(self, prompts: torch.Tensor, answers: Answers) -> torch.Tensor:
        """The sum of the three kinds' mean cross-entropies."""
        losses = []
        for logits, truth in zip(self(prompts), answers, strict=True):
            options = {"ignore_index": NO_ANSWER, "reduction": "sum"}
            total = F.cross_entropy(logits.float().flatten(0, 1), truth.flatten(), **options)
            losses.append(total / (truth != NO_ANSWER).sum().clamp(min=1))  # a batch may have no neighbours
        return torch.stack(losses).sum()
