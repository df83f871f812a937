"""The CamVid comparison script: rows, resuming, the table."""

from __future__ import annotations

import json
from pathlib import Path

import camvid_table
import pytest
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console

from pm_seg.cli.config import load_config
from pm_seg.cli.train import parse_args


def arguments(*more: str):
    return camvid_table.parse_args(['--data', 'd', *more])


def config(name: str):
    """The config of a row with all its options."""
    row = camvid_table.ROWS[name]
    options = camvid_table.config_options(arguments('--iters', '50'), row, 3)
    return load_config(parse_args([row.config, '--cfg-options', *options]))


@pytest.mark.parametrize('name', ['dense', *camvid_table.METHODS])
def test_options_name_settings_that_exist(name: str) -> None:
    """Every one is taken over, and the model can be built."""
    if name != 'dense':
        name += ' 50%'
    cfg = config(name)
    assert cfg.train_cfg.max_iters == 50
    assert cfg.param_scheduler[1].end == 50
    assert cfg.train_dataloader.dataset.data_root == 'd'
    first = cfg.train_dataloader.dataset.pipeline[0]
    assert first == dict(type='SeedAugmentation', seed=3)
    hooks = {hook['type'] for hook in cfg.custom_hooks}
    assert all(hook['seed'] == 3 for hook in cfg.custom_hooks)
    assert ('PruneMergeHook' in hooks) == (name != 'dense')
    init_default_scope('mmseg')
    MODELS.build(cfg.model)


def test_rows_differ_in_what_their_names_say() -> None:
    kinds = {}
    for name in camvid_table.METHODS:
        cfg = config(f'{name} 25%')
        options = cfg.model.backbone.compression
        kinds[name] = options.get('type', 'pm'), options.get('restore')
        assert (cfg.calib_pipeline is None) == (name == 'paper')
    assert kinds == {
        'ours': ('pm', None),
        'ours, no data': ('pm', None),
        'ToMe-style': ('tome', None),
        'ToMe-style, residual': ('tome', 'residual'),
        'ALGM-style': ('algm', None),
        'ALGM-style, residual': ('algm', 'residual'),
        'paper': ('paper', None),
    }
    rows = camvid_table.ROWS
    assert rows['ours, no data 35%'].compress == (
        '--keep', '0.35', '--calib-batches', '0',
    )  # fmt: skip
    assert rows['paper, whole model 40%'].compress == (
        '--target', 'share=0.4',
    )  # fmt: skip
    assert len(rows) == 1 + 4 * 7 + 2 * 3


def test_done_rows_are_not_run_again(tmp_path: Path, monkeypatch) -> None:
    runs = []

    def fake(args, name: str, seed: int) -> dict:
        runs.append((name, seed))
        result = dict(row=name, seed=seed, iters=args.iters)
        if name == 'paper 25%':
            return dict(result, unreachable='keep=0.25 is out of reach')
        return dict(
            result, gmacs=1.0, encoder_gmacs=0.5,
            val_miou=60.0 + seed, test_miou=50.0,
        )  # fmt: skip

    monkeypatch.setattr(camvid_table, 'run_row', fake)
    out = tmp_path / 'results' / 'camvid.jsonl'
    options = ['--out', str(out), '--rows', 'dense', 'paper 25%']
    camvid_table.main([*options, '--seeds', '0'])
    camvid_table.main([*options, '--seeds', '0', '1'])
    assert runs == [
        ('dense', 0), ('paper 25%', 0),
        ('dense', 1), ('paper 25%', 1),
    ]  # fmt: skip
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(results) == 4
    console = Console(width=80, record=True)
    console.print(camvid_table.table(results))
    text = console.export_text()
    assert '60.50 (1.00)' in text and '50.00 (0.00)' in text
    assert 'out of reach' in text


@pytest.mark.parametrize('name', camvid_table.ROWS)
def test_folders_survive_the_options_of_configs(name: str) -> None:
    """mmengine takes spaces out of what it is given."""
    folder = camvid_table._work_dir(arguments(), name, 0)
    options = ['--cfg-options', f'load_from={folder}']
    read = parse_args(['config', *options]).cfg_options
    assert read['load_from'] == str(folder)


def run_with(monkeypatch, message: str) -> dict:
    def fail(argv: list[str]) -> None:
        raise SystemExit(message)

    monkeypatch.setattr(camvid_table.compress, 'main', fail)
    args = arguments('--iters', '0')
    return camvid_table.run_row(args, 'ALGM-style 25%', 0)


def test_a_budget_out_of_reach_is_recorded(monkeypatch) -> None:
    message = 'Error: keep=0.25 is out of reach of x: 0.38 is its least\n(...)'
    assert run_with(monkeypatch, message) == dict(
        row='ALGM-style 25%', seed=0, iters=0,
        unreachable='keep=0.25 is out of reach of x: 0.38 is its least',
    )  # fmt: skip


def test_other_failures_end_the_run(monkeypatch) -> None:
    with pytest.raises(SystemExit, match='Checkpoint not found'):
        run_with(monkeypatch, 'Checkpoint not found: x.pth')


def test_scores_of_the_paper_are_shared_between_budgets(
    tmp_path: Path,
) -> None:
    """What ours measures depends on the budget and is not."""
    args = arguments('--work-dir', str(tmp_path), '--checkpoint', 'd.pth')
    assert camvid_table.scored(args, 'paper 50%', 0) == 'd.pth'
    for name in ('paper-70--0', 'ours-70--0'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'iter_0.pth').touch()
    found = camvid_table.scored(args, 'paper, whole model 50%', 0)
    assert found == str(tmp_path / 'paper-70--0' / 'iter_0.pth')
    assert camvid_table.scored(args, 'paper 50%', 1) == 'd.pth'
    assert camvid_table.scored(args, 'ours 50%', 0) == 'd.pth'
