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


QUESTIONS = PUBLISHED / "v2_OpenEnded_mscoco_val2014_questions.json"
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
    "msr-vtt": ("msr-vtt", "videos", {"annotations": "test_videodatainfo.json"}, list(VIDEOS[:3])),
    "msvd txt": (
        "msvd",
        "videos",
        {"annotations": "AllVideoDescriptions.txt", "split_file": "test_list.txt"},
        [VIDEOS[5], VIDEOS[4]],
    ),
    "msvd csv": ("msvd", "videos", {"annotations": "MSR Video Description Corpus.csv"}, list(VIDEOS[4:])),
}


@pytest.mark.parametrize("kind", CAPTION_FILES)
def test_captions_of_published_files_are_scored(kind, work, tmp_path, monkeypatch):
    benchmark, media, files, ids = CAPTION_FILES[kind]
    fixed = FixedAnswers(monkeypatch, [f"a thing that is number {index}" for index in range(len(ids))])
    results = evaluate_captioning.main(options(work, tmp_path, **published(work, benchmark, media, **files)))
    smallest, largest = (5, 20) if benchmark in ("msr-vtt", "msvd") else (8, 30)
    decoding = fixed.generation_args
    assert (decoding.min_new_tokens, decoding.max_new_tokens) == (smallest, largest)
    assert (decoding.num_beams, decoding.length_penalty) == (5, 1.0)
    assert read_json(tmp_path / "predictions.json") == [
        {"image_id": row, "caption": f"a thing that is number {index}"} for index, row in enumerate(ids)
    ]
    assert results == read_json(tmp_path / "results.json")
    assert results["num_rows"] == len(ids) and results["dataset"]["type"] == benchmark
    assert results["dataset"]["args"] == {"annotations": files["annotations"]}
    assert {"CIDEr", "BLEU-4", "ROUGE-L"} <= {metric["name"] for metric in results["metrics"]}


def test_captions_are_those_of_the_files(work):
    """All captions are read in the published order, with NoCaps' domains. Of MSVD the English ones are read."""
    read = {
        kind: benchmark_files.caption_rows(
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
        "video": str(work / "videos" / "-7KMZQEsJW4_205_208.webp"),
        "captions": ["a black screen turns gray", "the picture becomes light"],
    }
    assert [row["captions"] for row in read["msvd csv"]] == [
        ["a screen gets brighter", "a dark screen becomes gray, slowly"],
        ["a black screen turns gray"],
        ["a dark video"],
    ]


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


@pytest.mark.parametrize(
    ("limit", "cider"),
    [(2, "CIDEr's n-gram weights come from the references of only 2"), (1, "There is 1 image")],
)
def test_scores_of_a_part_of_a_benchmark_have_a_note(limit, cider, work, tmp_path, monkeypatch, capsys):
    FixedAnswers(monkeypatch, ["a red circle"] * limit)
    files = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json")
    results = evaluate_captioning.main(options(work, tmp_path, **files, max_samples=limit))
    subset, weights = results["notes"]
    assert subset == f"Only {limit} of 3 rows were answered: the scores cannot be compared with those of all."
    assert weights.startswith(cider) and f"Note: {subset}\nNote: {weights}\n" in capsys.readouterr().out
    (score,) = [metric for metric in results["metrics"] if metric["type"] == "cider"]
    assert score["args"] == {"idf_images": limit} and (score["value"] == 0) == (limit == 1)


def test_predictions_are_what_the_official_coco_tool_reads(work, tmp_path, monkeypatch):
    coco = pytest.importorskip("pycocotools.coco", reason="needs the evaluate extra")
    FixedAnswers(monkeypatch, ["a red circle", "a blue triangle", "a green square"])
    files = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json")
    evaluate_captioning.main(options(work, tmp_path, **files))
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
    questions = "OpenEnded_mscoco_val2014_questions.json"
    files = published(work, "ok-vqa", "coco", questions=questions, annotations="mscoco_val2014_annotations.json")
    results = evaluate_vqa.main(options(work, tmp_path, **files))
    assert value(results, "VQA accuracy [%]") == 100
    assert results["accuracy_per_question_type"] == {"Other": 100, "Sports and Recreation": 100}
    assert [entry["answer"] for entry in read_json(tmp_path / "predictions.json")] == ["race", "the circle"]
    assert read_answers(tmp_path / "answers.jsonl")[2971475] == "racing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "coco"}, "`benchmark` must be one of coco-karpathy, nocaps, .*, but is 'coco'"),
        ({"dataset": "easy-vqa"}, "`benchmark` and `dataset` cannot both be given"),
        ({"benchmark": None}, "`annotations` belongs to a benchmark"),
        ({"split_file": "list.txt"}, "`split_file` is not read for coco-karpathy, but only media_dir, anno"),
        ({"benchmark": "nocaps", "test_split": "val"}, "`test_split` is not read for nocaps"),
        ({"caption_column": "text"}, "`caption_column` belongs to a data set"),
        ({"max_samples": 0}, "`max_samples` must be an integer of 1 or more, but is 0"),
        ({"annotations": None}, "`annotations` is needed"),
        ({"media_dir": "/nowhere"}, "`media_dir`: /nowhere is no folder"),
        ({"annotations": "/nowhere.json"}, r"`annotations`: /nowhere\.json cannot be read: .*No such file"),
        ({"annotations": PUBLISHED / "test_list.txt"}, r"`annotations`: .*test_list\.txt is no file of Karpathy's"),
        ({"annotations": QUESTIONS}, r"`annotations`: .*questions\.json is no file of Karpathy's .*lacks 'images'"),
        ({"test_split": "testing"}, r"`test_split` is 'testing', but .* has \['restval', 'test', 'train', 'val'\]"),
        ({"metrics": "clip"}, r"`metrics` must be some of cider, .*, spice, bleu, but is \['clip'\]"),
        ({"dtype": "float8"}, "`dtype` must be float32 or bfloat16, but is 'float8'"),
        ({"num_beam": 3}, r"Unknown argument --num_beam\. Did you mean --num_beams\?"),
        ({"benchmark": "msr-vtt"}, "`annotations`: .* is no videodatainfo file of MSR-VTT: it lacks"),
        ({"benchmark": "msvd"}, "`annotations`: .* is no list of MSVD's videos and captions"),
        ({"benchmark": "nocaps"}, "`annotations`: .* is no file of captions in COCO's format"),
    ],
)
def test_captioning_refuses_arguments_that_cannot_work(changes, message, work, tmp_path):
    given = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json") | changes
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_captioning.main(options(work, tmp_path, **given))
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": None}, "`questions` is needed"),
        ({"annotations": PUBLISHED / "mscoco_val2014_annotations.json"}, "`annotations`: .* 262148000"),
        ({"questions": PUBLISHED / "testdev_balanced_questions.json"}, "`questions`: .* lacks 'data_subtype'"),
        ({"benchmark": "gqa"}, "`annotations` is not read for gqa, but only media_dir, questions"),
        ({"benchmark": "gqa", "annotations": None}, "`questions`: .* is no file of GQA's questions"),
        ({"prompt_column": "q"}, "`prompt_column` belongs to a data set"),
        ({"benchmark": None, "annotations": None, "media_dir": None}, "`questions` belongs to a benchmark"),
        ({"prompt": "What is it?"}, r"`prompt` must hold \{\} .* but is 'What is it\?'"),
        ({"benchmark": "vizwiz"}, "`benchmark` must be one of vqav2, gqa, ok-vqa, but is 'vizwiz'"),
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
    files = published(work, "coco-karpathy", "coco") | {"annotations": tmp_path / "dataset_coco.json"}
    with pytest.raises(ValueError, match=r"`annotations`: .*dataset_coco\.json holds no caption of 184613, but of"):
        evaluate_captioning.main(options(work, tmp_path / "out", **files))


def test_missing_java_is_reported_before_the_model_is_loaded(work, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "load_answering_model", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    files = published(work, "coco-karpathy", "coco", annotations="dataset_coco.json")
    with pytest.raises(RuntimeError, match="SPICE cannot run: there is no `java` on PATH"):
        evaluate_captioning.main([*options(work, tmp_path, **files), "--metrics", "cider", "spice"])


def test_a_missing_lemmatiser_is_reported_before_the_model_is_loaded(work, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "load_answering_model", None)
    pytest.importorskip("spacy", reason="needs the vqa extra")
    monkeypatch.setattr(lemmatization, "MODELS", ("not_there",))
    lemmatization._load_spacy.cache_clear()
    questions = "OpenEnded_mscoco_val2014_questions.json"
    files = published(work, "ok-vqa", "coco", questions=questions, annotations="mscoco_val2014_annotations.json")
    with pytest.raises(ImportError, match="need spaCy and its small English model"):
        evaluate_vqa.main(options(work, tmp_path, **files))


def test_missing_images_and_videos_are_named(work, tmp_path):
    (tmp_path / "empty").mkdir()
    for script, given, message in (
        (evaluate_vqa, vqav2(work), r"`media_dir`: there is no .*COCO_val2014_000000262148\.jpg or .*val2014"),
        (
            evaluate_captioning,
            published(work, "msr-vtt", "videos", annotations="test_videodatainfo.json"),
            "`media_dir`: .* holds no video video7010",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(options(work, tmp_path / "out", **given | {"media_dir": tmp_path / "empty"}))


def test_rows_with_the_same_id_are_refused(work, tmp_path):
    questions = read_json(PUBLISHED / "v2_OpenEnded_mscoco_val2014_questions.json")
    questions["questions"] += questions["questions"][:1]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="ids, but 262148000 is there twice"):
        evaluate_vqa.main(options(work, tmp_path / "out", **vqav2(work, questions=tmp_path / "questions.json")))
