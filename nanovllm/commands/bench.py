"""`nanovllm bench` runs the repository's bench.py, which is not in the wheel: it measures a checkout against others.

The benchmark compares engines, draws charts, and tunes kernels; it needs the model shapes and tools beside it. The
package stays free of them, so the command hands on to the file if the package lies in its repository.
"""

import os
import sys
from pathlib import Path

import typer

import nanovllm
from nanovllm.commands.shared import fail

BENCH = Path(nanovllm.__file__).parents[1] / "bench.py"
HOW_TO_GET_IT = (
    "the benchmark is in nano-vLLM's repository, and not in its wheel: clone the repository, "
    "`pip install --editable .` there, and call this again, or call `python bench.py` in it"
)


def bench(ctx: typer.Context) -> None:
    """Measure the headline, latency, or all goals, with bench.py of the repository; its own --help has the options.

    nanovllm bench --streams 1,8,32 is python bench.py --streams 1,8,32.
    """
    if not (BENCH.is_file() and (BENCH.parent / "benchmarks").is_dir()):
        fail(HOW_TO_GET_IT)
    os.execv(sys.executable, [sys.executable, str(BENCH), *ctx.args])
