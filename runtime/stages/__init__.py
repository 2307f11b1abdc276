"""A pipeline's stages while they run: engines, workers, and the route through them."""
