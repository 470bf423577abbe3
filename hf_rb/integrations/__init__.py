"""Registration with other libraries and with their command lines."""
