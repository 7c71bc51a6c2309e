"""Write docs/settings.md from the table of settings: `python docs/make_settings.py`."""

from __future__ import annotations

from pathlib import Path

from amqtask.settings.table import FOREIGN, SETTINGS

HEAD = """\
# Settings

`app.conf.name = value`, a module or object through `app.config_from_object`, or keyword arguments of `AmqTask`. Times are
seconds (a `timedelta` is taken too), memory is KiB. Upper-case names and Celery's old names are accepted. An unknown name is an
error that says which one is near. Written by `python docs/make_settings.py`.

| setting | default | what |
| --- | --- | --- |
"""


def text() -> str:
    """The page."""
    rows = [f"| `{s.name}` | `{s.default!r}` | {s.doc.replace('|', '/')} |" for s in SETTINGS if s.doc]
    silent = ", ".join(f"`{s.name}`" for s in SETTINGS if not s.doc)
    tail = (
        f"\n\nAccepted for Celery's sake, without effect here: {silent}; and the {len(FOREIGN)} settings of Celery's "
    )
    tail += "other\nresult stores.\n"
    return HEAD + "\n".join(rows) + tail


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(text())
