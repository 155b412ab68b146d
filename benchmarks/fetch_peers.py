"""
Takes the Triton kernels that others publish out of a vLLM wheel, so that `group_gemm.py` can measure them beside ours.

Three things are taken and none is changed: the folder `triton_kernels` (Triton's own, MIT), the jitted functions of
`fused_moe.py` (vLLM's, Apache-2.0) without the imports of the rest of vLLM around them, and the licence. They land in a
folder that is not part of the repository; `group_gemm.py --peers FOLDER` finds them there.

    pip download --no-deps vllm==0.20.2 && python benchmarks/fetch_peers.py vllm-0.20.2-*.whl .peers
"""

from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path

TRITON_KERNELS = "vllm/third_party/triton_kernels/"
FUSED_MOE = "vllm/model_executor/layers/fused_moe/fused_moe.py"
HEADER = "# Taken from the vLLM wheel: Apache-2.0, Copyright contributors to the vLLM project\n"


def jitted(source: str) -> str:
    """Only the functions that Triton compiles, with their own text, behind the imports that they need."""
    lines = source.splitlines()
    kept = [HEADER + "import triton\nimport triton.language as tl\n"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "triton.jit" for one in node.decorator_list):
            first = min(one.lineno for one in node.decorator_list)
            kept.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(kept) + "\n"


def fetch(wheel: Path, folder: Path) -> list[str]:
    """Write the peers and give their paths back."""
    written: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(TRITON_KERNELS) and name.endswith(".py"):
                target = folder / name.removeprefix("vllm/third_party/")
            elif name.endswith("licenses/LICENSE"):
                target = folder / "LICENSE.vllm"
            elif name == FUSED_MOE:
                target = folder / "vllm_fused_moe.py"
            else:
                continue
            data = archive.read(name).decode()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(jitted(data) if name == FUSED_MOE else data)
            written.append(str(target))
    return written


if __name__ == "__main__":
    sys.stdout.write("\n".join(fetch(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
