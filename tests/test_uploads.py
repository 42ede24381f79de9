"""examples/app_uploads.py: what visitors of the page send is read, or refused with a message for them."""

import importlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from .helpers import noise_images

av = pytest.importorskip("av", reason="needs the app extra")
uploads = importlib.import_module("app_uploads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that a visitor may send."""
    folder = tmp_path_factory.mktemp("files")
    first, *rest = noise_images(6)
    first.save(folder / "image.PNG")
    first.save(folder / "video.webp", save_all=True, append_images=rest, lossless=True)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_text("no image")
    (folder / "broken.mp4").write_text("no video")
    return folder


def test_reads_images_and_videos(files):
    kind, frames = uploads.read_file(files / "image.PNG", 4, 1)
    assert kind == "images" and np.array_equal(frames[0], noise_images(1)[0])
    kind, frames = uploads.read_file(files / "video.webp", 3, 1)
    assert kind == "videos" and len(frames) == 3
    assert all(np.array_equal(frame, noise_images(6)[2 * index]) for index, frame in enumerate(frames))


def test_the_pages_of_a_file_are_no_video(tmp_path):
    first, *rest = noise_images(3)
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=rest)
    kind, frames = uploads.read_file(tmp_path / "pages.tiff", 4, 1)
    assert kind == "images" and np.array_equal(frames[0], first)


@pytest.mark.parametrize(
    ("name", "max_mb", "message"),
    [
        ("notes.txt", 1, r"^The file 'notes.txt' is neither an image \(\.png, .*\) nor a video \(\.mp4, .*\)\.$"),
        ("image.PNG", 0.001, r"^The file 'image.PNG' has 0.0 MB, but at most 0.001 MB are read\.$"),
        ("broken.png", 1, r"^The file 'broken.png' cannot be read; it is damaged, or not what its name says\.$"),
        ("broken.mp4", 1, r"^The file 'broken.mp4' cannot be read; it is damaged, or not what its name says\.$"),
    ],
)
def test_other_files_are_refused_by_their_name(files, name, max_mb, message):
    """By the name that the visitor knows, not by the server's path."""
    with pytest.raises(ValueError, match=message):
        uploads.read_file(files / name, 4, max_mb)


def test_images_of_another_format_than_their_names_are_read(tmp_path):
    """As browsers save them; but none that PIL hands on to a program, and nothing that names other files."""
    noise_images(1)[0].save(tmp_path / "photo.jpg", format="PNG")
    assert np.array_equal(uploads.read_file(tmp_path / "photo.jpg", 4, 1)[1][0], noise_images(1)[0])
    noise_images(1)[0].save(tmp_path / "script.png", format="EPS")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile photo.jpg\n")
    for name in ("script.png", "list.mp4"):
        with pytest.raises(ValueError, match=f"^The file '{name}' cannot be read"):
            uploads.read_file(tmp_path / name, 4, 1)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [9000, 60_000])
def test_a_small_file_with_a_huge_image_is_refused_before_it_is_decoded(tmp_path, side):
    """Over our limit and, the second, over PIL's; both files have a head and nothing behind it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match=r"^The file 'bomb\.png' has over 64 million pixels, more than are read"):
        uploads.read_file(tmp_path / "bomb.png", 4, 1)


def save_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(noise_images(1)[0])))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv", "video.avi", "video.webp", "video.gif"])
def test_a_video_that_is_too_long_is_refused_before_it_is_decoded(tmp_path, name, monkeypatch):
    if name.endswith(("webp", "gif")):
        first, *rest = (Image.new("L", (32, 32), 9 * index) for index in range(12))
        first.save(tmp_path / name, save_all=True, append_images=rest)
    else:
        save_video(tmp_path / name, 12)
    monkeypatch.setattr(uploads, "VIDEO_MEGAPIXELS", 12 * 32 * 32 / 1e6)
    assert len(uploads.read_file(tmp_path / name, 4, 1)[1]) == 4
    monkeypatch.setattr(uploads, "VIDEO_MEGAPIXELS", 11 * 32 * 32 / 1e6)
    monkeypatch.setattr(uploads, "load_rgb_frames", None)
    message = f"^The video '{name}' is too long: at most 11 frames of this size are read"
    with pytest.raises(ValueError, match=message):
        uploads.read_file(tmp_path / name, 4, 1)
