"""Options and fixtures that every family's tests share."""

import argparse
import collections
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "fused_attn",
    derandomize=True,
    deadline=None,
    max_examples=15,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # in the interpreter, shrinking takes minutes
)
hypothesis.settings.register_profile(  # tests marked `long` have @hypothesis.settings.get_profile("long") too
    "long",
    deadline=None,
    max_examples=2_000,
    database=None,
    print_blob=True,  # they are drawn anew each time: how to repeat a failure
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fused_attn")


CASES = 12
"""The most cases of one test that run where `--long` is not asked for: the others of a larger table are `long`."""


def part(text: str) -> tuple[int, int]:
    """``"2/8"`` as (2, 8)."""
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected a part as 1/8, which has 2/8 to 8/8 beside it; got {text!r}")
    return int(which), int(of)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run on cuda; without it, on the CPU in Triton's interpreter")
    parser.addoption("--devices", action="store_true", help="on a CPU: tensors made elsewhere fail (`_devices.py`)")
    parser.addoption("--long", action="store_true", help="run tests marked `long` too; -m long: these alone")
    parser.addoption("--tables", action="store_true", help=f"run tables of more than {CASES} cases whole")
    parser.addoption("--rest", type=part, default=(1, 1), metavar="I/N",
                     help=f"of tables with more than {CASES} long cases the I-th of N parts")  # fmt: skip
    parser.addoption("--sample", type=part, default=(1, 1), metavar="I/N",
                     help="run the I-th of N parts of the tests, each a fair sample of every file")  # fmt: skip
    parser.addoption("--fair", action="store_true", help="in an order that is fair to all files when cut off")


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which reads the markers for -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which tests run, and in which order: both by a hash of their names, the same on every machine."""
    which, of = config.getoption("sample")
    which_rest, of_rest = config.getoption("rest")
    bare = {
        item.nodeid.split("[")[0]
        for item in items
        if item.get_closest_marker("kernel") is not None and "device" not in item.fixturenames
    }
    if bare:  # on a GPU its tensors would be the CPU's
        raise pytest.UsageError(f"marked `kernel`, without the fixture `device`: {', '.join(sorted(bare))}")

    def digest(item: pytest.Item) -> int:
        return int.from_bytes(hashlib.md5(item.nodeid.encode()).digest(), "big")

    def tables(long: bool) -> list[list[pytest.Item]]:
        """Tests with their cases, those that are `long` or those that are not, in the order of the hash."""
        found = collections.defaultdict(list)
        for item in sorted(items, key=digest):
            if (item.get_closest_marker("long") is not None) == long:
                found[item.nodeid.split("[")[0]].append(item)
        return list(found.values())

    whole = config.getoption("gpu") or config.getoption("tables")
    for table in () if whole else tables(long=False):
        for item in table[CASES:]:
            if item.get_closest_marker("whole") is None:
                item.add_marker("long")
    elsewhere = {
        id(item)
        for table in tables(long=True)
        if len(table) > CASES or table[0].get_closest_marker("shared_out")
        for place, item in enumerate(table)
        if place % of_rest != which_rest - 1
    }

    def wanted(item: pytest.Item) -> bool:
        shown = config.getoption("long") or item.get_closest_marker("long") is None
        return shown and id(item) not in elsewhere and digest(item) % of == which - 1

    kept = [item for item in items if wanted(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = sorted(kept, key=digest) if config.getoption("fair") else kept


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device. Triton reads the variable when it is imported, which is later, with the test modules."""
    assert "triton" not in sys.modules, "conftest.py has to choose the device before Triton is imported"
    if config.getoption("gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: torch.cuda.is_available() is False on this machine")
        os.environ.pop("TRITON_INTERPRET", None)
        # cuDNN's RNNs take TF32 by default: a GRU over all documents is then 2e-5 off from the GRU over each.
        torch.backends.cudnn.allow_tf32 = False
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter computes with NumPy, which warns where tanh and sigmoid saturate, and of the interpreter's code.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp:RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning:triton")
    # Inductor's cache knows a graph by the names of its operators, not by what they return in this tree.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if config.getoption("devices"):
        if config.getoption("gpu"):
            raise pytest.UsageError("--devices is for the CPU: a GPU sees what it sees")
        import _devices

        _devices.separate(pytest.MonkeyPatch())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # what is this small loses by a second, and under xdist each core has a process
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(KernelTests())


class KernelTests:
    """Fails a session whose tests marked `kernel` were all skipped: it has shown nothing about the kernels.

    It listens to the reports, which under xdist reach the controlling process from all workers.
    """

    skipped = 0
    ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "kernel" in report.keywords:
            self.skipped += report.skipped
            self.ran += report.when == "call" and not report.skipped

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and not self.ran and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped and not self.ran:
            terminalreporter.write_line(
                f"FAILED: all {self.skipped} selected kernel tests were skipped, so no kernel was tested", red=True
            )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.config.getoption("devices"):
        return torch.device("cpu", 0)
    return torch.device("cuda" if request.config.getoption("gpu") else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET"):
            import _interpreter

            _interpreter.hasten(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> None:
    """Memory that the package leaves unwritten reads as NaN, or as -2**30 in integers."""

    def poison(name: str, allocate):
        def poisoned(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("fused_attn"):
                x.fill_(torch.nan if x.is_floating_point() else -(2**30))
            return x

        poisoned.__name__ = name
        return poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
        ):  # fmt: skip
            patch.setattr(owner, name, poison(name, getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_calls_in_blocks() -> Iterator[None]:
    """Concat on a CPU goes in blocks whatever the size, and general by SDPA: the tests' sizes would be too small."""
    with pytest.MonkeyPatch.context() as patch:
        for family in ("concat", "general"):
            patch.setattr(importlib.import_module(f"fused_attn.{family}"), "_FEW", -1)
        yield


@pytest.fixture(autouse=True)
def _no_records_of_other_tests() -> None:
    """What a test changes in a launcher is seen: no call is made from a record of another test's."""
    if (replay := sys.modules.get("fused_attn.kernels.replay")) is not None:
        replay.forget()


@pytest.fixture(scope="session", autouse=True)
def _fused_multiply_add() -> None:
    """`tl.fma` with one rounding, as every GPU has it: the interpreter's own rounds the product too."""
    if not os.environ.get("TRITON_INTERPRET") or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data  # a product of two float32 is a float64
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        yield


@pytest.fixture(scope="module")
def far_apart(device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Puts numbers 2**30 apart along an axis of three, so that the last are past int32.

    The 4 GiB of float16 are virtual on a CPU: few of their pages are ever touched.
    """
    far = 2**30
    memory = torch.empty(2 * far + 2**14, dtype=torch.float16, device=device)
    taken = 0

    def place(x: torch.Tensor, axis: int) -> torch.Tensor:
        nonlocal taken
        strides = list(torch.empty_like(x.select(axis, 0), memory_format=torch.contiguous_format).stride())
        strides.insert(axis, far)
        placed = memory.as_strided(x.shape, strides, taken)
        taken += x.select(axis, 0).numel()
        return placed.copy_(x)

    return place
