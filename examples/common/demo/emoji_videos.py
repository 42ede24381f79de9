"""Real videos for the video demo: Microsoft's animated Fluent emoji, as npm brings them."""

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import emoji
from PIL import Image
from tqdm import tqdm

from common.demo.cache import prepare_once

EMOJI_VIDEOS = "emoji-videos"
PACKAGE = "@lobehub/fluent-emoji-anim-1@1.0.0"  # MIT licence; 165 MB
HELD_OUT_TONE = "medium-dark skin tone"


def load_emoji_videos() -> Path:
    """Fetches animated emoji that come in several skin tones; one tone of each is held out.

    Returns:
        A folder for `datasets.load_dataset`: splits "train" and "test" of animated WebP files with captions such as
        "man cook", 5 and 1 of each.

    Raises:
        RuntimeError: If npm is not installed or cannot fetch the package.
    """
    return prepare_once("data/emoji-videos-v1", _write)


def _write(folder: Path) -> None:
    folder.mkdir()
    archive = _fetch(folder)
    families: dict[str, dict[str, str]] = {}  # name -> tone -> file
    with tarfile.open(archive) as tar:
        for member in tar:
            name = _name(Path(member.name).stem) if member.name.endswith(".webp") else None
            if name is not None:
                families.setdefault(name[0], {})[name[1]] = member.name
        wanted = {}
        for caption, tones in families.items():
            if len(tones) == 6:  # one without a tone, and five with
                for tone, path in tones.items():
                    wanted[path] = ("test" if tone == HELD_OUT_TONE else "train", caption)
        rows: dict[str, list[str]] = {"train": [], "test": []}
        for path, (split, caption) in tqdm(sorted(wanted.items()), desc="Emoji videos", unit="clip"):
            target = folder / split / Path(path).name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(tar.extractfile(path).read())
            with Image.open(target) as video:
                if getattr(video, "n_frames", 1) < 2:  # not every emoji moves
                    target.unlink()
                    continue
            rows[split].append(json.dumps({"file_name": target.name, "caption": caption}))
    archive.unlink()
    for split, lines in rows.items():
        (folder / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _fetch(folder: Path) -> Path:
    if shutil.which("npm") is None:
        raise RuntimeError(f"The video demo fetches {PACKAGE} with npm, which is not installed.")
    print(f"Fetching {PACKAGE} (165 MB) …")
    result = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"npm cannot fetch {PACKAGE}: {result.stderr.strip()}")
    return folder / result.stdout.strip().splitlines()[-1]


def _name(codes: str) -> tuple[str, str] | None:
    """Name and skin tone of an emoji, of its code points as the file's name gives them; None if it has no name."""
    try:
        text = "".join(chr(int(code, 16)) for code in codes.split("-"))
    except (ValueError, OverflowError):
        return None
    known = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text.replace("\ufe0f", ""))
    if known is None:
        return None
    name = known["en"].strip(":").replace("_", " ")
    tone = re.search(r"((?:medium-)?(?:light|dark)|medium) skin tone", name)
    if tone is None:
        return name, ""
    return re.sub(r"\s*:?\s*" + re.escape(tone[0]) + r",?", "", name).strip(), tone[0]
