r"""Counts what a merge and a restore launch, and the bytes they move.

In eager mode and compiled, on tokens of the size of a config's backbone.

example:
  # two batch sizes, as on a GPU
  python tools/lab/kernels.py configs/segmenter_vit-s_pm_ade20k.py \
      --dtype bf16 --batch-size 1 32
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pm_seg.cli.arguments import add_config, make_parser, output_file
from pm_seg.cli.bench_measure import DTYPES
from pm_seg.cli.benchmark import write_rows
from pm_seg.cli.config import load_config
from pm_seg.cli.ending import command
from pm_seg.core import EncoderShape, ProgressiveCompressor
from pm_seg.core.merging import Chain

console = Console(width=80, highlight=False)

#: Operators that compute nothing, beside views.
_FREE = ('aten::_unsafe_view', 'aten::empty', 'aten::new_empty')
#: Kernels of operators that need several in ATen's CUDA code: copies of what
#: they change, indices to sort along.
_KERNELS = dict(scatter=2, sort=3)
#: Operators that read of their first argument as much as they return.
_SELECTING = ('index_select', 'gather')
_LAUNCH = re.compile(
    r'^ +(?:\w+ = )?(?:cpp_fused\w*|triton_\w+\.run|extern_kernels\.\w+|'
    r'torch\.ops\.aten\.\w+\.\w+|aten\.\w+)\(',
    re.MULTILINE,
)


class OperatorCounter(TorchDispatchMode):
    """Context manager that counts operators that launch something.

    Attributes:
        names (Counter): How often each ran, by name. Views are left out.
        bytes (Counter): What each read and wrote, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        view = any(
            argument.alias_info is not None
            and not argument.alias_info.is_write
            for argument in schema.arguments
        )
        out = func(*args, **(kwargs or {}))
        if not view and schema.name not in _FREE:
            name = schema.name.removeprefix('aten::')
            self.names[name] += 1
            read = (out, args[1:]) if name in _SELECTING else args
            self.bytes[name] += sum(
                leaf.numel() * leaf.element_size()
                for leaf in tree_leaves((out, read, kwargs))
                if isinstance(leaf, Tensor)
            )
        return out


def compiled_launches(
    function: Callable[..., object], *arguments: object
) -> tuple[int | None, int | None]:
    """Kernels that inductor's code for a function calls, and their bytes.

    Fused ones, and those of libraries; None where it cannot be compiled or,
    before torch 2.5, counted.
    """
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    metrics.reset()
    # Bytes are counted for this log alone, and not for code from a cache.
    log = getattr(compile_fx, 'inductor_metrics_log', None)
    if log is None:  # torch 2.4
        return None, None
    before = log.level, log.propagate
    log.setLevel('INFO')
    log.propagate = False
    try:
        with config.patch(force_disable_caches=True):
            _, sources = run_and_get_code(
                torch.compile(function, fullgraph=True, dynamic=False),
                *arguments,
            )
    except Exception:  # no compiler, an operator it has not: many kinds
        return None, None
    finally:
        torch._dynamo.reset()
        log.setLevel(before[0])
        log.propagate = before[1]
    bodies = [source.partition('def call(')[2] for source in sources]
    launches = sum(len(_LAUNCH.findall(body)) for body in bodies)
    return launches, metrics.num_bytes_accessed


@torch.no_grad()
def count_kernels(
    shape: EncoderShape,
    keep: float = 0.5,
    device: str = 'cpu',
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """What the first merge of the default compression launches, part by part.

    Args:
        shape (EncoderShape): The transformer.
        keep (float): Share of the layers' MACs. Defaults to 0.5.
        device (str): Where to run. Defaults to 'cpu'.
        batch (int): Images at a time. Defaults to 1.
        dtype (torch.dtype): Of the tokens. Defaults to float32.

    Returns:
        list[dict]: 'part'; 'eager', operators; 'names', a Counter of them;
        'kernels', those that they launch on CUDA, as far as known here;
        'bytes', read and written; 'compiled' and 'compiled_bytes', of
        inductor's kernels, None where they are not counted.
    """
    compressor = ProgressiveCompressor(shape, keep).to(device, dtype)
    prefix, tokens = shape.num_prefix, shape.num_tokens
    left = next(n for n in compressor.tokens(shape.grid) if n < tokens)
    x = torch.randn(batch, prefix + tokens, shape.dims, device=device)
    x = x.to(dtype)
    done = Chain(x, prefix)
    rest = done.size, tokens - left, 1, None, shape.grid
    merge = compressor._match(x, *rest)
    done.merge(merge, compressor.gain[1])
    ((_, _, became, gain),) = done.steps
    after = done.x + 1

    def find(x: Tensor) -> tuple[Tensor, ...]:
        found = compressor._match(x, *rest)
        return found.kept, found.moved, found.into, found.rows

    def merged(x: Tensor) -> tuple[Tensor, ...]:
        chain = Chain(x, prefix)
        chain.merge(merge, gain.amax())
        return chain.x, chain.size, chain.log_size, chain.steps[0][3]

    def restored(after: Tensor) -> Tensor:
        return merge.restore(x, became, after, gain)

    parts = {
        'find groups': (find, x, Counter()),
        # Sizes begin once, the gain is a parameter.
        'merge': (merged, x, Counter(ones=1, amax=1)),
        'restore': (restored, after, Counter()),
    }
    rows = []
    for part, (function, argument, besides) in parts.items():
        counter = OperatorCounter()
        with counter:
            function(argument)
        names = counter.names - besides
        compiled, moved = compiled_launches(function, argument)
        rows.append(
            dict(
                part=part,
                batch=batch,
                eager=sum(names.values()),
                names=dict(names),
                kernels=sum(_KERNELS.get(k, 1) * n for k, n in names.items()),
                bytes=sum(counter.bytes[name] for name in names),
                compiled=compiled,
                compiled_bytes=moved,
            )
        )
    return rows


def kernel_table(rows: Sequence[dict]) -> Table:
    """The counts as a table that fits 80 columns."""
    columns = ('eager', 'kernels', 'bytes', 'compiled', 'compiled_bytes')
    heads = ('operators', 'kernels', 'MB', 'compiled', 'MB')
    out = Table(
        title=f'One merge and its restore, batch {rows[0]["batch"]}: '
        'operators in eager mode, kernels, bytes moved',
        padding=(0, 1),
    )
    out.add_column('')
    for head in heads:
        out.add_column(head, justify='right')
    total = {'part': 'together'}
    for name in columns:
        values = [row[name] for row in rows]
        total[name] = None if None in values else sum(values)
    for row in (*rows, total):
        cells = []
        for name in columns:
            value = row[name]
            if value is not None and name.endswith('bytes'):
                value = f'{value / 1e6:.1f}'
            cells.append('not counted' if value is None else str(value))
        out.add_row(row['part'], *cells)
    return out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('lab/kernels.py', __doc__)
    add_config(parser)
    parser.add_argument(
        '--keep',
        type=float,
        default=0.5,
        help='share of the MACs of the layers',
    )
    parser.add_argument(
        '--batch-size', type=int, nargs='+', default=[1], metavar='N',
        help='images at a time (default 1)',
    )  # fmt: skip
    parser.add_argument(
        '--dtype', choices=list(DTYPES), default='fp32',
        help='of the tokens (default fp32)',
    )  # fmt: skip
    parser.add_argument(
        '--device', default='cpu', help='where to run (default cpu)'
    )
    parser.add_argument(
        '--out', type=output_file, metavar='FILE', help='JSON file to write'
    )
    return parser.parse_args(argv)


def backbone_shape(cfg: Config) -> EncoderShape:
    """Of the config's backbone, whatever its compression is."""
    backbone = {**cfg.model.backbone, 'compression': dict(type='pm', keep=1.0)}
    for source in ('init_cfg', 'pretrained'):
        backbone.pop(source, None)
    return MODELS.build(backbone).compressor.shape


@command()
def main(argv: list[str] | None = None) -> list[dict]:
    """Print a table for each batch size; returns all rows."""
    args = parse_args(argv)
    cfg = load_config(args)
    shape, rows = backbone_shape(cfg), []
    for batch in args.batch_size:
        found = count_kernels(
            shape, args.keep, args.device, batch, DTYPES[args.dtype]
        )
        console.print(kernel_table(found))
        rows += found
    write_rows(args.out, rows)
    return rows


if __name__ == '__main__':
    main()
