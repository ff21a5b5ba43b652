"""Times structured outputs: `python -m benchmarks.structured`; on a GPU `python -m benchmarks.structured --headline`.

Without --headline: how long it takes to compile grammars, and to make the masks of a step. `--rows` sequences follow a
grammar at once; each draws any of the tokens that its mask allows. The table has, for each grammar: the compilation
(median of five), and what one step takes for all rows, the tokens of the last accepted and masks made: mean, worst, and
microseconds a row.

--headline: the headline's requests, all on JSON, against the same requests without, by turns in one process: tokens a
second of each run, and the per cent that JSON costs. The weights are random; the schema has no end before `max_tokens`.
The last line is JSON.

What a mask costs depends on the vocabulary. The one made here has the size of Qwen3's, and the chat model's bytes; its
tokens are longer than real ones (10.9 bytes in the mean, not 6.4): `--tokenizer` takes a real one from a folder.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.report import table_lines
from benchmarks.wide_tokenizer import base_tokenizer, wide_tokenizer
from benchmarks.workloads import PRESETS, Workload, draw, shrunk
from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.text.grammar import Grammars, Matcher

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z0-9.]+@[a-z0-9]+\\.(com|org)$"},
        "role": {"enum": ["admin", "user", "guest"]},
    },
    "required": ["name", "age", "email", "role"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 2000}
GRAMMARS: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["positive", "negative", "neutral"]},
    "regex": {"regex": r"[A-Z][a-z]{1,20}, [0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:]{8})?"},
    "json_object": {"json_object": True},
    "simple": {"json": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
    "person": {"json": PERSON},
    "nested, $ref, anyOf": {
        "json": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/node"}, "owner": {"anyOf": [PERSON, {"type": "null"}]}},
            "required": ["tree", "owner"],
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "label": {"type": "string"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["label", "children"],
                }
            },
        }
    },
    "50 properties": {
        "json": {
            "type": "object",
            "properties": {f"field_{i}": {"type": ["string", "number", "null"]} for i in range(50)},
            "required": [f"field_{i}" for i in range(0, 50, 2)],
        }
    },
    "endless array": {"json": ENDLESS},
    "EBNF": {"grammar": 'root ::= sum\nsum ::= product ("+" product)*\nproduct ::= [0-9]+ | "(" sum ")"'},
}


def milliseconds(function: Callable[[], Any]) -> float:
    begin = perf_counter()
    function()
    return 1e3 * (perf_counter() - begin)


def measure_grammar(grammars: Grammars, params: StructuredOutputsParams, rows: int, steps: int) -> list[float]:
    """Milliseconds: compilation, mean and worst step; microseconds a row."""
    compiling = statistics.median(milliseconds(lambda: grammars.compile(params)) for _ in range(5))
    matchers = [grammars.matcher(params, ignore_eos=True) for _ in range(rows)]
    bits = np.empty((rows, grammars.num_words), np.int32)
    rng, taken, news = random.Random(0), [], [[] for _ in range(rows)]
    for _ in range(steps):
        taken.append(milliseconds(partial(Matcher.advance_all, matchers, news, bits)))
        allowed = [np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0] for row in bits]
        news = [[int(rng.choice(ids))] for ids in allowed]
        for i, (token,) in enumerate(news):
            if token in grammars.eos_token_ids:
                matchers[i], news[i] = grammars.matcher(params, ignore_eos=True), []
    return [compiling, statistics.mean(taken), max(taken), 1e3 * statistics.mean(taken) / rows]


def measure_masks(rows: int, steps: int, num_threads: int | None, folder: str | None) -> dict[str, Any]:
    """A table for the chat model's vocabulary, and one for a vocabulary as large as Qwen3's, or the folder's."""
    report: dict[str, Any] = {}
    other = PreTrainedTokenizerFast.from_pretrained(folder) if folder else wide_tokenizer()
    for tokenizer in (base_tokenizer(), other):
        begin = perf_counter()
        grammars = Grammars(tokenizer, len(tokenizer), {tokenizer.eos_token_id}, num_threads)
        trie_ms = 1e3 * (perf_counter() - begin)
        print(f"{len(tokenizer):,} tokens; to read them takes {trie_ms:.0f} ms, once")
        head = ["grammar", "compile ms", f"a step of {rows} ms", "worst", "µs a row"]
        found = {
            name: measure_grammar(grammars, StructuredOutputsParams(**params), rows, steps)
            for name, params in GRAMMARS.items()
        }
        lines = [[name, *(f"{value:.2f}" for value in values)] for name, values in found.items()]
        print(*table_lines(head, lines), sep="\n")
        report[f"{len(tokenizer)} tokens"] = found | {"tokenizer_ms": trie_ms}
    return report


def tokens_per_second(llm: LLM, workload: Workload, outputs: StructuredOutputsParams | None) -> float:
    """Raises RuntimeError unless every request got all its tokens."""
    params = [
        SamplingParams(
            temperature=workload.temperature,
            max_tokens=n,
            ignore_eos=True,
            detokenize=False,
            structured_outputs=outputs,
        )
        for n in workload.max_tokens
    ]
    llm.reset_prefix_cache()
    begin = perf_counter()
    found = llm.generate(workload.prompts, params, use_tqdm=False)
    elapsed = perf_counter() - begin
    if [len(output.outputs[0].token_ids) for output in found] != workload.max_tokens:
        reasons = {(output.outputs[0].finish_reason, output.outputs[0].stop_reason) for output in found}
        raise RuntimeError(f"not every request got all its tokens: {reasons}")
    return workload.num_output_tokens / elapsed


def measure_headline(
    model: str, tokenizer: str | None, device: str, max_model_len: int, shrink: int, rounds: int
) -> dict[str, Any]:
    """Runs of the headline with and without JSON, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is None:
            wide_tokenizer(json.loads((Path(model) / "config.json").read_text())["vocab_size"]).save_pretrained(folder)
        llm = LLM(
            model,
            tokenizer=tokenizer or folder,
            load_format="dummy",
            device=device,
            max_model_len=max_model_len,
            seed=0,
        )
        workload = draw("headline", shrunk(PRESETS["headline"], shrink), llm.engine.vocab_size)
        asked = {"plain": None, "json": StructuredOutputsParams(json=ENDLESS, disable_any_whitespace=True)}
        for outputs in asked.values():
            tokens_per_second(llm, workload, outputs)  # compiles kernels and grammar
        rates: dict[str, list[float]] = {name: [] for name in asked}
        for _ in range(rounds):
            for name, outputs in asked.items():
                rates[name].append(tokens_per_second(llm, workload, outputs))
        llm.close()
    lost = 100 * (1 - max(rates["json"]) / max(rates["plain"]))
    lines = [[name, *(f"{rate:,.0f}" for rate in values)] for name, values in rates.items()]
    print(*table_lines(["output tokens a second", *(f"run {i + 1}" for i in range(rounds))], lines), sep="\n")
    print(f"with all requests on JSON the best run loses {lost:.1f} %")
    return {"rates": rates, "lost_percent": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, help="that make masks; default: all cores but one, at most 16")
    parser.add_argument("--headline", action="store_true")
    parser.add_argument("--model", default=str(Path(__file__).parent / "shapes" / "qwen3-0.6b"))
    parser.add_argument("--tokenizer", help="a folder with one; default: a made one as large as Qwen3's")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of --headline")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1, help="divide the headline's numbers of requests and tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.headline:
        report = measure_headline(args.model, args.tokenizer, args.device, args.max_model_len, args.shrink, args.rounds)
    else:
        report = measure_masks(args.rows, args.steps, args.threads, args.tokenizer)
    report |= {"arguments": vars(args), "machine": describe_machine(args.device if args.headline else "cpu")}
    print(json.dumps(report | describe_versions()))


if __name__ == "__main__":
    main()
