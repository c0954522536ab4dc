"""Examples of engines that share the cache of their node."""
