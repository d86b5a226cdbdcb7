"""What a LAB.yaml may say, and the messages for what it may not."""

import re

import pytest

from .conftest import NETLAB, labs, netlab

HOSTS = "hosts: [{name: a}, {name: b, ranks: 2}, {name: c, cpus: 4}]\n"


def read(tmp_path, text):
    path = tmp_path / "some-lab.yaml"
    path.write_text(text)
    return labs.read_lab(path)


def test_a_lab_is_named_after_its_file_and_hosts_have_a_cpu_a_rank(tmp_path):
    lab = read(tmp_path, HOSTS)
    assert lab.name == "some-lab"
    assert [(h.name, h.ranks, h.cpus) for h in lab.hosts] == [("a", 1, 1), ("b", 2, 2), ("c", 1, 4)]
    assert len({lab.address(h) for h in "abc"}) == len({lab.class_id(h) for h in "abc"}) == 3


def test_pairs_have_the_default_bandwidth_or_their_own_by_direction(tmp_path):
    links = (
        "links: {default: 1.5gbit, pairs: [{from: a, to: b, bandwidth: 8kbit}, {between: [c, a], bandwidth: 50Mbit}]}"
    )
    rates = read(tmp_path, HOSTS + links).rates
    mbit = {pair: bits / 1e6 for pair, bits in rates.items()}
    assert mbit == {
        ("a", "b"): 0.008, ("b", "a"): 1500, ("a", "c"): 50, ("c", "a"): 50, ("b", "c"): 1500, ("c", "b"): 1500,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hosts: [", "cannot be read"),
        ("", "a mapping of hosts, links, name"),
        ("host: []", "{'host': []}; allowed: a mapping"),
        ("hosts: []", "1 to 250 hosts"),
        ("hosts: [{name: A_B}]", "hosts[0].name: 'A_B'"),
        ("hosts: [{name: switch}]", "not 'switch'"),
        ("hosts: [{name: a}, {name: a}]", "each name once"),
        ("hosts: [{name: a, ranks: 1.5}]", "a whole number"),
        ("hosts: [{name: a, cpus: 0.5}]", "hosts[0].cpus: 0.5; allowed: a whole number"),
        ("hosts: [{name: a, cpus: .nan}]", "hosts[0].cpus: nan"),
        ("name: this-name-is-much-too-long\n" + HOSTS, "name: 'this-name"),
        ("object_store_mb: 1\n" + HOSTS, "at least 80"),
        (HOSTS + "links: {default: 50}", "bandwidth 50; allowed: 8kbit to 100gbit"),
        (HOSTS + "links: {default: 0mbit}", "bandwidth '0mbit'"),
        (HOSTS + "links: {default: 101gbit}", "bandwidth '101gbit'"),
        (HOSTS + "links: {pairs: {}}", "links.pairs: {}; allowed: a list"),
        (HOSTS + "links: {pairs: [{from: a, to: d, bandwidth: 1mbit}]}", "two of a, b, c"),
        (HOSTS + "links: {pairs: [{from: a, to: a, bandwidth: 1mbit}]}", "two of a, b, c"),
        (HOSTS + "links: {pairs: [{from: a, between: [a, b], bandwidth: 1mbit}]}", "from and to, or between"),
        (HOSTS + "links: {pairs: [{from: a, to: b}]}", "bandwidth with from and to"),
        (HOSTS + "links: {pairs: [{from: a, to: b, bandwidth: 1mbit}, {between: [b, a], bandwidth: 2mbit}]}", "once"),
    ],
)
def test_what_is_wrong_in_a_lab_is_said_with_its_place_and_what_is_allowed(tmp_path, text, words):
    with pytest.raises(labs.LabError) as told:
        read(tmp_path, text)
    assert words in str(told.value)
    assert told.value.status == 2


def test_the_labs_of_the_repository_are_what_their_names_say():
    four, two = (labs.read_lab(NETLAB / f"{name}.yaml") for name in ("four-hosts", "two-by-two"))
    assert [h.ranks for h in four.hosts] == [1, 1, 1, 1]
    assert [h.ranks for h in two.hosts] == [2, 2]
    assert any(lab.rates[a, b] != lab.rates[b, a] for lab in (four, two) for a, b in lab.pairs())
    assert not {four.address("h0"), four.address("h1")} & {two.address("h0"), two.address("h1")}


def test_the_program_says_bad_input_in_one_line_with_status_2(tmp_path):
    assert netlab("up", tmp_path / "none.yaml", status=2)[1].startswith("netlab: ")
    assert "a COMMAND after --" in netlab("run", NETLAB / "two-by-two.yaml", status=2)[1]
    assert "a COMMAND after --" in netlab("up", NETLAB / "two-by-two.yaml", "--", "true", status=2)[1]


def test_the_readme_shows_each_verb_and_its_lab_can_be_read(tmp_path):
    text = (NETLAB / "README.md").read_text()
    verbs = re.search(r"\{([\w,]+)\}", netlab("--help")[0])[1].split(",")
    assert len(verbs) == 9
    assert set(verbs) == set(re.findall(r"^\$ \./netlab\.py (\w+)", text, re.M))
    described = read(tmp_path, re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert described.rates == labs.read_lab(NETLAB / "two-by-two.yaml").rates
