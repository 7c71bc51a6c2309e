"""Write what the table of settings tells into docs/settings.md and docs/coming-from-celery.md: `python docs/make_settings.py`."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from amqtask.settings.table import FOREIGN, SETTINGS, Setting

HERE = Path(__file__).parent
HEAD = """\
# Settings

`app.conf.name = value`, a module or object through `app.config_from_object`, or keyword arguments of `AmqTask`. Times are
seconds (a `timedelta` is taken too), memory is KiB. Upper-case names and Celery's old names are accepted. A name that is no
setting is kept and can be read (libraries have theirs in `app.conf`); a near miss is told in a warning, `amqtask report` lists
all of them, and with `strict_settings` they are an error. A value that a setting cannot have is an error that says what is
wanted. Celery's settings that are accepted without effect here are in
[Coming from Celery](coming-from-celery.md#every-setting-of-celerys). Written by `python docs/make_settings.py`.

| setting | default | what |
| --- | --- | --- |
"""
BEGIN, END = "<!-- settings: written by docs/make_settings.py -->\n", "<!-- end of settings -->\n"
FATES_HEAD = """\
| setting | Celery 5.7's default | here |
| --- | --- | --- |
"""
# Celery's defaults that are no literals.
SECONDS = {"datetime.timedelta(days=1)": 86400.0, "inf": math.inf}


def settings_page() -> str:
    """docs/settings.md."""
    rows = [f"| `{s.name}` | `{s.default!r}` | {s.doc.replace('|', '/')} |" for s in SETTINGS if s.doc]
    return HEAD + "\n".join(rows) + "\n"


def coming_page(page: str) -> str:
    """docs/coming-from-celery.md with the part between the marks written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{fates()}\n{END}{after}"


def fates() -> str:
    """A row for each setting of Celery's."""
    known = {setting.name: setting for setting in SETTINGS}
    told = _fates()
    rows = []
    for name, default in sorted(celery()["settings"].items()):
        rows.append(f"| `{name}` | `{default}` | {_fate(name, default, known.get(name), told)} |")
    return FATES_HEAD + "\n".join(rows) + "\n"


def celery() -> dict[str, Any]:
    """Celery 5.7's settings with their defaults, its options by command, its public names by place."""
    found: dict[str, Any] = json.loads((HERE / "celery_5_7.json").read_text())
    return found


def _fate(name: str, default: str, setting: Setting | None, told: Any) -> str:
    if setting is None or not setting.doc:
        if name in told.WITHOUT_EFFECT:
            return f"without effect: {told.WITHOUT_EFFECT[name]}"
        store = next((store for start, store in told.STORES.items() if name.startswith(start)), None)
        if store is None or name not in FOREIGN:
            raise SystemExit(f"nobody knows the fate of {name}: give it a doc in the table, or a line in docs/fates.py")
        return (
            f"without effect: {store} is not an amqtask setting"
            if name == "database_url"
            else f"without effect: no {store}"
        )
    if name in told.NOTES:
        return str(told.NOTES[name])
    if _value(default) == setting.default:
        return "the same"
    return f"`{setting.default!r}`; Celery's: `{name} = {default}`"


def _value(default: str) -> Any:
    return SECONDS[default] if default in SECONDS else ast.literal_eval(default)


def _fates() -> Any:
    spec = importlib.util.spec_from_file_location("fates", HERE / "fates.py")
    if spec is None or spec.loader is None:
        raise SystemExit("docs/fates.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Write both pages."""
    (HERE / "settings.md").write_text(settings_page())
    coming = HERE / "coming-from-celery.md"
    coming.write_text(coming_page(coming.read_text()))


if __name__ == "__main__":
    main()
