"""Where scripts are that tests import; importing this finds them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# At the end: some have names of the standard library.
sys.path += [str(ROOT / 'tools/lab'), str(ROOT / 'tools')]
