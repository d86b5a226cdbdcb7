"""What Ray's own autoscaler would start, given a configuration of its."""

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest


def launches(config, bundles, available=None):
    """{node type: machines} that are asked for where nothing runs and each of `bundles` is a pending placement group.

    `available`: share of 1 that a type has after a time-out, as Ray's CloudResourceMonitor tells it.
    """
    config = AutoscalingConfig({**config, "auth": {}}, skip_content_hash=True)  # it would read keys
    requests = [GangResourceRequest(requests=[ResourceRequestUtil.make(bundle)]) for bundle in bundles]
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=requests,
            recoverable_resource_availabilities=available or {},
        )
    )
    assert not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}
