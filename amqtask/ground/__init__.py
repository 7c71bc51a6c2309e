"""What every row above uses, and what uses nothing of ours itself.

`printable` (text for people; which values are secret), `plugins` (names that only the running program knows; what lower rows
ask of upper ones), `lazy` (made once), `loop` (a loop's contract, pauses), `deadlines` (asyncio), `startup` (before anything
is imported), `processes` (forks, the parent, memory), `current` (the current application), `shapes` (types that recur), `systemd`
(what a service manager is told).
"""

from __future__ import annotations

VERSION = "0.1.0"
