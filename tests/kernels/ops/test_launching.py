"""Bound launches reach the kernel that Triton's own path launches, with its arguments: real compilation, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastprice_kernels.ops import _launching, _library
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops.gated_activations import _glu_forward_kernel
from fastprice_kernels.ops.nf4_matmul_small import _add_parts


class Driver:
    """A driver of one H200 whose launches are written down: the compiled kernel, then what its launcher got."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device = 0
        self.utils = self

        class Launcher:
            def __init__(launcher, source: Any, metadata: Any) -> None:  # noqa: N805
                launcher.name = metadata.name

            def __call__(launcher, *arguments: Any) -> None:  # noqa: N805
                self.launches.append((launcher, *arguments))

        self.launcher_cls = Launcher

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        return object(), object(), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(driver, "_active", made)
    monkeypatch.setattr(_launching, "_kinds", {})
    yield made
    for kernel in (_glu_forward_kernel, _add_parts):
        kernel.device_caches.clear()


def at(offset: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that begins `offset` elements behind an address divisible by 16."""
    base = torch.zeros(64, dtype=dtype)
    assert base.data_ptr() % 16 == 0
    return base[offset:]


HALF, SINGLE, SHIFTED = at(0), at(0, torch.float32), at(1)
SILU = {"KIND": "silu", "BLOCK": 1024}
GLU: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((HALF, HALF, HALF, 512, 512, 512, 512), SILU),
    ((HALF, HALF, HALF, 1024, 512, 512, 512), SILU),
    ((HALF, HALF, HALF, 17, 512, 512, 512), SILU),
    ((HALF, HALF, HALF, 1, 512, 512, 512), SILU),
    ((HALF, HALF, HALF, 512, 512, 512, 2**31), SILU),
    ((HALF, SHIFTED, HALF, 512, 512, 512, 512), SILU),
    ((SHIFTED, HALF, HALF, 512, 512, 512, 512), SILU),
    ((HALF, HALF, SINGLE, 512, 512, 512, 512), SILU),
    ((HALF, HALF, HALF, 512, 512, 512, 512), {**SILU, "KIND": "gelu"}),
    ((HALF, HALF, HALF, 512, 512, 512, 512), {**SILU, "num_warps": 8}),
]
PARTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((SINGLE, None, HALF, 64, 8), {"PARTS": 2, "COLUMNS": 64}),
    ((SINGLE, HALF, HALF, 64, 8), {"PARTS": 2, "COLUMNS": 64}),
    ((SINGLE, HALF, HALF, 63, 8), {"PARTS": 2, "COLUMNS": 64}),  # `size` is one that Triton does not specialize
    ((SINGLE, HALF, HALF, 64, 16), {"PARTS": 2, "COLUMNS": 64}),
]


def without_metadata(launched: tuple[Any, ...]) -> tuple[Any, ...]:
    """Compiled kernel, grid, stream, function, packed metadata and arguments; Triton passes empty hooks between."""
    return (*launched[:7], *launched[10:])


@pytest.mark.parametrize(("kernel", "calls"), [(_glu_forward_kernel, GLU), (_add_parts, PARTS)], ids=["glu", "parts"])
def test_each_call_reaches_the_kernel_of_tritons_own_path(kernel: Any, calls: list[Any], fake: Driver) -> None:
    for round_ in range(3):
        for arguments, constants in calls:
            grid = (3 + round_, 2)
            fake.launches.clear()
            kernel[grid](*arguments, **constants)
            launch(kernel, grid, *arguments, **constants)
            own, bound = map(without_metadata, fake.launches)
            assert len(own) == len(bound)
            assert all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(own, bound, strict=True))
            assert bound[1:5] == (3 + round_, 2, 1, 100)
    compiled = {id(launched) for launched, *_ in [value[1] for value in _launching._kinds.values()]}
    assert len(_launching._kinds) == len(calls)
    assert len(compiled) == len(kernel.device_caches[0][0])


def test_later_calls_do_not_take_tritons_path(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, constants = GLU[0]
    launch(_glu_forward_kernel, (4,), *arguments, **constants)
    monkeypatch.setattr(type(_glu_forward_kernel), "run", None)
    launch(_glu_forward_kernel, (5, 6, 7), *(x.clone() if isinstance(x, Tensor) else x for x in arguments), **constants)
    assert fake.launches[-1][1:5] == (5, 6, 7, 100)
    with pytest.raises(TypeError, match="NoneType"):
        launch(_glu_forward_kernel, (4,), *GLU[2][0], **constants)


def test_devices_have_kernels_of_their_own(fake: Driver) -> None:
    arguments, constants = GLU[0]
    for device in (0, 1, 0, 1):
        fake.device = device
        launch(_glu_forward_kernel, (4,), *arguments, **constants)
    launchers = [launched[0] for launched in fake.launches]
    assert launchers[0] is launchers[2] is not launchers[1]
    assert launchers[1] is launchers[3]
    assert [launched[4] for launched in fake.launches] == [100, 101, 100, 101]


def test_hooks_see_every_launch(fake: Driver) -> None:
    arguments, constants = GLU[0]
    seen: list[Any] = []
    launch(_glu_forward_kernel, (4,), *arguments, **constants)
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launch(_glu_forward_kernel, (4,), *arguments, **constants)
        assert knobs.runtime.launch_enter_hook in fake.launches[-1]  # the launcher calls it
        assert fake.launches[-1][7].get()["name"] == "_glu_forward_kernel"
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)


def test_kinds_are_bounded_and_hold_no_tensor(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launching, "_MOST_KINDS", 3)
    for width in range(16, 16 * 8, 16):
        launch(_glu_forward_kernel, (4,), HALF, HALF, HALF, width, 512, 512, 512, **SILU)
        assert len(_launching._kinds) <= 3
    held = [part for key, value in _launching._kinds.items() for part in (*key, *value[1], *value[2])]
    assert not any(isinstance(part, Tensor) for part in held)


def test_parameters_by_name_are_refused(fake: Driver) -> None:
    with pytest.raises(TypeError, match="takes the arguments of _glu_forward_kernel by position"):
        launch(_glu_forward_kernel, (4,), *GLU[0][0][:6], stride_h=512, **SILU)


def test_launches_run_on_the_device_of_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's current device: entered where it is another one, left alone where it is the same."""

    class OnDevice(Tensor):
        def get_device(self) -> int:
            return 1

    entered: list[Any] = []

    class Guard:
        def __init__(self, device: Any) -> None:
            entered.append(device)

        def __enter__(self) -> None:
            current[0] = 1

        def __exit__(self, *_: object) -> None:
            current[0] = 0

    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    guarded = _library.on_own_device(lambda x, y: (current[0], y))
    x = torch.zeros(2).as_subclass(OnDevice)
    assert guarded(x, 5) == (1, 5)
    assert entered == [x.device]
    assert current == [0]
    current[0] = 1
    assert guarded(x, 6) == (1, 6)
    assert len(entered) == 1
