"""Ranks that work independently: one that has failed lets the others finish before its exit code ends them."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import TCPStore

from cnn2gnn_dist.runtime.ranks import AGENT_STORE, Ranks

CONNECT_S = 30.0
POLL_S = 0.2


def wait_for_others(ranks: Ranks, failed: bool) -> None:
    """Tell the other ranks that this one is done; if it has failed, wait until they are done, too.

    torchrun stops all ranks as soon as one exits with an error. Other launchers have no store that outlives the ranks;
    under these, nothing is waited for. Should another rank die, torchrun stops this one while it waits.
    """
    if ranks.world_size == 1 or os.environ.get(AGENT_STORE) != "True":
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    done = [f"done/{attempt}/{rank}" for rank in range(ranks.world_size)]
    try:
        store = TCPStore(
            ranks.meeting_address(),
            ranks.master_port,
            is_master=False,
            timeout=timedelta(seconds=CONNECT_S),
        )
        store.set(done[ranks.rank], "")
        while failed and not store.check(done):
            time.sleep(POLL_S)  # in Python, so that SIGINT and SIGTERM are heeded
    except RuntimeError:
        return  # the store is gone, and with it the agent that would stop the others
