"""The files of examples/accelerate_configs: what accelerate makes of them, and that training comes out the same."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pretrain
import pytest
import torch
from accelerate.commands import launch as launch_module
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from train_scst import SCSTTrainer
from transformers import Trainer

from common.arguments import DataArguments
from common.data.collator import CaptionCollator
from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import (
    PORT,
    ROOT,
    VISION_CONFIGS,
    join,
    save_image_folder,
    save_towers,
    tiny_model,
    tiny_processor,
    tiny_towers,
)
from .test_train_on_tiles import save_images
from .training import CONNECTOR, arguments, flags, logged, save_captioner, save_recipe, save_videos

CONFIGS = ROOT / "examples" / "accelerate_configs"
TRAINED = {"ln_vision", "vision_projection", "connector", "language_projection"}


def test_every_file_is_of_its_kind():
    kinds = {"single_gpu": DistributedType.NO, "multi_gpu": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    kinds |= {"deepspeed_zero2": DistributedType.DEEPSPEED, "deepspeed_zero3": DistributedType.DEEPSPEED}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == kinds.keys()
    for name, kind in kinds.items():
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert (config.distributed_type, config.use_cpu) == (kind, False)
        assert config.num_processes == (1 if name == "single_gpu" else 8)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_become_the_configuration_that_is_meant(stage, monkeypatch):
    def launcher(arguments):
        for key, value in prepare_deepspeed_cmd_env(arguments)[1].items():
            monkeypatch.setenv(key, value)

    monkeypatch.setattr(launch_module, "deepspeed_launcher", launcher)
    command = ["--config_file", str(CONFIGS / f"deepspeed_zero{stage}.yaml"), "script.py"]
    launch_module.launch_command(launch_module.launch_command_parser().parse_args(command))
    config = DeepSpeedPlugin().deepspeed_config
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    zero = config["zero_optimization"]
    assert zero["stage"] == stage and zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert {zero[f"offload_{what}"]["device"] for what in ("optimizer", "param")} == {"none"}


@pytest.mark.parametrize(("vision", "text"), [*((vision, "opt") for vision in VISION_CONFIGS), ("clip", "gpt2")])
def test_the_layers_to_share_out_are_in_the_model(vision, text):
    model = tiny_model(vision, text)
    names = [type(module).__name__ for module in model.modules()]
    assert {"TomeFormerLayer", {"opt": "OPTDecoderLayer", "gpt2": "GPT2Block"}[text]} <= model._no_split_modules
    assert model._no_split_modules <= set(names)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The paper's towers, tiny, in bfloat16 beside a float32 connector; and the run of one process."""
    folder = tmp_path_factory.mktemp("work")
    towers = {**save_towers(folder, "eva", "opt", bos=True), "dtype": "bfloat16", "connector_config": CONNECTOR}
    steps = {"dataset": save_image_folder(folder / "images"), "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    save_recipe(folder, **towers, **steps, max_new_tokens=4, logging_steps=1, activation_checkpointing=True)
    pretrain.main(arguments(folder, folder / "one", per_device_train_batch_size=4))
    return folder


def on_two_processes(config, script, given):
    """A command that runs a script on two CPU processes. FSDP and DeepSpeed need more than `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    wrapper = [] if config == "multi_gpu.yaml" else [str(ROOT / "tests" / "shared_on_cpu.py")]
    return [*command, "--num_processes", "2", "--main_process_port", PORT, *wrapper, str(ROOT / script), *given]


def skip_without_deepspeed(config):
    if "deepspeed" in config and importlib.util.find_spec("deepspeed") is None:  # an import would build its kernels
        pytest.skip("needs deepspeed")


def launch(work, output, config, **changes):
    changes |= {"per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    command = on_two_processes(config, "examples/pretrain.py", arguments(work, output, **changes))
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, timeout=240)


def assert_same_model(one, other, **tolerance):
    """As they load in one process, without any launcher."""
    one, other = (EVLGenForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype
        torch.testing.assert_close(other[name], tensor, **tolerance)


def assert_same_run(one, other):
    assert logged(other / "checkpoint-4") == pytest.approx(logged(one / "checkpoint-4"), abs=1e-3)
    assert_same_model(one, other, atol=1e-4, rtol=1e-3)
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (one, other))
    assert other == pytest.approx(one, abs=1e-3)


@pytest.fixture(scope="module")
def fsdp_run(work):
    launch(work, work / "fsdp", "fsdp2.yaml", towers="reference")
    return work / "fsdp"


@pytest.mark.slow
def test_fsdp_trains_as_one_process(work, fsdp_run):
    assert_same_run(work / "one", fsdp_run)
    saved = load_file(fsdp_run / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == TRAINED
    checkpoint = fsdp_run / "checkpoint-2"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists()  # or it was DDP
    assert json.loads((checkpoint / "config.json").read_text())["towers"] == "reference"


@pytest.mark.slow
def test_an_fsdp_run_goes_on(work, fsdp_run, tmp_path):
    shutil.copytree(fsdp_run / "checkpoint-2", tmp_path / "checkpoint-2")
    launch(work, tmp_path, "fsdp2.yaml", towers="reference", resume_from_checkpoint=True)
    assert logged(tmp_path / "checkpoint-4") == logged(fsdp_run / "checkpoint-4")
    assert_same_model(fsdp_run, tmp_path, atol=0, rtol=0)


@pytest.mark.slow
def test_fsdp_saves_whole_models_and_trains_in_float32_under_bf16(work, tmp_path):
    changes = {"towers": "include", "bf16": True, "max_steps": 1, "save_steps": 1}
    pretrain.main(arguments(work, tmp_path / "one", per_device_train_batch_size=4, **changes))
    launch(work, tmp_path / "two", "fsdp2.yaml", **changes)
    for name, tolerance in (("loss", 2e-4), ("grad_norm", 5e-3)):  # bfloat16 trainable parts are 1e-3 and 3e-2 off
        one, two = (logged(tmp_path / folder / "checkpoint-1", name) for folder in ("one", "two"))
        assert two == pytest.approx(one, rel=tolerance)
    saved = load_file(tmp_path / "two" / "model.safetensors")
    towers = {name: tensor for name, tensor in saved.items() if name.startswith(("vision_tower.", "language_model."))}
    before = load_file(work / "one" / "model.safetensors")
    assert all(torch.equal(towers[name], before[name]) for name in towers.keys() & before.keys())
    assert {tensor.dtype for tensor in towers.values()} == {torch.bfloat16}
    assert {saved[name].dtype for name in saved.keys() - towers.keys()} == {torch.float32}
    optimizer = torch.load(tmp_path / "two" / "checkpoint-1" / "optimizer.bin")
    assert {state["exp_avg"].dtype for state in optimizer["state"].values()} == {torch.float32}


IMAGE, VIDEO = 300, 301  # placeholders


def pixels(*shape):
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def text_of(budgets, token_id):
    """Labelled rows of one image or video each, of `budgets` tokens."""
    rows = [[token_id] * budget + [5, 6 + number, 7] for number, budget in enumerate(budgets)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": padded}


def images_of(grids, budgets):
    """A batch of images, each with rows and columns of tiles."""
    tiles = sum(rows * columns for rows, columns in grids)
    grids = torch.tensor([(1, *grid) for grid in grids])
    return {**text_of(budgets, IMAGE), "pixel_values": pixels(tiles), "image_grid_thw": grids}


def shared_by(texts, budget=11):
    """A batch of one image for each number of texts."""
    batch = images_of([(1, 1)] * len(texts), [budget] * len(texts))
    rows = [[0] * budget + [number for number in range(1, count + 1) for _ in range(3)] for count in texts]
    padded = [torch.tensor(row) for row in rows]
    segments = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=-1)
    ids = torch.where(segments > 0, 5 + segments, torch.where(segments == 0, IMAGE, 0))
    return {**batch, "input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids, "segment_ids": segments}


def videos_of(lengths, budgets):
    """A batch of videos with some numbers of frames."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
    return {**text_of(budgets, VIDEO), "pixel_values_videos": pixels(*mask.shape), "frame_mask": mask}


ELASTIC = {"image_token_range": [4, 17], "image_token_id": IMAGE, "video_token_id": VIDEO}
SIZES = {"temporal_hidden_size": 8, "temporal_num_attention_heads": 2}
QFORMER = {**CONNECTOR, "model_type": "evlgen_qformer", "num_query_tokens": 11}
del QFORMER["merge_r"]


def build(connector=CONNECTOR, vision="clip", **fields):
    """A model without dropout, whose new parts for videos have an effect."""
    model = join(*tiny_towers(vision), connector_config=connector, **{**ELASTIC, **fields})
    for name, parameter in model.named_parameters():
        if name.startswith(("temporal.", "time_embedding.")):
            torch.nn.init.normal_(parameter)
    return model


TILES = images_of([(1, 1), (2, 2), (1, 2)], [11, 11, 4]), images_of([(2, 1)], [11])
# The second has more frames than run through the tower at a time.
VIDEOS = videos_of([3, 2], [4, 16]), videos_of([40], [11])
# Each a model, and two batches that take other ways through it.
CASES = {
    "text beside images": (build, text_of([0], IMAGE), images_of([(1, 1), (1, 1)], [11, 0, 11])),
    "other budgets": (build, images_of([(1, 1), (1, 1)], [5, 5]), images_of([(1, 1), (1, 1)], [16, 16])),
    "several texts of an image": (build, shared_by([1, 4]), shared_by([2, 2, 3])),
    "tiles": (build, *TILES),
    "tiles of a Q-Former": (partial(build, QFORMER, image_token_range=[4, 11]), *TILES),
    "means of frames": (build, *VIDEOS),
    "merged videos": (partial(build, video_mode="merge"), *VIDEOS),
    "temporal contextualizer": (partial(build, vision="eva", temporal_contextualizer=True, **SIZES), *VIDEOS),
}


@pytest.fixture(scope="module", params=["multi_gpu.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
def cases(request, tmp_path_factory):
    """A folder for each case, with its gradients on two processes. All cases share the processes, to save time."""
    folders = {}
    for case, (make, *batches) in CASES.items():
        folders[case] = folder = tmp_path_factory.mktemp("case")
        make().save_pretrained(folder / "model")
        torch.save(batches, folder / "batches.pt")
    command = on_two_processes(request.param, "tests/mixed_batches.py", map(str, folders.values()))
    result = subprocess.run(command, timeout=240, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    wrapped = {"multi_gpu.yaml": "DistributedDataParallel", "fsdp2.yaml": "FSDPEVLGenForConditionalGeneration"}
    assert result.stdout.count(wrapped[request.param]) == len(folders)  # DeepSpeed prints as well, if it is installed
    return folders


@pytest.mark.parametrize("case", CASES)
def test_batches_that_differ_among_processes_do_not_hold_each_other_up(case, cases):
    """Processes wait for each other. In two steps their mean gradients are those of one process with both batches."""
    folder = cases[case]
    model = EVLGenForConditionalGeneration.from_pretrained(folder / "model").train()
    sum(model(**batch).loss for batch in torch.load(folder / "batches.pt")).backward()
    found = load_file(folder / "gradients.safetensors")
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() >= expected.keys() and any(grad.any() for grad in expected.values())
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient.view_as(wanted), wanted, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def video_work(tmp_path_factory):
    """A model with contextualizers, for images of up to four tiles; images and videos."""
    pytest.importorskip("av", reason="needs the video extra")
    folder = tmp_path_factory.mktemp("videos")
    save_captioner(folder / "model", build(temporal_contextualizer=True, image_token_range=None, **SIZES), max_tiles=4)
    save_images(folder / "images")
    save_videos(folder / "movies", train=[2, 5, 9, 3] * 2, test=[2, 5])
    return folder


def tuning_options(video_work, script, output, **changes):
    model, dataset = ("model", "images") if script == "finetune" else ("image_model", "movies")
    given = {model: video_work / "model", "dataset": video_work / dataset, "caption_column": "caption", "bf16": False}
    given |= {"lora": "none", "prompt_column": "", "prompt": ""} if script == "finetune" else {"video_column": "video"}
    given |= {"max_steps": 4, "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "max_new_tokens": 4}
    given |= {"activation_checkpointing": script == "finetune", "disable_tqdm": True, "output_dir": output}
    return flags(**given, dataloader_pin_memory=False, **changes)


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("finetune", "fsdp2.yaml"),
        ("finetune", "deepspeed_zero2.yaml"),  # ZeRO-3 refuses tiles
        pytest.param("finetune_video", "fsdp2.yaml", marks=pytest.mark.slow),
        pytest.param("finetune_video", "deepspeed_zero3.yaml", marks=pytest.mark.slow),
    ],
)
def test_tiles_and_contextualizers_train_as_in_one_process(config, script, video_work, tmp_path):
    skip_without_deepspeed(config)
    importlib.import_module(script).main(
        tuning_options(video_work, script, tmp_path / "one", per_device_train_batch_size=4)
    )
    given = tuning_options(video_work, script, tmp_path / "two", per_device_train_batch_size=2)
    command = on_two_processes(config, f"examples/{script}.py", given)
    subprocess.run(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, timeout=240)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert load_file(tmp_path / "two" / "model.safetensors")["temporal.0.alpha"].shape == ()
    assert "fsdp" not in config or (tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists()  # not DDP


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process(stage, work, tmp_path):
    skip_without_deepspeed("deepspeed")
    launch(work, tmp_path, f"deepspeed_zero{stage}.yaml")
    assert_same_run(work / "one", tmp_path)
    assert list((tmp_path / "checkpoint-4").glob("global_step4/*"))


@pytest.fixture
def train_on_tiles(monkeypatch):
    """Makes the trainer of a run on images of several tiles, without a run. Takes a plugin of FSDP or DeepSpeed."""

    def start(fsdp=None, deepspeed=None, video_column=None):
        def under_plugin(trainer, model=None, **kwargs):
            state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
            trainer.model, trainer.accelerator = model, SimpleNamespace(state=state)
            trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = fsdp is not None, deepspeed is not None

        monkeypatch.setattr(Trainer, "__init__", under_plugin)
        monkeypatch.setattr(Trainer, "add_callback", lambda *_: None)
        processor = tiny_processor(model := tiny_model())
        processor.max_tiles = 4
        collator = CaptionCollator(processor, DataArguments(video_column=video_column), True)
        return EVLGenTrainer(model=model, args=SimpleNamespace(), data_collator=collator, train_dataset=None)

    return start


def test_self_critical_training_refuses_a_partitioned_model(monkeypatch):
    monkeypatch.setattr(EVLGenTrainer, "__init__", lambda trainer, **_: setattr(trainer, "is_fsdp_enabled", True))
    with pytest.raises(ValueError, match=r"FSDP and DeepSpeed cannot partition it.*multi_gpu\.yaml"):
        SCSTTrainer(reward=None, num_samples=2, greedy_baseline=False, max_new_tokens=1)


def test_partitions_of_the_connector_that_cannot_train_on_tiles_are_refused(train_on_tiles):
    """The connector runs once for each grid. Processes with other grids would wait for each other."""
    zero3, by_size = SimpleNamespace(zero_stage=3), SimpleNamespace(auto_wrap_policy=size_based_auto_wrap_policy)
    with pytest.raises(ValueError, match=r"ZeRO-3 cannot train .*`max_tiles`.*fsdp2\.yaml or multi_gpu\.yaml"):
        train_on_tiles(deepspeed=zero3)
    with pytest.raises(ValueError, match="`fsdp_auto_wrap_policy` TRANSFORMER_BASED_WRAP"):
        train_on_tiles(fsdp=by_size)
    for plugin in ({"deepspeed": zero3}, {"fsdp": by_size}):
        train_on_tiles(**plugin, video_column="video")  # they are not cut
    train_on_tiles(deepspeed=SimpleNamespace(zero_stage=2))


@pytest.mark.parametrize("given", [None, ["TomeFormerLayer", "CLIPEncoderLayer"]])
def test_the_connector_is_whole_for_tiles_whatever_layers_are_named(given, train_on_tiles):
    plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=given)
    train_on_tiles(fsdp=plugin)
    expected = ["CLIPEncoderLayer"] if given else sorted(tiny_model()._no_split_modules - {"TomeFormerLayer"})
    assert plugin.transformer_cls_names_to_wrap == expected
