"""A LightningDataModule of ratings: those of a file, or those of a generated matrix."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_compress.baselines.loader import TensorLoader
from lightning_compress.core.given import real_number, whole_number

_USER, _ITEM = ("user", "userid", "user_id"), ("item", "itemid", "item_id", "movie", "movieid", "movie_id")
_FORMATS = "tabs (MovieLens 100K's u.data), '::' (MovieLens 1M's ratings.dat), or commas below a header (ratings.csv)"


def read_ratings(path: str | Path) -> tuple[Tensor, Tensor, tuple[list[str], list[str]]]:
    """Read a file with one rating per line: user, item, rating, and perhaps more, such as a time.

    The columns are separated by tabs or by "::", without a header, or by commas, below a header that names them: user,
    userId or user_id; item or movie, likewise; and rating.

    Returns:
        The pairs (user, item), a LongTensor of shape (N, 2) whose indices count from 0; the ratings, of shape (N,); and
        the names of the users and of the items in the file, by index.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has no ratings, another format, a line that is no rating, or two ratings of one pair; the
            message quotes the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no ratings file {path}: give the path of one, with columns by {_FORMATS}.")
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for number, line, (user, item, value) in _rows(path):
        try:
            rating = math.nan if "_" in value else float(value)  # Python reads 1_0 as 10
        except ValueError:
            rating = math.nan
        if not abs(rating) <= torch.finfo(torch.float32).max or not user or not item:
            raise ValueError(
                f"{path}, line {number}, is no rating: {line!r}. A line must have a user, an item and a finite number."
            )
        earlier, _ = found.setdefault((user, item), (number, rating))
        if earlier != number:
            raise ValueError(
                f"{path}, line {number}, rates again what line {earlier} has rated: {line!r}. The test would know the "
                "answer from the training: keep one of both lines."
            )
    if not found:
        raise ValueError(f"{path} has no ratings: it must have one per line, with columns by {_FORMATS}.")
    users, items = (sorted({pair[side] for pair in found}, key=lambda name: (len(name), name)) for side in (0, 1))
    user_index, item_index = ({name: index for index, name in enumerate(names)} for names in (users, items))
    pairs = torch.tensor([(user_index[user], item_index[item]) for user, item in found])
    return pairs, torch.tensor([rating for _, rating in found.values()]), (users, items)


def _rows(path: Path) -> Iterator[tuple[int, str, tuple[str, str, str]]]:
    """Yield the number, the text, and the three columns of each line that is not blank."""
    places: tuple[int, ...] = (0, 1, 2)
    separator = None
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, whole in enumerate(file, start=1):
                line = whole.rstrip("\r\n")
                if not line.strip():
                    continue
                if separator is None:
                    separator = next((one for one in ("\t", "::", ",") if one in line), None)
                    if separator is None:
                        raise ValueError(f"{path} has columns by none of {_FORMATS}: line {number} is {line!r}.")
                    if separator == ",":
                        places = _header(path, number, line)
                        continue
                cells = next(csv.reader([line])) if separator == "," else line.split(separator)
                if len(cells) <= max(places):
                    raise ValueError(
                        f"{path}, line {number}, is no rating: {line!r} has {len(cells)} of the {max(places) + 1}"
                        f" columns by {separator!r} that are needed."
                    )
                yield number, line, tuple(cells[place].strip() for place in places)  # type: ignore[misc]  # 3
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}. Columns must be by {_FORMATS}.") from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {number}, can't be read: {error}. Columns must be by {_FORMATS}."
            ) from error


def _header(path: Path, number: int, line: str) -> tuple[int, ...]:
    names = [cell.strip().lower() for cell in next(csv.reader([line]))]
    places = [
        next((place for place, name in enumerate(names) if name in known), None)
        for known in (_USER, _ITEM, ("rating",))
    ]
    if None in places:
        raise ValueError(
            f"{path}, line {number}: a file with commas must begin with a header that names a user, an item (or movie) "
            f"and a rating, as in 'userId,movieId,rating,timestamp'; got {line!r}."
        )
    return tuple(place for place in places if place is not None)


def generated_ratings(
    users: int, items: int, *, count: int, rank: int, nonlinear: float, noise: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return pairs and ratings of a matrix that is a low-rank one plus a nonlinear one, in half stars from 0.5 to 5.

    User u and item v have biases b and c, vectors p and q, and thresholds x and y: the rating is
    3.5 + 0.3 b_u + 0.4 c_v + 0.5 p_u q_v / sqrt(rank) + `nonlinear` sum over j of tanh(4 (x_uj - y_vj)) / 2 + noise,
    where j = 1, 2 and all numbers are standard normal ones. The matrix of a threshold has no low rank. Some users and
    items have many more ratings than others.

    Args:
        users: The number of users.
        items: The number of items.
        count: The number of ratings.
        rank: The rank of the linear part.
        nonlinear: The weight of the nonlinear part.
        noise: The standard deviation of the noise.
        seed: The seed of everything.

    Returns:
        Pairs (user, item), of shape (N, 2), and ratings, of shape (N,).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    b, c, p, q, x, y = (
        normal(users),
        normal(items),
        normal(users, rank),
        normal(items, rank),
        normal(users, 2),
        normal(items, 2),
    )
    linear = 0.3 * b[:, None] + 0.4 * c + 0.5 * p @ q.T / math.sqrt(max(rank, 1))
    thresholds = torch.tanh(4 * (x[:, None] - y)).sum(2) / 2
    # The largest Gumbel keys of logarithms are a sample without replacement, with probabilities by these.
    keys = normal(users)[:, None] + normal(items) - torch.empty(users, items).exponential_(generator=generator).log()
    chosen = keys.flatten().topk(count).indices.sort().values
    stars = (3.5 + linear + nonlinear * thresholds).flatten()[chosen] + noise * normal(count)
    return torch.stack([chosen // items, chosen % items], 1), (2 * stars).round().div(2).clamp(0.5, 5.0)


class Ratings(LightningDataModule):
    """Ratings of items by users: those of a file, or generated ones, split at random.

    Batches are pairs (user, item) of shape (N, 2) and ratings minus `mean`, the mean of the training ratings, of shape
    (N,). The root mean square error is the same without it.

    Args:
        path: The file, in one of the formats of `read_ratings`; None: a generated matrix, see `generated_ratings`.
        users: The number of users, which the network must have too; for a file None takes what the file has.
        items: The number of items, likewise.
        count: The number of generated ratings.
        rank: The rank of the linear part of the generated matrix.
        nonlinear: The weight of its nonlinear part.
        noise: The standard deviation of its noise.
        test_share: The share of the ratings that are for the test.
        val_share: The share of the others that are for validation; with 0 there is no validation part.
        batch_size: The number of ratings in a training batch, per rank; None: all of them.
        eval_batch_size: The number of ratings in a validation or test batch, per rank.
        seed: The seed of the training order.
        split_seed: The seed of the split and of the generated matrix.

    Raises:
        ValueError: A number is out of range, or the file has other numbers of users or items than it should.

    Example:
        >>> data = Ratings(users=40, items=30, count=500)
        >>> data.setup()
        >>> pairs, ratings = next(iter(data.train_dataloader()))
        >>> pairs.shape, ratings.shape
        (torch.Size([428, 2]), torch.Size([428]))
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        users: int | None = 400,
        items: int | None = 300,
        count: int = 24_000,
        rank: int = 3,
        nonlinear: float = 1.0,
        noise: float = 0.3,
        test_share: float = 0.1,
        val_share: float = 0.05,
        batch_size: int | None = None,
        eval_batch_size: int = 20_000,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if path is None and (users is None or items is None or not (users > 0 and 0 < count <= users * items)):
            raise ValueError(
                f"A generated matrix needs users, items, and a count of ratings from 1 to users * items; got"
                f" users={users}, items={items}, count={count}."
            )
        for name, number, least in (("count", count, 1), ("rank", rank, 0), ("eval_batch_size", eval_batch_size, 1)):
            whole_number(number, f"{name} of Ratings is a whole number, {least} or more", least=least)
        if batch_size is not None:
            whole_number(batch_size, "batch_size of Ratings is a whole number, 1 or more, or None for all", least=1)
        real_number(nonlinear, "nonlinear is the weight of the nonlinear part, a finite number")
        real_number(noise, "noise is a standard deviation, 0 or more", least=0)
        real_number(
            test_share, "test_share is the share of the ratings for the test, above 0 and below 1", above=0, below=1
        )
        real_number(
            val_share, "val_share is the share of the others for validation, from 0 and below 1", least=0, below=1
        )
        self.path = None if path is None else Path(path)
        self.users, self.items = users, items
        self.count, self.rank, self.nonlinear, self.noise = count, rank, nonlinear, noise
        self.test_share, self.val_share = test_share, val_share
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.split_seed = seed, split_seed
        self.mean = math.nan
        self._parts: list[tuple[Tensor, Tensor]] = []  # for training, validation and test

    def setup(self, stage: str | None = None) -> None:
        """Read and split the ratings, once for all stages."""
        if self._parts:
            return
        pairs, ratings = self._read()
        order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(self.split_seed))
        tests = round(self.test_share * len(order))
        validations = round(self.val_share * (len(order) - tests))
        train = len(order) - tests - validations
        if not tests or not train or (self.val_share and not validations):
            raise ValueError(
                f"test_share={self.test_share} and val_share={self.val_share} of {len(order)} ratings leave {train} for"
                f" training, {validations} for validation and {tests} for the test: each part needs one rating."
            )
        test, val = order[:tests], order[tests : tests + validations]
        rest = order[tests + validations :].sort().values
        self.mean = float(ratings[rest].mean())
        self._parts = [(pairs[part], ratings[part] - self.mean) for part in (rest, val, test)]

    def _read(self) -> tuple[Tensor, Tensor]:
        if self.path is None:
            assert self.users is not None, "__init__ has checked it"
            assert self.items is not None, "__init__ has checked it"
            return generated_ratings(
                self.users, self.items, count=self.count, rank=self.rank, nonlinear=self.nonlinear, noise=self.noise,
                seed=self.split_seed,
            )  # fmt: skip
        pairs, ratings, (users, items) = read_ratings(self.path)
        if self.users not in (None, len(users)) or self.items not in (None, len(items)):
            raise ValueError(
                f"{self.path} has {len(users):,} users and {len(items):,} items, and users={self.users} and"
                f" items={self.items} were given: set users={len(users)} and items={len(items)}."
            )
        self.users, self.items = len(users), len(items)
        return pairs, ratings

    def _part(self, number: int) -> tuple[Tensor, Tensor]:
        assert self._parts, "setup has not run"
        return self._parts[number]

    def train_dataloader(self) -> TensorLoader:
        """Return all training ratings as one batch, or shuffled batches of `batch_size`; as many on every rank."""
        pairs, ratings = self._part(0)
        return TensorLoader(
            pairs,
            ratings,
            batch_size=self.batch_size or len(ratings),
            shuffle=self.batch_size is not None,
            seed=self.seed,
            even_ranks=True,
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """Return the validation ratings, each on one rank; an empty list if there are none."""
        return TensorLoader(*self._part(1), batch_size=self.eval_batch_size) if self.val_share else []

    def test_dataloader(self) -> TensorLoader:
        """Return the test ratings, each on one rank."""
        return TensorLoader(*self._part(2), batch_size=self.eval_batch_size)

    def predict_dataloader(self) -> TensorLoader:
        """Return the test ratings."""
        return self.test_dataloader()
