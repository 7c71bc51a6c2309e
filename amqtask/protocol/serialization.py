"""Content type ⇄ codec, the accept list; JSON writes dates, UUIDs, decimals and bytes as kombu does.

`subject` is the headers of the task message that a body belongs to, where it belongs to one: an encrypted body is bound to them.
"""

from __future__ import annotations

import base64
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import ConfigurationError, ContentDisallowed, EncodeError, MessageError, Undecodable
from amqtask.ground.printable import printable
from amqtask.protocol.encryption import key_ring

if TYPE_CHECKING:
    from yaml import SafeLoader

    from amqtask.ground.shapes import Headers, JsonObject

JSON = "application/json"
PICKLE = "application/x-python-serialize"
YAML = "application/x-yaml"
MSGPACK = "application/x-msgpack"
# What is signed: a body of another content type within (celery/security/serialization.py, and kombu's name for any bytes).
AUTH = "application/data"
ENCRYPTED = "application/x-amqtask-encrypted"

_BY_NAME = {
    "json": JSON, "pickle": PICKLE, "yaml": YAML, "msgpack": MSGPACK, "auth": AUTH, "encrypted": ENCRYPTED,
}  # fmt: skip
# Bytes that an uncompressed body may have, by default.
LARGEST_BODY = 128 * 1024 * 1024
# The text encodings of bodies. Python has many more, and some take quadratic time.
_TEXTS: dict[str | None, str] = {
    None: "utf-8",
    "": "utf-8",
    "binary": "utf-8",
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "ascii": "ascii",
} | {name: name for name in ("utf-16", "utf-32", "latin-1", "iso-8859-1")}
_ENCODING = {
    JSON: "utf-8", YAML: "utf-8", PICKLE: "binary", MSGPACK: "binary", AUTH: "utf-8", ENCRYPTED: "binary",
}  # fmt: skip


class Encoded(NamedTuple):
    """A body with its content type and encoding."""

    body: bytes
    content_type: str
    content_encoding: str


# -- JSON with kombu's extra types (kombu/utils/json.py: {"__type__": T, "__value__": V})


def _wrap(type_name: str, value: object) -> JsonObject:
    return {"__type__": type_name, "__value__": value}


def _json_default(value: object) -> object:
    as_json = getattr(value, "__json__", None)
    if as_json is not None:
        return as_json()
    for value_type, encode in _JSON_ENCODERS:
        if isinstance(value, value_type):
            return encode(value)
    django = sys.modules.get("django.utils.functional")
    if django is not None and isinstance(value, django.Promise):
        return str(value)  # a lazy translation
    kombu = sys.modules.get("kombu.utils.json")
    if kombu is not None:
        return kombu.JSONEncoder().default(value)  # a type that was registered with kombu, as programs for Celery do
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _own_form(value: object) -> object:
    """An object as the data that its `__json__` returns (kombu's protocol)."""
    as_json = getattr(value, "__json__", None)
    if as_json is None:
        raise TypeError(f"{type(value).__name__} objects have no form there")
    return as_json()


def _encode_bytes(value: bytes) -> dict[str, object]:
    try:
        return _wrap("bytes", value.decode("utf-8"))
    except UnicodeDecodeError:
        return _wrap("base64", base64.b64encode(value).decode("ascii"))


# datetime before date: it is a subclass.
_JSON_ENCODERS: list[tuple[type, Callable[[Any], object]]] = [
    (datetime, lambda value: _wrap("datetime", value.isoformat())),
    (date, lambda value: _wrap("date", value.isoformat())),
    (time, lambda value: _wrap("time", value.isoformat())),
    (Decimal, lambda value: _wrap("decimal", str(value))),
    (uuid.UUID, lambda value: _wrap("uuid", {"hex": value.hex})),
    (bytes, _encode_bytes),
]

_JSON_DECODERS: dict[str, Callable[[Any], object]] = {
    "datetime": lambda value: datetime.fromisoformat(value.replace("Z", "+00:00")),
    "date": lambda value: datetime.fromisoformat(value).date(),
    "time": time.fromisoformat,
    "decimal": Decimal,
    "uuid": lambda value: uuid.UUID(**value),
    "bytes": lambda value: value.encode("utf-8"),
    "base64": lambda value: base64.b64decode(value.encode("ascii")),
}


def _json_object(table: JsonObject) -> object:
    if len(table) == 2 and "__type__" in table and "__value__" in table:
        decode = _JSON_DECODERS.get(table["__type__"])
        if decode is not None:
            return decode(table["__value__"])
        kombu = sys.modules.get("kombu.utils.json")
        if kombu is None:
            raise ValueError(f"unknown __type__ {table['__type__']!r}")
        return kombu.object_hook(table)
    return table


_json_encoder = json.JSONEncoder(default=_json_default).encode
_json_plain = json.JSONDecoder()
_json_typed = json.JSONDecoder(object_hook=_json_object)


def _dump_json(value: object, subject: Headers | None = None) -> bytes:
    text = _json_encoder(value)
    if '"__type__"' in text:
        _check_typed(value)
    return text.encode("utf-8")


def _check_typed(value: object) -> None:
    """Raises: TypeError for a dictionary that readers would mistake for a value of another type."""
    if isinstance(value, Mapping):
        if value.keys() == {"__type__", "__value__"}:
            raise TypeError(
                "a dictionary with the keys '__type__' and '__value__' and no others stands for a date, bytes … in JSON "
                "messages, and nobody could read it; give it one more key"
            )
        for item in value.values():
            _check_typed(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_typed(item)


def _load_json(body: bytes, encoding: str, subject: Headers | None = None) -> object:
    text = body.decode(encoding)
    decoder = _json_typed if "__type__" in text else _json_plain
    try:
        value, end = decoder.scan_once(text, 0)  # type: ignore[attr-defined]
    except StopIteration:
        end = -1
    # Nearly always it begins and ends with the value; `decode` looks for white space twice.
    return value if end == len(text) else decoder.decode(text)


# -- the others; their libraries are optional

# PyYAML's own end, by Python's limit of recursion, is at about 330.
_DEEPEST_YAML = 250
# Values that the aliases of a YAML document may stand for; a long text counts as several.
_MOST_ALIASED = 1_000_000


def _dump_yaml(value: object, subject: Headers | None) -> bytes:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Signatures are dictionaries, and are written as such; results say by themselves what they are as data."""

    Dumper.add_multi_representer(dict, yaml.SafeDumper.represent_dict)
    Dumper.add_multi_representer(object, lambda dumper, item: dumper.represent_data(_own_form(item)))
    text: str = yaml.dump(value, Dumper=Dumper)
    return text.encode("utf-8")


def _load_yaml(body: bytes, encoding: str, subject: Headers | None) -> object:
    import yaml

    return yaml.load(body.decode(encoding), _yaml_loader())


@lru_cache(maxsize=1)
def _yaml_loader() -> type[SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML looks at all open brackets for each further one, and took seconds for 3,000 of them before it gave up.

        What an alias stands for is no copy, but becomes one in JSON, and aliases of aliases become any number of them."""

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            # How many values each node stands for, by its id; and those that aliases have added.
            self._sizes: dict[int, int] = {}
            self._added = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            is_alias = self.check_event(yaml.AliasEvent)
            node: Any = super().compose_node(parent, index)
            if is_alias:
                self._added += self._sizes.get(id(node), _MOST_ALIASED)  # one within itself has no end
                if self._added >= _MOST_ALIASED:
                    raise yaml.YAMLError(f"aliases that stand for more than {_MOST_ALIASED} values")
            else:
                long = len(node.value) // 100 if isinstance(node.value, str) else 0
                self._sizes[id(node)] = 1 + long + sum(self._sizes[id(part)] for part in _nodes_in(node))
            return node

        def fetch_flow_collection_start(self, TokenClass: Any) -> None:
            if self.flow_level >= _DEEPEST_YAML:
                raise yaml.YAMLError(f"lists or mappings within each other, more than {_DEEPEST_YAML}")
            super().fetch_flow_collection_start(TokenClass)

    return Loader


def _nodes_in(node: Any) -> Iterable[Any]:
    """The nodes of which a list or a mapping of YAML consists."""
    if not isinstance(node.value, list):
        return ()
    return (part for item in node.value for part in (item if isinstance(item, tuple) else (item,)))


def _dump_msgpack(value: object, subject: Headers | None) -> bytes:
    import msgpack

    packed: bytes = msgpack.packb(value, use_bin_type=True, default=_own_form)
    return packed


def _load_msgpack(body: bytes, encoding: str, subject: Headers | None) -> object:
    import msgpack

    return msgpack.unpackb(body, raw=False, strict_map_key=False)


def _dump_pickle(value: object, subject: Headers | None) -> bytes:
    import pickle

    return pickle.dumps(value, protocol=4)  # kombu's on every Python but the newest; all that run read it


def _load_pickle(body: bytes, encoding: str, subject: Headers | None) -> object:
    import pickle

    return pickle.loads(body)


# -- what protects a body


def _dump_encrypted(value: object, subject: Headers | None) -> bytes:
    return key_ring().encrypt(_dump_json(value), subject)


def _load_encrypted(body: bytes, encoding: str, subject: Headers | None) -> object:
    return _load_json(key_ring().decrypt(body, subject), "utf-8")


def _dump_signed(value: object, subject: Headers | None) -> bytes:
    raise ConfigurationError(_NO_SIGNING)


def _load_signed(body: bytes, encoding: str, subject: Headers | None) -> object:
    raise ConfigurationError(_NO_SIGNING)


_NO_SIGNING = (
    "the serializer 'auth' signs and verifies with keys: call app.setup_security() where the application is made, with "
    "security_key, security_certificate and security_cert_store set"
)
Dump = Callable[[object, "Headers | None"], bytes]
Load = Callable[[bytes, str, "Headers | None"], object]
_DUMP: dict[str, Dump] = {
    JSON: _dump_json,
    YAML: _dump_yaml,
    MSGPACK: _dump_msgpack,
    PICKLE: _dump_pickle,
    AUTH: _dump_signed,
    ENCRYPTED: _dump_encrypted,
}
_LOAD: dict[str, Load] = {
    JSON: _load_json,
    YAML: _load_yaml,
    MSGPACK: _load_msgpack,
    PICKLE: _load_pickle,
    AUTH: _load_signed,
    ENCRYPTED: _load_encrypted,
}
# Serializers and content types whose bodies nobody but the holders of keys may read.
_PRIVATE = {"encrypted", ENCRYPTED}


SERIALIZERS = tuple(sorted(_BY_NAME))


def sign_with(dump: Dump, load: Load, *, is_private: bool) -> None:
    """How bodies are signed in this process, and verified; `is_private`: what is signed is encrypted."""
    _DUMP[AUTH], _LOAD[AUTH] = dump, load
    (_PRIVATE.update if is_private else _PRIVATE.difference_update)(("auth", AUTH))


def is_private(serializer: str | None) -> bool:
    """Whether a body of this serializer (or content type) is encrypted: no text of what is in it may be told to others."""
    return serializer in _PRIVATE


def is_protected(serializer: str) -> bool:
    """Whether it signs or encrypts."""
    return _BY_NAME.get(serializer, serializer) in (AUTH, ENCRYPTED)


def signs(serializer: str) -> bool:
    """Whether it signs, which takes a millisecond or more."""
    return _BY_NAME.get(serializer, serializer) == AUTH


def control_serializer(task_serializer: str) -> str:
    """What commands and replies of remote control are written in: JSON, but signed or encrypted where tasks are (Celery takes
    task_serializer in any case)."""
    return task_serializer if is_protected(task_serializer) else "json"


def is_text(mime_type: str) -> bool:
    """Whether bodies of that content type are text, for stores that keep text and bytes apart."""
    return mime_type == AUTH or mime_type.endswith(("json", "yaml"))


def check_usable(serializers: Iterable[str]) -> None:
    """Raises: ConfigurationError for one that signs or encrypts, and has no keys in this process."""
    for mime_type in content_types(serializers):
        if mime_type == ENCRYPTED:
            key_ring()
        elif mime_type == AUTH and _DUMP[AUTH] is _dump_signed:
            raise ConfigurationError(_NO_SIGNING)


def content_type(name: str) -> str:
    """The content type of a serializer's name, or of itself. Raises: ConfigurationError."""
    mime_type = _BY_NAME.get(name, name)
    if mime_type not in _DUMP and not _adopt(name):
        raise ConfigurationError(f"no serializer {name!r}; there are: {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME.get(name, name)


def register(
    name: str,
    encode: Callable[[Any], Any],
    decode: Callable[[Any], object],
    content_type: str,
    content_encoding: str = "utf-8",
) -> None:
    """A serializer of one's own. With a `content_encoding` of `binary` it writes and reads bytes, else text.

    Messages in it are read where `accept_content` names it.
    """
    charset = _TEXTS.get(content_encoding) if content_encoding != "binary" else None

    def dump(value: object, subject: Headers | None) -> bytes:
        encoded = encode(value)
        return encoded.encode(charset or "utf-8") if isinstance(encoded, str) else bytes(encoded)

    def load(body: bytes, encoding: str, subject: Headers | None) -> object:
        return decode(body if charset is None else body.decode(encoding))

    _BY_NAME[name] = content_type
    _DUMP[content_type], _LOAD[content_type], _ENCODING[content_type] = dump, load, content_encoding


def register_type(
    value_type: type, name: str, encode: Callable[[Any], object], decode: Callable[[Any], object]
) -> None:
    """A type that JSON messages can hold, marked by `name`: `encode` gives data, from which `decode` makes the value again."""
    _JSON_ENCODERS.insert(0, (value_type, lambda value: _wrap(name, encode(value))))
    _JSON_DECODERS[name] = decode


def _adopt(name: str) -> bool:
    """Take a serializer over that was registered with kombu, as programs for Celery do; whether there is one."""
    kombu = sys.modules.get("kombu.serialization")
    if kombu is None or not isinstance(name, str):
        return False
    registry = kombu.registry
    kombus_name = registry.type_to_name.get(name, name)
    codec = registry._encoders.get(kombus_name)  # Celery reads it, too
    if codec is None or codec.content_type in _DUMP or codec.content_type not in registry._decoders:
        return False
    register(
        kombus_name,
        codec.encoder,
        registry._decoders[codec.content_type],
        codec.content_type,
        codec.content_encoding,
    )
    return True


def content_types(names: Iterable[str]) -> frozenset[str]:
    """The content types of an accept list, which may name serializers or content types."""
    return frozenset(content_type(name) for name in names)


def dumps(value: object, serializer: str, subject: Headers | None = None) -> Encoded:
    """Write a value.

    Raises: EncodeError naming the serializer; ConfigurationError for an unknown one, or one without keys.
    """
    mime_type = content_type(serializer)
    try:
        return Encoded(_DUMP[mime_type](value, subject), mime_type, _ENCODING[mime_type])
    except ImportError as error:
        raise missing(serializer) from error
    except (EncodeError, ConfigurationError):  # of what is within a signature
        raise
    except Exception as error:  # the value's own methods may raise anything
        if not is_own(error, lambda: _DUMP[mime_type](value, subject)):
            raise
        raise EncodeError(f"{serializer} cannot write this {type(value).__name__}: {error}") from error


def loads(
    body: bytes,
    content_type: str | None,
    content_encoding: str | None,
    accept: frozenset[str],
    subject: Headers | None = None,
) -> Any:
    """Read a body; `accept` holds content types.

    Raises: ContentDisallowed before anything is read, SecurityError before anything is decoded, Undecodable.
    """
    mime_type = content_type or JSON
    if not isinstance(mime_type, str) or mime_type not in accept:
        raise _not_accepted(mime_type, accept)
    try:
        encoding = _TEXTS[content_encoding]
    except (KeyError, TypeError):
        encoding = _encoding(content_encoding)
    try:
        return _LOAD[mime_type](body, encoding, subject)
    except MessageError:  # of a signature, of encryption, or of what is within
        raise
    except ImportError as error:
        raise Undecodable(f"the library that reads {mime_type} is not installed: {error}") from error
    except Exception as error:
        if not is_own(error, lambda: _LOAD[mime_type](body, encoding or "utf-8", subject)):
            raise
        raise Undecodable(f"the body is not valid {mime_type} ({len(body)} bytes): {error}") from error


def _not_accepted(mime_type: object, accept: frozenset[str]) -> ContentDisallowed:
    protected = [label for protection, label in ((AUTH, "signed"), (ENCRYPTED, "encrypted")) if protection in accept]
    unprotected = f"the message is not {' or '.join(protected)}: its " if protected and mime_type != AUTH else ""
    return ContentDisallowed(
        f"{unprotected}content type {printable(repr(mime_type), 200)} is not accepted "
        f"(accept_content allows {', '.join(sorted(accept))}); "
        "add its serializer to accept_content only if you trust every producer"
    )


def _encoding(content_encoding: object) -> str:
    encoding = _TEXTS.get(content_encoding.lower().replace("_", "-")) if isinstance(content_encoding, str) else None
    if encoding is None:
        raise Undecodable(
            f"content encoding {printable(repr(content_encoding), 100)} is none that a message here can have (utf-8, binary)"
        )
    return encoding


def missing(serializer: str) -> ConfigurationError:
    """The error of a serializer or compression whose library is not installed."""
    return ConfigurationError(f'serializer {serializer!r} needs a library: pip install "amqtask[{serializer}]"')


def check_size(body: bytes, limit: int) -> None:
    """Raises: Undecodable."""
    if len(body) > limit:
        raise too_large(limit)


def too_large(limit: int) -> Undecodable:
    """The error of a body that has more bytes."""
    return Undecodable(
        f"the body has more than {limit} bytes, unpacked, and is not read (worker_max_body_size). Store large data elsewhere and "
        "pass where it is."
    )


# -- Exceptions that strike from outside (a signal handler, another thread), told from those that a function raises by itself.


def is_own(error: Exception, function: Callable[[], object]) -> bool:
    """Whether an error that came out of a function is its own: then it comes again when the function is called again.

    For places that make another error of it. One that struck from outside must go on as it is, to whoever it is meant for.
    """
    try:
        function()
    except type(error):
        return True
    return False
