"""The hand-over from one cluster to the next, when a redeploy brings another model or settings that need new workers.

The old cluster serves until the new one can, where the resources allow both. The new one waits `handover_timeout` for
its resources. Then it asks the old one to give way, and Serve sends new requests to the new one, where they wait. The
old one finishes those that it has accepted, and ends. An old cluster that no API replica uses ends in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_moe.cluster.facts.facts import Choice
from elastic_moe.cluster.lines import counted

UNUSED_S = 10.0
"""Seconds without an API replica after which a cluster that another one has replaced ends."""

SWITCH_S = 15.0
"""Seconds that Serve has to send requests to the next cluster, before one that gives way refuses them."""


@dataclass(slots=True, kw_only=True)
class Succession:
    """Whether a cluster goes on that a redeploy may replace. Its coordinator owns this object."""

    replaced_since: float | None = None
    """Since when another cluster is the wanted one; None: this one is."""
    unused_since: float | None = None
    """Since when no API replica has used this cluster."""
    gives_way_since: float | None = None
    """Since when this cluster has to end after its last request, because its successor needs its resources."""

    def give_way(self, now: float) -> None:
        if self.gives_way_since is None:
            self.gives_way_since = now

    def refuses(self, now: float) -> bool:
        """Whether new requests are refused, because they go on coming here and not to the next cluster."""
        return self.gives_way_since is not None and now - self.gives_way_since >= SWITCH_S

    def look(self, *, replaced: bool, replicas: int, running: int, most_s: float, now: float) -> Choice[bool]:
        """Whether the cluster is to end now.

        replaced: another cluster is the wanted one. replicas: API replicas that use this one. running: requests that
        they run, where one that may still accept some counts too. most_s: seconds that the requests may take at most
        once the cluster gives way.
        """
        if not replaced:
            self.replaced_since = self.unused_since = self.gives_way_since = None
            return Choice(False, "it is the wanted cluster")
        if self.replaced_since is None:
            self.replaced_since = now
        if replicas:
            self.unused_since = None
        elif self.unused_since is None:
            self.unused_since = now
        if self.unused_since is not None and now - self.unused_since >= UNUSED_S:
            return Choice(True, "it is no longer wanted, and no API replica uses it")
        if self.gives_way_since is None:
            return Choice(False, "it serves until the next cluster can")
        if not running:
            return Choice(True, "the next cluster needs its resources, and its last request has ended")
        if now - self.gives_way_since >= most_s:
            return Choice(
                True, f"the next cluster needs its resources, and {counted(running, 'request')} took too long"
            )
        return Choice(False, f"the next cluster needs its resources, and {counted(running, 'request')} must end first")


def asks_for_way(*, serves: bool, waited_s: float, patience_s: float) -> Choice[bool]:
    """Whether a new cluster asks the old ones to give way.

    waited_s: seconds for which one of its workers has waited for resources; 0 if none waits.
    """
    if serves:
        return Choice(False, "it can serve")
    if not waited_s:
        return Choice(False, "it has the resources that it needs")
    if waited_s < patience_s:
        return Choice(False, f"it waits for resources, at most {patience_s:g} s")
    return Choice(True, f"it has waited {waited_s:.0f} s for resources")
