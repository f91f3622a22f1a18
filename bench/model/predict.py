"""Predicted time of launches on a chip, from what their programs execute and what the chip can do."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from ..compile_report import TARGETS, _ptxas, _usage_cuda, code_of, loops_of
from .launches import Launch
from .rates import Chip

_WORK = re.compile(r"MUFU|FFMA|FADD|FMUL|\w*MMA|LDG|STG|LDS")


@dataclass
class Predicted:
    """Of one launch: clocks by unit, and the time in ms."""

    name: str
    units: dict[str, float]
    ms: float

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(self.units, key=lambda unit: self.units[unit])


@functools.cache
def _disassembled(kernel: Any) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Instructions of a disassembly, and its loops as spans of them; those that only wait for a barrier left out."""
    ops, spans = loops_of(code_of(kernel))
    return len(ops), tuple(sorted(x for x in spans if any(_WORK.match(op) for op in ops[slice(*x)])))


def executed(launch: Launch) -> tuple[float, bool]:
    """Instructions that all warps of a launch issue; whether loop by loop.

    A loop of the disassembly runs as often as that of the PTX, where both have the same loops in each other; where
    not (the assembler unrolled one), PTX instructions count by the ratio of the two lengths.
    """
    assert launch.code is not None
    total, spans = _disassembled(launch.kernel)
    depths = [1 + sum(x != y and y[0] <= x[0] and x[1] <= y[1] for y in spans) for x in spans]
    warps = launch.threads / 32
    if depths != [depth for _, depth in launch.code.headers]:
        return launch.counts.instructions * warps * total / launch.code.length, False

    def own(span: tuple[int, int]) -> int:
        inner = [x for x in spans if x != span and span[0] <= x[0] and x[1] <= span[1]]
        outermost = [x for x in inner if not any(x != y and y[0] <= x[0] and x[1] <= y[1] for y in inner)]
        return span[1] - span[0] - sum(b - a for a, b in outermost)

    found = own((0, total)) * float(launch.programs) if (0, total) not in spans else 0.0
    found += sum(own(x) * launch.counts.blocks[at] for x, (at, _) in zip(spans, launch.code.headers, strict=True))
    return found * warps, True


def resident(launch: Launch, target: str, chip: Chip) -> int:
    """Programs that an SM has at once, by their registers, shared memory and threads."""
    registers, _, _ = _usage_cuda(_ptxas(launch.kernel, TARGETS[target][0]))
    by_registers = 65536 // (-(-registers // 8) * 8 * launch.threads)
    shared = launch.kernel.metadata.shared + 1024  # of which the system keeps one KiB
    return max(1, min(by_registers, chip.shared_kib * 1024 // shared, chip.threads // launch.threads, chip.programs))


def predict(launch: Launch, target: str, chip: Chip) -> Predicted:
    """Time of one launch: the unit that takes longest, what is serial, and what a launch takes.

    Each unit's clocks are those of the SM that has most programs, whose programs are alike; memory is the chip's, and
    has every tensor once where it fits L2, and as often as it is asked for where not. What is serial, `waits`, is a
    program's chain, the latency of memory at each load and that of a barrier at each barrier, over the waves.
    """
    c, many = launch.counts, launch.programs
    share = -(-many // chip.sms) / many  # of all work, on the busiest SM
    waves = -(-many // (chip.sms * resident(launch, target, chip)))
    rate = 1e12 * (chip.tf32 if c.tf32_flops else chip.matrix) / chip.sms  # of an SM
    chain = (c.waits * chip.latency + c.barriers * chip.barrier) / many
    extent = [x.numel() * x.element_size() for x in launch.tensors]
    dram = 0.0
    for number, asked in c.tensors.items():
        size = extent[number - 1] if 0 < number <= len(extent) else asked
        dram += min(asked, size) if size <= chip.l2_mib * 2**20 else asked
    units = {
        "matrix": chip.clocks(share * (c.flops + c.sync_flops * (1 / chip.sync_share - 1)) / rate),
        "FMA": share * c.fma / chip.fma,
        "SFU": share * c.mufu / chip.sfu,
        "issue": share * executed(launch)[0] / chip.issue,
        "shared": share * c.shared_bytes / chip.shared,
        "L2": c.global_bytes / chip.l2 if chip.l2 else 0.0,
        "DRAM": chip.clocks(dram / chip.dram_bytes),
    }
    clocks = max(units.values()) + waves * chain
    return Predicted(launch.name, {**units, "waits": waves * chain}, chip.ms(clocks) + 1e-3 * chip.launch_us)
