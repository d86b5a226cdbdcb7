"""What a run shows of itself: the progress on the terminal, its state, and its page while it goes and afterwards.

Nothing here changes a run: it reads the run directory, or is handed the figures of a step. Import the modules by name
(`ray_ep.observe.progress`, `ray_ep.observe.page.report`), so that a page's parts load only when one is shown.
"""
