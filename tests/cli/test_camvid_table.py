"""The CamVid comparison script: rows, resuming, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from rich.console import Console

from pm_seg.cli import camvid_table
from pm_seg.cli.common import load_config
from pm_seg.cli.train import parse_args


@pytest.mark.parametrize('row', list(camvid_table.ROWS))
def test_options_fit_the_configs(row: str) -> None:
    """Every option names a setting that exists, and is taken over."""
    config, extra = camvid_table.ROWS[row]
    args = camvid_table.parse_args(['--iters', '50', '--data', 'd'])
    options = camvid_table._options(args, seed=3)
    cfg = load_config(parse_args([config, '--cfg-options', *options, *extra]))
    assert cfg.train_cfg.max_iters == 50
    assert cfg.param_scheduler[1].end == 50
    assert cfg.train_dataloader.dataset.data_root == 'd'
    first = cfg.train_dataloader.dataset.pipeline[0]
    assert first == dict(type='SeedAugmentation', seed=3)
    if config == camvid_table.COMPRESSED:
        assert cfg.model.decode_head.compression is None
        assert len(cfg.custom_hooks[0].target) == 1
    if row.startswith('paper'):
        assert cfg.model.backbone.compression.restore == 'replace'
    init_default_scope('mmseg')
    MODELS.build(cfg.model)


def test_done_rows_are_not_run_again(tmp_path: Path, monkeypatch) -> None:
    runs = []

    def fake(args, row: str, seed: int) -> dict:
        runs.append((row, seed))
        return dict(
            row=row, seed=seed, iters=args.iters, gmacs=1.0,
            encoder_gmacs=0.5,
            val_miou=60.0 + seed, test_miou=50.0,
        )  # fmt: skip

    monkeypatch.setattr(camvid_table, 'run_row', fake)
    out = tmp_path / 'results' / 'camvid.jsonl'
    arguments = ['--out', str(out), '--rows', 'dense', 'paper 50%']
    camvid_table.main([*arguments, '--seeds', '0'])
    camvid_table.main([*arguments, '--seeds', '0', '1'])
    assert runs == [
        ('dense', 0), ('paper 50%', 0),
        ('dense', 1), ('paper 50%', 1),
    ]  # fmt: skip
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(results) == 4
    console = Console(width=80, record=True)
    console.print(camvid_table.table(results))
    text = console.export_text()
    assert '60.50 (1.00)' in text and '50.00 (0.00)' in text


def test_measurements_are_shared_between_shares(tmp_path: Path) -> None:
    args = camvid_table.parse_args(
        ['--iters', '0', '--work-dir', str(tmp_path), '--checkpoint', 'd.pth']
    )
    assert camvid_table._scored(args, 'ours 50%', 0) == 'd.pth'
    for name in ('ours 70%-0', 'ours 50%-no rotation-0'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'iter_0.pth').touch()
    found = camvid_table._scored(args, 'ours 50%', 0)
    assert found == str(tmp_path / 'ours 70%-0' / 'iter_0.pth')
    assert camvid_table._scored(args, 'ours 50%', 1) == 'd.pth'
    assert camvid_table._scored(args, 'paper 50%', 0) == 'd.pth'
    assert camvid_table._scored(args, 'ours 50%, flat budget', 0) == 'd.pth'
