"""Kills runs at random moments and compares what they end with.

``python tests/kill_runs.py --runs 20`` calibrates, compresses and fine-tunes
a small Segmenter with everything random on, sends the process SIGKILL at a
random moment, goes on with ``--resume``, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers import dense_checkpoint, small_config
from make_scenes import write_scenes
from mmengine.logging import MMLogger

from pm_seg.cli import train
from pm_seg.utils.checkpoints import read_checkpoint

ITERS = 8


def write_config(folder: Path, scenes: Path) -> None:
    """Config of the run, with all there is to go wrong: a teacher, dropout,
    drop path, augmentation, a schedule, one checkpoint kept.
    """
    cfg = small_config(scenes, folder / 'work', iters=ITERS)
    cfg.model.backbone.update(drop_path_rate=0.3, drop_rate=0.1)
    cfg.model.decode_head.dropout_ratio = 0.1
    cfg.model.teacher = dict(alpha=0.5, tau=20.0)
    cfg.custom_hooks += [dict(type='SeedIterationHook')]
    cfg.param_scheduler = [
        dict(
            type='CosineAnnealingLR',
            eta_min=0.0,
            begin=0,
            end=ITERS,
            by_epoch=False,
        )
    ]
    cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=1)
    cfg.load_from = dense_checkpoint(cfg, folder)
    cfg.dump(folder / 'config.py')


def start(config: Path, work: Path, log: Path, *flags: str) -> int:
    """Train in a process of its own; returns its id.

    A fork: it has the libraries loaded, and dies like any process.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        MMLogger._instance_dict.clear()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        train.main([str(config), '--work-dir', str(work), *flags])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, log: Path) -> None:
    """Wait for a run that must succeed."""
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(f'the run failed:\n{log.read_text()[-3000:]}')


def milestones(log: Path) -> list[str]:
    """What a run has done so far, by its log."""
    found = ['starting']
    for line in log.read_text().splitlines() if log.exists() else ():
        for pattern, text in (
            (r'Importance of tokens \[(\d+/\d+)\]', 'fitted batch {}'),
            (r'Ways to merge \[(\d+/\d+)\]', 'tried {}'),
            (r'Distilling from', 'compressed'),
            (r'Saving checkpoint at (\d+)', 'saving iteration {}'),
            (r'Iter\(train\) +\[ *(\d+/\d+)\]', 'trained {}'),
        ):
            match = re.search(pattern, line)
            if match:
                found.append(text.format(*match.groups()))
    return found


@dataclass
class Outcome:
    """A killed run: when, and how it ended after ``--resume``."""

    seconds: float
    state: str
    resumed: str
    difference: float


def kill_and_resume(
    number: int, moment: float, pace: float, root: Path
) -> Outcome:
    """One row of the table.

    Args:
        number (int): Of the run.
        moment (float): Milestones to wait for, and the part of the way to
            the next one.
        pace (float): Seconds from one to the next in an uninterrupted run.
        root (Path): Folder of all runs.
    """
    work, log = root / f'work{number}', root / f'log{number}'
    begin = time.monotonic()
    process = start(root / 'config.py', work, log)
    ended = 0
    while len(milestones(log)) <= int(moment) and not ended:
        ended, _ = os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
    if not ended:
        time.sleep(moment % 1 * pace)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    seconds = time.monotonic() - begin
    state = milestones(log)[-1]
    log = root / f'log{number}-resumed'
    wait(start(root / 'config.py', work, log, '--resume'), log)
    text = log.read_text()
    found = re.findall(r'work\d+/(iter_\d+)\.pth', text)
    resumed = 'anew' if 'Nothing to resume' in text else (found or ['?'])[0]
    leftovers = list(work.glob('*.partial'))
    if leftovers:
        raise RuntimeError(f'left behind: {leftovers}')
    return Outcome(seconds, state, resumed, difference(root / 'whole', work))


def difference(first: Path, second: Path) -> float:
    """Largest difference of any value in the final checkpoints."""
    states = [
        read_checkpoint(folder / f'iter_{ITERS}.pth')['state_dict']
        for folder in (first, second)
    ]
    if states[0].keys() != states[1].keys():
        raise RuntimeError('the checkpoints have other entries')
    return max(
        float((value.double() - states[1][key].double()).abs().max())
        for key, value in states[0].items()
    )


def run(root: Path, runs: int, seed: int = 0) -> list[Outcome]:
    """All killed runs; prints the rows as they come."""
    MMLogger.get_instance('kill_runs', log_level='ERROR')  # a line a weight
    scenes = root / 'scenes'
    for _ in write_scenes(scenes, num_train=12, num_val=2):
        pass
    write_config(root, scenes)
    begin, log = time.monotonic(), root / 'log'
    wait(start(root / 'config.py', root / 'whole', log), log)
    duration = time.monotonic() - begin
    total = len(milestones(log))
    print(f'An uninterrupted run takes {duration:.0f} s.\n')
    print('| run | killed after | it had | resumed from | difference |')
    print('|---|---|---|---|---|', flush=True)
    rng, outcomes = random.Random(seed), []
    for number in range(1, runs + 1):
        # one in each part of the run
        moment = (number - 1 + rng.random()) / runs * (total - 1)
        outcome = kill_and_resume(number, moment, duration / total, root)
        outcomes.append(outcome)
        print(
            f'| {number} | {outcome.seconds:.1f} s | {outcome.state} | '
            f'{outcome.resumed} | {outcome.difference:g} |',
            flush=True,
        )
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Print the table; the status is the number of differing results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder), args.runs, args.seed)
    wrong = sum(outcome.difference > 0 for outcome in outcomes)
    print(f'\n{len(outcomes) - wrong} of {len(outcomes)} ended identical.')
    return wrong


if __name__ == '__main__':
    sys.exit(main())
