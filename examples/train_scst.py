"""Trains a captioner on CIDEr-D by self-critical sequence training, the last step of the paper's video captioners.

    python examples/train_scst.py --model outputs/demo

Without more arguments it trains the demo's captioner on the demo's images. Only the connector and a video model's
temporal contextualizer are trained. Reward, baseline and length of the samples are logged.
"""

# First: it sets how PyTorch's threads wait, before PyTorch is loaded.
import common.processes  # isort: skip  # noqa: F401

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from train_scst_trainer import SCSTCollator, SCSTTrainer, load_reward
from transformers.hf_argparser import HfArg

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments, parse_arguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.data.rows import true_captions
from common.evaluation.captions import generate_captions
from common.models import load_trainable
from common.training.run import start_run, train_and_report
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-scst.yaml"


@dataclass
class SCSTArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner to train: a folder or a name on the Hub.")
    num_samples: int = HfArg(default=5, help="Captions sampled for each image, at least 2.")
    greedy_baseline: bool = HfArg(default=False, help="Compare samples with the greedy caption, not with each other.")

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` must be at least 2, but is {self.num_samples}.")


ARGUMENTS = (SCSTArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    scst_args, data_args, generation_args, training_args = parse_arguments(*ARGUMENTS, argv=argv, recipe=DEMO_RECIPE)
    if data_args.streaming:
        raise ValueError("`streaming` cannot be set: CIDEr needs the document frequencies of all training captions.")
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        processor = load_trainable(scst_args.model, "model", EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
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
        batches = training_args.per_device_eval_batch_size, training_args.autocast_dtype
        before = generate_captions(model, eval_dataset, trainer.eval_collator, generation_args, *batches)

    def measure(captions: list[str]) -> dict[str, float]:
        truths = [true_captions(row, data_args) for row in eval_dataset]
        scores = {"test_cider_before": before, "test_cider": captions}
        return {name: 100 * mean(reward.score(texts, truths)) for name, texts in scores.items()}  # at most 1000

    return train_and_report(trainer, checkpoint, generation_args, measure)


if __name__ == "__main__":
    main()
