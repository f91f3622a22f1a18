"""Which GPUs the kernels are for, and how a chip is told from another."""

from types import SimpleNamespace

import pytest
import torch

from fused_attn import _ops

pytest.importorskip("triton", reason="the kernels' rules need Triton")

from fused_attn.kernels import chip as chips

CUDA = torch.device("cuda", 0)
# What PyTorch says of a GPU (multiProcessorCount 100), and what the rules see; None: the kernels are not for it.
NVIDIA = {
    "sm_70": (7, 0, 98_304),
    "sm_75": (7, 5, 65_536),
    "sm_80": (8, 0, 166_912),
    "sm_86": (8, 6, 101_376),
    "sm_87": (8, 7, 166_912),
    "sm_89": (8, 9, 101_376),
    "sm_90": (9, 0, 232_448),
    "sm_100": (10, 0, 232_448),
    "sm_103": (10, 3, 232_448),
    "sm_120": (12, 0, 101_376),
    "sm_121": (12, 1, 101_376),
}
AMD = ["gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201"]
UNKNOWN = {"sm_70", "sm_75", "gfx906", "gfx908", "gfx1030", "gfx1100", "gfx1201"}


def seen(monkeypatch, name: str) -> chips.Chip:
    """The chip of a machine whose GPU is `name`, where nothing is interpreted."""
    properties = SimpleNamespace(multi_processor_count=100)
    if name.startswith("sm_"):
        properties.major, properties.minor, properties.shared_memory_per_block_optin = NVIDIA[name]
    else:
        properties.gcnArchName = f"{name}:sramecc+:xnack-"
        monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(chips, "INTERPRET", False)
    monkeypatch.setattr(_ops, "_triton_state", lambda: "gpu")
    chips._query.cache_clear()
    return chips.chip_of(CUDA)


@pytest.fixture(autouse=True)
def _forget():
    yield
    chips._query.cache_clear()


@pytest.mark.parametrize("name", [*NVIDIA, *AMD])
def test_each_architecture_is_told_apart(monkeypatch, name):
    chip = seen(monkeypatch, name)
    assert str(chip) == name
    assert chip.cores == 100
    assert chip.shared == (NVIDIA[name][2] if name in NVIDIA else 65_536)
    assert chip.supported == (name not in UNKNOWN)


@pytest.mark.parametrize("name", [*NVIDIA, *AMD])
def test_auto_takes_pytorch_and_triton_raises_where_the_kernels_are_not_for_the_chip(monkeypatch, name):
    seen(monkeypatch, name)
    assert _ops.use_triton("auto", CUDA, None) == (name not in UNKNOWN)
    assert not _ops.use_triton("reference", CUDA, None)
    if name in UNKNOWN:
        with pytest.raises(ValueError, match=f"impl: 'triton' expects .*sm_80.*gfx90a.*got {name}; use impl='auto'"):
            _ops.use_triton("triton", CUDA, None)
    else:
        assert _ops.use_triton("triton", CUDA, None)


def test_a_machine_without_a_gpu_asks_no_device(monkeypatch):
    """Tensors that only pretend to be on one, as in an export."""
    monkeypatch.setattr(_ops, "_triton_state", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _ops.use_triton("auto", CUDA, None)


@pytest.mark.parametrize("unknown", ["", "sm_75"])
def test_the_answer_is_a_constant_to_the_compiler(monkeypatch, unknown):
    """Dynamo does not look into the question: where there is no GPU, it is whether one is available."""

    def answer(device):
        torch._dynamo.graph_break()  # an error in what is traced, nothing elsewhere
        return unknown

    answer.__dict__.update(_ops._unknown_chip.__dict__)
    monkeypatch.setattr(_ops, "_triton_state", lambda: "gpu")
    monkeypatch.setattr(_ops, "_unknown_chip", answer)

    @torch.compile(backend="eager", fullgraph=True)
    def f(x):
        return x + 1 if _ops.use_triton("auto", CUDA, None) else x - 1

    assert f(torch.zeros(())) == (-1 if unknown else 1)
    torch.compiler.reset()


def test_presets_are_what_the_machines_say(monkeypatch):
    for preset in (chips.A100, chips.A10, chips.L40, chips.H200, chips.B200, chips.RTX5090):
        assert seen(monkeypatch, str(preset))._replace(cores=preset.cores) == preset
    for preset in (chips.MI250X, chips.MI300X):
        assert seen(monkeypatch, str(preset))._replace(cores=preset.cores) == preset
