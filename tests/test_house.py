"""Who may name whom: the tests reach private parts through `inside.py` alone, and the package imports one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanovllm

TESTS, PACKAGE = Path(__file__).parent, Path(nanovllm.__file__).parent
# Private parts of PyTorch, Triton, asyncio and pytest-xdist: their own tests would not know a public name either.
OF_OTHERS = {
    "_assign_work_unit",  # what xdist's scheduler gives a worker next
    "_base",  # the tensor of which one is a view
    "_convert_float",  # a cast in Triton's interpreter, which interpreter.py mends
    "_log_destroy_pending",  # whether a task complains that its loop was closed over it
    "_patch_attr",  # how Triton's interpreter takes the place of one builtin, and of all of a module's
    "_patch_builtin",
}
PLAIN_DATA = ("step_plan", "cache_groups", "outputs", "sampling_params", "structured_outputs", "config", "errors")
# What each room may import of the package, beside itself. The rooms not named here are free.
MAY_IMPORT = {
    "kernels": ("sampling_params",),
    "layers": ("kernels", "distributed.tensor_parallel"),
    "models": ("layers", "kernels", "distributed.tensor_parallel", "config", "sampling_params"),
    "text": ("sampling_params", "structured_outputs", "config", "models.gguf_file"),
    **{module: ("vllm_defaults", "errors", "structured_outputs") for module in PLAIN_DATA},
    # The way back up is closed: nothing that works on a device knows the engine or a front.
    "worker": ("kernels", "layers", "models", "distributed.tensor_parallel", *PLAIN_DATA),
    "distributed": ("kernels", "models", "worker", *PLAIN_DATA),
    "server.parsing": (),
}


def private_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each reach for a private part of something else, spelled as code or as a string to patch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and name_of(node.func) in ("setattr", "getattr", "hasattr", "delattr"):
            for argument in node.args[:2]:  # (owner, "name", …), or monkeypatch's ("module.name", …)
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from ((node.lineno, part) for part in argument.value.split(".") if is_private(part))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_tests_reach_private_parts_through_the_probes_alone() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {name}"
        for path in TESTS.rglob("*.py")
        if path != TESTS / "inside.py"
        for line, name in private_parts(ast.parse(path.read_text()))
        if name not in OF_OTHERS
    ]
    assert not found, "give it a name in tests/inside.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("llm._thread.submit(request)", ["_thread"]),
        ("from nanovllm.llm import _helper", ["_helper"]),
        ("monkeypatch.setattr(kernels, '_launch', None)", ["_launch"]),
        ("monkeypatch.setattr('nanovllm.distributed.ranks._start_rank', None)", ["_start_rank"]),
        ("self._thread = llm.thread.__class__, [_ for _ in ()]", []),
    ],
)
def test_a_private_part_is_found_however_it_is_spelled(code: str, names: list[str]) -> None:
    assert [name for _, name in private_parts(ast.parse(code))] == names


def modules() -> dict[str, Path]:
    """The package's modules by dotted name, without what pretends to be vLLM's distribution."""
    paths = [path for path in PACKAGE.rglob("*.py") if not {"alias", "assets"} & set(path.parts)]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


MODULES = modules()


def imports_of(node: ast.AST, in_function: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether only when a function is called) of each import that runs: TYPE_CHECKING is false."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "the package imports by full names"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in MODULES else child.module, in_function
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield from imports_of(ast.Module([statement], []), in_function)
        else:
            yield from imports_of(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


IMPORTS = {name: list(imports_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def is_in(module: str, *rooms: str) -> bool:
    return any(f"{module}.".startswith(f"nanovllm.{room}.") for room in rooms)


def test_the_imports_of_all_modules_were_read() -> None:
    assert len(MODULES) > 50 and ("nanovllm.layers.linear", False) in IMPORTS["nanovllm.models.blocks"]
    assert any(in_function for _, in_function in IMPORTS["nanovllm.engine.llm_engine"])
    code = "if TYPE_CHECKING:\n    import torch\nelse:\n    import os\ndef f():\n    import re"
    assert list(imports_of(ast.parse(code))) == [("os", False), ("re", True)]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    of_the_room = {name: imports for name, imports in IMPORTS.items() if is_in(name, room)}
    assert of_the_room, "there is no such room any more"
    for name, imports in of_the_room.items():
        ours = {module for module, _ in imports if module.partition(".")[0] == "nanovllm"}
        wrong = {module for module in ours if not is_in(module, room, *MAY_IMPORT[room])}
        assert not wrong, f"{name} imports {wrong}"


def test_what_decides_and_what_reads_text_imports_no_torch() -> None:
    """At module level: the engine's constructor brings in what works on the device."""
    for name, imports in IMPORTS.items():
        if is_in(name, "engine", "text", *PLAIN_DATA):
            roots = {module.partition(".")[0] for module, in_function in imports if not in_function}
            assert not roots & {"torch", "triton", "transformers"}, name


def test_no_module_needs_itself_to_be_imported() -> None:
    waiting: list[str] = []
    done: set[str] = set()

    def visit(name: str) -> None:
        assert name not in waiting, "a cycle: " + " -> ".join([*waiting[waiting.index(name) :], name])
        if name in done:
            return
        waiting.append(name)
        for module, in_function in IMPORTS[name]:
            if module in MODULES and not in_function:
                visit(module)
        done.add(waiting.pop())

    for name in MODULES:
        visit(name)
