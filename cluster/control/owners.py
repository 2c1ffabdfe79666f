"""The owners of the facts. Each fact has one, and what an owner does not own it gets as an argument."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.control.change import Epochs
from elastic_moe.cluster.control.draining import Draining
from elastic_moe.cluster.control.rebalancing import Rebalancing
from elastic_moe.cluster.control.scaling import Scaling
from elastic_moe.cluster.control.starting import Starts
from elastic_moe.cluster.control.undoing import Undoing
from elastic_moe.cluster.facts.counters import ClusterCounters
from elastic_moe.cluster.facts.facts import ControlSettings, Facts
from elastic_moe.cluster.facts.homes import Homes
from elastic_moe.cluster.facts.membership import Membership
from elastic_moe.cluster.facts.operations import OperationLog
from elastic_moe.cluster.messages.epochs import ModelInfo


class Owners:
    """See the module. Raises PlacementError for more workers than experts."""

    def __init__(self, settings: ControlSettings, model: ModelInfo) -> None:
        self.settings = settings
        self.model = model
        self.operations = OperationLog()
        self.counters = ClusterCounters()
        shape = (model.num_layers, model.num_logical_experts)
        self.load: npt.NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        """[L, E] tokens that were routed to each expert, as it was last counted."""
        self.membership = Membership(shape)
        self.homes = Homes()
        self.starts = Starts()
        self.draining = Draining()
        self.epochs = Epochs(settings, self.membership, self.operations, self.counters)
        self.rebalancing = Rebalancing(settings, self.operations, self.counters)
        self.undoing = Undoing(settings, self.operations, self.counters)
        self.scaling = Scaling(settings, model, self.membership, self.operations)

    @property
    def facts(self) -> Facts:
        """The facts as they are now. Later events make new facts and do not change these."""
        epochs, membership = self.epochs, self.membership
        return Facts(
            settings=self.settings,
            model=self.model,
            records=membership.records,
            probing=membership.probing,
            busy=self.draining.busy,
            spec=epochs.spec,
            goal=epochs.goal,
            epoch_since=epochs.since,
            outage=epochs.outage,
            change=epochs.change,
            next_epoch=epochs.next_epoch,
            planning=self.rebalancing.planning,
            pinned=self.rebalancing.pinned,
            pins=self.rebalancing.pins,
            target=self.scaling.target,
            load=self.load,
            retry_at=epochs.retry_at,
            start_at=self.starts.at,
            fatal=self.starts.fatal,
        )
