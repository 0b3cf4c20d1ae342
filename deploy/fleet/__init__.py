"""The Fleet, which keeps the expert shards alive, its keepers, and the actors of the shards."""
