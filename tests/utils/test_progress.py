from pm_seg.utils import ProgressReporter


def test_lines_where_there_is_no_terminal(capsys) -> None:
    with ProgressReporter('Working', 10) as report:
        for step in range(10):
            report(step + 1, 'note')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1] == 'Working: 10/10, 0 s left, note'


def test_bar_on_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv('FORCE_COLOR', '1')
    with ProgressReporter('Working', 3) as report:
        for step in range(3):
            report(step + 1)
    assert '3/3' in capsys.readouterr().err
