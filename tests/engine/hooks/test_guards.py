"""Hooks that stop a run cleanly, on small loops."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils.data import DataLoader

from pm_seg.engine import InterruptHook, RunGuardHook, WholeCheckpointHook
from pm_seg.engine.faults import (
    RunStoppedError,
    check_labels,
    dead_worker,
    explain,
)
from pm_seg.engine.hooks import guard_hook, interrupt_hook
from pm_seg.utils.checkpoints import (
    latest_intact_checkpoint,
    read_checkpoint,
)

ITEMS = [dict(inputs=torch.tensor([float(i)])) for i in range(8)]


class Line(BaseModel):
    """One weight, learned; its loss is what a test asks for."""

    def __init__(self, act=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.act = act or (lambda step: None)
        self.step = 0

    def forward(self, inputs, mode: str = 'tensor'):
        if mode == 'loss':
            self.step += 1
            factor = self.act(self.step) or 1.0
            return dict(loss=(self.weight - 1).square().sum() * factor)
        self.act(-1)
        return [torch.zeros(1)]


class Accuracy(BaseMetric):
    """A metric with given results, one for each validation."""

    def __init__(self, *results: float) -> None:
        super().__init__()
        self.given = iter(results)

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(accuracy=next(self.given))


def run(folder: Path, act, by_epoch: bool = False, **options) -> Runner:
    hooks = [InterruptHook(), RunGuardHook(), *options.pop('hooks', [])]
    kind = options.pop('kind', Runner)
    scores = options.pop('scores', (0.5, 0.5))
    loop = (
        dict(by_epoch=True, max_epochs=2)
        if by_epoch
        else dict(type='IterBasedTrainLoop', max_iters=6, val_interval=3)
    )
    saving = dict(type=WholeCheckpointHook, by_epoch=by_epoch, interval=2)
    runner = kind(
        model=Line(act),
        work_dir=str(folder),
        train_dataloader=DataLoader(ITEMS, 2),
        train_cfg=loop,
        val_dataloader=DataLoader(ITEMS, 2),
        val_cfg=dict(),
        val_evaluator=Evaluator(Accuracy(*scores)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint={**saving, **options},
            logger=dict(type='LoggerHook', interval=1),
        ),
        custom_hooks=hooks,
        log_level='ERROR',
        experiment_name=folder.name,
        default_scope='mmengine',
    )
    runner.train()
    return runner


def interrupt(at: int, number: int = signal.SIGTERM):
    return lambda step: os.kill(os.getpid(), number) if step == at else None


def test_interrupted_and_saved(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStoppedError, match='saved after iteration 3') as e:
        run(tmp_path, interrupt(3))
    assert e.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    saved = read_checkpoint(tmp_path / 'iter_3.pth')
    assert saved['meta']['iter'] == 3 and 'optimizer' in saved
    assert explain(e.value, tmp_path) is e.value


def test_an_iteration_that_is_saved_is_not_saved_again(tmp_path) -> None:
    with pytest.raises(RunStoppedError, match='iter_4.pth'):
        run(tmp_path, interrupt(4), max_keep_ckpts=1)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_4.pth']


@pytest.mark.parametrize('kind', [Runner, FlexibleRunner])
@pytest.mark.parametrize('at', [3, -1])  # in an iteration, in a validation
def test_saved_with_the_number_of_finished_iterations(
    tmp_path: Path, kind: type, at: int
) -> None:
    with pytest.raises(RunStoppedError, match='saved after iteration 3'):
        run(tmp_path, interrupt(at), kind=kind)
    meta = read_checkpoint(tmp_path / 'iter_3.pth')['meta']
    assert (meta['epoch'], meta['iter']) == (0, 3)


def test_interrupted_in_a_validation_with_ema(tmp_path: Path) -> None:
    """Averaged weights are swapped in then; each goes where it belongs."""
    ema = EMAHook(momentum=0.5)
    with pytest.raises(RunStoppedError, match='saved after iteration 3'):
        run(tmp_path, interrupt(-1), hooks=[ema])
    saved = read_checkpoint(tmp_path / 'iter_3.pth')
    whole = tmp_path / 'whole'
    run(whole, None, hooks=[EMAHook(momentum=0.5)], interval=3)
    expected = read_checkpoint(whole / 'iter_3.pth')
    for part in ('state_dict', 'ema_state_dict'):
        assert saved[part].keys() == expected[part].keys()
        for key, value in expected[part].items():
            assert torch.equal(saved[part][key], value), (part, key)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10):  # handlers run between instructions
                pass
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, twice)
    assert latest_intact_checkpoint(tmp_path).endswith('iter_2.pth')
    stop = explain(KeyboardInterrupt(), tmp_path)
    assert stop.code == 130 and 'iter_2.pth' in str(stop)


def test_epochs_end_without_saving(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError, match='inside an epoch.*epoch_1.pth'):
        run(tmp_path, interrupt(6), by_epoch=True, interval=1)
    assert not list(tmp_path.glob('iter_*'))


def test_nan_loss_names_the_last_good_checkpoint(tmp_path, capsys) -> None:
    def act(step: int) -> float | None:
        if step == 5:  # what a diverged run saved
            path = tmp_path / 'iter_4.pth'
            saved = read_checkpoint(path)
            saved['state_dict']['weight'].fill_(float('inf'))
            torch.save(saved, path)
            return float('nan')
        return None

    with pytest.raises(RunStoppedError) as error:
        run(tmp_path, act)
    assert 'The loss is nan at iteration 5' in str(error.value)
    assert str(error.value).endswith('iter_2.pth')
    assert 'weight contains NaN or inf' in capsys.readouterr().err


def test_full_disk_keeps_what_there_is(tmp_path, monkeypatch) -> None:
    real = os.fsync

    def fsync(number: int) -> None:
        if (tmp_path / 'iter_2.pth').exists():
            raise OSError(28, 'No space left on device')
        real(number)

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(RunStoppedError, match='No space left') as error:
        run(tmp_path, None, max_keep_ckpts=1)
    assert 'iter_2.pth' in str(error.value)
    assert [p.name for p in tmp_path.glob('iter*')] == ['iter_2.pth']


def test_best_checkpoint_is_replaced_after_the_new_one(tmp_path) -> None:
    seen: list[set[str]] = []
    real = os.replace

    def replace(source, target) -> None:
        real(source, target)
        seen.append({p.name for p in tmp_path.glob('best*.pth')})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'replace', replace)
        run(
            tmp_path, None, save_best='accuracy', max_keep_ckpts=1,
            scores=(0.5, 0.6),
        )  # fmt: skip
    names = {'best_accuracy_iter_3.pth', 'best_accuracy_iter_6.pth'}
    assert names in seen  # both, for a moment
    left = {p.name for p in tmp_path.glob('*.pth')}
    assert left == {'best_accuracy_iter_6.pth', 'iter_6.pth'}


def test_labels_of_a_classifier() -> None:
    model = nn.Module()
    model.head = nn.Module()
    model.head.num_classes = 3
    sample = BaseDataElement()
    sample.set_field(torch.tensor([2]), 'gt_label')
    check_labels(model, dict(data_samples=[sample]))
    sample.set_field(torch.tensor([3]), 'gt_label')
    with pytest.raises(ValueError, match=r'label 3, expected 0\.\.2: '):
        check_labels(model, dict(data_samples=[[sample]]))
    check_labels(nn.Linear(1, 1), dict(data_samples=[sample]))  # no head


def test_rows_of_a_map_in_turns() -> None:
    model, label = nn.Module(), torch.zeros(1, 8, 4, dtype=torch.int64)
    model.decode_head = nn.Module()
    model.decode_head.num_classes = 3
    label[0, 5] = 7
    sample = SegDataSample(gt_sem_seg=PixelData(data=label))
    batch = dict(data_samples=[sample])
    for first in range(4):
        if first == 1:
            with pytest.raises(ValueError, match='label 7'):
                check_labels(model, batch, first, 4)
        else:
            check_labels(model, batch, first, 4)


def test_a_gpu_does_not_wait_for_labels(monkeypatch) -> None:
    """An eighth of the rows before an iteration, all if it fails."""
    seen, hook = [], RunGuardHook()
    monkeypatch.setattr(
        guard_hook, 'check_labels', lambda *args: seen.append(args[1:])
    )
    weight = SimpleNamespace(is_cuda=True)
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    for number in (0, 9):
        runner = SimpleNamespace(model=model, iter=number)
        hook.before_train_iter(runner, number, dict(number=number))
    hook.blame(runner)
    assert seen == [
        (dict(number=0), 0, 8), (dict(number=9), 1, 8), (dict(number=9),),
    ]  # fmt: skip


def test_dead_workers_are_told_from_errors(tmp_path: Path, capsys) -> None:
    text = 'DataLoader worker (pid 7) is killed by signal: Killed. '
    assert 'lower num_workers' in str(explain(RuntimeError(text), tmp_path))
    assert explain(RuntimeError('other'), tmp_path) is None
    assert not capsys.readouterr().err  # there is nothing to go on from
    torch.save({}, tmp_path / 'iter_1.pth')
    assert explain(RuntimeError('other'), tmp_path) is None
    assert 'iter_1.pth' in capsys.readouterr().err


def test_a_dead_worker_is_found_behind_other_errors() -> None:
    words = 'DataLoader worker (pid 7) is killed by signal: Killed. '
    try:
        try:
            raise RuntimeError(words)
        except RuntimeError as cause:
            raise SyntaxError('Failed to format the config file') from cause
    except SyntaxError as error:
        assert dead_worker(error) == words.rstrip('. ')
    assert dead_worker(SyntaxError(words)) is None


def test_a_signal_during_a_vote_counts_in_the_next(monkeypatch) -> None:
    """Processes that voted without it go on, this one with them."""
    hook = InterruptHook(interval=1)

    def vote(votes: torch.Tensor, op: str) -> None:
        hook._requested = signal.SIGTERM

    monkeypatch.setattr(interrupt_hook, 'get_world_size', lambda: 2)
    monkeypatch.setattr(interrupt_hook, 'all_reduce', vote)
    assert [hook._agreed(number) for number in range(2)] == [False, True]
