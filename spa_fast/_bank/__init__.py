"""What a GaussianBank is made of: moments gathered from a stream, and the factors that draws read."""
