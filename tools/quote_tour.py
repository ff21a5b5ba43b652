"""Fills the tour's pages with what they quote: the engine's source by name, and what the try-scripts print.

    python tools/quote_tour.py              rewrite the quotes of source
    python tools/quote_tour.py --outputs    run the scripts too, and rewrite what they print
    python tools/quote_tour.py --check      write nothing; exit 1 if a quote differs from the source

A page says what it quotes in a pair of comments, and the tool writes what stands between them:

    <!-- quote: nanovllm/engine/block_manager.py BlockManager.grow -->        a class, a function or a constant, whole
    <!-- quote: nanovllm/worker/memory.py cache_bytes_left "peak =" "return" -->    its lines from the first that
    begins with one text to the next that begins with the other; one text: that line alone
    <!-- output: try/03_preemption.py -->                                     what the script prints
    <!-- /quote --> or <!-- /output -->                                       the end

So the text on disk is whole, and a page reads well on a code host, without a build.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour"
LANGUAGES = ("en", "zh")
TRY = TOUR / "try"

QUOTE = re.compile(r'^<!-- quote: (\S+) ([\w.]+)((?: "[^"]+")*) -->\n(.*?)^<!-- /quote -->$', re.M | re.S)
OUTPUT = re.compile(r"^<!-- output: try/(\S+) -->\n(.*?)^<!-- /output -->$", re.M | re.S)
OPENING = re.compile(r"<!-- (quote|output): ")
VARIES = "here: "  # a line of a script's output that depends on the machine begins with it


@dataclass(frozen=True, slots=True)
class Quote:
    """What a page quotes: lines of a file's class, function or constant."""

    file: str  # relative to the root
    name: str  # qualified: BlockManager.grow
    ends: tuple[str, ...] = ()  # how the first and the last line begin; none: all lines

    def text(self) -> str:
        """The lines, without their indentation, in a block of Markdown that names their place.

        Raises ValueError, naming file and text, if the file has no such name or no such line.
        """
        lines = definition(self.file, self.name)
        if self.ends:
            first = self._find(lines, self.ends[0], 0)
            last = self._find(lines, self.ends[1], first) if len(self.ends) > 1 else first
            lines = lines[first : last + 1]
        code = textwrap.dedent("\n".join(lines))
        return f"```python\n# {self.file}: {self.name}\n{code}\n```\n"

    def _find(self, lines: list[str], text: str, start: int) -> int:
        for i, line in enumerate(lines[start:], start):
            if line.strip().startswith(text):
                return i
        raise ValueError(f"{self.file}: {self.name} has no line that begins with {text!r}")


def definition(file: str, name: str) -> list[str]:
    """The source lines of a class, function or constant of a file, decorators included.

    Raises ValueError, naming the file, if it does not exist or has no such name.
    """
    path = ROOT / file
    if not path.is_file():
        raise ValueError(f"{file} does not exist")
    source = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = _child(node, part, f"{file} has no {name}")
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return source.splitlines()[first - 1 : node.end_lineno]


def _child(parent: ast.AST, name: str, error: str) -> ast.AST:
    for node in ast.iter_child_nodes(parent):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
        if name in named:
            return node
    raise ValueError(error)


def pages() -> list[Path]:
    """Every page of the tour, English first."""
    return [*sorted(TOUR.glob("*.md")), *sorted((TOUR / "zh").glob("*.md"))]


def quotes(text: str) -> list[Quote]:
    """The quotes of a page, in order. Raises ValueError if one of its comments is not understood."""
    found = [Quote(m[1], m[2], tuple(re.findall(r'"([^"]+)"', m[3]))) for m in QUOTE.finditer(text)]
    wanted = len(OPENING.findall(text))
    if wanted != len(found) + len(OUTPUT.findall(text)):
        raise ValueError(f"{wanted} quotes begin, but only {len(found) + len(OUTPUT.findall(text))} are well formed")
    return found


def with_quotes(text: str) -> str:
    """The page with every quote as the source has it now. Raises as `quotes` and `Quote.text`."""
    for_each = iter(quotes(text))

    def fill(match: re.Match[str]) -> str:
        return f"{match[0].partition(chr(10))[0]}\n{next(for_each).text()}<!-- /quote -->"

    return QUOTE.sub(fill, text)


def scripts(text: str) -> list[str]:
    """The names of the scripts whose output a page shows."""
    return [name for name, _ in OUTPUT.findall(text)]


def shown_output(text: str, script: str) -> str:
    """What the page says that a script prints, without the fence. Raises ValueError if it says nothing of it."""
    for name, block in OUTPUT.findall(text):
        if name == script:
            return block.removeprefix("```text\n").removesuffix("```\n")
    raise ValueError(f"the page shows no output of {script}")


def with_output(text: str, script: str, output: str) -> str:
    """The page with this output of the script. Raises as `shown_output`."""
    return text.replace(f"```text\n{shown_output(text, script)}```\n", f"```text\n{output}```\n")


def fixed_lines(output: str) -> list[str]:
    """The lines of a script's output that are the same on every machine."""
    return [line.rstrip() for line in output.splitlines() if not line.startswith(VARIES)]


def run_script(script: str) -> str:
    """What a script of the tour prints. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TRY / script)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--outputs", action="store_true", help="run the scripts too")
    parser.add_argument("chapters", nargs="*", help="beginnings of the pages' names; default: all")
    args = parser.parse_args()
    outputs: dict[str, str] = {}
    for page in pages():
        if args.chapters and not page.name.startswith(tuple(args.chapters)):
            continue
        text = page.read_text(encoding="utf-8")
        try:
            wanted = with_quotes(text)
        except ValueError as error:
            sys.exit(f"{page.relative_to(ROOT)}: {error}")
        for script in scripts(text) if args.outputs else []:
            if script not in outputs:
                outputs[script] = run_script(script)
            wanted = with_output(wanted, script, outputs[script])
        if args.check and wanted != text:
            sys.exit(f"{page.relative_to(ROOT)} quotes what the source no longer says: run tools/quote_tour.py")
        if not args.check:
            page.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
