"""Django's settings as the application's: changed by tests, made by hand, and beside those of other libraries."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
    from django.conf import settings
    settings.configure(CELERY_BROKER_URL="memory://", USE_TZ=True, CELERY_EMAIL_TASK_CONFIG={"queue": "mail"})
    from django.test import override_settings
    from amqtask import AmqTask
    app = AmqTask("site")
    app.config_from_object("django.conf:settings", namespace="CELERY")
"""


def run(code: str) -> str:
    """What a program prints whose settings are made by `settings.configure()`."""
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_that_were_configured_by_hand_are_read() -> None:
    assert run("print(app.conf.broker_url)") == "memory://\n"


def test_override_settings_is_seen_and_ends() -> None:
    assert run("""
        print(app.conf.task_always_eager)
        with override_settings(CELERY_TASK_ALWAYS_EAGER=True):
            print(app.conf.task_always_eager)
        print(app.conf.task_always_eager)
    """).split() == ["False", "True", "False"]


def test_settings_that_are_first_read_in_an_override_do_not_stick() -> None:
    assert run("""
        with override_settings(CELERY_TASK_ALWAYS_EAGER=True):
            print(app.conf.task_always_eager)
        print(app.conf.task_always_eager)
    """).split() == ["True", "False"]
