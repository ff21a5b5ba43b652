"""What `torch.compile` gains where a family has chains of operations: `python -m benchmarks.compiled_chains`.

Two engines of one small random model, with `compile` on and off, decode 1 and 8 sequences in turn. The sizes are those
of a small model, whose operations cost more than their arithmetic: so this is the most that chains can gain.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 72, "vocab_size": 65536},
    "ministral3": {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 72},
}
NUM_TOKENS = 64


def step_ms(llm: LLM, batch: int) -> float:
    """Milliseconds of a decode step of `batch` sequences."""
    prompts = [[7 + i] * 32 for i in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return (time.perf_counter() - began) * 1000 / NUM_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    results = []
    for name in args.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**SIZES, **FAMILIES[name]}))
            options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 512}
            options |= {"device": args.device, "gpu_memory_utilization": 0.3}
            engines = {compiled: LLM(folder, compile=compiled, **options) for compiled in (False, True)}
        for batch in (1, 8):
            times: dict[bool, list[float]] = {False: [], True: []}
            for llm in engines.values():
                step_ms(llm, batch)
            for _ in range(args.repeat):
                for compiled, llm in engines.items():
                    times[compiled].append(step_ms(llm, batch))
            plain, compiled = (min(times[key]) for key in (False, True))
            gain = statistics.median(a / b for a, b in zip(times[False], times[True], strict=True))
            print(
                f"{name}, {batch} sequences: {plain:.2f} ms a step, compiled {compiled:.2f} ({gain:.2f} times as fast)"
            )
            results.append({"family": name, "batch": batch, "plain_ms": times[False], "compiled_ms": times[True]})
        for llm in engines.values():
            llm.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
