"""Writes the table of model families into README.md, from the registry: the same as `python -m nanovllm.models`.

python tools/family_table.py            rewrite the table between the markers
python tools/family_table.py --check    exit 1 if README.md has another table
"""

import argparse
import sys
from pathlib import Path

from nanovllm.models.__main__ import markdown_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families -->", "<!-- /families -->"


def with_table(text: str) -> str:
    """`text` with the table between the markers. Raises ValueError unless each is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must have {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        wanted = with_table(text)
    except ValueError as error:
        sys.exit(str(error))
    if not args.check:
        README.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        sys.exit("README.md is not what tools/family_table.py writes: run it")


if __name__ == "__main__":
    main()
