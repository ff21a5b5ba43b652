"""KeyboardInterrupts before chosen statements, as many as one likes: the second while the first is being handled.

A signal's handler may raise between any two statements. `sys.settrace` can raise but once, since Python drops a trace
function that raises; so the modules' functions get, for a while, code in which each statement is preceded by a call.
"""

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, ModuleType

TICK = "tick_of_the_tests"  # the name under which the changed code finds what it calls


class Interrupts:
    """Counts the statements that are executed, and interrupts before chosen ones.

    Attributes:
        passed: (module, line) of each statement since `arm`.
    """

    def __init__(self) -> None:
        self.passed: list[tuple[str, int]] = []
        self.due: list[int] = []

    def arm(self, gaps: list[int]) -> None:
        """Interrupt after so many statements, after so many more, and so on. Empty: only count."""
        self.passed = []
        self.due = [sum(gaps[: i + 1]) for i in range(len(gaps))]

    def tick(self, module: str, line: int) -> None:
        self.passed.append((module, line))
        if self.due and len(self.passed) > self.due[0]:
            self.due.pop(0)
            raise KeyboardInterrupt

    @contextmanager
    def in_code_of(self, modules: list[ModuleType]) -> Iterator[None]:
        """The functions of these modules tick, until the `with` is left."""
        changed: list[tuple[FunctionType, CodeType]] = []
        try:
            for module in modules:
                setattr(module, TICK, self.tick)
                codes = _codes_with_ticks(module)
                for function in _functions_of(module):
                    code = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
                    if code is not None:
                        changed.append((function, function.__code__))
                        function.__code__ = code
            assert changed
            yield
        finally:
            for function, code in changed:
                function.__code__ = code


def _functions_of(module: ModuleType) -> Iterator[FunctionType]:
    owners = [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)]
    for owner in owners:
        for value in vars(owner).values():
            function = value.fget if isinstance(value, property) else inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def _codes_with_ticks(module: ModuleType) -> dict[tuple[str, int], CodeType]:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            _put_ticks(node, module.__name__)
    found: dict[tuple[str, int], CodeType] = {}
    to_visit = [compile(ast.fix_missing_locations(tree), module.__file__, "exec", dont_inherit=True)]
    while to_visit:
        for constant in to_visit.pop().co_consts:
            if isinstance(constant, CodeType):
                found[constant.co_qualname, constant.co_firstlineno] = constant
                to_visit.append(constant)
    return found


def _put_ticks(node: ast.AST, name: str) -> None:
    for field in ("body", "orelse", "finalbody", "handlers"):
        statements = getattr(node, field, [])
        if not isinstance(statements, list):
            continue  # of an expression
        for statement in statements:
            if not isinstance(statement, ast.FunctionDef):  # whose own turn comes
                _put_ticks(statement, name)
        if field != "handlers":
            ticking: list[ast.stmt] = []
            for statement in statements:
                call = ast.parse(f"{TICK}({name!r}, {statement.lineno})").body[0]
                is_declaration = isinstance(statement, ast.Nonlocal | ast.Global)
                ticking += [statement] if is_declaration else [ast.copy_location(call, statement), statement]
            setattr(node, field, ticking)
