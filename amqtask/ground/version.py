"""The version, for those who must not import the package's root, which knows everything above them."""

from __future__ import annotations

VERSION = "0.1.0"
