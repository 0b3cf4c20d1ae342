"""Who keeps the expert shards alive: the Fleet, its keepers, and the actors of the shards."""
