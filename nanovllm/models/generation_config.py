"""Reads a checkpoint's generation_config.json: the tokens that end a sequence, and the default sampling parameters."""

import logging
from pathlib import Path
from typing import Any

from nanovllm.config import Config
from nanovllm.models.weight_files import read_json
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
# The keys that vLLM reads too (not do_sample). All but max_new_tokens are named like the field of SamplingParams.
SAMPLING_KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "skip_special_tokens",
)


def load_generation_config(config: Config, path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file that the option `generation_config` means, and its content: None if the model's directory has no file.

    Raises:
        FileNotFoundError: the option names a directory without the file.
        ValueError: the file holds no JSON object.
    """
    if config.generation_config in ("auto", "vllm"):
        file = path / FILE
        return file, read_json(file) if file.is_file() else None
    file = Path(config.generation_config).expanduser() / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"generation_config={config.generation_config!r} must be 'auto', 'vllm' or a directory with a {FILE}"
        )
    return file, read_json(file)


def load_eos_token_ids(config: Config, path: Path, hf_config: Any) -> frozenset[int]:
    """The ids that end a sequence: those of generation_config.json, or, if that file is missing, of config.json.

    Leaves out ids outside the vocabulary, which the sampler never draws. Raises as `load_generation_config`, and
    ValueError if `eos_token_id` holds anything but token ids.
    """
    file, content = load_generation_config(config, path)
    if content is None:
        file, eos = path / "config.json", getattr(hf_config, "eos_token_id", None)
    else:
        eos = content.get("eos_token_id")
    if eos is None:
        return frozenset()
    if not are_token_ids(eos):
        raise ValueError(f"{file}: eos_token_id={eos!r:.80} must be a token id, a list of them or null")
    given = frozenset(eos if isinstance(eos, list) else [eos])
    known = frozenset(i for i in given if 0 <= i < hf_config.vocab_size)
    if given - known:
        unknown = ", ".join(map(str, sorted(given - known)))
        logger.warning("%s: eos_token_id %s is not in the vocabulary of %d", file, unknown, hf_config.vocab_size)
    return known


def load_default_sampling(config: Config, path: Path) -> dict[str, Any]:
    """SamplingParams' fields for requests without any: the file's, replaced by `override_generation_config`'s.

    Raises as `load_generation_config`, and ValueError, with file and key, for a value that SamplingParams refuses.
    """
    file, content = load_generation_config(config, path)
    if config.generation_config == "vllm":
        content = None
    fields = _checked(content or {}, str(file), "; generation_config='vllm' passes it over")
    override = config.override_generation_config or {}
    for key in override:
        if key not in SAMPLING_KEYS:
            raise ValueError(f"override_generation_config has {key!r}: its keys are {', '.join(SAMPLING_KEYS)}")
    return fields | _checked(override, "override_generation_config")


def are_token_ids(value: object) -> bool:
    """Whether `value` is an integer or a list of integers. Does not check that a vocabulary has them."""
    return all(isinstance(i, int) and not isinstance(i, bool) for i in (value if isinstance(value, list) else [value]))


def _checked(content: dict[str, Any], source: str, hint: str = "") -> dict[str, Any]:
    fields = {}
    for key in SAMPLING_KEYS:
        if content.get(key) is not None:
            field = "max_tokens" if key == "max_new_tokens" else key
            try:
                SamplingParams(**{field: content[key]})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: {key}: {error}{hint}") from error
            fields[field] = content[key]
    return fields
