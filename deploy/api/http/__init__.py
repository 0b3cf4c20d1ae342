"""What stands before every route: the ASGI server's edges, access log, keys, errors."""
