"""Images of every source and mode are read as upright RGB; what cannot be read is named."""

import asyncio
import base64
import contextlib
import io
import os
import time
from http.server import BaseHTTPRequestHandler

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import CLIPImageProcessor

from processing_evlgen import EVLGenProcessor
from processing_evlgen import images as image_files
from processing_evlgen.images import load_rgb_image

from .helpers import noise_images, serving, tiny_tokenizer
from .test_processing import make_processor


def encode(image, file_format):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return {"bytes": buffer.getvalue(), "path": "x"}


def test_images_of_every_mode_become_rgb():
    red = Image.new("RGB", (4, 2), (200, 30, 30))
    assert np.allclose(load_rgb_image(red.convert("CMYK")), red, atol=3)
    assert np.allclose(load_rgb_image(red.quantize()), red, atol=3)
    grey = Image.new("L", (4, 2), 77)
    assert np.array(load_rgb_image(grey)).tolist() == [[[77, 77, 77]] * 4] * 2
    deep = Image.fromarray(np.full((2, 4), 77 * 256, dtype=np.uint16))
    assert np.array(load_rgb_image(encode(deep, "PNG"))).tolist() == [[[77, 77, 77]] * 4] * 2
    clear = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    assert np.array(load_rgb_image(clear)).tolist() == [[[255, 255, 255]] * 4] * 2  # as on paper
    assert load_rgb_image(Image.new("1", (4, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def encode_tiff(values):
    return encode(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0, 77 / 255, 1]]), [0, 77, 255]),
        (np.float32([[0, 77, 255]]), [0, 77, 255]),
        (np.int32([[0, 77, 255]]), [0, 77, 255]),
        (np.int32([[0, 77 * 256, 65_535]]), [0, 77, 255]),
    ],
)
def test_grey_of_32_bits_has_the_smallest_range_that_holds_its_values(values, expected):
    for image in (encode_tiff(values), Image.fromarray(values)):
        assert np.array(load_rgb_image(image))[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("values", [[[-1, 2]], [[0, 300.5]], [[0, np.nan]]])
def test_grey_of_an_unknown_range_is_refused(values):
    with pytest.raises(ValueError, match="its values must be 0 to 1 or 0 to 255, but are"):
        load_rgb_image(encode_tiff(np.float32(values)))
    with pytest.raises(ValueError, match="its values must be 0 to 255 or 0 to 65535, but are -1 to 2"):
        load_rgb_image(encode_tiff(np.int32([[-1, 2]])))


def test_an_image_that_the_camera_rotated_stands_upright():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90° clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    upright = load_rgb_image({"bytes": buffer.getvalue(), "path": None})
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (0, 0, 0)


def test_paths_base64_rows_and_arrays_are_read(tmp_path):
    image = noise_images(1)[0]
    path = tmp_path / "image.png"
    image.save(path)
    text = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    row = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image(decode=False))[0]
    processor = make_processor()
    expected = processor(images=image)["pixel_values"]
    for source in (path, str(path), text, row["image"], np.array(image)):
        torch.testing.assert_close(processor(images=source)["pixel_values"], expected)


@pytest.mark.parametrize(
    ("media", "error", "message"),
    [
        ({"images": [7]}, TypeError, "`images` must .* holds a int"),
        ({"images": np.zeros((8, 8))}, ValueError, r"`images`: .* has the shape \(8, 8\)"),
        ({"images": np.full((8, 8, 3), None)}, TypeError, "`images`: .* has the dtype object"),
        ({"images": torch.zeros(5, 8, 8), "max_tiles": 4}, ValueError, r"`images`: .* channels.* \(5, 8, 8\)"),
        ({"videos": np.zeros((3, 8, 8, 2))}, ValueError, r"`videos`: .* 1, 3 or 4 channels.* \(8, 8, 2\)"),
        ({"videos": 7}, TypeError, "`videos` must .* holds int"),
        ({"videos": noise_images(4), "num_frames": 2.5}, ValueError, r"`num_frames` must .* is 2\.5"),
    ],
)
def test_images_and_videos_of_another_type_or_shape_are_refused(media, error, message):
    with pytest.raises(error, match=message):
        make_processor()(**media)


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 10)), np.zeros((0, 10, 3), np.uint8), torch.zeros(3, 4, 0)])
def test_images_without_pixels_are_refused(image):
    with pytest.raises(ValueError, match=r"`images`: .*(has 0 x 10 pixels|has no pixels)"):
        make_processor()(images=image, max_tiles=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_arrays_with_nan_or_infinite_values_are_refused(bad):
    array = np.zeros((8, 8, 3), dtype=np.float32)
    array[3, 4, 1] = bad
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for name, media in (("images", array), ("images", tensor), ("videos", np.stack([array, array]))):
        with pytest.raises(ValueError, match=f"`{name}`: .* NaN or infinite"):
            make_processor()(**{name: media})


def test_an_image_with_too_many_pixels_is_refused_undecoded(tmp_path, monkeypatch):
    """A small file can hold more pixels than memory does. A call may allow more or less."""
    path = str(tmp_path / "large.png")
    Image.new("1", (12_000, 12_000)).save(path)
    noise_images(1, size=40)[0].save(tmp_path / "image.png")
    assert make_processor()(images=str(tmp_path / "image.png"), max_pixels=1600)["pixel_values"].shape[0] == 1
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for source in (path, {"bytes": (tmp_path / "large.png").read_bytes(), "path": "large.png"}, Image.open(path)):
        with pytest.raises(ValueError, match="12000 x 12000 pixels, more than `max_pixels`=64000000"):
            make_processor()(images=source)
    with pytest.raises(ValueError, match=r"image\.png.* 40 x 40 pixels, more than `max_pixels`=1599"):
        make_processor()(images=str(tmp_path / "image.png"), max_pixels=1599)


def test_an_image_that_is_thinner_than_any_picture_is_refused_undecoded(tmp_path, monkeypatch):
    """Where the shortest edge becomes 224 pixels, a line of 1 x 60,000 takes 9 GB. The Bayeux Tapestry is read."""
    shortest = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = EVLGenProcessor(shortest, tiny_tokenizer(), num_image_tokens=3)
    assert processor(images=Image.new("RGB", (1400, 10)))["pixel_values"].shape == (1, 3, 8, 8)
    Image.new("1", (1, 60_000)).save(tmp_path / "line.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    video = [Image.new("RGB", (201, 1))]
    lines = tmp_path / "line.png", Image.new("RGB", (60_000, 1)), np.zeros((1, 60_000, 3), np.uint8)
    for media in (*({"images": line} for line in lines), {"videos": [video]}):
        with pytest.raises(ValueError, match=r"a side over 200 times the other"):
            processor(**media)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"`images`: .*pipe.png' cannot be read: it is no regular file"):
        make_processor()(images=str(tmp_path / "pipe.png"))
    for name in ("pipe.png", "pipe.mp4"):
        with pytest.raises(ValueError, match=f"`videos`: .*{name}' cannot be read: it is no regular file"):
            make_processor()(videos=str(tmp_path / name))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    buffer = io.BytesIO()
    noise_images(1)[0].save(buffer, format="PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for name in ("broken.png", "cut.png", "missing.png", "bomb.png"):
        with pytest.raises(ValueError, match=f"`images`: .*{name}.* cannot be read"):
            make_processor()(images=str(tmp_path / name))


class Drip(BaseHTTPRequestHandler):
    """Sends a byte every 0.1 seconds for ever, or as many as it can; of the content or of the headers."""

    def do_GET(self):
        if self.path.startswith("/redirects"):
            time.sleep(0.1)
            self.send_response(302)
            self.send_header("Location", f"{self.path}x")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path == "/headers.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        else:
            self.send_response(200)
            self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            while True:
                self.wfile.write(b"x" * 2**16 if self.path == "/large.png" else b"x")
                time.sleep(0 if self.path == "/large.png" else 0.1)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("slow.png", "has not sent the whole file in 0.5 seconds"),
        ("headers.png", "has not sent the whole file in 0.5 seconds"),
        ("redirects.png", "has not sent the whole file in 0.5 seconds"),
        ("large.png", "sends more than 1 MB"),
    ],
)
def test_a_server_that_never_ends_is_left(path, message, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 10**6)
    with serving(Drip) as url:
        start = time.monotonic()
        with pytest.raises(ValueError, match=message):
            load_rgb_image(f"{url}/{path}", timeout=0.5)
        assert time.monotonic() - start < 1.5


def test_urls_are_read_where_an_event_loop_runs(tmp_path):
    """As in a notebook or a server."""
    noise_images(1)[0].save(tmp_path / "image.png")

    async def read(url):
        return load_rgb_image(f"{url}/image.png")

    with serving(tmp_path) as url:
        assert np.array_equal(asyncio.run(read(url)), noise_images(1)[0])
