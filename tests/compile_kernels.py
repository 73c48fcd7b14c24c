"""Compile the Triton kernels for sm_80, sm_90 and sm_100 without a GPU or a driver; print one JSON row for each.

A program of its own because a process in which the kernels run under TRITON_INTERPRET=1 cannot compile them:

    env -u TRITON_INTERPRET python tests/compile_kernels.py

Row: kernel, types, target, registers a thread, stack and local bytes, local loads and stores (= spills), shared bytes,
loads from global memory by width in bits, and the order of loads, barriers and stores, repeats left out.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import add_rmsnorm, decode_attention, qk_norm_rope, swiglu  # noqa: E402
from kernels import segment_logprob as op  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
V = 151936  # Qwen3
HEADS = dict(HALF=64, WIDTH=64, HEADS=qk_norm_rope.HEADS, NORM=True)
ROW = dict(BLOCK=4096)
SHARED = dict(SHARED=4, D=128, HEADS=16, WIDTH=128)
CASES = [
    (op._logp_kernel, "*fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32", dict(V=V, BLOCK=op.BLOCK), op.WIDE),
    *[
        (op._direction_kernel, f"*fp32 *i64 *fp32 *fp32 *fp32 *{G} i32 i32", dict(V=V, BLOCK=op.BLOCK), op.WIDE)
        for G in ("bf16", "fp32")
    ],
    (op._segment_sum_kernel, "*fp32 *fp32 *i64 *fp32 *fp32", dict(BLOCK=op.SUM_BLOCK), op.NARROW),
    *[
        (op._row_scale_kernel, f"*{R} *fp32 *i64 *fp32 *fp32 *{R} i32", dict(BLOCK=op.SCALE_BLOCK), op.NARROW)
        for R in ("bf16", "fp32")
    ],
    # "any" marks a number that need not be a multiple of 16.
    (swiglu._forward_kernel, "*bf16 *bf16 i32", dict(BLOCK=swiglu.BLOCK), op.NARROW),
    (swiglu._backward_kernel, "*bf16 *bf16 *bf16 i32", dict(BLOCK=swiglu.BLOCK), op.NARROW),
    *[
        (qk_norm_rope._forward_kernel, f"{'*bf16 ' * 8}*i64 {length} i32 any:i32 any:fp32", HEADS | cached, op.NARROW)
        for length, cached in (("any:i32", dict(CACHED=False)), ("i32", dict(CACHED=True)))
    ],
    (qk_norm_rope._backward_kernel, "*bf16 " * 9 + "i32 any:i32 any:fp32", HEADS, op.NARROW),
    *[
        (add_rmsnorm._forward_kernel, "*bf16 " * 5 + "*fp32 i32 any:fp32", dict(SUM=both) | ROW, op.WIDE)
        for both in (True, False)
    ],
    *[
        (
            decode_attention._kernel,
            f"*{kind} *{kind} *{kind} *i64 *{kind} i32 any:fp32",
            SHARED | dict(BLOCK=decode_attention.block_of(128, size), WIDEN=size == 4),
            op.NARROW,
        )
        for kind, size in (("bf16", 2), ("fp32", 4))
    ],
    (add_rmsnorm._backward_kernel, "*bf16 *bf16 *fp32 *bf16 *bf16 *bf16 i32", ROW, op.WIDE),
]


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def compile_one(kernel, types: str, constants: dict[str, int], options: dict, capability: int) -> dict:
    """Compile as the launcher would for 16-byte aligned tensors whose rows are multiples of 16 elements."""
    names = kernel.arg_names
    kinds = types.split()
    signature = dict(zip(names, [t.removeprefix("any:") for t in kinds] + ["constexpr"] * len(constants), strict=True))
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if not kind.startswith("any:")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", str(cubin))))
        sass = tool("nvdisasm", "-c", str(cubin))
    loads = [int(width or 32) for width in re.findall(r"\bLDG\.E(?:\.\w+)*?(?:\.(64|128|256))?(?:\.\w+)* ", sass)]
    order = re.findall(r"\b(LDG|BAR|STG)\b", sass)
    return {
        "kernel": f"{Path(kernel.fn.__code__.co_filename).stem}.{kernel.__name__}",
        "types": types,
        "target": f"sm_{capability}",
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "loads": {str(width): loads.count(width) for width in sorted(set(loads))},
        "order": " ".join(kind for kind, _ in itertools.groupby(order)),
    }


def main() -> None:
    for case in CASES:
        for capability in (80, 90, 100):
            print(json.dumps(compile_one(*case, capability)), flush=True)


if __name__ == "__main__":
    main()
