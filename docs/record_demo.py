"""Record the terminal of `make demo` as a moving picture, docs/images/demo.svg: `python docs/record_demo.py`.

A line of the picture appears when it appeared in the terminal, also each state of the progress bar; readers who asked their
system for less motion see the last state. The long silence while a broker starts is cut.
"""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "demo.svg"
COMMAND = ["make", "--no-print-directory", "demo"]
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTH = 112  # columns
LONGEST_SILENCE = 1.0  # seconds
SHOWN_AT_THE_END = 6.0  # seconds before the picture begins again

State = tuple[int, float, str]
"""What stood in a line of the terminal: line, seconds since the start, text."""


def main() -> int:
    """Run the demo, and write the picture. Returns the demo's exit code."""
    os.environ.update(COLUMNS=str(WIDTH), TERM="xterm", NO_COLOR="1")
    states: list[State] = [(0, 0.0, "$ make demo"), (1, 0.0, "")]
    last = time.monotonic()
    text, now = "", 0.0

    def note(line: str) -> None:
        shown = COLOURS.sub("", line.rpartition("\r")[2])[:WIDTH].rstrip()
        if shown and shown != states[-1][2]:
            states.append((states[-1][0], now, shown))

    def read(terminal: int) -> bytes:
        nonlocal last, text, now
        data = os.read(terminal, 65536)
        moment = time.monotonic()
        now, last = now + min(moment - last, LONGEST_SILENCE), moment
        *ended, text = (text + data.decode(errors="replace")).split("\n")
        for line in ended:
            note(line.rstrip("\r"))
            states.append((states[-1][0] + 1, now, ""))
        note(text)
        return data

    code = os.waitstatus_to_exitcode(pty.spawn(COMMAND, read))
    PICTURE.write_text(picture(states, now))
    return code


def picture(states: list[State], seconds: float) -> str:
    """An SVG of what stood in the terminal from when to when, moved by CSS alone, as an <img> may."""
    states = [state for state in states if state[2]]
    whole = seconds + SHOWN_AT_THE_END
    styles, texts = [], []
    for place, (line, begin, text) in enumerate(states):
        following = [state[1] for state in states[place + 1 :] if state[0] == line]
        end = following[0] if following else whole
        styles.append(
            f"@keyframes s{place}{{0%{{opacity:0}}{100 * begin / whole:.2f}%{{opacity:1}}"
            + (f"{100 * end / whole:.2f}%{{opacity:0}}" if following else "")
            + "}"
        )
        still = "" if not following else ' class="passed"'
        texts.append(f'<text x="14" y="{48 + 18 * line}"{still} style="animation-name:s{place}">{escape(text)}</text>')
    height = 48 + 18 * (states[-1][0] + 1)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {28 + WIDTH * 8} {height}" role="img">
<title>make demo: a worker, 300 HTTP fetches, their results</title>
<style>
text{{font:13px/18px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#d8dee9;white-space:pre;
animation:{whole:.1f}s step-end infinite}}
@media (prefers-reduced-motion:reduce){{text{{animation:none}}.passed{{opacity:0}}}}
{chr(10).join(styles)}
</style>
<rect width="100%" height="100%" rx="8" fill="#1f2430"/>
<circle cx="20" cy="18" r="6" fill="#ff5f57"/>
<circle cx="40" cy="18" r="6" fill="#febc2e"/>
<circle cx="60" cy="18" r="6" fill="#28c840"/>
{chr(10).join(texts)}
</svg>
"""


if __name__ == "__main__":
    sys.exit(main())
