"""Faults on purpose: a run is disturbed at a fixed seed and pace, and what it lost is measured.

`schedule` says when what fails (pure), `grounds` has a cluster to do it on, `faults` does it, `observer` watches the
run, `report` counts (pure), `page` draws. `run` puts them together.
"""
