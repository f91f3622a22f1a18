"""What the driver is asked for by Triton and by records, through Triton's own launcher in C: see test_replay.py.

    python -m tests._driver FOLDER

A libcuda of stubs, which is made in the folder, prints each launch: its kernel, its grid, and what the kernel is
given. Prints the launches of two steps of location attention, the first and one from a record, without pointers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

STUBS = """
#include <stdio.h>
#include "cuda.h"
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuDeviceGet(CUdevice *device, int i) { *device = 0; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return 0; }
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)to = p; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  long kernel = (long)f;  /* its number, times 1000, and how many parameters it has */
  printf("launch %ld %u %u %u %u %u", kernel, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->sharedMemBytes);
  for (long i = 0; i < kernel % 1000; i++) printf(" %d", *(int *)params[i]);
  printf("\\n");
  fflush(stdout);
  return 0;
}
"""


def flat(kind: Any) -> list[str]:
    """Types of the parameters that the compiled kernel has."""
    if isinstance(kind, tuple):
        return [x for y in kind for x in flat(y)]
    return [] if kind == "constexpr" else [kind]


def main(folder: Path) -> None:
    """Print the two steps."""
    import triton

    (folder / "stubs.c").write_text(STUBS)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{include}", "-o", library, folder / "stubs.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    run = [sys.executable, "-m", "tests._driver", folder, "steps"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    steps: list[list[Any]] = []
    kinds: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        word, *rest = line.split()
        if word == "step":
            steps.append([])
        elif word == "kernel":
            kinds[rest[0]] = rest[1:]
        else:
            values = zip(kinds[rest[0]], rest[6:], strict=True)
            steps[-1].append([*rest[:6], *(f"{kind} {x}" for kind, x in values if not kind.startswith("*"))])
    print(json.dumps([steps[1], steps[-1]]))


def launch() -> None:
    """Make the steps, in a process that finds the stubs."""
    from bench import compile_report, host  # before the kernels, which are then not the interpreter's

    # isort: split

    import triton.backends.nvidia.driver as nvidia
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from fused_attn.kernels import replay

    kernels: list[Any] = []

    def handles(self: Any) -> None:
        if self.function is None:
            kinds = flat(tuple(self.src.signature.values()))
            kernels.append(self)
            self.function = 1000 * len(kernels) + len(kinds)
            self._run = nvidia.CudaLauncher(self.src, self.metadata)
            print("kernel", self.function, *kinds, flush=True)

    with (
        compile_report.as_on_a_gpu(),
        patch.object(CompiledKernel, "_init_handles", handles),
        patch.object(nvidia, "PyCUtensorMap", object),
        compile_report.launches("sm_90", JITFunction.run, device=-1),
    ):
        print("step", flush=True)  # of its own, a forward
        step = host.Step(host.ROWS["location"]())
        for _ in range(replay.SEEN + 2):
            print("step", flush=True)
            step.both()
    assert all(isinstance(x, replay.Record) and x.hooks for x in replay._records.values())


if __name__ == "__main__":
    launch() if sys.argv[2:] else main(Path(sys.argv[1]))
