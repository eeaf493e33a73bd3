"""Power cuts under a real guest; ``make cuts`` makes a hundred of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.durability.cuts import COMMANDS, SETTINGS, Campaign
from tests.durability.machine import SUPPORTED
from tests.processes.guest import MakeCluster, sync

CUTS = 3

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.fuse,
    pytest.mark.slow,
    pytest.mark.skipif(not SUPPORTED, reason="the parts of the guest are of another processor"),
]


@pytest.mark.expect_log(r"")
def test_sqlite_on_ext4_through_power_cuts(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=2, frontends=(1, 2), settings=SETTINGS, commands=COMMANDS)
    campaign = Campaign(cluster, tmp_path, seed=1)
    for number in range(CUTS):
        campaign.cut(number)
    assert campaign.checked == 3 * CUTS
    assert campaign.acked
    assert campaign.filed
    assert campaign.loss.sectors_lost, "nothing was lost: the cuts prove nothing"
    sync(cluster, "disk")
