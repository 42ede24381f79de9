"""Publishes a trained model: weights, configuration, processor, code and a model card, in one commit.

    hf auth login
    python examples/publish.py --model outputs/demo --repo_id you/captioner \
        --results outputs/evaluation/demo/openmoji-scenes/results.json --check true

`--results` takes what `evaluate_captioning.py` and `evaluate_vqa.py` left behind; it becomes the card's table and its
`model-index`. `--check true` then loads what was published in a process of its own, which runs the code that was just
uploaded, and captions an image. `--folder` writes everything into a folder and uploads nothing.

An adapter's folder, from `finetune.py`, is published as an adapter, for the model on the Hub that `--base_model`
names; or, with `--merge true`, as one model with it.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from publish_card import is_edited, model_card, read_results, sign
from safetensors import safe_open

from common.command_line import parse_arguments
from common.evaluation.answers import DTYPES
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.adapters import BASE_MODEL, check_base, find_adapter
from modeling_evlgen.fingerprints import TOWERS, hash_weights, is_on_hub
from processing_evlgen import EVLGenProcessor

SHEET = "captions.png"  # the contact sheet that a training leaves beside its model
CARD = "README.md"
# Of what was published before, these would be loaded in place of what is published now, or beside it.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]


@dataclass
class PublishArguments:
    repo_id: str | None = field(
        default=None, metadata={"help": "Name of the repository on the Hub: you/captioner; default: the folder's."}
    )
    model: str = field(default="outputs/demo", metadata={"help": "Folder of the trained model."})
    results: list[str] = field(default_factory=list, metadata={"help": "results.json files of evaluations."})
    license: str | None = field(default=None, metadata={"help": "The Hub's name of a licence, e.g. bsd-3-clause."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Data sets on the Hub it was trained on."})
    towers: Literal["include", "reference"] | None = field(
        default=None, metadata={"help": "Whether to upload the frozen towers or only name them; default: the model's."}
    )
    merge: bool = field(default=False, metadata={"help": "Merge an adapter into its model."})
    base_model: str | None = field(
        default=None, metadata={"help": "Name on the Hub of the model that an adapter is for; default: as it says."}
    )
    card: Literal["replace", "keep"] | None = field(
        default=None, metadata={"help": "What to do with a README.md that was edited since it was written here."}
    )
    private: bool = field(default=False, metadata={"help": "Only you can see a new repository."})
    folder: str | None = field(default=None, metadata={"help": "Write everything into this folder, upload nothing."})
    check: bool = field(default=False, metadata={"help": "Load what was published in a new process, and caption."})
    image: str | None = field(default=None, metadata={"help": "The image to caption; default: the contact sheet."})


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(PublishArguments, argv=argv)
    if arguments.repo_id is None and arguments.folder is None:
        raise ValueError("`repo_id` is needed, the name of the repository to upload to, or `folder`, to write to.")
    arguments.repo_id = arguments.repo_id or Path(arguments.folder).resolve().name
    results = read_results(arguments.results)
    if arguments.check and arguments.image is None and not Path(arguments.model, SHEET).exists():
        raise ValueError(f"`check` needs a `image`: there is no {SHEET} in {arguments.model}.")
    if arguments.folder is not None and Path(arguments.folder).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"`folder` must be another than the model's, but both are {arguments.folder}.")
    check_results(results, arguments)
    card = known_card(arguments)
    if card is not None and is_edited(card) and arguments.card is None:
        raise ValueError(
            f"{CARD} of {arguments.folder or arguments.repo_id} was edited since it was written here: --card keep "
            "leaves it as it is, --card replace writes another."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        new_card = write_folder(folder, arguments, results)
        if card is None or arguments.card != "keep":
            (folder / CARD).write_text(sign(new_card), encoding="utf-8")
        published = str(folder.resolve())
        if arguments.folder is None:
            upload(folder, arguments)
            published = arguments.repo_id
        else:
            print(f"{folder}/ holds what would be published.")
        if arguments.check:
            print(f"{published} says: {caption(published, arguments)}")


def check_results(results: list[dict[str, Any]], arguments: PublishArguments) -> None:
    """
    Raises:
        ValueError: If results are another model's: its weights were others.
    """
    for path, entry in zip(arguments.results, results, strict=True):
        load = partial(EVLGenForConditionalGeneration.from_pretrained, dtype=DTYPES[entry["settings"]["dtype"]])
        weights = hash_weights(load_captioner("model", load, arguments.model).state_dict())
        if weights != entry["settings"]["weights"] or arguments.merge:
            raise ValueError(
                f"`results`: {path} is of {entry['model']}, whose weights are not those of what is to be published."
            )


def known_card(arguments: PublishArguments) -> str | None:
    """The card that is there already, if any."""
    if arguments.folder is not None:
        path = Path(arguments.folder, CARD)
    else:
        api = HfApi()
        if not api.repo_exists(arguments.repo_id) or not api.file_exists(arguments.repo_id, CARD):
            return None
        path = Path(api.hf_hub_download(arguments.repo_id, CARD))
    return path.read_text(encoding="utf-8") if path.exists() else None


def write_folder(folder: Path, arguments: PublishArguments, results: list[dict[str, Any]]) -> str:
    """Writes everything that is to be published but the card, which it returns."""
    source = Path(arguments.model)
    is_adapter = (source / ADAPTER_CONFIG).exists()
    if arguments.merge and not is_adapter:
        raise ValueError(f"`merge` is for adapters, but there is no {ADAPTER_CONFIG} in {arguments.model}.")
    name = find_adapter(source, {})[0] if arguments.merge else arguments.model
    model = load_captioner("model", EVLGenForConditionalGeneration.from_pretrained, name)
    described, adapter_of = model.config, None
    if is_adapter and not arguments.merge:
        adapter_of = copy_adapter(source, folder, arguments.base_model)
        with safe_open(source / SAFETENSORS_WEIGHTS_NAME, framework="pt") as weights:
            trained = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.offset_keys())
    else:
        if arguments.merge:
            check_base(model.config, source, {})
            model = PeftModel.from_pretrained(model, source).merge_and_unload()
            model.config.adapted_towers = adapted_towers(source)
        trained = model.num_parameters() - sum(getattr(model, tower).num_parameters() for tower in TOWERS.values())
        described = copy.deepcopy(model.config)  # with the names that a private tower has
        save_model(model, folder, arguments.towers)
        described.towers = model.config.towers
    EVLGenProcessor.from_pretrained(arguments.model).save_pretrained(folder)
    if (source / SHEET).exists():
        shutil.copy(source / SHEET, folder / SHEET)
    card = model_card(
        arguments.repo_id,
        described,
        trained,
        results,
        arguments.license,
        arguments.datasets,
        has_sheet=(folder / SHEET).exists(),
        adapter_of=adapter_of,
    )
    return str(card)


def adapted_towers(adapter: Path) -> list[str]:
    """The towers that an adapter changes."""
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as weights:
        names = list(weights.keys())
    return [argument for argument, tower in TOWERS.items() if any(f".{tower}." in name for name in names)]


def save_model(model: EVLGenForConditionalGeneration, folder: Path, towers: str | None) -> None:
    """Saves the model as others can load it: towers that only this machine has are included, and not named.

    Raises:
        ValueError: If such towers are only to be named.
    """
    names = {argument: getattr(model.config, f"{argument}_name_or_path") for argument in TOWERS}
    private = [argument for argument, name in names.items() if not is_on_hub(name)]
    if private and towers == "reference":
        raise ValueError(f'`towers` cannot be "reference": {names[private[0]]!r} is not on the Hub.')
    for argument in private:
        setattr(model.config, f"{argument}_name_or_path", None)
    model.save_pretrained(folder, towers="include" if private else towers)
    model.config.towers = EVLGenForConditionalGeneration.config_class.from_pretrained(folder).towers


def copy_adapter(source: Path, folder: Path, base_model: str | None) -> str:
    """Copies an adapter, and nothing else that a training leaves in its folder; gives its model's name on the Hub.

    Raises:
        ValueError: If that model is not on the Hub.
    """
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base_model = base_model or config["base_model_name_or_path"]
    if not is_on_hub(base_model):
        raise ValueError(
            f"`model` is an adapter for {base_model}, which is not on the Hub: publish that first, and give its name "
            "as `base_model`; or merge the adapter into it with --merge true."
        )
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2))
    for name in (SAFETENSORS_WEIGHTS_NAME, BASE_MODEL):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return base_model


def upload(folder: Path, arguments: PublishArguments) -> None:
    """Uploads in one commit. A repository that was made for it is gone again if that fails."""
    api = HfApi()
    is_new = not api.repo_exists(arguments.repo_id)
    api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
    try:
        commit = api.upload_folder(
            repo_id=arguments.repo_id,
            folder_path=folder,
            commit_message="Model, processor, code and card",
            delete_patterns=WEIGHTS,
        )
    except BaseException:
        if is_new:
            with suppress(Exception):  # what went wrong first is what is to be told
                api.delete_repo(arguments.repo_id)
        raise
    print(f"Published: {commit.commit_url}")


CAPTION = """
import sys
from transformers import pipeline
task, model, image = sys.argv[1:]
print(pipeline(task, model=model, trust_remote_code=True)(image)[0]["generated_text"])
"""


def caption(published: str, arguments: PublishArguments) -> str:
    """What the published model says about an image, in a process without this repository's code.

    Raises:
        RuntimeError: If it cannot be loaded or fails.
    """
    image = arguments.image or str(Path(arguments.model, SHEET).resolve())
    command = [sys.executable, "-I", "-c", _WITHOUT_EVLGEN + CAPTION, "image-to-text", published, image]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The published model does not work:\n{done.stderr}")
    said = done.stdout.strip()
    if not said:
        raise RuntimeError(f"The published model says nothing about {image}.")
    return said.splitlines()[-1]


# An installed EVLGen would be taken in place of the code that was published.
_WITHOUT_EVLGEN = """
import sys
for name in ("configuration_evlgen", "modeling_evlgen", "processing_evlgen"):
    sys.modules[name] = None
"""


if __name__ == "__main__":
    main()
