from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress.baselines import Ratings
from lightning_compress.baselines.ratings import generated_ratings, read_ratings

ROWS = [(7, 30, 4.0), (7, 4, 3.5), (10, 30, 0.5), (2, 900, 5.0)]  # users 2, 7, 10; items 4, 30, 900
FORMATS = {
    "u.data": "".join(f"{user}\t{item}\t{rating}\t881250949\n" for user, item, rating in ROWS),
    "ratings.dat": "".join(f"{user}::{item}::{rating}::978300760\r\n" for user, item, rating in ROWS) + "\n",
    "ratings.csv": "\ufeffuserId,movieId,rating,timestamp\n"
    + "".join(f"{user},{item},{rating},1260759144\n" for user, item, rating in ROWS),
    "other.csv": "rating, item ,user\n" + "".join(f'{rating},"{item}",{user}\n' for user, item, rating in ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_ratings(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name].encode())
    pairs, ratings, (users, items) = read_ratings(path)
    assert (users, items) == (["2", "7", "10"], ["4", "30", "900"])
    assert pairs.tolist() == [[1, 1], [1, 0], [2, 1], [0, 2]]
    assert ratings.tolist() == [4.0, 3.5, 0.5, 5.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.txt has no ratings: it must have one per line"),
        ("userId,movieId,rating\n", "has no ratings"),
        ("1 2 3\n", r"columns by none of tabs .* line 1 is '1 2 3'"),
        ("1,2,3\n", "line 1: a file with commas must begin with a header .* got '1,2,3'"),
        ("user,score,rating\n", "must begin with a header"),
        ("1\t2\t3\n\n1\t2\n", r"line 3, is no rating: '1\\t2' has 2 of the 3 columns"),
        ("1\t2\tgood\n", r"line 1, is no rating: '1\\t2\\tgood'"),
        ("1::2::nan\n", "line 1, is no rating: '1::2::nan'. A line must have a user, an item and a finite number"),
        ("1::2::1e39\n", "line 1, is no rating: '1::2::1e39'"),  # infinite in float32
        ("1::2::1_0\n", "line 1, is no rating: '1::2::1_0'"),
        ("1:: ::3\n", "line 1, is no rating"),
        pytest.param(f"user,item,rating\n{'u' * 140_000},1,3\n", "line 2, can't be read: field larger", id="long"),
        ("1\t2\t3\n4\t2\t3\n1\t2\t5\n", r"line 3, rates again what line 1 has rated: '1\\t2\\t5'"),
    ],
)
def test_what_is_no_rating_is_quoted(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ratings(tmp_path / "a.txt")


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a\.zip is no text in UTF-8"):
        read_ratings(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match=r"no ratings file .*b\.csv"):
        read_ratings(tmp_path / "b.csv")


def test_the_split_is_random_by_seed_and_complete() -> None:
    def parts(**kwargs: Any) -> list[set[tuple[int, int]]]:
        data = Ratings(users=50, items=40, count=1000, batch_size=64, **kwargs)
        data.setup()
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        return [{(int(u), int(v)) for pairs, _ in loader for u, v in pairs} for loader in loaders]

    one, same, other = parts(), parts(seed=1), parts(split_seed=1)
    assert [len(part) for part in one] == [855, 45, 100]
    assert len(set.union(*one)) == 1000
    assert one == same
    assert one[2] != other[2]


def test_ratings_are_centred_on_the_training_part() -> None:
    data = Ratings(users=50, items=40, count=1000)
    data.setup("fit")
    ((pairs, ratings),) = data.train_dataloader()
    assert len(pairs) == 855
    assert ratings.mean().abs() < 1e-6
    assert 2.5 < data.mean < 4.5
    stars = (
        torch.cat([r for loader in (data.train_dataloader(), data.test_dataloader()) for _, r in loader]) + data.mean
    )
    assert ((2 * stars - (2 * stars).round()).abs() < 1e-4).all()
    assert (stars.min(), stars.max()) == (0.5, 5.0)
    whole = Ratings(users=50, items=40, count=1000, val_share=0.0)
    whole.setup()
    assert whole.val_dataloader() == []


def test_the_nonlinear_part_has_no_low_rank() -> None:
    def spectrum(nonlinear: float) -> torch.Tensor:
        pairs, ratings = generated_ratings(90, 80, count=7200, rank=3, nonlinear=nonlinear, noise=0.0, seed=0)
        assert len({(int(u), int(v)) for u, v in pairs}) == 7200
        values = torch.linalg.svdvals(torch.zeros(90, 80).index_put((pairs[:, 0], pairs[:, 1]), ratings - 3.5))
        return values[8:].square().sum() / values[3:].square().sum()  # rank 5 with the biases

    assert spectrum(1.0) > spectrum(0.0)


def test_a_file_must_have_as_many_users_and_items_as_said(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_text(FORMATS["u.data"])
    with pytest.raises(ValueError, match=r"has 3 users and 3 items, .* set users=3 and items=3"):
        Ratings(path, users=3, items=9).setup()
    data = Ratings(path, users=None, items=None, test_share=0.25, val_share=0.0)
    data.setup()
    assert (data.users, data.items) == (3, 3)
    with pytest.raises(ValueError, match=r"of 4 ratings leave 4 for training, 0 for validation and 0 for the test"):
        Ratings(path, users=3, items=3).setup()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 0}, "count of ratings from 1 to users"),
        ({"users": 3, "items": 2, "count": 7}, "users=3, items=2, count=7"),
        ({"users": None}, "users=None"),
        ({"users": -3, "items": -2, "count": 5}, "users=-3, items=-2, count=5"),
        ({"count": 9.5}, r"count of Ratings is a whole number, 1 or more; got 9\.5"),
        ({"rank": -1}, "rank of Ratings .*, 0 or more; got -1"),
        ({"batch_size": 0}, "batch_size of Ratings .*, or None for all; got 0"),
        ({"eval_batch_size": "9"}, "got the text '9'"),
        ({"noise": float("nan")}, "noise is a standard deviation, 0 or more; got nan"),
        ({"nonlinear": float("inf")}, "a finite number; got inf"),
        ({"test_share": 0.0}, r"test_share .*; got 0\.0"),
        ({"val_share": 1.0}, r"val_share .*; got 1\.0"),
    ],
)
def test_bad_settings_are_quoted(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ratings(**kwargs)
