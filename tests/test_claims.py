"""benchmarks/claims.py: BLIP-2's first stage, random pruning, and a plan that grows with what is done."""

import json
from dataclasses import asdict

import claims
import pytest
import torch

import claims_report
from claims_run import RandomPruningLayer
from two_stage import CaptionVocabulary, StageOne

from .helpers import tiny_model, tiny_tokenizer
from .test_connectors import peer_model

CAPTIONS = ["a red circle", "a blue triangle to the left of a green square", "a cat"]


@pytest.fixture
def stage():
    torch.manual_seed(0)
    model = peer_model("qformer")
    vocabulary = CaptionVocabulary(tiny_tokenizer(), CAPTIONS)
    return model, StageOne(model, len(vocabulary)), vocabulary.encode(CAPTIONS)


def features():
    return torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(1))


def test_the_first_stage_trains_the_models_own_qformer(stage):
    model, stage_one, text_ids = stage
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(stage_one.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = stage_one(features(), text_ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"ln_vision", "vision_projection", "connector"}
    untrained = [n for n, p in model.connector.named_parameters() if torch.equal(p, before[f"connector.{n}"])]
    assert not [name for name in untrained if not name.endswith("key.bias")]  # which softmax does not see


def test_words_see_queries_and_the_words_before_them_and_queries_see_no_words(stage):
    _, stage_one, text_ids = stage
    stage_one.eval()
    seen = {}
    stage_one.word_head.register_forward_hook(lambda _, inputs, output: seen.update(words=output))
    stage_one.qformer.register_forward_hook(lambda _, inputs, output: seen.update(all=output.last_hidden_state))

    def run(ids):
        with torch.no_grad():
            stage_one._captioning(stage_one.vision_projection(stage_one.ln_vision(features())), ids)
        return seen["words"].clone(), seen["all"][:, :5].clone()

    words, queries = run(text_ids)
    other = text_ids.clone()
    other[1, 6] = other[1, 2]
    changed, same = run(other)
    torch.testing.assert_close(same, queries)
    torch.testing.assert_close(changed[1, :6], words[1, :6])
    assert not torch.allclose(changed[1, 6:], words[1, 6:], atol=1e-3)
    torch.testing.assert_close(changed[0], words[0])


def test_the_vocabulary_holds_the_captions_tokens_alone():
    tokenizer = tiny_tokenizer()
    vocabulary = CaptionVocabulary(tokenizer, CAPTIONS)
    tokens = {token for caption in CAPTIONS for token in tokenizer(caption)["input_ids"]}
    assert len(vocabulary) == 4 + len(tokens)
    rows = vocabulary.encode(CAPTIONS[:2])
    assert rows[:, 0].tolist() == [1, 1] and (rows[0] == 3).sum() == 1 and rows.max() < len(vocabulary)


def test_random_pruning_drops_tokens_and_repeats_itself_only_in_evaluation():
    model = tiny_model(layer_scale_init_value=1.0)
    for layer in model.connector.encoder.layer:
        layer.__class__ = RandomPruningLayer
    tokens = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0))
    prompts = [model.eval().project_vision_features(tokens).pooler_output for _ in range(2)]
    assert prompts[0].shape[1] == model.config.num_image_tokens == 11
    assert torch.equal(*prompts)
    model.connector.train()
    for module in model.connector.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    drawn = [model.project_vision_features(tokens).pooler_output for _ in range(2)]
    assert not torch.allclose(*drawn)


def finish(run, loss):
    """Leaves behind what a finished run would."""
    curve = [{"step": step, "loss": loss, "gap": 1.0, "cider": 100 / loss, "exact": 0.5} for step in run.eval_steps]
    result = {"run": asdict(run), "flops_per_step": 10**12, "stage_one_flops_per_step": 10**11, "curve": curve}
    (claims.RESULTS / f"{run.name}.json").write_text(json.dumps(result))


def test_the_plan_grows_with_what_is_done_and_takes_the_best_of_each_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    first = claims.plan()
    assert {run.group for run in first} == {"sweep"} and len(first) == 4 * len(claims.LEARNING_RATES)
    for run in first:
        finish(run, loss=abs(run.learning_rate - 1e-3) + 0.5)
    variants = [run for run in claims.plan() if claims.load(run) is None and run.group == "sweep"]
    assert {run.method for run in variants} == {name for group in claims.VARIANTS.values() for name in group}
    assert {run.learning_rate for run in variants} == {1e-3}
    for run in variants:
        finish(run, loss=0.1 if run.method == "qformer-large-queries" else 0.9)
    plan = claims.plan()
    long = {run.method: run for run in plan if run.group == "main"}
    assert long.keys() == {*claims.METHODS, "evlgen-tenth-of-data"}
    assert long["qformer"].fields["query_initializer_range"] == 1.0  # the variant was better
    assert long["qformer-two-stage"].stage_one_learning_rate == 1e-3
    assert "pool_size" not in long["mlp-all-tokens"].fields
    assert {run.method for run in plan if run.group == "ablation"} == set(claims.ABLATIONS)
    assert len({run.name for run in plan}) == len(plan)

    for run in plan:
        if run.group == "main" and run.dataset == "openmoji-scenes":
            finish(run, loss=0.2 + run.seed / 10)
    claims.report()
    table = capsys.readouterr().out
    assert "| evlgen | 3 | 0.001 | 200 | ? | 0.300 | 0.300 [0.200, 0.400] |" in table
    assert "| qformer-two-stage | 3 | 0.001 | 300 + 200 | ? | 0.330 |" in table  # the first stage counts
    assert (tmp_path / "openmoji-scenes.png").stat().st_size > 10_000


def test_a_run_that_was_done_with_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    run = claims.plan()[0]
    finish(run, loss=1.0)
    path = tmp_path / f"{run.name}.json"
    path.write_text(path.read_text().replace('"steps": 100', '"steps": 99'))
    with pytest.raises(ValueError, match=r"was made with other settings than .*; remove it to train again"):
        claims.plan()


def test_seconds_are_steps_of_the_method_and_of_the_first_stage():
    result = {"run": {"method": "qformer-two-stage", "stage_one_steps": 10}, "flops_per_step": 5}
    timed = {"qformer-two-stage": 2.0, "stage-one": 1.0, "evlgen": 3.0}
    assert claims_report.position(result, 4, "seconds", timed) == 18
    result = {"run": {"method": "evlgen-tenth-of-data", "stage_one_steps": 0}, "flops_per_step": 5}
    assert claims_report.position(result, 4, "seconds", timed) == 12
    assert claims_report.position(result, 4, "flops", None) == 20
