"""Records what an engine does into a file, which the server's page can show later.

with record(llm, "run.jsonl"):
    llm.generate(prompts, params)
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovllm.engine.step_trace import StepTrace, shape_of
from nanovllm.llm import LLM
from nanovllm.trace.writer import Object, TraceWriter, head


@contextmanager
def record(llm: LLM, path: str | os.PathLike[str], model: str | None = None) -> Iterator[None]:
    """Within it every step of the engine becomes lines of the file.

    Args:
        model: the name in the head; default: the last part of the model's path.

    Raises:
        RuntimeError: the engine has an observer already.
        OSError: the file cannot be written.
    """
    engine = llm.engine
    if engine.observer is not None:
        raise RuntimeError("this engine has an observer already: take it away first (engine.observer = None)")
    writer = TraceWriter()
    with open(path, "w", encoding="utf-8") as file:
        file.write(line(head(shape_of(engine), model or Path(engine.config.model).name)))

        def write(trace: StepTrace) -> None:
            file.writelines(map(line, writer.objects(trace)))

        engine.observer = write
        try:
            yield
        finally:
            engine.observer = None


def line(thing: Object) -> str:
    """An object as its line of a trace."""
    return json.dumps(thing, ensure_ascii=False, separators=(",", ":")) + "\n"
