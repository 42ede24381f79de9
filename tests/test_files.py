"""examples/common/files.py: a file is replaced as a whole or not at all."""

import pytest

from common.files import replacing, write_whole


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "answers.json", "old")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "answers.json") as partial_path:
        partial_path.write_text("half of the new")
        raise OSError("No space left on device")
    assert (tmp_path / "answers.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.json"]
    write_whole(tmp_path / "answers.json", "new")
    assert (tmp_path / "answers.json").read_text() == "new"
