"""Stamps of Tux Paint, a paint program for children: named drawings and photos.

On Debian `apt install tuxpaint-stamps-default` installs them. Their licence is GPL-2, so they are not in this
repository.

The stamp NAME.png lies in a folder of its category. The first line of NAME.txt describes it in English, "A frog.", and
NAME.dat lists options. Source: "Stamps" in docs/en/EXTENDING.txt of Tux Paint.
"""

from functools import cache
from pathlib import Path

from PIL import Image

from common.demo.captioned_images import with_article

# Ends of nouns whose plural is not formed by rule. Questions need the plural.
IRREGULAR = ("man", "mouse", "louse", "goose", "tooth", "foot", "deer", "sheep", "fish", "shrimp", "f", "ife", "ato")


@cache
def load_stamps(folder: Path, count: int, min_size: int) -> dict[str, Image.Image]:
    """Loads stamps by name, as RGBA images that are cropped to their visible part.

    A stamp can be used if all of this is true:

    - Its description is an article and one word. The word is its name, and has a regular plural.
    - It can be mirrored, and its colours are its own: its options are neither "nomirror" nor "colorable".
    - It is a PNG file with transparency. The longer side of its visible part has at least `min_size` pixels.

    The first by path is used for each name. The chosen stamps are evenly spaced in the order of paths, so they come
    from most categories, and few of them look alike. Debian's version 2021.06.28 has 141 stamps to choose from.

    Args:
        folder (`Path`): The folder of all categories.
        count (`int`): The number of stamps.
        min_size (`int`): Smallest longer side in pixels.

    Raises:
        ValueError: If the folder has fewer stamps that can be used.
    """
    stamps = {}
    for path in sorted(folder.rglob("*.png")):
        name = read_name(path)
        if name and name not in stamps and (drawing := _load(path, min_size)):
            stamps[name] = drawing
    if len(stamps) < count:
        raise ValueError(
            f"Scenes of stamps need {count} stamps of Tux Paint that can be used, but the folder {str(folder)!r} has "
            f"{len(stamps)}. Install them with: apt install tuxpaint-stamps-default"
        )
    names = list(stamps)
    return {name: stamps[name] for name in (names[i * len(names) // count] for i in range(count))}


def read_name(path: Path) -> str | None:
    """Returns the noun that names the stamp of a PNG file, or None if its description or options rule it out."""
    description, options = (_read(path.with_suffix(suffix)) for suffix in (".txt", ".dat"))
    first_line = description.partition("\n")[0].strip().removesuffix(".")
    name = first_line.rpartition(" ")[2]
    if not name.isalpha() or name.endswith(IRREGULAR) or {"nomirror", "colorable"} & set(options.split()):
        return None
    # The article of the captions goes by spelling, so "A university." has no place in them.
    return name if first_line == with_article(name).capitalize() else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _load(path: Path, min_size: int) -> Image.Image | None:
    stamp = Image.open(path).convert("RGBA")
    opacity = stamp.getchannel("A")
    visible = stamp.crop(opacity.getbbox())
    return visible if opacity.getextrema()[0] < 255 and max(visible.size) >= min_size else None
