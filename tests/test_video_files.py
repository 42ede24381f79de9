"""Video files as cameras, editors and broken connections leave them."""

import importlib
import struct

import numpy as np
import pytest

from processing_evlgen.videos import load_rgb_frames

from .test_video import write_video

av = pytest.importorskip("av", reason="needs the video extra")


def read_in_app(path, *args, **kwargs):
    """The frames that the page of app.py takes of an uploaded file."""
    return importlib.import_module("app_uploads").read_file(path, *args, max_mb=1, **kwargs)[1]


def test_a_video_of_a_phone_is_upright(tmp_path):
    """A phone that is held upright stores frames that lie on their side, and a matrix in the head of the track."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stored = np.zeros((32, 64, 3), np.uint8)
        stored[:, :32, 0] = stored[:, 32:, 2] = 255  # red on the left, blue on the right
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    quarter_turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    start = content.find(b"tkhd") + 4 + 40
    content[start : start + 36] = quarter_turn
    path.write_bytes(content)
    for frames in (load_rgb_frames(path, 2), read_in_app(path, 2)):
        assert frames[1].size == (32, 64)
        (red, _, _), (_, _, blue) = frames[1].getpixel((16, 5)), frames[1].getpixel((16, 60))
        assert red > 200 and blue > 200
