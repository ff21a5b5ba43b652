"""Writes the table of the afternoon route into README.md: a token's way, file by file, with the number of lines.

python tools/reading_routes.py            rewrite the table between the markers
python tools/reading_routes.py --check    exit 1 if README.md has another table, or the route is too long
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- afternoon -->", "<!-- /afternoon -->"
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
            f"nanovllm/{file} is on the afternoon route (tools/reading_routes.py) but does not exist"
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


def with_table(text: str, table: str) -> str:
    """`text` with `table` between the markers. Raises ValueError unless each is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    try:
        total = total_lines()
        text = README.read_text(encoding="utf-8")
        wanted = with_table(text, afternoon_table())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    if args.check and text != wanted:
        sys.exit("README.md is not what tools/reading_routes.py writes: run it")
    if not args.check:
        README.write_text(wanted, encoding="utf-8")
    if total > MOST_LINES:
        sys.exit(f"the afternoon route has {total:,} lines, {total - MOST_LINES:,} too many")


if __name__ == "__main__":
    main()
