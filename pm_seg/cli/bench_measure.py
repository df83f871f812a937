"""Times and memory of models, measured in turns."""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..utils import median, time_interleaved
from .export_onnx import Predictor, export

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
        list[dict]: Median and spread (half of the distance between the
        quartiles) of the latency in ms, images per second, ratio to the
        first, and GiB that this model alone needs at its peak, None on a CPU.
    """
    device = torch.device('cpu' if mode == 'onnx' else device)
    dtype = 'fp32' if mode == 'onnx' else dtype
    images = images.to(device)
    calls: dict[str, Call] = {}
    memory: dict[str, float | None] = {}
    for name, model in models.items():

        def make(model: nn.Module = model) -> Call:
            if mode == 'onnx':
                return _onnx(model.eval(), images)
            own = copy.deepcopy(model).to(device)
            if train:
                return _training(own.train(), images, mode, DTYPES[dtype])
            own = own.eval().to(DTYPES[dtype])
            return _inference(own, images.to(DTYPES[dtype]), mode)

        calls[name], memory[name] = _warmed_up(make, mode, device)
    seconds = time_interleaved(calls, rounds)
    base = median(seconds[next(iter(models))])
    rows = []
    for name, peak in memory.items():
        middle = median(seconds[name])
        low, _, high = statistics.quantiles(seconds[name], n=4)
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
                peak_gib=peak,
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
    """A call that was made three times, and GiB of its model at the peak.

    What other models hold is not counted. A CUDA graph has its memory from
    its recording on, so that is when it is looked at.
    """
    if device.type != 'cuda':
        call = make()
        for _ in range(3):
            call()
        return call, None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    call = make()
    torch.cuda.reset_peak_memory_stats(device)
    for turn in range(4):
        if turn == 3 and mode != 'cudagraph':
            torch.cuda.reset_peak_memory_stats(device)
        call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return call, peak / 2**30


def _compiled(function: Callable, mode: str) -> Callable:
    if mode == 'eager':
        return function
    options = dict(mode='reduce-overhead') if mode == 'cudagraph' else {}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def _inference(model: nn.Module, images: Tensor, mode: str) -> Call:
    predict = _compiled(lambda x: model(x, mode='tensor'), mode)

    def call() -> None:
        with torch.inference_mode():
            predict(images)

    return call


def _training(
    model: nn.Module, images: Tensor, mode: str, dtype: torch.dtype
) -> Call:
    predict = _compiled(lambda x: model(x, mode='tensor'), mode)
    mixed = nullcontext
    if dtype != torch.float32:

        def mixed() -> torch.autocast:
            return torch.autocast(images.device.type, dtype)

    def call() -> None:
        with mixed():
            loss = predict(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return call


def _onnx(model: nn.Module, images: Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Sessions that wait for their turn must not keep the cores busy.
    spinning = 'session.intra_op.allow_spinning'
    options.add_session_config_entry(spinning, '0')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        export(Predictor(model, resize=False).eval(), images, path)
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
    array = images.numpy()
    return lambda: session.run(None, {'images': array})
