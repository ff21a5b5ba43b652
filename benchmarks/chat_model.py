"""Times the chat model, 8 chats at once, against transformers' `generate`: `python -m benchmarks.chat_model`.

Both engines read one checkpoint, made of the GGUF file (`nanovllm.chat_model`), and their runs alternate. Further
options are those of bench.py, which this runs.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

import bench
from nanovllm import chat_model
from nanovllm.models.gguf_config import read_config
from nanovllm.models.weight_files import read_tensors

EIGHT_CHATS = "--streams 8 --min-input 40 --max-input 80 --min-output 128 --max-output 128 --max-model-len 1024"


def convert(gguf: Path, folder: str) -> None:
    """Write the GGUF file's model, of Llama's family, to a folder as transformers does."""
    values = {key: value for key, value in read_config(gguf).items() if key not in ("architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(torch.bfloat16)
    model.load_state_dict(dict(read_tensors(gguf, dtype=torch.bfloat16)), strict=False)  # the head is tied
    model.save_pretrained(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(chat_model()), folder)
        sys.argv[1:] = [
            "--model",
            folder,
            *EIGHT_CHATS.split(),
            "--compare",
            "transformers",
            "--no-split",
            *sys.argv[1:],
        ]
        bench.main()


if __name__ == "__main__":
    main()
