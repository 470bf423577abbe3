"""Methods: the record of one, and the table of all."""
