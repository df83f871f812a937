"""Do the tests of the core notice deliberate faults?

Each fault below is put into a temporary copy of the core, one at a time, and
the tests named with it run there until the first failure. A fault that no
test notices has survived, and the exit code is 1.

    python tools/lab/mutation_check.py
    python tools/lab/mutation_check.py --only segments centres --out faults.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  loaded once, for all runs
import pytest
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """A change of the source.

    Attributes:
        module (str): File of pm_seg/core, without suffix.
        what (str): The fault in words.
        old, new (str): Text that occurs once, and what it becomes.
        tests (tuple[str, ...]): Files of tests/core that may notice it.
    """

    module: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


MAPS = ('test_token_map', 'test_properties')
ADAPT = ('test_matching', 'test_compressor')
SUMS = ('test_segments', 'test_token_map', 'test_properties')

FAULTS = (
    Fault(
        'token_map', 'residual restore forgets the token itself',
        'return x + restored if extra is None else x + extra + restored\n\n'
        '    def spread(self, z: Tensor) -> Tensor:\n'
        '        """What each token\'s group holds, (B, P+K, C) -> '
        '(B, P+N, C)."""\n        return z.index_select',
        'return restored if extra is None else extra + restored\n\n'
        '    def spread(self, z: Tensor) -> Tensor:\n'
        '        """What each token\'s group holds, (B, P+K, C) -> '
        '(B, P+N, C)."""\n        return z.index_select', MAPS,
    ),
    Fault(
        'token_map', 'residual restore adds the output, not the update',
        '_detailed(self.detail, x, y - z, z, self.live)',
        '_detailed(self.detail, x, y, z, self.live)', MAPS,
    ),
    Fault(
        'token_map', 'pruned tokens are not put back',
        'return torch.where(self.live.unsqueeze(-1), restored, x)',
        'return restored', MAPS,
    ),
    Fault(
        'token_map', 'the detail path reaches pruned tokens',
        'if live is not None:\n        hidden = hidden * live.unsqueeze(-1)\n',
        'if live is not None:\n        hidden = hidden * 1\n', MAPS,
    ),
    Fault(
        'token_map', 'the dense form loses the order of groups',
        'group = self.segments.given[self.slot]', 'group = self.slot', MAPS,
    ),
    Fault(
        'token_map', 'the dense shortcut is inverted',
        'shortcut = (~self.live).to', 'shortcut = self.live.to', MAPS,
    ),
    Fault(
        'segments', 'sums ignore the weights',
        '    weight = weight.to(x.dtype).index_select(0, segments.order)\n',
        '    weight = torch.ones_like(weight).to(x.dtype).index_select(\n'
        '        0, segments.order\n    )\n', SUMS,
    ),
    Fault(
        'segments', 'sums of blocks take the wrong axis',
        'block.unflatten(1, (count, size)).sum(2)',
        'block.unflatten(1, (size, count)).sum(1)', SUMS,
    ),
    Fault(
        'segments', 'tokens outside all groups are summed as well',
        'alive = torch.cat([live.new_ones(num_prefix), live])',
        'alive = torch.ones(num_prefix + len(live), dtype=torch.bool)', SUMS,
    ),
    Fault(
        'segments', 'index tables of a second image point into the first',
        '(index + rows * image).flatten()',
        '(index + 0 * rows * image).flatten()', SUMS,
    ),
    Fault(
        'segments', 'weights of pruned tokens get a gradient',
        'if order.numel() < weight.numel():', 'if False:',
        ('test_segments', 'test_compressor', 'test_properties'),
    ),
    Fault(
        'scores', 'scores are not summed over heads and channels alike',
        '(value.double() * grad.double()).sum(dim=(1, 3))',
        '(value.double() * grad.double()).abs().sum(dim=(1, 3))',
        ('test_scores',),
    ),
    Fault(
        'scores', 'scores depend on how images are batched',
        'score.abs().sum(0) * batch, batch',
        'score.sum(0).abs() * batch, batch',
        ('test_scores',),
    ),
    Fault(
        'scores', 'prefix tokens are scored',
        'value_gradient_scores(value, grad)[:, self.num_prefix :]',
        'value_gradient_scores(value, grad)[:, : self.num_tokens]',
        ('test_scores',),
    ),
    Fault(
        'structure', 'the decay of scores over depth is dropped',
        'return scores / norm * (1 - decay * index).unsqueeze(1)',
        'return scores / norm', ('test_structure',),
    ),
    Fault(
        'structure', 'the threshold of centres is off by one',
        'high = pool[-max(num_keep * num_layers, 1)]',
        'high = pool[-max(num_keep * num_layers, 1) - 1]',
        ('test_structure',),
    ),
    Fault(
        'structure', 'row windows test the row of the centre itself',
        'row = (first + 1) // width', 'row = first // width',
        ('test_structure',),
    ),
    Fault(
        'structure', 'nearest centres are searched one column short',
        'if step > best.max():', 'if step >= best.max() - width:',
        ('test_structure',),
    ),
    Fault(
        'structure', 'the nearest centre above always wins',
        'torch.where(rows - above <= below - rows, above, below)',
        'torch.where(above >= 0, above, below)', ('test_structure',),
    ),
    Fault(
        'structure', 'restore weights are no pseudo-inverse',
        'power = sum_by_group(merge.square(), group)',
        'power = sum_by_group(merge, group)',
        ('test_structure', 'test_token_map'),
    ),
    Fault(
        'centres', 'a new centre changes too little around it',
        'reach = int(farthest**0.5) + 1', 'reach = int(farthest**0.5) // 2',
        ('test_centres',),
    ),
    Fault(
        'centres', 'the largest value of rows is not renewed',
        'peaks[band] = merit[band].max(1)', 'peaks[row] = merit[row].max()',
        ('test_centres',),
    ),
    Fault(
        'centres', 'centres do not rotate over depth',
        'age = torch.where(mask, 0.0, age + 1)', 'age = age + 1',
        ('test_centres',),
    ),
    Fault(
        'centres', 'pruned tokens may become centres',
        '* (1 + age) * alive', '* (1 + age)',
        ('test_centres', 'test_properties'),
    ),
    Fault(
        'budget', 'more is spent than the budget',
        'if costs[rows, chosen].sum() <= limit * (1 + 1e-9):', 'if True:',
        ('test_budget',),
    ),
    Fault(
        'budget', 'the most loss is bought instead of the least',
        'taken.append(table.argmin(0))', 'taken.append(table.argmax(0))',
        ('test_budget',),
    ),
    Fault(
        'budget', 'fewer tokens may cost less loss',
        'np.maximum.accumulate(np.maximum(losses, _TINY))',
        'np.maximum(losses, _TINY)', ('test_budget',),
    ),
    Fault(
        'detail', 'the fit is not of reduced rank by explained variance',
        'leading = vectors[:, -rank:]', 'leading = vectors[:, :rank]',
        ('test_detail',),
    ),
    Fault(
        'detail', 'pruned tokens take part in the fit',
        'x = x[:, token_map.live[prefix:]]', 'x = x', ('test_detail',),
    ),
    Fault(
        'matching', 'the least similar pairs merge',
        'order = best.argsort(dim=-1, descending=True)',
        'order = best.argsort(dim=-1)', ('test_merging', 'test_properties'),
    ),
    Fault(
        'matching', 'means do not count what tokens stand for',
        'position.expand_as(x), x * size)', 'position.expand_as(x), x)',
        ('test_merging', 'test_properties'),
    ),
    Fault(
        'matching', 'the second matching forgets the first',
        'place = position.gather(1, place)', 'place = position',
        ('test_compressor', 'test_properties'),
    ),
    Fault(
        'matching', 'windows begin one column late',
        'pad = (0, width - 2 * columns, 0, height - 2 * rows)',
        'pad = (width - 2 * columns, 0, 0, height - 2 * rows)',
        ('test_merging', 'test_properties'),
    ),
    Fault(
        'matching', 'groups are not renewed between rounds',
        'seeds = image_sum(metric, position, seeds.shape[1])',
        'seeds = seeds * 1', ADAPT,
    ),
    Fault(
        'matching', 'tokens go to the least similar group around',
        'choice = similarity.argmax(-1', 'choice = similarity.argmin(-1',
        ADAPT,
    ),
    Fault(
        'matching', 'long groups attract more tokens',
        'seeds = F.normalize(seeds, dim=-1)', 'seeds = seeds * 1', ADAPT,
    ),
    Fault(
        'matching', 'groups to the right are out of reach',
        'columns = (torch.arange(width)[:, None] + offsets)',
        'columns = (torch.arange(width)[:, None] + offsets.clamp_max(0))',
        ADAPT,
    ),
    Fault(
        'matching', 'the reach does not follow the width of groups',
        'step = max(round((height * width / count) ** 0.5), 1)', 'step = 1',
        ADAPT,
    ),
    Fault(
        'matching', 'sketches fold without signs',
        '(x * signs.to(x.dtype)).unflatten', '(x * 1).unflatten', ADAPT,
    ),
    Fault(
        'segments', 'groups of all images are summed into the first',
        'return (position + count * image[:, None]).flatten()',
        'return (position + 0 * image[:, None]).flatten()',
        ('test_segments', 'test_compressor'),
    ),
    Fault(
        'segments', 'sums come back in half precision under autocast',
        'return total.to(x.dtype)', 'return total',
        ('test_segments', 'test_compressor'),
    ),
    Fault(
        'token_map', 'groups of an image merge to sums, not means',
        'return total / sizes.clamp_min(1)', 'return total * 1',
        ('test_compressor', 'test_properties'),
    ),
    Fault(
        'token_map', 'tokens may move into prefix tokens',
        'return torch.cat([first, group + num_prefix], 1)',
        'return torch.cat([first, group], 1)',
        ('test_compressor', 'test_properties'),
    ),
    Fault(
        'merging', 'attention does not count merged tokens',
        'F.pad(size.squeeze(-1).log(), (self.num_prefix, 0))',
        'F.pad(0 * size.squeeze(-1), (self.num_prefix, 0))',
        ('test_merging', 'test_properties'),
    ),
    Fault(
        'compressor', 'learned weights are not carried to other grids',
        'layout.merge + _resize(merge, self.grid, grid)', 'layout.merge',
        ('test_compressor', 'test_properties'),
    ),
    Fault(
        'compressor', 'the cache of derived maps is not bounded',
        'while len(self._layouts) > self.max_cached_layouts:',
        'while len(self._layouts) > 10**9:',
        ('test_compressor', 'test_properties'),
    ),
)  # fmt: skip


class FirstFailure:
    """A pytest plugin that remembers which test failed."""

    def __init__(self) -> None:
        self.name = ''

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split('[')[0].split('/')[-1]


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of pytest and the first failure, in a process of its own."""
    context = multiprocessing.get_context('fork')
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        quiet = os.open(folder / 'output.txt', os.O_WRONLY | os.O_CREAT)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        found = FirstFailure()
        paths = [f'tests/core/{name}.py' for name in tests]
        brief = ['-x', '-p', 'no:cacheprovider', '--hypothesis-profile=brief']
        code = pytest.main([*brief, *paths], [found])
        send.send((int(code), found.name))

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return -1, ''
    finally:
        process.join()


def copy_core(folder: Path) -> None:
    """The core and its tests, without what needs OpenMMLab."""
    skip = shutil.ignore_patterns('__pycache__')
    (folder / 'pm_seg').mkdir()
    (folder / 'pm_seg' / '__init__.py').touch()
    shutil.copytree(ROOT / 'pm_seg/core', folder / 'pm_seg/core', ignore=skip)
    shutil.copytree(ROOT / 'tests/core', folder / 'tests/core', ignore=skip)
    for name in ('tests/conftest.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder / name)


def check(fault: Fault, folder: Path) -> tuple[str, str]:
    """Outcome and the first test that fails."""
    path = folder / 'pm_seg' / 'core' / f'{fault.module}.py'
    source = path.read_text()
    if source.count(fault.old) != 1:
        return 'not applied', f'{source.count(fault.old)} matches'
    path.write_text(source.replace(fault.old, fault.new))
    try:
        code, test = run_tests(folder, fault.tests)
    finally:
        path.write_text(source)
    if code == 0:
        return 'SURVIVED', ''
    # No test failed, say, because the module cannot be imported any more.
    return ('caught', test) if test else (f'broken ({code})', '')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    modules = list(dict.fromkeys(fault.module for fault in FAULTS))
    parser.add_argument('--only', nargs='+', choices=modules, default=modules)
    parser.add_argument('--match', default='', help='regular expression')
    parser.add_argument(
        '--no-control',
        action='store_true',
        help='do not run the tests without a fault first',
    )
    parser.add_argument('--out', help='Markdown file to write the table to')
    args = parser.parse_args(argv)
    sys.dont_write_bytecode = True  # a fault may leave size and time alone
    torch.set_num_threads(1)
    console = Console(width=100)
    table = Table('module', 'fault', 'outcome', 'first test that fails')
    lines = ['| module | fault | caught by |', '|---|---|---|']
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_core(folder)
        faults = [
            fault
            for fault in FAULTS
            if fault.module in args.only and re.search(args.match, fault.what)
        ]
        used = tuple(dict.fromkeys(t for f in faults for t in f.tests))
        code, test = 0, ''
        if not args.no_control:
            code, test = run_tests(folder, used)
        if code:
            output = (folder / 'output.txt').read_text()
            sys.exit(f'{output[-3000:]}\nWithout any fault {test} fails')
        for fault in faults:
            outcome, test = check(fault, folder)
            wrong += outcome != 'caught'
            table.add_row(fault.module, fault.what, outcome, test)
            lines.append(f'| {fault.module} | {fault.what} | `{test}` |')
            print(f'{outcome}: {fault.module}, {fault.what}', flush=True)
    console.print(table)
    print(f'{len(faults) - wrong} of {len(faults)} faults caught')
    if args.out:
        Path(args.out).write_text('\n'.join(lines) + '\n')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
