"""vLLM's module paths, and the alias under which a program for vLLM runs unchanged."""

import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from inside import names_of_vllms_paths

import nanovllm
import nanovllm.vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The alias, for one test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    nanovllm.vllm.install()
    yield
    for name in {name for name in sys.modules if name.partition(".")[0] == "vllm"} - before:
        del sys.modules[name]


@pytest.mark.parametrize(("path", "names"), names_of_vllms_paths().items())
def test_each_path_has_the_names_that_programs_import_from_it(path: str, names: Iterable[str]) -> None:
    module = importlib.import_module(f"nanovllm.vllm.{path}")
    for name in names:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchThing'"):
        module.NoSuchThing  # noqa: B018


def test_the_package_has_vllms_own_names_and_so_has_nanovllm() -> None:
    for name in nanovllm.vllm.__all__:
        assert getattr(nanovllm, name) is getattr(nanovllm.vllm, name)
    assert nanovllm.vllm.LLM is nanovllm.LLM
    with pytest.raises(AttributeError, match="NoSuchThing"):
        nanovllm.NoSuchThing  # noqa: B018


def test_under_the_alias_modules_are_the_same_ones(alias: None) -> None:
    import vllm
    import vllm.v1.engine.async_llm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind

    assert vllm is nanovllm.vllm
    assert EngineArgs is importlib.import_module("nanovllm.vllm.engine.arg_utils").EngineArgs
    assert RequestOutputKind is nanovllm.RequestOutputKind
    assert vllm.v1.engine.async_llm.AsyncLLM is nanovllm.AsyncLLM
    assert find_spec("vllm") is not None and find_spec("vllm.no_such_module") is None
    assert version("vllm") == vllm.__version__
    with pytest.raises(ModuleNotFoundError, match="vllm.multimodal"):
        importlib.import_module("vllm.multimodal")


def test_another_vllm_that_is_there_already_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", sys)
    with pytest.raises(RuntimeError, match="imported already"):
        nanovllm.vllm.install()


def test_what_is_absent_can_be_imported_and_refuses_to_be_used() -> None:
    from nanovllm.vllm.config import StructuredOutputsConfig
    from nanovllm.vllm.lora.request import LoRARequest

    with pytest.raises(NotImplementedError, match="LoRARequest: there are no LoRA adapters"):
        LoRARequest("name", 1, "path")
    with pytest.raises(NotImplementedError, match="each request says itself"):
        StructuredOutputsConfig(backend="xgrammar")
    with pytest.raises(NotImplementedError, match="nanovllm/models"):
        nanovllm.vllm.ModelRegistry.register_model("name", object)
    assert not isinstance(1, LoRARequest)


PROGRAM = """
import multiprocessing
import sys

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def in_a_child(queue):
    from vllm.engine.arg_utils import EngineArgs

    queue.put((EngineArgs(model="m").model, "torch" in sys.modules))


if __name__ == "__main__":
    queue = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=in_a_child, args=(queue,))
    child.start()
    print(*queue.get(timeout=60))
    child.join()
    llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, num_gpu_blocks_override=8)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=[65, 66])], SamplingParams(max_tokens=3, temperature=0))
    print(outputs[0].outputs[0].token_ids)
"""


def test_a_program_for_vllm_runs_as_it_is_and_so_do_the_processes_that_it_starts(
    text_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "nanovllm.vllm", str(tmp_path / "program.py"), str(text_model)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "m False"  # importing the names loads no PyTorch
    assert len(lines) == 2 and lines[1].count(",") == 2


def test_a_module_is_run_too_and_nothing_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import sys, vllm\nprint(vllm.__version__, *sys.argv[1:])")
    environment = {"PYTHONPATH": str(ROOT)}
    for arguments, expected in ((["-m", "module", "a"], "0.24.0 a"), (["module.py", "a"], "0.24.0 a"), (["-m"], "")):
        command = [sys.executable, "-m", "nanovllm.vllm", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
        assert ("usage:" in done.stderr) is not bool(expected)
