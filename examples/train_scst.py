"""Fine-tunes a captioner on CIDEr-D by self-critical sequence training, the paper's last step for captions of videos.

    python examples/train_scst.py --model outputs/demo

Without more arguments it goes on with the demo's model and images. Only the connector's side is trained, and a video
model's temporal contextualizer; reward, baseline and length of the samples are logged.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from train_scst_reward import load_reward
from train_scst_trainer import SCSTCollator, SCSTTrainer
from transformers import set_seed

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_splits
from common.data.loading import load_captions, true_captions
from common.evaluation.captions import generate_captions
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import load_trainable
from common.processes import use_all_cores
from common.training.report import arithmetic, train_and_report
from common.training.training_arguments import TrainingSettings
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-scst.yaml"


@dataclass
class SCSTArguments:
    model: str = field(
        default="outputs/demo", metadata={"help": "Captioner to go on with: a folder or a name on the Hub."}
    )
    num_samples: int = field(default=5, metadata={"help": "Captions sampled for each image, at least 2."})
    greedy_baseline: bool = field(
        default=False, metadata={"help": "Compare with the greedy caption, not the other samples."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    scst, data, generation, training = parse_arguments(
        SCSTArguments, DataArguments, GenerationArguments, TrainingSettings, argv=argv, recipe=DEMO_RECIPE
    )
    if scst.num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2, but is {scst.num_samples}.")
    if data.streaming:
        raise ValueError("`streaming` cannot be set: CIDEr needs the document frequencies of all training captions.")
    use_all_cores(training.device)
    set_seed(training.seed)
    with training.main_process_first(desc="preparing model and data"):
        train, test = load_captions(data, training.seed)
        reward = load_reward(train, data)
        images = test
        model = load_trainable("model", EVLGenForConditionalGeneration.from_pretrained, scst.model)
        model.to(training.device)
        processor = EVLGenProcessor.from_pretrained(scst.model)
        if data.cache_features:
            train, test = cache_splits(model, processor, train, test, data, training.seed)

    def held_out_reward() -> float | None:
        """Mean CIDEr-D of what the model says about held-out images, times 100, on the main process."""
        if test is None or training.process_index != 0:
            return None
        collator = CaptionCollator(processor, data, training=False)
        captions = generate_captions(
            model, test, collator, generation, training.per_device_eval_batch_size, arithmetic(training)
        )
        return 100 * mean(reward.score(captions, [true_captions(row, data) for row in test]))

    before = held_out_reward()
    metrics = train_and_report(
        model,
        processor,
        train,
        test,
        images,
        data,
        generation,
        training,
        collator_class=SCSTCollator,
        trainer_class=SCSTTrainer,
        reward=reward,
        num_samples=scst.num_samples,
        greedy_baseline=scst.greedy_baseline,
        max_new_tokens=generation.max_new_tokens,
    )
    if before is not None:
        metrics |= {"test_cider_before": before, "test_cider": held_out_reward()}
        (Path(training.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"CIDEr-D on held-out rows: {before:.1f} before, {metrics['test_cider']:.1f} now (at most 1000).")
    return metrics


if __name__ == "__main__":
    main()
