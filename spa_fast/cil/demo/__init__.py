"""The embedded benchmark: a drawn world, a tiny CLIP and the ablation ladder over them."""
