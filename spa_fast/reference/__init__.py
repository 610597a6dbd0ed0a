"""Plain-PyTorch oracles: explicit forward and backward in any float dtype. Imports torch only."""
