"""Text features on disk: one shard per class's prompts or descriptions, encoded once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor, cat

from spa_fast.cil.backbone import Backbone
from spa_fast.cil.data.shards import Say, ShardFault, ShardFolder, digest


class TextCache:
    """Text features by token ids, so that neither file nor tokenizer can change unnoticed.

    Args:
        shards: where they are stored; a folder that cannot be written stores nothing.
        backbone: the frozen encoder.
        say: takes one line on each shard that cannot be used.
    """

    def __init__(self, shards: ShardFolder, backbone: Backbone, say: Say = lambda line: None) -> None:
        self.shards = shards
        self.backbone = backbone
        self.say = say

    def encode(self, texts: Sequence[str], word_limit: int = 0) -> Tensor:
        """End-of-text features [n, D] of n texts, or the features of their words, `word_limit` a text."""
        ids = self.backbone.tokenizer(list(texts)).tolist()
        key = digest([ids, word_limit])
        name = f"{'words' if word_limit else 'ends'}-{key[:24]}.safetensors"
        try:
            metadata, tensors = self.shards.read(name)
            if metadata.get("key") == key:
                return tensors["features"]
        except ShardFault as fault:
            if str(fault) != "not there":
                self.say(f"feature cache: {self.shards.path / name}: {fault}; encoded again")
        if word_limit:
            features = cat(self.backbone.encode_words(texts, word_limit))
        else:
            features = self.backbone.encode_texts(texts)
        # Texts take seconds: no reason to end a run that may only read.
        with contextlib.suppress(OSError):
            self.shards.write(name, {"key": key}, {"features": features})
        return features
