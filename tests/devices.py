"""Accelerators that are not there, for tests on a machine without one.

:func:`fake_cuda` has dtypes and devices of CUDA tensors and no numbers;
:class:`SimulatedDevice` has the numbers, and tells what a real one would
mind: mixed devices, hidden copies, waiting for results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = torch.ops.aten
#: Operators whose result, or whose shape, the host has to wait for.
_WAITS = {
    _ATEN._local_scalar_dense,
    _ATEN.bincount,
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.masked_select,
    _ATEN.nonzero,
    _ATEN.repeat_interleave,
    _ATEN._unique2,
    _ATEN.unique_consecutive,
    _ATEN.unique_dim,
}


@contextmanager
def fake_cuda(autocast: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """CUDA tensors without values inside; also in autocast.

    Skips the test on torch 2.4, whose fake tensors ask for a driver.
    """
    if torch.__version__ < (2, 5):
        pytest.skip('fake CUDA tensors without a driver came with torch 2.5')
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        if autocast is not None:
            torch.set_autocast_dtype('cuda', autocast)
        torch.set_autocast_enabled('cuda', autocast is not None)
        try:
            yield mode
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.clear_autocast_cache()


def move(
    module: nn.Module,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """``module.to(device, dtype)`` where new parameters take the old ones'
    place, as fake tensors need it.
    """
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(device=device, dtype=dtype)
    finally:
        future.set_overwrite_module_params_on_conversion(before)


class OnDevice(Tensor):
    """A tensor that says it is on the simulated device.

    Attributes:
        host (Tensor): Its numbers, on the CPU.
    """

    is_meta = False  # it has numbers

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        out = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=SimulatedDevice.device,
        )
        out.host = host
        return out

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f'{func} outside of the simulated device')


class _ListsOfNumbers(TorchFunctionMode):
    """Tensors made of lists on the device: made on the CPU and copied."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = torch.device(kwargs.pop('device', None) or 'cpu')
            out = func(*args, **kwargs, device='cpu')
            if device == SimulatedDevice.device:
                self.waits.append(func.__name__)
                out = OnDevice(out)
            return out
        return func(*args, **kwargs)


class SimulatedDevice(TorchDispatchMode):
    """Context manager with a device of its own, which computes on the CPU.

    Attributes:
        waits (list[str]): Operators the host had to wait for, copies between
            the devices among them.
    """

    #: A name that torch knows without any hardware.
    device = torch.device('meta')

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._lists = _ListsOfNumbers(self.waits)

    def __enter__(self) -> SimulatedDevice:
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._lists.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [
            t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        ]
        here = any(isinstance(t, OnDevice) for t in tensors)
        wanted = kwargs.get('device')
        target = here
        if wanted is not None:
            kwargs['device'] = torch.device('cpu')
            target = wanted.type == self.device.type
        packet, name = func.overloadpacket, str(func)
        if tensors and target != here:
            self.waits.append(f'{name}, a copy to {wanted}')
        elif here and packet is _ATEN.copy_:
            if not all(isinstance(t, OnDevice) for t in tensors):
                self.waits.append(f'{name}, between the devices')
        elif here:
            self._check(packet, name, tensors)
        if packet is _ATEN._fused_sdp_choice:
            return SDPBackend.MATH.value
        host = tree_map(self._host, (args, kwargs))
        out = func(*host[0], **host[1])
        if func._schema.is_mutable:
            return args[0]  # in place
        return tree_map(self._wrap, out) if target else out

    def _check(self, packet, name: str, tensors: list[Tensor]) -> None:
        if packet in (_ATEN.index, _ATEN.index_put_):
            # torch counts what masks select, and copies indices by itself.
            if any(
                t.dtype == torch.bool or not isinstance(t, OnDevice)
                for t in tensors[1:]
            ):
                self.waits.append(name)
            return
        if packet in _WAITS:
            self.waits.append(name)
        for tensor in tensors:
            if not isinstance(tensor, OnDevice) and tensor.dim():
                raise RuntimeError(
                    f'{name}: tensors on {self.device} and on the CPU'
                )

    @staticmethod
    def _host(value: object) -> object:
        return value.host if isinstance(value, OnDevice) else value

    @staticmethod
    def _wrap(value: object) -> object:
        return OnDevice(value) if isinstance(value, Tensor) else value
