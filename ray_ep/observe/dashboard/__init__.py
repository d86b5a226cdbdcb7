"""Runs in the dashboard of Ray: their pages at its own address, a link in its navigation, files among its logs.

The pages themselves are in observe/page; here is how they are reached. `proxy.py` is what Ray's dashboard asks first,
`found.py` knows the pages of a cluster's runs, `index.py` puts the link, `session_logs.py` writes the files.
"""
