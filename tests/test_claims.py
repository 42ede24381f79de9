"""benchmarks/claims: BLIP-2's first stage, random pruning, the file of results, and a plan that grows with it."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pretrain
import pytest
import torch
import yaml
from filelock import FileLock
from huggingface_hub import constants
from transformers import BertConfig, BertModel, LlamaConfig

from benchmarks.claims import __main__ as claims
from benchmarks.claims import plan, runs, tables, training_run
from benchmarks.claims.runs import Run, load, shared_recipe
from benchmarks.claims.training_run import RandomPruningLayer
from benchmarks.claims.two_stage import CaptionVocabulary, StageOne
from benchmarks.training_step import DEMO_VISION, TEXT
from common.models import connector_fields
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import save_image_folder, save_towers, tiny_model, tiny_tokenizer
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
    parts = []  # contrast, matching and captioning
    for _ in range(160):
        losses = stage_one(features(), text_ids)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        parts.append([losses[name].item() for name in ("contrast", "matching", "captioning")])
    first, last = torch.tensor(parts[:5]).mean(dim=0), torch.tensor(parts[-5:]).mean(dim=0)
    assert (last < 0.6 * first).all(), (first, last)
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
    model = tiny_model()
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


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty file of results; gives its path."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(claims, "IMAGES", tmp_path)
    return runs.RESULTS


def result_of(run, loss=0.5):
    """What a finished run returns."""
    curve = [{"step": step, "loss": loss, "gap": 1.0, "cider": 100 / loss, "exact": 0.5} for step in run.eval_steps]
    return {
        "run": asdict(run),
        "recipe": shared_recipe(),
        "flops_per_step": 10**12,
        "curve": curve,
        "training_loss": [[1, 9.0], [90, loss], [100, loss]],
        "stage_one_flops_per_step": 10**11,
        "stage_one_held_out": {"contrast": loss, "matching": loss, "captioning": loss, "recall@1": 0.5},
    }


def finish(run, loss):
    runs.append(result_of(run, loss))


def test_a_line_that_was_cut_off_is_ignored_and_replaced(results):
    first, second = plan.plan()[:2]
    finish(first, 0.5)
    whole = results.read_bytes()
    results.write_bytes(whole + whole[:100])  # a process was killed while it wrote
    assert load(first) == json.loads(whole) and load(second) is None
    finish(second, 0.7)
    assert results.read_bytes().startswith(whole) and len(results.read_text().splitlines()) == 2
    assert load(second)["curve"][-1]["loss"] == 0.7


def test_processes_that_finish_at_once_lose_no_line(results):
    finished = [plan.short_run("evlgen", rate / 1000) for rate in range(1, 41)]
    with ThreadPoolExecutor(8) as pool:  # each append opens and locks the file anew, as a process does
        list(pool.map(lambda run: finish(run, run.learning_rate), finished))
    assert [load(run)["curve"][-1]["loss"] for run in finished] == [run.learning_rate for run in finished]


def test_the_last_timing_counts(results):
    for seconds in (1.0, 2.0):
        runs.append({"timing": "easy-vqa", "seconds": {"evlgen": seconds}, "fields": {}})
    assert runs.load_timing("easy-vqa")["seconds"] == {"evlgen": 2.0} and runs.load_timing("openmoji-scenes") is None


def test_timings_of_other_connectors_are_refused(monkeypatch):
    timing = json.loads(json.dumps(runs.load_timing("easy-vqa")))
    timing["fields"]["qformer"]["num_query_tokens"] = 24
    monkeypatch.setattr(claims, "load_timing", lambda dataset: timing)
    with pytest.raises(ValueError, match=r"qformer was timed with .*\. Run --time again"):
        claims.load_step_seconds("easy-vqa")


def test_all_runs_of_the_docs_are_in_the_file_of_results(capsys):
    claims.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 110 and all(line.startswith("done ") for line in lines)


def test_a_command_trains_what_no_other_process_trains(results, monkeypatch, capsys):
    first, second, third = planned = plan.plan()[:3]
    monkeypatch.setattr(claims, "plan", lambda: planned)
    finish(second, 0.5)
    trained, waited = [], []
    monkeypatch.setattr(claims, "train", lambda run: trained.append(run) or result_of(run))
    lock = FileLock(results.with_name(f"{first.name}.lock"))
    lock.acquire()

    def sleep(seconds):  # meanwhile the other process finishes
        waited.append(seconds)
        finish(first, 0.9)
        lock.release()

    monkeypatch.setattr(claims.time, "sleep", sleep)
    claims.main([])
    assert trained == [third] and len(waited) == 1
    assert load(first)["curve"][-1]["loss"] == 0.9 and load(third)
    assert not results.with_name(f"{third.name}.lock").exists()
    assert "| evlgen | 1 | 0.003 |" in capsys.readouterr().out


def test_the_plan_grows_with_what_is_done_and_takes_the_best_of_each_sweep(results, capsys):
    variant_names = {name for group in plan.VARIANTS.values() for name in group}
    first = plan.plan()
    assert {run.group for run in first} == {"sweep"} and len(first) == 4 * len(plan.LEARNING_RATES)
    assert shared_recipe()["whitening_images"] > 0
    for run in first:
        best_rate = 3e-3 if run.method == "evlgen" else 1e-3
        finish(run, loss=abs(run.learning_rate - best_rate) + 0.5)
    further = [run for run in plan.plan() if load(run) is None]
    assert {(run.method, run.learning_rate) for run in further} == {  # on the side of the better rate
        (name, 1e-2 if name == "evlgen" else 3e-4) for name in (*plan.SWEPT, "evlgen-paper-blocks")
    }
    for run in further:
        finish(run, loss=0.9)
    variants = [run for run in plan.plan() if load(run) is None and run.method in variant_names]
    assert {run.method for run in variants} == variant_names
    assert {(run.learning_rate, run.seed) for run in variants} == {(1e-3, plan.SWEEP_SEEDS[0])}
    for run in variants:
        finish(run, loss=0.1 if run.method == "qformer-cross-attention-everywhere" else 0.9)
    seeds = [run for run in plan.plan() if load(run) is None]
    finalists = {(run.method, run.learning_rate) for run in seeds}
    assert {
        ("evlgen", 1e-3),
        ("evlgen", 3e-3),
        ("qformer", 1e-3),
        ("qformer-cross-attention-everywhere", 1e-3),
    } < finalists
    assert {run.seed for run in seeds} == set(plan.SWEEP_SEEDS[1:]) and len(seeds) == 4 * 2
    assert plan.best("evlgen") is None
    for run in seeds:
        wins = (run.method, run.learning_rate) in {("evlgen", 1e-3), ("qformer-cross-attention-everywhere", 1e-3)}
        finish(run, loss=0.6 if wins else 0.9)  # one seed of EVLGen had been lucky
    assert plan.best("evlgen").learning_rate == 1e-3
    stages = [run for run in plan.plan() if run.method == "qformer-two-stage"]
    assert [run.stage_one_learning_rate for run in stages] == list(plan.STAGE_ONE_RATES)
    assert {(run.learning_rate, run.group, run.fields["cross_attention_frequency"]) for run in stages} == {
        (1e-3, "sweep", 1)  # those of the best Q-Former
    }
    for run in stages:
        finish(run, loss=abs(run.stage_one_learning_rate - 3e-4) + 1)
    seconds = [run for run in plan.plan() if run.method == "qformer-two-stage" and load(run) is None]
    assert {(run.stage_one_learning_rate, run.learning_rate) for run in seconds} == {(3e-4, 3e-4), (3e-4, 3e-3)}
    assert plan.best("qformer-two-stage") is None
    for run in seconds:
        finish(run, loss=float("nan") if run.learning_rate == 3e-3 else 0.9)  # a run that diverges is no winner
    planned = plan.plan()
    long = {run.method: run for run in planned if run.group == "main"}
    assert long.keys() == {*plan.METHODS, "evlgen-tenth-of-data"}
    assert long["qformer"].fields["cross_attention_frequency"] == 1  # the variant was better
    two = long["qformer-two-stage"]
    assert (two.stage_one_learning_rate, two.learning_rate, long["qformer"].learning_rate) == (3e-4, 3e-4, 1e-3)
    assert "pool_size" not in long["mlp-all-tokens"].fields
    first, fresh = (
        {run.method for run in planned if run.group == "ablation" and run.seed == one} for one in (100, 102)
    )
    assert first == set(plan.ABLATIONS) and fresh == {"evlgen", *plan.MAIN_ABLATIONS}
    assert fresh - {"evlgen"} <= first
    assert len({run.name for run in planned}) == len(planned)

    for run in planned:
        if run.group == "main" and run.dataset == "openmoji-scenes":
            finish(run, loss=0.2 + run.seed / 10)
        elif (run.group, run.method, run.seed) == ("ablation", "evlgen", 102):
            finish(run, loss=0.4)
    claims.report()
    table = capsys.readouterr().out
    # In the sweep, rates are not averaged.
    assert "| evlgen | 2 | 0.003 | 100 | ? | 0.100 | 0.700 [0.500, 0.900] |" in table
    assert "| 0.0003 | 1.000 | 1.000 | 1.000 | 0.500 |" in table
    assert "| evlgen | 3 | 0.001 | 200 | ? | 0.200 | 0.300 [0.200, 0.400] |" in table
    assert "| qformer-two-stage | 3 | 0.0003 then 0.0003 | 200 + 200 | ? | 0.220 |" in table  # the first stage counts
    assert "| evlgen | 2 | 0.001 | 100 | ? | 0.100 | 0.451 [0.400, 0.502] |" in table  # and the sweep's first seed
    points = " | ".join(["0.300 [0.200, 0.400]"] * 5)  # the curve that `finish` writes is flat
    assert f"| evlgen | {points} | 50.0% | 50.0% |" in table
    assert (results.parent / "openmoji-scenes.png").stat().st_size > 10_000


def test_a_run_that_was_done_with_other_settings_is_refused(results):
    run = plan.plan()[0]
    finish(run, loss=1.0)
    text = results.read_text()
    for other in (
        text.replace('"steps": 100', '"steps": 99'),
        text.replace('"warmup_steps": 10', '"warmup_steps": 9'),
    ):
        assert other != text
        results.write_text(other)
        with pytest.raises(ValueError, match=r"has other settings for .*\. Remove its line to train it again"):
            plan.plan()


def test_seconds_are_steps_of_the_method_and_of_the_first_stage():
    run = {"method": "qformer-two-stage", "stage_one_steps": 10, "stage_one_batch_size": 64}
    result = {"run": run, "flops_per_step": 5}
    timed = {"qformer-two-stage": 2.0, "stage-one": 1.0, "evlgen": 3.0}
    assert tables.axis_value(result, 4, "seconds", timed) == 18
    assert tables.axis_value(result, 4, "steps", None) == 10 * 4 + 4
    result = {"run": {"method": "evlgen-tenth-of-data", "stage_one_steps": 0}, "flops_per_step": 5}
    assert tables.axis_value(result, 4, "seconds", timed) == 12
    assert tables.axis_value(result, 4, "flops", None) == 20
    result = {"run": {"method": "constant-r", "stage_one_steps": 0}, "flops_per_step": 5}
    assert tables.axis_value(result, 4, "seconds", timed) is None  # which was not timed


def curve_of(method, loss_at, steps=(10, 20, 30), step_seconds=1.0, first=0):
    """A result whose held-out loss is a function of the seconds."""
    seconds = [first * 0.5 + step * step_seconds for step in steps]
    curve = [{"step": step, "loss": loss_at(t), "gap": 2 - loss_at(t)} for step, t in zip(steps, seconds, strict=True)]
    run = {"method": method, "learning_rate": 1e-3, "stage_one_learning_rate": 1e-3, "stage_one_steps": first}
    return {"run": run, "curve": curve, "flops_per_step": 1, "stage_one_flops_per_step": 1}


def test_methods_are_compared_at_equal_seconds():
    results = [curve_of("evlgen", lambda t, seed=seed: {10: 1.0, 20: 0.6, 30: 0.2}[t] + seed / 5) for seed in (0, 1)]
    results += [curve_of("qformer", lambda t: {10: 1.1, 20: 1.0, 30: 0.7}[t])]
    results += [curve_of("qformer-two-stage", lambda t: {20: 0.5, 30: 0.45, 40: 0.1}[t], first=20)]
    seconds = {"evlgen": 1.0, "qformer": 1.0, "qformer-two-stage": 1.0, "stage-one": 0.5}
    lines = tables.comparison(results, seconds, "evlgen").splitlines()[2:]
    # At 10 s one seed of EVLGen is worse. On average it is at 0.69 after 20 s and at 0.28 after 30 s.
    ends = "0.3000 [0.2000, 0.4000] | 0.7000"
    assert lines[0] == f"| qformer | 2 of 3 | 2 of 3 | {ends} | 66% of its time |"
    # Two stages take 40 s and show nothing before 20. After 30 s EVLGen trains no more.
    assert lines[1] == "| qformer-two-stage | 1 of 2 | 1 of 2 | 0.3000 [0.2000, 0.4000] | 0.1000 | never |"


def test_a_method_that_was_not_timed_is_drawn_without_its_seconds(tmp_path):
    results = [curve_of(method, lambda t: 3 / t) for method in ("evlgen", "constant-r")]
    for result in results:
        result["run"]["stage_one_batch_size"] = 64
        for point in result["curve"]:
            point["cider"] = 500
    tables.draw_curves(results, {"evlgen": 1.0}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("step_seconds", [0.7, 0.9, 1.0, 1.1, 1.5, 2.0])
def test_a_method_that_learns_as_much_per_second_is_not_beaten(step_seconds):
    def loss_at(seconds):
        return 3 * math.exp(-seconds / 40) + 0.05

    steps = (25, 50, 75, 100, 125, 150, 175, 200)
    results = [curve_of("evlgen", loss_at, steps), curve_of("qformer", loss_at, steps, step_seconds)]
    seconds = {"evlgen": 1.0, "qformer": step_seconds}
    row = tables.comparison(results, seconds, "evlgen").splitlines()[2]
    won, total = re.search(r"qformer \| (\d+) of (\d+)", row).groups()
    assert int(won) <= int(total) / 2 + 1  # ties, but for what lies between checkpoints


def test_wrong_partners_never_have_the_right_caption(stage, monkeypatch):
    _, stage_one, text_ids = stage
    drawn = []
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args: drawn.append(multinomial(*args)) or drawn[-1])
    twice = torch.cat([text_ids[:2], text_ids[:1]])  # rows 0 and 2 have one caption
    for _ in range(20):
        stage_one(features(), twice)
    wrong = torch.cat(drawn, dim=1)  # (batch, draws)
    assert set(wrong[0].tolist()) == set(wrong[2].tolist()) == {1}
    assert set(wrong[1].tolist()) == {0, 2}
    alone = stage_one(features(), text_ids[:1].expand(3, -1))  # no wrong partner at all
    assert alone["matching"] == 0 and alone["recall@1"] == 1


def test_methods_and_their_variants_have_as_many_parameters():
    methods = [(method["connector"], method["fields"]) for method in plan.METHODS.values()]
    for name, variants in plan.VARIANTS.items():
        method = plan.METHODS[name]
        methods += [(method["connector"], {**method["fields"], **one.get("fields", {})}) for one in variants.values()]
    sizes = []
    for connector, fields in methods:
        fields = {**connector_fields(connector, fields), "class_token": False}
        config = EVLGenConfig(**DEMO_VISION, text_config=TEXT, connector_config=fields)
        with torch.device("meta"):
            sizes.append(EVLGenForConditionalGeneration(config).num_parameters(only_trainable=True))
    assert max(sizes) < 1.1 * min(sizes), sizes


def test_evlgen_is_what_the_demo_trains():
    recipe = yaml.safe_load(pretrain.DEMO_RECIPE.read_text())
    assert plan.METHODS["evlgen"]["fields"] == recipe["connector_config"]


@pytest.mark.parametrize("connector", ["tomeformer", "qformer", "mlp"])
def test_every_connector_takes_the_demos_recipe(connector):
    fields = yaml.safe_load(pretrain.DEMO_RECIPE.read_text())["connector_config"]
    fields = {**connector_fields(connector, fields), "class_token": False}
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = EVLGenConfig(**DEMO_VISION, text_config=text, connector_config=fields)
    model = EVLGenForConditionalGeneration(config)
    prompt = model.project_vision_features(torch.randn(2, 196, 112)).pooler_output
    assert prompt.shape == (2, config.num_image_tokens, 16)


@pytest.fixture
def tiny_recipe(tmp_path, monkeypatch):
    """A recipe of tiny towers in the demo's place; gives its data."""
    recipe = {
        **save_towers(tmp_path),
        "cache_features": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    monkeypatch.setattr(pretrain, "DEMO_RECIPE", path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    return save_image_folder(tmp_path / "images")


def test_a_run_without_whitening_starts_at_random(tiny_recipe):
    recipe = json.loads(pretrain.DEMO_RECIPE.read_text())
    pretrain.DEMO_RECIPE.write_text(json.dumps({**recipe, "whitening_images": 8}))
    runs = [tiny_run("evlgen", tiny_recipe, "tomeformer", whitening=whitening) for whitening in (True, False)]
    white, random = [training_run.prepare(run, recipe["vision_model"]).model.vision_projection.bias for run in runs]
    assert white.any() and not random.any()


def test_a_run_from_bert_starts_with_the_weights_of_its_package(tiny_recipe, tmp_path, monkeypatch):
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    bert.save_pretrained(tmp_path / "package" / plan.MINILM / "model")
    monkeypatch.setattr(training_run, "fetch_package", lambda package: tmp_path / "package")
    run = tiny_run("bert-start", tiny_recipe, "tomeformer", connector_model=plan.MINILM)
    connector = training_run.prepare(run, str(tmp_path)).model.connector
    weight = connector.encoder.layer[1].attention.self.query.weight
    assert torch.equal(weight, bert.encoder.layer[1].attention.self.query.weight)


def tiny_run(method, dataset, connector, **changes):
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    kind = {"tomeformer": {"merge_r": 3}, "qformer": {"num_query_tokens": 5}}[connector]
    settings = {"learning_rate": 1e-2, "steps": 4, "seed": 0, "eval_steps": [2, 4], **changes}
    return Run(method, dataset, connector, {**fields, **kind}, **settings)


def test_a_run_trains_both_stages_and_keeps_what_it_measured(tiny_recipe):
    one = training_run.train(tiny_run("qformer", tiny_recipe, "qformer"))
    assert [point["step"] for point in one["curve"]] == [2, 4]
    assert one["curve"][-1].keys() == {"step", "loss", "gap", "cider", "exact"}
    assert len(one["training_loss"]) == 4 and one["training_loss"][-1][1] < one["training_loss"][0][1]
    stages = {"stage_one_steps": 120, "stage_one_learning_rate": 3e-3}
    two = training_run.train(tiny_run("qformer", tiny_recipe, "qformer", **stages))
    assert two["flops_per_step"] == one["flops_per_step"] and two["stage_one_flops_per_step"] > 0
    assert two["training_loss"][0] != one["training_loss"][0]  # it starts from what the first stage left
    first = two["stage_one_training_loss"]
    assert len(first) == 120 and first[-1][1] < 0.6 * first[0][1]
    assert two["stage_one_held_out"]["recall@1"] >= 0.5  # of 8 images in 4 colours; chance is 0.25


def test_every_part_of_a_recipe_is_timed(tiny_recipe):
    runs = [
        tiny_run("evlgen", tiny_recipe, "tomeformer"),
        tiny_run("qformer", tiny_recipe, "qformer"),
        tiny_run("qformer-two-stage", tiny_recipe, "qformer", stage_one_steps=1),
    ]
    seconds = training_run.time_steps(runs, rounds=1)["seconds"]
    assert seconds.keys() == {"evlgen", "qformer", "stage-one", "qformer-two-stage"} and min(seconds.values()) > 0
