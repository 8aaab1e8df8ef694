"""``cnn2gnn doctor``: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import output
from cnn2gnn_dist.runtime.hosts import allotted
from cnn2gnn_dist.runtime.ranks import DEFAULT_PORT
from cnn2gnn_dist.runtime.ray import probe as ray_probe

OK, WARN, FAIL = "ok", "warn", "FAIL"
DISTRIBUTION = "cnn2gnn-dist"
CHECKOUT = Path(__file__).resolve().parents[3] / "pyproject.toml"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One check: what it examined, its result, what was seen, what to do."""

    name: str
    status: str
    seen: str
    remedy: str = ""


def command() -> int:
    """Print all findings; returns 1 if one of them prevents a run, else 0."""
    findings = examine()
    for one in findings:
        output(f"{one.status:5} {one.name:16} {one.seen}")
        if one.status != OK and one.remedy:
            output(f"{'':22} -> {one.remedy}")
    bad = sum(one.status == FAIL for one in findings)
    output(f"\n{bad} problems" if bad else "\nno problems found")
    return 1 if bad else 0


def examine() -> list[Finding]:
    """Run every check; a check that raises is itself a finding."""
    with _quiet():
        return _examine()


def _examine() -> list[Finding]:
    findings = [_python()]
    try:
        findings += _versions()
    except ImportError as error:  # packaging itself
        findings.append(Finding("versions", FAIL, str(error), "pip install '.[all]'"))
    checks: list[tuple[str, Callable[[], Finding], str]] = [
        (
            "timm imports",
            _timm,
            "pip install timm torchvision; matching builds of torch and torchvision",
        ),
        ("dgl imports", _dgl, "pip install dgl==2.1.0 pandas packaging"),
        ("deepspeed imports", _deepspeed, "pip install deepspeed==0.19.8"),
        ("ray imports", _ray, 'pip install "ray[default]"'),
        ("gpu", _gpu, "see docs/gpu.md"),
        ("shared memory", _shared_memory, "a larger /dev/shm (docker: --shm-size=4g)"),
        ("disk", _disk, "free some space, or run.dir= on another disk"),
        ("memory", _memory, "fewer ranks, smaller batches"),
        ("open files", _open_files, "ulimit -n 65536"),
        ("home", _home, "export HOME=a folder that you can write to"),
        ("loopback", _loopback, "ip link set lo up"),
        ("interfaces", _interfaces, "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"),
        ("port 29500", _port, "torchrun --master_port 29501"),
        ("OMP_NUM_THREADS", _threads, "export OMP_NUM_THREADS=1 when ranks share cores"),
    ]
    for name, check, remedy in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(name, FAIL, f"{type(error).__name__}: {error}", remedy))
    return findings


def _python() -> Finding:
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding("python", OK if fits else FAIL, platform.python_version(), "Python 3.11 or 3.12")


def _versions() -> list[Finding]:
    """Installed versions against the ranges that this package requires."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        if not CHECKOUT.is_file():
            return [
                Finding("install", WARN, "the package is not installed", "pip install '.[all]'")
            ]
        # Run from a checkout, as cluster jobs do: its pyproject has the same requirements.
        project = tomllib.loads(CHECKOUT.read_text(encoding="utf-8"))["project"]
        wanted = project["dependencies"] + project["optional-dependencies"]["train"]
    findings = []
    for text in wanted:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": "train"}):
            continue
        remedy = f'pip install -c constraints.txt "{need.name}{need.specifier}"'
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(need.name, FAIL, "not installed", remedy))
            continue
        fits = need.specifier.contains(have.split("+")[0], prereleases=True)
        seen = f"{have} ({need.specifier or 'any'})"
        findings.append(Finding(need.name, OK if fits else FAIL, seen, remedy))
    return findings


def _timm() -> Finding:
    from cnn2gnn_dist.compat import import_timm

    return Finding("timm imports", OK, import_timm().__version__)


def _dgl() -> Finding:
    from cnn2gnn_dist.compat import import_dgl

    return Finding("dgl imports", OK, f"{import_dgl().__version__} (without graphbolt)")


def _deepspeed() -> Finding:
    import torch

    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen is None and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        version = importlib.import_module("deepspeed").__version__
    finally:
        if chosen is None:
            os.environ.pop("DS_ACCELERATOR", None)
    return Finding("deepspeed imports", OK, version)


def _ray() -> Finding:
    version = importlib.import_module("ray").__version__
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("ray imports", OK, f"{version}; will be started here, on loopback")
    seen, where = f"{version}; RAY_ADDRESS={address}", f"RAY_ADDRESS={address}"
    try:
        if address.startswith(("http://", "https://")):
            ray_probe.job_server_mode(address, where)
            seen += " (a job server's address: `cnn2gnn run` starts its own Ray)"
        elif address != "auto" and not address.startswith("ray://"):
            ray_probe.cluster_mode(address, where)
    except UserError as error:
        return Finding("ray imports", WARN, f"{seen}: {error.what}", error.remedy)
    return Finding("ray imports", OK, seen)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", OK, "torch sees none: runs use the CPU (device=auto)")
    cards = []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        cards.append(f"{card.name} {card.total_memory / GIB:.0f} GiB")
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return Finding("gpu", OK, f"{', '.join(cards)}; {bf16}")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", WARN, "no /dev/shm", "Ray will use the disk, slowly")
    free = shutil.disk_usage(folder).free / GIB
    return Finding(
        "shared memory",
        OK if free >= 1 else WARN,
        f"{free:.1f} GiB free in /dev/shm",
        "1 GiB or more (docker: --shm-size=4g)",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    status = OK if free >= 5 else (WARN if free >= 1 else FAIL)
    return Finding("disk", status, f"{free:.0f} GiB free here", "run.dir= on another disk")


def _memory() -> Finding:
    free, cores = allotted.available_memory() / GIB, allotted.cores()
    return Finding(
        "memory",
        OK if free >= 3 else WARN,
        f"{free:.1f} GiB available, {cores} cores",
        "about 1 GiB per rank and 0.5 GiB for Ray",
    )


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding("open files", OK if soft >= 4096 else WARN, f"limit {soft}", "ulimit -n 65536")


def _home() -> Finding:
    """Compilers, fonts and remote shards are cached there; a run needs none of these caches."""
    home = Path.home()
    writable = home.is_dir() and os.access(home, os.W_OK)
    return Finding(
        "home",
        OK if writable else WARN,
        str(home) if writable else f"{home} can't be written to: no caches",
        "export HOME=a folder that you can write to",
    )


def _loopback() -> Finding:
    from cnn2gnn_dist.runtime.hosts import host_checks

    try:
        host_checks.check_loopback()
    except UserError as error:
        return Finding("loopback", FAIL, error.what, error.remedy)
    return Finding("loopback", OK, "this host reaches itself at 127.0.0.1")


def _interfaces() -> Finding:
    from cnn2gnn_dist.runtime.group import rendezvous

    try:
        for backend in ("gloo", "nccl"):
            rendezvous.check_interfaces(backend)
    except UserError as error:
        return Finding("interfaces", FAIL, error.what, error.remedy)
    named = [f"{n}={os.environ[n]}" for n in (rendezvous.GLOO, rendezvous.NCCL) if n in os.environ]
    return Finding("interfaces", OK, ", ".join(named) or "chosen by gloo and NCCL")


def _port() -> Finding:
    """torchrun and DeepSpeed's launcher rendezvous there by default; nothing else uses it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError as error:
            return Finding(
                f"port {DEFAULT_PORT}",
                WARN,
                f"{error.strerror}: launchers use this port by default",
                f"torchrun or deepspeed --master_port {DEFAULT_PORT + 1}",
            )
    return Finding(f"port {DEFAULT_PORT}", OK, "free, for torchrun and deepspeed")


def _threads() -> Finding:
    value, cores = os.environ.get("OMP_NUM_THREADS"), allotted.cores()
    if value is None:
        seen = "not set (ranks under Ray and torchrun use 1)"
        return Finding("OMP_NUM_THREADS", OK, seen)
    remedy = "export OMP_NUM_THREADS=1, or at most the number of cores per rank"
    if not value.isdecimal() or not 1 <= int(value) <= cores:
        return Finding("OMP_NUM_THREADS", WARN, f"{value!r} with {cores} cores", remedy)
    return Finding("OMP_NUM_THREADS", OK, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' output out of the table; C code writes to the descriptors directly."""
    with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere:
        warnings.simplefilter("ignore")
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)
