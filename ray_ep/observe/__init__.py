"""What a run shows of itself: the progress on the terminal and the page it leaves behind.

Nothing here changes a run: it reads the run directory, or is handed the figures of a step. Import the modules by name
(`ray_ep.observe.progress`, `ray_ep.observe.report`), so that matplotlib and jinja2 load only when a page is written.
"""
