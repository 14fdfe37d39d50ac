import pytest
import torch

from lowland.studies.data.dataset import DataError
from lowland.studies.data.tables import read_csv


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("cells", "classes", "y"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        (["True", "False", "True"], ("False", "True"), [1, 0, 1]),
        (["10", "2", "2"], ("2", "10"), [1, 0, 0]),
        (["1", "1.0", "0"], ("0", "1"), [1, 1, 0]),
        (["1.5", "-3", "1.5"], ("-3", "1.5"), [1, 0, 1]),
        (["b", "1", "b"], ("1", "b"), [1, 0, 1]),
    ],
)
def test_a_target_of_any_type_becomes_zero_and_one(tmp_path, cells, classes, y):
    rows = "\n".join(f"{i},{cell}" for i, cell in enumerate(cells))
    dataset = read_csv(write(tmp_path, f"a,t\n{rows}\n"), "t")
    assert dataset.classes == classes
    assert dataset.y.tolist() == y
    assert dataset.name == "table"


@pytest.mark.parametrize(
    ("cells", "classes", "y"),
    [
        (["c", "a", "b", "a"], ("a", "b", "c"), [2, 0, 1, 0]),
        (["10", "2", "3.0", "3"], ("2", "3.0", "10"), [2, 0, 1, 1]),
        (["1", "x", "10", "2"], ("1", "10", "2", "x"), [0, 3, 1, 2]),
    ],
)
def test_a_target_of_many_classes_is_numbered_in_their_order(tmp_path, cells, classes, y):
    rows = "\n".join(f"{i},{cell}" for i, cell in enumerate(cells))
    dataset = read_csv(write(tmp_path, f"a,t\n{rows}\n"), "t")
    assert dataset.classes == classes
    assert dataset.y.tolist() == y
    assert dataset.y.dtype == torch.int64
    assert sum(dataset.counts) == len(cells)


@pytest.mark.parametrize("name", ["NA", "na", "None", "null", "NULL", "?", "n/a", "N/A", "-"])
def test_a_class_may_have_a_name_that_is_also_a_word_for_nothing(tmp_path, name):
    text = f"a,t\n1,{name}\n2,yes\n3,{name}\n4,no\n"
    dataset = read_csv(write(tmp_path, text), "t")
    assert dataset.classes == tuple(sorted((name, "yes", "no")))
    assert [dataset.classes[int(label)] for label in dataset.y] == [name, "yes", name, "no"]


def test_classes_may_all_have_such_names(tmp_path):
    dataset = read_csv(write(tmp_path, "a,t\n1,NA\n2,None\n3,NA\n4,?\n"), "t")
    assert dataset.classes == ("?", "NA", "None")
    assert dataset.y.tolist() == [1, 2, 1, 0]


def test_what_is_asked_of_a_label_that_is_none_makes_it_a_class(tmp_path):
    text = "a,t\n1,0\n2,NA\n3,1\n4,0\n"
    with pytest.raises(DataError, match="such as 'no label'"):
        read_csv(write(tmp_path, text), "t")
    assert read_csv(write(tmp_path, text.replace("NA", "no label")), "t").classes == (
        "0",
        "1",
        "no label",
    )


def test_true_and_false_in_a_feature_are_one_and_zero(tmp_path):
    text = "a,b,t\nTrue,FALSE,x\n false,true,y\n"
    assert read_csv(write(tmp_path, text), "t").x.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_columns_may_be_counted(tmp_path):
    assert read_csv(write(tmp_path, "0,1,2\n5.5,1,x\n3,4,y\n"), "2").features == ("0", "1")


def test_a_table_is_read_whatever_its_spaces_quotes_and_line_ends(tmp_path):
    text = '\ufeff a ,"b, c",t\r\n 1 , 2.5e3,x\r\n\r\n"3",4, y \r\n'
    dataset = read_csv(write(tmp_path, text), "t")
    assert dataset.features == ("a", "b, c")
    assert dataset.x.tolist() == [[1.0, 2500.0], [3.0, 4.0]]
    assert dataset.classes == ("x", "y")


BAD_TABLES = {
    "empty": ("", "is empty; it needs a header line and rows"),
    "blank": ("\n\n", "is empty"),
    "header only": ("a,t\n", "has a header line but no rows"),
    "not UTF-8": ("a,t\n1,h\xe9\n".encode("latin-1"), "not text in UTF-8; save it as"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "not text in UTF-8"),
    "ragged": ("a,t\n1,x\n2,y,z\n", "not a comma-separated table: Expected 2 fields in line 3"),
    "no target": ("a,b\n1,2\n3,4\n", "no column 't' in .*; its columns are 'a', 'b'"),
    "semicolons": ("a;t\n1;x\n2;y\n", "'a;t'; columns must be separated by commas"),
    "target alone": ("t\nx\ny\n", "has no column beside the target 't'"),
    "duplicate names": ("a,a,t\n1,2,x\n3,4,y\n", "several columns named 'a'; give each its own"),
    "no header": ("17.5,20,M\n1,2,B\n", "first line .* must name the columns, .* number '17.5'"),
    "negative": ("3,-4,M\n1,2,B\n", "holds the number '-4'; add a header line"),
    "whole numbers": ("3,4,M\n1,2,B\n", "'3', '4', 'M'; if that is data, add a header line"),
    "equal numbers": ("0,0,M\n1,2,B\n", "several columns named '0'; .* add a header line if"),
    "nameless column": (",a,t\n0,1,x\n1,2,y\n", "column 1 of .* has no name in the header"),
    "one class": ("a,t\n1,x\n2,x\n", "'t' must have two classes or more; it has one: 'x'"),
    "missing target": ("a,t\n1,x\n2,\n3,y\n", "target 't' is empty or NaN, in row 2; if that is a"),
    "NaN target": ("a,t\n1,x\n2,NaN\n3,y\n", "target 't' is empty or NaN, in row 2; .* drop those"),
    "no number": (
        "a,t\n1,0\n2,NA\n3,1\n4,?\n",
        "'t' is 'NA' where other .* numbers, in rows 2, 4;",
    ),
    "NaN": ("a,t\n1,x\nNaN,x\n3,y\nnan,y\n,y\n?,y\n", "NaN in rows 2, 4, 5 and 1 more; impute"),
    "short row": ("a,b,t\n1,x\n2,3,y\n", "the target 't' is empty or NaN, in row 1"),
    "text": ("a,t\n1,x\nred,y\n", "'a' must hold numbers; it has text in row 2, such as 'red'"),
    "half booleans": ("a,t\nTrue,x\n1,y\nFalse,y\n", "text in rows 1, 3, such as 'True'; encode"),
    "one boolean": ("a,t\nTrue,x\ntrue,y\n", r"'a' is constant \(True\)"),
    "infinite": ("a,t\n1,x\n-inf,y\n", "must hold finite numbers; it is infinite in row 2"),
    "overflow": ("a,t\n1,x\n1e999,y\n", "infinite in row 2"),
    "constant": ("a,b,t\n1,7,x\n2,7.0,y\n", r"'b' is constant \(7\), .*; drop it"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_csv(write(tmp_path, text), "t")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cells",
    [
        [f"{i / 7:.2f}" for i in range(60)],  # a measurement
        [str(1000 + 7 * i) for i in range(60)],  # a count
        [f"{i % 25 / 10}" for i in range(600)],  # on a coarse scale
        ["0.5", "1.25", "2.5", "3", "4"],  # in a small table
        [f"patient {i}" for i in range(60)],
    ],
)
def test_a_target_that_is_a_quantity_is_refused(tmp_path, cells):
    rows = "\n".join(f"{i},{cell}" for i, cell in enumerate(cells))
    message = (
        rf"'t' must name the class of each row; it has {len(set(cells))} different values in "
        rf"{len(cells)} rows, such as '{cells[0]}'.*choose a column of classes, or divide"
    )
    with pytest.raises(DataError, match=message):
        read_csv(write(tmp_path, f"a,t\n{rows}\n"), "t")


@pytest.mark.parametrize(
    "cells", [["0.5", "1"], ["0.5", "1", "1.5"] * 9, [str(i) for i in range(26)] * 4]
)
def test_few_or_whole_numbers_are_classes(tmp_path, cells):
    rows = "\n".join(f"{i},{cell}" for i, cell in enumerate(cells))
    assert len(read_csv(write(tmp_path, f"a,t\n{rows}\n"), "t").classes) == len(set(cells))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*missing\.csv"):
        read_csv(tmp_path / "missing.csv", "t")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_csv(tmp_path, "t")
