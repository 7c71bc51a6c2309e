"""What every row above uses, and what uses nothing of ours itself."""

from __future__ import annotations

VERSION = "0.1.0"
