"""Everything to check on a first run on GPUs, in one command.

    python benchmarks/gpu_check.py                      all checks, on all GPUs of this machine
    python benchmarks/gpu_check.py --device cpu         the same checks at toy size, without a GPU (a few minutes)
    python benchmarks/gpu_check.py --only barrier,zero3

Each check is a separate process (or a group of ranks) and leaves a JSON file in the folder --out. When called again,
the command repeats what failed, but not what has passed or can't run here; --again repeats all. It ends with a table;
exit code 1 if a check failed. Checks of what is not installed (DeepSpeed, faiss, …) are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from free_ports import free_port  # noqa: E402
from gpu_checking import Outcome, Setting, Skip  # noqa: E402

ALONE = ("environment", "search", "parity", "autocast", "gather", "throughput", "memory")
TOGETHER = ("barrier", "sync_norm", "zero3", "lost_peer")
WHOLE = ("pipeline", "judged_on_cpu", "resume")
SECONDS = {"pipeline": 3600.0, "resume": 3600.0}
LIMIT_S = 900.0


def check(name: str, setting: Setting) -> dict[str, Any]:
    """Run one check in this process: {status, figure, numbers}."""
    from cnn2gnn_dist.errors import UserError

    try:
        if name in ALONE:
            from gpu_checking.alone import CHECKS
        elif name in TOGETHER:
            from gpu_checking.group import CHECKS
        else:
            from gpu_checking.whole import CHECKS
        outcome: Outcome = CHECKS[name](setting)
    except (Skip, ModuleNotFoundError) as reason:
        return {"status": "skip", "figure": str(reason), "numbers": {}}
    except UserError as error:
        return {"status": "fail", "figure": " ".join(str(error).split()), "numbers": {}}
    except Exception as error:
        traceback.print_exc()
        return {"status": "fail", "figure": f"{type(error).__name__}: {error}"[:300], "numbers": {}}
    parts = asdict(outcome)
    return {"status": "pass" if parts.pop("holds") else "fail", **parts}


def made(name: str, setting: Setting) -> dict[str, Any]:
    """Run one check in separate processes; combine the results of the ranks of a group."""
    ranks = setting.ranks if name in TOGETHER else 1
    port = free_port()
    begin = time.monotonic()
    files = [setting.out / f".{name}-{rank}.json" for rank in range(ranks)]
    processes = []
    for rank in range(ranks):
        files[rank].unlink(missing_ok=True)
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {k: v for k, v in os.environ.items() if k not in (*group, "MASTER_ADDR")}
        if name in TOGETHER:
            environment |= {k: str(v) for k, v in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, "--one", name, "--rank", str(rank),
                 "--ranks", str(setting.ranks), "--device", setting.device, "--out", str(setting.out),
                 *(["--toy"] if setting.toy else [])],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )  # fmt: skip
    said = _waited_for(processes, SECONDS.get(name, LIMIT_S))
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    for file in files:
        file.unlink(missing_ok=True)
    result = _joined(name, ranks, found, [process.returncode for process in processes])
    if result["status"] == "fail":
        (setting.out / f"{_key(name, setting)}.log").write_text("\n".join(said), encoding="utf-8")
    return result | {"seconds": time.monotonic() - begin, "device": setting.device}


def _waited_for(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    said, end = [], time.monotonic() + seconds
    for process in processes:
        try:
            said.append(process.communicate(timeout=max(0.1, end - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said.append(process.communicate()[0] + f"\nkilled after {seconds:.0f} s")
    return said


def _joined(
    name: str, ranks: int, found: list[dict[str, Any]], codes: list[int | None]
) -> dict[str, Any]:
    """The worst rank decides the result; in ``lost_peer`` the last rank is meant to be gone."""
    expected = ranks - 1 if name == "lost_peer" and ranks > 1 else ranks
    if len(found) < expected and not any(one["status"] != "pass" for one in found):
        figure = f"ranks exited without output: exit codes {codes}"
        return {"status": "fail", "figure": figure, "numbers": {}}
    worst = min(found, key=lambda one: ("fail", "skip", "pass").index(one["status"]))
    if name == "lost_peer" and len(found) > 1:
        worst["numbers"]["of_ranks"] = [one["figure"] for one in found]
    return worst


def _key(name: str, setting: Setting) -> str:
    return f"{name}-{setting.ranks}" if name in TOGETHER or name == "pipeline" else name


def wanted(setting: Setting, only: list[str]) -> list[tuple[str, Setting]]:
    """The checks in order; group checks on 1 rank, 2 ranks and all."""
    sizes = sorted({n for n in (1, 2, setting.ranks) if n <= setting.ranks})
    found = [(name, setting) for name in ALONE]
    found += [(name, replace(setting, ranks=n)) for name in TOGETHER for n in sizes]
    found += [("pipeline", replace(setting, ranks=n)) for n in sorted({1, setting.ranks})]
    found += [(name, setting) for name in WHOLE[1:]]
    return [(name, one) for name, one in found if not only or name in only]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder of results; default runs/gpu-check-DEVICE")
    parser.add_argument(
        "--ranks",
        type=int,
        help="maximum number of ranks; default: number of GPUs, or 2 on the CPU",
    )
    parser.add_argument("--only", help="only these checks, comma-separated")
    parser.add_argument("--again", action="store_true", help="repeat checks that have results")
    parser.add_argument("--toy", action="store_true", help="small sizes; always on the CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = options.only.split(",") if options.only else []
    unknown = set(only) - {*ALONE, *TOGETHER, *WHOLE}
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}; the checks are: "
                     f"{', '.join((*ALONE, *TOGETHER, *WHOLE))}")  # fmt: skip
    out = (options.out or HERE.parent / "runs" / f"gpu-check-{options.device}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    toy = options.toy or options.device == "cpu"
    ranks = options.ranks or (2 if options.device == "cpu" else _gpus())
    setting = Setting(options.device, options.rank, ranks, toy, out)
    if options.one:
        result = check(options.one, setting)
        (out / f".{options.one}-{options.rank}.json").write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)  # threads of a broken group may prevent the interpreter from exiting
    rows = []
    for name, one in wanted(setting, only):
        file = out / f"{_key(name, one)}.json"
        result = _kept(file, toy) if not options.again else None
        if result is None:
            print(f"… {_key(name, one)}", flush=True)
            result = made(name, one) | {"toy": toy}
            file.write_text(json.dumps(result, indent=1), encoding="utf-8")
        rows.append((_key(name, one), result))
    print(f"\n{'check':16} {'':5} {'s':>6}  figure")
    for key, result in rows:
        print(f"{key:16} {result['status']:5} {result['seconds']:6.0f}  {result['figure']}")
    failed = [key for key, result in rows if result["status"] == "fail"]
    print(f"\n{len(rows)} checks on {options.device}{', toy sizes' if toy else ''}: "
          f"{sum(r['status'] == 'pass' for _, r in rows)} pass, {len(failed)} fail, "
          f"{sum(r['status'] == 'skip' for _, r in rows)} skipped; {out}")  # fmt: skip
    return 1 if failed else 0


def _kept(file: Path, toy: bool) -> dict[str, Any] | None:
    """The result of an earlier call, if it is still valid."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("status") in ("pass", "skip") and result["toy"] == toy else None


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    sys.exit(main())
