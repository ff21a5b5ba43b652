"""Makes the demo model's corpus out of CPython's own text: cleaned, without copies, split by file.

Windows of five consecutive non-blank lines tell whether a document copies others; the same windows later measure how
much of the held-out text also stands in the training text. A whole file goes into one split, and functions come from
training files only, so the training sees a held-out line only if a training file happens to contain it too.
"""

import ast
import hashlib
import re
import textwrap
from pathlib import Path


def line_windows(text: str) -> set[int]:
    """Hashes of every five consecutive non-blank lines. A window that two documents share counts as copied."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {hash(tuple(lines[i : i + 5])) for i in range(max(1, len(lines) - 4))}


def read_documents(stdlib: Path) -> dict[str, str]:
    """Read the library's modules and tests and the reference's topics, but no tables, broken files or near copies."""
    documents = {}
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: ("test" in str(path.relative_to(stdlib)), path)):
        name = path.relative_to(stdlib).as_posix()
        if name.startswith(("site-packages/", "pydoc_data/", "lib2to3/tests/data/")):
            continue
        try:
            text = path.read_text("utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        is_table = "decoding_table" in text or len(re.findall(r"[\d\\]", text)) > 0.12 * len(text)
        if len(text) >= 200 and not is_table:
            documents[name] = text
    for statement in ast.parse((stdlib / "pydoc_data/topics.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign):
            topics = ast.literal_eval(statement.value)
            documents |= {f"topic:{topic}": text.strip() + "\n" for topic, text in topics.items()}
    seen: set[int] = set()
    kept = {}
    for name, text in documents.items():
        windows = line_windows(text)
        if len(windows & seen) <= 0.3 * len(windows):
            kept[name] = text
            seen |= windows
    return kept


def cut_functions(text: str) -> list[str]:
    """Cut out documented functions and classes of 5 to 60 lines, dedented: they teach a model to start at `def` and to
    end.
    """
    lines, functions = text.split("\n"), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            if 5 <= source.count("\n") <= 60 and source.startswith(("def ", "async def ", "class ")):
                functions.append(source)
    return functions


def split_documents(documents: dict[str, str]) -> dict[str, dict[str, str]]:
    """Split documents by a hash of the name: 1/40 "test", 1/40 "validation", the rest "train", with its "functions"."""
    splits: dict[str, dict[str, str]] = {"test": {}, "validation": {}, "train": {}, "functions": {}}
    for name, text in documents.items():
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 40
        splits[("test", "validation")[bucket] if bucket < 2 else "train"][name] = text
        if bucket >= 2 and not name.startswith("topic:"):
            splits["functions"] |= {f"{name}#{i}": source for i, source in enumerate(cut_functions(text))}
    return splits
