"""The kernels on a GPU: the same text as on the processor, translated for Triton.

blocks.py and search.py are written for numba, which takes more of Python than Triton does. Here a `Row` is read,
written and moved on by calls, which threads.py defines, and so is a number divided; a chain of assignments becomes
several; a program has one group of super-blocks, so the loop over groups goes; annotations go, constants are wrapped.
Rows are known by their names: `s.<anything>`, `_ROWS` and `_BASES`. So there is one text of each kernel, with one order
of operations. In Triton's interpreter, for tests, functions and constants stay Python's, and the device is "cpu".
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from . import ggml, threads

_ROWS = ("x", "w", "levels", "numbers", "flags", "block")  # names of Rows that are read or written by index
_BASES = ("row", "few")  # names of Rows that others begin behind


class _Translation(ast.NodeTransformer):
    def visit_Module(self, node: ast.Module) -> ast.Module:
        own = [item for item in node.body if not (isinstance(item, ast.ImportFrom) and item.level)]  # it is all in one
        node.body = [self.visit(item) if isinstance(item, ast.FunctionDef) else item for item in own]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        body = [self.visit(statement) for statement in node.body]
        node.body = [new for item in body for new in (item if isinstance(item, list) else [item])]
        node.args.args = [ast.arg(argument.arg) for argument in node.args.args]
        return node

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "groups":  # a program has one
            return [ast.Assign([node.target], _call("first_of_group")), *node.body]
        return node

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        value, statements = self.visit(node.value), list[ast.stmt]()
        for target in node.targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            assert len(parts) == 1 or len(node.targets) == 1, ast.unparse(node)
            names = [ast.Name(f"_{i}") if isinstance(part, ast.Subscript) else part for i, part in enumerate(parts)]
            statements.append(ast.Assign([ast.Tuple(names) if len(names) > 1 else names[0]], value))
            for name, part in zip(names, parts, strict=True):
                if isinstance(part, ast.Subscript):
                    statements.append(ast.Expr(_call("put", self.visit(part.value), self.visit(part.slice), name)))
            value = names[0]  # for the next target
        return statements

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        return _call("at", node.value, node.slice) if _is_row(node.value, _ROWS) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Div):
            return _call("divided", node.left, node.right)
        if isinstance(node.op, ast.Add) and _is_row(node.left, _BASES):
            return _call("beyond", node.left, node.right)
        return node


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name), list(arguments), [])


def _is_row(node: ast.expr, names: tuple[str, ...]) -> bool:
    match node:
        case ast.Attribute(value=ast.Name("s")):
            return True
        case ast.Call(func=ast.Name("row_of")):
            return True
    return isinstance(node, ast.Name) and node.id in names


@cache
def translated() -> ModuleType:
    """search.py and blocks.py in one module, as Triton reads them. It looks for their text in `linecache`."""
    module = ModuleType(f"{__name__}.translated")
    names = vars(module)
    names.update(vars(threads), WEIGHTS=ggml.WEIGHTS, vectors=module, search=module, __name__=module.__name__)
    for file in ("search.py", "blocks.py"):
        tree = _Translation().visit(ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8")))
        text, name = ast.unparse(ast.fix_missing_locations(tree)), f"<{file} for Triton>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), names)
    constants = {name: value for name, value in names.items() if name.strip("_").isupper()}
    names.update({name: _constant(value) for name, value in constants.items()}, f32=threads.f32)
    return module


def _constant(value: Any) -> Any:
    """A number of the module, or some, as Triton wants it."""
    if isinstance(value, np.ndarray):
        value = tuple(map(float, value))
    elif isinstance(value, np.floating):
        value = float(value)
    plain = threads.INTERPRETED or not isinstance(value, int | float | tuple)
    return value if plain else tl.constexpr(value)


def compiled(type_: str, device: str) -> Callable[[NDArray[np.float32], NDArray[np.float32] | None], Any]:
    """A function from super-blocks, one a row, and an importance for each column of the tensor to their bytes, and
    which of them are left to ggml."""
    module, lanes, side = translated(), int(threads.LANES), int(threads.SIDE)
    kernel, words = triton.jit(module.KERNELS[type_]), ggml.row_size(type_, ggml.WEIGHTS) // 2

    def run(blocks: NDArray[np.float32], importance: NDArray[np.float32] | None) -> Any:
        count = -(-len(blocks) // lanes) * lanes  # whole groups: the last super-block several times
        x = torch.from_numpy(np.require(blocks, requirements="W")).to(device)
        if count > len(x):
            x = torch.cat([x, x[-1:].expand(count - len(x), -1)])
        weights = None
        if importance is not None:
            columns = torch.from_numpy(np.require(importance, requirements="W")).to(device).view(-1, x.shape[1])
            weights = columns[torch.arange(count, device=device) % len(columns)]
        packed = torch.empty((count, words), dtype=torch.int16, device=device)
        irregular = torch.empty(count, dtype=torch.int8, device=device)
        scratch = torch.empty((int(module.SCRATCH), side), dtype=torch.float32, device=device)
        for start in range(0, count, side):
            part = slice(start, start + side)
            arguments = x[part], None if weights is None else weights[part], packed[part], irregular[part], scratch
            kernel[(len(x[part]) // lanes,)](*arguments, num_warps=1, enable_fp_fusion=False)
        bytes_ = packed[: len(blocks)].cpu().numpy().view(np.uint8)
        return bytes_, irregular[: len(blocks)].cpu().numpy() != 0

    return run
