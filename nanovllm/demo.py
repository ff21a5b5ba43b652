"""The small trained model that ships with the package."""

from pathlib import Path


def demo_model() -> str:
    """The directory of the demo model. Raises FileNotFoundError if the package's data are missing."""
    path = Path(__file__).parent / "assets" / "demo"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the demo model is missing: no config.json in {path}")
    return str(path)
