"""What a run exports to Prometheus, through Ray: the table of names, the figures of a run, and who hands them to Ray.

Nothing here changes a run or slows a step: figures are gathered in the listeners' thread, and sent from one beside it.
"""
