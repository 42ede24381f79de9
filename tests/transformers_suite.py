"""Runs transformers' own common tests, of the installed version, on this repository's classes.

    python -m pytest -n 0 tests/transformers_suite.py

The tests come from transformers' source distribution on PyPI, which is fetched once. `pytest` does not collect this
file by itself: it needs PyPI and the package `parameterized`.
"""

import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import transformers
from huggingface_hub import constants

from processing_evlgen import EVLGenProcessor

from .helpers import noise_images, tiny_image_processor, tiny_tokenizer

_NO_VIDEO = "gives a text with <video> but no video: videos have no processor of their own that is saved"
# Names of tests that cannot apply, with the reasons.
NOT_FOR_THE_PROCESSOR = {
    "test_init_arguments_not_in_processor_kwargs": "checkpoints have `num_frames` in processor_config.json",
    "test_processor_with_multiple_inputs": _NO_VIDEO,
    "test_replacement_offsets": _NO_VIDEO,
    "test_tokenizer_decode_defaults": "builds a processor without `num_image_tokens`, which only the model knows",
}


def fetch_tests() -> Path:
    """Downloads transformers' tests of the installed version once; gives their folder."""
    name = f"transformers-{transformers.__version__}"
    folder = Path(constants.HF_HOME) / "evlgen_tests" / "suite"
    if not (folder / name / "tests").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        with tempfile.TemporaryDirectory() as download:
            subprocess.run([*command, f"transformers=={transformers.__version__}", "-d", download], check=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
                archive.extractall(folder, members, filter="data")
    return folder / name / "tests"


def processor_suite(tests: Path) -> type[unittest.TestCase]:
    """The common tests of processors."""
    image = Path(tempfile.mkdtemp()) / "image.png"
    noise_images(1)[0].save(image)
    # The source distribution lacks this helper. Its images come from the Hub; one of noise serves as well.
    fetch = types.ModuleType("fetch_hub_objects_for_ci")
    fetch.url_to_local_path = lambda url: str(image) if url.endswith("png") else url
    sys.modules[fetch.__name__] = fetch
    sys.path.append(str(tests))
    from test_processing_common import ProcessorTesterMixin

    class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
        processor_class = EVLGenProcessor

        @classmethod
        def _setup_image_processor(cls):
            return tiny_image_processor()

        @classmethod
        def _setup_tokenizer(cls):
            tokenizer = tiny_tokenizer(chat=True)
            tokenizer.model_max_length = 1024  # the suite's texts are long, and the tiny tokenizer spells them
            return tokenizer

        @staticmethod
        def prepare_processor_dict():
            return {"num_image_tokens": 3}

    return ProcessorTest


def without(suite: type[unittest.TestCase], not_applicable: dict[str, str]) -> type[unittest.TestCase]:
    """The suite, in which tests that cannot apply are skipped with their reasons."""
    for name, reason in not_applicable.items():
        setattr(suite, name, unittest.skip(reason)(getattr(suite, name)))
    return suite


TESTS = fetch_tests()
ProcessorTest = without(processor_suite(TESTS), NOT_FOR_THE_PROCESSOR)
