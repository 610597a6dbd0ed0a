"""SPA on one page: python examples/train_spa.py DATA BACKBONE DESCRIPTIONS CLASSNAMES

Frozen features, per-task projectors that are summed, patches chosen by descriptions and aligned with them by
optimal transport, and Gaussian pseudo-features in place of old images. Everything is held in memory and
there are no options: copy it and change it. `spa-fast train` is the same method with all of them.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from spa_fast import GaussianBank, spa_scores, topk_patches
from spa_fast.cil.data.cache import FeatureCache
from spa_fast.cil.data.datasets import read_image_folders
from spa_fast.cil.data.order import class_order, split_tasks
from spa_fast.cil.descriptions.lint import read_descriptions
from spa_fast.cil.loading import load_backbone
from spa_fast.cil.projectors import ProjectorBank

INCREMENT, EPOCHS, BATCH, K, REPLAY, LOCAL = 10, 10, 64, 16, 4, 0.3

if len(sys.argv) != 5:
    sys.exit(__doc__)
data_dir, backbone_name, descriptions_file, classnames_file = sys.argv[1:]
torch.manual_seed(1)
backbone = load_backbone(backbone_name)
data = read_image_folders(Path(data_dir), Path(classnames_file))
descriptions = read_descriptions(Path(descriptions_file), data.names)
per_class = min(len(lines) for lines in descriptions)
features = FeatureCache(Path("runs/feature_cache"), data, backbone)
order = class_order(len(data.folders), seed=1993)
tasks = split_tasks(len(order), 0, INCREMENT)
tau, width = backbone.logit_scale, backbone.width


def load(split, labels):
    """Global tokens, patch tokens and labels of some classes."""
    parts = [features.load(split, order[label]) for label in labels]
    targets = torch.cat([torch.full((len(p),), label) for p, label in zip(parts, labels, strict=True)])
    return torch.cat([p.globals for p in parts]), torch.cat([p.patches for p in parts]).float(), targets


def local_scores(patches, frozen_patches):
    """Choose patches among frozen features, align them among projected ones."""
    return spa_scores(
        patches, textual(tokens), K, eps=0.1, select_patches=frozen_patches, select_tokens=tokens
    )


visual, textual = ProjectorBank(width), ProjectorBank(width)
images, parts = GaussianBank(), GaussianBank()
prompts, tokens = torch.zeros(0, width), torch.zeros(0, per_class, width)
accuracies = []

for labels in tasks:
    # Texts of the new classes: one prompt and as many descriptions as every class has.
    names = [data.names[order[label]] for label in labels]
    prompts = torch.cat([prompts, backbone.encode_texts([f"a photo of a {n}." for n in names])])
    for name, label in zip(names, labels, strict=True):
        lines = [f"{name} with {d.lower()}" for d in descriptions[order[label]][:per_class]]
        tokens = torch.cat([tokens, backbone.encode_texts(lines)[None]])

    # Train this task's projectors; those of earlier tasks are frozen inside the banks.
    x, p, y = load("train", labels)
    visual.add_task()
    textual.add_task()
    optimizer = torch.optim.SGD(visual.trainable() + textual.trainable(), 0.05, 0.9, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            whole, part, seen, seen_part = x[rows], torch.zeros(0, width), y[rows], y[:0]
            if labels.start:  # old classes live on as draws from their Gaussians
                drawn, drawn_labels = images.sample(REPLAY)
                whole, seen = torch.cat([whole, drawn]), torch.cat([seen, drawn_labels])
                part, seen_part = parts.sample(REPLAY)
            classes = F.normalize(textual(prompts), dim=-1)
            loss = F.cross_entropy(tau * F.normalize(visual(whole), dim=-1) @ classes.T, seen)
            scores = local_scores(visual(p[rows]), p[rows])
            # A drawn part is one patch: its plan is uniform, its score the mean cosine to the tokens.
            single = F.normalize(visual(part), dim=-1) @ F.normalize(textual(tokens), dim=-1).mean(1).T
            loss = loss + LOCAL * F.cross_entropy(
                tau * torch.cat([scores, single]), torch.cat([y[rows], seen_part])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    # Remember the new classes: whole images, and each image's mean over the patches its class chose.
    images.fit(x, y)
    for label in labels:
        own = p[y == label]
        kept = topk_patches(own, tokens[label, None], K)[1][:, 0]
        mean = own.gather(1, kept[..., None].expand(-1, -1, width)).mean(1)
        parts.fit(mean, torch.full((len(mean),), label))

    # Accuracy on every class seen so far.
    right = total = 0
    with torch.no_grad():
        for seen_labels in tasks[: tasks.index(labels) + 1]:
            x, p, y = load("test", seen_labels)
            scores = F.normalize(visual(x), dim=-1) @ F.normalize(textual(prompts), dim=-1).T
            scores = scores + LOCAL * local_scores(visual(p), p)
            right, total = right + int((scores.argmax(-1) == y).sum()), total + len(y)
    accuracies.append(100 * right / total)
    print(f"{labels.stop:4d} classes: {accuracies[-1]:.1f} %", flush=True)

print(f"average {sum(accuracies) / len(accuracies):.1f} %, last {accuracies[-1]:.1f} %")
