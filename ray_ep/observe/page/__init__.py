"""The page of a run: served live beside it, and the same as one self-contained file; what it shows is in observe/state.

`assets` finds the page's source and the chart library, `html` puts a page together, `data` and `summary` say what it
shows, `report` writes the file, `server` answers requests, `serving` runs it in a thread of its own.
"""
