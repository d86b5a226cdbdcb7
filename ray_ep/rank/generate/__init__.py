"""Generation on one rank: requests, batches in lockstep over the ranks, sampling. Plain classes but for the actor."""
