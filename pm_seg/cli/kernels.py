"""Counts what a merge and a restore launch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import EncoderShape, ProgressiveCompressor
from ..core.merging import Chain

#: Operators that compute nothing, beside views.
_FREE = ('aten::_unsafe_view', 'aten::empty', 'aten::new_empty')
_LAUNCH = re.compile(
    r'^ +(?:\w+ = )?(?:cpp_fused\w*|triton_\w+\.run|extern_kernels\.\w+|'
    r'torch\.ops\.aten\.\w+\.\w+|aten\.\w+)\(',
    re.MULTILINE,
)


class OperatorCounter(TorchDispatchMode):
    """Context manager that counts operators that launch something.

    Attributes:
        names (Counter): How often each ran, by name. Views are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        view = any(
            argument.alias_info is not None
            and not argument.alias_info.is_write
            for argument in schema.arguments
        )
        if not view and schema.name not in _FREE:
            self.names[schema.name.removeprefix('aten::')] += 1
        return func(*args, **(kwargs or {}))


def compiled_launches(
    function: Callable[..., object], *arguments: object
) -> int | None:
    """Kernels that inductor's code for a function calls.

    Fused ones, and those of libraries; None if it cannot be compiled here.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    try:
        _, sources = run_and_get_code(
            torch.compile(function, fullgraph=True, dynamic=False), *arguments
        )
    except Exception:  # no compiler, an operator it has not: many kinds
        return None
    finally:
        torch._dynamo.reset()
    bodies = [source.partition('def call(')[2] for source in sources]
    return sum(len(_LAUNCH.findall(body)) for body in bodies)


@torch.no_grad()
def count_kernels(
    shape: EncoderShape, keep: float = 0.5, device: str = 'cpu'
) -> list[dict]:
    """What the first merge of the default compression launches, part by part.

    Args:
        shape (EncoderShape): The transformer.
        keep (float): Share of the layers' MACs. Defaults to 0.5.
        device (str): Where to run. Defaults to 'cpu'.

    Returns:
        list[dict]: 'part'; 'eager', operators; 'names', a Counter of them;
        'compiled', kernels, None where they are not counted.
    """
    compressor = ProgressiveCompressor(shape, keep).to(device)
    prefix, tokens = shape.num_prefix, shape.num_tokens
    left = next(n for n in compressor.tokens(shape.grid) if n < tokens)
    x = torch.randn(1, prefix + tokens, shape.dims, device=device)
    merge = compressor._match(x, tokens - left, 1, None, shape.grid)
    done = Chain(x, prefix)
    done.merge(merge, compressor.gain[1])
    (step,) = done.steps
    after = done.x + 1

    def find(x: Tensor) -> tuple[Tensor, ...]:
        found = compressor._match(x, tokens - left, 1, None, shape.grid)
        return found.kept, found.moved, found.into, found.place

    def merged(x: Tensor) -> tuple[Tensor, ...]:
        chain = Chain(x, prefix)
        chain.merge(merge, step.gain.amax())
        return chain.x, chain.size, chain.steps[0].gain

    def sizes(size: Tensor) -> Tensor:
        return size.squeeze(2).log()

    def restored(after: Tensor) -> Tensor:
        return merge.restore(x, step.merged, after, step.gain)

    parts = {
        'find groups': (find, x, Counter()),
        # Sizes begin once, the gain is a parameter.
        'merge': (merged, x, Counter(ones=1, amax=1)),
        'sizes, for attention': (sizes, done.size, Counter()),
        'restore': (restored, after, Counter()),
    }
    rows = []
    for part, (function, argument, besides) in parts.items():
        counter = OperatorCounter()
        with counter:
            function(argument)
        names = counter.names - besides
        rows.append(
            dict(
                part=part,
                eager=sum(names.values()),
                names=dict(names),
                compiled=compiled_launches(function, argument),
            )
        )
    return rows


def kernel_table(rows: Sequence[dict]) -> Table:
    """The counts as a table that fits 80 columns."""
    out = Table(title='Operators and kernels of one merge and its restore')
    for head in ('', 'eager', 'compiled', 'operators'):
        out.add_column(
            head, justify='right' if head in ('eager', 'compiled') else 'left'
        )
    for row in rows:
        names = (
            name if count == 1 else f'{count} {name}'
            for name, count in row['names'].items()
        )
        compiled = row['compiled']
        out.add_row(
            row['part'],
            str(row['eager']),
            'not counted' if compiled is None else str(compiled),
            ', '.join(names),
        )
    counts = [row['compiled'] for row in rows]
    out.add_row(
        'together',
        str(sum(row['eager'] for row in rows)),
        'not counted' if None in counts else str(sum(counts)),
        '',
    )
    return out
