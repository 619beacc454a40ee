"""The update direction `d` of any optimizer, such that its step is `theta <- theta - lr d`."""
