"""Growth of costs: every cost at small sizes, and exponents in closed form."""

from benchmarks import growth


def test_every_cost_is_measured_at_every_size(monkeypatch, tmp_path, capsys):
    small = {"image": (100, 200), "rank": (1, 2), "megabyte": (1, 2)}
    monkeypatch.setattr(growth, "COSTS", [cost._replace(sizes=small[cost.unit]) for cost in growth.COSTS])
    monkeypatch.setattr("sys.argv", ["growth", "--folder", str(tmp_path)])
    growth.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(growth.COSTS) and not [*tmp_path.iterdir()]
    assert all("us per" in line or "does not grow" in line for line in lines[2:])


def test_exponents_are_those_of_powers():
    for power in (0, 1, 2):
        assert abs(growth.exponent([10, 100, 1000], [3 * n**power for n in (10, 100, 1000)]) - power) < 1e-9


def test_the_parts_of_a_cost_are_what_they_are_named_for(tmp_path):
    assert len(growth.opening(tmp_path / "store", 30)()) == 30
    assert len(growth.scanning(tmp_path / "images", 130)()) == 130
    keys = growth.keys_of(1000, 4)()
    assert len(keys) == growth.STEPS and {len(each) for each in keys} == {growth.LOCAL_BATCH}
    assert len(growth.order(tmp_path, 7)()) == 1
    (first, *_) = growth.draws(tmp_path, 4)()
    assert first.noise.shape == (growth.LOCAL_BATCH, 4, 32, 32) and len(first.t) == growth.LOCAL_BATCH
