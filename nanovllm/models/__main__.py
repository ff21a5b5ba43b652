"""`python -m nanovllm.models` lists the families of models that the engine runs. The README's table is the same."""

from nanovllm.models import ARCHITECTURES, TEXT_PARTS, model_class

HEADER = ("`architectures` in config.json", "models", "features")


def family_rows() -> list[tuple[str, str, str]]:
    """(architecture, models that users know, features), for each family."""
    rows = [(name, cls.known_as, cls.features) for name, cls in ((n, model_class([n])) for n in ARCHITECTURES)]
    for name, parts in TEXT_PARTS.items():
        rows.append((name, "", f"the text part of it, which is {' or '.join(parts.values())}"))
    return rows


def markdown_table() -> str:
    """The families as a table for the README."""
    rows = [HEADER, ("---",) * 3, *((f"`{name}`", *rest) for name, *rest in family_rows())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    rows = [("architecture", *HEADER[1:]), *family_rows()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[2]]))


if __name__ == "__main__":
    main()
