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


def test_two_workers_write_the_captions_of_one_process_into_the_files_that_are_missing(tmp_path):
    model = save_captioner(tmp_path / "model", tiny_model())
    data = [png(image) for image in noise_images(10)]
    data[7] = b"no image"
    (tmp_path / "shards").mkdir()
    for number, rows in enumerate((range(0, 5), range(5, 9), range(9, 10))):
        images = [{"bytes": data[row], "path": None} for row in rows]
        pq.write_table(pa.table({"id": list(rows), "image": images}), tmp_path / "shards" / f"{number}.parquet")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "0.parquet").write_text("of an earlier run")
    (tmp_path / "captions" / "1.parquet.tmp").write_text("as a kill leaves it")
    shared = {"model": model, "batch_size": 2, "max_new_tokens": 6}
    given = flags(**shared, input_dir=tmp_path / "shards", output_dir=tmp_path / "captions", num_workers=2)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/caption_with_ray.py", *given]  # the cluster ends with its process
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "2 of 3 files are to be captioned" in run.stdout and "2.parquet: 1 captions" in run.stdout
    assert sorted(path.name for path in (tmp_path / "captions").iterdir()) == [
        f"{number}.parquet" for number in range(3)
    ]
    assert (tmp_path / "captions" / "0.parquet").read_text() == "of an earlier run"

    caption_folder.main(flags(**shared, inputs=[tmp_path / "shards"], output_dir=tmp_path / "one"))
    expected = read_lines(tmp_path / "one" / "captions.jsonl")[5:]
    tables = [pq.read_table(tmp_path / "captions" / f"{number}.parquet") for number in (1, 2)]
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["id"] for row in rows] == list(range(5, 10)) and rows[0].keys() == {"id", "caption", "error"}
    for row, single in zip(rows, expected, strict=True):
        if row["id"] == 7:
            assert row["caption"] is None and "cannot be read" in row["error"] and "error" in single
        else:
            assert row["caption"] == single["caption"] != "" and row["error"] is None


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
