"""Which rank is named when probing fails, and what is refused before a cluster is started."""

import pytest

import ray_ep
from ray_ep.driver.actors.cause import unreachable
from ray_ep.driver.actors.probe import probe_cluster
from ray_ep.errors import ConfigError


@pytest.mark.parametrize(
    ("partners", "silent", "lost"),
    [
        ({0: 1}, [1], 1),  # it says nothing, and its partner waited in vain
        ({0: 1}, [1, 2, 3], 1),  # the others wait for the round to end
        ({0: 1, 1: 0, 2: 1}, [3], 1),  # two could not reach it; it still speaks to the driver
        ({0: 1, 1: 0}, [], 0),  # one link is cut: either end
        ({0: None, 2: None}, [1], 1),  # everybody met but one
        ({0: None}, [1, 2], None),
        ({0: None, 1: None}, [], None),
    ],
)
def test_the_rank_that_the_others_could_not_reach_is_found(partners, silent, lost):
    assert unreachable(partners, silent) == lost


def test_one_rank_has_no_links_to_probe():
    with pytest.raises(ConfigError, match="at least 2"):
        probe_cluster(ray_ep.load_config(None, ["cluster.ranks=1"]), 1.0, lambda: False)
