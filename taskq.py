#!/usr/bin/env python3
"""taskq: Celery's programming model in one file. Copy it into a project and run it.

Quick start, with this file beside a module `tasks.py`:

    from taskq import TaskQ

    app = TaskQ("tasks")

    @app.task
    def add(x, y):
        return x + y

Start a worker with `python taskq.py -A tasks worker`, then call the task from any Python:

    >>> from tasks import add
    >>> add.delay(2, 2).get(timeout=10)
    4

How a task flows:

    producer                  store (an SQLite file, or Redis)       worker
    add.delay(2, 2)
      -> Message -> publish ───────► queue
                                       │ claim a batch, under the worker's number
                                       ▼
                                    claimed ──────────────► main loop ── token ──► pool child
                                                              ▲                    execute()
                                                              └──── Outcome ◄──────┘
                               results ◄─┐
    AsyncResult.get() ◄─ bell            └── settle a batch: results, acknowledgements and
                               queue   ◄──┘  follow-up messages, in one transaction

The producer turns a call into a Message, Celery's protocol 2, and the store keeps it. A worker's
main process claims messages in batches and hands each to a child with a 24-byte token; the child
executes it and writes the Outcome into the worker's Journal, a memory-mapped file that outlives
any crash; the main process settles outcomes, again in batches. Sleepers are woken by their Bell.
When a worker is killed, another one reads its journal: what had finished keeps its result, what
was running ends as FAILURE with WorkerLostError (or runs again, if it acknowledges late), and what
had not begun goes back to its queue.

The file reads from top to bottom, and each section uses only those above it:

    1. States and errors   7. Results       13. Pools              19. Monitors
    2. Serialization       8. Canvas        14. Remote control     20. Command line
    3. Settings            9. Task and app  15. Worker             21. Public names
    4. Messages           10. Execution     16. Background worker
    5. Signals            11. Events        17. Beat
    6. Stores             12. Schedules     18. Daemons, multi
"""

from __future__ import annotations

import importlib.machinery
import os
import sys


def _package_root(path: str) -> tuple[str, str]:
    """Return the directory to import a file from, and its dotted name there."""
    root, name = os.path.split(os.path.abspath(path))
    name = name[:-3] if name.endswith(".py") else name
    while os.path.exists(os.path.join(root, "__init__.py")):
        root, package = os.path.split(root)
        name = f"{package}.{name}"
    return root, name


if __name__ == "__main__":
    # The user's tasks import this file under its own name, so running it as `__main__` would make
    # a second set of classes. Hand over to the importable copy before any is defined.
    if __spec__ is not None:  # python -m taskq: the name is known
        _name, __spec__ = __spec__.name, None  # type: ignore[assignment]
        del __file__  # or spawned children would run this file again
        sys.exit(importlib.import_module(_name).main())

    import subprocess

    _file = os.path.abspath(__file__)
    _root, _name = _package_root(_file)
    if "." not in _name:  # no package: perhaps a folder of one without __init__.py
        _known = {os.path.abspath(entry) for entry in [os.getcwd(), *sys.path[1:]]}
        _above = [e for e in _known if _file.startswith(os.path.join(e, ""))]
        _root = max(_above, key=len, default=_root)
        _name = os.path.relpath(os.path.splitext(_file)[0], _root)
        _name = _name.replace(".", "-").replace(os.sep, ".")  # a folder my.app is no package
    # Nor is a folder `code` one: Python has a module of that name, and prefers it.
    _spec, _places = None, [_root, *sys.path[1:]]
    for _part in _name.split("."):
        _spec = importlib.machinery.PathFinder.find_spec(_part, _places)
        _places = list(_spec and _spec.submodule_search_locations or [])
    is_named = all(part.isidentifier() for part in _name.split("."))
    if not (is_named and _spec and _spec.origin == _file):
        _root, _name = os.path.dirname(_file), _name.rpartition(".")[2]
    # In a new interpreter: this one keeps the 13 MB that it took to compile the file.
    _path = f"sys.path[:] = [{_root!r}] + [p for p in sys.path if p]"
    _code = f"import sys; sys.argv[0] = {_file!r}; {_path}; "
    _code += f"import importlib; sys.exit(importlib.import_module({_name!r}).main())"
    _flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    _argv = [sys.executable, *_flags, "-c", _code, *sys.argv[1:]]
    if os.name == "nt":  # there exec returns to the shell at once
        sys.exit(subprocess.call(_argv))
    os.execv(sys.executable, _argv)

import atexit
import base64
import collections
import contextlib
import copy
import faulthandler
import functools
import io
import itertools
import json
import logging
import math
import mmap
import re
import reprlib
import select
import signal
import sqlite3
import struct
import threading
import time
import types
import warnings
import weakref
import zlib
from datetime import date, datetime, timedelta, timezone
from datetime import time as daytime
from decimal import Decimal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False  # `typing` costs 10 ms that no running program needs
if TYPE_CHECKING:
    from typing import Any, Callable, Collection, Iterable, Iterator, NoReturn, Sequence

__version__ = "0.1.0"


# ==== 1. States and errors =======================================================================

_unset: Any = None  # an attribute of any type

PENDING = "PENDING"  # it waits, or is unknown: the two cannot be told apart
RECEIVED = "RECEIVED"  # a worker has it (only in events)
STARTED = "STARTED"  # it runs (only with `track_started`)
SUCCESS = "SUCCESS"
FAILURE = "FAILURE"
REVOKED = "REVOKED"  # it was cancelled, or expired before it ran
REJECTED = "REJECTED"
RETRY = "RETRY"  # it failed and waits to run again
IGNORED = "IGNORED"

READY_STATES = frozenset({SUCCESS, FAILURE, REVOKED})
UNREADY_STATES = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})
PROPAGATE_STATES = frozenset({FAILURE, REVOKED})
ALL_STATES = frozenset({PENDING, RECEIVED, STARTED, SUCCESS, FAILURE, RETRY, REVOKED})

#: From the state that says most of a task to the one that says least; None is any own state.
PRECEDENCE = [SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING]


def precedence(state: str | None) -> int:
    """Return a state's place in PRECEDENCE."""
    return PRECEDENCE.index(state if state in PRECEDENCE else None)


class state(str):  # noqa: N801
    """A state that is less than those that say more: `state('PENDING') < state('SUCCESS')`."""

    __lt__ = lambda self, other: precedence(self) > precedence(other)  # noqa: E731
    __le__ = lambda self, other: precedence(self) >= precedence(other)  # noqa: E731
    __gt__ = lambda self, other: precedence(self) < precedence(other)  # noqa: E731
    __ge__ = lambda self, other: precedence(self) <= precedence(other)  # noqa: E731


def _error(name: str, meaning: str, *bases: type) -> Any:
    """Return a class of errors (or warnings) that adds nothing to its bases but a name."""
    return type(name, bases, {"__module__": __name__, "__doc__": meaning})


CeleryError = _error("CeleryError", "Base class of taskq's errors, by Celery's name.", Exception)
TaskError: Any = _error("TaskError", "Base class of errors about one task.", CeleryError)
TaskPredicate: Any = _error("TaskPredicate", "Base class of a task's own ends.", CeleryError)
CeleryWarning = _error("CeleryWarning", "Base class of taskq's warnings.", UserWarning)
AlwaysEagerIgnored = _error("AlwaysEagerIgnored", "`send_task` is never eager.", CeleryWarning)
ImproperlyConfigured = _error("ImproperlyConfigured", "Bad setting, address, option.", CeleryError)
OperationalError = _error("OperationalError", "The store cannot be reached or written.", Exception)
SerializationError = _error("SerializationError", "Base class of the next three.", Exception)
EncodeError = _error("EncodeError", "No message or result can hold it.", SerializationError)
DecodeError = _error("DecodeError", "Data cannot be read back.", SerializationError)
ContentDisallowed = _error("ContentDisallowed", "Not in `accept_content`.", SerializationError)
QueueNotFound = _error("QueueNotFound", "It is not in `task_queues`.", KeyError, TaskError)
TimeoutError = _error("TimeoutError", "The result did not arrive in time.", TaskError)
TaskRevokedError = _error("TaskRevokedError", "It was revoked: it has no result.", TaskError)
InvalidTaskError = _error("InvalidTaskError", "A message describes no task.", TaskError)
ChordError = _error("ChordError", "A part of a chord's header failed.", TaskError)
WorkerLostError = _error("WorkerLostError", "The process that ran the task died.", Exception)
WorkerTerminate = _error("WorkerTerminate", "Stops a worker's main process at once.", SystemExit)
Ignore = _error("Ignore", "Raised in a task to leave its state as it is.", TaskPredicate)
IncompleteStream = _error("IncompleteStream", "A result has no end yet.", TaskError)
#: Its arguments: the text that the user sees, and the exit status (2 by default).
CommandError = _error("CommandError", "A command that cannot be done.", Exception)

#: Names of Celery's that taskq itself does not raise: they are there to import and to catch.
CDeprecationWarning, CPendingDeprecationWarning = DeprecationWarning, PendingDeprecationWarning
BackendError = _error("BackendError", "Celery's name.", Exception)
for _base, _words in (
    (TaskError, "AlreadyRegistered"),
    (CeleryError, "SecurityError"),
    (Exception, "Terminated CeleryCommandException"),
    (SystemExit, "WorkerShutdown"),
    (BackendError, "BackendGetMetaError BackendStoreError"),
    (CeleryWarning, "NotConfigured SecurityWarning FixupWarning"),
    (CeleryWarning, "DuplicateNodenameWarning DuplicateTaskNameWarning"),
):
    for _name in _words.split():
        globals()[_name] = _error(_name, "Celery's name.", _base)


class Retry(TaskPredicate):
    """The task will run again, at `when` (seconds or a datetime): `Task.retry` has sent `sig`."""

    sig = _unset

    def __init__(self, message: Any = None, exc: Any = None, when: Any = None) -> None:
        self.message, self.when = message, when
        self.exc = None if isinstance(exc, str) else exc
        self.excs: Any = exc if isinstance(exc, str) else exc and _repr(exc)
        super().__init__(message, exc, when)

    def humanize(self) -> str:
        """Return when it will run, such as 'in 3s'."""
        return f"in {self.when}s" if isinstance(self.when, (int, float)) else f"at {self.when}"

    def __str__(self) -> str:
        why = f": {self.excs}" if self.excs else ""
        return self.message or f"Retry {self.humanize()}{why}"

    def __reduce__(self) -> Any:
        return type(self), (self.message, self.exc or self.excs, self.when)


class Reject(TaskPredicate):
    """Raised in a task to reject its message, or with `requeue=True` to put it back."""

    def __init__(self, reason: Any = None, requeue: bool = False) -> None:
        self.reason, self.requeue = reason, requeue
        super().__init__(reason, requeue)

    def __repr__(self) -> str:
        return f"reject requeue={self.requeue}: {self.reason}"


class NotRegistered(KeyError, TaskError):
    """A task of this name is not registered."""

    def __repr__(self) -> str:
        return f"Task of kind {self} never registered, please make sure it's imported."


class MaxRetriesExceededError(TaskError):
    """The task, called with `task_args` and `task_kwargs`, has used up its retries."""

    def __init__(self, *args: Any, task_args: Any = (), task_kwargs: Any = None) -> None:
        self.task_args, self.task_kwargs = task_args, task_kwargs or {}
        super().__init__(*args)


class _LimitExceeded(Exception):
    def __str__(self) -> str:
        return f"{type(self).__name__}{self.args!r}"


SoftTimeLimitExceeded = _error("SoftTimeLimitExceeded", "Raised in a late task.", _LimitExceeded)
TimeLimitExceeded = _error("TimeLimitExceeded", "The task was killed for it.", _LimitExceeded)


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of a re-raised error."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# ==== 2. Serialization ===========================================================================

#: What `task_serializer` and `result_serializer` may be, with the content type of each.
CONTENT_TYPES = {"json": "application/json", "pickle": "application/x-python-serialize"}
_SERIALIZERS = {content_type: serializer for serializer, content_type in CONTENT_TYPES.items()}


def uuid() -> str:
    """Return a new random id in the form of a UUID 4: `uuid() -> '7f0c…-…'`."""
    text = os.urandom(16).hex()
    variant = "89ab"[int(text[16], 16) % 4]
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


def _repr(value: Any, limit: int = 1024) -> str:
    """Return `repr(value)`, cut at `limit` characters, as text that can be written anywhere."""
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<Unrepresentable {type(value)!r}: {exc!r}>"
    if not text.isascii():  # a lone surrogate cannot be encoded
        text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _parse_time(text: str) -> datetime:
    """Return the datetime of an ISO 8601 text; Python before 3.11 does not read a final Z."""
    return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)


_decode_base64 = functools.partial(base64.b64decode, validate=True)


def _encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


#: What JSON does not know: by Celery's name the type, how it is written and how it is read. The
#: first that can write a value does. (To import uuid takes 4 ms; it is there where a value is.)
_RICH_TYPES: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "datetime": (datetime, datetime.isoformat, _parse_time),
    "date": (date, date.isoformat, lambda text: date.fromisoformat(text[:10])),
    "time": (daytime, daytime.isoformat, daytime.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, bytes.decode, str.encode),
    "base64": (bytes, _encode_base64, _decode_base64),
    "uuid": (object, lambda u: {"hex": u.hex}, lambda v: importlib.import_module("uuid").UUID(**v)),
}


def _encode_rich(value: Any) -> Any:
    """Return what JSON writes for a value that it does not know; TypeError if there is none."""
    for name, (cls, write, _) in _RICH_TYPES.items():
        if isinstance(value, cls) and (cls is not object or type(value).__name__ == "UUID"):
            with contextlib.suppress(UnicodeDecodeError):  # bytes that are no text
                return {"__type__": name, "__value__": write(value)}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _decode_rich(value: dict[str, Any]) -> Any:
    """Return what a JSON object stands for: a value of `_RICH_TYPES`, a signature, or itself."""
    if "subtask_type" in value and "immutable" in value:
        return Signature.from_dict(value)
    if len(value) != 2 or "__type__" not in value or "__value__" not in value:
        return value
    if value["__type__"] not in _RICH_TYPES:
        raise DecodeError(f"unsupported __type__ {value['__type__']!r} in JSON")
    return _RICH_TYPES[value["__type__"]][2](value["__value__"])


_json_encode = json.JSONEncoder(default=_encode_rich, separators=(",", ":")).encode
_read_plain = json.JSONDecoder().raw_decode
_read_rich = json.JSONDecoder(object_hook=_decode_rich).raw_decode


def _json_decode(text: str | bytes) -> Any:
    """Return what JSON text stands for; the hook, called for each object, only where it matters."""
    text = (text.decode() if isinstance(text, bytes) else text).strip()
    is_rich = '"__type__"' in text or '"subtask_type"' in text
    value, end = (_read_rich if is_rich else _read_plain)(text)
    if end < len(text):
        raise ValueError(f"more than one JSON value: {_repr(text[end:], 60)}")
    return value


def serialize(value: Any, serializer: str = "json") -> tuple[str, str, str]:
    """Return (content type, content encoding, text), 'application/json', 'utf-8', '[1,2]', pickle
    as base64; EncodeError for what cannot be written, or an unknown serializer."""
    if serializer not in CONTENT_TYPES:
        raise EncodeError(f"unknown serializer {serializer!r}: taskq has {_names(CONTENT_TYPES)}")
    try:
        if serializer == "json":
            return "application/json", "utf-8", _json_encode(value)
        import pickle  # it takes 3 ms

        return CONTENT_TYPES["pickle"], "binary", _encode_base64(pickle.dumps(value, 4))
    except Exception as exc:
        raise EncodeError(str(exc)) from None


def deserialize(text: str, content_type: str, accept: Collection[str]) -> Any:
    """Return what `serialize` wrote; DecodeError, or ContentDisallowed by what `accept` lists."""
    if content_type not in accept and _SERIALIZERS.get(content_type) not in accept:
        why = f"accept_content allows {_names(sorted(accept))}"
        raise ContentDisallowed(f"Refusing to deserialize content of type {content_type}: {why}")
    try:
        if content_type == "application/json":
            return _json_decode(text)
        import pickle

        return pickle.loads(_decode_base64(text))
    except Exception as exc:
        raise DecodeError(f"cannot read {content_type}: {_repr(exc, 200)}") from exc


def _names(items: Iterable[str]) -> str:
    """Return names as in "'json' and 'pickle'"."""
    *most, last = map(repr, items)
    return f"{', '.join(most)} and {last}" if most else last


#: The modules of Celery's errors that are not in celery.exceptions: theirs are the names on the
#: wire, so that a result tells neither which of the two ran the task nor where this file lies.
_WIRE_MODULES: dict[type, str] = {
    **dict.fromkeys((SoftTimeLimitExceeded, TimeLimitExceeded), "billiard.exceptions"),
    WorkerLostError: "billiard.exceptions",
    **dict.fromkeys((OperationalError, SerializationError, EncodeError), "kombu.exceptions"),
    **dict.fromkeys((DecodeError, ContentDisallowed), "kombu.exceptions"),
}


def encode_exception(exc: BaseException) -> dict[str, Any]:
    """Return an exception in Celery's form; of arguments that JSON cannot hold it has the repr."""
    cls = type(exc)
    args = list(exc.args) if cls is not Retry else [str(exc)]
    for index, arg in enumerate(args):
        try:
            _json_encode(arg)
        except Exception:
            args[index] = _repr(arg)
    module = cls.__module__
    if module == __name__:
        module = _WIRE_MODULES.get(cls, "celery.exceptions")
    return {"exc_type": cls.__qualname__, "exc_message": args, "exc_module": module}


def decode_exception(meta: Any) -> BaseException:
    """Return the exception of `encode_exception`'s form: of its class where that is imported
    already (a result never has anything imported), otherwise of a new class of its name."""
    if not isinstance(meta, dict) or not isinstance(meta.get("exc_type"), str):
        return meta if isinstance(meta, BaseException) else Exception(meta)  # a pickled result
    name, module = meta["exc_type"], meta.get("exc_module") or "builtins"
    args = meta.get("exc_message") or ()
    args = tuple(args) if isinstance(args, (list, tuple)) else (args,)
    is_ours = module in ("celery.exceptions", *_WIRE_MODULES.values())
    found: Any = sys.modules.get(__name__ if is_ours else module)
    for part in name.split("."):
        found = getattr(found, part, None)
    plain: Any = {"__module__": module, "__init__": lambda *_: None}
    plain.update(__str__=BaseException.__str__, __repr__=BaseException.__repr__)
    if isinstance(found, type) and issubclass(found, BaseException):
        # Its __init__ may want something else than its args; its text what only that has set.
        bare = functools.partial(found.__new__, found)
        for make in (found, bare, type(str(name), (found,), plain)):
            with contextlib.suppress(Exception):
                exc = make(*args)
                exc.args = args
                if f"{exc}{exc!r}":
                    return exc
    return type(str(name), (Exception,), plain)(*args)


# ==== 3. Settings ================================================================================

_LOG_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
_TASK_LOG_FORMAT = _LOG_FORMAT.replace("%(message)s", "%(task_name)s[%(task_id)s]: %(message)s")
_RETRY_POLICY = {"max_retries": 3, "interval_start": 0, "interval_max": 1, "interval_step": 0.2}

#: Every setting: Celery's name, its default, what it means.
SETTINGS: dict[str, tuple[Any, str]] = {
    "accept_content": (["json"], "serializers or content types that a worker accepts"),
    "beat_cron_starting_deadline": (None, "seconds after which a missed run is skipped"),
    "beat_max_loop_interval": (0, "most seconds between beat's looks; 300 by default"),
    "beat_schedule": ({}, "what beat sends, and when: {'name': {'task': ..., 'schedule': ...}}"),
    "beat_schedule_filename": (None, "file for beat's last runs, beside the store"),
    "broker_connection_max_retries": (
        100,
        "how often a starting worker tries again; None: without end",
    ),
    "broker_connection_retry": (True, "a worker waits for a server that is away when it starts"),
    "broker_connection_retry_on_startup": (None, "the same, by its newer name, which comes first"),
    "broker_transport_options": ({}, "options of the store, as in the URL's query"),
    "broker_url": (None, "where messages are kept: sqlite://, memory:// or redis://"),
    "broker_use_ssl": (None, "options of TLS for rediss://, such as {'ssl_ca_certs': 'ca.pem'}"),
    "control_exchange": ("celery", "name of the exchange for remote control"),
    "event_exchange": ("celeryev", "name of the exchange for events"),
    "event_queue_prefix": ("celeryev", "how the names of event receivers' queues begin"),
    "imports": ((), "modules that a worker imports when it starts"),
    "include": ((), "more modules that a worker imports when it starts"),
    "redis_backend_health_check_interval": (None, "seconds after which a connection is tried"),
    "redis_backend_use_ssl": (None, "the same as broker_use_ssl for a backend of its own"),
    "redis_socket_connect_timeout": (None, "seconds to wait for a connection to the backend"),
    "redis_socket_keepalive": (False, "let the system probe connections to the backend"),
    "redis_socket_timeout": (None, "seconds to wait for an answer of the backend"),
    "result_accept_content": (None, "the same for results; accept_content by default"),
    "result_backend": (None, "where results are kept; the broker's store by default"),
    "result_backend_transport_options": ({}, "options of a backend of its own"),
    "result_expires": (timedelta(days=1), "how long a result is kept (seconds or timedelta)"),
    "result_extended": (False, "keep name, args, kwargs, worker, retries, queue with a result"),
    "result_failure_expires": (None, "how long the result of a failure is kept"),
    "result_serializer": ("json", "how results are written: json or pickle"),
    "task_acks_late": (False, "acknowledge after a task has run instead of before"),
    "task_acks_on_failure": (None, "acknowledge late tasks that failed"),
    "task_acks_on_failure_or_timeout": (True, "both of its neighbours"),
    "task_acks_on_timeout": (None, "acknowledge late tasks that ran into their time limit"),
    "task_allow_error_cb_on_chord_header": (False, "errbacks of a chord hear of its header too"),
    "task_always_eager": (False, "apply_async runs the task here and now"),
    "task_annotations": (None, "attributes to set on tasks, by name: {'tasks.add': {...}}"),
    "task_create_missing_queues": (True, "make queues that task_queues does not list"),
    "task_default_exchange": (None, "exchange of the default queue; the queue's name by default"),
    "task_default_exchange_type": ("direct", "direct, topic or fanout"),
    "task_default_priority": (None, "priority of tasks that name none, 0 (highest) to 9"),
    "task_default_queue": ("celery", "queue of tasks that nothing routes elsewhere"),
    "task_default_rate_limit": (None, "rate limit of tasks that name none, such as '10/m'"),
    "task_default_routing_key": (None, "routing key of the default queue; its name by default"),
    "task_eager_propagates": (False, "eager tasks raise their errors"),
    "task_ignore_result": (False, "keep no results"),
    "task_inherit_parent_priority": (False, "a task called by another has its priority"),
    "task_publish_retry": (True, "try again when the store cannot be written"),
    "task_publish_retry_policy": (_RETRY_POLICY, "how often and after how many seconds"),
    "task_queues": (None, "names or Queue objects that workers serve"),
    "task_reject_on_worker_lost": (None, "a late task whose process died runs again"),
    "task_routes": (None, "where tasks go: dict, pairs, globs, patterns, functions"),
    "task_send_sent_event": (False, "who calls a task sends the event task-sent"),
    "task_serializer": ("json", "how arguments are written: json or pickle"),
    "task_soft_time_limit": (None, "seconds until SoftTimeLimitExceeded is raised in a task"),
    "task_store_eager_result": (False, "eager tasks keep their results"),
    "task_store_errors_even_if_ignored": (False, "keep failures of tasks that ignore results"),
    "task_time_limit": (None, "seconds until the process of a task is killed"),
    "task_track_started": (False, "tasks report STARTED"),
    "timezone": (None, "name of the local time zone, such as 'Europe/Oslo'; UTC by default"),
    "worker_concurrency": (None, "processes, threads or greenlets; the CPUs by default"),
    "worker_disable_prefetch": (False, "claim a message only when a process is free for it"),
    "worker_disable_rate_limits": (False, "keep no rate limits"),
    "worker_enable_remote_control": (True, "answer to inspect and control"),
    "worker_hijack_root_logger": (True, "the worker takes over the root logger"),
    "worker_log_color": (None, "colour in the log; on a terminal by default"),
    "worker_log_format": (_LOG_FORMAT, "format of log lines"),
    "worker_max_memory_per_child": (None, "KiB after which a child process is replaced"),
    "worker_max_tasks_per_child": (None, "tasks after which a child process is replaced"),
    "worker_pool": ("prefork", "prefork, threads, solo, gevent or eventlet"),
    "worker_pool_start_method": ("fork", "how children start: fork or spawn"),
    "worker_prefetch_multiplier": (4, "messages that a worker holds for each process"),
    "worker_redirect_stdouts": (True, "print in a task goes to the log"),
    "worker_redirect_stdouts_level": ("WARNING", "at this level"),
    "worker_send_task_events": (False, "send events of tasks, as -E does"),
    "worker_state_db": (None, "file in which revokes survive a restart; SQLite needs none"),
    "worker_task_log_format": (_TASK_LOG_FORMAT, "format of log lines of task loggers"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_limit(value: Any) -> bool:
    return value is None or _is_number(value) and 0 <= value < 1e9


def _zone(value: Any) -> Any:
    """Return the tzinfo of a setting: a name, a tzinfo, or None for UTC."""
    if value in (None, "UTC", "utc"):
        return timezone.utc
    import zoneinfo

    return zoneinfo.ZoneInfo(value) if isinstance(value, str) else value


def _rate(limit: Any) -> float:
    """Return a rate limit as tasks a second; 0: none."""
    amount, _, unit = str(limit or 0).partition("/")
    with contextlib.suppress(ValueError, KeyError):
        rate = float(amount) / {"s": 1, "m": 60, "h": 3600, "": 1}[unit]
        if 0 <= rate < math.inf:
            return rate
    raise ValueError(f"rate limit {limit!r}: expected '10/m', '5/s', '100/h' or a number a second")


def _log_level(level: int | str) -> int:
    """Return the number of a level, 20 or 'info'; ValueError if there is none of that name."""
    number = level if isinstance(level, int) else logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ValueError(f"log level {level!r}: expected a number or a name such as 'INFO'")
    return number


_POOLS = ("prefork", "processes", "threads", "gevent", "eventlet", "solo")
_FLAGS = [name for name, (default, _) in SETTINGS.items() if isinstance(default, bool)]
_FLAGS += ["task_acks_on_(failure|timeout)", "task_reject_on_worker_lost", "worker_log_color"]
_FLAGS.append("broker_connection_retry_on_startup")

#: Patterns of settings' names, a test that returns False or fails for bad values, what it means.
_VALUES: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("|".join(_FLAGS), {True, False}.__contains__, "True or False"),
    ("timezone", lambda v: datetime.now(_zone(v)), "a name such as 'UTC' or 'Europe/Oslo'"),
    (".*_serializer", CONTENT_TYPES.__contains__, f"one of {_names(CONTENT_TYPES)}"),
    (".*accept.*", {*CONTENT_TYPES, *_SERIALIZERS}.issuperset, "a list of 'json' and 'pickle'"),
    (".*_type", ("direct", "topic", "fanout").__contains__, "'direct', 'topic' or 'fanout'"),
    ("worker_pool", _POOLS.__contains__, _names(_POOLS)),
    (".*_start_method", ("fork", "spawn").__contains__, "'fork' and 'spawn'"),
    ("task_queues", lambda v: not isinstance(v, (str, dict)) and iter(v), "names or Queue objects"),
    ("task_routes", lambda v: callable(v) or iter(v), "a dict, a list, a function or its name"),
    ("imports|include", "".join, "names of modules"),
    ("broker_url|result_backend", "".join, "a URL"),
    (".*_expires", lambda v: isinstance(v, timedelta) or _is_limit(v), "seconds or a timedelta"),
    (".*_time_limit|(redis|beat)_.*(timeout|interval|deadline)", _is_limit, "seconds"),
    (".*_(use_ssl|options|schedule|policy|annotations)", lambda v: {**(v or {})}, "a dict"),
    (".*_rate_limit", _rate, "'10/m', '5/s', '100/h' or a number a second"),
    (".*(_per_child|_multiplier|_max_retries)", _is_limit, "a number from 0 on"),
    (".*_priority", range(10).__contains__, "0 (highest) to 9"),
    (".*_level", _log_level, "a name such as 'INFO', or a number"),
    (".*_(exchange|queue|key|prefix|format|db|filename)", str.encode, "text"),
)

#: What Celery has and taskq does not: to ask for it is an error, not a surprise. (What else Celery
#: has tunes what is not there: it is kept like an app's own settings.)
_ABSENT = (
    "((arangodb|azureblockblob|cache_backend|cassandra|cosmosdbsql|couchbase|database|gcs|"
    "elasticsearch|mongodb|s3|redis_(host|port|db|username|password|backend_credential_provider)|"
    "broker_(host|port|user|password|vhost|transport))(_.*)?)|security_.*|"
    "broker_((read|write)_url|failover_strategy)|override_backends|beat_enable_remote_control|"
    "(beat|events|worker)_(logfile|pidfile|uid|gid|umask|executable)|"
    "(task|result)_compression|task_(remote_tracebacks|retry_on_worker_lost|stamps)|"
    "task_create_missing_queue_exchange_type|worker_(direct|pool_restarts|"
    "deduplicate_successful_tasks|.*soft_shutdown.*|agent|autoscaler|consumer|timer|.*datefmt)"
)
#: The same, of which there is one value.
_FIXED = {
    "beat_scheduler": "celery.beat:PersistentScheduler",
    "enable_utc": True,
    "event_serializer": "json",
    "task_create_missing_queue_type": "classic",
    "task_default_queue_type": "classic",
    "task_protocol": 2,
}


def _hint(name: str, known: Iterable[str], cutoff: float = 0.84) -> str:
    """Return ": did you mean 'x'?" where a known name is close to this one, else nothing."""
    import difflib  # it takes 2 ms

    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f": did you mean {near[0]!r}?" if near else ""


class Settings(dict):
    """An app's settings, by key or by attribute: `app.conf.timezone = 'UTC'`. All of SETTINGS are
    there with their defaults. Own names are kept; one that is close to a known name, and a setting
    of Celery that taskq cannot honour, is an ImproperlyConfigured. `changed` has what was set,
    `loaded` the names of what a configuration source set; `made`, for what is made of them, is
    emptied by each change."""

    def __init__(self) -> None:
        # Copied, as apps do app.conf.beat_schedule["name"] = {...}
        super().__init__({name: copy.copy(default) for name, (default, _) in SETTINGS.items()})
        self.__dict__.update(changed={}, loaded=set(), made={})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no setting {name!r}{_hint(name, SETTINGS)}")

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    __setattr__ = __setitem__

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several settings; all are checked before the first is set."""
        new = dict(*args, **kwargs)
        for item in new.items():
            self._check(*item)
        super().update(new)
        self.changed.update(new)
        self.loaded.difference_update(new)
        self.__dict__["made"] = {}

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Set `name` unless the app has set it; return what it is now."""
        if name not in self.changed:
            self[name] = default
        return self[name]

    def _check(self, name: str, value: Any) -> None:
        """Raise ImproperlyConfigured for a setting that cannot be, or cannot have this value."""
        expected = ""
        old = re.sub("^celery(d|beat)?_", "", name.lower()) if name.isupper() else ""
        if name in SETTINGS:
            rows = (row[1:] for row in _VALUES if re.fullmatch(row[0], name))
            test, expected = next(rows, (bool, ""))
            with contextlib.suppress(Exception):
                if value in (None, SETTINGS[name][0]) or test(value) is not False:
                    return
        elif name in _FIXED:
            expected = repr(_FIXED[name]) if value != _FIXED[name] else ""
        elif re.fullmatch(_ABSENT, old if name.startswith("CELERY") else name):
            expected = "it to be left out: taskq does not have it" if value else ""
        else:
            kinds = "^(task|worker|result|beat)_"
            same = [new for new in SETTINGS if old in (new, re.sub(kinds, "", new))]
            hint = _hint(same[0] if same else old if "CELERY" in name else name, SETTINGS)
            if hint:
                raise ImproperlyConfigured(f"unknown setting {name!r}{hint}")
        if expected:
            given = f"setting {name!r} = {_repr(value, 60)}"
            raise ImproperlyConfigured(f"{given}: expected {expected}")

    def load(self, source: Any, namespace: str | None = None) -> None:
        """Take settings from a mapping, module or object; with a namespace, 'CELERY', those that
        begin with it, as CELERY_TIMEZONE. Modules, classes and functions are no own settings."""
        prefix = namespace.rstrip("_") + "_" if namespace else ""
        if not isinstance(source, collections.abc.Mapping):  # others may raise when they are read
            names = [name for name in dir(source) if name.startswith(prefix) and name[0] != "_"]
            source = {name: getattr(source, name) for name in names}
        functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
        found = {}
        for name, value in source.items():
            if name.startswith(prefix) and not name.startswith("_"):
                name = name[len(prefix) :].lower() if prefix else name
                is_value = not isinstance(value, (type, types.ModuleType, *functions))
                if (name in SETTINGS or is_value) and name not in self.changed.keys() - self.loaded:
                    found[name] = value
        self.update(found)
        self.loaded.update(found)

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        """Return the settings that were set, or all, as JSON can hold them, secrets masked."""
        secret = re.compile("api|token|key|secret|pass|signature|database", re.I)

        def shown(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {str(key): shown(str(key), each) for key, each in value.items()}
            if censored and secret.search(name) and value:
                return "*" * 8
            if type(value) in (list, tuple, set):
                return [shown(name, each) for each in value]
            if value is None or isinstance(value, (bool, int, float)):
                return value
            return _mask_url(str(value)) if censored else str(value)

        table = self if with_defaults else self.changed
        return {name: shown(name, value) for name, value in sorted(table.items())}

    def humanize(self, with_defaults: bool = False, censored: bool = True) -> str:
        """Return the same as text, a line each."""
        table = self.table(with_defaults, censored)
        return "\n".join(f"{name}: {value!r}" for name, value in table.items())

    def seconds(self, name: str) -> float | None:
        """Return a setting that is seconds, a timedelta or None, as seconds or None."""
        value = self[name]
        return value.total_seconds() if isinstance(value, timedelta) else value


def _mask_url(url: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"(://[^/@:]*:)[^@\s]*(@)", r"\1**\2", url)


# ==== 4. Messages ================================================================================

MalformedMessage = _error("MalformedMessage", "No task can be made of a message.", Exception)


class Message(collections.namedtuple("Message", "headers properties body content_type encoding")):
    """One task on its way: Celery's message protocol 2. The only form a task has outside a process.

    headers: what describes the task (task, id, eta, expires, retries, …).
    properties: what describes the delivery (correlation_id, delivery_info, priority, …).
    body: text of `[args, kwargs, embed]`, in the content type named beside it; base64 unless JSON.
    """

    __slots__ = ()

    def encode(self) -> str:
        """Return the envelope, JSON text that `Message.decode` reads."""
        return _json_encode(dict(zip(_ENVELOPE, self)))

    @classmethod
    def decode(cls, text: str | bytes) -> Message:
        """Return the message in an envelope; MalformedMessage, whatever the bytes, if none is."""
        try:
            envelope = _json_decode(text)
        except Exception as exc:  # ValueError, RecursionError, ...
            raise MalformedMessage(f"not JSON: {_repr(exc, 120)}") from None
        if not isinstance(envelope, dict):
            raise MalformedMessage(f"the envelope is {_repr(envelope, 60)}")
        message = cls(*map(envelope.get, _ENVELOPE))
        try:
            for what, field, name, is_needed, test in _CHECKS:  # noqa: B007 - for the error
                value = message[field].get(name) if name else message[field]
                if (is_needed or value is not None) and test(value) is False:
                    raise ValueError
            is_base64 = message.properties.get("body_encoding") == "base64"
            if is_base64 and message.content_type == "application/json":
                what, value = "body in base64", message.body
                return message._replace(body=_decode_base64(value).decode())
        except Exception:  # that of a test, too
            raise MalformedMessage(f"{what} is {_repr(value, 60)}") from None
        return message

    def payload(self, accept: Collection[str]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Return (args, kwargs, embed); MalformedMessage if the body holds something else."""
        try:
            body = deserialize(self.body, self.content_type, accept)
        except (ContentDisallowed, DecodeError) as exc:
            raise MalformedMessage(str(exc)) from None
        if not isinstance(body, (list, tuple)) or len(body) != 3:
            raise MalformedMessage(f"body is {_repr(body, 60)}, not [args, kwargs, embed]")
        args, kwargs, embed = body
        if not isinstance(args, (list, tuple)):
            raise MalformedMessage(f"args is {_repr(args, 60)}, not a list")
        if not isinstance(kwargs, dict):
            raise MalformedMessage(f"kwargs is {_repr(kwargs, 60)}, not an object")
        return list(args), kwargs, embed if isinstance(embed, dict) else {}

    id = property(lambda message: message.headers["id"], doc="The task's id.")

    @property
    def expires(self) -> float | None:
        """When the task must have begun, in seconds since the epoch; None for ever."""
        value = self.headers.get("expires")
        return None if value is None else _timestamp(value)


def _timestamp(value: Any) -> float:
    """Return seconds since the epoch for an ISO text or a datetime; a naive one is UTC."""
    when = value if isinstance(value, datetime) else _parse_time(value)
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def _is_name(value: str) -> bool:
    return bool(value.encode("utf-8"))  # no store can hold a lone surrogate


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**31


#: The names of a Message's fields in an envelope.
_ENVELOPE = ("headers", "properties", "body", "content-type", "content-encoding")

#: What an envelope must have: what errors call it, the number of the Message's field and the name
#: in that, whether it must be there, and a test that returns False, or fails, for what is bad.
_CHECKS: tuple[tuple[str, int, str | None, bool, Callable[[Any], Any]], ...] = (
    ("headers", 0, None, True, lambda value: isinstance(value, dict)),
    ("properties", 1, None, True, lambda value: isinstance(value, dict)),
    ("body", 2, None, True, lambda value: isinstance(value, str)),
    ("content-type", 3, None, True, _is_name),
    ("header 'id'", 0, "id", True, _is_name),
    ("header 'task'", 0, "task", True, _is_name),
    ("header 'timelimit'", 0, "timelimit", False, lambda v: [*map(_is_limit, v)] == [True, True]),
    ("header 'retries'", 0, "retries", False, _is_count),
    ("header 'eta'", 0, "eta", False, _timestamp),
    ("header 'expires'", 0, "expires", False, _timestamp),
    ("property 'delivery_info'", 1, "delivery_info", False, lambda v: isinstance(v, dict)),
    ("property 'priority'", 1, "priority", False, lambda v: type(v) is int and 0 <= v <= 255),
)


def encode_post(exchange: str, routing_key: str, body: Any, headers: Any = None) -> str:
    """Return the text of a message that is no task: a command, its reply, an event."""
    info = {"exchange": exchange, "routing_key": routing_key}
    properties = {"delivery_mode": 1, "delivery_tag": uuid(), "delivery_info": info, "priority": 0}
    text = _json_encode(body)
    return Message(headers or {}, properties, text, CONTENT_TYPES["json"], "utf-8").encode()


def decode_post(text: str | bytes) -> tuple[Any, dict[str, Any]]:
    """Return (body, headers) of a message that is no task; MalformedMessage if it is none."""
    try:
        headers, properties, body, *_ = map(_json_decode(text).get, _ENVELOPE)
        is_base64 = properties.get("body_encoding") == "base64"
        return _json_decode(_decode_base64(body) if is_base64 else body), headers or {}
    except Exception as exc:
        raise MalformedMessage(f"{_repr(exc, 120)} in {_repr(text, 200)}") from None


#: What a producer hands to a store: `due` is seconds since the epoch, or None for now; `text` an
#: encoded Message.
Delivery = collections.namedtuple("Delivery", "queue priority due text")

#: What came of one message; all of it is settled in one transaction.
#: verb: 'ack', 'requeue' or 'reject' (kept for inspection). publish: deliveries that follow.
#: reason: why, of 'reject'; the new text, of 'requeue'. runtime: in seconds. results, chords,
#: parts: rows for `Store.put_results` and `publish`. events: (type, fields) pairs to send.
Outcome = collections.namedtuple(
    "Outcome", "verb results publish reason runtime chords parts events", defaults=((), (), ())
)


# ==== 5. Signals =================================================================================


class Signal:
    """Something that happens in taskq, and those who want to be called then.

        @task_success.connect
        def on_success(sender, result, **kwargs): ...

    A receiver is held weakly unless `weak=False`; an error in one is logged and stops nobody."""

    def __init__(self, name: str, arguments: str = "") -> None:
        self.name = name
        self.providing_args = set(arguments.split())
        self.receivers: dict[tuple[Any, Any], Callable[[], Any]] = {}  # (key, sender): reference

    def connect(
        self, receiver: Any = None, sender: Any = None, weak: bool = True, dispatch_uid: Any = None
    ) -> Any:
        """Call `receiver(signal=, sender=, **named)` from now on, of one `sender` or of all; also a
        decorator. dispatch_uid: anything, of which there is one receiver."""
        if not callable(receiver):
            return lambda found: self.connect(found, sender or receiver, weak, dispatch_uid)
        kind: Any = weakref.WeakMethod if hasattr(receiver, "__func__") else weakref.ref
        reference = kind(receiver) if weak else lambda: receiver
        alive = {key: ref for key, ref in self.receivers.items() if ref() is not None}
        alive.setdefault((dispatch_uid or hash(receiver), sender), reference)
        self.receivers = alive  # a new one, for those who are sending just now
        return receiver

    def disconnect(
        self, receiver: Any = None, sender: Any = None, weak: Any = None, dispatch_uid: Any = None
    ) -> bool:
        """Stop calling a receiver; return whether it was connected."""
        gone, before = (dispatch_uid or hash(receiver), sender), self.receivers
        self.receivers = {key: ref for key, ref in before.items() if key != gone}
        return gone in before

    def send(self, sender: Any = None, **named: Any) -> list[tuple[Any, Any]]:
        """Call every receiver; return (receiver, what it returned or raised) pairs."""
        responses = []
        senders = (None, sender, getattr(sender, "name", None))
        for (_, wanted), reference in self.receivers.items():
            receiver = reference()
            if receiver is None or wanted not in senders:
                continue
            try:
                responses.append((receiver, receiver(signal=self, sender=sender, **named)))
            except Exception as exc:
                logger.exception("Signal handler %r raised: %r", receiver, exc)
                responses.append((receiver, exc))
        return responses

    def __repr__(self) -> str:
        return f"<Signal: {self.name} providing_args={self.providing_args!r}>"


#: Loggers have Celery's names, so that a project's logging configuration works for both.
logger = logging.getLogger("celery")
task_logger = logging.getLogger("celery.task")
trace_logger = logging.getLogger("celery.app.trace")
worker_logger = logging.getLogger("celery.worker")
logger.addHandler(logging.NullHandler())
task_logger.addHandler(logging.NullHandler())

_PUBLISH = "body exchange routing_key headers"
before_task_publish = Signal("before_task_publish", _PUBLISH + " properties declare retry_policy")
after_task_publish = Signal("after_task_publish", _PUBLISH)
task_received = Signal("task_received", "request")
task_prerun = Signal("task_prerun", "task_id task args kwargs")
task_postrun = Signal("task_postrun", "task_id task args kwargs retval state")
task_success = Signal("task_success", "result runtime")
task_failure = Signal("task_failure", "task_id exception args kwargs traceback einfo")
task_retry = Signal("task_retry", "request reason einfo")
task_revoked = Signal("task_revoked", "request terminated signum expired")
task_rejected = Signal("task_rejected", "message exc")
task_unknown = Signal("task_unknown", "message exc name id")
celeryd_init = Signal("celeryd_init", "instance conf options")
celeryd_after_setup = Signal("celeryd_after_setup", "instance conf")
worker_init = Signal("worker_init")
worker_ready = Signal("worker_ready")
worker_shutting_down = Signal("worker_shutting_down", "sig how exitcode")
worker_shutdown = Signal("worker_shutdown")
worker_before_create_process = Signal("worker_before_create_process")
worker_process_init = Signal("worker_process_init")
worker_process_shutdown = Signal("worker_process_shutdown", "pid exitcode")
heartbeat_sent = Signal("heartbeat_sent")
beat_init = Signal("beat_init")
beat_embedded_init = Signal("beat_embedded_init")
_LOGGING = "loglevel logfile format colorize"
setup_logging = Signal("setup_logging", _LOGGING)
after_setup_logger = Signal("after_setup_logger", "logger " + _LOGGING)
after_setup_task_logger = Signal("after_setup_task_logger", "logger " + _LOGGING)


# ==== 6. Stores ==================================================================================
#
# Beside an SQLite file DB lies the run directory DB-run, with what is too quick for a database and
# ends with its process: an ID.bell and ID.fifo of each sleeper, an OWNER.journal of each worker.


class Bell:
    """Wakes one sleeper: a worker without work, or a thread that waits for a result. Its owner
    listens to topics, dozes, looks in the store a last time, and waits. Others see its state and
    topics in a small mapped file, and wake it by a byte into a FIFO beside that. Without a path,
    where there are no FIFOs, it looks around often instead. `mine` is False for another process's
    bell, seen from here."""

    #: The state's 8 bytes, then one for each hash of a topic: whether the owner listens.
    SIZE = 8 + 2**16
    #: States. Napping, it wants to be woken only by its own children, when they have no work;
    #: deaf, it hears of no topic: a worker that is full leaves calls to others.
    AWAKE, NAP, DEAF, HEARS = range(4)
    #: Whether the owner wants to be woken, and whether it neither sleeps nor naps.
    asleep = property(lambda bell: bell._flag[0] > bell.NAP)
    awake = property(lambda bell: bell._flag[0] == bell.AWAKE)
    _places: frozenset[int] | set[int] = frozenset()
    _rung = False  # whether the last wait ended with a ring: then the next may soon come

    def __init__(self, path: str | None, mine: bool = True) -> None:
        self.path = path
        self.pid = os.getpid() if mine else 0
        self._fds: list[int] = []  # the FIFO, once it is open
        #: Removes the files; happens by itself when nobody has the bell any more.
        self.close = weakref.finalize(self, _close_bell, path, self.pid, self._fds)
        if path and mine:
            os.mkfifo(path + ".fifo", 0o600)
            self._fds.append(os.open(path + ".fifo", os.O_RDWR | os.O_NONBLOCK))
        size = self.SIZE if mine else 0
        self._map = _mapped(path + ".bell", size) if path else mmap.mmap(-1, size)
        self._flag = memoryview(self._map)[:8].cast("Q")

    def listen(self, topics: Iterable[str]) -> None:
        """Hear of these topics, and of no others."""
        before, self._places = self._places, {_topic_place(topic) for topic in topics}
        for place in self._places ^ before:
            self._map[place] = place in self._places

    def post(self, topic: str) -> None:
        """Say that there is post about a topic, and wake the owner, even a deaf one."""
        self._map[_topic_place(topic)] = 2
        if self.asleep:
            self.ring()

    def has_post(self, topic: str) -> bool:
        """Return whether there is post since this was asked last; True if nobody can ring."""
        place = _topic_place(topic)
        has = self._map[place] == 2
        if has:
            self._map[place] = 1
        return has or not self._fds

    def ring(self) -> bool:
        """Wake the owner, also from a signal handler or a child of it; False if it is gone."""
        self._flag[0] = self.AWAKE
        try:
            if self.path and not self._fds:
                self._fds.append(os.open(self.path + ".fifo", os.O_WRONLY | os.O_NONBLOCK))
            return not self.path or bool(os.write(self._fds[0], b"\0"))
        except OSError as exc:
            return isinstance(exc, BlockingIOError)  # full of rings; else nobody reads there

    def doze(self, hears: bool) -> None:
        """Sleep from now on; unless it `hears`, only the owner's own processes can wake it."""
        self._flag[0] = self.HEARS if hears else self.DEAF

    def nap(self, timeout: float) -> None:
        """Sleep as `wait` does, while others think that the owner is busy."""
        self._flag[0] = self.NAP
        self.wait(timeout)

    def wait(self, timeout: float) -> bool:
        """Sleep until somebody rings, or for `timeout` seconds; return whether somebody did."""
        if self._rung and threading.active_count() == 1:  # others would want the interpreter
            until = time.perf_counter() + min(0.0004, timeout)  # to be woken takes as long
            while self._flag[0] and time.perf_counter() < until:
                _yield_cpu()
        self._rung, timeout = False, max(0.0, timeout)
        if not self._fds:  # it polls: nobody can ring, so look into the store soon
            time.sleep(min(timeout, 0.02))
        elif _readable(self._fds[0], timeout):
            self._rung = bool(os.read(self._fds[0], 4096))
        self._flag[0] = self.AWAKE
        return self._rung


def _close_bell(path: str | None, pid: int, fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
    if path is not None and pid == os.getpid():  # not in a child of the owner
        _unlink(path + ".bell", path + ".fifo")
        with contextlib.suppress(OSError):  # there are others
            os.rmdir(os.path.dirname(path))


class Bells:
    """The bells of one store, of this `kind`: opens those of this process, rings those of all."""

    def __init__(self, folder: str, kind: Callable[..., Bell] = Bell) -> None:
        self.folder, self._kind = folder, kind
        self._spare: list[Bell] = []
        self._known: list[Bell] = []  # those to ring
        self._seen = 0  # the directory's time when `_known` was read

    def open(self) -> Bell:
        """Return a bell of this process."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        for _ in range(3):  # others may remove an empty directory, or a FIFO that is not open yet
            # There may be no FIFOs.
            with contextlib.suppress(OSError, OperationalError, AttributeError):
                os.makedirs(self.folder, 0o700, exist_ok=True)
                return self._kind(os.path.join(self.folder, os.urandom(8).hex()))
        return self._kind(None)

    def close(self, bell: Bell) -> None:
        """Take back a bell of this process, which then hears of nothing, for its next sleeper."""
        bell.listen(())
        if bell.pid == os.getpid():
            self._spare.append(bell)

    def clear(self) -> None:
        """Give up the bells that nobody uses, and their files."""
        while self._spare:
            self._spare.pop().close()

    def ring(self, queues: Iterable[str], ids: Iterable[str] = ()) -> None:
        """Wake for each queue the first sleeper who listens, and for each result all who do."""
        topics = [f"q:{queue}" for queue in set(queues)] + [f"r:{id}" for id in ids]
        bells = self._scan() if topics else ()
        for topic in topics if bells else ():
            place = _topic_place(topic)
            for bell in bells:
                hears = bell._flag[0] == bell.HEARS and bell._map[place]
                if hears and bell.ring() and topic.startswith("q"):
                    break

    def listeners(self, topic: str) -> list[Bell]:
        """Return the bells that listen to a topic, asleep or not; not those of the dead."""
        place = _topic_place(topic)
        return [bell for bell in self._scan() if bell._map[place] and _has_reader(bell.path)]

    def _scan(self) -> list[Bell]:
        """Return the bells to ring; the run directory is read anew if it has changed."""
        try:
            changed = os.stat(self.folder).st_mtime_ns
            if changed != self._seen:
                known, found = {bell.path: bell for bell in self._known}, []
                for path in _paths(self.folder, ".bell"):
                    with contextlib.suppress(OSError):  # it has gone
                        found.append(known.get(path[:-5]) or Bell(path[:-5], mine=False))
                self._known = found
                # A change within one tick of the file system's clock would go unseen.
                self._seen = changed if time.time_ns() - changed > 50_000_000 else 0
        except OSError:  # there is no directory, and nobody who sleeps
            self._known, self._seen = [], 0
        return self._known

    def sweep(self) -> None:
        """Remove the bells that nobody reads any more."""
        for path in _paths(self.folder, ".fifo", ".bell"):
            if not _has_reader(path[:-5]):
                _unlink(path)


def _has_reader(path: str | None) -> bool:
    """Return whether the owner of a bell has its FIFO open."""
    with contextlib.suppress(OSError):
        os.close(os.open(f"{path}.fifo", os.O_WRONLY | os.O_NONBLOCK))
        return True
    return False


_yield_cpu: Callable[[], Any] = getattr(os, "sched_yield", functools.partial(time.sleep, 0))


def _topic_place(topic: str) -> int:
    """Return where in a bell's map a topic is: those of queues apart from those of results."""
    place = 2 * (zlib.crc32(topic.encode("utf-8", "surrogatepass")) & 0x7FFF)
    return 8 + place + topic.startswith("q")


def _readable(file: Any, timeout: float, *more: Any) -> bool:
    """Wait until one can be read; `poll` knows those above 1,024, eventlet has only select."""
    if hasattr(select, "poll"):
        poll = select.poll()
        for each in (file, *more):
            poll.register(each, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    return bool(select.select([file, *more], [], [], timeout)[0])


def _create(path: str) -> Any:
    """Open a file anew, for its owner alone, and make its directory if that is missing, but none
    above that: who has deleted a whole project does not want it back."""
    for is_last in (False, False, True):
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o700)
        try:
            return open(path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600))
        except FileNotFoundError:  # somebody who leaves has just removed the directory
            if is_last:
                raise
    return None


def _extend(file: Any, size: int) -> None:
    """Let a file be longer, on the disk too: to touch a mapped page without one ends a process."""
    file.seek(0, os.SEEK_END)
    file.write(bytes(size))
    file.flush()


def _mapped(path: str, size: int = 0) -> Any:
    """Map a file, made anew if a size is given."""
    if size:  # others shall not see it without its size
        try:
            with _create(path + ".new") as file:
                _extend(file, size)
            os.rename(path + ".new", path)
        except OSError as exc:  # the disk is full, or the directory a file
            _unlink(path + ".new")
            raise OperationalError(f"cannot make {path}: {exc}") from None
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _unlink(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _paths(folder: str, *suffixes: str) -> list[str]:
    """Return the files in a directory with one of these endings; none if it is not there."""
    names = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    return [os.path.join(folder, name) for name in names if name.endswith(suffixes)]


#: Flags beside the ticket of a task that has begun: what to do with it if its process dies.
#: DECODING, which is the second without the first: its message is still being read.
ACKS_LATE, REJECT_ON_LOST, DECODING = 1, 2, 2

_RECORD = struct.Struct("QQ")  # ticket, bytes of the outcome that follows; 0: it has its own file


class Slot:
    """The part of a Journal that one child process (or thread) writes: what it has begun, and a
    ring of the outcomes that the main process has not settled yet. Each step is made by one aligned
    8-byte store, so whoever reads it after a crash sees the state before it or after it. An outcome
    that is too large has its own file, OWNER.journal.TICKET."""

    HEAD = 64
    SIZE = 2**16
    TIMES = struct.Struct("3d")

    #: The ticket and flags of what runs; ticket 0 is nothing.
    begun = property(lambda slot: divmod(slot._words[0], 4))
    #: When it began, and its soft and hard deadline (0: none).
    times = property(lambda slot: slot.TIMES.unpack_from(slot._head, 8))
    executed = property(lambda slot: slot._words[6])  # how many tasks this process has finished
    #: The ticket of a task that is to be interrupted, as by its soft time limit.
    interrupted = property(
        lambda slot: slot._words[7], lambda slot, ticket: slot._words.__setitem__(7, ticket)
    )
    #: Whether there are outcomes that `read` would return.
    fresh = property(lambda slot: slot._words[4] != slot._words[5])
    #: Whether `finish` would not have to wait.
    has_room = property(lambda slot: slot._words[4] - slot._words[5] < len(slot._ring) // 2 - 16)

    def __init__(self, index: int, view: memoryview, path: str) -> None:
        self.index = index
        self.pid = 0  # of the process that writes it, as its parent knows it; 0: this one
        self._path = path
        self._head = view[: self.HEAD]
        # 0 begun, 1-3 times, 4 written, 5 consumed, 6 executed, 7 interrupted
        self._words = self._head.cast("Q")
        self._ring = view[self.HEAD :]
        self._spilled: list[str] = []
        self._end = 0  # where the last `read` ended

    def clear(self) -> None:
        """Make the slot ready for a new process."""
        self._head[:] = bytes(self.HEAD)
        self._end = 0

    def begin(self, ticket: int, flags: int, soft: float = 0.0, hard: float = 0.0) -> None:
        """Note that a task begins now; deadlines are by time.monotonic(), or 0."""
        self.TIMES.pack_into(self._head, 8, time.monotonic(), soft, hard)
        self._words[0] = ticket << 2 | flags

    def finish(self, ticket: int, outcome: bytes, wake: Callable[[], Any]) -> None:
        """Note how a task ended; waits, waking the main process, while the ring is full."""
        size = len(self._ring)
        if len(outcome) > size // 2:
            with _create(f"{self._path}.{ticket}") as file:
                file.write(outcome)
            outcome = b""
        record = _RECORD.pack(ticket, len(outcome)) + outcome
        while self._words[4] + len(record) - self._words[5] > size:
            wake()
            time.sleep(0.001)
        at = self._words[4] % size
        head = record[: size - at]
        self._ring[at : at + len(head)] = head
        self._ring[: len(record) - len(head)] = record[len(head) :]
        self._words[6] += 1
        self._words[4] += len(record)
        self._words[0] = 0

    def read(self) -> list[tuple[int, Outcome]]:
        """Return the unsettled (ticket, outcome) pairs; `consume` forgets them."""
        at, self._end = self._words[5], self._words[4]
        found = []
        while at < self._end:
            ticket, length = _RECORD.unpack(self._bytes(at, _RECORD.size))
            at += _RECORD.size + length
            text = self._bytes(at - length, length)
            if not length:  # it has its own file, unless somebody has deleted that
                self._spilled.append(f"{self._path}.{ticket}")
                with contextlib.suppress(FileNotFoundError), open(self._spilled[-1], "rb") as file:
                    text = file.read()
            found.append((ticket, Outcome(*json.loads(text)) if text else _GIVE_BACK))
        return found

    def consume(self) -> None:
        """Forget the outcomes that were read: they are settled."""
        self._words[5] = self._end
        while self._spilled:
            _unlink(self._spilled.pop())

    def _bytes(self, at: int, length: int) -> bytes:
        at %= len(self._ring)
        head = bytes(self._ring[at : at + length])
        return head + bytes(self._ring[: length - len(head)])


class Journal:
    """A worker's memory-mapped record of what its processes have begun and finished. It survives
    SIGKILL, and costs no system call to write. The main process and each child hold a lock on one
    byte of it, which the kernel drops with the process: a journal that can be locked whole has no
    live owner left, and whoever locked it recovers its claims."""

    HEAD = 2**16  # what follows can be mapped by itself
    #: Those of this process: opening and closing one again would drop its locks.
    own: dict[str, int] = {}

    def __init__(self, path: str, info: dict[str, Any] | None = None) -> None:
        """Make and lock a journal for `info`, a dict of the worker's `node` and its number of
        `slots` at first; or open one, ValueError if it is none, or is only being made."""
        self.path = path
        #: The number under which the worker claims messages.
        self.owner = int(os.path.basename(path).split(".")[0], 16)
        if info is not None:
            self.own[path] = os.getpid()
        self.map = _mapped(path, self.HEAD if info else 0)
        self._file: Any = open(path, "r+b")
        if info is not None:
            self.lock(-1)
            head = json.dumps({**info, "pid": os.getpid()}).encode() + b"\n"
            self.map[: len(head)] = head
        self.info: dict[str, Any] = json.loads(self.map[: self.HEAD].partition(b"\n")[0])
        self.slots: list[Slot] = []
        self.grow(info["slots"] if info else (len(self.map) - self.HEAD) // Slot.SIZE)

    def grow(self, count: int) -> None:
        """Have at least `count` slots; processes that are started from now on see the new ones."""
        start, size = len(self.slots), (count - len(self.slots)) * Slot.SIZE
        if size > 0:
            at, fd = self.HEAD + start * Slot.SIZE, self._file.fileno()
            if os.fstat(fd).st_size < at + size:  # it is ours: others read what is there
                _extend(self._file, at + size - os.fstat(fd).st_size)
            view = memoryview(mmap.mmap(fd, size, offset=at))
            parts = (view[at : at + Slot.SIZE] for at in range(0, size, Slot.SIZE))
            self.slots += [Slot(i, part, self.path) for i, part in enumerate(parts, start)]

    #: Whether task events are sent; children see at once that it is changed.
    events = property(
        lambda journal: bool(journal.map[journal.HEAD - 1]),
        lambda journal, on: journal.map.__setitem__(journal.HEAD - 1, on),
    )

    @classmethod
    def others(cls, folder: str) -> Iterator[Journal]:
        """Open each journal of other processes in a run directory, and close it again."""
        for path in _paths(folder, ".journal"):
            if cls.own.get(path) != os.getpid():
                gone = contextlib.suppress(OSError, ValueError)
                with gone, contextlib.closing(cls(path)) as journal:
                    yield journal

    def lock(self, index: int) -> None:
        """Lock this process's byte: that of child `index`, or -1 for the main process."""
        self.own[self.path] = os.getpid()
        if fcntl:
            fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index + 1)

    def lock_whole(self) -> bool:
        """Try to become the one who recovers a dead worker's claims."""
        if fcntl is None:  # no locks: see `touch`
            return time.time() - os.stat(self.path).st_mtime > 15
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def touch(self) -> None:
        """Show others that the worker lives; it calls this every second."""
        if not os.path.exists(self.path):  # somebody has deleted it
            copy = _mapped(self.path, self.HEAD)
            self._file.close()
            self._file = open(self.path, "r+b")
            self.lock(-1)  # before others can read it
            copy[:] = self.map[: self.HEAD]
        if not fcntl:
            os.utime(self.path)

    def ends(self) -> dict[int, Any]:
        """Return {ticket: its Outcome, or the flags of a task that has begun}."""
        begun: dict[int, Any] = dict(slot.begun for slot in self.slots)
        return {**begun, **dict(pair for slot in self.slots for pair in slot.read())}

    def close(self, remove: bool = False) -> None:
        """Let go of the journal, and with `remove` delete its files."""
        if not self._file.closed:
            if remove:
                folder = os.path.dirname(self.path)
                _unlink(*(path for path in _paths(folder, "") if path.startswith(self.path)))
                with contextlib.suppress(OSError):  # there are others
                    os.rmdir(folder)
            self._file.close()
            self.own.pop(self.path, None)


_HEAD = re.compile(rb'"task": ?"([^"\\]+)", ?"id": ?"([^"\\]+)"')


class Claim(collections.namedtuple("Claim", "key ticket queue priority raw")):
    """A message that a worker holds: `key` is the store's, `ticket` the worker's number for it."""

    @functools.cached_property
    def message(self) -> Message:
        """The message, parsed when first asked for; MalformedMessage if it is none."""
        return Message.decode(self.raw)

    @functools.cached_property
    def head(self) -> tuple[str, str]:
        """The name and the id of its task, found without parsing; both empty if it names none."""
        match = _HEAD.search(self.raw)
        if match:
            return match[1].decode(errors="replace"), match[2].decode(errors="replace")
        with contextlib.suppress(MalformedMessage):
            return self.message.headers["task"], self.message.headers["id"]
        return "", ""


_GIVE_BACK = Outcome("requeue", [], [], None, 0.0)  # what becomes of a claim that has not begun

if TYPE_CHECKING:
    Rows = Sequence[Sequence[Any]]
    Settled = Sequence[tuple[Claim, Outcome]]
    #: Makes the outcome of a task whose process died, from its claim and the flags of its slot.
    Lost = Callable[[Claim, int], Outcome]

StaleClaim = _error("StaleClaim", "A claim to settle is no longer its worker's.", Exception)


def _brings(kind: str, key: str, routing_key: str) -> bool:
    """Return whether an exchange of this kind brings what has a routing key to a queue that is
    bound by `key`; in that of a topic * stands for one word and # for any number."""
    if kind != "topic":
        return kind == "fanout" or key == routing_key
    words = {"*": r"[^.]*\.", "#": r"([^.]*\.)*"}
    pattern = "".join(words.get(word, re.escape(word + ".")) for word in key.split("."))
    return bool(re.fullmatch(pattern, routing_key + "."))


# mypy: disable-error-code=empty-body
class Store:
    """What a broker that also keeps results must do. Nothing above knows SQL, nothing below tasks.

    A message is in a queue, or claimed by one owner (a worker's number), or gone. `settle` is
    atomic: results, follow-up messages and acknowledgements of a batch are all there afterwards, or
    none. Every method raises OperationalError where the store cannot be reached.

    A chord is a counter: a delivery that is published when a number of parts have ended. Its rows,
    in `chords`, are (chord, number, delivery) to make one; with None to let it wait for so many
    parts more, which is all that counts again when it is said again; with number 0 when it is over.
    Those in `parts` are (chord, index, task id, delivery): this part has ended."""

    #: Whether other programs publish here too; `parts` then bring deliveries, for their chords.
    foreign = False
    shared = True  # whether other processes can use it
    uri: str  # the address as the banner prints it
    folder: str  # the run directory
    bells: Bells
    chord_expires = 30 * 86400  # seconds after which a chord whose parts do not end is forgotten

    _turn = 0

    def _in_turn(self, queues: Sequence[str]) -> list[str]:
        """Return queues, each time with another one first."""
        self._turn = (self._turn + 1) % max(len(queues), 1)
        return [*queues[self._turn :], *queues[: self._turn]]

    def publish(self, deliveries: Rows, chords: Rows = (), run: Any = None) -> bool:
        """Put messages into their queues, and apply `chords`, all or none; wake workers. run: the
        (name, before, now) of a periodic task that sends them. Unless its last run was at `before`
        (None: there was none) somebody else has: nothing is done; returns False."""

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Return whether there is something to claim, and when the next message with an ETA is due
        (seconds since the epoch, or None); cheap, and takes no lock."""

    def settle(self, owner: Any, settled: Settled, queues: Any = (), limit: int = 0) -> list[Claim]:
        """Apply the outcomes of claims, then claim up to `limit` messages from `queues`, which have
        their turn; in them the smallest priority number and the oldest come first. With None as the
        owner the messages are those of `scheduled`, which nobody has claimed. StaleClaim, and
        nothing is applied, if one of the claims is not this owner's any more."""

    def begun(self, claims: Sequence[Claim]) -> None:
        """Note that these have begun and must not run again; only asked of a foreign store."""

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any]) -> int:
        """Settle the claims of dead workers, whose journal nobody holds; return how many."""
        count = 0
        for journal in Journal.others(self.folder):
            if journal.lock_whole():
                count += self.recover_owner(journal.owner, journal.ends(), lost, settle)
                journal.close(remove=True)
        return count

    def recover_owner(self, owner: int, ends: dict[int, Any], lost: Any, settle: Any) -> int:
        """Settle a dead worker's claims by its journal's `ends`, or give them back; count them."""
        settled = []
        for claim in self.claims_of(owner):
            end = ends.get(claim.ticket, _GIVE_BACK)
            settled.append((claim, lost(claim, end) if isinstance(end, int) else end))
        if settled:
            settle(owner, settled)
        return len(settled)

    def claims_of(self, owner: int) -> list[Claim]:
        """Return what a worker has claimed."""

    def put_results(self, results: Rows, parts: Rows = ()) -> list[Delivery]:
        """Store rows, [task id, state, meta text, seconds to keep it or None], and wake who waits
        for them; count `parts`. Returns the deliveries of the chords that are complete, to be
        published in the store of the messages: again, if it is called before they are over."""

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return {id: (state, meta text)} for those ids that have a result."""

    def chord_parts(self, chord: str) -> list[str]:
        """Return the task ids of the parts that have ended, in the order of their index."""

    def forget(self, ids: Sequence[str]) -> None:
        """Delete results."""

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Remember that `exchange` brings messages with `routing_key` to `queue`."""

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        """Return the (kind, routing key, queue) bindings of an exchange."""

    def bound(self, exchange: str, routing_key: str) -> list[str]:
        """Return the queues that an exchange brings messages with this routing key to."""
        rows = self.bindings(exchange)
        return list(dict.fromkeys(row[2] for row in rows if _brings(row[0], row[1], routing_key)))

    def fan_out(self, kind: str, exchange: str, posts: Rows) -> int:
        """Post commands ('fanout'), replies ('direct') or events ('topic'), in rows of routing key
        and text, to all who are subscribed now; return how many these are, at most."""

    def subscribe(self, kind: str, exchange: str, key: str, queue: str, bell: Bell) -> Inbox:
        """Return an Inbox, called `queue`, for what is posted by routing keys like `key` from when
        `bell` listens to its `topics` on. `read()` returns the texts that have come since, and does
        not wait; `close()` deletes what the store keeps for it."""

    @contextlib.contextmanager
    def listening(self, kind: str, exchange: str, key: str, queue: str) -> Iterator[Any]:
        """Subscribe for a while; gives a function that waits so many seconds for texts."""
        bell = self.bells.open()
        inbox = self.subscribe(kind, exchange, key, queue, bell)

        def read(seconds: float) -> list[str]:
            bell.doze(hears=True)
            return inbox.read() or (inbox.read() if bell.wait(seconds) else [])

        try:
            bell.listen(inbox.topics)
            yield read
        finally:
            with contextlib.suppress(OperationalError):
                inbox.close()
            self.bells.close(bell)

    def revoke(self, ids: Iterable[str], seconds: float) -> None:
        """Remember for so long that tasks are revoked, where the store can: not on Redis."""

    def revoked(self) -> dict[str, float]:
        """Return {id: until when, in seconds since the epoch} of what `revoke` remembers."""
        return {}

    def scheduled(self, queues: Sequence[str]) -> list[Claim]:
        """Return the next 1,000 messages that wait for their ETA; they are not claimed."""

    def due_runs(self) -> dict[str, tuple[float, int]]:
        """Return {name: (last run in seconds since the epoch, their number)} of periodic tasks."""

    def leave(self, owner: int) -> None:
        """Note that a worker has come to its end."""

    def purge(self, queue: str) -> int:
        """Delete the messages that wait in a queue, due or not; return how many."""

    def sweep(self) -> None:
        """Remove expired results and dead processes' files; called now and then."""
        self.bells.sweep()

    def close(self) -> None:
        """Let go of connections, and of files that are not in use; the store opens them again."""

    def wait(
        self, ids: Sequence[str], timeout: float | None, interval: float = 0.5,
        on_tick: Any = None, on_state: Any = None,
    ) -> Iterator[dict[str, tuple[str, str]]]:  # fmt: skip
        """Yield {id: (state, meta text)} of ids that have their end, as they come, until all have.
        Raises TimeoutError when `timeout` seconds have passed; calls `on_tick` every `interval`
        seconds, and `on_state` with each meta text that it sees and is new. It looks for the first
        200 that are missing: for all, n results take n² looks."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        missing: dict[str, str | None] = dict.fromkeys(ids)
        bell = None
        with contextlib.ExitStack() as stack:
            while missing:
                if bell is not None:
                    bell.doze(hears=True)
                window = self.get_results(list(itertools.islice(missing, 200)))
                for id, (_, text) in window.items() if on_state else ():
                    if text != missing[id]:
                        missing[id] = text
                        on_state(text)
                found = {id: pair for id, pair in window.items() if pair[0] in READY_STATES}
                for id in found:
                    del missing[id]
                if found:
                    yield found
                elif bell is None:  # only now: most results of a long wait are there already
                    bell = self.bells.open()
                    stack.callback(self.bells.close, bell)
                    bell.listen(f"r:{id}" for id in missing)
                elif time.monotonic() >= deadline:
                    raise TimeoutError("The operation timed out.")
                else:
                    bell.wait(min(deadline - time.monotonic(), interval))
                    if on_tick is not None:
                        on_tick()


#: "taskq" in the header of a database, so that no other program's file is taken for one.
_APPLICATION_ID = 0x7461736B
_SCHEMA_VERSION = 2
_FREE = "owner IS NULL AND due IS NULL"
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    due REAL,         -- seconds since the epoch; NULL: now
    owner INTEGER,    -- the worker that has claimed it
    ticket INTEGER,   -- that worker's number for it
    message TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_ready ON messages (queue, priority, id) WHERE {_FREE};
CREATE INDEX IF NOT EXISTS messages_due ON messages (due) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_claimed ON messages (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS results (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, meta TEXT NOT NULL, expires REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS results_expires ON results (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS rejected (
    id INTEGER PRIMARY KEY, queue TEXT, rejected_at REAL, reason TEXT, message TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS chords (
    id TEXT PRIMARY KEY, missing INTEGER NOT NULL,  -- missing: parts that have not ended
    queue TEXT, priority INTEGER, due REAL, message TEXT NOT NULL, expires REAL
);
CREATE TABLE IF NOT EXISTS chord_parts (
    chord TEXT, part TEXT, place INTEGER NOT NULL, PRIMARY KEY (chord, part)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS chords_over AFTER DELETE ON chords
    BEGIN DELETE FROM chord_parts WHERE chord = old.id; END;
CREATE TABLE IF NOT EXISTS bindings (
    exchange TEXT, kind TEXT, routing_key TEXT, queue TEXT,
    PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS posts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, exchange TEXT, routing_key TEXT, expires REAL, post TEXT
);
CREATE INDEX IF NOT EXISTS posts_of ON posts (exchange);
CREATE TABLE IF NOT EXISTS revoked (id TEXT PRIMARY KEY, expires REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (name TEXT PRIMARY KEY, last REAL, count INTEGER) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION};
COMMIT"""

_INSERT = "INSERT INTO messages (queue, priority, due, message) VALUES (?, ?, ?, ?)"
_DUE = "SELECT id FROM messages WHERE due <= ? LIMIT 1000"
_PROMOTE = f"UPDATE messages SET due = NULL WHERE id IN ({_DUE})"
# Messages are read and written as bytes, whatever is in them.
_FROM = "queue, priority, CAST(message AS BLOB) FROM messages WHERE"
_READY = f"SELECT id, {_FROM} {_FREE} AND queue = ? ORDER BY priority, id LIMIT ?"
_CLAIMED = f"SELECT id, ticket, {_FROM} owner = ?"
_CLAIM = "UPDATE messages SET owner = ?, ticket = ? WHERE id = ?"
_REQUEUE = "UPDATE messages SET owner = NULL, message = CAST(? AS TEXT) WHERE id = ? AND owner = ?"
_REJECT = "INSERT INTO rejected VALUES (NULL, ?, ?, CAST(? AS TEXT), CAST(? AS TEXT))"
_RESULTS = "SELECT id, state, meta FROM results WHERE (expires IS NULL OR expires > ?)"
_COUNT = "UPDATE chords SET missing = missing + ? WHERE id = ? AND missing > 0"
_PART = "INSERT OR IGNORE INTO chord_parts SELECT id, ?, ? FROM chords WHERE id = ?"
_COMPLETE = "SELECT queue, priority, due, message FROM chords WHERE id = ? AND missing <= 0"
# The id of a post grows by its length, so that the last 20 MB can be kept.
_LAST_POST = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'posts'"
_POST = f"INSERT INTO posts VALUES (({_LAST_POST}) + ? + 100, ?, ?, ?, ?)"
_POSTED = "SELECT id, routing_key, post FROM posts WHERE exchange = ? AND id > ? ORDER BY id"
_TRIM = f"DELETE FROM posts WHERE id <= ({_LAST_POST}) - 20000000"
_FIRST_RUN = "INSERT OR IGNORE INTO runs VALUES (:name, :now, 1)"
_RUN = "UPDATE runs SET last = :now, count = count + 1 WHERE name = :name AND last = :before"

#: What one subscriber gets: see `Store.subscribe`.
Inbox = collections.namedtuple("Inbox", "topics read close", defaults=[lambda: None])


class SQLiteStore(Store):
    """A store in one SQLite file, in WAL mode; or in memory, without a path.

    Every write is one BEGIN IMMEDIATE transaction. A message with an ETA has a `due` time until it
    is due; what can be claimed is then a range of one partial index, however many rows there are.

    A process has one connection, opened when first needed, also after a fork. `with store as
    connection:` lends it to a thread, ends the transaction, and turns SQLite's errors into
    OperationalError (ValueError for a value that it cannot hold). Never open the file by other
    means: closing any descriptor of it drops the locks that SQLite has for the whole process."""

    #: What the options of the address may be.
    OPTIONS = {"timeout": r"\d+(\.\d*)?", "synchronous": "off|normal|full|extra"}

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        scheme, _, place = url.partition("?")[0].partition("://")
        if scheme == "sqlite" and not place.startswith("/"):
            why = "write sqlite:///relative.db or sqlite:////absolute/path.db"
            raise ImproperlyConfigured(f"{url!r}: {why}")
        # The real path: two names of one file must not make two run directories.
        self.path = os.path.realpath(place[1:]) if scheme == "sqlite" and place[1:] else None
        self.shared = self.path is not None
        self.uri = "memory://" if self.path is None else "sqlite:///" + self.path
        self.folder = (self.path or _symbol("tempfile:mktemp")("", "taskq-")) + "-run"
        self.bells = Bells(self.folder)
        for name, value in options.items():
            if not re.fullmatch(self.OPTIONS.get(name, "(?!)"), str(value).lower()):
                why = "expected timeout=SECONDS, or synchronous=off, normal, full or extra"
                raise ImproperlyConfigured(f"option {name}={value!r} of sqlite://: {why}")
        self._timeout = float(options.get("timeout", 30))
        self._synchronous = options.get("synchronous", "normal")
        self._tickets = itertools.count(1)
        self._open: list[sqlite3.Connection] = []  # one, or none
        self._stat: Any = None  # of the file that it has open
        self._checked = 0.0  # when it was last seen to be the one at this path
        weakref.finalize(self, _close_all, self._open)  # also at the end of the process

    # -- the connection ------------------------------------------------------------------------
    def __enter__(self) -> sqlite3.Connection:
        if not _lock.acquire(timeout=self._timeout):
            raise OperationalError(f"database {self.path}: database is locked")
        try:
            if self._open and time.monotonic() - self._checked > 1.0:
                self._checked = time.monotonic()
                if self._is_elsewhere():
                    _close_all(self._open)
            return self._open[0] if self._open else self._connect()
        except BaseException:
            _close_all(self._open)
            _lock.release()
            raise

    def __exit__(self, kind: Any, exc: Any, traceback: Any) -> None:
        connection = self._open[0]
        try:
            if exc is None and connection.in_transaction:
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            exc = error
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            _lock.release()
        if isinstance(exc, sqlite3.Error):
            is_about_store = type(exc) in (sqlite3.OperationalError, sqlite3.DatabaseError)
            error_type = OperationalError if is_about_store else ValueError
            raise error_type(f"database {self.path}: {exc}") from None

    def _is_elsewhere(self) -> bool:
        """Return whether the file that is open has been deleted, moved or replaced: what is written
        to it nobody else would see."""
        with contextlib.suppress(OSError):
            return self.path is not None and not os.path.samestat(os.stat(self.path), self._stat)
        return True

    def _connect(self) -> sqlite3.Connection:
        path, until = self.path, time.monotonic() + self._timeout
        if path and os.path.isdir(path):
            raise OperationalError(f"{path} is a directory: expected an SQLite file")
        try:
            if path:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            options: Any = {"isolation_level": None, "check_same_thread": False}
            connection = sqlite3.connect(path or ":memory:", timeout=self._timeout, **options)
            self._open.append(connection)
            while True:
                try:
                    self._prepare(connection)
                    self._stat = path and os.stat(path)
                    return connection
                except sqlite3.OperationalError as exc:
                    # SQLite itself does not wait while another process turns a new file to WAL.
                    if "locked" not in str(exc) or time.monotonic() > until:
                        raise
                    time.sleep(0.01)
        except (OSError, sqlite3.Error) as exc:
            why = getattr(exc, "strerror", None) or str(exc)
            if isinstance(exc, (OSError, sqlite3.OperationalError)):
                why += "; taskq needs to write the file and its directory"
            raise OperationalError(f"cannot open the database {path}: {why}") from None

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables, unless they are there; OperationalError in another program's file."""
        execute, why = connection.execute, ""
        application, version, tables = execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if (tables or version) and application != _APPLICATION_ID:
            why = "is the database of another program: give taskq a file of its own"
        elif tables and version != _SCHEMA_VERSION:
            why = f"has schema version {version}, this taskq ({__version__}) works with "
            why += f"{_SCHEMA_VERSION}: use one version of taskq on a file"
        if why:
            raise OperationalError(f"{self.path} {why}")
        execute("PRAGMA journal_mode=WAL")
        # A checkpoint waits for the disk, so most are left to `sweep`. In pages: 40 MB.
        execute("PRAGMA wal_autocheckpoint=10000")
        execute(f"PRAGMA synchronous={self._synchronous}")
        if not tables:
            connection.executescript(_SCHEMA)

    def _execute(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of one statement, which is its own transaction."""
        with self as connection:
            return connection.execute(sql, arguments).fetchall()

    def _write(self, sql: str, rows: Rows) -> int:
        """Run a statement for each row, in one transaction; return how many rows it has changed."""
        with self as connection:
            connection.execute("BEGIN IMMEDIATE")
            return connection.executemany(sql, rows).rowcount

    def close(self) -> None:
        self.bells.clear()
        if self.path is not None:
            with _lock:
                _close_all(self._open)

    # -- messages ------------------------------------------------------------------------------
    def publish(self, deliveries: Rows, chords: Rows = (), run: Any = None) -> bool:
        with self as connection:
            if len(deliveries) > 1 or chords or run:
                connection.execute("BEGIN IMMEDIATE")
                if run:
                    name, before, now = run
                    sql = _FIRST_RUN if before is None else _RUN
                    values = {"name": name, "before": before, "now": now}
                    if not connection.execute(sql, values).rowcount:
                        return False
                self._change_chords(connection, chords)
            connection.executemany(_INSERT, deliveries)
        self.bells.ring(delivery[0] for delivery in deliveries)
        return True

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Probe the index of each queue, and that of due times, with one query."""
        marks = ",".join("?" * len(queues))
        waiting = f"SELECT 1 FROM messages WHERE {_FREE} AND queue IN ({marks})"
        due = "SELECT min(due) FROM messages WHERE due IS NOT NULL"
        ready, next_due = self._execute(f"SELECT EXISTS ({waiting}), ({due})", queues)[0]
        return bool(ready) or next_due is not None and next_due <= time.time(), next_due

    def settle(self, owner: Any, settled: Settled, queues: Any = (), limit: int = 0) -> list[Claim]:
        """Settle and claim in one transaction, then ring whoever waits for what it brought."""
        claims: list[Claim] = []
        outcomes = [outcome for _, outcome in settled]
        with self as connection:
            connection.execute("BEGIN IMMEDIATE")
            self._acknowledge(connection, owner, settled)
            self._change_chords(connection, [row for each in outcomes for row in each.chords])
            results = [row for each in outcomes for row in each.results]
            parts = [part for each in outcomes for part in each.parts]
            published = [delivery for each in outcomes for delivery in each.publish]
            published += self._end_parts(connection, results, parts)
            connection.executemany(_INSERT, published)
            if limit:
                connection.execute(_PROMOTE, (time.time(),))
                rows = self._ready(connection, queues, limit)
                claims += [Claim(key, next(self._tickets), *rest) for key, *rest in rows]
                connection.executemany(_CLAIM, [(owner, each.ticket, each.key) for each in claims])
        given = {delivery[0] for delivery in published}
        given.update(claim.queue for claim, outcome in settled if outcome.verb == "requeue")
        if limit and len(claims) == limit:  # there may be more than this worker takes
            given.update(queues)
        self.bells.ring(given, [result[0] for result in results])
        return claims

    def _acknowledge(self, connection: sqlite3.Connection, owner: int, settled: Settled) -> None:
        """Delete claims or put them back; keep what is rejected."""
        gone, back = [], []
        for claim, outcome in settled:
            if outcome.verb == "requeue":
                back.append((outcome.reason or claim.raw, claim.key, owner))
            else:
                gone.append((claim.key, owner))
            if outcome.verb == "reject":
                reason = str(outcome.reason).encode("utf-8", "backslashreplace")
                connection.execute(_REJECT, (claim.queue, time.time(), reason, claim.raw))
        before = connection.total_changes
        connection.executemany("DELETE FROM messages WHERE id = ? AND owner IS ?", gone)
        connection.executemany(_REQUEUE, back)
        if connection.total_changes - before < len(settled):
            raise StaleClaim("another worker has taken over some of them")

    def _ready(self, connection: sqlite3.Connection, queues: Sequence[str], limit: int) -> Any:
        """Return rows to claim: from each queue in turn while it has any, by priority."""
        cursors = [connection.execute(_READY, (name, limit)) for name in self._in_turn(queues)]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*cursors))
        return sorted(itertools.islice(filter(None, turns), limit), key=lambda row: row[2])

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any]) -> int:
        """Recover also claims without a journal: somebody has deleted it."""
        count = super().recover(lost, settle)
        for (owner,) in self._execute("SELECT DISTINCT owner FROM messages WHERE owner > 0"):
            if not os.path.exists(f"{self.folder}/{owner:x}.journal"):
                count += self.recover_owner(owner, {}, lost, settle)
        return count

    def claims_of(self, owner: int) -> list[Claim]:
        return list(itertools.starmap(Claim, self._execute(_CLAIMED, (owner,))))

    def purge(self, queue: str) -> int:
        return self._write("DELETE FROM messages WHERE queue = ? AND owner IS NULL", [(queue,)])

    # -- results and chords ----------------------------------------------------------------------
    def put_results(self, results: Rows, parts: Rows = ()) -> list[Delivery]:
        with self as connection:
            connection.execute("BEGIN IMMEDIATE")
            complete = self._end_parts(connection, results, parts, again=True)
        self.bells.ring((), [row[0] for row in results])
        return complete

    def _end_parts(self, connection: Any, results: Rows, parts: Rows, again: bool = False) -> Any:
        """Store results, count parts; return what they complete, or with `again` had completed."""
        now = time.time()
        dated = [(*row, now + seconds if seconds else None) for *row, seconds in results]
        connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", dated)
        rows: dict[str, list[Any]] = collections.defaultdict(list)
        for chord, index, id, _ in parts:
            rows[chord].append((id, index, chord))
        complete: list[Delivery] = []
        for chord, some in rows.items():
            counted = connection.executemany(_PART, some).rowcount
            if connection.execute(_COUNT, (-counted, chord)).rowcount or again:
                complete += map(Delivery._make, connection.execute(_COMPLETE, (chord,)))
        return complete

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            marks = ",".join("?" * len(some))
            rows = self._execute(f"{_RESULTS} AND id IN ({marks})", (time.time(), *some))
            found.update((id, (state, meta)) for id, state, meta in rows)
        return found

    def forget(self, ids: Sequence[str]) -> None:
        self._write("DELETE FROM results WHERE id = ?", [(id,) for id in ids])

    def _change_chords(self, connection: sqlite3.Connection, chords: Rows) -> None:
        """Apply rows of `chords`; one that is made anew starts anew."""
        expires = time.time() + self.chord_expires
        over = [(id,) for id, number, what in chords if what or not number]
        made = [(id, number, *what, expires) for id, number, what in chords if what]
        grown = [(number, id) for id, number, what in chords if not what]
        connection.executemany("DELETE FROM chords WHERE id = ?", over)
        connection.executemany("INSERT INTO chords VALUES (?, ?, ?, ?, ?, ?, ?)", made)
        connection.executemany(_COUNT, grown)

    def chord_parts(self, chord: str) -> list[str]:
        sql = "SELECT part FROM chord_parts WHERE chord = ? ORDER BY place"
        return [part for (part,) in self._execute(sql, (chord,))]

    # -- bindings and housekeeping ---------------------------------------------------------------
    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        row = (exchange, kind, routing_key, queue)
        self._execute("INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?)", row)

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        sql = "SELECT kind, routing_key, queue FROM bindings WHERE exchange = ?"
        return self._execute(sql, (exchange,))

    # -- posts, revokes and periodic tasks --------------------------------------------------------
    def fan_out(self, kind: str, exchange: str, posts: Rows) -> int:
        """Write posts once for all, if anybody listens; each Inbox knows how far it has read."""
        topic, expires = f"e:{exchange}", time.time() + 300
        bells, all_known = self.bells.listeners(topic), hasattr(os, "mkfifo")
        if bells or not all_known:
            with self as connection:
                connection.execute("BEGIN IMMEDIATE")
                rows = [(len(text), exchange, key, expires, text) for key, text in posts]
                connection.executemany(_POST, rows)
                connection.execute(_TRIM)  # a reader that is slow misses some
        for bell in bells:
            bell.post(topic)
        return len(bells) if all_known else 10**6

    def subscribe(self, kind: str, exchange: str, key: str, queue: str, bell: Bell) -> Inbox:
        topic = f"e:{exchange}"
        seen: int = self._execute(_LAST_POST)[0][0]

        def read() -> list[str]:
            nonlocal seen
            rows = self._execute(_POSTED, (exchange, seen)) if bell.has_post(topic) else ()
            seen = rows[-1][0] if rows else seen
            return [text for _, sent_by, text in rows if _brings(kind, key, sent_by)]

        if kind != "direct":
            return Inbox([topic], read)
        sql = "DELETE FROM posts WHERE exchange = ? AND routing_key = ?"
        return Inbox([topic], read, functools.partial(self._execute, sql, (exchange, key)))

    def revoke(self, ids: Iterable[str], seconds: float) -> None:
        until = time.time() + seconds
        self._write("INSERT OR REPLACE INTO revoked VALUES (?, ?)", [(id, until) for id in ids])

    def revoked(self) -> dict[str, float]:
        return dict(self._execute("SELECT * FROM revoked WHERE expires > ?", (time.time(),)))

    def scheduled(self, queues: Sequence[str]) -> list[Claim]:
        marks = ",".join("?" * len(queues))
        where = f"due IS NOT NULL AND queue IN ({marks}) ORDER BY due LIMIT 1000"
        rows = self._execute(f"SELECT id, 0, {_FROM} {where}", queues)
        return list(itertools.starmap(Claim, rows))

    def due_runs(self) -> dict[str, tuple[float, int]]:
        return {name: (last, count) for name, last, count in self._execute("SELECT * FROM runs")}

    def sweep(self) -> None:
        """Delete 500 expired rows at a time, so that no transaction is long; checkpoint."""
        for table in ("results", "chords", "posts", "revoked"):
            some = f"SELECT id FROM {table} WHERE expires < ? LIMIT 500"
            while self._write(f"DELETE FROM {table} WHERE id IN ({some})", [(time.time(),)]):
                pass
        self._execute("PRAGMA wal_checkpoint(PASSIVE)")
        super().sweep()


def _close_all(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


#: Held by a thread while it uses SQLite or makes a store, so that none does when another forks.
_lock = threading.RLock()
_stores: dict[tuple[str, str], Store] = {}


def _before_fork() -> None:
    """Close the connections: with an inherited one a child would believe in its parent's locks."""
    _lock.acquire()
    for store in _stores.values():
        store.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_lock.release)
    os.register_at_fork(after_in_child=_lock.release)


def open_store(url: str, options: dict[str, Any]) -> Store:
    """Return the store at an address, the same for all apps; its query may hold more options."""
    kinds: dict[str, Any] = dict.fromkeys(RedisStore.SCHEMES, RedisStore)
    kinds.update(sqlite=SQLiteStore, memory=SQLiteStore)
    scheme, separator, rest = url.partition("://")
    is_known = separator and scheme in kinds
    if not is_known or "://" in rest:
        what = "second address to fall back on" if is_known else repr(scheme)
        why = f"taskq has no {what}; use sqlite:// (a file) or redis://"
        raise ImproperlyConfigured(f"{_mask_url(url)!r}: {why}")
    query = _symbol("urllib.parse:parse_qsl")(rest.partition("?")[2], keep_blank_values=True)
    options = {**options, **dict(query)}
    key = (url, _json_encode(options))
    with _lock:
        if key not in _stores:
            _stores[key] = kinds[scheme](url, options)
        return _stores[key]


# -- Redis -----------------------------------------------------------------------------------------
#
# Keys and messages are those of kombu's Redis transport and Celery's Redis results, to the byte, so
# that Celery's workers and clients can share them. A claimed message lies in the hash `unacked`,
# its time in `unacked_index`, by a tag that names its owner: OWNER:TICKET. Without a time nobody
# restores it: so lie tasks that have begun and do not run again, and messages that are no JSON.
# Keys of our own:
#
#   taskq.workers    sorted set of workers by the time of their last heartbeat
#   taskq.owner.N    first ticket of this owner that the server knows: it may have forgotten others
#   taskq.due        sorted set of tags in `unacked` that wait for their ETA: due:UNIQUE:LIST
#   taskq.rejected   list of the last 10,000 rejected messages: about it in JSON, newline, text
#   taskq.runs       hash of the last runs of periodic tasks; taskq.runs.count: how many there were
#
# What is sent at a chord's end lies in Celery's G.d, beside the ids of the parts that have ended:
# whoever sends it, of either kind, deletes that.

_CHORD = "celery-taskset-meta-"  # before the id of a chord, or of a group that is saved

#: All that must happen at once: run commands, among them the ends of claims, and make new claims.
_SCRIPT = """
local unacked, index, due, owner = unpack(KEYS, 1, 4)
local now, left, tag, ticket, sure, before, queues = unpack(ARGV, 1, 7)
local call, claims, done, strays, wrong = redis.call, {}, {}, {}, ''
local again, gone = sure ~= ticket, false  -- whether the reply of an earlier call was lost
if tag ~= '' then call('SET', owner, ticket, 'NX', 'EX', 86400) end
local known = tonumber(tag ~= '' and call('GET', owner) or 0)

local function is_taken(name)
    return call('HEXISTS', unacked, name) == 0
        and (tonumber(string.match(name, ':(%d+)$')) or 0) >= known
end
local at = 8
while at <= #ARGV do  -- before any command: a script that fails half-way is not undone
    local name, key = ARGV[at + 1], ARGV[at + 2]
    if name == 'end' and not again and is_taken(key) then return {'stale'} end
    if name == 'expect' and (call('HGET', key, ARGV[at + 3]) or '') ~= ARGV[at + 4] then
        return {'stale'}
    elseif string.match(name, '^[LR]PUSH$') then
        local kind = call('TYPE', key).ok
        if kind ~= 'list' and kind ~= 'none' then return {'wrong', key} end
    end
    at = at + 1 + ARGV[at]
end

local function claim(list, raw)
    local name, good, message = tag .. ticket, pcall(cjson.decode, raw)
    local headers, eta = good and type(message) == 'table' and message.headers, 0
    if type(headers) == 'table' and type(message.properties) == 'table' then
        if type(headers.eta) == 'string' then eta = 1 end
        call('ZADD', index, now, name)
    end
    local queue = string.gsub(string.sub(list, before + 1), '\\6\\22%d+$', '')
    call('HSET', unacked, name, '[' .. raw .. ',"",' .. cjson.encode(queue) .. ']')
    ticket = ticket + 1
    claims[#claims + 1] = {list, raw, eta}
end
local function named(text, key)  -- a chord's end needs its parts' ids where Celery runs it
    local _, stop = string.find(text, '\\\\"result\\\\":[]},{', 1, true)
    if not stop then return text end
    local ids = call('ZRANGE', key .. '.j', 0, -1)
    for i, row in ipairs(ids) do
        ids[i] = '[[' .. (string.match(row, '^%[1, (".-"), "') or 'null') .. ',null],null]'
    end
    local list = string.sub(cjson.encode('[' .. table.concat(ids, ',') .. ']'), 2, -2)
    return string.sub(text, 1, stop - 5) .. list .. string.sub(text, stop - 2)
end
local function part(key, id, place, value, ttl, again, list, text)
    local size, over = call('GET', key .. '.s'), call('GET', key .. '.c') == 'done'
    if over and (again == '0' or not size) then return end
    if call('SADD', key .. '.d', id .. ':' .. place) == 1 then
        call('ZADD', key .. '.j', place, value)
    end
    for _, name in ipairs({'.j', '.t', '.s', '.d'}) do
        call('EXPIRE', key .. name, ttl)
    end
    local parts = size and size + (call('GET', key .. '.t') or 0)
    if call('ZCARD', key .. '.j') ~= parts then return end
    local body = {list, text}
    for _, item in ipairs(call('SMEMBERS', key .. '.d')) do
        local kept = string.match(item, '^taskq.end(.*)')
        if kept then body = cjson.decode(kept) end
    end
    if body[1] ~= '' and (over or call('SET', key .. '.c', 'done', 'NX', 'EX', 86400)) then
        body[2] = named(body[2], key)
        if again == '1' then
            done[#done + 1] = body
        elseif tag ~= '' then  -- for this worker: one of Celery does not know our chords
            claim(body[1], body[2])
        else
            call('LPUSH', body[1], body[2])
        end
    end
end
for n = tonumber(sure), ticket - 1 do  -- what such a call has claimed
    if call('HEXISTS', unacked, tag .. n) == 1 then strays[#strays + 1] = tag .. n end
end
at = 8
while at <= #ARGV do
    local command = {unpack(ARGV, at + 1, at + ARGV[at])}
    if command[1] == 'end' then
        gone = again and is_taken(command[2])  -- it has been settled by such a call
        call('HDEL', unacked, command[2])
        call('ZREM', index, command[2])
        if string.sub(command[2], 1, 4) == 'due:' then call('ZREM', due, command[2]) end
    elseif command[1] == 'part' and not gone then
        part(unpack(command, 2))
    elseif command[1] ~= 'expect' and not gone then
        call(unpack(command))
    end
    at = at + 1 + ARGV[at]
end

local ready = left ~= '0' and call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, 1000) or {}
for i = #ready, 1, -1 do
    local value, list = call('HGET', unacked, ready[i]), string.match(ready[i], '^due:[^:]*:(.*)')
    if value then
        call('RPUSH', list, string.match(value, '^%[(.*),"","[^\\n]*$'))
        call('HDEL', unacked, ready[i])
    end
    call('ZREM', index, ready[i])
    call('ZREM', due, ready[i])
end
for from = 5, #KEYS, math.max(queues, 1) do  -- the lists of one priority
    for _, among in ipairs({queues, 1}) do  -- first every queue has its share
        local share = math.ceil(left / among)
        for k = from, from + queues - 1 do
            local n = math.min(share, left)
            local items = n > 0 and redis.pcall('LRANGE', KEYS[k], -n, -1) or {}
            if items.err then items, wrong = {}, KEYS[k] end
            for i = #items, 1, -1 do claim(KEYS[k], items[i]) end
            if #items > 0 then call('LTRIM', KEYS[k], 0, -#items - 1) end
            left = left - #items
        end
    end
end
return {'ok', wrong, claims, done, strays}
"""


class RedisBell(Bell):
    """A Bell that Redis rings too: when a list is pushed to, a result or a post is published."""

    _line: Any = None  # the connection on which Redis rings

    def __init__(self, store: RedisStore, path: str | None) -> None:
        super().__init__(path)
        self._store = store
        self._channels: list[str] = []  # of results
        self._posts: dict[str, list[bytes]] = {}  # by the pattern that an inbox subscribes to
        self.line_id = 0  # the line's number for the server

    def listen(self, topics: Iterable[str]) -> None:
        topics = list(topics)
        super().listen(topics)
        self._channels = [self._store.result_key(t[2:]) for t in topics if t[0] == "r"]
        patterns = [topic[2:] for topic in topics if topic[0] == "e"]
        if not self._posts.keys() <= set(patterns):
            self.hang_up()  # the quickest way to get rid of the others
        self._posts = {pattern: self._posts.get(pattern, []) for pattern in patterns}
        if topics:
            self._tune()

    def _tune(self) -> None:
        """Subscribe, on a new connection if there is none; without a server that waits."""
        try:
            if self._line is None:
                self._line = self._store.connect()
                self._line.health_check_interval = 0  # PING has another reply while it listens
                self.line_id = self._store.send(self._line, ("CLIENT", "ID"))[0]
            self._line.send_command("UNSUBSCRIBE")
            self._line.send_command("SUBSCRIBE", "__redis__:invalidate", *self._channels)
            if self._posts:
                self._line.send_command("PSUBSCRIBE", *self._posts)
            self._line.send_command("PING", "tuned")
            while b"tuned" not in self._hear():
                pass
        except (OperationalError, *self._store.errors):
            self.hang_up()

    def _hear(self) -> Any:
        """Return what comes next on the line; posts are put aside for their inbox."""
        heard = self._line.read_response()
        if heard[0] == b"pmessage":
            self._posts[heard[1].decode()].append(heard[3])
        return heard

    def _drain(self, timeout: float) -> None:
        """Hear what comes on the line within `timeout` seconds; it ends the next wait."""
        try:
            _readable(self._line._sock, timeout, *self._fds[:1])
            while self._line.can_read(timeout=0):
                self._hear()
                self._rung = True
        except (*self._store.errors, AttributeError, TypeError):  # there is no line any more
            self.hang_up()
            self._rung = True

    def take_posts(self, pattern: str) -> list[str]:
        """Return what was posted by an inbox's pattern since this was asked last."""
        if self._line is None:  # a busy worker does not doze, which would do it
            self._tune()
        self._drain(0.0)
        posts = self._posts.get(pattern, [])
        found, posts[:] = posts[:], []
        return [text.decode("utf-8", "replace") for text in found]

    def hang_up(self) -> None:
        """Give up the connection on which Redis rings; the next sleep makes another."""
        if self._line is not None:
            self._line.disconnect()
        self._line = None

    __del__ = hang_up

    def doze(self, hears: bool) -> None:
        """Sleep from now on; if it `hears`, the thread's next look tells Redis what for."""
        super().doze(hears)
        self._rung = False  # what has come until now is seen by the next look
        self._store.local.bell = self if hears and self._line is not None else None

    def wait(self, timeout: float) -> bool:
        if self._line is None:  # what happens until it is there again goes unheard
            self._tune()
            return self._line is not None or super().wait(min(timeout, 1.0)) or True
        self._drain(0.0 if self._rung else max(timeout, 0.0))
        if self._fds and _readable(self._fds[0], 0):
            self._rung = bool(os.read(self._fds[0], 4096))
        self._flag[0] = self.AWAKE
        rung, self._rung = self._rung, False
        return rung


class RedisStore(Store):
    """A store on a Redis server, in Celery's own format: see above. Every thread has a connection,
    a sleeper one more, a process with workers a thread for their heartbeats. That a worker is dead
    is seen at once by its journal on the same machine, elsewhere by missing heartbeats, and by
    Celery's visibility time-out where no worker of taskq is left."""

    foreign = True
    SCHEMES = {"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss"}
    SCHEMES.update({"unix": "unix", "redis+socket": "unix"})  # as redis-py calls them
    OPTIONS: dict[str, Any] = {
        "visibility_timeout": 3600,
        "global_keyprefix": "",
        "result_prefix": "",  # stands before the keys of results
        "fanout_prefix": True,  # or text: what stands before the channels of commands and events
        "priority_steps": (0, 3, 6, 9),
        "socket_timeout": 10.0,  # without one, a server that hangs would never be missed
        "socket_connect_timeout": 5.0,
    }
    #: More options of the connections, `ssl_…` too.
    CONNECTION = """socket_keepalive socket_keepalive_options health_check_interval
        client_name""".split()
    #: Options of Celery's for what needs none here.
    NO_EFFECT = """max_connections retry_on_timeout retry_policy max_retries interval_start
        interval_step interval_max polling_interval queue_order_strategy fanout_patterns
        result_chord_ordered unacked_restore_limit unacked_restore_interval
        unacked_restore_throttle unacked_mutex_expire""".split()
    #: Keys, of which kind they must be.
    KEYS = {"unacked": "hash", "unacked_index": "zset", "taskq.due": "zset"}
    KEYS.update({"taskq.workers": "zset", "taskq.runs": "hash"})
    _sep = "\x06\x16"  # between a queue's name and its priority, and in bindings
    #: Seconds between heartbeats, and after the last one until a worker counts as dead.
    BEAT, DEAD = 2.0, 10.0
    #: How often, 0.2 s apart, what can be repeated is tried while the server cannot be reached.
    TRIES = 25

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        try:
            import redis
        except ImportError:
            why = "needs redis-py, which is not installed: pip install redis"
            raise ImproperlyConfigured(f"{_mask_url(url)} {why}") from None
        self.redis: Any = redis
        self.errors = (redis.RedisError, OSError)
        self.uri = _mask_url(url)
        at = self._options = self._parse(url, options)
        self._prefix = at.pop("global_keyprefix")
        self._result_prefix = at.pop("result_prefix")
        prefix = at.pop("fanout_prefix")
        self._fanout = ("/{db}." if prefix is True else prefix or "").format(db=at["db"])
        self._visibility = float(at.pop("visibility_timeout"))
        self._steps = sorted(at.pop("priority_steps"))
        self._keys = [self._key(name) for name in self.KEYS]
        self._unacked, self._index, self._due, self._workers, self._runs = self._keys
        user = os.getuid() if hasattr(os, "getuid") else None
        name = f"{at.get('path', at.get('host'))}-{at.get('port')}-{at['db']}-{self._prefix}"
        name = re.sub(r"[^\w.-]", "_", f"taskq-{user}-{name}-run")
        # Where the machine's workers meet.
        self.folder = os.path.join(_symbol("tempfile:gettempdir")(), name)
        if user and os.path.exists(self.folder) and os.stat(self.folder).st_uid != user:
            raise ImproperlyConfigured(f"{self.folder} belongs to another user: set TMPDIR")
        self.bells = Bells(self.folder, functools.partial(RedisBell, self))
        self._sha = _symbol("hashlib:sha1")(_SCRIPT.encode()).hexdigest()
        self.local: Any = threading.local()
        self._checked = False
        self._tracks = True  # whether the server can tell of changes
        #: The workers of this process: the tags that are `held`, the number of the next `ticket`,
        #: and from which on, `sure`, a reply that was lost may have told of more.
        self._holders: dict[int, types.SimpleNamespace] = {}
        self._beating: threading.Thread | None = None
        self._beats = threading.Lock()  # for each beat, and while one of them leaves
        self._revoked: collections.deque[str] = collections.deque(maxlen=1000)
        self._looked = self._up_since = 0.0  # the last look for dead workers, the first in a row

    def _parse(self, url: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, with what the connections are made with."""
        scheme, _, rest = url.partition("://")
        kind, rest = self.SCHEMES[scheme], rest.replace("virtual_host", "db")
        is_socket = kind == "unix"
        try:
            at = self.redis.connection.parse_url(f"{kind}://{rest}")
            if not is_socket:
                int(rest.partition("?")[0].partition("/")[2].strip("/") or 0)
        except ValueError as exc:
            form = "redis://:PASSWORD@HOST:PORT/NUMBER"
            raise ImproperlyConfigured(f"{_mask_url(url)!r}: {exc}; expected {form}") from None
        known = {*self.OPTIONS, *self.CONNECTION, *self.NO_EFFECT}
        address = {"connection_class", "host", "port", "path", "db", "username", "password"}
        for name in {*options, *at} - known - address:
            if not name.startswith("ssl_"):
                hint = _hint(name, known, 0.6) or f": expected one of {_names(self.OPTIONS)}"
                raise ImproperlyConfigured(f"unknown option {name!r} of {scheme}://{hint}")
        made = {"db": 0, **self.OPTIONS, **options, **at}
        if isinstance(made.get("ssl_cert_reqs"), str):
            made["ssl_cert_reqs"] = made["ssl_cert_reqs"].lower().replace("cert_", "")
        unfit = {n for n in made if is_socket and n.startswith("socket_keepalive")}
        return {name: made[name] for name in made.keys() - {*self.NO_EFFECT} - unfit}

    # -- keys ------------------------------------------------------------------------------------
    def _key(self, name: str) -> str:
        return self._prefix + name

    def _list(self, queue: str, priority: int) -> str:
        """Return the key of a queue's list for messages of this priority."""
        step = max(step for step in self._steps if step <= priority)
        return self._key(f"{queue}{self._sep}{step}" if step else queue)

    def _lists(self, queues: Sequence[str]) -> list[str]:
        """Return the keys of these queues' lists, those of the most urgent messages first."""
        return [self._list(queue, step) for step in self._steps for queue in queues]

    def _place(self, key: bytes) -> tuple[str, int]:
        """Return the queue and priority of a list."""
        queue, _, step = key.decode()[len(self._prefix) :].partition(self._sep)
        return queue, int(step or 0)

    def result_key(self, id: str) -> str:
        """Return the key, and channel, of a task's result or of a stored group."""
        kind = "" if id.startswith(_CHORD) else "celery-task-meta-"
        return f"{self._result_prefix}{kind}{id}"

    def _channel(self, exchange: str, key: str) -> str:
        """Return the channel of an exchange's posts by this routing key."""
        return self._key(self._fanout + exchange + (f"/{key}" if key else ""))

    def _binding(self, exchange: str, kind: str, key: str, queue: str) -> tuple[str, str]:
        """Return the key of kombu's set for an exchange, and a row of it; that has no kind, so that
        of a fanout exchange is a topic's which matches all."""
        key, words = "#" if kind == "fanout" else key, {"*": r"[^\.]+", "#": r".*?"}
        pattern = r"\.".join(words.get(word, re.escape(word)) for word in key.split("."))
        row = self._sep.join((key, "" if kind == "direct" else f"^{pattern}$", queue))
        return self._key(f"_kombu.binding.{exchange}"), row

    # -- connections -----------------------------------------------------------------------------
    def connect(self) -> Any:
        """Return a new connection."""
        options = dict(self._options)
        kind = options.pop("connection_class", self.redis.Connection)
        retry = self.redis.retry.Retry(self.redis.backoff.NoBackoff(), 0)
        connection = kind(**options, protocol=2, retry=retry)
        if not self._checked:
            self._check(connection)
            self._checked = True
        return connection

    def _check(self, connection: Any) -> None:
        """Raise if the server, or a key in it, is not what it should be."""
        try:
            about = self.send(connection, ("INFO",))[0]
        except OperationalError as exc:
            if "permission" not in str(exc):  # this user may not ask
                raise
            about = b""
        version = re.search(rb"redis_version:(\d+)", about)
        if b"cluster_enabled:1" in about or version and int(version[1]) < 6:
            why = "is a cluster, or older than Redis 6: taskq needs a single server of 6 or later"
            raise OperationalError(f"Redis at {self.uri} {why}")
        kinds = self.send(connection, *(("TYPE", key) for key in self._keys))
        for key, kind, wanted in zip(self._keys, map(bytes.decode, kinds), self.KEYS.values()):
            if kind not in (wanted, "none"):
                why = "rename it, or set global_keyprefix in broker_transport_options"
                text = f"the Redis key {key!r} is a {kind}, not a {wanted}: {why}"
                raise ImproperlyConfigured(text)

    def send(self, connection: Any, *commands: Sequence[Any]) -> list[Any]:
        """Send commands at once and return their replies."""
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [connection.read_response() for _ in commands]
        except self.redis.exceptions.NoScriptError:
            return self.send(connection, ("EVAL", _SCRIPT, *commands[0][2:]))
        except BaseException as exc:  # an interrupt, too: the next would be given this reply
            connection.disconnect()
            if isinstance(exc, self.errors):
                raise OperationalError(f"Redis at {self.uri}: {exc}") from None
            raise

    def _call(self, *commands: Sequence[Any], tries: int = 1) -> list[Any]:
        """Send commands on this thread's connection; what can be repeated has more tries."""
        local = self.local.__dict__
        while True:
            connection = local.pop("connection", None)
            try:
                if connection is None or _readable(connection._sock, 0):  # closed meanwhile
                    connection = self.connect()
                replies = self.send(connection, *commands)
                local["connection"] = connection
                return replies
            except OperationalError:
                tries -= 1
                if not tries:
                    raise
                time.sleep(0.2)

    def _run(
        self, commands: Any, queues: Sequence[str] = (), limit: int = 0, owner: str = "",
        first: int = 0, sure: int = 0, tries: int = 1, now: float = 0.0,
    ) -> list[Any]:  # fmt: skip
        """Run the script: commands, and for an owner claim `limit` messages, with tickets from
        `first` on; an earlier call may have claimed those from `sure` on. Returns new claims [list,
        message, whether it has an ETA], complete chords [list, message], such a call's tags."""
        lists = self._lists(queues)
        known, tag = self._key(f"taskq.owner.{owner}"), owner and owner + ":"
        keys = (self._unacked, self._index, self._due, known, *lists)
        prefix = len(self._prefix.encode())
        head = (now or time.time(), limit, tag, first, sure, prefix, len(queues))
        rest = [item for command in commands for item in (len(command), *command)]
        script = ("EVALSHA", self._sha, len(keys), *keys, *head, *rest)
        verdict, *found = self._call(script, tries=tries)[0]
        if verdict == b"stale":
            raise StaleClaim("another worker has taken it over")
        if verdict == b"wrong":
            raise ValueError(f"the Redis key {found[0].decode()!r} is not a list: rename it")
        wrong, *rows = found
        if wrong:
            worker_logger.error("The Redis key %r is not a list: this queue cannot be read", wrong)
        return rows

    # -- messages --------------------------------------------------------------------------------
    def publish(self, deliveries: Rows, chords: Rows = (), run: Any = None) -> bool:
        """Push to the lists; those with an ETA too, for a worker of any kind to keep until due."""
        commands = self._commands((), deliveries, chords, ())
        if run:
            name, before, now = run
            commands.append(("expect", self._runs, name, "" if before is None else repr(before)))
            commands.append(("HSET", self._runs, name, repr(now)))
            commands.append(("HINCRBY", self._runs + ".count", name, 1))
        try:
            if len(commands) > 1:
                self._run(commands)
            else:
                self._call(*commands)
        except StaleClaim:  # somebody else has sent the run
            return False
        return True

    def _commands(
        self, results: Any, deliveries: Any, chords: Any, parts: Any, again: int = 0
    ) -> list[tuple[Any, ...]]:
        """Return what the script has to do for these rows."""
        made: list[tuple[Any, ...]] = []
        for id, _, text, seconds in results:
            kept = int(seconds or 0)
            key, text = self.result_key(id), text if text.startswith("{") else _decode_base64(text)
            made += ("SET", key, text, *(("EX", kept) if kept else ())), ("PUBLISH", key, text)
        made += [("LPUSH", *self._body(delivery)) for delivery in deliveries]
        ttl = self.chord_expires
        for chord, number, delivery in chords:
            key = self.result_key(_CHORD + chord)
            if not number:
                made.append(("DEL", *(key + end for end in (".j", ".t", ".s", ".d"))))
                made.append(("SET", key + ".c", "done", "EX", 300))
            elif delivery is None:
                made.append(("INCRBY", key + ".t", number))
            else:
                made += ("DEL", key + ".c"), ("SET", key + ".s", number, "EX", ttl)
                made.append(("SADD", key + ".d", f"taskq.end{json.dumps(self._body(delivery))}"))
                made.append(("EXPIRE", key + ".d", ttl))
        metas = {id: (state, text) for id, state, text, _ in results} if parts else {}
        for chord, place, id, delivery in parts:
            state, text = metas.get(id, (SUCCESS, '{"result": null}'))
            result = json.loads(text)["result"] if text.startswith("{") else None  # a pickle
            value = json.dumps([1, id, state, result])
            place, body = "+inf" if place is None else place, self._body(delivery)
            key = self.result_key(_CHORD + chord)
            made.append(("part", key, id, place, value, ttl, again, *body))
        return made

    def _body(self, delivery: Any) -> tuple[str, str]:
        return (self._list(delivery[0], delivery[1]), delivery[3]) if delivery else ("", "")

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Ask for the lists and the next due time; for a dozing worker Redis remembers it."""
        lists = self._lists(queues)
        commands: list[Any] = [("EXISTS", *lists)] if lists else [("ECHO", 0)]
        commands.append(("ZRANGE", self._due, 0, 0, "WITHSCORES"))
        bell = getattr(self.local, "bell", None) if lists and self._tracks else None
        if bell is not None:
            on = ("CLIENT", "TRACKING", "ON", "REDIRECT", bell.line_id, "OPTIN")
            commands[:0] = on, ("CLIENT", "CACHING", "YES")
        try:
            *_, waiting, first = self._call(*commands)
        except OperationalError as exc:
            if bell is not None:
                bell.hang_up()  # its connection may be lost too
                # Where the server, or this user, cannot track, a worker looks once a second.
                self._tracks = not re.search("unknown|permission", str(exc))
            raise
        next_due = float(first[1]) if first else None
        return int(waiting) > 0 or (next_due or 1e99) <= time.time(), next_due

    def settle(self, owner: Any, settled: Settled, queues: Any = (), limit: int = 0) -> list[Claim]:
        """Settle and claim with one script; the next one makes up for a reply that is lost."""
        if not limit and owner not in self._holders:
            self._run(self._changes(settled))
            return []
        holder = self._holders.get(owner) or self._enlist(owner)
        names = self._in_turn(queues) if limit else []
        changes, first = self._changes(settled), holder.ticket
        holder.ticket += limit + len(changes)  # the ends of chords are claimed too
        try:
            rows, _, strays = self._run(changes, names, limit, f"{owner:x}", first, holder.sure)
        except (StaleClaim, ValueError):  # nothing was done
            holder.ticket = first
            raise
        claims = self._read([stray.decode() for stray in strays])
        claims = [claim for claim in claims if not self._defer(claim)]
        for ticket, (place, raw, eta) in enumerate(rows, first):
            claim = Claim(f"{owner:x}:{ticket}", ticket, *self._place(place), raw)
            if not (eta and self._defer(claim)):
                claims.append(claim)
        holder.sure = holder.ticket
        for claim, _ in settled:
            holder.held.pop(claim.key, None)
        holder.held.update((claim.key, None) for claim in claims)
        return claims

    def _changes(self, settled: Settled) -> list[tuple[Any, ...]]:
        """Return the script's commands for the outcomes of claims."""
        back = [pair for pair in reversed(settled) if pair[1].verb == "requeue"]
        made: list[tuple[Any, ...]] = []
        # What is put back last, the oldest, is the next again.
        for claim, end in (*(pair for pair in settled if pair[1].verb != "requeue"), *back):
            made.append(("end", claim.key))
            made += self._commands(end.results, end.publish, end.chords, end.parts)
            if end.verb == "requeue":
                place = self._list(claim.queue, claim.priority)
                made.append(("RPUSH", place, end.reason or claim.raw))
            elif end.verb == "reject":
                why, at = str(end.reason), time.time()
                about = {"queue": claim.queue, "rejected_at": at, "reason": why}
                text, key = json.dumps(about).encode(), self._key("taskq.rejected")
                made += ("LPUSH", key, text + b"\n" + claim.raw), ("LTRIM", key, 0, 9999)
        return made

    def _defer(self, claim: Claim) -> bool:
        """Put a claim aside if its ETA is still to come. Should no worker of ours be left, Celery
        restores it: its time in the index is the ETA."""
        due = 0.0
        with contextlib.suppress(MalformedMessage):  # whoever executes it rejects it
            due = _timestamp(claim.message.headers.get("eta") or "1970-01-01")
        if due <= time.time() or claim.head[1] in self._revoked:
            return False
        tag = f"due:{claim.key.replace(':', '.')}:{self._list(claim.queue, claim.priority)}"
        value = b'[%b,"",%b]' % (claim.raw, json.dumps(claim.queue).encode())
        aside = [("ZADD", key, due, tag) for key in (self._index, self._due)]
        self._run([("end", claim.key), ("HSET", self._unacked, tag, value), *aside])
        return True

    def begun(self, claims: Sequence[Claim]) -> None:
        """Take claims that have begun, and must not run again, from where others restore them."""
        self._call(("ZREM", self._index, *(claim.key for claim in claims)))

    def purge(self, queue: str) -> int:
        """Delete the lists, and what waits for its ETA."""
        lists, tags = self._lists([queue]), self._waiting([queue])
        commands: list[Any] = [*(("LLEN", key) for key in lists), ("DEL", *lists)]
        if tags:
            commands += ("ZREM", self._due, *tags), ("ZREM", self._index, *tags)
            commands.append(("HDEL", self._unacked, *tags))
        return sum(self._call(("MULTI",), *commands, ("EXEC",))[-1][: len(lists)]) + len(tags)

    def _waiting(self, queues: Sequence[str]) -> list[str]:
        """Return the tags of what waits for its ETA, in the order of that."""
        lists, tags = self._lists(queues), self._call(("ZRANGE", self._due, 0, -1))[0]
        return [tag for tag in map(bytes.decode, tags) if tag.split(":", 2)[2] in lists]

    # -- heartbeats and recovery -----------------------------------------------------------------
    def _enlist(self, owner: int) -> types.SimpleNamespace:
        """Begin with the heartbeats of a worker of this process."""
        holder = types.SimpleNamespace(held={}, ticket=1, sure=1)
        self._beat_once({owner: holder})
        self._holders[owner] = holder
        if self._beating is None or not self._beating.is_alive():
            self._beating = threading.Thread(target=self._beat, name="taskq heartbeat", daemon=True)
            self._beating.start()
        return holder

    def _beat(self) -> None:
        """Beat for this process's workers, in a thread: a task may keep the main one."""
        while self._holders:
            time.sleep(min(self.BEAT, self._visibility / 3))
            with contextlib.suppress(OperationalError), self._beats:
                self._beat_once(self._holders)
        self.local.__dict__.clear()

    def _beat_once(self, holders: dict[int, types.SimpleNamespace]) -> None:
        """Show that workers live, and renew their claims."""
        now, commands = self._now(), []  # type: float, list[tuple[Any, ...]]
        for owner, holder in list(holders.items()):
            commands.append(("ZADD", self._workers, now, f"{owner:x}"))
            times = [item for tag in list(holder.held) for item in (time.time(), tag)]
            if times:
                commands.append(("ZADD", self._index, "XX", *times))
        if commands:
            self._call(*commands)

    def leave(self, owner: int) -> None:
        """End a worker's heartbeats, and give back what it still has, unless its journal is left
        for that. The last of all puts back what waits for its ETA: Celery's may be left."""
        with contextlib.suppress(OperationalError, KeyError):
            with self._beats:
                del self._holders[owner]
            if not os.path.exists(f"{self.folder}/{owner:x}.journal"):
                # It may have claimed what it has not learned of, as the reply was lost.
                self.recover_owner(owner, {}, None, self.settle)
            alive = ("ZCOUNT", self._workers, self._now() - self.DEAD, "+inf")
            forget = ("DEL", self._key(f"taskq.owner.{owner:x}"))
            left = self._call(("ZREM", self._workers, f"{owner:x}"), forget, alive)[-1]
            while not left and self._call(("ZCARD", self._due))[0]:
                self._run((), limit=1, now=float("inf"))

    def _now(self) -> float:
        """Return the server's time: the clocks of machines may differ by more than a heartbeat."""
        seconds, micros = map(int, self._call(("TIME",))[0])
        return seconds + micros / 1e6

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any]) -> int:
        """Recover also the claims of workers whose heart has stopped, and what is overdue."""
        count, now = super().recover(lost, settle), time.monotonic()
        workers, index = self._workers, self._index
        if now - self._looked > 2 * self.BEAT:  # perhaps nobody could beat: let them do it first
            self._up_since = now
        self._looked = now
        dead, late = self._now() - self.DEAD, time.time() - self._visibility
        old, some = ("ZRANGEBYSCORE", index, "-inf", late), ("LIMIT", 0, 100)
        names, overdue = self._call(("ZRANGEBYSCORE", workers, "-inf", dead), old + some)
        for name in names if now - self._up_since > 2 * self.BEAT else ():
            owner = int(name, 16)
            if not os.path.exists(os.path.join(self.folder, f"{owner:x}.journal")):
                claims = self.claims_of(owner)
                times = self._call(*(("ZSCORE", index, claim.key) for claim in claims))
                ends = {c.ticket: ACKS_LATE if at else 0 for c, at in zip(claims, times)}
                count += self.recover_owner(owner, ends, lost, settle)
                self._call(("ZREM", workers, name))
        mine = {tag for holder in self._holders.copy().values() for tag in list(holder.held)}
        claims = self._read([tag.decode() for tag in overdue if tag.decode() not in mine])
        if claims:
            settle(0, [(claim, lost(claim, ACKS_LATE)) for claim in claims])
        return count + len(claims)

    def claims_of(self, owner: int) -> list[Claim]:
        tags = [tag.decode() for tag in self._call(("HKEYS", self._unacked))[0]]
        claims = self._read([tag for tag in tags if tag.startswith(f"{owner:x}:")])
        return sorted(claims, key=lambda claim: claim.ticket)

    def _read(self, tags: Sequence[str]) -> list[Claim]:
        """Return the claims with these tags."""
        found = []
        values = self._call(("HMGET", self._unacked, *tags))[0] if tags else ()
        for tag, raw in zip(tags, values):
            ticket, queue, priority = tag.rpartition(":")[2], "", 0
            if raw is None:
                self._call(("ZREM", self._index, tag))
                continue
            kept = re.fullmatch(rb'\[(.*), ?("[^\n]*"), ?("[^\n]*")\]', raw, re.DOTALL)
            if kept:
                exchange, queue = json.loads(kept[2]), json.loads(kept[3])
                queue = next(iter(self.bound(exchange, queue) if exchange else ()), queue)
                raw = kept[1]
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                priority = json.loads(raw)["properties"].get("priority") or 0
            found.append(Claim(tag, int(ticket) if ticket.isdigit() else 0, queue, priority, raw))
        return found

    # -- results ---------------------------------------------------------------------------------
    def put_results(self, results: Sequence[Sequence[Any]], parts: Sequence[Any] = ()) -> list[Any]:
        """Set and publish results, count parts; return the deliveries of complete chords."""
        _, done, _ = self._run(self._commands(results, (), (), parts, again=1), tries=self.TRIES)
        return [Delivery(*self._place(place), None, text.decode()) for place, text in done]

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Read with one command; a server that is being restarted is waited for."""
        keys, found = [self.result_key(id) for id in ids], {}
        for id, text in zip(ids, self._call(("MGET", *keys), tries=self.TRIES)[0] if keys else ()):
            if text is not None:
                found[id] = _state_of(text)
        return found

    def chord_parts(self, chord: str) -> list[str]:
        key = self.result_key(_CHORD + chord) + ".j"
        rows = self._call(("ZRANGE", key, 0, -1), tries=self.TRIES)[0]
        return [json.loads(row)[1] for row in rows]

    def forget(self, ids: Sequence[str]) -> None:
        if ids:
            self._call(("DEL", *map(self.result_key, ids)), tries=self.TRIES)

    # -- bindings and housekeeping ---------------------------------------------------------------
    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        key, row = self._binding(exchange, kind, routing_key, queue)
        permanent = self._key(f"_kombu.binding_permanent.{exchange}")
        self._call(("SADD", key, row), ("SADD", permanent, row))

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        rows = sorted(self._call(("SMEMBERS", self._key(f"_kombu.binding.{exchange}")))[0])
        found = (row.decode().split(self._sep) for row in rows)
        return [("topic" if pattern else "direct", key, queue) for key, pattern, queue in found]

    # -- posts and periodic tasks ----------------------------------------------------------------
    def fan_out(self, kind: str, exchange: str, posts: Sequence[Any]) -> int:
        """Publish posts; push replies to the lists that are bound."""
        made: list[Any] = []
        for key, text in posts:
            if kind == "direct":
                for name in map(self._key, self.bound(exchange, key)):
                    made += ("LPUSH", name, text), ("EXPIRE", name, 3600)
            else:
                made.append(("PUBLISH", self._channel(exchange, key), text))
        return sum(self._call(*made))

    def subscribe(self, kind: str, exchange: str, key: str, queue: str, bell: Any) -> Inbox:
        """Let the bell subscribe to a channel, or bind a list to a 'direct' exchange."""
        if kind != "direct":
            pattern = self._channel(exchange, key.replace("#", "*"))
            return Inbox([f"e:{pattern}"], functools.partial(bell.take_posts, pattern))
        binding, place = self._binding(exchange, kind, key, queue), self._key(queue)

        def pop() -> list[str]:
            take = (("MULTI",), ("LRANGE", place, 0, -1), ("DEL", place), ("EXEC",))
            found = self._call(*take)[-1][0] if self.look([queue])[0] else []
            return [text.decode("utf-8", "replace") for text in reversed(found)]

        def close() -> None:
            self._call(("SREM", *binding), ("DEL", place))

        self._call(("SADD", *binding))
        return Inbox([f"q:{queue}"], pop, close)

    def revoke(self, ids: Iterable[str], seconds: float) -> None:
        """Note which tasks, the latest, are not to wait for their ETA: their worker discards them
        when they come."""
        self._revoked.extend(ids)

    def scheduled(self, queues: Sequence[str]) -> list[Claim]:
        return self._read(self._waiting(queues)[:1000])

    def due_runs(self) -> dict[str, tuple[float, int]]:
        last, counts = self._call(("HGETALL", self._runs), ("HGETALL", self._runs + ".count"))
        count = dict(zip(counts[::2], counts[1::2]))
        pairs = zip(last[::2], last[1::2])
        return {name.decode(): (float(at), int(count[name])) for name, at in pairs}

    def close(self) -> None:
        connection = self.local.__dict__.pop("connection", None)
        self.local.__dict__.clear()
        self.bells.clear()
        if connection is not None:
            connection.disconnect()


def _state_of(text: bytes) -> tuple[str, str]:
    """Return (state, meta text) of a result, JSON or a pickle: that is read here, not loaded."""
    if text.startswith(b"{"):
        return json.loads(text).get("status", "SAVED"), text.decode()
    import pickletools

    names = [value for _, value, _ in pickletools.genops(text) if isinstance(value, str)]
    return names[names.index("status") + 1], _encode_base64(text)


# ==== 7. Results =================================================================================


def _new_thread_state() -> Any:
    """Return what has for each thread: its tasks, innermost last, each with its request; whether it
    may wait; the Batch that it fills."""

    class ThreadState(threading.local):
        def __init__(self) -> None:
            self.stack: list[tuple[Any, Any]] = []
            self.may_join = True
            self.batch: Any = None

    return ThreadState()


_thread = _new_thread_state()


@contextlib.contextmanager
def allow_join_result(allowed: bool = True) -> Iterator[None]:
    """Let a task wait for others: `with allow_join_result(): result.get()`. Mind deadlocks."""
    before, _thread.may_join = _thread.may_join, allowed
    try:
        yield
    finally:
        _thread.may_join = before


def result_row(app: Any, request: Any, state: str, value: Any, traceback: Any = None) -> Any:
    """Return what a store keeps of a task: (id, state, meta text, seconds to keep it or None). The
    meta is Celery's, as JSON or base64 of a pickle. EncodeError if a return value cannot be
    serialized; an exception is, in the worst case, by its repr."""
    conf = app.conf
    fails = state == FAILURE and conf.result_failure_expires is not None
    seconds = conf.seconds("result_failure_expires" if fails else "result_expires")
    if isinstance(value, BaseException) and conf.result_serializer == "json":
        value = encode_exception(value)
    elif isinstance(value, ResultBase):
        value = value.as_tuple()
    meta = {
        "status": state,
        "result": value,
        "traceback": traceback,
        "children": [child.as_tuple() for child in request.children],
        "date_done": datetime.now(timezone.utc).isoformat() if state in READY_STATES else None,
        "task_id": request.id,
    }
    if request.group:
        meta["group_id"] = request.group
    if request.parent_id:
        meta["parent_id"] = request.parent_id
    if conf.result_extended:
        info = request.delivery_info or {}
        meta.update(name=request.task, worker=request.hostname, queue=info.get("routing_key"))
        meta.update(args=request.args, kwargs=request.kwargs, retries=request.retries)
    try:
        text = serialize(meta, conf.result_serializer)[2]
    except EncodeError as cause:
        for name in {"args", "kwargs"} & meta.keys():  # of a pickle: JSON may not hold them
            meta[name] = request.get(f"{name}repr") or _repr(meta[name])
        if isinstance(value, BaseException):
            meta["result"] = encode_exception(Exception(_repr(value)))
        try:
            text = serialize(meta, conf.result_serializer)[2]
        except EncodeError:
            why = f"the result of {request.task} cannot be serialized: {cause}"
            raise EncodeError(why) from None
    return request.id, state, text, seconds


def decode_result(app: Any, text: str) -> dict[str, Any]:
    """Return the meta in a `result_row`, with exceptions and results as such."""
    accept = app.conf.result_accept_content or app.conf.accept_content
    kind = CONTENT_TYPES["json" if text.startswith("{") else "pickle"]
    meta = deserialize(text, kind, {*accept, "json"})
    if meta["status"] in EXCEPTION_STATES and meta["result"] is not None:
        meta["result"] = decode_exception(meta["result"])
    children = meta.get("children")
    meta["children"] = children and [result_from_tuple(child, app) for child in children]
    return meta


def _metas(leaves: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the metas of tasks; those whose ends are not known yet are read in one go."""
    unread = [leaf.id for leaf in leaves if leaf._cache is None]
    found = leaves[0].backend.get_results(unread) if unread else {}
    unknown = {"status": PENDING, "result": None}
    return [
        leaf._cache or (leaf._keep(found[leaf.id]) if leaf.id in found else unknown)
        for leaf in leaves
    ]


class ResultBase:
    """What the result of one task and those of several have in common."""

    app: Any
    id: Any = None
    #: The result of what was before it in a chain; of a chord's body, that of its header.
    parent: Any = None
    _parts: Any = None  # the results that it is made of; None if it is one task's
    ignored = False  # whether it is of a task that was sent with `ignore_result`
    _backend: Any = None

    backend = property(lambda result: result._backend or result.app.backend, doc="Its store.")

    def _flat(self) -> list[Any]:
        """Return the results of single tasks in it."""
        if self._parts is None:
            return [self]
        return [leaf for result in self._parts for leaf in result._flat()]

    def _lineage(self) -> list[Any]:
        """Return it, its parent, that one's parent, and so on."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found

    def get(
        self, timeout: float | None = None, propagate: bool = True, interval: float = 0.5, *,
        callback: Any = None, on_interval: Any = None, disable_sync_subtasks: bool = True,
        progress: bool = False, no_ack: Any = None, follow_parents: Any = None,
        on_message: Any = None,
    ) -> Any:  # fmt: skip
        """Wait until all tasks in it have their ends and return the result, or results in order.
        timeout: seconds, for all together, after which TimeoutError is raised; None waits for ever.
        propagate: raise the first error, as soon as it is known; otherwise errors are returned.
        callback: called with each id and result; on_interval: every `interval` seconds meanwhile.
        disable_sync_subtasks: raise RuntimeError inside a task.
        on_message: called with each state that is seen, a dict such as {'status': 'PROGRESS', ...}.
        progress: draw a bar meanwhile, on a terminal or in a notebook, of its tasks and those of
        its parents: a chain's steps, a chord's header. The others, of Celery's, change nothing."""
        if self.ignored:
            why = "keeps no result: it was sent with ignore_result=True"
            raise NotImplementedError(f"task {self} {why}")
        if disable_sync_subtasks and not _thread.may_join:
            raise RuntimeError(
                "Never call result.get() within a task!\n"
                "See README, 'Calling': another process may be missing, or use allow_join_result()."
            )
        wanted = [leaf for leaf in self._flat() if not leaf.ignored]
        also = [leaf for node in self._lineage()[1:] for leaf in node._flat()] if progress else ()
        tell = on_message and (lambda text: on_message(decode_result(self.app, text)))
        for leaf in _as_they_end(wanted, also, progress, timeout, interval, on_interval, tell):
            if propagate:
                leaf.maybe_throw()
        return self.maybe_throw(propagate, callback)

    wait = join = join_native = get

    def maybe_throw(self, propagate: bool = True, callback: Any = None) -> Any:
        """Return the result or results as they are now, or raise the first error; as `get`."""
        return [result.maybe_throw(propagate, callback) for result in self._parts]

    def _states(self) -> set[str]:
        return {meta["status"] for meta in _metas(self._flat())}

    def ready(self) -> bool:
        """Return whether all tasks have their ends."""
        return self._states() <= READY_STATES

    def successful(self) -> bool:
        """Return whether all ended well."""
        return self._states() <= {SUCCESS}

    def failed(self) -> bool:
        """Return whether one failed."""
        return FAILURE in self._states()

    def forget(self) -> None:
        """Delete what the store knows of the tasks, and of those before them in their chains."""
        before = [node for leaf in self._flat() for node in leaf._lineage()]
        leaves = [leaf for node in before for leaf in node._flat()]
        self.backend.forget([leaf.id for leaf in leaves])
        for leaf in leaves:
            leaf._cache = None

    def exists(self) -> bool:
        """Return whether the store knows of all tasks; what has not begun is unknown to it."""
        ids = [leaf.id for leaf in self._flat()]
        return self.backend.get_results(ids).keys() >= set(ids)

    def revoke(self, connection: Any = None, wait: bool = False, **how: Any) -> Any:
        """Have workers not run its tasks; `terminate=True`, `signal` (by default SIGTERM): also end
        those that run. wait: return the workers' replies, of `timeout` seconds."""
        return self.app.control.revoke([leaf.id for leaf in self._flat()], reply=wait, **how)

    def as_tuple(self) -> Any:
        """Return the result as nested tuples that JSON can hold; see `result_from_tuple`."""
        parts = None if self._parts is None else [result.as_tuple() for result in self._parts]
        return (self.id, self.parent and self.parent.as_tuple()), parts

    def __str__(self) -> str:
        return str(self.id)

    def __repr__(self) -> str:
        shown = [] if self.id is None else [str(self.id)]
        if self._parts is not None:
            shown.append(f"[{', '.join(result.id for result in self._parts)}]")
        return f"<{type(self).__name__}: {' '.join(shown)}>"

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, ResultBase):
            return (self.id, self._parts) == (other.id, other._parts)
        return other == self.id if isinstance(other, str) else NotImplemented

    def __reduce__(self) -> Any:
        return result_from_tuple, (self.as_tuple(),)


def _of_meta(key: str, doc: str) -> Any:
    return property(lambda result: _metas([result])[0].get(key), doc=doc)


class AsyncResult(ResultBase):
    """The result of a task, there or to come; of any id: `AsyncResult(id, app=app).get()`."""

    TimeoutError = TimeoutError

    def __init__(
        self, id: str, backend: Any = None, *, app: Any = None, parent: Any = None, **_: Any
    ) -> None:
        if id is None:
            raise ValueError(f"AsyncResult requires valid id, not {type(id)}")
        self.id = str(id)
        self.app = app_or_default(app)
        self._backend = backend
        self.parent = parent
        self._cache: dict[str, Any] | None = None

    task_id = property(lambda result: result.id, doc="The id, by its other name.")

    def _keep(self, pair: tuple[str, str]) -> dict[str, Any]:
        meta = decode_result(self.app, pair[1])
        if meta["status"] in READY_STATES:
            self._cache = meta
        return meta

    def maybe_throw(self, propagate: bool = True, callback: Any = None) -> Any:
        """Return the result as it is now, or raise the error of a task that failed."""
        if self.ignored:
            return None
        (meta,) = _metas([self])
        value = meta["result"]
        if propagate and meta["status"] in PROPAGATE_STATES:
            if meta.get("traceback") and value.__cause__ is None:
                value.__cause__ = RemoteTraceback(meta["traceback"])
            raise value
        if callback is not None:
            callback(self.id, value)
        return value

    state = status = _of_meta("status", "PENDING, STARTED, SUCCESS, ..., or a state of its own.")
    result = info = _of_meta("result", "What it returned or raised, or `update_state`'s meta.")
    traceback = _of_meta("traceback", "The traceback of a task that failed, as text.")
    children = _of_meta("children", "The results of the tasks that this one called.")
    name = _of_meta("name", "The task's name; this and the next five need `result_extended`.")
    args = _of_meta("args", "Its positional arguments.")
    kwargs = _of_meta("kwargs", "Its keyword arguments.")
    worker = _of_meta("worker", "The node that ran it.")
    retries = _of_meta("retries", "How often it was retried.")
    queue = _of_meta("queue", "The queue it came from.")

    @property
    def date_done(self) -> datetime | None:
        """When the task had its end, in UTC."""
        value = _metas([self])[0].get("date_done")
        return _parse_time(value) if isinstance(value, str) else value

    def iterdeps(self, intermediate: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yield (parent, result) of this task, of those that it has called, and of theirs. Raises
        IncompleteStream at one that has no end yet, unless `intermediate`."""
        queue = collections.deque([(None, self)])  # type: collections.deque[tuple[Any, Any]]
        while queue:
            parent, node = queue.popleft()
            yield parent, node
            if node.ready():
                queue.extend((node, child) for child in node.children or ())
            elif not intermediate:
                raise IncompleteStream

    def collect(self, intermediate: bool = False, **options: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (result, its value) of this task and all that it has called; options as `get`'s."""
        for _, node in self.iterdeps(intermediate):
            yield node, node.get(**options)


class EagerResult(AsyncResult):
    """The result of a task that `apply` has run here: no store has it."""

    def __init__(
        self,
        id: str,
        ret_value: Any,
        state: str,
        traceback: Any = None,
        name: Any = None,
        **app: Any,
    ) -> None:
        super().__init__(id, **app)
        self._cache = {"status": state, "result": ret_value, "traceback": traceback, "name": name}

    def ready(self) -> bool:
        """Return True."""
        return True

    def forget(self) -> None:
        """Do nothing."""

    def revoke(self, *args: Any, **kwargs: Any) -> None:
        """Let it be REVOKED: the task itself has ended already."""
        self._cache = {"status": REVOKED, "result": TaskRevokedError("revoked")}

    def __reduce__(self) -> Any:
        return type(self), (self.id, self.result, self.state, self.traceback, self.name)


def _as_they_end(wanted: Any, also: Any, progress: bool, *how: Any) -> Iterator[AsyncResult]:
    """Yield results as they have their ends, until all `wanted` have; how: as `Store.wait`."""
    yield from [leaf for leaf in wanted if leaf._cache is not None]
    unknown = {leaf.id: leaf for leaf in (*wanted, *also) if leaf._cache is None}
    missing = {leaf.id for leaf in wanted} & unknown.keys()
    if not missing:
        return
    began = drawn = time.monotonic()
    seen = "ipykernel" in sys.modules or sys.stderr is not None and sys.stderr.isatty()
    ends: list[str] = []
    try:
        for found in wanted[0].backend.wait(list(unknown), *how):
            for id, pair in found.items():
                ends.append(unknown[id]._keep(pair)["status"])
                yield unknown[id]
            missing -= found.keys()
            if not missing:
                return
            if progress and seen and time.monotonic() - drawn > 0.1:
                drawn = time.monotonic()
                _draw_bar(len(unknown), ends, drawn - began)
    finally:
        if progress and seen:
            _draw_bar(len(unknown), ends, time.monotonic() - began, "\n")


def _draw_bar(total: int, ends: list[str], seconds: float, end: str = "") -> None:
    """Show how far a long wait has come: the states of the tasks that have ended so far."""
    done, rate = len(ends), len(ends) / max(seconds, 1e-6)
    failed = done - ends.count(SUCCESS)
    text = f"[{'#' * (30 * done // total):<30}] {done}/{total}  {rate:,.0f}/s"
    text += f"  {failed} failed" if failed else ""
    text += f"  {(total - done) / rate:.0f} s left" if rate else ""
    print(f"\r{text:<78}", end=end, file=sys.stderr, flush=True)


class ResultSet(ResultBase):
    """Several results as one: `ResultSet([add.delay(1, 1), add.delay(2, 2)]).get()`."""

    _parts = property(lambda several: several.results)

    def __init__(self, results: Iterable[Any], app: Any = None, **_: Any) -> None:
        self.results: list[Any] = list(results)
        self.app = app_or_default(app or next((result.app for result in self.results), None))

    def add(self, result: Any) -> None:
        """Add a result, unless it is there."""
        if result not in self.results:
            self.results.append(result)

    def waiting(self) -> bool:
        """Return whether one has no end yet."""
        return not self.ready()

    def completed_count(self) -> int:
        """Return how many ended well."""
        return sum(meta["status"] == SUCCESS for meta in _metas(self._flat()))

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)


class GroupResult(ResultSet):
    """The results of a group, in the order of its tasks."""

    def __init__(
        self, id: Any = None, results: Any = None, parent: Any = None, app: Any = None, **_: Any
    ) -> None:
        super().__init__(results or (), app)
        self.id = id
        self.parent = parent

    children = property(lambda group: group.results, doc="The results.")

    def save(self) -> None:
        """Keep the group in the store, for `GroupResult.restore(id)`."""
        row = (f"{_CHORD}{self.id}", "SAVED", _json_encode({"result": self.as_tuple()}))
        self.backend.put_results([(*row, self.app.conf.seconds("result_expires"))])

    def delete(self) -> None:
        """Remove a saved group from the store; its tasks' results stay."""
        self.backend.forget([f"{_CHORD}{self.id}"])

    @classmethod
    def restore(cls, id: str, app: Any = None) -> GroupResult | None:
        """Return the group that was saved under an id, or None."""
        app, key = app_or_default(app), f"{_CHORD}{id}"
        found = app.backend.get_results([key]).get(key)
        return found and result_from_tuple(json.loads(found[1])["result"], app)

    def __bool__(self) -> bool:
        return bool(self.id or self.results)


def result_from_tuple(found: Any, app: Any = None) -> Any:
    """Return the result that `as_tuple` has described, or a result as it is."""
    if isinstance(found, ResultBase):
        return found
    (id, parent), nodes = found if isinstance(found[0], (list, tuple)) else ((found[0], None), None)
    app, parent = app_or_default(app), parent and result_from_tuple(parent, app)
    if nodes is None:
        return AsyncResult(id, app=app, parent=parent)
    return GroupResult(id, [result_from_tuple(node, app) for node in nodes], parent, app=app)


# ==== 8. Canvas ==================================================================================


def _item(key: str, doc: str, inside: str | None = None) -> Any:
    """Return a property that is an item of the dict, or of that in its item `inside`."""

    def place(sig: Any) -> Any:
        return sig[inside] if inside else sig

    def write(sig: Any, value: Any) -> None:
        place(sig)[key] = value

    return property(lambda sig: place(sig).get(key), write, doc=doc)


def _listed(value: Any) -> list[Any]:
    """Return what may be nothing, one thing or a list of things, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def _name_list(names: Any) -> list[Any]:
    """Return names given as a list, or as text with commas."""
    names = names.split(",") if isinstance(names, str) else _listed(names)
    return [name.strip() if isinstance(name, str) else name for name in names if name]


def _signature_of(value: Any, app: Any = None) -> Any:
    """Return a copy of a signature, or of what a dict describes, chunks as group; or TypeError."""
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        raise TypeError(f"{_repr(value, 60)} is no signature: expected one such as add.s(2, 2)")
    sig = maybe_signature(value, app, True)
    return sig.group() if isinstance(sig, chunks) else sig


def _links(linked: Any) -> list[Any]:
    """Return the signatures in `link` or `link_error`: one or a list; a task's name will do."""
    named = (Signature(sig) if isinstance(sig, str) else sig for sig in _listed(linked))
    return [_signature_of(sig) for sig in named]


class Signature(dict):
    """A call of a task that is not sent yet: `add.s(2, 2)`. A dict, so that JSON can hold it. Its
    arguments may be partial: those of the call come before them. `immutable` ones take no more."""

    TYPES: dict[str, Any] = {}  # the classes of composed signatures by `subtask_type`
    _app: Any = None
    _type: Any = None

    task = _item("task", "The task's name.")
    name = task
    args = _item("args", "Positional arguments.")
    kwargs = _item("kwargs", "Keyword arguments.")
    options = _item("options", "What `apply_async` is given.")
    subtask_type = _item("subtask_type", "'chain', 'group', ...; None for a plain task.")
    immutable = _item("immutable", "Whether it takes no more arguments.")
    id = _item("task_id", "The task's id, once it is known.", "options")

    def __init__(
        self, task: Any = None, args: Any = None, kwargs: Any = None, options: Any = None,
        subtask_type: str | None = None, immutable: bool = False, app: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        self._app = app
        if isinstance(task, Task):
            self._type, task = task, task.name
        fields = {"task": task, "args": tuple(args or ()), "kwargs": kwargs or {}}
        options = {**(options or {}), **more}
        super().__init__(fields, options=options, subtask_type=subtask_type, immutable=immutable)
        if isinstance(task, dict):
            super().update(task)

    @classmethod
    def register_type(cls, name: str | None = None) -> Any:
        """Return a class decorator: signatures of this `subtask_type` are of that class."""

        def register(kind: Any) -> Any:
            cls.TYPES[name or kind.__name__] = kind
            return kind

        return register

    @classmethod
    def from_dict(cls, data: Any, app: Any = None) -> Any:
        """Return the signature, of its own class, that a dict describes."""
        name = data.get("subtask_type")
        if name and name not in cls.TYPES:
            raise ValueError(f"subtask_type {name!r}: expected one of {_names(cls.TYPES)}")
        sig = dict.__new__(cls.TYPES[name] if name else Signature)
        Signature.__init__(sig, data, app=app)
        sig._revive()
        return sig

    def _revive(self) -> None:
        """Make signatures of the dicts that a composed one holds, and copies of signatures."""

    @property
    def app(self) -> Any:
        """The app that it is called with: its own, or that of the first task in it."""
        if self._app is not None or self._type is not None:
            return self._app or self._type.app
        inner = [sig for sig in (self._inner() or ())[:2] if sig._inner() != []]
        return inner[0].app if inner else app_or_default()

    type = property(lambda sig: sig._type or sig.app.tasks[sig["task"]], doc="The task itself.")

    # -- making others of it ---------------------------------------------------------------------
    def _merge(self, args: Any, kwargs: Any, options: Any = None) -> tuple[Any, Any, Any]:
        """Return (args, kwargs, options) with others added."""
        merged = {**self.options, **(options or {})}
        if self.immutable:
            return self.args, self.kwargs, merged
        return (*(args or ()), *self.args), {**self.kwargs, **(kwargs or {})}, merged

    def clone(self, args: Any = None, kwargs: Any = None, app: Any = None, **options: Any) -> Any:
        """Return a copy with these arguments and options added, and an app where it has none."""
        args, kwargs, merged = self._merge(args, kwargs, options)
        for name in ("link", "link_error"):
            if name in merged:
                merged[name] = _listed(merged[name])
        new = {**self, "args": args, "kwargs": dict(kwargs), "options": merged}
        try:
            sig = type(self).from_dict(new, self._app or app)
        except RecursionError:
            raise ValueError(f"{_repr(self, 200)} contains itself") from None
        sig._type = self._type
        return sig

    def set(self, immutable: bool | None = None, **options: Any) -> Any:
        """Set options, and return the signature: `add.s(2).set(countdown=10)`."""
        if immutable is not None:
            self.set_immutable(immutable)
        self.options.update(options)
        return self

    def set_immutable(self, immutable: bool) -> None:
        """Say whether the signature takes no more arguments."""
        self.immutable = immutable

    def _linked(self, option: str, sig: Any) -> Any:
        linked = self.options[option] = _listed(self.options.get(option))
        if _signature_of(sig) not in linked:
            linked.append(sig)
        return sig

    def link(self, sig: Any) -> Any:
        """Call `sig` with the result when the task has succeeded; return `sig`."""
        return self._linked("link", sig)

    def link_error(self, sig: Any) -> Any:
        """Call `sig` when the task has failed; return `sig`."""
        return self._linked("link_error", sig)

    def on_error(self, sig: Any) -> Any:
        """Call `sig` when the task has failed; return the signature itself."""
        self.link_error(sig)
        return self

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, Signature):
            return NotImplemented
        return chain(self, other, app=self._app)

    def __ior__(self, other: Any) -> Any:  # a dict's own would change it
        return self | other

    # -- calling it ------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task here and return its result."""
        args, kwargs, _ = self._merge(args, kwargs)
        return self.type(*args, **kwargs)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send it with these arguments added."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send it with arguments and options added; return its result."""
        args, kwargs, options = self._merge(args, kwargs, options)
        task = self._type or self.app.tasks.get(self["task"])
        if task is None:  # a worker may know it
            return self.app.send_task(self["task"], args, kwargs, **options)
        return task.apply_async(args, kwargs, **options)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run it here, as a worker would; return its EagerResult."""
        args, kwargs, options = self._merge(args, kwargs, options)
        return self.type.apply(args, kwargs, **options)

    def __invert__(self) -> Any:
        """Send it, wait for its result and return that: `~add.s(2, 2)`, for a shell."""
        return self.apply_async().get()

    def freeze(self, _id: str | None = None, **options: Any) -> Any:
        """Give it the id that it will have, and such options as `root_id`; return its result."""
        for name, value in (("task_id", _id or uuid()), *options.items()):
            if value is not None:
                self.options.setdefault(name, value)
        result = AsyncResult(self.options["task_id"], app=self.app)
        task = self._type or dict.get(self.app.tasks, self.task)
        ignored = self.options.get("ignore_result", task is not None and task.ignore_result)
        result.ignored = bool(ignored) and not self.options.get("chord")
        return result

    def _inner(self) -> Any:
        """Return the signatures that it is made of, in their order; None if it is one task."""

    def _tasks(self, last: bool = False) -> list[Any]:
        """Return the single tasks in it, in their order; with `last` only those whose ends are its
        end, such as a chain's last."""
        inner = self._inner()
        if inner is None:
            return [self]
        if last and not isinstance(self, group):
            inner = inner[-1:]
        return [task for sig in inner for task in sig._tasks(last)]

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()

    def __reduce__(self) -> Any:
        return signature, (dict(self),)

    def reprcall(self, *args: Any, **kwargs: Any) -> str:
        """Return the call as text: 'proj.tasks.add(2, 2)'."""
        shown = [_repr(arg) for arg in (*args, *self.args)]
        shown += [f"{key}={_repr(value)}" for key, value in {**self.kwargs, **kwargs}.items()]
        return f"{self['task']}({', '.join(shown)})"

    __repr__ = reprcall


def _joined(tasks: Iterable[Any]) -> list[Any]:
    """Return the steps of a chain of these: a group that is followed by another step becomes a
    chord, a chord takes it as the continuation of its body. So only the last is ever composed."""
    steps: list[Any] = []
    for task in tasks:
        unrolled = isinstance(task, chain) or isinstance(task, group) and len(task.tasks) < 2
        steps += _joined(task.tasks) if unrolled else [task]
    for index, step in enumerate(steps[:-1]):
        if isinstance(step, (group, chord)):
            rest = steps[index + 1 :]
            body = chain(*rest, app=step._app) if len(rest) > 1 else rest[0]
            if isinstance(step, group):
                step = chord(step, body=body, app=step._app)
            else:
                step.body = step.body | body
            return [*steps[:index], step]
    return steps


def _of_task(sigs: Any, text: str) -> str:
    """Leave the module of the first task out of later ones, as Celery prints it."""
    module = sigs[0]["task"].rpartition(".")[0] if sigs else ""
    head, dot, rest = text.partition(f"{module}.") if module else (text, "", "")
    return head + dot + rest.replace(f"{module}.", "")


def _given(tasks: tuple[Any, ...]) -> Iterable[Any]:
    """Return what a chain or group is made of: its arguments, or those in the only one."""
    if len(tasks) != 1 or isinstance(tasks[0], (str, dict)) or not hasattr(tasks[0], "__iter__"):
        return tasks
    return tasks[0]


def _single(sig: Any) -> Any:
    """Return a signature that ends with one task, whose result is a list where it was a group's."""
    end = sig
    while end._inner() and not isinstance(end, group):
        end = end._inner()[-1]
    if isinstance(end, group):
        return sig | Signature("celery.accumulate", kwargs={"index": 0}, app=sig._app)
    return sig


def _headed(sig: Any, rest: Any) -> Any:
    """Return a signature's first step, whose option `chain` holds the rest, the last one first."""
    rest = rest or []
    if isinstance(sig, chain):
        first, *others = sig.tasks
        first.options.update(sig.options, task_id=first.id)
        if sig.immutable:
            first.set_immutable(True)
        sig, rest = first, [*rest, *reversed(others)]
    if rest:
        sig.options["chain"] = rest
    return sig


def _place(sig: Any, group_id: Any = None, group_index: Any = None, chord: Any = None) -> None:
    """Note in the last tasks of a signature which chord, or else which group, it is a part of."""
    for leaf in sig._tasks(last=True) if chord or group_id else ():
        if chord or not leaf.options.get("group_id"):
            leaf.options.update(group_id=group_id, group_index=group_index, chord=chord)


def _add_trail(result: Any) -> Any:
    """Note a result among the children of the task that runs here; return it."""
    running, request = _running()
    if running is not None and running.trail:
        request.children.append(result)
    return result


class _Composed(Signature):
    """A signature of several tasks: a chain, a group or a chord."""

    tasks = _item("tasks", "The signatures that it is made of.", "kwargs")

    def __init__(self, *tasks: Any, **options: Any) -> None:
        """Do nothing: `__new__` has made it."""

    @classmethod
    def _of(cls, kwargs: dict[str, Any], options: Any, app: Any) -> Any:
        name = cls.__name__
        data = {"task": f"celery.{name}", "kwargs": kwargs, "subtask_type": name}
        return cls.from_dict({**data, "options": options}, app)

    def _revive(self) -> None:
        tasks = [_signature_of(task, self._app) for task in self.tasks]
        self.kwargs = {**self.kwargs, "tasks": tasks}

    def set_immutable(self, immutable: bool) -> None:
        """Say whether the tasks in it that are called first take no more arguments."""
        for sig in self.tasks if isinstance(self, group) else self._inner()[:1]:
            sig.set_immutable(immutable)

    def _linked(self, option: str, sig: Any) -> Any:
        """Have the last in it call `sig`; as an errback all, but for the header of a chord."""
        last = option == "link"
        if isinstance(self, chord) and not last:
            last = not self.app.conf.task_allow_error_cb_on_chord_header
        for task in self._inner()[-1:] if last else self._inner():
            getattr(task, option)(sig)
        return sig

    def _pass_links(self) -> None:
        """Move what is linked to it to the tasks in it that call it."""
        for option in ("link", "link_error"):
            for sig in _listed(self.options.pop(option, None)):
                getattr(self, option)(sig)

    def _inner(self) -> list[Any]:
        return self.tasks

    def _frozen(self) -> tuple[Any, dict[str, Any]]:
        """Take its options: give its tasks their ids and place; return its result and the rest."""
        options, self.options = self.options, {}
        place = {name: options.pop(name, None) for name in ("group_id", "group_index", "chord")}
        result = self.freeze(options.pop("task_id", None), root_id=options.get("root_id"))
        _place(self, **place)
        return result, options

    def apply_async(
        self, args: Any = None, kwargs: Any = None, add_to_parent: bool = True, **options: Any
    ) -> Any:
        """Send it; return its result. Options are for the first task of a chain, all of a group or
        chord; but there `countdown` and `eta` for the header, `link`, `link_error` for the body."""
        if self.app.conf.task_always_eager:
            return self.apply(args, kwargs, **options)
        sig = self.clone(**options)
        result, options = sig._frozen()
        sent = sig._send((*(args or ()), *self.args), kwargs, options) or result
        if add_to_parent and sent is not None:
            _add_trail(sent)
        return result


@Signature.register_type()
class chain(_Composed):  # noqa: N801
    """Tasks one after the other, each called with the result of the one before:
    `chain(add.s(2, 2), mul.s(8))()` or `(add.s(2, 2) | mul.s(8))()`. A group followed by a task
    becomes a chord."""

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        sig = cls._of({"tasks": _given(tasks)}, options, app)
        only = sig.tasks[0] if len(sig.tasks) == 1 else None
        return only.set(**sig.options) if isinstance(only, (group, chord)) else sig

    def _revive(self) -> None:
        super()._revive()
        self.tasks = _joined(self.tasks)
        self._pass_links()

    __call__ = Signature.delay

    def freeze(self, _id: str | None = None, root_id: str | None = None, **_: Any) -> Any:
        """Give every step its id; return the result of the last, whose parents are the others'."""
        _id, result = self.options.get("task_id", _id), None
        for step in self.tasks:
            found = step.freeze(_id if step is self.tasks[-1] else None, root_id=root_id)
            found._lineage()[-1].parent, result = result, found
            self.id = found.id
        return result

    def _send(self, args: Any, kwargs: Any, options: Any) -> Any:
        rest = options.pop("chain", None)
        if not self.tasks:
            return None
        return _headed(self, rest).apply_async(args, kwargs, add_to_parent=False, **options)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run one step after the other here; return the last result, or the first that failed."""
        sig = self.clone(**options)
        sig.freeze()
        sig.options.pop("task_id", None)
        result: Any = None
        with allow_join_result():
            for step in sig.tasks:
                given = args if result is None else (result.get(),)
                found = step.apply(given, kwargs, **sig.options)
                found._lineage()[-1].parent, result, kwargs = result, found, None
                if not result.successful():
                    break
        return result

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        return _of_task(self.tasks, " | ".join(map(repr, self.tasks))) or "chain()"


@Signature.register_type()
class group(_Composed):  # noqa: N801
    """Tasks side by side, inner groups unrolled: `group(add.s(i, i) for i in range(10))()`."""

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        return cls._of({"tasks": _given(tasks)}, options, app)

    def _revive(self) -> None:
        super()._revive()
        parts = (task.tasks if isinstance(task, group) else [task] for task in self.tasks)
        self.tasks = [task for part in parts for task in part if task._inner() != []]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.apply_async(args, **options)

    def __or__(self, other: Any) -> Any:
        if isinstance(other, Signature) and (not isinstance(other, group) or other.tasks):
            return chord(self, body=other, app=self._app)
        return super().__or__(other)

    def link(self, sig: Any) -> Any:
        """Call `sig`, with no more arguments than it has, when the first task has succeeded."""
        return self.tasks[0].link(_signature_of(sig).set(immutable=True))

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> Any:
        """Have the tasks wait, each `step` seconds longer than the one before."""
        for index, task in enumerate(self.tasks):
            wait = start + index * step
            task.set(countdown=wait if stop is None else min(wait, stop))
        return self

    def freeze(self, _id: Any = None, root_id: Any = None, places: bool = True, **_: Any) -> Any:
        """Give every task its id, and its place in the group; return the GroupResult."""
        gid = self.options.setdefault("task_id", _id or uuid())
        results = [task.freeze(root_id=root_id) for task in self.tasks]
        for index, task in enumerate(self.tasks if places else ()):
            _place(task, gid, index)
        return self._result(results)

    def _send(self, args: Any, kwargs: Any, options: Any) -> None:
        for name, hint in (("link", "use a chord"), ("link_error", "do that on individual tasks")):
            if options.pop(name, None):
                raise TypeError(f"Cannot add link to group: {hint}")
        options.pop("chain", None)  # a group ends its chain
        with self.app._batch():
            for task in self.tasks:
                task.apply_async(args, kwargs, add_to_parent=False, **options)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run every task here; return a GroupResult."""
        return self._result([task.apply(args, kwargs, **options) for task in self.tasks])

    def _result(self, results: list[Any]) -> Any:
        if len(results) == 1 and isinstance(results[0], GroupResult):
            return results[0]  # of a chain that ends with a group
        return GroupResult(self.id or uuid(), results, app=self.app)

    def __repr__(self) -> str:
        return _of_task(self.tasks, f"group({self.tasks!r})") if self.tasks else "group(<empty>)"


@Signature.register_type()
class chord(_Composed):  # noqa: N801
    """A task that is called with the results of others, in a list: `chord(header)(body)`."""

    header = _item("header", "The header, a group.", "kwargs")
    tasks = property(lambda sig: sig.header.tasks, doc="The signatures in the header.")
    body = _item("body", "The signature that gets the results.", "kwargs")

    def __new__(cls, header: Any, body: Any = None, app: Any = None, **options: Any) -> Any:
        return cls._of({"kwargs": {}, "header": header, "body": body}, options, app)

    def _revive(self) -> None:
        header, body = self.header, self.body
        if isinstance(header, dict):
            header = _signature_of(header, self._app)
        if not isinstance(header, group):
            header = group(header.tasks if isinstance(header, chain) else header, app=self._app)
        header.tasks = [_single(task) for task in header.tasks]
        self.kwargs = {"kwargs": {}, **self.kwargs, "header": header}
        if body is not None:
            self.body = _signature_of(body, self._app)
            self._pass_links()

    def __call__(self, body: Any = None, **options: Any) -> Any:
        return (self if body is None else self.clone(kwargs={"body": body})).apply_async(**options)

    def freeze(self, _id: str | None = None, root_id: str | None = None, **_: Any) -> Any:
        """Give every task its id; return the body's result, whose eldest parent is the header's."""
        result = self.body.freeze(_id, root_id=root_id)
        # Without places: Celery gives the header of a later step another id.
        header = self.header.freeze(root_id=root_id, places=False)
        result._lineage()[-1].parent = header
        for part in header._flat():
            part.ignored = False  # the body needs it
        self.options["task_id"] = header.id  # there Celery looks for the group's id
        return result

    def _frozen(self) -> tuple[Any, dict[str, Any]]:
        if self.body is None:
            raise ImproperlyConfigured(f"{self!r}: call it with a body, chord(header)(body)")
        others = "countdown eta parent_id root_id task_id chain group_id group_index chord".split()
        own = {name: value for name, value in self.options.items() if name not in others}
        self.body.options.update(own)
        return super()._frozen()

    def _send(self, args: Any, kwargs: Any, options: Any) -> None:
        app, kwargs = self.app, {**self.kwargs["kwargs"], **(kwargs or {})}
        if not app.keeps_results:
            why = "this app has backend='disabled://': leave that out, or name another"
            raise ImproperlyConfigured(f"a chord needs the results of its tasks, and {why}")
        body = _headed(self.body, options.pop("chain", None))
        header, leaves = self.header, self.header._tasks(last=True)
        with app._batch() as batch:
            if leaves:
                delivery = app._unlock_delivery(header.id, body, [leaf.id for leaf in leaves])
                batch.chords.append((header.id, len(leaves), delivery))
            else:
                body.apply_async(([],), add_to_parent=False)
            for index, task in enumerate(header.tasks):
                # Not before: each part of a chord to come would hold all that follows it.
                _place(task, header.id, index, body)
                task.apply_async(args, kwargs, add_to_parent=False, **options)

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run the header and then the body here; return the body's result."""
        sig = self.clone(**options)
        result, _ = sig._frozen()
        kwargs = {**self.kwargs["kwargs"], **(kwargs or {})}
        parts = sig.header.apply((*(args or ()), *self.args), kwargs)
        with allow_join_result():
            for part in parts._flat():
                if part.state in PROPAGATE_STATES:
                    exc = ChordError(f"Dependency {part.id} raised {part.result!r}")
                    _body_failed(self.app, Context(is_eager=True), sig.body, exc, None)
                    return EagerResult(result.id, exc, FAILURE, app=self.app, parent=parts)
            result = sig.body.apply((parts.get(),))
        result._lineage()[-1].parent = parts
        return result

    def _inner(self) -> list[Any]:
        return [self.header] if self.body is None else [self.header, self.body]

    def __repr__(self) -> str:
        if self.body is None:
            return f"<chord without body: {self.header.tasks!r}>"
        steps = self.body.tasks if isinstance(self.body, chain) else [self.body]
        text = steps[0].reprcall(self.header.tasks)
        if len(steps) > 1:
            text = f"({text} | {chain(*steps[1:])!r})"
        return "%" + _of_task(steps, text)


@Signature.register_type()
class xmap(Signature):  # noqa: N801
    """A task called with each item of a list, in one message: `tsum.map([[1, 2], [3]])`."""

    _star = ""

    def __init__(self, task: Any, it: Any, **options: Any) -> None:
        kind, options = type(self).__name__, {"immutable": True, "app": task.app, **options}
        kwargs = {"task": task, "it": list(it)}
        super().__init__(f"celery.{kind.lstrip('x')}", (), kwargs, subtask_type=kind, **options)

    def __repr__(self) -> str:
        items = _repr(self.kwargs["it"], 100)
        return f"[{self.kwargs['task']['task']}({self._star}x) for x in {items}]"


@Signature.register_type()
class xstarmap(xmap):  # noqa: N801
    """A task called with the arguments that each item of a list is: `add.starmap([(2, 2)])`."""

    _star = "*"


@Signature.register_type()
class chunks(xmap):  # noqa: N801
    """Calls of a task in messages of `n` each: `add.chunks(zip(range(100), range(100)), 10)`."""

    def __init__(self, task: Any, it: Any, n: int, **options: Any) -> None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n={_repr(n, 60)}: expected how many items a chunk has, 1 or more")
        super().__init__(task, it, **options)
        self.kwargs["n"] = n

    def group(self) -> Any:
        """Return a group of one `starmap` for each chunk."""
        task = maybe_signature(self.kwargs["task"], self.app)
        items, n = self.kwargs["it"], self.kwargs["n"]
        parts = [items[start : start + n] for start in range(0, len(items), n)]
        return group((xstarmap(task, part) for part in parts), app=self._app)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send all chunks; return the GroupResult."""
        return self.group().apply_async(args, kwargs, **{**self.options, **options})

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run all chunks here; return the GroupResult."""
        return self.group().apply(args, kwargs, **{**self.options, **options})

    __call__, __repr__ = apply_async, Signature.__repr__


def signature(varies: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a signature of a task, its name, or a dict: `signature('tasks.add', args=(2, 2))`."""
    if isinstance(varies, (str, Task)):
        return Signature(varies, *args, **kwargs)
    return _signature_of(varies, kwargs.get("app"))


subtask = signature


def maybe_signature(data: Any, app: Any = None, clone: bool = False) -> Any:
    """Return a signature for a dict that is one, anything else as it is; with `clone` a copy."""
    if not isinstance(data, dict):
        return data
    if not isinstance(data, Signature):
        data = Signature.from_dict(data, app)
    elif clone:
        data = data.clone(app=app)  # so have those in it
    if data._app is None:
        data._app = app
    return data


# ==== 9. Task and app ============================================================================


class Exchange(collections.namedtuple("Exchange", "name type")):
    """Where messages are sent that find their queues by routing key: 'direct' (it must be equal),
    'topic' (in a queue's key `*` is one word, `#` any number) or 'fanout' (every bound queue)."""

    def __new__(cls, name: str = "", type: str = "direct", **_: Any) -> Any:
        if type not in ("direct", "topic", "fanout"):
            why = f"exchange {name!r} has type {type!r}: expected 'direct', 'topic' or 'fanout'"
            raise ImproperlyConfigured(why)
        return super().__new__(cls, name, type)


class Queue(collections.namedtuple("Queue", "name exchange routing_key")):
    """A queue: `Queue('images', Exchange('media', type='topic'), routing_key='media.image.#')`."""

    def __new__(cls, name: str, exchange: Any = None, routing_key: str = "", **more: Any) -> Any:
        if isinstance(exchange, str):
            exchange = Exchange(exchange, more.get("exchange_type") or "direct")
        return super().__new__(cls, name, exchange, routing_key)


class Router:
    """Says which queues a task goes to, by `task_queues`, `task_routes` and what the call asks."""

    def __init__(self, app: TaskQ) -> None:
        self.app, conf = app, app.conf
        self.routes = [_route(entry) for entry in _listed(conf.task_routes)]
        name, listed = conf.task_default_queue, conf.task_queues
        exchange = Exchange(conf.task_default_exchange or name, conf.task_default_exchange_type)
        self.default = Queue(name, exchange, conf.task_default_routing_key or name)
        self.queues: dict[str, Queue] = {}
        self._bound = False
        for queue in [self.default] if listed is None else listed:
            self.add(queue)

    def add(self, queue: Any) -> None:
        """Add a queue, with the default exchange and key where it names none."""
        if isinstance(queue, str):
            queue = Queue(queue, Exchange(queue), queue)
        try:  # kombu's Queue will do, too
            name, exchange, key = queue.name, queue.exchange, queue.routing_key
        except AttributeError:
            why = f"{_repr(queue, 60)} is no queue: expected a name or a Queue object"
            raise ImproperlyConfigured(why) from None
        if getattr(queue, "alias", None) or getattr(queue, "bindings", None):
            why = "taskq has no Broadcast, and binds a queue to one exchange"
            raise ImproperlyConfigured(f"{_repr(queue, 60)}: {why}")
        name.encode()  # what the store could not keep is an error here
        is_named = bool(getattr(exchange, "name", ""))
        exchange = Exchange(exchange.name, exchange.type) if is_named else self.default.exchange
        self.queues[name] = Queue(name, exchange, key or self.default.routing_key)

    def queue(self, queue: Any) -> Queue:
        """Return the queue of a name; makes it where `task_create_missing_queues` allows."""
        name: Any = getattr(queue, "name", queue)
        if not isinstance(name, str) or name not in self.queues:
            if isinstance(queue, str) and not self.app.conf.task_create_missing_queues:
                raise QueueNotFound(f"Queue {name!r} missing from task_queues")
            self.add(queue)
        return self.queues[name]

    def options(self, name: str, args: Any, kwargs: Any, options: Any, task: Any) -> dict[str, Any]:
        """Return `options` over what the first route that matches the task says."""
        for route in self.routes:
            found = route(name, args, kwargs, options, task=task)
            if found is not None:
                if isinstance(found, str) or hasattr(found, "routing_key"):
                    found = {"queue": found}
                elif not isinstance(found, dict):
                    why = (
                        f"task_routes has {_repr(found, 60)} for {name}: expected a queue or a dict"
                    )
                    raise ImproperlyConfigured(why)
                return {**found, **{k: v for k, v in options.items() if v is not None}}
        return options

    def resolve(self, options: dict[str, Any]) -> tuple[list[str], str, str]:
        """Return (names of queues, exchange, routing key) for queue=, exchange=, routing_key=."""
        asked, exchange, key = map(options.get, ("queue", "exchange", "routing_key"))
        exchange = getattr(exchange, "name", exchange)
        if asked or not exchange:
            queue = self.queue(asked) if asked else self.default
            if queue.exchange.type == "direct" and not (exchange and key):
                return [queue.name], "", queue.name
            exchange, key = exchange or queue.exchange.name, key or queue.routing_key
        if not self._bound:
            self.bind(self.queues.values())
            self._bound = True
        found = self.app.store.bound(exchange, key or "")
        if not found:
            where = f"exchange {exchange!r} with routing key {key!r}"
            raise QueueNotFound(f"no queue is bound to {where}: list it in task_queues")
        return found, exchange, key or ""

    def bind(self, queues: Iterable[Queue]) -> None:
        """Make the bindings of these queues known to the store."""
        for name, exchange, key in queues:
            self.app.store.bind(exchange.name, exchange.type, key, name)


def _route(entry: Any) -> Callable[..., Any]:
    """Return an entry of `task_routes`, a function or its name, a pair, or a table of them, as a
    function (name, args, kwargs, options, task=) -> options or None."""
    if callable(entry) or isinstance(entry, str):
        return _symbol(entry) if isinstance(entry, str) else entry
    is_pair = isinstance(entry, (list, tuple)) and isinstance(entry[0], (str, re.Pattern))
    table, translate = dict([entry] if is_pair else entry), _symbol("fnmatch:translate")
    globs = {key: re.compile(translate(key)) for key in table if isinstance(key, str)}
    patterns: Any = [(globs.get(key, key), found) for key, found in table.items()]

    def route(name: str, *_: Any, **__: Any) -> Any:
        if name in table:
            return table[name]
        return next((found for pattern, found in patterns if pattern.match(name)), None)

    return route


def _import_if_there(name: str) -> Any:
    """Return a module, or None if there is none of this name; what goes wrong in it is raised."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name and f"{name}.".startswith(f"{exc.name}."):
            return None
        raise  # what the module imports is missing


def _symbol(name: str) -> Any:
    """Return what 'module', 'module:attribute' or 'module.attribute' names."""
    module, _, attribute = name.partition(":")
    if not attribute and _import_if_there(name) is None:
        module, _, attribute = name.rpartition(".")
    found = importlib.import_module(module or name)
    try:
        return functools.reduce(getattr, filter(None, attribute.split(".")), found)
    except AttributeError as exc:
        raise ImportError(f"cannot import {name!r}: {exc}", name=name) from None


#: A call that is ready to be sent: its message, the body as the signals see it, and the deliveries.
Prepared = collections.namedtuple("Prepared", "message payload deliveries")


def tell_published(calls: Iterable[Prepared]) -> None:
    """Tell the receivers of `after_task_publish` of calls that were sent."""
    for (headers, properties, *_), payload, _ in calls if after_task_publish.receivers else ():
        info = properties["delivery_info"]
        after_task_publish.send(sender=headers["task"], body=payload, headers=headers, **info)


class Batch(types.SimpleNamespace):
    """What is sent together, all or none; with a task's end also others' results, chords' parts."""

    def __init__(self) -> None:
        super().__init__(calls=[], chords=[], results=[], parts=[], app=None)


class Context(types.SimpleNamespace):
    """A task's request: what is known of this call of it (`self.request` in a bound task)."""

    id = task = args = kwargs = argsrepr = kwargsrepr = shadow = lang = origin = _unset
    root_id = parent_id = group = group_index = chain = chord = reply_to = _unset
    callbacks = errbacks = eta = expires = timelimit = max_retries = _unset
    delivery_info = correlation_id = headers = properties = hostname = _unset
    stamps = stamped_headers = taskset = logfile = loglevel = _unset
    retries = replaced_task_nesting = 0
    called_directly = utc = True
    #: The events to send with the task's end: (type, fields) pairs; None: nobody asks for them.
    _events: Any = None
    ignore_result = is_eager = replaced = _protected = False

    def __init__(self, fields: Any = (), **more: Any) -> None:
        fields = {**dict(fields), **more}
        self.__dict__.update({name: v for name, v in fields.items() if v is not None})
        self.follow_ups = Batch()  # what is settled together with the task's own end
        self.children: list[Any] = []  # the results of the tasks that this one has called

    def __repr__(self) -> str:
        return f"<Context: { {k: v for k, v in vars(self).items() if k != 'follow_ups'} }>"

    time_limit = property(lambda request: (request.timelimit or (None, None))[0], doc="Seconds.")
    soft_time_limit = property(lambda request: (request.timelimit or (None, None))[1], doc="Same.")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set attributes."""
        self.__dict__.update(*args, **kwargs)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default`."""
        return getattr(self, key, default)


#: What a message's body says beside its arguments, and the options of a call that say so.
_EMBEDDED = {"callbacks": "link", "errbacks": "link_error", "chain": "chain", "chord": "chord"}


def request_of(message: Message, args: Any, kwargs: Any, embed: Any, hostname: str) -> Context:
    """Return the request of a message: its headers, its delivery and its arguments."""
    headers, properties = message.headers, message.properties
    info = properties.get("delivery_info") or {}
    where = {"exchange": info.get("exchange", ""), "routing_key": info.get("routing_key")}
    where.update(priority=properties.get("priority"), redelivered=bool(info.get("redelivered")))
    own = {name: headers[name] for name in headers.keys() - vars(Context).keys()} or None
    fields = {**headers, **{name: embed.get(name) for name in _EMBEDDED}}
    fields.update({name: properties.get(name) for name in ("correlation_id", "reply_to")})
    fields.update(args=args, kwargs=kwargs, headers=own, hostname=hostname, properties=properties)
    return Context(fields, called_directly=False, delivery_info=where)


def _forwarded(operation: Callable[..., Any]) -> Any:
    return lambda proxy, *args, **kw: operation(proxy._get_current_object(), *args, **kw)


class Proxy:
    """Stands for an object that is looked up at each use."""

    __slots__ = ("_get_current_object", "__weakref__")

    def __init__(self, find: Callable[[], Any]) -> None:
        object.__setattr__(self, "_get_current_object", find)

    __getattr__ = _forwarded(getattr)
    __setattr__ = _forwarded(setattr)
    __delattr__ = _forwarded(delattr)  # unittest.mock.patch('tasks.add.delay') does that
    __call__ = _forwarded(lambda found, *args, **kw: found(*args, **kw))
    __bool__ = _forwarded(bool)
    __eq__ = _forwarded(lambda found, other: found == other)
    __hash__ = _forwarded(hash)
    __repr__ = _forwarded(repr)
    __reduce__ = _forwarded(lambda found: found.__reduce__())
    __class__ = property(_forwarded(type))  # type: ignore[assignment]
    __doc__ = property(_forwarded(lambda found: found.__doc__))  # type: ignore[assignment]


#: Every app that is alive, the one that is current, and what `shared_task` has made for all.
_apps: weakref.WeakSet[Any] = weakref.WeakSet()
_current: list[Any] = []
_shared: list[Callable[[Any], Any]] = []
#: What `@app.task` has made, by name: other apps make it theirs when they look it up.
_by_name: dict[str, Callable[[Any], Any]] = {}


def app_or_default(app: TaskQ | None = None) -> TaskQ:
    """Return `app`, or the current one."""
    if app is None and not _current:
        TaskQ("default").home = None  # it becomes the current one
    return _current[-1] if app is None else app


current_app: Any = Proxy(app_or_default)
current_task: Any = Proxy(lambda: _thread.stack[-1][0] if _thread.stack else None)


#: Attributes of a task whose defaults are settings: `time_limit` is `task_time_limit`.
_FROM_SETTINGS = {re.sub("^task_(default_)?", "", n): n for n in SETTINGS if n[:4] == "task"}


class Task:
    """A task: what `@app.task` makes of a function, or the base of a class with a `run` method.
    Attributes set in a class or by the decorator's options override the settings they are named
    after. Handlers that a subclass may define: before_start(task_id, args, kwargs),
    on_success(retval, task_id, args, kwargs); on_failure and on_retry(exc, task_id, args, kwargs,
    einfo); after_return(status, retval, task_id, args, kwargs, einfo)."""

    MaxRetriesExceededError = MaxRetriesExceededError
    OperationalError = OperationalError

    app: Any = current_app
    name: str = None  # type: ignore[assignment]
    typing = True  # whether calls are checked against the function's signature
    max_retries: int | None = 3  # how often `retry` may run it again; None is without end
    default_retry_delay: float = 180  # seconds until a retry that names no time
    trail = send_events = retry_jitter = True
    expires: Any = None  # seconds, or a datetime, after which a call that has not begun is REVOKED
    resultrepr_maxsize = 1024
    queue = exchange = routing_key = None
    #: Exceptions: those that are expected, logged at INFO without a traceback; that are retried.
    throws: Any = ()
    autoretry_for = dont_autoretry_for = throws
    retry_kwargs: dict[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
    bind = False
    __header__: Any = None

    def __getattr__(self, name: str) -> Any:
        if name in _FROM_SETTINGS:
            return self.app.conf[_FROM_SETTINGS[name]]
        raise AttributeError(f"task {self.name!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.__dict__.pop("_defaults", None)  # see _call_defaults

    backend = property(lambda task: task.app.backend, doc="The store that keeps its results.")

    def acks_on(self, timeout: bool) -> bool:
        """Return whether a late task that failed, or ran into its time limit, is acknowledged."""
        value = self.acks_on_timeout if timeout else self.acks_on_failure
        return self.acks_on_failure_or_timeout if value is None else value

    # -- running it here -------------------------------------------------------------------------
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The task's body; a class must define it."""
        raise NotImplementedError("Tasks must define the run method.")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = _thread.stack
        if stack and stack[-1][0] is self:
            request = stack[-1][1]
            if not request.called_directly and not request._protected:
                request._protected = True  # the worker's own call, through a custom __call__
                return self.run(*args, **kwargs)
        stack.append((self, Context(args=args, kwargs=kwargs)))
        try:
            return self.run(*args, **kwargs)
        finally:
            stack.pop()

    @property
    def request(self) -> Context:
        """The request of the innermost call of this task in this thread."""
        requests = (request for task, request in reversed(_thread.stack) if task is self)
        return next(requests, None) or Context()

    def push_request(self, *fields: Any, **more: Any) -> None:
        """Have `request` hold these fields until `pop_request`, as in a test of the task's body."""
        _thread.stack.append((self, Context(*fields, **more)))

    def pop_request(self) -> None:
        """Undo `push_request`."""
        _thread.stack.pop()

    def _handler(self, *args: Any) -> None:
        """Called at one of the moments in a task's life that the class names; does nothing."""

    before_start = on_success = on_failure = on_retry = after_return = _handler

    # -- calling it ----------------------------------------------------------------------------
    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send the task with these arguments: `add.delay(2, 2)`."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> AsyncResult:
        """Send the task; return its AsyncResult. Raises TypeError for wrong arguments, EncodeError
        for such as cannot be serialized, OperationalError where the store cannot be written.
        countdown: seconds to wait; eta: the datetime to wait for (a naive one is UTC).
        expires: seconds or datetime after which it is not begun any more, but REVOKED.
        queue, exchange, routing_key: where to; priority: 0 (highest) to 9.
        headers: own headers; shadow: a name for the log; time_limit, soft_time_limit: seconds.
        retry, retry_policy: whether and how to try again when the store cannot be written.
        link, link_error: signatures to call when it has succeeded, or failed.
        serializer: 'json' or 'pickle'; ignore_result: keep no result."""
        app = self.app
        if self.typing and app.strict_typing:
            self.__header__(*(args or ()), **(kwargs or {}))
        if not app.conf.task_always_eager:
            return app.send_task(self.name, args, kwargs, self, **options)
        serializer = options.get("serializer", self.serializer) or app.conf.task_serializer
        content_type, _, body = serialize((args or (), kwargs or {}), serializer)
        args, kwargs = deserialize(body, content_type, [content_type])
        with allow_join_result(False):
            return self.apply(args, kwargs, **options)

    def _call_defaults(self) -> dict[str, Any]:
        """Return what the task says of its calls; kept until an attribute or a setting changes."""
        made = self.app.conf.made
        kept, defaults = self.__dict__.get("_defaults", (None, {}))
        if kept is not made:
            if self.app.tasks and (self.soft_time_limit or 0) > (self.time_limit or float("inf")):
                raise ValueError("soft_time_limit must be less than or equal to time_limit")
            defaults = {name: getattr(self, name) for name in _SHARED_OPTIONS}
            self.__dict__["_defaults"] = made, defaults
        return defaults

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> EagerResult:
        """Run the task here and now, as a worker would; return its EagerResult. Options as of
        `apply_async`; throw: raise its error, which is `task_eager_propagates` by default."""
        _check_call_options(options)
        app, options = self.app, {**self._call_defaults(), **options}
        get, throw = options.get, options.get("throw")
        throw = app.conf.task_eager_propagates if throw is None else throw
        args, kwargs = args or (), dict(kwargs or {})
        fields = app._headers(self.name, args, kwargs, options, None)
        fields.update(callbacks=_links(get("link")), errbacks=_links(get("link_error")))
        fields.update(args=args, kwargs=kwargs, headers=get("headers"), hostname=_hostname())
        fields.update(called_directly=False, is_eager=True)
        info = {name: get(name) for name in ("exchange", "routing_key", "priority")}
        request = Context(fields, delivery_info={**info, "is_eager": True})
        run = run_task(self, request, bool(throw))
        if isinstance(run.value, Retry) and run.value.sig is not None:  # raised or returned
            return run.value.sig.apply(throw=throw)
        if request.follow_ups.results:
            app.backend.put_results(request.follow_ups.results)
        value = run.value.exc if run.state == RETRY else run.value
        value = None if run.state in (IGNORED, REJECTED) else value
        return EagerResult(request.id, value, run.state, run.traceback, self.name, app=app)

    # -- steering it -----------------------------------------------------------------------------
    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, **more: Any) -> Retry:
        """Run this call of the task again: `raise self.retry(exc=exc, countdown=10)`. More options:
        `max_retries`, and those of `apply_async`; `countdown` is `default_retry_delay` by default.
        Raises Retry (`throw=False` returns it); when the retries are used up or no worker runs the
        task, `exc` if given. The message is sent in the transaction that ends this run."""
        request = self.request
        if request.called_directly:
            raise exc or Retry("Task can be retried", None)
        throw, limit = more.pop("throw", True), more.pop("max_retries", None)
        eta, when = more.get("eta"), more.get("countdown")
        if limit is not None:
            request.update(max_retries=limit)
        if eta is None and when is None:
            when = more["countdown"] = self.default_retry_delay
        sig = self.signature_from_request(request, args, kwargs, **more)
        sig.options["retries"] = retries = request.retries + 1
        limit = self.max_retries if limit is None else limit
        if limit is not None and retries > limit:
            args, kwargs = sig.args, sig.kwargs
            text = f"Can't retry {self.name}[{request.id}] args:{args} kwargs:{kwargs}"
            raise exc or self.MaxRetriesExceededError(text, task_args=args, task_kwargs=kwargs)
        again = Retry(None, exc, when if eta is None else eta)
        again.sig = sig
        if not request.is_eager:  # else `apply` does it
            with self.app._batch(request.follow_ups):
                sig.apply_async(add_to_parent=False)
        if throw:
            raise again
        return again

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Signature:
        """Return a signature that sends a request once more, with its id and what follows it."""
        request = request or self.request
        args = request.args if args is None else args
        kwargs = request.kwargs if kwargs is None else kwargs
        info, fields = request.delivery_info or {}, vars(request)
        priority = info.get("priority")  # Celery on other brokers has more than 9
        again = {name: fields.get(name) for name in _CARRIED_OPTIONS}
        again.update({option: request.get(name) for name, option in _EMBEDDED.items()})
        again.update(zip(("time_limit", "soft_time_limit"), request.timelimit or ()))
        again.update(task_id=request.id, group_id=request.group)
        again["priority"] = priority and min(priority, 9)
        if info.get("exchange") and not options.get("queue"):
            again.update(exchange=info["exchange"], routing_key=info["routing_key"])
        else:
            again["queue"] = info.get("routing_key")
        again = {name: value for name, value in again.items() if value is not None}
        return self.signature(args, kwargs, {**again, **options})

    subtask_from_request = signature_from_request

    # -- canvas ----------------------------------------------------------------------------------
    def signature(self, *args: Any, **options: Any) -> Signature:
        """Return a signature: `add.signature((2, 2), countdown=10)`; arguments as Signature's."""
        return Signature(self, *args, **{"app": self.app, **options})

    subtask = signature

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """Return the signature of a call, which may be partial: `add.s(2)`."""
        return self.signature(args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """Return the signature of a call that takes no more arguments: `add.si(2, 2)`."""
        return self.signature(args, kwargs, immutable=True)

    def map(self, it: Iterable[Any]) -> xmap:
        """Return a signature of calls with each item, in one message: `tsum.map([[1, 2], [3]])`."""
        return xmap(self.s(), it, app=self.app)

    def starmap(self, it: Iterable[Any]) -> xstarmap:
        """Return the same with the arguments that each item holds: `add.starmap([(2, 2)])`."""
        return xstarmap(self.s(), it, app=self.app)

    def chunks(self, it: Iterable[Any], n: int) -> chunks:
        """Return a signature of calls in messages of `n` items: `add.chunks(zip(a, b), 10)`."""
        return chunks(self.s(), it, n, app=self.app)

    def replace(self, sig: Any) -> Any:
        """Run another signature in this task's place: `return self.replace(add.s(2, 2))`. It takes
        over its id, callbacks, chord and the rest of its chain, and is sent with the end of this
        run; raises Ignore. In eager mode returns its result."""
        request = self.request
        if sig.options.get("chord"):
            raise ImproperlyConfigured("A signature replacing a task must not be part of a chord")
        if isinstance(sig, chain) and not sig.tasks:
            raise ImproperlyConfigured("Cannot replace with an empty chain")
        sig = _single(sig.clone())
        sig.freeze(request.id, root_id=request.root_id)
        if request.is_eager:
            return self.on_replace(sig)
        for callback in request.callbacks or ():
            sig.link(callback)
        for errback in request.errbacks or ():
            sig.link_error(errback)
        nesting = {"replaced_task_nesting": request.replaced_task_nesting + 1}
        sig.set(**nesting, root_id=request.root_id)
        for step in reversed(request.chain or ()):
            sig |= maybe_signature(step, self.app, True).set(**nesting)
        _place(sig, request.group, request.group_index, request.chord)
        return self.on_replace(sig)

    def on_replace(self, sig: Any) -> Any:
        """Send what replaces the task; a subclass may define it, and call this one at its end."""
        request = self.request
        if request.is_eager:
            return sig.apply().get(disable_sync_subtasks=False)
        with self.app._batch(request.follow_ups):
            sig.delay()
        request.update(replaced=True)
        raise Ignore("Replaced by new task")

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Add a signature to the chord that this task is a part of, send it and return its result;
        with `lazy` return the signature, to be sent by its `delay`."""
        request = self.request
        if not request.chord:
            raise ValueError("Current task is not member of any chord")
        sig = _single(sig)
        sig.freeze(root_id=request.root_id)
        _place(sig, request.group, request.group_index, request.chord)
        with self.app._batch() as batch:
            batch.chords.append((request.group, 1, None))
            return sig if lazy else sig.delay()

    def update_state(self, task_id: Any = None, state: Any = None, meta: Any = None) -> None:
        """Set the task's state, own names included, and what `AsyncResult.info` shows meanwhile:
        `self.update_state(state='PROGRESS', meta={'done': 3, 'of': 10})`."""
        request, state = self.request, state or PENDING
        about = Context(vars(request), id=task_id or request.id)
        if about.id is None:
            raise ValueError("update_state: no task runs here; pass task_id")
        self.backend.put_results([result_row(self.app, about, state, meta)])

    def send_event(self, type_: str, **fields: Any) -> None:
        """Send an event about this call: `self.send_event('task-progress', percent=50)`."""
        request = self.request
        EventDispatcher(self.app, request.hostname).send(type_, uuid=request.id, **fields)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802
        """Return the result of a call of this task by its id."""
        return self.app.AsyncResult(task_id, **kwargs)

    def __reduce__(self) -> Any:
        return _task_by_name, (self.name, self.__module__)

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {repr(self.app).partition(' ')[2]}"


def _task_by_name(name: str, module: str) -> Task:
    """Return the task that a pickle names."""
    if module not in sys.modules:
        _symbol(module)
    return current_app.tasks[name]


def _running() -> tuple[Any, Any]:
    """Return the task that this thread runs, but for those called as functions, and its request."""
    for entry in reversed(_thread.stack):
        if not entry[1].called_directly:
            return entry
    return None, None


#: Options that both a call and a task may have: the call's come first, then the task's attributes.
_SHARED_OPTIONS = """queue exchange routing_key priority expires serializer ignore_result
    time_limit soft_time_limit""".split()
#: Options of a call that it keeps when it is sent again, by the names of its request.
_CARRIED_OPTIONS = """root_id parent_id shadow expires headers reply_to origin ignore_result
    stamped_headers stamps replaced_task_nesting group_index""".split()
#: What `apply_async` takes besides args and kwargs.
_CALL_OPTIONS = {*_SHARED_OPTIONS, *_CARRIED_OPTIONS, *_EMBEDDED.values()}.union(
    "task_id countdown eta retry retry_policy retries argsrepr kwargsrepr add_to_parent group_id "
    "throw exchange_type delivery_mode".split()  # the last two are there for Celery's routes
)
#: Options, and what classes may define, of Celery's tasks that taskq does not have.
_FOREIGN_OPTIONS = """compression pydantic retry_on_worker_lost Request Strategy on_bound
    shadow_name""".split()


def _check_call_options(options: dict[str, Any]) -> None:
    for name in options.keys() - _CALL_OPTIONS:
        if options[name] is not None:
            hint = _hint(name, _CALL_OPTIONS, 0.6)
            raise TypeError(f"apply_async() has no option {name!r}{hint}")


def _check_task_options(options: dict[str, Any], base: Any) -> None:
    _rate(options.get("rate_limit"))  # ValueError
    for name in _FOREIGN_OPTIONS:
        if options.get(name) or getattr(base, name, None):
            raise TypeError(f"taskq has no task option {name!r}; leave it out")
    for name in options.keys() - _FROM_SETTINGS.keys():
        hint = "" if hasattr(base, name) else _hint(name, [*_FROM_SETTINGS, *dir(base)], 0.8)
        if hint:
            raise TypeError(f"unknown task option {name!r}{hint}")


class TaskRegistry(dict):
    """The tasks of an app by name; also finds, but does not list, those of the process's other apps
    (unless made with `shared=False`) and those that canvas is made of."""

    app: Any = None

    def __missing__(self, name: str) -> Any:
        if name not in _by_name:
            raise NotRegistered(name)
        return _by_name[name](self.app)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a task, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _by_name


def _origin(module: dict[str, Any] | None = None) -> tuple[str, str | None]:
    """Return the directory that a module is imported from, and its name there (None in a notebook
    or REPL), by its globals; by default those of the script that runs as `__main__`."""
    if module is None:
        module = vars(sys.modules.get("__mp_main__") or sys.modules["__main__"])
    path, name, spec = map(module.get, ("__file__", "__name__", "__spec__"))
    if not path or name is None:
        return os.getcwd(), None
    if name in ("__main__", "__mp_main__"):
        if spec is None:
            root, name = _package_root(path)
            return root, name if path.endswith(".py") else None
        name = spec.name
    root, file = os.path.split(os.path.abspath(path))
    for _ in range(name.count(".") + (file == "__init__.py")):
        root = os.path.dirname(root)
    return root, name[:-9] if name.endswith(".__main__") else name


def _derived(make: Callable[[Any], Any]) -> Any:
    """Return a property of an app that is made of its settings: anew when one has changed."""

    def get(app: Any) -> Any:
        made = app.conf.made
        if make not in made:
            made[make] = make(app)
        return made[make]

    return property(get, doc=make.__doc__)


def _with_app(make: Any) -> Any:
    """Return a property of an app: a function, or class, to be called with it."""
    return property(lambda app: functools.partial(make, app=app), doc=make.__doc__)


class TaskQ:
    """An app: its settings, its tasks, and its way to the store. Celery's class, by this name too.

        app = TaskQ('proj', broker='sqlite:///proj.db', include=['proj.tasks'])

    Without a broker messages and results are in taskq.db beside the package or script that makes
    the app. `backend` may name another sqlite:// file, or disabled:// for no results; 'rpc://' and
    None keep them with the messages. Other keyword arguments are settings."""

    task_cls: Any = Task  # the base of the tasks, or 'module:Class'; a subclass may name another

    def __init__(
        self, main: str | None = None, *, broker: Any = None, backend: Any = None,
        task_cls: Any = None, set_as_current: bool = True, strict_typing: bool = True,
        config_source: Any = None, namespace: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.main = main
        #: Whether calls are checked against the signatures of tasks, unless their `typing` is off.
        self.strict_typing = strict_typing
        #: Where the store is, if no broker says so.
        self.home: str | None = _origin(sys._getframe(1).f_globals)[0]
        #: Counts the tasks: a background worker's children are forked anew for new ones.
        self.generation = 0
        #: The name of the worker in this process.
        self.node: str | None = None
        self.finalized = self._finalizing = False
        self._lock = threading.RLock()
        self._discover: list[tuple[Any, Any]] = []
        self._tasks = TaskRegistry()
        self._tasks.app = self
        self.on_after_configure = Signal("on_after_configure", "source")
        self.on_after_finalize = Signal("on_after_finalize")
        self.clock = LamportClock()  # remote control and events carry it along
        self.control = Control(self)  # `app.control.inspect().active()`
        receiver = functools.partial(EventReceiver, app=self)
        #: What receives events, `app.events.Receiver(...)`, and keeps them, `app.events.State()`.
        self.events = types.SimpleNamespace(Receiver=receiver, State=State)
        self._conf = Settings()
        self._source: Any = None  # what is still to be read into it
        for name in settings.keys() - SETTINGS.keys():
            if not re.match("(beat|broker|control|event|redis|result|task|worker)_", name):
                known = (*(TaskQ.__init__.__kwdefaults__ or ()), *SETTINGS)
                raise TypeError(f"TaskQ() has no option {name!r}{_hint(name, known, 0.6)}")
        named = {"broker_url": broker, "result_backend": backend}
        given = {name: value for name, value in named.items() if value is not None}
        self._conf.update(given, **settings)
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        self.task_cls = task_cls or self.task_cls
        _apps.add(self)
        if set_as_current:
            self.set_current()

    @functools.cached_property
    def Task(self) -> Any:  # noqa: N802
        """The base class of its tasks; may be set."""
        return _symbol(self.task_cls) if isinstance(self.task_cls, str) else self.task_cls

    def set_current(self) -> None:
        """Make this the app that `current_app` and `shared_task` mean."""
        _current[:] = [self]

    set_default = set_current
    current_task = property(lambda app: current_task._get_current_object(), doc="What runs here.")
    current_worker_task = property(lambda app: _running()[0], doc="The same, unless called as f().")

    @property
    def conf(self) -> Settings:
        """The app's settings; a configuration is read when they are first asked for."""
        if self._source is not None:
            with self._lock:
                source, self._source = self._source, None  # what is read may use the app
                try:
                    obj, silent, namespace = source or ({}, True, None)
                    with contextlib.suppress(ImportError) if silent else contextlib.nullcontext():
                        self._conf.load(_symbol(obj) if isinstance(obj, str) else obj, namespace)
                except BaseException:
                    self._source = source
                    raise
        return self._conf

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take settings from an object, or the name of a module, when one is first needed, with
        `force` now; what is set on the app itself stands above them. With a namespace only names
        that begin with it count; `silent` passes over a module that does not exist."""
        self._source = obj, silent, namespace
        if force:
            self.conf  # noqa: B018 - reading it loads the source

    def config_from_envvar(self, variable_name: str, silent: bool = False, **more: Any) -> bool:
        """Take settings from the module that a variable of the environment names, if it is set."""
        module = os.environ.get(variable_name)
        if module:
            self.config_from_object(module, silent, **more)
        elif not silent:
            raise ImproperlyConfigured(f"the environment variable {variable_name!r} is not set")
        return bool(module)

    # -- stores and routes -----------------------------------------------------------------------
    @_derived
    def store(self) -> Store:
        """Where the app's messages are."""
        url = self.conf.broker_url
        if not url and self.home is None:
            why = "no app has been made yet: import its module first"
            raise ImproperlyConfigured(f"{why} (in proj/__init__.py: from .celery import app)")
        url = url or "sqlite:///" + os.path.join(self.home or "", "taskq.db")
        url = url if isinstance(url, str) else ";".join(url)
        options = {**self.conf.broker_transport_options, **(self.conf.broker_use_ssl or {})}
        return self._opened(url, options)

    @_derived
    def keeps_results(self) -> bool:
        """Whether there is a place for results at all."""
        return not str(self.conf.result_backend).startswith("disabled")

    @_derived
    def backend(self) -> Store:
        """Where the app's results are; in the store of the messages they settle with them."""
        conf, url = self.conf, self.conf.result_backend
        if not url or url.startswith("rpc") or url == conf.broker_url:
            return self.store
        if not self.keeps_results:
            return _Disabled()
        options = {**conf.result_backend_transport_options, **(conf.redis_backend_use_ssl or {})}
        options.pop("global_keyprefix", None)  # see _opened
        tuned = re.compile("redis_(backend_)?(?=socket|health)")
        options.update({tuned.sub("", k): v for k, v in conf.items() if v and tuned.match(k)})
        return self._opened(url, options)

    def _opened(self, url: str, options: dict[str, Any]) -> Store:
        prefix = self.conf.result_backend_transport_options.get("global_keyprefix")
        if prefix:  # it stands before the names of results alone
            options["result_prefix"] = prefix + ("" if prefix[-1] in ":_-." else "_")
        return open_store(url, options)

    @_derived
    def router(self) -> Router:
        """The app's routes and queues."""
        return Router(self)

    timezone = property(lambda app: _zone(app.conf.timezone), doc="The tzinfo of that setting.")

    def now(self) -> datetime:
        """Return the time now, aware, in the app's time zone."""
        return datetime.now(self.timezone)

    # -- tasks -----------------------------------------------------------------------------------
    @property
    def tasks(self) -> TaskRegistry:
        """The tasks by name; shared tasks are added when it is first asked for."""
        if not self.finalized:
            self.finalize()
        return self._tasks

    def finalize(self) -> None:
        """Add shared tasks and set what `task_annotations` says; happens by itself, when the app
        first looks a task up. Sends `on_after_configure` before and `on_after_finalize` after."""
        with self._lock:  # other threads wait until all is there
            if not self._finalizing:
                self._finalizing = True  # what it leads to may ask for tasks
                self.on_after_configure.send(sender=self, source=self.conf)
                for task in list(self._tasks.values()):
                    self._annotate(task)
                for make in _shared:
                    make(self)
                self.finalized = True
                self.on_after_finalize.send(sender=self)

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a task of a function: `@app.task` or `@app.task(bind=True, max_retries=5)`.
        bind: its first argument is the task itself; name: instead of 'module.function'; base: a
        subclass of Task. Other options become attributes of the task."""
        if len(args) > 1 or args and not callable(args[0]):
            raise TypeError(f"@app.task takes one function, and options by name: {_repr(args, 60)}")
        shared = options.pop("shared", True)

        def make(fun: Any) -> Any:
            task = self._task_from_fun(fun, **options)
            if shared:
                again = {**options, "name": task.name}
                _by_name[task.name] = lambda app: app._task_from_fun(fun, **again)
            return task

        return make(*args) if args else make

    def _task_from_fun(self, fun: Any, name: Any = None, base: Any = None, **options: Any) -> Any:
        base = base or self.Task
        _check_task_options(options, base)
        name = name or self.gen_task_name(fun.__name__, fun.__module__)
        attributes = {k: v for k, v in options.items() if v is not None or k not in _FROM_SETTINGS}
        run = fun if options.get("bind") else staticmethod(fun)
        attributes.update(name=name, run=run, __module__=fun.__module__)
        task = type(fun.__name__, (base,), attributes)()
        return self._register(functools.update_wrapper(task, task.run, updated=()))

    def register_task(self, task: Any) -> Any:
        """Register an instance (or class) of a task class; return the instance."""
        task = task() if isinstance(task, type) else task
        cls = type(task)
        _check_task_options(vars(cls), cls)
        if not task.name:
            task.name = self.gen_task_name(cls.__name__, cls.__module__)
        return self._register(task)

    def _register(self, task: Any) -> Any:
        task.app, task.__header__ = self, _arguments_check(task.run)
        if task.autoretry_for:
            _add_autoretry(task)
        with self._lock:
            self._tasks[task.name] = task
            self.generation += 1
        if self._source is None:  # else `finalize` does it
            self._annotate(task)
        return task

    def _annotate(self, task: Any) -> None:
        annotations = self.conf.task_annotations or {}
        for changes in (annotations.get("*") or {}, annotations.get(task.name) or {}):
            _check_task_options(changes, task)
            for attribute, value in changes.items():
                setattr(task, attribute, value)

    def gen_task_name(self, name: str, module: str | None) -> str:
        """Return the automatic name of a function, 'proj.tasks.add'; may be overridden."""
        if module in (None, "__main__", "__mp_main__"):
            module = _origin()[1] or self.main or "__main__"
        return f"{module}.{name}"

    def autodiscover_tasks(
        self, packages: Any, related_name: str | None = "tasks", force: bool = False
    ) -> None:
        """Have workers import the module `related_name` of each package (a list, or a function that
        returns it) that has one; with `force` it is imported now."""
        if not force:
            self._discover.append((packages, related_name))
            return
        for package in (packages() if callable(packages) else packages) or ():
            if _import_if_there(package) is None:  # 'proj.apps.Config' may name a class
                package = package.rpartition(".")[0] or package
                importlib.import_module(package)
            if related_name:
                _import_if_there(f"{package}.{related_name}")

    def import_default_modules(self) -> None:
        """Import what `autodiscover_tasks`, `imports` and `include` name."""
        for packages, related_name in self._discover:
            self.autodiscover_tasks(packages, related_name, force=True)
        for name in (*_listed(self.conf.imports), *_listed(self.conf.include)):
            importlib.import_module(name)
        self.finalize()

    # -- sending ---------------------------------------------------------------------------------
    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, task_type: Any = None, **options: Any
    ) -> AsyncResult:
        """Send a task by name, registered here or not; options as `apply_async`'s."""
        if task_type is None and self.conf.task_always_eager:
            warnings.warn(AlwaysEagerIgnored("send_task ignores task_always_eager"), stacklevel=2)
        task = task_type or dict.get(self._tasks, name)
        prepared = self._prepare(name, args, kwargs, options, task)
        if _thread.batch is not None and _thread.batch.app is self:
            _thread.batch.calls.append(prepared)
        else:
            self._publish([prepared], options.get("retry"), options.get("retry_policy"))
        headers = prepared.message.headers
        result = AsyncResult(headers["id"], app=self)
        result.ignored = bool(headers["ignore_result"]) and self.keeps_results
        return _add_trail(result) if options.get("add_to_parent", True) else result

    @contextlib.contextmanager
    def _batch(self, into: Batch | None = None) -> Iterator[Batch]:
        """Gather what this thread sends; the outermost, or the owner of `into`, sends it then."""
        outer = _thread.batch
        if into is None and outer is not None and outer.app is self:
            yield outer
            return
        batch = _thread.batch = Batch() if into is None else into
        batch.app = self
        try:
            yield batch
        finally:
            _thread.batch = outer
        if into is None:
            self._publish(batch.calls, chords=batch.chords)

    def _prepare(self, name: str, args: Any, kwargs: Any, options: Any, task: Any) -> Prepared:
        """Make the message of a call; nothing is sent yet."""
        args, kwargs = args or (), kwargs or {}
        if not isinstance(args, (list, tuple)):
            raise TypeError(f"task args must be a list or tuple: {_repr(args, 60)}")
        if not isinstance(kwargs, (dict, collections.abc.Mapping)):
            raise TypeError(f"task keyword arguments must be a mapping: {_repr(kwargs, 60)}")
        if task is not None:
            options = {**task._call_defaults(), **options}
        router = self.router
        if router.routes:
            options = router.options(name, args, kwargs, options, task)
        _check_call_options(options)
        queues, exchange, routing_key = router.resolve(options)
        get = options.get
        due = next((_moment(name, get(name)) for name in ("eta", "countdown") if get(name)), None)
        headers = self._headers(name, args, kwargs, options, due)
        priority, (_, parent) = get("priority"), _running()
        if priority is None and parent is not None and self.conf.task_inherit_parent_priority:
            priority = (parent.delivery_info or {}).get("priority")
        if priority is not None and (type(priority) is not int or not 0 <= priority <= 9):
            raise ValueError(f"priority={_repr(priority, 60)}: expected 0 (highest) to 9")
        priority = priority or 0
        info = {"exchange": exchange, "routing_key": routing_key}
        properties = {"correlation_id": headers["id"], "delivery_tag": headers["id"]}
        properties.update(delivery_mode=2, delivery_info=info, priority=priority)
        properties["reply_to"] = get("reply_to") or ""
        embed = {field: get(option) for field, option in _EMBEDDED.items()}
        for field in ("callbacks", "errbacks"):
            embed[field] = _links(embed[field]) or None
        payload = (args, kwargs, embed)
        if before_task_publish.receivers:
            named = {"headers": headers, "properties": properties, "body": payload, **info}
            policy = {**self.conf.task_publish_retry_policy, **(get("retry_policy") or {})}
            declare = [router.queues.get(queue, router.default) for queue in queues]
            named.update(declare=declare, retry_policy=policy)
            before_task_publish.send(name, **named)
        serializer = get("serializer") or self.conf.task_serializer
        message, text = _encode_call(headers, properties, payload, serializer)
        seconds = None if due is None else due.timestamp()
        return Prepared(message, payload, [Delivery(q, priority, seconds, text) for q in queues])

    def _headers(self, name: str, args: Any, kwargs: Any, options: Any, due: Any) -> Any:
        """Return the headers of a call's message, as Celery's protocol 2 has them."""
        get = options.get
        id, expires, (_, parent) = str(get("task_id") or uuid()), get("expires"), _running()
        limits = [get("time_limit"), get("soft_time_limit")]
        if not all(map(_is_limit, limits)):
            text = f"time_limit and soft_time_limit are {limits}: expected seconds or None"
            raise ValueError(text)
        if parent is not None and parent.id == id:  # sent once more by itself
            parent = None
        return {
            "lang": "py",
            "task": name,
            "id": id,
            "shadow": get("shadow"),
            "eta": due and due.isoformat(),
            "expires": None if expires is None else _moment("expires", expires).isoformat(),
            "group": get("group_id"),
            "group_index": get("group_index"),
            "retries": get("retries") or 0,
            "timelimit": limits,
            "root_id": get("root_id") or (parent and (parent.root_id or parent.id)) or id,
            "parent_id": get("parent_id") or (parent and parent.id),
            "argsrepr": get("argsrepr") or _repr(args),
            "kwargsrepr": get("kwargsrepr") or _repr(kwargs),
            "origin": get("origin") or f"gen{os.getpid()}@{_hostname()}",
            "ignore_result": get("ignore_result") if self.keeps_results else True,
            "replaced_task_nesting": get("replaced_task_nesting") or 0,
            "stamped_headers": get("stamped_headers"),
            "stamps": get("stamps") or {},
            **(get("headers") or {}),
        }

    def _publish(
        self, calls: Any, retry: Any = None, policy: Any = None, chords: Any = (), run: Any = None
    ) -> bool:
        """Send calls, all or none, with the policy's retries; return what `Store.publish` does."""
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        for attempt in itertools.count():
            try:
                if chords and self.backend is not self.store:
                    self.backend.publish((), chords)
                    chords = ()
                if not self.store.publish(deliveries, chords, run):
                    return False
                break
            except OperationalError:
                conf = self.conf
                if not (conf.task_publish_retry if retry is None else retry):
                    raise
                default = SETTINGS["task_publish_retry_policy"][0]
                policy = {**default, **conf.task_publish_retry_policy, **(policy or {})}
                if policy["max_retries"] is not None and attempt >= policy["max_retries"]:
                    raise
                step = policy["interval_start"] + attempt * policy["interval_step"]
                time.sleep(min(step, policy["interval_max"]))
        if self.conf.task_send_sent_event:
            EventDispatcher(self).publish(sent_events(calls))
        tell_published(calls)
        return True

    def _unlock_delivery(self, gid: str, body: Any, parts: Iterable[str] = ()) -> Delivery:
        """Return the message that has a chord's body called, for the queue of its first task."""
        first, options = body, body.options
        while first._inner():
            first = first._inner()[0]
            options = {**first.options, **options}
        task = self.tasks.get(first.task)
        options = {**(task._call_defaults() if task else {}), **options}
        options = self.router.options(first.task, first.args, first.kwargs, options, task)
        names = ("queue", "exchange", "routing_key", "priority")
        options = {name: options[name] for name in names if options.get(name) is not None}
        unlock = self.tasks["celery.chord_unlock"]
        kwargs = {"result": [((id, None), None) for id in parts]} if self.backend.foreign else {}
        return self._prepare(unlock.name, (gid, body), kwargs, options, unlock).deliveries[0]

    AsyncResult = _with_app(AsyncResult)
    ResultSet = _with_app(ResultSet)
    signature = _with_app(signature)

    @property
    def GroupResult(self) -> Any:  # noqa: N802
        """The class, to be called with the app, as its method: `app.GroupResult.restore(id)`."""
        make: Any = functools.partial(GroupResult, app=self)
        make.restore = functools.partial(GroupResult.restore, app=self)
        return make

    def Worker(self, **options: Any) -> Worker:  # noqa: N802
        """Return a worker of this app, not started; options as the command line's."""
        return Worker(self, **options)

    def worker(self, **options: Any) -> BackgroundWorker:
        """Return a worker for the background of this process: `with app.worker(concurrency=2):`."""
        return BackgroundWorker(self, options)

    def worker_main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command `worker` with these arguments, by default the program's, as `start`."""
        argv = list(sys.argv if argv is None else argv)
        if "worker" not in argv:
            why = f"the word 'worker' is missing in {argv}; or use app.start"
            raise ValueError(f"worker_main: {why}")
        has_program = argv[0] != "worker" and not argv[0].startswith("-")
        return self.start(argv[has_program:])

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line with this app: `app.start()` at the end of proj/celery.py."""
        return main(argv, app=self)

    # -- watching and steering -------------------------------------------------------------------
    def add_periodic_task(
        self,
        schedule: Any,
        sig: Any,
        args: Any = (),
        kwargs: Any = None,
        name: Any = None,
        **options: Any,
    ) -> str:
        """Have beat send a signature (or a task, with these arguments) by a schedule, which is
        seconds, a timedelta or a crontab: `app.add_periodic_task(30.0, add.s(2, 2), expires=10)`.
        Returns the entry's `name` in `beat_schedule`, by default the call as text."""
        sig = sig if isinstance(sig, Signature) else self.signature(sig)
        sig = sig.clone(args, kwargs, **options)
        entry = {field: sig[field] for field in _ENTRY if sig.get(field) is not None}
        entry["schedule"], key = schedule, name or repr(sig)
        _entry(self, key, entry)  # what is wrong is said here
        if not name and key in self.conf.beat_schedule:
            logger.warning("The periodic task %r replaces another: give each a name", key)
        self.conf["beat_schedule"] = {**self.conf.beat_schedule, key: entry}
        return key

    def connection(self, *_: Any, **__: Any) -> Any:
        """Return what Celery's monitors ask for: `with app.connection() as connection:`."""
        return contextlib.nullcontext(self.store)

    def bugreport(self) -> str:
        """Return the versions and settings that a bug report should name."""
        return bugreport(self)

    def close(self, *exc_info: Any) -> None:
        """Let go of the stores of this thread."""
        for store in list(_stores.values()):
            store.close()

    def __enter__(self) -> TaskQ:
        return self

    __exit__ = close

    def __reduce__(self) -> Any:  # an app of the same settings; its tasks are found by name
        how: Any = {"set_as_current": False, "strict_typing": self.strict_typing}
        make = functools.partial(
            type(self), self.main, config_source=dict(self.conf.changed), **how
        )
        return make, (), {"home": self.home}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.main or '__main__'} at {id(self):#x}>"


Celery = TaskQ


class _Disabled(Store):
    """The place of results where there is none."""

    uri = "disabled://"

    def put_results(self, results: Any, parts: Any = ()) -> list[Delivery]:
        return []

    def get_results(self, ids: Any) -> Any:
        raise NotImplementedError("this app keeps no results: it has backend='disabled://'")

    forget = get_results


def shared_task(*args: Any, **options: Any) -> Any:
    """Make a task for every app, in a module that has none at hand; options as `app.task`'s."""
    if not args:
        return functools.partial(shared_task, **options)
    (fun,) = args
    _shared.append(lambda app: app.task(fun, **options))
    for app in [app for app in _apps if app.finalized]:
        _shared[-1](app)

    def find() -> Any:
        app = app_or_default()
        return app.tasks[options.get("name") or app.gen_task_name(fun.__name__, fun.__module__)]

    return Proxy(find)


def _arguments_check(run: Any) -> Any:
    """Return a function with the signature of `run` that does nothing: a wrong call raises."""
    import inspect

    blank = []
    for parameter in inspect.signature(run).parameters.values():
        default = parameter.default if parameter.default is parameter.empty else None
        blank.append(parameter.replace(default=default, annotation=parameter.empty))
    name = run.__name__ if getattr(run, "__name__", "").isidentifier() else "run"
    names: dict[str, Any] = {}
    # A real call beats Signature.bind 20 times.
    exec(f"def {name}{inspect.Signature(blank)}: pass", names)
    return names[name]


def _add_autoretry(task: Any) -> None:
    """Wrap `run` so that the exceptions of `autoretry_for` retry the task."""
    run, errors = task.run, tuple(_listed(task.autoretry_for))

    @functools.wraps(run)
    def run_or_retry(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (Ignore, Retry, Reject, *_listed(task.dont_autoretry_for)):
            raise
        except errors as exc:
            options = dict(task.retry_kwargs)
            if task.retry_backoff:
                factor = int(max(1.0, task.retry_backoff))
                seconds = max(0, min(task.retry_backoff_max, factor * 2**task.request.retries))
                if task.retry_jitter:
                    seconds = _symbol("random:randrange")(int(seconds) + 1)
                options["countdown"] = seconds
            if task.request.max_retries is not None:  # the function itself has called retry with it
                options["max_retries"] = task.request.max_retries
            raise task.retry(exc=exc, **options) from exc

    task.run = run_or_retry


def _moment(name: str, value: Any) -> datetime:
    """Return an option's time in UTC, perhaps seconds from now (not `eta`); ValueError if none."""
    with contextlib.suppress(OverflowError, ValueError):
        if isinstance(value, (datetime, str)):
            return datetime.fromtimestamp(_timestamp(value), timezone.utc)
        if name != "eta" and (_is_number(value) or isinstance(value, timedelta)):
            wait = value if isinstance(value, timedelta) else timedelta(seconds=value)
            return datetime.now(timezone.utc) + wait
    expected = "a datetime or ISO 8601 text"
    expected += "; for seconds use countdown=" if name == "eta" else ", or seconds"
    raise ValueError(f"{name}={_repr(value, 60)}: expected {expected}")


def _encode_call(headers: Any, properties: Any, payload: Any, serializer: str) -> Any:
    """Return a call's message and its text; EncodeError that names what cannot be serialized."""
    name = headers["task"]
    try:
        content_type, encoding, body = serialize(payload, serializer)
        if encoding == "binary":  # so Celery learns that it has to decode the text first
            properties["body_encoding"] = "base64"
        message = Message(headers, properties, body, content_type, encoding)
        return message, message.encode()
    except (TypeError, ValueError) as exc:
        raise EncodeError(f"{name}: a header cannot be serialized: {exc}") from exc
    except EncodeError as exc:
        args, kwargs, embed = payload
        places = [(f"argument {at!r}", arg) for at, arg in (*enumerate(args, 1), *kwargs.items())]
        places += [(f"what follows it ({at})", value) for at, value in embed.items()]
        for place, value in places:
            try:
                serialize(value, serializer)
            except EncodeError as own:
                raise EncodeError(f"{name}: {place} cannot be serialized: {own}") from None
        raise EncodeError(f"{name}: {exc}") from None


@functools.lru_cache(maxsize=None)
def _hostname() -> str:
    return _symbol("socket:gethostname")()


# ==== 10. Execution ==============================================================================


class ExceptionInfo:
    """An exception as handlers and signals get it: `str(einfo)` is the task's own traceback."""

    def __init__(self, exc: BaseException) -> None:
        import traceback

        tb = exc.__traceback__
        while tb is not None and tb.tb_next is not None and tb.tb_frame.f_globals is globals():
            tb = tb.tb_next
        self.type, self.exception, self.tb = self.exc_info = (type(exc), exc, tb)
        self.traceback = "".join(traceback.format_exception(*self.exc_info))

    def __str__(self) -> str:
        return self.traceback


#: What `run_task` has to tell: the state, the return value or exception, and its traceback as text.
Run = collections.namedtuple("Run", "state value traceback")


def run_task(task: Any, request: Context, propagate: bool = False) -> Run:
    """Run a task as its request says, with its handlers, signals and log lines. Its result, and
    what follows it, are then in `request.follow_ups`. With `propagate` its error is raised. Knows
    no broker: the same in a child process, a thread, and eager mode."""
    id, args, kwargs = request.id or "", request.args, request.kwargs
    cls, stack = type(task), _thread.stack
    stack.append((task, request))
    started = time.monotonic()
    run = Run(None, None, None)  # `propagate` raises the task's error
    try:
        if task_prerun.receivers:
            task_prerun.send(sender=task, task_id=id, task=task, args=args, kwargs=kwargs)
        if task.track_started and not request.is_eager and _keeps_result(task, request, STARTED):
            meta = {"pid": os.getpid(), "hostname": request.hostname}
            with contextlib.suppress(OperationalError):  # it only says so
                task.app.backend.put_results([result_row(task.app, request, STARTED, meta)])
        try:
            if cls.before_start is not Task.before_start:
                task.before_start(id, args, kwargs)
            call = task.run if cls.__call__ is Task.__call__ else task
            run = _succeeded(task, request, call(*args, **kwargs), started)
        except (SystemExit, KeyboardInterrupt):
            raise  # the process ends; see `lost`
        except BaseException as exc:
            if propagate and not isinstance(exc, (Ignore, Reject)):
                raise
            run = _failed(task, request, exc)
        if cls.after_return is not Task.after_return and run.state in READY_STATES:
            einfo = ExceptionInfo(run.value) if run.state != SUCCESS else None
            _tell(task, request, "after_return", run.state, run.value, einfo=einfo)
        return run
    finally:
        try:
            if task_postrun.receivers:
                named = {"task_id": id, "task": task, "args": args, "kwargs": kwargs}
                task_postrun.send(sender=task, retval=run.value, state=run.state, **named)
        finally:
            stack.pop()


def _keeps_result(task: Any, request: Context, state: str) -> bool:
    """Return whether this call keeps a result: what it says stands above the task, and a chord
    above both, for its body needs the results of its parts."""
    if request.is_eager and not task.store_eager_result:
        return False
    if state == FAILURE and task.store_errors_even_if_ignored:
        return True
    ignored = vars(request).get("ignore_result")
    return bool(request.chord or not (task.ignore_result if ignored is None else ignored))


def _keep_result(task: Any, request: Context, state: str, *result: Any) -> None:
    """Note a result (a value, a traceback), if this call keeps one, to be settled with its end."""
    if _keeps_result(task, request, state):
        request.follow_ups.results.append(result_row(task.app, request, state, *result))


def _succeeded(task: Any, request: Context, value: Any, started: float) -> Run:
    """Send what follows, note the return value (or EncodeError); tell handlers, and log."""
    if request.callbacks or request.chain or request.chord:
        _call_next(task.app, request, value)
    _keep_result(task, request, SUCCESS, value)
    runtime = time.monotonic() - started
    if type(task).on_success is not Task.on_success:
        _tell(task, request, "on_success", value)
    if task_success.receivers:
        task_success.send(sender=task, result=value, runtime=runtime)
    if request._events is not None or trace_logger.isEnabledFor(logging.INFO):
        shown = _repr(value, task.resultrepr_maxsize)
        data = {"runtime": runtime, "return_value": shown}
        _log(task, request, logging.INFO, "succeeded in %(runtime)ss: %(return_value)s", data)
        _note_event(request, "succeeded", result=shown, runtime=runtime)
    return Run(SUCCESS, value, None)


def _failed(task: Any, request: Context, exc: Any) -> Run:
    """Note whatever a task has raised, then tell handlers, signals and log."""
    einfo, shown = ExceptionInfo(exc), _repr(exc)
    if isinstance(exc, Retry):
        state, level, message, shown = RETRY, logging.INFO, "retry: %(exc)s", str(exc)
        _keep_result(task, request, RETRY, exc.exc, einfo.traceback)
        _tell(task, request, "on_retry", exc.exc, einfo=einfo)
        task_retry.send(sender=task, request=request, reason=exc, einfo=einfo)
        _note_event(request, "retried", exception=_repr(exc.exc), traceback=einfo.traceback)
    elif isinstance(exc, Ignore):
        state, level, message = IGNORED, logging.INFO, "ignored"
        if not request.replaced:
            _break_off(task.app, request, REVOKED, TaskRevokedError("ignored"))
    elif isinstance(exc, Reject):
        state, level, message = REJECTED, logging.WARNING, "%(exc)s"
        if not exc.requeue:
            _fail(task, request, FAILURE, exc, einfo.traceback)
        _note_event(request, "rejected", requeue=exc.requeue)
    else:
        state, level, message = FAILURE, logging.ERROR, "raised unexpected: %(exc)s"
        if task.throws and isinstance(exc, tuple(_listed(task.throws))):
            level, message = logging.INFO, "raised expected: %(exc)s"
        _fail_for_good(task, request, einfo)
    exc_info = einfo.exc_info if level >= logging.WARNING else None
    _log(task, request, level, message, {"exc": shown}, exc_info)
    return Run(state, exc, einfo.traceback)


def _fail(task: Any, request: Context, state: str, exc: Any, traceback: Any = None) -> None:
    """Note the end of a task that has failed or was revoked, and of what waits for it."""
    request.follow_ups = Batch()  # what was to follow its success does not
    _keep_result(task, request, state, exc, traceback)
    _break_off(task.app, request, state, exc, traceback)


def _note_event(request: Context, what: str, **fields: Any) -> None:
    """Note an event of a task, if anybody wants to hear of it, to be sent after its end."""
    if request._events is not None:
        fields = {"uuid": request.id, "timestamp": time.time(), **fields}
        request._events.append((f"task-{what}", fields))


def _log(task: Any, request: Context, level: int, text: str, data: Any, exc: Any = None) -> None:
    if trace_logger.isEnabledFor(level):
        data = {"id": request.id, "name": request.shadow or task.name, **data}
        trace_logger.log(level, f"Task %(name)s[%(id)s] {text}", data, exc_info=exc)


def _fail_for_good(task: Any, request: Context, einfo: ExceptionInfo) -> None:
    """Note that a task has failed; tell its handler and the receivers of `task_failure`."""
    exc = einfo.exception
    _fail(task, request, FAILURE, exc, einfo.traceback)
    _note_event(request, "failed", exception=_repr(exc), traceback=einfo.traceback)
    if task.name:  # it is known
        _tell(task, request, "on_failure", exc, einfo=einfo)
        named = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs}
        named.update(exception=exc, traceback=exc.__traceback__, einfo=einfo)
        task_failure.send(sender=task, **named)


def _tell(task: Any, request: Context, handler: str, *first: Any, **einfo: Any) -> None:
    """Call a task's handler; the outcome is decided, so its error is logged and changes nothing."""
    try:
        getattr(task, handler)(*first, request.id, request.args, request.kwargs, *einfo.values())
    except Exception as exc:
        if request.is_eager:
            raise
        message = "Task %s[%s] %s handler raised: %r"
        trace_logger.exception(message, task.name, request.id, handler, exc)


def _call_next(app: TaskQ, request: Context, value: Any) -> None:
    """Send the callbacks and the chain's next step of a task that has succeeded, with its end."""
    if request.is_eager:
        for callback in request.callbacks:
            maybe_signature(callback, app).apply((value,))
        return
    place = {"parent_id": request.id, "root_id": request.root_id or request.id}
    with app._batch(request.follow_ups):
        for callback in request.callbacks or ():
            maybe_signature(callback, app, True).apply_async((value,), **place)
        if request.chain:
            *rest, step = request.chain
            maybe_signature(step, app, True).apply_async((value,), **place, chain=rest or None)
    _end_part(app, request)


def _end_part(app: TaskQ, request: Context) -> None:
    """Note, for its store, that a task has ended which may be a part of a chord."""
    group, index = request.group, request.group_index
    if request.chord and isinstance(group, str) and (index is None or _is_count(index)):
        delivery = None
        if app.backend.foreign and isinstance(request.chord, dict):
            delivery = app._unlock_delivery(group, maybe_signature(request.chord, app))
        request.follow_ups.parts.append((group, index, request.id, delivery))


def _break_off(app: TaskQ, request: Context, state: str, exc: Any, traceback: Any = None) -> None:
    """Give what waits for a task that has not succeeded its end, together with the task's own: the
    later steps of its chain have the same, its chord a part that failed; after a FAILURE its
    errbacks are called."""
    try:
        _end_part(app, request)
        _end(app, request, request.chain, state, exc, traceback)
        if state == FAILURE:
            _call_errbacks(app, request, exc, traceback)
    except Exception as error:
        text = "What follows %s[%s] is malformed: %r"
        trace_logger.exception(text, request.task, request.id, error)


def _uncalled(request: Context, sig: Any) -> Context:
    """Return the request of a task that will not be called: it ends with that of another one."""
    get, about = sig.options.get, {"id": sig.id, "args": sig.args, "kwargs": sig.kwargs}
    about.update((name, get(name)) for name in ("chord", "chain", "group_index", "root_id"))
    about.update(task=sig.task, is_eager=request.is_eager)
    found = Context(about, group=get("group_id"), errbacks=_listed(get("link_error")))
    found.follow_ups = request.follow_ups
    return found


def _end(app: TaskQ, request: Context, steps: Any, state: str, exc: Any, traceback: Any) -> None:
    """Note the end of every task in steps of a chain, the next one last, that are not called."""
    for step in reversed(steps or ()):
        for task in maybe_signature(step, app)._tasks():
            about = _uncalled(request, task)
            if isinstance(task.id, str):  # else nobody can ask for it
                about.follow_ups.results.append(result_row(app, about, state, exc, traceback))
                _end_part(app, about)
            _end(app, about, about.chain, state, exc, traceback)


def _body_failed(app: TaskQ, request: Context, body: Any, exc: Any, traceback: Any) -> None:
    """Call the errbacks of a chord's body that cannot be called: those of its first tasks."""
    first = body.tasks[0] if isinstance(body, chain) else body
    for task in first._tasks(last=True):
        _call_errbacks(app, _uncalled(request, task), exc, traceback)


def _call_errbacks(app: TaskQ, request: Context, exc: Any, traceback: Any) -> None:
    """Call the errbacks of a task that failed: here with (request, exc, traceback) if it takes
    them, else as a task with the id of the one that failed."""
    id = request.id
    for errback in request.errbacks or ():
        sig = maybe_signature(errback, app, True)
        try:
            if sig.subtask_type is None and _takes_error(app.tasks.get(sig.task), sig):
                sig(request, exc, traceback)
            elif request.is_eager:
                sig.apply((id,))
            else:
                with app._batch(request.follow_ups):
                    sig.apply_async((id,), parent_id=id, root_id=request.root_id or id)
        except (Exception, SystemExit) as error:  # it may run in the worker's main process
            trace_logger.exception("The errback %r of %s raised: %r", sig, id, error)


def _takes_error(task: Any, sig: Any) -> bool:
    """Return whether a task takes more than one argument beside those of its signature."""
    if task is None or not isinstance(vars(type(task)).get("run"), staticmethod):
        return False
    code = task.__header__.__code__
    named = code.co_varnames[: code.co_argcount]
    left = len(named) - len(sig.args) - len(sig.kwargs.keys() & set(named))
    return left > 1 or bool(code.co_flags & 0x04)  # *args


def execute(app: TaskQ, raw: bytes, hostname: str, begin: Any, events: bool = False) -> Outcome:
    """Turn one message into its Outcome; `begin(task, request)` is called before the task runs.
    With `events` the Outcome has those of the task, unless its `send_events` is off. A message that
    no task can be made of is rejected."""
    began = time.monotonic()
    message = None
    try:
        message = Message.decode(raw)
        args, kwargs, embed = message.payload(app.conf.accept_content)
        request = request_of(message, args, kwargs, embed, hostname)
        task = app.tasks.get(request.task)
        if events and (task is None or task.send_events):
            request._events = []
        if task is None:
            return _unregistered(app, message, request)
        if message.expires is not None and message.expires <= time.time():
            return _revoked(task, request, "expired", expired=True)
        begin(task, request)
        _note_event(request, "started")
        state, value, _ = run_task(task, request)
        verb, reason = "ack", None
        if state == REJECTED:
            verb, reason = "reject", _repr(value)
            if value.requeue:
                verb, reason = "requeue", redelivered(raw)
        elif state == FAILURE and task.acks_late and not task.acks_on(timeout=False):
            verb, reason = "reject", f"failed, and acks_on_failure is off: {_repr(value, 200)}"
        return _settled(request, verb, reason, time.monotonic() - began)
    except SoftTimeLimitExceeded:
        raise  # too late for the task; whoever set the limit takes it
    except Exception as exc:
        return _rejected(app, raw, message, exc)


def _settled(request: Context, verb: str, reason: Any, runtime: float = 0.0) -> Outcome:
    batch, events = request.follow_ups, request._events or []
    tell_published(batch.calls)
    if batch.calls and batch.app.conf.task_send_sent_event:
        events += sent_events(batch.calls)
    publish = [delivery for call in batch.calls for delivery in call.deliveries]
    ends = (batch.chords, batch.parts, events)
    return Outcome(verb, batch.results, publish, reason, runtime, *ends)


def redelivered(raw: bytes) -> str:
    """Return a message's text, marked as delivered once more."""
    message = Message.decode(raw)
    message.headers["redelivered"] = True
    info = message.properties.get("delivery_info") or {}
    message.properties["delivery_info"] = {**info, "redelivered": True}
    if message.content_type == "application/json":
        message.properties.pop("body_encoding", None)
    return message.encode()


def _rejected(app: TaskQ, raw: bytes, message: Message | None, exc: Exception) -> Outcome:
    """Return the end of a message that no task can be made of: it is kept for inspection."""
    reason = str(exc) if isinstance(exc, MalformedMessage) else _repr(exc)
    text = "Received and rejected a malformed message: %s\nIt is kept with the rejected ones: %s"
    worker_logger.error(text, reason, _repr(raw, 200))
    task_rejected.send(sender=None, message=raw, exc=exc)
    if message is not None:
        request = _request_without_run(app, message, (), {}, {})
    else:
        name, id = Claim(None, 0, "", 0, raw).head
        request = Context(task=name, id=id)
    if request.id:
        _fail(_unknown(app), request, FAILURE, InvalidTaskError(reason))
    return _settled(request, "reject", reason)


def _unknown(app: TaskQ) -> Task:
    """Return what stands for a task that is not known."""
    task = Task()
    task.app, task.ignore_result = app, False
    return task


def _request_without_run(app: TaskQ, message: Message, args: Any, kw: Any, embed: Any) -> Context:
    """Return the request of a task that does not run, for its message may not have been read."""
    request = request_of(message, args, kw, embed, app.node or _hostname())
    if not embed:  # it may have been a part of a chord: only the store can tell
        request.update(chord=request.group)
    return request


def _failure(task: Any, request: Context, exc: BaseException) -> Outcome:
    """Return the end of a task that fails without having run to its end here."""
    _fail_for_good(task, request, ExceptionInfo(exc))
    return _settled(request, "ack", _repr(exc, 200))


def _unregistered(app: TaskQ, message: Message, request: Context) -> Outcome:
    name, known = request.task, ", ".join(sorted(app.tasks)) or "no tasks"
    text = "Received unregistered task of type %r.\nThe message has been ignored and discarded.\n"
    text += "Did you remember to import the module containing this task?\nThis worker knows: %s"
    worker_logger.error(text, name, known)
    exc = NotRegistered(name)
    task_unknown.send(sender=None, message=message, exc=exc, name=name, id=message.id)
    return _failure(_unknown(app), request, exc)


def _revoked(task: Any, request: Context, reason: str, **how: Any) -> Outcome:
    """Return the end of a task that is not to run (any more)."""
    how = {"terminated": False, "signum": None, "expired": False, **how}
    if not how["terminated"]:
        trace_logger.info("Discarding revoked task: %s[%s]", request.task, request.id)
    task_revoked.send(sender=task, request=request, **how)
    _fail(task, request, REVOKED, TaskRevokedError(reason))
    _note_event(request, "revoked", **how)
    return _settled(request, "ack", reason)


def lost(
    app: TaskQ, claim: Claim, exc: Any, flags: int = 0, worker_died: bool = False, **how: Any
) -> Outcome:
    """Return the end of a task that does not run to its end; `flags` are those of its slot. One
    that acknowledges late is put back where the whole worker died, as a broker would deliver it
    again; where only its process did, if it has `reject_on_worker_lost`; after a time limit, unless
    that acknowledges it. One whose message was still being read gets a second chance, but no third.
    Else it is a FAILURE, or REVOKED if `exc` is a TaskRevokedError (`how`: terminated, signum)."""
    message, args, kwargs, embed = None, (), {}, {}  # type: Any, Any, Any, Any
    try:
        message = claim.message
        task = app.tasks.get(message.headers["task"]) or _unknown(app)
        again = bool(flags & ACKS_LATE and (worker_died or flags & REJECT_ON_LOST))
        if isinstance(exc, TimeLimitExceeded):
            again = bool(flags & ACKS_LATE and not task.acks_on(timeout=True))
        elif flags == DECODING:
            again = not (message.properties.get("delivery_info") or {}).get("redelivered")
        if again and not isinstance(exc, TaskRevokedError):
            return Outcome("requeue", [], [], redelivered(claim.raw), 0.0)
        if flags != DECODING or message.content_type == CONTENT_TYPES["json"]:
            args, kwargs, embed = message.payload(app.conf.accept_content)
        # Else it is a pickle that has perhaps killed who read it.
    except MalformedMessage as bad:
        return _rejected(app, claim.raw, message, bad)
    request = _request_without_run(app, message, args, kwargs, embed)
    request._events = []
    if isinstance(exc, TaskRevokedError):
        return _revoked(task, request, str(exc), **how)
    worker_logger.error("Task %s[%s] lost its process: %r", request.task, request.id, exc)
    return _failure(task, request, exc)


# -- the tasks that canvas is made of ----------------------------------------------------------


def _mapping(how: Callable[..., Iterable[Any]]) -> Any:
    return lambda self, task, it: list(how(maybe_signature(task, self.app).type, it))


def _unlock(self: Any, group_id: str, callback: Any, **_: Any) -> None:
    """Call the body of a chord whose parts have ended, or give it its end where one has failed."""
    app, request = self.app, self.request
    body = maybe_signature(callback, app, True)
    try:
        ids = app.backend.chord_parts(group_id)
        found = app.backend.get_results(ids)
    except OperationalError as error:  # nobody else will do this
        raise Reject(str(error), requeue=True) from None
    if not ids:  # somebody has done this already
        return
    values, traceback = [], None
    try:
        for id in ids:
            try:
                meta = decode_result(app, found[id][1])
            except (KeyError, DecodeError, ContentDisallowed):
                meta = {"status": FAILURE, "result": TaskRevokedError("it has no result")}
            if meta["status"] != SUCCESS:
                traceback = meta.get("traceback")
                raise ChordError(f"Dependency {id} raised {meta['result']!r}")
            values.append(meta["result"])
        root = body._tasks()[0].options.get("root_id") or ids[-1]
        with app._batch(request.follow_ups):
            body.apply_async((values,), add_to_parent=False, root_id=root, parent_id=ids[-1])
    except Exception as error:
        exc = error if type(error) is ChordError else ChordError(f"Callback error: {error!r}")
        logger.error("Chord %r raised: %r", group_id, exc)
        request.follow_ups = Batch()
        _end(app, request, [body], FAILURE, exc, traceback)
        _body_failed(app, request, body, exc, traceback)
    request.follow_ups.chords.append((group_id, 0, None))


def _built_in(name: str, fun: Any, **options: Any) -> None:
    _by_name[name] = lambda app: app._task_from_fun(fun, name=name, **options)


_built_in("celery.map", _mapping(map), bind=True)
_built_in("celery.starmap", _mapping(itertools.starmap), bind=True)
_built_in("celery.accumulate", lambda *args, index=None: args if index is None else args[index])
_late = {"acks_late": True, "reject_on_worker_lost": True, "time_limit": 0, "soft_time_limit": 0}
_built_in("celery.chord_unlock", _unlock, bind=True, ignore_result=True, **_late)


# ==== 11. Events =================================================================================
#
# Workers (with -E) and producers tell whoever listens what becomes of workers and tasks. An event
# is a dict. Nobody waits for one: it is gone if nobody hears it.


class LamportClock:
    """A logical clock: what is sent has a `value` above those of all that its sender has heard of.
    It needs no lock: threads that get the same value only leave their order open."""

    value = 0

    def adjust(self, other: Any = 0) -> int:
        """Count the arrival of what was sent at the value `other`, if it is one; return the new."""
        self.value = max(self.value, other if isinstance(other, int) else 0) + 1
        return self.value

    forward = adjust  # to be called, without a value, when something is sent


def call_fields(message: Message) -> dict[str, Any]:
    """Return what the events task-sent and task-received tell of a call."""
    get = message.headers.get
    fields = {name: get(name) for name in ("root_id", "parent_id", "retries", "eta", "expires")}
    fields.update(uuid=get("id"), name=get("task"), args=get("argsrepr"), kwargs=get("kwargsrepr"))
    return fields


def sent_events(calls: Iterable[Prepared]) -> list[tuple[str, dict[str, Any]]]:
    """Return the events task-sent, as (type, fields), of calls that are sent now."""
    events = []
    for message, _, (first, *_) in calls:
        where = {"queue": first.queue, **message.properties["delivery_info"]}
        who = {"hostname": message.headers["origin"], "timestamp": time.time()}
        events.append(("task-sent", {**call_fields(message), **where, **who}))
    return events


class EventDispatcher:
    """Sends events in the name of `hostname`; those of tasks only while it is `enabled`."""

    def __init__(self, app: TaskQ, hostname: str | None = None, enabled: bool = True) -> None:
        self.app, self.enabled, self.pid = app, enabled, os.getpid()
        self.hostname = hostname or f"gen{self.pid}@{_hostname()}"

    def send(self, type: str, **fields: Any) -> None:
        """Send an event with these fields, which JSON can hold."""
        self.publish([(type, fields)])

    def publish(self, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Send (type, fields) pairs; they are lost where the store cannot be written."""
        exchange = self.app.conf.event_exchange
        about = {"hostname": self.hostname, "pid": self.pid, "timestamp": time.time()}
        about["utcoffset"] = -time.localtime().tm_gmtoff / 3600  # hours; west is positive
        of_tasks: list[Any] = []  # which go together
        bodies: list[Any] = []
        for type, fields in events:
            event = {**about, "clock": self.app.clock.forward(), **fields, "type": type}
            if type == "task-sent" or not type.startswith("task-"):
                bodies.append((type.replace("-", "."), event))
            elif self.enabled:
                of_tasks.append(event)
        if of_tasks:
            bodies.append(("task.multi", of_tasks))
        headers = {"hostname": self.hostname}
        # A store that knows that nobody listens does not have them encoded.
        posts: Any = ((key, encode_post(exchange, key, body, headers)) for key, body in bodies)
        with contextlib.suppress(OperationalError):
            if bodies:
                self.app.store.fan_out("topic", exchange, posts)


class EventReceiver:
    """Hands events to `handlers`, a function for each type, and '*' for those that have none:
    `app.events.Receiver(handlers={"*": print}).capture()`, which setting `should_stop` ends.
    channel: what `app.connection()` gives, or None; routing_key: which events, as 'worker.#'."""

    should_stop = False

    def __init__(
        self, channel: Any = None, handlers: Any = None, routing_key: str = "#", app: Any = None
    ) -> None:
        self.app: TaskQ = app_or_default(app)
        self.handlers, self.routing_key = handlers or {}, routing_key

    def capture(self, limit: Any = None, timeout: Any = None, wakeup: bool = True) -> None:
        """Handle `limit` messages (an event, or several of tasks); socket.timeout if none comes for
        `timeout` seconds. `wakeup` has the workers tell of themselves at once."""
        collections.deque(self.itercapture(limit, timeout, wakeup), 0)

    def itercapture(
        self, limit: Any = None, timeout: Any = None, wakeup: bool = True, wait: float = 1.0
    ) -> Iterator[bool]:
        """Do so while this generator is used: it yields True after each message, and False when it
        begins to listen and when none has come for `wait` seconds."""
        conf, heard = self.app.conf, time.monotonic()
        place = ("topic", conf.event_exchange, self.routing_key)
        with self.app.store.listening(*place, f"{conf.event_queue_prefix}.{uuid()}") as read:
            yield False
            if wakeup:
                self.app.control.broadcast("heartbeat")
            while True:
                texts = read(min(wait, timeout or wait))
                for text in texts or [None]:
                    if text is not None:
                        self._handle(text)
                        heard, limit = time.monotonic(), limit and limit - 1
                    elif timeout and time.monotonic() - heard >= timeout:
                        raise _symbol("socket:timeout")("timed out")
                    yield text is not None
                    if self.should_stop or limit == 0:
                        return

    def _handle(self, text: str) -> None:
        try:
            events = [self._arrived(event) for event in _listed(decode_post(text)[0])]
        except (MalformedMessage, LookupError, TypeError, ValueError, AttributeError) as exc:
            logger.error("Received what is no event: %s", _repr(exc, 200))
            return
        for event in events:
            handler = self.handlers.get(event["type"]) or self.handlers.get("*")
            if handler:
                handler(event)

    def _arrived(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return an event that has what handlers rely on; what it lacks is an exception."""
        names = [event["hostname"], event["uuid"] if event["type"].startswith("task-") else ""]
        is_dated = 0 <= event["timestamp"] < 1e11 and _is_number(event.get("freq", 0))
        if not (is_dated and all(isinstance(name, str) for name in names)):
            raise ValueError(_repr(event))
        self.app.clock.adjust(event.get("clock"))
        return {**event, "local_received": time.time()}


class SeenWorker:
    """A worker as its events show it: their fields are its attributes."""

    freq, heard = 60.0, 0.0  # seconds; when it was heard of last, 0 if it has said that it ends
    pid = clock = active = processed = loadavg = sw_ident = sw_ver = sw_sys = _unset
    #: When it counts as gone unless it is heard of before, in seconds since the epoch.
    heartbeat_expires = property(lambda worker: worker.heard + 2 * worker.freq)
    #: Whether it was heard of lately, and has not said that it ends.
    alive = property(lambda worker: time.time() < worker.heartbeat_expires)
    status_string = property(lambda worker: "ONLINE" if worker.alive else "OFFLINE")

    def __init__(self, hostname: str) -> None:
        self.hostname = hostname

    def __repr__(self) -> str:
        return f"<Worker: {self.hostname} ({self.status_string} clock:{self.clock})"


#: The states that a task's events tell of.
_TOLD_STATES = {
    "sent": PENDING, "received": RECEIVED, "started": STARTED, "succeeded": SUCCESS,
    "failed": FAILURE, "retried": RETRY, "revoked": REVOKED, "rejected": REJECTED,
}  # fmt: skip


class SeenTask:
    """A task as its events show it: their fields, and when each happened (`received`, …)."""

    state = PENDING
    sent = received = started = succeeded = failed = retried = revoked = rejected = _unset
    name = args = kwargs = eta = expires = retries = result = exception = traceback = _unset
    runtime = queue = exchange = routing_key = root_id = parent_id = timestamp = clock = _unset
    worker = client = hostname = _unset
    _INFO = """args kwargs retries result eta runtime expires exception exchange routing_key
        root_id parent_id""".split()

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid

    def __repr__(self) -> str:
        return f"<Task: {self.name}({self.uuid}) {self.state} clock:{self.clock}>"

    def event(self, what: str, event: dict[str, Any]) -> None:
        """Take in an event, which may arrive after one that has happened later."""
        state = _TOLD_STATES.get(what, what.upper())
        fields = {**event, what: event["timestamp"], "state": state}
        if precedence(state) > precedence(self.state) and RETRY not in (state, self.state):
            del fields["state"], fields["timestamp"]
        # A field may have any name, but hides no method.
        vars(self).update((k, v) for k, v in fields.items() if k not in ("event", "info"))

    def info(self, fields: Any = None, extra: Iterable[str] = ()) -> dict[str, Any]:
        """Return what is known of these attributes; by default of the call and how it ended."""
        values = {name: getattr(self, name, None) for name in (*(fields or self._INFO), *extra)}
        return {name: value for name, value in values.items() if value is not None}


class State:
    """What events tell of workers, by name, and tasks, by id; those heard of last are last."""

    event_count = task_count = 0
    #: A Polaroid looks at a state from its own thread. It is one for all: a state can be pickled.
    _lock = threading.RLock()

    def __init__(self, max_workers_in_memory: int = 5000, max_tasks_in_memory: int = 10000) -> None:
        self._limits = max_workers_in_memory, max_tasks_in_memory
        self.workers: dict[str, SeenWorker] = collections.OrderedDict()
        self.tasks: dict[str, SeenTask] = collections.OrderedDict()

    def __repr__(self) -> str:
        return f"<State: events={self.event_count} tasks={self.task_count}>"

    def event(self, event: dict[str, Any]) -> None:
        """Take in an event."""
        with self._lock:
            self.event_count += 1
            (kind, _, what), host = event["type"].partition("-"), event["hostname"]
            worker = None
            if kind == "worker" or kind == "task" and what != "sent":
                worker = _newest(self.workers, host, SeenWorker, self._limits[0])
                worker.heard = time.time() if what != "offline" else 0.0
            if kind == "worker":
                vars(worker).update(event)
            elif kind == "task":
                task = _newest(self.tasks, event["uuid"], SeenTask, self._limits[1])
                task.event(what, event)
                task.worker, task.client = worker or task.worker, task.client if worker else host
                self.task_count += what == "received"

    def freeze_while(self, fun: Any, *args: Any, clear_after: bool = False) -> Any:
        """Call a function, while no event is taken in; `clear` then, perhaps."""
        with self._lock:
            try:
                return fun(*args)
            finally:
                if clear_after:
                    self.clear()

    def clear(self, ready: bool = True) -> None:
        """Forget all but the tasks that have no end yet; those, too, unless `ready`."""
        with self._lock:
            self.event_count = self.task_count = 0
            self.workers.clear()
            for id, task in list(self.tasks.items()):
                if task.state in READY_STATES or not ready:
                    del self.tasks[id]

    def alive_workers(self) -> Iterator[SeenWorker]:
        """Return the workers that were heard of lately."""
        return (worker for worker in self.workers.values() if worker.alive)

    def tasks_by_time(self, limit: int | None = None, reverse: bool = True) -> Any:
        """Return (id, task) pairs, those heard of last first; with `reverse=False` last."""
        pairs = reversed(self.tasks.items()) if reverse else iter(self.tasks.items())
        return itertools.islice(pairs, limit)

    def tasks_by_type(self, name: str) -> Any:
        """Return the pairs of tasks of this name."""
        return (pair for pair in self.tasks_by_time() if pair[1].name == name)

    def tasks_by_worker(self, hostname: str) -> Any:
        """Return the pairs of tasks that this worker has, or had."""
        worker = self.workers.get(hostname, "")
        return (pair for pair in self.tasks_by_time() if pair[1].worker is worker)

    def task_types(self) -> list[str]:
        """Return the names of the tasks, sorted."""
        return sorted({task.name for task in self.tasks.values() if task.name})


def _newest(known: Any, key: str, make: Callable[[str], Any], limit: int) -> Any:
    """Return what has this key, made if need be, as the last; the first goes beyond `limit`."""
    if key not in known:
        known[key] = make(key)
        if len(known) > limit:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


# ==== 12. Schedules ==============================================================================

ParseException: Any = _error("ParseException", "A crontab cannot be read.", ValueError)

#: What a schedule says of now: whether its task is due, and in how many seconds to ask again.
schedstate = collections.namedtuple("schedstate", "is_due next")


class BaseSchedule:
    """Says when a task is due. Times without a time zone are UTC; `nowfun` stands for `app.now`."""

    seconds: Any = 0  # until it is asked again, where it would be due again at once
    _follows: Any = None  # (start) -> when the run after one at `start` is due, in UTC

    def __init__(self, nowfun: Any = None, app: Any = None, given: Any = ()) -> None:
        self.nowfun, self.app, self._given = nowfun, app or current_app, given

    def now(self) -> datetime:
        """Return the time now."""
        return self.maybe_make_aware((self.nowfun or self.app.now)())

    def maybe_make_aware(self, dt: datetime) -> datetime:
        """Return a time as it is, or in the app's time zone if it names none."""
        return dt if dt.tzinfo else dt.replace(tzinfo=timezone.utc).astimezone(self.app.timezone)

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """Return how long it is until the run that follows one; negative if that is late."""
        return self._follows(self.maybe_make_aware(last_run_at)) - self.now()

    def is_due(self, last_run_at: datetime) -> schedstate:
        """Return whether to run now, if it last ran then, and in how many seconds to ask again."""
        seconds = self.remaining_estimate(last_run_at).total_seconds()
        if seconds > 0:
            return schedstate(False, seconds)
        now = self.now().astimezone(self.maybe_make_aware(last_run_at).tzinfo)
        seconds = self.remaining_estimate(now).total_seconds()
        return schedstate(True, seconds if seconds > 0 else self.seconds)

    def __reduce__(self) -> Any:
        return type(self), (*self._given, self.nowfun)


class schedule(BaseSchedule):  # noqa: N801
    """Due every so many seconds, or timedelta. A `relative` one keeps to the clock: it runs at full
    days, hours, minutes or seconds, by the largest of these that `run_every` holds."""

    def __init__(
        self, run_every: Any = None, relative: bool = False, nowfun: Any = None, app: Any = None
    ) -> None:
        self.run_every = timedelta(seconds=run_every) if _is_number(run_every) else run_every
        if not isinstance(self.run_every, timedelta) or self.run_every <= timedelta(0):
            expected = "expected seconds above 0, a timedelta or crontab(...)"
            raise TypeError(f"schedule {_repr(run_every, 60)}: {expected}")
        self.relative, self.seconds = relative, self.run_every.total_seconds()
        super().__init__(nowfun, app, (self.run_every, relative))

    def _follows(self, start: datetime) -> datetime:
        end = start.astimezone(timezone.utc) + self.run_every
        if not self.relative:
            return end
        if self.seconds >= 86400:  # days of the calendar, not of 24 hours
            return min(time for time in _floors(start + self.run_every, 3) if time > start)
        unit, parts = next(u for u in ((3600, 4), (60, 5), (0, 6)) if self.seconds >= u[0])
        found = max(time for time in _floors(end.astimezone(start.tzinfo), parts) if time <= end)
        if found <= start and unit:  # the clock has been put back meanwhile
            later = _floors(start + timedelta(seconds=unit), parts)
            found = min(time for time in later if time > start)
        return found

    def __eq__(self, other: object) -> bool:
        return self.run_every == (other.run_every if isinstance(other, schedule) else other)

    def __repr__(self) -> str:
        return f"<freq: {_in_words(self.seconds)}>"


def _floors(wall: datetime, parts: int) -> list[datetime]:
    """Return, in UTC, when the clock shows a time cut to its first parts (3 are the date): twice if
    it is put back over it; if it is put forward over it, the time when that is done."""
    wall = datetime(*wall.timetuple()[:parts], tzinfo=wall.tzinfo)  # type: ignore[misc, arg-type]
    first, second = (wall.replace(fold=fold).astimezone(timezone.utc) for fold in (0, 1))
    return [first, second] if first < second else [first]


def _in_words(seconds: float) -> str:
    """Return a time in its largest unit, '5.00 minutes'; less than a second is 'now'."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    counts = [(round(seconds, 2) / size, unit) for unit, size in units]
    return next((f"{n:.2f} {unit}{'s' * (n > 1)}" for n, unit in counts if n >= 1), "now")


class crontab_parser:  # noqa: N801
    """Reads a field of a crontab, which has `max_` numbers from `min_` on."""

    NAMES = dict(zip("sun mon tue wed thu fri sat".split(), range(7)))
    NAMES.update(zip("jan feb mar apr may jun jul aug sep oct nov dec".split(), range(1, 13)))

    def __init__(self, max_: int = 60, min_: int = 0) -> None:
        self.numbers = [*range(min_, min_ + max_)]

    def parse(self, spec: Any) -> set[int]:
        """Return the numbers that a pattern such as '*/15', 'mon-fri' or '1-5,30' names, or those
        in a list, or a single one; ParseException if there are others, or none."""
        if not isinstance(spec, str):
            spec = ",".join(map(str, spec if hasattr(spec, "__iter__") else [spec]))
        return {number for part in spec.split(",") for number in self._part(part.strip())}

    def _part(self, part: str) -> list[int]:
        match = re.fullmatch(r"(\w+)|(?:\*|(\w+)-(\w+))(?:/0*([1-9]\d*))?", part)
        if not match:
            raise ParseException(f"{part!r} is none of the forms 5, 1-5, mon-fri, *, */15, 0-30/5")
        single, first, last, step = match.groups()
        numbers = [self._number(single)] if single else self.numbers
        if first:  # 'sat-mon' goes on at the field's beginning
            at = numbers.index(self._number(first))
            numbers = numbers[at:] + numbers[:at]
            numbers = numbers[: numbers.index(self._number(last)) + 1]
        return numbers[:: int(step or 1)]

    def _number(self, text: str) -> int:
        number = int(text) if text.isdecimal() else self.NAMES.get(text[:3].lower(), -1)
        if number not in self.numbers:
            expected = f"expected {self.numbers[0]} to {self.numbers[-1]}"
            raise ParseException(f"{text!r} is out of range: {expected}")
        return number


#: A crontab's fields in the order of its arguments: how many numbers each has, from which on.
_FIELDS = {"minute": (60, 0), "hour": (24, 0), "day_of_week": (7, 0), "day_of_month": (31, 1)}
_FIELDS["month_of_year"] = (12, 1)


class crontab(BaseSchedule):  # noqa: N801
    """Due whenever the clock of the app's time zone shows a minute that all five fields name: each
    by a number (0 is Sunday), a list or set of them, or a pattern, '*', '*/15', 'mon-fri',
    '0-30/5', '3-6,22'. Raises ParseException."""

    minute = hour = day_of_week = day_of_month = month_of_year = _unset

    def __init__(
        self, minute: Any = "*", hour: Any = "*", day_of_week: Any = "*", day_of_month: Any = "*",
        month_of_year: Any = "*", nowfun: Any = None, app: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(nowfun, app, (minute, hour, day_of_week, day_of_month, month_of_year))
        for (field, numbers), value in zip(_FIELDS.items(), self._given):
            try:
                setattr(self, field, crontab_parser(*numbers).parse(value))
            except ParseException as exc:
                raise ParseException(f"crontab({field}={_repr(value, 60)}): {exc}") from None
        longest = 31 if self.month_of_year - {2, 4, 6, 9, 11} else 30
        if min(self.day_of_month) > (29 if self.month_of_year == {2} else longest):
            raise ParseException(f"{self}: no such day ever comes")

    @classmethod
    def from_string(cls, crontab: str) -> Any:
        """Return the crontab of a line of cron's: minute, hour, day of month, month, weekday."""
        if len(crontab.split()) != 5:
            raise ParseException(f"{crontab!r}: expected 5 fields, as in '30 7 * * mon'")
        minute, hour, day, month, weekday = crontab.split()
        return cls(minute, hour, weekday, day, month)

    def remaining_delta(self, last_run_at: datetime, tz: Any = None) -> Any:
        """Return the last run, how far the hands of the clock then are from the next, and now."""
        tz = _zone(tz) if tz else self.app.timezone
        last, now = self.maybe_make_aware(last_run_at).astimezone(tz), self.now().astimezone(tz)
        times = [*itertools.product(sorted(self.hour), sorted(self.minute))]
        later = [time for time in times if time > (last.hour, last.minute)]
        for day in map(date.fromordinal, itertools.count(last.toordinal())):
            is_named = day.isoweekday() % 7 in self.day_of_week and day.day in self.day_of_month
            if later and is_named and day.month in self.month_of_year:
                break
            later = times  # of the days that follow
        return last, datetime.combine(day, daytime(*later[0])) - last.replace(tzinfo=None), now

    def _follows(self, start: datetime) -> datetime:
        last, delta, _ = self.remaining_delta(start)
        return min(time for time in _floors(last + delta, 5) if time > start)

    def is_due(self, last_run_at: datetime) -> schedstate:
        """The same; a run that is later than `beat_cron_starting_deadline` allows is left out."""
        state, allowed = super().is_due(last_run_at), self.app.conf.beat_cron_starting_deadline
        if state.is_due and allowed is not None:
            since = self.now().astimezone(timezone.utc) - timedelta(0, allowed, 1)
            state = state._replace(is_due=self.remaining_estimate(since) <= timedelta(0))
        return state

    def __eq__(self, other: object) -> bool:
        names = (*_FIELDS, "nowfun")
        return isinstance(other, crontab) and all(vars(self)[n] == vars(other)[n] for n in names)

    def __repr__(self) -> str:
        minute, hour, weekday, day, month = self._given
        return f"<crontab: {minute} {hour} {day} {month} {weekday} (m/h/dM/MY/d)>"


def solar(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise NotImplementedError: where the sun stands only Celery knows."""
    raise NotImplementedError(f"solar is not available in taskq {__version__}")


# ==== 13. Pools ==================================================================================

_TOKEN = struct.Struct("<QQQ")  # ticket (0: stop), offset and length of the payload in the spool
_STOP = bytes(_TOKEN.size)
_BATCH_MAX = getattr(select, "PIPE_BUF", 512) // _TOKEN.size  # tokens that a pipe takes at once
_BATCH_SECONDS = 0.02  # for how long a child should be busy with what it is handed at once
_STUCK_SECONDS = 0.01  # a child that has finished nothing for so long keeps no other tasks waiting
_LOOK_SECONDS = 1.0  # how often the main process looks at its children at least
_process_name = "MainProcess"  # as the log calls this one
_LIMITED_MAX = 1000  # how many claims may wait for a rate limit before the worker claims no more


class Pool:
    """Runs what the worker has claimed: a claim is held from `submit` until `collect` gives it."""

    kills = False  # whether tasks run in processes of their own, which a hard time limit ends
    patience = _LOOK_SECONDS  # after which `collect` should be called again, though nobody rings

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker, self.size = worker, size
        self.slots: list[Slot] = worker.journal.slots  # those in use
        self.depth = 1  # how many tasks to hand to one process at once: 1 unless they are tiny
        self.held: dict[int, Claim] = {}  # by ticket
        #: Seconds between two tasks of a name, where it has a rate limit, and when the next of them
        #: may begin, by time.monotonic(); the claims that wait for that.
        self.limits: dict[str, float] = {}
        self.next: dict[str, float] = {}
        self.later: list[Claim] = []
        self.waiting: collections.deque[Claim] = collections.deque()  # those not handed out yet
        self.stopping = False
        self._more = 0  # messages to hold beyond what the settings say
        self._task_time = 0.0  # moving average, in seconds; 0: none seen yet

    #: How many claims it has beside those that wait for a rate limit.
    load = property(lambda pool: len(pool.held) - len(pool.later))

    def submit(self, claims: Sequence[Claim]) -> None:
        """Take claims to run, each when its rate limit allows; start missing processes."""
        self.held.update((claim.ticket, claim) for claim in claims)
        now, candidates, self.later = time.monotonic(), [*self.later, *claims], []
        for claim in candidates:
            name = claim.head[0] if self.limits else ""
            at = self.next.get(name, 0.0)
            if at > now:
                self.later.append(claim)
                continue
            self.waiting.append(claim)
            if name in self.limits:  # that this worker is a little late makes the next one no later
                self.next[name] = self.limits[name] + (at if now - at < 0.05 else now)
        self._deal(len(candidates) - len(self.later))

    def _deal(self, more: int = 0) -> None:
        """Have those claims run that wait, `more` of them since the last time."""

    def collect(self, finished: list[tuple[Claim, Outcome]]) -> None:
        """Add claims that have come to an end, with their outcomes."""
        for slot in self.slots:
            for ticket, outcome in slot.read() if slot.fresh else ():
                claim = self.held.pop(ticket, None)
                if claim is not None:
                    weight = 0.1 if self._task_time else 1.0
                    self._task_time += (outcome.runtime - self._task_time) * weight
                    finished.append((claim, outcome))
        if self._task_time:
            self.depth = max(1, min(_BATCH_MAX, int(_BATCH_SECONDS / self._task_time)))

    @property
    def value(self) -> int:
        """The prefetch count, by Celery's name: how many messages to hold, unless they are tiny."""
        size, _ = self.worker.autoscaled or (self.size, 0)
        return size * self.worker.app.conf.worker_prefetch_multiplier + self._more

    def increment_eventually(self, n: int = 1) -> None:
        """Hold `n` messages more, or fewer."""
        self._more += n

    def room(self) -> int:
        """Return how many more messages to claim: Celery's prefetch, more while tasks are tiny."""
        held = self.load
        if len(self.later) > _LIMITED_MAX:
            return 0
        if self.worker.app.conf.worker_disable_prefetch:
            return self.size - held
        wanted = max(self.value or 10 * self.size, 2 * self.size * self.depth)
        free = wanted - held
        return free if free * 4 >= wanted or self.depth == 1 else 0  # no small claims under load

    def rest(self, claimed: bool) -> None:
        """Let outcomes gather for the next batch: nap for half of the time for which there is work;
        if that is too short for falling asleep, and more has been `claimed`, run on a little."""
        nap = min(0.005, self.load // max(self.size, 1) * self._task_time / 2)
        if nap > 0.0003:
            self.worker.bell.nap(nap)
        elif claimed and self.kills and self._task_time < 0.0002:
            until = time.perf_counter() + min(0.0002, 4 * self._task_time)
            while time.perf_counter() < until and not any(slot.fresh for slot in self.slots):
                _yield_cpu()

    def take_back(self) -> list[Claim]:
        """Return the claims that have not begun, in their order; they are held no more."""
        back: list[Claim] = []
        with contextlib.suppress(IndexError):
            while True:  # threads take from it at the same time
                back.append(self.waiting.popleft())
        for claim in back if self.next else ():
            if claim.head[0] in self.next:  # it has had its turn for nothing
                self.next[claim.head[0]] -= self.limits.get(claim.head[0], 0.0)
        back += self.later
        self.later = []
        for claim in back:
            del self.held[claim.ticket]
        return back

    def active(self) -> list[tuple[Claim, float, int]]:
        """Return (claim, when it began in seconds since the epoch, pid) of what runs."""
        ago, found = time.time() - time.monotonic(), []
        for slot in self.slots:
            claim = self.held.get(slot.begun[0])
            if claim is not None:
                found.append((claim, ago + slot.times[0], slot.pid or os.getpid()))
        return found

    def resize(self, size: int) -> None:
        """Have `size` processes, busy ones until their end; ValueError, NotImplementedError."""
        self.terminate(0, 0, "grow or shrink")

    def terminate(self, ticket: int, signum: int, what: str = "terminate a task") -> None:
        """Send a signal to the process that runs a claim; NotImplementedError if none does."""
        raise NotImplementedError(f"the {self.worker.pool_name} pool cannot {what}: use prefork")

    def stop(self, patience: float) -> None:
        """End processes or threads: what is still busy after `patience` seconds is killed."""


def _run_claim(worker: Any, slot: Slot, claim: Claim) -> None:
    """Execute a message in this thread and note its outcome; nothing a task does gets past."""
    app, bell, in_child, pid = worker.app, worker.bell, worker.pool.kills, os.getpid()
    ticket = claim.ticket
    outcome: Outcome | None = None

    def begin(task: Any, request: Context) -> None:
        flags = ACKS_LATE if task.acks_late else 0
        if flags and task.reject_on_worker_lost:
            flags |= REJECT_ON_LOST
        hard, soft = request.timelimit or (None, None)
        hard, soft = hard or task.time_limit, soft or task.soft_time_limit
        now = time.monotonic()
        slot.begin(ticket, flags, now + soft if soft else 0.0, now + hard if hard else 0.0)
        if in_child and (soft or hard):  # the main process keeps them, and looks once a second
            limits.callback(slot.begin, ticket, flags)
            if min(soft or hard, hard or soft) < _LOOK_SECONDS:
                bell.ring()
        elif soft and worker.pool_name in ("solo", "threads"):
            limits.callback(_limit_thread(soft))

    slot.begin(ticket, DECODING)
    try:
        with contextlib.ExitStack() as limits:
            outcome = execute(app, claim.raw, worker.hostname, begin, worker.journal.events)
    except BaseException as exc:
        if isinstance(exc, WorkerTerminate) or in_child and not isinstance(exc, Exception):
            raise
        _thread.stack.clear()
        if outcome is None:  # else it is a soft limit that came just too late
            error = exc if isinstance(exc, Exception) else WorkerLostError(f"Task raised {exc!r}")
            outcome = lost(app, claim, error)
    if os.getpid() != pid:  # the task has forked, and returns in the other process too
        os._exit(0)
    try:
        slot.finish(ticket, _json_encode(outcome).encode(), bell.ring)
    except OSError as exc:  # a large outcome has a file of its own: the disk is full, say
        slot.finish(ticket, _json_encode(lost(app, claim, exc)).encode(), bell.ring)
    if bell.asleep:
        bell.ring()


def _limit_thread(seconds: float) -> Callable[[], None]:
    """Raise SoftTimeLimitExceeded in this thread after `seconds`; return what prevents it."""
    import ctypes

    thread, lock = threading.get_ident(), threading.Lock()
    throw = functools.partial(ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(thread))

    def fire() -> None:
        with lock:
            if not timer.finished.is_set():
                throw(ctypes.py_object(SoftTimeLimitExceeded))
                if hasattr(signal, "pthread_kill"):
                    # A signal with a handler ends a system call: the exception is raised in there.
                    signal.pthread_kill(thread, signal.SIGCHLD)

    def cancel() -> None:
        with lock:
            timer.cancel()
            throw(None)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), fire)
    timer.daemon = True
    timer.start()
    return cancel


class SoloPool(Pool):
    """Runs tasks one by one in the worker's own thread."""

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        worker_process_init.send(sender=worker.hostname)

    def collect(self, finished: list[tuple[Claim, Outcome]]) -> None:
        """Run tasks for some milliseconds, at least one."""
        worker, slot = self.worker, self.worker.journal.slots[0]
        until = time.monotonic() + _BATCH_SECONDS
        with allow_join_result(False):
            while self.waiting and not worker.stopping and time.monotonic() < until:
                if not slot.has_room:  # this thread would have to make it, itself
                    break
                task = worker.app.tasks.get(self.waiting[0].head[0])
                if worker.store.foreign and not (task and task.acks_late):
                    worker.store.begun([self.waiting[0]])  # while it runs nobody can say so
                _run_claim(worker, slot, self.waiting.popleft())
        super().collect(finished)

    def rest(self, claimed: bool) -> None:
        """Go on: this is the thread that works."""


class ThreadPool(Pool):
    """Runs tasks in threads; under gevent's or eventlet's patching, in greenlets."""

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self._ready = threading.Semaphore(0)  # once for each claim, and for each thread at the end
        self._threads: list[threading.Thread] = []

    def _deal(self, more: int = 0) -> None:
        for _ in range(more):
            self._ready.release()
        for slot in self.worker.journal.slots[len(self._threads) :]:
            name = f"ThreadPoolExecutor-0_{slot.index}"
            thread = threading.Thread(target=self._work, args=(slot,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self, slot: Slot) -> None:
        # A signal may end the worker in a greenlet of this pool.
        with allow_join_result(False), contextlib.suppress(WorkerTerminate):
            while self._ready.acquire() and not self.stopping:
                try:
                    claim = self.waiting.popleft()
                except IndexError:  # it was taken back
                    continue
                try:
                    _run_claim(self.worker, slot, claim)
                except Exception:  # its outcome could not be written
                    worker_logger.exception("A thread of the pool failed")
                if not (self.waiting or self.worker.bell.awake):
                    self.worker.bell.ring()

    def stop(self, patience: float) -> None:
        """Let each thread end; a busy one cannot be killed, and ends with the process."""
        self.stopping = True
        for _ in self._threads:
            self._ready.release()
        for thread in self._threads if patience else ():
            thread.join()


class Child:
    """A process of the prefork pool: it gets tokens by a pipe, and payloads by a file in memory."""

    def __init__(self, slot: Slot, name: str, generation: int) -> None:
        self.slot, self.name = slot, name
        self.generation = generation  # of the app's tasks
        self.pid = 0
        self.status = 0  # how it ended
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.reader, self.writer = open(reader, "rb", 0), open(writer, "wb", 0)
        make = getattr(os, "memfd_create", None)
        self.spool: Any = open(make("taskq"), "wb") if make else _symbol("tempfile:TemporaryFile")()
        self.spooled = 0  # where the payloads end that it may still read
        self.given: list[Claim] = []  # handed over and not finished, in this order
        self.done = 0  # how many it had finished when last looked at
        self.since = 0.0  # when it began the one after that
        self.retired = False  # gets no more tasks
        self.warned = 0  # the ticket of the task that was told of its soft limit
        #: Why a task is to end: its ticket, "Hard" or "Revoked", seconds or signal.
        self.told: tuple[int, str, Any] = (0, "", 0)

    def is_stuck(self, now: float) -> bool:
        """See what it has finished; return whether it has kept the rest waiting for too long."""
        finished = self.slot.executed - self.done
        if finished:
            del self.given[:finished]
            self.done += finished
            self.since = now
        return bool(self.given) and now - self.since > _STUCK_SECONDS

    def put(self, claims: Sequence[Claim], now: float) -> None:
        """Hand over claims, at most _BATCH_MAX."""
        if not self.given:  # it has read all
            if self.spooled > 2**20:
                self.spool.truncate(0)
            self.spooled, self.since = 0, now
        self.spool.seek(self.spooled)
        self.spool.write(b"".join(claim.raw for claim in claims))
        self.spool.flush()
        tokens = []
        for claim in claims:
            tokens.append(_TOKEN.pack(claim.ticket, self.spooled, len(claim.raw)))
            self.spooled += len(claim.raw)
        self.given += claims
        self.writer.write(b"".join(tokens))

    def retire(self) -> None:
        """Let it end after what it has begun; its other tasks have been taken back."""
        if not self.retired:
            self.retired = True
            self.writer.write(_STOP)

    def kill(self, signum: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):  # somebody else has waited for it
            os.kill(self.pid, signum)

    def has_ended(self) -> bool:
        """Return whether it is dead: then `status` says how it died, and its files are closed."""
        pid = self.pid
        with contextlib.suppress(ChildProcessError):  # somebody else has waited for it
            pid, self.status = os.waitpid(pid, os.WNOHANG)
        if pid:
            self.retired = True
            self.spool.truncate(0)  # its siblings may have inherited it
            for file in (self.reader, self.writer, self.spool):
                file.close()
        return bool(pid)


class PreforkPool(Pool):
    """Runs tasks in child processes. A child begins a task by reading its token from a pipe. The
    main process can read that too, to give what a busy child has not begun to another: the kernel
    gives each token to one reader."""

    kills = True

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self.slots = []
        self.children: list[Child] = []
        self._numbers = itertools.count(1)
        self._futile = -1.0  # when a child last died without having begun anything

    def collect(self, finished: list[tuple[Claim, Outcome]]) -> None:
        """Add outcomes, and see what has become of the children."""
        dead = [child for child in self.children if child.slot.has_room and child.has_ended()]
        self._deal()
        super().collect(finished)
        for child in dead:
            self._bury(child)
        now = time.monotonic()
        looks = [self._keep_limits(child, now) for child in self.children]
        self.patience = min(looks, default=_LOOK_SECONDS)

    def _deal(self, more: int = 0) -> None:
        """Hand waiting claims to idle children, then evenly; take back what stuck ones have."""
        self._refill()
        now, depth = time.monotonic(), self.depth
        for child in self.children:
            if child.is_stuck(now) and len(child.given) > 1:
                self._unload(child)
        while self.waiting:
            able = [child for child in self.children if not (child.retired or child.is_stuck(now))]
            able = [c for c in able if len(c.given) < depth and (c.spooled < 2**20 or not c.given)]
            if not able:
                return
            child = min(able, key=lambda child: len(child.given))
            count = min(-(-len(self.waiting) // len(able)), depth - len(child.given))
            child.put([self.waiting.popleft() for _ in range(count)], now)

    def _unload(self, child: Child) -> None:
        """Take back what a child has not begun."""
        unread = b"" if child.retired else child.reader.read(_TOKEN.size * _BATCH_MAX) or b""
        kept = len(child.given) - len(unread) // _TOKEN.size
        self.waiting.extendleft(reversed(child.given[kept:]))
        del child.given[kept:]

    def take_back(self) -> list[Claim]:
        """Return what waits here and in the children's pipes."""
        for child in self.children:
            self._unload(child)
        return super().take_back()

    def _refill(self) -> None:
        """Retire children that are too many or know old tasks, idle ones first; start others."""
        stays = [child for child in self.children if not child.retired]
        generation = self.worker.app.generation
        leaves = [child for child in stays if child.generation != generation]
        if len(stays) > self.size:
            stays.sort(key=lambda child: child.slot.begun[0] == 0)
            leaves += stays[self.size :]
        for child in leaves:
            self._unload(child)
            child.retire()
        # One that is retired, but still busy, has its place until it ends.
        missing = self.size - sum(not c.retired or c.slot.begun[0] > 0 for c in self.children)
        if missing <= 0 or self.stopping or time.monotonic() < self._futile + 1.0:
            return
        used, slots = {child.slot for child in self.children}, self.worker.journal.slots
        free = [slot for slot in slots if slot not in used and not slot.fresh]
        for slot in free[:missing]:
            slot.clear()
            self.slots = slots[: max(len(self.slots), slot.index + 1)]
            self.children.append(self._start_child(slot))

    def _start_child(self, slot: Slot) -> Child:
        worker = self.worker
        method = worker.app.conf.worker_pool_start_method
        name = f"{method.title()}PoolWorker-{next(self._numbers)}"
        child = Child(slot, name, worker.app.generation)
        order = (name, slot.index, child.reader.fileno(), child.spool.fileno())
        _flush_output()
        worker_before_create_process.send(sender=self)
        if method == "spawn":
            child.pid = _spawn(worker, order)
        else:
            with warnings.catch_warnings():  # Python 3.12 warns of forking beside other threads
                warnings.simplefilter("ignore", DeprecationWarning)
                child.pid = os.fork()
            if not child.pid:
                for each in (*self.children, child):  # or its own pipe would never end
                    each.writer.close()
                _be_child(worker, *order)
        slot.pid = child.pid
        return child

    def resize(self, size: int) -> None:
        if size < (not self.worker.autoscaled):
            raise ValueError(f"the pool cannot have {size} processes: it has {self.size}")
        self.worker.journal.grow(2 * size + 2)
        self.size = size
        self._deal()

    def terminate(self, ticket: int, signum: int, what: str = "") -> None:
        for child in self.children if ticket else ():
            if signum == signal.SIGUSR1:
                child.slot.interrupted = ticket
            if self._hit(child, ticket, signum):
                child.told = ticket, "Revoked", signum

    def _hit(self, child: Child, ticket: int, signum: int) -> bool:
        """Send a signal to a child if it runs this claim; return whether it does."""
        if child.slot.begun[0] == ticket:
            self._unload(child)  # so that it can begin nothing else before it is hit
        is_meant = child.slot.begun[0] == ticket
        if is_meant:
            child.kill(signum)
        return is_meant

    def _bury(self, child: Child) -> None:
        """Note the end of the task that a dead child was running; give the others back."""
        self.children.remove(child)
        ticket, flags = child.slot.begun
        running = self.held.get(ticket)
        left = (claim for claim in reversed(child.given) if claim.ticket in self.held)
        self.waiting.extendleft(claim for claim in left if claim is not running)
        code, names = os.waitstatus_to_exitcode(child.status), {-s: s.name for s in signal.Signals}
        how = f"exitcode {code}" if code >= 0 else f"signal {-code} ({names.get(code, '?')})"
        if child.status and not (running or child.slot.executed):
            self._futile = time.monotonic()
        told, kind, limit = child.told
        if child.status and kind != "Hard":
            worker_logger.error("Process %r pid:%d exited with %r", child.name, child.pid, how)
        if running is not None:
            exc, end = WorkerLostError(f"Worker exited prematurely: {how}."), {}
            if (told, kind) == (ticket, "Revoked"):
                exc, end = TaskRevokedError("terminated"), {"terminated": True, "signum": limit}
            elif kind == "Hard":
                exc = TimeLimitExceeded(limit)
            outcome = lost(self.worker.app, running, exc, flags, **end)
            child.slot.finish(ticket, _json_encode(outcome).encode(), self.worker.bell.ring)
        self.worker.bell.ring()

    def _keep_limits(self, child: Child, now: float) -> float:
        """Keep the time limits of what a child runs; return the seconds until the next look."""
        ticket, (began, soft, hard) = child.slot.begun[0], child.slot.times
        claim = self.held.get(ticket)
        kind, limit, signum, is_told = "Soft", soft, signal.SIGUSR1, child.warned == ticket
        if 0 < hard <= now:
            kind, limit, signum, is_told = "Hard", hard, signal.SIGKILL, child.told[1] == "Hard"
        if claim and 0 < limit <= now and not is_told and self._hit(child, ticket, signum):
            seconds = round(limit - began, 3)
            seconds = int(seconds) if seconds.is_integer() else seconds
            level, child.warned = logging.WARNING, ticket
            if kind == "Hard":
                level, child.retired, child.told = logging.ERROR, True, (ticket, kind, seconds)
            text, headers = "%s time limit (%ss) exceeded for %s[%s]", claim.message.headers
            worker_logger.log(level, text, kind, seconds, headers["task"], headers["id"])
        # One that has tasks and runs none is about to begin or has ended; as has, while others
        # wait, one without any.
        is_between = not ticket and bool(child.given or self.waiting)
        may_be_stuck = len(child.given) > 1 or is_between or child.told[1] == "Hard"
        wanted = _STUCK_SECONDS if may_be_stuck else _LOOK_SECONDS
        return min([wanted, *(limit - now for limit in (soft, hard) if limit > now)])

    def stop(self, patience: float) -> None:
        """Let the children end, and wait for them; what they have finished can be collected."""
        self.stopping = True
        for child in self.children:
            child.retire()
        until = time.monotonic() + patience
        while self.children:
            for child in self.children[:]:
                if child.has_ended():
                    self.children.remove(child)
                elif time.monotonic() >= until:
                    child.kill(signal.SIGKILL)
            time.sleep(0.002)


def _flush_output() -> None:
    for name in ("stdout", "stderr"):
        with contextlib.suppress(Exception):  # it is closed, or None, or deleted
            getattr(sys, name).flush()


def _be_child(worker: Any, name: str, index: int, reader: int, spool: int) -> NoReturn:
    """Be a child of the pool: execute tasks until told to stop, and end this process."""
    global _process_name
    _process_name = name
    slot, status = worker.journal.slots[index], 1

    def soft_limit(signum: int, frame: Any) -> None:
        # Else the task that was meant has ended.
        if 0 < slot.times[1] <= time.monotonic() or 0 < slot.interrupted == slot.begun[0]:
            raise SoftTimeLimitExceeded()

    try:
        _die_with_parent(worker.pid)
        _thread.stack.clear()
        worker.journal.lock(index)
        if "%" in (worker.log_options["logfile"] or ""):  # each process has one of its own
            configure_logging(worker.app, **worker.log_options, index=index + 1)
        signal.set_wakeup_fd(-1)
        for kind in ("TERM", "QUIT", "HUP", "CHLD", "ALRM"):
            signal.signal(getattr(signal, "SIG" + kind), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, soft_limit)
        worker_process_init.send(sender=worker.hostname)
        status = _work(worker, slot, reader, spool)
        named = {"pid": os.getpid(), "exitcode": status}
        worker_process_shutdown.send(sender=worker.hostname, **named)
    except BaseException:
        worker_logger.exception("A child process failed")
    finally:
        _flush_output()
        os._exit(status & 0xFF)


def _work(worker: Any, slot: Slot, reader: int, spool: int) -> int:
    """Execute tasks until told to stop; return the exit status."""
    conf, bell = worker.app.conf, worker.bell
    most, memory = conf.worker_max_tasks_per_child, conf.worker_max_memory_per_child
    unit = 1024 if sys.platform == "darwin" else 1  # of the system, in KiB
    usage = _symbol("resource:getrusage") if memory else None
    try:
        with allow_join_result(False):
            while True:
                try:
                    token = os.read(reader, _TOKEN.size)
                except BlockingIOError:  # there is nothing to do, and perhaps something to collect
                    if slot.fresh and not bell.awake:
                        bell.ring()
                    _flush_output()
                    _readable(reader, 60.0)
                    continue
                ticket, offset, length = _TOKEN.unpack(token or _STOP)
                if not ticket:
                    return 0
                raw = os.pread(spool, length, offset)
                _run_claim(worker, slot, Claim(None, ticket, "", 0, raw))
                if most and slot.executed >= most or usage and usage(0).ru_maxrss > memory * unit:
                    return 0
    except SystemExit as exc:  # from a task
        return exc.code if isinstance(exc.code, int) else bool(exc.code)
    finally:
        if slot.fresh:
            bell.ring()


def _die_with_parent(parent: int) -> None:
    """See to it that this process does not outlive its parent, even in C code."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform.startswith("linux"):
        _symbol("ctypes:CDLL")(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:
        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it died before this was set up
        os._exit(1)


def _home(app: TaskQ) -> str:
    """Return where a spawned child finds an app, 'proj.tasks:app'; ImproperlyConfigured."""
    modules = sorted(sys.modules.items(), key=lambda item: item[0] == "__main__")  # rather another
    for name, module in modules:
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            known = value is app and name not in (__name__, "__mp_main__")
            if known and hasattr(module, "__file__"):
                return f"{name}:{attribute}"
    raise ImproperlyConfigured("the start method 'spawn' needs an app that a file holds")


def _spawn(worker: Worker, order: Sequence[Any]) -> int:
    """Start a child in a fresh interpreter; it finds the app by name. Returns its pid."""
    import multiprocessing.spawn
    import pickle
    import subprocess

    main = multiprocessing.spawn.get_preparation_data(order[0])
    del main["authkey"]
    logs = None if task_logger.propagate and not setup_logging.receivers else worker.log_options
    about = (worker.hostname, worker.overrides, worker.journal.path, worker.bell.path)
    letter = (_home(worker.app), *about, logs, order)
    code = f"import sys; sys.path[:] = {main['sys_path']!r}; import {__name__} as own; "
    code += f"own._be_spawned({worker.pid}, {main!r}, {pickle.dumps(letter)!r})"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, "-c", code]
    process = subprocess.Popen(command, pass_fds=order[2:], stdin=subprocess.DEVNULL)
    process.returncode = 0  # the pool waits for it itself
    return process.pid


def _be_spawned(parent: int, main: dict[str, Any], letter: bytes) -> NoReturn:
    """Be a child of the pool in a fresh interpreter, with what `_spawn` says of its parent."""
    import multiprocessing.spawn
    import pickle

    global _process_name
    _process_name = main["name"]
    _die_with_parent(parent)
    multiprocessing.spawn.prepare(main)  # the letter may name what the script defines
    address, hostname, overrides, journal, bell, logs, order = pickle.loads(letter)
    app = _symbol(address)
    app.conf.update(overrides)
    app.import_default_modules()
    app.set_current()
    if logs is not None:
        configure_logging(app, **logs, index=order[1] + 1)
    worker = types.SimpleNamespace(app=app, hostname=hostname, pid=parent, pool=PreforkPool)
    worker.log_options = {"logfile": None}  # which is done
    worker.journal, worker.bell = Journal(journal), Bell(bell, mine=False)
    _be_child(worker, *order)


# ==== 14. Remote control =========================================================================
#
# Messages are those of kombu's pidbox. A command goes to the exchange celery.pidbox and so to every
# worker; each that it is for carries it out, and sends {its name: its reply} to the exchange
# reply.celery.pidbox, by a routing key that is the caller's own.

#: A command of workers. run: its function. kind: 'inspect' (it asks) or 'control' (it changes).
#: args: names of its arguments, and what converts each word of the command line; variadic: the name
#: of the list of the words that follow; signature: what help shows of them; alias: a second name;
#: default_timeout: how many seconds the command line waits for replies.
Command = collections.namedtuple(
    "Command",
    "run kind help args signature variadic visible alias default_timeout",
    defaults=("", (), "", None, True, None, 1.0),
)
#: The commands that workers know, by name, and those of Celery's that they do not.
COMMANDS: dict[str, Command] = {}
_NO_COMMANDS = "election memdump memsample objgraph pool_restart revoke_by_stamped_headers".split()


def inspect_command(*, name: str | None = None, kind: str = "inspect", **options: Any) -> Any:
    """Make a function a command of `inspect`: `@inspect_command(args=[("n", int)])`. It is called
    with the worker's Pidbox and the arguments by name, and returns the reply, which JSON must hold.
    Options: fields of Command; help is by default the docstring's first line."""

    def register(run: Any) -> Any:
        about = {"help": (run.__doc__ or "").strip().partition("\n")[0], **options}
        COMMANDS[name or run.__name__] = command = Command(run, kind, **about)
        if command.alias:
            COMMANDS[command.alias] = command._replace(visible=False)
        return run

    return register


def control_command(**options: Any) -> Any:
    """Make a function a command of `control`, as `inspect_command` does; it returns {"ok": ...}."""
    return inspect_command(kind="control", **options)


def find_command(name: str, *kinds: str) -> Command:
    """Return a command of these kinds; AttributeError, with the nearest, if there is none."""
    if name in COMMANDS and COMMANDS[name].kind in kinds:
        return COMMANDS[name]
    known = sorted(n for n, each in COMMANDS.items() if each.kind in kinds and each.visible)
    hint = _hint(str(name), known, 0.6).replace(": did", ". Did") or "."
    why = f"not recognized{hint} Available {' and '.join(kinds)} commands: {', '.join(known)}"
    why = "is Celery's: taskq does not have it." if name in _NO_COMMANDS else why
    raise AttributeError(f"Command {name} {why}")


def command_arguments(command: Command, args: Sequence[Any]) -> dict[str, Any]:
    """Return a command's positional arguments by name; TypeError if they are too many."""
    found: dict[str, Any] = {name: arg for (name, _), arg in zip(command.args, args)}
    rest = list(args[len(command.args) :])
    if command.variadic:
        found[command.variadic] = _listed(rest[0]) if len(rest) == 1 else rest
    elif rest:
        raise TypeError("too many arguments")
    return found


_IDS = "[id1 [id2 [... [idN]]]]"
_MATCHERS: dict[str, Callable[[str, str], Any]] = {
    "glob": lambda node, pattern: _symbol("fnmatch:fnmatch")(node, pattern),
    "pcre": lambda node, pattern: re.match(pattern, node),
}

#: What Celery tells of a queue, of its exchange and of the broker, where taskq has no choice.
_QUEUE: dict[str, Any] = dict.fromkeys(
    "queue_arguments binding_arguments consumer_arguments alias no_declare expires message_ttl "
    "max_length max_length_bytes max_priority".split()
)
_QUEUE.update(durable=True, exclusive=False, auto_delete=False, no_ack=False, bindings=[])
_EXCHANGE: dict[str, Any] = {"arguments": None, "durable": True, "passive": False}
_EXCHANGE.update(auto_delete=False, delivery_mode=None, no_declare=False)
_BROKER: dict[str, Any] = dict.fromkeys(("login_method", "uri_prefix", "credential_provider"))
_BROKER.update(insist=False, transport_options={}, failover_strategy="round-robin", alternates=[])
_BROKER.update(connect_timeout=4, heartbeat=0)


class Pidbox:
    """A worker's end of remote control, and the `state` that commands get: its `app`, `hostname`,
    and `consumer` (or `worker`), the Worker itself."""

    def __init__(self, worker: Any) -> None:
        self.worker = self.consumer = worker
        self.app, self.hostname = worker.app, worker.hostname
        exchange = f"{self.app.conf.control_exchange}.pidbox"
        if worker.store.foreign:  # it keeps no revokes: ask the others
            others = self.app.control.inspect(timeout=3.0)
            known = others.hello(self.hostname, list(worker.revoked)) or {}
            for node, reply in known.items():
                try:
                    self.merge(**(reply or {}))
                except TypeError as exc:
                    worker_logger.error("Cannot sync with %s: %r", node, exc)
        place = exchange, "", f"{self.hostname}.{exchange}"
        self.inbox = worker.store.subscribe("fanout", *place, worker.bell)

    def merge(self, revoked: Iterable[str] | None = None, clock: int = 0) -> None:
        """Take over what another worker knows; TypeError if that is something else."""
        self.app.clock.adjust(clock)
        for id in map(str, revoked or ()):
            self.worker.revoked.setdefault(id, time.time() + _REVOKE_SECONDS)

    def handle(self) -> None:
        """Carry out the commands that have come, and send the replies."""
        for text in self.inbox.read():
            try:
                request, headers = decode_post(text)
                self.app.clock.adjust(headers.get("clock"))
                to, pattern, matcher = map(request.get, ("destination", "pattern", "matcher"))
                is_meant = not (pattern and matcher) or _MATCHERS[matcher](self.hostname, pattern)
                if self.hostname in to if to else is_meant:
                    self._answer(*map(request.get, ("method", "arguments", "reply_to", "ticket")))
            except SystemExit as exc:
                self.worker.stop("warm", exc.code or 0)
            except Exception as exc:  # whatever has been sent, the worker lives
                worker_logger.error("Control command error: %r", exc, exc_info=True)

    def _answer(self, method: Any, arguments: Any, reply_to: Any, ticket: Any) -> None:
        try:
            reply = find_command(method, "inspect", "control").run(self, **(arguments or {}))
            _json_encode(reply)
        except Exception as exc:
            is_known = str(method) in COMMANDS
            worker_logger.error("pidbox command error: %r", exc, exc_info=is_known)
            reply = {"error": "unknown task" if isinstance(exc, NotRegistered) else repr(exc)}
        if reply_to:
            headers = {"ticket": ticket, "clock": self.app.clock.forward()}
            text = encode_post(**reply_to, body={self.hostname: reply}, headers=headers)
            post = (reply_to["routing_key"], text)
            self.worker.store.fan_out("direct", reply_to["exchange"], [post])

    # -- commands --------------------------------------------------------------------------------
    def tasks(self, state: str, safe: Any = False) -> Iterator[Any]:
        """Yield a pair for each task that is scheduled, reserved or active here: what Celery says
        of it, and its ETA; `safe`: arguments by their repr. What is no task is passed over."""
        worker, pool = self.worker, self.worker.pool
        rows: Any = pool.active()
        if state == "scheduled":
            rows = zip(worker.store.scheduled(worker.queue_names))
        elif state == "reserved":
            begun = {claim.ticket for claim, _, _ in rows}
            rows = zip(claim for claim in pool.held.values() if claim.ticket not in begun)
        for claim, *more in rows:
            with contextlib.suppress(MalformedMessage):
                headers = claim.message.headers
                args, kwargs = headers.get("argsrepr"), headers.get("kwargsrepr")
                if not safe and claim.message.content_type == CONTENT_TYPES["json"]:
                    args, kwargs, _ = claim.message.payload(["json"])
                began, pid = more or (None, None)
                name, task = headers["task"], self.app.tasks.get(headers["task"])
                about = {"id": headers["id"], "name": name, "args": args, "kwargs": kwargs}
                about.update(type=name, hostname=self.hostname, time_start=began, worker_pid=pid)
                about["acknowledged"] = began is not None and not (task and task.acks_late)
                about["delivery_info"] = request_of(claim.message, (), {}, {}, "").delivery_info
                yield about, headers.get("eta")

    @inspect_command(variadic="ids", signature=_IDS)
    def query_task(self, ids: Any) -> Any:
        """Query for task information by id."""
        ids, states = _listed(ids), ("scheduled", "reserved", "active")
        found = ((state, about) for state in states for about, _ in self.tasks(state))
        return {about["id"]: (state, about) for state, about in found if about["id"] in ids}

    @inspect_command(variadic="taskinfoitems", signature="[attr1 [attr2 [... [attrN]]]]")
    def registered(self, taskinfoitems: Any = None, builtins: bool = False) -> Any:
        """List of registered tasks."""
        found, wanted = [], taskinfoitems or ("exchange", "routing_key", "rate_limit")
        for name, task in sorted(self.app.tasks.items()):
            values = ((n, getattr(task, n, None)) for n in wanted if n[0] != "_")
            shown = " ".join(f"{n}={value}" for n, value in values if value is not None)
            if builtins or not name.startswith("celery."):
                found.append(f"{name} [{shown}]" if shown else name)
        return found

    @inspect_command(visible=False, args=[("from_node", str), ("revoked", list)])
    def hello(self, from_node: str, revoked: Any = None) -> Any:
        """Exchange what has been revoked with a worker that starts."""
        if from_node == self.hostname:
            return None
        worker_logger.info("sync with %s", from_node)
        self.merge(revoked)
        return {"revoked": list(self.worker.revoked), "clock": self.app.clock.forward()}

    @inspect_command()
    def active_queues(self) -> Any:
        """List the task queues a worker is currently consuming from."""
        return [
            {"name": name, "exchange": {**at._asdict(), **_EXCHANGE}, "routing_key": key, **_QUEUE}
            for name, at, key in self.worker.queues
        ]

    @inspect_command()
    def stats(self) -> Any:
        """Request worker statistics/information."""
        worker, conf, size = self.worker, self.app.conf, self.worker.pool.size
        at: Any = _symbol("urllib.parse:urlsplit")(worker.store.uri)
        broker = {**_BROKER, "transport": at.scheme, "hostname": at.hostname, "port": at.port}
        broker.update(userid=at.username, virtual_host=at.path[1:], ssl=at.scheme == "rediss")
        pool: dict[str, Any] = {"writes": "N/A", "put-guarded-by-semaphore": False}
        pool["implementation"] = f"{__name__}:{type(worker.pool).__name__}"
        pids = [child.pid for child in getattr(worker.pool, "children", ())] or [os.getpid()]
        pool.update({"max-concurrency": size, "processes": pids})
        pool["max-tasks-per-child"] = conf.worker_max_tasks_per_child or "N/A"
        pool["timeouts"] = [conf.task_soft_time_limit or 0, conf.task_time_limit or 0]
        most, least = worker.autoscaled or (size, None)
        scale = {"max": most, "min": least, "current": size, "qty": len(worker.pool.held)}
        about = {"total": dict(worker.total), "pid": os.getpid(), "broker": broker, "pool": pool}
        about.update(clock=str(self.app.clock.value), uptime=round(time.time() - worker.started))
        about.update(prefetch_count=worker.qos.value, rusage="N/A")
        about.update({"autoscaler": scale} if worker.autoscaled else {})
        with contextlib.suppress(ImportError):  # Windows
            used = _symbol("resource:getrusage")(0)
            about["rusage"] = {n[3:]: getattr(used, n) for n in dir(used) if n.startswith("ru_")}
        return about

    @control_command(variadic="task_id", signature=_IDS)
    def revoke(self, task_id: Any, terminate: Any = False, signal: Any = None) -> Any:
        """Revoke task by task id (or list of ids)."""
        ids = set(map(str, _listed(task_id)))
        ended = ", ".join(self.worker.revoke(ids, bool(terminate), signal or "TERM"))
        text = f"terminate: {ended or 'tasks unknown'}"
        return {"ok": text if terminate else f"tasks {ids} flagged as revoked"}

    @control_command(args=[("task_name", str), ("rate_limit", str)],
                     signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>")  # fmt: skip
    def rate_limit(self, task_name: str, rate_limit: Any) -> Any:
        """Tell worker(s) to modify the rate limit for a task by type."""
        try:
            _rate(rate_limit)
        except ValueError as exc:
            return {"error": f"Invalid rate limit string: {exc!r}"}
        self.app.tasks[task_name].rate_limit = rate_limit
        self.worker.read_limits()
        if not rate_limit:
            worker_logger.info("Rate limits disabled for tasks of type %s", task_name)
            return {"ok": "rate limit disabled successfully"}
        worker_logger.info("New rate limit for tasks of type %s: %s.", task_name, rate_limit)
        return {"ok": "new rate limit set successfully"}

    @control_command(args=[("task_name", str), ("soft", float), ("hard", float)],
                     signature="<task_name> <soft_secs> [hard_secs]")  # fmt: skip
    def time_limit(self, task_name: str, soft: Any = None, hard: Any = None) -> Any:
        """Tell worker(s) to modify the time limit for task by type."""
        conf, task = self.app.conf, self.app.tasks[task_name]
        most = conf.task_time_limit if hard is None else hard
        least = conf.task_soft_time_limit if soft is None else soft
        if not (_is_limit(least) and _is_limit(most)) or (least or 0) > (most or 1e9):
            raise ValueError(f"soft={soft!r}, hard={hard!r}: expected seconds, soft below hard")
        limits = {"time_limit": most, "soft_time_limit": least}
        vars(task).update(limits)
        known = self.worker.overrides.get("task_annotations") or conf.task_annotations or {}
        known = {**known, task_name: {**known.get(task_name, {}), **limits}}
        self.worker.overrides["task_annotations"] = known  # for children that are spawned
        self.app.generation += 1  # children that know the old limits are replaced
        text = "New time limits for tasks of type %s: soft=%s hard=%s"
        worker_logger.info(text, task_name, soft, hard)
        return {"ok": "time limits set successfully"}

    @control_command(args=[(n, str) for n in ("queue", "exchange", "exchange_type", "routing_key")],
                     signature="<queue> [exchange [type [routing_key]]]")  # fmt: skip
    def add_consumer(
        self, queue: str, exchange: Any = None, exchange_type: Any = None, routing_key: Any = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        """Tell worker(s) to consume from task queue by name."""
        router, kind = self.app.router, Exchange(exchange or queue, exchange_type or "direct")
        "".join((queue, kind.name, routing_key or "")).encode()  # what is no text is an error now
        if queue not in router.queues:
            router.add(Queue(queue, kind, routing_key or queue))
        if queue not in self.worker.queue_names:
            self.worker.serve([*self.worker.queues, router.queues[queue]])
            worker_logger.info("Started consuming from %s", queue)
        return {"ok": f"add consumer {queue}"}

    @control_command(args=[("queue", str)], signature="<queue>")
    def cancel_consumer(self, queue: str) -> Any:
        """Tell worker(s) to stop consuming from task queue by name."""
        worker_logger.info("Canceling queue %s", queue)
        self.worker.serve([each for each in self.worker.queues if each.name != queue])
        return {"ok": f"no longer consuming from {queue}"}

    @control_command(args=[("max", int), ("min", int)], signature="[max [min]]")
    def autoscale(self, max: Any = None, min: Any = None) -> Any:
        """Modify autoscale settings."""
        if not self.worker.autoscaled:
            raise ValueError("Autoscale not enabled")
        most, least = self.worker.autoscaled
        text = f"{most if max is None else max},{least if min is None else min}"
        self.worker.autoscaled = most, least = _most_and_least(text)
        self.worker.scale()
        return {"ok": f"autoscale now max={most} min={least}"}

    def resize(self, how: str, n: int) -> Any:
        """Have the pool grow or shrink."""
        if self.worker.autoscaled:
            why = "is not supported with autoscale. Adjust autoscale range instead."
            return {"error": f"pool_{how} {why}"}
        self.worker.pool.resize(self.worker.pool.size + int(n if how == "grow" else -n))
        return {"ok": f"pool will {how}"}

    def set_events(self, on: bool) -> Any:
        """Switch the events of tasks on or off."""
        already = "already " if bool(self.worker.journal.events) is on else ""
        self.worker.set_events(on)
        return {"ok": f"task events {already}{'enabled' if on else 'disabled'}"}

    @control_command()
    def shutdown(self, msg: str = "Got shutdown from remote") -> None:
        """Shutdown worker(s)."""
        worker_logger.warning(msg)
        raise SystemExit(0)


_N = [("n", int)], "[N=1]"
for _name, _kind, _help, _run, *_more in (
    ("ping", "inspect", "Ping worker(s).", lambda state: {"ok": "pong"}),
    ("revoked", "inspect", "List of revoked task-ids.", lambda state: list(state.worker.revoked)),
    ("active", "inspect", "List of tasks currently being executed.",
     lambda state, safe=False: [about for about, _ in state.tasks("active", safe)],
     [("safe", bool)]),
    ("reserved", "inspect", "List of currently reserved tasks, not including scheduled/active.",
     lambda state: [about for about, _ in state.tasks("reserved")]),
    ("scheduled", "inspect", "List of currently scheduled ETA/countdown tasks.",
     lambda state: [{"eta": eta, "priority": 6, "request": about}
                    for about, eta in state.tasks("scheduled")]),
    ("clock", "inspect", "Get current logical clock value.",
     lambda state: {"clock": state.app.clock.value}),
    ("report", "inspect", "Information about the installation for bug reports.",
     lambda state: {"ok": state.app.bugreport()}),
    ("conf", "inspect", "List configuration.",
     lambda state, with_defaults=False: state.app.conf.table(with_defaults),
     [("with_defaults", lambda text: text.lower() in ("1", "true", "yes"))],
     "[include_defaults=False]"),
    ("terminate", "control", "Terminate task by task id (or list of ids).",
     lambda state, signal, task_id: state.revoke(task_id, True, signal),
     [("signal", str)], f"<signal> {_IDS}", "task_id"),
    ("pool_grow", "control", "Grow pool by n processes/threads.",
     lambda state, n=1: state.resize("grow", n), *_N),
    ("pool_shrink", "control", "Shrink pool by n processes/threads.",
     lambda state, n=1: state.resize("shrink", n), *_N),
    ("enable_events", "control", "Tell worker(s) to send task-related events.",
     lambda state: state.set_events(True)),
    ("disable_events", "control", "Tell worker(s) to stop sending task-related events.",
     lambda state: state.set_events(False)),
    ("heartbeat", "control", "Tell worker(s) to send event heartbeat immediately.",
     lambda state: state.worker.heartbeat()),
):  # fmt: skip
    COMMANDS[_name] = Command(_run, _kind, _help, *_more)


class Inspect:
    """Asks an app's workers: `app.control.inspect(["w1@example.com"]).active()`. It has a method
    for each command of `inspect`, your own too, with its arguments: conf(True), query_task("id1").
    They return {node: reply}, or None if nobody answers; for a single name as the destination its
    reply. Other options are those of `Control.broadcast`."""

    def __init__(self, control: Control, destination: Any = None, **options: Any) -> None:
        self.node = destination if isinstance(destination, str) else None
        self._options = {"destination": [self.node] if self.node else destination, **options}
        self._control = control

    def __getattr__(self, name: str) -> Any:
        command = find_command(name, "inspect")

        def ask(*args: Any, **named: Any) -> Any:
            options = {**self._options, "reply": True}
            one = self.node if "destination" not in named else None
            options["destination"] = named.pop("destination", options["destination"])
            arguments = {**command_arguments(command, args), **named}
            replies = self._control.broadcast(name, arguments, **options)
            found = {node: reply for each in replies for node, reply in each.items()}
            return found.get(one) if one else found or None

        return ask


class Control:
    """Remote control of an app's workers: `app.control`. It has a method for each command of
    `control`, your own too, with its arguments, perhaps the destination, and options of
    `broadcast`: `app.control.time_limit("tasks.add", soft=60, hard=120, reply=True)`."""

    def __init__(self, app: TaskQ) -> None:
        self.app = app
        self.inspect = functools.partial(Inspect, self)

    def broadcast(
        self, command: str, arguments: Any = None, destination: Any = None, connection: Any = None,
        reply: bool = False, timeout: float | None = 1.0, limit: int | None = None,
        callback: Any = None, channel: Any = None, pattern: str | None = None,
        matcher: str | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """Send a command to workers; with `reply` return their replies, [{node: reply}, ...].
        arguments: a dict, to which `more` is added. destination: a list of nodes, instead of all;
        or a `pattern` of their names, and the `matcher` for it, 'glob' or 'pcre'. timeout: seconds
        to wait for the next reply; None without end. limit: how many replies are enough, if not all
        of those who were asked. callback: called with each. The others, Celery's, change nothing.
        TypeError or ValueError for arguments that a command cannot have."""
        if destination is not None and not isinstance(destination, (list, tuple)):
            given = f"destination={_repr(destination, 60)}"
            raise ValueError(f"{given}: expected a list of nodes, such as ['celery@example.com']")
        if pattern and matcher not in _MATCHERS:
            raise ValueError(f"matcher={matcher!r}: expected {_names(_MATCHERS)}")
        store, clock, ticket = self.app.store, self.app.clock, uuid()
        arguments = {**(arguments or {}), **more}
        if command in COMMANDS:
            _symbol("inspect:signature")(COMMANDS[command].run).bind(None, **arguments)
        if command in ("revoke", "terminate"):
            _signal_number(arguments.get("signal") or "TERM")
            if not destination and not pattern:
                store.revoke(map(str, _listed(arguments["task_id"])), _REVOKE_SECONDS)
        exchange = f"{self.app.conf.control_exchange}.pidbox"
        headers = {"clock": clock.forward(), "expires": time.time() + timeout if timeout else 0}
        body = {"method": command, "arguments": arguments, "destination": destination}
        body.update(pattern=pattern, matcher=matcher)
        if not reply:
            store.fan_out("fanout", exchange, [("", encode_post(exchange, "", body, headers))])
            return None
        to = f"reply.{exchange}"
        body.update(ticket=ticket, reply_to={"exchange": to, "routing_key": ticket})
        replies: list[Any] = []
        with store.listening("direct", to, ticket, f"{ticket}.{to}") as read:
            post = encode_post(exchange, "", body, headers)
            asked = store.fan_out("fanout", exchange, [("", post)])
            limit, last = limit or min(asked, len(destination or ()) or asked), time.monotonic()
            while len(replies) < limit:
                left = 1.0 if timeout is None else last + timeout - time.monotonic()
                texts = read(max(0.0, min(left, 0.5)))
                if not texts and left <= 0:
                    break
                for text in texts[: limit - len(replies)]:
                    found, headers = decode_post(text)
                    clock.adjust(headers.get("clock"))
                    replies.append(found)
                    last = time.monotonic()
                    if callback is not None:
                        callback(found)
        return replies

    def __getattr__(self, name: str) -> Any:
        command = find_command(name, "control")

        def send(*args: Any, **options: Any) -> Any:
            if len(args) == len(command.args) + 1 and not command.variadic:
                *args, options["destination"] = args  # type: ignore[assignment]
            return self.broadcast(name, command_arguments(command, args), **options)

        return send

    def revoke(
        self, task_id: Any, destination: Any = None, terminate: bool = False,
        signal: Any = "SIGTERM", **options: Any,
    ) -> Any:  # fmt: skip
        """Have workers not run a task, by its id, or several, by a list; with `terminate` also end
        the process of one that runs, by this signal. A revoke for all is kept in an SQLite file,
        for workers that are started later."""
        arguments = {"task_id": task_id, "terminate": terminate, "signal": signal}
        return self.broadcast("revoke", arguments, destination, **options)

    def terminate(self, task_id: Any, destination: Any = None, **options: Any) -> Any:
        """Revoke tasks and end the processes where they run."""
        return self.revoke(task_id, destination, True, **options)

    def ping(self, destination: Any = None, timeout: float | None = 1.0, **options: Any) -> Any:
        """Return [{node: {'ok': 'pong'}}, ...]."""
        return self.broadcast("ping", None, destination, None, True, timeout, **options)

    def purge(self, connection: Any = None) -> int:
        """Delete the messages that wait in the app's queues; return how many there were."""
        return sum(map(self.app.store.purge, self.app.router.queues))

    discard_all = purge


def _pretty(reply: Any) -> tuple[str, str]:
    """Return whether a reply is OK or an ERROR, and what it says, indented, as people read it."""
    status, text = "OK", reply if isinstance(reply, str) else repr(reply)
    if isinstance(reply, list):
        text = "\n".join(f"* {item}" for item in reply) or "- empty -"
    elif isinstance(reply, dict) and reply.keys() & {"ok", "error"}:
        status = "OK" if "ok" in reply else "ERROR"
        text = _pretty(reply[status.lower()])[1]
    elif isinstance(reply, dict):
        text = json.dumps(reply, sort_keys=True, indent=4, default=str)
    return status, "\n".join(f"    {line}" for line in text.split("\n"))


def command_list(kind: str) -> str:
    """Return the commands of `inspect` or `control` with their help."""
    lines = [f"{kind.capitalize()} Commands:"]
    for name, command in sorted(COMMANDS.items()):
        if command.kind == kind and command.visible:
            head = f"  {name} {command.signature}".rstrip()
            gap = " " * (34 - len(head)) or "\n" + " " * 34
            lines.append(head + gap + command.help)
    return "\n".join(lines)


def _remote_command(app: TaskQ, options: Any) -> None:
    """Run the command inspect, control or status."""
    kind = options.command
    if kind != "status" and options.list:
        print(command_list(kind))
        return

    def show(reply: Any) -> None:
        for node, said in reply.items():
            status, text = _pretty(said)
            print(f"->  {node}: {status}", *([text] if kind != "status" else []), sep="\n")

    name, *words = ["ping"] if kind == "status" else options.words or [""]
    try:
        command = find_command(name, "inspect" if kind == "status" else kind)
        converted = [convert(word) for (_, convert), word in zip(command.args, words)]
        arguments = command_arguments(command, converted + words[len(converted) :])
        replies = app.control.broadcast(
            name, arguments, _name_list(options.destination) or None, reply=True,
            timeout=options.timeout or command.default_timeout,
            callback=None if options.json else show,
        )  # fmt: skip
    except OperationalError as exc:
        raise CommandError(f"Could not connect to the store. Reason: {exc}", 69) from None
    except AttributeError as exc:
        raise CommandError(str(exc) if name else "Missing argument 'COMMAND'") from None
    except (TypeError, ValueError) as exc:
        takes = f"takes arguments: {command.signature or 'none'}"
        raise CommandError(f"Command {name!r} {takes} ({exc})") from None
    if not replies:
        raise CommandError("No nodes replied within time constraint", 69)
    if options.json:
        found = {node: said for reply in replies for node, said in reply.items()}
        print(json.dumps(replies if kind == "control" else found, default=_encode_rich))
    elif kind != "control" and not options.quiet:
        print(f"\n{_plural(len(replies), 'node')} online.")


# ==== 15. Worker =================================================================================


class _LogFormatter(logging.Formatter):
    """Gives a line its process and its task by the pool's names, and a colour by its level."""

    COLORS = {"DEBUG": 34, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}

    color = False  # whether to use them

    def format(self, record: logging.LogRecord) -> str:
        record.processName = _process_name
        task, request = _thread.stack[-1] if _thread.stack else (None, None)
        record.__dict__.setdefault("task_name", getattr(task, "name", "???"))
        record.__dict__.setdefault("task_id", getattr(request, "id", "???"))
        text = super().format(record)
        code = self.COLORS.get(record.levelname) if self.color else None
        return f"\033[1;{code}m{text}\033[0m" if code else text


class _LogStream(io.TextIOBase):
    """Stands for stdout and stderr in a worker: each line that a task prints is one of the log."""

    encoding = "utf-8"

    def __init__(self, level: int) -> None:
        self.level = level
        self.local = threading.local()  # rest: the begin of a line; None: the log itself prints

    def write(self, text: Any) -> int:
        held = getattr(self.local, "rest", "")
        if held is not None:
            *lines, rest = f"{held}{text}".split("\n")
            self.local.rest = None
            for line in filter(str.strip, lines):
                logging.getLogger("celery.redirected").log(self.level, line.rstrip())
            self.local.rest = rest
        return len(str(text))

    def flush(self) -> None:
        if getattr(self.local, "rest", None):
            self.write("\n")


def log_path(path: str, index: int = 0) -> str:
    """Expand %i, the index of a pool's process, and %I, the same after a dash or nothing for 0."""
    return path.replace("%i", str(index)).replace("%I", f"-{index}" if index else "")


def configure_logging(app: TaskQ, loglevel: int, logfile: Any, color: Any, index: int = 0) -> None:
    """Set up the log as Celery does; `index` of the pool's process: for a file of its own."""
    conf, stream = app.conf, sys.__stderr__
    logfile = logfile and log_path(logfile, index)
    for default in (conf.worker_log_color, not logfile and stream is not None and stream.isatty()):
        color = default if color is None else color
    named = {"sender": None, "loglevel": loglevel, "logfile": logfile, "colorize": color}
    if setup_logging.send(format=conf.worker_log_format, **named):
        return
    root = logging.getLogger()
    if conf.worker_hijack_root_logger:
        root.handlers[:] = []
    task_logger.handlers[:] = []
    task_logger.propagate = False
    logger.setLevel(loglevel)
    for log, fmt, after_setup in (
        (root, conf.worker_log_format, after_setup_logger),
        (task_logger, conf.worker_task_log_format, after_setup_task_logger),
    ):
        if not log.handlers:
            handler: Any = logging.StreamHandler(stream)
            if logfile:
                handler = _symbol("logging.handlers:WatchedFileHandler")(logfile)
            handler.setFormatter(_LogFormatter(fmt))
            handler.formatter.color = color
            log.addHandler(handler)
            log.setLevel(loglevel)
        after_setup.send(logger=log, format=fmt, **named)
    if conf.worker_redirect_stdouts:
        level = _log_level(conf.worker_redirect_stdouts_level)
        sys.stdout = sys.stderr = _LogStream(level)  # type: ignore[assignment]


def get_task_logger(name: str) -> logging.Logger:
    """Return a logger whose lines name the task that logs: `log = get_task_logger(__name__)`."""
    log = logging.getLogger(name)
    if log is not task_logger:
        log.parent = task_logger
    return log


def node_format(text: str, node: str) -> str:
    """Expand %p (the node's name), %n (before the @), %h (host) and %d (its domain)."""
    name, _, host = node.partition("@")
    parts = {"p": node, "n": name, "h": host, "d": host.partition(".")[2], "%": "%"}
    return re.sub("%([pnhd%])", lambda match: parts[match[1]], text)


_PATCHES = {"gevent": "gevent.monkey:patch_all", "eventlet": "eventlet:monkey_patch"}

POOLS: dict[str, Any] = dict.fromkeys(("prefork", "processes"), PreforkPool)
POOLS.update(dict.fromkeys(("threads", *_PATCHES), ThreadPool), solo=SoloPool)

#: A worker's options that stand for settings: `time_limit` is the setting task_time_limit.
_OPTION_SETTINGS = {re.sub("^(worker|task)_", "", name): name for name in SETTINGS}
_OPTION_SETTINGS.update(broker="broker_url", task_events="worker_send_task_events")
_OPTION_SETTINGS.update(statedb="worker_state_db", schedule_filename="beat_schedule_filename")

#: For how many seconds a revoke is kept (in Celery for 3 hours: a later ETA would run), how many.
_REVOKE_SECONDS, _REVOKES_MAX = 30 * 86_400, 50_000


class Worker:
    """Claims messages, has a pool run them, and settles what comes of them. Its options are those
    of the command line, by their long names. Most set settings while it runs: `pool`,
    `concurrency`, `time_limit`, … Names may be lists, or text with commas; hostname, logfile and
    statedb take %n, %h and %d, as node_format does."""

    stopping: str | None = None  # 'warm' or 'cold'
    exitcode = 0
    restarting = False  # whether whoever started it shall start it anew when it has ended
    control: Any = None  # its end of remote control
    beat: Any = None
    _limits_of = -1  # the app's generation whose rate limits it keeps
    _hungry = True  # whether there may be more to claim
    _due: float | None = None  # when the next message with an ETA is due
    # When it last looked for dead workers and for commands, sent a heartbeat, had a new task:
    _looked = _attended = _beaten = _busy = 0.0
    #: The options that are no settings.
    OPTIONS = """hostname queues exclude_queues loglevel logfile quiet no_color purge autoscale
        beat without_heartbeat heartbeat_interval""".split()

    def __init__(self, app: TaskQ, **options: Any) -> None:
        self.app, conf = app, app.conf
        own = types.SimpleNamespace(**{name: options.pop(name, None) for name in self.OPTIONS})
        self.own_options = own
        app.import_default_modules()
        host, name = _hostname(), own.hostname or "celery"
        name = name if "@" in name else f"{name}@%h"
        self.hostname = app.node = node_format(name, f"{host.partition('.')[0]}@{host}")
        celeryd_init.send(sender=self.hostname, instance=self, conf=conf, options=options)
        for name in options.keys() - _OPTION_SETTINGS.keys():
            hint = _hint(name, (*self.OPTIONS, *_OPTION_SETTINGS), 0.6)
            raise TypeError(f"a worker has no option {name!r}{hint}")
        found = {_OPTION_SETTINGS[k]: value for k, value in options.items() if value is not None}
        if "include" in found:
            found["include"] = [*_listed(conf.include), *_name_list(found["include"])]
        self.overrides = found  # settings, which spawned children take too
        self.replaced = {name: conf[name] for name in found}  # put back at the end
        self.pool_name = found.get("worker_pool", conf.worker_pool)
        self.concurrency = _count(found.get("worker_concurrency", conf.worker_concurrency))
        #: The most and the fewest processes, where their number follows the work.
        self.autoscaled: Any = own.autoscale and _most_and_least(own.autoscale)
        path = own.logfile and os.path.abspath(node_format(own.logfile, self.hostname))
        color = False if own.no_color else None
        self.log_options: dict[str, Any] = {"logfile": path, "color": color}
        self.log_options["loglevel"] = _log_level(own.loglevel or "WARNING")
        self.beats = 0.0 if own.without_heartbeat else float(own.heartbeat_interval or 2)
        self.started = time.time()
        self.total: collections.Counter[str] = collections.Counter()  # claims, by their task's name
        self.ready = threading.Event()
        self._unsettled: list[tuple[Claim, Any]] = []
        self._begun: set[int] = set()  # tickets of running tasks that were announced
        conf.update(found)
        app.import_default_modules()

    def start(self) -> int:
        """Run until told to stop; return the exit status."""
        own = self.own_options
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stdout))  # put back at the end
            stack.enter_context(contextlib.redirect_stderr(sys.stderr))
            configure_logging(self.app, **self.log_options)
            self._connect()
            self.setup()
            celeryd_after_setup.send(sender=self.hostname, instance=self, conf=self.app.conf)
            count = sum(map(self.store.purge, self.queue_names)) if own.purge else 0
            text = f"purge: Erased {_plural(count, 'message')} from the queue.\n\n" if count else ""
            if sys.__stdout__:
                print(text + ("" if own.quiet else self.banner()), file=sys.__stdout__, flush=True)
            with contextlib.suppress(ValueError):  # in another thread than the main one
                self._install_signals(stack)
            return self.run()

    def check(self) -> None:
        """Raise where an address or option cannot be used, before anything is started."""
        if POOLS[self.pool_name].kills and not hasattr(os, "fork"):
            self.pool_name = "threads"
        kills = POOLS[self.pool_name].kills
        if kills and not self.app.store.shared:
            raise ImproperlyConfigured("memory:// lives in one process: use --pool=threads or solo")
        if self.autoscaled and not kills:
            raise ImproperlyConfigured(f"the {self.pool_name} pool has no --autoscale: use prefork")
        if kills and self.app.conf.worker_pool_start_method == "spawn":
            _home(self.app)
        _patch_greenlets(self.pool_name)
        if not self.app.store.foreign:  # a server may come later
            self.app.store.look(())
        _ = self.app.backend
        router = self.app.router
        names = _name_list(self.own_options.queues) or list(router.queues)
        unwanted = _name_list(self.own_options.exclude_queues)
        self.queues = [router.queue(name) for name in names if name not in unwanted]
        if not self.queues:
            raise ImproperlyConfigured("no queues are left to serve: see -Q and -X")
        path = self.app.conf.worker_state_db
        url = path and "sqlite:///" + os.path.abspath(node_format(path, self.hostname))
        self.memory = open_store(url, {}) if url else self.app.store  # of revokes

    def _connect(self) -> None:
        """Wait for a server that cannot be reached yet, as `broker_connection_retry` says."""
        conf, store = self.app.conf, self.app.store
        waits, most = conf.broker_connection_retry_on_startup, conf.broker_connection_max_retries
        waits = store.foreign and (conf.broker_connection_retry if waits is None else waits)
        for attempt in itertools.count(1):
            try:
                store.look(())
                return
            except OperationalError as exc:
                if not waits or most is not None and attempt > most:
                    raise
                seconds = min(2 * attempt, 32)
                text = "consumer: Cannot connect: %s.\nTrying again in %s seconds... (%s/%s)"
                worker_logger.error(text, exc, seconds, attempt, most)
                time.sleep(seconds)

    def setup(self) -> None:
        """Open what the worker needs."""
        self.check()
        self.app.store.look(())
        self.pid = os.getpid()
        self.store: Store = self.app.store
        self.owner = int.from_bytes(os.urandom(7), "big")
        for other in Journal.others(self.store.folder):
            if other.info["node"] == self.hostname and not other.lock_whole():
                who = f"(pid {other.info['pid']}) is called {self.hostname}"
                why = f"another worker {who} too: give each its own name with -n"
                worker_logger.warning("DuplicateNodenameWarning: %s", why)
        self.bell = self.store.bells.open()
        pool = POOLS[self.pool_name]
        size = self.autoscaled[1] if self.autoscaled else self.concurrency
        size = 1 if pool is SoloPool else size
        about = {"node": self.hostname, "slots": 2 * size + 2 if pool.kills else size}
        self.journal = Journal(os.path.join(self.store.folder, f"{self.owner:x}.journal"), about)
        self.pool: Pool = pool(self, size)
        self.dispatcher = EventDispatcher(hostname=self.hostname, app=self.app)
        self.set_events(self.app.conf.worker_send_task_events)
        self.revoked = self.memory.revoked()  # until when, by id
        if self.app.conf.worker_enable_remote_control:
            self.control = Pidbox(self)
        self.serve(self.queues)
        for store in {self.store, self.memory}:  # now that it hears of others
            self.revoked.update(store.revoked())
        if self.pool_name != self.app.conf.worker_pool:
            worker_logger.warning("There is no fork on this platform: using the threads pool")
        if not pool.kills and any(task.time_limit for task in self.app.tasks.values()):
            worker_logger.warning("Hard time limits do not apply to the %s pool", self.pool_name)

    def begin(self) -> None:
        """Recover what dead workers left, and start the pool."""
        worker_init.send(sender=self)
        self._housekeeping()
        self.pool.submit(())  # starts its processes
        if self.own_options.beat:
            self.beat = Beat(self.app)
            threading.Thread(target=self.beat.run, name="beat", daemon=True).start()
        self.heartbeat("worker-online")
        worker_logger.info("%s ready.", self.hostname)
        worker_ready.send(sender=self)
        self.ready.set()

    def lost(self, claim: Claim, flags: int, why: str = "its main process died") -> Outcome:
        """Return the end of a task that a dead worker had begun."""
        exc = WorkerLostError(f"Worker exited prematurely: {why}.")
        return lost(self.app, claim, exc, flags, worker_died=True)

    def run(self) -> int:
        """Work until told to stop; return the exit status."""
        try:
            with contextlib.suppress(WorkerTerminate):  # from a task that runs in this very thread
                if not self.ready.is_set():
                    self.begin()
                while self.stopping is None:
                    self._turn()
                while self.stopping == "warm" and self._left():
                    self._turn(claiming=False)
            if self.stopping != "warm":
                self._abandon()
        finally:
            worker_shutdown.send(sender=self)
            self.heartbeat("worker-offline")
            if self.beat is not None:
                self.beat.stop()
            self.pool.stop(10.0 if self.stopping == "warm" else 0.0)
            # With what is not settled the journal stays, for the worker that recovers it.
            self.journal.close(remove=not (self.pool.held or self._unsettled))
            self.store.leave(self.owner)
            self.store.bells.close(self.bell)
            self.store.bells.sweep()
            self.memory.close()
            self.app.close()
            self.app.conf.update(self.replaced)
        return self.exitcode

    def _turn(self, claiming: bool = True) -> None:
        """Settle what has ended, claim what there is room for, hand it out; sleep if idle."""
        pool, bell, now = self.pool, self.bell, time.monotonic()
        try:
            if self._limits_of != self.app.generation:
                self.read_limits()
            if now - self._attended > 0.2:
                self._attend()
            if now - self._looked > 1.0:
                self._housekeeping()
            finished = self._unsettled
            pool.collect(finished)
            room = max(pool.room(), 0) if claiming and self.queues else 0
            limit = room if self._hungry else 0
            claims = self._settle(self.owner, finished, limit) if finished or limit else []
            self._unsettled = []
            if limit:
                self._hungry = len(claims) >= limit
            for slot in pool.slots:  # the outcomes are safely in the store
                slot.consume()
            events = [event for claim, outcome in finished for event in outcome.events
                      if event[0] != "task-started" or claim.ticket not in self._begun]  # fmt: skip
            if events:
                self.dispatcher.publish(events)
            self._begun.difference_update(claim.ticket for claim, _ in finished)
            if claims:
                self._busy = now
                self._announce(claims)
                claims = self._discard(claims)
                self.total.update(claim.head[0] for claim in claims)
            if claims or pool.later:
                pool.submit(claims)
            if claims and self.autoscaled:
                self.scale()
            if finished or claims:
                pool.rest(bool(claims))
            elif not bell.asleep:
                bell.doze(room > 0)
                self._attend()
                ready, self._due = self.store.look(self.queue_names) if room else (False, None)
                self._hungry = self._hungry or ready
            else:
                wanted = min([pool.patience, *(pool.next[c.head[0]] - now for c in pool.later)])
                if self._watched and len(self._begun) < min(pool.load, pool.size):
                    wanted = min(wanted, 0.2)  # to see what begins
                if self._due is not None and room:
                    wanted = min(wanted, max(0.0, self._due - time.time()))
                self._hungry = bell.wait(wanted) or self._hungry
        except (OperationalError, OSError) as exc:
            what = "The store" if isinstance(exc, OperationalError) else "The pool"
            worker_logger.error("%s cannot be used: %s. Trying again in 1 second.", what, exc)
            time.sleep(1.0)

    def _attend(self) -> None:
        """Carry out commands. Tell the store which tasks now run that must not run again, and those
        who hear of events which have started, once of each."""
        self._attended = time.monotonic()
        if self.control is not None:
            self.control.handle()
        if self._watched:
            now = time.time()  # before the look: what runs then has not ended
            held, running = self.pool.held, dict(slot.begun for slot in self.pool.slots)
            begun = {ticket for ticket, flags in running.items() if flags != DECODING}
            new = [held[ticket] for ticket in begun - self._begun if ticket in held]
            early = [claim for claim in new if not running[claim.ticket]]
            if early and self.store.foreign:
                self.store.begun(early)
            self._begun.update(claim.ticket for claim in new)
            if new and self.dispatcher.enabled:
                since = {claim.ticket: began for claim, began, _ in self.pool.active()}
                times = {c.head[1]: since.get(c.ticket, now) for c in new}
                started = [{"uuid": id, "timestamp": began} for id, began in times.items()]
                self.dispatcher.publish([("task-started", fields) for fields in started])

    def _discard(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims that are not revoked; note the end of the others."""
        gone = [c for c in claims if c.head[1] in self.revoked] if self.revoked else []
        self._unsettled += [(c, lost(self.app, c, TaskRevokedError("revoked"))) for c in gone]
        return [claim for claim in claims if claim not in gone]

    def _settle(self, owner: int | None, finished: Sequence[Any], room: int = 0) -> list[Claim]:
        """Settle an owner's claims, or what nobody has claimed, results first where they have a
        store; claim up to `room`."""
        settled, backend = finished, self.app.backend
        try:
            if finished and backend is not self.app.store:
                chords = [row for _, outcome in finished for row in outcome.chords]
                if chords:
                    backend.publish((), chords)
                parts = [row for _, outcome in finished for row in outcome.parts]
                results = [row for _, outcome in finished for row in outcome.results]
                ready = backend.put_results(results, parts) if results or parts else []
                rest = [(c, o._replace(results=[], chords=(), parts=())) for c, o in finished]
                claim, first = rest[0]
                settled = [(claim, first._replace(publish=[*first.publish, *ready])), *rest[1:]]
            return self.store.settle(owner, settled, self.queue_names, room)
        except Exception as exc:
            if isinstance(exc, OperationalError) or not finished:
                raise
            if len(finished) > 1:  # it is about one of them
                return [claim for pair in finished for claim in self._settle(owner, [pair])]
            if isinstance(exc, StaleClaim):
                if owner is None:
                    raise
                worker_logger.warning("An outcome was dropped: %s", exc)
                return []
            ((claim, outcome),) = finished
            if outcome.verb == "reject":  # even that cannot be kept: it is not about the task
                raise OperationalError(str(exc)) from None
            end = Outcome("reject", [], [], f"it cannot be settled: {exc}", 0.0)
            if outcome.runtime:  # it has run: say how it ends
                end = lost(self.app, claim, exc)
            return self._settle(owner, [(claim, end)])

    def _announce(self, claims: Sequence[Claim]) -> None:
        """Log claims, tell the receivers of `task_received`, send the event."""
        strategy = logging.getLogger("celery.worker.strategy")
        logs, events, hears = strategy.isEnabledFor(logging.INFO), [], task_received.receivers
        for claim in claims if logs or hears or self.dispatcher.enabled else ():
            with contextlib.suppress(MalformedMessage):  # whoever executes it rejects it
                headers = claim.message.headers
                name = headers.get("shadow") or headers["task"]
                strategy.info("Task %s[%s] received", name, headers["id"])
                if self.dispatcher.enabled:
                    fields = {**call_fields(claim.message), "timestamp": time.time()}
                    events.append(("task-received", fields))
                if hears:
                    message, body = claim.message, [None, None, {}]  # type: Any, list[Any]
                    if message.content_type == CONTENT_TYPES["json"]:  # a pickle is for children
                        body = message.payload(self.app.conf.accept_content)
                    args, kwargs, embed = body
                    request = request_of(message, args, kwargs, embed, self.hostname)
                    request.update(name=headers["task"], task_name=headers["task"])
                    task_received.send(sender=self, request=request)
        if events:
            self.dispatcher.publish(events)

    def _housekeeping(self) -> None:
        """Look, once a second, for dead workers, and now and then for what has expired."""
        before, self._looked = self._looked, time.monotonic()
        self.journal.touch()
        if self.store.recover(self.lost, self._settle):
            self._hungry = True
        if self.beats and self._looked - self._beaten > self.beats:
            self.heartbeat()
        if self.autoscaled:
            self.scale()
        if before // 30 != self._looked // 30:
            for store in {self.store, self.memory}:
                store.sweep()
            kept = [(id, until) for id, until in self.revoked.items() if until > time.time()]
            self.revoked = dict(kept[-_REVOKES_MAX:])

    # -- what remote control asks for ------------------------------------------------------------
    #: What has the prefetch count: Celery's name, for commands of one's own.
    qos = property(lambda worker: worker.pool)

    def revoke(self, ids: Iterable[str], terminate: bool = False, signal: Any = "TERM") -> set[str]:
        """Discard tasks, those that wait here at once, others when they come; with `terminate` also
        send the process of one that runs here a signal, a name or number, and return the ids of
        those that were here. NotImplementedError without such processes, ValueError."""
        ids, signum = set(ids), _signal_number(signal)
        self.revoked.update(dict.fromkeys(ids, time.time() + _REVOKE_SECONDS))
        for store in {self.store, self.memory}:
            store.revoke(ids, _REVOKE_SECONDS)
        here = {claim.head[1] for claim in self.pool.held.values()} & ids
        if here:
            self.pool.submit(self._discard(self.pool.take_back()))
        running = {claim.head[1]: claim.ticket for claim, _, _ in self.pool.active()}
        self._end_scheduled(ids - here)
        if not terminate:
            worker_logger.info("Tasks flagged as revoked: %s", ", ".join(ids))
            return set()
        self.pool.terminate(0, signum)  # nobody, but it says whether it can
        for id in here:
            worker_logger.info("Terminating %s (Signals.%s)", id, signum.name)
            self.pool.terminate(running.get(id, 0), signum)
        return here

    def _end_scheduled(self, ids: set[str]) -> None:
        """End revoked tasks that wait for their ETA now: that may be far. Every worker hears of a
        revoke; the one that takes the message ends the task."""
        for claim in self.store.scheduled(self.queue_names) if ids else ():
            if claim.head[1] in ids:
                end = lost(self.app, claim, TaskRevokedError("revoked"))
                with contextlib.suppress(StaleClaim):  # another worker was quicker
                    self._settle(None, [(claim, end)])
                    self.dispatcher.publish(end.events)

    def read_limits(self) -> None:
        """Learn the rate limits of the tasks; what waits for one waits anew."""
        self._limits_of = self.app.generation
        tasks = {} if self.app.conf.worker_disable_rate_limits else self.app.tasks
        rates = {name: _rate(task.rate_limit) for name, task in tasks.items()}
        limits = {name: 1 / rate for name, rate in rates.items() if rate}
        if limits != self.pool.limits:
            self.pool.limits, back = limits, self.pool.take_back()
            self.pool.next.clear()
            self.pool.submit(back)

    def scale(self) -> None:
        """Have a process for each task that is held; fewer only after 30 s without a new one."""
        (most, least), size = self.autoscaled, self.pool.size
        keepalive = float(os.environ.get("AUTOSCALE_KEEPALIVE", 30))
        wanted = max(least, min(most, self.pool.load))
        is_idle = time.monotonic() - self._busy > keepalive
        if wanted > size or size > most or is_idle and wanted < size:
            text = "Scaling up %s processes." if wanted > size else "Scaling down %s processes."
            worker_logger.info(text, abs(wanted - size))
            self.pool.resize(wanted)

    def serve(self, queues: list[Queue]) -> None:
        """Serve these queues from now on."""
        self.queues, self.queue_names = queues, [queue.name for queue in queues]
        self.app.router.bind(queues)
        topics = self.control.inbox.topics if self.control is not None else ()
        self.bell.listen([*(f"q:{name}" for name in self.queue_names), *topics])
        self._hungry = True

    def set_events(self, on: bool) -> None:
        """Send events of tasks, or stop that."""
        self.dispatcher.enabled = self.journal.events = bool(on)
        self._watched = self.store.foreign or bool(on)  # whether to tell which tasks run

    def heartbeat(self, type: str = "worker-heartbeat") -> None:
        """Send an event of this worker: worker-online, worker-heartbeat, worker-offline."""
        self._beaten = time.monotonic()
        heartbeat_sent.send(sender=self)
        load = [round(value, 2) for value in getattr(os, "getloadavg", lambda: (0.0,) * 3)()]
        about = {"sw_ident": "taskq", "sw_ver": __version__, "sw_sys": _symbol("platform:system")()}
        count = {"active": len(self.pool.active()), "processed": sum(self.total.values())}
        self.dispatcher.send(type, freq=self.beats or 2.0, loadavg=load, **count, **about)

    # -- the end ---------------------------------------------------------------------------------
    def stop(self, how: str = "warm", exitcode: int = 0, restart: bool = False) -> None:
        """Ask the worker to end: 'warm' lets running tasks finish, 'cold' ends them, and stays;
        and perhaps to start anew then, which anybody who does not, before or after, overrules."""
        self.restarting = restart and (self.stopping is None or self.restarting)
        self.stopping = "cold" if self.stopping == "cold" else how
        self.exitcode = exitcode
        with contextlib.suppress(RuntimeError):  # eventlet lets no signal handler write
            self.bell.ring()

    def _left(self) -> bool:
        """Give back what has not begun; return whether there is anything left to wait for."""
        self._unsettled += [(claim, _GIVE_BACK) for claim in self.pool.take_back()]
        return bool(self.pool.held or self._unsettled)

    def _abandon(self) -> None:
        """Kill the pool; what runs ends as if the worker had been killed."""
        self._left()
        self.pool.stop(0.0)
        told = functools.partial(self.lost, why="it was told to stop at once")
        try:
            # The end of a chord, if this brings one, is given back by `leave`.
            self.store.recover_owner(self.owner, self.journal.ends(), told, self._settle)
            self._unsettled = []
            self.pool.held.clear()
        except OperationalError as exc:
            worker_logger.error("The store cannot be used: %s. The next worker settles.", exc)

    def _install_signals(self, stack: contextlib.ExitStack) -> None:
        """Install the worker's handlers; `stack` puts back those they replace, but a HUP is ignored
        until a worker that is to start anew has a handler for it again."""
        # Where there is a terminal, a HUP says that it has gone.
        hup_restarts = not (sys.__stdout__ and sys.__stdout__.isatty())

        def stop(signum: int, frame: Any) -> None:
            if os.getpid() != self.pid:
                return
            name = signal.Signals(signum).name
            if name == "SIGTERM" and os.environ.get("REMAP_SIGTERM") == "SIGQUIT":
                name = "SIGQUIT"
            is_first = name == "SIGINT" and self.stopping is None
            status = int(name in ("SIGINT", "SIGQUIT"))
            how = "Cold" if status > is_first else "Warm"
            text = f"\nworker: {how} shutdown (MainProcess)\n"
            if is_first:
                text = f"\nworker: Hitting Ctrl+C again will terminate all running tasks!\n{text}"
            with contextlib.suppress(OSError, RuntimeError):  # print may be what it interrupts
                os.write(2, text.encode())
            worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=status)
            self.stop(how.lower(), status, name == "SIGHUP" and hup_restarts)
            if how == "Cold" and _thread.stack:  # a task of the solo pool: nothing else ends that
                raise WorkerTerminate(1)

        def put_back(signum: int, before: Any) -> None:
            is_hup = signal.Signals(signum).name == "SIGHUP"
            signal.signal(signum, signal.SIG_IGN if is_hup and self.restarting else before)

        handlers: dict[str, Any] = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"), stop)
        handlers["SIGUSR1"] = lambda *_: faulthandler.dump_traceback(2)
        if self.pool_name not in _PATCHES:  # greenlets have their own for children
            handlers["SIGCHLD"] = lambda *_: self.bell.ring()
        for name in handlers.keys() & set(dir(signal)):  # Windows has two of them
            signum = getattr(signal, name)
            stack.callback(put_back, signum, signal.signal(signum, handlers[name]))

    def banner(self) -> str:
        """Return what a worker prints when it starts."""
        queues = "\n".join(
            f". {name:<16} exchange={exchange.name}({exchange.type}) key={key}"
            for name, exchange, key in self.queues
        )
        names = sorted(name for name in self.app.tasks if not name.startswith("celery."))
        tasks = "".join(["[tasks]\n", *(f"  . {name}\n" for name in names)])
        off = "OFF (enable -E to monitor tasks in this worker)"
        most, least = self.autoscaled or (0, 0)
        count = f"{{min={least}, max={most}}}" if most else self.concurrency
        return f"""
 -------------- {self.hostname} v{__version__} (taskq)

[config]
. app:         {self.app.main or "__main__"}:{id(self.app):#x}
. broker:      {self.store.uri}
. results:     {self.app.backend.uri}
. concurrency: {count} ({self.pool_name})
. task events: {"ON" if self.dispatcher.enabled else off}

[queues]
{queues}

{tasks if self.log_options["loglevel"] <= logging.INFO else ""}"""


def _count(concurrency: Any) -> int:
    """Return a number of processes or threads; None, 0 and 'auto' are the CPUs."""
    if concurrency in (None, 0, "0", "auto"):
        usable = getattr(os, "sched_getaffinity", None)
        return len(usable(0)) if usable else os.cpu_count() or 1
    if str(concurrency).isdecimal():
        return int(concurrency)
    raise ImproperlyConfigured(f"concurrency {concurrency!r}: expected a number above 0, or 'auto'")


def _most_and_least(text: str) -> tuple[int, int]:
    """Return the most and the fewest processes that --autoscale gives, '10,3'."""
    with contextlib.suppress(ValueError):
        most, least = map(int, f"{text},0".split(",")[:2])
        if 0 <= least <= most > 0:
            return most, least
    raise ImproperlyConfigured(f"autoscale {text!r}: expected MAX,MIN, as in 10,3")


def _signal_number(name: Any) -> Any:
    """Return a signal by its name, 'TERM' or 'SIGTERM', or number; ValueError if there is none."""
    with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
        if str(name).isdecimal():
            return signal.Signals(int(name))
        return signal.Signals["SIG" + re.sub("^SIG", "", name.upper())]
    why = "expected a name such as 'TERM' or 'SIGKILL', or a number"
    raise ValueError(f"no signal {name!r}: {why}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _patch_greenlets(pool: str | None) -> None:
    """Patch the standard library for a pool of greenlets; another time changes nothing."""
    global _thread
    if pool in _PATCHES:
        try:
            _symbol(_PATCHES[pool])()
        except ImportError:
            why = f"{pool}, which is not installed: pip install {pool}"
            raise ImproperlyConfigured(f"the {pool} pool needs {why}") from None
        if not isinstance(_thread, threading.local):  # which are now those of greenlets
            _thread = _new_thread_state()


# ==== 16. Background worker ======================================================================


class BackgroundWorker:
    """A worker in a thread of this process, for scripts, notebooks and tests.

        with app.worker(concurrency=2):
            print(add.delay(2, 2).get(timeout=10))

    Tasks run in their latest form, also those that are defined after it was started. The pool is
    threads in a notebook or REPL, and where there is no fork or no file; else prefork."""

    def __init__(self, app: TaskQ, options: dict[str, Any]) -> None:
        self.app, self.options = app, options
        self.worker: Worker | None = None

    def start(self) -> BackgroundWorker:
        """Start the worker and return once it is ready."""
        if _process_name.startswith("Spawn"):
            hint = 'put the start under `if __name__ == "__main__":`'
            raise RuntimeError(f"a worker's children import this script: {hint}")
        if self.worker is not None:
            raise RuntimeError("this worker is running already")
        interactive = hasattr(sys, "ps1")  # a REPL, or a notebook
        pool = "threads" if interactive or not self.app.store.shared else "prefork"
        name = f"background{os.getpid()}-{os.urandom(2).hex()}"
        worker = Worker(self.app, **{"pool": pool, "hostname": name, **self.options})
        with contextlib.ExitStack() as undo:
            undo.callback(self.app.conf.update, worker.replaced)
            worker.setup()
            if threading.current_thread() is threading.main_thread():
                worker.begin()  # children that are forked here inherit no lock that is held
            undo.pop_all()  # `run` does it
        if worker.pool.kills and "IPython" in sys.modules:
            shell = sys.modules["IPython"].get_ipython()
            if shell is not None:
                shell.events.register("post_run_cell", self._renew)
        self._thread = threading.Thread(target=worker.run, name="taskq worker", daemon=True)
        self._thread.start()  # any other thread must not fork them: they would die with it
        while not worker.ready.wait(0.1):
            if not self._thread.is_alive():
                raise RuntimeError("the worker cannot start; its thread has said why")
        self.worker = worker
        atexit.register(self.stop)
        return self

    def _renew(self, *_: Any) -> None:
        self.app.generation += 1  # a cell may define a function that a task calls

    def stop(self) -> None:
        """Let running tasks finish, give back the rest, and return when the worker has ended."""
        worker, self.worker = self.worker, None
        if worker is not None and worker.pid == os.getpid():
            worker.stop()
            self._thread.join()

    __enter__ = start

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()


# ==== 17. Beat ===================================================================================

beat_logger = logging.getLogger("celery.beat")

#: What an entry of `beat_schedule` may hold; `subtask_type` is that of a chain, a group, ...
_ENTRY: dict[str, Any] = {"task": (str,), "args": (list, tuple), "kwargs": (dict,)}
_ENTRY.update(options=(dict,), schedule=(object,), relative=(bool,), subtask_type=(str,))


def _entry(app: TaskQ, name: str, given: Any) -> tuple[str, BaseSchedule, Signature]:
    """Return an entry's name, schedule and call; ImproperlyConfigured says what is wrong."""
    try:
        given = {"task": None, **{key: v for key, v in given.items() if v is not None}}
        for key, value in given.items():
            if key not in _ENTRY:
                raise TypeError(f"unknown key {key!r}{_hint(key, _ENTRY, 0.6)}")
            kinds = _ENTRY[key]
            if not isinstance(value, kinds):
                raise TypeError(f"{key} is {_repr(value, 60)}: expected a {kinds[0].__name__}")
        _check_call_options(given.get("options", {}))
        when, relative = given.pop("schedule", None), given.pop("relative", False)
        when = when if isinstance(when, BaseSchedule) else schedule(when, relative)
        when.app = app
        return name, when, Signature.from_dict(given, app)
    except (TypeError, ValueError, OverflowError, AttributeError) as exc:
        raise ImproperlyConfigured(f"beat_schedule[{name!r}]: {exc}") from None


class Beat:
    """Sends an app's periodic tasks when they are due. The store keeps the last runs, and lets only
    one of several beats send each. max_interval: seconds, at most, between two looks; schedule: a
    file that keeps the last runs too, in case that the store is wiped. Both stand for settings."""

    def __init__(self, app: TaskQ, max_interval: Any = None, schedule: str | None = None) -> None:
        app.import_default_modules()
        self.app, conf = app, app.conf
        self.max_interval = max_interval or conf.beat_max_loop_interval or 300
        self.path = schedule or conf.beat_schedule_filename
        entries = [_entry(app, name, given) for name, given in conf.beat_schedule.items()]
        self.entries = {f"{app.main}:{entry[0]}": entry for entry in entries}
        self.last: dict[str, float] = {}  # when each last ran, in seconds since the epoch
        self._stopped, self._ticking = threading.Event(), threading.Lock()
        if self.path:
            try:
                with open(self.path, "a+") as file:  # what cannot be written is an error now
                    file.seek(0)
                    known = json.loads(file.read() or "{}")
                self.last = {key: float(last) for key, last in known.items()}
            except (ValueError, TypeError, AttributeError):
                text = f"{self.path} is no file of beat's: name another one, or remove it"
                raise ImproperlyConfigured(text) from None

    def run(self) -> None:
        """Send tasks until `stop` is called."""
        beat_logger.info("beat: Starting...")
        beat_init.send(sender=self)
        if threading.current_thread() is not threading.main_thread():
            beat_embedded_init.send(sender=self)
        wait, pause = 0.0, 1
        while not self._stopped.wait(wait):
            try:
                with self._ticking:
                    wait, pause = self.tick(), 1
            except OperationalError as exc:
                text = "beat: Connection error: %s. Trying again in %s seconds..."
                beat_logger.error(text, exc, pause)
                wait, pause = pause, min(2 * pause, 32)

    def stop(self) -> None:
        """Have `run` return; wait while it sends."""
        self._stopped.set()
        with self._ticking:
            beat_logger.info("beat: Shutting down...")

    def end(self, *_: Any) -> None:
        """Handle a signal in the thread that runs it: end at once, but the first time not amid what
        it sends and writes down."""
        if self._stopped.is_set() or not self._ticking.locked():
            sys.exit(0)
        self._stopped.set()

    def tick(self) -> float:
        """Send what is due; return the seconds until the next look."""
        store = self.app.store
        last = {key: last for key, (last, _) in store.due_runs().items()}
        for key in self.entries.keys() - last.keys():
            last[key] = self.last.get(key) or time.time()  # it is new, or the store was wiped
            with contextlib.suppress(Exception):  # which `_look` logs: the schedule's own clock
                last[key] = self.last.get(key) or self.entries[key][1].now().timestamp()
            store.publish((), run=(key, None, last[key]))
        before, self.last = self.last, last
        soonest = min(map(self._look, self.entries), default=float("inf"))
        if self.path and before != self.last:
            try:
                new = f"{self.path}.{threading.get_native_id()}"  # for this beat alone
                with open(new, "w") as file:
                    json.dump(self.last, file)
                os.replace(new, self.path)
            except OSError as exc:
                beat_logger.error("beat: Cannot keep the last runs in a file: %s", exc)
        return min(max(soonest - time.time(), 0), self.max_interval)

    def _look(self, key: str) -> float:
        """Send an entry if it is due; return when to look at it again."""
        (name, when, call), app, batch = self.entries[key], self.app, Batch()
        last, asked, wait = self.last[key], time.time(), self.max_interval
        try:
            now = when.now().timestamp()  # a `nowfun` may have a time of its own
            due, wait = when.is_due(datetime.fromtimestamp(last, app.timezone))
            if due:
                with app._batch(batch):
                    call.apply_async()
                if app._publish(batch.calls, chords=batch.chords, run=(key, last, now)):
                    self.last[key] = now
                    beat_logger.info("Scheduler: Sending due task %s (%s)", name, call.task)
                else:  # another beat was quicker
                    wait = 0
        except OperationalError:
            raise
        except Exception:  # its arguments cannot be serialized, say
            beat_logger.exception("beat: %s cannot be sent", name)
            app.store.publish((), run=(key, last, asked))  # it waits for its next run
        return asked + wait


def _beat_command(app: TaskQ, options: Any) -> None:
    """Run beat until SIGTERM or SIGINT."""
    level, color = _log_level(options.loglevel or "WARNING"), False if options.no_color else None
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        # This comes first, and replaces them: what fails in on_after_configure is only logged.
        configure_logging(app, level, options.logfile, color)
        beat = Beat(app, options.max_interval, options.schedule)
        if not options.quiet:
            text = f"taskq beat v{__version__} is starting: {_plural(len(beat.entries), 'task')} on"
            print(text, app.store.uri, file=sys.__stdout__, flush=True)
        app.close()
        with _daemon(options):
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, beat.end)
            beat.run()


# ==== 18. Daemons, multi =========================================================================


def _run_anew(python: str, options: Any) -> NoReturn:
    """Go on in this process as that interpreter, which runs this program with these options."""
    import subprocess

    main: Any = sys.modules["__main__"]  # with a spec after python -m proj.celery
    program = getattr(main, "__file__", sys.argv[0])  # absolute, whatever the directory is now
    words = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    words += [*(["-m", main.__spec__.name] if main.__spec__ else [program]), options.command]
    for name, value in vars(options).items():
        if value is not None and name not in ("command", "executable"):
            option = "--" + name.replace("_", "-")
            words.append(option if value is True else f"{option}={value}")
    _flush_output()
    try:
        os.execv(python, [python, *words])
    except OSError as exc:
        raise CommandError(f"{python} cannot be run: {exc.strerror}") from None


def _settle_in(options: Any) -> None:
    """Take up the directory, umask, group and user of the options, once; or CommandError."""
    if options.workdir:
        os.chdir(options.workdir)
    for name in {"logfile", "pidfile"} & vars(options).keys():
        path = getattr(options, name)
        setattr(options, name, path and os.path.abspath(path))
    given = {name: vars(options).pop(name, None) for name in ("workdir", "umask", "gid", "uid")}
    if given["umask"] is not None:
        os.umask(given["umask"])
    ids: dict[str, int] = {}
    try:
        for name, find in (("gid", "grp:getgrnam"), ("uid", "pwd:getpwnam")):
            text = given[name] or ""
            if text:
                ids[name] = int(text) if text.isdecimal() else _symbol(find)(text)[2]
        if "uid" in ids:
            user = _symbol("pwd:getpwuid")(ids["uid"])
            os.initgroups(user.pw_name, ids.setdefault("gid", user.pw_gid))
        for name in sorted(ids):  # the group first: a mere user cannot change it
            getattr(os, f"set{name}")(ids[name])
    except KeyError:
        kind = "user" if name == "uid" else "group"
        raise CommandError(f"--{name} {text}: there is no such {kind} on this machine") from None
    except PermissionError:
        raise CommandError("--uid and --gid need root: start it as that user instead") from None


def _is_alive(pid: int) -> bool:
    """Return whether there is a process of that number, anybody's, that has not ended."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # of Linux
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def _read_pid(file: Any, exclusive: bool) -> tuple[int, bool]:
    """Return the number in a pid file, 0 if there is none, and whether its process locks it."""
    file.seek(0)
    found = re.fullmatch(rb"\s*([0-9]{1,9})\s*", file.read(99))
    locked = True
    with contextlib.suppress(OSError):
        if fcntl is not None:  # a lock by lockf would go when a task opens and closes the file
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        locked = False
    return int(found[1]) if found else 0, locked


@contextlib.contextmanager
def _pid_file(path: str) -> Iterator[None]:
    """Hold a pid file, locked, while the body runs; CommandError, status 73, if another does."""
    with open(path, "ab+") as file:
        pid, locked = _read_pid(file, exclusive=True)
        if locked or pid not in (0, os.getpid()) and _is_alive(pid):
            text = f"Pidfile ({path}) already exists. Seems we're already running? (pid: {pid})"
            raise CommandError(text, 73)
        if file.tell() and pid != os.getpid():  # it has its own after a restart
            print(f"Stale pidfile {path} exists - Removing it.", file=sys.stderr)
        file.truncate(0)
        file.write(b"%d\n" % os.getpid())
        file.flush()
        if hasattr(os, "fork"):  # a task's own child may outlive this process, and lock for it
            os.register_at_fork(after_in_child=file.close)
        try:
            yield
        finally:
            _unlink(path)


@contextlib.contextmanager
def _daemon(options: Any) -> Iterator[None]:
    """Run the body with the pid file `pidfile`, and if `detach` says so in the background, stderr
    being `logfile`. The process in the foreground ends when the pid file is there, or with 73."""
    if os.environ.get("C_FAKEFORK"):  # to see on the terminal why it ends
        options.detach = None
    if options.detach:
        if not hasattr(os, "fork"):
            raise CommandError("--detach needs a platform with fork")
        path, flags = log_path(options.logfile or os.devnull), os.O_RDWR | os.O_APPEND | os.O_CREAT
        null, log = os.open(os.devnull, os.O_RDWR), os.open(path, flags, 0o666)
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            os.waitpid(child, 0)
            os._exit(0 if os.read(reader, 1) else 73)
        os.setsid()
        if os.fork():  # a session's leader could take a terminal
            os._exit(0)
    with _pid_file(options.pidfile) if options.pidfile else contextlib.nullcontext():
        if options.detach:
            options.detach = None
            for fd, target in enumerate((null, null, log)):
                os.dup2(target, fd)
            os.write(writer, b"!")
            for fd in (null, log, reader, writer):
                os.close(fd)
        yield


class Node:
    """A worker of `multi`: its name, the command that starts it, and the file with its pid."""

    def __init__(self, name: str, command: list[str], options: dict[str, Any]) -> None:
        short, _, host = name.partition("@")
        self.name, self.pid, self.status = name, 0, 0
        self.parts = {"n": short, "N": short, "h": name, "H": host, "d": host, "p": name, "%": "%"}
        options = {"--pidfile": "%n.pid", "--logfile": "%n%I.log", **options, "-n": name}
        self.argv = [options.pop("--executable", sys.executable), *command]
        for option, value in options.items():
            options[option] = os.path.expanduser(self.expand(value))  # --pidfile=~/run/%n.pid
            words = list(filter(None, (option, options[option])))
            self.argv += ["=".join(words)] if option.startswith("--") else words
        home = options.get("--workdir", "")
        self.pidfile = os.path.join(home, options["--pidfile"])
        self.logfile = os.path.join(home, options.get("-f") or options["--logfile"])

    def expand(self, text: str) -> str:
        """Put in the node's own %n, %N, %h, %H, %d and %p; %i and %I are for its processes."""
        return re.sub("%([nNhHdp%])", lambda match: self.parts[match[1]], text)

    def start(self, title: str = "> Restarting node ", verbose: bool = False) -> None:
        """Start it, in the background, and say how that went; `status` is its exit status."""
        import subprocess

        print(f"{title}{self.name}: ", end="", flush=True)
        if verbose:
            print(" ", " ".join(self.argv), flush=True)
        for path in (self.pidfile, self.logfile):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.status = subprocess.call(self.argv)
        if self.status:
            how = "exit code" if self.status > 0 else "signal"
            print(f"* Child terminated with {how} {abs(self.status)}")
        print("FAILED" if self.status else "OK", flush=True)

    def is_running(self) -> bool:
        """Return whether the worker runs; CommandError if its pid file is not that of a worker."""
        for seconds in (0.2, 0.8, 0.0):  # one that starts anew has no lock for a moment
            try:
                with open(self.pidfile, "rb") as file:
                    self.pid, locked = _read_pid(file, exclusive=False)
            except FileNotFoundError:
                return False
            if self.pid and (locked or not _is_alive(self.pid)):
                return locked
            time.sleep(seconds)
        named = f"process {self.pid}" if self.pid else "no process"
        text = f"{self.pidfile} names {named}, not a worker of taskq's: nothing was done"
        raise CommandError(f"{text}. Remove the file if it is stale.", 1)


def _multi_indexes(option: str, where: str, names: list[str]) -> Iterator[int]:
    """Return which nodes an option is for: '2', '1-3', 'w1', 'w1@host', or more with commas."""
    keys = [(str(number), name, name.split("@")[0]) for number, name in enumerate(names, 1)]
    index_of = {key: index for index, several in enumerate(keys) for key in several}
    for part in where.split(","):
        first, _, last = (part, "", part) if part in index_of else part.partition("-")
        found = range(index_of.get(first, len(names)), index_of.get(last, -1) + 1)
        if not found:
            text = f"{option}:{where}: there is no node {part}: expected numbers from 1 to "
            raise CommandError(f"{text}{len(names)}, or names of {', '.join(names)}")
        yield from found


def _multi_nodes(words: list[str]) -> list[Node]:
    """Return the nodes that `multi` is given, by names or a number, each with its options."""
    actions = _parser("worker")._actions
    valueless = {flag for action in actions if action.nargs == 0 for flag in action.option_strings}
    names: list[str] = []
    given: list[tuple[str, str | None, str]] = []  # (option, for which nodes or all, value)
    left = [*words]
    while left:
        word = re.sub("^(-[^-Ab])([^:]+):(.+)$", r"\1:\3=\2", left.pop(0))  # -Ofair:1, -O:1 fair
        match = re.fullmatch(r"(-[^-]|--[^:=]+)(?::([^=]+))?=?(.*)", word)
        if match is None:
            names.append(word)
            continue
        option, where, value = match.groups()
        if not value and option not in valueless and left and not left[0].startswith("-"):
            value = left.pop(0)
        given.append((option, where, value))
    common = {option: value for option, where, value in given if not where}
    host = common.pop("-n", "") or common.pop("--hostname", "") or _hostname()
    prefix = common.pop("--range-prefix", "celery")
    command = common.pop("--cmd", "").split() or [__file__, "worker", "--detach"]
    if len(names) == 1 and names[0].isdecimal():
        names = [f"{prefix}{number}" for number in range(1, int(names[0]) + 1)]
    if not names or "--" in names:  # what follows it would be for all of them
        raise CommandError("which nodes? Name them, as in multi start w1 w2, or say how many")
    here = f"{_hostname().partition('.')[0]}@{_hostname()}"
    names = [node_format(name if "@" in name else f"{name}@{host}", here) for name in names]
    own = [dict(common) for _ in names]
    for option, where, value in given:
        for index in _multi_indexes(option, where, names) if where else ():
            own[index][option] = value
    return [Node(name, command, mine) for name, mine in zip(names, own)]


def _stop_nodes(command: str, nodes: list[Node], signum: signal.Signals, down: Any) -> None:
    """Send nodes a signal, wait perhaps for their end, and call `down` with each that is down."""
    # A worker starts anew at a HUP in the same process: there is no end to wait for.
    wait = command not in ("stop", "kill") and signum != signal.SIGHUP
    running = [node for node in nodes if node.is_running()]
    for node in nodes:
        if node not in running:
            down(node)
    if running and command != "kill":
        print("> Stopping nodes...")
    for node in running:
        text = f"\t> {node.name}: {signum.name[3:]} -> {node.pid}"
        print(f"Sending KILL to node {node.name} ({node.pid})" if command == "kill" else text)
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, signum)
    while wait and running:
        pids = ", ".join(str(node.pid) for node in running)
        print(f"> Waiting for {_plural(len(running), 'node')} -> {pids}...", end="", flush=True)
        while all(_is_alive(node.pid) for node in running):
            print(".", end="", flush=True)
            time.sleep(0.2)
        ended = next(node for node in running if not _is_alive(node.pid))
        running.remove(ended)
        print(f"\n\t> {ended.name}: OK")
        down(ended)


def _multi_command(_: Any, options: Any) -> int:
    """Do what the words after `multi` say; what it says of it is what Celery's multi says."""
    flags = {"--quiet", "-q", "--verbose", "--nosplash", "--no-color", "-C"} & {*options.words}
    signals = {f"-{word}": s for s in signal.Signals for word in (s.name, s.name[3:], s.value)}
    signum = next((signals[word] for word in options.words if word in signals), signal.SIGTERM)
    words = [word for word in options.words if word not in flags and word not in signals]
    command = words.pop(0) if words else ""
    commands = "start stop stopwait stop_verify restart kill names show expand get".split()
    if command not in commands:
        hint = _hint(command, commands, 0.5) or "."
        raise CommandError(f"no command {command!r} of multi{hint} They are {_names(commands)}", 1)
    given = words.pop(0) if command in ("expand", "get") and words else ""
    nodes = _multi_nodes(words)
    texts = {
        "names": [node.name for node in nodes],
        "show": [" ".join(node.argv) for node in nodes],
        "expand": [node.expand(given) for node in nodes],
        "get": [" ".join(node.argv[1:]) for node in nodes if node.name == given],
    }
    if command in texts:
        print(*texts[command], sep="\n")
        return int(not texts[command])
    with contextlib.redirect_stdout(None if {"--quiet", "-q"} & flags else sys.stdout):
        if "--nosplash" not in flags:
            print(f"taskq multi v{__version__}")
        start = functools.partial(Node.start, verbose="--verbose" in flags)
        if command == "start":
            print("> Starting nodes...")
            for node in nodes:
                start(node, "\t> ")
        else:
            signum = signal.SIGKILL if command == "kill" else signum
            down = start if command == "restart" else lambda node: print(f"> {node.name}: DOWN")
            _stop_nodes(command, nodes, signum, down)
    return int(any(node.status for node in nodes))


# ==== 19. Monitors ===============================================================================

_EVENT_WORDS = {"worker-online": "started", "worker-offline": "shutdown"}
_EVENT_WORDS["worker-heartbeat"] = "heartbeat"


def _capture_for_ever(app: TaskQ, handle: Callable[[Any], Any], hello: str) -> None:
    """Hand all events to a function; where the store cannot be reached, try again."""
    while True:
        try:
            looks = EventReceiver(handlers={"*": handle}, app=app).itercapture()
            next(looks)  # it listens
            print(hello, flush=True)
            collections.deque(looks, 0)
        except OperationalError as exc:
            print(f"-> Connection lost, attempting reconnect: {exc}", flush=True)
            time.sleep(1.0)


def _dump_events(app: TaskQ) -> None:
    """Print events for ever, each on a line as Celery does."""
    state = State()  # for what tasks are called

    def show(event: dict[str, Any]) -> None:
        state.event(event)
        type, hidden = event["type"], ["type", "timestamp", "hostname"]
        said = f"{_EVENT_WORDS.get(type, type.replace('-', ' '))}:"
        if type.startswith("task-"):
            task, hidden = state.tasks[event["uuid"]], [*hidden, "uuid", "name", "args", "kwargs"]
            known = f"{task.name}({task.uuid}) args={task.args} kwargs={task.kwargs}"
            said += f" {known if task.name else ''}"
        more = ", ".join(f"{name}={event[name]}" for name in sorted(event.keys() - hidden))
        when = datetime.fromtimestamp(event["timestamp"], timezone.utc)
        print(f"{event['hostname']} [{when}] {said} {more}", flush=True)

    _capture_for_ever(app, show, "-> evdump: starting capture...")


class Polaroid:
    """A camera: a subclass says in `on_shutter` what to do with snapshots of a State.

        with DumpCam(state, freq=2.0):
            receiver.capture()

    One is taken every `freq` seconds in a thread, but at most as often as `maxrate` says ('10/m'),
    and one at the end. ValueError for a time or rate that is none."""

    clear_after = False  # whether the state then forgets all but the tasks that have no end yet

    def __init__(self, state: State, freq: float = 1.0, maxrate: Any = None, app: Any = None):
        if not (_is_number(freq) and 0 < freq <= threading.TIMEOUT_MAX):
            raise ValueError(f"freq={_repr(freq, 60)}: expected seconds between snapshots, above 0")
        self.app, self.state, self.freq = app_or_default(app), state, freq
        self._wait = max(freq, 1 / (_rate(maxrate) or math.inf))
        self._over = threading.Event()

    def on_shutter(self, state: State) -> None:
        """Do something with the state, which takes in no events meanwhile."""

    def install(self) -> Polaroid:
        """Begin; `cancel` ends it."""
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()
        return self

    def cancel(self) -> None:
        """Take the last snapshot."""
        self._over.set()
        self._thread.join()
        self.capture()

    def capture(self) -> None:
        """Take a snapshot now; what goes wrong in `on_shutter` is logged."""
        try:
            self.state.freeze_while(self.on_shutter, self.state, clear_after=self.clear_after)
        except Exception:
            logger.exception("%s has failed to take a snapshot", type(self).__name__)

    def _run(self) -> None:
        while not self._over.wait(self._wait):
            self.capture()

    __enter__ = install

    def __exit__(self, *exc_info: Any) -> None:
        self.cancel()


def _take_snapshots(app: TaskQ, options: Any) -> None:
    """Have a camera take snapshots until SIGTERM or SIGINT."""
    state, freq = State(), 1.0 if options.frequency is None else options.frequency
    try:
        camera = _symbol(options.camera)(state, freq=freq, maxrate=options.maxrate, app=app)
    except (ImportError, TypeError, ValueError) as exc:
        raise CommandError(f"--camera {options.camera}: {exc}") from None
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        level, color = options.loglevel or "WARNING", False if options.no_color else None
        app.conf["worker_redirect_stdouts"] = bool(options.detach)  # what it prints is to be seen
        configure_logging(app, logging.getLevelName(level), options.logfile, color)
        app.close()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the last snapshot must be taken
        with _daemon(options), camera:
            hello = f"-> evcam: Taking snapshots with {options.camera} (every {freq} secs.)"
            _capture_for_ever(app, state.event, hello)


def _pairs(values: Any) -> list[str]:
    return [f"{name}: {value}" for name, value in values.items()]


#: What keys show of the selected task: a title, and the lines below it.
_TASK_PAGES: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "i": ("Task details", lambda task: _pairs(task.info(extra=["state"]))),
    "e": ("Task arguments", lambda task: _pairs(task.info(["args", "kwargs"]))),
    "r": ("Task result", lambda task: [str(task.result or task.exception)]),
    "t": ("Task exception traceback", lambda task: str(task.traceback).splitlines()),
}


class EventScreen:
    """The screen of the command `events`: the latest tasks, the selected one, and the workers."""

    COLUMNS, LINES = 60, 14  # the fewest
    KEYS = "j:down k:up i:info t:trace r:result e:args w:workers c:revoke l:limit q:quit"

    def __init__(self, app: TaskQ, window: Any) -> None:
        import curses

        self.app, self.window, self.curses, self.state = app, window, curses, State()
        self.shown: list[str] = []  # the ids of the tasks on the screen
        self.selected = ""  # the id of one of them
        self.page: list[str] = []  # a title and lines, until a key is pressed

    def run(self) -> None:
        """Show what happens until a key ends it."""
        self.window.nodelay(True)
        drawn, receiver = 0.0, EventReceiver(handlers={"*": self.state.event}, app=self.app)
        for came in receiver.itercapture(wait=0.05):
            key, now = self.window.getch(), time.monotonic()
            if key in (ord("q"), ord("Q")) and not self.page:
                return
            if key in (self.curses.KEY_RESIZE, 12):  # ^L: something has spoilt the screen
                self.window.clearok(True)
            elif key != -1:
                self.press(key)
            if key != -1 or now - drawn > (0.1 if came else 0.5):
                self.draw()
                drawn = now

    def press(self, number: int) -> None:
        """Do what a key asks for."""
        curses, control = self.curses, self.app.control
        names = {curses.KEY_DOWN: "j", curses.KEY_UP: "k", 10: "i"}
        key, task = names.get(number, chr(number).lower()), self.state.tasks.get(self.selected)
        if self.page:
            self.page = []
        elif key == "w":
            about = "{0.hostname}: alive={0.alive} active={0.active} processed={0.processed}"
            self.page = ["Workers", *map(about.format, self.state.workers.values())]
        elif key in ("j", "k") and self.shown:
            at = self.shown.index(self.selected) if self.selected in self.shown else None
            step = 1 if key == "j" else -1
            self.selected = self.shown[0 if at is None else (at + step) % len(self.shown)]
        elif task is None:
            curses.beep()
        elif key == "c":
            self.show_replies(control.revoke(task.uuid, reply=True))
        elif key == "l" and task.name:
            limit = self.ask("New rate limit: ")
            self.show_replies(control.rate_limit(task.name, limit, reply=True))
        elif key in _TASK_PAGES:
            title, lines = _TASK_PAGES[key]
            self.page = [f"{title} for {task.uuid}", *lines(task)]

    def ask(self, question: str) -> str:
        """Return a line that is typed at the bottom of the screen."""
        self.window.addstr(self.window.getmaxyx()[0] - 1, 0, question)
        self.window.clrtoeol()
        self.window.nodelay(False)
        self.curses.echo()
        text = self.window.getstr().decode(errors="replace")
        self.curses.noecho()
        self.window.nodelay(True)
        return text.strip()

    def show_replies(self, replies: Any) -> None:
        """Show what workers have answered."""
        answers = {host: answer for reply in replies or () for host, answer in reply.items()}
        self.page = ["Replies", *(_pairs(answers) or ["No replies received in 1s deadline."])]

    def draw(self) -> None:
        """Show the state, or the page that was asked for."""
        height, width = self.window.getmaxyx()
        if width < self.COLUMNS or height < self.LINES:
            lines = [f"too small: it needs {self.COLUMNS} x {self.LINES}"]
        elif self.page:
            wrap = _symbol("textwrap:wrap")
            lines = [part for line in self.page for part in wrap(line, width - 1) or [""]]
            lines = [*lines[: height - 1], "Press any key to continue..."]
        else:
            lines = self.overview(height, width)
        self.window.erase()
        for y, line in enumerate(lines):
            shown = "".join(c if c.isprintable() else "?" for c in line)
            style = self.curses.A_STANDOUT if line.startswith(">") else 0
            self.window.addnstr(y, 0, shown, width - 1, style)
        self.window.refresh()

    def overview(self, height: int, width: int) -> list[str]:
        """Return a line for each task; at the bottom the selected one, workers, counts, keys."""
        state, third = self.state, (width - 22) // 3
        row = "{}" + f"{{:<{third}.{third}}} " * 3 + "{:8} {:8.8}"
        lines = [row.format(" ", "UUID", "WORKER", "TASK", "TIME", "STATE")]
        tasks = list(state.tasks_by_time(height - 6))
        self.shown = [id for id, _ in tasks]
        for id, task in tasks:
            host = task.worker.hostname if task.worker else "*NONE*"
            when = time.strftime("%H:%M:%S", time.gmtime(task.timestamp))
            mark = ">" if id == self.selected else " "
            lines.append(row.format(mark, id, host, str(task.name or "?"), when, task.state))
        chosen, alive = state.tasks.get(self.selected), [w.hostname for w in state.alive_workers()]
        about = " ".join(f"{k}={v}" for k, v in chosen.info().items()) if chosen else ""
        counts = f"tasks:{state.task_count} workers:{len(alive)}/{len(state.workers)}"
        return [
            *lines,
            *[""] * (height - 5 - len(lines)),
            "-" * width,
            f"Selected: {about}" if chosen else "No task selected",
            f"Workers online: {', '.join(sorted(alive))}" if alive else "No workers discovered.",
            f"Info: taskq {__version__} events:{state.event_count} {counts}",
            self.KEYS,
        ]


def _events_command(app: TaskQ, options: Any) -> None:
    """Print events, take snapshots of them or show the screen, until interrupted."""
    with contextlib.suppress(KeyboardInterrupt):
        if options.camera and not options.dump:
            _take_snapshots(app, options)
        if options.dump or options.detach:  # Celery has -d twice: there is only a camera to detach
            _dump_events(app)
        try:
            curses = importlib.import_module("curses")
            curses.setupterm()
            if not (curses.tigetstr("cup") and sys.stdin.isatty() and sys.stdout.isatty()):
                raise ValueError("this is none, or it cannot place text")
        except Exception as exc:  # also if there is no such module, or the terminal is not known
            raise CommandError(f"the screen needs a terminal: {exc}; use events --dump") from None
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the terminal must be put right
        curses.wrapper(lambda window: EventScreen(app, window).run())


# ==== 20. Command line ===========================================================================

#: Its argument: the module, another import of this file, that the app belongs to and that must run.
_OtherCopy = _error("_OtherCopy", "The app is not of this copy of taskq.", Exception)


def _app_in(place: Any) -> TaskQ | None:
    """Return `place` if it is an app; of a module its `app`, else its `celery`, else any in it."""
    names = vars(place) if isinstance(place, types.ModuleType) else {"app": place}
    for value in (names.get("app"), names.get("celery"), *names.values()):
        for base in type(value).__mro__:
            if base is TaskQ:
                return value
            path = getattr(sys.modules.get(base.__module__), "__file__", None)
            if base.__name__ == "TaskQ" and path and os.path.samefile(path, __file__):
                raise _OtherCopy(sys.modules[base.__module__])
    return None


def find_app(name: str) -> TaskQ:
    """Return the app that `--app` names, 'proj' or 'proj.celery:app'; CommandError if none."""
    if name.startswith(".") or "/" in name or name.endswith((".py", ":")):
        guess = re.sub(r"(\.py|:)$", "", name).strip("./").replace("/", ".")
        raise CommandError(f"-A {name}: expected a module, as in -A {guess or 'proj'}")
    try:
        place = _symbol(name)
    except ImportError as exc:
        module = name.partition(":")[0]
        why = f"The module {module} was not found."
        if exc.name == name and isinstance(exc.__context__, AttributeError):
            why = str(exc.__context__).replace("module", "Module", 1)
        elif type(exc) is ImportError or not f"{module}.".startswith(f"{exc.name}."):
            raise  # what the module imports is missing
        raise CommandError(f"Unable to load celery application.\n{why}") from None
    found = _app_in(place)
    if found is None and hasattr(place, "__path__"):
        found = _app_in(_import_if_there(f"{place.__name__}.celery"))
    if found is None:
        why = "looked for its attributes 'app' and 'celery', any TaskQ, and a submodule 'celery'"
        raise CommandError(f"Unable to load celery application.\n{name!r} has no app: {why}")
    return found


def _discover_app() -> TaskQ:
    """Return the one app in the current directory; CommandError if there is none, or several."""
    places = "tasks.py app.py main.py celeryapp.py */celery.py */tasks.py".split()
    looked = [path for place in places for path in sorted(_symbol("glob:glob")(place))]
    found: dict[TaskQ, str] = {}
    for path in looked:
        module = path[:-3].replace(os.sep, ".")
        with open(path, encoding="utf-8", errors="replace") as file:
            is_named = re.search(rf"\b{__name__.rpartition('.')[2]}\b", file.read())
        app = _app_in(_import_if_there(module)) if is_named else None
        if app is not None:
            found.setdefault(app, module)
    if len(found) == 1:
        return next(iter(found))
    why = f"no app was found in {os.getcwd()} (looked at: {', '.join(looked or places)})"
    why = f"there are {len(found)} apps here, in {_names(found.values())}" if found else why
    name = next(iter(found.values()), "MODULE")
    example = f"python {os.path.basename(__file__)} -A {name} worker"
    raise CommandError(f"{why}. Name the module of yours:\n    {example}")


def _configured_app(options: Any, app: TaskQ | None) -> TaskQ:
    """Return the app that the command is for, with the settings that the command line gives."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name = options.app or (os.environ.get("TASKQ_APP") if app is None else None)
    if name:
        app = find_app(name)
    elif app is not None:
        # `python -m proj.celery` runs as `__main__` what its tasks would import a second time:
        # they get this one, unless the other one is there already and has an app of that name.
        main = sys.modules["__main__"]
        names = [name for name, value in vars(main).items() if value is app]
        module = sys.modules.setdefault(_origin()[1] or "__main__", main)
        app = getattr(module, names[0], app) if names else app
    elif options.broker and options.command != "worker":
        app = TaskQ("default")
    else:
        app = _discover_app()
    app.set_current()
    given = {"broker_url": options.broker, "result_backend": options.result_backend}
    app.conf.update({name: value for name, value in given.items() if value})
    return app


def _worker_command(app: TaskQ, options: Any) -> int:
    import ctypes  # noqa: F401 - here once instead of in every child

    known = {*Worker.OPTIONS, *_OPTION_SETTINGS}
    worker = Worker(app, **{name: v for name, v in vars(options).items() if name in known})
    options.logfile = worker.log_options["logfile"]
    options.pidfile = options.pidfile and node_format(options.pidfile, worker.hostname)
    if options.detach:
        worker.check()  # what cannot be started is said while there is a terminal
        app.close()
    with _daemon(options):
        status = worker.start()
        if worker.restarting:
            options.purge = None
            _run_anew(sys.executable, options)
    return status


def _call_command(app: TaskQ, options: Any) -> None:
    names = ("eta", "countdown", "expires", "serializer", "queue", "exchange", "routing_key")
    given = {name: getattr(options, name) for name in names}
    with contextlib.suppress(TypeError, ValueError):  # ISO 8601, or None
        given["expires"] = float(given["expires"])
    try:
        print(app.send_task(options.name, options.args, options.kwargs, **given).id)
    except (TypeError, ValueError) as exc:
        raise CommandError(str(exc)) from None


def _from_json(text: str, kind: type) -> Any:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, kind):
            return value
    raise CommandError(f"{text!r}: expected a JSON {'array' if kind is list else 'object'}")


def _result_command(app: TaskQ, options: Any) -> None:
    result = app.AsyncResult(options.task_id)
    print(result.traceback if options.traceback else result.get())


def _purge_command(app: TaskQ, options: Any) -> int:
    names = set(_name_list(options.queues) or app.router.queues)
    names -= set(_name_list(options.exclude_queues))
    if not names:
        return 0
    if not options.force:
        print(f"WARNING:This will remove all tasks from queue{'s' * (len(names) > 1)}: "
              f"{', '.join(sorted(names))}.\n         There is no undo for this operation!\n\n"
              "(to skip this prompt use the -f option)\n"
              "Are you sure you want to delete all tasks? [y/N]: ", end="", flush=True)  # fmt: skip
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Aborted!", file=sys.stderr)
            return 1
    count = sum(map(app.store.purge, names))
    purged = f"Purged {_plural(count, 'message')} from {_plural(len(names), 'known task queue')}."
    print(purged if count else f"No messages purged from {_plural(len(names), 'queue')}.")
    return 0


def _shell_command(app: TaskQ, options: Any) -> None:
    """Run a Python that has the app, its tasks and the parts of a canvas at hand."""
    app.import_default_modules()
    parts = "Task chord group chain chunks xmap xstarmap subtask signature".split()
    known: dict[str, Any] = {"app": app, "celery": app, **{part: globals()[part] for part in parts}}
    if not options.without_tasks:
        own = [task for name, task in app.tasks.items() if not name.startswith("celery.")]
        known.update((task.__name__, task) for task in own)
    ipython = None if options.python else _import_if_there("IPython")
    if ipython is not None:
        ipython.start_ipython(argv=[], user_ns=known)
        return
    if options.ipython:
        raise CommandError("--ipython needs IPython, which is not installed: pip install ipython")
    with contextlib.suppress(ImportError):  # a Python without readline
        readline, completer = _symbol("readline"), _symbol("rlcompleter:Completer")(known)
        readline.set_completer(completer.complete)
        readline.parse_and_bind("tab: complete")
    _symbol("code:interact")(local=known)


def _list_command(app: TaskQ, options: Any) -> None:
    """Print which exchanges bring messages to which queues, by which routing keys."""
    if options.what != "bindings":
        raise CommandError(f"list {options.what}: expected list bindings")
    queues, row = app.router.queues.values(), "{:<28} {:<28} {}"
    app.router.bind(queues)
    print(row.format("Queue", "Exchange", "Routing Key"), row.format(*["-" * 16] * 3), sep="\n")
    for exchange in dict.fromkeys(queue.exchange.name for queue in queues):
        for _, key, queue in sorted(app.store.bindings(exchange)):
            print(row.format(queue, exchange, key))


def _migrate_command(app: TaskQ, options: Any) -> None:
    """Move messages from one store to another. They are there before they are gone here, so that
    none is lost, whenever it is killed."""
    source, target = (open_store(url, {}) for url in (options.source, options.destination))
    if source.uri == target.uri:
        raise CommandError("SOURCE and DESTINATION are the same: expected two stores")
    queues, tasks = _name_list(options.queues) or [*app.router.queues], _name_list(options.tasks)
    left, owner = options.limit or sys.maxsize, int.from_bytes(os.urandom(7), "big")
    gone, moved = _GIVE_BACK._replace(verb="ack"), set()  # by hash: else it is the same store

    def move(claims: list[Claim], owner: int | None) -> int:
        """Move those that are wanted; return how many there were."""
        nonlocal left
        wanted = [c for c in claims if c.head[0] and (not tasks or c.head[0] in tasks)]
        wanted = [claim for claim in wanted if hash(claim.raw) not in moved][:left]
        for claim in wanted:
            moved.add(hash(claim.raw))
            due = None if owner else _timestamp(claim.message.headers["eta"])
            target.publish([Delivery(claim.queue, claim.priority, due, claim.raw.decode())])
            with contextlib.suppress(StaleClaim):  # a worker was quicker: it runs twice
                source.settle(owner, [(claim, gone)])
            print(f"Migrating task {claim.head[0]}[{claim.head[1]}]", flush=True)
        left -= len(wanted)
        return len(wanted)

    def give_back(journal: Journal) -> None:
        source.recover_owner(journal.owner, {}, None, source.settle)
        journal.close(remove=True)

    for other in Journal.others(source.folder):
        if other.info["node"] == "migrate" and other.lock_whole():  # it was killed
            give_back(other)
    journal = Journal(f"{source.folder}/{owner:x}.journal", {"node": "migrate", "slots": 1})
    try:
        while left and source.look(queues)[0]:
            move(source.settle(owner, [], queues, 100), owner)
        while left and move(source.scheduled(queues), None):  # they need no claim
            pass
    finally:
        give_back(journal)
        source.leave(owner)


def bugreport(app: TaskQ | None = None) -> str:
    """Return the versions and settings that a bug report should name."""
    import platform

    app = app_or_default(app)
    return f"""
software -> taskq:{__version__} py:{platform.python_version()} sqlite:{sqlite3.sqlite_version}
platform -> system:{platform.system()} arch:{platform.machine()} imp:{sys.implementation.name}
settings -> broker:{app.store.uri} results:{app.backend.uri}

{app.conf.humanize()}
"""


def _demo_command(_: Any, options: Any) -> int:
    """Count the lines and words of the standard library with a prefork worker, and check it."""
    found = _symbol("glob:iglob")(os.path.dirname(os.__file__) + "/**/*.py", recursive=True)
    paths = sorted(path for path in found if "site-packages" not in path)[:3000]

    def count(path: str) -> list[int]:
        with open(path, "rb") as file:
            text = file.read()
        return [text.count(b"\n"), len(text.split())]

    with _symbol("tempfile:TemporaryDirectory")(prefix="taskq-demo-") as folder:
        app = TaskQ("demo", broker=f"sqlite:///{folder}/demo.db", set_as_current=False)
        task = app.task(name="demo.count")(count)
        with app.worker() as background:
            worker: Any = background.worker
            print(f"A {worker.pool_name} worker with {worker.concurrency} processes, on an SQLite "
                  f"file,\ncounts lines and words of {len(paths)} files of Python")  # fmt: skip
            start = time.monotonic()
            results = [task.delay(path) for path in paths]
            sent = time.monotonic() - start
            counted: list[Any] = []
            while len(counted) < len(results):
                counted += [each.get(timeout=60) for each in results[len(counted) :][:200]]
                print(f"{len(counted)}/{len(paths)}", flush=True)
            total = time.monotonic() - start
        app.close()
    wrong = sum(count(path) != found for path, found in zip(paths, counted))
    lines, words = map(sum, zip(*counted))
    print(f"""
{lines:,} lines, {words:,} words; a plain loop agrees on all but {wrong} files
tasks:      {len(paths)} in {total:.2f} s, {len(paths) / total:,.0f} a second
of that:    {sent:.2f} s to send them all, and {total - sent:.2f} s until all had run""")
    return int(wrong > 0)


def mask(text: str) -> int:
    """Return the number that --umask gives; argparse's errors call it by this function's name."""
    return int(text, 8 if text.startswith("0") else 10)


_COMMON_OPTIONS = """
    -A --app=APPLICATION       module or package of the app
    -b --broker=URL            where messages are: sqlite:///file.db
    --result-backend=URL       where results are
    --workdir=PATH             change to this directory first
    -C --no-color              no colour
    -q --quiet                 say less
    --version                  print the version
"""

_DAEMON_OPTIONS = """
    -D --detach                run in the background
    -f --logfile=PATH          where the log goes; stderr by default
    --pidfile=PATH             file for the process id
    --uid=USER                 user to become, a name or number; this needs root
    --gid=GROUP                the same for the group; the user's by default
    --umask=MASK               octal if it begins with 0, as 022
    --executable=PATH          the Python to run it with
"""

#: What becomes of an option's VALUE.
_TYPES: dict[str, Callable[[str], Any]] = {"SECONDS": float, "INTEGER": int, "MASK": mask}
_TYPES["ARRAY"] = functools.partial(_from_json, kind=list)
_TYPES["OBJECT"] = functools.partial(_from_json, kind=dict)

_REMOTE_OPTIONS = """
    -t --timeout=SECONDS       how long to wait for a reply; 1 by default
    -d --destination=NODES     names of nodes, with commas; all by default
    -j --json                  print the replies as JSON
"""
_ASK_OPTIONS = f"""{_REMOTE_OPTIONS}
    words...                   COMMAND and its arguments: see below
    --list                     list the commands, with the app's own
"""

#: Commands by name: the function that runs it with an app (None: it has its own) and the options,
#: what it does, and its options: their names, =VALUE if they take one, and what they mean.
_COMMANDS: dict[str, tuple[Callable[[Any, Any], int | None], str, str]] = {
    "worker": (_worker_command, "Start a worker.", """
    -n --hostname=NAME         node name; %h is the host, %n its first part, %d its domain
    -l -L --loglevel=DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL
    -O --optimization=default|fair  accepted: it is always fair
    --prefetch-multiplier=INTEGER  messages to hold for each process
    --disable-prefetch         claim a message only when a process is free for it
    -c --concurrency=NUMBER    processes, threads or greenlets; the CPUs by default
    -P --pool=prefork|processes|threads|solo|gevent|eventlet  prefork by default
    --time-limit=SECONDS       seconds until a task's process is killed
    --soft-time-limit=SECONDS  seconds until SoftTimeLimitExceeded is raised in a task
    --max-tasks-per-child=INTEGER  tasks after which a child is replaced
    --max-memory-per-child=INTEGER  KiB after which a child is replaced
    --pool-start-method=fork|spawn  how children start; fork by default
    --purge --discard          delete waiting messages first
    -Q --queues=NAMES          queues to serve, with commas
    -X --exclude-queues=NAMES  queues not to serve, with commas
    -I --include=MODULES       more modules to import, with commas
    --autoscale=MAX,MIN        have between MIN and MAX processes, as there is work
    -E --task-events --events  send events of tasks
    -B --beat                  send periodic tasks, too
    -s --schedule-filename --schedule=PATH  where -B keeps its last runs
    -S --statedb=PATH          where revokes survive a restart; SQLite needs none
    --without-heartbeat        send no heartbeats
    --heartbeat-interval=INTEGER  seconds between heartbeats; 2 by default
    --without-gossip --without-mingle  accepted: there are none
    """ + _DAEMON_OPTIONS),
    "beat": (_beat_command, "Send periodic tasks when they are due.", """
    -s --schedule=PATH         file that keeps the last runs, too
    --max-interval=INTEGER     most seconds between two looks; 300 by default
    -l -L --loglevel=DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL
    """ + _DAEMON_OPTIONS),
    "call": (_call_command, "Call a task by name and print its id.", """
    name                       name of the task
    -a --args=ARRAY            positional arguments, in JSON
    -k --kwargs=OBJECT         keyword arguments, in JSON
    --eta=TIME                 when to run it, ISO 8601
    --countdown=SECONDS        seconds to wait
    --expires=TIME             seconds, or ISO 8601
    --serializer=NAME          json by default
    --queue=NAME               queue to send it to
    --exchange=NAME
    --routing-key=KEY
    """),
    "result": (_result_command, "Print the result of a task by its id.", """
    task_id
    -t --task=NAME             name of the task
    --traceback                show the traceback instead
    """),
    "purge": (_purge_command, "Delete waiting messages; there is no undo.", """
    -f --force                 do not ask
    -Q --queues=NAMES          queues to purge, with commas
    -X --exclude-queues=NAMES  queues not to purge, with commas
    """),
    "events": (_events_command, "Show workers and tasks as their events tell of them.", """
    --dump                     print the events instead, a line each; also -d without -c
    -c --camera=CLASS          take snapshots with this subclass of Polaroid, myapp.Camera
    -F --frequency --freq=SECONDS  seconds between two; 1 by default
    -r --maxrate=RATE          at most so many, as 10/m
    -l -L --loglevel=DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL
    """ + _DAEMON_OPTIONS.replace("-D", "-d")),
    "inspect": (_remote_command, "Ask workers how they are.", _ASK_OPTIONS),
    "control": (_remote_command, "Change what workers do.", _ASK_OPTIONS),
    "status": (_remote_command, "Show which workers are online.", _REMOTE_OPTIONS),
    "list": (_list_command, "List what brings messages to queues.", """
    what                       bindings
    """),
    "migrate": (_migrate_command, "Move messages from one store to another.", """
    source                     address of the store where they are
    destination                address of the other one
    -n --limit=INTEGER         move no more than so many
    -T --tasks=NAMES           only these tasks, with commas
    -Q --queues=NAMES          only from these queues, with commas; the app's by default
    -a --ack-messages          accepted: what is moved is gone from the source
    """),
    "shell": (_shell_command, "Start a Python that knows the app and its tasks.", """
    -I --ipython               IPython, which is the default if it is installed
    --python                   the plain one
    -T --without-tasks         leave out the tasks
    """),
    "report": (lambda app, _: print(bugreport(app)), "Print what a bug report should name.", ""),
    "multi": (_multi_command, "Start, stop and restart several workers.", """
    command                    start stop stopwait stop_verify restart kill names show expand get
    nodes                      names or a number; then the worker's options, as -c 3 -c:1-2,w5 9
    --pidfile=PATH             %n.pid by default
    --logfile=PATH             %n%I.log by default
    --cmd=WORDS                what to run instead of `taskq.py worker --detach`
    --range-prefix=NAME        how the names of counted nodes begin; celery by default
    --nosplash                 say less
    --verbose                  say more
    """),
    "demo": (_demo_command, "Run a worker on some real work, in a temporary file.", ""),
}  # fmt: skip


def _parser(command: str = "") -> Any:
    """Return the parser of the options that stand anywhere, and of a command's."""
    import argparse

    _, summary, table = _COMMANDS.get(command, (None, (__doc__ or "").partition("\n")[0], ""))
    parser = argparse.ArgumentParser(
        prog=f"taskq {command}".strip(), description=summary, allow_abbrev=False,
        add_help=bool(command), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=command_list(command) if command in ("inspect", "control") else None,
    )  # fmt: skip

    def fail(text: str) -> NoReturn:
        raise CommandError(f"{text} (see {parser.prog} --help)")

    parser.error = fail  # type: ignore[assignment]
    for line in filter(None, map(str.strip, (table + _COMMON_OPTIONS).splitlines())):
        flags, _, meaning = line.partition("  ")
        flags, _, value = flags.partition("=")
        more: dict[str, Any] = {"help": meaning.strip().replace("%", "%%")}
        if flags.endswith("..."):
            flags, more["nargs"] = flags[:-3], "*"
        elif "|" in value:
            more.update(choices=value.split("|"), type=str.upper if value.isupper() else str)
        elif value:
            more.update(metavar=value, type=_TYPES.get(value, str))
        elif flags == "--version":
            more.update(action="version", version=f"taskq {__version__}")
        elif flags.startswith("-"):
            more.update(action="store_true", default=None)
        parser.add_argument(*flags.split(), **more)
    return parser


def _parse(argv: Sequence[str]) -> Any:
    """Return the options that the command line gives; SystemExit after --help and --version."""
    common = _parser()
    options, words = common.parse_known_args(argv)
    command = words.pop(0) if words else "--help"
    if command in ("-h", "--help"):
        common.usage = "taskq [OPTIONS] COMMAND [ARGS]"
        lines = (f"    {name:<10} {summary}" for name, (_, summary, _) in _COMMANDS.items())
        common.epilog = "commands:\n" + "\n".join(lines)
        common.print_help()
        sys.exit(0)
    if command == "multi" and words[:1] in ([], ["help"]):
        words = ["--help"]
    if command == "multi" and not {"-h", "--help"}.intersection(words):
        at = argv.index("multi")
        words = [*argv[at + 1 :], *argv[:at]]  # all of them are for the nodes
        return types.SimpleNamespace(command="multi", workdir=None, words=words)
    if command not in _COMMANDS:
        hint = _hint(command, _COMMANDS, 0.6) or "."
        raise CommandError(f"no command {command!r}{hint} The commands are {_names(_COMMANDS)}.")
    options.command = command
    return _parser(command).parse_intermixed_args(words, options)


def main(argv: Sequence[str] | None = None, app: TaskQ | None = None) -> int:
    """Run the command line, ['-A', 'proj', 'worker']; return the exit status, or SystemExit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: its number must not become that of a store's file
            setattr(sys, name, open(os.devnull, mode))
    given = list(sys.argv[1:] if argv is None else argv)
    options = types.SimpleNamespace()
    try:
        try:
            options = _parse(given)
            if getattr(options, "executable", None):
                _run_anew(options.executable, options)
            taken = [name for name in ("workdir", "uid", "gid") if getattr(options, name, None)]
            _settle_in(options)  # once: what these say another copy must not do again
            given += [f"--{name}=" for name in taken]
            _patch_greenlets(getattr(options, "pool", None))  # before the app's modules come
            app = None if options.command in ("demo", "multi") else _configured_app(options, app)
            return _COMMANDS[options.command][0](app, options) or 0
        finally:
            sys.stdout.flush()
    except _OtherCopy as other:
        return other.args[0].main(given)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as exc:
        if options.command != "multi" and exc.filename not in filter(None, vars(options).values()):
            raise  # not of a path that the command line names
        text, status = f"{exc.filename or options.command}: {exc.strerror}", 1
    except CommandError as exc:
        text, status = (*exc.args, 2)[:2]
    except (CeleryError, OperationalError, EncodeError) as exc:
        text, status = exc.args[0] if exc.args else exc, 1
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(status)


# ==== 21. Public names ===========================================================================


def _publish_submodules() -> None:
    """Make `taskq.exceptions` and its kin importable; each holds all of this file's names."""
    public = {k: v for k, v in globals().items() if k[0] != "_" and type(v) is not type(sys)}
    for name in "date datetime daytime Decimal timedelta timezone".split():
        del public[name]  # `import *` is not to bring them
    public.update(gen_unique_id=uuid, get_logger=logging.getLogger)
    paths = "app app.task exceptions states signals result canvas schedules utils utils.log"
    for path in f"{paths} worker worker.control events events.state events.snapshot".split():
        module = types.ModuleType(f"{__name__}.{path}", f"{path}: see {__name__}.")
        module.__dict__.update(public)
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        setattr(sys.modules[parent], last, module)


_publish_submodules()

__all__ = """AsyncResult Celery EagerResult Exchange GroupResult Queue ResultSet Signal Signature
    Task TaskQ allow_join_result app_or_default bugreport chain chord chunks current_app
    current_task get_task_logger group main maybe_signature result_from_tuple shared_task signature
    subtask uuid xmap xstarmap""".split()
