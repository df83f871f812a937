"""Times and memory of models, measured in turns."""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils import time_interleaved
from .export_onnx import Predictor, export, open_session

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MODES = ('eager', 'compiled', 'cudagraph', 'onnx')

Call = Callable[[], object]


def measure(
    models: Mapping[str, nn.Module],
    images: Tensor,
    dtype: str = 'fp32',
    mode: str = 'eager',
    train: bool = False,
    rounds: int = 15,
    device: str | torch.device = 'cpu',
) -> list[dict]:
    """One row for each model, timed in turns.

    Args:
        models (Mapping[str, nn.Module]): On the CPU; copies run. The first is
            what the others are compared with.
        images (Tensor): (B, 3, H, W), on the CPU, float32.
        dtype (str): Key of ``DTYPES``.
        mode (str): One of ``MODES``. 'onnx' runs on the CPU in fp32, whatever
            ``device`` and ``dtype`` are.
        train (bool): Whether to time forward and backward.
        rounds (int): How often each is timed.
        device (str): Where to run.

    Returns:
        list[dict]: Among others median and spread (half of the distance
        between the quartiles) of the latency, and GiB that this model alone
        needs at its peak, None on a CPU.
    """
    if mode == 'onnx':
        device, dtype = 'cpu', 'fp32'
    device = torch.device(device)
    images = images.to(device)
    calls: dict[str, Call] = {}
    memory: dict[str, float | None] = {}
    for name, model in models.items():
        make = partial(_call, model, images, DTYPES[dtype], mode, train)
        calls[name], memory[name] = _warmed_up(make, mode, device)
    base, rows = None, []
    for name, seconds in time_interleaved(calls, rounds).items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        base = base or middle
        rows.append(
            dict(
                method=name,
                mode=mode,
                dtype=dtype,
                train=train,
                batch_size=len(images),
                size=list(images.shape[2:]),
                device=device_name(device),
                latency_ms=middle * 1e3,
                spread_ms=(high - low) / 2 * 1e3,
                images_per_s=len(images) / middle,
                speedup=base / middle,
                peak_gib=memory[name],
            )
        )
    return rows


def device_name(device: str | torch.device) -> str:
    """What a device is called in tables."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type == 'cpu':
        return f'CPU, {torch.get_num_threads()} threads'
    return str(device)


def _warmed_up(
    make: Callable[[], Call], mode: str, device: torch.device
) -> tuple[Call, float | None]:
    """A call that was made a few times, and GiB of its model at the peak.

    What other models hold is not counted. A CUDA graph has its memory from
    its recording on, so that is when it is looked at.
    """
    cuda = device.type == 'cuda'
    if cuda:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    call = make()
    forget = (0,) if mode == 'cudagraph' else (0, 3)
    for turn in range(4):
        if cuda and turn in forget:
            torch.cuda.reset_peak_memory_stats(device)
        call()
    if not cuda:
        return call, None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return call, peak / 2**30


def _call(
    model: nn.Module,
    images: Tensor,
    dtype: torch.dtype,
    mode: str,
    train: bool,
) -> Call:
    """Prediction in a type, or a training step in mixed precision."""
    if mode == 'onnx':
        return _onnx(model.eval(), images)
    model = copy.deepcopy(model).to(images.device)

    def predict(images: Tensor) -> Tensor:
        return model(images, mode='tensor')

    if mode != 'eager':
        options = dict(mode='reduce-overhead') if mode == 'cudagraph' else {}
        predict = torch.compile(
            predict, fullgraph=True, dynamic=False, **options
        )
    if not train:
        model.eval().to(dtype)
        return partial(torch.inference_mode()(predict), images.to(dtype))
    model.train()
    mixed = dtype != torch.float32

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=mixed):
            loss = predict(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _onnx(model: nn.Module, images: Tensor) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        export(Predictor(model, resize=False).eval(), images, path)
        session = open_session(path)
    return partial(session.run, None, {'images': images.numpy()})
