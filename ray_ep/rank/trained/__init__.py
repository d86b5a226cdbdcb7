"""Which parameters a run trains: all, all but frozen ones, or adapters beside them."""
