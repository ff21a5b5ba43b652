"""Runs the examples in vLLM's source package under the alias, and prints a Markdown table of which ones ran.

    pip download --no-deps --no-binary :all: vllm==0.24.0     # or take the .tar.gz from PyPI's page, and unpack it
    python tools/run_vllm_examples.py vllm-0.24.0

The script runs every example that makes an engine in its own process. It changes nothing in a file but the names of
models, so that no hub is needed: they become the demo model, with a chat template and a longer context in its config.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanovllm import demo_model

ROOT = Path(__file__).parents[1]
CONTEXT = 32768
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# ENGINE finds the calls that make an engine; MODEL finds names of models, as in `model="…"`.
ENGINE = re.compile(r"^(?!#).*\b(LLM|LLMEngine|AsyncLLM|AsyncLLMEngine)(\.from_engine_args)?\(", re.MULTILINE)
MODEL = re.compile(r"""(\bmodel(?:_name|_path)?\s*=\s*)(["'])[\w.-]+/[\w.-]+\2""")
ARGUMENTS = {
    "llm_engine_example.py": ["--model", "{model}"],
    "reset_kv_offline.py": ["--model", "{model}"],
    "data_parallel_offline.py": ["-dp", "2"],
    "data_parallel.py": ["--dp-size", "2", "--tp-size", "1"],
    "run_one_batch_offline.py": ["--profile", "both", "--profile-dir", "profile"],
    "save_sharded_state_offline.py": ["--model", "{model}", "--output", "sharded"],
    "save_sharded_state.py": ["--model", "{model}", "--output", "sharded"],
    "load_sharded_state_offline.py": ["--model", "sharded"],
    "load_sharded_state.py": ["--model", "sharded"],
}
LAST = ("load_sharded_state_offline.py", "load_sharded_state.py")  # these read what other examples have written


def make_model(folder: Path) -> Path:
    """Make a copy of the demo model with a chat template, and a context long enough for the examples' prompts."""
    folder.mkdir()
    for file in Path(demo_model()).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def examples(source: Path) -> list[Path]:
    """The files that make an engine, sorted by path, those of `LAST` at the end."""
    files = [f for f in sorted((source / "examples").rglob("*.py")) if ENGINE.search(f.read_text())]
    return sorted(files, key=lambda f: f.name in LAST)


def run(file: Path, model: Path, work: Path, timeout_s: float) -> tuple[bool, str, str]:
    """Run an example. Returns (whether it ran, its last line or error, all of its output)."""
    copy = work / file.parent.name / file.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(MODEL.sub(lambda m: f"{m[1]}{str(model)!r}", file.read_text()))
    arguments = [a.format(model=model) for a in ARGUMENTS.get(file.name, [])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "nanovllm.vllm", str(copy), *arguments]
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, text=True, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        return False, f"not finished in {timeout_s:.0f} s", str(error.stdout) + str(error.stderr)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else "", done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the unpacked source package")
    parser.add_argument("--only", default="", help="run only examples whose path contains this")
    parser.add_argument("--timeout", type=float, default=180.0, help="most seconds for each example")
    parser.add_argument("--verbose", action="store_true", help="show the examples' output")
    args = parser.parse_args()
    num_run = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work / "model")
        files = [f for f in examples(args.source) if args.only in str(f)]
        print("| example | runs | seconds | why not |\n| --- | --- | --- | --- |", flush=True)
        for file in files:
            start = time.perf_counter()
            ran, last, output = run(file, model, work, args.timeout)
            num_run += ran
            name = file.relative_to(args.source / "examples")
            seconds = f"{time.perf_counter() - start:.1f}"
            print(f"| `{name}` | {'yes' if ran else 'no'} | {seconds} | {'' if ran else last} |", flush=True)
            if args.verbose:
                print(output)
    print(f"\n{num_run} of {len(files)} run")


if __name__ == "__main__":
    main()
