"""The state of a run, read from its directory alone: what pages, figures, control and reports show of a run.

The driver writes the directory first, so a run that goes is read as one that has ended; any process that sees the files
reads the same. A look costs what is new. `RunState(path)`, `refresh()`, `snapshot()`.

A snapshot is a tree that JSON can hold; what is not known is None, an empty list or "". L MoE layers, E experts, R
ranks, S slots. It has the number `version`, which grows with each change, `changed` with the version of the last change
of each part, and these parts:

- `run`: name, path, state (of `driver.states.State`, such as stepping, paused or stopped), why (of the state),
  outcome (done, interrupted, failed; "" while there is none), error, alive (whether its process runs; None: cannot be
  told), started, seen (UTC, ISO), attempts, done (steps), steps (of the whole run), config (secrets masked).
- `model`: type, parameters, layers, experts, top_k, tokens (of a step), data, what else the start event says.
- `membership`: epoch, counts of ranks (desired, allocated, active, waiting, joining, ready; planned_leaves, failures),
  reason, ranks [R] (rank, member, node, node_id, host, address, device, pid, state: active or slow), epochs (each:
  epoch, attempt, time, step, ranks).
- `placement`: version, num_experts, slots [L][R][S] (expert, -1: empty), primary [L][E] (rank), since [L][E] (version
  that put it there), versions (each: version, time, step, epoch, cause (start, rebalance, asked, membership,
  handover, loss), words, moved (experts), gain_predicted and gain_measured (seconds a step), move_predicted and
  move_seconds, ...).
- `steps`: step [n], stride, columns (name -> [n]), phase_seconds (name -> [n] seconds), max_expert_load [L] of the
  newest step, mark, after: given back as `mark`, the next snapshot has only the steps `after` that one (None: all).
- `load`: of the newest steps (recent_steps, recent_seconds) experts [L][E] and ranks [L][R] tokens; of all steps under
  this placement (steps) experts_all [L][E]; run [L][E] as of the last checkpoint;
  pairs: what `RunState.pairs` is counted over: run (until the last checkpoint), recent (a sample), "" (nothing).
- `links`: node_of [R], bandwidth [R][R] bytes/s, latency [R][R] s, measured [R][R], groups [R], measured_at, sent
  [R][R] bytes a step, rank to rank, in the newest steps.
- `exchange`: words, timings (kind, transport, seconds, rounds, taken).
- `events`: total, kinds (name -> how many), newest (each: time, step, kind, message, fields), time_line (the same, with
  `entry`, see `events.entry_of`).

Bounds: 2,000 steps (every Nth of the older ones, the newest 1,000 whole), 500 events, 1,000 entries of the time line,
2,000 versions, 200 epochs. Imports NumPy, PyYAML, the placement and the run directory's lock.
"""

from ray_ep.observe.state.files import masked
from ray_ep.observe.state.placements import Moved
from ray_ep.observe.state.run_state import PARTS, RunState

__all__ = ["PARTS", "Moved", "RunState", "masked"]
