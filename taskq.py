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
                                       │ claim a batch, under the worker's name
                                       ▼
                                    claimed ──────────────► main loop ── token ──► pool child
                                                              ▲                    execute()
                                                              └──── Outcome ◄──────┘
                               results ◄─┐
    AsyncResult.get() ◄─ bell            └── settle a batch: results, acknowledgements and
                               queue   ◄──┘  follow-up messages, in one transaction

The producer turns a call into a Message, Celery's protocol 2, and the store keeps it. A worker's
main process claims messages in batches and hands each to a child with a 16-byte token; the child
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
import functools
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
    from typing import (
        Any,
        Callable,
        Dict,
        Iterable,
        Iterator,
        List,
        NoReturn,
        Optional,
        Sequence,
        Tuple,
        Union,
    )

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


class CeleryError(Exception):
    """Base class of taskq's errors (Celery's name for it)."""


class CeleryWarning(UserWarning):
    """Base class of taskq's warnings."""


class AlwaysEagerIgnored(CeleryWarning):
    """`send_task` cannot run a task here: `task_always_eager` has no effect on it."""


class DuplicateNodenameWarning(CeleryWarning):
    """Two workers use one node name."""


class ImproperlyConfigured(CeleryError):
    """A setting, an address or an option cannot mean what was given."""


class SecurityError(CeleryError):
    """A message failed a security check."""


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
        message: Optional[str] = None,
        exc: Any = None,
        when: Any = None,
        is_eager: bool = False,
        sig: Any = None,
        **kwargs: Any,
    ) -> None:
        self.message = message
        self.exc, self.excs = (None, exc) if isinstance(exc, str) else (exc, exc and _repr(exc))
        self.when = when
        self.is_eager = is_eager
        self.sig = sig
        super().__init__(self, exc, when, **kwargs)

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


class IncompleteStream(TaskError):
    """The results of a stream are not complete."""


class NotRegistered(KeyError, TaskError):
    """A task of this name is not registered."""

    def __repr__(self) -> str:
        return f"Task of kind {self} never registered, please make sure it's imported."


class AlreadyRegistered(TaskError):
    """A task of this name is registered already."""


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


class BackendError(Exception):
    """Results cannot be read or written."""


class BackendGetMetaError(BackendError):
    """A result cannot be read."""


class BackendStoreError(BackendError):
    """A result cannot be written."""


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


class Terminated(Exception):
    """The task was terminated by a request to do so."""


class WorkerTerminate(SystemExit):
    """Raised in a worker's main process to stop it at once."""


class WorkerShutdown(SystemExit):
    """Raised in a worker's main process to let it finish what runs and stop."""


class RemoteTraceback(Exception):
    """The traceback of another process, shown as the cause of a re-raised error."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


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
    """Return `repr(value)`, cut at `limit` characters, whatever the value's own repr does."""
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<Unrepresentable {type(value)!r}: {exc!r}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _tagged(kind: str, value: Any) -> Dict[str, Any]:
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


def _decode_uuid(value: Dict[str, str]) -> Any:
    from uuid import UUID

    return UUID(hex=value["hex"])


def _decode_base64(value: str) -> bytes:
    import base64

    return base64.b64decode(value.encode())


_RICH_TYPES: Dict[str, Callable[[Any], Any]] = {
    "datetime": lambda value: _parse_time(value),
    "date": lambda value: date.fromisoformat(value[:10]),
    "time": daytime.fromisoformat,
    "decimal": Decimal,
    "uuid": _decode_uuid,
    "bytes": lambda value: value.encode("utf-8"),
    "base64": _decode_base64,
}


def _decode_rich(value: Dict[str, Any]) -> Any:
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


def serialize(value: Any, serializer: str = "json") -> Tuple[str, str, str]:
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
        import base64
        import pickle

        return pickle.loads(base64.b64decode(text))
    except Exception as exc:
        raise DecodeError(f"cannot read {content_type}: {_repr(exc, 200)}") from exc


def _names(items: Iterable[str]) -> str:
    """Return names as in "'json' and 'pickle'"."""
    quoted = [repr(item) for item in items]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


#: The modules that Celery's own errors come from: theirs is the name on the wire, so that a result
#: does not tell which of the two ran the task, nor where this file was copied to.
_WIRE_MODULES = {
    "billiard.exceptions": (SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError, Terminated),
    "kombu.exceptions": (
        OperationalError,
        SerializationError,
        EncodeError,
        DecodeError,
        ContentDisallowed,
    ),
}
_WIRE_MODULE_OF = {cls: module for module, classes in _WIRE_MODULES.items() for cls in classes}


def encode_exception(exc: BaseException) -> Dict[str, Any]:
    """Return an exception as Celery's JSON has it: exc_type, exc_message (its args), exc_module.

    An argument that JSON cannot hold is replaced by its repr.
    """
    cls = type(exc)
    args: List[Any] = []
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
SETTINGS: Dict[str, Tuple[Any, str]] = {
    "accept_content": (["json"], "serializers or content types that a worker accepts"),
    "broker_transport_options": ({}, "options of the store, as in the URL's query"),
    "broker_url": (None, "where messages are kept: sqlite:// or memory://"),
    "enable_utc": (True, "message times are UTC"),
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
_ONLY: Dict[str, Any] = {
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


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.84) -> Optional[str]:
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


class Settings(Dict[str, Any] if TYPE_CHECKING else dict):  # type: ignore[misc]
    """An app's settings, by key or by attribute: `app.conf.timezone = 'UTC'`.

    All of SETTINGS are there with their defaults. Own names are kept; one that is close to a
    known name, and a setting of Celery that taskq cannot honour, is an ImproperlyConfigured.
    """

    #: Counts changes, so that what is derived from settings knows when to be derived again.
    version = 0
    _check_defaults = True

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
            if value or _ONLY[name]:
                if value != _ONLY[name] or type(value) is not type(_ONLY[name]):
                    raise ImproperlyConfigured(
                        f"setting {name!r} = {_repr(value, 60)}: of Celery's values for it taskq "
                        f"has only {_ONLY[name]!r}; leave it out"
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
        if name.endswith("_serializer") and value not in CONTENT_TYPES:
            expected = f"one of {_names(CONTENT_TYPES)}"
        elif name == "enable_utc" and value is not True:
            expected = "True: message times are always UTC"
        elif name.endswith("accept_content") and value is not None:
            known = {*CONTENT_TYPES, *CONTENT_TYPES.values()}
            if not isinstance(value, str) and known.issuperset(value):
                return
            expected = f"a list of {_names(CONTENT_TYPES)}"
        elif name.endswith("_time_limit") and value is not None and not _is_number(value):
            expected = "seconds"
        elif name == "task_default_exchange_type" and value not in ("direct", "topic", "fanout"):
            expected = "'direct', 'topic' or 'fanout'"
        elif name == "timezone" and value is not None:
            _zone(value)
            return
        else:
            return
        raise ImproperlyConfigured(f"setting {name!r} = {_repr(value, 60)}: expected {expected}")

    def load(self, source: Any, namespace: Optional[str] = None) -> None:
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

    def seconds(self, name: str) -> Optional[float]:
        """Return a setting that is seconds, a timedelta or None, as seconds or None."""
        value = self[name]
        return value.total_seconds() if isinstance(value, timedelta) else value


def _attributes(source: Any) -> Dict[str, Any]:
    return {name: getattr(source, name) for name in dir(source) if not name.startswith("__")}


def _old_name(name: str) -> Optional[str]:
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
        headers: Dict[str, Any],
        properties: Dict[str, Any],
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
    def decode(cls, text: Union[str, bytes]) -> Message:
        """Return the message in an envelope; MalformedMessage, whatever the bytes, if there is none."""
        try:
            envelope = _json_decode(text.decode() if isinstance(text, bytes) else text)
        except Exception as exc:  # ValueError, RecursionError, ...
            raise MalformedMessage(f"not JSON: {_repr(exc, 120)}") from None
        if not isinstance(envelope, dict):
            raise MalformedMessage(f"the envelope is no object but {_repr(envelope, 60)}")
        headers, properties = envelope.get("headers"), envelope.get("properties")
        body = envelope.get("body")
        for name, value, expected in (
            ("headers", headers, dict),
            ("properties", properties, dict),
            ("body", body, str),
        ):
            if not isinstance(value, expected):
                raise MalformedMessage(f"{name}: expected {expected.__name__}: {_repr(value, 60)}")
        for name in ("id", "task"):
            if not isinstance(headers.get(name), str) or not headers[name]:
                raise MalformedMessage(f"header {name!r} is {_repr(headers.get(name), 60)}")
        content_type = envelope.get("content-type")
        message = cls(headers, properties, body, content_type, envelope.get("content-encoding"))
        message._check_headers()
        if properties.get("body_encoding") == "base64" and content_type == "application/json":
            message.body = message._from_base64()
        return message

    def _from_base64(self) -> str:
        import base64

        try:
            return base64.b64decode(self.body, validate=True).decode()
        except ValueError as exc:
            raise MalformedMessage(f"body: bad base64: {exc}") from None

    def _check_headers(self) -> None:
        get = self.headers.get
        limits = get("timelimit")
        if limits is not None:
            good = isinstance(limits, list) and len(limits) == 2
            if not good or not all(value is None or _is_number(value) for value in limits):
                raise MalformedMessage(f"header 'timelimit' is {_repr(limits, 60)}")
        retries = get("retries")
        if retries is not None and (not isinstance(retries, int) or isinstance(retries, bool)):
            raise MalformedMessage(f"header 'retries' is {_repr(retries, 60)}")
        for name in ("eta", "expires"):
            value = get(name)
            if value is not None:
                try:
                    _timestamp(value)
                except Exception:
                    raise MalformedMessage(f"header {name!r} is {_repr(value, 60)}") from None
        info = self.properties.get("delivery_info")
        if info is not None and not isinstance(info, dict):
            raise MalformedMessage(f"property 'delivery_info' is {_repr(info, 60)}")

    def payload(self, accept: Iterable[str]) -> Tuple[List[Any], Dict[str, Any], Dict[str, Any]]:
        """Return (args, kwargs, embed); MalformedMessage if the body holds something else."""
        try:
            body = deserialize(self.body, self.content_type, accept)
        except (ContentDisallowed, DecodeError) as exc:
            raise MalformedMessage(str(exc)) from None
        if not isinstance(body, (list, tuple)) or len(body) != 3:
            raise MalformedMessage(f"body: expected [args, kwargs, embed]: {_repr(body, 60)}")
        args, kwargs, embed = body
        if not isinstance(args, (list, tuple)):
            raise MalformedMessage(f"args: expected a list: {_repr(args, 60)}")
        if not isinstance(kwargs, dict):
            raise MalformedMessage(f"kwargs: expected an object: {_repr(kwargs, 60)}")
        return list(args), kwargs, embed if isinstance(embed, dict) else {}

    @property
    def id(self) -> str:
        """The task's id."""
        return self.headers["id"]

    @property
    def expires(self) -> Optional[float]:
        """When the task must have begun, in seconds since the epoch; None for ever."""
        value = self.headers.get("expires")
        return None if value is None else _timestamp(value)


def _timestamp(value: Any) -> float:
    """Return seconds since the epoch for an ISO text or a datetime; a naive one is UTC."""
    when = value if isinstance(value, datetime) else _parse_time(value)
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


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

    def __init__(self, name: str, providing_args: Iterable[str] = ()) -> None:
        self.name = name
        self.providing_args = set(providing_args)
        self.receivers: List[Tuple[Any, Any, Any]] = []  # (key, sender, reference)

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
            return functools.partial(self.connect, sender=sender or receiver, weak=weak)
        key = dispatch_uid or _receiver_key(receiver), sender
        if not any(known == key for known, _, _ in self.receivers):
            reference: Any = lambda: receiver  # noqa: E731
            if weak:
                is_method = hasattr(receiver, "__self__")
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

    def send(self, sender: Any = None, **named: Any) -> List[Tuple[Any, Any]]:
        """Call every receiver; return (receiver, what it returned or raised) pairs."""
        responses = []
        for entry in self.receivers:
            _, wanted, reference = entry
            if wanted is not None and wanted is not sender and wanted != sender:
                if getattr(sender, "name", None) != wanted:
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
    owner = getattr(receiver, "__self__", None)
    return (id(owner), id(receiver.__func__)) if owner is not None else id(receiver)


#: Loggers have Celery's names, so that a project's logging configuration works for both.
logger = logging.getLogger("celery")
task_logger = logging.getLogger("celery.task")
trace_logger = logging.getLogger("celery.app.trace")
worker_logger = logging.getLogger("celery.worker")
for _logger in (logger, task_logger):
    _logger.addHandler(logging.NullHandler())


def _signals(**names: str) -> Dict[str, Signal]:
    return {name: Signal(name, arguments.split()) for name, arguments in names.items()}


SIGNALS = _signals(
    before_task_publish="body exchange routing_key headers properties declare retry_policy",
    after_task_publish="body exchange routing_key headers",
    task_received="request",
    task_prerun="task_id task args kwargs",
    task_postrun="task_id task args kwargs retval state",
    task_success="result runtime",
    task_failure="task_id exception args kwargs traceback einfo",
    task_retry="request reason einfo",
    task_revoked="request terminated signum expired",
    task_rejected="message exc",
    task_unknown="message exc name id",
    celeryd_init="instance conf options",
    celeryd_after_setup="instance conf",
    worker_init="",
    worker_ready="",
    worker_shutting_down="sig how exitcode",
    worker_shutdown="",
    worker_process_init="",
    worker_process_shutdown="pid exitcode",
    setup_logging="loglevel logfile format colorize",
    after_setup_logger="logger loglevel logfile format colorize",
    after_setup_task_logger="logger loglevel logfile format colorize",
)
before_task_publish = SIGNALS["before_task_publish"]
after_task_publish = SIGNALS["after_task_publish"]
task_received = SIGNALS["task_received"]
task_prerun = SIGNALS["task_prerun"]
task_postrun = SIGNALS["task_postrun"]
task_success = SIGNALS["task_success"]
task_failure = SIGNALS["task_failure"]
task_retry = SIGNALS["task_retry"]
task_revoked = SIGNALS["task_revoked"]
task_rejected = SIGNALS["task_rejected"]
task_unknown = SIGNALS["task_unknown"]
celeryd_init = SIGNALS["celeryd_init"]
celeryd_after_setup = SIGNALS["celeryd_after_setup"]
worker_init = SIGNALS["worker_init"]
worker_ready = SIGNALS["worker_ready"]
worker_shutting_down = SIGNALS["worker_shutting_down"]
worker_shutdown = SIGNALS["worker_shutdown"]
worker_process_init = SIGNALS["worker_process_init"]
worker_process_shutdown = SIGNALS["worker_process_shutdown"]
setup_logging = SIGNALS["setup_logging"]
after_setup_logger = SIGNALS["after_setup_logger"]
after_setup_task_logger = SIGNALS["after_setup_task_logger"]


# ---------------------------------------------------------------------------------------------
# 6. Stores
# ---------------------------------------------------------------------------------------------


class Bell:
    """Wakes one sleeper: a worker without work, or a thread that waits for a result.

    Its owner says with `listen` what it wants to hear of, sets `asleep`, looks in the store a last
    time, and waits. Others see the flag and the topics in a small mapped file, at no cost while
    nobody sleeps, and wake the owner by a byte into a FIFO beside it. Without a path, or where
    there are no FIFOs, it works within the process alone; `polls` then says that the owner must
    also look by itself.
    """

    #: The flag's 8 bytes, then a Bloom filter of topics: 2 of its 32,768 bits for each.
    SIZE = 8 + 4096

    def __init__(self, path: Optional[str], polls: bool = False) -> None:
        self.path = path
        self.pid = os.getpid()
        self.polls = polls
        self._nap = 0.005
        if path is None:
            self._event = threading.Event()
            self._map: Any = bytearray(self.SIZE)
        else:
            os.mkfifo(path + ".fifo", 0o600)
            self._fifo = os.open(path + ".fifo", os.O_RDWR | os.O_NONBLOCK)
            self._map = _create_mapped(path + ".bell", self.SIZE)
        self._flag = memoryview(self._map)[:8].cast("Q")

    @property
    def asleep(self) -> bool:
        """Whether the owner wants to be woken; setting it also takes up the bytes of old rings."""
        return bool(self._flag[0])

    @asleep.setter
    def asleep(self, value: bool) -> None:
        self._flag[0] = value

    def listen(self, topics: Iterable[str]) -> None:
        """Hear of these topics from now on, and of no others."""
        bits = bytearray(self.SIZE - 8)
        for topic in topics:
            for bit in _topic_bits(topic):
                bits[bit >> 3] |= 1 << (bit & 7)
        self._map[8 : self.SIZE] = bytes(bits)
        self._nap = 0.005

    def wants(self, bits: Tuple[int, int]) -> bool:
        """Return whether the owner sleeps and listens to the topic with these bits."""
        first, second = bits
        return bool(
            self._flag[0]
            and self._map[8 + (first >> 3)] >> (first & 7) & 1
            and self._map[8 + (second >> 3)] >> (second & 7) & 1
        )

    def ring(self) -> bool:
        """Wake the owner; also safe in a signal handler, and in a child of the owner."""
        self._flag[0] = 0
        if self.path is None:
            self._event.set()
        else:
            try:
                os.write(self._fifo, b"\0")
            except BlockingIOError:  # full of rings already
                pass
        return True

    def wait(self, timeout: float) -> None:
        """Sleep until somebody rings, or for `timeout` seconds."""
        if self.polls:
            timeout, self._nap = min(timeout, self._nap), min(self._nap * 1.5, 0.1)
        if self.path is None:
            self._event.wait(timeout)
            self._event.clear()
        else:
            if _readable(self._fifo, timeout):
                try:
                    os.read(self._fifo, 4096)
                except BlockingIOError:
                    pass
        self._flag[0] = 0

    def close(self) -> None:
        """Give up the bell and its files (in a child of the owner: only let go of them)."""
        if self.path is not None:
            if self.pid == os.getpid():
                for suffix in (".bell", ".fifo"):
                    _unlink(self.path + suffix)
            os.close(self._fifo)
        self._flag.release()


class _RemoteBell(Bell):
    """Another process's bell, seen from here."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path + ".bell", "r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)
        self._flag = memoryview(self._map)[:8].cast("Q")
        self._fifo = -1

    def ring(self) -> bool:
        """Wake the owner; return False, and remove what it left behind, if it is gone."""
        assert self.path is not None
        self._flag[0] = 0
        try:
            if self._fifo < 0:
                self._fifo = os.open(self.path + ".fifo", os.O_WRONLY | os.O_NONBLOCK)
            os.write(self._fifo, b"\0")
        except BlockingIOError:
            pass
        except OSError:  # ENXIO, EPIPE, ENOENT: nobody reads there any more
            for suffix in (".bell", ".fifo"):
                _unlink(self.path + suffix)
            return False
        return True

    def close(self) -> None:
        """Let go of the other's bell."""
        if self._fifo >= 0:
            os.close(self._fifo)
        self._flag.release()
        self._map.close()


class Bells:
    """The bells of one store: opens those of this process, rings those of all."""

    def __init__(self, folder: Optional[str]) -> None:
        self.folder = folder
        self._local: List[Bell] = []
        self._remote: Dict[str, _RemoteBell] = {}
        self._seen = -1
        self._lock = threading.Lock()

    def open(self) -> Bell:
        """Return a new bell of this process."""
        if self.folder is not None and hasattr(os, "mkfifo"):
            for _ in range(3):  # another process may remove the empty folder in between
                try:
                    os.makedirs(self.folder, 0o700, exist_ok=True)
                    return Bell(os.path.join(self.folder, os.urandom(8).hex()))
                except OSError:
                    continue
        bell = Bell(None, polls=self.folder is not None)
        self._local.append(bell)
        return bell

    def close(self, bell: Bell) -> None:
        """Give up a bell of this process."""
        if bell in self._local:
            self._local.remove(bell)
        bell.close()
        if self.folder is not None:
            _rmdir(self.folder)

    def ring(self, topics: Iterable[str], everyone: bool = False) -> None:
        """Wake for each topic the first sleeper who listens, or everyone who does."""
        bells = [*self._local, *self._others()]
        for bits in map(_topic_bits, topics) if bells else ():
            for bell in bells:
                if bell.wants(bits) and bell.ring() and not everyone:
                    break

    def _others(self) -> Iterable[_RemoteBell]:
        if self.folder is None:
            return ()
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except OSError:
            return ()
        if changed != self._seen:
            with self._lock:
                self._scan()
            # A change within one tick of the file system's clock would go unseen.
            self._seen = changed if time.time_ns() - changed > 50_000_000 else -1
        return list(self._remote.values())

    def _scan(self) -> None:
        assert self.folder is not None
        found = {name[:-5] for name in os.listdir(self.folder) if name.endswith(".bell")}
        for name in self._remote.keys() - found:
            del self._remote[name]  # its map goes with it, once no other thread looks at it
        for name in found - self._remote.keys():
            try:
                self._remote[name] = _RemoteBell(os.path.join(self.folder, name))
            except (OSError, ValueError):
                continue

    def sweep(self) -> None:
        """Remove what dead processes left: a FIFO that nobody reads cannot be opened to write."""
        for bell in self._others():
            try:
                os.close(os.open(f"{bell.path}.fifo", os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                bell.ring()


def _topic_bits(topic: str) -> Tuple[int, int]:
    crc = zlib.crc32(topic.encode("utf-8", "surrogatepass"))
    return crc & 0x7FFF, crc >> 15 & 0x7FFF


def _readable(fd: int, timeout: float) -> bool:
    """Wait until `fd` can be read; `poll` knows descriptors above 1,024, eventlet has only select."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout) * 1000))
    return bool(select.select([fd], [], [], max(0.0, timeout))[0])


def _create_mapped(path: str, size: int, head: bytes = b"", lock: bool = False) -> Any:
    """Make a file and map it; where there are locks it gets its name last, so that nobody sees it
    half made and unlocked.

    With `lock` its first byte is locked by this process; returns then (map, descriptor).
    """
    working = path + ".new" if fcntl else path  # Windows cannot rename an open file
    fd = os.open(working, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(fd, size)
        os.write(fd, head)
        mapped = mmap.mmap(fd, size)
        if fcntl:
            if lock:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            os.rename(working, path)
    except BaseException:
        os.close(fd)
        _unlink(working)
        raise
    if lock:
        return mapped, fd
    os.close(fd)
    return mapped


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _rmdir(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:  # not empty, or gone
        pass


#: Flags beside the ticket of a task that has begun: what to do with it if its process dies.
ACKS_LATE, REJECT_ON_LOST = 1, 2


class Slot:
    """The part of a Journal that one child process (or thread) writes: what it has begun, and a
    ring of the outcomes that the main process has not settled yet.

    Each step is made by one aligned 8-byte store, so whoever reads it after a crash sees the state
    before it or after it.
    """

    HEAD = 64

    def __init__(self, journal: Journal, index: int) -> None:
        base = journal.HEAD + index * (self.HEAD + journal.ring_size)
        view = memoryview(journal.map)[base : base + self.HEAD + journal.ring_size]
        self.journal = journal
        self.index = index
        self._words = view[: self.HEAD].cast("Q")  # 0 begun, 4 written, 5 consumed, 6 executed
        self._times = view[: self.HEAD].cast("d")  # 1 begun at, 2 soft and 3 hard deadline
        self._ring = view[self.HEAD :]

    def clear(self) -> None:
        """Make the slot ready for a new process."""
        for word in range(8):
            self._words[word] = 0

    def begin(self, ticket: int, flags: int, soft: float = 0.0, hard: float = 0.0) -> None:
        """Note that a task begins now; deadlines are seconds since the epoch, or 0."""
        self._times[1] = time.time()
        self._times[2] = soft
        self._times[3] = hard
        self._words[0] = ticket << 2 | flags

    def finish(self, ticket: int, outcome: bytes, wake: Callable[[], Any]) -> None:
        """Note how a task ended; waits, waking the main process, while the ring is full."""
        size = len(self._ring)
        record = struct.pack("<QII", ticket, len(outcome), 0) + outcome
        if len(record) > size // 2:
            self.journal.spill(self.index, ticket, outcome)
            record = struct.pack("<QII", ticket, 0, 1)
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

    @property
    def begun(self) -> Tuple[int, int]:
        """The ticket and flags of what runs; ticket 0 is nothing."""
        word = self._words[0]
        return word >> 2, word & 3

    @property
    def times(self) -> Tuple[float, float, float]:
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

    def read(self) -> Tuple[List[Tuple[int, Outcome]], int]:
        """Return the unsettled (ticket, outcome) pairs, and the position to `consume` when they
        are settled."""
        at, end = self._words[5], self._words[4]
        found = []
        while at < end:
            ticket, length, spilled = struct.unpack("<QII", self._bytes(at, 16))
            data = self._bytes(at + 16, length)
            if spilled:
                data = self.journal.spilled(self.index, ticket)
            found.append((ticket, Outcome(*json.loads(data))))
            at += 16 + length
        return found, end

    def consume(self, position: int) -> None:
        """Forget the outcomes before `position`: they are settled."""
        self._words[5] = position

    def _bytes(self, at: int, length: int) -> bytes:
        size = len(self._ring)
        at %= size
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
    MAGIC = b"taskq journal 1\n"
    #: Journals of this process: opening and closing one again would drop its locks.
    own: Dict[str, int] = {}

    def __init__(self, path: Optional[str], map: Any, fd: int, slots: int, ring_size: int) -> None:
        self.path = path
        self.map = map
        self.fd = fd
        self.ring_size = ring_size
        self.slots = [Slot(self, index) for index in range(slots)]
        self._spilled: Dict[Tuple[int, int], bytes] = {}

    @classmethod
    def create(cls, path: Optional[str], node: str, slots: int, ring_size: int) -> Journal:
        """Make a journal for a worker called `node` and lock it for this process."""
        size = cls.HEAD + slots * (Slot.HEAD + ring_size)
        info = _json_encode({"node": node, "pid": os.getpid(), "slots": slots, "ring": ring_size})
        head = cls.MAGIC + info.encode()[: cls.HEAD - 64] + b"\n"
        if path is None:
            return cls(None, mmap.mmap(-1, size), -1, slots, ring_size)
        cls.own[path] = os.getpid()
        map, fd = _create_mapped(path, size, head, lock=True)
        return cls(path, map, fd, slots, ring_size)

    @classmethod
    def open(cls, path: str) -> Journal:
        """Open a journal that another process made; ValueError if it is none."""
        fd = os.open(path, os.O_RDWR)
        try:
            head = os.read(fd, cls.HEAD)
            if not head.startswith(cls.MAGIC):
                raise ValueError(f"{path} is no journal")
            info = json.loads(head[len(cls.MAGIC) :].split(b"\n")[0])
            map = mmap.mmap(fd, cls.HEAD + info["slots"] * (Slot.HEAD + info["ring"]))
        except BaseException:
            os.close(fd)
            raise
        journal = cls(path, map, fd, info["slots"], info["ring"])
        journal.info = info
        return journal

    info: Dict[str, Any] = {}

    def lock(self, index: int) -> None:
        """Lock the byte of child `index`, in the child."""
        if fcntl and self.fd >= 0:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index + 1)

    def lock_whole(self) -> bool:
        """Try to become the one who recovers a dead worker's claims."""
        if fcntl is None:  # no locks: a live worker touches its journal every other second
            assert self.path is not None
            return time.time() - os.stat(self.path).st_mtime > 15
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def spill(self, index: int, ticket: int, outcome: bytes) -> None:
        """Keep an outcome that is too large for the ring in a file of its own."""
        if self.path is None:
            self._spilled[index, ticket] = outcome
            return
        with open(f"{self.path}.{index}.{ticket}", "wb") as file:
            file.write(outcome)

    def spilled(self, index: int, ticket: int) -> bytes:
        """Return such an outcome."""
        if self.path is None:
            return self._spilled[index, ticket]
        with open(f"{self.path}.{index}.{ticket}", "rb") as file:
            return file.read()

    def unspill(self, index: int, ticket: int) -> None:
        """Remove such an outcome, once it is settled."""
        if self.path is None:
            self._spilled.pop((index, ticket), None)
        else:
            _unlink(f"{self.path}.{index}.{ticket}")

    def close(self, remove: bool = False) -> None:
        """Let go of the journal, and with `remove` delete its files."""
        if remove and self.path is not None:
            folder, name = os.path.split(self.path)
            _unlink(self.path)
            for other in os.listdir(folder):
                if other.startswith(name + "."):
                    _unlink(os.path.join(folder, other))
            self.own.pop(self.path, None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Claim:
    """A message that a worker holds: `key` is the store's, `ticket` the worker's number for it."""

    __slots__ = ("key", "ticket", "queue", "priority", "raw", "_message")

    def __init__(self, key: Any, ticket: int, queue: str, priority: int, raw: bytes) -> None:
        self.key = key
        self.ticket = ticket
        self.queue = queue
        self.priority = priority
        self.raw = raw
        self._message: Optional[Message] = None

    @property
    def message(self) -> Message:
        """The message, parsed when first asked for; MalformedMessage if it is none."""
        if self._message is None:
            self._message = Message.decode(self.raw)
        return self._message


#: Makes the outcome of a task whose process died: (claim, flags) -> Outcome.
Lost = Callable[[Claim, int], Outcome] if TYPE_CHECKING else None


class Store:
    """What a broker that also keeps results must do. Nothing above knows SQL, nothing below tasks.

    A message is in a queue, or claimed by one owner (a worker's number), or gone. `settle` is
    atomic: results, follow-up messages and acknowledgements of a batch are all there afterwards, or
    none. Every method raises OperationalError where the store cannot be reached.
    """

    #: Where journals and bells live; None if the store lives in one process alone.
    folder: Optional[str] = None
    bells: Bells
    #: Seconds that results are kept, by default and for failures; None is for ever.
    result_expires: Optional[float] = 86400
    failure_expires: Optional[float] = None

    def uri(self) -> str:
        """Return the address as the banner prints it."""
        raise NotImplementedError

    def publish(self, deliveries: Sequence[Any]) -> None:
        """Put messages into their queues, all or none, and wake workers."""
        raise NotImplementedError

    def look(self, queues: Sequence[str]) -> Tuple[bool, Optional[float]]:
        """Return whether there is something to claim, and when the next message with an ETA is due
        (seconds since the epoch, or None); cheap, and takes no lock."""
        raise NotImplementedError

    def settle(
        self,
        owner: int,
        settled: Sequence[Tuple[Claim, Any]],
        queues: Sequence[str] = (),
        limit: int = 0,
        tickets: Iterator[int] = iter(()),
    ) -> List[Claim]:
        """Apply the outcomes of claims, then claim up to `limit` messages from `queues`.

        Each queue has its turn; within them the smallest priority number and the oldest come first.
        """
        raise NotImplementedError

    def recover(self, lost: Lost) -> int:
        """Settle what dead workers had claimed; return how many messages that were."""
        raise NotImplementedError

    def put_results(self, results: Sequence[Sequence[Any]]) -> None:
        """Store [task id, state, meta text] triples."""
        raise NotImplementedError

    def get_results(self, ids: Sequence[str]) -> Dict[str, Tuple[str, str]]:
        """Return {id: (state, meta text)} for those ids that have a result."""
        raise NotImplementedError

    def forget(self, ids: Sequence[str]) -> None:
        """Delete results."""
        raise NotImplementedError

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Remember that `exchange` brings messages with `routing_key` to `queue`."""
        raise NotImplementedError

    def bindings(self, exchange: str) -> List[Tuple[str, str, str]]:
        """Return the (kind, routing key, queue) bindings of an exchange."""
        raise NotImplementedError

    def purge(self, queue: str) -> int:
        """Delete the messages that wait in a queue; return how many."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Remove expired results and dead processes' files; called every few seconds."""

    def close(self) -> None:
        """Let go of connections and files."""

    def wait(
        self,
        ids: Sequence[str],
        timeout: Optional[float],
        interval: float = 0.5,
        on_interval: Optional[Callable[[], Any]] = None,
    ) -> Iterator[Dict[str, Tuple[str, str]]]:
        """Yield {id: (state, meta text)} of ids that have their end, as they come, until all have.

        Raises TimeoutError when `timeout` seconds have passed; calls `on_interval` every `interval`
        seconds meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = dict.fromkeys(ids)
        bell = None
        try:
            while True:
                found = self.get_results(list(waiting))
                found = {id: pair for id, pair in found.items() if pair[0] in READY_STATES}
                if found:
                    for id in found:
                        del waiting[id]
                    yield found
                if not waiting:
                    return
                if bell is None:  # only now: most results of a long wait are there already
                    bell = self._take_bell()
                    bell.listen(f"r:{id}" for id in waiting)
                    bell.asleep = True
                    continue
                if not found:
                    left = interval if deadline is None else deadline - time.monotonic()
                    if left <= 0:
                        raise TimeoutError("The operation timed out.")
                    bell.wait(min(left, interval))
                    if on_interval is not None:
                        on_interval()
                bell.asleep = True
        finally:
            if bell is not None:
                self._give_bell(bell)

    _spare_bells: List[Bell]

    def _take_bell(self) -> Bell:
        while self._spare_bells:
            bell = self._spare_bells.pop()
            if bell.pid == os.getpid():
                return bell
        return self.bells.open()

    def _give_bell(self, bell: Bell) -> None:
        bell.asleep = False
        if bell.pid == os.getpid():
            self._spare_bells.append(bell)


class StaleClaim(Exception):
    """Claims that a worker wanted to settle are no longer its own; nothing was settled."""


#: "taskq" in the header of a database, so that no other program's file is taken for one.
_APPLICATION_ID = 0x7461736B
_SCHEMA_VERSION = 1
_SCHEMA = """
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
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    meta TEXT NOT NULL,
    expires REAL
) WITHOUT ROWID;
CREATE INDEX results_expires ON results (expires) WHERE expires IS NOT NULL;
CREATE TABLE rejected (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    rejected_at REAL NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL
);
CREATE TABLE bindings (
    exchange TEXT,
    kind TEXT,
    routing_key TEXT,
    queue TEXT,
    PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;
"""


class SQLiteStore(Store):
    """A store in one SQLite file, in WAL mode, or in memory where the path is None.

    Every write is one BEGIN IMMEDIATE transaction. A message with an ETA has a `due` time until it
    is due; what can be claimed is then a range of one partial index, however many rows there are.
    """

    OPTIONS = {"timeout": 30.0, "synchronous": "normal"}

    def __init__(self, path: Optional[str], options: Dict[str, Any]) -> None:
        for name in options:
            if name not in self.OPTIONS:
                raise ImproperlyConfigured(
                    f"unknown option {name!r} of sqlite://: expected {_names(self.OPTIONS)}"
                )
        self.path = path
        self.folder = path and path + "-run"
        self.bells = Bells(self.folder)
        self._spare_bells = []
        self._timeout = self._number(options.get("timeout", 30.0))
        self._synchronous = str(options.get("synchronous", "normal")).upper()
        if self._synchronous not in ("OFF", "NORMAL", "FULL", "EXTRA"):
            raise ImproperlyConfigured(
                f"option 'synchronous' of sqlite:// is {self._synchronous.lower()!r}: expected "
                "off, normal, full or extra"
            )
        self._local = threading.local()
        self._lock = threading.RLock()  # one connection serves all threads in memory
        self._memory: Any = None
        self._turn = 0

    @staticmethod
    def _number(value: Any) -> float:
        try:
            return float(value)
        except ValueError:
            raise ImproperlyConfigured(
                f"option 'timeout' of sqlite:// is {value!r}: expected seconds"
            ) from None

    def uri(self) -> str:
        """Return the address with an absolute path."""
        return "memory://" if self.path is None else "sqlite:///" + self.path

    # -- connections ---------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection; a child of a fork never uses its parent's."""
        if self.path is None:
            if self._memory is None:
                self._memory = self._prepare(
                    sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                )
            return self._memory
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            if hasattr(local, "connection"):
                _inherited.append(local.connection)  # closing it here would harm the parent's
            local.connection = self._open()
            local.pid = os.getpid()
        return local.connection

    def _open(self) -> sqlite3.Connection:
        assert self.path is not None
        try:
            if os.path.isdir(self.path):
                raise OperationalError(f"{self.path} is a directory: expected an SQLite file")
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            return self._prepare(
                sqlite3.connect(
                    self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
                )
            )
        except OSError as exc:
            raise OperationalError(
                f"cannot open the database {self.path}: {exc.strerror}; taskq needs to write the "
                "file and its directory"
            ) from None
        except sqlite3.Error as exc:
            raise OperationalError(f"cannot open the database {self.path}: {exc}") from None

    def _prepare(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        connection.text_factory = bytes  # messages travel undecoded, whatever is in them
        execute = connection.execute
        version = self._check_version(execute)
        execute("PRAGMA journal_mode=WAL")
        execute(f"PRAGMA synchronous={self._synchronous}")
        if not version:
            execute("BEGIN IMMEDIATE")
            try:
                if not self._check_version(execute):  # another process may have been faster
                    for statement in _SCHEMA.split(";\n"):
                        execute(statement)
                    execute(f"PRAGMA application_id={_APPLICATION_ID}")
                    execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            finally:
                execute("COMMIT")
        return connection

    def _check_version(self, execute: Any) -> int:
        """Return the database's schema version, 0 for an empty one; OperationalError for others."""
        version = execute("PRAGMA user_version").fetchone()[0]
        if execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
            if version != _SCHEMA_VERSION:
                raise OperationalError(
                    f"{self.path} has schema version {version}, this taskq ({__version__}) works "
                    f"with {_SCHEMA_VERSION}: use one version of taskq on a file"
                )
            return version
        if version or execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise OperationalError(
                f"{self.path} is the database of another program: give taskq a file of its own"
            )
        return 0

    def _read(self, sql: str, arguments: Sequence[Any] = ()) -> List[Any]:
        with self._lock if self.path is None else _no_lock:
            try:
                return self._connection().execute(sql, arguments).fetchall()
            except sqlite3.Error as exc:
                raise self._error(exc) from None

    def _write(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run `work(connection)` in one transaction."""
        with self._lock if self.path is None else _no_lock:
            connection = self._connection()
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    value = work(connection)
                    connection.execute("COMMIT")
                    return value
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as exc:
                raise self._error(exc) from None

    def _error(self, exc: sqlite3.Error) -> OperationalError:
        return OperationalError(f"database {self.path or 'memory://'}: {exc}")

    # -- messages ------------------------------------------------------------------------------

    def publish(self, deliveries: Sequence[Any]) -> None:
        """Insert messages in one transaction, then wake a worker for each queue."""
        if len(deliveries) == 1:  # the statement is its own transaction
            with self._lock if self.path is None else _no_lock:
                try:
                    self._connection().execute(_INSERT, deliveries[0])
                except sqlite3.Error as exc:
                    raise self._error(exc) from None
        else:
            self._write(lambda connection: connection.executemany(_INSERT, deliveries))
        self.bells.ring({"q:" + delivery[0] for delivery in deliveries})

    def look(self, queues: Sequence[str]) -> Tuple[bool, Optional[float]]:
        """Probe the index of each queue, and that of due times, with one query."""
        probe = (
            "EXISTS (SELECT 1 FROM messages"
            " WHERE owner IS NULL AND due IS NULL AND queue = ? LIMIT 1)"
        )
        probes = " OR ".join([probe] * len(queues)) or "0"
        due = "(SELECT min(due) FROM messages WHERE due IS NOT NULL)"
        ready, next_due = self._read(f"SELECT {probes}, {due}", queues)[0]
        return bool(ready) or next_due is not None and next_due <= time.time(), next_due

    def settle(
        self,
        owner: int,
        settled: Sequence[Tuple[Claim, Any]],
        queues: Sequence[str] = (),
        limit: int = 0,
        tickets: Iterator[int] = iter(()),
    ) -> List[Claim]:
        """Settle and claim in one transaction, then ring whoever waits for what it brought."""

        def work(connection: sqlite3.Connection) -> List[Claim]:
            self._settle(connection, owner, settled)
            if not limit:
                return []
            connection.execute(_PROMOTE, (time.time(),))
            return self._claim(connection, owner, queues, limit, tickets)

        claims = self._write(work)
        topics, given = set(), set()
        for claim, outcome in settled:
            topics.update("r:" + result[0] for result in outcome.results)
            given.update("q:" + delivery[0] for delivery in outcome.publish)
            if outcome.verb == "requeue":
                given.add("q:" + claim.queue)
        if topics:
            self.bells.ring(topics, everyone=True)
        if len(claims) == limit and limit:  # there may be more than this worker takes
            given.update("q:" + queue for queue in queues)
        if given:
            self.bells.ring(given)
        return claims

    def _settle(
        self, connection: sqlite3.Connection, owner: int, settled: Sequence[Tuple[Claim, Any]]
    ) -> None:
        """Apply outcomes; StaleClaim, and nothing is applied, if a message is not this owner's."""
        gone = [(claim.key, owner) for claim, outcome in settled if outcome.verb != "requeue"]
        back = [
            (_text(outcome.reason or claim.raw), claim.key, owner)
            for claim, outcome in settled
            if outcome.verb == "requeue"
        ]
        for sql, rows in ((_DELETE, gone), (_REQUEUE, back)):
            if rows and connection.executemany(sql, rows).rowcount < len(rows):
                raise StaleClaim(f"another worker has taken over claims of {owner:x}")
        results = [result for _, outcome in settled for result in outcome.results]
        if results:
            self._insert_results(connection, results)
        published = [delivery for _, outcome in settled for delivery in outcome.publish]
        if published:
            connection.executemany(_INSERT, published)
        rejected = [
            (claim.queue, time.time(), str(outcome.reason), _text(claim.raw))
            for claim, outcome in settled
            if outcome.verb == "reject"
        ]
        if rejected:
            connection.executemany(_REJECT, rejected)

    def _claim(
        self,
        connection: sqlite3.Connection,
        owner: int,
        queues: Sequence[str],
        limit: int,
        tickets: Iterator[int],
    ) -> List[Claim]:
        """Claim a share from each queue, then what is left of `limit` from those that have more."""
        self._turn += 1
        start = self._turn % len(queues)
        rows: Dict[str, List[Any]] = {}
        share = -(-limit // len(queues))
        for queue in (*queues[start:], *queues[:start]):
            rows[queue] = connection.execute(_READY, (queue, share)).fetchall()
        left = limit - sum(map(len, rows.values()))
        if left > 0 and len(queues) > 1:
            for queue, found in rows.items():
                if len(found) == share and left > 0:
                    rows[queue] = connection.execute(_READY, (queue, share + left)).fetchall()
                    left -= len(rows[queue]) - share
        turns = itertools.zip_longest(*([(queue, row) for row in rows[queue]] for queue in rows))
        mixed = [pair for turn in turns for pair in turn if pair]
        if len(rows) > 1:
            mixed.sort(key=lambda pair: pair[1][1])  # stable: turns are kept within a priority
        claims = [
            Claim(key, next(tickets), queue, priority, raw if isinstance(raw, bytes) else b"")
            for queue, (key, priority, raw) in mixed[:limit]
        ]
        if claims:
            marks = [(owner, claim.ticket, claim.key) for claim in claims]
            connection.executemany(_MARK, marks)
        return claims

    def recover(self, lost: Lost) -> int:
        """Find journals that no process holds any more, and claims that have no journal at all."""
        if self.folder is None:
            return 0
        owners = {row[0] for row in self._read("SELECT DISTINCT owner FROM messages"
                  " WHERE owner IS NOT NULL")}  # fmt: skip
        try:
            names = [name for name in os.listdir(self.folder) if name.endswith(".journal")]
        except OSError:
            names = []
        count = 0
        for name in names:
            path = os.path.join(self.folder, name)
            owners.discard(int(name[:-8], 16))
            if Journal.own.get(path) != os.getpid():
                count += self._recover_journal(path, int(name[:-8], 16), lost)
        for owner in owners:
            count += self._recover_claims(owner, {}, {}, lost)
        return count

    def _recover_journal(self, path: str, owner: int, lost: Lost) -> int:
        try:
            journal = Journal.open(path)
        except (OSError, ValueError):  # gone already, or being made
            return 0
        try:
            if not journal.lock_whole():
                return 0
            finished: Dict[int, Any] = {}
            begun = {}
            for slot in journal.slots:
                finished.update(slot.read()[0])
                ticket, flags = slot.begun
                begun[ticket] = flags
            count = self._recover_claims(owner, finished, begun, lost)
            journal.close(remove=True)
            return count
        finally:
            journal.close()

    def _recover_claims(
        self, owner: int, finished: Dict[int, Any], begun: Dict[int, int], lost: Lost
    ) -> int:
        rows = self._read(
            "SELECT id, ticket, queue, priority, message FROM messages WHERE owner = ?", (owner,)
        )
        settled = []
        for key, ticket, queue, priority, raw in rows:
            claim = Claim(key, ticket, queue.decode(), priority, raw)
            outcome = finished.get(ticket)
            if outcome is None:
                outcome = lost(claim, begun[ticket]) if ticket in begun else _GIVE_BACK
            settled.append((claim, outcome))
        if settled:
            try:
                self.settle(owner, settled)
            except StaleClaim:  # another worker is recovering the same claims
                return 0
        return len(settled)

    def purge(self, queue: str) -> int:
        """Delete what waits in a queue, also what is not due yet."""
        sql = "DELETE FROM messages WHERE queue = ? AND owner IS NULL"
        return self._write(lambda connection: connection.execute(sql, (queue,)).rowcount)

    # -- results -------------------------------------------------------------------------------

    def _insert_results(
        self, connection: sqlite3.Connection, results: Sequence[Sequence[Any]]
    ) -> None:
        now = time.time()
        connection.executemany(
            "INSERT OR REPLACE INTO results (id, state, meta, expires) VALUES (?, ?, ?, ?)",
            [(id, state, meta, self._expiry(state, now)) for id, state, meta in results],
        )

    def _expiry(self, state: str, now: float) -> Optional[float]:
        kept = self.result_expires
        if state == FAILURE and self.failure_expires is not None:
            kept = self.failure_expires
        return now + kept if kept else None

    def put_results(self, results: Sequence[Sequence[Any]]) -> None:
        """Store results in one transaction, then wake who waits for them."""
        self._write(lambda connection: self._insert_results(connection, results))
        topics = {"r:" + id for id, state, _ in results if state in READY_STATES}
        if topics:
            self.bells.ring(topics, everyone=True)

    def get_results(self, ids: Sequence[str]) -> Dict[str, Tuple[str, str]]:
        """Read some hundreds of results with one query."""
        found = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            marks = ",".join("?" * len(some))
            sql = f"SELECT id, state, meta FROM results WHERE id IN ({marks})"
            sql += " AND (expires IS NULL OR expires > ?)"
            for id, state, meta in self._read(sql, (*some, time.time())):
                found[id.decode()] = state.decode(), meta.decode()
        return found

    def forget(self, ids: Sequence[str]) -> None:
        """Delete results in one transaction."""
        rows = [(id,) for id in ids]
        self._write(lambda conn: conn.executemany("DELETE FROM results WHERE id = ?", rows))

    # -- bindings and housekeeping ---------------------------------------------------------------

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Add a row, unless it is there."""
        if (kind, routing_key, queue) not in self.bindings(exchange):
            row = (exchange, kind, routing_key, queue)
            self._write(
                lambda conn: conn.execute("INSERT OR REPLACE INTO bindings VALUES (?,?,?,?)", row)
            )

    def bindings(self, exchange: str) -> List[Tuple[str, str, str]]:
        """Read the rows of an exchange."""
        sql = "SELECT kind, routing_key, queue FROM bindings WHERE exchange = ?"
        return [tuple(v.decode() for v in row) for row in self._read(sql, (exchange,))]  # type: ignore[misc]

    def sweep(self) -> None:
        """Delete some expired results at a time, so that no transaction is long."""
        sql = "SELECT id FROM results WHERE expires < ? LIMIT 500"
        while True:
            rows = self._read(sql, (time.time(),))
            if not rows:
                break
            self.forget([row[0].decode() for row in rows])
        self.bells.sweep()

    def close(self) -> None:
        """Close this thread's connection and the spare bells."""
        while self._spare_bells:
            self.bells.close(self._spare_bells.pop())
        if self.path is not None and getattr(self._local, "pid", None) == os.getpid():
            self._local.connection.close()
            del self._local.pid, self._local.connection


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
_REQUEUE = "UPDATE messages SET owner = NULL, ticket = NULL, message = ? WHERE id = ? AND owner = ?"
_REJECT = "INSERT INTO rejected (queue, rejected_at, reason, message) VALUES (?, ?, ?, ?)"

#: What becomes of a claim that had not begun.
_GIVE_BACK = Outcome("requeue", [], [], None, 0.0)


class _NoLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: Any) -> None: ...


_no_lock = _NoLock()
_inherited: List[Any] = []


def _text(raw: Union[str, bytes]) -> Any:
    """Return a message as text where it is text, else as the bytes that it is."""
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


_stores: Dict[Tuple[str, str], Store] = {}


def open_store(url: str, options: Dict[str, Any]) -> Store:
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
    store = _stores.get(key)
    if store is None:
        if not separator or scheme not in ("sqlite", "memory"):
            raise ImproperlyConfigured(
                f"{_mask_url(url)!r}: taskq has no {scheme!r}; use sqlite:// (a file) or redis://"
                if scheme != "redis"
                else f"{_mask_url(url)!r}: this version of taskq has sqlite:// but not yet redis://"
            )
        if scheme == "sqlite" and not rest.startswith("/"):
            raise ImproperlyConfigured(
                f"{url!r}: write sqlite:///relative.db or sqlite:////absolute/path.db"
            )
        path = os.path.abspath(rest[1:]) if scheme == "sqlite" and len(rest) > 1 else None
        store = SQLiteStore(path, options)
        _stores[key] = store
    return store


def _after_fork() -> None:
    for store in _stores.values():
        if isinstance(store, SQLiteStore):
            store._lock = threading.RLock()
            store.bells._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------
# 7. Results
# ---------------------------------------------------------------------------------------------


class _Threads(threading.local):
    """What each thread is doing: the tasks it runs, innermost last, and whether it may wait."""

    def __init__(self) -> None:
        self.stack: List[Tuple[Any, Any]] = []  # (task, request)
        self.may_join = True


_thread = _Threads()


class _JoinResult:
    """Context manager that sets whether this thread may wait for results."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed

    def __enter__(self) -> None:
        self.before, _thread.may_join = _thread.may_join, self.allowed

    def __exit__(self, *exc_info: Any) -> None:
        _thread.may_join = self.before


def allow_join_result() -> _JoinResult:
    """Let a task wait for other tasks: `with allow_join_result(): result.get()`.

    The processes that wait are missing where the others should run: mind deadlocks.
    """
    return _JoinResult(True)


def denied_join_result() -> _JoinResult:
    """Forbid this thread to wait for results, as in tasks."""
    return _JoinResult(False)


def assert_will_not_block() -> None:
    """Raise RuntimeError inside a task, where waiting for another may wait for ever."""
    if not _thread.may_join:
        raise RuntimeError(
            "Never call result.get() within a task!\n"
            "See README, 'Limits and differences', or use allow_join_result()."
        )


def _encode_meta(app: Any, meta: Dict[str, Any]) -> str:
    """Return a result's meta as text: JSON, or base64 of a pickle where that is the serializer."""
    serializer = app.conf.result_serializer
    if serializer == "json":
        try:
            return _json_encode(meta)
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(str(exc)) from exc
    return serialize(meta, serializer)[2]


def _decode_meta(app: Any, text: str) -> Dict[str, Any]:
    """Return the meta that `_encode_meta` wrote; its result is an exception where it failed."""
    kind = CONTENT_TYPES["json" if text.startswith("{") else "pickle"]
    accept = app.conf.result_accept_content or {*app.conf.accept_content}
    if kind == CONTENT_TYPES["pickle"] and app.conf.result_serializer == "pickle":
        accept = {*accept, "pickle"}
    meta = deserialize(text, kind, {*accept, "json"})
    if meta["status"] in EXCEPTION_STATES:
        meta["result"] = decode_exception(meta["result"])
    return meta


class AsyncResult:
    """The result of a task, there or still to come: `add.delay(2, 2)` returns one.

    Can be made from an id alone, in any process that has the app: `AsyncResult(id, app=app).get()`.
    """

    TimeoutError = TimeoutError

    def __init__(
        self,
        id: str,
        backend: Any = None,
        task_name: Optional[str] = None,
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
        self._cache: Optional[Dict[str, Any]] = None

    @property
    def backend(self) -> Store:
        """The store that keeps the result."""
        return self._backend or self.app.backend

    @property
    def task_id(self) -> str:
        """The id, by its other name."""
        return self.id

    def _meta(self) -> Dict[str, Any]:
        """Return the task's meta, from memory once it has its end."""
        if self._cache is not None:
            return self._cache
        pair = self.backend.get_results([self.id]).get(self.id)
        if pair is None:
            return {"status": PENDING, "result": None}
        return self._keep(pair)

    def _keep(self, pair: Tuple[str, str]) -> Dict[str, Any]:
        meta = _decode_meta(self.app, pair[1])
        if meta["status"] in READY_STATES:
            self._cache = meta
        return meta

    def get(
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Optional[Callable[[str, Any], Any]] = None,
        on_message: Any = None,
        on_interval: Optional[Callable[[], Any]] = None,
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
        self, propagate: bool = True, callback: Optional[Callable[[str, Any], Any]] = None
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

    @property
    def traceback(self) -> Optional[str]:
        """The traceback of a task that failed, as text."""
        return self._meta().get("traceback")

    @property
    def date_done(self) -> Optional[datetime]:
        """When the task had its end, in UTC."""
        value = self._meta().get("date_done")
        return _parse_time(value) if isinstance(value, str) else value

    @property
    def children(self) -> Optional[List[Any]]:
        """The results of the tasks that this one called."""
        return self._meta().get("children")

    @property
    def name(self) -> Optional[str]:
        """The task's name; this and the next five need `result_extended`."""
        return self._meta().get("name")

    @property
    def args(self) -> Any:
        """Its positional arguments."""
        return self._meta().get("args")

    @property
    def kwargs(self) -> Any:
        """Its keyword arguments."""
        return self._meta().get("kwargs")

    @property
    def worker(self) -> Optional[str]:
        """The node that ran it."""
        return self._meta().get("worker")

    @property
    def retries(self) -> Optional[int]:
        """How often it was retried."""
        return self._meta().get("retries")

    @property
    def queue(self) -> Optional[str]:
        """The queue it came from."""
        return self._meta().get("queue")

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

    def as_tuple(self) -> Tuple[Any, None]:
        """Return the result as a nested tuple that JSON can hold."""
        return (self.id, self.parent and self.parent.as_tuple()), None

    def as_list(self) -> List[str]:
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
        traceback: Optional[str] = None,
        name: Optional[str] = None,
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

    def get(
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        disable_sync_subtasks: bool = True,
        **_: Any,
    ) -> Any:
        """Return the result, or raise the task's error."""
        if disable_sync_subtasks:
            assert_will_not_block()
        return self.maybe_throw(propagate)

    wait = get

    def forget(self) -> None:
        """Do nothing: no store has it."""

    def __reduce__(self) -> Any:
        meta = self._meta()
        return type(self), (self.id, meta["result"], meta["status"], meta["traceback"])

    def __repr__(self) -> str:
        return f"<EagerResult: {self.id}>"


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
        self,
        name: str = "",
        exchange: Union[Exchange, str, None] = None,
        routing_key: str = "",
        **_: Any,
    ) -> None:
        self.name = name
        self.exchange = Exchange(exchange) if isinstance(exchange, str) else exchange
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
    """Says which queues a task goes to, from `task_queues`, `task_routes` and what the call asks."""

    def __init__(self, app: TaskQ) -> None:
        self.app = app
        conf = app.conf
        self.create_missing = conf.task_create_missing_queues
        self.queues: Dict[str, Queue] = {}
        name = conf.task_default_queue
        exchange = Exchange(conf.task_default_exchange or name, conf.task_default_exchange_type)
        self.default = Queue(name, exchange, conf.task_default_routing_key or name)
        listed = conf.task_queues
        if isinstance(listed, collections.abc.Mapping):
            listed = [_queue_from(name, options) for name, options in listed.items()]
        for queue in listed if listed is not None else [self.default]:
            self.add(queue)
        self.routes = [_Route(route) for route in _route_list(conf.task_routes)]
        self._bound = False

    def add(self, queue: Union[Queue, str]) -> Queue:
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
        self.queues[queue.name] = queue
        return queue

    def queue(self, name: Union[Queue, str]) -> Queue:
        """Return a queue by name; makes it where `task_create_missing_queues` allows."""
        if isinstance(name, Queue):
            return self.queues.get(name.name) or self.add(name)
        found = self.queues.get(name)
        if found is None:
            if name == self.default.name:
                return self.default
            if not self.create_missing:
                raise QueueNotFound(f"Queue {name!r} missing from task_queues")
            found = self.add(name)
        return found

    def options(
        self, name: str, args: Any, kwargs: Any, options: Dict[str, Any], task: Any
    ) -> Dict[str, Any]:
        """Return `options` over what the first route that matches the task says."""
        for route in self.routes:
            found = route(name, args, kwargs, options, task)
            if found:
                found = {"queue": found} if isinstance(found, str) else dict(found)
                found.update((k, v) for k, v in options.items() if v is not None)
                return found
        return options

    def resolve(self, options: Dict[str, Any]) -> Tuple[List[str], str, str]:
        """Return (names of queues, exchange, routing key) for queue=, exchange=, routing_key=."""
        asked, exchange = options.get("queue"), options.get("exchange")
        key = options.get("routing_key")
        queue = self.queue(asked) if asked else self.default
        if isinstance(exchange, Exchange):
            exchange = exchange.name
        assert queue.exchange is not None
        if queue.exchange.type == "direct" and not (exchange and key):
            if exchange and not asked:
                return self.bound_to(exchange, key or ""), exchange, key or ""
            return [queue.name], "", queue.name
        exchange = exchange or queue.exchange.name
        key = key or queue.routing_key
        return self.bound_to(exchange, key), exchange, key

    def bound_to(self, exchange: str, key: str) -> List[str]:
        """Return the queues that an exchange brings messages of this routing key to."""
        self.bind()
        found = []
        for kind, pattern, queue in self.app.store.bindings(exchange):
            matches = kind == "fanout" or pattern == key
            if kind == "topic":
                matches = _topic_matches(pattern.split("."), key.split("."))
            if matches and queue not in found:
                found.append(queue)
        if not found:
            raise QueueNotFound(
                f"no queue is bound to exchange {exchange!r} with routing key {key!r}: list it in "
                "task_queues, or use queue="
            )
        return found

    def bind(self, queues: Optional[Iterable[Queue]] = None) -> None:
        """Make the bindings of these queues, or once of all, known to the store."""
        if queues is None and self._bound:
            return
        for queue in list(self.queues.values()) if queues is None else queues:
            exchange = queue.exchange
            assert exchange is not None
            self.app.store.bind(exchange.name, exchange.type, queue.routing_key, queue.name)
        self._bound = self._bound or queues is None


def _queue_from(name: str, options: Dict[str, Any]) -> Queue:
    exchange = Exchange(options.get("exchange") or name, options.get("exchange_type") or "direct")
    return Queue(name, exchange, options.get("routing_key") or options.get("binding_key") or name)


def _route_list(routes: Any) -> List[Any]:
    if routes is None:
        return []
    if isinstance(routes, (list, tuple)) and not (
        routes and all(isinstance(r, (list, tuple)) and len(r) == 2 for r in routes)
    ):
        return list(routes)
    return [routes]


class _Route:
    """One entry of `task_routes`: a function, its name, or patterns of task names."""

    def __init__(self, route: Any) -> None:
        self.function: Any = None
        if isinstance(route, str):
            route = _symbol(route)
        if callable(route):
            self.function = route
            return
        pairs = route.items() if isinstance(route, collections.abc.Mapping) else route
        self.exact: Dict[str, Any] = {}
        self.patterns: List[Tuple[Any, Any]] = []
        for pattern, options in pairs:
            if isinstance(pattern, str) and not set(pattern) & set("*?["):
                self.exact[pattern] = options
            else:
                if isinstance(pattern, str):
                    import fnmatch

                    pattern = re.compile(fnmatch.translate(pattern))
                self.patterns.append((pattern, options))

    def __call__(self, name: str, args: Any, kwargs: Any, options: Any, task: Any) -> Any:
        if self.function is not None:
            return self.function(name, args, kwargs, options, task=task)
        if name in self.exact:
            return self.exact[name]
        return next((found for pattern, found in self.patterns if pattern.match(name)), None)


def _symbol(name: str) -> Any:
    """Return the object at 'module:attribute' or 'module.attribute'."""
    import importlib

    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


class Context:
    """A task's request: what is known of this call of it (`self.request` in a bound task)."""

    args: Any = None
    callbacks: Any = None
    called_directly = True
    chain: Any = None
    chord: Any = None
    correlation_id: Optional[str] = None
    delivery_info: Any = None
    errbacks: Any = None
    eta: Optional[str] = None
    expires: Optional[str] = None
    group: Optional[str] = None
    group_index: Optional[int] = None
    headers: Any = None
    hostname: Optional[str] = None
    id: Optional[str] = None
    ignore_result = False
    is_eager = False
    kwargs: Any = None
    logfile: Any = None
    loglevel: Any = None
    origin: Optional[str] = None
    parent_id: Optional[str] = None
    properties: Any = None
    retries = 0
    reply_to: Optional[str] = None
    replaced_task_nesting = 0
    root_id: Optional[str] = None
    shadow: Optional[str] = None
    stamped_headers: Any = None
    stamps: Any = None
    task: Optional[str] = None
    taskset: Any = None
    timelimit: Any = None
    utc = True
    _protected = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(*args, **kwargs)
        #: Messages that the task has asked for and that are sent with its outcome.
        self.follow_ups: List[Any] = []

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set attributes."""
        self.__dict__.update(*args, **kwargs)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default`."""
        return getattr(self, key, default)

    @property
    def children(self) -> List[Any]:
        """The results of tasks that this one has called."""
        return self.__dict__.setdefault("_children", [])

    @property
    def time_limit(self) -> Optional[float]:
        """The hard limit that the call asked for, in seconds."""
        return self.timelimit[0] if self.timelimit else None

    @property
    def soft_time_limit(self) -> Optional[float]:
        """The soft limit that the call asked for, in seconds."""
        return self.timelimit[1] if self.timelimit else None

    def __repr__(self) -> str:
        return f"<Context: {vars(self)!r}>"


_HEADERS = frozenset(
    "lang task id shadow eta expires group group_index retries timelimit root_id parent_id argsrepr"
    " kwargsrepr origin ignore_result replaced_task_nesting stamped_headers stamps".split()
)


def request_of(message: Message, args: Any, kwargs: Any, embed: Any, hostname: str) -> Context:
    """Return the request of a message: its headers, its delivery and its arguments."""
    headers, properties = message.headers, message.properties
    request = Context(headers)
    info = properties.get("delivery_info") or {}
    request.update(
        args=args,
        kwargs=kwargs,
        hostname=hostname,
        called_directly=False,
        callbacks=embed.get("callbacks"),
        errbacks=embed.get("errbacks"),
        chain=embed.get("chain"),
        chord=embed.get("chord"),
        retries=headers.get("retries") or 0,
        correlation_id=properties.get("correlation_id"),
        reply_to=properties.get("reply_to"),
        properties=properties,
        delivery_info={
            "exchange": info.get("exchange", ""),
            "routing_key": info.get("routing_key"),
            "priority": properties.get("priority"),
            "redelivered": info.get("redelivered"),
        },
        headers={key: headers[key] for key in headers.keys() - _HEADERS} or None,
    )
    return request


class _Conf:
    """A task's attribute whose default is a setting."""

    def __init__(self, setting: str) -> None:
        self.setting = setting

    def __get__(self, task: Any, owner: Any) -> Any:
        return None if task is None else task.app.conf[self.setting]


#: What `apply_async` takes besides args and kwargs, and what of it reaches the message unseen.
_CALL_OPTIONS = frozenset(
    "task_id countdown eta expires queue exchange routing_key priority headers retry retry_policy "
    "serializer ignore_result time_limit soft_time_limit shadow reply_to root_id parent_id retries "
    "argsrepr kwargsrepr origin add_to_parent stamped_headers stamps replaced_task_nesting".split()
)
_LATER_OPTIONS = frozenset("link link_error chain chord group_id group_index compression".split())


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
    Request: Any = None

    _app: Any = None
    #: The name by which it is called.
    name: str = None  # type: ignore[assignment]
    #: Whether calls are checked against the function's signature.
    typing: Any = True
    #: How often `retry` may run it again; None is without end.
    max_retries: Optional[int] = 3
    #: Seconds until a retry that names no time.
    default_retry_delay: float = 180
    rate_limit: Any = None
    trail = True
    send_events = True
    #: Exceptions that are expected: logged at INFO, without a traceback.
    throws: Tuple[Any, ...] = ()
    #: Seconds, or a datetime, after which a call that has not begun is REVOKED.
    expires: Any = None
    resultrepr_maxsize = 1024
    abstract = True
    queue: Optional[str] = None
    exchange: Optional[str] = None
    routing_key: Optional[str] = None
    autoretry_for: Tuple[Any, ...] = ()
    dont_autoretry_for: Tuple[Any, ...] = ()
    retry_kwargs: Dict[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
    retry_jitter = True
    __header__: Any = None

    acks_late: Any = _Conf("task_acks_late")
    acks_on_failure_or_timeout: Any = _Conf("task_acks_on_failure_or_timeout")
    ignore_result: Any = _Conf("task_ignore_result")
    priority: Any = _Conf("task_default_priority")
    reject_on_worker_lost: Any = _Conf("task_reject_on_worker_lost")
    serializer: Any = _Conf("task_serializer")
    soft_time_limit: Any = _Conf("task_soft_time_limit")
    store_eager_result: Any = _Conf("task_store_eager_result")
    store_errors_even_if_ignored: Any = _Conf("task_store_errors_even_if_ignored")
    time_limit: Any = _Conf("task_time_limit")
    track_started: Any = _Conf("task_track_started")

    @property
    def app(self) -> TaskQ:
        """The app that the task belongs to."""
        return self._app if self._app is not None else current_app._get_current_object()

    @app.setter
    def app(self, app: TaskQ) -> None:
        self._app = app

    @property
    def backend(self) -> Store:
        """The store that keeps the task's results."""
        return self.app.backend

    def acks_on(self, timeout: bool) -> bool:
        """Return whether a late task that failed, or ran into its time limit, is acknowledged."""
        name = "acks_on_timeout" if timeout else "acks_on_failure"
        value = getattr(self, name, None)
        if value is None:
            value = self.app.conf["task_" + name]
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

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Called before the task runs."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Called when it ended well."""

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called when it failed."""

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called when it will be retried."""

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Called when it has its end, whichever."""

    # -- calling it ----------------------------------------------------------------------------

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send the task with these arguments: `add.delay(2, 2)`."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Dict[str, Any]] = None,
        task_id: Optional[str] = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: Optional[str] = None,
        **options: Any,
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
        if self.typing and self.app.strict_typing and self.__header__ is not None:
            self.__header__(*(args or ()), **(kwargs or {}))
        soft, hard = self.soft_time_limit, self.time_limit
        if soft and hard and soft > hard:
            raise ValueError("soft_time_limit must be less than or equal to time_limit")
        options.update(task_id=task_id, link=link, link_error=link_error, shadow=shadow)
        app = self.app
        if app.conf.task_always_eager:
            body = serialize(
                (args or (), kwargs or {}), options.get("serializer") or self.serializer
            )
            args, kwargs = deserialize(body[2], body[0], [body[0]])
            with denied_join_result():
                return self.apply(args, kwargs, **options)
        return app._send(self.name, args, kwargs, options, self)

    def _call_defaults(self, options: Dict[str, Any]) -> Dict[str, Any]:
        """Return `options` over what the task itself says."""
        defaults = {
            name: getattr(self, name)
            for name in ("queue", "exchange", "routing_key", "priority", "expires", "serializer")
        }
        defaults["ignore_result"] = self.ignore_result
        defaults.update((name, value) for name, value in options.items() if value is not None)
        return defaults

    def apply(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Dict[str, Any]] = None,
        task_id: Optional[str] = None,
        retries: int = 0,
        throw: Optional[bool] = None,
        headers: Optional[Dict[str, Any]] = None,
        ignore_result: Optional[bool] = None,
        **options: Any,
    ) -> EagerResult:
        """Run the task here and now, as a worker would; return its EagerResult.

        throw: raise its error instead of keeping it; `task_eager_propagates` by default.
        """
        app = self.app
        for name in _LATER_OPTIONS:
            if options.get(name):
                raise _unavailable(name)
        if throw is None:
            throw = app.conf.task_eager_propagates
        id = task_id or uuid()
        request = Context(
            id=id,
            task=self.name,
            args=list(args or ()),
            kwargs=dict(kwargs or {}),
            retries=retries,
            is_eager=True,
            called_directly=False,
            hostname=_hostname(),
            headers=headers,
            root_id=id,
            ignore_result=self.ignore_result if ignore_result is None else ignore_result,
            delivery_info={
                "is_eager": True,
                "exchange": options.get("exchange"),
                "routing_key": options.get("routing_key"),
                "priority": options.get("priority"),
            },
        )
        run = run_task(self, request, propagate=bool(throw))
        if run.state == RETRY and run.value.sig is not None:
            return run.value.sig()
        if self.store_eager_result and not request.ignore_result and run.meta is not None:
            app.backend.put_results([(id, run.state, run.meta)])
        value = run.value.exc if run.state == RETRY else run.value
        return EagerResult(id, value, run.state, run.traceback, self.name, app)

    # -- steering it -----------------------------------------------------------------------------

    def retry(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Dict[str, Any]] = None,
        exc: Optional[BaseException] = None,
        throw: bool = True,
        eta: Optional[datetime] = None,
        countdown: Optional[float] = None,
        max_retries: Optional[int] = None,
        **options: Any,
    ) -> Retry:
        """Run this call of the task again later: `raise self.retry(exc=exc, countdown=10)`.

        Raises Retry, which tells the worker so (with `throw=False` returns it); `exc`, or
        MaxRetriesExceededError, when `max_retries` are used up. The new message is sent in the
        transaction that ends this run. Outside a worker raises `exc`, or Retry.
        """
        request = self.request
        if request.called_directly:
            current = sys.exc_info()[1]
            if current is not None and (exc is None or exc is current):
                raise current
            raise exc or Retry("Task can be retried", None)
        if eta is None and countdown is None:
            countdown = self.default_retry_delay
        limit = self.max_retries if max_retries is None else max_retries
        args = request.args if args is None else args
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
        ret = Retry(exc=exc, when=eta or countdown, is_eager=request.is_eager)
        if request.is_eager:
            ret.sig = functools.partial(
                self.apply, args, kwargs, task_id=request.id, retries=retries, **options
            )
        else:
            again = self._options_of(request)
            again.update(options, eta=eta, countdown=countdown, retries=retries)
            prepared = self.app._prepare(self.name, args, kwargs, again, self)
            request.follow_ups.extend(prepared.deliveries)
        if throw:
            raise ret
        return ret

    def _options_of(self, request: Context) -> Dict[str, Any]:
        """Return the options that send a request once more."""
        info = request.delivery_info or {}
        options = {
            "task_id": request.id,
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "shadow": request.shadow,
            "expires": request.expires,
            "headers": request.headers,
            "reply_to": request.reply_to,
            "origin": request.origin,
            "ignore_result": request.ignore_result,
            "stamped_headers": request.stamped_headers,
            "stamps": request.stamps,
            "replaced_task_nesting": request.replaced_task_nesting,
            "priority": info.get("priority"),
        }
        options["time_limit"], options["soft_time_limit"] = request.timelimit or (None, None)
        if info.get("exchange"):
            options.update(exchange=info["exchange"], routing_key=info["routing_key"])
        else:
            options["queue"] = info.get("routing_key")
        return options

    def update_state(
        self,
        task_id: Optional[str] = None,
        state: Optional[str] = None,
        meta: Any = None,
        request: Any = None,
        **_: Any,
    ) -> None:
        """Set the task's state, own names included, and what `AsyncResult.info` shows meanwhile.

        Example: `self.update_state(state='PROGRESS', meta={'done': 3, 'of': 10})`.
        """
        id = task_id or self.request.id
        if id is None:
            raise ValueError("update_state: no task runs here; pass task_id")
        found = encode_exception(meta) if isinstance(meta, BaseException) else meta
        text = _encode_meta(self.app, _meta(id, state or PENDING, found, request or self.request))
        self.app.backend.put_results([(id, state or PENDING, text)])

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802
        """Return the result of a call of this task by its id."""
        return AsyncResult(task_id, app=self.app, task_name=self.name, **kwargs)

    def s(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available in this version."""
        raise _unavailable("signatures")

    si = signature = subtask = s
    map = starmap = chunks = replace = add_to_chord = s

    def __reduce__(self) -> Any:
        return _task_by_name, (self.name, type(self).__module__)

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {_app_repr(self.app)}>"


def _app_repr(app: TaskQ) -> str:
    return f"{app.main or '__main__'} at {id(app):#x}"


def _task_by_name(name: str, module: str) -> Task:
    """Return the task that a pickle names."""
    app = current_app._get_current_object()
    if name not in app.tasks and module not in ("__main__", __name__):
        import importlib

        importlib.import_module(module)
    return app.tasks[name]


class TaskRegistry(Dict[str, Any] if TYPE_CHECKING else dict):  # type: ignore[misc]
    """The tasks of an app by name."""

    def __missing__(self, name: str) -> NoReturn:
        raise NotRegistered(name)


class Proxy:
    """Stands for an object that is looked up at each use."""

    __slots__ = ("_get_current_object", "__weakref__")

    def __init__(self, find: Callable[[], Any]) -> None:
        object.__setattr__(self, "_get_current_object", find)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get_current_object(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._get_current_object(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._get_current_object(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get_current_object()(*args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self._get_current_object())

    def __eq__(self, other: Any) -> bool:
        if type(other) is Proxy:
            other = other._get_current_object()
        return self._get_current_object() == other

    def __hash__(self) -> int:
        return hash(self._get_current_object())

    def __repr__(self) -> str:
        return repr(self._get_current_object())

    def __dir__(self) -> List[str]:
        return dir(self._get_current_object())

    def __reduce__(self) -> Any:
        return self._get_current_object().__reduce__()

    @property
    def __class__(self) -> Any:
        return type(self._get_current_object())

    @property
    def __doc__(self) -> Any:  # type: ignore[override]
        return self._get_current_object().__doc__


#: Every app that is alive, the one that is current, and what `shared_task` has made for all.
_apps: weakref.WeakSet[Any] = weakref.WeakSet()
_current: List[Any] = []
_shared: List[Callable[[Any], Any]] = []


def _find_current_app() -> TaskQ:
    if not _current:
        _current.append(TaskQ("default", set_as_current=False))
    return _current[-1]


def _find_current_task() -> Optional[Task]:
    return _thread.stack[-1][0] if _thread.stack else None


current_app: Any = Proxy(_find_current_app)
current_task: Any = Proxy(_find_current_task)


def app_or_default(app: Optional[TaskQ] = None) -> TaskQ:
    """Return `app`, or the current one."""
    return app if app is not None else current_app._get_current_object()


def _main_module() -> Optional[str]:
    """Return the name under which a worker imports the script that runs as `__main__`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name[:-9] if spec.name.endswith(".__main__") else spec.name
    path = getattr(sys.modules.get("__mp_main__"), "__file__", None) or getattr(
        main, "__file__", None
    )
    if path is None or not path.endswith(".py"):
        return None
    folder, name = os.path.split(os.path.abspath(path))
    name = name[:-3]
    while os.path.exists(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        name = f"{package}.{name}"
    return name


def gen_task_name(app: TaskQ, name: str, module: Optional[str]) -> str:
    """Return the automatic name of a function: 'proj.tasks.add'."""
    if module in (None, "__main__", "__mp_main__"):
        module = _main_module() or app.main or "__main__"
    return f"{module}.{name}"


def _home(frame: Any) -> str:
    """Return the directory that holds the script or top-level package whose code runs in `frame`."""
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


#: What `_prepare` makes of a call: the deliveries, the id, and what the signals want to see.
Prepared = collections.namedtuple("Prepared", "deliveries id message payload exchange routing_key")


class TaskQ:
    """An app: its settings, its tasks, and its way to the store. Celery's class, by this name too.

        app = TaskQ('proj', broker='sqlite:///proj.db', include=['proj.tasks'])

    Without a broker messages and results are in taskq.db beside the package or script that makes
    the app. `backend` may name another sqlite:// file, or disabled:// for no results; 'rpc://' and
    None keep them with the messages.
    """

    task_cls: Any = Task

    def __init__(
        self,
        main: Optional[str] = None,
        loader: Any = None,
        backend: Optional[str] = None,
        amqp: Any = None,
        events: Any = None,
        log: Any = None,
        control: Any = None,
        set_as_current: bool = True,
        tasks: Any = None,
        broker: Optional[str] = None,
        include: Optional[Sequence[str]] = None,
        changes: Optional[Dict[str, Any]] = None,
        config_source: Any = None,
        fixups: Any = None,
        task_cls: Any = None,
        autofinalize: bool = True,
        namespace: Optional[str] = None,
        strict_typing: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value in (("loader", loader), ("amqp", amqp), ("events", events), ("log", log),
                            ("control", control), ("fixups", fixups)):  # fmt: skip
            if value:
                raise ImproperlyConfigured(f"TaskQ({name}=...): taskq has no replaceable {name}")
        self.main = main
        self.strict_typing = strict_typing
        self.set_as_current = set_as_current
        self.autofinalize = autofinalize
        if task_cls is not None:
            self.task_cls = task_cls if not isinstance(task_cls, str) else _symbol(task_cls)
        self.home = _home(sys._getframe(1))
        self.finalized = False
        self._tasks = TaskRegistry()
        self._lock = threading.RLock()
        self._conf = Settings()
        self._loaded = config_source is None
        self._config_source, self._namespace = config_source, namespace
        self._discover: List[Callable[[], Iterable[str]]] = []
        self._router: Tuple[int, Any] = (-1, None)
        #: Counts registrations, so that a background worker's children are forked anew.
        self.generation = 0
        if isinstance(tasks, dict):
            self._tasks.update(tasks)
        given = {"broker_url": broker, "result_backend": backend, "include": include}
        self._conf.update({k: v for k, v in given.items() if v is not None})
        self._conf.update({**(changes or {}), **kwargs})
        _apps.add(self)
        if set_as_current:
            self.set_current()

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
                self._load_config()
        return self._conf

    @conf.setter
    def conf(self, value: Any) -> None:
        self._conf.load(value)

    def _load_config(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        source = self._config_source
        explicit = dict(self._conf.changed)
        try:
            if isinstance(source, str):
                import importlib

                source = _symbol(source) if ":" in source else importlib.import_module(source)
            self._conf.load(source, self._namespace)
        except BaseException:
            self._loaded = False
            raise
        self._conf.update(explicit)  # what the app was given stands above its configuration

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: Optional[str] = None
    ) -> None:
        """Take settings from an object, or the name of a module: `config_from_object('proj.conf')`.

        It is read when a setting is first needed, with `force` now. With a namespace only names
        that begin with it count. `silent` passes over a module that does not exist.
        """
        self._config_source, self._namespace, self._loaded = obj, namespace, False
        if force or silent:
            try:
                self.conf  # noqa: B018 - reading it loads the source
            except ImportError:
                if not silent:
                    raise
                self._loaded = True

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

    @property
    def store(self) -> Store:
        """Where the app's messages are."""
        url = self.conf.broker_url
        if not url:
            url = "sqlite:///" + os.path.join(self.home, "taskq.db")
        elif not isinstance(url, str):
            url = url[0] if url else None
        store = open_store(url, self.conf.broker_transport_options or {})
        if self.backend_is_broker:
            self._set_expiry(store)
        return store

    @property
    def backend_is_broker(self) -> bool:
        """Whether results are in the store of the messages, and settle with them."""
        url = self.conf.result_backend
        return not url or url.startswith("rpc") or url == self.conf.broker_url

    @property
    def backend(self) -> Store:
        """Where the app's results are."""
        if self.backend_is_broker:
            return self.store
        url = self.conf.result_backend
        if url.startswith("disabled"):
            return _DISABLED
        store = open_store(url, {})
        self._set_expiry(store)
        return store

    def _set_expiry(self, store: Store) -> None:
        store.result_expires = self.conf.seconds("result_expires")
        store.failure_expires = self.conf.seconds("result_failure_expires")

    @property
    def keeps_results(self) -> bool:
        """Whether there is a place for results at all."""
        return not str(self.conf.result_backend or "").startswith("disabled")

    @property
    def router(self) -> Router:
        """The routes and queues, derived anew when a setting has changed."""
        version, router = self._router
        if version != self.conf.version:
            router = Router(self)
            self._router = (self.conf.version, router)
        return router

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
            if not self.autofinalize:
                raise RuntimeError("Contract breach: app not finalized")
            self.finalize()
        return self._tasks

    def finalize(self, auto: bool = False) -> None:
        """Add shared tasks; happens by itself."""
        with self._lock:
            if not self.finalized:
                self.finalized = True
                for make in list(_shared):
                    make(self)

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a task of a function: `@app.task` or `@app.task(bind=True, max_retries=5)`.

        bind: the function's first argument is the task itself. name: instead of the automatic
        'module.function'. base: a subclass of Task. Other options become attributes of the task.
        """
        if len(args) == 1 and callable(args[0]) and not options:
            return self._task_from_fun(args[0])
        if args:
            raise TypeError(
                f"@app.task takes one function, and options by name: {_repr(args, 60)}"
                if not callable(args[0])
                else "@app.task() takes no arguments besides options by name"
            )
        if options.pop("lazy", None) or options.pop("shared", None):
            pass  # both are how taskq works anyway
        return functools.partial(self._task_from_fun, **options)

    def _task_from_fun(
        self,
        fun: Any,
        name: Optional[str] = None,
        base: Any = None,
        bind: bool = False,
        **options: Any,
    ) -> Any:
        if isinstance(fun, type) and issubclass(fun, Task):
            return self.register_task(fun())
        if not callable(fun):
            raise TypeError(f"@app.task needs a function: {_repr(fun, 60)}")
        base = base or self.task_cls
        _check_task_options(options, base)
        name = name or self.gen_task_name(fun.__name__, fun.__module__)
        attributes = {
            "_app": self,
            "name": name,
            "abstract": False,
            "run": fun if bind else staticmethod(fun),
            "__doc__": fun.__doc__,
            "__module__": fun.__module__,
            "__annotations__": getattr(fun, "__annotations__", {}),
            "__wrapped__": fun if not bind else functools.partial(fun, None),
            "__qualname__": getattr(fun, "__qualname__", fun.__name__),
            "__header__": staticmethod(_arguments_check(fun, bind)),
            **{key: value for key, value in options.items() if value is not None},
        }
        return self._register(type(fun.__name__, (base,), attributes)())

    def register_task(self, task: Any, **options: Any) -> Any:
        """Register an instance (or class) of a task class; return the instance."""
        if isinstance(task, type):
            task = task()
        cls = type(task)
        if not task.name:
            task.name = self.gen_task_name(cls.__name__, cls.__module__)
        _check_task_options(vars(cls), Task, known_only=True)
        if task.__header__ is None:
            task.__header__ = _arguments_check(task.run, False)
        task._app = self
        return self._register(task)

    def _register(self, task: Any) -> Any:
        with self._lock:
            self._tasks[task.name] = task
            self.generation += 1
        if task.autoretry_for:
            _add_autoretry(task)
        notes = self.conf.task_annotations if self._loaded and self._conf.task_annotations else {}
        for key in ("*", task.name):
            for attribute, value in (notes.get(key) or {}).items():
                if attribute == "rate_limit":
                    raise _unavailable("rate_limit")
                setattr(task, attribute, value)
        return task

    def gen_task_name(self, name: str, module: Optional[str]) -> str:
        """Return the automatic name of a function; may be overridden."""
        return gen_task_name(self, name, module)

    def autodiscover_tasks(
        self, packages: Any = None, related_name: str = "tasks", force: bool = False
    ) -> None:
        """Have a worker import the module `related_name` of each package that has one.

        packages: names, or a function that returns them; with `force` they are imported now.
        """

        def modules() -> Iterable[str]:
            from importlib.util import find_spec

            for package in (packages() if callable(packages) else packages) or ():
                name = f"{package}.{related_name}" if related_name else package
                if find_spec(package) is None:
                    raise ModuleNotFoundError(f"autodiscover_tasks: no package {package!r}")
                if find_spec(name) is not None:
                    yield name

        if force:
            import importlib

            for name in modules():
                importlib.import_module(name)
        else:
            self._discover.append(modules)

    def import_default_modules(self) -> None:
        """Import what `imports`, `include` and `autodiscover_tasks` name."""
        import importlib

        names: List[str] = []
        for setting in (self.conf.imports, self.conf.include):
            names.extend([setting] if isinstance(setting, str) else setting or ())
        for name in names:
            importlib.import_module(name)
        for modules in self._discover:
            for name in modules():
                importlib.import_module(name)
        self.finalize()

    # -- sending ---------------------------------------------------------------------------------

    def send_task(
        self,
        name: str,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> AsyncResult:
        """Send a task by name, whether or not it is registered here; options as `apply_async`'s."""
        if self.conf.task_always_eager:
            import warnings

            warnings.warn(
                AlwaysEagerIgnored("task_always_eager has no effect on send_task"), stacklevel=2
            )
        return self._send(name, args, kwargs, options, self._tasks.get(name))

    def _send(
        self, name: str, args: Any, kwargs: Any, options: Dict[str, Any], task: Any
    ) -> AsyncResult:
        prepared = self._prepare(name, args, kwargs, options, task)
        self._publish(prepared.deliveries, options.get("retry"), options.get("retry_policy"))
        if after_task_publish.receivers:
            after_task_publish.send(
                sender=name,
                body=prepared.payload,
                exchange=prepared.exchange,
                routing_key=prepared.routing_key,
                headers=prepared.message.headers,
            )
        result = AsyncResult(prepared.id, app=self, task_name=name)
        result.ignored = bool(prepared.message.headers["ignore_result"])
        if _thread.stack and options.get("add_to_parent", True):
            parent, request = _thread.stack[-1]
            if parent.trail:
                request.children.append(result)
        return result

    def _prepare(
        self, name: str, args: Any, kwargs: Any, options: Dict[str, Any], task: Any
    ) -> Prepared:
        """Make the message of a call; nothing is sent yet."""
        args, kwargs = args or (), kwargs or {}
        if not isinstance(args, (list, tuple)):
            raise TypeError(f"task args must be a list or tuple: {_repr(args, 60)}")
        if not isinstance(kwargs, collections.abc.Mapping):
            raise TypeError(f"task keyword arguments must be a mapping: {_repr(kwargs, 60)}")
        _check_call_options(options)
        if task is not None:
            options = task._call_defaults(options)
        router = self.router
        if router.routes:
            options = router.options(name, args, kwargs, options, task)
        queues, exchange, routing_key = router.resolve(options)
        get = options.get
        due, eta = _eta(get("eta"), get("countdown"))
        id = get("task_id") or uuid()
        parent = _thread.stack[-1][1] if _thread.stack else None
        priority = _priority(
            get("priority"), parent if self.conf.task_inherit_parent_priority else None
        )
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        headers = {
            "lang": "py",
            "task": name,
            "id": id,
            "shadow": get("shadow"),
            "eta": eta,
            "expires": _expires(get("expires")),
            "group": None,
            "group_index": None,
            "retries": get("retries") or 0,
            "timelimit": [get("time_limit"), get("soft_time_limit")],
            "root_id": get("root_id") or (parent and (parent.root_id or parent.id)) or id,
            "parent_id": get("parent_id") or (parent and parent.id),
            "argsrepr": get("argsrepr") or _repr(args),
            "kwargsrepr": get("kwargsrepr") or _repr(kwargs),
            "origin": get("origin") or _origin(),
            "ignore_result": bool(get("ignore_result")) or not self.keeps_results,
            "replaced_task_nesting": get("replaced_task_nesting") or 0,
            "stamped_headers": get("stamped_headers"),
            "stamps": get("stamps") or {},
            **(get("headers") or {}),
        }
        properties = {
            "correlation_id": id,
            "reply_to": get("reply_to") or "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": exchange, "routing_key": routing_key},
            "priority": priority,
            "delivery_tag": id,
        }
        payload = (args, kwargs, embed)
        if before_task_publish.receivers:
            before_task_publish.send(
                sender=name,
                body=payload,
                exchange=exchange,
                routing_key=routing_key,
                headers=headers,
                properties=properties,
                declare=[router.queue(queue) for queue in queues],
                retry_policy=get("retry_policy"),
            )
        serializer = get("serializer") or self.conf.task_serializer
        try:
            content_type, encoding, body = serialize(payload, serializer)
        except EncodeError as exc:
            raise EncodeError(_blame(name, args, kwargs, serializer, exc)) from exc
        message = Message(headers, properties, body, content_type, encoding)
        try:
            text = message.encode()
        except (TypeError, ValueError) as exc:
            raise EncodeError(f"{name}: a header cannot be serialized: {exc}") from exc
        deliveries = [Delivery(queue, priority, due, text) for queue in queues]
        return Prepared(deliveries, id, message, payload, exchange, routing_key)

    def _publish(self, deliveries: Any, retry: Optional[bool], policy: Any) -> None:
        """Publish, trying again as `task_publish_retry` and its policy say."""
        policy = {**self.conf.task_publish_retry_policy, **(policy or {})}
        retry = self.conf.task_publish_retry if retry is None else retry
        for attempt in itertools.count():
            try:
                return self.store.publish(deliveries)
            except OperationalError:
                limit = policy["max_retries"]
                if not retry or (limit is not None and attempt >= limit):
                    raise
                step = policy["interval_start"] + attempt * policy["interval_step"]
                time.sleep(min(step, policy["interval_max"]))

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

    def worker_main(self, argv: Optional[Sequence[str]] = None) -> int:
        """Run a worker with the arguments of the command `worker`; return its exit status."""
        argv = list(sys.argv if argv is None else argv)
        if "worker" not in argv:
            argv.insert(0, "worker") if argv and argv[0].startswith("-") else argv.insert(
                1, "worker"
            )
        return self.start(argv[argv.index("worker") :] if argv[0] != "worker" else argv)

    def start(self, argv: Optional[Sequence[str]] = None) -> int:
        """Run the command line with this app: `app.start()` at the end of proj/celery.py."""
        return main(list(sys.argv[1:] if argv is None else argv), app=self)

    def bugreport(self) -> str:
        """Return the versions and settings that a bug report should name."""
        return bugreport(self)

    def close(self) -> None:
        """Let go of the stores of this thread."""
        for store in {id(s): s for s in _stores.values()}.values():
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

    def make(fun: Any) -> Any:
        name = options.get("name")

        def add(app: TaskQ) -> Any:
            return app._task_from_fun(fun, **options)

        _shared.append(add)
        for app in list(_apps):
            if app.finalized:
                add(app)

        def find() -> Any:
            app = current_app._get_current_object()
            return app.tasks[name or app.gen_task_name(fun.__name__, fun.__module__)]

        return Proxy(find)

    if len(args) == 1 and callable(args[0]) and not options:
        return make(args[0])
    if args:
        raise TypeError("@shared_task takes options by name only")
    return make


_TASK_OPTIONS = frozenset(
    "name bind base max_retries default_retry_delay autoretry_for dont_autoretry_for retry_backoff "
    "retry_backoff_max retry_jitter retry_kwargs ignore_result store_errors_even_if_ignored "
    "track_started acks_late acks_on_failure_or_timeout acks_on_failure acks_on_timeout "
    "reject_on_worker_lost time_limit soft_time_limit serializer priority queue exchange "
    "routing_key expires throws typing trail send_events resultrepr_maxsize store_eager_result "
    "shadow_name abstract".split()
)
_LATER_TASK_OPTIONS = frozenset("rate_limit compression pydantic retry_on_worker_lost".split())


def _check_task_options(options: Iterable[str], base: Any, known_only: bool = False) -> None:
    for name in options:
        if name in _LATER_TASK_OPTIONS:
            raise _unavailable(f"the task option {name!r}")
        if known_only or name in _TASK_OPTIONS or hasattr(base, name):
            continue
        near = _nearest(name, _TASK_OPTIONS)
        if near:
            raise TypeError(f"unknown task option {name!r}: did you mean {near!r}?")


def _check_call_options(options: Dict[str, Any]) -> None:
    for name in options.keys() - _CALL_OPTIONS:
        value = options[name]
        if name in _LATER_OPTIONS and value:
            raise _unavailable(f"apply_async({name}=...)")
        if value is not None and name not in _HARMLESS_OPTIONS and name not in _LATER_OPTIONS:
            near = _nearest(name, _CALL_OPTIONS, 0.6)
            hint = f": did you mean {near!r}?" if near else ""
            raise TypeError(f"apply_async() has no option {name!r}{hint}")


#: Options of kombu's publish that change nothing here.
_HARMLESS_OPTIONS = frozenset(
    "producer publisher connection router route_name result_cls delivery_mode mandatory immediate "
    "declare task_type throw".split()
)


def _arguments_check(fun: Any, bound: bool) -> Any:
    """Return a function with the signature of `fun` that does nothing: a wrong call raises."""
    import inspect

    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):  # a builtin without one
        return lambda *args, **kwargs: None
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    names: Dict[str, Any] = {}
    parts, star = [], False
    for index, parameter in enumerate(parameters):
        text = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, star = "*" + text, True
        elif parameter.kind is parameter.VAR_KEYWORD:
            text = "**" + text
        elif parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        if parameter.default is not parameter.empty:
            text += "=None"
        parts.append(text)
        following = parameters[index + 1 : index + 2]
        if parameter.kind is parameter.POSITIONAL_ONLY and not (
            following and following[0].kind is parameter.POSITIONAL_ONLY
        ):
            parts.append("/")
    name = fun.__name__ if getattr(fun, "__name__", "").isidentifier() else "run"
    exec(
        f"def {name}({', '.join(parts)}): pass", names
    )  # a real call beats Signature.bind 20 times
    return names[name]


def _add_autoretry(task: Any) -> None:
    """Wrap `run` so that the exceptions of `autoretry_for` retry the task."""
    run = task.run

    @functools.wraps(run)
    def run_or_retry(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (Ignore, Retry, Reject):
            raise
        except task.dont_autoretry_for:
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
            raise task.retry(exc=exc, **options) from exc

    task.run = run_or_retry


def get_exponential_backoff_interval(
    factor: int, retries: int, maximum: float, full_jitter: bool = False
) -> float:
    """Return the seconds until a retry: factor × 2^retries, at most `maximum`, or random up to it."""
    countdown = min(maximum, factor * 2**retries)
    if full_jitter:
        import random

        countdown = random.randrange(int(countdown) + 1)
    return max(0, countdown)


def _eta(eta: Any, countdown: Any) -> Tuple[Optional[float], Optional[str]]:
    """Return (due in seconds since the epoch, ISO text) of an eta or countdown, or Nones."""
    if countdown is not None and eta is None:
        _check_seconds("countdown", countdown)
        if not countdown:
            return None, None
        due = time.time() + countdown
        return due, datetime.fromtimestamp(due, timezone.utc).isoformat()
    if eta is None:
        return None, None
    if isinstance(eta, str):
        try:
            eta = _parse_time(eta)
        except ValueError:
            raise ValueError(f"eta={eta!r}: expected a datetime or ISO 8601 text") from None
    if not isinstance(eta, datetime):
        raise TypeError(f"eta={_repr(eta, 60)}: expected a datetime; for seconds use countdown=")
    eta = eta if eta.tzinfo else eta.replace(tzinfo=timezone.utc)
    return eta.timestamp(), eta.isoformat()


def _expires(expires: Any) -> Optional[str]:
    """Return seconds from now, a datetime or ISO text as ISO text in a time zone."""
    if expires is None or isinstance(expires, str):
        if expires:
            try:
                _parse_time(expires)
            except ValueError:
                raise ValueError(
                    f"expires={expires!r}: expected seconds, datetime or ISO text"
                ) from None
        return expires
    if isinstance(expires, timedelta):
        expires = expires.total_seconds()
    if isinstance(expires, datetime):
        return (expires if expires.tzinfo else expires.replace(tzinfo=timezone.utc)).isoformat()
    _check_seconds("expires", expires)
    return datetime.fromtimestamp(time.time() + expires, timezone.utc).isoformat()


def _check_seconds(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name}={_repr(value, 60)}: expected seconds")
    try:
        datetime.fromtimestamp(time.time() + value, timezone.utc)
    except (OverflowError, ValueError, OSError):
        raise ValueError(f"{name}={value!r} is out of range") from None


def _priority(priority: Any, parent: Any) -> int:
    if priority is None and parent is not None:
        priority = (parent.delivery_info or {}).get("priority")
    if priority is None:
        return 0
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
        raise ValueError(f"priority={_repr(priority, 60)}: expected 0 (highest) to 9")
    return priority


def _blame(name: str, args: Any, kwargs: Any, serializer: str, exc: EncodeError) -> str:
    """Return which argument cannot be serialized."""
    for place, value in [*enumerate(args), *kwargs.items()]:
        try:
            serialize(value, serializer)
        except EncodeError as own:
            what = f"argument {place + 1}" if isinstance(place, int) else f"argument {place!r}"
            return f"{name}: {what} cannot be serialized: {own}"
    return f"{name}: {exc}"


@functools.lru_cache(maxsize=None)
def _hostname() -> str:
    import socket

    return socket.gethostname()


_origins: Dict[int, str] = {}


def _origin() -> str:
    """Return this process's name as a producer: 'gen4711@host'."""
    pid = os.getpid()
    if pid not in _origins:
        _origins[pid] = f"gen{pid}@{_hostname()}"
    return _origins[pid]


def _meta(id: str, state: str, result: Any, request: Any, traceback: Any = None) -> Dict[str, Any]:
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
    if request is not None:
        if request.group:
            meta["group_id"] = request.group
        if request.parent_id:
            meta["parent_id"] = request.parent_id
    return meta


# ---------------------------------------------------------------------------------------------
# 10. Execution
# ---------------------------------------------------------------------------------------------


class ExceptionInfo:
    """An exception as handlers and signals get it: `str(einfo)` is the traceback."""

    internal = False

    def __init__(self, exc: BaseException) -> None:
        self.type = type(exc)
        self.exception = exc
        self.tb = exc.__traceback__
        self.exc_info = (self.type, exc, self.tb)
        self.traceback = _format_traceback(exc)

    def __str__(self) -> str:
        return self.traceback

    def __repr__(self) -> str:
        return f"<ExceptionInfo: {self.exception!r}>"


def _format_traceback(exc: BaseException) -> str:
    """Return a traceback as text, without the frames of this file that called the task."""
    import traceback

    tb = exc.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_globals is globals():
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(exc), exc, tb))


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
            _mark_started(task, request)
        try:
            if cls.before_start is not Task.before_start:
                task.before_start(id, args, kwargs)
            call = task.run if cls.__call__ is Task.__call__ else task
            value = call(*args, **kwargs)
            run = _succeeded(task, request, value, started)
        except Exception as exc:
            if propagate and not isinstance(exc, (Retry, Ignore, Reject)):
                raise
            state, value = _state_of(exc), exc
            run = _failed(task, request, exc, state, started)
        state = run.state
        if cls.after_return is not Task.after_return and state in READY_STATES:
            einfo = ExceptionInfo(value) if state != SUCCESS else None
            _guarded(task, request, "after_return", state, value, id, args, kwargs, einfo)
        return run
    finally:
        try:
            if task_postrun.receivers:
                task_postrun.send(
                    sender=task,
                    task_id=id,
                    task=task,
                    args=args,
                    kwargs=kwargs,
                    retval=value,
                    state=state,
                )
        finally:
            stack.pop()


def _state_of(exc: BaseException) -> str:
    for cls, state in ((Retry, RETRY), (Ignore, IGNORED), (Reject, REJECTED)):
        if isinstance(exc, cls):
            return state
    return FAILURE


def _ignores_result(task: Any, request: Context) -> bool:
    """Return whether this call keeps no result; what the call says stands above the task."""
    asked = request.__dict__.get("ignore_result")
    return task.ignore_result if asked is None else asked


def _mark_started(task: Any, request: Context) -> None:
    meta = _meta(
        request.id or "", STARTED, {"pid": os.getpid(), "hostname": request.hostname}, request
    )
    task.app.backend.put_results([(request.id, STARTED, _encode_meta(task.app, meta))])


def _succeeded(task: Any, request: Context, value: Any, started: float) -> Run:
    """Make the meta of a return value (EncodeError if it cannot be), then tell handlers and log."""
    text = None
    if not _ignores_result(task, request):
        text = _encode_result(task, request, SUCCESS, value)
    runtime = time.monotonic() - started
    if type(task).on_success is not Task.on_success:
        _guarded(task, request, "on_success", value, request.id, request.args, request.kwargs)
    if task_success.receivers:
        task_success.send(sender=task, result=value, runtime=runtime)
    if trace_logger.isEnabledFor(logging.INFO):
        trace_logger.info(
            "Task %(name)s[%(id)s] succeeded in %(runtime)ss: %(return_value)s",
            _log_data(
                task, request, runtime=runtime, return_value=_repr(value, task.resultrepr_maxsize)
            ),
        )
    return Run(SUCCESS, value, text, None, runtime)


def _failed(task: Any, request: Context, exc: Any, state: str, started: float) -> Run:
    """Make the meta of an error, then tell handlers, signals and log."""
    id, args, kwargs = request.id or "", request.args, request.kwargs
    einfo = ExceptionInfo(exc)
    text = None
    if state == RETRY:
        if not _ignores_result(task, request):
            reason = exc.exc if exc.exc is not None else exc
            text = _encode_result(task, request, RETRY, reason, einfo.traceback)
        _guarded(task, request, "on_retry", exc.exc, id, args, kwargs, einfo)
        if task_retry.receivers:
            task_retry.send(sender=task, request=request, reason=exc, einfo=einfo)
        level, message = logging.INFO, "Task %(name)s[%(id)s] retry: %(exc)s"
    elif state == FAILURE:
        if not _ignores_result(task, request) or task.store_errors_even_if_ignored:
            text = _encode_result(task, request, FAILURE, exc, einfo.traceback)
        announce_failure(task, request, exc, einfo)
        expected = bool(task.throws) and isinstance(exc, task.throws)
        level = logging.INFO if expected else logging.ERROR
        description = "raised expected" if expected else "raised unexpected"
        message = f"Task %(name)s[%(id)s] {description}: %(exc)s"
    else:
        if state == REJECTED and not exc.requeue and not _ignores_result(task, request):
            text = _encode_result(task, request, FAILURE, exc, einfo.traceback)
        level = logging.INFO if state == IGNORED else logging.WARNING
        message = "Task %(name)s[%(id)s] ignored" if state == IGNORED else (
            "Task %(name)s[%(id)s] %(exc)s"
        )  # fmt: skip
    if trace_logger.isEnabledFor(level):
        shown = str(exc) if state == RETRY else _repr(exc)
        exc_info = einfo.exc_info if level >= logging.WARNING else None
        trace_logger.log(level, message, _log_data(task, request, exc=shown), exc_info=exc_info)
    return Run(state, exc, text, einfo.traceback, time.monotonic() - started)


def announce_failure(task: Any, request: Context, exc: Any, einfo: Any) -> None:
    """Tell the task's handler and the receivers of `task_failure`."""
    id, args, kwargs = request.id or "", request.args, request.kwargs
    _guarded(task, request, "on_failure", exc, id, args, kwargs, einfo)
    if task_failure.receivers:
        task_failure.send(
            sender=task,
            task_id=id,
            exception=exc,
            args=args,
            kwargs=kwargs,
            traceback=exc.__traceback__,
            einfo=einfo,
        )


def _guarded(task: Any, request: Context, handler: str, *args: Any) -> None:
    """Call a task's handler; the outcome is decided, so its error is logged and changes nothing."""
    try:
        getattr(task, handler)(*args)
    except Exception as exc:
        if request.is_eager:
            raise
        trace_logger.exception(
            "Task %s[%s] %s handler raised: %r", task.name, request.id, handler, exc
        )


def _encode_result(
    task: Any, request: Context, state: str, value: Any, traceback: Optional[str] = None
) -> str:
    """Return the meta text of an end; EncodeError if a return value cannot be serialized."""
    app = task.app
    if isinstance(value, BaseException) and app.conf.result_serializer == "json":
        value = encode_exception(value)
    meta = _meta(request.id or "", state, value, request, traceback)
    if app.conf.result_extended:
        info = request.delivery_info or {}
        meta.update(
            name=task.name,
            args=request.args,
            kwargs=request.kwargs,
            worker=request.hostname,
            retries=request.retries,
            queue=info.get("routing_key"),
        )
    try:
        return _encode_meta(app, meta)
    except EncodeError as exc:
        if state != SUCCESS:
            meta["result"] = encode_exception(Exception(_repr(value)))
            return _encode_meta(app, meta)
        raise EncodeError(f"the result of {task.name} cannot be serialized: {exc}") from None


def _log_data(task: Any, request: Context, **more: Any) -> Dict[str, Any]:
    return {"id": request.id, "name": request.shadow or task.name, **more}


def execute(app: TaskQ, raw: bytes, hostname: str, begin: Callable[[Any, Context], Any]) -> Outcome:
    """Turn one message into its Outcome; `begin(task, request)` is called before the task runs."""
    began = time.monotonic()
    try:
        message = Message.decode(raw)
        args, kwargs, embed = message.payload(app.conf.accept_content)
    except MalformedMessage as exc:
        return rejected(raw, exc)
    request = request_of(message, args, kwargs, embed, hostname)
    name = message.headers["task"]
    task = app.tasks.get(name)
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


def rejected(raw: bytes, exc: MalformedMessage) -> Outcome:
    """Return the end of a message that no task can be made of: it is kept for inspection."""
    worker_logger.error(
        "Received and rejected a malformed message: %s\nThe message is kept with the rejected ones. "
        "It begins: %s", exc, _repr(raw, 200),
    )  # fmt: skip
    if task_rejected.receivers:
        task_rejected.send(sender=None, message=raw, exc=exc)
    return Outcome("reject", [], [], str(exc), 0.0)


def failure(
    app: TaskQ, request: Context, exc: BaseException, task: Any, verb: str = "ack"
) -> Outcome:
    """Return the end of a task that fails without having run to its end here."""
    results = []
    ignored = bool(request.ignore_result) if task is None else _ignores_result(task, request)
    if not ignored or (task is not None and task.store_errors_even_if_ignored):
        meta = _meta(request.id or "", FAILURE, encode_exception(exc), request)
        if app.conf.result_serializer != "json":
            meta["result"] = exc
        results.append((request.id, FAILURE, _encode_meta(app, meta)))
    if task is not None:
        announce_failure(task, request, exc, ExceptionInfo(exc))
    return Outcome(verb, results, [], _repr(exc, 200), 0.0)


def _unregistered(app: TaskQ, message: Message, request: Context) -> Outcome:
    name = message.headers["task"]
    worker_logger.error(
        "Received unregistered task of type %r.\nThe message has been ignored and discarded.\n"
        "Did you remember to import the module containing this task?\n"
        "This worker knows: %s", name, ", ".join(sorted(app.tasks)) or "no tasks",
    )  # fmt: skip
    exc = NotRegistered(name)
    if task_unknown.receivers:
        task_unknown.send(sender=None, message=message, exc=exc, name=name, id=message.id)
    return failure(app, request, exc, None)


def revoked(app: TaskQ, request: Context, reason: str) -> Outcome:
    """Return the end of a task that expired or was revoked before it began."""
    task = app.tasks.get(request.task)
    trace_logger.info("Discarding revoked task: %s[%s]", request.task, request.id)
    if task_revoked.receivers:
        task_revoked.send(
            sender=task, request=request, terminated=False, signum=None, expired=reason == "expired"
        )
    results = []
    if task is None or not _ignores_result(task, request):
        exc: Any = TaskRevokedError(reason)
        exc = encode_exception(exc) if app.conf.result_serializer == "json" else exc
        text = _encode_meta(app, _meta(request.id or "", REVOKED, exc, request))
        results.append((request.id, REVOKED, text))
    return Outcome("ack", results, [], reason, 0.0)


def lost(app: TaskQ, claim: Claim, exc: BaseException, again: bool) -> Outcome:
    """Return the end of a task whose process died: with `again` it is put back, else FAILURE."""
    try:
        if again:
            return Outcome("requeue", [], [], redelivered(claim.raw), 0.0)
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
_BATCH_MAX = 160
#: A child whose running task has not changed for so long does not keep others waiting.
_STUCK_SECONDS = 0.01
#: Bytes of a slot's ring of outcomes; a larger outcome than half of it goes to a file.
_RING_SIZE = 65536


class Pool:
    """Runs what the worker has claimed. `submit` takes claims, `collect` returns outcomes.

    worker: its app, hostname, journal, bell and options. A claim is held from `submit` until
    `collect` returns it; `settled` says that what was collected is safely in the store.
    """

    #: Whether `--time-limit` can be kept.
    kills = False

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker = worker
        self.size = size
        self.held: Dict[int, Claim] = {}
        self._read: List[Tuple[Slot, int]] = []
        self._task_time = 0.0  # moving average, in seconds; 0: none seen yet

    def start(self) -> None:
        """Start processes or threads."""

    def submit(self, claims: Sequence[Claim]) -> None:
        """Take claims to run."""
        raise NotImplementedError

    def collect(self) -> List[Tuple[Claim, Any]]:
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
                    self._took(outcome.runtime)
                    self._ended(slot, ticket)
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

    def _ended(self, slot: Slot, ticket: int) -> None:
        """Note that a child has finished a task."""

    def _took(self, seconds: float) -> None:
        self._task_time += (seconds - self._task_time) * (0.1 if self._task_time else 1.0)

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
        wanted = max(
            self.size * (conf.worker_prefetch_multiplier or 10), self.size * self.depth * 2
        )
        free = wanted - len(self.held)
        return free if free * 4 >= wanted or self.depth == 1 else 0  # no small claims under load

    def tick(self, now: float) -> float:
        """Do what time asks for; return the seconds until the next call is wanted."""
        return 1.0

    def nap(self) -> float:
        """Return the seconds for which outcomes may gather before the next batch; 0 if idle."""
        return 0.0

    def running(self) -> Dict[int, Slot]:
        """Return {ticket: slot} of what has begun."""
        return {slot.begun[0]: slot for slot in self.slots() if slot.begun[0]}

    def take_back(self) -> List[Claim]:
        """Return the claims that have not begun; they are held no more."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop processes or threads that have nothing to do any more."""

    def kill(self) -> None:
        """Stop them at once, whatever they do."""

    def _begin(self, slot: Slot, ticket: int) -> Callable[[Any, Context], None]:
        """Return what `execute` calls when a task begins: notes it in the slot."""

        def begin(task: Any, request: Context) -> None:
            flags = ACKS_LATE * bool(task.acks_late)
            flags |= REJECT_ON_LOST * bool(task.reject_on_worker_lost)
            hard, soft = request.timelimit or (None, None)
            hard, soft = hard or task.time_limit, soft or task.soft_time_limit
            now = time.time() if hard or soft else 0.0
            slot.begin(ticket, flags, soft and now + soft or 0.0, hard and now + hard or 0.0)
            if hard or soft:
                self._limited(soft)

        return begin

    def _limited(self, soft: Optional[float]) -> None:
        """Arrange for the soft time limit of the task that begins in this thread."""


def _run_claim(pool: Pool, slot: Slot, ticket: int, raw: bytes) -> None:
    """Execute a message in this process and note its outcome; nothing a task does gets past."""
    app = pool.worker.app
    try:
        with denied_join_result():
            outcome = execute(app, raw, pool.worker.hostname, pool._begin(slot, ticket))
    except (SystemExit, KeyboardInterrupt) as exc:
        if pool.kills:
            raise
        claim = Claim(None, ticket, "", 0, raw)
        outcome = lost(app, claim, WorkerLostError(f"Task raised {exc!r}"), again=False)
    bell = pool.worker.bell
    slot.finish(ticket, _json_encode(outcome).encode(), bell.ring)
    if bell.asleep:
        bell.ring()


class _AsyncLimit:
    """Raises SoftTimeLimitExceeded in a thread that cannot have a signal of its own."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self.lock = threading.Lock()
        self.done = False
        self.seconds = seconds
        self.timer = threading.Timer(seconds, self.fire)
        self.timer.daemon = True
        self.timer.start()

    def fire(self) -> None:
        import ctypes

        with self.lock:
            if not self.done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread), ctypes.py_object(SoftTimeLimitExceeded)
                )

    def cancel(self) -> None:
        self.timer.cancel()
        with self.lock:
            self.done = True


class SoloPool(Pool):
    """Runs tasks one by one in the worker's own thread."""

    name = "solo"

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, 1)
        self._limit: Any = None
        self._waiting: collections.deque[Claim] = collections.deque()

    def submit(self, claims: Sequence[Claim]) -> None:
        """Queue claims; `collect` runs them."""
        self._waiting.extend(claims)
        self.held.update((claim.ticket, claim) for claim in claims)

    def collect(self) -> List[Tuple[Claim, Any]]:
        """Run tasks for some milliseconds, at least one."""
        slot = self.worker.journal.slots[0]
        until = time.monotonic() + _BATCH_SECONDS
        while self._waiting:
            claim = self._waiting.popleft()
            try:
                _run_claim(self, slot, claim.ticket, claim.raw)
            finally:
                self._unlimit()
            if time.monotonic() > until:
                break
        return super().collect()

    def nap(self) -> float:
        """Return the least there is while tasks wait."""
        return 1e-6 if self._waiting else 0.0

    def take_back(self) -> List[Claim]:
        """Return what waits."""
        back = list(self._waiting)
        self._waiting.clear()
        for claim in back:
            del self.held[claim.ticket]
        return back

    def _limited(self, soft: Optional[float]) -> None:
        if not soft:
            return
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, _raise_soft_limit)
            signal.setitimer(signal.ITIMER_REAL, soft)
            self._limit = "alarm"
        else:
            self._limit = _AsyncLimit(soft)

    def _unlimit(self) -> None:
        if self._limit == "alarm":
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif self._limit is not None:
            self._limit.cancel()
        self._limit = None


def _raise_soft_limit(signum: int, frame: Any) -> None:
    raise SoftTimeLimitExceeded()


class ThreadPool(Pool):
    """Runs tasks in threads; under gevent's or eventlet's patching, in greenlets."""

    name = "threads"

    def __init__(self, worker: Worker, size: int) -> None:
        import queue

        super().__init__(worker, size)
        patched = worker.pool_name != "threads"  # eventlet knows no SimpleQueue
        self._queue: Any = queue.Queue() if patched else queue.SimpleQueue()
        self._threads: List[threading.Thread] = []
        self._local = threading.local()

    def start(self) -> None:
        """Start the threads."""
        for slot in self.worker.journal.slots[: self.size]:
            thread = threading.Thread(
                target=self._work,
                args=(slot,),
                name=f"ThreadPoolExecutor-0_{slot.index}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()

    def _work(self, slot: Slot) -> None:
        while True:
            claim = self._queue.get()
            if claim is None:
                return
            self._local.limit = None
            try:
                _run_claim(self, slot, claim.ticket, claim.raw)
            except BaseException:
                worker_logger.exception("A thread of the pool failed")
            finally:
                if self._local.limit is not None:
                    self._local.limit.cancel()

    def _limited(self, soft: Optional[float]) -> None:
        if soft and self.worker.pool_name == "threads":
            self._local.limit = _AsyncLimit(soft)

    def submit(self, claims: Sequence[Claim]) -> None:
        """Queue claims for the first thread that is free."""
        self.held.update((claim.ticket, claim) for claim in claims)
        for claim in claims:
            self._queue.put(claim)

    def nap(self) -> float:
        """Return half of the time that what is held will take."""
        return min(0.005, len(self.held) * self._task_time / self.size / 2)

    def take_back(self) -> List[Claim]:
        """Return what no thread has taken."""
        back = []
        while not self._queue.empty():
            claim = self._queue.get()
            del self.held[claim.ticket]
            back.append(claim)
        return back

    def stop(self) -> None:
        """Let each thread end."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


_TOKEN = struct.Struct("<QQ")  # ticket (0: stop), offset of the payload in the spool
_LENGTH = struct.Struct("<I")


class Spool:
    """A file without a name that holds the payloads of tokens, written once, read by any child."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("taskq")
        else:
            import tempfile

            self.fd, path = tempfile.mkstemp(prefix="taskq")
            os.unlink(path)
        self._regions: List[List[int]] = []  # [start, end, payloads in use], in order of start
        self._of: Dict[int, Tuple[int, List[int]]] = {}  # ticket: (offset, region)

    def write(self, claims: Sequence[Claim]) -> None:
        """Write payloads with one system call, into the first gap that takes them."""
        parts = []
        offsets = []
        size = 0
        for claim in claims:
            parts += (_LENGTH.pack(len(claim.raw)), claim.raw)
            offsets.append(size)
            size += _LENGTH.size + len(claim.raw)
        start, index = 0, 0
        for index, region in enumerate([*self._regions, [1 << 62]]):
            if region[0] - start >= size:
                break
            start = region[1]
        region = [start, start + size, len(claims)]
        self._regions.insert(index, region)
        data = memoryview(b"".join(parts))
        at = start
        while data:
            written = os.pwrite(self.fd, data, at)
            data, at = data[written:], at + written
        for claim, offset in zip(claims, offsets):
            self._of[claim.ticket] = start + offset, region

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._of

    def token(self, ticket: int) -> bytes:
        """Return the token of a payload."""
        return _TOKEN.pack(ticket, self._of[ticket][0])

    def free(self, ticket: int) -> None:
        """Let a payload's place be used again."""
        entry = self._of.pop(ticket, None)
        if entry is not None:
            entry[1][2] -= 1
            if not entry[1][2]:
                self._regions.remove(entry[1])

    @staticmethod
    def read(fd: int, offset: int) -> bytes:
        """Return a payload, in a child."""
        data = os.pread(fd, 4096, offset)
        (length,) = _LENGTH.unpack_from(data)
        if length + _LENGTH.size > len(data):
            data = os.pread(fd, length + _LENGTH.size, offset)
        return data[_LENGTH.size : _LENGTH.size + length]


class Child:
    """One process of the prefork pool, seen from the worker's main process."""

    def __init__(self, slot: Slot, number: int) -> None:
        self.slot = slot
        self.number = number
        self.pid = 0
        self.given: Dict[int, Claim] = {}  # handed over and not finished
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.seen = (0, 0.0)  # what it was running, and since when
        self.stuck = False
        self.limit: Any = None  # the hard limit for which it was killed
        self.status = 0  # how it ended, where that is known already
        self.soft_sent = 0  # the ticket whose soft limit it was told of
        self.generation = 0
        self.retired = False

    def put(self, tokens: Sequence[bytes]) -> int:
        """Write tokens, as many as the pipe takes; return how many."""
        written = 0
        step = max(1, select.PIPE_BUF // _TOKEN.size)
        while written < len(tokens):
            some = tokens[written : written + step]
            try:
                os.write(self.writer, b"".join(some))
            except BlockingIOError:
                break
            written += len(some)
        return written

    def take_back(self) -> List[int]:
        """Read back the tokens that the child has not read; each reaches one reader only."""
        tickets = []
        while True:
            try:
                data = os.read(self.reader, _TOKEN.size * 256)
            except BlockingIOError:
                return tickets
            tickets += [ticket for ticket, _ in _TOKEN.iter_unpack(data) if ticket]

    def close(self) -> None:
        """Close the token pipe."""
        os.close(self.reader)
        os.close(self.writer)


class PreforkPool(Pool):
    """Runs tasks in child processes.

    A child begins a task by reading its token from a pipe that the main process can read too: what
    a busy child has not begun is taken back and given to another, and the kernel sees to it that a
    token reaches one of them.
    """

    name = "prefork"
    kills = True

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self.children: List[Child] = []
        self._waiting: collections.deque[Claim] = collections.deque()
        self._spool = Spool()
        self._free = list(worker.journal.slots)
        self._dying: List[Slot] = []  # of dead children, until their outcomes are settled
        self._numbers = itertools.count(1)
        self._child_of: Dict[int, Child] = {}  # by slot
        self._lost: List[Tuple[Claim, Any]] = []
        self._reaped = 0.0
        self.stopping = False

    # -- processes -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the children."""
        self._refill()

    def _refill(self) -> None:
        """Start children up to the pool's size, while there are slots: the outcomes of dead ones
        hold theirs until they are settled."""
        while not self.stopping and self._free:
            if sum(not child.retired for child in self.children) >= self.size:
                return
            self._add_child()

    def _add_child(self) -> None:
        slot = self._free.pop(0)
        slot.clear()
        child = Child(slot, next(self._numbers))
        child.generation = self.worker.app.generation
        for stream in (sys.stdout, sys.stderr):
            _guarded_flush(stream)
        if self.worker.start_method == "spawn":
            child.pid = _spawn_child(self, child)
        else:
            child.pid = os.fork()
            if not child.pid:
                _become_child(self, child)
        self.children.append(child)
        self._child_of[slot.index] = child

    def _reap(self, now: float) -> List[Tuple[Child, int]]:
        """Return the children that have died, with their wait status."""
        self._reaped = now
        dead = []
        for child in self.children:
            try:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:  # `kill_running`, or somebody else, has waited for it
                pid, status = child.pid, child.status
            if pid:
                dead.append((child, status))
        for child, _ in dead:
            self.children.remove(child)
        return dead

    def _bury(self, child: Child, status: int) -> None:
        """Give a dead child's tokens to others, and what it was running its end."""
        back = child.take_back()
        begun, flags = child.slot.begun
        for ticket in list(child.given):
            claim = child.given[ticket]
            if ticket != begun:
                back.append(ticket) if ticket not in back else None
                continue
            del self.held[ticket]
            self._spool.free(ticket)
            self._lost.append((claim, self._lost_outcome(child, claim, flags, status)))
        self._waiting.extendleft(child.given[ticket] for ticket in reversed(back))
        child.close()
        if status and child.limit is None and not self.stopping:
            worker_logger.error(
                "Process %r pid:%d exited with %r",
                _child_name(self, child.number), child.pid, _describe_exit(status),
            )  # fmt: skip
        self._refill()

    def _lost_outcome(self, child: Child, claim: Claim, flags: int, status: int) -> Outcome:
        app = self.worker.app
        if child.limit is not None:
            exc: Exception = TimeLimitExceeded(child.limit)
            task = app.tasks.get(claim.message.headers["task"])
            again = bool(flags & ACKS_LATE) and task is not None and not task.acks_on(timeout=True)
            return lost(app, claim, exc, again)
        exc = WorkerLostError(f"Worker exited prematurely: {_describe_exit(status)}.")
        return lost(app, claim, exc, flags == ACKS_LATE | REJECT_ON_LOST)

    def slots(self) -> Iterable[Slot]:
        """Return those of living children, and of dead ones that are not settled."""
        return [*self._dying, *(child.slot for child in self.children)]

    # -- claims ----------------------------------------------------------------------------------

    def submit(self, claims: Sequence[Claim]) -> None:
        """Take claims and hand them out."""
        self.held.update((claim.ticket, claim) for claim in claims)
        self._waiting.extend(claims)
        self._deal()

    def collect(self) -> List[Tuple[Claim, Any]]:
        """Return outcomes, also those of tasks whose process has died."""
        now = time.monotonic()
        dead = self._reap(now) if self.worker.child_died or now - self._reaped > 0.25 else []
        self.worker.child_died = False
        self._dying.extend(child.slot for child, _ in dead)
        finished = super().collect()
        for child, status in dead:
            self._bury(child, status)
        if self._lost:
            finished += self._lost
            self._lost = []
        if self._waiting:
            self._deal()
        return finished

    def _ended(self, slot: Slot, ticket: int) -> None:
        self._spool.free(ticket)
        self._child_of[slot.index].given.pop(ticket, None)

    def settled(self) -> None:
        """Forget outcomes; the slots of dead children are free again."""
        super().settled()
        if self._dying:
            self._free += self._dying
            self._dying = []
            self._refill()

    def _deal(self) -> None:
        """Hand waiting claims to children: first to idle ones, then evenly."""
        if self.worker.renews_children:
            self._retire_outdated()
        depth = self.depth
        while self._waiting:
            able = [c for c in self.children if not c.retired and len(c.given) < depth
                    and not (c.stuck and c.given)]  # fmt: skip
            if not able:
                return
            child = min(able, key=lambda c: len(c.given))
            share = -(-len(self._waiting) // len(able))
            count = max(1, min(share, depth - len(child.given)))
            claims = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
            fresh = [claim for claim in claims if claim.ticket not in self._spool]
            if fresh:
                self._spool.write(fresh)
            if not child.given:
                child.seen, child.stuck = (0, time.monotonic()), False
            written = child.put([self._spool.token(claim.ticket) for claim in claims])
            child.given.update((claim.ticket, claim) for claim in claims[:written])
            if written < len(claims):  # a full pipe
                self._waiting.extendleft(reversed(claims[written:]))
                return

    def _retire_outdated(self) -> None:
        """Replace children that were forked before the last task was defined."""
        generation = self.worker.app.generation
        for child in self.children:
            if child.generation != generation and not child.retired:
                child.retired = True
                self._take_back(child)
                child.put([_TOKEN.pack(0, 0)])
        self._refill()

    def take_back(self) -> List[Claim]:
        """Return what waits here and in the children's pipes."""
        for child in self.children:
            self._take_back(child)
        back = list(self._waiting)
        self._waiting.clear()
        for claim in back:
            del self.held[claim.ticket]
            self._spool.free(claim.ticket)
        return back

    def _take_back(self, child: Child) -> None:
        tickets = child.take_back()
        self._waiting.extendleft(child.given.pop(ticket) for ticket in reversed(tickets))

    # -- time ------------------------------------------------------------------------------------

    def _limited(self, soft: Optional[float]) -> None:
        self.worker.bell.ring()  # in the child: the main process must know of the deadline

    def nap(self) -> float:
        """Return half of the time for which the least busy child has work."""
        least = min((len(child.given) for child in self.children), default=0)
        return min(0.005, least * self._task_time / 2)

    def tick(self, now: float) -> float:
        """Find stuck children and passed time limits."""
        wanted = 1.0
        moved = False
        for child in self.children:
            begun, _ = child.slot.begun
            if begun != child.seen[0]:
                child.seen, child.stuck = (begun, now), False
            elif len(child.given) > 1 and now - child.seen[1] > _STUCK_SECONDS:
                child.stuck = moved = True
                self._take_back(child)
            if len(child.given) > 1:
                wanted = min(wanted, _STUCK_SECONDS)
            if begun:
                wanted = min(wanted, self._check_limits(child, begun))
        if moved:
            self._deal()
        return wanted

    def _check_limits(self, child: Child, begun: int) -> float:
        """Keep the time limits of what a child runs; return the seconds until the next is due."""
        began, soft, hard = child.slot.times
        now = time.time()
        if hard and now >= hard:
            if self.kill_running(child, begun):
                child.limit = round(hard - began, 3)
                child.limit = int(child.limit) if child.limit == int(child.limit) else child.limit
                self._log_limit("Hard", child.limit, child.given.get(begun))
            return 0.0
        if soft and now >= soft and child.soft_sent != begun:
            child.soft_sent = begun
            self._log_limit("Soft", round(soft - began, 3), child.given.get(begun))
            try:
                os.kill(child.pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass
        ahead = [limit - now for limit in (soft, hard) if limit > now]
        return min(ahead, default=1.0)

    @staticmethod
    def _log_limit(kind: str, seconds: float, claim: Optional[Claim]) -> None:
        if claim is not None:
            headers = claim.message.headers
            level = logging.ERROR if kind == "Hard" else logging.WARNING
            worker_logger.log(
                level, "%s time limit (%ss) exceeded for %s[%s]",
                kind, seconds, headers["task"], headers["id"],
            )  # fmt: skip

    def kill_running(self, child: Child, ticket: int) -> bool:
        """Kill a child if it still runs this task: it is stopped first, so it cannot go on to the
        next one meanwhile."""
        try:
            os.kill(child.pid, signal.SIGSTOP)
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):  # it died by itself
                child.status, self.worker.child_died = status, True
                return False
            still = child.slot.begun[0] == ticket
            os.kill(child.pid, signal.SIGKILL if still else signal.SIGCONT)
        except (ProcessLookupError, ChildProcessError):
            return False
        self.worker.child_died = still or self.worker.child_died
        return still

    def stop(self) -> None:
        """Let the children end, and wait for them."""
        self.stopping = True
        for child in self.children:
            child.put([_TOKEN.pack(0, 0)])
        until = time.monotonic() + 10
        while self.children:
            if time.monotonic() > until:
                return self.kill()
            for child, _ in self._reap(time.monotonic()):
                child.close()
            time.sleep(0.002)
        os.close(self._spool.fd)

    def kill(self) -> None:
        """Kill the children."""
        self.stopping = True
        for child in self.children:
            try:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass


def _guarded_flush(stream: Any) -> None:
    try:
        stream.flush()
    except Exception:  # closed, or None
        pass


def _describe_exit(status: int) -> str:
    """Return how a process ended: 'signal 9 (SIGKILL)' or 'exitcode 1'."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "?"
        return f"signal {number} ({name})"
    return f"exitcode {os.WEXITSTATUS(status)}"


def _child_name(pool: Any, number: int) -> str:
    method = "Spawn" if pool.worker.start_method == "spawn" else "Fork"
    return f"{method}PoolWorker-{number}"


def _become_child(pool: PreforkPool, child: Child) -> NoReturn:
    """Turn the process that was just forked into a child of the pool; never returns."""
    status = 1
    try:
        for other in pool.children:
            other.close()
        os.close(child.writer)
        _thread.stack.clear()
        pool.children, pool.held = [], {}
        status = _child_main(pool, child.slot, child.reader, pool._spool.fd, child.number)
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else bool(exc.code)
    except BaseException:
        worker_logger.exception("A child process failed")
    finally:
        for stream in (sys.stdout, sys.stderr):
            _guarded_flush(stream)
        os._exit(status & 0xFF)


def _child_main(pool: PreforkPool, slot: Slot, reader: int, spool: int, number: int) -> int:
    """Execute tasks until told to stop; returns the exit status."""
    global _process_name
    _process_name = _child_name(pool, number)
    worker = pool.worker
    _die_with_parent(worker)
    worker.journal.lock(slot.index)
    signal.set_wakeup_fd(-1)
    for name in ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGCHLD", "SIGALRM"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def soft_limit(signum: int, frame: Any) -> None:
        soft = slot.times[1]
        if slot.begun[0] and soft and time.time() >= soft:  # not for the task before this one
            raise SoftTimeLimitExceeded()

    signal.signal(signal.SIGUSR1, soft_limit)
    worker_process_init.send(sender=None)
    conf = worker.app.conf
    most, memory = conf.worker_max_tasks_per_child, conf.worker_max_memory_per_child
    status = 0
    try:
        while True:
            ticket, offset = _next_token(slot, reader, worker.bell)
            if not ticket:
                break
            _run_claim(pool, slot, ticket, Spool.read(spool, offset))
            if most and slot.executed >= most or memory and _peak_memory() > memory:
                break
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    if slot.fresh:
        worker.bell.ring()
    worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=status)
    return status


def _next_token(slot: Slot, reader: int, bell: Bell) -> Tuple[int, int]:
    """Wait for the next token, waking the main process if there is none but outcomes are."""
    while True:
        try:
            data = os.read(reader, _TOKEN.size)
            return _TOKEN.unpack(data) if data else (0, 0)
        except BlockingIOError:
            if slot.fresh:
                bell.ring()
            _readable(reader, 60.0)


def _peak_memory() -> float:
    """Return the most memory that this process has had, in KiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def _die_with_parent(worker: Any) -> None:
    """See to it that this process does not outlive the worker's main process, even in C code."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    else:

        def watch() -> None:
            while os.getppid() == worker.pid:
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
    if os.getppid() != worker.pid:  # it died before this was set up
        os._exit(1)


#: What the log calls this process.
_process_name = "MainProcess"


def _spawn_child(pool: PreforkPool, child: Child) -> int:
    """Start a child in a fresh interpreter; it finds the app by name. Returns its pid."""
    import subprocess

    worker = pool.worker
    journal, spool = worker.journal, pool._spool.fd
    assert journal.path is not None and worker.bell.path is not None
    order = {
        "path": sys.path,
        "main": _main_source(),
        "app": _app_address(worker.app),
        "overrides": worker.overrides,
        "journal": journal.path,
        "bell": worker.bell.path,
        "slot": child.slot.index,
        "number": child.number,
        "fds": [child.reader, spool],
        "pid": os.getpid(),
        "hostname": worker.hostname,
        "log": worker.log_options,
    }
    code = (
        f"import sys, json; order = json.loads(sys.argv[1]); sys.path[:] = order['path']; "
        f"from importlib import import_module; import_module({__name__!r})._spawned(order)"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
            "-c",
            code,
            json.dumps(order),
        ],
        pass_fds=[child.reader, spool],
        stdin=subprocess.DEVNULL,
    )
    process.returncode = 0  # the pool waits for it itself
    return process.pid


def _main_source() -> Dict[str, str]:
    """Return how a spawned child finds the script that runs as `__main__`, as multiprocessing has it."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return {"init_main_from_name": spec.name}
    return {"init_main_from_path": os.path.abspath(path)} if path else {}


def _app_address(app: TaskQ) -> Tuple[str, str]:
    """Return (module, attribute) where a spawned child finds the app."""
    for name, module in list(sys.modules.items()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is app and name not in (__name__, "__mp_main__"):
                return name, attribute
    raise ImproperlyConfigured(
        "the start method 'spawn' needs an app that is an attribute of a module; use fork or threads"
    )


def _spawned(order: Dict[str, Any]) -> NoReturn:
    """Be a child of the pool in a fresh interpreter."""
    import importlib
    import multiprocessing.spawn

    global _is_spawned
    _is_spawned = True
    multiprocessing.spawn.prepare(order["main"])  # type: ignore[arg-type]
    module, attribute = order["app"]
    if module == "__main__":
        module = "__mp_main__"
    found: Any = getattr(importlib.import_module(module), attribute)
    found.conf.update(order["overrides"])
    found.import_default_modules()
    found.set_current()
    journal = Journal.open(order["journal"])
    worker = types.SimpleNamespace(
        app=found,
        journal=journal,
        bell=_RemoteBell(order["bell"]),
        hostname=order["hostname"],
        pid=order["pid"],
        start_method="spawn",
    )
    if order["log"] is not None:
        configure_logging(found, **order["log"])
    pool: Any = PreforkPool.__new__(PreforkPool)
    pool.worker = worker
    status = _child_main(pool, journal.slots[order["slot"]], *order["fds"], order["number"])
    for stream in (sys.stdout, sys.stderr):
        _guarded_flush(stream)
    os._exit(status)


_is_spawned = False


# ---------------------------------------------------------------------------------------------
# 12. Worker
# ---------------------------------------------------------------------------------------------


class _ProcessName(logging.Filter):
    """Gives log records the pool's process names, and those of task loggers their task."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.processName = _process_name
        task, request = _thread.stack[-1] if _thread.stack else (None, None)
        record.__dict__.setdefault("task_name", task.name if task is not None else "???")
        record.__dict__.setdefault("task_id", request.id if request is not None else "???")
        return True


class _ColorFormatter(logging.Formatter):
    """Colours a line by its level."""

    COLORS = {"DEBUG": 34, "WARNING": 33, "ERROR": 31, "CRITICAL": 35}

    def __init__(self, fmt: str, color: bool) -> None:
        super().__init__(fmt)
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        code = self.COLORS.get(record.levelname) if self.color else None
        return f"\033[1;{code}m{text}\033[0m" if code else text


class _LogStream:
    """Stands for stdout or stderr in a worker: what a task prints becomes a log line."""

    encoding = "utf-8"
    closed = False
    name = None
    mode = "w"

    def __init__(self, level: int) -> None:
        self.level = level
        self.busy = threading.local()

    def write(self, text: Any) -> int:
        if getattr(self.busy, "now", False):  # the log itself prints
            return 0
        self.busy.now = True
        try:
            for line in str(text).rstrip().splitlines():
                if line.rstrip():
                    logging.getLogger("celery.redirected").log(self.level, line.rstrip())
        finally:
            self.busy.now = False
        return len(str(text))

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("a worker's log has no file descriptor")


def configure_logging(
    app: TaskQ,
    loglevel: Union[int, str] = "WARNING",
    logfile: Optional[str] = None,
    color: Optional[bool] = None,
    redirect: bool = True,
) -> None:
    """Set up a worker's log as Celery does; a receiver of `setup_logging` does it instead."""
    level = logging.getLevelName(loglevel) if isinstance(loglevel, str) else loglevel
    conf = app.conf
    named = {"loglevel": level, "logfile": logfile, "format": conf.worker_log_format}
    if setup_logging.send(sender=None, colorize=color, **named):
        return
    stream = sys.__stderr__
    if color is None:
        color = conf.worker_log_color
    if color is None:
        color = logfile is None and stream is not None and stream.isatty()
    root = logging.getLogger()
    if conf.worker_hijack_root_logger:
        root.handlers[:] = []
    if not root.handlers:
        root.addHandler(_handler(logfile, conf.worker_log_format, color))
        root.setLevel(level)
    for name in ("celery", "celery.task"):
        logging.getLogger(name).setLevel(level)
    task_logger.handlers[:] = [_handler(logfile, conf.worker_task_log_format, color)]
    task_logger.propagate = False
    after_setup_logger.send(sender=None, logger=root, colorize=color, **named)
    named["format"] = conf.worker_task_log_format
    after_setup_task_logger.send(sender=None, logger=task_logger, colorize=color, **named)
    if redirect and conf.worker_redirect_stdouts:
        out = logging.getLevelName(conf.worker_redirect_stdouts_level)
        sys.stdout = sys.stderr = _LogStream(out)  # type: ignore[assignment]


def _handler(logfile: Optional[str], fmt: str, color: bool) -> logging.Handler:
    handler: logging.Handler
    if logfile:
        from logging.handlers import WatchedFileHandler

        handler = WatchedFileHandler(logfile, encoding="utf-8")
    else:
        handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(_ColorFormatter(fmt, color))
    handler.addFilter(_ProcessName())
    return handler


def get_task_logger(name: str) -> logging.Logger:
    """Return a logger whose lines name the task that logs: `log = get_task_logger(__name__)`."""
    log = logging.getLogger(name)
    if log is not task_logger and log.parent is not task_logger and name != "celery.task":
        log.parent = task_logger
    return log


def cpu_count() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def node_name(name: Optional[str]) -> str:
    """Return a worker's full name: 'celery@host' for None; expands %h, %n and %d."""
    host = _hostname()
    name = (name or "celery@%h").replace("%n", "celery").replace("%h", host)
    name = name.replace("%d", host.partition(".")[2])
    return name if "@" in name else f"{name}@{host}"


POOLS: Dict[str, Any] = {
    "prefork": PreforkPool,
    "processes": PreforkPool,
    "threads": ThreadPool,
    "solo": SoloPool,
    "gevent": ThreadPool,
    "eventlet": ThreadPool,
}


class Worker:
    """Claims messages, has a pool run them, and settles what comes of them.

    hostname: the node's name. concurrency: processes or threads. pool: 'prefork', 'threads', 'solo',
    'gevent' or 'eventlet'. queues, exclude_queues: names, or text with commas. Other options set the
    setting of their name (`time_limit`, `max_tasks_per_child`, `prefetch_multiplier`, …).
    """

    _SETTINGS = {
        "time_limit": "task_time_limit",
        "soft_time_limit": "task_soft_time_limit",
        "max_tasks_per_child": "worker_max_tasks_per_child",
        "max_memory_per_child": "worker_max_memory_per_child",
        "prefetch_multiplier": "worker_prefetch_multiplier",
        "disable_prefetch": "worker_disable_prefetch",
        "pool_start_method": "worker_pool_start_method",
    }

    def __init__(
        self,
        app: TaskQ,
        hostname: Optional[str] = None,
        concurrency: Any = None,
        pool: Optional[str] = None,
        queues: Any = None,
        exclude_queues: Any = None,
        loglevel: Any = "WARNING",
        logfile: Optional[str] = None,
        quiet: bool = False,
        no_color: Optional[bool] = None,
        purge: bool = False,
        overrides: Optional[Dict[str, Any]] = None,
        **options: Any,
    ) -> None:
        self.app = app
        self.overrides = dict(overrides or {})
        for name, value in options.items():
            if name not in self._SETTINGS:
                near = _nearest(name, self._SETTINGS, 0.6)
                raise TypeError(
                    f"a worker has no option {name!r}"
                    + (f": did you mean {near!r}?" if near else "")
                )
            if value is not None:
                self.overrides[self._SETTINGS[name]] = value
        app.conf.update(self.overrides)
        self.hostname = node_name(hostname)
        self.pool_name = pool or app.conf.worker_pool
        if self.pool_name not in POOLS:
            raise ImproperlyConfigured(f"unknown pool {self.pool_name!r}: expected {_names(POOLS)}")
        self.concurrency = self._count(concurrency)
        self.start_method = app.conf.worker_pool_start_method
        if self.start_method not in ("fork", "spawn"):
            raise ImproperlyConfigured(
                f"unknown start method {self.start_method!r}: expected 'fork' or 'spawn'"
            )
        self.wanted, self.unwanted = _name_list(queues), _name_list(exclude_queues)
        self.loglevel, self.logfile = loglevel, logfile
        self.quiet, self.no_color, self.purge = quiet, no_color, purge
        self.log_options: Optional[Dict[str, Any]] = None
        #: Whether children are forked anew when a task is defined (in the background of a script).
        self.renews_children = False
        self.child_died = False
        self.stopping: Optional[str] = None  # 'warm' or 'cold'
        self.exitcode = 0
        self.pid = os.getpid()
        self.ready = threading.Event()
        self._unsettled: List[Tuple[Claim, Any]] = []

    def _count(self, concurrency: Any) -> int:
        value = concurrency or self.app.conf.worker_concurrency or cpu_count()
        if value == "auto":
            return cpu_count()
        try:
            count = int(value)
            if count > 0:
                return count
        except (TypeError, ValueError):
            pass
        raise ImproperlyConfigured(f"concurrency {value!r}: expected a number above 0, or 'auto'")

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> int:
        """Run until told to stop; return the exit status."""
        celeryd_init.send(sender=self.hostname, instance=self, conf=self.app.conf, options={})
        self.app.import_default_modules()
        self.log_options = {
            "loglevel": self.loglevel,
            "logfile": self.logfile,
            "color": False if self.no_color else None,
        }
        configure_logging(self.app, **self.log_options)
        self.setup()
        celeryd_after_setup.send(sender=self.hostname, instance=self, conf=self.app.conf)
        if self.purge:
            count = sum(self.store.purge(queue.name) for queue in self.queues)
            if count and sys.__stdout__:
                print(f"purge: Erased {count} messages from the queue.\n", file=sys.__stdout__)
        if not self.quiet and sys.__stdout__:
            print(self.banner(), file=sys.__stdout__, flush=True)
        if threading.current_thread() is threading.main_thread():
            self._install_signals()
        self.begin()
        return self.run()

    def setup(self) -> None:
        """Open what the worker needs; raises where an address or option cannot be used."""
        app = self.app
        self._check_pool()
        self.store: Store = app.store
        router = app.router
        names = self.wanted or list(router.queues)
        self.queues = [router.queue(name) for name in names if name not in self.unwanted]
        if not self.queues:
            raise ImproperlyConfigured("no queues are left to serve: see -Q and -X")
        self.queue_names = [queue.name for queue in self.queues]
        router.bind(self.queues)
        slots = 2 * self.concurrency + 2 if self.pool_name in ("prefork", "processes") else (
            self.concurrency)  # fmt: skip
        self.owner = int.from_bytes(os.urandom(7), "big")
        self.bell = self.store.bells.open()
        self.bell.listen("q:" + name for name in self.queue_names)
        path = self.store.folder and os.path.join(self.store.folder, f"{self.owner:x}.journal")
        self._warn_of_namesakes()
        if path:
            os.makedirs(self.store.folder, 0o700, exist_ok=True)  # type: ignore[arg-type]
        self.journal = Journal.create(path, self.hostname, slots, _RING_SIZE)
        self.tickets = itertools.count(1)
        self.pool: Pool = POOLS[self.pool_name](self, self.concurrency)
        if self.concurrency and not self.pool.kills and app.conf.task_time_limit:
            worker_logger.warning("Hard time limits do not apply to the %s pool", self.pool_name)

    def _check_pool(self) -> None:
        if self.pool_name == "processes":
            self.pool_name = "prefork"
        if self.pool_name == "prefork" and not hasattr(os, "fork"):
            worker_logger.warning("There is no fork on this platform: using the threads pool")
            self.pool_name = "threads"
        if self.pool_name == "prefork" and self.app.store.folder is None:
            raise ImproperlyConfigured(
                "memory:// lives in one process: use --pool=threads or solo, or sqlite://"
            )
        if self.pool_name in ("gevent", "eventlet"):
            _patch_greenlets(self.pool_name)

    def _warn_of_namesakes(self) -> None:
        folder = self.store.folder
        if folder is None or not os.path.isdir(folder):
            return
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.endswith(".journal") and Journal.own.get(path) != os.getpid():
                try:
                    other = Journal.open(path)
                except (OSError, ValueError):
                    continue
                alive = not other.lock_whole()
                other.close()
                if alive and other.info.get("node") == self.hostname:
                    worker_logger.warning(
                        "DuplicateNodenameWarning: another worker (pid %s) is called %s too: "
                        "give each its own name with -n", other.info.get("pid"), self.hostname,
                    )  # fmt: skip

    def begin(self) -> None:
        """Recover what dead workers left, and start the pool."""
        worker_init.send(sender=self)
        self.store.recover(self.lost)
        self.pool.start()
        self._swept = time.monotonic()
        worker_logger.info("%s ready.", self.hostname)
        worker_ready.send(sender=self)
        self.ready.set()

    def lost(self, claim: Claim, flags: int) -> Outcome:
        """Return the end of a task that a dead worker had begun."""
        exc = WorkerLostError("Worker exited prematurely: its main process died.")
        return lost(self.app, claim, exc, again=bool(flags & ACKS_LATE))

    def run(self) -> int:
        """Work until told to stop."""
        try:
            while self.stopping is None:
                self._turn()
            if self.stopping == "warm":
                self._finish()
            if self.stopping == "cold":
                self._abandon()
        finally:
            worker_shutdown.send(sender=self)
            self.pool.stop() if self.stopping == "warm" else self.pool.kill()
            self.journal.close(remove=True)
            self.store.bells.close(self.bell)
            self.store.close()
        return self.exitcode

    # -- work ------------------------------------------------------------------------------------

    _hungry = True

    def _turn(self, claiming: bool = True) -> None:
        """Settle what has ended, claim what there is room for, hand it out; sleep if idle."""
        pool, bell = self.pool, self.bell
        try:
            finished = self._unsettled + pool.collect()
            room = pool.room() if claiming else 0
            claims: List[Claim] = []
            if finished or room > 0 and self._hungry:
                self._unsettled = finished
                claims = self._settle(finished, max(room, 0))
                self._unsettled = []
                if room > 0:
                    self._hungry = len(claims) >= room
            pool.settled()
            if claims:
                self._received(claims)
                pool.submit(claims)
            wanted = pool.tick(time.monotonic())
            if finished or claims:
                nap = pool.nap()
                if nap > 0.0003:
                    bell.wait(nap)
            elif not bell.asleep:
                bell.asleep = True
                ready, self._due = self.store.look(self.queue_names) if claiming else (False, None)
                self._hungry = self._hungry or ready
            else:
                if self._due is not None and claiming:
                    wanted = min(wanted, max(0.0, self._due - time.time()))
                if pool.nap() == 0.0:
                    bell.wait(wanted)
                self._housekeeping()
        except OperationalError as exc:
            worker_logger.error("The store cannot be used: %s. Trying again in 1 second.", exc)
            bell.wait(1.0)

    _due: Optional[float] = None

    def _settle(self, finished: Sequence[Tuple[Claim, Any]], room: int) -> List[Claim]:
        if not self.app.backend_is_broker:
            results = [result for _, outcome in finished for result in outcome.results]
            if results:
                self.app.backend.put_results(results)
            finished = [(claim, outcome._replace(results=[])) for claim, outcome in finished]
        try:
            return self.store.settle(self.owner, finished, self.queue_names, room, self.tickets)
        except StaleClaim:
            for pair in finished:
                try:
                    self.store.settle(self.owner, [pair])
                except StaleClaim as exc:
                    worker_logger.warning("An outcome was dropped: %s", exc)
            return []

    def _received(self, claims: Sequence[Claim]) -> None:
        """Log claims and tell the receivers of `task_received`."""
        strategy = logging.getLogger("celery.worker.strategy")
        if not (task_received.receivers or strategy.isEnabledFor(logging.INFO)):
            return
        for claim in claims:
            try:
                headers = claim.message.headers
            except MalformedMessage:  # whoever executes it rejects it
                continue
            strategy.info("Task %s[%s] received", headers["shadow"] or headers["task"]
                          if "shadow" in headers else headers["task"], headers["id"])  # fmt: skip
            if task_received.receivers:
                request = request_of(claim.message, None, None, {}, self.hostname)
                request.name = headers["task"]  # type: ignore[attr-defined]
                task_received.send(sender=self, request=request)

    def _housekeeping(self) -> None:
        """Look once a second for dead workers, and now and then for expired results."""
        now = time.monotonic()
        if now - self._recovered < 1.0:
            return
        self._recovered = now
        if fcntl is None and self.journal.path is not None:
            os.utime(self.journal.path)
        if self.store.recover(self.lost):
            self._hungry = True
        if now - self._swept > 30:
            self._swept = now
            self.store.sweep()

    _recovered = _swept = 0.0

    # -- the end ---------------------------------------------------------------------------------

    def stop(self, how: str = "warm", exitcode: int = 0) -> None:
        """Ask the worker to end: 'warm' lets running tasks finish, 'cold' ends them."""
        self.stopping = how
        self.exitcode = exitcode
        self.bell.ring()

    def _give_back(self, claims: Sequence[Claim]) -> None:
        if claims:
            self.store.settle(self.owner, [(claim, _GIVE_BACK) for claim in claims])

    def _finish(self) -> None:
        """Give back what has not begun, and wait for what has."""
        self._give_back(self.pool.take_back())
        while (self.pool.held or self._unsettled) and self.stopping == "warm":
            self._turn(claiming=False)
            self._give_back(self.pool.take_back())

    def _abandon(self) -> None:
        """Kill the pool; what runs ends as if the worker had been killed."""
        pool = self.pool
        back = pool.take_back()
        pool.kill()
        finished = self._unsettled + pool.collect()
        running = pool.running()
        for ticket, claim in pool.held.items():
            if ticket in running:
                finished.append((claim, self.lost(claim, running[ticket].begun[1])))
            else:
                back.append(claim)
        self._settle(finished, 0)
        self._give_back(back)

    def _install_signals(self) -> None:
        def say(text: str) -> None:
            if sys.__stderr__ is not None:
                os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())

        def stop(signum: int, frame: Any) -> None:
            if os.getpid() != self.pid:
                return
            name = signal.Signals(signum).name
            cold = signum == getattr(signal, "SIGQUIT", None) or (
                signum == signal.SIGINT and self.stopping == "warm"
            )
            how = "Cold" if cold else "Warm"
            if signum == signal.SIGINT and not cold:
                say("worker: Hitting Ctrl+C again will terminate all running tasks!")
            say(f"worker: {how} shutdown (MainProcess)")
            worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=int(cold))
            self.stop("cold" if cold else self.stopping or "warm", int(cold))
            if cold and self.pool_name == "solo":
                raise WorkerTerminate(1)

        def child(signum: int, frame: Any) -> None:
            self.child_died = True
            self.bell.ring()

        def dump(signum: int, frame: Any) -> None:
            if sys.__stderr__ is not None:
                say(_stacks())

        for name, handler in (
            ("SIGINT", stop),
            ("SIGTERM", stop),
            ("SIGQUIT", stop),
            ("SIGCHLD", child),
            ("SIGUSR1", dump),
        ):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), handler)

    # -- the banner ------------------------------------------------------------------------------

    def banner(self) -> str:
        """Return what a worker prints when it starts."""
        app = self.app
        results = "disabled://" if not app.keeps_results else app.backend.uri()
        lines = [
            "",
            f" -------------- {self.hostname} v{__version__} (taskq)",
            "",
            "[config]",
            f". app:         {app.main or '__main__'}:{id(app):#x}",
            f". broker:      {_mask_url(self.store.uri())}",
            f". results:     {_mask_url(results)}",
            f". concurrency: {self.concurrency} ({self.pool_name})",
            ". task events: OFF",
            "",
            "[queues]",
            *(queue.describe() for queue in self.queues),
            "",
        ]
        level = self.loglevel
        if (logging.getLevelName(level) if isinstance(level, str) else level) <= logging.INFO:
            lines += ["[tasks]", *(f"  . {name}" for name in sorted(app.tasks)), ""]
        return "\n".join(lines)


def _name_list(names: Any) -> List[str]:
    """Return names given as a list, or as text with commas."""
    if isinstance(names, str):
        names = names.split(",")
    return [name if isinstance(name, Queue) else name.strip() for name in names or () if name]


def _stacks() -> str:
    """Return what every thread of this process is doing."""
    import traceback

    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"{names.get(ident, ident)}\n{'=' * 49}\n{stack}")
    return "\n".join(parts)


def _patch_greenlets(name: str) -> None:
    """Patch the standard library for gevent or eventlet."""
    try:
        if name == "gevent":
            from gevent import monkey

            if not monkey.is_module_patched("threading"):
                monkey.patch_all()
        else:
            import eventlet

            if not eventlet.patcher.is_monkey_patched("thread"):
                eventlet.monkey_patch()
    except ImportError:
        raise ImproperlyConfigured(
            f"the {name} pool needs {name}, which is not installed: pip install {name}"
        ) from None


# ---------------------------------------------------------------------------------------------
# 13. Background worker
# ---------------------------------------------------------------------------------------------


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules or "get_ipython" in vars(
        sys.modules.get("builtins", object())
    )  # fmt: skip


class BackgroundWorker:
    """A worker in a thread of this process, for scripts, notebooks and tests.

        with app.worker(concurrency=2):
            print(add.delay(2, 2).get(timeout=10))

    Tasks run in their latest form, also those that are defined after it was started. The pool is
    threads in a notebook or REPL, and where there is no fork or no file; else prefork.
    """

    def __init__(self, app: TaskQ, options: Dict[str, Any]) -> None:
        self.app = app
        self.options = dict(options)
        self.worker: Optional[Worker] = None
        self._thread: Optional[threading.Thread] = None

    def start(self) -> BackgroundWorker:
        """Start the worker and return once it is ready."""
        if _is_spawned:
            raise RuntimeError(
                "a worker cannot be started while its children import this script: put the start "
                'under `if __name__ == "__main__":`'
            )
        if self._thread is not None:
            raise RuntimeError("this worker is running already")
        options = self.options
        if not options.get("pool"):
            here = _is_interactive() or self.app.store.folder is None
            options["pool"] = "threads" if here else "prefork"
        name = options.pop("hostname", None) or f"background{os.getpid()}-{os.urandom(2).hex()}"
        worker = Worker(self.app, hostname=name, **options)
        self.app.import_default_modules()
        if worker.pool_name == "prefork" and "IPython" in sys.modules:
            self._renew_per_cell()
        worker.renews_children = worker.pool_name == "prefork" and worker.start_method == "fork"
        worker.setup()
        run = worker.run
        if threading.current_thread() is threading.main_thread():
            worker.begin()  # children that are forked here inherit no lock that is held
        else:  # and here they would be killed when this thread ends

            def run() -> int:
                worker.begin()
                return worker.run()

        self.worker = worker
        self._thread = threading.Thread(target=run, name="taskq worker", daemon=True)
        self._thread.start()
        worker.ready.wait(60)
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
        if self._thread is None or self.worker is None:
            return
        import atexit

        atexit.unregister(self.stop)
        if self.worker.pid != os.getpid():  # a child of this process
            return
        self.worker.stop("warm")
        self._thread.join()
        self._thread = None

    def __enter__(self) -> BackgroundWorker:
        return self.start()

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()


# ---------------------------------------------------------------------------------------------
# 14. Command line
# ---------------------------------------------------------------------------------------------


class CommandError(Exception):
    """Something on the command line cannot be done; the text is all that the user sees."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class _OtherCopy(Exception):
    """The app belongs to another copy of this file in the process, whose `main` must run."""

    def __init__(self, module: Any) -> None:
        self.module = module


def _as_app(value: Any) -> Optional[TaskQ]:
    """Return `value` if it is an app; _OtherCopy if it is one of this very file's other import."""
    if isinstance(value, TaskQ):
        return value
    cls = type(value)
    if any(base.__name__ == "TaskQ" for base in cls.__mro__):
        for base in cls.__mro__:
            module = sys.modules.get(base.__module__)
            path = getattr(module, "__file__", None)
            if base.__name__ == "TaskQ" and path and os.path.samefile(path, __file__):
                raise _OtherCopy(module)
    return None


def _app_in(module: Any) -> Optional[TaskQ]:
    for name in ("app", "celery"):
        found = _as_app(getattr(module, name, None))
        if found is not None:
            return found
    for value in list(vars(module).values()):
        if isinstance(value, Proxy):
            continue
        found = _as_app(value)
        if found is not None:
            return found
    return None


def find_app(name: str) -> TaskQ:
    """Return the app that `--app` names: 'proj', 'proj.celery', 'proj.celery:app'.

    In a module it is `app`, else `celery`, else any app; in a package without one, the same in its
    submodule `celery`. Raises CommandError if there is none; an error in the module is its own.
    """
    import importlib

    module_name, _, attribute = name.partition(":")
    try:
        module = _import(module_name)
    except ModuleNotFoundError as exc:
        parent, _, last = module_name.rpartition(".")
        if not (exc.name and (module_name + ".").startswith(exc.name + ".")):
            raise  # what the module imports is missing, not the module
        if not parent or attribute:
            raise CommandError(
                f"Unable to load celery application.\nThe module {module_name} was not found."
            ) from None
        return find_app(f"{parent}:{last}")
    if attribute:
        try:
            value = functools.reduce(getattr, attribute.split("."), module)
        except AttributeError:
            raise CommandError(
                f"Unable to load celery application.\nModule {module_name!r} has no attribute "
                f"{attribute!r}"
            ) from None
        found = _app_in(value) if isinstance(value, types.ModuleType) else _as_app(value)
    else:
        found = _app_in(module)
        if found is None and hasattr(module, "__path__"):
            try:
                found = _app_in(importlib.import_module(module_name + ".celery"))
            except ModuleNotFoundError as exc:
                if exc.name != module_name + ".celery":
                    raise
    if found is None:
        raise CommandError(
            f"Unable to load celery application.\n{name!r} has no app: looked for its attributes "
            "'app' and 'celery', any TaskQ, and a submodule 'celery'"
        )
    return found


def _import(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _discover_app() -> TaskQ:
    """Return the one app in the current directory; CommandError if there is none, or several."""
    own = __name__.rpartition(".")[2]
    looked, found = [], {}
    names = [f"{name}.py" for name in ("tasks", "app", "main", "celeryapp")]
    for entry in sorted(os.listdir(".")):
        names += [os.path.join(entry, f"{name}.py") for name in ("celery", "tasks")]
    for path in names:
        if not os.path.isfile(path):
            continue
        looked.append(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            if not re.search(rf"\b{own}\b", file.read()):
                continue
        module = path[:-3].replace(os.sep, ".")
        app = _app_in(_import(module))
        if app is not None:
            found.setdefault(id(app), (module, app))
    if len(found) == 1:
        return next(iter(found.values()))[1]
    script = os.path.basename(__file__)
    if found:
        modules = [module for module, _ in found.values()]
        raise CommandError(
            f"there are {len(found)} apps here, in {_names(modules)}; say which:\n"
            f"    python {script} -A {modules[0]} worker"
        )
    places = ", ".join(looked) or "tasks.py, app.py, main.py, celeryapp.py, */celery.py, */tasks.py"
    raise CommandError(
        f"no app was found in {os.getcwd()} (looked at: {places}). Name the module that makes "
        f"it:\n    python {script} -A MODULE worker"
    )


#: Commands and options of Celery that this version does not have; they fail by name.
_LATER_COMMANDS = (
    "amqp beat control events graph inspect list logtool migrate multi shell status upgrade".split()
)
_LATER_OPTIONS_OF_WORKER = (
    ("-E", "--task-events", "--events"),
    ("-B", "--beat"),
    ("-S", "--statedb"),
    ("-s", "--schedule-filename", "--schedule"),
    ("--scheduler",),
    ("--autoscale",),
    ("--uid",),
    ("--gid",),
    ("--umask",),
    ("--executable",),
)


def _parser() -> Any:
    import argparse

    def common(default: Any) -> Any:
        options = argparse.ArgumentParser(add_help=False, argument_default=default)
        add = options.add_argument
        add("-A", "--app", metavar="APPLICATION", help="module or package of the app")
        add("-b", "--broker", metavar="URL", help="where messages are: sqlite:///file.db")
        add("--result-backend", metavar="URL", help="where results are")
        add("--workdir", metavar="PATH", help="change to this directory first")
        add("-C", "--no-color", action="store_true", help="no colour")
        add("-q", "--quiet", action="store_true", help="say less")
        return options

    parser = argparse.ArgumentParser(
        prog="taskq",
        description="taskq: Celery's programming model in one file.",
        parents=[common(None)],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"taskq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (function, summary, options) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[common(argparse.SUPPRESS)],
            allow_abbrev=False,
        )
        command.set_defaults(function=function)
        options(command)
    return parser


def _worker_options(parser: Any) -> None:
    add = parser.add_argument
    add("-n", "--hostname", help="node name; %%h is the host, %%n the name, %%d the domain")
    add("-D", "--detach", action="store_true", help="run in the background")
    levels = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "FATAL"]
    add("-l", "-L", "--loglevel", type=str.upper, choices=levels, default="WARNING")
    add("-O", "--optimization", choices=["default", "fair"], help="accepted: always fair")
    add("--prefetch-multiplier", type=int, help="messages to hold for each process")
    add(
        "--disable-prefetch",
        action="store_true",
        default=None,
        help="claim only for free processes",
    )
    add("-c", "--concurrency", help="processes, threads or greenlets; the CPUs by default")
    add("-P", "--pool", choices=sorted(POOLS), help="prefork by default")
    add("--time-limit", type=float, help="seconds until a task's process is killed")
    add("--soft-time-limit", type=float, help="seconds until SoftTimeLimitExceeded")
    add("--max-tasks-per-child", type=int, help="tasks after which a child is replaced")
    add("--max-memory-per-child", type=int, help="KiB after which a child is replaced")
    add("--pool-start-method", choices=["fork", "spawn"])
    add("--purge", "--discard", action="store_true", help="delete waiting messages first")
    add("-Q", "--queues", help="queues to serve, with commas")
    add("-X", "--exclude-queues", help="queues not to serve, with commas")
    add("-I", "--include", help="more modules to import, with commas")
    add("--without-gossip", action="store_true", help="accepted: there is no gossip")
    add("--without-mingle", action="store_true", help="accepted: there is no mingling")
    add("--without-heartbeat", action="store_true", help="accepted: there is no heartbeat")
    add("--heartbeat-interval", type=int, help="accepted: there is no heartbeat")
    add("-f", "--logfile", help="where the log goes; stderr by default")
    add("--pidfile", help="file for the process id")
    for names in _LATER_OPTIONS_OF_WORKER:
        add(*names, dest="later", action=_later_action(), nargs="*", help="not available yet")


def _later_action() -> Any:
    import argparse

    class Later(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            parser.error(f"{option} is not available in taskq {__version__}")

    return Later


def _worker_command(app: TaskQ, options: Any) -> int:
    import ctypes  # noqa: F401 - here once instead of in every child

    include = _name_list(options.include)
    if include:
        app.conf.include = [*(app.conf.include or ()), *include]
        options.overrides["include"] = app.conf.include
    pidfile = options.pidfile and os.path.abspath(options.pidfile)
    logfile = options.logfile and os.path.abspath(options.logfile)
    node = node_name(options.hostname)
    if logfile:
        logfile = logfile.replace("%n", node.partition("@")[0]).replace(
            "%h", node.partition("@")[2]
        )
    app.import_default_modules()
    worker = Worker(
        app,
        hostname=options.hostname,
        concurrency=options.concurrency,
        pool=options.pool,
        queues=options.queues,
        exclude_queues=options.exclude_queues,
        loglevel=options.loglevel,
        logfile=logfile,
        quiet=options.quiet,
        no_color=options.no_color,
        purge=options.purge,
        overrides=options.overrides,
        **{name: getattr(options, name) for name in Worker._SETTINGS},
    )
    worker.store = app.store  # what cannot be opened is said before going into the background
    worker.store.look(["celery"])
    worker._check_pool()
    if pidfile:
        _check_pidfile(pidfile)
    if options.detach:
        app.close()
        _detach()
        worker.pid = os.getpid()
    if pidfile:
        with open(pidfile, "w") as file:
            file.write(f"{os.getpid()}\n")
    try:
        return worker.start()
    finally:
        if pidfile:
            _unlink(pidfile)


def _check_pidfile(path: str) -> None:
    """Raise CommandError if a living process holds the pid file; a stale one is removed."""
    try:
        with open(path) as file:
            pid = int(file.read().strip())
        os.kill(pid, 0)
    except FileNotFoundError:
        return
    except (ValueError, ProcessLookupError):
        worker_logger.warning("Stale pidfile %s exists - Removing it.", path)
        _unlink(path)
        return
    except PermissionError:
        pass
    raise CommandError(
        f"Pidfile ({path}) already exists. Seems we're already running? (pid: {pid})", 73
    )


def _detach() -> None:
    """Go into the background: no terminal, no parent, standard streams to nowhere."""
    if not hasattr(os, "fork"):
        raise CommandError("--detach needs a platform with fork")
    for _ in range(2):
        if os.fork():
            os._exit(0)
        os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _call_options(parser: Any) -> None:
    add = parser.add_argument
    add("name", help="name of the task")
    add("-a", "--args", type=_json_of(list), default=[], help="positional arguments, a JSON array")
    add("-k", "--kwargs", type=_json_of(dict), default={}, help="keyword arguments, a JSON object")
    add("--eta", help="when to run it, ISO 8601")
    add("--countdown", type=float, help="seconds to wait")
    add("--expires", type=_seconds_or_time, help="seconds, or ISO 8601")
    add("--serializer", default="json")
    add("--queue", help="queue to send it to")
    add("--exchange")
    add("--routing-key")


def _json_of(kind: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        import argparse

        try:
            value = json.loads(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from None
        if not isinstance(value, kind):
            name = "array" if kind is list else "object"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON {name}")
        return value

    return parse


def _seconds_or_time(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return _parse_time(text)


def _call_command(app: TaskQ, options: Any) -> int:
    names = ("eta", "countdown", "expires", "serializer", "queue", "exchange", "routing_key")
    result = app.send_task(
        options.name,
        options.args,
        options.kwargs,
        **{name: getattr(options, name) for name in names if getattr(options, name) is not None},
    )
    print(result.id)
    return 0


def _result_options(parser: Any) -> None:
    parser.add_argument("task_id")
    parser.add_argument("-t", "--task", help="name of the task")
    parser.add_argument("--traceback", action="store_true", help="show the traceback instead")


def _result_command(app: TaskQ, options: Any) -> int:
    result = app.AsyncResult(options.task_id)
    print(result.traceback if options.traceback else result.get())
    return 0


def _purge_options(parser: Any) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="do not ask")
    parser.add_argument("-Q", "--queues", help="queues to purge, with commas")
    parser.add_argument("-X", "--exclude-queues", help="queues not to purge, with commas")


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
        try:
            answer = input("Are you sure you want to delete all tasks? [y/N]: ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("Aborted!", file=sys.stderr)
            return 1
    count = sum(app.store.purge(name) for name in names)
    messages = "message" if count == 1 else "messages"
    if count:
        print(f"Purged {count} {messages} from {len(names)} known task {queues}.")
    else:
        print(f"No messages purged from {len(names)} {queues}")
    return 0


def bugreport(app: Optional[TaskQ] = None) -> str:
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


def _no_options(parser: Any) -> None:
    pass


def _demo_command(_: Any, options: Any) -> int:
    """Count the lines and words of the standard library with a prefork worker, and check it."""
    import glob
    import shutil
    import sysconfig
    import tempfile

    library = sysconfig.get_paths()["stdlib"]
    paths = sorted(glob.glob(os.path.join(library, "**", "*.py"), recursive=True))
    paths = [path for path in paths if "site-packages" not in path][:3000]
    folder = tempfile.mkdtemp(prefix="taskq-demo-")
    app = TaskQ("demo", broker=f"sqlite:///{os.path.join(folder, 'demo.db')}", set_as_current=False)

    @app.task(name="demo.count")
    def count(path: str) -> List[int]:
        with open(path, "rb") as file:
            text = file.read()
        return [text.count(b"\n"), len(text.split())]

    try:
        began = time.monotonic()
        plain = [count.run(path) for path in paths]
        alone = time.monotonic() - began
        with app.worker(pool="prefork" if hasattr(os, "fork") else "threads") as background:
            worker = background.worker
            assert worker is not None
            print(
                f"A {worker.pool_name} worker with {worker.concurrency} processes on an SQLite file"
            )
            print(f"counts the lines and words of {len(paths)} files in {library}")
            began = time.monotonic()
            results = [count.delay(path) for path in paths]
            sent = time.monotonic()
            counted = []
            for result in results:
                counted.append(result.get(timeout=60))
                if len(counted) % 50 == 0 or len(counted) == len(paths):
                    _draw_progress(len(counted), len(paths))
            ended = time.monotonic()
    finally:
        app.close()
        _stores.clear()
        shutil.rmtree(folder, ignore_errors=True)
    wrong = sum(a != b for a, b in zip(plain, counted))
    lines, words = (sum(pair[i] for pair in counted) for i in (0, 1))
    total = ended - began
    print(f"\n{lines:,} lines, {words:,} words; a plain loop agrees on all but {wrong} files")
    print(f"tasks:      {len(paths)} in {total:.2f} s, {len(paths) / total:,.0f} a second")
    print(f"of that:    {sent - began:.2f} s until the last was sent, meanwhile the first ran")
    print(f"plain loop: {alone:.2f} s in one process, the counting itself")
    return 1 if wrong else 0


def _draw_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        bar = "#" * (40 * done // total)
        print(f"\r[{bar:<40}] {done}/{total}", end="", flush=True)
    elif done == total or done % 1000 == 0:
        print(f"{done}/{total}", flush=True)


_COMMANDS: Dict[str, Tuple[Any, str, Any]] = {
    "worker": (_worker_command, "Start a worker.", _worker_options),
    "call": (_call_command, "Call a task by name and print its id.", _call_options),
    "result": (_result_command, "Print the result of a task by its id.", _result_options),
    "purge": (_purge_command, "Delete waiting messages; there is no undo.", _purge_options),
    "report": (_report_command, "Print what a bug report should name.", _no_options),
    "demo": (_demo_command, "Run a worker on some real work, in a temporary file.", _no_options),
}


def main(argv: Optional[Sequence[str]] = None, app: Optional[TaskQ] = None) -> int:
    """Run the command line: `main(['-A', 'proj', 'worker'])`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _check_command(argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        if options.workdir:
            os.chdir(options.workdir)
        if getattr(options, "pool", None) in ("gevent", "eventlet"):
            _patch_greenlets(options.pool)  # before the app's modules are imported
        if options.command == "demo":
            return _demo_command(None, options)
        return options.function(_configured_app(options, app), options)
    except _OtherCopy as other:
        return other.module.main(argv)
    except CommandError as exc:
        print(f"Error: {exc}", file=sys.__stderr__)
        return exc.status
    except (ImproperlyConfigured, OperationalError, EncodeError, QueueNotFound) as exc:
        text = exc.args[0] if exc.args else exc
        print(f"Error: {text}", file=sys.__stderr__)
        return 1


def _configured_app(options: Any, app: Optional[TaskQ]) -> TaskQ:
    """Return the app that the command is for, with the settings that the command line gives."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name = options.app or os.environ.get("TASKQ_APP")
    if name:
        app = find_app(name)
    elif app is None:
        if options.command in ("call", "result", "purge", "report") and options.broker:
            app = TaskQ("default")
        else:
            app = _discover_app()
    app.set_current()
    options.overrides = {}
    if options.broker:
        options.overrides["broker_url"] = options.broker
    if options.result_backend:
        options.overrides["result_backend"] = options.result_backend
    app.conf.update(options.overrides)
    return app


def _check_command(argv: Sequence[str]) -> None:
    """Exit with one line for a command that is unknown, or that this version does not have."""
    takes_value = ("-A", "--app", "-b", "--broker", "--result-backend", "--workdir")
    words = iter(argv)
    for word in words:
        if word in takes_value:
            next(words, None)
        elif not word.startswith("-"):
            if word in _COMMANDS:
                return
            if word in _LATER_COMMANDS:
                text = f"the command {word!r} is not available in taskq {__version__}"
            else:
                near = _nearest(word, _COMMANDS, 0.5)
                text = f"no command {word!r}" + (f"; did you mean {near!r}?" if near else "")
                text += f". The commands are {_names(_COMMANDS)}."
            print(f"Error: {text}", file=sys.stderr)
            sys.exit(2)


# ---------------------------------------------------------------------------------------------
# 15. Public names
# ---------------------------------------------------------------------------------------------


def _publish_submodules() -> None:
    """Make `taskq.exceptions`, `taskq.utils.log` and their like importable, as Celery's are, so that
    changing between the two is a search and replace of the package's name."""
    names = globals()
    errors = {
        name: value
        for name, value in names.items()
        if isinstance(value, type) and issubclass(value, (Exception, SystemExit))
    }
    state_names = {name: value for name, value in names.items() if name.isupper() and (
        name == value or name.endswith("_STATES"))}  # fmt: skip
    results = "AsyncResult EagerResult GroupResult ResultSet result_from_tuple allow_join_result"
    parts = "Signature chain chord chunks group signature subtask maybe_signature xmap xstarmap"
    log = {"get_task_logger": get_task_logger, "get_logger": logging.getLogger}
    submodules: Dict[str, Dict[str, Any]] = {
        "exceptions": errors,
        "states": state_names,
        "signals": {**SIGNALS, "Signal": Signal},
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
