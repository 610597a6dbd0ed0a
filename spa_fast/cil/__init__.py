"""Class-incremental learning with CLIP: the method and its anchors."""
