"""Records docs/traces/demo.jsonl: the demo model with a small cache, through the three scenes, one after the other.

python tools/record_trace.py [FILE]      two recordings differ in their times alone
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams, demo_model
from nanovllm.engine.step_trace import shape_of
from nanovllm.trace import record
from nanovllm.trace.scenes import SCENES, TEACHING, TEXT, scene

DEMO = Path(__file__).parents[1] / "docs" / "traces" / "demo.jsonl"


def record_demo(path: Path) -> None:
    """Write the trace."""
    with LLM(demo_model(), device="cpu", dtype="float32", seed=0, **TEACHING) as llm:
        text_ids, shape = llm.encode_prompt(TEXT), shape_of(llm.engine)
        with record(llm, path, "nano-vLLM's demo model"):
            for name in SCENES:
                requests = scene(name, text_ids, shape)
                llm.reset_prefix_cache()
                params = [
                    SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
                    for request in requests
                ]
                for _ in llm.stream([{"prompt_token_ids": request.token_ids} for request in requests], params):
                    pass  # as a stream, so that each step brings its text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DEMO)
    file = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    record_demo(file)
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
