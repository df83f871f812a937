"""The benchmark: equal cost, any size and checkpoint, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import needs_exporter
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console

from pm_seg.cli import bench_measure, benchmark
from pm_seg.cli.bench_models import METHODS, build_models
from pm_seg.cli.benchmark import table

MODEL = """
custom_imports = dict(imports=['pm_seg'])
default_scope = 'mmseg'
model = dict(
    type='DistilledEncoderDecoder', teacher=dict(alpha=1.0),
    backbone=dict(
        type='PMVisionTransformer', img_size=(64, 96), embed_dims=48,
        num_layers=6, num_heads=3, compression={compression}),
    decode_head=dict(
        type='PMSegmenterMaskTransformerHead', in_channels=48, channels=48,
        num_classes=5, num_layers=2, num_heads=3, embed_dims=48))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / 'tiny.py'
    path.write_text(MODEL.format(compression=dict(keep=0.6, first=0)))
    return path


def run(config: Path, *options: str) -> list[dict]:
    out = config.parent / 'a' / 'speed.json'
    rows = benchmark.main(
        [str(config), '--rounds', '3', '--device', 'cpu', '--out', str(out),
         *options]
    )  # fmt: skip
    assert json.loads(out.read_text()) == rows
    return rows


def test_all_methods_are_compared_at_the_cost_of_the_config(
    config: Path, capsys
) -> None:
    rows = run(config, '--batch-size', '2')
    assert [r['method'] for r in rows] == ['dense', *METHODS]
    check(rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80


def check(rows: list[dict]) -> None:
    """Shares, and what follows from a row's time and operations."""
    for row in rows:
        dense = row['method'] == 'dense'
        assert row['share'] == 1 if dense else 0.5 < row['share'] <= 0.6
        assert row['speedup'] == 1 if dense else row['speedup'] > 0
        share = row['gmacs'] / rows[0]['gmacs']
        assert row['of_ideal'] == pytest.approx(row['speedup'] * share)
        rate = row['batch_size'] / row['latency_ms'] * 1e3
        assert row['images_per_s'] == pytest.approx(rate)


@needs_exporter
def test_onnxruntime_is_timed_in_the_same_run(config: Path, capsys) -> None:
    model = config.read_text().replace('num_layers=6', 'num_layers=3')
    config.write_text(model.replace('num_layers=2', 'num_layers=1'))
    rows = run(
        config, '--modes', 'eager', 'onnx', '--batch-size', '2', '--methods',
        'ours',
    )  # fmt: skip
    assert [row['method'] for row in rows] == ['dense', 'ours'] * 2
    assert [row['mode'] for row in rows] == ['eager'] * 2 + ['onnx'] * 2
    check(rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert 'inference, onnx on the CPU, fp32, batch 2 of 64x96' in text


def test_training_steps_are_timed(config: Path) -> None:
    rows = run(
        config, '--train', '--methods', 'ours', '--dtype', 'bf16',
        '--size', '64', '96', '--batch-size', '1', '3',
    )  # fmt: skip
    assert [row['method'] for row in rows] == ['dense', 'ours'] * 2
    assert [row['batch_size'] for row in rows] == [1, 1, 3, 3]
    assert rows[0]['train'] and rows[0]['size'] == [64, 96]


def models(config: Path, size: tuple[int, int], **options):
    init_default_scope('mmseg')
    return build_models(Config.fromfile(config), size, **options)


@pytest.mark.parametrize('kind', ['pm', 'paper'])
def test_any_size_works_with_a_compressed_checkpoint(
    config: Path, kind: str
) -> None:
    """All have its weights; it says what the layers of all cost."""
    options = dict(keep=0.6) if kind == 'pm' else dict(type='paper')
    config.write_text(MODEL.format(compression=options))
    source, _ = models(config, (64, 96), keep=0.55)
    name = 'ours' if kind == 'pm' else 'paper'
    state = source[name].state_dict()
    found, missing = models(config, (97, 130), state=state)
    assert not missing and set(found) == {'dense', *METHODS}
    images = torch.randn(1, 3, 97, 130)
    for key, model in found.items():
        assert model(images, mode='tensor').shape == (1, 5, 7, 9)
        weight = model.backbone.layers[3].attn.attn.in_proj_weight
        same = state['backbone.layers.3.attn.attn.in_proj_weight']
        assert torch.equal(weight, same)
        assert model.backbone.pos_embed.shape == (1, 1 + 7 * 9, 48)
        if key != 'dense':
            assert 0.49 < model.backbone.compressor.share <= 0.56


def test_a_dense_checkpoint_runs_at_the_cost_that_is_asked_for(
    config: Path,
) -> None:
    source, _ = models(config, (64, 96), methods=[])
    state = source['dense'].state_dict()
    found, _ = models(config, (64, 96), keep=0.7, state=state)
    for name in METHODS:
        assert 0.6 < found[name].backbone.compressor.share <= 0.7


def test_a_budget_that_a_method_cannot_reach_leaves_it_out(
    config: Path, capsys
) -> None:
    rows = run(config, '--keep', '0.25', '--methods', 'ours', 'ToMe-style')
    assert [row['method'] for row in rows] == ['dense', 'ours']
    text = ' '.join(capsys.readouterr().out.split())
    assert 'ToMe-style is left out: keep=0.25 is out of reach' in text


def test_budgets_above_a_peers_default_are_met(config: Path) -> None:
    """Half is out of reach of ToMe in two layers, 0.7 is not."""
    text = config.read_text().replace('num_layers=6', 'num_layers=2')
    config.write_text(text)
    found, missing = models(config, (64, 96), keep=0.7)
    assert 'ToMe-style' in found and 'ToMe-style' not in missing
    assert 0.6 < found['ToMe-style'].backbone.compressor.share <= 0.7


def row(**changes) -> dict:
    return dict(
        dict(
            method='dense', mode='eager', dtype='fp32', train=False,
            precision='fp32 (TF32)', batch_size=1, size=[64, 64], share=1.0,
            gmacs=1.0, latency_ms=1.0, spread_ms=0.1, images_per_s=1000.0,
            speedup=1.0, of_ideal=1.0, peak_gib=0.25,
        ),
        **changes,
    )  # fmt: skip


def test_tables_say_where_and_how_precisely_it_ran() -> None:
    console = Console(width=80, record=True)
    console.print(table([row(), row(method='ToMe-style', gmacs=123.45)]))
    console.print(table([row(mode='onnx', precision='fp32', peak_gib=None)]))
    text = console.export_text()
    assert 'inference, eager, fp32 (TF32), batch 1 of 64x64' in text
    assert 'onnx on the CPU, fp32,' in text
    assert '0.25' in text and '123.45' in text


class FakeCuda:
    """Memory of a GPU on which every model holds a GiB and needs another."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def memory_allocated(self, device) -> int:
        return self.held

    def max_memory_allocated(self, device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device) -> None:
        self.peak = self.held

    def synchronize(self, device=None) -> None:
        pass

    empty_cache = synchronize


def test_memory_of_a_row_is_that_of_its_model_alone(monkeypatch) -> None:
    fake = FakeCuda()
    for name in (
        'memory_allocated', 'max_memory_allocated', 'synchronize',
        'reset_peak_memory_stats', 'empty_cache',
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))

    def make():
        fake.held += 2**30

        def call() -> None:
            fake.peak = max(fake.peak, fake.held + 2**30)

        return call

    device = torch.device('cuda:1')
    for mode in ('eager', 'compiled', 'cudagraph'):
        assert bench_measure._warmed_up(make, mode, device)[1] == 2.0


def test_a_second_gpu_is_called_by_its_name(monkeypatch) -> None:
    name = {torch.device('cuda:1'): 'Second'}
    monkeypatch.setattr(torch.cuda, 'get_device_name', name.get)
    assert bench_measure.device_name('cuda:1') == 'Second'
    assert bench_measure.device_name('cpu').startswith('CPU, ')


@needs_exporter
@pytest.mark.parametrize('device', ['cuda', 'cuda:1'])
def test_it_starts_on_any_gpu(config: Path, device: str, monkeypatch) -> None:
    """Until the first tensor moves there; onnx needs none of it."""
    chosen = []
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append)
    monkeypatch.setattr(torch.cuda, '_check_stray_context', id, raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'GPU')
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(
        benchmark, 'measure', lambda *args: (_ for _ in ()).throw(Done)
    )
    try:
        with pytest.raises(Done):
            benchmark.main(
                [str(config), '--device', device, '--modes', 'eager', 'onnx']
            )
        assert torch.get_float32_matmul_precision() == 'high', 'TF32'
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen == ([1] if device == 'cuda:1' else [])


class Done(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--cfg-options', 'model.backbone.compression=None'],
         'the config has no compression'),
        (['--keep', '1.5'], 'is not in'),
        (['--keep', '0.01'], 'out of reach'),
    ],
)  # fmt: skip
def test_mistakes_are_explained(
    config: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        benchmark.main([str(config), '--device', 'cpu', *options])


def test_a_checkpoint_of_another_model_is_one_message(config: Path) -> None:
    found, _ = models(config, (64, 96), methods=[])
    state = found['dense'].state_dict()
    key = 'backbone.layers.0.ln1.weight'
    state[key] = state[key][:-1]
    torch.save(dict(state_dict=state), config.parent / 'wrong.pth')
    with pytest.raises(SystemExit, match=r'ln1.weight: shape \(47,\)'):
        benchmark.main([str(config), str(config.parent / 'wrong.pth')])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--modes', 'onnx', '--train'], 'onnx times inference'),
        (['--modes', 'cudagraph'], 'needs a CUDA device'),
        (['--size', '0', '64'], '--size must be'),
    ],
)
def test_wrong_usage_is_refused(
    config: Path, options: list[str], message: str, capsys
) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main([str(config), '--device', 'cpu', *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
