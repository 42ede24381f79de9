"""A run goes on where it stopped, or says why not: settings, damaged checkpoints, and the folder that it writes to."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import finetune
import pretrain
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.trainer_pt_utils import safe_globals

from common.arguments import DataArguments, EVLGenTrainingArguments
from common.files import only_run_in, replacing, write_whole
from common.training.resume import ROWS_OF_STEP, check_settings_of_run, find_checkpoint, run_settings

from .helpers import save_image_folder, save_towers, tiny_model
from .training import CONNECTOR, arguments, assert_same_weights, flags, logged, save_recipe


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Towers, images and a recipe; and a run of four steps with a checkpoint after each two."""
    folder = tmp_path_factory.mktemp("work")
    recipe = {"dataset": save_image_folder(folder / "images"), "test_split": "", "max_steps": 4, "save_steps": 2}
    recipe |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    save_recipe(folder, **recipe)
    (folder / "recipe.yaml").rename(folder / "finetune.yaml")
    save_recipe(folder, **recipe, **save_towers(folder), connector_config=CONNECTOR)
    pretrain.main(arguments(folder, folder / "run"))
    return folder


@pytest.fixture
def run(work, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(work / "run", tmp_path / "run")
    return tmp_path / "run"


def resume(work, output, checkpoint=True, **changes):
    return pretrain.main(arguments(work, output, resume_from_checkpoint=checkpoint, **changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"connector_config": {**CONNECTOR, "merge_r": 2}}, "connector_config"),
        ({"max_train_samples": 8}, "number of rows"),
        ({"end_of_text": "."}, "end_of_text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_resume_with_other_settings_is_refused_by_name(changes, field, work, run):
    with pytest.raises(ValueError, match=rf"is of a run with other settings: .*`{field}` was .* and is ") as error:
        resume(work, run, max_steps=6, **changes)
    assert "a new run from them: examples/finetune.py --config examples/configs/finetune-captions.yaml --model" in str(
        error.value
    )


@pytest.mark.parametrize("argument", ["vision_model", "text_model"])
def test_a_tower_that_was_replaced_in_its_folder_is_noticed(argument, work, tmp_path):
    tower = shutil.copytree(Path(json.loads((work / "recipe.yaml").read_text())[argument]), tmp_path / "tower")
    changes = {"towers": "reference", argument: tower}
    pretrain.main(arguments(work, tmp_path / "out", max_steps=2, **changes))
    weights = {name: weight + 1 for name, weight in load_file(tower / "model.safetensors").items()}
    save_file(weights, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"other settings: `{argument}_fingerprint` was '\w+' and is '\w+'"):
        resume(work, tmp_path / "out", **changes)


def test_a_tower_that_would_compute_something_else_is_noticed(work, tmp_path):
    tower = shutil.copytree(Path(json.loads((work / "recipe.yaml").read_text())["text_model"]), tmp_path / "tower")
    pretrain.main(arguments(work, tmp_path / "out", max_steps=2, text_model=tower))
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"is of a run with other settings: `rms_norm_eps` is 0\.1, not 1e-06"):
        resume(work, tmp_path / "out", text_model=tower)


def paint_over(folder):
    Image.new("RGB", (40, 40), "white").save(folder / "images" / "train" / "5.png")


def edit_captions(folder):
    metadata = folder / "images" / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red image", "a crimson image"))


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (paint_over, r"`images of the rows \(compared: the sizes of all files and the content of 100 rows, no more\)"),
        (edit_captions, "`texts of the rows` was "),
        (
            lambda folder: edit_json(folder / "vision" / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
            r"`image_processor\.image_mean` was \[0\.48.*\] and is \[0\.5",
        ),
        (
            lambda folder: edit_json(folder / "text" / "tokenizer.json", normalizer={"type": "Lowercase"}),
            "`tokenizer` was",
        ),
        (
            lambda folder: edit_json(folder / "recipe.yaml", accelerator_config={"use_seedable_sampler": False}),
            "`use_seedable_sampler` was True and is False",
        ),
    ],
    ids=["images", "captions", "preprocessor", "tokenizer", "sampler"],
)
def test_replaced_inputs_are_noticed_and_moved_ones_are_not(change, message, work, run, tmp_path):
    for name in ("images", "vision", "text"):
        shutil.copytree(work / name, tmp_path / name)
    recipe = json.loads((work / "recipe.yaml").read_text())
    moved = {"dataset": "images", "vision_model": "vision", "text_model": "text"}
    save_recipe(tmp_path, **{**recipe, **{name: str(tmp_path / folder) for name, folder in moved.items()}})
    if change is paint_over:
        resume(tmp_path, run, max_steps=5)  # a copy in another place is no other input
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, run, max_steps=6)


def test_a_checkpoint_tells_no_local_paths(run):
    for name in ("config.json", "checkpoint-4/config.json", "checkpoint-4/run.json"):
        assert str(run.parents[1]) not in (run / name).read_text()
    assert not (run / "_run.lock").exists()  # of a run that is done


def saved_by(run, processes, batch_size):
    """Makes the checkpoints those of a run of several processes."""
    for checkpoint in run.glob("checkpoint-*"):
        for rank in range(processes):
            shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
        (checkpoint / "rng_state.pth").unlink()
        settings = json.loads((checkpoint / "run.json").read_text())["settings"]
        settings |= {"num_processes": processes, "per_device_train_batch_size": batch_size}
        settings[ROWS_OF_STEP] = processes * batch_size
        (checkpoint / "run.json").write_text(json.dumps({"settings": settings}))


def test_another_number_of_processes_goes_on_with_as_many_rows_in_a_step(work, run, caplog):
    shutil.rmtree(run / "checkpoint-4")
    saved_by(run, 2, batch_size=2)
    resume(work, run)
    saved = "checkpoint-2 was saved by 2 processes, this run has 1"
    assert f"{saved}. Weights, optimizer and the order of the rows go on. Random states" in caplog.text
    assert_same_weights(work / "run", run)  # nothing is drawn in this run


def test_another_number_of_rows_in_a_step_is_refused(work, run):
    saved_by(run, 2, batch_size=4)
    rows = "num_processes x per_device_train_batch_size x gradient_accumulation_steps"
    with pytest.raises(ValueError, match=f"`num_processes` was 2 and is 1; `{rows}` was 8 and is 4"):
        resume(work, run)
    (run / "checkpoint-4" / "rng_state_1.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: rng_state_1\.pth is missing\.$"):
        resume(work, run, run / "checkpoint-4")


def test_noise_that_a_frozen_language_model_never_gets_is_refused(work, tmp_path):
    with pytest.raises(ValueError, match="`neftune_noise_alpha` needs `--lora text`"):
        pretrain.main(arguments(work, tmp_path / "out", neftune_noise_alpha=5))
    given = {"config": work / "finetune.yaml", "model": work / "run", "max_steps": 1, "logging_steps": 1}
    for name, noise in (("plain", {}), ("noise", {"neftune_noise_alpha": 50})):
        finetune.main(flags(**given, **noise, output_dir=tmp_path / name))
    losses = [logged(tmp_path / name / "checkpoint-1") for name in ("plain", "noise")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("column", "now", "refused"),
    [("video", {"fps": 2.0}, "fps"), ("video", {"num_frames": 8}, "num_frames"), (None, {"fps": 2.0}, None)],
)
def test_other_frames_are_other_settings_where_they_are_read(column, now, refused, tmp_path):
    model, args = tiny_model(), EVLGenTrainingArguments(output_dir=str(tmp_path))
    before, settings = (
        run_settings(args, (DataArguments(video_column=column, **frames),), None, model.config)
        for frames in ({"num_frames": 4}, now)
    )
    (tmp_path / "run.json").write_text(json.dumps({"settings": before}))
    expected = pytest.raises(ValueError, match=f"`{refused}` was .* and is {now.get(refused)}")
    with expected if refused else contextlib.nullcontext():
        check_settings_of_run(tmp_path, settings, model.config)


def test_a_longer_run_and_another_folder_are_no_other_settings(work, run, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    pretrain.main(arguments(work, tmp_path / "whole", max_steps=6, **constant))
    pretrain.main(arguments(work, tmp_path / "first", **constant))
    checkpoint = tmp_path / "first" / "checkpoint-4"
    resume(work, tmp_path / "second", checkpoint, max_steps=6, save_steps=3, logging_steps=1, **constant)
    assert_same_weights(tmp_path / "whole", tmp_path / "second")


def test_the_way_to_train_on_with_other_settings_works(work, run, tmp_path):
    given = {"lora": "none", "model": run / "checkpoint-2", "learning_rate": 1e-3, "output_dir": tmp_path / "other"}
    finetune.main(flags(config=work / "finetune.yaml", **given))
    assert (tmp_path / "other" / "model.safetensors").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("trainer_state.json", empty, r"trainer_state\.json cannot be read"),
        ("model.safetensors", cut, r"model\.safetensors is damaged"),
        ("optimizer.pt", os.remove, r"optimizer\.pt is missing"),
        ("rng_state.pth", empty, r"rng_state\.pth is damaged"),
        ("run.json", cut, r"run\.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(name, damage, message, work, run, caplog):
    damage(run / "checkpoint-4" / name)
    resume(work, run)
    assert re.search(rf"checkpoint-4 is not whole: .*{message}.*An older checkpoint is tried", caplog.text)
    assert_same_weights(work / "run", run)
    damage(run / "checkpoint-2" / name)
    damage(run / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=rf"(?s){message}.*{message}.*To start from the first step, name another"):
        resume(work, run)
    with pytest.raises(ValueError, match=rf"checkpoint-2 is not whole: {message}"):
        resume(work, run, run / "checkpoint-2")


class Code:
    def __reduce__(self):
        return os.mkdir, ("code",)


def change(path, **fields):
    with safe_globals():
        torch.save({**torch.load(path), **fields}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (r"optimizer\.pt or scheduler\.pt", lambda run: change(run / "scheduler.pt", lr_lambdas=3)),
        (r"optimizer\.pt or scheduler\.pt", lambda run: torch.save(torch.zeros(3), run / "optimizer.pt")),
        (r"optimizer\.pt or scheduler\.pt", lambda run: change(run / "optimizer.pt", code=Code())),
        (r"optimizer\.pt or scheduler\.pt", lambda run: change(run / "scheduler.pt", code=Code())),
        (r"rng_state\*\.pth", lambda run: change(run / "rng_state.pth", code=Code())),
        (r"rng_state\*\.pth", lambda run: change(run / "rng_state.pth", python=(1, 2))),
    ],
)
def test_a_file_of_a_checkpoint_that_does_not_fit_is_named(name, damage, work, run, monkeypatch):
    monkeypatch.chdir(run)
    damage(run / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"^{name} in .*checkpoint-2 cannot be used: "):
        resume(work, run, run / "checkpoint-2")
    assert not (run / "code").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_disk_that_fills_up_is_named(name, work, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written to, as on a full disk: "):
        pretrain.main(arguments(work, tmp_path))


def test_a_checkpoint_whose_saving_was_killed_is_passed_over(work, run, caplog):
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    resume(work, run)
    assert_same_weights(work / "run", run)
    assert "is not whole" not in caplog.text


@pytest.mark.parametrize("name", ["checkpoint-6-backup2", "old-checkpoint-6"])
def test_a_copy_of_a_checkpoint_is_not_the_newest_one(name, run):
    shutil.copytree(run / "checkpoint-2", run / name)
    training_args = EVLGenTrainingArguments(output_dir=str(run), resume_from_checkpoint="true")
    assert find_checkpoint(training_args) == str(run / "checkpoint-4")


def test_a_checkpoint_without_settings_is_resumed_with_a_warning(work, run, caplog):
    (run / "checkpoint-4" / "run.json").unlink()
    resume(work, run, max_steps=5)
    assert "has no run.json: it is not known whether its run had the same settings" in caplog.text


def test_two_runs_do_not_share_a_folder(work, tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.LOCK_SECONDS", 0)
    with only_run_in(tmp_path), pytest.raises(ValueError, match=rf"another run writes to .*process {os.getpid()} on"):
        pretrain.main(arguments(work, tmp_path))
    pretrain.main(arguments(work, tmp_path, max_steps=1))


def test_a_model_is_not_trained_or_saved_beside_an_adapter(work, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`output_dir`: .* holds an adapter"):
        pretrain.main(arguments(work, tmp_path))
    with pytest.raises(ValueError, match=r"`save_directory`: .* holds an adapter \(adapter_config\.json\)"):
        tiny_model().save_pretrained(tmp_path)


@pytest.mark.parametrize("folder", ["file/run", "/proc"])  # cannot be made; is there, and nobody can write to it
def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(folder, work, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"`output_dir`: .*{folder} cannot be written to"):
        pretrain.main(arguments(work, tmp_path / folder, vision_model="/nowhere"))


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "answers.json", "old")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "answers.json") as partial_path:
        partial_path.write_text("half of the new")
        raise OSError("No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_whole(tmp_path / "answers.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]
