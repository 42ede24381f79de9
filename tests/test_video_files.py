"""Video files as cameras, editors and broken connections leave them."""

import importlib
import struct

import numpy as np
import pytest
from PIL import Image

from processing_evlgen.videos import FrameChoice, load_rgb_frames

from .helpers import encode_video, save_animation
from .test_video import indices, shades, write_video

av = pytest.importorskip("av", reason="needs the video extra")


def read_in_app(path, *args, **kwargs):
    """The frames that the page of app.py takes of an uploaded file."""
    return importlib.import_module("app_uploads").read_file(path, *args, **kwargs)[1]


@pytest.mark.parametrize(
    ("matrix", "red"),
    [
        ((0, 1, -1, 0), "top right"),  # a quarter turn
        ((-1, 0, 0, -1), "bottom right"),  # a half turn
        ((-1, 0, 0, 1), "top right"),  # mirrors
    ],
)
def test_a_video_of_a_phone_is_upright(matrix, red, tmp_path):
    """A phone that is held upright stores frames that lie on their side, and a matrix in the head of the track."""
    path = tmp_path / "video.mp4"
    stored = Image.new("RGB", (64, 32))
    stored.paste("red", (0, 0, 32, 16))  # in the top left quarter
    encode_video(path, [stored] * 4)
    content = bytearray(path.read_bytes())
    a, b, c, d = (number << 16 for number in matrix)
    stated = struct.pack(">9i", a, b, 0, c, d, 0, 32 << 16, 0, 1 << 30)
    start = content.find(b"tkhd") + 4 + 40
    content[start : start + 36] = stated
    path.write_bytes(content)
    for frames in (load_rgb_frames(path, 2), read_in_app(path, 2)):
        width, height = frames[1].size
        assert (width, height) == ((32, 64) if matrix[0] == 0 else (64, 32))
        corners = {
            f"{row} {column}": frames[1].getpixel((x * width // 4, y * height // 4))[0] > 128
            for row, y in (("top", 1), ("bottom", 3))
            for column, x in (("left", 1), ("right", 3))
        }
        assert [corner for corner, is_red in corners.items() if is_red] == [red]


def write_noise(path, codec="mpeg4", count=40, pts=None):
    """Noise takes as many bytes in each frame. The head of an MP4 comes first, so that it survives a cut."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32, 48, 3), dtype=np.uint8)) for _ in range(count)]
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    encode_video(path, images, codec, pts=pts, options=options)


def hide_start(source, target, start):
    """Hides the frames before `start` by an edit list, as editors do that do not encode a video again."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        from_stream = old.streams.video[0]
        to_stream = new.add_stream_from_template(from_stream)
        offset = int(start / 10 / from_stream.time_base)
        for packet in old.demux(from_stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, to_stream
                new.mux(packet)


def test_empty_and_hidden_packets_are_no_frames(tmp_path):
    """The head of these files states more frames than are shown: 39 instead of 20, and 40 instead of 10."""
    write_video(tmp_path / "paused.avi", 20, "mpeg4", pts=range(0, 40, 2))
    write_video(tmp_path / "whole.mp4", 24)
    hide_start(tmp_path / "whole.mp4", tmp_path / "trimmed.mp4", 14)
    for name, expected in (("paused.avi", [0, 5, 10, 15]), ("trimmed.mp4", [14, 16, 19, 21])):
        assert indices(load_rgb_frames(tmp_path / name, 4)) == expected
        assert indices(read_in_app(tmp_path / name, 4)) == expected
        assert len(load_rgb_frames(tmp_path / name, 40)) == len(load_rgb_frames(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mp4", "mpeg4"), ("v.avi", "mpeg4"), ("v.mkv", "mpeg4"), ("v.webm", "libvpx")]
)
def test_a_file_that_ends_early_is_refused_however_frames_are_chosen(name, codec, tmp_path):
    path = tmp_path / name
    write_noise(path, codec)
    choices = ({"num_frames": 4}, {"num_frames": 40}, {"fps": 5}, {})
    assert [len(load_rgb_frames(path, **choice)) for choice in choices] == [4, 40, 20, 40]
    assert len(read_in_app(path, 4)) == 4
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for choice in choices:
        with pytest.raises(ValueError, match=rf"'.*{name}' .* ends after [012]\.\d of its [24]\.\d seconds"):
            load_rgb_frames(path, **choice)
    with pytest.raises(ValueError, match=f"The file '{name}' cannot be read; it is damaged"):
        read_in_app(path, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile secret.mp4\n"),
    ],
)
def test_a_playlist_does_not_read_other_files(name, text, tmp_path, monkeypatch):
    write_video(tmp_path / "secret.mp4", 4)
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)  # where names in the bytes of a row start
    for source in (tmp_path / name, {"bytes": text.encode(), "path": name}):
        for choice in ({"num_frames": 2}, {"fps": 1}):
            with pytest.raises(
                ValueError, match=f"'.*{name}' cannot be read: it is no video, or of none of the kinds"
            ):
                load_rgb_frames(source, **choice)


class Pipe:
    """A file that can only be written to, one part after the other."""

    def __init__(self):
        self.parts = []

    def write(self, part):
        self.parts.append(bytes(part))
        return len(part)


def test_an_avi_that_was_written_to_a_pipe_is_whole(tmp_path):
    """Its head has a placeholder for the number of frames."""
    pipe = Pipe()
    encode_video(pipe, shades(6), "mpeg4", format="avi")
    (tmp_path / "v.avi").write_bytes(b"".join(pipe.parts))
    with av.open(str(tmp_path / "v.avi")) as container:
        assert container.streams.video[0].frames >= 2**30
    for choice in ({"num_frames": 4}, {}):
        assert len(load_rgb_frames(tmp_path / "v.avi", **choice)) == choice.get("num_frames", 6)
    assert len(read_in_app(tmp_path / "v.avi", 4)) == 4


def test_a_video_may_stand_still_at_its_end(tmp_path):
    for name in ("v.mp4", "v.mkv"):
        write_noise(tmp_path / name, count=6, pts=[0, 1, 2, 3, 4, 90])
        assert load_rgb_frames(tmp_path / name).times[-1] == pytest.approx(9)
        assert len(read_in_app(tmp_path / name, 4)) == 4


@pytest.mark.parametrize("name", ["v.mp4", "v.webm"])
def test_the_last_frame_may_stand_still(name, tmp_path):
    """The head states its duration, but the decoder does not."""
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        packets = []
        for image in shades(6):
            packets += stream.encode(av.VideoFrame.from_image(image))
        packets += stream.encode(None)
        packets[-1].duration = round(5 / packets[-1].time_base)
        container.mux(packets)
    choices = ({"num_frames": 4}, {"num_frames": 6}, {}, {"fps": 10})
    assert [len(load_rgb_frames(tmp_path / name, **choice)) for choice in choices] == [4, 6, 6, 6]
    assert len(read_in_app(tmp_path / name, 4)) == 4


@pytest.mark.parametrize("name", ["video.webp", "video.gif"])
def test_a_rate_takes_the_frames_that_stand_for_seconds(name, tmp_path):
    save_animation(tmp_path / name, shades(6), duration=[100, 1900, 20, 980, 20, 2000])
    frames = load_rgb_frames(tmp_path / name, fps=1)
    assert indices(frames) == [0, 1, 2, 4, 5] and frames.times == pytest.approx([0, 0.1, 2, 3, 3.02])
    assert indices(load_rgb_frames(tmp_path / name, fps=0.25)) == [0, 5]


@pytest.mark.parametrize("rate", [24, 30, 60])
@pytest.mark.parametrize("digits", [3, 6])
def test_a_rate_that_divides_that_of_the_video_takes_frames_at_equal_distances(rate, digits):
    """Whether a container states milliseconds, as MKV and WebM do, or microseconds."""
    frames = [(index, round(index / rate, digits), 0.0) for index in range(3 * rate)]
    for step in (1, 2, 4, 5, 7):
        chosen = [frame for frame, _ in FrameChoice(fps=rate / step).select(frames, None)]
        assert chosen == list(range(0, 3 * rate, step))


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_animated_images_need_neither_a_suffix_nor_pyav(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("processing_evlgen.videos.is_av_available", lambda: False)
    save_animation(tmp_path / "video", shades(3), format=kind, duration=1000)
    content = (tmp_path / "video").read_bytes()
    for video in (tmp_path / "video", {"bytes": content}, {"bytes": content, "path": "video"}):
        assert load_rgb_frames(video).times == [0, 1, 2]
    (tmp_path / "video.mp4").write_bytes(b"no video")
    with pytest.raises(ImportError, match="Reading videos needs PyAV"):
        load_rgb_frames(tmp_path / "video.mp4")


@pytest.mark.parametrize("row", [{}, {"bytes": None}, {"bytes": None, "path": None}])
def test_a_row_without_a_video_is_named(row):
    with pytest.raises(ValueError, match="`videos`: None is no video"):
        load_rgb_frames(row)
