"""The laboratory's scripts import each other by name, as tests do them."""

from __future__ import annotations

import sys

from helpers import ROOT

sys.path.append(str(ROOT / 'tools/lab'))
