"""Publishes a trained model: weights, configuration, processor, code and a model card, in one commit.

    hf auth login
    python examples/publish.py --model outputs/demo --repo_id you/captioner \
        --results outputs/evaluation/demo/openmoji-scenes/results.json --check true

`--folder` writes everything into a folder and uploads nothing. The folder of an adapter, from `finetune.py`, is
published as an adapter, or with `--merge true` as one complete model. `--space` uploads a page of `export.py` as a
static Space. docs/publish.md has the rest.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, SpaceCardData
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file
from transformers.hf_argparser import HfArg

from common.arguments import parse_arguments
from common.models import load_captioner
from common.processes import run_script
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import BASE_MODEL, TOWERS, check_base, find_adapter, hash_weights, is_on_hub
from processing_evlgen import EVLGenProcessor

SHEET = "captions.png"  # the contact sheet that pretrain.py writes beside its model
CARD = "README.md"
CONNECTORS = {"tomeformer": "a TomeFormer", "evlgen_qformer": "a Q-Former", "evlgen_mlp": "an MLP"}
_SIGNATURE = "\n<!-- Written by EVLGen's examples/publish.py: sha256 {} -->\n"
# Files of an earlier publication that are deleted. Loaded beside the new ones, they would give another model.
STALE = ["*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG, BASE_MODEL, SHEET]
# Runs without this repository's code. An installed EVLGen, too, would be used instead of the published code.
CAPTION = """
import sys
for name in ("configuration_evlgen", "modeling_evlgen", "processing_evlgen"):
    sys.modules[name] = None
from transformers import pipeline
task, model, image = sys.argv[1:]
print(pipeline(task, model=model, trust_remote_code=True)(image)[0]["generated_text"])
"""


@dataclass
class PublishArguments:
    repo_id: str | None = HfArg(default=None, help="Name on the Hub, as in you/captioner. Default: the folder's name.")
    model: str = HfArg(default="outputs/demo", help="Folder of the trained model.")
    results: list[str] = HfArg(default_factory=list, help="results.json files of evaluations.")
    license: str | None = HfArg(default=None, help="Identifier of a licence on the Hub, such as bsd-3-clause.")
    datasets: list[str] = HfArg(default_factory=list, help="Data sets on the Hub that the model was trained on.")
    towers: Literal["include", "reference"] | None = HfArg(
        default=None, help="Whether to upload the frozen towers or only name them. Default: the model's setting."
    )
    merge: bool = HfArg(default=False, help="Merge an adapter into its model.")
    base_model: str | None = HfArg(default=None, help="Name on the Hub of an adapter's model. Default: the adapter's.")
    card: Literal["replace", "keep"] | None = HfArg(
        default=None, help="Whether to replace or keep a README.md that was edited after publishing."
    )
    private: bool = HfArg(default=False, help="Make a new repository private.")
    folder: str | None = HfArg(default=None, help="Write everything into this folder and upload nothing.")
    check: bool = HfArg(default=False, help="Load the published model in a new process and caption an image.")
    image: str | None = HfArg(default=None, help="The image to caption. Default: the model's contact sheet.")
    space: str | None = HfArg(default=None, help="Static Space to upload to, as in you/captions: `model` is a page.")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(PublishArguments, argv=argv)
    if arguments.space is not None:
        upload_space(arguments)
        return
    check_arguments(arguments)
    results = read_results(arguments.results)
    check_results(results, arguments)
    card = read_card(arguments)
    if card is not None and is_edited(card) and arguments.card is None:
        raise ValueError(
            f"{CARD} of {arguments.folder or arguments.repo_id} was edited after it was written here. "
            "--card keep leaves it as it is, --card replace writes a new one."
        )
    target = Path(arguments.folder).resolve() if arguments.folder else None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder stands beside the target, so that files can be moved there.
    with tempfile.TemporaryDirectory(dir=target and target.parent, prefix=".publish-") as temporary:
        new_card = write_model(Path(temporary), arguments, results)
        if card is None or arguments.card != "keep":
            Path(temporary, CARD).write_text(sign(new_card), encoding="utf-8")
        if target is None:
            upload(Path(temporary), arguments)
        else:
            move_files(Path(temporary), target)
            print(f"{arguments.folder}/ holds the files to publish.")
    if arguments.check:
        published = str(target or arguments.repo_id)
        print(f"{published} generates: {caption(published, arguments)}")


def check_arguments(arguments: PublishArguments) -> None:
    """Completes `repo_id`. A ValueError names arguments that are missing or contradict each other."""
    if arguments.repo_id is None and arguments.folder is None:
        raise ValueError("`repo_id` is needed to upload, or `folder` to write to a folder.")
    arguments.repo_id = arguments.repo_id or Path(arguments.folder).resolve().name
    if arguments.folder is None and "/" not in arguments.repo_id:
        raise ValueError(f"`repo_id` must name the owner, as in you/captioner, but is {arguments.repo_id!r}.")
    if arguments.check and arguments.image is None and not Path(arguments.model, SHEET).exists():
        raise ValueError(f"`check` needs an `image`: there is no {SHEET} in {arguments.model}.")
    if arguments.folder is not None and Path(arguments.folder).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"`folder` must differ from the model's folder, but both are {arguments.folder}.")


def read_results(paths: list[str]) -> list[dict[str, Any]]:
    """Reads results.json files of `evaluate_captioning.py` and `evaluate_vqa.py`; a ValueError names a bad one."""
    results = []
    for path in paths:
        try:
            entry = json.loads(Path(path).read_text(encoding="utf-8"))
            kept = {name: entry[name] for name in ("task", "dataset", "metrics", "num_rows", "settings", "model")}
            if not {"weights", "dtype"} <= kept["settings"].keys():  # they identify the model
                raise ValueError("its settings lack weights and dtype")
            # `task`, `dataset` and `metrics` hold arguments of `EvalResult`.
            shared = {f"{part}_{name}": value for part in ("task", "dataset") for name, value in entry[part].items()}
            metrics = [{f"metric_{name}": value for name, value in metric.items()} for metric in entry["metrics"]]
            shown = [EvalResult(**shared, **metric) for metric in metrics]
            results.append(kept | {"notes": entry.get("notes", []), "eval_results": shown})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"`results`: {path} is not the results.json of an evaluation: {error!r}") from error
    return results


def check_results(results: list[dict[str, Any]], arguments: PublishArguments) -> None:
    """Raises a ValueError if results were not measured with the weights that are published."""
    for path, entry in zip(arguments.results, results, strict=True):
        model = load_captioner(arguments.model, dtype=entry["settings"]["dtype"])
        weights = hash_weights(model.state_dict())
        if weights != entry["settings"]["weights"] or arguments.merge:
            raise ValueError(
                f"`results`: {path} was measured on {entry['model']}, whose weights differ from the published ones."
            )


def read_card(arguments: PublishArguments) -> str | None:
    """Reads the card of the repository or folder; None if it has none yet."""
    path = Path(arguments.folder or "", CARD)
    if arguments.folder is None:
        api = HfApi()
        if not api.file_exists(arguments.repo_id, CARD):  # also False without a repository
            return None
        path = Path(api.hf_hub_download(arguments.repo_id, CARD))
    return path.read_text(encoding="utf-8") if path.exists() else None


def write_model(folder: Path, arguments: PublishArguments, results: list[dict[str, Any]]) -> str:
    """Writes everything but the card into an empty folder, and returns the card."""
    source = Path(arguments.model)
    is_adapter = (source / ADAPTER_CONFIG).exists()
    if arguments.merge and not is_adapter:
        raise ValueError(f"`merge` needs an adapter, but there is no {ADAPTER_CONFIG} in {arguments.model}.")
    name = find_adapter(source, {})[0] if arguments.merge else arguments.model
    model = load_captioner(name)
    adapter = load_file(source / SAFETENSORS_WEIGHTS_NAME) if is_adapter else {}
    adapter_of = None
    if is_adapter and not arguments.merge:
        adapter_of = copy_adapter(source, folder, arguments.base_model)
        trained = sum(weight.numel() for weight in adapter.values())
    else:
        if arguments.merge:
            check_base(model.config, source, {})
            model = PeftModel.from_pretrained(model, source).merge_and_unload()
            adapted = [argument for argument, tower in TOWERS.items() if any(f".{tower}." in name for name in adapter)]
            model.config.adapted_towers = adapted
        trained = model.num_parameters() - sum(getattr(model, tower).num_parameters() for tower in TOWERS.values())
        save_model(model, folder, arguments.towers)
        model.config.towers = EVLGenConfig.from_pretrained(folder).towers
    EVLGenProcessor.from_pretrained(arguments.model).save_pretrained(folder)
    if (source / SHEET).exists():
        Image.open(source / SHEET).save(folder / SHEET)  # a link could lead to anything
    return str(model_card(arguments, model.config, trained, results, adapter_of))


def model_card(
    arguments: PublishArguments,
    config: EVLGenConfig,
    trained_parameters: int,
    results: list[dict[str, Any]],
    adapter_of: str | None = None,
) -> ModelCard:
    """Fills in the card. `results` come from [`read_results`]; `adapter_of` names an adapter's model on the Hub."""
    name = arguments.repo_id.split("/")[-1]
    trained = config.training_data or []  # names with a slash are on the Hub
    requirements = ["transformers", "torchvision", *(["peft"] if adapter_of else [])]
    requirements += ["timm"] if config.vision_config.model_type == "timm_wrapper" else []
    requirements += ["av"] if config.is_for_videos else []
    bases = [name for name in (config.vision_model_name_or_path, config.text_model_name_or_path) if is_on_hub(name)]
    data = ModelCardData(
        base_model=[adapter_of] if adapter_of else bases or None,
        datasets=list(dict.fromkeys([*arguments.datasets, *(name for name in trained if "/" in name)])) or None,
        eval_results=[result for entry in results for result in entry["eval_results"]] or None,
        language="en",
        library_name="peft" if adapter_of else "transformers",
        license=arguments.license,
        model_name=name if results else None,
        pipeline_tag="video-to-text" if config.is_for_videos else "image-to-text",
        tags=["evlgen", "image-captioning", "vision-language", "arxiv:2310.03291"],
    )
    return ModelCard.from_template(  # the template also gets the fields of `data`
        data,
        template_path=str(Path(__file__).with_name("publish_card.md")),
        repo_id=arguments.repo_id,
        config=config,
        connector=CONNECTORS.get(config.connector_config.model_type, "a connector of its own"),
        is_video=config.is_for_videos,
        trained_parameters=trained_parameters,
        other_data=[name for name in trained if "/" not in name],
        requirements=" ".join(requirements),
        results=results,
        has_sheet=Path(arguments.model, SHEET).exists(),
        adapter_of=adapter_of,
        is_on_hub=is_on_hub,
        Path=Path,
    )


def sign(card: str) -> str:
    """Appends a hash of the card. With it [`is_edited`] detects later changes."""
    return card + _SIGNATURE.format(hashlib.sha256(card.encode()).hexdigest())


def is_edited(card: str) -> bool:
    """Returns whether a card differs from what [`sign`] returned."""
    written, _, _ = card.partition(_SIGNATURE.partition("{")[0])
    return card != sign(written)


def save_model(model: EVLGenForConditionalGeneration, folder: Path, towers: str | None) -> None:
    """Saves the model for others. Towers that are not on the Hub are included, or refused as a `"reference"`."""
    names = {argument: getattr(model.config, f"{argument}_name_or_path") for argument in TOWERS}
    private = [argument for argument, name in names.items() if not is_on_hub(name)]
    if private and towers == "reference":
        raise ValueError(f'`towers` cannot be "reference": {names[private[0]]!r} is not on the Hub.')
    model.save_pretrained(folder, towers="include" if private else towers)


def copy_adapter(source: Path, folder: Path, base_model: str | None) -> str:
    """Copies an adapter alone and returns its model's name. One that is not on the Hub raises a ValueError."""
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base_model = base_model or config["base_model_name_or_path"]
    if not is_on_hub(base_model):
        raise ValueError(
            f"`model` is an adapter for {base_model}, which is not on the Hub. Publish that model first and give its "
            "name as `base_model`, or merge the adapter into it with --merge true."
        )
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base_model}, indent=2))
    for name in (SAFETENSORS_WEIGHTS_NAME, BASE_MODEL):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return base_model


def move_files(source: Path, target: Path) -> None:
    """Moves published files into a folder, in place of those of an earlier publication.

    A link in the folder is replaced; the file that it leads to is not changed. A ValueError names files in the folder
    that do not belong to the model, and would be published with it.
    """
    target.mkdir(exist_ok=True)
    names = list_files(source)
    present = list(filter_repo_objects(list_files(target), ignore_patterns=DEFAULT_IGNORE_PATTERNS))  # as in an upload
    stale = [name for name in present if any(fnmatch(name, pattern) for pattern in STALE) and "/" not in name]
    hub_file = ".gitattributes"  # the Hub's own, in a clone of a repository
    foreign = sorted({*present} - {*names, *stale, hub_file, CARD})
    if foreign:
        remedy = "Remove them, or name another folder."
        raise ValueError(f"`folder`: {target} holds files that are not the model's: {', '.join(foreign)}. {remedy}")
    for name in stale:
        (target / name).unlink()
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(source / name, target / name)


def list_files(folder: Path) -> list[str]:
    """Lists files and links below a folder, relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths]


def upload(folder: Path, arguments: PublishArguments) -> None:
    """Uploads in one commit, to a new repository or over an earlier publication."""
    api = HfApi()
    api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
    title = "Model, processor, code and card"
    try:
        commit = api.upload_folder(
            repo_id=arguments.repo_id, folder_path=folder, commit_message=title, delete_patterns=STALE
        )
    except Exception as error:
        error.add_note(f"{arguments.repo_id} is as it was, or empty if it is new. The same command tries again.")
        raise
    print(f"Published: {commit.commit_url}")


def upload_space(arguments: PublishArguments) -> None:
    """Uploads a page from `export.py` as a static Space. A README.md in the folder or the Space stays as it is."""
    folder, api, default = Path(arguments.model), HfApi(), PublishArguments()
    used = ("model", "space", "license", "private")
    unused = [name for name, value in vars(arguments).items() if value != getattr(default, name) and name not in used]
    if unused:
        raise ValueError(f"`space` uploads a page alone, and cannot be given with: {', '.join(unused)}.")
    if "/" not in arguments.space:
        raise ValueError(f"`space` must name the owner, as in you/captions, but is {arguments.space!r}.")
    if not (folder / "index.html").exists() or not (folder / "onnx").exists():
        command = "python examples/export.py --formats transformers.js --page true --output_dir"
        raise ValueError(f"`model`: {folder} holds no page. Write one with: {command} {folder}")
    if not (folder / CARD).exists() and not api.file_exists(arguments.space, CARD, repo_type="space"):
        data = SpaceCardData(title=arguments.space.split("/")[-1], sdk="static", license=arguments.license)
        text = "Captions images in the browser. No image leaves it."
        (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    api.create_repo(arguments.space, repo_type="space", space_sdk="static", private=arguments.private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=arguments.space, repo_type="space", folder_path=folder, delete_patterns=["onnx/*"]
    )
    print(f"Published: {commit.commit_url}")


def caption(published: str, arguments: PublishArguments) -> str:
    """Captions an image with the published model in a new process. A RuntimeError has that process's error."""
    image = arguments.image or str(Path(arguments.model, SHEET))
    image = str(Path(image).resolve()) if Path(image).exists() else image  # the process starts in another folder
    command = [sys.executable, "-I", "-c", CAPTION, "image-to-text", published, image]
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"The published model does not work:\n{process.stderr}")
    text = process.stdout.strip()
    if not text:
        raise RuntimeError(f"The published model generates nothing for {image}.")
    return text.splitlines()[-1]


if __name__ == "__main__":
    run_script(main)
