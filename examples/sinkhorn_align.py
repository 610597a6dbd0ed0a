"""Score every class for every image by optimal transport between patches and class tokens."""

import torch

from spa_fast import SinkhornAlign

patches = torch.randn(8, 16, 512)  # 8 images, 16 patches each
tokens = torch.randn(100, 6, 512, requires_grad=True)  # 100 classes, 6 description tokens each

align = SinkhornAlign(eps=0.1, return_plan=True)
out = align(patches, tokens)
out.score.sum().backward()

print(f"scores {list(out.score.shape)}, plans {list(out.plan.shape)}")
print(f"iterations: mean {out.n_iter.float().mean():.1f}, all converged: {bool(out.converged.all())}")
print(f"gradient reaches the tokens: norm {tokens.grad.norm():.3f}")
