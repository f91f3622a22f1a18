"""What a program of a compiled kernel executes: the integer part of its PTX is walked, the rest is counted.

Control flow and addresses of Triton's kernels are made of program ids, lengths and offsets, so that the instructions
which branches, predicates and addresses depend on are enough to know how often every block runs and which bytes each
access has. They are evaluated for all threads of a program at once. A floating-point number, loaded or computed,
is taken as 1, which is neither 0 nor large (concat takes its factored loop, say), one that a select puts in its place
is what it is (0 for a hidden row).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPAN = 40  # bits of addresses a tensor argument has: which one it is, is above them
EXACT = 32  # executions of a block whose accesses are looked at one by one; later ones are taken as their mean
MOST = 2_000_000  # instructions that are evaluated before a program is given up

_REGISTER = re.compile(r"%[a-z]+\d+")
_SPECIAL = re.compile(r"%(tid|ctaid|nctaid|ntid|laneid)(?:\.([xyz]))?")
_FLOAT = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}
_BITS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}
_INTEGERS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOW = ("bra", "bra.uni", "ret", "exit")
_MUFU = ("ex2", "lg2", "tanh", "rcp", "rsqrt", "sqrt", "sin", "cos")


@dataclass
class Instruction:
    """One statement: what it writes, and what it is made of."""

    op: str
    args: list[str]
    guard: str = ""  # %p1, or !%p1

    @property
    def kinds(self) -> list[str]:
        """The name and its suffixes."""
        return self.op.split(".")

    @property
    def writes(self) -> list[str]:
        """Registers."""
        stores = self.op.startswith(("st", "bra", "bar", "ret", "cp.", "wgmma.", "fence", "membar", "red."))
        return [] if stores or not self.args else _REGISTER.findall(self.args[0])

    @property
    def reads(self) -> list[str]:
        """Registers, the guard's too: where it is off the old number stays."""
        given = self.args if not self.writes else self.args[1:]
        old = self.writes if self.guard else []
        return [x for text in [*given, self.guard] for x in _REGISTER.findall(text)] + old


@dataclass
class Code:
    """A kernel's blocks in the order of the text, where each begins, and what has to be evaluated."""

    blocks: list[list[Instruction]]
    labels: dict[str, int]
    needed: set[str]
    headers: list[tuple[int, int]]  # of loops: their first block, and their depth from 1 on

    @property
    def length(self) -> int:
        """Instructions, without those of control flow."""
        return sum(x.op not in _FLOW for block in self.blocks for x in block)

    @property
    def hash(self) -> str:
        """Of the instructions alone: the same wherever the source lies, and with or without lines for a debugger."""
        text = "\n".join(f"{x.guard} {x.op} {x.args}" for block in self.blocks for x in block)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split(text: str) -> list[str]:
    """Arguments, those in brackets whole."""
    return re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]|]+", text)


def parse(ptx: str) -> Code:
    """Blocks of the one kernel in a PTX text."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")) + 1 :])
    body = re.sub(r"^\s*\.(loc|file|section|pragma)\b[^\n]*", "", body, flags=re.M)
    body = body[: body.find("\n}")] if "\n}\n" in body else body
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in re.split(r";|(?<=:)\s|\n\s*[{}]\s*(?=\n)", body):
        text = " ".join(statement.split()).lstrip("{} ") if not statement.strip().startswith("{%") else statement
        if not text or text.startswith((".reg", "}")):
            continue
        if text.startswith("$L__tmp") or text.startswith("$L__func"):  # of debugging
            continue
        if text.endswith(":"):
            blocks.append([])
            labels[text[:-1]] = len(blocks) - 1
            continue
        m = re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, flags=re.S)
        if m is None:
            continue
        instruction = Instruction(m[2].replace("::", "."), _split(m[3]), m[1] or "")
        blocks[-1].append(instruction)
        if instruction.op.startswith("bra"):
            blocks.append([])
    told = re.findall(r"^(\$L__BB\w+):((?:[^\n]*//[^\n]*\n\s*)+)", ptx, flags=re.M)
    depths = {name: re.search(r"Loop Header: Depth=(\d+)", said) for name, said in told}
    headers = [(labels[name], int(m[1])) for name, m in depths.items() if m and name in labels]
    return Code(blocks, labels, _needed(blocks), headers)


def _global(instruction: Instruction) -> bool:
    """Whether it has bytes of global memory."""
    op = instruction.op
    return op.startswith(("ld.global", "st.global", "atom.global", "red.global", "cp.async.c")) and "group" not in op


def _address(instruction: Instruction) -> str:
    """The global address of an access."""
    found = [x for x in instruction.args if x.startswith("[")]
    return found[1] if instruction.op.startswith("cp.async") else found[0]


def _needed(blocks: list[list[Instruction]]) -> set[str]:
    """Registers that branches, guards and addresses are made of."""
    every = [x for block in blocks for x in block]
    by_written: dict[str, list[Instruction]] = {}
    for x in every:
        for register in x.writes:
            by_written.setdefault(register, []).append(x)
    work = [r for x in every if x.op.startswith("bra") for r in _REGISTER.findall(x.guard)]
    for x in filter(_global, every):
        size = x.args[-1] if x.op.startswith("cp.async") else ""
        stored = x.args[-1] if x.op.startswith("st") else ""  # integers that a kernel makes for the next one
        work += _REGISTER.findall(x.guard + _address(x) + size + stored)
    needed: set[str] = set()
    through = [
        r for x in every if x.op.startswith("st.shared") for t in [*x.args, x.guard] for r in _REGISTER.findall(t)
    ]
    while work:
        register = work.pop()
        if register in needed:
            continue
        needed.add(register)
        for x in by_written.get(register, []):
            if not _floating(x):
                work += x.reads
            if x.op.startswith("ld.shared"):
                work += through
                through = []
    return needed


def _floating(x: Instruction) -> bool:
    """Whether it computes floating-point numbers, which are taken as 1."""
    moved = x.kinds[0] in ("mov", "selp", "setp", "ld", "st")
    return x.kinds[0] in ("mma", "wgmma", "ldmatrix", *_MUFU) or (bool(_FLOAT & set(x.kinds[1:])) and not moved)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------


def _wrapped(value: Any, bits: int) -> Any:
    """As a signed number of so many bits; of one, a truth."""
    if bits == 1:
        return value != 0
    if isinstance(value, np.ndarray):
        return value if bits == 64 else (value.astype(np.int64) << (64 - bits)) >> (64 - bits)
    value = int(value) & ((1 << bits) - 1)
    return value - (1 << bits) if value >> (bits - 1) else value


def _unsigned(value: Any, bits: int) -> Any:
    if bits == 64:
        return value & 0x7FFFFFFFFFFFFFFF
    return value & ((1 << bits) - 1)


def _where(test: Any, yes: Any, no: Any) -> Any:
    if isinstance(test, np.ndarray):
        return np.where(test, yes, no)
    return yes if test else no


def _bytes_of(value: Any, selected: Any) -> Any:
    """Four bytes of eight, by the last three bits of each digit."""
    return sum(((value >> 8 * (selected >> 4 * i & 7)) & 255) << 8 * i for i in range(4))


_COMPARE = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
_COMPARE |= {"equ": "__eq__", "neu": "__ne__", "ltu": "__lt__", "leu": "__le__", "gtu": "__gt__", "geu": "__ge__"}
_COMPARE |= {"lo": "__lt__", "ls": "__le__", "hi": "__gt__", "hs": "__ge__"}
_ALL_LANES: dict[str, Any] = {"max": np.max, "min": np.min, "add": np.sum}  # of redux


def _compute(kinds: list[str], v: list[Any]) -> Any:
    """The result of an integer instruction of its arguments' numbers."""
    name, kind = kinds[0], kinds[-1]
    bits = int(re.sub(r"\D", "", kind) or 32) if kind[0] in "bus" else 32
    if kind[0] == "u" and name in ("shr", "div", "rem", "min", "max", "setp", "cvt", "mul", "mad", "bfe"):
        narrow = 2 if "wide" in kinds else len(v)  # what is added is twice as wide
        v = [_unsigned(x, bits) if not isinstance(x, (bool, np.bool_)) else x for x in v[:narrow]] + v[narrow:]
    if name in ("mov", "cvta", "cvt"):
        return v[0]
    if name in ("add", "sub", "mul", "mad") and "hi" in kinds:
        high = [int(x) if not isinstance(x, np.ndarray) else x for x in v]
        return (high[0] * high[1]) >> bits
    simple = {
        "add": lambda: v[0] + v[1],
        "sub": lambda: v[0] - v[1],
        "mul": lambda: v[0] * v[1],
        "mad": lambda: v[0] * v[1] + v[2],
        "and": lambda: v[0] & v[1],
        "or": lambda: v[0] | v[1],
        "xor": lambda: v[0] ^ v[1],
        "not": lambda: ~v[0] if kind != "pred" else v[0] == 0,
        "neg": lambda: -v[0],
        "abs": lambda: abs(v[0]),
        "shl": lambda: v[0] << v[1],
        "shr": lambda: v[0] >> v[1],
        "min": lambda: _where(v[0] < v[1], v[0], v[1]),
        "max": lambda: _where(v[0] > v[1], v[0], v[1]),
        "selp": lambda: _where(v[2], v[0], v[1]),
        "bfe": lambda: (_unsigned(v[0], 32) >> v[1]) & ((1 << v[2]) - 1),
        "prmt": lambda: _bytes_of(_unsigned(v[0], 32) | _unsigned(v[1], 32) << 32, v[2]),
    }
    if name in simple:
        return simple[name]()
    if name in ("div", "rem"):
        divisor = _where(v[1] == 0, 1, v[1])
        quotient = abs(v[0]) // abs(divisor) * _where((v[0] < 0) == (divisor < 0), 1, -1)
        return quotient if name == "div" else v[0] - quotient * divisor
    if name == "setp":
        given = next((_COMPARE[k] for k in kinds[1:] if k in _COMPARE), "__ne__")
        result = getattr(np.asarray(v[0]), given)(np.asarray(v[1]))
        return result if result.ndim else bool(result)
    raise NotImplementedError(".".join(kinds))


@dataclass
class Counts:
    """What programs execute: of a kernel's PTX, over all threads."""

    blocks: Counter[int] = field(default_factory=Counter)  # executions a program
    flops: float = 0.0  # of matrix instructions
    sync_flops: float = 0.0  # those of them by mma.sync
    tf32_flops: float = 0.0  # those of them on float32 operands
    mufu: float = 0.0  # special-function operations
    fma: float = 0.0  # float32 additions and products, fused ones as one
    shared_bytes: float = 0.0  # of shared memory
    global_bytes: float = 0.0  # sectors of 32 bytes, of both directions
    tensors: Counter[int] = field(default_factory=Counter)  # those bytes by the tensor
    instructions: float = 0.0  # PTX instructions a thread
    barriers: float = 0.0
    waits: float = 0.0  # blocks with loads that something waits for
    steps: int = 0
    unknown: set[str] = field(default_factory=set)

    def add(self, other: Counts, weight: float) -> None:
        """`weight` programs more."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + weight * getattr(other, name))
        for mine, theirs in ((self.blocks, other.blocks), (self.tensors, other.tensors)):
            for key, n in theirs.items():
                mine[key] += n * weight  # type: ignore[assignment]
        self.unknown |= other.unknown


SUMMED = ("flops", "sync_flops", "tf32_flops", "mufu", "fma", "shared_bytes", "global_bytes", "instructions")
SUMMED += ("barriers", "waits")


def _shared(x: Instruction, threads: int) -> float:
    """Bytes of shared memory that an instruction of all threads has."""
    op = x.op
    if op.startswith("wgmma.mma"):  # a warp group reads B, and A where it is no registers
        m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", op).groups())  # type: ignore[union-attr]
        from_registers = sum(a.startswith("{") for a in x.args) > 1
        return (n + (0 if from_registers else m)) * k * (4 if "tf32" in op else 2) * threads / 128
    if op.startswith(("ldmatrix", "stmatrix")):
        return 4.0 * threads * int((re.search(r"x([124])", op) or "x1")[1])
    if op.startswith("cp.async.c") and len(x.args) > 2:
        return float(threads * int(x.args[2], 0))
    if op.startswith(("ld.shared", "st.shared")):
        count = int(next((k[1:] for k in x.kinds if re.fullmatch(r"v\d", k)), "1"))
        return threads * count * max(int(re.sub(r"\D", "", x.kinds[-1]) or 32) // 8, 1)
    return 0.0


def _waits(ops: list[Instruction]) -> float:
    """Latencies of memory that a block stands still for: one where it loads, a part where copies run ahead."""
    if any(x.op.startswith("ld.global") for x in ops):
        return 1.0
    groups = max(1, sum(x.op.startswith("cp.async.commit") for x in ops))
    return max(
        (1 / (1 + int(x.args[0], 0) // groups) for x in ops if x.op.startswith("cp.async.wait_group")), default=0.0
    )


def matrix_flops(op: str) -> int:
    """Of a matrix instruction of a warp, or of a warp group."""
    m = re.search(r"m(\d+)n(\d+)k(\d+)", op)
    return 2 * int(m[1]) * int(m[2]) * int(m[3]) if m and op.startswith(("mma", "wgmma.mma")) else 0


class Walk:
    """One program of a kernel."""

    def __init__(self, code: Code, values: list[Any], tensors: list[Tensor | None], threads: int, grid: Any) -> None:
        self.code, self.values, self.tensors, self.threads, self.grid = code, values, tensors, threads, grid
        self.registers: dict[str, Any] = {}
        self.counts = Counts()
        self.seen: Counter[int] = Counter()  # accesses that were looked at, by block
        self.bytes: dict[int, Counter[int]] = {}
        self.made: set[int] = set()  # tensors of integers that it wrote, for the next kernel
        self.shared: Any = np.zeros(1 << 18, np.uint8)

    def run(self, program: tuple[int, int, int]) -> Counts:
        """Execute it."""
        self.program, at, blocks = program, 0, self.code.blocks
        while at < len(blocks):
            self.counts.blocks[at] += 1
            if (to := self._block(at)) == -1:
                break
            at = at + 1 if to is None else to
            if self.counts.steps > MOST:
                raise RuntimeError("a program of too many instructions")
        self._close()
        return self.counts

    def _close(self) -> None:
        """Counts of blocks, from how often each ran."""
        c = self.counts
        for at, n in c.blocks.items():
            ops = self.code.blocks[at]
            warps = self.threads / 32
            c.instructions += n * sum(x.op not in _FLOW for x in ops)
            c.mufu += n * self.threads * sum(x.kinds[0] in _MUFU for x in ops)
            c.fma += (
                n
                * self.threads
                * sum(x.kinds[0] in ("fma", "add", "sub", "mul") and x.kinds[-1] == "f32" for x in ops)
            )
            c.shared_bytes += n * sum(_shared(x, self.threads) for x in ops)
            for x in ops:
                if flops := n * matrix_flops(x.op) * (warps / 4 if x.op.startswith("wgmma") else warps):
                    c.flops += flops
                    c.sync_flops += flops * x.op.startswith("mma")
                    c.tf32_flops += flops * ("tf32" in x.op)
            c.barriers += n * sum(x.op.startswith(("bar", "barrier")) for x in ops)
            c.waits += n * _waits(ops)
            for tensor, size in self.bytes.get(at, Counter()).items():
                c.tensors[tensor] += size * n / self.seen[at]  # type: ignore[assignment]
        c.global_bytes = sum(c.tensors.values())

    def _value(self, text: str) -> Any:
        if text.startswith("%"):
            if m := _SPECIAL.match(text):
                axis = "xyz".index(m[2] or "x")
                ids = np.arange(self.threads)
                one = {
                    "ctaid": self.program[axis],
                    "nctaid": self.grid[axis],
                    "ntid": self.threads if not axis else 1,
                }
                tid = ids if axis == 0 else 0
                return one[m[1]] if m[1] in one else (tid if m[1] == "tid" else ids % 32)
            return self.registers.get(text, 0)
        if text.startswith("0f"):  # a whole number that is 0 where it is, and as large
            value = float(np.array(int(text[2:], 16), dtype=np.uint32).view(np.float32))
            return int(np.copysign(min(max(abs(value), 1), 2**30), value)) if value else 0
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            return 0  # a symbol: of shared memory

    def _place(self, text: str) -> Any:
        """An address in brackets."""
        base, _, offset = text.strip("[] ").partition("+")
        return self._value(base.strip()) + int(offset.strip() or 0)

    def _on(self, guard: str) -> Any:
        if not guard:
            return True
        on = self.registers.get(guard.lstrip("!"), False)
        return np.logical_not(on) if guard.startswith("!") else on

    def _block(self, at: int) -> int | None:
        """Evaluate a block; the block that it jumps to, -1 at the end."""
        look = self.seen[at] < EXACT
        self.seen[at] += look
        for x in self.code.blocks[at]:
            if x.op.startswith("bra"):
                if np.mean(self._on(x.guard)) > 0.5:
                    return self.code.labels[x.args[0]]
            elif x.op in ("ret", "exit"):
                if np.all(self._on(x.guard)):
                    return -1
            elif _global(x) and (look or x.op.startswith("st") or not self.code.needed.isdisjoint(x.writes)):
                self._access(x, at, look)
            elif x.op.startswith("st.shared"):
                if not self.code.needed.isdisjoint(_REGISTER.findall(x.args[-1])):
                    self._through_shared(x)
            elif not self.code.needed.isdisjoint(x.writes):
                self._evaluate(x)
        return None

    def _through_shared(self, x: Instruction) -> None:
        """Store numbers to shared memory, or load them."""
        self.counts.steps += 1
        width = max(int(re.sub(r"\D", "", x.kinds[-1])) // 8, 1)
        memory = self.shared.view(_INTEGERS[width])
        place = np.broadcast_to(np.asarray(self._place(_address(x)), np.int64) // width, self.threads)
        on = np.broadcast_to(np.asarray(self._on(x.guard), bool), self.threads)
        for i, name in enumerate(x.writes if x.op.startswith("ld") else _split(x.args[-1].strip("{} "))):
            index = (place + i) % len(memory)
            if x.op.startswith("ld"):
                self._write([name], memory[index].astype(np.int64), on)
            else:
                memory[index[on]] = np.broadcast_to(self._value(name), self.threads)[on].astype(memory.dtype)

    def _evaluate(self, x: Instruction) -> None:
        self.counts.steps += 1
        on = self._on(x.guard)
        if x.op.startswith("ld.param"):
            result = self.values[int(re.search(r"param_(\d+)", x.args[1])[1])]  # type: ignore[index]
        elif x.op.startswith("ld.shared"):
            return self._through_shared(x)
        elif _floating(x):
            result = 1
        else:
            given = [self._value(a) for a in x.args[1:] if not a.startswith("{")]
            if x.args[1:] and x.args[1].startswith("{"):  # halves put together
                low, high = ([self._value(a) for a in _split(x.args[1].strip("{}"))] + [0, 0])[:2]
                given = [(high << 16) | (low & 0xFFFF)] if "b32" in x.kinds else [(high << 32) | (low & 0xFFFFFFFF)]
            try:
                result = (
                    self._shuffled(x.kinds, given) if x.kinds[0] in ("shfl", "redux") else _compute(x.kinds, given)
                )
            except (NotImplementedError, IndexError, TypeError, ValueError, OverflowError):
                self.counts.unknown.add(x.op)
                result = 0
        self._write(x.writes, result, on, packed=x.args[0].startswith("{"))

    def _shuffled(self, kinds: list[str], given: list[Any]) -> Any:
        """Numbers of other lanes of the warp, or what is made of them all."""
        lanes = np.broadcast_to(np.asarray(given[0]), self.threads)
        if kinds[0] == "redux" and kinds[2] in _ALL_LANES:
            return np.repeat(_ALL_LANES[kinds[2]](lanes.reshape(-1, 32), axis=1), 32)
        ids = np.arange(self.threads)
        if kinds[2] == "bfly":
            return lanes[ids ^ given[1]]
        if kinds[2] == "idx":
            return lanes[ids & ~31 | given[1]]
        raise NotImplementedError(".".join(kinds))

    def _write(self, names: list[str], result: Any, on: Any, *, packed: bool = False) -> None:
        for i, name in enumerate(names):
            bits = _BITS.get(name.rstrip("0123456789"), 32)
            value = _wrapped(result >> (i * bits) if packed and i else result, bits)
            self.registers[name] = value if on is True else _where(on, value, self.registers.get(name, 0))

    def _access(self, x: Instruction, at: int, look: bool) -> None:
        """Sectors of an access, and the numbers where they are integers."""
        place = np.broadcast_to(np.asarray(self._place(_address(x)), np.int64), self.threads)
        on = np.broadcast_to(np.asarray(self._on(x.guard), bool), self.threads)
        kind = x.kinds[-1] if not x.op.startswith("cp.async") else "b8"
        width = max(int(re.sub(r"\D", "", kind.replace("x2", "")) or 32) // 8, 1)
        count = int(next((k[1:] for k in x.kinds if re.fullmatch(r"v\d", k)), "1"))
        size = width * count
        if x.op.startswith("cp.async"):
            size = int(x.args[2], 0)
            if len(x.args) > 3:
                on = on & (np.broadcast_to(np.asarray(self._value(x.args[3])), self.threads) > 0)
        if look and on.any():
            lane = np.arange(self.threads)[on] // 32
            first, last = place[on] >> 5, (place[on] + size - 1) >> 5
            sectors = np.unique(np.concatenate([lane * (1 << 50) + first, lane * (1 << 50) + last]))
            tensor, number = np.unique((sectors & ((1 << 50) - 1)) >> (SPAN - 5), return_counts=True)
            found = self.bytes.setdefault(at, Counter())
            for t, n in zip(tensor.tolist(), number.tolist(), strict=True):
                found[t] += 32 * n
        self._integers(x, place, on, width)

    def _integers(self, x: Instruction, place: Any, on: Any, width: int) -> None:
        """Load integers of a tensor of them, or store them there."""
        if x.op.startswith(("cp.async", "red", "atom")):
            return
        which = int(place[on][0] >> SPAN) if on.any() else 0
        tensor = self.tensors[which - 1] if 0 < which <= len(self.tensors) else None
        whole = tensor is not None and not tensor.is_floating_point() and tensor.device.type == "cpu"
        names = x.writes if x.op.startswith("ld") else _REGISTER.findall(x.args[-1])
        for i, name in enumerate(names):
            if not whole or tensor is None:
                if x.op.startswith("ld"):
                    self._write([name], 1, on)
                continue
            flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).view(torch.uint8).numpy()
            data = flat.view(_INTEGERS[width])
            start = tensor.storage_offset() * tensor.element_size()
            index = ((place & ((1 << SPAN) - 1)) + start) // width + i
            index = np.where(on & (index < data.size) & (index >= 0), index, 0)
            if x.op.startswith("ld"):
                self._write([name], data[index].astype(np.int64), on)
            else:
                values = np.broadcast_to(np.asarray(self.registers.get(name, 0)), self.threads)
                data[index[on]] = values[on].astype(data.dtype)
                self.made.add(which - 1)
