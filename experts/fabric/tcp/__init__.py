"""Fabric `tcp`: a star of sockets between the router and its shards."""
