"""Published benchmarks in their own formats: they are read, answered, scored and submitted, or refused."""

import json

import evaluate_captioning
import evaluate_vqa
import pytest

from common.evaluation import answers, benchmark_files
from common.evaluation.answer_folder import read_answers
from metrics.vqa_accuracy import lemmatization

from .evaluation import PUBLISHED, VIDEOS, FixedAnswers, options, published, read_json, save_work, value, vqav2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return save_work(tmp_path_factory.mktemp("work"))


def karpathy(work, **changes):
    return published(work, "coco-karpathy", "coco", annotations=KARPATHY) | changes


def ok_vqa(work):
    questions = "OpenEnded_mscoco_val2014_questions.json"
    return published(work, "ok-vqa", "coco", questions=questions, annotations="mscoco_val2014_annotations.json")


# Benchmark, folder, annotations, other arguments, and the ids in their order.
COCO_TEST, KARPATHY = [522418, 184613, 318219], "dataset_coco.json"
CAPTION_FILES = {
    "karpathy": ("coco-karpathy", "coco", KARPATHY, {}, COCO_TEST),
    "karpathy val": ("coco-karpathy", "coco", KARPATHY, {"test_split": "val"}, [391895, 318556]),
    "coco": ("coco-karpathy", "coco", "coco_karpathy_test_gt.json", {}, COCO_TEST),
    "nocaps": ("nocaps", "nocaps", "nocaps_val_4500_captions.json", {}, list(range(6))),
    "flickr30k": ("flickr30k", "flickr", "dataset_flickr30k.json", {}, [0, 1]),
    "msr-vtt": ("msr-vtt", "videos", "test_videodatainfo.json", {}, list(VIDEOS[:3])),
    "msvd txt": (
        "msvd",
        "videos",
        "AllVideoDescriptions.txt",
        {"split_file": "test_list.txt"},
        [VIDEOS[5], VIDEOS[4]],
    ),
    "msvd csv": ("msvd", "videos", "MSR Video Description Corpus.csv", {}, list(VIDEOS[4:])),
}


@pytest.mark.parametrize("kind", CAPTION_FILES)
def test_captions_of_published_files_are_scored(kind, work, tmp_path, monkeypatch):
    benchmark, media, annotations, others, ids = CAPTION_FILES[kind]
    files = published(work, benchmark, media, annotations=annotations, **others)
    fixed = FixedAnswers(monkeypatch, [f"a thing that is number {index}" for index in range(len(ids))])
    results = evaluate_captioning.main(options(work, tmp_path, **files))
    smallest, largest = (5, 20) if benchmark in ("msr-vtt", "msvd") else (8, 30)
    decoding = fixed.generation_args
    assert (decoding.min_new_tokens, decoding.max_new_tokens) == (smallest, largest)
    assert (decoding.num_beams, decoding.length_penalty) == (5, 1.0)
    assert read_json(tmp_path / "predictions.json") == [
        {"image_id": row, "caption": f"a thing that is number {index}"} for index, row in enumerate(ids)
    ]
    assert results == read_json(tmp_path / "results.json")
    assert results["num_rows"] == len(ids) and results["dataset"]["type"] == benchmark
    assert results["dataset"]["args"] == {"annotations": annotations}
    assert {"CIDEr", "BLEU-4", "ROUGE-L"} <= {metric["name"] for metric in results["metrics"]}


def test_captions_are_those_of_the_files(work):
    """All captions are read in the published order, with NoCaps' domains. Of MSVD the English ones are read."""
    read = {}
    for kind, (benchmark, media, annotations, others, _) in CAPTION_FILES.items():
        split_file = str(PUBLISHED / others["split_file"]) if "split_file" in others else None
        paths = str(PUBLISHED / annotations), str(work / media)
        read[kind] = benchmark_files.caption_rows(benchmark, *paths, others.get("test_split", "test"), split_file)
    circle = {
        "id": 522418,
        "image": str(work / "coco" / "val2014" / "COCO_val2014_000000522418.jpg"),
        "captions": ["A red circle on a white paper.", "The round shape is red.", "A drawing of a red circle"],
    }
    assert read["karpathy"][0] == read["coco"][0] == circle
    assert [row["domain"] for row in read["nocaps"]][:3] == ["near-domain", "out-domain", "in-domain"]
    assert read["flickr30k"][1]["captions"] == ["A blue triangle.", "A triangle drawn in blue."]
    assert read["msr-vtt"][0]["captions"] == ["a screen gets brighter", "a dark screen becomes gray"]
    assert read["msvd txt"][0]["captions"] == ["a black screen turns gray", "the picture becomes light"]
    captions = ["a screen gets brighter", "a dark screen becomes gray, slowly"]
    assert read["msvd csv"][0]["captions"] == captions and len(read["msvd csv"]) == 3


def test_nocaps_is_scored_by_domain(work, tmp_path, monkeypatch):
    """The captions are right in one domain only."""
    references = read_json(PUBLISHED / "nocaps_val_4500_captions.json")
    domains = {image["id"]: image["domain"] for image in references["images"]}
    right = {entry["image_id"]: entry["caption"] for entry in references["annotations"]}
    FixedAnswers(monkeypatch, [right[row] if domain == "in-domain" else "what" for row, domain in domains.items()])
    files = published(work, "nocaps", "nocaps", annotations="nocaps_val_4500_captions.json")
    results = evaluate_captioning.main(options(work, tmp_path, **files))
    by_domain = {name: value(results, f"CIDEr ({name})") for name in ("in-domain", "near-domain", "out-domain")}
    assert by_domain["in-domain"] > 100 and by_domain["near-domain"] == by_domain["out-domain"] == 0
    assert 0 < value(results, "CIDEr") < by_domain["in-domain"]
    weights = {metric["name"]: metric["args"] for metric in results["metrics"] if metric["type"] == "cider"}
    assert weights["CIDEr"] == {"idf_images": 6}
    assert weights["CIDEr (in-domain)"] == {"domain": "in-domain", "idf_images": 2}
    assert "in-domain: CIDEr's n-gram weights come from the references of only 2 images" in "\n".join(results["notes"])


def test_scores_of_a_part_of_a_benchmark_have_a_note(work, tmp_path, monkeypatch, capsys):
    FixedAnswers(monkeypatch, ["a red circle"] * 2)
    results = evaluate_captioning.main(options(work, tmp_path, **karpathy(work), max_test_samples=2))
    subset, weights = results["notes"]
    assert subset == "Only 2 of 3 rows were answered: the scores cannot be compared with those of all."
    assert weights.startswith("CIDEr's n-gram weights come from the references of only 2")
    assert f"Note: {subset}\nNote: {weights}\n" in capsys.readouterr().out
    (score,) = [metric for metric in results["metrics"] if metric["type"] == "cider"]
    assert score["args"] == {"idf_images": 2} and score["value"] > 0


def test_predictions_are_what_the_official_coco_tool_reads(work, tmp_path, monkeypatch):
    coco = pytest.importorskip("pycocotools.coco", reason="needs the evaluate extra")
    FixedAnswers(monkeypatch, ["a red circle", "a blue triangle", "a green square"])
    evaluate_captioning.main(options(work, tmp_path, **karpathy(work)))
    official = coco.COCO(str(PUBLISHED / "coco_karpathy_test_gt.json"))
    loaded = official.loadRes(str(tmp_path / "predictions.json"))
    assert [entry["caption"] for entry in loaded.loadAnns(loaded.getAnnIds([184613]))] == ["a blue triangle"]


def test_vqav2_is_scored_by_the_official_rule(work, tmp_path, monkeypatch):
    fixed = FixedAnswers(monkeypatch, ["Navy blue.", "no", "one", "a circle"])
    results = evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    # Of 10 people 2 answered "navy blue", which gives 0.6; 9 answered "no", 8 answered "1", and all "circle".
    assert value(results, "VQA accuracy [%]") == pytest.approx(90)
    types = {"number": 100, "other": 80, "yes/no": 100}
    assert {name: value(results, f"VQA accuracy [%], {name}") for name in types} == pytest.approx(types)
    assert results["accuracy_per_question_type"]["what color is the"] == pytest.approx(60)
    assert fixed.prompts[1].endswith("Question: is there a circle? Short answer:")  # cleaned as in the paper
    assert benchmark_files.clean_question('Is the "Stop" sign (red)? ' * 20) == " ".join(
        ["is the stop sign red?"] * 10
    )
    decoding = fixed.generation_args
    assert (decoding.num_beams, decoding.min_new_tokens, decoding.max_new_tokens) == (5, 1, 10)
    assert decoding.length_penalty == 0
    assert read_json(tmp_path / "predictions.json")[1] == {"question_id": 262148001, "answer": "no"}


def test_a_test_split_of_vqav2_becomes_a_submission(work, tmp_path, monkeypatch, capsys):
    FixedAnswers(monkeypatch, ["red", "yes"])
    files = {"questions": PUBLISHED / "v2_OpenEnded_mscoco_test-dev2015_questions.json", "media_dir": work / "coco"}
    results = evaluate_vqa.main(options(work, tmp_path, benchmark="vqav2", **files))
    assert results["metrics"] == []
    assert "predictions.json is for its test server" in capsys.readouterr().out
    assert read_json(tmp_path / "predictions.json") == [
        {"question_id": 1000, "answer": "red"},
        {"question_id": 16000, "answer": "yes"},
    ]


def test_gqa_counts_exact_answers(work, tmp_path, monkeypatch):
    FixedAnswers(monkeypatch, ["the blue", "Yes.", "red"])
    files = published(work, "gqa", "gqa", questions="testdev_balanced_questions.json")
    results = evaluate_vqa.main(options(work, tmp_path, **files))
    assert value(results, "Accuracy [%]") == pytest.approx(200 / 3)
    assert value(results, "Accuracy [%], open") == 100 and value(results, "Accuracy [%], binary") == 50
    assert read_json(tmp_path / "predictions.json")[0] == {"questionId": "201307251", "prediction": "the blue"}


def test_ok_vqa_is_scored_with_lemmas(work, tmp_path, monkeypatch):
    pytest.importorskip("spacy", reason="needs the vqa extra")
    FixedAnswers(monkeypatch, ["racing", "the circles"])
    results = evaluate_vqa.main(options(work, tmp_path, **ok_vqa(work)))
    assert value(results, "VQA accuracy [%]") == 100
    assert results["accuracy_per_question_type"] == {"Other": 100, "Sports and Recreation": 100}
    assert [entry["answer"] for entry in read_json(tmp_path / "predictions.json")] == ["race", "the circle"]
    assert read_answers(tmp_path / "answers.jsonl")[2971475] == "racing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "coco"}, "`benchmark` must .* 'coco'"),
        ({"dataset": "easy-vqa"}, "`benchmark` and `dataset`"),
        ({"split_file": "list.txt"}, "`split_file` is not read for coco-karpathy"),
        ({"max_test_samples": 0}, "`max_test_samples` must .* 0"),
        ({"media_dir": "/nowhere"}, "`media_dir`: /nowhere"),
        ({"annotations": PUBLISHED / "test_list.txt"}, r"`annotations`: .*test_list\.txt"),
        ({"test_split": "testing"}, r"`test_split` is 'testing', but .* \['restval', 'test', 'train', 'val'\]"),
        ({"metrics": "clip"}, r"`metrics` must .* \['clip'\]"),
        ({"num_beam": 3}, r"--num_beam\. Did you mean --num_beams\?"),
        ({"benchmark": "msr-vtt"}, "`annotations`: .* of MSR-VTT"),
    ],
)
def test_captioning_refuses_arguments_that_cannot_work(changes, message, work, tmp_path):
    given = {name: value for name, value in karpathy(work, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_captioning.main(options(work, tmp_path, **given))
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": None}, "`questions` is needed"),
        ({"annotations": PUBLISHED / "mscoco_val2014_annotations.json"}, "`annotations`: .* 262148000"),
        ({"questions": PUBLISHED / "testdev_balanced_questions.json"}, "`questions`: .* lacks 'data_subtype'"),
        ({"benchmark": "gqa"}, "`annotations` is not read for gqa"),
        ({"prompt": "What is it?"}, r"`prompt` must hold \{\} .* 'What is it\?'"),
    ],
)
def test_vqa_refuses_arguments_that_cannot_work(changes, message, work, tmp_path):
    given = {name: value for name, value in vqav2(work, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path, **given))


def test_a_benchmark_with_captions_of_some_images_is_refused(work, tmp_path):
    published_file = read_json(PUBLISHED / "dataset_coco.json")
    next(image for image in published_file["images"] if image["cocoid"] == 184613)["sentences"] = []
    (tmp_path / "dataset_coco.json").write_text(json.dumps(published_file))
    files = karpathy(work, annotations=tmp_path / "dataset_coco.json")
    with pytest.raises(ValueError, match=r"`annotations`: .*dataset_coco\.json .* 184613"):
        evaluate_captioning.main(options(work, tmp_path / "out", **files))


@pytest.mark.parametrize("missing", ["java", "lemmatiser"])
def test_what_a_metric_needs_is_asked_for_before_the_model_is_loaded(missing, work, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "load_answering_model", None)
    if missing == "java":
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="no `java` on PATH"):
            evaluate_captioning.main([*options(work, tmp_path, **karpathy(work)), "--metrics", "cider", "spice"])
        return
    pytest.importorskip("spacy", reason="needs the vqa extra")
    monkeypatch.setattr(lemmatization, "MODELS", ("not_there",))
    lemmatization._load_spacy.cache_clear()
    with pytest.raises(ImportError, match=r"(?s)spaCy and its small English model.*spacy download en_core_web_sm"):
        evaluate_vqa.main(options(work, tmp_path, **ok_vqa(work)))


def test_missing_images_and_videos_are_named(work, tmp_path):
    (tmp_path / "empty").mkdir()
    msr_vtt = published(work, "msr-vtt", "videos", annotations="test_videodatainfo.json")
    for script, given, name in (
        (evaluate_vqa, vqav2(work), r"COCO_val2014_000000262148\.jpg"),
        (evaluate_captioning, msr_vtt, "video7010"),
    ):
        with pytest.raises(ValueError, match=f"`media_dir`: .*{name}"):
            script.main(options(work, tmp_path / "out", **given | {"media_dir": tmp_path / "empty"}))


def test_rows_with_the_same_id_are_refused(work, tmp_path):
    questions = read_json(PUBLISHED / "v2_OpenEnded_mscoco_val2014_questions.json")
    questions["questions"] += questions["questions"][:1]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="262148000 is there twice"):
        evaluate_vqa.main(options(work, tmp_path / "out", **vqav2(work, questions=tmp_path / "questions.json")))
