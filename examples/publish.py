"""Publishes a trained model: weights, configuration, processor, code and a model card, in one commit.

    hf auth login
    python examples/publish.py --model outputs/demo --repo_id you/captioner \
        --results outputs/evaluation/demo/openmoji-scenes/results.json --check true

`--results` takes what `evaluate_captioning.py` and `evaluate_vqa.py` left behind; it becomes the card's table and its
`model-index`. `--check true` then loads what was published in a process of its own, which runs the code that was just
uploaded, and captions a picture. `--folder` writes everything into a folder and uploads nothing. An adapter's folder,
from `finetune.py`, is published as an adapter.
"""

import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from peft import PeftConfig
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from common.arguments import parse_arguments
from common.card import model_card, read_results
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import is_on_hub
from processing_evlgen import EVLGenProcessor

SHEET = "captions.png"  # the contact sheet that a training leaves beside its model
# What a training leaves behind and nobody needs to load the model.
NOT_PUBLISHED = ["checkpoint-*", "*.bin", "*.pt", "*.pth", "loss.png", "metrics.json", "runs"]


@dataclass
class PublishArguments:
    repo_id: str = field(metadata={"help": "Name of the repository on the Hub: you/captioner."})
    model: str = field(default="outputs/demo", metadata={"help": "Folder of the trained model."})
    results: list[str] = field(default_factory=list, metadata={"help": "results.json files of evaluations."})
    license: str | None = field(default=None, metadata={"help": "The Hub's name of a licence, e.g. bsd-3-clause."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Data sets on the Hub it was trained on."})
    towers: Literal["include", "reference"] | None = field(
        default=None, metadata={"help": "Whether to upload the frozen towers or only name them; default: the model's."}
    )
    private: bool = field(default=False, metadata={"help": "Only you can see a new repository."})
    folder: str | None = field(default=None, metadata={"help": "Write everything into this folder, upload nothing."})
    check: bool = field(default=False, metadata={"help": "Load what was published in a new process, and caption."})
    picture: str | None = field(default=None, metadata={"help": "The picture to caption; default: the contact sheet."})


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(PublishArguments, argv=argv)
    results = read_results(arguments.results)
    if arguments.check and arguments.picture is None and not Path(arguments.model, SHEET).exists():
        raise ValueError(f"`check` needs a `picture`: there is no {SHEET} in {arguments.model}.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, arguments, results)
        published = str(folder.resolve())
        if arguments.folder is None:
            upload(folder, arguments)
            published = arguments.repo_id
        if arguments.check:
            print(f"{published} says: {caption(published, arguments)}")


def write_folder(folder: Path, arguments: PublishArguments, results: list[dict]) -> None:
    """Everything that is to be published."""
    source = Path(arguments.model)
    adapter_of = None
    model = load_captioner("model", EVLGenForConditionalGeneration.from_pretrained, arguments.model)
    towers = (model.vision_tower, model.language_model)
    trained = model.num_parameters() - sum(tower.num_parameters() for tower in towers)
    if (source / ADAPTER_CONFIG).exists():
        adapter_of = PeftConfig.from_pretrained(source).base_model_name_or_path
        if not is_on_hub(adapter_of):
            raise ValueError(
                f"`model` is an adapter for {adapter_of}, which is not on the Hub: publish that first, and write its "
                f"name as `base_model_name_or_path` into {source / ADAPTER_CONFIG}; or merge the adapter into it."
            )
        with safe_open(source / SAFETENSORS_WEIGHTS_NAME, framework="pt") as weights:
            trained = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.offset_keys())
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED))
    else:
        model.save_pretrained(folder, towers=arguments.towers)
        EVLGenProcessor.from_pretrained(arguments.model).save_pretrained(folder)
        model.config.towers = EVLGenForConditionalGeneration.config_class.from_pretrained(folder).towers
    if (source / SHEET).exists():
        shutil.copy(source / SHEET, folder / SHEET)
    card = model_card(
        arguments.repo_id,
        model.config,
        trained,
        results,
        arguments.license,
        arguments.datasets,
        has_sheet=(folder / SHEET).exists(),
        adapter_of=adapter_of,
    )
    card.save(folder / "README.md")


def upload(folder: Path, arguments: PublishArguments) -> None:
    api = HfApi()
    api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=arguments.repo_id, folder_path=folder, commit_message="Model, processor, code and card"
    )
    print(f"Published: {commit.commit_url}")


CAPTION = """
import sys
from transformers import pipeline
task, model, picture = sys.argv[1:]
print(pipeline(task, model=model, trust_remote_code=True)(picture)[0]["generated_text"])
"""


def caption(published: str, arguments: PublishArguments) -> str:
    """What the published model says about a picture, in a process without this repository's code.

    Raises:
        RuntimeError: If it cannot be loaded or fails.
    """
    picture = arguments.picture or str(Path(arguments.model, SHEET).resolve())
    command = [sys.executable, "-I", "-c", _WITHOUT_EVLGEN + CAPTION, "image-to-text", published, picture]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The published model does not work:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


# An installed EVLGen would be taken in place of the code that was published.
_WITHOUT_EVLGEN = """
import sys
for name in ("configuration_evlgen", "modeling_evlgen", "processing_evlgen"):
    sys.modules[name] = None
"""


if __name__ == "__main__":
    main()
