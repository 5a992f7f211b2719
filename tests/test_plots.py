import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.boards import boards
from oppu.plots import spread, table1_figure, write_figure
from oppu.tables import references_table, scores_table
from tests.synthetic import HOW, NEWS, RATING, both, reference, setting


def figure(settings, references):
    found = boards(settings, references, HOW)
    return table1_figure(scores_table(found), references_table(found))


def test_the_figure_is_the_same_bytes_each_time(tmp_path):
    references = {"LaMP_2N": {"user-majority": reference(NEWS, 0.6), "last-label": reference(NEWS, 0.6, seed=8)}}
    for name in ("a.svg", "b.svg"):
        write_figure(tmp_path / name, figure(both(NEWS) + both(RATING), references))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()


def test_panels_show_values_intervals_and_references():
    drawn = figure(both(NEWS) + both(NEWS, "k1"), {"LaMP_2N": {"user-majority": reference(NEWS, 0.6)}})
    (axes,) = drawn.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["k0", "k1"]
    assert [text.get_text() for text in axes.texts] == ["user majority"]
    assert len(axes.containers) == 2
    assert "accuracy (higher is better)" in axes.get_ylabel()
    assert "20 users, 100 queries" in axes.get_title(loc="left")


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_one_kind_alone_can_be_drawn_and_other_kinds_are_left_out(tmp_path, peft):
    settings = [setting(NEWS, "k0", peft, 0.5), setting(NEWS, "k0", "ia3", 0.9), setting(NEWS, "k1", "ia3", 0.9)]
    drawn = figure(settings, {})
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["k0"]
    write_figure(tmp_path / "one.svg", drawn)


@given(st.lists(st.floats(0, 1), max_size=9))
def test_labels_are_spread_in_order_and_apart(wanted):
    places = spread(wanted, 0.1, 0.0, 1.0)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert all(places[b] - places[a] >= 0.1 - 1e-9 for a, b in pairwise(order))


def test_labels_with_room_stay_where_they_belong():
    assert spread([0.8, 0.2, 0.5], 0.1, 0.0, 1.0) == [0.8, 0.2, 0.5]
