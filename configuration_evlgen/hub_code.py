"""Copies the code into every checkpoint, so that `trust_remote_code=True` loads it without EVLGen installed.

transformers' loader takes one flat folder of files that import each other as `from .name import X`. In this repository
the code lives in three packages. In the copy, `from configuration_evlgen import X` becomes
`from .configuration_evlgen import X`. Code that was itself loaded from a checkpoint is copied as it is.
"""

import ast
import copy
import inspect
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

AUTO_MAP = {
    "AutoConfig": "configuration_evlgen.EVLGenConfig",
    "AutoModel": "modeling_evlgen.EVLGenForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_evlgen.EVLGenForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_evlgen.EVLGenForConditionalGeneration",
    "AutoProcessor": "processing_evlgen.EVLGenProcessor",
    "AutoVideoProcessor": "video_processing_evlgen.EVLGenVideoProcessor",
}
CUSTOM_PIPELINES = {
    "image-to-text": {"impl": "pipeline_evlgen.EVLGenImageToTextPipeline", "pt": ["AutoModelForImageTextToText"]},
    "video-to-text": {"impl": "pipeline_evlgen.EVLGenVideoToTextPipeline", "pt": ["AutoModelForImageTextToText"]},
}
_CROSS_IMPORT = re.compile(
    r"^(\s*)from ((?:configuration|modeling|processing)_evlgen)(?:\.(\w+))? import", re.MULTILINE
)


class Pipelines(dict):
    """The pipeline that `pipeline(model=…)` takes where no task is given. The others are found by their names.

    transformers infers a task only where a configuration lists a single pipeline.
    """

    def __init__(self, task: str):
        super().__init__({task: self.__missing__(task)})

    def __contains__(self, task: object) -> bool:
        return task in CUSTOM_PIPELINES

    def __missing__(self, task: str) -> dict[str, Any]:
        return copy.deepcopy(CUSTOM_PIPELINES[task])  # `pipeline` changes what it reads


def save_hub_code(save_directory: str | os.PathLike, *files: Path) -> list[Path]:
    """Writes the code of configuration, model, processor and pipeline into an existing folder. Returns its files.

    The `files` of a connector of one's own go with them.
    """
    written = []
    for source in (*hub_files(), *files):
        target = Path(save_directory) / source.name
        code = _CROSS_IMPORT.sub(lambda m: f"{m[1]}from .{m[3] or m[2]} import", source.read_text("utf-8"))
        target.write_text(code, encoding="utf-8")
        written.append(target)
    return written


def hub_files() -> list[Path]:
    """The files of configuration, model, processor and pipeline, wherever they were loaded from."""
    # Imported here, since each of them imports this module. The imports have a second use: the loader copies only the
    # files that a module imports, directly or not. Each module imports this one, and so all others.
    from configuration_evlgen import EVLGenConfig
    from modeling_evlgen import EVLGenForConditionalGeneration
    from processing_evlgen import EVLGenProcessor
    from processing_evlgen.pipeline_evlgen import EVLGenImageToTextPipeline

    parts = (EVLGenConfig, EVLGenForConditionalGeneration, EVLGenProcessor, EVLGenImageToTextPipeline)
    folders = {Path(inspect.getfile(part)).parent for part in parts}
    return sorted(path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py")


def check_file(path: Path) -> None:
    """Raises a ValueError if a connector's file cannot travel with a checkpoint.

    It must have a name of its own, and import from EVLGen what is in the file that its copy imports from.
    """
    others = {file.name for file in hub_files() if file != path}
    if path.name in others or not path.stem.isidentifier():
        raise ValueError(f"{path.name} must have another name: one that Python can import and no file of EVLGen has.")
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        line = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
        found = _CROSS_IMPORT.match(line)
        if found is None and not re.match(r"import (configuration|modeling|processing)_evlgen\b", line):
            continue
        module = found and import_module(f"{found[2]}.{found[3] or found[2]}")
        if module is None or not all(hasattr(module, alias.name) for alias in node.names):
            wanted = "from modeling_evlgen.connectors import ConnectorConfig"
            raise ValueError(f"{path.name}: write `{line}` as `{wanted}`, with the file that defines it.")
