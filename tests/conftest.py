"""Options and fixtures that every family's tests share."""

import os
import sys

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
hypothesis.settings.load_profile("fused_attn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run on cuda; without it, on the CPU in Triton's interpreter")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device. Triton reads the variable when it is imported, which is later, with the test modules."""
    assert "triton" not in sys.modules, "conftest.py has to choose the device before Triton is imported"
    if config.getoption("gpu"):
        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: torch.cuda.is_available() is False on this machine")
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter computes with NumPy, which warns where tanh and sigmoid saturate, and of the interpreter's code.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp:RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning:triton")
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # one process a core already
    else:
        config.pluginmanager.register(KernelTests())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """`rounding(most, reason)`: in float32, past the bound by at most this factor is a known, reported excess."""
    try:
        return (yield)
    except AssertionError as error:
        known = pyfuncitem.get_closest_marker("rounding")
        ratio = getattr(error, "ratio", float("inf"))
        if known is None or getattr(error, "dtype", None) != torch.float32 or not ratio <= known.args[0]:
            raise
        raise pytest.xfail.Exception(f"{ratio:.2f} times the bound; {known.kwargs['reason']}") from error


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
    return torch.device("cuda" if request.config.getoption("gpu") else "cpu")


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
