"""Runs transformers' own common tests, of the installed version, on this repository's classes.

    python -m pytest -o addopts= tests/transformers_suite.py

The tests come from transformers' source distribution on PyPI, which is fetched once. `pytest` does not collect this
file by itself: it needs PyPI and the package `parameterized`. The distribution lacks the tests of generation and of
export.
"""

import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, EVLGenModel
from processing_evlgen import EVLGenProcessor, EVLGenVideoProcessor

from .helpers import IMAGE_SIZE, TEXT_SIZES, VISION_CONFIGS, noise_images, tiny_image_processor, tiny_tokenizer
from .test_video import write_video
from .training import CONNECTOR

# Names of tests that cannot apply, with the reasons.
NOT_FOR_THE_PROCESSOR = {
    "test_apply_chat_template_video_frame_sampling": "takes all frames by default, and refuses to sample a list",
    "test_init_arguments_not_in_processor_kwargs": "checkpoints have `max_tiles` in processor_config.json",
    "test_tokenizer_decode_defaults": "builds a processor without `num_image_tokens`, which only the model knows",
}

_FROZEN = "looks for gradients in the towers, which are frozen"
_OPTIONAL = "`temporal` is None in an image model, and all parts become float32 in `_from_config`"
_TOO_LONG = "gives a text longer than the language model's positions, which is refused"
NOT_FOR_THE_MODEL = {
    "test_model_rope_scaling_from_config_0_linear": _TOO_LONG,
    "test_model_rope_scaling_from_config_1_dynamic": _TOO_LONG,
    "test_model_rope_scaling_from_config_2_yarn": _TOO_LONG,
    "test_training_gradient_checkpointing": _FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_false": _FROZEN,
    "test_training_gradient_checkpointing_use_reentrant_true": _FROZEN,
    "test_keep_in_fp32_modules_exist": _OPTIONAL,
    "test_keep_in_fp32_modules_strict_also_hardcode_fp32": _OPTIONAL,
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
    folder = Path(tempfile.mkdtemp())
    noise_images(1)[0].save(folder / "a.png")
    write_video(folder / "a.mp4", 11)
    # The source distribution lacks this helper. Its files come from the Hub; others serve as well.
    fetch = types.ModuleType("fetch_hub_objects_for_ci")
    fetch.url_to_local_path = lambda url: str(folder / f"a{Path(url).suffix}")
    sys.modules[fetch.__name__] = fetch
    sys.path.append(str(tests))
    from test_processing_common import ProcessorTesterMixin

    class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
        processor_class = EVLGenProcessor

        @classmethod
        def _setup_image_processor(cls):
            return tiny_image_processor()

        @classmethod
        def _setup_video_processor(cls):
            return EVLGenVideoProcessor()

        @classmethod
        def _setup_tokenizer(cls):
            tokenizer = tiny_tokenizer(chat=True)
            tokenizer.model_max_length = 1024  # the suite's texts are long, and the tiny tokenizer spells them
            return tokenizer

        @staticmethod
        def prepare_processor_dict():
            return {"num_image_tokens": 3}

    return ProcessorTest


class ModelTester:
    """Builds what the common tests of models need: a tiny configuration, and a batch of images and text."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 7, 24, 32, 2, 2
    is_training = True

    def get_config(self):
        # The tests draw ids at random. In a large vocabulary they hardly meet a placeholder.
        sizes = {**TEXT_SIZES, "vocab_size": 10_000}
        return EVLGenConfig(
            vision_config=VISION_CONFIGS["clip"].to_dict(),
            connector_config=CONNECTOR,
            text_config=transformers.LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=1).to_dict(),
            image_token_id=3,  # within the vocabulary, as in other models
            video_token_id=4,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(5, 300, (self.batch_size, self.seq_length))
        input_ids[:, : config.num_image_tokens] = config.image_token_id
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return config, {**inputs, "pixel_values": torch.rand(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)}


def model_suite(tests: Path) -> type[unittest.TestCase]:
    """The common tests of models."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(tests)]
    sys.modules[package.__name__] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        for part in (name.split(".")[0], name):
            sys.modules[f"transformers_tests.{part}"] = types.ModuleType(part)
        setattr(sys.modules[f"transformers_tests.{name}"], mixin, type(mixin, (), {}))
    common = importlib.import_module("transformers_tests.test_modeling_common")
    # The tests look up what a class can do.
    common.MODEL_MAPPING_NAMES["evlgen"] = EVLGenModel.__name__
    common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["evlgen"] = EVLGenForConditionalGeneration.__name__

    class ModelTest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (EVLGenModel, EVLGenForConditionalGeneration)
        all_generative_model_classes = ()
        additional_model_inputs = ("pixel_values",)
        _is_composite = True

        def setUp(self):
            self.model_tester = ModelTester()

        def _video_features_prepare_config_and_inputs(self):
            config, inputs = super()._video_features_prepare_config_and_inputs()
            return config, {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].unsqueeze(1)}  # one frame

    return ModelTest


def without(suite: type[unittest.TestCase], not_applicable: dict[str, str]) -> type[unittest.TestCase]:
    """The suite, in which tests that cannot apply are skipped with their reasons."""
    for name, reason in not_applicable.items():
        setattr(suite, name, unittest.skip(reason)(getattr(suite, name)))
    return suite


TESTS = fetch_tests()
ProcessorTest = without(processor_suite(TESTS), NOT_FOR_THE_PROCESSOR)
ModelTest = without(model_suite(TESTS), NOT_FOR_THE_MODEL)
