"""Writes README.md's tables: the afternoon route, file by file with its lines, and the families that the registry has.

python tools/readme_tables.py            rewrite the tables between their markers
python tools/readme_tables.py --check    exit 1 if README.md has other tables, or the route is too long
"""

import argparse
import sys
from pathlib import Path

from nanovllm.models.__main__ import markdown_table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MOST_LINES = 2000

# In reading order: a file of the package, and what it shows.
AFTERNOON = [
    ("llm.py", "prompts in, completions out"),
    ("engine/llm_engine.py", "the loop: plan, launch, and only then read"),
    ("engine/sequence.py", "a sequence's tokens, and how far the device has come"),
    ("engine/scheduler.py", "which sequences run in the next step"),
    ("engine/block_manager.py", "the paged cache, and prefixes that sequences share"),
    ("step_plan.py", "what the host tells the device in a step"),
    ("worker/model_runner.py", "a plan becomes a forward pass"),
    ("worker/input_batch.py", "rows that stay on the device"),
    ("layers/attention.py", "keys and values to their slots, and back through the block table"),
    ("layers/linear.py", "column and row split, and the one all-reduce"),
    ("layers/layernorm.py", "the norm that reduces a partial sum"),
    ("models/blocks.py", "a model as the textbook writes it, and what families may change in it"),
    ("models/llama.py", "a family: what its config.json says, and what its layers are"),
]


def count_lines(file: str) -> int:
    """The number of lines of a file of the package. Raises FileNotFoundError, with the name, if there is none."""
    path = ROOT / "nanovllm" / file
    if not path.is_file():
        raise FileNotFoundError(
            f"nanovllm/{file} is on the afternoon route (tools/readme_tables.py) but does not exist"
        )
    return len(path.read_text(encoding="utf-8").splitlines())


def afternoon_table() -> str:
    """The table in Markdown; its last row is the sum. Raises as `count_lines`."""
    counts = [count_lines(file) for file, _ in AFTERNOON]
    rows = [
        f"| {i} | [`{file}`](nanovllm/{file}) | {shows} | {count:,} |"
        for i, ((file, shows), count) in enumerate(zip(AFTERNOON, counts, strict=True), 1)
    ]
    return "\n".join(["| | file | what it shows | lines |", "| --- | --- | --- | --- |", *rows, _sum_row(sum(counts))])


def _sum_row(total: int) -> str:
    return f"| | **all** | | **{total:,}** |"


def total_lines() -> int:
    """The number of lines of the whole route. Raises as `count_lines`."""
    return sum(count_lines(file) for file, _ in AFTERNOON)


def with_table(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of `name`. Raises ValueError unless each is there once, in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must have {begin} and then {end}, once each")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def with_tables(text: str) -> str:
    """`text` with both tables. Raises as `with_table` and `count_lines`."""
    return with_table(with_table(text, "afternoon", afternoon_table()), "families", markdown_table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    try:
        total = total_lines()
        text = README.read_text(encoding="utf-8")
        wanted = with_tables(text)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if args.check and text != wanted:
        sys.exit("README.md is not what tools/readme_tables.py writes: run it")
    if not args.check:
        README.write_text(wanted, encoding="utf-8")
    if total > MOST_LINES:
        sys.exit(f"the afternoon route has {total:,} lines, {total - MOST_LINES:,} too many")


if __name__ == "__main__":
    main()
