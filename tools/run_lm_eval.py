"""Runs lm-eval's `vllm` model class on nano-vLLM, under the alias, and compares every answer with its `hf` class's.

    pip install "lm_eval[hf,api]"       # better in its own environment: it installs some 40 packages
    python tools/run_lm_eval.py
    python tools/run_lm_eval.py --server    # its `local-completions` class on `nanovllm serve`, against `hf`

The tasks are in this file, so lm-eval fetches nothing: choices by log-likelihood, text until a stop string, and rolling
log-likelihoods. The model is the demo model, in float32 on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nanovllm.vllm
from nanovllm import demo_model

TOLERANCE = 1e-4  # of a log-likelihood, a sum over some ten tokens in float32
CHOICES = [
    ("import os\n\ndef read(path):\n    with open(path) as", [" f:", " path:", " 7:"]),
    ("for i in range(10):\n    print(", ["i)", "yield)", "10:"]),
    ("class Point:\n    def __init__(self, x, y):\n        self.x =", [" x\n", " y\n", " import\n"]),
    ("try:\n    value = int(text)\nexcept", [" ValueError:", " text:", " value"]),
    ("def add(a, b):\n    return a", [" + b", " - a", " class"]),
    ("if x is not", [" None:", " import:", " def:"]),
    ("while", [" True:", " self:", " import:"]),
    ("import sys\n\nif __name__ ==", [" '__main__':", " 'sys':", " 3:"]),
]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "lines": """
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n", "def "], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}


def write_tasks(folder: Path) -> None:
    lines = [json.dumps({"text": text, "choices": choices}) for text, choices in CHOICES]
    (folder / "choices.jsonl").write_text("\n".join(lines))
    for name, content in TASKS.items():
        (folder / f"{name}.yaml").write_text(content.replace("FOLDER", str(folder)))


def answers(
    model: str, folder: Path, model_args: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run the tasks. Returns ({task: metrics}, {task: the model's answers in order}).

    A log-likelihood's answer is (its sum, whether greedy decoding gives that text).
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=model,
        model_args=model_args,
        **options,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    by_task = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in results["samples"].items()
    }
    return results["results"], by_task


def flat(value: Any) -> list[Any]:
    return [x for v in value for x in flat(v)] if isinstance(value, list | tuple) else [value]


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of the demo model's, which ends with the block."""
    command = [sys.executable, "-m", "nanovllm", "serve", demo_model(), "--port", "0", "--served-model-name", "demo"]
    command += ["--device", "cpu", "--dtype", "float32", "--no-log-requests"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = next((line for line in process.stdout if line.startswith("nano-vLLM serves")), None)
        if said is None:
            sys.exit("the server has ended before it served")
        yield f"http://{said.split()[-1]}/v1/completions"
    finally:
        process.terminate()
        process.wait()


def server_answers(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    with server() as address:
        model_args = {"base_url": address, "model": "demo", "tokenizer": demo_model(), "num_concurrent": 4}
        return answers("local-completions", folder, {**model_args, "max_length": 2048, "max_retries": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", action="store_true", help="run lm-eval's local-completions class on a server")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    nanovllm.vllm.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "datasets"))
        write_tasks(folder)
        start = time.perf_counter()
        own = {"pretrained": demo_model(), "dtype": "float32"}
        if args.server:
            ours, our_answers = server_answers(folder)
        else:
            ours, our_answers = answers("vllm", folder, own, batch_size="auto")
        between = time.perf_counter()
        theirs, their_answers = answers("hf", folder, own, device="cpu", batch_size=1)
        seconds = between - start, time.perf_counter() - between
    name = "local-completions class on a server" if args.server else "vllm class on nano-vLLM"
    print(f"\n{name}: {seconds[0]:.1f} s, hf class: {seconds[1]:.1f} s, tasks and imports included")
    is_equal = True
    for task in TASKS:
        pairs = list(zip(flat(our_answers[task]), flat(their_answers[task]), strict=True))
        numbers = [abs(a - b) for a, b in pairs if isinstance(a, float)]
        others = [a == b for a, b in pairs if not isinstance(a, float)]
        is_equal &= max(numbers, default=0.0) < TOLERANCE and all(others)
        said = [f"{len(numbers)} log-likelihoods, at most {max(numbers):.1e} apart"] if numbers else []
        said += (
            [f"{sum(others)} of {len(others)} {'texts' if task == 'lines' else 'greedy flags'} equal"] if others else []
        )
        print(f"{task}: {'; '.join(said)}")
        for key, value in ours[task].items():
            if isinstance(value, float):
                print(f"    {key}: {value:.6f} and {theirs[task][key]:.6f}")
    if not is_equal:
        sys.exit("the answers of the two classes differ")


if __name__ == "__main__":
    main()
