"""The small trained model in the package: with it a fresh clone generates text without a download."""

from pathlib import Path

DIRECTORY = Path(__file__).parent / "assets" / "demo"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def demo_model() -> str:
    """The directory of the demo model, in the Hugging Face layout: for `LLM(demo_model())` or transformers.

    Raises:
        FileNotFoundError: this installation lacks some of its files, which the error names.
    """
    missing = [name for name in FILES if not (DIRECTORY / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo model in {DIRECTORY} lacks {', '.join(missing)}: install nano-vllm with its package data, "
            "or train the model again with tools/train_demo_model.py"
        )
    return str(DIRECTORY)
