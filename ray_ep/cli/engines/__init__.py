"""Files of other engines: opened, told apart by their content, written."""
