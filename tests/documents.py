"""Reads README, the pages of docs/ and the docstrings of scripts: their commands, Python blocks, links and flags."""

import ast
import io
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from .helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METRIC_CARDS = sorted((ROOT / "examples" / "metrics").glob("*/README.md"))
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Lines of code in a page or docstring. `where` is its file and line."""

    language: str
    code: str
    where: str


def blocks_of_page(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT)
    return [
        Block(found[1], found[2], f"{name}:{text.count(chr(10), 0, found.start()) + 2}")
        for found in _FENCE.finditer(text)
    ]


def blocks_of_docstring(script: Path) -> list[Block]:
    """The indented lines of a script's docstring: commands, where they are not Python."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")), clean=False) or ""
    blocks = []
    for match in re.finditer(r"(?:^    .*\n)+", docstring + "\n", re.MULTILINE):
        code = re.sub("^    ", "", match[0], flags=re.MULTILINE)
        line = docstring.count("\n", 0, match.start()) + 1
        language = "bash"
        with suppress(SyntaxError):
            ast.parse(code)
            language = "python"
        blocks.append(Block(language, code, f"{script.relative_to(ROOT)}:{line}"))
    return blocks


@dataclass(frozen=True)
class Command:
    """A "script" of examples/ or a "benchmark" with its arguments, or a "foreign" command as its name alone."""

    kind: str
    name: str
    arguments: tuple[str, ...]
    where: str


def commands_of(block: Block) -> list[Command]:
    commands = []
    for line in re.sub(r"\\\n\s*", "", block.code).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            commands.append(read_command(words[:end], block.where))
            words = words[end + 1 :]
    return commands


def read_command(words: list[str], where: str) -> Command:
    """Reads one command. A launch with an option that accelerate does not know is foreign."""
    while re.match(r"[A-Z_]+=", words[0]):  # of the environment
        words = words[1:]
    words = [Path(words[0]).name, *words[1:]]
    foreign = Command("foreign", " ".join(words), (), where)
    if words[:2] == ["accelerate", "launch"]:
        try:
            launched = launch_command_parser().parse_args(words[2:])
        except SystemExit:
            return foreign
        words = ["python", launched.training_script, *launched.training_script_args]
    if words[0] == "python" and words[1].startswith("examples/"):
        return Command("script", Path(words[1]).stem, tuple(words[2:]), where)
    if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        return Command("benchmark", words[2].removeprefix("benchmarks."), tuple(words[3:]), where)
    return foreign


def code_spans(page: Path) -> list[str]:
    """The code between single backticks in a page, outside of its blocks."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text(encoding="utf-8")))


def commands_of_page(page: Path) -> list[Command]:
    """The commands of a page in its blocks, and those in its text that start a script or a benchmark."""
    blocks = [block for block in blocks_of_page(page) if block.language == "bash"]
    starts = re.compile(r"(python|launch)\b.* (examples/\w+\.py|-m benchmarks\.)")
    blocks += [Block("bash", code, page.name) for code in code_spans(page) if starts.search(f"{code} ")]
    return [command for block in blocks for command in commands_of(block)]


def commands_of_docstring(script: Path) -> list[Command]:
    blocks = [block for block in blocks_of_docstring(script) if block.language == "bash"]
    return [command for block in blocks for command in commands_of(block)]


def relative_links(page: Path) -> list[str]:
    """Targets of links and images that are no URLs, with their `#heading`."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def known_options(main: Callable) -> set[str]:
    """The options of a program, by its `--help`."""
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        main(["--help"])
    lines = re.findall(r"^  (-.+?)(?:  .*)?$", output.getvalue(), re.MULTILINE)  # without the help beside an option
    options = {option for line in lines for option in re.findall(r"--[\w-]+", line)}
    assert options, f"{main.__module__} --help prints no options"
    return options
