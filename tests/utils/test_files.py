"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pm_seg.utils.files import whole_files


def test_all_or_nothing(tmp_path: Path) -> None:
    targets = [tmp_path / 'new' / 'a.txt', tmp_path / 'new' / 'b.txt']
    with whole_files(*targets) as partials:
        for partial in partials:
            partial.write_text('first')
        assert not any(target.exists() for target in targets)
    assert [target.read_text() for target in targets] == ['first'] * 2
    with pytest.raises(KeyError), whole_files(*targets) as partials:
        partials[0].write_text('second')
        raise KeyError
    assert [target.read_text() for target in targets] == ['first'] * 2
    assert sorted(p.name for p in targets[0].parent.iterdir()) == [
        'a.txt', 'b.txt'
    ]  # fmt: skip
