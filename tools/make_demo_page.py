"""Makes docs/demo.html: the page of the server in one file, with a recorded trace inside, which opens without a server.

python tools/make_demo_page.py                  from docs/traces/demo.jsonl
python tools/make_demo_page.py --check          exit 1 if docs/demo.html is another one

A browser loads no module from a file next to a local page, so each module becomes a function here, in the order in
which they need one another. That asks of the modules: they import names, at their beginning, and export what they
declare.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "nanovllm" / "server" / "page"
TRACE, DEMO = ROOT / "docs" / "traces" / "demo.jsonl", ROOT / "docs" / "demo.html"
MOST_BYTES = 1_500_000

IMPORT = re.compile(r'^import \{([^}]*)\} from "(\.[^"]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?(?:function\*?|const|let) (\w+))", re.MULTILINE)


def modules_of(name: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(name, its text) of a module and of those that it needs, each after those it needs itself."""
    if name in seen:
        return
    seen.add(name)
    text = (PAGE / name).read_text(encoding="utf-8")
    for match in IMPORT.finditer(text):
        yield from modules_of(normpath(join(dirname(name), match[2])), seen)
    yield name, text


def as_function(name: str, text: str) -> str:
    """A module as a function that puts what it exports into `modules`. Raises ValueError if that cannot be done."""

    def taken(match: re.Match[str]) -> str:
        names = " ".join(match[1].replace(" as ", ": ").split())
        return f'const {{ {names} }} = modules["{normpath(join(dirname(name), match[2]))}"];\n'

    exported = [match[2] for match in EXPORT.finditer(text)]
    body = EXPORT.sub(r"\1", IMPORT.sub(taken, text))
    if left := re.search(r"^(import|export)\b.*", body, re.MULTILINE):
        raise ValueError(f"{name}: {left[0]!r} is neither an import of names nor an export of a declaration")
    return f'modules["{name}"] = (() => {{\n{body}\nreturn {{ {", ".join(exported)} }};\n}})();\n'


def demo_page(trace: str) -> str:
    """The page as one file that needs no other. Raises ValueError if it gets too large, or a place for a part is gone.

    `trace` is the text of a trace: lines of JSON.
    """
    functions = "".join(as_function(name, text) for name, text in modules_of("main.js", set()))
    # No `</script>` may end the element early: in JSON and in JavaScript strings `<\/` is the same text.
    script = ('"use strict";\nconst modules = {};\n' + functions).replace("</", "<\\/")
    data = json.dumps(trace, ensure_ascii=False).replace("</", "<\\/")
    parts = {
        r'<meta http-equiv="Content-Security-Policy"[^>]*>\n': "",
        r'<link rel="stylesheet"[^>]*>': f"<style>\n{(PAGE / 'style.css').read_text(encoding='utf-8')}</style>",
        r'<script type="module"[^>]*></script>': f'<script type="application/json" id="trace">{data}</script>\n'
        f"<script>\n{script}</script>",
    }
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    for place, part in parts.items():
        page, count = re.subn(place, lambda _, part=part: part, page)
        if count != 1:
            raise ValueError(f"index.html has {place} {count} times: once is what this program needs")
    if (size := len(page.encode())) > MOST_BYTES:
        raise ValueError(f"the page has {size} bytes: at most {MOST_BYTES} are allowed; record a shorter trace")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--trace", type=Path, default=TRACE)
    options = parser.parse_args()
    page = demo_page(options.trace.read_text(encoding="utf-8"))
    if not options.check:
        DEMO.write_text(page, encoding="utf-8")
    elif not DEMO.exists() or DEMO.read_text(encoding="utf-8") != page:
        sys.exit("docs/demo.html is not the page of now: run python tools/make_demo_page.py")


if __name__ == "__main__":
    main()
