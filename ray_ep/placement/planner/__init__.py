"""The planner: searches for a placement whose predicted step is short, and what may change of the current one."""
