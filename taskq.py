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

    1. States and errors   5. Signals    9. Task and app   13. Background worker
    2. Serialization       6. Stores    10. Execution      14. Command line
    3. Settings            7. Results   11. Pools          15. Public names
    4. Messages            8. Canvas    12. Worker
"""

from __future__ import annotations

import importlib
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
        _name = os.path.relpath(os.path.splitext(_file)[0], _root).replace(os.sep, ".")
    if not all(part.isidentifier() for part in _name.split(".")):
        _root, _name = os.path.dirname(_file), _name.rpartition(".")[2]
    # In a new interpreter: this one keeps the 13 MB that it took to compile the file.
    _path = f"sys.path[:] = [{_root!r}] + [p for p in sys.path if p]"
    _code = f"import sys; {_path}; from {_name} import main; sys.exit(main())"
    _flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    _argv = [sys.executable, *_flags, "-c", _code, *sys.argv[1:]]
    if os.name == "nt":  # there exec returns to the shell at once
        sys.exit(subprocess.call(_argv))
    os.execv(sys.executable, _argv)

import atexit
import base64
import collections
import contextlib
import faulthandler
import functools
import io
import itertools
import json
import logging
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


# ---------------------------------------------------------------------------------------------
# 1. States and errors
# ---------------------------------------------------------------------------------------------

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

#: From the state that says most of a task to the one that says least; None stands for own states.
PRECEDENCE = [SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING]


def precedence(state: str | None) -> int:
    """Return a state's place in PRECEDENCE."""
    return PRECEDENCE.index(state if state in PRECEDENCE else None)


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
BackendError = _error("BackendError", "Celery's name.", Exception)

#: Names of Celery's that taskq itself does not raise: they are there to import and to catch.
for _base, _words in {
    TaskError: "IncompleteStream AlreadyRegistered",
    CeleryError: "SecurityError",
    Exception: "Terminated CeleryCommandException",
    BackendError: "BackendGetMetaError BackendStoreError",
    CeleryWarning: "NotConfigured SecurityWarning FixupWarning DuplicateNodenameWarning "
    "DuplicateTaskNameWarning",
    DeprecationWarning: "CDeprecationWarning",
    PendingDeprecationWarning: "CPendingDeprecationWarning",
    SystemExit: "WorkerShutdown",
}.items():
    for _name in _words.split():
        globals()[_name] = _error(_name, "Celery's name.", _base)


class Retry(TaskPredicate):
    """The task will run again, `when` is seconds or a datetime: raised by `Task.retry`, because of
    the error `exc`, with the signature `sig` sent."""

    def __init__(
        self,
        message: str | None = None,
        exc: Any = None,
        when: Any = None,
        is_eager: bool = False,
        sig: Any = None,
    ) -> None:
        self.message, self.when, self.is_eager, self.sig = message, when, is_eager, sig
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


# ---------------------------------------------------------------------------------------------
# 2. Serialization
# ---------------------------------------------------------------------------------------------

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


def _encode_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decode_base64(text: str) -> bytes:
    return base64.b64decode(text.encode(), validate=True)


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
    if hasattr(value, "__json__"):
        return value.__json__()
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


def _json_decode(text: str) -> Any:
    """Return what JSON text stands for; the hook, called for each object, only where it matters."""
    text = text.strip()
    is_rich = '"__type__"' in text or '"subtask_type"' in text
    value, end = (_read_rich if is_rich else _read_plain)(text)
    if end < len(text):
        raise ValueError(f"more than one JSON value: {_repr(text[end:], 60)}")
    return value


def serialize(value: Any, serializer: str = "json") -> tuple[str, str, str]:
    """Return (content type, content encoding, text): 'application/json', 'utf-8', '[1,2]'.

    Pickle comes as base64. Raises EncodeError for what cannot be written, or an unknown serializer.
    """
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
    """Return what `serialize` wrote; DecodeError if it cannot be read, and ContentDisallowed if
    `accept`, serializers or content types, does not list its type."""
    if content_type not in accept and _SERIALIZERS.get(content_type) not in accept:
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


#: The modules of Celery's errors that are not in celery.exceptions: theirs are the names on the
#: wire, so that a result tells neither which of the two ran the task nor where this file lies.
_WIRE_MODULES: dict[type, str] = {
    **dict.fromkeys((SoftTimeLimitExceeded, TimeLimitExceeded), "billiard.exceptions"),
    WorkerLostError: "billiard.exceptions",
    **dict.fromkeys((OperationalError, SerializationError, EncodeError), "kombu.exceptions"),
    **dict.fromkeys((DecodeError, ContentDisallowed), "kombu.exceptions"),
}


def encode_exception(exc: BaseException) -> dict[str, Any]:
    """Return an exception in Celery's form: exc_type, exc_module, and exc_message, its arguments,
    the repr of those that JSON cannot hold."""
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
_TASK_LOG_FORMAT = _LOG_FORMAT.replace("%(message)s", "%(task_name)s[%(task_id)s]: %(message)s")
_RETRY_POLICY = {"max_retries": 3, "interval_start": 0, "interval_max": 1, "interval_step": 0.2}

#: Every setting: Celery's name, its default, what it means.
SETTINGS: dict[str, tuple[Any, str]] = {
    "accept_content": (["json"], "serializers or content types that a worker accepts"),
    "broker_transport_options": ({}, "options of the store, as in the URL's query"),
    "broker_url": (None, "where messages are kept: sqlite://, memory:// or redis://"),
    "broker_use_ssl": (None, "options of TLS for rediss://, such as {'ssl_ca_certs': 'ca.pem'}"),
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
    "task_default_routing_key": (None, "routing key of the default queue; its name by default"),
    "task_eager_propagates": (False, "eager tasks raise their errors"),
    "task_ignore_result": (False, "keep no results"),
    "task_inherit_parent_priority": (False, "a task called by another has its priority"),
    "task_publish_retry": (True, "try again when the store cannot be written"),
    "task_publish_retry_policy": (_RETRY_POLICY, "how often and after how many seconds"),
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
    **dict.fromkeys(
        "task_compression result_compression task_default_rate_limit worker_state_db "
        "broker_read_url broker_write_url broker_failover_strategy security_key "
        "security_certificate security_cert_store".split()),
    **dict.fromkeys(
        "task_remote_tracebacks task_send_sent_event task_retry_on_worker_lost worker_direct "
        "worker_send_task_events worker_pool_restarts worker_deduplicate_successful_tasks "
        "beat_enable_remote_control".split(), False),
    "enable_utc": True, "worker_enable_remote_control": True, "worker_soft_shutdown_timeout": 0.0,
    "task_protocol": 2, "task_stamps": {}, "beat_schedule": {},
    "beat_scheduler": "celery.beat:PersistentScheduler",
}  # fmt: skip

#: Settings of Celery that tune what taskq does not have: leaving them out changes nothing.
_TUNING = (
    r"beat_(max_loop|schedule_filename|sync|cron)|control_|event_|security_(digest|key_password)|"
    r"broker_(channel|connection|heartbeat|login_method|native_delayed|pool_)|"
    r"redis_(max_connections|retry_on_timeout)|result_(backend_|cache_max|chord_|exchange|persistent)|"
    r"task_(create_missing_queue_|default_(delivery|queue_type)|queue_max_priority|repr_maxlevels)|"
    r"worker_(agent|autoscaler|cancel_long|consumer|detect_quorum|disable_rate|enable_soft|"
    r"enable_prefetch|eta_task|log_datefmt|lost_wait|pool_putlocks|proc_alive|task_log_datefmt|"
    r"timer)"
)

#: Settings of what taskq does not have, or takes from the URL, begin like this.
_FOREIGN = (
    r"(arangodb|azureblockblob|cache_backend|cassandra|cosmosdbsql|couchbase|database|"
    r"elasticsearch|gcs|mongodb|s3|redis_(host|port|db|username|password)|"
    r"broker_(host|port|user|password|vhost|transport))(_|$)(?!options)"
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _zone(value: Any) -> Any:
    """Return the tzinfo of a setting: a name, a tzinfo, or None for UTC."""
    if value in (None, "UTC", "utc"):
        return timezone.utc
    if not isinstance(value, str):
        return value
    import zoneinfo

    return zoneinfo.ZoneInfo(value)


_POOLS = ("prefork", "processes", "threads", "gevent", "eventlet", "solo")
_CONTENT = {*CONTENT_TYPES, *_SERIALIZERS}
_ARE_FLAGS = "|".join(name for name, (default, _) in SETTINGS.items() if isinstance(default, bool))

#: Patterns of settings' names, a test that returns False or fails for bad values, what it means.
_VALUES: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    (_ARE_FLAGS, lambda value: isinstance(value, int), "True or False"),
    ("timezone", _zone, "a name such as 'UTC' or 'Europe/Oslo'"),
    (".*_serializer", CONTENT_TYPES.__contains__, f"one of {_names(CONTENT_TYPES)}"),
    (".*accept.*", _CONTENT.issuperset, f"a list of {_names(CONTENT_TYPES)}"),
    (".*_type", ("direct", "topic", "fanout").__contains__, "'direct', 'topic' or 'fanout'"),
    ("worker_pool", _POOLS.__contains__, _names(_POOLS)),
    (".*_start_method", ("fork", "spawn").__contains__, "'fork' and 'spawn'"),
    ("task_queues", lambda value: not isinstance(value, str), "a list of names or Queue objects"),
    (".*_expires", lambda v: isinstance(v, timedelta) or _is_number(v), "seconds or a timedelta"),
    (".*_time_limit|redis_.*(timeout|interval)", _is_number, "seconds"),
    (".*_(use_ssl|options)", lambda v: not v or isinstance(v, dict), "a dict of options"),
    (".*(_per_child|_multiplier)", lambda v: _is_number(v) and v >= 0, "a number"),
)


def _is_setting(name: str) -> bool:
    """Return whether Celery has a setting of this name that an app may have too."""
    return name in SETTINGS or name in _ONLY or re.match(_TUNING, name) is not None


def _hint(name: str, known: Iterable[str], cutoff: float = 0.84) -> str:
    """Return ": did you mean 'x'?" where a known name is close to this one, else nothing."""
    import difflib  # it takes 2 ms

    near = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f": did you mean {near[0]!r}?" if near else ""


class Settings(dict):
    """An app's settings, by key or by attribute: `app.conf.timezone = 'UTC'`.

    All of SETTINGS are there with their defaults. Own names are kept; one that is close to a
    known name, and a setting of Celery that taskq cannot honour, is an ImproperlyConfigured.
    `changed` has those that were set; `version` counts changes, for what is derived from them.
    """

    def __init__(self) -> None:
        super().__init__({name: default for name, (default, _) in SETTINGS.items()})
        self.__dict__.update(changed={}, version=0)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if _is_setting(name):
            return _ONLY.get(name)
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
        self.__dict__["version"] += 1

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Set `name` unless the app has set it; return what it is now."""
        if name not in self.changed:
            self[name] = default
        return self[name]

    def _check(self, name: str, value: Any) -> None:
        """Raise ImproperlyConfigured for a setting that cannot be, or cannot have this value."""
        given = f"setting {name!r} = {_repr(value, 60)}"
        if name in SETTINGS:
            if value is None or value == SETTINGS[name][0]:
                return
            for names, test, expected in _VALUES:
                if re.fullmatch(names, name):
                    with contextlib.suppress(Exception):
                        if test(value) is not False:
                            continue
                    raise ImproperlyConfigured(f"{given}: expected {expected}")
        elif name in _ONLY:
            only = _ONLY[name]
            if (value or only) and (value != only or type(value) is not type(only)):
                raise ImproperlyConfigured(f"{given}: taskq has only {only!r}; leave it out")
        elif re.match(_FOREIGN, name):
            raise ImproperlyConfigured(f"setting {name!r}: leave it out, or put it into the URL")
        elif not re.match(_TUNING, name):
            old = re.sub("^celeryd?_", "", name.lower()) if name.isupper() else ""
            todays = (n for n in SETTINGS if old in (n, re.sub("^(task|worker|result)_", "", n)))
            hint = _hint(next(todays, name), SETTINGS)
            if hint:
                raise ImproperlyConfigured(f"unknown setting {name!r}{hint}")

    def load(self, source: Any, namespace: str | None = None) -> None:
        """Take settings from a mapping, module or object.

        With a namespace only names that begin with it count: 'CELERY' reads CELERY_TIMEZONE.
        Modules, classes and functions are passed over, but for functions that are settings.
        """
        if not isinstance(source, collections.abc.Mapping):
            source = {name: getattr(source, name) for name in dir(source) if name[:2] != "__"}
        prefix = namespace.rstrip("_") + "_" if namespace else ""
        no_value = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)
        found = {}
        for name, value in source.items():
            if name.startswith(prefix) and not name.startswith("_"):
                name = name[len(prefix) :].lower() if prefix else name
                if name in SETTINGS or not isinstance(value, no_value):
                    found[name] = value
        self.update(found)

    def humanize(self) -> str:
        """Return the settings that differ from their defaults, a line each, secrets masked."""
        secret = re.compile("pass|secret|token|(?<!routing_)key$", re.I)
        shown = {k: "*" * 8 if secret.search(k) else v for k, v in sorted(self.changed.items())}
        return "\n".join(f"{name}: {_mask_url(repr(value))}" for name, value in shown.items())

    def seconds(self, name: str) -> float | None:
        """Return a setting that is seconds, a timedelta or None, as seconds or None."""
        value = self[name]
        return value.total_seconds() if isinstance(value, timedelta) else value


def _mask_url(url: str) -> str:
    """Return a URL without its password."""
    return re.sub(r"(://[^/@:]*:)[^@\s]*(@)", r"\1**\2", url)


# ---------------------------------------------------------------------------------------------
# 4. Messages
# ---------------------------------------------------------------------------------------------


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
            envelope = _json_decode(text.decode() if isinstance(text, bytes) else text)
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

    @property
    def id(self) -> str:
        """The task's id."""
        return self.headers["id"]

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


def _is_limit(value: Any) -> bool:
    return value is None or _is_number(value) and 0 <= value < 1e9


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
    ("header 'retries'", 0, "retries", False, lambda v: type(v) is int and 0 <= v <= 2**31),
    ("header 'eta'", 0, "eta", False, _timestamp),
    ("header 'expires'", 0, "expires", False, _timestamp),
    ("property 'delivery_info'", 1, "delivery_info", False, lambda v: isinstance(v, dict)),
    ("property 'priority'", 1, "priority", False, lambda v: type(v) is int and 0 <= v <= 255),
)


#: What a producer hands to a store: `due` is seconds since the epoch, or None for now; `text` an
#: encoded Message.
Delivery = collections.namedtuple("Delivery", "queue priority due text")

#: What came of one message; all of it is settled in one transaction.
#: verb: 'ack', 'requeue' or 'reject' (kept for inspection). publish: deliveries that follow.
#: reason: why, of 'reject'; the new text, of 'requeue'. runtime: in seconds. results, chords,
#: parts: rows for `Store.put_results` and `publish`.
Outcome = collections.namedtuple(
    "Outcome", "verb results publish reason runtime chords parts", defaults=((), ())
)


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
        self.receivers: dict[tuple[Any, Any], Callable[[], Any]] = {}  # (key, sender): reference

    def connect(self, receiver: Any = None, sender: Any = None, **options: Any) -> Any:
        """Call `receiver(signal=, sender=, **named)` from now on, of one `sender` or of all.

        Also a decorator. Options: `weak`; `dispatch_uid`, of which there is one receiver.
        """
        if not callable(receiver):
            return functools.partial(self.connect, sender=sender or receiver, **options)
        reference: Any = lambda: receiver  # noqa: E731
        if options.get("weak", True):
            is_method = hasattr(receiver, "__func__")
            reference = (weakref.WeakMethod if is_method else weakref.ref)(receiver)
        alive = {key: ref for key, ref in self.receivers.items() if ref() is not None}
        alive.setdefault(self._key(receiver, sender, options), reference)
        self.receivers = alive  # a new one, for those who are sending just now
        return receiver

    def disconnect(self, receiver: Any = None, sender: Any = None, **options: Any) -> bool:
        """Stop calling a receiver; return whether it was connected."""
        gone = self._key(receiver, sender, options)
        was_there = gone in self.receivers
        self.receivers = {key: ref for key, ref in self.receivers.items() if key != gone}
        return was_there

    def _key(self, receiver: Any, sender: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        parts = getattr(receiver, "__self__", None), getattr(receiver, "__func__", receiver)
        return options.get("dispatch_uid") or tuple(map(id, parts)), sender

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
worker_process_init = Signal("worker_process_init")
worker_process_shutdown = Signal("worker_process_shutdown", "pid exitcode")
_LOGGING = "loglevel logfile format colorize"
setup_logging = Signal("setup_logging", _LOGGING)
after_setup_logger = Signal("after_setup_logger", "logger " + _LOGGING)
after_setup_task_logger = Signal("after_setup_task_logger", "logger " + _LOGGING)


# ---------------------------------------------------------------------------------------------
# 6. Stores
# ---------------------------------------------------------------------------------------------
#
# Beside an SQLite file DB lies the run directory DB-run, with what is too quick for a database and
# ends with its process: an ID.bell and ID.fifo of each sleeper, an OWNER.journal of each worker.


class Bell:
    """Wakes one sleeper: a worker without work, or a thread that waits for a result.

    Its owner says with `listen` what it wants to hear of, dozes, looks in the store a last time,
    and waits. Others see its state and topics in a small mapped file, at no cost while nobody
    sleeps, and wake it by a byte into a FIFO beside that. Without a path it works within the
    process; `mine` is False for another process's bell, seen from here.
    """

    #: The state's 8 bytes, then one for each hash of a topic: whether the owner listens.
    SIZE = 8 + 2**16
    #: States. Napping, it wants to be woken only by its own children, when they have no work;
    #: deaf, it hears of no topic: a worker that is full leaves calls to others.
    AWAKE, NAP, DEAF, HEARS = range(4)
    #: Whether the owner wants to be woken; a nap does not count.
    asleep = property(lambda bell: bell._flag[0] > bell.NAP)
    #: Whether the owner neither sleeps nor naps.
    awake = property(lambda bell: bell._flag[0] == bell.AWAKE)
    _places: Sequence[int] = ()
    _rung = False  # whether the last wait ended with a ring: then the next may soon come

    def __init__(self, path: str | None = None, mine: bool = True, polls: bool = False) -> None:
        self.path = path
        self.pid = os.getpid() if mine else 0
        self._fds: list[int] = []  # the first to read from, if it is ours; the last to write to
        #: Removes the files; happens by itself when nobody has the bell any more.
        self.close = weakref.finalize(self, _close_bell, path, self.pid, self._fds)
        if path is None:
            self._fds += () if polls else os.pipe()
        elif mine:
            os.mkfifo(path + ".fifo", 0o600)
            self._fds.append(os.open(path + ".fifo", os.O_RDWR | os.O_NONBLOCK))
        self._map = _mapped(path and path + ".bell", self.SIZE if mine else 0)
        self._flag = memoryview(self._map)[:8].cast("Q")

    def listen(self, topics: Iterable[str]) -> None:
        """Hear of these topics, and of no others."""
        for place in self._places:
            self._map[place] = 0
        self._places = [_topic_place(topic) for topic in topics]
        for place in self._places:
            self._map[place] = 1

    def hears(self, place: int) -> bool:
        """Return whether the owner sleeps, and listens at this place."""
        return self._flag[0] == self.HEARS and self._map[place]

    def ring(self) -> bool:
        """Wake the owner, also from a signal handler or a child of it; False if it is gone."""
        self._flag[0] = self.AWAKE
        try:
            if not self._fds and self.path is not None:
                self._fds.append(os.open(self.path + ".fifo", os.O_WRONLY | os.O_NONBLOCK))
            return not self._fds or bool(os.write(self._fds[-1], b"\0"))
        except OSError as exc:
            return isinstance(exc, BlockingIOError)  # full of rings; else nobody reads there

    def doze(self, hears: bool) -> None:
        """Sleep from now on; unless it `hears`, only the owner's own processes can wake it."""
        self._flag[0] = self.HEARS if hears else self.DEAF

    def nap(self, timeout: float) -> bool:
        """Sleep as `wait` does, while others think that the owner is busy."""
        self._flag[0] = self.NAP
        return self.wait(timeout)

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

    def __init__(self, folder: str | None, kind: Callable[..., Bell] = Bell) -> None:
        self.folder = folder
        self._kind = kind
        self._spare: list[Bell] = []
        self._known: list[Bell] = []  # those to ring
        self._seen = 0  # the directory's time when `_known` was read

    def open(self) -> Bell:
        """Return a bell of this process."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        for _ in range(3):  # others may remove an empty directory, or a FIFO that is not open yet
            with contextlib.suppress(OSError, AttributeError):  # or there may be no FIFOs
                if self.folder is not None:
                    os.makedirs(self.folder, 0o700, exist_ok=True)
                    return self._kind(os.path.join(self.folder, os.urandom(8).hex()))
        bell = self._kind(polls=self.folder is not None or not hasattr(os, "mkfifo"))
        self._known = [*self._known, bell]
        return bell

    def close(self, bell: Bell) -> None:
        """Take back a bell of this process, for its next sleeper."""
        if bell.pid == os.getpid():
            self._spare.append(bell)

    def clear(self) -> None:
        """Give up the bells that nobody uses, and their files."""
        spare, self._spare = self._spare, []
        self._known = [bell for bell in self._known if bell not in spare]
        for bell in spare:
            bell.close()

    def ring(self, queues: Iterable[str], ids: Iterable[str] = ()) -> None:
        """Wake for each queue the first sleeper who listens, and for each result all who do."""
        topics = [f"q:{queue}" for queue in set(queues)] + [f"r:{id}" for id in ids]
        bells = self._scan() if topics else ()
        for topic in topics if bells else ():
            place = _topic_place(topic)
            for bell in bells:
                if bell.hears(place) and bell.ring() and topic.startswith("q"):
                    break

    def _scan(self) -> list[Bell]:
        """Return the bells to ring; the run directory is read anew if it has changed."""
        with contextlib.suppress(OSError):  # nobody has ever slept
            changed = os.stat(self.folder).st_mtime_ns if self.folder else self._seen
            if changed != self._seen:
                known, found = {bell.path: bell for bell in self._known}, []
                for path in _paths(self.folder, ".bell"):
                    with contextlib.suppress(OSError):  # it has gone
                        found.append(known.get(path[:-5]) or Bell(path[:-5], mine=False))
                self._known = found
                # A change within one tick of the file system's clock would go unseen.
                self._seen = changed if time.time_ns() - changed > 50_000_000 else 0
        return self._known

    def sweep(self) -> None:
        """Remove the bells that nobody reads any more."""
        for path in _paths(self.folder, ".fifo", ".bell"):
            try:
                os.close(os.open(path[:-5] + ".fifo", os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                _unlink(path)


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
    """Open a file anew, for its owner alone, and make its directory if that is missing."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return open(path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600))


def _mapped(path: str | None, size: int = 0) -> Any:
    """Map a file, made anew if a size is given; or memory, without a path."""
    if path is None:
        return mmap.mmap(-1, size)
    if size:  # others shall not see it without its size
        with _create(path + ".new") as file:
            file.truncate(size)
        os.rename(path + ".new", path)
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _unlink(*paths: str) -> None:
    for path in paths:
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

_RECORD = struct.Struct("QQ")  # ticket, bytes of the outcome that follows; 0: it has its own file


class Slot:
    """The part of a Journal that one child process (or thread) writes: what it has begun, and a
    ring of the outcomes that the main process has not settled yet.

    Each step is made by one aligned 8-byte store, so whoever reads it after a crash sees the state
    before it or after it. An outcome that is too large has its own file, OWNER.journal.TICKET.
    """

    HEAD = 64
    SIZE = HEAD + 2**16
    TIMES = struct.Struct("3d")

    #: The ticket and flags of what runs; ticket 0 is nothing.
    begun = property(lambda slot: divmod(slot._words[0], 4))
    #: When it began, and its soft and hard deadline (0: none).
    times = property(lambda slot: slot.TIMES.unpack_from(slot._head, 8))
    #: How many tasks this process has finished.
    executed = property(lambda slot: slot._words[6])
    #: Whether there are outcomes that `read` would return.
    fresh = property(lambda slot: slot._words[4] != slot._words[5])
    #: Whether `finish` would not have to wait.
    has_room = property(lambda slot: slot._words[4] - slot._words[5] < len(slot._ring) // 2 - 16)

    def __init__(self, index: int, view: memoryview, path: str) -> None:
        self.index = index
        self._path = path
        self._head = view[: self.HEAD]
        self._words = self._head.cast("Q")  # 0 begun, 1-3 times, 4 written, 5 consumed, 6 executed
        self._ring = view[self.HEAD :]
        self._spilled: list[str] = []

    def clear(self) -> None:
        """Make the slot ready for a new process."""
        self._head[:] = bytes(self.HEAD)

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

    def read(self) -> tuple[list[tuple[int, Outcome]], int]:
        """Return the unsettled (ticket, outcome) pairs, and the position to `consume` then."""
        at, end = self._words[5], self._words[4]
        found = []
        while at < end:
            ticket, length = _RECORD.unpack(self._bytes(at, _RECORD.size))
            at += _RECORD.size + length
            text = self._bytes(at - length, length)
            if not length:  # it has its own file, unless somebody has deleted that
                self._spilled.append(f"{self._path}.{ticket}")
                with contextlib.suppress(FileNotFoundError), open(self._spilled[-1], "rb") as file:
                    text = file.read()
            found.append((ticket, Outcome(*json.loads(text)) if text else _GIVE_BACK))
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
        """Make and lock a journal for `info`, a dict of the worker's `node` and its number of
        `slots`; or open one, ValueError if it is none, or is only being made."""
        self.path = path
        #: The number under which the worker claims messages.
        self.owner = int(os.path.basename(path or "0").split(".")[0], 16)
        if info is not None and path is not None:
            self.own[path] = os.getpid()
        self.map = _mapped(path, self.HEAD + info["slots"] * Slot.SIZE if info else 0)
        self._file: Any = path and open(path, "r+b")
        if info is not None:
            self.lock(-1)
            head = json.dumps({**info, "pid": os.getpid()}).encode() + b"\n"
            self.map[: len(head)] = head
        self.info: dict[str, Any] = json.loads(self.map[: self.HEAD].partition(b"\n")[0])
        name = f"taskq-{os.urandom(8).hex()}"
        spill = path or os.path.join(importlib.import_module("tempfile").gettempdir(), name)
        starts, view = range(self.HEAD, len(self.map), Slot.SIZE), memoryview(self.map)
        self.slots = [Slot(i, view[at : at + Slot.SIZE], spill) for i, at in enumerate(starts)]

    @classmethod
    def others(cls, folder: str | None) -> Iterator[Journal]:
        """Open each journal of other processes in a run directory, and close it again."""
        for path in _paths(folder, ".journal"):
            if cls.own.get(path) != os.getpid():
                gone = contextlib.suppress(OSError, ValueError)
                with gone, contextlib.closing(cls(path)) as journal:
                    yield journal

    def lock(self, index: int) -> None:
        """Lock this process's byte: that of child `index`, or -1 for the main process."""
        if self.path is not None:
            self.own[self.path] = os.getpid()
            if fcntl:
                fcntl.lockf(self._file, fcntl.LOCK_EX, 1, index + 1)

    def lock_whole(self) -> bool:
        """Try to become the one who recovers a dead worker's claims."""
        if fcntl is None:  # no locks: see `touch`
            return time.time() - os.stat(self.path or "").st_mtime > 15
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def touch(self) -> None:
        """Show others that the worker lives; it calls this every second."""
        if self.path and not os.path.exists(self.path):  # somebody has deleted it
            copy = _mapped(self.path, len(self.map))
            self._file = open(self.path, "r+b")
            self.lock(-1)  # before others can read it
            copy[:] = self.map[:]
        if self.path and not fcntl:
            os.utime(self.path)

    def ends(self) -> dict[int, Any]:
        """Return {ticket: its Outcome, or the flags of a task that has begun}."""
        found: dict[int, Any] = dict(slot.begun for slot in self.slots)
        for slot in self.slots:
            found.update(slot.read()[0])
        return found

    def close(self, remove: bool = False) -> None:
        """Let go of the journal, and with `remove` delete its files."""
        if self.path is not None and not self._file.closed:
            if remove:
                files = _paths(os.path.dirname(self.path), "")
                _unlink(*(path for path in files if path.startswith(self.path)))
            self._file.close()
            self.own.pop(self.path, None)


class Claim(collections.namedtuple("Claim", "key ticket queue priority raw")):
    """A message that a worker holds: `key` is the store's, `ticket` the worker's number for it."""

    @functools.cached_property
    def message(self) -> Message:
        """The message, parsed when first asked for; MalformedMessage if it is none."""
        return Message.decode(self.raw)


#: What becomes of a claim that has not begun.
_GIVE_BACK = Outcome("requeue", [], [], None, 0.0)

if TYPE_CHECKING:
    Rows = Sequence[Sequence[Any]]
    Settled = Sequence[tuple[Claim, Outcome]]
    #: Makes the outcome of a task whose process died, from its claim and the flags of its slot.
    Lost = Callable[[Claim, int], Outcome]

StaleClaim = _error("StaleClaim", "A claim to settle is no longer its worker's.", Exception)


def _topic_matches(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """Return whether the words of a topic pattern (media, *, #) match those of a routing key."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return _topic_matches(pattern[1:], key) or bool(key) and _topic_matches(pattern, key[1:])
    return bool(key) and pattern[0] in ("*", key[0]) and _topic_matches(pattern[1:], key[1:])


# mypy: disable-error-code=empty-body
class Store:
    """What a broker that also keeps results must do. Nothing above knows SQL, nothing below tasks.

    A message is in a queue, or claimed by one owner (a worker's number), or gone. `settle` is
    atomic: results, follow-up messages and acknowledgements of a batch are all there afterwards, or
    none. Every method raises OperationalError where the store cannot be reached.

    A chord is a counter: a delivery that is published when a number of parts have ended. Its rows,
    in `chords`, are (chord, number, delivery) to make one; with None to let it wait for so many
    parts more, which is all that counts again when it is said again; with number 0 when it is over.
    Those in `parts` are (chord, index, task id, delivery): this part has ended.
    """

    #: Whether other programs publish here too; `parts` then bring deliveries, for their chords.
    foreign = False
    #: The run directory; None if the store lives in one process alone.
    folder: str | None = None
    bells: Bells
    #: Seconds after which a chord whose parts do not end is forgotten.
    chord_expires = 30 * 86400

    def uri(self) -> str:
        """Return the address as the banner prints it."""

    def publish(self, deliveries: Rows, chords: Rows = ()) -> None:
        """Put messages into their queues, and apply `chords`, all or none; wake workers."""

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Return whether there is something to claim, and when the next message with an ETA is due
        (seconds since the epoch, or None); cheap, and takes no lock."""

    def settle(self, owner: int, settled: Settled, queues: Any = (), limit: int = 0) -> list[Claim]:
        """Apply the outcomes of claims, then claim up to `limit` messages from `queues`.

        Each queue has its turn; within them the smallest priority number and the oldest come first.
        StaleClaim, and nothing is applied, if one of the claims is not this owner's any more.
        """

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

    def recover_owner(self, owner: int, ends: dict[int, Any], lost: Lost, settle: Any) -> int:
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
        for them; count `parts`.

        Returns the deliveries of those chords that are complete, to be published in the store of
        the messages; of a chord that is not yet over, again if this is called again.
        """

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
        words, found = routing_key.split("."), {}
        for kind, pattern, queue in self.bindings(exchange):
            is_topic = kind == "topic" and _topic_matches(pattern.split("."), words)
            if is_topic or kind == "fanout" or pattern == routing_key:
                found[queue] = True
        return list(found)

    def purge(self, queue: str) -> int:
        """Delete the messages that wait in a queue, due or not; return how many."""

    def sweep(self) -> None:
        """Remove expired results and dead processes' files; called now and then."""

    def close(self) -> None:
        """Let go of connections, and of files that are not in use; the store opens them again."""

    def wait(
        self, ids: Sequence[str], timeout: float | None, interval: float = 0.5, on_tick: Any = None
    ) -> Iterator[dict[str, tuple[str, str]]]:
        """Yield {id: (state, meta text)} of ids that have their end, as they come, until all have.

        Raises TimeoutError when `timeout` seconds have passed; calls `on_tick` every `interval`
        seconds. It looks for the first 200 that are missing: for all, n results take n² looks.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        missing = dict.fromkeys(ids)
        bell = None
        with contextlib.ExitStack() as stack:
            while missing:
                if bell is not None:
                    bell.doze(hears=True)
                window = self.get_results(list(itertools.islice(missing, 200)))
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
_SCHEMA_VERSION = 1
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
_COUNT = "UPDATE chords SET missing = missing + ? WHERE id = ? AND missing > 0"
_PART = "INSERT OR IGNORE INTO chord_parts SELECT id, ?, ? FROM chords WHERE id = ?"
_COMPLETE = "SELECT queue, priority, due, message FROM chords WHERE id = ? AND missing <= 0"


class SQLiteStore(Store):
    """A store in one SQLite file, in WAL mode; or in memory, without a path.

    Every write is one BEGIN IMMEDIATE transaction. A message with an ETA has a `due` time until it
    is due; what can be claimed is then a range of one partial index, however many rows there are.

    A process has one connection, opened when first needed, also after a fork. `with store as
    connection:` lends it to a thread, ends the transaction, and turns SQLite's errors into
    OperationalError (ValueError for too large a value). Never open the file by other means: closing
    any descriptor of it drops the locks that SQLite has for the whole process.
    """

    #: What the options of the address may be.
    OPTIONS = {"timeout": r"\d+(\.\d*)?", "synchronous": "off|normal|full|extra"}

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        scheme, _, place = url.partition("?")[0].partition("://")
        if scheme == "sqlite" and not place.startswith("/"):
            why = "write sqlite:///relative.db or sqlite:////absolute/path.db"
            raise ImproperlyConfigured(f"{url!r}: {why}")
        # The real path: two names of one file must not make two run directories.
        self.path = os.path.realpath(place[1:]) if scheme == "sqlite" and place[1:] else None
        self.folder = self.path and self.path + "-run"
        self.bells = Bells(self.folder)
        for name, value in options.items():
            if not re.fullmatch(self.OPTIONS.get(name, "(?!)"), str(value).lower()):
                why = "expected timeout=SECONDS, or synchronous=off, normal, full or extra"
                raise ImproperlyConfigured(f"option {name}={value!r} of sqlite://: {why}")
        self._timeout = float(options.get("timeout", 30))
        self._synchronous = options.get("synchronous", "normal")
        self._turn = 0
        self._tickets = itertools.count(1)
        self._open: list[sqlite3.Connection] = []  # one, or none
        weakref.finalize(self, _close_all, self._open)  # also at the end of the process

    def uri(self) -> str:
        return "memory://" if self.path is None else "sqlite:///" + self.path

    # -- the connection ------------------------------------------------------------------------

    def __enter__(self) -> sqlite3.Connection:
        if not _lock.acquire(timeout=self._timeout):
            raise OperationalError(f"database {self.path}: database is locked")
        try:
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
            error_type = ValueError if isinstance(exc, sqlite3.DataError) else OperationalError
            raise error_type(f"database {self.path}: {exc}") from None

    def _connect(self) -> sqlite3.Connection:
        path, until = self.path, time.monotonic() + self._timeout
        if path and os.path.isdir(path):
            raise OperationalError(f"{path} is a directory: expected an SQLite file")
        try:
            if path:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            connection = sqlite3.connect(
                path or ":memory:",
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            self._open.append(connection)
            while True:
                try:
                    self._prepare(connection)
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
        execute = connection.execute
        application, version, tables = execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if (tables or version) and application != _APPLICATION_ID:
            raise OperationalError(
                f"{self.path} is the database of another program: give taskq a file of its own"
            )
        if tables and version != _SCHEMA_VERSION:
            raise OperationalError(
                f"{self.path} has schema version {version}, this taskq ({__version__}) works with "
                f"{_SCHEMA_VERSION}: use one version of taskq on a file"
            )
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

    def publish(self, deliveries: Rows, chords: Rows = ()) -> None:
        with self as connection:
            if len(deliveries) > 1 or chords:
                connection.execute("BEGIN IMMEDIATE")
                self._change_chords(connection, chords)
            connection.executemany(_INSERT, deliveries)
        self.bells.ring(delivery[0] for delivery in deliveries)

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Probe the index of each queue, and that of due times, with one query."""
        marks = ",".join("?" * len(queues))
        waiting = f"SELECT 1 FROM messages WHERE {_FREE} AND queue IN ({marks})"
        due = "SELECT min(due) FROM messages WHERE due IS NOT NULL"
        ready, next_due = self._execute(f"SELECT EXISTS ({waiting}), ({due})", queues)[0]
        return bool(ready) or next_due is not None and next_due <= time.time(), next_due

    def settle(self, owner: int, settled: Settled, queues: Any = (), limit: int = 0) -> list[Claim]:
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
        connection.executemany("DELETE FROM messages WHERE id = ? AND owner = ?", gone)
        connection.executemany(_REQUEUE, back)
        if connection.total_changes - before < len(settled):
            raise StaleClaim(f"another worker has taken over claims of {owner:x}")

    def _ready(self, connection: sqlite3.Connection, queues: Sequence[str], limit: int) -> Any:
        """Return rows to claim: from each queue in turn while it has any, by priority."""
        self._turn += 1
        start = self._turn % len(queues)
        order = (*queues[start:], *queues[:start])
        cursors = [connection.execute(_READY, (queue, limit)) for queue in order]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*cursors))
        return sorted(itertools.islice(filter(None, turns), limit), key=lambda row: row[2])

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any]) -> int:
        """Recover also claims without a journal: somebody has deleted it."""
        count = super().recover(lost, settle)
        for (owner,) in self._execute("SELECT DISTINCT owner FROM messages WHERE owner > 0"):
            if self.folder and not os.path.exists(f"{self.folder}/{owner:x}.journal"):
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
        self.bells.ring((), [row[0] for row in results if row[1] in READY_STATES])
        return complete

    def _end_parts(self, connection: Any, results: Rows, parts: Rows, again: bool = False) -> Any:
        """Store results and count parts; return the deliveries of chords that they complete, or
        with `again` had completed before."""
        now = time.time()
        dated = [(*row, now + seconds if seconds else None) for *row, seconds in results]
        connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", dated)
        rows: dict[str, list[Any]] = {}
        for chord, index, id, _ in parts:
            rows.setdefault(chord, []).append((id, index, chord))
        complete: list[Delivery] = []
        for chord, some in rows.items():
            counted = connection.executemany(_PART, some).rowcount
            if connection.execute(_COUNT, (-counted, chord)).rowcount or again:
                complete += map(Delivery._make, connection.execute(_COMPLETE, (chord,)))
        return complete

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        found = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            marks = ",".join("?" * len(some))
            sql = f"SELECT id, state, meta FROM results WHERE id IN ({marks})"
            sql += " AND (expires IS NULL OR expires > ?)"
            for id, state, meta in self._execute(sql, (*some, time.time())):
                found[id] = state, meta
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

    def sweep(self) -> None:
        """Delete 500 expired rows at a time, so that no transaction is long; checkpoint."""
        for table in ("results", "chords"):
            some = f"SELECT id FROM {table} WHERE expires < ? LIMIT 500"
            while self._write(f"DELETE FROM {table} WHERE id IN ({some})", [(time.time(),)]):
                pass
        self._execute("PRAGMA wal_checkpoint(PASSIVE)")
        self.bells.sweep()


def _close_all(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()


#: Held by a thread while it uses SQLite or makes a store, so that none does when another forks.
_lock = threading.RLock()
_stores: dict[tuple[str, str], Store] = {}


def _before_fork() -> None:
    """Close every connection: SQLite counts its locks by process, and a child that inherited one
    would believe that it has its parent's locks."""
    _lock.acquire()
    for store in _stores.values():
        store.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_lock.release)
    os.register_at_fork(after_in_child=_lock.release)


def open_store(url: str, options: dict[str, Any]) -> Store:
    """Return the store at an address; apps of one process share it.

    sqlite:///relative.db, sqlite:////absolute.db, memory:// and redis:// are known; any other
    scheme is an ImproperlyConfigured. Options come from `options` and from the URL's query.
    """
    kinds: dict[str, Any] = dict.fromkeys(RedisStore.SCHEMES, RedisStore)
    kinds.update(sqlite=SQLiteStore, memory=SQLiteStore)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in kinds:
        why = f"taskq has no {scheme!r}; use sqlite:// (a file) or redis://"
        raise ImproperlyConfigured(f"{_mask_url(url)!r}: {why}")
    query = rest.partition("?")[2]
    if query:
        from urllib.parse import parse_qsl

        options = {**options, **dict(parse_qsl(query, keep_blank_values=True))}
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
#   taskq.owner.N    number of the last settlement of this owner, or 'dead'
#   taskq.due        sorted set of tags in `unacked` that wait for their ETA: due:UNIQUE:LIST
#   taskq.rejected   list of the last 10,000 rejected messages: about it in JSON, newline, text
#   taskq.exchanges  hash of each exchange's kind
#   G.b              beside Celery's keys of a chord, G.s and so on: list and text for its end

#: All that must happen at once: check claims, run commands, drop the claims, make new ones.
_SCRIPT = """
local unacked, index, owner, due = unpack(KEYS, 1, 4)
local seq, now, left, tag, ticket, before, queues, tags = unpack(ARGV, 1, 8)
local call, claims, done, wrong, first = redis.call, {}, {}, '', 9 + tags

if seq == '0' then  -- on behalf of others: what is not there any more has been settled
    for i = 9, first - 1 do
        if call('HEXISTS', unacked, ARGV[i]) == 0 then return {'stale'} end
    end
elseif call('GET', owner) == 'dead' then
    call('DEL', owner)
    return {'stale'}
end
local at = first
while at <= #ARGV do  -- before any command: a script that fails half-way is not undone
    if string.match(ARGV[at + 1], '^[LR]PUSH$') then
        local kind = call('TYPE', ARGV[at + 2]).ok
        if kind ~= 'list' and kind ~= 'none' then return {'wrong', ARGV[at + 2]} end
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
    for _, name in ipairs({'.j', '.t', '.s', '.d', '.b'}) do
        call('EXPIRE', key .. name, ttl)
    end
    local parts = size and size + (call('GET', key .. '.t') or 0)
    if call('ZCARD', key .. '.j') ~= parts then return end
    local body = call('LRANGE', key .. '.b', 0, 1)
    if #body == 0 then body = {list, text} end
    if body[1] ~= '' and (over or call('SET', key .. '.c', 'done', 'NX', 'EX', 86400)) then
        body[2] = named(body[2], key)
        if again == '1' then
            done[#done + 1] = body
        elseif seq ~= '0' then  -- for this worker: one of Celery does not know our chords
            claim(body[1], body[2])
        else
            call('LPUSH', body[1], body[2])
        end
    end
end
at = first
while at <= #ARGV do
    local command = {unpack(ARGV, at + 1, at + ARGV[at])}
    if command[1] == 'part' then part(unpack(command, 2)) else call(unpack(command)) end
    at = at + 1 + ARGV[at]
end
for i = 9, first - 1 do
    call('HDEL', unacked, ARGV[i])
    call('ZREM', index, ARGV[i])
end
if seq ~= '0' then call('SET', owner, seq, 'EX', 86400) end

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
return {'ok', wrong, claims, done}
"""


class _Holder:
    """What one worker of this process has claimed."""

    def __init__(self) -> None:
        self.held: dict[str, None] = {}
        self.ticket, self.seq = 1, 0
        #: Number and tags of a settlement whose reply never came.
        self.unsure: tuple[int, list[str]] | None = None
        #: Tags of claims that it turned out to have settled.
        self.applied: set[str] = set()


class RedisBell(Bell):
    """A Bell that Redis rings too: for a worker when somebody pushes to a list that it has looked
    at, for a client when a result is published."""

    _line: Any = None  # the connection on which Redis rings

    def __init__(self, store: RedisStore, path: str | None = None, polls: bool = False) -> None:
        super().__init__(path, polls=polls)
        self._store = store
        self._channels: list[str] = []
        #: Its number for the server.
        self.line_id = 0

    def listen(self, topics: Iterable[str]) -> None:
        """Hear of these topics, and of no others."""
        topics = list(topics)
        super().listen(topics)
        keys = [self._store.result_key(topic[2:]) for topic in topics]
        self._channels = ["__redis__:invalidate"] if topics[0].startswith("q:") else keys
        self._tune()

    def _tune(self) -> None:
        """Subscribe, on a new connection if there is none; without a server that waits."""
        try:
            if self._line is None:
                self._line = self._store.connect()
                self.line_id = self._store.send(self._line, ("CLIENT", "ID"))[0]
            self._line.send_command("UNSUBSCRIBE")
            self._line.send_command("SUBSCRIBE", *self._channels)  # each has a reply of its own
            while self._line.read_response()[::2] != [b"subscribe", len(self._channels)]:
                pass
        except (OperationalError, *self._store.errors):
            self.hang_up()

    def __del__(self) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """Give up the connection on which Redis rings; the next sleep makes another."""
        if self._line is not None:
            self._line.disconnect()
        self._line = None

    def doze(self, hears: bool) -> None:
        """Sleep from now on; if it `hears`, the thread's next look tells Redis what for."""
        super().doze(hears)
        if self._line is None:
            self._tune()
        self._store.local.bell = self if hears and self._line is not None else None

    def wait(self, timeout: float) -> bool:
        """Sleep until somebody rings, or for `timeout` seconds; return whether somebody did."""
        if self._line is None:  # what happens until it is there again goes unheard
            self._tune()
            return self._line is not None or super().wait(min(timeout, 1.0)) or True
        rung = False
        try:
            _readable(self._line._sock, max(timeout, 0), *self._fds[:1])
            while self._line.can_read(timeout=0):
                self._line.read_response()
                rung = True
        except (*self._store.errors, TypeError):
            self.hang_up()
            rung = True
        if self._fds and _readable(self._fds[0], 0):
            rung = bool(os.read(self._fds[0], 4096))
        self._flag[0] = 0
        return rung


class RedisStore(Store):
    """A store on a Redis server, in Celery's own format: see above.

    Every thread has a connection, a sleeper one more, a process with workers a thread for their
    heartbeats. That a worker is dead is seen at once by its journal on the same machine, elsewhere
    by missing heartbeats, and by Celery's visibility time-out where no worker of taskq is left.
    """

    foreign = True
    SCHEMES = ("redis", "rediss", "unix", "redis+socket", "valkey", "valkeys")
    OPTIONS: dict[str, Any] = {
        "visibility_timeout": 3600,
        "global_keyprefix": "",
        "result_prefix": "",  # stands before the keys of results
        "priority_steps": (0, 3, 6, 9),
        "socket_timeout": 10.0,  # without one, a server that hangs would never be missed
        "socket_connect_timeout": 5.0,
    }
    #: More options of the connections; `ssl_…` too.
    CONNECTION = frozenset(
        "socket_keepalive socket_keepalive_options health_check_interval client_name".split()
    )
    #: Options of Celery's for what needs none here.
    NO_EFFECT = frozenset(
        "fanout_prefix fanout_patterns max_connections retry_on_timeout retry_policy max_retries "
        "interval_start interval_step interval_max polling_interval queue_order_strategy "
        "unacked_restore_limit unacked_restore_interval unacked_restore_throttle "
        "unacked_mutex_expire result_chord_ordered".split()
    )
    #: The types of our keys, without which nothing works.
    KEYS = {"unacked": b"hash"}
    KEYS.update(dict.fromkeys(("unacked_index", "taskq.due", "taskq.workers"), b"zset"))
    #: Seconds between heartbeats, and after the last one until a worker counts as dead.
    BEAT, DEAD = 2.0, 10.0
    #: How often, 0.2 s apart, what can be repeated is tried while the server cannot be reached.
    TRIES = 25

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        try:
            import redis
        except ImportError:
            raise ImproperlyConfigured(
                f"{_mask_url(url)} needs redis-py, which is not installed: pip install redis"
            ) from None
        import hashlib
        import tempfile

        self.redis: Any = redis
        self.errors = (redis.RedisError, OSError)
        self.url = url
        at = self._options = self._parse(url, options)
        self._prefix, self._sep = at.pop("global_keyprefix"), "\x06\x16"
        self._result_prefix = at.pop("result_prefix")
        self._visibility = float(at.pop("visibility_timeout"))
        self._steps = sorted(at.pop("priority_steps"))
        user = os.getuid() if hasattr(os, "getuid") else None
        name = f"{at.get('path', at.get('host'))}-{at.get('port')}-{at['db']}-{self._prefix}"
        name = re.sub(r"[^\w.-]", "_", f"taskq-{user}-{name}-run")
        self.folder = os.path.join(tempfile.gettempdir(), name)  # where the machine's workers meet
        if user and os.path.exists(self.folder) and os.stat(self.folder).st_uid != user:
            raise ImproperlyConfigured(f"{self.folder} belongs to another user: set TMPDIR")
        self.bells = Bells(self.folder, functools.partial(RedisBell, self))
        self._sha = hashlib.sha1(_SCRIPT.encode()).hexdigest()
        self.local: Any = threading.local()
        self._checked = False
        self._tracks = True  # whether the server can tell of changes
        self._turn = 0
        self._holders: dict[int, _Holder] = {}
        self._beating: threading.Thread | None = None
        self._looked = self._up_since = 0.0  # the last look for dead workers, the first in a row

    def _parse(self, url: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, with what the connections are made with."""
        scheme, _, rest = url.partition("://")
        is_socket = scheme in ("unix", "redis+socket")
        to = "unix" if is_socket else "rediss" if scheme in ("rediss", "valkeys") else "redis"
        try:
            at = self.redis.connection.parse_url(f"{to}://{rest.replace('virtual_host', 'db')}")
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
        return {name: made[name] for name in made.keys() - self.NO_EFFECT - unfit}

    def uri(self) -> str:
        """Return the address as it was given."""
        return self.url

    # -- keys ------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _list(self, queue: str, priority: int) -> str:
        """Return the key of a queue's list for messages of this priority."""
        step = max(step for step in self._steps if step <= priority)
        return self._key(f"{queue}{self._sep}{step}" if step else queue)

    def _place(self, key: bytes) -> tuple[str, int]:
        """Return the queue and priority of a list."""
        queue, _, step = key.decode()[len(self._prefix) :].partition(self._sep)
        return queue, int(step or 0)

    def result_key(self, id: str) -> str:
        """Return the key, and channel, of a task's result or of a stored group."""
        kind = "" if id.startswith("celery-taskset-meta-") else "celery-task-meta-"
        return f"{self._result_prefix}{kind}{id}"

    def _chord_key(self, chord: str) -> str:
        return f"{self._result_prefix}celery-taskset-meta-{chord}"

    # -- connections -----------------------------------------------------------------------------

    def connect(self) -> Any:
        """Return a new connection."""
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = dict(self._options)
        kind = options.pop("connection_class", self.redis.Connection)
        connection = kind(**options, protocol=2, retry=Retry(NoBackoff(), 0))
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
            raise OperationalError(
                f"Redis at {_mask_url(self.url)} is a cluster, or older than Redis 6: taskq needs "
                "a single server of 6 or later"
            )
        keys = [self._key(name) for name in self.KEYS]
        kinds = self.send(connection, *(("TYPE", key) for key in keys))
        for key, kind, wanted in zip(keys, kinds, self.KEYS.values()):
            if kind not in (wanted, b"none"):
                raise ImproperlyConfigured(
                    f"the Redis key {key!r} is a {kind.decode()}, not a {wanted.decode()}: rename "
                    "it, or set global_keyprefix in broker_transport_options"
                )

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
                text = f"Redis at {_mask_url(self.url)}: {exc}"
                raise OperationalError(text) from None
            raise

    def _call(self, *commands: Sequence[Any], tries: int = 1) -> list[Any]:
        """Send commands on this thread's connection; what can be repeated has more tries."""
        local = self.local.__dict__
        while True:
            if local.get("pid") != os.getpid():
                local.update(pid=os.getpid(), connection=None)
            connection, local["connection"] = local["connection"], None
            try:
                connection = connection or self.connect()
                replies = self.send(connection, *commands)
                local["connection"] = connection
                return replies
            except OperationalError:
                tries -= 1
                if not tries:
                    raise
                time.sleep(0.2)

    def _run(
        self,
        commands: Sequence[Sequence[Any]],
        tags: Sequence[str] = (),
        owner: int = 0,
        seq: int = 0,
        queues: Sequence[str] = (),
        limit: int = 0,
        first: int = 0,
        tries: int = 1,
        now: float | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Run the script: commands, the end of claims, and new claims from ticket `first` on.

        `seq` numbers the settlements of a worker of this process. Returns rows [list, message,
        whether it has an ETA] of claims, and [list, message] of chords that are complete.
        """
        names = ("unacked", "unacked_index", f"taskq.owner.{owner:x}", "taskq.due")
        lists = [self._list(queue, step) for step in self._steps for queue in queues]
        keys = [*map(self._key, names), *lists]
        before = len(self._prefix.encode())
        head = (
            seq,
            now or time.time(),
            limit,
            f"{owner:x}:",
            first,
            before,
            len(queues),
            len(tags),
        )
        rest = [item for command in commands for item in (len(command), *command)]
        script = ("EVALSHA", self._sha, len(keys), *keys, *head, *tags, *rest)
        verdict, *more = self._call(script, tries=tries)[0]
        if verdict == b"stale":
            raise StaleClaim(f"another worker has taken over claims of {owner:x}")
        if verdict == b"wrong":
            raise ValueError(f"the Redis key {more[0].decode()!r} is not a list: rename it")
        wrong, claims, done = more
        if wrong:
            worker_logger.error("The Redis key %r is not a list: this queue cannot be read", wrong)
        return claims, done

    # -- messages --------------------------------------------------------------------------------

    def publish(self, deliveries: Sequence[Any], chords: Sequence[Any] = ()) -> None:
        """Push to the lists; those with an ETA too, for a worker of any kind to keep until due."""
        commands = self._commands((), deliveries, chords, ())
        if len(commands) == 1:
            self._call(*commands)
        else:
            self._run(commands)

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
            key = self._chord_key(chord)
            if not number:
                made.append(("DEL", *(key + end for end in (".j", ".t", ".s", ".d", ".b"))))
                made.append(("SET", key + ".c", "done", "EX", 300))
            elif delivery is None:
                made.append(("INCRBY", key + ".t", number))
            else:
                made += ("DEL", key + ".c", key + ".b"), ("SET", key + ".s", number)
                made.append(("RPUSH", key + ".b", *self._body(delivery)))
                made += [("EXPIRE", key + end, ttl) for end in (".s", ".b")]
        metas = {id: (state, text) for id, state, text, _ in results} if parts else {}
        for chord, place, id, delivery in parts:
            state, text = metas.get(id, (SUCCESS, '{"result": null}'))
            result = json.loads(text)["result"] if text.startswith("{") else None  # a pickle
            value = json.dumps([1, id, state, result])
            place, body = "+inf" if place is None else place, self._body(delivery)
            made.append(("part", self._chord_key(chord), id, place, value, ttl, again, *body))
        return made

    def _body(self, delivery: Any) -> tuple[str, str]:
        return (self._list(delivery[0], delivery[1]), delivery[3]) if delivery else ("", "")

    def look(self, queues: Sequence[str]) -> tuple[bool, float | None]:
        """Ask for the lists and the next due time; for a dozing worker Redis remembers it."""
        lists = [self._list(queue, step) for queue in queues for step in self._steps]
        commands: list[Any] = [("EXISTS", *lists)] if lists else [("ECHO", 0)]
        commands.append(("ZRANGE", self._key("taskq.due"), 0, 0, "WITHSCORES"))
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

    def settle(
        self, owner: int, settled: Settled, queues: Sequence[str] = (), limit: int = 0
    ) -> list[Claim]:
        """Settle and claim with one script.

        If its reply is lost, the next settlement first finds out what has become of it.
        """
        holder = self._holders.get(owner)
        if holder is None and limit:
            holder = self._enlist(owner)
        if holder is None:
            self._run(self._changes(settled), [claim.key for claim, _ in settled], owner)
            return []
        if holder.unsure is not None:
            self._reconcile(owner, holder)
        settled = [pair for pair in settled if pair[0].key not in holder.applied]
        tags = [claim.key for claim, _ in settled]
        if not holder.held.keys() >= set(tags):
            raise StaleClaim(f"another worker has taken over claims of {owner:x}")
        self._turn += 1
        start = self._turn % max(len(queues), 1)
        names = [*queues[start:], *queues[:start]] if limit else []
        changes, first = self._changes(settled), holder.ticket
        holder.ticket += limit + len(changes)  # the ends of chords are claimed too
        holder.seq += 1
        holder.unsure = holder.seq, tags
        try:
            rows, _ = self._run(changes, tags, owner, holder.seq, names, limit, first)
        except StaleClaim:
            holder.held.clear()
            holder.unsure = None
            raise
        holder.unsure = None
        for tag in tags:
            del holder.held[tag]
        claims = []
        for ticket, (place, raw, eta) in enumerate(rows, first):
            claim = Claim(f"{owner:x}:{ticket}", ticket, *self._place(place), raw)
            if not (eta and self._defer(holder, claim)):
                holder.held[claim.key] = None
                claims.append(claim)
        return claims

    def _changes(self, settled: Settled) -> list[tuple[Any, ...]]:
        """Return the script's commands for the outcomes of claims."""
        made: list[tuple[Any, ...]] = []
        for claim, (verb, results, publish, reason, _, chords, parts) in settled:
            made += self._commands(results, publish, chords, parts)
            if verb == "reject":
                about = {"queue": claim.queue, "rejected_at": time.time(), "reason": str(reason)}
                text, key = json.dumps(about).encode(), self._key("taskq.rejected")
                made += ("LPUSH", key, text + b"\n" + claim.raw), ("LTRIM", key, 0, 9999)
        for claim, outcome in reversed(settled):  # so that the oldest is the next again
            if outcome.verb == "requeue":
                text = outcome.reason or claim.raw
                made.append(("RPUSH", self._list(claim.queue, claim.priority), text))
        return made

    def _defer(self, holder: _Holder, claim: Claim) -> bool:
        """Put a claim aside if its ETA is still to come. Should no worker of ours be left, Celery
        restores it: its time in the index is the ETA."""
        try:
            due = _timestamp(claim.message.headers["eta"])
        except MalformedMessage:  # whoever executes it rejects it
            due = 0.0
        if due <= time.time():
            return False
        unacked, index = self._key("unacked"), self._key("unacked_index")
        place = self._list(claim.queue, claim.priority)
        tag = f"due:{claim.key.replace(':', '.')}:{place}"
        value = b'[%b,"",%b]' % (claim.raw, json.dumps(claim.queue).encode())
        commands = [("ZADD", name, due, tag) for name in (index, self._key("taskq.due"))]
        try:
            self._run([("HSET", unacked, tag, value), *commands], [claim.key])
        except OperationalError:  # a claim that nobody holds: it is given back the next time
            holder.unsure = holder.seq, []
        return True

    def begun(self, claims: Sequence[Claim]) -> None:
        """Take claims that have begun, and must not run again, from where others restore them."""
        self._call(("ZREM", self._key("unacked_index"), *(claim.key for claim in claims)))

    def purge(self, queue: str) -> int:
        """Delete the lists, and what waits for its ETA."""
        lists = [self._list(queue, step) for step in self._steps]
        tags = self._call(("ZRANGE", self._key("taskq.due"), 0, -1))[0]
        tags = [tag for tag in tags if tag.split(b":", 2)[2].decode() in lists]
        commands = [("LLEN", key) for key in lists] + [("DEL", *lists)]
        if tags:
            commands += [
                ("ZREM", self._key(name), *tags) for name in ("taskq.due", "unacked_index")
            ]
            commands.append(("HDEL", self._key("unacked"), *tags))
        return sum(self._call(("MULTI",), *commands, ("EXEC",))[-1][: len(lists)]) + len(tags)

    # -- heartbeats and recovery -----------------------------------------------------------------

    def _enlist(self, owner: int) -> _Holder:
        """Begin with the heartbeats of a worker of this process."""
        self._holders[owner] = _Holder()
        try:
            self._beat_once()
        except OperationalError:
            del self._holders[owner]
            raise
        if self._beating is None or not self._beating.is_alive():
            self._beating = threading.Thread(target=self._beat, name="taskq heartbeat", daemon=True)
            self._beating.start()
        return self._holders[owner]

    def _beat(self) -> None:
        """Beat for the workers of this process while there are any: in a thread, since a task of
        the solo pool may keep the main one."""
        while self._holders:
            time.sleep(min(self.BEAT, self._visibility / 3))
            with contextlib.suppress(OperationalError):
                self._strike_out()
                self._beat_once()
        self.local.connection = None

    def _strike_out(self) -> None:
        """Forget the workers of this process that have ended. The last one of all puts back what
        waits for its ETA: those that are left may be Celery's."""
        here = {os.path.basename(path) for path in list(Journal.own)}
        ended = [owner for owner in list(self._holders) if f"{owner:x}.journal" not in here]
        for owner in ended:
            self._holders.pop(owner, None)
            key, alive = self._key("taskq.workers"), self._now() - self.DEAD
            left = self._call(("ZREM", key, f"{owner:x}"), ("ZCOUNT", key, alive, "+inf"))[1]
            while not left and self._call(("ZCARD", self._key("taskq.due")))[0]:
                self._run((), limit=1, now=float("inf"))

    def _beat_once(self) -> None:
        """Show that the workers of this process live, and renew their claims."""
        now, commands = self._now(), []  # type: float, list[tuple[Any, ...]]
        for owner, holder in list(self._holders.items()):
            commands.append(("ZADD", self._key("taskq.workers"), now, f"{owner:x}"))
            times = [item for tag in list(holder.held) for item in (time.time(), tag)]
            if times:
                commands.append(("ZADD", self._key("unacked_index"), "XX", *times))
        if commands:
            self._call(*commands)

    def _now(self) -> float:
        """Return the server's time: the clocks of machines may differ by more than a heartbeat."""
        seconds, micros = map(int, self._call(("TIME",))[0])
        return seconds + micros / 1e6

    def recover(self, lost: Lost, settle: Callable[[int, Settled], Any]) -> int:
        """Recover also the claims of workers whose heart has stopped, and what has been claimed for
        longer than the visibility time-out."""
        count, now = super().recover(lost, settle), time.monotonic()
        workers, index = self._key("taskq.workers"), self._key("unacked_index")
        if now - self._looked > 2 * self.BEAT:  # perhaps nobody could beat: let them do it first
            self._up_since = now
        self._looked = now
        dead, late = self._now() - self.DEAD, time.time() - self._visibility
        names, overdue = self._call(
            ("ZRANGEBYSCORE", workers, "-inf", dead),
            ("ZRANGEBYSCORE", index, "-inf", late, "LIMIT", 0, 100),
        )
        for name in names if now - self._up_since > 2 * self.BEAT else ():
            owner = int(name, 16)
            if not os.path.exists(os.path.join(self.folder or "", f"{owner:x}.journal")):
                self._call(("SET", self._key(f"taskq.owner.{owner:x}"), "dead", "EX", 86400))
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
        """Read the hash."""
        tags = [tag.decode() for tag in self._call(("HKEYS", self._key("unacked")))[0]]
        claims = self._read([tag for tag in tags if tag.startswith(f"{owner:x}:")])
        return sorted(claims, key=lambda claim: claim.ticket)

    def _read(self, tags: Sequence[str]) -> list[Claim]:
        """Return the claims with these tags."""
        found = []
        values = self._call(("HMGET", self._key("unacked"), *tags))[0] if tags else ()
        for tag, raw in zip(tags, values):
            ticket, queue, priority = tag.rpartition(":")[2], "", 0
            if raw is None:
                self._call(("ZREM", self._key("unacked_index"), tag))
                continue
            ours = re.fullmatch(rb'\[(.*),"",("[^\n]*")\]', raw, re.DOTALL)
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                if ours:
                    raw, queue = ours[1], json.loads(ours[2])
                    message = json.loads(raw)
                else:
                    message, exchange, queue = json.loads(raw)
                    raw = json.dumps(message).encode()
                    queue = next(iter(self.bound(exchange, queue) if exchange else ()), queue)
                priority = message["properties"].get("priority") or 0
            number = int(ticket) if ticket.isdigit() else 0
            found.append(Claim(tag, number, queue, priority, raw))
        return found

    def _reconcile(self, owner: int, holder: _Holder) -> None:
        """After a lost reply: find out whether the settlement was applied, and give back what it
        has claimed."""
        seq, tags = holder.unsure or (0, [])
        last = self._call(("GET", self._key(f"taskq.owner.{owner:x}")))[0]
        strays = [claim for claim in self.claims_of(owner) if claim.key not in holder.held]
        if strays:
            changes = self._changes([(claim, _GIVE_BACK) for claim in strays])
            self._run(changes, [claim.key for claim in strays], owner)
        if last == b"%d" % seq:
            holder.applied.update(tags)
            for tag in tags:
                del holder.held[tag]
        holder.unsure = None

    # -- results ---------------------------------------------------------------------------------

    def put_results(self, results: Sequence[Sequence[Any]], parts: Sequence[Any] = ()) -> list[Any]:
        """Set and publish results, count parts; return the deliveries of complete chords."""
        _, done = self._run(self._commands(results, (), (), parts, again=1), tries=self.TRIES)
        return [Delivery(*self._place(place), None, text.decode()) for place, text in done]

    def get_results(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """Read with one command; a server that is being restarted is waited for."""
        keys, found = [self.result_key(id) for id in ids], {}
        for id, text in zip(ids, self._call(("MGET", *keys), tries=self.TRIES)[0] if keys else ()):
            if text is not None:
                found[id] = _state_of(text)
        return found

    def chord_parts(self, chord: str) -> list[str]:
        """Read the chord's sorted set."""
        rows = self._call(("ZRANGE", self._chord_key(chord) + ".j", 0, -1), tries=self.TRIES)[0]
        return [json.loads(row)[1] for row in rows]

    def forget(self, ids: Sequence[str]) -> None:
        """Delete keys."""
        if ids:
            self._call(("DEL", *map(self.result_key, ids)), tries=self.TRIES)

    # -- bindings and housekeeping ---------------------------------------------------------------

    def bind(self, exchange: str, kind: str, routing_key: str, queue: str) -> None:
        """Add to kombu's sets."""
        pattern = _topic_pattern(routing_key) if kind == "topic" else ""
        row = self._sep.join((routing_key, pattern, queue))
        self._call(
            ("SADD", self._key(f"_kombu.binding.{exchange}"), row),
            ("SADD", self._key(f"_kombu.binding_permanent.{exchange}"), row),
            ("HSET", self._key("taskq.exchanges"), exchange, kind),
        )

    def bindings(self, exchange: str) -> list[tuple[str, str, str]]:
        """Read kombu's set of an exchange."""
        rows, kind = self._call(
            ("SMEMBERS", self._key(f"_kombu.binding.{exchange}")),
            ("HGET", self._key("taskq.exchanges"), exchange),
        )
        found = []
        for row in sorted(rows):
            key, pattern, queue = row.decode().split(self._sep)
            found.append((kind.decode() if kind else "topic" if pattern else "direct", key, queue))
        return found

    def sweep(self) -> None:
        """Remove dead processes' files; results expire by themselves."""
        self.bells.sweep()

    def close(self) -> None:
        """Close this thread's connection and the bells that nobody uses."""
        with contextlib.suppress(OperationalError):
            self._strike_out()
        local = self.local.__dict__
        local.pop("bell", None)
        self.bells.clear()
        connection, local["connection"] = local.get("connection"), None
        if connection is not None and local["pid"] == os.getpid():
            connection.disconnect()


def _state_of(text: bytes) -> tuple[str, str]:
    """Return (state, meta text) of a result, JSON or a pickle: that is read here, not loaded."""
    if text.startswith(b"{"):
        return json.loads(text).get("status", "SAVED"), text.decode()
    import pickletools

    names = [value for _, value, _ in pickletools.genops(text) if isinstance(value, str)]
    return names[names.index("status") + 1], _encode_base64(text)


def _topic_pattern(key: str) -> str:
    """Return the pattern that kombu keeps beside a topic binding's key."""
    words = {"*": r"[^\.]+", "#": r".*?"}
    return "^" + r"\.".join(words.get(word, re.escape(word)) for word in key.split(".")) + "$"


# ---------------------------------------------------------------------------------------------
# 7. Results
# ---------------------------------------------------------------------------------------------


class _Threads(threading.local):
    """What each thread is doing: the tasks it runs, innermost last, whether it may wait for
    others, and the Batch that gathers what it sends."""

    def __init__(self) -> None:
        self.stack: list[tuple[Any, Any]] = []  # (task, request)
        self.may_join = True
        self.batch: Any = None


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


def result_row(
    app: Any, request: Any, state: str, value: Any, traceback: str | None = None
) -> tuple[str, str, str, float | None]:
    """Return what a store keeps of a task: (id, state, meta text, seconds to keep it or None).

    The meta is Celery's, as JSON or base64 of a pickle. request: the task's id, group, parent_id
    and children, with `result_extended` more. Raises EncodeError if a return value cannot be
    serialized; an exception is, in the worst case, by its repr.
    """
    conf = app.conf
    seconds = conf.seconds("result_failure_expires") if state == FAILURE else None
    if seconds is None:
        seconds = conf.seconds("result_expires")
    if isinstance(value, BaseException) and conf.result_serializer == "json":
        value = encode_exception(value)
    elif isinstance(value, (AsyncResult, GroupResult)):
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
        if state in EXCEPTION_STATES:
            meta["result"] = encode_exception(Exception(_repr(value)))
        try:
            text = serialize(meta, conf.result_serializer)[2]
        except EncodeError:
            why = f"the result of {request.task} cannot be serialized: {cause}"
            raise EncodeError(why) from None
    return request.id, state, text, seconds


def decode_result(app: Any, text: str) -> dict[str, Any]:
    """Return the meta in a `result_row`: its result is an exception where the task failed, its
    children are results."""
    accept = app.conf.result_accept_content or app.conf.accept_content
    kind = CONTENT_TYPES["json" if text.startswith("{") else "pickle"]
    meta = deserialize(text, kind, {*accept, "json"})
    if meta["status"] in EXCEPTION_STATES and meta["result"] is not None:
        meta["result"] = decode_exception(meta["result"])
    children = meta.get("children")
    meta["children"] = children and [result_from_tuple(child, app) for child in children]
    return meta


def _lineage(result: Any) -> list[Any]:
    """Return a result, its parent, that one's parent, and so on."""
    found = [result]
    while found[-1].parent is not None:
        found.append(found[-1].parent)
    return found


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
    #: The result of what was before it in a chain; of a chord's body, that of its header.
    parent: Any = None
    #: Whether it is of a task that was sent with `ignore_result`.
    ignored = False
    _backend: Any = None
    _value: Any

    @property
    def backend(self) -> Store:
        """The store that keeps it."""
        return self._backend or self.app.backend

    def _flat(self) -> list[Any]:
        """Return the results of single tasks in it."""
        return [self]

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        *,
        callback: Callable[[str, Any], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        disable_sync_subtasks: bool = True,
        progress: bool = False,
        no_ack: bool = True,
        follow_parents: bool = True,
        on_message: Any = None,
    ) -> Any:
        """Wait until all tasks in it have their ends and return the result, or results in order.

        timeout: seconds, for all together, after which TimeoutError is raised; None waits for ever.
        propagate: raise the first error, as soon as it is known; otherwise errors are returned.
        callback: called with each id and result; those of several are then not returned.
        on_interval: called every `interval` seconds while waiting.
        disable_sync_subtasks: raise RuntimeError inside a task.
        progress: draw a bar meanwhile, on a terminal or in a notebook, of its tasks and those of
        its parents: a chain's steps, a chord's header. The others, of Celery's, change nothing.
        """
        if self.ignored:
            raise NotImplementedError(
                f"task {self} keeps no result: it was sent with ignore_result=True"
            )
        if disable_sync_subtasks and not _thread.may_join:
            raise RuntimeError(
                "Never call result.get() within a task!\n"
                "See README, 'Calling': another process may be missing, or use allow_join_result()."
            )
        wanted = [leaf for leaf in self._flat() if not leaf.ignored]
        also = [leaf for node in _lineage(self)[1:] for leaf in node._flat()] if progress else ()
        for leaf in _as_they_end(wanted, also, progress, timeout, interval, on_interval):
            if propagate:
                leaf.maybe_throw()
        return self._value(propagate, callback)

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
        """Delete what the store knows of the tasks."""
        leaves = self._flat()
        self.backend.forget([leaf.id for leaf in leaves])
        for leaf in leaves:
            leaf._cache = None

    def revoke(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available in this version."""
        raise _unavailable(f"{type(self).__name__}.revoke")

    def as_list(self) -> list[str]:
        """Return the ids of its tasks and of its parents'."""
        return [leaf.id for node in _lineage(self) for leaf in node._flat()]


def _of_meta(key: str, doc: str) -> Any:
    return property(lambda result: result._meta().get(key), doc=doc)


class AsyncResult(ResultBase):
    """The result of a task, there or still to come: `add.delay(2, 2)` returns one.

    Can be made from an id alone, in any process that has the app: `AsyncResult(id, app=app).get()`.
    """

    TimeoutError = TimeoutError

    def __init__(
        self,
        id: str,
        backend: Any = None,
        task_name: Any = None,
        app: Any = None,
        parent: Any = None,
    ) -> None:
        if id is None:
            raise ValueError(f"AsyncResult requires valid id, not {type(id)}")
        self.id = id
        self.app = app_or_default(app)
        self._backend = backend
        self.parent = parent
        self._cache: dict[str, Any] | None = None

    task_id = property(lambda result: result.id, doc="The id, by its other name.")

    def _meta(self) -> dict[str, Any]:
        return _metas([self])[0]

    def _keep(self, pair: tuple[str, str]) -> dict[str, Any]:
        meta = decode_result(self.app, pair[1])
        if meta["status"] in READY_STATES:
            self._cache = meta
        return meta

    wait = ResultBase.get

    def maybe_throw(self, propagate: bool = True, callback: Any = None) -> Any:
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

    def _value(self, propagate: bool, callback: Any) -> Any:
        return None if self.ignored else self.maybe_throw(propagate, callback)

    state = status = _of_meta(
        "status", "PENDING, STARTED, RETRY, FAILURE, SUCCESS, REVOKED, or a state of its own."
    )
    result = info = _of_meta(
        "result", "The return value, the exception of a task that failed, or `update_state`'s meta."
    )
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
        value = self._meta().get("date_done")
        return _parse_time(value) if isinstance(value, str) else value

    def iterdeps(self, intermediate: bool = False) -> Iterator[tuple[Any, Any]]:
        """Yield (parent, result) of this task, of those that it has called, and of theirs.

        IncompleteStream is raised at one that has no end yet, unless `intermediate`.
        """
        queue = collections.deque([(None, self)])  # type: collections.deque[tuple[Any, Any]]
        while queue:
            parent, node = queue.popleft()
            yield parent, node
            if node.ready():
                queue.extend((node, child) for child in node.children or ())
            elif not intermediate:
                raise globals()["IncompleteStream"]()

    def collect(self, intermediate: bool = False, **options: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (result, its value) of this task and all that it has called; options as `get`'s."""
        for _, node in self.iterdeps(intermediate):
            yield node, node.get(**options)

    def get_leaf(self) -> Any:
        """Return the value of the last task that this one and those it called have called."""
        return [value for _, value in self.collect()][-1]

    def as_tuple(self) -> tuple[Any, None]:
        """Return the result as a nested tuple that JSON can hold."""
        return (self.id, self.parent and self.parent.as_tuple()), None

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
    """The result of a task that `apply` has run here: no store has it."""

    def __init__(
        self,
        id: str,
        ret_value: Any,
        state: str,
        traceback: Any = None,
        name: Any = None,
        app: Any = None,
    ) -> None:
        super().__init__(id, app=app)
        self._cache = {"status": state, "result": ret_value, "traceback": traceback, "name": name}

    def ready(self) -> bool:
        """Return True."""
        return True

    def forget(self) -> None:
        """Do nothing."""

    def __reduce__(self) -> Any:
        meta = self._meta()
        return type(self), (self.id, meta["result"], meta["status"], meta["traceback"])


def _as_they_end(wanted: Any, also: Any, progress: bool, *how: Any) -> Iterator[AsyncResult]:
    """Yield results as they have their ends, those that are known to have them first, until all
    that are `wanted` have. how: timeout, interval, on_interval."""
    yield from [leaf for leaf in wanted if leaf._cache is not None]
    unknown = {leaf.id: leaf for leaf in (*wanted, *also) if leaf._cache is None}
    missing = {leaf.id for leaf in wanted} & unknown.keys()
    if not missing:
        return
    with contextlib.closing(Progress(len(unknown), progress)) as bar:
        for found in wanted[0].backend.wait(list(unknown), *how):
            for id, pair in found.items():
                bar.add(unknown[id]._keep(pair)["status"])
                yield unknown[id]
            missing -= found.keys()
            if not missing:
                return


class Progress:
    """A bar that shows how far a long wait has come; silent where nobody looks at it."""

    def __init__(self, total: int, wanted: bool) -> None:
        self.total, self.done, self.failed = total, 0, 0
        self.began = time.monotonic()
        self._drawn = 0.0
        seen = "ipykernel" in sys.modules or sys.stderr is not None and sys.stderr.isatty()
        self._live = wanted and seen

    def add(self, state: str) -> None:
        """Count one more that has ended."""
        self.done += 1
        self.failed += state != SUCCESS
        if self._live and time.monotonic() - self._drawn > 0.1:
            self._draw("")

    def _draw(self, end: str) -> None:
        self._drawn = time.monotonic()
        rate = self.done / max(self._drawn - self.began, 1e-6)
        filled = 30 * self.done // max(1, self.total)
        text = f"[{'#' * filled:<30}] {self.done}/{self.total}  {rate:,.0f}/s"
        text += f"  {self.failed} failed" if self.failed else ""
        text += f"  {(self.total - self.done) / rate:.0f} s left" if rate else ""
        print(f"\r{text:<78}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the end."""
        if self._live:
            self._draw("\n")


class ResultSet(ResultBase):
    """Several results as one: `ResultSet([add.delay(1, 1), add.delay(2, 2)]).get()`."""

    def __init__(self, results: Iterable[Any], app: Any = None, **_: Any) -> None:
        self.results: list[Any] = list(results)
        self.app = app_or_default(app or next((result.app for result in self.results), None))

    def add(self, result: Any) -> None:
        """Add a result, unless it is there."""
        if result not in self.results:
            self.results.append(result)

    def remove(self, result: Any) -> None:
        """Take a result (or id) out; KeyError if it is not there."""
        if result not in self.results:
            raise KeyError(result)
        self.results.remove(result)

    def discard(self, result: Any) -> None:
        """Take a result out, if it is there."""
        if result in self.results:
            self.results.remove(result)

    def update(self, results: Iterable[Any]) -> None:
        """Add those results that are not there."""
        for result in results:
            self.add(result)

    def clear(self) -> None:
        """Take all results out."""
        self.results.clear()

    def _flat(self) -> list[Any]:
        return [leaf for result in self.results for leaf in result._flat()]

    def waiting(self) -> bool:
        """Return whether one has no end yet."""
        return not self.ready()

    def completed_count(self) -> int:
        """Return how many ended well."""
        return sum(meta["status"] == SUCCESS for meta in _metas(self._flat()))

    def maybe_throw(self, callback: Any = None, propagate: bool = True) -> None:
        """Raise the error of the first task that failed."""
        for result in self.results:
            result.maybe_throw(callback=callback, propagate=propagate)

    maybe_reraise = maybe_throw
    join = join_native = ResultBase.get

    def _value(self, propagate: bool, callback: Any) -> list[Any]:
        values = [result._value(propagate, callback) for result in self.results]
        return [] if callback else values

    def iter_native(self, timeout: Any = None, interval: float = 0.5, **_: Any) -> Iterator[Any]:
        """Yield (id, meta) as tasks come to their ends."""
        for leaf in _as_they_end(self._flat(), (), False, timeout, interval, None):
            yield leaf.id, leaf._cache

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    def __eq__(self, other: Any) -> bool:
        return other.results == self.results if isinstance(other, ResultSet) else NotImplemented

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: [{', '.join(result.id for result in self.results)}]>"


class GroupResult(ResultSet):
    """The results of a group, in the order of its tasks."""

    #: Under such an id the store keeps groups that are saved (Celery's name of the key on Redis).
    SAVED = "celery-taskset-meta-{}"

    def __init__(
        self, id: Any = None, results: Any = None, parent: Any = None, app: Any = None, **_: Any
    ) -> None:
        super().__init__(results or (), app)
        self.id = id
        self.parent = parent

    children = property(lambda group: group.results, doc="The results.")

    def as_tuple(self) -> Any:
        """Return the group as nested tuples that JSON can hold; see `result_from_tuple`."""
        parent = self.parent and self.parent.as_tuple()
        return (self.id, parent), [result.as_tuple() for result in self.results]

    def save(self, backend: Any = None) -> None:
        """Keep the group in the store, for `GroupResult.restore(id)`."""
        row = (self.SAVED.format(self.id), "SAVED", _json_encode({"result": self.as_tuple()}))
        store, seconds = backend or self.backend, self.app.conf.seconds("result_expires")
        store.put_results([(*row, seconds)])

    def delete(self, backend: Any = None) -> None:
        """Remove a saved group from the store; its tasks' results stay."""
        (backend or self.backend).forget([self.SAVED.format(self.id)])

    @classmethod
    def restore(cls, id: str, backend: Any = None, app: Any = None) -> GroupResult | None:
        """Return the group that was saved under an id, or None."""
        app, key = app_or_default(app), cls.SAVED.format(id)
        found = (backend or app.backend).get_results([key]).get(key)
        return found and result_from_tuple(json.loads(found[1])["result"], app)

    def __bool__(self) -> bool:
        return bool(self.id or self.results)

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, GroupResult):
            mine = self.id, self.results, self.parent
            return mine == (other.id, other.results, other.parent)
        return other == self.id if isinstance(other, str) else NotImplemented

    __hash__, __str__ = AsyncResult.__hash__, AsyncResult.__str__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<GroupResult: {self.id} [{', '.join(result.id for result in self.results)}]>"

    def __reduce__(self) -> Any:
        return result_from_tuple, (self.as_tuple(),)


def result_from_tuple(found: Any, app: Any = None) -> Any:
    """Return the result that `as_tuple` has described."""
    app = app_or_default(app)
    if isinstance(found, (AsyncResult, ResultSet)):
        return found
    (id, parent), nodes = found if isinstance(found[0], (list, tuple)) else ((found[0], None), None)
    parent = result_from_tuple(parent, app) if parent else None
    if nodes is None:
        return AsyncResult(id, app=app, parent=parent)
    return GroupResult(id, [result_from_tuple(node, app) for node in nodes], parent, app=app)


def _unavailable(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} is not available in taskq {__version__}")


# ---------------------------------------------------------------------------------------------
# 8. Canvas
# ---------------------------------------------------------------------------------------------


def _item(key: str, doc: str, place: Any = lambda sig: sig) -> Any:
    """Return a property that is an item of the dict, or of another one at a place in it."""

    def write(sig: Any, value: Any) -> None:
        place(sig)[key] = value

    return property(lambda sig: place(sig).get(key), write, doc=doc)


def _argument(name: str, doc: str) -> Any:
    return _item(name, doc, lambda sig: sig["kwargs"])


def _listed(value: Any) -> list[Any]:
    """Return an option that may be nothing, one thing or a list of them, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _signature_of(value: Any, app: Any = None, clone: bool = False) -> Any:
    """Return the signature that a value is, or that a dict describes; TypeError if it is none."""
    if isinstance(value, dict) and isinstance(value.get("task"), str):
        return maybe_signature(value, app, clone)
    raise TypeError(f"{_repr(value, 60)} is no signature: expected one such as add.s(2, 2)")


#: Where a call stands: what says which chord's part, or which group's member, it is.
_PLACE = ("group_id", "group_index", "chord")


class Signature(dict):
    """A call of a task that is not sent yet: `add.s(2, 2)`. A dict, so that JSON can hold it.

    Arguments may be partial: those of the call come before its own. `immutable` ones take no more.
    """

    #: The classes of composed signatures by `subtask_type`.
    TYPES: dict[str, Any] = {}
    _app: Any = None
    _type: Any = None

    task = _item("task", "The task's name.")
    name = task
    args = _item("args", "Positional arguments.")
    kwargs = _item("kwargs", "Keyword arguments.")
    options = _item("options", "What `apply_async` is given.")
    subtask_type = _item("subtask_type", "'chain', 'group', ...; None for a plain task.")
    immutable = _item("immutable", "Whether it takes no more arguments.")
    id = _item("task_id", "The task's id, once it is known.", lambda sig: sig["options"])

    def __init__(
        self,
        task: Any = None,
        args: Any = None,
        kwargs: Any = None,
        options: Any = None,
        type: Any = None,
        subtask_type: str | None = None,
        immutable: bool = False,
        app: Any = None,
        **more: Any,
    ) -> None:
        self._app = app
        if isinstance(task, Task):
            self._type, task = task, task.name
        super().__init__(
            task=task,
            args=tuple(args or ()),
            kwargs=kwargs or {},
            options={**(options or {}), **more},
            subtask_type=subtask_type,
            immutable=immutable,
        )
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

    @property
    def type(self) -> Any:
        """The task itself; NotRegistered if this app does not have it."""
        return self._type or self.app.tasks[self["task"]]

    # -- making others of it ---------------------------------------------------------------------

    def _merge(self, args: Any, kwargs: Any, options: Any = None) -> tuple[Any, Any, Any]:
        """Return (args, kwargs, options) with others added; its group is never another."""
        merged = {**self.options, **(options or {})}
        if "group_id" in self.options:
            merged["group_id"] = self.options["group_id"]
        if self.immutable:
            return self.args, self.kwargs, merged
        return (*(args or ()), *self.args), {**self.kwargs, **(kwargs or {})}, merged

    def clone(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Return a copy with these arguments and options added."""
        args, kwargs, merged = self._merge(args, kwargs, options)
        for name in ("link", "link_error"):
            if name in merged:
                merged[name] = _listed(merged[name])
        new = {**self, "args": args, "kwargs": dict(kwargs), "options": merged}
        try:
            sig = type(self).from_dict(new, self._app)
        except RecursionError:
            raise ValueError(f"{_repr(self, 200)} contains itself") from None
        sig._type = self._type
        return sig

    partial = clone

    def set(self, immutable: bool | None = None, **options: Any) -> Any:
        """Set options, and return the signature: `add.s(2).set(countdown=10)`."""
        if immutable is not None:
            self.set_immutable(immutable)
        self.options.update(options)
        return self

    def set_immutable(self, immutable: bool) -> None:
        """Say whether the signature takes no more arguments."""
        self.immutable = immutable

    def _add_link(self, option: str, sig: Any) -> Any:
        linked = self.options[option] = _listed(self.options.get(option))
        if _signature_of(sig) not in linked:
            linked.append(sig)
        return sig

    def link(self, sig: Any) -> Any:
        """Call `sig` with the result when the task has succeeded; return `sig`."""
        return self._add_link("link", sig)

    def link_error(self, sig: Any) -> Any:
        """Call `sig` when the task has failed; return `sig`."""
        return self._add_link("link_error", sig)

    def on_error(self, sig: Any) -> Any:
        """Call `sig` when the task has failed; return the signature itself."""
        self.link_error(sig)
        return self

    def flatten_links(self) -> list[Any]:
        """Return the signature and all that are linked to it, and to those."""
        links = map(_signature_of, _listed(self.options.get("link")))
        return [self, *(found for link in links for found in link.flatten_links())]

    def __or__(self, other: Any) -> Any:
        if not isinstance(other, Signature):
            return NotImplemented
        return chain(self, other, app=self._app)

    def __ior__(self, other: Any) -> Any:  # a dict's own would change it
        return self | other

    def __bool__(self) -> bool:
        return True

    def _steps(self) -> list[Any]:
        """Return copies of what a chain of it goes through."""
        return [self.clone()]

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

    def freeze(self, _id: str | None = None, **options: Any) -> Any:
        """Give it the id that it will have, so that its result can be named before it is sent.

        options: group_id, group_index, chord, root_id, parent_id.
        """
        for name, value in (("task_id", _id or uuid()), *options.items()):
            if value is not None:
                self.options.setdefault(name, value)
        result = AsyncResult(self.options["task_id"], app=self.app)
        task = self._type or dict.get(self.app.tasks, self.task)
        ignored = self.options.get("ignore_result", task is not None and task.ignore_result)
        result.ignored = bool(ignored) and "chord" not in self.options
        return result

    def _inner(self) -> Any:
        """Return the signatures that it is made of, in their order; None if it is one task."""

    def _all(self) -> list[Any]:
        """Return every single task in it, in their order."""
        inner = self._inner()
        return [self] if inner is None else [task for sig in inner for task in sig._all()]

    def _leaves(self) -> list[Any]:
        """Return the single tasks whose ends are its end, such as a chain's last."""
        inner = self._inner()
        if inner is None:
            return [self]
        ends = inner if isinstance(self, group) else inner[-1:]
        return [task for sig in ends for task in sig._leaves()]

    def __invert__(self) -> Any:
        return self.apply_async().get()

    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone()

    def __reduce__(self) -> Any:
        return signature, (dict(self),)

    def reprcall(self, *args: Any, **kwargs: Any) -> str:
        """Return the call as text: 'proj.tasks.add(2, 2)'."""
        shown = [_repr(arg) for arg in (*args, *self.args)]
        shown += [f"{key}={_repr(value)}" for key, value in {**self.kwargs, **kwargs}.items()]
        return f"{self['task']}({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.reprcall()


def _joined(tasks: Iterable[Any]) -> list[Any]:
    """Return the steps of a chain of these: a group that is followed by another step becomes a
    chord, a chord takes it as the continuation of its body. So only the last is ever composed."""
    steps = [step for task in tasks for step in task._steps()]
    for index, step in enumerate(steps[:-1]):
        if isinstance(step, (group, chord)):
            rest = chain(*steps[index + 1 :], app=step._app)
            rest = rest if not isinstance(rest, chain) or len(rest.tasks) > 1 else rest.tasks[0]
            if isinstance(step, group):
                step = chord(step, body=rest, app=step._app)
            else:
                step.body = step.body | rest
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


def _part_of(value: Any, app: Any) -> Any:
    """Return a copy of a signature that is to be a part of another; chunks are their group."""
    sig = _signature_of(value, app, True)
    return sig.group() if isinstance(sig, chunks) else sig


def _single(sig: Any) -> Any:
    """Return a signature that ends with one task, whose result is a list where it was a group's."""
    end = sig
    while end._inner() and not isinstance(end, group):
        end = end._inner()[-1]
    if isinstance(end, group):
        return sig | Signature("celery.accumulate", kwargs={"index": 0}, app=sig._app)
    return sig


class _Composed(Signature):
    """A signature of several tasks: a chain or a group."""

    tasks = _argument("tasks", "The signatures that it is made of.")

    def __init__(self, *tasks: Any, **options: Any) -> None:
        """Do nothing: `__new__` has made it."""

    @classmethod
    def _of(cls, tasks: Iterable[Any], options: Any, app: Any) -> Any:
        name = cls.__name__
        data = {"task": f"celery.{name}", "kwargs": {"tasks": list(tasks)}, "subtask_type": name}
        return cls.from_dict({**data, "options": options}, app)

    def _revive(self) -> None:
        tasks = [_part_of(task, self._app) for task in self.tasks]
        self.kwargs = {**self.kwargs, "tasks": tasks}

    def _inner(self) -> list[Any]:
        return self.tasks


def _place(sig: Any, options: Any) -> None:
    """Move the options that say which chord, or else which group, a signature belongs to down to
    its last tasks."""
    place = {name: options.pop(name, None) for name in _PLACE}
    for leaf in sig._leaves() if place["chord"] or place["group_id"] else ():
        if place["chord"]:
            leaf.options.update(place)
        else:
            for name in ("group_id", "group_index"):
                leaf.options.setdefault(name, place[name])


@Signature.register_type()
class chain(_Composed):  # noqa: N801
    """Tasks one after the other, each called with the result of the one before.

        chain(add.s(2, 2), mul.s(8))()    # or (add.s(2, 2) | mul.s(8))()

    A group followed by a task becomes a chord.
    """

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        steps = _joined(_part_of(task, app) for task in _given(tasks))
        if len(steps) == 1 and isinstance(steps[0], (group, chord)):
            return steps[0].set(**options)
        return cls._of(steps, options, app)

    def _revive(self) -> None:
        super()._revive()
        for name, tasks in (("link", self.tasks[-1:]), ("link_error", self.tasks)):
            for sig, task in itertools.product(_listed(self.options.pop(name, None)), tasks):
                getattr(task, name)(sig)

    def unchain_tasks(self) -> list[Any]:
        """Return copies of the steps: the last with the chain's links, all with its errbacks."""
        return _joined(self.clone().tasks)

    _steps = unchain_tasks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply_async(args, kwargs)

    def freeze(self, _id: str | None = None, root_id: str | None = None, **place: Any) -> Any:
        """Give every step its id; return the result of the last, whose parents are the others'."""
        self._revive()
        self.tasks = _joined(self.tasks)
        result: Any = None
        for step in self.tasks:
            found = step.freeze(_id if step is self.tasks[-1] else None, root_id=root_id)
            _lineage(found)[-1].parent, result = result, found
        _place(self, place)
        return result

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the first step, with the others in its message; return the result of the last."""
        if self.app.conf.task_always_eager:
            return self.apply(args, kwargs, **options)
        sig = self.clone(**options)
        options, sig.options = sig.options, {}
        rest = options.pop("chain", None) or ()
        result = sig.freeze(options.pop("task_id", None), root_id=options.get("root_id"))
        if result is None:  # it is empty
            return None
        _place(sig, options)
        first, *others = sig.tasks
        if others or rest:
            options["chain"] = [*rest, *reversed(others)]
        first.apply_async(() if self.immutable else args, kwargs, **options)
        return result

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run one step after the other here; return the last result, or the first that failed."""
        sig = self.clone(**options)
        result: Any = None
        with allow_join_result():
            for step in _joined(sig.tasks):
                given = args if result is None else (result.get(),)
                found = step.apply(given, kwargs, **sig.options)
                found.parent, result, kwargs = result, found, None
                if isinstance(result, AsyncResult) and not result.successful():
                    break
        return result

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        if not self.tasks:
            return f"<chain@{id(self):#x}: empty>"
        return _of_task(self.tasks, " | ".join(map(repr, self.tasks)))


@Signature.register_type()
class group(_Composed):  # noqa: N801
    """Tasks side by side: `group(add.s(i, i) for i in range(10))()` returns a GroupResult."""

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        if len(tasks) == 1 and isinstance(tasks[0], group):
            tasks = tasks[0].tasks
        return cls._of(_given(tasks), options, app)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.apply_async(args, **options)

    def __or__(self, other: Any) -> Any:
        if isinstance(other, Signature) and (not isinstance(other, group) or other.tasks):
            return chord(self, body=other, app=self._app)
        return super().__or__(other)

    def _steps(self) -> list[Any]:
        return _joined(self.tasks) if len(self.tasks) < 2 else [self.clone()]

    def _members(self) -> list[Any]:
        """Return the tasks, with those of inner groups in their places and no empty chain."""
        found = []
        for task in self.tasks:
            if isinstance(task, group):
                found += task._members()
            elif not isinstance(task, chain) or task.tasks:
                found.append(task)
        return found

    def set_immutable(self, immutable: bool) -> None:
        """Say whether the tasks take no more arguments."""
        for task in self.tasks:
            task.set_immutable(immutable)

    def link(self, sig: Any) -> Any:
        """Call `sig`, without arguments of its own, when the first task has succeeded."""
        return self.tasks[0].link(_signature_of(sig, clone=True).set(immutable=True))

    def link_error(self, sig: Any) -> Any:
        """Call `sig` when one of the tasks has failed."""
        return tuple(task.link_error(_signature_of(sig, clone=True)) for task in self.tasks)

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> Any:
        """Have the tasks wait, each `step` seconds longer than the one before."""
        for index, task in enumerate(self.tasks):
            wait = start + index * step
            task.set(countdown=wait if stop is None else min(wait, stop))
        return self

    def freeze(self, _id: str | None = None, root_id: str | None = None, **_: Any) -> Any:
        """Give every task its id; return the GroupResult."""
        gid = self.options.setdefault("task_id", _id or uuid())
        results = [
            task.freeze(root_id=root_id, group_id=gid, group_index=index)
            for index, task in enumerate(self._members())
        ]
        return GroupResult(gid, results, app=self.app)

    def apply_async(
        self, args: Any = None, kwargs: Any = None, add_to_parent: bool = True, **options: Any
    ) -> Any:
        """Send all tasks in one batch, with these options for each; return the GroupResult."""
        for name, hint in (("link", "use a chord"), ("link_error", "do that on individual tasks")):
            if options.pop(name, None) is not None:
                raise TypeError(f"Cannot add link to group: {hint}")
        if self.app.conf.task_always_eager:
            return self.apply(args, kwargs, **options)
        sig = self.clone()
        own = {**sig.options, **options}
        own.pop("chain", None)  # a group ends its chain
        result = sig.freeze(own.pop("task_id", None), root_id=own.get("root_id"))
        _place(sig, own)
        with sig.app._batch():
            for task in sig._members():
                task.apply_async(args, kwargs, add_to_parent=False, **own)
        if len(result) == 1 and isinstance(result[0], GroupResult):
            result = result[0]
        return _add_trail(result) if add_to_parent else result

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run every task here; return a GroupResult."""
        results = [task.apply(args, kwargs, **options) for task in self._members()]
        return GroupResult(self.id or uuid(), results, app=self.app)

    def __len__(self) -> int:
        return len(self.tasks)

    def __repr__(self) -> str:
        return _of_task(self.tasks, f"group({self.tasks!r})") if self.tasks else "group(<empty>)"


def _add_trail(result: Any) -> Any:
    """Note a result among the children of the task that runs here; return it."""
    running, request = _running()
    if running is not None and running.trail:
        request.children.append(result)
    return result


@Signature.register_type()
class chord(Signature):  # noqa: N801
    """A task that is called with the results of others: `chord(header)(body)`.

    header: tasks side by side; body: the signature that gets the list of their results.
    """

    tasks = _argument("header", "The header, a group.")
    body = _argument("body", "The signature that gets the results.")

    def __init__(
        self, header: Any, body: Any = None, *, kwargs: Any = None, **options: Any
    ) -> None:
        parts = {"kwargs": kwargs or {}, "header": header, "body": body}
        super().__init__("celery.chord", kwargs=parts, subtask_type="chord", **options)
        self._revive()

    def _revive(self) -> None:
        parts = {"kwargs": {}, "header": (), "body": None, **self.kwargs}
        header = maybe_signature(parts["header"], self._app)
        if isinstance(header, group):
            header = header.clone()
        else:
            header = group(header.tasks if isinstance(header, chain) else header, app=self._app)
        header.tasks = [_single(task) for task in header._members()]
        body = None if parts["body"] is None else _part_of(parts["body"], self._app)
        self.kwargs = {**parts, "header": header, "body": body}

    def __call__(self, body: Any = None, **options: Any) -> Any:
        return self.apply_async((), {"body": body} if body is not None else {}, **options)

    def set_immutable(self, immutable: bool) -> None:
        """Say whether the tasks of the header take no more arguments."""
        self.tasks.set_immutable(immutable)

    def link(self, sig: Any) -> Any:
        """Call `sig` with the body's result."""
        self.body.link(sig)
        return sig

    def link_error(self, sig: Any) -> Any:
        """Call `sig` when the body cannot be called or has failed; and, with the setting
        `task_allow_error_cb_on_chord_header`, when a task of the header has."""
        everywhere = self.app.conf.task_allow_error_cb_on_chord_header
        for task in self.tasks._members():
            if everywhere:
                task.link_error(_signature_of(sig, self._app, True))
            elif isinstance(task, chord):
                task.link_error(sig)
        self.body.link_error(sig)
        return sig

    def freeze(self, _id: str | None = None, root_id: str | None = None, **place: Any) -> Any:
        """Give every task its id; return the body's result, whose eldest parent is the header's."""
        result = self.body.freeze(_id, root_id=root_id)
        _place(self, place)
        header = _lineage(result)[-1].parent = self.tasks.freeze(root_id=root_id)
        for part in header._flat():
            part.ignored = False  # the body needs it
        self.options["task_id"] = header.id  # there Celery looks for the group's id
        return result

    def _called(self, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Return a copy with the body that a call names, and the header's arguments."""
        sig, kwargs = self.clone(), {**self.kwargs["kwargs"], **(kwargs or {})}
        body = kwargs.pop("body", None)
        if body is not None:
            sig.body = _part_of(body, self.app)
        if sig.body is None:
            raise ImproperlyConfigured(f"{self!r}: call it with a body, chord(header)(body)")
        return sig, (*(args or ()), *self.args), kwargs

    def apply_async(
        self, args: Any = None, kwargs: Any = None, add_to_parent: bool = True, **options: Any
    ) -> Any:
        """Send the header; return the result of the body. `countdown` and `eta` are the header's,
        `link`, `link_error` and `chain` the body's, other options go to both."""
        app = self.app
        if app.conf.task_always_eager:
            return self.apply(args, kwargs, **{**self.options, **options})
        (sig, args, kwargs), own = self._called(args, kwargs), {**self.options, **options}
        if not app.keeps_results:
            raise ImproperlyConfigured(
                "a chord needs the results of its tasks, and this app has backend='disabled://': "
                "leave the backend out, or name a place for results"
            )
        for callback in _listed(own.pop("link", None)):
            sig.body.link(callback)
        for errback in _listed(own.pop("link_error", None)):
            sig.body.link_error(errback)
        for step in reversed(own.pop("chain", None) or ()):
            sig.body = sig.body | _signature_of(step, app, True)
        task_id, place = own.pop("task_id", None), {name: own.pop(name, None) for name in _PLACE}
        only_header = ("countdown", "eta", "parent_id", "root_id")
        sig.body.options.update({k: v for k, v in own.items() if k not in only_header})
        result = sig.freeze(task_id, root_id=own.get("root_id"), **place)
        header, leaves = sig.tasks, sig.tasks._leaves()
        with app._batch() as batch:
            if leaves:
                delivery = app._unlock_delivery(header.id, sig.body, [leaf.id for leaf in leaves])
                batch.chords.append((header.id, len(leaves), delivery))
            else:
                sig.body.apply_async(([],), add_to_parent=False)
            for index, task in enumerate(header.tasks):
                # Not before: each part of a chord to come would hold all that follows it.
                _place(task, {"group_id": header.id, "group_index": index, "chord": sig.body})
                task.apply_async(args, kwargs, add_to_parent=False, **own)
        return _add_trail(result) if add_to_parent else result

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run the header and then the body here; return the body's result."""
        sig, args, kwargs = self._called(args, kwargs)
        parts = sig.tasks.apply(args, kwargs)
        with allow_join_result():
            for part in parts._flat():
                if part.state in PROPAGATE_STATES:
                    exc = ChordError(f"Dependency {part.id} raised {part.result!r}")
                    return EagerResult(sig.body.id or uuid(), exc, FAILURE, app=self.app)
            return sig.body.apply((parts.get(),), **options)

    def _inner(self) -> list[Any]:
        return [self.tasks] if self.body is None else [self.tasks, self.body]

    def __len__(self) -> int:
        return len(self.tasks._leaves())

    def __repr__(self) -> str:
        if self.body is None:
            return f"<chord without body: {self.tasks.tasks!r}>"
        steps = self.body.tasks if isinstance(self.body, chain) else [self.body]
        text = steps[0].reprcall(self.tasks.tasks)
        if len(steps) > 1:
            text = f"({text} | {chain(*steps[1:])!r})"
        return "%" + _of_task(steps, text)


@Signature.register_type()
class xmap(Signature):  # noqa: N801
    """A task called with each item of a list, in one message: `tsum.map([[1, 2], [3]])`."""

    _star = ""

    def __init__(self, task: Any, it: Any, **options: Any) -> None:
        if not hasattr(it, "__iter__"):
            raise TypeError(f"it={_repr(it, 60)}: expected a list of items")
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

    def __call__(self, **options: Any) -> Any:
        return self.apply_async(**options)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send all chunks; return the GroupResult."""
        return self.group().apply_async(args, kwargs, **{**self.options, **options})

    def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Run all chunks here; return a GroupResult."""
        return self.group().apply(args, kwargs, **options)

    __repr__ = Signature.__repr__


def signature(varies: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a signature of a task, its name, or a dict: `signature('tasks.add', args=(2, 2))`."""
    if isinstance(varies, (str, Task)):
        return Signature(varies, *args, **kwargs)
    return _signature_of(varies, kwargs.get("app"), True)


subtask = signature


def maybe_signature(data: Any, app: Any = None, clone: bool = False) -> Any:
    """Return a signature for a dict that is one, anything else as it is; with `clone` a copy."""
    if not isinstance(data, dict):
        return data
    if not isinstance(data, Signature):
        data = Signature.from_dict(data, app)
    elif clone:
        data = data.clone()
    if data._app is None:
        data._app = app
    return data


# ---------------------------------------------------------------------------------------------
# 9. Task and app
# ---------------------------------------------------------------------------------------------


class Exchange(collections.namedtuple("Exchange", "name type")):
    """Where messages are sent that find their queues by routing key: 'direct' (it must be equal),
    'topic' (in a queue's key `*` is one word, `#` any number) or 'fanout' (every bound queue)."""

    def __new__(cls, name: str = "", type: str = "direct", **_: Any) -> Any:
        if type not in ("direct", "topic", "fanout"):
            expected = "expected 'direct', 'topic' or 'fanout'"
            raise ImproperlyConfigured(f"exchange {name!r} has type {type!r}: {expected}")
        return super().__new__(cls, name, type)


class Queue(collections.namedtuple("Queue", "name exchange routing_key")):
    """A queue: `Queue('images', Exchange('media', type='topic'), routing_key='media.image.#')`."""

    def __new__(
        cls, name: str = "", exchange: Any = None, routing_key: str = "", **options: Any
    ) -> Any:
        if isinstance(exchange, str):
            exchange = Exchange(exchange, options.get("exchange_type") or "direct")
        return super().__new__(cls, name, exchange, routing_key)


class Router:
    """Says which queues a task goes to, by `task_queues`, `task_routes` and what the call asks."""

    def __init__(self, app: TaskQ) -> None:
        self.app, conf = app, app.conf
        self.routes = _routes(conf.task_routes)
        name, listed = conf.task_default_queue, conf.task_queues
        exchange = Exchange(conf.task_default_exchange or name, conf.task_default_exchange_type)
        self.default = Queue(name, exchange, conf.task_default_routing_key or name)
        self.queues: dict[str, Queue] = {}
        self._bound = False
        if isinstance(listed, collections.abc.Mapping):
            listed = [Queue(n, **{"exchange": n, "routing_key": n, **o}) for n, o in listed.items()]
        for queue in [self.default] if listed is None else listed:
            self.add(queue)

    def add(self, queue: Any) -> None:
        """Add a queue, with the default exchange and key where it names none."""
        if isinstance(queue, str):
            queue = Queue(queue, Exchange(queue), queue)
        elif not isinstance(queue, Queue):
            expected = "expected names or Queue objects"
            raise ImproperlyConfigured(f"task_queues holds {_repr(queue, 60)}: {expected}")
        name, exchange, key = queue
        name.encode()  # what the store could not keep is an error here
        exchange = exchange if exchange and exchange.name else self.default.exchange
        self.queues[name] = Queue(name, exchange, key or self.default.routing_key)

    def queue(self, queue: Any) -> Queue:
        """Return the queue of a name; makes it where `task_create_missing_queues` allows."""
        name: Any = getattr(queue, "name", queue)
        if name not in self.queues:
            if name == self.default.name:
                return self.default
            if isinstance(queue, str) and not self.app.conf.task_create_missing_queues:
                raise QueueNotFound(f"Queue {name!r} missing from task_queues")
            self.add(queue)
        return self.queues[name]

    def options(self, name: str, args: Any, kwargs: Any, options: Any, task: Any) -> dict[str, Any]:
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
        key = options.get("routing_key") or ""
        if isinstance(exchange, Exchange):
            exchange = exchange.name
        if asked or not exchange:
            queue = self.queue(asked) if asked else self.default
            if queue.exchange.type == "direct" and not (exchange and key):
                return [queue.name], "", queue.name
            exchange, key = exchange or queue.exchange.name, key or queue.routing_key
        if not self._bound:
            self.bind(self.queues.values())
            self._bound = True
        found = self.app.store.bound(exchange, key)
        if not found:
            where = f"exchange {exchange!r} with routing key {key!r}"
            raise QueueNotFound(f"no queue is bound to {where}: list it in task_queues")
        return found, exchange, key

    def bind(self, queues: Iterable[Queue]) -> None:
        """Make the bindings of these queues known to the store."""
        for queue in queues:
            exchange = queue.exchange
            self.app.store.bind(exchange.name, exchange.type, queue.routing_key, queue.name)


def _routes(routes: Any) -> list[Callable[..., Any]]:
    """Return `task_routes` as functions (name, args, kwargs, options, task=) -> options or None."""
    entries = routes if isinstance(routes, (list, tuple)) else [routes] if routes else []
    pairs = [isinstance(e, (list, tuple)) and isinstance(e[0], (str, re.Pattern)) for e in entries]
    return [_route(entry) for entry in ([entries] if pairs and all(pairs) else entries)]


def _route(entry: Any) -> Callable[..., Any]:
    if callable(entry) or isinstance(entry, str):
        return _symbol(entry) if isinstance(entry, str) else entry
    table, translate = dict(entry), _symbol("fnmatch:translate")
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


class Batch:
    """What is sent together, all or none; with a task's end also others' results, chords' parts."""

    def __init__(self) -> None:
        self.calls: list[Prepared] = []
        self.chords: list[Any] = []
        self.results: list[Any] = []
        self.parts: list[Any] = []
        self.app: Any = None


_unset: Any = None


class Context:
    """A task's request: what is known of this call of it (`self.request` in a bound task)."""

    id = task = args = kwargs = argsrepr = kwargsrepr = shadow = lang = origin = hostname = _unset
    root_id = parent_id = group = group_index = chain = chord = callbacks = errbacks = _unset
    eta = expires = timelimit = max_retries = delivery_info = correlation_id = reply_to = _unset
    headers = properties = stamps = stamped_headers = taskset = logfile = loglevel = _unset
    retries = replaced_task_nesting = 0
    called_directly = utc = True
    ignore_result = is_eager = replaced = _protected = False

    def __init__(self, fields: Any = (), **more: Any) -> None:
        fields = {**dict(fields), **more}
        self.__dict__.update({name: v for name, v in fields.items() if v is not None})
        self.follow_ups = Batch()  # what is settled together with the task's own end
        self.children: list[Any] = []  # the results of the tasks that this one has called

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set attributes."""
        self.__dict__.update(*args, **kwargs)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default`."""
        return getattr(self, key, default)

    def __repr__(self) -> str:
        return f"<Context: {vars(self)!r}>"


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
#: What `@app.task` has made, by name: other apps make it theirs when they look it up.
_by_name: dict[str, Callable[[Any], Any]] = {}


def _find_current_app() -> TaskQ:
    if not _current:
        TaskQ("default").home = None  # it has become the current one
    return _current[-1]


current_app: Any = Proxy(_find_current_app)
current_task: Any = Proxy(lambda: _thread.stack[-1][0] if _thread.stack else None)


def app_or_default(app: TaskQ | None = None) -> TaskQ:
    """Return `app`, or the current one."""
    return app if app is not None else current_app._get_current_object()


#: Attributes of a task whose defaults are settings: `time_limit` is `task_time_limit`.
_FROM_SETTINGS = {"priority": "task_default_priority"}
for _name in (
    "acks_late acks_on_failure acks_on_failure_or_timeout acks_on_timeout ignore_result "
    "reject_on_worker_lost serializer soft_time_limit store_eager_result "
    "store_errors_even_if_ignored time_limit track_started"
).split():
    _FROM_SETTINGS[_name] = f"task_{_name}"


class Task:
    """A task: what `@app.task` makes of a function, or the base of a class with a `run` method.

    Attributes set in a class or by the decorator's options override the settings they are named
    after. Handlers that a subclass may define: before_start(task_id, args, kwargs),
    on_success(retval, task_id, args, kwargs); on_failure and on_retry(exc, task_id, args, kwargs,
    einfo); after_return(status, retval, task_id, args, kwargs, einfo).
    """

    MaxRetriesExceededError = MaxRetriesExceededError
    OperationalError = OperationalError

    app: Any = current_app
    name: str = None  # type: ignore[assignment]
    #: Whether calls are checked against the function's signature; None: as the app's strict_typing.
    typing: Any = None
    #: How often `retry` may run it again; None is without end.
    max_retries: int | None = 3
    #: Seconds until a retry that names no time.
    default_retry_delay: float = 180
    trail = send_events = retry_jitter = True
    #: Exceptions that are expected: logged at INFO, without a traceback.
    throws: tuple[Any, ...] = ()
    #: Seconds, or a datetime, after which a call that has not begun is REVOKED.
    expires: Any = None
    resultrepr_maxsize = 1024
    queue = exchange = routing_key = rate_limit = None
    autoretry_for: Any = ()
    dont_autoretry_for: Any = ()
    retry_kwargs: dict[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
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
        link, link_error: signatures to call when it has succeeded, or failed.
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
        options["shadow"] = options.get("shadow") or self.shadow_name(args, kwargs, options)
        if not app.conf.task_always_eager:
            return app._send(self.name, args, kwargs, options, self)
        serializer = options.get("serializer", self.serializer) or app.conf.task_serializer
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
        """Run the task here and now, as a worker would; return its EagerResult. Options as of
        `apply_async`; throw: raise its error, which is `task_eager_propagates` by default."""
        _check_call_options(options)
        app, options = self.app, {**self._call_defaults(), **options}
        get, throw = options.get, options.get("throw")
        throw = app.conf.task_eager_propagates if throw is None else throw
        args, kwargs = list(args or ()), dict(kwargs or {})
        fields = app._headers(self.name, args, kwargs, options, None)
        for field in ("callbacks", "errbacks"):
            fields[field] = [_signature_of(link) for link in _listed(get(_EMBEDDED[field]))]
        fields.update(args=args, kwargs=kwargs, headers=get("headers"), hostname=_hostname())
        info = {name: get(name) for name in ("exchange", "routing_key", "priority")}
        info["is_eager"] = True
        request = Context(fields, called_directly=False, is_eager=True, delivery_info=info)
        run = run_task(self, request, bool(throw))
        if run.state == RETRY and run.value.sig is not None:
            return run.value.sig.apply(throw=throw)
        if request.follow_ups.results:
            app.backend.put_results(request.follow_ups.results)
        value = run.value.exc if run.state == RETRY else run.value
        return EagerResult(request.id, value, run.state, run.traceback, self.name, app)

    # -- steering it -----------------------------------------------------------------------------

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, **more: Any) -> Retry:
        """Run this call of the task again later: `raise self.retry(exc=exc, countdown=10)`.

        Takes `eta`, `countdown` (by default `default_retry_delay`), `max_retries`, and the other
        options of `apply_async`. Raises Retry, which tells the worker so (`throw=False` returns
        it); `exc`, or MaxRetriesExceededError, when the retries are used up. The new message is
        sent in the transaction that ends this run. Outside a worker raises `exc`, or Retry.
        """
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
        again = Retry(None, exc, when if eta is None else eta, request.is_eager, sig)
        if not request.is_eager:
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
        args, kwargs = _merged_arguments(self.run, request, args, kwargs)
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
        """Run another signature in this task's place: `return self.replace(add.s(2, 2))`.

        It takes over the task's id, callbacks, chord and the rest of its chain, and is sent with
        the end of this run; raises Ignore. In eager mode returns its result.
        """
        request = self.request
        if "chord" in sig.options:
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
        place = {"group_id": request.group, "group_index": request.group_index}
        _place(sig, {**place, "chord": request.chord})
        return self.on_replace(sig)

    def on_replace(self, sig: Any) -> Any:
        """Send what replaces the task; may be overridden, with a call of this method."""
        if self.request.is_eager:
            return sig.apply().get(disable_sync_subtasks=False)
        with self.app._batch(self.request.follow_ups):
            sig.delay()
        self.request.update(replaced=True)
        raise Ignore("Replaced by new task")

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Add a signature to the chord that this task is a part of, send it and return its result;
        with `lazy` return the signature, to be sent by its `delay`."""
        request = self.request
        if not request.chord:
            raise ValueError("Current task is not member of any chord")
        place = {"group_id": request.group, "group_index": request.group_index}
        sig = _single(sig)
        sig.freeze(root_id=request.root_id)
        _place(sig, {**place, "chord": request.chord})
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

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802
        """Return the result of a call of this task by its id."""
        return self.app.AsyncResult(task_id, task_name=self.name, **kwargs)

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
_SHARED_OPTIONS = (
    "queue exchange routing_key priority expires serializer ignore_result time_limit "
    "soft_time_limit"
).split()
#: Options of a call that it keeps when it is sent again, by the names of its request.
_CARRIED_OPTIONS = (
    "root_id parent_id shadow expires headers reply_to origin ignore_result stamped_headers stamps "
    "replaced_task_nesting group_index"
).split()
#: What `apply_async` takes besides args and kwargs. From `producer` on these are options of kombu's
#: publish that change nothing here.
_CALL_OPTIONS = {*_SHARED_OPTIONS, *_CARRIED_OPTIONS, *_EMBEDDED.values()}.union(
    "task_id countdown eta retry retry_policy retries argsrepr kwargsrepr add_to_parent group_id "
    "throw producer publisher connection router route_name result_cls delivery_mode mandatory "
    "immediate declare task_type".split()
)
#: Options of Celery's calls and tasks that this version does not have yet.
_LATER_OPTIONS = {"compression", "rate_limit", "pydantic", "retry_on_worker_lost"}


def _check_call_options(options: dict[str, Any]) -> None:
    for name in options.keys() - _CALL_OPTIONS:
        if options[name] is not None:
            if name in _LATER_OPTIONS:
                raise _unavailable(f"apply_async({name}=...)")
            hint = _hint(name, _CALL_OPTIONS, 0.6)
            raise TypeError(f"apply_async() has no option {name!r}{hint}")


def _check_task_options(options: dict[str, Any], base: Any) -> None:
    for name, value in options.items():
        if name in _LATER_OPTIONS and value:
            raise _unavailable(f"the task option {name!r}")
        if name not in _FROM_SETTINGS and not hasattr(base, name):
            hint = _hint(name, [*_FROM_SETTINGS, *dir(base)], 0.8)
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


def _main_module() -> str | None:
    """Return the name under which a worker imports the script that runs as `__main__`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name[:-9] if spec.name.endswith(".__main__") else spec.name
    path = getattr(sys.modules.get("__mp_main__", main), "__file__", None)
    if path is None or not path.endswith(".py"):
        return None
    return _package_root(os.path.abspath(path))[1]


def _home(frame: Any) -> str:
    """Return the directory of the script or top-level package whose code runs in `frame`."""
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    path, module, spec = map(frame.f_globals.get, ("__file__", "__name__", "__spec__"))
    if not path:  # a notebook or a REPL
        return os.getcwd()
    if module in ("__main__", "__mp_main__"):
        module = spec.name if spec is not None else _main_module()
    folder, name = os.path.split(os.path.abspath(path))
    depth = (module or "").count(".") + (name == "__init__.py")
    return os.path.normpath(os.path.join(folder, *[os.pardir] * depth))


def _derived(make: Callable[[Any], Any]) -> Any:
    """Return a property of an app that is made of its settings: anew when one has changed."""

    def get(app: Any) -> Any:
        version, made = app._made
        if version != app.conf.version:
            made = {}
            app._made = app.conf.version, made
        if make not in made:
            made[make] = make(app)
        return made[make]

    return property(get, doc=make.__doc__)


def _with_app(make: Any) -> Any:
    """Return a method of an app that calls a function, or class, with it."""

    named = functools.wraps(make, updated=())
    return named(lambda app, *args, **kwargs: make(*args, **{"app": app, **kwargs}))


class TaskQ:
    """An app: its settings, its tasks, and its way to the store. Celery's class, by this name too.

        app = TaskQ('proj', broker='sqlite:///proj.db', include=['proj.tasks'])

    Without a broker messages and results are in taskq.db beside the package or script that makes
    the app. `backend` may name another sqlite:// file, or disabled:// for no results; 'rpc://' and
    None keep them with the messages. Other keyword arguments are settings.
    """

    #: What an app may be given that is no setting, and a subclass may change.
    OPTIONS = "task_cls set_as_current autofinalize strict_typing config_source namespace".split()
    task_cls: Any = Task
    set_as_current = autofinalize = strict_typing = True
    config_source = namespace = _unset

    def __init__(
        self, main: str | None = None, *, broker: Any = None, backend: Any = None, **options: Any
    ) -> None:
        self.main = main
        self.home: str | None = _home(sys._getframe(1))  # where the store is, if no broker says so
        self.finalized = self._finalizing = False
        self.generation = 0  # of tasks: a background worker's children are forked anew for each
        self._lock = threading.RLock()
        self._tasks = TaskRegistry(options.pop("tasks", None) or {})
        self._tasks.app = self
        self._discover: list[Callable[[], None]] = []
        self._made: tuple[int, dict[Any, Any]] = (-1, {})  # see _derived
        given = {"broker_url": broker, "result_backend": backend}
        given = {name: value for name, value in given.items() if value is not None}
        given.update(options.pop("changes", None) or {})
        for name, value in options.items():
            if name not in self.OPTIONS:
                if not _is_setting(name):
                    hint = _hint(name, ("broker", "backend", *self.OPTIONS, *SETTINGS), 0.6)
                    raise TypeError(f"TaskQ() has no option {name!r}{hint}")
                given[name] = value
            elif value is not None:
                setattr(self, name, value)
        self._conf = Settings()
        self._conf.update(given)
        self._loaded, self._silent = self.config_source is None, False
        self._sourced: set[str] = set()
        self.Task = _symbol(self.task_cls) if isinstance(self.task_cls, str) else self.task_cls
        _apps.add(self)
        if self.set_as_current:
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
                if not self._loaded:  # by another thread
                    self._load_config()
        return self._conf

    def _load_config(self) -> None:
        conf, source = self._conf, self.config_source
        # What the app was given stands above its configuration, but not what an earlier one said.
        given = {name: v for name, v in conf.changed.items() if name not in self._sourced}
        self._loaded = True  # the source may use the app
        try:
            conf.load(_symbol(source) if isinstance(source, str) else source, self.namespace)
        except BaseException as exc:
            self._loaded = self._silent and isinstance(exc, ImportError)
            if not self._loaded:
                raise
        self._sourced = conf.changed.keys() - given.keys()
        conf.update(given)

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: str | None = None
    ) -> None:
        """Take settings from an object, or the name of a module: `config_from_object('proj.conf')`.

        It is read when a setting is first needed, with `force` now. With a namespace only names
        that begin with it count. `silent` passes over a module that does not exist.
        """
        self.config_source, self._silent, self._loaded = obj, silent, False
        self.namespace = namespace or self.namespace
        if force:
            self.conf  # noqa: B018 - reading it loads the source

    def config_from_envvar(self, variable_name: str, silent: bool = False, **more: Any) -> bool:
        """Take settings from the module that an environment variable names; return whether it is
        set: ImproperlyConfigured if not, unless `silent`. More as above."""
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
            hint = "in proj/__init__.py: from .celery import app"
            raise ImproperlyConfigured(
                f"no app has been made yet: import its module first ({hint})"
            )
        url = url or "sqlite:///" + os.path.join(self.home or "", "taskq.db")
        options = {**self.conf.broker_transport_options, **(self.conf.broker_use_ssl or {})}
        return self._opened(url if isinstance(url, str) else url[0], options)

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
        for name in SETTINGS:
            option = re.match("redis_(?:backend_)?(socket_.*|health_.*)", name)
            if option and conf[name]:
                options[option[1]] = conf[name]
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
            self.finalize(auto=True)
        return self._tasks

    def finalize(self, auto: bool = False) -> None:
        """Add shared tasks and set what `task_annotations` says; happens by itself."""
        if auto and not self.autofinalize:
            raise RuntimeError("Contract breach: app not finalized")
        with self._lock:  # other threads wait until all is there
            if not self._finalizing:
                self._finalizing = True  # what it leads to may ask for tasks
                for task in list(self._tasks.values()):
                    self._annotate(task)
                for make in _shared:
                    make(self)
                self.finalized = True

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a task of a function: `@app.task` or `@app.task(bind=True, max_retries=5)`.

        bind: the function's first argument is the task itself. name: instead of the automatic
        'module.function'. base: a subclass of Task. Other options become attributes of the task.
        """
        if len(args) > 1 or args and not callable(args[0]):
            raise TypeError(f"@app.task takes one function, and options by name: {_repr(args, 60)}")
        options.pop("lazy", None)  # when a task is registered makes no difference here
        shared = options.pop("shared", True)

        def make(fun: Any) -> Any:
            task = self._task_from_fun(fun, **options)
            if shared:
                again = {**options, "name": task.name}
                _by_name[task.name] = lambda app: app._task_from_fun(fun, **again)
            return task

        return make(*args) if args else make

    def _task_from_fun(self, fun: Any, name: Any = None, base: Any = None, **options: Any) -> Any:
        bind = options.pop("bind", False)
        base = base or self.Task
        _check_task_options(options, base)
        name = name or self.gen_task_name(fun.__name__, fun.__module__)
        run, header = fun if bind else staticmethod(fun), staticmethod(_arguments_check(fun, bind))
        attributes = {k: v for k, v in options.items() if v is not None or k not in _FROM_SETTINGS}
        attributes.update(name=name, run=run, __header__=header, __module__=fun.__module__)
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
        for changes in (annotations.get("*") or {}, annotations.get(task.name) or {}):
            _check_task_options(changes, task)
            for attribute, value in changes.items():
                setattr(task, attribute, value)

    def gen_task_name(self, name: str, module: str | None) -> str:
        """Return the automatic name of a function, 'proj.tasks.add'; may be overridden."""
        if module in (None, "__main__", "__mp_main__"):
            module = _main_module() or self.main or "__main__"
        return f"{module}.{name}"

    def autodiscover_tasks(
        self, packages: Any = None, related_name: str | None = "tasks", force: bool = False
    ) -> None:
        """Have workers import the module `related_name` of each package (a list, or a function that
        returns it) that has one; with `force` it is imported now."""

        def discover() -> None:
            for package in (packages() if callable(packages) else packages) or ():
                if _import_if_there(package) is None:  # 'proj.apps.Config' may name a class
                    package = package.rpartition(".")[0] or package
                    importlib.import_module(package)
                if related_name:
                    _import_if_there(f"{package}.{related_name}")

        if force:
            discover()
        else:
            self._discover.append(discover)

    def import_default_modules(self) -> None:
        """Import what `autodiscover_tasks`, `imports` and `include` name."""
        for discover in self._discover:
            discover()
        for name in (*_listed(self.conf.imports), *_listed(self.conf.include)):
            importlib.import_module(name)
        self.finalize()

    # -- sending ---------------------------------------------------------------------------------

    def send_task(
        self, name: str, args: Any = None, kwargs: Any = None, **options: Any
    ) -> AsyncResult:
        """Send a task by name, whether or not it is registered here; options as `apply_async`'s."""
        if self.conf.task_always_eager:
            warnings.warn(AlwaysEagerIgnored("send_task ignores task_always_eager"), stacklevel=2)
        return self._send(name, args, kwargs, options, dict.get(self._tasks, name))

    def _send(self, name: str, args: Any, kwargs: Any, options: Any, task: Any) -> AsyncResult:
        prepared = self._prepare(name, args, kwargs, options, task)
        batch = _thread.batch
        if batch is not None and batch.app is self:
            batch.calls.append(prepared)
        else:
            self._publish([prepared], options.get("retry"), options.get("retry_policy"))
        headers = prepared.message.headers
        result = AsyncResult(headers["id"], app=self, task_name=name)
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
        _check_call_options(options)
        if task is not None:
            options = {**task._call_defaults(), **options}
        router = self.router
        if router.routes:
            options = router.options(name, args, kwargs, options, task)
        queues, exchange, routing_key = router.resolve(options)
        get, due = options.get, None
        if get("eta") is not None:
            due = _moment("eta", get("eta"))
        elif get("countdown") not in (None, 0):
            due = _moment("countdown", get("countdown"))
        headers = self._headers(name, args, kwargs, options, due)
        info, priority = {"exchange": exchange, "routing_key": routing_key}, self._priority(options)
        properties = {"correlation_id": headers["id"], "delivery_tag": headers["id"]}
        properties.update(delivery_mode=2, delivery_info=info, priority=priority)
        properties["reply_to"] = get("reply_to") or ""
        embed = {field: get(option) for field, option in _EMBEDDED.items()}
        for field in ("callbacks", "errbacks"):
            if embed[field]:
                embed[field] = [_signature_of(link) for link in _listed(embed[field])]
        payload = (args, kwargs, embed)
        if before_task_publish.receivers:
            named = {"headers": headers, "properties": properties, "body": payload, **info}
            named.update(declare=list(map(router.queue, queues)), retry_policy=get("retry_policy"))
            before_task_publish.send(name, **named)
        serializer = get("serializer") or self.conf.task_serializer
        message, text = _encode_call(headers, properties, payload, serializer)
        seconds = None if due is None else due.timestamp()
        return Prepared(message, payload, [Delivery(q, priority, seconds, text) for q in queues])

    def _headers(self, name: str, args: Any, kwargs: Any, options: Any, due: Any) -> Any:
        """Return the headers of a call's message, as Celery's protocol 2 has them."""
        get = options.get
        id, expires, (_, parent) = get("task_id") or uuid(), get("expires"), _running()
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
            "timelimit": [get("time_limit"), get("soft_time_limit")],
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

    def _priority(self, options: dict[str, Any]) -> int:
        """Return the priority of a call, by its options or those of the task that makes it."""
        priority = options.get("priority")
        if priority is None and self.conf.task_inherit_parent_priority:
            _, parent = _running()
            priority = parent and (parent.delivery_info or {}).get("priority")
        if priority is None:
            return 0
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
            raise ValueError(f"priority={_repr(priority, 60)}: expected 0 (highest) to 9")
        return priority

    def _publish(self, calls: Any, retry: Any = None, policy: Any = None, chords: Any = ()) -> None:
        """Send calls, all or none, trying again as `task_publish_retry` and its policy say."""
        deliveries = [delivery for call in calls for delivery in call.deliveries]
        for attempt in itertools.count():
            try:
                if chords and self.backend is not self.store:
                    self.backend.publish((), chords)
                    chords = ()
                self.store.publish(deliveries, chords)
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

    def _unlock_delivery(self, gid: str, body: Any, parts: Iterable[str] = ()) -> Delivery:
        """Return the message that has a chord's body called, for the queue of its first task."""
        first = body._all()[0]
        task = self.tasks.get(first.task)
        options = {**(task._call_defaults() if task else {}), **first.options}
        options = self.router.options(first.task, first.args, first.kwargs, options, task)
        names = ("queue", "exchange", "routing_key", "priority")
        options = {name: options[name] for name in names if options.get(name) is not None}
        unlock = self.tasks["celery.chord_unlock"]
        kwargs = {"result": [((id, None), None) for id in parts]} if self.backend.foreign else {}
        return self._prepare(unlock.name, (gid, body), kwargs, options, unlock).deliveries[0]

    AsyncResult = _with_app(AsyncResult)
    GroupResult = _with_app(GroupResult)
    ResultSet = _with_app(ResultSet)
    signature = _with_app(signature)

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
            raise ValueError(
                "The worker sub-command must be specified in argv.\n"
                "Use app.start() to programmatically start other commands."
            )
        has_program = argv[0] != "worker" and not argv[0].startswith("-")
        return self.start(argv[has_program:])

    def start(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line with this app: `app.start()` at the end of proj/celery.py."""
        return main(argv, app=self)

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
        if name in ("control", "events", "add_periodic_task", "on_after_configure"):
            raise _unavailable(f"app.{name}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.main or '__main__'} at {id(self):#x}>"


Celery = TaskQ


class _Disabled(Store):
    """The place of results where there is none."""

    def uri(self) -> str:
        return "disabled://"

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
    for app in list(_apps):
        if app.finalized:
            _shared[-1](app)

    def find() -> Any:
        app = current_app._get_current_object()
        return app.tasks[options.get("name") or app.gen_task_name(fun.__name__, fun.__module__)]

    return Proxy(find)


def _arguments_check(fun: Any, bound: bool) -> Any:
    """Return a function with the signature of `fun` that does nothing: a wrong call raises."""
    import inspect

    try:
        signature = inspect.signature(functools.partial(fun, None) if bound else fun)
    except (TypeError, ValueError):  # a builtin without one
        return lambda *args, **kwargs: None
    blank = []
    for parameter in signature.parameters.values():
        default = parameter.default if parameter.default is parameter.empty else None
        blank.append(parameter.replace(default=default, annotation=parameter.empty))
    name = fun.__name__ if getattr(fun, "__name__", "").isidentifier() else "run"
    names: dict[str, Any] = {}
    # A real call beats Signature.bind 20 times.
    exec(f"def {name}{inspect.Signature(blank)}: pass", names)
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
                factor = int(max(1.0, task.retry_backoff))
                seconds = max(0, min(task.retry_backoff_max, factor * 2**task.request.retries))
                if task.retry_jitter:
                    seconds = _symbol("random:randrange")(int(seconds) + 1)
                options["countdown"] = seconds
            if task.request.max_retries is not None:  # the function itself has called retry with it
                options["max_retries"] = task.request.max_retries
            raise task.retry(exc=exc, **options) from exc

    task.run = run_or_retry


#: The options of a call that are times: their types, and what an error says is expected.
_TIMES: dict[str, tuple[Any, str]] = {
    "countdown": ((int, float), "seconds"),
    "eta": ((datetime, str), "a datetime or ISO 8601 text; for seconds use countdown="),
    "expires": ((int, float, timedelta, datetime, str), "seconds, a datetime or ISO 8601 text"),
}


def _moment(name: str, value: Any) -> datetime:
    """Return the time in UTC that an option means; TypeError or ValueError if it is none."""
    kinds, expected = _TIMES[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise TypeError(f"{name}={_repr(value, 60)}: expected {expected}")
    try:
        if isinstance(value, (int, float)):
            value = timedelta(seconds=value)
        if isinstance(value, timedelta):
            return datetime.now(timezone.utc) + value
        return datetime.fromtimestamp(_timestamp(value), timezone.utc)
    except OverflowError:
        raise ValueError(f"{name}={value!r} is out of range") from None
    except ValueError:
        raise ValueError(f"{name}={value!r}: expected {expected}") from None


def _encode_call(headers: Any, properties: Any, payload: Any, serializer: str) -> Any:
    """Return a call's message and its text; EncodeError that names what cannot be serialized."""
    name = headers["task"]
    try:
        content_type, encoding, body = serialize(payload, serializer)
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


def _merged_arguments(run: Any, request: Context, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return a request's arguments with others in their place, all or only those of one kind."""
    import inspect

    if (args is None) == (kwargs is None):
        return (request.args, request.kwargs) if args is None else (args, kwargs)
    try:
        signature = inspect.signature(run)
        bound = signature.bind_partial(*(request.args if args is None else args))
    except (TypeError, ValueError):  # a builtin; or wrong arguments, which the call will show
        return request.args if args is None else args, kwargs or {}
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    taken = bound.arguments.keys() & names
    if kwargs is None:
        return args, {name: v for name, v in request.kwargs.items() if name not in taken}
    bound.arguments.update({name: kwargs[name] for name in taken & kwargs.keys()})
    return bound.args, {**bound.kwargs, **{k: v for k, v in kwargs.items() if k not in taken}}


@functools.lru_cache(maxsize=None)
def _hostname() -> str:
    return _symbol("socket:gethostname")()


# ---------------------------------------------------------------------------------------------
# 10. Execution
# ---------------------------------------------------------------------------------------------


class ExceptionInfo:
    """An exception as handlers and signals get it: `str(einfo)` is the traceback.

    The frames of this file that called the task are left out.
    """

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


#: What `run_task` has to tell: the state, the return value or exception, and its traceback as text.
Run = collections.namedtuple("Run", "state value traceback")


def run_task(task: Any, request: Context, propagate: bool = False) -> Run:
    """Run a task as its request says, with its handlers, signals and log lines.

    Its result, and what follows it, are then in `request.follow_ups`. With `propagate` its error
    is raised. Knows no broker: the same in a child process, a thread, and eager mode.
    """
    id, args, kwargs = request.id or "", request.args, request.kwargs
    cls, stack = type(task), _thread.stack
    stack.append((task, request))
    started = time.monotonic()
    run = Run(SUCCESS, None, None)
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
            if propagate and not isinstance(exc, (Retry, Ignore, Reject)):
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
    """Return whether this call keeps a result; what it says stands above the task (None: it is not
    known), and a chord above both: its body needs the results of its parts."""
    if request.is_eager and not task.store_eager_result:
        return False
    if state == FAILURE and task is not None and task.store_errors_even_if_ignored:
        return True
    ignored = vars(request).get("ignore_result")
    if ignored is None:
        ignored = task is not None and task.ignore_result
    return bool(request.chord or not ignored)


def _keep_result(
    app: TaskQ, task: Any, request: Context, state: str, value: Any, traceback: Any = None
) -> None:
    """Note a result, if this call keeps one, to be settled with the task's end."""
    if _keeps_result(task, request, state):
        request.follow_ups.results.append(result_row(app, request, state, value, traceback))


def _succeeded(task: Any, request: Context, value: Any, started: float) -> Run:
    """Send what follows and note the return value (EncodeError if it cannot be stored), then tell
    handlers and log."""
    if request.callbacks or request.chain or request.chord:
        _call_next(task.app, request, value)
    _keep_result(task.app, task, request, SUCCESS, value)
    runtime = time.monotonic() - started
    if type(task).on_success is not Task.on_success:
        _tell(task, request, "on_success", value)
    if task_success.receivers:
        task_success.send(sender=task, result=value, runtime=runtime)
    if trace_logger.isEnabledFor(logging.INFO):
        shown = {"runtime": runtime, "return_value": _repr(value, task.resultrepr_maxsize)}
        _log(task, request, logging.INFO, "succeeded in %(runtime)ss: %(return_value)s", shown)
    return Run(SUCCESS, value, None)


def _failed(task: Any, request: Context, exc: Any) -> Run:
    """Note whatever a task has raised, then tell handlers, signals and log."""
    einfo, app, shown = ExceptionInfo(exc), task.app, _repr(exc)
    if isinstance(exc, Retry):
        state, level, message, shown = RETRY, logging.INFO, "retry: %(exc)s", str(exc)
        _keep_result(app, task, request, RETRY, exc.exc, einfo.traceback)
        _tell(task, request, "on_retry", exc.exc, einfo=einfo)
        task_retry.send(sender=task, request=request, reason=exc, einfo=einfo)
    elif isinstance(exc, Ignore):
        state, level, message = IGNORED, logging.INFO, "ignored"
        if not request.replaced:
            _break_off(app, request, REVOKED, TaskRevokedError("ignored"))
    elif isinstance(exc, Reject):
        state, level, message = REJECTED, logging.WARNING, "%(exc)s"
        if not exc.requeue:
            _fail(app, task, request, FAILURE, exc, einfo.traceback)
    else:
        state, level, message = FAILURE, logging.ERROR, "raised unexpected: %(exc)s"
        if task.throws and isinstance(exc, task.throws):
            level, message = logging.INFO, "raised expected: %(exc)s"
        _fail(app, task, request, FAILURE, exc, einfo.traceback)
        _announce_failure(task, request, einfo)
    exc_info = einfo.exc_info if level >= logging.WARNING else None
    _log(task, request, level, message, {"exc": shown}, exc_info)
    return Run(state, exc, einfo.traceback)


def _fail(
    app: TaskQ, task: Any, request: Context, state: str, exc: Any, traceback: Any = None
) -> None:
    """Note the end of a task that has failed or was revoked, and of what waits for it."""
    request.follow_ups = Batch()  # what was to follow its success does not
    _keep_result(app, task, request, state, exc, traceback)
    _break_off(app, request, state, exc, traceback)


def _log(
    task: Any, request: Context, level: int, text: str, data: dict[str, Any], exc_info: Any = None
) -> None:
    if trace_logger.isEnabledFor(level):
        data = {"id": request.id, "name": request.shadow or task.name, **data}
        trace_logger.log(level, f"Task %(name)s[%(id)s] {text}", data, exc_info=exc_info)


def _announce_failure(task: Any, request: Context, einfo: ExceptionInfo) -> None:
    """Tell the task's handler and the receivers of `task_failure`."""
    exc = einfo.exception
    _tell(task, request, "on_failure", exc, einfo=einfo)
    named = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs, "einfo": einfo}
    task_failure.send(sender=task, exception=exc, traceback=exc.__traceback__, **named)


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
    """Send the callbacks of a task that has succeeded, and the next step of its chain, with its
    end; a part of a chord has ended."""
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
    if request.chord:
        delivery = None
        if app.backend.foreign and isinstance(request.chord, dict):
            delivery = app._unlock_delivery(request.group, maybe_signature(request.chord, app))
        part = (request.group, request.group_index, request.id, delivery)
        request.follow_ups.parts.append(part)


def _break_off(
    app: TaskQ, request: Context, state: str, exc: BaseException, traceback: str | None = None
) -> None:
    """Give what waits for a task that has not succeeded its end, together with the task's own.

    The later steps of its chain have the same state and exception, its chord a part that failed;
    after a FAILURE its errbacks are called.
    """
    try:
        _end_part(app, request)
        for step in reversed(request.chain or ()):
            _end(app, request, maybe_signature(step, app), state, exc, traceback)
        if state == FAILURE:
            _call_errbacks(app, request, exc, traceback)
    except Exception as error:
        text = "What follows %s[%s] is malformed: %r"
        trace_logger.exception(text, request.task, request.id, error)


def _uncalled(request: Context, sig: Any) -> Context:
    """Return the request of a task that will not be called: it ends with that of another one."""
    fields = {name: sig.options.get(name) for name in ("chord", "group_index", "root_id")}
    errbacks = _listed(sig.options.get("link_error"))
    group = sig.options.get("group_id")
    found = Context(fields, id=sig.id, task=sig.task, group=group, errbacks=errbacks)
    found.follow_ups = request.follow_ups
    return found


def _end(app: TaskQ, request: Context, sig: Any, state: str, exc: Any, traceback: Any) -> None:
    """Note the end of every task in a signature that will not be called."""
    for task in sig._all():
        about = _uncalled(request, task)
        about.follow_ups.results.append(result_row(app, about, state, exc, traceback))
        _end_part(app, about)


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
    """Return whether a task, made of a function that is not bound, takes more than one argument
    beside those of its signature."""
    if task is None or not isinstance(vars(type(task)).get("run"), staticmethod):
        return False
    code = task.__header__.__code__
    named = code.co_varnames[: code.co_argcount]
    left = len(named) - len(sig.args) - len(sig.kwargs.keys() & set(named))
    return left > 1 or bool(code.co_flags & 0x04)  # *args


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
            return _expired(app, task, request)
        begin(task, request)
        run = run_task(task, request)
        return _outcome(task, request, run, raw, time.monotonic() - began)
    except SoftTimeLimitExceeded:
        raise  # too late for the task; whoever set the limit takes it
    except Exception as exc:
        if task is not None and request is not None:
            return _failure(app, task, request, exc)
        return _rejected(app, raw, message, exc)


def _outcome(task: Any, request: Context, run: Run, raw: bytes, runtime: float) -> Outcome:
    """Say what becomes of the message of a task that has run."""
    verb, reason = "ack", None
    if run.state == REJECTED:
        verb = "requeue" if run.value.requeue else "reject"
        reason = redelivered(raw) if verb == "requeue" else _repr(run.value)
    elif run.state == FAILURE and task.acks_late and not task.acks_on(timeout=False):
        verb, reason = "reject", f"failed, and acks_on_failure is off: {_repr(run.value, 200)}"
    return _settled(request, verb, reason, runtime)


def _settled(request: Context, verb: str, reason: Any, runtime: float = 0.0) -> Outcome:
    batch = request.follow_ups
    publish = [delivery for call in batch.calls for delivery in call.deliveries]
    return Outcome(verb, batch.results, publish, reason, runtime, batch.chords, batch.parts)


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
    request = Context()
    if message is not None:
        request = _request_without_run(message, (), {}, {})
        _fail(app, None, request, FAILURE, InvalidTaskError(reason))
    return _settled(request, "reject", reason)


def _request_without_run(message: Message, args: Any, kwargs: Any, embed: Any) -> Context:
    """Return the request of a task that does not run, for its message may not have been read."""
    request = request_of(message, args, kwargs, embed, _hostname())
    if not embed:  # it may have been a part of a chord: only the store can tell
        request.update(chord=request.group)
    return request


def _failure(app: TaskQ, task: Any, request: Context, exc: BaseException) -> Outcome:
    """Return the end of a task (None: it is not known) that fails without having run to its end
    here."""
    _fail(app, task, request, FAILURE, exc)
    if task is not None:
        _announce_failure(task, request, ExceptionInfo(exc))
    return _settled(request, "ack", _repr(exc, 200))


def _unregistered(app: TaskQ, message: Message, request: Context) -> Outcome:
    name, known = request.task, ", ".join(sorted(app.tasks)) or "no tasks"
    text = (
        "Received unregistered task of type %r.\nThe message has been ignored and discarded.\n"
        "Did you remember to import the module containing this task?\nThis worker knows: %s"
    )
    worker_logger.error(text, name, known)
    exc = NotRegistered(name)
    task_unknown.send(sender=None, message=message, exc=exc, name=name, id=message.id)
    return _failure(app, None, request, exc)


def _expired(app: TaskQ, task: Any, request: Context) -> Outcome:
    trace_logger.info("Discarding revoked task: %s[%s]", request.task, request.id)
    task_revoked.send(sender=task, request=request, terminated=False, signum=None, expired=True)
    _fail(app, task, request, REVOKED, TaskRevokedError("expired"))
    return _settled(request, "ack", "expired")


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
    message, args, kwargs, embed = None, (), {}, {}  # type: Any, Any, Any, Any
    try:
        if again:
            return Outcome("requeue", [], [], redelivered(claim.raw), 0.0)
        message = claim.message
        if message.content_type == CONTENT_TYPES["json"]:  # a pickle may kill us too
            args, kwargs, embed = message.payload(app.conf.accept_content)
    except MalformedMessage as bad:
        return _rejected(app, claim.raw, message, bad)
    request = _request_without_run(message, args, kwargs, embed)
    worker_logger.error("Task %s[%s] lost its process: %r", request.task, request.id, exc)
    return _failure(app, app.tasks.get(request.task), request, exc)


# -- the tasks that canvas is made of ----------------------------------------------------------


def _mapping(how: Callable[..., Iterable[Any]]) -> Any:
    return lambda self, task, it: list(how(maybe_signature(task, self.app).type, it))


def _accumulate(*args: Any, index: int | None = None) -> Any:
    return args if index is None else args[index]


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
        place = {"root_id": body._all()[0].options.get("root_id") or ids[-1], "parent_id": ids[-1]}
        with app._batch(request.follow_ups):
            body.apply_async((values,), add_to_parent=False, **place)
    except Exception as error:
        exc = error if type(error) is ChordError else ChordError(f"Callback error: {error!r}")
        logger.error("Chord %r raised: %r", group_id, exc)
        request.follow_ups = Batch()
        _end(app, request, body, FAILURE, exc, traceback)
        for task in (body.tasks[0] if isinstance(body, chain) else body)._leaves():
            _call_errbacks(app, _uncalled(request, task), exc, traceback)
    request.follow_ups.chords.append((group_id, 0, None))


def _built_in(name: str, fun: Any, **options: Any) -> None:
    _by_name[name] = lambda app: app._task_from_fun(fun, name=name, **options)


_built_in("celery.map", _mapping(map), bind=True)
_built_in("celery.starmap", _mapping(itertools.starmap), bind=True)
_built_in("celery.accumulate", _accumulate)
_late = {"acks_late": True, "reject_on_worker_lost": True, "time_limit": 0, "soft_time_limit": 0}
_built_in("celery.chord_unlock", _unlock, bind=True, ignore_result=True, **_late)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise _unavailable(name)


#: Names of Celery's that this version of taskq does not have yet.
crontab, schedule, solar = (functools.partial(_refuse, n) for n in ("crontab", "schedule", "solar"))


# ---------------------------------------------------------------------------------------------
# 11. Pools
# ---------------------------------------------------------------------------------------------

_TOKEN = struct.Struct("<QQQ")  # ticket (0: stop), offset and length of the payload in the spool
_STOP = bytes(_TOKEN.size)
_BATCH_MAX = getattr(select, "PIPE_BUF", 512) // _TOKEN.size  # tokens that a pipe takes at once
_BATCH_SECONDS = 0.02  # for how long a child should be busy with what it is handed at once
_STUCK_SECONDS = 0.01  # a child that has finished nothing for so long keeps no other tasks waiting
_LOOK_SECONDS = 1.0  # how often the main process looks at its children at least
_process_name = "MainProcess"  # as the log calls this one


class Pool:
    """Runs what the worker has claimed: a claim is held from `submit` until `collect` gives it."""

    kills = False  # whether tasks run in processes of their own, which a hard time limit ends
    patience = _LOOK_SECONDS  # after which `collect` should be called again, though nobody rings

    def __init__(self, worker: Worker, size: int) -> None:
        self.worker, self.size = worker, size
        self.depth = 1  # how many tasks to hand to one process at once: 1 unless they are tiny
        self.held: dict[int, Claim] = {}  # by ticket
        self.waiting: collections.deque[Claim] = collections.deque()  # those not handed out yet
        self.stopping = False
        self._read: list[tuple[Slot, int]] = []
        self._task_time = 0.0  # moving average, in seconds; 0: none seen yet

    def submit(self, claims: Sequence[Claim]) -> None:
        """Take claims to run; start the processes or threads that are missing."""
        self.held.update((claim.ticket, claim) for claim in claims)
        self.waiting.extend(claims)

    def collect(self) -> list[tuple[Claim, Outcome]]:
        """Return claims that have come to an end, with their outcomes."""
        finished = []
        for slot in self.worker.journal.slots:
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
        if self._task_time:
            self.depth = max(1, min(_BATCH_MAX, int(_BATCH_SECONDS / self._task_time)))
        return finished

    def settled(self) -> None:
        """Forget the outcomes that `collect` returned: they are safely in the store."""
        for slot, end in self._read:
            slot.consume(end)
        self._read.clear()

    def room(self) -> int:
        """Return how many more messages to claim: Celery's prefetch, more while tasks are tiny."""
        conf = self.worker.app.conf
        if conf.worker_disable_prefetch:
            return self.size - len(self.held)
        wanted = self.size * max(conf.worker_prefetch_multiplier or 10, 2 * self.depth)
        free = wanted - len(self.held)
        return free if free * 4 >= wanted or self.depth == 1 else 0  # no small claims under load

    def rest(self, claimed: bool) -> None:
        """Let outcomes gather for the next batch: nap for half of the time for which there is work;
        if that is too short for falling asleep, and more has been `claimed`, run on a little."""
        nap = min(0.005, len(self.held) // self.size * self._task_time / 2)
        if nap > 0.0003:
            self.worker.bell.nap(nap)
        elif claimed and self.kills and self._task_time < 0.0002:
            until = time.perf_counter() + min(0.0002, 4 * self._task_time)
            slots = self.worker.journal.slots
            while time.perf_counter() < until and not any(slot.fresh for slot in slots):
                _yield_cpu()

    def take_back(self) -> list[Claim]:
        """Return the claims that have not begun; they are held no more."""
        back = []
        with contextlib.suppress(IndexError):
            while True:  # threads take from it at the same time
                back.append(self.waiting.popleft())
                del self.held[back[-1].ticket]
        return back

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
            outcome = execute(app, claim.raw, worker.hostname, begin)
    except BaseException as exc:
        if isinstance(exc, WorkerTerminate) or in_child and not isinstance(exc, Exception):
            raise
        _thread.stack.clear()
        if outcome is None:  # else it is a soft limit that came just too late
            error = exc if isinstance(exc, Exception) else WorkerLostError(f"Task raised {exc!r}")
            outcome = lost(app, claim, error, again=False)
    if os.getpid() != pid:  # the task has forked, and returns in the other process too
        os._exit(0)
    slot.finish(ticket, _json_encode(outcome).encode(), bell.ring)
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

    def collect(self) -> list[tuple[Claim, Outcome]]:
        """Run tasks for some milliseconds, at least one."""
        slot, until = self.worker.journal.slots[0], time.monotonic() + _BATCH_SECONDS
        with denied_join_result():  # without room this thread would have to make it, itself
            while self.waiting and slot.has_room and time.monotonic() < until:
                _run_claim(self.worker, slot, self.waiting.popleft())
        return super().collect()

    def rest(self, claimed: bool) -> None:
        """Go on: this is the thread that works."""


class ThreadPool(Pool):
    """Runs tasks in threads; under gevent's or eventlet's patching, in greenlets."""

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self._ready = threading.Semaphore(0)  # once for each claim, and for each thread at the end
        self._threads: list[threading.Thread] = []

    def submit(self, claims: Sequence[Claim]) -> None:
        """Queue claims for the first thread that is free."""
        super().submit(claims)
        for _ in claims:
            self._ready.release()
        for slot in self.worker.journal.slots[len(self._threads) :]:
            name = f"ThreadPoolExecutor-0_{slot.index}"
            thread = threading.Thread(target=self._work, args=(slot,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, slot: Slot) -> None:
        with denied_join_result():
            while self._ready.acquire() and not self.stopping:
                try:
                    claim = self.waiting.popleft()
                except IndexError:  # it was taken back
                    continue
                try:
                    _run_claim(self.worker, slot, claim)
                except BaseException:  # its outcome could not be written
                    worker_logger.exception("A thread of the pool failed")
                if not (self.waiting or self.worker.bell.awake):
                    self.worker.bell.ring()

    def stop(self, patience: float) -> None:
        """Let each thread end; a busy one cannot be killed, and ends with the process."""
        self.stopping = True
        self._ready.release(len(self._threads))
        for thread in self._threads if patience else ():
            thread.join()


class Child:
    """A process of the prefork pool: it gets tokens by a pipe, and payloads by a file in memory."""

    def __init__(self, slot: Slot, name: str, generation: int) -> None:
        self.slot, self.name = slot, name
        self.generation = generation  # of the app's tasks
        self.pid = 0
        self.status = 0  # how it ended
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        make = getattr(os, "memfd_create", None)
        self.spool: Any = open(make("taskq"), "wb") if make else _symbol("tempfile:TemporaryFile")()
        self.spooled = 0  # where the payloads end that it may still read
        self.given: list[Claim] = []  # handed over and not finished, in this order
        self.done = 0  # how many it had finished when last looked at
        self.since = 0.0  # when it began the one after that
        self.retired = False  # gets no more tasks
        self.told = (0, "", 0.0)  # the last time limit that was kept: ticket, its kind, seconds

    def is_stuck(self, now: float) -> bool:
        """See what it has finished; return whether it has kept the rest waiting for too long."""
        finished = self.slot.executed - self.done
        if finished:
            del self.given[:finished]
            self.done += finished
            self.since = now
        return bool(self.given) and now - self.since > _STUCK_SECONDS

    def is_able(self, depth: int, now: float) -> bool:
        """Return whether it can be given more; its spool is used anew when all has been read."""
        full = len(self.given) >= depth or self.given and self.spooled > 2**20
        return not (full or self.retired or self.is_stuck(now))

    def put(self, claims: Sequence[Claim], now: float) -> None:
        """Hand over claims, at most _BATCH_MAX."""
        if not self.given:
            self.spooled, self.since = 0, now
        self.spool.seek(self.spooled)
        self.spool.write(b"".join(claim.raw for claim in claims))
        self.spool.flush()
        tokens = []
        for claim in claims:
            tokens.append(_TOKEN.pack(claim.ticket, self.spooled, len(claim.raw)))
            self.spooled += len(claim.raw)
        self.given += claims
        os.write(self.writer, b"".join(tokens))

    def retire(self) -> None:
        """Let it end after what it has begun; its other tasks have been taken back."""
        if not self.retired:
            self.retired = True
            os.write(self.writer, _STOP)

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
            os.close(self.reader)
            os.close(self.writer)
            self.spool.truncate(0)  # its siblings may have inherited it
            self.spool.close()
        return bool(pid)


class PreforkPool(Pool):
    """Runs tasks in child processes.

    A child begins a task by reading its token from a pipe. The main process can read that too, to
    give what a busy child has not begun to another: the kernel gives each token to one reader.
    """

    kills = True

    def __init__(self, worker: Worker, size: int) -> None:
        super().__init__(worker, size)
        self.children: list[Child] = []
        self._numbers = itertools.count(1)
        self._futile = -1.0  # when a child last died without having begun anything

    def submit(self, claims: Sequence[Claim]) -> None:
        """Hand claims to the children that have the least to do."""
        super().submit(claims)
        self._deal()

    def collect(self) -> list[tuple[Claim, Outcome]]:
        """Return outcomes, and see what has become of the children."""
        dead = [child for child in self.children if child.slot.has_room and child.has_ended()]
        self._deal()
        finished = super().collect()
        for child in dead:
            self._bury(child)
        now = time.monotonic()
        looks = [self._keep_limits(child, now) for child in self.children]
        self.patience = min(looks, default=_LOOK_SECONDS)
        return finished

    def _deal(self) -> None:
        """Hand waiting claims to idle children, then evenly; take back what stuck ones have."""
        self._refill()
        now, depth = time.monotonic(), self.depth
        for child in self.children:
            if child.is_stuck(now) and len(child.given) > 1:
                self._unload(child)
        while self.waiting:
            able = [child for child in self.children if child.is_able(depth, now)]
            if not able:
                return
            child = min(able, key=lambda child: len(child.given))
            count = min(-(-len(self.waiting) // len(able)), depth - len(child.given))
            child.put([self.waiting.popleft() for _ in range(count)], now)

    def _unload(self, child: Child) -> None:
        """Take back what a child has not begun."""
        unread = b""
        if not child.retired:
            with contextlib.suppress(BlockingIOError):
                unread = os.read(child.reader, _TOKEN.size * _BATCH_MAX)
        kept = len(child.given) - len(unread) // _TOKEN.size
        self.waiting.extendleft(reversed(child.given[kept:]))
        del child.given[kept:]

    def take_back(self) -> list[Claim]:
        """Return what waits here and in the children's pipes."""
        for child in self.children:
            self._unload(child)
        return super().take_back()

    def _refill(self) -> None:
        """Retire children that do not know the newest tasks; start others in free slots."""
        if self.worker.renews_children:
            for child in self.children:
                if child.generation != self.worker.app.generation:
                    self._unload(child)
                    child.retire()
        missing = self.size - sum(not child.retired for child in self.children)
        if missing <= 0 or self.stopping or time.monotonic() < self._futile + 1.0:
            return
        used = {child.slot for child in self.children}
        free = [slot for slot in self.worker.journal.slots if slot not in used and not slot.fresh]
        for slot in free[:missing]:
            slot.clear()
            self.children.append(self._start_child(slot))

    def _start_child(self, slot: Slot) -> Child:
        worker = self.worker
        name = f"{worker.start_method.title()}PoolWorker-{next(self._numbers)}"
        child = Child(slot, name, worker.app.generation)
        order = (name, slot.index, child.reader, child.spool.fileno())
        _flush_output()
        if worker.start_method == "spawn":
            child.pid = _spawn(worker, order)
        else:
            with warnings.catch_warnings():  # Python 3.12 warns of forking beside other threads
                warnings.simplefilter("ignore", DeprecationWarning)
                child.pid = os.fork()
            if not child.pid:
                _be_child(worker, *order)
        return child

    def _bury(self, child: Child) -> None:
        """Note the end of the task that a dead child was running; give the others back."""
        self.children.remove(child)
        ticket, flags = child.slot.begun
        running = self.held.get(ticket)
        left = (claim for claim in reversed(child.given) if claim.ticket in self.held)
        self.waiting.extendleft(claim for claim in left if claim is not running)
        how = f"exitcode {os.WEXITSTATUS(child.status)}"
        if os.WIFSIGNALED(child.status):
            number = os.WTERMSIG(child.status)
            names = (known.name for known in signal.Signals if known == number)
            how = f"signal {number} ({next(names, '?')})"
        if child.status and not (running or child.slot.executed):
            self._futile = time.monotonic()
        _, kind, limit = child.told
        if child.status and kind != "Hard":
            worker_logger.error("Process %r pid:%d exited with %r", child.name, child.pid, how)
        if running is not None:
            app, again = self.worker.app, runs_again(running, flags, worker_died=False)
            exc = WorkerLostError(f"Worker exited prematurely: {how}.")
            if kind == "Hard":
                exc = TimeLimitExceeded(limit)
                task = app.tasks.get(running.message.headers["task"])
                again = bool(flags & ACKS_LATE and task and not task.acks_on(timeout=True))
            outcome = lost(app, running, exc, again)
            child.slot.finish(ticket, _json_encode(outcome).encode(), self.worker.bell.ring)
        self.worker.bell.ring()

    def _keep_limits(self, child: Child, now: float) -> float:
        """Keep the time limits of what a child runs; return the seconds until the next look."""
        ticket, (began, soft, hard) = child.slot.begun[0], child.slot.times
        claim, kind, limit = self.held.get(ticket), "Soft", soft
        if 0 < hard <= now:
            kind, limit = "Hard", hard
            self._unload(child)  # so that it can begin nothing else before it is killed
        has_passed = 0 < limit <= now and child.slot.begun[0] == ticket
        if claim is not None and has_passed and child.told[:2] != (ticket, kind):
            seconds = round(limit - began, 3)
            seconds = int(seconds) if seconds == int(seconds) else seconds
            child.told = ticket, kind, seconds
            child.retired = child.retired or kind == "Hard"
            child.kill(signal.SIGKILL if kind == "Hard" else signal.SIGUSR1)
            level = logging.ERROR if kind == "Hard" else logging.WARNING
            text, headers = "%s time limit (%ss) exceeded for %s[%s]", claim.message.headers
            worker_logger.log(level, text, kind, seconds, headers["task"], headers["id"])
        may_be_stuck = len(child.given) > 1 or child.told[1] == "Hard"
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
        if 0 < slot.times[1] <= time.monotonic():  # else the task that was meant has ended
            raise SoftTimeLimitExceeded()

    try:
        _die_with_parent(worker.pid)
        _thread.stack.clear()
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
    conf, bell = worker.app.conf, worker.bell
    most, memory = conf.worker_max_tasks_per_child, conf.worker_max_memory_per_child
    unit = 1024 if sys.platform == "darwin" else 1  # of the system, in KiB
    usage = _symbol("resource:getrusage") if memory else None
    try:
        with denied_join_result():
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


def _spawn(worker: Worker, order: Sequence[Any]) -> int:
    """Start a child in a fresh interpreter; it finds the app by name. Returns its pid."""
    import multiprocessing.spawn
    import pickle
    import subprocess

    main = multiprocessing.spawn.get_preparation_data(order[0])
    del main["authkey"]
    modules = sorted(sys.modules.items(), key=lambda item: item[0] == "__main__")  # rather another
    homes = [
        f"{name}:{attribute}"
        for name, module in modules
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if value is worker.app and name not in (__name__, "__mp_main__")
    ]
    if not homes:
        raise ImproperlyConfigured("the start method 'spawn' needs an app that a module holds")
    paths = (worker.journal.path, worker.bell.path)
    logs = worker.log_options if task_logger.handlers or setup_logging.receivers else None
    letter = (homes[0], worker.hostname, worker.overrides, paths, logs, order)
    code = (
        f"import sys, importlib; main = {main!r}; sys.path[:] = main['sys_path']; "
        f"own = importlib.import_module({__name__!r}); "
        f"own._be_spawned({worker.pid}, main, {pickle.dumps(letter)!r})"
    )
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
    address, hostname, overrides, (journal, bell), logs, order = pickle.loads(letter)
    app = _symbol(address)
    app.conf.update(overrides)
    app.import_default_modules()
    app.set_current()
    if logs is not None:
        configure_logging(app, **logs)
    worker = types.SimpleNamespace(app=app, hostname=hostname, pid=parent, pool=PreforkPool)
    worker.journal, worker.bell = Journal(journal), Bell(bell, mine=False)
    _be_child(worker, *order)


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
    """Stands for stdout and stderr in a worker: each line that a task prints is one of the log."""

    encoding = "utf-8"

    def __init__(self, level: int) -> None:
        self.level = level
        self.local = threading.local()  # rest: the begin of a line; None: the log itself prints

    def write(self, text: Any) -> int:
        text, held = str(text), getattr(self.local, "rest", "")
        if held is not None:
            *lines, rest = (held + text).split("\n")
            self.local.rest = None
            try:
                for line in filter(str.strip, lines):
                    logging.getLogger("celery.redirected").log(self.level, line.rstrip())
            finally:
                self.local.rest = rest
        return len(text)

    def flush(self) -> None:
        if getattr(self.local, "rest", None):
            self.write("\n")


def configure_logging(app: TaskQ, loglevel: int, logfile: str | None, color: Any) -> None:
    """Set up a worker's log as Celery does; a receiver of `setup_logging` does it instead."""
    conf, stream = app.conf, sys.__stderr__
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
            handler.setFormatter(_LogFormatter(fmt, color))
            log.addHandler(handler)
            log.setLevel(loglevel)
        after_setup.send(logger=log, format=fmt, **named)
    if conf.worker_redirect_stdouts:
        level = logging.getLevelName(conf.worker_redirect_stdouts_level)
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
_OPTION_SETTINGS["broker"] = "broker_url"


class Worker:
    """Claims messages, has a pool run them, and settles what comes of them.

    hostname: the node's name. queues, exclude_queues: names, or text with commas. loglevel: 'INFO',
    by default 'WARNING'. logfile: a path. quiet: print no banner. no_color: nor colours. purge:
    delete waiting messages first. Other options set settings while it runs: `pool`, `concurrency`,
    `time_limit`, `max_tasks_per_child`, `prefetch_multiplier`, …
    """

    #: The options that are no settings.
    OPTIONS = "hostname queues exclude_queues loglevel logfile quiet no_color purge".split()

    def __init__(self, app: TaskQ, **options: Any) -> None:
        self.app = app
        own = types.SimpleNamespace(**{name: options.pop(name, None) for name in self.OPTIONS})
        self.own_options = own
        app.import_default_modules()
        host, name = _hostname(), own.hostname or "celery"
        name = name if "@" in name else f"{name}@%h"
        self.hostname = node_format(name, f"{host.partition('.')[0]}@{host}")
        celeryd_init.send(sender=self.hostname, instance=self, conf=app.conf, options=options)
        for name in options.keys() - _OPTION_SETTINGS.keys():
            hint = _hint(name, (*self.OPTIONS, *_OPTION_SETTINGS), 0.6)
            raise TypeError(f"a worker has no option {name!r}{hint}")
        found = {_OPTION_SETTINGS[k]: value for k, value in options.items() if value is not None}
        if "include" in found:
            found["include"] = _name_list(app.conf.include) + _name_list(found["include"])
        self.overrides = found  # settings, which spawned children take too
        self._replaced = {name: app.conf[name] for name in found}
        app.conf.update(found)
        if "include" in found:
            app.import_default_modules()
        self.pool_name = app.conf.worker_pool
        self.start_method = app.conf.worker_pool_start_method
        self.concurrency = _count(app.conf.worker_concurrency)
        level = own.loglevel or "WARNING"
        self.log_options: dict[str, Any] = {
            "loglevel": level if isinstance(level, int) else logging.getLevelName(level.upper()),
            "logfile": own.logfile and os.path.abspath(node_format(own.logfile, self.hostname)),
            "color": False if own.no_color else None,
        }
        self.renews_children = False  # whether a new task has children forked anew (in a script)
        self.stopping: str | None = None  # 'warm' or 'cold'
        self.exitcode = 0
        self.ready = threading.Event()
        self._unsettled: list[tuple[Claim, Any]] = []
        self._hungry = True  # whether there may be more to claim
        self._due: float | None = None  # when the next message with an ETA is due
        self._looked = 0.0  # when it last looked for dead workers
        self._looks = itertools.count()  # how often it has
        self._begun: set[int] = set()  # tickets of running tasks, as the store knows them

    def start(self) -> int:
        """Run until told to stop; return the exit status."""
        own, streams = self.own_options, (sys.stdout, sys.stderr)
        signals: dict[int, Any] = {}  # the handlers that its own replace
        configure_logging(self.app, **self.log_options)
        try:
            self.setup()
            celeryd_after_setup.send(sender=self.hostname, instance=self, conf=self.app.conf)
            count = sum(map(self.store.purge, self.queue_names)) if own.purge else 0
            text = f"purge: Erased {_plural(count, 'message')} from the queue.\n\n" if count else ""
            if sys.__stdout__:
                print(text + ("" if own.quiet else self.banner()), file=sys.__stdout__, flush=True)
            with contextlib.suppress(ValueError):  # in another thread than the main one
                self._install_signals(signals)
            return self.run()
        finally:
            sys.stdout, sys.stderr = streams
            for signum, handler in signals.items():
                signal.signal(signum, handler)

    def check(self) -> None:
        """Raise where an address or option cannot be used, before anything is started."""
        if POOLS[self.pool_name].kills and not hasattr(os, "fork"):
            self.pool_name = "threads"
        if POOLS[self.pool_name].kills and self.app.store.folder is None:
            raise ImproperlyConfigured("memory:// lives in one process: use --pool=threads or solo")
        _patch_greenlets(self.pool_name)
        self.app.store.look(())
        self.app.backend.uri()
        router = self.app.router
        names = _name_list(self.own_options.queues) or list(router.queues)
        unwanted = _name_list(self.own_options.exclude_queues)
        self.queues = [router.queue(name) for name in names if name not in unwanted]
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
        for other in Journal.others(self.store.folder):
            if other.info["node"] == self.hostname and not other.lock_whole():
                text = "DuplicateNodenameWarning: another worker (pid %s) is called %s too: give "
                text += "each its own name with -n"
                worker_logger.warning(text, other.info["pid"], self.hostname)
        self.bell = self.store.bells.open()
        self.bell.listen("q:" + name for name in self.queue_names)
        pool = POOLS[self.pool_name]
        size = 1 if pool is SoloPool else self.concurrency
        slots = 2 * size + 2 if pool.kills else size
        folder = self.store.folder
        path = os.path.join(folder, f"{self.owner:x}.journal") if folder else None
        self.journal = Journal(path, {"node": self.hostname, "slots": slots})
        self.pool: Pool = pool(self, size)
        if self.pool_name != self.app.conf.worker_pool:
            worker_logger.warning("There is no fork on this platform: using the threads pool")
        if not pool.kills and any(task.time_limit for task in self.app.tasks.values()):
            worker_logger.warning("Hard time limits do not apply to the %s pool", self.pool_name)

    def begin(self) -> None:
        """Recover what dead workers left, and start the pool."""
        worker_init.send(sender=self)
        self._housekeeping()
        self.pool.submit(())  # starts its processes
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
            self.pool.stop(10.0 if self.stopping == "warm" else 0.0)
            # With what is not settled the journal stays, for the worker that recovers it.
            self.journal.close(remove=not (self.pool.held or self._unsettled))
            self.store.bells.close(self.bell)
            self.store.bells.sweep()
            self.app.close()
            self.app.conf.update(self._replaced)
        return self.exitcode

    def _turn(self, claiming: bool = True) -> None:
        """Settle what has ended, claim what there is room for, hand it out; sleep if idle."""
        pool, bell = self.pool, self.bell
        try:
            self._unsettled = finished = self._unsettled + pool.collect()
            room = max(pool.room(), 0) if claiming else 0
            limit = room if self._hungry else 0
            claims = self._settle(self.owner, finished, limit) if finished or limit else []
            self._unsettled = []
            if limit:
                self._hungry = len(claims) >= limit
            pool.settled()
            if claims:
                self._received(claims)
                pool.submit(claims)
            if time.monotonic() - self._looked > 1.0:
                self._housekeeping()
            if finished or claims:
                pool.rest(bool(claims))
            elif not bell.asleep:
                if self.store.foreign:
                    self._note_begun()
                bell.doze(room > 0)
                ready, self._due = self.store.look(self.queue_names) if room else (False, None)
                self._hungry = self._hungry or ready
            else:
                wanted = pool.patience
                if self._due is not None and room:
                    wanted = min(wanted, max(0.0, self._due - time.time()))
                self._hungry = bell.wait(wanted) or self._hungry
        except (OperationalError, OSError) as exc:
            what = "The store" if isinstance(exc, OperationalError) else "The pool"
            worker_logger.error("%s cannot be used: %s. Trying again in 1 second.", what, exc)
            time.sleep(1.0)

    def _note_begun(self) -> None:
        """Tell the store which tasks now run that must not run again, once of each."""
        held, running = self.pool.held, [slot.begun for slot in self.journal.slots]
        begun = {ticket for ticket, flags in running if not flags}
        early = [held[ticket] for ticket in begun - self._begun if ticket in held]
        if early:
            self.store.begun(early)
        self._begun = begun

    def _settle(self, owner: int, finished: Sequence[Any], room: int = 0) -> list[Claim]:
        """Settle an owner's claims, results first where they have a store; claim up to `room`."""
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
        except (StaleClaim, ValueError, OverflowError) as exc:
            if len(finished) > 1:  # it is about one of them
                return [claim for pair in finished for claim in self._settle(owner, [pair])]
            if isinstance(exc, StaleClaim):
                worker_logger.warning("An outcome was dropped: %s", exc)
                return []
            ((claim, outcome),) = finished
            if outcome.verb == "reject":  # even that cannot be kept: it is not about the task
                raise OperationalError(str(exc)) from None
            end = Outcome("reject", [], [], f"it cannot be settled: {exc}", 0.0)
            if outcome.runtime:  # it has run: say how it ends
                end = lost(self.app, claim, exc, again=False)
            return self._settle(owner, [(claim, end)])

    def _received(self, claims: Sequence[Claim]) -> None:
        """Log claims and tell the receivers of `task_received`."""
        strategy = logging.getLogger("celery.worker.strategy")
        heard = task_received.receivers or strategy.isEnabledFor(logging.INFO)
        for claim in claims if heard else ():
            with contextlib.suppress(MalformedMessage):  # whoever executes it rejects it
                headers = claim.message.headers
                name = headers.get("shadow") or headers["task"]
                strategy.info("Task %s[%s] received", name, headers["id"])
                if task_received.receivers:
                    request = request_of(claim.message, None, None, {}, self.hostname)
                    request.update(name=headers["task"])
                    task_received.send(sender=self, request=request)

    def _housekeeping(self) -> None:
        """Look, once a second, for dead workers, and now and then for expired results."""
        self._looked = time.monotonic()
        self.journal.touch()
        if self.store.recover(self.lost, self._settle):
            self._hungry = True
        if next(self._looks) % 30 == 0:
            self.store.sweep()

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
        self._left()
        self.pool.stop(0.0)
        told = functools.partial(self.lost, why="it was told to stop at once")
        brought: list[Claim] = []  # the end of a chord is for the worker that settles its last part

        def settle(owner: int, finished: Sequence[Any]) -> None:
            brought.extend(self._settle(owner, finished))

        try:
            self.store.recover_owner(self.owner, self.journal.ends(), told, settle)
            if brought:
                self._settle(self.owner, [(claim, _GIVE_BACK) for claim in brought])
            self._unsettled = []
            self.pool.held.clear()
        except OperationalError as exc:
            worker_logger.error("The store cannot be used: %s. The next worker settles.", exc)

    def _install_signals(self, replaced: dict[int, Any]) -> None:
        """Install the worker's handlers, and note those they replace."""

        def stop(signum: int, frame: Any) -> None:
            if os.getpid() != self.pid:
                return
            name = signal.Signals(signum).name
            interrupt = name == "SIGINT"
            cold = name == "SIGQUIT" or interrupt and self.stopping is not None
            how, status = ("Cold" if cold else "Warm"), int(cold or interrupt)
            text = f"worker: {how} shutdown (MainProcess)"
            if interrupt and not cold:
                text = f"worker: Hitting Ctrl+C again will terminate all running tasks!\n\n{text}"
            with contextlib.suppress(OSError, RuntimeError):  # print may be what it interrupts
                os.write(2, f"\n{text}\n".encode())
            worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=status)
            self.stop("cold" if cold else self.stopping or "warm", status)
            if cold and _thread.stack:  # a task of the solo pool, which nothing else can end
                raise WorkerTerminate(1)

        handlers: dict[str, Any] = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"), stop)
        handlers["SIGUSR1"] = lambda *_: faulthandler.dump_traceback(2)
        if self.pool_name not in _PATCHES:  # greenlets have their own for children
            handlers["SIGCHLD"] = lambda *_: self.bell.ring()
        for name in handlers.keys() & set(dir(signal)):  # Windows has two of them
            signum = getattr(signal, name)
            replaced[signum] = signal.signal(signum, handlers[name])

    def banner(self) -> str:
        """Return what a worker prints when it starts."""
        queues = "\n".join(
            f". {name:<16} exchange={exchange.name}({exchange.type}) key={key}"
            for name, exchange, key in self.queues
        )
        names = sorted(name for name in self.app.tasks if not name.startswith("celery."))
        tasks = "".join(["[tasks]\n", *(f"  . {name}\n" for name in names)])
        return f"""
 -------------- {self.hostname} v{__version__} (taskq)

[config]
. app:         {self.app.main or "__main__"}:{id(self.app):#x}
. broker:      {_mask_url(self.store.uri())}
. results:     {_mask_url(self.app.backend.uri())}
. concurrency: {self.concurrency} ({self.pool_name})
. task events: OFF

[queues]
{queues}

{tasks if self.log_options["loglevel"] <= logging.INFO else ""}"""


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


def _patch_greenlets(pool: str | None) -> None:
    """Patch the standard library for a pool of greenlets; another time changes nothing."""
    if pool in _PATCHES:
        try:
            _symbol(_PATCHES[pool])()
        except ImportError:
            why = f"{pool}, which is not installed: pip install {pool}"
            raise ImproperlyConfigured(f"the {pool} pool needs {why}") from None


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
        pool = "threads" if interactive or self.app.store.folder is None else "prefork"
        name = f"background{os.getpid()}-{os.urandom(2).hex()}"
        worker = Worker(self.app, **{"pool": pool, "hostname": name, **self.options})
        worker.setup()
        worker.renews_children = worker.pool.kills and worker.start_method == "fork"
        if worker.renews_children and "IPython" in sys.modules:
            shell = sys.modules["IPython"].get_ipython()
            if shell is not None:
                shell.events.register("post_run_cell", self._renew)
        if threading.current_thread() is threading.main_thread():
            worker.begin()  # children that are forked here inherit no lock that is held
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


# ---------------------------------------------------------------------------------------------
# 14. Command line
# ---------------------------------------------------------------------------------------------


#: Its arguments: the text that the user sees, and the exit status (2 by default).
CommandError = _error("CommandError", "A command that cannot be done.", Exception)
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
    """Return the app that `--app` names, 'proj' or 'proj.celery:app'; CommandError if it is none.

    In a module it is `app`, else `celery`, else any app; in a package without one, the same in its
    submodule `celery`.
    """
    if name.startswith(".") or "/" in name or name.endswith(".py"):
        guess = re.sub(r"\.py$", "", name).strip("./").replace("/", ".")
        raise CommandError(f"-A {name}: expected a module, as in -A {guess or 'proj'}")
    module_name, _, attribute = name.partition(":")
    module = _import_if_there(module_name)
    if module is None and "." in module_name and not attribute:
        return find_app(":".join(module_name.rsplit(".", 1)))
    place: Any = module
    for part in filter(None, attribute.split(".")):
        place = getattr(place, part, None)
    found = _app_in(place)
    if found is None and not attribute and hasattr(module, "__path__"):
        found = _app_in(_import_if_there(f"{module_name}.celery"))
    if found is not None:
        return found
    why = f"{name!r} has no app: looked for its attributes 'app' and 'celery', any TaskQ, and a "
    why += "submodule 'celery'"
    if module is None:
        why = f"The module {module_name} was not found."
    elif place is None:
        why = f"Module {module_name!r} has no attribute {attribute!r}"
    raise CommandError(f"Unable to load celery application.\n{why}")


def _discover_app() -> TaskQ:
    """Return the one app in the current directory; CommandError if there is none, or several."""
    places = ["tasks.py", "app.py", "main.py", "celeryapp.py", "*/celery.py", "*/tasks.py"]
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
    why = f"there are {len(found)} apps here, in {_names(found.values())}; say which:"
    if not found:
        why = f"no app was found in {os.getcwd()} (looked at: {', '.join(looked or places)}). "
        why += "Name the module that makes it:"
    module = next(iter(found.values()), "MODULE")
    raise CommandError(f"{why}\n    python {os.path.basename(__file__)} -A {module} worker")


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
        module = sys.modules.setdefault(_main_module() or "__main__", main)
        app = getattr(module, names[0], app) if names else app
    elif options.broker and options.command != "worker":
        app = TaskQ("default")
    else:
        app = _discover_app()
    app.set_current()
    for option in ("broker", "result_backend"):
        if getattr(options, option):
            app.conf[_OPTION_SETTINGS[option]] = getattr(options, option)
    return app


def _worker_command(app: TaskQ, options: Any) -> int:
    import ctypes  # noqa: F401 - here once instead of in every child

    known = {*Worker.OPTIONS, *_OPTION_SETTINGS}
    worker = Worker(app, **{name: v for name, v in vars(options).items() if name in known})
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
    with contextlib.ExitStack() as stack:
        if options.pidfile:
            with open(options.pidfile, "w") as file:
                file.write(f"{os.getpid()}\n")
            stack.callback(_unlink, options.pidfile)
        return worker.start()


def _check_pidfile(path: str) -> None:
    """Raise CommandError if a living process holds the pid file; a stale one is removed."""
    try:
        with open(path) as file:
            pid = int(file.read())
        with contextlib.suppress(PermissionError):  # it lives, and is somebody else's
            os.kill(pid, 0)
    except FileNotFoundError:
        pass
    except (ValueError, ProcessLookupError):
        print(f"Stale pidfile {path} exists - Removing it.", file=sys.stderr)
        _unlink(path)
    else:
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
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise CommandError(f"{text!r} is not JSON: {exc}") from None
    if not isinstance(value, kind):
        raise CommandError(f"{text!r}: expected a JSON {'array' if kind is list else 'object'}")
    return value


def _result_command(app: TaskQ, options: Any) -> None:
    result = app.AsyncResult(options.task_id)
    print(result.traceback if options.traceback else result.get())


def _purge_command(app: TaskQ, options: Any) -> int:
    names = set(_name_list(options.queues) or app.router.queues)
    names -= set(_name_list(options.exclude_queues))
    if not names:
        return 0
    if not options.force:
        queues = f"queue{'s' * (len(names) > 1)}: {', '.join(sorted(names))}"
        print(f"WARNING: This will remove all tasks from {queues}.\n"
              "         There is no undo for this operation!\n\n"
              "(to skip this prompt use the -f option)\n"
              "Are you sure you want to delete all tasks? [y/N]: ", end="", flush=True)  # fmt: skip
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Aborted!", file=sys.stderr)
            return 1
    count = sum(map(app.store.purge, names))
    purged = f"Purged {_plural(count, 'message')} from {_plural(len(names), 'known task queue')}."
    print(purged if count else f"No messages purged from {_plural(len(names), 'queue')}")
    return 0


def bugreport(app: TaskQ | None = None) -> str:
    """Return the versions and settings that a bug report should name."""
    import platform

    app = app_or_default(app)
    return f"""
software -> taskq:{__version__} py:{platform.python_version()} sqlite:{sqlite3.sqlite_version}
platform -> system:{platform.system()} arch:{platform.machine()} imp:{sys.implementation.name}
settings -> broker:{_mask_url(app.store.uri())} results:{_mask_url(app.backend.uri())}

{app.conf.humanize()}
"""


def _demo_command(_: Any, options: Any) -> int:
    """Count the lines and words of the standard library with a prefork worker, and check it."""
    from pathlib import Path

    library = Path(os.__file__).parent
    paths = [str(p) for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts][:3000]

    def count(path: str) -> list[int]:
        text = Path(path).read_bytes()
        return [text.count(b"\n"), len(text.split())]

    start = time.monotonic()
    plain = list(map(count, paths))
    alone = time.monotonic() - start
    with _symbol("tempfile:TemporaryDirectory")(prefix="taskq-demo-") as folder:
        app = TaskQ("demo", broker=f"sqlite:///{folder}/demo.db", set_as_current=False)
        task = app.task(name="demo.count")(count)
        with app.worker() as background:
            worker: Any = background.worker
            print(f"A {worker.pool_name} worker with {worker.concurrency} processes, on an SQLite "
                  f"file,\ncounts lines and words of {len(paths)} files in {library}")  # fmt: skip
            start = time.monotonic()
            results = [task.delay(path) for path in paths]
            sent = time.monotonic() - start
            counted: list[Any] = []
            for result in results:
                counted.append(result.get(timeout=60))
                if len(counted) % 200 == 0 or len(counted) == len(paths):
                    print(f"{len(counted)}/{len(paths)}", flush=True)
            total = time.monotonic() - start
        app.close()
    wrong = sum(a != b for a, b in zip(plain, counted))
    lines, words = map(sum, zip(*counted))
    print(
        f"\n{lines:,} lines, {words:,} words; a plain loop agrees on all but {wrong} files\n"
        f"tasks:      {len(paths)} in {total:.2f} s, {len(paths) / total:,.0f} a second\n"
        f"of that:    {sent:.2f} s to send them all, and {total - sent:.2f} s until all had run\n"
        f"plain loop: {alone:.2f} s in one process, the counting itself"
    )
    return int(wrong > 0)


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
_COMMANDS: dict[str, tuple[Callable[[Any, Any], int | None], str, str]] = {
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
    --without-gossip --without-mingle --without-heartbeat  accepted: there are none
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
    "report": (lambda app, _: print(bugreport(app)), "Print what a bug report should name.", ""),
    "demo": (_demo_command, "Run a worker on some real work, in a temporary file.", ""),
}  # fmt: skip

#: Commands, and options of the worker, that Celery has and this version not; they fail by name.
_LATER = (
    "amqp beat control events graph inspect list logtool migrate multi shell status upgrade "
    "-E --task-events --events -B --beat -S --statedb -s --schedule-filename --schedule "
    "--scheduler --autoscale --uid --gid --umask --executable".split()
)


def _parser(command: str = "") -> Any:
    """Return the parser of the options that stand anywhere, and of a command's."""
    import argparse

    _, summary, table = _COMMANDS.get(command, (None, (__doc__ or "").partition("\n")[0], ""))
    parser = argparse.ArgumentParser(
        prog=f"taskq {command}".strip(), description=summary, allow_abbrev=False,
        add_help=bool(command), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def fail(text: str) -> NoReturn:
        raise CommandError(f"{text} (see {parser.prog} --help)")

    parser.error = fail  # type: ignore[assignment]
    for line in filter(None, map(str.strip, (table + _COMMON_OPTIONS).splitlines())):
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
    if command in _LATER:
        raise CommandError(f"the command {command!r} is not available in taskq {__version__}")
    if command not in _COMMANDS:
        hint = _hint(command, _COMMANDS, 0.5) or "."
        raise CommandError(f"no command {command!r}{hint} The commands are {_names(_COMMANDS)}.")
    later = {word.partition("=")[0] for word in words}.intersection(_LATER)
    if command == "worker" and later:
        raise CommandError(f"{min(later)} is not available in taskq {__version__}")
    options.command = command
    return _parser(command).parse_args(words, options)


def main(argv: Sequence[str] | None = None, app: TaskQ | None = None) -> int:
    """Run the command line, ['-A', 'proj', 'worker']; return the exit status, or SystemExit."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = types.SimpleNamespace()
    try:
        try:
            options = _parse(given)
            if options.workdir:
                os.chdir(options.workdir)
            _patch_greenlets(getattr(options, "pool", None))  # before the app's modules come
            app = None if options.command == "demo" else _configured_app(options, app)
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
        if exc.filename not in filter(None, vars(options).values()):
            raise  # not of a path that the command line names
        text, status = f"{exc.filename}: {exc.strerror}", 1
    except CommandError as exc:
        text, status = (*exc.args, 2)[:2]
    except (CeleryError, OperationalError, EncodeError) as exc:
        text, status = exc.args[0] if exc.args else exc, 1
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------
# 15. Public names
# ---------------------------------------------------------------------------------------------


def _publish_submodules() -> None:
    """Make `taskq.exceptions`, `taskq.utils.log` and their like importable, as Celery's are; each
    holds all of this file's own names."""
    public = {k: v for k, v in globals().items() if k[0] != "_" and type(v) is not type(sys)}
    public.update(gen_unique_id=uuid, get_logger=logging.getLogger)
    for path in "exceptions states signals result canvas schedules utils utils.log".split():
        module = types.ModuleType(f"{__name__}.{path}", f"{path}: see {__name__}.")
        module.__dict__.update(public)
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        setattr(sys.modules[parent], last, module)


_publish_submodules()

__all__ = (
    "AsyncResult Celery EagerResult Exchange GroupResult Queue ResultSet Signal Signature Task "
    "TaskQ allow_join_result app_or_default bugreport chain chord chunks current_app current_task "
    "get_task_logger group main maybe_signature result_from_tuple shared_task signature subtask "
    "uuid xmap xstarmap"
).split()
