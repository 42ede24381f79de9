"""examples/caption_with_ray.py: two local workers give the captions of one process, and a run goes on by its files."""

import os
import subprocess
import sys

import caption_folder
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from .helpers import ROOT, noise_images, tiny_model
from .training import flags, png, read_lines, save_captioner

pytest.importorskip("ray", reason="needs the ray extra")


def caption(*arguments):
    """Runs the script in a process of its own, so that its cluster ends with it."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/caption_with_ray.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Three files of captions by two workers, and the captions of one process."""
    folder = tmp_path_factory.mktemp("ray")
    model = save_captioner(folder / "model", tiny_model())
    data = [png(image) for image in noise_images(10)]
    data[7] = b"no image"
    (folder / "shards").mkdir()
    for number, rows in enumerate((range(0, 5), range(5, 9), range(9, 10))):
        images = [{"bytes": data[row], "path": None} for row in rows]
        pq.write_table(pa.table({"id": list(rows), "image": images}), folder / "shards" / f"{number}.parquet")
    shared = {"model": model, "batch_size": 2, "max_new_tokens": 6}
    given = flags(**shared, input_dir=folder / "shards", output_dir=folder / "captions", num_workers=2)
    first = caption(*given)
    caption_folder.main(flags(**shared, inputs=[folder / "shards"], output_dir=folder / "one"))
    return folder, given, first


def test_two_workers_write_the_captions_of_one_process(captioned):
    folder, _, run = captioned
    assert run.returncode == 0, run.stderr
    tables = [pq.read_table(folder / "captions" / f"{number}.parquet") for number in range(3)]
    rows = pa.concat_tables(tables).to_pylist()
    expected = read_lines(folder / "one" / "captions.jsonl")
    assert [row["id"] for row in rows] == list(range(10)) and rows[0].keys() == {"id", "caption", "error"}
    for row, single in zip(rows, expected, strict=True):
        if row["id"] == 7:
            assert row["caption"] is None and "cannot be read" in row["error"] and "error" in single
        else:
            assert row["caption"] == single["caption"] != "" and row["error"] is None
    assert "3 of 3 files are to be captioned" in run.stdout and "2.parquet: 1 captions" in run.stdout


def test_a_run_goes_on_with_the_files_that_are_missing(captioned):
    folder, given, _ = captioned
    kept, lost = (folder / "captions" / f"{number}.parquet" for number in (0, 1))
    before, text = kept.stat().st_mtime_ns, pq.read_table(lost)
    lost.rename(folder / "captions" / "1.parquet.tmp")  # as a kill leaves it
    again = caption(*given)
    assert "1 of 3 files are to be captioned" in again.stdout, again.stderr
    assert pq.read_table(lost).equals(text) and kept.stat().st_mtime_ns == before
    assert sorted(path.name for path in (folder / "captions").iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


@pytest.mark.attack
def test_a_folder_without_files_and_bad_numbers_are_named(tmp_path):
    import caption_with_ray

    with pytest.raises(ValueError, match=r"`input_dir`: there is no Parquet file in '.*nowhere'"):
        caption_with_ray.main(flags(input_dir=tmp_path / "nowhere", output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`num_workers` must be an integer of 1 or more"):
        caption_with_ray.RayArguments(num_workers=0)


def test_a_file_without_rows_gets_one_without_captions(tmp_path):
    from caption_with_ray import Captioner

    model = save_captioner(tmp_path / "model", tiny_model())
    source, target = (str(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "image": pa.array([], pa.binary())}), source)
    part = Captioner("image", 2, model)({"source": source, "target": target})
    assert part["captioned"] == 0 and pq.read_table(target).column_names == ["id", "caption", "error"]
