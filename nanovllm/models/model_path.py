"""Where a model's files are. It imports no torch."""

from pathlib import Path

from nanovllm.models.gguf_file import gguf_in, is_gguf


def resolve_model_path(model: str, revision: str | None) -> Path:
    """The model's local directory, or its GGUF file; a hub id is downloaded first.

    Raises:
        FileNotFoundError, OSError: the directory or file does not exist, or the hub does not give the model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return gguf_in(path) or path
    if is_gguf(path):
        if path.is_file():
            return path
        raise FileNotFoundError(f"model={model!r} is not a file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.exists():
        raise FileNotFoundError(f"model={model!r} is not a directory")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
        # Mistral's and OpenAI's repositories have the same weights once more, under names of their own.
        copies = ["consolidated*", "original/*", "metal/*"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=copies))
    except (OSError, ValueError) as error:
        raise OSError(f"model={model!r} is neither a local directory nor to be had from the hub: {error}") from error
