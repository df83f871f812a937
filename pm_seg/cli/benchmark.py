"""Speed, memory and operations of dense and compressed models."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import to_2tuple
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..engine.scoring import compressible_modules
from ..engine.targets import meet_target
from ..utils import count_macs, median, time_interleaved
from ..utils.checkpoints import read_checkpoint
from ..version import __version__
from .common import (
    add_common_arguments,
    check_output,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
    wrong_usage,
)
from .export_onnx import Predictor, check_exporter, export

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MODES = ('eager', 'compiled', 'cudagraph', 'onnx')
DENSE = 'dense'
STATIC = 'ours, static'

#: Compression dicts of the methods that are compared, beside the config's.
METHODS: dict[str, dict] = {
    'paper': dict(
        builder='row_window', restore='replace', budget='layer', prune=0.0
    ),
    'ToMe-style': dict(type='tome'),
    'ALGM-style': dict(type='algm'),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'benchmark.py',
        'Time the model of a config, dense and compressed to the same share '
        'of its GMACs, in one process and in turns. Dense is the same class '
        'with compression off, on fused attention. Merging, matching and '
        'restoring are part of every figure.',
        (
            'on this machine, half of the GMACs, random weights',
            'configs/segmenter_vit-s_pm_ade20k.py',
        ),
        (
            'a GPU, two batch sizes, eager and compiled, with a picture',
            'configs/segmenter_vit-s_pm_ade20k.py --batch-size 1 32 --dtype '
            'bf16 --modes eager compiled --out speed.json --plot speed.png',
        ),
        (
            'one compressed checkpoint against dense, in onnxruntime',
            'configs/segmenter_vit-s_pm_ade20k.py pm.pth --methods ours '
            '--modes onnx',
        ),
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='compressed checkpoint for the row "ours"; without one all '
        'weights are random and "ours" has its first third of blocks dense '
        'and the same budget in the others',
    )
    group = parser.add_argument_group('what is compared')
    group.add_argument(
        '--share',
        type=float,
        default=0.5,
        help="share of the dense model's GMACs (default 0.5)",
    )
    group.add_argument(
        '--methods',
        nargs='+',
        choices=['ours', STATIC, *METHODS],
        default=['ours', STATIC, *METHODS],
        metavar='METHOD',
        help=f'of {", ".join(["ours", repr(STATIC), *METHODS])} (default all)',
    )
    group = parser.add_argument_group('settings; each combination is a table')
    group.add_argument(
        '--modes',
        nargs='+',
        choices=MODES,
        default=['eager'],
        metavar='MODE',
        help=f'of {", ".join(MODES)} (default eager); cudagraph needs CUDA, '
        'onnx is onnxruntime on the CPU in fp32',
    )
    group.add_argument(
        '--dtype',
        nargs='+',
        choices=list(DTYPES),
        default=['fp32'],
        metavar='DTYPE',
        help=f'of {", ".join(DTYPES)} (default fp32)',
    )
    group.add_argument(
        '--batch-size',
        type=int,
        nargs='+',
        default=[1],
        metavar='N',
        help='images at a time (default 1)',
    )
    group.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="image size; defaults to the config's",
    )
    group.add_argument(
        '--train',
        action='store_true',
        help='time forward and backward of a training step instead',
    )
    group = parser.add_argument_group('measuring')
    group.add_argument(
        '--rounds',
        type=int,
        default=15,
        metavar='N',
        help='how often each is timed, in turns (default 15)',
    )
    group.add_argument(
        '--images',
        metavar='DIR',
        help='folder of images to use instead of random ones',
    )
    group.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )
    group = parser.add_argument_group('output')
    group.add_argument('--out', metavar='FILE', help='JSON file to write')
    group.add_argument(
        '--plot', metavar='FILE', help='PNG file to draw: speed by GMACs'
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def _with_size(cfg: Config, size: tuple[int, int]) -> dict:
    """The model config for another image size, without teacher or weights."""
    model = copy.deepcopy(cfg.model)
    model.backbone.img_size = size
    model.backbone.pop('init_cfg', None)
    if 'teacher' in model:
        model.teacher = None
    head = model.get('decode_head', {}).get('compression')
    if head:
        patch = model.backbone.get('patch_size', 16)
        head.grid = (size[0] // patch, size[1] // patch)
    return model


def build_models(
    cfg: Config,
    size: tuple[int, int],
    share: float,
    methods: list[str],
    state: dict[str, Tensor] | None = None,
) -> dict[str, nn.Module]:
    """The dense model and each method at the same share of its GMACs.

    All have the same weights: those of ``state`` or random ones.

    Args:
        cfg (Config): With compression in the backbone.
        size (tuple[int, int]): Image size.
        share (float): Of the dense model's GMACs.
        methods (list[str]): 'ours', the same with static groups, and keys of
            ``METHODS``.
        state (dict, optional): State dict of a compressed checkpoint, whose
            structure 'ours' then has.
    """
    dense_cfg = _with_size(cfg, size)
    ours = dense_cfg.backbone.get('compression')
    if ours is None:
        raise SystemExit(
            'the config has no compression; give it one of ours, or '
            '--cfg-options model.backbone.compression.keep=0.7 to a config '
            "with type='PMVisionTransformer'"
        )
    dense_cfg.backbone.compression = None
    if dense_cfg.get('decode_head'):
        dense_cfg.decode_head.compression = None
    torch.manual_seed(0)
    dense = MODELS.build(dense_cfg)
    if state is None:
        MMLogger.get_instance('pm_seg', log_level='ERROR')  # a line a weight
        dense.init_weights()
    weights = state or dense.state_dict()
    weights = {k: v for k, v in weights.items() if '.compressor.' not in k}
    dense.load_state_dict(weights)
    models = {DENSE: dense}
    for method in methods:
        model_cfg = _with_size(cfg, size)
        own_form = method in ('ours', STATIC)
        if own_form and (method == STATIC or state is None):
            depth = len(dense.backbone.layers)
            model_cfg.backbone.compression.update(
                layers=list(range(depth // 3, depth)), budget='layer'
            )
        if method == STATIC:
            for module in (model_cfg.backbone, model_cfg.get('decode_head')):
                if module and module.get('compression'):
                    module.compression.adapt = 0
        elif not own_form:
            model_cfg.backbone.compression = METHODS[method]
            if model_cfg.get('decode_head'):
                model_cfg.decode_head.compression = None
        model = MODELS.build(model_cfg)
        own = state if method == 'ours' and state else weights
        model.load_state_dict(own)
        if method != 'ours' or not state:
            for module in compressible_modules(model).values():
                compressor = module.compressor
                if compressor.uses_scores:
                    compressor.store(torch.rand_like(compressor.scores) + 0.1)
            meet_target(model, dict(share=share))
        models[method] = model
    return models


def _images(folder: str | None, batch: int, size: tuple[int, int]) -> Tensor:
    if folder is None:
        return torch.randn(batch, 3, *size)
    paths = sorted(Path(folder).glob('*'))
    read = (cv2.imread(str(path)) for path in paths)
    files = [image for image in read if image is not None][:batch]
    if not files:
        raise SystemExit(f'--images {folder}: no images in this folder')
    files = [cv2.resize(image, size[::-1]) for image in files]
    images = torch.stack([torch.from_numpy(i) for i in files]).flip(-1)
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]


def _compiled(function: Callable, mode: str) -> Callable:
    if mode == 'eager':
        return function
    options = dict(mode='reduce-overhead') if mode == 'cudagraph' else {}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def _inference(model: nn.Module, images: Tensor, mode: str) -> Callable:
    predict = _compiled(lambda x: model(x, mode='tensor'), mode)

    def call() -> None:
        with torch.inference_mode():
            predict(images)

    return call


def _onnx(model: nn.Module, images: Tensor) -> Callable:
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


def _training(
    model: nn.Module, images: Tensor, mode: str, dtype: torch.dtype
) -> Callable:
    predict = _compiled(lambda x: model(x, mode='tensor'), mode)
    device = images.device.type
    mixed = dtype != torch.float32

    def call() -> None:
        with torch.autocast(device, dtype if mixed else None, enabled=mixed):
            loss = predict(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return call


def _peak_memory(call: Callable, device: str) -> float | None:
    """GiB allocated at most during a call; None on a CPU."""
    if device != 'cuda':
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(
    models: dict[str, nn.Module],
    images: Tensor,
    dtype: str,
    mode: str,
    train: bool,
    rounds: int,
) -> list[dict]:
    """One row for each model, timed in turns.

    Returns:
        list[dict]: Median and spread (half of the distance between the
        quartiles) of the latency in ms, images per second, ratio to dense,
        and memory in GiB.
    """
    calls, rows = {}, []
    memory = {}
    device = images.device.type
    for name, model in models.items():
        if train:
            call = _training(model.train(), images, mode, DTYPES[dtype])
        elif mode == 'onnx':
            call = _onnx(model.eval(), images)
        else:
            model = model.eval().to(DTYPES[dtype])
            call = _inference(model, images.to(DTYPES[dtype]), mode)
        for _ in range(3):
            call()
        memory[name] = _peak_memory(call, device)
        calls[name] = call
    seconds = time_interleaved(calls, rounds)
    base = median(seconds[DENSE])
    for name in models:
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
                latency_ms=middle * 1e3,
                spread_ms=(high - low) / 2 * 1e3,
                images_per_s=len(images) / middle,
                speedup=base / middle,
                peak_gib=memory[name],
            )
        )
    return rows


def table(rows: list[dict]) -> Table:
    """Rows of one setting as a table that fits 80 columns."""
    first = rows[0]
    what = 'training step' if first['train'] else 'inference'
    out = Table(
        title=f'{what}, {first["mode"]}, {first["dtype"]}, batch '
        f'{first["batch_size"]} of {"x".join(map(str, first["size"]))}'
    )
    heads = ('', 'GMACs', 'ms', '+-', 'img/s', 'speed', 'of ideal', 'GiB')
    for head in heads:
        out.add_column(head, justify='right' if head else 'left')
    for row in rows:
        memory = row['peak_gib']
        out.add_row(
            row['method'],
            f'{row["gmacs"]:.2f}',
            f'{row["latency_ms"]:.2f}',
            f'{row["spread_ms"]:.2f}',
            f'{row["images_per_s"]:.1f}',
            f'{row["speedup"]:.2f}x',
            f'{row["of_ideal"]:.0%}',
            '-' if memory is None else f'{memory:.2f}',
        )
    return out


def plot(rows: list[dict], path: Path) -> None:
    """Images per second by GMACs, one panel for each setting."""
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row['mode'], row['dtype'], row['batch_size']
        settings.setdefault(key, []).append(row)
    figure = Figure(figsize=(4.2 * len(settings), 3.6), dpi=110)
    axes = figure.subplots(1, len(settings), squeeze=False)[0]
    for axis, (key, group) in zip(axes, settings.items()):
        dense = group[0]
        ideal = dense['images_per_s'] * dense['gmacs']
        span = sorted(row['gmacs'] for row in group)
        axis.plot(
            span,
            [ideal / g for g in span],
            color='0.6',
            linestyle='--',
            label='dense, scaled by GMACs',
        )
        for row, marker in zip(group, 'osD^v*'):
            axis.plot(
                row['gmacs'],
                row['images_per_s'],
                marker,
                markersize=8,
                label=row['method'],
            )
        axis.set_title(', '.join(map(str, key[:2])) + f', batch {key[2]}')
        axis.set_xlabel('GMACs per image')
        axis.set_ylabel('images per second')
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@command()
def main(argv: list[str] | None = None) -> list[dict]:
    """Entry point of ``tools/benchmark.py``; returns all rows."""
    args = parse_args(argv)
    quiet_warnings()
    if 'cudagraph' in args.modes and args.device != 'cuda':
        wrong_usage('--modes cudagraph needs a CUDA device')
    if 'onnx' in args.modes and (
        args.train or args.device != 'cpu' or args.dtype != ['fp32']
    ):
        wrong_usage(
            '--modes onnx times inference with --device cpu --dtype fp32'
        )
    if 'onnx' in args.modes:
        check_exporter()
    cfg = load_config(args)
    for path in (args.out, args.plot):
        if path:
            check_output(path)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    native = cfg.model.backbone.get('img_size', 224)
    size = tuple(to_2tuple(args.size or native))
    state = None
    if args.checkpoint:
        saved = read_checkpoint(fetch_checkpoint(args.checkpoint))
        state = saved.get('state_dict', saved)
    models = build_models(cfg, size, args.share, args.methods, state)
    about = {}
    probe = torch.zeros(1, 3, *size)
    for name, model in models.items():
        model.eval()
        about[name] = dict(
            gmacs=count_macs(lambda m=model: m(probe, mode='tensor')) / 1e9,
            parameters=sum(p.numel() for p in model.parameters()),
        )
        model.to(args.device)
    machine = dict(
        device=torch.cuda.get_device_name()
        if args.device == 'cuda'
        else f'CPU, {torch.get_num_threads()} threads',
        torch=torch.__version__,
        python=platform.python_version(),
        pm_seg=__version__,
        config=Path(args.config).name,
    )
    console = Console(width=80)
    console.print(
        f'{machine["config"]} on {machine["device"]}, torch '
        f'{machine["torch"]}, pm_seg {machine["pm_seg"]}',
        highlight=False,
    )
    results: list[dict] = []
    for dtype in args.dtype:
        for batch in args.batch_size:
            images = _images(args.images, batch, size).to(args.device)
            for mode in args.modes:
                copies = copy.deepcopy(models)
                rows = measure(
                    copies, images, dtype, mode, args.train, args.rounds
                )
                for row in rows:
                    row.update(about[row['method']], **machine)
                    ideal = rows[0]['gmacs'] / row['gmacs']
                    row['of_ideal'] = row['speedup'] / ideal
                results += rows
                console.print(table(rows))
                if args.out:
                    out = Path(args.out)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(results, indent=1) + '\n')
                del copies
                gc.collect()
                torch._dynamo.reset()
                if args.device == 'cuda':
                    torch.cuda.empty_cache()
    if args.plot:
        plot(results, Path(args.plot))
        console.print(f'Plot: {args.plot}')
    return results


if __name__ == '__main__':
    main()
