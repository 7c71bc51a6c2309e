"""`pydantic=True`: arguments annotated with models arrive as models, a returned model leaves as plain data."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import ConfigurationError

if TYPE_CHECKING:
    from amqtask.ground.shapes import KeywordDict, Keywords


def pydantic_wrapper(
    function: Callable[..., object],
    *,
    strict: bool = False,
    context: KeywordDict | None = None,
    dump_kwargs: KeywordDict | None = None,
) -> Callable[..., Any]:
    """The function with its model parameters validated from plain data (Celery's pydantic task option).

    Raises: ConfigurationError when pydantic is not installed.
    """
    try:
        from pydantic import BaseModel
    except ImportError as error:
        raise ConfigurationError('pydantic=True needs a library: pip install "amqtask[pydantic]"') from error
    parameters = inspect.signature(function)
    hints = {name: hint for name, hint in typing.get_type_hints(function).items() if name != "return"}
    models = {name: model for name, hint in hints.items() if (model := _model_of(hint, BaseModel)) is not None}

    def validated(args: Sequence[object], kwargs: Keywords) -> inspect.BoundArguments:
        bound = parameters.bind(*args, **kwargs)
        for name, model in models.items():
            if bound.arguments.get(name) is not None and not isinstance(bound.arguments[name], model):
                bound.arguments[name] = model.model_validate(bound.arguments[name], strict=strict, context=context)
        return bound

    def dumped(value: object) -> object:
        return value.model_dump(**(dump_kwargs or {"mode": "json"})) if isinstance(value, BaseModel) else value

    def as_data(args: Sequence[object], kwargs: Keywords) -> tuple[Sequence[object], Keywords]:
        return [dumped(value) for value in args], {name: dumped(value) for name, value in kwargs.items()}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: object, **kwargs: object) -> Any:
            bound = validated(args, kwargs)
            return dumped(await function(*bound.args, **bound.kwargs))

        call_async.as_data = as_data  # type: ignore[attr-defined]
        return call_async

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        bound = validated(args, kwargs)
        return dumped(function(*bound.args, **bound.kwargs))

    # For callers, whose arguments may be models too.
    call.as_data = as_data  # type: ignore[attr-defined]
    return call


def _model_of(hint: object, base: type) -> Any:
    """The model that an annotation names, alone or beside None; None where it names none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        alternatives = [part for part in typing.get_args(hint) if part is not type(None)]
        hint = alternatives[0] if len(alternatives) == 1 else None
    return hint if isinstance(hint, type) and issubclass(hint, base) else None
