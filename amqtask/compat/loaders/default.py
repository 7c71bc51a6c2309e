"""`celery.loaders.default`."""

from __future__ import annotations

import os
from importlib.util import find_spec

from amqtask.compat.loaders.base import BaseLoader
from amqtask.ground.plugins import load

__all__ = ["DEFAULT_CONFIG_MODULE", "Loader"]

DEFAULT_CONFIG_MODULE = "celeryconfig"


class Loader(BaseLoader):
    """Reads the module that CELERY_CONFIG_MODULE names, else celeryconfig, where there is one."""

    def read_configuration(self, fail_silently: object = True) -> object:
        """The module. Raises: ImportError, if one is named, or has to be there."""
        name = os.environ.get("CELERY_CONFIG_MODULE")
        if name or not fail_silently or find_spec(DEFAULT_CONFIG_MODULE) is not None:
            return load(name or DEFAULT_CONFIG_MODULE)
        return {}
