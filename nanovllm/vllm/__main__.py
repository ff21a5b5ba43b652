"""Runs a program for vLLM under the alias, as `__main__`: `python -m nanovllm.vllm program.py …`, or `-m module …`."""

import os
import runpy
import sys

from nanovllm import vllm

is_module = sys.argv[1:2] == ["-m"]
if len(sys.argv) < 2 + is_module:
    sys.exit("usage: python -m nanovllm.vllm (program.py | -m module) [its arguments]")
vllm.install()
del sys.argv[: 1 + is_module]
if is_module:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
