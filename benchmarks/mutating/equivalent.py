"""Mutants that no test can or should notice, each with the reason.

Keyed by (subject, name as ``mutants.py`` prints it).
"""

from __future__ import annotations

REASONS: dict[tuple[str, str], str] = {
    (
        "live_search",
        "LiveSearch._search: if len(rows_S) < len(base):  →  if len(rows_S) <= len(base):",
    ): "all rows are then copied, and are the same rows",
    (
        "live_search",
        "LiveSearch._opened: …elf._part_N)[self.bank.nodes_L[:self.bank.num_inner]]  →  "
        "…elf._part_N)[self.bank.nodes_L[:]]",
    ): "halo nodes are in no partition of this rank, so they equal none that is asked for",
    (
        "live_search",
        "_Search.place_of: …rows_S[place] == seeds, place, -1)  →  "
        "…rows_S[place] == seeds, place, -2)",
    ): "who is left out of a search: any negative number is nobody",
    (
        "live_search",
        "LiveSearch.nearest: continue  →  pass",
    ): "a search for no queries finds nothing: only its time is saved",
    (
        "ledger",
        "_write: …on.dumps(entry.__dict__, indent=1))  →  …on.dumps(entry.__dict__, indent=2))",
    ): "how the file is indented",
    (
        "arithmetic",
        "check_arithmetic: …} or {below + unit}' if below > 0 else f'{unit}'  →  "
        "…} or {below + unit}' if below > 1 else f'{unit}'",
    ): "a multiple of 1 divides every batch, so below is never 1",
    (
        "arithmetic",
        "shares_of: if shares.sum() < total:  →  if shares.sum() <= total:",
    ): "the loop ends where they are equal",
    (
        "order",
        "Order.rank_batch: self._checked.add(world_size)  →  pass",
    ): "only saves checking the same ranks again",
    (
        "order",
        "_part_of: …p.min_scalar_type(-len(parts) - 1))  →  …p.min_scalar_type(-len(parts) - 2))",
    ): "a wider type at some counts: the same numbers",
    (
        "targets",
        "Targets.lookup: full = np.maximum(full, 1e-12)  →  full = np.maximum(full, 2e-12)",
    ): "a floor against log(0): any number far below float16's steps does",
    (
        "targets",
        "_read: … values.to_numpy(zero_copy_only=False).reshape(-1, table.schema.fiel…  →  "
        "… values.to_numpy(zero_copy_only=True).reshape(-1, table.schema.fiel…",
    ): "only values that are missing need a copy, and such a file is refused either way",
    (
        "partition",
        "build_union: local = np.full(len(table_NM) + 1, -1, np.int32)  →  "
        "local = np.full(len(table_NM) + 2, -1, np.int32)",
    ): "one more entry that stands for nobody",
    (
        "partition",
        "PartGraph.save: …te_text(json.dumps(note, indent=1), encoding='utf-8')  →  "
        "…te_text(json.dumps(note, indent=2), encoding='utf-8')",
    ): "how the file is indented",
    (
        "partition",
        "PartGraph.save: …nodes_L, self.table_KM), strict=True))  →  "
        "…nodes_L, self.table_KM), strict=False))",
    ): "there are two names for these two arrays",
    (
        "partition",
        "_fill_empty: counts[empty] += 1  →  counts[empty] -= 1",
    ): "a part of one node is never the largest while another is empty",
    (
        "checkpoint",
        "_shares: load = [0] * world_size  →  load = [1] * world_size",
    ): "only the differences between the loads count",
    (
        "checkpoint_folder",
        "prune: …lder in folders if folder.name > newest.name and damage(folder)]  →  "
        "…lder in folders if folder.name >= newest.name and damage(folder)]",
    ): "the newest has just been published, complete",
}
