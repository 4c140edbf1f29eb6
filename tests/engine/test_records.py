"""Metrics over a resume."""

import json

import pytest

pytest.importorskip("detectron2")

from detectron2.utils.events import EventStorage, JSONWriter

from dn_detr.engine.records import RecordWriter, _keep_lines_until, recent_metrics, restore_metrics
from dn_detr.engine.resume import tell_changes


def write_lines(folder, *iterations, end=""):
    lines = [json.dumps({"iteration": i, "loss": i / 10}) for i in iterations]
    (folder / "metrics.json").write_text("\n".join(lines) + "\n" + end)


def iterations_in(path):
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_later_lines_are_moved_and_a_cut_one_with_them(tmp_path):
    write_lines(tmp_path, 0, 1, 2, 3, end='{"iteration": 4, "lo')
    _keep_lines_until(tmp_path, 1)
    assert iterations_in(tmp_path / "metrics.json") == [0, 1]
    moved = (tmp_path / "metrics_replaced.json").read_text()
    assert moved.count("\n") == 3 and moved.endswith('{"iteration": 4, "lo\n')
    _keep_lines_until(tmp_path, 1)
    assert (tmp_path / "metrics_replaced.json").read_text() == moved


def test_nothing_to_move(tmp_path):
    _keep_lines_until(tmp_path, 3)
    write_lines(tmp_path, 0, 1)
    _keep_lines_until(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_final_evaluation_belongs_to_no_iteration(tmp_path):
    """Its number is that of the first one, should the training go on."""
    writer = RecordWriter(str(tmp_path), max_iter=7, period=1)
    assert writer.state_dict() == {}
    writer.load_state_dict({"written": 7})
    assert writer.state_dict() == {"written": 6}


def test_smoothed_values_go_on(tmp_path):
    def lines(name, *parts):
        """Of iterations 0 to 39, written every 10, in parts with a storage of their own."""
        saved, path = {}, tmp_path / name
        for start, end in parts:
            with EventStorage(start) as storage:
                restore_metrics(storage, saved)
                writer = JSONWriter(str(path))
                writer._last_write = start - 1
                for storage.iter in range(start, end):
                    storage.put_scalar("loss", (storage.iter * 7) % 11)
                    storage.put_scalar("lr", 0.1 / (1 + storage.iter), smoothing_hint=False)
                    if storage.iter % 10 == 9:
                        writer.write()
                saved = recent_metrics(storage)
                writer.close()
        return path.read_text()

    assert lines("straight", (0, 40)) == lines("stopped", (0, 13), (13, 27), (27, 40))


def test_changes_are_told_with_both_values():
    old = "{train: {max_iter: 5, output_dir: a}, model: {layers: [1, 2], gone: 1}}"
    new = "{train: {max_iter: 6, output_dir: b}, model: {layers: [1, 3], new: {a: 1}}}"
    assert tell_changes(old, new) == [
        "model.gone: 1 -> (not there)",
        "model.layers.1: 2 -> 3",
        "model.new.a: (not there) -> 1",
        "train.max_iter: 5 -> 6",
    ]
    assert tell_changes(old, old) == []


@pytest.mark.fault(30)
def test_the_config_of_a_checkpoint_is_not_run(tmp_path, caplog):
    canary = tmp_path / "canary"
    evil = f"model: !!python/object/apply:os.mkdir ['{canary}']"
    assert tell_changes(evil, "model: 1") == []
    assert not canary.exists()
