"""SkyRL-tx sampling over jaxcache: see `adapter`."""
