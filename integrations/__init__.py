"""Adapters that put jaxcache under engines of others. Each has pinned versions, and a test against the engine's own."""
