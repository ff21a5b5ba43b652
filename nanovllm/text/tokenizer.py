"""Loads the `transformers` tokenizer of a model."""

from pathlib import Path
from typing import Any

from nanovllm.config import Config
from nanovllm.models.gguf_file import is_gguf

FILES = ("tokeniz*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # one of which a folder with a tokenizer has


def load_tokenizer(config: Config, model_path: str) -> Any:
    """The tokenizer in `config.tokenizer`, by default the model's. Raises OSError or ValueError, naming the source."""
    source = config.tokenizer or model_path
    advice = "give LLM a tokenizer=, or skip_tokenizer_init=True and token ids"
    # From a folder without tokenizer files transformers makes, for some families, a tokenizer without a vocabulary;
    # and where it makes none, it asks for libraries that would not help.
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in FILES):
        raise FileNotFoundError(f"no tokenizer in {source}: {advice}")
    try:
        tokenizer = _load(source, config)
    except Exception as error:  # transformers raises many types, and few of them name the source
        refusal = OSError if isinstance(error, OSError) else ValueError
        raise refusal(f"the tokenizer in {source} cannot be loaded: {error}; {advice}") from error
    # Such a tokenizer, of files that have no vocabulary, knows only an EOS.
    if len(tokenizer) <= len(tokenizer.get_added_vocab()) and not tokenizer.encode("a", add_special_tokens=False):
        raise FileNotFoundError(f"no tokenizer in {source}: {advice}")
    return tokenizer


def _load(source: str, config: Config) -> Any:
    if is_gguf(Path(source)):
        from nanovllm.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(Path(source).expanduser())
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
