import tomllib
from pathlib import Path

import pytest

from dig_jax.cli.number_lists import labels
from dig_jax.data.class_names import class_index, display_name, imagenet_ids, match_classes
from dig_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]
ANIMALS = ("cat", "Guinea_pig", "sea-lion")


def test_imagenets_classes_are_a_thousand_in_the_order_of_their_ids():
    ids = imagenet_ids()
    assert len(ids) == 1000
    assert list(ids) == sorted(set(ids))
    first, last = "n01440764", "n15075141"
    assert (ids[0], ids[-1]) == (first, last)
    for index, name in [
        (0, "tench"),
        (207, "golden retriever"),
        (281, "tabby"),
        (388, "giant panda"),
        (717, "pickup"),
        (850, "teddy"),
        (979, "valley"),
        (999, "toilet tissue"),
    ]:
        assert display_name(ids[index]) == name
        assert class_index(name, ids) == class_index(ids[index], ids) == index


@pytest.mark.parametrize(
    "name", ["golden retriever", "Golden Retriever", "golden_retriever", "golden-retriever", "n02099601"]
)
def test_a_class_is_found_by_its_id_and_by_its_name_however_it_is_written(name):
    assert class_index(name, imagenet_ids()) == 207
    assert class_index(name, ("n01440764", "n02099601")) == 1


def test_every_name_of_a_class_is_found():
    assert class_index("coon bear", imagenet_ids()) == 388
    assert class_index("jack-o'-lantern", imagenet_ids()) == 607
    assert class_index("Tinca tinca", ("goldfish, Carassius auratus", "tench, Tinca tinca")) == 1


def test_names_of_other_data_are_found_as_they_are():
    assert [class_index(name, ANIMALS) for name in ("CAT", "guinea pig", "Sea Lion")] == [0, 1, 2]
    assert class_index("3", tuple("0123456789")) == 3
    assert display_name("Guinea_pig") == "Guinea_pig"
    assert display_name("tench, Tinca tinca") == "tench"


@pytest.mark.parametrize(
    "name, told",
    [
        ("golden retreiver", "unknown class 'golden retreiver'; did you mean 'golden retriever'?"),
        ("panda bear cub", "unknown class 'panda bear cub'; did you mean 'panda bear'?"),
        ("xyzzy", "unknown class 'xyzzy'"),
        ("", "unknown class ''"),
        (
            "cat",
            "unknown class 'cat'; did you mean 'tabby cat' or 'tiger cat' or 'Persian cat'?",
        ),
        (
            "crane",
            "ambiguous class 'crane'; expected an index: 134 (n02012849: crane) or 517 (n03126707: crane)",
        ),
        ("maillot", "638 (n03710637: maillot) or 639 (n03710721: maillot, tank suit)"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_answered_with_suggestions(name, told):
    with pytest.raises(ValueError) as caught:
        class_index(name, imagenet_ids())
    assert str(caught.value).endswith(told)


def test_few_classes_are_listed_where_none_is_near():
    with pytest.raises(ValueError, match="unknown class 'cta'; did you mean 'cat'"):
        class_index("cta", ANIMALS)
    with pytest.raises(ValueError, match="unknown class 'horse'; expected cat, Guinea_pig, sea-lion"):
        class_index("horse", ANIMALS)


def test_without_classes_there_are_no_names():
    with pytest.raises(ValueError, match="unknown class 'cat': the model has no classes"):
        class_index("cat", ())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0,3,5-7", [0, 3, 5, 6, 7]),
        ("golden retriever,tabby", [207, 281]),
        ("9, golden_retriever ,1-2,n01440764", [9, 207, 1, 2, 0]),
        ("T-shirt", [610]),
    ],
)
def test_labels_are_indices_ranges_and_names(text, expected):
    assert labels(text, imagenet_ids()).tolist() == expected
    assert labels(None, imagenet_ids()) is None


def test_what_is_written_in_digits_is_an_index_whatever_the_classes_are_called():
    assert labels("2,10", ("1", "10", "100", "2")).tolist() == [2, 10]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"dog, puppy"', [1]),
        ('dog,"dog, puppy" , "a,b",0-1', [0, 1, 2, 0, 1]),
        ('"10","2"', [4, 5]),
        ('Cat,cat,"cat"', [6, 7, 7]),
    ],
)
def test_names_in_double_quotes_may_have_commas_and_digits(text, expected):
    assert labels(text, ("dog", "dog, puppy", "a,b", "x", "10", "2", "Cat", "cat")).tolist() == expected


def test_an_equal_name_wins_over_one_of_several_and_over_case():
    names = ("dog, puppy", "Dog", "CAT", "cat")
    assert [class_index(name, names) for name in ("Dog", "DOG", "puppy", "CAT", "cat")] == [1, 1, 0, 2, 3]
    with pytest.raises(ValueError, match=r"ambiguous class 'Cat'; expected an index: 2 \(CAT\) or 3 \(cat\)"):
        class_index("Cat", names)


def test_an_index_that_is_also_the_name_of_another_class_is_told(caplog):
    names = tuple(sorted(map(str, range(12))))
    assert labels("0,2", names).tolist() == [0, 2]
    (record,) = caplog.records
    assert record.getMessage() == (
        "--labels: 2 is an index here, of class '10'; for the class named '2' use its index 4, or the name in"
        " double quotes: --labels='\"2\"'"
    )
    caplog.clear()
    assert labels("0,1", names).tolist() == [0, 1]
    assert labels('"2"', names).tolist() == [4]
    assert labels("2,3", ("a", "b", "c", "d")).tolist() == [2, 3]
    assert not caplog.records


@pytest.mark.parametrize(
    "text, told",
    [
        ('"tench', "unknown class '\"tench'"),
        ('""', "unknown class ''"),
        ("tench,golden retreiver", "--labels: unknown class 'golden retreiver'; did you mean"),
        ("3-", "--labels='3-'; expected numbers and ranges"),
        ("7-5,tench", "--labels='7-5,tench'; expected numbers and ranges"),
        ("tench,,3", "; expected numbers and ranges"),
        ("0-9999999,tench", "--labels='0-9999999,tench'; expected at most a million"),
    ],
)
def test_invalid_labels_raise_one_line(text, told):
    with pytest.raises(ConfigError, match=told):
        labels(text, imagenet_ids())


def test_classes_are_matched_by_any_of_their_names():
    known = ("n02099601", "tench, Tinca tinca", "Sea_lion", "n02012849", "n03126707")
    names = ("golden retriever", "n01440764", "sea lion", "crane", "horse")
    assert match_classes(names, known) == [0, 1, 2, None, None]


def test_data_files_are_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["dig_jax"]
    package = ROOT / "dig_jax"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert installed == files != set()
