"""The Ray cluster of a driver: an existing one that it joins, or one that it starts and that leaves nothing behind."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.runtime.hosts import allotted, host_checks
from cnn2gnn_dist.runtime.ray import probe as ray_probe
from cnn2gnn_dist.runtime.ray import session as ray_session

_log = logging.getLogger(__name__)

RAY_SETTINGS = {
    # Batches that were consumed would stay in the object store for a second.
    "free_objects_period_milliseconds": 100,
    # A history of all calls that is never read here: megabytes per minute.
    "task_events_report_interval_ms": 0,
    # The head is on this machine: once gone it doesn't come back, and waiting for it spins.
    "gcs_rpc_server_reconnect_timeout_s": 10,
}
"""Settings of a cluster started here."""

_session: ray_session.Session | None = None


@contextmanager
def running(address: str | None, cpus: int, logs: Path | None = None) -> Iterator[None]:
    """A cluster for the duration of this block: ``start``, and ``stop`` however the block ends."""
    start(address, cpus, logs)
    try:
        yield
    except BaseException:
        stop(failed=True)
        raise
    stop()


def start(address: str | None, cpus: int, logs: Path | None = None) -> None:
    """Connect to a cluster (``address``, or ``RAY_ADDRESS`` inside a job), or start Ray here.

    A cluster started here listens on loopback only, under its own token, keeps all its
    files in one temporary folder, and leaves no file and no process however this process
    ends (see ``session.py``). From then on SIGTERM is an orderly exit with code 143.

    Args:
        address: of a cluster; None starts one.
        cpus: at least this many for a cluster started here.
        logs: folder for Ray's logs when a cluster started here fails; replaced if it exists.

    Raises:
        UserError: no cluster answers at the address, or it refuses us; this machine
            can't run a cluster.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray colors what goes into files, too
    where = f"cluster.address={address}"
    if not address:
        address = os.environ.get("RAY_ADDRESS")
        where = f"RAY_ADDRESS={address}"
        if address and address.startswith(("http://", "https://")):
            _log.warning(
                f"{where} is a job server's address, for `ray job submit` and launch/submit.py; "
                "this run starts its own Ray (to join a cluster: cluster.address=HEAD:6379)"
            )
            address = None
    with ray_session.orderly_sigterm():
        if address and address != "local":
            _connect(address, where)
        else:
            _start_here(cpus, logs)


def _connect(address: str, where: str) -> None:
    if not address.startswith("ray://"):
        address = _resolve(address, where)
        mode = ray_probe.cluster_mode(address, where)
        if mode is not None:
            _set_auth_mode(mode)
    try:
        ray.init(address=address)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {address} can't be joined: {first_line(error)}",
            where=where,
            remedy="run on a host of that cluster, with its Ray and Python versions "
            "(`ray status` there shows its health)",
        ) from None


def _resolve(address: str, where: str) -> str:
    """The address that Ray will resolve this one to.

    For "auto" the cluster that runs on this host, for localhost the address its head listens on.

    Raises:
        UserError: no cluster runs here.
    """
    import ray._private.services as services

    if address != "auto":
        host, port = ray_probe.host_and_port(address, where)
        return str(services.canonicalize_bootstrap_address(services.build_address(host, port)))
    try:
        return services.canonicalize_bootstrap_address_or_die("auto")
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"no Ray cluster was found on this host: {first_line(error)}",
            where=where,
            remedy="`ray start --head`, or name the cluster: cluster.address=HEAD:6379",
        ) from None


def _set_auth_mode(mode: str) -> None:
    """Make Ray in this process and its children send the token, or not."""
    os.environ[ray_probe.MODE] = mode
    _reload_auth_settings()


def _reload_auth_settings() -> None:
    """Make Ray, which reads its authentication settings when imported, read them again."""
    import ray._raylet as raylet

    raylet.Config.initialize("")  # type: ignore[attr-defined]
    raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


def _start_here(cpus: int, logs: Path | None) -> None:
    global _session
    host_checks.check(cpus)
    _stay_on_loopback()
    _session = ray_session.Session.begin(logs)
    try:
        _reload_auth_settings()
        with _session.environment():
            ray.init(
                address="local",  # else Ray joins the cluster that was last started here
                num_cpus=max(cpus, allotted.cores()),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(_session.traces.folder),
                logging_level=logging.WARNING,
                _system_config=RAY_SETTINGS,
            )
    except BaseException as error:
        stop(failed=True)
        if not isinstance(error, Exception):
            raise
        raise UserError(  # Ray reports it in many ways, even by a bare Exception
            f"Ray failed to start on this host: {first_line(error)}",
            where="ray.init",
            remedy="try again when the host is less busy; `cnn2gnn doctor` checks what Ray "
            "needs, and torchrun with launch/train.py works without Ray",
        ) from error
    atexit.register(_stop_at_exit)  # registered after Ray's handler, so it runs before it


def stop(failed: bool = False) -> None:
    """Leave the cluster; one started here ends and leaves nothing behind.

    The ranks' last lines are shown first. The logs of a ``failed`` session are kept, where
    ``start`` was told, and a line on stderr says where.
    """
    global _session
    session, _session = _session, None
    ray.shutdown()
    if session is not None:
        atexit.unregister(_stop_at_exit)
        kept = session.end(failed=failed)
        _reload_auth_settings()
        if kept is not None:
            _log.warning(f"Ray's logs were kept in {kept}")


def _stop_at_exit() -> None:
    if _session is not None and os.getpid() == _session.driver:
        stop(failed=True)


def gpus() -> int:
    """GPUs of the complete cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def _stay_on_loopback() -> None:
    """Keep Ray from replacing 127.0.0.1 by the host's address, which opens ports to the network."""
    import ray._private.services as services

    services.resolve_ip_for_localhost = lambda address, *_: address
