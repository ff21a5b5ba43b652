"""`python -m nanovllm.vllm program.py …` runs a program for vLLM: the alias, and then the program as `__main__`."""

import os
import runpy
import sys

from nanovllm import vllm

if len(sys.argv) < 2:
    sys.exit("usage: python -m nanovllm.vllm program.py [its arguments]")
vllm.install()
del sys.argv[0]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
