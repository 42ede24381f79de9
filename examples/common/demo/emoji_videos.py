"""emoji-videos: Microsoft's animated Fluent emoji (MIT licence), fetched with npm, with captions as "man cook"."""

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.demo.cache import prepare_once, require_libraries

PACKAGE = "@lobehub/fluent-emoji-anim-1@1.0.0"  # 165 MB
HELD_OUT_TONE = "medium-dark skin tone"
TONES = 6  # five skin tones, and none


def load_emoji_videos() -> Path:
    """Fetches animated emoji with all skin tones, one of them for testing. Without npm it raises a RuntimeError."""
    return prepare_once("data/emoji-videos-v1", _write)


def _write(folder: Path) -> None:
    archive = _fetch(folder.parent)
    with tarfile.open(archive) as tar:
        members = _choose([member.name for member in tar])
        captions: dict[str, list[str]] = {"train": [], "test": []}
        for member, (split, caption) in tqdm(sorted(members.items()), desc="Emoji videos", unit="video"):
            path = folder / split / Path(member).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
            with Image.open(path) as video:
                moves = getattr(video, "n_frames", 1) > 1
            if moves:
                captions[split].append(json.dumps({"file_name": path.name, "caption": caption}))
            else:  # some emoji have one frame
                path.unlink()
    for split, lines in captions.items():
        (folder / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _fetch(folder: Path) -> Path:
    if shutil.which("npm") is None:
        raise RuntimeError(f"The video demo fetches {PACKAGE} with npm, which is not installed.")
    print(f"Fetching {PACKAGE} (165 MB) …")
    result = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"npm cannot fetch {PACKAGE}: {result.stderr.strip()}")
    return folder / result.stdout.strip().splitlines()[-1]


def _choose(paths: list[str]) -> dict[str, tuple[str, str]]:
    """Returns the split and the caption of each file of an emoji that exists in all skin tones."""
    families: dict[str, dict[str, str]] = {}  # name -> tone -> path
    for path in paths:
        if path.endswith(".webp") and (emoji := _name_and_tone(Path(path).stem)):
            name, tone = emoji
            families.setdefault(name, {})[tone] = path
    return {
        path: ("test" if tone == HELD_OUT_TONE else "train", name)
        for name, tones in families.items()
        if len(tones) == TONES
        for tone, path in tones.items()
    }


def _name_and_tone(codes: str) -> tuple[str, str] | None:
    """Returns an emoji's name and skin tone ("" for none) from its code points; None if these are no emoji."""
    require_libraries("emoji")
    from emoji import EMOJI_DATA

    try:
        text = "".join(chr(int(code, 16)) for code in codes.split("-"))
    except (ValueError, OverflowError):
        return None
    known = EMOJI_DATA.get(text) or EMOJI_DATA.get(text.replace("\ufe0f", ""))
    if known is None:
        return None
    name = known["en"].strip(":").replace("_", " ")
    tone = re.search(r"((?:medium-)?(?:light|dark)|medium) skin tone", name)
    if tone is None:
        return name, ""
    return re.sub(r"\s*:?\s*" + re.escape(tone[0]) + r",?", "", name).strip(), tone[0]
