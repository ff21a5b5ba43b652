"""Every kernel compiles for a Hopper GPU; a CPU is enough to check that."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nanovllm.kernels

HERE, KERNELS = Path(__file__).parent, Path(nanovllm.kernels.__file__).parent


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pattern = re.compile(r"^@triton\.jit.*\ndef (_\w+_kernel)\(", re.MULTILINE)
    kernels = {name for path in KERNELS.rglob("*.py") for name in pattern.findall(path.read_text())}
    assert len(kernels) > 8
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(KERNELS.parents[1]), str(HERE.parent)]
    done = subprocess.run(
        [sys.executable, HERE / "compile_kernels.py"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == kernels
