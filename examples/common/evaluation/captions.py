"""Does the model look at the image? Held-out loss with the right images and with others, and what it says."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.loading import count_images, true_captions
from common.evaluation.evaluation_arguments import GenerationArguments
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor


@torch.no_grad()
def caption_loss(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    collator: CaptionCollator,
    batch_size: int,
    dtype: torch.dtype,
) -> float:
    """Mean cross-entropy of the captions, in nats per token over all tokens of the data set.

    Args:
        dtype: Precision of the arithmetic, for autocast.
    """
    model.eval()
    loss, tokens = 0.0, 0
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc="Held-out loss", leave=False):
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss += model(**batch, num_items_in_batch=1).loss.item()
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return loss / tokens


class WrongImages(Dataset):
    """Every row with what another row shows, which has another caption and as many images; its own if none has."""

    def __init__(self, dataset: Dataset, data: DataArguments):
        self.dataset = dataset
        self.images = {"vision_features", data.image_column, data.video_column}
        known = [(true_captions(row, data), count_images(row.get(data.image_column))) for row in dataset]
        count = len(known)
        self.donors = []
        for index, (caption, images) in enumerate(known):
            others = ((index + step) % count for step in range(count // 2, count // 2 + count))
            fitting = (other for other in others if known[other][0] != caption and known[other][1] == images)
            self.donors.append(next(fitting, index))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        donor = self.dataset[self.donors[index]]
        return self.dataset[index] | {name: value for name, value in donor.items() if name in self.images}


def majority_accuracy(train: Any, test: Any, data: DataArguments) -> float:
    """The share of held-out questions that the most frequent answer in training to the same question gets right.

    Args:
        train, test: Rows with questions and answers.
        data: Names their columns.

    Returns:
        `float` from 0 to 1. A question that training does not hold gets the most frequent answer of all.
    """
    counts: defaultdict[str | None, Counter] = defaultdict(Counter)
    for row in _text_rows(train, data):
        answer = true_captions(row, data)[0]
        counts[row[data.prompt_column]][answer] += 1
        counts[None][answer] += 1
    rows = _text_rows(test, data)
    guesses = [counts[q if (q := row[data.prompt_column]) in counts else None].most_common(1)[0][0] for row in rows]
    return sum(guess in true_captions(row, data) for guess, row in zip(guesses, rows, strict=True)) / len(rows)


def _text_rows(dataset: Any, data: DataArguments) -> Any:
    """The rows without their images."""
    plain = getattr(dataset, "dataset", dataset)  # of cached features
    return plain.select_columns([data.prompt_column, data.caption_column])


@torch.no_grad()
def generate_batches(
    model: EVLGenForConditionalGeneration,
    loader: DataLoader,
    processor: EVLGenProcessor,
    generation: GenerationArguments,
    dtype: torch.dtype,
) -> Iterator[list[str]]:
    """What the model says about the images or videos of each batch of prompts.

    Args:
        model: The captioner.
        loader: Gives batches of prompts from the processor, without labels.
        processor: Turns tokens into text.
        generation: How to decode.
        dtype: Precision of the arithmetic, for autocast.

    Yields:
        The texts of a batch, without spaces around them.
    """
    model.eval()
    of_beams = {"length_penalty": generation.length_penalty} if generation.num_beams > 1 else {}
    for batch in loader:
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            sequences = model.generate(
                **batch,
                do_sample=False,
                num_beams=generation.num_beams,
                min_new_tokens=generation.min_new_tokens,
                max_new_tokens=generation.max_new_tokens,
                **of_beams,
            )
        new_tokens = sequences[:, batch["input_ids"].shape[1] :]
        yield [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]


def generate_captions(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    collator: CaptionCollator,
    generation: GenerationArguments,
    batch_size: int,
    dtype: torch.dtype,
) -> list[str]:
    """What the model says about each image, in the data set's order."""
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collator.prompts)
    batches = generate_batches(model, loader, collator.processor, generation, dtype)
    return [caption for batch in tqdm(batches, "Captions", len(loader), leave=False) for caption in batch]


def evaluate_captions(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    dataset: Dataset,
    data: DataArguments,
    generation: GenerationArguments,
    batch_size: int,
    dtype: torch.dtype,
) -> tuple[dict[str, float], list[str]]:
    """Losses with right and wrong images, their gap, and the share of captions that are right to the letter.

    Returns:
        The figures, and the generated captions in the data set's order. Where all images have the same caption, none
        is the wrong one, and those figures are left out.
    """
    collator = CaptionCollator(processor, data, training=False)
    loss = caption_loss(model, dataset, collator, batch_size, dtype)
    metrics = {"test_loss": loss}
    if len({tuple(true_captions(row, data)) for row in dataset}) > 1:
        wrong_loss = caption_loss(model, WrongImages(dataset, data), collator, batch_size, dtype)
        metrics |= {"test_loss_wrong_images": wrong_loss, "test_loss_gap": wrong_loss - loss}
    captions = generate_captions(model, dataset, collator, generation, batch_size, dtype)
    right = sum(caption in true_captions(row, data) for caption, row in zip(captions, dataset, strict=True))
    return {**metrics, "test_exact_captions": right / len(captions)}, captions
