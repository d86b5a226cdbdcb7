"""When ranks hang: what everybody was at then, kept in the run directory before any is killed."""
