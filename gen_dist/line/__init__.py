"""The loss along the direction, `phi(a) = L(theta - a d)`: on this rank, and over all ranks together."""
