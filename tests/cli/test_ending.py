"""Exit codes, messages and interruptions, the same for all tools."""

from __future__ import annotations

import pytest
from mmengine.registry import MODELS, init_default_scope

from pm_seg.cli.ending import command, wrong_usage
from pm_seg.core.compressor import check_share


def ending(main, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as error:
        main()
    return error.value.code, capsys.readouterr().err


def test_interruption(capsys) -> None:
    @command('Nothing was written.')
    def main() -> None:
        raise KeyboardInterrupt

    code, err = ending(main, capsys)
    assert code == 130 and err == '\nInterrupted. Nothing was written.\n'


def test_own_errors_are_messages(capsys, monkeypatch) -> None:
    @command()
    def main() -> None:
        try:
            check_share('keep', 2.0)
        except ValueError as error:  # as mmengine's registries do
            raise ValueError(f'class X in file: {error}') from error

    code, _ = ending(main, capsys)
    assert code.startswith('Error: keep=2.0') and 'class X' not in code
    monkeypatch.setenv('PM_SEG_TRACEBACK', '1')
    with pytest.raises(ValueError, match='class X'):
        main()


def test_other_errors_keep_their_traceback() -> None:
    @command()
    def main() -> None:
        int('x')

    with pytest.raises(ValueError, match='invalid literal'):
        main()


def test_wrong_usage(capsys) -> None:
    code, err = ending(lambda: wrong_usage('--a needs --b'), capsys)
    assert code == 2 and err == '--a needs --b\n'


def test_what_main_returns_is_kept() -> None:
    assert command()(lambda: {'mIoU': 1.0})() == {'mIoU': 1.0}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(type='FCNHed'), "type='FCNHed' is in no registry of models; d"),
        (dict(chanels=2), "FCNHead has no option chanels=2; did you mean 'c"),
    ],
)
def test_misspelt_configs_are_messages(
    changes: dict, message: str, capsys
) -> None:
    init_default_scope('mmseg')
    cfg = dict(type='FCNHead', in_channels=3, channels=2, num_classes=2)
    main = command()(lambda: MODELS.build({**cfg, **changes}))
    assert ending(main, capsys)[0].startswith(f'Error: {message}')
