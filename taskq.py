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

    producer                  store (one SQLite file)                worker
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

    1. States and errors      6. Stores               11. Pools
    2. Serialization          7. Results              12. Worker
    3. Settings               8. Canvas               13. Background worker
    4. Messages               9. Task and app         14. Command line
    5. Signals               10. Execution            15. Public names
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The user's tasks import this file under its own name, so running it as `__main__` would make
    # a second set of classes. Hand over to the importable copy before anything is defined.
    if __spec__ is not None:  # python -m taskq: the name is known
        import importlib

        _name = __spec__.name
        _main = sys.modules["__main__"]
        _main.__spec__ = None  # or spawned children would run this file again
        del _main.__file__
        sys.exit(importlib.import_module(_name).main())

    def _locate(path):
        """Return the directory to import this file from, and its dotted name there."""
        folder, name = os.path.split(path)
        name = name[:-3] if name.endswith(".py") else name
        roots = {os.path.abspath(entry) for entry in [os.getcwd(), *sys.path[1:]]}
        parts, root = [name], folder
        while os.path.exists(os.path.join(root, "__init__.py")):
            root, part = os.path.split(root)
            parts.insert(0, part)
        if len(parts) == 1:  # no package: perhaps a folder of one without __init__.py
            while root not in roots and root != os.path.dirname(root):
                root, part = os.path.split(root)
                parts.insert(0, part)
            if root not in roots:
                parts, root = [name], folder
        if all(part.isidentifier() for part in parts):
            return root, ".".join(parts)
        return folder, name

    import subprocess

    _root, _name = _locate(os.path.abspath(__file__))
    _code = (
        f"import sys; sys.path[:] = [{_root!r}] + [p for p in sys.path if p]; "
        f"from importlib import import_module; sys.exit(import_module({_name!r}).main())"
    )
    _flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    _argv = [sys.executable, *_flags, "-c", _code, *sys.argv[1:]]
    if os.name == "nt":  # there exec returns to the shell at once
        sys.exit(subprocess.call(_argv))
    os.execv(sys.executable, _argv)

import collections
import contextlib
import functools
import io
import itertools
import json
import logging
import mmap
import re
import select
import signal
import sqlite3
import struct
import threading
import time
import types
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
    from typing import Any, Callable, Iterable, Iterator, NoReturn, Sequence

__version__ = "0.1.0"


# ---------------------------------------------------------------------------------------------
# 1. States and errors
# ---------------------------------------------------------------------------------------------

#: The task waits, or is unknown: the two cannot be told apart.
PENDING = "PENDING"
#: A worker has it (only in events).
RECEIVED = "RECEIVED"
#: It runs (only with `track_started`).
STARTED = "STARTED"
SUCCESS = "SUCCESS"
FAILURE = "FAILURE"
#: It was cancelled, or expired before it ran.
REVOKED = "REVOKED"
REJECTED = "REJECTED"
#: It failed and waits to run again.
RETRY = "RETRY"
IGNORED = "IGNORED"

READY_STATES = frozenset({SUCCESS, FAILURE, REVOKED})
UNREADY_STATES = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})
PROPAGATE_STATES = frozenset({FAILURE, REVOKED})
ALL_STATES = frozenset({PENDING, RECEIVED, STARTED, SUCCESS, FAILURE, RETRY, REVOKED})

#: From the state that says most of a task to the one that says least; None stands for own states.
PRECEDENCE = [SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING]


def precedence(state: str | None) -> int:
    """Return a state's place in PRECEDENCE."""
    return PRECEDENCE.index(state if state in PRECEDENCE else None)


class state(str):  # noqa: N801 - Celery's name
    """A state that compares by precedence: `state(PENDING) < state(SUCCESS)`."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __lt__(self, other: str) -> bool:
        return precedence(self) > precedence(other)

    def __le__(self, other: str) -> bool:
        return precedence(self) >= precedence(other)

    def __gt__(self, other: str) -> bool:
        return precedence(self) < precedence(other)

    def __ge__(self, other: str) -> bool:
        return precedence(self) <= precedence(other)


class CeleryError(Exception):
    """Base class of taskq's errors (Celery's name for it)."""


class CeleryWarning(UserWarning):
    """Base class of taskq's warnings."""


class AlwaysEagerIgnored(CeleryWarning):
    """`send_task` cannot run a task here: `task_always_eager` has no effect on it."""


class ImproperlyConfigured(CeleryError):
    """A setting, an address or an option cannot mean what was given."""


class OperationalError(Exception):
    """The store cannot be reached or written."""


class SerializationError(Exception):
    """Base class of errors in serialization."""


class EncodeError(SerializationError):
    """A value cannot be written as a message or a result."""


class DecodeError(SerializationError):
    """Data cannot be read back."""


class ContentDisallowed(SerializationError):
    """Data has a content type that `accept_content` does not list."""


class TaskPredicate(CeleryError):
    """Base class of what a task raises to steer its own end."""


class Retry(TaskPredicate):
    """The task will run again; raised by `Task.retry`.

    `exc` is the error behind it, `when` seconds or a datetime, `sig` what was sent.
    """

    def __init__(
        self,
        message: str | None = None,
        exc: Any = None,
        when: Any = None,
        is_eager: bool = False,
        sig: Any = None,
    ) -> None:
        self.message = message
        self.exc = None if isinstance(exc, str) else exc
        self.excs: Any = exc if isinstance(exc, str) else exc and _repr(exc)
        self.when = when
        self.is_eager = is_eager
        self.sig = sig
        super().__init__(message, exc, when)

    def humanize(self) -> str:
        """Return when it will run, such as 'in 3s'."""
        return f"in {self.when}s" if isinstance(self.when, (int, float)) else f"at {self.when}"

    def __str__(self) -> str:
        if self.message:
            return self.message
        return f"Retry {self.humanize()}" + (f": {self.excs}" if self.excs else "")

    def __reduce__(self) -> Any:
        return type(self), (self.message, self.exc or self.excs, self.when)


class Ignore(TaskPredicate):
    """Raised in a task to leave its state as it is."""


class Reject(TaskPredicate):
    """Raised in a task to reject its message, or with `requeue=True` to put it back."""

    def __init__(self, reason: Any = None, requeue: bool = False) -> None:
        self.reason = reason
        self.requeue = requeue
        super().__init__(reason, requeue)

    def __repr__(self) -> str:
        return f"reject requeue={self.requeue}: {self.reason}"


class TaskError(CeleryError):
    """Base class of errors about one task."""


class QueueNotFound(KeyError, TaskError):
    """A queue is not in `task_queues`, and `task_create_missing_queues` is off."""


class NotRegistered(KeyError, TaskError):
    """A task of this name is not registered."""

    def __repr__(self) -> str:
        return f"Task of kind {self} never registered, please make sure it's imported."


class TimeoutError(TaskError):  # noqa: A001 - Celery's name
    """The result did not arrive in time."""


class MaxRetriesExceededError(TaskError):
    """The task has used up its retries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.task_args = kwargs.pop("task_args", [])
        self.task_kwargs = kwargs.pop("task_kwargs", {})
        super().__init__(*args, **kwargs)


class TaskRevokedError(TaskError):
    """The task was revoked, so it has no result."""


class InvalidTaskError(TaskError):
    """A message does not describe a task."""


class ChordError(TaskError):
    """A part of a chord's header failed."""


class SoftTimeLimitExceeded(Exception):
    """Raised inside a task when its soft time limit has passed."""

    def __str__(self) -> str:
        return f"{type(self).__name__}{self.args!r}"


class TimeLimitExceeded(Exception):
    """The task was killed: its hard time limit has passed."""

    def __str__(self) -> str:
        return f"{type(self).__name__}{self.args!r}"


class WorkerLostError(Exception):
    """The process that ran the task died."""


class WorkerTerminate(SystemExit):
    """Raised in a worker's main process to stop it at once."""


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of a re-raised error."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


#: Names of Celery's that taskq itself does not raise: they are there to import and to catch.
_OTHER_ERRORS: dict[str, type] = {
    **dict.fromkeys(("IncompleteStream", "AlreadyRegistered"), TaskError),
    **dict.fromkeys(("SecurityError",), CeleryError),
    **dict.fromkeys(("BackendError", "Terminated", "CeleryCommandException"), Exception),
    **dict.fromkeys(("NotConfigured", "SecurityWarning", "FixupWarning"), CeleryWarning),
    **dict.fromkeys(("DuplicateNodenameWarning", "DuplicateTaskNameWarning"), CeleryWarning),
    "CDeprecationWarning": DeprecationWarning,
    "CPendingDeprecationWarning": PendingDeprecationWarning,
    "WorkerShutdown": SystemExit,
}
for _name, _base in _OTHER_ERRORS.items():
    globals()[_name] = type(_name, (_base,), {"__module__": __name__, "__doc__": "Celery's name."})
for _name in ("BackendGetMetaError", "BackendStoreError"):
    globals()[_name] = type(_name, (globals()["BackendError"],), {"__module__": __name__})


# ---------------------------------------------------------------------------------------------
# 2. Serialization
# ---------------------------------------------------------------------------------------------

#: What `task_serializer` and `result_serializer` may be, with the content type of each.
CONTENT_TYPES = {"json": "application/json", "pickle": "application/x-python-serialize"}


def uuid() -> str:
    """Return a new random id in the form of a UUID 4: `uuid() -> '7f0c…-…'`."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _repr(value: Any, limit: int = 1024) -> str:
    """Return `repr(value)`, cut at `limit` characters, as text that can be written anywhere."""
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<Unrepresentable {type(value)!r}: {exc!r}>"
    if not text.isascii():  # a lone surrogate cannot be encoded
        text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {"__type__": kind, "__value__": value}


def _encode_rich(value: Any) -> Any:
    """Return what JSON writes for a value that it does not know; TypeError if there is none."""
    if hasattr(value, "__json__"):
        return value.__json__()
    if isinstance(value, datetime):
        return _tagged("datetime", value.isoformat())
    if isinstance(value, date):
        return _tagged("date", value.isoformat())
    if isinstance(value, daytime):
        return _tagged("time", value.isoformat())
    if isinstance(value, Decimal):
        return _tagged("decimal", str(value))
    if isinstance(value, bytes):
        try:
            return _tagged("bytes", value.decode("utf-8"))
        except UnicodeDecodeError:
            import base64

            return _tagged("base64", base64.b64encode(value).decode())
    if type(value).__name__ == "UUID" and hasattr(value, "hex"):
        return _tagged("uuid", {"hex": value.hex})
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _decode_uuid(value: dict[str, str]) -> Any:
    from uuid import UUID

    return UUID(hex=value["hex"])


def _decode_base64(value: str) -> bytes:
    import base64

    return base64.b64decode(value.encode(), validate=True)


_RICH_TYPES: dict[str, Callable[[Any], Any]] = {
    "datetime": lambda value: _parse_time(value),
    "date": lambda value: date.fromisoformat(value[:10]),
    "time": daytime.fromisoformat,
    "decimal": Decimal,
    "uuid": _decode_uuid,
    "bytes": lambda value: value.encode("utf-8"),
    "base64": _decode_base64,
}


def _decode_rich(value: dict[str, Any]) -> Any:
    if len(value) == 2 and "__type__" in value and "__value__" in value:
        decode = _RICH_TYPES.get(value["__type__"])
        if decode is None:
            raise DecodeError(f"unsupported __type__ {value['__type__']!r} in JSON")
        return decode(value["__value__"])
    return value


def _parse_time(text: str) -> datetime:
    """Return the datetime of an ISO 8601 text; Python before 3.11 does not read a final Z."""
    return datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)


_json_encode = json.JSONEncoder(default=_encode_rich, separators=(",", ":")).encode
_json_decode = json.JSONDecoder(object_hook=_decode_rich).decode


def serialize(value: Any, serializer: str = "json") -> tuple[str, str, str]:
    """Return `value` as (content type, content encoding, text); pickle comes as base64.

    Raises EncodeError for a value that cannot be written, or for an unknown serializer.
    Example: `serialize([1, 2]) -> ('application/json', 'utf-8', '[1,2]')`.
    """
    if serializer == "json":
        try:
            return "application/json", "utf-8", _json_encode(value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(str(exc)) from exc
    if serializer == "pickle":
        import base64
        import pickle

        try:
            data = pickle.dumps(value, protocol=4)
        except Exception as exc:
            raise EncodeError(f"cannot pickle: {exc}") from exc
        return CONTENT_TYPES["pickle"], "binary", base64.b64encode(data).decode()
    raise EncodeError(f"unknown serializer {serializer!r}: taskq has {_names(CONTENT_TYPES)}")


def deserialize(text: str, content_type: str, accept: Iterable[str]) -> Any:
    """Return the value that `serialize` wrote.

    Raises ContentDisallowed where `accept` (serializers or content types) does not list the
    type, and DecodeError for data that cannot be read.
    """
    accept = set(accept)
    if content_type not in accept and content_type not in {CONTENT_TYPES.get(a) for a in accept}:
        raise ContentDisallowed(
            f"Refusing to deserialize content of type {content_type}: "
            f"accept_content allows {_names(sorted(accept))}"
        )
    try:
        if content_type == "application/json":
            return _json_decode(text)
        import pickle

        return pickle.loads(_decode_base64(text))
    except Exception as exc:
        raise DecodeError(f"cannot read {content_type}: {_repr(exc, 200)}") from exc


def _names(items: Iterable[str]) -> str:
    """Return names as in "'json' and 'pickle'"."""
    quoted = [repr(item) for item in items]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


#: The modules that Celery's own errors come from: theirs is the name on the wire, so that a result
#: does not tell which of the two ran the task, nor where this file was copied to.
_WIRE_MODULES = {
    "billiard.exceptions": (SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError),
    "kombu.exceptions": (
        OperationalError,
        SerializationError,
        EncodeError,
        DecodeError,
        ContentDisallowed,
    ),
}
_WIRE_MODULE_OF: dict[type, str] = {
    cls: module for module, classes in _WIRE_MODULES.items() for cls in classes
}


def encode_exception(exc: BaseException) -> dict[str, Any]:
    """Return an exception as Celery's JSON has it: exc_type, exc_message (its args), exc_module.

    An argument that JSON cannot hold is replaced by its repr.
    """
    cls = type(exc)
    args: list[Any] = []
    for arg in exc.args if cls is not Retry else (str(exc),):
        try:
            _json_encode(arg)
            args.append(arg)
        except Exception:
            args.append(_repr(arg))
    module = cls.__module__
    if module == __name__:
        module = _WIRE_MODULE_OF.get(cls, "celery.exceptions")
    return {"exc_type": cls.__qualname__, "exc_message": args, "exc_module": module}


def decode_exception(meta: Any) -> BaseException:
    """Return the exception of `encode_exception`'s form.

    The class is looked up where its module is imported already; nothing is ever imported because
    a result names it. Otherwise the result is of a new class of that name.
    """
    if isinstance(meta, BaseException):  # a pickled result
        return meta
    if not isinstance(meta, dict) or not isinstance(meta.get("exc_type"), str):
        return Exception(meta)
    name, module = meta["exc_type"], meta.get("exc_module") or "builtins"
    args = meta.get("exc_message") or ()
    args = tuple(args) if isinstance(args, (list, tuple)) else (args,)
    if module in ("celery.exceptions", *_WIRE_MODULES):
        found: Any = globals().get(name)
    else:
        found = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        found = type(str(name), (Exception,), {"__module__": module})
    try:
        return found(*args)
    except Exception:  # its __init__ wants something else than its args
        exc = Exception.__new__(found) if issubclass(found, Exception) else found.__new__(found)
        exc.args = args
        return exc


# ---------------------------------------------------------------------------------------------
# 3. Settings
# ---------------------------------------------------------------------------------------------

_LOG_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
_TASK_LOG_FORMAT = (
    "[%(asctime)s: %(levelname)s/%(processName)s] %(task_name)s[%(task_id)s]: %(message)s"
)

#: Every setting: Celery's name, its default, what it means.
SETTINGS: dict[str, tuple[Any, str]] = {
    "accept_content": (["json"], "serializers or content types that a worker accepts"),
    "broker_transport_options": ({}, "options of the store, as in the URL's query"),
    "broker_url": (None, "where messages are kept: sqlite:// or memory://"),
    "imports": ((), "modules that a worker imports when it starts"),
    "include": ((), "more modules that a worker imports when it starts"),
    "result_accept_content": (None, "the same for results; accept_content by default"),
    "result_backend": (None, "where results are kept; the broker's store by default"),
    "result_expires": (timedelta(days=1), "how long a result is kept (seconds or timedelta)"),
    "result_extended": (False, "keep name, args, kwargs, worker, retries, queue with a result"),
    "result_failure_expires": (None, "how long the result of a failure is kept"),
    "result_serializer": ("json", "how results are written: json or pickle"),
    "task_acks_late": (False, "acknowledge after a task has run instead of before"),
    "task_acks_on_failure": (None, "acknowledge late tasks that failed"),
    "task_acks_on_failure_or_timeout": (True, "both of its neighbours"),
    "task_acks_on_timeout": (None, "acknowledge late tasks that ran into their time limit"),
    "task_always_eager": (False, "apply_async runs the task here and now"),
    "task_annotations": (None, "attributes to set on tasks, by name: {'tasks.add': {...}}"),
    "task_create_missing_queues": (True, "make queues that task_queues does not list"),
    "task_default_exchange": (None, "exchange of the default queue; the queue's name by default"),
    "task_default_exchange_type": ("direct", "direct, topic or fanout"),
    "task_default_priority": (None, "priority of tasks that name none, 0 (highest) to 9"),
    "task_default_queue": ("celery", "queue of tasks that nothing routes elsewhere"),
    "task_default_routing_key": (None, "routing key of the default queue; its name by default"),
    "task_eager_propagates": (False, "eager tasks raise their errors"),
    "task_ignore_result": (False, "keep no results"),
    "task_inherit_parent_priority": (False, "a task called by another has its priority"),
    "task_publish_retry": (True, "try again when the store cannot be written"),
    "task_publish_retry_policy": (
        {"max_retries": 3, "interval_start": 0, "interval_max": 1, "interval_step": 0.2},
        "how often and after how many seconds",
    ),
    "task_queues": (None, "names or Queue objects that workers serve"),
    "task_reject_on_worker_lost": (None, "a late task whose process died runs again"),
    "task_routes": (None, "where tasks go: dict, pairs, globs, patterns, functions"),
    "task_serializer": ("json", "how arguments are written: json or pickle"),
    "task_soft_time_limit": (None, "seconds until SoftTimeLimitExceeded is raised in a task"),
    "task_store_eager_result": (False, "eager tasks keep their results"),
    "task_store_errors_even_if_ignored": (False, "keep failures of tasks that ignore results"),
    "task_time_limit": (None, "seconds until the process of a task is killed"),
    "task_track_started": (False, "tasks report STARTED"),
    "timezone": (None, "name of the local time zone, such as 'Europe/Oslo'; UTC by default"),
    "worker_concurrency": (None, "processes, threads or greenlets; the CPUs by default"),
    "worker_disable_prefetch": (False, "claim a message only when a process is free for it"),
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
    "worker_task_log_format": (_TASK_LOG_FORMAT, "format of log lines of task loggers"),
}

#: Settings of Celery of which taskq has one value alone: another is an error, not a surprise.
_ONLY: dict[str, Any] = {
    **dict.fromkeys(("beat_schedule", "task_stamps"), {}),
    **dict.fromkeys(("enable_utc", "worker_enable_remote_control"), True),
    **dict.fromkeys(
        ("task_compression", "result_compression", "task_default_rate_limit", "worker_state_db")
        + ("broker_read_url", "broker_write_url", "broker_use_ssl", "security_key")
        + ("security_certificate", "security_cert_store", "broker_failover_strategy"),
        None,
    ),
    **dict.fromkeys(
        ("task_remote_tracebacks", "task_send_sent_event", "worker_send_task_events")
        + ("task_allow_error_cb_on_chord_header", "task_retry_on_worker_lost", "worker_direct")
        + ("worker_pool_restarts", "beat_enable_remote_control")
        + ("worker_deduplicate_successful_tasks",),
        False,
    ),
    "task_protocol": 2,
    "worker_soft_shutdown_timeout": 0.0,
    "beat_scheduler": "celery.beat:PersistentScheduler",
}

#: Settings of Celery that tune what taskq does not have: leaving them out changes nothing.
_NO_EFFECT = frozenset(
    "beat_max_loop_interval beat_schedule_filename beat_sync_every beat_cron_starting_deadline "
    "broker_channel_error_retry broker_connection_max_retries broker_connection_retry "
    "broker_connection_retry_on_startup broker_connection_timeout broker_heartbeat "
    "broker_heartbeat_checkrate broker_login_method broker_native_delayed_delivery_queue_type "
    "broker_pool_acquire_timeout broker_pool_limit control_exchange control_queue_durable "
    "control_queue_exclusive control_queue_expires control_queue_ttl event_exchange "
    "event_queue_durable event_queue_exclusive event_queue_expires event_queue_prefix "
    "event_queue_ttl event_serializer result_backend_always_retry result_backend_max_retries "
    "result_backend_base_sleep_between_retries_ms result_backend_max_sleep_between_retries_ms "
    "result_backend_transport_options result_cache_max result_chord_join_timeout "
    "result_chord_retry_interval result_chord_expires result_exchange result_exchange_type "
    "result_persistent security_digest security_key_password task_create_missing_queue_type "
    "task_create_missing_queue_exchange_type task_default_delivery_mode task_default_queue_type "
    "task_queue_max_priority task_repr_maxlevels worker_agent worker_autoscaler "
    "worker_cancel_long_running_tasks_on_connection_loss worker_consumer "
    "worker_detect_quorum_queues worker_disable_rate_limits worker_enable_soft_shutdown_on_idle "
    "worker_enable_prefetch_count_reduction worker_eta_task_limit worker_log_datefmt "
    "worker_lost_wait worker_pool_putlocks worker_proc_alive_timeout worker_task_log_datefmt "
    "worker_timer worker_timer_precision".split()
)

#: Settings of results backends and transports that taskq does not have begin like this.
_FOREIGN = re.compile(
    r"(arangodb|azureblockblob|cache_backend|cassandra|cosmosdbsql|couchbase|database|"
    r"elasticsearch|gcs|mongodb|redis|s3|broker_(host|port|user|password|vhost|transport))"
    r"(_|$)(?!options)"
)


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.84) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


class Settings(dict):
    """An app's settings, by key or by attribute: `app.conf.timezone = 'UTC'`.

    All of SETTINGS are there with their defaults. Own names are kept; one that is close to a
    known name, and a setting of Celery that taskq cannot honour, is an ImproperlyConfigured.
    """

    #: Counts changes, so that what is derived from settings knows when to be derived again.
    version = 0

    def __init__(self) -> None:
        super().__init__({name: default for name, (default, _) in SETTINGS.items()})
        self.__dict__["changed"] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            pass
        if name in _ONLY or name in _NO_EFFECT:
            return _ONLY.get(name)
        near = _nearest(name, SETTINGS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise AttributeError(f"no setting {name!r}{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "version":
            self.__dict__[name] = value
        else:
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        self._check(name, value)
        super().__setitem__(name, value)
        self.changed[name] = value
        self.version += 1

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several settings; all are checked before the first is set."""
        new = dict(*args, **kwargs)
        for name, value in new.items():
            self._check(name, value)
        for name, value in new.items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Set `name` unless the app has set it; return what it is now."""
        if name not in self.changed:
            self[name] = default
        return self[name]

    def _check(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            self._check_value(name, value)
        elif name in _ONLY:
            only = _ONLY[name]
            if (value or only) and (value != only or type(value) is not type(only)):
                raise ImproperlyConfigured(
                    f"setting {name!r} = {_repr(value, 60)}: of Celery's values for it taskq has "
                    f"only {only!r}; leave it out"
                )
        elif name in _NO_EFFECT:
            pass
        elif _FOREIGN.match(name):
            raise ImproperlyConfigured(
                f"setting {name!r} belongs to a broker or backend of Celery's that taskq does not "
                "have; leave it out"
            )
        else:
            near = _old_name(name) if name.isupper() else _nearest(name, SETTINGS)
            if near:
                raise ImproperlyConfigured(f"unknown setting {name!r}: did you mean {near!r}?")

    def _check_value(self, name: str, value: Any) -> None:
        """Raise ImproperlyConfigured for a value that the setting cannot have."""
        default = SETTINGS[name][0]
        if value is None or value == default:
            return
        if name == "timezone":
            _zone(value)
            return
        good, expected = True, ""
        if name.endswith("_serializer"):
            good, expected = value in CONTENT_TYPES, f"one of {_names(CONTENT_TYPES)}"
        elif name.endswith("accept_content"):
            known = {*CONTENT_TYPES, *CONTENT_TYPES.values()}
            good = not isinstance(value, str) and known.issuperset(value)
            expected = f"a list of {_names(CONTENT_TYPES)}"
        elif name == "task_default_exchange_type":
            good = value in ("direct", "topic", "fanout")
            expected = "'direct', 'topic' or 'fanout'"
        elif name == "task_queues":
            good, expected = not isinstance(value, str), "a list of names or Queue objects"
        elif isinstance(default, bool):
            good, expected = isinstance(value, (bool, int)), "True or False"
        elif name.endswith("_expires"):
            good = _is_number(value) or isinstance(value, timedelta)
            expected = "seconds or a timedelta"
        elif name.endswith("_time_limit"):
            good, expected = _is_number(value), "seconds"
        elif name.endswith(("_per_child", "_multiplier")):
            good, expected = _is_number(value) and value >= 0, "a number"
        if not good:
            shown = _repr(value, 60)
            raise ImproperlyConfigured(f"setting {name!r} = {shown}: expected {expected}")

    def load(self, source: Any, namespace: str | None = None) -> None:
        """Take settings from a mapping, module or object.

        With a namespace only names that begin with it count: 'CELERY' reads CELERY_TIMEZONE.
        Modules, classes and functions are passed over, but for functions that are settings.
        """
        pairs = dict(source) if isinstance(source, collections.abc.Mapping) else _attributes(source)
        prefix = namespace.rstrip("_") + "_" if namespace else ""
        found = {}
        for name, value in pairs.items():
            if name.startswith("_") or not name.startswith(prefix):
                continue
            name = name[len(prefix) :].lower() if prefix else name
            passed_over = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)
            if isinstance(value, passed_over) and name not in SETTINGS:
                continue
            found[name] = value
        self.update(found)

    def humanize(self) -> str:
        """Return the settings that differ from their defaults, a line each, secrets masked."""
        return "\n".join(f"{k}: {_masked(k, v)!r}" for k, v in sorted(self.changed.items()))

    def seconds(self, name: str) -> float | None:
        """Return a setting that is seconds, a timedelta or None, as seconds or None."""
        value = self[name]
        return value.total_seconds() if isinstance(value, timedelta) else value


def _attributes(source: Any) -> dict[str, Any]:
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("__")}


def _old_name(name: str) -> str | None:
    """Return today's name of an upper-case setting such as CELERY_TASK_SERIALIZER, if it is one."""
    bare = re.sub(r"^(celeryd?|task)_", "", name.lower())
    names = (name.lower(), bare, f"task_{bare}", f"worker_{bare}", f"result_{bare}")
    return next((candidate for candidate in names if candidate in SETTINGS), None)


def _masked(name: str, value: Any) -> Any:
    if re.search(r"pass|secret|token|key$", name, re.I) and not name.endswith("routing_key"):
        return "********"
    return _mask_url(value) if isinstance(value, str) and "://" in value else value


def _mask_url(url: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"(://[^/@:]*:)[^@]*(@)", r"\1**\2", url)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _zone(value: Any) -> Any:
    """Return the tzinfo of a setting: a name, a tzinfo, or None for UTC."""
    if value is None or value in ("UTC", "utc"):
        return timezone.utc
    if not isinstance(value, str):
        return value
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(value)
    except Exception:
        raise ImproperlyConfigured(
            f"unknown time zone {value!r}: expected a name such as 'UTC' or 'Europe/Oslo'"
        ) from None


# ---------------------------------------------------------------------------------------------
# 4. Messages
# ---------------------------------------------------------------------------------------------


class MalformedMessage(Exception):
    """A message is not one that a task can be made of; the text says why."""


class Message:
    """One task on its way: Celery's message protocol 2. The only form a task has outside a process.

    headers: what describes the task (task, id, eta, expires, retries, …).
    properties: what describes the delivery (correlation_id, delivery_info, priority, …).
    body: text of `[args, kwargs, embed]`, in the content type named beside it; base64 unless JSON.
    """

    __slots__ = ("headers", "properties", "body", "content_type", "encoding")

    def __init__(
        self,
        headers: dict[str, Any],
        properties: dict[str, Any],
        body: str,
        content_type: str = "application/json",
        encoding: str = "utf-8",
    ) -> None:
        self.headers = headers
        self.properties = properties
        self.body = body
        self.content_type = content_type
        self.encoding = encoding

    def encode(self) -> str:
        """Return the envelope, JSON text that `Message.decode` reads."""
        return _json_encode(
            {
                "body": self.body,
                "content-encoding": self.encoding,
                "content-type": self.content_type,
                "headers": self.headers,
                "properties": self.properties,
            }
        )

    @classmethod
    def decode(cls, text: str | bytes) -> Message:
        """Return the message in an envelope; MalformedMessage, whatever the bytes, if none is."""
        try:
            envelope = _json_decode(text.decode() if isinstance(text, bytes) else text)
        except Exception as exc:  # ValueError, RecursionError, ...
            raise MalformedMessage(f"not JSON: {_repr(exc, 120)}") from None
        _expect("the envelope", envelope, isinstance(envelope, dict))
        headers, properties = envelope.get("headers"), envelope.get("properties")
        body, content_type = envelope.get("body"), envelope.get("content-type")
        _expect("headers", headers, isinstance(headers, dict))
        _expect("properties", properties, isinstance(properties, dict))
        _expect("body", body, isinstance(body, str))
        _expect("content-type", content_type, _is_name(content_type))
        get, info = headers.get, properties.get("delivery_info")
        for name in ("id", "task"):
            _expect(f"header {name!r}", get(name), _is_name(get(name)))
        for name, is_good in _OPTIONAL_HEADERS:
            _expect(f"header {name!r}", get(name), get(name) is None or is_good(get(name)))
        _expect("property 'delivery_info'", info, info is None or isinstance(info, dict))
        priority = properties.get("priority")
        _expect("property 'priority'", priority, priority is None or _is_count(priority, 255))
        if properties.get("body_encoding") == "base64" and content_type == "application/json":
            try:
                body = _decode_base64(body).decode()
            except ValueError as exc:
                raise MalformedMessage(f"body: bad base64: {exc}") from None
        return cls(headers, properties, body, content_type, envelope.get("content-encoding"))

    def payload(self, accept: Iterable[str]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """Return (args, kwargs, embed); MalformedMessage if the body holds something else."""
        try:
            body = deserialize(self.body, self.content_type, accept)
        except (ContentDisallowed, DecodeError) as exc:
            raise MalformedMessage(str(exc)) from None
        is_list = (list, tuple)
        _expect("body", body, isinstance(body, is_list) and len(body) == 3, "[args, kwargs, embed]")
        args, kwargs, embed = body
        _expect("args", args, isinstance(args, is_list), "a list")
        _expect("kwargs", kwargs, isinstance(kwargs, dict), "an object")
        return list(args), kwargs, embed if isinstance(embed, dict) else {}

    @property
    def id(self) -> str:
        """The task's id."""
        return self.headers["id"]

    @property
    def expires(self) -> float | None:
        """When the task must have begun, in seconds since the epoch; None for ever."""
        value = self.headers.get("expires")
        return None if value is None else _timestamp(value)


def _expect(what: str, value: Any, good: bool, expected: str = "") -> None:
    """Raise MalformedMessage unless `good`."""
    if not good:
        raise MalformedMessage(f"{what} is {_repr(value, 60)}" + (expected and f", not {expected}"))


def _timestamp(value: Any) -> float:
    """Return seconds since the epoch for an ISO text or a datetime; a naive one is UTC."""
    when = value if isinstance(value, datetime) else _parse_time(value)
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def _is_name(value: Any) -> bool:
    """Return whether a value is a text that every store can hold: lone surrogates are not."""
    try:
        return bool(value.encode("utf-8"))
    except (AttributeError, UnicodeEncodeError):
        return False


def _is_count(value: Any, most: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_time(value: Any) -> bool:
    try:
        return _timestamp(value) is not None
    except Exception:
        return False


def _are_limits(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(
        limit is None or _is_number(limit) and 0 <= limit < 1e9 for limit in value
    )  # fmt: skip


#: Headers that may be missing or null, and how to tell good ones.
_OPTIONAL_HEADERS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("timelimit", _are_limits),
    ("retries", _is_count),
    ("eta", _is_time),
    ("expires", _is_time),
)


#: What a producer hands to a store: `due` is seconds since the epoch, or None for now; `text` an
#: encoded Message.
Delivery = collections.namedtuple("Delivery", "queue priority due text")


class Outcome(collections.namedtuple("Outcome", "verb results publish reason runtime")):
    """What came of one message; all of it is settled in one transaction.

    verb: 'ack', 'requeue' or 'reject' (kept for inspection). results: [task id, state, meta text]
    to store. publish: deliveries that follow. reason: why, of 'reject'. runtime: in seconds.
    """

    __slots__ = ()


# ---------------------------------------------------------------------------------------------
# 5. Signals
# ---------------------------------------------------------------------------------------------


class Signal:
    """Something that happens in taskq, and those who want to be called then.

        @task_success.connect
        def on_success(sender, result, **kwargs): ...

    A receiver is held weakly unless `weak=False`; an error in one is logged and stops nobody.
    """

    def __init__(self, name: str, arguments: str = "") -> None:
        self.name = name
        self.providing_args = set(arguments.split())
        self.receivers: list[tuple[Any, Any, Any]] = []  # (key, sender, reference)

    def connect(
        self,
        receiver: Any = None,
        sender: Any = None,
        weak: bool = True,
        dispatch_uid: Any = None,
        **_: Any,
    ) -> Any:
        """Call `receiver(signal=, sender=, **named)` from now on; also a decorator.

        With a `sender` only for that one. A second receiver of one `dispatch_uid` changes nothing.
        """
        if receiver is None or not callable(receiver):
            named = {"sender": sender or receiver, "weak": weak, "dispatch_uid": dispatch_uid}
            return functools.partial(self.connect, **named)
        key = dispatch_uid or _receiver_key(receiver), sender
        self.receivers = [entry for entry in self.receivers if entry[2]() is not None]
        if not any(known == key for known, _, _ in self.receivers):
            reference: Any = lambda: receiver  # noqa: E731
            if weak:
                is_method = hasattr(receiver, "__func__")
                reference = (weakref.WeakMethod if is_method else weakref.ref)(receiver)
            self.receivers = [*self.receivers, (key, sender, reference)]
        return receiver

    def disconnect(
        self, receiver: Any = None, sender: Any = None, weak: Any = None, dispatch_uid: Any = None
    ) -> bool:
        """Stop calling a receiver; return whether it was connected."""
        key = dispatch_uid or _receiver_key(receiver), sender
        before = len(self.receivers)
        self.receivers = [entry for entry in self.receivers if entry[0] != key]
        return len(self.receivers) < before

    def has_listeners(self, sender: Any = None) -> bool:
        """Return whether anybody would be called."""
        return any(wanted is None or wanted == sender for _, wanted, _ in self.receivers)

    def send(self, sender: Any = None, **named: Any) -> list[tuple[Any, Any]]:
        """Call every receiver; return (receiver, what it returned or raised) pairs."""
        responses = []
        for entry in self.receivers:
            _, wanted, reference = entry
            if wanted is not None and wanted not in (sender, getattr(sender, "name", None)):
                continue
            receiver = reference()
            if receiver is None:
                self.receivers = [other for other in self.receivers if other is not entry]
                continue
            try:
                responses.append((receiver, receiver(signal=self, sender=sender, **named)))
            except Exception as exc:
                logger.exception("Signal handler %r raised: %r", receiver, exc)
                responses.append((receiver, exc))
        return responses

    def __repr__(self) -> str:
        return f"<Signal: {self.name} providing_args={self.providing_args!r}>"


def _receiver_key(receiver: Any) -> Any:
    if hasattr(receiver, "__func__"):  # a method is a new object at each look
        return id(receiver.__self__), id(receiver.__func__)
    return id(receiver)


#: Loggers have Celery's names, so that a project's logging configuration works for both.
logger = logging.getLogger("celery")
task_logger = logging.getLogger("celery.task")
trace_logger = logging.getLogger("celery.app.trace")
worker_logger = logging.getLogger("celery.worker")
for _logger in (logger, task_logger):
    _logger.addHandler(logging.NullHandler())


before_task_publish = Signal(
    "before_task_publish", "body exchange routing_key headers properties declare retry_policy"
)
after_task_publish = Signal("after_task_publish", "body exchange routing_key headers")
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
worker_process_init = Signal("worker_process_init")
worker_process_shutdown = Signal("worker_process_shutdown", "pid exitcode")
setup_logging = Signal("setup_logging", "loglevel logfile format colorize")
after_setup_logger = Signal("after_setup_logger", "logger loglevel logfile format colorize")
after_setup_task_logger = Signal(
    "after_setup_task_logger", "logger loglevel logfile format colorize"
)


# ---------------------------------------------------------------------------------------------
# 6. Stores
# ---------------------------------------------------------------------------------------------
#
# Beside an SQLite file DB lies the run directory DB-run, with what is too quick for a database and
# ends with its process: an ID.bell and ID.fifo of each sleeper, an OWNER.journal of each worker.


class Bell:
    """Wakes one sleeper: a worker without work, or a thread that waits for a result.

    Its owner says with `listen` what it wants to hear of, sets `asleep`, looks in the store a last
    time, and waits. Others see the flag and the topics in a small mapped file, at no cost while
    nobody sleeps, and wake the owner by a byte into a FIFO beside it. Without a path it works
    within the process; `mine` is False for another process's bell, seen from here.
    """

    #: The flag's 8 bytes (0: awake; NAP; DEAF; or the kind of topic its owner sleeps for), then
    #: a Bloom filter of topics: 2 of its 32,768 bits for each.
    SIZE = 8 + 4096
    #: The owner wants to be woken only by those who know why: its own children, without work.
    NAP = 1
    #: It sleeps, and listens to no topic: a worker that is full leaves calls to others.
    DEAF = 2
    #: Seconds to look out for a ring before falling asleep: to be woken takes as long as a task.
    ALERT = 0.0004

    def __init__(self, path: str | None = None, mine: bool = True, polls: bool = False) -> None:
        self.path = path
        self.pid = os.getpid() if mine else 0
        #: Whether others cannot ring: `wait` then returns after 20 ms, for a look into the store.
        self.polls = polls
        self._fds: list[int] = []  # the first to read from, if it is ours; the last to write to
        #: Removes the files; happens by itself when nobody has the bell any more.
        self.close = weakref.finalize(self, _close_bell, path, self.pid, self._fds)
        if path is None:
            self._map: Any = bytearray(self.SIZE)
            self._fds += () if polls else os.pipe()
        else:
            if mine:
                os.mkfifo(path + ".fifo", 0o600)
                self._fds.append(os.open(path + ".fifo", os.O_RDWR | os.O_NONBLOCK))
            fd, self._map = _mapped(path + ".bell", self.SIZE if mine else 0)
            os.close(fd)
        self._flag = memoryview(self._map)[:8].cast("Q")

    @property
    def asleep(self) -> bool:
        """Whether the owner wants to be woken; a nap does not count."""
        return self._flag[0] > self.NAP

    @asleep.setter
    def asleep(self, value: bool) -> None:
        self._flag[0] = self._kind if value else 0

    _kind = DEAF
    _rung = False  # whether the last wait ended with a ring: then the next may soon come

    @property
    def awake(self) -> bool:
        """Whether the owner neither sleeps nor naps."""
        return not self._flag[0]

    def doze(self, hears: bool) -> None:
        """Sleep from now on; unless it `hears`, only the owner's own processes can wake it."""
        self._flag[0] = self._kind if hears else self.DEAF

    def listen(self, topics: Iterable[str]) -> None:
        """Hear of these topics, all of one kind (their first letter), and of no others."""
        topics = list(topics)
        self._kind = ord(topics[0][0])
        bits = bytearray(self.SIZE - 8)
        for bit in itertools.chain.from_iterable(map(_topic_bits, topics)):
            bits[bit >> 3] |= 1 << (bit & 7)
        self._map[8 : self.SIZE] = bytes(bits)

    def wants(self, kind: int, bits: tuple[int, int]) -> bool:
        """Return whether the owner sleeps and listens to the topic of this kind with these bits.

        The filter of a client that waits for thousands of results is full: without the kind it
        would take a worker's call.
        """
        return self._flag[0] == kind and all(self._map[8 + (n >> 3)] >> (n & 7) & 1 for n in bits)

    def ring(self) -> bool:
        """Wake the owner, also from a signal handler or a child of it; False if it is gone."""
        self._flag[0] = 0
        try:
            if not self._fds and self.path is not None:
                self._fds.append(os.open(self.path + ".fifo", os.O_WRONLY | os.O_NONBLOCK))
            if self._fds:
                os.write(self._fds[-1], b"\0")
        except BlockingIOError:  # full of rings already
            pass
        except OSError:  # nobody reads there any more
            return False
        return True

    def nap(self, timeout: float) -> bool:
        """Sleep as `wait` does, while others think that the owner is busy."""
        self._flag[0] = self.NAP
        return self.wait(timeout)

    def wait(self, timeout: float) -> bool:
        """Sleep until somebody rings, or for `timeout` seconds; return whether somebody did."""
        rung = False
        if self._rung and threading.active_count() == 1:  # others would want the interpreter
            until = time.perf_counter() + min(self.ALERT, timeout)
            while self._flag[0] and time.perf_counter() < until:
                _yield_cpu()
        timeout = max(0.0, min(timeout, 0.02) if self.polls else timeout)
        if not self._fds:
            time.sleep(timeout)
        elif _readable(self._fds[0], timeout):
            rung = bool(os.read(self._fds[0], 4096))
        elif timeout > 0.1 and self.path is not None and not os.path.exists(self.path + ".bell"):
            self.polls = True  # somebody has deleted it: only our own children can still ring
        self._flag[0] = 0
        self._rung = rung
        return rung


def _close_bell(path: str | None, pid: int, fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())
    if path is not None and pid == os.getpid():  # not in a child of the owner
        _unlink(path + ".bell")
        _unlink(path + ".fifo")
        with contextlib.suppress(OSError):  # there are others
            os.rmdir(os.path.dirname(path))


class Bells:
    """The bells of one store: opens those of this process, rings those of all."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._here: list[Bell] = []  # those without files
        self._spare: list[Bell] = []
        self._others: dict[str, Bell] = {}
        self._seen = -1  # the directory's time when `_others` was read

    def open(self) -> Bell:
        """Return a bell of this process."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        if self.folder is None and hasattr(os, "mkfifo"):
            self._here.append(Bell())
            return self._here[-1]
        for _ in range(3):  # others may remove an empty directory, or a FIFO that is not open yet
            with contextlib.suppress(OSError, AttributeError):  # or there may be no FIFOs
                os.makedirs(self.folder or "", 0o700, exist_ok=True)
                return Bell(os.path.join(self.folder or "", os.urandom(8).hex()))
        return Bell(polls=True)

    def close(self, bell: Bell) -> None:
        """Take back a bell of this process, for its next sleeper."""
        bell.asleep = False
        if bell.pid == os.getpid() and not bell.polls:
            self._spare.append(bell)

    def clear(self) -> None:
        """Give up the bells that nobody uses, and their files."""
        spare, self._spare = self._spare, []
        self._here = [bell for bell in self._here if bell not in spare]
        for bell in spare:
            bell.close()

    def ring(self, topics: Iterable[str], everyone: bool = False) -> None:
        """Wake for each topic the first sleeper who listens, or everyone who does."""
        bells = [*self._here, *self._scan()]
        for topic in topics if bells else ():
            kind, bits = ord(topic[0]), _topic_bits(topic)
            for bell in bells:
                if bell.wants(kind, bits) and bell.ring() and not everyone:
                    break

    def _scan(self) -> Iterable[Bell]:
        """Return the bells in the run directory, read anew if it has changed."""
        try:
            changed = os.stat(self.folder or "").st_mtime_ns
        except OSError:  # nobody has ever slept
            return ()
        if changed != self._seen:
            known, found = self._others, {}
            for path in _paths(self.folder, ".bell"):
                try:
                    found[path] = known.get(path) or Bell(path[:-5], mine=False)
                except (OSError, ValueError):  # gone, or being made
                    changed = -1
            self._others = found
            # A change within one tick of the file system's clock would go unseen.
            self._seen = changed if time.time_ns() - changed > 50_000_000 else -1
        return self._others.values()

    def sweep(self) -> None:
        """Remove the bells that nobody reads any more."""
        import errno

        for path in _paths(self.folder, ".fifo", ".bell"):
            try:
                os.close(os.open(path[:-5] + ".fifo", os.O_WRONLY | os.O_NONBLOCK))
            except OSError as exc:
                if exc.errno in (errno.ENXIO, errno.ENOENT):
                    _unlink(path)


def _yield_cpu() -> None:
    os.sched_yield() if hasattr(os, "sched_yield") else time.sleep(0)


def _topic_bits(topic: str) -> tuple[int, int]:
    crc = zlib.crc32(topic.encode("utf-8", "surrogatepass"))
    return crc & 0x7FFF, crc >> 15 & 0x7FFF


def _readable(fd: int, timeout: float) -> bool:
    """Wait until `fd` can be read; `poll` knows those above 1,024, eventlet has only select."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    return bool(select.select([fd], [], [], timeout)[0])


def _mapped(path: str, size: int) -> tuple[int, Any]:
    """Map a file, made anew, for its owner alone, if a size is given; return (descriptor, map)."""
    if size:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if size else 0), 0o600)
    try:
        if size:
            os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, 0)
    except BaseException:
        os.close(fd)
        raise


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _paths(folder: str | None, *suffixes: str) -> list[str]:
    """Return the files in a directory with one of these endings; none if it is not there."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder) if folder else ()
        return [os.path.join(folder or "", name) for name in names if name.endswith(suffixes)]
    return []


#: Flags beside the ticket of a task that has begun: what to do with it if its process dies.
#: DECODING, which is the second without the first: its message is still being read.
ACKS_LATE, REJECT_ON_LOST, DECODING = 1, 2, 2

_RECORD = struct.Struct("<QQ")  # ticket, bytes of the outcome that follows


class Slot:
    """The part of a Journal that one child process (or thread) writes: what it has begun, and a
    ring of the outcomes that the main process has not settled yet.

    Each step is made by one aligned 8-byte store, so whoever reads it after a crash sees the state
    before it or after it. An outcome that is too large has its own file, named in the ring.
    """

    HEAD = 64

    def __init__(self, index: int, view: memoryview, path: str | None) -> None:
        self.index = index
        self._path = path
        self._words = view[: self.HEAD].cast("Q")  # 0 begun, 4 written, 5 consumed, 6 executed
        self._times = view[: self.HEAD].cast("d")  # 1 begun at, 2 soft and 3 hard deadline
        self._ring = view[self.HEAD :]
        self._spilled: list[str] = []

    def clear(self) -> None:
        """Make the slot ready for a new process."""
        for word in range(len(self._words)):
            self._words[word] = 0

    def begin(self, ticket: int, flags: int, soft: float = 0.0, hard: float = 0.0) -> None:
        """Note that a task begins now; deadlines are by time.monotonic(), or 0."""
        self._times[1] = time.monotonic()  # one clock for all processes, which nobody sets
        self._times[2] = soft
        self._times[3] = hard
        self._words[0] = ticket << 2 | flags

    @property
    def has_room(self) -> bool:
        """Whether `finish` would not have to wait."""
        return self._words[4] - self._words[5] < len(self._ring) // 2 - _RECORD.size

    def finish(self, ticket: int, outcome: bytes, wake: Callable[[], Any]) -> None:
        """Note how a task ended; waits, waking the main process, while the ring is full."""
        size = len(self._ring)
        if len(outcome) > size // 2:
            outcome = self._spill(outcome)
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

    def _spill(self, outcome: bytes) -> bytes:
        import tempfile

        folder, name = os.path.split(self._path or os.path.join(tempfile.gettempdir(), "taskq"))
        os.makedirs(folder, 0o700, exist_ok=True)
        fd, path = tempfile.mkstemp(".outcome", name + ".", folder)
        with open(fd, "wb") as file:
            file.write(outcome)
        return json.dumps(path).encode()

    @property
    def begun(self) -> tuple[int, int]:
        """The ticket and flags of what runs; ticket 0 is nothing."""
        word = self._words[0]
        return word >> 2, word & 3

    @property
    def times(self) -> tuple[float, float, float]:
        """When the running task began, and its soft and hard deadline (0: none)."""
        return self._times[1], self._times[2], self._times[3]

    @property
    def executed(self) -> int:
        """How many tasks this process has finished."""
        return self._words[6]

    @property
    def fresh(self) -> bool:
        """Whether there are outcomes that `read` would return."""
        return self._words[4] != self._words[5]

    def read(self) -> tuple[list[tuple[int, Outcome]], int]:
        """Return the unsettled (ticket, outcome) pairs, and the position to `consume` when they
        are settled."""
        at, end = self._words[5], self._words[4]
        found = []
        while at < end:
            ticket, length = _RECORD.unpack(self._bytes(at, _RECORD.size))
            at += _RECORD.size + length
            value = json.loads(self._bytes(at - length, length))
            if isinstance(value, str):
                self._spilled.append(value)
                try:
                    with open(value, "rb") as file:
                        value = json.load(file)
                except FileNotFoundError:  # somebody has deleted it
                    value = _GIVE_BACK
            found.append((ticket, Outcome(*value)))
        return found, end

    def consume(self, position: int) -> None:
        """Forget the outcomes before `position`, up to which they were read: they are settled."""
        self._words[5] = position
        while self._spilled:
            _unlink(self._spilled.pop())

    def _bytes(self, at: int, length: int) -> bytes:
        at %= len(self._ring)
        head = bytes(self._ring[at : at + length])
        return head + bytes(self._ring[: length - len(head)])


class Journal:
    """A worker's memory-mapped record of what its processes have begun and finished.

    It survives SIGKILL, and costs no system call to write. The main process and each child hold a
    lock on one byte of it, which the kernel drops with the process: a journal that can be locked
    whole has no live owner left, and whoever locked it recovers its claims. Without a path it is
    for one process alone, whose store dies with it.
    """

    HEAD = 4096
    #: Those of this process: opening and closing one again would drop its locks.
    own: dict[str, int] = {}

    def __init__(self, path: str | None, info: dict[str, Any] | None = None) -> None:
        """Make and lock a journal for `info`, a dict of the worker's `node`, its number of `slots`
        and each one's bytes of `ring`; or open one of another process, ValueError if it is none."""
        self.path = path
        self._fd, self._copy = -1, None
        if info is None:
            self._fd, self.map = _mapped(path or "", 0)
            head = self.map[: self.HEAD].partition(b"\n")[0]
            if not head.startswith(b"{"):
                self.close()
                raise ValueError(f"{path} is no journal")
            info = json.loads(head)
        else:
            size = self.HEAD + info["slots"] * (Slot.HEAD + info["ring"])
            if path is None:
                self.map = mmap.mmap(-1, size)
            else:
                self.own[path] = os.getpid()
                self._fd, self.map = _mapped(path, size)
                self.lock(-1)
            info["pid"] = os.getpid()
            head = json.dumps(info).encode() + b"\n"
            self.map[: len(head)] = head  # last: before it, nobody takes this for a dead worker's
        self.info = info
        size = Slot.HEAD + info["ring"]
        starts = range(self.HEAD, len(self.map), size)
        views = (memoryview(self.map)[start : start + size] for start in starts)
        self.slots = [Slot(index, view, path) for index, view in enumerate(views)]

    @classmethod
    def others(cls, folder: str | None) -> Iterator[Journal]:
        """Open each journal of other processes in a run directory, and close it again."""
        for path in _paths(folder, ".journal"):
            with contextlib.suppress(OSError):
                age = time.time() - os.stat(path).st_mtime
                if cls.own.get(path) != os.getpid():
                    try:
                        with contextlib.closing(cls(path)) as journal:
                            yield journal
                    except ValueError:  # being made, or whoever made it was killed
                        if age > 60:
                            _unlink(path)

    @property
    def owner(self) -> int:
        """The number under which the worker claims messages."""
        return int(os.path.basename(self.path or "0").split(".")[0], 16)

    def lock(self, index: int) -> None:
        """Lock this process's byte: that of child `index`, or -1 for the main process."""
        if self.path is not None:
            self.own[self.path] = os.getpid()
            if fcntl:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index + 1)

    def lock_whole(self) -> bool:
        """Try to become the one who recovers a dead worker's claims."""
        if fcntl is None:  # no locks: see `touch`
            return time.time() - os.stat(self.path or "").st_mtime > 15
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def touch(self) -> None:
        """Show others that the worker lives; it calls this every second.

        If somebody has deleted the file, it is made anew, so that others leave the worker's claims
        alone. The processes still write to the old one; from then on this is a copy of it.
        """
        if self.path is not None and not os.path.exists(self.path):
            self._fd, self._copy = _mapped(self.path, len(self.map))
            self.lock(-1)
        if self._copy is not None:
            self._copy[:] = self.map[:]
        if self.path is not None and fcntl is None:
            os.utime(self.path)

    def ends(self) -> dict[int, Any]:
        """Return {ticket: its Outcome, or the flags of a task that has begun}."""
        found: dict[int, Any] = dict(slot.begun for slot in self.slots)
        for slot in self.slots:
            found.update(slot.read()[0])
        return found

    def close(self, remove: bool = False) -> None:
        """Let go of the journal, and with `remove` delete its files."""
        path, self._fd, fd = self.path, -1, self._fd
        if remove and path is not None:
            for other in (*_paths(os.path.dirname(path), ".outcome"), path):
                if other.startswith(path):
                    _unlink(other)
        if fd >= 0:
            os.close(fd)
            self.own.pop(path or "", None)


class Claim(collections.namedtuple("Claim", "key ticket queue priority raw")):
    """A message that a worker holds: `key` is the store's, `ticket` the worker's number for it."""

    @functools.cached_property
    def message(self) -> Message:
        """The message, parsed when first asked for; MalformedMessage if it is none."""
        return Message.decode(self.raw)


#: What becomes of a claim that has not begun.
_GIVE_BACK = Outcome("requeue", [], [], None, 0.0)

if TYPE_CHECKING:
    Settled = Sequence[tuple[Claim, Outcome]]
    #: Makes the outcome of a task whose process died, from its claim and the flags of its slot.
    Lost = Callable[[Claim, int], Outcome]


class StaleClaim(Exception):
    """Claims that a worker wanted to settle are no longer its own; nothing was settled."""


class Store:
    """What a broker that also keeps results must do. Nothing above knows SQL, nothing below tasks.

    A message is in a queue, or claimed by one owner (a worker's number), or gone. `settle` is
    atomic: results, follow-up messages and acknowledgements of a batch are all there afterwards, or
    none. Every method raises OperationalError where the store cannot be reached.
    """

    #: The run directory; None if the store lives in one process alone.
    folder: str | None = None
    bells: Bells
    #: Seconds that results are kept, by default and for failures; None is for ever.
    result_expires: float | None = 86400
    failure_expires: float | None = None

    def uri(self) -> str:
        """Return the address as the banner prints it."""
        raise NotImplementedError

    def publish(self, deliveries: Sequence[Any]) -> None:
        """Put messages into their queues, all or none, and wake workers."""

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Return whether there is something to claim, and when the next message with an ETA is due
        (seconds since the epoch, or None); cheap, and takes no lock."""
        raise NotImplementedError

    def settle(
        self, owner: int, settled: Settled, queues: Sequence[str] = (), limit: int = 0
    ) -> list[Claim]:
        """Apply the outcomes of claims, then claim up to `limit` messages from `queues`.

        Each queue has its turn; within them the smallest priority number and the oldest come first.
        StaleClaim, and nothing is applied, if one of the claims is not this owner's any more.
        """
        raise NotImplementedError

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any] | None = None) -> int:
        """Settle what dead workers had claimed, by `settle` if given; return how much it was."""
        raise NotImplementedError

    def put_results(self, results: Sequence[Sequence[Any]]) -> None:
        """Store [task id, state, meta text] triples, and wake who waits for them."""

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Return {id: (state, meta text)} for those ids that have a result."""
        raise NotImplementedError

    def forget(self, ids: Sequence[str]) -> None:
        """Delete results."""

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Remember that `exchange` brings messages with `routing_key` to `queue`."""

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        """Return the (kind, routing key, queue) bindings of an exchange."""
        raise NotImplementedError

    def purge(self, queue: str) -> int:
        """Delete the messages that wait in a queue, due or not; return how many."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Remove expired results and dead processes' files; called now and then."""

    def close(self) -> None:
        """Let go of this thread's connection, and of files that are not in use."""

    def wait(
        self,
        ids: Sequence[str],
        timeout: float | None,
        interval: float = 0.5,
        on_interval: Any = None,
    ) -> Iterator[dict[str, tuple[str, str]]]:
        """Yield {id: (state, meta text)} of ids that have their end, as they come, until all have.

        Raises TimeoutError when `timeout` seconds have passed; calls `on_interval` every `interval`
        seconds. It looks for the first 200 that are missing: for all, n results take n² looks.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        missing = dict.fromkeys(ids)
        bell = None
        try:
            while missing:
                if bell is not None:
                    bell.asleep = True
                window = self.get_results(list(itertools.islice(missing, 200)))
                found = {id: pair for id, pair in window.items() if pair[0] in READY_STATES}
                for id in found:
                    del missing[id]
                if found:
                    yield found
                elif bell is None:  # only now: most results of a long wait are there already
                    bell = self.bells.open()
                    bell.listen(f"r:{id}" for id in missing)
                elif time.monotonic() >= deadline:
                    raise TimeoutError("The operation timed out.")
                else:
                    bell.wait(min(deadline - time.monotonic(), interval))
                    if on_interval is not None:
                        on_interval()
        finally:
            if bell is not None:
                self.bells.close(bell)


#: "taskq" in the header of a database, so that no other program's file is taken for one.
_APPLICATION_ID = 0x7461736B
_SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    due REAL,         -- seconds since the epoch; NULL: now
    owner INTEGER,    -- the worker that has claimed it
    ticket INTEGER,   -- that worker's number for it
    message TEXT NOT NULL
);
CREATE INDEX messages_ready ON messages (queue, priority, id) WHERE owner IS NULL AND due IS NULL;
CREATE INDEX messages_due ON messages (due) WHERE due IS NOT NULL;
CREATE INDEX messages_claimed ON messages (owner) WHERE owner IS NOT NULL;
CREATE TABLE results (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, meta TEXT NOT NULL, expires REAL
) WITHOUT ROWID;
CREATE INDEX results_expires ON results (expires) WHERE expires IS NOT NULL;
CREATE TABLE rejected (
    id INTEGER PRIMARY KEY, queue TEXT NOT NULL, rejected_at REAL NOT NULL, reason TEXT NOT NULL,
    message TEXT NOT NULL
);
CREATE TABLE bindings (
    exchange TEXT, kind TEXT, routing_key TEXT, queue TEXT,
    PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_SCHEMA_VERSION}"""

_INSERT = "INSERT INTO messages (queue, priority, due, message) VALUES (?, ?, ?, ?)"
_READY = (
    "SELECT id, priority, message FROM messages WHERE owner IS NULL AND due IS NULL"
    " AND queue = ? ORDER BY priority, id LIMIT ?"
)
_PROMOTE = (
    "UPDATE messages SET due = NULL WHERE id IN"
    " (SELECT id FROM messages WHERE due <= ? ORDER BY due LIMIT 1000)"
)
_MARK = "UPDATE messages SET owner = ?, ticket = ? WHERE id = ?"
_DELETE = "DELETE FROM messages WHERE id = ? AND owner = ?"
_REQUEUE = (  # the cast makes text of bytes, whatever they are
    "UPDATE messages SET owner = NULL, ticket = NULL, message = CAST(? AS TEXT)"
    " WHERE id = ? AND owner = ?"
)
_REJECT = (
    "INSERT INTO rejected (queue, rejected_at, reason, message) VALUES (?, ?, ?, CAST(? AS TEXT))"
)
_RESULT = "INSERT OR REPLACE INTO results (id, state, meta, expires) VALUES (?, ?, ?, ?)"


class _Session:
    """A thread's connection to SQLite, opened when it is first needed, also after a fork.

    `with session as connection:` ends the transaction that was begun in it, and turns SQLite's
    errors into OperationalError (ValueError for a value that is too large).
    """

    def __init__(self, path: str | None, connect: Callable[[], sqlite3.Connection]) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._connect = connect
        self._open: list[sqlite3.Connection] = []  # one, or none
        #: Also called at the end of the thread and of the process.
        self.close = weakref.finalize(self, _close_all, self._open)
        if path is not None:
            _sessions.add(self)

    def __enter__(self) -> sqlite3.Connection:
        self.lock.acquire()
        if not self._open:
            try:
                with _opening:
                    self._open.append(self._connect())
            except BaseException:
                self.lock.release()
                raise
        return self._open[0]

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
            self.lock.release()
        if isinstance(exc, sqlite3.DataError):
            raise ValueError(f"database {self.path}: {exc}") from None
        if isinstance(exc, sqlite3.Error):
            raise OperationalError(f"database {self.path}: {exc}") from None


def _close_all(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


#: All sessions with a file, and what a thread holds while it opens a connection or makes the file.
_sessions: weakref.WeakSet[_Session] = weakref.WeakSet()
_opening = threading.RLock()
_held: list[_Session] = []


def _before_fork() -> None:
    """Close every connection: SQLite counts its locks by process, and a child that inherited one
    would believe that it has its parent's locks."""
    for store in list(_stores.values()):
        store.bells.clear()
    for _ in range(2):  # the second time for one that was being opened
        for session in set(_sessions) - set(_held):
            session.lock.acquire()
            _held.append(session)
        _opening.acquire()
    for session in _held:
        _close_all(session._open)


def _after_fork() -> None:
    for _ in range(2):
        _opening.release()
    while _held:
        _held.pop().lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )


class SQLiteStore(Store):
    """A store in one SQLite file, in WAL mode, or in memory where the path is None.

    Every write is one BEGIN IMMEDIATE transaction. A message with an ETA has a `due` time until it
    is due; what can be claimed is then a range of one partial index, however many rows there are.
    Never open the file by other means in a process with connections to it: closing any descriptor
    of it drops the locks that SQLite holds for the whole process.
    """

    #: Options of the address: (pattern, what it may be).
    OPTIONS = {
        "timeout": (r"\d+(\.\d*)?", "seconds"),
        "synchronous": ("off|normal|full|extra", "off, normal, full or extra"),
    }
    #: For so many seconds, claims without a journal are left to an owner that may make it anew.
    GRACE = 3.0

    def __init__(self, path: str | None, options: dict[str, Any]) -> None:
        self.path = path
        self.folder = path and path + "-run"
        self.bells = Bells(self.folder)
        for name, value in options.items():
            pattern, expected = self.OPTIONS.get(name, ("", _names(self.OPTIONS)))
            if not pattern:
                what = f"unknown option {name!r} of sqlite://"
            elif not re.fullmatch(pattern, str(value).lower()):
                what = f"option {name!r} of sqlite:// is {value!r}"
            else:
                continue
            raise ImproperlyConfigured(f"{what}: expected {expected}")
        self._options = {"timeout": 30, "synchronous": "normal", **options}
        self._turn = 0
        self._tickets = itertools.count(1)
        self._orphans: dict[int, float] = {}  # owners without a journal, and when that was seen
        # Each thread has a session; in memory they share one.
        self._local: Any = threading.local()
        if path is None:
            self._local = types.SimpleNamespace(session=_Session(None, self._connect))

    def uri(self) -> str:
        """Return the address with an absolute path."""
        return "memory://" if self.path is None else "sqlite:///" + self.path

    # -- connections ---------------------------------------------------------------------------

    def _session(self) -> _Session:
        """Return this thread's session."""
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = _Session(self.path, self._connect)
        return session

    def _connect(self) -> sqlite3.Connection:
        path, timeout = self.path, float(self._options["timeout"])
        if path and os.path.isdir(path):
            raise OperationalError(f"{path} is a directory: expected an SQLite file")
        until = time.monotonic() + timeout
        connection: Any = None
        try:
            if path:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            connection = sqlite3.connect(
                path or ":memory:", timeout=timeout, isolation_level=None, check_same_thread=False
            )
            connection.text_factory = bytes  # messages travel undecoded, whatever is in them
            while True:
                try:
                    self._prepare(connection.execute)
                    return connection
                except sqlite3.OperationalError as exc:
                    # SQLite itself does not wait while another process turns a new file to WAL.
                    if "locked" not in str(exc) or time.monotonic() > until:
                        raise
                    time.sleep(0.01)
        except (OSError, sqlite3.Error, OperationalError) as exc:
            if connection is not None:
                connection.close()
            if isinstance(exc, OperationalError):
                raise
            rights = "; taskq needs to write the file and its directory"
            raise OperationalError(
                f"cannot open the database {path}: {getattr(exc, 'strerror', None) or exc}"
                f"{rights if isinstance(exc, (OSError, sqlite3.OperationalError)) else ''}"
            ) from None

    def _prepare(self, execute: Any) -> None:
        made = self._has_schema(execute)
        execute("PRAGMA journal_mode=WAL")
        # A checkpoint waits for the disk, so most are left to `sweep`. In pages: 40 MB.
        execute("PRAGMA wal_autocheckpoint=10000")
        execute(f"PRAGMA synchronous={self._options['synchronous']}")
        if not made:
            execute("BEGIN IMMEDIATE")
            if not self._has_schema(execute):  # another process may have been faster
                for statement in _SCHEMA.split(";\n"):
                    execute(statement)
            execute("COMMIT")

    def _has_schema(self, execute: Any) -> bool:
        """Return whether the tables are there; OperationalError in another program's file."""
        version = execute("PRAGMA user_version").fetchone()[0]
        if execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
            if version != _SCHEMA_VERSION:
                raise OperationalError(
                    f"{self.path} has schema version {version}, this taskq ({__version__}) works "
                    f"with {_SCHEMA_VERSION}: use one version of taskq on a file"
                )
            return True
        if version or execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise OperationalError(
                f"{self.path} is the database of another program: give taskq a file of its own"
            )
        return False

    def _execute(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of one statement, which is its own transaction."""
        with self._session() as connection:
            return connection.execute(sql, arguments).fetchall()

    def _write(self, rows: dict[str, Any]) -> int:
        """Run {statement: rows} in one transaction; return how many rows it has changed."""
        with self._session() as connection:
            connection.execute("BEGIN IMMEDIATE")
            return sum(connection.executemany(sql, some).rowcount for sql, some in rows.items())

    # -- messages ------------------------------------------------------------------------------

    def publish(self, deliveries: Sequence[Any]) -> None:
        """Insert rows, then ring a worker for each queue."""
        if len(deliveries) == 1:
            self._execute(_INSERT, deliveries[0])
        else:
            self._write({_INSERT: deliveries})
        self.bells.ring({"q:" + delivery[0] for delivery in deliveries})

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Probe the index of each queue, and that of due times, with one query."""
        marks = ",".join("?" * len(queues))
        waiting = (
            f"SELECT 1 FROM messages WHERE owner IS NULL AND due IS NULL AND queue IN ({marks})"
        )
        due = "SELECT min(due) FROM messages WHERE due IS NOT NULL"
        ready, next_due = self._execute(f"SELECT EXISTS ({waiting}), ({due})", queues)[0]
        return bool(ready) or next_due is not None and next_due <= time.time(), next_due

    def settle(
        self, owner: int, settled: Settled, queues: Sequence[str] = (), limit: int = 0
    ) -> list[Claim]:
        """Settle and claim in one transaction, then ring whoever waits for what it brought."""
        claims: list[Claim] = []
        with self._session() as connection:
            connection.execute("BEGIN IMMEDIATE")
            for sql, rows in self._changes(owner, settled).items():
                if rows and connection.executemany(sql, rows).rowcount < len(rows):
                    raise StaleClaim(f"another worker has taken over claims of {owner:x}")
            if limit:
                connection.execute(_PROMOTE, (time.time(),))
                for queue, (key, priority, raw) in self._ready(connection, queues, limit):
                    claims.append(Claim(key, next(self._tickets), queue, priority, raw))
                marks = [(owner, claim.ticket, claim.key) for claim in claims]
                connection.executemany(_MARK, marks)
        ended = {"r:" + result[0] for _, outcome in settled for result in outcome.results}
        given = {"q:" + delivery[0] for _, outcome in settled for delivery in outcome.publish}
        given.update("q:" + claim.queue for claim, outcome in settled if outcome.verb == "requeue")
        if limit and len(claims) == limit:  # there may be more than this worker takes
            given.update("q:" + queue for queue in queues)
        if ended:
            self.bells.ring(ended, everyone=True)
        if given:
            self.bells.ring(given)
        return claims

    def _changes(self, owner: int, settled: Settled) -> dict[str, list[Any]]:
        """Return {statement: rows} for the outcomes of claims."""
        changes: dict[str, list[Any]] = {
            sql: [] for sql in (_DELETE, _REQUEUE, _RESULT, _INSERT, _REJECT)
        }
        for claim, outcome in settled:
            if outcome.verb == "requeue":
                changes[_REQUEUE].append((outcome.reason or claim.raw, claim.key, owner))
            else:
                changes[_DELETE].append((claim.key, owner))
            if outcome.verb == "reject":
                reason = str(outcome.reason).encode("utf-8", "backslashreplace").decode()
                changes[_REJECT].append((claim.queue, time.time(), reason, claim.raw))
            changes[_RESULT] += map(self._result_row, outcome.results)
            changes[_INSERT] += outcome.publish
        return changes

    def _ready(self, connection: sqlite3.Connection, queues: Sequence[str], limit: int) -> Any:
        """Return (queue, row) pairs: from each queue in turn while it has any, by priority."""
        self._turn += 1
        start = self._turn % len(queues)
        cursors = (
            zip(itertools.repeat(queue), connection.execute(_READY, (queue, limit)))
            for queue in (*queues[start:], *queues[:start])
        )
        turns = itertools.chain.from_iterable(itertools.zip_longest(*cursors))
        pairs = list(itertools.islice(filter(None, turns), limit))
        return pairs if len(queues) == 1 else sorted(pairs, key=lambda pair: pair[1][1])

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any] | None = None) -> int:
        """Find journals that no process holds any more, and claims that have long had none."""
        if self.folder is None:
            return 0
        rows = self._execute("SELECT DISTINCT owner FROM messages WHERE owner IS NOT NULL")
        names, now = set(map(os.path.basename, _paths(self.folder, ".journal"))), time.monotonic()
        orphans = [owner for (owner,) in rows if f"{owner:x}.journal" not in names]
        self._orphans = {owner: self._orphans.get(owner, now) for owner in orphans}
        count = 0
        for journal in Journal.others(self.folder):
            if journal.lock_whole():
                count += self._recover(journal.owner, journal.ends(), lost, settle or self.settle)
                journal.close(remove=True)
                self.bells.sweep()
        for owner, since in self._orphans.items():
            if now - since > self.GRACE:
                count += self._recover(owner, {}, lost, settle or self.settle)
        return count

    def _recover(self, owner: int, ends: dict[int, Any], lost: Any, settle: Any) -> int:
        sql = "SELECT id, ticket, queue, priority, message FROM messages WHERE owner = ?"
        settled = []
        for key, ticket, queue, priority, raw in self._execute(sql, (owner,)):
            claim = Claim(key, ticket, queue.decode(), priority, raw)
            end = ends.get(ticket, _GIVE_BACK)
            settled.append((claim, lost(claim, end) if isinstance(end, int) else end))
        try:
            if settled:
                settle(owner, settled)
        except StaleClaim:  # another worker is recovering the same claims
            return 0
        return len(settled)

    def purge(self, queue: str) -> int:
        """Delete the queue's rows that nobody has claimed."""
        return self._write({"DELETE FROM messages WHERE queue = ? AND owner IS NULL": [(queue,)]})

    # -- results -------------------------------------------------------------------------------

    def _result_row(self, result: Sequence[Any]) -> tuple[Any, ...]:
        id, state, meta = result
        kept = self.result_expires
        if state == FAILURE and self.failure_expires is not None:
            kept = self.failure_expires
        return id, state, meta, time.time() + kept if kept else None

    def put_results(self, results: Sequence[Sequence[Any]]) -> None:
        """Insert rows in one transaction, then ring everyone who waits for one."""
        self._write({_RESULT: [self._result_row(result) for result in results]})
        self.bells.ring({"r:" + id for id, state, _ in results if state in READY_STATES}, True)

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Read some hundreds of rows with one query."""
        found = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            marks = ",".join("?" * len(some))
            sql = f"SELECT id, state, meta FROM results WHERE id IN ({marks})"
            sql += " AND (expires IS NULL OR expires > ?)"
            for id, state, meta in self._execute(sql, (*some, time.time())):
                found[id.decode()] = state.decode(), meta.decode()
        return found

    def forget(self, ids: Sequence[str]) -> None:
        """Delete rows in one transaction."""
        self._write({"DELETE FROM results WHERE id = ?": [(id,) for id in ids]})

    # -- bindings and housekeeping ---------------------------------------------------------------

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Add a row, unless it is there."""
        if (kind, routing_key, queue) not in self.bindings(exchange):
            row = (exchange, kind, routing_key, queue)
            self._execute("INSERT OR REPLACE INTO bindings VALUES (?, ?, ?, ?)", row)

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        """Read the rows of an exchange."""
        sql = "SELECT kind, routing_key, queue FROM bindings WHERE exchange = ?"
        rows = self._execute(sql, (exchange,))
        return [(kind.decode(), key.decode(), queue.decode()) for kind, key, queue in rows]

    def sweep(self) -> None:
        """Delete 500 expired results at a time, so that no transaction is long; checkpoint."""
        expired = "SELECT id FROM results WHERE expires < ? LIMIT 500"
        while self._write({f"DELETE FROM results WHERE id IN ({expired})": [(time.time(),)]}):
            pass
        self._execute("PRAGMA wal_checkpoint(PASSIVE)")
        self.bells.sweep()

    def close(self) -> None:
        """Close this thread's connection and the bells that nobody uses."""
        self.bells.clear()
        session = getattr(self._local, "session", None)
        if self.path is not None and session is not None:
            _close_all(session._open)


_stores: dict[tuple[str, str], Store] = {}


def open_store(url: str, options: dict[str, Any]) -> Store:
    """Return the store at an address; apps of one process share it.

    sqlite:///relative.db, sqlite:////absolute.db and memory:// are known; any other scheme is an
    ImproperlyConfigured. Options come from `options` and from the URL's query.
    """
    scheme, separator, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    if query:
        from urllib.parse import parse_qsl

        options = {**options, **dict(parse_qsl(query, keep_blank_values=True))}
    key = (url, _json_encode(options))
    if key not in _stores:
        if not separator or scheme not in ("sqlite", "memory"):
            why = f"taskq has no {scheme!r}; use sqlite:// (a file) or redis://"
            if scheme == "redis":
                why = "this version of taskq has sqlite:// but not yet redis://"
            raise ImproperlyConfigured(f"{_mask_url(url)!r}: {why}")
        if scheme == "sqlite" and not rest.startswith("/"):
            why = "write sqlite:///relative.db or sqlite:////absolute/path.db"
            raise ImproperlyConfigured(f"{url!r}: {why}")
        # The real path: two names of one file must not make two run directories.
        path = os.path.realpath(rest[1:]) if scheme == "sqlite" and len(rest) > 1 else None
        _stores[key] = SQLiteStore(path, options)
    return _stores[key]


# ---------------------------------------------------------------------------------------------
# 7. Results
# ---------------------------------------------------------------------------------------------


class _Threads(threading.local):
    """What each thread is doing: the tasks it runs, innermost last, and whether it may wait."""

    def __init__(self) -> None:
        self.stack: list[tuple[Any, Any]] = []  # (task, request)
        self.may_join = True


_thread = _Threads()


@contextlib.contextmanager
def allow_join_result(allowed: bool = True) -> Iterator[None]:
    """Let a task wait for other tasks: `with allow_join_result(): result.get()`.

    The processes that wait are missing where the others should run: mind deadlocks.
    """
    before, _thread.may_join = _thread.may_join, allowed
    try:
        yield
    finally:
        _thread.may_join = before


def denied_join_result() -> Any:
    """Forbid this thread to wait for results, as in tasks."""
    return allow_join_result(False)


def assert_will_not_block() -> None:
    """Raise RuntimeError inside a task, where waiting for another may wait for ever."""
    if not _thread.may_join:
        raise RuntimeError(
            "Never call result.get() within a task!\n"
            "See README, 'Calling': another process may be missing, or use allow_join_result()."
        )


def _encode_meta(app: Any, meta: dict[str, Any]) -> str:
    """Return a result's meta as text: JSON, or base64 of a pickle where that is the serializer."""
    serializer = app.conf.result_serializer
    if serializer == "json":
        try:
            return _json_encode(meta)
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(str(exc)) from exc
    return serialize(meta, serializer)[2]


def _decode_meta(app: Any, text: str) -> dict[str, Any]:
    """Return the meta that `_encode_meta` wrote; its result is an exception where it failed."""
    accept = app.conf.result_accept_content or app.conf.accept_content
    kind = CONTENT_TYPES["json" if text.startswith("{") else "pickle"]
    meta = deserialize(text, kind, {*accept, "json"})
    if meta["status"] in EXCEPTION_STATES and meta["result"] is not None:
        meta["result"] = decode_exception(meta["result"])
    return meta


def _of_meta(key: str, doc: str) -> Any:
    return property(lambda result: result._meta().get(key), doc=doc)


class AsyncResult:
    """The result of a task, there or still to come: `add.delay(2, 2)` returns one.

    Can be made from an id alone, in any process that has the app: `AsyncResult(id, app=app).get()`.
    """

    TimeoutError = TimeoutError

    def __init__(
        self,
        id: str,
        backend: Any = None,
        task_name: str | None = None,
        app: Any = None,
        parent: Any = None,
    ) -> None:
        if id is None:
            raise ValueError(f"AsyncResult requires valid id, not {type(id)}")
        self.id = id
        self.app = app or current_app._get_current_object()
        self._backend = backend
        self.parent = parent
        #: Whether the task was sent with `ignore_result`.
        self.ignored = False
        self._cache: dict[str, Any] | None = None

    @property
    def backend(self) -> Store:
        """The store that keeps the result."""
        return self._backend or self.app.backend

    @property
    def task_id(self) -> str:
        """The id, by its other name."""
        return self.id

    def _meta(self) -> dict[str, Any]:
        """Return the task's meta, from memory once it has its end."""
        if self._cache is not None:
            return self._cache
        pair = self.backend.get_results([self.id]).get(self.id)
        if pair is None:
            return {"status": PENDING, "result": None}
        return self._keep(pair)

    def _keep(self, pair: tuple[str, str]) -> dict[str, Any]:
        meta = _decode_meta(self.app, pair[1])
        if meta["status"] in READY_STATES:
            self._cache = meta
        return meta

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Callable[[str, Any], Any] | None = None,
        on_message: Any = None,
        on_interval: Callable[[], Any] | None = None,
        disable_sync_subtasks: bool = True,
    ) -> Any:
        """Wait until the task has its end and return its result.

        timeout: seconds after which TimeoutError is raised; None waits for ever.
        propagate: raise the task's error; otherwise it is returned.
        on_interval: called every `interval` seconds while waiting.
        callback: called with the id and the result.
        disable_sync_subtasks: raise RuntimeError inside a task.
        """
        if self.ignored:
            raise NotImplementedError(
                f"task {self.id} keeps no result: it was sent with ignore_result=True"
            )
        if disable_sync_subtasks:
            assert_will_not_block()
        if self._cache is None:
            for found in self.backend.wait([self.id], timeout, interval, on_interval):
                self._keep(found[self.id])
        return self.maybe_throw(propagate, callback)

    wait = get

    def maybe_throw(
        self, propagate: bool = True, callback: Callable[[str, Any], Any] | None = None
    ) -> Any:
        """Return the result, or raise the error of a task that failed."""
        meta = self._meta()
        value = meta["result"]
        if propagate and meta["status"] in PROPAGATE_STATES:
            if meta.get("traceback") and value.__cause__ is None:
                value.__cause__ = RemoteTraceback(meta["traceback"])
            raise value
        if callback is not None:
            callback(self.id, value)
        return value

    maybe_reraise = maybe_throw

    @property
    def state(self) -> str:
        """PENDING, STARTED, RETRY, FAILURE, SUCCESS, REVOKED, or a state of the task's own."""
        return self._meta()["status"]

    status = state

    @property
    def result(self) -> Any:
        """The return value, the exception of a task that failed, or the meta of `update_state`."""
        return self._meta()["result"]

    info = result

    traceback = _of_meta("traceback", "The traceback of a task that failed, as text.")
    children = _of_meta("children", "The results of the tasks that this one called.")

    @property
    def date_done(self) -> datetime | None:
        """When the task had its end, in UTC."""
        value = self._meta().get("date_done")
        return _parse_time(value) if isinstance(value, str) else value

    name = _of_meta("name", "The task's name; this and the next five need `result_extended`.")
    args = _of_meta("args", "Its positional arguments.")
    kwargs = _of_meta("kwargs", "Its keyword arguments.")
    worker = _of_meta("worker", "The node that ran it.")
    retries = _of_meta("retries", "How often it was retried.")
    queue = _of_meta("queue", "The queue it came from.")

    def ready(self) -> bool:
        """Return whether the task has its end."""
        return self.state in READY_STATES

    def successful(self) -> bool:
        """Return whether it ended well."""
        return self.state == SUCCESS

    def failed(self) -> bool:
        """Return whether it failed."""
        return self.state == FAILURE

    def exists(self) -> bool:
        """Return whether the store knows anything of this id."""
        return self._cache is not None or bool(self.backend.get_results([self.id]))

    def forget(self) -> None:
        """Delete the result from the store."""
        self._cache = None
        self.backend.forget([self.id])

    def revoke(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available in this version."""
        raise _unavailable("AsyncResult.revoke")

    def as_tuple(self) -> tuple[Any, None]:
        """Return the result as a nested tuple that JSON can hold."""
        return (self.id, self.parent and self.parent.as_tuple()), None

    def as_list(self) -> list[str]:
        """Return this id and those of its parents."""
        return [self.id, *(self.parent.as_list() if self.parent else ())]

    def __str__(self) -> str:
        return str(self.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, AsyncResult):
            return other.id == self.id
        return other == self.id if isinstance(other, str) else NotImplemented

    def __copy__(self) -> AsyncResult:
        return type(self)(self.id, self._backend, None, self.app, self.parent)

    def __reduce__(self) -> Any:
        return type(self), (self.id, None, None, None, self.parent)


class EagerResult(AsyncResult):
    """The result of a task that `apply` has run here."""

    def __init__(
        self,
        id: str,
        ret_value: Any,
        state: str,
        traceback: str | None = None,
        name: str | None = None,
        app: Any = None,
    ) -> None:
        super().__init__(id, app=app)
        self._cache = {
            "status": state,
            "result": ret_value,
            "traceback": traceback,
            "name": name,
            "children": None,
        }

    def ready(self) -> bool:
        """Return True."""
        return True

    def forget(self) -> None:
        """Do nothing: no store has it."""

    def __reduce__(self) -> Any:
        meta = self._meta()
        return type(self), (self.id, meta["result"], meta["status"], meta["traceback"])


def _unavailable(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} is not available in taskq {__version__}")


# ---------------------------------------------------------------------------------------------
# 8. Canvas
# ---------------------------------------------------------------------------------------------


class _Unavailable:
    """Stands for a name of Celery's that this version of taskq does not have yet."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _unavailable(self._name)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unavailable(f"{self._name}.{name}")

    def __repr__(self) -> str:
        return f"<{self._name}: not available in taskq {__version__}>"


chain = _Unavailable("chain")
chord = _Unavailable("chord")
chunks = _Unavailable("chunks")
group = _Unavailable("group")
maybe_signature = _Unavailable("maybe_signature")
signature = _Unavailable("signature")
subtask = _Unavailable("subtask")
xmap = _Unavailable("xmap")
xstarmap = _Unavailable("xstarmap")
Signature = _Unavailable("Signature")
GroupResult = _Unavailable("GroupResult")
ResultSet = _Unavailable("ResultSet")
result_from_tuple = _Unavailable("result_from_tuple")
crontab = _Unavailable("crontab")
schedule = _Unavailable("schedule")
solar = _Unavailable("solar")


# ---------------------------------------------------------------------------------------------
# 9. Task and app
# ---------------------------------------------------------------------------------------------


class Exchange:
    """Where messages are sent that find their queues by routing key.

    type: 'direct' (the key must be equal), 'topic' (`*` is one word, `#` any number of them), or
    'fanout' (every bound queue).
    """

    def __init__(self, name: str = "", type: str = "direct", **_: Any) -> None:
        if type not in ("direct", "topic", "fanout"):
            raise ImproperlyConfigured(
                f"exchange {name!r} has type {type!r}: expected 'direct', 'topic' or 'fanout'"
            )
        self.name = name
        self.type = type

    def __repr__(self) -> str:
        return f"Exchange {self.name}({self.type})"

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Exchange) and (other.name, other.type) == (self.name, self.type)

    def __hash__(self) -> int:
        return hash(self.name)


class Queue:
    """A queue: `Queue('images', Exchange('media', type='topic'), routing_key='media.image.#')`."""

    def __init__(
        self, name: str = "", exchange: Any = None, routing_key: str = "", **options: Any
    ) -> None:
        if isinstance(exchange, str):
            exchange = Exchange(exchange, options.get("exchange_type") or "direct")
        self.name = name
        self.exchange = exchange
        self.routing_key = routing_key

    def __repr__(self) -> str:
        return f"<Queue {self.name} -> {self.exchange!r} -> {self.routing_key}>"

    def describe(self) -> str:
        """Return the queue's line in the banner."""
        exchange = self.exchange or Exchange()
        return f". {self.name:<16} exchange={exchange.name}({exchange.type}) key={self.routing_key}"


def _topic_matches(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """Return whether the words of a topic pattern (media, *, #) match those of a routing key."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return _topic_matches(pattern[1:], key) or bool(key) and _topic_matches(pattern, key[1:])
    return bool(key) and pattern[0] in ("*", key[0]) and _topic_matches(pattern[1:], key[1:])


class Router:
    """Says which queues a task goes to, by `task_queues`, `task_routes` and what the call asks."""

    def __init__(self, app: TaskQ) -> None:
        self.app = app
        conf = app.conf
        self.create_missing = conf.task_create_missing_queues
        self.routes = _routes(conf.task_routes)
        name = conf.task_default_queue
        exchange = Exchange(conf.task_default_exchange or name, conf.task_default_exchange_type)
        self.default = Queue(name, exchange, conf.task_default_routing_key or name)
        self.queues: dict[str, Queue] = {}
        listed = conf.task_queues
        if isinstance(listed, collections.abc.Mapping):
            listed = [
                Queue(name, **{"exchange": name, "routing_key": name, **options})
                for name, options in listed.items()
            ]
        for queue in listed if listed is not None else [self.default]:
            self.add(queue)
        self._bound = False

    def add(self, queue: Queue | str) -> Queue:
        """Add a queue, with the default exchange and key where it names none."""
        if isinstance(queue, str):
            queue = Queue(queue, Exchange(queue), queue)
        elif not isinstance(queue, Queue):
            raise ImproperlyConfigured(
                f"task_queues holds {_repr(queue, 60)}: expected names or Queue objects"
            )
        if queue.exchange is None or not queue.exchange.name:
            queue.exchange = self.default.exchange
        queue.routing_key = queue.routing_key or self.default.routing_key
        queue.name.encode()  # what the store could not keep is an error here
        self.queues[queue.name] = queue
        return queue

    def queue(self, queue: Any) -> Queue:
        """Return the queue of a name; makes it where `task_create_missing_queues` allows."""
        name: Any = getattr(queue, "name", queue)
        if name in self.queues:
            return self.queues[name]
        if name == self.default.name:
            return self.default
        if isinstance(queue, str) and not self.create_missing:
            raise QueueNotFound(f"Queue {name!r} missing from task_queues")
        return self.add(queue)

    def options(
        self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any
    ) -> dict[str, Any]:
        """Return `options` over what the first route that matches the task says."""
        for route in self.routes:
            found = route(name, args, kwargs, options, task=task)
            if found is not None:
                found = {"queue": found} if isinstance(found, (str, Queue)) else dict(found)
                return {**found, **{k: v for k, v in options.items() if v is not None}}
        return options

    def resolve(self, options: dict[str, Any]) -> tuple[list[str], str, str]:
        """Return (names of queues, exchange, routing key) for queue=, exchange=, routing_key=."""
        asked, exchange = options.get("queue"), options.get("exchange")
        key = options.get("routing_key")
        if isinstance(exchange, Exchange):
            exchange = exchange.name
        if exchange and not asked:
            key = key or ""
        else:
            queue = self.queue(asked) if asked else self.default
            if queue.exchange.type == "direct" and not (exchange and key):
                return [queue.name], "", queue.name
            exchange, key = exchange or queue.exchange.name, key or queue.routing_key
        return self.bound_to(exchange, key), exchange, key

    def bound_to(self, exchange: str, key: str) -> list[str]:
        """Return the queues that an exchange brings messages of this routing key to."""
        if not self._bound:
            self.bind(self.queues.values())
            self._bound = True
        found = {}
        for kind, pattern, queue in self.app.store.bindings(exchange):
            if kind == "topic":
                matches = _topic_matches(pattern.split("."), key.split("."))
            else:
                matches = kind == "fanout" or pattern == key
            if matches:
                found[queue] = True
        if not found:
            raise QueueNotFound(
                f"no queue is bound to exchange {exchange!r} with routing key {key!r}: list it in "
                "task_queues, or use queue="
            )
        return list(found)

    def bind(self, queues: Iterable[Queue]) -> None:
        """Make the bindings of these queues known to the store."""
        for queue in queues:
            exchange = queue.exchange
            self.app.store.bind(exchange.name, exchange.type, queue.routing_key, queue.name)


def _routes(routes: Any) -> list[Callable[..., Any]]:
    """Return `task_routes` as functions (name, args, kwargs, options, task=) -> options, queue or
    None. An entry is such a function, its name, or a mapping or pairs of patterns and options."""
    if routes is None:
        return []
    is_pair = isinstance(routes, (list, tuple)) and [
        isinstance(pair, (list, tuple)) and isinstance(pair[0], (str, re.Pattern))
        for pair in routes
    ]
    entries = routes if is_pair and not all(is_pair) else [routes]
    return [_symbol(entry) if isinstance(entry, str) else entry if callable(entry) else
            _patterns_route(entry) for entry in entries]  # fmt: skip


def _patterns_route(entry: Any) -> Callable[..., Any]:
    import fnmatch

    exact: dict[str, Any] = {}
    patterns: list[tuple[Any, Any]] = []
    for pattern, found in entry.items() if isinstance(entry, collections.abc.Mapping) else entry:
        if not isinstance(pattern, str):
            patterns.append((pattern, found))
        elif set(pattern) & set("*?["):
            patterns.append((re.compile(fnmatch.translate(pattern)), found))
        else:
            exact[pattern] = found

    def route(name: str, *_: Any, **__: Any) -> Any:
        if name in exact:
            return exact[name]
        return next((found for pattern, found in patterns if pattern.match(name)), None)

    return route


def _symbol(name: str) -> Any:
    """Return what 'module', 'module:attribute' or 'module.attribute' names."""
    import importlib

    module, _, attribute = name.partition(":")
    if not attribute:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as exc:
            module, _, attribute = name.rpartition(".")
            if exc.name != name or not module:  # something else is missing
                raise
    found = importlib.import_module(module)
    try:
        return functools.reduce(getattr, attribute.split("."), found)
    except AttributeError as exc:
        raise ImportError(f"cannot import {name!r}: {exc}", name=name) from None


#: The fields of a request, and what they are unless they are set.
_REQUEST_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        "args argsrepr callbacks chain chord correlation_id delivery_info errbacks eta expires "
        "group group_index headers hostname id kwargs kwargsrepr lang logfile loglevel max_retries "
        "origin parent_id properties reply_to root_id shadow stamped_headers stamps task taskset "
        "timelimit".split()
    ),
    **dict.fromkeys(("retries", "replaced_task_nesting"), 0),
    **dict.fromkeys(("called_directly", "utc"), True),
    **dict.fromkeys(("ignore_result", "is_eager", "_protected"), False),
}


class Context:
    """A task's request: what is known of this call of it (`self.request` in a bound task)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(*args, **kwargs)
        #: Messages that the task has asked for, and that are sent with its outcome.
        self.follow_ups: list[Any] = []
        #: The results of the tasks that this one has called.
        self.children: list[Any] = []
        #: The limits that the call asked for, in seconds.
        limits: Any = self.timelimit or (None, None)
        self.time_limit, self.soft_time_limit = limits

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set attributes."""
        self.__dict__.update(*args, **kwargs)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default`."""
        return getattr(self, key, default)

    def __getattr__(self, name: str) -> Any:
        try:
            return _REQUEST_DEFAULTS[name]
        except KeyError:
            raise AttributeError(f"a request has no {name!r}") from None

    def __repr__(self) -> str:
        return f"<Context: {vars(self)!r}>"


def request_of(message: Message, args: Any, kwargs: Any, embed: Any, hostname: str) -> Context:
    """Return the request of a message: its headers, its delivery and its arguments."""
    headers, properties = message.headers, message.properties
    info = properties.get("delivery_info") or {}
    request = Context(
        headers,
        args=args,
        kwargs=kwargs,
        hostname=hostname,
        called_directly=False,
        **{name: embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord")},
        retries=headers.get("retries") or 0,
        correlation_id=properties.get("correlation_id"),
        reply_to=properties.get("reply_to"),
        properties=properties,
        delivery_info={
            "exchange": info.get("exchange", ""),
            "routing_key": info.get("routing_key"),
            "priority": properties.get("priority"),
            "redelivered": bool(info.get("redelivered")),
        },
        headers={key: headers[key] for key in headers.keys() - _REQUEST_DEFAULTS.keys()} or None,
    )
    if headers.get("ignore_result") is None:  # nobody has asked: it is as the task says
        request.__dict__.pop("ignore_result", None)
    return request


def _forwarded(operation: Callable[..., Any]) -> Any:
    return lambda proxy, *args, **kw: operation(proxy._get_current_object(), *args, **kw)


class Proxy:
    """Stands for an object that is looked up at each use."""

    __slots__ = ("_get_current_object", "__weakref__")

    def __init__(self, find: Callable[[], Any]) -> None:
        object.__setattr__(self, "_get_current_object", find)

    __getattr__ = _forwarded(getattr)
    __setattr__ = _forwarded(setattr)
    __delattr__ = _forwarded(delattr)
    __call__ = _forwarded(lambda found, *args, **kw: found(*args, **kw))
    __bool__ = _forwarded(bool)
    __eq__ = _forwarded(lambda found, other: found == other)
    __hash__ = _forwarded(hash)
    __repr__ = _forwarded(repr)
    __dir__ = _forwarded(dir)
    __reduce__ = _forwarded(lambda found: found.__reduce__())
    __class__ = property(_forwarded(type))  # type: ignore[assignment]
    __doc__ = property(_forwarded(lambda found: found.__doc__))  # type: ignore[assignment]


#: Every app that is alive, the one that is current, and what `shared_task` has made for all.
_apps: weakref.WeakSet[Any] = weakref.WeakSet()
_current: list[Any] = []
_shared: list[Callable[[Any], Any]] = []


def _find_current_app() -> TaskQ:
    if not _current:
        _current.append(TaskQ("default", set_as_current=False))
        _current[-1].is_fallback = True
    return _current[-1]


current_app: Any = Proxy(_find_current_app)
current_task: Any = Proxy(lambda: _thread.stack[-1][0] if _thread.stack else None)


def app_or_default(app: TaskQ | None = None) -> TaskQ:
    """Return `app`, or the current one."""
    return app if app is not None else current_app._get_current_object()


#: Attributes of a task whose defaults are settings: `time_limit` is `task_time_limit`.
_FROM_SETTINGS = {
    name: f"task_{name}"
    for name in (
        "acks_late acks_on_failure acks_on_failure_or_timeout acks_on_timeout ignore_result "
        "reject_on_worker_lost serializer soft_time_limit store_eager_result "
        "store_errors_even_if_ignored time_limit track_started"
    ).split()
}
_FROM_SETTINGS["priority"] = "task_default_priority"


class Task:
    """A task: what `@app.task` makes of a function, or the base of a class with a `run` method.

    Attributes set in a class or by the decorator's options override the settings they are named
    after. Handlers that a subclass may define: before_start(task_id, args, kwargs),
    on_success(retval, task_id, args, kwargs), on_failure(exc, task_id, args, kwargs, einfo),
    on_retry(exc, task_id, args, kwargs, einfo),
    after_return(status, retval, task_id, args, kwargs, einfo).
    """

    MaxRetriesExceededError = MaxRetriesExceededError
    OperationalError = OperationalError

    #: The name by which it is called.
    name: str = None  # type: ignore[assignment]
    #: Whether calls are checked against the function's signature; None: as the app's strict_typing.
    typing: Any = None
    #: How often `retry` may run it again; None is without end.
    max_retries: int | None = 3
    #: Seconds until a retry that names no time.
    default_retry_delay: float = 180
    trail = True
    send_events = True
    #: Exceptions that are expected: logged at INFO, without a traceback.
    throws: tuple[Any, ...] = ()
    #: Seconds, or a datetime, after which a call that has not begun is REVOKED.
    expires: Any = None
    resultrepr_maxsize = 1024
    queue = exchange = routing_key = rate_limit = None
    autoretry_for: tuple[Any, ...] = ()
    dont_autoretry_for: tuple[Any, ...] = ()
    retry_kwargs: dict[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
    retry_jitter = True
    __header__: Any = None

    #: The app that the task belongs to.
    app: Any = current_app

    def __getattr__(self, name: str) -> Any:
        if name in _FROM_SETTINGS:
            return self.app.conf[_FROM_SETTINGS[name]]
        raise AttributeError(f"task {self.name!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.__dict__.pop("_defaults", None)  # see _call_defaults

    @property
    def backend(self) -> Store:
        """The store that keeps the task's results."""
        return self.app.backend

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
        for task, request in reversed(_thread.stack):
            if task is self:
                return request
        return Context()

    def push_request(self, *args: Any, **kwargs: Any) -> None:
        """Enter a request, for tests of tasks: `task.push_request(id='1')`."""
        _thread.stack.append((self, Context(*args, **kwargs)))

    def pop_request(self) -> None:
        """Leave the request that was entered last."""
        _thread.stack.pop()

    def _handler(self, *args: Any) -> None:
        """Called at one of the moments in a task's life that the class names; does nothing."""

    before_start = on_success = on_failure = on_retry = after_return = _handler

    # -- calling it ----------------------------------------------------------------------------

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send the task with these arguments: `add.delay(2, 2)`."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
    ) -> AsyncResult:
        """Send the task; return its AsyncResult.

        countdown: seconds to wait; eta: the datetime to wait for (a naive one is UTC).
        expires: seconds or datetime after which it is not begun any more, but REVOKED.
        queue, exchange, routing_key: where to; priority: 0 (highest) to 9.
        headers: own headers; shadow: a name for the log; time_limit, soft_time_limit: seconds.
        retry, retry_policy: whether and how to try again when the store cannot be written.
        serializer: 'json' or 'pickle'; ignore_result: keep no result.

        Raises TypeError for wrong arguments, EncodeError for such as cannot be serialized, and
        OperationalError where the store cannot be written.
        """
        app = self.app
        checked = app.strict_typing if self.typing is None else self.typing
        if checked and self.__header__ is not None:
            self.__header__(*(args or ()), **(kwargs or {}))
        if task_id:
            options["task_id"] = task_id
        shadow = options.get("shadow") or self.shadow_name(args, kwargs, options)
        if shadow:
            options["shadow"] = shadow
        if not app.conf.task_always_eager:
            return app._send(self.name, args, kwargs, options, self)
        options = {**self._call_defaults(), **options}
        serializer = options["serializer"] or app.conf.task_serializer
        content_type, _, body = serialize((args or (), kwargs or {}), serializer)
        args, kwargs = deserialize(body, content_type, [content_type])
        with denied_join_result():
            return self.apply(args, kwargs, **options)

    def shadow_name(self, args: Any, kwargs: Any, options: dict[str, Any]) -> str | None:
        """Return a name for the log instead of the task's own; may be overridden."""
        return None

    def _call_defaults(self) -> dict[str, Any]:
        """Return what the task says of its calls; kept until an attribute or a setting changes."""
        version, defaults = self.__dict__.get("_defaults", (None, {}))
        conf = self.app.conf
        if version != conf.version:
            if self.app.tasks and (self.soft_time_limit or 0) > (self.time_limit or float("inf")):
                raise ValueError("soft_time_limit must be less than or equal to time_limit")
            defaults = {name: getattr(self, name) for name in _SHARED_OPTIONS}
            self.__dict__["_defaults"] = conf.version, defaults
        return defaults

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> EagerResult:
        """Run the task here and now, as a worker would; return its EagerResult.

        task_id, retries, headers, ignore_result as a worker would find them. throw: raise its error
        instead of keeping it; `task_eager_propagates` by default.
        """
        _check_call_options(options)
        app, get, (_, parent) = self.app, options.get, _running()
        id = get("task_id") or uuid()
        ignored, throw = get("ignore_result"), get("throw")
        throw = app.conf.task_eager_propagates if throw is None else throw
        limits = [self.time_limit, self.soft_time_limit]
        info = {name: get(name) for name in ("exchange", "routing_key", "priority")}
        request = Context(
            id=id,
            task=self.name,
            args=list(args or ()),
            kwargs=dict(kwargs or {}),
            retries=get("retries") or 0,
            is_eager=True,
            called_directly=False,
            hostname=_hostname(),
            headers=get("headers"),
            parent_id=parent and parent.id,
            root_id=(parent and (parent.root_id or parent.id)) or id,
            ignore_result=self.ignore_result if ignored is None else ignored,
            timelimit=limits if any(limits) else None,
            delivery_info={"is_eager": True, **info},
        )
        run = run_task(self, request, bool(throw))
        if run.state == RETRY and run.value.sig is not None:
            return run.value.sig()
        if self.store_eager_result and not request.ignore_result and run.meta is not None:
            app.backend.put_results([(id, run.state, run.meta)])
        value = run.value.exc if run.state == RETRY else run.value
        return EagerResult(id, value, run.state, run.traceback, self.name, app)

    # -- steering it -----------------------------------------------------------------------------

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: Any = True,
        **options: Any,
    ) -> Retry:
        """Run this call of the task again later: `raise self.retry(exc=exc, countdown=10)`.

        Takes `eta`, `countdown` (by default `default_retry_delay`), `max_retries`, and the other
        options of `apply_async`. Raises Retry, which tells the worker so (`throw=False` returns
        it); `exc`, or MaxRetriesExceededError, when the retries are used up. The new message is
        sent in the transaction that ends this run. Outside a worker raises `exc`, or Retry.
        """
        request = self.request
        if request.called_directly:
            raise exc or Retry("Task can be retried", None)
        max_retries, when = options.pop("max_retries", None), options.get("eta")
        if when is None:
            when = options.get("countdown")
        if when is None:
            when = options["countdown"] = self.default_retry_delay
        if max_retries is not None:
            request.update(max_retries=max_retries)
        limit = self.max_retries if max_retries is None else max_retries
        args = tuple(request.args if args is None else args)
        kwargs = request.kwargs if kwargs is None else kwargs
        retries = request.retries + 1
        if limit is not None and retries > limit:
            if exc is not None:
                raise exc
            raise self.MaxRetriesExceededError(
                f"Can't retry {self.name}[{request.id}] args:{args} kwargs:{kwargs}",
                task_args=args,
                task_kwargs=kwargs,
            )
        ret = Retry(exc=exc, when=when, is_eager=request.is_eager)
        again = {**self._options_again(request, options), "retries": retries}
        if request.is_eager:
            ret.sig = functools.partial(self.apply, args, kwargs, **again)
        else:
            prepared = self.app._prepare(self.name, args, kwargs, again, self)
            request.follow_ups.extend(prepared.deliveries)
        if throw:
            raise ret
        return ret

    def _options_again(self, request: Context, options: dict[str, Any]) -> dict[str, Any]:
        """Return `options` over those that send a request once more."""
        again = {name: vars(request).get(name) for name in _CARRIED_OPTIONS}
        info = request.delivery_info or {}
        priority = info.get("priority")  # Celery on other brokers has more than 9
        again.update(task_id=request.id, priority=priority and min(priority, 9))
        if info.get("exchange") and not options.get("queue"):
            again.update(exchange=info["exchange"], routing_key=info["routing_key"])
        else:
            again["queue"] = info.get("routing_key")
        return {**{name: value for name, value in again.items() if value is not None}, **options}

    def update_state(
        self, task_id: Any = None, state: Any = None, meta: Any = None, request: Any = None
    ) -> None:
        """Set the task's state, own names included, and what `AsyncResult.info` shows meanwhile.

        Example: `self.update_state(state='PROGRESS', meta={'done': 3, 'of': 10})`.
        """
        request, state = request or self.request, state or PENDING
        id = task_id or request.id
        if id is None:
            raise ValueError("update_state: no task runs here; pass task_id")
        found = encode_exception(meta) if isinstance(meta, BaseException) else meta
        text = _encode_meta(self.app, _meta(id, state, found, request))
        self.app.backend.put_results([(id, state, text)])

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802
        """Return the result of a call of this task by its id."""
        return AsyncResult(task_id, app=self.app, task_name=self.name, **kwargs)

    def s(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available in this version."""
        raise _unavailable("a signature")

    si = signature = subtask = s
    map = starmap = chunks = replace = add_to_chord = s

    def __reduce__(self) -> Any:
        return _task_by_name, (self.name, self.__module__)

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {_app_repr(self.app)}>"


def _app_repr(app: TaskQ) -> str:
    return f"{app.main or '__main__'} at {id(app):#x}"


def _task_by_name(name: str, module: str) -> Task:
    """Return the task that a pickle names."""
    if module not in sys.modules:
        _symbol(module)
    return current_app.tasks[name]


def _running() -> tuple[Any, Any]:
    """Return the task that this thread runs for a worker and its request, or (None, None); tasks
    that were called as functions do not count."""
    for entry in reversed(_thread.stack):
        if not entry[1].called_directly:
            return entry
    return None, None


#: Options that both a call and a task may have: the call's come first, then the task's attributes.
_SHARED_OPTIONS = tuple(
    "queue exchange routing_key priority expires serializer ignore_result time_limit "
    "soft_time_limit".split()
)
#: Options of a call that it keeps when it is sent again.
_CARRIED_OPTIONS = tuple(
    "root_id parent_id shadow expires headers reply_to origin ignore_result stamped_headers stamps "
    "replaced_task_nesting time_limit soft_time_limit".split()
)
#: What `apply_async` takes besides args and kwargs. From `producer` on these are options of kombu's
#: publish that change nothing here.
_CALL_OPTIONS = frozenset(
    (*_SHARED_OPTIONS, *_CARRIED_OPTIONS)
    + tuple(
        "task_id countdown eta retry retry_policy retries argsrepr kwargsrepr add_to_parent "
        "producer publisher connection router route_name result_cls delivery_mode mandatory "
        "immediate declare task_type throw".split()
    )
)
#: Options of Celery's calls and tasks that this version does not have yet.
_LATER_OPTIONS = frozenset(
    "link link_error chain chord group_id group_index compression rate_limit pydantic "
    "retry_on_worker_lost".split()
)


def _check_call_options(options: dict[str, Any]) -> None:
    for name in options.keys() - _CALL_OPTIONS:
        if name in _LATER_OPTIONS:
            if options[name]:
                raise _unavailable(f"apply_async({name}=...)")
        elif options[name] is not None:
            near = _nearest(name, _CALL_OPTIONS, 0.6)
            hint = f": did you mean {near!r}?" if near else ""
            raise TypeError(f"apply_async() has no option {name!r}{hint}")


def _check_task_options(options: dict[str, Any], base: Any) -> None:
    for name, value in options.items():
        if name in _LATER_OPTIONS and value:
            raise _unavailable(f"the task option {name!r}")
        known = name in _FROM_SETTINGS or hasattr(base, name)
        near = None if known else _nearest(name, [*_FROM_SETTINGS, *dir(base)], 0.8)
        if near:
            raise TypeError(f"unknown task option {name!r}: did you mean {near!r}?")


class TaskRegistry(dict):
    """The tasks of an app by name."""

    def __missing__(self, name: str) -> NoReturn:
        raise NotRegistered(name)


def _main_module() -> str | None:
    """Return the name under which a worker imports the script that runs as `__main__`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name[:-9] if spec.name.endswith(".__main__") else spec.name
    path = getattr(sys.modules.get("__mp_main__", main), "__file__", None)
    if path is None or not path.endswith(".py"):
        return None
    folder, name = os.path.split(os.path.abspath(path))
    name = name[:-3]
    while os.path.exists(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        name = f"{package}.{name}"
    return name


def gen_task_name(app: TaskQ, name: str, module: str | None) -> str:
    """Return the automatic name of a function: 'proj.tasks.add'."""
    if module in (None, "__main__", "__mp_main__"):
        module = _main_module() or app.main or "__main__"
    return f"{module}.{name}"


def _home(frame: Any) -> str:
    """Return the directory of the script or top-level package whose code runs in `frame`."""
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    names = frame.f_globals if frame is not None else {}
    path = names.get("__file__")
    if not path:  # a notebook or a REPL
        return os.getcwd()
    module = names.get("__name__") or ""
    spec = names.get("__spec__")
    if module in ("__main__", "__mp_main__"):
        module = spec.name if spec is not None else _main_module() or ""
    folder = os.path.dirname(os.path.abspath(path))
    depth = module.count(".") + (os.path.basename(path) == "__init__.py")
    return functools.reduce(lambda place, _: os.path.dirname(place), range(depth), folder)


#: A call that is ready to be sent: its message, the body as the signals see it, and the deliveries.
Prepared = collections.namedtuple("Prepared", "message payload deliveries")


class _derived:  # noqa: N801 - used like `property`
    """A property of an app that is made of its settings: anew only when one of them has changed."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __get__(self, app: Any, owner: Any) -> Any:
        if app is None:
            return self
        version = app.conf.version
        found = app._made.get(self)
        if found is None or found[0] != version:
            found = app._made[self] = version, self.make(app)
        return found[1]


class TaskQ:
    """An app: its settings, its tasks, and its way to the store. Celery's class, by this name too.

        app = TaskQ('proj', broker='sqlite:///proj.db', include=['proj.tasks'])

    Without a broker messages and results are in taskq.db beside the package or script that makes
    the app. `backend` may name another sqlite:// file, or disabled:// for no results; 'rpc://' and
    None keep them with the messages. Other keyword arguments are settings.
    """

    task_cls: Any = Task

    def __init__(
        self,
        main: str | None = None,
        *,
        backend: str | None = None,
        set_as_current: bool = True,
        tasks: dict[str, Any] | None = None,
        broker: str | None = None,
        include: Sequence[str] | None = None,
        changes: dict[str, Any] | None = None,
        config_source: Any = None,
        task_cls: Any = None,
        autofinalize: bool = True,
        namespace: str | None = None,
        strict_typing: bool = True,
        **settings: Any,
    ) -> None:
        for name in ("loader", "amqp", "events", "log", "control", "fixups"):
            if settings.pop(name, None):
                raise ImproperlyConfigured(f"TaskQ({name}=...): taskq has no replaceable {name}")
        self.main = main
        self.strict_typing = strict_typing
        self.set_as_current = set_as_current
        self.autofinalize = autofinalize
        task_cls = task_cls or self.task_cls
        #: The base class of the tasks that `@app.task` makes.
        self.Task = _symbol(task_cls) if isinstance(task_cls, str) else task_cls
        self.home = _home(sys._getframe(1))
        self.finalized = False
        self._tasks = TaskRegistry(tasks or {})
        self._lock = threading.RLock()
        self._conf = Settings()
        self._loaded = config_source is None
        self._config_source, self._namespace = config_source, namespace
        self._sourced: dict[str, Any] = {}
        self._silent = False
        self._discover: list[Callable[[], None]] = []
        self._made: dict[Any, tuple[int, Any]] = {}
        #: Counts registrations, so that a background worker's children are forked anew.
        self.generation = 0
        given = {"broker_url": broker, "result_backend": backend, "include": include}
        given = {name: value for name, value in given.items() if value is not None}
        for name in settings.keys() - SETTINGS.keys() - _ONLY.keys() - _NO_EFFECT:
            near = _nearest(name, ("broker", "backend", "include", "config_source", *SETTINGS), 0.6)
            raise TypeError(f"TaskQ() has no option {name!r}: did you mean {near!r}?")
        self._conf.update({**given, **(changes or {}), **settings})
        _apps.add(self)
        if set_as_current:
            self.set_current()

    #: Whether this is the app that `current_app` is before any has been made.
    is_fallback = False

    def set_current(self) -> None:
        """Make this the app that `current_app` and `shared_task` mean."""
        _current[:] = [self]

    set_default = set_current

    # -- settings ------------------------------------------------------------------------------

    @property
    def conf(self) -> Settings:
        """The app's settings; a configuration source is read at the first use."""
        if not self._loaded:
            with self._lock:
                if not self._loaded:  # by another thread
                    self._load_config()
        return self._conf

    @conf.setter
    def conf(self, value: Any) -> None:
        self._conf.load(value)

    def _load_config(self) -> None:
        conf, source, sourced = self._conf, self._config_source, self._sourced
        # What the app was given stands above its configuration, but not what an earlier one said.
        by_hand = {k: v for k, v in conf.changed.items() if k not in sourced or sourced[k] is not v}
        self._loaded = True  # the source may use the app
        try:
            conf.load(_symbol(source) if isinstance(source, str) else source, self._namespace)
        except BaseException as exc:
            self._loaded = self._silent and isinstance(exc, ImportError)
            if not self._loaded:
                raise
        self._sourced = {k: v for k, v in conf.changed.items() if by_hand.get(k) is not v}
        conf.update(by_hand)

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take settings from an object, or the name of a module: `config_from_object('proj.conf')`.

        It is read when a setting is first needed, with `force` now. With a namespace only names
        that begin with it count. `silent` passes over a module that does not exist.
        """
        self._config_source, self._silent, self._loaded = obj, silent, False
        self._namespace = namespace or self._namespace
        if force:
            self.conf  # noqa: B018 - reading it loads the source

    def config_from_envvar(
        self, variable_name: str, silent: bool = False, force: bool = False
    ) -> bool:
        """Take settings from the module that an environment variable names."""
        module = os.environ.get(variable_name)
        if not module:
            if silent:
                return False
            raise ImproperlyConfigured(
                f"The environment variable {variable_name!r} is not set, and as such the "
                "configuration could not be loaded. Set it to the name of a module."
            )
        self.config_from_object(module, silent=silent, force=force)
        return True

    def add_defaults(self, source: Any) -> None:
        """Set what the app has not set yet."""
        for name, value in dict(source() if callable(source) else source).items():
            self.conf.setdefault(name, value)

    # -- stores and routes -----------------------------------------------------------------------

    @_derived
    def store(self) -> Store:
        """Where the app's messages are."""
        if self.is_fallback and not self.conf.broker_url:
            raise ImproperlyConfigured(
                "no app has been made yet, so there is no place for messages: import the module "
                "that makes it first (in proj/__init__.py: from .celery import app)"
            )
        url = self.conf.broker_url or "sqlite:///" + os.path.join(self.home, "taskq.db")
        url = url if isinstance(url, str) else url[0]
        return self._opened(url, self.conf.broker_transport_options or {}, self.backend_is_broker)

    @_derived
    def backend_is_broker(self) -> bool:
        """Whether results are in the store of the messages, and settle with them."""
        url = self.conf.result_backend
        return not url or url.startswith("rpc") or url == self.conf.broker_url

    @_derived
    def backend(self) -> Store:
        """Where the app's results are."""
        if self.backend_is_broker:
            return self.store
        url = self.conf.result_backend
        return _DISABLED if url.startswith("disabled") else self._opened(url, {}, True)

    def _opened(self, url: str, options: dict[str, Any], has_results: bool) -> Store:
        store = open_store(url, options)
        if has_results:
            store.result_expires = self.conf.seconds("result_expires")
            store.failure_expires = self.conf.seconds("result_failure_expires")
        return store

    @property
    def keeps_results(self) -> bool:
        """Whether there is a place for results at all."""
        return self.backend is not _DISABLED

    @_derived
    def router(self) -> Router:
        """The app's routes and queues."""
        return Router(self)

    @property
    def timezone(self) -> Any:
        """The tzinfo of the setting `timezone`."""
        return _zone(self.conf.timezone)

    def now(self) -> datetime:
        """Return the time now, aware, in the app's time zone."""
        return datetime.now(self.timezone)

    # -- tasks -----------------------------------------------------------------------------------

    @property
    def tasks(self) -> TaskRegistry:
        """The tasks by name; shared tasks are added when it is first asked for."""
        if not self.finalized:
            self.finalize(auto=True)
        return self._tasks

    def finalize(self, auto: bool = False) -> None:
        """Add shared tasks and set what `task_annotations` says; happens by itself."""
        if auto and not self.autofinalize:
            raise RuntimeError("Contract breach: app not finalized")
        with self._lock:
            if not self.finalized:
                self.finalized = True
                for task in list(self._tasks.values()):
                    self._annotate(task)
                for make in list(_shared):
                    make(self)

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a task of a function: `@app.task` or `@app.task(bind=True, max_retries=5)`.

        bind: the function's first argument is the task itself. name: instead of the automatic
        'module.function'. base: a subclass of Task. Other options become attributes of the task.
        """
        if len(args) > 1 or args and not callable(args[0]):
            raise TypeError(f"@app.task takes one function, and options by name: {_repr(args, 60)}")
        for name in ("lazy", "shared"):  # when a task is registered makes no difference here
            options.pop(name, None)
        make = functools.partial(self._task_from_fun, **options)
        return make(*args) if args else make

    def _task_from_fun(
        self,
        fun: Any,
        name: str | None = None,
        base: Any = None,
        bind: bool = False,
        **options: Any,
    ) -> Any:
        base = base or self.Task
        _check_task_options(options, base)
        attributes = {
            "name": name or self.gen_task_name(fun.__name__, fun.__module__),
            "run": fun if bind else staticmethod(fun),
            "__module__": fun.__module__,
            "__header__": staticmethod(_arguments_check(fun, bind)),
            **{k: v for k, v in options.items() if v is not None or k not in _FROM_SETTINGS},
        }
        task = type(fun.__name__, (base,), attributes)()
        return self._register(functools.update_wrapper(task, task.run, updated=()))

    def register_task(self, task: Any) -> Any:
        """Register an instance (or class) of a task class; return the instance."""
        task = task() if isinstance(task, type) else task
        cls = type(task)
        _check_task_options(vars(cls), cls)
        if not task.name:
            task.name = self.gen_task_name(cls.__name__, cls.__module__)
        if task.__header__ is None:
            task.__header__ = _arguments_check(task.run, False)
        return self._register(task)

    def _register(self, task: Any) -> Any:
        task.app = self
        if task.autoretry_for:
            _add_autoretry(task)
        with self._lock:
            self._tasks[task.name] = task
            self.generation += 1
        if self._loaded:
            self._annotate(task)
        return task

    def _annotate(self, task: Any) -> None:
        annotations = self.conf.task_annotations or {}
        for key in ("*", task.name):
            _check_task_options(annotations.get(key) or {}, task)
            for attribute, value in (annotations.get(key) or {}).items():
                setattr(task, attribute, value)

    def gen_task_name(self, name: str, module: str | None) -> str:
        """Return the automatic name of a function; may be overridden."""
        return gen_task_name(self, name, module)

    def autodiscover_tasks(
        self, packages: Any = None, related_name: str | None = "tasks", force: bool = False
    ) -> None:
        """Have a worker import the module `related_name` of each package that has one.

        packages: names, or a function that returns them; with `force` they are imported now.
        """

        def discover() -> None:
            for package in (packages() if callable(packages) else packages) or ():
                _import_related(package, related_name)

        if force:
            discover()
        else:
            self._discover.append(discover)

    def import_default_modules(self) -> None:
        """Import what `autodiscover_tasks`, `imports` and `include` name."""
        import importlib

        for discover in self._discover:
            discover()
        for names in (self.conf.imports, self.conf.include):
            for name in [names] if isinstance(names, str) else names or ():
                importlib.import_module(name)
        self.finalize()

    # -- sending ---------------------------------------------------------------------------------

    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, **options: Any
    ) -> AsyncResult:
        """Send a task by name, whether or not it is registered here; options as `apply_async`'s."""
        if self.conf.task_always_eager:
            import warnings

            text = "task_always_eager has no effect on send_task"
            warnings.warn(AlwaysEagerIgnored(text), stacklevel=2)
        return self._send(name, args, kwargs, options, self._tasks.get(name))

    def _send(
        self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any
    ) -> AsyncResult:
        prepared = self._prepare(name, args, kwargs, options, task)
        self._publish([prepared], options.get("retry"), options.get("retry_policy"))
        headers = prepared.message.headers
        result = AsyncResult(headers["id"], app=self, task_name=name)
        result.ignored = bool(headers["ignore_result"]) and self.keeps_results
        running, request = _running()
        if running is not None and running.trail and options.get("add_to_parent", True):
            request.children.append(result)
        return result

    def _prepare(
        self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any
    ) -> Prepared:
        """Make the message of a call; nothing is sent yet."""
        args, kwargs = args or (), kwargs or {}
        if not isinstance(args, (list, tuple)):
            raise TypeError(f"task args must be a list or tuple: {_repr(args, 60)}")
        if not isinstance(kwargs, (dict, collections.abc.Mapping)):
            raise TypeError(f"task keyword arguments must be a mapping: {_repr(kwargs, 60)}")
        _check_call_options(options)
        if task is not None:
            options = {**task._call_defaults(), **options}
        router = self.router
        if router.routes:
            options = router.options(name, args, kwargs, options, task)
        queues, exchange, routing_key = router.resolve(options)
        get = options.get
        due = _due(get("eta"), get("countdown"))
        headers = self._headers(name, args, kwargs, options, due)
        priority = self._priority(get("priority"))
        properties = {
            "correlation_id": headers["id"],
            "reply_to": get("reply_to") or "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": exchange, "routing_key": routing_key},
            "priority": priority,
            "delivery_tag": headers["id"],
        }
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        payload = (args, kwargs, embed)
        if before_task_publish.receivers:
            named = {"body": payload, "headers": headers, **properties["delivery_info"]}
            named["declare"] = [router.queue(queue) for queue in queues]
            policy = get("retry_policy")
            before_task_publish.send(name, properties=properties, retry_policy=policy, **named)
        serializer = get("serializer") or self.conf.task_serializer
        message, text = _encode_call(headers, properties, payload, serializer)
        seconds = None if due is None else due.timestamp()
        return Prepared(message, payload, [Delivery(q, priority, seconds, text) for q in queues])

    def _headers(
        self, name: str, args: Any, kwargs: Any, options: dict[str, Any], due: datetime | None
    ) -> dict[str, Any]:
        """Return the headers of a call's message, as Celery's protocol 2 has them."""
        get = options.get
        id = get("task_id") or uuid()
        _, parent = _running()
        if parent is not None and parent.id == id:  # sent once more by itself
            parent = None
        expires = get("expires")
        return {
            "lang": "py",
            "task": name,
            "id": id,
            "shadow": get("shadow"),
            "eta": due and due.isoformat(),
            "expires": None if expires is None else _moment("expires", expires).isoformat(),
            "group": None,
            "group_index": None,
            "retries": get("retries") or 0,
            "timelimit": [get("time_limit"), get("soft_time_limit")],
            "root_id": get("root_id") or (parent and (parent.root_id or parent.id)) or id,
            "parent_id": get("parent_id") or (parent and parent.id),
            "argsrepr": get("argsrepr") or _repr(args),
            "kwargsrepr": get("kwargsrepr") or _repr(kwargs),
            "origin": get("origin") or _origin(os.getpid()),
            "ignore_result": get("ignore_result") if self.keeps_results else True,
            "replaced_task_nesting": get("replaced_task_nesting") or 0,
            "stamped_headers": get("stamped_headers"),
            "stamps": get("stamps") or {},
            **(get("headers") or {}),
        }

    def _priority(self, priority: Any) -> int:
        """Return the priority of a call that asks for this one, or None."""
        if priority is None and self.conf.task_inherit_parent_priority:
            _, parent = _running()
            priority = parent and (parent.delivery_info or {}).get("priority")
        if priority is None:
            return 0
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
            raise ValueError(f"priority={_repr(priority, 60)}: expected 0 (highest) to 9")
        return priority

    def _publish(self, calls: Sequence[Prepared], retry: bool | None, policy: Any) -> None:
        """Send calls, all or none, trying again as `task_publish_retry` and its policy say."""
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        for attempt in itertools.count():
            try:
                self.store.publish(deliveries)
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
        for message, payload, _ in calls if after_task_publish.receivers else ():
            info = message.properties["delivery_info"]
            headers = message.headers
            after_task_publish.send(sender=headers["task"], body=payload, headers=headers, **info)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802
        """Return the result of a task by its id."""
        return AsyncResult(task_id, app=self, **kwargs)

    # -- the rest --------------------------------------------------------------------------------

    def Worker(self, **options: Any) -> Worker:  # noqa: N802
        """Return a worker of this app, not started; options as the command line's."""
        return Worker(self, **options)

    def worker(self, **options: Any) -> BackgroundWorker:
        """Return a worker for the background of this process: `with app.worker(concurrency=2):`."""
        return BackgroundWorker(self, options)

    def worker_main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command `worker` with these arguments, by default the program's; return its exit
        status. A program name before the command is passed over."""
        argv = list(sys.argv if argv is None else argv)
        if "worker" not in argv:
            raise ValueError(
                "The worker sub-command must be specified in argv.\n"
                "Use app.start() to programmatically start other commands."
            )
        has_program = argv[0] != "worker" and not argv[0].startswith("-")
        return self.start(argv[has_program:])

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line with this app: `app.start()` at the end of proj/celery.py."""
        return main(list(sys.argv[1:] if argv is None else argv), app=self)

    def bugreport(self) -> str:
        """Return the versions and settings that a bug report should name."""
        return bugreport(self)

    def close(self) -> None:
        """Let go of the stores of this thread."""
        for store in list(_stores.values()):
            store.close()

    def __enter__(self) -> TaskQ:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("control", "events", "add_periodic_task", "on_after_configure", "signature"):
            raise _unavailable(f"app.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {_app_repr(self)}>"


Celery = TaskQ


class _Disabled(Store):
    """The place of results where there is none."""

    def uri(self) -> str:
        return "disabled://"

    def put_results(self, results: Sequence[Sequence[Any]]) -> None:
        pass

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "No result backend is configured: this app has backend='disabled://'"
        )

    get_results = forget = wait = _refuse


_DISABLED = _Disabled()


def shared_task(*args: Any, **options: Any) -> Any:
    """Make a task for every app, in a module that has none at hand; options as `app.task`'s."""
    if not args:
        return functools.partial(shared_task, **options)
    (fun,) = args

    def add(app: TaskQ) -> Any:
        return app.task(fun, **options)

    def find() -> Any:
        app = current_app._get_current_object()
        return app.tasks[options.get("name") or app.gen_task_name(fun.__name__, fun.__module__)]

    _shared.append(add)
    for app in list(_apps):
        if app.finalized:
            add(app)
    return Proxy(find)


def _import_related(package: str, name: str | None) -> None:
    """Import the module `name` of a package, where there is one, or without a name the package."""
    import importlib

    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        package = package.rpartition(".")[0]  # 'proj.apps.Config' may name a class, as in Django
        if not package:
            raise
    if name:
        try:
            importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as exc:
            if exc.name != f"{package}.{name}":
                raise


def _arguments_check(fun: Any, bound: bool) -> Any:
    """Return a function with the signature of `fun` that does nothing: a wrong call raises."""
    import inspect

    try:
        signature = inspect.signature(functools.partial(fun, None) if bound else fun)
    except (TypeError, ValueError):  # a builtin without one
        return lambda *args, **kwargs: None
    empty = inspect.Parameter.empty
    blank = signature.replace(
        parameters=[
            parameter.replace(
                default=empty if parameter.default is empty else None, annotation=empty
            )
            for parameter in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    name = fun.__name__ if getattr(fun, "__name__", "").isidentifier() else "run"
    names: dict[str, Any] = {}
    exec(f"def {name}{blank}: pass", names)  # a real call beats Signature.bind 20 times
    return names[name]


def _add_autoretry(task: Any) -> None:
    """Wrap `run` so that the exceptions of `autoretry_for` retry the task."""
    if isinstance(task.autoretry_for, type):
        raise TypeError(f"autoretry_for={task.autoretry_for!r}: expected a tuple of exceptions")
    run = task.run

    @functools.wraps(run)
    def run_or_retry(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (Ignore, Retry, Reject, *task.dont_autoretry_for):
            raise
        except tuple(task.autoretry_for) as exc:
            options = dict(task.retry_kwargs)
            if task.retry_backoff:
                options["countdown"] = get_exponential_backoff_interval(
                    int(max(1.0, task.retry_backoff)),
                    task.request.retries,
                    task.retry_backoff_max,
                    task.retry_jitter,
                )
            if task.request.max_retries is not None:  # the function itself has called retry with it
                options["max_retries"] = task.request.max_retries
            raise task.retry(exc=exc, **options) from exc

    task.run = run_or_retry


def get_exponential_backoff_interval(
    factor: int, retries: int, maximum: float, full_jitter: bool = False
) -> float:
    """Return the seconds until a retry: factor × 2^retries up to `maximum`, or random up to it."""
    countdown = min(maximum, factor * 2**retries)
    if full_jitter:
        import random

        countdown = random.randrange(int(countdown) + 1)
    return max(0, countdown)


#: The options of a call that are times: their types, and what an error says is expected.
_TIMES: dict[str, tuple[Any, str]] = {
    "countdown": ((int, float), "seconds"),
    "eta": ((datetime, str), "a datetime or ISO 8601 text; for seconds use countdown="),
    "expires": ((int, float, timedelta, datetime, str), "seconds, a datetime or ISO 8601 text"),
}


def _moment(name: str, value: Any) -> datetime:
    """Return the time in UTC that an option means: seconds from now, or a datetime (a naive one is
    UTC); TypeError or ValueError, with its name, if it is none."""
    kinds, expected = _TIMES[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name}={_repr(value, 60)}: expected {expected}")
    try:
        if isinstance(value, (int, float)):
            value = timedelta(seconds=value)
        if isinstance(value, timedelta):
            return datetime.now(timezone.utc) + value
        when = value if isinstance(value, datetime) else _parse_time(value)
        return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(f"{name}={value!r} is out of range") from None
    except ValueError:
        raise ValueError(f"{name}={value!r}: expected {expected}") from None


def _due(eta: Any, countdown: Any) -> datetime | None:
    """Return the time that an eta, or else a countdown, means; None is now."""
    if eta is not None:
        return _moment("eta", eta)
    return _moment("countdown", countdown) if countdown or countdown == "" else None


def _encode_call(
    headers: Any, properties: Any, payload: Any, serializer: str
) -> tuple[Message, str]:
    """Return a call's message and its text; EncodeError that names what cannot be serialized."""
    name = headers["task"]
    try:
        content_type, encoding, body = serialize(payload, serializer)
        message = Message(headers, properties, body, content_type, encoding)
        return message, message.encode()
    except (TypeError, ValueError) as exc:
        raise EncodeError(f"{name}: a header cannot be serialized: {exc}") from exc
    except EncodeError as exc:
        for place, value in [*enumerate(payload[0], 1), *payload[1].items()]:
            try:
                serialize(value, serializer)
            except EncodeError as own:
                raise EncodeError(
                    f"{name}: argument {place!r} cannot be serialized: {own}"
                ) from exc
        raise EncodeError(f"{name}: {exc}") from exc


@functools.lru_cache(maxsize=None)
def _hostname() -> str:
    import socket

    return socket.gethostname()


@functools.lru_cache(maxsize=None)
def _origin(pid: int) -> str:
    """Return a process's name as a producer: 'gen4711@host'."""
    return f"gen{pid}@{_hostname()}"


def _meta(id: str, state: str, result: Any, request: Any, traceback: Any = None) -> dict[str, Any]:
    """Return a result's meta as Celery has it."""
    done = state in READY_STATES
    meta = {
        "status": state,
        "result": result,
        "traceback": traceback,
        "children": [],
        "date_done": datetime.now(timezone.utc).isoformat() if done else None,
        "task_id": id,
    }
    if request.group:
        meta["group_id"] = request.group
    if request.parent_id:
        meta["parent_id"] = request.parent_id
    return meta


# ---------------------------------------------------------------------------------------------
# 10. Execution
# ---------------------------------------------------------------------------------------------


class ExceptionInfo:
    """An exception as handlers and signals get it: `str(einfo)` is the traceback.

    The frames of this file that called the task are left out.
    """

    internal = False

    def __init__(self, exc: BaseException) -> None:
        import traceback

        tb = exc.__traceback__
        while tb is not None and tb.tb_next is not None and tb.tb_frame.f_globals is globals():
            tb = tb.tb_next
        self.type, self.exception, self.tb = type(exc), exc, tb
        self.exc_info = (self.type, exc, tb)
        self.traceback = "".join(traceback.format_exception(*self.exc_info))

    def __str__(self) -> str:
        return self.traceback

    def __repr__(self) -> str:
        return f"<ExceptionInfo: {self.exception!r}>"


#: What `run_task` has to tell: the state, the return value or exception, the meta text to store
#: (None: nothing), the traceback, and the seconds that it took.
Run = collections.namedtuple("Run", "state value meta traceback runtime")


def run_task(task: Any, request: Context, propagate: bool = False) -> Run:
    """Run a task as its request says, with its handlers, signals and log lines.

    With `propagate` its error is raised. Knows no broker: the same in a child process, a thread,
    and eager mode.
    """
    id, args, kwargs = request.id or "", request.args, request.kwargs
    cls = type(task)
    stack = _thread.stack
    stack.append((task, request))
    started = time.monotonic()
    state, value, run = SUCCESS, None, None
    try:
        if task_prerun.receivers:
            task_prerun.send(sender=task, task_id=id, task=task, args=args, kwargs=kwargs)
        if task.track_started and not request.is_eager and not _ignores_result(task, request):
            meta = {"pid": os.getpid(), "hostname": request.hostname}
            text = _encode_result(task.app, request, STARTED, meta)
            with contextlib.suppress(OperationalError):  # it only says so
                task.app.backend.put_results([(id, STARTED, text)])
        try:
            if cls.before_start is not Task.before_start:
                task.before_start(id, args, kwargs)
            call = task.run if cls.__call__ is Task.__call__ else task
            value = call(*args, **kwargs)
            run = _succeeded(task, request, value, started)
        except (SystemExit, KeyboardInterrupt):
            raise  # the process ends; see `lost`
        except BaseException as exc:
            if propagate and not isinstance(exc, (Retry, Ignore, Reject)):
                raise
            value = exc
            run = _failed(task, request, exc, started)
        state = run.state
        if cls.after_return is not Task.after_return and state in READY_STATES:
            einfo = ExceptionInfo(value) if state != SUCCESS else None
            _guarded(task, request, "after_return", state, value, id, args, kwargs, einfo)
        return run
    finally:
        try:
            if task_postrun.receivers:
                named = {"task_id": id, "task": task, "args": args, "kwargs": kwargs}
                task_postrun.send(sender=task, retval=value, state=state, **named)
        finally:
            stack.pop()


def _ignores_result(task: Any, request: Context) -> bool:
    """Return whether this call keeps no result; what the call says stands above the task."""
    if request.is_eager and not task.store_eager_result:
        return True
    asked = request.__dict__.get("ignore_result")
    return task.ignore_result if asked is None else asked


def _succeeded(task: Any, request: Context, value: Any, started: float) -> Run:
    """Make the meta of a return value (EncodeError if it cannot be), then tell handlers and log."""
    text = None
    if not _ignores_result(task, request):
        text = _encode_result(task.app, request, SUCCESS, value)
    runtime = time.monotonic() - started
    if type(task).on_success is not Task.on_success:
        _guarded(task, request, "on_success", value, request.id, request.args, request.kwargs)
    if task_success.receivers:
        task_success.send(sender=task, result=value, runtime=runtime)
    if trace_logger.isEnabledFor(logging.INFO):
        shown = {"runtime": runtime, "return_value": _repr(value, task.resultrepr_maxsize)}
        message = "Task %(name)s[%(id)s] succeeded in %(runtime)ss: %(return_value)s"
        trace_logger.info(message, {**_log_names(task, request), **shown})
    return Run(SUCCESS, value, text, None, runtime)


def _failed(task: Any, request: Context, exc: Any, started: float) -> Run:
    """Make the meta of whatever a task has raised, then tell handlers, signals and log."""
    einfo = ExceptionInfo(exc)
    keeps, stored, shown = not _ignores_result(task, request), exc, _repr(exc)
    if isinstance(exc, Retry):
        state, level, message = RETRY, logging.INFO, "retry: %(exc)s"
        stored, shown = exc.exc, str(exc)
    elif isinstance(exc, Ignore):
        state, level, message, keeps = IGNORED, logging.INFO, "ignored", False
    elif isinstance(exc, Reject):
        state, level, message = REJECTED, logging.WARNING, "%(exc)s"
        keeps = keeps and not exc.requeue
    else:
        state, level, message = FAILURE, logging.ERROR, "raised unexpected: %(exc)s"
        keeps = keeps or task.store_errors_even_if_ignored
        if task.throws and isinstance(exc, task.throws):
            level, message = logging.INFO, "raised expected: %(exc)s"
    text = None
    if keeps:
        end = FAILURE if state == REJECTED else state
        text = _encode_result(task.app, request, end, stored, einfo.traceback)
    if state == RETRY:
        _guarded(task, request, "on_retry", exc.exc, *_call_of(request), einfo)
        task_retry.send(sender=task, request=request, reason=exc, einfo=einfo)
    elif state == FAILURE:
        announce_failure(task, request, exc, einfo)
    if trace_logger.isEnabledFor(level):
        exc_info = einfo.exc_info if level >= logging.WARNING else None
        data = {**_log_names(task, request), "exc": shown}
        trace_logger.log(level, f"Task %(name)s[%(id)s] {message}", data, exc_info=exc_info)
    return Run(state, exc, text, einfo.traceback, time.monotonic() - started)


def _call_of(request: Context) -> tuple[str, Any, Any]:
    return request.id or "", request.args, request.kwargs


def _log_names(task: Any, request: Context) -> dict[str, Any]:
    return {"id": request.id, "name": request.shadow or task.name}


def announce_failure(task: Any, request: Context, exc: Any, einfo: Any) -> None:
    """Tell the task's handler and the receivers of `task_failure`."""
    id, args, kwargs = _call_of(request)
    _guarded(task, request, "on_failure", exc, id, args, kwargs, einfo)
    named = {"task_id": id, "args": args, "kwargs": kwargs, "einfo": einfo}
    task_failure.send(sender=task, exception=exc, traceback=exc.__traceback__, **named)


def _guarded(task: Any, request: Context, handler: str, *args: Any) -> None:
    """Call a task's handler; the outcome is decided, so its error is logged and changes nothing."""
    try:
        getattr(task, handler)(*args)
    except Exception as exc:
        if request.is_eager:
            raise
        message = "Task %s[%s] %s handler raised: %r"
        trace_logger.exception(message, task.name, request.id, handler, exc)


def _encode_result(
    app: TaskQ, request: Context, state: str, value: Any, traceback: str | None = None
) -> str:
    """Return the meta text of a state; EncodeError if a return value cannot be serialized."""
    if isinstance(value, BaseException) and app.conf.result_serializer == "json":
        value = encode_exception(value)
    meta = _meta(request.id or "", state, value, request, traceback)
    if app.conf.result_extended:
        info = request.delivery_info or {}
        meta.update(name=request.task, worker=request.hostname, queue=info.get("routing_key"))
        meta.update(args=request.args, kwargs=request.kwargs, retries=request.retries)
    try:
        return _encode_meta(app, meta)
    except EncodeError as exc:
        cause = exc
    for name in {"args", "kwargs"} & meta.keys():  # of a pickled message: JSON may not hold them
        meta[name] = request.get(f"{name}repr") or _repr(meta[name])
    if state != SUCCESS:
        meta["result"] = encode_exception(Exception(_repr(value)))
    try:
        return _encode_meta(app, meta)
    except EncodeError:
        raise EncodeError(f"the result of {request.task} cannot be serialized: {cause}") from None


def execute(app: TaskQ, raw: bytes, hostname: str, begin: Callable[[Any, Context], Any]) -> Outcome:
    """Turn one message into its Outcome; `begin(task, request)` is called before the task runs.

    A message that no task can be made of is rejected; whatever else goes wrong is a failure.
    """
    began = time.monotonic()
    message = request = task = None
    try:
        message = Message.decode(raw)
        args, kwargs, embed = message.payload(app.conf.accept_content)
        request = request_of(message, args, kwargs, embed, hostname)
        task = app.tasks.get(request.task)
        if task is None:
            return _unregistered(app, message, request)
        expires = message.expires
        if expires is not None and expires <= time.time():
            return revoked(app, request, "expired")
        if any(embed.get(key) for key in ("callbacks", "errbacks", "chain", "chord")):
            return failure(app, request, _unavailable("a message with callbacks"), task)
        begin(task, request)
        run = run_task(task, request)
        return _outcome(task, request, run, raw, time.monotonic() - began)
    except SoftTimeLimitExceeded:
        raise  # too late for the task; whoever set the limit takes it
    except Exception as exc:
        if task is not None and request is not None:
            return failure(app, request, exc, task)
        outcome = rejected(raw, exc)
        if message is None or message.headers.get("ignore_result"):
            return outcome
        about = Context(id=message.id, task=message.headers["task"])
        text = _encode_result(app, about, FAILURE, InvalidTaskError(outcome.reason))
        return outcome._replace(results=[(message.id, FAILURE, text)])


def _outcome(task: Any, request: Context, run: Run, raw: bytes, runtime: float) -> Outcome:
    """Say what becomes of the message of a task that has run."""
    verb, reason, state = "ack", None, run.state
    if state == REJECTED:
        verb = "requeue" if run.value.requeue else "reject"
        reason = redelivered(raw) if verb == "requeue" else _repr(run.value)
        state = FAILURE
    elif state == FAILURE and task.acks_late and not task.acks_on(timeout=False):
        verb, reason = "reject", f"failed, and acks_on_failure is off: {_repr(run.value, 200)}"
    results = [] if run.meta is None else [(request.id, state, run.meta)]
    return Outcome(verb, results, request.follow_ups, reason, runtime)


def redelivered(raw: bytes) -> str:
    """Return a message's text, marked as delivered once more."""
    message = Message.decode(raw)
    message.headers["redelivered"] = True
    info = message.properties.get("delivery_info") or {}
    message.properties["delivery_info"] = {**info, "redelivered": True}
    if message.content_type == "application/json":
        message.properties.pop("body_encoding", None)
    return message.encode()


def rejected(raw: bytes, exc: Exception) -> Outcome:
    """Return the end of a message that no task can be made of: it is kept for inspection."""
    reason = str(exc) if isinstance(exc, MalformedMessage) else _repr(exc)
    text = "Received and rejected a malformed message: %s\nIt is kept with the rejected ones: %s"
    worker_logger.error(text, reason, _repr(raw, 200))
    task_rejected.send(sender=None, message=raw, exc=exc)
    return Outcome("reject", [], [], reason, 0.0)


def failure(app: TaskQ, request: Context, exc: BaseException, task: Any) -> Outcome:
    """Return the end of a task that fails without having run to its end here."""
    results = []
    ignored = bool(request.ignore_result) if task is None else _ignores_result(task, request)
    if not ignored or (task is not None and task.store_errors_even_if_ignored):
        results.append((request.id, FAILURE, _encode_result(app, request, FAILURE, exc)))
    if task is not None:
        announce_failure(task, request, exc, ExceptionInfo(exc))
    return Outcome("ack", results, [], _repr(exc, 200), 0.0)


def _unregistered(app: TaskQ, message: Message, request: Context) -> Outcome:
    name, known = request.task, ", ".join(sorted(app.tasks)) or "no tasks"
    text = (
        "Received unregistered task of type %r.\nThe message has been ignored and discarded.\n"
        "Did you remember to import the module containing this task?\nThis worker knows: %s"
    )
    worker_logger.error(text, name, known)
    exc = NotRegistered(name)
    task_unknown.send(sender=None, message=message, exc=exc, name=name, id=message.id)
    return failure(app, request, exc, None)


def revoked(app: TaskQ, request: Context, reason: str) -> Outcome:
    """Return the end of a task that expired or was revoked before it began."""
    task = app.tasks.get(request.task)
    trace_logger.info("Discarding revoked task: %s[%s]", request.task, request.id)
    how = {"terminated": False, "signum": None, "expired": reason == "expired"}
    task_revoked.send(sender=task, request=request, **how)
    results = []
    if task is None or not _ignores_result(task, request):
        text = _encode_result(app, request, REVOKED, TaskRevokedError(reason))
        results.append((request.id, REVOKED, text))
    return Outcome("ack", results, [], reason, 0.0)


def runs_again(claim: Claim, flags: int, worker_died: bool) -> bool:
    """Return whether a task that had begun when its process died is put back.

    A late one is where the whole worker died, as a broker would deliver it again, and with
    `reject_on_worker_lost` also where only its process did. One that died while its message was
    being read gets a second chance, but no third.
    """
    if flags == DECODING:
        try:
            return not (claim.message.properties.get("delivery_info") or {}).get("redelivered")
        except MalformedMessage:
            return False
    return bool(flags & ACKS_LATE and (worker_died or flags & REJECT_ON_LOST))


def lost(app: TaskQ, claim: Claim, exc: BaseException, again: bool) -> Outcome:
    """Return the end of a task whose process died: with `again` it is put back, else FAILURE."""
    try:
        if again:
            return Outcome("requeue", [], [], redelivered(claim.raw), 0.0)
        args, kwargs, embed = (), {}, {}  # type: Any, Any, Any
        if claim.message.content_type == CONTENT_TYPES["json"]:  # a pickle may kill us too
            args, kwargs, embed = claim.message.payload(app.conf.accept_content)
    except MalformedMessage as bad:
        return rejected(claim.raw, bad)
    request = request_of(claim.message, args, kwargs, embed, _hostname())
    name = claim.message.headers["task"]
    worker_logger.error("Task %s[%s] lost its process: %r", name, request.id, exc)
    return failure(app, request, exc, app.tasks.get(name))


# ---------------------------------------------------------------------------------------------
# 11. Pools
# ---------------------------------------------------------------------------------------------

#: How long a child should be busy with what it is handed at once, in seconds.
_BATCH_SECONDS = 0.02
#: How many tasks that are at most: their tokens fit into one page, so that no pipe is ever full.
_BATCH_MAX = 160
#: A child that has finished nothing for so long does not keep other tasks waiting.
_STUCK_SECONDS = 0.01
#: How often the main process looks at its children at least, in seconds.
_LOOK_SECONDS = 1.0
#: Bytes of a slot's ring of outcomes; a larger outcome than half of it goes to a file.
_RING_SIZE = 65536


class Pool:
    """Runs what the worker has claimed. `submit` takes claims, `collect` returns outcomes.

    worker: its app, hostname, journal, bell and options. A claim is held from `submit` until
    `collect` returns it; `settled` says that what was collected is safely in the store.
    """

    #: Whether tasks run in processes of their own, which `--time-limit` can end.
    kills = False

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker = worker
        self.size = size
        self.held: dict[int, Claim] = {}  # by ticket
        self.waiting: collections.deque[Claim] = collections.deque()  # those not handed out yet
        self.stopping = False
        self._read: list[tuple[Slot, int]] = []
        self._task_time = 0.0  # moving average, in seconds; 0: none seen yet

    def start(self) -> None:
        """Start processes or threads."""
        self._deal()

    def submit(self, claims: Sequence[Claim]) -> None:
        """Take claims to run."""
        self.held.update((claim.ticket, claim) for claim in claims)
        self.waiting.extend(claims)
        self._deal()

    def _deal(self) -> None:
        """Hand out what waits."""

    def collect(self) -> list[tuple[Claim, Any]]:
        """Return claims that have come to an end, with their outcomes."""
        finished = []
        for slot in self.slots():
            if not slot.fresh:
                continue
            outcomes, end = slot.read()
            self._read.append((slot, end))
            for ticket, outcome in outcomes:
                claim = self.held.pop(ticket, None)
                if claim is not None:
                    weight = 0.1 if self._task_time else 1.0
                    self._task_time += (outcome.runtime - self._task_time) * weight
                    finished.append((claim, outcome))
        return finished

    def settled(self) -> None:
        """Forget the outcomes that `collect` returned."""
        for slot, end in self._read:
            slot.consume(end)
        self._read.clear()

    def slots(self) -> Iterable[Slot]:
        """Return the slots that outcomes may be in."""
        return self.worker.journal.slots

    @property
    def depth(self) -> int:
        """How many tasks to hand to one process at once: 1 unless they are tiny."""
        if not self._task_time:
            return 1
        return max(1, min(_BATCH_MAX, int(_BATCH_SECONDS / self._task_time)))

    def room(self) -> int:
        """Return how many more messages to claim: Celery's prefetch, more while tasks are tiny."""
        conf = self.worker.app.conf
        if conf.worker_disable_prefetch:
            return self.size - len(self.held)
        wanted = self.size * max(conf.worker_prefetch_multiplier or 10, 2 * self.depth)
        free = wanted - len(self.held)
        return free if free * 4 >= wanted or self.depth == 1 else 0  # no small claims under load

    def tick(self, now: float) -> float:
        """Do what time asks for; return the seconds until the next call is wanted."""
        return _LOOK_SECONDS

    def nap(self) -> float:
        """Return the seconds for which outcomes may gather before the next batch; 0 if idle."""
        return 0.0

    def linger(self) -> None:
        """Stay awake for the end of tasks so short that falling asleep would take longer."""

    def running(self) -> dict[int, Slot]:
        """Return {ticket: slot} of what has begun."""
        return {slot.begun[0]: slot for slot in self.slots() if slot.begun[0]}

    def take_back(self) -> list[Claim]:
        """Return the claims that have not begun; they are held no more."""
        back = []
        with contextlib.suppress(IndexError):
            while True:  # threads take from it at the same time
                back.append(self.waiting.popleft())
        for claim in back:
            del self.held[claim.ticket]
        return back

    def stop(self) -> None:
        """Stop processes or threads that have nothing to do any more."""

    def kill(self) -> None:
        """Stop them at once, whatever they do."""


def _run_claim(worker: Any, slot: Slot, ticket: int, raw: bytes) -> None:
    """Execute a message in this thread and note its outcome; nothing a task does gets past."""
    app, bell, in_child, pid = worker.app, worker.bell, worker.pool.kills, os.getpid()
    outcome: Outcome | None = None
    unlimit: Callable[[], None] | None = None

    def begin(task: Any, request: Context) -> None:
        nonlocal unlimit
        flags = ACKS_LATE if task.acks_late else 0
        if flags and task.reject_on_worker_lost:
            flags |= REJECT_ON_LOST
        hard, soft = request.timelimit or (None, None)
        hard, soft = hard or task.time_limit, soft or task.soft_time_limit
        if not (soft or hard):
            slot.begin(ticket, flags)
            return
        now = time.monotonic()
        slot.begin(ticket, flags, soft and now + soft or 0.0, hard and now + hard or 0.0)
        if in_child:  # the main process keeps them, and looks by itself if there is time
            unlimit = functools.partial(slot.begin, ticket, flags)
            if min(soft or hard, hard or soft) < _LOOK_SECONDS:
                bell.ring()
        elif soft and worker.pool_name in ("solo", "threads"):
            unlimit = _SoftLimit(soft).cancel

    slot.begin(ticket, DECODING)
    try:
        try:
            outcome = execute(app, raw, worker.hostname, begin)
        finally:
            if unlimit is not None:
                unlimit()
    except BaseException as exc:
        if isinstance(exc, WorkerTerminate) or in_child and not isinstance(exc, Exception):
            raise
        _thread.stack.clear()
        if outcome is None:  # else it is a soft limit that came just too late
            error = exc if isinstance(exc, Exception) else WorkerLostError(f"Task raised {exc!r}")
            outcome = lost(app, Claim(None, ticket, "", 0, raw), error, again=False)
    if os.getpid() != pid:  # the task has forked, and returns in the other process too
        os._exit(0)
    slot.finish(ticket, _json_encode(outcome).encode(), bell.ring)
    if bell.asleep:
        bell.ring()


class _SoftLimit(threading.Timer):
    """Raises SoftTimeLimitExceeded in the thread that makes it, until it is cancelled."""

    def __init__(self, seconds: float) -> None:
        super().__init__(min(seconds, threading.TIMEOUT_MAX), self.fire)
        self.daemon = True
        self.limited = threading.current_thread()
        self.lock = threading.Lock()
        self.start()

    def fire(self) -> None:
        """Raise it; in the main thread also out of a system call."""
        with self.lock:
            if not self.finished.is_set():
                self._set(SoftTimeLimitExceeded)
        if self.limited is threading.main_thread() and hasattr(signal, "pthread_kill"):
            # Any signal that has a handler: the exception is raised in there, and so ends the call.
            signal.pthread_kill(self.limited.ident or 0, signal.SIGCHLD)

    def cancel(self) -> None:
        """From now on raise nothing."""
        with self.lock:
            super().cancel()
            self._set(None)

    def _set(self, exc: Any) -> None:
        import ctypes

        ident = ctypes.c_ulong(self.limited.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, exc and ctypes.py_object(exc))


class SoloPool(Pool):
    """Runs tasks one by one in the worker's own thread."""

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, 1)

    def collect(self) -> list[tuple[Claim, Any]]:
        """Run tasks for some milliseconds, at least one."""
        until = time.monotonic() + _BATCH_SECONDS
        with denied_join_result():
            slot = self.worker.journal.slots[0]
            while self.waiting and slot.has_room:  # this thread would have to make room itself
                claim = self.waiting.popleft()
                _run_claim(self.worker, slot, claim.ticket, claim.raw)
                if time.monotonic() > until:
                    break
        return super().collect()


class ThreadPool(Pool):
    """Runs tasks in threads; under gevent's or eventlet's patching, in greenlets."""

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self._ready = threading.Semaphore(0)  # once for each claim, and for each thread at the end
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        for slot in self.worker.journal.slots:
            name = f"ThreadPoolExecutor-0_{slot.index}"
            thread = threading.Thread(target=self._work, args=(slot,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, slot: Slot) -> None:
        with denied_join_result():
            while self._ready.acquire():
                try:
                    claim = self.waiting.popleft()
                except IndexError:  # it was taken back, or this is the end
                    if self.stopping:
                        return
                    continue
                try:
                    _run_claim(self.worker, slot, claim.ticket, claim.raw)
                except BaseException:
                    worker_logger.exception("A thread of the pool failed")
                if not (self.waiting or self.worker.bell.awake):
                    self.worker.bell.ring()

    def submit(self, claims: Sequence[Claim]) -> None:
        """Queue claims for the first thread that is free."""
        super().submit(claims)
        self._ready.release(len(claims))

    def nap(self) -> float:
        """Return half of the time that what is held will take."""
        return min(0.005, len(self.held) * self._task_time / self.size / 2)

    def stop(self) -> None:
        """Let each thread end."""
        self.stopping = True
        self._ready.release(len(self._threads))
        for thread in self._threads:
            thread.join()


_TOKEN = struct.Struct("<QQQ")  # ticket (0: stop), offset and length of the payload in the spool
_STOP = _TOKEN.pack(0, 0, 0)


class Spool:
    """A file without a name that holds the payloads of tokens, written once, read by any child."""

    def __init__(self, path: str) -> None:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("taskq")
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.unlink(path)
        self.file = open(fd, "wb")
        self._regions: list[tuple[int, int, list[int]]] = []  # start, end, tickets; in order

    def write(self, claims: Sequence[Claim], held: dict[int, Claim]) -> list[bytes]:
        """Write payloads into the first gap that takes them, and return their tokens.

        held: by ticket, the claims whose payloads may still be read.
        """
        self._regions = [r for r in self._regions if any(t in held for t in reversed(r[2]))]
        tickets = [claim.ticket for claim in claims]
        sizes = [len(claim.raw) for claim in claims]
        start = 0
        for begin, end, _ in self._regions:
            if begin - start >= sum(sizes):
                break
            start = end
        *offsets, end = itertools.accumulate(sizes, initial=start)
        self._regions = sorted([*self._regions, (start, end, tickets)])
        self.file.seek(start)
        self.file.write(b"".join(claim.raw for claim in claims))
        self.file.flush()
        return list(map(_TOKEN.pack, tickets, offsets, sizes))


class Child:
    """One process of the prefork pool, seen from the worker's main process."""

    def __init__(self, slot: Slot, name: str, generation: int) -> None:
        self.slot = slot
        self.name = name
        self.generation = generation  # of the app's tasks
        self.pid = 0
        self.status = 0  # how it ended
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.given: list[Claim] = []  # handed over and not finished, in this order
        self.done = 0  # how many it had finished when last looked at
        self.since = 0.0  # when it began the one after that
        self.retired = False  # gets no more tasks
        self.warned = 0  # the ticket whose soft limit it was told of
        self.limit: float | None = None  # the hard limit for which it was killed

    def is_stuck(self, now: float) -> bool:
        """See what it has finished; return whether it has kept the rest waiting for too long."""
        finished = self.slot.executed - self.done
        if finished:
            del self.given[:finished]
            self.done += finished
            self.since = now
        return bool(self.given) and now - self.since > _STUCK_SECONDS

    def put(self, tokens: Sequence[bytes]) -> None:
        """Hand over tokens."""
        step = select.PIPE_BUF // _TOKEN.size  # what the kernel writes at once
        for at in range(0, len(tokens), step):
            os.write(self.writer, b"".join(tokens[at : at + step]))

    def take_back(self) -> list[Claim]:
        """Take back what it has not begun: each token reaches one reader, it or this process."""
        unread = b""
        if not self.retired:
            with contextlib.suppress(BlockingIOError):
                unread = os.read(self.reader, _TOKEN.size * _BATCH_MAX)
        kept = len(self.given) - len(unread) // _TOKEN.size
        back = self.given[kept:]
        del self.given[kept:]
        return back

    def retire(self) -> None:
        """Let it end after what it has begun; its other tasks have been taken back."""
        if not self.retired:
            self.retired = True
            self.put([_STOP])

    def kill(self, signum: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):  # somebody else has waited for it
            os.kill(self.pid, signum)

    def close(self, keep: int = -1) -> None:
        """Close the token pipe, but for the end that a child itself reads."""
        for fd in {self.reader, self.writer} - {keep}:
            os.close(fd)


class PreforkPool(Pool):
    """Runs tasks in child processes.

    A child begins a task by reading its token from a pipe that the main process can read too: what
    a busy child has not begun is taken back and given to another, and the kernel sees to it that a
    token reaches one of them.
    """

    kills = True

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self.children: list[Child] = []
        self._dead: list[Child] = []  # until their outcomes are settled
        self._spool = Spool(f"{worker.journal.path}.spool")
        self._numbers = itertools.count(1)
        self._started = 0.0  # when children were started the last time
        self._futile = 0  # how many have died since without having executed anything

    # -- processes -------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Retire children that do not know the newest tasks, and start others up to the pool's
        size, as far as there are slots: a dead one's is taken until its outcomes are settled."""
        if self.worker.renews_children:
            for child in self.children:
                if child.generation != self.worker.app.generation:
                    self._unload(child)
                    child.retire()
        missing = self.size - sum(not child.retired for child in self.children)
        now = time.monotonic()
        if missing <= 0 or self.stopping or self._futile > 2 and now - self._started < 1.0:
            return
        self._started = now
        used = {child.slot for child in self.children + self._dead}
        free = [slot for slot in self.worker.journal.slots if slot not in used]
        for slot in free[:missing]:
            self._start_child(slot)

    def _unload(self, child: Child) -> None:
        self.waiting.extendleft(reversed(child.take_back()))

    def _start_child(self, slot: Slot) -> None:
        import warnings

        worker = self.worker
        slot.clear()
        name = f"{worker.start_method.title()}PoolWorker-{next(self._numbers)}"
        child = Child(slot, name, worker.app.generation)
        order = (name, slot.index, child.reader, self._spool.file.fileno())
        _flush_output()
        if worker.start_method == "spawn":
            child.pid = _spawn(worker, order)
        else:
            with warnings.catch_warnings():  # Python 3.12 warns of forking beside other threads
                warnings.simplefilter("ignore", DeprecationWarning)
                child.pid = os.fork()
            if not child.pid:
                _be_child(worker, *order, inherited=(child, *self.children))
        self.children.append(child)

    def _bury(self, child: Child) -> list[tuple[Claim, Any]]:
        """Return the task that a dead child was running, with its end; give the others back."""
        begun, flags = child.slot.begun
        running = self.held.pop(begun, None)
        left = [claim for claim in child.given if claim.ticket in self.held]
        self.waiting.extendleft(reversed(left))
        how = _describe_exit(child.status)
        futile = child.status and not running and not child.slot.executed
        self._futile = self._futile + 1 if futile else 0
        if child.status and child.limit is None:
            worker_logger.error("Process %r pid:%d exited with %r", child.name, child.pid, how)
        if running is None:
            return []
        app = self.worker.app
        if child.limit is not None:
            exc: Exception = TimeLimitExceeded(child.limit)
            task = app.tasks.get(running.message.headers["task"])
            again = bool(flags & ACKS_LATE) and task is not None and not task.acks_on(timeout=True)
        else:
            exc = WorkerLostError(f"Worker exited prematurely: {how}.")
            again = runs_again(running, flags, worker_died=False)
        return [(running, lost(app, running, exc, again))]

    def slots(self) -> Iterable[Slot]:
        """Return those of living children, and of dead ones that are not settled."""
        return [child.slot for child in self._dead + self.children]

    # -- claims ----------------------------------------------------------------------------------

    def collect(self) -> list[tuple[Claim, Any]]:
        """Return outcomes, also those of tasks whose process has died."""
        dead = self._reap()
        finished = super().collect()
        for child in dead:
            finished += self._bury(child)
        self._deal()
        return finished

    def _reap(self) -> list[Child]:
        """Return the children that have died since the last time."""
        dead = []
        for child in self.children[:]:
            try:
                pid, child.status = os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                pid = child.pid
            if pid:
                self.children.remove(child)
                child.close()
                dead.append(child)
        self._dead += dead
        return dead

    def settled(self) -> None:
        """Forget outcomes; the slots of dead children are free again."""
        super().settled()
        self._dead.clear()

    def _deal(self) -> None:
        """Hand waiting claims to children: first to idle ones, then evenly; what a stuck one has
        not begun goes to others."""
        self._refill()
        now, depth = time.monotonic(), self.depth
        for child in self.children:
            if child.is_stuck(now) and len(child.given) > 1:
                self._unload(child)
        while self.waiting:
            able = [child for child in self.children if len(child.given) < depth
                    and not child.retired and not child.is_stuck(now)]  # fmt: skip
            if not able:
                return
            child = min(able, key=lambda child: len(child.given))
            count = min(-(-len(self.waiting) // len(able)), depth - len(child.given))
            claims = [self.waiting.popleft() for _ in range(count)]
            if not child.given:
                child.since = now
            child.given += claims
            child.put(self._spool.write(claims, self.held))

    def take_back(self) -> list[Claim]:
        """Return what waits here and in the children's pipes."""
        for child in self.children:
            self._unload(child)
        return super().take_back()

    # -- time ------------------------------------------------------------------------------------

    def nap(self) -> float:
        """Return half of the time for which the least busy child has work."""
        least = min((len(child.given) for child in self.children), default=0)
        return min(0.005, least * self._task_time / 2)

    def linger(self) -> None:
        """Let the children run for some task times, at most 0.2 ms, or until one has finished."""
        until = time.perf_counter() + min(0.0002, 4 * self._task_time)
        slots = list(self.slots()) if self._task_time < 0.0002 else ()
        while slots and time.perf_counter() < until and not any(slot.fresh for slot in slots):
            _yield_cpu()

    def tick(self, now: float) -> float:
        """Keep time limits; return the seconds until a child may be stuck or a limit is due."""
        wanted = _LOOK_SECONDS
        for child in self.children:
            wanted = min(wanted, self._keep_limits(child))
            if len(child.given) > 1:
                wanted = min(wanted, _STUCK_SECONDS)
        return wanted

    def _keep_limits(self, child: Child) -> float:
        """Keep the time limits of what a child runs; return the seconds until the next is due."""
        if child.limit is not None:  # it is dying
            return _STUCK_SECONDS
        ticket, (began, soft, hard) = child.slot.begun[0], child.slot.times
        claim, now = self.held.get(ticket), time.monotonic()
        if claim is None:
            return _LOOK_SECONDS
        if hard and now >= hard:
            self._unload(child)
            if child.slot.begun[0] == ticket:  # then there is nothing else that it could begin
                child.kill(signal.SIGKILL)
                child.retired, child.limit = True, _log_limit("Hard", hard - began, claim)
            return _STUCK_SECONDS
        if soft and now >= soft and child.warned != ticket:
            child.kill(signal.SIGUSR1)
            child.warned = ticket
            _log_limit("Soft", soft - began, claim)
        return min((limit - now for limit in (soft, hard) if limit > now), default=_LOOK_SECONDS)

    # -- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let the children end, and wait for them; kill those that take more than 10 seconds."""
        for child in self.children:
            child.retire()
        self.kill(patience=10)

    def kill(self, patience: float = 0.0) -> None:
        """Kill the children; what they have finished can still be collected."""
        self.stopping = True
        until = time.monotonic() + patience
        while self.children:
            for child in self.children if time.monotonic() >= until else ():
                child.kill(signal.SIGKILL)
            time.sleep(0.002)
            self._reap()
        self._spool.file.close()


def _log_limit(kind: str, seconds: float, claim: Claim) -> float:
    """Log that a time limit has passed; return it as it was given."""
    seconds = round(seconds, 3)
    seconds = int(seconds) if seconds == int(seconds) else seconds
    headers = claim.message.headers
    level = logging.ERROR if kind == "Hard" else logging.WARNING
    text = "%s time limit (%ss) exceeded for %s[%s]"
    worker_logger.log(level, text, kind, seconds, headers["task"], headers["id"])
    return seconds


def _describe_exit(status: int) -> str:
    """Return how a process ended: 'signal 9 (SIGKILL)' or 'exitcode 1'."""
    if not os.WIFSIGNALED(status):
        return f"exitcode {os.WEXITSTATUS(status)}"
    names = {int(known): known.name for known in signal.Signals}
    return f"signal {os.WTERMSIG(status)} ({names.get(os.WTERMSIG(status), '?')})"


def _flush_output() -> None:
    for name in ("stdout", "stderr"):
        with contextlib.suppress(Exception):  # it is closed, or None, or deleted
            getattr(sys, name).flush()


#: What the log calls this process.
_process_name = "MainProcess"


def _be_child(
    worker: Any, name: str, index: int, reader: int, spool: int, inherited: Sequence[Child] = ()
) -> NoReturn:
    """Be a child of the pool: execute tasks until told to stop, and end this process."""
    global _process_name
    _process_name = name
    slot, status = worker.journal.slots[index], 1

    def soft_limit(signum: int, frame: Any) -> None:
        if 0 < slot.times[1] <= time.monotonic():  # else the task that was meant has ended
            raise SoftTimeLimitExceeded()

    try:
        _die_with_parent(worker.pid)
        _thread.stack.clear()
        for other in inherited:
            other.close(reader)
        worker.journal.lock(index)
        signal.set_wakeup_fd(-1)
        for kind in ("TERM", "QUIT", "HUP", "CHLD", "ALRM"):
            signal.signal(getattr(signal, "SIG" + kind), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, soft_limit)
        worker_process_init.send(sender=None)
        status = _work(worker, slot, reader, spool)
        worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=status)
    except BaseException:
        worker_logger.exception("A child process failed")
    finally:
        _flush_output()
        os._exit(status & 0xFF)


def _work(worker: Any, slot: Slot, reader: int, spool: int) -> int:
    """Execute tasks until told to stop; return the exit status."""
    conf = worker.app.conf
    most, memory = conf.worker_max_tasks_per_child, conf.worker_max_memory_per_child
    try:
        with denied_join_result():
            while True:
                ticket, offset, length = _next_token(slot, reader, worker.bell)
                if not ticket:
                    return 0
                _run_claim(worker, slot, ticket, os.pread(spool, length, offset))
                if most and slot.executed >= most or memory and _peak_memory() > memory:
                    return 0
    except SystemExit as exc:  # from a task
        return exc.code if isinstance(exc.code, int) else bool(exc.code)
    finally:
        if slot.fresh:
            worker.bell.ring()


def _next_token(slot: Slot, reader: int, bell: Bell) -> Any:
    """Wait for the next token, waking the main process if there is none but outcomes are."""
    while True:
        try:
            return _TOKEN.unpack(os.read(reader, _TOKEN.size) or _STOP)
        except BlockingIOError:
            if slot.fresh and not bell.awake:
                bell.ring()
            _flush_output()
            _readable(reader, 60.0)


def _peak_memory() -> float:
    """Return the most memory that this process has had, in KiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def _die_with_parent(parent: int) -> None:
    """See to it that this process does not outlive its parent, even in C code."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != parent:  # it died before this was set up
        os._exit(1)


def _spawn(worker: Worker, order: Sequence[Any]) -> int:
    """Start a child in a fresh interpreter; it finds the app by name. Returns its pid."""
    import subprocess

    main = vars(sys.modules["__main__"])
    source = {"init_main_from_path": main["__file__"]} if "__file__" in main else {}
    if main.get("__spec__") is not None:
        source = {"init_main_from_name": main["__spec__"].name}
    letter = {
        "path": sys.path,
        "main": source,
        "app": _app_address(worker.app),
        "journal": worker.journal.path,
        "bell": worker.bell.path,
        "worker": {key: getattr(worker, key) for key in ("hostname", "pid", "overrides")},
        "log": worker.log_options if task_logger.handlers or setup_logging.receivers else None,
        "order": order,
    }
    code = (
        "import sys, json; letter = json.loads(sys.argv[1]); sys.path[:] = letter['path']; "
        f"from importlib import import_module; import_module({__name__!r})._be_spawned(letter)"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, "-c", code, json.dumps(letter)]
    process = subprocess.Popen(command, pass_fds=order[2:], stdin=subprocess.DEVNULL)
    process.returncode = 0  # the pool waits for it itself
    return process.pid


def _app_address(app: TaskQ) -> tuple[str, str]:
    """Return (module, attribute) where a spawned child finds the app; rather not `__main__`."""
    for name, module in sorted(sys.modules.items(), key=lambda item: item[0] == "__main__"):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is app and name not in (__name__, "__mp_main__"):
                return name, attribute
    raise ImproperlyConfigured(
        "the start method 'spawn' needs an app that is a module's attribute; use fork or threads"
    )


_is_spawned = False


def _be_spawned(letter: dict[str, Any]) -> NoReturn:
    """Be a child of the pool in a fresh interpreter."""
    import importlib
    import multiprocessing.spawn

    global _is_spawned
    _is_spawned = True
    worker = types.SimpleNamespace(pool=PreforkPool, **letter["worker"])
    _die_with_parent(worker.pid)
    multiprocessing.spawn.prepare(letter["main"])
    module, attribute = letter["app"]
    module = "__mp_main__" if module == "__main__" else module
    app = worker.app = getattr(importlib.import_module(module), attribute)
    app.conf.update(worker.overrides)
    app.import_default_modules()
    app.set_current()
    worker.journal = Journal(letter["journal"])
    worker.bell = Bell(letter["bell"], mine=False)
    if letter["log"] is not None:
        configure_logging(app, **letter["log"])
    _be_child(worker, *letter["order"])


# ---------------------------------------------------------------------------------------------
# 12. Worker
# ---------------------------------------------------------------------------------------------


class _LogFormatter(logging.Formatter):
    """Gives a line its process and its task by the pool's names, and a colour by its level."""

    COLORS = {"DEBUG": 34, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}

    def __init__(self, fmt: str, color: bool) -> None:
        super().__init__(fmt)
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        record.processName = _process_name
        task, request = _thread.stack[-1] if _thread.stack else (None, None)
        record.__dict__.setdefault("task_name", task.name if task is not None else "???")
        record.__dict__.setdefault("task_id", request.id if request is not None else "???")
        text = super().format(record)
        code = self.COLORS.get(record.levelname) if self.color else None
        return f"\033[1;{code}m{text}\033[0m" if code else text


class _LogStream(io.TextIOBase):
    """Stands for stdout or stderr in a worker: each line that a task prints is one of the log."""

    encoding = "utf-8"
    name = "<taskq log>"

    def __init__(self, level: int) -> None:
        self.level = level
        self.local = threading.local()

    def write(self, text: Any) -> int:
        text = str(text)
        *lines, rest = (self.local.__dict__.get("rest", "") + text).split("\n")
        self.local.rest = rest
        self._log(lines)
        return len(text)

    def flush(self) -> None:
        self._log([self.local.__dict__.pop("rest", "")])

    def _log(self, lines: list[str]) -> None:
        if getattr(self.local, "logging", False):  # the log itself prints
            return
        self.local.logging = True
        try:
            for line in lines:
                if line.strip():
                    logging.getLogger("celery.redirected").log(self.level, line.rstrip())
        finally:
            self.local.logging = False

    def close(self) -> None:
        """Stay open: the next task prints too."""


def configure_logging(
    app: TaskQ, loglevel: int = logging.WARNING, logfile: str | None = None, color: Any = None
) -> None:
    """Set up a worker's log as Celery does; a receiver of `setup_logging` does it instead."""
    conf = app.conf
    named = {"loglevel": loglevel, "logfile": logfile, "format": conf.worker_log_format}
    if setup_logging.send(sender=None, colorize=color, **named):
        return
    stream = sys.__stderr__
    for default in (conf.worker_log_color, not logfile and stream is not None and stream.isatty()):
        color = default if color is None else color

    def handler(fmt: str) -> logging.Handler:
        from logging.handlers import WatchedFileHandler

        made: Any = WatchedFileHandler(logfile) if logfile else logging.StreamHandler(stream)
        made.setFormatter(_LogFormatter(fmt, color))
        return made

    root = logging.getLogger()
    if conf.worker_hijack_root_logger:
        root.handlers[:] = []
    if not root.handlers:
        root.addHandler(handler(conf.worker_log_format))
        root.setLevel(loglevel)
    logger.setLevel(loglevel)
    task_logger.setLevel(loglevel)
    task_logger.handlers[:] = [handler(conf.worker_task_log_format)]
    task_logger.propagate = False
    after_setup_logger.send(sender=None, logger=root, colorize=color, **named)
    named["format"] = conf.worker_task_log_format
    after_setup_task_logger.send(sender=None, logger=task_logger, colorize=color, **named)
    if conf.worker_redirect_stdouts:
        out = logging.getLevelName(conf.worker_redirect_stdouts_level)
        sys.stdout = sys.stderr = _LogStream(out)  # type: ignore[assignment]


def get_task_logger(name: str) -> logging.Logger:
    """Return a logger whose lines name the task that logs: `log = get_task_logger(__name__)`."""
    log = logging.getLogger(name)
    if log is not task_logger:
        log.parent = task_logger
    return log


def node_name(name: str | None) -> str:
    """Return a worker's full name: 'celery@host' for None, 'name@host' for 'name' or 'name@%h'."""
    name = name or "celery"
    host = _hostname()
    return node_format(name if "@" in name else name + "@%h", f"{host.partition('.')[0]}@{host}")


def node_format(text: str, node: str) -> str:
    """Expand %p (the node's name), %n (before the @), %h (host) and %d (its domain)."""
    name, _, host = node.partition("@")
    parts = {"p": node, "n": name, "h": host, "d": host.partition(".")[2], "%": "%"}
    return re.sub("%([pnhd%])", lambda match: parts[match[1]], text)


POOLS: dict[str, Any] = {
    "prefork": PreforkPool,
    "processes": PreforkPool,
    "threads": ThreadPool,
    "solo": SoloPool,
    "gevent": ThreadPool,
    "eventlet": ThreadPool,
}

#: A worker's options that stand for settings: `time_limit` is the setting task_time_limit.
_OPTION_SETTINGS = {
    "broker": "broker_url",
    **{re.sub("^(worker|task)_", "", name): name for name in SETTINGS},
}


class Worker:
    """Claims messages, has a pool run them, and settles what comes of them.

    hostname: the node's name. queues, exclude_queues: names, or text with commas. loglevel: 'INFO'.
    logfile: a path. purge: delete waiting messages first. Other options set settings while it runs:
    `pool`, `concurrency`, `time_limit`, `max_tasks_per_child`, `prefetch_multiplier`, …
    """

    def __init__(
        self,
        app: TaskQ,
        hostname: str | None = None,
        queues: Any = None,
        exclude_queues: Any = None,
        loglevel: Any = "WARNING",
        logfile: str | None = None,
        quiet: bool = False,
        no_color: bool | None = None,
        purge: bool = False,
        **options: Any,
    ) -> None:
        self.app = app
        app.import_default_modules()
        self.hostname = node_name(hostname)
        self.quiet, self.purge = quiet, purge
        self.wanted, self.unwanted = _name_list(queues), _name_list(exclude_queues)
        celeryd_init.send(sender=self.hostname, instance=self, conf=app.conf, options=options)
        #: The settings that the options stand for; spawned children take them too.
        self.overrides = self._settings(options)
        conf = {**app.conf, **self.overrides}
        known = {"worker_pool": POOLS, "worker_pool_start_method": ("fork", "spawn")}
        for name, values in known.items():
            if conf[name] not in values:
                expected = f"expected {_names(values)}"
                raise ImproperlyConfigured(f"setting {name!r} = {conf[name]!r}: {expected}")
        self.pool_name = conf["worker_pool"]
        self.start_method = conf["worker_pool_start_method"]
        self.concurrency = _count(conf["worker_concurrency"])
        self.log_options = {
            "loglevel": logging.getLevelName(loglevel) if isinstance(loglevel, str) else loglevel,
            "logfile": logfile and os.path.abspath(node_format(logfile, self.hostname)),
            "color": False if no_color else None,
        }
        self._replaced = {name: app.conf[name] for name in self.overrides}
        app.conf.update(self.overrides)
        if "include" in self.overrides:
            app.import_default_modules()
        #: Whether children are forked anew when a task is defined (in the background of a script).
        self.renews_children = False
        self.stopping: str | None = None  # 'warm' or 'cold'
        self.exitcode = 0
        self.ready = threading.Event()
        self._unsettled: list[tuple[Claim, Any]] = []
        self._hungry = True  # whether there may be more to claim
        self._due: float | None = None  # when the next message with an ETA is due
        self._recovered = 0.0  # when it last looked for dead workers
        self._swept = -60.0  # and for expired results

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that options stand for; those that are None say nothing."""
        for name in options.keys() - _OPTION_SETTINGS.keys():
            near = _nearest(name, _OPTION_SETTINGS, 0.6)
            hint = f": did you mean {near!r}?" if near else ""
            raise TypeError(f"a worker has no option {name!r}{hint}")
        found = {_OPTION_SETTINGS[k]: value for k, value in options.items() if value is not None}
        if "include" in found:
            found["include"] = _name_list(self.app.conf.include) + _name_list(found["include"])
        return found

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> int:
        """Run until told to stop; return the exit status."""
        streams, signals = (sys.stdout, sys.stderr), {}  # type: Any, dict[int, Any]
        configure_logging(self.app, **self.log_options)
        try:
            self.setup()
            celeryd_after_setup.send(sender=self.hostname, instance=self, conf=self.app.conf)
            self._announce(sys.__stdout__)
            with contextlib.suppress(ValueError):  # in another thread than the main one
                self._install_signals(signals)
            return self.run()
        finally:
            sys.stdout, sys.stderr = streams
            for signum, handler in signals.items():
                signal.signal(signum, handler)

    def _announce(self, out: Any) -> None:
        count = sum(map(self.store.purge, self.queue_names)) if self.purge else 0
        if out and count:
            print(f"purge: Erased {_plural(count, 'message')} from the queue.\n", file=out)
        if out and not self.quiet:
            print(self.banner(), file=out, flush=True)

    def check(self) -> None:
        """Raise where an address or option cannot be used, before anything is started."""
        if POOLS[self.pool_name].kills and not hasattr(os, "fork"):
            self.pool_name = "threads"
        if POOLS[self.pool_name].kills and self.app.store.folder is None:
            raise ImproperlyConfigured(
                "memory:// lives in one process: use --pool=threads or solo, or sqlite://"
            )
        _patch_greenlets(self.pool_name)
        self.app.store.look(())
        self.app.backend.uri()
        router = self.app.router
        names = self.wanted or list(router.queues)
        self.queues = [router.queue(name) for name in names if name not in self.unwanted]
        self.queue_names = [queue.name for queue in self.queues]
        if not self.queues:
            raise ImproperlyConfigured("no queues are left to serve: see -Q and -X")

    def setup(self) -> None:
        """Open what the worker needs."""
        self.check()
        self.pid = os.getpid()
        self.store: Store = self.app.store
        self.app.router.bind(self.queues)
        self.owner = int.from_bytes(os.urandom(7), "big")
        self._warn_of_namesakes()
        self.bell = self.store.bells.open()
        self.bell.listen("q:" + name for name in self.queue_names)
        pool = POOLS[self.pool_name]
        slots = 2 * self.concurrency + 2 if pool.kills else self.concurrency
        folder = self.store.folder
        path = os.path.join(folder, f"{self.owner:x}.journal") if folder else None
        self.journal = Journal(path, {"node": self.hostname, "slots": slots, "ring": _RING_SIZE})
        self.pool: Pool = pool(self, self.concurrency)
        if self.pool_name != self.app.conf.worker_pool:
            worker_logger.warning("There is no fork on this platform: using the threads pool")
        if not pool.kills and any(task.time_limit for task in self.app.tasks.values()):
            worker_logger.warning("Hard time limits do not apply to the %s pool", self.pool_name)

    def _warn_of_namesakes(self) -> None:
        for other in Journal.others(self.store.folder):
            if other.info["node"] == self.hostname and not other.lock_whole():
                worker_logger.warning(
                    "DuplicateNodenameWarning: another worker (pid %s) is called %s too: "
                    "give each its own name with -n", other.info["pid"], self.hostname,
                )  # fmt: skip

    def begin(self) -> None:
        """Recover what dead workers left, and start the pool."""
        worker_init.send(sender=self)
        self._housekeeping(time.monotonic())
        self.pool.start()
        worker_logger.info("%s ready.", self.hostname)
        worker_ready.send(sender=self)
        self.ready.set()

    def lost(self, claim: Claim, flags: int, why: str = "its main process died") -> Outcome:
        """Return the end of a task that a dead worker had begun."""
        exc = WorkerLostError(f"Worker exited prematurely: {why}.")
        return lost(self.app, claim, exc, runs_again(claim, flags, worker_died=True))

    def run(self) -> int:
        """Work until told to stop; return the exit status."""
        try:
            if not self.ready.is_set():
                self.begin()
            while self.stopping is None:
                self._turn()
            while self.stopping == "warm" and self._left():
                self._turn(claiming=False)
            if self.stopping == "cold":
                self._abandon()
        except WorkerTerminate:  # raised in a task that runs in this very thread
            self._abandon()
        finally:
            self._close()
        return self.exitcode

    def _close(self) -> None:
        worker_shutdown.send(sender=self)
        if self.stopping == "warm":
            self.pool.stop()
        else:
            self.pool.kill()
        # With what is not settled the journal stays, for the worker that recovers it.
        self.journal.close(remove=not (self.pool.held or self._unsettled))
        self.store.bells.close(self.bell)
        self.store.bells.sweep()
        self.app.close()
        self.app.conf.update(self._replaced)

    # -- work ------------------------------------------------------------------------------------

    def _turn(self, claiming: bool = True) -> None:
        """Settle what has ended, claim what there is room for, hand it out; sleep if idle."""
        pool, bell = self.pool, self.bell
        try:
            finished = self._unsettled + pool.collect()
            room = max(pool.room(), 0) if claiming else 0
            claims: list[Claim] = []
            if finished or room and self._hungry:
                self._unsettled = finished
                claims = self._settle(self.owner, finished, room if self._hungry else 0)
                self._unsettled = []
                if room and self._hungry:
                    self._hungry = len(claims) >= room
            pool.settled()
            if claims:
                self._received(claims)
                pool.submit(claims)
            now = time.monotonic()
            wanted = pool.tick(now)
            if now - self._recovered > 1.0:
                self._housekeeping(now)
            if finished or claims:
                nap = pool.nap()
                if nap > 0.0003:
                    bell.nap(nap)
                elif claims:
                    pool.linger()
            elif not bell.asleep:
                bell.doze(room > 0)
                ready, self._due = self.store.look(self.queue_names) if room else (False, None)
                self._hungry = self._hungry or ready
            else:
                if self._due is not None and room:
                    wanted = min(wanted, max(0.0, self._due - time.time()))
                self._hungry = bell.wait(wanted) or self._hungry
        except (OperationalError, OSError) as exc:
            what = "The store" if isinstance(exc, OperationalError) else "The pool"
            worker_logger.error("%s cannot be used: %s. Trying again in 1 second.", what, exc)
            time.sleep(1.0)

    def _settle(self, owner: int, finished: Sequence[Any], room: int = 0) -> list[Claim]:
        """Settle the outcomes of an owner's claims; claim up to `room` messages."""
        try:
            return self._put(owner, finished, room)
        except (StaleClaim, ValueError, OverflowError):  # of one of them: settle the others
            for claim, outcome in finished:
                try:
                    self._put(owner, [(claim, outcome)])
                except StaleClaim as exc:
                    worker_logger.warning("An outcome was dropped: %s", exc)
                except (ValueError, OverflowError) as exc:  # the store cannot take it
                    self._put(owner, [(claim, lost(self.app, claim, exc, again=False))])
            return []

    def _put(self, owner: int, finished: Sequence[Any], room: int = 0) -> list[Claim]:
        """Put outcomes into the store; where results have one of their own, that comes first."""
        if not self.app.backend_is_broker:
            results = [result for _, outcome in finished for result in outcome.results]
            if results:
                self.app.backend.put_results(results)
            finished = [(claim, outcome._replace(results=[])) for claim, outcome in finished]
        return self.store.settle(owner, finished, self.queue_names, room)

    def _received(self, claims: Sequence[Claim]) -> None:
        """Log claims and tell the receivers of `task_received`."""
        strategy = logging.getLogger("celery.worker.strategy")
        heard = task_received.receivers or strategy.isEnabledFor(logging.INFO)
        for claim in claims if heard else ():
            try:
                headers = claim.message.headers
            except MalformedMessage:  # whoever executes it rejects it
                continue
            name = headers.get("shadow") or headers["task"]
            strategy.info("Task %s[%s] received", name, headers["id"])
            if task_received.receivers:
                request = request_of(claim.message, None, None, {}, self.hostname)
                request.update(name=headers["task"])
                task_received.send(sender=self, request=request)

    def _housekeeping(self, now: float) -> None:
        """Look, once a second, for dead workers, and now and then for expired results."""
        self._recovered = now
        self.journal.touch()
        if self.store.recover(self.lost, self._settle):
            self._hungry = True
        if now - self._swept > 30:
            self._swept = now
            self.store.sweep()

    # -- the end ---------------------------------------------------------------------------------

    def stop(self, how: str = "warm", exitcode: int = 0) -> None:
        """Ask the worker to end: 'warm' lets running tasks finish, 'cold' ends them."""
        self.stopping = how
        self.exitcode = exitcode
        with contextlib.suppress(RuntimeError):  # eventlet lets no signal handler write
            self.bell.ring()

    def _left(self) -> bool:
        """Give back what has not begun; return whether there is anything left to wait for."""
        self._unsettled += [(claim, _GIVE_BACK) for claim in self.pool.take_back()]
        return bool(self.pool.held or self._unsettled)

    def _abandon(self) -> None:
        """Kill the pool; what runs ends as if the worker had been killed."""
        pool = self.pool
        self._left()
        pool.kill()
        self._unsettled += pool.collect()
        running = pool.running()
        for ticket, claim in pool.held.items():
            outcome = _GIVE_BACK
            if ticket in running:
                flags = running[ticket].begun[1]
                outcome = self.lost(claim, flags, "it was told to stop at once")
            self._unsettled.append((claim, outcome))
        try:
            self._settle(self.owner, self._unsettled)
        except OperationalError as exc:
            worker_logger.error("The store cannot be used: %s. The next worker settles.", exc)
        else:
            self._unsettled = []
            pool.held.clear()

    def _install_signals(self, replaced: dict[int, Any]) -> None:
        """Install the worker's handlers, and note those they replace."""

        def stop(signum: int, frame: Any) -> None:
            if os.getpid() != self.pid:
                return
            name = signal.Signals(signum).name
            interrupt = name == "SIGINT"
            cold = name == "SIGQUIT" or interrupt and self.stopping is not None
            how, status = ("Cold" if cold else "Warm"), int(cold or interrupt)
            if interrupt and not cold:
                _say("worker: Hitting Ctrl+C again will terminate all running tasks!")
            _say(f"worker: {how} shutdown (MainProcess)")
            worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=status)
            self.stop("cold" if cold else self.stopping or "warm", status)
            if cold and _thread.stack:  # a task of the solo pool, which nothing else can end
                raise WorkerTerminate(1)

        handlers: dict[str, Any] = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"), stop)
        handlers["SIGUSR1"] = lambda *_: _say(_stacks())
        if self.pool_name not in _PATCHES:  # greenlets have their own for children
            handlers["SIGCHLD"] = lambda *_: self.bell.ring()
        for name in handlers.keys() & set(dir(signal)):  # Windows has two of them
            signum = getattr(signal, name)
            replaced[signum] = signal.signal(signum, handlers[name])

    # -- the banner ------------------------------------------------------------------------------

    def banner(self) -> str:
        """Return what a worker prints when it starts."""
        app = self.app
        queues = "\n".join(queue.describe() for queue in self.queues)
        tasks = "".join(f"  . {name}\n" for name in sorted(app.tasks))
        tasks = f"[tasks]\n{tasks}" if self.log_options["loglevel"] <= logging.INFO else ""
        return f"""
 -------------- {self.hostname} v{__version__} (taskq)

[config]
. app:         {app.main or "__main__"}:{id(app):#x}
. broker:      {_mask_url(self.store.uri())}
. results:     {_mask_url(app.backend.uri())}
. concurrency: {self.concurrency} ({self.pool_name})
. task events: OFF

[queues]
{queues}

{tasks}"""


def _say(text: str) -> None:
    """Write a line to stderr, from a signal handler: it may have interrupted any other writing."""
    with contextlib.suppress(OSError, RuntimeError):
        os.write(2, f"\n{text}\n".encode())


def _stacks() -> str:
    """Return what every thread of this process is doing."""
    import traceback

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}\n{'=' * 49}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def _count(concurrency: Any) -> int:
    """Return a number of processes or threads; None and 'auto' are the CPUs that there are."""
    if concurrency in (None, "auto"):
        usable = getattr(os, "sched_getaffinity", None)
        return len(usable(0)) if usable else os.cpu_count() or 1
    if str(concurrency).isdecimal() and int(concurrency) > 0:
        return int(concurrency)
    raise ImproperlyConfigured(f"concurrency {concurrency!r}: expected a number above 0, or 'auto'")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _name_list(names: Any) -> list[Any]:
    """Return names given as a list, or as text with commas."""
    if isinstance(names, str):
        names = names.split(",")
    return [name.strip() if isinstance(name, str) else name for name in names or () if name]


_PATCHES = {"gevent": "gevent.monkey:patch_all", "eventlet": "eventlet:monkey_patch"}


def _patch_greenlets(pool: str | None) -> None:
    """Patch the standard library for a pool of greenlets; another time changes nothing."""
    if pool in _PATCHES:
        try:
            patch = _symbol(_PATCHES[pool])
        except ImportError:
            raise ImproperlyConfigured(
                f"the {pool} pool needs {pool}, which is not installed: pip install {pool}"
            ) from None
        patch()


# ---------------------------------------------------------------------------------------------
# 13. Background worker
# ---------------------------------------------------------------------------------------------


class BackgroundWorker:
    """A worker in a thread of this process, for scripts, notebooks and tests.

        with app.worker(concurrency=2):
            print(add.delay(2, 2).get(timeout=10))

    Tasks run in their latest form, also those that are defined after it was started. The pool is
    threads in a notebook or REPL, and where there is no fork or no file; else prefork.
    """

    def __init__(self, app: TaskQ, options: dict[str, Any]) -> None:
        self.app = app
        self.options = options
        self.worker: Worker | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> BackgroundWorker:
        """Start the worker and return once it is ready."""
        if _is_spawned:
            raise RuntimeError(
                "a worker cannot be started while its children import this script: put the start "
                'under `if __name__ == "__main__":`'
            )
        if self._thread is not None:
            raise RuntimeError("this worker is running already")
        interactive = hasattr(sys, "ps1")  # a REPL, or a notebook
        pool = "threads" if interactive or self.app.store.folder is None else "prefork"
        name = f"background{os.getpid()}-{os.urandom(2).hex()}"
        self.worker = worker = Worker(self.app, **{"pool": pool, "hostname": name, **self.options})
        worker.setup()
        worker.renews_children = worker.pool.kills and worker.start_method == "fork"
        if worker.renews_children and "IPython" in sys.modules:
            self._renew_per_cell()
        if threading.current_thread() is threading.main_thread():
            worker.begin()  # children that are forked here inherit no lock that is held
        self._thread = threading.Thread(target=worker.run, name="taskq worker", daemon=True)
        self._thread.start()  # any other thread must not fork them: they would die with it
        while not worker.ready.wait(0.1):
            if not self._thread.is_alive():
                raise RuntimeError("the worker cannot start; its thread has said why")
        import atexit

        atexit.register(self.stop)
        return self

    def _renew_per_cell(self) -> None:
        shell = sys.modules["IPython"].get_ipython()

        def renew(*_: Any) -> None:
            self.app.generation += 1  # a cell may define a function that a task calls

        if shell is not None:
            shell.events.register("post_run_cell", renew)

    def stop(self) -> None:
        """Let running tasks finish, give back the rest, and return when the worker has ended."""
        thread, self._thread = self._thread, None
        if thread is not None and self.worker is not None and self.worker.pid == os.getpid():
            import atexit

            atexit.unregister(self.stop)
            self.worker.stop()
            thread.join()

    def __enter__(self) -> BackgroundWorker:
        return self.start()

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()


# ---------------------------------------------------------------------------------------------
# 14. Command line
# ---------------------------------------------------------------------------------------------


class CommandError(Exception):
    """Something on the command line cannot be done; the text is all that the user sees."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


class _OtherCopy(Exception):
    """The app belongs to another copy of this file in the process (a module), which must run."""


# -- the app ----------------------------------------------------------------------------------


def _as_app(value: Any) -> TaskQ | None:
    """Return `value` if it is an app; _OtherCopy if it is one of this very file's other import."""
    for base in type(value).__mro__:
        if base is TaskQ:
            return value
        path = getattr(sys.modules.get(base.__module__), "__file__", None)
        if base.__name__ == "TaskQ" and path and os.path.samefile(path, __file__):
            raise _OtherCopy(sys.modules[base.__module__])
    return None


def _app_in(module: Any) -> TaskQ | None:
    """Return a module's `app`, else its `celery`, else any app in it."""
    names = vars(module)
    values = [names.get("app"), names.get("celery"), *names.values()]
    return next(filter(None, map(_as_app, values)), None)


def find_app(name: str) -> TaskQ:
    """Return the app that `--app` names: 'proj', 'proj.celery', 'proj.celery:app'.

    In a module it is `app`, else `celery`, else any app; in a package without one, the same in its
    submodule `celery`. Raises CommandError if there is none; an error in the module is its own.
    """
    module_name, _, attribute = name.partition(":")
    if name.startswith(".") or "/" in name or name.endswith(".py"):
        guess = re.sub(r"\.py$", "", name).strip("./").replace("/", ".")
        raise CommandError(f"-A {name}: expected a module, as in -A {guess or 'proj'}")
    module = _import_if_there(module_name)
    parent, _, last = module_name.rpartition(".")
    if module is None and parent and not attribute:
        return find_app(f"{parent}:{last}")
    failed = "Unable to load celery application.\n"
    if module is None:
        raise CommandError(f"{failed}The module {module_name} was not found.")
    try:
        value = functools.reduce(getattr, attribute.split(".") if attribute else (), module)
    except AttributeError:
        raise CommandError(
            f"{failed}Module {module_name!r} has no attribute {attribute!r}"
        ) from None
    found = _app_in(value) if isinstance(value, types.ModuleType) else _as_app(value)
    if found is None and not attribute and hasattr(module, "__path__"):
        module = _import_if_there(module_name + ".celery")
        found = module and _app_in(module)
    if found is None:
        raise CommandError(
            f"{failed}{name!r} has no app: looked for its attributes 'app' and 'celery', any "
            "TaskQ, and a submodule 'celery'"
        )
    return found


def _import_if_there(name: str) -> Any:
    """Return a module, or None if there is none of this name; what goes wrong in it is raised."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name and f"{name}.".startswith(f"{exc.name}."):
            return None
        raise  # what the module imports is missing


def _discover_app() -> TaskQ:
    """Return the one app in the current directory; CommandError if there is none, or several."""
    import glob

    places = ["tasks.py", "app.py", "main.py", "celeryapp.py", "*/celery.py", "*/tasks.py"]
    looked = [path for place in places for path in sorted(glob.glob(place))]
    found: dict[TaskQ, str] = {}
    for path in looked:
        with open(path, encoding="utf-8", errors="replace") as file:
            if not re.search(rf"\b{__name__.rpartition('.')[2]}\b", file.read()):
                continue
        module = path[:-3].replace(os.sep, ".")
        app = _app_in(_import_if_there(module) or types)
        if app is not None:
            found.setdefault(app, module)
    if len(found) == 1:
        return next(iter(found))
    command = f"\n    python {os.path.basename(__file__)} -A {{}} worker"
    if found:
        raise CommandError(
            f"there are {len(found)} apps here, in {_names(found.values())}; say which:"
            + command.format(next(iter(found.values())))
        )
    raise CommandError(
        f"no app was found in {os.getcwd()} (looked at: {', '.join(looked or places)}). Name the "
        f"module that makes it:{command.format('MODULE')}"
    )


def _as_imported(app: TaskQ) -> TaskQ:
    """Return the app that tasks import, where the module that runs as `__main__` makes another:
    `python -m proj.celery` runs what `from proj.celery import app` would run a second time."""
    main = sys.modules["__main__"]
    for name, value in list(vars(main).items()):
        if value is app:
            module = sys.modules.setdefault(_main_module() or "__main__", main)
            return getattr(module, name, app)
    return app


def _configured_app(options: Any, app: TaskQ | None) -> TaskQ:
    """Return the app that the command is for, with the settings that the command line gives."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name = options.app or (os.environ.get("TASKQ_APP") if app is None else None)
    if name:
        app = find_app(name)
    elif app is not None:
        app = _as_imported(app)
    elif options.broker and options.command != "worker":
        app = TaskQ("default")
    else:
        app = _discover_app()
    app.set_current()
    for option in ("broker", "result_backend"):
        if getattr(options, option):
            app.conf[_OPTION_SETTINGS[option]] = getattr(options, option)
    return app


# -- commands ---------------------------------------------------------------------------------


def _worker_command(app: TaskQ, options: Any) -> int:
    import ctypes  # noqa: F401 - here once instead of in every child

    own = "hostname queues exclude_queues loglevel logfile quiet no_color purge".split()
    named = {key: value for key, value in vars(options).items() if value is not None}
    worker = Worker(app, **{key: named[key] for key in named if key in (*own, *_OPTION_SETTINGS)})
    options.logfile = worker.log_options["logfile"]
    if options.pidfile:
        options.pidfile = os.path.abspath(node_format(options.pidfile, worker.hostname))
        _check_pidfile(options.pidfile)
    if options.detach:
        worker.check()  # what cannot be started is said while there is a terminal
        if options.logfile:
            open(options.logfile, "ab").close()
        app.close()
        _detach()
    if not options.pidfile:
        return worker.start()
    with open(options.pidfile, "w") as file:
        file.write(f"{os.getpid()}\n")
    try:
        return worker.start()
    finally:
        _unlink(options.pidfile)


def _check_pidfile(path: str) -> None:
    """Raise CommandError if a living process holds the pid file; a stale one is removed."""
    pid = 0
    try:
        with open(path) as file:
            pid = int(file.read())
        os.kill(pid, 0)
    except FileNotFoundError:
        return
    except (ValueError, ProcessLookupError):
        print(f"Stale pidfile {path} exists - Removing it.", file=sys.stderr)
        _unlink(path)
        return
    except PermissionError as exc:  # it lives, and is somebody else's
        if not pid:
            raise CommandError(f"cannot read the pid file {path}: {exc.strerror}") from None
    text = f"Pidfile ({path}) already exists. Seems we're already running? (pid: {pid})"
    raise CommandError(text, 73)


def _detach() -> None:
    """Go into the background: no terminal, no parent, standard streams to nowhere."""
    if not hasattr(os, "fork"):
        raise CommandError("--detach needs a platform with fork")
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():  # a session's leader could take a terminal
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _call_command(app: TaskQ, options: Any) -> int:
    names = ("eta", "countdown", "expires", "serializer", "queue", "exchange", "routing_key")
    given = {name: getattr(options, name) for name in names}
    with contextlib.suppress(TypeError, ValueError):  # ISO 8601, or None
        given["expires"] = float(given["expires"])
    try:
        print(app.send_task(options.name, options.args, options.kwargs, **given).id)
    except (TypeError, ValueError) as exc:
        raise CommandError(str(exc)) from None
    return 0


def _from_json(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise CommandError(f"{text!r} is not JSON: {exc}") from None
    if not isinstance(value, kind):
        raise CommandError(f"{text!r}: expected a JSON {'array' if kind is list else 'object'}")
    return value


def _result_command(app: TaskQ, options: Any) -> int:
    result = app.AsyncResult(options.task_id)
    print(result.traceback if options.traceback else result.get())
    return 0


def _purge_command(app: TaskQ, options: Any) -> int:
    names = set(_name_list(options.queues) or app.router.queues)
    names -= set(_name_list(options.exclude_queues))
    if not names:
        return 0
    queues = "queue" if len(names) == 1 else "queues"
    if not options.force:
        print(
            f"WARNING: This will remove all tasks from {queues}: {', '.join(sorted(names))}.\n"
            "         There is no undo for this operation!\n\n"
            "(to skip this prompt use the -f option)"
        )
        print("Are you sure you want to delete all tasks? [y/N]: ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Aborted!", file=sys.stderr)
            return 1
    count = sum(map(app.store.purge, names))
    if count:
        print(f"Purged {_plural(count, 'message')} from {_plural(len(names), 'known task queue')}.")
    else:
        print(f"No messages purged from {_plural(len(names), 'queue')}")
    return 0


def bugreport(app: TaskQ | None = None) -> str:
    """Return the versions and settings that a bug report should name."""
    import platform

    app = app_or_default(app)
    return (
        f"\nsoftware -> taskq:{__version__} py:{platform.python_version()} "
        f"sqlite:{sqlite3.sqlite_version}\n"
        f"platform -> system:{platform.system()} arch:{platform.machine()} "
        f"imp:{platform.python_implementation()}\n"
        f"settings -> broker:{_mask_url(app.store.uri())} "
        f"results:{_mask_url(app.backend.uri())}\n\n{app.conf.humanize()}\n"
    )


def _report_command(app: TaskQ, options: Any) -> int:
    print(bugreport(app))
    return 0


def _demo_command(_: Any, options: Any) -> int:
    """Count the lines and words of the standard library with a prefork worker, and check it."""
    import glob
    import sysconfig
    import tempfile

    library = sysconfig.get_paths()["stdlib"]
    paths = sorted(glob.glob(os.path.join(library, "**", "*.py"), recursive=True))
    paths = [path for path in paths if "site-packages" not in path][:3000]

    def count(path: str) -> list[int]:
        with open(path, "rb") as file:
            text = file.read()
        return [text.count(b"\n"), len(text.split())]

    with tempfile.TemporaryDirectory(prefix="taskq-demo-") as folder:
        app = TaskQ("demo", broker=f"sqlite:///{folder}/demo.db", set_as_current=False)
        task = app.task(name="demo.count")(count)
        began = time.monotonic()
        plain = [count(path) for path in paths]
        alone = time.monotonic() - began
        with app.worker() as background:
            worker: Any = background.worker
            print(f"A {worker.pool_name} worker with {worker.concurrency} processes, on an SQLite "
                  f"file,\ncounts lines and words of {len(paths)} files in {library}")  # fmt: skip
            began = time.monotonic()
            results = [task.delay(path) for path in paths]
            sent = time.monotonic() - began
            counted = []
            for result in results:
                counted.append(result.get(timeout=60))
                if len(counted) % 200 == 0 or len(counted) == len(paths):
                    print(f"{len(counted)}/{len(paths)}", flush=True)
            total = time.monotonic() - began
        app.close()
    wrong = sum(a != b for a, b in zip(plain, counted))
    lines, words = map(sum, zip(*counted))
    print(f"\n{lines:,} lines, {words:,} words; a plain loop agrees on all but {wrong} files")
    print(f"tasks:      {len(paths)} in {total:.2f} s, {len(paths) / total:,.0f} a second")
    print(f"of that:    {sent:.2f} s until the last was sent, meanwhile the first ran")
    print(f"plain loop: {alone:.2f} s in one process, the counting itself")
    return 1 if wrong else 0


# -- options ----------------------------------------------------------------------------------

_COMMON_OPTIONS = """
    -A --app=APPLICATION       module or package of the app
    -b --broker=URL            where messages are: sqlite:///file.db
    --result-backend=URL       where results are
    --workdir=PATH             change to this directory first
    -C --no-color              no colour
    -q --quiet                 say less
    --version                  print the version
"""

#: What becomes of an option's VALUE.
_TYPES: dict[str, Callable[[str], Any]] = {
    "SECONDS": float,
    "INTEGER": int,
    "ARRAY": functools.partial(_from_json, kind=list),
    "OBJECT": functools.partial(_from_json, kind=dict),
}

#: Commands by name: the function that runs it with an app (None: it has its own) and the options,
#: what it does, and its options: their names, =VALUE if they take one, and what they mean.
_COMMANDS: dict[str, tuple[Callable[[Any, Any], int], str, str]] = {
    "worker": (_worker_command, "Start a worker.", """
    -n --hostname=NAME         node name; %h is the host, %n its first part, %d its domain
    -D --detach                run in the background
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
    -f --logfile=PATH          where the log goes; stderr by default
    --pidfile=PATH             file for the process id
    --without-gossip           accepted: there is no gossip
    --without-mingle           accepted: there is no mingling
    --without-heartbeat        accepted: there is no heartbeat
    --heartbeat-interval=INTEGER  accepted: there is no heartbeat
    """),
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
    "report": (_report_command, "Print what a bug report should name.", ""),
    "demo": (_demo_command, "Run a worker on some real work, in a temporary file.", ""),
}  # fmt: skip

#: Commands, and options of the worker, that Celery has and this version not; they fail by name.
_LATER_COMMANDS = (
    "amqp beat control events graph inspect list logtool migrate multi shell status upgrade".split()
)
_LATER_ARGUMENTS = (
    "-E --task-events --events -B --beat -S --statedb -s --schedule-filename --schedule "
    "--scheduler --autoscale --uid --gid --umask --executable".split()
)


def _take_command(argv: list[str]) -> str | None:
    """Remove the command from the arguments and return it; None if there is none."""
    takes_value = ("-A", "--app", "-b", "--broker", "--result-backend", "--workdir")
    for index, word in enumerate(argv):
        if word.startswith("-") or index and argv[index - 1] in takes_value:
            continue
        if word in _COMMANDS:
            return argv.pop(index)
        if word in _LATER_COMMANDS:
            raise CommandError(f"the command {word!r} is not available in taskq {__version__}")
        near = _nearest(word, _COMMANDS, 0.5)
        hint = f"; did you mean {near!r}?" if near else ""
        raise CommandError(f"no command {word!r}{hint}. The commands are {_names(_COMMANDS)}.")
    return None


def _parser(command: str | None) -> Any:
    """Return the parser for a command's arguments, or for those that stand before any command."""
    import argparse

    parser = argparse.ArgumentParser(
        prog=f"taskq {command}" if command else "taskq",
        description=_COMMANDS[command][1] if command else __doc__.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command is None:
        parser.usage = "taskq [OPTIONS] COMMAND [ARGS]"
        lines = (f"    {name:<10} {summary}" for name, (_, summary, _) in _COMMANDS.items())
        parser.epilog = "commands:\n" + "\n".join(lines)

    def fail(text: str) -> NoReturn:
        raise CommandError(f"{text} (see {parser.prog} --help)")

    parser.error = fail  # type: ignore[assignment]
    parser.set_defaults(command=command)
    table = (_COMMANDS[command][2] if command else "") + _COMMON_OPTIONS
    for line in filter(None, map(str.strip, table.splitlines())):
        flags, _, meaning = line.partition("  ")
        flags, _, value = flags.partition("=")
        more: dict[str, Any] = {"help": meaning.strip().replace("%", "%%")}
        if "|" in value:
            more.update(choices=value.split("|"), type=str.upper if value.isupper() else str)
        elif value:
            more.update(metavar=value, type=_TYPES.get(value, str))
        elif flags == "--version":
            more.update(action="version", version=f"taskq {__version__}")
        elif flags.startswith("-"):
            more.update(action="store_true", default=None)
        parser.add_argument(*flags.split(), **more)
    return parser


def main(argv: Sequence[str] | None = None, app: TaskQ | None = None) -> int:
    """Run the command line: `main(['-A', 'proj', 'worker'])`; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    rest = list(given)
    try:
        command = _take_command(rest)
        words = (word.partition("=")[0] for word in rest)
        later = [word for word in words if word in _LATER_ARGUMENTS]
        if command == "worker" and later:
            raise CommandError(f"{later[0]} is not available in taskq {__version__}")
        parser = _parser(command)
        options = parser.parse_args(rest)
        if command is None:
            parser.print_help()
            return 0
        if options.workdir:
            os.chdir(options.workdir)
        _patch_greenlets(getattr(options, "pool", None))  # before the app's modules are imported
        app = None if command == "demo" else _configured_app(options, app)
        return _COMMANDS[command][0](app, options)
    except _OtherCopy as other:
        return other.args[0].main(given)
    except KeyboardInterrupt:
        return 130
    except OSError as exc:
        if exc.filename not in filter(None, vars(options).values()):
            raise  # not of a path that the command line names
        print(f"Error: {exc.filename}: {exc.strerror}", file=sys.__stderr__)
        return 1
    except CommandError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        sys.exit(exc.status)
    except (CeleryError, OperationalError, EncodeError) as exc:
        print(f"Error: {exc.args[0] if exc.args else exc}", file=sys.__stderr__)
        return 1


# ---------------------------------------------------------------------------------------------
# 15. Public names
# ---------------------------------------------------------------------------------------------


def _publish_submodules() -> None:
    """Make `taskq.exceptions`, `taskq.utils.log` and their like importable, as Celery's are.

    Changing between the two is then a search and replace of the package's name.
    """
    names = {name: value for name, value in globals().items() if type(value) is not Proxy}
    errors = {
        name: value
        for name, value in names.items()
        if isinstance(value, type) and issubclass(value, (Exception, SystemExit))
    }
    state_names = {
        name: value
        for name, value in names.items()
        if name == value or name.endswith("_STATES") or name.lower() in ("precedence", "state")
    }
    results = "AsyncResult EagerResult GroupResult ResultSet result_from_tuple allow_join_result"
    parts = "Signature chain chord chunks group signature subtask maybe_signature xmap xstarmap"
    log = {"get_task_logger": get_task_logger, "get_logger": logging.getLogger}
    submodules: dict[str, dict[str, Any]] = {
        "exceptions": errors,
        "states": state_names,
        "signals": {name: value for name, value in names.items() if isinstance(value, Signal)},
        "result": {name: names[name] for name in results.split()},
        "canvas": {name: names[name] for name in parts.split()},
        "schedules": {name: names[name] for name in ("crontab", "schedule", "solar")},
        "utils": {"uuid": uuid, "gen_unique_id": uuid},
        "utils.log": log,
    }
    for path, attributes in submodules.items():
        module = types.ModuleType(f"{__name__}.{path}", f"{path}: see {__name__}.")
        module.__dict__.update(attributes)
        sys.modules[module.__name__] = module
        parent, _, last = path.rpartition(".")
        holder = sys.modules[f"{__name__}.{parent}"] if parent else sys.modules[__name__]
        setattr(holder, last, module)


_publish_submodules()

__all__ = [
    "AsyncResult",
    "Celery",
    "EagerResult",
    "Exchange",
    "Queue",
    "Signal",
    "Task",
    "TaskQ",
    "allow_join_result",
    "app_or_default",
    "bugreport",
    "current_app",
    "current_task",
    "get_task_logger",
    "main",
    "shared_task",
    "uuid",
]
