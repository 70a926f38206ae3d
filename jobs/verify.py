"""Comparing and mending the replicas of a running cluster: drives `cluster/verifying.py`, and words its report."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from ..actors.connecting import connect_async
from ..cluster.comparing import Difference
from ..cluster.drive import drive
from ..cluster.verifying import VerifyProgress, VerifyReport, VerifySettings, verify


async def run_verify(
    namespace: str,
    *,
    table: str | None = None,
    mend: bool = False,
    settings: VerifySettings | None = None,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> VerifyReport:
    """Compare all replicas of the cluster in a Ray namespace, and mend what differs if `mend`.

    Raises Unavailable when there is no such cluster, InvalidRequest when it has no such table or nothing to compare.
    """
    store = await connect_async(namespace=namespace)
    try:
        routing = store.view.routing
        encoded = None
        if table is not None:
            store.table(table)
            encoded = table.encode()
        script = verify(routing, settings=settings, table=encoded, mend=mend, progress=progress)
        return await drive(script, store.carrier)
    finally:
        await store.close()


def report_json(report: VerifyReport) -> dict[str, Any]:
    """The report as one JSON object."""
    listed = report.differing + report.behind + report.undecided + report.mended
    return {
        "ok": report.ok,
        "groups": report.groups,
        "buckets": report.buckets,
        "buckets_compared": report.buckets_done,
        "timelines": report.timelines,
        "equal": report.equal,
        "differing": report.differing,
        "behind": report.behind,
        "undecided": report.undecided,
        "mended": report.mended,
        "seconds": round(report.seconds, 3),
        "differences": [_difference_json(difference) for difference in report.differences],
        "differences_not_listed": listed - len(report.differences),
        "not_compared": [
            {"group": n.group, "replica": n.replica, "node": n.node, "from_bucket": n.bucket, "reason": n.reason}
            for n in report.not_compared
        ],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {
        "kind": difference.kind,
        "group": difference.group,
        "bucket": difference.bucket,
        "table": difference.table.decode(errors="replace"),
        **_owner_json(difference.owner),
        "replicas": [
            {
                "replica": replica,
                "version": told.version,
                "cold_links_version": told.system,
                "digest": told.digest.hex() if told.known else None,
            }
            for replica, told in sorted(difference.told.items())
        ],
        "outliers": list(difference.outliers),
        "mended": difference.mended,
        "verdict": difference.in_words(),
    }


def _owner_json(owner: bytes) -> dict[str, str]:
    try:
        return {"owner": owner.decode()}
    except UnicodeDecodeError:
        return {"owner_base64": base64.b64encode(owner).decode()}


def summary(report: VerifyReport) -> str:
    """The verdict in one line, and a line for each thing that is to be done about it."""
    lines = [
        f"{report.timelines:,} timelines in {report.buckets_done:,} of {report.buckets:,} buckets compared in "
        f"{report.seconds:.1f} s: {report.equal:,} equal, {report.differing:,} differing, {report.behind:,} behind, "
        f"{report.undecided:,} undecided" + (f", {report.mended:,} mended" if report.mended else "")
    ]
    if not report.timelines:
        lines.append("there is not one timeline to compare")
    for left_out in report.not_compared:
        lines.append(
            f"not compared: {left_out.node}, from bucket {left_out.bucket} on: {left_out.reason}. "
            "`timetier status` says how it is; run this again when it votes"
        )
    left = [difference for difference in report.differences if not difference.mended]
    if any(difference.outliers for difference in left):
        lines.append("`timetier repair` replaces what a replica has by what the majority has")
    if any(difference.kind == "differs" and not difference.outliers for difference in left):
        lines.append("where no majority agrees nothing is mended: compare such a timeline with a backup")
    if report.undecided:
        lines.append("undecided: run this again when less is written, or when the sink has ended")
    lines.append("all replicas are equal" if report.ok else "the replicas are NOT all equal, or not all were compared")
    return "\n".join(lines)
