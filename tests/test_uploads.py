"""examples/app_uploads.py: uploaded images and videos are read, or refused with a message for the visitor."""

import importlib
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from .helpers import encode_video, noise_images, save_animation, save_sound

pytest.importorskip("av", reason="needs the app extra")
uploads = importlib.import_module("app_uploads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files that a visitor may upload."""
    folder = tmp_path_factory.mktemp("files")
    frames = noise_images(6)
    frames[0].save(folder / "image.PNG")
    save_animation(folder / "video.webp", frames)
    save_animation(folder / "pages.tiff", frames)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.png").write_text("no image")
    (folder / "broken.mp4").write_text("no video")
    save_sound(folder / "sound.mp4")
    return folder


def test_reads_images_and_videos(files):
    kind, frames = uploads.read_file(files / "image.PNG", 4)
    assert kind == "images" and np.array_equal(frames[0], noise_images(1)[0])
    kind, frames = uploads.read_file(files / "video.webp", 3)
    assert kind == "videos" and len(frames) == 3
    assert all(np.array_equal(frame, noise_images(6)[2 * index]) for index, frame in enumerate(frames))
    frames = uploads.read_file(files / "video.webp", 3, fps=5)[1]
    assert frames.times == pytest.approx([0, 0.2, 0.4])  # a frame has 100 ms
    assert uploads.read_file(files / "pages.tiff", 4)[0] == "images"  # pages of a file are no video


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", r"is neither an image \(\.png, .*\) nor a video"),
        ("broken.png", "cannot be read; it is damaged"),
        ("broken.mp4", "cannot be read; it is damaged"),
        ("sound.mp4", "has no pictures, but sound or other data"),
        ("gone.png", "is no longer on the server"),
    ],
)
def test_other_files_are_refused_by_their_name(files, name, message):
    """The message has the name that the visitor knows, not the server's path."""
    with pytest.raises(ValueError, match=f"^The file '{name}' {message}"):
        uploads.read_file(files / name, 4)


def test_images_of_another_format_than_their_names_are_read(tmp_path):
    """Browsers save such images. Formats that PIL hands to a program and playlists of other files are refused."""
    noise_images(1)[0].save(tmp_path / "photo.jpg", format="PNG")
    assert np.array_equal(uploads.read_file(tmp_path / "photo.jpg", 4)[1][0], noise_images(1)[0])
    noise_images(1)[0].save(tmp_path / "script.png", format="EPS")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile photo.jpg\n")
    for name in ("script.png", "list.mp4"):
        with pytest.raises(ValueError, match=f"^The file '{name}' cannot be read"):
            uploads.read_file(tmp_path / name, 4)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [9000, 60_000])
def test_a_small_file_with_a_huge_image_is_refused_before_it_is_decoded(tmp_path, side):
    """The first is over our limit, the second over PIL's. Both files have a head and no data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match=r"^The file 'bomb\.png' has over 64 million pixels, more than are read"):
        uploads.read_file(tmp_path / "bomb.png", 4)


@pytest.mark.parametrize("size", [(1, 2_000_000), (20_100, 100)])
def test_an_image_that_is_thinner_than_any_picture_is_refused(tmp_path, size, monkeypatch):
    """To shrink a line of 60 million pixels took half a minute, and all other visitors waited."""
    Image.new("1", size).save(tmp_path / "line.png")
    Image.new("1", (20_000, 100)).save(tmp_path / "scroll.png")
    assert uploads.read_file(tmp_path / "scroll.png", 4)[0] == "images"
    monkeypatch.setattr(uploads, "load_rgb_image", None)
    with pytest.raises(
        ValueError, match=rf"^The file 'line\.png' is too thin: {size[0]} x {size[1]} pixels, a side over 200"
    ):
        uploads.read_file(tmp_path / "line.png", 4)


def save_video(path, count, codec="mpeg4", size=32, moving=False):
    encode_video(path, noise_images(count, size) if moving else count * noise_images(1, size), codec, rate=25)


@pytest.mark.parametrize("name", ["video.mp4", "video.avi", "video.webp"])
def test_a_video_that_is_too_long_is_refused_before_it_is_decoded(tmp_path, name, monkeypatch):
    animated = name.endswith(("webp", "gif"))
    if animated:
        save_animation(tmp_path / name, [Image.new("L", (32, 32), 9 * index) for index in range(12)], lossless=False)
    else:
        save_video(tmp_path / name, 12)
    limit = "ANIMATION_MEGAPIXELS" if animated else "VIDEO_MEGAPIXELS"
    monkeypatch.setattr(uploads, limit, 12 * 32 * 32 / 1e6)
    assert len(uploads.read_file(tmp_path / name, 4)[1]) == 4
    monkeypatch.setattr(uploads, limit, 11 * 32 * 32 / 1e6)
    monkeypatch.setattr(uploads, "_choose_frames", None)
    with pytest.raises(ValueError, match=f"^The file '{name}' is too long: at most 11 frames"):
        uploads.read_file(tmp_path / name, 4)


def gif(width, height, frames, extension=b""):
    """A GIF of which each frame has one pixel, in 22 bytes, whatever the size of the canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    frame = b"\x21\xf9\x04\x00\x05\x00\x00\x00\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + extension + frame * frames + b";"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gif(8000, 8000, 300), "has over 16 million pixels in a frame, more than are read"),  # 90 s and 2 GB
        (gif(1, 1, 200_000), "is too long: at most 20000 frames of this size are read"),  # 10 s
        (gif(1, 1, 2, b"!\xfe" + 2_000_000 * b"\x01A" + b"\x00"), "takes too long to read"),  # 4 minutes
    ],
)
def test_an_animation_that_would_keep_the_server_busy_is_refused_soon(tmp_path, content, message, monkeypatch):
    monkeypatch.setattr(uploads, "IMAGE_SECONDS", 1.0)
    (tmp_path / "bomb.gif").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^The file 'bomb\.gif' {message}\.$"):
        uploads.read_file(tmp_path / "bomb.gif", 4)
    assert time.monotonic() - start < 5


def test_a_still_image_that_would_keep_the_server_busy_is_refused_soon(tmp_path, monkeypatch):
    """PIL goes from chunk to chunk in Python, so that millions of empty ones take it a minute."""
    monkeypatch.setattr(uploads, "IMAGE_SECONDS", 0.5)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b"")
    for kind in (b"zzZz", b"IDAT"):
        (tmp_path / "slow.png").write_bytes(head + 500_000 * chunk(kind, b"") + pixel)
        with pytest.raises(ValueError, match=r"^The file 'slow\.png' takes too long to read"):
            uploads.read_file(tmp_path / "slow.png", 4)


SMALL = 32 * 32 / 1e6


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("FRAME_MEGAPIXELS", 2 * SMALL, "cannot be read"),  # FFmpeg's own limit, set to this one
        ("VIDEO_MEGAPIXELS", 30 * SMALL, "has over .* million pixels in all frames"),
        ("VIDEO_SECONDS", -1, "takes too long to read"),
    ],
)
def test_limits_hold_for_frames_that_the_head_does_not_announce(tmp_path, limit, value, message, monkeypatch):
    """An MPEG stream may change its size: the first 12 frames have 32 x 32 pixels, the others have 64 x 64."""
    for name, size in (("small.mpg", 32), ("large.mpg", 64)):
        save_video(tmp_path / name, 12, "mpeg1video", size)
    joined = tmp_path / "joined.mpg"
    joined.write_bytes((tmp_path / "small.mpg").read_bytes() + (tmp_path / "large.mpg").read_bytes())
    assert {frame.size for frame in uploads.read_file(joined, 24)[1]} == {(32, 32), (64, 64)}
    monkeypatch.setattr(uploads, limit, value)
    with pytest.raises(ValueError, match=f"^The file 'joined.mpg' {message}"):
        uploads.read_file(joined, 24)


def test_large_frames_are_shrunk_and_images_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "KEPT_MEGAPIXELS", 30 * 30 / 1e6)
    save_video(tmp_path / "video.mp4", 4, size=64)
    noise_images(1)[0].save(tmp_path / "image.png")  # 40 x 40
    save_animation(tmp_path / "video.webp", noise_images(2))
    sizes = [uploads.read_file(tmp_path / name, 4)[1][0].size for name in ("video.mp4", "video.webp", "image.png")]
    assert sizes == [(22, 22), (20, 20), (40, 40)]
