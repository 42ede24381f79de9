"""Other people's harnesses answer and score as our evaluation scripts do, by the commands of docs/evaluate.md."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import evaluate_captioning
import evaluate_vqa
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from .evaluation import read_json, value
from .helpers import COLORS, ROOT, save, save_split, tiny_model, tiny_processor

PACKAGES = ("lm_eval==0.4.13", "lmms_eval==0.7.3", "filelock<4")
SCRIPTS = {"vqa": evaluate_vqa, "captions": evaluate_captioning}
FOLDERS = {"vqa": "my_questions", "captions": "my_captions"}
QUESTION = "what is it?"
METRICS = {"vqa": ("accuracy", "Accuracy [%]"), "captions": ("cider", "CIDEr")}
OPTIONS = {
    "lm_eval": "--model hf-multimodal --apply_chat_template "
    "--model_args pretrained=model,trust_remote_code=True,dtype=float32",
    "lmms_eval": "--model huggingface --model_args pretrained=model,trust_remote_code=True,device_map=cpu",
}
# lmms-eval computes in bfloat16, and passes on neither of the last two.
OWN_OPTIONS = {"lm_eval": "", "lmms_eval": "--dtype bfloat16 --min_new_tokens 0 --length_penalty 1"}


@pytest.fixture(scope="module")
def harness_python():
    """A Python with the harnesses beside this environment's packages, made once. Skips the tests without PyPI."""
    folder = Path(constants.HF_HOME) / "evlgen_tests" / "harnesses"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=300)
        paths = {"base": str(folder), "platbase": str(folder)}
        packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        (packages / "these.pth").write_text(sysconfig.get_path("purelib"))
        install = [python, "-m", "pip", "install", "--quiet", *PACKAGES]
        result = subprocess.run(install, capture_output=True, text=True, timeout=1500)
        if result.returncode:
            pytest.skip(f"{' '.join(PACKAGES)} cannot be installed: {result.stderr.strip().splitlines()[-1]}")
        done.touch()
    return python


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model that has learned four colors, and folders of their images, in which one text is another."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_model()
    processor = tiny_processor(model, chat=True)
    images = [Image.new("RGB", (40, 40), color) for color in COLORS]
    learn(model, processor, images)
    save(folder / "model", model, processor)
    named = [*COLORS[:3], "white"]
    questions = [{"question": QUESTION, "answer": color} for color in named]
    save_split(folder / FOLDERS["vqa"] / "test", images, questions)
    save_split(folder / FOLDERS["captions"] / "test", images, [{"caption": f"a {color} image"} for color in named])
    return folder


def learn(model, processor, images):
    """Trains all weights until the model is sure, so that rounding to bfloat16 changes no answer."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    captions = processor(images=images, suffix=[f"a {color} image" for color in COLORS])
    answers = processor(images=images, text=f"Question: {QUESTION} Short answer:", suffix=list(COLORS))
    for _ in range(300):
        loss = model(**captions).loss + model(**answers).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.02
    model.eval()


def own_run(work, task, harness, *more):
    """Our script's figure and texts, with the harness's decoding."""
    output = work / "_".join(["own", harness, task, *more])
    arguments = {"model": work / "model", "dataset": work / FOLDERS[task], "output_dir": output, "batch_size": 1}
    options = [str(text) for key, argument in arguments.items() for text in (f"--{key}", argument)]
    results = SCRIPTS[task].main([*options, *OWN_OPTIONS[harness].split(), *more])
    texts = [row["answer" if task == "vqa" else "caption"] for row in read_json(output / "predictions.json")]
    return value(results, METRICS[task][1]), texts


def harness_run(python, work, harness):
    """Figures and texts of both tasks."""
    tasks = [f"{harness}_{task}" for task in FOLDERS]
    command = [python, "-m", harness, "--include_path", ROOT / "examples" / "harness_tasks", "--device", "cpu"]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--log_samples", "--output_path", work / harness]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [*command, *OPTIONS[harness].split()], cwd=work, capture_output=True, text=True, env=environment, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (results,) = (work / harness).rglob("*results*.json")
    figures, texts = {}, {}
    for task, name in zip(FOLDERS, tasks, strict=True):
        figures[task] = read_json(results)["results"][name][f"{METRICS[task][0]},none"]
        (samples,) = (work / harness).rglob(f"*samples_{name}*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers = [row["filtered_resps"] for row in rows]
        texts[task] = [(answer[0] if isinstance(answer, list) else answer).strip() for answer in answers]
    return figures, texts


@pytest.mark.slow
@pytest.mark.parametrize("harness", ["lm_eval", "lmms_eval"])
def test_a_harness_gives_our_scripts_texts_and_figures(harness, harness_python, work):
    figures, texts = harness_run(harness_python, work, harness)
    for task in FOLDERS:
        figure, own_texts = own_run(work, task, harness)
        assert texts[task] == own_texts == [color if task == "vqa" else f"a {color} image" for color in COLORS]
        assert figures[task] == pytest.approx(figure, abs=1e-9)
        assert figure == 75 if task == "vqa" else figure > 0
