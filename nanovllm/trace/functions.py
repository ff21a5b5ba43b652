"""The functions that a trace's events name, with their source as this engine runs it."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import nanovllm
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.text_engine import TextEngine

PACKAGE = Path(nanovllm.__file__).parent
NAMED = {
    Scheduler: ("add", "_admit_waiting", "_continue_prefills", "_preempt_latest"),
    BlockManager: ("find_prefix", "_take"),
    Sequence: ("append_token",),
    LLMEngine: ("abort", "_fail"),
    TextEngine: ("_detokenize",),
}


def functions() -> dict[str, dict[str, Any]]:
    """{"Scheduler._preempt_latest": {"file": "engine/scheduler.py", "line": …, "source": "def …"}, …}."""
    found = {}
    for cls, names in NAMED.items():
        file = Path(inspect.getfile(cls)).relative_to(PACKAGE).as_posix()
        for name in names:
            lines, line = inspect.getsourcelines(getattr(cls, name))
            source = textwrap.dedent("".join(lines)).rstrip()
            found[f"{cls.__name__}.{name}"] = {"file": file, "line": line, "source": source}
    return found
