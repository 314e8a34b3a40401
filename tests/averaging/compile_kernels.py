"""Compile the kernels for a GPU that need not be here: ``python -m tests.averaging.compile_kernels 90``.

Triton needs no driver for that if it is told the target. The assembly shows whether 16 bytes are read at a time.
"""

import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_slowmo.averaging.kernels import passes

OPERATIONS = ((True, 1, 2), (False, 4, 4), (True, 5, 3), (True, 0, 6))
TABLES = {"tiles": "*i64", "addresses": "*i64"}
NUMBERS = {"numbers": "*fp64", "squares": "*fp64", "numel": "i32", "period": "i32", "piece": "i32", "limit": "i32"}


def assembly(target: GPUTarget, kernel, types: dict[str, str], constants: dict) -> str:
    names = kernel.arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]


def compile_for(capability: int) -> list[str]:
    """Compile everything; what was seen in the assembly."""
    target, seen = GPUTarget("cuda", capability, 32), []
    for kind, flat in ((tl.float32, "*fp32"), (tl.bfloat16, "*fp32"), (tl.float64, "*fp64")):
        for vector in (1, 4) if kind is tl.float32 else (4,):
            common = {"KIND": kind, "TILE": passes.TILE, "VECTOR": vector}
            copy = assembly(target, passes.gather, TABLES | {"flat": flat}, common)
            if kind is tl.float32 and vector == 4 and re.search(r"ld\.global[^;]*\.v4", copy):
                seen.append("16 bytes at a time")
            assembly(target, passes.correct, TABLES | {"sent": flat, "new": flat}, common)
            assembly(target, passes.find_nonfinite, TABLES | {"flag": "*i32"}, common)
            for operations, table in ((OPERATIONS, True), (OPERATIONS, False), ((), True)):
                types = TABLES | NUMBERS | dict.fromkeys(("own", "flat", "anchor", "momentum"), flat)
                state = bool(operations)
                more = {"OPERATIONS": operations, "RESULTS": (7, 6), "TABLE": table, "STATE": state, "DRIFT": True}
                assembly(target, passes.move, types, common | more)
    return seen


if __name__ == "__main__":
    print(*compile_for(int(sys.argv[1])), sep="\n")
