"""Fabric `tcp`: a star of sockets, one between the router and each shard."""
