"""Held-out figures of a captioner: its loss with the right and with wrong images, and the captions it generates."""

from collections import Counter
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BatchFeature

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments
from common.data.collator import CaptionCollator
from common.data.rows import count_images, true_captions
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.explanations import explain_sequences, generate_once
from processing_evlgen import EVLGenProcessor

NUMBERS = ("probability", "confidence", "evidence")  # of an explained word


@torch.no_grad()
def caption_loss(
    model: EVLGenForConditionalGeneration, dataset: Dataset, collator: CaptionCollator, args: EVLGenTrainingArguments
) -> float:
    """Mean cross-entropy of the captions, in nats per token over all tokens."""
    model.eval()
    loss, tokens, dtype = 0.0, 0, args.autocast_dtype
    loader = DataLoader(dataset, batch_size=args.per_device_eval_batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc="Held-out loss", leave=False):
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss += model(**batch, num_items_in_batch=1).loss.item()  # a sum, as batches differ in tokens
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return loss / tokens


class WrongImages(Dataset):
    """Each row with the images of another row. A model that looks at images has a higher loss on it.

    The other row has another caption and as many images. A row for which there is none keeps its images.
    """

    def __init__(self, dataset: Dataset, data_args: DataArguments):
        self.dataset = dataset
        self.image_columns = {"vision_features", "token_places", data_args.image_column, data_args.video_column}
        rows = [(true_captions(row, data_args), count_images(row.get(data_args.image_column))) for row in dataset]
        count = len(rows)
        self.donors = []
        for index, (captions, images) in enumerate(rows):
            # Half a data set away first: neighbours are often alike.
            others = ((index + step) % count for step in range(count // 2, count // 2 + count))
            donors = (other for other in others if rows[other][0] != captions and rows[other][1] == images)
            self.donors.append(next(donors, index))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        donor = self.dataset[self.donors[index]]
        return self.dataset[index] | {name: value for name, value in donor.items() if name in self.image_columns}


@torch.no_grad()
def generate_answers(
    model: EVLGenForConditionalGeneration,
    batch: BatchFeature,
    processor: EVLGenProcessor,
    generation_args: GenerationArguments,
    dtype: torch.dtype,
    seconds: Counter | None = None,
) -> list[dict[str, Any]]:
    """Generates a text for each prompt of a batch, and strips it, under `"text"`; `dtype` is for autocast.

    With `seconds`, an answer also has its least certain word, and its numbers. `seconds` adds up the time of the
    `"texts"` and that of the `"evidence"`.
    """
    model.eval()
    batch, start = batch.to(model.device), perf_counter()
    options = {name: getattr(generation_args, name) for name in ("num_beams", "min_new_tokens", "max_new_tokens")}
    if generation_args.num_beams > 1:  # `generate` warns of a length penalty without beams
        options["length_penalty"] = generation_args.length_penalty
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        if seconds is None:
            sequences, explained = model.generate(**batch, do_sample=False, **options), []
        else:
            inputs, sequences = generate_once(model, batch, do_sample=False, **options)
            between = perf_counter()  # `generate` reads each token, so a GPU has finished
            explained = explain_sequences(model, processor, inputs, sequences, steps=0)
            seconds.update({"texts": between - start, "evidence": perf_counter() - between})
    new_tokens = sequences[:, batch["input_ids"].shape[1] :]  # (batch, new tokens)
    texts = processor.batch_decode(new_tokens, skip_special_tokens=True)
    answers: list[dict[str, Any]] = [{"text": text.strip()} for text in texts]
    for answer, words in zip(answers, explained, strict=False):
        if words:
            word = min(words, key=lambda word: word.confidence)
            answer |= {"least_certain": word.word, **{name: getattr(word, name) for name in NUMBERS}}
    return answers


def generate_captions(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    collator: CaptionCollator,
    generation_args: GenerationArguments,
    args: EVLGenTrainingArguments,
) -> list[str]:
    """Generates a caption for each image, in the data set's order."""
    captions = []
    loader = DataLoader(dataset, batch_size=args.per_device_eval_batch_size, collate_fn=collator.prompts)
    for batch in tqdm(loader, "Captions", leave=False):
        answers = generate_answers(model, batch, collator.processor, generation_args, args.autocast_dtype)
        captions += [answer["text"] for answer in answers]
    return captions


def evaluate_captions(
    model: EVLGenForConditionalGeneration,
    dataset: Dataset,
    collator: CaptionCollator,
    generation_args: GenerationArguments,
    args: EVLGenTrainingArguments,
) -> tuple[dict[str, float], list[str]]:
    """Losses with right and wrong images, their gap, the share of exact captions; and the generated captions."""
    data_args = collator.data_args
    loss = caption_loss(model, dataset, collator, args)
    metrics = {"test_loss": loss}
    references = [true_captions(row, data_args) for row in dataset]
    if len({tuple(captions) for captions in references}) > 1:
        wrong_loss = caption_loss(model, WrongImages(dataset, data_args), collator, args)
        metrics |= {"test_loss_wrong_images": wrong_loss, "test_loss_gap": wrong_loss - loss}
    generated = generate_captions(model, dataset, collator, generation_args, args)
    exact = sum(caption in captions for caption, captions in zip(generated, references, strict=True))
    return {**metrics, "test_exact_captions": exact / len(generated)}, generated
