"""Incidents and endings are complete or absent, and never the reason that a run fails."""

from ringattn.training.health.incidents import Ending, read_ending, read_incidents, record_incident, write_ending


def test_incidents_are_read_in_the_order_in_which_they_came(tmp_path):
    assert read_incidents(tmp_path) == []
    first = record_incident(tmp_path, "bad-checkpoint", "a file is shorter than it was", file="x.safetensors")
    second = record_incident(tmp_path, "hang", "rank 1 stands still", rank=1, step=7)
    assert first is not None
    assert second is not None
    assert second.name.endswith("-hang-rank1.json")
    found = read_incidents(tmp_path)
    assert [one["kind"] for one in found] == ["bad-checkpoint", "hang"]
    assert found[0]["file"] == "x.safetensors"
    assert (found[1]["rank"], found[1]["step"], found[1]["message"]) == (1, 7, "rank 1 stands still")
    first.write_text("{")
    assert [one["kind"] for one in read_incidents(tmp_path)] == ["hang"]


def test_the_newest_ending_is_the_one_that_counts(tmp_path):
    assert read_ending(tmp_path) is None
    write_ending(tmp_path, Ending("failed", True, "rank 1 was killed", 40, rank=1))
    write_ending(tmp_path, Ending("done", False, "all steps are done", 60))
    found = read_ending(tmp_path)
    assert found is not None
    assert (found.state, found.restart, found.step, found.rank) == ("done", False, 60, None)
    assert found.time
    (tmp_path / "exit.json").write_text('{"state": "done"}')
    assert read_ending(tmp_path) is None


def test_a_folder_that_takes_no_files_raises_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert record_incident(blocked, "hang", "rank 1 stands still") is None
    assert not write_ending(blocked, Ending("done", False, "all steps are done", 60))
